"""Faults of a platform whose nodes are real: machines and tasks that die in fact."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import requests
from yellowdog_client import PlatformClient
from yellowdog_client.model import (
    ApiKey,
    ComputeRequirementTemplateUsage,
    NodeWorkerTarget,
    ProvisionedWorkerPoolProperties,
    RunSpecification,
    ServicesSchema,
    Task,
    TaskGroup,
    TaskStatus,
    WorkRequirement,
)

from yellowdog_ray import LocalPlatform
from yellowdog_ray.errors import ClusterStateError
from yellowdog_ray.local import Fault
from yellowdog_ray.local.belonging import processes_of
from yellowdog_ray.local.nodes import Isolation

from .conftest import kinds
from .test_local_platform import LASTING, running, stray, until


class Lab:
    """A pool of a platform that grows with its work, and a way to run tasks on it."""

    def __init__(self, platform: LocalPlatform, client: PlatformClient, name: str, nodes: int) -> None:
        self.platform, self.client, self.name = platform, client, name
        self.pool = client.worker_pool_client.provision_worker_pool(
            ComputeRequirementTemplateUsage(
                templateId=platform.template_names[0],
                requirementName=name,
                requirementNamespace="local",
                targetInstanceCount=nodes,
            ),
            ProvisionedWorkerPoolProperties(
                createNodeWorkers=NodeWorkerTarget.per_node(1), workerTag=name, maxNodes=max(nodes, 2)
            ),
        )

    def submit(self, script: str, retries: int = 0) -> str:
        run = RunSpecification(taskTypes=["bash"], workerTags=[self.name], maximumTaskRetries=retries)
        work = self.client.work_client.add_work_requirement(
            WorkRequirement(
                namespace="local", name=f"work-{time.monotonic_ns()}", taskGroups=[TaskGroup("group", run)]
            )
        )
        (task,) = self.client.work_client.add_tasks_to_task_group(
            work.taskGroups[0],
            [Task(name="task", taskType="bash", arguments=["taskdata.txt"], taskData=script)],
        )
        return str(task.id)

    def reached(self, task_id: str, status: TaskStatus, attempt: int = 1) -> Task:
        def look() -> Task | None:
            task = self.client.work_client.get_task_by_id(task_id)
            return task if task.status == status and task.retryCount == attempt - 1 else None

        return until(look)

    def node(self, node_id: str) -> str:
        return str(self.client.worker_pool_client.get_node_by_id(node_id).status)

    def close(self) -> None:
        self.client.compute_client.terminate_compute_requirement_by_id(self.pool.computeRequirementId)
        until(lambda: not self.platform.nodes())


@pytest.fixture(scope="module", params=kinds(), ids=lambda kind: kind.value)
def platform(request: pytest.FixtureRequest) -> Iterator[LocalPlatform]:
    with LocalPlatform(isolation=request.param) as platform:
        yield platform
    assert platform.leftovers() == []


@pytest.fixture
def client(platform: LocalPlatform) -> Iterator[PlatformClient]:
    schema = ServicesSchema(defaultUrl=platform.url)
    with PlatformClient.create(schema, ApiKey(platform.key_id, platform.secret)) as client:
        yield client
    platform.faults.clear()


@pytest.fixture
def lab(request: pytest.FixtureRequest, platform: LocalPlatform, client: PlatformClient) -> Iterator[Lab]:
    lab = Lab(platform, client, f"pool-{time.monotonic_ns()}", 2)
    yield lab
    lab.close()


def test_a_lost_node_is_healed(lab: Lab) -> None:
    """A node that dies takes its processes along without a word; its task runs again on another one."""
    task_id = lab.submit(f"trap 'echo warned' TERM\n{stray(LASTING)}\nsleep 1000 & wait", retries=1)
    doomed = str(lab.reached(task_id, TaskStatus.EXECUTING).nodeId)
    (first,) = until(lambda: running(f"sleep {LASTING}"))
    before = set(processes_of(lab.platform.directory))
    (instance,) = lab.platform.faults.lose_node(doomed, reason="lightning")
    task = lab.reached(task_id, TaskStatus.EXECUTING, attempt=2)
    assert (lab.node(doomed), str(task.nodeId) != doomed) == ("LOST", True)
    assert instance not in lab.platform.nodes()
    (error,) = task.errors
    assert (error.errorType, error.error.endswith("lightning")) == ("ALLOCATION_LOST", True)
    after = set(processes_of(lab.platform.directory))
    assert before - after
    until(lambda: first not in running(f"sleep {LASTING}"))


def test_a_preempted_node_is_warned(lab: Lab) -> None:
    """A task's trap sees SIGTERM before its node goes, and one that does not care goes with it."""
    polite = lab.submit("trap 'echo cleaning up; exit 7' TERM\necho $$; while :; do sleep 0.1; done")
    stubborn = lab.submit("trap '' TERM\nwhile :; do sleep 0.1; done")
    polite_node = str(lab.reached(polite, TaskStatus.EXECUTING).nodeId)
    stubborn_node = str(lab.reached(stubborn, TaskStatus.EXECUTING).nodeId)
    # A shell is told to start before it has read its trap.
    time.sleep(0.5)
    began = time.monotonic()
    lab.platform.faults.preempt_node(lab.name, warning=2, count=None)
    (error,) = lab.reached(polite, TaskStatus.FAILED).errors
    assert error.processExitCode == 7
    assert "cleaning up" in error.error
    assert time.monotonic() - began < 2
    assert lab.node(polite_node) == "RUNNING"
    (error,) = lab.reached(stubborn, TaskStatus.FAILED).errors
    assert error.errorType == "ALLOCATION_LOST"
    assert time.monotonic() - began >= 2
    until(lambda: {lab.node(polite_node), lab.node(stubborn_node)} == {"LOST"})
    assert lab.platform.nodes() == []


