"""How fast networks are: what is timed, in which conditions, and what is left out."""

import pytest
import torch
from networks import network
from torch import nn

from obc_tools.models import runtimes
from obc_tools.models.runtimes import speed_table


def test_a_row_a_runtime_number_of_threads_examples_and_model():
    model, images = (part.float() for part in network("small_vgg"))
    seen = []
    model.register_forward_hook(lambda module, inputs, outputs: seen.append((len(outputs), torch.get_num_threads())))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        table = speed_table({"one": model, "other": nn.Flatten()}, {1: images[:1], 4: images}, repeats=3, warmup=1)
    finally:
        torch.set_num_threads(threads)
    keys = list(zip(table["runtime"], table["threads"], table["examples"], table["model"], strict=True))
    runtimes, sizes, models = ("eager", "onnxruntime"), (1, 4), ("one", "other")
    assert keys == [(r, t, n, m) for n in sizes for t in (1, 2) for r in runtimes for m in models]
    assert {(n, t) for n, t in seen if n in sizes} == {(n, t) for n in sizes for t in (1, 2)}
    assert (table[table["model"] == "one"]["speed-up"] == 1).all() and (table["median (ms)"] > 0).all()
    assert torch.get_num_threads() == threads


def test_what_a_runtime_cannot_run_is_left_out_and_said(caplog):
    class Counted(nn.Module):
        def forward(self, images):
            return images.new_ones(1) * float(images.sum())

    table = speed_table({"counted": Counted()}, {2: torch.ones(2, 3)}, repeats=2, warmup=0)
    assert set(table["runtime"]) == {"eager"}
    assert "latencies leave out onnxruntime, 2 at a time: " in caplog.text


def test_unknown_runtimes_are_refused():
    with pytest.raises(ValueError, match="runtime.*tensorrt.*eager.*onnxruntime"):
        speed_table({"one": nn.Flatten()}, {1: torch.ones(1, 3)}, runtimes=("tensorrt",))
    assert runtimes.RUNTIMES[0] == "eager"
