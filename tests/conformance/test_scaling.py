"""Worker pools of a running cluster that get another number of nodes, against the simulated platform."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.clusters import (
    SHORT,
    attach,
    end_leaving,
    eventually,
    let_exit,
    lose_machine,
    make,
    nodes,
    pools,
    tasks,
)
from tests.controlplane import Fault
from yellowdog_ray.errors import ClusterStateError, PlatformError, SpecError, TeardownError
from yellowdog_ray.raydog import plan
from yellowdog_ray.raydog.state import ClusterState

GROUP, POOL = "worker-nodes-01", "demo-01-wrkrs"


pytestmark = pytest.mark.usefixtures("hurried")


@pytest.fixture
def cluster(platform):
    """A running cluster whose one worker pool has three nodes, all at work."""
    with make(platform) as cluster:
        cluster.add_worker_pool("test/small", None, 3)
        cluster.build(SHORT)
        assert cluster.wait_for_workers(timeout=10) == 3
        yield cluster


def numbers(platform, *statuses: str) -> list[int]:
    return [int(name.rpartition("-")[2]) for name in tasks(platform, GROUP, *statuses)]


def saved_count(cluster) -> int:
    state = ClusterState.load(cluster._journal.path)
    return state.pool(POOL).node_count


def test_up(platform, cluster):
    """More nodes are at work, and the number is known here, in the state and in the status."""
    assert cluster.scale_worker_pool(GROUP, 5) is None
    assert cluster.wait_for_workers(timeout=10) == 5
    assert nodes(platform, POOL) == 5
    assert numbers(platform, "EXECUTING") == [1, 2, 3, 4, 5]
    assert cluster.worker_node_worker_pools[GROUP].node_count == saved_count(cluster) == 5
    status = cluster.status()
    assert (status.wanted_workers, status.executing_workers) == (5, 5)
    assert status.healthy


def test_down(platform, cluster):
    """Fewer nodes are at work, the newest have gone, and their machines have too."""
    cluster.scale_worker_pool(GROUP, 1)
    assert cluster.wait_for_workers(timeout=10) == 1
    eventually(lambda: nodes(platform, POOL) == 1)
    assert numbers(platform, "EXECUTING") == [1]
    assert numbers(platform, "ABORTED", "CANCELLED") == [2, 3]
    assert saved_count(cluster) == 1
    eventually(lambda: cluster.status().healthy)
    status = cluster.status()
    assert (status.wanted_workers, status.executing_workers, status.failed_workers) == (1, 1, 0)
    assert status.drift == ()


@pytest.mark.parametrize("back", [3, 2])
def test_down_and_soon_up_again(platform, cluster, back):
    """Workers that are still on their way out do not count, and others come in their place."""
    platform.backend.stop_delay = 30.0
    cluster.scale_worker_pool(GROUP, 1)
    assert numbers(platform, "EXECUTING") == [1, 2, 3]
    assert cluster.wait_for_workers(timeout=10) == cluster.status().executing_workers == 1
    cluster.scale_worker_pool(GROUP, back)
    assert numbers(platform, "EXECUTING")[:3] == [1, 2, 3]
    assert cluster.wait_for_workers(timeout=10) == back
    end_leaving(platform)
    eventually(lambda: len(numbers(platform, "ABORTED")) == 2)
    assert cluster.wait_for_workers(timeout=10) == back
    assert numbers(platform, "EXECUTING") == [1, 4, 5][:back]
    eventually(lambda: nodes(platform, POOL) == back)
    assert cluster.status().healthy


def test_to_zero_and_up_again(platform, cluster):
    """A pool without nodes is still there, costs nothing, and gets nodes again."""
    cluster.scale_worker_pool(GROUP, 0)
    assert cluster.wait_for_workers(timeout=10) == 0
    eventually(lambda: nodes(platform, POOL) == 0)
    assert POOL in pools(platform)
    cluster.scale_worker_pool(GROUP, 2)
    assert cluster.wait_for_workers(timeout=10) == 2
    assert nodes(platform, POOL) == 2
    assert numbers(platform, "EXECUTING") == [4, 5]


def test_before_build(platform):
    """Before a build only the number changes that will be built, and nobody is asked."""
    with make(platform) as cluster:
        cluster.add_worker_pool("test/small", "echo mine", 3, "mine")
        cluster.scale_worker_pool("mine", 1)
        assert platform.faults.seen == []
        with pytest.raises(SpecError, match="node_count: 0 is not from 1 to 10000"):
            cluster.scale_worker_pool("mine", 0)
        cluster.build(SHORT)
        assert cluster.wait_for_workers(timeout=10) == 1
        assert nodes(platform, POOL) == 1
        assert numbers(platform) == [1]
        started = [effect for effect in platform.backend.applied if type(effect).__name__ == "StartTask"]
        assert "echo mine" in [effect.task_data for effect in started]


def test_the_same_number_changes_nothing(platform, cluster):
    """A pool that has its nodes keeps them, and gets no task."""
    before = len(platform.backend.applied)
    cluster.scale_worker_pool(GROUP, 3)
    assert cluster.wait_for_workers(timeout=10) == 3
    assert platform.backend.applied[before:] == []
    assert numbers(platform) == [1, 2, 3]


def test_failed_nodes_are_replaced(platform, cluster):
    """A node whose task has ended does not count: the number that is asked for comes to work."""
    let_exit(platform, GROUP, 1, task=f"{GROUP}-00002")
    let_exit(platform, GROUP, 1, task=f"{GROUP}-00003")
    eventually(lambda: cluster.status().executing_workers == 1)
    cluster.scale_worker_pool(GROUP, 3)
    assert cluster.wait_for_workers(timeout=10) == 3
    assert numbers(platform, "EXECUTING") == [1, 4, 5]
    # The nodes of the failed ones were idle, and are used.
    assert nodes(platform, POOL) == 3


def test_nodes_without_a_task_are_given_back(platform, cluster):
    """Where a node has failed, giving its pool the number that is left gives the idle node back."""
    let_exit(platform, GROUP, 1, task=f"{GROUP}-00002")
    eventually(lambda: cluster.status().executing_workers == 2)
    cluster.scale_worker_pool(GROUP, 2)
    eventually(lambda: nodes(platform, POOL) == 2)
    assert numbers(platform, "EXECUTING") == [1, 3]
    assert cluster.status().drift == ()


def test_healing_keeps_the_number(platform, cluster):
    """A machine that is lost is replaced without a word, with the same task; scaling counts right after."""
    lose_machine(platform, GROUP, task=f"{GROUP}-00002")
    eventually(lambda: numbers(platform, "EXECUTING") == [1, 2, 3])
    assert nodes(platform, POOL) == 3
    assert cluster.status().healthy
    lose_machine(platform, GROUP)
    # Perhaps before its task has a new node.
    cluster.scale_worker_pool(GROUP, 4)
    assert cluster.wait_for_workers(timeout=10) == 4
    eventually(lambda: numbers(platform, "EXECUTING") == [1, 2, 3, 4])
    assert nodes(platform, POOL) == 4


def test_two_threads_scale_one_pool(platform, cluster):
    """One after the other: in the end the pool has one of the two numbers, in fact and in the books."""
    gate = threading.Barrier(2)

    def scale(count: int) -> None:
        gate.wait()
        for _ in range(3):
            cluster.scale_worker_pool(GROUP, count)

    with ThreadPoolExecutor(2) as threads:
        list(threads.map(scale, [5, 2]))
    count = cluster.worker_node_worker_pools[GROUP].node_count
    assert count in (2, 5)
    assert cluster.wait_for_workers(timeout=10) == count == saved_count(cluster)
    eventually(lambda: len(numbers(platform, "EXECUTING")) == count and nodes(platform, POOL) == count)
    assert len(set(numbers(platform))) == len(numbers(platform))


def test_two_threads_scale_two_pools(platform, cluster):
    """Several pools are scaled at once, and nothing is mixed up."""
    cluster.add_worker_pool("test/small", None, 1)
    cluster.wait_for_workers(timeout=10)
    gate = threading.Barrier(2, timeout=10)

    def scale(wish: tuple[str, list[int]]) -> None:
        gate.wait()
        for count in wish[1]:
            cluster.scale_worker_pool(wish[0], count)

    with ThreadPoolExecutor(2) as threads:
        list(threads.map(scale, [(GROUP, [1, 4]), ("worker-nodes-02", [3, 2])]))
    assert cluster.wait_for_workers(timeout=10) == 6
    eventually(lambda: nodes(platform, POOL) == 4 and nodes(platform, "demo-02-wrkrs") == 2)
    eventually(
        lambda: [len(tasks(platform, name, "EXECUTING")) for name in (GROUP, "worker-nodes-02")] == [4, 2]
    )


def test_two_pools_are_scaled_at_the_same_time(platform, cluster):
    """A pool that takes its time keeps no other from being scaled."""
    cluster.add_worker_pool("test/small", None, 1, "other")
    cluster.wait_for_workers(timeout=10)
    slow = cluster.worker_node_worker_pools[GROUP]
    platform.faults.faults = [Fault("GET", "/work/tasks$", "hang", seconds=1, carried_out=True)]
    with ThreadPoolExecutor(1) as threads:
        scaling = threads.submit(cluster.scale_worker_pool, GROUP, 4)
        eventually(slow.scaling.locked)
        eventually(lambda: platform.faults.faults[0].hits)
        cluster.scale_worker_pool("other", 2)
        assert not scaling.done()
        assert len(tasks(platform, "worker-nodes-02")) == 2
        scaling.result(20)
    assert cluster.wait_for_workers(timeout=10) == 6


def test_names_of_tasks_are_never_used_twice(platform, cluster):
    """However often a pool shrinks and grows, and whoever does it, every task has a name of its own."""
    other = attach(cluster._journal.path)
    for count, by in ((1, cluster), (3, other), (0, cluster), (2, other), (4, cluster), (5, other)):
        by.scale_worker_pool(GROUP, count)
    assert cluster.wait_for_workers(timeout=10) == 5
    assert numbers(platform) == list(range(1, 11))
    assert numbers(platform, "EXECUTING") == [6, 7, 8, 9, 10]
    assert json.loads(cluster.save_state_to_json())["pools"][1]["tasks_counted"] == 10


def test_nodes_that_run_nothing_go_first(platform, cluster):
    """On the way down a task that waits for its node ends before one that executes."""
    let_boot_take(platform, 30)
    cluster.scale_worker_pool(GROUP, 5)
    let_exit(platform, GROUP, 1, task=f"{GROUP}-00002")
    # The node of the one that has ended takes over one of the two that wait.
    eventually(lambda: numbers(platform, "EXECUTING") == [1, 3, 4])
    cluster.scale_worker_pool(GROUP, 3)
    assert numbers(platform, "EXECUTING") == [1, 3, 4]
    assert numbers(platform, "CANCELLED") == [5]
    cluster.scale_worker_pool(GROUP, 2)
    eventually(lambda: numbers(platform, "EXECUTING") == [1, 3])


def let_boot_take(platform, seconds: float) -> None:
    platform.backend.boot_delay = seconds


def test_up_while_nodes_boot(platform, cluster, caplog):
    """The platform takes no other size while nodes boot; its own scaling leads to the right number."""
    let_boot_take(platform, 0.3)
    cluster.scale_worker_pool(GROUP, 4)
    with caplog.at_level("INFO"):
        cluster.scale_worker_pool(GROUP, 6)
    assert "demo-01-wrkrs is left to the platform's own scaling" in caplog.text
    assert "awaiting nodes" in caplog.text
    assert nodes(platform, POOL) == 6
    assert cluster.wait_for_workers(timeout=10) == 6
    assert nodes(platform, POOL) == 6
    assert cluster.status().healthy


def test_up_and_down_while_nodes_boot(platform, cluster):
    """Nodes that boot while they are to go are not needed, and go when they have been idle."""
    let_boot_take(platform, 0.2)
    cluster.scale_worker_pool(GROUP, 6)
    cluster.scale_worker_pool(GROUP, 4)
    assert cluster.wait_for_workers(timeout=10) == 4
    assert len(numbers(platform, "EXECUTING")) == 4
    # Once more, now that none boots, gives them back at once.
    eventually(lambda: not booting(platform))
    cluster.scale_worker_pool(GROUP, 4)
    eventually(lambda: nodes(platform, POOL) == 4)


def booting(platform) -> int:
    return platform.call(lambda: sum(one.pending for one in platform.core.scheduler.requirements.values()))


def test_idle_nodes_go_by_themselves(platform, cluster, monkeypatch):
    """What is idle after scaling down in the middle of a boot ends by the pool's own settings."""
    monkeypatch.setattr(plan, "NODE_IDLE_TIMEOUT", plan.timedelta(seconds=0.3))
    cluster.add_worker_pool("test/small", None, 1, "short")
    cluster.wait_for_workers(timeout=10)
    let_boot_take(platform, 0.2)
    cluster.scale_worker_pool("short", 3)
    cluster.scale_worker_pool("short", 1)
    assert nodes(platform, "demo-02-wrkrs") == 3
    eventually(lambda: nodes(platform, "demo-02-wrkrs") == 1)
    assert cluster.wait_for_workers(timeout=10) == 4


