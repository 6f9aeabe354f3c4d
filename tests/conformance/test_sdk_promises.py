"""What a run specification, a task group and a pool ask for over the SDK is carried out, to the second.

The scheduler's own tests have every case of it; here it comes by the SDK's model, and is looked at by it.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
from yellowdog_client import PlatformClient
from yellowdog_client import model as m

from tests.conformance.test_sdk import connect
from tests.controlplane import Served, serve

BOOT = 60


class Lab:
    """A platform whose clock is moved by hand, and a client of it."""

    def __init__(self, platform: Served, client: PlatformClient) -> None:
        self.platform, self.client = platform, client

    def pool(self, nodes: int, **properties: Any) -> m.ProvisionedWorkerPool:
        """Provision a pool whose nodes have one worker each; they boot, unless they cannot."""
        usage = m.ComputeRequirementTemplateUsage("test/small", "pool", "test", targetInstanceCount=nodes)
        workers = m.NodeWorkerTarget.per_node(1)
        wish = m.ProvisionedWorkerPoolProperties(workerTag="pool", createNodeWorkers=workers, **properties)
        pool = self.client.worker_pool_client.provision_worker_pool(usage, wish)
        self.platform.advance(BOOT)
        return pool

    def submit(self, *groups: m.TaskGroup, tasks: int) -> m.WorkRequirement:
        """Submit groups, and add tasks to the first, which run until they are ended."""
        wish = m.WorkRequirement("test", "work", list(groups))
        work = self.client.work_client.add_work_requirement(wish)
        self.add(work, tasks)
        return work

    def add(self, work: m.WorkRequirement, tasks: int) -> None:
        self.client.work_client.add_tasks_to_task_group(work.taskGroups[0], [m.Task() for _ in range(tasks)])
        self.platform.advance(1)

    def tasks(self, work: m.WorkRequirement, group: int = 0) -> list[m.Task]:
        search = m.TaskSearch(taskGroupId=work.taskGroups[group].id)
        return list(self.client.work_client.get_tasks(search).list_all())

    def statuses(self, work: m.WorkRequirement, group: int = 0) -> list[str]:
        """List the statuses of a group's tasks, in the order in which they were added."""
        return [str(task.status) for task in self.tasks(work, group)]

    def group(self, work: m.WorkRequirement, group: int = 0) -> str:
        found = self.client.work_client.get_work_requirement_by_id(work.id)
        return str(found.taskGroups[group].status)

    def claimed(self, pool: m.ProvisionedWorkerPool) -> int:
        found = self.client.worker_pool_client.get_worker_pool_by_id(pool.id)
        return found.workerSummary.claimedWorkerCount

    def nodes(self) -> dict[str, int]:
        """Count the nodes by their statuses."""
        found: dict[str, int] = {}
        for node in self.client.worker_pool_client.get_nodes(m.NodeSearch()).list_all():
            found[str(node.status)] = found.get(str(node.status), 0) + 1
        return found

    def kill(self, task: m.Task) -> None:
        self.platform.faults.kill_task(task.id)


@pytest.fixture
def lab() -> Iterator[Lab]:
    with (
        serve(clock="virtual", boot_delay=BOOT, start_delay=0, stop_delay=1) as platform,
        connect(platform) as client,
    ):
        yield Lab(platform, client)


def group(name: str = "group", failure: m.FailurePolicy | None = None, **run: Any) -> m.TaskGroup:
    return m.TaskGroup(name, m.RunSpecification(["bash"], failurePolicy=failure, **run))


def test_min_workers(lab: Lab) -> None:
    """A group with minWorkers holds the workers that it has until there are as many, and starts then."""
    pool = lab.pool(2, maxNodes=3)
    work = lab.submit(group(minWorkers=3, workerTags=["pool"]), tasks=1)
    assert (lab.statuses(work), lab.group(work), lab.claimed(pool)) == (["READY"], "PENDING", 2)
    # The third node has come because of it, though one task alone would have needed none.
    lab.platform.advance(BOOT)
    assert (lab.statuses(work), lab.group(work), lab.claimed(pool)) == (["EXECUTING"], "RUNNING", 3)


