"""Waiting for a cluster's workers, for as long as they can still come."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Literal

from yellowdog_ray.errors import NotFoundError, PlatformError, RayDogError, TunnelError, WaitTimeoutError
from yellowdog_ray.raydog import events
from yellowdog_ray.raydog.platform import Platform, task_failure
from yellowdog_ray.raydog.pools import BuiltPool, count_tasks
from yellowdog_ray.raydog.transport import Operation, Pause

if TYPE_CHECKING:
    from yellowdog_client.model import WorkRequirement

    from yellowdog_ray.raydog.reach import RayNode, Reach

__all__ = ["Wait", "WorkerCount", "wait_for_ray"]

log = logging.getLogger(__name__)

_LOOK_FOR_REASONS = 1.0
# For how long Ray on the head may give no answer, with all tasks executing, before the tasks are what counts.
_RAY_PATIENCE = 120.0
# After which time without an answer that is said, while it is waited on: the head may just not be up yet.
_SAY_SILENCE = 10.0
# How long an answer may take at least, however little time is left.
_SHORTEST_ASK = 1.0
# Ray lists a node that is gone without a word as alive for 30 s. Those that it lists for longer are there.
_STALE = 45.0

Source = Literal["ray", "tasks"]


class WorkerCount(int):
    """A number of workers, and who counted them.

    ``source`` is ``"ray"`` for nodes that Ray itself reports alive, and ``"tasks"`` for worker tasks that
    execute on the platform.
    """

    source: Source

    def __new__(cls, count: int, source: Source) -> WorkerCount:
        self = super().__new__(cls, count)
        self.source = source
        return self

    def __getnewargs__(self) -> tuple[int, Source]:  # type: ignore[override]
        return int(self), self.source


@dataclass
class _Tally:
    """How many workers there are, and how many can still come.

    :param failed: pools of which a worker's task has ended.
    :param missing: pools of which a worker's task does not execute yet, and how many those are.
    :param leaving: the ids of nodes of which the task is being aborted.
    """

    executing: int = 0
    coming: int = 0
    failed: list[BuiltPool] = field(default_factory=list)
    missing: list[tuple[BuiltPool, int]] = field(default_factory=list)
    leaving: set[str | None] = field(default_factory=set)


def _tally(
    platform: Platform, requirement: WorkRequirement, pools: Iterable[BuiltPool], operation: Operation
) -> _Tally:
    """Count the workers."""
    tally = _Tally()
    groups = {group.name: group for group in requirement.taskGroups or []}
    for pool in pools:
        counts = count_tasks(platform, pool, groups.get(pool.plan.group), operation)
        unfinished = pool.node_count if counts.unfinished is None else counts.unfinished
        coming = max(0, unfinished - counts.executing)
        tally.executing += counts.executing
        tally.coming += coming
        tally.leaving |= counts.leaving
        # Of a pool that was scaled down or up, tasks have ended that nobody misses.
        if counts.ended and unfinished < pool.node_count:
            tally.failed.append(pool)
        if coming:
            tally.missing.append((pool, coming))
    return tally


@dataclass
class Wait:
    """One wait for workers.

    :param work_requirement_id: the cluster's.
    :param count: how many there have to be.
    :param reach: the way to the head, by which Ray is asked; None where there is none.
    """

    platform: Platform
    cluster: str
    work_requirement_id: str
    head: BuiltPool
    pools: list[BuiltPool]
    count: int
    operation: Operation
    emit: events.Emitter
    reach: Reach | None = None
    _ray_silent_since: float | None = None
    _unanswered_since: float | None = None
    _unanswered: Exception | None = None
    _said_silence: bool = False
    _doubtful_since: float | None = None
    _addresses: tuple[object, set[str]] = ((), set())
    _said: tuple[int, Source] | None = None

    def run(self) -> WorkerCount:
        """Wait until there are so many workers.

        :returns: how many there are, and who counted them.
        :raises WaitTimeoutError: where they have not come in time, or cannot come any more.
        """
        pause = Pause(self.operation)
        next_reasons = _LOOK_FOR_REASONS
        while True:
            requirement = self.platform.work_requirement(self.work_requirement_id, self.operation)
            tally = _tally(self.platform, requirement, self.pools, self.operation)
            have = self._count(tally)
            if self._said != (have, have.source):
                self._said = (int(have), have.source)
                self.emit(events.WorkersCounted(self.cluster, int(have), self.count, have.source))
            if have >= self.count:
                return have
            unit = "workers are alive in Ray" if have.source == "ray" else "workers are executing"
            there = f"{have} of {self.count} {unit} after {self.operation.elapsed:.1f} s"
            if self._unanswered is not None and have.source == "ray":
                there = (
                    f"{tally.executing} of {self.count} workers are executing after "
                    f"{self.operation.elapsed:.1f} s, and Ray on the head cannot be asked which of them have "
                    f"joined it ({str(self._unanswered).rstrip('.')})"
                )
            over = requirement.status is not None and requirement.status.finished
            if over or tally.executing + tally.coming < self.count:
                reasons = self._failures(tally.failed) or [f"the work requirement is {requirement.status}"]
                raise WaitTimeoutError(f"{there}, and no more can come: {'; '.join(reasons)}")
            if self.operation.elapsed >= next_reasons:
                next_reasons = self.operation.elapsed + max(_LOOK_FOR_REASONS, self.operation.elapsed / 4)
                self._check_reasons(tally, there)
            if self.operation.expired:
                waiting = ", ".join(pool.plan.internal_name for pool, _ in tally.missing)
                if waiting:
                    raise WaitTimeoutError(f"{there}; still waiting for workers of {waiting}")
                if self._unanswered is not None:
                    raise WaitTimeoutError(there)
                raise WaitTimeoutError(
                    f"{there}; all tasks are executing, and Ray on some has not joined the head: "
                    "get_logs() shows what they print"
                )
            pause.sleep()

    def _count(self, tally: _Tally) -> WorkerCount:
        if self.reach is None:
            return WorkerCount(tally.executing, "tasks")
        try:
            nodes = self._ask(self.reach)
        except (RayDogError, OSError, FutureTimeoutError) as error:  # an OSError from Python 3.11 on
            elapsed = self.operation.elapsed
            self._note_unanswered(error)
            if tally.executing < self.count:
                self._ray_silent_since = None
            elif self._ray_silent_since is None:
                self._ray_silent_since = elapsed
            elif elapsed - self._ray_silent_since > _RAY_PATIENCE:
                log.warning("Ray on the head cannot be asked, so that the tasks are counted: %s", error)
                return WorkerCount(tally.executing, "tasks")
            return WorkerCount(0, "ray")
        self._ray_silent_since = self._unanswered_since = self._unanswered = None
        return WorkerCount(
            self._joined([node for node in nodes if node.alive and not node.is_head], tally), "ray"
        )

    def _ask(self, reach: Reach) -> list[RayNode]:
        """Ask Ray for its nodes. An answer that comes when the time is over is not waited for."""
        left = self.operation.remaining
        if left is None:
            return reach.ray_nodes()
        answer: Future[list[RayNode]] = Future()

        def ask() -> None:
            try:
                answer.set_result(reach.ray_nodes())
            except BaseException as error:
                answer.set_exception(error)

        threading.Thread(target=ask, name="raydog-ask-ray", daemon=True).start()
        seconds = max(left, _SHORTEST_ASK)
        try:
            return answer.result(seconds)
        except FutureTimeoutError:
            if answer.done():  # at the last moment; or the answer is an error of this kind
                return answer.result()
            raise TunnelError(f"The head has not answered within {seconds:.1f} s") from None

    def _note_unanswered(self, error: Exception) -> None:
        elapsed = self.operation.elapsed
        if self._unanswered_since is None:
            self._unanswered_since = elapsed
        # That the time was over says less than what was said before.
        if self._unanswered is None or not self.operation.expired:
            self._unanswered = error
        if elapsed - self._unanswered_since >= _SAY_SILENCE and not self._said_silence:
            self._said_silence = True
            log.warning("Ray on the head cannot be asked for its workers yet: %s", error)

    def _joined(self, alive: Sequence[RayNode], tally: _Tally) -> int:
        """Count the Ray nodes that are workers of these pools, and not of a machine that is gone."""
        count = min(len(alive), tally.executing)
        if not count or count < self.count:
            self._doubtful_since = None
            return count
        addresses = self._living_addresses(tally, alive)
        known = min(tally.executing, len(addresses & {node.address for node in alive}))
        if known >= self.count:
            return known
        # Ray on a machine with several addresses may have chosen another one than the platform tells.
        elapsed = self.operation.elapsed
        if self._doubtful_since is None:
            self._doubtful_since = elapsed
        return known if elapsed - self._doubtful_since < _STALE else count

    def _living_addresses(self, tally: _Tally, alive: Sequence[RayNode]) -> set[str]:
        """List the addresses of the pools' nodes that live and stay; anew when something has changed."""
        known = (tally.executing, tally.leaving, {node.node_id for node in alive})
        if self._addresses[0] != known:
            listing = [
                self.platform.submit(partial(self.platform.nodes, str(pool.id), self.operation))
                for pool in self.pools
            ]
            found = {
                node.details.privateIpAddress
                for future in listing
                for node in future.result()
                if node.details is not None and (node.status is None or node.status.active)
                if node.id not in tally.leaving
            }
            self._addresses = known, {address for address in found if address}
        return self._addresses[1]

    def _check_reasons(self, tally: _Tally, there: str) -> None:
        self._check_head(there)
        reasons = []
        for pool, coming in tally.missing:
            reason = self.platform.why_no_nodes(str(pool.id), pool.plan.name, self.operation)
            if reason is not None:
                reasons.append(reason)
                tally.coming -= coming
        if tally.executing + tally.coming < self.count:
            raise WaitTimeoutError(f"{there}, and no more can come: {'; '.join(reasons)}")
        names = ", ".join(pool.plan.internal_name for pool, _ in tally.missing)
        self.emit(
            events.Waiting(
                self.cluster, f"workers of {names}" if names else "Ray on the workers", self.operation.elapsed
            )
        )

    def _check_head(self, there: str) -> None:
        try:
            task = self.platform.task(str(self.head.task_id), self.operation)
        except NotFoundError:
            raise WaitTimeoutError(f"{there}, and no more can come: the head node's task is gone") from None
        if task.status is not None and task.status.finished:
            reason = task_failure(task, "the head node's task", self.head.private_ip)
            raise WaitTimeoutError(f"{there}, and no more can come: {reason}")

    def _failures(self, pools: Iterable[BuiltPool]) -> list[str]:
        """Tell, for each pool of which a worker has ended, how the first one did."""
        operation = Operation(10.0)
        reasons = []
        for pool in pools:
            tasks = self.platform.tasks(str(pool.group_id), operation)
            ended = [task for task in tasks if task.status is not None and task.status.finished]
            if ended:
                rest = len(ended) - 1
                more = f" (and {rest} more of {pool.plan.internal_name})" if rest else ""
                reasons.append(f"{task_failure(ended[0], 'the worker task', None)}{more}")
        return reasons