@pytest.mark.parametrize("what", [500, "before", "after", 429])
def test_single_faults_are_survived(platform, cluster, what):
    """A transient fault of each call costs a moment, and never a node too many or too few."""
    faults = [Fault("POST", "/taskGroups/", what), Fault("PUT", "/workerPools/", what)]
    platform.faults.faults = [*faults, Fault("GET", "/work/tasks", what)]
    cluster.scale_worker_pool(GROUP, 5)
    assert [fault.hits for fault in platform.faults.faults] == [1, 1, 1]
    assert cluster.wait_for_workers(timeout=10) == 5
    assert nodes(platform, POOL) == 5
    platform.faults.faults = [
        Fault("PUT", "/work/tasks/", what, 2),
        Fault("DELETE", "/nodes/", what, 2),
        Fault("PUT", "/workerPools/", what, 1),
    ]
    cluster.scale_worker_pool(GROUP, 2)
    eventually(lambda: nodes(platform, POOL) == 2)
    assert len(numbers(platform, "EXECUTING")) == 2


@pytest.mark.parametrize(("method", "path"), [("POST", "/taskGroups/"), ("PUT", "/workerPools/")])
def test_growth_that_fails_is_taken_back(platform, cluster, method, path):
    """Nodes and tasks that were added go again, the number stays, and the next try succeeds."""
    platform.faults.faults = [Fault(method, path, 500, None)]
    with ThreadPoolExecutor(1) as threads:
        growing = threads.submit(cluster.scale_worker_pool, GROUP, 6)
        with pytest.raises(PlatformError, match="could not"):
            growing.result(30)
    platform.faults.clear()
    assert cluster.worker_node_worker_pools[GROUP].node_count == saved_count(cluster) == 3
    eventually(lambda: nodes(platform, POOL) == 3)
    assert numbers(platform, "READY", "ALLOCATED", "EXECUTING") == [1, 2, 3]
    assert cluster.wait_for_workers(timeout=10) == 3
    cluster.scale_worker_pool(GROUP, 4)
    assert cluster.wait_for_workers(timeout=10) == 4
    assert nodes(platform, POOL) == 4
    assert len(set(numbers(platform))) == len(numbers(platform))


