"""SSH connections over paramiko, with failures that say what was wrong and what to do."""

from __future__ import annotations

import base64
import binascii
import contextlib
import hashlib
import io
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import paramiko
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from yellowdog_ray.errors import SpecError, TunnelError

CONNECT_TIMEOUT = 15.0  # seconds, for each of: TCP, the server's banner, the key exchange, each login
_KEEPALIVE = 15  # seconds; keeps the connection in the tables of NAT routers
_USER_TIMEOUT = 30_000  # milliseconds that sent data may stay unacknowledged before the kernel gives up

# paramiko logs every refused channel and failed handshake as an error, some with a traceback, and all of it
# comes as an exception too. To see it, lower this logger's level.
quiet_log = logging.getLogger("yellowdog_ray.ssh")
quiet_log.setLevel(logging.CRITICAL)


class HostKey(NamedTuple):
    """A server's public key."""

    kind: str
    blob: bytes

    def __str__(self) -> str:
        digest = base64.b64encode(hashlib.sha256(self.blob).digest()).decode().rstrip("=")
        return f"{self.kind} SHA256:{digest}"

    @classmethod
    def parse(cls, line: str) -> HostKey:
        """Read an OpenSSH public key line: ``type base64 [comment]``.

        :raises SpecError: where the line is something else.
        """
        kind, _, rest = line.strip().partition(" ")
        try:
            blob = base64.b64decode(rest.split()[0], validate=True)
        except (IndexError, binascii.Error):
            blob = b""
        # The type is repeated inside, after its length in 4 bytes.
        if not kind or blob[4 : 4 + len(kind)] != kind.encode():
            raise SpecError(
                f"host_key must be a public key line such as 'ssh-ed25519 AAAA...', not {line[:60]!r}"
            )
        return cls(kind, blob)


def load_key(path: str, passphrase: str | None) -> paramiko.PKey:
    """Read a private key: OpenSSH's format, PEM or PKCS#8; RSA, ECDSA or Ed25519.

    :raises TunnelError: where there is no such file, it is no key, or the passphrase is missing or wrong.
    """
    try:
        with open(path, "rb") as file:
            data = file.read()
    except OSError as error:
        raise TunnelError(f"Cannot read the private key file {path}: {error.strerror}") from error
    openssh = b"-----BEGIN OPENSSH PRIVATE KEY-----" in data
    load = serialization.load_ssh_private_key if openssh else serialization.load_pem_private_key
    try:
        try:
            key = load(data, None)
        except TypeError:  # it is encrypted
            if not passphrase:
                raise TunnelError(f"The private key {path} is encrypted: give private_key_password") from None
            try:
                key = load(data, passphrase.encode())
            except ValueError as error:
                raise TunnelError(f"private_key_password does not open the private key {path}") from error
    except (ValueError, UnsupportedAlgorithm) as error:
        kind = (
            "a public key: give the private one"
            if data.startswith((b"ssh-", b"ecdsa-"))
            else "no private key"
        )
        raise TunnelError(f"{path} is {kind}, or is damaged or of an unknown format ({error})") from error
    pem = serialization.PrivateFormat.OpenSSH
    plain = serialization.NoEncryption()
    for kind_of_key, reader in (
        (rsa.RSAPrivateKey, paramiko.RSAKey),
        (ec.EllipticCurvePrivateKey, paramiko.ECDSAKey),
        (ed25519.Ed25519PrivateKey, paramiko.Ed25519Key),
    ):
        if isinstance(key, kind_of_key):
            text = key.private_bytes(serialization.Encoding.PEM, pem, plain).decode()
            return reader.from_private_key(io.StringIO(text))
    raise TunnelError(f"The private key {path} is neither RSA, ECDSA nor Ed25519")


def own_keys() -> list[tuple[paramiko.PKey, str]]:
    """List the keys that ``ssh`` would try: those of the user's agent, then the unencrypted ones in ~/.ssh.

    :returns: each with where it is from; at most five, since sshd hangs up after six attempts.
    """
    keys: list[tuple[paramiko.PKey, str]] = []
    with contextlib.suppress(paramiko.SSHException, OSError):
        keys += [(key, f"{key.comment or 'unnamed'} of the SSH agent") for key in paramiko.Agent().get_keys()]
    for name in ("id_ed25519", "id_ecdsa", "id_rsa"):
        path = os.path.expanduser(f"~/.ssh/{name}")
        with contextlib.suppress(TunnelError):
            keys.append((load_key(path, None), path))
    return keys[:5]


def keys_to_try(
    key_file: str | None, passphrase: str | None, password: str | None
) -> list[tuple[paramiko.PKey, str]]:
    """List the keys to log in with: that of a file, or the user's own without a file and a password.

    :param key_file: the file of a private key; ``~`` is the user's home.
    :param passphrase: what opens that file, where it is encrypted.
    :returns: each with where it is from.
    :raises TunnelError: where the file is of no use, or there is neither a key nor a password.
    """
    if key_file:
        path = os.path.expanduser(key_file)
        return [(load_key(path, passphrase), path)]
    keys = [] if password else own_keys()
    if not keys and not password:
        raise TunnelError(
            "SSH needs a key or a password: give private_key_file or password. The SSH agent has no key, "
            "and ~/.ssh none that is unencrypted"
        )
    return keys


