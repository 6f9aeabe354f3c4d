"""The unmodified YellowDog SDK against the local platform's API, over real HTTP."""

from __future__ import annotations

import gzip
import json
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest
import requests
from yellowdog_client import PlatformClient
from yellowdog_client.common.json import Json
from yellowdog_client.model import (
    ApiKey,
    AutoShutdown,
    CloudProvider,
    ComputeRequirement,
    ComputeRequirementStaticTemplate,
    ComputeRequirementStatus,
    ComputeRequirementSummarySearch,
    ComputeRequirementTemplateSearch,
    ComputeRequirementTemplateUsage,
    ComputeSourceStatus,
    ComputeSourceTemplateSearch,
    CreateNamespaceRequest,
    Instance,
    InstanceSearch,
    InstanceStatus,
    KeyringSearch,
    NamespaceSearch,
    Node,
    NodeSearch,
    NodeStatus,
    NodeWorkerTarget,
    ProvisionedWorkerPool,
    ProvisionedWorkerPoolProperties,
    RetryPolicy,
    RetryProperties,
    RunSpecification,
    ServicesSchema,
    SliceReference,
    Task,
    TaskErrorType,
    TaskGroup,
    TaskSearch,
    TaskStatus,
    TaskTemplate,
    WorkerPoolSearch,
    WorkerPoolStatus,
    WorkRequirement,
    WorkRequirementSearch,
    WorkRequirementStatus,
)
from yellowdog_client.model.exceptions import InvalidRequestException, NotAuthorisedException

from tests.controlplane import Fault, Served, serve

# They share a platform: in one process, and in this order, where several are at work.
pytestmark = pytest.mark.xdist_group("test_sdk")

NO_RETRY = RetryProperties(0, timedelta(milliseconds=1), timedelta(milliseconds=1))
FAST_RETRY = RetryProperties(3, timedelta(milliseconds=1), timedelta(milliseconds=2))


@pytest.fixture(scope="module")
def platform() -> Iterator[Served]:
    """One platform for the module; every test uses names of its own."""
    with serve() as served:
        yield served


@pytest.fixture(scope="module")
def client(platform: Served) -> Iterator[PlatformClient]:
    """A client of it."""
    with connect(platform) as connected:
        yield connected


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    """A name that no other test uses."""
    return str(request.node.name).replace("test_", "").split("[")[0].replace("_", "-")[:50] + "-x"


def connect(platform: Served, secret: str | None = None, retry: RetryProperties = NO_RETRY) -> PlatformClient:
    schema = ServicesSchema(defaultUrl=platform.url, retry=retry)
    return PlatformClient.create(schema, ApiKey(platform.key_id, secret or platform.secret))


def until(look: Callable[[], Any], what: str = "it") -> Any:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        found = look()
        if found:
            return found
        time.sleep(0.01)
    raise AssertionError(f"{what} did not come")


def provision(client: PlatformClient, name: str, nodes: int = 1, **properties: Any) -> ProvisionedWorkerPool:
    usage = ComputeRequirementTemplateUsage("test/small", name, "test", "some-tag", nodes)
    wish = ProvisionedWorkerPoolProperties(
        createNodeWorkers=NodeWorkerTarget.per_node(1), workerTag=name, maxNodes=nodes, **properties
    )
    return client.worker_pool_client.provision_worker_pool(usage, wish)


def submit(client: PlatformClient, name: str, **group: Any) -> WorkRequirement:
    run = RunSpecification(["bash"], workerTags=[name], **group.pop("run", {}))
    task_group = TaskGroup("group", run, finishIfAllTasksFinished=False, **group)
    return client.work_client.add_work_requirement(WorkRequirement("test", name, [task_group]))


def nodes_of(client: PlatformClient, pool: ProvisionedWorkerPool, **search: Any) -> list[Node]:
    return client.worker_pool_client.get_nodes(NodeSearch(workerPoolId=pool.id, **search)).list_all()


def task_is(client: PlatformClient, task: Task, status: TaskStatus) -> Task:
    def look() -> Task | None:
        now = client.work_client.get_task_by_id(str(task.id))
        return now if now.status is status else None

    found: Task = until(look, f"{status} of {task.name}")
    return found


# ------------------------------------------------------------------------------- a cluster's whole way


