"""What clients ask of the embedded platform, as values that have been checked; and how it refuses.

:mod:`~yellowdog_ray.local.intake` makes these values out of JSON.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

__all__ = [
    "AutoShutdown",
    "GroupSpec",
    "PoolSpec",
    "Range",
    "RefusedError",
    "RunSpec",
    "TaskSpec",
    "Template",
    "Usage",
]


class RefusedError(Exception):
    """A request that the platform refuses.

    :param status: the HTTP status of the answer.
    :param error_type: the ``errorType`` of the answer. The SDK turns three of them
        (``InvalidRequestException``, ``NotAuthorisedException``, ``InternalServerException``) into
        exceptions of its own; any other reaches the caller as ``requests.HTTPError``.
    :param message: what is wrong, for a person.
    """

    def __init__(self, status: int, error_type: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.error_type = error_type
        self.message = message

    @classmethod
    def invalid(cls, message: str) -> RefusedError:
        """Refuse a request that cannot be right."""
        return cls(400, "InvalidRequestException", message)

    @classmethod
    def not_found(cls, message: str) -> RefusedError:
        """Refuse a request for something that is not there (never an ``InvalidRequestException``)."""
        return cls(404, "NotFoundException", message)


class Range(NamedTuple):
    """A span of numbers; None is no bound."""

    low: float | None
    high: float | None

    def __contains__(self, value: object) -> bool:
        if not isinstance(value, (int, float)):
            return False
        return (self.low is None or value >= self.low) and (self.high is None or value <= self.high)


_ANY = Range(None, None)


class AutoShutdown(NamedTuple):
    """Whether something ends by itself, and after how many seconds."""

    enabled: bool
    timeout: float | None

    @property
    def seconds(self) -> float | None:
        """The timeout where there is one in force, else None."""
        return self.timeout if self.enabled else None


@dataclass(frozen=True)
class Template:
    """A compute requirement template: what a machine made from it is like.

    :param id: its YDID, ``ydid:crt:...``.
    :param ram: memory in GiB.
    :param task_types: what its agent will run; only used to judge demand before a node has registered.
    """

    namespace: str
    name: str
    id: str
    instance_type: str
    vcpus: float
    ram: float
    region: str
    provider: str = "ON_PREMISE"
    task_types: tuple[str, ...] = ("bash",)


@dataclass(frozen=True)
class Usage:
    """A request to provision from a template (``ComputeRequirementTemplateUsage``)."""

    template_id: str
    name: str
    namespace: str
    tag: str | None
    target: int
    images_id: str | None
    instance_tags: Mapping[str, str]
    maintain: bool
    auto_shutdown: AutoShutdown | None


@dataclass(frozen=True)
class PoolSpec:
    """The properties of a provisioned worker pool; None where the client named none."""

    per_node: float = 1
    per_vcpu: bool = False
    min_nodes: int = 0
    max_nodes: int | None = None
    boot_timeout: float | None = None
    idle_node: AutoShutdown | None = None
    idle_pool: AutoShutdown | None = None
    worker_tag: str | None = None
    json: Mapping[str, Any] = field(default_factory=dict, compare=False)

    def workers_on(self, vcpus: float) -> int:
        """Return how many workers a node of so many CPUs gets (at least one for PER_VCPU)."""
        return max(1, int(self.per_node * vcpus)) if self.per_vcpu else int(self.per_node)


@dataclass(frozen=True)
class RunSpec:
    """A task group's run specification; an empty constraint allows everything."""

    task_types: frozenset[str]
    instance_types: frozenset[str] = frozenset()
    pricing: str | None = None
    vcpus: Range = _ANY
    ram: Range = _ANY
    min_workers: int = 0
    max_workers: int | None = None
    tasks_per_worker: int | None = None
    timeout: float | None = None
    providers: frozenset[str] = frozenset()
    regions: frozenset[str] = frozenset()
    worker_tags: frozenset[str] = frozenset()
    namespaces: frozenset[str] = frozenset()
    max_retries: int = 0
    # The raw selections of the retry and failure policies; see ``selects``.
    retry_errors: Mapping[str, Any] | None = None
    retryable: Sequence[Mapping[str, Any]] | None = None
    destinations: tuple[tuple[str, Mapping[str, Any] | None], ...] = ()
    json: Mapping[str, Any] = field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class GroupSpec:
    """A task group as the client describes it."""

    name: str
    run: RunSpec
    tag: str | None = None
    priority: float = 0
    dependencies: tuple[str, ...] = ()
    finish_when_done: bool = True
    finish_when_failed: bool = False
    task_type: str | None = None
    task_data: str | None = None
    environment: Mapping[str, str] | None = None
    completed_task_ttl: str | None = None
    template_json: Mapping[str, Any] | None = field(default=None, compare=False)


@dataclass(frozen=True)
class TaskSpec:
    """A task as the client describes it."""

    name: str | None = None
    tag: str | None = None
    task_type: str | None = None
    arguments: tuple[str, ...] | None = None
    task_data: str | None = None
    environment: Mapping[str, str] | None = None
    timeout: float | None = None
