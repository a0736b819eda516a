"""Stopping between steps."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from diffusion2gan.runtime.stop import stop_signal


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


def test_the_first_ctrl_c_asks_and_the_second_interrupts() -> None:
    before = signal.getsignal(signal.SIGINT)
    with stop_signal() as stopped:
        assert not stopped()
        send(signal.SIGINT)
        assert stopped() == signal.SIGINT
        send(signal.SIGTERM)
        assert stopped() == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == before


def test_sigterm_may_come_often() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with stop_signal() as stopped:
        for _ in range(3):
            send(signal.SIGTERM)
            assert stopped() == signal.SIGTERM
        send(signal.SIGINT)
        assert stopped() == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) == before


def test_outside_the_main_thread_nothing_changes() -> None:
    before, seen = signal.getsignal(signal.SIGINT), []

    def job() -> None:
        with stop_signal() as stopped:
            seen.append((stopped(), signal.getsignal(signal.SIGINT)))

    thread = threading.Thread(target=job)
    thread.start()
    thread.join()
    assert seen == [(None, before)]
