"""The default Bash scripts: what a head, worker and observability node runs, and how a node is set up.

They are plain text, to be read, copied and changed::

    from yellowdog_ray.raydog.scripts import get_script

    my_head_script = get_script("head").replace("--block", "--block --num-cpus=0")

They are used where a script argument of :class:`~yellowdog_ray.raydog.builder.RayDogCluster` is None. All
of them expect Ray in ``$YD_AGENT_HOME/venv``, which is ``/opt/yellowdog/agent/venv`` where the agent does
not say otherwise. ``examples/builder/scripts`` holds the same texts.
"""

from __future__ import annotations

import re
from importlib.resources import files
from typing import Literal, get_args

from yellowdog_ray.errors import SpecError

__all__ = ["ScriptName", "get_script", "script_names"]

ScriptName = Literal["head", "worker", "observability", "node-setup"]

# A task has one script and nothing else: the files that it needs on its node are in it.
_INCLUDE = re.compile(r"^#include (\S+)\n", re.MULTILINE)


def script_names() -> tuple[str, ...]:
    """Tell the names of the default scripts."""
    return get_args(ScriptName)


def get_script(name: ScriptName) -> str:
    """Read one of the default scripts.

    :param name: ``"head"``, ``"worker"`` and ``"observability"`` are the task scripts of those nodes;
        ``"node-setup"`` is user data that makes an Ubuntu 22.04 machine a node.
    :returns: the Bash text, with the files that it writes on its node.
    :raises SpecError: where there is no script of this name.
    """
    if name not in script_names():
        raise SpecError(f"there is no default script {name!r}; there are {', '.join(script_names())}")
    return _INCLUDE.sub(lambda found: _read(found[1]), _read(f"scripts/{name}.sh"))


def _read(path: str) -> str:
    directory, _, name = path.partition("/")
    file = files("yellowdog_ray.raydog") / directory / name
    return file.read_text(encoding="utf-8")
