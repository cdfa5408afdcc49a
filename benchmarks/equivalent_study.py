"""Study when Equivalent Pruning helps: ResNet-20 on part of CIFAR-10, fine-tuned naively and by EP, in pairs.

    python benchmarks/equivalent_study.py tune --root data/cifar10.npz --block first   # learning rates of both methods
    python benchmarks/equivalent_study.py run --root data/cifar10.npz --block first    # the pairs, most telling first
    python benchmarks/equivalent_study.py report                                       # the tables; needs no data

The design, written before any result, is in results/equivalent_study.md. May be killed anywhere: each finished training
is one row of the table, a training under way goes on from its checkpoint, and what is done is skipped. The same command
in two terminals shares the work.
"""

from __future__ import annotations

import csv
import fcntl
import fnmatch
import hashlib
import io
import platform
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, astuple, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from equivalent_report import markdown, read_rows, read_table
from safetensors.torch import save_file
from torch import Tensor, nn

import obc_tools as obc

ROOT = Path(__file__).parents[1]
TABLE = ROOT / "results" / "equivalent_study.csv"

PROTOCOL = "1"
"""Changed by hand with anything here that changes results; part of the code digest."""
SOURCES = ("data", "measure", "models", "pruning", "scoring", "structure", "training", "state.py")
"""What of the package the results depend on."""

SEEDS = (0, 1, 2, 3, 4)
TUNING_SEEDS = (100, 101)
LADDER = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
FIRST_RUNGS = (0.03, 0.1)
LARGER = 3.0
"""By how much the learning rate of "naive, larger lr" is larger."""

FREEZE: Mapping[str, tuple[str, ...]] = {
    "naive": (),
    "naive, larger lr": (),
    "ep": (),
    "ep, W frozen": ("mixed.*.weight", "mixed.*.bias"),
    "ep, C and D frozen": ("mixed.*.compressor", "mixed.*.decompressor"),
}
"""The methods, and which parameters of theirs keep their values."""


@dataclass(frozen=True)
class Cell:
    """One place of the design: everything but the method, its learning rate and the seed."""

    speedup: float = 4.0
    epochs: int = 20
    scale: float = 1.0
    decay: float = 0.0
    criterion: str = "jacobian"
    start: str = "plain"


@dataclass(frozen=True)
class Block:
    """One size of the study; rows of different blocks are never compared.

    Attributes:
        images: training images, class-balanced; the network before pruning has seen no others.
        validation: further training images, for choosing learning rates and for curves.
        original_epochs: of the training from scratch, at learning rate 0.1.
        epochs: of fine-tuning: few, the centre's, many.
        calibration: batches of 128 images that score the channels in each of the ``steps`` pruning steps.
    """

    name: str
    images: int
    original_epochs: int
    epochs: tuple[int, int, int]
    validation: int = 2_000
    calibration: int = 5
    steps: int = 10
    data: str = "cifar10"
    width: int = 16
    batch_size: int = 128

    @property
    def centre(self) -> Cell:
        return Cell(epochs=self.epochs[1])


BLOCKS = {
    "first": Block("first", images=5_000, original_epochs=30, epochs=(2, 6, 18), validation=1_000),
    "full": Block("full", images=10_000, original_epochs=40, epochs=(5, 20, 60)),
}


@dataclass(frozen=True)
class Training:
    """One training of the study: what names its row."""

    block: str
    purpose: str
    method: str
    lr: float
    seed: int
    speedup: float
    epochs: int
    scale: float
    decay: float
    criterion: str
    start: str

    @property
    def is_naive(self) -> bool:
        return self.method.startswith("naive")

    def recipe(self, block: Block) -> obc.Recipe:
        """Return how to train; of naive ones, scale and decay say nothing."""
        return obc.Recipe(
            epochs=self.epochs,
            batch_size=block.batch_size,
            lr=self.lr,
            seed=self.seed,
            compressor_lr_scale=self.scale,
            compressor_weight_decay_scale=self.decay,
            channels_last=True,
        )

    def name(self) -> str:
        return hashlib.sha256(repr(astuple(self)).encode()).hexdigest()[:16]


KEY = tuple(field.name for field in fields(Training))
RESULTS = ("images", "val_accuracy", "test_accuracy", "test_loss", "before", "parameters", "curve")
CIRCUMSTANCES = ("original", "plan", "seconds", "cpu_seconds", "code", "torch", "threads", "cpu")
COLUMNS = (*KEY, *RESULTS, *CIRCUMSTANCES)


