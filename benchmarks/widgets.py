"""Time how long the widgets take to answer, in a real browser, with ResNet-50 loaded and seven more notebooks open.

    python benchmarks/widgets.py                 # needs Chromium; minutes; writes results/widgets_latency.csv

From the mouse or key event to the last change that it makes in the page: figure, tables and code. What needs forward
passes is timed to its first sign (progress), since it goes on beside the kernel. The images are noise: only their size,
64 x 64, matters here. The other notebooks, in the same page and each with its kernel, show all four widgets of a
ResNet-8. Beside the wall time of the browser stands the processor time of the kernel, which a shared machine does not
lengthen.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import torch
import tyro
from PIL import Image

sys.path.append(str(Path(__file__).parents[1] / "tests"))
sys.path.append(str(Path(__file__).parents[1] / "tests" / "browser"))

from lab import Lab, Notebook, View, chromium, jupyterlab, opened
from run_folders import write as write_run

from obc_tools.files import environment

COLUMNS = ["widget", "reaction", "median (ms)", "worst (ms)", "kernel (ms of CPU)", "n"]
RESULT = Path(__file__).parents[1] / "results" / "widgets_latency.csv"
NETWORK = """import torch, obc_tools as obc
data = obc.load_data("folder", "images", image_size=64)
torch.manual_seed(0)
model = obc.load_model("torchvision:resnet50", 10)
few = {"batches": 1, "batch_size": 8}"""

WATCH = """cell => {
  const seen = (window.seen = { start: 0, first: 0, last: 0 }), ended = new AbortController();
  const now = () => { seen.start ||= performance.now(); };
  const options = { capture: true, signal: ended.signal };
  for (const kind of ["mousedown", "keydown", "change", "click"]) cell.addEventListener(kind, now, options);
  const observer = new MutationObserver(() => {
    if (!seen.start) return;
    seen.first ||= performance.now();
    seen.last = performance.now();
  });
  observer.observe(cell.querySelector(".jp-OutputArea"),
    { subtree: true, childList: true, attributes: true, characterData: true });
  // Observers that stay would slow down whatever is timed after.
  window.unwatch = () => { observer.disconnect(); ended.abort(); };
}"""
QUIET = "quiet => window.seen.last && performance.now() - window.seen.last > quiet"


def answer(view: View, act: Callable[[], object], *, first: bool = False, quiet: int = 1500) -> float:
    """Return the milliseconds from an event to the last change in the page, or to the first."""
    view.page.evaluate(WATCH, view.cell.element_handle())
    act()
    view.page.wait_for_function(QUIET, arg=quiet, polling=100)
    seen = view.page.evaluate("() => { window.unwatch(); return window.seen; }")
    return seen["first" if first else "last"] - seen["start"]


def press_key(view: View, label: str, key: str) -> None:
    """Move a slider by a key: a step by an arrow, as one move of a drag does, or to an end."""
    view.control(label, ".noUi-handle").press(key)


def studio_reactions(notebook: Notebook) -> dict[str, tuple[Callable[[int], object], bool]]:
    """Return what is done in the studio in repeat i, and whether its first sign counts."""
    view = notebook.view("obc.PruningStudio(")
    kinds = ["speed-up (times fewer MACs)", "share of channels removed"]
    groups = ["layer4.0.conv1.out", "layer1.0.conv2.out"]
    return {
        "target slider, share of channels": (lambda i: press_key(view, "to", "ArrowRight"), False),
        "multiple of so many channels": (lambda i: view.enter("multiple of", str(2 + i)), False),
        "kind of target": (lambda i: view.choose("target", kinds[i % 2]), False),
        "scope": (lambda i: view.choose("scope", ["local", "global"][i % 2]), False),
        "bars": (lambda i: view.choose("bars", ["MACs", "parameters", "channels"][i % 3]), False),
        "another group": (lambda i: view.choose("group", groups[i % 2]), False),
        "limit slider of a group": (lambda i: press_key(view, "at most goes", ["Home", "End"][i % 2]), False),
        "lock": (lambda i: view.press("lock this group"), False),
        "channel by a click": (lambda i: view.click(0.3 + 0.05 * i, 0.95, "x2y2"), False),
        "undo": (lambda i: view.press("undo"), False),
        "redo": (lambda i: view.press("redo"), False),
        "remember": (lambda i: view.press("remember"), False),
        "another plan to compare with": (lambda i: view.choose("compare with", f"plan {1 + i}"), False),
        "normaliser, first sign of scoring": (lambda i: view.choose("normalizer", ["mean", "max", "sum"][i % 3]), True),
    }


def explorer_reactions(notebook: Notebook) -> dict[str, tuple[Callable[[int], object], bool]]:
    """Return what is done in the explorer of single filters in repeat i."""
    view = notebook.view("obc.JTJExplorer(")
    views = ["one channel", "filter", "spectrum", "grid"]
    return {
        "view (one channel, filter, spectrum, grid)": (lambda i: view.choose("view", views[i % 4]), False),
        "values": (lambda i: view.choose("values", ["correlation", "absolute"][i % 2]), False),
        "layer, first sign of computing": (
            lambda i: view.choose("layer", ["layer1.0.conv1", "conv1"][i % 2]),
            True,
        ),
    }


def pair_reactions(notebook: Notebook) -> dict[str, tuple[Callable[[int], object], bool]]:
    """Return what is done in the explorer of pairs in repeat i."""
    view = notebook.view("obc.InteractionExplorer(")
    return {
        "order": (lambda i: view.choose("order", ["score", "cluster"][i % 2]), False),
        "values": (lambda i: view.choose("values", ["signed", "correlation"][i % 2]), False),
        "layer": (lambda i: view.choose("layer", ["layer2.0.conv1", "conv1"][i % 2]), False),
    }


def monitor_reactions(notebook: Notebook) -> dict[str, tuple[Callable[[int], object], bool]]:
    """Return what is done in the monitor of two runs in repeat i."""
    view = notebook.view("obc.RunMonitor(")
    return {"another run's log": (lambda i: view.choose("run", ["EP", "naive"][i % 2]), False)}


def write_images(folder: Path) -> None:
    """Write noise as class folders."""
    generator = np.random.default_rng(0)
    for name in (f"{split}/class{number}" for split in ("train", "val") for number in range(10)):
        (folder / name).mkdir(parents=True)
        pixels = generator.integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name / "image.png")


OTHERS = 7
"""Notebooks that are open besides."""
OTHER_NETWORK = """import obc_tools as other, torch
torch.set_num_threads(1)
data = other.load_data("digits")
model = other.load_model("resnet8", 10, in_channels=1)
few = {"batches": 1, "batch_size": 8}"""

VIEWS = {
    "PruningStudio": ("studio = obc.PruningStudio(model, data, **few)\nstudio", "removed; MACs", studio_reactions),
    "JTJExplorer": ("explorer = obc.JTJExplorer(model, data, **few)\nexplorer", "DenseJTJ(", explorer_reactions),
    "InteractionExplorer": (
        "together = obc.InteractionExplorer(model, data, **few)\ntogether",
        "FilterInteractions(",
        pair_reactions,
    ),
    "RunMonitor": ("obc.RunMonitor({'naive': 'naive', 'EP': 'EP'}, every=None)", "epoch", monitor_reactions),
}
"""Each widget's cell, the words that it shows once it is there, and its reactions."""


