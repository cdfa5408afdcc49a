"""Figures that a notebook stores get stills, drawn by a real browser."""

import base64
import io
import json
import os

import ipywidgets
import nbformat
import plotly.graph_objects as go
import pytest
from PIL import Image

from obc_tools.plots.stills import PLOTLY, PNG, WANTED, add_stills, with_still


@pytest.fixture(autouse=True)
def browser(monkeypatch):
    monkeypatch.setenv("BROWSER_PATH", os.environ["CHROMIUM"])


def written(path, figures):
    outputs = [nbformat.v4.new_output("display_data", {PLOTLY: json.loads(figure.to_json())}) for figure in figures]
    cells = [nbformat.v4.new_markdown_cell("# Title"), nbformat.v4.new_code_cell("show()", outputs=outputs)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)


def picture(png):
    return Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")


def test_each_figure_gets_a_still_beside_it(tmp_path):
    path = tmp_path / "a.ipynb"
    red = go.Figure(layout={"width": 200, "height": 100, "paper_bgcolor": "red", "plot_bgcolor": "red"})
    written(path, [red, go.Figure(go.Bar(y=[1, 2]))])
    assert add_stills(path) == 2
    first, second = (output.data for output in nbformat.read(path, 4).cells[1].outputs)
    assert picture(first[PNG]).size == (200, 100)
    # Some versions of Chromium round colours.
    assert picture(first[PNG]).getpixel((2, 2)) == pytest.approx((255, 0, 0), abs=2)
    assert picture(second[PNG]).size == (760, 450)
    assert json.loads(json.dumps(second[PLOTLY])) == json.loads(go.Figure(go.Bar(y=[1, 2])).to_json())
    before = path.read_text()
    assert add_stills(path) == 2 and path.read_text() == before


def test_widgets_bring_stills_along_only_where_they_are_wanted(monkeypatch):
    bundle = ipywidgets.HTML()._repr_mimebundle_()
    assert with_still(bundle, lambda: pytest.fail("drawn at display")) == bundle
    monkeypatch.setenv(WANTED, "1")
    assert picture(with_still(bundle, go.Figure)[PNG]).size == (760, 450)


def test_what_is_no_notebook_stays_as_it_is(tmp_path):
    path = tmp_path / "a.ipynb"
    path.write_text("{}")
    with pytest.raises(ValueError, match=r"a.ipynb' is no notebook: 'cells'"):
        add_stills(path)
    assert path.read_text() == "{}"
