"""kill -9 at any instant: from the state file, another process finds everything and ends it."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.controlplane import KEY_ID, SECRET, Fault, Served, serve
from tests.processes import IMPATIENT, Child, arguments
from yellowdog_ray.errors import PlatformError
from yellowdog_ray.raydog.builder import RayDogClusterProxy
from yellowdog_ray.raydog.journal import find_states
from yellowdog_ray.raydog.state import ClusterState

BEFORE_BUILD = (
    ("add_worker_pool", ("test/small", None, 2, "one")),
    ("add_worker_pool", ("test/small", None, 1, "two")),
)
LIFE = (
    ("build", ()),
    ("add_worker_pool", ("test/small", None, 1, "late")),
    ("scale_worker_pool", ("late", 3)),
    ("remove_worker_pool_by_internal_name", ("one",)),
    ("shut_down", ()),
)
AT_ONCE = 5
# How many requests of a life change something, at the least: to build, add, scale, remove and shut down.
CHANGES = 9 + 3 + 2 + 2 + 9
# Seconds after the kill in which a request is carried out that was under way.
LATE = 0.3
_FOR_EVER = 3600


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """Processes that end a cluster do not wait as long as in the field, here as in the children."""
    for module, name, value in IMPATIENT:
        monkeypatch.setattr(module, name, value)


class Changing(Fault):
    """A fault of requests that change something: creating ones, ending ones or both."""

    methods: tuple[str, ...] = ("POST", "PUT", "DELETE")

    def takes(self, method: str, path: str, now: float | None = None) -> bool:
        return method in self.methods and super().takes(method, path, now)


class Ending(Changing):
    methods = ("PUT", "DELETE")


@contextmanager
def scene(place: Path, **delays: float):
    """A platform, and a process that is about to build a cluster on it."""
    place.mkdir(parents=True)
    with serve(**delays) as served, Child(place / "states") as child:
        child.call("RayDogCluster", **arguments(served))
        for method, args in BEFORE_BUILD:
            child.call(method, *args)
        yield served, child, place / "states"
        served.faults.clear()


def end(served: Served, states: Path) -> list[str]:
    """Do what another process does that has the state files only; return what was there."""
    there = served.running()
    files = find_states(states)
    for file in files:
        assert SECRET not in file.read_text()
        proxy = RayDogClusterProxy(KEY_ID, SECRET)
        proxy.load_saved_state_from_json_file(file)
        proxy.shut_down()
    assert served.running() == [], f"left by a shut-down from {files}"
    assert find_states(states) == []
    # Where there was a state, its locks and half-written files are gone with it.
    assert not files or list(states.iterdir()) == []
    return there


def everywhere(instants: Iterable[Any], crash: Callable[[Any], Any]) -> list[Any]:
    """Crash at every instant, several at once on platforms of their own; say at which one it went wrong."""

    def at(instant: Any) -> Any:
        try:
            return crash(instant)
        except BaseException as error:
            raise AssertionError(f"killed at {instant}: {error}") from error

    with ThreadPoolExecutor(AT_ONCE) as threads:
        return list(threads.map(at, instants))


def changes(served: Served) -> int:
    return sum(method != "GET" for method, _ in served.faults.seen)


@pytest.fixture(scope="module")
def whole_life(tmp_path_factory):
    """How long a life takes that nobody ends early."""
    with pytest.MonkeyPatch.context() as patch:
        for module, name, value in IMPATIENT:
            patch.setattr(module, name, value)
        place = tmp_path_factory.mktemp("whole")
        with scene(place / "timed", latency=0.03, boot_delay=0.3, start_delay=0.1) as (served, child, _):
            began = time.monotonic()
            for method, args in LIFE:
                child.call(method, *args)
            seconds = time.monotonic() - began
            assert served.running() == []
            assert changes(served) >= CHANGES
        return seconds


def test_spread_instants(tmp_path, whole_life):
    """Killed at instants that are spread over all of a cluster's life, it leaves nothing."""
    count = 26

    def crash(number: int) -> tuple[list[str], bool]:
        place = tmp_path / str(number)
        with scene(place, latency=0.03, boot_delay=0.3, start_delay=0.1) as (served, child, states):
            for method, args in LIFE:
                child.start(method, *args)
            time.sleep(whole_life * number / count)
            child.kill()
            named = bool(find_states(states))
            there = end(served, states)
            assert named or not there
            return there, named

    found = everywhere(range(count), crash)
    # Most of the instants have met a cluster, in many different conditions.
    assert sum(bool(there) for there, _ in found) > count / 3
    assert len({tuple(there) for there, _ in found}) > 4


