"""SSH connections over paramiko, with failures that say what was wrong and what to do."""

from __future__ import annotations

import contextlib
import logging
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Protocol

import paramiko

from yellowdog_ray.errors import RayDogError, SSHLoginError, TunnelError
from yellowdog_ray.utils._ssh.hostkeys import HostKey, HostKeys
from yellowdog_ray.utils._ssh.keys import MOST_KEYS, NamedKey, keys_to_try
from yellowdog_ray.utils._ssh.proxy import ProxySocket
from yellowdog_ray.utils._ssh.route import Hop, Login, bracketed, route
from yellowdog_ray.utils._ssh.transport import Packetizer, Transport

__all__ = ["CONNECT_TIMEOUT", "Cancel", "Connection", "Connector", "quiet_log"]

CONNECT_TIMEOUT = 15.0  # seconds, for each of: TCP, the server's banner, the key exchange, each login
_KEEPALIVE = 15  # seconds; keeps the connection in the tables of NAT routers
_USER_TIMEOUT = 15_000  # milliseconds that sent data may stay unacknowledged before the kernel gives up
_LOOK = 0.1  # seconds between looks at whether a connection that is being made is still wanted

# paramiko logs every refused channel and failed handshake as an error, some with a traceback, and all of it
# comes as an exception too. To see it, lower this logger's level.
quiet_log = logging.getLogger("yellowdog_ray.ssh")
quiet_log.setLevel(logging.CRITICAL)


class _Closable(Protocol):
    def shutdown(self, how: int, /) -> None: ...


