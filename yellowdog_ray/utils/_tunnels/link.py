"""One SSH connection that is kept: watched, and made again when it is lost."""

from __future__ import annotations

import contextlib
import logging
import threading
import time

import paramiko

from yellowdog_ray.errors import HostKeyError, SSHLoginError, TunnelError
from yellowdog_ray.utils._ssh.channels import quicken
from yellowdog_ray.utils._ssh.connection import Cancel, Connection, Connector
from yellowdog_ray.utils._ssh.route import Login
from yellowdog_ray.utils._tunnels.engines import (
    FIRST_PAUSE,
    HOLD_SECONDS,
    LOGIN_PAUSE,
    LONGEST_PAUSE,
    LinkStatus,
    State,
)

__all__ = ["Link"]

log = logging.getLogger(__name__)

_LOOK = 0.2  # seconds between looks at the connection
_PING_SECONDS = 3.0  # between questions to a server that says nothing by itself
# Until a server is taken for dead. A network that was cut for ten seconds is heard again before that: TCP
# repeats what was lost after 6, and then after 13 seconds.
_SILENT_SECONDS = 13.5

# Bytes. A large window keeps a long way full; on a short one it makes sshd slow, by its buffers.
_SMALLEST_WINDOW, _LARGEST_WINDOW = 2 << 20, 32 << 20
_BYTES_PER_SECOND = 200e6
_OPEN_SECONDS = 30.0  # for a channel