def test_growth_of_which_a_part_is_there_is_taken_back(platform, cluster, monkeypatch):
    """Of several batches of tasks, one that was added goes again when the next one is refused."""
    monkeypatch.setattr(plan, "TASK_BATCH", 2)
    platform.faults.faults = [Fault("POST", "/taskGroups/", 403, None, skip=1)]
    with pytest.raises(PlatformError, match="may not do this"):
        cluster.scale_worker_pool(GROUP, 7)
    assert len(numbers(platform)) == 5
    eventually(lambda: nodes(platform, POOL) == 3)
    eventually(lambda: numbers(platform, "READY", "ALLOCATED", "EXECUTING") == [1, 2, 3])


def test_shrinking_that_fails_can_be_repeated(platform, cluster):
    """Nodes that could not be told to go are an error that says so; the call can be repeated."""
    platform.faults.faults = [Fault("PUT", "/work/tasks/", 500, None)]
    with pytest.raises(TeardownError, match="scale again") as caught:
        cluster.scale_worker_pool(GROUP, 1)
    assert caught.value.still_running == [POOL]
    assert cluster.worker_node_worker_pools[GROUP].node_count == 3
    platform.faults.clear()
    cluster.scale_worker_pool(GROUP, 1)
    eventually(lambda: nodes(platform, POOL) == 1)
    assert cluster.wait_for_workers(timeout=10) == 1


