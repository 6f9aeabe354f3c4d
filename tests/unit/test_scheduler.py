"""The scheduler alone: its life cycles, by cases and by chance."""

from __future__ import annotations

import contextlib
import itertools
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from yellowdog_ray.local.asks import AutoShutdown, GroupSpec, RefusedError, TaskSpec, Template, Usage
from yellowdog_ray.local.entities import Pool, Task, WorkRequirement
from yellowdog_ray.local.events import (
    AbortTask,
    NodeFailed,
    NodeLost,
    NodeRegistered,
    NodeStopped,
    StartNode,
    StartTask,
    StopNode,
    TaskExited,
    TaskNotStarted,
    TaskStarted,
)
from yellowdog_ray.local.fields import seconds
from yellowdog_ray.local.intake import read_group, read_pool, read_task, read_usage
from yellowdog_ray.local.scheduler import Scheduler, SchedulerOptions
from yellowdog_ray.local.wire import duration

SMALL = Template("test", "small", "ydid:crt:000000:a1", "local.small", vcpus=2, ram=4, region="local")
LOST = {"maxRetries": 2, "retryErrors": {"includes": [{"errorTypes": {"includes": ["ALLOCATION_LOST"]}}]}}


class World:
    """A scheduler, and machines that do at once, or on demand, what it says."""

    def __init__(self, options: SchedulerOptions | None = None) -> None:
        counter = itertools.count(1)
        self.scheduler = Scheduler(options, new_uuid=lambda: f"00000000-0000-0000-0000-{next(counter):012x}")
        self.scheduler.add_template(SMALL)
        # As with a history: see test_history.
        self.scheduler.unsaved = {}
        self.now = 1000.0
        self.booting: dict[str, StartNode] = {}
        self.up: set[str] = set()
        self.stopping: set[str] = set()
        #: Attempts that are under way: the run's id and what was to be started.
        self.runs: dict[str, StartTask] = {}
        self.started: set[str] = set()
        self.aborting: set[str] = set()
        self.seen_runs: set[str] = set()

    def pool(self, name: str = "pool", nodes: int = 1, register: bool = True, **properties: Any) -> Pool:
        usage = Usage("test/small", name, "test", None, nodes, None, {}, False, None)
        properties.setdefault("workerTag", "tag")
        pool = self.scheduler.provision_pool(usage, read_pool(properties), self.now)
        self.collect()
        if register:
            self.register()
        return pool

    def work(
        self, tasks: int = 0, name: str = "work", run: dict[str, Any] | None = None, **group: Any
    ) -> WorkRequirement:
        group.setdefault("name", "group")
        spec = {"taskTypes": ["bash"], "workerTags": ["tag"], **(run or {})}
        work = self.scheduler.submit(
            "test", name, [read_group({"runSpecification": spec, **group}, 0)], self.now
        )
        if tasks:
            self.add(work, tasks)
        return work

    def add(self, work: WorkRequirement, count: int = 1, group: int = 0, **spec: Any) -> list[Task]:
        tasks = self.scheduler.add_tasks(work.groups[group].id, [TaskSpec(**spec)] * count, self.now)
        self.collect()
        return tasks

    def collect(self) -> None:
        """Take the scheduler's effects, and check that each makes sense."""
        for effect in self.scheduler.take_effects():
            if isinstance(effect, StartNode):
                assert effect.instance_id not in self.booting
                assert effect.instance_id not in self.up
                self.booting[effect.instance_id] = effect
            elif isinstance(effect, StopNode):
                assert effect.instance_id in self.booting or effect.instance_id in self.up
                assert effect.instance_id not in self.stopping
                self.stopping.add(effect.instance_id)
            elif isinstance(effect, StartTask):
                assert effect.run_id not in self.seen_runs, "a run's name was used twice"
                assert effect.instance_id in self.up, "a task was sent to a machine that is not up"
                assert effect.instance_id not in self.stopping, "a task was sent to a machine that ends"
                for other in self.runs.values():
                    assert other.task_id != effect.task_id, "a task runs twice at once"
                    assert (other.instance_id, other.slot) != (effect.instance_id, effect.slot), "a busy slot"
                self.seen_runs.add(effect.run_id)
                self.runs[effect.run_id] = effect
            elif isinstance(effect, AbortTask):
                assert effect.run_id not in self.aborting, "a task was aborted twice"
                self.aborting.add(effect.run_id)

    def event(self, event: Any) -> None:
        self.scheduler.on_event(event, self.now)
        self.collect()

    def register(self, count: int | None = None) -> None:
        for start in list(self.booting.values())[:count]:
            if start.instance_id in self.stopping:
                continue
            del self.booting[start.instance_id]
            self.up.add(start.instance_id)
            self.event(
                NodeRegistered(start.instance_id, start.hostname, "10.0.0.1", None, start.vcpus, start.ram)
            )

    def start(self) -> None:
        for run_id in list(self.runs):
            if run_id not in self.started:
                self.started.add(run_id)
                self.event(TaskStarted(run_id))

    def end(self, run_id: str, code: int = 0, tail: str = "") -> None:
        del self.runs[run_id]
        self.event(TaskExited(run_id, code, tail))

    def end_task(self, task: Task, code: int = 0, tail: str = "") -> None:
        assert task.run_id is not None
        self.end(task.run_id, code, tail)

    def gone(self, instance_id: str, event: Any) -> None:
        self.booting.pop(instance_id, None)
        self.up.discard(instance_id)
        self.stopping.discard(instance_id)
        self.runs = {name: run for name, run in self.runs.items() if run.instance_id != instance_id}
        self.event(event)

    def lose(self, instance_id: str) -> None:
        self.gone(instance_id, NodeLost(instance_id, "preempted"))

    def stop_all(self) -> None:
        for instance_id in list(self.stopping):
            self.gone(instance_id, NodeStopped(instance_id))

    def pass_time(self, span: float) -> None:
        """Move the clock on, and call at every time that the scheduler asked for."""
        end = self.now + span
        while (due := self.scheduler.next_deadline()) is not None and due <= end:
            self.now = max(self.now, due)
            self.scheduler.tick(self.now)
            self.collect()
        self.now = end


@pytest.fixture
def world() -> World:
    """A fresh world."""
    return World()


def refusal(call: Any, *args: Any) -> RefusedError:
    with pytest.raises(RefusedError) as caught:
        call(*args)
    return caught.value


# ---------------------------------------------------------------------------------------- the way up


