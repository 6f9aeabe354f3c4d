"""Faults of the machines that a platform provisions.

:class:`FaultyMachines` stands between the scheduler and the machines: what is to go wrong goes wrong there,
so neither of them knows of it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, Protocol

from yellowdog_ray.local.clock import Timer
from yellowdog_ray.local.core import ControlPlane
from yellowdog_ray.local.entities import Instance
from yellowdog_ray.local.events import (
    Effect,
    Event,
    NodeBackend,
    NodeFailed,
    NodeLost,
    NodeStopped,
    StartNode,
    StopNode,
)
from yellowdog_ray.local.faults import check_chosen, number, pattern, takes, text

__all__ = ["CapacityLimit", "FaultyMachines", "Machines", "ProvisionFault"]


@dataclass
class ProvisionFault:
    """Something that goes wrong with some of the machines that are provisioned.

    ``count``, ``skip`` and ``hits`` are kept up to date, as they are in a
    :class:`~yellowdog_ray.local.faults.Fault`.

    :param kind: ``"fail"``: the machine does not come; ``"delay"``: it begins to boot late.
    :param pool: a regular expression that is looked for in the name of the worker pool or compute
        requirement; None for all.
    :param count: how many machines it takes; None for all that are provisioned.
    :param skip: how many matching machines it lets pass first.
    :param after: seconds from now until it begins to happen.
    :param for_: seconds for which it happens then; None for as long as it is there.
    :param seconds: how late the machine begins to boot, or is known to have failed.
    :param message: for ``"fail"``, the reason that the platform gives.
    :raises SpecError: when it is no such fault.
    """

    kind: Literal["fail", "delay"]
    pool: str | None = None
    count: int | None = 1
    skip: int = 0
    after: float = 0.0
    for_: float | None = None
    seconds: float = 0.0
    message: str = "injected fault: the machine could not be provisioned"
    hits: int = field(default=0, init=False)
    since: float | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        check_chosen(self)
        number("seconds", self.seconds)
        if self.pool is not None:
            pattern("pool", self.pool)
        text("message", self.message)


@dataclass
class CapacityLimit:
    """How many machines there may be at a time; ``hits`` says how many have been refused.

    :param nodes: the number of machines.
    :param template: the ``namespace/name`` of the template whose machines are counted; None for all.
    :param message: the reason that the platform gives for a machine that is refused.
    """

    nodes: int
    template: str | None
    message: str
    hits: int = field(default=0, init=False)


class Machines(NodeBackend, Protocol):
    """Machines that can be made to go wrong."""

    def lose(self, instance_id: str, reason: str) -> None:
        """Let a machine die without being told to; one that is gone already stays gone."""

    def warn(self, instance_id: str) -> None:
        """Send SIGTERM to every task of a machine, because it is about to go."""

    def kill(self, run_id: str, instance_id: str) -> None:
        """Send SIGKILL to a task's process."""


class FaultyMachines:
    """A backend that lets some of what another one is asked for go wrong.

    :param core: the platform, whose scheduler knows what a machine is for, and whose clock counts.
    :param deliver: gets the events; the backend's own go through :meth:`on_event`.
    """

    def __init__(self, core: ControlPlane, deliver: Callable[[Event], None]) -> None:
        #: The backend that does what goes right.
        self.machines: Machines | None = None
        self.provision: list[ProvisionFault] = []
        self.limits: list[CapacityLimit] = []
        self._core, self._deliver = core, deliver
        # Machines that were asked for and have not ended, with their template; and how many of each.
        self._standing: dict[str, str] = {}
        self._numbers: Counter[str] = Counter()
        # Those that are still to be asked for.
        self._late: dict[str, Timer] = {}
        self._unnoticed: dict[str, float] = {}

    def apply(self, effect: Effect) -> None:
        """Begin to carry out an effect."""
        if isinstance(effect, StartNode):
            self._start(effect)
        elif isinstance(effect, StopNode) and self._cancel_late(effect.instance_id):
            self._soon(NodeStopped(effect.instance_id))
        elif self.machines is not None:
            self.machines.apply(effect)

    def _start(self, start: StartNode) -> None:
        requirement = self._core.scheduler.instances[start.instance_id].requirement
        template = f"{requirement.template.namespace}/{requirement.template.name}"
        now = self._core.timers.time()
        fault = next(
            (
                fault
                for fault in self.provision
                if re.search(fault.pool or "", requirement.usage.name) and takes(fault, now)
            ),
            None,
        )
        self._standing[start.instance_id] = template
        self._numbers[template] += 1
        if fault is not None and fault.kind == "fail":
            self._fail(start.instance_id, fault.message, fault.seconds)
            return
        for limit in self.limits:
            if limit.template in (None, template):
                there = self._numbers[template] if limit.template else len(self._standing)
                if there > limit.nodes:
                    limit.hits += 1
                    self._fail(start.instance_id, limit.message, 0.0)
                    return
        if fault is not None:
            self._late[start.instance_id] = self._core.timers.call_later(
                fault.seconds, self._start_late, start
            )
        elif self.machines is not None:
            self.machines.apply(start)

    def _start_late(self, start: StartNode) -> None:
        if self._late.pop(start.instance_id, None) is not None and self.machines is not None:
            self.machines.apply(start)

    def _fail(self, instance_id: str, reason: str, seconds: float) -> None:
        # It takes no room from the machines that are asked for together with it.
        self._forget(instance_id)
        self._late[instance_id] = self._core.timers.call_later(seconds, self._failed, instance_id, reason)

    def _failed(self, instance_id: str, reason: str) -> None:
        if self._late.pop(instance_id, None) is not None:
            self._deliver(NodeFailed(instance_id, reason))

    def _cancel_late(self, instance_id: str) -> bool:
        timer = self._late.pop(instance_id, None)
        if timer is not None:
            timer.cancel()
        return timer is not None

    def _soon(self, event: Event) -> None:
        # Never while an effect is being applied: the scheduler is told after it.
        self._core.timers.call_later(0.0, self.on_event, event)

    def _forget(self, instance_id: str) -> None:
        template = self._standing.pop(instance_id, None)
        if template is not None:
            self._numbers[template] -= 1

    def on_event(self, event: Event) -> None:
        """Take in what a machine did."""
        if isinstance(event, (NodeFailed, NodeStopped, NodeLost)):
            self._forget(event.instance_id)
            unnoticed = self._unnoticed.pop(event.instance_id, 0.0)
            if isinstance(event, NodeLost) and unnoticed:
                self._core.timers.call_later(unnoticed, self._deliver, event)
                return
        self._deliver(event)

    def lose(self, instance_id: str, reason: str, noticed_after: float = 0.0) -> None:
        """Let a machine die, which is noticed only so many seconds later."""
        if noticed_after and instance_id in self._standing:
            self._unnoticed[instance_id] = noticed_after
        if self._cancel_late(instance_id):
            self.on_event(NodeLost(instance_id, reason))
        elif self.machines is not None:
            self.machines.lose(instance_id, reason)

    def preempt(self, instance: Instance, warning: float, reason: str) -> None:
        """Warn a machine's tasks, and let it die so many seconds later."""
        if instance.node is not None:
            self._core.scheduler.cordon(instance.node, self._core.now())
        if self.machines is not None:
            self.machines.warn(instance.id)
        self._core.timers.call_later(warning, self.lose, instance.id, reason)
