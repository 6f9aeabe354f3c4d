"""Waiting for a cluster's workers, for as long as they can still come."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from yellowdog_ray.errors import NotFoundError, WaitTimeoutError
from yellowdog_ray.raydog.assembly import BuiltPool
from yellowdog_ray.raydog.platform import Platform, task_failure
from yellowdog_ray.raydog.transport import Operation, Pause

if TYPE_CHECKING:
    from yellowdog_client.model import WorkRequirement

__all__ = ["wait_for_workers"]

_LOOK_FOR_REASONS = 1.0


@dataclass
class _Tally:
    """How many workers there are, and how many can still come.

    :param failed: pools of which a worker's task has ended.
    :param missing: pools of which a worker's task does not execute yet, and how many those are.
    """

    executing: int = 0
    coming: int = 0
    failed: list[BuiltPool] = field(default_factory=list)
    missing: list[tuple[BuiltPool, int]] = field(default_factory=list)


def _tally(requirement: WorkRequirement, pools: Iterable[BuiltPool]) -> _Tally:
    tally = _Tally()
    groups = {group.name: group for group in requirement.taskGroups or []}
    for pool in pools:
        group = groups.get(pool.plan.group)
        # The platform leaves the summary out until there is something to count.
        counts = (group.taskSummary.statusCounts if group is not None and group.taskSummary else None) or {}
        executing = sum(number for status, number in counts.items() if status.name == "EXECUTING")
        ended = sum(number for status, number in counts.items() if status.finished)
        coming = max(0, pool.plan.node_count - executing - ended)
        tally.executing += executing
        tally.coming += coming
        if ended:
            tally.failed.append(pool)
        if coming:
            tally.missing.append((pool, coming))
    return tally


def wait_for_workers(
    platform: Platform,
    work_requirement_id: str,
    head: BuiltPool,
    pools: Iterable[BuiltPool],
    *,
    count: int,
    operation: Operation,
) -> int:
    """Wait until so many worker tasks execute.

    :returns: how many do.
    :raises WaitTimeoutError: where they have not come in time, or cannot come any more.
    """
    pools = list(pools)
    pause = Pause(operation)
    next_reasons = _LOOK_FOR_REASONS
    while True:
        requirement = platform.work_requirement(work_requirement_id, operation)
        tally = _tally(requirement, pools)
        if tally.executing >= count:
            return tally.executing
        have = f"{tally.executing} of {count} workers are executing after {operation.elapsed:.1f} s"
        over = requirement.status is not None and requirement.status.finished
        if over or tally.executing + tally.coming < count:
            reasons = _failures(platform, tally.failed) or [f"the work requirement is {requirement.status}"]
            raise WaitTimeoutError(f"{have}, and no more can come: {'; '.join(reasons)}")
        if operation.elapsed >= next_reasons:
            next_reasons = operation.elapsed + max(_LOOK_FOR_REASONS, operation.elapsed / 4)
            _check_head(platform, head, have, operation)
            reasons = []
            for pool, coming in tally.missing:
                reason = platform.why_no_nodes(str(pool.id), pool.plan.name, operation)
                if reason is not None:
                    reasons.append(reason)
                    tally.coming -= coming
            if tally.executing + tally.coming < count:
                raise WaitTimeoutError(f"{have}, and no more can come: {'; '.join(reasons)}")
        if operation.expired:
            waiting = ", ".join(pool.plan.internal_name for pool, _ in tally.missing)
            raise WaitTimeoutError(f"{have}; still waiting for workers of {waiting}")
        pause.sleep()


def _check_head(platform: Platform, head: BuiltPool, have: str, operation: Operation) -> None:
    try:
        task = platform.task(str(head.task_id), operation)
    except NotFoundError:
        raise WaitTimeoutError(f"{have}, and no more can come: the head node's task is gone") from None
    if task.status is not None and task.status.finished:
        reason = task_failure(task, "the head node's task", head.private_ip)
        raise WaitTimeoutError(f"{have}, and no more can come: {reason}")


def _failures(platform: Platform, pools: Iterable[BuiltPool]) -> list[str]:
    """Tell, for each pool of which a worker has ended, how the first one did."""
    operation = Operation(10.0)
    reasons = []
    for pool in pools:
        tasks = platform.tasks(str(pool.group_id), operation)
        ended = [task for task in tasks if task.status is not None and task.status.finished]
        if ended:
            more = f" (and {len(ended) - 1} more of {pool.plan.internal_name})" if len(ended) > 1 else ""
            reasons.append(f"{task_failure(ended[0], 'the worker task', None)}{more}")
    return reasons
