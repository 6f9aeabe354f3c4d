"""LocalPlatform: the embedded platform as a user starts it.

One thread, one event loop: the HTTP API, the scheduler and the line to the nodes all live on it, so none
of them needs a lock.
"""

from __future__ import annotations

import atexit
import contextlib
import enum
import logging
import os
import secrets
import socket
import uuid
import weakref
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from yellowdog_ray.errors import ClusterStateError, LocalPlatformError, SpecError
from yellowdog_ray.local.arguments import check_port, check_templates
from yellowdog_ray.local.directory import (
    DIRECTORY_HOME,
    hold,
    keep_from_ageing,
    new_directory,
    remove_leftovers,
)
from yellowdog_ray.local.isolation import Isolation
from yellowdog_ray.local.linux import remove_tree
from yellowdog_ray.local.needs import require_linux, require_memory, require_packages, require_ray_ports
from yellowdog_ray.local.node_ssh import SSHIdentity
from yellowdog_ray.local.nodes import LocalNodes
from yellowdog_ray.local.server import Kept, Server, bind_loopback
from yellowdog_ray.local.template import DEFAULT_TEMPLATES, NodeTemplate, scheduler_with
from yellowdog_ray.local.webpage.access import web_link

if TYPE_CHECKING:
    from yellowdog_ray.local.account import LocalAccount
    from yellowdog_ray.local.platform_faults import PlatformFaults
    from yellowdog_ray.local.scheduler import SchedulerOptions
    from yellowdog_ray.raydog.access import SSHAccess

__all__ = ["LocalPlatform"]

_log = logging.getLogger(__name__)


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
        if limits is not None and not isinstance(limits, bool):
            raise SpecError(f"limits must be True, False or None, not {limits!r}")
        self._isolation = Isolation(isolation) if isolation else None
        self._port = None if port is None else check_port(port)
        self._system_sshd = system_sshd
        self._limits, self._options = limits, options
        self._templates = check_templates(DEFAULT_TEMPLATES if templates is None else templates)
        self._state = _State.NEW
        self._listener: socket.socket | None = None
        self._directory: Path | None = None
        # Descriptors that say, as long as they are open, that the directory is in use.
        self._lock: int | None = None
        self._directory_lock: int | None = None
        self._nodes_made: LocalNodes | None = None
        self._server: Server | None = None
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
        from yellowdog_ray.raydog.access import SSHAccess

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
    def _running_server(self) -> Server:
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
        require_packages()
        require_memory()
        remove_leftovers()
        try:
            self._start()
        except BaseException as error:
            self._end()
            if isinstance(error, OSError) and not isinstance(error, LocalPlatformError):
                where = error.filename or DIRECTORY_HOME
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
        self._directory = new_directory()
        self._lock = hold(self._directory)
        self._directory_lock = keep_from_ageing(self._directory)
        self._nodes_made = LocalNodes(
            self._directory,
            self._isolation,
            lock=self._lock,
            ssh=SSHIdentity(self._kept.directory) if self._kept else None,
            system_sshd=self._system_sshd,
            limits=self._limits,
        )
        if self._nodes.isolation is Isolation.PROCESSES:
            require_ray_ports(self._nodes.isolation)
        self._server = Server(
            self._listener,
            self._nodes,
            scheduler_with(self._templates, self._options),
            self._key_id,
            self._secret,
            self._kept,
        )
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


def _close(reference: weakref.ref[LocalPlatform]) -> None:
    platform = reference()
    if platform is not None:
        platform.close()


def forget_clusters(url: str) -> None:
    """Remove the state files of clusters that have ended with a platform: there is nothing left to end."""
    from yellowdog_ray.raydog.journal import forget_all

    try:
        forget_all(url)
    except OSError as error:
        _log.info("State files of clusters that have ended may be left: %s", error)