@contextmanager
def held(served: Served, kind: type[Changing], number: int, when: str, path: str = "."):
    """Hold the n-th request of a kind: before it is carried out, after it, or until after the kill.

    What is yielded waits until it is held.
    """
    done = threading.Event()
    fault = kind(
        "*",
        path,
        "after" if when == "carried out" else "hang",
        skip=number - 1,
        carried_out=when == "late",
        seconds=_FOR_EVER,
        delay=_FOR_EVER if when == "carried out" else 0,
    )

    reached = threading.Event()
    usual = served.faults._hold

    async def hold(seconds: float, receive: Any) -> None:
        if seconds != _FOR_EVER:
            await usual(seconds, receive)
            return
        reached.set()
        if when == "late":
            # Unlike the usual one, it does not notice that the client has gone.
            await asyncio.sleep(LATE)
            done.set()
        else:
            await usual(seconds, receive)

    served.faults._hold = hold
    served.faults.faults = [*served.faults.faults, fault]
    yield lambda: reached.wait(20)
    if when == "late":
        assert done.wait(5), "the request was not carried out"


@pytest.mark.parametrize("when", ["not carried out", "carried out", "late"])
def test_around_every_change(tmp_path, when):
    """Killed while any of the requests is under way that change something, it leaves nothing.

    The request has not been carried out, has been, or is carried out when the process is dead already.
    """

    def crash(number: int) -> list[str]:
        with scene(tmp_path / str(number)) as (served, child, states):
            with held(served, Changing, number, when) as reached:
                for method, args in LIFE:
                    child.start(method, *args)
                assert reached()
                child.kill()
                end(served, states)
            # What has been carried out late has been found, too.
            time.sleep(0.02)
            assert served.running() == []
            return served.call(lambda: sorted(work.name for work in served.core.scheduler.pools.values()))

    found = everywhere(range(1, CHANGES + 1), crash)
    assert len(found[0]) < 5
    assert found[-1] == [
        f"demo-{pool}" for pool in ("00-head", "01-wrkrs", "02-wrkrs", "03-wrkrs", "observability")
    ]


def test_asked_for_long_after_the_state_was_written(tmp_path):
    """What was asked for late is waited for, although the state file had not been written for a long time."""
    with scene(tmp_path / "x") as (served, child, states), held(served, Changing, 1, "late") as reached:
        served.faults.faults = [
            Fault("GET", "compute/templates", "hang", seconds=1.5, carried_out=True),
            *served.faults.faults,
        ]
        child.start("build")
        assert reached()
        child.kill()
        (file,) = find_states(states)
        assert time.time() - file.stat().st_mtime > 1.0
        end(served, states)
        time.sleep(LATE + 0.1)
        assert served.running() == []


def test_before_the_state_file(tmp_path):
    """Killed before its state file is there, a process has not made a single request that creates."""
    for number, function in enumerate(["fsync", "replace"]):
        with scene(tmp_path / str(number)) as (served, child, states):
            child.call("hang", "os", function, 1)
            child.start("build")
            assert child.hangs()
            child.kill()
            assert find_states(states) == []
            assert served.faults.seen == []


