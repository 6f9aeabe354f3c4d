"""The builder against the simulated platform: real HTTP, the real SDK, no processes."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta, timezone
from functools import partial

import pytest
import requests
from yellowdog_client.model import ComputeRequirementStatus

from tests.clusters import SHORT, hurry, make
from tests.controlplane import KEY_ID, SECRET, TEMPLATE, Fault, Served, serve
from yellowdog_ray.errors import (
    BuildError,
    BuildTimeoutError,
    ClusterStateError,
    CredentialsError,
    NameTakenError,
    NotFoundError,
    PlatformError,
    PlatformUnreachableError,
    SpecError,
    StateError,
    TeardownError,
    WaitTimeoutError,
)
from yellowdog_ray.local.scheduler import SchedulerOptions
from yellowdog_ray.raydog import assembly, building, plan, ray_auth, teardown, transport
from yellowdog_ray.raydog.access import SSHAccess
from yellowdog_ray.raydog.builder import RayDogCluster, RayDogClusterProxy
from yellowdog_ray.raydog.platform import Build
from yellowdog_ray.raydog.state import ClusterState


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """Persistent faults are given up on sooner than in the field, and a little later than elsewhere."""
    hurry(monkeypatch)
    monkeypatch.setattr(transport, "RETRY_SECONDS", 0.6)
    monkeypatch.setattr(transport, "FIRST_PAUSE", 0.02)
    monkeypatch.setattr(assembly, "SETTLE_SECONDS", 0.05)
    monkeypatch.setattr(teardown, "VERIFY_SECONDS", 1.0)
    monkeypatch.setattr(teardown, "LATE_SECONDS", 0.3)
    monkeypatch.setattr(teardown, "_CONFIRM_SECONDS", 0.1)


@pytest.fixture
def platform():
    with serve() as served:
        yield served
        assert_nothing_left(served)


def observed(served: Served, **options) -> RayDogCluster:
    return make(
        served,
        enable_observability=True,
        observability_node_compute_requirement_template_id=TEMPLATE.id,
        **options,
    )


def books(served: Served) -> dict[str, list[str]]:
    """What the platform itself says is there, and has not ended."""

    def read() -> dict[str, list[str]]:
        scheduler = served.core.scheduler
        return {
            "work": [work.name for work in scheduler.works.values() if not work.finished],
            "pools": [pool.name for pool in scheduler.pools.values() if not pool.finished],
            "compute": [
                one.usage.name for one in scheduler.requirements.values() if one.status != "TERMINATED"
            ],
        }

    return served.call(read)


def assert_nothing_left(served: Served) -> None:
    assert books(served) == {"work": [], "pools": [], "compute": []}


def group(served: Served, name: str):
    groups = served.core.scheduler.groups.values()
    return next(group for group in groups if group.spec.name == name)


def calls(served: Served, method: str, path: str) -> int:
    return sum(1 for seen in served.faults.seen if seen[0] == method and path in seen[1])


# -- the ordinary course ------------------------------------------------------------------------------


def test_the_whole_life(platform):
    """Build, wait, add, remove by id and by name, save, and shut down, as a script in the field does."""
    cluster = observed(platform, cluster_tag="team")
    assert cluster.add_worker_pool("test/small", None, 2) is None
    cluster.add_worker_pool(TEMPLATE.id, "echo worker", 1, "mine", "ami", "#cloud", {"owner": "me"}, True)
    cluster.add_worker_pool("test/small", None, 1, "forgotten")
    cluster.remove_worker_pool_by_internal_name("forgotten")
    assert cluster.worker_pool_ids == []

    private_ip, public_ip = cluster.build(SHORT)

    assert private_ip == cluster.head_node_private_ip
    assert public_ip is None
    assert cluster.head_node_node_id.startswith("ydid:node:")
    assert cluster.head_node_task_id.startswith("ydid:task:")
    assert cluster.observability_node_private_ip not in (None, private_ip)
    assert cluster.wait_for_workers(timeout=10) == 3
    added = cluster.add_worker_pool("test/small", None, 2)
    assert cluster.worker_pool_internal_names == ["worker-nodes-01", "mine", "worker-nodes-04"]
    assert cluster.get_worker_pool_internal_name_by_id(added) == "worker-nodes-04"
    assert cluster.wait_for_workers(count=5, timeout=timedelta(seconds=10)) == 5
    cluster.remove_worker_pool(added)
    cluster.remove_worker_pool_by_internal_name("mine")
    assert sorted(books(platform)["pools"]) == ["demo-00-head", "demo-01-wrkrs", "demo-observability"]
    assert cluster.wait_for_workers(timeout=10) == 2

    state = json.loads(cluster.save_state_to_json())
    assert state["worker_pool_ids"] == [
        cluster.head_node_worker_pool_id,
        cluster.observability_node_worker_pool_id,
        *cluster.worker_pool_ids,
    ]
    assert cluster._token not in json.dumps(state)
    cluster.shut_down()
    assert_nothing_left(platform)
    cluster.shut_down()


def test_what_the_tasks_get(platform):
    """Scripts, addresses and the token reach the tasks; a pool's tasks are in the group of its own name."""
    cluster = observed(platform, head_node_ray_start_script="echo head")
    cluster.add_worker_pool("test/small", "echo one", 1)
    cluster.add_worker_pool("test/small", "echo two", 2)
    cluster.build(SHORT)
    cluster.wait_for_workers(timeout=10)
    # The agent's view: what was started where.
    started = [effect for effect in platform.backend.applied if type(effect).__name__ == "StartTask"]
    scripts = [effect.task_data for effect in started]
    assert {"echo head", "echo one", "echo two"} < set(scripts)
    assert scripts.count("echo two") == 2
    for effect in started:
        assert effect.environment["RAY_AUTH_TOKEN"] == cluster._token
        assert effect.environment["RAY_AUTH_MODE"] == "token"
        assert effect.environment["OBSERVABILITY_HOST"] == cluster.observability_node_private_ip
        assert list(effect.arguments) == ["taskdata.txt"]
        if effect.task_data == "echo head":
            assert effect.environment["RAYDOG_NODE_IP"] == cluster.head_node_private_ip
            assert "RAY_HEAD_IP" not in effect.environment
        else:
            assert effect.environment["RAY_HEAD_IP"] == cluster.head_node_private_ip
            assert effect.environment["RAY_HEAD_NODE_PRIVATE_IP"] == cluster.head_node_private_ip
    cluster.shut_down()


def test_context_manager(platform):
    """Leaving the block shuts the cluster down, also when it is left by an error."""
    cluster = make(platform)
    with pytest.raises(ZeroDivisionError), cluster:
        1 / cluster.build(SHORT).count("no such address")
    assert_nothing_left(platform)
    with make(platform, "never-built"):
        pass


