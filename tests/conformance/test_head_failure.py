"""The end of a head, and of a client: what ends a cluster then, against the simulated platform."""

from __future__ import annotations

import gc
import re
import threading
import time
import warnings
from datetime import timedelta

import pytest

from tests.clusters import (
    SHORT,
    attach,
    eventually,
    executing,
    let_exit,
    lose_machine,
    make,
    nodes,
    pools,
    slow_boot,
    state_of,
    tasks,
)
from tests.controlplane import TEMPLATE, Fault, serve
from yellowdog_ray.errors import ClusterStateError, WaitTimeoutError
from yellowdog_ray.raydog import events, plan, watch

GROUP, POOL = "worker-nodes-01", "demo-01-wrkrs"


pytestmark = pytest.mark.usefixtures("hurried")


@pytest.fixture
def platform():
    with serve(boot_delay=0.005, start_delay=0.002, stop_delay=0.002) as served:
        yield served


@pytest.fixture
def watching(monkeypatch):
    """The head is looked at every moment."""
    monkeypatch.setattr(watch, "SECONDS", 0.05)


def built(platform, workers: int = 2, **options):
    cluster = make(platform, **options)
    cluster.add_worker_pool("test/small", None, workers)
    cluster.build(SHORT)
    assert cluster.wait_for_workers(timeout=10) == workers
    return cluster


def ended(cluster) -> bool:
    return ", shut down, because" in repr(cluster)


# -- a client is alive ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("exit 3", r"its head has ended: the head node's task 'head-node' .* FAILED with exit code 3"),
        ("exit 0", r"its head has ended: the head node's task 'head-node' .* ended COMPLETED"),
        ("machine", r"its head has ended: the head node's task 'head-node' .* FAILED: .*preempted"),
        ("cancelled", r"its head has ended: the head node's task 'head-node' .* ended (ABORTED|CANCELLED)"),
    ],
)
def test_the_head_ends(platform, watching, state_directory, how, reason):
    """A cluster whose head has ended ends itself, says why wherever it is asked, and leaves nothing."""
    heard = []
    cluster = built(platform, on_event=heard.append)
    if how == "machine":
        lose_machine(platform, "head-node")
    elif how == "cancelled":
        cluster.yd_client.work_client.cancel_task_by_id(cluster.head_node_task_id, abort=True)
    else:
        let_exit(platform, "head-node", int(how[-1]))
    eventually(lambda: isinstance(heard[-1], events.ShutdownFinished))

    assert platform.running() == []
    assert list(state_directory.glob("*.json")) == []
    status = cluster.status()
    assert status.phase == "shut down"
    (failed,) = [event for event in heard if isinstance(event, events.HeadFailed)]
    kinds = [type(event).__name__ for event in heard]
    assert kinds[kinds.index("HeadFailed") :] == ["HeadFailed", "ShutdownStarted", "ShutdownFinished"]
    for text in (status.failure, failed.reason, str(failed)):
        assert re.search(reason, text)
    assert re.search(f"shut down, because {reason}", repr(cluster))
    assert "The cluster has ended: its head has ended" in str(status)
    for call in (
        lambda: cluster.add_worker_pool("test/small", None, 1),
        lambda: cluster.scale_worker_pool(GROUP, 1),
        lambda: cluster.remove_worker_pool_by_internal_name(GROUP),
        cluster.wait_for_workers,
        cluster.build,
    ):
        with pytest.raises(ClusterStateError, match="shut down, because its head has ended"):
            call()
    seen = len(platform.faults.seen)
    cluster.shut_down()
    assert len(platform.faults.seen) == seen


def test_the_head_is_gone_before_anybody_waits(platform, watching):
    """A wait that is under way when the head ends is ended with a reason, and does not hang."""
    cluster = built(platform)
    platform.backend.boot_delay = 30
    cluster.add_worker_pool("test/small", None, 1)
    failures = []

    def wait() -> None:
        try:
            cluster.wait_for_workers(timeout=30)
        except (ClusterStateError, WaitTimeoutError) as error:
            failures.append(str(error))

    waiting = threading.Thread(target=wait)
    waiting.start()
    time.sleep(0.1)
    let_exit(platform, "head-node", 1)
    waiting.join(20)
    assert not waiting.is_alive()
    assert "no more can come" in failures[0]
    eventually(lambda: ended(cluster))
    assert platform.running() == []


def test_the_context_manager_after_the_head_has_ended(platform, watching):
    """Leaving the block of a cluster that has ended itself is no error."""
    with built(platform) as cluster:
        let_exit(platform, "head-node", 1)
        eventually(lambda: ended(cluster))
    assert platform.running() == []


