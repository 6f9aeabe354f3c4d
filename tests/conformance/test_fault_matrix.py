"""Every call of a cluster's life through every fault, at its first and at a later call.

What counts is what the platform itself has in its books when it is over, and how long it took.
"""

from __future__ import annotations

import itertools
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

from tests.controlplane import TEMPLATE, Fault, Served, serve
from tests.faultcases import (
    BUILD_TIMEOUT,
    FAULTS,
    ONCE,
    TIMELY,
    GivenUp,
    begin,
    drive,
    fault,
    make,
    name_of,
    pairs,
    second_try,
    states,
)
from yellowdog_ray.errors import RayDogError, TeardownError
from yellowdog_ray.raydog import assembly, teardown, transport
from yellowdog_ray.raydog import platform as platform_module
from yellowdog_ray.raydog.builder import RayDogCluster
from yellowdog_ray.raydog.state import ClusterState

TEMPLATES = (TEMPLATE, replace(TEMPLATE, name="large", id=TEMPLATE.id.replace("a1", "b2")))
# What a call may take that is hung up on. Ordinary ones take a hundredth of it.
READ_TIMEOUT = 0.25
# What a single fault may cost beyond its own delay.
SINGLE_SECONDS = 5.0

_numbers = itertools.count()


class Planes:
    """Platforms that are lent to cases, to one at a time each."""

    def __init__(self) -> None:
        self._started: list[Served] = []
        self._idle: list[Served] = []

    @contextmanager
    def lend(self) -> Iterator[Served]:
        """Lend a platform on which nothing runs and nothing goes wrong."""
        try:
            served = self._idle.pop()
        except IndexError:
            served = serve(templates=TEMPLATES).start()
            self._started.append(served)
        served.backend.boot_delay, served.backend.start_delay, served.backend.stop_delay = 0.005, 0.002, 0.002
        yield served
        # None of a case that failed, and none that has got slow with what it remembers.
        served.faults.clear()
        if not served.running() and len(served.core.scheduler.pools) < 100:
            self._idle.append(served)

    def close(self) -> None:
        """Close all of them."""
        with ThreadPoolExecutor(len(self._started) or 1) as threads:
            list(threads.map(Served.close, self._started))


@pytest.fixture(scope="module")
def planes() -> Iterator[Planes]:
    planes = Planes()
    yield planes
    planes.close()


@pytest.fixture
def plane(planes: Planes) -> Iterator[Served]:
    with planes.lend() as served:
        yield served


@pytest.fixture(autouse=True)
def hurried(monkeypatch):
    """Waits that have nothing to do with faults are short."""
    monkeypatch.setattr(transport, "FIRST_PAUSE", 0.02)
    monkeypatch.setattr(assembly, "SETTLE_SECONDS", 0.01)


@pytest.fixture
def impatient(monkeypatch):
    """Persistent faults are given up on sooner than in the field, in the same order."""
    monkeypatch.setattr(transport, "RETRY_SECONDS", 0.25)
    monkeypatch.setattr(transport, "NOT_YET_SECONDS", 0.15)
    monkeypatch.setattr(platform_module, "NOT_YET_SECONDS", 0.15)
    monkeypatch.setattr(teardown, "STEP_SECONDS", 0.3)
    monkeypatch.setattr(teardown, "VERIFY_SECONDS", 0.8)
    monkeypatch.setattr(teardown, "LATE_SECONDS", 0.1)
    monkeypatch.setattr(teardown, "_CONFIRM_SECONDS", 0.1)
    monkeypatch.setattr(assembly, "CANCEL_SECONDS", 0.3)


def new_name() -> str:
    """Name a cluster as no other was named."""
    return f"c{next(_numbers)}"


def cluster_for(served: Served, *kinds: str) -> RayDogCluster:
    """Make a cluster that gives a call up in time for these kinds of faults."""
    cluster = make(served, new_name())
    give_up_soon(cluster, *kinds)
    return cluster


