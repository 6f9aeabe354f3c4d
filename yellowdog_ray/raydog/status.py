"""How a cluster is doing: typed values, as text, as JSON and as a table in a notebook."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime
from html import escape
from typing import Any

from yellowdog_ray.raydog.plan import Role

__all__ = ["ClusterStatus", "NodeFailure", "PoolStatus", "one_line"]

# How many failures of each pool are written out; to_dict() has all of them.
_FAILURES_SHOWN = 3

_COLUMNS = ("pool", "name", "wanted", "registered", "executing", "failed", "status")


def one_line(text: str) -> str:
    """Give the first line of a text that says something, without what a terminal would act upon."""
    first = next((line for line in text.splitlines() if line.strip()), "")
    return "".join(character if character.isprintable() else " " for character in first).strip()


@dataclass(frozen=True)
class NodeFailure:
    """A node whose task has ended although it should not have, or that could not come.

    :param task: the name of its task.
    :param reason: how it ended, and why.
    :param node_id: the node, where one is known.
    """

    task: str
    reason: str
    node_id: str | None = None


@dataclass(frozen=True)
class PoolStatus:
    """How one pool is doing.

    :param name: its name on the platform.
    :param wanted: how many nodes it is to have.
    :param registered: how many nodes have registered; None where the platform did not tell.
    :param executing: how many of its tasks are executing.
    :param failed: its tasks that have ended, with the reasons.
    :param status: the pool's own status on the platform, such as ``"RUNNING"``; None where it is not known.
    :param problem: why it can give no more nodes; None where it can.
    :param unfinished: how many of its tasks execute or wait for a node, and are not about to end; None where
        that is not known.
    """

    name: str
    internal_name: str
    role: Role
    id: str | None
    wanted: int
    registered: int | None
    executing: int
    failed: tuple[NodeFailure, ...] = ()
    status: str | None = None
    problem: str | None = None
    unfinished: int | None = None

    @property
    def missing(self) -> int:
        """How many nodes it is to have without a task: theirs has ended, and was not replaced."""
        if self.unfinished is None:
            return min(len(self.failed), self.wanted)
        # While a pool grows there are more tasks than it is to have yet.
        return max(0, self.wanted - self.unfinished)


@dataclass(frozen=True)
class ClusterStatus:
    """How a cluster is doing, at one moment.

    :param phase: what this process knows of its life: ``"running"``, ``"shut down"`` and so on.
    :param pools: every pool by its internal name: the head's (``"head-node"``) first, then the observability
        node's, then the worker pools in the order in which they were added.
    :param drift: what on the platform differs from what the cluster should be, a sentence each.
    :param failure: why the cluster has ended by itself; None where it has not.
    :param lifetime_ends: when the platform ends it; None where it has no limit.
    :param checked: when the platform was asked; None where it was not (before a build, after a shut-down).
    """

    cluster_name: str
    cluster_namespace: str
    phase: str
    work_requirement_id: str | None = None
    work_requirement_status: str | None = None
    head_private_ip: str | None = None
    head_public_ip: str | None = None
    pools: Mapping[str, PoolStatus] = field(default_factory=dict)
    drift: tuple[str, ...] = ()
    failure: str | None = None
    lifetime_ends: datetime | None = None
    checked: datetime | None = None

    def __str__(self) -> str:
        rows = [_COLUMNS, *self._rows()] if self.pools else []
        widths = [max(len(row[column]) for row in rows) for column in range(len(_COLUMNS))] if rows else []
        lines = [self._headline()]
        for row in rows:
            cells = [
                # What is counted is in columns 2 to 5.
                cell.rjust(width) if 2 <= column <= 5 else cell.ljust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            ]
            lines.append(f"  {'  '.join(cells)}".rstrip())
        lines += [f"  {note}" for note in self._notes()]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        # No colours of our own: a notebook's theme may be a dark one.
        head = "".join(f"<th>{escape(column)}</th>" for column in _COLUMNS)
        rows = "".join(
            f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in self._rows()
        )
        table = f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>" if rows else ""
        notes = "".join(f"<li>{escape(note)}</li>" for note in self._notes())
        return f"<div><p>{escape(self._headline())}</p>{table}{f'<ul>{notes}</ul>' if notes else ''}</div>"

    def to_dict(self) -> dict[str, Any]:
        """Give everything as values that can be written as JSON: the fields, the sums and ``healthy``.

        Points in time are ISO 8601 texts.
        """
        return {
            "cluster_name": self.cluster_name,
            "cluster_namespace": self.cluster_namespace,
            "phase": self.phase,
            "healthy": self.healthy,
            "work_requirement_id": self.work_requirement_id,
            "work_requirement_status": self.work_requirement_status,
            "head_private_ip": self.head_private_ip,
            "head_public_ip": self.head_public_ip,
            "wanted_workers": self.wanted_workers,
            "registered_workers": self.registered_workers,
            "executing_workers": self.executing_workers,
            "failed_workers": self.failed_workers,
            "pools": {
                name: {**asdict(pool), "failed": [asdict(failure) for failure in pool.failed]}
                for name, pool in self.pools.items()
            },
            "drift": list(self.drift),
            "failure": self.failure,
            "lifetime_ends": None if self.lifetime_ends is None else self.lifetime_ends.isoformat(),
            "checked": None if self.checked is None else self.checked.isoformat(),
        }

    @property
    def wanted_workers(self) -> int:
        """How many nodes the worker pools are to have."""
        return sum(pool.wanted for pool in self._worker_pools())

    @property
    def registered_workers(self) -> int:
        """How many nodes of the worker pools have registered, as far as the platform told."""
        return sum(pool.registered or 0 for pool in self._worker_pools())

    @property
    def executing_workers(self) -> int:
        """How many tasks of the worker pools are executing."""
        return sum(pool.executing for pool in self._worker_pools())

    @property
    def failed_workers(self) -> int:
        """How many workers have ended although they should not have, or could not come."""
        return sum(len(pool.failed) for pool in self._worker_pools())

    @property
    def healthy(self) -> bool:
        """Whether the cluster runs and nothing is wrong with it; workers may still be on their way."""
        return (
            self.phase == "running"
            and self.failure is None
            and not self.drift
            and not any(pool.missing or pool.problem for pool in self.pools.values())
        )

    def _worker_pools(self) -> Iterator[PoolStatus]:
        return (pool for pool in self.pools.values() if pool.role == "worker")

    def _headline(self) -> str:
        parts = [f"Cluster {self.cluster_namespace}/{self.cluster_name}: {self.phase}"]
        if self.head_private_ip is not None:
            public = f" (public {self.head_public_ip})" if self.head_public_ip is not None else ""
            parts.append(f"head at {self.head_private_ip}{public}")
        if self.work_requirement_status is not None:
            parts.append(f"work requirement {self.work_requirement_status}")
        if self.lifetime_ends is not None:
            parts.append(f"ends at {self.lifetime_ends.isoformat(' ', 'seconds')}")
        return one_line(", ".join(parts))

    def _rows(self) -> list[tuple[str, ...]]:
        return [
            (
                one_line(pool.internal_name),
                one_line(pool.name),
                str(pool.wanted),
                "?" if pool.registered is None else str(pool.registered),
                str(pool.executing),
                str(len(pool.failed)),
                one_line(pool.status or "?"),
            )
            for pool in self.pools.values()
        ]

    def _notes(self) -> list[str]:
        """Say what is wrong, a line each."""
        notes = []
        pools = list(self.pools.values())
        for pool in pools:
            if pool.problem is not None:
                notes.append(f"Problem of {one_line(pool.internal_name)}: {one_line(pool.problem)}")
        for pool in pools:
            if pool.missing > len(pool.failed):
                name = one_line(pool.internal_name)
                notes.append(f"Missing: {pool.missing} of {pool.wanted} nodes of {name}: they have no task")
            for failure in pool.failed[:_FAILURES_SHOWN]:
                node = "" if failure.node_id is None else f" (node {one_line(failure.node_id)})"
                notes.append(f"Failed: {one_line(failure.task)}{node}: {one_line(failure.reason)}")
            if len(pool.failed) > _FAILURES_SHOWN:
                more = len(pool.failed) - _FAILURES_SHOWN
                notes.append(f"Failed: and {more} more of {one_line(pool.internal_name)}")
        notes += [f"Drift: {one_line(sentence)}" for sentence in self.drift]
        if self.failure is not None:
            notes.append(f"The cluster has ended: {one_line(self.failure)}")
        return notes
