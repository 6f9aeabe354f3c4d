"""From what is asked for to the objects of the YellowDog SDK: pure, by tables."""

from __future__ import annotations

from datetime import timedelta

import pytest
from yellowdog_client.common.json import Json

from yellowdog_ray.raydog import plan
from yellowdog_ray.raydog.specs import ClusterSpec, NodeSpec, WorkerPoolSpec

NODE = NodeSpec(
    template="ns/tpl", images_id="ami-1", userdata="#cloud", instance_tags={"a": "B"}, metrics_enabled=True
)
CLUSTER = ClusterSpec(name="ray", namespace="ns", tag="team", head=NODE, observability=NODE)
HEAD = plan.head_pool(CLUSTER, "head script")
WATCH = plan.observability_pool(CLUSTER, NODE, "watch script")
WORKERS = plan.worker_pool(CLUSTER, 7, WorkerPoolSpec(node=NODE, node_count=2500), "worker script")


def test_names():
    """The names on the platform are the ones that users know."""
    assert (HEAD.name, HEAD.group) == ("ray-00-head", "head-node")
    assert (WATCH.name, WATCH.group) == ("ray-observability", "observability-node")
    assert (WORKERS.name, WORKERS.group, WORKERS.internal_name) == (
        "ray-07-wrkrs",
        "worker-nodes-07",
        "worker-nodes-07",
    )
    hundred = plan.worker_pool(CLUSTER, 100, WorkerPoolSpec(node=NODE, node_count=1, internal_name="x"), "s")
    assert (hundred.name, hundred.group, hundred.internal_name) == ("ray-100-wrkrs", "worker-nodes-100", "x")


IDLE = timedelta(hours=12)


def test_pool_request():
    """A pool's request carries everything that was asked for, and its worker tag is its name."""
    usage, properties = plan.pool_request(CLUSTER, WORKERS, None, "f00", IDLE)
    assert Json.dump(usage) == {
        "templateId": "ns/tpl",
        "requirementName": "ray-07-wrkrs",
        "requirementNamespace": "ns",
        "requirementTag": "team",
        "targetInstanceCount": 2500,
        "imagesId": "ami-1",
        "userData": "#cloud",
        "instanceTags": {"a": "B", "raydog-build": "f00"},
        "maintainInstanceCount": False,
    }
    assert properties.workerTag == "ray-07-wrkrs"
    assert properties.maxNodes == 10_000  # so that it can be scaled
    assert properties.metricsEnabled is True
    assert properties.createNodeWorkers.targetCount == 1


@pytest.mark.parametrize("pool", [HEAD, WATCH, WORKERS], ids=lambda pool: pool.role)
def test_idle_shutdown(pool):
    """A node that has no task is given back after half an hour, and its pool ends much later."""
    _, properties = plan.pool_request(CLUSTER, pool, None, "f00", IDLE)
    assert properties.idlePoolShutdown.enabled is True
    assert properties.idlePoolShutdown.timeout == IDLE
    assert properties.idleNodeShutdown.enabled is True
    assert properties.idleNodeShutdown.timeout == timedelta(minutes=30)


@pytest.mark.parametrize("timeout", [None, timedelta(minutes=1), timedelta(hours=11), timedelta(days=3)])
def test_no_pool_ends_while_it_waits_for_its_head(timeout):
    """However long a build may take, an idle pool outlives it."""
    assert plan.pool_idle_timeout(timeout) >= (timeout or plan.MAX_BUILD) + timedelta(hours=1)


def test_lifetime_is_the_platforms():
    """A lifetime is set on the compute at its creation, and on the tasks."""
    usage, _ = plan.pool_request(CLUSTER, HEAD, timedelta(hours=3), "f00", IDLE)
    assert (usage.autoShutdown.enabled, usage.autoShutdown.timeout) == (True, timedelta(hours=3))
    group = plan.task_group(CLUSTER, HEAD, timedelta(hours=3))
    assert group.runSpecification.taskTimeout == timedelta(hours=3)


