"""Nothing is answered silently wrong: what the platform does not know it refuses, and names it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import requests
from yellowdog_client import model as m

from tests.controlplane import KEY_ID, SECRET, Served, serve
from yellowdog_ray.local import sorting, vocabulary
from yellowdog_ray.local.scheduler import SchedulerOptions

WORK = "/work/requirements"
TASKS = "/work/taskGroups/x/tasks"
POOL = "/workerPools/provisioned/template"


@pytest.fixture(scope="module")
def platform() -> Iterator[Served]:
    """One platform for the module."""
    with serve() as served:
        yield served


def ask(platform: Served, method: str, path: str, body: Any = None) -> requests.Response:
    headers = {"Authorization": f"yd-key {KEY_ID}:{SECRET}"}
    return requests.request(method, platform.url + path, json=body, headers=headers, timeout=5)


def work(run: dict[str, Any] | None = None, **group: Any) -> dict[str, Any]:
    group = {"name": "group", "runSpecification": {"taskTypes": ["bash"], **(run or {})}, **group}
    return {"namespace": "test", "name": "refused", "taskGroups": [group]}


def pool(**usage: Any) -> dict[str, Any]:
    usage = {"templateId": "test/small", "requirementName": "no", "requirementNamespace": "test", **usage}
    return {"requirementTemplateUsage": usage}


USAGE = pool(autoShutdown={"enabled": True})["requirementTemplateUsage"]
HALVES = {"provisionedProperties": {"createNodeWorkers": {"targetType": "PER_NODE", "targetCount": 1.5}}}
CHOICE = {"includes": [{"errorTypes": {"includes": ["NO_SUCH"]}}]}
REFUSED: list[tuple[str, str, Any, str]] = [
    ("GET", f"{WORK}?sortField=nope", None, "sortField"),
    ("GET", "/work/tasks?sortField=errors", None, "sortField"),
    ("GET", "/workerPools?sortField=tag", None, "sortField"),
    ("GET", "/workerPools/nodes?sortField=details", None, "sortField"),
    ("GET", "/compute/requirements?sortField=healthy", None, "sortField"),
    ("GET", "/compute/instances?sortField=id", None, "sortField"),
    ("GET", "/compute/templates/requirements?sortField=x", None, "sortField"),
    ("GET", "/compute/templates/sources?sortField=x", None, "sortField"),
    ("GET", "/namespaces?sortField=x", None, "sortField"),
    ("GET", f"{WORK}?statuses=RUNNING&statuses=running", None, "'running'"),
    ("GET", "/work/tasks?statuses=STARTED", None, "'STARTED'"),
    ("GET", "/workerPools?statuses=X", None, "TERMINATED, not 'X'"),
    ("GET", "/workerPools?type=Pool", None, "'Pool'"),
    ("GET", "/workerPools/nodes?statuses=X", None, "statuses"),
    ("GET", "/workerPools/nodes?workerStatuses=X", None, "workerStatuses"),
    ("GET", "/workerPools/nodes?providers=LOCAL", None, "ON_PREMISE, not 'LOCAL'"),
    ("GET", "/compute/requirements?statuses=X", None, "statuses"),
    ("GET", "/compute/instances?statuses=X", None, "statuses"),
    ("GET", f"{WORK}?naem=x", None, "naem is not supported by the local platform on GET /work/requirements"),
    ("GET", "/work/tasks?taskGroupID=x", None, "taskGroupID"),
    # YellowDog's own searches have no tag here.
    ("GET", "/workerPools?tag=x", None, "tag is not supported by the local platform on GET /workerPools;"),
    ("GET", "/compute/templates/requirements?tag=x", None, "tag is not supported"),
    ("GET", "/compute/templates/sources?tag=x", None, "tag is not supported"),
    ("GET", "/workerPools/nodes?vcpus.min=nan", None, "vcpus.min must be a number or a time, not 'nan'"),
    ("GET", "/workerPools/nodes?ram.max=-inf", None, "ram.max must be a number or a time, not '-inf'"),
    ("GET", f"{WORK}?createdTime.min=0001-01-01T00:00:00%2B05:00", None, "createdTime.min must be a"),
    ("GET", f"{WORK}?name=a&name=b", None, "name may be given once only, not as 'a' and 'b'"),
    ("GET", f"{WORK}?isHealthy=true&isHealthy=true", None, "isHealthy may be given once only"),
    ("GET", "/application?frob=1", None, "frob"),
    ("PUT", f"{WORK}/x/transition/CANCELLING?abrot=true", None, "abrot"),
    ("DELETE", "/workerPools/x?force=true", None, "force"),
    ("POST", WORK, work(frob=False), "taskGroups[0].frob"),
    ("POST", WORK, work(frob=0), "taskGroups[0].frob"),
    ("POST", WORK, work(run={"workerTag": "x"}), "runSpecification.workerTag"),
    ("POST", WORK, work(run={"vcpus": {"min": 4, "max": 2}}), "vcpus"),
    ("POST", WORK, work(run={"retryPolicy": {"maxRetries": 1, "retryErrors": CHOICE}}), "'NO_SUCH'"),
    ("POST", WORK, work(run={"retryableErrors": [{"statusesAtFailure": ["X"]}]}), "retryableErrors[0]"),
    ("POST", WORK, work(run={"retryableErrors": [{"processExitCodes": ["7"]}]}), "whole numbers, not '7'"),
    ("POST", WORK, work(completedTaskTtl="a day"), "completedTaskTtl"),
    ("POST", POOL, pool(targetInstanceCounts=0), "targetInstanceCounts"),
    ("POST", POOL, pool(autoShutdown={"enabled": True}), "autoShutdown.timeout is required where"),
    ("POST", "/compute/templates/provision", USAGE, "autoShutdown.timeout is required where"),
    ("POST", POOL, {**pool(), **HALVES}, "createNodeWorkers.targetCount must be a whole number"),
    # What no node can be given: it would fail there, or worse.
    ("POST", TASKS, [{"taskData": "\ud800"}], "tasks[0].taskData must be text that UTF-8 can hold"),
    ("POST", TASKS, [{"arguments": ["a", "\udfff"]}], "tasks[0].arguments must be text that UTF-8 can hold"),
    ("POST", TASKS, [{"environment": {"\ud800": "x"}}], "tasks[0].environment must be text"),
    ("POST", TASKS, [{"tag": "\ud800"}], "tasks[0].tag must be text"),
    ("POST", TASKS, [{"arguments": ["a\0b"]}], "tasks[0].arguments must be texts without NUL"),
    ("POST", TASKS, [{}, {"environment": {"A": "x\0"}}], "tasks[1].environment must be variables"),
    ("POST", TASKS, [{"environment": {"A=B": "x"}}], "not 'A=B'"),
    ("POST", TASKS, [{"environment": {"": "x"}}], "tasks[0].environment"),
    ("POST", WORK, work(taskTemplate={"environment": {"A=B": "x"}}), "taskTemplate.environment"),
    ("POST", WORK, work(run={"taskTimeout": f"P{'9' * 400}D"}), "taskTimeout must be at most 36500 days"),
    ("POST", POOL, pool(autoShutdown={"timeout": "P99999999D"}), "autoShutdown.timeout"),
    ("POST", WORK, {**work(), "priority": 10**400}, "workRequirement.priority must be a number"),
]


@pytest.mark.parametrize(("method", "path", "body", "named"), REFUSED)
def test_it_is_refused_and_named(platform: Served, method: str, path: str, body: Any, named: str) -> None:
    """The error has YellowDog's shape, and says which word of the request was wrong."""
    answer = ask(platform, method, path, body)
    problem = answer.json()
    assert (answer.status_code, problem["errorType"]) == (400, "InvalidRequestException"), answer.text
    assert named in problem["message"]
    assert problem["detail"] == []
    assert platform.running() == []


