"""Clocks and their timers: the real one is the event loop's own; the virtual one is moved by hand."""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections.abc import Callable
from typing import Any, Protocol

from yellowdog_ray.errors import ClusterStateError, SpecError

__all__ = ["LONGEST", "Timer", "Timers", "VirtualClock"]

#: The longest time that anything may be told to last: in seconds, thirty thousand years.
LONGEST = 1e12

# 1 January of the year 9000: times, and those that are a while later, must be such as can be written.
_END = 221_845_392_000.0


class Timer(Protocol):
    """Something that is to be called later."""

    def cancel(self) -> None:
        """See that it is not called."""


class Timers(Protocol):
    """What calls something later; an asyncio event loop is one."""

    def time(self) -> float:
        """Return the time in seconds, from a beginning of its own."""

    def call_later(self, delay: float, callback: Callable[..., Any], *args: Any) -> Timer:
        """Call something after so many seconds."""


class _VirtualTimer:
    def __init__(self, callback: Callable[..., Any], args: tuple[Any, ...]) -> None:
        self.callback: Callable[..., Any] | None = callback
        self.args = args

    def cancel(self) -> None:
        # What it holds on to is let go of, since the timer itself stays in its queue until its time.
        self.callback, self.args = None, ()


class VirtualClock:
    """A clock that stands still until :meth:`advance` moves it, and calls what is due on the way, in order.

    All of it is used on one event loop, which is needed only for what is to be called without delay.

    :param start: what it shows first, in seconds since 1970.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, start: float) -> None:
        self._loop = loop
        self._now = start
        self._queue: list[tuple[float, int, _VirtualTimer]] = []
        self._order = itertools.count()
        self._moving = False

    def time(self) -> float:
        """Return what the clock shows."""
        return self._now

    def call_later(self, delay: float, callback: Callable[..., Any], *args: Any) -> Timer:
        """Call something when the clock has moved on by so many seconds; with 0, without waiting for it."""
        timer = _VirtualTimer(callback, args)
        heapq.heappush(self._queue, (self._now + max(0.0, delay), next(self._order), timer))
        if delay <= 0 and not self._moving:
            self._loop.call_soon(self.advance, 0.0)
        return timer

    def advance(self, seconds: float) -> float:
        """Move the clock on, and return what it shows then.

        :param seconds: by how much, 0 or more.
        :raises SpecError: when it is no number, time would go backwards, or the year 9000 would be reached.
        :raises ClusterStateError: when it is being moved: a callback asks for it.
        """
        if self._moving:
            raise ClusterStateError("the clock is being moved: what it calls on its way cannot move it")
        if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not seconds >= 0:
            raise SpecError(f"a clock is moved on by 0 seconds or more, not by {seconds!r}")
        if not seconds < _END - self._now:
            raise SpecError(f"a clock is not moved on by {seconds!r} seconds: it ends with the year 8999")
        end = self._now + seconds
        self._moving = True
        try:
            while self._queue and self._queue[0][0] <= end:
                when, _, timer = heapq.heappop(self._queue)
                if timer.callback is not None:
                    self._now = max(self._now, when)
                    timer.callback(*timer.args)
        finally:
            self._moving = False
        self._now = end
        return end
