"""From what is asked for to the objects that are to be created: pure, no clock, no network.

The SDK is imported inside the functions, so that importing this module costs nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Literal

from yellowdog_ray.errors import SpecError
from yellowdog_ray.raydog.specs import (
    HEAD_SUFFIX,
    MAX_NAME,
    MAX_NODES,
    MAX_TASK_GROUPS,
    OBSERVABILITY_SUFFIX,
    ClusterSpec,
    NodeSpec,
    WorkerPoolSpec,
)

if TYPE_CHECKING:
    from yellowdog_client.model import (
        ComputeRequirementTemplateUsage,
        ProvisionedWorkerPoolProperties,
        Task,
        TaskGroup,
        WorkRequirement,
    )

__all__ = [
    "BUILD_TAG",
    "HEAD_GROUP",
    "MAX_ALLOCATION_RETRIES",
    "MAX_BUILD",
    "NODE_IDLE_TIMEOUT",
    "OBSERVABILITY_GROUP",
    "POOL_IDLE_TIMEOUT",
    "TASK_BATCH",
    "TASK_TYPE",
    "PoolPlan",
    "Role",
    "environment",
    "head_pool",
    "observability_pool",
    "pool_idle_timeout",
    "pool_request",
    "task_batches",
    "task_group",
    "task_name",
    "work_requirement",
    "worker_pool",
]

Role = Literal["head", "observability", "worker"]

HEAD_GROUP = "head-node"
OBSERVABILITY_GROUP = "observability-node"
TASK_TYPE = "bash"
# The agent writes a task's data to this file and runs `/bin/bash taskdata.txt`.
TASK_ARGUMENTS = ("taskdata.txt",)
# No maximum is published; the vendor's command line client sends so many in one call.
TASK_BATCH = 1000

# How often a worker's task is run again, on a replacement node, after its node was lost or preempted.
MAX_ALLOCATION_RETRIES = 20

# A node without a task is given back after this time. It is longer than any head takes to boot, and even
# where it is not, no worker is lost: the pool lives on, and the platform boots new nodes as soon as there
# are tasks. It is what ends the nodes (and their cost) when the head is gone, or its task never came, and
# no client is alive to notice.
NODE_IDLE_TIMEOUT = timedelta(minutes=30)
# A pool without a busy node ends after this time, for good. So it has to be longer than any pool waits for
# its head: a build waits MAX_BUILD at most, and has a longer idle timeout where it is allowed to take longer.
POOL_IDLE_TIMEOUT = timedelta(hours=12)
MAX_BUILD = timedelta(hours=11)

# Every build has a random id, by which it recognises what it has created although an answer was lost:
# this instance tag of its pools, and the tag of the head's task group.
BUILD_TAG = "raydog-build"


@dataclass(frozen=True)
class PoolPlan:
    """One pool, its task group and its tasks, with every name that they will have.

    :param name: the name of the pool, of its compute requirement, and its worker tag.
    :param group: the name of its task group.
    :param internal_name: what the user calls it.
    :param script: the Bash text that its tasks run; not in the ``repr``, for it may hold a secret.
    """

    role: Role
    name: str
    group: str
    internal_name: str
    node: NodeSpec
    node_count: int
    script: str = field(repr=False)


def head_pool(cluster: ClusterSpec, script: str) -> PoolPlan:
    """Plan the head node's pool."""
    name = cluster.name + HEAD_SUFFIX
    return PoolPlan("head", name, HEAD_GROUP, HEAD_GROUP, cluster.head, 1, script)


def observability_pool(cluster: ClusterSpec, node: NodeSpec, script: str) -> PoolPlan:
    """Plan the observability node's pool."""
    name = cluster.name + OBSERVABILITY_SUFFIX
    return PoolPlan("observability", name, OBSERVABILITY_GROUP, OBSERVABILITY_GROUP, node, 1, script)