def give_up_soon(cluster: RayDogCluster, *kinds: str) -> None:
    """Let a cluster give a call up in time for these kinds of faults."""
    if any(FAULTS[kind].hangs for kind in kinds):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(transport, "READ_TIMEOUT", READ_TIMEOUT)
            assert cluster.yd_client is not None


def begin_patiently(cluster: RayDogCluster, phase: str, kind: str) -> None:
    """Bring a cluster to where a phase begins: a busy machine is not to be taken for a fault before."""
    cluster._platform.close()
    begin(cluster, phase)
    cluster._platform.close()
    give_up_soon(cluster, kind)


def all_at_once(
    planes: Planes, kinds: Iterable[str], case: Callable[[Served, RayDogCluster, str], None]
) -> None:
    """Try a case with several kinds of faults at once, each on a platform of its own; tell all that fail."""
    with ExitStack() as stack:
        lent = [(stack.enter_context(planes.lend()), kind) for kind in kinds]
        ready = [(served, cluster_for(served, kind), kind) for served, kind in lent]
        with ThreadPoolExecutor(len(ready)) as threads:
            running = {each[2]: threads.submit(case, *each) for each in ready}
            failed = {kind: error for kind, one in running.items() if (error := one.exception()) is not None}
    reports = ["".join(traceback.format_exception(error)) for error in failed.values()]
    assert not failed, f"{len(failed)} of {len(ready)}: {', '.join(failed)}\n" + "\n".join(reports)


# -- single faults -------------------------------------------------------------------------------------

# Beyond the build, variants of a fault that differ only before the call is tried again are left out: an
# answer that is lost is "after", whatever comes in its place, and to wait as told is one line for all calls.
_VARIANTS = ("500 carried out", "502", "hang lost", "429 Retry-After")
_LATER = ("500", "after", "404")

Case = tuple[str, str, int]
_CASES: list[Case] = [
    (phase, call, skip) for phase, call in pairs() for skip in (0, 1) if not skip or (phase, call) not in ONCE
]
_IDS = [f"{phase}-{call}-{'later' if skip else 'first'}" for phase, call, skip in _CASES]


@pytest.mark.parametrize(("phase", "call", "skip"), _CASES, ids=_IDS)
def test_single_faults(planes, state_directory, phase, call, skip):
    """A single fault is outlived within five seconds, what it did is known, and nothing is left."""

    def case(served: Served, cluster: RayDogCluster, kind: str) -> None:
        begin_patiently(cluster, phase, kind)
        slow_down(served, phase, call, skip)
        injected = fault(call, kind, skip=skip)
        served.faults.faults = [injected]
        began = time.monotonic()
        drive(cluster, phase)
        took = time.monotonic() - began
        own = READ_TIMEOUT if FAULTS[kind].hangs else FAULTS[kind].delay
        assert injected.hits == 1
        assert own <= took < own + SINGLE_SECONDS
        if not phase.startswith("shut down"):
            served.backend.boot_delay = 0.005
            # Nothing was lost, and nothing is there twice.
            wanted = sum(pool.node_count for pool in cluster.worker_node_worker_pools.values())
            assert cluster.wait_for_workers(timeout=10) == wanted
            assert len(pools(served)) == 1 + len(cluster.worker_pool_ids)
            assert tasks(served) == nodes(served) == 1 + wanted
            assert len(states(state_directory, name_of(cluster))) == 1
            cluster.shut_down()
        assert served.running() == []
        assert states(state_directory, name_of(cluster)) == []

    every = [kind for kind in FAULTS if phase == "build" or kind not in _VARIANTS]
    all_at_once(planes, _LATER if skip else every, case)


def slow_down(served: Served, phase: str, call: str, skip: int) -> None:
    """Make a wait last so long that there is a later call of its kind."""
    if skip:
        for field, value in TIMELY.get((phase, call), {}).items():
            setattr(served.backend, field, value)


def pools(served: Served) -> list[str]:
    return [one for one in served.running() if one.startswith("pool")]


