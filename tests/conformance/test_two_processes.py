"""A cluster that several processes have in hand at once: they see and end each other's doings."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from typing import Any

import pytest

from tests.controlplane import KEY_ID, SECRET, Fault, Served, serve
from tests.processes import IMPATIENT, Child, arguments, eventually
from yellowdog_ray.errors import ClusterStateError, PlatformError, SpecError
from yellowdog_ray.raydog import proxy as proxy_module
from yellowdog_ray.raydog import watch
from yellowdog_ray.raydog.builder import RayDogCluster, RayDogClusterProxy
from yellowdog_ray.raydog.journal import Journal, find_states
from yellowdog_ray.raydog.state import ClusterState

EVERYTHING = {"demo-00-head", "demo-01-wrkrs", "demo-observability"}


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """Processes that end a cluster do not wait as long as in the field, here as in the children."""
    for module, name, value in IMPATIENT:
        monkeypatch.setattr(module, name, value)


@pytest.fixture
def platform():
    with serve() as served:
        yield served
        served.faults.clear()
        assert served.running() == []


@pytest.fixture
def builder(platform, state_directory):
    """A process that is about to build a cluster with one worker pool."""
    with Child(state_directory) as child:
        child.call("RayDogCluster", **arguments(platform))
        child.call("add_worker_pool", "test/small", "echo one", 1, "one")
        yield child


def proxy(state) -> RayDogClusterProxy:
    loaded = RayDogClusterProxy(KEY_ID, SECRET)
    if isinstance(state, str):
        loaded.load_saved_state_from_json(state)
    else:
        loaded.load_saved_state_from_json_file(state)
    return loaded


def attached(platform: Served, state, **options) -> RayDogCluster:
    return RayDogCluster.attach(state, KEY_ID, SECRET, platform.url, progress=False, **options)


def names(platform: Served) -> set[str]:
    """The names of everything that runs."""
    return {item.rpartition("/")[2] for item in platform.running()}


# -- one builds, another one ends it -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "compute/templates"),
        ("POST", "workerPools/provisioned"),
        ("POST", "work/requirements"),
        ("GET", "workerPools/nodes"),
        ("POST", "taskGroups"),
        ("GET", "work/tasks"),
    ],
)
@pytest.mark.parametrize("when", ["not yet", "not answered"])
def test_ended_while_it_is_built(platform, builder, state_directory, method, path, when):
    """Ended by another process while it is being built, it leaves nothing, and its builder says why.

    The builder is in the middle of a call, carried out or not yet, while the other one does all of its work.
    """
    ended = threading.Event()

    async def hold(seconds: float, receive: Any) -> None:
        while seconds and not ended.is_set():
            await asyncio.sleep(0.002)

    platform.faults._hold = hold
    held = {"seconds": 1, "delay": 0} if when == "not yet" else {"seconds": 0, "delay": 1}
    fault = Fault(method, path, "hang", carried_out=True, **held)
    platform.faults.faults = [fault]
    builder.start("build")
    eventually("the call is under way", lambda: fault.hits)
    (file,) = find_states(state_directory)
    # As it is in the field, where the building process does not come to do anything else meanwhile.
    time.sleep(0.05)
    proxy(file).shut_down()
    assert find_states(state_directory) == []
    ended.set()
    with pytest.raises(ClusterStateError, match="another process"):
        builder.result()
    assert platform.running() == []
    assert find_states(state_directory) == []


@pytest.mark.parametrize("seconds", [0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
def test_ended_while_it_goes_on(state_directory, seconds):
    """Ended by another process at any moment, while its builder goes on, it leaves nothing."""
    with serve(latency=0.02, boot_delay=0.2, start_delay=0.1) as served, Child(state_directory) as builder:
        builder.call("RayDogCluster", **arguments(served))
        builder.call("add_worker_pool", "test/small", None, 2, "one")
        builder.start("build")
        (file,) = eventually("the state file", lambda: find_states(state_directory))
        time.sleep(seconds)
        proxy(file).shut_down()
        told = builder.outcome()
        # Late enough, it was built, and then ended.
        assert isinstance(told, tuple) or "being shut down by another process" in str(told)
        assert served.running() == []
        eventually("the builder has not written it again", lambda: not find_states(state_directory))


# -- two at once in a running cluster ------------------------------------------------------------------


def test_two_add_at_once(platform, builder, state_directory):
    """Pools that two processes add at once have numbers, groups and tasks of their own; one ends them all."""
    platform.faults.latency = 0.03
    builder.call("build")
    (file,) = find_states(state_directory)
    with Child(state_directory) as other:
        other.call("attach", file, KEY_ID, SECRET, platform.url)
        assert other.call("worker_pool_internal_names") == ["one"]
        for turn in range(3):
            builder.start("add_worker_pool", "test/small", f"echo first {turn}", 1)
            other.start("add_worker_pool", "test/small", f"echo second {turn}", 2)
            assert builder.result() != other.result()
        assert builder.call("wait_for_workers", 10, 10) == 10
        assert other.call("wait_for_workers", 10, 10) == 10
        numbers = [f"worker-nodes-{number:02d}" for number in range(2, 8)]
        assert sorted(builder.call("worker_pool_internal_names")) == sorted(["one", *numbers])

        def tasks() -> dict[str, tuple[str, int]]:
            scheduler = platform.core.scheduler
            groups = {group.spec.name: group for group in scheduler.groups.values()}
            return {name: (groups[name].spec.task_data, len(groups[name].tasks)) for name in numbers}

        told = platform.call(tasks)
        assert sorted(told.values()) == [
            *((f"echo first {turn}", 1) for turn in range(3)),
            *((f"echo second {turn}", 2) for turn in range(3)),
        ]
        # Every task runs on a node of the pool that has its number.
        status = other.call("status").pools
        assert {name: status[name].executing for name in numbers} == {
            name: count for name, (_, count) in told.items()
        }
        assert {name: status[name].registered for name in numbers} == {
            name: count for name, (_, count) in told.items()
        }
        builder.call("shut_down")
        assert platform.running() == []
        assert find_states(state_directory) == []
        with pytest.raises((ClusterStateError, PlatformError)):
            other.call("add_worker_pool", "test/small", None, 1)
        assert platform.running() == []
        other.call("shut_down")
        assert find_states(state_directory) == []


@pytest.mark.parametrize("refused", [False, True])
def test_looked_at_while_the_other_one_adds(platform, builder, state_directory, refused):
    """A pool that is seen while another process adds it is seen whole afterwards, or not any more."""
    builder.call("build")
    (file,) = find_states(state_directory)
    with Child(state_directory) as other:
        other.call("attach", file, KEY_ID, SECRET, platform.url)
        adding = Fault("PUT", "work/requirements", "hang", seconds=0.3, carried_out=True)
        failing = Fault("POST", "taskGroups", 400)
        platform.faults.faults = [adding, failing] if refused else [adding]
        other.start("add_worker_pool", "test/small", None, 2, "two")
        eventually("it is being added", lambda: adding.hits)
        assert set(builder.call("status").pools) == {"head-node", "observability-node", "one", "two"}
        if refused:
            with pytest.raises(PlatformError):
                other.result()
            assert builder.call("wait_for_workers", None, 10) == 1
            assert set(builder.call("status").pools) == {"head-node", "observability-node", "one"}
            builder.call("add_worker_pool", "test/small", None, 1, "two")
        else:
            other.result()
            assert builder.call("wait_for_workers", None, 10) == 3
            builder.call("scale_worker_pool", "two", 1)
            other.call("remove_worker_pool_by_internal_name", "two")
            assert builder.call("wait_for_workers", None, 10) == 1
        builder.call("shut_down")


@pytest.mark.parametrize(
    ("method", "path"),
    [("POST", "workerPools/provisioned"), ("PUT", "work/requirements"), ("POST", "taskGroups")],
)
@pytest.mark.parametrize("carried_out", [True, False])
def test_the_other_one_dies_while_it_adds(platform, builder, state_directory, method, path, carried_out):
    """What a process was adding when it was killed is ended by the one that built the cluster."""
    builder.call("build")
    (file,) = find_states(state_directory)
    with Child(state_directory) as other:
        other.call("attach", file, KEY_ID, SECRET, platform.url)
        fault = Fault(method, path, "hang", seconds=3600, carried_out=carried_out)
        platform.faults.faults = [fault]
        other.start("add_worker_pool", "test/small", None, 1, "half")
        eventually("the call is under way", lambda: fault.hits)
        if method != "POST" or "taskGroups" in path:
            eventually("the pool is there", lambda: "demo-02-wrkrs" in names(platform))
        other.kill()
    # The one that goes on can add and remove, and the name is taken.
    added = builder.call("add_worker_pool", "test/small", None, 1, "more")
    assert "demo-03-wrkrs" in names(platform)
    with pytest.raises(SpecError, match="already is a worker pool 'half'"):
        builder.call("add_worker_pool", "test/small", None, 1, "half")
    builder.call("remove_worker_pool", added)
    builder.call("shut_down")
    assert platform.running() == []
    assert find_states(state_directory) == []


@pytest.mark.parametrize("by", ["itself", "its state"])
def test_nothing_is_added_behind_a_shut_down(platform, builder, state_directory, monkeypatch, by):
    """From the moment at which it is listed what a shut-down ends, other processes cannot add to it."""
    builder.call("build")
    (file,) = find_states(state_directory)
    said = []

    def add() -> None:
        with pytest.raises(ClusterStateError) as caught:
            builder.call("add_worker_pool", "test/small", None, 1)
        said.append(str(caught.value))

    if by == "itself":
        cluster = attached(platform, file)
        refresh = Journal.refresh

        def refreshed(journal: Journal) -> ClusterState:
            state = refresh(journal)
            if not said:
                add()
            return state

        monkeypatch.setattr(Journal, "refresh", refreshed)
        cluster.shut_down()
    else:
        list_all = proxy_module._all_targets

        def listed(*args: Any) -> Any:
            targets = list_all(*args)
            add()
            return targets

        monkeypatch.setattr(proxy_module, "_all_targets", listed)
        proxy(file).shut_down()
    assert len(said) == 1
    assert "another process is shutting the cluster down" in said[0] or "being shut down" in said[0]
    assert platform.running() == []


def test_the_builder_dies_and_another_goes_on(platform, builder, state_directory):
    """A process that comes back to a cluster whose builder was killed adds, scales and ends it."""
    builder.call("build")
    builder.kill()
    (file,) = find_states(state_directory)
    cluster = attached(platform, file)
    cluster.add_worker_pool("test/small", None, 1, "two")
    cluster.scale_worker_pool("one", 2)
    assert cluster.wait_for_workers(timeout=10) == 3
    assert names(platform) >= EVERYTHING | {"demo-02-wrkrs"}
    cluster.shut_down()
    assert find_states(state_directory) == []


def test_the_builder_notices(platform, state_directory):
    """The process that built a cluster notices that another one has shut it down."""
    with Child(state_directory, [(watch, "SECONDS", 0.1)]) as builder:
        builder.call("RayDogCluster", **arguments(platform))
        builder.call("build")
        assert builder.call("status").phase == "running"
        (file,) = find_states(state_directory)
        proxy(file).shut_down()
        phase = eventually(
            "it is shut down", lambda: (status := builder.call("status")).phase == "shut down" and status
        )
        assert phase.failure == "another process has shut it down"
        eventually("no state file", lambda: not find_states(state_directory))
        with pytest.raises(ClusterStateError, match="another process has shut it down"):
            builder.call("add_worker_pool", "test/small", None, 1)
        builder.call("shut_down")


# -- states that are not the newest --------------------------------------------------------------------


def test_old_snapshot(platform, builder, state_directory, tmp_path):
    """A state that was saved before a pool was added ends that pool too, and stays where it is."""
    builder.call("build")
    snapshot = tmp_path / "snapshot.json"
    builder.call("save_state_to_json_file", snapshot)
    builder.call("add_worker_pool", "test/small", None, 1, "two")
    before = snapshot.read_bytes()
    assert b"demo-02-wrkrs" not in before
    builder.kill()
    proxy(snapshot).shut_down()
    assert platform.running() == []
    assert list(state_directory.iterdir()) == []
    assert snapshot.read_bytes() == before
    # Once more is no error: it is known, and has ended.
    proxy(snapshot).shut_down()


def test_snapshot_on_another_machine(platform, builder, state_directory, tmp_path):
    """A state that was saved is enough where the cluster's own state file is not; so is a copy of that."""
    builder.call("build")
    builder.call("add_worker_pool", "test/small", None, 1, "two")
    (file,) = find_states(state_directory)
    text = builder.call("save_state_to_json")
    builder.kill()
    elsewhere = json.loads(text)
    assert elsewhere["state_file"] == str(file)
    elsewhere["state_file"] = str(tmp_path / "not" / "here.json")
    proxy(json.dumps(elsewhere)).shut_down()
    assert platform.running() == []
    assert not (tmp_path / "not").exists()


