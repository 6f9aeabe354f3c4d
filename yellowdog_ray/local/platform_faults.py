"""Faults of a whole platform: of its calls, of the machines that it provisions, and of its tasks.

:class:`PlatformFaults` is what a user has as ``platform.faults``; it is the same with real nodes and with
simulated ones.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import TypeVar

from starlette.types import ASGIApp

from yellowdog_ray.errors import ClusterStateError, SpecError
from yellowdog_ray.local.asks import RefusedError
from yellowdog_ray.local.core import ControlPlane
from yellowdog_ray.local.entities import Instance, Task
from yellowdog_ray.local.faults import Fault, Faults, number, text, whole
from yellowdog_ray.local.faulty_machines import CapacityLimit, FaultyMachines, ProvisionFault
from yellowdog_ray.local.web import shows_key

__all__ = ["CALL_SECONDS", "PlatformFaults"]

CALL_SECONDS = 30.0
"""How long a call from another thread waits for a platform that is busy."""

T = TypeVar("T")


class PlatformFaults(Faults):
    """What can be made to go wrong with a platform: ``platform.faults``.

    Every method may be called from any thread, while the platform runs.

    Faults happen to what comes after they were made, until their ``count`` or their time is up or
    :meth:`clear` is called: :meth:`http`, :meth:`fail_provision`, :meth:`delay_provision`,
    :meth:`limit_capacity`. The others happen at once: :meth:`lose_node`, :meth:`preempt_node`,
    :meth:`kill_task`.

    A call without the right application key is answered as ever, ``GET /`` too, which needs none, and uses no
    fault up.

    Beside them there are, for requests, ``latency``: seconds by which every one is delayed; ``seen``: the
    latest that came in, as (method, path); ``requests``: how many did; and ``faults``: the list of
    :class:`Fault`, which may be set as a whole.
    """

    def __init__(self, app: ASGIApp, core: ControlPlane, machines: FaultyMachines) -> None:
        super().__init__(app, core.closing, core.timers.time, lambda scope: shows_key(scope, core))
        self._core, self._machines = core, machines

    # Faults that stay

    def http(self, fault: Fault) -> Fault:
        """Let some requests go wrong, after the faults that are there already.

        :param fault: which requests, and how.
        :returns: the fault, whose ``hits`` count.
        """

        def add() -> None:
            self.faults = [*self.faults, fault]

        self._on_loop(add)
        return fault

    def fail_provision(
        self,
        pool: str | None = None,
        *,
        count: int | None = 1,
        skip: int = 0,
        after: float = 0.0,
        for_: float | None = None,
        seconds: float = 0.0,
        message: str = "injected fault: the machine could not be provisioned",
    ) -> ProvisionFault:
        """Let machines not come: the compute source is ERRORED and says why, and the pool stays short.

        :param pool: a regular expression that is looked for in the name of the worker pool or compute
            requirement; None for all.
        :param count: how many machines; None for all that are provisioned from now on.
        :param skip: how many matching machines come first.
        :param after: seconds from now until it begins to happen.
        :param for_: seconds for which it happens then; None for as long as it is there.
        :param seconds: how long after it was asked for a machine is known to have failed.
        :param message: the reason that the platform gives.
        :returns: the fault, whose ``hits`` count.
        :raises SpecError: when an argument cannot work.
        """
        return self._add(ProvisionFault("fail", pool, count, skip, after, for_, seconds, message))

    def delay_provision(
        self,
        seconds: float,
        pool: str | None = None,
        *,
        count: int | None = 1,
        skip: int = 0,
        after: float = 0.0,
        for_: float | None = None,
    ) -> ProvisionFault:
        """Let machines begin to boot later than they would.

        :param seconds: by how much.
        :param pool: see :meth:`fail_provision`, as for the other arguments.
        :returns: the fault, whose ``hits`` count.
        :raises SpecError: when an argument cannot work.
        """
        return self._add(ProvisionFault("delay", pool, count, skip, after, for_, seconds))

    def _add(self, fault: ProvisionFault) -> ProvisionFault:
        def add() -> None:
            fault.since = self._clock()
            self._machines.provision.append(fault)

        self._on_loop(add)
        return fault

    def limit_capacity(
        self,
        nodes: int | None,
        template: str | None = None,
        *,
        message: str = "injected fault: insufficient capacity",
    ) -> CapacityLimit | None:
        """Refuse machines beyond a number; those that are up stay.

        A machine that is refused fails as in :meth:`fail_provision`. A new limit takes the place of an
        older one for the same template.

        :param nodes: how many machines there may be at a time, counting those that boot or end; None for
            any number.
        :param template: the template, by ``namespace/name``, whose machines are meant; None for the machines
            of all templates together.
        :param message: the reason that the platform gives.
        :returns: the limit, whose ``hits`` count what was refused; None where there is none.
        :raises SpecError: when there is no such template, or the number cannot be.
        """
        limit = None
        if nodes is not None:
            whole("nodes", nodes)
            text("message", message)
            limit = CapacityLimit(int(nodes), template, message)

        def change() -> None:
            if template is not None:
                text("template", template)
                try:
                    self._core.scheduler.template(template)
                except RefusedError as problem:
                    raise SpecError(problem.message) from None
            others = [other for other in self._machines.limits if other.template != template]
            self._machines.limits = [*others, limit] if limit is not None else others

        self._on_loop(change)
        return limit

    def clear(self) -> None:
        """Let nothing more go wrong, and lift every limit of capacity.

        What is being held or delayed stays so; machines that were warned go; ``latency`` stays as it is.
        """
        super().clear()

        def clear() -> None:
            self._machines.provision, self._machines.limits = [], []

        with contextlib.suppress(ClusterStateError):
            self._on_loop(clear)

    @property
    def provision(self) -> Sequence[ProvisionFault]:
        """The faults of machines that are provisioned, in the order in which they are tried."""
        return tuple(self._machines.provision)

    @property
    def limits(self) -> Sequence[CapacityLimit]:
        """The limits of capacity that are in force."""
        return tuple(self._machines.limits)

    # What happens at once

    def lose_node(
        self,
        which: str,
        *,
        count: int | None = 1,
        noticed_after: float = 0.0,
        reason: str = "injected fault: the machine was lost",
    ) -> list[str]:
        """Let machines die without a word, with all that runs on them.

        Their tasks end as lost (``ALLOCATION_LOST``), and are given out anew where a retry policy says so.

        :param which: a node's id, an instance's id, a host name, or the name (also as ``namespace/name``)
            of a worker pool or compute requirement.
        :param count: for a name, how many of its machines, the oldest first; None for all.
        :param noticed_after: seconds for which the platform goes on as if the machines were there.
        :param reason: what the platform says of them then.
        :returns: the ids of their instances.
        :raises SpecError: when no machine that is booting or up is meant, or an argument cannot work.
        """
        number("noticed_after", noticed_after)
        text("which", which)
        text("reason", reason)

        def lose() -> list[str]:
            chosen = self._instances(which, count)
            for instance in chosen:
                self._machines.lose(instance.id, reason, noticed_after)
            return [instance.id for instance in chosen]

        return self._on_loop(lose)

    def preempt_node(
        self,
        which: str,
        *,
        warning: float = 30.0,
        count: int | None = 1,
        reason: str = "injected fault: the machine was preempted",
    ) -> list[str]:
        """Warn machines, and let them die after a while, as a cloud takes spot machines back.

        The process of every task on them gets SIGTERM now; how it ends counts as any end. They are given
        no more tasks, and do not count where their pool is resized or held to ``minNodes``; but it does not
        grow by itself into their place until they are gone. When the time is up they die as in
        :meth:`lose_node`, also where nothing runs on them any more.

        :param which: see :meth:`lose_node`, as for ``count``.
        :param warning: seconds from now until they die.
        :param reason: what the platform says of them then.
        :returns: the ids of their instances.
        :raises SpecError: when no machine that is booting or up is meant, or an argument cannot work.
        """
        number("warning", warning)
        text("which", which)
        text("reason", reason)

        def preempt() -> list[str]:
            chosen = self._instances(which, count)
            for instance in chosen:
                self._machines.preempt(instance, warning, reason)
            return [instance.id for instance in chosen]

        return self._on_loop(preempt)

    def kill_task(self, which: str, *, count: int | None = 1) -> list[str]:
        """Send SIGKILL to the process of tasks: they fail with exit code 137, unless they are tried again.

        :param which: a task's id, or the name of tasks.
        :param count: for a name, how many of them that run, those first that were given out first; None
            for all.
        :returns: their ids.
        :raises SpecError: when no such task runs, or an argument cannot work.
        """
        text("which", which)

        def kill() -> list[str]:
            scheduler = self._core.scheduler
            found = [scheduler.tasks[which]] if which in scheduler.tasks else scheduler.tasks.values()
            running = [task for task in found if task.run_id and which in (task.id, task.spec.name)]
            running.sort(key=lambda task: task.allocated or 0)
            chosen = _some(running, count)
            if not chosen:
                raise SpecError(f"no task {which!r} is running")
            for task in chosen:
                self._kill(task)
            return [task.id for task in chosen]

        return self._on_loop(kill)

    def _kill(self, task: Task) -> None:
        machines = self._machines.machines
        if machines is not None and task.worker is not None and task.run_id is not None:
            machines.kill(task.run_id, task.worker.node.instance.id)

    def _instances(self, which: str, count: int | None) -> list[Instance]:
        scheduler = self._core.scheduler
        node = scheduler.nodes.get(which)
        one = node.instance if node is not None else scheduler.instances.get(which)
        if one is not None:
            candidates = [one]
        else:
            candidates = [
                instance
                for requirement in scheduler.requirements.values()
                if requirement.status != "TERMINATED"
                for instance in requirement.instances.values()
                if which
                in (
                    instance.hostname,
                    requirement.usage.name,
                    f"{requirement.usage.namespace}/{requirement.usage.name}",
                )
            ]
        # One that is up rather than one that boots; sorting keeps the order of their creation.
        alive = [instance for instance in candidates if instance.status in ("PENDING", "RUNNING")]
        alive.sort(key=lambda instance: instance.status == "PENDING")
        chosen = _some(alive, count)
        if not chosen:
            raise SpecError(f"no machine is booting or up that {which!r} could mean")
        return chosen

    def _on_loop(self, function: Callable[[], T]) -> T:
        """Call something on the platform's loop, from whatever thread, and see to what follows from it."""

        def run() -> T:
            result = function()
            self._core.changed()
            return result

        return self._core.call(run, patience=CALL_SECONDS)


def _some(things: list[T], count: int | None) -> list[T]:
    if count is None:
        return things
    whole("count", count)
    return things[: int(count)]
