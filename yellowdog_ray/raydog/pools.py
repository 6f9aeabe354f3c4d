"""A pool and its task group, as far as they have come into being."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from yellowdog_ray.raydog.plan import PoolPlan
from yellowdog_ray.raydog.specs import NodeSpec
from yellowdog_ray.raydog.state import PoolState
from yellowdog_ray.raydog.teardown import PoolTarget

if TYPE_CHECKING:
    from yellowdog_client.model import Task, TaskGroup

    from yellowdog_ray.raydog.platform import Platform
    from yellowdog_ray.raydog.transport import Operation

__all__ = ["BuiltPool", "TaskCounts", "count_tasks", "named_pools", "staying", "unfinished_tasks"]


@dataclass
class BuiltPool:
    """A pool and its task group, as far as they have been created.

    :param node_count: how many nodes it is to have now; at first those that were planned.
    :param tasks_counted: how many names of tasks have been given away.
    :param node_id: of a pool with one special node (head or observability): its node, and its addresses.
    :param task_id: of such a pool: its task.
    """

    plan: PoolPlan
    id: str | None = None
    compute_requirement_id: str | None = None
    group_id: str | None = None
    node_id: str | None = None
    private_ip: str | None = None
    public_ip: str | None = None
    task_id: str | None = None
    node_count: int = 0
    tasks_counted: int = 0
    # Held while it is being scaled.
    scaling: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def __post_init__(self) -> None:
        self.node_count = self.node_count or self.plan.node_count
        self.tasks_counted = self.tasks_counted or self.plan.node_count

    def target(self) -> PoolTarget:
        """Name it for a teardown."""
        return PoolTarget(self.plan.name, self.id, self.compute_requirement_id)

    def state(self) -> PoolState:
        """Write down what another process has to know of it."""
        return PoolState(
            name=self.plan.name,
            role=self.plan.role,
            group=self.plan.group,
            internal_name=self.plan.internal_name,
            node_count=self.node_count,
            id=self.id,
            compute_requirement_id=self.compute_requirement_id,
            template=self.plan.node.template,
            group_id=self.group_id,
            tasks_counted=self.tasks_counted,
            node_id=self.node_id,
            private_ip=self.private_ip,
            public_ip=self.public_ip,
            task_id=self.task_id,
        )

    @classmethod
    def of(cls, state: PoolState) -> BuiltPool:
        """Make it from what another process wrote down; what its tasks run stays on the platform."""
        node = NodeSpec(template=state.template or "unknown/unknown")
        count = max(1, state.node_count)
        planned = PoolPlan(state.role, state.name, state.group, state.internal_name, node, count, script="")
        pool = cls(planned)
        pool.take(state)
        return pool

    def take(self, state: PoolState) -> None:
        """Take over what another process has found out or changed."""
        self.id = self.id or state.id
        self.compute_requirement_id = self.compute_requirement_id or state.compute_requirement_id
        self.group_id = self.group_id or state.group_id
        self.node_id, self.task_id = self.node_id or state.node_id, self.task_id or state.task_id
        self.private_ip = self.private_ip or state.private_ip
        self.public_ip = self.public_ip or state.public_ip
        self.node_count, self.tasks_counted = state.node_count, max(self.tasks_counted, state.tasks_counted)


def named_pools(pools: Iterable[BuiltPool]) -> dict[str, BuiltPool]:
    """Map internal names to pools, of which the special ones come first.

    A user may have called a worker pool ``head-node``: it goes by its name on the platform.
    """
    named: dict[str, BuiltPool] = {}
    for pool in pools:
        named[pool.plan.name if pool.plan.internal_name in named else pool.plan.internal_name] = pool
    return named


def unfinished_tasks(platform: Platform, pool: BuiltPool, operation: Operation) -> list[Task]:
    """List a pool's tasks that have not ended."""
    tasks = platform.tasks(str(pool.group_id), operation)
    return [task for task in tasks if task.status is None or not task.status.finished]


def staying(tasks: Iterable[Task]) -> list[Task]:
    """Leave out the tasks that are being aborted, which takes a while."""
    return [task for task in tasks if task.abortRequestedTime is None]


@dataclass(frozen=True)
class TaskCounts:
    """How many tasks a pool has, without those that are being aborted.

    :param executing: how many execute.
    :param unfinished: how many execute or wait for a node; None until the platform has something to count.
    :param ended: how many have ended, however they did.
    :param leaving: the ids of nodes of which the task is being aborted.
    """

    executing: int
    unfinished: int | None
    ended: int
    leaving: frozenset[str | None]


def count_tasks(
    platform: Platform, pool: BuiltPool, group: TaskGroup | None, operation: Operation
) -> TaskCounts:
    """Count a pool's tasks: by the summary of its group, as long as that can be right.

    Where it has more tasks than it is to have nodes, some are being aborted: then they are asked for.
    """
    # The platform leaves the summary out until there is something to count.
    counts = (group.taskSummary.statusCounts if group is not None and group.taskSummary else None) or {}
    executing = sum(number for status, number in counts.items() if status.name == "EXECUTING")
    ended = sum(number for status, number in counts.items() if status.finished)
    unfinished = sum(counts.values()) - ended
    leaving: frozenset[str | None] = frozenset()
    if unfinished > pool.node_count:
        tasks = unfinished_tasks(platform, pool, operation)
        those = staying(tasks)
        executing = sum(task.status is not None and task.status.name == "EXECUTING" for task in those)
        unfinished = len(those)
        leaving = frozenset(task.nodeId for task in tasks if task.abortRequestedTime is not None)
    return TaskCounts(executing, unfinished if counts else None, ended, leaving)