def tasks(served: Served) -> int:
    """Count the tasks that have not ended."""

    def count() -> int:
        groups = served.core.scheduler.groups.values()
        return sum(not task.finished for group in groups for task in group.tasks)

    return served.call(count)


def nodes(served: Served) -> int:
    """Count the nodes that live and have not been told to go."""
    return served.call(lambda: sum(node.usable for node in served.core.scheduler.nodes.values()))


# -- persistent faults ---------------------------------------------------------------------------------

# What a call may take of which a fault persists: being tried again, taking back and verifying take half a
# second each at most, and other tests have the machine meanwhile.
PERSISTENT_SECONDS = 8.0
_PERSISTENT = ("500", "429", "after", "hang", "404")
_CREATING = {"provision pool", "add requirement", "add tasks", "write requirement"}
_ENDS = ("remove", "shut down", "shut down small")
_ENDING = ("end pool", "terminate compute", "cancel requirement")


def succeeds(phase: str, call: str, kind: str) -> bool | None:
    """Tell whether a phase does what it has to, although a fault persists; None where it may or may not."""
    carried_out = FAULTS[kind].carries_out
    if call in _CREATING:
        # What was created is found, if the platform has got so far when it is looked for.
        return None if kind == "hang" else carried_out
    if phase not in _ENDS:
        # What the platform does not know cannot go on.
        return kind == "404" and call in ("cancel task", "end node")
    if call in ("read pool", "read compute", "read requirement"):
        return kind == "404"
    if call == "cancel requirement" or (phase, call) == ("remove", "terminate compute"):
        return carried_out
    # As its tasks are aborted, a pool ends by either of two calls, and is looked at in another way where the
    # lists fail. The tasks of a pool that was removed cost nothing.
    return True


@pytest.mark.parametrize(("phase", "call", "skip"), _CASES, ids=_IDS)
def test_persistent_faults(planes, impatient, state_directory, phase, call, skip):
    """A fault that does not go away ends the call in time, and leaves nothing that is not named."""

    def case(served: Served, cluster: RayDogCluster, kind: str) -> None:
        begin_patiently(cluster, phase, kind)
        before = pools(served)
        slow_down(served, phase, call, skip)
        injected = fault(call, kind, None, skip)
        served.faults.faults = [injected]
        error: RayDogError | None = None
        began = time.monotonic()
        try:
            drive(cluster, phase)
        except RayDogError as raised:
            error = raised
        assert time.monotonic() - began < PERSISTENT_SECONDS
        assert injected.hits >= 1
        assert succeeds(phase, call, kind) in (None, error is None)
        found = states(state_directory, name_of(cluster))
        if error is not None and phase == "build":
            # Taken back while the fault went on.
            assert served.running() == []
            assert found == []
            return
        if error is not None and phase in _ENDS:
            assert isinstance(error, TeardownError)
            assert error.still_running
            assert all(what in str(error) for what in error.still_running)
            (state,) = found
            named = {str(state.work_requirement_id), *(pool.name for pool in state.pools)}
            assert all(any(one in what for one in named) for what in error.still_running)
        elif error is not None:
            assert [state.status for state in found] == ["running"]
            assert ", running>" in repr(cluster)
            if phase == "add":
                added = [f"pool test/{pool.plan.name}" for pool in cluster.worker_node_worker_pools.values()]
                assert sorted(pools(served)) == sorted({*before, *added})
        served.faults.clear()
        served.backend.boot_delay = served.backend.stop_delay = 0.002
        second_try(cluster, "state file" if found and kind in ("500", "hang") else "object", state_directory)
        assert served.running() == []
        assert states(state_directory, name_of(cluster)) == []

    # The other phases in which a call is made get one kind of fault each.
    most = phase == next(one for one, its in pairs() if its == call)
    all_at_once(planes, _PERSISTENT if most and not skip else ("500",), case)


