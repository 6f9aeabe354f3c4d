"""Faults that were found once, and stay found."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.clusters import attach, eventually, let_exit, make, pools, tasks
from tests.controlplane import KEY_ID, SECRET, Fault, serve
from yellowdog_ray.errors import ClusterStateError, PlatformError, SpecError, TeardownError
from yellowdog_ray.raydog import events, logs, reach, teardown, watch
from yellowdog_ray.raydog.access import SSHAccess
from yellowdog_ray.raydog.state import ClusterState

# Nobody listens at the addresses of simulated nodes.
ACCESS = SSHAccess("nobody", password="x", ssh_config=False)


@pytest.fixture
def platform():
    with serve() as served:
        yield served


_AT_EXIT = """
import atexit, sys, threading
from yellowdog_ray import RayDogCluster
url, key, secret, how = sys.argv[1:]
cluster = RayDogCluster(key, secret, "late", "test", "test/small", None, url)
if how == "atexit":
    atexit.register(cluster.shut_down)
    cluster.build()
else:
    def run():
        with cluster:
            cluster.build()
            threading.main_thread().join()
    threading.Thread(target=run).start()
"""


@pytest.mark.parametrize("how", ["atexit", "thread"])
def test_shut_down_while_the_interpreter_ends(platform, how):
    """A cluster can be ended when Python starts no more threads."""
    command = [sys.executable, "-c", _AT_EXIT, platform.url, KEY_ID, SECRET, how]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert any(work.name == "late" for work in platform.core.scheduler.works.values())
    assert platform.running() == []


def test_removed_by_another_process_while_it_is_added(platform, state_directory):
    """A pool that is removed elsewhere while it is being added is taken back, and said to be removed."""
    with make(platform) as cluster:
        cluster.build()
        (path,) = state_directory.glob("*.json")
        other = attach(path)
        platform.faults.faults = [Fault("GET", "templates/requirements", "hang", carried_out=True, seconds=7)]
        adding = threading.Thread(target=_add, args=(cluster, errors := []))
        adding.start()
        eventually(lambda: platform.faults.faults[0].hits)
        other.remove_worker_pool_by_internal_name("w")
        adding.join(30)
        assert "has been removed meanwhile" in str(errors[0])
        assert [one for one in platform.running() if "wrkrs" in one] == []


def _add(cluster, errors):
    try:
        cluster.add_worker_pool("test/small", None, 1, "w")
    except ClusterStateError as error:
        errors.append(error)


def test_interrupt_as_the_finished_build_is_told(platform):
    """Ctrl-C in a listener of the last event of a build takes the build back."""

    def interrupt(event):
        if isinstance(event, events.BuildFinished):
            raise KeyboardInterrupt

    cluster = make(platform, on_event=interrupt)
    with pytest.raises(KeyboardInterrupt):
        cluster.build()
    assert platform.running() == []
    assert "not built yet" in repr(cluster)


def test_logs_keep_nothing_from_ending(platform, monkeypatch, tmp_path):
    """Whatever goes wrong with the nodes' output, the cluster is shut down."""

    def fail(*_args):
        raise RuntimeError("can't start new thread")

    cluster = make(platform, access=ACCESS, keep_logs=tmp_path)
    cluster.build()
    monkeypatch.setattr(logs, "collect", fail)
    cluster.shut_down()
    assert platform.running() == []


