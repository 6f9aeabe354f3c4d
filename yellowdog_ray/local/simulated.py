"""Machines that are only told about: nodes and tasks that live by a clock alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from yellowdog_ray.local.clock import LONGEST, Timer, Timers
from yellowdog_ray.local.events import (
    AbortTask,
    Effect,
    Event,
    NodeFailed,
    NodeLost,
    NodeRegistered,
    NodeStopped,
    StartNode,
    StartTask,
    StopNode,
    TaskExited,
    TaskNotStarted,
    TaskStarted,
)

__all__ = ["SimulatedBackend"]


@dataclass
class _Machine:
    boot: Timer | None
    hostname: str
    tasks: dict[str, Timer | None] = field(default_factory=dict)


class SimulatedBackend:
    """A :class:`~yellowdog_ray.local.events.NodeBackend` without processes.

    A task runs until it is aborted or its node ends; or, where its environment says so, for
    ``SIMULATED_SECONDS`` seconds, then ending with ``SIMULATED_EXIT_CODE`` (0 if not given). Either
    variable alone is enough; a task that has one which cannot be cannot be started.

    :param timers: the clock that it lives by, such as the event loop.
    :param on_event: gets the events, on the loop.
    :param boot_delay: seconds from a node's start to its registration.
    :param start_delay: seconds from a task's start to its process.
    :param stop_delay: seconds that ending a node or an aborted task takes.
    :param fail_boot: says, for a node's start, why it fails; None lets it succeed.
    """

    def __init__(
        self,
        timers: Timers,
        on_event: Callable[[Event], None],
        *,
        boot_delay: float = 0.02,
        start_delay: float = 0.01,
        stop_delay: float = 0.01,
        fail_boot: Callable[[StartNode], str | None] | None = None,
    ) -> None:
        self.boot_delay = boot_delay
        self.start_delay = start_delay
        self.stop_delay = stop_delay
        self.fail_boot = fail_boot
        #: Every effect that was asked for, in order.
        self.applied: list[Effect] = []
        self._timers = timers
        self._on_event = on_event
        self._machines: dict[str, _Machine] = {}
        self._where: dict[str, str] = {}
        self._addresses = 0

    def apply(self, effect: Effect) -> None:
        """Begin to carry out an effect."""
        self.applied.append(effect)
        if isinstance(effect, StartNode):
            timer = self._timers.call_later(self.boot_delay, self._boot, effect)
            self._machines[effect.instance_id] = _Machine(timer, effect.hostname)
        elif isinstance(effect, StopNode):
            # One that is gone already has ended too: its loss may not have been noticed yet.
            self._end(effect.instance_id)
            self._timers.call_later(self.stop_delay, self._on_event, NodeStopped(effect.instance_id))
        elif isinstance(effect, StartTask):
            machine = self._machines.get(effect.instance_id)
            if machine is not None:
                self._where[effect.run_id] = effect.instance_id
                machine.tasks[effect.run_id] = self._timers.call_later(self.start_delay, self._start, effect)
        elif isinstance(effect, AbortTask):
            self._abort(effect)

    def lose(self, instance_id: str, reason: str = "preempted") -> None:
        """Let a machine die without being told to."""
        if self._end(instance_id):
            self._on_event(NodeLost(instance_id, reason))

    def warn(self, instance_id: str) -> None:
        """Let all tasks of a machine have SIGTERM, and end of it, because the machine is about to go."""
        machine = self._machines.get(instance_id)
        for run_id in list(machine.tasks) if machine is not None else ():
            self._abort(AbortTask(run_id, instance_id))

    def kill(self, run_id: str, instance_id: str) -> None:
        """Let a task's process be killed."""
        # 128 + SIGKILL.
        self.exit(run_id, 137)

    def exit(self, run_id: str, exit_code: int, output_tail: str = "") -> None:
        """Let a task's process end."""
        machine = self._machines.get(self._where.pop(run_id, ""))
        if machine is not None and run_id in machine.tasks:
            timer = machine.tasks.pop(run_id)
            if timer is not None:
                timer.cancel()
            self._on_event(TaskExited(run_id, exit_code, output_tail))

    def close(self) -> None:
        """End everything without a word."""
        for instance_id in list(self._machines):
            self._end(instance_id)

    def _boot(self, start: StartNode) -> None:
        machine = self._machines[start.instance_id]
        machine.boot = None
        reason = self.fail_boot(start) if self.fail_boot is not None else None
        if reason is not None:
            del self._machines[start.instance_id]
            self._on_event(NodeFailed(start.instance_id, reason))
            return
        # 10.0.0.1 and on: room for sixteen million.
        self._addresses += 1
        number = self._addresses
        address = f"10.{number >> 16 & 255}.{number >> 8 & 255}.{number & 255}"
        self._on_event(
            NodeRegistered(start.instance_id, start.hostname, address, None, start.vcpus, start.ram)
        )

    def _start(self, task: StartTask) -> None:
        machine = self._machines[task.instance_id]
        machine.tasks[task.run_id] = None
        try:
            end = _end_of(task.environment)
        except ValueError as problem:
            del machine.tasks[task.run_id], self._where[task.run_id]
            self._on_event(TaskNotStarted(task.run_id, str(problem)))
            return
        if end is not None:
            delay, code = end
            machine.tasks[task.run_id] = self._timers.call_later(delay, self.exit, task.run_id, code)
        self._on_event(TaskStarted(task.run_id))

    def _abort(self, abort: AbortTask) -> None:
        machine = self._machines.get(abort.instance_id)
        if machine is None or abort.run_id not in machine.tasks:
            return
        timer = machine.tasks[abort.run_id]
        if timer is not None:
            timer.cancel()
        # 128 + SIGTERM.
        machine.tasks[abort.run_id] = self._timers.call_later(self.stop_delay, self.exit, abort.run_id, 143)

    def _end(self, instance_id: str) -> bool:
        machine = self._machines.pop(instance_id, None)
        if machine is None:
            return False
        for timer in (machine.boot, *machine.tasks.values()):
            if timer is not None:
                timer.cancel()
        for run_id in machine.tasks:
            self._where.pop(run_id, None)
        return True


def _end_of(environment: Mapping[str, str]) -> tuple[float, int] | None:
    """Return after how many seconds a task is to end, and with which exit code; None if it is not said.

    :raises ValueError: when it says what cannot be.
    """
    if "SIMULATED_SECONDS" not in environment and "SIMULATED_EXIT_CODE" not in environment:
        return None
    seconds, code = environment.get("SIMULATED_SECONDS", "0"), environment.get("SIMULATED_EXIT_CODE", "0")
    try:
        delay = float(seconds)
    except ValueError:
        delay = -1.0
    if not 0 <= delay <= LONGEST:
        raise ValueError(f"SIMULATED_SECONDS must be a number from 0 to {LONGEST:g}, not {seconds!r}")
    if not (code.isascii() and code.isdigit() and int(code) <= 255):
        raise ValueError(f"SIMULATED_EXIT_CODE must be a whole number from 0 to 255, not {code!r}")
    return delay, int(code)
