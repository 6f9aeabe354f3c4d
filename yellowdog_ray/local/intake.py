"""What clients ask for, read from JSON and checked: nothing wrong or unsupported gets past here.

A field that this platform does not know or cannot honour is refused by its name, unless it is empty:
an answer that silently leaves something out would make a test pass that fails on the real platform.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from yellowdog_ray.local.asks import (
    AutoShutdown,
    GroupSpec,
    PoolSpec,
    RefusedError,
    RunSpec,
    TaskSpec,
    Usage,
)
from yellowdog_ray.local.fields import MAX_GROUPS, MAX_NODES, Fields, check_name
from yellowdog_ray.local.selections import check_matchers, check_selection
from yellowdog_ray.local.vocabulary import PRICING, PROVIDERS

__all__ = ["WorkAsk", "read_auto_shutdown", "read_group", "read_pool", "read_task", "read_usage", "read_work"]


def read_auto_shutdown(fields: Fields | None, needs_timeout: bool = False) -> AutoShutdown | None:
    """Read an ``AutoShutdown``: a timeout without ``enabled`` enables it.

    :param needs_timeout: whether there is no other one that would count where it says none.
    """
    if fields is None:
        return None
    timeout = fields.duration("timeout")
    enabled = fields.flag("enabled", timeout is not None)
    if enabled and timeout is None and needs_timeout:
        raise RefusedError.invalid("autoShutdown.timeout is required where it is enabled")
    fields.done()
    return AutoShutdown(enabled, timeout)


def read_usage(value: Any) -> Usage:
    """Read a ``ComputeRequirementTemplateUsage``.

    User data is accepted and not used: it prepares a cloud image, and nothing of it may run here.
    """
    fields = Fields(value, "requirementTemplateUsage")
    usage = Usage(
        template_id=fields.need("templateId"),
        name=fields.name("requirementName"),
        namespace=fields.name("requirementNamespace"),
        tag=fields.tag("requirementTag"),
        target=fields.whole("targetInstanceCount", 0, MAX_NODES) or 0,
        images_id=fields.text("imagesId"),
        instance_tags=fields.mapping("instanceTags") or {},
        maintain=fields.flag("maintainInstanceCount", False),
        auto_shutdown=read_auto_shutdown(fields.fields("autoShutdown"), needs_timeout=True),
    )
    if any(key != key.lower() for key in usage.instance_tags):
        raise fields.bad("instanceTags", "keyed by names in lower case")
    fields.text("userData")
    fields.done()
    return usage


def read_pool(value: Any) -> PoolSpec:
    """Read ``ProvisionedWorkerPoolProperties``."""
    if value is None:
        return PoolSpec()
    fields = Fields(value, "provisionedProperties")
    per_node, per_vcpu = 1.0, False
    workers = fields.fields("createNodeWorkers")
    if workers is not None:
        kind = workers.need("targetType")
        if kind == "CUSTOM":
            raise RefusedError.invalid(
                "provisionedProperties.createNodeWorkers.targetType CUSTOM is not supported by the local "
                "platform; use PER_NODE or PER_VCPU"
            )
        if kind not in ("PER_NODE", "PER_VCPU"):
            raise workers.bad("targetType", "PER_NODE or PER_VCPU")
        if kind == "PER_NODE":
            workers.whole("targetCount")
        per_node, per_vcpu = workers.number("targetCount", 1), kind == "PER_VCPU"
        if per_node < 0:
            raise workers.bad("targetCount", "0 or more")
        workers.done()
    spec = PoolSpec(
        per_node=per_node,
        per_vcpu=per_vcpu,
        min_nodes=fields.whole("minNodes", 0, MAX_NODES) or 0,
        max_nodes=fields.whole("maxNodes", 0, MAX_NODES),
        boot_timeout=fields.duration("nodeBootTimeout"),
        idle_node=read_auto_shutdown(fields.fields("idleNodeShutdown")),
        idle_pool=read_auto_shutdown(fields.fields("idlePoolShutdown")),
        worker_tag=fields.tag("workerTag"),
        json={key: each for key, each in value.items() if each is not None},
    )
    # Metrics are a service of the real platform's console; there is nothing here to show them.
    fields.flag("metricsEnabled", False)
    fields.done()
    if spec.max_nodes is not None and spec.max_nodes < spec.min_nodes:
        raise RefusedError.invalid("provisionedProperties.maxNodes is less than minNodes")
    return spec


def _words(fields: Fields, key: str) -> frozenset[str]:
    return frozenset(fields.strings(key) or ())


def _known(fields: Fields, key: str, words: Iterable[str | None], known: frozenset[str]) -> None:
    """Refuse a word that YellowDog's enum does not have: no machine would ever match it."""
    for word in words:
        if word is not None and word not in known:
            raise fields.bad(key, f"one of {', '.join(sorted(known))}, not {word!r}")