def connect(
    host: str, port: int, host_key: HostKey | None, timeout: float | None = None
) -> paramiko.Transport:
    """Connect to an SSH server and check its key; nobody is logged in yet.

    :param host_key: the key that it must have; any if None.
    :param timeout: seconds, for each of: TCP, the server's banner, the key exchange, each later login; 15 by
        default.
    :raises TunnelError: with the reason; nothing is left open then.
    """
    timeout = CONNECT_TIMEOUT if timeout is None else timeout
    where = f"{host}:{port}"
    try:
        sock = socket.create_connection((host, port), timeout=timeout)
    except socket.gaierror as error:
        raise TunnelError(f"The name {host!r} cannot be resolved: {error.strerror}") from error
    except TimeoutError as error:
        raise TunnelError(
            f"{where} did not answer within {timeout:g} s. Is the node up, is the address the right "
            "one (public or private), and do its firewalls let this machine in?"
        ) from error
    except OSError as error:
        raise TunnelError(
            f"No connection to {where}: {error.strerror or error}. Does sshd listen there?"
        ) from error
    # If these fail, the connection has ended already: what follows says so.
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _USER_TIMEOUT)
    return start_ssh(sock, where, host_key, timeout)


def start_ssh(
    sock: socket.socket | paramiko.Channel, where: str, host_key: HostKey | None, timeout: float
) -> paramiko.Transport:
    """Speak SSH over an open connection, perhaps a channel of another one, and check the server's key.

    :param where: the server's name, for messages.
    :param host_key: the key that it must have; any if None.
    :param timeout: seconds, for each of: the server's banner, the key exchange, each later login.
    :raises TunnelError: with the reason; the connection is closed then.
    """
    transport = None
    try:
        transport = paramiko.Transport(sock)
        transport.set_log_channel(quiet_log.name)
        transport.daemon = True
        transport.banner_timeout = transport.auth_timeout = timeout
        options = transport.get_security_options()
        options.ciphers = sorted(
            options.ciphers, key=lambda name: "aes128-gcm" not in name
        )  # the fastest first
        if host_key is not None:  # a server may have several keys: ask for this kind
            kinds = ["rsa-sha2-512", "rsa-sha2-256"] if host_key.kind == "ssh-rsa" else [host_key.kind]
            options.key_types = sorted(options.key_types, key=lambda name: name not in kinds)
        transport.start_client(timeout=timeout)
        remote = transport.get_remote_server_key()
        found = HostKey(remote.get_name(), remote.asbytes())
        if host_key is not None and found != host_key:
            raise TunnelError(
                f"{where} is not the server that was expected, or its key has changed. Its key is {found}, "
                f"expected was {host_key}. No user name, password or key was shown to it."
            )
        transport.set_keepalive(_KEEPALIVE)
    except BaseException as error:
        if transport is not None:
            disconnect(transport, time.monotonic() + 1)
        sock.close()
        if isinstance(error, (paramiko.SSHException, EOFError, OSError)) and not isinstance(
            error, TunnelError
        ):
            reason = str(error) or type(error).__name__
            raise TunnelError(f"{where} accepts connections, but SSH with it failed: {reason}") from error
        raise
    return transport


def disconnect(transport: paramiko.Transport, deadline: float) -> None:
    """End a connection and wait for its thread, until a deadline of ``time.monotonic``.

    paramiko's own ``close`` lets the thread poll on for a while, and with it the connection.
    """
    with contextlib.suppress(OSError):
        transport.sock.shutdown(socket.SHUT_RDWR)
    transport.close()
    if transport.is_alive():
        transport.join(max(0.0, deadline - time.monotonic()))


def log_in(
    transport: paramiko.Transport,
    host: str,
    user: str,
    keys: Sequence[tuple[paramiko.PKey, str]],
    password: str | None,
) -> None:
    """Log in with one of the keys and then, if they are refused, with the password if there is one.

    :param host: the server's name, for messages.
    :param keys: keys, each with where it is from, for messages.
    :raises TunnelError: where neither is accepted; the transport is left to the caller.
    """
    where = f"{host}:{transport.getpeername()[1]}"
    attempts: list[tuple[str, Callable[[], Sequence[str]]]] = []
    for key, origin in keys:
        named = f"the key {origin} ({HostKey(key.get_name(), key.asbytes())})"
        attempts.append((named, partial(transport.auth_publickey, user, key)))
    if password:
        attempts.append(("the password", lambda: transport.auth_password(user, password)))
    refused = []
    for what, attempt in attempts:
        try:
            missing = attempt()
        except paramiko.BadAuthenticationType as error:
            refused.append(f"{what} (the server takes {', '.join(error.allowed_types) or 'nothing'})")
        except paramiko.AuthenticationException:
            refused.append(what)
        except (paramiko.SSHException, EOFError, OSError) as error:
            reason = str(error) or type(error).__name__
            raise TunnelError(f"{where} ended the login of user {user!r}: {reason}") from error
        else:
            if not missing:
                return
            refused.append(f"{what} alone (the server also wants {', '.join(missing)})")
    raise TunnelError(
        f"{where} does not let user {user!r} in with {' or '.join(refused)}. Is this the right user for the "
        "node's image, and is the public key among its authorized_keys?"
    )


