"""What a cluster's nodes print: fetched while they live, and kept where that was asked for."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from urllib.parse import quote, unquote

from yellowdog_ray.errors import RayDogError, TunnelError
from yellowdog_ray.raydog.platform import Platform
from yellowdog_ray.raydog.pools import BuiltPool
from yellowdog_ray.raydog.reach import Reach
from yellowdog_ray.raydog.threads import Threads
from yellowdog_ray.raydog.transport import Operation
from yellowdog_ray.utils._files import write_private

if TYPE_CHECKING:
    from yellowdog_client.model import Task

__all__ = ["KEPT_BYTES", "NodeLog", "collect", "keep", "kept", "tail"]

log = logging.getLogger(__name__)

# How long all of the logs of a pool may take; those that are kept, of all pools together.
_SECONDS = 60.0
_AT_ONCE = 15
# How much of the end of a task's output is kept.
KEPT_BYTES = 10_000_000
_TOO_LATE = f"it did not come within {_SECONDS:.0f} s"
_NO_ACCESS = "it can be read over SSH while the node lives, which needs to be told how to log in"
_ENDED = (
    "its task has ended, and the agent deletes a task's output then; no copy was kept "
    "(keep_logs=... keeps one when a pool is removed or the cluster shut down)"
)


@dataclass(frozen=True)
class NodeLog:
    """What the task of one node has printed.

    :param task: the task's name.
    :param pool: the name of the node's pool in the cluster's status.
    :param text: the end of its output; None where it cannot be had, and ``note`` says why.
    :param source: where it is from: the living ``"node"``, a ``"kept"`` copy, or the ``"platform"``, which
        has the end of the output of tasks that failed (the local platform does).
    :param note: a sentence on what is missing.
    """

    task: str
    pool: str
    text: str | None
    source: Literal["node", "kept", "platform"] | None
    note: str | None = None

    def __str__(self) -> str:
        head = f"==> {self.task} ({self.pool}{f', {self.source}' if self.source else ''}) <=="
        return "\n".join(part for part in (head, self.text, self.note and f"({self.note})") if part)


def collect(
    platform: Platform,
    reach: Reach | None,
    pools: Mapping[str, BuiltPool],
    max_bytes: int,
    *,
    in_a_hurry: bool = False,
) -> Iterator[NodeLog]:
    """Fetch the output of every task of some pools, a few of them at a time.

    Where the head cannot be reached, it is not tried again for the others.

    :param pools: the pools by the names that they go by in the answer.
    :param max_bytes: how much of the end of each.
    :param in_a_hurry: whether a minute is all that there is for all pools, and not for each.
    :raises RayDogError: where the platform cannot be asked for the tasks.
    """
    # Of its own: this takes long, and the platform's are for calls that others wait for.
    threads = Threads(_AT_ONCE, "raydog-logs")
    try:
        yield from _collect(platform, threads, reach, pools, max_bytes, Operation(_SECONDS), in_a_hurry)
    finally:
        threads.close(wait=False)


def _collect(
    platform: Platform,
    threads: Threads,
    reach: Reach | None,
    pools: Mapping[str, BuiltPool],
    max_bytes: int,
    operation: Operation,
    in_a_hurry: bool,
) -> Iterator[NodeLog]:
    unreachable: list[str] = []
    for name, pool in pools.items():
        if pool.group_id is None or pool.id is None:
            continue
        if not in_a_hurry:
            operation = Operation(_SECONDS)
        if operation.expired:
            log.warning("The output of the pool %s was not fetched: there was no time left", pool.plan.name)
            continue
        addresses = {
            node.id: node.details.privateIpAddress
            for node in platform.nodes(pool.id, operation)
            if node.id and node.details is not None
        }
        tasks = iter(platform.tasks(pool.group_id, operation))
        # No more are under way than are held in memory.
        while few := list(islice(tasks, _AT_ONCE)):
            fetching = [
                (
                    task,
                    threads.submit(
                        _Fetch(
                            reach,
                            name,
                            task,
                            addresses.get(task.nodeId or ""),
                            max_bytes,
                            operation,
                            unreachable,
                        )
                    ),
                )
                for task in few
            ]
            for task, future in fetching:
                try:
                    yield future.result(operation.remaining)
                except FutureTimeoutError:
                    future.cancel()
                    yield _missing(name, task, _TOO_LATE)


@dataclass
class _Fetch:
    """One task's output, fetched when it is called.

    :param pool: the name of its pool.
    :param unreachable: why the head could not be reached for another one's, where that was so.
    """

    reach: Reach | None
    pool: str
    task: Task
    address: str | None
    max_bytes: int
    operation: Operation
    unreachable: list[str]

    def __call__(self) -> NodeLog:
        pool, task = self.pool, self.task
        if self.operation.expired:
            return _missing(pool, task, _TOO_LATE)
        if task.status is not None and task.status.finished:
            text = tail(task)
            if text is None:
                return _missing(pool, task, _ENDED)
            return NodeLog(str(task.name), pool, text, "platform")
        if self.address is None:
            return _missing(pool, task, f"its task is {task.status}: it has printed nothing yet")
        if self.reach is None:
            return _missing(pool, task, _NO_ACCESS)
        if self.unreachable:
            return _missing(pool, task, self.unreachable[0])
        try:
            text = self.reach.task_output(self.address, str(task.id), self.max_bytes)
        except (RayDogError, OSError) as error:
            if isinstance(error, TunnelError) and not self.reach.connected:
                self.unreachable.append(str(error))
            return _missing(pool, task, str(error))
        return NodeLog(str(task.name), pool, text, "node")


def tail(task: Task) -> str | None:
    """Tell the end of a failed task's output, where the platform has it."""
    texts = [error.error for error in task.errors or [] if error.error and "\n" in error.error]
    return texts[-1] if texts else None


def _missing(pool: str, task: Task, note: str) -> NodeLog:
    return NodeLog(str(task.name), pool, None, None, note)


def keep(directory: Path, logs: Iterable[NodeLog]) -> None:
    """Write what has been fetched into files, one for each task, in a directory for each pool.

    What cannot be had or written is only logged, once for each reason.
    """
    missing: dict[str | None, list[str]] = {}
    for found in logs:
        if found.text is None:
            missing.setdefault(found.note, []).append(found.task)
            continue
        try:
            place = directory / quote(found.pool, safe="")
            place.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_private(place / f"{found.task}.log", found.text)
        except OSError as error:
            log.warning("The output of %s could not be kept in %s: %s", found.task, directory, error)
    for note, tasks in missing.items():
        more = f" and {len(tasks) - 3} others" if len(tasks) > 3 else ""
        log.warning("The output of %s%s was not kept: %s", ", ".join(tasks[:3]), more, note)


def kept(directory: Path, since: datetime | None) -> dict[str, NodeLog]:
    """Read what was kept, by the tasks' names.

    :param since: when the cluster was built: what is older is an earlier one's of the same name.
    """
    return {
        path.stem: NodeLog(
            path.stem, unquote(path.parent.name), path.read_text("utf-8", errors="replace"), "kept"
        )
        for path in sorted(directory.glob("*/*.log"))
        if since is None or path.stat().st_mtime >= since.timestamp()
    }
