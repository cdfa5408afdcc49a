"""Work beside the kernel: the newest piece only, told how far it is, cancelled between items."""

import threading

import pytest

from obc_tools.widgets.controls import Cancelled, Task, Worker


class Told:
    """A worker that notes what it tells."""

    def __init__(self):
        self.reports, self.errors, self.outcomes = [], [], []
        self.worker = Worker(lambda what, share: self.reports.append((what, share)), self.errors.append)

    def start(self, work):
        return self.worker.start(work, self.outcomes.append)


def test_an_outcome_is_handed_over_with_its_progress():
    told = Told()
    told.start(lambda task: [2 * item for item in task.watch([1, 2], "doubling")])
    told.worker.wait(10)
    assert told.outcomes == [[2, 4]] and told.reports == [("doubling", 0.0), ("doubling", 0.5)]
    assert not told.worker.busy


def test_the_newest_work_waits_for_the_end_of_the_one_it_replaces():
    told, entered, go_on, running = Told(), threading.Event(), threading.Event(), []

    def first(task):
        running.append("first")
        entered.set()
        assert go_on.wait(10)
        running.append("first ends")
        return "first"

    def third(task):
        running.append("third")
        return "third"

    told.start(first)
    assert entered.wait(10)
    told.start(lambda task: running.append("second"))
    told.start(third)
    assert running == ["first"] and told.worker.busy
    go_on.set()
    told.worker.wait(10)
    assert running == ["first", "first ends", "third"]
    assert told.outcomes == ["third"] and told.errors == []


def test_cancelled_work_ends_between_items():
    told, seen, go_on, ended = Told(), [], threading.Event(), threading.Event()

    def work(task):
        try:
            for item in task.watch(range(3), "counting"):
                seen.append(item)
                assert go_on.wait(10)
        finally:
            ended.set()

    told.start(work)
    while not seen:
        ended.wait(0.01)
    told.worker.cancel()
    go_on.set()
    assert ended.wait(10)
    assert seen == [0] and told.outcomes == [] and told.errors == [] and not told.worker.busy


def test_cancelled_work_tells_nothing_more():
    told, looked, ended = Told(), threading.Event(), threading.Event()

    def work(task):
        try:
            task.check()
            looked.set()
            task.at("too late", 0.5)
        finally:
            ended.set()

    with told.worker.lock:
        told.start(work)
        assert looked.wait(10)
        assert not ended.wait(0.05)
        told.worker.cancel()
    assert ended.wait(10)
    assert told.reports == [] and told.errors == []


def test_failures_are_handed_over():
    told = Told()
    told.start(lambda task: 1 / 0)
    told.worker.wait(10)
    assert [type(error) for error in told.errors] == [ZeroDivisionError] and told.outcomes == []


def test_waiting_has_an_end():
    told, go_on = Told(), threading.Event()
    told.start(lambda task: go_on.wait(10))
    with pytest.raises(TimeoutError, match="work is still under way after 0.01 s"):
        told.worker.wait(0.01)
    go_on.set()
    told.worker.wait(10)


def test_items_are_watched_each_time():
    task = Task(lambda what, share: None)
    watched = task.watch([1, 2, 3], "looking")
    assert (list(watched), list(watched), len(watched)) == ([1, 2, 3], [1, 2, 3], 3)
    task.cancel()
    with pytest.raises(Cancelled):
        list(watched)


def test_an_outcome_that_cannot_be_shown_is_an_error():
    told = Told()

    def refuse(outcome):
        raise ValueError(f"cannot show {outcome}")

    told.worker.start(lambda task: 3, refuse)
    told.worker.wait(10)
    with told.worker.lock:
        assert [str(error) for error in told.errors] == ["cannot show 3"]
