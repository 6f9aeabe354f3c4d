"""The order in which a cluster comes into being, and how what has been created is taken back.

Everything that can go in parallel does. The head's address is known as soon as its node registers, so
that all tasks, the workers' too, are submitted then; worker scripts wait for the head's port.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from yellowdog_ray.errors import (
    BuildError,
    BuildTimeoutError,
    ClusterStateError,
    RayDogError,
    TeardownError,
)
from yellowdog_ray.raydog import plan
from yellowdog_ray.raydog.plan import PoolPlan
from yellowdog_ray.raydog.platform import Build, Platform, group_ids, task_failure
from yellowdog_ray.raydog.specs import ClusterSpec
from yellowdog_ray.raydog.teardown import PoolTarget, Targets, tear_down
from yellowdog_ray.raydog.transport import CONNECT_TIMEOUT, READ_TIMEOUT, Operation, Pause

if TYPE_CHECKING:
    from yellowdog_client.model import Node, Task

__all__ = ["Assembly", "BuiltPool", "Crew", "add_note", "cancel_tasks", "take_back"]

log = logging.getLogger(__name__)

_T = TypeVar("_T")

# A task that executes is looked at once more after this time, so that a script that fails at once is
# reported by the build and not later.
SETTLE_SECONDS = 0.15
# How long a registered node may be without a private address before that is an error.
_ADDRESS_SECONDS = 60.0
# How long the tasks of a removed pool are being cancelled.
CANCEL_SECONDS = 30.0
# No call that is under way takes longer.
_CALL_SECONDS = CONNECT_TIMEOUT + READ_TIMEOUT + 5.0


@dataclass
class BuiltPool:
    """A pool and its task group, as far as they have been created.

    :param node_id: of a pool with one special node (head or observability): its node, and its addresses.
    :param task_id: of such a pool: its task.
    """

    plan: PoolPlan
    id: str | None = None
    compute_requirement_id: str | None = None
    group_id: str | None = None
    node_id: str | None = None
    private_ip: str | None = None
    public_ip: str | None = None
    task_id: str | None = None

    def target(self) -> PoolTarget:
        """Name it for a teardown."""
        return PoolTarget(self.plan.name, self.id, self.compute_requirement_id)


class Crew:
    """Calls of one operation that run in parallel; the first that fails ends the wait for all."""

    def __init__(self, platform: Platform, operation: Operation) -> None:
        self._platform = platform
        self.operation = operation
        self._futures: list[Future[Any]] = []

    def start(self, function: Callable[[], _T]) -> Future[_T]:
        self._check_stopped()
        future = self._platform.submit(function)
        self._futures.append(future)
        return future

    def check(self) -> None:
        """Raise the failure of a call that has failed, or that somebody has stopped them."""
        for future in self._futures:
            if future.done() and not future.cancelled() and (error := future.exception()) is not None:
                raise error
        self._check_stopped()

    def result(self, future: Future[_T], what: str) -> _T:
        """Wait for a call, but no longer than until any one fails or the operation's time is over."""
        while True:
            self.check()
            if future.done():
                return future.result()
            if self.operation.expired:
                raise BuildTimeoutError(f"{self.operation.elapsed:.1f} s were not enough: {what}")
            pending = [other for other in self._futures if not other.done()]
            wait(pending, timeout=self.operation.remaining, return_when=FIRST_COMPLETED)

    def finish(self, what: str) -> None:
        """Wait for all of them."""
        for future in self._futures:
            self.result(future, what)

    def stop(self) -> None:
        """Start no more of them, and wait for those that are under way: what they create is to be known."""
        self.operation.cancel()
        for future in self._futures:
            future.cancel()
        wait(self._futures, timeout=_CALL_SECONDS)

    def _check_stopped(self) -> None:
        if self.operation.cancelled.is_set():
            raise ClusterStateError("it was stopped: the cluster is being shut down")


