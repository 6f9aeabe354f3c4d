"""Noticing that the head of a running cluster has ended."""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable
from typing import Generic, TypeVar

from yellowdog_ray.errors import NotFoundError, RayDogError
from yellowdog_ray.raydog.platform import Platform, task_failure
from yellowdog_ray.raydog.pools import BuiltPool
from yellowdog_ray.raydog.transport import Operation

__all__ = ["HeadWatch"]

log = logging.getLogger(__name__)

_Cluster = TypeVar("_Cluster")

# How often the head's task is looked at.
SECONDS = 5.0
# How often in a row the platform has to say that it does not know the task, before that is believed.
_UNKNOWN = 6


class HeadWatch(Generic[_Cluster]):
    """A thread that looks at the head's task, and calls once when it has ended.

    It keeps no cluster alive: it ends with the cluster object, and with the process.

    :param cluster: whose head it is.
    :param ended: called in the thread with the cluster and the reason.
    """

    def __init__(
        self,
        cluster: _Cluster,
        platform: Platform,
        work_requirement_id: str,
        head: BuiltPool,
        ended: Callable[[_Cluster, str], None],
    ) -> None:
        self._cluster = weakref.ref(cluster)
        self._platform, self._head, self._ended = platform, head, ended
        self._work_requirement_id = work_requirement_id
        self._stopped = threading.Event()
        self._unknown = 0
        self._thread = threading.Thread(target=self._run, name="raydog-head-watch", daemon=True)

    def start(self) -> None:
        """Begin to look."""
        self._thread.start()

    def stop(self) -> None:
        """Look no more. A look that is under way is not waited for."""
        self._stopped.set()

    def _run(self) -> None:
        while not self._stopped.wait(SECONDS):
            if self._cluster() is None:
                return
            reason = self._reason()
            cluster = self._cluster()
            if reason is not None and cluster is not None and not self._stopped.is_set():
                try:
                    self._ended(cluster, reason)
                except Exception:
                    log.exception("What follows on the end of a cluster's head failed")
                return
            del cluster

    def _reason(self) -> str | None:
        """Tell why the head has ended; None where it has not, or where that cannot be told now."""
        try:
            task = self._platform.task(str(self._head.task_id), Operation(SECONDS))
        except NotFoundError:
            self._unknown += 1
            if self._unknown < _UNKNOWN or not self._requirement_is_known():
                return None
            return "the platform does not know its task any more"
        except RayDogError as error:
            self._unknown = 0
            log.info("The head's task could not be looked at: %s", error)
            return None
        self._unknown = 0
        if task.status is not None and task.status.finished:
            return str(task_failure(task, "the head node's task", self._head.private_ip))
        return None

    def _requirement_is_known(self) -> bool:
        """Tell whether the platform knows the work requirement of which it does not know the task.

        Where it knows neither, it is this key that may not see them any more, and not the head that is gone.
        """
        try:
            self._platform.work_requirement(self._work_requirement_id, Operation(SECONDS))
        except RayDogError as error:
            log.warning("The cluster cannot be looked at: %s", error)
            return False
        return True
