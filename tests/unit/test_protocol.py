"""The lines between owner, keeper and agents: whole messages, whatever the pieces, and large ones in time."""

from __future__ import annotations

import json
import os
import select
import socket
import threading
from collections.abc import Iterator

import pytest

from yellowdog_ray.local.protocol import Channel, Closed


@pytest.fixture
def ends() -> Iterator[tuple[Channel, socket.socket, Channel]]:
    """A line: the one end, as a channel and its socket, and the other."""
    ours, theirs = socket.socketpair()
    one, other = Channel(ours), Channel(theirs)
    yield one, ours, other
    one.close()
    other.close()


@pytest.mark.parametrize("size", [1, 2, 7, 64, 1000])
def test_messages_arrive_whole(ends: tuple[Channel, socket.socket, Channel], size: int) -> None:
    """Pieces of any size give the same messages: several in one, one in several, ends on the border."""
    _, sock, other = ends
    messages = [{"n": 1}, {"n": 2, "text": "ä\n" * 40}, {}, {"n": "x" * 300}]
    data = b"".join(json.dumps(message).encode() + b"\n" for message in messages)
    received = []
    for start in range(0, len(data), size):
        sock.sendall(data[start : start + size])
        received += other.receive()
    assert received == messages
    sock.close()
    with pytest.raises(Closed):
        other.receive()


def test_a_large_message(ends: tuple[Channel, socket.socket, Channel]) -> None:
    """40 MB, a descriptor beside them, and a message after them arrive whole."""
    one, sock, other = ends
    received: list[dict[str, object]] = []

    def read() -> None:
        while len(received) < 2:
            received.extend(other.receive())

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    read_end, write_end = os.pipe()
    text = "x" * (40 << 20)
    one.send({"text": text}, [write_end])
    one.send({"after": 1})
    while not one.flush():
        select.select([], [sock], [], 5)
    reader.join(30)
    assert [received[0]["text"] == text, received[1]] == [True, {"after": 1}]
    os.close(write_end)
    (copy,) = received[0]["fds"]  # type: ignore[misc]
    os.write(copy, b"through")
    assert os.read(read_end, 10) == b"through"
    os.close(copy)
    os.close(read_end)