def test_pool_nodes_have_addresses(client: PlatformClient, name: str) -> None:
    """A pool is given out PENDING, and its nodes come with everything that a builder reads."""
    pool = provision(client, name, 2)
    assert pool.status is WorkerPoolStatus.PENDING
    assert (pool.awaitingNodes, pool.expectedNodeCount) == (True, 2)
    nodes = until(lambda: (found := nodes_of(client, pool)) and len(found) == 2 and found)
    assert len({node.details.privateIpAddress for node in nodes}) == 2
    for node in nodes:
        assert node.status is NodeStatus.RUNNING
        assert node.details.provider is CloudProvider.ON_PREMISE
        assert (node.details.workerTag, node.details.supportedTaskTypes) == (name, ["bash"])
        assert client.worker_pool_client.get_node_by_id(node.id).id == node.id
        assert client.worker_pool_client.get_node_by_worker_id(node.workers[0].id).id == node.id
    again = client.worker_pool_client.get_worker_pool_by_id(str(pool.id))
    assert isinstance(again, ProvisionedWorkerPool)
    assert (again.status, again.awaitingNodes) == (WorkerPoolStatus.IDLE, False)
    assert again.workerSummary is not None
    assert client.worker_pool_client.get_worker_pool_by_name("test", name).id == pool.id
    instances = client.compute_client.get_instances(
        InstanceSearch(computeRequirementId=pool.computeRequirementId)
    ).list_all()
    assert {instance.status for instance in instances} == {InstanceStatus.RUNNING}
    assert {i.privateIpAddress for i in instances} == {n.details.privateIpAddress for n in nodes}


def test_work_runs_and_is_taken_back(client: PlatformClient, platform: Served, name: str) -> None:
    """A cluster's way: tasks with a template run, are aborted, and everything is gone and says so."""
    pool = provision(client, name, 2)
    template = TaskTemplate("bash", "echo $A", {"A": "1"})
    work = submit(client, name, taskTemplate=template)
    assert work.status is WorkRequirementStatus.RUNNING
    group = work.taskGroups[0]
    assert group.taskTemplate == template
    tasks = [Task(name=f"task-{number}", arguments=["taskdata.txt"]) for number in range(2)]
    added = client.work_client.add_tasks_to_task_group_by_id(str(group.id), tasks)
    assert added[0].arguments == ["taskdata.txt"]
    running = [task_is(client, task, TaskStatus.EXECUTING) for task in added]
    assert {task.nodeId for task in running} == {node.id for node in nodes_of(client, pool)}
    started = [effect for effect in platform.backend.applied if getattr(effect, "task_id", 0) == added[0].id]
    assert (started[0].task_data, started[0].environment, list(started[0].arguments)) == (
        "echo $A",
        {"A": "1"},
        ["taskdata.txt"],
    )
    summary = client.work_client.get_work_requirement_by_id(str(work.id)).taskGroups[0].taskSummary
    assert summary.statusCounts == {TaskStatus.EXECUTING: 2}

    client.work_client.cancel_work_requirement(work, True)
    client.worker_pool_client.shutdown_worker_pool_by_id(str(pool.id))
    for _ in range(2):
        client.compute_client.terminate_compute_requirement_by_id(str(pool.computeRequirementId))
    ended = until(
        lambda: (now := client.work_client.get_work_requirement_by_name("test", name)).status.finished and now
    )
    assert ended.status is WorkRequirementStatus.CANCELLED
    for task in added:
        task_is(client, task, TaskStatus.ABORTED)
    compute = client.compute_client
    requirement = until(
        lambda: (
            (now := compute.get_compute_requirement_by_id(str(pool.computeRequirementId))).status
            is ComputeRequirementStatus.TERMINATED
            and now
        )
    )
    assert requirement.provisionStrategy.sources[0].instanceSummary.statusCounts == {
        InstanceStatus.TERMINATED: 2
    }
    client.worker_pool_client.shutdown_worker_pool_by_id(str(pool.id))
    assert client.worker_pool_client.get_worker_pool_by_id(str(pool.id)).status is WorkerPoolStatus.TERMINATED


