#!/usr/bin/env bash
# torch 2.14.1, onnxscript 0.7.2: torch.onnx.export of a network in train mode gives a mixture of both modes: BatchNorm as in eval mode,
# folded into its convolution, Dropout as in training. ONNX Runtime then drops half of the values at inference, at random.
#
# A good guess: the exporter puts the network into eval mode, as the exporter before dynamo did by default (training=TrainingMode.EVAL), or keeps
# the mode for all layers. So somebody who forgets eval() sees a graph without BatchNorm, takes it for an eval graph, and serves a model
# whose answers differ from call to call. Nothing warns; the check of the export against torch only fails if somebody does it.
#
# Output seen (2026-11-28, Linux x86-64, CPU), a convolution, BatchNorm2d and Dropout(0.5):
#   eval: ['Conv'], zeros 0.00, two runs equal: True
#   train: ['Conv', 'Dropout'], zeros 0.47 (another share in each run), two runs equal: False
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'torch==2.14.1' 'onnx==1.23.2' 'onnxscript==0.7.2' 'onnxruntime==1.32.0' 'numpy==2.4.6'
"$folder/venv/bin/python" - "$folder" <<'END' 2>/dev/null
import sys
import warnings

import onnx
import onnxruntime
import torch
from torch import nn

warnings.filterwarnings("ignore")


def exported(model):
    """Return the operators of an exported model, and outputs of two runs on the same input."""
    path = f"{sys.argv[1]}/model.onnx"
    torch.onnx.export(model, (torch.zeros(2, 3, 8, 8),), path, verbose=False)
    session = onnxruntime.InferenceSession(path)
    torch.manual_seed(1)
    feed = {session.get_inputs()[0].name: torch.randn(2, 3, 8, 8).numpy()}
    kinds = [node.op_type for node in onnx.load(path).graph.node]
    return kinds, [session.run(None, feed)[0] for _ in range(2)]


torch.manual_seed(0)
model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(0.5))
for mode in ("eval", "train"):
    model.train(mode == "train")
    kinds, (one, two) = exported(model)
    print(f"{mode}: {kinds}, zeros {(one == 0).mean():.2f}, two runs equal: {(one == two).all()}")
    assert kinds == (["Conv"] if mode == "eval" else ["Conv", "Dropout"])
    assert (one == two).all() == (mode == "eval")
END