@pytest.mark.parametrize(
    ("body", "named"),
    [
        (b'{"namespace": "test", "name": "no", "priority": 1e999}', "priority must be a number"),
        (b'{"namespace": "test", "name": "no", "priority": NaN}', "priority must be a number"),
        (b"[" * 100_000, "nested too deeply"),
        (b"{", "not JSON"),
    ],
    ids=["infinite", "no number", "deep", "broken"],
)
def test_json_that_is_none_is_refused(platform: Served, body: bytes, named: str) -> None:
    """Python's JSON knows numbers that JSON does not, and ends at a depth."""
    headers = {"Authorization": f"yd-key {KEY_ID}:{SECRET}"}
    answer = requests.post(platform.url + WORK, data=body, headers=headers, timeout=5)
    assert (answer.status_code, answer.json()["errorType"]) == (400, "InvalidRequestException")
    assert named in answer.json()["message"]


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "/nope"), ("PATCH", WORK), ("DELETE", f"{WORK}/x"), ("POST", "/cloudInfo/regions?x=1")],
)
def test_an_unknown_route_is_named(platform: Served, method: str, path: str) -> None:
    """A route that is not there is no thing that is not found: it is refused as an unknown field is."""
    answer = ask(platform, method, path)
    assert (answer.status_code, answer.json()["errorType"]) == (400, "InvalidRequestException")
    assert answer.json()["message"].startswith(f"{method} {path.partition('?')[0]} is not supported")


