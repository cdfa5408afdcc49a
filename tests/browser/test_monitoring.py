"""Watching runs: a real one from its launch to its end, and an hour in two minutes, in which nothing grows."""

import time

import psutil
import pytest
from lab import opened
from run_folders import write

LOOKS = 1800
"""Of an hour: one in two seconds."""
EVERY = 0.05
WARM = 900
MEBI = 2**20


LAUNCH = """import obc_tools as obc
few, more = (obc.Recipe(epochs=epochs, lr=0.05, batch_size=64) for epochs in (10, 100))
job = obc.PruningJob(
    title="tiny", model="resnet8", model_options={"width": 4}, data="digits", train_images=256, val_images=64,
    target=obc.Target(speedup=1.3), batches=1, batch_size=64, steps=2, pretrain=more, finetune=few, equivalent=True,
)
monitor = obc.RunMonitor(obc.launch(job, "real", devices="cpu"), every=0.3)
monitor"""

FINISHED = "g.data.filter(({meta}) => meta[2] === 0 && meta[3] === 'epochs').map(({x}) => x.length)"
"""The finished epochs of each training in the panel of losses."""


@pytest.mark.slow
def test_a_real_run_is_stopped_and_resumed_in_the_page(lab, browser, folder):
    with opened(browser, lab, lab.write(folder / "real.ipynb", LAUNCH)) as notebook:
        notebook.run_all()
        view = notebook.view("obc.RunMonitor(")
        view.until(lambda: "running: original, epoch" in view.words, "it trains")
        view.press("stop")
        view.until(lambda: view.button("resume").is_enabled(), "it has stopped")
        assert "stopped: original" in view.words and "100 of 100" not in view.words
        view.press("resume")
        view.until(lambda: "resumed" in view.words, "it goes on")
        view.until(lambda: "finished" in view.words and view.button("stop").is_disabled(), "it ends")
        assert view.button("resume").is_disabled()
        assert view.figure(FINISHED) == [100, 10, 10]
        assert notebook.errors == [] and notebook.console == []


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
def test_an_hour_of_monitoring_takes_no_more_than_its_beginning(lab, browser, folder):
    run = write(folder / "long", steps=LOOKS // 4, epoch=1, step=0, done=0)
    cells = ["import os\nimport obc_tools as obc\nprint('process', os.getpid())"]
    cells += [f"monitor = obc.RunMonitor('long', every={EVERY})\nmonitor"]
    with opened(browser, lab, lab.write(folder / "long.ipynb", *cells)) as notebook:
        notebook.run_all()
        kernel = int(notebook.view("os.getpid()").words.split()[-1])
        view = notebook.view("obc.RunMonitor(")
        before = None
        for look in range(1, LOOKS):
            epoch, step = divmod(look, LOOKS // 4)
            due = time.monotonic() + EVERY
            write(run, steps=LOOKS // 4, epoch=epoch + 1, step=step, done=epoch, loss=1 / look)
            if look == WARM:
                before = sizes(lab, notebook, kernel)
            notebook.page.wait_for_timeout(max(1, 1000 * (due - time.monotonic())))
        view.until(lambda: f"step {step} of" in view.words, "the last look")
        after = sizes(lab, notebook, kernel)
        points = view.figure("Math.max(...g.calcdata.map(trace => trace.length))")
        assert notebook.errors == [] and notebook.console == []
    assert 50 < points <= 400
    assert after[0] - before[0] < 16 * MEBI and after[1] - before[1] < 16 * MEBI, (before, after)
    assert abs(after[2] - before[2]) < 1000