def trainings_of(block: Block, lrs: Mapping[str, float]) -> list[Training]:
    """Return the trainings of the study, the most telling first; a naive one serves all EP settings of its cell."""
    few, _, many = block.epochs
    centre = block.centre
    stages: list[tuple[Cell, tuple[str, ...]]] = [
        (centre, ("naive", "ep")),
        (replace(centre, scale=0.2), ("ep",)),
        (replace(centre, epochs=few), ("naive", "ep")),
        (replace(centre, speedup=8.0), ("naive", "ep")),
        (centre, ("naive, larger lr", "ep, W frozen")),
        (replace(centre, speedup=2.0), ("naive", "ep")),
        (replace(centre, scale=2.0), ("ep",)),
        (replace(centre, decay=1.0), ("ep",)),
        (replace(centre, criterion="l2"), ("naive", "ep")),
        (replace(centre, epochs=many), ("naive", "ep")),
    ]
    found = [make_training(block, "run", method, lrs, s, cell) for cell, ms in stages for s in SEEDS for method in ms]
    # Once, to see that it gives what naive fine-tuning gives.
    control = make_training(block, "run", "ep, C and D frozen", lrs, SEEDS[0], centre)
    after_centre = 2 * len(SEEDS)
    return [*found[:after_centre], control, *found[after_centre:]]


def make_training(block: Block, purpose: str, method: str, lrs: Mapping[str, float], seed: int, cell: Cell) -> Training:
    # Without C and D, EP is naive fine-tuning by construction, at its learning rate.
    lr = lrs["ep" if method in ("ep", "ep, W frozen") else "naive"]
    lr = round(LARGER * lr, 6) if method == "naive, larger lr" else lr
    return Training(block.name, purpose, method, lr, seed, **asdict(cell))


def next_rungs(found: Mapping[float, float]) -> tuple[float, ...]:
    """Return the learning rates to try next, given the accuracies of those tried; () once the best has neighbours."""
    if not found:
        return FIRST_RUNGS
    best = LADDER.index(max(found, key=found.get))
    return tuple(lr for lr in LADDER[max(0, best - 1) : best + 2] if lr not in found)


def tuned_lrs(rows: Sequence[Mapping[str, str]], block: Block) -> dict[str, dict[float, float]]:
    """Return, for each method, learning rate -> mean validation accuracy, of rates that have all tuning seeds."""
    found: dict[str, dict[float, float]] = {}
    for method in ("naive", "ep"):
        accuracies: dict[float, dict[str, float]] = {}
        for row in rows:
            if (row["block"], row["purpose"], row["method"]) == (block.name, "tune", method):
                accuracies.setdefault(float(row["lr"]), {})[row["seed"]] = float(row["val_accuracy"])
        whole = {lr: seeds.values() for lr, seeds in accuracies.items() if len(seeds) == len(TUNING_SEEDS)}
        found[method] = {lr: statistics.mean(values) for lr, values in whole.items()}
    return found


def code_digest() -> str:
    """Return a digest of the package's sources that results depend on, and of this file's protocol."""
    digest = hashlib.sha256(PROTOCOL.encode())
    package = Path(obc.__file__).parent
    for path in sorted(package.rglob("*.py")):
        name = path.relative_to(package)
        if name.parts[0] in SOURCES:
            digest.update(name.as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:10]