def test_few_calls(platform):
    """Building costs no call that is not needed: nothing is read twice, and no pool is looked at."""
    cluster = make(platform)
    for _ in range(3):
        cluster.add_worker_pool("test/small", None, 1)
    cluster.build(SHORT)
    assert calls(platform, "GET", "/compute/") == 1
    assert calls(platform, "POST", "/workerPools/provisioned") == 4
    assert calls(platform, "POST", "/work/requirements") == 1
    assert calls(platform, "POST", "/tasks") == 4
    assert calls(platform, "PUT", "") == 0
    cluster.shut_down()


def test_pools_are_provisioned_in_parallel(platform):
    """Eight pools at 0.2 s a call take no longer than a few calls one after the other."""
    platform.faults.latency = 0.2
    cluster = make(platform)
    for _ in range(8):
        cluster.add_worker_pool("test/small", None, 1)
    began = time.monotonic()
    cluster.build(SHORT)
    assert time.monotonic() - began < 2.5  # nine pools one by one: 1.8 s, and as much for their tasks
    platform.faults.latency = 0
    cluster.shut_down()


def test_constructor_and_repr_do_no_io():
    """Making a cluster and forgetting it again calls nobody and warns of nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cluster = RayDogCluster(KEY_ID, SECRET, "demo", "test", "test/small", None, "http://127.0.0.1:1")
        assert "test/demo, not built yet" in repr(cluster)
        assert cluster.work_requirement_id is None
        assert cluster.head_node_private_ip is None
        cluster.shut_down()
        del cluster
        gc.collect()


def test_unclosed_cluster_warns(platform, caplog):
    """A cluster that is dropped while it runs warns with its own name and file, and makes no call."""
    cluster = make(platform)
    cluster.build(SHORT)
    state = cluster.save_state_to_json()
    file = json.loads(state)["state_file"]
    before = len(platform.faults.seen)
    message = "<RayDogCluster test/demo, running> was not shut down"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        del cluster
        gc.collect()
    assert message in [str(warning.message) for warning in caught]
    assert f"{message}, and may go on. To end it: raydog shut-down {file}" in caplog.messages
    assert len(platform.faults.seen) == before
    shut_down_by_proxy(platform, state)


_LEFT_BEHIND = """
import sys
from yellowdog_ray import RayDogCluster
url, key, secret, then = sys.argv[1:]
cluster = RayDogCluster(key, secret, "left", "test", "test/small", None, url)
cluster.build()
exec(then)
"""


@pytest.mark.parametrize(("then", "told"), [("", 1), ("cluster = None", 1), ("cluster.detach()", 0)])
def test_left_behind_by_a_process(platform, state_directory, then, told):
    """Whoever leaves a cluster behind without a word is told so once, with Python's own settings."""
    command = [sys.executable, "-c", _LEFT_BEHIND, platform.url, KEY_ID, SECRET, then]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0
    (file,) = state_directory.glob("*.json")
    assert done.stderr.count("<RayDogCluster test/left, running> was not shut down") == told, done.stderr
    assert done.stderr.count(f"raydog shut-down {file}\n") == told
    shut_down_by_proxy(platform, file.read_text())


def test_a_directory_for_logs_that_cannot_be(platform, tmp_path):
    """That nothing can be kept there is said before anything is created."""
    (tmp_path / "file").write_text("")
    access = SSHAccess("nobody", password="x", ssh_config=False)
    cluster = make(platform, keep_logs=tmp_path / "file" / "kept", access=access)
    with pytest.raises(SpecError, match="keep_logs: nothing can be kept in"):
        cluster.build(SHORT)
    assert platform.faults.seen == []


def test_a_state_file_that_is_a_link(platform, tmp_path):
    """What it leads to is written, locked and removed; the link stays."""
    (tmp_path / "real").mkdir()
    link, real = tmp_path / "link.json", tmp_path / "real" / "x.json"
    link.symlink_to(real)
    for name in ("first", "second"):
        with make(platform, name, state_file=link) as cluster:
            cluster.build(SHORT)
            assert link.is_symlink()
            assert ClusterState.load(real).state_file == str(real)
            other = RayDogCluster.attach(link, KEY_ID, SECRET)
            other.add_worker_pool("test/small", None, 1, "added")
            assert "added" in cluster.status().pools
            other.detach()
        assert link.is_symlink()
        assert list(real.parent.iterdir()) == []
    # Links that go in a circle lead nowhere.
    real.symlink_to(link)
    with pytest.raises(StateError, match="cannot be written"):
        make(platform, "third", state_file=link).build(SHORT)


def test_lifetime(platform):
    """A lifetime is handed to the platform with every pool; a later one gets what is left of it."""
    cluster = make(platform, cluster_lifetime=timedelta(hours=1))
    cluster.build(SHORT)
    cluster.add_worker_pool("test/small", None, 1)
    client = cluster.yd_client.compute_client
    pools = [cluster.head_node_worker_pool_id, *cluster.worker_pool_ids]
    timeouts = []
    for pool_id in pools:
        pool = cluster.yd_client.worker_pool_client.get_worker_pool_by_id(pool_id)
        timeouts.append(client.get_compute_requirement_by_id(pool.computeRequirementId).autoShutdown.timeout)
    assert timeouts[0] == timedelta(hours=1)
    assert timedelta(minutes=59) < timeouts[1] < timedelta(hours=1)
    cluster.shut_down()


# -- what a call is refused for ------------------------------------------------------------------------


def test_wrong_key(platform):
    """A key that the platform does not accept is told before anything is created."""
    cluster = make(platform, yd_application_key_secret="do-not-show")
    with pytest.raises(CredentialsError, match="does not accept the application key") as caught:
        cluster.build(SHORT)
    assert caught.value.status == 401
    assert "do-not-show" not in str(caught.value)
    assert calls(platform, "POST", "") == 0


@pytest.mark.parametrize("template", ["test/none", "ydid:crt:000000:00000000-0000-0000-0000-0000000000ff"])
def test_unknown_template(platform, template):
    """A template that the platform does not know is named before anything is created."""
    cluster = make(platform)
    cluster.add_worker_pool(template, None, 1)
    with pytest.raises(NotFoundError, match=f"no compute requirement template '{template}'"):
        cluster.build(SHORT)
    assert calls(platform, "POST", "") == 0


def test_unknown_template_added_later(platform):
    """The same for a pool of a running cluster, which goes on."""
    with make(platform) as cluster:
        cluster.build(SHORT)
        with pytest.raises(NotFoundError, match="test/none"):
            cluster.add_worker_pool("test/none", None, 1, "mine")
        assert cluster.worker_pool_internal_names == []
        assert cluster.add_worker_pool("test/small", None, 1, "mine") == cluster.worker_pool_ids[0]


