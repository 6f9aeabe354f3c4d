"""Waiting for workers that Ray is asked for: on the simulated platform, with a stand-in for a head's Ray."""

from __future__ import annotations

import socket
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError

import pytest

from tests.clusters import SHORT, end_leaving, eventually, lose_machine, make
from yellowdog_ray import SSHAccess
from yellowdog_ray.errors import SpecError, TunnelError, WaitTimeoutError
from yellowdog_ray.raydog import waiting
from yellowdog_ray.raydog.reach import RayNode

GROUP = "worker-nodes-01"

pytestmark = pytest.mark.usefixtures("hurried")


class Ray:
    """What a head's Ray says of its nodes: addresses, which are never taken off by themselves."""

    def __init__(self) -> None:
        self.addresses: list[str] = []
        self.error: Exception | None = None

    def ray_nodes(self) -> list[RayNode]:
        if self.error is not None:
            raise self.error
        workers = [RayNode(f"{number:04x}", one, True, False) for number, one in enumerate(self.addresses)]
        gone = RayNode("dead", "10.9.9.9", False, False)
        return [RayNode("head", "10.0.0.1", True, True), gone, *workers]

    def close(self) -> None:
        pass


@pytest.fixture
def cluster(platform):
    """A running cluster without workers, of which a stand-in tells what its Ray says."""
    with make(platform, access="direct") as cluster:
        cluster.build(SHORT)
        cluster._reach = Ray()
        yield cluster


@pytest.fixture
def ray(cluster) -> Ray:
    return cluster._reach


def addresses(platform, *names: str) -> list[str]:
    """The addresses of the nodes at which the tasks of some groups execute."""
    return platform.call(
        lambda: [
            task.worker.node.instance.private_ip
            for task in platform.core.scheduler.tasks.values()
            if task.status == "EXECUTING" and task.worker is not None and task.group.spec.name in names
        ]
    )


def add(platform, cluster, count: int, group: str = GROUP) -> list[str]:
    """Add a pool and tell the addresses of its nodes when their tasks execute."""
    cluster.add_worker_pool("test/small", None, count)
    eventually(lambda: len(addresses(platform, group)) == count)
    return addresses(platform, group)


def test_ray_counts(platform, cluster, ray):
    """Nodes that execute count when Ray says that they have joined."""
    there = add(platform, cluster, 2)
    with pytest.raises(WaitTimeoutError, match=r"0 of 2 workers are alive in Ray after .* has not joined"):
        cluster.wait_for_workers(timeout=0.3)
    ray.addresses = there[:1]
    assert cluster.wait_for_workers(1, timeout=5) == 1
    ray.addresses = there
    count = cluster.wait_for_workers(timeout=5)
    assert (count, count.source) == (2, "ray")


@pytest.mark.parametrize("timeout", [float("nan"), float("inf"), 1e300, 0, -1, "1", True])
def test_a_time_that_cannot_be_waited_for(cluster, timeout):
    """It is refused by name."""
    with pytest.raises(SpecError, match="timeout: "):
        cluster.wait_for_workers(timeout=timeout)


@pytest.mark.parametrize("error", [None, FutureTimeoutError("late"), TimeoutError("late")])
def test_an_answer_at_the_last_moment(platform, cluster, ray, monkeypatch, error):
    """It counts, although the time for it was over just before; an error is one of the head's."""

    class Late(Future):
        def result(self, timeout=None):
            found = super().exception(10)
            if timeout is not None:
                raise FutureTimeoutError
            if found is not None:
                raise found
            return super().result()

    ray.addresses = add(platform, cluster, 1)
    ray.error = error
    monkeypatch.setattr(waiting, "Future", Late)
    if error is None:
        assert cluster.wait_for_workers(timeout=5) == 1
    else:
        with pytest.raises(WaitTimeoutError, match=r"cannot be asked .*\(late\)"):
            cluster.wait_for_workers(timeout=0.3)


def test_nodes_of_a_removed_pool_do_not_count(platform, cluster, ray):
    """Ray lists a node that is gone for a while; it is none of those that are waited for."""
    ray.addresses = add(platform, cluster, 1)
    assert cluster.wait_for_workers(timeout=5) == 1
    cluster.remove_worker_pool_by_internal_name(GROUP)
    platform.backend.boot_delay = 0.3
    cluster.add_worker_pool("test/small", None, 1)
    # Neither while the other one boots, nor when its task executes.
    with pytest.raises(WaitTimeoutError, match="0 of 1 workers are alive in Ray"):
        cluster.wait_for_workers(timeout=1)
    assert len(addresses(platform, "worker-nodes-02")) == 1
    ray.addresses += addresses(platform, "worker-nodes-02")
    assert cluster.wait_for_workers(timeout=5) == 1