def quicken(transport: paramiko.Transport) -> None:
    """Have sshd send small packets at once.

    Before version 10.1 it does so only once a session has run something: a connection that only forwards
    waits about 40 ms for each answer that comes in two parts, as all of Ray's do.
    """

    def run() -> None:
        try:
            with transport.open_session(timeout=CONNECT_TIMEOUT) as channel:
                channel.exec_command("true")
        except (paramiko.SSHException, EOFError, OSError) as error:
            quiet_log.debug("no session for the tunnels' sake: %s", error)

    threading.Thread(target=run, name="ray-tunnels-quicken", daemon=True).start()


def ask_http(transport: paramiko.Transport, port: int, path: str) -> str:
    """Ask a web server on the SSH server's localhost; return its status line, or why there is none."""
    try:
        with transport.open_channel(
            "direct-tcpip", ("127.0.0.1", port), ("127.0.0.1", 0), timeout=CONNECT_TIMEOUT
        ) as channel:
            channel.settimeout(CONNECT_TIMEOUT)
            channel.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
            answer = channel.recv(1024).decode(errors="replace").partition("\r\n")[0]
            return answer or f"port {port} closes connections at once"
    except paramiko.ChannelException:
        return f"nothing listens on port {port}"
    except (paramiko.SSHException, EOFError, OSError) as error:
        return f"port {port} does not answer ({str(error) or type(error).__name__})"


def open_tcp(transport: paramiko.Transport, host: str, port: int, timeout: float) -> paramiko.Channel:
    """Open a TCP connection from the SSH server to a port, of itself or of another machine.

    :param timeout: seconds, for the opening and then for each read and write.
    :raises TunnelError: with the reason.
    """
    try:
        channel = transport.open_channel("direct-tcpip", (host, port), ("127.0.0.1", 0), timeout=timeout)
    except paramiko.ChannelException as error:
        if error.code == paramiko.common.OPEN_FAILED_ADMINISTRATIVELY_PROHIBITED:
            raise TunnelError(
                f"The SSH server of the head forbids connections to {host}:{port}: its sshd_config needs "
                "'AllowTcpForwarding yes'"
            ) from error
        raise TunnelError(f"The head cannot connect to {host}:{port}: nothing listens there") from error
    except (paramiko.SSHException, EOFError, OSError) as error:
        reason = str(error).rstrip(".") or type(error).__name__
        raise TunnelError(f"The head did not connect to {host}:{port}: {reason}") from error
    channel.settimeout(timeout)
    return channel


def run(transport: paramiko.Transport, command: str, timeout: float) -> tuple[int, bytes, str]:
    """Run a command on the SSH server.

    :param timeout: seconds until it must have ended.
    :returns: its exit status, its output and what it wrote to its error stream.
    :raises TunnelError: where it could not be run or did not end in time.
    """
    where = "{}:{}".format(*transport.getpeername()[:2])
    try:
        with transport.open_session(timeout=timeout) as channel:
            expired = threading.Event()

            def expire() -> None:
                expired.set()
                channel.close()

            # paramiko waits for some of the answers without any limit, but not on a closed channel.
            timer = threading.Timer(timeout, expire)
            timer.daemon = True
            timer.start()
            try:
                channel.exec_command(command)
                channel.shutdown_write()
                output = b"".join(iter(lambda: channel.recv(1 << 16), b""))
                errors = b"".join(iter(lambda: channel.recv_stderr(1 << 16), b""))
                status = channel.recv_exit_status()
            finally:
                timer.cancel()
                if expired.is_set():
                    raise TunnelError(f"A command on {where} did not end within {timeout:g} s")
    except TunnelError:
        raise
    except (paramiko.SSHException, EOFError, OSError) as error:
        reason = str(error).rstrip(".") or type(error).__name__
        raise TunnelError(f"A command could not be run on {where}: {reason}") from error
    if status < 0:
        raise TunnelError(f"The connection to {where} ended while a command ran")
    return status, output, errors.decode(errors="replace").strip()


def is_alive(transport: paramiko.Transport, timeout: float = 3.0) -> bool:
    """Tell whether an SSH server still answers; a connection may have died without either end being told.

    :param timeout: seconds to wait for its answer.
    """
    try:
        transport.open_session(timeout=timeout).close()
    except paramiko.ChannelException:
        pass  # it refuses another session: that is an answer
    except (paramiko.SSHException, EOFError, OSError):
        return False
    return True
