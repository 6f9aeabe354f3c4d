"""Nodes on this machine: the backend that makes them.

Of three kinds, the best that the machine allows (:mod:`yellowdog_ray.local.isolation`). The work is done
by a supervisor process (:mod:`yellowdog_ray.local.supervisor`); this side asks it, and turns its answers into
events.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from yellowdog_ray.errors import LocalPlatformError
from yellowdog_ray.local import cgroups, linux
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
from yellowdog_ray.local.host import FIRST_NUMBER, LAST_NUMBER, NODE_MEMORY, free_memory, listen
from yellowdog_ray.local.isolation import Isolation
from yellowdog_ray.local.node_files import node_environment, this_user, write_node_files
from yellowdog_ray.local.node_ssh import SSHIdentity, SSHServerError, find_sshd, require_ssh
from yellowdog_ray.local.protocol import Closed
from yellowdog_ray.local.supervision import Supervision

__all__ = ["Isolation", "LocalNodes"]

_OUTPUT_BYTES = 65_536


class LocalNodes:
    """The backend that makes real nodes of this machine.

    :param directory: the platform's own directory, which is there already.
    :param isolation: the kind of node, or None for the best that works here.
    :param lock: a descriptor that the supervisor keeps open for as long as it lives.
    :param ssh: the keys of the nodes; None for new ones in the directory.
    :param system_sshd: whether to use the system's SSH server where there is one.
    :param limits: whether the size of a node is enforced; None for as far as that can be.
    :raises LocalPlatformError: when no kind works, or the kind that was asked for does not.
    """

    def __init__(
        self,
        directory: Path,
        isolation: Isolation | None = None,
        *,
        lock: int,
        ssh: SSHIdentity | None = None,
        system_sshd: bool = True,
        limits: bool | None = None,
    ) -> None:
        self._directory, self._lock = directory, lock
        self.groups = _groups(directory, limits)
        self.ssh = ssh or SSHIdentity(directory)
        self._user = this_user()
        self._on_event: Callable[[Event], None] = lambda event: None
        self._ids: dict[str, str] = {}
        self._last_number = FIRST_NUMBER
        self._requests: dict[str, StartNode] = {}
        self._started: dict[str, float] = {}
        self._stopping: set[str] = set()
        self._losing: dict[str, str] = {}
        self._listeners: dict[str, socket.socket] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self.refusals: list[str] = []
        found = find_sshd() if system_sshd else None
        servers = [found, None] if found else [None]
        for kind in [isolation] if isolation else _candidates():
            # The system's server would take a plain process to the user's home, and its terminals need a
            # group that only root may give them.
            for sshd in servers if kind is not Isolation.PROCESSES else [None]:
                try:
                    self._start_supervisor(kind, sshd)
                except SSHServerError as error:
                    self.refusals.append(f"{sshd or 'embedded SSH server'}: {error}")
                except LocalPlatformError as error:
                    self.refusals.append(f"{kind.value}: {error}")
                    break
                else:
                    self.isolation = kind
                    return
        raise LocalPlatformError("no node can be made on this machine: " + "; ".join(self.refusals))

    @property
    def user(self) -> str:
        """The name of the user whom tasks run as."""
        return self._user.name

    @property
    def ssh_port(self) -> int:
        """The port of the nodes' SSH servers, at their public addresses."""
        return self._supervisor.ssh_port

    @property
    def interface(self) -> str:
        """The interface of this machine to the nodes; empty where there is none."""
        return self._supervisor.interface

    @property
    def works(self) -> bool:
        """Whether nodes can be made: not once the process that owns them was killed."""
        return self._supervisor.works

    @property
    def ssh_server(self) -> str:
        """What the nodes' SSH server is."""
        return self._supervisor.sshd or "embedded (asyncssh)"

    # Start and end

    def _start_supervisor(self, isolation: Isolation, sshd: str | None) -> None:
        self._kind = isolation
        self._supervisor = Supervision(self._directory, isolation, sshd, user=self.user, lock=self._lock)
        self._channel = self._supervisor.channel
        try:
            self._supervisor.start()
            self._probe()
        except BaseException as error:
            self.close()
            linux.remove_tree(self._directory / _node_id(FIRST_NUMBER))
            if isinstance(error, OSError):
                raise LocalPlatformError(str(error)) from error
            raise

    def _probe(self) -> None:
        """Make a node and end it, to know that this kind works here before anybody relies on it."""
        self._send_start(StartNode("probe", "probe", "", "", "", 1, 1), FIRST_NUMBER)
        self._supervisor.expect("registered")
        require_ssh(self._supervisor.host_address(FIRST_NUMBER), self._supervisor.ssh_port)
        self._channel.send({"op": "stop", "id": _node_id(FIRST_NUMBER)})
        self._supervisor.expect("gone")
        self.groups.remove(_node_id(FIRST_NUMBER))
        self._close_listener(_node_id(FIRST_NUMBER))

    def serve(self, loop: asyncio.AbstractEventLoop, on_event: Callable[[Event], None]) -> None:
        """Deliver the machines' events on an event loop from now on."""
        self._on_event, self._loop = on_event, loop
        self._channel.on_blocked = lambda: loop.add_writer(self._channel.fileno(), self._flush)
        loop.add_reader(self._channel.fileno(), self._receive)

    def _flush(self) -> None:
        with contextlib.suppress(Closed):
            if not self._channel.flush():
                return
        if self._loop:
            self._loop.remove_writer(self._channel.fileno())

    def close(self) -> None:
        """End every node and wait until nothing of them is left; the directory is not removed here."""
        for node_id in list(self._listeners):
            self._close_listener(node_id)
        self._supervisor.end()
        self.groups.remove_left()

    def instances(self) -> list[str]:
        """List the instances whose nodes exist."""
        return list(self._ids)

    def leftovers(self) -> list[str]:
        """List what of the nodes and their supervisor is left: processes, an interface, the directory."""
        found = self._supervisor.leftovers()
        found += [f"control group {path}" for path in self.groups.left()]
        if self._directory.exists():
            found.append(f"directory {self._directory}")
        return found

    # Effects

    def apply(self, effect: Effect) -> None:
        """Begin to carry out an effect."""
        try:
            if isinstance(effect, StartNode):
                self._start_node(effect)
            elif isinstance(effect, StopNode):
                self._stop_node(effect.instance_id)
            elif isinstance(effect, StartTask):
                self._tell_node(effect.instance_id, {"op": "task", **_task(effect)})
            elif isinstance(effect, AbortTask):
                self._tell_node(effect.instance_id, {"op": "abort", "run_id": effect.run_id})
        except Closed:
            self._supervisor_gone("the node supervisor ended")

    def _start_node(self, request: StartNode) -> None:
        try:
            self._check_memory()
            number = self._free_number()
        except LocalPlatformError as error:
            self._on_event(NodeFailed(request.instance_id, str(error)))
            return
        node_id = _node_id(number)
        self._ids[request.instance_id], self._requests[node_id] = node_id, request
        self._started[node_id] = time.monotonic()
        try:
            self._send_start(request, number)
        except OSError as error:
            self._forget(node_id)
            self._on_event(NodeFailed(request.instance_id, f"cannot make the node: {error}"))

    def _send_start(self, request: StartNode, number: int) -> None:
        node_id = _node_id(number)
        private_ip = self._supervisor.address(number)
        write_node_files(
            self._directory / node_id, self._kind, request.hostname, private_ip, self._user, self.ssh
        )
        # What the default scripts tell Ray. It knows whole CPUs only, and needs some memory.
        vcpus, memory = max(1, int(request.vcpus)), max(NODE_MEMORY, int(request.ram * (1 << 30)))
        group = self.groups.make(node_id, memory, request.vcpus)
        fds = []
        if self._kind is Isolation.USER_NAMESPACES:
            # A socket stays in the network namespace that it was made in: this one is reached from this
            # machine although the process that accepts on it lives in the node.
            listener = listen(self._supervisor.host_address(number), self._supervisor.ssh_port)
            self._listeners[node_id] = listener
            fds = [listener.fileno()]
        self._channel.send(
            {
                "op": "start",
                "id": node_id,
                "hostname": request.hostname,
                "private_ip": private_ip,
                "python": sys.executable,
                "group": asdict(group),
                "memory": memory,
                "environment": node_environment(
                    self._directory / node_id, request, self._user, vcpus, memory
                ),
            },
            fds,
        )

    def _stop_node(self, instance_id: str) -> None:
        if instance_id not in self._ids:
            self._on_event(NodeStopped(instance_id))
            return
        self._stopping.add(self._ids[instance_id])
        self._tell_node(instance_id, {"op": "stop"})

    def lose(self, instance_id: str, reason: str = "preempted") -> None:
        """Kill a node with all its processes, as a machine that dies without a word."""
        if instance_id in self._ids:
            self._losing[self._ids[instance_id]] = reason
        with contextlib.suppress(Closed):
            self._tell_node(instance_id, {"op": "lose"})

    def warn(self, instance_id: str) -> None:
        """Send SIGTERM to every task of a node, because the machine is about to go."""
        with contextlib.suppress(Closed):
            self._tell_node(instance_id, {"op": "warn"})

    def kill(self, run_id: str, instance_id: str) -> None:
        """Send SIGKILL to a task's process."""
        with contextlib.suppress(Closed):
            self._tell_node(instance_id, {"op": "kill", "run_id": run_id})

    def task_output(self, task_id: str, instance_id: str) -> bytes | None:
        """Read the end of what a task has printed that runs on an instance; None where it cannot be had."""
        node_id = self._ids.get(instance_id)
        if node_id is None:
            return None
        directory = self._directory / node_id / "data" / "workers" / task_id.replace(":", "_")
        return linux.read_end(directory / "taskoutput.txt", _OUTPUT_BYTES)

    def _tell_node(self, instance_id: str, message: dict[str, Any]) -> None:
        """Send a node a message; one that is gone gets none, and its loss is being told already."""
        if instance_id in self._ids:
            self._channel.send({**message, "id": self._ids[instance_id]})

    def _check_memory(self) -> None:
        """Refuse a node that would not fit, counting those that have not yet taken their share."""
        young = sum(1 for started in self._started.values() if time.monotonic() - started < 20)
        free = free_memory()
        if free - young * NODE_MEMORY < NODE_MEMORY:
            raise LocalPlatformError(
                f"not enough memory for another node: {free >> 20} MiB are free, {young} nodes that are "
                f"starting will take {young * NODE_MEMORY >> 20} MiB of it, and a Ray node needs "
                f"{NODE_MEMORY >> 20} MiB"
            )

    def _free_number(self) -> int:
        # An address is not used again soon: the kernel takes a node's network apart after the node is gone.
        taken = set(self._ids.values())
        for _ in range(FIRST_NUMBER, LAST_NUMBER + 1):
            self._last_number = self._last_number + 1 if self._last_number < LAST_NUMBER else FIRST_NUMBER
            if _node_id(self._last_number) not in taken:
                return self._last_number
        raise LocalPlatformError(
            f"all {LAST_NUMBER - FIRST_NUMBER + 1} addresses of the local platform are taken"
        )

    def _close_listener(self, node_id: str) -> None:
        listener = self._listeners.pop(node_id, None)
        if listener:
            listener.close()

    # Events

    def _receive(self) -> None:
        try:
            messages = self._channel.receive()
        except Closed:
            self._supervisor_gone("the node supervisor ended")
            return
        for message in messages:
            self._tell(message)

    def _tell(self, message: dict[str, Any]) -> None:
        event, node_id = message["event"], message.get("id")
        if node_id is None:
            self._supervisor_gone(f"the node supervisor failed: {message.get('reason', event)}")
            return
        request = self._requests.get(node_id)
        if event == "task_started":
            self._on_event(TaskStarted(message["run_id"]))
        elif event == "task_exited":
            self._on_event(_exited(message))
        elif event == "task_not_started":
            self._on_event(TaskNotStarted(message["run_id"], message["reason"]))
        elif request is None:
            return
        elif event == "registered":
            number = int(node_id[1:])
            self._on_event(
                NodeRegistered(
                    request.instance_id,
                    request.hostname,
                    self._supervisor.address(number),
                    self._supervisor.host_address(number),
                    request.vcpus,
                    request.ram,
                )
            )
        elif event == "failed":
            self._forget(node_id)
            self._on_event(NodeFailed(request.instance_id, message["reason"]))
        elif event == "gone":
            stopping = node_id in self._stopping
            reason = self._losing.get(node_id, "its processes ended")
            self._forget(node_id)
            if stopping:
                self._on_event(NodeStopped(request.instance_id))
            else:
                self._on_event(NodeLost(request.instance_id, reason))

    def _forget(self, node_id: str) -> None:
        request = self._requests.pop(node_id, None)
        if request:
            del self._ids[request.instance_id]
        self._started.pop(node_id, None)
        self._stopping.discard(node_id)
        self._losing.pop(node_id, None)
        self.groups.remove(node_id)
        self._close_listener(node_id)

    def _supervisor_gone(self, reason: str) -> None:
        if self._loop and self._channel.fileno() >= 0:
            self._loop.remove_reader(self._channel.fileno())
            self._loop.remove_writer(self._channel.fileno())
        for node_id, request in list(self._requests.items()):
            self._forget(node_id)
            self._on_event(NodeLost(request.instance_id, reason))


