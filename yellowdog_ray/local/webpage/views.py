"""What the pages show: for each kind of thing a list of all, and a page of its own.

All of it is read on the platform's own loop, a hundred things at a time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace

from yellowdog_ray.local.entities import (
    ComputeRequirement,
    Instance,
    Node,
    Pool,
    Task,
    TaskGroup,
    WorkRequirement,
)
from yellowdog_ray.local.webpage.happened import Happening, newest
from yellowdog_ray.local.webpage.parts import (
    ROWS,
    Ask,
    Cell,
    Page,
    Pager,
    Table,
    counted,
    status,
    when,
)
from yellowdog_ray.local.webpage.site import (
    LATEST,
    NO_WORK,
    in_short,
    reason,
)
from yellowdog_ray.local.webpage.views_machines import MachineViews
from yellowdog_ray.local.webpage.views_work import WorkViews

__all__ = ["SECTIONS", "Views"]

SECTIONS = (
    ("", "Overview"),
    ("work", "Work requirements"),
    ("tasks", "Tasks"),
    ("pools", "Worker pools"),
    ("nodes", "Nodes"),
    ("compute", "Compute requirements"),
    ("events", "Events"),
)
"""The entries of the navigation, with their paths."""

_MAX_EVENTS = 1000


class Views(WorkViews, MachineViews):
    """All pages of one platform."""

    @property
    def by_path(self) -> Mapping[str, Callable[[Ask], Page | None]]:
        """The pages by their paths; for None there is no such thing."""
        return {
            "": self.overview,
            "work": self.works,
            "work/{id}": self.work,
            "groups/{id}": self.group,
            "tasks": self.tasks,
            "tasks/{id}": self.task,
            "pools": self.pools,
            "pools/{id}": self.pool,
            "nodes": self.nodes,
            "nodes/{id}": self.node,
            "compute": self.computes,
            "compute/{id}": self.compute,
            "events": self.events,
        }

    def overview(self, ask: Ask) -> Page:
        """Count everything, and tell what happened last."""
        scheduler = self._scheduler
        kinds = (
            ("Work requirements", "work", scheduler.works),
            ("Tasks", "tasks", scheduler.tasks),
            ("Worker pools", "pools", scheduler.pools),
            ("Nodes", "nodes", scheduler.nodes),
            ("Compute requirements", "compute", scheduler.requirements),
        )
        rows = []
        for label, path, things in kinds:
            statuses = Counter(thing.status for thing in things.values())
            rows.append([Cell(label, self._at(path)), Cell(f"{len(things):,}"), counted(statuses)])
        there = Table(
            "What there is", ("Kind", "Number", "By status"), rows, [path for _, path, _ in kinds], ""
        )
        found = newest(scheduler, LATEST + 1)
        latest = self._happenings("Latest events", found[:LATEST])
        if len(found) > LATEST:
            latest = replace(latest, more=Cell("All events", self._at("events")))
        return Page("Overview", "", tables=[there, latest])

    def events(self, ask: Ask) -> Page:
        """Tell what happened, the newest first."""
        last = _MAX_EVENTS // ROWS
        page = min(ask.page, last)
        found = newest(self._scheduler, page * ROWS + 1)
        more = len(found) > page * ROWS
        pager = Pager(page, more and page < last, None, self._at("events"), filters=False)
        notes = [f"Only the newest {_MAX_EVENTS:,} events are shown."] if more and page == last else []
        table = self._happenings("Newest first", found[(page - 1) * ROWS : page * ROWS], pager)
        return Page("Events", "events", tables=[table], notes=notes)

    def _happenings(self, heading: str, found: list[Happening], pager: Pager | None = None) -> Table:
        kinds = {
            WorkRequirement: "Work requirement",
            TaskGroup: "Task group",
            Task: "Task",
            Pool: "Worker pool",
            Node: "Node",
            Instance: "Instance",
            ComputeRequirement: "Compute requirement",
        }
        rows, keys = [], []
        for each in found:
            thing = each.thing
            what = status(each.what) if each.what.isupper() else Cell(each.what)
            rows.append([when(each.time), Cell(kinds[type(thing)]), self._link(thing), what, _why(each)])
            keys.append(f"{thing.id} {each.what} {each.time}")
        return Table(
            heading, ("Time", "Kind", "Name", "What happened", "Why, or where"), rows, keys,
            f"Nothing has happened yet. {NO_WORK}", pager,
        )  # fmt: skip


def _why(happening: Happening) -> Cell:
    thing, error = happening.thing, happening.error
    if error is not None:
        return Cell(f"{error.error_type}: {in_short(error.error)}")
    if isinstance(thing, Task):
        return reason(thing) if happening.what.isupper() else Cell(f"in {thing.group.work.name}")
    if isinstance(thing, Instance):
        return Cell(in_short(thing.reason or ""))
    if isinstance(thing, Node):
        gone = happening.what in ("LOST", "TERMINATED")
        return Cell(in_short(thing.instance.reason or "") if gone else f"in {thing.pool.name}")
    if isinstance(thing, ComputeRequirement) and happening.what.isupper():
        return Cell(in_short(thing.source_message or ""))
    if isinstance(thing, TaskGroup):
        return Cell(f"in {thing.work.name}")
    return Cell("")
