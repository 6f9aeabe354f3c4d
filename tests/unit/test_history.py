"""What a platform remembers: every kind of thing comes back, and no file keeps it from starting."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sqlite3
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import invariant, rule
from yellowdog_client import PlatformClient
from yellowdog_client.model import ApiKey, ServicesSchema, WorkerPoolSearch, WorkRequirementSearch

from tests.controlplane import KEY_ID, SECRET, serve
from tests.unit.test_scheduler import Chance, World
from yellowdog_ray.local import history as history_module
from yellowdog_ray.local import records, wire
from yellowdog_ray.local.asks import AutoShutdown, RefusedError, Usage
from yellowdog_ray.local.history import KEEP_DAYS, VERSION, WAS_KILLED, WAS_STOPPED, History, forget
from yellowdog_ray.local.intake import read_group, read_pool
from yellowdog_ray.local.records import KINDS, kind_of, read, write
from yellowdog_ray.local.scheduler import Scheduler

POOL = {
    "workerTag": "tag",
    "minNodes": 1,
    "maxNodes": 5,
    "nodeBootTimeout": "PT5M",
    "idleNodeShutdown": {"enabled": True, "timeout": "PT1H"},
    "idlePoolShutdown": {"enabled": False},
    "createNodeWorkers": {"targetType": "PER_NODE", "targetCount": 2},
}
RUN = {
    "vcpus": {"min": 1, "max": 4.5},
    "ram": {"min": 0.5},
    "minWorkers": 1,
    "tasksPerWorker": 2,
    "taskTimeout": "PT1M",
    "retryPolicy": {
        "maxRetries": 1,
        "retryErrors": {"includes": [{"errorTypes": {"includes": ["TIMED_OUT"]}}]},
    },
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "history.sqlite"


def all_things(scheduler: Scheduler) -> list[Any]:
    return history_module._all_of(scheduler)


def busy_world() -> World:
    """A world with every kind of thing, ended and live."""
    world = World()
    world.pool(nodes=3, **POOL)
    done = world.work(1, name="done", run=RUN, priority=2.5, tag="x")
    world.end_task(done.groups[0].tasks[0])
    failed = world.work(1, name="failed")
    world.end_task(failed.groups[0].tasks[0], 3, "what it said")
    live = world.work(6, name="live", run=RUN, finishIfAllTasksFinished=False)
    world.start()
    world.add(live, 1, name="named", environment={"VAR": "ünï\ud800"}, arguments=("a", "b"), task_data="#!")
    gone = world.pool(name="gone")
    world.scheduler.shut_down_pool(gone.id, world.now)
    world.collect()
    world.stop_all()
    alone = Usage("test/small", "alone", "test", "tag", 1, "image", {"a": "b"}, True, None)
    world.scheduler.provision(alone, world.now)
    world.scheduler.namespaces.add("made")
    return world


def save(path: Path, world: World, *, kill: bool = True) -> None:
    """Have all of a world written down, and end its platform."""

    async def run() -> None:
        history = History(path, world.now)
        history.follow(world.scheduler, asyncio.get_running_loop())
        world.scheduler.unsaved = dict.fromkeys(all_things(world.scheduler))
        if kill:
            history._take(100_000)
            # Nothing is left to be concluded at the end.
            history._scheduler = None
        history.close()

    asyncio.run(run())


def load(path: Path, now: float = 2000.0) -> Scheduler:
    scheduler = Scheduler()

    async def run() -> None:
        history = History(path, now)
        history.load(scheduler)
        history.follow(scheduler, asyncio.get_running_loop())
        history.close()

    asyncio.run(run())
    return scheduler


def test_every_kind_of_thing_comes_back() -> None:
    """What is written of a thing reads back as the same thing."""
    things = all_things(busy_world().scheduler)
    assert {kind_of(thing).name for thing in things} == set(KINDS)
    read_back: dict[tuple[str, str], Any] = {}
    for name, kind in KINDS.items():
        for thing in things:
            if kind_of(thing) is kind:
                record = json.loads(json.dumps(write(thing)))
                again = read(kind, record, lambda kind, its_id: read_back[kind, its_id])
                read_back[name, thing.id] = again
                assert write(again) == write(thing)
                for each in kind.stored:
                    assert getattr(again, each) == getattr(thing, each), f"{name}.{each}"


def test_every_field_is_kept_or_follows() -> None:
    """A field that is added to an entity is stored, or named here as one that follows from the rest."""
    follow = {
        "compute": "pool instances counts",
        "pool": "nodes node_counts worker_counts shapes claimed busy draining cordoned idle_since idle_armed "
        "boot_failures retry_at",
        "instance": "node",
        "node": "workers claimed busy draining cordoned idle_since idle_armed",
        "work": "groups by_name open_groups",
        "group": "tasks names counts ready claimed kept matches blocked",
        "task": "run_id worker timed_out",
    }
    for name, kind in KINDS.items():
        kept = {*kind.stored, *(field for field, _ in kind.owners)}
        assert kept | set(follow[name].split()) == set(records._names(kind.type)), name
        assert kept.isdisjoint(follow[name].split()), name


def test_what_was_live_has_ended(path: Path) -> None:
    """After a kill, what was live has ended with a statement, and what had ended is as it was."""
    world = busy_world()
    ended = {thing.id: write(thing) for thing in all_things(world.scheduler)}
    save(path, world)

    scheduler = load(path)

    assert {pool.status for pool in scheduler.pools.values()} == {"TERMINATED"}
    assert {each.status for each in scheduler.requirements.values()} == {"TERMINATED"}
    assert {each.status for each in scheduler.instances.values()} == {"TERMINATED"}
    assert {each.status for each in scheduler.nodes.values()} == {"TERMINATED"}
    works = {work.name: work for work in scheduler.works.values()}
    assert {name: work.status for name, work in works.items()} == {
        "done": "COMPLETED",
        "failed": "FAILED",
        "live": "CANCELLED",
    }
    assert works["live"].groups[0].counts == {"ABORTED": 4, "CANCELLED": 3}
    assert {task.errors[-1].error for task in works["live"].groups[0].tasks} == {WAS_KILLED}
    assert "what it said" in works["failed"].groups[0].tasks[0].errors[0].error
    for name in ("done", "failed"):
        for thing in (works[name], *works[name].groups, *works[name].groups[0].tasks):
            assert write(thing) == ended[thing.id]
    pool = next(pool for pool in scheduler.pools.values() if pool.name == "pool")
    (source,) = wire.requirement_json(pool.requirement)["provisionStrategy"]["sources"]
    assert source["statusMessage"] == WAS_KILLED
    assert wire.pool_json(pool)["nodeSummary"]["statusCounts"] == {"TERMINATED": 3}
    assert wire.pool_json(pool)["workerSummary"]["statusCounts"] == {"SHUTDOWN": 6}
    assert "made" in scheduler.namespaces
    # Nothing happens by itself any more.
    scheduler.tick(1e12)
    assert scheduler.take_effects() == []


def test_the_past_can_be_asked_and_not_changed(path: Path) -> None:
    """What is remembered has its names, answers idempotent calls, and takes no new work."""
    save(path, busy_world())
    scheduler = load(path)
    scheduler.add_template(next(iter(World().scheduler.templates.values())))
    work, pool = scheduler.work_named("test", "live"), scheduler.pool_named("test", "pool")
    group = read_group({"name": "group", "runSpecification": {"taskTypes": ["bash"]}}, 0)
    usage = Usage("test/small", "pool", "test", None, 1, None, {}, False, None)
    with pytest.raises(RefusedError, match="already exists"):
        scheduler.submit("test", "live", [group], 2000.0)
    with pytest.raises(RefusedError, match="already exists"):
        scheduler.provision_pool(usage, read_pool({}), 2000.0)
    with pytest.raises(RefusedError, match="Cannot add tasks"):
        scheduler.add_tasks(work.groups[0].id, [], 2000.0)
    scheduler.shut_down_pool(pool.id, 2000.0)
    scheduler.transition_requirement(pool.requirement.id, "TERMINATED", 2000.0)
    for node_id in pool.nodes:
        scheduler.shut_down_node(node_id, 2000.0)
    assert scheduler.take_effects() == []


def test_a_stop_says_so(path: Path) -> None:
    """What was live when the platform was stopped ended then, and not when it is started again."""
    world = busy_world()
    save(path, world, kill=False)
    scheduler = load(path, now=time.time() + 1000)
    task = next(task for task in scheduler.tasks.values() if task.status == "ABORTED")
    assert task.errors[-1].error == WAS_STOPPED
    assert task.finished is not None
    assert abs(task.finished - time.time()) < 100


def test_a_second_start_finds_the_same(path: Path) -> None:
    """What a start has concluded is written down, and the order of lists stays."""
    save(path, busy_world())
    first, second = load(path, 2000.0), load(path, 3000.0)
    assert [write(thing) for thing in all_things(first)] == [write(thing) for thing in all_things(second)]
    order = [name for _, name in busy_world().scheduler._work_names]
    assert [work.name for work in second.works.values()] == order


@pytest.mark.parametrize(
    "content",
    [b"", b"no database at all, but text", b"SQLite format 3\0" + b"\xff" * 5000],
    ids=["empty", "text", "torn"],
)
def test_a_damaged_file_is_put_aside(path: Path, content: bytes, caplog: pytest.LogCaptureFixture) -> None:
    """A file that is no history is put aside with a warning; a new one is begun."""
    path.write_bytes(content)
    assert load(path).works == {}
    aside = list(path.parent.glob("history.sqlite.aside-*"))
    assert [each.read_bytes() for each in aside] == ([content] if content else [])
    assert ("put aside" in caplog.text) is bool(content)
    save(path, busy_world())
    assert len(load(path).works) == 3


def test_damage_within_is_survived(path: Path) -> None:
    """A file whose middle was overwritten keeps no platform from starting, nor from writing."""
    save(path, busy_world())
    content = bytearray(path.read_bytes())
    content[4096 : len(content) - 4096] = b"\xa5" * (len(content) - 8192)
    path.write_bytes(content)
    load(path)
    assert list(path.parent.glob("history.sqlite.aside-*"))
    save(path, busy_world())
    assert len(load(path).works) == 3


def test_another_version_is_put_aside(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A file of another version is left as it is, beside a new one."""
    save(path, busy_world())
    with sqlite3.connect(path) as database:
        database.execute(f"PRAGMA user_version = {VERSION + 1}")
    assert load(path).works == {}
    assert f"version {VERSION + 1}" in caplog.text
    (aside,) = (each for each in path.parent.glob("history.sqlite.aside-*") if each.name[-4] != "-")
    with sqlite3.connect(aside) as database:
        assert database.execute("SELECT count(*) FROM things WHERE kind = 'work'").fetchone() == (3,)