@pytest.fixture
def silent():
    """A port that accepts connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening.getsockname()[1]


def with_workers(platform, pools: int, nodes: int, **options):
    """Build a cluster of which the head's address is this machine's, and wait for its workers."""
    cluster = make(platform, **options)
    for _ in range(pools):
        cluster.add_worker_pool("test/small", None, nodes)
    cluster.build()
    eventually(lambda: cluster.status().executing_workers == pools * nodes)
    cluster._assembly.head.private_ip, cluster._assembly.head.public_ip = "127.0.0.1", None
    return cluster


def test_a_silent_head_delays_the_end_once(platform, silent, monkeypatch, tmp_path, caplog):
    """It is not waited for once more for every node or pool: for the logs, at a removal or at the end."""
    monkeypatch.setattr("yellowdog_ray.raydog.reach._CONNECT_TIMEOUT", 0.5)
    access = SSHAccess("nobody", password="x", port=silent, ssh_config=False)
    cluster = with_workers(platform, 3, 9, access=access, keep_logs=tmp_path)
    attempts = []
    connect = reach.Reach._connect
    monkeypatch.setattr(reach.Reach, "_connect", lambda way: attempts.append(way) or connect(way))
    assert len(cluster.get_logs()) == 1 + 3 * 9
    assert len(attempts) == 1
    began = time.monotonic()
    cluster.remove_worker_pool_by_internal_name("worker-nodes-01")
    cluster.shut_down()
    assert time.monotonic() - began < 4.0
    assert platform.running() == []
    told = [record.getMessage() for record in caplog.records if "was not kept" in record.getMessage()]
    assert len(told) == 2
    assert "worker-nodes-01-00003 and 6 others" in told[0]
    assert "and 16 others" in told[1]


def test_logs_of_a_pool_that_is_called_like_the_heads(platform, monkeypatch, tmp_path):
    """What is kept of it goes by its name in the status, like what is fetched."""
    monkeypatch.setattr(reach.Reach, "task_output", lambda _self, _address, task, _size: task)
    cluster = make(platform, access=ACCESS, keep_logs=tmp_path)
    for name in ("head-node", "second"):
        cluster.add_worker_pool("test/small", None, 1, name)
    cluster.build()
    eventually(lambda: cluster.status().executing_workers == 2)
    names = {"head-node", "demo-01-wrkrs", "second"}
    assert {entry.pool for entry in cluster.get_logs().values()} == set(cluster.status().pools) == names
    cluster.remove_worker_pool_by_internal_name("head-node")
    assert {path.parent.name for path in tmp_path.glob("*/*/*.log")} == {"demo-01-wrkrs"}
    cluster.shut_down()
    found = cluster.get_logs()
    assert {(entry.pool, entry.source) for entry in found.values()} == {(name, "kept") for name in names}
    assert len(cluster.get_logs("head-node")) == len(cluster.get_logs("demo-01-wrkrs")) == 1


def test_silent_nodes_delay_the_end_for_so_long_only(platform, monkeypatch, tmp_path, caplog):
    """There is one time limit for the output of all pools; what is not had by then is not kept."""
    monkeypatch.setattr(logs, "_SECONDS", 0.7)
    answered = threading.Event()
    monkeypatch.setattr(reach.Reach, "task_output", lambda *_: str(answered.wait(30)))
    cluster = with_workers(platform, 3, 2, access=ACCESS, keep_logs=tmp_path)
    # Nor does it keep the platform's threads from ending it.
    asking = [threading.Thread(target=cluster.get_logs, daemon=True) for _ in range(3)]
    for thread in asking:
        thread.start()
    began = time.monotonic()
    cluster.shut_down()
    assert time.monotonic() - began < 3.0
    answered.set()
    assert platform.running() == []
    assert "The output of the pool demo-03-wrkrs was not fetched: there was no time left" in caplog.text
    for thread in asking:
        thread.join(5)


def test_watch_does_not_end_a_cluster_that_it_may_not_see(platform, monkeypatch):
    """A key that sees nothing any more is no reason to end a healthy cluster."""
    monkeypatch.setattr(watch, "SECONDS", 0.05)
    monkeypatch.setattr(watch, "_UNKNOWN", 2)
    monkeypatch.setattr("yellowdog_ray.raydog.transport.NOT_YET_SECONDS", 0.1)
    cluster = make(platform)
    cluster.build()
    unseen = Fault(
        "GET", "/work/", 404, None, headers={"content-type": "application/json"}, body=b'{"errorType": "x"}'
    )
    platform.faults.faults = [unseen]
    eventually(lambda: unseen.hits > 12)
    platform.faults.clear()
    assert "running" in repr(cluster)
    cluster.shut_down()


def test_replaced_workers_are_missed_no_more(platform):
    """A cluster is healthy again when its failed worker has been replaced."""
    with make(platform) as cluster:
        cluster.add_worker_pool("test/small", None, 2, "w")
        cluster.build()
        cluster.wait_for_workers(timeout=10)
        tasks = platform.core.scheduler.tasks.values()
        worker = next(task for task in tasks if task.spec.name == "worker-nodes-01-00001")
        platform.call(platform.backend.exit, worker.run_id, 1)
        eventually(lambda: not cluster.status().healthy)
        assert cluster.status().pools["w"].missing == 1
        cluster.scale_worker_pool("w", 2)
        cluster.wait_for_workers(2, timeout=10)
        status = cluster.status()
        assert status.healthy, str(status)
        assert len(status.pools["w"].failed) == 1


def test_kept_output_of_an_earlier_cluster(platform, tmp_path):
    """What an earlier cluster of the same name has printed is not given as this one's."""
    old = tmp_path / "demo" / "head-node" / "head-node.log"
    old.parent.mkdir(parents=True)
    old.write_text("of another life")
    time.sleep(0.05)
    with make(platform, access=ACCESS, keep_logs=tmp_path) as cluster:
        cluster.build()
        assert cluster.get_logs()["head-node"].text is None


