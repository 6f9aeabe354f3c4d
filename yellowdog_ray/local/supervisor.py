"""The process that owns every node of a local platform, so that none of them can outlive it.

It is two processes. The *watcher* stays where it was started; it ends the other when the platform's
owner is gone, however that ended, and then removes the platform's directory. The *keeper* makes the
nodes. With namespaces the keeper is the first process of a PID namespace and its network namespace is
the LAN that the nodes hang on, so when it goes, the kernel ends every node and removes every interface:
nothing has to be remembered for it. With plain processes the watcher adopts and ends what is left.

::

    owner ── watcher ── keeper (LAN: a bridge) ── agent of node 1 ── tasks
                                               └─ agent of node 2 ── tasks
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from yellowdog_ray.local import cgroups, linux
from yellowdog_ray.local.agent import Agent
from yellowdog_ray.local.belonging import end_all, mark
from yellowdog_ray.local.protocol import Channel, Closed, Loop

AGENT_HOME = "/opt/yellowdog/agent"
AGENT_DATA = "/var/opt/yellowdog/agent/data"
_STOP_PATIENCE = 3.0
_ORPHAN_SECONDS = 2.0
_BRIDGE = "lan"
# The first place to import from would be the directory that the server starts in, which is the user's.
_EMBEDDED_SSHD = (
    "import sys; sys.path[:1] = {path!r}; from yellowdog_ray.local.sshd import main; sys.exit(main())"
)


@dataclass(frozen=True)
class Settings:
    """What the platform tells its supervisor at the start.

    :param isolation: ``namespaces`` (as root), ``user-namespaces`` or ``processes``.
    :param directory: the platform's own directory, removed at the end.
    :param prefix: the first three numbers of the nodes' network, such as ``10.213.7``.
    :param interface: with ``namespaces``, the interface that joins this machine to that network.
    :param keep: paths below ``/tmp`` that nodes must go on seeing.
    :param sshd: the system's SSH server, or None for the embedded one.
    :param user: the name of the user whom tasks run as.
    :param ssh_port: the port of the nodes' SSH servers; with namespaces they listen on port 22 as well.
    """

    isolation: str
    directory: str
    prefix: str
    interface: str
    keep: list[str]
    sshd: str | None
    user: str
    ssh_port: int

    @property
    def namespaced(self) -> bool:
        """Tell whether nodes have namespaces of their own."""
        return self.isolation != "processes"


# The watcher


def main() -> None:
    """Run as the watcher: ``python -m yellowdog_ray.local.supervisor FD LOCK_FD SETTINGS OWNER_PID``."""
    control_fd, lock_fd, owner = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[4])
    for fd in (control_fd, lock_fd):
        # Neither is for tasks: one that outlives its agent would keep the directory locked.
        os.set_inheritable(fd, False)
    control = socket.socket(fileno=control_fd)
    settings = Settings(**json.loads(sys.argv[3]))
    linux.set_process_name("raydog-watcher")
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    owner_fd = os.pidfd_open(owner)
    status = _watch(control, settings, owner_fd, lock_fd)
    if select.select([owner_fd], [], [], 0)[0]:
        # Nobody else is left to remove it.
        cgroups.remove_all(Path(settings.directory))
        linux.remove_tree(settings.directory)
    sys.exit(status)


def _watch(control: socket.socket, settings: Settings, owner_fd: int, lock_fd: int) -> int:
    linux.become_subreaper()
    try:
        if settings.isolation == "user-namespaces":
            linux.enter_user_namespace()
        if settings.namespaced:
            linux.unshare(linux.CLONE_NEWPID)
    except OSError as error:
        Channel(control).send({"event": "failed", "reason": str(error)})
        return 1
    lan_ready, lan_made = os.pipe2(os.O_CLOEXEC)
    joined, join_done = os.pipe2(os.O_CLOEXEC)
    keeper = os.fork()
    if keeper == 0:
        try:
            os.close(lan_ready)
            os.close(join_done)
            os.close(owner_fd)
            # The lock says that the directory is in use: it ends with the watcher, not with the last node.
            os.close(lock_fd)
            linux.die_with_parent()
            _keep(control, settings, lan_made, joined)
        except BaseException as error:
            with contextlib.suppress(Closed):
                Channel(control).send({"event": "failed", "reason": f"{type(error).__name__}: {error}"})
        finally:
            os._exit(0)
    os.close(lan_made)
    os.close(joined)
    keeper_fd = os.pidfd_open(keeper)
    try:
        if os.read(lan_ready, 1) and settings.isolation == "namespaces":
            _join_lan(settings, keeper)
        os.write(join_done, b"1")
    except Exception as error:  # pyroute2's own among them
        Channel(control).send({"event": "failed", "reason": f"cannot make the nodes' network: {error}"})
        os.kill(keeper, signal.SIGKILL)
    # From here on the keeper alone holds the platform's line, so that either end sees the other go.
    control.close()
    select.select([owner_fd, keeper_fd], [], [])
    with contextlib.suppress(ProcessLookupError):
        os.kill(keeper, signal.SIGKILL)
    # Reaping the first process of a PID namespace waits until all in it are gone.
    os.waitpid(keeper, 0)
    end_all(lambda: linux.descendants(os.getpid()), 10)
    return 0


def _join_lan(settings: Settings, keeper: int) -> None:
    """Give this machine an interface on the nodes' network; it goes with the keeper's namespace."""
    from pyroute2 import IPRoute

    with IPRoute() as ip:
        ip.link(
            "add",
            ifname=settings.interface,
            kind="veth",
            peer={"ifname": "host", "net_ns_pid": keeper},
        )
        (index,) = ip.link_lookup(ifname=settings.interface)
        ip.addr("add", index=index, address=f"{settings.prefix}.1", prefixlen=24)
        ip.link("set", index=index, state="up")


# The keeper


@dataclass
class _Node:
    channel: Channel
    pid: int
    kill_at: float | None = None


def _keep(control: socket.socket, settings: Settings, lan_made: int, joined: int) -> None:
    linux.set_process_name("raydog-keeper")
    mark(settings.directory)
    if settings.namespaced:
        linux.unshare(linux.CLONE_NEWNS | linux.CLONE_NEWNET | linux.CLONE_NEWIPC | linux.CLONE_NEWUTS)
        linux.mount("none", "/", flags=linux.MS_REC | linux.MS_PRIVATE)
        # The nodes' forks look their own processes up here.
        linux.mount("proc", "/proc", "proc", linux.MS_NOSUID | linux.MS_NODEV | linux.MS_NOEXEC)
        _make_bridge()
    else:
        linux.become_subreaper()
    os.write(lan_made, b"1")
    if not os.read(joined, 1):
        return
    if settings.isolation == "namespaces":
        _bridge_port("host")
    _Keeper(Channel(control), settings).run()


def _make_bridge() -> None:
    from pyroute2 import IPRoute

    with IPRoute() as ip:
        (loopback,) = ip.link_lookup(ifname="lo")
        ip.link("set", index=loopback, state="up")
        ip.link("add", ifname=_BRIDGE, kind="bridge")
        (bridge,) = ip.link_lookup(ifname=_BRIDGE)
        ip.link("set", index=bridge, state="up")


def _bridge_port(name: str) -> None:
    from pyroute2 import IPRoute

    with IPRoute() as ip:
        (bridge,) = ip.link_lookup(ifname=_BRIDGE)
        (port,) = ip.link_lookup(ifname=name)
        ip.link("set", index=port, master=bridge, state="up")


class _Keeper:
    """Makes and ends nodes, and carries messages between them and the platform."""

    def __init__(self, platform: Channel, settings: Settings) -> None:
        self._platform, self._settings = platform, settings
        self._nodes: dict[str, _Node] = {}
        self._made = 0
        self._loop = Loop()

    def run(self) -> None:
        """Serve until the platform closes its line; what is left is ended by whoever reaps this process."""
        self._loop.watch_children(self._child_ended)
        self._loop.watch_line(self._platform, self._obey)
        self._platform.send({"event": "ready"})
        with contextlib.suppress(Closed):
            while True:
                self._loop.run_once(node.kill_at for node in self._nodes.values())
                self._kill_overdue()

    def _obey(self) -> None:
        for message in self._platform.receive():
            node = self._nodes.get(message["id"])
            if message["op"] == "start":
                self._start(message)
            elif node is None:
                continue  # It is gone already, and the platform is being told so.
            elif message["op"] == "stop":
                self._stop(node)
            elif message["op"] == "lose":
                # What is left of a plain process's tasks ends when its own end is seen (_end_orphans).
                os.kill(node.pid, signal.SIGKILL)
            else:
                with contextlib.suppress(Closed):
                    node.channel.send(message)

    def _start(self, message: dict[str, Any]) -> None:
        listeners = [socket.socket(fileno=fd) for fd in message.get("fds", [])]
        ours, theirs = socket.socketpair()
        # The kernel removes an interface a moment after its node, so no name is used twice.
        self._made += 1
        message["port"] = f"node{self._made}"
        try:
            pid = _fork_node(message, self._settings, listeners, ours, theirs, self._close_inherited)
        except OSError as error:
            ours.close()
            self._report(message["id"], {"event": "failed", "reason": str(error)})
            return
        finally:
            theirs.close()
            for listener in listeners:
                listener.close()
        channel = Channel(ours)
        self._nodes[message["id"]] = _Node(channel, pid)
        self._loop.watch_line(channel, partial(self._relay, message["id"], channel))

    def _close_inherited(self) -> None:
        """In a node's fresh process: drop the lines that are not its own."""
        self._platform.close()
        for node in self._nodes.values():
            node.channel.close()

    def _relay(self, node_id: str, channel: Channel) -> None:
        try:
            for message in channel.receive():
                self._report(node_id, message)
        except Closed:
            self._loop.forget(channel)

    def _report(self, node_id: str, message: dict[str, Any]) -> None:
        self._platform.send({**message, "id": node_id})

    def _stop(self, node: _Node) -> None:
        if self._settings.namespaced:
            # The first process of a PID namespace takes all the others with it.
            os.kill(node.pid, signal.SIGKILL)
            return
        with contextlib.suppress(Closed):
            node.channel.send({"op": "stop"})
        node.kill_at = time.monotonic() + _STOP_PATIENCE

    def _kill_overdue(self) -> None:
        now = time.monotonic()
        for node in self._nodes.values():
            if node.kill_at is not None and node.kill_at <= now:
                os.kill(node.pid, signal.SIGKILL)
                node.kill_at = None

    def _child_ended(self, pid: int, status: int) -> None:
        if not self._settings.namespaced:
            self._end_orphans()
        for node_id, node in list(self._nodes.items()):
            if node.pid == pid:
                self._forget(node_id, node)

    def _end_orphans(self) -> None:
        """End what an agent that was killed has left: no kernel does it here.

        Agents inherit what is orphaned below them, so all that this process has inherited was a dead one's.
        """
        agents = {node.pid for node in self._nodes.values()}
        end_all(lambda: linux.descendants(os.getpid(), agents), _ORPHAN_SECONDS)

    def _forget(self, node_id: str, node: _Node) -> None:
        # What the agent said before it went comes first.
        with contextlib.suppress(Closed):
            while select.select([node.channel], [], [], 0)[0]:
                for message in node.channel.receive():
                    self._report(node_id, message)
        self._loop.forget(node.channel)
        node.channel.close()
        del self._nodes[node_id]
        linux.remove_tree(Path(self._settings.directory, node_id))
        self._report(node_id, {"event": "gone"})


