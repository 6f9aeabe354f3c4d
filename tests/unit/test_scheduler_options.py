"""The choices of SchedulerOptions: what is none is refused, and each changes what it says."""

from __future__ import annotations

from typing import Any

import pytest

from tests.unit.test_scheduler import World
from yellowdog_ray.errors import SpecError
from yellowdog_ray.local.entities import Pool
from yellowdog_ray.local.events import NodeFailed
from yellowdog_ray.local.intake import read_group
from yellowdog_ray.local.scheduler import SchedulerOptions


@pytest.mark.parametrize(
    ("name", "value", "choices"),
    [
        ("timeout_from", "start", "'executing' or 'allocated'"),
        ("template_environment", "mrege", "'replace' or 'merge'"),
        ("end_again", "no", "'accept' or 'refuse'"),
        ("search_names", ["whole"], "'part' or 'whole'"),
        ("idle_pool_statuses", "IDLE", "a set of EMPTY, IDLE, PENDING, RUNNING"),
        ("idle_pool_statuses", {"IDEL"}, "a set of EMPTY, IDLE, PENDING, RUNNING"),
        ("idle_pool_statuses", {"SHUTDOWN"}, "a set of EMPTY, IDLE, PENDING, RUNNING"),
        ("idle_pool_shutdown", "10m", "a number of seconds from 0 to 1e+12, or None"),
        ("idle_node_shutdown", float("nan"), "a number of seconds from 0 to 1e+12, or None"),
        ("node_boot_timeout", None, "a number of seconds from 0 to 1e+12, not"),
        ("boot_retry", -1, "a number of seconds from 0 to 1e+12, not"),
        ("boot_retry", True, "a number of seconds from 0 to 1e+12, not"),
        ("boot_retry", 1e13, "a number of seconds from 0 to 1e+12, not"),
        ("fail_dependents", "False", "True or False"),
        ("reuse_finished_names", 1, "True or False"),
        ("grow_without_max", None, "True or False"),
    ],
)
def test_a_choice_that_is_none_is_refused(name: str, value: Any, choices: str) -> None:
    """A mistyped option is named, with what may stand there; it would change what happens without a word."""
    with pytest.raises(SpecError) as refused:
        SchedulerOptions(**{name: value})
    assert str(refused.value).startswith(f"{name} of SchedulerOptions must be {choices}")


def ended(world: World, pool: Pool) -> bool:
    """Let what is idle end, where it does."""
    world.collect()
    world.stop_all()
    return pool.finished


@pytest.mark.parametrize(("limit", "ends"), [(60, 60), (None, None), (600, 600)])
def test_idle_pool_shutdown(limit: float | None, ends: float | None) -> None:
    """A pool that says nothing ends after the option's idle time, to the second, or never."""
    world = World(SchedulerOptions(idle_pool_shutdown=limit))
    pool = world.pool()
    world.pass_time((ends or 1e6) - 1)
    assert not ended(world, pool)
    world.pass_time(1)
    assert ended(world, pool) == (ends is not None)


@pytest.mark.parametrize(
    ("statuses", "without", "idle", "booting"),
    [
        ({"IDLE", "EMPTY"}, True, True, False),
        ({"EMPTY"}, True, False, False),
        ({"IDLE"}, False, True, False),
        ({"PENDING"}, False, False, True),
        (set(), False, False, False),
    ],
)
def test_idle_pool_statuses(statuses: set[str], without: bool, idle: bool, booting: bool) -> None:
    """A pool ends idle in just the statuses that are chosen: without nodes, with idle ones, or booting."""
    world = World(SchedulerOptions(idle_pool_statuses=frozenset(statuses), node_boot_timeout=1e6))
    pools = [
        world.pool("without", nodes=0),
        world.pool("idle"),
        world.pool("booting", register=False),
    ]
    assert [pool.status for pool in pools] == ["EMPTY", "IDLE", "PENDING"]
    world.pass_time(601)
    assert [pool.finished for pool in pools] == [without, idle, booting]


def test_node_boot_timeout() -> None:
    """A machine of a pool that says nothing may boot for as long as the option says."""
    world = World(SchedulerOptions(node_boot_timeout=90))
    pool = world.pool(register=False)
    world.pass_time(89)
    assert world.stopping == set()
    world.pass_time(1)
    assert world.stopping == set(pool.requirement.instances)
    assert "within 90 s" in str(pool.requirement.source_message)


@pytest.mark.parametrize("pause", [0, 40])
def test_boot_retry(pause: float) -> None:
    """After a failed boot a pool waits before it grows for its tasks, twice as long after the next one."""
    world = World(SchedulerOptions(boot_retry=pause))
    world.pool(nodes=0, maxNodes=1)
    world.work(tasks=1)
    world.collect()
    for wait in (pause, 2 * pause, 4 * pause):
        (instance_id,) = world.booting
        world.gone(instance_id, NodeFailed(instance_id, "no such image"))
        if wait:
            world.pass_time(wait - 1)
            assert not world.booting
            world.pass_time(1)
        assert len(world.booting) == 1


def test_a_thousand_failures_in_a_row() -> None:
    """However many machines fail, a pool tries again within five minutes."""
    world = World()
    pool = world.pool(nodes=1100, register=False)
    for instance_id in list(world.booting):
        world.gone(instance_id, NodeFailed(instance_id, "no such image"))
    assert pool.boot_failures == 1100
    assert pool.retry_at == world.now + 300


@pytest.mark.parametrize(("fails", "status"), [(True, "FAILED"), (False, "PENDING")])
def test_fail_dependents(fails: bool, status: str) -> None:
    """A group whose dependency failed fails too, or waits for as long as its requirement is there."""
    world = World(SchedulerOptions(fail_dependents=fails))
    world.pool()
    run = {"taskTypes": ["bash"], "workerTags": ["tag"]}
    specs = [{"name": "first", "runSpecification": run}]
    specs.append({"name": "second", "runSpecification": run, "dependencies": ["first"]})
    groups = [read_group(each, number) for number, each in enumerate(specs)]
    work = world.scheduler.submit("test", "work", groups, world.now)
    (task,), (waiting,) = world.add(work), world.add(work, group=1)
    world.start()
    world.end_task(task, 1)
    world.pass_time(500)
    assert [group.status for group in work.groups] == ["FAILED", status]
    assert waiting.status == ("DISCARDED" if fails else "PENDING")
    assert work.status == ("FAILED" if fails else "RUNNING")
