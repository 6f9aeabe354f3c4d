"""The only room that talks to YellowDog: create or adopt, submit, and watch.

Every creation is by a name that is known beforehand. An answer that was lost is followed by a look-up of
that name, and what stands there is adopted where it is what this build asked for.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from yellowdog_ray.errors import (
    BuildError,
    NameTakenError,
    NotFoundError,
    PlatformError,
    PlatformUnreachableError,
    RayDogError,
)
from yellowdog_ray.raydog import plan
from yellowdog_ray.raydog.plan import PoolPlan
from yellowdog_ray.raydog.specs import ClusterSpec, Credentials
from yellowdog_ray.raydog.threads import Threads
from yellowdog_ray.raydog.transport import (
    CONNECTIONS,
    NOT_YET_SECONDS,
    Operation,
    Transport,
    already_exists,
    already_gone,
    refused,
    transient,
)

if TYPE_CHECKING:
    from yellowdog_client import PlatformClient
    from yellowdog_client.model import (
        ComputeRequirement,
        ComputeRequirementSummary,
        Node,
        ProvisionedWorkerPool,
        Task,
        TaskGroup,
        WorkerPoolSummary,
        WorkRequirement,
    )

__all__ = ["Build", "Platform"]

log = logging.getLogger(__name__)

_T = TypeVar("_T")

# One connection is left for the caller's own thread.
THREADS = CONNECTIONS - 1
# For how long after it was sent a creating call may still be carried out whose answer there was no time for.
UNANSWERED_SECONDS = 10.0


@dataclass
class Build:
    """What is needed to recognise what a build has created, although an answer was lost.

    :param id: a random text that what it creates is tagged with.
    :param begun: when it began, by the platform's clock; None where that is not known any more.
    :param sent: the names of what a creating call was sent for and not refused: under these there may be
        something on the platform, even where its id never came.
    :param late_until: until when (monotonic) what was sent may come into being, where there was no time to
        wait for the answer.
    """

    id: str
    begun: datetime | None = None
    sent: set[str] = field(default_factory=set)
    late_until: float = 0.0

    def made(self, tag: str | None, created: datetime | None) -> bool:
        """Tell by its tag whether this build created a thing.

        The API's documentation does not promise that an instance tag can be read back. Where there is
        none, the time of creation decides, which cannot tell two builds apart that run at once.
        """
        if tag is not None:
            return tag == self.id
        return self.begun is None or (created is not None and created >= self.begun)


@dataclass(frozen=True)
class _Named:
    kind: str
    namespace: str
    name: str


class Platform:
    """YellowDog, as far as a cluster needs it. It does nothing until it is first called.

    :param credentials: the application key and the API.
    :param on_retry: called with what a call does, and why it is tried again.
    """

    def __init__(self, credentials: Credentials, on_retry: Callable[[str, str], None] | None = None) -> None:
        self._transport = Transport(credentials, on_retry)
        self._threads = Threads(THREADS, "raydog")

    @property
    def client(self) -> PlatformClient:
        """The YellowDog SDK's client."""
        return self._transport.client

    @property
    def host(self) -> str:
        """The API's host."""
        return self._transport.credentials.host

    def now(self) -> datetime:
        """Tell the time by the platform's clock."""
        return self._transport.now()

    def submit(self, function: Callable[[], _T]) -> Future[_T]:
        """Run a function in one of the platform's threads; see :meth:`.Threads.submit`."""
        return self._threads.submit(function)

    def close(self, wait: bool = True) -> None:
        """Close the connections and end the threads. Both come back when they are next needed.

        :param wait: whether to wait for the calls that are under way.
        """
        self._threads.close(wait)
        self._transport.close()

    def call(
        self, what: str, function: Callable[[], _T], operation: Operation, *, may_be_missing: bool = False
    ) -> _T:
        """Make a call and outlive its transient faults; see :meth:`Transport.call`."""
        return self._transport.call(what, function, operation, may_be_missing=may_be_missing)

    # -- reading ---------------------------------------------------------------------------------------

    def check_template(self, template: str, operation: Operation) -> None:
        """Make sure that a compute requirement template can be read, and thereby the credentials.

        :raises NotFoundError: where the platform does not know it.
        """
        compute = self.client.compute_client
        namespace, slash, name = template.partition("/")

        def read() -> object:
            if slash:
                return compute.get_compute_requirement_template_by_name(namespace, name)
            return compute.get_compute_requirement_template_by_id(template)

        try:
            self.call(f"read the compute requirement template {template}", read, operation)
        except NotFoundError as error:
            raise NotFoundError(
                f"the platform knows no compute requirement template {template!r}, or this application key "
                f"may not see it; nothing has been created",
                404,
            ) from error

    def work_requirement(
        self, work_requirement_id: str, operation: Operation, *, may_be_missing: bool = False
    ) -> WorkRequirement:
        """Read a work requirement with its task groups and the counts of their tasks."""
        work = self.client.work_client
        return self.call(
            f"read the work requirement {work_requirement_id}",
            lambda: work.get_work_requirement_by_id(work_requirement_id),
            operation,
            may_be_missing=may_be_missing,
        )

    def task(self, task_id: str, operation: Operation) -> Task:
        """Read a task."""
        work = self.client.work_client
        return self.call(f"read the task {task_id}", lambda: work.get_task_by_id(task_id), operation)

    def tasks(self, group_id: str, operation: Operation, statuses: Iterable[Any] | None = None) -> list[Task]:
        """List a task group's tasks, of some statuses or all."""
        from yellowdog_client.model import TaskSearch

        search = TaskSearch(taskGroupId=group_id, statuses=None if statuses is None else list(statuses))
        work = self.client.work_client
        return self.call(
            f"list the tasks of {group_id}", lambda: work.get_tasks(search).list_all(), operation
        )

    def nodes(self, pool_id: str, operation: Operation) -> list[Node]:
        """List the nodes that have registered in a pool, gone ones too."""
        from yellowdog_client.model import NodeSearch

        search = NodeSearch(workerPoolId=pool_id)
        workers = self.client.worker_pool_client
        return self.call(
            f"list the nodes of {pool_id}", lambda: workers.get_nodes(search).list_all(), operation
        )

    def pool(self, pool_id: str, operation: Operation) -> ProvisionedWorkerPool:
        """Read a worker pool, which may be missing."""
        workers = self.client.worker_pool_client
        pool: Any = self.call(
            f"read the worker pool {pool_id}",
            lambda: workers.get_worker_pool_by_id(pool_id),
            operation,
            may_be_missing=True,
        )
        return pool  # type: ignore[no-any-return]

    def compute(self, compute_requirement_id: str, operation: Operation) -> ComputeRequirement:
        """Read a compute requirement, which may be missing."""
        compute = self.client.compute_client
        return self.call(
            f"read the compute requirement {compute_requirement_id}",
            lambda: compute.get_compute_requirement_by_id(compute_requirement_id),
            operation,
            may_be_missing=True,
        )

    def pool_summaries(self, namespace: str, name: str, operation: Operation) -> dict[str, WorkerPoolSummary]:
        """List the worker pools that have a text in their names, by their ids."""
        from yellowdog_client.model import WorkerPoolSearch

        search = WorkerPoolSearch(namespaces=[namespace], name=name)
        workers = self.client.worker_pool_client
        found = self.call(
            f"list the worker pools {name}*", lambda: workers.get_worker_pools(search).list_all(), operation
        )
        return {pool.id: pool for pool in found if pool.id is not None}

    def compute_summaries(
        self, namespace: str, name: str, operation: Operation
    ) -> dict[str, ComputeRequirementSummary]:
        """List the compute requirements that have a text in their names, by their ids."""
        from yellowdog_client.model import ComputeRequirementSummarySearch

        search = ComputeRequirementSummarySearch(namespaces=[namespace], name=name)
        compute = self.client.compute_client
        found = self.call(
            f"list the compute requirements {name}*",
            lambda: compute.get_compute_requirement_summaries(search).list_all(),
            operation,
        )
        return {requirement.id: requirement for requirement in found if requirement.id is not None}

    def find_pool(self, namespace: str, name: str, operation: Operation) -> ProvisionedWorkerPool | None:
        """Look for a worker pool by its name."""
        workers = self.client.worker_pool_client
        pool: Any = self._find(
            f"look for the worker pool {name}",
            lambda: workers.get_worker_pool_by_name(namespace, name),
            operation,
        )
        return pool  # type: ignore[no-any-return]

    def find_compute(self, namespace: str, name: str, operation: Operation) -> ComputeRequirement | None:
        """Look for a compute requirement by its name."""
        compute = self.client.compute_client
        return self._find(
            f"look for the compute requirement {name}",
            lambda: compute.get_compute_requirement_by_name(namespace, name),
            operation,
        )

    def find_work_requirement(
        self, namespace: str, name: str, operation: Operation
    ) -> WorkRequirement | None:
        """Look for a work requirement by its name."""
        work = self.client.work_client
        return self._find(
            f"look for the work requirement {name}",
            lambda: work.get_work_requirement_by_name(namespace, name),
            operation,
        )

    def _find(self, what: str, function: Callable[[], _T], operation: Operation) -> _T | None:
        try:
            return self.call(what, function, operation, may_be_missing=True)
        except NotFoundError:
            return None

    # -- creating --------------------------------------------------------------------------------------

    def create_pool(
        self,
        cluster: ClusterSpec,
        pool: PoolPlan,
        lifetime: timedelta | None,
        idle: timedelta,
        build: Build,
        operation: Operation,
    ) -> ProvisionedWorkerPool:
        """Provision a pool, or adopt it where an earlier try of ours did so and its answer was lost.

        :param idle: see :func:`.plan.pool_request`.
        :raises NameTakenError: where something else has the pool's name.
        """
        usage, properties = plan.pool_request(cluster, pool, lifetime, build.id, idle)
        workers = self.client.worker_pool_client
        return self._create(
            f"provision the worker pool {pool.name}",
            lambda: workers.provision_worker_pool(usage, properties),
            lambda: self.find_pool(cluster.namespace, pool.name, operation),
            lambda found: self.is_our_pool(found, build, operation),
            _Named("worker pool", cluster.namespace, pool.name),
            build,
            operation,
        )

    def create_work_requirement(
        self,
        cluster: ClusterSpec,
        pools: list[PoolPlan],
        lifetime: timedelta | None,
        build: Build,
        operation: Operation,
    ) -> WorkRequirement:
        """Add the cluster's work requirement, or adopt it; see :meth:`create_pool`."""
        requirement = plan.work_requirement(cluster, pools, lifetime, build.id)
        work = self.client.work_client
        return self._create(
            f"add the work requirement {cluster.name}",
            lambda: work.add_work_requirement(requirement),
            lambda: self.find_work_requirement(cluster.namespace, cluster.name, operation),
            lambda found: is_our_work_requirement(found, build),
            _Named("work requirement", cluster.namespace, cluster.name),
            build,
            operation,
        )

    def _create(
        self,
        what: str,
        post: Callable[[], _T],
        find: Callable[[], _T | None],
        is_ours: Callable[[_T], bool],
        named: _Named,
        build: Build,
        operation: Operation,
    ) -> _T:
        first_seen: float | None = None

        def attempt() -> _T:
            nonlocal first_seen
            # Noted before it is sent: whatever ends us from here on, the name will be looked up. And before
            # we look whether to stop: who says so then finds the name, or can be sure that nothing is sent.
            doubtful = named.name in build.sent
            build.sent.add(named.name)
            if operation.cancelled.is_set():
                if not doubtful:
                    build.sent.discard(named.name)
                raise BuildError(f"it was stopped before the call to {what}")
            until = time.monotonic() + UNANSWERED_SECONDS
            try:
                return post()
            except Exception as error:
                if operation.expired and getattr(error, "response", None) is None:
                    build.late_until = max(build.late_until, until)
                if refused(error):
                    if not doubtful:
                        build.sent.discard(named.name)
                    if not already_exists(error):
                        raise
                found = find()
                # Where every call of ours was refused, what is there cannot have come from one of them.
                if found is not None and named.name in build.sent and is_ours(found):
                    log.info("The answer to the call to %s was lost; what it created was found", what)
                    return found
                if found is None and already_exists(error):
                    # What stands there is not known everywhere yet: it may be what an earlier try created.
                    first_seen = first_seen or time.monotonic()
                    if doubtful and time.monotonic() - first_seen < NOT_YET_SECONDS:
                        raise PlatformUnreachableError(f"{named.name} exists, but cannot be found") from error
                status = getattr(found, "status", None)
                over = status is not None and status.finished
                if already_exists(error) or (found is not None and not over):
                    raise _name_taken(named, found, error) from error
                # What has ended need not be in the way: whether it is, the next try tells.
                raise

        return self.call(what, attempt, operation)

    def add_task_group(self, work_requirement_id: str, group: TaskGroup, operation: Operation) -> TaskGroup:
        """Append a task group to a work requirement; the caller sees to it that only one does so at a time.

        The whole work requirement is read, changed and written back: the platform has no other way, and
        the last writer wins. A group of this name that is already there was appended by an earlier try.
        """
        work = self.client.work_client

        def attempt() -> TaskGroup:
            present = work.get_work_requirement_by_id(work_requirement_id)
            found = _group(present, group.name)
            if found is None:
                present.taskGroups = [*(present.taskGroups or []), group]
                found = _group(work.update_work_requirement(present), group.name)
            if found is None:
                raise PlatformError(f"the platform did not keep the task group {group.name}")
            return found

        return self.call(f"add the task group {group.name}", attempt, operation)

    def add_tasks(self, group_id: str, batch: list[Task], operation: Operation) -> list[Task]:
        """Add named tasks to a group; those that an earlier try has added already are not added again."""
        work = self.client.work_client
        wanted = {task.name for task in batch}
        missing = list(batch)
        found: list[Task] = []

        def attempt() -> list[Task]:
            nonlocal missing, found
            try:
                return found + work.add_tasks_to_task_group_by_id(group_id, missing)
            except Exception as error:
                if not transient(error) and not already_exists(error):
                    raise
                found = [task for task in self.tasks(group_id, operation) if task.name in wanted]
                there = {task.name for task in found}
                missing = [task for task in batch if task.name not in there]
                if missing:
                    raise
                return found

        return self.call(f"add {len(batch)} tasks to {group_id}", attempt, operation)

    def cancel_task(self, task_id: str, operation: Operation) -> None:
        """Cancel a task, and abort it where it is executing."""
        work = self.client.work_client
        self.call(
            f"cancel the task {task_id}",
            lambda: work.cancel_task_by_id(task_id, abort=True),
            operation,
        )

    def resize_pool(self, pool_id: str, size: int, operation: Operation) -> None:
        """Give a pool another number of nodes."""
        workers = self.client.worker_pool_client
        self.call(
            f"resize the worker pool {pool_id} to {size}",
            lambda: workers.resize_worker_pool_by_id(pool_id, size),
            operation,
        )

    def shut_down_node(self, node_id: str, operation: Operation) -> None:
        """Shut a node down when its running tasks have ended; one that is gone already is no error."""
        workers = self.client.worker_pool_client
        try:
            self.call(
                f"shut the node {node_id} down",
                lambda: workers.shutdown_node_by_id(node_id),
                operation,
            )
        except RayDogError as error:
            if not already_gone(error):
                raise

    # -- judging ---------------------------------------------------------------------------------------

    def is_our_pool(self, found: ProvisionedWorkerPool, build: Build, operation: Operation) -> bool:
        """Tell whether a pool that stands under our name is the one that a build asked for."""
        properties = found.properties
        if properties is None or properties.workerTag != found.name:
            return False
        if found.computeRequirementId is not None:
            # The pool itself has nothing to bear the build's id.
            try:
                return is_our_compute(self.compute(found.computeRequirementId, operation), build)
            except NotFoundError:
                pass
        return build.made(None, found.createdTime)

    def why_no_nodes(self, pool_id: str, name: str, operation: Operation) -> str | None:
        """Tell why a pool cannot give nodes any more; None where it still can."""
        try:
            pool = self.pool(pool_id, operation)
        except NotFoundError:
            return f"the worker pool {name} is gone"
        reasons = []
        if pool.computeRequirementId:
            try:
                reason = compute_failure(self.compute(pool.computeRequirementId, operation))
            except NotFoundError:
                reason = "it is gone"
            if reason:
                reasons.append(f"its compute requirement cannot provide instances: {reason}")
        if pool.status is not None and pool.status.finished:
            reasons.append(f"it is {pool.status}")
        return (
            f"the worker pool {name} gives no more nodes: {'; '.join(reversed(reasons))}" if reasons else None
        )


