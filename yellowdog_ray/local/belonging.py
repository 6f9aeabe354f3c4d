"""Which processes are a platform's, also when everything has been killed that knew.

What runs in a node tells so in its environment, which a process may clear or, to rename itself, overwrite; as
Ray's agents do. So all of it has a mark too, which is inherited and which no program looks at: the limit on
the number of file locks, which Linux has not heeded since 2.4.25 (getrlimit(2), proc_pid_limits(5)).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import time
from collections.abc import Callable, Iterable
from pathlib import Path

__all__ = ["NODE_FILES", "end_all", "mark", "processes_of"]

NODE_FILES = "RAYDOG_NODE_FILES"
"""The variable in the environment of all that runs in a node; it holds the node's directory."""
_RLIMIT_LOCKS = 10


def mark(directory: str) -> None:
    """Mark this process, and all that it will start, as the platform's that has this directory.

    Where the kernel does not let it, as gVisor's does not, the environment alone tells.
    """
    import resource

    with contextlib.suppress(OSError, ValueError):
        # The soft limit alone: a platform that is started in a node gives what it starts another mark.
        hard = resource.getrlimit(_RLIMIT_LOCKS)[1]
        resource.setrlimit(_RLIMIT_LOCKS, (_mark_of(directory), hard))


def _mark_of(directory: str) -> int:
    return int.from_bytes(hashlib.sha256(directory.encode()).digest()[:8], "big") >> 2


def processes_of(directory: str) -> list[int]:
    """List this user's processes that belong to the platform that has or had a directory."""
    whole, below = f"{NODE_FILES}={directory}".encode(), f"{NODE_FILES}={directory}/".encode()
    limit = str(_mark_of(directory))
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit() and int(entry) != os.getpid():
            # It may end meanwhile, and the environment of some may not be read.
            with contextlib.suppress(OSError):
                if _lives(entry) and (_limit(entry) == limit or _tells(entry, whole, below)):
                    found.append(int(entry))
    return found


def _lives(process: str) -> bool:
    """Tell whether a process is this user's, and has not ended."""
    state = uid = ""
    # Its name may be anything, and is cut off in the middle of a letter.
    for line in Path(f"/proc/{process}/status").read_text(errors="replace").splitlines():
        name, _, value = line.partition(":")
        if name == "State":
            state = value.split()[0]
        elif name == "Uid":
            # The real one: that of a setuid program's user, who may end it.
            uid = value.split()[0]
    return state not in ("Z", "X") and uid == str(os.getuid())


def _limit(process: str) -> str:
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{process}/limits").read_text().splitlines():
            if line.startswith("Max file locks"):
                return line.split()[3]
    return ""


def _tells(process: str, whole: bytes, below: bytes) -> bool:
    settings = Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
    return any(setting == whole or setting.startswith(below) for setting in settings)


def end_all(find: Callable[[], Iterable[int]], seconds: float) -> None:
    """SIGKILL the processes that a function lists, until it lists none, or for so many seconds."""
    deadline = time.monotonic() + seconds
    while pids := list(find()):
        for pid in pids:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        if time.monotonic() > deadline:
            return
        time.sleep(0.01)
