"""paramiko's transport, with what it lacks: when the server was heard, and messages of a channel in order."""

from __future__ import annotations

import contextlib
import threading
import time

import paramiko

__all__ = ["Packetizer", "Transport"]

# The messages about one channel, by RFC 4254, from CHANNEL_WINDOW_ADJUST to CHANNEL_FAILURE.
_CHANNEL_MESSAGES = range(93, 101)
_CLOSE = 97


class Packetizer(paramiko.packet.Packetizer):
    """Notes when the server was last heard, whatever it said, and closes in silence."""

    def __init__(self, sock: object) -> None:
        super().__init__(sock)  # type: ignore[arg-type]
        self.heard = time.monotonic()

    def read_message(self) -> tuple[int, paramiko.Message]:
        message = super().read_message()
        self.heard = time.monotonic()
        return message

    def close(self) -> None:
        # Through a bastion, this sends a good-bye over a connection that may have ended meanwhile.
        with contextlib.suppress(EOFError, OSError):
            super().close()


class Transport(paramiko.Transport):
    """Sends nothing about a channel after its CLOSE.

    A channel lets go of its lock before what it sends is sent: data may come after the CLOSE that another
    thread sends meanwhile, and sshd ends the whole connection for it. What is sent late is dropped here,
    also where the server uses the number of the channel for the next one already.

    While keys are exchanged again, what is sent has to wait. The thread that exchanges them must not: what it
    answers to the CLOSE of a channel is held until then.

    :param sock: the open connection.
    """

    def __init__(self, sock: object) -> None:
        # By the server's number of each open channel, something that is not the same for the next one of
        # this number.
        self._open: dict[int, object] = {}
        self._held: list[paramiko.Message] = []  # until keys have been exchanged again
        super().__init__(sock, packetizer_class=Packetizer)  # type: ignore[arg-type]

    def _parse_channel_open_success(self, m: paramiko.Message) -> None:
        m.get_int()
        self._open[m.get_int()] = object()
        m.rewind()
        super()._parse_channel_open_success(m)  # type: ignore[misc]

    def _send_user_message(self, data: paramiko.Message) -> None:
        packed = data.asbytes()
        if packed[0] in _CHANNEL_MESSAGES:
            data.meant_for = self._open.get(_channel(packed))  # type: ignore[attr-defined]
        if threading.current_thread() is self and not self.clear_to_send.is_set():
            self._held.append(data)
            return
        super()._send_user_message(data)  # type: ignore[misc]

    def _parse_newkeys(self, m: paramiko.Message) -> None:
        super()._parse_newkeys(m)  # type: ignore[misc]
        held, self._held = self._held, []
        for message in held:
            self._send_user_message(message)

    def _send_message(self, data: paramiko.Message) -> None:
        # paramiko holds a lock while it calls this for the messages of channels.
        packed = data.asbytes()
        if packed[0] in _CHANNEL_MESSAGES:
            channel = _channel(packed)
            now = self._open.get(channel)
            if now is None or getattr(data, "meant_for", None) is not now:
                return
            if packed[0] == _CLOSE:
                del self._open[channel]
        super()._send_message(data)  # type: ignore[misc]


def _channel(packed: bytes) -> int:
    return int.from_bytes(packed[1:5], "big")
