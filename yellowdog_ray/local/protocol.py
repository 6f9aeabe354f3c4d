"""The lines of messages between the platform, its supervisor and the agents, and the loop that serves them.

A message is JSON, one a line. Nobody ever waits to send: what the other end does not take at once is kept and
follows, since two ends that both wait would wait for ever. Standard library alone, as every node's process
carries it.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import socket
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

__all__ = ["Channel", "Closed", "Loop"]


class Closed(Exception):  # noqa: N818 - not an error: it is how a line ends
    """The other end is gone."""


class Channel:
    """One end of a Unix stream socket that carries messages and, beside them, file descriptors.

    :param sock: a connected, blocking Unix stream socket; the channel owns it.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._unread = bytearray()
        self._received_fds: deque[int] = deque()
        self._unsent: deque[tuple[memoryview, list[int]]] = deque()
        #: Called when something could not be sent at once; see that :meth:`flush` is called when it can.
        self.on_blocked: Callable[[], None] = lambda: None

    def fileno(self) -> int:
        """Return the socket's descriptor, for a selector."""
        return self._sock.fileno()

    def send(self, message: dict[str, Any], fds: list[int] | None = None) -> None:
        """Send a message, now or as soon as the other end takes it, and copies of the given descriptors.

        :raises Closed: when the other end is gone.
        """
        data = memoryview(json.dumps({**message, "fds": len(fds)} if fds else message).encode() + b"\n")
        blocked = bool(self._unsent)
        self._unsent.append((data, [os.dup(fd) for fd in fds or []]))
        if not blocked and not self.flush():
            self.on_blocked()

    def flush(self) -> bool:
        """Send what has been kept, as far as the other end takes it; tell whether that was all.

        :raises Closed: when the other end is gone.
        """
        while self._unsent:
            data, fds = self._unsent[0]
            try:
                # Descriptors travel with the first byte; the rest of their message follows without.
                sent = (
                    socket.send_fds(self._sock, [data], fds, socket.MSG_DONTWAIT)
                    if fds
                    else self._sock.send(data, socket.MSG_DONTWAIT)
                )
            except BlockingIOError:
                return False
            except OSError as error:
                raise Closed from error
            for fd in fds:
                os.close(fd)
            self._unsent.popleft()
            if sent < len(data):
                self._unsent.appendleft((data[sent:], []))
        return True

    def receive(self) -> list[dict[str, Any]]:
        """Read what has arrived and return the complete messages; waits if nothing has.

        A message's descriptors are in its key ``fds``.

        :raises Closed: when the other end is gone.
        """
        try:
            data, fds, _, _ = socket.recv_fds(self._sock, 1 << 16, 16)
        except OSError as error:
            raise Closed from error
        if not data:
            raise Closed
        self._received_fds.extend(fds)
        # Only what is new is looked through: a message may have many megabytes, in hundreds of pieces.
        first, *rest = data.split(b"\n")
        self._unread += first
        if not rest:
            return []
        lines: list[bytes | bytearray] = [self._unread, *rest[:-1]]
        self._unread = bytearray(rest[-1])
        messages: list[dict[str, Any]] = [json.loads(line) for line in lines]
        for message in messages:
            if "fds" in message:
                message["fds"] = [self._received_fds.popleft() for _ in range(message["fds"])]
        return messages

    def hang_up(self) -> None:
        """End the line for both ends, also where a forked process holds a copy of this one, and close it."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self.close()

    def close(self) -> None:
        """Close this copy of this end."""
        self._sock.close()


class Loop:
    """What a process of one thread waits for: lines, sockets, and the ends of its children."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()

    def watch(self, file: Any, callback: Callable[[], None]) -> None:
        """Call a function whenever a file can be read."""
        self._selector.register(file, selectors.EVENT_READ, callback)

    def watch_line(self, channel: Channel, callback: Callable[[], None]) -> None:
        """Call a function whenever a line can be read, and see to what it could not send at once."""
        self.watch(channel, callback)
        both = selectors.EVENT_READ | selectors.EVENT_WRITE
        channel.on_blocked = lambda: self._selector.modify(channel, both, callback) and None

    def forget(self, file: Any) -> None:
        """Stop watching a file, if it is watched; call this before it is closed."""
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(file)

    def watch_children(self, callback: Callable[[int, int], None]) -> None:
        """Call a function with the pid and wait status of every child that ends."""
        wake_read, wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)

        def reap() -> None:
            with contextlib.suppress(BlockingIOError):
                while os.read(wake_read, 512):
                    pass
            with contextlib.suppress(ChildProcessError):
                while True:
                    pid, status = os.waitpid(-1, os.WNOHANG)
                    if pid == 0:
                        return
                    callback(pid, status)

        self.watch(wake_read, reap)

    def run_once(self, deadlines: Iterable[float | None]) -> None:
        """Wait for something, at most until the first deadline, and call what belongs to it.

        :param deadlines: times of ``time.monotonic``; None is none.
        """
        times = [deadline for deadline in deadlines if deadline is not None]
        timeout = max(0.0, min(times) - time.monotonic()) if times else None
        for key, events in self._selector.select(timeout):
            # One callback may have closed what another was to be called for.
            now = self._selector.get_map().get(key.fd)
            if now is None or now.fileobj is not key.fileobj:
                continue
            if events & selectors.EVENT_WRITE and key.fileobj.flush():  # type: ignore[union-attr]
                self._selector.modify(key.fileobj, selectors.EVENT_READ, key.data)
            if events & selectors.EVENT_READ:
                key.data()
