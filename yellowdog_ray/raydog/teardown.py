"""Ending what a cluster has on the platform: a list of steps, each on its own, and then verified.

"Already gone" is success. What cannot be ended or verified is collected and raised once, at the end.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from yellowdog_ray.errors import CredentialsError, NotFoundError, RayDogError, TeardownError
from yellowdog_ray.raydog.platform import (
    Build,
    Platform,
    is_our_compute,
    is_our_work_requirement,
)
from yellowdog_ray.raydog.transport import Operation, Pause, already_gone

if TYPE_CHECKING:
    from yellowdog_client.model import ComputeRequirement

__all__ = ["VERIFY_SECONDS", "PoolTarget", "Targets", "tear_down"]

log = logging.getLogger(__name__)

# How long calls that fail are tried again, all of them together.
STEP_SECONDS = 90.0
# How long the platform then gets to report everything as ended.
VERIFY_SECONDS = 180.0


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
    """

    namespace: str | None = None
    work_requirement_id: str | None = None
    work_requirement_name: str | None = None
    build: Build | None = None
    pools: list[PoolTarget] = field(default_factory=list)

    @property
    def work_requirement(self) -> str | None:
        """What the work requirement is called in messages; None where there is none to end."""
        known = [part for part in (self.work_requirement_name, self.work_requirement_id) if part]
        return " ".join(["work requirement", *known]) if known else None

    def __str__(self) -> str:
        names = [str(pool) for pool in self.pools]
        return ", ".join([self.work_requirement, *names] if self.work_requirement else names)


@dataclass
class _Item:
    """One thing that is to end, and how far it is.

    :param end: asks the platform to end it, and returns what failed.
    :param not_ended: tells why it has not ended yet, None where it has; NotFoundError where it is unknown.
        Told that this is the last look, it lets instances pass that are about to end.
    """

    what: str
    target: PoolTarget | None
    end: Callable[[], list[str]]
    not_ended: Callable[[bool], str | None]
    failures: list[str] = field(default_factory=list)
    known: bool = False
    hopeless: bool = False

    def look(self, last: bool) -> str | None:
        """Ask whether it has ended; and once more to end it, where that has failed."""
        if self.failures:
            self.failures = self.end()
        return self.not_ended(last and not self.failures)


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
    items = [_pool_item(platform, targets, pool, steps, until) for pool in targets.pools]
    if targets.work_requirement is not None:
        items.insert(0, _work_item(platform, targets, steps))
    verifying = Operation()
    try:
        for item, ended in [(item, platform.submit(item.end)) for item in items]:
            item.failures += ended.result()
        verifying = Operation(VERIFY_SECONDS)
        left = _verify(platform, items, verifying)
    except BaseException:
        steps.cancel()
        verifying.cancel()
        raise
    if not any(item.target is None for item in left):
        targets.work_requirement_id = targets.work_requirement_name = None
    targets.pools = [item.target for item in left if item.target is not None]
    if left:
        reasons = "".join(f"\n- {reason}" for item in left for reason in item.failures)
        raise TeardownError(
            "not everything could be verified as ended. Call shut_down() again, or end it in YellowDog's "
            f"portal. May still be running: {', '.join(item.what for item in left)}{reasons}",
            [item.what for item in left],
        )
    return sum(item.known for item in items)


def _verify(platform: Platform, items: list[_Item], operation: Operation) -> list[_Item]:
    """Ask about all that has not ended yet, again and again; return what is left when the time is over."""
    left = list(items)
    pause = Pause(operation)
    while True:
        last = operation.expired
        asking = [item for item in left if not item.hopeless]
        looks = [(item, platform.submit(functools.partial(item.look, last))) for item in asking]
        for item, asked in looks:
            try:
                reason = asked.result()
                item.known = True
            except NotFoundError:
                reason = None
            except RayDogError as error:
                reason = str(error)
                # A key that is not accepted now will not be in a minute.
                item.hopeless = isinstance(error, CredentialsError)
            if reason is None:
                left = [other for other in left if other is not item]
            elif last or item.hopeless:
                item.failures.append(
                    f"the {item.what} has not ended after {operation.elapsed:.0f} s: {reason}"
                )
        if last or all(item.hopeless for item in left):
            return left
        pause.sleep()


def _attempt(failures: list[str], action: Callable[[], object]) -> None:
    try:
        action()
    except RayDogError as error:
        if not already_gone(error):
            log.warning("%s", error)
            failures.append(str(error))


