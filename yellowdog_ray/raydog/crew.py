"""Calls that run in parallel for one operation."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Any, TypeVar

from yellowdog_ray.errors import BuildTimeoutError, ClusterStateError
from yellowdog_ray.raydog.platform import Platform
from yellowdog_ray.raydog.transport import CONNECT_TIMEOUT, READ_TIMEOUT, Operation

__all__ = ["Crew"]

_T = TypeVar("_T")


class Crew:
    """Calls of one operation that run in parallel; the first that fails ends the wait for all."""

    def __init__(self, platform: Platform, operation: Operation) -> None:
        self._platform = platform
        self.operation = operation
        self._futures: list[Future[Any]] = []
        self._failed: list[BaseException] = []

    def start(self, function: Callable[[], _T]) -> Future[_T]:
        """Make a call in a thread."""
        self._check_stopped()
        future = self._platform.submit(function)
        self._futures.append(future)
        future.add_done_callback(self._note_failure)
        return future

    def _note_failure(self, future: Future[Any]) -> None:
        if not future.cancelled() and (error := future.exception()) is not None:
            self._failed.append(error)

    def check(self) -> None:
        """Raise the failure of a call that has failed, or that somebody has stopped them."""
        if self._failed:
            raise self._failed[0]
        self._check_stopped()

    def result(self, future: Future[_T], what: str) -> _T:
        """Wait for a call, but no longer than until any one fails or the operation's time is over."""
        while True:
            self.check()
            if future.done():
                return future.result()
            if self.operation.expired:
                raise BuildTimeoutError(f"{self.operation.elapsed:.1f} s were not enough: {what}")
            self._wait_for_any()

    def finish(self, what: str) -> None:
        """Wait for all of them."""
        for future in list(self._futures):
            self.result(future, what)

    def _wait_for_any(self) -> None:
        pending = [other for other in self._futures if not other.done()]
        wait(pending, timeout=self.operation.remaining, return_when=FIRST_COMPLETED)

    def stop(self, wait_for_them: bool = True) -> None:
        """Start no more of them, and wait for those that are under way: what they create is to be known.

        :param wait_for_them: whether any of them may create something.
        """
        self.operation.cancel()
        for future in self._futures:
            future.cancel()
        if wait_for_them:
            # A call takes no longer, nor does the wait for another process that changes the same.
            wait(self._futures, timeout=CONNECT_TIMEOUT + READ_TIMEOUT + 5.0)

    def _check_stopped(self) -> None:
        if self.operation.cancelled.is_set():
            raise ClusterStateError("it was stopped: the cluster is being shut down")
