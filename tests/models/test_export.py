import importlib.util

import onnx
import onnxruntime
import pytest
import torch
from networks import random_plan
from torch import Tensor, nn

from obc_tools import EquivalentModel, export_onnx, export_program, prune
from obc_tools.models import runtimes
from obc_tools.models.runtimes import ExportError
from obc_tools.state import Forward


def merged(name="residual"):
    """Return a merged model whose maps are no selections, and images, in single precision."""
    model, images, plan = random_plan(name)
    equivalent = EquivalentModel(model, plan)
    with torch.no_grad():
        for parameter in equivalent.mixed.parameters():
            parameter += 0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    return equivalent.merge().float().eval(), images.float()


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(4, 3), nn.Linear(5, 3)

    def forward(self, left: Tensor, right: Tensor) -> dict[str, Tensor]:
        return {"sum": self.left(left) + self.right(right), "left": self.left(left)}


class Unexportable(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if x.sum().item() > 0 else x


@pytest.mark.parametrize("dynamic_batch", [False, True])
def test_a_program_computes_what_the_model_does(dynamic_batch):
    model, images = merged()
    program = export_program(model, images, dynamic_batch=dynamic_batch)
    torch.testing.assert_close(program.module()(images), model(images), rtol=1e-5, atol=1e-5)
    if dynamic_batch:
        assert program.module()(images[:3]).shape == (3, 5)


@pytest.mark.parametrize("name", ["grouped", "upsampling"])
def test_onnxruntime_computes_what_the_model_does(name, tmp_path):
    model, images = merged(name)
    written = export_onnx(tmp_path / "deep" / "model.onnx", model, images)
    assert written.error < 1e-5 and [path.name for path in written.path.parent.iterdir()] == ["model.onnx"]
    onnx.checker.check_model(written.path)
    session = onnxruntime.InferenceSession(written.path)
    (found,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), model(images), rtol=1e-4, atol=1e-4)


def test_the_batch_may_stay_open(tmp_path):
    model, images = merged()
    path = export_onnx(tmp_path / "model.onnx", model, images, dynamic_batch=True).path
    session = onnxruntime.InferenceSession(path)
    (found,) = session.run(None, {session.get_inputs()[0].name: images[:3].numpy()})
    torch.testing.assert_close(torch.from_numpy(found), model(images[:3]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("as_dict", "dynamic_batch"), [(False, False), (True, True)])
def test_several_inputs_and_outputs(as_dict, dynamic_batch, tmp_path):
    model, inputs = TwoInputs(), (torch.randn(2, 4), torch.randn(2, 5))
    example = {"left": inputs[0], "right": inputs[1]} if as_dict else inputs
    assert export_onnx(tmp_path / "two.onnx", model, example, dynamic_batch=dynamic_batch).error < 1e-6


def test_the_model_is_left_alone(tmp_path):
    model, images = merged()
    model.train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    export_onnx(tmp_path / "model.onnx", model, images)
    assert model.training and all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_file_that_computes_something_else_gets_no_name(tmp_path, monkeypatch):
    model, images = merged()
    (tmp_path / "model.onnx").write_text("before")
    monkeypatch.setattr(runtimes, "call_model", lambda model, inputs: model(inputs) * 1.01)
    with pytest.raises(ExportError, match="onnxruntime's output differs from torch's by 0.0099"):
        export_onnx(tmp_path / "model.onnx", model, images)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("model.onnx", "before")]


def test_what_cannot_be_exported_is_refused(tmp_path, monkeypatch):
    model, images, plan = random_plan("residual")
    with pytest.raises(ExportError, match="pass model.merge()"):
        export_program(EquivalentModel(model, plan), images)
    with pytest.raises(ExportError, match="torch.export cannot export this Unexportable"):
        export_onnx(tmp_path / "model.onnx", Unexportable(), torch.randn(2, 4))
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if "onnx" in name else name)
    with pytest.raises(
        ExportError, match=r"needs the packages onnx, onnxscript, onnxruntime: pip install obc_tools\[export\]"
    ):
        export_onnx(tmp_path / "model.onnx", prune(model, plan), images)


@pytest.mark.parametrize("batch", [1, 2])
def test_a_forward_is_exported_with_an_open_batch_of_any_example(batch):
    model, images = merged()
    forward = Forward(lambda network, x: 2 * network(x), images[:batch])
    program = export_program(model, forward, dynamic_batch=True)
    torch.testing.assert_close(program.module()(images[:3]), 2 * model(images[:3]), rtol=1e-5, atol=1e-5)


def test_what_onnxruntime_cannot_run_is_one_error(tmp_path):
    model = nn.Sequential(nn.Linear(4, 8), nn.SiLU(), nn.Linear(8, 2)).bfloat16()
    with pytest.raises(ExportError, match="onnxruntime cannot run this Sequential"):
        export_onnx(tmp_path / "half.onnx", model, torch.randn(2, 4, dtype=torch.bfloat16))