def test_groups_are_added_later(client: PlatformClient, name: str) -> None:
    """A whole requirement that is sent back with one more group gets that group, and keeps the others."""
    work = submit(client, name, run={"taskTimeout": timedelta(hours=26), "retryPolicy": RetryPolicy(2)})
    work.taskGroups.append(TaskGroup("later", RunSpecification(["bash"])))
    work.priority = 2.5
    changed = client.work_client.update_work_requirement(work)
    assert [group.name for group in changed.taskGroups] == ["group", "later"]
    assert changed.taskGroups[1].id == str(changed.taskGroups[0].id)[:-1] + "2"
    assert client.work_client.get_work_requirement_by_id(str(work.id)).priority == 2.5


def test_lost_node_brings_the_task_back(client: PlatformClient, platform: Served, name: str) -> None:
    """A task of a lost node runs again on another, with the error that says why."""
    pool = provision(client, name)
    work = submit(client, name, run={"retryPolicy": RetryPolicy(3)})
    [task] = client.work_client.add_tasks_to_task_group(work.taskGroups[0], [Task(name="only")])
    before = task_is(client, task, TaskStatus.EXECUTING)
    node = client.worker_pool_client.get_node_by_id(str(before.nodeId))
    platform.call(platform.backend.lose, node.details.instanceId)
    after = until(
        lambda: (
            (now := client.work_client.get_task_by_id(str(task.id))).retryCount == 1
            and now.status is TaskStatus.EXECUTING
            and now
        )
    )
    assert after.nodeId != before.nodeId
    assert after.errors[0].errorType == TaskErrorType.ALLOCATION_LOST
    assert [node.status for node in nodes_of(client, pool)] == [NodeStatus.LOST, NodeStatus.RUNNING]
    assert len(nodes_of(client, pool, statuses=[NodeStatus.RUNNING])) == 1


def test_failed_task_shows_its_output(client: PlatformClient, platform: Served, name: str) -> None:
    """A failed process shows its exit code and the end of its output."""
    provision(client, name)
    work = submit(client, name)
    [task] = client.work_client.add_tasks_to_task_group(work.taskGroups[0], [Task(name="only")])
    task_is(client, task, TaskStatus.EXECUTING)
    run_id = str(task.id).replace(":", "_") + "-1"
    platform.call(platform.backend.exit, run_id, 7, "ray: not found")
    failed = task_is(client, task, TaskStatus.FAILED)
    assert (failed.errors[0].errorType, failed.errors[0].processExitCode) == ("PROCESS_NON_ZERO_EXIT", 7)
    assert failed.errors[0].error.startswith("Task process exited with non-zero exit code 7")
    assert "ray: not found" in failed.errors[0].error
    assert failed.workingTime.executing is not None


def test_cancel_one_task(client: PlatformClient, name: str) -> None:
    """A running task that is cancelled with abort ends ABORTED; its group goes on."""
    provision(client, name)
    work = submit(client, name)
    [task] = client.work_client.add_tasks_to_task_group(work.taskGroups[0], [Task(name="only")])
    task_is(client, task, TaskStatus.EXECUTING)
    assert client.work_client.cancel_task_by_id(str(task.id), True).abortRequestedTime is not None
    task_is(client, task, TaskStatus.ABORTED)


def test_boot_failure_is_readable() -> None:
    """Who waits for a node reads from the compute requirement why none comes."""
    with serve(fail_boot=lambda start: "no room on this machine") as platform, connect(platform) as client:
        pool = provision(client, "broken")
        compute = client.compute_client
        source = until(
            lambda: (
                (
                    now := compute.get_compute_requirement_by_id(
                        str(pool.computeRequirementId)
                    ).provisionStrategy.sources[0]
                ).status
                is ComputeSourceStatus.ERRORED
                and now
            )
        )
        assert "no room on this machine" in source.statusMessage
        search = ComputeRequirementSummarySearch(name="broken")
        [summary] = compute.get_compute_requirement_summaries(search).list_all()
        assert summary.healthy is False


