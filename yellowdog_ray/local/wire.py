"""What the scheduler keeps, written as the SDK's JSON: plain dicts, camelCase, nothing that is None.

Times are ISO-8601 with milliseconds and ``Z``; durations are ISO-8601 (the SDK writes zero as ``P0D``);
objects of which there are several kinds carry ``type``.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Any

from yellowdog_ray.local.asks import AutoShutdown, Template
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

__all__ = [
    "AGENT_VERSION",
    "duration",
    "group_json",
    "image_id",
    "instance_json",
    "node_json",
    "pool_healthy",
    "pool_json",
    "pool_registered",
    "pool_summary",
    "requirement_healthy",
    "requirement_json",
    "requirement_summary",
    "source_id",
    "source_template_json",
    "source_template_summary",
    "task_json",
    "template_json",
    "template_summary",
    "time",
    "work_completed",
    "work_healthy",
    "work_json",
    "work_summary",
    "work_total",
]

JSON = dict[str, Any]

AGENT_VERSION = "raydog-local"
_MODEL = "co.yellowdog.platform.model."
_STRATEGY = _MODEL + "SingleSourceProvisionStrategy"
_APPLICATION = "ydid:app:000000:00000000-0000-0000-0000-000000000001"


def time(when: float | None) -> str | None:
    """Write a time in seconds since 1970 as the API does."""
    if when is None:
        return None
    text = datetime.fromtimestamp(when, timezone.utc).isoformat(timespec="milliseconds")
    return text.replace("+00:00", "Z")


def duration(seconds: float | None) -> str | None:
    """Write a span of seconds as an ISO-8601 duration."""
    if seconds is None:
        return None
    days, rest = divmod(round(seconds, 3), 86400)
    hours, rest = divmod(rest, 3600)
    minutes, rest = divmod(rest, 60)
    clock = "".join(f"{value:g}{unit}" for value, unit in ((hours, "H"), (minutes, "M")) if value)
    if round(rest, 3):
        clock += f"{rest:.3f}".rstrip("0").rstrip(".") + "S"
    return "P" + (f"{days:g}D" if days or not clock else "") + (f"T{clock}" if clock else "")


def _given(**fields: Any) -> JSON:
    return {key: value for key, value in fields.items() if value is not None}


def _counts(counts: Mapping[str, int]) -> dict[str, int]:
    return {status: count for status, count in counts.items() if count}


def _auto_shutdown(wish: AutoShutdown | None) -> JSON | None:
    return None if wish is None else _given(enabled=wish.enabled, timeout=duration(wish.timeout))


# --------------------------------------------------------------------------------------------- work


def work_json(work: WorkRequirement) -> JSON:
    """Write a work requirement."""
    return _given(
        id=work.id,
        createdTime=time(work.created),
        status=work.status,
        statusChangedTime=time(work.changed),
        namespace=work.namespace,
        name=work.name,
        taskGroups=[group_json(group) for group in work.groups],
        tag=work.tag,
        priority=work.priority,
    )


def group_json(group: TaskGroup) -> JSON:
    """Write a task group; its summary is absent until there is something to count."""
    spec = group.spec
    summary = None
    if group.tasks:
        summary = {
            "statusCounts": _counts(group.counts),
            "taskCount": len(group.tasks),
            "lastUpdatedTime": time(group.updated),
        }
    return _given(
        id=group.id,
        status=group.status,
        statusChangedTime=time(group.changed),
        taskSummary=summary,
        name=spec.name,
        runSpecification=spec.run.json,
        tag=group.tag,
        priority=group.priority,
        dependencies=list(spec.dependencies) or None,
        starved=group.starved,
        waitingOnDependency=group.blocked and not group.terminated,
        finishIfAllTasksFinished=spec.finish_when_done,
        finishIfAnyTaskFailed=spec.finish_when_failed,
        completedTaskTtl=spec.completed_task_ttl,
        taskTemplate=spec.template_json,
    )


def work_summary(work: WorkRequirement) -> JSON:
    """Write a work requirement in a line of a list."""
    return _given(
        id=work.id,
        namespace=work.namespace,
        name=work.name,
        tag=work.tag,
        createdTime=time(work.created),
        statusChangedTime=time(work.changed),
        priority=work.priority,
        completedTaskCount=work_completed(work),
        totalTaskCount=work_total(work),
        status=work.status,
        healthy=work_healthy(work),
    )


def work_completed(work: WorkRequirement) -> int:
    """Return how many of a work requirement's tasks have been completed."""
    return sum(group.counts.get("COMPLETED", 0) for group in work.groups)


def work_total(work: WorkRequirement) -> int:
    """Return how many tasks a work requirement has."""
    return sum(len(group.tasks) for group in work.groups)


def work_healthy(work: WorkRequirement) -> bool:
    """Say whether no task of a work requirement has failed, and no group is without a worker."""
    return not any(group.counts.get("FAILED") or group.starved for group in work.groups)


