"""The supervisor of nodes as its owner has it: its process, the line to it, and the network of its nodes."""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from yellowdog_ray.errors import LocalPlatformError
from yellowdog_ray.local.belonging import end_all, processes_of
from yellowdog_ray.local.host import free_network, free_ssh_port, has_interface
from yellowdog_ray.local.isolation import Isolation
from yellowdog_ray.local.node_files import PATH, environment_below_tmp
from yellowdog_ray.local.process_node import import_path
from yellowdog_ray.local.protocol import Channel, Closed
from yellowdog_ray.local.supervisor import Settings

__all__ = ["Supervision"]

_START_TIMEOUT = 20.0
_END_SECONDS = 5.0


class Supervision:
    """A supervisor, which :meth:`start` starts, and a network that is its nodes' own from now on.

    :param directory: the platform's own directory.
    :param isolation: the kind of node.
    :param sshd: the system's SSH server, or None for the embedded one.
    :param user: the name of the user whom tasks run as.
    :param lock: a descriptor that the supervisor keeps open for as long as it lives.
    :raises LocalPlatformError: when no network is free.
    """

    def __init__(
        self, directory: Path, isolation: Isolation, sshd: str | None, *, user: str, lock: int
    ) -> None:
        self._directory, self._isolation, self._user, self._lock = directory, isolation, user, lock
        self.sshd = sshd
        self.process: subprocess.Popen[bytes] | None = None
        self.ssh_port = 22
        self._claim, self.prefix, self.interface = free_network(isolation)
        ours, self._theirs = socket.socketpair()
        self.channel = Channel(ours)

    def start(self) -> None:
        """Start it, and wait until it is ready; what has begun when that fails is for :meth:`end`.

        :raises LocalPlatformError: when it does not get ready.
        :raises OSError: when its process cannot be made.
        """
        if self._isolation is not Isolation.NAMESPACES:
            self.ssh_port = free_ssh_port(self.prefix)
        settings = Settings(
            isolation=self._isolation.value,
            directory=str(self._directory),
            prefix=self.prefix,
            interface=self.interface,
            keep=environment_below_tmp(),
            sshd=self.sshd,
            user=self._user,
            ssh_port=self.ssh_port,
        )
        with self._theirs as theirs:
            self.process = subprocess.Popen(
                [
                    sys.executable, "-m", "yellowdog_ray.local.supervisor",
                    str(theirs.fileno()), str(self._lock), json.dumps(asdict(settings)), str(os.getpid()),
                ],
                pass_fds=[theirs.fileno(), self._lock],
                stdin=subprocess.DEVNULL,
                cwd="/",
                # Ctrl-C in a terminal is for the owner, which then ends the nodes.
                start_new_session=True,
                # Nothing of the user's environment, which may hold keys, goes further than this process.
                env={"PATH": PATH, "LANG": "C.UTF-8", "PYTHONPATH": os.pathsep.join(import_path())},
            )  # fmt: skip
        self.expect("ready")

    def expect(self, event: str) -> dict[str, Any]:
        """Wait for a message of the supervisor; for its start only, for nothing else may come meanwhile.

        :raises LocalPlatformError: when it does not come within 20 s, or the supervisor has failed.
        """
        deadline = time.monotonic() + _START_TIMEOUT
        while True:
            if not select.select([self.channel], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise LocalPlatformError(
                    f"the node supervisor did not say {event!r} in {_START_TIMEOUT:.0f} s"
                )
            try:
                messages = self.channel.receive()
            except Closed:
                raise LocalPlatformError("the node supervisor ended at its start") from None
            for message in messages:
                if message["event"] == event:
                    return message
                if message["event"] == "failed":
                    raise LocalPlatformError(message["reason"])

    def address(self, number: int) -> str:
        """Tell the address that a node has among the nodes."""
        return f"{self.prefix}.{number}"

    def host_address(self, number: int) -> str:
        """Tell the address at which this machine reaches a node."""
        if self._isolation is Isolation.USER_NAMESPACES:
            return f"127.{self.prefix.partition('.')[2]}.{number}"
        return self.address(number)

    @property
    def works(self) -> bool:
        """Whether its process runs."""
        return self.process is not None and self.process.poll() is None

    def end(self) -> None:
        """End it and with it every node, and wait until nothing of them is left."""
        self.channel.hang_up()
        if self.process is not None:
            try:
                self.process.wait(timeout=_START_TIMEOUT)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        # With plain processes and a supervisor that was killed, nobody else has ended them.
        end_all(lambda: processes_of(str(self._directory)), _END_SECONDS)
        # The kernel takes a network namespace apart a moment after its last process.
        deadline = time.monotonic() + 5
        while self.interface and has_interface(self.interface) and time.monotonic() < deadline:
            time.sleep(0.02)
        self._theirs.close()
        self._claim.close()

    def leftovers(self) -> list[str]:
        """List what is left of it and of the nodes: processes and an interface."""
        found = [f"process {pid}" for pid in processes_of(str(self._directory))]
        if self.process is not None and self.process.poll() is None:
            found.append(f"supervisor {self.process.pid}")
        if self.interface and has_interface(self.interface):
            found.append(f"network interface {self.interface}")
        return found
