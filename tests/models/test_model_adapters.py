"""`task_of`: networks of other libraries, each scored, pruned, trained for an epoch and measured by its own task."""

import json
import sys

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from obc_tools import evaluate, export_program, fit, load_model, prune, prune_to, task_of
from obc_tools.state import Forward, call_model
from obc_tools.training.recipe import Recipe

IMAGES = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
TOKENS = torch.randint(1, 50, (4, 12), generator=torch.Generator().manual_seed(0))
BOXES = [{"boxes": torch.tensor([[8.0, 8.0, 40.0, 40.0]]), "labels": torch.tensor([1])} for _ in range(3)]
BOXES.append({"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)})
SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**SMALL, num_key_value_heads=2, vocab_size=50, max_position_embeddings=12)
    return LlamaForCausalLM(config), TOKENS


def bert(head):
    import transformers

    config = transformers.BertConfig(**SMALL, vocab_size=50, max_position_embeddings=16, num_labels=3)
    labels = TOKENS.where(TOKENS % 3 == 0, -100) if head == "MaskedLM" else torch.tensor([0, 1, 2, 0])
    batch = {"input_ids": TOKENS, "attention_mask": torch.ones_like(TOKENS), "labels": labels}
    return getattr(transformers, f"BertFor{head}")(config), batch


def t5():
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4, "decoder_start_token_id": 0}
    batch = {"input_ids": TOKENS, "labels": TOKENS.where(TOKENS % 5 != 0, -100)[:, 2:9]}
    return T5ForConditionalGeneration(T5Config(vocab_size=50, **sizes)), batch


def bart():
    from transformers import BartConfig, BartForConditionalGeneration

    sides = {f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in
             (("layers", 1), ("attention_heads", 4), ("ffn_dim", 48))}  # fmt: skip
    options = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
    config = BartConfig(vocab_size=50, d_model=32, max_position_embeddings=16, **sides, **options)
    return BartForConditionalGeneration(config), {"input_ids": TOKENS, "labels": TOKENS.flip(1)}


def vit():
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(**SMALL, image_size=64, patch_size=16, num_labels=3)
    return ViTForImageClassification(config), {"pixel_values": IMAGES, "labels": torch.tensor([0, 1, 2, 0])}


def clip():
    from transformers import CLIPConfig, CLIPModel

    vision = SMALL | {"image_size": 64, "patch_size": 16}
    config = CLIPConfig(
        text_config=SMALL | {"vocab_size": 50, "max_position_embeddings": 12, "eos_token_id": 49},
        vision_config=vision,
        projection_dim=16,
    )
    return CLIPModel(config), (IMAGES, TOKENS)


def open_clip():
    from open_clip.model import CLIP

    vision = {"layers": 1, "width": 64, "head_width": 16, "patch_size": 16, "image_size": 64}
    return CLIP(32, vision, {"context_length": 12, "vocab_size": 50, "width": 64, "heads": 4, "layers": 1}), (
        IMAGES,
        TOKENS,
    )


def lraspp():
    from torchvision.models.segmentation import lraspp_mobilenet_v3_large

    masks = torch.randint(3, (4, 64, 64), generator=torch.Generator().manual_seed(0))
    return lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=3), (IMAGES, masks)


def ssdlite():
    from torchvision.models.detection import ssdlite320_mobilenet_v3_large

    return ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=3), (IMAGES, BOXES)


def yolo():
    from ultralytics.nn.tasks import DetectionModel

    return DetectionModel("yolo11n.yaml", nc=3, verbose=False), (IMAGES, BOXES)


NETWORKS = {
    "llama": (llama, "language_model", {}),
    "bert, masked": (lambda: bert("MaskedLM"), "masked_language_model", {}),
    "bert, sequences": (lambda: bert("SequenceClassification"), "classification", {}),
    "t5": (t5, "sequence_to_sequence", {}),
    "bart": (bart, "sequence_to_sequence", {}),
    "vit": (vit, "classification", {}),
    "clip": (clip, "image_text", {}),
    "open_clip": (open_clip, "image_text", {}),
    "lraspp": (lraspp, "segmentation", {}),
    "ssdlite": (ssdlite, "detection", {}),
    "yolo": (yolo, "detection", {"ignore": ("*.dfl.conv",)}),
}


def made(name):
    build, wanted, options = NETWORKS[name]
    library = {"open_clip": "open_clip", "yolo": "ultralytics"}.get(name, "transformers")
    if name not in ("lraspp", "ssdlite"):
        pytest.importorskip(library)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, batch = build()
    return model.eval(), batch, wanted, options


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_of_a_library_goes_through_by_its_own_task(name):
    model, batch, wanted, options = made(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    attributes = set(vars(model))
    task = task_of(model)
    assert task.name == wanted
    found = evaluate(model, [batch], task=task)
    plan = prune_to(
        model, task.example(batch), [batch], task=task, ratio=0.2, steps=1, progress=False, verify=False, **options
    )
    assert plan.channels_removed
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert set(vars(model)) == attributes
    pruned = prune(model, plan)
    history = fit(pruned, [batch], [batch], Recipe(epochs=1, lr=1e-4), task=task, progress=False)
    assert {*history.last.values} == {*found.values} and history.last.train_loss > 0


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NETWORKS)
def test_what_a_task_asks_of_a_network_can_be_exported(name):
    model, batch, _, _ = made(name)
    example = task_of(model).example(batch)
    given = (example.inputs,) if isinstance(example, Forward) else (example,)
    found = export_program(model, example).module()(*given)
    with torch.no_grad():
        pairs = zip(tree_leaves(found), tree_leaves(call_model(model, example)), strict=True)
        tensors = [pair for pair in pairs if isinstance(pair[0], torch.Tensor)]
    for one, other in tensors:
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert tensors