class Study:
    """A block of the study: its images, where it keeps what it has, and the work on it.

    Args:
        root: where the data lies.
        table: the CSV of finished trainings.
        work: folder of the plans and the trainings under way.
    """

    def __init__(self, block: Block, root: Path | None, table: Path, work: Path):
        self.block, self.table, self.work = block, table, work
        self._test = obc.load_data(block.data, root)
        self._data = balanced(self._test, block.images, block.validation)
        self._validation = self._data.batches("val", 500)
        self._code = code_digest()
        self.work.mkdir(parents=True, exist_ok=True)

    def tune(self) -> dict[str, float]:
        """Climb the ladder of learning rates for both methods; return the best of each."""
        while todo := self._next_to_tune():
            self._do(todo)
        return self.best_lrs()

    def _next_to_tune(self) -> list[Training]:
        """Return the trainings of the next rungs, naive and EP side by side: at equal rates they are pairs."""
        found = tuned_lrs(read_rows(self.table), self.block)
        rungs = [(lr, seed, method) for method in found for lr in next_rungs(found[method]) for seed in TUNING_SEEDS]
        centre = self.block.centre
        ordered = sorted(rungs, key=lambda rung: (rung[0], rung[1], rung[2] == "ep"))
        return [make_training(self.block, "tune", method, {method: lr}, seed, centre) for lr, seed, method in ordered]

    def best_lrs(self) -> dict[str, float]:
        """Return the learning rate of each method; raise ValueError while tuning is not done."""
        found = tuned_lrs(read_rows(self.table), self.block)
        if any(next_rungs(accuracies) for accuracies in found.values()):
            raise ValueError(f"the learning rates of block {self.block.name!r} are not chosen yet: run `tune` first")
        return {method: max(accuracies, key=accuracies.get) for method, accuracies in found.items()}

    def run(self) -> None:
        """Do all trainings of the design that are not done."""
        self._do(trainings_of(self.block, self.best_lrs()))

    def _do(self, todo: Sequence[Training]) -> None:
        """Do trainings in order; those that another process does are waited for at the end."""
        for wait in (False, True):
            for training in todo:
                if training in done(self.table):
                    continue
                with locked(self.work / f"{training.name()}.lock", wait=wait) as mine:
                    # Another process may have done it since.
                    if mine and training not in done(self.table):
                        append_row(self.table, self.train(training), self.work / "table.lock")
                        shutil.rmtree(self.work / training.name(), ignore_errors=True)

    def train(self, training: Training) -> dict[str, Any]:
        """Do one training; return its row. Test images are looked at once, at the end."""
        original = self.original()
        plan = self.plan(original, training)
        start = obc.prune(original, plan)
        before = obc.evaluate(start, self._validation).accuracy
        model = start if training.is_naive else obc.EquivalentModel(original, plan)
        recipe = replace(training.recipe(self.block), freeze=frozen_names(model, FREEZE[training.method]))
        clock = Clock()
        history = self._fit(model, recipe, training.name(), clock)
        final = model if training.is_naive else model.merge()
        row = asdict(training) | {
            "images": self.block.images,
            "before": before,
            "val_accuracy": history.last.val_accuracy,
            "curve": " ".join(f"{epoch.val_accuracy:.4f}" for epoch in history),
            "parameters": sum(parameter.numel() for parameter in final.parameters()),
            "seconds": round(sum(epoch.seconds for epoch in history), 1),
            "cpu_seconds": clock.total(training.epochs),
            "original": digest_of(original),
            "plan": hashlib.sha256(plan.to_json().encode()).hexdigest()[:10],
            "code": self._code,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "cpu": cpu_name(),
        }
        if training.purpose == "run":
            metrics = obc.evaluate(final, self._test.batches("val", 500))
            row |= {"test_accuracy": metrics.accuracy, "test_loss": round(metrics.loss, 5)}
        return row

    def original(self) -> nn.Module:
        """Return the network before pruning, trained once and kept beside the table: all rows speak of it."""
        block, path = self.block, self.table.with_suffix("") / f"{self.block.name}_original.safetensors"
        options = {"in_channels": self._data.image_shape[0], "width": block.width}
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(self.work / f"{path.stem}.lock", wait=True):
            if not path.is_file():
                with torch.random.fork_rng(devices=[]):
                    torch.default_generator.manual_seed(0)
                    model = obc.load_model("resnet20", num_classes=len(self._data.classes), **options)
                recipe = {"epochs": block.original_epochs, "lr": 0.1, "batch_size": block.batch_size}
                self._fit(model, obc.Recipe(**recipe, warmup_epochs=1, channels_last=True), path.stem)
                write_whole(path, lambda fresh: save_file(model.state_dict(), fresh))
        return obc.load_model("resnet20", num_classes=len(self._data.classes), weights=path, **options)

    def plan(self, original: nn.Module, training: Training) -> obc.PruningPlan:
        """Return the plan of a criterion, a speed-up and a seed: found once, the same for all methods."""
        path = self.work / f"{self.block.name}_{training.criterion}_{training.speedup:g}x_seed{training.seed}.json"
        with locked(path.with_suffix(".lock"), wait=True):
            if not path.is_file():
                batches = obc.take(self._data.batches("train", 128, seed=training.seed), self.block.calibration)
                example = next(iter(self._validation.at(0)))[0][:1]
                options = {"criterion": training.criterion, "speedup": training.speedup, "steps": self.block.steps}
                plan = obc.prune_to(original, example, batches, **options, seed=training.seed, progress=False)
                write_whole(path, lambda fresh: fresh.write_text(plan.to_json(), encoding="utf-8"))
        return obc.PruningPlan.from_json(path.read_text(encoding="utf-8"))

    def _fit(self, model: nn.Module, recipe: obc.Recipe, name: str, clock: Clock | None = None) -> obc.History:
        train = self._data.batches("train", recipe.batch_size, seed=recipe.seed, augment=True)
        where = {"run": self.work / name, "resume": True, "on_epoch": clock}
        return obc.fit(model, train, self._validation, recipe, progress=False, **where)