def test_a_killed_task_has_failed_with_137(lab: Lab) -> None:
    """A task whose process is killed fails with 137 on a node that lives on, with all that it started."""
    task_id = lab.submit("sleep 1234567 & echo $!; wait")
    task = lab.reached(task_id, TaskStatus.EXECUTING)
    until(lambda: running("sleep 1234567"))
    assert lab.platform.faults.kill_task("task") == [task_id]
    (error,) = lab.reached(task_id, TaskStatus.FAILED).errors
    assert error.processExitCode == 137
    assert lab.node(str(task.nodeId)) == "RUNNING"
    until(lambda: not running("sleep 1234567"))
    lab.reached(lab.submit("exit 0"), TaskStatus.COMPLETED)


def test_provisioning_goes_wrong(platform: LocalPlatform, client: PlatformClient) -> None:
    """A machine that fails, one beyond the capacity and one that is late: the pool is short, and says why."""
    assert platform.faults.limit_capacity(2) is not None
    late = platform.faults.delay_provision(1.5, count=1)
    failing = platform.faults.fail_provision(count=1, message="no such image")
    lab = Lab(platform, client, "short", 4)
    began = time.monotonic()
    try:
        until(lambda: len(platform.nodes()) == 1)
        assert (late.hits, failing.hits) == (1, 1)
        until(lambda: len(platform.nodes()) == 2)
        assert time.monotonic() - began >= 1.4
        requirement = client.compute_client.get_compute_requirement_by_id(lab.pool.computeRequirementId)
        source = requirement.provisionStrategy.sources[0]
        assert str(source.status) == "ERRORED"
        assert "insufficient capacity" in source.statusMessage
        assert platform.faults.limits[0].hits == 1
    finally:
        lab.close()


def test_the_wire_and_the_control_port(platform: LocalPlatform, client: PlatformClient) -> None:
    """Calls go wrong on a platform with real nodes too, as another process wishes; the SDK gets over it."""
    headers = {"Authorization": f"Bearer {platform.control_token}"}
    faults = [
        {"kind": "http", "method": "GET", "path": "/namespaces", "what": 503, "count": 1},
        {"kind": "http", "method": "GET", "path": "/application", "what": "before", "count": 1},
    ]
    url = platform.control_url + "/faults"
    assert requests.post(url, json=faults, headers=headers, timeout=5).status_code == 200
    client.application_client.get_application_details()
    listed = requests.get(url, headers=headers, timeout=5).json()["faults"]
    assert [fault["hits"] for fault in listed] == [0, 1]
    mine = platform.faults.http(Fault("GET", "/application", 503))
    client.application_client.get_application_details()
    assert mine.hits == 1
    assert requests.delete(url, headers=headers, timeout=5).status_code == 200
    assert platform.faults.faults == []
    books = requests.get(platform.control_url + "/books", headers=headers, timeout=5).json()
    assert books["running"] == platform.nodes() == []
    clock = requests.post(platform.control_url + "/clock", json={"advance": 1}, headers=headers, timeout=5)
    assert clock.status_code == 409


def test_a_platform_that_does_not_run() -> None:
    platform = LocalPlatform(isolation=Isolation.PROCESSES)
    for use in (lambda: platform.faults, lambda: platform.control_url, lambda: platform.control_token):
        with pytest.raises(ClusterStateError, match="has not been started"):
            use()