def test_resize_and_auto_shutdown(client: PlatformClient, name: str) -> None:
    """A pool is resized by its client, and a compute requirement's dead-man's switch is set and shown."""
    usage = ComputeRequirementTemplateUsage("test/small", name, "test", targetInstanceCount=1)
    pool = client.worker_pool_client.provision_worker_pool(usage, ProvisionedWorkerPoolProperties(maxNodes=3))
    until(lambda: nodes_of(client, pool))
    client.worker_pool_client.resize_worker_pool(pool, 3)
    until(lambda: len(nodes_of(client, pool)) == 3)
    changed = client.compute_client.update_compute_requirement_auto_shutdown(
        str(pool.computeRequirementId), AutoShutdown(True, timedelta(hours=1))
    )
    assert changed.autoShutdownTime is not None
    cleared = client.compute_client.update_compute_requirement_auto_shutdown(str(pool.computeRequirementId))
    assert cleared.autoShutdownTime is None
    node = nodes_of(client, pool)[0]
    client.worker_pool_client.shutdown_node_by_id(node.id)
    until(lambda: client.worker_pool_client.get_node_by_id(node.id).status is NodeStatus.TERMINATED)


def test_standalone_requirement(client: PlatformClient, name: str) -> None:
    """A compute requirement without a pool has instances, no nodes, and single ones can be ended."""
    compute = client.compute_client
    usage = ComputeRequirementTemplateUsage("test/small", name, "test", targetInstanceCount=2)
    requirement = compute.provision_compute_requirement_template(usage)
    search = InstanceSearch(computeRequirementId=requirement.id, statuses=[InstanceStatus.RUNNING])
    instances = until(lambda: len(found := compute.get_instances(search).list_all()) == 2 and found)
    compute.deprovision_instances(requirement, instances[:1])
    until(lambda: len(compute.get_instances(search).list_all()) == 1)
    assert compute.get_compute_requirement_by_name("test", name).targetInstanceCount == 1
    compute.terminate_instances(requirement, instances[1:])
    until(lambda: compute.get_instances(search).list_all() == [])


# ------------------------------------------------------------------------------------ lists and slices


def test_tasks_come_in_slices(client: PlatformClient, name: str) -> None:
    """A long list comes in slices, complete and in order, with filters applied before slicing."""
    work = submit(client, name)
    tasks = [
        Task(name=f"task-{number:04}", tag="even" if number % 2 == 0 else "odd") for number in range(2500)
    ]
    client.work_client.add_tasks_to_task_group(work.taskGroups[0], tasks)
    search = TaskSearch(workRequirementId=work.id)
    assert [task.name for task in client.work_client.find_tasks(search)] == [task.name for task in tasks]
    odd = TaskSearch(taskGroupId=work.taskGroups[0].id, tag="odd", statuses=[TaskStatus.READY])
    assert len(client.work_client.get_tasks(odd).list_all()) == 1250
    assert [task.name for task in client.work_client.find_tasks(TaskSearch(work.id, name="0042"))] == [
        "task-0042"
    ]
    assert client.work_client.find_tasks(TaskSearch(work.id, statuses=[TaskStatus.FAILED])) == []


def test_a_slice_ends_exactly(platform: Served, client: PlatformClient, name: str) -> None:
    """A slice that takes the last item names no next one: clients stop at an empty slice."""
    work = submit(client, name)
    client.work_client.add_tasks_to_task_group(work.taskGroups[0], [Task(name=f"task-{n}") for n in range(4)])
    url = f"{platform.url}/work/tasks?workRequirementId={work.id}&size=2"
    first = get(platform, url).json()
    second = get(platform, f"{url}&sliceId={first['nextSliceId']}").json()
    assert [len(part["items"]) for part in (first, second)] == [2, 2]
    assert second.get("nextSliceId") is None


def test_lists(client: PlatformClient, name: str) -> None:
    """Every list that the SDK and the CLI read finds what is there, by parts of names."""
    pool, work = provision(client, name), submit(client, name)
    part, other = name[2:], "no-such-name"
    pools, works, compute = client.worker_pool_client, client.work_client, client.compute_client
    for wanted, count in ((part, 1), (other, 0)):
        assert len(pools.get_worker_pools(WorkerPoolSearch(name=wanted)).list_all()) == count
        assert len(works.get_work_requirements(WorkRequirementSearch(name=wanted)).list_all()) == count
        summaries = compute.get_compute_requirement_summaries(ComputeRequirementSummarySearch(name=wanted))
        assert len(summaries.list_all()) == count
    assert work.id in {each.id for each in works.find_all_work_requirements()}
    assert pool.id in {each.id for each in pools.find_all_worker_pools()}
    templates = compute.get_compute_requirement_templates(
        ComputeRequirementTemplateSearch(name="sma")
    ).list_all()
    assert [template.name for template in templates] == ["small"]
    full = compute.get_compute_requirement_template(str(templates[0].id))
    assert isinstance(full, ComputeRequirementStaticTemplate)
    assert compute.get_compute_requirement_template_by_name("test", "small") == full
    [source] = compute.get_compute_source_templates(ComputeSourceTemplateSearch()).list_all()
    assert compute.get_compute_source_template(str(source.id)).source.name == "small"
    assert client.keyring_client.get_keyrings(KeyringSearch()).list_all() == []