def test_ids_follow_the_grammar(world: World) -> None:
    """A group's id is its requirement's retyped with a number, a task's adds another."""
    work = world.work(tasks=2)
    unique = work.id.rsplit(":", 1)[1]
    assert work.id == f"ydid:workreq:000000:{unique}"
    assert work.groups[0].id == f"ydid:taskgrp:000000:{unique}:1"
    assert [task.id for task in work.groups[0].tasks] == [f"ydid:task:000000:{unique}:1:{n}" for n in (1, 2)]


def test_pool_and_requirement_go_up(world: World) -> None:
    """A pool is PENDING until its first node is there, and its compute requirement RUNNING with the last."""
    pool = world.pool(nodes=2, register=False)
    assert (pool.status, pool.requirement.status, pool.requirement.alive) == ("PENDING", "PROVISIONING", 2)
    world.register(1)
    assert (pool.status, pool.requirement.status) == ("IDLE", "PROVISIONING")
    world.register()
    assert (pool.status, pool.requirement.status) == ("IDLE", "RUNNING")
    assert pool.requirement.source_status == "ACTIVE"


def test_task_runs_and_completes(world: World) -> None:
    """A task goes READY, ALLOCATED, EXECUTING, COMPLETED; its group and requirement complete with it."""
    work = world.work(tasks=1)
    task = work.groups[0].tasks[0]
    assert (task.status, work.groups[0].status, work.groups[0].starved) == ("READY", "PENDING", True)
    pool = world.pool()
    assert (task.status, work.groups[0].status, pool.status) == ("ALLOCATED", "RUNNING", "RUNNING")
    world.start()
    assert task.status == "EXECUTING"
    world.end_task(task)
    assert (task.status, work.groups[0].status, work.status) == ("COMPLETED", "COMPLETED", "COMPLETED")
    assert pool.status == "IDLE"


def test_empty_group_stays_open(world: World) -> None:
    """A group that never had a task does not finish by itself."""
    work = world.work()
    world.pool()
    assert (work.status, work.groups[0].status) == ("RUNNING", "PENDING")


def test_group_outlives_its_tasks(world: World) -> None:
    """With finishIfAllTasksFinished false a group takes more tasks after all have ended."""
    world.pool()
    work = world.work(tasks=1, finishIfAllTasksFinished=False)
    world.end_task(work.groups[0].tasks[0])
    assert (work.status, work.groups[0].status) == ("RUNNING", "PENDING")
    [task] = world.add(work)
    assert task.status == "ALLOCATED"


def test_worker_goes_to_the_higher_priority(world: World) -> None:
    """A free worker takes the group of the higher priority, not the older one."""
    low = world.work(tasks=1, name="low", priority=0)
    high = world.work(tasks=1, name="high", priority=5)
    world.pool()
    assert (low.groups[0].tasks[0].status, high.groups[0].tasks[0].status) == ("READY", "ALLOCATED")


def test_requirement_priority_comes_first(world: World) -> None:
    """A requirement's priority counts before that of its groups."""
    raw = {"name": "group", "runSpecification": {"taskTypes": ["bash"]}}
    low = world.scheduler.submit("test", "low", [read_group({**raw, "priority": 9}, 0)], world.now)
    high = world.scheduler.submit("test", "high", [read_group(raw, 0)], world.now, priority=1)
    [first], [second] = world.add(low), world.add(high)
    world.pool()
    assert (first.status, second.status) == ("READY", "ALLOCATED")


def test_lost_idle_node_gets_no_task(world: World) -> None:
    """A worker that was free on a node that is gone is not taken for free."""
    pool = world.pool(nodes=2, maxNodes=2)
    first, second = (node.instance.id for node in pool.nodes.values())
    world.lose(first)
    work = world.work(tasks=2)
    assert {run.instance_id for run in world.runs.values()} == {second}
    assert len(world.booting) == 1
    assert work.groups[0].counts == {"ALLOCATED": 1, "READY": 1}


def test_worker_serves_one_group_after_the_other(world: World) -> None:
    """A worker is released when its group has nothing left, and takes the next group."""
    world.pool()
    first, second = world.work(tasks=2, name="first"), world.work(tasks=1, name="second")
    world.end_task(first.groups[0].tasks[0])
    assert (first.groups[0].tasks[1].status, second.groups[0].tasks[0].status) == ("ALLOCATED", "READY")
    world.end_task(first.groups[0].tasks[1])
    assert second.groups[0].tasks[0].status == "ALLOCATED"


@pytest.mark.parametrize(
    ("run", "runs"),
    [
        ({}, True),
        ({"workerTags": ["other"]}, False),
        ({"workerTags": ["other", "tag"]}, True),
        ({"workerTags": None}, True),
        ({"namespaces": ["elsewhere"]}, False),
        ({"namespaces": ["test"]}, True),
        ({"taskTypes": ["bash", "docker"]}, False),
        ({"instanceTypes": ["big"]}, False),
        ({"instanceTypes": ["local.small"]}, True),
        ({"providers": ["AWS"]}, False),
        ({"providers": ["ON_PREMISE"]}, True),
        ({"regions": ["eu-west-1"]}, False),
        ({"vcpus": {"min": 3}}, False),
        ({"vcpus": {"min": 2, "max": 2}}, True),
        ({"ram": {"max": 3}}, False),
        ({"instancePricingPreference": "SPOT_ONLY"}, False),
        ({"instancePricingPreference": "SPOT_THEN_ON_DEMAND"}, True),
    ],
)
def test_matching(world: World, run: dict[str, Any], runs: bool) -> None:
    """A group's tasks run exactly where all of its constraints are met."""
    world.pool()
    work = world.work(run=run)
    task = world.add(work, task_type="bash")[0]
    assert (task.status == "ALLOCATED") is runs


@pytest.mark.parametrize(
    ("target", "workers"),
    [
        ({"targetType": "PER_NODE", "targetCount": 3}, 3),
        ({"targetType": "PER_VCPU", "targetCount": 1.5}, 3),
        ({"targetType": "PER_VCPU", "targetCount": 0.1}, 1),
        ({"targetType": "PER_NODE", "targetCount": 0}, 0),
        (None, 1),
    ],
)
def test_workers_per_node(world: World, target: dict[str, Any] | None, workers: int) -> None:
    """A node gets as many workers as createNodeWorkers says."""
    pool = world.pool(createNodeWorkers=target)
    assert [len(node.workers) for node in pool.nodes.values()] == [workers]


@pytest.mark.parametrize(
    ("run", "running"),
    [({"maxWorkers": 2}, 2), ({"tasksPerWorker": 3}, 2), ({"tasksPerWorker": 1}, 4), ({"minWorkers": 5}, 0)],
)
def test_claims_are_bounded(world: World, run: dict[str, Any], running: int) -> None:
    """maxWorkers and tasksPerWorker bound the claims; below minWorkers nothing starts."""
    world.pool(nodes=4, maxNodes=4)
    world.work(tasks=6, run=run)
    assert len(world.runs) == running


