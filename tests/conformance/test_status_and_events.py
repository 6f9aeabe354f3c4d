"""What a cluster says of itself: status, events and plan, against the simulated platform."""

from __future__ import annotations

import gzip
import json
import logging
import re
import threading
from datetime import timedelta

import pytest

from tests.clusters import (
    SHORT,
    attach,
    eventually,
    let_exit,
    make,
    nodes,
    state_of,
    tasks,
)
from tests.controlplane import SECRET, TEMPLATE, Fault
from yellowdog_ray.errors import (
    BuildError,
    BuildTimeoutError,
    ClusterStateError,
    CredentialsError,
    PlatformError,
    PlatformUnreachableError,
    SpecError,
    TeardownError,
    WaitTimeoutError,
)
from yellowdog_ray.raydog import events, plan
from yellowdog_ray.raydog.status import NodeFailure

GROUP = "worker-nodes-01"


pytestmark = pytest.mark.usefixtures("hurried")


class Recorder:
    """A listener that keeps what it hears, in order."""

    def __init__(self) -> None:
        self.heard: list[events.Event] = []

    def __call__(self, event: events.Event) -> None:
        self.heard.append(event)

    def take(self) -> list[str]:
        """The kinds of what was heard since the last call."""
        heard, self.heard = self.heard, []
        return [type(event).__name__ for event in heard]

    def only(self, kind: type) -> list:
        return [event for event in self.heard if type(event) is kind]


# -- status --------------------------------------------------------------------------------------------


def summary(cluster) -> tuple[str, int, int, int, int, bool]:
    status = cluster.status()
    counts = (status.wanted_workers, status.registered_workers, status.executing_workers)
    return (status.phase, *counts, status.failed_workers, status.healthy)


def test_through_a_life(platform):
    """The counts follow the cluster from before its build to after its end."""
    cluster = make(platform)
    cluster.add_worker_pool("test/small", None, 2)
    assert summary(cluster) == ("not built yet", 2, 0, 0, 0, False)
    assert cluster.status().checked is None
    assert platform.faults.seen == []
    cluster.build(SHORT)
    cluster.wait_for_workers(timeout=10)
    assert summary(cluster) == ("running", 2, 2, 2, 0, True)
    status = cluster.status()
    assert status.checked is not None
    assert status.head_private_ip == cluster.head_node_private_ip
    assert status.work_requirement_id == cluster.work_requirement_id
    assert status.work_requirement_status == "RUNNING"
    head, workers = status.pools["head-node"], status.pools[GROUP]
    assert (head.name, head.role, head.wanted, head.registered, head.executing) == (
        "demo-00-head",
        "head",
        1,
        1,
        1,
    )
    assert (workers.name, workers.role, workers.status) == ("demo-01-wrkrs", "worker", "RUNNING")
    assert workers.id == cluster.worker_pool_ids[0]
    let_exit(platform, GROUP, 7, task=f"{GROUP}-00001")
    eventually(lambda: tasks(platform, GROUP, "FAILED"))
    assert summary(cluster) == ("running", 2, 2, 1, 1, False)
    cluster.scale_worker_pool(GROUP, 3)
    cluster.wait_for_workers(timeout=10)
    assert summary(cluster)[:5] == ("running", 3, 3, 3, 1)
    cluster.remove_worker_pool_by_internal_name(GROUP)
    assert summary(cluster) == ("running", 0, 0, 0, 0, True)
    cluster.shut_down()
    seen = len(platform.faults.seen)
    assert summary(cluster) == ("shut down", 0, 0, 0, 0, False)
    assert len(platform.faults.seen) == seen


def test_while_it_is_being_built(platform):
    """Another thread may look at a cluster that is being built."""
    platform.backend.boot_delay = 0.5
    cluster = make(platform)
    cluster.add_worker_pool("test/small", None, 2)
    building = threading.Thread(target=cluster.build, args=[SHORT])
    building.start()
    eventually(lambda: nodes(platform, "demo-01-wrkrs") == 2)
    status = cluster.status()
    assert (status.phase, status.registered_workers, status.wanted_workers) == ("being built", 0, 2)
    assert not status.healthy
    building.join()
    cluster.shut_down()


