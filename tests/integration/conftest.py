"""Real platforms, clusters and a Ray of the user's own."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from yellowdog_ray import LocalPlatform, RayDogCluster
from yellowdog_ray.local import directory as directory_module
from yellowdog_ray.local import platform as platform_module
from yellowdog_ray.local.nodes import Isolation

_numbers = itertools.count(1)


def kinds() -> list[Isolation]:
    """The kinds of node that this user's tests can run on."""
    best = Isolation.NAMESPACES if os.geteuid() == 0 else Isolation.USER_NAMESPACES
    return [best, Isolation.PROCESSES]


def kinds_with_ray() -> list[Isolation]:
    """The kinds of node that whole clusters are tested on.

    Plain processes are for users without privileges, and are tested as one: see .ci/run.
    """
    return kinds()[:1] if os.geteuid() == 0 else kinds()


@pytest.fixture(scope="session", params=kinds_with_ray(), ids=lambda kind: kind.value)
def platform(request: pytest.FixtureRequest) -> Iterator[LocalPlatform]:
    """A local platform of each kind that this user can have."""
    with LocalPlatform(isolation=request.param) as platform:
        yield platform
    assert platform.leftovers() == []


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The directories that platforms of this process make from now on; others may start meanwhile."""
    found: list[Path] = []

    def make() -> Path:
        found.append(directory_module.new_directory())
        return found[-1]

    monkeypatch.setattr(platform_module, "new_directory", make)
    return found


@pytest.fixture
def make_cluster(platform: LocalPlatform) -> Iterator[Callable[..., RayDogCluster]]:
    """A function that makes clusters on the platform; they are shut down at the end, whatever happens."""
    made: list[RayDogCluster] = []

    def make(**arguments: Any) -> RayDogCluster:
        cluster = RayDogCluster(
            **{
                "yd_application_key_id": platform.key_id,
                "yd_application_key_secret": platform.secret,
                "yd_platform_api_url": platform.url,
                "cluster_name": f"test-{os.getpid()}-{next(_numbers)}",
                "cluster_namespace": platform.namespace,
                "head_node_compute_requirement_template_id": platform.template_names[0],
                "head_node_ray_start_script": None,
                **arguments,
            }
        )
        made.append(cluster)
        return cluster

    yield make
    for cluster in made:
        cluster.shut_down()


_OWN_RAY = """
import sys
import ray

ray.init(num_cpus=1, include_dashboard=False, logging_level="ERROR")

@ray.remote
class Counter:
    def __init__(self):
        self.count = 0

    def up(self):
        self.count += 1
        return self.count

counter = Counter.remote()
for line in sys.stdin:
    print(ray.get(counter.up.remote()), flush=True)
"""


@pytest.fixture
def own_ray() -> Iterator[Callable[[], int]]:
    """A Ray of the user's own on this machine, with an actor that counts how often it was called."""
    process = subprocess.Popen(
        [sys.executable, "-c", _OWN_RAY], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )

    def count() -> int:
        assert process.stdin
        assert process.stdout
        process.stdin.write("\n")
        process.stdin.flush()
        return int(process.stdout.readline())

    assert count() == 1
    yield count
    process.stdin.close()  # type: ignore[union-attr]
    assert process.wait(30) == 0


@pytest.fixture
def nothing_runs(platform: LocalPlatform) -> Callable[[], None]:
    """A function that asserts that nothing runs on the platform: neither by its word nor in fact."""
    from yellowdog_client import PlatformClient
    from yellowdog_client.model import (
        ApiKey,
        ComputeRequirementSearch,
        ServicesSchema,
        WorkerPoolSearch,
        WorkRequirementSearch,
    )

    def check() -> None:
        schema = ServicesSchema(defaultUrl=platform.url)
        with PlatformClient.create(schema, ApiKey(platform.key_id, platform.secret)) as client:
            pools = client.worker_pool_client.get_worker_pools(WorkerPoolSearch()).list_all()
            works = client.work_client.get_work_requirements(WorkRequirementSearch()).list_all()
            computes = client.compute_client.get_compute_requirements(ComputeRequirementSearch()).list_all()
        assert {str(compute.status) for compute in computes} <= {"TERMINATED"}
        assert {str(pool.status) for pool in pools} <= {"TERMINATED"}
        assert {str(work.status) for work in works} <= {"CANCELLED", "FAILED", "COMPLETED"}
        assert platform.nodes() == []

    return check
