"""LocalPlatform: the embedded platform as a user starts it.

One thread, one event loop: the HTTP API, the scheduler and the line to the nodes all live on it, so none
of them needs a lock.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import enum
import logging
import os
import secrets
import signal
import socket
import sys
import tempfile
import threading
import time
import uuid
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from yellowdog_ray.errors import ClusterStateError, LocalPlatformError, SpecError
from yellowdog_ray.local.cgroups import remove_all
from yellowdog_ray.local.host import NODE_MEMORY, free_memory
from yellowdog_ray.local.isolation import Isolation
from yellowdog_ray.local.linux import processes_with, remove_tree
from yellowdog_ray.local.node_ssh import SSHIdentity
from yellowdog_ray.local.nodes import LocalNodes
from yellowdog_ray.local.supervisor import NODE_FILES
from yellowdog_ray.local.webpage.access import web_link
from yellowdog_ray.raydog import ports

if TYPE_CHECKING:
    from starlette.applications import Starlette

    from yellowdog_ray.local.account import LocalAccount
    from yellowdog_ray.local.events import Event
    from yellowdog_ray.local.history import History
    from yellowdog_ray.local.platform_faults import PlatformFaults
    from yellowdog_ray.local.scheduler import Scheduler, SchedulerOptions
    from yellowdog_ray.raydog.reach import SSHAccess

__all__ = ["DEFAULT_TEMPLATES", "Kept", "LocalPlatform", "NodeTemplate"]

_log = logging.getLogger(__name__)

HISTORY = "history.sqlite"
"""The name of the file in which a platform that stays keeps its history."""
_DIRECTORY_PREFIX = "raydog-local-"
# Not TMPDIR: the names of Ray's sockets below it must fit into 107 bytes.
_DIRECTORY_HOME = "/tmp"  # noqa: S108
_START_TIMEOUT = 15.0
_RAY_PORTS = (ports.GCS, ports.NODE_METRICS, ports.DASHBOARD, ports.CLIENT)


@dataclass(frozen=True)
class NodeTemplate:
    """What a compute requirement template of the local platform says of its nodes.

    The default scripts tell Ray that a node has this size (whole CPUs, and at least what Ray itself needs of
    memory). Where control groups can be made, a node's processes are held to it.

    :param vcpus: a node's virtual CPUs.
    :param ram: its memory in GiB.
    :raises SpecError: when one of them is not positive.
    """

    vcpus: float = 1
    ram: float = 1

    def __post_init__(self) -> None:
        for name, value in (("vcpus", self.vcpus), ("ram", self.ram)):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e6:
                raise SpecError(f"{name} of a node must be a positive number, not {value!r}")


DEFAULT_TEMPLATES: Mapping[str, NodeTemplate] = {"local/node": NodeTemplate(ram=2)}
"""The templates that a local platform has when it is not told others, by ``namespace/name``."""


@dataclass(frozen=True)
class Kept:
    """What a platform goes on with that is not to be new each time.

    :param key_id: the id of its application key.
    :param secret: the secret of that key.
    :param directory: where its SSH keys and its history are, for this user only; it is there already.
    :param control_port: the TCP port of its control port; None for a free one.
    :param control_token: the token of its control port; None for a new one.
    """

    key_id: str
    secret: str = field(repr=False)
    directory: Path
    control_port: int | None = None
    control_token: str | None = field(default=None, repr=False)


class _State(enum.Enum):
    NEW = "it has not been started"
    RUNNING = "it is running"
    CLOSING = "it is being closed"
    CLOSED = "it has been closed"


class LocalPlatform:
    """A YellowDog-compatible platform on this machine, whose nodes are real.

    Use it as a context manager, or call :meth:`start` and :meth:`close`. It and its nodes end with the
    Python process that started it, however that ends.

    :param port: the TCP port of its API on 127.0.0.1; None for a free one.
    :param isolation: the kind of node (see :class:`~yellowdog_ray.local.isolation.Isolation`, or its value
        as text); None for the best that this machine and user allow.
    :param templates: what its compute requirement templates offer, by ``namespace/name``.
    :param system_sshd: whether nodes use this machine's own sshd where it is installed; otherwise they
        use the embedded one.
    :param kept: what it goes on with, for a platform that stays (``raydog local``); None for a new key and
        no history.
    :param limits: whether a node's processes are held to the CPUs and the memory of its template, by control
        groups; None for as far as this machine and user allow, True to refuse to start elsewhere.
    :param options: choices where YellowDog's behaviour is not documented; None for the defaults, but that the
        names of what has ended can be used again, as a notebook wants it.

    :raises SpecError: when an argument cannot work.
    """

    def __init__(
        self,
        *,
        port: int | None = None,
        isolation: Isolation | str | None = None,
        templates: Mapping[str, NodeTemplate] | None = None,
        system_sshd: bool = True,
        kept: Kept | None = None,
        limits: bool | None = None,
        options: SchedulerOptions | None = None,
    ) -> None:
        kinds = [kind.value for kind in Isolation]
        if isolation is not None and isolation not in kinds:
            raise SpecError(f"no such isolation: {isolation!r}; choose from {', '.join(kinds)}")
        if port is not None and not 0 < port < 1 << 16:
            raise SpecError(f"not a TCP port: {port}")
        self._isolation = Isolation(isolation) if isolation else None
        self._port = port
        self._system_sshd = system_sshd
        self._limits, self._options = limits, options
        self._templates = dict(DEFAULT_TEMPLATES if templates is None else templates)
        for name in self._templates:
            if name.count("/") != 1 or not all(name.split("/")):
                raise SpecError(f"a template is named namespace/name, not {name!r}")
        self._state = _State.NEW
        self._listener: socket.socket | None = None
        self._directory: Path | None = None
        # Descriptors that say, as long as they are open, that the directory is in use.
        self._lock: int | None = None
        self._directory_lock: int | None = None
        self._nodes_made: LocalNodes | None = None
        self._server: _Server | None = None
        self._url: str | None = None
        self._kept = kept
        self._key_id = kept.key_id if kept else str(uuid.uuid4())
        self._secret = kept.secret if kept else secrets.token_urlsafe(32)

    @staticmethod
    def connect(name: str = "default") -> LocalAccount:
        """Find the platform that ``raydog local start`` has started, and that stays.

        :param name: its name.
        :raises LocalPlatformError: when it does not run.
        """
        from yellowdog_ray.local.launch import connect

        return connect(name)

    # What a client needs

    @property
    def url(self) -> str:
        """The base URL of the API."""
        self._require_running()
        return str(self._url)

    @property
    def key_id(self) -> str:
        """The id of the application key that the API accepts."""
        return self._key_id

    @property
    def secret(self) -> str:
        """The secret of that key."""
        return self._secret

    @property
    def namespace(self) -> str:
        """A namespace to use; the platform accepts any valid one."""
        return "local"

    @property
    def template_names(self) -> list[str]:
        """The compute requirement templates, as ``namespace/name``, the default one first."""
        return list(self._templates)

    @property
    def templates(self) -> Mapping[str, NodeTemplate]:
        """The same, with the size of the nodes of each."""
        return dict(self._templates)

    @property
    def ssh_user(self) -> str:
        """The user name for SSH to a node: the user who started the platform, who runs the tasks too."""
        return self._nodes.user

    @property
    def ssh_private_key_file(self) -> str:
        """The path of the private key (0600) that opens every node."""
        return str(self._nodes.ssh.private_key_file)

    @property
    def ssh_host_key(self) -> str:
        """The public key by which every node is known, as a line of OpenSSH (``ssh-ed25519 ...``)."""
        return self._nodes.ssh.host_key

    @property
    def ssh_port(self) -> int:
        """The port of SSH at a node's public address: 22 as root, else an unprivileged one."""
        self._require_running()
        return self._nodes.ssh_port

    @property
    def ssh_access(self) -> SSHAccess:
        """How to log in to the nodes: what a cluster takes as its ``access``."""
        from yellowdog_ray.raydog.reach import SSHAccess

        return SSHAccess(
            self.ssh_user, self.ssh_private_key_file, port=self.ssh_port, host_key=self.ssh_host_key
        )

    @property
    def directory(self) -> str:
        """The platform's own directory, which only this user may read; it is removed at the end."""
        self._require_running()
        return str(self._directory)

    @property
    def isolation(self) -> Isolation:
        """The kind of node that this platform makes."""
        self._require_running()
        return self._nodes.isolation

    @property
    def faults(self) -> PlatformFaults:
        """What can be made to go wrong: calls, machines and tasks."""
        return self._running_server.faults

    @property
    def control_url(self) -> str:
        """The base URL of the control port (see :mod:`yellowdog_ray.local.control_port`)."""
        return self._running_server.control.url

    @property
    def control_token(self) -> str:
        """The token that the control port wants to be shown."""
        return self._running_server.control.token

    @property
    def _running_server(self) -> _Server:
        self._require_running()
        assert self._server is not None  # noqa: S101 - it is what runs
        return self._server

    @property
    def web_url(self) -> str:
        """A link to the platform's web page, for a browser: it works once, and within ten minutes."""
        return web_link(self.url, self.secret)

    def describe(self) -> str:
        """Say in a sentence what the nodes are made of and held to, and why not something better."""
        self._require_running()
        text = f"nodes are {self._nodes.isolation.sentence()}; SSH server: {self._nodes.ssh_server}"
        if self._nodes.refusals:
            text += f" (not {'; '.join(self._nodes.refusals)})"
        return f"{text}; {self._nodes.groups.sentence()}"

    # Life

    def start(self) -> LocalPlatform:
        """Start the platform, after removing what a crashed one left behind.

        :raises LocalPlatformError: when the machine does not run Linux, or has too little free memory for a
            node, no free port, or no way to make nodes.
        """
        if self._state is not _State.NEW:
            raise ClusterStateError(f"this platform cannot be started: {self._state.value}")
        require_linux()
        _require_packages()
        if free_memory() < NODE_MEMORY:
            raise LocalPlatformError(
                f"too little memory: {free_memory() >> 20} MiB are free, "
                f"one Ray node needs {NODE_MEMORY >> 20} MiB"
            )
        remove_leftovers()
        try:
            self._start()
        except BaseException as error:
            self._end()
            if isinstance(error, OSError) and not isinstance(error, LocalPlatformError):
                where = error.filename or _DIRECTORY_HOME
                raise LocalPlatformError(
                    f"the local platform cannot work with {where}: {error.strerror or error}. "
                    "Is there space, and may this user write there?"
                ) from error
            raise
        self._state = _State.RUNNING
        _log.log(
            logging.WARNING if self._nodes.refusals else logging.INFO, "%s: %s", self.url, self.describe()
        )
        # A platform that nobody closed is closed before the interpreter ends; by its weak reference, so
        # that this does not keep it alive.
        atexit.register(_close, weakref.ref(self))
        return self

    def _start(self) -> None:
        self._owner = os.getpid()
        self._listener = bind_loopback(self._port)
        self._directory = Path(tempfile.mkdtemp(prefix=_DIRECTORY_PREFIX, dir=_DIRECTORY_HOME))
        self._lock = _lock(self._directory)
        self._directory_lock = _keep_from_ageing(self._directory)
        self._nodes_made = LocalNodes(
            self._directory,
            self._isolation,
            lock=self._lock,
            ssh=SSHIdentity(self._kept.directory) if self._kept else None,
            system_sshd=self._system_sshd,
            limits=self._limits,
        )
        if self._nodes.isolation is Isolation.PROCESSES:
            _require_ray_ports(self._nodes)
        self._server = _Server(self, self._listener, self._nodes)
        self._url = f"http://127.0.0.1:{self._server.port}"
        self._server.start()

    def close(self) -> None:
        """End the platform with all its nodes and remove what it made; a second call does nothing.

        A call that was interrupted can be repeated. In a process that was forked from the owner it does
        nothing: the platform is the owner's.
        """
        if self._state not in (_State.RUNNING, _State.CLOSING) or os.getpid() != self._owner:
            return
        self._state = _State.CLOSING
        self._end()
        self._state = _State.CLOSED
        if self._url is not None:
            forget_clusters(self._url)

    def _end(self) -> None:
        """Undo what has been done of :meth:`_start`, each step whether or not the one before it worked."""
        with contextlib.ExitStack() as steps:
            steps.callback(self._release_lock)
            if self._directory is not None:
                steps.callback(remove_tree, self._directory)
            if self._nodes_made is not None:
                steps.callback(self._nodes_made.close)
            if self._listener is not None:
                steps.callback(self._listener.close)
            if self._server is not None:
                steps.callback(self._server.stop)

    def _release_lock(self) -> None:
        # Only once, also when an end that was interrupted is repeated: by then the number may be another's.
        locks = self._lock, self._directory_lock
        self._lock = self._directory_lock = None
        for lock in locks:
            if lock is not None:
                os.close(lock)

    def nodes(self) -> list[str]:
        """List the instances whose nodes exist on this machine now, whatever the API says of them."""
        self._require_running()
        return self._nodes.instances()

    def failure(self) -> str | None:
        """Say why a running platform cannot go on; None while it can."""
        if self._state is not _State.RUNNING:
            return None
        if self._server is None or not self._server.alive:
            return "its API has ended"
        return None if self._nodes.works else "the process that owns its nodes has ended"

    def leftovers(self) -> list[str]:
        """List what of this platform is left on the machine: nothing, once it is closed."""
        return self._nodes_made.leftovers() if self._nodes_made is not None else []

    def __enter__(self) -> LocalPlatform:
        if self._state is _State.NEW:
            self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        where = f" at {self.url}" if self._state is _State.RUNNING else ""
        return f"<LocalPlatform{where}: {self._state.value}>"

    @property
    def _nodes(self) -> LocalNodes:
        if self._nodes_made is None:
            raise ClusterStateError(f"the local platform has no nodes: {self._state.value}")
        return self._nodes_made

    def _require_running(self) -> None:
        if self._state is not _State.RUNNING:
            raise ClusterStateError(f"the local platform cannot be used: {self._state.value}")


