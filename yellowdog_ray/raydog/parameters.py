"""From the builder's many parameters to value objects, with errors in the builder's words."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from yellowdog_ray.errors import SpecError
from yellowdog_ray.raydog.specs import ClusterSpec, NodeSpec, RayAuth, WorkerPoolSpec, make

__all__ = ["cluster_spec", "worker_pool_spec"]

_HEAD_PARAMETERS = {
    "template": "head_node_compute_requirement_template_id",
    "script": "head_node_ray_start_script",
    "images_id": "head_node_images_id",
    "userdata": "head_node_userdata",
    "instance_tags": "head_node_instance_tags",
    "metrics_enabled": "head_node_metrics_enabled",
}
_OBSERVABILITY_PARAMETERS = {
    **{field: f"observability_node_{field}" for field in _HEAD_PARAMETERS},
    "template": "observability_node_compute_requirement_template_id",
    "script": "observability_node_start_script",
}
_WORKER_PARAMETERS = {
    **{field: f"worker_node_{field}" for field in _HEAD_PARAMETERS},
    "template": "worker_node_compute_requirement_template_id",
    "script": "worker_node_task_script",
    "node_count": "worker_pool_node_count",
    "internal_name": "worker_pool_internal_name",
}
_CLUSTER_PARAMETERS = {
    "name": "cluster_name",
    "namespace": "cluster_namespace",
    "tag": "cluster_tag",
    "lifetime": "cluster_lifetime",
}


def cluster_spec(
    *,
    name: str,
    namespace: str,
    tag: str | None,
    head: Mapping[str, Any],
    enable_observability: bool,
    observability: Mapping[str, Any],
    lifetime: timedelta | None,
    ray_auth: RayAuth,
    direct: bool = False,
) -> ClusterSpec:
    """Make the spec of a cluster.

    :raises SpecError: naming every parameter that cannot work.
    """
    observing = None
    head_spec = make(NodeSpec, _HEAD_PARAMETERS, **head)
    if enable_observability:
        if observability["template"] is None:
            raise SpecError("enable_observability needs observability_node_compute_requirement_template_id")
        observing = make(NodeSpec, _OBSERVABILITY_PARAMETERS, **observability)
    return make(
        ClusterSpec,
        _CLUSTER_PARAMETERS,
        name=name,
        namespace=namespace,
        tag=tag,
        head=head_spec,
        observability=observing,
        lifetime=lifetime,
        ray_auth=ray_auth,
        direct=direct,
    )


def worker_pool_spec(*, node_count: int, internal_name: str | None, **node: Any) -> WorkerPoolSpec:
    """Make the spec of a worker pool.

    :raises SpecError: naming every parameter that cannot work.
    """
    return make(
        WorkerPoolSpec,
        _WORKER_PARAMETERS,
        node=make(NodeSpec, _WORKER_PARAMETERS, **node),
        node_count=node_count,
        internal_name=internal_name,
    )
