"""What all pages share: the way to each thing's page, and how things are named and explained."""

from __future__ import annotations

import re
from collections.abc import Callable
from urllib.parse import quote

from yellowdog_ray.local.core import ControlPlane
from yellowdog_ray.local.entities import (
    ComputeRequirement,
    Instance,
    Node,
    Pool,
    Task,
    TaskGroup,
    WorkRequirement,
)
from yellowdog_ray.local.webpage.parts import Cell

__all__ = [
    "LATEST",
    "NO_POOL",
    "NO_WORK",
    "Site",
    "in_short",
    "plain",
    "reason",
    "task_name",
]

LATEST = 15
"""How many rows a table has that shows only what is latest."""
NO_WORK = (
    "There is no work requirement yet. Build a cluster (RayDogCluster(...).build()), or submit one with "
    "YellowDog's SDK or yellowdog-cli, with this platform's URL and application key."
)
NO_POOL = (
    "There is no worker pool yet. Building a cluster provisions one for its head and one for each group of "
    "workers."
)
_MAX_LINE = 200
# Colours and movements of the cursor.
_ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-Z\\-_])")


class Site:
    """The pages of one platform.

    :param base: the path that all of them are below.
    :param read_output: see :class:`~yellowdog_ray.local.webpage.front.Front`.
    """

    def __init__(
        self, core: ControlPlane, base: str, read_output: Callable[[str, str], bytes | None] | None
    ) -> None:
        self._core, self._scheduler = core, core.scheduler
        self._base, self._read_output = base, read_output

    def _at(self, *parts: str) -> str:
        return "/".join((self._base, *(quote(part, safe=":") for part in parts)))

    def _link(self, thing: object) -> Cell:
        """Name a thing, and lead to its page."""
        if isinstance(thing, WorkRequirement):
            return Cell(f"{thing.namespace}/{thing.name}", self._at("work", thing.id))
        if isinstance(thing, TaskGroup):
            return Cell(thing.spec.name, self._at("groups", thing.id))
        if isinstance(thing, Task):
            return Cell(task_name(thing), self._at("tasks", thing.id))
        if isinstance(thing, Pool):
            return Cell(f"{thing.namespace}/{thing.name}", self._at("pools", thing.id))
        if isinstance(thing, Node):
            return Cell(thing.instance.hostname, self._at("nodes", thing.id))
        if isinstance(thing, Instance):
            node = thing.node
            requirement = self._at("compute", thing.requirement.id)
            return Cell(thing.hostname, self._at("nodes", node.id) if node is not None else requirement)
        if isinstance(thing, ComputeRequirement):
            return Cell(f"{thing.usage.namespace}/{thing.usage.name}", self._at("compute", thing.id))
        return Cell("–")  # noqa: RUF001 - a dash is meant


def task_name(task: Task) -> str:
    """Name a task, which may have none of its own."""
    return task.spec.name or f"task {task.id.rpartition(':')[2]}"


def plain(text: str) -> str:
    """Return what a program has printed without what only a terminal understands."""
    return _ESCAPES.sub("", text).replace("\r\n", "\n").strip("\n")


def in_short(text: str) -> str:
    """Return a text in a line: the first one of it and, where a program's output follows, its last."""
    first, _, rest = plain(text).strip().partition("\n")
    last = rest.rpartition("\n")[2].strip()
    first = first.removesuffix("; the last lines of its output:")
    return _cut(f"{_cut(first)}: {_cut(last)}" if last else first)


def _cut(text: str) -> str:
    return text if len(text) <= _MAX_LINE else f"{text[:_MAX_LINE]}…"


def reason(task: Task) -> Cell:
    """Say why a task has come to nothing; it is empty for one that has not."""
    if task.status not in ("FAILED", "ABORTED") or not task.errors:
        return Cell("")
    error = task.errors[-1]
    return Cell(f"{error.error_type}: {in_short(error.error)}")
