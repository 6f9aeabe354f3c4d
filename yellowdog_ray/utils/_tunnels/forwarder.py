"""Our own engine: local ports whose connections go through one SSH connection of paramiko's."""

from __future__ import annotations

import contextlib
import logging
import selectors
import socket
import struct
import threading
import time
from dataclasses import replace

import paramiko

from yellowdog_ray.errors import TunnelError
from yellowdog_ray.utils._ssh.route import Login, bracketed
from yellowdog_ray.utils._tunnels.engines import Forward, LinkStatus
from yellowdog_ray.utils._tunnels.link import Link
from yellowdog_ray.utils._tunnels.ports import bind_all

__all__ = ["Forwarder"]

log = logging.getLogger(__name__)

_ALL = 1 << 30  # bytes: as many as there are
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER: do not end a connection in order
_HEADER = 64  # bytes of a full packet that are not data
_LINGER_SECONDS = 2.0  # for a client to see that the other side has ended the connection
_LOOK = 0.5  # seconds between looks at whether the other side has


class Forwarder:
    """Forwards ports over one :class:`.Link`; two threads for each connection.

    One thread could not do it: where both ends only send, it would wait for one of them for ever.
    """

    def __init__(self, login: Login, forwards: list[Forward]) -> None:
        self._forwards, self._link = forwards, Link(login)
        self._listeners: list[socket.socket] = []
        self._relays: set[_Relay] = set()
        self._lock = threading.Lock()
        self._stopping = False
        self._forbidden: set[Forward] = set()
        self._wake: tuple[socket.socket, socket.socket] | None = None
        self._acceptor: threading.Thread | None = None

    def start(self) -> list[int]:
        self._link.prepare()
        self._listeners = bind_all(self._forwards)
        self._wake = socket.socketpair()
        self._link.open()
        self._acceptor = threading.Thread(target=self._accept, name="ray-tunnels-accept", daemon=True)
        self._acceptor.start()
        return [int(listener.getsockname()[1]) for listener in self._listeners]

    def stop(self, deadline: float) -> list[str]:
        self._stopping = True
        # A forked process may have all of these too: closing them here would not end them.
        for sock in [*self._listeners, *(self._wake or ())]:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        if self._acceptor is not None and self._acceptor.is_alive():
            self._acceptor.join(max(0.0, deadline - time.monotonic()))
        for sock in [*self._listeners, *(self._wake or ())]:
            sock.close()
        with self._lock:
            relays = list(self._relays)
        for relay in relays:
            relay.end()
        problems = self._link.close(deadline)  # which ends the channels
        for relay in relays:
            relay.join(deadline)
        for forward in self._forwards:
            left = sum(relay.forward is forward and relay.is_alive for relay in relays)
            if left:
                problems.append(f"{left} connection(s) to local port {forward.local_port} still open")
        return problems

    def status(self) -> LinkStatus:
        forbidden = tuple(forward.remote_port for forward in self._forwards if forward in self._forbidden)
        return replace(self._link.status(len(self._relays)), forbidden=forbidden)

    def _accept(self) -> None:
        assert self._wake is not None  # noqa: S101 - for the type checker
        with selectors.DefaultSelector() as selector:
            selector.register(self._wake[0], selectors.EVENT_READ)
            for listener, forward in zip(self._listeners, self._forwards, strict=True):
                selector.register(listener, selectors.EVENT_READ, forward)
            while True:
                for key, _ in selector.select():
                    if key.data is None:
                        return
                    self._take_all(key.fileobj, key.data)  # type: ignore[arg-type]

    def _take_all(self, listener: socket.socket, forward: Forward) -> None:
        while not self._stopping:
            try:
                client, _ = listener.accept()
            except (BlockingIOError, ConnectionError):
                return
            except OSError as error:  # no more file descriptors, for one
                log.warning("A connection to local port %s was not accepted: %s", forward.local_port, error)
                time.sleep(0.1)
                return
            relay = _Relay(client, forward, self)
            with self._lock:
                self._relays.add(relay)
            try:
                relay.start()
            except RuntimeError as error:  # no more threads
                log.warning("A connection to local port %s was not accepted: %s", forward.local_port, error)
                self.forget(relay)
                client.close()

    def open(self, forward: Forward) -> paramiko.Channel:
        """Open a connection to where a forward leads."""
        try:
            channel = self._link.channel(forward.remote_host, forward.remote_port)
        except paramiko.ChannelException as error:
            if error.code == paramiko.common.OPEN_FAILED_ADMINISTRATIVELY_PROHIBITED:
                self._forbid(forward)
            raise
        self._forbidden.discard(forward)
        return channel

    def _forbid(self, forward: Forward) -> None:
        where = bracketed(forward.remote_host, forward.remote_port)
        needed = "its sshd_config needs 'AllowTcpForwarding yes'"
        said = f"The SSH server forbids connections to {where}: {needed}"
        self._link.note(said)
        with self._lock:
            is_new = forward not in self._forbidden
            self._forbidden.add(forward)
        if is_new:
            log.warning("%s", said)

    def forget(self, relay: _Relay) -> None:
        """Take a connection off the list, for it has ended."""
        with self._lock:
            self._relays.discard(relay)