@pytest.mark.parametrize(("code", "said"), [(7, r"FAILED with exit code 7"), (0, r"ended COMPLETED")])
def test_reasons_of_failed_nodes(platform, code, said):
    """Every worker that has ended is there with its task, its node, and how it ended."""
    with make(platform) as cluster:
        cluster.add_worker_pool("test/small", None, 3)
        cluster.build(SHORT)
        cluster.wait_for_workers(timeout=10)
        let_exit(platform, GROUP, code, "first line\nlast words", task=f"{GROUP}-00002")
        let_exit(platform, GROUP, code, "", task=f"{GROUP}-00003")
        eventually(lambda: len(tasks(platform, GROUP, "EXECUTING")) == 1)
        failed = cluster.status().pools[GROUP].failed
        assert [failure.task for failure in failed] == [f"{GROUP}-00002", f"{GROUP}-00003"]
        assert all(isinstance(failure, NodeFailure) for failure in failed)
        assert all(re.search(said, failure.reason) for failure in failed)
        assert len({failure.node_id for failure in failed}) == 2
        assert all(failure.node_id.startswith("ydid:node:") for failure in failed)
        assert ("last words" in failed[0].reason) is (code != 0)
        shown = str(cluster.status())
        assert f"Failed: {GROUP}-00002 (node {failed[0].node_id})" in shown
        assert json.loads(json.dumps(cluster.status().to_dict()))["pools"][GROUP]["failed"][0]["task"] == (
            f"{GROUP}-00002"
        )


def test_a_worker_that_was_cancelled(platform):
    """A task that somebody has cancelled has not failed; its node is missing until the pool is scaled."""
    with make(platform) as cluster:
        cluster.add_worker_pool("test/small", None, 2)
        cluster.build(SHORT)
        assert cluster.wait_for_workers(timeout=10) == 2
        assert cluster.status().healthy
        task = platform.call(
            lambda: next(
                task.id
                for task in platform.core.scheduler.tasks.values()
                if task.spec.name == f"{GROUP}-00001"
            )
        )
        cluster.yd_client.work_client.cancel_task_by_id(task, abort=True)
        eventually(lambda: cluster.status().executing_workers == 1)
        status = cluster.status()
        assert not status.healthy
        assert (status.pools[GROUP].missing, status.failed_workers) == (1, 0)
        assert f"Missing: 1 of 2 nodes of {GROUP}: they have no task" in str(status)
        cluster.scale_worker_pool(GROUP, 2)
        assert cluster.wait_for_workers(timeout=10) == 2
        assert cluster.status().healthy


def test_a_pool_that_can_give_no_nodes(platform):
    """A pool whose machines cannot boot says why, and the other pools' counts are not touched by it."""
    with make(platform) as cluster:
        cluster.add_worker_pool("test/small", None, 1)
        cluster.build(SHORT)
        cluster.wait_for_workers(timeout=10)
        platform.backend.fail_boot = lambda start: "quota exceeded"
        cluster.add_worker_pool("test/small", None, 2, "poor")
        eventually(lambda: nodes(platform, "demo-02-wrkrs") == 0)
        status = cluster.status()
        poor = status.pools["poor"]
        assert "quota exceeded" in poor.problem
        assert (poor.wanted, poor.registered, poor.executing) == (2, 0, 0)
        assert status.pools[GROUP].problem is None
        assert (status.wanted_workers, status.executing_workers, status.healthy) == (3, 1, False)
        assert "Problem of poor: " in str(status)


def test_nodes_that_are_on_their_way_are_no_problem(platform):
    """While nodes boot nothing is wrong with a cluster."""
    with make(platform) as cluster:
        cluster.build(SHORT)
        platform.backend.boot_delay = 30
        cluster.add_worker_pool("test/small", None, 2)
        assert summary(cluster) == ("running", 2, 0, 0, 0, True)


def test_few_calls(platform):
    """A healthy cluster costs three calls, however many pools it has."""
    with make(platform) as cluster:
        for _ in range(5):
            cluster.add_worker_pool("test/small", None, 2)
        cluster.build(SHORT)
        cluster.wait_for_workers(timeout=10)
        seen = len(platform.faults.seen)
        assert cluster.status().healthy
        assert len(platform.faults.seen) == seen + 3
        assert {method for method, _ in platform.faults.seen[seen:]} == {"GET"}


