"""What a platform remembers beyond its end: a file of all that it has known, shown again by the next one.

The file is a SQLite database with one table: a row for each thing, as JSON, with the id of the requirement
that it belongs to. It is written by a thread of its own, at most every half second, and never keeps the
platform from working: a file that is damaged or of another version is put aside, and what cannot be written
is only logged, and tried again.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import queue
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from yellowdog_ray.local.entities import (
    ComputeRequirement,
    Instance,
    Node,
    Pool,
    Task,
    TaskError,
    TaskGroup,
    WorkRequirement,
)
from yellowdog_ray.local.records import KINDS, Thing, kind_of, read, write

if TYPE_CHECKING:
    from yellowdog_ray.local.scheduler import Scheduler

__all__ = ["KEEP_DAYS", "KEEP_TASKS", "VERSION", "WAS_KILLED", "WAS_STOPPED", "History", "conclude", "forget"]

_log = logging.getLogger(__name__)

VERSION = 2
"""The version of the file's form; a file of another one is put aside."""
KEEP_TASKS = 10_000
"""How many tasks, and how many machines, are remembered at a start."""
KEEP_DAYS = 30
"""For how many days after its last change something is remembered."""
WAS_KILLED = "The local platform was killed, or crashed, while this was live"
WAS_STOPPED = "The local platform was stopped while this was live"

_PAUSE = 0.5
# How many things are written on the platform's loop at a time: a few milliseconds' worth.
_AT_ONCE = 300
_PAUSE_WITHIN = 0.02
_CLOSE_SECONDS = 10.0
# When what could not be written is tried again, where nothing else is to be written before.
_AGAIN_SECONDS = 5.0
_NAMESPACES = "namespaces"
# What there may be very many of in a requirement of each kind.
_MANY = {"work": "task", "compute": "instance"}

_Row = tuple[str, str, str, float, str]


def forget(path: Path) -> None:
    """Remove a history, and all that was put aside of it; no platform may be using it."""
    for file in path.parent.glob(f"{path.name}*"):
        file.unlink()