class _Relay:
    """One connection: a local socket and a channel, and a thread for each direction."""

    def __init__(self, client: socket.socket, forward: Forward, owner: Forwarder) -> None:
        self.forward = forward
        self._client, self._owner = client, owner
        self._channel: paramiko.Channel | None = None
        self._ending = False
        self._over = False  # what the client still sends is of no interest
        self._client_ended = False
        self._down = threading.Thread(target=self._run, name="ray-tunnels-down", daemon=True)
        self._up = threading.Thread(target=self._send, name="ray-tunnels-up", daemon=True)

    @property
    def is_alive(self) -> bool:
        return self._down.is_alive()

    def start(self) -> None:
        self._client.setblocking(True)
        with contextlib.suppress(OSError):
            self._client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._down.start()

    def end(self) -> None:
        """Have both threads come to an end, once the link is closed too."""
        self._ending = True
        with contextlib.suppress(OSError):
            self._client.shutdown(socket.SHUT_RDWR)

    def join(self, deadline: float) -> None:
        self._down.join(max(0.0, deadline - time.monotonic()))

    def _run(self) -> None:
        in_order = False
        try:
            self._channel = channel = self._owner.open(self.forward)
            if self._ending:
                return
            self._up.start()
            in_order = self._receive(channel)
        except (TunnelError, paramiko.SSHException, EOFError, OSError, RuntimeError) as error:
            # Most often the remote port is only not open yet. The client sees a reset.
            log.debug("a connection for %s failed: %s", self.forward, error)
        finally:
            self._finish(in_order)

    def _receive(self, channel: paramiko.Channel) -> bool:
        """Carry what comes from the other side to the client; return whether it ended in order."""
        while data := channel.recv(_ALL):
            self._client.sendall(data)
        if not channel.eof_received:  # the SSH connection is gone
            return False
        with contextlib.suppress(OSError):
            self._client.shutdown(socket.SHUT_WR)
        return True

    def _send(self) -> None:
        """Carry what comes from the client to the other side."""
        channel = self._channel
        assert channel is not None  # noqa: S101 - for the type checker
        size = max(channel.out_max_packet_size - _HEADER, 1024)
        try:
            while data := self._client.recv(size):
                channel.sendall(data)
            self._client_ended = not self._over
            channel.shutdown_write()
        except (paramiko.SSHException, EOFError, OSError):
            with contextlib.suppress(paramiko.SSHException, EOFError, OSError):
                channel.close()
            self._drop(size)

    def _drop(self, size: int) -> None:
        """Take what the client still sends, so that it comes to read that the other side has ended."""
        deadline = time.monotonic() + _LINGER_SECONDS
        with contextlib.suppress(OSError):
            while not self._over and not self._ending and time.monotonic() < deadline:
                if not self._client.recv(size):
                    self._client_ended = not self._over
                    return

    def _finish(self, in_order: bool) -> None:
        channel = self._channel
        if in_order and channel is not None:
            while self._up.is_alive() and not channel.closed:
                self._up.join(_LOOK)
            self._up.join(_LINGER_SECONDS)
        if self._up.is_alive():
            # Nothing comes of it any more: wake the other thread. This tells the client nothing yet.
            self._over = True
            with contextlib.suppress(OSError):
                self._client.shutdown(socket.SHUT_RD)
            if channel is not None:
                with contextlib.suppress(OSError, EOFError, paramiko.SSHException):
                    channel.close()
        if self._up.ident is not None:
            self._up.join()
        if channel is not None:
            with contextlib.suppress(OSError, EOFError, paramiko.SSHException):
                channel.close()
        if not (in_order and self._client_ended) and not self._ending:
            with contextlib.suppress(OSError):
                self._client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        self._client.close()
        self._owner.forget(self)