@pytest.mark.parametrize(
    ("run", "claimed"),
    [({}, 4), ({"maxWorkers": 2}, 2), ({"tasksPerWorker": 2}, 2), ({"tasksPerWorker": 3}, 2)],
)
def test_how_many_workers(lab: Lab, run: dict[str, int], claimed: int) -> None:
    """Of four workers a group with four tasks takes maxWorkers, or as many as tasksPerWorker asks for."""
    pool = lab.pool(4)
    work = lab.submit(group(workerTags=["pool"], **run), tasks=4)
    assert lab.claimed(pool) == claimed
    assert lab.statuses(work).count("EXECUTING") == claimed


def test_idle_node_shutdown(lab: Lab) -> None:
    """Nodes end after their idle time, but for minNodes of them, and those that work."""
    hour = m.AutoShutdown(enabled=True, timeout=timedelta(hours=1))
    lab.pool(3, maxNodes=3, minNodes=1, idleNodeShutdown=hour, idlePoolShutdown=m.AutoShutdown(enabled=False))
    work = lab.submit(group(workerTags=["pool"]), tasks=2)
    lab.platform.advance(3600 - 2)
    assert lab.nodes() == {"RUNNING": 3}
    lab.platform.advance(2)
    assert lab.nodes() == {"RUNNING": 2, "TERMINATED": 1}
    for task in lab.tasks(work):
        lab.kill(task)
    lab.platform.advance(3600 - 1)
    assert lab.nodes() == {"RUNNING": 2, "TERMINATED": 1}
    lab.platform.advance(3)
    assert lab.nodes() == {"RUNNING": 1, "TERMINATED": 2}


def test_node_boot_timeout(lab: Lab) -> None:
    """A machine that boots for longer than its pool lets it is ended, and its source says why."""
    pool = lab.pool(1, nodeBootTimeout=timedelta(seconds=BOOT - 20))
    assert lab.nodes() == {}
    requirement = lab.client.compute_client.get_compute_requirement_by_id(pool.computeRequirementId)
    (source,) = requirement.provisionStrategy.sources
    assert (str(source.status), requirement.expectedInstanceCount) == ("ERRORED", 0)
    assert "no agent registered within 40 s" in source.statusMessage


@pytest.mark.parametrize("finish", [True, False])
def test_finish_if_any_task_failed(lab: Lab, finish: bool) -> None:
    """A group that is to end with its first failed task discards those that wait, and lets the others run."""
    lab.pool(2)
    wish = group(workerTags=["pool"])
    wish.finishIfAnyTaskFailed = finish
    work = lab.submit(wish, tasks=3)
    first, second, _ = lab.tasks(work)
    lab.kill(first)
    lab.platform.advance(1)
    if finish:
        assert (lab.statuses(work), lab.group(work)) == (["FAILED", "EXECUTING", "DISCARDED"], "FAILING")
        lab.kill(second)
        assert (lab.statuses(work), lab.group(work)) == (["FAILED", "FAILED", "DISCARDED"], "FAILED")
    else:
        assert (lab.statuses(work), lab.group(work)) == (["FAILED", "EXECUTING", "EXECUTING"], "RUNNING")


def test_resubmission(lab: Lab) -> None:
    """A task that fails as its group's failure policy says goes on in another group; each knows the other."""
    lab.pool(2)
    killed = m.TaskErrorSelector(processExitCodes=m.Selection([137]))
    policy = m.FailurePolicy([m.ResubmissionDestination("second", m.Selection([killed]))])
    first, second = group("first", policy, workerTags=["pool"]), group("second", workerTags=["pool"])
    work = lab.submit(first, second, tasks=2)
    for task, code in zip(lab.tasks(work), (137, 1), strict=True):
        run = lab.platform.call(lab.platform.core.scheduler.task, task.id).run_id
        lab.platform.call(lab.platform.backend.exit, run, code)
    lab.platform.advance(1)
    assert lab.statuses(work) == ["RESUBMITTED", "FAILED"]
    assert lab.statuses(work, 1) == ["EXECUTING"]
    old, (new,) = lab.tasks(work)[0], lab.tasks(work, 1)
    assert (old.resubmittedToTaskId, new.resubmittedFromTaskId) == (new.id, old.id)
    assert (old.errors[0].processExitCode, old.errors[0].causedFailure) == (137, False)
