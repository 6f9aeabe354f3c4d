"""The engine on sshtunnel, as it is: what it cannot do is in :data:`.engines.LIMITS`."""

from __future__ import annotations

import threading
import time

import paramiko
import sshtunnel

from yellowdog_ray.errors import TunnelError
from yellowdog_ray.utils._ssh.connection import Cancel, Connector, quiet_log
from yellowdog_ray.utils._ssh.route import Login
from yellowdog_ray.utils._tunnels.engines import LIMITS, Forward, LinkStatus
from yellowdog_ray.utils._tunnels.ports import free_ends

__all__ = ["WithSSHTunnel"]

_KEEPALIVE = 3.0  # seconds


class WithSSHTunnel:
    """Forwards ports with sshtunnel's ``SSHTunnelForwarder``, over one SSH connection.

    sshtunnel checks a server's key only against one that it is given, hides why a login failed, and hangs
    when it is stopped after that. So a connection of our own is made first: it checks the key and the login,
    and what it has found is what sshtunnel gets.
    """

    def __init__(self, login: Login, forwards: list[Forward]) -> None:
        self._login, self._forwards, self._connector = login, forwards, Connector(login)
        self._forwarder: sshtunnel.SSHTunnelForwarder | None = None
        self._cancel = Cancel()
        self._since = time.monotonic()
        self._is_up = False

    def start(self) -> list[int]:
        if not self._connector.prepare():
            raise TunnelError(
                f'engine="sshtunnel" cannot follow your SSH settings to {self._login.where}: '
                f"{LIMITS['sshtunnel']['jump']}"
            )
        local = free_ends(self._forwards)
        ports = [port for _, port in local]
        first = self._connector.connect(cancel=self._cancel)
        try:
            key = first.transport.get_remote_server_key()
            host, port = first.transport.getpeername()[:2]
        finally:
            first.close(time.monotonic() + 1)
        remote = [(forward.remote_host, forward.remote_port) for forward in self._forwards]
        forwarder = sshtunnel.SSHTunnelForwarder(
            (host, port),
            ssh_username=self._login.user,
            ssh_pkey=None if first.login is None else first.login[0],
            ssh_password=self._login.password if first.login is None else None,
            ssh_host_key=key,
            local_bind_addresses=local,
            remote_bind_addresses=remote,
            set_keepalive=_KEEPALIVE,
            ssh_config_file=None,
            allow_agent=False,
            host_pkey_directories=[],
            logger=quiet_log,
        )
        forwarder.daemon_forward_servers = forwarder.daemon_transport = True
        self._cancel.check()
        try:
            forwarder.start()
        except (sshtunnel.BaseSSHTunnelForwarderError, paramiko.SSHException, OSError) as error:
            raise TunnelError(
                f"sshtunnel did not open the tunnels to {self._login.where}: {error}"
            ) from error
        self._forwarder = forwarder
        self._cancel.check()
        # It passes over a port that it could not bind.
        if forwarder.local_bind_ports != ports:
            raise TunnelError(f"sshtunnel opened the ports {forwarder.local_bind_ports}, not {ports}")
        return ports

    def stop(self, deadline: float) -> list[str]:
        self._cancel.set()
        forwarder, self._forwarder = self._forwarder, None
        if forwarder is None:
            return []
        # It may wait for ever for a client that does not read.
        thread = threading.Thread(target=forwarder.stop, kwargs={"force": True}, daemon=True)
        thread.start()
        thread.join(max(0.0, deadline - time.monotonic()))
        return ["sshtunnel has not ended its connections"] if thread.is_alive() else []

    def status(self) -> LinkStatus:
        is_up = self._forwarder is not None and bool(self._forwarder.is_active)
        if is_up != self._is_up:
            self._is_up, self._since = is_up, time.monotonic()
        seconds = time.monotonic() - self._since
        if is_up:
            return LinkStatus("up", seconds)
        lost = "The SSH connection was lost, and sshtunnel does not make it again; start the tunnels again"
        return LinkStatus("stopped", seconds, last_error=None if self._forwarder is None else lost)
