"""What holds for every notebook that was run in the browser."""

import json

from lab import NOTEBOOKS

MOST_BYTES = 500_000
FIGURE = "application/vnd.plotly.v1+json"
CHECKED = "# NBVAL_CHECK_OUTPUT"
"""Begins the cells whose outputs are the same on every machine."""


def checked_outputs(path):
    """Return the texts of the cells whose outputs are to be as committed."""
    cells = [cell for cell in json.loads(path.read_text())["cells"] if "".join(cell["source"]).startswith(CHECKED)]
    texts = [[o.get("text") or o["data"]["text/plain"] for o in cell["outputs"]] for cell in cells]
    return ["".join("".join(text) for text in outputs) for outputs in texts]


def check_clean(lab, notebook):
    """No cell failed, the console has no error of ours, outputs are as committed, figures drawn, the saved file small.

    JupyterLab saves a PNG of each plotly figure that it has drawn beside the figure; these are not counted.
    """
    assert notebook.errors == []
    assert notebook.console == []
    notebook.save()
    path = lab.folder / notebook.name
    saved = json.loads(path.read_text())
    assert checked_outputs(path) == checked_outputs(NOTEBOOKS / notebook.name)
    assert "widgets" not in saved["metadata"]
    outputs = [output.get("data", {}) for cell in saved["cells"] for output in cell.get("outputs", ())]
    drawn_by_lab = [data for data in outputs if {FIGURE, "image/png"} <= set(data)]
    assert path.stat().st_size - sum(len(data["image/png"]) for data in drawn_by_lab) < MOST_BYTES
    figures = sum(FIGURE in data for data in outputs)
    drawn = notebook.page.locator(".jp-RenderedPlotly .main-svg").first
    assert figures == 0 or drawn.is_visible()
    assert notebook.page.locator(".jp-RenderedPlotly").count() == figures
