"""What holds for every notebook that was run in the browser."""

import json

MOST_BYTES = 500_000


def check_clean(lab, notebook):
    """No cell failed, the console has no error of ours, every figure is drawn, and the saved file stays small."""
    assert notebook.errors == []
    assert notebook.console == []
    notebook.save()
    path = lab.folder / notebook.name
    saved = json.loads(path.read_text())
    assert path.stat().st_size < MOST_BYTES and "widgets" not in saved["metadata"]
    outputs = [output for cell in saved["cells"] for output in cell.get("outputs", ())]
    figures = sum("application/vnd.plotly.v1+json" in output.get("data", ()) for output in outputs)
    drawn = notebook.page.locator(".jp-RenderedPlotly .main-svg").first
    assert figures == 0 or drawn.is_visible()
    assert notebook.page.locator(".jp-RenderedPlotly").count() == figures