def test_min_workers_start_together(world: World) -> None:
    """A group starts when minWorkers are claimed, and keeps that many while it is open."""
    pool = world.pool(nodes=2, maxNodes=3)
    work = world.work(tasks=1, run={"minWorkers": 3}, finishIfAllTasksFinished=False)
    assert (len(world.runs), work.groups[0].status, pool.claimed) == (0, "PENDING", 2)
    world.register()
    assert (len(world.runs), work.groups[0].status, pool.claimed) == (1, "RUNNING", 3)
    world.end_task(work.groups[0].tasks[0])
    assert pool.claimed == 3
    world.scheduler.transition(work.id, "FINISHING", False, world.now)
    assert (work.status, pool.claimed) == ("COMPLETED", 0)


def test_a_machine_that_ends_keeps_no_worker_for_later(world: World) -> None:
    """A task goes to no worker that its group holds on a machine that is being ended, busy as that may be."""
    pool = world.pool(nodes=1, createNodeWorkers={"targetType": "PER_NODE", "targetCount": 2})
    work = world.work(tasks=1, run={"minWorkers": 2}, finishIfAllTasksFinished=False)
    world.start()
    assert [task.status for task in work.groups[0].tasks] == ["EXECUTING"]
    (instance,) = pool.requirement.instances
    world.scheduler.end_instances(pool.requirement.id, [instance], False, world.now)
    (task,) = world.scheduler.add_tasks(work.groups[0].id, [TaskSpec(name="later")], world.now)
    world.collect()
    assert task.status == "READY"


def test_circles_of_groups_are_refused(world: World) -> None:
    """Groups that would wait for one another for ever are named."""
    raw = {"taskTypes": ["bash"]}

    def group(name: str, *before: str) -> GroupSpec:
        return read_group({"name": name, "runSpecification": raw, "dependencies": [*before]}, 0)

    circle = [group("first", "third"), group("second", "first"), group("third", "second"), group("free")]
    text = refusal(world.scheduler.submit, "test", "round", circle, world.now).message
    assert text.startswith("Task groups depend on one another in a circle: ")
    for waits, awaited in (("first", "third"), ("second", "first"), ("third", "second")):
        assert f"{waits} -> {awaited}" in text
    assert not world.scheduler.works


def test_finishing_ignores_min_workers(world: World) -> None:
    """A group that never had its minWorkers runs with what there is once it is finishing."""
    pool = world.pool()
    work = world.work(tasks=2, run={"minWorkers": 3})
    assert (len(world.runs), pool.claimed) == (0, 1)
    world.scheduler.transition(work.id, "FINISHING", False, world.now)
    world.collect()
    for task in work.groups[0].tasks:
        world.end_task(task)
    assert (work.status, pool.claimed) == ("COMPLETED", 0)


@pytest.mark.parametrize(("how", "expected"), [("replace", {"B": "own"}), ("merge", {"A": "t", "B": "own"})])
def test_template_environment(how: Any, expected: dict[str, str]) -> None:
    """A task's own environment replaces its group's, or is laid over it, as the option says."""
    world = World(SchedulerOptions(template_environment=how))
    world.pool()
    template = {"taskType": "bash", "taskData": "echo", "environment": {"A": "t", "B": "t"}}
    work = world.work(taskTemplate=template)
    [task] = world.add(work, environment={"B": "own"})
    run = world.runs[str(task.run_id)]
    assert (run.environment, run.task_data) == (expected, "echo")


# ------------------------------------------------------------------------------ failures and retries


def test_failure_keeps_the_output(world: World) -> None:
    """A failed process leaves its exit code and its last lines; the requirement ends FAILED."""
    world.pool()
    work = world.work(tasks=1)
    task = work.groups[0].tasks[0]
    world.start()
    world.end_task(task, 3, "no such file\n")
    [error] = task.errors
    assert (task.status, error.error_type, error.exit_code, error.caused_failure) == (
        "FAILED",
        "PROCESS_NON_ZERO_EXIT",
        3,
        True,
    )
    assert error.error.startswith("Task process exited with non-zero exit code 3; ")
    assert error.error.endswith("\nno such file")
    assert work.status == "FAILED"


def test_any_failure_ends_the_group(world: World) -> None:
    """With finishIfAnyTaskFailed the waiting tasks are discarded, and the running ones end first."""
    world.pool(nodes=2)
    work = world.work(tasks=3, finishIfAnyTaskFailed=True)
    first, second, third = work.groups[0].tasks
    world.end_task(first, 1)
    assert (third.status, second.status, work.groups[0].status) == ("DISCARDED", "ALLOCATED", "FAILING")
    world.end_task(second)
    assert (work.groups[0].status, work.status) == ("FAILED", "FAILED")


@pytest.mark.parametrize(
    ("run", "code", "retried"),
    [
        ({"retryPolicy": {"maxRetries": 1}}, 1, True),
        ({"retryPolicy": {"maxRetries": 0}}, 1, False),
        ({"maximumTaskRetries": 1}, 1, True),
        ({"maximumTaskRetries": 1, "retryableErrors": [{"processExitCodes": [143]}]}, 1, False),
        ({"maximumTaskRetries": 1, "retryableErrors": [{"processExitCodes": [143]}]}, 143, True),
        ({"retryPolicy": LOST}, 1, False),
        (
            {
                "retryPolicy": {
                    "maxRetries": 1,
                    "retryErrors": {"excludes": [{"processExitCodes": {"includes": [137]}}]},
                }
            },
            137,
            False,
        ),
        (
            {
                "retryPolicy": {
                    "maxRetries": 1,
                    "retryErrors": {
                        "includes": [{"errorTypes": {"includes": ["PROCESS_NON_ZERO_EXIT"]}}],
                        "excludes": [{"processExitCodes": {"includes": [137]}}],
                    },
                }
            },
            1,
            True,
        ),
    ],
)
def test_retry_policy(world: World, run: dict[str, Any], code: int, retried: bool) -> None:
    """A failed attempt is repeated exactly where the policy selects its error and allows one more."""
    world.pool()
    work = world.work(tasks=1, run=run)
    task = work.groups[0].tasks[0]
    world.end_task(task, code)
    assert (task.status, task.retries) == (("ALLOCATED", 1) if retried else ("FAILED", 0))
    if retried:
        world.end_task(task, code)
        assert task.status == "FAILED"


