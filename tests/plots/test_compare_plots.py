import pandas as pd
import pytest
from cases import curve

from obc_tools.comparing.compare import Comparison, ComparisonError
from obc_tools.plots.curves import criteria_curves, criteria_panels, scoring_seconds
from obc_tools.plots.looks import COLORS, theme


@pytest.fixture
def comparison():
    rows = curve("jacobian", 0, (1, 0.5, 0.2), (0.9, 0.7, 0.1)) + curve("jacobian", 1, (1, 0.5), (0.9, 0.5))
    rows += curve("jacobian, set", 0, (1, 0.5), (0.9, 0.6)) + curve("l1", 0, (1, 0.6, 0.3), (0.9, 0.2, 0.1))
    empty = dict.fromkeys(("top5", "train_top5", "train_loss"), float)
    return Comparison(pd.DataFrame(rows).astype(empty), {"steps": 2}, {})


def lines(figure):
    return {trace.name: trace for trace in figure.data if trace.name}


def test_a_line_is_the_mean_of_the_repeats(comparison):
    figure = criteria_curves(comparison, "accuracy", "params")
    jacobian = lines(figure)["jacobian"]
    assert list(jacobian.x) == [100, 50] and list(jacobian.y) == pytest.approx([90, 60])
    assert list(jacobian.customdata) == pytest.approx([0, 14.1421])
    assert list(lines(figure)["l1"].x) == pytest.approx([100, 60, 30])
    assert figure.layout.xaxis.title.text == "parameters left (%)" and figure.layout.xaxis.autorange == "reversed"
    assert figure.layout.yaxis.title.text == "held-out accuracy (%)"
    assert list(lines(criteria_curves(comparison, "loss", "channels"))["l1"].x) == pytest.approx([0, 40, 70])
    assert list(lines(criteria_curves(comparison, "loss"))["l1"].y) == pytest.approx([0.1, 0.8, 0.9])


def test_only_repeated_curves_have_a_band(comparison):
    bands = [trace for trace in criteria_curves(comparison).data if trace.fill]
    assert [band.legendgroup for band in bands] == ["jacobian"]
    assert list(bands[0].y) == pytest.approx([90, 74.1421356, 45.8578644, 90])


def test_a_criterion_has_its_own_colour_and_its_variants_their_dashes(comparison):
    found = lines(criteria_curves(comparison))
    assert found["jacobian"].line.color == found["jacobian, set"].line.color == COLORS["jacobian"]
    assert found["jacobian"].line.dash != found["jacobian, set"].line.dash
    assert found["l1"].line.color == COLORS["l1"] and found["l1"].line.dash == "solid"


def test_panels_have_a_row_a_measured_metric_and_a_column_an_axis(comparison):
    figure = criteria_panels(comparison, look="dark")
    titles = [axis.title.text for axis in figure.select_yaxes() if axis.title.text]
    assert titles == ["training accuracy (%)", "held-out accuracy (%)", "held-out loss (nats)"]
    assert len(list(figure.select_xaxes())) == 9
    assert [trace.name for trace in figure.data if trace.showlegend] == ["jacobian", "jacobian, set", "l1"]
    assert figure.layout.template.layout.paper_bgcolor == theme("dark").layout.paper_bgcolor


def test_seconds_are_medians_with_quartiles(comparison):
    figure = scoring_seconds(comparison)
    bar = figure.data[0]
    assert dict(zip(bar.y, bar.x, strict=True)) == {"jacobian": 1.5, "jacobian, set": 1.5, "l1": 1.5}
    assert list(bar.error_x.array) == pytest.approx([0.5, 0, 0])
    assert figure.layout.xaxis.type == "log"


def test_what_was_not_measured_is_refused(comparison):
    with pytest.raises(ComparisonError, match=r"'train_loss' was not measured; there are accuracy, loss"):
        criteria_curves(comparison, "train_loss")
    with pytest.raises(ComparisonError, match=r"unknown axis 'watts'"):
        comparison.plot("accuracy", "watts")
    assert len(comparison.plot().data) > len(comparison.plot("loss").data)
    assert comparison.plot_seconds().data[0].orientation == "h"
