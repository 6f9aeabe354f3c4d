"""Ending a cluster, and saying what is left where that fails."""

from __future__ import annotations

import logging
from dataclasses import replace

from yellowdog_ray.errors import (
    ClusterStateError,
    TeardownError,
)
from yellowdog_ray.raydog import events
from yellowdog_ray.raydog.assembly import Assembly
from yellowdog_ray.raydog.core import Phase
from yellowdog_ray.raydog.members import ClusterMembers
from yellowdog_ray.raydog.pools import named_pools
from yellowdog_ray.raydog.teardown import tear_down
from yellowdog_ray.raydog.transport import Operation, nobody_listens

__all__ = ["ClusterEnding"]

log = logging.getLogger(__name__)


class ClusterEnding(ClusterMembers):
    """The part of a cluster that ends it."""

    def shut_down(self) -> None:
        """End the cluster: abort its tasks, shut its pools down and terminate its nodes, and verify it.

        What is already gone is no error, and a second call does nothing. Where something could not be
        ended, everything else is ended nevertheless, and another call goes on with what is left.

        A signal handler should not call it, for the call that it interrupts may hold what this one needs. Let
        it raise (``signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))``), and a ``with`` block end the
        cluster.

        :raises TeardownError: where something may still be running; its ``still_running`` lists it.
        :raises ClusterStateError: while another thread builds the cluster.
        """
        with self._lock:
            if self._phase in (Phase.NEW, Phase.ENDED):
                return
            if self._being_built():
                raise ClusterStateError("the cluster is being built by another thread; interrupt that one")
            self._phase = Phase.ENDING
        try:
            with self._ending:
                if self._phase is not Phase.ENDED:
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
            self._close_display()

    def _end(self) -> None:
        operation = Operation()
        built = self._assembly
        if self._watch is not None:
            self._watch.stop()
        if built is not None and nobody_listens(self._credentials.api_url):
            self._end_with_local_platform(built)
            return
        if self._targets is None and built is not None:
            if self._journal is not None:
                # Other processes add nothing more then; what they have named up to here is ended too.
                self._journal.note(lambda state: state.but(status="ending", failure=self._failure_line))
            built.settle()
            self._synchronise()
            with self._lock:
                workers = self._workers
            self._keep(named_pools(built.pools(workers)))
            self._targets = built.targets([*workers, *self._dropped])
        if self._targets is not None and built is not None:
            self._emit(events.ShutdownStarted(self._spec.name, tuple(self._targets.items)))
            before = replace(self._targets, pools=list(self._targets.pools))
            try:
                known = tear_down(self._platform, self._targets)
                if before.told and not known:
                    self._targets = before
                    raise TeardownError(
                        f"{self._platform.host} knows nothing of the cluster any more, so that nothing was "
                        "ended. May this application key still see its namespace? May still be running: "
                        f"{before}",
                        before.items,
                    )
            finally:
                self._note_ended(built, self._targets)
        self._note_all_ended()
        self._emit(events.ShutdownFinished(self._spec.name, operation.elapsed))

    def _end_with_local_platform(self, built: Assembly) -> None:
        """Take a cluster for ended whose local platform has ended; or raise where that did not say so."""
        if self._journal is not None and self._journal.path.exists():
            left = [pool.plan.name for pool in built.pools(self._workers)]
            raise TeardownError(
                f"nobody listens at {self._credentials.api_url}. A local platform that has ended has ended "
                f"its nodes too: then remove {self._journal.path}. "
                f"Else may still be running: {', '.join(left)}",
                left,
            )
        log.warning("The cluster %s has ended with its local platform", self._spec.name)
        self._note_all_ended()

    def _note_all_ended(self) -> None:
        """Forget what there was to end, and close the connections."""
        with self._lock:
            self._targets = None
            self._unfinished.clear()
            self._phase = Phase.ENDED
        self._close_connections()
