"""How RayDog fares where something goes wrong: faults of calls, a killed process, a pool that is gone.

Every case has a local control plane of its own, which runs no nodes, and whose own books say what is left.
:mod:`build_overhead` prints the figures.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from yellowdog_ray import RayDogCluster, RayDogClusterProxy
from yellowdog_ray.errors import RayDogError
from yellowdog_ray.local import LocalControlPlane
from yellowdog_ray.local.faults import Fault

BOOT, START, LATENCY = 0.4, 0.2, 0.05
KINDS: dict[str, dict[str, Any]] = {
    "500": {"what": 500},
    "502, carried out": {"what": 502, "carried_out": True},
    "429": {"what": 429},
    "dropped before": {"what": "before"},
    "dropped after": {"what": "after"},
}
CALLS = {
    "provision a pool": ("POST", r"^/workerPools/provisioned/template$"),
    "add the work requirement": ("POST", r"^/work/requirements$"),
    "list the nodes": ("GET", r"^/workerPools/nodes$"),
    "add tasks": ("POST", r"^/work/taskGroups/[^/]+/tasks$"),
}
CASES = [(kind, call) for kind in KINDS for call in CALLS]
KILLS = 12
# How much longer than without it a build may take that survives a single fault.
SINGLE_SECONDS = 5.0


@contextlib.contextmanager
def cluster_on(platform: LocalControlPlane, name: str = "faulty") -> Iterator[RayDogCluster]:
    """Make a cluster of two pools that is ready to be built."""
    template = platform.template_names[0]
    cluster = RayDogCluster(
        platform.key_id, platform.secret, name, "local", template, None, platform.url, progress=False
    )
    for _ in range(2):
        cluster.add_worker_pool(template, None, 2)
    assert cluster.yd_client is not None
    try:
        yield cluster
    finally:
        cluster.detach()


def plane() -> LocalControlPlane:
    return LocalControlPlane(boot_delay=BOOT, start_delay=START, stop_delay=0, latency=LATENCY)


def single(case: tuple[str, str]) -> float | None:
    """Let one call go wrong once.

    :returns: how long the build took; None where it did not survive, or something was left after its end.
    """
    kind, call = case
    with plane() as platform, cluster_on(platform) as cluster:
        fault = Fault(*CALLS[call], **KINDS[kind])
        platform.faults.faults = [fault]
        began = time.perf_counter()
        try:
            cluster.build()
            seconds = time.perf_counter() - began
            cluster.shut_down()
        except RayDogError:
            return None
        if not fault.hits:
            raise RuntimeError(f"no call was made to {call}")
        return None if platform.running() else seconds


def persistent(case: tuple[str, str]) -> list[str]:
    """Let every call of a kind go wrong until the build is over; return what it leaves running."""
    kind, call = case
    with plane() as platform, cluster_on(platform) as cluster:
        fault = Fault(*CALLS[call], count=None, **KINDS[kind])
        platform.faults.faults = [fault]
        try:
            cluster.build()
        except RayDogError:
            return platform.running()
        finally:
            if not fault.hits:
                raise RuntimeError(f"no call was made to {call}")
        cluster.shut_down()
        return platform.running()


def build_and_be_killed() -> None:
    """Build a cluster, in a process that somebody else ends."""
    about = json.loads(sys.stdin.readline())
    cluster = RayDogCluster(*about, progress=False)
    for _ in range(2):
        cluster.add_worker_pool(about[4], None, 2)
    assert cluster.yd_client is not None
    print("ready", flush=True)
    cluster.build()
    print("built", flush=True)
    sys.stdin.read()


def killed(part: float) -> list[str]:
    """Kill a build after a part of its time, end it from what is on the disk; return what is left."""
    with plane() as platform, tempfile.TemporaryDirectory() as states:
        about = [platform.key_id, platform.secret, "killed", "local", platform.template_names[0]]
        child = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "RAYDOG_STATE_DIR": states},
        )
        with child:
            assert child.stdin is not None
            assert child.stdout is not None
            child.stdin.write(json.dumps([*about, None, platform.url]) + "\n")
            child.stdin.flush()
            if child.stdout.readline() != "ready\n":
                raise RuntimeError("the process that builds has not started")
            time.sleep(part * (BOOT + START + 0.5))
            child.kill()
        for file in Path(states).glob("*.json"):
            proxy = RayDogClusterProxy(platform.key_id, platform.secret)
            proxy.load_saved_state_from_json_file(file)
            proxy.shut_down()
        # What was under way when it was killed has been carried out by now.
        time.sleep(4 * LATENCY)
        return platform.running()


def pool_gone() -> list[str]:
    """End a cluster from a state with a pool that is gone, and one that never was; return what is left."""
    with plane() as platform, cluster_on(platform) as cluster:
        cluster.build()
        state = json.loads(cluster.save_state_to_json())
        cluster.remove_worker_pool_by_internal_name("worker-nodes-01")
        state["worker_pool_ids"].insert(0, "ydid:wrkrpool:000000:00000000-0000-0000-0000-000000000000")
        # As on another machine than the one that has the cluster's own state file.
        state["state_file"] = None
        proxy = RayDogClusterProxy(platform.key_id, platform.secret)
        proxy.load_saved_state_from_json(json.dumps(state))
        proxy.shut_down()
        return platform.running()


class Row(NamedTuple):
    """A line of the table: what is measured, the figure, what it has to be, and another package's."""

    what: str
    figure: str
    wanted: str
    other: str
    good: bool


def rows() -> Iterator[Row]:
    """Measure all of it, which takes some two minutes."""
    with plane() as platform, cluster_on(platform) as cluster:
        began = time.perf_counter()
        cluster.build()
        usual = time.perf_counter() - began
        cluster.shut_down()
    with ThreadPoolExecutor(4) as threads:
        took = list(threads.map(single, CASES))
    late = max((seconds - usual for seconds in took if seconds is not None), default=0.0)
    survived = sum(seconds is not None and seconds - usual <= SINGLE_SECONDS for seconds in took)
    of = len(CASES)
    figure = f"{survived} of {of}, {late:.1f} s later at most"
    wanted = f"all, {SINGLE_SECONDS:.0f} s"
    yield Row("single faults survived", figure, wanted, "11 of 20", survived == of)
    # They take half a minute each, most of it waiting.
    with ThreadPoolExecutor(of) as threads:
        left = sum(map(bool, threads.map(persistent, CASES)))
    yield Row("persistent faults that leave something", f"{left} of {of}", "0", "17 of 20", left == 0)
    with ThreadPoolExecutor(2) as threads:
        ended = sum(not left for left in threads.map(killed, [number / KILLS for number in range(KILLS)]))
    figure = f"{ended} of {KILLS} instants"
    yield Row("killed while building, then ended", figure, "all", "0 of 12", ended == KILLS)
    gone = [what for what in pool_gone() if what.startswith("pool")]
    yield Row("pools left where one of a state is gone", str(len(gone)), "0", "all", not gone)


if __name__ == "__main__":
    build_and_be_killed()
