"""What all parts of a cluster object share: what it consists of, and where it is in its life."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from datetime import datetime
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any, Literal

from yellowdog_ray.errors import (
    ClusterStateError,
    SpecError,
)
from yellowdog_ray.raydog import events, ray_auth
from yellowdog_ray.raydog.access import SSHAccess
from yellowdog_ray.raydog.assembly import Assembly
from yellowdog_ray.raydog.journal import Journal
from yellowdog_ray.raydog.platform import Platform
from yellowdog_ray.raydog.pools import BuiltPool
from yellowdog_ray.raydog.progress import progress_display
from yellowdog_ray.raydog.reach import Reach
from yellowdog_ray.raydog.specs import (
    ClusterSpec,
    Credentials,
    check_path,
)
from yellowdog_ray.raydog.teardown import Targets
from yellowdog_ray.raydog.token_file import read_token
from yellowdog_ray.raydog.transport import Operation
from yellowdog_ray.raydog.watch import HeadWatch

__all__ = ["Access", "ClusterCore", "Phase"]

log = logging.getLogger(__name__)


class Phase(Enum):
    """Where a cluster is in its life."""

    NEW = "not built yet"
    BUILDING = "being built"
    # The process that built it has ended before it was complete.
    PARTIAL = "built in part only"
    RUNNING = "running"
    # Some of it may be left on the platform: a shut-down that failed, or one that is under way.
    ENDING = "being shut down"
    ENDED = "shut down"


Access = SSHAccess | Literal["direct"] | None
"""How a cluster's nodes are reached: by SSH, directly in their network, or not at all."""


def _say_retry(emit: events.Emitter, cluster: str, what: str, reason: str) -> None:
    """Say that a call is tried again; the platform's threads must not keep a cluster alive for that."""
    emit(events.CallRetried(cluster, what, reason))


