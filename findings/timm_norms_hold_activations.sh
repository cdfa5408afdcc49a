#!/usr/bin/env bash
# timm 1.0.31: most BatchNorm2d modules of its EfficientNets, MobileNetV3s, RegNets and DenseNets also hold the activation.
#
# A good guess: what isinstance says is an nn.BatchNorm2d normalises and nothing else, so that a forward hook sees normalised
# values, and torch's own fuse_conv_bn_eval puts the norm into the convolution before it without a change. timm's
# BatchNormAct2d is a subclass whose forward goes on with dropout and an activation, often in place. Fused by hand, as
# every "for each Conv2d with a BatchNorm2d behind it" loop does, the activation is gone with the norm, without an error;
# pruners that read a norm's output by a hook read the activation's. The norms that torchvision builds are plain.
#
# Output seen (2026-11-29, torch 2.14.1, Linux x86-64, CPU):
#   timm resnet18: 20 batch norms, 0 with an activation inside
#   timm mobilenetv3_small_050: 34 batch norms, 23 with an activation inside
#   timm efficientnet_lite0: 49 batch norms, 33 with an activation inside
#   timm densenet121: 121 batch norms, 121 with an activation inside
#   least output of conv_stem and bn1: 0.000; fused by torch: -2.182
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'torch==2.14.1' 'torchvision==0.29.1' 'timm==1.0.31' 'numpy==2.4.6'
"$folder/venv/bin/python" - <<'EOF'
import timm
import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

found = {}
for name in ("resnet18", "mobilenetv3_small_050", "efficientnet_lite0", "densenet121"):
    norms = [module for module in timm.create_model(name).modules() if isinstance(module, nn.BatchNorm2d)]
    active = [norm for norm in norms if not isinstance(getattr(norm, "act", nn.Identity()), nn.Identity)]
    found[name] = len(norms), len(active)
    print(f"timm {name}: {len(norms)} batch norms, {len(active)} with an activation inside")
torch.manual_seed(0)
model, images = timm.create_model("efficientnet_lite0").eval(), torch.randn(2, 3, 64, 64)
with torch.no_grad():
    apart = model.bn1(model.conv_stem(images)).min().item()
    fused = fuse_conv_bn_eval(model.conv_stem, model.bn1)(images).min().item()
print(f"least output of conv_stem and bn1: {apart:.3f}; fused by torch: {fused:.3f}")
assert found["resnet18"][1] == 0 and all(active > 0 for _, active in list(found.values())[1:])
assert apart == 0 and fused < -0.5
EOF