@pytest.mark.parametrize(
    "text", ["no JSON", "[]", "null", "{}", '{"id": 7}', "[" * 5000, '{"id": "x", "spec": []}']
)
def test_an_odd_entry_is_passed_over(path: Path, text: str, caplog: pytest.LogCaptureFixture) -> None:
    """Entries that make no sense are forgotten with what belongs to them; the others come back."""
    save(path, busy_world())
    with sqlite3.connect(path) as database:
        database.execute(
            "UPDATE things SET json = ? WHERE kind = 'group' AND json LIKE '%x%' AND rowid = "
            "(SELECT min(rowid) FROM things WHERE kind = 'group')",
            (text,),
        )
        database.execute("INSERT INTO things VALUES ('unknown', 'a', '', 0, '{}')")
    scheduler = load(path)
    assert len(scheduler.works) == 3
    assert len(scheduler.groups) == 2
    assert "3 entries" in caplog.text
    caplog.clear()
    assert len(load(path).groups) == 2
    assert "entries" not in caplog.text


def test_a_file_that_cannot_be_written_is_only_logged(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Where there can be no file, the platform works without a history."""
    path.mkdir()
    assert load(path).works == {}
    assert "nothing is remembered" in caplog.text


def test_what_could_not_be_written_is_written_later(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A write that fails is logged, and made good with the next."""
    world = busy_world()

    async def run() -> None:
        history = History(path, world.now)
        assert history._database is not None
        history._database.execute("PRAGMA busy_timeout = 100")
        history.follow(world.scheduler, asyncio.get_running_loop())
        things = all_things(world.scheduler)
        with sqlite3.connect(path, isolation_level=None) as other:
            other.execute("BEGIN IMMEDIATE")
            world.scheduler.unsaved = dict.fromkeys(things[:-1])
            history._take(100_000)
            deadline = time.monotonic() + 10
            while "could not be written" not in caplog.text and time.monotonic() < deadline:
                await asyncio.sleep(0.02)
            other.execute("ROLLBACK")
        world.scheduler.unsaved = dict.fromkeys(things[-1:])
        history.close()

    asyncio.run(run())
    assert "locked" in caplog.text
    assert len(all_things(load(path))) == len(all_things(world.scheduler))


def test_what_is_old_is_forgotten(path: Path) -> None:
    """What ended more than thirty days ago is forgotten, with its name; the file shrinks with it."""
    save(path, busy_world(), kill=False)
    later = time.time() + KEEP_DAYS * 86400 + 100
    with sqlite3.connect(path) as database:
        assert database.execute("SELECT count(*) FROM things").fetchone()[0] > 20
    assert all_things(load(path, later)) == []
    with sqlite3.connect(path) as database:
        assert database.execute("SELECT kind FROM things").fetchall() == [("namespaces",)]


def test_only_so_much_is_remembered(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of too many tasks the oldest requirements are forgotten, each as a whole; the newest stays."""
    world = World()
    world.pool(nodes=1)
    for number in range(4):
        work = world.work(3, name=f"work-{number}")
        world.now += 10
        for task in work.groups[0].tasks:
            world.end_task(task)
    save(path, world)
    monkeypatch.setattr(history_module, "KEEP_TASKS", 7)
    scheduler = load(path)
    assert [work.name for work in scheduler.works.values()] == ["work-2", "work-3"]
    assert len(scheduler.tasks) == 6
    assert len(scheduler.pools) == 1
    monkeypatch.setattr(history_module, "KEEP_TASKS", 2)
    scheduler = load(path)
    (work,) = scheduler.works.values()
    assert (work.name, work.groups[0].counts) == ("work-3", {"COMPLETED": 2})
    tasks = world.scheduler.work_named("test", "work-3").groups[0].tasks
    assert list(scheduler.tasks) == [task.id for task in tasks[1:]]


def test_of_too_many_machines_the_newest_are_remembered(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A machine that is forgotten takes its node with it, and nothing is called odd because of it."""
    world = World()
    world.pool(nodes=3)
    save(path, world)
    monkeypatch.setattr(history_module, "KEEP_TASKS", 2)
    scheduler = load(path)
    assert list(scheduler.instances) == list(world.scheduler.instances)[1:]
    assert [node.instance.id for node in scheduler.nodes.values()] == list(scheduler.instances)
    assert len(scheduler.pools) == 1
    assert caplog.text == ""


def test_what_is_forgotten_is_not_read(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Entries of what is forgotten cost no time at the start: they are not parsed."""
    world = World()
    world.pool(nodes=1)
    old, new = (world.work(count, name=name) for count, name in ((20, "old"), (3, "new")))
    save(path, world)
    with sqlite3.connect(path) as database:
        database.execute("UPDATE things SET json = 'no JSON' WHERE kind = 'task' AND root = ?", (old.id,))
        database.execute("UPDATE things SET updated = 0 WHERE id = ?", (old.id,))
        # As it is where the first task of the newest requirement is too much.
        database.execute(
            "UPDATE things SET json = 'no JSON' WHERE kind = 'task' AND id = ?", (new.groups[0].tasks[0].id,)
        )
    monkeypatch.setattr(history_module, "KEEP_TASKS", 2)
    assert len(load(path).tasks) == 2
    assert caplog.text == ""
    with sqlite3.connect(path) as database:
        assert database.execute("SELECT count(*) FROM things WHERE kind = 'task'").fetchone() == (2,)


def test_what_was_live_for_long_is_remembered(path: Path) -> None:
    """What has not changed for more than thirty days, but was live until the end, ended only now."""
    save(path, busy_world())
    with sqlite3.connect(path) as database:
        database.execute("UPDATE things SET updated = 0")
    scheduler = load(path, time.time())
    assert [work.name for work in scheduler.works.values()] == ["live"]
    assert {pool.name for pool in scheduler.pools.values()} == {"pool"}


@pytest.mark.parametrize("text", ["7", "null", "[[]]", "[" * 5000, "no JSON"])
def test_odd_namespaces_are_passed_over(path: Path, text: str) -> None:
    """Namespaces that are no list of names keep no platform from starting."""
    save(path, busy_world())
    with sqlite3.connect(path) as database:
        database.execute("UPDATE things SET json = ? WHERE kind = 'namespaces'", (text,))
    scheduler = load(path)
    assert len(scheduler.works) == 3
    assert scheduler.namespaces == set()


def test_a_history_can_be_forgotten(path: Path) -> None:
    """A history that is forgotten is gone, with what had been put aside of it."""
    path.write_bytes(b"no database")
    save(path, busy_world())
    assert len(list(path.parent.iterdir())) >= 2
    forget(path)
    assert list(path.parent.iterdir()) == []
    assert load(path).works == {}


def test_what_a_commit_refuses_is_written_later(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Where the commit itself fails, as on a full disk, nothing counts as written, and it is tried again."""
    monkeypatch.setattr(history_module, "_AGAIN_SECONDS", 0.02)
    world = busy_world()

    async def run() -> None:
        history = History(path, world.now)
        assert history._database is not None
        # A constraint that is looked at only by the commit.
        history._database.executescript(
            "PRAGMA foreign_keys = ON; CREATE TABLE whole (id PRIMARY KEY);"
            "CREATE TABLE part (id REFERENCES whole DEFERRABLE INITIALLY DEFERRED);"
            "CREATE TRIGGER refuse AFTER INSERT ON things BEGIN INSERT INTO part VALUES (1); END"
        )
        history.follow(world.scheduler, asyncio.get_running_loop())
        world.scheduler.unsaved = dict.fromkeys(all_things(world.scheduler))
        history._take(100_000)
        await until(lambda: "could not be written" in caplog.text)
        with sqlite3.connect(path) as other:
            assert other.execute("SELECT count(*) FROM things").fetchone() == (0,)
            other.execute("INSERT INTO whole VALUES (1)")
        with sqlite3.connect(path) as other:
            # Nothing else changes meanwhile.
            await until(lambda: other.execute("SELECT count(*) FROM things").fetchone() > (20,))
        history._scheduler = None
        history.close()

    asyncio.run(run())
    assert caplog.text.count("could not be written") == 1
    with sqlite3.connect(path) as database:
        database.executescript("DROP TRIGGER refuse; DROP TABLE part; DROP TABLE whole")
    assert len(all_things(load(path))) == len(all_things(world.scheduler))


async def until(look: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not look():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)


def test_changes_are_written_as_they_come(path: Path) -> None:
    """What the API brings about is in the file within a second or so, without an end."""
    with serve() as platform:
        schema = ServicesSchema(defaultUrl=platform.url)
        history = History(path)

        def follow() -> None:
            history.follow(platform.core.scheduler, platform.loop)
            platform.core.saver = history.changed

        platform.call(follow)
        with PlatformClient.create(schema, ApiKey(KEY_ID, SECRET)) as client:
            from yellowdog_client.model import RunSpecification, TaskGroup, WorkRequirement

            client.work_client.add_work_requirement(
                WorkRequirement("test", "work", [TaskGroup("group", RunSpecification(["bash"]))])
            )
        deadline = time.monotonic() + 10
        found: list[str] = []
        while len(found) < 2 and time.monotonic() < deadline:
            with sqlite3.connect(path) as database:
                found = [kind for (kind,) in database.execute("SELECT kind FROM things ORDER BY rowid")]
            time.sleep(0.05)
        assert found[:2] == ["work", "group"]
        platform.call(history.close)


def test_the_sdk_reads_the_past(path: Path) -> None:
    """The SDK lists what is remembered as it does what is there."""
    save(path, busy_world())
    with serve() as platform:
        platform.call(lambda: History(path, 2000.0).load(platform.core.scheduler))
        schema = ServicesSchema(defaultUrl=platform.url)
        with PlatformClient.create(schema, ApiKey(KEY_ID, SECRET)) as client:
            pools = client.worker_pool_client.get_worker_pools(WorkerPoolSearch()).list_all()
            works = client.work_client.get_work_requirements(WorkRequirementSearch()).list_all()
    assert {str(pool.status) for pool in pools} == {"TERMINATED"}
    assert {str(work.status) for work in works} == {"COMPLETED", "FAILED", "CANCELLED"}


class Remembered(Chance):
    """Whatever clients and machines do, what is noted as changed is all that has changed."""

    def __init__(self) -> None:
        super().__init__()
        self.file: dict[tuple[str, str], str] = {}

    @rule(data=st.data(), priority=st.integers(0, 3))
    def update(self, data: st.DataObject, priority: int) -> None:
        work = data.draw(st.sampled_from(self.works))
        specs = [replace(group.spec, priority=priority, tag=f"tag-{priority}") for group in work.groups]
        with contextlib.suppress(RefusedError):
            self.world.scheduler.update(work.id, specs, self.world.now, "tag", priority)
        self.world.collect()

    @rule(data=st.data(), wish=st.sampled_from([None, AutoShutdown(True, 300.0)]))
    def set_auto_shutdown(self, data: st.DataObject, wish: AutoShutdown | None) -> None:
        pool = data.draw(st.sampled_from(self.pools))
        with contextlib.suppress(RefusedError):
            self.world.scheduler.set_auto_shutdown(pool.requirement.id, wish, self.world.now)
        self.world.collect()

    @invariant()
    def every_change_is_noted(self) -> None:
        if not hasattr(self, "world"):
            return
        scheduler = self.world.scheduler
        for thing in scheduler.unsaved or ():
            self.file[kind_of(thing).name, thing.id] = json.dumps(write(thing))
        scheduler.unsaved = {}
        whole = {(kind_of(each).name, each.id): json.dumps(write(each)) for each in all_things(scheduler)}
        assert self.file == whole


Remembered.TestCase.settings = settings(
    max_examples=30,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
TestRemembered = Remembered.TestCase
