"""The notebook of the widgets in a real browser: it runs, a slider and a button change what the page shows."""

from checks import check_clean
from lab import opened


def test_the_notebook_of_the_widgets(lab, browser):
    with opened(browser, lab, "05_interactive_pruning.ipynb") as notebook:
        notebook.run_all()
        studio = notebook.view("obc.PruningStudio(")
        studio.until(lambda: "measured" in studio.words, "the notebook's measurement")
        before = studio.kept()
        studio.drag("to", 0.7, steps=1)
        studio.until(lambda: studio.kept() < before, "fewer channels are kept")
        assert f"ratio={studio.value('to'):g}" in studio.code
        studio.press("undo")
        studio.until(lambda: studio.kept() == before, "the plan before")
        assert notebook.view("obc.JTJExplorer(").title.startswith("|JᵀJ| of conv1.out, channel 0")
        assert notebook.view("obc.InteractionExplorer(").title.startswith("Correlation of K of conv1.out")
        assert notebook.page.locator("img[alt='Open in Colab']").evaluate("picture => picture.naturalWidth") == 118
        check_clean(lab, notebook)
