"""What goes over an SSH connection: TCP connections, commands, and the question whether it is alive."""

from __future__ import annotations

import threading

import paramiko

from yellowdog_ray.errors import TunnelError
from yellowdog_ray.utils._ssh.connection import CONNECT_TIMEOUT, quiet_log
from yellowdog_ray.utils._ssh.route import bracketed

__all__ = ["is_alive", "open_tcp", "quicken", "run"]


def quicken(transport: paramiko.Transport) -> None:
    """Have sshd send small packets at once; it takes a moment.

    Before version 10.1 it does so only once a session has run something: a connection that only forwards
    waits about 40 ms for each answer that comes in two parts, as all of Ray's do.
    """
    try:
        with transport.open_session(timeout=CONNECT_TIMEOUT) as channel:
            channel.exec_command("true")
    except (paramiko.SSHException, EOFError, OSError) as error:
        quiet_log.debug("no session for the tunnels' sake: %s", error)


def open_tcp(
    transport: paramiko.Transport, host: str, port: int, timeout: float, who: str = "The head"
) -> paramiko.Channel:
    """Open a TCP connection from the SSH server to a port, of itself or of another machine.

    :param timeout: seconds, for the opening and then for each read and write.
    :param who: the SSH server, for messages.
    :raises TunnelError: with the reason.
    """
    where = bracketed(host, port)
    try:
        channel = transport.open_channel("direct-tcpip", (host, port), ("127.0.0.1", 0), timeout=timeout)
    except paramiko.ChannelException as error:
        if error.code == paramiko.common.OPEN_FAILED_ADMINISTRATIVELY_PROHIBITED:
            raise TunnelError(
                f"{who} forbids connections to {where}: its sshd_config needs 'AllowTcpForwarding yes'"
            ) from error
        raise TunnelError(f"{who} cannot connect to {where}: nothing listens there") from error
    except (paramiko.SSHException, EOFError, OSError) as error:
        reason = str(error).rstrip(".") or type(error).__name__
        raise TunnelError(f"{who} did not connect to {where}: {reason}") from error
    channel.settimeout(timeout)
    return channel


def run(transport: paramiko.Transport, command: str, timeout: float) -> tuple[int, bytes, str]:
    """Run a command on the SSH server.

    :param timeout: seconds until it must have ended.
    :returns: its exit status, its output and what it wrote to its error stream.
    :raises TunnelError: where it could not be run or did not end in time.
    """
    peer = transport.getpeername()
    where = bracketed(*peer[:2]) if len(peer) > 1 else "the server"
    try:
        with transport.open_session(timeout=timeout) as channel:
            expired = threading.Event()

            def expire() -> None:
                expired.set()
                channel.close()

            # paramiko waits for some of the answers without any limit, but not on a closed channel.
            timer = threading.Timer(timeout, expire)
            timer.daemon = True
            timer.start()
            try:
                channel.exec_command(command)
                channel.shutdown_write()
                output = b"".join(iter(lambda: channel.recv(1 << 16), b""))
                errors = b"".join(iter(lambda: channel.recv_stderr(1 << 16), b""))
                status = channel.recv_exit_status()
            finally:
                timer.cancel()
                if expired.is_set():
                    raise TunnelError(f"A command on {where} did not end within {timeout:g} s")
    except TunnelError:
        raise
    except (paramiko.SSHException, EOFError, OSError) as error:
        reason = str(error).rstrip(".") or type(error).__name__
        raise TunnelError(f"A command could not be run on {where}: {reason}") from error
    if status < 0:
        raise TunnelError(f"The connection to {where} ended while a command ran")
    return status, output, errors.decode(errors="replace").strip()


def is_alive(transport: paramiko.Transport, timeout: float = 3.0) -> bool:
    """Tell whether an SSH server still answers; a connection may have died without either end being told.

    :param timeout: seconds to wait for its answer.
    """
    try:
        transport.open_session(timeout=timeout).close()
    except paramiko.ChannelException:
        pass  # it refuses another session: that is an answer
    except (paramiko.SSHException, EOFError, OSError):
        return False
    return True
