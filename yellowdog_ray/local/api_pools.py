"""The part of the HTTP API that is about worker pools and their nodes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from yellowdog_ray.local import wire
from yellowdog_ray.local.asks import RefusedError
from yellowdog_ray.local.entities import Node, Pool
from yellowdog_ray.local.fields import Fields
from yellowdog_ray.local.intake import read_pool, read_usage
from yellowdog_ray.local.sorting import SORT_NODES, SORT_POOLS
from yellowdog_ray.local.vocabulary import (
    NODE_STATUSES,
    POOL_STATUSES,
    POOL_TYPES,
    PROVIDERS,
    WORKER_STATUSES,
)
from yellowdog_ray.local.web import Action, Call, stream

__all__ = ["ROUTES"]


async def _provision_pool(call: Call) -> Any:
    fields = Fields(await call.body(), "request")
    usage = fields.get("requirementTemplateUsage")
    if usage is None:
        raise RefusedError.invalid("requirementTemplateUsage is required")
    spec = read_pool(fields.get("provisionedProperties"))
    fields.done()
    pool = call.scheduler.provision_pool(read_usage(usage), spec, call.now)
    call.core.changed()
    return wire.pool_json(pool)


async def _resize_pool(call: Call) -> Any:
    size = call.whole("size", 0, 1 << 31)
    if size is None:
        raise RefusedError.invalid("size is required")
    pool = call.scheduler.resize_pool(call.path("id"), size, call.now)
    call.core.changed()
    return wire.pool_json(pool)


async def _pools(call: Call) -> Any:
    named, statuses, healthy = call.named(), call.words("statuses", POOL_STATUSES), call.flag("isHealthy")
    kinds, created = call.words("type", POOL_TYPES), call.within("createdTime")

    def wanted(pool: Pool) -> bool:
        return (
            named(pool.namespace, pool.name)
            and (not statuses or pool.status in statuses)
            and (not kinds or any(wire.pool_summary(pool)["type"].endswith(kind) for kind in kinds))
            and (healthy is None or wire.pool_healthy(pool) == healthy)
            and created(pool.created)
        )

    return call.slice(call.scheduler.pools.values(), wanted, wire.pool_summary, SORT_POOLS, bare=True)


async def _pool(call: Call) -> Any:
    return wire.pool_json(call.scheduler.pool(call.path("id")))


async def _pool_named(call: Call) -> Any:
    return wire.pool_json(call.scheduler.pool_named(call.path("namespace"), call.path("name")))


async def _shut_down_pool(call: Call) -> Any:
    pool = call.scheduler.shut_down_pool(call.path("id"), call.now)
    call.core.changed()
    return wire.pool_json(pool)


async def _pool_updates(call: Call) -> Any:
    pool = call.scheduler.pool(call.path("id"))
    return stream(call.core, lambda: (wire.pool_json(pool), pool.finished))


async def _nodes(call: Call) -> Any:
    scheduler = call.scheduler
    pool_id, tag = call.query("workerPoolId"), call.query("workerTag")
    statuses, providers = call.words("statuses", NODE_STATUSES), call.words("providers", PROVIDERS)
    instance_id, region = call.query("instanceId"), call.query("region")
    kind, group_id = call.query("instanceType"), call.query("workerTaskGroupId")
    worker_statuses = call.words("workerStatuses", WORKER_STATUSES)
    ram, vcpus = call.within("ram"), call.within("vcpus")
    registered, deregistered = call.within("registeredTime"), call.within("deregisteredTime")
    worker_registered = call.within("workerRegisteredTime")
    # No node here is ever warned of its preemption.
    warned = call.within("preemptionWarningTime")(None)
    pool = None if pool_id is None else scheduler.pool(pool_id)

    def wanted(node: Node) -> bool:
        shape = node.shape
        return (
            warned
            and (not statuses or node.status in statuses)
            and (not providers or shape.provider in providers)
            and instance_id in (None, node.instance.id)
            and region in (None, shape.region)
            and kind in (None, shape.instance_type)
            and tag in (None, shape.tag)
            and ram(shape.ram)
            and vcpus(shape.vcpus)
            and registered(node.registered)
            and worker_registered(node.registered)
            and deregistered(node.deregistered)
            and (
                group_id is None
                or any(worker.group and worker.group.id == group_id for worker in node.workers)
            )
            and (not worker_statuses or any(worker.status in worker_statuses for worker in node.workers))
        )

    nodes = scheduler.nodes if pool is None else pool.nodes
    return call.slice(nodes.values(), wanted, wire.node_json, SORT_NODES)


async def _node(call: Call) -> Any:
    return wire.node_json(call.scheduler.node(call.path("id")))


async def _node_of_worker(call: Call) -> Any:
    return wire.node_json(call.scheduler.worker(call.path("id")).node)


async def _shut_down_node(call: Call) -> Any:
    node = call.scheduler.shut_down_node(call.path("id"), call.now)
    call.core.changed()
    return wire.node_json(node)


async def _node_actions(call: Call) -> Any:
    call.scheduler.node(call.path("id"))
    return {"timestamp": wire.time(call.now), "status": "EMPTY", "waiting": [], "executing": []}


async def _capacity(call: Call) -> Any:
    return {"namespace": call.path("namespace"), "capacityLimited": False}


ROUTES: Mapping[tuple[str, str], Action] = {
    ("POST", "/workerPools/provisioned/template"): _provision_pool,
    ("PUT", "/workerPools/provisioned/{id}"): _resize_pool,
    ("GET", "/workerPools"): _pools,
    ("GET", "/workerPools/nodes"): _nodes,
    ("GET", "/workerPools/nodes/{id}"): _node,
    ("DELETE", "/workerPools/nodes/{id}"): _shut_down_node,
    ("GET", "/workerPools/nodes/{id}/actions"): _node_actions,
    ("GET", "/workerPools/workers/{id}/node"): _node_of_worker,
    ("GET", "/workerPools/namespaces/{namespace}/autoscalingCapacity"): _capacity,
    ("GET", "/workerPools/{id}/updates"): _pool_updates,
    ("GET", "/workerPools/{id}"): _pool,
    ("DELETE", "/workerPools/{id}"): _shut_down_pool,
    ("GET", "/workerPools/{namespace}/{name}"): _pool_named,
}