@dataclass
class Assembly:
    """A cluster, as far as it has come into being on the platform.

    It takes nothing back by itself: whoever calls it does, whatever it is ended by, from :meth:`targets`.

    :param token: the cluster's Ray token; None where Ray's authentication is off.
    :param made: how what it has created is recognised.
    """

    platform: Platform
    cluster: ClusterSpec
    token: str | None = field(repr=False)
    head: BuiltPool
    observability: BuiltPool | None
    work_requirement_id: str | None = None
    made: Build = field(default_factory=lambda: Build(secrets.token_hex(8)))
    _requirement_lock: threading.Lock = field(default_factory=threading.Lock, repr=False)
    _crews: list[Crew] = field(default_factory=list, repr=False)

    # -- what there is to end --------------------------------------------------------------------------

    def settle(self) -> None:
        """Let no call be started any more, and wait for those that are under way.

        What they create is known then; of a call that is waited for in vain, at least the name is.
        """
        crews = list(self._crews)
        for crew in crews:
            crew.operation.cancel()
        for crew in crews:
            crew.stop()

    def exists(self, pool: BuiltPool) -> bool:
        """Tell whether there may be something of a pool on the platform."""
        return pool.id is not None or pool.plan.name in self.made.sent

    def targets(self, workers: Iterable[BuiltPool]) -> Targets:
        """List what has been created, and what may have been by calls whose answers never came."""
        pools = [pool for pool in (self.head, self.observability, *workers) if pool is not None]
        return Targets(
            self.cluster.namespace,
            self.work_requirement_id,
            self.cluster.name
            if self.work_requirement_id is None and self.cluster.name in self.made.sent
            else None,
            self.made,
            [pool.target() for pool in pools if self.exists(pool)],
        )

    def pool_targets(self, pool: BuiltPool) -> Targets:
        """List what there is of one pool."""
        pools = [pool.target()] if self.exists(pool) else []
        return Targets(self.cluster.namespace, build=self.made, pools=pools)

    def check_running(self) -> None:
        """Raise where somebody has stopped it."""
        for crew in self._crews:
            crew.check()

    def crew(self, operation: Operation) -> Crew:
        """Open an operation, which :meth:`settle` can stop from now on."""
        crew = Crew(self.platform, operation)
        self._crews.append(crew)
        return crew

    # -- building --------------------------------------------------------------------------------------

    def build(self, workers: Sequence[BuiltPool], crew: Crew) -> None:
        """Create everything and return when the head's task executes.

        :raises RayDogError: what went wrong.
        """
        special = [self.head] if self.observability is None else [self.head, self.observability]
        operation = crew.operation
        self._check_templates([*special, *workers], crew)
        # The platform's clock is known now, and nothing has been created yet.
        self.made.begun = self.platform.now()
        try:
            self._build(special, workers, crew, operation)
        except RayDogError as error:
            if operation.expired and not isinstance(error, BuildError):
                raise BuildTimeoutError(f"{operation.elapsed:.1f} s were not enough: {error}") from error
            raise

    def _check_templates(self, pools: Iterable[BuiltPool], crew: Crew) -> None:
        operation = crew.operation
        templates = sorted({pool.plan.node.template for pool in pools})
        for template in templates:
            crew.start(lambda template=template: self.platform.check_template(template, operation))  # type: ignore[misc]
        crew.finish("the platform has not answered whether it knows the templates")

    def _build(
        self,
        special: list[BuiltPool],
        workers: Sequence[BuiltPool],
        crew: Crew,
        operation: Operation,
    ) -> None:
        lifetime = self.cluster.lifetime
        plans = [pool.plan for pool in (*special, *workers)]
        provisioning = [crew.start(self._provisioner(pool, lifetime, operation)) for pool in special]

        def add_requirement() -> dict[str, str]:
            requirement = self.platform.create_work_requirement(
                self.cluster, plans, lifetime, self.made, operation
            )
            self.work_requirement_id = requirement.id
            return group_ids(requirement)

        adding = crew.start(add_requirement)
        for pool in workers:
            crew.start(self._provisioner(pool, lifetime, operation))

        for future in provisioning:
            crew.result(future, "the head node's pool has not been provisioned")
        self._await_nodes(special, crew, operation)
        groups = crew.result(adding, "the work requirement has not been added")
        for pool in (*special, *workers):
            pool.group_id = groups[pool.plan.group]
        submitting = [crew.start(self._submitter(pool, operation)) for pool in special]
        for pool in workers:
            crew.start(self._submitter(pool, operation))
        for future in submitting:
            crew.result(future, "the head node's task has not been submitted")
        self._await_executing(special, crew, operation)
        crew.finish("not all worker pools have been provisioned and given their tasks")

    def add(self, pool: BuiltPool, lifetime: timedelta | None, crew: Crew) -> None:
        """Add a worker pool to a cluster that is built; it returns when its tasks are submitted.

        :param lifetime: what is left of the cluster's lifetime.
        :raises RayDogError: what went wrong.
        """
        operation = crew.operation
        self._check_templates([pool], crew)
        requirement_id = str(self.work_requirement_id)

        def append_group() -> None:
            # Read, change, write: two at once would lose one of the groups.
            with self._requirement_lock:
                group = plan.task_group(self.cluster, pool.plan, lifetime)
                pool.group_id = self.platform.add_task_group(requirement_id, group, operation).id
            self._submitter(pool, operation)()

        crew.start(self._provisioner(pool, lifetime, operation))
        crew.start(append_group)
        crew.finish(f"the worker pool {pool.plan.name} has not been added")

    def discard(self, pool: BuiltPool, crew: Crew, error: BaseException) -> bool:
        """Take a worker pool back that could not be added, or came too late.

        :param crew: that of its addition, which is stopped.
        :returns: whether all of it was taken back.
        """
        crew.stop()
        gone = take_back(self.platform, self.pool_targets(pool), error)
        cancel_tasks(self.platform, pool)
        if gone:
            with contextlib.suppress(ValueError):
                self._crews.remove(crew)
        return gone

    def _provisioner(
        self, pool: BuiltPool, lifetime: timedelta | None, operation: Operation
    ) -> Callable[[], None]:
        def provision() -> None:
            created = self.platform.create_pool(self.cluster, pool.plan, lifetime, self.made, operation)
            pool.id, pool.compute_requirement_id = created.id, created.computeRequirementId
            log.info("Provisioned the worker pool %s (%s)", pool.plan.name, pool.id)

        return provision

    def _submitter(self, pool: BuiltPool, operation: Operation) -> Callable[[], None]:
        variables = plan.environment(
            pool.plan.role,
            head_ip=str(self.head.private_ip),
            node_ip=pool.private_ip,
            observability_ip=None if self.observability is None else self.observability.private_ip,
            token=self.token,
        )

        def submit() -> None:
            for batch in plan.task_batches(pool.plan, variables):
                added = self.platform.add_tasks(str(pool.group_id), batch, operation)
                if pool.plan.role != "worker":
                    pool.task_id = added[0].id

        return submit

    # -- waiting ---------------------------------------------------------------------------------------

    def _await_nodes(self, pools: list[BuiltPool], crew: Crew, operation: Operation) -> None:
        """Wait until every special node has registered and told its addresses."""
        pause = Pause(operation)
        checks = _Checks()
        registered: dict[str, float] = {}
        while waiting := [pool for pool in pools if pool.private_ip is None]:
            crew.check()
            for pool in waiting:
                node = _active(self.platform.nodes(str(pool.id), operation))
                details = node.details if node is not None else None
                if node is not None and details is not None and details.privateIpAddress:
                    pool.node_id = node.id
                    pool.private_ip, pool.public_ip = details.privateIpAddress, details.publicIpAddress
                elif node is not None:
                    since = registered.setdefault(pool.plan.name, time.monotonic())
                    if time.monotonic() - since > _ADDRESS_SECONDS:
                        raise BuildError(f"the {pool.plan.role} node {node.id} has no private address")
            waiting = [pool for pool in waiting if pool.private_ip is None]
            if waiting and checks.due():
                for pool in waiting:
                    reason = self.platform.why_no_nodes(str(pool.id), pool.plan.name, operation)
                    if reason is not None:
                        raise BuildError(f"the {pool.plan.role} node cannot come: {reason}")
            if waiting:
                if operation.expired:
                    raise BuildTimeoutError(
                        f"{operation.elapsed:.1f} s were not enough: the {waiting[0].plan.role} node of the "
                        f"worker pool {waiting[0].plan.name} has not registered"
                    )
                pause.sleep()

    def _await_executing(self, pools: list[BuiltPool], crew: Crew, operation: Operation) -> None:
        """Wait until every special node's task executes, and is still there a moment later."""
        pause = Pause(operation)
        checks = _Checks()
        waiting = list(pools)
        while True:
            crew.check()
            for pool in list(waiting):
                task = self._look(pool, operation)
                if task.status is not None and task.status.name in ("EXECUTING", "UPLOADING"):
                    waiting.remove(pool)
                elif operation.expired:
                    raise BuildTimeoutError(
                        f"{operation.elapsed:.1f} s were not enough: the {pool.plan.role} node's task "
                        f"{task.id} is {task.status or 'in an unknown state'}"
                    )
            if not waiting:
                break
            if checks.due():
                for pool in waiting:
                    self._check_node(pool, operation)
            pause.sleep()
        time.sleep(SETTLE_SECONDS)
        for pool in pools:
            self._look(pool, operation)

    def _look(self, pool: BuiltPool, operation: Operation) -> Task:
        task = self.platform.task(str(pool.task_id), operation)
        if task.status is not None and task.status.finished:
            raise task_failure(task, f"the {pool.plan.role} node's task", pool.private_ip)
        return task

    def _check_node(self, pool: BuiltPool, operation: Operation) -> None:
        """Raise where the node that everybody was told the address of is gone."""
        nodes = self.platform.nodes(str(pool.id), operation)
        node = next((node for node in nodes if node.id == pool.node_id), None)
        if node is None or (node.status is not None and node.status.gone):
            state = "gone" if node is None else node.status
            raise BuildError(
                f"the {pool.plan.role} node {pool.node_id} ({pool.private_ip}) is {state} before its task ran"
            )
        reason = self.platform.why_no_nodes(str(pool.id), pool.plan.name, operation)
        if reason is not None:
            raise BuildError(f"the {pool.plan.role} node's task cannot run: {reason}")