def test_html(platform):
    """In a notebook a cluster shows its status as a table; where nobody answers, what it knows."""
    cluster = make(platform)
    cluster.add_worker_pool("test/small", None, 2, "<b>&mine")
    assert "not built yet" in cluster._repr_html_()
    cluster.build(SHORT)
    cluster.wait_for_workers(timeout=10)
    html = cluster._repr_html_()
    assert html == cluster.status()._repr_html_()
    assert "&lt;b&gt;&amp;mine" in html
    assert "<b>" not in html
    assert "<td>2</td><td>2</td><td>2</td><td>0</td>" in html
    platform.faults.faults = [Fault("*", "/", "before", None)]
    with pytest.raises(PlatformUnreachableError):
        cluster.status()
    shown = cluster._repr_html_()
    assert "running" in shown
    assert "<td>2</td><td>?</td>" in shown
    platform.faults.faults = [Fault("*", "/", 401, None)]
    assert "running" in cluster._repr_html_()
    platform.faults.clear()
    cluster.shut_down()
    assert "shut down" in cluster._repr_html_()


def test_a_status_that_cannot_be_asked_for(platform):
    """An API that does not answer is an error of a status, which changes nothing for the cluster."""
    with make(platform) as cluster:
        cluster.build(SHORT)
        for path in ("/work/requirements", "/workerPools", "/compute"):
            platform.faults.faults = [Fault("GET", path, 500, None)]
            with pytest.raises(PlatformError):
                cluster.status()
            platform.faults.clear()
        assert cluster.status().healthy


def test_workers_are_counted_by_their_tasks(platform):
    """Without an access it is the tasks that are counted, and the number says so."""
    with make(platform) as cluster:
        cluster.add_worker_pool("test/small", None, 2)
        cluster.build(SHORT)
        count = cluster.wait_for_workers(timeout=10)
        assert isinstance(count, int)
        assert (count, count.source) == (2, "tasks")
        assert (attach(state_of(cluster)).wait_for_workers(1, timeout=10)).source == "tasks"


# -- events --------------------------------------------------------------------------------------------


def test_events_of_a_life(platform):
    """Build, wait, add, scale, remove and shut down are told in the order in which they happen."""
    heard = Recorder()
    cluster = make(platform, on_event=heard)
    cluster.add_worker_pool("test/small", None, 2)
    assert heard.take() == []
    cluster.build(SHORT)
    started = heard.heard[0]
    assert started == events.BuildStarted("demo", ("demo-00-head", "demo-01-wrkrs"), 3)
    finished = heard.heard[-1]
    assert (finished.private_ip, finished.public_ip) == (cluster.head_node_private_ip, None)
    provisioned = {event.pool: event for event in heard.only(events.PoolProvisioned)}
    assert provisioned["demo-01-wrkrs"].id == cluster.worker_pool_ids[0]
    assert provisioned["demo-01-wrkrs"].nodes == 2
    assert heard.only(events.TaskExecuting) == [
        events.TaskExecuting("demo", "head", cluster.head_node_task_id)
    ]
    kinds = heard.take()
    order = ["BuildStarted", "NodeRegistered", "TaskExecuting", "BuildFinished"]
    assert [kind for kind in kinds if kind in order] == order
    assert sorted(kinds) == sorted(
        [*order, "WorkRequirementAdded", *["PoolProvisioned"] * 2, *["TasksSubmitted"] * 2]
    )
    assert kinds.index("WorkRequirementAdded") < kinds.index("TasksSubmitted")
    assert kinds.index("NodeRegistered") < kinds.index("TasksSubmitted") < kinds.index("TaskExecuting")

    cluster.wait_for_workers(timeout=10)
    counted = heard.only(events.WorkersCounted)
    assert [event.have for event in counted] == sorted({event.have for event in counted})
    assert (counted[-1].have, counted[-1].want, counted[-1].source) == (2, 2, "tasks")
    assert set(heard.take()) == {"WorkersCounted"}

    cluster.add_worker_pool("test/small", None, 1, "mine")
    assert heard.heard[-1] == events.PoolAdded("demo", "demo-02-wrkrs", "mine", 1)
    kinds = heard.take()
    assert sorted(kinds[:-1]) == ["PoolProvisioned", "TasksSubmitted"]
    assert kinds[-1] == "PoolAdded"

    cluster.scale_worker_pool("mine", 3)
    cluster.scale_worker_pool("mine", 1)
    assert heard.heard == [
        events.PoolScaled("demo", "demo-02-wrkrs", "mine", 1, 3),
        events.PoolScaled("demo", "demo-02-wrkrs", "mine", 3, 1),
    ]
    heard.take()
    cluster.remove_worker_pool_by_internal_name("mine")
    assert heard.heard == [events.PoolRemoved("demo", "demo-02-wrkrs", "mine")]
    heard.take()

    cluster.shut_down()
    items = heard.heard[0].items
    assert [item.split()[:3] for item in items] == [
        ["work", "requirement", cluster.work_requirement_id],
        ["worker", "pool", "demo-00-head"],
        ["worker", "pool", "demo-01-wrkrs"],
    ]
    assert heard.take() == ["ShutdownStarted", "ShutdownFinished"]
    cluster.shut_down()
    assert heard.take() == []


