"""The file with a cluster's Ray token, beside its state file: the state holds its path, and no secret.

Its content is sent to whatever a state names as the head, and a state may come from anywhere. So only a file
that cannot be anything else is taken for one: a token of ours and nothing more, readable by its owner alone.
"""

from __future__ import annotations

import os
import re
import secrets
import stat
from pathlib import Path

from yellowdog_ray.errors import StateError
from yellowdog_ray.utils._files import write_private

__all__ = ["new_token", "read_token", "remove_token", "token_path", "write_token"]

_TOKEN = re.compile(r"[0-9a-f]{64}")


def new_token() -> str:
    """Make a token for a cluster, of 256 random bits."""
    return secrets.token_hex(32)


def token_path(state_file: Path) -> Path:
    """Tell the token's file of a cluster by its state file."""
    return state_file.with_name(f"{state_file.name}.token")


def write_token(path: Path, token: str) -> None:
    """Write a token's file whole or not at all, readable by its owner alone (mode 0600).

    :raises StateError: where it cannot be written, or something else has that name.
    """
    try:
        if path.exists() and not _is_ours(path):
            raise StateError(f"{path} is there already, and holds no Ray token: give another state_file")
        write_private(path, f"{token}\n")
    except OSError as error:
        raise StateError(
            f"the cluster's Ray token cannot be written to {path}: {error.strerror or error}. Without it "
            "nothing is created, for no other process could use the cluster"
        ) from error


def read_token(path: str | os.PathLike[str]) -> str:
    """Read a token's file.

    :raises FileNotFoundError: where there is none.
    :raises StateError: where it cannot be read, others may read or change it, or it holds something else.
    """
    try:
        # What a state names may be a pipe or a terminal, and is not to be waited for.
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        with open(handle, "rb") as file:
            about = os.fstat(file.fileno())
            if not stat.S_ISREG(about.st_mode):
                raise StateError(f"{path} is not the file of a Ray token")
            if about.st_uid != os.geteuid() and os.geteuid() != 0:
                raise StateError(f"the file of the Ray token {path} belongs to another user")
            if about.st_mode & 0o077:
                raise StateError(
                    f"others may read or change the file of the Ray token {path} (its mode is "
                    f"{stat.S_IMODE(about.st_mode):04o}), so that it is not used. Where you know that nobody "
                    f"has: chmod 600 {path}. Else take the token for known, and build the cluster anew"
                )
            content = file.read(1024)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise StateError(f"the file of the Ray token {path!s} cannot be read: {reason}") from None
    token = content.decode(errors="replace").rstrip("\n")
    if not _TOKEN.fullmatch(token):
        raise StateError(f"{path} does not hold a Ray token of this library, so that it is not used")
    return token


def remove_token(state_file: Path, named: str | None) -> None:
    """Remove the token's file that stands beside a state file, where the state names that one.

    :param named: the file that the state names.
    :raises OSError: where it cannot be removed.
    """
    path = token_path(state_file)
    if named == str(path) and _is_ours(path):
        path.unlink(missing_ok=True)


def _is_ours(path: Path) -> bool:
    """Tell whether it is the file of a token, so that nothing of somebody else's is replaced or removed."""
    return path.is_file() and _TOKEN.fullmatch(path.read_text(errors="replace").rstrip("\n")) is not None
