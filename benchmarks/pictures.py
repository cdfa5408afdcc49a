"""Take the pictures of the README: the widgets in a real JupyterLab, light and dark.

    python benchmarks/pictures.py                # needs Chromium; minutes; writes results/pictures/<widget>_<look>.png

A ResNet-20 trained on handwritten digits; the monitor watches a real run that is stopped while it goes on.
"""

from __future__ import annotations

import io
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import tyro
from PIL import Image

sys.path.append(str(Path(__file__).parents[1] / "tests"))
sys.path.append(str(Path(__file__).parents[1] / "tests" / "browser"))

from lab import THEMES, Notebook, View, chromium, jupyterlab, opened

PICTURES = Path(__file__).parents[1] / "results" / "pictures"
MOST_BYTES = 300_000
HEIGHT = 2400
NETWORK = """import torch, obc_tools as obc
torch.manual_seed(0)
data = obc.load_data("digits")
model = obc.load_model("resnet20", num_classes=10, in_channels=1)
recipe = obc.Recipe(epochs=4, lr=0.1, warmup_epochs=1)
obc.fit(model, data.batches("train", 64), data.batches("val", 256), recipe, progress=False)
torch.save(model.state_dict(), "resnet20.pth")"""
RUNS = """tune = obc.Recipe(epochs=12, lr=0.02)
job = obc.PruningJob(title="digits", model="resnet20", data="digits", weights="resnet20.pth", batches=10, steps=5,
    model_options={"in_channels": 1}, target=obc.Target(speedup=2), finetune=tune, equivalent=True)
run = obc.launch(job, "runs/digits", devices="cpu")"""
CELLS = {
    "studio": "obc.PruningStudio(model, data, look=LOOK)",
    "jtj": "obc.JTJExplorer(model, data, look=LOOK)",
    "interactions": "obc.InteractionExplorer(model, data, look=LOOK)",
    "monitor": 'obc.RunMonitor("runs/digits", look=LOOK)',
}


def set_studio(view: View) -> None:
    """Prune to about 1.3x by L1, keep that plan by name, do so by the Jacobian Criterion, and measure both."""
    view.until(lambda: "removed; MACs" in view.words, "a plan")
    view.choose("criterion", "l1")
    view.choose("target", "speed-up (times fewer MACs)")
    view.until(lambda: "speedup=" in view.code, "a target")
    view.drag("to", 0.118)
    view.until(lambda: "speedup=1.3" in view.code, "about 1.3x")
    view.press("remember")
    view.choose("criterion", "jacobian")
    view.until(lambda: "'jacobian'" in view.code and "removed; MACs" in view.words, "another criterion")
    view.choose("group", "layer2.1.conv1.out")
    view.press("measure")
    view.until(lambda: "measured" in view.words, "a measurement")


def set_jtj(view: View) -> None:
    """Show correlations of a later layer."""
    view.until(lambda: "DenseJTJ(" in view.words, "the grid")
    view.choose("layer", "layer1.0.conv1")
    view.choose("values", "correlation")
    view.enter("channels", "8")
    view.until(lambda: view.title.startswith("Correlation of JᵀJ of layer1.0.conv1.out: 8"), "another layer")


def set_interactions(view: View) -> None:
    """Show a layer with more channels."""
    view.until(lambda: "FilterInteractions(" in view.words, "K")
    view.choose("layer", "layer2.0.conv1")
    view.until(lambda: "layer2.0.conv1" in view.title, "another layer")


def set_monitor(view: View) -> None:
    """Wait until Equivalent Pruning is well under way."""
    view.until(lambda: view.figure("g.calcdata.length") > 8, "the second training", seconds=600)
    view.until(lambda: "epoch 2" in view.words, "some epochs", seconds=600)


ALONE = "() => window.jupyterapp.commands.execute('application:toggle-left-area')"
AWAY = "() => { window.jupyterapp.shell.currentWidget.content.activeCellIndex = 0 }"
"""Take the list of files away, and the marks of the cell that is active."""

STEPS: dict[str, Callable[[View], None]] = {
    "studio": set_studio,
    "jtj": set_jtj,
    "interactions": set_interactions,
    "monitor": set_monitor,
}


def save(view: View, path: Path) -> None:
    """Write what a cell looks like, in few colours where the file would be large."""
    view.page.evaluate(AWAY)
    view.page.mouse.move(5, 5)
    view.page.wait_for_timeout(700)
    shot = Image.open(io.BytesIO(view.cell.screenshot())).convert("RGB")
    shot.save(path, optimize=True)
    if path.stat().st_size > MOST_BYTES:
        shot.quantize(256).save(path, optimize=True)
    print(path.name, shot.size, f"{path.stat().st_size / 1000:.0f} KB", flush=True)


def take(notebook: Notebook, look: str, folder: Path, names: tuple[str, ...]) -> None:
    """Set each widget up and write its picture."""
    for name in names:
        view = notebook.view(CELLS[name].split("(")[0])
        STEPS[name](view)
        save(view, folder / f"{name}_{look}.png")
    if "monitor" in names:
        view = notebook.view(CELLS["monitor"].split("(")[0])
        view.press("stop")
        view.until(lambda: view.button("stop").is_disabled(), "the run's end", seconds=600)


def main(
    out: Path = PICTURES,
    names: tuple[str, ...] = tuple(CELLS),
    looks: tuple[str, ...] = tuple(THEMES),
    width: int = 1240,
    scale: float = 1.25,
) -> None:
    """Take the pictures, once in each look, in a page of so many pixels; `scale` makes them larger."""
    out.mkdir(parents=True, exist_ok=True)
    for look in looks:
        with tempfile.TemporaryDirectory() as folder, jupyterlab(Path(folder), look) as lab, chromium() as browser:
            runs = [RUNS] if "monitor" in names else []
            cells = [NETWORK, *runs, f"LOOK = {look!r}", *(CELLS[name] for name in names)]
            name = lab.write(lab.folder / "pictures.ipynb", *cells)
            with opened(browser, lab, name, width=width, height=HEIGHT, scale=scale) as notebook:
                notebook.page.evaluate(ALONE)
                notebook.run_all()
                take(notebook, look, out, names)
                assert notebook.errors == [] and notebook.console == []


if __name__ == "__main__":
    tyro.cli(main)
