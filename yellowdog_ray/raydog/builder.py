"""Ray clusters on YellowDog, built and taken down from a script or notebook.

:class:`RayDogCluster` is the imperative face: it says what happens, in order. What may be asked for is in
:mod:`.specs`, what is created in :mod:`.plan`, and who talks to YellowDog is :mod:`.platform`.
"""

from __future__ import annotations

import logging
import os
import secrets
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from enum import Enum
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Literal

from yellowdog_ray.errors import (
    BuildTimeoutError,
    ClusterStateError,
    RayDogError,
    SpecError,
    StateError,
    TeardownError,
    WaitTimeoutError,
)
from yellowdog_ray.raydog import assembly, events, logs, plan, ray_auth, scaling
from yellowdog_ray.raydog.assembly import Assembly
from yellowdog_ray.raydog.journal import Journal, default_path
from yellowdog_ray.raydog.logs import NodeLog
from yellowdog_ray.raydog.parameters import cluster_spec, worker_pool_spec
from yellowdog_ray.raydog.platform import Build, Platform
from yellowdog_ray.raydog.pools import BuiltPool
from yellowdog_ray.raydog.preview import ClusterPlan, preview
from yellowdog_ray.raydog.progress import progress_display
from yellowdog_ray.raydog.proxy import RayDogClusterProxy
from yellowdog_ray.raydog.reach import Reach, SSHAccess
from yellowdog_ray.raydog.scripts import get_script
from yellowdog_ray.raydog.specs import (
    CREDENTIAL_PARAMETERS,
    DEFAULT_API_URL,
    MAX_NODES,
    ClusterSpec,
    Credentials,
    NodeSpec,
    RayAuth,
    check_count,
    check_duration,
    key_hint,
    make,
)
from yellowdog_ray.raydog.state import ClusterState
from yellowdog_ray.raydog.status import ClusterStatus, PoolStatus
from yellowdog_ray.raydog.survey import survey
from yellowdog_ray.raydog.teardown import Targets, tear_down
from yellowdog_ray.raydog.transport import Operation
from yellowdog_ray.raydog.undo import add_note, cancel_tasks, take_back
from yellowdog_ray.raydog.view import ClusterView
from yellowdog_ray.raydog.waiting import Wait, WorkerCount, wait_for_ray
from yellowdog_ray.raydog.watch import HeadWatch

if TYPE_CHECKING:
    from yellowdog_ray.utils.ray_ssh_tunnels import RayTunnels, SSHTunnelSpec

__all__ = ["RayDogCluster", "RayDogClusterProxy"]

log = logging.getLogger(__name__)

Access = SSHAccess | Literal["direct"] | None
"""How a cluster's nodes are reached: by SSH, directly in their network, or not at all."""


class _Phase(Enum):
    """Where a cluster is in its life."""

    NEW = "not built yet"
    BUILDING = "being built"
    # The process that built it has ended before it was complete.
    PARTIAL = "built in part only"
    RUNNING = "running"
    # Some of it may be left on the platform: a shut-down that failed, or one that is under way.
    ENDING = "being shut down"
    ENDED = "shut down"


