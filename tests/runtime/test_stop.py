"""Stopping between steps."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from diffusion2gan.runtime.stop import stop_signal


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize(
    "received",
    [
        [signal.SIGINT, signal.SIGTERM],
        [signal.SIGTERM, signal.SIGTERM, signal.SIGTERM, signal.SIGINT],
    ],
    ids=["ctrl-c first", "sigterm often"],
)
def test_the_first_signal_is_reported_and_a_second_ctrl_c_interrupts(
    received: list[signal.Signals],
) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with stop_signal() as stopped:
        assert not stopped()
        for number in received:
            send(number)
            assert stopped() == received[0]
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_no_handler_is_installed_outside_the_main_thread() -> None:
    before, seen = signal.getsignal(signal.SIGINT), []

    def job() -> None:
        with stop_signal() as stopped:
            seen.append((stopped(), signal.getsignal(signal.SIGINT)))

    thread = threading.Thread(target=job)
    thread.start()
    thread.join()
    assert seen == [(None, before)]
