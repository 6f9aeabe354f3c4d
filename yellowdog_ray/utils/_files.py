"""Files that hold what is the user's own."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

__all__ = ["write_private"]


def write_private(path: Path, content: str | bytes) -> None:
    """Write a file whole or not at all, readable by its owner alone (mode 0600).

    :param content: text is written as UTF-8.
    :raises OSError: with the file's name; what was there before is still there.
    """
    temporary: str | None = None
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_directory(path.parent)
    except BaseException as error:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        if isinstance(error, OSError) and error.errno is not None:
            # A write that finds no space does not say where.
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def _sync_directory(directory: Path) -> None:
    """Have a new name outlive a power failure, where the system can do that."""
    with contextlib.suppress(OSError):
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
