"""The machine side of the scheduler: compute requirements, instances, worker pools, nodes, workers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeVar

from yellowdog_ray.local.asks import AutoShutdown, PoolSpec, RefusedError, Template, Usage
from yellowdog_ray.local.entities import ComputeRequirement, Instance, Node, Pool, Shape, Worker
from yellowdog_ray.local.fields import MAX_NODES
from yellowdog_ray.local.fleet import Fleet

__all__ = ["Machines", "find"]


class Machines(Fleet):
    """What clients may ask of the machines."""

    # -------------------------------------------------------------------------------- templates

    def add_template(self, template: Template) -> None:
        """Make a template known, by its id and by ``namespace/name``."""
        self.templates[template.id] = template
        self._template_names[f"{template.namespace}/{template.name}"] = template

    def template(self, reference: str) -> Template:
        """Find a template by its id or by ``namespace/name``."""
        found = self.templates.get(reference) or self._template_names.get(reference)
        if found is None:
            known = ", ".join(sorted(self._template_names)) or "none at all"
            raise RefusedError.not_found(
                f"no compute requirement template {reference!r}; the local platform has: {known}"
            )
        return found

    # ------------------------------------------------------------------------------ provisioning

    def provision(self, usage: Usage, now: float) -> ComputeRequirement:
        """Provision a compute requirement that belongs to no worker pool."""
        requirement = self._add_requirement(usage, now)
        self._launch(requirement, requirement.target, now)
        self._settle(now)
        return requirement

    def provision_pool(self, usage: Usage, spec: PoolSpec, now: float) -> Pool:
        """Provision a worker pool: the platform makes its compute requirement, of the same name."""
        key = (usage.namespace, usage.name)
        older = self._pool_names.get(key)
        if older is not None and not (self.options.reuse_finished_names and older.finished):
            raise RefusedError.invalid(f"A worker pool {usage.namespace}/{usage.name} already exists")
        max_nodes = spec.max_nodes
        if max_nodes is None:
            unsaid = MAX_NODES if self.options.grow_without_max else usage.target
            max_nodes = max(unsaid, spec.min_nodes)
        if usage.target > max_nodes:
            raise RefusedError.invalid(
                f"targetInstanceCount {usage.target} is more than maxNodes {max_nodes}"
            )
        requirement = self._add_requirement(usage, now)
        pool_id, template = self._ydid("wrkrpool"), requirement.template
        pool = Pool(
            id=pool_id,
            name=usage.name,
            namespace=usage.namespace,
            spec=spec,
            requirement=requirement,
            max_nodes=max_nodes,
            shape=Shape(
                pool_id,
                spec.worker_tag,
                usage.namespace,
                template.provider,
                template.region,
                template.instance_type,
                template.vcpus,
                template.ram,
                frozenset(template.task_types),
            ),
            created=now,
            changed=now,
            updated=now,
        )
        requirement.pool = pool
        self.pools[pool.id] = self._pool_names[key] = pool
        self._mark(pool)
        self._pools_by_tag.setdefault(spec.worker_tag, {})[pool.id] = pool
        self._launch(requirement, max(usage.target, spec.min_nodes), now)
        self._dirty_pools[pool.id] = pool
        self._settle(now)
        return pool

    def _add_requirement(self, usage: Usage, now: float) -> ComputeRequirement:
        template = self.template(usage.template_id)
        key = (usage.namespace, usage.name)
        older = self._requirement_names.get(key)
        if older is not None and not (self.options.reuse_finished_names and older.status == "TERMINATED"):
            raise RefusedError.invalid(f"A compute requirement {usage.namespace}/{usage.name} already exists")
        requirement = ComputeRequirement(
            id=self._ydid("compreq"),
            usage=usage,
            template=template,
            source_id=self._ydid("compsrc"),
            target=usage.target,
            created=now,
            changed=now,
            updated=now,
        )
        self.requirements[requirement.id] = self._requirement_names[key] = requirement
        self._set_auto_shutdown(requirement, usage.auto_shutdown, now)
        return requirement

    # -------------------------------------------------------------------------- ends, and sizes

    def shut_down_pool(self, pool_id: str, now: float) -> Pool:
        """Shut a pool down: no new tasks, and its machines end with its running ones.

        For one that is shut down already, this does nothing, or is refused (``options.end_again``).
        """
        pool = self.pool(pool_id)
        if not pool.finished:
            self._shut_down(pool, now)
            self._settle(now)
        elif self.options.end_again == "refuse":
            raise _not_from("WorkerPool", pool.status, "SHUTDOWN")
        return pool

    def shut_down_node(self, node_id: str, now: float) -> Node:
        """Shut a node down once its running tasks have ended. Idempotent."""
        node = self.node(node_id)
        self._drain(node, now)
        self._settle(now)
        return node

    def cordon(self, node: Node, now: float) -> None:
        """Give a node no more tasks, because its machine will go; those that run go on until then."""
        if not node.usable:
            return
        node.cordoned = True
        node.pool.cordoned += 1
        self._touch(node.pool, now)
        self._forget_free(node)
        self._release_idle(node, now)
        self._settle(now)

    def resize_pool(self, pool_id: str, size: int, now: float) -> Pool:
        """Give a pool another number of nodes: idle ones go first, busy ones end with their tasks."""
        pool = self.pool(pool_id)
        if pool.finished:
            raise RefusedError.invalid(f"Cannot resize worker pool in status {pool.status}")
        if pool.requirement.pending:
            raise RefusedError.invalid("Cannot resize worker pool whilst it is awaiting nodes")
        # A pool whose client gave no maxNodes may be resized at will.
        bound = MAX_NODES if pool.spec.max_nodes is None else pool.max_nodes
        if not pool.spec.min_nodes <= size <= bound:
            raise RefusedError.invalid(f"size must be from {pool.spec.min_nodes} to {bound}, not {size}")
        pool.max_nodes = max(pool.max_nodes, size)
        pool.requirement.target = size
        self._mark(pool.requirement)
        staying = self._staying(pool)
        if size > staying:
            self._launch(pool.requirement, size - staying, now)
        else:
            candidates = [node for node in pool.nodes.values() if node.usable]
            candidates.sort(key=lambda node: (node.claimed > 0, -node.registered))
            for node in candidates[: staying - size]:
                self._drain(node, now)
        self._touch(pool, now)
        self._settle(now)
        return pool

    def resize_requirement(
        self, requirement_id: str, target: int, reprovision: bool, now: float
    ) -> ComputeRequirement:
        """Give a stand-alone requirement another number of machines; the newest ones go first.

        :param reprovision: also bring machines that have been lost back where the number stays the same.
        """
        requirement = self.requirement(requirement_id)
        if requirement.status not in ("PROVISIONING", "RUNNING"):
            raise RefusedError.invalid(f"Cannot update compute requirement in status {requirement.status}")
        if requirement.pool is not None:
            raise RefusedError.invalid(
                "targetInstanceCount: the compute requirement belongs to a worker pool; resize that one"
            )
        if reprovision or target != requirement.target:
            requirement.target = target
            alive = [each for each in requirement.instances.values() if each.status in ("PENDING", "RUNNING")]
            for instance in alive[target:]:
                self._stop_instance(instance, now)
            self._launch(requirement, max(0, target - len(alive)), now)
        self._settle(now)
        return requirement

    def transition_requirement(self, requirement_id: str, status: str, now: float) -> ComputeRequirement:
        """Carry out a client's wish for a compute requirement: TERMINATED or PROVISIONING.

        TERMINATED for one that ends already does nothing, or is refused (``options.end_again``).
        """
        requirement = self.requirement(requirement_id)
        if status in ("STOPPED", "RUNNING"):
            raise RefusedError.invalid(
                f"the local platform cannot stop and start machines ({status} refused)"
            )
        if status == "TERMINATED":
            if requirement.status not in ("TERMINATING", "TERMINATED"):
                self._terminate(requirement, now)
            elif self.options.end_again == "refuse":
                raise _not_from("ComputeRequirement", requirement.status, status)
        elif status != "PROVISIONING" or requirement.status in ("TERMINATING", "TERMINATED"):
            raise _not_from("ComputeRequirement", requirement.status, status)
        else:
            self._launch(requirement, max(0, requirement.target - requirement.alive), now)
        self._settle(now)
        return requirement

    def end_instances(
        self, requirement_id: str, instance_ids: Iterable[str], deprovision: bool, now: float
    ) -> None:
        """Terminate single instances at once; deprovisioning also lowers the requirement's target."""
        requirement = self.requirement(requirement_id)
        for instance_id in instance_ids:
            instance = requirement.instances.get(instance_id)
            if instance is None:
                raise RefusedError.not_found(f"no instance {instance_id!r} in {requirement_id}")
            if instance.status in ("PENDING", "RUNNING"):
                self._stop_instance(instance, now)
                if deprovision:
                    requirement.target = max(0, requirement.target - 1)
        self._review_requirement(requirement, now)
        self._settle(now)

    def _set_auto_shutdown(
        self, requirement: ComputeRequirement, wish: AutoShutdown | None, now: float
    ) -> None:
        requirement.auto_shutdown = wish
        self._mark(requirement)
        limit = wish.seconds if wish is not None else None
        requirement.auto_shutdown_time = None if limit is None else now + limit
        if requirement.auto_shutdown_time is not None:
            self._at(requirement.auto_shutdown_time, self._auto_shutdown_due, requirement)

    def set_auto_shutdown(
        self, requirement_id: str, wish: AutoShutdown | None, now: float
    ) -> ComputeRequirement:
        """Set, or with None clear, the time after which a requirement ends whatever it does; from now."""
        requirement = self.requirement(requirement_id)
        if requirement.status in ("TERMINATING", "TERMINATED"):
            raise RefusedError.invalid(f"The compute requirement is {requirement.status}")
        self._set_auto_shutdown(requirement, wish, now)
        self._settle(now)
        return requirement

    def grow(self, pool: Pool, count: int, now: float) -> int:
        """Add nodes to a pool on demand, within its bounds; return how many."""
        if pool.finished or pool.requirement.status == "TERMINATING" or now < pool.retry_at:
            return 0
        count = max(0, min(count, min(pool.max_nodes, MAX_NODES) - self._standing(pool)))
        if count:
            self._launch(pool.requirement, count, now)
            pool.requirement.target = max(pool.requirement.target, self._staying(pool))
        return count

    # ------------------------------------------------------------------------------- the past

    def remember_machines(self, thing: ComputeRequirement | Pool | Instance | Node) -> None:
        """Take in what has ended in an earlier life of the platform, after what it belongs to."""
        if isinstance(thing, ComputeRequirement):
            self.requirements[thing.id] = thing
            self._requirement_names[thing.usage.namespace, thing.usage.name] = thing
        elif isinstance(thing, Pool):
            thing.requirement.pool = thing
            self.pools[thing.id] = self._pool_names[thing.namespace, thing.name] = thing
        elif isinstance(thing, Instance):
            counts = thing.requirement.counts
            counts[thing.status] = counts.get(thing.status, 0) + 1
            thing.requirement.instances[thing.id] = self.instances[thing.id] = thing
        else:
            pool = thing.pool
            pool.node_counts[thing.status] = pool.node_counts.get(thing.status, 0) + 1
            pool.nodes[thing.id] = self.nodes[thing.id] = thing.instance.node = thing
            for worker in thing.workers:
                pool.worker_counts[worker.status] = pool.worker_counts.get(worker.status, 0) + 1
                self.workers[worker.id] = worker

    # ---------------------------------------------------------------------------------- look-ups

    def requirement(self, requirement_id: str) -> ComputeRequirement:
        """Find a compute requirement by its id."""
        return find(self.requirements, requirement_id, "compute requirement")

    def requirement_named(self, namespace: str, name: str) -> ComputeRequirement:
        """Find a compute requirement by its name."""
        return find(self._requirement_names, (namespace, name), "compute requirement")

    def pool(self, pool_id: str) -> Pool:
        """Find a worker pool by its id."""
        return find(self.pools, pool_id, "worker pool")

    def pool_named(self, namespace: str, name: str) -> Pool:
        """Find a worker pool by its name."""
        return find(self._pool_names, (namespace, name), "worker pool")

    def node(self, node_id: str) -> Node:
        """Find a node by its id."""
        return find(self.nodes, node_id, "node")

    def worker(self, worker_id: str) -> Worker:
        """Find a worker by its id."""
        return find(self.workers, worker_id, "worker")


_K = TypeVar("_K")
_V = TypeVar("_V")


def _not_from(kind: str, old: str, new: str) -> RefusedError:
    return RefusedError(403, f"Invalid{kind}StatusException", f"invalid transition from {old} to {new}")


def find(things: Mapping[_K, _V], key: _K, what: str) -> _V:
    """Return what stands under a key, else refuse with 404."""
    found = things.get(key)
    if found is None:
        named = "/".join(key) if isinstance(key, tuple) else key
        raise RefusedError.not_found(f"no {what} {named!r}")
    return found
