"""What the SDK can search for and ask: every filter filters, and what is not supported is refused by name."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
import requests
from yellowdog_client import PlatformClient
from yellowdog_client import model as m

from tests.conformance.test_sdk import connect, get, nodes_of, submit, task_is, until
from tests.controlplane import Served, serve
from yellowdog_ray.local import web

# They share a platform: in one process, and in this order, where several are at work.
pytestmark = pytest.mark.xdist_group("test_sdk_searches")

NONE = "00000000-0000-0000-0000-000000000000"
PAST = m.InstantRange(max=datetime(2001, 1, 1, tzinfo=timezone.utc))
SINCE = m.InstantRange(min=datetime(2001, 1, 1, tzinfo=timezone.utc))


@pytest.fixture(scope="module")
def platform() -> Iterator[Served]:
    """One platform for the module."""
    with serve() as served:
        yield served


@pytest.fixture(scope="module")
def client(platform: Served) -> Iterator[PlatformClient]:
    """A client of it."""
    with connect(platform) as connected:
        yield connected


@pytest.fixture(scope="module")
def there(client: PlatformClient) -> dict[str, Any]:
    """One of each thing: a pool of one node that runs a task."""
    usage = m.ComputeRequirementTemplateUsage("test/small", "searched", "test", "some-tag", 1)
    wish = m.ProvisionedWorkerPoolProperties(workerTag="searched", maxNodes=1)
    pool = client.worker_pool_client.provision_worker_pool(usage, wish)
    run = m.RunSpecification(["bash"], workerTags=["searched"])
    group = m.TaskGroup("group", run, finishIfAllTasksFinished=False)
    work = client.work_client.add_work_requirement(m.WorkRequirement("test", "searched", [group], "some-tag"))
    task = m.Task(name="only", tag="task-tag")
    [task] = client.work_client.add_tasks_to_task_group(work.taskGroups[0], [task])
    task_is(client, task, m.TaskStatus.EXECUTING)
    [node] = nodes_of(client, pool)
    [instance] = client.compute_client.get_instances(m.InstanceSearch()).list_all()
    return {"pool": pool, "work": work, "task": task, "node": node, "instance": instance}


# For each kind of search: how it is made, and for each of its fields a value that finds the one thing (or a
# function of what is there that gives it) and a value that finds nothing. None in the first place: nothing
# can be found by that field here.
_OF = lambda path: lambda there: _walk(there, path)  # noqa: E731
_MODEL = "co.yellowdog.platform.model."
_NAMES = {"namespace": ("test", "other"), "namespaces": (["test"], ["other"])}
SEARCHES: dict[type, tuple[Callable[[PlatformClient], Any], dict[str, tuple[Any, Any]]]] = {
    m.WorkRequirementSearch: (
        lambda c: c.work_client.get_work_requirements,
        {
            **_NAMES,
            "name": ("earch", "none"),
            "tag": ("some", "none"),
            "statuses": ([m.WorkRequirementStatus.RUNNING], [m.WorkRequirementStatus.HELD]),
            "isHealthy": (True, False),
            "createdTime": (SINCE, PAST),
            "statusChangedTime": (SINCE, PAST),
        },
    ),
    m.TaskSearch: (
        lambda c: c.work_client.get_tasks,
        {
            "workRequirementId": (_OF("work.id"), None),
            "taskGroupId": (_OF("task.taskGroupId"), None),
            "name": ("onl", "none"),
            "tag": ("tag", "none"),
            "tagStartsWith": ("task", "tag"),
            "statuses": ([m.TaskStatus.EXECUTING], [m.TaskStatus.READY, m.TaskStatus.UPLOADING]),
            "hasInputs": (None, True),
            "hasOutputs": (None, True),
            "hasErrors": (False, True),
            "startedTime": (SINCE, PAST),
            "finishedTime": (None, SINCE),
        },
    ),
    m.WorkerPoolSearch: (
        lambda c: c.worker_pool_client.get_worker_pools,
        {
            **_NAMES,
            "name": ("earch", "none"),
            "type": (_MODEL + "ProvisionedWorkerPool", _MODEL + "ConfiguredWorkerPool"),
            "statuses": ([m.WorkerPoolStatus.RUNNING], [m.WorkerPoolStatus.IDLE]),
            "isHealthy": (True, False),
            "createdTime": (SINCE, PAST),
        },
    ),
    m.NodeSearch: (
        lambda c: c.worker_pool_client.get_nodes,
        {
            "workerPoolId": (_OF("pool.id"), None),
            "statuses": ([m.NodeStatus.RUNNING], [m.NodeStatus.LATE, m.NodeStatus.LOST]),
            "providers": ([m.CloudProvider.ON_PREMISE], [m.CloudProvider.AWS]),
            "instanceId": (_OF("node.details.instanceId"), "i-none"),
            "region": ("local", "none"),
            "instanceType": ("local.small", "none"),
            "ram": (m.DoubleRange(4, 4), m.DoubleRange(min=4.5)),
            "vcpus": (m.DoubleRange(max=2), m.DoubleRange(max=1.5)),
            "workerRegisteredTime": (SINCE, PAST),
            "registeredTime": (SINCE, PAST),
            "deregisteredTime": (None, SINCE),
            "preemptionWarningTime": (None, SINCE),
            "workerTaskGroupId": (_OF("task.taskGroupId"), f"ydid:taskgrp:000000:{NONE}:1"),
            "workerTag": ("searched", "none"),
            "workerStatuses": ([m.WorkerStatus.RUNNING], [m.WorkerStatus.STOPPED]),
        },
    ),
    m.ComputeRequirementSummarySearch: (
        lambda c: c.compute_client.get_compute_requirement_summaries,
        {
            **_NAMES,
            "name": ("earch", "none"),
            "tag": ("some", "none"),
            "statuses": ([m.ComputeRequirementStatus.RUNNING], [m.ComputeRequirementStatus.STOPPED]),
            "isHealthy": (True, False),
            "createdTime": (SINCE, PAST),
        },
    ),
    m.ComputeRequirementSearch: (
        lambda c: c.compute_client.get_compute_requirements,
        {
            "namespace": _NAMES["namespace"],
            "name": ("earch", "none"),
            "tag": ("some", "none"),
            "statuses": ([m.ComputeRequirementStatus.RUNNING], [m.ComputeRequirementStatus.STOPPED]),
            "createdTime": (SINCE, PAST),
        },
    ),
    m.InstanceSearch: (
        lambda c: c.compute_client.get_instances,
        {
            "computeRequirementId": (_OF("pool.computeRequirementId"), None),
            "computeSourceId": (_OF("instance.id.sourceId"), f"ydid:compsrc:000000:{NONE}"),
            "providers": ([m.CloudProvider.ON_PREMISE], [m.CloudProvider.AWS]),
            "regions": (["local"], ["none"]),
            "statuses": ([m.InstanceStatus.RUNNING], [m.InstanceStatus.STOPPED]),
            "imageIds": (["local"], ["none"]),
            "publicIpAddress": (None, "192.0.2.1"),
            "privateIpAddress": (_OF("instance.privateIpAddress"), "192.0.2.1"),
            "hostname": (_OF("instance.hostname"), "none"),
        },
    ),
    m.ComputeRequirementTemplateSearch: (
        lambda c: c.compute_client.get_compute_requirement_templates,
        {
            "name": ("mal", "none"),
            "namespaces": _NAMES["namespaces"],
            "type": (["ComputeRequirementStaticTemplate"], [_MODEL + "ComputeRequirementDynamicTemplate"]),
            "strategyType": ([_MODEL + "SingleSourceProvisionStrategy"], ["WaterfallProvisionStrategy"]),
        },
    ),
    m.ComputeSourceTemplateSearch: (
        lambda c: c.compute_client.get_compute_source_templates,
        {
            "name": ("mal", "none"),
            "namespaces": _NAMES["namespaces"],
            "sourceType": (_MODEL + "SimulatorComputeSource", _MODEL + "AwsInstancesComputeSource"),
            "sourceTypes": ([_MODEL + "SimulatorComputeSource"], [_MODEL + "AwsInstancesComputeSource"]),
        },
    ),
    m.NamespaceSearch: (
        lambda c: c.namespaces_client.get_namespaces,
        {
            **_NAMES,
            "namespaceContains": ("es", "none"),
            "deletable": (False, True),
        },
    ),
}


def _walk(there: dict[str, Any], path: str) -> Any:
    first, *rest = path.split(".")
    value = there[first]
    for name in rest:
        value = getattr(value, name)
    return value


@pytest.mark.parametrize("kind", SEARCHES, ids=lambda kind: kind.__name__)
def test_every_filter_filters(client: PlatformClient, there: dict[str, Any], kind: Any) -> None:
    """Each field of each of the SDK's searches finds what it describes and leaves out what it does not."""
    made, cases = SEARCHES[kind]
    fields = {field.name for field in dataclasses.fields(kind)} - {"sortField", "sortDirection"}
    assert set(cases) == fields, "a field of the SDK's search is not tried"
    search = made(client)
    assert len(search(kind()).list_all()) == 1
    for name, (hit, miss) in cases.items():
        value = hit(there) if callable(hit) else hit
        if value is not None:
            assert len(search(kind(**{name: value})).list_all()) == 1, f"{name} does not find"
        if miss is not None:
            assert search(kind(**{name: miss})).list_all() == [], f"{name} does not filter"


