"""What clients ask for, read from JSON and checked: nothing wrong or unsupported gets past here.

A field that this platform does not know or cannot honour is refused by its name, unless it is empty:
an answer that silently leaves something out would make a test pass that fails on the real platform.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from yellowdog_ray.local.asks import (
    AutoShutdown,
    GroupSpec,
    PoolSpec,
    Range,
    RefusedError,
    RunSpec,
    TaskSpec,
    Usage,
)
from yellowdog_ray.local.entities import TaskError
from yellowdog_ray.local.vocabulary import ERROR_TYPES, PRICING, PROVIDERS, TASK_STATUSES

__all__ = [
    "MAX_GROUPS",
    "MAX_NAME",
    "MAX_NODES",
    "MAX_TAG",
    "Fields",
    "WorkAsk",
    "check_name",
    "matches_deprecated",
    "read_auto_shutdown",
    "read_group",
    "read_pool",
    "read_task",
    "read_usage",
    "read_work",
    "seconds",
    "selects",
]

# YellowDog's own limits (SDK: Tagged.MAX_TAG_LENGTH, WorkRequirement.TASK_GROUPS_MAX; documentation).
MAX_NAME = 60
MAX_TAG = 200
MAX_GROUPS = 1000
MAX_NODES = 10_000
# A hundred years: what is added to a time must give one that can be written.
MAX_DAYS = 36_500

_NAME = re.compile(r"^[a-z][a-z0-9_-]*[a-z0-9]$")
_DURATION = re.compile(
    r"^P(?:(?P<weeks>\d+)W)?(?:(?P<days>\d+(?:\.\d+)?)D)?"
    r"(?:T(?:(?P<hours>\d+(?:\.\d+)?)H)?(?:(?P<minutes>\d+(?:\.\d+)?)M)?(?:(?P<seconds>\d+(?:\.\d+)?)S)?)?$"
)
_SURROGATE = re.compile("[\ud800-\udfff]")
_UNIT = {"weeks": 604800.0, "days": 86400.0, "hours": 3600.0, "minutes": 60.0, "seconds": 1.0}


def seconds(text: str) -> float | None:
    """Read an ISO-8601 duration as seconds (``P0D``, ``PT3M``, ``P1DT2H1.5S``); None if it is not one."""
    found = _DURATION.match(text)
    if found is None or text.endswith(("P", "T")):
        return None
    return sum(float(value) * _UNIT[unit] for unit, value in found.groupdict().items() if value)


def _finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number that no float can hold
        return False


def check_name(what: str, name: str) -> str:
    """Return a name that follows YellowDog's rule, else refuse it."""
    if len(name) > MAX_NAME or not _NAME.match(name):
        raise RefusedError.invalid(
            f"{what} {name!r} is not a valid name: it must match {_NAME.pattern} "
            f"and be at most {MAX_NAME} characters long"
        )
    return name


