"""SSH tunnels to a Ray head node: its client server and its dashboard, on local ports.

::

    with RayTunnels(cluster.head_node_public_ip, "yd-agent", private_key_file="key.pem") as tunnels:
        ray.init(tunnels.client_address)

All ports share one SSH connection. Only this machine can use them, unless a :class:`SSHTunnelSpec`
names another local address.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import threading
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import Any

import paramiko
import sshtunnel

from yellowdog_ray.errors import ClusterStateError, SpecError, TunnelError, WaitTimeoutError
from yellowdog_ray.utils._ssh_connection import (
    HostKey,
    ask_http,
    connect,
    disconnect,
    load_key,
    log_in,
    own_keys,
    quicken,
    quiet_log,
)

__all__ = ["RayTunnels", "SSHTunnelSpec"]

_CLIENT_PORT = 10001
_DASHBOARD_PORT = 8265
_AGENT_PORT = 52365  # Ray's default for --dashboard-agent-listen-port
_STOP_TIMEOUT = 2.0  # seconds


def _port(value: int | str, what: str) -> int:
    try:
        port = int(value) if isinstance(value, str) else value
    except ValueError:
        port = -1
    if isinstance(port, bool) or not isinstance(port, int) or not 1 <= port <= 65535:
        raise SpecError(f"{what} must be a port number from 1 to 65535, not {value!r}")
    return port


@dataclass
class SSHTunnelSpec:
    """One forwarded port. The two ``..._ip_address`` fields hold **port numbers**: the names are historical.

    :param local_bind_hostname: the local address to listen on; ``"localhost"`` for this machine only.
    :param local_bind_ip_address: the local port, as an int or a string of digits.
    :param remote_bind_hostname: the address to connect to, as the head node sees it.
    :param remote_bind_ip_address: the port to connect to.
    :raises SpecError: where a port is not one, or a host is empty.
    """

    local_bind_hostname: str
    local_bind_ip_address: int | str
    remote_bind_hostname: str
    remote_bind_ip_address: int | str

    def __post_init__(self) -> None:
        for what in ("local_bind_hostname", "remote_bind_hostname"):
            if not isinstance(getattr(self, what), str) or not getattr(self, what):
                raise SpecError(f"{what} must be a host name or address, not {getattr(self, what)!r}")
        _ = self.local_port, self.remote_port

    @property
    def local_host(self) -> str:
        """The local address that accepts connections."""
        return self.local_bind_hostname

    @property
    def local_port(self) -> int:
        """The local port."""
        return _port(self.local_bind_ip_address, "local_bind_ip_address")

    @property
    def remote_host(self) -> str:
        """The address to connect to, as the head node sees it."""
        return self.remote_bind_hostname

    @property
    def remote_port(self) -> int:
        """The port to connect to."""
        return _port(self.remote_bind_ip_address, "remote_bind_ip_address")


class RayTunnels:
    """Tunnels to the ports of a Ray head node, over one SSH connection.

    Making one does nothing yet; :meth:`start_tunnels` or a ``with`` block connects.

    :param ray_head_ip_address: the head node's address or name.
    :param ssh_user: the user to log in as.
    :param password: that user's password, where there is no key; tried after the key, where there are both.
    :param private_key_file: the file of the private key (OpenSSH, PEM or PKCS#8; RSA, ECDSA or Ed25519). With
        neither key nor password, the keys of the SSH agent and the unencrypted ones in ``~/.ssh`` are tried.
    :param private_key_password: the passphrase of that file.
    :param ray_tunnel_specs: the ports to forward; by default 10001 (Ray Client) and 8265 (dashboard).
    :param ssh_port: the port of the SSH server, 22 by default.
    :param host_key: the server's public key, as in ``ssh_host_ed25519_key.pub`` (``"ssh-ed25519 AAAA..."``).
        A server with another one is refused before it learns any credential. By default any key is accepted.
    :raises SpecError: for input that cannot work.
    """

    def __init__(
        self,
        ray_head_ip_address: str,
        ssh_user: str,
        password: str | None = None,
        private_key_file: str | os.PathLike[str] | None = None,
        private_key_password: str | None = None,
        ray_tunnel_specs: Sequence[SSHTunnelSpec] | None = None,
        ssh_port: int = 22,
        *,
        host_key: str | None = None,
    ) -> None:
        self._servers: list[_Server] = []
        self._transport: paramiko.Transport | None = None
        self._lock = threading.RLock()
        if not ray_head_ip_address:
            raise SpecError("The head node's address is empty: has the cluster been built?")
        if not ssh_user:
            raise SpecError("An SSH user is needed, such as the one that the node's image was made with")
        if ray_tunnel_specs is None:
            ray_tunnel_specs = [self.basic_port_forward(port) for port in (_CLIENT_PORT, _DASHBOARD_PORT)]
        self._specs = list(ray_tunnel_specs)
        local_ports = [spec.local_port for spec in self._specs]
        if not local_ports:
            raise SpecError("ray_tunnel_specs names no port to forward")
        if twice := {port for port in local_ports if local_ports.count(port) > 1}:
            raise SpecError(f"ray_tunnel_specs uses a local port twice: {', '.join(map(str, sorted(twice)))}")
        self._host, self._user, self._ssh_port = ray_head_ip_address, ssh_user, _port(ssh_port, "ssh_port")
        self._password, self._key_password = password, private_key_password
        self._key_file = os.path.expanduser(private_key_file) if private_key_file else None
        self._host_key = None if host_key is None else HostKey.parse(host_key)

    @staticmethod
    def basic_port_forward(port: int | str) -> SSHTunnelSpec:
        """Return the forwarding of a local port to the same port of the head node, both on localhost."""
        return SSHTunnelSpec("localhost", port, "localhost", port)

    def start_tunnels(self) -> None:
        """Connect and forward all ports, or none; do nothing if they are forwarded already.

        :raises TunnelError: with the reason: the key file, a local port in use, the connection, the server's
            key or the login. Nothing is left behind then.
        """
        with self._lock:
            if self.is_active:
                return
            self.stop_tunnels()
            keys = self._keys()
            try:
                for spec in self._specs:
                    self._servers.append(_Server(spec))
                self._transport = connect(self._host, self._ssh_port, self._host_key)
                log_in(self._transport, self._host, self._user, keys, self._password)
                quicken(self._transport)
                for server in self._servers:
                    server.serve(self._transport)
            except BaseException:
                self.stop_tunnels()
                raise

    def stop_tunnels(self, ignore_errors: bool = True) -> None:
        """Close all tunnels and whatever uses them, within about 2 seconds; stopping twice is no error.

        :param ignore_errors: whether to keep silent about what could not be closed.
        :raises TunnelError: with ``ignore_errors=False``, for what could not be closed.
        """
        with self._lock:
            transport, self._transport = self._transport, None
            servers, self._servers = self._servers, []
            deadline = time.monotonic() + _STOP_TIMEOUT
            problems = []
            if transport is not None:
                disconnect(transport, deadline)
            for server in servers:
                problems += server.stop(deadline)
        if problems and not ignore_errors:
            raise TunnelError(f"The tunnels to {self._where} did not close cleanly: {'; '.join(problems)}")

    def _keys(self) -> list[tuple[paramiko.PKey, str]]:
        if self._key_file is not None:
            return [(load_key(self._key_file, self._key_password), self._key_file)]
        keys = [] if self._password else own_keys()
        if not keys and not self._password:
            raise TunnelError(
                "SSH needs a key or a password: give private_key_file or password. The SSH agent has no key, "
                "and ~/.ssh none that is unencrypted"
            )
        return keys

    @property
    def is_active(self) -> bool:
        """Whether the tunnels are open and their SSH connection is, as far as is known, alive."""
        return bool(self._servers) and self._transport is not None and self._transport.is_active()

    @property
    def client_address(self) -> str | None:
        """What ``ray.init`` takes, such as ``"ray://127.0.0.1:10001"``; None if 10001 is not forwarded."""
        return self._address("ray", _CLIENT_PORT)

    @property
    def dashboard_url(self) -> str | None:
        """The dashboard's local URL, such as ``"http://127.0.0.1:8265"``; None if 8265 is not forwarded."""
        return self._address("http", _DASHBOARD_PORT)

    def wait_for_ray(self, timeout: timedelta | float = timedelta(minutes=5)) -> None:
        """Wait until Ray on the head takes clients: some seconds after its task has started.

        A client that comes earlier may be turned away (``Starting Ray client server failed``): Ray opens the
        client port before it can start anything on the node. What is asked is the health of the head's own
        raylet, at ``/api/local_raylet_healthz`` on port 52365 of its localhost, which needs no token.

        :param timeout: how long to wait, as a timedelta or in seconds.
        :raises ClusterStateError: where the tunnels are not open.
        :raises WaitTimeoutError: where Ray did not become ready in time, with the last answer.
        """
        seconds = timeout.total_seconds() if isinstance(timeout, timedelta) else float(timeout)
        deadline = time.monotonic() + seconds
        while True:
            if not self.is_active or self._transport is None:
                raise ClusterStateError(f"The tunnels to {self._where} are not open: call start_tunnels()")
            answer = ask_http(self._transport, _AGENT_PORT, "/api/local_raylet_healthz")
            if answer.startswith("HTTP/1.1 200"):
                return
            if time.monotonic() >= deadline:
                raise WaitTimeoutError(
                    f"Ray on {self._host} was not ready after {seconds:g} s: {answer}. Its "
                    "log is in /tmp/ray/session_latest/logs on the head, and the head's task has its output"
                )
            time.sleep(0.1)

    def __enter__(self) -> RayTunnels:
        self.start_tunnels()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.stop_tunnels()

    def __repr__(self) -> str:
        ports = ", ".join(f"{spec.local_port}->{spec.remote_port}" for spec in self._specs)
        return f"<RayTunnels {self._where} {ports} {'active' if self.is_active else 'stopped'}>"

    def __del__(self) -> None:
        # They are not closed: who keeps no reference may still be using the ports.
        if self._servers:
            warnings.warn(f"{self!r} was never stopped", ResourceWarning, source=self, stacklevel=1)

    @property
    def _where(self) -> str:
        return f"{self._user}@{self._host}:{self._ssh_port}"

    def _address(self, scheme: str, remote_port: int) -> str | None:
        for spec in self._specs:
            if spec.remote_port == remote_port:
                host = "127.0.0.1" if spec.local_host in ("localhost", "0.0.0.0") else spec.local_host  # noqa: S104
                return f"{scheme}://{host}:{spec.local_port}"
        return None


class _Server(sshtunnel._ThreadingForwardServer):  # type: ignore[misc]
    """One local port: bound when made, served from :meth:`serve` on.

    The port and the pumping are sshtunnel's. Its ``SSHTunnelForwarder`` around them is not used: it passes
    over a port that it cannot bind, hides why a login failed, hangs when it is stopped after a failed start
    and leaves clients behind that do not read.
    """

    request_queue_size = 128

    def __init__(self, spec: SSHTunnelSpec) -> None:
        self._spec = spec
        self._acceptor: threading.Thread | None = None
        self._clients: dict[threading.Thread, socket.socket] = {}
        self.address_family = socket.AF_INET6 if ":" in spec.local_host else socket.AF_INET
        try:
            super().__init__((spec.local_host, spec.local_port), sshtunnel._ForwardHandler, logger=quiet_log)
        except OSError as error:
            where = f"local port {spec.local_port} (for {spec.remote_port} on the head node)"
            if error.errno == errno.EADDRINUSE:
                raise TunnelError(
                    f"The {where} is in use already: by another tunnel, or a Ray of this machine? Stop that, "
                    "or choose another local port with ray_tunnel_specs"
                ) from error
            raise TunnelError(
                f"The {where} cannot be opened on {spec.local_host!r}: {error.strerror}"
            ) from error

    def serve(self, transport: paramiko.Transport) -> None:
        """Forward connections from now on."""
        remote = (self._spec.remote_host, self._spec.remote_port)
        names = {"remote_address": remote, "ssh_transport": transport, "logger": quiet_log}
        self.RequestHandlerClass = type("_Handler", (sshtunnel._ForwardHandler,), names)
        name = f"ray-tunnels-{self._spec.local_port}"
        self._acceptor = threading.Thread(target=self.serve_forever, args=(0.05,), name=name, daemon=True)
        self._acceptor.start()

    def process_request(self, request: socket.socket, client_address: Any) -> None:
        request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        arguments = (request, client_address)
        thread = threading.Thread(target=self.process_request_thread, args=arguments, daemon=True)
        self._clients[thread] = request
        thread.start()

    def process_request_thread(self, request: socket.socket, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._clients.pop(threading.current_thread(), None)

    def handle_error(self, request: socket.socket, client_address: Any) -> None:
        """Say nothing, as most often the remote port is only not open yet; the client sees an end of file."""
        quiet_log.debug("connection to %s failed", self._spec, exc_info=True)

    def stop(self, deadline: float) -> list[str]:
        """Close the port and end its clients; return what is left at the deadline, a sentence each."""
        if self._acceptor is not None:  # without one, shutdown() would wait for ever
            self.shutdown()
            self._acceptor.join(max(0.0, deadline - time.monotonic()))
        self.server_close()
        clients = list(self._clients.items())
        for _, client in clients:
            with contextlib.suppress(OSError):
                client.shutdown(socket.SHUT_RDWR)
        for thread, _ in clients:
            thread.join(max(0.0, deadline - time.monotonic()))
        left = sum(thread.is_alive() for thread, _ in clients)
        return [f"{left} connection(s) to local port {self._spec.local_port} still open"] if left else []
