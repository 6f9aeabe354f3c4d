"""The platform's scheduler: pure state machines that give tasks to workers.

It does no I/O, has no clock and no threads. Every call takes the time; what machines did comes in
through :meth:`Scheduler.on_event`; what they are to do comes out of :meth:`Scheduler.take_effects`.
The work and the machines are kept by the layers :mod:`~yellowdog_ray.local.work` and
:mod:`~yellowdog_ray.local.machines`; this module joins them.

No task is ever queued on a node ahead of time, a worker belongs to one task group at a time, and a task
is given out anew only when its former process is known to be gone. Work per event does not depend on how
many tasks there are.
"""

from __future__ import annotations

from collections.abc import Callable

from yellowdog_ray.local.asks import Template
from yellowdog_ray.local.engine import SchedulerOptions
from yellowdog_ray.local.entities import Node, Pool, Shape, Task, TaskGroup, Worker
from yellowdog_ray.local.events import (
    Event,
    NodeFailed,
    NodeLost,
    NodeRegistered,
    NodeStopped,
    StartTask,
    TaskExited,
    TaskNotStarted,
    TaskStarted,
)
from yellowdog_ray.local.machines import Machines
from yellowdog_ray.local.work import Work

__all__ = ["Scheduler", "SchedulerOptions", "Template"]


