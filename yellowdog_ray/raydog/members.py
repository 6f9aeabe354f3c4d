"""The worker pools of a cluster: adding, removing and scaling them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from functools import partial

from yellowdog_ray.errors import (
    ClusterStateError,
    NotFoundError,
    SpecError,
)
from yellowdog_ray.raydog import assembly, events, plan, scaling
from yellowdog_ray.raydog.core import Phase
from yellowdog_ray.raydog.journal import Journal
from yellowdog_ray.raydog.parameters import worker_pool_spec
from yellowdog_ray.raydog.pools import BuiltPool, named_pools
from yellowdog_ray.raydog.scripts import get_script
from yellowdog_ray.raydog.sessions import ClusterSessions
from yellowdog_ray.raydog.specs import (
    MAX_NODES,
    check_count,
)
from yellowdog_ray.raydog.state import ClusterState
from yellowdog_ray.raydog.teardown import tear_down
from yellowdog_ray.raydog.transport import Operation
from yellowdog_ray.raydog.undo import cancel_tasks

__all__ = ["ClusterMembers"]


class ClusterMembers(ClusterSessions):
    """The part of a cluster that has worker pools."""

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
        self._check_not_ended_elsewhere("no worker pool can be added")
        with self._lock:
            if self._phase not in (Phase.NEW, Phase.RUNNING):
                raise ClusterStateError(f"no worker pool can be added: the cluster is {self._life}")
            script = spec.node.script or get_script("worker")
            make_plan = partial(plan.worker_pool, self._spec, pool=spec, script=script)
            if self._phase is Phase.NEW or self._assembly is None:
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
                if self._phase is not Phase.RUNNING:
                    raise ClusterStateError(
                        f"the worker pool {name!r} is taken back: the cluster is {self._life}"
                    )
                if self._unfinished.get(name) is not pool:
                    raise ClusterStateError(f"the worker pool {name!r} has been removed meanwhile")
                self._pools[name] = pool
                del self._unfinished[name]
            cluster.dismiss(crew)
            self._emit(events.PoolAdded(self._spec.name, pool.plan.name, name, pool.node_count))
            return pool.id
        except BaseException as error:
            with self._lock:
                # An interrupt that comes when it has been added takes it back too.
                if self._pools.get(name) is pool:
                    self._unfinished[name] = self._pools.pop(name)
            if cluster.discard(pool, crew, error):
                with self._lock:
                    self._note_gone(pool)
                    if self._unfinished.get(name) is pool:
                        del self._unfinished[name]
            raise
        finally:
            self._close_display()

    def _check_not_ended_elsewhere(self, otherwise: str) -> None:
        """Raise where the state file of the running cluster is gone because another process has ended it."""
        journal, built = self._journal, self._assembly
        if self._phase is not Phase.RUNNING or journal is None or built is None or journal.path.exists():
            return
        try:
            status = self._platform.work_requirement(str(built.work_requirement_id), Operation(30.0)).status
        except NotFoundError:
            status = None
        if status is None or status.finished:
            raise ClusterStateError(f"{otherwise}: another process has shut the cluster down")

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
            taken = {*self._pools, *self._unfinished}
            if state is not None:
                taken.update(pool.internal_name for pool in state.pools)
            planned: plan.PoolPlan = make_plan(number=counted + 1)
            while planned.internal_name == planned.group and planned.internal_name in taken:
                # Somebody has given this name to another pool.
                counted += 1
                planned = make_plan(number=counted + 1)
            name = planned.internal_name
            if name in taken:
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

    def _lifetime_left(self) -> timedelta | None:
        if self._lifetime_ends is None:
            return None
        left = self._lifetime_ends - datetime.now(timezone.utc)
        if left <= timedelta(0):
            raise ClusterStateError(f"the cluster's lifetime is over since {self._lifetime_ends}")
        return left

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
        self._check_not_ended_elsewhere("no worker pool can be removed")
        with self._lock:
            pool = self._find_pool(name)
            if self._phase is Phase.NEW:
                del self._pools[name]
                return
            cluster = self._running("no worker pool can be removed")
            named = named_pools(cluster.pools(self._workers))
        self._keep({key: one for key, one in named.items() if one is pool})
        # The nodes first: they are what costs. A task of a node that is gone would wait for another one.
        tear_down(self._platform, cluster.pool_targets(pool), until="terminating")
        with self._lock:
            # In the file first: what is there and not here is taken for another process's.
            self._note_gone(pool)
            for pools in (self._pools, self._unfinished):
                if pools.get(name) is pool:
                    del pools[name]
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
        least = 1 if self._phase is Phase.NEW else 0
        count = check_count(node_count, "node_count", MAX_NODES, least, "what YellowDog allows in a pool")
        self._synchronise()
        self._check_not_ended_elsewhere("no worker pool can be scaled")
        with self._lock:
            pool = self._find_pool(internal_name)
            if self._phase is Phase.NEW:
                self._pools[internal_name] = BuiltPool(replace(pool.plan, node_count=count))
                return
            if internal_name not in self._pools:
                raise ClusterStateError(
                    f"the worker pool {internal_name!r} has not been added completely; remove it first"
                )
            cluster = self._running("no worker pool can be scaled")
            crew = cluster.crew(Operation())
        try:
            with pool.scaling, cluster.alone(pool.plan.name):
                before = pool.node_count
                scaling.scale(cluster, pool, count, crew.operation)
        finally:
            cluster.dismiss(crew)
        self._emit(events.PoolScaled(self._spec.name, pool.plan.name, internal_name, before, count))

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