def task_json(task: Task) -> JSON:
    """Write a task."""
    spec = task.spec
    working = None
    if task.finished is not None and task.started is not None:
        executing = duration(max(0.0, task.finished - task.started))
        working = {"downloading": "P0D", "executing": executing, "uploading": "P0D"}
    return _given(
        id=task.id,
        status=task.status,
        retryCount=task.retries,
        taskGroupId=task.group.id,
        nodeId=task.node_id,
        workerId=task.worker_id,
        errors=[_error_json(error) for error in task.errors] or None,
        resubmittedToTaskId=task.resubmitted_to,
        resubmittedFromTaskId=task.resubmitted_from,
        name=spec.name,
        tag=spec.tag,
        taskType=task.task_type,
        arguments=None if spec.arguments is None else list(spec.arguments),
        taskData=spec.task_data,
        environment=spec.environment,
        startedTime=time(task.started),
        finishedTime=time(task.finished),
        workingTime=working,
        abortRequestedTime=time(task.abort_requested),
        timeout=duration(spec.timeout),
    )


def _error_json(error: TaskError) -> JSON:
    return _given(
        timestamp=time(error.time),
        error=error.error,
        nodeId=error.node_id,
        workerId=error.worker_id,
        errorType=error.error_type,
        statusAtFailure=error.status_at_failure,
        processExitCode=error.exit_code,
        causedFailure=error.caused_failure,
    )


# ----------------------------------------------------------------------------------- worker pools


def pool_json(pool: Pool) -> JSON:
    """Write a provisioned worker pool."""
    workers = nodes = None
    if pool.nodes:
        workers = _given(
            statusCounts=_counts(pool.worker_counts),
            claimedWorkerCount=pool.claimed,
            lastClaimedTime=time(pool.last_claimed),
            lastReleasedTime=time(pool.last_released),
            lastUpdatedTime=time(pool.updated),
        )
        nodes = _given(
            statusCounts=_counts(pool.node_counts),
            actionQueueStatuses={"EMPTY": pool.node_counts.get("RUNNING", 0)},
            lastUpdatedTime=time(pool.updated),
        )
    return _given(
        type=_MODEL + "ProvisionedWorkerPool",
        id=pool.id,
        name=pool.name,
        namespace=pool.namespace,
        createdTime=time(pool.created),
        status=pool.status,
        statusChangedTime=time(pool.changed),
        expectedNodeCount=pool.requirement.alive,
        awaitingNodes=not pool.finished and pool.requirement.pending > 0,
        workerSummary=workers,
        nodeSummary=nodes,
        properties=pool.spec.json,
        computeRequirementId=pool.requirement.id,
    )


def pool_summary(pool: Pool) -> JSON:
    """Write a worker pool in a line of a list."""
    return _given(
        id=pool.id,
        name=pool.name,
        namespace=pool.namespace,
        type=_MODEL + "ProvisionedWorkerPool",
        registeredNodeCount=pool_registered(pool),
        registeredWorkerCount=pool.workers,
        claimedWorkerCount=pool.claimed,
        workingWorkerCount=pool.busy,
        status=pool.status,
        createdTime=time(pool.created),
        statusChangedTime=time(pool.changed),
        healthy=pool_healthy(pool),
    )


def pool_registered(pool: Pool) -> int:
    """Return how many nodes of a pool are up."""
    return pool.node_counts.get("RUNNING", 0)


def pool_healthy(pool: Pool) -> bool:
    """Say whether none of a pool's workers was lost."""
    return not pool.worker_counts.get("LOST")


def node_json(node: Node) -> JSON:
    """Write a node; its addresses are there from the moment it exists."""
    instance, shape = node.instance, node.shape
    return _given(
        id=node.id,
        workerPoolId=node.pool.id,
        details=_given(
            instanceId=instance.id,
            provider=shape.provider,
            region=shape.region,
            sourceName=instance.requirement.template.name,
            sourceNumber=0,
            instanceType=shape.instance_type,
            hostname=instance.hostname,
            privateIpAddress=instance.private_ip,
            publicIpAddress=instance.public_ip,
            vcpus=shape.vcpus,
            ram=shape.ram,
            supportedTaskTypes=sorted(shape.task_types),
            workerTag=shape.tag,
            spot=False,
        ),
        status=node.status,
        statusChangedTime=time(node.changed),
        registeredTime=time(node.registered),
        deregisteredTime=time(node.deregistered),
        workers=[
            _given(
                id=worker.id,
                status=worker.status,
                taskGroupId=worker.group.id if worker.group is not None else None,
                registeredTime=time(worker.registered),
            )
            for worker in node.workers
        ],
        actionQueueStatus="EMPTY",
        agentVersion=AGENT_VERSION,
    )


# ---------------------------------------------------------------------------------------- compute