def test_events_of_a_build_that_fails(platform):
    """A failed build is told with its reason, and that what it had created was taken back."""
    heard = Recorder()
    platform.faults.faults = [Fault("POST", "/taskGroups/", 403, None)]
    cluster = make(platform, on_event=heard)
    with pytest.raises(CredentialsError) as caught:
        cluster.build(SHORT)
    failed = heard.heard[-1]
    assert failed == events.BuildFailed("demo", str(caught.value), ())
    kinds = heard.take()
    assert kinds[0] == "BuildStarted"
    assert kinds[-2:] == ["RollbackStarted", "BuildFailed"]
    assert "BuildFinished" not in kinds


def test_events_of_a_build_that_leaves_something(platform):
    """What a failed build could not take back is in the event, and in that of the shut-down that goes on."""
    heard = Recorder()
    platform.faults.faults = [
        Fault("POST", "/taskGroups/", 403, None),
        Fault("PUT", "/transition/TERMINATED", 500, None),
        Fault("DELETE", "/workerPools/", 500, None),
    ]
    cluster = make(platform, on_event=heard)
    with pytest.raises(CredentialsError):
        cluster.build(SHORT)
    (left,) = heard.heard[-1].left
    assert left.startswith("worker pool demo-00-head ydid:wrkrpool:")
    heard.take()
    with pytest.raises(TeardownError) as caught:
        cluster.shut_down()
    assert heard.heard[-1] == events.ShutdownFailed("demo", str(caught.value), (left,))
    kinds = heard.take()
    assert [kind for kind in kinds if kind != "CallRetried"] == ["ShutdownStarted", "ShutdownFailed"]
    platform.faults.clear()
    cluster.shut_down()
    assert heard.take() == ["ShutdownStarted", "ShutdownFinished"]


def test_events_of_an_addition_that_fails(platform):
    """An addition that is taken back is told, and no pool is said to have been added."""
    heard = Recorder()
    with make(platform, on_event=heard) as cluster:
        cluster.build(SHORT)
        heard.take()
        platform.faults.faults = [Fault("POST", "/workerPools/provisioned", 403, None)]
        with pytest.raises(CredentialsError):
            cluster.add_worker_pool("test/small", None, 1)
        platform.faults.clear()
        kinds = heard.take()
        assert kinds.count("RollbackStarted") == 1
        assert not {"PoolAdded", "PoolProvisioned"} & set(kinds)


def test_a_build_that_is_refused_at_once_began_nothing(platform):
    """Where nothing was created no build is said to have begun."""
    heard = Recorder()
    cluster = make(platform, head_node_compute_requirement_template_id="test/none", on_event=heard)
    with pytest.raises(PlatformError):
        cluster.build(SHORT)
    kinds = heard.take()
    assert kinds[-2:] == ["RollbackStarted", "BuildFailed"]
    assert set(kinds[:-2]) == {"CallRetried"}


def test_waiting_is_told(platform):
    """What is waited for is told from time to time."""
    heard = Recorder()
    platform.backend.boot_delay = 30
    with pytest.raises(BuildTimeoutError):
        make(platform, on_event=heard).build(timedelta(seconds=0.8))
    assert [event.what for event in heard.only(events.Waiting)] == ["the head node to register"]
    platform.backend.boot_delay = 0.005
    with make(platform, "other", on_event=heard) as cluster:
        cluster.build(SHORT)
        platform.backend.boot_delay = 30
        cluster.add_worker_pool("test/small", None, 1, "slow")
        heard.take()
        with pytest.raises(WaitTimeoutError):
            cluster.wait_for_workers(timeout=1.2)
        assert [event.what for event in heard.only(events.Waiting)] == ["workers of slow"]
        assert [event.have for event in heard.only(events.WorkersCounted)] == [0]


