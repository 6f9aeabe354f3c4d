"""What the compute requirement templates of the local platform offer."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from yellowdog_ray.errors import SpecError

if TYPE_CHECKING:
    from yellowdog_ray.local.scheduler import Scheduler, SchedulerOptions

__all__ = ["DEFAULT_TEMPLATES", "NodeTemplate", "scheduler_with"]


@dataclass(frozen=True)
class NodeTemplate:
    """What a compute requirement template of the local platform says of its nodes.

    The default scripts tell Ray that a node has this size (whole CPUs, and at least what Ray itself needs of
    memory). Where control groups can be made, a node's processes are held to it.

    :param vcpus: a node's virtual CPUs.
    :param ram: its memory in GiB.
    :raises SpecError: when one of them is not positive.
    """

    vcpus: float = 1
    ram: float = 1

    def __post_init__(self) -> None:
        for name, value in (("vcpus", self.vcpus), ("ram", self.ram)):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e6:
                raise SpecError(f"{name} of a node must be a positive number, not {value!r}")


DEFAULT_TEMPLATES: Mapping[str, NodeTemplate] = {"local/node": NodeTemplate(ram=2)}
"""The templates that a local platform has when it is not told others, by ``namespace/name``."""


def scheduler_with(templates: Mapping[str, NodeTemplate], options: SchedulerOptions | None) -> Scheduler:
    """Make a scheduler that has these templates.

    :param options: None for the defaults, but that the names of what has ended can be used again.
    """
    from yellowdog_ray.local.scheduler import Scheduler, SchedulerOptions, Template

    scheduler = Scheduler(options or SchedulerOptions(reuse_finished_names=True))
    for full_name, template in templates.items():
        namespace, _, name = full_name.partition("/")
        scheduler.add_template(
            Template(
                namespace=namespace,
                name=name,
                id=f"ydid:crt:000000:{uuid.uuid5(uuid.NAMESPACE_DNS, full_name)}",
                instance_type="local",
                vcpus=template.vcpus,
                ram=template.ram,
                region="local",
            )
        )
    return scheduler
