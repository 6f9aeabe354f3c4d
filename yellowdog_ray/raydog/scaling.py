"""Giving a worker pool of a running cluster another number of nodes."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from yellowdog_ray.errors import ClusterStateError, PlatformError, TeardownError
from yellowdog_ray.raydog import plan
from yellowdog_ray.raydog.assembly import Assembly
from yellowdog_ray.raydog.pools import BuiltPool, staying, unfinished_tasks
from yellowdog_ray.raydog.transport import Operation, already_gone
from yellowdog_ray.raydog.undo import add_note, cancel_all

if TYPE_CHECKING:
    from yellowdog_client.model import Task

__all__ = ["scale"]

log = logging.getLogger(__name__)


def scale(assembly: Assembly, pool: BuiltPool, count: int, operation: Operation) -> None:
    """Bring a pool to so many nodes: those with a task that has not ended count.

    It returns when the tasks are submitted, or the nodes that are too many have been told to go. Where
    adding fails, what was added is taken back.

    :raises RayDogError: what went wrong.
    """
    unfinished = unfinished_tasks(assembly.platform, pool, operation)
    # Those that are being aborted, perhaps since it was scaled down a moment ago, are not to be relied on.
    kept = staying(unfinished)
    if count > len(kept):
        before = pool.node_count
        try:
            _grow(assembly, pool, count, count - len(kept), operation)
        except BaseException as error:
            _take_back(assembly, pool, {task.id for task in unfinished}, before, error)
            raise
    else:
        # There may be idle nodes, of tasks that have ended.
        _shrink(assembly, pool, kept, count, operation)


def _grow(assembly: Assembly, pool: BuiltPool, count: int, more: int, operation: Operation) -> None:
    # The names are given away before they are used, so that no other process uses them too.
    first = assembly.reserve_tasks(pool, more) + 1
    if not _resize(assembly, pool, count, operation):
        # Tasks of a pool that has ended, perhaps removed meanwhile, would wait for ever.
        status = assembly.platform.pool(str(pool.id), operation).status
        if status is not None and status.finished:
            name = pool.plan.internal_name
            raise ClusterStateError(f"the worker pool {name!r} cannot be scaled: it is {status}")
    for batch in plan.task_batches(pool.plan, assembly.variables(pool), first, more):
        assembly.platform.add_tasks(str(pool.group_id), batch, operation)
    _set_count(assembly, pool, count)


def _shrink(assembly: Assembly, pool: BuiltPool, kept: list[Task], count: int, operation: Operation) -> None:
    """End the tasks that are too many and give their nodes back; those that run nothing yet go first."""
    newest_first = sorted(kept, key=lambda task: task.name or "", reverse=True)
    newest_first.sort(key=lambda task: task.status is not None and task.status.name == "EXECUTING")
    leaving = newest_first[: len(kept) - count]
    _end(assembly, pool, leaving, count, operation)
    _set_count(assembly, pool, count)


def _end(assembly: Assembly, pool: BuiltPool, leaving: list[Task], count: int, operation: Operation) -> None:
    platform = assembly.platform
    cancelling = cancel_all(platform, [task.id for task in leaving if task.id], operation)
    # One that has ended meanwhile, by a call of which the answer was lost or by itself, is what was wanted.
    failures = [error for error in cancelling if not already_gone(error)]
    node_ids = {task.nodeId for task in leaving if task.nodeId}
    ending = [
        platform.submit(lambda node_id=node_id: platform.shut_down_node(node_id, operation))  # type: ignore[misc]
        for node_id in node_ids
    ]
    for future in ending:
        error = future.exception()
        if isinstance(error, PlatformError):
            failures.append(error)
        elif error is not None:
            raise error
    # Nodes that have nothing to do yet, and how many the platform is to keep.
    _resize(assembly, pool, count, operation)
    if failures:
        raise TeardownError(
            f"not all of the nodes that are too many in {pool.plan.internal_name} could be given back; scale "
            f"again, or remove the pool:\n" + "\n".join(f"- {failure}" for failure in failures),
            [pool.plan.name],
        )


def _take_back(
    assembly: Assembly, pool: BuiltPool, before: set[str | None], count: int, error: BaseException
) -> None:
    operation = Operation(30.0)
    try:
        unfinished = unfinished_tasks(assembly.platform, pool, operation)
        added = [task for task in unfinished if task.id not in before]
        _end(assembly, pool, added, count, operation)
    except Exception as left:
        add_note(error, f"What had been added to {pool.plan.internal_name} could not be taken back: {left}")


def _resize(assembly: Assembly, pool: BuiltPool, count: int, operation: Operation) -> bool:
    """Tell the platform the pool's size. It refuses while nodes boot: then its own scaling has to do.

    That adds nodes for tasks that wait, and gives nodes back that have been idle for half an hour.

    :returns: whether the platform has taken it.
    """
    try:
        assembly.platform.resize_pool(str(pool.id), count, operation)
    except PlatformError as error:
        if error.status != 400:
            raise
        log.info("The worker pool %s is left to the platform's own scaling: %s", pool.plan.name, error)
        return False
    return True


def _set_count(assembly: Assembly, pool: BuiltPool, count: int) -> None:
    pool.node_count = count
    assembly.note_pools(pool)
