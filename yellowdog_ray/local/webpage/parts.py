"""What a page consists of: facts, tables and texts. Nothing in it is HTML; the template makes that."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Protocol, TypeVar

__all__ = [
    "ROWS",
    "Ask",
    "Cell",
    "Page",
    "Pager",
    "Table",
    "counted",
    "listing",
    "span",
    "status",
    "utc",
    "when",
]

ROWS = 100
"""How many rows of a table are shown at a time."""

_NOTHING_FOUND = "Nothing matches. Take the filter back to see all."
_GOOD = frozenset(["COMPLETED", "RUNNING", "EXECUTING", "IDLE", "ACTIVE"])
_BAD = frozenset(["FAILED", "FAILING", "LOST", "ERRORED", "ABORTED"])


@dataclass(frozen=True)
class Cell:
    """A piece of text.

    :param href: where it leads.
    :param tone: ``"good"``, ``"bad"`` or ``"plain"`` for a status, else None.
    :param time: the same as a machine reads it, for a point in time.
    :param kind: ``"text"``, or ``"lines"`` for text in which line breaks count.
    """

    text: str
    href: str | None = None
    tone: str | None = None
    time: str | None = None
    kind: str = "text"


@dataclass(frozen=True)
class Pager:
    """Which part of a table is shown, and what it was chosen by.

    :param total: how many rows there are; None where that is not counted.
    :param statuses: how many things have which status, of those that could be chosen from.
    """

    page: int
    more: bool
    total: int | None
    action: str = ""
    find: str = ""
    status: str = ""
    statuses: Mapping[str, int] = field(default_factory=dict)
    filters: bool = True


@dataclass(frozen=True)
class Table:
    """A table with a heading.

    :param keys: what each row is known by when the page is brought up to date.
    :param empty: what is said where there is no row.
    """

    heading: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    keys: Sequence[str]
    empty: str
    pager: Pager | None = None
    more: Cell | None = None


@dataclass(frozen=True)
class Page:
    """A page below its heading.

    :param section: the entry of the navigation that it belongs to.
    :param crumbs: what it is a part of.
    :param texts: headings and texts that keep their line breaks.
    :param version: changes with what the platform's revision does not tell of.
    """

    title: str
    section: str
    crumbs: Sequence[Cell] = ()
    facts: Sequence[tuple[str, Cell]] = ()
    tables: Sequence[Table] = ()
    texts: Sequence[tuple[str, str]] = ()
    notes: Sequence[str] = ()
    version: str = ""


@dataclass(frozen=True)
class Ask:
    """What a request asks for.

    :param id: the thing that it is about.
    :param page: the part of its table, from 1.
    :param find: a text that names must contain.
    :param status: the status that things must have.
    """

    id: str = ""
    page: int = 1
    find: str = ""
    status: str = ""


class _Thing(Protocol):
    @property
    def id(self) -> str: ...

    @property
    def status(self) -> str: ...


T = TypeVar("T", bound=_Thing)


def listing(
    ask: Ask,
    action: str,
    things: Collection[T],
    name: Callable[[T], str],
    columns: Sequence[str],
    row: Callable[[T], Sequence[Cell]],
    *,
    empty: str = _NOTHING_FOUND,
    heading: str = "Newest first",
    newest_first: bool = True,
) -> Table:
    """Show those things that a page asks for, each in a row.

    :param action: the address of the page.
    :param things: all, the oldest first.
    :param name: gives what ``find`` looks into.
    :param row: gives the cells of a thing, one for each column.
    :param empty: what is said where there is no thing at all.
    """
    chosen, pager = _choose(ask, action, things, name, newest_first)
    rows = [row(each) for each in chosen]
    return Table(
        heading, columns, rows, [each.id for each in chosen], _NOTHING_FOUND if things else empty, pager
    )


def _choose(
    ask: Ask, action: str, things: Iterable[T], name: Callable[[T], str], newest_first: bool
) -> tuple[list[T], Pager]:
    """Choose the things of one page out of all, by status, name and page."""
    everything = list(things)
    statuses = Counter(thing.status for thing in everything)
    if ask.status:
        everything = [thing for thing in everything if thing.status == ask.status]
    if ask.find:
        wanted = ask.find.casefold()
        everything = [thing for thing in everything if wanted in name(thing).casefold()]
    if newest_first:
        everything.reverse()
    start = (ask.page - 1) * ROWS
    pager = Pager(
        ask.page,
        start + ROWS < len(everything),
        len(everything),
        action,
        ask.find,
        ask.status,
        dict(sorted(statuses.items())),
    )
    return everything[start : start + ROWS], pager


def status(value: str) -> Cell:
    """Show a status."""
    return Cell(value, tone="good" if value in _GOOD else "bad" if value in _BAD else "plain")


def utc(seconds: float) -> str:
    """Write a time in seconds since 1970 for people."""
    return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%d %H:%M:%S")


def when(seconds: float | None) -> Cell:
    """Show a point in time, or that there is none."""
    if seconds is None:
        return Cell("–")  # noqa: RUF001 - a dash is meant
    return Cell(utc(seconds), time=utc(seconds).replace(" ", "T") + "Z")


def span(begin: float | None, end: float | None) -> Cell:
    """Show how long something took; it is empty while it is not over."""
    if begin is None or end is None:
        return Cell("")
    seconds = max(0.0, end - begin)
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return Cell(f"{hours} h {minutes:02} min")
    return Cell(f"{minutes} min {rest:02} s" if minutes else f"{seconds:.1f} s")


def counted(counts: Mapping[str, int]) -> Cell:
    """Show how many things have which status."""
    parts = [f"{count:,} {each}" for each, count in sorted(counts.items()) if count]
    return Cell(", ".join(parts) or "none")
