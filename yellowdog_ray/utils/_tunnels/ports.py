"""Local ports: bound, or with the name of the process that has them."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections.abc import Sequence
from pathlib import Path

from yellowdog_ray.errors import TunnelError
from yellowdog_ray.utils._tunnels.engines import Forward

__all__ = ["bind", "bind_all", "free_ports"]

_BACKLOG = 256
_LISTEN = "0A"  # the state in /proc/net/tcp


def bind(forward: Forward) -> socket.socket:
    """Listen on a forward's local port.

    :raises TunnelError: where that cannot be, with the process that has the port.
    """
    family = socket.AF_INET6 if ":" in forward.local_host else socket.AF_INET
    try:
        sock = socket.create_server((forward.local_host, forward.local_port), family=family, backlog=_BACKLOG)
    except OSError as error:
        where = f"local port {forward.local_port} (for {forward.remote_port} on the head node)"
        if error.errno == errno.EADDRINUSE:
            raise TunnelError(
                f"The {where} is in use already, by {_owner(forward.local_port)}. Stop that, or use other "
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


def free_ports(forwards: Sequence[Forward]) -> list[int]:
    """Check that all local ports are free, and choose those that are not given, for somebody else to bind.

    :raises TunnelError: where one of them is not free.
    """
    socks = bind_all(forwards)
    ports = [int(sock.getsockname()[1]) for sock in socks]
    for sock in socks:
        sock.close()
    return ports


def _owner(port: int) -> str:
    """Name the process that listens on a port, as far as the system tells."""
    inodes = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(OSError):
            for line in Path(table).read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == _LISTEN and int(fields[1].rpartition(":")[2], 16) == port:
                    inodes.add(f"socket:[{fields[9]}]")
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
