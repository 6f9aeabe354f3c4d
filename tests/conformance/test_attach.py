"""Coming back to a cluster from its state, against the simulated platform."""

from __future__ import annotations

import gc
import json
import os
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest

from tests.clusters import (
    SHORT,
    attach,
    eventually,
    lose_machine,
    make,
    nodes,
    pools,
    state_of,
    tasks,
)
from tests.controlplane import KEY_ID, SECRET, TEMPLATE, Fault
from yellowdog_ray.errors import (
    ClusterStateError,
    CredentialsError,
    PlatformUnreachableError,
    SpecError,
    StateError,
    TeardownError,
)
from yellowdog_ray.raydog import watch
from yellowdog_ray.raydog.builder import RayDogCluster, RayDogClusterProxy
from yellowdog_ray.raydog.state import ClusterState

ATTRIBUTES = [
    "work_requirement_id",
    "head_node_worker_pool_id",
    "head_node_node_id",
    "head_node_private_ip",
    "head_node_public_ip",
    "head_node_task_id",
    "worker_pool_ids",
    "worker_pool_internal_names",
    "enable_observability",
    "observability_node_id",
    "observability_node_private_ip",
    "observability_node_worker_pool_id",
    "observability_node_task_id",
]


pytestmark = pytest.mark.usefixtures("hurried")


@pytest.fixture
def cluster(platform, state_directory):
    """A running cluster with an observability node and two worker pools, all at work."""
    with make(
        platform,
        cluster_tag="team",
        cluster_lifetime=timedelta(hours=3),
        enable_observability=True,
        observability_node_compute_requirement_template_id=TEMPLATE.id,
    ) as cluster:
        cluster.add_worker_pool("test/small", None, 2)
        cluster.add_worker_pool("test/small", None, 1, "mine")
        cluster.build(SHORT)
        assert cluster.wait_for_workers(timeout=10) == 3
        yield cluster
    assert list(state_directory.glob("*.json")) == []


@pytest.fixture
def path(cluster, state_directory):
    (path,) = state_directory.glob("*.json")
    return path


def same(value):
    """What can be compared of an attribute's value, or of a pool."""
    return (value.id, value.plan.name, value.plan.group, value.node_count, value.group_id)


# -- what is there again -------------------------------------------------------------------------------


@pytest.mark.parametrize("of", ["file", "text of a path", "object", "snapshot"])
def test_everything_is_known_again(cluster, path, tmp_path, of):
    """Every attribute is what it is in the process that built the cluster, whatever it is attached by."""
    if of == "snapshot":
        cluster.save_state_to_json_file(tmp_path / "snapshot.json")
    state = {
        "file": path,
        "text of a path": str(path),
        "object": ClusterState.load(path),
        "snapshot": tmp_path / "snapshot.json",
    }[of]
    other = attach(state)
    values = {name: getattr(other, name) for name in ATTRIBUTES}
    assert values == {name: getattr(cluster, name) for name in ATTRIBUTES}
    public = {
        name
        for part in RayDogCluster.__mro__
        for name, value in vars(part).items()
        if isinstance(value, property) and not name.startswith("_")
    }
    assert public <= {*ATTRIBUTES, "yd_client", "worker_node_worker_pools"}
    mine, theirs = cluster.worker_node_worker_pools, other.worker_node_worker_pools
    assert {name: same(pool) for name, pool in mine.items()} == {
        name: same(pool) for name, pool in theirs.items()
    }
    for pool_id in cluster.worker_pool_ids:
        name = cluster.get_worker_pool_internal_name_by_id(pool_id)
        assert other.get_worker_pool_internal_name_by_id(pool_id) == name is not None
    assert repr(other) == repr(cluster) == "<RayDogCluster test/demo, running>"
    status = other.status()
    assert status.lifetime_ends == cluster.status().lifetime_ends is not None
    assert status.healthy
    assert list(status.pools) == ["head-node", "observability-node", "worker-nodes-01", "mine"]
    again = state_of(other).model_dump(exclude={"saved"})
    assert again == state_of(cluster).model_dump(exclude={"saved"})


