"""Ray clusters on YellowDog, built and taken down from a script or notebook.

:class:`RayDogCluster` is the imperative face: it says what happens, in order. What may be asked for is in
:mod:`.specs`, what is created in :mod:`.plan`, and who talks to YellowDog is :mod:`.platform`.
"""

from __future__ import annotations

import logging
import os
import secrets
import threading
import time
import warnings
from collections.abc import Mapping
from datetime import timedelta
from enum import Enum
from types import TracebackType
from typing import TYPE_CHECKING

from yellowdog_ray.errors import ClusterStateError, SpecError, TeardownError
from yellowdog_ray.raydog import plan, ray_auth
from yellowdog_ray.raydog.assembly import Assembly, BuiltPool, add_note, cancel_tasks, take_back
from yellowdog_ray.raydog.platform import Platform
from yellowdog_ray.raydog.proxy import RayDogClusterProxy
from yellowdog_ray.raydog.scripts import get_script
from yellowdog_ray.raydog.specs import (
    CREDENTIAL_PARAMETERS,
    DEFAULT_API_URL,
    ClusterSpec,
    Credentials,
    NodeSpec,
    RayAuth,
    WorkerPoolSpec,
    check_count,
    check_duration,
    make,
)
from yellowdog_ray.raydog.state import ClusterState, PoolState
from yellowdog_ray.raydog.teardown import Targets, tear_down
from yellowdog_ray.raydog.transport import Operation
from yellowdog_ray.raydog.waiting import wait_for_workers

if TYPE_CHECKING:
    from yellowdog_client import PlatformClient

__all__ = ["RayDogCluster", "RayDogClusterProxy"]

log = logging.getLogger(__name__)


class _Phase(Enum):
    """Where a cluster is in its life."""

    NEW = "not built yet"
    BUILDING = "being built"
    RUNNING = "running"
    # Some of it may be left on the platform: a shut-down that failed, or one that is under way.
    ENDING = "being shut down"
    ENDED = "shut down"


_HEAD_PARAMETERS = {
    "template": "head_node_compute_requirement_template_id",
    "script": "head_node_ray_start_script",
    "images_id": "head_node_images_id",
    "userdata": "head_node_userdata",
    "instance_tags": "head_node_instance_tags",
    "metrics_enabled": "head_node_metrics_enabled",
}
_OBSERVABILITY_PARAMETERS = {
    **{field: f"observability_node_{field}" for field in _HEAD_PARAMETERS},
    "template": "observability_node_compute_requirement_template_id",
    "script": "observability_node_start_script",
}
_WORKER_PARAMETERS = {
    **{field: f"worker_node_{field}" for field in _HEAD_PARAMETERS},
    "template": "worker_node_compute_requirement_template_id",
    "script": "worker_node_task_script",
    "node_count": "worker_pool_node_count",
    "internal_name": "worker_pool_internal_name",
}
_CLUSTER_PARAMETERS = {
    "name": "cluster_name",
    "namespace": "cluster_namespace",
    "tag": "cluster_tag",
    "lifetime": "cluster_lifetime",
}


