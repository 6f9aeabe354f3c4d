"""Threads that wait for no other of their kind."""

from __future__ import annotations

import threading

import pytest

from yellowdog_ray.raydog.threads import Threads


def test_what_one_of_them_asks_for() -> None:
    """It is done in that thread itself, with its error where it has one."""
    threads = Threads(1, "few")

    def ask() -> tuple[bool, BaseException | None]:
        inner = threads.submit(threading.current_thread)
        failed = threads.submit(lambda: 1 // 0)
        return inner.result(5) is threading.current_thread(), failed.exception(5)

    same, error = threads.submit(ask).result(5)
    assert same
    assert isinstance(error, ZeroDivisionError)
    assert threads.submit(threading.current_thread).result(5) is not threading.current_thread()
    threads.close()


@pytest.mark.parametrize("wait", [True, False])
def test_one_of_them_may_end_them(wait: bool) -> None:
    """It does not wait for itself, and they come back."""
    threads = Threads(2, "few")
    threads.submit(lambda: threads.close(wait)).result(5)
    assert threads.submit(lambda: 5).result(5) == 5
    threads.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("few")]
