"""What asks a head's web servers: whatever they answer is a page or a TunnelError."""

from __future__ import annotations

import socket
import threading

import pytest

from yellowdog_ray.errors import TunnelError
from yellowdog_ray.utils import _http


def answered(answer: bytes) -> tuple[int, bytes]:
    ours, its = socket.socketpair()

    def serve() -> None:
        with its:
            its.recv(4096)
            its.sendall(answer)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        return _http.get(ours, "The head", "/", None, 5.0)
    finally:
        thread.join()


def test_pages() -> None:
    assert answered(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello") == (200, b"hello")
    assert answered(b"HTTP/1.1 404 No\r\n\r\nhello") == (404, b"hello")
    chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n3\r\nyou\r\n0\r\n\r\n"
    assert answered(chunked) == (200, b"helloyou")


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhello", "without an answer"),
        (b"HTTP/1.1 200 OK\r\n\r\n" + bytes(2000), "more than"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\nx" % 10**30, "without an answer"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"f" * 40 + b"\r\nx", "answer"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-5\r\nx", "answer"),
        (b"", "without an answer"),
    ],
)
def test_what_is_no_page(answer: bytes, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_http, "_LARGEST", 1000)
    with pytest.raises(TunnelError, match=said):
        answered(answer)