# A node


def _fork_node(
    message: dict[str, Any],
    settings: Settings,
    listeners: list[socket.socket],
    keepers_end: socket.socket,
    agents_end: socket.socket,
    close_inherited: Any,
) -> int:
    """Fork a node's agent and return its pid as the keeper sees it.

    :raises OSError: when the node could not be made; the message says which step failed.
    """
    answer_read, answer_write = os.pipe2(os.O_CLOEXEC)
    launcher = os.fork()
    if launcher == 0:
        try:
            os.close(answer_read)
            keepers_end.close()
            close_inherited()
            signal.set_wakeup_fd(-1)
            _launch(message, settings, listeners, agents_end, answer_write)
        except BaseException as error:
            with contextlib.suppress(OSError):
                os.write(answer_write, json.dumps({"error": f"{type(error).__name__}: {error}"}).encode())
        finally:
            os._exit(0)
    os.close(answer_write)
    with os.fdopen(answer_read) as answer:
        text = answer.read()
    if settings.namespaced:
        # A launcher only opens the namespaces; the agent is its child and becomes ours when it exits.
        os.waitpid(launcher, 0)
    result = json.loads(text) if text else {"error": "its process ended while it was set up"}
    if "error" in result:
        raise OSError(f"cannot make the node: {result['error']}")
    return int(result["pid"])


