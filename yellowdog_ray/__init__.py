"""Ray clusters on YellowDog: build, reach and tear them down from Python.

Importing this package loads neither Ray nor the YellowDog SDK; both come with first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from yellowdog_ray.local import LocalPlatform
    from yellowdog_ray.raydog.access import SSHAccess
    from yellowdog_ray.raydog.builder import RayDogCluster, RayDogClusterProxy
    from yellowdog_ray.utils.ray_ssh_tunnels import RayTunnels, SSHTunnelSpec

__all__ = [
    "LocalPlatform",
    "RayDogCluster",
    "RayDogClusterProxy",
    "RayTunnels",
    "SSHAccess",
    "SSHTunnelSpec",
    "__version__",
]

__version__ = "3.0.0.dev0"

_HOMES = {
    "LocalPlatform": "yellowdog_ray.local",
    "RayDogCluster": "yellowdog_ray.raydog.builder",
    "RayDogClusterProxy": "yellowdog_ray.raydog.builder",
    "RayTunnels": "yellowdog_ray.utils.ray_ssh_tunnels",
    "SSHAccess": "yellowdog_ray.raydog.access",
    "SSHTunnelSpec": "yellowdog_ray.utils.ray_ssh_tunnels",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
