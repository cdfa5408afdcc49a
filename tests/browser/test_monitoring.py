"""An hour of watching a run, in two minutes: as many looks and changes, and nothing grows."""

import time

import psutil
import pytest
from lab import opened
from run_folders import write

LOOKS = 1800
"""Of an hour: one in two seconds."""
EVERY = 0.05
WARM = 300
MEBI = 2**20


def heap(notebook):
    """Return the bytes of JavaScript objects that are still in use."""
    session = notebook.page.context.new_cdp_session(notebook.page)
    session.send("HeapProfiler.collectGarbage")
    return session.send("Runtime.getHeapUsage")["usedSize"]


def sizes(lab, notebook, kernel):
    """Return the bytes that the kernel, the page and the saved notebook take."""
    notebook.save()
    return psutil.Process(kernel).memory_info().rss, heap(notebook), (lab.folder / notebook.name).stat().st_size


@pytest.mark.slow
def test_an_hour_of_monitoring_takes_no_more_than_its_beginning(lab, browser):
    folder = write(lab.folder / "long", steps=LOOKS // 4, epoch=1, step=0, done=0)
    cells = ["import os\nimport obc_tools as obc\nprint('process', os.getpid())"]
    cells += [f"monitor = obc.RunMonitor('long', every={EVERY})\nmonitor"]
    with opened(browser, lab, lab.write("long.ipynb", *cells)) as notebook:
        notebook.run_all()
        kernel = int(notebook.view("os.getpid()").words.split()[-1])
        view = notebook.view("obc.RunMonitor(")
        before = None
        for look in range(1, LOOKS):
            epoch, step = divmod(look, LOOKS // 4)
            due = time.monotonic() + EVERY
            write(folder, steps=LOOKS // 4, epoch=epoch + 1, step=step, done=epoch, loss=1 / look)
            if look == WARM:
                before = sizes(lab, notebook, kernel)
            notebook.page.wait_for_timeout(max(1, 1000 * (due - time.monotonic())))
        view.until(lambda: f"step {step} of" in view.words, "the last look")
        after = sizes(lab, notebook, kernel)
        points = view.figure("Math.max(...g.calcdata.map(trace => trace.length))")
        assert notebook.errors == [] and notebook.console == []
    assert 50 < points <= 400
    assert after[0] - before[0] < 24 * MEBI and after[1] - before[1] < 24 * MEBI, (before, after)
    assert abs(after[2] - before[2]) < 1000
