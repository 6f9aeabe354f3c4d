"""What happens to a cluster, as it happens: typed events for a callback, for the log and for a display.

Every event is a sentence (``str(event)``) and the values that it is made of. They are handed out in the
thread in which they happen; several may come at once.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from yellowdog_ray.raydog.plan import Role

__all__ = [
    "BuildFailed",
    "BuildFinished",
    "BuildStarted",
    "CallRetried",
    "Emitter",
    "Event",
    "HeadFailed",
    "NodeRegistered",
    "PoolAdded",
    "PoolProvisioned",
    "PoolRemoved",
    "PoolScaled",
    "RollbackStarted",
    "ShutdownFailed",
    "ShutdownFinished",
    "ShutdownStarted",
    "TaskExecuting",
    "TasksSubmitted",
    "Waiting",
    "WorkRequirementAdded",
    "WorkersCounted",
]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Event:
    """Something that happened to a cluster.

    :param cluster: the cluster's name.
    """

    cluster: str


@dataclass(frozen=True)
class BuildStarted(Event):
    """A build begins.

    :param pools: the names of all pools that will be provisioned.
    :param nodes: how many nodes they have in all.
    """

    pools: tuple[str, ...]
    nodes: int

    def __str__(self) -> str:
        return f"Building the cluster {self.cluster}: {self.nodes} nodes in {len(self.pools)} pools"


@dataclass(frozen=True)
class WorkRequirementAdded(Event):
    """The cluster's work requirement is there."""

    id: str

    def __str__(self) -> str:
        return f"Added the work requirement {self.cluster} ({self.id})"


@dataclass(frozen=True)
class PoolProvisioned(Event):
    """A pool is there; its nodes are booting."""

    pool: str
    id: str
    nodes: int

    def __str__(self) -> str:
        return f"Provisioned the worker pool {self.pool} ({self.id}) of {self.nodes}"


@dataclass(frozen=True)
class NodeRegistered(Event):
    """The head or the observability node has come up."""

    role: Role
    node_id: str
    private_ip: str
    public_ip: str | None

    def __str__(self) -> str:
        return f"The {self.role} node is up at {self.private_ip}"


@dataclass(frozen=True)
class TasksSubmitted(Event):
    """The tasks of a pool are submitted; each starts as soon as there is a node for it."""

    pool: str
    tasks: int

    def __str__(self) -> str:
        return f"Submitted {self.tasks} tasks to {self.pool}"


@dataclass(frozen=True)
class TaskExecuting(Event):
    """The head's or the observability node's task executes."""

    role: Role
    task_id: str

    def __str__(self) -> str:
        return f"The {self.role} node's task is executing"


@dataclass(frozen=True)
class Waiting(Event):
    """Something is being waited for, and why. It comes again from time to time while the wait lasts.

    :param seconds: how long it has been waited for.
    """

    what: str
    seconds: float

    def __str__(self) -> str:
        return f"Waiting for {self.what} ({self.seconds:.0f} s)"


@dataclass(frozen=True)
class CallRetried(Event):
    """A call to the platform failed for a reason that may pass, and is tried again."""

    what: str
    reason: str

    def __str__(self) -> str:
        return f"Trying again to {self.what}: {self.reason}"


@dataclass(frozen=True)
class BuildFinished(Event):
    """The cluster is built."""

    seconds: float
    private_ip: str
    public_ip: str | None

    def __str__(self) -> str:
        return f"Built the cluster {self.cluster} in {self.seconds:.1f} s; its head is at {self.private_ip}"


@dataclass(frozen=True)
class RollbackStarted(Event):
    """What a failed build or addition had created is being taken back."""

    reason: str

    def __str__(self) -> str:
        return f"Taking back what has been created, because of: {self.reason}"


@dataclass(frozen=True)
class BuildFailed(Event):
    """A build has failed.

    :param left: what may still be running; empty where everything was taken back.
    """

    reason: str
    left: tuple[str, ...]

    def __str__(self) -> str:
        rest = f"; may still be running: {', '.join(self.left)}" if self.left else ""
        return f"The build of {self.cluster} failed: {self.reason}{rest}"


@dataclass(frozen=True)
class PoolAdded(Event):
    """A worker pool was added to the running cluster."""

    pool: str
    internal_name: str
    nodes: int

    def __str__(self) -> str:
        return f"Added the worker pool {self.internal_name} of {self.nodes}"


@dataclass(frozen=True)
class PoolRemoved(Event):
    """A worker pool was removed from the running cluster."""

    pool: str
    internal_name: str

    def __str__(self) -> str:
        return f"Removed the worker pool {self.internal_name}"


@dataclass(frozen=True)
class PoolScaled(Event):
    """A worker pool got another number of nodes.

    :param before: how many it had.
    :param nodes: how many it has now, the ones that are booting included.
    """

    pool: str
    internal_name: str
    before: int
    nodes: int

    def __str__(self) -> str:
        return f"Scaled the worker pool {self.internal_name} from {self.before} to {self.nodes}"


@dataclass(frozen=True)
class WorkersCounted(Event):
    """How many workers there are, while they are waited for. It comes when the number changes.

    :param source: who counted them: ``"ray"``, the nodes that Ray reports alive, or ``"tasks"``, the worker
        tasks that execute on the platform.
    """

    have: int
    want: int
    source: Literal["ray", "tasks"]

    def __str__(self) -> str:
        unit = "worker nodes are alive in Ray" if self.source == "ray" else "worker tasks are executing"
        return f"{self.have} of {self.want} {unit}"


@dataclass(frozen=True)
class HeadFailed(Event):
    """The head of a running cluster has ended, by itself or by another process; the cluster is shut down."""

    reason: str

    def __str__(self) -> str:
        return f"The cluster {self.cluster} is shut down, because {self.reason}"


@dataclass(frozen=True)
class ShutdownStarted(Event):
    """A shut-down begins.

    :param items: what is to end.
    """

    items: tuple[str, ...]

    def __str__(self) -> str:
        return f"Shutting the cluster {self.cluster} down"


@dataclass(frozen=True)
class ShutdownFinished(Event):
    """Everything of the cluster has been verified as ended."""

    seconds: float

    def __str__(self) -> str:
        return f"Shut the cluster {self.cluster} down in {self.seconds:.1f} s"


@dataclass(frozen=True)
class ShutdownFailed(Event):
    """Not everything could be verified as ended.

    :param left: what may still be running.
    """

    reason: str
    left: tuple[str, ...]

    def __str__(self) -> str:
        return f"Not everything of {self.cluster} has ended; may still be running: {', '.join(self.left)}"


Listener = Callable[[Event], object]

_LEVELS: dict[type[Event], int] = {
    BuildFailed: logging.WARNING,
    RollbackStarted: logging.WARNING,
    HeadFailed: logging.ERROR,
    ShutdownFailed: logging.ERROR,
}


class Emitter:
    """Hands events to the log and to listeners, whose own faults change nothing for the cluster."""

    def __init__(self, *listeners: Listener) -> None:
        self._lock = threading.Lock()
        self._listeners = list(listeners)

    def listen(self, listener: Listener) -> None:
        """Hand the events to one more."""
        with self._lock:
            self._listeners.append(listener)

    def __call__(self, event: Event) -> None:
        log.log(_LEVELS.get(type(event), logging.INFO), "%s", event)
        with self._lock:
            listeners = list(self._listeners)
        for listener in listeners:
            try:
                listener(event)
            except Exception:
                log.warning("A listener of the cluster's events failed", exc_info=True)
