"""One JupyterLab and one browser for all tests of this folder."""

import tempfile
from pathlib import Path

import pytest
from lab import CHROMIUM, chromium, jupyterlab

MOST = 4000
"""Characters that are told of a failure whose test was done again."""


@pytest.fixture(scope="session")
def lab(tmp_path_factory):
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine: the browser was not tested")
    with jupyterlab(tmp_path_factory.mktemp("lab")) as started:
        yield started


@pytest.fixture(scope="session")
def browser(lab):
    with chromium() as started:
        yield started


@pytest.fixture
def folder(lab):
    """A folder of JupyterLab's that nobody has used, so that a test that is done again begins anew."""
    return Path(tempfile.mkdtemp(dir=lab.folder))


def pytest_terminal_summary(terminalreporter):
    """Tell why tests were done again."""
    for report in terminalreporter.stats.get("rerun", ()):
        terminalreporter.section(f"done again: {report.nodeid}")
        terminalreporter.line(report.longreprtext[-MOST:])
