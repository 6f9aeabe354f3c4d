"""What happened on a platform, as far as the things on it tell: their begin, last change and errors.

Nothing is recorded for it. So it costs nothing while nobody looks, and it is there after a restart too; but
of a thing that has changed often, only the last change is known.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from typing import NamedTuple

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
from yellowdog_ray.local.scheduler import Scheduler

__all__ = ["Happening", "newest"]

Thing = ComputeRequirement | Instance | Node | Pool | Task | TaskGroup | WorkRequirement


class Happening(NamedTuple):
    """Something that happened.

    :param order: tells apart, and orders, what happened at the same time.
    :param what: a word or two, such as ``submitted``; or the status that a thing has got.
    :param error: why an attempt of a task came to nothing.
    """

    time: float
    order: int
    thing: Thing
    what: str
    error: TaskError | None = None


def newest(scheduler: Scheduler, count: int) -> list[Happening]:
    """Return what happened last, the newest first."""
    return heapq.nlargest(
        count,
        (Happening(time, order, *rest) for order, (time, *rest) in enumerate(_all(scheduler))),
        key=lambda each: (each.time, each.order),
    )


_Told = tuple[float, Thing, str] | tuple[float, Thing, str, TaskError]


def _all(scheduler: Scheduler) -> Iterator[_Told]:
    # What belongs to another thing stands after it: at the same time, it is the newer.
    for requirement in scheduler.requirements.values():
        yield requirement.created, requirement, "requested"
        if requirement.changed > requirement.created:
            yield requirement.changed, requirement, requirement.status
    for pool in scheduler.pools.values():
        yield pool.created, pool, "requested"
        if pool.changed > pool.created:
            yield pool.changed, pool, pool.status
    for instance in scheduler.instances.values():
        # What becomes of it otherwise is its node's registration.
        if instance.status == "TERMINATED":
            yield instance.changed, instance, instance.status
    for node in scheduler.nodes.values():
        yield node.registered, node, "registered"
        if node.status != "RUNNING":
            yield node.changed, node, node.status
    for work in scheduler.works.values():
        yield work.created, work, "submitted"
        if work.changed > work.created:
            yield work.changed, work, work.status
    for group in scheduler.groups.values():
        if group.changed > group.work.created:
            yield group.changed, group, group.status
    for task in scheduler.tasks.values():
        if task.started is not None:
            yield task.started, task, "started"
        for error in task.errors:
            if not (error.caused_failure and error.time == task.finished):
                yield error.time, task, "attempt failed", error
        if task.finished is not None:
            yield task.finished, task, task.status