class Link:
    """An SSH connection that comes back by itself.

    :param login: where to.
    """

    def __init__(self, login: Login) -> None:
        self._connector = Connector(login)
        self._where = login.where
        self._condition = threading.Condition()
        self._state: State = "stopped"
        self._since = time.monotonic()
        self._reconnects = 0
        self._last_error: str | None = None
        self._connection: Connection | None = None
        self._cancel = Cancel()
        self._closing = threading.Event()
        self._threads: list[threading.Thread] = []

    def prepare(self) -> None:
        """Read keys and settings.

        :raises TunnelError: where they are of no use.
        """
        self._connector.prepare()

    def open(self) -> None:
        """Connect, and keep the connection from then on.

        :raises TunnelError: with the reason.
        """
        self._take(self._connector.connect(cancel=self._cancel))
        self._start(self._keep, "ray-tunnels-link")

    def close(self, deadline: float) -> list[str]:
        """End the connection until a deadline; return what is left then, a sentence each."""
        self._closing.set()
        self._cancel.set()
        with self._condition:
            connection, self._connection = self._connection, None
            self._say("stopped")
        if connection is not None:
            connection.close(deadline)
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        left = [thread.name for thread in self._threads if thread.is_alive()]
        return [f"the thread {name} of the SSH connection has not ended" for name in left]

    def channel(self, host: str, port: int) -> paramiko.Channel:
        """Open a TCP connection on the other side; while the link is down, wait for it.

        :raises TunnelError: where the link does not come back in time.
        :raises paramiko.SSHException: where the server does not open it.
        """
        deadline = time.monotonic() + HOLD_SECONDS
        while True:
            with self._condition:
                self._condition.wait_for(lambda: self._state != "down", max(0.0, deadline - time.monotonic()))
                connection = self._connection
                if self._state != "up" or connection is None:
                    raise TunnelError(f"The connection to {self._where} is {self._state}: {self._last_error}")
            try:
                return connection.transport.open_channel(
                    "direct-tcpip",
                    (host, port),
                    ("127.0.0.1", 0),
                    window_size=_window(connection.round_trip),
                    timeout=_OPEN_SECONDS,
                )
            except paramiko.ChannelException:
                raise
            except Exception:  # paramiko's thread passes on whatever has ended it
                if connection.is_active or time.monotonic() > deadline:
                    raise
                self._lost(connection, "it was closed by the server or the network")

    def note(self, error: str) -> None:
        """Have the status tell of an error that has not ended the connection."""
        with self._condition:
            self._last_error = error

    def status(self, connections: int) -> LinkStatus:
        """Tell how it is doing."""
        with self._condition:
            seconds = time.monotonic() - self._since
            return LinkStatus(self._state, seconds, self._reconnects, connections, self._last_error)

    def _start(self, work: object, name: str, *arguments: object) -> None:
        self._threads = [thread for thread in self._threads if thread.is_alive()]
        thread = threading.Thread(target=work, name=name, args=arguments, daemon=True)  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()

    def _say(self, state: State) -> None:
        """Take a state, with the condition held."""
        if state != self._state:
            self._state, self._since = state, time.monotonic()
            self._condition.notify_all()

    def _take(self, connection: Connection) -> None:
        """Use a new connection.

        :raises TunnelError: where it is no longer wanted.
        """
        with self._condition:
            if self._closing.is_set():
                connection.abort()
                raise TunnelError("The tunnels were stopped while they were started")
            self._reconnects += self._state == "down"
            self._connection = connection
            self._say("up")
            self._start(quicken, "ray-tunnels-quicken", connection.transport)
            self._start(self._ask, "ray-tunnels-ping", connection)

    def _ask(self, connection: Connection) -> None:
        """Have the server speak now and then, so that its silence says something."""
        transport = connection.transport
        while transport.is_active() and not self._closing.wait(_PING_SECONDS):
            with contextlib.suppress(paramiko.SSHException, EOFError, OSError):
                # It is answered, by a refusal; if not, this waits until the connection is given up.
                transport.global_request("keepalive@openssh.com", wait=True)

    def _keep(self) -> None:
        """Watch the connection, and make it again."""
        heard, silent, looked = 0.0, 0.0, time.monotonic()
        while not self._closing.wait(_LOOK):
            now = time.monotonic()
            # A process that was stopped for a while has not listened either.
            passed, looked = min(now - looked, 1.0), now
            connection = self._connection
            if connection is None:
                if not self._again():
                    return
                heard, silent, looked = 0.0, 0.0, time.monotonic()
            elif not connection.is_active:
                self._lost(connection, "it was closed by the server or the network")
            elif connection.heard != heard:
                heard, silent = connection.heard, 0.0
            else:
                silent += passed
                if silent > _SILENT_SECONDS:
                    self._lost(connection, f"the server has been silent for {silent:.0f} s")

    def _lost(self, connection: Connection, reason: str) -> None:
        with self._condition:
            if self._connection is not connection:
                return
            self._connection = None
            self._last_error = f"The SSH connection to {self._where} was lost: {reason}"
            self._say("down")
        log.warning("%s. It is being made again", self._last_error)
        connection.abort()

    def _again(self) -> bool:
        """Connect again, as often as it takes; return whether that is of any use."""
        pause = FIRST_PAUSE
        while not self._closing.is_set():
            try:
                self._take(self._connector.connect(cancel=self._cancel))
            except Exception as error:
                if not isinstance(error, TunnelError):  # no more threads, for one
                    log.warning("The SSH connection to %s could not be made again: %r", self._where, error)
                with self._condition:
                    self._last_error = str(error) or type(error).__name__
                    if isinstance(error, HostKeyError):
                        self._say("refused")
                        log.error("The SSH connection to %s is not made again: %s", self._where, error)
                        return False
                if isinstance(error, SSHLoginError):  # nobody is to be locked out for too many attempts
                    pause = LOGIN_PAUSE
            else:
                log.warning("The SSH connection to %s is there again", self._where)
                return True
            if self._closing.wait(pause):
                return False
            pause = min(2 * pause, LONGEST_PAUSE)
        return False


def _window(round_trip: float) -> int:
    return int(min(max(1.5 * round_trip * _BYTES_PER_SECOND, _SMALLEST_WINDOW), _LARGEST_WINDOW))