def group_ids(requirement: WorkRequirement) -> dict[str, str]:
    """Map the names of a work requirement's task groups to their ids."""
    groups = {group.name: group.id for group in requirement.taskGroups or [] if group.id}
    return {name: identifier for name, identifier in groups.items() if identifier}


def _group(requirement: WorkRequirement, name: str) -> TaskGroup | None:
    return next((group for group in requirement.taskGroups or [] if group.name == name), None)


def is_our_compute(found: ComputeRequirement, build: Build) -> bool:
    """Tell whether a compute requirement that stands under our name is the one that a build asked for."""
    sources: list[Any] = list(getattr(found.provisionStrategy, "sources", None) or [])
    tags = (getattr(source, "instanceTags", None) or {} for source in sources)
    tag = next((its[plan.BUILD_TAG] for its in tags if plan.BUILD_TAG in its), None)
    return build.made(tag, found.createdTime)


def is_our_work_requirement(found: WorkRequirement, build: Build) -> bool:
    """Tell whether a work requirement that stands under our name is the one that a build asked for."""
    head = _group(found, plan.HEAD_GROUP)
    return head is not None and build.made(head.tag, found.createdTime)


def _name_taken(named: _Named, found: Any, error: Exception) -> NameTakenError:
    if found is None:
        stands = f"the platform says: {error}"
    else:
        stands = f"{found.id} ({found.status or 'in an unknown state'}), created {found.createdTime}"
    over = found is not None and found.status is not None and found.status.finished
    advice = "that one has ended, and its name is not free again" if over else "or end that one"
    return NameTakenError(
        f"there already is a {named.kind} {named.name!r} in the namespace {named.namespace!r} that this "
        f"build did not create: {stands}. Use another cluster_name{':' if over else ','} {advice}"
    )


