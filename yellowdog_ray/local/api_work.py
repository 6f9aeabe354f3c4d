"""The part of the HTTP API that is about work: requirements, task groups, tasks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from yellowdog_ray.local import wire
from yellowdog_ray.local.asks import RefusedError
from yellowdog_ray.local.entities import Task, WorkRequirement
from yellowdog_ray.local.intake import read_task, read_work
from yellowdog_ray.local.sorting import SORT_TASKS, SORT_WORK
from yellowdog_ray.local.vocabulary import TASK_STATUSES, WORK_STATUSES
from yellowdog_ray.local.web import Action, Call, stream

__all__ = ["ROUTES"]


async def _submit(call: Call) -> Any:
    ask = read_work(await call.body())
    work = call.scheduler.submit(
        ask.namespace, ask.name, ask.groups, call.now, tag=ask.tag, priority=ask.priority
    )
    call.core.changed()
    return wire.work_json(work)


async def _update_work(call: Call) -> Any:
    ask = read_work(await call.body())
    if ask.id is None:
        raise RefusedError.invalid("workRequirement.id is required")
    known = call.scheduler.work(ask.id)
    if (known.namespace, known.name) != (ask.namespace, ask.name):
        raise RefusedError.invalid("A work requirement's namespace and name cannot be changed")
    work = call.scheduler.update(ask.id, ask.groups, call.now, ask.tag, ask.priority)
    call.core.changed()
    return wire.work_json(work)


async def _works(call: Call) -> Any:
    named, statuses = call.named(tagged=True), call.words("statuses", WORK_STATUSES)
    healthy = call.flag("isHealthy")
    created, changed = call.within("createdTime"), call.within("statusChangedTime")

    def wanted(work: WorkRequirement) -> bool:
        return (
            named(work.namespace, work.name, work.tag)
            and (not statuses or work.status in statuses)
            and created(work.created)
            and changed(work.changed)
            and (healthy is None or wire.work_healthy(work) == healthy)
        )

    return call.slice(call.scheduler.works.values(), wanted, wire.work_summary, SORT_WORK, bare=True)


async def _work(call: Call) -> Any:
    return wire.work_json(call.scheduler.work(call.path("id")))


async def _work_named(call: Call) -> Any:
    return wire.work_json(call.scheduler.work_named(call.path("namespace"), call.path("name")))


async def _transition_work(call: Call) -> Any:
    abort = bool(call.flag("abort"))
    work = call.scheduler.transition(call.path("id"), call.path("status"), abort, call.now)
    call.core.changed()
    return wire.work_json(work)


async def _work_updates(call: Call) -> Any:
    work = call.scheduler.work(call.path("id"))
    return stream(call.core, lambda: (wire.work_json(work), work.finished))


async def _add_tasks(call: Call, group_id: str) -> Any:
    value = await call.body()
    if value is not None and not isinstance(value, list):
        raise RefusedError.invalid("The request body must be a list of tasks")
    specs = [read_task(each, number) for number, each in enumerate(value or [])]
    tasks = call.scheduler.add_tasks(group_id, specs, call.now)
    call.core.changed()
    return [wire.task_json(task) for task in tasks]


async def _add_tasks_by_id(call: Call) -> Any:
    return await _add_tasks(call, call.path("id"))


async def _add_tasks_by_name(call: Call) -> Any:
    work = call.scheduler.work_named(call.path("namespace"), call.path("name"))
    group = work.by_name.get(call.path("group"))
    if group is None:
        raise RefusedError.not_found(
            f"no task group {call.path('group')!r} in work requirement {work.name!r}"
        )
    return await _add_tasks(call, group.id)


async def _task(call: Call) -> Any:
    return wire.task_json(call.scheduler.task(call.path("id")))


async def _cancel_task(call: Call) -> Any:
    task = call.scheduler.cancel_task(call.path("id"), bool(call.flag("abort")), call.now)
    call.core.changed()
    return wire.task_json(task)


async def _tasks(call: Call) -> Any:
    scheduler = call.scheduler
    work_id, group_id = call.query("workRequirementId"), call.query("taskGroupId")
    name, tag, prefix = call.query("name"), call.query("tag"), call.query("tagStartsWith")
    statuses, has_errors = call.words("statuses", TASK_STATUSES), call.flag("hasErrors")
    started, finished = call.within("startedTime"), call.within("finishedTime")
    # No task has data here: see read_task.
    has_data = bool(call.flag("hasInputs")) or bool(call.flag("hasOutputs"))
    if group_id is not None:
        group = scheduler.group(group_id)
        tasks = group.tasks if work_id in (None, group.work.id) else []
    elif work_id is not None:
        tasks = [task for group in scheduler.work(work_id).groups for task in group.tasks]
    else:
        tasks = list(scheduler.tasks.values())

    def wanted(task: Task) -> bool:
        return (
            not has_data
            and call.matches(name, task.spec.name)
            and call.matches(tag, task.spec.tag)
            and (prefix is None or (task.spec.tag or "").startswith(prefix))
            and (not statuses or task.status in statuses)
            and (has_errors is None or bool(task.errors) == has_errors)
            and started(task.started)
            and finished(task.finished)
        )

    return call.slice(tasks, wanted, wire.task_json, SORT_TASKS)


ROUTES: Mapping[tuple[str, str], Action] = {
    ("POST", "/work/requirements"): _submit,
    ("PUT", "/work/requirements"): _update_work,
    ("GET", "/work/requirements"): _works,
    ("GET", "/work/requirements/{id}"): _work,
    ("GET", "/work/namespaces/{namespace}/requirements/{name}"): _work_named,
    ("PUT", "/work/requirements/{id}/transition/{status}"): _transition_work,
    ("GET", "/work/requirements/{id}/updates"): _work_updates,
    ("POST", "/work/taskGroups/{id}/tasks"): _add_tasks_by_id,
    ("POST", "/work/namespaces/{namespace}/requirements/{name}/taskGroups/{group}/tasks"): _add_tasks_by_name,
    ("GET", "/work/tasks/{id}"): _task,
    ("PUT", "/work/tasks/{id}/cancel"): _cancel_task,
    ("GET", "/work/tasks"): _tasks,
}
