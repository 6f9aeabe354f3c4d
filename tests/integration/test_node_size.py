"""What the nodes of a local platform tell Ray of their size."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta

import pytest

from yellowdog_ray import LocalPlatform, RayDogCluster
from yellowdog_ray.errors import SpecError
from yellowdog_ray.local import NodeTemplate
from yellowdog_ray.raydog.scripts import get_script

from .test_cluster import alive, ray_session

pytestmark = pytest.mark.ray


@pytest.fixture
def platform() -> Iterator[LocalPlatform]:
    templates = {"local/small": NodeTemplate(vcpus=0.5, ram=0.1), "local/large": NodeTemplate(vcpus=5, ram=3)}
    # Ray's head does not fit into the smallest size, if it is held to that.
    with LocalPlatform(templates=templates, limits=False) as platform:
        yield platform
    assert platform.leftovers() == []


def test_ray_takes_a_node_for_as_large_as_its_template_says(platform: LocalPlatform, make_cluster) -> None:
    """Ray counts a template's CPUs and memory, whatever the machine has; a script can say otherwise."""
    cluster: RayDogCluster = make_cluster(
        head_node_ray_start_script=get_script("head").replace("--head --block", "--head --block --num-cpus=0")
    )
    cluster.add_worker_pool("local/large", None, 1)
    _, public_ip = cluster.build(timedelta(minutes=2))
    assert public_ip is not None
    with ray_session(platform, public_ip) as ray:
        by_cpus = {node["Resources"].get("CPU", 0): node["Resources"] for node in alive(ray, 2)}
    assert sorted(by_cpus) == [0, 5]
    large = by_cpus[5]
    assert large["memory"] + large["object_store_memory"] == pytest.approx(3 << 30)
    # What Ray itself needs at the least.
    assert by_cpus[0]["memory"] + by_cpus[0]["object_store_memory"] == pytest.approx(450 << 20)


@pytest.mark.parametrize("size", [{"vcpus": 0}, {"ram": -1}, {"vcpus": "2"}, {"ram": float("inf")}])
def test_a_size_that_cannot_be(size) -> None:
    with pytest.raises(SpecError, match=next(iter(size))):
        NodeTemplate(**size)