def _launch(
    message: dict[str, Any],
    settings: Settings,
    listeners: list[socket.socket],
    agents_end: socket.socket,
    answer: int,
) -> None:
    if settings.namespaced:
        _open_namespaces(message)
        agent = os.fork()
        if agent != 0:
            # The agent answers itself if it cannot go on; its pid here is known only on this side.
            os.write(answer, json.dumps({"pid": agent}).encode())
            return
    else:
        linux.die_with_parent()
        linux.become_subreaper()
        os.setsid()
        os.write(answer, json.dumps({"pid": os.getpid()}).encode())
    os.close(answer)
    _be_node(message, settings, listeners, Channel(agents_end))


def _open_namespaces(message: dict[str, Any]) -> None:
    """Enter a node's namespaces, with an interface on the LAN."""
    from pyroute2 import IPRoute

    port = message["port"]
    with IPRoute() as lan:
        linux.unshare(
            linux.CLONE_NEWNS
            | linux.CLONE_NEWNET
            | linux.CLONE_NEWIPC
            | linux.CLONE_NEWUTS
            | linux.CLONE_NEWPID
        )
        # That socket still lives in the LAN; the peer's end is made here.
        with open("/proc/self/ns/net") as here:
            lan.link("add", ifname=port, kind="veth", peer={"ifname": "eth0", "net_ns_fd": here.fileno()})
        (bridge,) = lan.link_lookup(ifname=_BRIDGE)
        (index,) = lan.link_lookup(ifname=port)
        lan.link("set", index=index, master=bridge, state="up")
    with IPRoute() as ip:
        for name in ("lo", "eth0"):
            (index,) = ip.link_lookup(ifname=name)
            if name == "eth0":
                ip.addr("add", index=index, address=message["private_ip"], prefixlen=24)
            ip.link("set", index=index, state="up")
    socket.sethostname(message["hostname"])


