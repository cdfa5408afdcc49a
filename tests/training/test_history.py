import pytest

from obc_tools.training.folder import Epoch, History


def epoch(number: int, val_accuracy: float = 0.5) -> Epoch:
    return Epoch(number, 0.1, 1.5, 0.25, 1.25, val_accuracy, 2.0, 100.0)


HISTORY = History((epoch(1, 0.5), epoch(2, 0.75), epoch(3, 0.75), epoch(4, 0.625)))


def test_last_and_best():
    assert HISTORY.last == epoch(4, 0.625)
    assert HISTORY.best == epoch(2, 0.75)
    assert (len(HISTORY), HISTORY[1], list(HISTORY)[2]) == (4, epoch(2, 0.75), epoch(3, 0.75))


def test_frame_has_one_row_an_epoch():
    frame = HISTORY.to_frame()
    assert list(frame.columns) == [
        *("epoch", "lr", "train_loss", "train_accuracy"),
        *("val_loss", "val_accuracy", "seconds", "images_per_second"),
    ]
    assert frame["epoch"].tolist() == [1, 2, 3, 4]
    assert frame["val_accuracy"].tolist() == [0.5, 0.75, 0.75, 0.625]


def test_shows_last_and_best_and_how_it_was_picked():
    assert repr(HISTORY) == (
        "History of 4 epochs\n"
        "  last epoch 4: training loss 1.5000, accuracy 25.00%; validation loss 1.2500, accuracy 62.50%\n"
        "  best epoch 2: training loss 1.5000, accuracy 25.00%; validation loss 1.2500, accuracy 75.00% (picked on val)"
    )
    assert repr(History((epoch(1),))).startswith("History of 1 epoch\n")
    page = HISTORY._repr_html_()
    assert "<table" in page
    assert "accuracy 75.00% (picked on val)" in page


@pytest.mark.parametrize(
    ("epochs", "message"),
    [((), "at least one epoch"), ((epoch(2),), r"numbered 1, 2, …, not \[2\]")],
)
def test_refuses(epochs, message):
    with pytest.raises(ValueError, match=message):
        History(epochs)


def test_plot_asks_plots(monkeypatch):
    monkeypatch.setattr("obc_tools.plots.curves.plot_histories", lambda histories: histories)
    assert HISTORY.plot("naive") == {"naive": HISTORY} and HISTORY.plot() == {"": HISTORY}


def test_the_legend_names_runs_where_they_have_names():
    for label, expected in (("", ["validation", "training"]), ("EP", ["EP, validation", "EP, training"])):
        assert [trace.name for trace in HISTORY.plot(label).data if trace.showlegend is not False] == expected
