"""How a cluster is doing: typed values, as text, as JSON and as a table in a notebook."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime

from yellowdog_ray.raydog.plan import Role

__all__ = ["ClusterStatus", "NodeFailure", "PoolStatus"]


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
