"""The work side of the scheduler: work requirements, task groups, tasks."""

from __future__ import annotations

import graphlib
from collections.abc import Callable, Mapping, Sequence

from yellowdog_ray.local.asks import GroupSpec, RefusedError, TaskSpec
from yellowdog_ray.local.engine import Engine, SchedulerOptions
from yellowdog_ray.local.entities import Task, TaskError, TaskGroup, Worker, WorkRequirement
from yellowdog_ray.local.events import AbortTask
from yellowdog_ray.local.fields import MAX_GROUPS
from yellowdog_ray.local.lifecycle import GROUP_NEXT, TASK_NEXT, WORK_NEXT, illegal
from yellowdog_ray.local.machines import find
from yellowdog_ray.local.selections import matches_deprecated, selects

__all__ = ["Work"]


class Work(Engine):
    """Keeps the work, and decides what becomes of a task that ended."""

    def __init__(
        self, options: SchedulerOptions | None = None, new_uuid: Callable[[], str] | None = None
    ) -> None:
        super().__init__(options, new_uuid)
        self.works: dict[str, WorkRequirement] = {}
        self.groups: dict[str, TaskGroup] = {}
        self.tasks: dict[str, Task] = {}
        self._work_names: dict[tuple[str, str], WorkRequirement] = {}
        # Groups that have READY tasks and may run them, by worker tag (None: any).
        self._waiting: dict[str | None, dict[str, TaskGroup]] = {}
        self._dirty_groups: dict[str, TaskGroup] = {}

    # What the layer above does with workers.

    def _release(self, worker: Worker, now: float) -> None:
        raise NotImplementedError

    # ------------------------------------------------------------------------------ requirements

    def submit(
        self,
        namespace: str,
        name: str,
        groups: Sequence[GroupSpec],
        now: float,
        *,
        tag: str | None = None,
        priority: float = 0,
    ) -> WorkRequirement:
        """Take in a work requirement; tasks follow by `add_tasks`."""
        key = (namespace, name)
        older = self._work_names.get(key)
        if older is not None and not (self.options.reuse_finished_names and older.finished):
            raise RefusedError.invalid(f"A work requirement {namespace}/{name} already exists")
        _check_groups(groups)
        work = WorkRequirement(self._ydid("workreq"), namespace, name, tag, priority, now, now)
        self.works[work.id] = self._work_names[key] = work
        self._mark(work)
        for spec in groups:
            self._add_group(work, spec, now)
        self._settle(now)
        return work

    def update(
        self, work_id: str, groups: Sequence[GroupSpec], now: float, tag: str | None, priority: float
    ) -> WorkRequirement:
        """Take over a changed work requirement: its tag, priorities, and groups that are new."""
        work = self.work(work_id)
        if work.status not in ("RUNNING", "HELD"):
            raise RefusedError.invalid(f"Cannot update work requirement in status {work.status}")
        fresh = [spec for spec in groups if spec.name not in work.by_name]
        gone = set(work.by_name) - {spec.name for spec in groups}
        if gone:
            raise RefusedError.invalid(f"Task groups cannot be removed: {', '.join(sorted(gone))}")
        _check_groups(groups)
        for spec in groups:
            group = work.by_name.get(spec.name)
            if group is not None and _fixed(spec) != _fixed(group.spec):
                raise RefusedError.invalid(
                    f"Task group {spec.name}: only its priority and tag can be changed"
                )
        work.tag, work.priority = tag, priority
        self._mark(work)
        for spec in groups:
            group = work.by_name.get(spec.name)
            if group is not None:
                group.priority, group.tag = spec.priority, spec.tag
                self._mark(group)
        for spec in fresh:
            self._add_group(work, spec, now)
        self._settle(now)
        return work

    def _add_group(self, work: WorkRequirement, spec: GroupSpec, now: float) -> None:
        number = len(work.groups) + 1
        group = TaskGroup(
            id=f"{work.id.replace(':workreq:', ':taskgrp:')}:{number}",
            work=work,
            spec=spec,
            number=number,
            priority=spec.priority,
            tag=spec.tag,
            changed=now,
            updated=now,
        )
        work.groups.append(group)
        work.by_name[spec.name] = self.groups[group.id] = group
        work.open_groups += 1
        self._mark(group)
        group.blocked = any(
            name not in work.by_name or work.by_name[name].status != "COMPLETED" for name in spec.dependencies
        )
        if work.status == "HELD":
            self._set_group(group, "HELD", now)
        self._dirty_groups[group.id] = group

    def transition(self, work_id: str, status: str, abort: bool, now: float) -> WorkRequirement:
        """Carry out a client's wish for a work requirement; ``abort`` only matters for CANCELLING."""
        work = self.work(work_id)
        # So that an abort can follow.
        again = status == work.status == "CANCELLING" and self.options.end_again == "accept"
        wished = status in ("HELD", "RUNNING", "FINISHING", "CANCELLING")
        if not again and (not wished or status not in WORK_NEXT.get(work.status, ())):
            raise RefusedError(
                403,
                "InvalidWorkRequirementStatusException",
                f"invalid transition from {work.status} to {status}",
            )
        if not again:
            self._set_work(work, status, now)
        for group in work.groups:
            if not group.terminated:
                self._transition_group(group, status, abort, now)
        self._review_work(work, now)
        self._settle(now)
        return work

    def _transition_group(self, group: TaskGroup, status: str, abort: bool, now: float) -> None:
        if status == "CANCELLING":
            if group.status != "CANCELLING":
                self._set_group(group, "CANCELLING", now)
            self._end_waiting(group, "CANCELLED", now)
            if abort:
                for task in group.tasks:
                    self._abort(task, now)
        elif group.status != "FAILING":
            self._set_group(group, "PENDING" if status == "RUNNING" else status, now)
        self._release_kept(group, now)
        self._review_group(group, now)

    # ------------------------------------------------------------------------------------- tasks

    def add_tasks(self, group_id: str, specs: Sequence[TaskSpec], now: float) -> list[Task]:
        """Add tasks to a group, all or none."""
        group = self.group(group_id)
        if group.work.status not in ("RUNNING", "HELD") or group.status not in ("PENDING", "RUNNING", "HELD"):
            raise RefusedError.invalid(
                f"Cannot add tasks: task group {group.spec.name} is {group.status} "
                f"and its work requirement {group.work.status}"
            )
        names = [spec.name for spec in specs if spec.name is not None]
        if len(set(names)) != len(names) or not group.names.isdisjoint(names):
            twice = next(name for name in names if name in group.names or names.count(name) > 1)
            raise RefusedError.invalid(f"Task names must be unique within task group: {twice}")
        for number, spec in enumerate(specs):
            kind = spec.task_type or group.spec.task_type
            if kind is None and len(group.spec.run.task_types) != 1:
                raise RefusedError.invalid(f"tasks[{number}].taskType is required")
            if kind is not None and kind not in group.spec.run.task_types:
                raise RefusedError.invalid(
                    f"tasks[{number}].taskType {kind!r} is not one of its group's: "
                    f"{', '.join(sorted(group.spec.run.task_types))}"
                )
        tasks = [self._add_task(group, spec, now) for spec in specs]
        self._settle(now)
        return tasks

    def _add_task(self, group: TaskGroup, spec: TaskSpec, now: float) -> Task:
        task = Task(
            id=f"{group.id.replace(':taskgrp:', ':task:')}:{len(group.tasks) + 1}",
            group=group,
            spec=spec,
            status="PENDING" if group.blocked else "READY",
        )
        group.tasks.append(task)
        if spec.name is not None:
            group.names.add(spec.name)
        group.counts[task.status] = group.counts.get(task.status, 0) + 1
        group.updated = now
        self.tasks[task.id] = task
        self._mark(group)
        self._mark(task)
        if task.status == "READY":
            group.ready.append(task)
        self._dirty_groups[group.id] = group
        return task

    def cancel_task(self, task_id: str, abort: bool, now: float) -> Task:
        """Cancel a task that waits, or abort one that runs."""
        task = self.task(task_id)
        if task.status in ("PENDING", "READY"):
            self._set_task(task, "CANCELLED", now)
            self._review_group(task.group, now)
        elif task.status in ("ALLOCATED", "EXECUTING") and abort:
            self._abort(task, now)
        else:
            raise RefusedError(
                403,
                "InvalidTaskStatusException",
                f"invalid transition from {task.status} to CANCELLED"
                + ("; a task in progress can be aborted" if task.worker is not None else ""),
            )
        self._settle(now)
        return task

    def _abort(self, task: Task, now: float) -> None:
        if task.worker is None or task.run_id is None or task.abort_requested is not None:
            return
        task.abort_requested = now
        self._mark(task)
        if not task.timed_out:
            self._effects.append(AbortTask(task.run_id, task.worker.node.instance.id))

    def _timeout_due(self, attempt: tuple[Task, str], now: float) -> None:
        task, run_id = attempt
        if task.run_id != run_id or task.worker is None or task.timed_out:
            return
        task.timed_out = True
        if task.abort_requested is None:
            self._effects.append(AbortTask(run_id, task.worker.node.instance.id))

    def _task_failed(self, task: Task, error_type: str, text: str, exit_code: int | None, now: float) -> None:
        """Decide what becomes of a task whose attempt failed: retry, resubmission, or FAILED."""
        group, run = task.group, task.group.spec.run
        error = TaskError(now, text, error_type, task.status, task.node_id, task.worker_id, exit_code)
        open_ = group.status in ("PENDING", "RUNNING", "HELD", "FINISHING")
        if (
            open_
            and task.retries < run.max_retries
            and selects(run.retry_errors, error)
            and matches_deprecated(run.retryable, error)
        ):
            task.errors.append(error)
            task.retries += 1
            task.node_id = task.worker_id = task.started = None
            self._set_task(task, "READY", now)
            return
        if open_:
            for name, selection in run.destinations:
                target = group.work.by_name.get(name)
                if target is None or not selects(selection, error):
                    continue
                if target.status not in ("PENDING", "RUNNING", "HELD") or task.spec.name in target.names:
                    break
                copy = self._add_task(target, task.spec, now)
                copy.resubmitted_from, task.resubmitted_to = task.id, copy.id
                task.errors.append(error)
                self._set_task(task, "RESUBMITTED", now)
                return
        task.errors.append(
            TaskError(now, text, error_type, task.status, task.node_id, task.worker_id, exit_code, True)
        )
        self._set_task(task, "FAILED", now)

    # ---------------------------------------------------------------------------- status changes

    def _set_task(self, task: Task, status: str, now: float) -> None:
        if status not in TASK_NEXT.get(task.status, ()):
            raise illegal("task", task.status, status)
        group = task.group
        group.counts[task.status] -= 1
        if not group.counts[task.status]:
            del group.counts[task.status]
        group.counts[status] = group.counts.get(status, 0) + 1
        group.updated = now
        task.status = status
        self._mark(group)
        self._mark(task)
        if status == "READY":
            group.ready.append(task)
        elif status not in ("ALLOCATED", "EXECUTING"):
            task.finished = now
        self._dirty_groups[group.id] = group

    def _set_group(self, group: TaskGroup, status: str, now: float) -> None:
        if status == group.status:
            return
        if status not in GROUP_NEXT.get(group.status, ()):
            raise illegal("task group", group.status, status)
        group.status, group.changed = status, now
        self._mark(group)
        self._dirty_groups[group.id] = group

    def _set_work(self, work: WorkRequirement, status: str, now: float) -> None:
        if status not in WORK_NEXT.get(work.status, ()):
            raise illegal("work requirement", work.status, status)
        work.status, work.changed = status, now
        self._mark(work)

    def _end_waiting(self, group: TaskGroup, status: str, now: float) -> None:
        if group.waiting:
            for task in group.tasks:
                if task.status in ("PENDING", "READY"):
                    self._set_task(task, status, now)
        group.ready.clear()

    def _release_kept(self, group: TaskGroup, now: float) -> None:
        """Let go of workers that a group holds idle, unless it may still use them."""
        if group.kept and not (group.active and group.status != "FINISHING"):
            for worker in list(group.kept.values()):
                self._release(worker, now)

    # ----------------------------------------------------------------------------------- reviews

    def _review_group(self, group: TaskGroup, now: float) -> None:
        """Let a group's status follow from its tasks and workers, and from the groups that it waits for."""
        before = group.status
        if group.blocked and not group.terminated:
            self._review_blocked(group, now)
        status, in_progress = group.status, group.in_progress
        unfinished, failed = in_progress + group.waiting, group.counts.get("FAILED", 0)
        if status in ("PENDING", "RUNNING", "FINISHING"):
            done = unfinished == 0 and (
                status == "FINISHING" or (group.spec.finish_when_done and len(group.tasks) > 0)
            )
            if (failed and group.spec.finish_when_failed) or (done and failed):
                self._end_waiting(group, "DISCARDED", now)
                self._set_group(group, "FAILING", now)
            elif done:
                self._set_group(group, "COMPLETED", now)
            elif status != "FINISHING":
                started = group.claimed > 0 and group.claimed >= group.min_workers
                self._set_group(group, "RUNNING" if started or in_progress else "PENDING", now)
        if group.status == "FAILING" and in_progress == 0:
            self._set_group(group, "FAILED", now)
        elif group.status == "CANCELLING" and in_progress == 0:
            self._set_group(group, "CANCELLED", now)
        self._release_kept(group, now)
        if group.terminated and before != group.status:
            group.work.open_groups -= 1
            self._review_dependents(group, now)
            self._review_work(group.work, now)

    def _review_dependents(self, group: TaskGroup, now: float) -> None:
        for other in group.work.groups:
            if other.blocked and not other.terminated and group.spec.name in other.spec.dependencies:
                self._review_group(other, now)

    def _review_blocked(self, group: TaskGroup, now: float) -> None:
        """Let a group go on whose dependencies have all completed, or fail where one of them has failed.

        A held group fails when it is started again, as it would for a task of its own.
        """
        others = [group.work.by_name.get(name) for name in group.spec.dependencies]
        statuses = {None if other is None else other.status for other in others}
        if statuses == {"COMPLETED"}:
            group.blocked = False
            for task in group.tasks:
                if task.status == "PENDING":
                    self._set_task(task, "READY", now)
            self._dirty_groups[group.id] = group
        elif (
            "FAILED" in statuses and self.options.fail_dependents and group.status in ("PENDING", "FINISHING")
        ):
            self._end_waiting(group, "DISCARDED", now)
            self._set_group(group, "FAILING", now)

    def _review_work(self, work: WorkRequirement, now: float) -> None:
        if work.open_groups or work.finished or work.status == "HELD":
            return
        if work.status == "CANCELLING":
            self._set_work(work, "CANCELLED", now)
        elif work.groups or work.status == "FINISHING":
            failed = any(group.status == "FAILED" for group in work.groups)
            self._set_work(work, "FAILED" if failed else "COMPLETED", now)

    # ------------------------------------------------------------------------------- the past

    def remember_work(self, thing: WorkRequirement | TaskGroup | Task) -> None:
        """Take in what has ended in an earlier life of the platform, after what it belongs to."""
        if isinstance(thing, WorkRequirement):
            self.works[thing.id] = self._work_names[thing.namespace, thing.name] = thing
        elif isinstance(thing, TaskGroup):
            thing.work.groups.append(thing)
            thing.work.by_name[thing.spec.name] = self.groups[thing.id] = thing
        else:
            group = thing.group
            group.tasks.append(thing)
            if thing.spec.name is not None:
                group.names.add(thing.spec.name)
            group.counts[thing.status] = group.counts.get(thing.status, 0) + 1
            self.tasks[thing.id] = thing

    # ---------------------------------------------------------------------------------- look-ups

    def work(self, work_id: str) -> WorkRequirement:
        """Find a work requirement by its id."""
        return find(self.works, work_id, "work requirement")

    def work_named(self, namespace: str, name: str) -> WorkRequirement:
        """Find a work requirement by its name."""
        return find(self._work_names, (namespace, name), "work requirement")

    def group(self, group_id: str) -> TaskGroup:
        """Find a task group by its id."""
        return find(self.groups, group_id, "task group")

    def task(self, task_id: str) -> Task:
        """Find a task by its id."""
        return find(self.tasks, task_id, "task")


