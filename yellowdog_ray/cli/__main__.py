"""``python -m yellowdog_ray.cli`` is the ``raydog`` command."""

from __future__ import annotations

import sys

from yellowdog_ray.cli.command import main

if __name__ == "__main__":
    sys.exit(main())
