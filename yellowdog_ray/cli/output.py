"""What the ``raydog`` command says: results, messages, and an exit status.

Results go to the standard output, messages to the error stream. It is loaded by every command, so it loads
little itself.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Sequence
from typing import Any, TextIO

__all__ = ["DONE", "FAILED", "UNHEALTHY", "USAGE", "Output"]

DONE, FAILED, USAGE, UNHEALTHY = 0, 1, 2, 3


class Output:
    """The two streams of the command. That one cannot be written to keeps nothing from being done.

    :param as_json: whether results are written as JSON, all of them at the end.
    """

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json
        #: Whether results could not be written.
        self.lost = False

    def say(self, text: str) -> None:
        """Write a result, where it is not JSON that is wanted."""
        if not self.as_json:
            self._write(text)

    def finish(self, results: Sequence[dict[str, Any]] | dict[str, Any]) -> None:
        """Write all results as JSON, where that is wanted."""
        if self.as_json:
            self._write(json.dumps(results, indent=2))

    def complain(self, text: str, prefix: str = "raydog: ") -> None:
        """Write a message."""
        # print() would take the standard output where there is no error stream.
        if sys.stderr is not None:
            with contextlib.suppress(OSError, ValueError):
                sys.stderr.write(f"{prefix}{_printable(text)}\n")
                sys.stderr.flush()

    def _write(self, text: str) -> None:
        stream = sys.stdout
        if stream is None or self.lost:
            return
        try:
            stream.write(f"{_encodable(text, stream)}\n")
            stream.flush()
        except (OSError, ValueError) as error:
            self.lost = True
            self.complain(f"the results could not be written: {error}")
            # Or the interpreter would try it again at its end, and fail.
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _printable(text: str) -> str:
    """Take out what a terminal would act upon; messages may quote the platform and files."""
    return "".join(
        character if character.isprintable() or character in "\n\t" else " " for character in text
    ).rstrip()


def _encodable(text: str, stream: TextIO) -> str:
    """Write what the stream's encoding does not have as an escape."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)