def requirement_json(requirement: ComputeRequirement) -> JSON:
    """Write a compute requirement. Its one source says why machines failed to boot, where some did."""
    template, usage = requirement.template, requirement.usage
    source = _given(
        type=_MODEL + "SimulatorComputeSource",
        traits={"canStopStart": False, "canRestart": False, "canScaleOut": True, "isSelfMaintained": False},
        provider=template.provider,
        instancePricing="ON_DEMAND_ONLY",
        id=requirement.source_id,
        createdFromId=source_id(template),
        instanceSummary=_given(
            aliveCount=requirement.alive,
            statusCounts=_counts(requirement.counts),
            requestedCount=requirement.target,
            expectedCount=requirement.alive,
            expiredCount=0,
            totalCount=len(requirement.instances),
            lastUpdatedTime=time(requirement.updated),
        ),
        status=requirement.source_status,
        statusMessage=requirement.source_message,
        name=template.name,
        region=template.region,
        instanceType=template.instance_type,
        imageId=usage.images_id or "local",
        instanceTags=dict(usage.instance_tags) or None,
    )
    return _given(
        id=requirement.id,
        createdTime=time(requirement.created),
        createdById=_APPLICATION,
        createdFromId=template.id,
        statusChangedTime=time(requirement.changed),
        supportedOperations={"canStopStart": False, "canScaleOut": True, "canReprovision": True},
        status=requirement.status,
        autoShutdownTime=time(requirement.auto_shutdown_time),
        namespace=usage.namespace,
        name=usage.name,
        provisionStrategy={"type": _STRATEGY, "sources": [source]},
        tag=usage.tag,
        targetInstanceCount=requirement.target,
        expectedInstanceCount=requirement.alive,
        maintainInstanceCount=usage.maintain,
        autoShutdown=_auto_shutdown(requirement.auto_shutdown),
    )


def requirement_summary(requirement: ComputeRequirement) -> JSON:
    """Write a compute requirement in a line of a list."""
    return _given(
        id=requirement.id,
        namespace=requirement.usage.namespace,
        name=requirement.usage.name,
        tag=requirement.usage.tag,
        targetInstanceCount=requirement.target,
        expectedInstanceCount=requirement.alive,
        aliveInstanceCount=requirement.alive,
        createdTime=time(requirement.created),
        statusChangedTime=time(requirement.changed),
        status=requirement.status,
        healthy=requirement_healthy(requirement),
    )


def requirement_healthy(requirement: ComputeRequirement) -> bool:
    """Say whether the machines of a compute requirement come as they should."""
    return requirement.source_status != "ERRORED"


def image_id(instance: Instance) -> str:
    """Return the image that a machine was asked for with."""
    return instance.requirement.usage.images_id or "local"


def instance_json(instance: Instance) -> JSON:
    """Write an instance."""
    template = instance.requirement.template
    return _given(
        type=_MODEL + "SimulatorInstance",
        id={"sourceId": instance.requirement.source_id, "instanceId": instance.id},
        createdTime=time(instance.created),
        provider=template.provider,
        instanceType=template.instance_type,
        region=template.region,
        imageId=image_id(instance),
        hostname=instance.hostname,
        privateIpAddress=instance.private_ip,
        publicIpAddress=instance.public_ip,
        spot=False,
        status=instance.status,
        statusChangedTime=time(instance.changed),
    )


# -------------------------------------------------------------------------------------- templates


def source_id(template: Template) -> str:
    """Return the id of the source template behind a requirement template."""
    return template.id.replace(":crt:", ":cst:")


def template_json(template: Template) -> JSON:
    """Write a compute requirement template."""
    return {
        "type": _MODEL + "ComputeRequirementStaticTemplate",
        "id": template.id,
        "name": template.name,
        "namespace": template.namespace,
        "description": f"{template.vcpus:g} CPUs and {template.ram:g} GiB of RAM on this machine",
        "strategyType": _STRATEGY,
        "sources": [{"sourceTemplateId": source_id(template)}],
    }


def template_summary(template: Template) -> JSON:
    """Write a compute requirement template in a line of a list."""
    full = template_json(template)
    return {key: full[key] for key in ("id", "name", "namespace", "description", "strategyType", "type")}


def source_template_json(template: Template) -> JSON:
    """Write the compute source template behind a requirement template."""
    return {
        "id": source_id(template),
        "namespace": template.namespace,
        "description": template_json(template)["description"],
        "source": {
            "type": _MODEL + "SimulatorComputeSource",
            "name": template.name,
            "provider": template.provider,
            "region": template.region,
            "instanceType": template.instance_type,
            "imageId": "local",
        },
    }


def source_template_summary(template: Template) -> JSON:
    """Write a compute source template in a line of a list."""
    return {
        "id": source_id(template),
        "name": template.name,
        "namespace": template.namespace,
        "description": template_json(template)["description"],
        "sourceType": _MODEL + "SimulatorComputeSource",
        "provider": template.provider,
    }