class History:
    """The file of one platform.

    :meth:`load` it into a scheduler that is new, then :meth:`follow` that scheduler, and :meth:`close` it.

    :param path: the file; it is made, for this user only, where there is none.
    :param now: the time in seconds since 1970.
    """

    def __init__(self, path: Path, now: float | None = None) -> None:
        self._path = path
        self._now = time.time() if now is None else now
        self._scheduler: Scheduler | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._armed = False
        self._namespaces = ""
        self._problem = ""
        self._rows: queue.SimpleQueue[list[_Row] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._database: sqlite3.Connection | None = None
        try:
            self._database = self._open()
        except (sqlite3.OperationalError, OSError) as error:
            # Such as a full disk; the file itself may be all right.
            _log.warning("The history %s cannot be used now, and nothing is remembered: %s", path, error)
        except (sqlite3.DatabaseError, ValueError) as error:
            self._put_aside(error)

    # The file

    def _open(self) -> sqlite3.Connection:
        os.close(os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        # The thread that opens it is not the one that writes to it; no two use it at once.
        database = sqlite3.connect(self._path, timeout=5, isolation_level=None, check_same_thread=False)
        try:
            version, tables = (
                database.execute(question).fetchone()[0]
                for question in ("PRAGMA user_version", "SELECT count(*) FROM sqlite_master")
            )
            if version != VERSION and (version or tables):
                raise ValueError(f"it is of version {version}, and not of {VERSION}")
            found = database.execute("PRAGMA quick_check(1)").fetchone()[0]
            if found != "ok":
                raise ValueError(found)
            database.execute("PRAGMA journal_mode = WAL")
            # What a loss of power takes is the last moments; never the file.
            database.execute("PRAGMA synchronous = NORMAL")
            database.execute(
                "CREATE TABLE IF NOT EXISTS things (kind TEXT NOT NULL, id TEXT NOT NULL, "
                "root TEXT NOT NULL, updated REAL NOT NULL, json TEXT NOT NULL, PRIMARY KEY (kind, id))"
            )
            database.execute(f"PRAGMA user_version = {VERSION}")
        except BaseException:
            database.close()
            raise
        return database

    def _put_aside(self, error: Exception) -> None:
        """Begin anew, and leave a file that cannot be read to whoever wants to look into it."""
        aside = self._path.with_name(f"{self._path.name}.aside-{time.strftime('%Y%m%dT%H%M%S')}")
        for ending in ("", "-wal", "-shm"):
            with contextlib.suppress(OSError):
                os.replace(f"{self._path}{ending}", f"{aside}{ending}")
        _log.warning("The history %s cannot be read (%s); it was put aside as %s", self._path, error, aside)
        self._database = None
        try:
            self._database = self._open()
        except (sqlite3.Error, ValueError, OSError) as problem:
            _log.warning("No history can be kept in %s: %s", self._path, problem)

    # Reading

    def load(self, scheduler: Scheduler) -> None:
        """Give a scheduler all that is remembered; what was live when it was last written has ended.

        What is too old, or too much, is forgotten before it is looked at. A row that makes no sense is passed
        over.
        """
        if self._database is None:
            return
        try:
            kept = self._prune(self._database)
            rows = [
                (kind, its_id, text)
                for kind, its_id, root, text in self._database.execute(
                    "SELECT kind, id, root, json FROM things ORDER BY rowid"
                )
                if root in kept
            ]
        except sqlite3.Error as error:
            self._database.close()
            self._put_aside(error)
            return
        things, odd = _read_all(rows)
        if odd:
            _log.warning("%d entries of the history %s make no sense, and are forgotten", odd, self._path)
        changed = conclude(things.values(), self._now, WAS_KILLED)
        for each in things.values():
            if isinstance(each, (WorkRequirement, TaskGroup, Task)):
                scheduler.remember_work(each)
            else:
                scheduler.remember_machines(each)
        for kind, _, text in rows:
            if kind == _NAMESPACES:
                scheduler.namespaces |= _namespaces(text)
                self._namespaces = text
        gone = [row[:2] for row in rows if row[:2] not in things and row[0] != _NAMESPACES]
        with self._attempt("pruned"), _transaction(self._database):
            self._database.executemany("DELETE FROM things WHERE kind = ? AND id = ?", gone)
        self._rows.put([_row(thing, self._now) for thing in changed])

    def _prune(self, database: sqlite3.Connection) -> set[str]:
        """Forget what is too old or too much, whole requirements at a time, and return those that stay.

        The newest stays; where it is too much by itself, the newest of its tasks or machines do.
        """
        sizes: dict[str, int] = dict(
            database.execute(
                "SELECT root, count(*) FROM things WHERE kind IN ('task', 'instance') GROUP BY root"
            )
        )
        # What belongs to none has no root.
        kept, newest = {""}, []
        for kind, many in _MANY.items():
            count = 0
            for root, updated, text in database.execute(
                "SELECT id, updated, json FROM things WHERE kind = ? ORDER BY updated DESC, rowid DESC",
                (kind,),
            ):
                if count == 0:
                    newest.append((many, root))
                elif count + sizes.get(root, 1) > KEEP_TASKS:
                    break
                count += sizes.get(root, 1)
                if updated >= self._now - KEEP_DAYS * 86400 or _lives(text):
                    kept.add(root)
        with self._attempt("pruned"), _transaction(database):
            database.execute(
                "DELETE FROM things WHERE root NOT IN (SELECT value FROM json_each(?))",
                (json.dumps(list(kept)),),
            )
            for kind, root in newest:
                database.execute(
                    "DELETE FROM things WHERE kind = ?1 AND root = ?2 AND rowid < (SELECT rowid FROM things "
                    "WHERE kind = ?1 AND root = ?2 ORDER BY rowid DESC LIMIT 1 OFFSET ?3)",
                    (kind, root, KEEP_TASKS - 1),
                )
            database.execute(
                "DELETE FROM things WHERE kind = 'node' AND json_valid(json) AND json_extract(json, "
                "'$.instance') NOT IN (SELECT id FROM things WHERE kind = 'instance')"
            )
        return kept

    # Writing

    def follow(self, scheduler: Scheduler, loop: asyncio.AbstractEventLoop) -> None:
        """Write down what changes in a scheduler from now on; call :meth:`changed` after each change.

        :param loop: the loop on which the scheduler is touched.
        """
        if self._database is None:
            return
        self._scheduler, self._loop = scheduler, loop
        scheduler.unsaved = {}
        self._thread = threading.Thread(
            target=self._write_all, args=(self._database,), name="raydog-history", daemon=True
        )
        self._thread.start()

    def changed(self) -> None:
        """Have what has changed written down, soon."""
        if self._loop is not None and not self._armed:
            self._armed = True
            self._loop.call_later(_PAUSE, self._save)

    def _save(self) -> None:
        self._armed = False
        self._take(_AT_ONCE)
        if self._scheduler is not None and self._scheduler.unsaved and self._loop is not None:
            self._armed = True
            self._loop.call_later(_PAUSE_WITHIN, self._save)

    def _take(self, count: int) -> None:
        """Hand what has changed over to the thread that writes."""
        scheduler = self._scheduler
        if scheduler is None or scheduler.unsaved is None:
            return
        unsaved, now = scheduler.unsaved, time.time()
        rows = []
        for thing in list(unsaved)[:count]:
            del unsaved[thing]
            rows.append(_row(thing, now))
        namespaces = json.dumps(sorted(scheduler.namespaces))
        if namespaces != self._namespaces:
            self._namespaces = namespaces
            rows.append((_NAMESPACES, "", "", now, namespaces))
        if rows:
            self._rows.put(rows)

    def close(self) -> None:
        """Write down that all has ended, wait until that is done, and close the file.

        The scheduler must not be used any more.
        """
        if self._scheduler is not None and self._scheduler.unsaved is not None:
            for thing in conclude(_all_of(self._scheduler), time.time(), WAS_STOPPED):
                self._scheduler.unsaved[thing] = None
            self._take(len(self._scheduler.unsaved))
        self._scheduler = self._loop = None
        self._rows.put(None)
        if self._thread is not None:
            self._thread.join(_CLOSE_SECONDS)
        elif self._database is not None:
            self._database.close()

    def _write_all(self, database: sqlite3.Connection) -> None:
        waiting: dict[tuple[str, str], _Row] = {}
        more = True
        while more:
            try:
                batch = self._rows.get(timeout=_AGAIN_SECONDS if waiting else None)
            except queue.Empty:
                batch = []
            more = batch is not None
            waiting.update({row[:2]: row for row in batch or ()})
            with self._attempt("written"):
                with _transaction(database):
                    database.executemany(
                        "INSERT INTO things VALUES (?, ?, ?, ?, ?) ON CONFLICT (kind, id) DO "
                        "UPDATE SET root = excluded.root, updated = excluded.updated, json = excluded.json",
                        list(waiting.values()),
                    )
                # Only here it is in the file; what is not goes with the next.
                waiting.clear()
        database.close()

    @contextlib.contextmanager
    def _attempt(self, what: str) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            # A disk that stays full is worth one line, not one every few seconds.
            level = logging.DEBUG if self._problem == str(error) else logging.WARNING
            _log.log(level, "The history %s could not be %s: %s", self._path, what, error)
            self._problem = str(error)
        else:
            self._problem = ""


@contextlib.contextmanager
def _transaction(database: sqlite3.Connection) -> Iterator[None]:
    database.execute("BEGIN IMMEDIATE")
    try:
        yield
        database.execute("COMMIT")
    finally:
        # A commit that fails may leave it open, and SQLite may have taken it back by itself.
        if database.in_transaction:
            database.execute("ROLLBACK")


def _row(thing: Thing, now: float) -> _Row:
    return (*_name_of(thing), _root(thing).id, now, json.dumps(write(thing), separators=(",", ":")))


def _name_of(thing: Thing) -> tuple[str, str]:
    return kind_of(thing).name, thing.id


def _read_all(rows: Iterable[tuple[str, str, str]]) -> tuple[dict[tuple[str, str], Thing], int]:
    """Read all things, and count the rows that are none."""
    things: dict[tuple[str, str], Thing] = {}

    def find(kind: str, its_id: str) -> Thing:
        return things[kind, its_id]

    odd = 0
    by_kind: dict[str, list[tuple[str, str]]] = {name: [] for name in KINDS}
    for kind, its_id, text in rows:
        if kind in by_kind:
            by_kind[kind].append((its_id, text))
        elif kind != _NAMESPACES:
            odd += 1
    for kind, texts in by_kind.items():
        for its_id, text in texts:
            try:
                thing = read(KINDS[kind], json.loads(text), find)
                if thing.id != its_id:
                    raise ValueError(f"{thing.id} in place of {its_id}")
                things[kind, its_id] = thing
            except (ValueError, TypeError, RecursionError):
                odd += 1
    return things, odd


def _namespaces(text: str) -> set[str]:
    try:
        return {name for name in json.loads(text) if isinstance(name, str)}
    except (ValueError, TypeError, RecursionError):
        return set()


def _lives(text: str) -> bool:
    """Tell whether a requirement had not ended when it was last written."""
    try:
        return json.loads(text)["status"] not in ("TERMINATED", "COMPLETED", "FAILED", "CANCELLED")
    except (ValueError, TypeError, KeyError, RecursionError):
        return False


def _all_of(scheduler: Scheduler) -> list[Thing]:
    return [
        *scheduler.requirements.values(),
        *scheduler.pools.values(),
        *scheduler.instances.values(),
        *scheduler.nodes.values(),
        *scheduler.works.values(),
        *scheduler.groups.values(),
        *scheduler.tasks.values(),
    ]


def conclude(things: Iterable[Thing], now: float, why: str) -> list[Thing]:
    """Say of all that has not ended that it has now, and return what that is.

    No life cycle is followed, and nothing is counted: it is for what no scheduler looks after.

    :param why: what happened, where a client can read it.
    """
    ended = []
    for thing in things:
        if isinstance(thing, Task):
            live = _conclude_task(thing, now, why)
        elif isinstance(thing, (TaskGroup, WorkRequirement)):
            live = thing.status not in ("COMPLETED", "FAILED", "CANCELLED")
            if live:
                thing.status, thing.changed = "CANCELLED", now
        elif isinstance(thing, Node):
            live = thing.status in ("RUNNING", "DEREGISTERED")
            if live:
                thing.status, thing.changed = "TERMINATED", now
                thing.deregistered = thing.deregistered or now
            for worker in thing.workers:
                if worker.status in ("STOPPED", "RUNNING"):
                    worker.status, live = "SHUTDOWN", True
        else:
            live = thing.status != "TERMINATED"
            if live:
                thing.status, thing.changed = "TERMINATED", now
                _explain(thing, now, why)
        if live:
            ended.append(thing)
    return ended


def _explain(thing: ComputeRequirement | Pool | Instance, now: float, why: str) -> None:
    if isinstance(thing, Instance):
        thing.reason = thing.reason or why
        return
    thing.updated = now
    if isinstance(thing, ComputeRequirement):
        if thing.source_status != "ERRORED":
            thing.source_status = "INACTIVE"
        thing.source_message = f"{thing.source_message}. {why}" if thing.source_message else why


def _conclude_task(task: Task, now: float, why: str) -> bool:
    if task.status in ("PENDING", "READY"):
        status = "CANCELLED"
    elif task.status in ("ALLOCATED", "EXECUTING"):
        status = "ABORTED"
    else:
        return False
    task.errors.append(
        TaskError(now, why, "ALLOCATION_LOST", task.status, task.node_id, task.worker_id, None, True)
    )
    task.status, task.finished = status, now
    return True


def _root(thing: Thing) -> ComputeRequirement | WorkRequirement:
    if isinstance(thing, Task):
        return thing.group.work
    if isinstance(thing, TaskGroup):
        return thing.work
    if isinstance(thing, Node):
        return thing.pool.requirement
    if isinstance(thing, (Pool, Instance)):
        return thing.requirement
    return thing
