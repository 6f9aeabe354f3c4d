"""The command that connects to an SSH server, where the user's settings name one."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import threading
import time

from yellowdog_ray.errors import TunnelError

__all__ = ["ProxySocket", "own_environment", "see_group_end"]

_END_SECONDS = 0.5  # for the command to end when it is told
_LOOK_SECONDS = 0.02


def own_environment() -> dict[str, str]:
    """Return the environment for a process that needs none of Ray's and YellowDog's, which are secrets."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "YD_"))}


def see_group_end(process: subprocess.Popen[bytes], seconds: float) -> None:
    """Wait for a process and all that it has started, which have been told to end; then kill what is left.

    :param process: the leader of their group, which has not been waited for, or only just.
    :param seconds: for it to end; for the others half a second of them at most.
    """
    until = time.monotonic() + seconds
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
    until = min(until, time.monotonic() + _END_SECONDS)
    # Nobody else is given the number of a group that has members.
    with contextlib.suppress(OSError):
        while time.monotonic() < until:
            os.killpg(process.pid, 0)
            time.sleep(_LOOK_SECONDS)
        os.killpg(process.pid, signal.SIGKILL)


class ProxySocket(socket.socket):
    """The connection to a server through a ``ProxyCommand``, which is ended with it.

    The command need not end with its input. It has a session of its own: so all that it has started can be
    ended too, an interrupt at the terminal is not for it, and it has no terminal to ask anything at.

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
        with contextlib.suppress(OSError):
            os.killpg(self._process.pid, signal.SIGTERM)
        # Python waits for this one before it exits; of a daemon it would be one too.
        thread = threading.Thread(target=self._see_it_end, name="ray-tunnels-proxy-command", daemon=False)
        try:
            thread.start()
        except RuntimeError:  # there are to be no more threads
            self._see_it_end()

    def _see_it_end(self) -> None:
        see_group_end(self._process, _END_SECONDS)
        self._process.wait()
