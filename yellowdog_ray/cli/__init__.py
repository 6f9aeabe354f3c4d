"""The ``raydog`` command."""

from __future__ import annotations

from yellowdog_ray.cli.command import main

__all__ = ["main"]