def test_the_state_file_of_another_cluster_is_left_alone(platform, builder, state_directory, tmp_path):
    """Where another cluster's state is in the place of a snapshot's own, that cluster is not touched."""
    builder.call("build")
    text = builder.call("save_state_to_json")
    builder.kill()
    (file,) = find_states(state_directory)
    file.unlink()
    with Child(state_directory) as second:
        second.call("RayDogCluster", **arguments(platform, "other", state_file=file))
        second.call("build")
        proxy(text).shut_down()
        assert names(platform) == {"other", "other-00-head", "other-observability"}
        assert ClusterState.load(file).status == "running"
        second.call("shut_down")


# -- states of the existing package --------------------------------------------------------------------


def legacy(builder: Child) -> dict[str, Any]:
    """Write the state as the existing package does, in its documentation's example."""
    state = json.loads(builder.call("save_state_to_json"))
    keys = ("cluster_name", "cluster_namespace", "cluster_tag", "work_requirement_id", "worker_pool_ids")
    return {key: state[key] for key in keys}


@pytest.mark.parametrize("gone", [None, "ended", "unknown"])
def test_state_of_the_existing_package(platform, builder, tmp_path, gone):
    """It shuts its cluster down; where a part of that is gone already, all the others."""
    builder.call("build")
    old = legacy(builder)
    assert len(old["worker_pool_ids"]) == 3
    builder.kill()
    if gone == "ended":
        one = {**old, "work_requirement_id": None, "worker_pool_ids": old["worker_pool_ids"][2:]}
        ending = RayDogClusterProxy(KEY_ID, SECRET, platform.url)
        ending.load_saved_state_from_json(json.dumps(one))
        ending.shut_down()
        assert names(platform) == {"demo", "demo-00-head", "demo-observability"}
    elif gone == "unknown":
        missing = old["worker_pool_ids"][0][:-12] + "0" * 12
        old["worker_pool_ids"].insert(0, missing)
    path = tmp_path / "raydog.json"
    path.write_text(json.dumps(old, indent=2))
    ending = RayDogClusterProxy(KEY_ID, SECRET, platform.url)
    ending.load_saved_state_from_json_file(path)
    ending.shut_down()
    assert platform.running() == []
    assert json.loads(path.read_text()) == old
