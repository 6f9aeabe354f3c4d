"""Clusters on the simulated platform: how the tests make them, and what the platform says of them."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from datetime import timedelta

import pytest

from tests.controlplane import KEY_ID, SECRET, Served
from yellowdog_ray.local.events import AbortTask, NodeStopped, StopNode
from yellowdog_ray.raydog import assembly, ray_auth, teardown, transport
from yellowdog_ray.raydog import platform as platform_module
from yellowdog_ray.raydog.builder import RayDogCluster
from yellowdog_ray.raydog.state import ClusterState

SHORT = timedelta(seconds=20)


def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let persistent faults be given up on sooner than in the field, and let looks come quickly."""
    monkeypatch.setattr(transport, "RETRY_SECONDS", 0.4)
    monkeypatch.setattr(transport, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(transport, "NOT_YET_SECONDS", 0.3)
    monkeypatch.setattr(platform_module, "NOT_YET_SECONDS", 0.3)
    monkeypatch.setattr(assembly, "SETTLE_SECONDS", 0.01)
    monkeypatch.setattr(teardown, "STEP_SECONDS", 1.0)
    monkeypatch.setattr(teardown, "VERIFY_SECONDS", 1.5)
    monkeypatch.setattr(teardown, "LATE_SECONDS", 0.2)
    monkeypatch.setattr(teardown, "_CONFIRM_SECONDS", 0.05)
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setattr(ray_auth, "_tokens", [])


def make(served: Served, name: str = "demo", **options) -> RayDogCluster:
    values = {
        "yd_application_key_id": KEY_ID,
        "yd_application_key_secret": SECRET,
        "cluster_name": name,
        "cluster_namespace": "test",
        "head_node_compute_requirement_template_id": "test/small",
        "yd_platform_api_url": served.url,
        **options,
    }
    return RayDogCluster(**values)


def attach(state, **options) -> RayDogCluster:
    return RayDogCluster.attach(state, KEY_ID, SECRET, **options)


def state_of(cluster: RayDogCluster) -> ClusterState:
    return ClusterState.from_json(cluster.save_state_to_json())


def eventually(condition: Callable[[], object], seconds: float = 10.0) -> None:
    """Wait until something is so, and fail where it does not come to be so."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it has not come to be so"
        time.sleep(0.005)


# -- the platform's own books --------------------------------------------------------------------------


def pools(served: Served) -> list[str]:
    """The worker pools that have not been shut down."""
    return served.call(
        lambda: sorted(pool.name for pool in served.core.scheduler.pools.values() if not pool.finished)
    )


def nodes(served: Served, pool: str) -> int:
    """How many machines of a pool are booting or up."""
    return served.call(
        lambda: sum(
            one.alive for one in served.core.scheduler.requirements.values() if one.usage.name == pool
        )
    )


def tasks(served: Served, group: str, *statuses: str) -> list[str]:
    """The names of a group's tasks, of some statuses or all, in the order in which they were added."""
    return served.call(
        lambda: [
            task.spec.name
            for one in served.core.scheduler.groups.values()
            if one.spec.name == group
            for task in one.tasks
            if not statuses or task.status in statuses
        ]
    )


def executing(served: Served) -> Counter[tuple[str, str]]:
    """How many tasks of each group execute on nodes of each pool."""
    return served.call(
        lambda: Counter(
            (task.group.spec.name, task.worker.node.pool.spec.worker_tag)
            for task in served.core.scheduler.tasks.values()
            if task.status == "EXECUTING" and task.worker is not None
        )
    )


def _running_task(served: Served, group: str, name: str | None):
    return next(
        task
        for task in served.core.scheduler.tasks.values()
        if task.group.spec.name == group
        and task.status == "EXECUTING"
        and task.group.work.status == "RUNNING"
        and name in (None, task.spec.name)
    )


def end_leaving(served: Served) -> None:
    """Let what was told to end have ended at once, whatever ``stop_delay`` was, and later things soon."""

    def end() -> None:
        backend = served.backend
        backend.stop_delay = 0.002
        for effect in list(backend.applied):
            if isinstance(effect, AbortTask):
                backend.exit(effect.run_id, 143)
            elif isinstance(effect, StopNode):
                backend._on_event(NodeStopped(effect.instance_id))

    served.call(end)


def let_exit(served: Served, group: str, code: int, output: str = "", *, task: str | None = None) -> None:
    """Let the process of one of a group's tasks end."""
    served.call(lambda: served.backend.exit(_running_task(served, group, task).run_id, code, output))


def lose_machine(served: Served, group: str, *, task: str | None = None) -> None:
    """Let the machine die on which one of a group's tasks runs."""
    served.call(
        lambda: served.backend.lose(_running_task(served, group, task).worker.node.instance.id, "preempted")
    )


def slow_boot(served: Served, pool: str, seconds: float) -> None:
    """Let the machines of one pool take longer to boot than those of the others."""
    backend, usual, apply = served.backend, served.backend.boot_delay, served.backend.apply

    def delayed(effect) -> None:
        backend.boot_delay = seconds if getattr(effect, "hostname", "").startswith(pool) else usual
        try:
            apply(effect)
        finally:
            backend.boot_delay = usual

    backend.apply = delayed