def test_nobody_there(monkeypatch):
    """An API that does not answer is said to be unreachable, with its host."""
    monkeypatch.setattr(transport, "RETRY_SECONDS", 0.2)
    cluster = RayDogCluster(KEY_ID, SECRET, "demo", "test", "test/small", None, "http://127.0.0.1:9")
    with pytest.raises(PlatformUnreachableError, match=r"no answer from 127\.0\.0\.1:9"):
        cluster.build(SHORT)


def test_calls_in_the_wrong_state(platform):
    """A call that does not fit the cluster's state is refused in words."""
    cluster = make(platform)
    with pytest.raises(ClusterStateError, match="not built yet"):
        cluster.wait_for_workers()
    with pytest.raises(ClusterStateError, match="no worker pool 'mine'"):
        cluster.remove_worker_pool_by_internal_name("mine")
    cluster.build(SHORT)
    with pytest.raises(ClusterStateError, match="it is running"):
        cluster.build()
    with pytest.raises(ClusterStateError, match="ydid:wrkrpool:0"):
        cluster.remove_worker_pool("ydid:wrkrpool:0")
    with pytest.raises(SpecError, match="count"):
        cluster.wait_for_workers(count=1)
    cluster.shut_down()
    with pytest.raises(ClusterStateError, match="shut down"):
        cluster.add_worker_pool("test/small", None, 1)
    with pytest.raises(ClusterStateError, match="shut down"):
        cluster.build()


def test_name_taken(platform):
    """Another cluster of this name is left alone, and what was created beside it is taken back."""
    with make(platform) as other:
        other.build(SHORT)
        before = books(platform)
        with pytest.raises(NameTakenError, match=r"already is a .* 'demo"):
            make(platform).build(SHORT)
        assert books(platform) == before
        # Even where a call of ours was not answered, what is older than our build is not ours. The
        # platform's clock is known to the second.
        time.sleep(1.1)
        platform.faults.faults = [
            Fault("POST", "/provisioned", 500, 1),
            Fault("POST", "/requirements", "before", 1),
        ]
        with pytest.raises(NameTakenError):
            make(platform).build(SHORT)
        assert books(platform) == before


# -- builds that fail ----------------------------------------------------------------------------------


def with_environment(monkeypatch, role: str, **variables: str) -> None:
    """Let the tasks of a role have more variables, which tell the simulated agent what to do."""
    original = plan.environment

    def changed(of, **others):
        return original(of, **others) | (variables if of == role else {})

    monkeypatch.setattr(plan, "environment", changed)


@pytest.mark.parametrize(("code", "status"), [("3", "FAILED with exit code 3"), ("0", "COMPLETED")])
def test_head_script_fails(platform, monkeypatch, code, status):
    """A head script that ends, for whatever reason, ends the build at once, naming task, code and log."""
    with_environment(monkeypatch, "head", SIMULATED_SECONDS="0.02", SIMULATED_EXIT_CODE=code)
    cluster = make(platform)
    cluster.add_worker_pool("test/small", None, 2)
    began = time.monotonic()
    with pytest.raises(BuildError, match=f"'head-node' .* ended {status}") as caught:
        cluster.build()
    assert time.monotonic() - began < 5
    assert "taskoutput.txt on the node 10.0." in str(caught.value)
    assert_nothing_left(platform)


def test_observability_script_fails(platform, monkeypatch):
    """So does an observability node's."""
    with_environment(monkeypatch, "observability", SIMULATED_EXIT_CODE="1")
    with pytest.raises(BuildError, match=r"'observability-node' .* exit code 1"):
        observed(platform).build(SHORT)


def test_output_in_the_error():
    """Where the platform gives the end of the output, it is in the message."""
    with serve(start_delay=1) as served:
        cluster = make(served)
        with ThreadPoolExecutor(1) as pool:
            building = pool.submit(cluster.build, SHORT)
            while not building.done() and not served.backend._where:
                time.sleep(0.05)
            time.sleep(0.5)
            run = next(iter(served.backend._where))
            served.call(served.backend.exit, run, 9, "first line\nlast words")
            with pytest.raises(BuildError, match=r"(?s)exit code 9: .*last words") as caught:
                building.result()
        assert "taskoutput.txt" not in str(caught.value)
        assert_nothing_left(served)


def test_head_cannot_boot():
    """A head pool that cannot give a node ends the build with the provider's reason."""
    with serve(fail_boot=lambda start: "no capacity in this region") as served:
        with pytest.raises(BuildError, match="no capacity in this region"):
            make(served).build()
        assert_nothing_left(served)


def test_head_pool_is_shut_down_by_somebody():
    """A head pool that somebody shuts down while it boots ends the build with that reason."""
    with serve(boot_delay=30) as served, ThreadPoolExecutor(1) as threads:
        cluster = make(served)
        building = threads.submit(cluster.build)
        while not books(served)["pools"]:
            time.sleep(0.02)
        pool_id = next(iter(served.core.scheduler.pools))
        make(served, "other").yd_client.worker_pool_client.shutdown_worker_pool_by_id(pool_id)
        with pytest.raises(
            BuildError, match=r"demo-00-head gives no more nodes: .*it is (SHUTDOWN|TERMINATED)"
        ):
            building.result(10)
        assert_nothing_left(served)


def test_timeout_while_booting():
    """A build that takes too long is a TimeoutError, is punctual, and leaves nothing running."""
    with serve(boot_delay=60) as served:
        cluster = make(served)
        cluster.add_worker_pool("test/small", None, 3)
        began = time.monotonic()
        with pytest.raises(TimeoutError, match="has not registered") as caught:
            cluster.build(timedelta(seconds=0.5))
        assert isinstance(caught.value, BuildTimeoutError)
        assert time.monotonic() - began < 3
        assert_nothing_left(served)


def test_timeout_while_the_task_starts():
    """The same while the head's task does not start, with the task's state in the message."""
    with serve(start_delay=60) as served:
        with pytest.raises(
            BuildTimeoutError, match=r"the head node's task ydid:task:.* is (ALLOCATED|DOWNLOADING|READY)"
        ):
            make(served).build(timedelta(seconds=1))
        assert_nothing_left(served)


@pytest.mark.parametrize("moment", ["nodes", "tasks"])
def test_interrupt(platform, monkeypatch, moment):
    """Ctrl-C during a build takes everything back before it goes on its way."""
    cluster = make(platform)
    cluster.add_worker_pool("test/small", None, 2)
    monkeypatch.setattr(cluster._platform, moment[:-1] if moment == "tasks" else moment, _interrupt)
    with pytest.raises(KeyboardInterrupt):
        cluster.build(SHORT)
    assert_nothing_left(platform)
    monkeypatch.undo()


