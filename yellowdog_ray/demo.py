"""The demonstration behind ``raydog demo``: a real Ray cluster on the embedded local platform."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from yellowdog_ray.errors import LocalPlatformError, WaitTimeoutError
from yellowdog_ray.local.host import NODE_MEMORY, free_memory
from yellowdog_ray.local.needs import require_linux
from yellowdog_ray.local.platform import LocalPlatform
from yellowdog_ray.raydog.builder import RayDogCluster
from yellowdog_ray.utils.ray_ssh_tunnels import RayTunnels

__all__ = ["run"]

_NODES = 3
_JOIN_TIMEOUT = 120.0
_SAMPLES = 500_000


def run(isolation: str | None = None) -> int:
    """Build a cluster of a head and two workers, compute on it, and shut it down from another process.

    :param isolation: what the nodes are made of; None for the best that this machine allows.
    :returns: the exit status of the command: 0 if all of it worked.
    """
    require_linux()
    if free_memory() < _NODES * NODE_MEMORY:
        raise LocalPlatformError(
            f"too little memory: the demo's {_NODES} Ray nodes need {_NODES * NODE_MEMORY >> 20} MiB, "
            f"{free_memory() >> 20} MiB are free"
        )
    _require_ray()
    with _platform(isolation) as platform:
        state_file = Path(platform.directory, "demo-cluster.json")
        cluster = RayDogCluster(
            yd_application_key_id=platform.key_id,
            yd_application_key_secret=platform.secret,
            yd_platform_api_url=platform.url,
            cluster_name="demo",
            cluster_namespace=platform.namespace,
            head_node_compute_requirement_template_id=platform.template_names[0],
            head_node_ray_start_script=None,
            progress=False,  # the steps below are the progress
        )
        for name in ("first", "second"):
            cluster.add_worker_pool(
                worker_node_compute_requirement_template_id=platform.template_names[0],
                worker_node_task_script=None,
                worker_pool_node_count=1,
                worker_pool_internal_name=name,
            )
        with cluster:
            with _step("Building the cluster: a head and two worker pools"):
                private_ip, public_ip = cluster.build()
            cluster.save_state_to_json_file(str(state_file))
            _say(f"head at {private_ip}; state saved to {state_file}")
            _use(platform, public_ip or private_ip)
            with _step("Shutting it down from its saved state, in another process"):
                _shut_down_elsewhere(platform, state_file)
            if platform.nodes():
                raise LocalPlatformError(f"nodes still exist: {', '.join(platform.nodes())}")
        with _step("Stopping the local platform"):
            platform.close()
        left = platform.leftovers()
    if left:
        raise LocalPlatformError(f"this is left on the machine: {', '.join(left)}")
    _say("Looked for processes, network interfaces and files of it: nothing is left.")
    return 0


@contextmanager
def _platform(isolation: str | None) -> Iterator[LocalPlatform]:
    platform = LocalPlatform(isolation=isolation)
    with _step("Starting the local platform"):
        platform.start()
    _say(platform.describe())
    with platform:
        yield platform


def _use(platform: LocalPlatform, address: str) -> None:
    """Compute on every node of the cluster through SSH tunnels."""
    import ray

    tunnels = RayTunnels(
        address,
        platform.ssh_user,
        private_key_file=platform.ssh_private_key_file,
        ssh_port=platform.ssh_port,
        host_key=platform.ssh_host_key,
        local_port="auto",  # so that a Ray of the user's own does not get in the way
    )
    with tunnels:
        with _step("Waiting for Ray on the head, through the tunnels"):
            tunnels.wait_for_ray()
        with _step("Opening a Ray Client session"):
            ray.init(tunnels.client_address, logging_level=logging.ERROR)
        try:
            with _step("Waiting until both workers have joined"):
                nodes = _wait_for_nodes(ray)
            for node in nodes:
                role = "head" if "node:__internal_head__" in node["Resources"] else "worker"
                _say(f"{role:6} {node['NodeManagerAddress']}  {node['NodeManagerHostname']}")
            with _step("Computing pi on every worker"):
                pi, where = _compute_pi(ray, nodes)
            _say(f"pi is about {pi:.4f}")
            for host, count in sorted(where.items()):
                _say(f"{count} tasks ran on {host}")
            if len(where) < 2:
                raise LocalPlatformError("the tasks did not run on two different workers")
        finally:
            ray.shutdown()


def _compute_pi(ray: Any, nodes: list[dict[str, Any]]) -> tuple[float, Counter[str]]:
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    def sample(seed: int, samples: int) -> tuple[int, str]:
        import random

        import ray

        random.seed(seed)
        hits = sum(random.random() ** 2 + random.random() ** 2 <= 1 for _ in range(samples))  # noqa: S311
        return hits, str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]

    remote = ray.remote(sample)
    workers = [node["NodeID"] for node in nodes if "node:__internal_head__" not in node["Resources"]]
    references = [
        remote.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(workers[seed % len(workers)], soft=False)
        ).remote(seed, _SAMPLES)
        for seed in range(4)
    ]
    results = ray.get(references)
    hits = sum(hits for hits, _ in results)
    return 4 * hits / (_SAMPLES * len(results)), Counter(host for _, host in results)


def _wait_for_nodes(ray: Any) -> list[dict[str, Any]]:
    deadline = time.monotonic() + _JOIN_TIMEOUT
    while True:
        alive = [node for node in ray.nodes() if node["Alive"]]
        if len(alive) >= _NODES:
            return alive
        if time.monotonic() > deadline:
            raise WaitTimeoutError(
                f"only {len(alive)} of {_NODES} nodes have joined Ray after {_JOIN_TIMEOUT:.0f} s"
            )
        time.sleep(0.1)


def _shut_down_elsewhere(platform: LocalPlatform, state_file: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "yellowdog_ray.cli", "shut-down", str(state_file)],
        check=True,
        env={
            **os.environ,
            "YD_API_KEY_ID": platform.key_id,
            "YD_API_KEY_SECRET": platform.secret,
            "YD_API_URL": platform.url,
        },
        stdout=subprocess.DEVNULL,
    )


def _require_ray() -> None:
    try:
        import ray  # noqa: F401
    except ImportError:
        raise LocalPlatformError("the demo needs Ray: pip install 'yellowdog-ray[local,ray]'") from None


@contextmanager
def _step(what: str) -> Iterator[None]:
    print(f"{what} ...", end="", flush=True)
    began = time.monotonic()
    try:
        yield
    except BaseException:
        print(f" failed after {time.monotonic() - began:.1f} s", flush=True)
        raise
    print(f" {time.monotonic() - began:.1f} s", flush=True)


def _say(text: str) -> None:
    print(f"    {text}", flush=True)
