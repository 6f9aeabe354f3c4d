"""An embedded platform that speaks YellowDog's REST API and runs real Ray nodes on this machine."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from yellowdog_ray.local.account import LocalAccount
    from yellowdog_ray.local.control_plane import LocalControlPlane
    from yellowdog_ray.local.faults import Fault
    from yellowdog_ray.local.platform import LocalPlatform
    from yellowdog_ray.local.platform_faults import PlatformFaults
    from yellowdog_ray.local.template import NodeTemplate

__all__ = [
    "Fault",
    "LocalAccount",
    "LocalControlPlane",
    "LocalPlatform",
    "NodeTemplate",
    "PlatformFaults",
]

_HOMES = {
    "Fault": "faults",
    "LocalAccount": "account",
    "LocalControlPlane": "control_plane",
    "LocalPlatform": "platform",
    "NodeTemplate": "template",
    "PlatformFaults": "platform_faults",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
