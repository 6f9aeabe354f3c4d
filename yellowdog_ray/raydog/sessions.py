"""Working with a cluster: tunnels to it, Ray Client sessions on it, and its jobs."""

from __future__ import annotations

import logging
import os
import platform
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from yellowdog_ray.errors import (
    ClusterStateError,
    HostKeyError,
    SSHLoginError,
    TunnelError,
    WaitTimeoutError,
)
from yellowdog_ray.raydog import ray_auth
from yellowdog_ray.raydog.access import SSHAccess
from yellowdog_ray.raydog.insight import ClusterInsight
from yellowdog_ray.raydog.ports import CLIENT, DASHBOARD, GRAFANA, PROMETHEUS
from yellowdog_ray.raydog.reach import Reach
from yellowdog_ray.raydog.specs import check_seconds

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

    from yellowdog_ray.utils._tunnels.engines import EngineName
    from yellowdog_ray.utils.ray_ssh_tunnels import LocalPort, RayTunnels, SSHTunnelSpec

__all__ = ["ClusterSessions"]

log = logging.getLogger(__name__)

_LOOK = 0.2  # seconds between looks at whether Ray is ready
# Where one of these is set, Ray's client for jobs goes there, whatever address it is given.
_ELSEWHERE = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
_environment = threading.Lock()
_SAME_VERSIONS = (
    "A client and its cluster need the same version of Ray, and of Python up to its minor version"
)
_NO_DASHBOARD = (
    "Ray's dashboard, which takes the jobs, listens on the head's localhost only: give the cluster "
    'access=SSHAccess(...). It can be reached without SSH where a cluster was built with access="direct" and '
    "a token"
)


