"""`EquivalentModel` inside the trainers of transformers and ultralytics, as far as they take a network of one's own.

transformers' Trainer finds out what a network takes by the signature of its class, which an EquivalentModel does not
have: it is told by ``label_names`` and ``remove_unused_columns=False``. ultralytics' trainers take a network in the
place of ``model``; the network needs their ``args`` before, as every network does that they did not make.
"""

import pytest
import torch
from accelerate.state import AcceleratorState
from torch.nn import functional as F

from obc_tools import EquivalentModel, make_plan, prune_to, score_groups, task_of
from obc_tools.structure.groups import find_groups

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def no_accelerator_left():
    """transformers' Trainer makes the one Accelerator of a process; the tests after it find none."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_the_trainer_of_transformers(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    model = LlamaForCausalLM(LlamaConfig(**shape, num_key_value_heads=2, vocab_size=50, max_position_embeddings=12))
    tokens = torch.randint(1, 50, (8, 12))
    task = task_of(model)
    options = {"task": task, "ratio": 0.3, "steps": 1, "progress": False, "verify": False}
    equivalent = EquivalentModel(model, prune_to(model, task.example(tokens[:1]), [tokens], **options))
    before = {name: value.clone() for name, value in equivalent.state_dict().items()}
    told = {"label_names": ["labels"], "remove_unused_columns": False}
    quiet = {"report_to": [], "disable_tqdm": True, "use_cpu": True, "save_strategy": "no"}
    arguments = TrainingArguments(
        output_dir=str(tmp_path), num_train_epochs=4, learning_rate=0.01, per_device_train_batch_size=4, **told, **quiet
    )
    data = [{"input_ids": row, "labels": row} for row in tokens]
    trainer = Trainer(model=equivalent, args=arguments, train_dataset=data, eval_dataset=data)
    start = trainer.evaluate()["eval_loss"]
    trainer.train()
    merged = equivalent.merge().eval()
    assert {name for name, value in equivalent.state_dict().items() if not torch.equal(value, before[name])} >= {
        name for name, _ in equivalent.named_parameters() if "compressor" in name
    }
    logits = merged(tokens).logits[:, :-1]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(
        F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).item(), abs=1e-5
    )
    assert trainer.evaluate()["eval_loss"] < start - 0.05 and type(merged) is LlamaForCausalLM


def scenes(folder):
    """Write four images with a box each, as ultralytics reads them; return what its trainers know of a data set."""
    image = pytest.importorskip("PIL.Image")
    for kind in ("images", "labels"):
        (folder / kind).mkdir(parents=True)
    for number in range(4):
        image.new("RGB", (64, 64), (60 * number, 80, 120)).save(folder / "images" / f"{number}.png")
        (folder / "labels" / f"{number}.txt").write_text("1 0.5 0.5 0.4 0.4\n")
    images = str(folder / "images")
    return {"train": images, "val": images, "nc": 2, "names": {0: "a", 1: "b"}, "channels": 3}


def test_the_trainer_of_ultralytics(tmp_path):
    pytest.importorskip("ultralytics")
    from ultralytics.models.yolo.detect import DetectionTrainer
    from ultralytics.nn.tasks import DetectionModel

    class WithoutFiles(DetectionTrainer):
        """Knows its data set, and neither writes nor reads checkpoints, for which it wants packages of its own."""

        def get_dataset(self):
            return scenes(tmp_path / "scenes")

        def save_model(self):
            return False

        def final_eval(self):
            pass

    given = {"model": "yolo11n.yaml", "data": "scenes", "project": str(tmp_path), "imgsz": 64, "epochs": 1, "batch": 2}
    quiet = {"device": "cpu", "workers": 0, "val": False, "save": False, "plots": False, "amp": False, "verbose": False}
    torch.manual_seed(0)
    trainer = WithoutFiles(overrides=given | quiet)
    model = DetectionModel("yolo11n.yaml", nc=2, verbose=False).eval()
    model.args = trainer.args
    images = torch.rand(2, 3, 64, 64)
    groups = find_groups(model, task_of(model).example((images, None)), ignore=("*.dfl.conv",))
    equivalent = EquivalentModel(model, make_plan(score_groups(model, groups, "l2"), ratio=0.2))
    before = {name: value.clone() for name, value in equivalent.named_parameters()}
    trainer.model = equivalent
    trainer.train()
    changed = {name for name, value in equivalent.named_parameters() if not torch.equal(value.cpu(), before[name])}
    assert {name for name in before if "compressor" in name} <= changed
    merged = equivalent.merge().eval()
    torch.testing.assert_close(equivalent.eval()(images)[0], merged(images)[0], atol=1e-3, rtol=1e-4)
    assert type(merged) is DetectionModel
