"""Looking at a cluster as it is on the platform, and comparing that with what it should be."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import datetime, timezone
from typing import TYPE_CHECKING

from yellowdog_ray.errors import NotFoundError, RayDogError
from yellowdog_ray.raydog.platform import Platform, task_failure
from yellowdog_ray.raydog.pools import BuiltPool, count_tasks, named_pools
from yellowdog_ray.raydog.status import ClusterStatus, NodeFailure, PoolStatus
from yellowdog_ray.raydog.transport import Operation

if TYPE_CHECKING:
    from yellowdog_client.model import (
        ComputeRequirementSummary,
        TaskGroup,
        WorkerPoolSummary,
        WorkRequirement,
    )

__all__ = ["survey"]

_SECONDS = 30.0


def survey(
    platform: Platform,
    known: ClusterStatus,
    pools: Sequence[BuiltPool],
) -> ClusterStatus:
    """Ask the platform how a cluster is doing.

    It costs three calls, and more only where something is missing or has ended.

    :param known: what is known without asking; its ``work_requirement_id`` may be None.
    :param pools: what the cluster should consist of.
    :raises RayDogError: where the platform cannot be asked.
    """
    operation = Operation(_SECONDS)
    namespace, name = known.cluster_namespace, known.cluster_name
    listing = platform.submit(lambda: platform.pool_summaries(namespace, name, operation))
    computing = platform.submit(lambda: platform.compute_summaries(namespace, name, operation))
    drift: list[str] = []
    requirement = _work_requirement(platform, known, operation, drift)
    there, compute = listing.result(), computing.result()
    by_name = {summary.name: summary for summary in compute.values()}
    groups = {group.name: group for group in (requirement.taskGroups or [] if requirement else [])}
    statuses = {}
    for key, pool in named_pools(pools).items():
        status = _pool(platform, pool, there, groups.get(pool.plan.group), operation, drift)
        statuses[key] = status
        summary = by_name.get(pool.plan.name)
        drift += _ended(status, there.get(str(pool.id)), summary)
        alive = summary.aliveInstanceCount if summary is not None else None
        if status.problem is None and alive is not None and alive > pool.node_count:
            drift.append(
                f"the worker pool {pool.plan.name} has {alive} instances, and should have {pool.node_count}"
            )
    drift += _strangers(known.cluster_name, pools, there, by_name)
    return ClusterStatus(
        known.cluster_name,
        known.cluster_namespace,
        known.phase,
        work_requirement_id=known.work_requirement_id,
        work_requirement_status=None if requirement is None else str(requirement.status),
        head_private_ip=known.head_private_ip,
        head_public_ip=known.head_public_ip,
        pools=statuses,
        drift=tuple(drift),
        failure=known.failure,
        lifetime_ends=known.lifetime_ends,
        checked=datetime.now(timezone.utc),
    )


def _work_requirement(
    platform: Platform, known: ClusterStatus, operation: Operation, drift: list[str]
) -> WorkRequirement | None:
    if known.work_requirement_id is None:
        drift.append("the work requirement has not been added")
        return None
    try:
        requirement = platform.work_requirement(known.work_requirement_id, operation, may_be_missing=True)
    except NotFoundError:
        drift.append(f"the platform does not know the work requirement {known.work_requirement_id}")
        return None
    if requirement.status is None or requirement.status.name != "RUNNING":
        drift.append(f"the work requirement {requirement.name} is {requirement.status}")
    return requirement


def _pool(
    platform: Platform,
    pool: BuiltPool,
    there: dict[str, WorkerPoolSummary],
    group: TaskGroup | None,
    operation: Operation,
    drift: list[str],
) -> PoolStatus:
    summary = there.get(str(pool.id))
    counts = count_tasks(platform, pool, group, operation)
    failed: tuple[NodeFailure, ...] = ()
    if group is None:
        drift.append(f"the work requirement has no task group {pool.plan.group}")
    elif counts.ended:
        failed = _failures(platform, pool, group, operation)
    registered = None if summary is None else summary.registeredNodeCount
    problem = None
    if pool.id is None:
        problem = f"the worker pool {pool.plan.name} has not been provisioned"
    elif registered is None or registered < pool.node_count or counts.executing < pool.node_count:
        problem = platform.why_no_nodes(pool.id, pool.plan.name, operation)
    return PoolStatus(
        name=pool.plan.name,
        internal_name=pool.plan.internal_name,
        role=pool.plan.role,
        id=pool.id,
        wanted=pool.node_count,
        registered=registered,
        executing=counts.executing,
        failed=failed,
        status=None if summary is None or summary.status is None else str(summary.status),
        problem=problem,
        unfinished=counts.unfinished,
    )


def _ended(
    pool: PoolStatus, summary: WorkerPoolSummary | None, compute: ComputeRequirementSummary | None
) -> list[str]:
    """Tell that a pool that should be there is not, or has come to its end."""
    if pool.id is None or pool.problem is None:
        return []
    if summary is None:
        return [f"the platform does not know the worker pool {pool.name} ({pool.id})"]
    if summary.status is not None and summary.status.finished:
        return [f"the worker pool {pool.name} is {summary.status}"]
    if compute is not None and str(compute.status) in ("TERMINATING", "TERMINATED"):
        return [f"the compute requirement of the worker pool {pool.name} is {compute.status}"]
    return []


def _failures(
    platform: Platform, pool: BuiltPool, group: TaskGroup, operation: Operation
) -> tuple[NodeFailure, ...]:
    """List the tasks that have ended, but for those that were cancelled: somebody wanted them to end."""
    from yellowdog_client.model import TaskStatus

    ended = [TaskStatus.FAILED, TaskStatus.COMPLETED]
    try:
        tasks = platform.tasks(str(group.id), operation, ended)
    except RayDogError as error:
        return (NodeFailure(pool.plan.group, f"its tasks could not be listed: {error}"),)
    return tuple(
        NodeFailure(str(task.name), str(task_failure(task, f"the {pool.plan.role} task", None)), task.nodeId)
        for task in tasks
        if task.status in ended
    )


def _strangers(
    cluster: str,
    pools: Sequence[BuiltPool],
    there: dict[str, WorkerPoolSummary],
    compute: dict[str | None, ComputeRequirementSummary],
) -> list[str]:
    """Find pools and instances under the cluster's names that it does not know of."""
    ours = re.compile(re.escape(cluster) + r"-(00-head|observability|\d{2,}-wrkrs)")
    known = {pool.plan.name for pool in pools}
    living = {
        summary.name: f"worker pool {summary.name} ({summary.id})"
        for summary in compute.values()
        if summary.status is not None and summary.status.name != "TERMINATED"
    }
    for summary in there.values():
        if summary.status is not None and not summary.status.finished:
            living[summary.name] = f"worker pool {summary.name} ({summary.id})"
    return [
        f"the {title} is on the platform, and not known to be of this cluster"
        for name, title in living.items()
        if name is not None and name not in known and ours.fullmatch(name)
    ]
