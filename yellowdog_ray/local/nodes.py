"""Nodes on this machine: what each is made of, and the backend that makes them.

Of three kinds, the best that the machine allows (:mod:`yellowdog_ray.local.isolation`). The work is done
by a supervisor process (:mod:`yellowdog_ray.local.supervisor`); this side asks it, and turns its answers into
events.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pwd
import random
import select
import shutil
import signal
import socket
import subprocess
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
from yellowdog_ray.local.isolation import Isolation
from yellowdog_ray.local.process_node import (
    import_path,
    mirror_environment,
    program_directories,
    write_plain_environment,
)
from yellowdog_ray.local.protocol import Channel, Closed
from yellowdog_ray.local.supervisor import AGENT_HOME, NODE_FILES, Settings

__all__ = ["NODE_MEMORY", "Isolation", "LocalNodes", "SSHIdentity", "free_memory"]

NODE_MEMORY = 450 << 20
"""Bytes of memory that a Ray node needs at the least (measured: about 400 MB with Ray 2.60)."""
_START_TIMEOUT = 20.0
_OUTPUT_BYTES = 65_536
_FIRST_NUMBER, _LAST_NUMBER = 10, 250
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class SSHIdentity:
    """The keys of a platform: one that opens its nodes, and one by which its nodes are known.

    :param directory: the directory for the key files, which only this user may read. Keys that are in it
        already are used again.
    :raises LocalPlatformError: when a file there is no key that can be used.
    :raises OSError: with the file's name, when one cannot be read or written.
    """

    def __init__(self, directory: Path) -> None:
        self.private_key_file = directory / "id_ed25519"
        self.host_key_file = directory / "host_key"
        self.public_key = _make_key(self.private_key_file)
        self.host_key = _make_key(self.host_key_file)


def _make_key(path: Path) -> str:
    """Return the public key of a private key file, which is made where there is none."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    try:
        # Whoever has put it there may have let others read it; sshd would refuse it too.
        path.chmod(0o600)
        key = serialization.load_ssh_private_key(path.read_bytes(), None)
    except FileNotFoundError:
        key = Ed25519PrivateKey.generate()
        private = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
        )
        linux.write_private(path, private)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        # A key with a passphrase is a TypeError.
        raise LocalPlatformError(
            f"{path} is no SSH key that can be used without a passphrase ({error}): remove it, and start "
            "again; a new one is made"
        ) from error
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    return public.decode()


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
        self.user, self._group = _user()
        self._on_event: Callable[[Event], None] = lambda event: None
        self._ids: dict[str, str] = {}
        self._last_number = _FIRST_NUMBER
        self._requests: dict[str, StartNode] = {}
        self._started: dict[str, float] = {}
        self._stopping: set[str] = set()
        self._losing: dict[str, str] = {}
        self._listeners: dict[str, socket.socket] = {}
        self._supervisor: subprocess.Popen[bytes] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self.refusals: list[str] = []
        found = _find_sshd() if system_sshd else None
        servers = [found, None] if found else [None]
        for kind in [isolation] if isolation else _candidates():
            # The system's server would take a plain process to the user's home, and its terminals need a
            # group that only root may give them.
            for sshd in servers if kind is not Isolation.PROCESSES else [None]:
                try:
                    self._start_supervisor(kind, sshd)
                except _SSHServerError as error:
                    self.refusals.append(f"{sshd or 'embedded SSH server'}: {error}")
                except LocalPlatformError as error:
                    self.refusals.append(f"{kind.value}: {error}")
                    break
                else:
                    self.isolation = kind
                    return
        raise LocalPlatformError("no node can be made on this machine: " + "; ".join(self.refusals))

    @property
    def ssh_port(self) -> int:
        """The port of the nodes' SSH servers, at their public addresses."""
        return self._ssh_port

    @property
    def interface(self) -> str:
        """The interface of this machine to the nodes; empty where there is none."""
        return self._interface

    @property
    def works(self) -> bool:
        """Whether nodes can be made: not once the process that owns them was killed."""
        return self._supervisor is not None and self._supervisor.poll() is None

    @property
    def ssh_server(self) -> str:
        """What the nodes' SSH server is."""
        return self._sshd or "embedded (asyncssh)"

    # Start and end

    def _start_supervisor(self, isolation: Isolation, sshd: str | None) -> None:
        self._kind, self._sshd = isolation, sshd
        self._claim, self._prefix, self._interface = _free_network(isolation)
        ours, theirs = socket.socketpair()
        self._channel = Channel(ours)
        try:
            self._ssh_port = 22 if isolation is Isolation.NAMESPACES else _free_ssh_port(self._prefix)
            settings = Settings(
                isolation=isolation.value,
                directory=str(self._directory),
                prefix=self._prefix,
                interface=self._interface,
                keep=_environment_below_tmp(),
                sshd=self._sshd,
                user=self.user,
                ssh_port=self._ssh_port,
            )
            with theirs:
                self._supervisor = subprocess.Popen(
                    [
                        sys.executable, "-m", "yellowdog_ray.local.supervisor",
                        str(theirs.fileno()), str(self._lock), json.dumps(asdict(settings)), str(os.getpid()),
                    ],
                    pass_fds=[theirs.fileno(), self._lock],
                    stdin=subprocess.DEVNULL,
                    cwd="/",
                    # Ctrl-C in a terminal is for the owner, which then ends the nodes.
                    start_new_session=True,
                    # Nothing of the user's environment, which may hold keys, goes further than this process.
                    env={"PATH": _PATH, "LANG": "C.UTF-8", "PYTHONPATH": os.pathsep.join(import_path())},
                )  # fmt: skip
            self._expect("ready")
            self._probe()
        except BaseException as error:
            self._end_supervisor()
            linux.remove_tree(self._directory / _node_id(_FIRST_NUMBER))
            if isinstance(error, OSError):
                raise LocalPlatformError(str(error)) from error
            raise

    def _end_supervisor(self) -> None:
        """End the supervisor and with it every node, and wait until nothing of them is left."""
        self._channel.hang_up()
        for node_id in list(self._listeners):
            self._close_listener(node_id)
        if self._supervisor is not None:
            try:
                self._supervisor.wait(timeout=_START_TIMEOUT)
            except subprocess.TimeoutExpired:
                self._supervisor.kill()
                self._supervisor.wait()
        # With plain processes and a supervisor that was killed, nobody else has ended them.
        for pid in linux.processes_with(NODE_FILES, str(self._directory)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        # The kernel takes a network namespace apart a moment after its last process.
        deadline = time.monotonic() + 5
        while self._interface and _has_interface(self._interface) and time.monotonic() < deadline:
            time.sleep(0.02)
        self.groups.remove_left()
        self._claim.close()

    def _expect(self, event: str) -> dict[str, Any]:
        deadline = time.monotonic() + _START_TIMEOUT
        while True:
            if not select.select([self._channel], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise LocalPlatformError(
                    f"the node supervisor did not say {event!r} in {_START_TIMEOUT:.0f} s"
                )
            try:
                messages = self._channel.receive()
            except Closed:
                raise LocalPlatformError("the node supervisor ended at its start") from None
            for message in messages:
                if message["event"] == event:
                    return message
                if message["event"] == "failed":
                    raise LocalPlatformError(message["reason"])

    def _probe(self) -> None:
        """Make a node and end it, to know that this kind works here before anybody relies on it."""
        self._send_start(StartNode("probe", "probe", "", "", "", 1, 1), _FIRST_NUMBER)
        self._expect("registered")
        _require_ssh(self._host_address(_FIRST_NUMBER), self._ssh_port)
        self._channel.send({"op": "stop", "id": _node_id(_FIRST_NUMBER)})
        self._expect("gone")
        self.groups.remove(_node_id(_FIRST_NUMBER))
        self._close_listener(_node_id(_FIRST_NUMBER))

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
        self._end_supervisor()

    def instances(self) -> list[str]:
        """List the instances whose nodes exist."""
        return list(self._ids)

    def leftovers(self) -> list[str]:
        """List what of the nodes and their supervisor is left: processes, an interface, the directory."""
        found = [f"process {pid}" for pid in linux.processes_with(NODE_FILES, str(self._directory))]
        if self._supervisor is not None and self._supervisor.poll() is None:
            found.append(f"supervisor {self._supervisor.pid}")
        if self._interface and _has_interface(self._interface):
            found.append(f"network interface {self._interface}")
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
        private_ip = f"{self._prefix}.{number}"
        self._write_node_files(node_id, request, private_ip)
        # What the default scripts tell Ray. It knows whole CPUs only, and needs some memory.
        vcpus, memory = max(1, int(request.vcpus)), max(NODE_MEMORY, int(request.ram * (1 << 30)))
        group = self.groups.make(node_id, memory, request.vcpus)
        fds = []
        if self._kind is Isolation.USER_NAMESPACES:
            # A socket stays in the network namespace that it was made in: this one is reached from this
            # machine although the process that accepts on it lives in the node.
            listener = _listen(self._host_address(number), self._ssh_port)
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
                "environment": {
                    "PATH": _PATH,
                    "LANG": "C.UTF-8",
                    "SHELL": "/bin/bash",
                    "USER": self.user,
                    "LOGNAME": self.user,
                    "YD_PROVIDER": request.provider,
                    "YD_REGION": request.region,
                    "YD_INSTANCE_TYPE": request.instance_type,
                    "YD_INSTANCE_ID": request.instance_id,
                    "RAYDOG_NODE_VCPUS": str(vcpus),
                    "RAYDOG_NODE_MEMORY": str(memory),
                    # Known by this, whatever becomes of their parents.
                    NODE_FILES: f"{self._directory}/{node_id}",
                    **{name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ},
                },
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
        for _ in range(_FIRST_NUMBER, _LAST_NUMBER + 1):
            self._last_number = self._last_number + 1 if self._last_number < _LAST_NUMBER else _FIRST_NUMBER
            if _node_id(self._last_number) not in taken:
                return self._last_number
        raise LocalPlatformError(
            f"all {_LAST_NUMBER - _FIRST_NUMBER + 1} addresses of the local platform are taken"
        )

    def _host_address(self, number: int) -> str:
        """Tell the address at which this machine reaches a node."""
        if self._kind is Isolation.USER_NAMESPACES:
            return f"127.{self._prefix.partition('.')[2]}.{number}"
        return f"{self._prefix}.{number}"

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
                    f"{self._prefix}.{number}",
                    self._host_address(number),
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

    # What a node is made of

    def _write_node_files(self, node_id: str, request: StartNode, private_ip: str) -> None:
        root = self._directory / node_id
        home = root / "agent"
        for directory in (home / "ssh", root / "data", root / "tmp", root / "etc"):
            directory.mkdir(parents=True, mode=0o700)
        (root / "tmp").chmod(0o1777)
        namespaced = self._kind is not Isolation.PROCESSES
        seen_home = AGENT_HOME if namespaced else str(home)
        if namespaced:
            _link_environment(home / "venv")
            self._write_host_files(root / "etc", request.hostname, private_ip)
        else:
            write_plain_environment(home / "venv", private_ip, root / "tmp")
        shutil.copyfile(self.ssh.host_key_file, home / "ssh" / "host_key")
        (home / "ssh" / "host_key").chmod(0o600)
        (home / "ssh" / "authorized_keys").write_text(self.ssh.public_key + "\n")
        users = f"{self.user} yd-agent" if namespaced else self.user
        (home / "ssh" / "sshd_config").write_text(_SSHD_CONFIG.format(home=seen_home, users=users))

    def _write_host_files(self, etc: Path, hostname: str, private_ip: str) -> None:
        # Ray finds its node's address by the host's name where no route leads out of the node.
        (etc / "hosts").write_text(f"127.0.0.1 localhost\n::1 localhost\n{private_ip} {hostname}\n")
        (etc / "hostname").write_text(f"{hostname}\n")
        # No name server can be reached from a node; asking one would only cost time.
        (etc / "resolv.conf").write_text("# The nodes of a local platform have no name server.\n")
        # The user's home in a node is the agent's. Scripts in the field log in as yd-agent: the same user.
        uid = os.geteuid()
        users = [(name, uid, self._group, AGENT_HOME, "/bin/bash") for name in (self.user, "yd-agent")]
        for entry in pwd.getpwall():
            if entry.pw_uid != uid and entry.pw_name != "yd-agent":
                users.append((entry.pw_name, entry.pw_uid, entry.pw_gid, entry.pw_dir, entry.pw_shell))
        lines = [f"{name}:x:{number}:{group}::{home}:{shell}\n" for name, number, group, home, shell in users]
        (etc / "passwd").write_text("".join(lines))
        # sshd lets nobody in whose password is locked, as root's often is; here nobody has one.
        (etc / "shadow").write_text("".join(f"{user[0]}:*:19000:0:99999:7:::\n" for user in users))
        if self._kind is Isolation.USER_NAMESPACES:
            (etc / "group").write_text(f"{self.user}:x:{self._group}:\n")
        for file in etc.iterdir():
            file.chmod(0o600 if file.name == "shadow" else 0o644)


_SSHD_CONFIG = """\
HostKey {home}/ssh/host_key
AuthorizedKeysFile {home}/ssh/authorized_keys
AllowUsers {users}
PermitRootLogin prohibit-password
PubkeyAuthentication yes
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
# The directories above the keys belong to whoever started the platform, or to nobody in a user namespace.
StrictModes no
UseDNS no
PrintMotd no
PrintLastLog no
PidFile none
LoginGraceTime 20
MaxSessions 100
AcceptEnv LANG LC_* RAY_*
Subsystem sftp internal-sftp
"""


def free_memory() -> int:
    """Return the bytes of memory that are free for new processes here, a container's limit included."""
    free = 0
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) << 10
    for limit, used, statistics, cached in (
        ("memory.max", "memory.current", "memory.stat", "inactive_file"),
        (
            "memory/memory.limit_in_bytes",
            "memory/memory.usage_in_bytes",
            "memory/memory.stat",
            "total_inactive_file",
        ),
    ):
        group = Path("/sys/fs/cgroup")
        # No limit is no number ("max").
        with contextlib.suppress(OSError, ValueError):
            room = int((group / limit).read_text()) - int((group / used).read_text())
            for line in (group / statistics).read_text().splitlines():
                if line.startswith(f"{cached} "):
                    # What is kept of files that were read counts as used, and gives way.
                    room += int(line.split()[1])
            free = min(free, room)
    return free


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


def _user() -> tuple[str, int]:
    """Return the name and the group of this user, who may have no entry, as in some containers."""
    try:
        entry = pwd.getpwuid(os.geteuid())
    except KeyError:
        return f"uid{os.geteuid()}", os.getegid()
    return entry.pw_name, entry.pw_gid


def _find_sshd() -> str | None:
    for path in (shutil.which("sshd"), "/usr/sbin/sshd", "/usr/local/sbin/sshd"):
        if path and os.access(path, os.X_OK):
            return path
    return None


def _link_environment(place: Path) -> None:
    """Show the Python environment that the platform was started from as the agent's ``venv``."""
    if Path(sys.prefix, "bin", "activate").exists():
        place.symlink_to(sys.prefix)
    else:
        mirror_environment(place)


def _environment_below_tmp() -> list[str]:
    """List the directories of this Python environment that a node's own ``/tmp`` would hide."""
    places = (sys.prefix, sys.base_prefix, *import_path(), *(str(path) for path in program_directories()))
    wanted = {os.path.realpath(path) for path in places}
    below = sorted(path for path in wanted if path.startswith("/tmp/") and os.path.isdir(path))  # noqa: S108
    return [path for path in below if not any(path.startswith(f"{other}/") for other in below)]


def _free_network(isolation: Isolation) -> tuple[socket.socket, str, str]:
    """Choose a network for the nodes that nobody uses.

    :returns: a socket that claims it for as long as it is open, the network's first three numbers and the
        name of this machine's interface on it.
    """
    numbers = random.sample(range(256), 256)
    routes = Path("/proc/net/route").read_text()
    interfaces = os.listdir("/sys/class/net")
    for number in numbers:
        claim = socket.socket(socket.AF_UNIX)
        try:
            # A name in the abstract name space can be had once, and is free when its process ends.
            claim.bind(f"\0raydog-network-{number}")
            if isolation is not Isolation.NAMESPACES:
                _listen(f"127.213.{number}.1", 0).close()
        except OSError:
            claim.close()
            continue
        # Routes list their network as a little-endian hexadecimal number.
        taken = f"\t00{number:02X}D50A\t" in routes or f"raydog{number}" in interfaces
        if isolation is Isolation.NAMESPACES and taken:
            claim.close()
            continue
        first = "127" if isolation is Isolation.PROCESSES else "10"
        interface = f"raydog{number}" if isolation is Isolation.NAMESPACES else ""
        return claim, f"{first}.213.{number}", interface
    raise LocalPlatformError("none of the networks 10.213.x.0/24 and 127.213.x.0/24 is free on this machine")


def _free_ssh_port(prefix: str) -> int:
    address = f"127.{prefix.partition('.')[2]}.{_LAST_NUMBER + 1}"
    for port in (2222, 22022, 0):
        with contextlib.suppress(OSError), _listen(address, port) as listener:
            return int(listener.getsockname()[1])
    raise LocalPlatformError(f"no port is free on {address} for the nodes' SSH servers")


def _has_interface(name: str) -> bool:
    return Path("/sys/class/net", name).exists()


class _SSHServerError(LocalPlatformError):
    """A node is there, but its SSH server does not speak."""


def _require_ssh(address: str, port: int) -> None:
    """Wait for the first words of a node's SSH server.

    :raises _SSHServerError: when they do not come.
    """
    try:
        with socket.create_connection((address, port), timeout=10) as connection:
            greeting = connection.recv(64)
    except OSError as error:
        raise _SSHServerError(f"no answer on {address}:{port} ({error})") from error
    if not greeting.startswith(b"SSH-"):
        raise _SSHServerError("it ends as soon as somebody connects")


def _listen(address: str, port: int) -> socket.socket:
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((address, port))
        listener.listen(128)
    except OSError:
        listener.close()
        raise
    return listener