class _Server:
    """The thread of a platform: its event loop, HTTP server and control plane."""

    def __init__(self, platform: LocalPlatform, listener: socket.socket, nodes: LocalNodes) -> None:
        from yellowdog_ray.local.control_port import ControlPort

        self._platform, self._listener, self._nodes = platform, listener, nodes
        kept = platform._kept
        control = bind_loopback(kept.control_port if kept else None)
        control.listen(128)
        self._control_listener = control
        self.control = ControlPort(control, kept.control_token if kept else None)
        # A server closes its listener itself, and only its own descriptor of it.
        self._listener_copies = [listener.dup(), control.dup()]
        self.port: int = listener.getsockname()[1]
        self.faults: PlatformFaults
        self._scheduler = _scheduler(platform._templates, platform._options)
        self._history: History | None = None
        self._thread = threading.Thread(target=self._run, name="raydog-local-platform", daemon=True)
        self._started = threading.Event()
        self._failure: BaseException | None = None

    @property
    def alive(self) -> bool:
        """Whether the API still answers."""
        return self._thread.is_alive()

    def start(self) -> None:
        """Start the thread and return when the API answers.

        :raises LocalPlatformError: when it does not.
        """
        kept = self._platform._kept
        if kept is not None:
            from yellowdog_ray.local.history import History

            # Here, and not on the loop: a long history takes its time, and is no reason to give up.
            self._history = History(kept.directory / HISTORY)
            self._history.load(self._scheduler)
        self._thread.start()
        if not self._started.wait(_START_TIMEOUT) or self._failure:
            raise LocalPlatformError(
                f"the local platform's API did not start: {self._failure or 'no answer'}"
            )

    def stop(self) -> None:
        """End the API and the thread."""
        with contextlib.suppress(RuntimeError, AttributeError):
            self._loop.call_soon_threadsafe(self._begin_stop)
        if self._thread.ident is not None:
            self._thread.join(_START_TIMEOUT)
        elif self._history is not None:
            self._history.close()
        self._control_listener.close()
        # A forked process may hold a copy of a socket: nobody is to wait for an answer there.
        for copy in self._listener_copies:
            with contextlib.suppress(OSError), copy:
                copy.shutdown(socket.SHUT_RDWR)

    def _begin_stop(self) -> None:
        self._core.close()
        self._uvicorn.should_exit = True
        # A client that keeps its connection open must not keep the platform open.
        self._uvicorn.force_exit = True
        self.control.stop()

    def _queue_event(self, event: Event) -> None:
        self._loop.call_soon(self._core.on_event, event)

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except BaseException as error:
            self._failure = error
        finally:
            self._started.set()

    async def _serve(self) -> None:
        from yellowdog_ray.local.api import create_app
        from yellowdog_ray.local.core import ControlPlane

        self._loop = asyncio.get_running_loop()
        self._core = ControlPlane(self._scheduler, self._loop, self._platform.key_id, self._platform.secret)
        history = self._history
        if history is None:
            await self._serve_api(create_app(self._core))
            return
        history.follow(self._scheduler, self._loop)
        self._core.saver = history.changed
        try:
            await self._serve_api(create_app(self._core))
        finally:
            history.close()

    async def _serve_api(self, app: Starlette) -> None:
        import uvicorn

        from yellowdog_ray.local.platform_faults import FaultyMachines, PlatformFaults
        from yellowdog_ray.local.webpage.front import Front

        # Events may come while effects are being carried out; each waits for its turn.
        machines = FaultyMachines(self._core, self._queue_event)
        machines.machines = self._nodes
        self._core.backend = machines
        self._nodes.serve(self._loop, machines.on_event)
        self.faults = PlatformFaults(app, self._core, machines)
        control = self.control.prepare(self._core, self.faults)
        front = Front(self.faults, self._core, self._platform.secret, self._nodes.task_output)
        config = uvicorn.Config(front, log_config=None, access_log=False, lifespan="off", ws="none")
        self._uvicorn = uvicorn.Server(config)
        serving = asyncio.gather(self._uvicorn.serve(sockets=[self._listener]), self.control.serve())
        while not (self._uvicorn.started and control.started) and not serving.done():
            await asyncio.sleep(0.005)
        self._started.set()
        await serving


