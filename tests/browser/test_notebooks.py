"""Every teaching notebook, run as a person runs it."""

import pytest
from checks import check_clean
from lab import NOTEBOOKS, opened

NAMES = [path.name for path in sorted(NOTEBOOKS.glob("0*.ipynb")) if not path.name.startswith("05")]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_teaching_notebook_runs_without_errors(lab, browser, name):
    with opened(browser, lab, name) as notebook:
        notebook.run_all()
        check_clean(lab, notebook)
