"""Run notebooks and store them with their outputs, stills of all figures and widgets among them: make notebooks.

    python notebooks/store.py 01_quickstart.ipynb 05_interactive_pruning.ipynb     # all of them without names

A notebook is replaced once all of its cells ran without an error. Times and the state of widgets are not stored, so
that what changed is what a reader would see.
"""

import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from tqdm.auto import tqdm

from obc_tools.files import write_text
from obc_tools.plots.stills import PNG, WANTED, add_stills

FOLDER = Path(__file__).parent
COLAB, VIEW = "colab", "application/vnd.jupyter.widget-view+json"


def store(path: Path) -> None:
    """Run one notebook in its folder and store it."""
    notebook = nbformat.read(path, as_version=4)
    cells = {cell.id: dict(cell.metadata) for cell in notebook.cells}
    NotebookClient(notebook, timeout=None, resources={"metadata": {"path": str(path.parent)}}).execute()
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        cell.metadata = nbformat.from_dict(cells[cell.id])
        cell.metadata.pop("execution", None)
        if "outputs" in cell:
            cell.outputs = tidied(cell.outputs)
        if cell.id == COLAB:
            cell.execution_count = None
    write_text(path, nbformat.writes(notebook) + "\n")
    add_stills(path)


def tidied(outputs: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return outputs without the JPEG of a picture that is there as PNG too, and without bars of progress.

    A bar is a widget without a still: stored without the widgets' state it is dead.
    """
    stay = [output for output in outputs if VIEW not in output.get("data", ()) or PNG in output["data"]]
    for data in (output["data"] for output in stay if PNG in output.get("data", ())):
        data.pop("image/jpeg", None)
    return stay


if __name__ == "__main__":
    os.environ[WANTED] = "1"
    chosen = [FOLDER / Path(name).name for name in sys.argv[1:]] or sorted(FOLDER.glob("*.ipynb"))
    for path in (bar := tqdm(chosen, unit="notebook")):
        bar.set_description(path.name)
        store(path)
