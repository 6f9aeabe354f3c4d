"""The control plane as the tests use it: with a key and a template that they know."""

from __future__ import annotations

from typing import Any

from yellowdog_ray.local.control_plane import LocalControlPlane
from yellowdog_ray.local.faults import Fault, Faults
from yellowdog_ray.local.scheduler import SchedulerOptions, Template

__all__ = ["KEY_ID", "SECRET", "TEMPLATE", "Fault", "Faults", "Served", "serve"]

KEY_ID, SECRET = "test-key", "test-secret"
TEMPLATE = Template(
    namespace="test",
    name="small",
    id="ydid:crt:000000:00000000-0000-0000-0000-0000000000a1",
    instance_type="local.small",
    vcpus=2,
    ram=4,
    region="local",
)

Served = LocalControlPlane


def serve(
    options: SchedulerOptions | None = None, templates: tuple[Template, ...] = (TEMPLATE,), **more: Any
) -> LocalControlPlane:
    """Make a control plane; the ``with`` statement serves it.

    :param more: further arguments of `LocalControlPlane`, e.g. ``boot_delay=0.5``.
    """
    return LocalControlPlane(options, templates, key_id=KEY_ID, secret=SECRET, **more)
