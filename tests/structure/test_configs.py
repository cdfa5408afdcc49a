"""What the configuration of a pruned network of transformers says, and what save_pretrained writes or refuses."""

import copy

import diffusers
import pytest
import torch
import transformers

from obc_tools import find_groups, load_pruned, make_plan, prune, save_pruned, score_groups
from obc_tools.pruning.plan import PruningPlan
from obc_tools.structure.configs import ConfigError

TOKENS = torch.arange(12).reshape(2, 6)
SMALL = {
    "vocab_size": 13,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2 = {"vocab_size": 13, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 16} | {
    key: SMALL[key] for key in ("pad_token_id", "bos_token_id", "eos_token_id")
}
NETWORKS = {
    "LlamaForCausalLM": SMALL | {"num_key_value_heads": 2},
    "Qwen3ForCausalLM": SMALL | {"num_key_value_heads": 2, "head_dim": 4},
    "GPT2LMHeadModel": GPT2,
    "BertForMaskedLM": SMALL,
    "GemmaForCausalLM": SMALL | {"num_key_value_heads": 2, "head_dim": 4},
}


def made(name: str, options=None):
    torch.manual_seed(0)
    cls = getattr(transformers, name)
    return cls(cls.config_class(**(NETWORKS[name] if options is None else options))).eval()


def half(model) -> PruningPlan:
    return make_plan(score_groups(model, find_groups(model, TOKENS), "l1"), ratio=0.5, scope="local")


@torch.no_grad()
def logits(model):
    return model(TOKENS).logits


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "Qwen3ForCausalLM", "GPT2LMHeadModel", "BertForMaskedLM"])
def test_the_configuration_follows_and_a_network_is_made_of_it_again(name, tmp_path):
    model = made(name)
    before, plan = copy.deepcopy(model.config), half(model)
    pruned = prune(model, plan)
    pruned.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(logits(again), logits(pruned))
    assert pruned.config.hidden_size == 8 and pruned.config.num_attention_heads == 2
    assert model.config.to_dict() == before.to_dict()


def test_an_entry_that_is_usually_not_given_is_found():
    model = made("GPT2LMHeadModel")
    groups = find_groups(model, TOKENS)
    plan = PruningPlan.whole(groups).choose(("transformer.h.0.mlp.c_fc", "out"), remove=range(14))
    plan = plan.choose(("transformer.h.1.mlp.c_fc", "out"), remove=range(10, 24))
    assert model.config.n_inner is None and prune(model, plan).config.n_inner == 50


def test_layers_of_different_widths_are_in_no_configuration(tmp_path):
    model = made("LlamaForCausalLM")
    plan = PruningPlan.whole(find_groups(model, TOKENS)).choose(("model.layers.1.mlp.up_proj", "out"), remove=range(8))
    pruned = prune(model, plan)
    with pytest.raises(ConfigError, match="no configuration of Llama.*layers.1.mlp.gate_proj.weight.*save_pruned"):
        pruned.save_pretrained(tmp_path / "never")
    assert pruned.config.intermediate_size == 24 and not (tmp_path / "never").exists()
    save_pruned(tmp_path / "kept", pruned, plan)
    assert torch.equal(logits(load_pruned(tmp_path / "kept", model=made("LlamaForCausalLM"))), logits(pruned))


def test_what_the_constructor_makes_of_an_entry_must_be_as_it_was(tmp_path):
    model = made("GemmaForCausalLM")
    pruned = prune(model, half(model))
    with pytest.raises(ConfigError, match="makes 'model.embed_tokens.embed_scale' anew"):
        pruned.save_pretrained(tmp_path)
    assert pruned.config.hidden_size == 16


class Scaled(transformers.LlamaForCausalLM):
    """Reads its width from the configuration while it runs."""

    def forward(self, input_ids, **options):
        output = super().forward(input_ids, **options)
        output.logits = output.logits / self.config.hidden_size
        return output


def test_an_entry_that_a_forward_pass_reads_stays(tmp_path):
    torch.manual_seed(0)
    model = Scaled(transformers.LlamaConfig(**NETWORKS["LlamaForCausalLM"])).eval()
    pruned = prune(model, half(model))
    assert pruned.config.hidden_size == 16
    with pytest.raises(ConfigError, match="no configuration of Scaled"):
        pruned.save_pretrained(tmp_path)


def test_a_plan_that_removes_nothing_changes_no_configuration(tmp_path):
    model = made("LlamaForCausalLM")
    pruned = prune(model, PruningPlan.whole(find_groups(model, TOKENS)))
    assert pruned.config.to_dict() == model.config.to_dict()
    pruned.save_pretrained(tmp_path)
    assert torch.equal(logits(type(model).from_pretrained(tmp_path).eval()), logits(model))


def test_other_libraries_configurations_are_refused(tmp_path):
    blocks = {"down_block_types": ("DownEncoderBlock2D",), "up_block_types": ("UpDecoderBlock2D",)}
    model = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=2, latent_channels=2, **blocks).eval()
    images = torch.randn(1, 3, 8, 8)
    pruned = prune(model, make_plan(score_groups(model, find_groups(model, images), "l1"), ratio=0.5, scope="local"))
    with pytest.raises(ConfigError, match="the configuration of AutoencoderKL cannot say the widths"):
        pruned.save_pretrained(tmp_path)
