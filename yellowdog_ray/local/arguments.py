"""What a local platform may be told: what cannot work is refused before anything is made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from yellowdog_ray.errors import SpecError
from yellowdog_ray.local.asks import RefusedError
from yellowdog_ray.local.fields import check_name
from yellowdog_ray.local.template import NodeTemplate

__all__ = ["check_port", "check_template_name", "check_templates"]


def check_port(port: Any, least: int = 1) -> int:
    """Return a TCP port.

    :raises SpecError: where it is no whole number from ``least`` to 65535.
    """
    if not isinstance(port, int) or isinstance(port, bool) or not least <= port < 1 << 16:
        raise SpecError(f"not a TCP port: {port!r}; it is a whole number from {least} to 65535")
    return port


def check_template_name(full_name: Any) -> None:
    """Refuse what cannot be the name of a compute requirement template.

    :raises SpecError: where it is not ``namespace/name``, each of which YellowDog allows.
    """
    if not isinstance(full_name, str) or full_name.count("/") != 1 or not all(full_name.split("/")):
        raise SpecError(f"a template is named namespace/name, not {full_name!r}")
    try:
        for part in full_name.split("/"):
            check_name(f"in the template's name {full_name!r},", part)
    except RefusedError as error:
        raise SpecError(str(error)) from None


def check_templates(templates: Any) -> dict[str, NodeTemplate]:
    """Return the templates of a platform.

    :raises SpecError: where there is none, or one of them has no such name or size.
    """
    if not isinstance(templates, Mapping) or not templates:
        raise SpecError(
            "templates must be a dictionary with at least one template, by namespace/name, not "
            f"{templates!r}; leave it out for the default one"
        )
    for name, template in templates.items():
        check_template_name(name)
        if not isinstance(template, NodeTemplate):
            raise SpecError(f"the size of {name} must be a NodeTemplate, not {template!r}")
    return dict(templates)
