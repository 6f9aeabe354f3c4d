"""What can be read from a cluster: the attributes that scripts in the field use."""

from __future__ import annotations

from typing import TYPE_CHECKING

from yellowdog_ray.raydog.core import ClusterCore
from yellowdog_ray.raydog.pools import BuiltPool

if TYPE_CHECKING:
    from yellowdog_client import PlatformClient

__all__ = ["ClusterView"]


class ClusterView(ClusterCore):
    """The attributes of a cluster, each of them None before the build."""

    @property
    def yd_client(self) -> PlatformClient:
        """The YellowDog SDK's client, made when it is first asked for."""
        return self._platform.client

    @property
    def work_requirement_id(self) -> str | None:
        """The id of the cluster's work requirement; None before :meth:`build`."""
        return self._assembly.work_requirement_id if self._assembly is not None else None

    @property
    def head_node_worker_pool_id(self) -> str | None:
        """The id of the head node's pool; None before :meth:`build`."""
        return self._head.id if self._head is not None else None

    @property
    def head_node_node_id(self) -> str | None:
        """The id of the head node; None before :meth:`build`."""
        return self._head.node_id if self._head is not None else None

    @property
    def head_node_private_ip(self) -> str | None:
        """The head's private address; None before :meth:`build`."""
        return self._head.private_ip if self._head is not None else None

    @property
    def head_node_public_ip(self) -> str | None:
        """The head's public address, None where it has none."""
        return self._head.public_ip if self._head is not None else None

    @property
    def head_node_task_id(self) -> str | None:
        """The id of the head node's task; None before :meth:`build`."""
        return self._head.task_id if self._head is not None else None

    @property
    def worker_node_worker_pools(self) -> dict[str, BuiltPool]:
        """The worker pools by internal name: a copy, each with its ``id`` (None before it is built)."""
        with self._lock:
            return dict(self._pools)

    @property
    def worker_pool_ids(self) -> list[str]:
        """The ids of the worker pools that are built, without the head's and the observability node's."""
        with self._lock:
            return [pool.id for pool in self._pools.values() if pool.id is not None]

    @property
    def worker_pool_internal_names(self) -> list[str]:
        """The internal names of the worker pools."""
        with self._lock:
            return list(self._pools)

    @property
    def enable_observability(self) -> bool:
        """Whether the cluster has an observability node."""
        return self._spec.observability is not None

    @property
    def observability_node_id(self) -> str | None:
        """The id of the observability node; None where there is none, or before :meth:`build`."""
        return self._observability.node_id if self._observability is not None else None

    @property
    def observability_node_private_ip(self) -> str | None:
        """The observability node's private address; None where there is none, or before :meth:`build`."""
        return self._observability.private_ip if self._observability is not None else None

    @property
    def observability_node_worker_pool_id(self) -> str | None:
        """The id of the observability node's pool; None where there is none, or before :meth:`build`."""
        return self._observability.id if self._observability is not None else None

    @property
    def observability_node_task_id(self) -> str | None:
        """The id of the observability node's task; None where there is none, or before :meth:`build`."""
        return self._observability.task_id if self._observability is not None else None

    @property
    def _head(self) -> BuiltPool | None:
        return self._assembly.head if self._assembly is not None else None

    @property
    def _observability(self) -> BuiltPool | None:
        return self._assembly.observability if self._assembly is not None else None
