"""The life of a real cluster on the local platform, as a user leads it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.ssh_fixtures import free_port
from yellowdog_ray import LocalPlatform, RayDogCluster, RayTunnels, SSHTunnelSpec
from yellowdog_ray.errors import BuildError, BuildTimeoutError, NotFoundError

pytestmark = pytest.mark.ray


@contextmanager
def ray_session(platform: LocalPlatform, address: str) -> Iterator[Any]:
    """A Ray Client session through the tunnels, once the head answers."""
    import ray

    specs = [SSHTunnelSpec("localhost", free_port(), "localhost", port) for port in (10001, 8265)]
    with RayTunnels(
        address,
        platform.ssh_user,
        private_key_file=platform.ssh_private_key_file,
        ray_tunnel_specs=specs,
        ssh_port=platform.ssh_port,
        host_key=platform.ssh_host_key,
    ) as tunnels:
        tunnels.wait_for_ray(timedelta(seconds=60))
        ray.init(tunnels.client_address, logging_level="ERROR")
        try:
            yield ray
        finally:
            ray.shutdown()


def alive(ray: Any, count: int, timeout: float = 60) -> list[dict[str, Any]]:
    """Wait until Ray has so many nodes, and return them."""
    deadline = time.monotonic() + timeout
    while True:
        nodes = [node for node in ray.nodes() if node["Alive"]]
        if len(nodes) == count:
            return nodes
        assert time.monotonic() < deadline, f"Ray has {len(nodes)} nodes, not {count}"
        time.sleep(0.2)


def addresses_by_task(ray: Any, nodes: list[dict[str, Any]]) -> set[str]:
    """Run a task on each node and return the addresses that the tasks saw."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    @ray.remote
    def where() -> str:
        import ray

        return str(ray.util.get_node_ip_address())

    strategies = [NodeAffinitySchedulingStrategy(node["NodeID"], soft=False) for node in nodes]
    return set(
        ray.get([where.options(scheduling_strategy=strategy).remote() for strategy in strategies], timeout=60)
    )


def node_addresses(nodes: list[dict[str, Any]]) -> set[str]:
    return {node["NodeManagerAddress"] for node in nodes}


def test_a_cluster_from_build_to_proxy(
    platform: LocalPlatform,
    make_cluster: Callable[..., RayDogCluster],
    own_ray: Callable[[], int],
    nothing_runs: Callable[[], None],
    tmp_path: Path,
) -> None:
    """A cluster is built, computes, grows, shrinks twice, and is shut down by another process."""
    cluster = make_cluster()
    template = platform.template_names[0]
    assert cluster.add_worker_pool(template, None, 1, "first") is None
    assert cluster.add_worker_pool(template, None, 1, "second") is None

    private_ip, public_ip = cluster.build(timedelta(minutes=2))

    assert cluster.wait_for_workers(timeout=timedelta(seconds=30)) == 2
    assert len(platform.nodes()) == 3
    assert public_ip is not None
    with ray_session(platform, public_ip) as ray:
        nodes = alive(ray, 3)
        assert private_ip in node_addresses(nodes)
        assert addresses_by_task(ray, nodes) == node_addresses(nodes)

        third = cluster.add_worker_pool(template, None, 1, "third")
        assert third
        assert cluster.get_worker_pool_internal_name_by_id(third) == "third"
        grown = alive(ray, 4)
        (joined,) = node_addresses(grown) - node_addresses(nodes)
        assert joined in addresses_by_task(ray, grown)

        cluster.remove_worker_pool(third)
        assert node_addresses(alive(ray, 3)) == node_addresses(nodes)
        cluster.remove_worker_pool_by_internal_name("first")
        fewer = alive(ray, 2)
        assert addresses_by_task(ray, fewer) == node_addresses(fewer)
    assert cluster.worker_pool_internal_names == ["second"]
    assert own_ray() == 2

    state = tmp_path / "state.json"
    cluster.save_state_to_json_file(str(state))
    assert platform.secret not in state.read_text()
    subprocess.run(
        [sys.executable, "-m", "yellowdog_ray.cli", "shut-down", str(state)],
        check=True,
        timeout=60,
        env={
            **os.environ,
            "YD_API_KEY_ID": platform.key_id,
            "YD_API_KEY_SECRET": platform.secret,
        },
    )
    nothing_runs()
    assert own_ray() == 3


def test_a_head_that_fails(
    platform: LocalPlatform, make_cluster: Callable[..., RayDogCluster], nothing_runs: Callable[[], None]
) -> None:
    """A head script that ends with an error ends the build at once, with its exit code and its last words."""
    cluster = make_cluster(head_node_ray_start_script="echo starting\necho 'no such licence' >&2\nexit 7\n")
    cluster.add_worker_pool(platform.template_names[0], None, 1)

    began = time.monotonic()
    with pytest.raises(BuildError) as caught:
        cluster.build()

    assert time.monotonic() - began < 15
    message = str(caught.value)
    assert "head-node" in message
    assert "7" in message
    assert "no such licence" in message
    nothing_runs()


def test_a_build_that_takes_too_long(
    platform: LocalPlatform, make_cluster: Callable[..., RayDogCluster], nothing_runs: Callable[[], None]
) -> None:
    """A build that is out of time raises TimeoutError and leaves nothing running."""
    cluster = make_cluster()
    cluster.add_worker_pool(platform.template_names[0], None, 1)

    with pytest.raises(BuildTimeoutError) as caught:
        cluster.build(timedelta(milliseconds=10))

    assert isinstance(caught.value, TimeoutError)
    nothing_runs()


def test_an_unknown_template(
    platform: LocalPlatform, make_cluster: Callable[..., RayDogCluster], nothing_runs: Callable[[], None]
) -> None:
    """A template that nobody knows is named before anything is created."""
    cluster = make_cluster()
    cluster.add_worker_pool("local/no-such-template", None, 1)

    with pytest.raises(NotFoundError, match="no-such-template"):
        cluster.build()
    nothing_runs()


def test_the_demo() -> None:
    """The demo command says what it computed where, and ends well."""
    result = subprocess.run(
        [sys.executable, "-m", "yellowdog_ray.cli", "demo"],
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "pi is about 3.14" in result.stdout
    assert result.stdout.count("tasks ran on") == 2