def wait_for_ray(
    platform: Platform, head: BuiltPool, reach: Reach, operation: Operation, emit: Callable[[float], None]
) -> None:
    """Wait until Ray on the head answers that it is healthy.

    :param emit: called now and then with the seconds that it has been waited for.
    :raises WaitTimeoutError: where its task ends, or the time is over.
    :raises TunnelError: where the head cannot be logged in to, and waiting does not help.
    """
    pause = Pause(operation)
    next_look = _LOOK_FOR_REASONS
    while (answer := reach.health()) is not None:
        if operation.elapsed >= next_look or operation.expired:
            next_look = operation.elapsed + _LOOK_FOR_REASONS
            emit(operation.elapsed)
            _check_task(platform, head)
        if operation.expired:
            raise WaitTimeoutError(
                f"Ray on the head did not answer after {operation.elapsed:.1f} s: {answer}"
            )
        pause.sleep()


def _check_task(platform: Platform, head: BuiltPool) -> None:
    """Raise where the head's task has ended. Where the platform cannot be asked, that is not known now."""
    try:
        task = platform.task(str(head.task_id), Operation(10.0))
    except PlatformError as error:
        log.info("The head's task could not be looked at: %s", error)
        return
    if task.status is not None and task.status.finished:
        raise task_failure(task, "the head node's task", head.private_ip)
