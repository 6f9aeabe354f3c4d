"""A cluster's state, written down: by itself in its state file, and where somebody asks for it."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from datetime import datetime, timezone

from yellowdog_ray.errors import (
    ClusterStateError,
)
from yellowdog_ray.raydog.assembly import STOPPED, Assembly
from yellowdog_ray.raydog.core import Phase
from yellowdog_ray.raydog.journal import Journal, default_path, own_path
from yellowdog_ray.raydog.pools import BuiltPool
from yellowdog_ray.raydog.specs import (
    key_hint,
)
from yellowdog_ray.raydog.state import ClusterState
from yellowdog_ray.raydog.teardown import Targets
from yellowdog_ray.raydog.token_file import token_path, write_token
from yellowdog_ray.raydog.view import ClusterView

__all__ = ["ClusterRecord"]


class ClusterRecord(ClusterView):
    """The part of a cluster that writes down what there is of it."""

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

    def _being_built(self) -> bool:
        """Tell whether another thread is building the cluster, or taking its build back."""
        return (
            self._phase is not Phase.RUNNING
            and self._building.locked()
            and self._builder is not threading.current_thread()
        )

    def _state(self, built: Assembly) -> ClusterState:
        """Write down what there is of the cluster, as far as this process knows."""
        pools = [pool for pool in built.pools(self._workers) if built.exists(pool)]
        state = self._state_of(built, pools).but(
            status="running" if self._phase is Phase.RUNNING else "ending"
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
            ray_token_file=None if self._journal is None else self._journal.state.ray_token_file,
            build_id=built.made.id,
            pools=[pool.state() for pool in pools],
            worker_pools_counted=self._pools_counted,
            created=self._created,
            lifetime_ends=self._lifetime_ends,
            failure=self._failure_line,
            saved=datetime.now(timezone.utc),
            state_file=None if self._journal is None else str(self._journal.path),
            key_hint=key_hint(self._credentials),
        )

    def _open_journal(self, built: Assembly, workers: Sequence[BuiltPool]) -> None:
        """Write down the names of everything that will be created, before anything is."""
        self._created = datetime.now(timezone.utc)
        lifetime = self._spec.lifetime
        self._lifetime_ends = None if lifetime is None else self._created + lifetime
        path = self._state_file or default_path(self._spec.namespace, self._spec.name, built.made.id)
        path, token = own_path(path), self._ray_token()
        state = self._state_of(built, built.pools(workers)).but(status="building")
        if token is None:
            self._journal = built.journal = Journal.create(path, state)
            return
        journal = Journal.create(path, state.but(ray_token_file=str(token_path(path))))
        try:
            # After the state, so that there is never a token that no state leads to.
            write_token(token_path(path), token)
        except BaseException:
            journal.remove()
            raise
        self._journal = built.journal = journal

    def _note_running(self, built: Assembly, workers: Sequence[BuiltPool]) -> None:
        pools = [pool.state() for pool in built.pools(workers)]

        def run(state: ClusterState) -> ClusterState:
            if state.status == "ending":
                raise ClusterStateError(STOPPED)
            return state.with_pools(*pools).but(status="running")

        if self._journal is not None:
            self._journal.note(run)

    def _note_gone(self, pool: BuiltPool) -> None:
        """Write down that nothing of a pool is left."""
        if self._journal is not None:
            self._journal.note(lambda state: state.without_pools(pool.plan.name))

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
            return state.without_pools(*gone).but(
                status="ending",
                failure=self._failure_line,
                work_requirement_id=targets.work_requirement_id,
            )

        journal.note(keep_left)