def test_lost_node_is_replaced(world: World) -> None:
    """A task of a lost node is re-run, under the same id, on a node that its demand brings."""
    pool = world.pool(maxNodes=1)
    work = world.work(tasks=1, run={"retryPolicy": LOST})
    task = work.groups[0].tasks[0]
    world.start()
    world.lose(next(iter(world.up)))
    assert (task.status, task.errors[0].error_type) == ("READY", "ALLOCATION_LOST")
    assert (len(world.booting), pool.requirement.alive) == (1, 1)
    world.register()
    assert (task.status, task.retries, len(pool.nodes)) == ("ALLOCATED", 1, 2)
    assert [node.status for node in pool.nodes.values()] == ["LOST", "RUNNING"]


def test_lost_node_fails_without_policy(world: World) -> None:
    """Without a retry policy a task of a lost node has failed."""
    world.pool()
    work = world.work(tasks=1)
    world.lose(next(iter(world.up)))
    assert work.groups[0].tasks[0].status == "FAILED"


def test_failure_policy_resubmits(world: World) -> None:
    """A failed task is copied into the group that the failure policy names."""
    world.pool()
    groups = [
        {
            "name": "first",
            "runSpecification": {
                "taskTypes": ["bash"],
                "failurePolicy": {"resubmissionDestinations": [{"destinationTaskGroup": "second"}]},
            },
        },
        {"name": "second", "runSpecification": {"taskTypes": ["bash"]}},
    ]
    specs = [read_group(each, number) for number, each in enumerate(groups)]
    work = world.scheduler.submit("test", "work", specs, world.now)
    [task] = world.add(work, name="only")
    world.end_task(task, 1)
    [copy] = work.groups[1].tasks
    assert (task.status, task.resubmitted_to, copy.resubmitted_from) == ("RESUBMITTED", copy.id, task.id)
    world.end_task(copy)
    assert [group.status for group in work.groups] == ["COMPLETED", "COMPLETED"]


def test_task_that_cannot_start(world: World) -> None:
    """An attempt that could not be started is an error of its own kind."""
    world.pool()
    work = world.work(tasks=1)
    task = work.groups[0].tasks[0]
    run_id = str(task.run_id)
    del world.runs[run_id]
    world.event(TaskNotStarted(run_id, "no bash"))
    assert (task.status, task.errors[0].error_type, task.errors[0].error) == (
        "FAILED",
        "UNABLE_START_PROCESS",
        "no bash",
    )


def test_task_timeout(world: World) -> None:
    """A task's own timeout counts before its group's, from its start; the process is ended first."""
    world.pool()
    work = world.work(run={"taskTimeout": "PT1H"})
    [task] = world.add(work, timeout=60.0)
    world.pass_time(100)
    world.start()
    world.pass_time(59)
    assert not world.aborting
    world.pass_time(2)
    assert (world.aborting, task.status) == ({task.run_id}, "EXECUTING")
    world.end_task(task, 143)
    assert (task.status, task.errors[0].error_type) == ("FAILED", "TIMED_OUT")


def test_dependencies(world: World) -> None:
    """A dependent group waits with PENDING tasks until the other has completed."""
    world.pool()
    raw = {"taskTypes": ["bash"]}
    groups = [
        read_group({"name": "before", "runSpecification": raw}, 0),
        read_group({"name": "after", "runSpecification": raw, "dependencies": ["before"]}, 1),
    ]
    work = world.scheduler.submit("test", "work", groups, world.now)
    [first], [second] = world.add(work), world.add(work, group=1)
    assert second.status == "PENDING"
    world.end_task(first)
    assert second.status == "ALLOCATED"


def test_dependent_of_a_failed_group_fails(world: World) -> None:
    """A group whose dependency failed does not wait for ever."""
    world.pool()
    raw = {"taskTypes": ["bash"]}
    groups = [
        read_group({"name": "before", "runSpecification": raw}, 0),
        read_group({"name": "after", "runSpecification": raw, "dependentOn": "before"}, 1),
    ]
    work = world.scheduler.submit("test", "work", groups, world.now)
    [first], [second] = world.add(work), world.add(work, group=1)
    world.end_task(first, 1)
    assert (second.status, work.status) == ("DISCARDED", "FAILED")


# ------------------------------------------------------------------------------- the client's wishes


def test_hold_and_start(world: World) -> None:
    """A held requirement starts nothing and lets workers go; its running tasks go on."""
    pool = world.pool()
    work = world.work(tasks=2)
    first, second = work.groups[0].tasks
    world.scheduler.transition(work.id, "HELD", False, world.now)
    assert (work.groups[0].status, first.status) == ("HELD", "ALLOCATED")
    world.end_task(first)
    assert (second.status, pool.claimed) == ("READY", 0)
    world.scheduler.transition(work.id, "RUNNING", False, world.now)
    assert second.status == "ALLOCATED"


def test_finishing_takes_no_more(world: World) -> None:
    """A finishing requirement runs what it has and takes nothing more."""
    world.pool()
    work = world.work(tasks=2, finishIfAllTasksFinished=False)
    world.scheduler.transition(work.id, "FINISHING", False, world.now)
    assert "Cannot add tasks" in refusal(world.add, work).message
    for task in work.groups[0].tasks:
        world.end_task(task)
    assert work.status == "COMPLETED"


@pytest.mark.parametrize("abort", [True, False])
def test_cancel(world: World, abort: bool) -> None:
    """Cancelling ends waiting tasks at once; running ones only where it aborts."""
    world.pool()
    work = world.work(tasks=2)
    running, waiting = work.groups[0].tasks
    world.start()
    world.scheduler.transition(work.id, "CANCELLING", abort, world.now)
    world.collect()
    assert (waiting.status, running.status, work.status) == ("CANCELLED", "EXECUTING", "CANCELLING")
    assert bool(world.aborting) is abort
    world.end_task(running, 143 if abort else 0)
    assert (running.status, work.status) == ("ABORTED" if abort else "COMPLETED", "CANCELLED")


def test_cancel_can_be_sharpened(world: World) -> None:
    """A requirement that is being cancelled can still be told to abort, once."""
    world.pool()
    work = world.work(tasks=1)
    for _ in range(2):
        world.scheduler.transition(work.id, "CANCELLING", False, world.now)
    for _ in range(2):
        world.scheduler.transition(work.id, "CANCELLING", True, world.now)
    world.collect()
    assert len(world.aborting) == 1


def test_cancelled_task_is_not_retried(world: World) -> None:
    """A node that is lost while its task is being aborted does not bring the task back."""
    world.pool(maxNodes=2)
    work = world.work(tasks=1, run={"retryPolicy": LOST})
    world.scheduler.transition(work.id, "CANCELLING", True, world.now)
    world.lose(next(iter(world.up)))
    assert (work.groups[0].tasks[0].status, work.status) == ("ABORTED", "CANCELLED")