def test_attaching_creates_and_ends_nothing(platform, cluster, path):
    """Attaching only reads."""
    seen = len(platform.faults.seen)
    attach(path)
    assert {method for method, _ in platform.faults.seen[seen:]} == {"GET"}


def test_the_same_token(cluster, path, monkeypatch):
    """This process gets the token that the building one made, from the platform and not from the state."""
    token = os.environ["RAY_AUTH_TOKEN"]
    assert token not in path.read_text()
    monkeypatch.setenv("RAY_AUTH_TOKEN", "another")
    other = attach(path)
    assert os.environ["RAY_AUTH_TOKEN"] == "another"
    assert other.use_ray_auth() is True
    assert os.environ["RAY_AUTH_TOKEN"] == token
    assert os.environ["RAY_AUTH_MODE"] == "token"
    other.shut_down()
    assert os.environ.get("RAY_AUTH_TOKEN") != token


def test_workers_that_are_added_get_the_same_token(platform, cluster, path):
    """Workers that an attached process adds can talk to the head that another one started."""
    attach(path).add_worker_pool("test/small", "echo added", 1)
    eventually(lambda: tasks(platform, "worker-nodes-03", "EXECUTING"))
    started = [effect for effect in platform.backend.applied if type(effect).__name__ == "StartTask"]
    added = next(effect.environment for effect in started if effect.task_data == "echo added")
    usual = next(effect.environment for effect in started if "RAY_HEAD_IP" in effect.environment)
    assert {name: added[name] for name in usual if name != "RAYDOG_NODE_IP"} == {
        name: value for name, value in usual.items() if name != "RAYDOG_NODE_IP"
    }
    assert added["RAY_AUTH_TOKEN"] == os.environ["RAY_AUTH_TOKEN"]


def test_no_token(platform):
    """A cluster without a token has none after attaching either."""
    with make(platform, ray_auth="off") as cluster:
        cluster.build(SHORT)
        assert attach(state_of(cluster)).use_ray_auth() is False
        assert "RAY_AUTH_TOKEN" not in os.environ


# -- what can be done ----------------------------------------------------------------------------------


@pytest.mark.parametrize("of", ["file", "snapshot"])
def test_a_life_after_attaching(platform, cluster, path, of):
    """Add, wait, scale, remove and shut down by an attached cluster; the building one sees all of it."""
    other = attach(path if of == "file" else state_of(cluster))
    added = other.add_worker_pool("test/small", None, 1, "added")
    assert other.wait_for_workers(timeout=10) == 4
    assert cluster.wait_for_workers(timeout=10) == 4
    assert cluster.worker_pool_internal_names == ["worker-nodes-01", "mine", "added"]
    other.scale_worker_pool("mine", 3)
    assert cluster.wait_for_workers(timeout=10) == other.wait_for_workers(timeout=10) == 6
    other.remove_worker_pool_by_internal_name("worker-nodes-01")
    assert pools(platform) == ["demo-00-head", "demo-02-wrkrs", "demo-03-wrkrs", "demo-observability"]
    assert cluster.status().wanted_workers == 4
    cluster.remove_worker_pool(added)
    assert other.status().wanted_workers == 3
    assert other.worker_pool_internal_names == ["mine"]
    assert other.status().healthy
    other.shut_down()
    assert platform.running() == []
    assert not path.exists()
    with pytest.raises(ClusterStateError, match="shut down"):
        other.add_worker_pool("test/small", None, 1)


def test_numbers_are_counted_on(platform, cluster, path):
    """No number of a pool is used again: not that of a removed pool, nor one that another process took."""
    other = attach(path)
    other.remove_worker_pool_by_internal_name("mine")
    assert other.add_worker_pool("test/small", None, 1)
    cluster.add_worker_pool("test/small", None, 1)
    attach(state_of(cluster)).add_worker_pool("test/small", None, 1)
    assert other.add_worker_pool("test/small", None, 1)
    names = [f"demo-{number:02d}-wrkrs" for number in (1, 3, 4, 5, 6)]
    assert pools(platform) == ["demo-00-head", *names, "demo-observability"]
    assert cluster.wait_for_workers(timeout=10) == other.wait_for_workers(timeout=10) == 6