@pytest.mark.parametrize("what", [404, 500, 429, "before", "hang"])
def test_a_transient_fault_ends_nothing(platform, watching, what):
    """That the head's task cannot be looked at for a while, or is unknown for a moment, ends nothing."""
    with built(platform) as cluster:
        fault = Fault("GET", "/work/tasks/", what, 4, seconds=0.05)
        platform.faults.faults = [fault]
        eventually(lambda: fault.hits == 4)
        time.sleep(0.3)
        assert cluster.status().healthy
        # It goes on looking.
        seen = len(platform.faults.seen)
        eventually(lambda: len(platform.faults.seen) > seen)
        let_exit(platform, "head-node", 1)
        eventually(lambda: ended(cluster))


def test_unknown_for_good(platform, watching, monkeypatch):
    """A head's task that the platform does not know for long is gone."""
    heard = []
    cluster = built(platform, on_event=heard.append)
    path = f"/work/tasks/{cluster.head_node_task_id}$"
    platform.faults.faults = [Fault("GET", path, 404, None)]
    eventually(lambda: ended(cluster), 20)
    assert "does not know its task any more" in cluster.status().failure
    assert platform.running() == []


def test_what_cannot_be_ended_stays_known(platform, watching, state_directory, caplog):
    """Where the cluster cannot end itself, the state file stays, and shut_down() goes on."""
    cluster = built(platform)
    platform.faults.faults = [
        Fault("PUT", "/transition/TERMINATED", 500, None),
        Fault("DELETE", "/workerPools/", 500, None),
    ]
    let_exit(platform, "head-node", 1)
    eventually(lambda: "could not all be shut down" in caplog.text)
    assert "being shut down, because its head has ended" in repr(cluster)
    (path,) = state_directory.glob("*.json")
    assert "its head has ended" in path.read_text()
    platform.faults.clear()
    assert "its head has ended" in attach(path).status().failure
    cluster.shut_down()
    assert platform.running() == []
    assert list(state_directory.glob("*.json")) == []


def test_an_attached_cluster_watches_too(platform, watching, state_directory):
    """The head of a cluster whose builder is gone is watched by whoever is attached."""
    cluster = built(platform)
    cluster._watch.stop()
    other = attach(state_of(cluster))
    let_exit(platform, "head-node", 2)
    eventually(lambda: ended(other))
    assert platform.running() == []
    assert list(state_directory.glob("*.json")) == []
    cluster.shut_down()


@pytest.mark.parametrize(
    ("looks", "first"),
    [
        ("meanwhile", "the tasks"),
        ("meanwhile", "the nodes"),
        ("afterwards", "the tasks"),
        ("afterwards", "the nodes"),
    ],
)
def test_another_process_has_shut_it_down(platform, monkeypatch, looks, first):
    """A cluster that another process has ended says so, and not that its head has failed."""
    monkeypatch.setattr(watch, "SECONDS", 0.6)
    cluster = built(platform)
    other = attach(state_of(cluster))
    ending = "/transition/CANCELLING" if first == "the nodes" else "/transition/TERMINATED|/workerPools/"
    platform.faults.faults = [Fault("*", ending, "hang", None, seconds=0.2, carried_out=True)]
    if looks == "meanwhile":
        remove = other._journal.remove

        def wait_and_remove() -> None:
            eventually(lambda: cluster.status().failure)
            remove()

        monkeypatch.setattr(other._journal, "remove", wait_and_remove)
    other.shut_down()
    platform.faults.clear()
    eventually(lambda: ended(cluster))
    assert cluster.status().failure == "another process has shut it down"


def test_after_the_end_nobody_looks(platform, watching):
    """A cluster that has been shut down asks nothing any more."""
    cluster = built(platform)
    thread = cluster._watch._thread
    cluster.shut_down()
    eventually(lambda: not thread.is_alive())
    seen = len(platform.faults.seen)
    time.sleep(0.2)
    assert len(platform.faults.seen) == seen
    assert cluster.status().failure is None


# -- no client is alive --------------------------------------------------------------------------------


def abandoned(platform, **options) -> None:
    """Build a cluster, and let nobody be there any more."""
    cluster = built(platform, **options)
    cluster._watch.stop()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        del cluster
        gc.collect()


def test_without_a_client_the_platform_ends_all_nodes(platform, monkeypatch):
    """Workers that end when the head is gone are not run again, and their idle pools end by themselves."""
    monkeypatch.setattr(plan, "NODE_IDLE_TIMEOUT", timedelta(seconds=0.2))
    monkeypatch.setattr(plan, "pool_idle_timeout", lambda build_timeout: timedelta(seconds=0.6))
    abandoned(
        platform,
        enable_observability=True,
        observability_node_compute_requirement_template_id=TEMPLATE.id,
    )
    seen = len(platform.faults.seen)
    time.sleep(0.9)
    # As long as the head is there nothing ends, however long it lasts.
    assert sum(executing(platform).values()) == 4
    lose_machine(platform, "head-node")
    # So the default scripts of the others end, which watch the head (tests/unit/test_scripts.py).
    for number in (1, 2):
        let_exit(platform, GROUP, 1, task=f"{GROUP}-0000{number}")
    let_exit(platform, "observability-node", 1)
    # The work requirement costs nothing; there is no pool and no compute requirement any more.
    eventually(lambda: platform.running() == ["work test/demo"])
    assert nodes(platform, POOL) == nodes(platform, "demo-00-head") == 0
    assert tasks(platform, GROUP) == tasks(platform, GROUP, "FAILED") == [f"{GROUP}-00001", f"{GROUP}-00002"]
    assert attempts(platform) == {1}
    assert len(platform.faults.seen) == seen


