"""The notebook of the widgets in a real browser: it runs, a slider and a button change what the page shows."""

from checks import check_clean
from lab import opened

KEPT = "Math.round(g.data[0].y.reduce((a, b) => a + b))"


def test_the_notebook_of_the_widgets(lab, browser):
    with opened(browser, lab, "05_interactive_pruning.ipynb") as notebook:
        notebook.run_all()
        studio = notebook.view("obc.PruningStudio(")
        studio.until(lambda: "measured" in studio.words, "the notebook's measurement")
        before = studio.figure(KEPT)
        studio.drag("to", 0.7)
        studio.until(lambda: studio.figure(KEPT) < before, "fewer channels are kept")
        assert f"ratio={studio.value('to')}" in studio.code
        studio.press("undo")
        studio.until(lambda: studio.figure(KEPT) == before, "the plan before")
        for words in ("obc.JTJExplorer(", "obc.InteractionExplorer("):
            assert notebook.view(words).figure("g.data.length") == 1
        check_clean(lab, notebook)