def _read_run(fields: Fields, raw: Mapping[str, Any]) -> RunSpec:
    retries = fields.whole("maximumTaskRetries") or 0
    retryable = check_matchers(fields.objects("retryableErrors")) or None
    policy, retry_errors = fields.fields("retryPolicy"), None
    if policy is not None:
        if retryable:
            raise fields.bad("retryableErrors", "left out where there is a retryPolicy")
        retries = policy.whole("maxRetries") or 0
        retry_errors = check_selection(policy.get("retryErrors"), "retryPolicy.retryErrors")
        policy.done()
    destinations: list[tuple[str, Mapping[str, Any] | None]] = []
    failure = fields.fields("failurePolicy")
    if failure is not None:
        for number, each in enumerate(failure.objects("resubmissionDestinations")):
            one = Fields(each, f"resubmissionDestinations[{number}]")
            errors = check_selection(one.get("resubmitErrors"), "resubmitErrors")
            destinations.append((one.need("destinationTaskGroup"), errors))
            one.done()
        failure.done()
    run = RunSpec(
        task_types=_words(fields, "taskTypes"),
        instance_types=_words(fields, "instanceTypes"),
        pricing=fields.text("instancePricingPreference"),
        vcpus=fields.span("vcpus"),
        ram=fields.span("ram"),
        min_workers=fields.whole("minWorkers") or 0,
        max_workers=fields.whole("maxWorkers"),
        tasks_per_worker=fields.whole("tasksPerWorker", 1),
        timeout=fields.duration("taskTimeout"),
        providers=_words(fields, "providers"),
        regions=_words(fields, "regions"),
        worker_tags=_words(fields, "workerTags"),
        namespaces=_words(fields, "namespaces"),
        max_retries=retries,
        retry_errors=retry_errors,
        retryable=retryable,
        destinations=tuple(destinations),
        json={key: each for key, each in raw.items() if each is not None},
    )
    _known(fields, "instancePricingPreference", (run.pricing,), PRICING)
    _known(fields, "providers", sorted(run.providers), PROVIDERS)
    # Tasks are never queued on a node ahead of time here, so that both settings mean the same.
    fields.flag("disablePreallocation", False)
    fields.done()
    if not run.task_types:
        raise RefusedError.invalid("runSpecification.taskTypes is required")
    if run.max_workers is not None and run.max_workers < run.min_workers:
        raise RefusedError.invalid("runSpecification.maxWorkers is less than minWorkers")
    return run


def read_group(value: Any, number: int) -> GroupSpec:
    """Read a ``TaskGroup`` of a request; fields that the platform sets are passed over.

    ``completedTaskTtl`` is kept and shown, but tasks stay readable for as long as the platform runs.
    """
    fields = Fields(value, f"taskGroups[{number}]")
    fields.ignore("id", "status", "statusChangedTime", "taskSummary", "starved", "waitingOnDependency")
    run = fields.fields("runSpecification")
    if run is None:
        raise RefusedError.invalid(f"taskGroups[{number}].runSpecification is required")
    if fields.get("tasks"):
        raise RefusedError.invalid(f"taskGroups[{number}].tasks: tasks are added by a call of their own")
    template, ttl = fields.fields("taskTemplate"), fields.text("completedTaskTtl")
    fields.duration("completedTaskTtl")
    dependencies = [*(fields.strings("dependencies") or ())]
    before = fields.text("dependentOn")
    if before and before not in dependencies:
        dependencies.append(before)
    spec = GroupSpec(
        name=fields.name("name"),
        run=_read_run(run, value["runSpecification"]),
        tag=fields.tag("tag"),
        priority=fields.number("priority", 0),
        dependencies=tuple(dependencies),
        finish_when_done=fields.flag("finishIfAllTasksFinished", True),
        finish_when_failed=fields.flag("finishIfAnyTaskFailed", False),
        task_type=template.text("taskType") if template else None,
        task_data=template.text("taskData") if template else None,
        environment=template.environment("environment") if template else None,
        completed_task_ttl=ttl,
        template_json=value.get("taskTemplate"),
    )
    if template:
        template.done()
    fields.done()
    return spec


def read_task(value: Any, number: int) -> TaskSpec:
    """Read a ``Task`` of a request. Data inputs and outputs need the platform's data client: refused."""
    fields = Fields(value, f"tasks[{number}]")
    fields.ignore("id", "status", "retryCount", "taskGroupId")
    name = fields.text("name")
    data = fields.fields("data")
    if data is not None:
        data.done()
    spec = TaskSpec(
        name=None if name is None else check_name(f"tasks[{number}].name", name),
        tag=fields.tag("tag"),
        task_type=fields.text("taskType"),
        arguments=fields.arguments("arguments"),
        task_data=fields.text("taskData"),
        environment=fields.environment("environment"),
        timeout=fields.duration("timeout"),
    )
    fields.done()
    return spec


class WorkAsk(NamedTuple):
    """A work requirement as a client describes it; the id only where it sends back a known one."""

    id: str | None
    namespace: str
    name: str
    tag: str | None
    priority: float
    groups: list[GroupSpec]


def read_work(value: Any) -> WorkAsk:
    """Read a ``WorkRequirement``; fields that the platform sets are passed over."""
    fields = Fields(value, "workRequirement")
    fields.ignore("createdTime", "status", "statusChangedTime")
    groups = fields.objects("taskGroups")
    if len(groups) > MAX_GROUPS:
        raise RefusedError.invalid(
            f"A work requirement has at most {MAX_GROUPS} task groups, not {len(groups)}"
        )
    ask = WorkAsk(
        id=fields.text("id"),
        namespace=fields.name("namespace"),
        name=fields.name("name"),
        tag=fields.tag("tag"),
        priority=fields.number("priority", 0),
        groups=[read_group(each, number) for number, each in enumerate(groups)],
    )
    fields.done()
    return ask