def test_retried_calls_are_told(platform):
    """A call that is tried again is told with what it does and why."""
    heard = Recorder()
    platform.faults.faults = [
        Fault("POST", "/work/requirements", 503),
        Fault("GET", "/work/tasks/", "before"),
    ]
    with make(platform, on_event=heard) as cluster:
        cluster.build(SHORT)
        retried = heard.only(events.CallRetried)
        assert [event.what for event in retried] == [
            "add the work requirement demo",
            f"read the task {cluster.head_node_task_id}",
        ]
        assert retried[0].reason == "503 Service Unavailable"
        assert str(retried[0]) == "Trying again to add the work requirement demo: 503 Service Unavailable"


def test_a_listener_that_fails_changes_nothing(platform, caplog):
    """What a listener raises is logged, and the cluster goes its way."""
    heard = []

    def listen(event: events.Event) -> None:
        heard.append(type(event).__name__)
        raise RuntimeError("a fault of the listener's own")

    with make(platform, on_event=listen) as cluster:
        cluster.add_worker_pool("test/small", None, 1)
        cluster.build(SHORT)
        assert cluster.wait_for_workers(timeout=10) == 1
        cluster.scale_worker_pool(GROUP, 2)
        cluster.remove_worker_pool_by_internal_name(GROUP)
    assert heard[0] == "BuildStarted"
    assert heard[-1] == "ShutdownFinished"
    failures = [record for record in caplog.records if "listener" in record.getMessage()]
    assert len(failures) == len(heard)
    assert all(record.levelno == logging.WARNING and record.exc_info for record in failures)


def test_a_listener_may_ask_the_cluster(platform):
    """A listener may call the cluster from the thread in which the event happens."""
    phases = []
    cluster = make(platform, on_event=lambda event: phases.append((type(event).__name__, repr(cluster))))
    cluster.build(SHORT)
    cluster.shut_down()
    assert ("BuildFinished", "<RayDogCluster test/demo, running>") in phases
    assert phases[-1] == ("ShutdownFinished", "<RayDogCluster test/demo, shut down>")


def test_listeners_in_all_threads_at_once(platform):
    """What a listener asks the cluster waits for no thread that another listener holds."""
    heard: list[events.Event] = []

    def listener(event) -> None:
        if isinstance(event, events.PoolProvisioned):
            cluster.status()
            heard.append(event)

    cluster = make(platform, on_event=listener)
    for _ in range(20):
        cluster.add_worker_pool("test/small", None, 1)
    building = threading.Thread(target=cluster.build, args=[SHORT], daemon=True)
    building.start()
    building.join(20)
    assert not building.is_alive()
    assert len(heard) == 21
    cluster.shut_down()


def test_what_is_no_listener(platform):
    """What cannot be called is refused when the cluster is made."""
    with pytest.raises(SpecError, match="on_event: a function is needed, not str"):
        make(platform, on_event="print")


def test_no_display_where_there_is_no_terminal(platform, capfd):
    """In pytest and in a pipe nothing is written to the standard streams."""
    with make(platform) as cluster:
        assert cluster._display is None
        cluster.build(SHORT)
    assert tuple(capfd.readouterr()) == ("", "")


def test_events_are_in_the_log_too(platform, caplog):
    """Every event is a line of the log, for scripts without a listener."""
    heard = Recorder()
    with caplog.at_level("INFO", "yellowdog_ray.raydog.events"), make(platform, on_event=heard) as cluster:
        cluster.build(SHORT)
    lines = iter([record.getMessage() for record in caplog.records if record.name.endswith(".events")])
    # In this order; a cluster of another test, of which the head is still watched, may say something between.
    assert heard.heard
    assert all(str(event) in lines for event in heard.heard)


# -- plan ----------------------------------------------------------------------------------------------


class Bodies:
    """Keeps the bodies of what is created, by wrapping the platform's application."""

    def __init__(self, served) -> None:
        self.taken: list[tuple[str, str, object]] = []
        self._app, served.faults.app = served.faults.app, self

    async def __call__(self, scope, receive, send) -> None:
        body = b""

        async def read():
            nonlocal body
            message = await receive()
            body += message.get("body", b"")
            whole = message["type"] == "http.request" and not message.get("more_body")
            if scope["method"] == "POST" and whole:
                # The SDK compresses what it sends.
                text = gzip.decompress(body) if body.startswith(b"\x1f\x8b") else body
                self.taken.append((scope["method"], scope["path"], json.loads(text)))
            return message

        await self._app(scope, read, send)