class RayDogCluster(ClusterView):
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
    :param state_file: where the cluster's state is kept from before anything is created until all of it has
        been verified as ended, so that it can be found whatever becomes of this process. By default a file of
        its own in the directory ``RAYDOG_STATE_DIR``, or in the user's state directory.
    :param access: how this process reaches the nodes: an :class:`.SSHAccess`; or ``"direct"`` where it can
        connect to their addresses itself. None where it need not; then Ray itself cannot be asked for its
        nodes, and the nodes' output not be fetched.
    :param keep_logs: a directory for the output of the nodes' tasks, which is fetched through ``access``
        before a pool is removed or the cluster shut down; None to keep none.
    :param on_event: called with every :class:`.Event` of the cluster, in the thread in which it happens.
    :param progress: whether a progress display is shown on the standard error stream; None for where that is
        a terminal.
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
        state_file: str | os.PathLike[str] | None = None,
        access: Access = None,
        keep_logs: str | os.PathLike[str] | None = None,
        on_event: Callable[[events.Event], object] | None = None,
        progress: bool | None = None,
    ) -> None:
        self._phase = _Phase.NEW
        credentials = make(
            Credentials,
            CREDENTIAL_PARAMETERS,
            key_id=yd_application_key_id,
            key_secret=yd_application_key_secret,
            api_url=yd_platform_api_url,
        )
        spec = cluster_spec(
            name=cluster_name,
            namespace=cluster_namespace,
            tag=cluster_tag,
            head={
                "template": head_node_compute_requirement_template_id,
                "script": head_node_ray_start_script,
                "images_id": head_node_images_id,
                "userdata": head_node_userdata,
                "instance_tags": head_node_instance_tags,
                "metrics_enabled": head_node_metrics_enabled,
            },
            enable_observability=enable_observability,
            observability={
                "template": observability_node_compute_requirement_template_id,
                "script": observability_node_start_script,
                "images_id": observability_node_images_id,
                "userdata": observability_node_userdata,
                "instance_tags": observability_node_instance_tags,
                "metrics_enabled": observability_node_metrics_enabled,
            },
            lifetime=cluster_lifetime,
            ray_auth=ray_auth,
        )
        self._token = secrets.token_hex(32) if ray_auth == "token" else None
        self._state_file = None if state_file is None else Path(state_file).expanduser()
        self._set_up(credentials, spec, access, keep_logs, on_event, progress)

    def _set_up(
        self,
        credentials: Credentials,
        spec: ClusterSpec,
        access: Access,
        keep_logs: str | os.PathLike[str] | None,
        on_event: Callable[[events.Event], object] | None,
        progress: bool | None,
    ) -> None:
        if access is not None and access != "direct" and not isinstance(access, SSHAccess):
            raise SpecError(f'access: an SSHAccess, "direct" or None is needed, not {type(access).__name__}')
        if on_event is not None and not callable(on_event):
            raise SpecError(f"on_event: a function is needed, not {type(on_event).__name__}")
        self._credentials, self._spec, self._access = credentials, spec, access
        self._keep_logs = None if keep_logs is None else Path(keep_logs).expanduser()
        self._display = progress_display(progress)
        listeners = (on_event, self._display)
        self._emit = events.Emitter(*(listener for listener in listeners if listener is not None))
        self._platform = Platform(credentials, partial(_say_retry, self._emit, spec.name))
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
        self._journal: Journal | None = None
        self._created: datetime | None = None
        self._lifetime_ends: datetime | None = None
        self._targets: Targets | None = None
        self._failure: str | None = None
        # Whether another process has built it, and is the one to say that it was not shut down.
        self._attached = False
        self._watch: HeadWatch | None = None
        self._reach: Reach | None = None

    @classmethod
    def attach(
        cls,
        state: ClusterState | str | os.PathLike[str],
        yd_application_key_id: str,
        yd_application_key_secret: str,
        yd_platform_api_url: str | None = None,
        *,
        access: Access = None,
        keep_logs: str | os.PathLike[str] | None = None,
        on_event: Callable[[events.Event], object] | None = None,
        progress: bool | None = None,
    ) -> RayDogCluster:
        """Come back to a cluster that another process has built, or this one in an earlier life.

        What this process does to the cluster is kept in its state file, where that is on this machine, and
        else in one of its own. What on the platform differs from the state is logged as a warning, and said
        by :meth:`status`. The cluster goes on when the object is left behind.

        :param state: the cluster's state file, or a file or :class:`.ClusterState` that was saved.
        :param yd_platform_api_url: None for the one in the state.
        :returns: the cluster. One that was built in part only can be looked at and shut down.
        :raises StateError: where it is not the state of a cluster, or was written by the existing package,
            which keeps too little in it; :class:`RayDogClusterProxy` can shut such a cluster down.
        :raises OSError: where the file cannot be read.
        :raises PlatformError: where the platform cannot be asked.
        """
        journal = _journal_of(state)
        cluster = cls.__new__(cls)
        cluster._phase = _Phase.NEW
        there = journal.state
        credentials = make(
            Credentials,
            CREDENTIAL_PARAMETERS,
            key_id=yd_application_key_id,
            key_secret=yd_application_key_secret,
            api_url=yd_platform_api_url or there.api_url or DEFAULT_API_URL,
        )
        pools = {pool.role: pool for pool in there.pools if pool.role != "worker"}
        nodes = {role: NodeSpec(template=pool.template or "unknown/unknown") for role, pool in pools.items()}
        spec = make(
            ClusterSpec,
            name=there.cluster_name,
            namespace=there.cluster_namespace,
            tag=there.cluster_tag,
            head=nodes["head"],
            observability=nodes.get("observability"),
            ray_auth=there.ray_auth or "off",
        )
        cluster._token = None
        cluster._state_file = journal.path
        cluster._set_up(credentials, spec, access, keep_logs, on_event, progress)
        cluster._come_back(journal, {role: BuiltPool.of(pool) for role, pool in pools.items()})
        return cluster

    def _come_back(self, journal: Journal, special: Mapping[str, BuiltPool]) -> None:
        self._attached = True
        state = journal.state
        made = Build(str(state.build_id))
        made.sent.update([self._spec.name, *(pool.name for pool in state.pools)])
        self._assembly = Assembly(
            self._platform,
            self._spec,
            self._ray_token,
            special["head"],
            special.get("observability"),
            self._emit,
            journal,
            state.work_requirement_id,
            made,
        )
        self._journal, self._failure = journal, state.failure
        self._created, self._lifetime_ends = state.created, state.lifetime_ends
        self._phase = {
            "building": _Phase.PARTIAL,
            "running": _Phase.RUNNING,
            "ending": _Phase.ENDING,
        }[state.status]
        self._synchronise()
        for difference in self.status().drift:
            log.warning("The cluster %s: %s", state.title, difference)
        if self._phase is _Phase.RUNNING:
            self._begin_watch()

    def __repr__(self) -> str:
        return f"<RayDogCluster {self._spec.namespace}/{self._spec.name}, {self._life}>"

    def _repr_html_(self) -> str:
        try:
            return self.status()._repr_html_()
        except RayDogError as error:
            log.info("The cluster's status could not be asked for: %s", error)
            return self._known_status()._repr_html_()

    @property
    def _life(self) -> str:
        """Where the cluster is in its life, for messages."""
        if self._failure is None or self._phase in (_Phase.NEW, _Phase.RUNNING):
            return self._phase.value
        return f"{self._phase.value}, because {self._failure.splitlines()[0]}"

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
        if phase not in (_Phase.NEW, _Phase.ENDED) and not self._attached:
            warnings.warn(f"{self!r} was not shut down", ResourceWarning, source=self, stacklevel=2)

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
        spec = worker_pool_spec(
            template=worker_node_compute_requirement_template_id,
            script=worker_node_task_script,
            images_id=worker_node_images_id,
            userdata=worker_node_userdata,
            instance_tags=worker_node_instance_tags,
            metrics_enabled=worker_node_metrics_enabled,
            node_count=worker_pool_node_count,
            internal_name=worker_pool_internal_name,
        )
        self._synchronise()
        with self._lock:
            if self._phase not in (_Phase.NEW, _Phase.RUNNING):
                raise ClusterStateError(f"no worker pool can be added: the cluster is {self._life}")
            script = spec.node.script or get_script("worker")
            make_plan = partial(plan.worker_pool, self._spec, pool=spec, script=script)
            if self._phase is _Phase.NEW or self._assembly is None:
                pool = self._reserve(make_plan, None)
                self._pools[pool.plan.internal_name] = pool
                return None
            cluster = self._assembly
            lifetime = self._lifetime_left()
            # Before the first call, so that nothing is forgotten, whatever ends us.
            pool = self._reserve(make_plan, self._journal)
            name = pool.plan.internal_name
            self._unfinished[name] = pool
            crew = cluster.crew(Operation())
        try:
            cluster.add(pool, lifetime, crew)
            with self._lock:
                if self._phase is not _Phase.RUNNING:
                    raise ClusterStateError(
                        f"the worker pool {name!r} is taken back: the cluster is {self._life}"
                    )
                self._pools[name] = pool
                del self._unfinished[name]
            self._emit(events.PoolAdded(self._spec.name, pool.plan.name, name, pool.node_count))
            return pool.id
        except BaseException as error:
            with self._lock:
                # An interrupt that comes when it has been added takes it back too.
                if self._pools.get(name) is pool:
                    self._unfinished[name] = self._pools.pop(name)
            if cluster.discard(pool, crew, error):
                with self._lock:
                    self._unfinished.pop(name, None)
                self._note_gone(pool)
            raise
        finally:
            self._close_display()

    def _reserve(self, make_plan: Callable[..., plan.PoolPlan], journal: Journal | None) -> BuiltPool:
        """Give a worker pool its number and names, and write them down where the cluster is running.

        :raises SpecError: where its name is taken, or there can be no more pools.
        :raises ClusterStateError: where another process is shutting the cluster down.
        :raises StateError: where it cannot be written down.
        """
        reserved: list[BuiltPool] = []

        def reserve(state: ClusterState | None) -> ClusterState | None:
            if state is not None and state.status == "ending":
                raise ClusterStateError(
                    "no worker pool can be added: another process is shutting the cluster down"
                )
            counted = max(self._pools_counted, state.worker_pools_counted if state is not None else 0)
            planned: plan.PoolPlan = make_plan(number=counted + 1)
            name = planned.internal_name
            taken = [pool.internal_name for pool in state.pools] if state is not None else []
            if name in self._pools or name in self._unfinished or name in taken:
                raise SpecError(f"worker_pool_internal_name: there already is a worker pool {name!r}")
            self._pools_counted = counted + 1
            reserved.append(BuiltPool(planned))
            return (
                None
                if state is None
                else state.with_pools(reserved[-1].state()).but(worker_pools_counted=self._pools_counted)
            )

        if journal is None:
            reserve(None)
        else:
            journal.update(reserve)  # type: ignore[arg-type]
        return reserved[-1]

    def _note_gone(self, pool: BuiltPool) -> None:
        """Write down that nothing of a pool is left."""
        if self._journal is not None:
            self._journal.note(lambda state: state.without_pools(pool.plan.name))

    def _synchronise(self) -> None:
        """Take over what other processes have done to the running cluster, from the state file."""
        with self._lock:
            journal, built = self._journal, self._assembly
            if journal is None or built is None or self._phase in (_Phase.NEW, _Phase.BUILDING, _Phase.ENDED):
                return
            state = journal.refresh()
            self._pools_counted = max(self._pools_counted, state.worker_pools_counted)
            present = {pool.name: pool for pool in state.pools}
            for name, pool in list(self._pools.items()):
                if pool.plan.name not in present:
                    del self._pools[name]
                else:
                    pool.take(present.pop(pool.plan.name))
            mine = {pool.plan.name for pool in self._unfinished.values()}
            for there in present.values():
                if there.role == "worker" and there.name not in mine:
                    built.made.sent.add(there.name)
                    complete = there.id is not None and there.group_id is not None
                    pools = self._pools if complete else self._unfinished
                    pools[there.internal_name] = BuiltPool.of(there)

    def remove_worker_pool(self, worker_pool_id: str) -> None:
        """Remove a worker pool at once: its tasks are aborted and its nodes terminated.

        The Ray cluster goes on without them. It returns when the platform has begun to terminate the nodes.

        :raises ClusterStateError: where no worker pool of the cluster has this id.
        :raises TeardownError: where it may still be running; the call can be repeated.
        """
        self._synchronise()
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
        self._synchronise()
        self._remove(internal_name)

    def _remove(self, name: str) -> None:
        with self._lock:
            pool = self._find_pool(name)
            if self._phase is _Phase.NEW:
                del self._pools[name]
                return
            cluster = self._running("no worker pool can be removed")
        if self._keep_logs is not None:
            self._keep([pool])
        # The nodes first: they are what costs. A task of a node that is gone would wait for another one.
        tear_down(self._platform, cluster.pool_targets(pool), until="terminating")
        with self._lock:
            for pools in (self._pools, self._unfinished):
                if pools.get(name) is pool:
                    del pools[name]
        self._note_gone(pool)
        cancel_tasks(self._platform, pool, assembly.CANCEL_SECONDS)
        self._emit(events.PoolRemoved(self._spec.name, pool.plan.name, name))

    def scale_worker_pool(self, internal_name: str, node_count: int) -> None:
        """Give a worker pool another number of nodes; a node whose task has ended does not count.

        In a running cluster it returns when the tasks of new nodes are submitted (see
        :meth:`wait_for_workers`), or the nodes that are too many have been told to go: those first that run
        nothing yet, then the newest. Ray is not asked to empty them. A node that is just booting while it is
        to go is given back when it has been idle for half an hour.

        :param internal_name: the pool's internal name.
        :param node_count: 0 to 10,000; from 1 on before :meth:`build`.
        :raises SpecError: where the number is none.
        :raises ClusterStateError: where no worker pool of the cluster has this name, or it is not running.
        :raises PlatformError: where the platform refuses; what had been added is taken back.
        :raises TeardownError: where nodes that are too many may go on; the call can be repeated.
        """
        least = 1 if self._phase is _Phase.NEW else 0
        count = check_count(node_count, "node_count", MAX_NODES, least, "what YellowDog allows in a pool")
        self._synchronise()
        with self._lock:
            pool = self._find_pool(internal_name)
            if self._phase is _Phase.NEW:
                self._pools[internal_name] = BuiltPool(replace(pool.plan, node_count=count))
                return
            if internal_name not in self._pools:
                raise ClusterStateError(
                    f"the worker pool {internal_name!r} has not been added completely; remove it first"
                )
            cluster = self._running("no worker pool can be scaled")
            crew = cluster.crew(Operation())
        with pool.scaling:
            before = pool.node_count
            scaling.scale(cluster, pool, count, crew.operation)
        self._emit(events.PoolScaled(self._spec.name, pool.plan.name, internal_name, before, count))

    def _find_pool(self, name: str) -> BuiltPool:
        pool = self._pools.get(name) or self._unfinished.get(name)
        if pool is None:
            known = ", ".join(repr(known) for known in self._pools) or "none"
            raise ClusterStateError(f"this cluster has no worker pool {name!r}; it has: {known}")
        return pool

    def _running(self, otherwise: str) -> Assembly:
        """Return the running cluster.

        :raises ClusterStateError: where it is not running.
        """
        if self._phase is not _Phase.RUNNING or self._assembly is None:
            raise ClusterStateError(f"{otherwise}: the cluster is {self._life}")
        return self._assembly

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

    def plan(self, head_node_build_timeout: timedelta | None = None) -> ClusterPlan:
        """Tell what :meth:`build` will create, without any call: printable, and as JSON.

        It holds no secret; the Ray token and what is not known yet are said in words.

        :param head_node_build_timeout: as it will be given to :meth:`build`.
        :raises ClusterStateError: where the cluster is built already.
        """
        timeout = check_duration(head_node_build_timeout, "head_node_build_timeout")
        with self._lock:
            built = self._assemble(timeout)
            pools = [built.head, built.observability, *self._pools.values()]
        return preview(
            self._spec,
            [pool.plan for pool in pools if pool is not None],
            token=self._spec.ray_auth == "token",
            build_timeout=timeout,
            secrets=[self._credentials.key_secret.get_secret_value()],
        )

    def build(
        self,
        head_node_build_timeout: timedelta | None = None,
        *,
        until: Literal["executing", "ray"] = "executing",
    ) -> tuple[str, str | None]:
        """Build the cluster, and return when the head node's task is executing.

        The workers go on joining after that; see :meth:`wait_for_workers`. Where anything fails, the time
        is over or Ctrl-C is pressed, what had been created is taken back before the error is raised.

        :param head_node_build_timeout: how long it may take; None for as long as it takes, eleven hours at
            most.
        :param until: ``"ray"`` to return only when Ray on the head answers that it is healthy, some seconds
            later; the cluster needs an ``access`` for it.
        :returns: the private and the public address of the head node, the latter None where it has none.
        :raises SpecError: where the timeout is none.
        :raises StateError: where the state file cannot be written.
        :raises ClusterStateError: where the cluster is built already.
        :raises CredentialsError: where the platform does not accept the key.
        :raises NotFoundError: where the platform does not know a template.
        :raises NameTakenError: where there is something else under one of the cluster's names.
        :raises BuildError: where the head cannot come up, with the reason.
        :raises BuildTimeoutError: a :class:`TimeoutError`: where it takes too long.
        """
        timeout = check_duration(head_node_build_timeout, "head_node_build_timeout")
        if until not in ("executing", "ray"):
            raise SpecError(f'until: "executing" or "ray" is needed, not {until!r}')
        if until == "ray" and self._access is None:
            raise SpecError(
                'until: "ray" needs a way to the head: give the cluster access=SSHAccess(...), or "direct" '
                "where this process can connect to the nodes' addresses itself"
            )
        self._check_not_built()
        with self._building:
            built = self._assemble(timeout)
            operation = Operation((timeout or plan.MAX_BUILD).total_seconds())
            try:
                with self._lock:
                    self._builder = threading.current_thread()
                    self._phase = _Phase.BUILDING
                    self._assembly, self._failure = built, None
                    workers = list(self._pools.values())
                self._open_journal(built, workers)
                built.build(workers, built.crew(operation))
                if until == "ray":
                    self._wait_for_ray(built, operation)
                with self._lock:
                    built.check_running()
                    self._note_running(built, workers)
                    self._phase = _Phase.RUNNING
            except BaseException as error:
                self._take_back(built, error)
                raise
        self._begin_watch()
        try:
            self.use_ray_auth()
        except Exception as error:
            # The cluster is there, and its user has to get to know it.
            log.warning("This process could not be given the cluster's Ray token: %s", error)
        private_ip, public_ip = str(built.head.private_ip), built.head.public_ip
        self._emit(events.BuildFinished(self._spec.name, operation.elapsed, private_ip, public_ip))
        return private_ip, public_ip

    def _open_journal(self, built: Assembly, workers: Sequence[BuiltPool]) -> None:
        """Write down the names of everything that will be created, before anything is."""
        self._created = datetime.now(timezone.utc)
        lifetime = self._spec.lifetime
        self._lifetime_ends = None if lifetime is None else self._created + lifetime
        path = self._state_file or default_path(self._spec.namespace, self._spec.name, built.made.id)
        pools = [pool for pool in (built.head, built.observability, *workers) if pool is not None]
        self._journal = built.journal = Journal.create(
            path, self._state_of(built, pools).but(status="building")
        )

    def _note_running(self, built: Assembly, workers: Sequence[BuiltPool]) -> None:
        pools = [pool.state() for pool in (built.head, built.observability, *workers) if pool is not None]

        def run(state: ClusterState) -> ClusterState:
            if state.status == "ending":
                raise ClusterStateError("it was stopped: the cluster is being shut down by another process")
            return state.with_pools(*pools).but(status="running")

        if self._journal is not None:
            self._journal.note(run)

    def _wait_for_ray(self, built: Assembly, operation: Operation) -> None:
        def say(seconds: float) -> None:
            built.check_running()
            self._emit(events.Waiting(self._spec.name, "Ray on the head to answer", seconds))

        with self._new_reach(built) as reach:
            try:
                wait_for_ray(self._platform, built.head, reach, operation, say)
            except WaitTimeoutError as error:
                raise BuildTimeoutError(str(error)) from error

    def _begin_watch(self) -> None:
        if self._assembly is not None:
            self._watch = HeadWatch(self, self._platform, self._assembly.head, RayDogCluster._head_ended)
            self._watch.start()

    def _head_ended(self, reason: str) -> None:
        """End the cluster, for its head has ended and it cannot come back."""
        with self._lock:
            if self._phase is not _Phase.RUNNING:
                return
            self._phase = _Phase.ENDING
            reason = f"its head has ended: {reason}"
            ended = self._journal is not None and not self._journal.path.exists()
            if ended or (self._journal is not None and self._journal.refresh().status == "ending"):
                reason = "another process has shut it down"
            self._failure = reason
        self._emit(events.HeadFailed(self._spec.name, reason))
        try:
            self.shut_down()
        except RayDogError as error:
            log.error("The cluster %s could not all be shut down: %s", self._spec.name, error)

    def _check_not_built(self) -> None:
        if self._phase is not _Phase.NEW:
            raise ClusterStateError(f"the cluster cannot be built: it is {self._life}")

    def _assemble(self, timeout: timedelta | None) -> Assembly:
        """Put together what is to be built; nothing is created yet."""
        with self._lock:
            self._check_not_built()
            head = plan.head_pool(self._spec, self._spec.head.script or get_script("head"))
            observability = None
            node = self._spec.observability
            if node is not None:
                script = node.script or get_script("observability")
                observability = BuiltPool(plan.observability_pool(self._spec, node, script))
            return Assembly(
                self._platform,
                self._spec,
                self._ray_token,
                BuiltPool(head),
                observability,
                self._emit,
                idle=plan.pool_idle_timeout(timeout),
            )

    def _take_back(self, built: Assembly, error: BaseException) -> None:
        """Take back what a build has created; where this is interrupted, shut_down() goes on with it."""
        with self._lock:
            if self._phase in (_Phase.BUILDING, _Phase.RUNNING):
                self._phase = _Phase.ENDING
            # Not where a signal handler has shut the cluster down in between.
            ours = self._phase is _Phase.ENDING
            workers = list(self._pools.values())
        reason = str(error) or type(error).__name__
        self._emit(events.RollbackStarted(self._spec.name, reason))
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
        self._note_ended(built, targets)
        if gone:
            self._platform.close()
        self._emit(events.BuildFailed(self._spec.name, reason, tuple(targets.items)))

    def _note_ended(self, built: Assembly, targets: Targets) -> None:
        """Keep in the state file what is left, and no file where nothing is."""
        journal = self._journal
        if journal is None:
            return
        if not targets.items:
            journal.remove()
            self._journal = built.journal = None
            return
        left = {pool.name for pool in targets.pools}

        def keep_left(state: ClusterState) -> ClusterState:
            gone = [pool.name for pool in state.pools if pool.name not in left]
            return state.without_pools(*gone).but(status="ending", failure=self._failure)

        journal.note(keep_left)

    def _lifetime_left(self) -> timedelta | None:
        if self._lifetime_ends is None:
            return None
        left = self._lifetime_ends - datetime.now(timezone.utc)
        if left <= timedelta(0):
            raise ClusterStateError(f"the cluster's lifetime is over since {self._lifetime_ends}")
        return left

    def _ray_token(self) -> str | None:
        """Tell the cluster's Ray token; one that another process has made is in the head's task.

        :raises ClusterStateError: where the platform does not tell it.
        """
        built = self._assembly
        if self._token is None and self._spec.ray_auth == "token" and built is not None:
            task = self._platform.task(str(built.head.task_id), Operation(30.0))
            self._token = (task.environment or {}).get("RAY_AUTH_TOKEN")
            if self._token is None:
                raise ClusterStateError(
                    "the cluster's Ray token is not known here: the platform does not tell the environment "
                    "of the head's task. The process that built the cluster knows it"
                )
        return self._token

    def use_ray_auth(self) -> bool:
        """Make this process use the cluster's Ray token, as :meth:`build` does.

        It sets ``RAY_AUTH_MODE`` and ``RAY_AUTH_TOKEN``, and tells a Ray that has been imported already.
        :meth:`shut_down` takes both back, unless somebody else has changed them. Call it to come back to
        this cluster after another one was built in this process.

        :returns: whether the token is in use now; not where the cluster has none, nor while Ray is
            connected to something in this process: call ``ray.shutdown()`` before.
        """
        token = self._ray_token()
        return token is not None and ray_auth.activate(token)

    def wait_for_workers(
        self, count: int | None = None, timeout: timedelta | float | None = None
    ) -> WorkerCount:
        """Wait until there are workers.

        With an ``access``, those are counted that Ray itself reports alive. Without one, it is the tasks that
        execute: Ray itself is up on a node a few seconds after its task began.

        :param count: how many; None for all that the cluster's pools have.
        :param timeout: how long to wait, as a timedelta or in seconds; None for as long as they can come.
        :returns: how many there are, at least ``count``: an ``int``, whose ``source`` says who counted them,
            ``"ray"`` or ``"tasks"``.
        :raises ClusterStateError: where the cluster is not running.
        :raises WaitTimeoutError: a :class:`TimeoutError` that says how many there are: in time they have not
            come, or it has turned out earlier that they cannot come, with the reason.
        """
        if isinstance(timeout, int | float) and not isinstance(timeout, bool):
            timeout = timedelta(seconds=timeout)
        limit = check_duration(timeout, "timeout")
        self._synchronise()
        with self._lock:
            built = self._running("there are no workers to wait for")
            pools = list(self._pools.values())
        every = sum(pool.node_count for pool in pools)
        wanted = every if count is None else check_count(count, "count", every)
        wait = Wait(
            self._platform,
            self._spec.name,
            str(built.work_requirement_id),
            built.head,
            pools,
            wanted,
            Operation(None if limit is None else limit.total_seconds()),
            self._emit,
            self._way(),
            logs.tail,
        )
        try:
            return wait.run()
        finally:
            self._close_display()

    def _close_display(self) -> None:
        """End what has no event of its own that ends it."""
        if self._display is not None:
            self._display.close()

    def status(self) -> ClusterStatus:
        """Ask the platform how the cluster is doing, and compare that with what it should be.

        :returns: for every pool how many nodes are wanted, registered and executing, and which have failed,
            and why. Before :meth:`build` and after :meth:`shut_down` nothing is asked.
        :raises PlatformError: where the platform cannot be asked.
        """
        self._synchronise()
        known = self._known_status()
        with self._lock:
            built = self._assembly
            if built is None or self._phase in (_Phase.NEW, _Phase.ENDED):
                return known
            every = (built.head, built.observability, *self._pools.values(), *self._unfinished.values())
        return survey(self._platform, known, [pool for pool in every if pool is not None])

    def _known_status(self) -> ClusterStatus:
        with self._lock:
            built = self._assembly
            head = None if built is None else built.head
            return ClusterStatus(
                self._spec.name,
                self._spec.namespace,
                self._phase.value,
                work_requirement_id=None if built is None else built.work_requirement_id,
                head_private_ip=None if head is None else head.private_ip,
                head_public_ip=None if head is None else head.public_ip,
                pools={
                    name: PoolStatus(pool.plan.name, name, "worker", pool.id, pool.node_count, None, 0)
                    for name, pool in self._pools.items()
                    if self._phase is not _Phase.ENDED
                },
                failure=self._failure,
                lifetime_ends=self._lifetime_ends,
            )

    def get_logs(self, internal_name: str | None = None, max_bytes: int = 100_000) -> dict[str, NodeLog]:
        """Fetch what the nodes' tasks print, by the names of the tasks.

        It is read over SSH from nodes that live, which needs an ``access``. Of tasks that have ended there is
        what was kept in ``keep_logs``, and the end of it where the platform itself has it; where there is
        nothing, the answer says so.

        :param internal_name: of one pool only; ``"head-node"`` and ``"observability-node"`` are the others'.
        :param max_bytes: how much of the end of each.
        :raises ClusterStateError: where there is no such pool, or before :meth:`build`.
        :raises PlatformError: where the platform cannot be asked for the tasks.
        """
        self._synchronise()
        with self._lock:
            built = self._assembly
            if built is None:
                raise ClusterStateError(f"there is no output: the cluster is {self._life}")
            every = (built.head, built.observability, *self._pools.values(), *self._unfinished.values())
            pools = {pool.plan.internal_name: pool for pool in every if pool is not None}
        names = {pool.plan.group: name for name, pool in pools.items()}
        found = {} if self._keep_logs is None else logs.kept(self._keep_logs, names)
        if self._phase is not _Phase.ENDED:
            wanted = [pool for name, pool in pools.items() if internal_name in (None, name)]
            fresh = logs.collect(self._platform, self._way(), wanted, max_bytes)
            found.update({task: text for task, text in fresh.items() if text.text or task not in found})
        if internal_name is not None:
            found = {task: text for task, text in found.items() if text.pool == internal_name}
            if not found and internal_name not in pools:
                raise ClusterStateError(
                    f"there is no output of a pool {internal_name!r}; there is that of: "
                    f"{', '.join(map(repr, pools))}"
                )
        return found

    def _keep(self, pools: Sequence[BuiltPool]) -> None:
        """Keep the output of pools that are about to end. That it cannot be had keeps nothing from ending."""
        if self._keep_logs is None:
            return
        try:
            logs.keep(self._keep_logs, logs.collect(self._platform, self._way(), pools, 10_000_000))
        except RayDogError as error:
            log.warning("The output of the nodes could not be kept: %s", error)

    def tunnels(self, ray_tunnel_specs: Sequence[SSHTunnelSpec] | None = None) -> RayTunnels:
        """Make tunnels to the head, with what the cluster knows; they are not open yet.

        :param ray_tunnel_specs: the ports to forward; by default 10001 (Ray Client) and 8265 (dashboard).
        :raises ClusterStateError: where there is no head, or the cluster has no ``access`` by SSH.
        """
        from yellowdog_ray.utils.ray_ssh_tunnels import RayTunnels

        access, address = self._access, self.head_node_public_ip or self.head_node_private_ip
        if address is None:
            raise ClusterStateError(f"there is no head to make tunnels to: the cluster is {self._life}")
        if not isinstance(access, SSHAccess):
            raise ClusterStateError("tunnels need SSH: give the cluster access=SSHAccess(...)")
        return RayTunnels(
            address,
            access.user,
            access.password,
            access.private_key_file,
            access.private_key_password,
            ray_tunnel_specs,
            access.port,
            host_key=access.host_key,
        )

    def _way(self) -> Reach | None:
        """Return the way to the head's Ray and the nodes' output, kept open; None where there is none."""
        with self._lock:
            if self._reach is None and self._access is not None and self._assembly is not None:
                self._reach = self._new_reach(self._assembly)
            return self._reach

    def _new_reach(self, built: Assembly) -> Reach:
        addresses = [address for address in (built.head.public_ip, built.head.private_ip) if address]
        access = self._access if isinstance(self._access, SSHAccess) else None
        return Reach(addresses, access, self._ray_token())

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
        except TeardownError as error:
            self._emit(events.ShutdownFailed(self._spec.name, str(error), tuple(error.still_running)))
            raise
        except BaseException:
            log.error(
                "The shutting down of the cluster %s was interrupted. May still be running: %s. Call "
                "shut_down() again, or `raydog shut-down` with the state file %s",
                self._spec.name,
                str(self._targets or "") or "all of it",
                "that save_state_to_json_file() writes" if self._journal is None else self._journal.path,
            )
            raise
        finally:
            self._forget_token()

    def _end(self) -> None:
        operation = Operation()
        built = self._assembly
        if self._watch is not None:
            self._watch.stop()
        if self._targets is None and built is not None:
            built.settle()
            self._synchronise()
            with self._lock:
                workers = [*self._pools.values(), *self._unfinished.values()]
            if self._journal is not None:
                self._journal.note(lambda state: state.but(status="ending", failure=self._failure))
            if self._keep_logs is not None:
                self._keep([pool for pool in (built.head, built.observability, *workers) if pool is not None])
            self._targets = built.targets(workers)
        if self._targets is not None and built is not None:
            self._emit(events.ShutdownStarted(self._spec.name, tuple(self._targets.items)))
            try:
                tear_down(self._platform, self._targets)
            finally:
                self._note_ended(built, self._targets)
        with self._lock:
            self._targets = None
            self._unfinished.clear()
            self._phase = _Phase.ENDED
            reach, self._reach = self._reach, None
        if reach is not None:
            reach.close()
        self._platform.close()
        self._emit(events.ShutdownFinished(self._spec.name, operation.elapsed))

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
                raise ClusterStateError(f"there is no state to save: the cluster is {self._life}")
            return self._state(self._assembly)

    def _state(self, built: Assembly) -> ClusterState:
        """Write down what there is of the cluster, as far as this process knows."""
        every = (built.head, built.observability, *self._pools.values(), *self._unfinished.values())
        pools = [pool for pool in every if pool is not None and built.exists(pool)]
        state = self._state_of(built, pools).but(
            status="running" if self._phase is _Phase.RUNNING else "ending"
        )
        if self._targets is None:
            return state
        # Something has been ended already: what is left is known better there.
        left = {target.name for target in self._targets.pools}
        gone = [pool.name for pool in state.pools if pool.name not in left]
        return state.without_pools(*gone).but(work_requirement_id=self._targets.work_requirement_id)

    def _state_of(self, built: Assembly, pools: Sequence[BuiltPool]) -> ClusterState:
        return ClusterState(
            cluster_name=self._spec.name,
            cluster_namespace=self._spec.namespace,
            cluster_tag=self._spec.tag,
            work_requirement_id=built.work_requirement_id,
            worker_pool_ids=[pool.id for pool in pools if pool.id is not None],
            api_url=self._credentials.api_url,
            ray_auth=self._spec.ray_auth,
            build_id=built.made.id,
            pools=[pool.state() for pool in pools],
            worker_pools_counted=self._pools_counted,
            created=self._created,
            lifetime_ends=self._lifetime_ends,
            failure=self._failure,
            saved=datetime.now(timezone.utc),
            state_file=None if self._journal is None else str(self._journal.path),
            key_hint=key_hint(self._credentials),
        )


def _say_retry(emit: events.Emitter, cluster: str, what: str, reason: str) -> None:
    """Say that a call is tried again; the platform's threads must not keep a cluster alive for that."""
    emit(events.CallRetried(cluster, what, reason))


def _journal_of(state: ClusterState | str | os.PathLike[str]) -> Journal:
    """Find the file in which a cluster's state is kept, or begin one on this machine.

    :raises StateError: where the state is not that of a cluster that can be come back to.
    """
    given = state if isinstance(state, ClusterState) else ClusterState.load(state)
    if given.build_id is None or not any(pool.role == "head" for pool in given.pools):
        raise StateError(
            f"the state of the cluster {given.title} does not say enough to come back to it: it was "
            "written by the existing package, or its head is gone. RayDogClusterProxy can end it, and so can "
            "`raydog shut-down`"
        )
    usual = default_path(str(given.cluster_namespace), str(given.cluster_name), given.build_id)
    places = [Path(given.state_file)] if given.state_file else []
    for place in [*places, usual]:
        try:
            journal = Journal.open(place)
        except (OSError, StateError):
            continue
        if journal.state.build_id == given.build_id:
            return journal
    return Journal.create(usual, given)