class Fields:
    """A JSON object under inspection: each field is read by name and kind, and leftovers are refused.

    :param value: what stands in the request.
    :param where: how an error names this object, e.g. ``taskGroups[0]``.
    """

    def __init__(self, value: Any, where: str) -> None:
        if not isinstance(value, dict):
            raise RefusedError.invalid(f"{where} must be a JSON object")
        self._value: dict[str, Any] = value
        self._where = where
        self._seen: set[str] = set()

    def get(self, key: str) -> Any:
        self._seen.add(key)
        return self._value.get(key)

    def bad(self, key: str, wanted: str) -> RefusedError:
        return RefusedError.invalid(f"{self._where}.{key} must be {wanted}")

    def _typed(self, key: str, kinds: tuple[type, ...], wanted: str) -> Any:
        value = self.get(key)
        if value is None:
            return None
        # To Python, True is an int; to JSON it is no number.
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise self.bad(key, wanted)
        # To Python's JSON, 1e999 is a number too.
        if isinstance(value, (int, float)) and not _finite(value):
            raise self.bad(key, wanted)
        self._check_text(key, value)
        return value

    def _check_text(self, key: str, value: Any) -> None:
        """Refuse a text that cannot be written down: half of a pair that stands for one character."""
        texts = [value] if isinstance(value, str) else value if isinstance(value, list) else ()
        if isinstance(value, dict):
            texts = [*value, *value.values()]
        for text in texts:
            if isinstance(text, str) and not text.isascii() and _SURROGATE.search(text):
                raise self.bad(key, "text that UTF-8 can hold, without lone surrogates")

    def text(self, key: str) -> str | None:
        value: str | None = self._typed(key, (str,), "text")
        return value

    def need(self, key: str) -> str:
        value = self.text(key)
        if not value:
            raise RefusedError.invalid(f"{self._where}.{key} is required")
        return value

    def name(self, key: str) -> str:
        return check_name(f"{self._where}.{key}", self.need(key))

    def tag(self, key: str) -> str | None:
        value = self.text(key)
        if value is not None and len(value) > MAX_TAG:
            raise RefusedError.invalid(f"{self._where}.{key} is longer than {MAX_TAG} characters")
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self._typed(key, (bool,), "true or false")
        return default if value is None else bool(value)

    def number(self, key: str, default: float) -> float:
        value = self._typed(key, (int, float), "a number")
        return default if value is None else float(value)

    def whole(self, key: str, low: int = 0, high: int | None = None) -> int | None:
        value = self._typed(key, (int, float), "a whole number")
        if value is None:
            return None
        if value != int(value) or value < low or (high is not None and value > high):
            bounds = f"from {low}" + (f" to {high}" if high is not None else "")
            raise self.bad(key, f"a whole number {bounds}, not {value}")
        return int(value)

    def duration(self, key: str) -> float | None:
        value = self.text(key)
        if value is None:
            return None
        read = seconds(value)
        if read is None:
            raise self.bad(key, f"an ISO-8601 duration such as PT10M, not {value!r}")
        if read > MAX_DAYS * 86400:
            raise self.bad(key, f"at most {MAX_DAYS} days")
        return read

    def strings(self, key: str) -> tuple[str, ...] | None:
        value = self._typed(key, (list,), "a list of texts")
        if value is None:
            return None
        if not all(isinstance(each, str) for each in value):
            raise self.bad(key, "a list of texts")
        return tuple(value)

    def mapping(self, key: str) -> dict[str, str] | None:
        value = self._typed(key, (dict,), "an object of texts")
        if value is None:
            return None
        if not all(isinstance(each, str) for each in value.values()):
            raise self.bad(key, "an object of texts")
        return dict(value)

    def arguments(self, key: str) -> tuple[str, ...] | None:
        """Read what a process can be started with: a NUL would end an argument."""
        value = self.strings(key)
        if any("\0" in each for each in value or ()):
            raise self.bad(key, "texts without NUL characters")
        return value

    def environment(self, key: str) -> dict[str, str] | None:
        """Read variables that a process can have."""
        value = self.mapping(key)
        for name, content in (value or {}).items():
            if not name or "=" in name or "\0" in name:
                raise self.bad(key, f"variables whose names are not empty, without = and NUL, not {name!r}")
            if "\0" in content:
                raise self.bad(key, f"variables without NUL characters, which {name} has")
        return value

    def span(self, key: str) -> Range:
        inner = self.fields(key)
        if inner is None:
            return Range(None, None)
        low = inner._typed("min", (int, float), "a number")
        high = inner._typed("max", (int, float), "a number")
        inner.done()
        if low is not None and high is not None and low > high:
            raise self.bad(key, f"a range: min {low} is more than max {high}")
        return Range(low, high)

    def objects(self, key: str) -> list[Any]:
        value = self._typed(key, (list,), "a list")
        return list(value or [])

    def fields(self, key: str) -> Fields | None:
        value = self.get(key)
        return None if value is None else Fields(value, f"{self._where}.{key}")

    def ignore(self, *keys: str) -> None:
        """Skip fields that the platform itself sets, and that clients send back."""
        self._seen.update(keys)

    def done(self) -> None:
        """Refuse every field that holds something and was not read; false and 0 are something."""
        nothing: tuple[Any, ...] = (None, "", [], {})
        left = [key for key, value in self._value.items() if key not in self._seen and value not in nothing]
        if left:
            raise RefusedError.invalid(
                f"{self._where}.{left[0]} is not supported by the local platform"
                + (f" (nor are {', '.join(left[1:])})" if left[1:] else "")
            )


def read_auto_shutdown(fields: Fields | None) -> AutoShutdown | None:
    """Read an ``AutoShutdown``: a timeout without ``enabled`` enables it."""
    if fields is None:
        return None
    timeout = fields.duration("timeout")
    enabled = fields.flag("enabled", timeout is not None)
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
        auto_shutdown=read_auto_shutdown(fields.fields("autoShutdown")),
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