def test_second_interrupt(platform, monkeypatch):
    """A second Ctrl-C ends the taking back; shut_down still knows what is there."""
    cluster = make(platform)
    cluster.add_worker_pool("test/small", None, 2)
    monkeypatch.setattr(cluster._platform, "nodes", _interrupt)
    monkeypatch.setattr(building, "take_back", _interrupt)
    with pytest.raises(KeyboardInterrupt):
        cluster.build(SHORT)
    assert "demo-00-head" in books(platform)["pools"]
    cluster.shut_down()
    assert_nothing_left(platform)


def slow_answers(cluster: RayDogCluster, monkeypatch) -> threading.Event:
    """Let the answer to the provisioning of a pool take its time; the event says that it was carried out."""
    client = cluster.yd_client.worker_pool_client
    post, carried_out = client.provision_worker_pool, threading.Event()

    def slow(*request):
        answer = post(*request)
        carried_out.set()
        time.sleep(0.4)
        return answer

    monkeypatch.setattr(client, "provision_worker_pool", slow)
    return carried_out


@pytest.mark.parametrize("by", ["itself", "its state"])
@pytest.mark.parametrize("during", ["build", "add"])
def test_second_interrupt_while_calls_are_under_way(platform, monkeypatch, during, by):
    """What calls create that nobody waits for any more is known nevertheless: it is found by its name."""
    cluster = make(platform)
    if during == "add":
        cluster.build(SHORT)
    carried_out = slow_answers(cluster, monkeypatch)
    result = assembly.Crew.result

    def interrupted(crew, future, what):
        if "template" in what:
            return result(crew, future, what)
        carried_out.wait()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(assembly.Crew, "result", interrupted)
        patch.setattr(assembly.Crew, "stop", _interrupt)
        begin = partial(cluster.add_worker_pool, "test/small", None, 2) if during == "add" else cluster.build
        with pytest.raises(KeyboardInterrupt):
            begin()
    name = "demo-01-wrkrs" if during == "add" else "demo-00-head"
    assert name in books(platform)["pools"]
    state = cluster.save_state_to_json()
    assert name in state
    if by == "its state":
        shut_down_by_proxy(platform, state)
    cluster.shut_down()
    assert_nothing_left(platform)


