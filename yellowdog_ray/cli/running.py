"""Working on several state files at once, and being interrupted while at it."""

from __future__ import annotations

import queue
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from types import FrameType, TracebackType
from typing import Any, TypeVar

__all__ = ["Interrupts", "in_parallel"]

_T = TypeVar("_T")
_R = TypeVar("_R")

_THREADS = 4


class Interrupts:
    """SIGINT and SIGTERM as something to wait for, so that nothing is left half written.

    It is a context manager. The first signal is noted; a second one acts as it did before. Signals that this
    process ignores stay ignored, and outside the main thread there are none.
    """

    def __init__(self) -> None:
        #: The signal that came; None as long as none has.
        self.number: int | None = None
        #: Where something waits, it is woken by None.
        self.events: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._restore()
        self.number = number
        # The one kind of queue that a signal handler may put something into.
        self.events.put(None)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()


def in_parallel(
    items: Sequence[_T], work: Callable[[_T], _R], interrupts: Interrupts
) -> Iterator[tuple[_T, _R]]:
    """Work on several things at once, and give each with its result, in the order in which they are done.

    It ends early where there is an interrupt. What is under way then goes on in threads that do not keep the
    process alive; nothing more is begun.

    :param work: it must raise nothing.
    """
    waiting: queue.SimpleQueue[_T] = queue.SimpleQueue()
    for item in items:
        waiting.put(item)
    done = interrupts.events

    def run() -> None:
        while interrupts.number is None:
            try:
                item = waiting.get_nowait()
            except queue.Empty:
                return
            done.put((item, work(item)))

    if interrupts.number is None:
        for _ in range(min(_THREADS, len(items))):
            threading.Thread(target=run, name="raydog-command", daemon=True).start()
    for _ in items:
        if interrupts.number is not None:
            return
        found = done.get()
        if found is None:
            return
        yield found
