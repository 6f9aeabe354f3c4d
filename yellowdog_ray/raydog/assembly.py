"""The order in which a cluster comes into being, and what there is of it to be ended.

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
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from yellowdog_ray.errors import BuildError, BuildTimeoutError, ClusterStateError, RayDogError
from yellowdog_ray.raydog import events, plan
from yellowdog_ray.raydog.crew import Crew
from yellowdog_ray.raydog.events import Emitter
from yellowdog_ray.raydog.journal import Journal
from yellowdog_ray.raydog.platform import Build, Platform, group_ids, task_failure
from yellowdog_ray.raydog.pools import BuiltPool
from yellowdog_ray.raydog.specs import ClusterSpec
from yellowdog_ray.raydog.state import ClusterState
from yellowdog_ray.raydog.teardown import Targets
from yellowdog_ray.raydog.transport import Operation, Pause
from yellowdog_ray.raydog.undo import cancel_tasks, take_back

if TYPE_CHECKING:
    from yellowdog_client.model import Node, Task

__all__ = ["Assembly", "BuiltPool", "Crew"]

log = logging.getLogger(__name__)

_T = TypeVar("_T")

# A task that executes is looked at once more after this time, so that a script that fails at once is
# reported by the build and not later.
SETTLE_SECONDS = 0.05
# How long a registered node may be without a private address before that is an error.
_ADDRESS_SECONDS = 60.0
# How long the tasks of a removed pool are being cancelled.
CANCEL_SECONDS = 30.0

# What is said where another process ends the cluster meanwhile.
STOPPED = "it was stopped: the cluster is being shut down by another process"


@dataclass
class Assembly:
    """A cluster, as far as it has come into being on the platform.

    It takes nothing back by itself: whoever calls it does, whatever it is ended by, from :meth:`targets`.

    :param token: tells the cluster's Ray token; None where Ray's authentication is off.
    :param journal: where it is written down what is created; None before anything is.
    :param made: how what it has created is recognised.
    :param idle: after which time without a busy node the platform ends a pool.
    """

    platform: Platform
    cluster: ClusterSpec
    token: Callable[[], str | None] = field(repr=False)
    head: BuiltPool
    observability: BuiltPool | None
    emit: Emitter = field(repr=False)
    journal: Journal | None = None
    work_requirement_id: str | None = None
    made: Build = field(default_factory=lambda: Build(secrets.token_hex(8)))
    idle: timedelta = plan.POOL_IDLE_TIMEOUT
    _requirement_lock: threading.Lock = field(default_factory=threading.Lock, repr=False)
    _crews: list[Crew] = field(default_factory=list, repr=False)

    # -- what there is to end --------------------------------------------------------------------------

    def settle(self) -> None:
        """Let no call be started any more, and wait for those that are under way.

        What they create is known then; of a call that is waited for in vain, at least the name is. Where
        nothing has been sent, there is nothing to wait for.
        """
        crews = list(self._crews)
        for crew in crews:
            crew.operation.cancel()
        for crew in crews:
            crew.stop(wait_for_them=bool(self.made.sent))

    def exists(self, pool: BuiltPool) -> bool:
        """Tell whether there may be something of a pool on the platform."""
        return pool.id is not None or pool.plan.name in self.made.sent

    def pools(self, workers: Iterable[BuiltPool]) -> list[BuiltPool]:
        """List the head's pool, the observability node's where there is one, and these."""
        return [pool for pool in (self.head, self.observability, *workers) if pool is not None]

    def targets(self, workers: Iterable[BuiltPool]) -> Targets:
        """List what has been created, and what may have been by calls whose answers never came."""
        return Targets(
            self.cluster.namespace,
            self.work_requirement_id,
            self.cluster.name
            if self.work_requirement_id is None and self.cluster.name in self.made.sent
            else None,
            self.made,
            [pool.target() for pool in self.pools(workers) if self.exists(pool)],
            prefix=self.cluster.name,
        )

    def pool_targets(self, pool: BuiltPool) -> Targets:
        """List what there is of one pool."""
        pools = [pool.target()] if self.exists(pool) else []
        return Targets(self.cluster.namespace, build=self.made, pools=pools, prefix=self.cluster.name)

    def check_running(self) -> None:
        """Raise where somebody has stopped it."""
        for crew in self._crews:
            crew.check()

    def crew(self, operation: Operation) -> Crew:
        """Open an operation, which :meth:`settle` can stop from now on."""
        crew = Crew(self.platform, operation)
        self._crews.append(crew)
        return crew

    def dismiss(self, crew: Crew) -> None:
        """Forget an operation that has ended."""
        with contextlib.suppress(ValueError):
            self._crews.remove(crew)

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
        names = tuple(pool.plan.name for pool in (*special, *workers))
        nodes = sum(pool.node_count for pool in (*special, *workers))
        self.emit(events.BuildStarted(self.cluster.name, names, nodes))
        try:
            self._build(special, workers, crew, operation)
        except RayDogError as error:
            if self.journal is not None and self.journal.ended_elsewhere():
                # What has gone wrong comes of that.
                raise ClusterStateError(STOPPED) from error
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
            self._note(lambda state: state.but(work_requirement_id=requirement.id))
            self.emit(events.WorkRequirementAdded(self.cluster.name, str(requirement.id)))
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
            with self._requirement_lock, self.alone("groups"):
                group = plan.task_group(self.cluster, pool.plan, lifetime)
                pool.group_id = self.platform.add_task_group(requirement_id, group, operation).id
            self._submitter(pool, operation)()

        crew.start(self._provisioner(pool, lifetime, operation))
        crew.start(append_group)
        crew.finish(f"the worker pool {pool.plan.name} has not been added")
        self.note_pools(pool)
        if self.journal is not None and not self.journal.path.exists():
            # Nothing would lead to the pool, and whoever has ended the cluster does not look for it any more.
            raise ClusterStateError(
                f"the worker pool {pool.plan.internal_name!r} is taken back: another process has shut the "
                f"cluster down meanwhile, or removed its state file {self.journal.path}"
            )
        if self.journal is not None and self.journal.state.pool(pool.plan.name) is None:
            raise _removed_meanwhile(pool)

    def discard(self, pool: BuiltPool, crew: Crew, error: BaseException) -> bool:
        """Take a worker pool back that could not be added, or came too late.

        :param crew: that of its addition, which is stopped.
        :returns: whether all of it was taken back.
        """
        crew.stop()
        self.emit(events.RollbackStarted(self.cluster.name, str(error) or type(error).__name__))
        gone = take_back(self.platform, self.pool_targets(pool), error)
        cancel_tasks(self.platform, pool, CANCEL_SECONDS)
        if gone:
            self.dismiss(crew)
        return gone

    def _provisioner(
        self, pool: BuiltPool, lifetime: timedelta | None, operation: Operation
    ) -> Callable[[], None]:
        def provision() -> None:
            created = self.platform.create_pool(
                self.cluster, pool.plan, lifetime, self.idle, self.made, operation
            )
            pool.id, pool.compute_requirement_id = created.id, created.computeRequirementId
            self.note_pools(pool)
            self.emit(
                events.PoolProvisioned(self.cluster.name, pool.plan.name, str(pool.id), pool.node_count)
            )

        return provision

    def variables(self, pool: BuiltPool) -> dict[str, str]:
        """Make the environment of a pool's tasks; the addresses have to be known."""
        return plan.environment(
            pool.plan.role,
            head_ip=str(self.head.private_ip),
            node_ip=pool.private_ip,
            observability_ip=None if self.observability is None else self.observability.private_ip,
            token=self.token(),
            direct=self.cluster.direct,
        )

    def _submitter(self, pool: BuiltPool, operation: Operation) -> Callable[[], None]:
        variables = self.variables(pool)

        def submit() -> None:
            for batch in plan.task_batches(pool.plan, variables):
                added = self.platform.add_tasks(str(pool.group_id), batch, operation)
                if pool.plan.role != "worker":
                    pool.task_id = added[0].id
            self.emit(events.TasksSubmitted(self.cluster.name, pool.plan.name, pool.node_count))

        return submit

    def _note(self, change: Callable[[ClusterState], ClusterState]) -> None:
        """Complete the state file; where another process is ending the cluster meanwhile, stop."""
        if self.journal is None:
            return
        self.journal.note(change)
        if self.journal.state.status == "ending":
            raise ClusterStateError(STOPPED)

    def reserve_tasks(self, pool: BuiltPool, count: int) -> int:
        """Give names of tasks away, also to other processes that use the state file.

        :returns: how many had been given away before.
        :raises StateError: where that cannot be written down.
        :raises ClusterStateError: where the pool has been removed meanwhile.
        """

        def reserve(state: ClusterState) -> ClusterState:
            there = state.pool(pool.plan.name)
            if there is None:
                raise _removed_meanwhile(pool)
            before.append(max(there.tasks_counted, pool.tasks_counted))
            pool.tasks_counted = before[-1] + count
            return state.with_pools(there.model_copy(update={"tasks_counted": pool.tasks_counted}))

        before: list[int] = []
        with self._requirement_lock:
            if self.journal is not None:
                self.journal.update(reserve, revive=False)
            else:
                before.append(pool.tasks_counted)
                pool.tasks_counted += count
        return before[-1]

    def note_pools(self, *pools: BuiltPool) -> None:
        """Complete the state file with what is known of pools that have not been removed meanwhile."""
        states = [pool.state() for pool in pools]

        def complete(state: ClusterState) -> ClusterState:
            known = []
            for mine in states:
                there = state.pool(mine.name)
                if there is not None:
                    # Names that another process has given away are not to be used again.
                    counted = max(mine.tasks_counted, there.tasks_counted)
                    known.append(mine.model_copy(update={"tasks_counted": counted}))
            return state.with_pools(*known)

        self._note(complete)

    def alone(self, what: str) -> contextlib.AbstractContextManager[None]:
        """Keep other processes from changing the same of the cluster meanwhile."""
        return contextlib.nullcontext() if self.journal is None else self.journal.alone(what)

    # -- waiting ---------------------------------------------------------------------------------------

    def _await_nodes(self, pools: list[BuiltPool], crew: Crew, operation: Operation) -> None:
        """Wait until every special node has registered and told its addresses."""
        pause = Pause(operation)
        checks = _Checks()
        registered: dict[str, float] = {}
        while waiting := [pool for pool in pools if pool.private_ip is None]:
            crew.check()
            for pool, nodes in self._ask(waiting, lambda pool: self.platform.nodes(str(pool.id), operation)):
                node = _active(nodes)
                details = node.details if node is not None else None
                if node is not None and details is not None and details.privateIpAddress:
                    pool.node_id = node.id
                    pool.private_ip, pool.public_ip = details.privateIpAddress, details.publicIpAddress
                    self._registered(pool)
                elif node is not None:
                    since = registered.setdefault(pool.plan.name, time.monotonic())
                    if time.monotonic() - since > _ADDRESS_SECONDS:
                        raise BuildError(f"the {pool.plan.role} node {node.id} has no private address")
            waiting = [pool for pool in waiting if pool.private_ip is None]
            if waiting and checks.due():
                self._say_waiting("node to register", waiting, operation)
                for pool in waiting:
                    crew.start(partial(self._check_pool, pool, "node cannot come", operation))
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
            for pool, task in self._ask(waiting, lambda pool: self._look(pool, operation)):
                if task.status is not None and task.status.name in ("EXECUTING", "UPLOADING"):
                    waiting.remove(pool)
                    self.emit(events.TaskExecuting(self.cluster.name, pool.plan.role, str(pool.task_id)))
                elif operation.expired:
                    raise BuildTimeoutError(
                        f"{operation.elapsed:.1f} s were not enough: the {pool.plan.role} node's task "
                        f"{task.id} is {task.status or 'in an unknown state'}"
                    )
            if not waiting:
                break
            if checks.due():
                self._say_waiting("task to execute", waiting, operation)
                for pool in waiting:
                    crew.start(partial(self._check_node, pool, operation))
            pause.sleep()
        time.sleep(SETTLE_SECONDS)
        self._ask(pools, lambda pool: self._look(pool, operation))

    def _ask(
        self, pools: Sequence[BuiltPool], question: Callable[[BuiltPool], _T]
    ) -> list[tuple[BuiltPool, _T]]:
        """Ask the same about several pools at once."""
        if len(pools) == 1:
            return [(pools[0], question(pools[0]))]
        asking = [(pool, self.platform.submit(partial(question, pool))) for pool in pools]
        return [(pool, asked.result()) for pool, asked in asking]

    def _registered(self, pool: BuiltPool) -> None:
        self.emit(
            events.NodeRegistered(
                self.cluster.name, pool.plan.role, str(pool.node_id), str(pool.private_ip), pool.public_ip
            )
        )

    def _say_waiting(self, what: str, pools: Sequence[BuiltPool], operation: Operation) -> None:
        roles = " and the ".join(pool.plan.role for pool in pools)
        self.emit(events.Waiting(self.cluster.name, f"the {roles} {what}", operation.elapsed))

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
        self._check_pool(pool, "node's task cannot run", operation)

    def _check_pool(self, pool: BuiltPool, what: str, operation: Operation) -> None:
        """Raise where a pool gives no more nodes."""
        reason = self.platform.why_no_nodes(str(pool.id), pool.plan.name, operation)
        if reason is not None:
            raise BuildError(f"the {pool.plan.role} {what}: {reason}")


def _removed_meanwhile(pool: BuiltPool) -> ClusterStateError:
    return ClusterStateError(f"the worker pool {pool.plan.internal_name!r} has been removed meanwhile")


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
