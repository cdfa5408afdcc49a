"""The zoo's networks for tasks other than classification: of transformers, diffusers and others, small and random."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from obc_tools import task_of

TOKENS, LENGTH, SIDE = 61, 12, 32

_TEXT = {
    "vocab_size": TOKENS, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 64, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_GROUPED = _TEXT | {"num_key_value_heads": 2}
_EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
_NAMED = {
    "vocab_size": TOKENS, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2,
}  # fmt: skip
_PIXELS = {
    "image_size": SIDE, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 64,
}  # fmt: skip

CONFIGS: dict[str, tuple[str, dict[str, Any], str]] = {
    "gpt2": ("GPT2LMHeadModel", {"vocab_size": TOKENS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
             "t"),
    "llama": ("LlamaForCausalLM", _TEXT, "t"),
    "llama, grouped": ("LlamaForCausalLM", _GROUPED, "t"),
    "mistral": ("MistralForCausalLM", _GROUPED, "t"),
    "phi": ("PhiForCausalLM", _TEXT, "t"),
    "phi3": ("Phi3ForCausalLM", _GROUPED, "t"),
    "qwen2": ("Qwen2ForCausalLM", _GROUPED, "t"),
    "qwen3": ("Qwen3ForCausalLM", _GROUPED | {"head_dim": 8}, "t"),
    "gemma": ("GemmaForCausalLM", _GROUPED | {"head_dim": 8}, "t"),
    "gemma2": ("Gemma2ForCausalLM", _GROUPED | {"head_dim": 8}, "t"),
    "gpt_neox": ("GPTNeoXForCausalLM", _TEXT, "t"),
    "gpt_neo": ("GPTNeoForCausalLM", {"vocab_size": TOKENS, "hidden_size": 32, "num_layers": 2, "num_heads": 4,
                "attention_types": [[["global", "local"], 1]], "max_position_embeddings": 64}, "t"),
    "gptj": ("GPTJForCausalLM", {"vocab_size": TOKENS, "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4,
             "n_positions": 64}, "t"),
    "opt": ("OPTForCausalLM", _TEXT | {"ffn_dim": 64, "word_embed_proj_dim": 32}, "t"),
    "falcon": ("FalconForCausalLM", _TEXT, "t"),
    "bloom": ("BloomForCausalLM", {"vocab_size": TOKENS, "hidden_size": 32, "n_layer": 2, "n_head": 4}, "t"),
    "olmo2": ("Olmo2ForCausalLM", _GROUPED, "t"),
    "starcoder2": ("Starcoder2ForCausalLM", _GROUPED, "t"),
    "stablelm": ("StableLmForCausalLM", _GROUPED, "t"),
    "cohere": ("CohereForCausalLM", _GROUPED, "t"),
    "smollm3": ("SmolLM3ForCausalLM", _GROUPED, "t"),
    "granite": ("GraniteForCausalLM", _GROUPED, "t"),
    "mixtral": ("MixtralForCausalLM", _GROUPED | _EXPERTS, "t"),
    "qwen3_moe": ("Qwen3MoeForCausalLM", _GROUPED | _EXPERTS | {"head_dim": 8}, "t"),
    "mamba": ("MambaForCausalLM", {"vocab_size": TOKENS, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
              "t"),
    "rwkv": ("RwkvForCausalLM", {"vocab_size": TOKENS, "hidden_size": 32, "num_hidden_layers": 2}, "t"),
    "bert": ("BertForMaskedLM", _TEXT, "t"),
    "bert, classifier": ("BertForSequenceClassification", _TEXT, "t"),
    "roberta": ("RobertaForMaskedLM", _TEXT, "t"),
    "distilbert": ("DistilBertForMaskedLM", {"vocab_size": TOKENS, "dim": 32, "n_layers": 2, "n_heads": 4,
                   "hidden_dim": 64}, "t"),
    "electra": ("ElectraForMaskedLM", _TEXT | {"embedding_size": 16}, "t"),
    "albert": ("AlbertForMaskedLM", _TEXT | {"embedding_size": 16}, "t"),
    "deberta_v2": ("DebertaV2ForMaskedLM", _TEXT | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}, "t"),
    "modernbert": ("ModernBertForMaskedLM", _TEXT | {"cls_token_id": 1, "sep_token_id": 2}, "t"),
    "t5": ("T5ForConditionalGeneration", {"vocab_size": TOKENS, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2,
           "num_heads": 4, "decoder_start_token_id": 0}, "tt"),
    "bart": ("BartForConditionalGeneration", _NAMED, "tt"),
    "pegasus": ("PegasusForConditionalGeneration", _NAMED, "tt"),
    "whisper": ("WhisperForConditionalGeneration", _NAMED | {"num_mel_bins": 16, "max_source_positions": 24,
                "max_target_positions": 24}, "a"),
    "wav2vec2": ("Wav2Vec2ForCTC", _TEXT | {"conv_dim": (16, 16), "conv_stride": (5, 4), "conv_kernel": (10, 8),
                 "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 4, "apply_spec_augment": False}, "w"),
    "hubert": ("HubertForCTC", _TEXT | {"conv_dim": (16, 16), "conv_stride": (5, 4), "conv_kernel": (10, 8),
               "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 4, "apply_spec_augment": False}, "w"),
    "clip": ("CLIPModel", {"text_config": _TEXT, "vision_config": _PIXELS, "projection_dim": 16}, "it"),
    "siglip": ("SiglipModel", {"text_config": _TEXT | {"projection_size": 32}, "vision_config": _PIXELS}, "it"),
    "vit": ("ViTForImageClassification", _PIXELS, "i"),
    "deit": ("DeiTForImageClassification", _PIXELS, "i"),
    "dinov2": ("Dinov2ForImageClassification", _PIXELS, "i"),
    "beit": ("BeitForImageClassification", _PIXELS, "i"),
    "swin": ("SwinForImageClassification", {"image_size": SIDE, "patch_size": 4, "embed_dim": 16, "depths": [1, 1],
             "num_heads": [2, 4], "window_size": 4}, "i"),
    "convnext": ("ConvNextForImageClassification", {"hidden_sizes": [16, 24, 32, 48], "depths": [1, 1, 1, 1]}, "i"),
    "segformer": ("SegformerForSemanticSegmentation", {"hidden_sizes": [16, 24, 32, 48], "depths": [1, 1, 1, 1],
                  "num_attention_heads": [1, 2, 2, 4], "decoder_hidden_size": 32}, "i"),
    "yolos": ("YolosForObjectDetection", _PIXELS | {"image_size": [SIDE, SIDE], "num_detection_tokens": 5}, "i"),
    "detr": ("DetrForObjectDetection", _NAMED | {"num_queries": 6, "use_timm_backbone": False,
             "use_pretrained_backbone": False, "backbone": None,
             "backbone_config": {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [16, 24, 32, 48],
                                 "depths": [1, 1, 1, 1], "out_features": ["stage4"]}}, "I"),
}  # fmt: skip
"""transformers' networks: class, configuration, and which inputs they take."""