class RayDogCluster:
    """A Ray cluster on YellowDog: one head node, pools of worker nodes, and perhaps an observability node.

    Making the object does no I/O. :meth:`add_worker_pool` says what workers it is to have, before
    :meth:`build` or after it; :meth:`shut_down` ends everything. As a context manager it shuts itself down::

        template = "my-namespace/my-template"
        with RayDogCluster(key_id, key_secret, "my-cluster", "my-namespace", template) as cluster:
            cluster.add_worker_pool(template, None, worker_pool_node_count=4)
            private_ip, public_ip = cluster.build()
            cluster.wait_for_workers()

    Names on the platform are derived from the cluster's name and have at most 60 characters. The object may
    be used from several threads.

    :param yd_application_key_id: the id of a YellowDog application key.
    :param yd_application_key_secret: its secret.
    :param cluster_name: unique in the account; at most 51 characters, 46 with observability.
    :param cluster_namespace: the YellowDog namespace.
    :param head_node_compute_requirement_template_id: a compute requirement template, as its YDID or as
        ``namespace/name``.
    :param head_node_ray_start_script: the Bash text of the head node's task; None for the default script.
    :param yd_platform_api_url: plain http is accepted for loopback addresses only.
    :param cluster_tag: the tag of the work requirement and the pools.
    :param head_node_images_id: the head's image; None for the template's.
    :param head_node_userdata: the head's cloud-init user data; None for the template's.
    :param head_node_instance_tags: tags of the head's instance, their names in lower case.
    :param head_node_metrics_enabled: whether YellowDog collects the head's metrics.
    :param enable_observability: add a node that runs Prometheus and Grafana. The other
        ``observability_node_...`` parameters are as the head's.
    :param cluster_lifetime: the platform itself ends the cluster after this time, whether or not this
        process is alive; None for never.
    :param ray_auth: ``"token"`` protects the cluster with a Ray token of its own, which the nodes and this
        process get in ``RAY_AUTH_TOKEN`` (see :meth:`use_ray_auth`); anyone who may read the cluster's tasks
        on YellowDog can read it there. ``"off"`` leaves Ray open to its network.
    :raises SpecError: where anything of this cannot work.
    """

    def __init__(
        self,
        yd_application_key_id: str,
        yd_application_key_secret: str,
        cluster_name: str,
        cluster_namespace: str,
        head_node_compute_requirement_template_id: str,
        head_node_ray_start_script: str | None = None,
        yd_platform_api_url: str = DEFAULT_API_URL,
        cluster_tag: str | None = None,
        head_node_images_id: str | None = None,
        head_node_userdata: str | None = None,
        head_node_instance_tags: Mapping[str, str] | None = None,
        head_node_metrics_enabled: bool | None = None,
        enable_observability: bool = False,
        observability_node_compute_requirement_template_id: str | None = None,
        observability_node_instance_tags: Mapping[str, str] | None = None,
        observability_node_images_id: str | None = None,
        observability_node_userdata: str | None = None,
        observability_node_metrics_enabled: bool | None = None,
        observability_node_start_script: str | None = None,
        cluster_lifetime: timedelta | None = None,
        *,
        ray_auth: RayAuth = "token",
    ) -> None:
        self._phase = _Phase.NEW
        self._credentials = make(
            Credentials,
            CREDENTIAL_PARAMETERS,
            key_id=yd_application_key_id,
            key_secret=yd_application_key_secret,
            api_url=yd_platform_api_url,
        )
        head = make(
            NodeSpec,
            _HEAD_PARAMETERS,
            template=head_node_compute_requirement_template_id,
            script=head_node_ray_start_script,
            images_id=head_node_images_id,
            userdata=head_node_userdata,
            instance_tags=head_node_instance_tags,
            metrics_enabled=head_node_metrics_enabled,
        )
        observability = None
        if enable_observability:
            if observability_node_compute_requirement_template_id is None:
                raise SpecError(
                    "enable_observability needs observability_node_compute_requirement_template_id"
                )
            observability = make(
                NodeSpec,
                _OBSERVABILITY_PARAMETERS,
                template=observability_node_compute_requirement_template_id,
                script=observability_node_start_script,
                images_id=observability_node_images_id,
                userdata=observability_node_userdata,
                instance_tags=observability_node_instance_tags,
                metrics_enabled=observability_node_metrics_enabled,
            )
        self._spec = make(
            ClusterSpec,
            _CLUSTER_PARAMETERS,
            name=cluster_name,
            namespace=cluster_namespace,
            tag=cluster_tag,
            head=head,
            observability=observability,
            lifetime=cluster_lifetime,
            ray_auth=ray_auth,
        )
        self._token = secrets.token_hex(32) if ray_auth == "token" else None
        self._platform = Platform(self._credentials)
        self._lock = threading.RLock()
        # Reentrant, for a signal handler may call shut_down() while it is under way.
        self._ending = threading.RLock()
        # Held while a thread really builds: an interrupt can end build() at any line, and then the phase
        # alone would say so for ever.
        self._building = threading.Lock()
        self._builder: threading.Thread | None = None
        # Worker pools by internal name, in the order in which they were added.
        self._pools: dict[str, BuiltPool] = {}
        # Those that are being added, and those of which a failed addition has left something: they leave
        # when they are built, or verified as gone.
        self._unfinished: dict[str, BuiltPool] = {}
        self._pools_counted = 0
        self._assembly: Assembly | None = None
        self._built_at = 0.0
        self._targets: Targets | None = None

    def __repr__(self) -> str:
        return f"<RayDogCluster {self._spec.namespace}/{self._spec.name}, {self._phase.value}>"

    def __enter__(self) -> RayDogCluster:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.shut_down()
        except TeardownError as left:
            if error is None:
                raise
            # What went wrong first is what the caller has to see.
            add_note(error, str(left))

    def __del__(self) -> None:
        phase = getattr(self, "_phase", _Phase.NEW)
        if phase not in (_Phase.NEW, _Phase.ENDED):
            warnings.warn(f"{self!r} was not shut down", ResourceWarning, source=self, stacklevel=2)

    # -- what is there ---------------------------------------------------------------------------------

    @property
    def yd_client(self) -> PlatformClient:
        """The YellowDog SDK's client, made when it is first asked for."""
        return self._platform.client

    @property
    def work_requirement_id(self) -> str | None:
        """The id of the cluster's work requirement; None before :meth:`build`."""
        return self._assembly.work_requirement_id if self._assembly is not None else None

    @property
    def head_node_worker_pool_id(self) -> str | None:
        """The id of the head node's pool; None before :meth:`build`."""
        return self._head.id if self._head is not None else None

    @property
    def head_node_node_id(self) -> str | None:
        """The id of the head node; None before :meth:`build`."""
        return self._head.node_id if self._head is not None else None

    @property
    def head_node_private_ip(self) -> str | None:
        """The head's private address; None before :meth:`build`."""
        return self._head.private_ip if self._head is not None else None

    @property
    def head_node_public_ip(self) -> str | None:
        """The head's public address, None where it has none."""
        return self._head.public_ip if self._head is not None else None

    @property
    def head_node_task_id(self) -> str | None:
        """The id of the head node's task; None before :meth:`build`."""
        return self._head.task_id if self._head is not None else None

    @property
    def worker_node_worker_pools(self) -> dict[str, BuiltPool]:
        """The worker pools by internal name: a copy, each with its ``id`` (None before it is built)."""
        with self._lock:
            return dict(self._pools)

    @property
    def worker_pool_ids(self) -> list[str]:
        """The ids of the worker pools that are built, without the head's and the observability node's."""
        with self._lock:
            return [pool.id for pool in self._pools.values() if pool.id is not None]

    @property
    def worker_pool_internal_names(self) -> list[str]:
        """The internal names of the worker pools."""
        with self._lock:
            return list(self._pools)

    @property
    def enable_observability(self) -> bool:
        """Whether the cluster has an observability node."""
        return self._spec.observability is not None

    @property
    def observability_node_id(self) -> str | None:
        """The id of the observability node; None where there is none, or before :meth:`build`."""
        return self._observability.node_id if self._observability is not None else None

    @property
    def observability_node_private_ip(self) -> str | None:
        """The observability node's private address; None where there is none, or before :meth:`build`."""
        return self._observability.private_ip if self._observability is not None else None

    @property
    def observability_node_worker_pool_id(self) -> str | None:
        """The id of the observability node's pool; None where there is none, or before :meth:`build`."""
        return self._observability.id if self._observability is not None else None

    @property
    def observability_node_task_id(self) -> str | None:
        """The id of the observability node's task; None where there is none, or before :meth:`build`."""
        return self._observability.task_id if self._observability is not None else None

    @property
    def _head(self) -> BuiltPool | None:
        return self._assembly.head if self._assembly is not None else None

    @property
    def _observability(self) -> BuiltPool | None:
        return self._assembly.observability if self._assembly is not None else None

    # -- worker pools ----------------------------------------------------------------------------------

    def add_worker_pool(
        self,
        worker_node_compute_requirement_template_id: str,
        worker_node_task_script: str | None,
        worker_pool_node_count: int,
        worker_pool_internal_name: str | None = None,
        worker_node_images_id: str | None = None,
        worker_node_userdata: str | None = None,
        worker_node_instance_tags: Mapping[str, str] | None = None,
        worker_node_metrics_enabled: bool | None = None,
    ) -> str | None:
        """Add a pool of worker nodes: to what will be built, or to the running cluster.

        In a running cluster it returns when the pool is provisioned and its tasks are submitted; the
        workers join as their nodes come up (see :meth:`wait_for_workers`). Where it fails, what it had
        created is taken back; what cannot be is in the saved state, keeps its internal name, and is ended
        by :meth:`shut_down` or when it is removed.

        :param worker_node_compute_requirement_template_id: a template's YDID, or ``namespace/name``.
        :param worker_node_task_script: the Bash text of the workers' tasks; None for the default script.
        :param worker_pool_node_count: 1 to 10,000.
        :param worker_pool_internal_name: a name of your own, unique in the cluster; None for
            ``worker-nodes-NN``.
        :returns: the pool's id; None before :meth:`build`.
        :raises SpecError: where anything of this cannot work.
        :raises ClusterStateError: while the cluster is being built or after it was shut down.
        :raises PlatformError: where the platform refuses.
        """
        node = make(
            NodeSpec,
            _WORKER_PARAMETERS,
            template=worker_node_compute_requirement_template_id,
            script=worker_node_task_script,
            images_id=worker_node_images_id,
            userdata=worker_node_userdata,
            instance_tags=worker_node_instance_tags,
            metrics_enabled=worker_node_metrics_enabled,
        )
        spec = make(
            WorkerPoolSpec,
            _WORKER_PARAMETERS,
            node=node,
            node_count=worker_pool_node_count,
            internal_name=worker_pool_internal_name,
        )
        with self._lock:
            if self._phase not in (_Phase.NEW, _Phase.RUNNING):
                raise ClusterStateError(f"no worker pool can be added: the cluster is {self._phase.value}")
            number = self._pools_counted + 1
            planned = plan.worker_pool(self._spec, number, spec, spec.node.script or get_script("worker"))
            name = planned.internal_name
            if name in self._pools or name in self._unfinished:
                raise SpecError(f"worker_pool_internal_name: there already is a worker pool {name!r}")
            pool = BuiltPool(planned)
            self._pools_counted = number
            if self._phase is _Phase.NEW or self._assembly is None:
                self._pools[name] = pool
                return None
            lifetime = self._lifetime_left()
            # Before the first call, so that nothing is forgotten, whatever ends us.
            self._unfinished[name] = pool
            cluster = self._assembly
            crew = cluster.crew(Operation())
        try:
            cluster.add(pool, lifetime, crew)
            with self._lock:
                if self._phase is not _Phase.RUNNING:
                    raise ClusterStateError(
                        f"the worker pool {name!r} is taken back: the cluster is {self._phase.value}"
                    )
                self._pools[name] = pool
                del self._unfinished[name]
            return pool.id
        except BaseException as error:
            with self._lock:
                # An interrupt that comes when it has been added takes it back too.
                if self._pools.get(name) is pool:
                    self._unfinished[name] = self._pools.pop(name)
            if cluster.discard(pool, crew, error):
                with self._lock:
                    self._unfinished.pop(name, None)
            raise

    def remove_worker_pool(self, worker_pool_id: str) -> None:
        """Remove a worker pool at once: its tasks are aborted and its nodes terminated.

        The Ray cluster goes on without them. It returns when the platform has begun to terminate the nodes.

        :raises ClusterStateError: where no worker pool of the cluster has this id.
        :raises TeardownError: where it may still be running; the call can be repeated.
        """
        with self._lock:
            pools = [*self._pools.items(), *self._unfinished.items()]
        name = next((name for name, pool in pools if pool.id is not None and pool.id == worker_pool_id), None)
        if name is None:
            raise ClusterStateError(f"no worker pool of this cluster has the id {worker_pool_id!r}")
        self._remove(name)

    def remove_worker_pool_by_internal_name(self, internal_name: str) -> None:
        """Remove a worker pool; see :meth:`remove_worker_pool`. Before :meth:`build` it is just forgotten.

        What a failed :meth:`add_worker_pool` could not take back is removed by its name too.

        :raises ClusterStateError: where no worker pool of the cluster has this name.
        :raises TeardownError: where it may still be running; the call can be repeated.
        """
        self._remove(internal_name)

    def _remove(self, name: str) -> None:
        with self._lock:
            pool = self._pools.get(name) or self._unfinished.get(name)
            if pool is None:
                known = ", ".join(repr(known) for known in self._pools) or "none"
                raise ClusterStateError(f"this cluster has no worker pool {name!r}; it has: {known}")
            if self._phase is _Phase.NEW:
                del self._pools[name]
                return
            if self._phase is not _Phase.RUNNING or self._assembly is None:
                raise ClusterStateError(f"no worker pool can be removed: the cluster is {self._phase.value}")
            cluster = self._assembly
        # The nodes first: they are what costs. A task of a node that is gone would wait for another one.
        tear_down(self._platform, cluster.pool_targets(pool), until="terminating")
        with self._lock:
            for pools in (self._pools, self._unfinished):
                if pools.get(name) is pool:
                    del pools[name]
        cancel_tasks(self._platform, pool)

    def get_worker_pool_internal_name_by_id(self, worker_pool_id: str) -> str | None:
        """Tell a worker pool's internal name; None where the cluster has no pool of this id."""
        with self._lock:
            return next(
                (
                    name
                    for name, pool in self._pools.items()
                    if pool.id is not None and pool.id == worker_pool_id
                ),
                None,
            )

    # -- building, waiting, ending ---------------------------------------------------------------------

    def build(self, head_node_build_timeout: timedelta | None = None) -> tuple[str, str | None]:
        """Build the cluster, and return when the head node's task is executing.

        The workers go on joining after that; see :meth:`wait_for_workers`. Where anything fails, the time
        is over or Ctrl-C is pressed, what had been created is taken back before the error is raised.

        :param head_node_build_timeout: how long it may take; None for as long as it takes.
        :returns: the private and the public address of the head node, the latter None where it has none.
        :raises SpecError: where the timeout is none.
        :raises ClusterStateError: where the cluster is built already.
        :raises CredentialsError: where the platform does not accept the key.
        :raises NotFoundError: where the platform does not know a template.
        :raises NameTakenError: where there is something else under one of the cluster's names.
        :raises BuildError: where the head cannot come up, with the reason.
        :raises BuildTimeoutError: a :class:`TimeoutError`: where it takes too long.
        """
        timeout = check_duration(head_node_build_timeout, "head_node_build_timeout")
        self._check_not_built()
        with self._building:
            built = self._assemble()
            operation = Operation(None if timeout is None else timeout.total_seconds())
            try:
                with self._lock:
                    self._builder = threading.current_thread()
                    self._phase = _Phase.BUILDING
                    self._assembly = built
                    self._built_at = operation.started
                    workers = list(self._pools.values())
                built.build(workers, built.crew(operation))
                with self._lock:
                    built.check_running()
                    self._phase = _Phase.RUNNING
            except BaseException as error:
                self._take_back(built, error)
                raise
        try:
            self.use_ray_auth()
        except Exception as error:
            # The cluster is there, and its user has to get to know it.
            log.warning("This process could not be given the cluster's Ray token: %s", error)
        log.info("Built the cluster %s in %.1f s", self._spec.name, operation.elapsed)
        return str(built.head.private_ip), built.head.public_ip

    def _check_not_built(self) -> None:
        if self._phase is not _Phase.NEW:
            raise ClusterStateError(f"the cluster cannot be built: it is {self._phase.value}")

    def _assemble(self) -> Assembly:
        """Put together what is to be built; nothing is created yet."""
        with self._lock:
            self._check_not_built()
            head = plan.head_pool(self._spec, self._spec.head.script or get_script("head"))
            observability = None
            node = self._spec.observability
            if node is not None:
                script = node.script or get_script("observability")
                observability = BuiltPool(plan.observability_pool(self._spec, node, script))
            return Assembly(self._platform, self._spec, self._token, BuiltPool(head), observability)

    def _take_back(self, built: Assembly, error: BaseException) -> None:
        """Take back what a build has created; where this is interrupted, shut_down() goes on with it."""
        with self._lock:
            if self._phase in (_Phase.BUILDING, _Phase.RUNNING):
                self._phase = _Phase.ENDING
            # Not where a signal handler has shut the cluster down in between.
            ours = self._phase is _Phase.ENDING
            workers = list(self._pools.values())
        built.settle()
        targets = built.targets(workers)
        gone = take_back(self._platform, targets, error)
        with self._lock:
            if ours and gone:
                self._assembly = None
                for name, pool in self._pools.items():
                    self._pools[name] = BuiltPool(pool.plan)
                self._phase = _Phase.NEW
            elif ours:
                self._targets = targets
        if gone:
            self._platform.close()
        log.info("The build of %s failed: %s", self._spec.name, error or type(error).__name__)

    def _lifetime_left(self) -> timedelta | None:
        if self._spec.lifetime is None:
            return None
        left = self._spec.lifetime - timedelta(seconds=time.monotonic() - self._built_at)
        if left <= timedelta(0):
            raise ClusterStateError(f"the cluster's lifetime of {self._spec.lifetime} is over")
        return left

    def use_ray_auth(self) -> bool:
        """Make this process use the cluster's Ray token, as :meth:`build` does.

        It sets ``RAY_AUTH_MODE`` and ``RAY_AUTH_TOKEN``, and tells a Ray that has been imported already.
        :meth:`shut_down` takes both back, unless somebody else has changed them. Call it to come back to
        this cluster after another one was built in this process.

        :returns: whether the token is in use now; not where the cluster has none, nor while Ray is
            connected to something in this process: call ``ray.shutdown()`` before.
        """
        return self._token is not None and ray_auth.activate(self._token)

    def wait_for_workers(self, count: int | None = None, timeout: timedelta | float | None = None) -> int:
        """Wait until worker nodes are executing their tasks.

        Ray itself is up on a node a few seconds after its task began.

        :param count: how many; None for all that the cluster's pools have.
        :param timeout: how long to wait, as a timedelta or in seconds; None for as long as they can come.
        :returns: how many are executing, at least ``count``.
        :raises ClusterStateError: where the cluster is not running.
        :raises WaitTimeoutError: a :class:`TimeoutError` that says how many there are: in time they have not
            come, or it has turned out earlier that they cannot come, with the reason.
        """
        if isinstance(timeout, int | float) and not isinstance(timeout, bool):
            timeout = timedelta(seconds=timeout)
        limit = check_duration(timeout, "timeout")
        with self._lock:
            built = self._assembly
            if self._phase is not _Phase.RUNNING or built is None:
                raise ClusterStateError(
                    f"there are no workers to wait for: the cluster is {self._phase.value}"
                )
            pools = list(self._pools.values())
        every = sum(pool.plan.node_count for pool in pools)
        wanted = every if count is None else check_count(count, "count", every)
        operation = Operation(None if limit is None else limit.total_seconds())
        return wait_for_workers(
            self._platform,
            str(built.work_requirement_id),
            built.head,
            pools,
            count=wanted,
            operation=operation,
        )

    def shut_down(self) -> None:
        """End the cluster: abort its tasks, shut its pools down and terminate its nodes, and verify it.

        What is already gone is no error, and a second call does nothing. Where something could not be
        ended, everything else is ended nevertheless, and another call goes on with what is left.

        :raises TeardownError: where something may still be running; its ``still_running`` lists it.
        :raises ClusterStateError: while another thread builds the cluster.
        """
        with self._lock:
            if self._phase in (_Phase.NEW, _Phase.ENDED):
                return
            if self._being_built():
                raise ClusterStateError("the cluster is being built by another thread; interrupt that one")
            self._phase = _Phase.ENDING
        try:
            with self._ending:
                if self._phase is not _Phase.ENDED:
                    self._end()
        except TeardownError:
            raise
        except BaseException:
            log.error(
                "The shutting down of the cluster %s was interrupted. May still be running: %s. Call "
                "shut_down() again, or save_state_to_json_file() and then `raydog shut-down` with that file",
                self._spec.name,
                str(self._targets or "") or "all of it",
            )
            raise
        finally:
            self._forget_token()

    def _end(self) -> None:
        built = self._assembly
        if self._targets is None and built is not None:
            built.settle()
            with self._lock:
                workers = [*self._pools.values(), *self._unfinished.values()]
            self._targets = built.targets(workers)
        if self._targets is not None:
            tear_down(self._platform, self._targets)
        with self._lock:
            self._targets = None
            self._unfinished.clear()
            self._phase = _Phase.ENDED
        self._platform.close()
        log.info("Shut the cluster %s down", self._spec.name)

    def _being_built(self) -> bool:
        """Tell whether another thread is building the cluster, or taking its build back."""
        return (
            self._phase is not _Phase.RUNNING
            and self._building.locked()
            and self._builder is not threading.current_thread()
        )

    def _forget_token(self) -> None:
        if self._token is None:
            return
        try:
            ray_auth.deactivate(self._token)
        except Exception as error:
            # Nothing that Ray does may keep a cluster from being ended.
            log.warning("The cluster's Ray token could not be taken out of this process: %s", error)

    # -- the saved state -------------------------------------------------------------------------------

    def save_state_to_json(self) -> str:
        """Write what another process needs to shut the cluster down (:class:`RayDogClusterProxy`).

        It holds no secret; after a build or a shut-down that failed, it holds what is left. Pools that are
        added or removed later are not in it: save it again.

        :raises ClusterStateError: before :meth:`build`.
        """
        return self._saved().to_json()

    def save_state_to_json_file(self, file_name: str | os.PathLike[str]) -> None:
        """Write the state to a file, readable by its owner alone; see :meth:`save_state_to_json`.

        :raises ClusterStateError: before :meth:`build`.
        :raises OSError: where the file cannot be written.
        """
        self._saved().save(file_name)

    def _saved(self) -> ClusterState:
        with self._lock:
            if self._assembly is None or self._being_built():
                raise ClusterStateError(f"there is no state to save: the cluster is {self._phase.value}")
            return self._state(self._assembly)

    def _state(self, built: Assembly) -> ClusterState:
        every = (built.head, built.observability, *self._pools.values(), *self._unfinished.values())
        pools = [pool for pool in every if pool is not None and built.exists(pool)]
        work_requirement_id = built.work_requirement_id
        if self._targets is not None:
            # Something has been ended already: what is left is known better there.
            left = {target.name: target for target in self._targets.pools}
            pools = [pool for pool in pools if pool.plan.name in left]
            work_requirement_id = self._targets.work_requirement_id
        return ClusterState(
            cluster_name=self._spec.name,
            cluster_namespace=self._spec.namespace,
            cluster_tag=self._spec.tag,
            work_requirement_id=work_requirement_id,
            worker_pool_ids=[pool.id for pool in pools if pool.id is not None],
            api_url=self._credentials.api_url,
            ray_auth=self._spec.ray_auth,
            build_id=built.made.id,
            pools=[_pool_state(pool) for pool in pools],
        )


def _pool_state(pool: BuiltPool) -> PoolState:
    return PoolState(
        name=pool.plan.name,
        role=pool.plan.role,
        group=pool.plan.group,
        internal_name=pool.plan.internal_name,
        node_count=pool.plan.node_count,
        id=pool.id,
        compute_requirement_id=pool.compute_requirement_id,
    )
