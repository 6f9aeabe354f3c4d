"""The SSH server of a local node, for machines that have no sshd of their own.

It is run as a process inside a node::

    python -m yellowdog_ray.local.sshd --fd 7 --host-key FILE --authorized-keys FILE --user NAME

``--fd`` (one or more) are TCP sockets that already listen and that the process inherits; ``--user``
(one or more) are the names that may log in, all of them as the process's own user, with the keys in
the file of authorized keys as it is at that moment. Keys only: there are no passwords, and no agent,
X11 or remote forwarding. Commands, shells, terminals, ``scp``, ``sftp``, ``rsync`` and forwarding to
any TCP address (``ssh -L``) work. Commands run as ``/bin/bash -c`` in the directory and environment
of this process; from the client only ``LANG``, ``LC_*`` and ``COLORTERM`` are taken over, as sshd
is usually set up. A hang-up sends SIGHUP to the session's process group.

It ends when its standard input, a pipe from its parent, is closed, and on SIGTERM or SIGINT. What
still runs in its sessions is then hung up, and killed a second later.

Needs asyncssh: ``pip install "yellowdog-ray[local]"``.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import fcntl
import os
import pty
import shutil
import signal
import socket
import stat
import struct
import sys
import termios
from collections.abc import Sequence
from typing import IO

import asyncssh

__all__ = ["main"]

_SHELL = "/bin/bash"
_SHUTDOWN_GRACE = 1.0  # seconds between SIGHUP and SIGKILL for what still runs when the server ends
_LOGIN_GRACE = 20  # seconds that a client has to log in
_TERMINAL_LINGER = 0.3  # seconds between looks at a terminal that a background job keeps open


class _Session:
    """One command or shell with its process group."""

    running: set[_Session] = set()  # noqa: RUF012 - of all connections: they end with the server

    def __init__(self, client: asyncssh.SSHServerProcess[bytes]) -> None:
        self._client = client
        self._child: asyncio.subprocess.Process | None = None
        self._feeder: asyncio.Task[None] | None = None
        self._terminal: int | None = None  # our end of it
        # asyncssh signals only the leader, and nobody once the input has ended.
        client.exception_received = self._event  # type: ignore[method-assign]

    def kill(self, number: int) -> None:
        """Signal the process group, unless its leader has ended: the id may be another's by now."""
        if self._child is not None and self._child.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._child.pid, number)

    async def run(self) -> None:
        client = self._client
        self.running.add(self)
        try:
            if client.subsystem is not None:
                raise OSError(f"there is no subsystem {client.subsystem!r}, only sftp")
            child = await self._start()
            finished = asyncio.create_task(self._finish(child))
            hung_up = asyncio.create_task(client.wait_closed())
            await asyncio.wait({finished, hung_up}, return_when=asyncio.FIRST_COMPLETED)
            finished.cancel()
            if child.returncode is not None and child.returncode < 0:
                client.exit_with_signal(signal.Signals(-child.returncode).name.removeprefix("SIG"))
            elif child.returncode is not None:
                client.exit(child.returncode)
        except OSError as error:
            client.stderr.write(f"Could not run this: {error}\n".encode())
            client.exit(127)
        finally:
            # A hang-up, if it still runs. As from a terminal: what is to survive that says so with nohup.
            self.kill(signal.SIGHUP)
            self.kill(signal.SIGCONT)
            if self._feeder is not None:
                self._feeder.cancel()
            if self._terminal is not None:
                os.close(self._terminal)
                self._terminal = None
            if self._child is not None:
                await self._child.wait()
            self.running.discard(self)

    async def _start(self) -> asyncio.subprocess.Process:
        """Start the command and tie it to the client."""
        client = self._client
        env = dict(os.environ)
        env |= {k: v for k, v in client.env.items() if k in ("LANG", "COLORTERM") or k.startswith("LC_")}
        ends = [client.get_extra_info(which) or ("unknown", 0) for which in ("peername", "sockname")]
        env["SSH_CONNECTION"] = " ".join(f"{end[0]} {end[1]}" for end in ends)
        if client.term_type:
            env["TERM"] = client.term_type
            self._terminal, slave = pty.openpty()
            self._resize(client.term_size)
            ours, theirs = [os.dup(self._terminal), os.dup(self._terminal)], [slave] * 3
        else:
            # Pipes of our own: asyncio may make stdin a socket, and bash then reads ~/.bashrc.
            pipes = [os.pipe()[::-1], os.pipe(), os.pipe()]
            ours, theirs = [pipe[0] for pipe in pipes], [pipe[1] for pipe in pipes]
        try:
            self._child = child = await asyncio.create_subprocess_exec(
                *([_SHELL] if client.command is None else [_SHELL, "-c", client.command]),
                stdin=theirs[0],
                stdout=theirs[1],
                stderr=theirs[2],
                env=env,
                start_new_session=True,
                preexec_fn=_take_terminal if client.term_type else None,
            )
        except BaseException:
            for fd in ours:
                os.close(fd)
            raise
        finally:
            for fd in set(theirs):
                os.close(fd)
        # One output may end before the other, so the end of the channel's data is not left to either.
        await client.redirect(stdout=ours[1], stderr=ours[2] if ours[2:] else None, send_eof=False)
        # The input is not redirected: asyncssh writes to and ends a pipe from within its resume_writing,
        # and asyncio then closes it before all is written.
        self._feeder = asyncio.create_task(self._feed(os.fdopen(ours[0], "wb", 0)))
        return child

    async def _feed(self, pipe: IO[bytes]) -> None:
        """Carry the client's input to the command, and drop what it no longer wants."""
        loop = asyncio.get_running_loop()
        protocol = asyncio.StreamReaderProtocol(asyncio.StreamReader())  # for its flow control
        transport, _ = await loop.connect_write_pipe(lambda: protocol, pipe)
        stdin = asyncio.StreamWriter(transport, protocol, None, loop)
        with contextlib.suppress(asyncssh.Error), contextlib.closing(stdin):
            while data := await self._client.stdin.read(64 * 1024):
                with contextlib.suppress(OSError):
                    if not stdin.is_closing():
                        stdin.write(data)
                        await stdin.drain()

    async def _finish(self, child: asyncio.subprocess.Process) -> None:
        """Wait for the command and then for its output, which a background job may keep open."""
        client = self._client
        await child.wait()
        drained = asyncio.gather(client.stdout.drain(), client.stderr.drain(), return_exceptions=True)
        while self._terminal is not None and not drained.done():
            await asyncio.wait({drained}, timeout=_TERMINAL_LINGER)
            unread = fcntl.ioctl(self._terminal, termios.FIONREAD, bytes(4))
            if not any(unread):
                return  # with a terminal the session ends with its shell
        await drained

    def _event(self, exc: Exception) -> None:
        if isinstance(exc, asyncssh.TerminalSizeChanged):
            self._resize(exc.term_size)
        elif isinstance(exc, asyncssh.BreakReceived):
            self.kill(signal.SIGINT)
        elif isinstance(exc, asyncssh.SignalReceived):
            number = signal.Signals.__members__.get(f"SIG{exc.signal}")
            if number is not None:
                self.kill(number)

    def _resize(self, size: tuple[int, int, int, int]) -> None:
        if self._terminal is not None:
            width, height, *pixels = (min(n, 0xFFFF) for n in size)
            fcntl.ioctl(self._terminal, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, *pixels))