# Of every second fsync it is the directory that is written.
@pytest.mark.parametrize(("function", "step"), [("fsync", 2), ("replace", 1)])
def test_while_the_state_file_is_written(tmp_path, function, step):
    """Killed while its state file is being written anew, the old one is there, and is enough."""

    def crash(number: int) -> list[str]:
        with scene(tmp_path / str(number)) as (served, child, states):
            child.call("hang", "os", function, number)
            for method, args in LIFE[:-1]:
                child.start(method, *args)
            assert child.hangs()
            child.kill()
            left = [entry.name for entry in states.iterdir()]
            assert any(name.endswith(".part") for name in left)
            return end(served, states)

    # The first is the one of the test before; threads write together, so that there are not many.
    assert all(everywhere(range(2 * step + 1, 7 * step + 1, step), crash))


def test_in_the_middle_of_a_rollback(tmp_path):
    """Killed while a failed build is being taken back, it leaves nothing."""

    def crash(number: int) -> int:
        with scene(tmp_path / str(number), stop_delay=0.3) as (served, child, states):
            served.faults.faults = [
                Fault("POST", "workerPools/provisioned", 400, skip=3),
                Fault("POST", "work/requirements", "hang", seconds=0.1, carried_out=True),
            ]
            if number == 0:
                with pytest.raises(PlatformError, match="could not provision the worker pool"):
                    child.call("build")
                assert served.running() == []
                assert list(states.iterdir()) == []
                return sum(method in Ending.methods for method, _ in served.faults.seen)
            with held(served, Ending, number, "not carried out") as reached:
                child.start("build")
                assert reached()
                child.kill()
                return len(end(served, states))

    # Three pools and their instances; and the work requirement, where it had been asked for.
    assert crash(0) >= 6
    assert any(everywhere(range(1, 7), crash))


def test_the_shutting_down_process_is_killed_too(tmp_path):
    """Killed while it ends a cluster from its state file, a process has left the file for the next one."""

    def crash(number: int) -> int:
        with scene(tmp_path / str(number), stop_delay=0.3) as (served, child, states):
            child.call("build")
            child.kill()
            (file,) = find_states(states)
            with Child(states) as second:
                second.call("load", file)
                if number == 0:
                    before = changes(served)
                    second.call("shut_down")
                    assert served.running() == []
                    assert list(states.iterdir()) == []
                    return changes(served) - before
                with held(served, Ending, number, "not carried out") as reached:
                    second.start("shut_down")
                    assert reached()
                    second.kill()
                    assert ClusterState.load(file).status == "ending"
                    return len(end(served, states))

    # The work requirement, and four times a pool and its instances.
    assert crash(0) >= 9
    left = everywhere(range(1, 10), crash)
    # The request that was held may have been for something that had ended already.
    assert any(left)


def test_the_command(tmp_path):
    """`raydog shut-down` in a new process, with the times of the field, ends what two killed processes left.

    One was killed while it built, and the work requirement that it had asked for comes into being after that.
    """
    with ExitStack() as stack:
        served, running, states = stack.enter_context(scene(tmp_path / "a"))
        building = stack.enter_context(Child(states))
        running.call("build")
        running.kill()
        building.call("RayDogCluster", **arguments(served, "other"))
        reached = stack.enter_context(held(served, Changing, 1, "late", "work/requirements$"))
        building.start("build")
        assert reached()
        building.kill()
        files = find_states(states)
        assert len(files) == 2
        environment = {"YD_API_KEY_ID": KEY_ID, "YD_API_KEY_SECRET": SECRET}
        command = [sys.executable, "-m", "yellowdog_ray.cli", "shut-down", *map(str, files)]
        done = subprocess.run(
            command,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert all(str(file) in done.stdout for file in files)
        assert served.running() == []
        assert list(states.iterdir()) == []
        assert sorted(work.name for work in served.core.scheduler.works.values()) == ["demo", "other"]