class Scheduler(Machines, Work):
    """The state of the whole platform.

    :param options: choices where YellowDog's behaviour is not documented.
    :param new_uuid: gives the unique part of every id.
    """

    def __init__(
        self, options: SchedulerOptions | None = None, new_uuid: Callable[[], str] | None = None
    ) -> None:
        super().__init__(options, new_uuid)
        #: Namespaces that were created by name; using one needs no creation here.
        self.namespaces: set[str] = set()
        self._runs: dict[str, Task] = {}

    def known_namespaces(self) -> list[str]:
        """Return the namespaces that were created or are in use."""
        return sorted(self.namespaces | self.used_namespaces())

    def used_namespaces(self) -> set[str]:
        """Return the namespaces that something is in, or was."""
        used = {name for names in (self._work_names, self._requirement_names) for name, _ in names}
        return used | {each.namespace for each in self.templates.values()}

    # ------------------------------------------------------------------------------------ events

    def on_event(self, event: Event, now: float) -> None:
        """Take in what a machine did. Events about what is not known, or no longer, are passed over."""
        if isinstance(event, NodeRegistered):
            self._registered(event, now)
        elif isinstance(event, NodeFailed):
            self._failed(event.instance_id, event.reason, now)
        elif isinstance(event, (NodeStopped, NodeLost)):
            self._ended(event, now)
        elif isinstance(event, TaskStarted):
            self._started(event.run_id, now)
        elif isinstance(event, TaskExited):
            self._exited(event, now)
        else:
            self._not_started(event, now)
        self._settle(now)

    def _ended(self, event: NodeStopped | NodeLost, now: float) -> None:
        instance = self.instances.get(event.instance_id)
        if instance is None or instance.status == "TERMINATED":
            return
        reason = event.reason if isinstance(event, NodeLost) else "it was terminated"
        if instance.status == "PENDING":
            self._boot_failed(instance, reason, now)
        told, requirement = instance.status == "TERMINATING", instance.requirement
        self._gone(instance, reason, now)
        stands = requirement.status in ("PROVISIONING", "RUNNING")
        if not told and stands and requirement.pool is None and requirement.usage.maintain:
            self._launch(requirement, max(0, requirement.target - requirement.alive), now)

    def _node_gone(self, node: Node, reason: str, now: float) -> None:
        for worker in node.workers:
            task = worker.task
            if task is not None:
                self._unbind(worker, task, now)
                self._lost(task, f"The node that ran the task was lost: {reason}", now)
            if worker.group is not None:
                self._release(worker, now)
            if task is not None:
                self._review_group(task.group, now)

    def _lost(self, task: Task, text: str, now: float) -> None:
        if task.abort_requested is not None:
            self._set_task(task, "ABORTED", now)
        elif task.timed_out:
            self._timed_out(task, now)
        else:
            self._task_failed(task, "ALLOCATION_LOST", text, None, now)

    def _timed_out(self, task: Task, now: float) -> None:
        text = f"Task did not finish within its timeout of {self._limit(task):g} s"
        self._task_failed(task, "TIMED_OUT", text, None, now)

    def _limit(self, task: Task) -> float | None:
        return task.spec.timeout if task.spec.timeout is not None else task.group.spec.run.timeout

    def _started(self, run_id: str, now: float) -> None:
        task = self._runs.get(run_id)
        if task is not None and task.status == "ALLOCATED":
            task.started = now
            self._set_task(task, "EXECUTING", now)
            if self.options.timeout_from == "executing":
                self._arm_timeout(task, now)

    def _arm_timeout(self, task: Task, now: float) -> None:
        limit = self._limit(task)
        if limit is not None and task.run_id is not None:
            self._at(now + limit, self._timeout_due, (task, task.run_id))

    def _exited(self, event: TaskExited, now: float) -> None:
        self._started(event.run_id, now)
        task = self._runs.get(event.run_id)
        if task is None or task.worker is None:
            return
        worker, code = task.worker, event.exit_code
        self._unbind(worker, task, now)
        if task.abort_requested is not None:
            self._set_task(task, "ABORTED", now)
        elif task.timed_out:
            self._timed_out(task, now)
        elif code == 0:
            self._set_task(task, "COMPLETED", now)
        elif worker.node.instance.status == "TERMINATING":
            # The machine was told to end, and its processes were killed with it.
            self._lost(task, "The node that ran the task was terminated", now)
        else:
            text = f"Task process exited with non-zero exit code {code}"
            if event.reason:
                text += f": {event.reason}"
            tail = event.output_tail.rstrip()
            if tail:
                # More than the real platform says, which gives no output here.
                text += f"; the last lines of its output:\n{tail}"
            self._task_failed(task, "PROCESS_NON_ZERO_EXIT", text, code, now)
        self._next(worker, task.group, now)

    def _not_started(self, event: TaskNotStarted, now: float) -> None:
        task = self._runs.get(event.run_id)
        if task is None or task.worker is None:
            return
        worker = task.worker
        self._unbind(worker, task, now)
        if task.abort_requested is not None or task.timed_out or worker.node.instance.status == "TERMINATING":
            self._lost(task, event.reason, now)
        else:
            self._task_failed(task, "UNABLE_START_PROCESS", event.reason, None, now)
        self._next(worker, task.group, now)

    # -------------------------------------------------------------------------------- allocation

    def _unbind(self, worker: Worker, task: Task, now: float) -> None:
        """Take an ended attempt off its worker."""
        if task.run_id is not None:
            self._runs.pop(task.run_id, None)
        task.run_id = task.worker = worker.task = None
        worker.node.busy -= 1
        worker.node.pool.busy -= 1
        self._touch(worker.node.pool, now)

    def _next(self, worker: Worker, group: TaskGroup, now: float) -> None:
        """Give a worker that has become idle its next task, or let go of it."""
        self._review_group(group, now)
        if worker.group is group:
            if worker.node.usable and self._take(worker, group, now):
                return
            keep = worker.node.usable and group.active and group.status != "FINISHING"
            if keep and group.claimed <= group.min_workers:
                group.kept[worker.id] = worker
                return
            self._release(worker, now)
            self._review_group(group, now)
        self._node_quiet(worker.node, now)

    def _take(self, worker: Worker, group: TaskGroup, now: float) -> bool:
        """Start a group's next READY task on a worker that it has claimed."""
        if not group.active or group.claimed < group.min_workers:
            return False
        while group.ready:
            task = group.ready.popleft()
            if task.status == "READY":
                self._run(worker, task, now)
                return True
        return False

    def _run(self, worker: Worker, task: Task, now: float) -> None:
        group, spec, node = task.group, task.spec, worker.node
        group.kept.pop(worker.id, None)
        task.attempts += 1
        run_id = task.run_name
        task.run_id, task.worker, worker.task = run_id, worker, task
        task.node_id, task.worker_id, task.allocated = node.id, worker.id, now
        task.timed_out = False
        node.busy += 1
        node.pool.busy += 1
        self._runs[run_id] = task
        self._set_task(task, "ALLOCATED", now)
        environment = dict(group.spec.environment or {})
        if spec.environment is not None:
            if self.options.template_environment == "replace":
                environment = {}
            environment.update(spec.environment)
        self._effects.append(
            StartTask(
                run_id=run_id,
                instance_id=node.instance.id,
                slot=worker.slot,
                task_id=task.id,
                task_group_id=group.id,
                task_type=task.task_type or "",
                arguments=spec.arguments or (),
                task_data=spec.task_data if spec.task_data is not None else group.spec.task_data,
                environment=environment,
            )
        )
        if self.options.timeout_from == "allocated":
            self._arm_timeout(task, now)

    def _claim(self, worker: Worker, group: TaskGroup, now: float) -> None:
        self._free[worker.node.shape].pop(worker.id, None)
        pool, node = worker.node.pool, worker.node
        worker.group = group
        group.claimed += 1
        group.kept[worker.id] = worker
        node.claimed += 1
        node.idle_since = None
        pool.claimed += 1
        pool.last_claimed = now
        self._set_worker(worker, "RUNNING", now)
        self._dirty_groups[group.id] = group

    def _release(self, worker: Worker, now: float) -> None:
        group, node, pool = worker.group, worker.node, worker.node.pool
        if group is None:
            return
        worker.group = None
        group.claimed -= 1
        group.kept.pop(worker.id, None)
        node.claimed -= 1
        pool.claimed -= 1
        pool.last_released = now
        self._set_worker(worker, "STOPPED", now)
        self._dirty_groups[group.id] = group
        if node.claimed == 0:
            node.idle_since = now
        if node.usable:
            self._offer(worker, now)
            if node.claimed == 0:
                self._arm_node(node, now)

    def _node_ready(self, node: Node, now: float) -> None:
        for worker in node.workers:
            self._offer(worker, now)

    def _offer(self, worker: Worker, now: float) -> None:
        """Find the group that wants an unclaimed worker most; without one it stays free."""
        shape = worker.node.shape
        self._free[shape][worker.id] = worker
        best: TaskGroup | None = None
        for tag in {shape.tag, None}:
            for group in self._waiting.get(tag, {}).values():
                if (
                    (best is None or _rank(group) < _rank(best))
                    and group.active
                    and group.may_use(shape)
                    and group.wanted() > 0
                ):
                    best = group
        if best is not None:
            self._claim(worker, best, now)
            self._start_kept(best, now)

    def _start_kept(self, group: TaskGroup, now: float) -> None:
        if not group.counts.get("READY") or group.claimed < group.min_workers:
            return
        for worker in list(group.kept.values()):
            if not self._take(worker, group, now):
                break

    def _feed(self, group: TaskGroup, now: float) -> None:
        """Give a group's READY tasks to workers that it holds, then to free ones that suit."""
        self._start_kept(group, now)
        for shape in self._shapes_for(group):
            free = self._free.get(shape)
            if not free or not group.may_use(shape):
                continue
            while free and group.wanted() > 0:
                self._claim(next(iter(free.values())), group, now)
                self._start_kept(group, now)

    def _shapes_for(self, group: TaskGroup) -> list[Shape]:
        tags = group.spec.run.worker_tags or tuple(self._shapes)
        return [shape for tag in tags for shape in self._shapes.get(tag, ())]

    def _pools_for(self, group: TaskGroup) -> list[Pool]:
        tags = group.spec.run.worker_tags or tuple(self._pools_by_tag)
        return [
            pool
            for tag in tags
            for pool in self._pools_by_tag.get(tag, {}).values()
            if group.may_use(pool.shape)
        ]

    # ------------------------------------------------------------------------- what follows on it

    def _settle(self, now: float) -> None:
        self.revision += 1
        while self._dirty_groups or self._dirty_pools:
            groups, self._dirty_groups = self._dirty_groups, {}
            for group in sorted(groups.values(), key=_rank):
                self._file(group)
                if group.active and group.counts.get("READY"):
                    self._feed(group, now)
                    for pool in self._pools_for(group):
                        self._dirty_pools[pool.id] = pool
                self._review_group(group, now)
                self._file(group)
            pools, self._dirty_pools = self._dirty_pools, {}
            for pool in pools.values():
                self._review_pool(pool, now)
                self._scale(pool, now)

    def _file(self, group: TaskGroup) -> None:
        """Keep a group where workers look for work exactly while it has some."""
        waiting = group.active and group.counts.get("READY", 0) > 0
        for tag in group.spec.run.worker_tags or (None,):
            if waiting:
                self._waiting.setdefault(tag, {})[group.id] = group
            elif tag in self._waiting:
                self._waiting[tag].pop(group.id, None)

    def _scale(self, pool: Pool, now: float) -> None:
        """Add nodes for READY tasks that no worker of this pool, present or booting, will take."""
        if pool.finished or self._standing(pool) >= pool.max_nodes:
            return
        per_node = pool.spec.workers_on(pool.shape.vcpus)
        if per_node == 0:
            return
        need = 0
        for tag in {pool.spec.worker_tag, None}:
            for group in self._waiting.get(tag, {}).values():
                if group.active and group.may_use(pool.shape):
                    coming = sum(_coming(other) for other in self._pools_for(group) if other is not pool)
                    need += max(0, group.wanted() - coming)
        missing = need - _coming(pool)
        if missing > 0:
            self.grow(pool, -(-missing // per_node), now)


def _rank(group: TaskGroup) -> tuple[float, float, float, int]:
    """Order groups: higher priorities first, then the older ones."""
    return (-group.work.priority, -group.priority, group.work.created, group.number)


def _coming(pool: Pool) -> int:
    """Return how many workers the booting nodes of a pool will bring."""
    return pool.requirement.pending * pool.spec.workers_on(pool.shape.vcpus)
