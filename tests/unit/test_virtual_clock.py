"""Time that passes only when it is told to: a platform's half day in a moment."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from datetime import timedelta

import pytest
from yellowdog_client import PlatformClient
from yellowdog_client.model import (
    ApiKey,
    AutoShutdown,
    ComputeRequirementTemplateUsage,
    NodeWorkerTarget,
    ProvisionedWorkerPoolProperties,
    RunSpecification,
    ServicesSchema,
    Task,
    TaskGroup,
    TaskStatus,
    WorkRequirement,
)

from yellowdog_ray.errors import ClusterStateError, SpecError
from yellowdog_ray.local import LocalControlPlane
from yellowdog_ray.local.clock import VirtualClock
from yellowdog_ray.local.faults import Fault

HOUR = 3600.0


@pytest.fixture
def clock() -> Iterator[VirtualClock]:
    loop = asyncio.new_event_loop()
    yield VirtualClock(loop, 100.0)
    loop.close()


def test_timers_fire_in_order_at_their_time(clock):
    """What is due is called in the order of its time, then of its making, and reads its own time."""
    calls = []
    for name, delay in (("late", 3.0), ("first", 1.0), ("second", 1.0)):
        clock.call_later(delay, lambda name=name: calls.append((name, clock.time())))
    clock.call_later(2.0, calls.append, "cancelled").cancel()
    assert clock.advance(2.5) == 102.5
    assert calls == [("first", 101.0), ("second", 101.0)]
    clock.advance(0.5)
    assert calls[2:] == [("late", 103.0)]


def test_what_a_timer_arms_fires_too(clock):
    """A timer that arms another one within the time that passes is followed by it."""
    calls = []

    def again() -> None:
        calls.append(clock.time())
        clock.call_later(10.0, again)

    clock.call_later(10.0, again)
    clock.advance(35.0)
    assert calls == [110.0, 120.0, 130.0]
    assert clock.time() == 135.0


def test_a_timer_that_fails_does_not_stop_the_clock(clock):
    """An error comes out of the call that moved the clock, and the next one goes on."""
    calls = []
    clock.call_later(1.0, lambda: 1 / 0)
    clock.call_later(2.0, calls.append, "next")
    with pytest.raises(ZeroDivisionError):
        clock.advance(5.0)
    clock.advance(5.0)
    assert calls == ["next"]


@pytest.mark.parametrize("seconds", [-1.0, float("nan"), float("inf"), 1e300, 10**400, "1", None, True])
def test_time_goes_on_and_no_further_than_can_be_written(clock, seconds):
    with pytest.raises(SpecError):
        clock.advance(seconds)
    assert clock.time() == 100.0


def test_what_the_clock_calls_does_not_move_it(clock):
    """Time moved from within would be moved back when the outer call ends."""
    caught = []

    def move() -> None:
        with pytest.raises(ClusterStateError) as error:
            clock.advance(10.0)
        caught.append(error)

    clock.call_later(1.0, move)
    assert clock.advance(2.0) == 102.0
    assert len(caught) == 1
    assert clock.advance(1.0) == 103.0


# -- a platform -------------------------------------------------------------------------------------------


@pytest.fixture
def platform() -> Iterator[LocalControlPlane]:
    with LocalControlPlane(clock="virtual", boot_delay=90, start_delay=2, stop_delay=5) as platform:
        yield platform


@pytest.fixture
def client(platform) -> Iterator[PlatformClient]:
    schema = ServicesSchema(defaultUrl=platform.url)
    with PlatformClient.create(schema, ApiKey(platform.key_id, platform.secret)) as client:
        yield client


def provision(client, nodes: int = 1, **properties):
    return client.worker_pool_client.provision_worker_pool(
        ComputeRequirementTemplateUsage(
            templateId="local/node",
            requirementName="pool",
            requirementNamespace="local",
            targetInstanceCount=nodes,
        ),
        ProvisionedWorkerPoolProperties(
            createNodeWorkers=NodeWorkerTarget.per_node(1), workerTag="pool", **properties
        ),
    )


def submit(client, seconds: float | None = None, work: str = "work", environment=None, **group):
    added = client.work_client.add_work_requirement(
        WorkRequirement(
            namespace="local",
            name=work,
            taskGroups=[TaskGroup("group", RunSpecification(taskTypes=["bash"], **group))],
        )
    )
    environment = (environment or {}) if seconds is None else {"SIMULATED_SECONDS": str(seconds)}
    (task,) = client.work_client.add_tasks_to_task_group(
        added.taskGroups[0], [Task(name="task", taskType="bash", environment=environment)]
    )
    return lambda: client.work_client.get_task_by_id(task.id)


def status(client, pool) -> str:
    return str(client.worker_pool_client.get_worker_pool_by_id(pool.id).status)


def test_half_a_day_without_work_ends_a_pool(platform, client):
    """An idle shutdown of twelve hours happens after twelve hours, and the test takes a moment."""
    began = time.monotonic()
    wish = AutoShutdown(enabled=True, timeout=timedelta(hours=12))
    pool = provision(client, nodes=3, idlePoolShutdown=wish)
    assert status(client, pool) == "PENDING"
    platform.advance(89)
    assert status(client, pool) == "PENDING"
    platform.advance(1)
    assert status(client, pool) == "IDLE"
    platform.advance(12 * HOUR - 1)
    assert status(client, pool) == "IDLE"
    platform.advance(1)
    assert status(client, pool) == "SHUTDOWN"
    platform.advance(5)
    assert status(client, pool) == "TERMINATED"
    assert platform.running() == []
    assert time.monotonic() - began < 10


def test_tasks_live_by_the_clock(platform, client):
    """Nodes boot, tasks start and end, and time-outs strike when the clock says so, and not before."""
    provision(client)
    task = submit(client, seconds=600)
    platform.advance(90)
    assert task().status == TaskStatus.ALLOCATED
    time.sleep(0.1)
    assert task().status == TaskStatus.ALLOCATED
    platform.advance(2)
    assert task().status == TaskStatus.EXECUTING
    platform.advance(599)
    assert task().status == TaskStatus.EXECUTING
    assert platform.advance(1) == platform.core.now()
    ended = task()
    assert ended.status == TaskStatus.COMPLETED
    assert (ended.finishedTime - ended.startedTime).total_seconds() == pytest.approx(600)


def test_the_end_of_all_time(platform, client):
    """The clock goes up to the year 9000, where the longest time-out can still be written."""
    pool = provision(client)
    shutdown = AutoShutdown(enabled=True, timeout=timedelta(days=36_500))
    late = 221_845_391_999 - platform.core.now()
    platform.advance(late)
    assert status(client, pool)
    compute = client.compute_client.provision_compute_requirement_template(
        ComputeRequirementTemplateUsage(
            templateId="local/node",
            requirementName="last",
            requirementNamespace="local",
            targetInstanceCount=1,
            autoShutdown=shutdown,
        )
    )
    assert client.compute_client.get_compute_requirement_by_id(compute.id).autoShutdownTime.year == 9099
    with pytest.raises(SpecError, match="8999"):
        platform.advance(10)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("SIMULATED_SECONDS", "abc"),
        ("SIMULATED_SECONDS", "nan"),
        ("SIMULATED_SECONDS", "inf"),
        ("SIMULATED_SECONDS", "-5"),
        ("SIMULATED_EXIT_CODE", "1.5"),
        ("SIMULATED_EXIT_CODE", "abc"),
        ("SIMULATED_EXIT_CODE", "256"),
    ],
)
def test_a_simulated_task_that_cannot_be(platform, client, name, value):
    """A task whose simulation is mistyped fails, and says so, instead of running for ever."""
    provision(client)
    task = submit(client, environment={name: value})
    platform.advance(100)
    (error,) = task().errors
    assert (str(task().status), error.errorType) == ("FAILED", "UNABLE_START_PROCESS")
    assert error.error.startswith(f"{name} must be a")
    assert repr(value) in error.error
    # Its worker is free again.
    after = submit(client, seconds=10, work="after")
    platform.advance(100)
    assert str(after().status) == "COMPLETED"


def test_a_task_timeout(platform, client):
    provision(client)
    task = submit(client, taskTimeout=timedelta(hours=3))
    platform.advance(92 + 3 * HOUR - 1)
    assert task().status == TaskStatus.EXECUTING
    platform.advance(1 + 5)
    assert task().status == TaskStatus.FAILED
    assert task().errors[-1].errorType == "TIMED_OUT"


def test_faults_count_on_the_clock(platform, client):
    """The time of a fault passes with the platform's clock."""
    platform.faults.fail_provision(after=60, for_=60, count=None)
    fault = platform.faults.http(Fault("GET", "^/application", 418, after=3600, count=None))
    provision(client)
    platform.advance(90)
    assert len(platform.core.scheduler.nodes) == 1
    platform.call(platform.core.scheduler.resize_pool, *_pool_and_size(platform, 2), platform.core.now())
    platform.call(platform.core.changed)
    platform.advance(0)
    assert platform.faults.provision[0].hits == 1
    assert fault.hits == 0
    client.application_client.get_application_details()
    platform.advance(3600)
    with pytest.raises(Exception, match="418"):
        client.application_client.get_application_details()
    assert fault.hits == 1


def _pool_and_size(platform, size):
    return next(iter(platform.core.scheduler.pools)), size


def test_only_a_virtual_clock_is_moved():
    with LocalControlPlane() as platform, pytest.raises(ClusterStateError, match="virtual"):
        platform.advance(1)
    with pytest.raises(SpecError, match="sundial"):
        LocalControlPlane(clock="sundial")
