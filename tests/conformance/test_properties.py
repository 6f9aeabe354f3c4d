"""Whatever is done to a cluster, in whatever order: checked against a model, on the simulated platform."""

from __future__ import annotations

import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tests.clusters import (
    SHORT,
    attach,
    eventually,
    executing,
    hurry,
    let_exit,
    lose_machine,
    make,
    nodes,
    pools,
    tasks,
)
from tests.controlplane import KEY_ID, SECRET, Fault, serve
from yellowdog_ray.errors import (
    BuildError,
    ClusterStateError,
    PlatformError,
    SpecError,
    TeardownError,
    WaitTimeoutError,
)
from yellowdog_ray.local.scheduler import SchedulerOptions
from yellowdog_ray.raydog import assembly, teardown, transport, watch
from yellowdog_ray.raydog.builder import RayDogCluster, RayDogClusterProxy
from yellowdog_ray.raydog.state import ClusterState

HEAD = "demo-00-head"
CREATING = ["/workerPools/provisioned", "/work/requirements", "/taskGroups/"]
NAMES = [None, None, None, "red", "blue", "worker-nodes-02"]


@dataclass
class Pool:
    """What a pool should be.

    :param wanted: how many nodes it was asked to have.
    :param alive: how many of them have a task that has not ended.
    :param spare: how many nodes it may have beyond those, of tasks that have ended.
    """

    number: int
    wanted: int
    alive: int
    spare: int = 0

    @property
    def name(self) -> str:
        return f"demo-{self.number:02d}-wrkrs"

    @property
    def group(self) -> str:
        return f"worker-nodes-{self.number:02d}"