def test_names_that_are_taken(platform, cluster, path):
    """A name that another process has given to a pool is taken."""
    other = attach(path)
    other.add_worker_pool("test/small", None, 1, "new")
    with pytest.raises(SpecError, match="already is a worker pool 'new'"):
        cluster.add_worker_pool("test/small", None, 1, "new")
    with pytest.raises(SpecError, match="already is a worker pool 'mine'"):
        other.add_worker_pool("test/small", None, 1, "mine")


def test_two_processes_add_at_once(platform, cluster, path):
    """Pools that are added by several clusters of one state at once all arrive, each in its own group."""
    platform.faults.latency = 0.02
    handles = [cluster, attach(path), attach(state_of(cluster))]
    gate = threading.Barrier(3, timeout=10)

    def add(handle) -> str:
        gate.wait()
        return handle.add_worker_pool("test/small", None, 1)

    with ThreadPoolExecutor(3) as threads:
        added = list(threads.map(add, handles))
    platform.faults.latency = 0
    assert len(set(added)) == 3
    assert [handle.wait_for_workers(timeout=10) for handle in handles] == [6, 6, 6]
    assert all(set(added) < set(handle.worker_pool_ids) for handle in handles)


@pytest.mark.parametrize("ends", ["well", "badly"])
def test_a_pool_that_another_process_is_adding(platform, cluster, path, ends):
    """Looking while another process adds a pool is no reason to see it unfinished for ever."""
    other = attach(path)
    what = {"well": "hang", "badly": 403}[ends]
    fault = Fault("POST", "/workerPools/provisioned", what, seconds=0.5, carried_out=ends == "well")
    if ends == "badly":
        # A refusal that comes late.
        fault.delay = 0.5
    platform.faults.faults = [fault]
    with ThreadPoolExecutor(1) as threads:
        adding = threads.submit(other.add_worker_pool, "test/small", None, 1, "new")
        eventually(lambda: fault.hits)
        assert "new" in cluster.status().pools
        assert adding.exception(20) is None or ends == "badly"
    if ends == "well":
        assert cluster.wait_for_workers(timeout=10) == 4
        cluster.scale_worker_pool("new", 2)
        assert cluster.wait_for_workers(timeout=10) == 5
    else:
        assert "new" not in cluster.status().pools
        cluster.add_worker_pool("test/small", None, 1, "new")
        assert cluster.wait_for_workers(timeout=10) == 4


def test_left_behind_without_a_warning(platform, cluster, path):
    """An attached cluster that is forgotten ends nothing, warns of nothing and leaves no thread."""
    before = platform.running()
    other = attach(path)
    watching = other._watch._thread
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        del other
        gc.collect()
    assert platform.running() == before
    assert path.exists()
    assert watching.daemon


def test_the_watch_of_a_forgotten_cluster_ends(cluster, path, monkeypatch):
    """The thread that looks at the head goes with the object that it looks for."""
    monkeypatch.setattr(watch, "SECONDS", 0.02)
    other = attach(path)
    watching = other._watch._thread
    assert watching.is_alive()
    del other
    gc.collect()
    eventually(lambda: not watching.is_alive())


def test_another_process_shuts_it_down(platform, cluster, path, monkeypatch):
    """A cluster that an attached one has shut down is shut down for the building one too."""
    other = attach(path)
    other.shut_down()
    assert platform.running() == []
    cluster.shut_down()
    assert not path.exists()