def _exited(message: dict[str, Any]) -> TaskExited:
    return TaskExited(
        message["run_id"], message["exit_code"], message["output_tail"], message.get("reason", "")
    )


def _groups(directory: Path, limits: bool | None) -> cgroups.Groups:
    """Find out where the nodes' control groups are to be, and write it down.

    :raises LocalPlatformError: when there must be limits, and there can be none.
    """
    if limits is False:
        return cgroups.Groups(directory.name, None, None, None, None, "as was asked for")
    groups = cgroups.find(directory.name)
    if limits and groups.reason:
        raise LocalPlatformError(f"the size of a node cannot be enforced here: {groups.reason}")
    groups.record(directory)
    return groups


def _task(effect: StartTask) -> dict[str, Any]:
    return {
        "run_id": effect.run_id,
        "slot": effect.slot,
        "task_id": effect.task_id,
        "task_group_id": effect.task_group_id,
        "task_type": effect.task_type,
        "arguments": list(effect.arguments),
        "task_data": effect.task_data,
        "environment": dict(effect.environment),
    }


def _candidates() -> list[Isolation]:
    below = [Isolation.USER_NAMESPACES, Isolation.PROCESSES]
    return [Isolation.NAMESPACES, *below] if os.geteuid() == 0 else below


def _node_id(number: int) -> str:
    """Name a node for its supervisor and its directory; Ray's socket names leave no room for more."""
    return f"n{number}"