def test_lists_are_sorted(client: PlatformClient, there: dict[str, Any]) -> None:
    """A list comes in the order that the search asks for."""
    group = there["work"].taskGroups[0]
    names = ["b", "c", "a"]
    tasks = [m.Task(name=f"sorted-{name}", tag="sorted") for name in names]
    client.work_client.add_tasks_to_task_group(group, tasks)
    for direction, order in ((m.SortDirection.ASCENDING, "abc"), (m.SortDirection.DESCENDING, "cba")):
        search = m.TaskSearch(
            workRequirementId=there["work"].id, tag="sorted", sortField="name", sortDirection=direction
        )
        assert "".join(str(task.name)[-1] for task in client.work_client.find_tasks(search)) == order
    for task in client.work_client.find_tasks(m.TaskSearch(tag="sorted")):
        client.work_client.cancel_task(task, False)


# ----------------------------------------------------------------------------------------- refusals

_SOURCE = m.SimulatorComputeSource("source")
UNSUPPORTED: dict[str, Callable[[PlatformClient, dict[str, Any]], Any]] = {
    "POST /workerPools/configured": lambda c, t: c.worker_pool_client.add_configured_worker_pool(
        m.AddConfiguredWorkerPoolRequest("configured", "test")
    ),
    "GET /workerPools/configured/x/token": lambda c, t: (
        c.worker_pool_client.get_configured_worker_pool_token_by_id("x")
    ),
    "POST /workerPools/{pool}/actions": lambda c, t: c.worker_pool_client.add_node_actions(
        t["pool"], m.NodeRunCommandAction("x.sh")
    ),
    "PUT /compute/templates/test": lambda c, t: c.compute_client.test_compute_requirement_template(
        m.ComputeRequirementTemplateUsage("test/small", "tested", "test")
    ),
    "GET /compute/templates/provision/report/x": lambda c, t: (
        c.compute_client.get_best_compute_source_report_by_compute_requirement("x")
    ),
    "POST /compute/requirements": lambda c, t: c.compute_client.add_compute_requirement(
        m.ComputeRequirement("test", "own", m.SingleSourceProvisionStrategy([_SOURCE]))
    ),
    "POST /compute/templates/sources": lambda c, t: c.compute_client.add_compute_source_template(
        m.ComputeSourceTemplate(_SOURCE, "test")
    ),
    "DELETE /compute/templates/requirements/x": lambda c, t: (
        c.compute_client.delete_compute_requirement_template_by_id("x")
    ),
    "GET /namespaces/test/policy": lambda c, t: c.namespaces_client.get_namespace_policy("test"),
    "PUT /namespaces/test/policy": lambda c, t: c.namespaces_client.save_namespace_policy(
        m.NamespacePolicy("test", 5)
    ),
    "POST /keyrings": lambda c, t: c.keyring_client.add_keyring("ring", "a ring"),
    "POST /allowances/x/boost/3": lambda c, t: c.allowances_client.boost_allowance_by_id("x", 3),
    "PUT /allowances/requirement": lambda c, t: c.allowances_client.check_compute_requirement_exhaustion(
        c.compute_client.get_compute_requirement_by_name("test", "searched")
    ),
    "POST /images/families": lambda c, t: c.images_client.add_image_family(
        m.MachineImageFamily("family", "test", m.ImageOsType.LINUX)
    ),
    "GET /cloudInfo/regions": lambda c, t: c.cloud_info_client.get_regions(m.RegionSearch()).list_all(),
}