@pytest.mark.parametrize("by", ["object", "state file"])
@pytest.mark.parametrize("phase", ["build", "add", "remove", "shut down"])
def test_what_cannot_be_ended_is_named(planes, impatient, state_directory, phase, by):
    """Where the terminating calls keep failing, the error and the state file say what is left."""

    def case(served: Served, cluster: RayDogCluster, kind: str) -> None:
        begin_patiently(cluster, phase, kind)
        name = name_of(cluster)
        before = set(served.running())
        stuck = [
            fault(call, kind, None) for call in _ENDING if phase != "remove" or call != "cancel requirement"
        ]
        # What there is to take back.
        trigger = replace(fault("add tasks", "500", None), what=403)
        served.faults.faults = [*stuck, trigger] if phase in ("build", "add") else stuck
        began = time.monotonic()
        with pytest.raises(RayDogError) as caught:
            drive(cluster, phase)
        assert time.monotonic() - began < PERSISTENT_SECONDS
        assert all(one.hits for one in stuck if phase != "add" or "CANCELLING" not in one.path)
        left = {"build": set(served.running()), "shut down": before}.get(phase)
        if left is None:
            its = f"test/{name}-01-wrkrs" if phase == "remove" else f"test/{name}-04-wrkrs"
            left = {f"pool {its}", f"compute {its}"}
        assert left
        assert left <= set(served.running())
        called = {
            one: f"work requirement {cluster.work_requirement_id}"
            if one.startswith("work")
            else f"worker pool {one.partition('/')[2]}"
            for one in left
        }
        assert all(one in str(caught.value) for one in called.values())
        if phase in _ENDS:
            assert isinstance(caught.value, TeardownError)
            assert len(caught.value.still_running) == len(set(called.values()))
        else:
            assert "could not all be taken back" in str(caught.value)
        (state,) = states(state_directory, name)
        assert {pool.name for pool in state.pools} >= {one.partition("/")[2] for one in left if "pool" in one}
        assert all(pool.id and pool.compute_requirement_id for pool in state.pools)
        assert state.work_requirement_id == cluster.work_requirement_id
        served.faults.clear()
        second_try(cluster, by, state_directory)
        assert served.running() == []
        assert states(state_directory, name) == []

    all_at_once(planes, ("500", "429", "before", "hang lost", "404"), case)


# -- two things at once --------------------------------------------------------------------------------


def build_and_end(served: Served, cluster: RayDogCluster, directory: Path) -> RayDogError | None:
    """Build, and shut down again, by the state file where the build left one; return why it failed."""
    failure: RayDogError | None = None
    left: list[ClusterState] = []
    cluster.add_worker_pool("test/small", None, 2)
    began = time.monotonic()
    try:
        cluster.build(BUILD_TIMEOUT)
        assert cluster.wait_for_workers(timeout=10) == 2
        assert tasks(served) == nodes(served) == 3
    except RayDogError as error:
        failure = error
    assert time.monotonic() - began < PERSISTENT_SECONDS
    if failure is not None:
        left = states(directory, name_of(cluster))
        # What is left is named, and what is not named is gone.
        assert left or served.running() == []
        assert bool(left) == ("could not all be taken back" in str(failure))
    served.faults.clear()
    second_try(cluster, "state file" if left else "object", directory)
    assert served.running() == []
    assert states(directory, name_of(cluster)) == []
    return failure


_LOOK_UPS = [
    ("provision pool", "find pool"),
    ("add requirement", "find requirement"),
    ("add tasks", "list tasks"),
]


@pytest.mark.parametrize(("post", "look"), _LOOK_UPS)
def test_lost_answer_and_a_look_up_that_fails_once(planes, state_directory, post, look):
    """What was created by a call whose answer was lost is found, if not at first."""

    def case(served: Served, cluster: RayDogCluster, kind: str) -> None:
        injected = [fault(post, "after"), fault(look, kind)]
        served.faults.faults = injected
        assert build_and_end(served, cluster, state_directory) is None
        assert [one.hits for one in injected] == [1, 1]

    all_at_once(planes, [kind for kind in FAULTS if kind != "429 Retry-After"], case)