class ClusterSessions(ClusterInsight):
    """The part of a cluster that lets its user work on it."""

    def tunnels(
        self,
        ray_tunnel_specs: Sequence[SSHTunnelSpec] | None = None,
        *,
        local_port: LocalPort | None = None,
        engine: EngineName = "paramiko",
        isolate: bool = False,
    ) -> RayTunnels:
        """Make tunnels to the head, with what the cluster knows; they are not open yet.

        They are to the address at which this object has connected to the head, in a build that waits for Ray,
        or to wait for workers. Where it has not, they are to the public address, if there is one: only
        :meth:`client` and :meth:`jobs`, which connect at once, find out which one can be reached.

        :param ray_tunnel_specs: the ports to forward; by default 10001 (Ray Client) and 8265 (dashboard), and
            where there is an observability node, its 3000 (Grafana) and 9090 (Prometheus).
        :param local_port: ``"match"`` for the same numbers here, which is what is done where there are no
            ``ray_tunnel_specs``; ``"auto"`` for numbers that nobody uses; or the number of the first one.
        :param engine: see :class:`.RayTunnels`; ``isolate`` too.
        :raises ClusterStateError: where there is no head, or the cluster has no ``access`` by SSH.
        :raises SpecError: where the engine cannot do this.
        """
        from yellowdog_ray.utils.ray_ssh_tunnels import RayTunnels, SSHTunnelSpec

        access, address = self._access, self.head_node_public_ip or self.head_node_private_ip
        with self._lock:
            if self._reach is not None and address is not None:
                address = self._reach.address
        if address is None:
            raise ClusterStateError(f"there is no head to make tunnels to: the cluster is {self._life}")
        if not isinstance(access, SSHAccess):
            raise ClusterStateError("tunnels need SSH: give the cluster access=SSHAccess(...)")
        if ray_tunnel_specs is None:
            ray_tunnel_specs = [RayTunnels.basic_port_forward(port) for port in (CLIENT, DASHBOARD)]
            if (observability := self.observability_node_private_ip) is not None:
                ray_tunnel_specs += [
                    SSHTunnelSpec("localhost", port, observability, port) for port in (GRAFANA, PROMETHEUS)
                ]
        return RayTunnels(
            address,
            access.user,
            access.password,
            access.private_key_file,
            access.private_key_password,
            ray_tunnel_specs,
            access.port,
            host_key=access.host_key,
            strict_host_key=access.strict_host_key,
            known_hosts=self._host_keys_file,
            jump=access.jump,
            ssh_config=access.ssh_config,
            local_port=local_port,
            engine=engine,
            isolate=isolate,
        )

    @contextmanager
    def client(
        self,
        *,
        timeout: timedelta | float = timedelta(minutes=5),
        engine: EngineName = "paramiko",
        isolate: bool = False,
        **options: Any,
    ) -> Iterator[Any]:
        """Open a Ray Client session on the cluster, which lasts as long as the block.

        ::

            with cluster.client():
                print(ray.get(square.remote(3)))

        It goes through a tunnel of its own, or, with ``access="direct"``, to the head's address. The block is
        given what ``ray.init`` has returned. Ray has the cluster's token meanwhile, or, where the cluster has
        none, no token at all, whatever ``RAY_AUTH_TOKEN`` was before.

        :param timeout: how long to wait until Ray on the head is ready, as a timedelta or in seconds.
        :param engine: of the tunnel, see :class:`.RayTunnels`; ``isolate`` too.
        :param options: what else ``ray.init`` takes.
        :raises SpecError: where the time is none, or the engine cannot do this.
        :raises ClusterStateError: before anything hangs: where Ray is connected already in this process, its
            version or Python's is another one on the head, the token is refused, or there is no head.
        :raises WaitTimeoutError: where Ray on the head is not ready in time.
        :raises TunnelError: where the head cannot be reached: at once where its host key is not the expected
            one, and where it does not let the user in for a minute.
        """
        import ray

        self._check_disconnected()
        self._check_head(timeout, engine, exact=True)
        with self._port(CLIENT, engine, isolate) as address, ray_auth.session(self._ray_token()):
            try:
                context = ray.init(f"ray://{address}", **options)
            except RuntimeError as error:
                if not str(error).startswith("Version mismatch"):
                    raise
                # Where the dashboard cannot be asked, it is Ray Client that finds it.
                told = " ".join(str(error).split())
                raise ClusterStateError(f"{told}. {_SAME_VERSIONS}. Nothing was connected") from None
            try:
                yield context
            finally:
                ray.shutdown()

    @contextmanager
    def jobs(
        self,
        *,
        timeout: timedelta | float = timedelta(minutes=5),
        engine: EngineName = "paramiko",
        isolate: bool = False,
    ) -> Iterator[JobSubmissionClient]:
        """Yield a client for the cluster's jobs, which works as long as the block lasts.

        ::

            with cluster.jobs() as jobs:
                job = jobs.submit_job(entrypoint="python -c 'print(42)'")

        It goes through a tunnel of its own to the dashboard, or, with ``access="direct"``, to the head's
        address, which has the dashboard only where the cluster was built so, and has a token. It sends the
        cluster's token and no other one. It is this cluster's, whatever ``RAY_ADDRESS`` and
        ``RAY_API_SERVER_ADDRESS`` say, which are taken out of the environment while the client is made, and
        goes through no proxy.

        :param timeout: how long to wait until Ray on the head is ready, as a timedelta or in seconds.
        :param engine: of the tunnel, see :class:`.RayTunnels`; ``isolate`` too.
        :raises SpecError: where the time is none, or the engine cannot do this.
        :raises ClusterStateError: where the token is refused, there is no head, or its dashboard cannot be
            reached without SSH.
        :raises WaitTimeoutError: where Ray on the head is not ready in time.
        :raises TunnelError: where the head cannot be reached: at once where its host key is not the expected
            one, and where it does not let the user in for a minute.
        """
        built_here = not self._attached and self._spec.head.script is None
        if self._access == "direct" and self._spec.ray_auth == "off" and built_here:
            raise ClusterStateError(f"{_NO_DASHBOARD}, and this one has none")
        self._check_head(timeout, engine, exact=False)
        token = self._ray_token()
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        with self._port(DASHBOARD, engine, isolate) as address:
            try:
                client = _jobs_client(f"http://{address}", headers)
            except ConnectionError as error:
                why = "" if isinstance(self._access, SSHAccess) else f" {_NO_DASHBOARD}"
                raise TunnelError(f"{str(error).rstrip('.')}.{why}") from error
            yield client

    def _check_disconnected(self) -> None:
        if ray_auth.is_connected():
            raise ClusterStateError("Ray is connected in this process: call ray.shutdown() before")

    def _check_head(self, timeout: timedelta | float, engine: EngineName, *, exact: bool) -> None:
        """Wait until Ray on the head is ready, and compare what it runs with what runs here.

        :param exact: whether a difference is an error.
        """
        seconds = check_seconds(timeout, "timeout")
        if self._access is None:
            raise ClusterStateError(
                'a session needs a way to the head: give the cluster access=SSHAccess(...), or "direct" '
                "where this process can connect to the nodes' addresses itself"
            )
        way = self._way()
        if way is None:
            raise ClusterStateError(f"there is no head to connect to: the cluster is {self._life}")
        if isinstance(self._access, SSHAccess):
            self.tunnels(engine=engine)  # refuses now what it would refuse after the wait
        self._wait_until_ready(way, seconds)
        differences = _differences(way)
        if not differences:
            return
        told = f"{' and '.join(differences)}. {_SAME_VERSIONS}"
        if exact and "RAY_IGNORE_VERSION_MISMATCH" not in os.environ:
            raise ClusterStateError(f"{told}. Nothing was connected")
        log.warning("%s", told)

    def _wait_until_ready(self, way: Reach, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while (problem := way.health()) is not None:
            with self._lock:
                self._running("there is nothing to connect to")
            if time.monotonic() > deadline:
                raise WaitTimeoutError(
                    f"Ray on the head was not ready after {seconds:g} s: {problem.rstrip('.')}. See "
                    'get_logs("head-node") for what its task has printed'
                )
            time.sleep(_LOOK)

    @contextmanager
    def _port(self, port: int, engine: EngineName, isolate: bool) -> Iterator[str]:
        """Yield the address of one of the head's ports, as this process reaches it."""
        from yellowdog_ray.utils._ssh.route import bracketed
        from yellowdog_ray.utils.ray_ssh_tunnels import RayTunnels

        if not isinstance(self._access, SSHAccess):
            way = self._way()
            assert way is not None  # noqa: S101 - it was asked before
            yield bracketed(way.address, port)
            return
        specs = [RayTunnels.basic_port_forward(port)]
        with self.tunnels(specs, local_port="auto", engine=engine, isolate=isolate) as tunnels:
            yield f"127.0.0.1:{tunnels.ports[port]}"


def _jobs_client(address: str, headers: dict[str, str]) -> JobSubmissionClient:
    """Make a client for the jobs of this address and no other one: the headers hold the token."""
    from ray.job_submission import JobSubmissionClient

    class DirectClient(JobSubmissionClient):
        """One that asks the head itself: a proxy of the environment would be shown the token."""

        def _do_request(self, *arguments: Any, **options: Any) -> Any:
            self._headers = dict(headers)
            # Requests would add to them what ~/.netrc has for this host.
            options = {"auth": lambda request: request, "proxies": {"http": None, "all": None}, **options}
            return super()._do_request(*arguments, **options)

    with _environment:
        kept = {name: os.environ.pop(name) for name in _ELSEWHERE if name in os.environ}
        try:
            # One that holds no token would be given the one of the environment, which is another cluster's.
            client = DirectClient(address, headers={"Authorization": "none", **headers})
        finally:
            os.environ.update(kept)
    if client.get_address() != address:
        raise ClusterStateError(
            f"Ray's client for jobs went to {client.get_address()}, not to the cluster's head at {address}"
        )
    return client


def _differences(way: Reach) -> list[str]:
    """Say how the head's versions differ from those here."""
    import ray

    deadline = time.monotonic() + 30
    while True:
        try:
            head = way.versions()
            break
        except (HostKeyError, SSHLoginError):
            raise
        except TunnelError:  # the dashboard comes up a little later than the rest
            if time.monotonic() > deadline:
                raise
            time.sleep(_LOOK)
    found = []
    if head.ray is not None and head.ray != ray.__version__:
        found.append(f"the head runs Ray {head.ray}, and here is {ray.__version__}")
    here = platform.python_version()
    if head.python is not None and head.python.split(".")[:2] != here.split(".")[:2]:
        found.append(f"the head runs Python {head.python}, and here is {here}")
    return found