def test_a_namespace_in_use_is_not_deleted(platform: Served) -> None:
    """A namespace can be deleted until something is in it; it says whether it can."""

    def shown() -> dict[str, Any]:
        found = ask(platform, "GET", "/namespaces?namespaces=used").json()["items"]
        (namespace,) = found
        listed = ask(platform, "GET", f"/namespaces?deletable={str(namespace['deletable']).lower()}").json()
        assert namespace in listed["items"]
        assert ask(platform, "GET", f"/namespaces/{namespace['id']}").json() == namespace
        return namespace

    assert ask(platform, "POST", "/namespaces", {"namespace": "used"}).status_code == 200
    assert shown()["deletable"] is True
    made = ask(platform, "POST", WORK, {**work(), "namespace": "used"}).json()
    assert shown()["deletable"] is False
    refused = ask(platform, "DELETE", f"/namespaces/{shown()['id']}")
    assert (refused.status_code, refused.json()["message"]) == (400, "Namespace used is in use")
    assert shown()
    assert ask(platform, "PUT", f"{WORK}/{made['id']}/transition/CANCELLING").status_code == 200


def test_what_cannot_be_changed_is_not_accepted(platform: Served) -> None:
    """An update says what comes of it: a field of a run specification that stands for good is refused."""
    made = ask(platform, "POST", WORK, {**work(run={"disablePreallocation": True}), "name": "fixed"}).json()
    assert ask(platform, "PUT", WORK, made).status_code == 200
    for other in (False, None):
        made["taskGroups"][0]["runSpecification"]["disablePreallocation"] = other
        refused = ask(platform, "PUT", WORK, made)
        assert refused.status_code == 400
        assert "group: only its priority and tag can be changed" in refused.json()["message"]
    assert ask(platform, "PUT", f"{WORK}/{made['id']}/transition/CANCELLING").status_code == 200


def test_what_is_empty_asks_for_nothing(platform: Served) -> None:
    """An empty parameter is no filter, whatever its name, and an empty field says nothing."""
    assert ask(platform, "GET", f"{WORK}?name=&frob=&statuses=").status_code == 200
    answer = ask(platform, "POST", WORK, work(frob=None, tasks=[]))
    assert answer.status_code == 200, answer.text
    ended = ask(platform, "PUT", f"{WORK}/{answer.json()['id']}/transition/CANCELLING?abort=False")
    assert ended.json()["status"] == "CANCELLED"


@pytest.mark.parametrize(("how", "found"), [("part", 1), ("whole", 0)])
def test_names_in_searches_match_as_chosen(how: Any, found: int) -> None:
    """A part of a name or tag finds it by default, and does not with the option for it."""
    with serve(SchedulerOptions(search_names=how)) as platform:
        made = ask(platform, "POST", WORK, {**work(), "tag": "some-tag"}).json()
        tasks = f"/work/taskGroups/{made['taskGroups'][0]['id']}/tasks"
        assert ask(platform, "POST", tasks, [{"name": "only", "tag": "tag"}]).status_code == 200
        for part, whole in ((f"{WORK}?name=ref", "used"), (f"{WORK}?tag=some", "-tag")):
            assert len(ask(platform, "GET", part).json()) == found
            assert len(ask(platform, "GET", part + whole).json()) == 1
        for part, whole in (("/work/tasks?name=on", "ly"), ("/work/tasks?tag=ta", "g")):
            assert len(ask(platform, "GET", part).json()["items"]) == found
            assert len(ask(platform, "GET", part + whole).json()["items"]) == 1


def test_the_words_are_those_of_the_sdk() -> None:
    """What is refused as unknown is not in the SDK; lists are sorted by what the SDK shows of their items."""
    for words, kind in (
        (vocabulary.WORK_STATUSES, m.WorkRequirementStatus),
        (vocabulary.TASK_STATUSES, m.TaskStatus),
        (vocabulary.POOL_STATUSES, m.WorkerPoolStatus),
        (vocabulary.NODE_STATUSES, m.NodeStatus),
        (vocabulary.WORKER_STATUSES, m.WorkerStatus),
        (vocabulary.COMPUTE_STATUSES, m.ComputeRequirementStatus),
        (vocabulary.INSTANCE_STATUSES, m.InstanceStatus),
        (vocabulary.PROVIDERS, m.CloudProvider),
        (vocabulary.PRICING, m.InstancePricingPreference),
    ):
        assert words == {each.name for each in kind}, kind
    assert set(m.TaskErrorType.__annotations__) == vocabulary.ERROR_TYPES
    for fields, kind in (
        (sorting.SORT_WORK, m.WorkRequirementSummary),
        (sorting.SORT_TASKS, m.Task),
        (sorting.SORT_POOLS, m.WorkerPoolSummary),
        (sorting.SORT_NODES, m.Node),
        (sorting.SORT_COMPUTE, m.ComputeRequirement),
        (sorting.SORT_COMPUTE_SUMMARIES, m.ComputeRequirementSummary),
    ):
        assert set(fields) <= {each.name for each in dataclasses.fields(kind)}, kind
    for fields, kind in (
        (sorting.SORT_INSTANCES, m.Instance),
        (sorting.SORT_TEMPLATES, m.ComputeRequirementTemplateSummary),
        (sorting.SORT_SOURCES, m.ComputeSourceTemplateSummary),
    ):
        assert set(fields) <= set(kind.__annotations__), kind
