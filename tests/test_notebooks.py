"""The form that all notebooks share; what is in them is run by nbval and, in a browser, by tests/browser."""

import json
import re
import runpy
from pathlib import Path

import papermill
import pytest
from nbconvert import HTMLExporter

from obc_tools.plots.stills import PLOTLY

FOLDER = Path(__file__).parents[1] / "notebooks"
STORE = runpy.run_path(str(FOLDER / "store.py"))

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
    assert colab["metadata"] == {"jupyter": {"source_hidden": True}, "cellView": "form", "tags": ["hide-input"]}


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_a_notebook_ends_with_where_else_it_runs(path):
    last = cells_of(path)[-1]
    assert source(last) == source(cells_of(PATHS[0])[-1]) and "Open in Colab" in source(last)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_one_cell_of_constants_is_papermills(path):
    tagged = [cell for cell in cells_of(path) if "parameters" in cell["metadata"].get("tags", ())]
    assert [cell["cell_type"] for cell in tagged] == ["code"] and " = " in source(tagged[0])
    assert "../.." not in "".join(map(source, cells_of(path))), "a path outside the repository"


def test_the_papers_experiments_differ_in_their_constants_alone():
    first, *others = (path for path in PATHS if "12" <= path.stem[:2] <= "16")
    assert len(others) == 4
    common = [source(cell) for cell in cells_of(first)[1:] if "parameters" not in cell["metadata"].get("tags", ())]
    for path in others:
        cells = [cell for cell in cells_of(path)[1:] if "parameters" not in cell["metadata"].get("tags", ())]
        assert list(map(source, cells)) == common


CHANGED = {
    "01_quickstart": ({"SPEEDUP": 3.0}, "2.0", "3.0"),
    "05_interactive_pruning": (
        {"CALIBRATION": {"batches": 2, "batch_size": 32}},
        "64, seed=0), 10)",
        "32, seed=0), 2)",
    ),
    "13_resnet56_cifar10": ({"TARGET": {"speedup": 1.5}, "BACKGROUND": False}, "2.1", "1.5"),
}
SAID = {"01_quickstart": r"; {}\dx", "05_interactive_pruning": "{}", "13_resnet56_cifar10": r"{}\d times fewer MACs"}


@pytest.mark.slow
@pytest.mark.parametrize("name", CHANGED)
def test_papermill_changes_the_result(name, tmp_path):
    changed, before, after = CHANGED[name]
    path, output = FOLDER / f"{name}.ipynb", tmp_path / f"{name}.ipynb"
    papermill.execute_notebook(path, output, changed, cwd=FOLDER, progress_bar=False, kernel_name="python3")
    for run, there, gone in ((path, before, after), (output, after, before)):
        words = "".join(said(cell) for cell in cells_of(run) if cell["cell_type"] == "code")
        assert re.search(SAID[name].format(re.escape(there)), words)
        assert not re.search(SAID[name].format(re.escape(gone)), words)


def said(cell):
    """Return what a cell printed or showed, as text."""
    parts = (output.get("text") or output.get("data", {}).get("text/plain", "") for output in cell["outputs"])
    return "".join("".join(part) for part in parts)


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
    assert html.count('src="data:image/png') > len(drawn)  # one is the badge
    assert all("image/png" in data for data in drawn)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_no_bar_of_progress_is_stored(path):
    outputs = [output for cell in cells_of(path) for output in cell.get("outputs", ())]
    assert not [output for output in outputs if STORE["VIEW"] in output.get("data", ()) and not is_view(output["data"])]
    assert "step/s]" not in path.read_text(encoding="utf-8")


def test_what_is_stored_leaves_bars_out():
    def shown(text, *more):
        return {"output_type": "display_data", "data": {"text/plain": text, **dict.fromkeys(more, "...")}}

    view, text, both = STORE["VIEW"], {"output_type": "stream"}, shown("a picture", "image/png", "image/jpeg")
    studio = shown("PruningStudio(…)", view, "image/png")
    found = STORE["tidied"]([shown("  0%", view), studio, text, both])
    assert found == [studio, text, shown("a picture", "image/png")]


def is_view(data):
    """Say whether an output is one of the package's widgets, and not a progress bar."""
    return any(name in "".join(data.get("text/plain", "")) for name in ("Explorer", "Studio", "Monitor"))


@pytest.mark.parametrize("path", [path for path in PATHS if path.stem < "07"], ids=lambda path: path.stem)
def test_a_teaching_notebook_has_outputs_that_are_checked(path):
    assert any("# NBVAL_CHECK_OUTPUT" in source(cell) for cell in cells_of(path))
