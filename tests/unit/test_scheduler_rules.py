"""The scheduler against YellowDog's rules, which are written down here once more, apart from its own tables.

`test_scheduler` lets anything happen at any time and looks at what must always hold. Here every single
change of a status is held against the rules, every wish of a client must be carried out or refused as they
say, and whatever has happened, all work comes to an end once there are machines.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.unit.test_scheduler import LOST, SMALL, World, refusal
from yellowdog_ray.local import lifecycle
from yellowdog_ray.local.asks import RefusedError, TaskSpec, Usage
from yellowdog_ray.local.entities import Pool, WorkRequirement
from yellowdog_ray.local.events import NodeFailed, NodeLost, NodeStopped, TaskNotStarted
from yellowdog_ray.local.intake import read_group
from yellowdog_ray.local.scheduler import Scheduler, SchedulerOptions


def words(text: str) -> set[str]:
    return set(text.split())


# From YellowDog's documentation. There are no DOWNLOADING and UPLOADING here: tasks have no data; no machine
# is ever LATE or STOPPED.
RULES: dict[str, dict[str, set[str]]] = {
    "task": {
        "PENDING": words("READY CANCELLED DISCARDED"),
        "READY": words("ALLOCATED CANCELLED DISCARDED"),
        "ALLOCATED": words("EXECUTING FAILED ABORTED RESUBMITTED READY"),
        "EXECUTING": words("COMPLETED FAILED ABORTED RESUBMITTED READY"),
    },
    "group": {
        "PENDING": words("RUNNING HELD FINISHING COMPLETED FAILING CANCELLING"),
        "RUNNING": words("PENDING HELD FINISHING COMPLETED FAILING CANCELLING"),
        "HELD": words("PENDING FINISHING CANCELLING"),
        "FINISHING": words("COMPLETED FAILING CANCELLING"),
        "FAILING": words("FAILED CANCELLING"),
        "CANCELLING": words("CANCELLED"),
    },
    "work": {
        "RUNNING": words("HELD FINISHING CANCELLING COMPLETED FAILED"),
        "HELD": words("RUNNING FINISHING CANCELLING"),
        "FINISHING": words("COMPLETED FAILED CANCELLING"),
        "CANCELLING": words("CANCELLED"),
    },
    "pool": {
        "PENDING": words("IDLE RUNNING EMPTY SHUTDOWN"),
        "IDLE": words("RUNNING EMPTY SHUTDOWN"),
        "RUNNING": words("IDLE EMPTY SHUTDOWN"),
        "EMPTY": words("IDLE RUNNING SHUTDOWN"),
        "SHUTDOWN": words("TERMINATED"),
    },
    "node": {
        "RUNNING": words("DEREGISTERED LOST TERMINATED"),
        "DEREGISTERED": words("TERMINATED"),
    },
    "requirement": {
        "NEW": words("PROVISIONING RUNNING TERMINATING"),
        "PROVISIONING": words("RUNNING TERMINATING"),
        "RUNNING": words("PROVISIONING TERMINATING"),
        "TERMINATING": words("TERMINATED"),
    },
    "instance": {
        "PENDING": words("RUNNING TERMINATING TERMINATED"),
        "RUNNING": words("TERMINATING TERMINATED"),
        "TERMINATING": words("TERMINATED"),
    },
}
TABLES = {
    "task": lifecycle.TASK_NEXT,
    "group": lifecycle.GROUP_NEXT,
    "work": lifecycle.WORK_NEXT,
    "pool": lifecycle.POOL_NEXT,
    "node": lifecycle.NODE_NEXT,
    "requirement": lifecycle.REQUIREMENT_NEXT,
    "instance": lifecycle.INSTANCE_NEXT,
}
ENDS = {
    kind: {each for following in table.values() for each in following} - set(table)
    for kind, table in RULES.items()
}


class Recording(Scheduler):
    """A scheduler that notes every change of a status."""

    def __init__(self, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self.seen: list[tuple[str, str, str]] = []

    def _note(self, kind: str, thing: Any, change: Any, status: str, now: float) -> None:
        before = thing.status
        change(thing, status, now)
        if before != status:
            self.seen.append((kind, before, status))

    def _set_task(self, task: Any, status: str, now: float) -> None:
        self._note("task", task, super()._set_task, status, now)

    def _set_group(self, group: Any, status: str, now: float) -> None:
        self._note("group", group, super()._set_group, status, now)

    def _set_work(self, work: Any, status: str, now: float) -> None:
        self._note("work", work, super()._set_work, status, now)

    def _set_pool(self, pool: Any, status: str, now: float) -> None:
        self._note("pool", pool, super()._set_pool, status, now)

    def _set_node(self, node: Any, status: str, now: float) -> None:
        self._note("node", node, super()._set_node, status, now)

    def _set_requirement(self, requirement: Any, status: str, now: float) -> None:
        self._note("requirement", requirement, super()._set_requirement, status, now)

    def _set_instance(self, instance: Any, status: str, now: float) -> None:
        self._note("instance", instance, super()._set_instance, status, now)


Step = tuple[str, int, Any]
STEPS = st.lists(
    st.tuples(
        st.sampled_from(
            [
                *("add", "wish", "wish", "cancel", "register", "start", "start", "exit", "exit", "exit"),
                *("lose", "fail", "stopped", "refuse", "shutdown", "drain", "end", "resize", "time", "group"),
            ]
        ),
        st.sampled_from(range(24)),
        st.sampled_from(range(24)),
    ),
    min_size=20,
    max_size=80,
)
RUN = st.fixed_dictionaries(
    {"workerTags": st.sampled_from([["tag"], None])},
    optional={
        "minWorkers": st.integers(0, 2),
        "taskTimeout": st.just("PT1M"),
        "retryPolicy": st.sampled_from([LOST, {"maxRetries": 1}]),
        "failurePolicy": st.just({"resubmissionDestinations": [{"destinationTaskGroup": "third"}]}),
    },
)
WISHES = ["HELD", "RUNNING", "FINISHING", "CANCELLING", "COMPLETED", "FAILED"]


class Play(World):
    """A world that steps are played in."""

    def __init__(self, runs: list[dict[str, Any]], early: bool) -> None:
        super().__init__(SchedulerOptions(idle_node_shutdown=300))
        self.scheduler: Recording = Recording(self.scheduler.options, self.scheduler._new_uuid)
        self.scheduler.add_template(SMALL)
        self.pools: list[Pool] = [self.pool("small", 1, maxNodes=2)]
        self.works: list[WorkRequirement] = []
        for number, run in enumerate(runs):
            third = {key: value for key, value in run.items() if key != "failurePolicy"}
            raw = [
                {"name": "first", "finishIfAnyTaskFailed": early, "runSpecification": run},
                {"name": "second", "dependencies": ["first"], "runSpecification": run},
                {"name": "third", "runSpecification": third},
            ]
            if number:
                # One that can come to its end by itself soon.
                raw = [{"name": "first", "finishIfAnyTaskFailed": early, "runSpecification": third}]
            self.works.append(
                self.scheduler.submit("test", f"work-{number}", [self._group(each) for each in raw], self.now)
            )
            self._add(self.works[-1], 0, 2)

    def _group(self, raw: dict[str, Any]) -> Any:
        run = {"taskTypes": ["bash"], **raw["runSpecification"]}
        return read_group({**raw, "runSpecification": run}, 0)

    def _add(self, work: WorkRequirement, group: int, count: int) -> None:
        # What the documentation says of where tasks may be added.
        before = work.groups[group]
        allowed = work.status in ("RUNNING", "HELD") and before.status in ("PENDING", "RUNNING", "HELD")
        known = len(self.scheduler.tasks)
        try:
            self.scheduler.add_tasks(before.id, [TaskSpec()] * count, self.now)
        except RefusedError:
            assert not allowed
        else:
            assert allowed
            known += count
        self.collect()
        # A task that fails at once may have been resubmitted, but none is fewer.
        assert len(self.scheduler.tasks) >= known

    def _wish(self, work: WorkRequirement, status: str, abort: bool) -> None:
        before = work.status
        allowed = status in RULES["work"].get(before, ()) and status in WISHES[:4]
        allowed = allowed or status == before == "CANCELLING"
        wish = (work.id, status, abort, self.now)
        if allowed:
            self.scheduler.transition(*wish)
        else:
            refused = refusal(self.scheduler.transition, *wish)
            assert (refused.status, refused.error_type) == (403, "InvalidWorkRequirementStatusException")
            assert "invalid transition" in refused.message
            assert work.status == before
        self.collect()

    def _cancel(self, task_id: str, abort: bool) -> None:
        task = self.scheduler.tasks[task_id]
        waits, runs = task.status in ("PENDING", "READY"), task.status in ("ALLOCATED", "EXECUTING")
        try:
            self.scheduler.cancel_task(task_id, abort, self.now)
        except RefusedError:
            assert not waits
            assert not (runs and abort)
        else:
            assert waits or (runs and abort)
            assert not waits or task.status == "CANCELLED"
        self.collect()

    def play(self, step: Step) -> None:
        what, one, other = step
        scheduler, work = self.scheduler, self.works[one % len(self.works)]
        machines = {
            "lose": sorted(self.up),
            "fail": sorted(self.booting),
            "stopped": sorted(self.stopping),
        }.get(what, [])
        if what == "add":
            self._add(work, other % len(work.groups), 1 + other % 3)
        elif what == "group" and work.status in ("RUNNING", "HELD") and len(work.groups) < 5:
            # Added to work under way, after groups that may have ended long ago.
            new = self._group(
                {"name": f"late-{other}", "dependencies": [work.groups[-1].spec.name], "runSpecification": {}}
            )
            if new.name not in work.by_name:
                groups = [*(group.spec for group in work.groups), new]
                scheduler.update(work.id, groups, self.now, None, other)
                self.collect()
                self._add(work, len(work.groups) - 1, 1)
        elif what == "wish":
            self._wish(work, WISHES[other % len(WISHES)], bool(one % 2))
        elif what == "cancel" and scheduler.tasks:
            self._cancel(sorted(scheduler.tasks)[one % len(scheduler.tasks)], bool(other % 2))
        elif what == "register":
            self.register(1 + one % 3)
        elif what == "start":
            self.start()
        elif what == "exit" and self.runs:
            self.end(sorted(self.runs)[one % len(self.runs)], [0, 1, 143][other % 3])
        elif what == "refuse" and self.runs:
            run_id = sorted(self.runs)[one % len(self.runs)]
            if run_id not in self.started:
                del self.runs[run_id]
                self.event(TaskNotStarted(run_id, "no room"))
        elif machines:
            instance = machines[one % len(machines)]
            kind = {"lose": NodeLost, "fail": NodeFailed}.get(what)
            self.gone(instance, kind(instance, "chance") if kind else NodeStopped(instance))
        elif what == "shutdown" and other % 4 == 0:
            scheduler.shut_down_pool(self.pools[one % len(self.pools)].id, self.now)
        elif what == "drain" and scheduler.nodes:
            scheduler.shut_down_node(sorted(scheduler.nodes)[one % len(scheduler.nodes)], self.now)
        elif what == "end" and other % 4 == 0:
            pool = self.pools[one % len(self.pools)]
            scheduler.transition_requirement(pool.requirement.id, "TERMINATED", self.now)
        elif what == "time":
            self.pass_time([1.0, 70.0, 400.0][other % 3])
        elif what == "resize" and len(self.pools) < 3:
            self.pools.append(self.pool(f"more-{len(self.pools)}", one % 3, register=bool(other % 2)))
        self.collect()

    def finish(self) -> None:
        """Give everything the machines and the time that it needs, and let all tasks end well."""
        self.pools.append(self.pool("rescue", 3, idlePoolShutdown={"enabled": False}))
        for work in self.works:
            if work.status == "HELD":
                self._wish(work, "RUNNING", False)
            if work.status == "RUNNING":
                self._wish(work, "FINISHING", False)
        for _ in range(200):
            if all(work.finished for work in self.works):
                break
            self.register()
            self.start()
            for run_id in sorted(self.runs):
                self.end(run_id, 143 if run_id in self.aborting else 0)
            self.stop_all()
            self.pass_time(1)
        for pool in self.pools:
            self.scheduler.transition_requirement(pool.requirement.id, "TERMINATED", self.now)
        self.collect()
        self.stop_all()


def test_every_status_ends_and_every_end_is_reached() -> None:
    """Whatever happens, each change follows the rules and all comes to an end; every end is come to."""
    seen: Counter[tuple[str, str, str]] = Counter()

    @settings(
        max_examples=400,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.lists(RUN, min_size=1, max_size=2), st.booleans(), STEPS)
    def run(runs: list[dict[str, Any]], early: bool, steps: list[Step]) -> None:
        world = Play(runs, early)
        for step in steps:
            world.play(step)
        world.finish()
        for kind, before, after in world.scheduler.seen:
            assert after in RULES[kind].get(before, ()), f"a {kind} went from {before} to {after}"
        assert [work.status for work in world.works if not work.finished] == []
        for task in world.scheduler.tasks.values():
            assert task.status in ENDS["task"], f"{task.id} was lost in status {task.status}"
        assert [pool.status for pool in world.pools if pool.status != "TERMINATED"] == []
        assert {each.status for each in world.scheduler.instances.values()} == {"TERMINATED"}
        seen.update(world.scheduler.seen)

    run()
    reached: dict[str, set[str]] = {kind: set() for kind in RULES}
    for kind, _, after in seen:
        reached[kind].add(after)
    for kind, ends in ENDS.items():
        assert ends <= reached[kind], f"{kind}: {ends - reached[kind]} was never come to"
    # There is no rule that nothing ever followed: the steps try what they claim to.
    rules = {(kind, old, new) for kind, table in RULES.items() for old, row in table.items() for new in row}
    unused = rules - set(seen)
    assert unused <= RARE, sorted(unused - RARE)


# Not left to chance: machines are asked for in the moment in which a requirement is made; and for the other
# there is a test of its own.
RARE = {("requirement", "NEW", "TERMINATING"), ("group", "FAILING", "CANCELLING")}


def test_failing_group_is_cancelled() -> None:
    """A group that fails, but whose last task still runs, can be cancelled until then."""
    world = Play([{"workerTags": ["tag"]}], early=True)
    world.register()
    [work] = world.works
    world.play(("register", 2, 0))
    first, second = work.groups[0].tasks
    world.end_task(first, 1)
    assert (work.groups[0].status, second.status) == ("FAILING", "ALLOCATED")
    world.scheduler.transition(work.id, "CANCELLING", True, world.now)
    world.collect()
    assert (work.groups[0].status, world.aborting) == ("CANCELLING", {second.run_id})
    world.end_task(second, 143)
    assert (second.status, work.groups[0].status, work.status) == ("ABORTED", "CANCELLED", "CANCELLED")
    assert ("group", "FAILING", "CANCELLING") in world.scheduler.seen


@pytest.mark.parametrize("kind", RULES)
def test_tables_are_the_rules(kind: str) -> None:
    """The scheduler's own table allows what the rules do, no more and no less."""
    assert {old: set(row) for old, row in TABLES[kind].items()} == RULES[kind]


