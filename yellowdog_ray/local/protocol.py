"""The line of messages between the platform, its supervisor and the agents: JSON, one a line.

Standard library alone, since every node's process carries it.
"""

from __future__ import annotations

import json
import socket
from collections import deque
from typing import Any

__all__ = ["Channel", "Closed"]


class Closed(Exception):  # noqa: N818 - not an error: it is how a line ends
    """The other end is gone."""


class Channel:
    """One end of a Unix stream socket that carries messages and, beside them, file descriptors.

    :param sock: a connected, blocking Unix stream socket; the channel owns it.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._buffer = b""
        self._fds: deque[int] = deque()

    def fileno(self) -> int:
        """Return the socket's descriptor, for a selector."""
        return self._sock.fileno()

    def send(self, message: dict[str, Any], fds: list[int] | None = None) -> None:
        """Send a message, and copies of the given descriptors with it.

        :raises Closed: when the other end is gone.
        """
        data = json.dumps({**message, "fds": len(fds)} if fds else message).encode() + b"\n"
        try:
            if fds:
                # The descriptors travel with the first byte; what does not fit at once follows.
                data = data[socket.send_fds(self._sock, [data], fds) :]
            self._sock.sendall(data)
        except OSError as error:
            raise Closed from error

    def receive(self) -> list[dict[str, Any]]:
        """Read what has arrived and return the complete messages; blocks if nothing has.

        A message's descriptors are in its key ``fds``.

        :raises Closed: when the other end is gone.
        """
        try:
            data, fds, _, _ = socket.recv_fds(self._sock, 1 << 16, 16)
        except OSError as error:
            raise Closed from error
        if not data:
            raise Closed
        self._fds.extend(fds)
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        messages: list[dict[str, Any]] = [json.loads(line) for line in lines]
        for message in messages:
            if "fds" in message:
                message["fds"] = [self._fds.popleft() for _ in range(message["fds"])]
        return messages

    def close(self) -> None:
        """Close this end."""
        self._sock.close()
