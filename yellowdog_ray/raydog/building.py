"""Building a cluster, taking a failed build back, and noticing that its head has ended."""

from __future__ import annotations

import logging
import threading
from datetime import timedelta
from typing import Literal

from yellowdog_ray.errors import (
    BuildError,
    BuildTimeoutError,
    ClusterStateError,
    RayDogError,
    SpecError,
    TunnelError,
    WaitTimeoutError,
)
from yellowdog_ray.raydog import events, plan
from yellowdog_ray.raydog.access import SSHAccess
from yellowdog_ray.raydog.assembly import Assembly
from yellowdog_ray.raydog.core import Phase
from yellowdog_ray.raydog.ending import ClusterEnding
from yellowdog_ray.raydog.pools import BuiltPool
from yellowdog_ray.raydog.preview import ClusterPlan, preview
from yellowdog_ray.raydog.scripts import get_script
from yellowdog_ray.raydog.specs import (
    check_duration,
)
from yellowdog_ray.raydog.transport import Operation
from yellowdog_ray.raydog.undo import take_back
from yellowdog_ray.raydog.waiting import wait_for_ray
from yellowdog_ray.raydog.watch import HeadWatch

__all__ = ["ClusterBuilding"]

log = logging.getLogger(__name__)


class ClusterBuilding(ClusterEnding):
    """The part of a cluster that is built."""

    def plan(self, head_node_build_timeout: timedelta | None = None) -> ClusterPlan:
        """Tell what :meth:`build` will create, without any call: printable, and as JSON.

        The application key's secret and the Ray token are masked, and so are the values of tags that are
        called like a secret (``token``, ``db-passwd``, ``apikey``). Scripts and user data are shown as they
        are: a secret that you have written into one is in the plan. What is not known yet is said in words.

        :param head_node_build_timeout: as it will be given to :meth:`build`.
        :raises ClusterStateError: where the cluster is built already.
        """
        timeout = check_duration(head_node_build_timeout, "head_node_build_timeout")
        with self._lock:
            built = self._assemble(timeout)
            pools = built.pools(self._pools.values())
        return preview(
            self._spec,
            [pool.plan for pool in pools],
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
            most. Taking back what had been created comes on top: some seconds, where the platform answers.
        :param until: ``"ray"`` to return only when Ray on the head answers that it is healthy, some seconds
            later; the cluster needs an ``access`` for it.
        :returns: the private and the public address of the head node, the latter None where it has none.
        :raises SpecError: where the timeout is none, or nothing can be written to ``keep_logs``; with
            ``until="ray"`` also where there is no access, or its key file is of no use.
        :raises StateError: where the state file cannot be written.
        :raises ClusterStateError: where the cluster is built already.
        :raises CredentialsError: where the platform does not accept the key.
        :raises NotFoundError: where the platform does not know a template.
        :raises NameTakenError: where there is something else under one of the cluster's names.
        :raises BuildError: where the head cannot come up, with the reason; with ``until="ray"`` also where
            its host key is not the expected one, or the user has not been let in for a minute.
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
        if until == "ray" and isinstance(self._access, SSHAccess):
            self._access.check_key_file()
        self._check_not_built()
        self._check_keep_logs()
        with self._building:
            built = self._assemble(timeout)
            operation = Operation((timeout or plan.MAX_BUILD).total_seconds())
            try:
                with self._lock:
                    self._builder = threading.current_thread()
                    self._phase = Phase.BUILDING
                    self._assembly, self._failure = built, None
                    workers = list(self._pools.values())
                self._open_journal(built, workers)
                built.build(workers, built.crew(operation))
                if until == "ray":
                    self._wait_for_ray(built, operation)
                with self._lock:
                    built.check_running()
                    self._note_running(built, workers)
                    self._phase = Phase.RUNNING
                self._begin_watch()
                try:
                    self.use_ray_auth()
                except Exception as error:
                    # The cluster is there, and its user has to get to know it.
                    log.warning("This process could not be given the cluster's Ray token: %s", error)
                private_ip, public_ip = str(built.head.private_ip), built.head.public_ip
                self._emit(events.BuildFinished(self._spec.name, operation.elapsed, private_ip, public_ip))
                return private_ip, public_ip
            except BaseException as error:
                if self._watch is not None:
                    self._watch.stop()
                self._close_reach()
                self._take_back(built, error)
                self._forget_token()
                raise
            finally:
                self._close_display()

    def _wait_for_ray(self, built: Assembly, operation: Operation) -> None:
        def say(seconds: float) -> None:
            built.check_running()
            self._emit(events.Waiting(self._spec.name, "Ray on the head to answer", seconds))

        self._close_reach()  # another thread's, of which the addresses may not have been known
        with self._lock:
            # It is kept: what comes after goes to the address that has answered.
            reach = self._reach = self._new_reach(built)
        try:
            wait_for_ray(self._platform, built.head, reach, operation, say)
        except WaitTimeoutError as error:
            raise BuildTimeoutError(str(error)) from error
        except TunnelError as error:
            raise BuildError(f"The head cannot be asked whether Ray is well: {error}") from error
        except ClusterStateError:
            built.check_running()  # a signal handler that has shut the cluster down has closed the way too
            raise

    def _synchronise(self) -> None:
        with self._lock:
            before = self._phase
            super()._synchronise()
            if before is Phase.PARTIAL and self._phase is Phase.RUNNING and not self._detached:
                self._begin_watch()

    def _begin_watch(self) -> None:
        if self._watch is not None:
            self._watch.stop()
        if self._assembly is not None:
            built = self._assembly
            self._watch = HeadWatch(
                self,
                self._platform,
                str(built.work_requirement_id),
                built.head,
                ClusterBuilding._head_ended,
            )
            self._watch.start()

    def _head_ended(self, reason: str) -> None:
        """End the cluster, for its head has ended and it cannot come back."""
        with self._lock:
            if self._phase is not Phase.RUNNING:
                return
            self._phase = Phase.ENDING
            reason = self._why_ended(reason)
            self._failure = reason
        self._emit(events.HeadFailed(self._spec.name, reason))
        try:
            self.shut_down()
        except RayDogError as error:
            log.error("The cluster %s could not all be shut down: %s", self._spec.name, error)

    def _why_ended(self, reason: str) -> str:
        """Tell why a head has ended: by itself, or because another process is ending the cluster."""
        journal = self._journal
        if journal is not None:
            state = journal.refresh()
            if state.status == "ending":
                return state.failure or "another process has shut it down"
            # Nobody removes the file of a living cluster, and a task that was ended has no exit code.
            if not journal.path.exists() and "with exit code" not in reason:
                return "another process has shut it down"
        return f"its head has ended: {reason}"

    def _check_not_built(self) -> None:
        if self._phase is not Phase.NEW:
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
            if self._phase in (Phase.BUILDING, Phase.RUNNING):
                self._phase = Phase.ENDING
            # Not where a signal handler has shut the cluster down in between.
            ours = self._phase is Phase.ENDING
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
                self._phase = Phase.NEW
            elif ours:
                self._targets = targets
        self._note_ended(built, targets)
        if gone:
            self._platform.close(wait=bool(built.made.sent))
        self._emit(events.BuildFailed(self._spec.name, reason, tuple(targets.items)))