def _tokens() -> Tensor:
    return torch.randint(3, TOKENS, (2, LENGTH), generator=torch.Generator().manual_seed(1))


def _noise(*shape: int) -> Tensor:
    return torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))


def _inputs(kind: str) -> dict[str, Tensor]:
    """Return what a network takes by keyword: t tokens, tt and decoder's, i images, it both, a spectra, w waves."""
    tokens, images = {"input_ids": _tokens()}, {"pixel_values": _noise(3, SIDE, SIDE)}
    return {
        "t": tokens,
        "tt": tokens | {"decoder_input_ids": _tokens()[:, :8]},
        "i": images,
        "I": {"pixel_values": _noise(3, 64, 64)},
        "it": images | tokens,
        "a": {"input_features": _noise(16, 48), "decoder_input_ids": _tokens()[:, :8]},
        "w": {"input_values": _noise(800)},
    }[kind]


def _transformers(name: str) -> nn.Module:
    import transformers

    kind, options, _ = CONFIGS[name]
    cls = getattr(transformers, kind)
    model = cls(cls.config_class(**options))
    if "mixtral" in name or "moe" in name:  # all experts at once need widths of whole 16 bytes
        model.set_experts_implementation("eager")
    return model


def _diffusers(name: str) -> nn.Module:
    import diffusers

    options = {
        "UNet2DModel": {"sample_size": 16, "block_out_channels": (32, 64), "layers_per_block": 1,
                        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
                        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"), "norm_num_groups": 8},
        "UNet2DConditionModel": {"sample_size": 16, "block_out_channels": (32, 64), "layers_per_block": 1,
                                 "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
                                 "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "norm_num_groups": 8,
                                 "cross_attention_dim": 24, "attention_head_dim": 8},
        "AutoencoderKL": {"block_out_channels": (16, 32), "norm_num_groups": 8, "latent_channels": 4,
                          "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2},
    }  # fmt: skip
    return getattr(diffusers, name)(**options[name])


DIFFUSERS: dict[str, Callable[[], dict[str, Any]]] = {
    "UNet2DModel": lambda: {"sample": _noise(3, 16, 16), "timestep": torch.tensor([3, 7])},
    "UNet2DConditionModel": lambda: {
        "sample": _noise(4, 16, 16), "timestep": torch.tensor([3, 7]), "encoder_hidden_states": _noise(5, 24)
    },
    "AutoencoderKL": lambda: {"sample": _noise(3, 32, 32)},
}  # fmt: skip

_UNWEIGHTED = {"weights": None, "weights_backbone": None, "num_classes": 4}
DENSE = ("fcn_resnet50", "deeplabv3_mobilenet_v3_large", "lraspp_mobilenet_v3_large")
DETECTORS = (
    "fasterrcnn_mobilenet_v3_large_320_fpn", "ssdlite320_mobilenet_v3_large", "retinanet_resnet50_fpn",
    "fcos_resnet50_fpn", "maskrcnn_resnet50_fpn",
)  # fmt: skip
SEGMENTERS = ("Unet", "UnetPlusPlus", "FPN", "Linknet", "DeepLabV3Plus", "PSPNet", "MAnet", "PAN")
YOLOS = ("yolov8n", "yolo11n", "yolo12n", "yolov8n-seg", "yolo11n-cls")


def _torchvision(name: str) -> nn.Module:
    return torchvision.models.get_model(name, **_UNWEIGHTED)


def _open_clip(name: str) -> nn.Module:
    import open_clip

    vision, text = ("image_size", SIDE), ("context_length", LENGTH)
    sizes = {
        "ViT": {"layers": 2, "width": 32, "head_width": 8, "patch_size": 8},
        "ModifiedResNet": {"layers": (1, 1, 1, 1), "width": 16, "head_width": 16},
        "CoCa": {"layers": 2, "width": 32, "head_width": 8, "patch_size": 8},
    }
    words = {"vocab_size": TOKENS, "width": 32, "heads": 4, "layers": 2} | dict([text])
    return open_clip.CLIP(embed_dim=16, vision_cfg=sizes[name] | dict([vision]), text_cfg=words)


def _segmenter(name: str) -> nn.Module:
    import segmentation_models_pytorch

    return getattr(segmentation_models_pytorch, name)("resnet18", encoder_weights=None, classes=4)


def _yolo(name: str) -> nn.Module:
    os.environ["YOLO_OFFLINE"] = "1"
    os.environ.setdefault("YOLO_CONFIG_DIR", tempfile.mkdtemp())
    from ultralytics import YOLO

    return YOLO(f"{name}.yaml").model


def _boxes(side: int) -> list[dict[str, Tensor]]:
    """Return a box of a class for either image, with its mask."""
    found = []
    for number in (1, 2):
        mask = torch.zeros(1, side, side, dtype=torch.uint8)
        mask[:, 8 : 8 + 16 * number, 8:40] = 1
        box = torch.tensor([[8.0, 8.0, 40.0, 8.0 + 16 * number]])
        found.append({"boxes": box, "labels": torch.tensor([number]), "masks": mask})
    return found


def _labelled(kind: str, inputs: dict[str, Tensor]) -> dict[str, Any]:
    """Return the inputs of a network of transformers with labels, where its task has any."""
    classes = torch.tensor([0, 1])
    boxes = [{"class_labels": classes[:1], "boxes": torch.tensor([[0.4, 0.4, 0.5, share]])} for share in (0.3, 0.6)]
    pixels = torch.arange(2 * SIDE * SIDE).view(2, SIDE, SIDE) % 2
    labels = {
        "MaskedLM": lambda: torch.where(_tokens() % 3 == 0, _tokens(), -100), "Classification": lambda: classes,
        "SemanticSegmentation": lambda: pixels, "ObjectDetection": lambda: boxes, "CTC": lambda: _tokens()[:, :4],
        "ConditionalGeneration": lambda: _tokens()[:, 1:9].clone(),
    }  # fmt: skip
    made = next((make() for end, make in labels.items() if kind.endswith(end)), None)
    return inputs if made is None else inputs | {"labels": made}


def _own_loss(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """Return the loss that a network of transformers computes itself."""
    return model(**batch).loss


def _noise_missed(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """Return how far a network of diffusers is from the noise that it shall find, or the image that it shall give."""
    wanted = _noise(*batch["sample"].shape[1:]).to(batch["sample"])
    return nn.functional.mse_loss(model(**batch).sample, wanted)


def real_loss(source: str, name: str, model: nn.Module, inputs: Any) -> tuple[Callable[[nn.Module, Any], Tensor], Any]:
    """Return the loss that a network of another task is trained by, and a batch of it."""
    if source == "diffusers":
        return _noise_missed, inputs
    if source == "transformers":
        batch = _labelled(CONFIGS[name][0], inputs)
        try:
            return task_of(model).losses, batch
        except ValueError:  # no task of the library's: its own loss
            return _own_loss, batch | ({"return_loss": True} if name == "siglip" else {})
    losses = task_of(model).losses
    if source == "open_clip":
        return losses, inputs
    if name in DETECTORS:
        return losses, (inputs[0], _boxes(96))
    if source != "ultralytics":
        return losses, (inputs, (inputs.sum(1) > 0).long())
    rows = torch.tensor([0, 1])
    shares = {"bboxes": torch.tensor([[0.4, 0.4, 0.5, 0.3], [0.4, 0.4, 0.5, 0.6]]), "cls": rows[:, None].float()}
    masks = (torch.arange(256).view(1, 16, 16) % 16 < 8).float().repeat(2, 1, 1)
    batch = {"img": inputs, "batch_idx": rows.float(), "masks": masks, **shares}
    return losses, batch | ({"cls": rows} if name.endswith("-cls") else {})


Made = tuple[str, str, Callable[[], nn.Module], Callable[[], Any]]


def made() -> list[Made]:
    """Return the source, the name, what builds it, and what makes its inputs, of each network."""
    images, larger = (partial(_noise, 3, side, side) for side in (64, 128))
    pairs = lambda: (_noise(3, SIDE, SIDE), _tokens())  # noqa: E731
    lists = lambda: ([_noise(3, 96, 96)[0], _noise(3, 96, 96)[1]],)  # noqa: E731
    return [
        *(("transformers", name, partial(_transformers, name), partial(_inputs, CONFIGS[name][2])) for name in CONFIGS),
        *(("diffusers", name, partial(_diffusers, name), inputs) for name, inputs in DIFFUSERS.items()),
        *(("torchvision", name, partial(_torchvision, name), images) for name in DENSE),
        *(("torchvision", name, partial(_torchvision, name), lists) for name in DETECTORS),
        *(("open_clip", name, partial(_open_clip, name), pairs) for name in ("ViT", "ModifiedResNet")),
        *(("smp", n, partial(_segmenter, n), larger if n == "PAN" else images) for n in SEGMENTERS),
        *(("ultralytics", name, partial(_yolo, name), images) for name in YOLOS),
    ]