class Clock:
    """The CPU time of a training's epochs, those before an interruption estimated by the ones after it."""

    def __init__(self) -> None:
        self._start, self._epochs = time.process_time(), 0

    def __call__(self, history: obc.History) -> None:
        self._epochs += 1
        self._spent = time.process_time() - self._start

    def total(self, epochs: int) -> float | str:
        return round(self._spent * epochs / self._epochs, 1) if self._epochs else ""


def digest_of(model: nn.Module) -> str:
    """Return a digest of a network's weights."""
    digest = hashlib.sha256()
    for tensor in model.state_dict().values():
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()[:10]


def balanced(data: Any, images: int, validation: int) -> Any:
    """Return the data with as many training images of each class, and others of them, likewise, held out."""
    labels, generator = data.train.labels, torch.Generator().manual_seed(0)
    shares = [count // len(data.classes) for count in (images, validation)]
    chosen: list[list[Tensor]] = [[], []]
    for label in range(len(data.classes)):
        members = (labels == label).nonzero().flatten()
        if len(members) < sum(shares):
            raise ValueError(f"class {data.classes[label]!r} has {len(members)} images, {sum(shares)} are needed")
        order = members[torch.randperm(len(members), generator=generator)]
        for part, positions in zip(chosen, order[: sum(shares)].split(shares), strict=True):
            part.append(positions)
    train, val = (_at(data.train, torch.cat(part).sort().values) for part in chosen)
    return replace(data, train=train, val=val)


def _at(images: Any, positions: Tensor) -> Any:
    return replace(images, pixels=images.pixels[positions], labels=images.labels[positions])


def frozen_names(model: nn.Module, patterns: Sequence[str]) -> tuple[str, ...]:
    """Return the parameters of a model that patterns match."""
    return tuple(
        name for name, _ in model.named_parameters() if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
    )


def done(table: Path) -> set[Training]:
    """Return the trainings that have a row, whatever code it is of."""
    kinds = {field.name: {"str": str, "int": int, "float": float}[field.type] for field in fields(Training)}
    return {Training(**{name: kind(row[name]) for name, kind in kinds.items()}) for row in read_rows(table)}


def append_row(table: Path, row: Mapping[str, Any], lock: Path) -> None:
    """Add a row to a CSV, whole or not at all; several processes with the same lock may do so at once."""
    with locked(lock, wait=True):
        rows = [*read_rows(table), row]
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_whole(table, lambda fresh: fresh.write_text(text.getvalue(), encoding="utf-8"))


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file beside its place and put it there once it is complete."""
    fresh = path.with_name(f".{path.name}.new")
    write(fresh)
    fresh.replace(path)


@contextmanager
def locked(path: Path, *, wait: bool) -> Iterator[bool]:
    """Hold a lock that ends with the process; yield whether it was had."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


@dataclass(frozen=True)
class Options:
    """Where things are, and which block.

    Attributes:
        root: where CIFAR-10 lies, as `load_data` reads it.
        block: "first" (5,000 images, 6 epochs) or "full" (10,000 images, 20 epochs).
        table: the CSV of finished trainings.
        work: folder of the plans and the trainings under way.
        threads: CPU threads.
    """

    root: Path | None = None
    block: Literal["first", "full"] = "first"
    table: Path = TABLE
    work: Path = ROOT / "runs" / "equivalent_study"
    threads: int = 1

    def study(self) -> Study:
        torch.set_num_threads(self.threads)
        return Study(BLOCKS[self.block], self.root, self.table, self.work)


@dataclass(frozen=True)
class Tune(Options):
    """Choose the learning rates of naive fine-tuning and of EP, on seeds and validation images of their own."""

    def do(self) -> None:
        print(self.study().tune())


@dataclass(frozen=True)
class Run(Options):
    """Do the trainings of the design, the most telling first."""

    def do(self) -> None:
        self.study().run()


@dataclass(frozen=True)
class Report:
    """Print what is there as tables in Markdown."""

    table: Path = TABLE

    def do(self) -> None:
        print(markdown(read_table(self.table), code_digest()))


if __name__ == "__main__":
    tyro.cli(Tune | Run | Report, description=__doc__).do()