def test_the_proxy_knows_what_was_added_later(platform, cluster, path, tmp_path):
    """A snapshot that is older than a pool ends that pool too, where the state file is on this machine."""
    snapshot = state_of(cluster).to_json()
    attach(path).add_worker_pool("test/small", None, 1)
    proxy = RayDogClusterProxy(KEY_ID, SECRET)
    proxy.load_saved_state_from_json(snapshot)
    proxy.shut_down()
    assert platform.running() == []
    assert not path.exists()


def test_a_snapshot_without_its_file(platform, cluster, path, tmp_path, monkeypatch):
    """On another machine looking writes nothing; a change begins a state file, which goes at the end."""
    snapshot = state_of(cluster)
    path.unlink()
    elsewhere = tmp_path / "another-machine" / "states"
    monkeypatch.setenv("RAYDOG_STATE_DIR", str(elsewhere))
    other = attach(snapshot)
    assert other.wait_for_workers(timeout=10) == 3
    assert other.status().healthy
    assert not elsewhere.exists()
    other.add_worker_pool("test/small", None, 1, "new")
    (begun,) = elsewhere.glob("*.json")
    there = ClusterState.load(begun)
    assert there.build_id == snapshot.build_id
    assert there.state_file == str(begun)
    assert there.pool("demo-03-wrkrs").id in other.worker_pool_ids
    again = attach(begun)
    assert again.wait_for_workers(timeout=10) == 4
    again.shut_down()
    assert platform.running() == []
    assert list(elsewhere.glob("*.json")) == []


# -- drift ---------------------------------------------------------------------------------------------


def drift(state, caplog) -> list[str]:
    """What attaching says in the log, after making sure that status() says the same."""
    caplog.clear()
    other = attach(state)
    warned = [
        record.getMessage() for record in caplog.records if record.name == "yellowdog_ray.raydog.builder"
    ]
    found = other.status().drift
    assert warned == [f"The cluster test/demo: {sentence}" for sentence in found]
    assert other.status().healthy is not bool(found)
    return list(found)


def test_no_drift(cluster, path, caplog):
    """A cluster that is as it should be is attached without a word."""
    assert drift(path, caplog) == []


def test_a_pool_was_terminated_behind_our_back(platform, cluster, path, caplog):
    """A pool that somebody has ended is said to be so, by attaching and by the status."""
    pool = cluster.worker_node_worker_pools["mine"]
    client = cluster.yd_client
    client.worker_pool_client.shutdown_worker_pool_by_id(pool.id)
    client.compute_client.terminate_compute_requirement_by_id(pool.compute_requirement_id)
    eventually(lambda: nodes(platform, "demo-02-wrkrs") == 0)
    eventually(lambda: cluster.status().pools["mine"].status == "TERMINATED")
    assert drift(path, caplog) == ["the worker pool demo-02-wrkrs is TERMINATED"]
    status = attach(path).status()
    assert "TERMINATED" in status.pools["mine"].problem
    assert not status.healthy
    assert status.pools["mine"].executing == 0
    assert status.pools["worker-nodes-01"].problem is None


def test_a_foreign_pool_under_our_name(platform, cluster, path, caplog):
    """A pool under a name of ours that we did not create is named, and is not ended with the cluster."""
    stranger = make(platform, "stranger")
    usage_name = "demo-07-wrkrs"
    from yellowdog_client.model import (
        ComputeRequirementTemplateUsage,
        NodeWorkerTarget,
        ProvisionedWorkerPoolProperties,
    )

    made = stranger.yd_client.worker_pool_client.provision_worker_pool(
        ComputeRequirementTemplateUsage(
            templateId="test/small",
            requirementName=usage_name,
            requirementNamespace="test",
            targetInstanceCount=1,
        ),
        ProvisionedWorkerPoolProperties(createNodeWorkers=NodeWorkerTarget.per_node(1), workerTag="x"),
    )
    assert drift(path, caplog) == [
        f"the worker pool {usage_name} ({made.id}) is on the platform, and not known to be of this cluster"
    ]
    cluster.shut_down()
    assert pools(platform) == [usage_name]
    stranger.yd_client.worker_pool_client.shutdown_worker_pool_by_id(made.id)
    stranger.yd_client.compute_client.terminate_compute_requirement_by_id(made.computeRequirementId)
    eventually(lambda: platform.running() == [])