# What an error can be chosen by, and the words that it can have there; an exit code is a number.
_ERROR_PARTS: Mapping[str, frozenset[str] | None] = {
    "errorTypes": ERROR_TYPES,
    "statusesAtFailure": TASK_STATUSES,
    "processExitCodes": None,
}


def _check_part(where: str, known: frozenset[str] | None, values: Iterable[Any]) -> None:
    """Refuse a value that no error ever has: nothing would be retried, without a word."""
    for value in values:
        if known is None and (isinstance(value, bool) or not isinstance(value, int)):
            raise RefusedError.invalid(f"{where} must be whole numbers, not {value!r}")
        if known is not None and value not in known:
            raise RefusedError.invalid(f"{where} must be of {', '.join(sorted(known))}, not {value!r}")


def _check_selection(value: Any, where: str, part: str | None = None) -> Any:
    """Return a ``Selection`` of error selectors, or of the values of one part of them, that is right."""
    if value is None:
        return None
    fields = Fields(value, where)
    for key in ("includes", "excludes"):
        values = fields.objects(key)
        if part is not None:
            _check_part(f"{where}.{key}", _ERROR_PARTS[part], values)
            continue
        for number, each in enumerate(values):
            selector = Fields(each, f"{where}.{key}[{number}]")
            for name in _ERROR_PARTS:
                _check_selection(selector.get(name), f"{where}.{key}[{number}].{name}", name)
            selector.done()
    fields.done()
    return value


def _check_matchers(value: Any) -> Any:
    for number, each in enumerate(value or ()):
        matcher = Fields(each, f"retryableErrors[{number}]")
        for key, known in _ERROR_PARTS.items():
            _check_part(f"retryableErrors[{number}].{key}", known, matcher.objects(key))
        matcher.done()
    return value


def _read_run(fields: Fields, raw: Mapping[str, Any]) -> RunSpec:
    retries = fields.whole("maximumTaskRetries") or 0
    retryable = _check_matchers(fields.objects("retryableErrors")) or None
    policy, retry_errors = fields.fields("retryPolicy"), None
    if policy is not None:
        if retryable:
            raise fields.bad("retryableErrors", "left out where there is a retryPolicy")
        retries = policy.whole("maxRetries") or 0
        retry_errors = _check_selection(policy.get("retryErrors"), "retryPolicy.retryErrors")
        policy.done()
    destinations: list[tuple[str, Mapping[str, Any] | None]] = []
    failure = fields.fields("failurePolicy")
    if failure is not None:
        for number, each in enumerate(failure.objects("resubmissionDestinations")):
            one = Fields(each, f"resubmissionDestinations[{number}]")
            errors = _check_selection(one.get("resubmitErrors"), "resubmitErrors")
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


# --------------------------------------------------------------------- retry and failure policies


def _one_of(selection: Mapping[str, Any] | None, value: object) -> bool:
    """Apply a ``Selection`` of plain values (SDK, ``Selection``: includes first, then excludes)."""
    if selection is None:
        return True
    includes, excludes = selection.get("includes") or (), selection.get("excludes") or ()
    if not includes and not excludes:
        return False
    return (not includes or value in includes) and value not in excludes


def _selector_matches(selector: Mapping[str, Any], error: TaskError) -> bool:
    return (
        _one_of(selector.get("errorTypes"), error.error_type)
        and _one_of(selector.get("statusesAtFailure"), error.status_at_failure)
        and _one_of(selector.get("processExitCodes"), error.exit_code)
    )


def selects(selection: Mapping[str, Any] | None, error: TaskError) -> bool:
    """Say whether a ``Selection`` of ``TaskErrorSelector`` picks an error; no selection picks all."""
    if selection is None:
        return True
    includes: Iterable[Any] = selection.get("includes") or ()
    excludes: Iterable[Any] = selection.get("excludes") or ()
    if not includes and not excludes:
        return False
    return (not includes or any(_selector_matches(each, error) for each in includes)) and not any(
        _selector_matches(each, error) for each in excludes
    )


def matches_deprecated(matchers: Sequence[Mapping[str, Any]] | None, error: TaskError) -> bool:
    """Say whether one of the deprecated ``retryableErrors`` matches; none given matches all."""
    if not matchers:
        return True
    return any(
        (not each.get("errorTypes") or error.error_type in each["errorTypes"])
        and (not each.get("statusesAtFailure") or error.status_at_failure in each["statusesAtFailure"])
        and (not each.get("processExitCodes") or error.exit_code in each["processExitCodes"])
        for each in matchers
    )


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
