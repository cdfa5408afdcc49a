"""What holds for every notebook that was run in the browser."""

import json

MOST_BYTES = 500_000
FIGURE = "application/vnd.plotly.v1+json"


def check_clean(lab, notebook):
    """No cell failed, the console has no error of ours, every figure is drawn, and the saved file stays small.

    JupyterLab saves a PNG of each plotly figure that it has drawn beside the figure; these are not counted.
    """
    assert notebook.errors == []
    assert notebook.console == []
    notebook.save()
    path = lab.folder / notebook.name
    saved = json.loads(path.read_text())
    assert "widgets" not in saved["metadata"]
    outputs = [output.get("data", {}) for cell in saved["cells"] for output in cell.get("outputs", ())]
    drawn_by_lab = [data for data in outputs if {FIGURE, "image/png"} <= set(data)]
    assert path.stat().st_size - sum(len(data["image/png"]) for data in drawn_by_lab) < MOST_BYTES
    figures = sum(FIGURE in data for data in outputs)
    drawn = notebook.page.locator(".jp-RenderedPlotly .main-svg").first
    assert figures == 0 or drawn.is_visible()
    assert notebook.page.locator(".jp-RenderedPlotly").count() == figures
