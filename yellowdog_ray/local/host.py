"""The machine that nodes are made on: how much memory, and which networks and ports, are free on it."""

from __future__ import annotations

import contextlib
import os
import random
import socket
from pathlib import Path

from yellowdog_ray.errors import LocalPlatformError
from yellowdog_ray.local.isolation import Isolation

__all__ = [
    "FIRST_NUMBER",
    "LAST_NUMBER",
    "NODE_MEMORY",
    "free_memory",
    "free_network",
    "free_ssh_port",
    "has_interface",
    "listen",
]

NODE_MEMORY = 450 << 20
"""Bytes of memory that a Ray node needs at the least (measured: about 400 MB with Ray 2.60)."""
FIRST_NUMBER, LAST_NUMBER = 10, 250
"""The last numbers of the addresses that nodes can have."""


def free_memory() -> int:
    """Return the bytes of memory that are free for new processes here, a container's limit included."""
    free = 0
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) << 10
    for limit, used, statistics, cached in (
        ("memory.max", "memory.current", "memory.stat", "inactive_file"),
        (
            "memory/memory.limit_in_bytes",
            "memory/memory.usage_in_bytes",
            "memory/memory.stat",
            "total_inactive_file",
        ),
    ):
        group = Path("/sys/fs/cgroup")
        # No limit is no number ("max").
        with contextlib.suppress(OSError, ValueError):
            room = int((group / limit).read_text()) - int((group / used).read_text())
            for line in (group / statistics).read_text().splitlines():
                if line.startswith(f"{cached} "):
                    # What is kept of files that were read counts as used, and gives way.
                    room += int(line.split()[1])
            free = min(free, room)
    return free


def free_network(isolation: Isolation) -> tuple[socket.socket, str, str]:
    """Choose a network for the nodes that nobody uses.

    :returns: a socket that claims it for as long as it is open, the network's first three numbers and the
        name of this machine's interface on it.
    """
    numbers = random.sample(range(256), 256)
    routes = Path("/proc/net/route").read_text()
    interfaces = os.listdir("/sys/class/net")
    for number in numbers:
        claim = socket.socket(socket.AF_UNIX)
        try:
            # A name in the abstract name space can be had once, and is free when its process ends.
            claim.bind(f"\0raydog-network-{number}")
            if isolation is not Isolation.NAMESPACES:
                listen(f"127.213.{number}.1", 0).close()
        except OSError:
            claim.close()
            continue
        # Routes list their network as a little-endian hexadecimal number.
        taken = f"\t00{number:02X}D50A\t" in routes or f"raydog{number}" in interfaces
        if isolation is Isolation.NAMESPACES and taken:
            claim.close()
            continue
        first = "127" if isolation is Isolation.PROCESSES else "10"
        interface = f"raydog{number}" if isolation is Isolation.NAMESPACES else ""
        return claim, f"{first}.213.{number}", interface
    raise LocalPlatformError("none of the networks 10.213.x.0/24 and 127.213.x.0/24 is free on this machine")


def free_ssh_port(prefix: str) -> int:
    """Choose a port that no process has on the nodes' loopback addresses; usual ones come first."""
    address = f"127.{prefix.partition('.')[2]}.{LAST_NUMBER + 1}"
    for port in (2222, 22022, 0):
        with contextlib.suppress(OSError), listen(address, port) as listener:
            return int(listener.getsockname()[1])
    raise LocalPlatformError(f"no port is free on {address} for the nodes' SSH servers")


def has_interface(name: str) -> bool:
    """Tell whether this machine has a network interface of that name."""
    return Path("/sys/class/net", name).exists()


def listen(address: str, port: int) -> socket.socket:
    """Listen on an address of this machine, where a port of 0 is any that is free.

    :raises OSError: when the port is taken.
    """
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((address, port))
        listener.listen(128)
    except OSError:
        listener.close()
        raise
    return listener
