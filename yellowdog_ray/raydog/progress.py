"""What a cluster is doing, shown in a terminal while it lasts.

A display is fed with the cluster's events. It needs the ``rich`` package only when there is something to
show, so that importing this module costs nothing.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import sys
import threading
import time
import weakref
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TextIO, cast

from yellowdog_ray.raydog.events import (
    BuildFailed,
    BuildFinished,
    BuildStarted,
    CallRetried,
    Event,
    HeadFailed,
    NodeRegistered,
    PoolAdded,
    PoolProvisioned,
    PoolRemoved,
    PoolScaled,
    RollbackStarted,
    ShutdownFailed,
    ShutdownFinished,
    ShutdownStarted,
    TaskExecuting,
    TasksSubmitted,
    Waiting,
    WorkersCounted,
    WorkRequirementAdded,
)
from yellowdog_ray.raydog.status import one_line

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.live import Live
    from rich.spinner import Spinner

__all__ = ["ProgressDisplay", "progress_display"]

log = logging.getLogger(__name__)

_REFRESHES_A_SECOND = 8
_BAR_WIDTH = 20


def progress_display(wanted: bool | None, stream: TextIO | None = None) -> ProgressDisplay | None:
    """Make a display, where one is wanted.

    :param wanted: True for always, False for never; None for where a person is looking on: the stream is a
        terminal that can be drawn upon, and neither a notebook's nor a CI job's (the variable ``CI``), and
        ``RAYDOG_PROGRESS`` is not ``0``.
    :param stream: where it is shown; None for the standard error stream.
    """
    stream = sys.stderr if stream is None else stream
    if wanted is None:
        wanted = (
            _can_be_drawn_upon(stream)
            and os.environ.get("CI", "").lower() in ("", "0", "false")
            and os.environ.get("RAYDOG_PROGRESS") != "0"
        )
    return ProgressDisplay(stream) if wanted else None


def _can_be_drawn_upon(stream: TextIO | None) -> bool:
    try:
        # There is no stream at all in a process without a console, and a closed one says ValueError.
        terminal = stream is not None and stream.isatty()
    except (AttributeError, ValueError):
        return False
    return terminal and os.environ.get("TERM", "").lower() not in ("dumb", "unknown") and not _in_notebook()


def _in_notebook() -> bool:
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return getattr(shell, "kernel", None) is not None


@dataclass(eq=False)
class _Row:
    """A line of the display: something that a cluster is doing.

    :param title: what is done.
    :param unit: what ``done`` of ``total`` counts; there is a bar where there is a total.
    :param detail: what is happening just now.
    :param dim: whether the detail is shown dimmed.
    """

    title: str
    unit: str = ""
    done: int = 0
    total: int = 0
    detail: str = ""
    dim: bool = False
    started: float = field(default_factory=time.monotonic)


class ProgressDisplay:
    """Shows what a cluster is doing, as the events come in: a line with a spinner for each thing.

    The lines come when a build, an addition, a wait for workers, a roll-back or a shut-down begins, and are
    gone when it ends; a sentence that says how it ended stays. Some endings have no event of their own, such
    as a wait that runs out of time: call :meth:`close` after whatever has been shown. The display can be
    used again after that.

    Several displays share a terminal. Where the stream is no terminal, each event is one plain line. It may
    be called from several threads, and its own faults are nobody else's: it raises nothing.

    :param stream: where it is shown; None for the standard error stream.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        stream = sys.stderr if stream is None else stream
        self._screen = _screen(stream)
        self._rows: dict[str, _Row] = {}
        self._drawn = _can_be_drawn_upon(stream)

    def __call__(self, event: Event) -> None:
        """Show an event."""
        try:
            with _lock:
                if self._drawn:
                    self._show(event)
                else:
                    self._screen.say(str(event))
        except Exception:
            log.debug("The progress could not be shown", exc_info=True)

    def close(self) -> None:
        """Remove what is shown. The next thing that begins is shown again."""
        try:
            with _lock:
                self._end(*self._rows)
        except Exception:
            log.debug("The progress display could not be removed", exc_info=True)

    def _show(self, event: Event) -> None:
        match event:
            case BuildStarted():
                self._end(*self._rows)
                self._begin("build", _Row(f"Building {event.cluster}", "pools", total=len(event.pools)))
            case PoolProvisioned():
                if "build" in self._rows:
                    self._rows["build"].done += 1
                if self._rows.keys() & {"build", "rollback", "shutdown"}:
                    self._detail(str(event))
                else:
                    # Nothing announces an addition.
                    self._begin(f"add {event.pool}", _Row(f"Adding {event.pool} to {event.cluster}"))
            case WorkersCounted() if event.have < event.want:
                row = self._rows.get("wait") or _Row(f"Waiting for the workers of {event.cluster}")
                row.unit = "workers" if event.source == "tasks" else "workers in Ray"
                row.done, row.total = event.have, event.want
                if "wait" not in self._rows:
                    self._begin("wait", row)
            case WorkersCounted():
                self._end("wait")
            case RollbackStarted():
                # Workers may be waited for at the same time, by another thread.
                self._end(*(key for key in self._rows if key != "wait"))
                self._begin("rollback", _Row(f"Taking back {event.cluster}", detail=event.reason, dim=True))
            case ShutdownStarted():
                self._end(*self._rows)
                self._begin("shutdown", _Row(f"Shutting {event.cluster} down"))
            case BuildFinished() | BuildFailed() | ShutdownFinished() | ShutdownFailed() | HeadFailed():
                self._end(*self._rows)
                self._screen.say(str(event))
            case PoolAdded() | PoolRemoved() | PoolScaled():
                self._end(f"add {event.pool}")
                self._screen.say(str(event))
            case Waiting():
                # It is the display that counts the seconds.
                self._detail(f"Waiting for {event.what}")
            case CallRetried():
                self._detail(str(event), dim=True)
            case WorkRequirementAdded() | NodeRegistered() | TasksSubmitted() | TaskExecuting():
                self._detail(str(event))

    def _begin(self, key: str, row: _Row) -> None:
        self._end(key)
        self._rows[key] = row
        self._screen.add(row)

    def _detail(self, text: str, dim: bool = False) -> None:
        # Where two things are done at once, nothing says which of them an event belongs to.
        for row in list(self._rows.values())[-1:]:
            row.detail, row.dim = text, dim

    def _end(self, *keys: str) -> None:
        self._screen.remove([self._rows.pop(key) for key in keys if key in self._rows])