def test_added_after_another_process_has_ended_it(platform, state_directory):
    """A pool is not added to a cluster that has been ended elsewhere, and no state file comes back."""
    cluster = make(platform)
    cluster.build()
    (path,) = state_directory.glob("*.json")
    other = attach(path)
    other.shut_down()
    with pytest.raises(ClusterStateError, match="another process has shut"):
        cluster.add_worker_pool("test/small", None, 1)
    assert list(state_directory.glob("*.json")) == []
    cluster.shut_down()


def test_ended_by_another_process_while_a_pool_is_added(platform, state_directory, monkeypatch):
    """A pool that comes when the cluster has been ended is taken back, also where nobody watches the head."""
    monkeypatch.setattr(teardown, "LATE_SECONDS", 0.2)
    cluster = make(platform)
    cluster.build()
    cluster.detach()
    (path,) = state_directory.glob("*.json")
    platform.faults.faults = [Fault("POST", "/provisioned/template", 500, None)]
    adding = threading.Thread(target=_add, args=(cluster, errors := []))
    adding.start()
    eventually(lambda: platform.faults.faults[0].hits and tasks(platform, "worker-nodes-01"))
    attach(path).shut_down()
    assert platform.running() == []
    platform.faults.clear()
    adding.join(30)
    assert "is taken back: another process has shut the cluster down" in str(errors[0])
    assert platform.running() == []
    assert list(state_directory.glob("*.json")) == []
    cluster.shut_down()


@pytest.mark.parametrize(
    "change",
    [
        lambda cluster: cluster.scale_worker_pool("w", 3),
        lambda cluster: cluster.scale_worker_pool("w", 2),
        lambda cluster: cluster.scale_worker_pool("w", 0),
        lambda cluster: cluster.remove_worker_pool_by_internal_name("w"),
    ],
    ids=["up", "the same", "down", "removed"],
)
def test_changed_after_another_process_has_ended_it(platform, state_directory, change):
    """Scaling and removing fail in a cluster that was ended elsewhere, and bring no state file back."""
    cluster = make(platform)
    cluster.add_worker_pool("test/small", None, 2, "w")
    cluster.build()
    (path,) = state_directory.glob("*.json")
    attach(path).shut_down()
    with pytest.raises(ClusterStateError, match=r"no worker pool can be .*: another process has shut"):
        change(cluster)
    assert list(state_directory.glob("*.json")) == []
    cluster.shut_down()


def test_ended_by_another_process_while_it_is_scaled(platform, state_directory):
    """What is found out while a pool is scaled brings no state file back either."""
    cluster = make(platform)
    cluster.add_worker_pool("test/small", None, 1, "w")
    cluster.build()
    (path,) = state_directory.glob("*.json")
    fault = Fault("GET", "/work/tasks$", "hang", seconds=2, carried_out=True)
    platform.faults.faults = [fault]
    with ThreadPoolExecutor(1) as threads:
        scaling = threads.submit(cluster.scale_worker_pool, "w", 3)
        eventually(lambda: fault.hits)
        attach(path).shut_down()
        with pytest.raises((ClusterStateError, PlatformError)):
            scaling.result(30)
    assert platform.running() == []
    assert list(state_directory.glob("*.json")) == []
    cluster.shut_down()


def test_a_state_file_that_was_removed_by_hand(platform, state_directory):
    """A cluster that runs without its state file can be changed as ever."""
    with make(platform) as cluster:
        cluster.add_worker_pool("test/small", None, 1, "w")
        cluster.build()
        (path,) = state_directory.glob("*.json")
        path.unlink()
        for count in (3, 1, 2):
            cluster.scale_worker_pool("w", count)
        assert cluster.wait_for_workers(timeout=10) == 2
        assert sorted(tasks(platform, "worker-nodes-01"))[-1].endswith("4")
        cluster.remove_worker_pool_by_internal_name("w")
        assert pools(platform) == ["demo-00-head"]


