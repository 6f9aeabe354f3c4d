"""The directory of a local platform that stays: what is written down of it, who runs, and what is left.

Only its user may read it: ``platform.json`` has what a client needs (the application key's secret among it,
as ``~/.aws/credentials`` holds one), and beside it are the nodes' SSH keys, its history and its log. A lock
on ``lock`` says that it runs, and the kernel says who holds it: whatever else is written down, a process that
was killed holds nothing.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import struct
import time
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

from platformdirs import user_state_path

from yellowdog_ray.errors import LocalPlatformError, SpecError
from yellowdog_ray.local.account import ANSWER_SECONDS, LocalAccount
from yellowdog_ray.local.belonging import processes_of
from yellowdog_ray.local.directory import remove_leftovers
from yellowdog_ray.local.platform import forget_clusters
from yellowdog_ray.local.records import from_plain
from yellowdog_ray.local.server import bind_loopback
from yellowdog_ray.local.template import NodeTemplate
from yellowdog_ray.utils._files import write_private

__all__ = ["START_SECONDS", "Home", "is_free", "left_of", "port_of"]

_log = logging.getLogger(__name__)

START_SECONDS = 90.0
"""For how long a platform that starts is waited for."""
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,39}")
_URL = re.compile(r"http://127\.0\.0\.1:[1-9][0-9]{0,4}")
_VERSION = 1
# What need not be in a file, and what it is then.
_ABSENT: Mapping[str, Any] = {
    "control_url": "",
    "control_token": "",
    "description": "",
    "ending": False,
    "exposed": False,
    "interface": "",
    "templates": {},
}
_CLEAN_SECONDS = 15.0
_HALF_SECONDS = 60.0  # after which a file that is half written has no writer any more


class Home:
    """The directory of one platform that stays.

    :param name: the platform's name.
    :raises SpecError: when it cannot be one.
    """

    def __init__(self, name: str = "default") -> None:
        if not _NAME.fullmatch(name):
            raise SpecError(
                f"not a name for a local platform: {name!r}; at most 40 of a-z, 0-9, - and _, with a letter "
                "or digit first"
            )
        self.name = name
        configured = os.environ.get("RAYDOG_LOCAL_DIR")
        base = Path(configured).expanduser() if configured else None
        self.directory = (base or user_state_path("raydog", appauthor=False) / "local").absolute() / name

    @property
    def file(self) -> Path:
        """The file with what a client needs."""
        return self.directory / "platform.json"

    @property
    def log(self) -> Path:
        """The file with what the platform says."""
        return self.directory / "platform.log"

    def make(self) -> None:
        """Make the directory, or see that nobody else may look into it.

        :raises LocalPlatformError: when that cannot be.
        """
        try:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.check()
            self.directory.chmod(0o700)
            # What was half written when the writer was killed holds a key.
            for half in self.directory.glob(".*.part"):
                with contextlib.suppress(FileNotFoundError):
                    if time.time() - half.stat().st_mtime > _HALF_SECONDS:
                        half.unlink()
        except OSError as error:
            raise LocalPlatformError(
                f"the local platform cannot keep its files in {self.directory}: {error.strerror or error}. "
                "Set RAYDOG_LOCAL_DIR to a directory that you may write to"
            ) from error

    def check(self) -> None:
        """See that what is in the directory is by this user.

        :raises LocalPlatformError: when it may not be.
        """
        if self.directory.is_symlink() or self.directory.stat().st_uid != os.geteuid():
            raise LocalPlatformError(f"{self.directory} is not a directory of this user's own")

    # Who runs

    def holder(self) -> int | None:
        """Ask the kernel which process is the platform; None where none is. Not for that process itself."""
        import fcntl

        try:
            fd = os.open(self.directory / "lock", os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            question = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
            kind, _, _, _, pid = struct.unpack("hhqqi4x", fcntl.fcntl(fd, fcntl.F_GETLK, question))
        finally:
            os.close(fd)
        return None if kind == fcntl.F_UNLCK else int(pid)

    @contextlib.contextmanager
    def lock(self) -> Iterator[int | None]:
        """Be the platform meanwhile, and give the lock's descriptor; None where another process is it."""
        import fcntl

        # Not flock(2): this lock is no child's, and the kernel tells whose it is.
        fd = os.open(self.directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            yield None
            return
        try:
            yield fd
        finally:
            os.close(fd)

    def holds(self, lock: int) -> bool:
        """Tell whether a lock's descriptor is still what others find: not where the directory was removed."""
        try:
            return os.path.samestat(os.stat(self.directory / "lock"), os.fstat(lock))
        except (FileNotFoundError, NotADirectoryError):
            return False

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Keep others from starting and stopping the platform meanwhile.

        :raises LocalPlatformError: when another one does not come to an end with it.
        """
        from filelock import FileLock, Timeout

        try:
            with FileLock(self.directory / "start.lock", timeout=START_SECONDS + 10, mode=0o600):
                yield
        except Timeout:
            raise LocalPlatformError(
                f"another process has been starting or stopping the local platform {self.name!r} for more "
                f"than {START_SECONDS:.0f} s"
            ) from None

    # What is known of it

    def read(self) -> dict[str, Any]:
        """Read what was written down: all of it, checked; nothing where that cannot be used."""
        try:
            return self._read()
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            _log.warning("%s cannot be read, and is made anew: %s", self.file, error)
            return {}

    def _read(self) -> dict[str, Any]:
        try:
            return _checked(json.loads(self.file.read_bytes()))
        except RecursionError as error:
            raise ValueError(str(error)) from error

    def write(self, known: dict[str, Any]) -> None:
        """Write it down, for this user only, with a key that nobody else can have read so far."""
        self._write({**known, "exposed": False})

    def _write(self, known: dict[str, Any]) -> None:
        write_private(self.file, json.dumps({"version": _VERSION, **known}, indent=2).encode())

    def note(self, known: dict[str, Any]) -> None:
        """Write it down where that can be done; a full disk keeps nothing from ending."""
        try:
            # Afterwards the file no longer shows it.
            self._write({**known, "exposed": self.exposed()})
        except OSError as error:
            _log.warning("It is not written down that the local platform %r has ended: %s", self.name, error)

    def exposed(self) -> bool:
        """Tell whether others could read the file, now or before it was last written to."""
        try:
            open_to_others = bool(self.file.stat().st_mode & 0o077)
        except FileNotFoundError:
            return False
        return open_to_others or bool(self.read().get("exposed"))

    def account(self, patience: float = ANSWER_SECONDS) -> LocalAccount | None:
        """Return what a client needs; None where the platform does not run.

        :param patience: for how many seconds to wait for one that is coming up or ending.
        :raises LocalPlatformError: when it runs and cannot be used.
        """
        if not self.directory.exists():
            return None
        self.check()
        deadline = time.monotonic() + patience
        while True:
            pid = self.holder()
            if pid is None:
                return None
            known, problem = {}, f"has not come up yet, or is ending; see {self.log}"
            try:
                known = self._read()
            except FileNotFoundError:
                pass
            except (OSError, ValueError) as error:
                # One that is coming up will write it anew.
                problem = f"runs, but {self.file} cannot be read ({error}): stop it, and start it again"
            # Read after the lock was seen, and it was held by the same process all the time.
            if known.get("pid") == pid and not known.get("ending") and self.holder() == pid:
                break
            if time.monotonic() > deadline:
                raise LocalPlatformError(f"the local platform {self.name!r} (process {pid}) {problem}")
            time.sleep(0.05)
        account = LocalAccount(**{each.name: known[each.name] for each in fields(LocalAccount)})
        account.ask("/application")
        return account

    # What is left of it

    def clean_up(self) -> list[str]:
        """Remove what a platform that does not run left when it was killed, and return what stays.

        That is done when this returns, which it does after 15 s at the most.
        """
        with self.lock() as locked:
            if locked is None:
                return []
            # Of a start that was killed early, nothing is written down.
            known = self.read()
            if known.get("pid") is None:
                remove_leftovers()
                return []
            found = left_of(known)
            deadline = time.monotonic() + _CLEAN_SECONDS
            while True:
                # Where only the platform was killed, another process is at it, and lets nobody else.
                remove_leftovers()
                left = left_of(known)
                if not left or time.monotonic() > deadline:
                    break
                time.sleep(0.05)
            if not left:
                if found:
                    _log.warning("The local platform %r was killed; what it left has been removed", self.name)
                _forget_dead_clusters(known)
                self.note({**known, "pid": None})
            return left


def _checked(known: Any) -> dict[str, Any]:
    """Return what a file says, with all that may be absent from it.

    :raises ValueError: when something is missing, or is not what it should be.
    """
    if not isinstance(known, dict):
        raise ValueError("it is no JSON object")
    if known.get("version") != _VERSION:
        raise ValueError(f"it is of version {known.get('version')!r}, and not of {_VERSION}")
    hints = {
        **get_type_hints(LocalAccount),
        "ending": bool,
        "exposed": bool,
        "templates": Mapping[str, NodeTemplate],
    }
    # None says that it has ended.
    hints["pid"] = int | None
    known = {**_ABSENT, **known}
    checked = {}
    for name, hint in hints.items():
        try:
            from_plain(hint, known[name])
        except KeyError as error:
            raise ValueError(f"{error} is missing") from error
        except (ValueError, TypeError, SpecError) as error:
            raise ValueError(f"{name!r} is wrong: {error}") from error
        checked[name] = known[name]
    for name in ("url", "control_url"):
        text = checked[name]
        if (text or name == "url") and not (_URL.fullmatch(text) and port_of(text) < 1 << 16):
            raise ValueError(f"{name!r} is wrong: {text!r}")
    if not checked["template_names"]:
        raise ValueError("'template_names' is empty")
    return checked


def left_of(known: dict[str, Any]) -> list[str]:
    """List what is still there of a platform that was written down: processes, a directory, an interface."""
    directory, interface = known["directory"], known["interface"]
    left = [f"process {pid}" for pid in processes_of(directory)]
    if os.path.exists(directory):
        left.append(f"directory {directory}")
    if interface and os.path.exists(f"/sys/class/net/{interface}"):
        left.append(f"network interface {interface}")
    return left


def _forget_dead_clusters(known: dict[str, Any]) -> None:
    """Remove the state files of clusters that a killed platform had."""
    # Where something answers there, the files may tell of its clusters.
    if is_free(port_of(known["url"])):
        forget_clusters(known["url"])


def port_of(url: str) -> int:
    """Read the port out of one of a platform's URLs."""
    return int(url.rpartition(":")[2])


def is_free(port: int) -> bool:
    """Tell whether nobody listens on a TCP port of 127.0.0.1."""
    try:
        bind_loopback(port).close()
    except LocalPlatformError:
        return False
    return True