def test_cancel_one_task(world: World) -> None:
    """A waiting task is cancelled, a running one aborted on request; an ended one is refused."""
    world.pool()
    work = world.work(tasks=2, finishIfAllTasksFinished=False)
    running, waiting = work.groups[0].tasks
    assert refusal(world.scheduler.cancel_task, running.id, False, world.now).status == 403
    world.scheduler.cancel_task(waiting.id, False, world.now)
    world.scheduler.cancel_task(running.id, True, world.now)
    world.collect()
    world.end_task(running, 0)
    assert (waiting.status, running.status, work.status) == ("CANCELLED", "ABORTED", "RUNNING")
    assert refusal(world.scheduler.cancel_task, running.id, True, world.now).status == 403


@pytest.mark.parametrize("status", ["RUNNING", "COMPLETED", "CANCELLED", "NONSENSE"])
def test_illegal_transition(world: World, status: str) -> None:
    """What is no legal wish is refused with 403 and the words that clients look for."""
    work = world.work()
    caught = refusal(world.scheduler.transition, work.id, status, False, world.now)
    assert (caught.status, caught.error_type) == (403, "InvalidWorkRequirementStatusException")
    assert "invalid transition" in caught.message
    assert work.status == "RUNNING"


def test_update_appends_groups(world: World) -> None:
    """An update adds groups and changes priorities; it removes nothing and changes no specification."""
    work = world.work(tasks=1)
    raw = {"taskTypes": ["bash"], "workerTags": ["tag"]}
    old = {"name": "group", "runSpecification": raw, "priority": 7}
    new = {"name": "second", "runSpecification": raw}
    specs = [read_group(old, 0), read_group(new, 1)]
    world.scheduler.update(work.id, specs, world.now, "tag", 3)
    assert [group.spec.name for group in work.groups] == ["group", "second"]
    assert (work.priority, work.groups[0].priority, work.groups[1].id[-2:]) == (3, 7, ":2")
    assert "removed" in refusal(world.scheduler.update, work.id, specs[1:], world.now, None, 0).message
    changed = [read_group({**old, "runSpecification": {"taskTypes": ["other"]}}, 0), specs[1]]
    assert "changed" in refusal(world.scheduler.update, work.id, changed, world.now, None, 0).message


@pytest.mark.parametrize("what", ["pool", "work", "task", "requirement"])
def test_names_are_unique(world: World, what: str) -> None:
    """A name that is taken is refused in the words that clients look for."""
    world.pool()
    work = world.work()
    world.add(work, name="only")
    usage = Usage("test/small", "pool", "test", None, 1, None, {}, False, None)
    calls = {
        "pool": world.pool,
        "work": world.work,
        "task": lambda: world.add(work, name="only"),
        "requirement": lambda: world.scheduler.provision(usage, world.now),
    }
    words = "Task names must be unique within task group" if what == "task" else "already exists"
    caught = refusal(calls[what])
    assert words in caught.message
    assert caught.error_type == "InvalidRequestException"


def test_tasks_are_added_all_or_none(world: World) -> None:
    """Where one task of a call is refused, none is added."""
    work = world.work()
    specs = [TaskSpec(name="one"), TaskSpec(name="two"), TaskSpec(name="one")]
    refusal(world.scheduler.add_tasks, work.groups[0].id, specs, world.now)
    assert not work.groups[0].tasks


# ------------------------------------------------------------------------------------ ends of machines


def test_pool_shutdown_waits_for_tasks(world: World) -> None:
    """A shut-down pool ends with its last running task, and takes no other."""
    pool = world.pool(nodes=2, maxNodes=2)
    work = world.work(tasks=1)
    world.scheduler.shut_down_pool(pool.id, world.now)
    world.collect()
    assert (pool.status, world.stopping) == ("SHUTDOWN", set())
    [late] = world.add(work)
    assert late.status == "READY"
    world.end_task(work.groups[0].tasks[0])
    assert len(world.stopping) == 2
    assert pool.requirement.status == "TERMINATING"
    world.stop_all()
    assert (pool.status, pool.requirement.status) == ("TERMINATED", "TERMINATED")
    world.scheduler.shut_down_pool(pool.id, world.now)
    assert (pool.status, late.status) == ("TERMINATED", "READY")


def test_terminate_kills(world: World) -> None:
    """A terminated requirement is gone only when its machines say so; until then no task is re-run."""
    pool = world.pool()
    spare = world.pool(name="spare")
    work = world.work(tasks=1, run={"retryPolicy": LOST})
    task = work.groups[0].tasks[0]
    world.scheduler.transition_requirement(pool.requirement.id, "TERMINATED", world.now)
    world.collect()
    assert (pool.status, pool.requirement.status, task.status) == ("SHUTDOWN", "TERMINATING", "ALLOCATED")
    world.stop_all()
    assert (pool.status, pool.requirement.status) == ("TERMINATED", "TERMINATED")
    assert (task.status, spare.claimed) == ("ALLOCATED", 1)
    world.scheduler.transition_requirement(pool.requirement.id, "TERMINATED", world.now)


def test_process_killed_with_its_node(world: World) -> None:
    """A process that dies in a machine that was told to end was lost, and did not fail."""
    pool = world.pool()
    work = world.work(tasks=1)
    task = work.groups[0].tasks[0]
    world.scheduler.transition_requirement(pool.requirement.id, "TERMINATED", world.now)
    world.collect()
    world.end_task(task, 137)
    assert task.errors[0].error_type == "ALLOCATION_LOST"


def test_boot_failure_says_why(world: World) -> None:
    """A machine that cannot boot leaves its reason on the compute requirement."""
    pool = world.pool(register=False)
    [instance_id] = world.booting
    world.gone(instance_id, NodeFailed(instance_id, "no network"))
    requirement = pool.requirement
    assert (requirement.source_status, requirement.status, pool.status) == ("ERRORED", "RUNNING", "EMPTY")
    assert "no network" in str(requirement.source_message)
    assert requirement.instances[instance_id].status == "TERMINATED"


def test_boot_failures_are_not_repeated_at_once(world: World) -> None:
    """A pool whose machines cannot boot tries again after pauses that grow, as long as there is demand."""
    world.pool(register=False)
    world.work(tasks=1)
    pauses = []
    for _ in range(3):
        [instance_id] = world.booting
        world.gone(instance_id, NodeFailed(instance_id, "no network"))
        before = world.now
        while not world.booting:
            world.pass_time(1)
        pauses.append(world.now - before)
    assert pauses == [10, 20, 40]


