"""Faults of machines and tasks, with simulated machines; and the control port, which has them over HTTP."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta

import pytest
import requests
from yellowdog_client import PlatformClient
from yellowdog_client.model import (
    ApiKey,
    AutoShutdown,
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

from tests.controlplane import TEMPLATE, Template
from yellowdog_ray.errors import ClusterStateError, SpecError
from yellowdog_ray.local import Fault, LocalControlPlane

LARGE = Template(
    namespace="test",
    name="large",
    id="ydid:crt:000000:00000000-0000-0000-0000-0000000000a2",
    instance_type="local.large",
    vcpus=8,
    ram=16,
    region="local",
)


class Lab:
    """A platform whose clock is moved by hand, and a client of it."""

    def __init__(self, platform: LocalControlPlane, client: PlatformClient) -> None:
        self.platform, self.client, self.faults = platform, client, platform.faults

    def provision(self, name: str, nodes: int, template: str = "test/small", **properties):
        """Provision a worker pool that grows with its work, whose nodes have one worker each."""
        return self.client.worker_pool_client.provision_worker_pool(
            ComputeRequirementTemplateUsage(
                templateId=template,
                requirementName=name,
                requirementNamespace="local",
                targetInstanceCount=nodes,
            ),
            ProvisionedWorkerPoolProperties(
                createNodeWorkers=NodeWorkerTarget.per_node(1),
                workerTag=name,
                **{"maxNodes": max(nodes, 4), **properties},
            ),
        )

    def submit(self, tag: str, count: int = 1, retries: int = 0) -> list[str]:
        """Give a pool tasks that run until they are ended."""
        run = RunSpecification(taskTypes=["bash"], workerTags=[tag], maximumTaskRetries=retries)
        work = self.client.work_client.add_work_requirement(
            WorkRequirement(
                namespace="local", name=f"work-{time.monotonic_ns()}", taskGroups=[TaskGroup("group", run)]
            )
        )
        tasks = [Task(name=f"task-{number}", taskType="bash") for number in range(count)]
        added = self.client.work_client.add_tasks_to_task_group(work.taskGroups[0], tasks)
        return [str(task.id) for task in added]

    def task(self, task_id: str) -> Task:
        return self.client.work_client.get_task_by_id(task_id)

    def advance(self, seconds: float) -> None:
        self.platform.advance(seconds)

    def up(self, name: str) -> list[str]:
        """List the instances of a pool that are up."""
        return [each["id"] for each in self.books()["instances"] if self._is_up(each, name)]

    @staticmethod
    def _is_up(instance, name: str) -> bool:
        return instance["requirement"] == name and instance["status"] == "RUNNING"

    def source(self, pool) -> tuple[str, str | None]:
        """Tell what the compute source of a pool says of itself."""
        requirement = self.client.compute_client.get_compute_requirement_by_id(pool.computeRequirementId)
        source = requirement.provisionStrategy.sources[0]
        return str(source.status), source.statusMessage

    def control(self, method: str, path: str, body: object = None, token: str | None = None):
        token = self.platform.control_token if token is None else token
        return requests.request(
            method,
            self.platform.control_url + path,
            json=body,
            headers={"Authorization": f"Bearer {token}"},
            timeout=10,
        )

    def books(self):
        return self.control("GET", "/books").json()


@pytest.fixture
def lab() -> Iterator[Lab]:
    with LocalControlPlane(
        templates=(TEMPLATE, LARGE), clock="virtual", boot_delay=60, start_delay=1, stop_delay=5
    ) as platform:
        schema = ServicesSchema(defaultUrl=platform.url)
        with PlatformClient.create(schema, ApiKey(platform.key_id, platform.secret)) as client:
            yield Lab(platform, client)


# -- provisioning -----------------------------------------------------------------------------------------


def test_a_provision_fails(lab):
    """A chosen machine of a chosen pool does not come, and the source says why; the others do."""
    fault = lab.faults.fail_provision("^wanted$", skip=1, message="no spot market here")
    other, pool = lab.provision("other", 2), lab.provision("wanted", 3)
    lab.advance(60)
    assert (len(lab.up("other")), len(lab.up("wanted"))) == (2, 2)
    assert (fault.hits, fault.count, fault.skip) == (1, 0, 0)
    status, message = lab.source(pool)
    assert status == "ERRORED"
    assert "no spot market here" in message
    assert lab.source(other) == ("ACTIVE", None)


def test_a_provision_fails_late(lab):
    """A machine can be known to have failed only after a while; it can be terminated meanwhile."""
    lab.faults.fail_provision(count=2, seconds=300)
    pool = lab.provision("pool", 1)
    lab.advance(299)
    assert lab.books()["instances"][0]["status"] == "PENDING"
    lab.advance(1)
    assert lab.source(pool)[0] == "ERRORED"
    second = lab.provision("second", 1)
    lab.client.compute_client.terminate_compute_requirement_by_id(second.computeRequirementId)
    lab.advance(0)
    assert "compute local/second" not in lab.platform.running()


def test_a_provision_is_late(lab):
    """A delayed machine begins to boot later, and one that is ended before that never does."""
    fault = lab.faults.delay_provision(400, "late", count=None)
    lab.provision("late", 1)
    lab.provision("normal", 1)
    ended = lab.provision("late-too", 1)
    lab.advance(60)
    assert (len(lab.up("late")), len(lab.up("normal"))) == (0, 1)
    lab.client.worker_pool_client.shutdown_worker_pool_by_id(ended.id)
    lab.advance(5)
    assert "compute local/late-too" not in lab.platform.running()
    lab.advance(394)
    assert lab.up("late") == []
    lab.advance(1)
    assert len(lab.up("late")) == 1
    assert fault.hits == 2
    assert sum(type(effect).__name__ == "StartNode" for effect in lab.platform.backend.applied) == 2


def test_the_time_of_a_fault(lab):
    """A fault begins when it is to, and is over when its time is."""
    fault = lab.faults.fail_provision(count=None, after=100, for_=50)
    for name, pause in (("before", 100), ("during", 49), ("still", 1), ("over", 0)):
        lab.provision(name, 1)
        lab.advance(pause)
    lab.advance(60)
    assert [name for name in ("before", "during", "still", "over") if lab.up(name)] == ["before", "over"]
    assert fault.hits == 2


def test_capacity_is_limited(lab):
    """Machines beyond a limit are refused, of one template or of all, until there is room again."""
    large = lab.faults.limit_capacity(1, "test/large", message="out of large ones")
    lab.provision("small", 3)
    pool = lab.provision("large", 2, "test/large")
    lab.advance(60)
    assert (len(lab.up("small")), len(lab.up("large"))) == (3, 1)
    assert "out of large ones" in lab.source(pool)[1]
    assert large.hits == 1
    everything = lab.faults.limit_capacity(4)
    lab.provision("more", 1)
    lab.advance(60)
    assert (lab.up("more"), everything.hits) == ([], 1)
    # A machine that ends makes room for another one.
    lab.faults.lose_node("small")
    lab.provision("again", 2)
    lab.advance(60)
    assert (len(lab.up("again")), everything.hits) == (1, 2)
    assert lab.faults.limit_capacity(None) is None
    assert [limit.template for limit in lab.faults.limits] == ["test/large"]
    lab.provision("unlimited", 3)
    lab.advance(60)
    assert len(lab.up("unlimited")) == 3
    lab.faults.lose_node("large")
    lab.provision("large-again", 2, "test/large")
    lab.advance(60)
    assert len(lab.up("large-again")) == 1


def test_a_pool_gets_what_capacity_there_is(lab):
    """A pool that asks for more machines than there is room for gets as many as there is."""
    lab.faults.limit_capacity(3)
    lab.provision("pool", 10)
    lab.advance(60)
    assert len(lab.up("pool")) == 3


def test_clear(lab):
    """Nothing more goes wrong after it."""
    lab.faults.fail_provision(count=None)
    lab.faults.limit_capacity(0)
    lab.faults.http(Fault("*", "^/application", 418, count=None))
    lab.faults.clear()
    lab.provision("pool", 2)
    lab.advance(60)
    assert len(lab.up("pool")) == 2
    lab.client.application_client.get_application_details()


# -- machines and tasks -----------------------------------------------------------------------------------


def test_a_node_is_lost(lab):
    """A lost node's task goes to another one; it is chosen by its id, its instance's, a host or a pool."""
    pool = lab.provision("pool", 2)
    (task_id,) = lab.submit("pool", retries=4)
    lab.advance(61)
    for ways in ("node", "id", "hostname"):
        task = lab.task(task_id)
        assert task.status == TaskStatus.EXECUTING
        instance = next(each for each in lab.books()["instances"] if each["node"] == task.nodeId)
        assert lab.faults.lose_node(instance[ways], reason="lightning") == [instance["id"]]
        node = lab.client.worker_pool_client.get_node_by_id(task.nodeId)
        assert str(node.status) == "LOST"
        lab.advance(61)
        assert instance["id"] not in lab.up("pool")
    assert lab.task(task_id).status == TaskStatus.EXECUTING
    error = lab.task(task_id).errors[0]
    assert (error.errorType, "lightning" in error.error) == ("ALLOCATION_LOST", True)
    everything = lab.up("pool")
    assert sorted(lab.faults.lose_node("local/pool", count=None)) == sorted(everything)
    assert lab.up("pool") == []
    assert str(lab.client.worker_pool_client.get_worker_pool_by_id(pool.id).status) == "EMPTY"


def test_a_loss_is_noticed_late(lab):
    """Until a loss is noticed the platform takes the node for alive, and gives it tasks that never run."""
    lab.provision("pool", 1)
    lab.advance(60)
    lab.faults.lose_node("pool", noticed_after=120)
    (task_id,) = lab.submit("pool")
    lab.advance(119)
    assert lab.task(task_id).status == TaskStatus.ALLOCATED
    assert len(lab.up("pool")) == 1
    lab.advance(1)
    assert lab.task(task_id).status == TaskStatus.FAILED
    assert lab.up("pool") == []


def test_an_unnoticed_loss_does_not_hold_the_end_up(lab):
    """A machine that is gone already has ended as soon as it is told to."""
    pool = lab.provision("pool", 1)
    lab.advance(60)
    lab.faults.lose_node("pool", noticed_after=3600)
    lab.client.compute_client.terminate_compute_requirement_by_id(pool.computeRequirementId)
    lab.advance(5)
    assert lab.platform.running() == []
    lab.advance(3600)
    assert lab.platform.running() == []


def test_a_machine_that_boots_is_lost(lab):
    """A machine can be lost before it is up, also one whose boot is delayed."""
    lab.faults.delay_provision(1000)
    pool = lab.provision("pool", 2)
    assert len(lab.faults.lose_node("pool", count=None, reason="lightning")) == 2
    assert "lightning" in lab.source(pool)[1]
    lab.advance(2000)
    assert lab.up("pool") == []


def test_a_node_is_preempted(lab):
    """Tasks are warned, and go on elsewhere; the node gets no more of them, and is lost when it said so."""
    lab.provision("pool", 2)
    first, second = lab.submit("pool", 2, retries=1)
    lab.advance(61)
    doomed = lab.task(first).nodeId
    (instance,) = lab.faults.preempt_node(str(doomed), warning=120, reason="the spot price rose")
    lab.advance(5)
    task = lab.task(first)
    assert (task.status, task.errors[0].processExitCode) == (TaskStatus.READY, 143)
    assert lab.task(second).status == TaskStatus.EXECUTING
    lab.advance(114)
    assert str(lab.client.worker_pool_client.get_node_by_id(doomed).status) == "RUNNING"
    lab.advance(1)
    assert str(lab.client.worker_pool_client.get_node_by_id(doomed).status) == "LOST"
    assert instance not in lab.up("pool")
    # Its place is free: the pool grows for the task that waits.
    lab.advance(61)
    assert lab.task(first).status == TaskStatus.EXECUTING
    assert lab.task(first).nodeId != doomed


def test_a_preempted_node_without_work(lab):
    """A preempted node gets no task even when nothing else is free."""
    lab.provision("pool", 1)
    lab.advance(60)
    lab.faults.preempt_node("pool", warning=30)
    (task_id,) = lab.submit("pool")
    lab.advance(29)
    assert lab.task(task_id).status == TaskStatus.READY
    lab.advance(62)
    assert lab.task(task_id).status == TaskStatus.EXECUTING


def test_resizing_spares_what_is_not_preempted(lab):
    """A pool that is made smaller loses no healthy node in place of one that will go anyway."""
    for name, nodes, tasks in (("idle", 3, 0), ("busy", 2, 2)):
        pool = lab.provision(name, nodes, maxNodes=nodes)
        ids = lab.submit(name, tasks, retries=2) if tasks else []
        lab.advance(65)
        lab.faults.preempt_node(name, warning=30)
        lab.client.worker_pool_client.resize_worker_pool(pool, 1)
        lab.advance(29)
        assert len(lab.up(name)) == 2
        assert len(lab.platform.core.scheduler.instances) == nodes + (3 if name == "busy" else 0)
        lab.advance(2)
        requirement = lab.client.compute_client.get_compute_requirement_by_id(pool.computeRequirementId)
        if name == "idle":
            assert (len(lab.up(name)), requirement.targetInstanceCount) == (1, 1)
            continue
        # The other task has gone on all the time; its place free, a node is on its way for the one warned.
        assert [str(lab.task(each).status) for each in ids] == ["READY", "EXECUTING"]
        assert (len(lab.up(name)), requirement.targetInstanceCount) == (1, 2)
        lab.advance(60)
        assert [str(lab.task(each).status) for each in ids] == ["EXECUTING", "EXECUTING"]
        assert len(lab.task(ids[1]).errors or []) == 0


def test_a_preempted_node_does_not_count_for_the_least(lab):
    """The nodes that minNodes holds back are such as stay."""
    pool = lab.provision(
        "pool",
        2,
        minNodes=1,
        idleNodeShutdown=AutoShutdown(enabled=True, timeout=timedelta(minutes=5)),
        idlePoolShutdown=AutoShutdown(enabled=False),
    )
    lab.advance(60)
    lab.faults.preempt_node("pool", warning=3600)
    lab.advance(3600)
    assert len(lab.up("pool")) == 1
    assert str(lab.client.worker_pool_client.get_worker_pool_by_id(pool.id).status) == "IDLE"


def test_a_task_is_killed(lab):
    """A killed task has failed with 137, by its id or by its name."""
    lab.provision("pool", 3)
    ids = lab.submit("pool", 3)
    lab.advance(61)
    assert lab.faults.kill_task(ids[2]) == [ids[2]]
    assert lab.faults.kill_task("task-0") == [ids[0]]
    for task_id, status in zip(ids, ("FAILED", "EXECUTING", "FAILED"), strict=True):
        assert str(lab.task(task_id).status) == status
    assert lab.task(ids[0]).errors[-1].processExitCode == 137
    with pytest.raises(SpecError, match="task-0"):
        lab.faults.kill_task("task-0")


def test_what_cannot_go_wrong(lab):
    """Faults of what is not there, and with arguments that cannot be, are refused."""
    lab.provision("pool", 1)
    refused = [
        lambda: lab.faults.lose_node("nothing"),
        lambda: lab.faults.preempt_node("nothing"),
        lambda: lab.faults.lose_node("pool", count=-1),
        lambda: lab.faults.lose_node("pool", count=0),
        lambda: lab.faults.lose_node("pool", noticed_after=-1),
        lambda: lab.faults.preempt_node("pool", warning=float("nan")),
        lambda: lab.faults.kill_task("nothing"),
        lambda: lab.faults.fail_provision("("),
        lambda: lab.faults.fail_provision(count=1.5),
        lambda: lab.faults.fail_provision(after=-1),
        lambda: lab.faults.delay_provision("soon"),
        lambda: lab.faults.limit_capacity(-1),
        lambda: lab.faults.limit_capacity(1, "test/huge"),
        lambda: Fault("GET", "/", 500, count="1"),
        lambda: Fault("GET", "/", 500, skip=None),
        lambda: Fault("GET", "/", 500, carried_out="no"),
        lambda: Fault("GET", "/", 500, for_=-1),
        lambda: Fault("GET", "/", "hang", seconds="long"),
        lambda: Fault("GET", "/", 500, delay=float("inf")),
        lambda: Fault("GET", "/", 500, after=10**400),
        lambda: Fault("GET", None, 500),
        lambda: Fault("GET", b"/", 500),
        lambda: Fault(7, "/", 500),
        lambda: Fault("GET", "/", 500, headers={"Retry-After": 1}),
        lambda: Fault("GET", "/", 500, headers={1: "x"}),
        lambda: Fault("GET", "/", 500, headers={"Name": "a\r\nOther: b"}),
        lambda: Fault("GET", "/", 500, headers={"Na me": "x"}),
        lambda: Fault("GET", "/", 500, headers=[("Name", "x")]),
        lambda: Fault("GET", "/", 500, body="text"),
        lambda: lab.faults.http("/"),
        lambda: setattr(lab.faults, "latency", "a"),
        lambda: setattr(lab.faults, "latency", float("inf")),
        lambda: lab.faults.fail_provision(b"pool"),
        lambda: lab.faults.fail_provision(message=None),
        lambda: lab.faults.limit_capacity(1.5),
        lambda: lab.faults.limit_capacity(1, 7),
        lambda: lab.faults.lose_node(["pool"]),
        lambda: lab.faults.lose_node("pool", count=1.5),
        lambda: LocalControlPlane(latency=-1),
        lambda: LocalControlPlane(boot_delay="soon"),
    ]
    for attempt in refused:
        with pytest.raises(SpecError):
            attempt()
    assert len(lab.books()["instances"]) == 1
    assert lab.control("GET", "/faults").json() == {"faults": [], "latency": 0.0}


def test_from_any_thread_and_from_the_loop(lab):
    """Faults can be made by many threads at once, and by what runs on the platform's own loop."""
    threads = [threading.Thread(target=lab.faults.fail_provision) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    lab.platform.call(lab.faults.fail_provision)

    async def elsewhere() -> None:
        lab.faults.fail_provision()

    asyncio.run(elsewhere())
    assert len(lab.faults.provision) == 22


def test_calls_end_when_the_platform_closes():
    """Who waits for a platform that closes is told so; nobody waits for ever."""
    platform = LocalControlPlane(clock="virtual").start()
    ends: list[Exception] = []

    def advance() -> None:
        try:
            while True:
                platform.advance(1)
        except Exception as error:
            ends.append(error)

    threads = [threading.Thread(target=advance, daemon=True) for _ in range(4)]
    for thread in threads:
        thread.start()
    # One that is waiting for its turn when the platform closes.
    began, go_on = threading.Event(), threading.Event()
    busy = threading.Thread(target=platform.call, args=(lambda: began.set() or go_on.wait(10),), daemon=True)
    busy.start()
    assert began.wait(10)
    closing = threading.Thread(target=platform.close, daemon=True)
    closing.start()
    time.sleep(0.1)
    go_on.set()
    for thread in (*threads, busy, closing):
        thread.join(10)
        assert not thread.is_alive()
    assert [type(error) for error in ends] == [ClusterStateError] * 4


def test_a_busy_platform_is_not_waited_for(monkeypatch):
    """A call that it does not come to in time is taken back, and says so."""
    monkeypatch.setattr("yellowdog_ray.local.control_plane.CALL_SECONDS", 0.2)
    with LocalControlPlane() as platform:
        go_on, calls = threading.Event(), []
        platform.loop.call_soon_threadsafe(go_on.wait, 10)
        with pytest.raises(ClusterStateError, match=r"busy with something else for 0\.2 s"):
            platform.call(calls.append, 1)
        go_on.set()
        monkeypatch.undo()
        platform.call(calls.append, 2)
        assert calls == [2]


def test_the_platform_is_asked_by_what_it_calls():
    """A callback on the platform's own thread may call it; what cannot be done from there says so."""
    answers = []

    def fail_boot(start) -> str:
        answers.append(platform.running())
        platform.faults.fail_provision()
        with pytest.raises(ClusterStateError, match="is being moved"):
            platform.advance(1)
        return "no image"

    with LocalControlPlane(clock="virtual", fail_boot=fail_boot, boot_delay=5) as platform:
        schema = ServicesSchema(defaultUrl=platform.url)
        with PlatformClient.create(schema, ApiKey(platform.key_id, platform.secret)) as client:
            Lab(platform, client).provision("pool", 1, platform.template_names[0])
            platform.advance(5)
        assert answers == [["pool local/pool", "compute local/pool"]]
        assert len(platform.faults.provision) == 1
        platform.call(platform.close)
    with pytest.raises(ClusterStateError):
        platform.running()


def test_a_closed_platform():
    with LocalControlPlane() as platform:
        pass
    with pytest.raises(ClusterStateError):
        platform.faults.lose_node("pool")
    platform.faults.clear()
    with pytest.raises(ClusterStateError):
        _ = LocalControlPlane().control_url


def test_the_time_of_http_faults():
    """A fault of requests begins when it is to and is over when its time is, by the machine's clock."""
    with LocalControlPlane() as platform:
        before = time.monotonic()
        fault = platform.faults.http(Fault("GET", "^/$", 418, count=None, after=0.3, for_=0.3))
        began, calls = time.monotonic(), []
        while (sent := time.monotonic()) < began + 1:
            key = {"Authorization": f"yd-key {platform.key_id}:{platform.secret}"}
            code = requests.get(platform.url, headers=key, timeout=5).status_code
            # How long after the fault was made it came in, at least and at most: the machine may be slow.
            calls.append((sent - began, time.monotonic() - before, code))
    assert {code for _, latest, code in calls if latest < 0.3} == {200}
    assert {code for earliest, latest, code in calls if earliest >= 0.3 and latest < 0.6} == {418}
    assert {code for earliest, _, code in calls if earliest >= 0.6} == {200}
    assert fault.hits == sum(code == 418 for _, _, code in calls)


# -- the control port -------------------------------------------------------------------------------------


def test_the_control_port_wants_its_token(lab):
    for token in ("", "wrong", "\xfc", lab.platform.secret):
        for method, path in (("GET", "/books"), ("POST", "/faults"), ("DELETE", "/faults")):
            assert lab.control(method, path, token=token).status_code == 401
    assert requests.get(lab.platform.control_url + "/books", timeout=5).status_code == 401
    # Nor does the API's own key open it, or its token the API.
    key = {"Authorization": f"yd-key {lab.platform.key_id}:{lab.platform.secret}"}
    assert requests.get(lab.platform.control_url + "/books", headers=key, timeout=5).status_code == 401
    token = {"Authorization": f"Bearer {lab.platform.control_token}"}
    assert requests.get(lab.platform.url + "/application", headers=token, timeout=5).status_code == 401


def test_faults_over_http(lab):
    """Every kind of fault can be made, listed and ended by another process."""
    kinds = [
        {"kind": "http", "method": "GET", "path": "^/keyrings", "what": 418, "body": "I am", "for": 1000},
        {"kind": "fail_provision", "pool": "pool", "message": "no luck"},
        {"kind": "delay_provision", "seconds": 10, "pool": "late", "count": None},
        {"kind": "limit_capacity", "nodes": 4, "template": "test/small"},
        {"kind": "latency", "seconds": 0.001},
    ]
    answer = lab.control("POST", "/faults", kinds)
    assert (answer.status_code, len(answer.json())) == (200, 5)
    assert answer.json()[0]["for"] == 1000
    key = {"Authorization": f"yd-key {lab.platform.key_id}:{lab.platform.secret}"}
    tea = requests.get(lab.platform.url + "/keyrings", headers=key, timeout=5)
    assert (tea.status_code, tea.text) == (418, "I am")
    lab.provision("pool", 3)
    assert lab.control("POST", "/clock", {"advance": 60}).json()["time"] == lab.platform.core.now()
    listed = lab.control("GET", "/faults").json()
    assert listed["latency"] == 0.001
    assert [(each["kind"], each["hits"]) for each in listed["faults"]] == [
        ("http", 1),
        ("fail_provision", 1),
        ("delay_provision", 0),
        ("limit_capacity", 0),
    ]
    (first, second) = lab.submit("pool", 2)
    lab.advance(1)
    assert lab.control("POST", "/faults", {"kind": "kill_task", "which": first}).json() == [
        {"tasks": [first]}
    ]
    assert lab.task(first).errors[-1].processExitCode == 137
    lost = lab.control("POST", "/faults", {"kind": "lose_node", "which": str(lab.task(second).nodeId)})
    assert len(lost.json()[0]["instances"]) == 1
    assert lab.task(second).status == TaskStatus.FAILED
    preempted = lab.control("POST", "/faults", {"kind": "preempt_node", "which": "pool", "warning": 10})
    assert preempted.json()[0]["instances"] == lab.up("pool")
    lab.advance(10)
    assert lab.up("pool") == []
    assert lab.control("DELETE", "/faults").json() == {}
    assert lab.control("GET", "/faults").json()["faults"] == []
    unlimited = lab.control("POST", "/faults", {"kind": "limit_capacity", "nodes": None})
    assert unlimited.json() == [{}]


def test_books(lab):
    """The books tell what there is, and the clock's time; what has ended is no part of them."""
    pool = lab.provision("pool", 2)
    (task_id,) = lab.submit("pool")
    lab.advance(61)
    books = lab.books()
    assert books["time"] == lab.platform.core.now()
    assert books["requests"] == lab.faults.requests == len(lab.faults.seen)
    assert sorted(books["running"])[:2] == ["compute local/pool", "pool local/pool"]
    assert [(each["id"], each["status"], each["nodes"]) for each in books["pools"]] == [
        (str(pool.id), "RUNNING", 2)
    ]
    (task,) = books["tasks"]
    assert (task["id"], task["name"], task["status"]) == (task_id, "task-0", "EXECUTING")
    assert task["node"] in {each["node"] for each in books["instances"]}
    lab.faults.kill_task("task-0")
    lab.client.worker_pool_client.shutdown_worker_pool_by_id(pool.id)
    lab.advance(60)
    books = lab.books()
    assert [books[key] for key in ("running", "pools", "instances", "tasks")] == [[], [], [], []]


@pytest.mark.parametrize(
    "body",
    [
        None,
        7,
        {},
        {"kind": "explode"},
        {"kind": "clear"},
        {"kind": "http", "method": "GET"},
        {"kind": "http", "method": "GET", "path": "/", "what": 500, "hits": 3},
        {"kind": "http", "method": "GET", "path": "/", "what": 500, "body": 3},
        {"kind": "http", "method": "GET", "path": "/", "what": 500, "body": "\ud800"},
        {"kind": "http", "method": "GET", "path": "\ud800", "what": 500},
        {"kind": "fail_provision", "nodes": 3},
        {"kind": "delay_provision"},
        {"kind": "limit_capacity", "nodes": "few"},
        {"kind": "lose_node", "which": "nothing"},
        {"kind": "lose_node", "which": ["nothing"]},
        {"kind": "kill_task"},
        {"kind": "latency"},
        {"kind": "latency", "seconds": -1},
        {"kind": "latency", "seconds": 1, "minutes": 1},
    ],
)
def test_the_control_port_refuses(lab, body):
    """What is no fault is refused with the reason, and nothing goes wrong."""
    answer = lab.control("POST", "/faults", body)
    assert answer.status_code == 400
    assert answer.json()["error"]
    # Nothing of how it is made.
    assert not re.search("__init__|argument|positional|Faults|_provision\\(", answer.json()["error"])
    if isinstance(body, dict) and body.get("body") == 3:
        assert answer.json()["error"] == "body must be text, not 3"
    assert lab.control("GET", "/faults").json() == {"faults": [], "latency": 0.0}


def test_what_a_kind_of_fault_has(lab):
    """A field too few or too many is named, with those that there are."""
    for body, error in (
        ({"kind": "http", "what": 500, "method": "GET"}, "http needs path"),
        ({"kind": "lose_node"}, "lose_node needs which"),
        (
            {"kind": "delay_provision", "seconds": 1, "message": "x"},
            "delay_provision has no message; it has seconds, pool, count, skip, after, for",
        ),
    ):
        assert lab.control("POST", "/faults", body).json() == {"error": error}


def test_what_the_control_port_does_not_have(lab):
    """An unknown route or method is refused in the words of the rest, for those who have the token."""
    for method, path, status in (("GET", "/nope", 404), ("PUT", "/faults", 405), ("GET", "/clock", 405)):
        answer = lab.control(method, path)
        assert answer.status_code == status
        assert answer.json()["error"].startswith(f"there is no {method} {path}; there is GET /books, GET ")
        assert lab.control(method, path, token="wrong").status_code == 401


def test_the_clock_over_http(lab):
    for wrong in (None, {}, {"advance": -1}, {"advance": "1"}, {"advance": 1e12}):
        assert lab.control("POST", "/clock", wrong).status_code == 400
    assert '{"advance": 3600}' in lab.control("POST", "/clock").json()["error"]
    headers = {"Authorization": f"Bearer {lab.platform.control_token}"}
    for raw in (b'{"advance": 1e999}', b'{"advance": NaN}', b"[" * 100_000, b"{"):
        answer = requests.post(f"{lab.platform.control_url}/clock", data=raw, headers=headers, timeout=10)
        assert (answer.status_code, bool(answer.json()["error"])) == (400, True)
    with LocalControlPlane() as platform:
        answer = Lab(platform, lab.client).control("POST", "/clock", {"advance": 1})
    assert answer.status_code == 409
    assert "runs by itself" in answer.json()["error"]


def test_a_control_plane_in_another_process():
    """What a process of its own prints is enough to move its clock and to let things go wrong there."""
    command = [sys.executable, "-m", "yellowdog_ray.local.control_plane", "--clock", "virtual"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        about = json.loads(process.stdout.readline())
        headers = {"Authorization": f"Bearer {about['control_token']}"}
        with requests.Session() as session:
            session.headers.update(headers)
            before = session.get(f"{about['control_url']}/books", timeout=5).json()["time"]
            answer = session.post(f"{about['control_url']}/clock", json={"advance": 3600}, timeout=5)
            assert answer.json()["time"] == pytest.approx(before + 3600)
            fault = {"kind": "http", "method": "GET", "path": "^/$", "what": 418}
            assert session.post(f"{about['control_url']}/faults", json=fault, timeout=5).status_code == 200
        key = {"Authorization": f"yd-key {about['key_id']}:{about['secret']}"}
        assert requests.get(about["url"], headers=key, timeout=5).status_code == 418
        process.stdin.close()
        assert process.wait(10) == 0