def _fixed(spec: GroupSpec) -> tuple[object, ...]:
    """Return the part of a group's description that stands for good."""
    return (
        spec.run,
        # It changes nothing here, but is shown.
        bool(spec.run.json.get("disablePreallocation")),
        spec.dependencies,
        spec.finish_when_done,
        spec.finish_when_failed,
        spec.task_type,
        spec.task_data,
        spec.environment,
        spec.completed_task_ttl,
    )


def _check_groups(groups: Sequence[GroupSpec]) -> None:
    if len(groups) > MAX_GROUPS:
        raise RefusedError.invalid(
            f"A work requirement has at most {MAX_GROUPS} task groups, not {len(groups)}"
        )
    names = {spec.name for spec in groups}
    if len(names) != len(groups):
        raise RefusedError.invalid("Task group names must be unique within work requirement")
    for spec in groups:
        for name in spec.dependencies:
            if name not in names or name == spec.name:
                raise RefusedError.invalid(
                    f"Task group {spec.name} depends on {name!r}, which is no other group"
                )
    _check_order({spec.name: spec.dependencies for spec in groups})
    for spec in groups:
        for name, _ in spec.run.destinations:
            if name not in names or name == spec.name:
                raise RefusedError.invalid(
                    f"Task group {spec.name} resubmits to {name!r}, which is no other group"
                )


def _check_order(dependencies: Mapping[str, Sequence[str]]) -> None:
    """Refuse groups that wait for one another: they would do so for ever."""
    try:
        graphlib.TopologicalSorter(dependencies).prepare()
    except graphlib.CycleError as error:
        # The error lists each group before the one that waits for it.
        circle = " -> ".join(reversed(error.args[1]))
        raise RefusedError.invalid(f"Task groups depend on one another in a circle: {circle}") from None
