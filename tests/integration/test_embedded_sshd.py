"""The SSH server that RayDog brings along, used by the real clients."""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import asyncssh
import paramiko
import pytest

from tests.ssh_fixtures import (
    SshServer,
    embedded,
    embedded_command,
    embedded_sshd,
    end,
    eventually,
    make_key,
    need,
)

__all__ = ["embedded"]  # the fixture


@pytest.fixture(autouse=True)
def _clients() -> None:
    need("ssh")


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def started(server: SshServer, command: str, *options: str) -> tuple[subprocess.Popen[bytes], int]:
    """Start a command that first prints its process id; return the client and that id."""
    client = subprocess.Popen(
        [
            "ssh",
            *server.client_options(),
            *options,
            "-p",
            str(server.port),
            f"{server.user}@127.0.0.1",
            command,
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert client.stdout is not None
    return client, int(client.stdout.readline())


def paramiko_client(server: SshServer) -> paramiko.SSHClient:
    client = paramiko.SSHClient()
    client.set_missing_host_key_policy(paramiko.AutoAddPolicy())
    key = paramiko.Ed25519Key.from_private_key_file(str(server.key))
    client.connect(
        "127.0.0.1", server.port, server.user, pkey=key, look_for_keys=False, allow_agent=False, timeout=10
    )
    return client


def test_command_output_and_exit_status(embedded: SshServer) -> None:
    """A command's output, errors and exit status come back, from its own directory."""
    result = embedded.ssh('echo "$PWD $HOME"; echo no >&2; exit 3')
    home = embedded.directory / "home"
    assert (result.returncode, result.stdout, result.stderr) == (3, f"{home} {home}\n".encode(), b"no\n")


def test_output_after_the_other_ended(embedded: SshServer) -> None:
    """Errors that come after the output was closed are not lost."""
    result = embedded.ssh("exec >&-; sleep 0.2; echo late >&2; exit 4")
    assert (result.returncode, result.stderr) == (4, b"late\n")


def test_both_users_and_no_others(embedded: SshServer) -> None:
    """The named users may log in with the key, another user may not."""
    assert embedded.ssh("true").returncode == 0
    embedded.user = "second"
    assert embedded.ssh("true").returncode == 0
    embedded.user = "root"
    result = embedded.ssh("true")
    assert result.returncode == 255
    assert b"Permission denied (publickey)" in result.stderr


def test_authorized_keys_are_read_at_each_login(embedded: SshServer) -> None:
    """A key that is taken out of the file no longer opens, and one that is added does."""
    keys = embedded.directory / "authorized_keys"
    old = keys.read_text()
    keys.write_text(make_key(embedded.directory / "other") + "\n")
    assert embedded.ssh("true").returncode == 255
    keys.write_text(old)
    assert embedded.ssh("true").returncode == 0


def test_environment(embedded: SshServer) -> None:
    """The language comes from the client; nothing else does."""
    client = paramiko_client(embedded)
    try:
        _, out, _ = client.exec_command(
            "echo $LC_TIME:$SECRET:${SSH_CONNECTION%% *}", environment={"LC_TIME": "cy_GB", "SECRET": "x"}
        )
        assert out.read() == b"cy_GB::127.0.0.1\n"
    finally:
        client.close()


def test_large_data_both_ways(embedded: SshServer) -> None:
    """Ten megabytes pass through a command unchanged, three times."""
    data = os.urandom(10_000_000)
    for _ in range(3):
        assert (
            hashlib.sha256(embedded.ssh("cat", stdin=data).stdout).digest() == hashlib.sha256(data).digest()
        )


def test_command_that_does_not_read(embedded: SshServer) -> None:
    """Input that the command leaves unread keeps nobody from ending."""
    result = embedded.ssh("head -c 1; exit 6", stdin=bytes(5_000_000))
    assert (result.returncode, result.stdout) == (6, b"\0")


def test_death_by_signal(embedded: SshServer) -> None:
    """A command that a signal ended is reported so."""

    async def run() -> str | None:
        async with asyncssh.connect(
            "127.0.0.1",
            embedded.port,
            username=embedded.user,
            client_keys=[str(embedded.key)],
            known_hosts=None,
        ) as connection:
            return (await connection.run("kill -9 $$")).exit_signal[0]

    assert asyncio.run(run()) == "KILL"


def test_signal_from_the_client(embedded: SshServer) -> None:
    """A signal reaches the whole process group, also after the end of the input."""

    async def run() -> tuple[str, int | None]:
        async with (
            asyncssh.connect(
                "127.0.0.1",
                embedded.port,
                username=embedded.user,
                client_keys=[str(embedded.key)],
                known_hosts=None,
            ) as connection,
            connection.create_process(
                "trap 'echo usr1; exit 7' USR1; echo go; while :; do sleep 0.1; done"
            ) as process,
        ):
            process.stdin.write_eof()
            await process.stdout.readline()
            process.send_signal("USR1")
            result = await process.wait(timeout=10)
            return str(result.stdout), result.exit_status

    assert asyncio.run(run()) == ("usr1\n", 7)


def test_shell_without_a_terminal(embedded: SshServer) -> None:
    """Without a command the shell runs what it is sent."""
    result = embedded.ssh(stdin=b"echo one\ntty\nexit 5\n", options=("-T",))
    assert (result.returncode, result.stdout) == (5, b"one\nnot a tty\n")


def test_terminal(embedded: SshServer) -> None:
    """A terminal has the client's type and size, follows its changes, and takes control keys."""
    client = paramiko_client(embedded)
    try:
        channel = client.invoke_shell(term="vt100", width=91, height=31)
        channel.settimeout(10)

        def until(text: str) -> None:
            seen = ""
            while text not in seen:
                more = channel.recv(4096).decode()
                assert more, f"the shell ended, and {text!r} was not in {seen!r}"
                seen += more

        channel.sendall(b"echo T=$TERM $(stty size)\n")
        until("T=vt100 31 91")
        channel.resize_pty(width=120, height=40)
        channel.sendall(b"stty size\n")
        until("40 120")
        channel.sendall(b"sleep 60\n")
        time.sleep(0.3)
        channel.sendall(b"\x03")
        channel.sendall(b"echo still $((6 * 7))\nexit 9\n")
        until("still 42")
        assert channel.recv_exit_status() == 9
    finally:
        client.close()


def test_terminal_of_the_ssh_client(embedded: SshServer) -> None:
    """``ssh -tt`` gives a command a terminal, all of whose output arrives."""
    result = embedded.ssh("tty; seq 100000; exit 4", options=("-tt",))
    lines = result.stdout.decode().split("\r\n")
    assert lines[0].startswith("/dev/pts/")
    assert lines[1:-1] == [str(n) for n in range(1, 100001)]
    assert result.returncode == 4


def test_terminal_session_ends_with_its_shell(embedded: SshServer) -> None:
    """A background job that keeps the terminal open does not keep the session open, nor is it ended."""
    start = time.monotonic()
    result = embedded.ssh("trap '' HUP; sleep 60 & echo $!", options=("-tt",))
    assert time.monotonic() - start < 10
    pid = int(result.stdout)
    assert alive(pid)
    os.kill(pid, signal.SIGKILL)


def test_background_job_survives_its_session(embedded: SshServer) -> None:
    """A daemon that a command leaves behind goes on, as ``ray start`` wants."""
    pid = int(embedded.ssh("sleep 60 </dev/null >/dev/null 2>&1 & echo $!").stdout)
    time.sleep(0.3)
    assert alive(pid)
    os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("terminal", ["-T", "-tt"])
def test_hang_up(embedded: SshServer, terminal: str) -> None:
    """When the client vanishes, the session's whole process group is hung up."""
    client, pid = started(embedded, "sleep 61 & echo $!; sleep 62", terminal)
    parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    client.kill()
    client.wait()
    assert eventually(lambda: not alive(pid) and not alive(parent))


@pytest.mark.parametrize("options", [(), ("-O",)], ids=["sftp", "old protocol"])
def test_scp(embedded: SshServer, tmp_path: Path, options: tuple[str, ...]) -> None:
    """``scp`` copies both ways, over SFTP and in its old protocol, and reports what is missing."""
    need("scp")
    data = os.urandom(1_000_000)
    (tmp_path / "there").write_bytes(data)

    def scp(*paths: str) -> subprocess.CompletedProcess[bytes]:
        command = ["scp", *options, *embedded.client_options(), "-P", str(embedded.port), *paths]
        return subprocess.run(command, capture_output=True, timeout=30, check=False)

    remote = f"{embedded.user}@127.0.0.1:"
    assert scp(str(tmp_path / "there"), f"{remote}copy").returncode == 0
    assert (embedded.directory / "home" / "copy").read_bytes() == data
    assert scp(f"{remote}copy", str(tmp_path / "back")).returncode == 0
    assert (tmp_path / "back").read_bytes() == data
    failed = scp(f"{remote}missing", str(tmp_path / "none"))
    assert failed.returncode != 0
    assert b"No such file" in failed.stderr


def test_sftp(embedded: SshServer) -> None:
    """paramiko's SFTP starts in the home, writes, lists, renames and reads."""
    client = paramiko_client(embedded)
    try:
        sftp = client.open_sftp()
        assert sftp.normalize(".") == str(embedded.directory / "home")
        with sftp.open("a", "wb") as file:
            file.write(b"hello")
        sftp.chmod("a", 0o600)
        sftp.rename("a", "b")
        assert sftp.listdir() == ["b"]
        with sftp.open("b", "rb") as file:
            assert file.read() == b"hello"
    finally:
        client.close()


def test_rsync(embedded: SshServer, tmp_path: Path) -> None:
    """``rsync`` works over it."""
    need("rsync")
    (tmp_path / "file").write_text("hello")
    shell = " ".join(["ssh", *embedded.client_options(), "-p", str(embedded.port)])
    command = ["rsync", "-e", shell, str(tmp_path / "file"), f"{embedded.user}@127.0.0.1:"]
    subprocess.run(command, check=True, timeout=30)
    assert (embedded.directory / "home" / "file").read_text() == "hello"


def test_what_is_refused(embedded: SshServer) -> None:
    """There is no other subsystem, no agent forwarding and no remote forwarding."""
    result = embedded.ssh("netconf", options=("-s",))
    assert result.returncode == 127
    assert b"no subsystem 'netconf'" in result.stderr
    assert embedded.ssh("echo $SSH_AUTH_SOCK", options=("-A",)).stdout == b"\n"
    options = ("-o", "ExitOnForwardFailure=yes", "-R", "127.0.0.1:0:127.0.0.1:9")
    assert embedded.ssh("true", options=options).returncode == 255


def test_parents_end_ends_all(embedded: SshServer) -> None:
    """The end of its standard input ends the server and what ignores a hang-up in its sessions."""
    client, pid = started(embedded, "trap '' HUP TERM; echo $$; while :; do sleep 1; done")
    assert embedded.process.stdin is not None
    embedded.process.stdin.close()
    assert embedded.process.wait(5) == 0
    assert eventually(lambda: not alive(pid))
    client.wait(5)


def test_sigterm_ends_it(embedded: SshServer) -> None:
    """SIGTERM ends the server at once where nothing resists, and its port with it."""
    client, pid = started(embedded, "echo $$; sleep 63")
    start = time.monotonic()
    embedded.process.terminate()
    assert embedded.process.wait(5) == 0
    assert time.monotonic() - start < 1
    assert eventually(lambda: not alive(pid))
    client.wait(5)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", embedded.port), timeout=2)


def test_two_sockets(tmp_path: Path) -> None:
    """One server serves several inherited sockets."""
    with embedded_sshd(tmp_path) as server:
        listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
        command = embedded_command(tmp_path, listeners[0].fileno(), "a")
        command += ["--fd", str(listeners[1].fileno())]
        fds = [listener.fileno() for listener in listeners]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=fds)
        try:
            server.user = "a"
            for listener in listeners:
                server.port = listener.getsockname()[1]
                listener.close()
                assert server.ssh("echo yes").stdout == b"yes\n"
        finally:
            end(process)


def test_input_must_be_a_pipe(tmp_path: Path) -> None:
    """Without a pipe from its parent the server does not start, and says why."""
    command = [sys.executable, "-m", "yellowdog_ray.local.sshd", "--fd", "3"]
    command += ["--host-key", "k", "--authorized-keys", "a", "--user", "u"]
    result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=30, check=False)
    assert result.returncode == 2
    assert b"must be a pipe from the parent" in result.stderr
