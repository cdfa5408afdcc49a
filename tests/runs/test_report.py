import re
from types import SimpleNamespace

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest

from obc_tools.pruning.choices import Target
from obc_tools.pruning.plan import Deciding
from obc_tools.runs.job import PruningJob
from obc_tools.runs.report import Figure, Table, Text, format_number, job_sections, render_report, write_report

FRAME = pd.DataFrame(
    {
        "network": ["original", "<naive>"],
        "accuracy": [0.93341, float("nan")],
        "MACs": [126837386, 57000000],
        "steps": [12000, 7],
        "latency": [12.3456, 7.0],
    }
)


def table(**options):
    return Table(FRAME, "Results", formats={"accuracy": ".2%", "MACs": "si"}, **options)


def test_one_page_without_a_network(tmp_path):
    figure = go.Figure(go.Scatter(y=[1, 2]), layout={"title": "</script><b>"})
    path = write_report(
        tmp_path / "new" / "report.html", "A & B", [Text("one\n\ntwo"), table(), Figure(figure), Figure(figure)]
    )
    page = path.read_text(encoding="utf-8")
    assert page.startswith("<!DOCTYPE html>") and "<title>A &amp; B</title>" in page
    assert "default-src 'none'" in page
    assert not re.search(r"<(script|link|img|iframe)[^>]+(src|href)=", page)
    assert page.count("plotly.js v") == 1
    assert page.count("data-figure='") == 2 and "id='figure-3'" in page
    assert "</script><b>" not in page and "\\u003c" in page
    assert 4e6 < path.stat().st_size < 6e6
    assert [entry.name for entry in path.parent.iterdir()] == ["report.html"]


def test_a_page_without_figures_is_small():
    assert len(render_report("t", [Text("one"), table()])) < 20_000


def test_text_is_escaped_and_parted():
    page = render_report("t", [Text("a < b\n\n\n\nsecond", "On <b>")])
    assert "<p>a &lt; b</p>\n<p>second</p>" in page
    assert "<h2>On &lt;b&gt;</h2>" in page


def test_table_formats_numbers():
    page = render_report("t", [table(caption="Latency: a > b")])
    for cell in ("<td>&lt;naive&gt;</td>", ">93.34%</td>", ">–</td>", ">126.8 M</td>", ">57 M</td>", ">12,000</td>"):
        assert cell in page
    assert "<td class='number'>12.35</td>" in page and "<td class='number'>7</td>" in page
    assert "<p class='caption'>Latency: a &gt; b</p>" in page
    assert "<th>network</th>" in page and "<th class='number'>MACs</th>" in page


@pytest.mark.parametrize(
    ("value", "specification", "expected"),
    [
        (855770, None, "855,770"),
        (np.int64(1234), None, "1,234"),
        (0.000012345, None, "1.234e-05"),
        (np.float32(0.5), ".1%", "50.0%"),
        (999, "si", "999"),
        (2.5e12, "si", "2.5 T"),
        (-1500, "si", "-1.5 k"),
        (True, None, "True"),
        (None, ".2%", "–"),
        (pd.NA, None, "–"),
        (np.float64("nan"), "si", "–"),
        ("text", ".2%", "text"),
    ],
)
def test_format_number(value, specification, expected):
    assert format_number(value, specification) == expected


def test_figures_follow_the_readers_setting():
    page = render_report("t", [Figure(go.Figure(layout={"height": 321}), "F", "caption <")])
    assert "style='height:321px'" in page and "caption &lt;" in page
    assert "const LOOKS = {light:{" in page and ",dark:{" in page
    assert "prefers-color-scheme: dark" in page


def test_an_old_report_survives_a_failure(tmp_path):
    path = write_report(tmp_path / "report.html", "old", [Text("old")])
    with pytest.raises(ValueError, match="section 2 is a str; expected Text, Table or Figure"):
        write_report(path, "new", [Text("new"), "new"])
    assert "old" in path.read_text(encoding="utf-8")
    assert list(tmp_path.iterdir()) == [path]


def test_refuses_unknown_columns_and_formats_that_do_not_suit():
    with pytest.raises(ValueError, match="unknown column of the table 'acuracy'; closest: accuracy"):
        Table(FRAME, formats={"acuracy": ".2%"})
    with pytest.raises(ValueError, match="column 'latency': 12.3456 does not suit the format ',d'"):
        render_report("t", [Table(FRAME, formats={"latency": ",d"})])


def test_a_report_says_how_steps_were_decided():
    job = PruningJob(model="resnet8", data="digits", target=Target(ratio=0.5), weights="w", batches=9, stop=0.1)
    steps = (Deciding(3, 0.04, True), Deciding(9, 0.25, False))
    plan = SimpleNamespace(deciding=steps, channels=10, channels_removed=5)
    text = next(job_sections(SimpleNamespace(job=job, plan=plan, equivalence=None))).text
    assert "at most 0.1 of a step's channels, or at 9 batches" in text
    assert text.endswith("batches of each step, and that share: 3 (0.04), 9 (0.25, undecided).")