@pytest.mark.parametrize("name", ["demo-2-00-head", "demo-extra", "demo2-01-wrkrs"])
def test_another_cluster_of_a_similar_name(platform, cluster, path, caplog, name):
    """A pool whose name only begins as ours do is nobody's business."""
    other = make(platform, name)
    other.build(SHORT)
    assert drift(path, caplog) == []
    other.shut_down()


@pytest.mark.parametrize("status", ["HELD", "CANCELLED"])
def test_the_work_requirement_was_ended(platform, cluster, path, caplog, status):
    """A work requirement that somebody has held or cancelled is said to be so."""
    work = cluster.yd_client.work_client
    if status == "HELD":
        work.hold_work_requirement_by_id(cluster.work_requirement_id)
    else:
        work.cancel_work_requirement_by_id(cluster.work_requirement_id, abort=True)
        eventually(lambda: "work test/demo" not in platform.running())
    assert drift(path, caplog) == [f"the work requirement demo is {status}"]


def test_a_node_too_many(platform, cluster, path, caplog):
    """Instances that somebody has added are named, with their number."""
    pool = cluster.worker_node_worker_pools["mine"]
    cluster.yd_client.worker_pool_client.resize_worker_pool_by_id(pool.id, 3)
    eventually(lambda: nodes(platform, "demo-02-wrkrs") == 3)
    assert drift(path, caplog) == ["the worker pool demo-02-wrkrs has 3 instances, and should have 1"]
    # Scaling to what it should have is what brings it there.
    cluster.scale_worker_pool("mine", 1)
    eventually(lambda: nodes(platform, "demo-02-wrkrs") == 1)
    assert drift(path, caplog) == []


def test_a_machine_that_is_replaced_is_no_drift(platform, cluster, path, caplog):
    """A preempted machine is replaced by the platform itself."""
    lose_machine(platform, "worker-nodes-01")
    eventually(lambda: len(tasks(platform, "worker-nodes-01", "EXECUTING")) == 2)
    assert drift(path, caplog) == []


# -- states that cannot be worked with -----------------------------------------------------------------


@pytest.fixture
def crashed(platform, tmp_path, monkeypatch):
    """A state file of a process that died in the middle of a build: a pool and the head's are there."""
    path = tmp_path / "crashed.json"
    cluster = make(platform, "torn", state_file=path)
    cluster.add_worker_pool("test/small", None, 2, "mine")
    platform.faults.faults = [Fault("POST", "/work/requirements$", "hang", None, seconds=0.7)]
    with ThreadPoolExecutor(1) as threads:
        building = threads.submit(cluster.build, timedelta(seconds=15))
        eventually(lambda: {"torn-00-head", "torn-01-wrkrs"} <= set(pools(platform)))
        eventually(lambda: all(pool.id for pool in ClusterState.load(path).pools))
        text = path.read_text()
        # As if it had died here: what it would take back now is what is left.
        with monkeypatch.context() as patch:
            patch.setattr("yellowdog_ray.raydog.building.take_back", lambda *args: False)
            patch.setattr(type(cluster), "_note_ended", lambda *args: None)
            cluster._assembly.settle()
            building.exception(20)
    platform.faults.clear()
    cluster._attached = True  # not warned of
    path.write_text(text)
    return path


def test_a_build_that_died(platform, crashed):
    """A cluster that was built in part only can be looked at and shut down, and nothing else."""
    assert ClusterState.load(crashed).status == "building"
    other = attach(crashed)
    assert repr(other) == "<RayDogCluster test/torn, built in part only>"
    status = other.status()
    assert status.phase == "built in part only"
    assert status.drift[0] == "the work requirement has not been added"
    assert not status.healthy
    assert {name: pool.name for name, pool in status.pools.items()} == {
        "head-node": "torn-00-head",
        "mine": "torn-01-wrkrs",
    }
    for call in (
        lambda: other.add_worker_pool("test/small", None, 1),
        lambda: other.scale_worker_pool("mine", 1),
        lambda: other.remove_worker_pool_by_internal_name("mine"),
        other.wait_for_workers,
        other.build,
        other.plan,
    ):
        with pytest.raises(ClusterStateError, match=r"built in part only|not been added completely"):
            call()
    other.shut_down()
    assert platform.running() == []
    assert not crashed.exists()


