"""RayDogClusterProxy: a cluster that another process has built, shut down from its saved state."""

from __future__ import annotations

import logging
import os

from yellowdog_ray.errors import ClusterStateError, StateError, TeardownError
from yellowdog_ray.raydog.platform import Build, Platform
from yellowdog_ray.raydog.specs import (
    CREDENTIAL_PARAMETERS,
    DEFAULT_API_URL,
    Credentials,
    check_api_url,
    make,
)
from yellowdog_ray.raydog.state import ClusterState
from yellowdog_ray.raydog.teardown import PoolTarget, Targets, tear_down

__all__ = ["RayDogClusterProxy"]

log = logging.getLogger(__name__)


class RayDogClusterProxy:
    """A cluster that another process has built, known by its saved state: it can be shut down.

    Making the object does no I/O.

    :param yd_application_key_id: the id of a YellowDog application key.
    :param yd_application_key_secret: its secret.
    :param yd_platform_api_url: None for the one in the saved state, or else the usual one.
    :raises SpecError: where anything of this cannot work.
    """

    def __init__(
        self,
        yd_application_key_id: str,
        yd_application_key_secret: str,
        yd_platform_api_url: str | None = None,
    ) -> None:
        self._api_url = yd_platform_api_url
        self._credentials = make(
            Credentials,
            CREDENTIAL_PARAMETERS,
            key_id=yd_application_key_id,
            key_secret=yd_application_key_secret,
            api_url=DEFAULT_API_URL if yd_platform_api_url in (None, "") else yd_platform_api_url,
        )
        self._state: ClusterState | None = None
        self._targets: Targets | None = None

    def __repr__(self) -> str:
        name = self._state.cluster_name if self._state is not None else "nothing loaded"
        return f"<RayDogClusterProxy, {name}>"

    def load_saved_state_from_json(self, cluster_state: str) -> None:
        """Load a state that :meth:`.RayDogCluster.save_state_to_json` wrote, or the existing package's.

        :raises StateError: where it is not the saved state of a cluster.
        """
        self._load(ClusterState.from_json(cluster_state))

    def load_saved_state_from_json_file(self, file_name: str | os.PathLike[str]) -> None:
        """Load a state file; see :meth:`load_saved_state_from_json`.

        :raises StateError: where it is not the saved state of a cluster.
        :raises OSError: where it cannot be read.
        """
        self._load(ClusterState.load(file_name))

    def _load(self, state: ClusterState) -> None:
        self._state = state
        self._targets = _targets(state)

    def shut_down(self) -> None:
        """End the cluster, as :meth:`.RayDogCluster.shut_down` does.

        What is already gone is no error, and the call can be repeated.

        :raises ClusterStateError: where no state has been loaded.
        :raises StateError: where the platform knows nothing at all of what the state names.
        :raises TeardownError: where something may still be running; its ``still_running`` lists it.
        """
        if self._state is None or self._targets is None:
            raise ClusterStateError("no saved state has been loaded into this proxy")
        credentials = self._credentials
        if not self._api_url and self._state.api_url:
            credentials = credentials.model_copy(update={"api_url": check_api_url(self._state.api_url)})
        platform = Platform(credentials)
        name = self._state.cluster_name or "in the saved state"
        asked = len(self._targets.pools) + (self._targets.work_requirement_id is not None)
        try:
            known = tear_down(platform, self._targets)
        except TeardownError:
            raise
        except BaseException:
            log.error(
                "The shutting down of the cluster %s was interrupted. May still be running: %s. Call "
                "shut_down() again, or `raydog shut-down` with its saved state",
                name,
                self._targets,
            )
            raise
        finally:
            platform.close()
        if asked and not known:
            # Nothing has been ended, so that another call may not take it for done.
            self._targets = _targets(self._state)
            raise StateError(
                f"{platform.host} knows nothing of the cluster {name} with this application key, so that "
                "nothing was ended. Check that the API URL is the right one, and that the key belongs to "
                "the account (and may see the namespace) that the cluster was built in. Where both are "
                "right, the cluster was ended long ago and YellowDog has forgotten it"
            )


def _targets(state: ClusterState) -> Targets:
    """List everything that a state names, by name and id where it has both."""
    named = {pool.id for pool in state.pools}
    pools = [PoolTarget(pool.name, pool.id, pool.compute_requirement_id) for pool in state.pools]
    pools += [PoolTarget(id=pool_id) for pool_id in state.worker_pool_ids if pool_id not in named]
    targets = Targets(work_requirement_id=state.work_requirement_id, pools=pools)
    if state.build_id is not None:
        targets.build = Build(state.build_id)
        if state.work_requirement_id is None:
            # It was asked for, perhaps, and never answered.
            targets.work_requirement_name = state.cluster_name
    if state.pools:
        targets.namespace = state.cluster_namespace
    return targets