def test_identity_and_namespaces(client: PlatformClient, name: str) -> None:
    """The calls with which the CLI finds out who and where it is are answered."""
    details = client.application_client.get_application_details()
    assert details.allNamespacesReadable
    assert client.account_client.get_application_groups(str(details.id)).list_all()
    created = client.namespaces_client.create_namespace(CreateNamespaceRequest(name))
    assert client.namespaces_client.get_namespace(created).namespace == name
    client.namespaces_client.delete_namespace(created)
    assert client.namespaces_client.get_namespaces(NamespaceSearch(namespaces=[name])).list_all() == []


# -------------------------------------------------------------------------------------------- errors


def get(platform: Served, url: str, **options: Any) -> requests.Response:
    headers = {"Authorization": f"yd-key {platform.key_id}:{platform.secret}"}
    return requests.get(url, headers=headers, timeout=10, **options)


def test_wrong_key(platform: Served) -> None:
    """A wrong key is refused on every call but GET /, with the SDK's own exception."""
    with connect(platform, secret="wrong") as client, pytest.raises(NotAuthorisedException):
        client.worker_pool_client.find_all_worker_pools()
    assert requests.get(platform.url + "/", timeout=10).status_code == 200
    for path in ("/workerPools/", "/no/such/route", "/compute/requirements/x/updates"):
        assert requests.get(platform.url + path, timeout=10).status_code == 401
    for header in (
        "",
        "yd-key",
        "yd-key test-key",
        "Basic test-key:test-secret",
        "yd-key test-key:test-secret2",
    ):
        response = requests.get(platform.url + "/application/", headers={"Authorization": header}, timeout=10)
        assert response.status_code == 401


@pytest.mark.parametrize(
    "call",
    [
        lambda c: c.work_client.get_work_requirement_by_id("ydid:workreq:000000:none"),
        lambda c: c.work_client.get_work_requirement_by_name("test", "none"),
        lambda c: c.work_client.get_task_by_id("ydid:task:000000:none:1:1"),
        lambda c: c.work_client.add_tasks_to_task_group_by_id("ydid:taskgrp:000000:none:1", [Task()]),
        lambda c: c.worker_pool_client.get_worker_pool_by_id("ydid:wrkrpool:000000:none"),
        lambda c: c.worker_pool_client.get_worker_pool_by_name("test", "none"),
        lambda c: c.worker_pool_client.shutdown_worker_pool_by_id("ydid:wrkrpool:000000:none"),
        lambda c: c.worker_pool_client.get_node_by_id("ydid:node:000000:none"),
        lambda c: c.compute_client.get_compute_requirement_by_id("ydid:compreq:000000:none"),
        lambda c: c.compute_client.terminate_compute_requirement_by_id("ydid:compreq:000000:none"),
        lambda c: c.compute_client.provision_compute_requirement_template(
            ComputeRequirementTemplateUsage("test/none", "some-name", "test")
        ),
    ],
)
def test_not_found(client: PlatformClient, call: Callable[[PlatformClient], Any]) -> None:
    """What is not there is an HTTPError with status 404."""
    with pytest.raises(requests.HTTPError) as caught:
        call(client)
    assert caught.value.response.status_code == 404
    assert caught.value.response.json()["detail"] == []


def test_unknown_template_lists_the_known(client: PlatformClient, name: str) -> None:
    """A template that is not there is named, with those that are."""
    usage = ComputeRequirementTemplateUsage("test/none", name, "test")
    with pytest.raises(requests.HTTPError, match=r"'test/none'.*test/small"):
        client.compute_client.provision_compute_requirement_template(usage)


