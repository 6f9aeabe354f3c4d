"""SSH servers on loopback for tests: the system's sshd and the one that RayDog brings along."""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import socket
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import asyncssh
import pytest

SSHD = "/usr/sbin/sshd"


@dataclass
class SshServer:
    """A running server, and all that a client needs."""

    kind: str
    port: int
    user: str
    key: Path
    host_key: str
    directory: Path
    process: subprocess.Popen[bytes]

    def client_options(self) -> list[str]:
        """The options that let ``ssh``, ``scp`` and ``sftp`` in, whatever the user's own settings are."""
        known = self.directory / "known_hosts"
        known.write_text(f"[127.0.0.1]:{self.port} {self.host_key}\n")
        options = ["IdentitiesOnly=yes", f"UserKnownHostsFile={known}", "BatchMode=yes", "LogLevel=ERROR"]
        return ["-F", "none", "-i", str(self.key), *[word for option in options for word in ("-o", option)]]

    def ssh(
        self, *arguments: str, stdin: bytes = b"", options: tuple[str, ...] = ()
    ) -> subprocess.CompletedProcess[bytes]:
        """Run the real ``ssh`` client."""
        return subprocess.run(
            [
                "ssh",
                *self.client_options(),
                *options,
                "-p",
                str(self.port),
                f"{self.user}@127.0.0.1",
                *arguments,
            ],
            input=stdin,
            capture_output=True,
            timeout=30,
            check=False,
        )


def make_key(path: Path, kind: str = "ssh-ed25519", passphrase: str | None = None) -> str:
    """Write a new private key, and its public one beside it as ``.pub``; return the line of the latter."""
    key = asyncssh.generate_private_key(kind)
    key.write_private_key(str(path), passphrase=passphrase)
    path.chmod(0o600)
    key.write_public_key(f"{path}.pub")
    return Path(f"{path}.pub").read_text().strip()


def free_port() -> int:
    """Return a port of 127.0.0.1 that nobody uses at the moment."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def eventually(condition: Callable[[], object], timeout: float = 5.0) -> bool:
    """Wait until the condition holds; return whether it does."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def _answers(port: int, address: str = "127.0.0.1") -> bool:
    with contextlib.suppress(OSError), socket.create_connection((address, port), timeout=2) as sock:
        return sock.recv(4) == b"SSH-"
    return False


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process, kindly first."""
    process.terminate()
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.stdin is not None:
        process.stdin.close()


@contextlib.contextmanager
def system_sshd(
    directory: Path, *, port: int | None = None, address: str = "127.0.0.1", prefix: tuple[str, ...] = ()
) -> Iterator[SshServer]:
    """The system's sshd, as the current user, with an Ed25519 and an ECDSA host key.

    Keys that are in the directory already are used again.

    :param prefix: a command that runs it.
    """
    if not os.access(SSHD, os.X_OK):
        pytest.skip(f"there is no {SSHD} on this machine")
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # sshd insists on it when it runs as root
    for name, kind in (
        ("host_ed25519", "ssh-ed25519"),
        ("host_ecdsa", "ecdsa-sha2-nistp256"),
        ("user", "ssh-ed25519"),
    ):
        if not (directory / name).exists():
            make_key(directory / name, kind)
    host_key = (directory / "host_ed25519.pub").read_text().strip()
    if not (directory / "authorized_keys").exists():
        (directory / "authorized_keys").write_text((directory / "user.pub").read_text())
    port = port or free_port()
    (directory / "sshd_config").write_text(
        f"""ListenAddress {address}
Port {port}
HostKey {directory}/host_ed25519
HostKey {directory}/host_ecdsa
AuthorizedKeysFile {directory}/authorized_keys
StrictModes no
UsePAM no
PasswordAuthentication no
PermitRootLogin yes
PidFile none
MaxStartups 100
Subsystem sftp internal-sftp
"""
    )
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen(
            [*prefix, SSHD, "-D", "-e", "-f", str(directory / "sshd_config")], stderr=log
        )
    try:
        assert eventually(lambda: _answers(port, address) or process.poll() is not None)
        assert process.poll() is None, (directory / "log").read_text()
        yield SshServer("sshd", port, getpass.getuser(), directory / "user", host_key, directory, process)
    finally:
        end(process)


def embedded_command(directory: Path, fd: int, *users: str) -> list[str]:
    """Return the command line of RayDog's own server, with the keys of a directory."""
    words = ["--fd", str(fd), "--host-key", str(directory / "host_ed25519")]
    words += ["--authorized-keys", str(directory / "authorized_keys")]
    for user in users:
        words += ["--user", user]
    return [sys.executable, "-m", "yellowdog_ray.local.sshd", *words]


@contextlib.contextmanager
def embedded_sshd(directory: Path, user: str = "yd-agent") -> Iterator[SshServer]:
    """RayDog's own server, with a second user named ``second`` and a home of its own."""
    host_key = make_key(directory / "host_ed25519")
    (directory / "authorized_keys").write_text(make_key(directory / "user") + "\n")
    (directory / "home").mkdir()
    with socket.create_server(("127.0.0.1", 0)) as listener, (directory / "log").open("wb") as log:
        port = listener.getsockname()[1]
        process = subprocess.Popen(
            embedded_command(directory, listener.fileno(), user, "second"),
            stdin=subprocess.PIPE,
            stderr=log,
            pass_fds=[listener.fileno()],
            cwd=directory / "home",
            env={**os.environ, "HOME": str(directory / "home")},
        )
    try:
        assert eventually(lambda: _answers(port) or process.poll() is not None, 20)
        assert process.poll() is None, (directory / "log").read_text()
        yield SshServer("embedded", port, user, directory / "user", host_key, directory, process)
    finally:
        end(process)


@pytest.fixture(params=[pytest.param("sshd", marks=pytest.mark.sshd), "embedded"])
def ssh_server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[SshServer]:
    """Each kind of SSH server in turn."""
    directory = tmp_path / "ssh"
    directory.mkdir()
    with (system_sshd if request.param == "sshd" else embedded_sshd)(directory) as server:
        yield server


@pytest.fixture
def embedded(tmp_path: Path) -> Iterator[SshServer]:
    """RayDog's own SSH server."""
    directory = tmp_path / "ssh"
    directory.mkdir()
    with embedded_sshd(directory) as server:
        yield server


class _Echo(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        self.request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with contextlib.suppress(OSError):
            while data := self.request.recv(65536):
                self.request.sendall(data[:1])  # in two parts, as Ray's servers answer
                time.sleep(0.002)
                self.request.sendall(data[1:])


@contextlib.contextmanager
def echo_server() -> Iterator[int]:
    """A TCP server that sends back what it gets; yields its port."""
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), _Echo) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        yield server.server_address[1]
        server.shutdown()
        thread.join()


def need(program: str) -> None:
    """Skip the test where a program is missing."""
    if shutil.which(program) is None:
        pytest.skip(f"there is no {program} on this machine")
