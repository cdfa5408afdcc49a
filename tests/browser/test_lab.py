"""What goes wrong in a page does not go unseen: these tests' own eyes."""

import pytest
from lab import FAILED, opened


def test_errors_of_cells_and_of_the_page_are_seen(lab, browser, folder):
    script = "from IPython.display import Javascript\nJavascript('console.error(\"of the page\")')"
    with opened(
        browser, lab, lab.write(folder / "wrong.ipynb", "print('fine')", script, "1 / 0", "print('not reached')")
    ) as made:
        made.run_all()
        assert made.errors == ["ZeroDivisionError: division by zero"]
        made.page.wait_for_timeout(100)
        assert len(made.console) == 1 and "of the page" in made.console[0]


def test_what_never_ends_is_told_with_the_state_of_the_page(lab, browser, folder):
    with opened(browser, lab, lab.write(folder / "endless.ipynb", "import time\ntime.sleep(5)")) as made:
        made.page.evaluate("() => { window.jupyterapp.commands.execute('notebook:run-all-cells') }")
        with pytest.raises(AssertionError, match=r"not done after 0.2 s: new Promise.*prompts': \['\[\*\]:'\]"):
            made.do("new Promise(() => {})", 0.2)
        view = made.view("time.sleep")
        with pytest.raises(AssertionError, match="pigs that fly"):
            view.until(lambda: False, "pigs that fly", 0.2)
        assert FAILED.is_file()