def test_a_machine_that_was_replaced_counts_when_it_has_joined(platform, cluster, ray):
    """The one that was lost is still on Ray's list when the other one's task executes."""
    ray.addresses = add(platform, cluster, 2)
    lose_machine(platform, GROUP, task=f"{GROUP}-00001")
    eventually(lambda: len(addresses(platform, GROUP)) == 2)
    new = sorted(set(addresses(platform, GROUP)) - set(ray.addresses))
    assert len(new) == 1
    with ThreadPoolExecutor(1) as threads:
        wait = threads.submit(cluster.wait_for_workers, timeout=10)
        time.sleep(0.5)
        assert not wait.done()
        ray.addresses += new
        assert wait.result(10) == 2


def test_a_machine_on_its_way_out_does_not_count(platform, cluster, ray):
    """After a pool was scaled down and up again, who joins is waited for, and who leaves does not count."""
    ray.addresses = add(platform, cluster, 2)
    platform.backend.stop_delay = 30.0
    cluster.scale_worker_pool(GROUP, 1)
    cluster.scale_worker_pool(GROUP, 2)
    eventually(lambda: len(addresses(platform, GROUP)) == 3)
    with ThreadPoolExecutor(1) as threads:
        wait = threads.submit(cluster.wait_for_workers, timeout=10)
        time.sleep(0.3)
        assert not wait.done()
        ray.addresses += set(addresses(platform, GROUP)) - set(ray.addresses)
        assert wait.result(10) == 2
        assert len(addresses(platform, GROUP)) == 3
    end_leaving(platform)


def test_workers_at_other_addresses(platform, cluster, ray, monkeypatch):
    """Where Ray knows the workers by other addresses, they count when those cannot be dead machines."""
    monkeypatch.setattr(waiting, "_STALE", 0.5)
    add(platform, cluster, 2)
    ray.addresses = ["192.168.7.1", "192.168.7.2", "192.168.7.3"]
    began = time.monotonic()
    # No more than execute.
    assert cluster.wait_for_workers(timeout=10) == 2
    assert 0.5 < time.monotonic() - began < 3


def test_few_calls_while_ray_is_behind(platform, cluster, ray):
    """The nodes are listed again when something has changed, and not with every look."""
    there = add(platform, cluster, 1)
    ray.addresses = ["192.168.7.1"]
    seen = len(platform.faults.seen)
    with pytest.raises(WaitTimeoutError):
        cluster.wait_for_workers(timeout=0.5)
    assert sum("/nodes" in str(call) for call in platform.faults.seen[seen:]) == 1
    ray.addresses = there
    assert cluster.wait_for_workers(timeout=5) == 1


# -- Ray cannot be asked -------------------------------------------------------------------------------


def test_why_ray_cannot_be_asked(platform, cluster, ray, monkeypatch, caplog):
    """What is in the way is in the error, and once in the log when it lasts."""
    monkeypatch.setattr(waiting, "_SAY_SILENCE", 0.2)
    ray.error = TunnelError("the head at 10.0.0.1 does not let the user 'nobody' in.")
    add(platform, cluster, 2)
    with pytest.raises(WaitTimeoutError) as caught:
        cluster.wait_for_workers(timeout=0.6)
    assert "2 of 2 workers are executing after 0." in str(caught.value)
    assert "cannot be asked" in str(caught.value)
    assert "does not let the user 'nobody' in)" in str(caught.value)
    assert "get_logs" not in str(caught.value)
    said = [record for record in caplog.records if "does not let" in record.message]
    assert [record.levelname for record in said] == ["WARNING"]
    # What is over is not said any more.
    ray.error = None
    with pytest.raises(WaitTimeoutError, match="0 of 2 workers are alive in Ray"):
        cluster.wait_for_workers(timeout=0.2)


@pytest.mark.parametrize("answer", ["refused", "silent"])
def test_a_head_that_cannot_be_logged_in_to(platform, answer):
    """The wait keeps its time whatever the head's SSH server does, and says what that was."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        if answer == "silent":
            listener.listen()
        port = listener.getsockname()[1]
        with make(platform, access=SSHAccess("nobody", password="x", port=port, ssh_config=False)) as cluster:
            cluster.add_worker_pool("test/small", None, 1)
            cluster.build(SHORT)
            cluster._assembly.head.private_ip = "127.0.0.1"
            eventually(lambda: cluster.status().executing_workers == 1)
            began = time.monotonic()
            said = "Connection refused" if answer == "refused" else "has not answered within 1.5 s"
            with pytest.raises(
                WaitTimeoutError, match=f"1 of 1 workers are executing .* cannot be asked.*{said}"
            ):
                cluster.wait_for_workers(timeout=1.5)
            assert time.monotonic() - began < 3


def test_no_thread_is_left(platform, cluster, ray):
    """Every question of a wait with a limit has a thread of its own, which ends with the answer."""
    ray.addresses = add(platform, cluster, 1)
    assert cluster.wait_for_workers(timeout=5) == 1
    eventually(lambda: not any(thread.name == "raydog-ask-ray" for thread in threading.enumerate()))
