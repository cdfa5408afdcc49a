import threading

import pytest
import torch

from obc_tools.pruning.readings import PausableCall, pause


def test_calls_go_on_in_turns_without_gradients():
    seen = []

    def call(name):
        def body():
            for number in range(2):
                seen.append((name, number, torch.is_grad_enabled()))
                pause((name, number))

        return body

    with PausableCall(call("a")) as a, PausableCall(call("b")) as b:
        assert [a.resume(), b.resume(), a.resume(), b.resume()] == [("a", 0), ("b", 0), ("a", 1), ("b", 1)]
        assert a.resume() is None and b.resume() is None and a.resume() is None
    assert seen == [("a", 0, False), ("b", 0, False), ("a", 1, False), ("b", 1, False)]
    assert torch.is_grad_enabled()


def test_a_call_is_unwound_where_it_stopped():
    threads, unwound = threading.active_count(), []

    def body():
        try:
            pause(1)
        finally:
            unwound.append(True)

    with pytest.raises(KeyError), PausableCall(body) as call, PausableCall(body):
        call.resume()
        raise KeyError
    assert unwound == [True] and threading.active_count() == threads


def test_ctrl_c_while_a_thread_starts_leaves_none(monkeypatch):
    threads, begin = threading.active_count(), threading.Thread.start

    def interrupted(thread):
        begin(thread)
        raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    with pytest.raises(KeyboardInterrupt), PausableCall(lambda: pause(1)) as call:
        call.resume()
    assert threading.active_count() == threads


def test_errors_reach_whoever_resumes():
    def body():
        pause(1)
        raise ValueError("no")

    with PausableCall(body) as call:
        assert call.resume() == 1
        with pytest.raises(ValueError, match="no"):
            call.resume()


def test_elsewhere_nothing_pauses():
    assert pause(1) is None