def test_taken_names(client: PlatformClient, name: str) -> None:
    """Names that are taken raise what clients look for."""
    provision(client, name)
    work = submit(client, name)
    client.work_client.add_tasks_to_task_group(work.taskGroups[0], [Task(name="only")])
    with pytest.raises(InvalidRequestException, match="already exists"):
        provision(client, name)
    with pytest.raises(InvalidRequestException, match="already exists"):
        submit(client, name)
    with pytest.raises(InvalidRequestException, match="Task names must be unique within task group"):
        client.work_client.add_tasks_to_task_group(work.taskGroups[0], [Task(name="only")])


def test_illegal_transition(client: PlatformClient, name: str) -> None:
    """An illegal transition is an HTTPError with status 403 and the known words."""
    work = submit(client, name)
    client.work_client.cancel_work_requirement(work, False)
    with pytest.raises(requests.HTTPError, match="invalid transition") as caught:
        client.work_client.hold_work_requirement_by_id(str(work.id))
    assert caught.value.response.status_code == 403
    assert caught.value.response.json()["errorType"] == "InvalidWorkRequirementStatusException"


@pytest.mark.parametrize(
    ("body", "headers", "words"),
    [
        (b"{nonsense", {}, "not JSON"),
        (b"", {}, "must be a JSON object"),
        (b"[]", {}, "must be a JSON object"),
        (b'{"namespace": "test"}', {}, "workRequirement.name is required"),
        (b'{"namespace": "test", "name": "n1", "taskGroups": [{"name": "g1"}]}', {}, "runSpecification"),
        (b"no gzip", {"Content-Encoding": "gzip"}, "not gzip"),
        (gzip.compress(b"{}", mtime=0)[:-9], {"Content-Encoding": "gzip"}, "ends before"),
    ],
)
def test_bad_bodies(platform: Served, body: bytes, headers: dict[str, str], words: str) -> None:
    """A body that cannot be read is refused with what is wrong, never with a server's fault."""
    headers = {"Authorization": f"yd-key {platform.key_id}:{platform.secret}", **headers}
    response = requests.post(platform.url + "/work/requirements", data=body, headers=headers, timeout=10)
    assert response.status_code == 400
    assert words in response.json()["message"]


def test_huge_bodies_are_refused(platform: Served) -> None:
    """A small body that unpacks to a huge one is refused before it fills the memory."""
    bomb = gzip.compress(b" " * (65 * 1024 * 1024))
    headers = {"Authorization": f"yd-key {platform.key_id}:{platform.secret}", "Content-Encoding": "gzip"}
    response = requests.post(platform.url + "/work/requirements", data=bomb, headers=headers, timeout=30)
    assert response.status_code == 413


# ------------------------------------------------------------------------------------- wire and streams


def test_paths_and_parameters_as_clients_send_them(
    platform: Served, client: PlatformClient, name: str
) -> None:
    """Doubled slashes, empty parameters and escaped ids are taken as they come."""
    pool = provision(client, name)
    escaped = str(pool.id).replace(":", "%3A")
    assert get(platform, f"{platform.url}//workerPools//{escaped}").json()["id"] == pool.id
    found = get(platform, f"{platform.url}/workerPools/?name={name}&namespace=&statuses=&sliced=TRUE").json()
    assert [each["id"] for each in found["items"]] == [pool.id]
    assert isinstance(get(platform, f"{platform.url}/workerPools/").json(), list)
    assert get(platform, f"{platform.url}/work/tasks?size=0").status_code == 400


def test_every_answer_fits_the_model(platform: Served, client: PlatformClient, name: str) -> None:
    """What the API sends holds no null, and the SDK takes over every field of it."""
    pool = provision(client, name)
    work = submit(client, name, run={"taskTimeout": timedelta(hours=1), "retryPolicy": RetryPolicy(1)})
    [task] = client.work_client.add_tasks_to_task_group(work.taskGroups[0], [Task(name="only", tag="x")])
    task_is(client, task, TaskStatus.EXECUTING)
    [node] = nodes_of(client, pool)
    for path, kind in (
        (f"/workerPools/{pool.id}", ProvisionedWorkerPool),
        (f"/workerPools/nodes/{node.id}", Node),
        (f"/work/requirements/{work.id}", WorkRequirement),
        (f"/work/tasks/{task.id}", Task),
        (f"/compute/requirements/{pool.computeRequirementId}", ComputeRequirement),
    ):
        sent = get(platform, platform.url + path).json()
        assert "null" not in json.dumps(sent)
        assert missing(sent, Json.dump(Json.load(sent, kind))) == []
    instance = get(platform, f"{platform.url}/compute/instances").json()["items"][0]
    assert missing(instance, Json.dump(Json.load(instance, Instance))) == []


