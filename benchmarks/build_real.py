"""How long a real cluster takes to build, beside the same Ray nodes started by hand.

Both run on the local platform, with a head and two workers. *By hand* is the best that a person could do:
the three machines are up already, and the three ``ray start`` commands are given at the same moment.
*build()* starts with nothing. The time ends when Ray itself counts three living nodes. The rounds
alternate, and the ratio is the median of each round's own, so that a slow moment of
the machine counts for both.

Usage: python benchmarks/build_real.py [ROUNDS]
"""

from __future__ import annotations

import secrets
import socket
import statistics
import sys
import time
from typing import Any

from yellowdog_client import PlatformClient
from yellowdog_client.model import (
    ApiKey,
    ComputeRequirementTemplateUsage,
    NodeSearch,
    NodeWorkerTarget,
    ProvisionedWorkerPoolProperties,
    RunSpecification,
    ServicesSchema,
    Task,
    TaskGroup,
    WorkRequirement,
)

from yellowdog_ray import LocalPlatform, RayDogCluster, RayTunnels, SSHTunnelSpec
from yellowdog_ray.raydog import ray_auth

NODES = 3
TARGET = 1.25
HEAD = "ray start --head --port=6379 --ray-client-server-port=10001 --block"
WORKER = "ray start --address=$RAY_HEAD_IP:6379 --block"


def main() -> int:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    rows = []
    with LocalPlatform() as platform:
        print(platform.describe())
        for number in range(rounds):
            # Which comes first alternates too.
            order = [by_hand, by_builder] if number % 2 == 0 else [by_builder, by_hand]
            seconds = {measure: measure(platform, number) for measure in order}
            rows.append((seconds[by_hand], seconds[by_builder]))
            print(f"round {number + 1}: by hand {rows[-1][0]:.2f} s, build() {rows[-1][1]:.2f} s")
    ratio = statistics.median(built / hand for hand, built in rows)
    print(f"build() to {NODES} nodes in Ray takes {ratio:.2f} times as long as by hand (target: {TARGET})")
    return 0


def by_builder(platform: LocalPlatform, number: int) -> float:
    """Measure build() on a platform that has no node yet."""
    cluster = RayDogCluster(
        platform.key_id,
        platform.secret,
        f"bench-{number}",
        platform.namespace,
        platform.template_names[0],
        None,
        platform.url,
    )
    for _ in range(NODES - 1):
        cluster.add_worker_pool(platform.template_names[0], None, 1)
    with cluster:
        began = time.perf_counter()
        _, address = cluster.build()
        wait_for_ray(platform, str(address))
        return time.perf_counter() - began


def by_hand(platform: LocalPlatform, number: int) -> float:
    """Measure the bare ``ray start`` commands on nodes that are up."""
    secret = secrets.token_hex(32)
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secret, "RAY_USAGE_STATS_ENABLED": "0"}
    # Ray keeps the first token that this process used; the builder's own means make it forget.
    ray_auth.activate(secret)
    schema = ServicesSchema(defaultUrl=platform.url)
    with PlatformClient.create(schema, ApiKey(platform.key_id, platform.secret)) as client:
        pools = [
            client.worker_pool_client.provision_worker_pool(
                ComputeRequirementTemplateUsage(
                    templateId=platform.template_names[0],
                    requirementName=f"hand-{number}-{role}",
                    requirementNamespace="local",
                    targetInstanceCount=count,
                ),
                ProvisionedWorkerPoolProperties(
                    createNodeWorkers=NodeWorkerTarget.per_node(1), workerTag=f"hand-{number}-{role}"
                ),
            )
            for role, count in (("head", 1), ("worker", NODES - 1))
        ]
        head = wait_for_nodes(client, pools[0].id, 1)[0]
        wait_for_nodes(client, pools[1].id, NODES - 1)
        work = client.work_client.add_work_requirement(
            WorkRequirement(
                namespace="local",
                name=f"hand-{number}",
                taskGroups=[
                    TaskGroup(
                        role, RunSpecification(taskTypes=["bash"], workerTags=[f"hand-{number}-{role}"])
                    )
                    for role in ("head", "worker")
                ],
            )
        )
        activate = '. "$YD_AGENT_HOME/venv/bin/activate"\n'
        began = time.perf_counter()
        for group, command, count in zip(work.taskGroups or [], (HEAD, WORKER), (1, NODES - 1), strict=True):
            environment = {**token, "RAY_HEAD_IP": head.details.privateIpAddress}
            client.work_client.add_tasks_to_task_group(
                group,
                [
                    Task(
                        name=f"task-{index}",
                        taskType="bash",
                        arguments=["taskdata.txt"],
                        taskData=f"{activate}exec {command}\n",
                        environment=environment,
                    )
                    for index in range(count)
                ],
            )
        wait_for_ray(platform, head.details.publicIpAddress)
        seconds = time.perf_counter() - began
        client.work_client.cancel_work_requirement_by_id(str(work.id), abort=True)
        for pool in pools:
            client.compute_client.terminate_compute_requirement_by_id(str(pool.computeRequirementId))
        while platform.nodes():
            time.sleep(0.05)
    ray_auth.deactivate(secret)
    return seconds


def wait_for_nodes(client: PlatformClient, pool_id: Any, count: int) -> list[Any]:
    while True:
        nodes = client.worker_pool_client.find_nodes(NodeSearch(workerPoolId=pool_id))
        if len(nodes) == count:
            return nodes
        time.sleep(0.02)


def wait_for_ray(platform: LocalPlatform, address: str) -> None:
    """Wait until Ray's own directory of nodes has all of them alive."""
    from ray._raylet import GcsClient

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with RayTunnels(
        address,
        platform.ssh_user,
        private_key_file=platform.ssh_private_key_file,
        ssh_port=platform.ssh_port,
        ray_tunnel_specs=[SSHTunnelSpec("127.0.0.1", port, "127.0.0.1", 6379)],
    ):
        deadline = time.monotonic() + 60
        client = None
        while time.monotonic() < deadline:
            try:
                client = client or GcsClient(address=f"127.0.0.1:{port}")
                nodes = client.get_all_node_info(timeout=1)
                if sum(node.state == 0 for node in nodes.values()) == NODES:
                    return
            except Exception:
                client = None
            time.sleep(0.05)
    raise TimeoutError(f"Ray had not {NODES} nodes after 60 s")


if __name__ == "__main__":
    sys.exit(main())