@pytest.mark.parametrize("route", UNSUPPORTED)
def test_unsupported_calls_are_named(client: PlatformClient, there: dict[str, Any], route: str) -> None:
    """A call that the platform does not support is refused at once, and named; it is not "not found"."""
    began = time.monotonic()
    with pytest.raises(m.exceptions.InvalidRequestException) as caught:
        UNSUPPORTED[route](client, there)
    named = route.format(pool=there["pool"].id)
    assert caught.value.message == f"{named} is not supported by the local platform"
    assert time.monotonic() - began < 5


def test_machines_cannot_be_stopped(client: PlatformClient, there: dict[str, Any]) -> None:
    """Stopping and starting machines is refused by name, for requirements and instances."""
    compute = client.compute_client
    requirement = compute.get_compute_requirement_by_name("test", "searched")
    for call in (
        lambda: compute.stop_compute_requirement(requirement),
        lambda: compute.start_compute_requirement(requirement),
        lambda: compute.stop_instances(requirement, [there["instance"]]),
        lambda: compute.restart_instances(requirement, [there["instance"]]),
    ):
        with pytest.raises(m.exceptions.InvalidRequestException, match="cannot stop and start machines"):
            call()


@pytest.mark.parametrize(
    ("run", "names"),
    [
        ({"providers": ["NOWHERE"]}, "runSpecification.providers"),
        ({"instancePricingPreference": "CHEAP"}, "runSpecification.instancePricingPreference"),
        ({"exclusiveWorkers": True}, "runSpecification.exclusiveWorkers"),
        ({"taskTimeout": 5}, "runSpecification.taskTimeout"),
        (
            {"retryPolicy": {"maxRetries": 1}, "retryableErrors": [{"processExitCodes": [1]}]},
            "runSpecification.retryableErrors",
        ),
    ],
)
def test_bad_fields_are_named(platform: Served, run: dict[str, Any], names: str) -> None:
    """A field that is wrong or that the platform cannot honour is refused by its name."""
    group = {"name": "group", "runSpecification": {"taskTypes": ["bash"], **run}}
    body = {"namespace": "test", "name": "bad-fields", "taskGroups": [group]}
    headers = {"Authorization": f"yd-key {platform.key_id}:{platform.secret}"}
    answer = requests.post(f"{platform.url}/work/requirements", json=body, headers=headers, timeout=10)
    assert (answer.status_code, answer.json()["errorType"]) == (400, "InvalidRequestException")
    assert names in answer.json()["message"]
    assert get(platform, f"{platform.url}/work/namespaces/test/requirements/bad-fields").status_code == 404