def worker_pool(cluster: ClusterSpec, number: int, pool: WorkerPoolSpec, script: str) -> PoolPlan:
    """Plan a worker pool.

    :param number: counts the cluster's worker pools from 1; never used twice in a cluster.
    :raises SpecError: where the platform's limits leave no room for one more.
    """
    groups_before = number + (1 if cluster.observability is None else 2) - 1
    if groups_before >= MAX_TASK_GROUPS:
        raise SpecError(
            f"a cluster has room for {MAX_TASK_GROUPS} task groups, removed worker pools included "
            f"(YellowDog's limit for a work requirement); use a new cluster"
        )
    name = f"{cluster.name}-{number:02d}-wrkrs"
    if len(name) > MAX_NAME:
        raise SpecError(
            f"the worker pool's name {name!r} has {len(name)} characters; YellowDog allows {MAX_NAME}"
        )
    group = f"worker-nodes-{number:02d}"
    return PoolPlan("worker", name, group, pool.internal_name or group, pool.node, pool.node_count, script)


def pool_idle_timeout(build_timeout: timedelta | None) -> timedelta:
    """Tell after which time without a busy node the platform is to end a pool.

    :param build_timeout: how long the pool may wait for its head; None for :data:`MAX_BUILD`.
    """
    return max(POOL_IDLE_TIMEOUT, (build_timeout or MAX_BUILD) + (POOL_IDLE_TIMEOUT - MAX_BUILD))


def pool_request(
    cluster: ClusterSpec, pool: PoolPlan, lifetime: timedelta | None, build_id: str, idle: timedelta
) -> tuple[ComputeRequirementTemplateUsage, ProvisionedWorkerPoolProperties]:
    """Make the request that provisions a pool.

    :param lifetime: what is left of the cluster's lifetime: the platform terminates the compute
        requirement after it, whether or not a client is alive. None for no limit.
    :param build_id: the build that asks for it, see :data:`BUILD_TAG`.
    :param idle: after which time without a busy node the platform ends the pool.
    """
    from yellowdog_client.model import (
        AutoShutdown,
        ComputeRequirementTemplateUsage,
        NodeWorkerTarget,
        ProvisionedWorkerPoolProperties,
    )

    usage = ComputeRequirementTemplateUsage(
        templateId=pool.node.template,
        requirementName=pool.name,
        requirementNamespace=cluster.namespace,
        requirementTag=cluster.tag,
        targetInstanceCount=pool.node_count,
        imagesId=pool.node.images_id,
        userData=pool.node.userdata,
        instanceTags={**(pool.node.instance_tags or {}), BUILD_TAG: build_id},
        autoShutdown=None if lifetime is None else AutoShutdown(enabled=True, timeout=lifetime),
    )
    properties = ProvisionedWorkerPoolProperties(
        createNodeWorkers=NodeWorkerTarget.per_node(1),
        minNodes=0,
        # Only a worker pool can be scaled. The platform boots no more nodes than there are tasks.
        maxNodes=MAX_NODES if pool.role == "worker" else 1,
        # Said explicitly: where it is left out, the platform ends a pool that has been idle for ten
        # minutes, and for good; a pool whose nodes boot faster than the head's would be lost.
        idlePoolShutdown=AutoShutdown(enabled=True, timeout=idle),
        idleNodeShutdown=AutoShutdown(enabled=True, timeout=NODE_IDLE_TIMEOUT),
        workerTag=pool.name,
        metricsEnabled=pool.node.metrics_enabled,
    )
    return usage, properties