def _close(reference: weakref.ref[LocalPlatform]) -> None:
    platform = reference()
    if platform is not None:
        platform.close()


def _scheduler(templates: Mapping[str, NodeTemplate], options: SchedulerOptions | None) -> Scheduler:
    from yellowdog_ray.local.scheduler import Scheduler, SchedulerOptions, Template

    scheduler = Scheduler(options or SchedulerOptions(reuse_finished_names=True))
    for full_name, template in templates.items():
        namespace, _, name = full_name.partition("/")
        scheduler.add_template(
            Template(
                namespace=namespace,
                name=name,
                id=f"ydid:crt:000000:{uuid.uuid5(uuid.NAMESPACE_DNS, full_name)}",
                instance_type="local",
                vcpus=template.vcpus,
                ram=template.ram,
                region="local",
            )
        )
    return scheduler


def remove_leftovers() -> None:
    """Remove what platforms of this user left when they were killed together with their supervisors.

    Namespaces need no care: the kernel has taken them apart. Plain processes may still be running.
    """
    for directory in Path(_DIRECTORY_HOME).glob(f"{_DIRECTORY_PREFIX}*"):
        with contextlib.suppress(OSError):
            if directory.lstat().st_uid != os.geteuid() or not _is_abandoned(directory):
                continue
            for pid in processes_with(NODE_FILES, str(directory)):
                os.kill(pid, signal.SIGKILL)
            remove_all(directory)
            remove_tree(directory)