def test_a_build_that_died_is_shut_down_by_the_proxy(platform, crashed):
    """The proxy ends what there is of it too."""
    proxy = RayDogClusterProxy(KEY_ID, SECRET)
    proxy.load_saved_state_from_json_file(crashed)
    proxy.shut_down()
    assert platform.running() == []
    assert not crashed.exists()


def test_a_shut_down_that_failed_goes_on(platform, cluster, path, monkeypatch):
    """What a failed shut-down has left can be looked at, and ended by an attached cluster."""
    platform.faults.faults = [
        Fault("PUT", "/transition/TERMINATED", 500, None),
        Fault("DELETE", "/workerPools/", 500, None),
    ]
    with pytest.raises(TeardownError):
        cluster.shut_down()
    platform.faults.clear()
    other = attach(path)
    assert "being shut down" in repr(other)
    with pytest.raises(ClusterStateError, match="being shut down"):
        other.add_worker_pool("test/small", None, 1)
    assert other.status().phase == "being shut down"
    other.shut_down()
    assert platform.running() == []


def test_a_state_of_the_existing_package(platform, cluster, path):
    """Five keys are too few to come back; the error says what does work, and it does."""
    state = json.loads(path.read_text())
    keys = ("cluster_name", "cluster_namespace", "cluster_tag", "work_requirement_id", "worker_pool_ids")
    legacy = ClusterState.from_json(json.dumps({key: state[key] for key in keys}))
    with pytest.raises(
        StateError, match=r"test/demo .*existing package.*RayDogClusterProxy.*raydog shut-down"
    ):
        attach(legacy, yd_platform_api_url=platform.url)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "not JSON"),
        ("[1, 2]", "not the saved state of a cluster"),
        ('{"work_requirement_id": null}', "not the saved state of a cluster"),
        ('{"work_requirement_id": "../x", "worker_pool_ids": []}', "work_requirement_id"),
        ('{"work_requirement_id": null, "worker_pool_ids": [], "format_version": 99}', "format 99"),
        ('{"work_requirement_id": null, "worker_pool_ids": [], "api_url": "http://example.com"}', "https"),
    ],
)
def test_garbage(tmp_path, text, said):
    """What is no state is refused with the file's name, and nobody is asked."""
    path = tmp_path / "garbage.json"
    path.write_text(text)
    with pytest.raises(StateError, match=rf"(?s)garbage\.json.*{said}"):
        attach(path)


def test_no_file(tmp_path):
    """A file that is not there is an OSError, as open() raises it."""
    with pytest.raises(FileNotFoundError):
        attach(tmp_path / "nothing.json")


def test_a_wrong_key(cluster, path):
    """A key that is not accepted is said to be so; the cluster's file is left as it is."""
    before = path.read_text()
    with pytest.raises(CredentialsError, match="does not accept the application key") as caught:
        RayDogCluster.attach(path, KEY_ID, "do-not-show")
    assert "do-not-show" not in str(caught.value)
    assert path.read_text() == before


def test_a_platform_that_is_not_there(cluster, path):
    """An API that does not answer is an error when attaching, and not only later."""
    with pytest.raises(PlatformUnreachableError, match=r"no answer from 127\.0\.0\.1:9"):
        attach(path, yd_platform_api_url="http://127.0.0.1:9")


def test_a_failed_attachment_warns_of_nothing(cluster, path):
    """An object that could not be attached is collected without a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(CredentialsError):
            RayDogCluster.attach(path, KEY_ID, "wrong")
        gc.collect()
