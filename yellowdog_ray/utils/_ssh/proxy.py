"""The command that connects to an SSH server, where the user's settings name one."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import threading

from yellowdog_ray.errors import TunnelError

__all__ = ["ProxySocket", "own_environment"]

_END_SECONDS = 0.5  # for the command to end when it is told


def own_environment() -> dict[str, str]:
    """Return the environment for a process that needs none of Ray's and YellowDog's, which are secrets."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "YD_"))}


class ProxySocket(socket.socket):
    """The connection to a server through a ``ProxyCommand``, which is ended with it.

    The command need not end with its input. It has a session of its own: so all that it has started can be
    ended too, and an interrupt at the terminal is not for it.

    :param command: what a shell is to run.
    :raises TunnelError: where that cannot be.
    """

    def __init__(self, command: str) -> None:
        ours, its = socket.socketpair()
        super().__init__(fileno=ours.detach())
        self._lock, self._is_ending = threading.Lock(), True
        with its:
            try:
                self._process = subprocess.Popen(
                    ["/bin/sh", "-c", f"exec {command}"],  # as ssh does
                    stdin=its.fileno(),
                    stdout=its.fileno(),
                    start_new_session=True,
                    env=own_environment(),
                )
            except OSError as error:
                self.close()
                raise TunnelError(f"The ProxyCommand of your SSH settings cannot be run: {error}") from error
        self._is_ending = False

    def shutdown(self, how: int, /) -> None:
        """End the connection, and the command."""
        try:
            super().shutdown(how)
        finally:
            self._end()

    def close(self) -> None:
        """End the connection, and the command."""
        super().close()
        self._end()

    def _end(self) -> None:
        with self._lock:
            if self._is_ending:
                return
            self._is_ending = True
        self._signal(signal.SIGTERM)
        # Python waits for this one before it exits; of a daemon it would be one too.
        thread = threading.Thread(target=self._see_it_end, name="ray-tunnels-proxy-command", daemon=False)
        try:
            thread.start()
        except RuntimeError:  # there are to be no more threads
            self._see_it_end()

    def _see_it_end(self) -> None:
        try:
            self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self._signal(signal.SIGKILL)
            self._process.wait()

    def _signal(self, number: int) -> None:
        # Its number is not given to another one: it has not been waited for.
        with contextlib.suppress(OSError):
            os.killpg(self._process.pid, number)