def compute_failure(compute: ComputeRequirement) -> str | None:
    """Tell why a compute requirement cannot provide instances any more; None where it still can."""
    from yellowdog_client.model import ComputeRequirementStatus, ComputeSourceStatus

    sources: list[Any] = list(getattr(compute.provisionStrategy, "sources", None) or [])
    errored = [source for source in sources if source.status is ComputeSourceStatus.ERRORED]
    messages = [f"{source.name}: {source.statusMessage or 'no message'}" for source in errored]
    # Where one of several sources has failed, the others may still deliver.
    if sources and len(errored) == len(sources):
        return f"every source is ERRORED ({'; '.join(messages)})"
    over = (
        ComputeRequirementStatus.TERMINATING,
        ComputeRequirementStatus.TERMINATED,
        ComputeRequirementStatus.STOPPED,
    )
    if compute.status in over:
        return f"it is {compute.status}{f' ({chr(59).join(messages)})' if messages else ''}"
    return None


def task_failure(task: Task, what: str, node_ip: str | None) -> BuildError:
    """Put into words that a task has ended: how, why, and where its output is or was."""
    error = task.errors[-1] if task.errors else None
    code = (
        f" with exit code {error.processExitCode}"
        if error is not None and error.processExitCode is not None
        else ""
    )
    text = error.error.strip() if error is not None else "the platform gives no reason"
    message = f"{what} {task.name!r} ({task.id}) ended {task.status}{code}: {text}"
    if "\n" not in text and task.id:
        place = task.id.replace(":", "_")
        message += (
            f"\nIts output was in $YD_AGENT_DATA/workers/{place}/taskoutput.txt on the node "
            f"{node_ip or task.nodeId or 'that ran it'}; the agent deletes it when the task ends"
        )
    return BuildError(message)