class Cancel:
    """Ends a connection that is being made, from another thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._under_way: _Closable | None = None
        self.is_set = False

    def set(self) -> None:
        """End it."""
        with self._lock:
            self.is_set = True
            if self._under_way is not None:
                with contextlib.suppress(OSError, EOFError):
                    self._under_way.shutdown(socket.SHUT_RDWR)

    def watch(self, sock: _Closable | None) -> None:
        """Name the socket that is waited for at the moment."""
        with self._lock:
            self._under_way = sock
        self.check()

    def check(self) -> None:
        """Raise an error where the connection is no longer wanted."""
        if self.is_set:
            raise TunnelError("The connection was given up while it was being made")


class Connection:
    """An SSH connection whose server was checked, and which is logged in.

    :param transport: the connection to the server itself.
    :param round_trip: seconds that a packet needs there and back, as far as that is known.
    """

    def __init__(self, transport: paramiko.Transport, round_trip: float, hops: Sequence[paramiko.Transport]):
        self.transport, self.round_trip = transport, round_trip
        self._hops = [*hops, transport]
        self.login: NamedKey | None = None  # the key that was accepted

    @property
    def is_active(self) -> bool:
        """Whether it is, as far as is known, alive."""
        return self.transport.is_active()

    @property
    def heard(self) -> float:
        """When the server was last heard, by ``time.monotonic``."""
        packetizer = self.transport.packetizer
        return packetizer.heard if isinstance(packetizer, Packetizer) else 0.0

    def close(self, deadline: float) -> None:
        """End it and wait for its threads, until a deadline of ``time.monotonic``."""
        # A thread that sends would hold up the good-byes, until the socket under all of it is shut.
        for transport in self._hops:
            if isinstance(transport.sock, socket.socket):
                with contextlib.suppress(OSError):
                    transport.sock.shutdown(socket.SHUT_RDWR)
        for transport in reversed(self._hops):
            disconnect(transport, deadline)

    def abort(self) -> None:
        """End it without waiting for anything."""
        self.close(0.0)


class Connector:
    """Makes connections for one login; what it has learnt of host keys holds for all of them.

    :raises SpecError: where the login's host key is none.
    """

    def __init__(self, login: Login) -> None:
        self.login = login
        self.host_keys = HostKeys(login.host_key, login.strict, Path(login.record) if login.record else None)
        self._keys: dict[str, list[NamedKey]] = {}
        self._way: list[Hop] = []

    def prepare(self) -> bool:
        """Read the user's settings and keys, before anything else is done.

        :returns: whether the server is connected to without anything in between.
        :raises TunnelError: where they are of no use.
        """
        login = self.login
        way = route(login)
        target = way[-1]
        keys = {
            target.where: keys_to_try(login.key_file, login.key_password, login.password, target.identities)
        }
        for hop in way[:-1]:
            self.host_keys.pass_through(hop.key_name, hop.port)
            named = [] if hop.identities else keys[target.where]
            keys.setdefault(hop.where, named or keys_to_try(None, None, None, hop.identities))
        self._way, self._keys = way, keys  # both, or none
        return len(way) == 1 and target.command is None

    def connect(self, timeout: float | None = None, cancel: Cancel | None = None) -> Connection:
        """Connect to the server, perhaps through others, check every key on the way and log in.

        :param timeout: seconds, for each of: TCP, the server's banner, the key exchange, each login.
        :raises TunnelError: with the reason; nothing is left open then.
        """
        timeout, cancel = CONNECT_TIMEOUT if timeout is None else timeout, cancel or Cancel()
        if not self._way:
            self.prepare()
        transports: list[paramiko.Transport] = []
        round_trip = 0.0
        accepted = None
        try:
            for hop in self._way:
                is_target = hop is self._way[-1]
                password = self.login.password if is_target else None
                refused: list[str] = []
                while True:
                    began = time.monotonic()
                    sock = _open(hop, transports[-1] if transports else None, timeout, cancel)
                    spent = time.monotonic() - began
                    transport = self._start_ssh(sock, hop, timeout, cancel, pinned=is_target)
                    transports.append(transport)
                    try:
                        accepted = log_in(
                            transport, hop.where, hop.user, self._keys[hop.where], password, refused
                        )
                    except _HungUpError:
                        disconnect(transports.pop(), time.monotonic() + 1)
                    else:
                        break
                round_trip += spent
                cancel.watch(None)
        except BaseException:
            for transport in reversed(transports):
                disconnect(transport, time.monotonic() + 1)
            cancel.check()
            raise
        connection = Connection(transports[-1], round_trip, transports[:-1])
        connection.login = accepted
        return connection

    def log_in_over(
        self, channel: paramiko.Channel, host: str, port: int, key_name: str, timeout: float
    ) -> Connection:
        """Log in to another server, as the same user with the same keys, over a channel to it.

        :param key_name: what the server is called where host keys are recorded.
        :raises TunnelError: with the reason; the channel is closed then.
        """
        login = self.login
        hop = Hop(host, port, login.user, key_name, (), None)
        transport = self._start_ssh(channel, hop, timeout, Cancel(), pinned=False)
        connection = Connection(transport, 0.0, ())
        try:
            if not self._way:
                self.prepare()
            keys = self._keys[self._way[-1].where]
            log_in(transport, hop.where, login.user, keys, login.password, [])
        except BaseException:
            connection.close(time.monotonic() + 1)
            raise
        return connection

    def _start_ssh(
        self,
        sock: socket.socket | paramiko.Channel,
        hop: Hop,
        timeout: float,
        cancel: Cancel,
        *,
        pinned: bool,
    ) -> paramiko.Transport:
        """Speak SSH over an open connection, perhaps a channel of another one, and check the server's key.

        :param pinned: whether the login's own host key is that of this server.
        :raises TunnelError: with the reason; the connection is closed then.
        """
        where = hop.where
        transport = None
        try:
            cancel.watch(sock)
            transport = Transport(sock)
            transport.set_log_channel(quiet_log.name)
            transport.daemon = True
            transport.banner_timeout = transport.auth_timeout = timeout
            options = transport.get_security_options()
            # The fastest first.
            options.ciphers = sorted(options.ciphers, key=lambda name: "gcm" not in name)
            kinds = self.host_keys.kinds(hop.key_name, hop.port, pinned)
            names = [name for kind in kinds for name in _algorithms(kind)]
            # A server may have several keys: ask for one that is known.
            options.key_types = sorted(options.key_types, key=lambda name: name not in names)
            transport.start_client(timeout=timeout)
            remote = transport.get_remote_server_key()
            found = HostKey(remote.get_name(), remote.asbytes())
            self.host_keys.check(found, where, hop.key_name, hop.port, pinned)
            transport.set_keepalive(_KEEPALIVE)
        except BaseException as error:
            if transport is not None:
                disconnect(transport, time.monotonic() + 1)
            sock.close()
            # paramiko's thread passes on whatever an answer that makes no sense has led to.
            if isinstance(error, Exception) and not isinstance(error, RayDogError):
                cancel.check()
                reason = str(error) or type(error).__name__
                raise TunnelError(f"{where} accepts connections, but SSH with it failed: {reason}") from error
            raise
        return transport


def _algorithms(kind: str) -> list[str]:
    return ["rsa-sha2-512", "rsa-sha2-256"] if kind == "ssh-rsa" else [kind]


def _open(
    hop: Hop, before: paramiko.Transport | None, timeout: float, cancel: Cancel
) -> socket.socket | paramiko.Channel:
    """Open a connection to a server: directly, by a command, or through the one before it."""
    if before is not None:
        from yellowdog_ray.utils._ssh.channels import open_tcp

        return open_tcp(before, hop.host, hop.port, timeout, "The server on the way")
    if hop.command is not None:
        return ProxySocket(hop.command)
    return dial(hop.host, hop.port, timeout, cancel)


def dial(host: str, port: int, timeout: float, cancel: Cancel) -> socket.socket:
    """Connect to an address, IPv4 or IPv6, or to the first one of a name that answers.

    :param timeout: seconds, for each of its addresses.
    :raises TunnelError: with the reason.
    """
    where = bracketed(host, port)
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (socket.gaierror, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise TunnelError(f"The name {host!r} cannot be resolved: {reason}") from error
    problem: OSError = OSError("it has no address")
    for family, kind, protocol, _, address in found:
        try:
            sock = socket.socket(family, kind, protocol)
        except OSError as error:  # no IPv6 here
            problem = error
            continue
        try:
            _dial(sock, address, timeout, cancel)
        except BaseException as error:
            sock.close()
            if not isinstance(error, OSError) or isinstance(error, TunnelError):
                raise
            problem = error
        else:
            return sock
    if isinstance(problem, TimeoutError):
        raise TunnelError(
            f"{where} did not answer within {timeout:g} s. Is the node up, is the address the right "
            "one (public or private), and do its firewalls let this machine in?"
        ) from problem
    raise TunnelError(
        f"No connection to {where}: {problem.strerror or problem}. Does sshd listen there?"
    ) from problem


def _dial(sock: socket.socket, address: object, timeout: float, cancel: Cancel) -> None:
    sock.setblocking(False)
    deadline = time.monotonic() + timeout
    with contextlib.suppress(BlockingIOError):
        sock.connect(address)  # type: ignore[arg-type]
    poller = select.poll()
    poller.register(sock, select.POLLOUT)
    while not poller.poll(_LOOK * 1000):
        cancel.check()
        if time.monotonic() > deadline:
            raise TimeoutError
    if code := sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
        raise OSError(code, os.strerror(code))
    sock.setblocking(True)
    # If these fail, the connection has ended already: what follows says so.
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _USER_TIMEOUT)


def disconnect(transport: paramiko.Transport, deadline: float) -> None:
    """End a connection and wait for its thread, until a deadline of ``time.monotonic``.

    paramiko's own ``close`` lets the thread poll on for a while, and with it the connection.
    """
    with contextlib.suppress(OSError, EOFError):
        transport.sock.shutdown(socket.SHUT_RDWR)
    with contextlib.suppress(OSError, EOFError):
        transport.close()
    if transport.is_alive():
        transport.join(max(0.0, deadline - time.monotonic()))


class _HungUpError(TunnelError):
    """The server has ended the connection after some attempts to log in, but not refused all of them."""


def log_in(
    transport: paramiko.Transport,
    where: str,
    user: str,
    keys: Sequence[NamedKey],
    password: str | None,
    refused: list[str],
) -> NamedKey | None:
    """Log in with one of the keys and then, if they are refused, with the password if there is one.

    :param where: the server's name, for messages.
    :param keys: of many, only the first ones are tried: servers hang up.
    :param refused: what was refused over earlier connections, one for each attempt; what is refused now is
        added.
    :returns: the key that was accepted; None where it was the password.
    :raises _HungUpError: where another connection has to be made for further attempts. asyncssh's server is
        one that takes only one from paramiko.
    :raises TunnelError: where neither is accepted; the transport is left to the caller.
    """
    attempts: list[tuple[str, NamedKey | None, Callable[[], Sequence[str]]]] = []
    for key, origin in keys[:MOST_KEYS]:
        named = f"the key {origin} ({HostKey(key.get_name(), key.asbytes())})"
        attempts.append((named, (key, origin), partial(transport.auth_publickey, user, key)))
    if password:
        attempts.append(("the password", None, lambda: transport.auth_password(user, password)))
    first = len(refused)
    for what, key_there, attempt in attempts[first:]:
        try:
            missing = attempt()
        except paramiko.BadAuthenticationType as error:
            refused.append(f"{what} (the server takes {', '.join(error.allowed_types) or 'nothing'})")
        except Exception as error:  # of any kind, where the server's answer makes no sense
            if isinstance(error, paramiko.AuthenticationException) and transport.is_active():
                refused.append(what)
                continue
            kind = TunnelError if len(refused) == first else _HungUpError
            reason = str(error) or type(error).__name__
            raise kind(f"{where} ended the login of user {user!r}: {reason}") from error
        else:
            if not missing:
                return key_there
            refused.append(f"{what} alone (the server also wants {', '.join(missing)})")
    more = len(keys) - MOST_KEYS
    untried = (
        f"{more} more {'key was' if more == 1 else 'keys were'} not tried; name one with private_key_file. "
        if more > 0
        else ""
    )
    raise SSHLoginError(
        f"{where} does not let user {user!r} in with {' or '.join(refused)}. {untried}Is this the right user "
        "for the node's image, and is the public key among its authorized_keys?"
    )
