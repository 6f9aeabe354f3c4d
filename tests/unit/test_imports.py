"""Importing the package is cheap: neither Ray nor the SDK comes with it."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    "module", ["yellowdog_ray", "yellowdog_ray.raydog.builder", "yellowdog_ray.raydog.scripts"]
)
def test_import_loads_neither_ray_nor_the_sdk(module):
    """Ray and the SDK are loaded when they are first needed; making a cluster object does not need them."""
    code = f"import sys, {module}\n"
    if module.endswith("builder"):
        code += (
            f"cluster = {module}.RayDogCluster('key', 'secret', 'name', 'space', 'ns/tpl')\n"
            "cluster.add_worker_pool('ns/tpl', None, 1)\n"
        )
    code += "print(sorted({'ray', 'yellowdog_client', 'paramiko'} & set(sys.modules)))"
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert output.strip() == "[]"