def task_group(cluster: ClusterSpec, pool: PoolPlan, lifetime: timedelta | None) -> TaskGroup:
    """Make a pool's task group; the script goes in here once, for all of its tasks."""
    from yellowdog_client.model import (
        RetryPolicy,
        RunSpecification,
        Selection,
        TaskErrorSelector,
        TaskErrorType,
        TaskGroup,
        TaskTemplate,
    )

    run = RunSpecification(
        taskTypes=[TASK_TYPE],
        taskTimeout=lifetime,
        workerTags=[pool.name],
        namespaces=[cluster.namespace],
        tasksPerWorker=1,
        # One endless task a node: a task that is queued behind another one would never run.
        disablePreallocation=True,
    )
    if pool.role == "worker":
        lost = TaskErrorSelector(errorTypes=Selection(includes=[TaskErrorType.ALLOCATION_LOST]))
        run.retryPolicy = RetryPolicy(
            maxRetries=MAX_ALLOCATION_RETRIES, retryErrors=Selection(includes=[lost])
        )
    else:
        run.maxWorkers = 1
    return TaskGroup(
        name=pool.group,
        runSpecification=run,
        tag=cluster.tag,
        # A worker group outlives its tasks, so that tasks can be added to it. The head's and the
        # observability node's end with their one task: a head on another node has another address,
        # so that running it again would help nobody.
        finishIfAllTasksFinished=pool.role != "worker",
        finishIfAnyTaskFailed=pool.role != "worker",
        taskTemplate=TaskTemplate(taskType=TASK_TYPE, taskData=pool.script),
    )


def work_requirement(
    cluster: ClusterSpec, pools: Sequence[PoolPlan], lifetime: timedelta | None, build_id: str
) -> WorkRequirement:
    """Make the cluster's work requirement, with one task group for each pool and no tasks yet.

    :param build_id: the build that asks for it: the tag of the head's task group.
    """
    from yellowdog_client.model import WorkRequirement

    groups = [task_group(cluster, pool, lifetime) for pool in pools]
    for group in groups:
        if group.name == HEAD_GROUP:
            group.tag = build_id
    return WorkRequirement(
        namespace=cluster.namespace,
        name=cluster.name,
        taskGroups=groups,
        tag=cluster.tag,
    )


def environment(
    role: Role,
    *,
    head_ip: str,
    node_ip: str | None,
    observability_ip: str | None,
    token: str | None,
    direct: bool = False,
) -> dict[str, str]:
    """Make the complete environment of a task.

    Whether the platform merges a task's environment with its group's is not documented, so all of it
    goes in one place, the task. Anyone who may read the cluster's tasks on the platform can read the
    Ray token in it; it protects this one cluster only and ends with it.

    :param head_ip: the head's private address. The head itself gets it as ``RAYDOG_NODE_IP`` only: scripts
        in the field tell a worker by ``RAY_HEAD_IP`` being set.
    :param node_ip: the node's own private address, where it is known before its task runs.
    :param token: the cluster's Ray token, None where Ray's authentication is off.
    :param direct: whether the cluster's user connects to the dashboard at the head's own address. It can be
        reached there only where the token protects it.
    """
    variables: dict[str, str] = {}
    if role != "head":
        variables["RAY_HEAD_IP"] = head_ip
        variables["RAY_HEAD_NODE_PRIVATE_IP"] = head_ip
    if node_ip is not None:
        variables["RAYDOG_NODE_IP"] = node_ip
    if observability_ip is not None:
        variables["OBSERVABILITY_HOST"] = observability_ip
    if token is not None:
        variables["RAY_AUTH_MODE"] = "token"
        variables["RAY_AUTH_TOKEN"] = token
        if direct and role == "head":
            variables["RAYDOG_DASHBOARD_DIRECT"] = "1"
    return variables


def task_name(pool: PoolPlan, number: int) -> str:
    """Name a pool's task; ``number`` counts from 1.

    Every task has a name, so that a call whose answer was lost can be repeated without doing it twice.
    """
    return pool.group if pool.role != "worker" else f"{pool.group}-{number:05d}"


def task_batches(
    pool: PoolPlan, variables: Mapping[str, str], first: int = 1, count: int | None = None
) -> Iterator[list[Task]]:
    """Make a pool's tasks in batches that one call can carry.

    :param first: the number of the first of them.
    :param count: how many; None for one for each of the pool's nodes.
    """
    from yellowdog_client.model import Task

    end = first + (pool.node_count if count is None else count)
    for start in range(first, end, TASK_BATCH):
        yield [
            Task(name=task_name(pool, number), arguments=list(TASK_ARGUMENTS), environment=dict(variables))
            for number in range(start, min(start + TASK_BATCH, end))
        ]
