"""Ending what a cluster has on the platform: a list of steps, each on its own, and then verified.

"Already gone" is success. What cannot be ended or verified is collected and raised once, at the end.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Literal

from yellowdog_ray.errors import CredentialsError, NotFoundError, RayDogError, TeardownError
from yellowdog_ray.raydog.platform import (
    Build,
    Platform,
    is_our_compute,
    is_our_work_requirement,
)
from yellowdog_ray.raydog.state import ClusterState
from yellowdog_ray.raydog.transport import Operation, Pause, already_gone

if TYPE_CHECKING:
    from yellowdog_client.model import ComputeRequirement, ComputeRequirementStatus, WorkerPoolStatus

__all__ = ["VERIFY_SECONDS", "PoolTarget", "Targets", "tear_down"]

log = logging.getLogger(__name__)

# How long calls that fail are tried again, all of them together.
STEP_SECONDS = 90.0
# How long the platform then gets to report everything as ended.
VERIFY_SECONDS = 180.0
# How long something may still come into being that was asked for in vain: a gateway gives an answer up, and
# the platform goes on; or the process that asked for it died.
LATE_SECONDS = 5.0
# How long the platform has to say that a thing is unknown, before that is believed.
_CONFIRM_SECONDS = 2.0
# From so many pools on, all of them are looked at by two lists rather than one by one.
_LIST_FROM = 3


@dataclass
class PoolTarget:
    """A pool that is to end, known by its id, by its name, or both.

    What is found by its name is ended only where the targets' build has created it.
    """

    name: str | None = None
    id: str | None = None
    compute_requirement_id: str | None = None

    def __str__(self) -> str:
        return " ".join(part for part in ("worker pool", self.name, self.id) if part)


@dataclass
class Targets:
    """Everything that is to end. What has been verified as ended is taken off the lists.

    :param build: by which what is found by a name is recognised; None where the names are trusted.
    :param late_seconds: for how long what has no id yet may still come into being, at least.
    :param prefix: what the names of all pools have in common, so that they can be listed.
    """

    namespace: str | None = None
    work_requirement_id: str | None = None
    work_requirement_name: str | None = None
    build: Build | None = None
    pools: list[PoolTarget] = field(default_factory=list)
    late_seconds: float = field(default_factory=lambda: LATE_SECONDS)
    prefix: str | None = None

    @classmethod
    def of(cls, state: ClusterState) -> Targets:
        """List everything that a state names, by name and id where it has both."""
        named = {pool.id for pool in state.pools}
        pools = [PoolTarget(pool.name, pool.id, pool.compute_requirement_id) for pool in state.pools]
        pools += [PoolTarget(id=pool_id) for pool_id in state.worker_pool_ids if pool_id not in named]
        targets = cls(work_requirement_id=state.work_requirement_id, pools=pools)
        if state.build_id is not None:
            targets.build = Build(state.build_id)
            # It was asked for, perhaps, and never answered.
            targets.work_requirement_name = state.cluster_name
        if state.pools or state.build_id is not None:
            targets.namespace, targets.prefix = state.cluster_namespace, state.cluster_name
        return targets

    @property
    def work_requirement(self) -> str | None:
        """What the work requirement is called in messages; None where there is none to end."""
        known = [part for part in (self.work_requirement_name, self.work_requirement_id) if part]
        return " ".join(["work requirement", *known]) if known else None

    @property
    def told(self) -> bool:
        """Whether the platform has told the id of any of it, so that it must know it."""
        return self.work_requirement_id is not None or any(pool.id is not None for pool in self.pools)

    @property
    def items(self) -> list[str]:
        """What is to end, as messages call it."""
        names = [str(pool) for pool in self.pools]
        return [self.work_requirement, *names] if self.work_requirement else names

    def __str__(self) -> str:
        return ", ".join(self.items)


@dataclass
class _Books:
    """What the platform's lists say, by id."""

    pools: dict[str, WorkerPoolStatus | None] = field(default_factory=dict)
    compute: dict[str, ComputeRequirementStatus | None] = field(default_factory=dict)


@dataclass
class _Teardown:
    """What all steps of one teardown share."""

    platform: Platform
    targets: Targets
    until: Literal["terminated", "terminating"]
    operation: Operation
    began: float = field(default_factory=time.monotonic)

    @property
    def may_come_late(self) -> bool:
        build = self.targets.build
        until = max(self.began + self.targets.late_seconds, 0.0 if build is None else build.late_until)
        return time.monotonic() < until


