"""What makes a plain process a node: a Python environment whose ``ray`` stays within its node.

Plain processes share the machine's addresses, ports and ``/tmp``. The ``ray`` that a node's tasks find
adds to ``ray start`` the node's own address and temporary directory, and its ``ray stop`` ends this
node's Ray processes alone: Ray's own ends every Ray process that it can see.
"""

from __future__ import annotations

import os
import shutil
import site
import sys
import sysconfig
from pathlib import Path

_RAY = """\
#!{python}
import os
import signal
import sys
import time

sys.path += {path!r}
from yellowdog_ray.local.linux import descendants

AGENT = int(os.environ.get("RAYDOG_AGENT_PID", "0"))
RAY = ("raylet", "gcs_server", "ray::", "/ray/", "ray-")


def ray_processes():
    found = []
    for pid in descendants(AGENT) if AGENT else []:
        try:
            with open(f"/proc/{{pid}}/cmdline", "rb") as file:
                command = file.read().replace(b"\\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if any(name in command for name in RAY) and pid not in (os.getpid(), os.getppid()):
            found.append(pid)
    return found


def stop():
    for number, patience in ((signal.SIGTERM, 5.0), (signal.SIGKILL, 2.0)):
        deadline = time.monotonic() + patience
        for pid in ray_processes():
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                pass
        while ray_processes() and time.monotonic() < deadline:
            time.sleep(0.05)


arguments = sys.argv[1:]
if arguments[:1] == ["stop"]:
    stop()
    sys.exit(0)
if arguments[:1] == ["start"]:
    # One machine has each port once; a fixed one for metrics would do for one node only.
    arguments = [argument for argument in arguments if not argument.startswith("--metrics-export-port=")]
    given = [argument.partition("=")[0] for argument in arguments]
    if "--node-ip-address" not in given:
        arguments.append("--node-ip-address={address}")
    # In a directory that they share, Ray numbers the nodes' sockets; two that start at once get the same.
    if "--temp-dir" not in given:
        arguments.append("--temp-dir={temporary}")
os.execv({ray!r}, [{ray!r}, *arguments])
"""

_ACTIVATE = """\
# The Python environment that the local platform was started from, with this node's own `ray`.
VIRTUAL_ENV="{prefix}"
export VIRTUAL_ENV
PATH="{place}/bin:{prefix}/bin:$PATH"
export PATH
"""


def write_plain_environment(place: Path, address: str, temporary: Path) -> None:
    """Make the ``venv`` directory of a node that is a plain process.

    :param place: the directory to make.
    :param address: the node's own loopback address.
    :param temporary: the directory for Ray's sessions on this node; Ray's socket names must fit below it.
    """
    mirror_environment(place)
    ray = place / "bin" / "ray"
    ray.unlink(missing_ok=True)
    ray.write_text(
        _RAY.format(
            python=sys.executable,
            path=import_path(),
            ray=str(_program("ray")),
            address=address,
            temporary=temporary,
        )
    )
    ray.chmod(0o755)


def mirror_environment(place: Path) -> None:
    """Make a directory that works as the Python environment of this process, by links to it.

    Python looks for an environment's ``pyvenv.cfg`` beside the path that it was called by, so a copy of
    that file is all that a mirror needs beyond links.
    """
    programs = place / "bin"
    programs.mkdir(parents=True)
    for directory in program_directories():
        for program in directory.iterdir():
            if program.name != "activate" and not (programs / program.name).is_symlink():
                (programs / program.name).symlink_to(program)
    prefix = Path(sys.prefix)
    if (prefix / "pyvenv.cfg").exists():
        shutil.copyfile(prefix / "pyvenv.cfg", place / "pyvenv.cfg")
        for entry in prefix.iterdir():
            if entry.name not in ("bin", "pyvenv.cfg"):
                (place / entry.name).symlink_to(entry)
    # A task's home is not the user's, below which Python looks for what was installed for the user alone.
    user_base = f'export PYTHONUSERBASE="{site.getuserbase()}"\n' if site.ENABLE_USER_SITE else ""
    (programs / "activate").write_text(_ACTIVATE.format(prefix=prefix, place=place) + user_base)


def program_directories() -> list[Path]:
    """List the directories with the programs of this Python environment, its own first."""
    places = [Path(sys.prefix, "bin"), Path(sysconfig.get_path("scripts"))]
    if site.ENABLE_USER_SITE:
        places.append(Path(site.getuserbase(), "bin"))
    return [place for place in dict.fromkeys(places) if place.is_dir()]


def import_path() -> list[str]:
    """List the directories that this process imports from, the package's own among them."""
    here = str(Path(__file__).resolve().parents[2])
    return list(dict.fromkeys([here, *(path for path in sys.path if path and os.path.isdir(path))]))


def _program(name: str) -> Path:
    for directory in program_directories():
        if (directory / name).exists():
            return directory / name
    return Path(sys.prefix, "bin", name)