@pytest.mark.parametrize("thread", ["the same thread", "another thread"])
def test_interrupt_before_anything_is_taken_back(platform, monkeypatch, thread):
    """Where Ctrl-C ends the taking back before it begins, the cluster does not count as being built."""
    cluster = make(platform)
    with monkeypatch.context() as patch:
        patch.setattr(cluster._platform, "nodes", _interrupt)
        patch.setattr(cluster, "_take_back", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            cluster.build(SHORT)
    if thread == "the same thread":
        cluster.shut_down()
    else:
        with ThreadPoolExecutor(1) as threads:
            threads.submit(cluster.shut_down).result()
    assert_nothing_left(platform)


def test_interrupt_as_the_build_ends(platform, monkeypatch):
    """Ctrl-C between the last call and the return takes everything back too."""
    cluster = make(platform)
    monkeypatch.setattr(assembly.Assembly, "check_running", _interrupt)
    with pytest.raises(KeyboardInterrupt):
        cluster.build(SHORT)
    assert "not built yet" in repr(cluster)
    assert_nothing_left(platform)


def test_shut_down_while_another_thread_builds(platform):
    """A cluster that another thread is really building is left to that thread."""
    platform.backend.boot_delay = 1
    cluster = make(platform)
    with ThreadPoolExecutor(1) as threads:
        building = threads.submit(cluster.build, SHORT)
        while not books(platform)["pools"]:
            time.sleep(0.02)
        with pytest.raises(ClusterStateError, match="being built by another thread"):
            cluster.shut_down()
        building.result()
    cluster.shut_down()


def _interrupt(*_args, **_options):
    raise KeyboardInterrupt


@pytest.mark.parametrize("reuse", [True, False])
def test_build_again_after_a_failure(monkeypatch, reuse):
    """A build that failed and left nothing can be repeated, where the platform gives the names again."""
    with serve(SchedulerOptions(reuse_finished_names=reuse)) as served, make(served) as cluster:
        cluster.add_worker_pool("test/small", None, 1)
        with monkeypatch.context() as patch:
            patch.setattr(cluster._platform, "nodes", _interrupt)
            with pytest.raises(KeyboardInterrupt):
                cluster.build(SHORT)
        assert_nothing_left(served)
        if reuse:
            cluster.build(SHORT)
            assert cluster.wait_for_workers(timeout=10) == 1
        else:
            with pytest.raises(NameTakenError, match="Use another cluster_name"):
                cluster.build(SHORT)


@pytest.mark.parametrize("what", [None, 503, "before", "after"])
def test_a_name_is_used_again(what):
    """Where names are free again, a cluster is built anew, and takes nothing of the ended one for its own."""
    with serve(SchedulerOptions(reuse_finished_names=True)) as served:
        for _ in range(2):
            with make(served) as cluster:
                cluster.add_worker_pool("test/small", None, 1)
                if what is not None:
                    served.faults.faults = [Fault("POST", path, what) for path in CREATIONS]
                cluster.build(SHORT)
                assert cluster.wait_for_workers(timeout=10) == 1
            assert_nothing_left(served)
        assert served.call(lambda: len(served.core.scheduler.pools)) == 4


def test_the_advice_where_a_name_stays_taken(platform):
    """Where the names of what has ended are not free, nobody is told to end it."""
    for attempt in range(2):
        with make(platform) as cluster:
            if attempt == 0:
                cluster.build(SHORT)
                continue
            with pytest.raises(NameTakenError, match="has ended, and its name is not free again") as refused:
                cluster.build(SHORT)
            assert "end that one" not in str(refused.value)


# -- faults on the wire --------------------------------------------------------------------------------

CREATIONS = ["/provisioned/template", "/work/requirements", "/taskGroups/.*/tasks"]


@pytest.mark.parametrize("what", [500, 502, 429, "before", "after"])
def test_single_faults_are_survived(platform, what):
    """A transient fault of each creating call costs a moment; what it created nevertheless is adopted."""
    platform.faults.faults = [Fault("POST", path, what) for path in CREATIONS]
    cluster = make(platform)
    cluster.add_worker_pool("test/small", None, 2)
    cluster.build(SHORT)
    assert cluster.wait_for_workers(timeout=10) == 2
    assert len(books(platform)["pools"]) == 2
    assert len(group(platform, "worker-nodes-01").tasks) == 2
    assert len(group(platform, "head-node").tasks) == 1
    assert not any(fault.count for fault in platform.faults.faults)
    cluster.shut_down()


@pytest.mark.parametrize("what", [503, "before", "after"])
def test_faults_while_reading_are_survived(platform, what):
    """Two faults in a row of each reading call are outlived."""
    paths = ["/templates/", "/workerPools/nodes", "/work/tasks/", "/work/requirements/"]
    platform.faults.faults = [Fault("GET", path, what, 2) for path in paths]
    with make(platform) as cluster:
        cluster.add_worker_pool("test/small", None, 1)
        cluster.build(SHORT)
        assert cluster.wait_for_workers(timeout=10) == 1
        assert not any(fault.count for fault in platform.faults.faults)


def unclear(status: int | None) -> Exception:
    if status is None:
        return TypeError("an answer that cannot be decoded")
    if status == 0:
        return requests.exceptions.SSLError("decryption failed")
    response = requests.Response()
    response.status_code = status
    return requests.HTTPError(f"{status}", response=response)


@pytest.mark.parametrize("findable", [True, False])
@pytest.mark.parametrize("status", [None, 0, 524])
def test_unclear_answers(platform, monkeypatch, status, findable):
    """What an answer that is no refusal may have created is looked up, and adopted or ended."""
    cluster = make(platform)
    cluster.add_worker_pool("test/small", None, 1)
    client = cluster.yd_client

    def carry_out(original, *request):
        original(*request)
        raise unclear(status)

    for owner, name in (
        (client.worker_pool_client, "provision_worker_pool"),
        (client.work_client, "add_work_requirement"),
    ):
        monkeypatch.setattr(owner, name, partial(carry_out, getattr(owner, name)))
    if findable:
        cluster.build(SHORT)
        assert cluster.wait_for_workers(timeout=10) == 1
        assert calls(platform, "POST", "/workerPools/provisioned") == 2
        cluster.shut_down()
    else:
        finding, failed = cluster._platform.find_pool, []

        def find(namespace, name, operation):
            if name in failed:
                return finding(namespace, name, operation)
            failed.append(name)
            raise PlatformError("could not look")

        monkeypatch.setattr(cluster._platform, "find_pool", find)
        with pytest.raises(PlatformError, match="could not look"):
            cluster.build(SHORT)
    assert_nothing_left(platform)


def test_two_builds_of_one_name(platform, monkeypatch):
    """Of two builds of one name, the one whose answers are lost does not take the other's for its own."""
    with make(platform) as other:
        other.build(SHORT)
        before = books(platform)
        second = make(platform)
        # As it is where this build began before the other created its pools.
        monkeypatch.setattr(second._platform, "now", lambda: datetime(2000, 1, 1, tzinfo=timezone.utc))
        platform.faults.faults = [
            Fault("POST", "/provisioned", 503, 1),
            Fault("POST", "/work/requirements", 503, 1),
        ]
        with pytest.raises(NameTakenError):
            second.build(SHORT)
        assert books(platform) == before
        assert other.wait_for_workers() == 0


def test_a_build_is_recognised_by_time_where_nothing_is_tagged():
    """A platform that does not give tags back leaves the time of creation to go by."""
    build = Build("f00", datetime(2026, 1, 2, tzinfo=timezone.utc))
    assert build.made("f00", None)
    assert not build.made("bar", datetime(2026, 1, 3, tzinfo=timezone.utc))
    assert build.made(None, datetime(2026, 1, 3, tzinfo=timezone.utc))
    assert not build.made(None, datetime(2026, 1, 1, tzinfo=timezone.utc))
    assert Build("f00").made(None, None)


def test_retry_after_is_respected(platform, monkeypatch):
    """A platform that says when to come again is not asked before."""
    monkeypatch.setattr(transport, "RETRY_SECONDS", 5.0)
    platform.faults.faults = [Fault("POST", "/work/requirements", 429, headers={"Retry-After": "1"})]
    with make(platform) as cluster:
        began = time.monotonic()
        cluster.build(SHORT)
        assert time.monotonic() - began >= 1


@pytest.mark.parametrize("what", [500, "before", "after"])
@pytest.mark.parametrize("path", CREATIONS)
def test_persistent_faults_leave_nothing(platform, path, what):
    """A creating call that keeps failing fails the build, and what was created is taken back."""
    platform.faults.faults = [Fault("POST", path, what, 10**6)]
    cluster = make(platform)
    cluster.add_worker_pool("test/small", None, 2)
    if what == "after":
        # It has been carried out every time: what is there is found and adopted.
        cluster.build(SHORT)
        cluster.shut_down()
    else:
        with pytest.raises(PlatformError, match="could not"):
            cluster.build(SHORT)
    assert_nothing_left(platform)


def test_one_worker_pool_fails(platform):
    """The failure of one of many pools ends the build at once, while the head still boots."""
    platform.backend.boot_delay = 30
    platform.faults.faults = [Fault("POST", "/provisioned/template", 403, 1)]
    cluster = make(platform)
    cluster.add_worker_pool("test/small", None, 1)
    began = time.monotonic()
    with pytest.raises(CredentialsError, match="may not do this"):
        cluster.build()
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("path", ["/provisioned/template", "/taskGroups/.*/tasks"])
def test_failed_addition_is_taken_back(platform, path):
    """A pool that cannot be added is taken back, its name is free again and its number is not."""
    with make(platform) as cluster:
        cluster.build(SHORT)
        platform.faults.faults = [Fault("POST", path, 500, 10**6)]
        with pytest.raises(PlatformError, match="could not"):
            cluster.add_worker_pool("test/small", None, 2, "mine")
        platform.faults.faults = []
        assert books(platform)["pools"] == ["demo-00-head"]
        assert cluster.worker_pool_internal_names == []
        cluster.add_worker_pool("test/small", None, 1, "mine")
        assert books(platform)["pools"] == ["demo-00-head", "demo-02-wrkrs"]
        assert cluster.wait_for_workers(timeout=10) == 1


@pytest.mark.parametrize("by", ["shut_down", "name", "id", "its state"])
def test_addition_that_cannot_be_taken_back(platform, by):
    """What is left of a failed addition is in the state, can be removed, and is shut down with the rest."""
    cluster = make(platform)
    cluster.build(SHORT)
    platform.faults.faults = [
        Fault("POST", "/taskGroups/.*/tasks", 403, 10**6),
        Fault("PUT", "/transition/TERMINATED", 500, 10**6),
        Fault("DELETE", "/workerPools/", 500, 10**6),
    ]
    with pytest.raises(CredentialsError, match=r"(?s)could not all be taken back.*demo-01-wrkrs"):
        cluster.add_worker_pool("test/small", None, 1, "mine")
    platform.faults.faults = []
    assert cluster.worker_pool_internal_names == []
    state = json.loads(cluster.save_state_to_json())
    left = next(pool for pool in state["pools"] if pool["name"] == "demo-01-wrkrs")
    assert "demo-01-wrkrs" in books(platform)["pools"]
    with pytest.raises(SpecError, match="already is a worker pool 'mine'"):
        cluster.add_worker_pool("test/small", None, 1, "mine")
    if by in ("name", "id"):
        if by == "name":
            cluster.remove_worker_pool_by_internal_name("mine")
        else:
            cluster.remove_worker_pool(left["id"])
        assert books(platform)["pools"] == ["demo-00-head"]
        cluster.add_worker_pool("test/small", None, 1, "mine")
    elif by == "its state":
        shut_down_by_proxy(platform, json.dumps(state))
    cluster.shut_down()
    assert_nothing_left(platform)


def test_interrupt_as_an_addition_ends(platform, monkeypatch):
    """Ctrl-C between the last call of an addition and its return, and again while it is taken back."""
    cluster = make(platform)
    cluster.build(SHORT)
    adding = assembly.Assembly.add

    def interrupted(*args):
        adding(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(assembly.Assembly, "add", interrupted)
        patch.setattr(assembly, "take_back", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            cluster.add_worker_pool("test/small", None, 1)
    assert "demo-01-wrkrs" in books(platform)["pools"]
    cluster.shut_down()
    assert_nothing_left(platform)


@pytest.mark.parametrize("what", [500, "before", "after"])
def test_group_is_appended_once(platform, what):
    """A lost answer to the change of the work requirement adds the group neither twice nor not at all."""
    with make(platform) as cluster:
        cluster.build(SHORT)
        platform.faults.faults = [Fault("PUT", "/work/requirements", what)]
        cluster.add_worker_pool("test/small", None, 1)
        names = [group.spec.name for group in platform.core.scheduler.groups.values()]
        assert sorted(names) == ["head-node", "worker-nodes-01"]
        assert cluster.wait_for_workers(timeout=10) == 1


def test_rollback_that_fails_says_so(platform):
    """Where the terminating calls fail too, the error lists what is left, and shut_down goes on with it."""
    platform.faults.faults = [
        Fault("POST", "/taskGroups/", 403, 10**6),
        Fault("PUT", "/transition/TERMINATED", 500, 10**6),
        Fault("DELETE", "/workerPools/", 500, 10**6),
    ]
    cluster = make(platform)
    with pytest.raises(CredentialsError, match=r"(?s)could not all be taken back.*demo-00-head"):
        cluster.build(SHORT)
    assert books(platform)["compute"] == ["demo-00-head"]
    with pytest.raises(ClusterStateError, match="being shut down"):
        cluster.build()
    state = cluster.save_state_to_json()
    assert [pool["name"] for pool in json.loads(state)["pools"]] == ["demo-00-head"]
    # That was cancelled, and is not named any more.
    assert json.loads(state)["work_requirement_id"] is None
    platform.faults.faults = []
    shut_down_by_proxy(platform, state)
    cluster.shut_down()
    assert_nothing_left(platform)


def test_platform_with_another_clock(platform, monkeypatch):
    """What was created is recognised as ours by the platform's own clock, however wrong ours is."""

    class Wrong(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.now(tz) + timedelta(hours=5)

    monkeypatch.setattr(transport, "datetime", Wrong)
    platform.faults.faults = [Fault("POST", "/provisioned/template", "after")]
    with make(platform) as cluster:
        cluster.build(SHORT)
        assert abs(cluster._platform.now() - datetime.now(timezone.utc)) < timedelta(seconds=3)


# -- waiting -------------------------------------------------------------------------------------------


def test_wait_times_out():
    """Workers that do not come in time are counted in the error: have, want, after."""
    with serve() as served, make(served) as cluster:
        cluster.build(SHORT)
        served.backend.boot_delay = 60
        cluster.add_worker_pool("test/small", None, 2, "slow")
        with pytest.raises(
            WaitTimeoutError, match=r"0 of 2 workers are executing after 0\.\d s; still waiting.*slow"
        ):
            cluster.wait_for_workers(timeout=0.3)
        assert cluster.wait_for_workers(count=0) == 0


def test_wait_ends_when_workers_cannot_come(monkeypatch):
    """A worker whose task has ended is not waited for; the error says how it ended."""
    with serve() as served:
        with_environment(monkeypatch, "worker", SIMULATED_EXIT_CODE="5")
        with make(served) as cluster:
            cluster.add_worker_pool("test/small", None, 2)
            cluster.build(SHORT)
            began = time.monotonic()
            with pytest.raises(WaitTimeoutError, match=r"0 of 2 workers .* no more can come: .* exit code 5"):
                cluster.wait_for_workers()
            assert time.monotonic() - began < 5


def test_wait_ends_when_the_pool_cannot_give_nodes():
    """A pool whose instances cannot boot is not waited for."""
    with serve() as served, make(served) as cluster:
        cluster.build(SHORT)
        served.backend.fail_boot = lambda start: "quota exceeded"
        cluster.add_worker_pool("test/small", None, 2)
        with pytest.raises(WaitTimeoutError, match=r"no more can come: .*quota exceeded"):
            cluster.wait_for_workers(timeout=30)


def test_wait_ends_when_the_head_ends():
    """No worker can join a head that has ended; the wait says how it did."""
    with serve() as served, make(served) as cluster:
        cluster.build(SHORT)
        served.backend.boot_delay = 60
        cluster.add_worker_pool("test/small", None, 1)
        run = next(iter(served.backend._where))
        served.call(served.backend.exit, run, 1)
        with pytest.raises(WaitTimeoutError, match=r"the head node's task 'head-node' .* exit code 1"):
            cluster.wait_for_workers(timeout=30)


# -- ending --------------------------------------------------------------------------------------------


def shut_down_by_proxy(served: Served, state: str, **options) -> None:
    proxy = RayDogClusterProxy(KEY_ID, SECRET, **options)
    proxy.load_saved_state_from_json(state)
    proxy.shut_down()
    proxy.shut_down()
    assert_nothing_left(served)


def test_proxy(platform, tmp_path):
    """Another process shuts the cluster down from its file, through the API that the file names."""
    cluster = observed(platform)
    cluster.add_worker_pool("test/small", None, 2)
    cluster.build(SHORT)
    path = tmp_path / "state.json"
    cluster.save_state_to_json_file(str(path))
    shut_down_by_proxy(platform, path.read_text())
    cluster.shut_down()


def test_proxy_with_the_legacy_keys(platform):
    """The five keys of the existing package are enough to end everything."""
    cluster = make(platform)
    cluster.add_worker_pool("test/small", None, 1)
    cluster.build(SHORT)
    state = json.loads(cluster.save_state_to_json())
    keys = ("cluster_name", "cluster_namespace", "cluster_tag", "work_requirement_id", "worker_pool_ids")
    shut_down_by_proxy(
        platform, json.dumps({key: state[key] for key in keys}), yd_platform_api_url=platform.url
    )
    cluster.shut_down()


def test_proxy_when_part_is_gone(platform):
    """A pool that is gone, or was never there, keeps the proxy from nothing."""
    cluster = make(platform)
    cluster.add_worker_pool("test/small", None, 1)
    cluster.build(SHORT)
    state = json.loads(cluster.save_state_to_json())
    cluster.remove_worker_pool(cluster.worker_pool_ids[0])
    state["worker_pool_ids"].insert(0, "ydid:wrkrpool:000000:00000000-0000-0000-0000-00000000dead")
    shut_down_by_proxy(platform, json.dumps(state))
    cluster.shut_down()


def test_proxy_of_a_stranger(platform):
    """A platform that knows nothing at all of the cluster has ended nothing, however often it is asked."""
    with make(platform) as cluster, serve() as other:
        cluster.build(SHORT)
        before = books(platform)
        proxy = RayDogClusterProxy(KEY_ID, SECRET, other.url)
        proxy.load_saved_state_from_json(cluster.save_state_to_json())
        host = other.url.removeprefix("http://")
        for _ in range(2):
            with pytest.raises(StateError, match=f"{host} knows nothing of the cluster test/demo .* API URL"):
                proxy.shut_down()
        assert books(platform) == before


def test_proxy_with_a_wrong_key(platform):
    """A proxy that is not let in says so, and does not take it for success."""
    with make(platform) as cluster:
        cluster.build(SHORT)
        proxy = RayDogClusterProxy(KEY_ID, "wrong")
        proxy.load_saved_state_from_json(cluster.save_state_to_json())
        with pytest.raises(TeardownError, match="does not accept the application key") as caught:
            proxy.shut_down()
        assert len(caught.value.still_running) == 2


def test_shut_down_isolates_its_steps(platform):
    """One pool that cannot be ended keeps no other from it; a second call goes on with that one alone."""
    cluster = make(platform)
    for _ in range(3):
        cluster.add_worker_pool("test/small", None, 1)
    cluster.build(SHORT)
    stuck = cluster.worker_node_worker_pools["worker-nodes-02"]
    platform.faults.faults = [
        Fault("PUT", f"{stuck.compute_requirement_id}/transition", 500, 10**6),
        Fault("DELETE", str(stuck.id), 500, 10**6),
    ]
    with pytest.raises(TeardownError) as caught:
        cluster.shut_down()
    assert caught.value.still_running == [f"worker pool demo-02-wrkrs {stuck.id}"]
    assert books(platform) == {"work": [], "pools": ["demo-02-wrkrs"], "compute": ["demo-02-wrkrs"]}
    platform.faults.faults = []
    platform.faults.seen.clear()
    cluster.shut_down()
    assert calls(platform, "DELETE", "") == 1
    assert_nothing_left(platform)


@pytest.mark.parametrize("what", [500, "before", "after"])
def test_faults_while_shutting_down_are_survived(platform, what):
    """Two faults of each terminating call, and of those that verify it, are outlived."""
    cluster = make(platform)
    cluster.add_worker_pool("test/small", None, 1)
    cluster.build(SHORT)
    platform.faults.faults = [
        Fault("PUT", "/transition/CANCELLING", what, 2),
        Fault("PUT", "/transition/TERMINATED", what, 2),
        Fault("DELETE", "/workerPools/", what, 2),
        Fault("GET", "/", what, 2),
    ]
    cluster.shut_down()
    assert not any(fault.count for fault in platform.faults.faults)
    assert_nothing_left(platform)


def test_the_nodes_go_before_the_tasks(platform, monkeypatch):
    """Removing a pool ends its nodes first, and cancels its tasks for so long as there is time."""
    monkeypatch.setattr(assembly, "CANCEL_SECONDS", 0.5)
    platform.backend.stop_delay = 0
    with make(platform) as cluster:
        cluster.add_worker_pool("test/small", None, 90, "big")
        cluster.build(SHORT)
        cluster.wait_for_workers(timeout=10)
        seen = []

        def slow(task_id, operation):
            seen.append(books(platform)["compute"])
            time.sleep(0.2)

        monkeypatch.setattr(cluster._platform, "cancel_task", slow)
        began = time.monotonic()
        cluster.remove_worker_pool_by_internal_name("big")
        assert time.monotonic() - began < 5
        assert 0 < len(seen) < 90
        assert all(compute == ["demo-00-head"] for compute in seen)


def test_no_pool_has_the_id_none(platform):
    """A pool that is not built yet has no id, so that None is none's."""
    cluster = make(platform)
    cluster.add_worker_pool("test/small", None, 1)
    assert cluster.get_worker_pool_internal_name_by_id(None) is None
    with pytest.raises(ClusterStateError, match="id None"):
        cluster.remove_worker_pool(None)
    assert cluster.worker_pool_internal_names == ["worker-nodes-01"]


@pytest.mark.parametrize("status", ["TERMINATING", "RUNNING"])
def test_instances_that_are_slow_to_go(platform, monkeypatch, caplog, status):
    """Instances that are still terminating when the time is over are told of; others are an error."""
    cluster = make(platform)
    cluster.build(SHORT)
    compute = cluster._platform.compute

    def slow(identifier, operation):
        found = compute(identifier, operation)
        found.status = ComputeRequirementStatus[status]
        return found

    with monkeypatch.context() as patch:
        patch.setattr(cluster._platform, "compute", slow)
        if status == "TERMINATING":
            cluster.shut_down()
            assert "instances of the worker pool demo-00-head" in caplog.text
            assert "still terminating" in caplog.text
        else:
            with pytest.raises(TeardownError, match=r"demo-00-head .* compute requirement is RUNNING"):
                cluster.shut_down()
    cluster.shut_down()


def test_shut_down_within_shut_down(platform, monkeypatch):
    """A signal handler may shut a cluster down that is being shut down already."""
    cluster = make(platform)
    cluster.build(SHORT)
    verify, nested = teardown._verify, []

    def handled(*args):
        if not nested:
            nested.append(True)
            cluster.shut_down()
        return verify(*args)

    monkeypatch.setattr(teardown, "_verify", handled)
    with ThreadPoolExecutor(1) as threads:
        threads.submit(cluster.shut_down).result(20)


@pytest.mark.parametrize("by", ["itself", "its state"])
def test_interrupted_shut_down_says_what_may_run(platform, monkeypatch, caplog, by):
    """Ctrl-C while a cluster is shut down leaves a line that says what may still run, and what to do."""
    cluster = make(platform)
    cluster.build(SHORT)
    proxy = RayDogClusterProxy(KEY_ID, SECRET)
    proxy.load_saved_state_from_json(cluster.save_state_to_json())
    with monkeypatch.context() as patch:
        patch.setattr(teardown, "_verify", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            (cluster if by == "itself" else proxy).shut_down()
    (error,) = [record for record in caplog.records if record.levelname == "ERROR"]
    assert "worker pool demo-00-head" in error.getMessage()
    assert "raydog shut-down" in error.getMessage()
    cluster.shut_down()


def test_any_tag(platform):
    """A tag that the platform takes is not refused by us."""
    with make(platform, cluster_tag="My Team/Tag") as cluster:
        cluster.build(SHORT)
        work = cluster.yd_client.work_client.get_work_requirement_by_id(cluster.work_requirement_id)
        assert work.tag == "My Team/Tag"


def test_somebody_else_was_faster(platform):
    """A cluster that was ended in the portal meanwhile shuts down without an error."""
    cluster = make(platform)
    cluster.build(SHORT)
    client = cluster.yd_client
    client.work_client.cancel_work_requirement_by_id(cluster.work_requirement_id, abort=True)
    pool = client.worker_pool_client.get_worker_pool_by_id(cluster.head_node_worker_pool_id)
    client.worker_pool_client.shutdown_worker_pool_by_id(pool.id)
    client.compute_client.terminate_compute_requirement_by_id(pool.computeRequirementId)
    time.sleep(0.2)
    cluster.shut_down()


# -- threads, and Ray's token --------------------------------------------------------------------------


def test_two_threads_add(platform):
    """Pools that several threads add at once all arrive, each with its own group and tasks."""
    platform.faults.latency = 0.02
    with make(platform) as cluster:
        cluster.build(SHORT)
        gate = threading.Barrier(4)

        def add(count: int) -> str | None:
            gate.wait()
            return cluster.add_worker_pool("test/small", f"echo {count}", count)

        with ThreadPoolExecutor(4) as threads:
            ids = list(threads.map(add, [1, 2, 3, 4]))
        assert len(set(ids)) == 4
        assert set(cluster.worker_pool_ids) == set(ids)
        assert cluster.wait_for_workers(timeout=10) == 10
        for pool in cluster.worker_node_worker_pools.values():
            its = group(platform, pool.plan.group)
            assert len(its.tasks) == pool.plan.node_count
            assert its.spec.task_data == f"echo {pool.plan.node_count}"
        platform.faults.latency = 0


def test_same_name_from_two_threads(platform):
    """Of two threads that add a pool of one name, one gets it and the other an error."""
    with make(platform) as cluster:
        cluster.build(SHORT)

        def add(_number: int) -> str | Exception | None:
            try:
                return cluster.add_worker_pool("test/small", None, 1, "mine")
            except SpecError as error:
                return error

        with ThreadPoolExecutor(2) as threads:
            results = list(threads.map(add, range(2)))
        assert sum(isinstance(result, SpecError) for result in results) == 1
        assert len(cluster.worker_pool_ids) == 1


def test_token_in_this_process(platform):
    """The token is in this process from build to shut-down, and what was there before comes back."""
    os.environ["RAY_AUTH_TOKEN"] = "the user's own"
    one, two = make(platform, "one"), make(platform, "two")
    one.build(SHORT)
    assert os.environ["RAY_AUTH_MODE"] == "token"
    assert os.environ["RAY_AUTH_TOKEN"] == one._token
    two.build(SHORT)
    assert os.environ["RAY_AUTH_TOKEN"] == two._token != one._token
    assert one.use_ray_auth() is True
    assert os.environ["RAY_AUTH_TOKEN"] == one._token
    one.shut_down()
    assert os.environ["RAY_AUTH_TOKEN"] == two._token
    two.shut_down()
    assert os.environ["RAY_AUTH_TOKEN"] == "the user's own"
    assert "RAY_AUTH_MODE" not in os.environ


def test_token_that_somebody_changed_stays(platform):
    """A token that the user has set since is not touched."""
    with make(platform) as cluster:
        cluster.build(SHORT)
        os.environ["RAY_AUTH_TOKEN"] = "changed"
    assert os.environ["RAY_AUTH_TOKEN"] == "changed"


def test_ray_keeps_no_cluster_from_being_ended(platform, monkeypatch):
    """The token is taken back when everything has been ended, and no failure of Ray's gets in the way."""
    seen = []

    def fail(token):
        seen.append(books(platform))
        raise RuntimeError("the head is gone")

    monkeypatch.setattr(ray_auth, "deactivate", fail)
    cluster = make(platform)
    cluster.build(SHORT)
    cluster.shut_down()
    assert seen == [{"work": [], "pools": [], "compute": []}]


def test_ray_keeps_no_cluster_from_being_built(platform, monkeypatch):
    """Where Ray cannot be given the token, the cluster is built nevertheless."""
    monkeypatch.setattr(ray_auth, "activate", lambda token: 1 / 0)
    with make(platform) as cluster:
        assert cluster.build(SHORT)[0] == cluster.head_node_private_ip


def test_the_token_is_not_shown(platform):
    """Nothing that a log or a debugger shows of a cluster has its token in it."""
    with make(platform) as cluster:
        cluster.build(SHORT)
        assert cluster._token not in repr(cluster._assembly)


def test_no_token(platform):
    """With ray_auth off, neither the tasks nor this process get one."""
    with make(platform, ray_auth="off") as cluster:
        cluster.build(SHORT)
        assert "RAY_AUTH_TOKEN" not in os.environ
        assert cluster.use_ray_auth() is False
        started = [effect for effect in platform.backend.applied if type(effect).__name__ == "StartTask"]
        assert all("RAY_AUTH_TOKEN" not in effect.environment for effect in started)


@pytest.mark.ray
def test_token_reaches_a_ray_that_was_imported_before(platform):
    """Ray keeps the token that it found first; a later cluster's is in use nevertheless."""
    raylet = pytest.importorskip("ray._raylet")
    loader = raylet.AuthenticationTokenLoader.instance()
    for name in ("one", "two"):
        with make(platform, name) as cluster:
            cluster.build(SHORT)
            assert loader.get_token_for_http_header()["authorization"] == f"Bearer {cluster._token}"
    assert "ray" in sys.modules
    assert not loader.has_token()
