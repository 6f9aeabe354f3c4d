"""The machines themselves: how they come, what they count for, when they are let go."""

from __future__ import annotations

from collections.abc import Callable

from yellowdog_ray.local.asks import Template
from yellowdog_ray.local.engine import Engine, SchedulerOptions
from yellowdog_ray.local.entities import ComputeRequirement, Instance, Node, Pool, Shape, Worker
from yellowdog_ray.local.events import NodeRegistered, StartNode, StopNode
from yellowdog_ray.local.lifecycle import INSTANCE_NEXT, NODE_NEXT, POOL_NEXT, REQUIREMENT_NEXT, illegal

__all__ = ["Fleet"]


class Fleet(Engine):
    """Starts machines, counts them, and ends them; `Machines` adds what clients may ask."""

    def __init__(
        self, options: SchedulerOptions | None = None, new_uuid: Callable[[], str] | None = None
    ) -> None:
        super().__init__(options, new_uuid)
        self.templates: dict[str, Template] = {}
        self.requirements: dict[str, ComputeRequirement] = {}
        self.instances: dict[str, Instance] = {}
        self.pools: dict[str, Pool] = {}
        self.nodes: dict[str, Node] = {}
        self.workers: dict[str, Worker] = {}
        self._template_names: dict[str, Template] = {}
        self._requirement_names: dict[tuple[str, str], ComputeRequirement] = {}
        self._pool_names: dict[tuple[str, str], Pool] = {}
        # Workers that no group has claimed, by what their node is like; and the pools, by their tag.
        self._free: dict[Shape, dict[str, Worker]] = {}
        self._shapes: dict[str | None, dict[Shape, None]] = {}
        self._pools_by_tag: dict[str | None, dict[str, Pool]] = {}
        self._dirty_pools: dict[str, Pool] = {}

    # What the layer above does when machines come and go.

    def _node_ready(self, node: Node, now: float) -> None:
        raise NotImplementedError

    def _node_gone(self, node: Node, reason: str, now: float) -> None:
        raise NotImplementedError

    def _release(self, worker: Worker, now: float) -> None:
        raise NotImplementedError

    # ------------------------------------------------------------------------------- new machines

    def _launch(self, requirement: ComputeRequirement, count: int, now: float) -> None:
        template, usage = requirement.template, requirement.usage
        boot_timeout = self.options.node_boot_timeout
        if requirement.pool is not None and requirement.pool.spec.boot_timeout is not None:
            boot_timeout = requirement.pool.spec.boot_timeout
        for _ in range(count):
            # A host name has at most 63 characters; names have up to 60.
            number = len(requirement.instances) + 1
            instance = Instance(
                id="i-" + self._new_uuid().replace("-", "")[-17:],
                requirement=requirement,
                hostname=f"{usage.name[:56].rstrip('-_').replace('_', '-')}-{number}",
                created=now,
                changed=now,
            )
            requirement.instances[instance.id] = self.instances[instance.id] = instance
            self._mark(instance)
            requirement.counts["PENDING"] = requirement.counts.get("PENDING", 0) + 1
            self._at(now + boot_timeout, self._boot_due, instance)
            self._effects.append(
                StartNode(
                    instance.id,
                    instance.hostname,
                    template.instance_type,
                    template.region,
                    template.provider,
                    template.vcpus,
                    template.ram,
                )
            )
        if count:
            requirement.source_status, requirement.source_message = "UPDATING", None
            self._set_requirement(requirement, "PROVISIONING", now)
        self._review_requirement(requirement, now)

    # ------------------------------------------------------------------------------ status changes

    def _set_requirement(self, requirement: ComputeRequirement, status: str, now: float) -> None:
        if requirement.status != status:
            if status not in REQUIREMENT_NEXT.get(requirement.status, ()):
                raise illegal("compute requirement", requirement.status, status)
            requirement.status, requirement.changed = status, now
            self._mark(requirement)

    def _set_instance(self, instance: Instance, status: str, now: float) -> None:
        if status not in INSTANCE_NEXT.get(instance.status, ()):
            raise illegal("instance", instance.status, status)
        counts = instance.requirement.counts
        counts[instance.status] -= 1
        counts[status] = counts.get(status, 0) + 1
        node = instance.node
        if instance.status == "RUNNING" and node is not None:
            if node.draining:
                node.pool.draining -= 1
            elif node.cordoned:
                node.pool.cordoned -= 1
        instance.status, instance.changed = status, now
        instance.requirement.updated = now
        self._mark(instance.requirement)
        self._mark(instance)
        if instance.requirement.pool is not None:
            self._touch(instance.requirement.pool, now)

    def _set_node(self, node: Node, status: str, now: float) -> None:
        if status not in NODE_NEXT.get(node.status, ()):
            raise illegal("node", node.status, status)
        counts = node.pool.node_counts
        counts[node.status] -= 1
        counts[status] = counts.get(status, 0) + 1
        if node.status == "RUNNING":
            node.deregistered = now
        node.status, node.changed = status, now
        self._mark(node)
        self._touch(node.pool, now)

    def _set_worker(self, worker: Worker, status: str, now: float) -> None:
        pool = worker.node.pool
        pool.worker_counts[worker.status] -= 1
        pool.worker_counts[status] = pool.worker_counts.get(status, 0) + 1
        worker.status = status
        self._mark(worker.node)
        self._touch(pool, now)

    def _set_pool(self, pool: Pool, status: str, now: float) -> None:
        if status == pool.status:
            return
        if status not in POOL_NEXT.get(pool.status, ()):
            raise illegal("worker pool", pool.status, status)
        pool.status, pool.changed = status, now
        self._mark(pool)

    def _touch(self, pool: Pool, now: float) -> None:
        pool.updated = now
        self._mark(pool)
        self._dirty_pools[pool.id] = pool

    # ----------------------------------------------------------------------- machines come and go

    def _registered(self, event: NodeRegistered, now: float) -> None:
        instance = self.instances.get(event.instance_id)
        if instance is None or instance.status != "PENDING":
            return
        instance.hostname = event.hostname
        instance.private_ip, instance.public_ip = event.private_ip, event.public_ip
        self._set_instance(instance, "RUNNING", now)
        pool = instance.requirement.pool
        if pool is not None and not pool.finished:
            pool.boot_failures = 0
            shape = _real_shape(pool.shape, event)
            node = Node(self._ydid("node"), pool, instance, shape, now, now, idle_since=now)
            instance.node = node
            for slot in range(pool.spec.workers_on(event.vcpus)):
                worker = Worker(self._ydid("wrkr"), node, slot, registered=now)
                node.workers.append(worker)
                self.workers[worker.id] = worker
            pool.worker_counts["STOPPED"] = pool.worker_counts.get("STOPPED", 0) + len(node.workers)
            pool.node_counts["RUNNING"] = pool.node_counts.get("RUNNING", 0) + 1
            pool.nodes[node.id] = self.nodes[node.id] = node
            self._mark(node)
            if shape not in pool.shapes:
                pool.shapes.add(shape)
                self._free.setdefault(shape, {})
                self._shapes.setdefault(shape.tag, {})[shape] = None
            self._touch(pool, now)
            self._arm_node(node, now)
            self._node_ready(node, now)
        self._review_requirement(instance.requirement, now)

    def _failed(self, instance_id: str, reason: str, now: float) -> None:
        """Note a machine that could not boot, where a client can read why."""
        instance = self.instances.get(instance_id)
        if instance is None or instance.status == "TERMINATED":
            return
        if instance.status == "PENDING":
            self._boot_failed(instance, reason, now)
        self._gone(instance, reason, now)

    def _boot_failed(self, instance: Instance, reason: str, now: float) -> None:
        requirement = instance.requirement
        instance.reason = reason
        self._mark(instance)
        self._mark(requirement)
        requirement.source_status = "ERRORED"
        requirement.source_message = f"instance {instance.id} ({instance.hostname}): {reason}"
        pool = requirement.pool
        if pool is not None:
            pool.boot_failures += 1
            # No power so high that no float can hold it: a thousand machines may fail at once.
            doubled = 2.0 ** min(pool.boot_failures - 1, 100)
            pool.retry_at = now + min(300.0, self.options.boot_retry * doubled)
            self._at(pool.retry_at, self._retry_due, pool)

    def _gone(self, instance: Instance, reason: str, now: float) -> None:
        """Take account of a machine that has ended, told to or not."""
        node = instance.node
        told = instance.status == "TERMINATING"
        instance.reason = instance.reason or reason
        if node is not None:
            self._forget_free(node)
            if node.status in ("RUNNING", "DEREGISTERED"):
                lost = not told and node.status == "RUNNING"
                self._set_node(node, "LOST" if lost else "TERMINATED", now)
            self._node_gone(node, reason, now)
            for worker in node.workers:
                if worker.status in ("STOPPED", "RUNNING"):
                    self._set_worker(worker, "SHUTDOWN" if told else "LOST", now)
        self._set_instance(instance, "TERMINATED", now)
        self._review_requirement(instance.requirement, now)

    def _forget_free(self, node: Node) -> None:
        free = self._free.get(node.shape)
        if free:
            for worker in node.workers:
                free.pop(worker.id, None)

    def _stop_instance(self, instance: Instance, now: float) -> None:
        """Tell a machine to end, whatever runs on it."""
        if instance.status not in ("PENDING", "RUNNING"):
            return
        node = instance.node
        # First, so that whoever takes over a released worker's place knows that this node is gone.
        self._set_instance(instance, "TERMINATING", now)
        self._effects.append(StopNode(instance.id))
        if node is not None:
            self._forget_free(node)
            if node.status == "RUNNING":
                node.draining = True
                if node.busy == 0:
                    self._retire(node, now)
                else:
                    # A worker that its group holds for later would be given a task when that comes.
                    self._release_idle(node, now)

    def _release_idle(self, node: Node, now: float) -> None:
        for worker in node.workers:
            if worker.task is None and worker.group is not None:
                self._release(worker, now)

    def _retire(self, node: Node, now: float) -> None:
        """Take a node on which nothing runs out of service."""
        for worker in node.workers:
            if worker.group is not None:
                self._release(worker, now)
            self._set_worker(worker, "SHUTDOWN", now)
        self._set_node(node, "DEREGISTERED", now)

    def _drain(self, node: Node, now: float) -> None:
        """End a node as soon as its running tasks have."""
        if node.status != "RUNNING" or node.draining:
            return
        node.draining = True
        node.pool.draining += 1
        if node.cordoned:
            node.pool.cordoned -= 1
        self._touch(node.pool, now)
        self._forget_free(node)
        self._release_idle(node, now)
        self._node_quiet(node, now)

    def _node_quiet(self, node: Node, now: float) -> None:
        if node.draining and node.busy == 0 and node.status == "RUNNING":
            self._stop_instance(node.instance, now)

    # ---------------------------------------------------------------------------------- reviews

    def _review_requirement(self, requirement: ComputeRequirement, now: float) -> None:
        requirement.updated = now
        self._mark(requirement)
        if requirement.status == "TERMINATING":
            if requirement.alive + requirement.counts.get("TERMINATING", 0) == 0:
                self._set_requirement(requirement, "TERMINATED", now)
                requirement.source_status = (
                    "ERRORED" if requirement.source_status == "ERRORED" else "INACTIVE"
                )
                pool = requirement.pool
                if pool is not None:
                    if not pool.finished:
                        self._set_pool(pool, "SHUTDOWN", now)
                    self._set_pool(pool, "TERMINATED", now)
                    self._touch(pool, now)
        elif requirement.pending == 0 and requirement.status != "TERMINATED":
            self._set_requirement(requirement, "RUNNING", now)
            if requirement.source_status != "ERRORED":
                requirement.source_status = "ACTIVE" if requirement.alive else "INACTIVE"

    def _review_pool(self, pool: Pool, now: float) -> None:
        if pool.finished:
            requirement = pool.requirement
            if pool.busy == 0 and requirement.status not in ("TERMINATING", "TERMINATED"):
                self._terminate(requirement, now)
            return
        if pool.claimed:
            status = "RUNNING"
        elif pool.workers:
            status = "IDLE"
        elif pool.status == "PENDING" and pool.requirement.pending:
            status = "PENDING"
        else:
            status = "EMPTY"
        self._set_pool(pool, status, now)
        if status not in self.options.idle_pool_statuses:
            pool.idle_since = None
        elif pool.idle_since is None:
            pool.idle_since = now
            limit = self._pool_idle_limit(pool)
            if limit is not None and not pool.idle_armed:
                pool.idle_armed = True
                self._at(now + limit, self._pool_idle_due, pool)

    # ----------------------------------------------------------------------------------- timers

    def _pool_idle_limit(self, pool: Pool) -> float | None:
        wish = pool.spec.idle_pool
        if wish is None or (wish.enabled and wish.timeout is None):
            return self.options.idle_pool_shutdown
        return wish.seconds

    def _node_idle_limit(self, pool: Pool) -> float | None:
        wish = pool.spec.idle_node
        if wish is None or (wish.enabled and wish.timeout is None):
            return self.options.idle_node_shutdown
        return wish.seconds

    def _pool_idle_due(self, pool: Pool, now: float) -> None:
        pool.idle_armed = False
        limit = self._pool_idle_limit(pool)
        if pool.finished or pool.idle_since is None or limit is None:
            return
        if now >= pool.idle_since + limit:
            self._shut_down(pool, now)
        else:
            pool.idle_armed = True
            self._at(pool.idle_since + limit, self._pool_idle_due, pool)

    def _arm_node(self, node: Node, now: float) -> None:
        limit = self._node_idle_limit(node.pool)
        if limit is not None and not node.idle_armed:
            node.idle_armed = True
            self._at(now + limit, self._node_idle_due, node)

    def _node_idle_due(self, node: Node, now: float) -> None:
        node.idle_armed = False
        limit = self._node_idle_limit(node.pool)
        if not node.usable or node.idle_since is None or limit is None:
            return
        due = node.idle_since + limit
        if now < due:
            node.idle_armed = True
            self._at(due, self._node_idle_due, node)
        elif self._staying(node.pool) > node.pool.spec.min_nodes:
            self._drain(node, now)
        else:
            # Kept only because of minNodes: looked at again after another idle time.
            node.idle_armed = True
            self._at(now + max(limit, 1.0), self._node_idle_due, node)

    def _boot_due(self, instance: Instance, now: float) -> None:
        if instance.status == "PENDING":
            waited = now - instance.created
            self._boot_failed(instance, f"no agent registered within {waited:.0f} s of its start", now)
            self._stop_instance(instance, now)
            self._review_requirement(instance.requirement, now)

    def _retry_due(self, pool: Pool, now: float) -> None:
        self._dirty_pools[pool.id] = pool

    def _auto_shutdown_due(self, requirement: ComputeRequirement, now: float) -> None:
        due = requirement.auto_shutdown_time
        if due is not None and now >= due and requirement.status not in ("TERMINATING", "TERMINATED"):
            self._terminate(requirement, now)

    # --------------------------------------------------------------------------------------- ends

    def _standing(self, pool: Pool) -> int:
        """Return how many nodes a pool has, or will have soon, but for those that it ends."""
        return pool.requirement.alive - pool.draining

    def _staying(self, pool: Pool) -> int:
        """Return how many of them will not be taken away either; the others hold their places until then."""
        return self._standing(pool) - pool.cordoned

    def _terminate(self, requirement: ComputeRequirement, now: float) -> None:
        self._set_requirement(requirement, "TERMINATING", now)
        pool = requirement.pool
        if pool is not None and not pool.finished:
            self._shut_down(pool, now)
        for instance in list(requirement.instances.values()):
            self._stop_instance(instance, now)
        self._review_requirement(requirement, now)

    def _shut_down(self, pool: Pool, now: float) -> None:
        self._set_pool(pool, "SHUTDOWN", now)
        self._touch(pool, now)
        for node in pool.nodes.values():
            if node.status == "RUNNING":
                self._forget_free(node)
                self._release_idle(node, now)
        for instance in pool.requirement.instances.values():
            if instance.status == "PENDING":
                self._stop_instance(instance, now)
        self._pools_by_tag[pool.spec.worker_tag].pop(pool.id, None)
        for shape in pool.shapes:
            self._free.pop(shape, None)
            self._shapes[shape.tag].pop(shape, None)


def _real_shape(shape: Shape, event: NodeRegistered) -> Shape:
    return shape._replace(vcpus=event.vcpus, ram=event.ram, task_types=frozenset(event.task_types))