@pytest.mark.parametrize("lost", ["after", "before"])
@pytest.mark.parametrize(("post", "look"), [*_LOOK_UPS, ("provision pool", "find compute")])
def test_lost_answer_and_a_look_up_that_keeps_failing(planes, impatient, state_directory, post, look, lost):
    """What cannot be looked for counts as left, whether or not it is there, and is ended later."""

    def case(served: Served, cluster: RayDogCluster, kind: str) -> None:
        injected = [fault(post, lost, None), fault(look, kind, None)]
        served.faults.faults = injected
        error = build_and_end(served, cluster, state_directory)
        # The compute requirement is looked for only where there is no pool.
        if (look, lost) == ("find compute", "after"):
            assert error is None
            assert injected[1].hits == 0
            return
        assert error is not None
        assert all(one.hits for one in injected)
        if look != "list tasks" and kind != "404":
            assert "could not all be taken back" in str(error)

    # A platform that for ever denies what it has created cannot be helped.
    kinds = [kind for kind in _PERSISTENT if kind != "404" or lost == "before"]
    all_at_once(planes, kinds, case)


@pytest.mark.parametrize("phase", ["build", "add"])
def test_given_up_by_a_gateway_and_carried_out_later(plane, monkeypatch, impatient, state_directory, phase):
    """What the platform creates a second after a gateway and the build gave it up is ended nevertheless."""
    monkeypatch.setattr(teardown, "LATE_SECONDS", 2.0)
    monkeypatch.setattr(teardown, "VERIFY_SECONDS", 4.0)
    cluster = cluster_for(plane)
    begin(cluster, phase)
    before = plane.running()
    gateway = GivenUp(plane.faults.app, r"^/workerPools/provisioned/template$|^/work/requirements$", 1.0)
    monkeypatch.setattr(plane.faults, "app", gateway)
    began = time.monotonic()
    with pytest.raises(RayDogError, match="504"):
        drive(cluster, phase)
    assert time.monotonic() - began < 5.0
    # The first of each kind was carried out, and nobody heard of it.
    assert gateway.answers.count(200) == (5 if phase == "build" else 1)
    assert plane.running() == before
    cluster.shut_down()
    assert plane.running() == []
    assert states(state_directory, name_of(cluster)) == []


def test_a_template_that_is_not_told_in_time(plane, state_directory):
    """A build that has sent nothing waits for nothing when its time is over."""
    plane.faults.faults = [Fault("GET", "/templates/", "hang", None, seconds=30)]
    cluster, before = cluster_for(plane), len(plane.faults.seen)
    began = time.monotonic()
    with pytest.raises(TimeoutError, match="templates"):
        cluster.build(timedelta(seconds=0.5))
    assert time.monotonic() - began < 1.5
    assert {method for method, _ in plane.faults.seen[before:]} == {"GET"}
    assert states(state_directory, name_of(cluster)) == []


def test_not_answered_in_time_and_carried_out_later(plane, monkeypatch, state_directory):
    """A build ends in time though its calls hang, and ends what they create after it gave them up."""
    monkeypatch.setattr(transport, "GRACE_SECONDS", 0.2)
    monkeypatch.setattr(platform_module, "UNANSWERED_SECONDS", 3.0)
    monkeypatch.setattr(teardown, "LATE_SECONDS", 0.2)
    gateway = GivenUp(plane.faults.app, r"^/workerPools/provisioned/template$|^/work/requirements$", 2.0)
    gateway.silent = True
    monkeypatch.setattr(plane.faults, "app", gateway)
    cluster = cluster_for(plane)
    cluster.add_worker_pool("test/small", None, 2)
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        cluster.build(timedelta(seconds=0.5))
    assert 2.0 < time.monotonic() - began < 6.0
    # All were carried out, and nobody heard of it.
    assert gateway.answers == [200] * 3
    assert plane.running() == []
    assert states(state_directory, name_of(cluster)) == []