def open_others(lab: Lab, notebook: Notebook) -> None:
    """Open other notebooks with all widgets beside the one that is timed, and come back to it."""
    cells = [OTHER_NETWORK, *(cell.replace("obc.", "other.") for cell, _, _ in VIEWS.values())]
    for number in range(OTHERS):
        name = lab.write(lab.folder / f"other{number}.ipynb", *cells)
        notebook.do(f"window.jupyterapp.commands.execute('docmanager:open', {{path: '{name}'}})")
        notebook.await_kernel()
        notebook.run_all()
    notebook.do(f"window.jupyterapp.commands.execute('docmanager:open', {{path: '{notebook.name}'}})")
    notebook.await_kernel()


def processor_ms(process: psutil.Process) -> float:
    """Return the milliseconds of processor time that a process has used."""
    used = process.cpu_times()
    return 1000 * (used.user + used.system)


def time_all(notebook: Notebook, repeats: int) -> Iterator[tuple[str, str, float, float, float, int]]:
    """Time every reaction so often, after one that does not count.

    Yields the widget, the reaction, median and worst, the kernel's mean processor time for one, and n.
    """
    kernel = psutil.Process(int(notebook.view("os.getpid()").words.split()[-1]))
    for widget, (_, words, reactions) in VIEWS.items():
        view = notebook.view(f"obc.{widget}(")
        view.until(lambda view=view, words=words: words in view.words, "an outcome")
        for name, (act, first) in reactions(notebook).items():
            answer(view, partial(act, 0), first=first)
            before = processor_ms(kernel)
            took = [answer(view, partial(act, i), first=first) for i in range(1, repeats + 1)]
            used = (processor_ms(kernel) - before) / repeats
            yield widget, name, statistics.median(took), max(took), used, repeats


def main(repeats: int = 12, out: Path = RESULT) -> None:
    """Write a row a reaction."""
    rows = []
    with tempfile.TemporaryDirectory() as folder, jupyterlab(Path(folder)) as lab, chromium() as browser:
        write_images(lab.folder / "images")
        for name in ("naive", "EP"):
            write_run(lab.folder / name)
        cells = [NETWORK, "import os\nprint('process', os.getpid())", *(cell for cell, _, _ in VIEWS.values())]
        with opened(browser, lab, lab.write(lab.folder / "latency.ipynb", *cells)) as notebook:
            notebook.run_all()
            open_others(lab, notebook)
            for row in time_all(notebook, repeats):
                rows.append(row)
                print(*row, flush=True)
            assert notebook.errors == []
        browser_version = browser.version
    found = environment(torch.device("cpu"))
    frame = pd.DataFrame(rows, columns=COLUMNS).round(0)
    frame["hardware"] = f"{found['cpu']}, {found['cpus']} CPUs, no GPU; load {os.getloadavg()[0]:.1f}"
    frame["versions"] = ", ".join(
        [f"Chromium {browser_version}", *(f"{name} {version(name)}" for name in ("torch", "jupyterlab", "ipywidgets"))]
    )
    frame.to_csv(out, index=False)


if __name__ == "__main__":
    tyro.cli(main)