def _be_node(
    message: dict[str, Any], settings: Settings, listeners: list[socket.socket], line: Channel
) -> None:
    linux.set_process_name("raydog-agent")
    directory = Path(settings.directory, message["id"])
    home, data = Path(directory, "agent"), Path(directory, "data")
    group = cgroups.NodeGroup(**message["group"])
    try:
        if settings.namespaced:
            _mount_node(directory, settings)
            home, data = Path(AGENT_HOME), Path(AGENT_DATA)
            # As in a container, what asks for the machine's memory (Ray does) is told the node's.
            for place, shown in group.mounts.items():
                linux.bind(shown, place)
            group = group.inside()
        # With namespaces also where SSH is expected, whatever port this machine's side could have.
        for port in sorted({settings.ssh_port, 22} if settings.namespaced else {settings.ssh_port}):
            listeners.append(_listen(message["private_ip"], port))
    except Exception as error:
        line.send({"event": "failed", "reason": f"{type(error).__name__}: {error}"})
        return
    environment = {
        **message["environment"],
        "HOME": str(home),
        "YD_AGENT_HOME": str(home),
        "YD_AGENT_DATA": str(data),
    }
    if not settings.namespaced:
        # The node's own `ray stop` finds this node's processes by it.
        environment["RAYDOG_AGENT_PID"] = str(os.getpid())
    ssh = home / "ssh"
    if settings.sshd:
        command = [settings.sshd, "-i", "-E", str(ssh / "sshd.log"), "-f", str(ssh / "sshd_config")]
    else:
        command = [
            message["python"], "-c", _EMBEDDED_SSHD.format(path=[entry for entry in sys.path if entry]),
            "--host-key", str(ssh / "host_key"), "--authorized-keys", str(ssh / "authorized_keys"),
            "--user", settings.user, "--user", "yd-agent",
        ]  # fmt: skip
    Agent(
        line, home, data, environment, command, listeners, group,
        memory=message["memory"], ssh_takes_listeners=settings.sshd is None,
    ).run()  # fmt: skip


def _listen(address: str, port: int) -> socket.socket:
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((address, port))
        listener.listen(128)
    except OSError as error:
        listener.close()
        raise OSError(f"cannot listen on {address}:{port} for SSH: {error}") from None
    return listener


def _mount_node(directory: Path, settings: Settings) -> None:
    """Give the node its own ``/proc``, ``/tmp``, ``/dev/shm``, agent directories and host files."""
    linux.mount("proc", "/proc", "proc", linux.MS_NOSUID | linux.MS_NODEV | linux.MS_NOEXEC)
    root = os.open(directory, os.O_PATH)
    here = f"/proc/self/fd/{root}"
    linux.mount("tmpfs", "/dev/shm", "tmpfs", linux.MS_NOSUID | linux.MS_NODEV, "mode=1777")  # noqa: S108
    linux.cover("/tmp", settings.keep, source=f"{here}/tmp")  # noqa: S108
    for place, source in ((AGENT_HOME, "agent"), (AGENT_DATA, "data")):
        linux.make_mount_point(place)
        linux.bind(f"{here}/{source}", place)
    if settings.sshd and settings.isolation == "namespaces":
        linux.make_mount_point("/run/sshd")
    for file in os.scandir(f"{here}/etc"):
        if os.path.exists(f"/etc/{file.name}"):
            linux.bind(f"{here}/etc/{file.name}", f"/etc/{file.name}")
    if settings.isolation == "user-namespaces":
        # The machine's terminals belong to a group that is not mapped here.
        options = f"newinstance,ptmxmode=0666,mode=620,gid={os.getegid()}"
        linux.mount("devpts", "/dev/pts", "devpts", linux.MS_NOSUID | linux.MS_NOEXEC, options)
        linux.bind("/dev/pts/ptmx", "/dev/ptmx")
    os.close(root)


if __name__ == "__main__":
    main()
