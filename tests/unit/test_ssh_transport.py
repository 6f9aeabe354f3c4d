"""The order of what is sent about an SSH channel."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import paramiko
import pytest

from yellowdog_ray.utils._ssh.transport import Transport

DATA, EXTENDED_DATA, EOF, CLOSE, REQUEST = 94, 95, 96, 97, 98


def about(kind: int, channel: int) -> paramiko.Message:
    message = paramiko.Message()
    message.add_byte(bytes([kind]))
    message.add_int(channel)
    return message


@pytest.fixture
def transport(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Transport, list[tuple[int, int]]]]:
    """A transport that is past its handshake, and what it sends: kinds and channels."""
    sent: list[tuple[int, int]] = []

    def send(message: paramiko.Message) -> None:
        packed = message.asbytes()
        sent.append((packed[0], int.from_bytes(packed[1:5], "big")))

    ours, its = socket.socketpair()
    with ours, its:
        transport = Transport(ours)
        monkeypatch.setattr(transport.packetizer, "send_message", send)
        transport.active = True
        transport.clear_to_send.set()
        yield transport, sent
        transport.active = False


def opened(transport: Transport, channel: int) -> None:
    """Have the server open a channel with this number of its own."""
    message = paramiko.Message()
    for number in (0, channel, 1 << 20, 32768):
        message.add_int(number)
    message.rewind()
    transport._parse_channel_open_success(message)


def test_nothing_follows_a_close(transport: tuple[Transport, list[tuple[int, int]]]) -> None:
    """What is sent about a channel after its CLOSE is dropped; other channels go on."""
    one, sent = transport
    opened(one, 5)
    opened(one, 6)
    for kind in (DATA, EOF, CLOSE, DATA, EXTENDED_DATA, EOF, CLOSE, REQUEST):
        one._send_user_message(about(kind, 5))
    one._send_user_message(about(DATA, 6))
    assert sent == [(DATA, 5), (EOF, 5), (CLOSE, 5), (DATA, 6)]
    one._send_user_message(about(80, 5))  # a global request has no channel
    assert sent[-1][0] == 80


def test_a_number_that_is_used_again(transport: tuple[Transport, list[tuple[int, int]]]) -> None:
    """The next channel of a number can send; what was meant for the one before it is not sent there."""
    one, sent = transport
    opened(one, 5)
    late = about(DATA, 5)
    send, one._send_message = one._send_message, lambda _: None  # type: ignore[method-assign]
    one._send_user_message(late)
    one._send_message = send  # type: ignore[method-assign]
    one._send_user_message(about(CLOSE, 5))
    opened(one, 5)
    one._send_message(late)
    assert sent == [(CLOSE, 5)]
    one._send_user_message(about(DATA, 5))
    assert sent == [(CLOSE, 5), (DATA, 5)]
