"""Local ports: bound, or with the name of the process that has them."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from yellowdog_ray.errors import TunnelError
from yellowdog_ray.utils._tunnels.engines import Forward

__all__ = ["bind", "bind_all", "free_ends", "is_held"]

_BACKLOG = 256
_LISTEN = "0A"  # the state in /proc/net/tcp


def bind(forward: Forward) -> socket.socket:
    """Listen on a forward's local port.

    :raises TunnelError: where that cannot be, with the process that has the port.
    """
    try:
        sock = _listen(forward.local_host, forward.local_port)
    except OSError as error:
        where = f"local port {forward.local_port} (for {forward.remote_port} on the head node)"
        if error.errno == errno.EADDRINUSE:
            raise TunnelError(
                f"The {where} is in use already, by {_owner(forward)}. Stop that, or use other "
                'local ports: local_port="auto"'
            ) from error
        raise TunnelError(
            f"The {where} cannot be opened on {forward.local_host!r}: {error.strerror or error}"
        ) from error
    sock.setblocking(False)
    return sock


def bind_all(forwards: Sequence[Forward]) -> list[socket.socket]:
    """Listen on all local ports, or none.

    :raises TunnelError: where one of them cannot be had.
    """
    with contextlib.ExitStack() as stack:
        socks = [stack.enter_context(bind(forward)) for forward in forwards]
        stack.pop_all()
    return socks


def free_ends(forwards: Sequence[Forward]) -> list[tuple[str, int]]:
    """Check that all local ports are free, and choose those that are not given, for somebody else to bind.

    :returns: of each the address and the port. A name may have several addresses, of which somebody else
        may have one: here it is one of them.
    :raises TunnelError: where one of them is not free.
    """
    ends = []
    for forward, sock in zip(forwards, bind_all(forwards), strict=True):
        with sock:
            address, port = sock.getsockname()[:2]
            ends.append((forward.local_host if ":" in forward.local_host else str(address), int(port)))
    return ends


def is_held(address: str, port: int) -> bool:
    """Tell whether a process of this user listens at a local address; nothing on the other side hears of it.

    Where the system does not tell whose it is, it may be anybody's.
    """
    if users := {user for user, _ in _listeners(address, port)}:
        return users == {os.geteuid()}
    try:
        _listen(address, port).close()
    except OSError as error:
        return error.errno == errno.EADDRINUSE
    return False


def _listen(host: str, port: int) -> socket.socket:
    return socket.create_server((host, port), family=_family(host), backlog=_BACKLOG)


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def _listeners(host: str, port: int) -> list[tuple[int, str]]:
    """List who keeps a local address from others: the users and the inodes, as far as the system tells."""
    (*_, (address, *_)), *_ = socket.getaddrinfo(host, port, _family(host), socket.SOCK_STREAM)
    wanted = ipaddress.ip_address(str(address).partition("%")[0])
    # What listens at all addresses of IPv6 may do so at those of IPv4.
    for table in ("/proc/net/tcp", "/proc/net/tcp6") if wanted.version == 4 else ("/proc/net/tcp6",):
        found = []
        with contextlib.suppress(OSError):
            for line in Path(table).read_text().splitlines()[1:]:
                fields = line.split()
                there, _, number = fields[1].rpartition(":")
                if fields[3] != _LISTEN or int(number, 16) != port:
                    continue
                bound = _address(there)
                if bound == wanted or bound.is_unspecified or wanted.is_unspecified:
                    found.append((int(fields[7]), f"socket:[{fields[9]}]"))
        if found:
            return found
    return []


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """Read an address as /proc has it: in words of four bytes, each in this machine's order."""
    words = [bytes.fromhex(text[start : start + 8]) for start in range(0, len(text), 8)]
    address = ipaddress.ip_address(
        b"".join(word[::-1] if sys.byteorder == "little" else word for word in words)
    )
    return getattr(address, "ipv4_mapped", None) or address


def _owner(forward: Forward) -> str:
    """Name the process that listens on a forward's local port, as far as the system tells."""
    inodes = {inode for _, inode in _listeners(forward.local_host, forward.local_port)}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            for handle in (process / "fd").iterdir():
                with contextlib.suppress(OSError):
                    if os.readlink(handle) in inodes:
                        return _name(process)
    return "a process of another user, or one whose name the system does not tell"


def _name(process: Path) -> str:
    # The name only: a command line may hold secrets.
    name = (process / "comm").read_text().strip()
    own = ", this process itself" if process.name == str(os.getpid()) else ""
    return f"process {process.name} ({name}{own})"
