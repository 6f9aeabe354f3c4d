"""The state file of a cluster, kept up to date while the cluster comes and goes.

It is written before anything is created, with every name, and completed with the ids as they come. So
whatever ends the building process, and when, the file is enough to find all of the cluster and end it.
It is removed when the cluster has been verified as ended.
"""

from __future__ import annotations

import contextlib
import glob
import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from filelock import FileLock, Timeout
from platformdirs import user_state_path

from yellowdog_ray.errors import RayDogError, StateError
from yellowdog_ray.raydog.state import ClusterState
from yellowdog_ray.raydog.token_file import remove_token

__all__ = ["Journal", "default_path", "find_states", "forget_all", "own_path", "state_directory"]

log = logging.getLogger(__name__)

_LOCK_SECONDS = 30.0
# As long as one process may change something on the platform, while others wait for it.
_ALONE_SECONDS = 30.0

Change = Callable[[ClusterState], ClusterState]


def state_directory() -> Path:
    """Tell where state files are kept: ``RAYDOG_STATE_DIR``, or a directory of the user's own."""
    configured = os.environ.get("RAYDOG_STATE_DIR")
    return Path(configured).expanduser() if configured else user_state_path("raydog", appauthor=False)


def default_path(namespace: str, name: str, build_id: str) -> Path:
    """Tell the state file of a cluster: a new name for every build, so that no state replaces another."""
    return state_directory() / f"{namespace}.{name}.{build_id}.json"


def own_path(path: Path) -> Path:
    """Tell the one path that a state file is known by, where it may be a symbolic link to it."""
    # What is beside it, its lock for one, is to be the same for all that use it; and the link is to stay one.
    with contextlib.suppress(OSError, RuntimeError):  # links that go in a circle, which opening it tells
        if path.is_symlink():
            return path.resolve()
    return path.absolute()


def find_states(directory: Path) -> list[Path]:
    """List the state files in a directory, the oldest first; none where the directory does not exist."""
    found = []
    with contextlib.suppress(FileNotFoundError):
        for path in directory.iterdir():
            with contextlib.suppress(FileNotFoundError):
                if path.suffix == ".json" and not path.name.startswith(".") and path.is_file():
                    found.append((path.stat().st_mtime, path))
    return [path for _, path in sorted(found)]


@dataclass
class _Entry:
    """A change that is to be written, and why it was not possible.

    :param keep: whether it goes with the next one where it cannot be written.
    :param revive: whether it brings a file back that is gone.
    """

    change: Change
    keep: bool
    revive: bool
    error: RayDogError | None = None
    written: bool = False


def forget_all(api_url: str) -> None:
    """Remove the state files of all clusters behind an API that has ended, and all of them with it."""
    for path in find_states(state_directory()):
        with contextlib.suppress(OSError, StateError):
            journal = Journal.open(path)
            if journal.state.api_url == api_url:
                journal.remove()