@pytest.mark.parametrize("kind", RULES)
def test_every_status_leads_to_an_end(kind: str) -> None:
    """From every status an end can be reached, and from no end anything else."""
    table = RULES[kind]
    for status in table:
        met, ahead = set(), {status}
        while ahead:
            one = ahead.pop()
            met.add(one)
            ahead |= table.get(one, set()) - met
        assert met & ENDS[kind], f"{status} leads nowhere"
    assert ENDS[kind].isdisjoint(table)


@pytest.mark.parametrize("when", ["running", "finishing", "held", "later"])
def test_dependent_of_a_failed_group_ends(when: str) -> None:
    """A group whose dependency has failed fails too, in whatever status its requirement is at that time."""
    world = World()
    world.pool()
    run = {"taskTypes": ["bash"]}
    before = read_group({"name": "before", "runSpecification": run, "finishIfAnyTaskFailed": True}, 0)
    after = read_group({"name": "after", "runSpecification": run, "dependencies": ["before"]}, 1)
    open_ = read_group({"name": "open", "runSpecification": run}, 2)
    scheduler, first = world.scheduler, [before, open_] if when == "later" else [before, after, open_]
    work = scheduler.submit("test", "work", first, world.now)
    [task] = world.add(work)
    if when != "later":
        world.add(work, group=1)
    if when == "held":
        scheduler.transition(work.id, "HELD", False, world.now)
    if when == "finishing":
        scheduler.transition(work.id, "FINISHING", False, world.now)
    world.end_task(task, 1)
    if when == "held":
        scheduler.transition(work.id, "RUNNING", False, world.now)
    if when == "later":
        scheduler.update(work.id, [*first, after], world.now, None, 0)
    dependent = work.by_name["after"]
    assert (dependent.status, dependent.waiting) == ("FAILED", 0)
    if when != "finishing":
        assert work.status == "RUNNING"
        scheduler.transition(work.id, "FINISHING", False, world.now)
    assert work.status == "FAILED"