def test_boot_timeout(world: World) -> None:
    """A machine that never registers is ended after nodeBootTimeout."""
    pool = world.pool(register=False, nodeBootTimeout="PT1M")
    world.pass_time(59)
    assert not world.stopping
    world.pass_time(2)
    assert len(world.stopping) == 1
    assert "60 s" in str(pool.requirement.source_message)


def test_idle_pool_ends_for_good(world: World) -> None:
    """A pool with no claimed worker for its idle time shuts down; a claim in between resets that."""
    pool = world.pool(idlePoolShutdown={"enabled": True, "timeout": "PT1M"})
    world.pass_time(50)
    work = world.work(tasks=2, finishIfAllTasksFinished=False)
    world.end_task(work.groups[0].tasks[0])
    world.pass_time(100)
    world.end_task(work.groups[0].tasks[1])
    world.pass_time(50)
    [last] = world.add(work)
    world.end_task(last)
    world.pass_time(59)
    assert pool.status == "IDLE"
    world.pass_time(2)
    assert pool.status == "SHUTDOWN"


@pytest.mark.parametrize(
    ("properties", "ends"),
    [
        ({}, True),
        ({"idlePoolShutdown": {"enabled": False}}, False),
        ({"idlePoolShutdown": {"timeout": "PT2H"}}, False),
    ],
)
def test_idle_pool_default(world: World, properties: dict[str, Any], ends: bool) -> None:
    """A pool that says nothing ends after ten idle minutes."""
    pool = world.pool(**properties)
    world.pass_time(601)
    assert pool.finished is ends


def test_idle_node_ends(world: World) -> None:
    """An idle node ends after its time, but not below minNodes."""
    pool = world.pool(nodes=3, minNodes=1, maxNodes=3, idleNodeShutdown={"enabled": True, "timeout": "PT1M"})
    world.pass_time(65)
    world.stop_all()
    assert pool.requirement.alive == 1
    world.pass_time(300)
    assert pool.requirement.alive == 1


def test_requirement_auto_shutdown(world: World) -> None:
    """A compute requirement's auto-shutdown ends it whatever runs, and counts anew when it is renewed."""
    pool = world.pool()
    work = world.work(tasks=1)
    requirement = pool.requirement
    world.scheduler.set_auto_shutdown(requirement.id, AutoShutdown(True, 60.0), world.now)
    world.pass_time(50)
    world.scheduler.set_auto_shutdown(requirement.id, AutoShutdown(True, 60.0), world.now)
    world.pass_time(50)
    assert requirement.status == "RUNNING"
    world.pass_time(20)
    world.stop_all()
    assert (requirement.status, work.groups[0].tasks[0].status) == ("TERMINATED", "FAILED")


def test_node_shutdown_is_graceful(world: World) -> None:
    """A node that is shut down ends with its running task and takes no other."""
    pool = world.pool(maxNodes=1)
    work = world.work(tasks=2)
    [node] = pool.nodes.values()
    world.scheduler.shut_down_node(node.id, world.now)
    world.collect()
    assert not world.stopping
    world.end_task(work.groups[0].tasks[0])
    assert world.stopping == {node.instance.id}
    assert work.groups[0].tasks[1].status == "READY"
    world.stop_all()
    world.register()
    assert work.groups[0].tasks[1].status == "ALLOCATED"


def test_resize(world: World) -> None:
    """A pool grows and shrinks on request, within its bounds, and not while it awaits nodes."""
    pool = world.pool(nodes=2, maxNodes=4)
    work = world.work(tasks=1)
    world.scheduler.resize_pool(pool.id, 4, world.now)
    world.collect()
    early = refusal(world.scheduler.resize_pool, pool.id, 1, world.now).message
    assert early == "Cannot resize worker pool whilst it is awaiting nodes"
    world.register()
    assert pool.requirement.alive == 4
    assert refusal(world.scheduler.resize_pool, pool.id, 5, world.now).status == 400
    world.scheduler.resize_pool(pool.id, 1, world.now)
    world.collect()
    assert len(world.stopping) == 3
    assert work.groups[0].tasks[0].worker is not None
    assert work.groups[0].tasks[0].worker.node.instance.id not in world.stopping


def test_demand_grows_a_pool(world: World) -> None:
    """READY tasks bring nodes up to maxNodes, counting those that boot already."""
    pool = world.pool(nodes=0, maxNodes=3, createNodeWorkers={"targetType": "PER_NODE", "targetCount": 2})
    assert pool.status == "EMPTY"
    work = world.work(tasks=3)
    assert len(world.booting) == 2
    world.add(work, 10)
    assert len(world.booting) == 3


def test_demand_is_not_met_twice(world: World) -> None:
    """Two pools that suit the same group do not both grow for the same task."""
    world.pool(name="one", nodes=0, maxNodes=5)
    world.pool(name="two", nodes=0, maxNodes=5)
    world.work(tasks=3)
    assert len(world.booting) == 3


def test_maintained_instances_are_replaced(world: World) -> None:
    """A stand-alone requirement with maintainInstanceCount replaces a lost machine."""
    usage = Usage("test/small", "alone", "test", None, 1, None, {}, True, None)
    requirement = world.scheduler.provision(usage, world.now)
    world.collect()
    world.register()
    world.lose(next(iter(world.up)))
    assert (requirement.alive, len(world.booting)) == (1, 1)