def test_the_plan_is_what_is_sent(platform, monkeypatch):
    """What plan() says is what the platform receives, but for what nobody knew before."""
    monkeypatch.setattr(plan, "TASK_BATCH", 2)
    received = Bodies(platform)
    cluster = make(
        platform,
        cluster_tag="team",
        cluster_lifetime=timedelta(hours=2),
        head_node_ray_start_script="echo head\necho two",
        head_node_images_id="ami-1",
        head_node_userdata="#cloud-config",
        head_node_instance_tags={"owner": "me"},
        head_node_metrics_enabled=True,
        enable_observability=True,
        observability_node_compute_requirement_template_id=TEMPLATE.id,
    )
    cluster.add_worker_pool("test/small", "echo worker", 5, "mine", None, "#worker", {"a": "b"}, False)
    cluster.add_worker_pool(TEMPLATE.id, None, 1)
    timeout = timedelta(hours=30)
    planned = cluster.plan(timeout).to_dict()
    assert received.taken == []
    assert platform.faults.seen == []
    cluster.build(timeout)
    cluster.wait_for_workers(timeout=10)

    build_id = state_of(cluster).build_id
    known = {
        "<random build id>": build_id,
        "<head's private address>": cluster.head_node_private_ip,
        "<observability node's private address>": cluster.observability_node_private_ip,
        "********": cluster._token,
    }
    for name, identifier in group_ids(platform).items():
        known[f"<id of group {name}>"] = identifier

    def filled(value):
        if isinstance(value, str):
            for placeholder, actual in known.items():
                value = value.replace(placeholder, actual)
            return value
        if isinstance(value, list):
            return [filled(item) for item in value]
        if isinstance(value, dict):
            return {name: filled(item) for name, item in value.items()}
        return value

    expected = []
    for request in filled(planned["requests"]):
        body = request["body"]
        if isinstance(body, dict) and "calls" in body:
            first, last = body["names"]
            stem = first.rpartition("-")[0]
            names = [f"{stem}-{number:05d}" for number in range(1, body["count"] + 1)]
            assert names[-1] == last
            every = [{**body["first"], "name": name} for name in names]
            batches = [every[start : start + 2] for start in range(0, len(every), 2)]
            assert len(batches) == body["calls"] == 3
            expected += [(request["method"], request["path"], batch) for batch in batches]
        else:
            expected.append((request["method"], request["path"], body))

    def in_order(requests):
        return sorted(requests, key=lambda request: json.dumps(request, sort_keys=True))

    assert in_order(received.taken) == in_order(expected)
    assert planned["nodes"] == 8
    for placeholder in known:
        assert placeholder in json.dumps(planned)
    cluster.shut_down()


def group_ids(platform) -> dict[str, str]:
    return platform.call(
        lambda: {group.spec.name: group.id for group in platform.core.scheduler.groups.values()}
    )


def test_no_secret_in_a_plan(platform):
    """Neither the application key's secret nor the token is in a plan, in any form."""
    cluster = make(
        platform,
        head_node_ray_start_script=f"echo {SECRET}",
        head_node_instance_tags={"api-token": "hidden-value"},
        head_node_userdata=f"export KEY={SECRET}",
    )
    planned = cluster.plan()
    for text in (str(planned), planned.to_json(), planned._repr_html_(), repr(planned)):
        assert SECRET not in text
        assert cluster._token not in text
        assert "hidden-value" not in text
    assert "********" in str(planned)


def test_a_plan_of_a_cluster_that_is_built(platform):
    """What is built is not planned any more."""
    with make(platform) as cluster:
        cluster.build(SHORT)
        with pytest.raises(ClusterStateError, match="it is running"):
            cluster.plan()


def test_a_plan_after_a_build_that_failed(platform, monkeypatch):
    """A cluster whose build was taken back can be planned again, as before."""
    cluster = make(platform)
    cluster.add_worker_pool("test/small", None, 2)
    before = cluster.plan().to_json()
    platform.backend.fail_boot = lambda start: "no capacity"
    with pytest.raises(BuildError, match="no capacity"):
        cluster.build(SHORT)
    assert cluster.plan().to_json() == before