def test_endings_can_be_refused() -> None:
    """With the option for it, what is ending cannot be ended again; nothing else changes."""
    world = World(SchedulerOptions(end_again="refuse"))
    pool = world.pool()
    world.scheduler.shut_down_pool(pool.id, world.now)
    world.collect()
    again = refusal(world.scheduler.shut_down_pool, pool.id, world.now)
    assert (again.status, again.error_type) == (403, "InvalidWorkerPoolStatusException")
    for status in ("TERMINATING", "TERMINATED"):
        assert pool.requirement.status == status
        wish = (pool.requirement.id, "TERMINATED", world.now)
        again = refusal(world.scheduler.transition_requirement, *wish)
        assert (again.status, again.error_type) == (403, "InvalidComputeRequirementStatusException")
        assert f"invalid transition from {status}" in again.message
        world.stop_all()


def test_a_second_cancelling_can_be_refused() -> None:
    """A requirement that is being cancelled takes an abort by default; with the option it takes no more."""
    for how, statuses in (("accept", ["EXECUTING", "EXECUTING"]), ("refuse", ["EXECUTING"])):
        world = World(SchedulerOptions(end_again=how))  # type: ignore[arg-type]
        world.pool()
        work = world.work(tasks=1)
        world.start()
        for _ in statuses:
            world.scheduler.transition(work.id, "CANCELLING", False, world.now)
            assert work.status == "CANCELLING"
        if how == "refuse":
            again = refusal(world.scheduler.transition, work.id, "CANCELLING", True, world.now)
            assert (again.status, again.error_type) == (403, "InvalidWorkRequirementStatusException")


@pytest.mark.parametrize(("grow", "nodes"), [(False, 1), (True, 3)])
def test_a_pool_without_a_bound_can_grow_with_its_tasks(grow: bool, nodes: int) -> None:
    """A pool that says no maxNodes stays as large as it was provisioned, or grows with the option for it."""
    world = World(SchedulerOptions(grow_without_max=grow))
    pool = world.pool()
    world.work(tasks=3)
    world.collect()
    world.register()
    assert pool.requirement.alive == nodes


def test_shrinking_ends_what_boots() -> None:
    """A stand-alone requirement that shrinks while it boots ends up with as many machines as it was told."""
    world = World()
    usage = Usage("test/small", "alone", "test", None, 3, None, {}, False, None)
    requirement = world.scheduler.provision(usage, world.now)
    world.collect()
    world.register(1)
    world.scheduler.resize_requirement(requirement.id, 2, False, world.now)
    world.collect()
    assert len(world.stopping) == 1
    world.register()
    world.stop_all()
    assert (requirement.status, requirement.counts["RUNNING"], requirement.alive) == ("RUNNING", 2, 2)
