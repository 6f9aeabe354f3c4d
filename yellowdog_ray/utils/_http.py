"""Asking a web server for a page over a connection that is open already."""

from __future__ import annotations

import contextlib
import http.client
import socket
import threading
from typing import TYPE_CHECKING, cast

from yellowdog_ray.errors import TunnelError

if TYPE_CHECKING:
    import paramiko

__all__ = ["excerpt", "get"]

_LARGEST = 64 << 20  # bytes of a page


def get(
    sock: socket.socket | paramiko.Channel, where: str, path: str, token: str | None, timeout: float
) -> tuple[int, bytes]:
    """Ask for a page over an open connection and close it.

    :param where: the server, for messages.
    :param token: the cluster's token, where there is one.
    :param timeout: seconds, for the whole of the answer.
    :returns: the HTTP status and the page.
    :raises TunnelError: where the answer does not come, or not within its time, or is larger than 64 MiB.
    """
    expired = threading.Event()

    def expire() -> None:
        expired.set()
        # The one wakes a read of a socket, the other a read of a channel.
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)
        sock.close()

    # The time limit of a socket would be one for each of its reads.
    timer = threading.Timer(timeout, expire)
    timer.daemon = True
    timer.start()
    request = [f"GET {path} HTTP/1.1", "Host: localhost", "Connection: close"]
    if token:
        request.append(f"Authorization: Bearer {token}")
    with contextlib.closing(sock):
        try:
            sock.settimeout(timeout)
            sock.sendall("".join(f"{line}\r\n" for line in [*request, ""]).encode())
            # An HTTPConnection would close a channel before it has been read. The response only reads, for
            # which a channel is as good as a socket.
            with http.client.HTTPResponse(cast(socket.socket, sock), method="GET") as response:
                response.begin()
                body = response.read(_LARGEST + 1)
                if len(body) > _LARGEST:
                    raise TunnelError(f"{where} answers with more than {_LARGEST >> 20} MiB")
                if response.length:  # with a limit, read() does not say that something is missing
                    raise http.client.IncompleteRead(body, response.length)
                return response.status, body
        except TunnelError:
            raise
        except (
            http.client.HTTPException,
            EOFError,
            OSError,
            ValueError,
            ArithmeticError,
            MemoryError,
        ) as error:
            if expired.is_set() or isinstance(error, TimeoutError):
                raise TunnelError(f"{where} did not answer within {timeout:g} s") from error
            reason = str(error).rstrip(".") or type(error).__name__
            if isinstance(error, ValueError | ArithmeticError | MemoryError):
                raise TunnelError(f"{where} gives an answer that makes no sense: {reason}") from error
            raise TunnelError(f"{where} ends connections without an answer: {reason}") from error
        finally:
            timer.cancel()


def excerpt(status: int, body: bytes) -> str:
    """Quote the beginning of an answer in one line."""
    text = " ".join(body[:300].decode(errors="replace").split())
    return f"HTTP {status}, {text!r}" if text else f"HTTP {status}"