class _Item:
    """One thing that is to end, and how far it is."""

    def __init__(self, what: str, teardown: _Teardown) -> None:
        self.what = what
        self.teardown = teardown
        self.platform = teardown.platform
        self.failures: list[str] = []
        self._failed: RayDogError | None = None
        #: Whether the platform knows it, or knew it.
        self.known = False
        #: Whether asking again is in vain.
        self.hopeless = False
        self._unknown_since: float | None = None

    def steps(self, operation: Operation) -> list[Callable[[], object]]:
        """List the calls that ask the platform to end it, which may be made at once."""
        raise NotImplementedError

    def identify(self, operation: Operation) -> bool:
        """Find the ids that are not known yet; return whether any has been found."""
        raise NotImplementedError

    def state(self, books: _Books, operation: Operation, last: bool) -> tuple[str | None, bool]:
        """Tell why it has not ended yet (None where it has), and whether it is on its way.

        :raises NotFoundError: where the platform does not know it.
        """
        raise NotImplementedError

    @property
    def identified(self) -> bool:
        raise NotImplementedError

    def attempt(self, action: Callable[[], object]) -> None:
        """Make a step; keep in mind that it failed, unless the thing is gone already."""
        try:
            action()
        except RayDogError as error:
            if not already_gone(error):
                log.warning("%s", error)
                self.failures.append(str(error))
                self._failed = error

    def end(self, operation: Operation) -> None:
        """Ask the platform to end it."""
        self.failures.clear()
        self.attempt(lambda: self.identify(operation))
        for step in self.steps(operation):
            self.attempt(step)

    def look(self, books: _Books, operation: Operation, last: bool) -> str | None:
        """Tell why it has not ended yet, None where it has; and ask again to end it where that failed."""
        if self.failures or (not self.identified and self.identify(operation)):
            self.end(operation)
        try:
            reason, under_way = self.state(books, operation, last and not self.failures)
        except NotFoundError:
            return self._unknown()
        self.known = True
        self._unknown_since = None
        if reason is not None and not under_way and not self.failures:
            # The platform has said yes, or that it knows no such thing, and yet it goes on.
            self.end(operation)
        return reason

    def _unknown(self) -> str | None:
        """Believe that a thing is unknown when the platform says so for a while."""
        now = time.monotonic()
        self._unknown_since = self._unknown_since or now
        if not self.identified:
            if self.failures and self._failed is not None:
                # It may be there: looking for it has failed.
                raise self._failed
            return "it may still come into being" if self.teardown.may_come_late else None
        # What was known a moment ago may be forgotten for a moment.
        return None if now - self._unknown_since >= _CONFIRM_SECONDS else "it is unknown"


class _Work(_Item):
    """The work requirement."""

    def __init__(self, teardown: _Teardown) -> None:
        super().__init__(str(teardown.targets.work_requirement), teardown)

    @property
    def identified(self) -> bool:
        return self.teardown.targets.work_requirement_id is not None

    def identify(self, operation: Operation) -> bool:
        targets = self.teardown.targets
        if not self.identified and targets.namespace and targets.work_requirement_name:
            name = targets.work_requirement_name
            found = self.platform.find_work_requirement(targets.namespace, name, operation)
            if found is not None and (targets.build is None or is_our_work_requirement(found, targets.build)):
                targets.work_requirement_id = found.id
                return True
        return False

    def steps(self, operation: Operation) -> list[Callable[[], object]]:
        identifier = self.teardown.targets.work_requirement_id
        if identifier is None:
            return []
        work = self.platform.client.work_client

        def cancel() -> object:
            return self.platform.call(
                f"cancel the {self.what}",
                lambda: work.cancel_work_requirement_by_id(identifier, abort=True),
                operation,
                may_be_missing=True,
            )

        return [cancel]

    def state(self, books: _Books, operation: Operation, last: bool) -> tuple[str | None, bool]:
        from yellowdog_client.model import WorkRequirementStatus

        identifier = self.teardown.targets.work_requirement_id
        if identifier is None:
            raise NotFoundError("there is none", 404)
        status = self.platform.work_requirement(identifier, operation, may_be_missing=True).status
        if status is not None and status.finished:
            return None, True
        return f"it is {status or 'in an unknown state'}", status is WorkRequirementStatus.CANCELLING


