"""One JupyterLab and one browser for all tests of this folder."""

import pytest
from lab import CHROMIUM, chromium, jupyterlab


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