@pytest.mark.timeout(30)
def test_ten_thousand(world: World) -> None:
    """Ten thousand nodes and tasks take seconds: no event costs more for there being many."""
    count = 10_000
    scheduler = world.scheduler
    pool = scheduler.provision_pool(
        Usage("test/small", "pool", "test", None, count, None, {}, False, None),
        read_pool({"workerTag": "tag", "idleNodeShutdown": {"timeout": "PT1H"}}),
        world.now,
    )
    starts = [effect for effect in scheduler.take_effects() if isinstance(effect, StartNode)]
    work = world.work(run={"retryPolicy": LOST}, finishIfAllTasksFinished=False)
    scheduler.add_tasks(work.groups[0].id, [TaskSpec(name=f"task-{n}") for n in range(count)], world.now)
    for start in starts:
        scheduler.on_event(
            NodeRegistered(start.instance_id, start.hostname, "10.0.0.1", None, 2, 4), world.now
        )
    runs = [effect for effect in scheduler.take_effects() if isinstance(effect, StartTask)]
    for run in runs:
        scheduler.on_event(TaskStarted(run.run_id), world.now)
    assert work.groups[0].counts == {"EXECUTING": count}
    for run in runs[: count // 2]:
        scheduler.on_event(NodeLost(run.instance_id, "preempted"), world.now)
    assert work.groups[0].counts == {"EXECUTING": count // 2, "READY": count // 2}
    assert pool.requirement.alive == count
    scheduler.transition(work.id, "CANCELLING", True, world.now)
    for run in runs[count // 2 :]:
        scheduler.on_event(TaskExited(run.run_id, 143), world.now)
    assert work.status == "CANCELLED"


# ---------------------------------------------------------------------------------------- what is read

RUN = {"taskTypes": ["bash"]}


@pytest.mark.parametrize(
    ("read", "value", "names"),
    [
        (lambda v: read_group(v, 0), {"name": "g"}, "taskGroups[0].runSpecification"),
        (lambda v: read_group(v, 0), {"name": "Bad", "runSpecification": RUN}, "taskGroups[0].name"),
        (lambda v: read_group(v, 0), {"name": "x" * 61, "runSpecification": RUN}, "60"),
        (lambda v: read_group(v, 0), {"name": "gg", "runSpecification": {}}, "taskTypes"),
        (
            lambda v: read_group(v, 0),
            {"name": "gg", "runSpecification": {**RUN, "exclusive": 1}},
            "exclusive",
        ),
        (
            lambda v: read_group(v, 0),
            {"name": "gg", "runSpecification": {**RUN, "maxWorkers": "x"}},
            "maxWorkers",
        ),
        (lambda v: read_group(v, 0), {"name": "gg", "tag": "t" * 201, "runSpecification": RUN}, "200"),
        (lambda v: read_task(v, 4), {"data": {"inputs": [{}]}}, "tasks[4].data.inputs"),
        (lambda v: read_task(v, 4), {"environment": {"A": 1}}, "tasks[4].environment"),
        (lambda v: read_task(v, 4), {"timeout": "1 hour"}, "ISO-8601"),
        (lambda v: read_task(v, 4), [], "tasks[4]"),
        (read_pool, {"nodeConfiguration": {"nodeTypes": []}}, "nodeConfiguration"),
        (read_pool, {"createNodeWorkers": {"targetType": "CUSTOM"}}, "CUSTOM"),
        (read_pool, {"maxNodes": 10001}, "maxNodes"),
        (read_pool, {"minNodes": 2, "maxNodes": 1}, "maxNodes"),
        (read_usage, {"requirementName": "x1", "requirementNamespace": "ns"}, "templateId"),
        (read_usage, {"templateId": "t", "requirementName": "x1"}, "requirementNamespace"),
    ],
)
def test_wrong_input_is_named(read: Any, value: Any, names: str) -> None:
    """What is wrong or unsupported in a request is refused by its name."""
    caught = refusal(read, value)
    assert (caught.status, caught.error_type) == (400, "InvalidRequestException")
    assert names in caught.message


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("P0D", 0),
        ("PT0S", 0),
        ("PT3M", 180),
        ("P1DT2H1.5S", 93601.5),
        ("P1W", 604800),
        ("P", None),
        ("P1Y", None),
    ],
)
def test_durations_are_read(text: str, value: float | None) -> None:
    """ISO-8601 durations are read as seconds; years and months are no fixed span."""
    assert seconds(text) == value


@pytest.mark.parametrize("value", [0, 0.5, 4, 59.999, 60, 3661.25, 86400, 93601.5, 34560000])
def test_durations_are_written(value: float) -> None:
    """A duration that was written reads back the same."""
    assert seconds(str(duration(value))) == value


# -------------------------------------------------------------------------------------------- by chance

# From YellowDog's documentation of the life cycles, written down apart from the scheduler's own tables.
FINISHED = {"COMPLETED", "FAILED", "ABORTED", "CANCELLED", "DISCARDED", "RESUBMITTED"}
IN_PROGRESS = {"ALLOCATED", "EXECUTING"}
RUNS = st.fixed_dictionaries(
    {"workerTags": st.sampled_from([["tag"], ["tag", "other"], None])},
    optional={
        "minWorkers": st.integers(0, 2),
        "tasksPerWorker": st.integers(1, 2),
        "taskTimeout": st.just("PT1M"),
        "retryPolicy": st.sampled_from([LOST, {"maxRetries": 1}]),
    },
)
ENDS = [
    *("shutdown", "terminate", "resize", "resize", "resize", "node", "node", "node", "instance", "instance"),
    *("warned", "warned"),
]


class Chance(RuleBasedStateMachine):
    """Clients and machines do anything at any time; what must hold always holds."""

    @initialize(
        timeout_from=st.sampled_from(["executing", "allocated"]),
        nodes=st.lists(st.integers(0, 3), min_size=1, max_size=3),
        tasks=st.lists(st.integers(0, 5), min_size=1, max_size=3),
        data=st.data(),
    )
    def begin(self, timeout_from: Any, nodes: list[int], tasks: list[int], data: st.DataObject) -> None:
        self.world = World(SchedulerOptions(timeout_from=timeout_from, idle_node_shutdown=200))
        self.works: list[WorkRequirement] = []
        self.pools: list[Pool] = []
        self.ended: dict[str, str] = {}
        self.added = 0
        for number, count in enumerate(nodes):
            per_node = {"targetType": "PER_NODE", "targetCount": data.draw(st.sampled_from([1, 1, 2, 0]))}
            pool = self.world.pool(
                name=f"pool-{number}",
                nodes=count,
                register=data.draw(st.booleans()),
                workerTag=data.draw(st.sampled_from(["tag", "other"])),
                maxNodes=count + data.draw(st.integers(0, 2)),
                createNodeWorkers=per_node,
            )
            self.pools.append(pool)
        for count in tasks:
            self._submit(data)
            self._add(self.works[-1].groups[0].id, count)

    def _submit(self, data: st.DataObject) -> None:
        run = data.draw(RUNS)
        raw = [
            {
                "name": "first",
                "finishIfAnyTaskFailed": data.draw(st.booleans()),
                "finishIfAllTasksFinished": data.draw(st.booleans()),
            },
            {"name": "second", "dependencies": ["first"]},
            {"name": "third"},
        ]
        specs = [
            read_group({**each, "runSpecification": {"taskTypes": ["bash"], **run}}, number)
            for number, each in enumerate(raw)
        ]
        name = f"work-{len(self.works)}"
        self.works.append(self.world.scheduler.submit("test", name, specs, self.world.now))

    def _add(self, group_id: str, count: int) -> None:
        before = len(self.world.scheduler.tasks)
        self._try(self.world.scheduler.add_tasks, group_id, [TaskSpec()] * count, self.world.now)
        self.added += len(self.world.scheduler.tasks) - before

    def _try(self, call: Any, *args: Any) -> None:
        with contextlib.suppress(RefusedError):
            call(*args)
        self.world.collect()

    @rule(data=st.data(), count=st.integers(1, 4))
    def add_tasks(self, data: st.DataObject, count: int) -> None:
        groups = [group for work in self.works for group in work.groups if not group.terminated]
        if groups:
            self._add(data.draw(st.sampled_from(groups)).id, count)
        elif len(self.works) < 6:
            self._submit(data)

    @rule(
        data=st.data(),
        status=st.sampled_from(["HELD", "RUNNING", "RUNNING", "RUNNING", "FINISHING", "CANCELLING"]),
        abort=st.booleans(),
    )
    def transition(self, data: st.DataObject, status: str, abort: bool) -> None:
        work = data.draw(st.sampled_from(self.works))
        self._try(self.world.scheduler.transition, work.id, status, abort, self.world.now)

    @rule(data=st.data(), abort=st.booleans())
    def cancel(self, data: st.DataObject, abort: bool) -> None:
        tasks = sorted(self.world.scheduler.tasks)
        if tasks:
            self._try(
                self.world.scheduler.cancel_task, data.draw(st.sampled_from(tasks)), abort, self.world.now
            )

    @rule(data=st.data(), what=st.sampled_from(ENDS))
    def end_machines(self, data: st.DataObject, what: str) -> None:
        scheduler, now = self.world.scheduler, self.world.now
        pool = data.draw(st.sampled_from(self.pools))
        if what == "shutdown":
            self._try(scheduler.shut_down_pool, pool.id, now)
        elif what == "terminate":
            self._try(scheduler.transition_requirement, pool.requirement.id, "TERMINATED", now)
        elif what == "resize":
            self._try(scheduler.resize_pool, pool.id, data.draw(st.integers(0, 4)), now)
        elif what == "node" and pool.nodes:
            self._try(scheduler.shut_down_node, data.draw(st.sampled_from(sorted(pool.nodes))), now)
        elif what == "warned" and pool.nodes:
            node = pool.nodes[data.draw(st.sampled_from(sorted(pool.nodes)))]
            self._try(scheduler.cordon, node, now)
        elif what == "instance" and pool.requirement.instances:
            one = data.draw(st.sampled_from(sorted(pool.requirement.instances)))
            self._try(scheduler.end_instances, pool.requirement.id, [one], data.draw(st.booleans()), now)

    @rule(count=st.integers(1, 3))
    def register(self, count: int) -> None:
        self.world.register(count)

    @rule(data=st.data(), reason=st.sampled_from(["lost", "failed", "stopped"]))
    def machine_ends(self, data: st.DataObject, reason: str) -> None:
        world = self.world
        candidates = {"lost": world.up, "failed": set(world.booting), "stopped": world.stopping}[reason]
        if candidates:
            one = data.draw(st.sampled_from(sorted(candidates)))
            event = {"lost": NodeLost(one, "x"), "failed": NodeFailed(one, "x"), "stopped": NodeStopped(one)}
            world.gone(one, event[reason])

    @rule(boot=st.booleans())
    def go_on(self, boot: bool) -> None:
        if boot:
            self.world.register()
        self.world.start()

    @precondition(lambda self: self.world.runs)
    @rule(data=st.data(), code=st.sampled_from([0, 0, 1, 143]))
    def process_ends(self, data: st.DataObject, code: int) -> None:
        self.world.end(data.draw(st.sampled_from(sorted(self.world.runs))), code)

    @rule(data=st.data())
    def stale_event(self, data: st.DataObject) -> None:
        if self.world.seen_runs:
            run_id = data.draw(st.sampled_from(sorted(self.world.seen_runs)))
            if run_id not in self.world.runs:
                self.world.event(data.draw(st.sampled_from([TaskStarted(run_id), TaskExited(run_id, 0)])))

    @rule(span=st.sampled_from([1.0, 1.0, 30.0, 70.0, 250.0]))
    def pass_time(self, span: float) -> None:
        self.world.pass_time(span)

    @invariant()
    def nothing_is_lost(self) -> None:
        """Every task that was added is there, and exactly those in progress have an attempt."""
        if not hasattr(self, "world"):
            return
        tasks = self.world.scheduler.tasks
        assert len(tasks) == self.added
        running = {run.task_id for run in self.world.runs.values()}
        assert running == {task.id for task in tasks.values() if task.status in IN_PROGRESS}
        for task in tasks.values():
            if task.status in FINISHED:
                assert self.ended.setdefault(task.id, task.status) == task.status, "an ended task came back"
            else:
                assert task.id not in self.ended, "an ended task came back"

    @invariant()
    def counts_are_right(self) -> None:
        """Every counter that is kept says what counting says."""
        if not hasattr(self, "world"):
            return
        for work in self.works:
            assert work.open_groups == sum(not group.terminated for group in work.groups)
            for group in work.groups:
                for status in FINISHED | IN_PROGRESS | {"READY", "PENDING"}:
                    count = sum(task.status == status for task in group.tasks)
                    assert group.counts.get(status, 0) == count
                if group.terminated:
                    assert group.claimed == 0
                    assert all(task.status in FINISHED for task in group.tasks)
            if work.finished:
                assert all(group.terminated for group in work.groups)
        for pool in self.pools:
            workers = [worker for node in pool.nodes.values() for worker in node.workers]
            assert pool.claimed == sum(worker.group is not None for worker in workers)
            assert pool.busy == sum(worker.task is not None for worker in workers)
            up = [node for node in pool.nodes.values() if node.instance.status == "RUNNING"]
            assert pool.draining == sum(node.draining for node in up)
            assert pool.cordoned == sum(node.cordoned and not node.draining for node in up)
            for status in ("STOPPED", "RUNNING", "LOST", "SHUTDOWN"):
                assert pool.worker_counts.get(status, 0) == sum(w.status == status for w in workers)
            alive = [i for i in pool.requirement.instances.values() if i.status in ("PENDING", "RUNNING")]
            assert pool.requirement.alive == len(alive)
            if pool.status == "TERMINATED":
                machines = set(self.world.booting) | self.world.up
                assert machines.isdisjoint(pool.requirement.instances)

    @invariant()
    def nobody_idles(self) -> None:
        """No worker is free while a task that it may run is READY."""
        if not hasattr(self, "world"):
            return
        for pool in self.pools:
            for node in pool.nodes.values():
                if node.usable and any(worker.group is None for worker in node.workers):
                    for work in self.works:
                        for group in work.groups:
                            wants = group.active and group.counts.get("READY") and group.wanted() > 0
                            assert not (wants and group.may_use(node.shape)), (
                                "a worker idles beside a READY task"
                            )


Chance.TestCase.settings = settings(
    max_examples=100,
    stateful_step_count=60,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
TestChance = Chance.TestCase
TestChance.__doc__ = "Whatever clients and machines do, no task is lost or runs twice."