class _Pool(_Item):
    """A worker pool and its compute requirement."""

    def __init__(self, teardown: _Teardown, target: PoolTarget) -> None:
        super().__init__(str(target), teardown)
        self.target = target

    @property
    def identified(self) -> bool:
        return self.target.id is not None and self.target.compute_requirement_id is not None

    def identify(self, operation: Operation) -> bool:
        targets, target = self.teardown.targets, self.target
        before = (target.id, target.compute_requirement_id)
        namespace, build = targets.namespace, targets.build
        if target.id is None and namespace and target.name:
            found = self.platform.find_pool(namespace, target.name, operation)
            if found is not None and (build is None or self.platform.is_our_pool(found, build, operation)):
                target.id, target.compute_requirement_id = found.id, found.computeRequirementId
        if target.id is not None and target.compute_requirement_id is None:
            # Where the pool is gone, its compute requirement may still be there, under the name.
            with contextlib.suppress(NotFoundError):
                pool = self.platform.pool(target.id, operation)
                target.compute_requirement_id = pool.computeRequirementId
        if target.compute_requirement_id is None and namespace and target.name:
            compute = self.platform.find_compute(namespace, target.name, operation)
            if compute is not None and (build is None or is_our_compute(compute, build)):
                target.compute_requirement_id = compute.id
        return (target.id, target.compute_requirement_id) != before

    def steps(self, operation: Operation) -> list[Callable[[], object]]:
        pool_id, compute_id = self.target.id, self.target.compute_requirement_id
        workers, compute = self.platform.client.worker_pool_client, self.platform.client.compute_client
        steps: list[Callable[[], object]] = []
        if pool_id is not None:
            steps.append(
                lambda: self.platform.call(
                    f"shut the {self.what} down",
                    lambda: workers.shutdown_worker_pool_by_id(pool_id),
                    operation,
                    may_be_missing=True,
                )
            )
        if compute_id is not None:
            steps.append(
                lambda: self.platform.call(
                    f"terminate the compute requirement of the {self.what}",
                    lambda: compute.terminate_compute_requirement_by_id(compute_id),
                    operation,
                    may_be_missing=True,
                )
            )
        return steps

    def state(self, books: _Books, operation: Operation, last: bool) -> tuple[str | None, bool]:
        from yellowdog_client.model import ComputeRequirementStatus

        target = self.target
        if target.id in books.pools and target.compute_requirement_id in books.compute and not last:
            pool, compute = books.pools[target.id], books.compute[target.compute_requirement_id]
            if pool is not None and pool.finished and compute is ComputeRequirementStatus.TERMINATED:
                return None, True
            if pool is not None and pool.finished and compute is ComputeRequirementStatus.TERMINATING:
                under_way = self.teardown.until == "terminating"
                return (None if under_way else f"its compute requirement is {compute}"), True
        return self._state_asked(operation, last)

    def _state_asked(self, operation: Operation, last: bool) -> tuple[str | None, bool]:
        from yellowdog_client.model import ComputeRequirementStatus

        target = self.target
        missing = target.id is None and target.compute_requirement_id is None
        late = False
        if target.compute_requirement_id is not None:
            try:
                compute = self.platform.compute(target.compute_requirement_id, operation)
            except NotFoundError:
                missing = True
            else:
                self.known = True
                ending = ComputeRequirementStatus.TERMINATING in (compute.status, compute.nextStatus)
                enough = ending and self.teardown.until == "terminating"
                # An instance that takes its time to go is on its way: nothing would end it sooner.
                late = last and compute.status is ComputeRequirementStatus.TERMINATING
                late = late and not _errored(compute)
                if compute.status is not ComputeRequirementStatus.TERMINATED and not enough and not late:
                    return f"its compute requirement is {compute.status or 'in an unknown state'}", ending
        if target.id is not None:
            try:
                status = self.platform.pool(target.id, operation).status
            except NotFoundError:
                missing = True
            else:
                self.known = True
                if status is None or not status.finished:
                    return f"it is {status or 'in an unknown state'}", False
        if missing:
            raise NotFoundError("the platform does not know it", 404)
        if late:
            log.warning(
                "The instances of the %s are still terminating (compute requirement %s); this is not waited "
                "for",
                target,
                target.compute_requirement_id,
            )
        return None, True


