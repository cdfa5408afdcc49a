"""The networks of the zoo, how they are built small, and how every number in them is made to matter."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torchvision
from torch import nn
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from torchvision.models.regnet import BlockParams, RegNet
from torchvision.models.vision_transformer import VisionTransformer
from zoo_tasks import made

from obc_tools import load_model
from obc_tools.state import call_model, evaluating

BATCH, CLASSES = 2, 10


@dataclass(frozen=True)
class Case:
    """One network: where it is from, its builder's name and options, the side of its input.

    ``reduced`` says what was made smaller, for networks above 150 million parameters. ``onnx``: export it too.
    """

    source: str
    name: str
    size: int
    options: dict[str, Any] = field(default_factory=dict)
    reduced: str = ""
    onnx: bool = False

    @property
    def id(self) -> str:
        return f"{self.source}:{self.name}"


REDUCED = {
    "convnext_large": ("blocks 1, 1, 1, 1 of 3, 3, 27, 3", partial(
        ConvNeXt, [CNBlockConfig(192, 384, 1), CNBlockConfig(384, 768, 1), CNBlockConfig(768, 1536, 1),
                   CNBlockConfig(1536, None, 1)])),
    "regnet_y_128gf": ("blocks 1, 1, 1, 1 of 2, 7, 17, 1", partial(
        RegNet, BlockParams([1, 1, 1, 1], [528, 1056, 2904, 7392], [264] * 4, [1.0] * 4, [2] * 4, 0.25))),
    "vit_h_14": ("2 layers of 32", partial(VisionTransformer, 28, 14, 2, 16, 1280, 5120)),
    "vit_l_16": ("4 layers of 24", partial(VisionTransformer, 32, 16, 4, 16, 1024, 4096)),
    "vit_l_32": ("4 layers of 24", partial(VisionTransformer, 64, 32, 4, 16, 1024, 4096)),
}  # fmt: skip
"""torchvision's networks above 150 million parameters: what is reduced, and how to build that."""

_TIMM = """
    test_efficientnet test_nfnet test_mambaout test_byobnet test_convnext test_vit test_resnet lcnet_035
    starnet_s050 test_coatnet test_vit_relpos dla46x_c mobilevit_xxs repghostnet_050 edgenext_xx_small ghostnet_050
    ese_vovnet19b_slim_dw efficientvit_b0 efficientvit_m0 regnetx_002 cspnext_tiny iformer_t fasternet_t0
    cs3darknet_focus_s lcnetv2_small xcit_nano_12_p8_224 swiftformer_xs inception_next_atto efficientformerv2_s0
    fastvit_t8 pvt_v2_b0 rexnet_100 hardcorenas_b hgnetv2_b0 pit_ti_224 gmlp_ti16_224 repvit_m1 cpubone_nano
    tiny_vit_5m_224 coat_tiny eva02_tiny_patch14_224 convit_tiny deit_tiny_patch16_224 efficientvim_m1 shvit_s1
    vit_tiny_r_s16_p8_224 crossvit_tiny_240 densenet121 levit_128s halonet_h1 dpn48b resnest14d visformer_tiny
    csatv2 hrnet_w18_small resnetv2_18 legacy_seresnet18 poolformerv2_s12 efficientformer_l1 gcvit_xxtiny skresnet18
    cait_xxs24_224 lowformer_b0 nest_tiny convmixer_768_32 legacy_xception inception_v3 vitamin_small_224 res2next50
    rdnet_tiny tnt_s_legacy_patch16_224 mvitv2_tiny twins_svt_small xception41p volo_d1_224 hiera_tiny_224
    sam2_hiera_tiny sequencer2d_s swin_tiny_patch4_window7_224 swinv2_cr_tiny_224 swinv2_tiny_window8_256 davit_tiny
    focalnet_tiny_srf selecsls42 tresnet_m nextvit_small inception_v4 inception_resnet_v2 mobilenetv5_base
    pnasnet5large nasnetalarge beit_base_patch16_224 samvit_base_patch16_224 naflexvit_base_patch16_parfac_gap
    qwen3_vit_88m vgg11 gemma4_vit_167m deepseek_vit_412m
"""
"""One network of each of timm's modules, its smallest that differs from others; small ones first."""

