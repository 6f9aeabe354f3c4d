"""What passes between the scheduler and the machines: effects go out, events come in.

The scheduler knows no process and the machines know no task group. All that they share is here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

__all__ = [
    "AbortTask",
    "Effect",
    "Event",
    "NodeBackend",
    "NodeFailed",
    "NodeLost",
    "NodeRegistered",
    "NodeStopped",
    "StartNode",
    "StartTask",
    "StopNode",
    "TaskExited",
    "TaskNotStarted",
    "TaskStarted",
]


@dataclass(frozen=True)
class StartNode:
    """Boot the machine of an instance.

    :param hostname: the name that the machine gives itself, at most 63 characters.
    :param vcpus: the number of virtual CPUs that it is to show.
    :param ram: its memory in GiB.
    """

    instance_id: str
    hostname: str
    instance_type: str
    region: str
    provider: str
    vcpus: float
    ram: float


@dataclass(frozen=True)
class StopNode:
    """End the machine of an instance at once, with all its processes."""

    instance_id: str


@dataclass(frozen=True)
class StartTask:
    """Run one attempt of a task on a machine.

    :param run_id: the name of this attempt, never used twice.
    :param slot: the number of the worker on its node, from 0.
    """

    run_id: str
    instance_id: str
    slot: int
    task_id: str
    task_group_id: str
    task_type: str
    arguments: Sequence[str] = ()
    task_data: str | None = None
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class AbortTask:
    """Ask a running attempt to end: SIGTERM, and SIGKILL after the grace period."""

    run_id: str
    instance_id: str


Effect = StartNode | StopNode | StartTask | AbortTask


@dataclass(frozen=True)
class NodeRegistered:
    """The agent on a machine is up and takes tasks.

    :param public_ip: the address at which the user's machine reaches it, None if there is none.
    """

    instance_id: str
    hostname: str
    private_ip: str
    public_ip: str | None
    vcpus: float
    ram: float
    task_types: Sequence[str] = ("bash",)


@dataclass(frozen=True)
class NodeFailed:
    """A machine could not boot."""

    instance_id: str
    reason: str


@dataclass(frozen=True)
class NodeStopped:
    """A machine that was told to stop is gone."""

    instance_id: str


@dataclass(frozen=True)
class NodeLost:
    """A machine died without being told to."""

    instance_id: str
    reason: str


@dataclass(frozen=True)
class TaskStarted:
    """The process of an attempt is running."""

    run_id: str


@dataclass(frozen=True)
class TaskExited:
    """The process of an attempt has ended.

    :param exit_code: 128 + n for a process that signal n ended, as a shell says it.
    :param output_tail: the last lines of what it printed.
    :param reason: why the machine ended it; empty where it did not.
    """

    run_id: str
    exit_code: int
    output_tail: str = ""
    reason: str = ""


@dataclass(frozen=True)
class TaskNotStarted:
    """An attempt could not be started."""

    run_id: str
    reason: str


Event = NodeRegistered | NodeFailed | NodeStopped | NodeLost | TaskStarted | TaskExited | TaskNotStarted


class NodeBackend(Protocol):
    """What carries effects out. It never blocks; its events come through the callback it was given."""

    def apply(self, effect: Effect) -> None:
        """Begin to carry out an effect."""