class _Checks:
    """When to look for reasons: they cost more calls than the wait itself, and are rarely found."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._next = self._started + 0.5

    def due(self) -> bool:
        now = time.monotonic()
        if now < self._next:
            return False
        self._next = now + min(10.0, max(0.5, (now - self._started) / 4))
        return True


def _active(nodes: Iterable[Node]) -> Node | None:
    return next((node for node in nodes if node.status is None or node.status.active), None)


def cancel_tasks(platform: Platform, pool: BuiltPool) -> None:
    """Cancel the tasks of a pool whose nodes have been ended, so that they wait for no others.

    What cannot be cancelled in time costs nothing, so that it is no error.
    """
    if pool.group_id is None:
        return
    operation = Operation(CANCEL_SECONDS)
    try:
        tasks = platform.tasks(pool.group_id, operation)
        unfinished = [task.id for task in tasks if task.id and not (task.status and task.status.finished)]
        cancelling = [platform.submit(_canceller(platform, task_id, operation)) for task_id in unfinished]
        for future in cancelling:
            future.result()
    except RayDogError as error:
        log.warning("Could not list the tasks of %s to cancel them: %s", pool.plan.group, error)
    except BaseException:
        operation.cancel()
        raise


def _canceller(platform: Platform, task_id: str, operation: Operation) -> Callable[[], None]:
    def cancel() -> None:
        if operation.expired or operation.cancelled.is_set():
            return
        try:
            platform.cancel_task(task_id, operation)
        except RayDogError as error:
            log.info("%s", error)

    return cancel


def take_back(platform: Platform, targets: Targets, error: BaseException) -> bool:
    """Take back what a failed build or addition has created; what is left is said in the error's message.

    :returns: whether everything was.
    """
    if not targets.pools and targets.work_requirement is None:
        return True
    log.info("Taking back what has been created, because of: %s", error or type(error).__name__)
    try:
        tear_down(platform, targets)
    except TeardownError as left:
        add_note(error, f"What had been created could not all be taken back: {left}")
        return False
    return True


def add_note(error: BaseException, note: str) -> None:
    """Add a sentence to an error, where a person will see it."""
    log.error("%s", note)
    if isinstance(error, RayDogError) and error.args:
        error.args = (f"{error.args[0]}\n{note}", *error.args[1:])
    elif hasattr(error, "add_note"):  # Python 3.11 and later
        error.add_note(note)
