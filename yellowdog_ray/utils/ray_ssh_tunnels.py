"""SSH tunnels to a Ray head node: its client server, its dashboard and more, on local ports.

::

    with RayTunnels(cluster.head_node_public_ip, "yd-agent", private_key_file="key.pem") as tunnels:
        ray.init(tunnels.client_address)

All ports share one SSH connection, which comes back by itself when it is lost. Only this machine can use
them, unless a :class:`SSHTunnelSpec` names another local address.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Literal

from yellowdog_ray.errors import ClusterStateError, SpecError, TunnelError, WaitTimeoutError
from yellowdog_ray.raydog.ports import AGENT, CLIENT, DASHBOARD, GRAFANA, PROMETHEUS
from yellowdog_ray.utils._http import get

if TYPE_CHECKING:
    from yellowdog_ray.utils._tunnels.engines import Engine, EngineName, Forward

__all__ = ["LocalPort", "RayTunnels", "SSHTunnelSpec", "TunnelStatus"]

log = logging.getLogger(__name__)

_STOP_TIMEOUT = 1.9  # seconds
_ANSWER_TIMEOUT = 10.0  # seconds
_LOCAL = ("localhost", "::1")

LocalPort = Literal["match", "auto"] | int
"""``"match"`` for the number on the head, ``"auto"`` for one that nobody uses, or a number."""


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


@dataclass(frozen=True)
class TunnelStatus:
    """How tunnels are doing.

    :param state: ``"stopped"``; ``"up"``; ``"down"`` while the SSH connection is lost and made again; or
        ``"refused"``, which is for good: the server's key has changed. Tunnels that were lost and do not come
        back are ``"stopped"``, with the error.
    :param seconds: for how long it has been so.
    :param reconnects: how often the connection was lost and came back.
    :param connections: how many clients use the tunnels now; None where the engine does not tell.
    :param last_error: why the connection was lost the last time, or cannot be made again, or that the server
        forbids connections to a port.
    :param ports: local ports by the ports on the other side.
    :param engine: what forwards them.
    """

    state: Literal["stopped", "up", "down", "refused"]
    seconds: float
    reconnects: int
    connections: int | None
    last_error: str | None
    ports: dict[int, int] = field(default_factory=dict)
    engine: str = "paramiko"

    def __str__(self) -> str:
        ports = ", ".join(f"{local}->{remote}" for remote, local in self.ports.items())
        error = f"; {self.last_error}" if self.last_error else ""
        return f"{self.state} for {self.seconds:.0f} s, {ports}, {self.reconnects} reconnects{error}"


class RayTunnels:
    """Tunnels to the ports of a Ray head node, over one SSH connection.

    Making one does nothing yet; :meth:`start_tunnels` or a ``with`` block connects. A connection that is
    lost, or whose server has been silent for 14 seconds, is made again, as often as it takes. The local ports
    stay open meanwhile, and new clients are held for up to 20 seconds.

    :param ray_head_ip_address: the head node's address or name (IPv4 or IPv6), or an alias in
        ``~/.ssh/config``.
    :param ssh_user: the user to log in as.
    :param password: that user's password, where there is no key; tried after the key, where there are both.
    :param private_key_file: the file of the private key (OpenSSH, PEM or PKCS#8; RSA, ECDSA or Ed25519), with
        a certificate beside it where there is one. With neither key nor password, the keys of the SSH agent,
        the unencrypted ones that ``~/.ssh/config`` names and those in ``~/.ssh`` are tried.
    :param private_key_password: the passphrase of that file.
    :param ray_tunnel_specs: the ports to forward; by default 10001 (Ray Client) and 8265 (dashboard).
    :param ssh_port: the port of the SSH server; None for what ``~/.ssh/config`` says, or else 22.
    :param host_key: the server's public key, as in ``ssh_host_ed25519_key.pub`` (``"ssh-ed25519 AAAA..."``),
        or its fingerprint (``"SHA256:..."``). A server with another one is refused before it learns any
        credential. Without it, ``~/.ssh/known_hosts`` says which key is right; and of a server that nobody
        knows, the key is recorded on first use, and no other one is accepted later.
    :param strict_host_key: whether a server is refused that neither ``host_key`` nor a known_hosts file
        names.
    :param known_hosts: the file for the head's key on first use. By default it belongs to the cluster whose
        head has this address, by its state file, and is removed with it; where there is none, it is
        ``known_hosts`` in the directory of the state files. Keys of bastions are always recorded there.
    :param jump: a bastion, or several, as ``ssh -J`` takes them (``"user@bastion:22"``); None for what
        ``~/.ssh/config`` says.
    :param ssh_config: whether ``~/.ssh/config`` is read; or another file of its kind.
    :param local_port: ``"match"`` for the same numbers as on the other side, ``"auto"`` for numbers that
        nobody uses (the ones on the other side have to differ then), or the number of the first tunnel, from
        which the others count up. None for what ``ray_tunnel_specs`` say.
    :param engine: ``"paramiko"`` for RayDog's own forwarder, ``"openssh"`` for the program ``ssh``, or
        ``"sshtunnel"``. What each of them cannot do is told by :meth:`limits`.
    :param isolate: whether the forwarder works in a process of its own: in this one, Python code that is busy
        slows the tunnels down.
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
        ssh_port: int | None = None,
        *,
        host_key: str | None = None,
        strict_host_key: bool = False,
        known_hosts: str | os.PathLike[str] | None = None,
        jump: str | None = None,
        ssh_config: bool | str | os.PathLike[str] = True,
        local_port: LocalPort | None = None,
        engine: EngineName = "paramiko",
        isolate: bool = False,
    ) -> None:
        from yellowdog_ray.raydog.access import SSHAccess
        from yellowdog_ray.utils._tunnels.engines import check_engine

        self._engine: Engine | None = None
        self._starting = threading.Lock()  # held while they are started, which may take long
        self._lock = threading.Lock()  # for the engine and its ports, held for a moment only
        if not ray_head_ip_address:
            raise SpecError("The head node's address is empty: has the cluster been built?")
        if not isinstance(ray_head_ip_address, str):
            raise SpecError(f"The head node's address must be a text, not {ray_head_ip_address!r}")
        if not ssh_user:
            raise SpecError("An SSH user is needed, such as the one that the node's image was made with")
        if ray_tunnel_specs is None:
            ray_tunnel_specs = [self.basic_port_forward(port) for port in (CLIENT, DASHBOARD)]
        if not isinstance(ray_tunnel_specs, Sequence) or not all(
            isinstance(spec, SSHTunnelSpec) for spec in ray_tunnel_specs
        ):
            raise SpecError(
                f"ray_tunnel_specs must be a list of SSHTunnelSpec, not {ray_tunnel_specs!r}: "
                "RayTunnels.basic_port_forward(10001) makes one of a port"
            )
        if not ray_tunnel_specs:
            raise SpecError("ray_tunnel_specs names no port to forward")
        self._forwards = _forwards(ray_tunnel_specs, local_port)
        given = [forward.local_port for forward in self._forwards if forward.local_port]
        if twice := {port for port in given if given.count(port) > 1}:
            raise SpecError(f"ray_tunnel_specs uses a local port twice: {', '.join(map(str, sorted(twice)))}")
        access = SSHAccess(
            ssh_user,
            private_key_file or None,
            password or None,
            (private_key_password or None) if private_key_file else None,
            None if ssh_port is None else _port(ssh_port, "ssh_port"),
            host_key,
            strict_host_key,
            jump,
            ssh_config,
        )
        self._host, self._engine_name, self._isolate = ray_head_ip_address, engine, isolate
        self._login = access.login(ray_head_ip_address, known_hosts)
        check_engine(engine, self._login, self._forwards)
        self._ports: list[int] | None = None

    @staticmethod
    def limits() -> dict[str, dict[str, str]]:
        """Tell what each engine cannot do: by a short name, the reason."""
        from yellowdog_ray.utils._tunnels.engines import LIMITS

        return {engine: dict(limits) for engine, limits in LIMITS.items()}

    @staticmethod
    def basic_port_forward(port: int | str) -> SSHTunnelSpec:
        """Return the forwarding of a local port to the same port of the head node, both on localhost."""
        return SSHTunnelSpec("localhost", port, "localhost", port)

    def start_tunnels(self) -> None:
        """Connect and forward all ports, or none; do nothing if they are forwarded already.

        :raises TunnelError: with the reason: the key file, a local port in use (and the process that has it),
            the connection. Nothing is left behind then.
        :raises HostKeyError: where the server is not the one that was expected.
        :raises SSHLoginError: where it does not let the user in.
        """
        from yellowdog_ray.utils._tunnels.engines import Forward, make_engine

        with self._starting:
            if self._engine is not None and self._engine.status().state in ("up", "down"):
                return
            self.stop_tunnels()
            for forward in self._forwards:
                if forward.local_host not in _LOCAL and not forward.local_host.startswith("127."):
                    log.warning(
                        "Whoever reaches this machine at %s can use the tunnel to port %s of the head",
                        *(forward.local_host, forward.remote_port),
                    )
            # One more, for wait_for_ray.
            agent = Forward("127.0.0.1", 0, "127.0.0.1", AGENT)
            engine = make_engine(self._engine_name, self._login, [*self._forwards, agent], self._isolate)
            with self._lock:
                self._engine = engine  # so that it can be stopped while it starts
            try:
                ports = engine.start()
            except BaseException:
                with self._lock:
                    if self._engine is engine:
                        self._engine = None
                engine.stop(time.monotonic() + _STOP_TIMEOUT)
                raise
            with self._lock:
                if self._engine is engine:
                    self._ports = ports
                    return
            engine.stop(time.monotonic() + _STOP_TIMEOUT)
            raise TunnelError("The tunnels were stopped while they were started")

    def stop_tunnels(self, ignore_errors: bool = True) -> None:
        """Close all tunnels and whatever uses them, within 2 seconds; stopping twice is no error.

        Tunnels that another thread is starting are given up; that thread gets a :class:`.TunnelError`.

        :param ignore_errors: whether to keep silent about what could not be closed.
        :raises TunnelError: with ``ignore_errors=False``, for what could not be closed.
        """
        with self._lock:
            engine, self._engine, self._ports = self._engine, None, None
        problems = engine.stop(time.monotonic() + _STOP_TIMEOUT) if engine is not None else []
        if problems and not ignore_errors:
            raise TunnelError(f"The tunnels to {self._where} did not close cleanly: {'; '.join(problems)}")

    @property
    def is_active(self) -> bool:
        """Whether the tunnels are open and their SSH connection is, as far as is known, alive."""
        engine = self._engine
        return engine is not None and engine.status().state == "up"

    def status(self) -> TunnelStatus:
        """Tell how the tunnels are doing; nothing is waited for."""
        engine = self._engine
        if engine is None:
            return TunnelStatus("stopped", 0.0, 0, 0, None, self.ports, self._engine_name)
        link = engine.status()
        return TunnelStatus(
            link.state,
            link.seconds,
            link.reconnects,
            link.connections,
            link.last_error,
            self.ports,
            self._engine_name,
        )

    @property
    def ports(self) -> dict[int, int]:
        """The local ports by the ports on the other side; without those that are only chosen at the start.

        Where several lead to the same number, of different hosts, it has the last one.
        """
        ports = self._ports or [forward.local_port for forward in self._forwards]
        pairs = zip(self._forwards, ports, strict=False)
        return {forward.remote_port: port for forward, port in pairs if port}

    @property
    def client_address(self) -> str | None:
        """What ``ray.init`` takes, such as ``"ray://127.0.0.1:10001"``; None if 10001 is not forwarded."""
        return self._address("ray", CLIENT)

    @property
    def dashboard_url(self) -> str | None:
        """The dashboard's local URL, such as ``"http://127.0.0.1:8265"``; None if 8265 is not forwarded."""
        return self._address("http", DASHBOARD)

    @property
    def grafana_url(self) -> str | None:
        """Grafana's local URL, such as ``"http://127.0.0.1:3000"``; None if 3000 is not forwarded."""
        return self._address("http", GRAFANA)

    @property
    def prometheus_url(self) -> str | None:
        """Prometheus's local URL, such as ``"http://127.0.0.1:9090"``; None if 9090 is not forwarded."""
        return self._address("http", PROMETHEUS)

    def wait_for_ray(self, timeout: timedelta | float = timedelta(minutes=5)) -> None:
        """Wait until Ray on the head takes clients: some seconds after its task has started.

        A client that comes earlier may be turned away (``Starting Ray client server failed``): Ray opens the
        client port before it can start anything on the node. What is asked is the health of the head's own
        raylet, at ``/api/local_raylet_healthz`` on port 52365 of its localhost, which needs no token.

        :param timeout: how long to wait, as a timedelta or in seconds.
        :raises SpecError: where that is no time.
        :raises ClusterStateError: where the tunnels are not open.
        :raises TunnelError: where the SSH server forbids connections to that port.
        :raises WaitTimeoutError: where Ray did not become ready in time, with the last answer.
        """
        from yellowdog_ray.raydog.specs import check_seconds

        seconds = check_seconds(timeout, "timeout")
        deadline = time.monotonic() + seconds
        while True:
            ports, state = self._ports, self.status().state
            if ports is None or state not in ("up", "down"):
                raise ClusterStateError(f"The tunnels to {self._where} are not open: call start_tunnels()")
            answer = _ask_agent(ports[-1])
            if answer is None:
                return
            engine = self._engine
            if engine is not None and AGENT in engine.status().forbidden:
                raise TunnelError(
                    f"Whether Ray on {self._host} is ready cannot be told: its SSH server forbids "
                    f"connections to port {AGENT}. Its sshd_config needs 'AllowTcpForwarding yes'"
                )
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
        ports = self._ports or [forward.local_port for forward in self._forwards]
        pairs = zip(self._forwards, ports, strict=False)
        shown = ", ".join(f"{port or 'auto'}->{forward.remote_port}" for forward, port in pairs)
        engine = self._engine
        state = "stopped" if engine is None else engine.status().state
        return f"<RayTunnels {self._where} {shown} {'active' if state == 'up' else state}>"

    def __del__(self) -> None:
        # They are not closed: who keeps no reference may still be using the ports.
        if getattr(self, "_engine", None) is not None:
            warnings.warn(f"{self!r} was never stopped", ResourceWarning, source=self, stacklevel=1)

    @property
    def _where(self) -> str:
        return self._login.where

    def _address(self, scheme: str, remote_port: int) -> str | None:
        from yellowdog_ray.utils._ssh.route import bracketed

        local = self.ports.get(remote_port)
        if local is None:
            return None
        host = {one.remote_port: one.local_host for one in self._forwards}[
            remote_port
        ]  # the last, as in ports
        if host in ("localhost", "0.0.0.0"):  # noqa: S104
            host = "127.0.0.1"
        return f"{scheme}://{bracketed(host, local)}"


