"""Threads for calls that wait for others, most of the time: started when first needed, ended when told."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TypeVar

__all__ = ["Threads"]

log = logging.getLogger(__name__)

_T = TypeVar("_T")

# Tells one of our own threads from others.
_here = threading.local()


class Threads:
    """A few threads that share what is to be done.

    :param count: how many there are at most.
    :param name: what their names begin with.
    """

    def __init__(self, count: int, name: str) -> None:
        self._count, self._name = count, name
        self._threads: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()
        self._process = os.getpid()

    def submit(self, function: Callable[[], _T]) -> Future[_T]:
        """Run a function in one of the threads; in this one, where this is one of ours already.

        A listener of a cluster's events runs in one of them, and what it asks the cluster would wait for
        another one: where all of them wait, for ever.
        """
        if getattr(_here, "is_ours", False):
            return _run(function)
        with self._lock:
            if self._threads is None or self._process != os.getpid():
                # A process that was forked has none of its parent's threads.
                self._process = os.getpid()
                self._threads = ThreadPoolExecutor(
                    self._count, self._name, partial(setattr, _here, "is_ours", True)
                )
            threads = self._threads
        try:
            return threads.submit(function)
        except RuntimeError:
            # The interpreter is ending and starts no more threads; what is to be ended is ended in this one.
            log.debug("No thread could be started", exc_info=True)
        return _run(function)

    def close(self, wait: bool = True) -> None:
        """End the threads. They come back when they are next needed.

        :param wait: whether to wait for what they are doing. One of our own threads never does.
        """
        with self._lock:
            threads, self._threads = self._threads, None
        if threads is not None:
            threads.shutdown(wait=wait and not getattr(_here, "is_ours", False))


def _run(function: Callable[[], _T]) -> Future[_T]:
    future: Future[_T] = Future()
    try:
        future.set_result(function())
    except BaseException as error:
        future.set_exception(error)
    return future
