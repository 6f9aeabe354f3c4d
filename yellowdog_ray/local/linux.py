"""The few Linux calls that Python 3.10 lacks: namespaces, mounts and what a process tells its kernel.

Facts: unshare(2), mount(2), prctl(2), user_namespaces(7), mount_namespaces(7), pid_namespaces(7).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import stat
from collections.abc import Container
from pathlib import Path

CLONE_NEWNS = 0x00020000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000

MS_NOSUID, MS_NODEV, MS_NOEXEC = 2, 4, 8
MS_BIND, MS_REC, MS_PRIVATE = 4096, 16384, 1 << 18

_PR_SET_PDEATHSIG, _PR_SET_NAME, _PR_SET_CHILD_SUBREAPER = 1, 15, 36

_libc = ctypes.CDLL(None, use_errno=True)


def _checked(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def unshare(flags: int) -> None:
    """Leave the namespaces that the flags name, for new ones."""
    _checked(_libc.unshare(flags), f"unshare({flags:#x})")


def mount(source: str, target: str, kind: str | None = None, flags: int = 0, data: str | None = None) -> None:
    """Mount a file system, or bind a directory or a file over another."""
    result = _libc.mount(
        source.encode(),
        os.fsencode(target),
        kind.encode() if kind else None,
        ctypes.c_ulong(flags),
        data.encode() if data else None,
    )
    _checked(result, f"mount {source} on {target}")


def die_with_parent() -> None:
    """Have the kernel kill this process when the thread that forked it ends."""
    _checked(_libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "prctl(PR_SET_PDEATHSIG)")


def become_subreaper() -> None:
    """Make this process the parent of every orphan among its descendants."""
    _checked(_libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0), "prctl(PR_SET_CHILD_SUBREAPER)")


def set_process_name(name: str) -> None:
    """Set the name (15 bytes) that ``ps`` and ``top`` show for this process."""
    _libc.prctl(_PR_SET_NAME, name.encode()[:15], 0, 0, 0)


def enter_user_namespace() -> None:
    """Enter a new user namespace in which only this user and group exist, as themselves."""
    uid, gid = os.geteuid(), os.getegid()
    unshare(CLONE_NEWUSER)
    # An unprivileged process may map its group only once setgroups(2) is off: user_namespaces(7).
    for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        Path(f"/proc/self/{name}").write_text(text)


def bind(source: str, target: str) -> None:
    """Show a file or directory, with what is mounted below it, at another place too."""
    mount(source, target, flags=MS_BIND | MS_REC)


def cover(directory: str, keep: list[str], source: str | None = None) -> None:
    """Mount something else over a directory, with only the given paths below it still seen.

    :param directory: the directory to cover.
    :param keep: absolute paths of existing files or directories below it.
    :param source: the directory to show in its place; by default an empty file system.
    """
    held = [(path, os.open(path, os.O_PATH)) for path in keep]
    try:
        if source:
            bind(source, directory)
        else:
            mount("tmpfs", directory, "tmpfs", MS_NOSUID | MS_NODEV, "mode=755")
        for path, fd in held:
            _make_place(path, is_directory=os.path.isdir(f"/proc/self/fd/{fd}"))
            bind(f"/proc/self/fd/{fd}", path)
    finally:
        for _, fd in held:
            os.close(fd)


def make_mount_point(path: str) -> None:
    """Make a directory exist in this mount namespace alone, without a trace on the real file system.

    Where it is missing, its nearest existing ancestor is covered by an empty file system in which
    everything that was there is bound back to its place.
    """
    if os.path.isdir(path):
        return
    ancestor = os.path.dirname(path)
    while not os.path.isdir(ancestor):
        ancestor = os.path.dirname(ancestor)
    if ancestor == "/":
        raise OSError(f"there is no {path}, nor a directory below / to make it in")
    entries = [entry.path for entry in os.scandir(ancestor)]
    links = {entry: os.readlink(entry) for entry in entries if os.path.islink(entry)}
    keep = [entry for entry in entries if entry not in links and not _is_vanishing(entry)]
    cover(ancestor, keep)
    for link, target in links.items():
        os.symlink(target, link)
    os.makedirs(path, exist_ok=True)


def _is_vanishing(path: str) -> bool:
    """Tell whether a path cannot be bound: it is gone already, or may not be looked at."""
    try:
        os.close(os.open(path, os.O_PATH))
    except OSError:
        return True
    return False


def _make_place(path: str, *, is_directory: bool) -> None:
    if is_directory:
        os.makedirs(path, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with contextlib.suppress(FileExistsError):
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))


def children() -> dict[int, list[int]]:
    """List the living children of every process that has some."""
    found: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError, IndexError, ValueError):
                stat = Path(f"/proc/{entry}/stat").read_text(errors="replace")
                # The command's name may hold anything; what follows the last bracket is fixed.
                state, parent = stat.rpartition(")")[2].split()[:2]
                if state != "Z":
                    found.setdefault(int(parent), []).append(int(entry))
    return found


def descendants(pid: int, spared: Container[int] = ()) -> list[int]:
    """List the living descendants of a process, children before grandchildren.

    :param spared: children of the process that are left out, with what descends from them.
    """
    below = children()
    found: list[int] = []
    queue = [child for child in below.get(pid, []) if child not in spared]
    while queue:
        found += queue
        queue = [grandchild for child in queue for grandchild in below.get(child, [])]
    return found


def read_end(path: Path, count: int) -> bytes | None:
    """Read the last bytes of a file that somebody else writes; None where there is no such file."""
    with contextlib.suppress(OSError):
        # Whatever stands there in its place, nobody waits for it.
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            about = os.fstat(fd)
            if stat.S_ISREG(about.st_mode):
                return os.pread(fd, count, max(0, about.st_size - count))
        finally:
            os.close(fd)
    return None


def remove_tree(directory: str | os.PathLike[str]) -> None:
    """Remove a directory with all in it, also what was made read-only; what cannot be removed stays."""
    shutil.rmtree(directory, ignore_errors=True)
    if os.path.isdir(directory) and not os.path.islink(directory):
        # A directory is listed only after its parent has named it: by then it can be.
        for path, names, _ in os.walk(directory):
            for name in names:
                with contextlib.suppress(OSError):
                    _let_owner_in(os.path.join(path, name))
        shutil.rmtree(directory, ignore_errors=True)


def _let_owner_in(directory: str) -> None:
    # chmod(2) follows links, and a link may lead anywhere.
    if not os.path.islink(directory):
        os.chmod(directory, 0o700)
