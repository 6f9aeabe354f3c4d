"""Looking at a cluster: waiting for its workers, its status, its logs and the way to its head."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path

from yellowdog_ray.errors import (
    ClusterStateError,
    RayDogError,
    SpecError,
)
from yellowdog_ray.raydog import logs
from yellowdog_ray.raydog.access import SSHAccess
from yellowdog_ray.raydog.assembly import Assembly
from yellowdog_ray.raydog.core import Phase
from yellowdog_ray.raydog.logs import NodeLog
from yellowdog_ray.raydog.pools import BuiltPool, named_pools
from yellowdog_ray.raydog.reach import Reach
from yellowdog_ray.raydog.record import ClusterRecord
from yellowdog_ray.raydog.specs import (
    check_count,
    check_seconds,
)
from yellowdog_ray.raydog.status import ClusterStatus, PoolStatus
from yellowdog_ray.raydog.survey import survey
from yellowdog_ray.raydog.transport import Operation
from yellowdog_ray.raydog.waiting import Wait, WorkerCount

__all__ = ["ClusterInsight"]

log = logging.getLogger(__name__)


class ClusterInsight(ClusterRecord):
    """The part of a cluster that looks at it."""

    def _repr_html_(self) -> str:
        try:
            return self.status()._repr_html_()
        except RayDogError as error:
            log.info("The cluster's status could not be asked for: %s", error)
            return self._known_status()._repr_html_()

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
        limit = None if timeout is None else check_seconds(timeout, "timeout")
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
            Operation(limit),
            self._emit,
            self._way(),
        )
        try:
            return wait.run()
        finally:
            self._close_display()

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
            if built is None or self._phase in (Phase.NEW, Phase.ENDED):
                return known
            pools = built.pools(self._workers)
        return survey(self._platform, known, pools)

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
                    if self._phase is not Phase.ENDED
                },
                failure=self._failure,
                lifetime_ends=self._lifetime_ends,
            )

    def get_logs(self, internal_name: str | None = None, max_bytes: int = 100_000) -> dict[str, NodeLog]:
        """Fetch what the nodes' tasks print, by the names of the tasks.

        It is read over SSH from nodes that live, which needs an ``access``. Of tasks that have ended there is
        what was kept in ``keep_logs``, and the end of it where the platform itself has it; where there is
        nothing, the answer says so.

        :param internal_name: of one pool only, by its name in :meth:`status`; ``"head-node"`` and
            ``"observability-node"`` are not workers'.
        :param max_bytes: how much of the end of each.
        :raises ClusterStateError: where there is no such pool, or before :meth:`build`.
        :raises PlatformError: where the platform cannot be asked for the tasks.
        """
        self._synchronise()
        with self._lock:
            built = self._assembly
            if built is None:
                raise ClusterStateError(f"there is no output: the cluster is {self._life}")
            pools = named_pools(built.pools(self._workers))
        found = {} if self._keep_logs is None else logs.kept(self._keep_logs / self._spec.name, self._created)
        if self._phase is not Phase.ENDED:
            wanted = {name: pool for name, pool in pools.items() if internal_name in (None, name)}
            for fresh in logs.collect(self._platform, self._way(), wanted, max_bytes):
                if fresh.text is not None or fresh.task not in found:
                    found[fresh.task] = fresh
        if internal_name is not None:
            found = {task: text for task, text in found.items() if text.pool == internal_name}
            if not found and internal_name not in pools:
                raise ClusterStateError(
                    f"there is no output of a pool {internal_name!r}; there is that of: "
                    f"{', '.join(map(repr, pools))}"
                )
        return found

    def _check_keep_logs(self) -> None:
        """Make the directory for logs.

        :raises SpecError: where nothing can be kept there.
        """
        if self._keep_logs is None:
            return
        try:
            self._keep_logs.mkdir(mode=0o700, parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self._keep_logs):
                pass
        except OSError as error:
            raise SpecError(
                f"keep_logs: nothing can be kept in {self._keep_logs}: {error.strerror or error}"
            ) from error

    def _keep(self, pools: Mapping[str, BuiltPool]) -> None:
        """Keep the output of pools that are about to end. That it cannot be had keeps nothing from ending.

        :param pools: by their names in :meth:`status`.
        """
        if self._keep_logs is None:
            return
        try:
            found = logs.collect(self._platform, self._way(), pools, logs.KEPT_BYTES, in_a_hurry=True)
            logs.keep(self._keep_logs / self._spec.name, found)
        except Exception as error:
            log.warning("The output of the nodes could not be kept: %s: %s", type(error).__name__, error)

    def _way(self) -> Reach | None:
        """Return the way to the head's Ray and the nodes' output, kept open; None where there is none."""
        with self._lock:
            if self._reach is None and self._access is not None and self._assembly is not None:
                self._reach = self._new_reach(self._assembly)
            return self._reach

    def _new_reach(self, built: Assembly) -> Reach:
        addresses = [address for address in (built.head.public_ip, built.head.private_ip) if address]
        access = self._access if isinstance(self._access, SSHAccess) else None
        return Reach(addresses, access, self._ray_token(), record=self._host_keys_file)

    @property
    def _host_keys_file(self) -> Path | None:
        """The file for the host keys of this cluster's nodes; None where it has no state file."""
        from yellowdog_ray.utils._ssh.hostkeys import record_beside

        return None if self._journal is None else record_beside(self._journal.path)