def _take_terminal() -> None:
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


class _Sftp(asyncssh.SFTPServer):
    """asyncssh's own, which ends without an exit status: scp takes that for a failure."""

    def exit(self) -> None:
        self.channel.exit(0)


class _Server(asyncssh.SSHServer):
    """Who may log in and what they may ask for, for one connection."""

    def __init__(self, users: Sequence[str], authorized_keys: str) -> None:
        self._users, self._authorized_keys = users, authorized_keys

    def connection_made(self, conn: asyncssh.SSHServerConnection) -> None:
        self._connection = conn

    def begin_auth(self, username: str) -> bool:
        keys = asyncssh.import_authorized_keys("")  # no key opens for any other name
        if username in self._users:
            with contextlib.suppress(OSError):
                keys = asyncssh.read_authorized_keys(self._authorized_keys)
        self._connection.set_authorized_keys(keys)
        return True

    def connection_requested(self, dest_host: str, dest_port: int, orig_host: str, orig_port: int) -> bool:
        return True


async def _serve(options: argparse.Namespace) -> None:
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)

    class Parent(asyncio.Protocol):
        def connection_lost(self, exc: Exception | None) -> None:
            stop.set()

    await loop.connect_read_pipe(Parent, sys.stdin)
    for fd in options.fd:
        await asyncssh.listen(
            sock=socket.socket(fileno=fd),
            server_factory=lambda: _Server(options.user, options.authorized_keys),
            process_factory=lambda client: _Session(client).run(),
            server_host_keys=[options.host_key],
            sftp_factory=_Sftp,
            allow_scp=shutil.which("scp") is None,  # of scp's old protocol; else the machine's own scp runs
            password_auth=False,
            kbdint_auth=False,
            gss_host=None,
            agent_forwarding=False,
            encoding=None,
            line_editor=False,
            keepalive_interval=30,
            login_timeout=_LOGIN_GRACE,
        )
    await stop.wait()
    for number in (signal.SIGHUP, signal.SIGKILL):
        for session in list(_Session.running):
            session.kill(number)
        deadline = loop.time() + _SHUTDOWN_GRACE
        while _Session.running and loop.time() < deadline:
            await asyncio.sleep(0.02)


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve SSH until the parent or a signal ends it.

    :param arguments: the command line, without the program's name; that of this process by default.
    :returns: the exit status, 0; a wrong command line exits with 2.
    """
    parser = argparse.ArgumentParser(
        prog="python -m yellowdog_ray.local.sshd", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--fd", type=int, action="append", required=True, help="an inherited, listening socket"
    )
    parser.add_argument("--host-key", required=True, help="the private host key's file")
    parser.add_argument(
        "--authorized-keys", required=True, help="the file of the public keys that may log in"
    )
    parser.add_argument("--user", action="append", required=True, help="a name that may log in")
    options = parser.parse_args(arguments)
    if not stat.S_ISFIFO(os.fstat(0).st_mode) and not stat.S_ISSOCK(os.fstat(0).st_mode):
        parser.error("standard input must be a pipe from the parent: the server ends when it is closed")
    asyncio.run(_serve(options))
    return 0


if __name__ == "__main__":
    sys.exit(main())