_TIMM_MORE = """
    test_efficientnet_gn test_efficientnet_ln test_convnext3 test_convnext2 test_vit2 mobilenetv2_035
    mobilenetv3_small_050 mobilenetv4_conv_small_035 mnasnet_small test_vit3 test_maxvit mobilevitv2_050
    convnext_zepto_rms mixnet_s cs3darknet_s tf_efficientnet_lite0 convnextv2_atto efficientnet_b0 mobileone_s0
    ghostnetv2_100 resnet10t coat_lite_tiny vit_tiny_patch16_224 vit_tiny_patch16_dinov3_qkvb
    deit_tiny_distilled_patch16_224 regnetz_005 gernet_s nf_regnet_b0 repvgg_a0 lambda_resnet26t botnet26t_256
    gmixer_12_224 resnetblur18 seresnet18 poolformer_s12 dpn68 hgnet_tiny nf_resnet26 resnet26t ecaresnet26t
    resmlp_12_224 dla34 mixer_s16_224 vit_srelpos_small_patch16_224 resnext50_32x4d resnetv2_50x1_bit caformer_s18
"""
"""Further networks of timm with parts that the first of their module lack; small ones first."""

_TIMM_FIXED = """
    beit_base_patch16_224 botnet26t_256 cait_xxs24_224 coat_lite_tiny coat_tiny convit_tiny
    deit_tiny_distilled_patch16_224 deit_tiny_patch16_224 efficientformerv2_s0 eva02_tiny_patch14_224 gcvit_xxtiny
    gmixer_12_224 gmlp_ti16_224 hiera_tiny_224 levit_128s mixer_s16_224 nest_tiny pit_ti_224 resmlp_12_224
    swin_tiny_patch4_window7_224 swinv2_cr_tiny_224 swinv2_tiny_window8_256 test_coatnet test_maxvit test_vit3
    test_vit_relpos tnt_s_legacy_patch16_224 visformer_tiny vit_srelpos_small_patch16_224 vit_tiny_patch16_224
    vit_tiny_r_s16_p8_224 vitamin_small_224 volo_d1_224
"""
"""timm's networks that must be built for 32 pixels a side."""

_TIMM_LARGER = {
    "csatv2": (64, {}),
    "deepseek_vit_412m": (112, {"depth": 2}),
    "efficientformer_l1": (224, {}),
    "gemma4_vit_167m": (32, {"depth": 2}),
    "ghostnetv2_100": (48, {}),
    "halonet_h1": (256, {}),
    "inception_resnet_v2": (96, {}),
    "inception_v3": (96, {}),
    "inception_v4": (96, {}),
}
"""timm's networks that need more pixels or are reduced: the side, the options."""

_TORCHVISION_SIZES = {
    "alexnet": 64,
    "inception_v3": 75,
    "maxvit_t": 224,
    "vit_b_32": 64,
    "vit_h_14": 28,
    "vit_l_32": 64,
}

_TORCHVISION_OPTIONS = {
    "googlenet": {"init_weights": False},
    "inception_v3": {"init_weights": False},
    "vit_b_16": {"image_size": 32},
    "vit_b_32": {"image_size": 64},
}

_ONNX = {
    "torchvision": """
        alexnet convnext_tiny densenet121 efficientnet_b0 googlenet mnasnet0_5 mobilenet_v2 mobilenet_v3_small
        regnet_x_400mf regnet_y_400mf resnet18 resnet50 shufflenet_v2_x1_0 squeezenet1_1 swin_t vit_b_16
    """,
    "timm": """
        convnextv2_atto cs3darknet_s deit_tiny_patch16_224 dla46x_c dpn68 edgenext_xx_small fastvit_t8 ghostnet_050
        mixer_s16_224 mobilenetv2_035 mobilenetv4_conv_small_035 mobilevit_xxs poolformer_s12 regnetx_002 repvgg_a0
        resnest14d resnet10t resnetv2_18 seresnet18 skresnet18 test_coatnet test_convnext test_efficientnet
        test_mambaout test_resnet test_vit tf_efficientnet_lite0 vit_tiny_patch16_224
    """,
}
"""The networks that are exported too."""

