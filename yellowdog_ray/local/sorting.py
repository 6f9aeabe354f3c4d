"""What lists can be sorted by: for each field of their items that holds one value, how it is had.

The value is not always what is written there: a time is a number, which sorts as its text does. Nothing else
of a thing is written out for it, since a list may hold ten thousand.

Source: the list items of YellowDog's SDK 15.9 (``yellowdog_client.model``); a test compares them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from operator import attrgetter
from typing import Any

from yellowdog_ray.local import wire
from yellowdog_ray.local.asks import Template

__all__ = [
    "SORT_COMPUTE",
    "SORT_COMPUTE_SUMMARIES",
    "SORT_INSTANCES",
    "SORT_NODES",
    "SORT_POOLS",
    "SORT_SOURCES",
    "SORT_TASKS",
    "SORT_TEMPLATES",
    "SORT_WORK",
    "Values",
]

#: For each field, what gives its value for a thing.
Values = Mapping[str, Callable[[Any], Any]]


def _same(*fields: str) -> Values:
    """Return fields that are the same for all things of a list, or missing."""
    return {field: lambda thing: None for field in fields}


def _at(**paths: str) -> Values:
    """Return fields by where they stand in a thing."""
    return {field: attrgetter(path) for field, path in paths.items()}


def _written(write: Callable[[Template], Mapping[str, Any]], fields: str) -> Values:
    """Return fields as they are written: for things of which there are few."""

    def value(field: str) -> Callable[[Any], Any]:
        return lambda thing: write(thing).get(field)

    return {field: value(field) for field in fields.split()}


_STATUS = _at(id="id", status="status", createdTime="created", statusChangedTime="changed")
_USAGE = _at(namespace="usage.namespace", name="usage.name", tag="usage.tag")

SORT_WORK: Values = {
    **_STATUS,
    **_at(namespace="namespace", name="name", tag="tag", priority="priority"),
    "completedTaskCount": wire.work_completed,
    "totalTaskCount": wire.work_total,
    "healthy": wire.work_healthy,
}
SORT_TASKS: Values = _at(
    id="id",
    status="status",
    retryCount="retries",
    taskGroupId="group.id",
    nodeId="node_id",
    workerId="worker_id",
    name="spec.name",
    tag="spec.tag",
    taskType="task_type",
    startedTime="started",
    finishedTime="finished",
    abortRequestedTime="abort_requested",
    resubmittedToTaskId="resubmitted_to",
    resubmittedFromTaskId="resubmitted_from",
    timeout="spec.timeout",
    taskData="spec.task_data",
)
SORT_POOLS: Values = {
    **_STATUS,
    **_at(namespace="namespace", name="name"),
    **_same("type"),
    **_at(registeredWorkerCount="workers", claimedWorkerCount="claimed", workingWorkerCount="busy"),
    "registeredNodeCount": wire.pool_registered,
    "healthy": wire.pool_healthy,
}
SORT_NODES: Values = {
    **_at(id="id", workerPoolId="pool.id", status="status", statusChangedTime="changed"),
    **_at(registeredTime="registered", deregisteredTime="deregistered"),
    **_same("preemptionWarningTime", "actionQueueStatus", "agentVersion"),
}
SORT_COMPUTE: Values = {
    **_STATUS,
    **_USAGE,
    **_at(createdFromId="template.id", targetInstanceCount="target", expectedInstanceCount="alive"),
    **_at(maintainInstanceCount="usage.maintain", autoShutdownTime="auto_shutdown_time"),
    **_same("createdById", "nextStatus"),
}
SORT_COMPUTE_SUMMARIES: Values = {
    **_STATUS,
    **_USAGE,
    **_at(targetInstanceCount="target", expectedInstanceCount="alive", aliveInstanceCount="alive"),
    "healthy": wire.requirement_healthy,
}
SORT_INSTANCES: Values = {
    **_at(createdTime="created", status="status", statusChangedTime="changed", hostname="hostname"),
    **_at(privateIpAddress="private_ip", publicIpAddress="public_ip"),
    **_at(
        provider="requirement.template.provider",
        instanceType="requirement.template.instance_type",
        region="requirement.template.region",
    ),
    "imageId": wire.image_id,
    **_same("type", "subregion", "spot"),
}
SORT_TEMPLATES = _written(wire.template_summary, "id name namespace description strategyType type")
SORT_SOURCES = _written(wire.source_template_summary, "id name namespace description sourceType provider")
