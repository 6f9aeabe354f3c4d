"""The pages of worker pools, nodes and compute requirements."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from yellowdog_ray.local.entities import ComputeRequirement, Instance, Node, Pool
from yellowdog_ray.local.webpage.parts import (
    ROWS,
    Ask,
    Cell,
    Page,
    Table,
    counted,
    listing,
    status,
    when,
)
from yellowdog_ray.local.webpage.site import (
    NO_POOL,
    Site,
)

__all__ = ["MachineViews"]


class MachineViews(Site):
    """What it is done on."""

    def pools(self, ask: Ask) -> Page:
        """List the worker pools."""

        def row(pool: Pool) -> list[Cell]:
            return [
                self._link(pool), status(pool.status), when(pool.created), when(pool.changed),
                counted(pool.node_counts), counted(pool.worker_counts), Cell(pool.spec.worker_tag or "none"),
                Cell(pool.requirement.source_message or "", kind="lines"),
            ]  # fmt: skip

        table = listing(
            ask,
            self._at("pools"),
            self._scheduler.pools.values(),
            lambda pool: f"{pool.namespace}/{pool.name}",
            ("Name", "Status", "Created", "Status since", "Nodes", "Workers", "Worker tag", "Message"),
            row,
            empty=NO_POOL,
        )
        return Page("Worker pools", "pools", tables=[table])

    def pool(self, ask: Ask) -> Page | None:
        """Show a worker pool with its nodes."""
        pool = self._scheduler.pools.get(ask.id)
        if pool is None:
            return None
        requirement = pool.requirement
        facts = [
            ("Status", status(pool.status)),
            ("Status since", when(pool.changed)),
            ("Created", when(pool.created)),
            ("Compute requirement", self._link(requirement)),
            ("Compute source", status(requirement.source_status)),
            ("Message", Cell(requirement.source_message or "none", kind="lines")),
            ("Nodes wanted", Cell(f"{requirement.target:,} ({pool.spec.min_nodes:,} to {pool.max_nodes:,})")),
            ("Machines that boot", Cell(f"{requirement.pending:,}")),
            ("Nodes", counted(pool.node_counts)),
            ("Workers", counted(pool.worker_counts)),
            ("Worker tag", Cell(pool.spec.worker_tag or "none")),
            ("Id", Cell(pool.id)),
        ]
        table = self._node_table(ask, self._at("pools", pool.id), pool.nodes, with_pool=False)
        if not pool.nodes:
            table = Table(
                "Nodes", (), (), (),
                "No node of it has registered. Its compute requirement says what has become of its machines.",
            )  # fmt: skip
        return Page(pool.name, "pools", [Cell("Worker pools", self._at("pools"))], facts, [table])

    # ------------------------------------------------------------------------------------- nodes

    def nodes(self, ask: Ask) -> Page:
        """List the nodes of all pools."""
        table = self._node_table(ask, self._at("nodes"), self._scheduler.nodes, with_pool=True)
        if not self._scheduler.nodes:
            pools = self._scheduler.pools
            sentence = "No node has registered yet. See the worker pools." if pools else NO_POOL
            table = Table("Nodes", (), (), (), sentence)
        return Page("Nodes", "nodes", tables=[table])

    def _node_table(self, ask: Ask, action: str, nodes: Mapping[str, Node], *, with_pool: bool) -> Table:
        def row(node: Node) -> list[Cell]:
            return [
                self._link(node), *([self._link(node.pool)] if with_pool else []), status(node.status),
                when(node.registered), when(node.deregistered), Cell(node.instance.private_ip or ""),
                counted(Counter(worker.status for worker in node.workers)), self._tasks_on(node),
            ]  # fmt: skip

        pool = ("Worker pool",) if with_pool else ()
        return listing(
            ask,
            action,
            nodes.values(),
            lambda node: f"{node.instance.hostname} {node.instance.private_ip}",
            ("Host name", *pool, "Status", "Registered", "Left", "Private address", "Workers", "Runs"),
            row,
            heading="Nodes, newest first",
        )

    def _tasks_on(self, node: Node) -> Cell:
        tasks = [worker.task for worker in node.workers if worker.task is not None]
        if len(tasks) == 1:
            return self._link(tasks[0])
        return Cell(f"{len(tasks)} tasks" if tasks else "")

    def node(self, ask: Ask) -> Page | None:
        """Show a node with its workers."""
        node = self._scheduler.nodes.get(ask.id)
        if node is None:
            return None
        instance = node.instance
        facts = [
            ("Status", status(node.status)),
            ("Registered", when(node.registered)),
            ("Left", when(node.deregistered)),
            ("Worker pool", self._link(node.pool)),
            ("Compute requirement", self._link(instance.requirement)),
            ("Instance", Cell(f"{instance.id}, {instance.status}")),
            ("Why it ended", Cell(instance.reason or "", kind="lines")),
            ("Private address", Cell(instance.private_ip or "none")),
            ("Public address", Cell(instance.public_ip or "none")),
            ("Size", Cell(f"{node.shape.vcpus:g} virtual CPUs, {node.shape.ram:g} GiB")),
            ("Region", Cell(node.shape.region)),
            ("Id", Cell(node.id)),
        ]
        if instance.status != "TERMINATED":
            del facts[6]
        shown = node.workers[:ROWS]
        rows = [
            [
                Cell(str(worker.slot)), status(worker.status), self._link(worker.task),
                self._link(worker.group), Cell(worker.id),
            ]
            for worker in shown
        ]  # fmt: skip
        workers = Table(
            "Workers",
            ("Slot", "Status", "Task", "Group", "Id"),
            rows,
            [worker.id for worker in shown],
            "It has no workers: its pool asks for none, so no task can run on it.",
        )
        crumbs = [Cell("Worker pools", self._at("pools")), self._link(node.pool)]
        notes = [f"The first {ROWS} of {len(node.workers):,} workers."] if len(node.workers) > ROWS else []
        return Page(instance.hostname, "nodes", crumbs, facts, [workers], notes=notes)

    # ----------------------------------------------------------------------------------- compute

    def computes(self, ask: Ask) -> Page:
        """List the compute requirements."""

        def row(each: ComputeRequirement) -> list[Cell]:
            return [
                self._link(each), status(each.status), when(each.created), when(each.changed),
                Cell(f"{each.target:,}"), counted(each.counts), self._link(each.pool),
                Cell(each.source_message or "", kind="lines"),
            ]  # fmt: skip

        table = listing(
            ask,
            self._at("compute"),
            self._scheduler.requirements.values(),
            lambda each: f"{each.usage.namespace}/{each.usage.name}",
            ("Name", "Status", "Created", "Status since", "Wanted", "Instances", "Worker pool", "Message"),
            row,
            empty=f"There is no compute requirement yet. {NO_POOL}",
        )
        return Page("Compute requirements", "compute", tables=[table])

    def compute(self, ask: Ask) -> Page | None:
        """Show a compute requirement with its instances."""
        requirement = self._scheduler.requirements.get(ask.id)
        if requirement is None:
            return None
        usage, template = requirement.usage, requirement.template
        ends = requirement.auto_shutdown_time
        facts = [
            ("Status", status(requirement.status)),
            ("Status since", when(requirement.changed)),
            ("Created", when(requirement.created)),
            ("Worker pool", self._link(requirement.pool)),
            ("Template", Cell(f"{template.namespace}/{template.name}")),
            ("Source", status(requirement.source_status)),
            ("Message", Cell(requirement.source_message or "none", kind="lines")),
            ("Instances wanted", Cell(f"{requirement.target:,}")),
            ("Instances", counted(requirement.counts)),
            ("Ends by itself", Cell("no") if ends is None else when(ends)),
            ("Tag", Cell(usage.tag or "none")),
            ("Id", Cell(requirement.id)),
        ]

        def row(each: Instance) -> list[Cell]:
            return [
                Cell(each.hostname), status(each.status), when(each.created), when(each.changed),
                Cell(each.private_ip or ""), self._link(each.node), Cell(each.reason or "", kind="lines"),
            ]  # fmt: skip

        table = listing(
            ask,
            self._at("compute", requirement.id),
            requirement.instances.values(),
            lambda each: each.hostname,
            ("Host name", "Status", "Requested", "Status since", "Private address", "Node", "Why it ended"),
            row,
            empty="It has no instance: none was asked for.",
            heading="Instances, newest first",
        )
        crumbs = [Cell("Compute requirements", self._at("compute"))]
        return Page(usage.name, "compute", crumbs, facts, [table])