class Journal:
    """One cluster's state file, which several threads and processes may change at once.

    A change is a function from the state in the file to the state that is to be there; it is carried out
    under a lock on the state as another process may have left it.

    :param path: the file.
    :param state: what is known to be in it.
    """

    def __init__(self, path: Path, state: ClusterState) -> None:
        self.path = path
        self._state = state
        # Whether there has been a file: one that is begun for a saved copy comes with the first change.
        self._begun = False
        self._pending: list[_Entry] = []
        self._pending_lock = threading.Lock()
        self._write_lock = threading.RLock()

    def __repr__(self) -> str:
        return f"<Journal {self.path}>"

    @classmethod
    def create(cls, path: Path, state: ClusterState) -> Journal:
        """Begin a state file, before anything of the cluster exists.

        :raises StateError: where it cannot be written, or holds the state of another cluster.
        """
        path = own_path(path)
        journal = cls(path, state.but(state_file=str(path)))
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with journal._file_lock():
                journal._check_free()
                journal._write(journal._state)
        except OSError as error:
            raise StateError(
                f"the cluster's state cannot be written to {path}: {error.strerror or error}. Without it "
                "nothing is created, for nobody could find the cluster again. Set RAYDOG_STATE_DIR to a "
                "directory that you may write to, or give a state_file"
            ) from error
        return journal

    @classmethod
    def open(cls, path: Path) -> Journal:
        """Open a state file.

        :raises StateError: where it is not the saved state of a cluster.
        :raises OSError: where it cannot be read.
        """
        journal = cls(own_path(path), ClusterState.load(path))
        journal._begun = True
        return journal

    @property
    def state(self) -> ClusterState:
        """The state as it was last written or read here."""
        return self._state

    def refresh(self) -> ClusterState:
        """Read what other processes have written; where it cannot be read, return what was known."""
        with self._write_lock:
            try:
                self._state = ClusterState.load(self.path)
            except (OSError, StateError) as error:
                log.debug("The state file %s was not read again: %s", self.path, error)
            return self._state

    def ended_elsewhere(self) -> bool:
        """Tell whether another process ends the cluster, or has done so."""
        return self.refresh().status == "ending" or not self.path.exists()

    def update(self, change: Change, *, revive: bool = True) -> ClusterState:
        """Change the state, and return when the change is on the disk.

        Threads that come while another one writes have their changes written together.

        :param change: called with the state in the file; what it raises is raised here, and nothing changed.
        :param revive: whether a file that is gone, by another process that has ended the cluster or by
            somebody, comes back for it. Else it is remembered here.
        :returns: the state as it is then.
        :raises StateError: where it cannot be written; then nothing has changed.
        """
        return self._enter(_Entry(change, keep=False, revive=revive))

    def note(self, change: Change) -> None:
        """Make a change without which the file is still enough.

        That it cannot be written is only logged; it goes with the next change then.
        """
        try:
            self._enter(_Entry(change, keep=True, revive=False))
        except StateError as error:
            log.warning("%s", error)

    def _enter(self, entry: _Entry) -> ClusterState:
        with self._pending_lock:
            self._pending.append(entry)
        with self._write_lock:
            entries: list[_Entry] = []
            try:
                with self._pending_lock:
                    entries, self._pending = self._pending, []
                # None are left where another thread has just written ours too.
                if entries:
                    self._apply(entries)
            except BaseException:
                # An interrupt ends this change only, and not those of other threads.
                with self._pending_lock:
                    left = [one for one in entries if one is not entry and not one.written]
                    self._pending = left + self._pending
                raise
            if entry.error is not None:
                raise entry.error
            return self._state

    def remove(self) -> None:
        """Remove the file, and that of the token, for the cluster has been verified as ended."""
        try:
            with self._write_lock, self._file_lock():
                # First, or nothing would lead to it any more.
                remove_token(self.path, self._state.ray_token_file)
                self.path.unlink(missing_ok=True)
                for left in self.path.parent.glob(f".{glob.escape(self.path.name)}.*"):
                    # Where files in use cannot be removed, the lock stays behind.
                    with contextlib.suppress(OSError):
                        left.unlink(missing_ok=True)
        except (OSError, StateError) as error:
            log.warning("The state file %s of an ended cluster could not be removed: %s", self.path, error)

    @contextmanager
    def alone(self, what: str) -> Iterator[None]:
        """Keep other processes from changing the same on the platform meanwhile.

        :param what: a name for what is changed.
        :raises StateError: where another process does not come to an end of it, or no file can be made.
        """
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(self._file_lock(what, _ALONE_SECONDS))
            except OSError as error:
                raise self._cannot_be_written(error) from error
            yield

    def _apply(self, entries: list[_Entry]) -> None:
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with self._file_lock():
                needed = True
                try:
                    state = ClusterState.load(self.path)
                except FileNotFoundError:
                    # Another process has ended the cluster, or somebody has removed the file. It comes back
                    # only for something new; what is known here goes in then. A build whose file is gone has
                    # been shut down by another process, and may not go on.
                    state = self._state
                    needed = any(entry.revive or not (entry.keep or self._begun) for entry in entries)
                    if state.status == "building":
                        state = state.but(status="ending")
                for entry in entries:
                    try:
                        state = entry.change(state)
                    except RayDogError as error:
                        entry.error = error
                if needed:
                    self._write(state)
                self._state = state
                for entry in entries:
                    entry.written = True
        except (OSError, StateError) as error:
            reason = error if isinstance(error, StateError) else self._cannot_be_written(error)
            for entry in entries:
                entry.error = reason
            with self._pending_lock:
                self._pending = [
                    _Entry(entry.change, keep=True, revive=False) for entry in entries if entry.keep
                ] + self._pending

    def _cannot_be_written(self, error: OSError) -> StateError:
        return StateError(f"the state file {self.path} cannot be written: {error.strerror or error}")

    def _write(self, state: ClusterState) -> None:
        state.but(saved=datetime.now(timezone.utc)).save(self.path)
        self._begun = True

    def _check_free(self) -> None:
        try:
            there = ClusterState.load(self.path)
        except FileNotFoundError:
            return
        except StateError:
            raise StateError(
                f"{self.path} is there already, and is not a cluster's state: give another state_file"
            ) from None
        raise StateError(
            f"{self.path} holds the state of the cluster {there.title}, which has not been verified as "
            f"ended. Run `raydog shut-down {self.path}` first, or give another state_file"
        )

    @contextmanager
    def _file_lock(self, what: str = "state", seconds: float = _LOCK_SECONDS) -> Iterator[None]:
        lock = FileLock(self.path.with_name(f".{self.path.name}.{what}.lock"), timeout=seconds)
        try:
            lock.acquire(poll_interval=0.01)
        except Timeout:
            raise StateError(
                f"another process has been changing {self.path} for more than {seconds:.0f} s"
            ) from None
        try:
            yield
        finally:
            lock.release()