def test_a_name_that_would_be_the_next_one(platform):
    """Where a user has given a pool the name that the next one would get, that one gets another."""
    with make(platform) as cluster:
        cluster.add_worker_pool("test/small", None, 1, "worker-nodes-02")
        cluster.add_worker_pool("test/small", None, 1)
        cluster.build()
        cluster.add_worker_pool("test/small", None, 1)
        assert cluster.worker_pool_internal_names == ["worker-nodes-02", "worker-nodes-03", "worker-nodes-04"]
        assert pools(platform) == ["demo-00-head", "demo-01-wrkrs", "demo-03-wrkrs", "demo-04-wrkrs"]
        with pytest.raises(SpecError, match="already is a worker pool 'worker-nodes-03'"):
            cluster.add_worker_pool("test/small", None, 1, "worker-nodes-03")


def test_the_output_of_a_pool_called_as_the_head(platform):
    """A worker pool may have the head's name; the output of both can be had, by the names in the status."""
    with make(platform) as cluster:
        cluster.add_worker_pool("test/small", None, 1, "head-node")
        cluster.build()
        assert list(cluster.status().pools) == ["head-node", "demo-01-wrkrs"]
        assert {name: found.pool for name, found in cluster.get_logs().items()} == {
            "head-node": "head-node",
            "worker-nodes-01-00001": "demo-01-wrkrs",
        }
        assert list(cluster.get_logs("head-node")) == ["head-node"]
        assert list(cluster.get_logs("demo-01-wrkrs")) == ["worker-nodes-01-00001"]


def test_attached_while_it_is_built(platform, state_directory, monkeypatch):
    """A cluster that is being built elsewhere is a running one when it has been built."""
    monkeypatch.setattr(watch, "SECONDS", 0.05)
    platform.backend.boot_delay = 1.0
    cluster = make(platform)
    cluster.add_worker_pool("test/small", None, 2, "w")
    with ThreadPoolExecutor(1) as threads:
        building = threads.submit(cluster.build)
        eventually(lambda: list(state_directory.glob("*.json")))
        (path,) = state_directory.glob("*.json")
        other = attach(path)
        assert other.status().phase == "built in part only"
        left = attach(path)
        left.detach()
        building.result(20)
    cluster.detach()
    assert left.status().phase == "running"
    assert left._watch is None
    status = other.status()
    assert status.phase == "running"
    assert status.head_private_ip == cluster.head_node_private_ip is not None
    assert status.drift == ()
    other.scale_worker_pool("w", 3)
    assert other.wait_for_workers(timeout=10) == 3
    # It watches the head from now on.
    let_exit(platform, "head-node", 1)
    eventually(lambda: ", shut down, because" in repr(other))
    assert platform.running() == []
    cluster.shut_down()


def test_names_given_away_by_another_process(platform, state_directory):
    """What one process has counted is not forgotten when another one writes its own count."""
    with make(platform) as cluster:
        cluster.add_worker_pool("test/small", None, 2, "w")
        cluster.build()
        (path,) = state_directory.glob("*.json")
        other = attach(path)
        other.scale_worker_pool("w", 5)
        cluster._assembly.note_pools(cluster._pools["w"])
        assert ClusterState.load(path).pool("demo-01-wrkrs").tasks_counted == 5


def test_detached(platform):
    """A cluster that was detached goes on, can be used again, and is not complained about."""
    cluster = make(platform)
    cluster.build()
    cluster.detach()
    assert cluster.status().healthy
    eventually(lambda: not cluster._watch._thread.is_alive())
    cluster.shut_down()
    assert platform.running() == []


def test_local_platform_that_has_ended(state_directory):
    """That a cluster's platform has ended is said at once; without its file it has ended too."""
    with serve() as platform:
        cluster = make(platform)
        cluster.build()
    began = time.monotonic()
    with pytest.raises(TeardownError, match="nobody listens"):
        cluster.shut_down()
    next(state_directory.glob("*.json")).unlink()
    cluster.shut_down()
    assert "shut down" in repr(cluster)
    assert time.monotonic() - began < 2