@pytest.mark.parametrize("seconds", [0.0, 0.06, 0.15])
def test_given_up_by_a_gateway_and_carried_out_soon(plane, monkeypatch, state_directory, seconds):
    """What is carried out late, before or after it was looked for, is there once."""
    cluster = cluster_for(plane)
    gateway = GivenUp(plane.faults.app, ".", seconds)
    monkeypatch.setattr(plane.faults, "app", gateway)
    assert build_and_end(plane, cluster, state_directory) is None
    assert len(gateway.answers) >= 5


@pytest.mark.parametrize("phase", ["shut down", "shut down small"])
def test_flapping_404_while_it_is_verified(plane, state_directory, phase):
    """A platform that does not know, knows, and does not know again is not believed at once."""
    plane.backend.stop_delay = 0.4
    cluster = cluster_for(plane)
    begin(cluster, phase)
    method, path = "GET", r"^/(compute|work)/requirements/|^/workerPools/ydid"
    answer = FAULTS["404"].fields["body"]
    flapping = [Fault(method, path, 404, 2, 2 * (number > 0), body=answer) for number in range(6)]
    unheard = [fault(call, "404") for call in _ENDING]
    plane.faults.faults = [*unheard, *flapping]
    drive(cluster, phase)
    assert all(one.hits for one in (*unheard, *flapping[:2]))
    assert plane.running() == []
    assert states(state_directory, name_of(cluster)) == []


@pytest.mark.parametrize("said_by", ["platform", "gateway"])
@pytest.mark.parametrize("phase", ["shut down", "remove"])
def test_nothing_is_known_for_a_while(plane, monkeypatch, state_directory, phase, said_by):
    """A platform that knows nothing at all for a second has not ended everything."""
    body = FAULTS["404"].fields["body"]
    if said_by == "gateway":
        # However short the time is after which the platform is believed.
        monkeypatch.setattr(teardown, "_CONFIRM_SECONDS", 0.1)
        monkeypatch.setattr(transport, "NOT_YET_SECONDS", 0.1)
        body = b"<html><head><title>404 Not Found</title></head></html>"
    cluster = cluster_for(plane)
    begin(cluster, phase)
    outage = Fault("*", ".", 404, None, body=body)
    plane.faults.faults = [outage]
    timer = threading.Timer(1.0, plane.faults.clear)
    timer.start()
    drive(cluster, phase)
    timer.join()
    assert outage.hits > 1
    assert len(pools(plane)) == (2 if phase == "remove" else 0)
    cluster.shut_down()
    assert plane.running() == []
    assert states(state_directory, name_of(cluster)) == []


@pytest.mark.parametrize("told", ["3600", "0", "nan", "Fri, 31 Dec 2100 23:59:59 GMT"])
def test_any_retry_after(plane, monkeypatch, state_directory, told):
    """Whatever a platform tells to wait, a call is given up in time, and not made all the time till then."""
    monkeypatch.setattr(teardown, "LATE_SECONDS", 0.2)
    cluster = cluster_for(plane)
    injected = Fault("POST", "/provisioned/template", 429, None, headers={"Retry-After": told})
    plane.faults.faults = [injected]
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        cluster.build(timedelta(seconds=1))
    assert time.monotonic() - began < 1 + 1.5
    # Tried again at the end, unless the build has just been given up.
    assert 1 <= injected.hits < 30
    assert plane.running() == []
    assert states(state_directory, name_of(cluster)) == []


def test_retry_after_beyond_the_end_while_shutting_down(plane, impatient, state_directory):
    """Where terminating calls are to wait for an hour, they are tried once more before they are given up."""
    cluster = cluster_for(plane)
    begin(cluster, "shut down")
    injected = [replace(fault(call, "429"), headers={"Retry-After": "3600"}) for call in _ENDING]
    plane.faults.faults = injected
    began = time.monotonic()
    cluster.shut_down()
    assert time.monotonic() - began < 2.0
    assert [one.hits for one in injected] == [1, 1, 1]
    assert plane.running() == []
    assert states(state_directory, name_of(cluster)) == []
