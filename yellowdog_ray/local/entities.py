"""What the embedded platform keeps about each thing that exists on it."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

from yellowdog_ray.local.asks import AutoShutdown, GroupSpec, PoolSpec, RunSpec, TaskSpec, Template, Usage

__all__ = [
    "ComputeRequirement",
    "Instance",
    "Node",
    "Pool",
    "Shape",
    "Task",
    "TaskError",
    "TaskGroup",
    "WorkRequirement",
    "Worker",
]


# ----------------------------------------------------------------------------------------- machines


class Shape(NamedTuple):
    """All that decides whether a task group can use a node; nodes of one pool mostly share one."""

    pool_id: str
    tag: str | None
    namespace: str
    provider: str
    region: str
    instance_type: str
    vcpus: float
    ram: float
    task_types: frozenset[str]

    def suits(self, run: RunSpec) -> bool:
        """Say whether a group with this run specification may use such a node.

        Local machines are on-demand: a group that takes spot machines only never matches.
        """
        return (
            (not run.worker_tags or self.tag in run.worker_tags)
            and (not run.namespaces or self.namespace in run.namespaces)
            and (not run.providers or self.provider in run.providers)
            and (not run.regions or self.region in run.regions)
            and (not run.instance_types or self.instance_type in run.instance_types)
            and run.task_types <= self.task_types
            and self.vcpus in run.vcpus
            and self.ram in run.ram
            and run.pricing != "SPOT_ONLY"
        )


@dataclass(eq=False)
class Instance:
    """A machine of a compute requirement."""

    id: str
    requirement: ComputeRequirement
    hostname: str
    created: float
    changed: float
    status: str = "PENDING"
    private_ip: str | None = None
    public_ip: str | None = None
    reason: str | None = None
    node: Node | None = None


@dataclass(eq=False)
class ComputeRequirement:
    """Machines that were asked for together."""

    id: str
    usage: Usage
    template: Template
    source_id: str
    target: int
    created: float
    changed: float
    status: str = "NEW"
    source_status: str = "NEW"
    source_message: str | None = None
    auto_shutdown: AutoShutdown | None = None
    auto_shutdown_time: float | None = None
    pool: Pool | None = None
    instances: dict[str, Instance] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    updated: float = 0

    @property
    def pending(self) -> int:
        """How many machines are booting."""
        return self.counts.get("PENDING", 0)

    @property
    def alive(self) -> int:
        """How many machines are booting or up."""
        return self.counts.get("PENDING", 0) + self.counts.get("RUNNING", 0)


@dataclass(eq=False)
class Pool:
    """A provisioned worker pool."""

    id: str
    name: str
    namespace: str
    spec: PoolSpec
    requirement: ComputeRequirement
    max_nodes: int
    #: What its nodes are expected to be like, before any has registered.
    shape: Shape
    created: float
    changed: float
    updated: float
    status: str = "PENDING"
    nodes: dict[str, Node] = field(default_factory=dict)
    node_counts: dict[str, int] = field(default_factory=dict)
    worker_counts: dict[str, int] = field(default_factory=dict)
    shapes: set[Shape] = field(default_factory=set)
    claimed: int = 0
    busy: int = 0
    #: Nodes that end with their running tasks; their machines are still up.
    draining: int = 0
    #: Other nodes that will go because their machine will.
    cordoned: int = 0
    last_claimed: float | None = None
    last_released: float | None = None
    idle_since: float | None = None
    idle_armed: bool = False
    boot_failures: int = 0
    retry_at: float = 0

    @property
    def finished(self) -> bool:
        """Whether it takes no more work, for good."""
        return self.status in ("SHUTDOWN", "TERMINATED")

    @property
    def workers(self) -> int:
        """How many workers it has that can be used."""
        return self.worker_counts.get("STOPPED", 0) + self.worker_counts.get("RUNNING", 0)


@dataclass(eq=False)
class Node:
    """A machine of a worker pool whose agent has registered."""

    id: str
    pool: Pool
    instance: Instance
    shape: Shape
    registered: float
    changed: float
    status: str = "RUNNING"
    deregistered: float | None = None
    workers: list[Worker] = field(default_factory=list)
    claimed: int = 0
    busy: int = 0
    draining: bool = False
    #: Whether it takes no more tasks because its machine will go, which nobody has asked for.
    cordoned: bool = False
    idle_since: float | None = None
    idle_armed: bool = False

    @property
    def usable(self) -> bool:
        """Whether it may be given tasks."""
        waits = self.draining or self.cordoned
        return self.status == "RUNNING" and not waits and not self.pool.finished


@dataclass(eq=False)
class Worker:
    """A place on a node where one task runs at a time."""

    id: str
    node: Node
    slot: int
    registered: float
    status: str = "STOPPED"
    group: TaskGroup | None = None
    task: Task | None = None


# --------------------------------------------------------------------------------------------- work


@dataclass(frozen=True)
class TaskError:
    """Why one attempt of a task came to nothing."""

    time: float
    error: str
    error_type: str
    status_at_failure: str
    node_id: str | None = None
    worker_id: str | None = None
    exit_code: int | None = None
    caused_failure: bool = False


@dataclass(eq=False)
class Task:
    """A task, and the attempt of it that is under way."""

    id: str
    group: TaskGroup
    spec: TaskSpec
    status: str
    errors: list[TaskError] = field(default_factory=list)
    retries: int = 0
    attempts: int = 0
    run_id: str | None = None
    worker: Worker | None = None
    node_id: str | None = None
    worker_id: str | None = None
    allocated: float | None = None
    started: float | None = None
    finished: float | None = None
    abort_requested: float | None = None
    timed_out: bool = False
    resubmitted_to: str | None = None
    resubmitted_from: str | None = None

    @property
    def run_name(self) -> str:
        """The name of its latest attempt, as the machines know it."""
        return f"{self.id.replace(':', '_')}-{self.attempts}"

    @property
    def task_type(self) -> str | None:
        """Its own type, else its group's template's, else the only one that its group names."""
        own = self.spec.task_type or self.group.spec.task_type
        types = self.group.spec.run.task_types
        return own or (next(iter(types)) if len(types) == 1 else None)


@dataclass(eq=False)
class TaskGroup:
    """A group of tasks that run under the same specification."""

    id: str
    work: WorkRequirement
    spec: GroupSpec
    number: int
    priority: float
    tag: str | None
    changed: float
    updated: float
    status: str = "PENDING"
    tasks: list[Task] = field(default_factory=list)
    names: set[str] = field(default_factory=set)
    counts: dict[str, int] = field(default_factory=dict)
    ready: deque[Task] = field(default_factory=deque)
    claimed: int = 0
    # Workers that are claimed and wait for minWorkers to be met, or are kept because of it.
    kept: dict[str, Worker] = field(default_factory=dict)
    matches: dict[Shape, bool] = field(default_factory=dict)
    blocked: bool = False

    @property
    def terminated(self) -> bool:
        """Whether it has ended."""
        return self.status in ("COMPLETED", "FAILED", "CANCELLED")

    @property
    def active(self) -> bool:
        """Whether its tasks may be given to workers."""
        return self.status in ("PENDING", "RUNNING", "FINISHING") and not self.blocked

    @property
    def min_workers(self) -> int:
        """How many workers it must have claimed to start; a finishing group must have none."""
        return 0 if self.status == "FINISHING" else self.spec.run.min_workers

    @property
    def in_progress(self) -> int:
        """How many of its tasks are with a worker."""
        return self.counts.get("ALLOCATED", 0) + self.counts.get("EXECUTING", 0)

    @property
    def waiting(self) -> int:
        """How many of its tasks wait for a worker or for another group."""
        return self.counts.get("READY", 0) + self.counts.get("PENDING", 0)

    @property
    def starved(self) -> bool:
        """Whether it has tasks to run and no worker at all."""
        return self.active and self.counts.get("READY", 0) > 0 and self.claimed == 0

    def may_use(self, shape: Shape) -> bool:
        """Say whether its tasks may run on such a node."""
        known = self.matches.get(shape)
        if known is None:
            known = self.matches[shape] = shape.suits(self.spec.run)
        return known

    def room(self) -> int:
        """Return how many more workers it may claim.

        ``tasksPerWorker`` splits the unfinished tasks across workers; ``minWorkers`` may always be
        claimed, ``maxWorkers`` bounds the whole.
        """
        run = self.spec.run
        unfinished = self.in_progress + self.waiting
        per_worker = run.tasks_per_worker or 1
        wanted = max(self.min_workers, -(-unfinished // per_worker))
        if run.max_workers is not None:
            wanted = min(wanted, run.max_workers)
        return wanted - self.claimed

    def wanted(self) -> int:
        """Return how many more workers it could use now."""
        short = max(0, self.min_workers - self.claimed)
        return max(0, min(self.room(), max(short, self.counts.get("READY", 0))))


@dataclass(eq=False)
class WorkRequirement:
    """A requirement for work: groups of tasks."""

    id: str
    namespace: str
    name: str
    tag: str | None
    priority: float
    created: float
    changed: float
    status: str = "RUNNING"
    groups: list[TaskGroup] = field(default_factory=list)
    by_name: dict[str, TaskGroup] = field(default_factory=dict)
    open_groups: int = 0

    @property
    def finished(self) -> bool:
        """Whether it has ended."""
        return self.status in ("COMPLETED", "FAILED", "CANCELLED")