def _forwards(specs: Sequence[SSHTunnelSpec], local_port: LocalPort | None) -> list[Forward]:
    from yellowdog_ray.utils._tunnels.engines import Forward

    made = [Forward(spec.local_host, spec.local_port, spec.remote_host, spec.remote_port) for spec in specs]
    if local_port is None:
        return made
    if local_port == "auto":
        remote = [forward.remote_port for forward in made]
        if twice := {port for port in remote if remote.count(port) > 1}:
            # Which local port is whose could be told for one of them only.
            raise SpecError(
                'local_port="auto" needs remote ports that differ, and ray_tunnel_specs has several of: '
                f"{', '.join(map(str, sorted(twice)))}. Without it, the local ports of ray_tunnel_specs count"
            )
        return [replace(forward, local_port=0) for forward in made]
    if local_port == "match":
        return [replace(forward, local_port=forward.remote_port) for forward in made]
    if not isinstance(local_port, int):
        raise SpecError(f'local_port must be "match", "auto" or a port number, not {local_port!r}')
    first = _port(local_port, "local_port")
    _port(first + len(made) - 1, "local_port, counted up for all tunnels,")
    return [replace(forward, local_port=first + number) for number, forward in enumerate(made)]


def _ask_agent(port: int) -> str | None:
    """Ask whether the head's raylet is well; return what else was answered."""
    try:
        sock = socket.create_connection(("127.0.0.1", port), _ANSWER_TIMEOUT)
        status, _ = get(sock, f"Port {AGENT} of the head", "/api/local_raylet_healthz", None, _ANSWER_TIMEOUT)
    except TunnelError as error:
        return str(error)
    except OSError as error:
        return f"the tunnel does not answer ({error.strerror or error})"
    return None if status == 200 else f"Ray on the head is not healthy (HTTP {status})"