def missing(sent: Any, kept: Any, where: str = "") -> list[str]:
    """Return the fields that were sent and that the SDK did not keep."""
    if isinstance(sent, dict):
        if not isinstance(kept, dict):
            return [where]
        return [lost for key in sent for lost in missing(sent[key], kept.get(key), f"{where}.{key}")]
    if isinstance(sent, list):
        if not isinstance(kept, list) or len(kept) != len(sent):
            return [where]
        return [lost for pair in zip(sent, kept, strict=True) for lost in missing(*pair, where)]
    return [] if kept is not None else [where]


@pytest.mark.parametrize("kind", ["work", "pool", "requirement"])
def test_update_streams(
    platform: Served, client: PlatformClient, kind: str, request: pytest.FixtureRequest
) -> None:
    """A stream tells the state now and after each change, and is closed when the thing has ended."""
    name = f"stream-{kind}"
    pool, work = provision(client, name), submit(client, name)
    path = {
        "work": f"/work/requirements/{work.id}/updates",
        "pool": f"/workerPools/{pool.id}/updates",
        "requirement": f"/compute/requirements/{pool.computeRequirementId}/updates",
    }[kind]
    seen: list[str] = []

    def read() -> None:
        with get(platform, platform.url + path, stream=True) as response:
            assert response.headers["content-type"].startswith("text/event-stream")
            for line in response.iter_lines():
                if line.startswith(b"data:"):
                    seen.append(json.loads(line[5:])["status"])

    reader = threading.Thread(target=read)
    reader.start()
    until(lambda: seen)
    client.work_client.cancel_work_requirement(work, True)
    client.compute_client.terminate_compute_requirement_by_id(str(pool.computeRequirementId))
    reader.join(10)
    assert not reader.is_alive()
    assert seen[-1] in ("CANCELLED", "SHUTDOWN", "TERMINATED")


def test_open_streams_do_not_keep_the_server() -> None:
    """The server closes at once although a stream is open."""
    with serve() as platform, connect(platform) as client:
        pool = provision(client, "open")
        response = get(platform, f"{platform.url}/workerPools/{pool.id}/updates", stream=True)
        lines = response.iter_lines()
        assert next(lines).startswith(b"data:")
        begin = time.monotonic()
    assert time.monotonic() - begin < 3
    response.close()


# ------------------------------------------------------------------------------------------ the faults


@pytest.mark.parametrize("what", [500, 502, 429, "before"])
def test_faults_pass(platform: Served, name: str, what: Any) -> None:
    """A fault that passes is got over by the SDK's own retries."""
    platform.faults.faults.append(Fault("GET", "^/workerPools", what))
    with connect(platform, retry=FAST_RETRY) as client:
        assert client.worker_pool_client.find_all_worker_pools() is not None
    assert platform.faults.faults.pop().count == 0


def test_lost_answer_leads_to_a_taken_name(platform: Served, name: str) -> None:
    """A POST whose answer is lost was carried out: the SDK's own retry then finds the name taken."""
    platform.faults.faults.append(Fault("POST", "/workerPools/provisioned/template", "after"))
    with connect(platform, retry=FAST_RETRY) as client:
        with pytest.raises((InvalidRequestException, requests.ConnectionError)):
            provision(client, name)
        assert client.worker_pool_client.get_worker_pool_by_name("test", name).name == name
    platform.faults.faults.clear()


def test_slices_by_reference(client: PlatformClient, name: str) -> None:
    """The SDK's own slice call passes size and reference through."""
    work = submit(client, name)
    client.work_client.add_tasks_to_task_group(work.taskGroups[0], [Task(name=f"task-{n}") for n in range(3)])
    search = TaskSearch(workRequirementId=work.id)
    first = client.work_client.find_tasks_slice(search, SliceReference(size=2))
    second = client.work_client.find_tasks_slice(search, SliceReference(first.nextSliceId, 2))
    assert [task.name for task in first.items + second.items] == ["task-0", "task-1", "task-2"]