# Guards everything below; reentrant, for a signal handler may shut a cluster down.
_lock = threading.RLock()
# Those that are showing something, which are held by nothing else when their clusters are forgotten.
_showing: set[_Screen] = set()
_screens: weakref.WeakValueDictionary[int, _Screen] = weakref.WeakValueDictionary()


def _screen(stream: TextIO) -> _Screen:
    """Find the one screen of a stream."""
    with _lock:
        found = _screens.get(id(stream))
        if found is None:
            found = _screens[id(stream)] = _Screen(stream)
        return found


@atexit.register
def _close_all() -> None:
    """Leave the terminal as it was: a thread that draws while the interpreter ends could abort it."""
    with contextlib.suppress(Exception):
        for screen in list(_showing):
            screen.remove(list(screen.rows))


class _Screen:
    """A terminal: the rows of all displays that are shown on it.

    It keeps its stream, so that the stream's ``id`` names no other one while it lives.
    """

    def __init__(self, stream: TextIO) -> None:
        self.rows: list[_Row] = []
        self._stream = _Forgiving(stream)
        self._live: Live | None = None
        self._spinner: Spinner | None = None

    def add(self, row: _Row) -> None:
        with _lock:
            self.rows = [*self.rows, row]
            if self._live is None:
                self._start()

    def remove(self, rows: list[_Row]) -> None:
        with _lock:
            left = [row for row in self.rows if row not in rows]
            try:
                if self._live is not None and not left:
                    self._live.stop()
            finally:
                self.rows = left
                if not left:
                    self._live = None
                    _showing.discard(self)

    def say(self, sentence: str) -> None:
        """Write a line that stays."""
        line = " ".join(filter(None, map(one_line, sentence.splitlines())))
        with _lock:
            if self._live is None:
                self._stream.write(f"{line}\n")
                self._stream.flush()
            else:
                from rich.text import Text

                self._live.console.print(Text(line), soft_wrap=True)

    def _start(self) -> None:
        from rich.console import Console
        from rich.live import Live
        from rich.spinner import Spinner

        # It is decided that the stream is drawn upon; variables such as FORCE_COLOR must not undo it.
        console = Console(
            file=cast("TextIO", self._stream),
            force_terminal=True,
            force_interactive=True,
            force_jupyter=False,
        )
        # The cursor stays visible, so that it still is when this process is killed.
        console.show_cursor = lambda show=True: False  # type: ignore[method-assign]
        self._spinner = Spinner("dots" if console.encoding.startswith("utf") else "line")
        self._live = Live(
            console=console,
            get_renderable=self._paint,
            refresh_per_second=_REFRESHES_A_SECOND,
            transient=True,
            # What others write to the standard streams goes there, and nowhere else.
            redirect_stdout=False,
            redirect_stderr=False,
        )
        _showing.add(self)
        self._live.start(refresh=True)

    def _paint(self) -> RenderableType:
        # In rich's own thread, which holds a lock of rich: taking ours here could deadlock.
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        rows = self.rows
        grid = Table.grid(padding=(0, 1), expand=True)
        grid.add_column(width=1)
        grid.add_column(no_wrap=True)
        if any(row.total for row in rows):
            grid.add_column(width=_BAR_WIDTH)
            grid.add_column(no_wrap=True)
        grid.add_column(no_wrap=True)
        grid.add_column(no_wrap=True, ratio=1)
        for row in rows:
            cells: list[RenderableType | None] = [self._spinner, Text(one_line(row.title))]
            if row.total:
                bar = ProgressBar(row.total, min(row.done, row.total), width=_BAR_WIDTH)
                cells += [bar, Text(f"{row.done}/{row.total} {row.unit}")]
            elif len(grid.columns) > 4:
                cells += [None, None]
            cells.append(Text(str(timedelta(seconds=int(time.monotonic() - row.started)))))
            cells.append(Text(one_line(row.detail), style="dim" if row.dim else ""))
            grid.add_row(*cells)
        return grid


class _Forgiving:
    """A stream that it does no harm to write to after it was closed, in rich's own thread above all."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
