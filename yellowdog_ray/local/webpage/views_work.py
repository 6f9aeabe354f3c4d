"""The pages of work requirements, task groups and tasks."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection

from yellowdog_ray.local.asks import RunSpec
from yellowdog_ray.local.entities import (
    Task,
    WorkRequirement,
)
from yellowdog_ray.local.webpage.parts import (
    ROWS,
    Ask,
    Cell,
    Page,
    Table,
    counted,
    listing,
    span,
    status,
    when,
)
from yellowdog_ray.local.webpage.site import (
    LATEST,
    NO_WORK,
    Site,
    plain,
    reason,
    task_name,
)

__all__ = ["WorkViews"]

_MAX_TEXT = 65_536


class WorkViews(Site):
    """What there is to do."""

    def _node_of(self, task: Task) -> Cell:
        return self._link(self._scheduler.nodes.get(task.node_id or ""))

    def works(self, ask: Ask) -> Page:
        """List the work requirements."""

        def row(work: WorkRequirement) -> list[Cell]:
            counts: Counter[str] = Counter()
            for group in work.groups:
                counts.update(group.counts)
            return [
                self._link(work), status(work.status), when(work.created), when(work.changed),
                Cell(str(len(work.groups))), counted(counts),
            ]  # fmt: skip

        table = listing(
            ask,
            self._at("work"),
            self._scheduler.works.values(),
            lambda work: f"{work.namespace}/{work.name}",
            ("Name", "Status", "Created", "Status since", "Task groups", "Tasks"),
            row,
            empty=NO_WORK,
        )
        return Page("Work requirements", "work", tables=[table])

    def work(self, ask: Ask) -> Page | None:
        """Show a work requirement with its task groups."""
        work = self._scheduler.works.get(ask.id)
        if work is None:
            return None
        facts = [
            ("Status", status(work.status)),
            ("Status since", when(work.changed)),
            ("Created", when(work.created)),
            ("Namespace", Cell(work.namespace)),
            ("Tag", Cell(work.tag or "none")),
            ("Priority", Cell(f"{work.priority:g}")),
            ("Id", Cell(work.id)),
        ]
        shown = work.groups[:ROWS]
        rows = [
            [
                self._link(group), status(group.status), Cell(f"{len(group.tasks):,}"), counted(group.counts),
                Cell(", ".join(sorted(group.spec.run.worker_tags)) or "any"),
                Cell(", ".join(group.spec.dependencies) or "none"),
            ]
            for group in shown
        ]  # fmt: skip
        groups = Table(
            "Task groups",
            ("Name", "Status", "Number of tasks", "Tasks by status", "Worker tags", "After"),
            rows,
            [group.id for group in shown],
            "It has no task group. Add one by updating the requirement.",
        )
        notes = [f"The first {ROWS} of {len(work.groups):,} groups."] if len(work.groups) > ROWS else []
        crumbs = [Cell("Work requirements", self._at("work"))]
        return Page(work.name, "work", crumbs, facts, [groups, self._failed(work)], notes=notes)

    def _failed(self, work: WorkRequirement) -> Table:
        """Show the tasks of a requirement that failed, with the reason."""
        failed = [
            task
            for group in work.groups
            if group.counts.get("FAILED") or group.counts.get("ABORTED")
            for task in group.tasks
            if task.status in ("FAILED", "ABORTED")
        ]
        failed.sort(key=lambda task: task.finished or 0, reverse=True)
        shown = failed[:LATEST]
        rows = [
            [
                self._link(task), self._link(task.group), status(task.status), when(task.finished),
                self._node_of(task), reason(task),
            ]
            for task in shown
        ]  # fmt: skip
        return Table(
            f"Failed tasks, the latest {LATEST} of {len(failed):,}" if failed[LATEST:] else "Failed tasks",
            ("Name", "Group", "Status", "Finished", "Node", "Why"),
            rows,
            [task.id for task in shown],
            "No task of it has failed.",
        )

    def group(self, ask: Ask) -> Page | None:
        """Show a task group with its tasks."""
        group = self._scheduler.groups.get(ask.id)
        if group is None:
            return None
        run, spec = group.spec.run, group.spec
        facts = [
            ("Status", status(group.status)),
            ("Status since", when(group.changed)),
            ("Tasks", counted(group.counts)),
            ("Workers claimed", Cell(str(group.claimed))),
            ("Needs", Cell(_needs(run))),
            ("Workers", Cell(_workers(run))),
            ("Task timeout", Cell("none" if run.timeout is None else f"{run.timeout:g} s")),
            ("Retries of a task", Cell(str(run.max_retries))),
            ("Starts after", Cell(", ".join(spec.dependencies) or "nothing else")),
            ("Tag", Cell(group.tag or "none")),
            ("Id", Cell(group.id)),
        ]
        notes = []
        if group.starved:
            notes.append(
                "Its tasks wait for a worker: none that suits is free. Look at the worker pools, whether one "
                "has the tag and the task types that it needs, and whether its nodes come."
            )
        table = self._task_table(ask, self._at("groups", group.id), group.tasks, newest_first=False)
        if not group.tasks:
            table = Table("Tasks", (), (), (), "It has no task yet. Add tasks to it.")
        crumbs = [Cell("Work requirements", self._at("work")), self._link(group.work)]
        return Page(spec.name, "work", crumbs, facts, [table], notes=notes)

    def tasks(self, ask: Ask) -> Page:
        """List the tasks of all groups."""
        everything = self._scheduler.tasks
        table = self._task_table(ask, self._at("tasks"), everything.values(), newest_first=True)
        if not everything:
            table = Table("Tasks", (), (), (), f"There is no task yet. {NO_WORK}")
        return Page("Tasks", "tasks", tables=[table])

    def _task_table(self, ask: Ask, action: str, tasks: Collection[Task], *, newest_first: bool) -> Table:
        def row(task: Task) -> list[Cell]:
            return [
                self._link(task),
                *([self._link(task.group.work), self._link(task.group)] if newest_first else []),
                status(task.status), when(task.started), span(task.started, task.finished),
                self._node_of(task), reason(task),
            ]  # fmt: skip

        place = ("Work requirement", "Group") if newest_first else ()
        return listing(
            ask,
            action,
            tasks,
            task_name,
            ("Name", *place, "Status", "Started", "Took", "Node", "Why it failed"),
            row,
            heading="Newest first" if newest_first else "Tasks",
            newest_first=newest_first,
        )

    def task(self, ask: Ask) -> Page | None:
        """Show a task with its attempts and its output."""
        task = self._scheduler.tasks.get(ask.id)
        if task is None:
            return None
        spec, group = task.spec, task.group
        facts = [
            ("Status", status(task.status)),
            ("Why it failed", reason(task)),
            ("Node", self._node_of(task)),
            ("Allocated", when(task.allocated)),
            ("Started", when(task.started)),
            ("Finished", when(task.finished)),
            ("Took", span(task.started, task.finished)),
            ("Attempts", Cell(str(task.attempts))),
            ("Task type", Cell(task.task_type or "none")),
            ("Arguments", Cell(" ".join(spec.arguments or ()) or "none")),
            ("Environment variables", Cell(", ".join(sorted(spec.environment or ())) or "none")),
            ("Tag", Cell(spec.tag or "none")),
            ("Id", Cell(task.id)),
        ]
        if task.status not in ("FAILED", "ABORTED"):
            del facts[1]
        rows = [
            [
                when(error.time), Cell(error.error_type),
                Cell("" if error.exit_code is None else str(error.exit_code)),
                self._link(self._scheduler.nodes.get(error.node_id or "")),
                Cell(plain(error.error), kind="lines"),
            ]
            for error in reversed(task.errors)
        ]  # fmt: skip
        errors = Table(
            "Errors, newest first",
            ("Time", "Kind", "Exit code", "Node", "What went wrong"),
            rows,
            # From the oldest on: a row's key stays the same when another comes.
            [str(number) for number in reversed(range(len(task.errors)))],
            "No attempt of it has failed.",
        )
        heading, output = self._output(task)
        data = spec.task_data if spec.task_data is not None else group.spec.task_data
        texts = [(heading, output)]
        if data:
            cut = len(data) > _MAX_TEXT
            texts.append(("Task data" + (", its beginning" if cut else ""), data[:_MAX_TEXT]))
        crumbs = [Cell("Work requirements", self._at("work")), self._link(group.work), self._link(group)]
        version = hashlib.sha256(output.encode(errors="replace")).hexdigest()[:16]
        return Page(task_name(task), "work", crumbs, facts, [errors], texts, version=version)

    def _output(self, task: Task) -> tuple[str, str]:
        """Return a heading and the end of what a task has printed, as far as that is known."""
        instance = None if task.worker is None else task.worker.node.instance
        if instance is not None and self._read_output is not None:
            found = self._read_output(task.id, instance.id)
            if found is not None:
                text = found.decode(errors="replace")
                return "Output so far", plain(text) or "It has printed nothing yet."
        tail = self._core.outputs.get(task.run_name)
        if task.worker is None and (tail or (tail is not None and self._read_output is not None)):
            return "The end of its output", plain(tail) or "It has printed nothing."
        if task.status in ("PENDING", "READY", "ALLOCATED") or (instance is None and task.started is None):
            return "Output", "It has not started." if task.finished is None else "It never started."
        if self._read_output is None:
            return "Output", "The nodes of this platform are simulated: nothing runs, and nothing is printed."
        if task.finished is None:
            return "Output", "It cannot be read on the node."
        return "Output", (
            "It is not known any more. A node deletes a task's output with the task, and the platform "
            "remembers the end of the latest ones, for as long as it runs; of a task that failed it is among "
            "the errors."
        )


def _needs(run: RunSpec) -> str:
    parts = [f"task types {', '.join(sorted(run.task_types))}"]
    for label, values in (
        ("worker tags", run.worker_tags),
        ("instance types", run.instance_types),
        ("providers", run.providers),
        ("regions", run.regions),
        ("namespaces", run.namespaces),
    ):
        if values:
            parts.append(f"{label} {', '.join(sorted(values))}")
    for label, bounds in (("virtual CPUs", run.vcpus), ("GiB of memory", run.ram)):
        if bounds.low is not None:
            parts.append(f"at least {bounds.low:g} {label}")
        if bounds.high is not None:
            parts.append(f"at most {bounds.high:g} {label}")
    return "; ".join(parts)


def _workers(run: RunSpec) -> str:
    most = "any number" if run.max_workers is None else str(run.max_workers)
    each = "" if run.tasks_per_worker is None else f", {run.tasks_per_worker} tasks each"
    return f"{run.min_workers} to {most}{each}"