def _is_abandoned(directory: Path) -> bool:
    import fcntl

    try:
        fd = os.open(directory / "lock", os.O_RDWR)
    except FileNotFoundError:
        # One that is being made has no lock for a moment.
        return time.time() - directory.stat().st_mtime > 60
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(fd)
    return True


def _lock(directory: Path) -> int:
    """Take the lock that says that a directory is in use; it is held as long as a copy of it is open."""
    import fcntl

    # It gets its name when it is locked: a platform that starts meanwhile must not find it free.
    fd = os.open(directory / "lock.new", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    fcntl.flock(fd, fcntl.LOCK_SH)
    os.rename(directory / "lock.new", directory / "lock")
    return fd


def _keep_from_ageing(directory: Path) -> int:
    """Lock the directory itself: what removes old files from /tmp (systemd-tmpfiles) leaves it alone then."""
    import fcntl

    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    fcntl.flock(fd, fcntl.LOCK_SH)
    return fd


def bind_loopback(port: int | None) -> socket.socket:
    """Make the socket of an API on 127.0.0.1, at this port or, for None or 0, at a free one.

    :raises LocalPlatformError: when the port is taken.
    """
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    # Connections inherit it. asyncio would set it itself only on sockets that are explicitly of protocol
    # TCP; without it, an answer that is sent in two parts waits 40 ms for the client's acknowledgement.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    try:
        listener.bind(("127.0.0.1", port or 0))
    except OSError as error:
        listener.close()
        raise LocalPlatformError(
            f"the local platform's API cannot listen on 127.0.0.1:{port}: {error.strerror}; "
            "choose another port"
        ) from None
    return listener


def require_linux() -> None:
    """Say at once where no node can be made, and what can be done there.

    :raises LocalPlatformError: on any system but Linux.
    """
    if sys.platform != "linux":
        raise LocalPlatformError(
            f"the local platform's nodes need Linux, and this is {sys.platform}: start it in a Linux "
            "container or virtual machine (no privileges are needed there). LocalControlPlane, whose nodes "
            "are simulated, and clusters on YellowDog work here too"
        )


def _require_packages() -> None:
    try:
        import jinja2  # noqa: F401
        import pyroute2  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise LocalPlatformError(
            f"the local platform needs the package {error.name}: pip install 'yellowdog-ray[local,ray]'"
        ) from None


def _require_ray_ports(nodes: LocalNodes) -> None:
    """Refuse to start where plain processes would meet somebody else's Ray on its ports."""
    for port in _RAY_PORTS:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("0.0.0.0", port))  # noqa: S104
            except OSError as error:
                raise LocalPlatformError(
                    f"port {port} is taken on this machine ({error.strerror}), and nodes that are "
                    f"{nodes.isolation.sentence()} share its ports: end what uses it, or start the platform "
                    "where it can make namespaces"
                ) from None


def forget_clusters(url: str) -> None:
    """Remove the state files of clusters that have ended with a platform: there is nothing left to end."""
    from yellowdog_ray.raydog.journal import forget_all

    try:
        forget_all(url)
    except OSError as error:
        _log.info("State files of clusters that have ended may be left: %s", error)
