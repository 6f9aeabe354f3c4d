"""The directory below /tmp that a platform has while it runs, and what one leaves that was killed."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from functools import partial
from pathlib import Path

from yellowdog_ray.local.belonging import end_all, processes_of
from yellowdog_ray.local.cgroups import remove_all
from yellowdog_ray.local.linux import remove_tree

__all__ = ["DIRECTORY_HOME", "hold", "keep_from_ageing", "new_directory", "remove_leftovers"]

_DIRECTORY_PREFIX = "raydog-local-"
# Not TMPDIR: the names of Ray's sockets below it must fit into 107 bytes.
DIRECTORY_HOME = "/tmp"  # noqa: S108
_END_SECONDS = 5.0


def new_directory() -> Path:
    """Make the directory of a platform, for this user only.

    :raises OSError: where there is no space, or this user may not.
    """
    return Path(tempfile.mkdtemp(prefix=_DIRECTORY_PREFIX, dir=DIRECTORY_HOME))


def remove_leftovers() -> None:
    """Remove what platforms of this user left when they were killed together with their supervisors.

    Namespaces need no care: the kernel has taken them apart. Plain processes may still be running.
    """
    for directory in Path(DIRECTORY_HOME).glob(f"{_DIRECTORY_PREFIX}*"):
        with contextlib.suppress(OSError):
            if directory.lstat().st_uid != os.geteuid() or not _is_abandoned(directory):
                continue
            end_all(partial(processes_of, str(directory)), _END_SECONDS)
            remove_all(directory)
            remove_tree(directory)


def _is_abandoned(directory: Path) -> bool:
    import fcntl

    try:
        fd = os.open(directory / "lock", os.O_RDWR)
    except FileNotFoundError:
        # One that is being made has no lock for a moment.
        return time.time() - directory.stat().st_mtime > 60
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(fd)
    return True


def hold(directory: Path) -> int:
    """Take the lock that says that a directory is in use; it is held as long as a copy of it is open."""
    import fcntl

    # It gets its name when it is locked: a platform that starts meanwhile must not find it free.
    fd = os.open(directory / "lock.new", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    fcntl.flock(fd, fcntl.LOCK_SH)
    os.rename(directory / "lock.new", directory / "lock")
    return fd


def keep_from_ageing(directory: Path) -> int:
    """Lock the directory itself: what removes old files from /tmp (systemd-tmpfiles) leaves it alone then."""
    import fcntl

    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    fcntl.flock(fd, fcntl.LOCK_SH)
    return fd
