"""Ray clusters on YellowDog, built and taken down from a script or notebook.

:class:`RayDogCluster` is the imperative face: it says what happens, in order. What may be asked for is in
:mod:`.specs`, what is created in :mod:`.plan`, and who talks to YellowDog is :mod:`.platform`.
"""

from __future__ import annotations

import atexit
import logging
import os
import warnings
import weakref
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from types import TracebackType

from yellowdog_ray.errors import (
    SpecError,
    StateError,
    TeardownError,
)
from yellowdog_ray.raydog import events
from yellowdog_ray.raydog.assembly import Assembly
from yellowdog_ray.raydog.building import ClusterBuilding
from yellowdog_ray.raydog.core import Access, Phase
from yellowdog_ray.raydog.journal import Journal, default_path
from yellowdog_ray.raydog.parameters import cluster_spec
from yellowdog_ray.raydog.platform import Build
from yellowdog_ray.raydog.pools import BuiltPool
from yellowdog_ray.raydog.proxy import RayDogClusterProxy
from yellowdog_ray.raydog.specs import (
    CREDENTIAL_PARAMETERS,
    DEFAULT_API_URL,
    ClusterSpec,
    Credentials,
    NodeSpec,
    RayAuth,
    check_path,
    make,
)
from yellowdog_ray.raydog.state import ClusterState
from yellowdog_ray.raydog.token_file import new_token
from yellowdog_ray.raydog.undo import add_note

__all__ = ["RayDogCluster", "RayDogClusterProxy"]

log = logging.getLogger(__name__)

# The clusters of this process, as long as somebody holds them.
_clusters: weakref.WeakSet[RayDogCluster] = weakref.WeakSet()


@atexit.register
def _at_the_end() -> None:
    """Say of every cluster that goes on that it does: then nobody can use it any more."""
    for cluster in list(_clusters):
        cluster._say_unclosed()


class RayDogCluster(ClusterBuilding):
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
        process get in ``RAY_AUTH_TOKEN`` (see :meth:`use_ray_auth`), and other processes of this user from a
        file beside the state file; anyone who may read the cluster's tasks on YellowDog can read it there.
        ``"off"`` leaves Ray open to its network.
    :param state_file: where the cluster's state is kept from before anything is created until all of it has
        been verified as ended, so that it can be found whatever becomes of this process. By default a file of
        its own in the directory ``RAYDOG_STATE_DIR``, or in the user's state directory.
    :param access: how this process reaches the nodes: an :class:`.SSHAccess`; or ``"direct"`` where it can
        connect to their addresses itself. None where it need not; then Ray itself cannot be asked for its
        nodes, and the nodes' output not be fetched.
    :param keep_logs: a directory for the output of the nodes' tasks, which is fetched over SSH
        (``access``) before a pool is removed or the cluster shut down, into ``<cluster>/<pool>/<task>.log``
        there, which delays that by a minute at most; None to keep none.
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
        self._phase = Phase.NEW
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
            direct=access == "direct",
        )
        self._token = new_token() if ray_auth == "token" else None
        self._state_file = None if state_file is None else check_path(state_file, "state_file")
        if self._state_file is not None and not self._state_file.name:
            raise SpecError(f"state_file: {state_file!r} does not name a file")
        self._set_up(credentials, spec, access, keep_logs, on_event, progress)
        self._process = os.getpid()
        _clusters.add(self)

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
        by :meth:`status`. The cluster goes on when the object is left behind (:meth:`detach`), but a ``with``
        block shuts it down at its end, as always.

        :param state: the cluster's state file, or a file or :class:`.ClusterState` that was saved.
        :param yd_platform_api_url: None for the one in the state.
        :returns: the cluster. One that was built in part only can be looked at and shut down.
        :raises SpecError: where another argument cannot work.
        :raises StateError: where it is not the state of a cluster, or was written by the existing package,
            which keeps too little in it; :class:`RayDogClusterProxy` can shut such a cluster down.
        :raises OSError: where the file cannot be read.
        :raises PlatformError: where the platform cannot be asked.
        """
        journal = _journal_of(state)
        cluster = cls.__new__(cls)
        cluster._phase = Phase.NEW
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
        cluster._check_keep_logs()
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
            "building": Phase.PARTIAL,
            "running": Phase.RUNNING,
            "ending": Phase.ENDING,
        }[state.status]
        self._synchronise()
        for difference in self.status().drift:
            log.warning("The cluster %s: %s", state.title, difference)
        if self._phase is Phase.RUNNING:
            self._begin_watch()

    def __repr__(self) -> str:
        return f"<RayDogCluster {self._spec.namespace}/{self._spec.name}, {self._life}>"

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

    def detach(self) -> None:
        """Let the cluster be: close the connections to it, and look at its head no more.

        It goes on running. Any other call takes the connections up again, but for the watch over the head.
        """
        with self._lock:
            self._attached = self._detached = True
            if self._watch is not None:
                self._watch.stop()
        self._close_connections()
        self._close_display()

    def __del__(self) -> None:
        if self._say_unclosed():
            warnings.warn(f"{self!r} was not shut down", ResourceWarning, source=self, stacklevel=2)

    def _say_unclosed(self) -> bool:
        """Say that the cluster goes on although nobody can use the object any more, unless that is meant.

        :returns: whether it was to be said.
        """
        phase = getattr(self, "_phase", Phase.NEW)
        # A process that was forked has a copy of what is not its own.
        if phase in (Phase.NEW, Phase.ENDED) or self._attached or self._process != os.getpid():
            return False
        self._attached = True  # once is enough
        journal = self._journal
        # Where the file is gone, somebody else has ended the cluster.
        if journal is not None and journal.path.exists():
            # Python shows a ResourceWarning to nobody who has not asked for it.
            log.warning(
                "%r was not shut down, and may go on. To end it: raydog shut-down %s", self, journal.path
            )
        return True


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
    # It is written when there is something new to keep.
    return Journal(usual.absolute(), given.but(state_file=str(usual.absolute())))