# ------------------------------------------------------------------------------- the rest of the calls


def test_hold_start_finish(client: PlatformClient) -> None:
    """A requirement is held, started and finished by the SDK's calls; tasks are added by their names."""
    work = submit(client, "to-hold")
    calls = client.work_client
    assert calls.hold_work_requirement(work).status is m.WorkRequirementStatus.HELD
    [task] = calls.add_tasks_to_task_group_by_name("test", "to-hold", "group", [m.Task(name="only")])
    assert calls.get_task(task).status is m.TaskStatus.READY
    assert calls.start_work_requirement(work).status is m.WorkRequirementStatus.RUNNING
    assert calls.finish_work_requirement(work).status is m.WorkRequirementStatus.FINISHING
    with pytest.raises(m.exceptions.InvalidRequestException, match="Cannot add tasks"):
        calls.add_tasks_to_task_group_by_id(str(task.taskGroupId), [m.Task(name="late")])
    assert calls.cancel_task(task, False).status is m.TaskStatus.CANCELLED
    assert calls.get_work_requirement(work).status is m.WorkRequirementStatus.COMPLETED


def test_machines_are_resized(client: PlatformClient, platform: Served) -> None:
    """A stand-alone requirement is resized, brought back to its size, and changed in nothing else."""
    compute = client.compute_client
    usage = m.ComputeRequirementTemplateUsage("test/small", "resized", "test", targetInstanceCount=1)
    usage.autoShutdown = m.AutoShutdown(True, timedelta(hours=26))
    requirement = compute.provision_compute_requirement_template(usage)
    search = m.InstanceSearch(computeRequirementId=requirement.id)
    search.statuses = [m.InstanceStatus.RUNNING]

    def running() -> list[m.Instance]:
        found: list[m.Instance] = compute.get_instances(search).list_all()
        return found

    first = until(running)
    for size in (3, 1):
        requirement.targetInstanceCount = size
        assert compute.update_compute_requirement(requirement, False).targetInstanceCount == size
        until(lambda size=size: len(running()) == size)
        requirement = compute.get_compute_requirement(requirement)
    assert running()[0].id == first[0].id, "the oldest machine was ended"
    platform.call(platform.backend.lose, first[0].id.instanceId)
    assert running() == []
    compute.update_compute_requirement(requirement, False)
    assert compute.get_compute_requirement(requirement).expectedInstanceCount == 0
    compute.update_compute_requirement(requirement, True)
    until(running)
    for name, value in (("tag", "new"), ("maintainInstanceCount", True), ("autoShutdown", None)):
        changed = compute.get_compute_requirement(requirement)
        setattr(changed, name, value)
        with pytest.raises(m.exceptions.InvalidRequestException, match=f"computeRequirement.{name}"):
            compute.update_compute_requirement(changed, False)
    pooled = compute.get_compute_requirement_by_name("test", "searched")
    pooled.targetInstanceCount = 2
    with pytest.raises(m.exceptions.InvalidRequestException, match="belongs to a worker pool"):
        compute.update_compute_requirement(pooled, False)
    compute.terminate_compute_requirement(requirement)
    with pytest.raises(m.exceptions.InvalidRequestException, match="Cannot update"):
        compute.update_compute_requirement(requirement, True)


def test_quiet_streams_have_heartbeats(
    platform: Served, there: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An update stream on which nothing happens is kept open by comments; clients give up without."""
    assert web.HEARTBEAT <= 30
    monkeypatch.setattr(web, "HEARTBEAT", 0.2)
    begin, seen = time.monotonic(), []
    url = f"{platform.url}/work/requirements/{there['work'].id}/updates"
    with get(platform, url, stream=True) as response:
        for line in response.iter_lines():
            seen.append(line)
            if seen.count(b":") == 3 or time.monotonic() - begin > 10:
                break
    assert seen.count(b":") == 3
    assert json.loads(seen[0][5:])["id"] == there["work"].id
