"""What works where there is no Linux: everything but the local platform's nodes, which say so."""

from __future__ import annotations

import subprocess
import sys

# The libraries are the Linux ones, so they come before the pretence; what Python has on Linux alone is taken
# away, so that nothing of this package can use it unseen.
_ON_MACOS = """
import asyncio, ctypes, os, select, signal, sys
import cryptography.hazmat.primitives.serialization, filelock, paramiko, platformdirs, pydantic, requests
import starlette.applications, sysconfig, uvicorn, uvicorn.protocols.http.auto, yellowdog_client.model
from pathlib import Path
from pydantic import BaseModel

sysconfig.get_config_vars()
sys.platform = "darwin"
for module, names in {
    os: "pidfd_open pipe2 setns unshare sched_getaffinity O_PATH CLONE_NEWNET eventfd memfd_create prlimit",
    signal: "pidfd_send_signal",
    select: "epoll",
}.items():
    for name in names.split():
        if hasattr(module, name):
            delattr(module, name)
for method in ("read_text", "read_bytes"):
    def read(self, *arguments, _original=getattr(Path, method), **more):
        assert not str(self).startswith(("/proc", "/sys")), f"{self} was read"
        return _original(self, *arguments, **more)
    setattr(Path, method, read)
"""

_CONTROL_PLANE = """
from yellowdog_ray import RayDogCluster
from yellowdog_ray.local import LocalControlPlane

with LocalControlPlane() as platform:
    template = platform.template_names[0]
    with RayDogCluster(
        platform.key_id, platform.secret, "my-cluster", "local", template, None, platform.url
    ) as cluster:
        cluster.add_worker_pool(template, None, 2)
        cluster.build()
        assert len(platform.running()) == 5, platform.running()
    assert platform.running() == []
print("built")
"""

_PLATFORM = """
from yellowdog_ray import LocalPlatform
from yellowdog_ray.errors import LocalPlatformError

try:
    LocalPlatform().start()
except LocalPlatformError as error:
    print(error)
"""

_COMMAND = """
from yellowdog_ray.cli import main

sys.exit(main({arguments!r}))
"""


def _run(script: str, status: int = 0) -> str:
    result = subprocess.run(
        [sys.executable, "-c", _ON_MACOS + script], capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == status, result.stdout + result.stderr
    return result.stdout + result.stderr


def test_the_control_plane_and_the_client_work() -> None:
    """A cluster is built on a simulated platform, and shut down."""
    # An old paramiko may have something to say of the newest cryptography.
    assert _run(_CONTROL_PLANE).startswith("built\n")


def test_the_local_platform_says_what_to_do() -> None:
    """In Python and as commands, the local platform is refused with what works instead."""
    wanted = "need Linux, and this is darwin: start it in a Linux container or virtual machine"
    assert wanted in _run(_PLATFORM)
    for arguments in (["local", "start"], ["local", "start", "--foreground"], ["demo"]):
        output = _run(_COMMAND.format(arguments=arguments), status=1)
        assert wanted in output
        assert "Traceback" not in output