@pytest.mark.parametrize("count", [-1, 10001, 1.5, True, "3", None])
def test_numbers_that_are_none(platform, cluster, count):
    """What is no number of nodes is refused before anybody is asked."""
    seen = len(platform.faults.seen)
    with pytest.raises(SpecError, match="node_count"):
        cluster.scale_worker_pool(GROUP, count)
    assert len(platform.faults.seen) == seen


def test_pools_that_cannot_be_scaled(platform, cluster):
    """A pool that is not there, the head's, a removed one, and any after the end are refused in words."""
    for name in ("head-node", "nothing", POOL):
        with pytest.raises(ClusterStateError, match=f"no worker pool '{name}'; it has: 'worker-nodes-01'"):
            cluster.scale_worker_pool(name, 2)
    cluster.add_worker_pool("test/small", None, 1, "gone")
    cluster.remove_worker_pool_by_internal_name("gone")
    with pytest.raises(ClusterStateError, match="no worker pool 'gone'"):
        cluster.scale_worker_pool("gone", 2)
    cluster.shut_down()
    with pytest.raises(ClusterStateError, match="shut down"):
        cluster.scale_worker_pool(GROUP, 2)


def test_a_pool_that_has_ended_gets_no_tasks(platform, cluster):
    """A pool that somebody has shut down is not scaled, for its tasks would wait for ever."""
    platform.call(lambda: platform.core.scheduler.shut_down_pool(cluster.worker_pool_ids[0], 0.0))
    platform.call(platform.core.changed)
    with pytest.raises(ClusterStateError, match="'worker-nodes-01' cannot be scaled: it is"):
        cluster.scale_worker_pool(GROUP, 5)
    assert not numbers(platform, "READY")
    assert saved_count(cluster) == 3


@pytest.mark.parametrize("by", ["another thread", "another process"])
def test_removed_while_it_is_scaled(platform, cluster, by):
    """A pool that is removed while it is being scaled is gone, and does not come back into the books."""
    remover = cluster if by == "another thread" else attach(cluster._journal.path)
    fault = Fault("GET", "/work/tasks$", "hang", seconds=0.5, carried_out=True)
    platform.faults.faults = [fault]
    with ThreadPoolExecutor(1) as threads:
        scaling = threads.submit(cluster.scale_worker_pool, GROUP, 5)
        eventually(lambda: fault.hits)
        remover.remove_worker_pool_by_internal_name(GROUP)
        with pytest.raises(ClusterStateError, match=r"cannot be scaled: it is|has been removed"):
            scaling.result(20)
    assert pools(platform) == ["demo-00-head"]
    assert numbers(platform, "READY", "ALLOCATED", "EXECUTING") == []
    assert [pool.name for pool in ClusterState.load(cluster._journal.path).pools] == ["demo-00-head"]
    assert cluster.wait_for_workers(timeout=10) == 0
    assert cluster.worker_pool_internal_names == []
    assert cluster.status().healthy
