"""The form that all notebooks share; what is in them is run by nbval and, in a browser, by tests/browser."""

import json
from pathlib import Path

import pytest
from nbconvert import HTMLExporter

from obc_tools.plots.stills import PLOTLY

FOLDER = Path(__file__).parents[1] / "notebooks"
PATHS = sorted(FOLDER.glob("*.ipynb"))
MOST_BYTES = 500_000


def cells_of(path):
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def source(cell):
    return "".join(cell["source"])


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_a_notebook_begins_like_all_others(path):
    title, colab = cells_of(path)[:2]
    assert source(title).startswith(f"# {int(path.stem[:2])}. ")
    assert "*Question:*" in source(title) and "*Time and hardware:*" in source(title).replace("\n", " ")
    assert source(colab) == source(cells_of(PATHS[0])[1]) and '"google.colab" in sys.modules' in source(colab)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_a_notebook_is_small_and_holds_no_widget_state_and_no_error(path):
    assert path.stat().st_size < MOST_BYTES
    assert "widgets" not in json.loads(path.read_text(encoding="utf-8"))["metadata"]
    outputs = [output for cell in cells_of(path) for output in cell.get("outputs", ())]
    assert not [output for output in outputs if output["output_type"] == "error"]


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_every_figure_and_widget_is_seen_without_a_kernel_and_javascript(path):
    """On a page of nbconvert as many pictures as figures were shown, whatever draws them elsewhere."""
    bundles = [output["data"] for cell in cells_of(path) for output in cell.get("outputs", ()) if "data" in output]
    drawn = [data for data in bundles if PLOTLY in data or is_view(data)]
    html, _ = HTMLExporter(template_name="basic").from_filename(path)
    assert html.count("<img") >= len(drawn)
    assert all("image/png" in data for data in drawn)


def is_view(data):
    """Say whether an output is one of the package's widgets, and not a progress bar."""
    return any(name in "".join(data.get("text/plain", "")) for name in ("Explorer", "Studio", "Monitor"))


@pytest.mark.parametrize("path", [path for path in PATHS if path.stem < "07"], ids=lambda path: path.stem)
def test_a_teaching_notebook_has_outputs_that_are_checked(path):
    assert any("# NBVAL_CHECK_OUTPUT" in source(cell) for cell in cells_of(path))
