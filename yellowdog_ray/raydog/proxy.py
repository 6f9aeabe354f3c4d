"""RayDogClusterProxy: a cluster that another process has built, shut down from its saved state."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from yellowdog_ray.errors import ClusterStateError, StateError, TeardownError
from yellowdog_ray.raydog import events
from yellowdog_ray.raydog.journal import Journal, state_directory
from yellowdog_ray.raydog.platform import Platform
from yellowdog_ray.raydog.specs import (
    CREDENTIAL_PARAMETERS,
    DEFAULT_API_URL,
    Credentials,
    check_api_url,
    key_hint,
    make,
)
from yellowdog_ray.raydog.state import ClusterState
from yellowdog_ray.raydog.teardown import Targets, tear_down
from yellowdog_ray.raydog.transport import Operation, nobody_listens

__all__ = ["RayDogClusterProxy"]

log = logging.getLogger(__name__)

emit = events.Emitter()


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
        self._file: Path | None = None
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
        self._load(ClusterState.load(file_name), Path(file_name))

    def _load(self, state: ClusterState, file: Path | None = None) -> None:
        self._state, self._file = state, file
        self._targets = None

    def shut_down(self) -> None:
        """End the cluster, as :meth:`.RayDogCluster.shut_down` does.

        What is already gone is no error, and the call can be repeated. Where the cluster's own state file is
        on this machine, what it knows beyond the loaded state is ended too, and it is removed at the end. A
        file that was saved with :meth:`.RayDogCluster.save_state_to_json_file` is left alone.

        :raises ClusterStateError: where no state has been loaded.
        :raises StateError: where the platform knows nothing at all of what the state names.
        :raises TeardownError: where something may still be running; its ``still_running`` lists it.
        """
        if self._state is None:
            raise ClusterStateError("no saved state has been loaded into this proxy")
        credentials = self._credentials
        if not self._api_url and self._state.api_url:
            credentials = credentials.model_copy(update={"api_url": check_api_url(self._state.api_url)})
        _check_local(credentials.api_url, self._state)
        platform = Platform(credentials, self._say_retry)
        journal = _journal(self._state)
        title = self._state.cluster_name or self._state.title
        operation = Operation()
        targets = self._targets
        try:
            if journal is not None:
                # Whoever still builds it or adds to it stops then. What it has named up to here is in the
                # file now, and is ended too.
                journal.note(lambda state: state.but(status="ending"))
            if targets is None:
                targets = self._targets = _all_targets(self._state, journal)
            emit(events.ShutdownStarted(title, tuple(targets.items)))
            asked = bool(targets.items)
            known = tear_down(platform, targets)
        except TeardownError as error:
            emit(events.ShutdownFailed(title, str(error), tuple(error.still_running)))
            raise
        except BaseException:
            log.error(
                "The shutting down of the cluster %s was interrupted. May still be running: %s. Call "
                "shut_down() again, or `raydog shut-down` with its saved state",
                title,
                "all of it" if targets is None else targets,
            )
            raise
        finally:
            platform.close()
        if asked and not known:
            # Nothing has been ended, so that another call may not take it for done.
            self._targets = None
            self._check_nothing_known(self._state, credentials)
        if journal is not None:
            journal.remove()
        if self._file is not None and self._file.absolute().parent == state_directory().absolute():
            # A state directory that came from elsewhere: nobody saved it there on purpose.
            Journal(self._file.absolute(), self._state).remove()
        emit(events.ShutdownFinished(title, operation.elapsed))

    def _check_nothing_known(self, state: ClusterState, credentials: Credentials) -> None:
        """Raise where the platform knows nothing, and that need not mean that nothing is there."""
        nothing_told = not state.work_requirement_id and not state.worker_pool_ids
        if nothing_told and state.key_hint == key_hint(credentials):
            # The build died before the platform had told any id, and this is the key that it used.
            log.info("Nothing of the cluster %s had been created", state.title)
            return
        raise StateError(
            f"{credentials.host} knows nothing of the cluster {state.title} with this application key, so "
            "that nothing was ended. Check that the API URL is the right one, and that the key belongs to "
            "the account (and may see the namespace) that the cluster was built in. Where both are "
            "right, the cluster was ended long ago and YellowDog has forgotten it: remove its state file"
        )

    def _say_retry(self, what: str, reason: str) -> None:
        title = "" if self._state is None else self._state.title
        emit(events.CallRetried(title, what, reason))


def _check_local(api_url: str, state: ClusterState) -> None:
    """Raise at once where the state is that of a local platform that has ended."""
    if nobody_listens(api_url):
        raise StateError(
            f"nobody listens at {api_url}, where the cluster {state.title} was built. A local platform that "
            "has ended has ended its nodes too: then remove the state file"
        )


def _journal(state: ClusterState) -> Journal | None:
    """Find the cluster's own state file, where it is on this machine."""
    if state.state_file is None or state.build_id is None:
        return None
    try:
        journal = Journal.open(Path(state.state_file))
    except (OSError, StateError):
        return None
    return journal if journal.state.build_id == state.build_id else None


def _all_targets(state: ClusterState, journal: Journal | None) -> Targets:
    """List what the loaded state names, and what the cluster's own state file knows beyond that."""
    targets = Targets.of(state)
    if journal is not None:
        newer = Targets.of(journal.state)
        names = {pool.name for pool in newer.pools}
        newer.pools += [pool for pool in targets.pools if pool.name not in names]
        newer.work_requirement_id = newer.work_requirement_id or targets.work_requirement_id
        return newer
    return targets