def test_tokens_and_lengths_that_the_model_does_not_take():
    model, tokens, _, _ = made("llama")
    task = task_of(model)
    with pytest.raises(ValueError, match="sequences of 24 tokens for a model that takes 12"):
        evaluate(model, [tokens.repeat(1, 2)], task=task)
    with pytest.raises(ValueError, match="token 50 for a model of 50 tokens"):
        evaluate(model, [tokens.clamp_min(50)], task=task)
    classifier, batch, _, _ = made("bert, sequences")
    longer = {name: value.repeat(1, 2) for name, value in batch.items() if value.ndim == 2}
    with pytest.raises(ValueError, match="sequences of 24 tokens for a model that takes 16"):
        evaluate(classifier, [batch | longer], task=task_of(classifier))
    with pytest.raises(ValueError, match="label 7 for a model with 3 outputs"):
        evaluate(classifier, [batch | {"labels": batch["labels"] + 5}], task=task_of(classifier))
    masked, batch, _, _ = made("bert, masked")
    with pytest.raises(ValueError, match="batches need 'labels', the tokens that were masked, and -100 for all others"):
        evaluate(masked, [{"input_ids": batch["input_ids"]}], task=task_of(masked))


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_a_network_that_writes_sequences_has_its_own_loss(name):
    model, batch, _, _ = made(name)
    task, counts = task_of(model), (batch["labels"] != -100).sum(1)
    with torch.no_grad():
        mean = (task.losses(model, batch) * counts).sum() / counts.sum()
        own = model(input_ids=batch["input_ids"], labels=batch["labels"].contiguous()).loss
    torch.testing.assert_close(mean, own)
    with pytest.raises(ValueError, match="batches need 'labels', the tokens to be written"):
        evaluate(model, [{"input_ids": TOKENS}], task=task)


@pytest.mark.parametrize("name", ["clip", "open_clip"])
def test_captions_that_the_model_does_not_take(name):
    model, (images, tokens), _, _ = made(name)
    recipe, untrained = Recipe(epochs=1), [value.clone() for value in model.state_dict().values()]
    for wrong, message in (
        (tokens.repeat(1, 2), "train, batch 1: .*sequences of 24 tokens for a model that takes 12"),
        (tokens.clamp_min(50), "train, batch 1: .*token 50 for a model of 50 tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            fit(model, [(images, wrong)], [(images, tokens)], recipe, task=task_of(model), progress=False)
    assert all(torch.equal(*pair) for pair in zip(model.state_dict().values(), untrained, strict=True))


def test_the_task_of_one_s_own_network_is_not_guessed():
    with pytest.raises(ValueError, match="Sequential comes from no library whose tasks are known"):
        task_of(nn.Sequential(nn.Linear(2, 2)))
    pytest.importorskip("transformers")
    from transformers import BertConfig, BertModel

    with pytest.raises(
        ValueError, match="BertModel has no head that tells what it is for: pass task=, such as 'outputs'"
    ):
        task_of(BertModel(BertConfig(**SMALL, vocab_size=50)))
    assert "obc_tools" in sys.modules


def test_networks_of_transformers_from_a_folder(tmp_path):
    model, tokens, _, _ = made("llama")
    model.save_pretrained(tmp_path)
    same = load_model(f"transformers:{tmp_path}", weights="pretrained").eval()
    assert type(same) is type(model) and torch.equal(same(tokens).logits, model(tokens).logits)
    fresh = load_model(f"transformers:{tmp_path}").eval()
    assert not torch.equal(fresh(tokens).logits, model(tokens).logits)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["OfSomebody"]}))
    with pytest.raises(ValueError, match="OfSomebody is no network of transformers itself"):
        load_model(f"transformers:{tmp_path}")
    with pytest.raises(ValueError, match=r"is no folder with a config.json: transformers' networks are read from one"):
        load_model(f"transformers:{tmp_path / 'nothing'}")


@pytest.mark.filterwarnings("ignore")
def test_networks_of_ultralytics_by_name():
    pytest.importorskip("ultralytics")
    model = load_model("ultralytics:yolo11n", num_classes=3)
    assert model.model[-1].nc == 3 and task_of(model).name == "detection"
    with pytest.raises(ValueError, match="network 'ultralytics:yolo99z': "):
        load_model("ultralytics:yolo99z")
    with pytest.raises(ValueError, match="pretrained weights of 'ultralytics:yolo11n' are not downloaded here"):
        load_model("ultralytics:yolo11n", weights="pretrained")