def attempts(platform) -> set[int]:
    return platform.call(lambda: {task.attempts for task in platform.core.scheduler.tasks.values()})


def test_without_a_client_a_preempted_worker_is_still_replaced(platform, monkeypatch):
    """The same settings replace a worker's machine, by nobody's doing."""
    monkeypatch.setattr(plan, "NODE_IDLE_TIMEOUT", timedelta(seconds=0.2))
    monkeypatch.setattr(plan, "pool_idle_timeout", lambda build_timeout: timedelta(seconds=0.6))
    cluster = built(platform)
    for _ in range(3):
        lose_machine(platform, GROUP, task=f"{GROUP}-00001")
        eventually(lambda: len(tasks(platform, GROUP, "EXECUTING")) == 2)
    assert cluster.status().healthy
    cluster.shut_down()


def test_idle_settings_cannot_end_a_pool_that_waits_for_its_head(platform, monkeypatch):
    """Workers whose nodes are given back while the head still boots get new ones, and execute."""
    monkeypatch.setattr(plan, "NODE_IDLE_TIMEOUT", timedelta(seconds=0.1))
    slow_boot(platform, "demo-00-head", 1.0)
    cluster = make(platform)
    cluster.add_worker_pool("test/small", None, 2)
    building = threading.Thread(target=cluster.build, args=[SHORT])
    building.start()
    eventually(lambda: nodes(platform, POOL) == 2)
    eventually(lambda: nodes(platform, POOL) == 0)
    assert pools(platform) == ["demo-00-head", POOL]
    building.join(20)
    assert cluster.wait_for_workers(timeout=10) == 2
    assert nodes(platform, POOL) == 2
    assert cluster.status().healthy
    cluster.shut_down()
    assert platform.running() == []


def test_the_idle_time_of_a_pool_is_longer_than_any_build():
    """However long a build may take, its pools wait for longer, and for twelve hours at least."""
    hour = timedelta(hours=1)
    assert plan.pool_idle_timeout(None) > plan.MAX_BUILD
    assert plan.pool_idle_timeout(timedelta(minutes=1)) == plan.pool_idle_timeout(None) == 12 * hour
    assert plan.pool_idle_timeout(30 * hour) > 30 * hour
    assert plan.NODE_IDLE_TIMEOUT < plan.POOL_IDLE_TIMEOUT


def test_the_idle_time_of_a_pool_follows_the_build(platform):
    """The platform gets the idle times, with every pool, also with those that are added later."""
    cluster = make(platform)
    cluster.add_worker_pool("test/small", None, 1)
    cluster.build(timedelta(hours=30))
    cluster.add_worker_pool("test/small", None, 1)
    limits = platform.call(
        lambda: {
            pool.name: (pool.spec.idle_pool.seconds, pool.spec.idle_node.seconds)
            for pool in platform.core.scheduler.pools.values()
        }
    )
    assert set(limits) == {"demo-00-head", POOL, "demo-02-wrkrs"}
    assert set(limits.values()) == {(31 * 3600, 1800)}
    cluster.shut_down()


def test_a_lifetime_ends_all_compute_without_a_client(platform, monkeypatch):
    """The platform itself ends the nodes of all pools when the lifetime is over, later ones' too."""
    monkeypatch.setattr(watch, "SECONDS", 60)
    began = time.monotonic()
    cluster = make(platform, cluster_lifetime=timedelta(seconds=2))
    cluster.add_worker_pool("test/small", None, 2)
    cluster.build(SHORT)
    time.sleep(0.5)
    cluster.add_worker_pool("test/small", None, 1)
    assert cluster.wait_for_workers(timeout=1) == 3
    seen = len(platform.faults.seen)
    assert time.monotonic() - began < 2
    # The work requirement costs nothing; there is no pool and no compute requirement any more.
    eventually(lambda: platform.running() == ["work test/demo"])
    # The later pool has not got a whole lifetime of its own.
    assert 1.5 < time.monotonic() - began < 2.4
    assert len(platform.faults.seen) == seen
    with pytest.raises(ClusterStateError, match="lifetime is over"):
        cluster.add_worker_pool("test/small", None, 1)
    cluster.shut_down()
    assert platform.running() == []


def test_a_lifetime_is_noticed_by_a_client(platform, watching, state_directory):
    """A client that is alive notices the end of the lifetime as it does that of the head."""
    cluster = built(platform, cluster_lifetime=timedelta(seconds=0.6))
    eventually(lambda: ended(cluster))
    assert platform.running() == []
    assert "its head has ended" in cluster.status().failure
    assert list(state_directory.glob("*.json")) == []