OTHER_TASKS = {(source, name): functions for source, name, *functions in made()}
"""What builds each network that is no classifier of images, and what makes its inputs."""


def cases() -> list[Case]:
    """Return every network of the zoo in the order to run them: one of each module of timm, torchvision's, more."""
    classifiers = torchvision.models.list_models(module=torchvision.models)
    return [
        *map(_timm_case, _TIMM.split()),
        *map(_torchvision_case, classifiers),
        *map(_timm_case, _TIMM_MORE.split()),
        *(Case(source, name, 0) for source, name in OTHER_TASKS),
    ]


def _torchvision_case(name: str) -> Case:
    reduced = REDUCED[name][0] if name in REDUCED else ""
    size, options = _TORCHVISION_SIZES.get(name, 32), _TORCHVISION_OPTIONS.get(name, {})
    return Case("torchvision", name, size, options, reduced, name in _ONNX["torchvision"].split())


def _timm_case(name: str) -> Case:
    size, options = _TIMM_LARGER.get(name, (32, {"img_size": 32} if name in _TIMM_FIXED.split() else {}))
    depth = options.get("depth")
    reduced = f"depth {depth}" if depth else ""
    return Case("timm", name, size, options, reduced, name in _ONNX["timm"].split())


def build(case: Case, *, seed: int = 0) -> nn.Module:
    """Build a network with seeded random weights, in eval mode; nothing is downloaded."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if (case.source, case.name) in OTHER_TASKS:
            return OTHER_TASKS[case.source, case.name][0]().eval()
        if case.source == "torchvision" and case.name in REDUCED:
            return REDUCED[case.name][1](num_classes=CLASSES).eval()
        return load_model(case.id, num_classes=CLASSES, **case.options).eval()


def example(case: Case) -> Any:
    """Return two random images, or what a network of another task takes."""
    if (case.source, case.name) in OTHER_TASKS:
        return OTHER_TASKS[case.source, case.name][1]()
    generator = torch.Generator().manual_seed(0)
    return torch.randn(BATCH, 3, case.size, case.size, generator=generator)


@torch.no_grad()
def randomize(model: nn.Module, inputs: Any, *, seed: int = 0) -> None:
    """Redraw every parameter that is constant and set running statistics near those of the inputs, in place.

    Zeros, ones and layer scales of 1e-6 switch branches off or make channels alike; a wrong coupling would not show.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name, parameter in model.named_parameters():
            if parameter.is_floating_point() and (parameter == parameter.flatten()[0]).all():
                _redraw(name, parameter)
        _measure_statistics(model, inputs)


def _redraw(name: str, parameter: nn.Parameter) -> None:
    if parameter.numel() > 1 and name.endswith("weight") and parameter.dim() > 1:
        nn.init.normal_(parameter, std=(parameter.numel() / len(parameter)) ** -0.5)
    elif name.endswith(("bias", "token", "embed", "beta")):
        nn.init.normal_(parameter, std=0.2)
    else:
        nn.init.uniform_(parameter, 0.5, 1.5)


def _measure_statistics(model: nn.Module, inputs: Any) -> None:
    """Set the running statistics of batch norms to those of the inputs, then disturb them."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    norms = [norm for norm in norms if norm.running_mean is not None]
    momenta = [norm.momentum for norm in norms]
    with evaluating(model):
        for norm in norms:
            norm.train()
            norm.momentum = 1.0
        call_model(model, inputs)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        deviation = norm.running_var.clamp_min(1e-3).sqrt()
        norm.running_mean += 0.3 * deviation * torch.randn_like(deviation)
        norm.running_var.copy_(deviation.square() * torch.empty_like(deviation).uniform_(0.7, 1.4))
