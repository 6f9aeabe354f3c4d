"""The control plane: a scheduler, the machines that it drives, and the clock, on one asyncio loop."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import time
from collections.abc import Callable

from yellowdog_ray.local.clock import Timer, Timers
from yellowdog_ray.local.events import Event, NodeBackend, TaskExited
from yellowdog_ray.local.scheduler import Scheduler

__all__ = ["ControlPlane"]

# Of how many tasks the end of the output is kept; each has at most 4,000 bytes.
_OUTPUTS = 500


class ControlPlane:
    """Joins a scheduler to a backend: carries its effects out, hands it events, keeps its timer.

    Everything but :meth:`post` is called on the loop.

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
        """End the update streams and the timer; the server can then close."""
        self.closing.set()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