def test_worker_group():
    """A worker group outlives its tasks, runs one endless task a node, and heals lost nodes only."""
    group = Json.dump(plan.task_group(CLUSTER, WORKERS, None))
    assert group["finishIfAllTasksFinished"] is False
    assert group["finishIfAnyTaskFailed"] is False
    assert group["taskTemplate"] == {"taskType": "bash", "taskData": "worker script"}
    assert group["runSpecification"] == {
        "taskTypes": ["bash"],
        "tasksPerWorker": 1,
        "workerTags": ["ray-07-wrkrs"],
        "namespaces": ["ns"],
        "disablePreallocation": True,
        "retryPolicy": {
            "maxRetries": plan.MAX_ALLOCATION_RETRIES,
            "retryErrors": {"includes": [{"errorTypes": {"includes": ["ALLOCATION_LOST"]}}]},
        },
    }


def test_head_is_never_run_again():
    """A head that ends ends its group, and nothing retries it: another node has another address."""
    group = plan.task_group(CLUSTER, HEAD, None)
    assert group.runSpecification.retryPolicy is None
    assert group.finishIfAllTasksFinished is True
    assert group.runSpecification.maxWorkers == 1


def test_work_requirement():
    """There is one group for each pool, found by its name."""
    requirement = plan.work_requirement(CLUSTER, [HEAD, WATCH, WORKERS], None, "f00")
    assert (requirement.name, requirement.namespace, requirement.tag) == ("ray", "ns", "team")
    assert [group.name for group in requirement.taskGroups] == [
        "head-node",
        "observability-node",
        "worker-nodes-07",
    ]
    # The head's group bears the build's id, by which it is recognised.
    assert [group.tag for group in requirement.taskGroups] == ["f00", "team", "team"]


def test_no_secret_is_shown():
    """What a user's script or user data holds is not in any repr."""
    node = NodeSpec(template="ns/tpl", script="export KEY=hidden-1", userdata="#cloud hidden-2")
    pool = plan.head_pool(ClusterSpec(name="ray", namespace="ns", head=node), "hidden-3")
    assert "hidden" not in repr(pool)
    assert "ns/tpl" in repr(pool)


def test_tasks_come_in_batches_with_names():
    """Tasks are named, so that a lost answer can be made good; none of them carries the script."""
    batches = list(plan.task_batches(WORKERS, {"A": "b"}))
    assert [len(batch) for batch in batches] == [1000, 1000, 500]
    tasks = [task for batch in batches for task in batch]
    assert len({task.name for task in tasks}) == 2500
    assert Json.dump(tasks[0]) == {
        "name": "worker-nodes-07-00001",
        "arguments": ["taskdata.txt"],
        "environment": {"A": "b"},
    }
    more = list(plan.task_batches(WORKERS, {}, first=2501))
    assert more[0][0].name == "worker-nodes-07-02501"


@pytest.mark.parametrize(
    ("role", "expected"),
    [
        ("head", {"RAYDOG_NODE_IP": "10.0.0.9", "OBSERVABILITY_HOST": "10.0.0.2"}),
        (
            "worker",
            {
                "RAY_HEAD_IP": "10.0.0.1",
                "RAY_HEAD_NODE_PRIVATE_IP": "10.0.0.1",
                "RAYDOG_NODE_IP": "10.0.0.9",
                "OBSERVABILITY_HOST": "10.0.0.2",
            },
        ),
    ],
)
def test_environment(role, expected):
    """Workers are told the head by both names; the token is there where there is one."""
    addresses = {"head_ip": "10.0.0.1", "node_ip": "10.0.0.9", "observability_ip": "10.0.0.2"}
    assert plan.environment(role, **addresses, token=None) == expected
    assert plan.environment(role, **addresses, token="t0k") == {
        **expected,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": "t0k",
    }


@pytest.mark.parametrize(
    ("role", "token", "widely"), [("head", "t0k", True), ("worker", "t0k", False), ("head", None, False)]
)
def test_dashboard_of_a_direct_cluster(role, token, widely):
    """Whoever connects without SSH reaches the dashboard, but only where a token protects it."""
    variables = plan.environment(
        role, head_ip="10.0.0.1", node_ip=None, observability_ip=None, token=token, direct=True
    )
    assert ("RAYDOG_DASHBOARD_DIRECT" in variables) is widely
