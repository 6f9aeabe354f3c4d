"""The observability node, with a real Prometheus."""

from __future__ import annotations

import json
import shutil
import time
import urllib.request
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest

from yellowdog_ray import LocalPlatform, RayDogCluster, RayTunnels, SSHTunnelSpec

from .test_cluster import free_port


@pytest.mark.ray
def test_prometheus_finds_the_nodes(
    platform: LocalPlatform, make_cluster: Callable[..., RayDogCluster], nothing_runs: Callable[[], None]
) -> None:
    """Prometheus on the observability node discovers head and worker by the token, and scrapes them."""
    if not shutil.which("prometheus"):
        pytest.skip("there is no prometheus on this machine")
    cluster = make_cluster(
        enable_observability=True,
        observability_node_compute_requirement_template_id=platform.template_names[0],
    )
    cluster.add_worker_pool(platform.template_names[0], None, 1)
    _, address = cluster.build(timedelta(minutes=2))
    assert cluster.observability_node_private_ip
    assert len(platform.nodes()) == 3
    port = free_port()
    with RayTunnels(
        str(address),
        platform.ssh_user,
        private_key_file=platform.ssh_private_key_file,
        ssh_port=platform.ssh_port,
        host_key=platform.ssh_host_key,
        ray_tunnel_specs=[SSHTunnelSpec("localhost", port, cluster.observability_node_private_ip, 9090)],
    ) as tunnels:
        tunnels.wait_for_ray(timedelta(seconds=60))
        deadline = time.monotonic() + 90
        # Head, worker, and on the head the dashboard and the autoscaler.
        while len(up := _targets_up(port)) < 4:
            assert time.monotonic() < deadline, f"only {sorted(up)} are up"
            time.sleep(1)
    cluster.shut_down()
    nothing_runs()


def _targets_up(port: int) -> set[str]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/v1/targets", timeout=5) as answer:
            targets: list[dict[str, Any]] = json.load(answer)["data"]["activeTargets"]
    except OSError:
        return set()
    return {target["labels"]["instance"] for target in targets if target["health"] == "up"}
