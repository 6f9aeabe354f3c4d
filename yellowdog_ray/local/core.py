"""The control plane: a scheduler, the machines that it drives, and the clock, on one asyncio loop."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Any, TypeVar

from yellowdog_ray.errors import ClusterStateError
from yellowdog_ray.local.clock import Timer, Timers
from yellowdog_ray.local.events import Event, NodeBackend, TaskExited
from yellowdog_ray.local.scheduler import Scheduler

__all__ = ["ControlPlane"]

# Of how many tasks the end of the output is kept; each has at most 4,000 bytes.
_OUTPUTS = 500

T = TypeVar("T")


class ControlPlane:
    """Joins a scheduler to a backend: carries its effects out, hands it events, keeps its timer.

    Everything but :meth:`post` and :meth:`call` is called on the loop.

    :param key_id: the application key that clients must show.
    :param secret: its secret.
    :param now: the clock, in seconds since 1970.
    :param timers: what calls the scheduler when its time has come, by the same clock; None for the loop.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        loop: asyncio.AbstractEventLoop,
        key_id: str,
        secret: str,
        now: Callable[[], float] = time.time,
        timers: Timers | None = None,
    ) -> None:
        self.scheduler = scheduler
        self.now = now
        self.closing = asyncio.Event()
        self.backend: NodeBackend | None = None
        #: Called after each change, where somebody keeps a history.
        self.saver: Callable[[], None] | None = None
        self.timers: Timers = timers or loop
        #: What the latest attempts of tasks printed last, by the attempts' names.
        self.outputs: dict[str, str] = {}
        self._loop = loop
        self._key = f"{key_id}:{secret}".encode()
        self._timer: Timer | None = None
        self._draining = False
        # Calls from other threads that have not been carried out; the lock is for these alone.
        self._calls: set[Future[Any]] = set()
        self._lock = threading.Lock()

    def check_key(self, key_id: str, secret: str) -> bool:
        """Say whether this is the application key."""
        return hmac.compare_digest(f"{key_id}:{secret}".encode(), self._key)

    def on_event(self, event: Event) -> None:
        """Take in what a machine did."""
        if isinstance(event, TaskExited):
            self.outputs[event.run_id] = event.output_tail
            if len(self.outputs) > _OUTPUTS:
                del self.outputs[next(iter(self.outputs))]
        self.scheduler.on_event(event, self.now())
        self.changed()

    def post(self, event: Event) -> None:
        """Take in what a machine did, from any thread; after the loop has closed, nothing happens."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self.on_event, event)

    def call(self, function: Callable[..., T], *args: Any, patience: float | None = None) -> T:
        """Call something on the loop, from whatever thread, and return what it returns.

        On the loop's own thread it is called at once.

        :param patience: seconds to wait for the loop; None for as long as the platform runs.
        :raises ClusterStateError: when the platform is closed, closes before it came to the call, or has not
            come to it in time.
        """
        if _running_loop() is self._loop:
            self._require_open()
            return function(*args)
        answer: Future[T] = Future()

        def run() -> None:
            with self._lock:
                if answer not in self._calls:
                    return
                self._calls.remove(answer)
            try:
                answer.set_result(function(*args))
            except BaseException as error:
                answer.set_exception(error)

        with self._lock:
            # Closing sets it first, and then ends the calls that are in here.
            self._require_open()
            try:
                self._loop.call_soon_threadsafe(run)
            except RuntimeError:
                raise ClusterStateError("this platform is closed") from None
            self._calls.add(answer)
        wait([answer], patience)
        with self._lock:
            if answer in self._calls:
                self._calls.remove(answer)
                raise ClusterStateError(f"this platform has been busy with something else for {patience:g} s")
        return answer.result()

    def _require_open(self) -> None:
        if self.closing.is_set():
            raise ClusterStateError("this platform is closed")

    def changed(self) -> None:
        """Carry out what the scheduler wants, and arm the timer for when it wants to be called next."""
        if self._draining or self.closing.is_set():
            # A backend that answers at once comes back in here: the loop below sees to it.
            return
        self._draining = True
        try:
            while effects := self.scheduler.take_effects():
                for effect in effects:
                    if self.backend is not None:
                        self.backend.apply(effect)
        finally:
            self._draining = False
        if self.saver is not None:
            self.saver()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        deadline = self.scheduler.next_deadline()
        if deadline is not None:
            # A timer of the loop cannot be set for months ahead; waking up early does no harm.
            delay = min(max(0.0, deadline - self.now()), 3600.0)
            self._timer = self.timers.call_later(delay, self._tick)

    def _tick(self) -> None:
        self._timer = None
        self.scheduler.tick(self.now())
        self.changed()

    def close(self) -> None:
        """End the update streams, the timer and the calls of other threads; the server can then close."""
        self.closing.set()
        with self._lock:
            calls, self._calls = self._calls, set()
        for call in calls:
            call.set_exception(ClusterStateError("this platform was closed before it came to this call"))
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None