class ClusterCore:
    """A cluster object without its calls."""

    _phase: Phase
    _token: str | None
    _state_file: Path | None

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
        if keep_logs is not None and not isinstance(access, SSHAccess):
            raise SpecError(
                "keep_logs: the nodes' output is fetched over SSH, which needs access=SSHAccess(...)"
            )
        if on_event is not None and not callable(on_event):
            raise SpecError(f"on_event: a function is needed, not {type(on_event).__name__}")
        self._credentials, self._spec, self._access = credentials, spec, access
        self._keep_logs = None if keep_logs is None else check_path(keep_logs, "keep_logs")
        self._display = progress_display(progress)
        listeners = (on_event, self._display)
        self._emit = events.Emitter(*(listener for listener in listeners if listener is not None))
        self._platform = Platform(credentials, partial(_say_retry, self._emit, spec.name))
        self._lock = threading.RLock()
        # Reentrant, for an event's listener may call shut_down() while it is under way.
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
        # Those of them, by their names on the platform, that other processes are adding or have left.
        self._others_unfinished: set[str] = set()
        self._dropped: list[BuiltPool] = []
        self._pools_counted = 0
        self._assembly: Assembly | None = None
        self._journal: Journal | None = None
        self._created: datetime | None = None
        self._lifetime_ends: datetime | None = None
        self._targets: Targets | None = None
        self._failure: str | None = None
        # Whether another process has built it, and is the one to say that it was not shut down.
        self._attached = False
        self._watch: HeadWatch[Any] | None = None
        self._reach: Reach | None = None
        self._detached = False

    @property
    def _life(self) -> str:
        """Where the cluster is in its life, for messages."""
        if self._failure is None or self._phase in (Phase.NEW, Phase.RUNNING):
            return self._phase.value
        return f"{self._phase.value}, because {self._failure_line}"

    @property
    def _failure_line(self) -> str | None:
        """Why the cluster has ended by itself, without the output of its tasks, which may hold anything."""
        return None if self._failure is None else self._failure.splitlines()[0]

    def _running(self, otherwise: str) -> Assembly:
        """Return the running cluster.

        :raises ClusterStateError: where it is not running.
        """
        if self._phase is not Phase.RUNNING or self._assembly is None:
            raise ClusterStateError(f"{otherwise}: the cluster is {self._life}")
        return self._assembly

    @property
    def _workers(self) -> list[BuiltPool]:
        """All worker pools of which there may be something on the platform."""
        return [*self._pools.values(), *self._unfinished.values()]

    def _find_pool(self, name: str) -> BuiltPool:
        pool = self._pools.get(name) or self._unfinished.get(name)
        if pool is None:
            known = ", ".join(repr(known) for known in self._pools) or "none"
            raise ClusterStateError(f"this cluster has no worker pool {name!r}; it has: {known}")
        return pool

    def _synchronise(self) -> None:
        """Take over what other processes have done to the running cluster, from the state file."""
        with self._lock:
            journal, built = self._journal, self._assembly
            if journal is None or built is None or self._phase in (Phase.NEW, Phase.BUILDING, Phase.ENDED):
                return
            state = journal.refresh()
            if self._phase is Phase.PARTIAL and state.status == "running":
                # The process that was building it has come to its end.
                self._phase = Phase.RUNNING
                built.work_requirement_id = state.work_requirement_id
                for special in built.pools([]):
                    there = state.pool(special.plan.name)
                    if there is not None:
                        special.take(there)
            self._pools_counted = max(self._pools_counted, state.worker_pools_counted)
            present = {pool.name: pool for pool in state.pools}
            for name, pool in list(self._pools.items()):
                if pool.plan.name not in present:
                    # Another process has removed it. At the end it is looked at once more.
                    self._dropped.append(self._pools.pop(name))
                else:
                    pool.take(present.pop(pool.plan.name))
            # What others were adding may be complete by now, or gone.
            for name, pool in list(self._unfinished.items()):
                if pool.plan.name in self._others_unfinished:
                    del self._unfinished[name]
            self._others_unfinished.clear()
            mine = {pool.plan.name for pool in self._unfinished.values()}
            for there in present.values():
                if there.role == "worker" and there.name not in mine:
                    built.made.sent.add(there.name)
                    complete = there.id is not None and there.group_id is not None
                    pools = self._pools if complete else self._unfinished
                    if not complete:
                        self._others_unfinished.add(there.name)
                    pools[there.internal_name] = BuiltPool.of(there)

    def _ray_token(self) -> str | None:
        """Tell the cluster's Ray token: of one that another process has built, from the file of the token.

        Where that is not on this machine, the platform tells it in the environment of the head's task.

        :raises StateError: where the file may not be used.
        :raises ClusterStateError: where there is no file, and the platform does not tell it either.
        """
        if self._token is None and self._spec.ray_auth == "token":
            self._token = self._token_from_file() or self._token_from_head()
        return self._token

    def _token_from_file(self) -> str | None:
        file = None if self._journal is None else self._journal.state.ray_token_file
        if file is None:
            return None
        try:
            return read_token(file)
        except FileNotFoundError:
            log.info("The file of the Ray token %s is not on this machine; the platform is asked", file)
            return None

    def _token_from_head(self) -> str | None:
        built = self._assembly
        if built is None:
            return None
        token = None
        if built.head.task_id is not None:
            task = self._platform.task(built.head.task_id, Operation(30.0))
            token = (task.environment or {}).get("RAY_AUTH_TOKEN")
        if token is None:
            raise ClusterStateError(
                "the cluster's Ray token is not known here: its file is not on this machine, and the "
                "platform does not tell the environment of the head's task. Attach on the machine that built "
                "the cluster, or copy the file that its state names as ray_token_file"
            )
        return token

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

    def _forget_token(self) -> None:
        if self._token is None:
            return
        try:
            ray_auth.deactivate(self._token)
        except Exception as error:
            # Nothing that Ray does may keep a cluster from being ended.
            log.warning("The cluster's Ray token could not be taken out of this process: %s", error)

    def _close_connections(self) -> None:
        """Close the connections to the platform and the nodes. They come back when they are next needed."""
        self._close_reach()
        self._platform.close()

    def _close_reach(self) -> None:
        with self._lock:
            reach, self._reach = self._reach, None
        if reach is not None:
            reach.close()

    def _close_display(self) -> None:
        """End what has no event of its own that ends it."""
        if self._display is not None:
            self._display.close()