class Life(RuleBasedStateMachine):
    """A cluster, another handle of it, and what both should have made of the platform."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = pytest.MonkeyPatch()
        hurry(self.patches)
        self.patches.setattr(transport, "RETRY_SECONDS", 0.05)
        self.patches.setattr(transport, "FIRST_PAUSE", 0.003)
        self.patches.setattr(teardown, "LATE_SECONDS", 0.05)
        self.patches.setattr(assembly._Checks, "due", lambda checks: True)
        self.patches.setattr(watch, "SECONDS", 3600.0)
        self.directory = Path(tempfile.mkdtemp(prefix="raydog-properties-"))
        self.patches.setenv("RAYDOG_STATE_DIR", str(self.directory))
        self.path = self.directory / "demo.json"
        self.platform = serve(
            SchedulerOptions(reuse_finished_names=True),
            boot_delay=0.003,
            start_delay=0.001,
            # As long as some steps, so that what is on its way out is met by the next one.
            stop_delay=0.01,
        ).start()
        self.cluster = make(self.platform, state_file=self.path)
        self.other: RayDogCluster | None = None
        self.phase = "new"
        self.pools: dict[str, Pool] = {}
        self.counted = 0
        self.steps = 0

    def teardown(self) -> None:
        try:
            self.platform.faults.clear()
            if self.phase == "running":
                self.cluster.shut_down()
                self._ended()
        finally:
            # Nothing is to be said of a cluster that a failed example has left.
            self.cluster._attached = True
            self.platform.close()
            self.patches.undo()
            shutil.rmtree(self.directory)

    def _handle(self, by_other: bool) -> RayDogCluster:
        return self.other if by_other and self.other is not None else self.cluster

    def _draw(self, data, alive: bool = False) -> str:
        names = [name for name, pool in self.pools.items() if pool.alive or not alive]
        return data.draw(st.sampled_from(names))

    # -- what can be done --------------------------------------------------------------------------------

    @initialize(counts=st.lists(st.integers(1, 3), max_size=2), built=st.sampled_from([True] * 3 + [False]))
    def begin(self, counts: list[int], built: bool) -> None:
        for count in counts:
            self.add(count, None, False, None)
        if built:
            self.build(None)

    @rule(
        count=st.integers(1, 3),
        name=st.sampled_from(NAMES),
        by_other=st.booleans(),
        fault=st.sampled_from([None, None, None, *CREATING]),
    )
    def add(self, count: int, name: str | None, by_other: bool, fault: str | None) -> None:
        handle = self._handle(by_other)
        if self.phase == "ended":
            with pytest.raises(ClusterStateError, match="shut down"):
                handle.add_worker_pool("test/small", None, count, name)
            return
        number = self.counted + 1
        while name is None and f"worker-nodes-{number:02d}" in self.pools:
            number += 1
        key = name or f"worker-nodes-{number:02d}"
        if key in self.pools:
            with pytest.raises(SpecError, match="already is a worker pool"):
                handle.add_worker_pool("test/small", None, count, name)
            return
        self.counted = number
        if self.phase == "running" and fault is not None:
            method = "PUT" if fault == "/work/requirements" else "POST"
            self.platform.faults.faults = [Fault(method, fault, 500, None)]
            with pytest.raises(PlatformError, match="could not"):
                handle.add_worker_pool("test/small", None, count, name)
            assert self.platform.faults.faults[0].hits
            self.platform.faults.clear()
            return
        found = handle.add_worker_pool("test/small", None, count, name)
        self.pools[key] = pool = Pool(number, count, count)
        if self.phase == "running":
            assert handle.worker_node_worker_pools[key].plan.name == pool.name
            assert handle.get_worker_pool_internal_name_by_id(found) == key
        else:
            assert found is None

    @precondition(lambda self: self.phase == "new")
    @rule(fault=st.sampled_from([None, None, "no head", *CREATING]))
    def build(self, fault: str | None) -> None:
        if fault is not None:
            if fault == "no head":
                self.platform.backend.fail_boot = lambda start: (
                    "no capacity" if start.hostname.startswith(HEAD) else None
                )
            else:
                self.platform.faults.faults = [Fault("POST", fault, 500, None)]
            # After a build that failed earlier, something that has ended may stand under the name.
            with pytest.raises((PlatformError, BuildError), match=r"could not|no capacity"):
                self.cluster.build(SHORT)
            self.platform.faults.clear()
            self.platform.backend.fail_boot = None
            assert self.platform.running() == []
            assert "not built yet" in repr(self.cluster)
            return
        self.cluster.build(SHORT)
        self.phase = "running"
        with pytest.raises(ClusterStateError, match="cannot be built"):
            self.cluster.build(SHORT)

    @precondition(lambda self: self.pools and self.phase != "ended")
    @rule(data=st.data(), by_other=st.booleans(), by_id=st.booleans())
    def remove(self, data, by_other: bool, by_id: bool) -> None:
        handle = self._handle(by_other)
        key = self._draw(data)
        if by_id and self.phase == "running":
            assert handle.status().pools[key].id
            handle.remove_worker_pool(handle.worker_node_worker_pools[key].id)
        else:
            handle.remove_worker_pool_by_internal_name(key)
        del self.pools[key]
        with pytest.raises(ClusterStateError, match="no worker pool"):
            self.cluster.remove_worker_pool_by_internal_name(key)

    @precondition(lambda self: self.pools and self.phase != "ended")
    @rule(
        data=st.data(),
        count=st.sampled_from([None, None, 0, 1, 2, 3, 4]),
        before=st.sampled_from([None, None, 0, 1, 4]),
        by_other=st.booleans(),
        fault=st.booleans(),
    )
    def scale(self, data, count: int | None, before: int | None, by_other: bool, fault: bool) -> None:
        handle = self._handle(by_other)
        key = self._draw(data)
        pool = self.pools[key]
        if count is None:
            # Those whose tasks have ended are given up.
            count = pool.alive
        if self.phase == "new":
            pool.wanted = pool.alive = max(1, count)
            self.cluster.scale_worker_pool(key, pool.wanted)
            return
        if before is not None:
            # Another number, and the next one soon after it.
            self._handle(not by_other).scale_worker_pool(key, before)
            pool.spare = max(0, pool.alive + pool.spare - before)
            pool.wanted = pool.alive = before
        if fault and count > pool.alive:
            self.platform.faults.faults = [Fault("POST", "/taskGroups/", 500, None)]
            with pytest.raises(PlatformError, match="could not"):
                handle.scale_worker_pool(key, count)
            assert self.platform.faults.faults[0].hits
            self.platform.faults.clear()
            # Where what had been added was still booting, it is given back when it has been idle.
            pool.spare = max(pool.spare, count - pool.alive)
            return
        handle.scale_worker_pool(key, count)
        pool.wanted = pool.alive = count
        # While nodes boot, the platform takes no other number: the idle ones go later.
        pool.spare = 0 if before is None else max(0, before - count)

    @precondition(lambda self: self.phase == "running" and any(pool.alive for pool in self.pools.values()))
    @rule(data=st.data())
    def lose(self, data) -> None:
        pool = self.pools[self._draw(data, alive=True)]
        before = tasks(self.platform, pool.group, "EXECUTING")
        lost = data.draw(st.sampled_from(before))
        lose_machine(self.platform, pool.group, task=lost)
        # By the platform alone, with the same task.
        eventually(lambda: tasks(self.platform, pool.group, "EXECUTING") == before)

    @precondition(lambda self: self.phase == "running" and any(pool.alive for pool in self.pools.values()))
    @rule(data=st.data())
    def fail(self, data) -> None:
        pool = self.pools[self._draw(data, alive=True)]
        failed = data.draw(st.sampled_from(tasks(self.platform, pool.group, "EXECUTING")))
        let_exit(self.platform, pool.group, 1, task=failed)
        pool.alive -= 1
        pool.spare += 1

    @precondition(lambda self: self.phase == "running")
    @rule(snapshot=st.booleans())
    def attach(self, snapshot: bool) -> None:
        if snapshot:
            saved = self.directory / "snapshot"
            self.cluster.save_state_to_json_file(saved)
            self.other = attach(saved)
            saved.unlink()
        else:
            self.other = attach(self.path)

    @precondition(lambda self: self.phase == "running" and self.steps > 6)
    @rule(by=st.sampled_from(["itself", "other", "proxy of the file", "proxy of a snapshot"]))
    def shut_down(self, by: str) -> None:
        if by == "itself" or (by == "other" and self.other is None):
            self.cluster.shut_down()
        elif by == "other":
            self.other.shut_down()
        else:
            proxy = RayDogClusterProxy(KEY_ID, SECRET)
            if by.endswith("file"):
                proxy.load_saved_state_from_json_file(self.path)
            else:
                proxy.load_saved_state_from_json(self.cluster.save_state_to_json())
            proxy.shut_down()
        self._ended()

    @precondition(lambda self: self.phase == "running" and self.pools and self.steps > 6)
    @rule(data=st.data())
    def shut_down_in_two_steps(self, data) -> None:
        pool = self.pools[self._draw(data)]
        self.platform.faults.faults = [
            Fault("PUT", "/transition/TERMINATED", 403, None),
            Fault("DELETE", "/workerPools/", 403, None),
        ]
        with self.patches.context() as patch:
            patch.setattr(teardown, "VERIFY_SECONDS", 0.1)
            with pytest.raises(TeardownError) as caught:
                self.cluster.shut_down()
        self.platform.faults.clear()
        assert any(pool.name in left for left in caught.value.still_running)
        assert pool.name in [left.name for left in ClusterState.load(self.path).pools]
        self.cluster.shut_down()
        self._ended()

    def _ended(self) -> None:
        assert self.platform.running() == []
        assert list(self.directory.glob("*.json")) == []
        for handle in (self.cluster, self.other):
            if handle is not None:
                handle.shut_down()
        assert self.platform.running() == []
        assert list(self.directory.glob("*.json")) == []
        self.pools = {}
        self.phase = "ended"

    # -- what is always so -------------------------------------------------------------------------------

    @invariant()
    def nothing_is_lost_and_nothing_left(self) -> None:
        self.steps += 1
        if self.phase != "running":
            assert self.platform.running() == []
            return
        names = sorted([HEAD, *(pool.name for pool in self.pools.values())])
        assert pools(self.platform) == names
        state = ClusterState.load(self.path)
        assert sorted(pool.name for pool in state.pools) == names
        assert state.status == "running"
        there = self.platform.call(
            lambda: {
                pool.name: pool.id
                for pool in self.platform.core.scheduler.pools.values()
                if not pool.finished
            }
        )
        assert {pool.name: pool.id for pool in state.pools} == there
        assert {pool.internal_name for pool in state.pools if pool.role == "worker"} == set(self.pools)
        assert sorted(state.worker_pool_ids) == sorted(there.values())
        # No number is given away twice.
        assert state.worker_pools_counted == self.counted

    @invariant()
    def everybody_is_where_they_belong(self) -> None:
        if self.phase != "running":
            return
        wanted = {(pool.group, pool.name): pool.alive for pool in self.pools.values() if pool.alive}
        wanted["head-node", HEAD] = 1
        eventually(lambda: executing(self.platform) == wanted)
        for (group, tag), _ in executing(self.platform).items():
            number = re.search(r"worker-nodes-(\d+)", group)
            assert tag == (HEAD if number is None else f"demo-{number[1]}-wrkrs")
        eventually(lambda: not self._booting())
        for pool in self.pools.values():
            most = pool.alive + pool.spare
            eventually(lambda pool=pool, most=most: pool.alive <= nodes(self.platform, pool.name) <= most)
            names = tasks(self.platform, pool.group)
            assert len(set(names)) == len(names)

    def _booting(self) -> int:
        scheduler = self.platform.core.scheduler
        return self.platform.call(lambda: sum(one.pending for one in scheduler.requirements.values()))

    @invariant()
    def every_handle_tells_the_same(self) -> None:
        if self.phase != "running":
            return
        total = sum(pool.wanted for pool in self.pools.values())
        complete = all(pool.alive == pool.wanted for pool in self.pools.values())
        for handle in (self.cluster, self.other):
            if handle is None:
                continue
            if complete:
                assert handle.wait_for_workers(timeout=10) == total
            else:
                with pytest.raises(WaitTimeoutError, match="no more can come"):
                    handle.wait_for_workers(timeout=10)
            status = handle.status()
            assert {name: pool.wanted for name, pool in status.pools.items() if pool.role == "worker"} == {
                name: pool.wanted for name, pool in self.pools.items()
            }
            assert status.executing_workers == sum(pool.alive for pool in self.pools.values())
            assert set(handle.worker_pool_internal_names) == set(self.pools)


def test_any_life_of_a_cluster():
    """Groups are never mixed up, nothing is leaked, and the state can always be loaded and is right."""
    run_state_machine_as_test(
        Life,
        settings=settings(
            max_examples=30,
            stateful_step_count=15,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