def _work_item(platform: Platform, targets: Targets, operation: Operation) -> _Item:
    what = str(targets.work_requirement)

    def identify() -> None:
        if targets.work_requirement_id is None and targets.namespace and targets.work_requirement_name:
            found = platform.find_work_requirement(
                targets.namespace, targets.work_requirement_name, operation
            )
            if found is not None and (targets.build is None or is_our_work_requirement(found, targets.build)):
                targets.work_requirement_id = found.id

    def cancel() -> None:
        identifier = targets.work_requirement_id
        if identifier is not None:
            work = platform.client.work_client
            platform.call(
                f"cancel the {what}",
                lambda: work.cancel_work_requirement_by_id(identifier, abort=True),
                operation,
            )

    def end() -> list[str]:
        failures: list[str] = []
        _attempt(failures, identify)
        _attempt(failures, cancel)
        return failures

    def not_ended(last: bool) -> str | None:
        if targets.work_requirement_id is None:
            identify()
        if targets.work_requirement_id is None:
            raise NotFoundError("there is none", 404)
        status = platform.work_requirement(targets.work_requirement_id, operation).status
        return None if status is not None and status.finished else f"it is {status or 'in an unknown state'}"

    return _Item(what, None, end, not_ended)


def _pool_item(
    platform: Platform, targets: Targets, pool: PoolTarget, operation: Operation, until: str
) -> _Item:
    what = str(pool)

    def shut_down() -> None:
        identifier = pool.id
        if identifier is not None:
            workers = platform.client.worker_pool_client
            platform.call(
                f"shut the {what} down", lambda: workers.shutdown_worker_pool_by_id(identifier), operation
            )

    def terminate() -> None:
        identifier = pool.compute_requirement_id
        if identifier is not None:
            compute = platform.client.compute_client
            platform.call(
                f"terminate the compute requirement of the {what}",
                lambda: compute.terminate_compute_requirement_by_id(identifier),
                operation,
            )

    def end() -> list[str]:
        failures: list[str] = []
        _attempt(failures, lambda: _identify(platform, targets, pool, operation))
        _attempt(failures, shut_down)
        _attempt(failures, terminate)
        return failures

    def not_ended(last: bool) -> str | None:
        unknown = pool.id is None or pool.compute_requirement_id is None
        if unknown:
            # The look-up may have failed before; what it finds now has not been asked to end yet.
            before = (pool.id, pool.compute_requirement_id)
            _identify(platform, targets, pool, operation)
            if (pool.id, pool.compute_requirement_id) != before:
                shut_down()
                terminate()
        return _pool_not_ended(platform, pool, operation, until, last)

    return _Item(what, pool, end, not_ended)


def _identify(platform: Platform, targets: Targets, pool: PoolTarget, operation: Operation) -> None:
    """Find the ids of a pool and its compute requirement that are not known yet."""
    namespace, build = targets.namespace, targets.build
    if pool.id is not None and pool.compute_requirement_id is None:
        # Where the pool is gone, its compute requirement may still be there, under the name.
        with contextlib.suppress(NotFoundError):
            pool.compute_requirement_id = platform.pool(pool.id, operation).computeRequirementId
    if namespace is None or pool.name is None:
        return
    if pool.id is None:
        found = platform.find_pool(namespace, pool.name, operation)
        if found is not None and (build is None or platform.is_our_pool(found, build, operation)):
            pool.id, pool.compute_requirement_id = found.id, found.computeRequirementId
    if pool.compute_requirement_id is None:
        compute = platform.find_compute(namespace, pool.name, operation)
        if compute is not None and (build is None or is_our_compute(compute, build)):
            pool.compute_requirement_id = compute.id


def _pool_not_ended(
    platform: Platform, pool: PoolTarget, operation: Operation, until: str, last: bool
) -> str | None:
    from yellowdog_client.model import ComputeRequirementStatus

    known = False
    late = False
    if pool.compute_requirement_id is not None:
        try:
            compute = platform.compute(pool.compute_requirement_id, operation)
        except NotFoundError:
            pass
        else:
            known = True
            ending = until == "terminating" and ComputeRequirementStatus.TERMINATING in (
                compute.status,
                compute.nextStatus,
            )
            # An instance that takes its time to go is on its way: nothing would end it sooner.
            late = last and compute.status is ComputeRequirementStatus.TERMINATING
            late = late and not _errored(compute)
            if compute.status is not ComputeRequirementStatus.TERMINATED and not ending and not late:
                return f"its compute requirement is {compute.status or 'in an unknown state'}"
    if pool.id is not None:
        try:
            status = platform.pool(pool.id, operation).status
        except NotFoundError:
            pass
        else:
            known = True
            if status is None or not status.finished:
                return f"it is {status or 'in an unknown state'}"
    if not known:
        raise NotFoundError("there is none", 404)
    if late:
        log.warning(
            "The instances of the %s are still terminating (compute requirement %s); this is not waited for",
            pool,
            pool.compute_requirement_id,
        )
    return None


def _errored(compute: ComputeRequirement) -> bool:
    from yellowdog_client.model import ComputeSourceStatus

    sources = getattr(compute.provisionStrategy, "sources", None) or []
    return any(source.status is ComputeSourceStatus.ERRORED for source in sources)