def tear_down(
    platform: Platform, targets: Targets, until: Literal["terminated", "terminating"] = "terminated"
) -> int:
    """End everything in a list, in parallel, and verify it by asking the platform.

    :param until: how far the instances have to be.
    :returns: how many of the things the platform knew.
    :raises TeardownError: where something could not be ended or verified; ``targets`` then holds just
        that, so that a second call goes on with it.
    """
    steps = Operation(STEP_SECONDS)
    verifying = Operation()
    teardown = _Teardown(platform, targets, until, steps)
    items: list[_Item] = [_Pool(teardown, pool) for pool in targets.pools]
    if targets.work_requirement is not None:
        items.insert(0, _Work(teardown))
    try:
        _end_all(platform, items, steps)
        verifying = Operation(VERIFY_SECONDS)
        left = _verify(teardown, items, verifying)
    except BaseException:
        steps.cancel()
        verifying.cancel()
        raise
    if not any(isinstance(item, _Work) for item in left):
        targets.work_requirement_id = targets.work_requirement_name = None
    targets.pools = [item.target for item in left if isinstance(item, _Pool)]
    if left:
        reasons = "".join(f"\n- {reason}" for item in left for reason in item.failures)
        raise TeardownError(
            "not everything could be verified as ended. Shut it down again, or end it in YellowDog's portal. "
            f"May still be running: {', '.join(item.what for item in left)}{reasons}",
            [item.what for item in left],
        )
    return sum(item.known for item in items)


def _end_all(platform: Platform, items: Sequence[_Item], operation: Operation) -> None:
    """Ask for the end of everything, every step on its own."""
    unidentified = [item for item in items if not item.identified]
    identifying = [
        (item, platform.submit(partial(item.attempt, partial(item.identify, operation))))
        for item in unidentified
    ]
    pending: list[Future[None]] = []

    def start(item: _Item) -> None:
        pending.extend(platform.submit(partial(item.attempt, step)) for step in item.steps(operation))

    for item in items:
        if item.identified:
            start(item)
    for item, identified in identifying:
        identified.result()
        start(item)
    for future in pending:
        future.result()


def _verify(teardown: _Teardown, items: Sequence[_Item], operation: Operation) -> list[_Item]:
    """Ask about all that has not ended yet, again and again; return what is left when the time is over."""
    left = list(items)
    pause = Pause(operation)
    while True:
        last = operation.expired
        asking = [item for item in left if not item.hopeless]
        books = _read_books(teardown, asking, operation)
        looks = [
            (item, teardown.platform.submit(partial(item.look, books, operation, last))) for item in asking
        ]
        for item, asked in looks:
            try:
                reason = asked.result()
            except RayDogError as error:
                reason = str(error)
                # A key that is not accepted now will not be in a minute.
                item.hopeless = isinstance(error, CredentialsError)
            if reason is None:
                left.remove(item)
            elif last or item.hopeless:
                item.failures.append(
                    f"the {item.what} has not ended after {operation.elapsed:.0f} s: {reason}"
                )
        if last or all(item.hopeless for item in left):
            return left
        pause.sleep()


def _read_books(teardown: _Teardown, items: Sequence[_Item], operation: Operation) -> _Books:
    """Ask for all pools by two calls; what is not in the answers is asked for singly."""
    targets, platform = teardown.targets, teardown.platform
    namespace, prefix = targets.namespace, targets.prefix
    if namespace is None or prefix is None:
        return _Books()
    if sum(isinstance(item, _Pool) and item.identified for item in items) < _LIST_FROM:
        return _Books()
    computing = platform.submit(lambda: platform.compute_summaries(namespace, prefix, operation))
    books = _Books()
    try:
        pools = platform.pool_summaries(namespace, prefix, operation)
        books.pools = {identifier: summary.status for identifier, summary in pools.items()}
        books.compute = {identifier: summary.status for identifier, summary in computing.result().items()}
    except RayDogError as error:
        log.info("The pools are looked at one by one: %s", error)
    return books


def _errored(compute: ComputeRequirement) -> bool:
    from yellowdog_client.model import ComputeSourceStatus

    sources = getattr(compute.provisionStrategy, "sources", None) or []
    return any(source.status is ComputeSourceStatus.ERRORED for source in sources)
