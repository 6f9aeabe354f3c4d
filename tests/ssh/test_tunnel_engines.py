"""All engines of RayTunnels by the same tests, against a real sshd; what one cannot do is in its limits."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import signal
import socket
import statistics
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.ssh.test_tunnels import Traces, ask, connections_to, is_free
from tests.ssh_fixtures import SshServer, echo_server, eventually, free_port, make_key, system_sshd
from yellowdog_ray.errors import HostKeyError, SpecError, SSHLoginError, TunnelError
from yellowdog_ray.utils._ssh.hostkeys import HostKey
from yellowdog_ray.utils._ssh.transport import Packetizer
from yellowdog_ray.utils._tunnels import openssh, ports, with_sshtunnel
from yellowdog_ray.utils._tunnels.engines import Forward
from yellowdog_ray.utils.ray_ssh_tunnels import RayTunnels, SSHTunnelSpec

pytestmark = pytest.mark.sshd

VARIANTS: dict[str, dict[str, Any]] = {
    "paramiko": {},
    "isolated": {"isolate": True},
    "sshtunnel": {"engine": "sshtunnel"},
    "openssh": {"engine": "openssh"},
}


def able(*capabilities: str) -> list[str]:
    """The variants whose engine can do this."""
    limits = RayTunnels.limits()
    assert set(capabilities) <= {name for those in limits.values() for name in those}, "no such limit"
    return [
        name
        for name, options in VARIANTS.items()
        if not set(capabilities) & set(limits[options.get("engine", "paramiko")])
    ]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SshServer]:
    """An sshd that no test stops."""
    with system_sshd(tmp_path_factory.mktemp("sshd")) as server:
        yield server


@pytest.fixture(autouse=True)
def no_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home without keys and known hosts, and no SSH agent."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    (tmp_path / "home" / ".ssh").mkdir(parents=True)
    return tmp_path / "home"


def tunnels_to(server: SshServer, variant: str, *ports: int, **changes: Any) -> RayTunnels:
    options: dict[str, Any] = {
        "private_key_file": server.key,
        "ssh_port": server.port,
        "local_port": "auto",
        **VARIANTS[variant],
        **changes,
    }
    specs = [SSHTunnelSpec("localhost", 1 + number, "127.0.0.1", port) for number, port in enumerate(ports)]
    return RayTunnels(changes.pop("host", "127.0.0.1"), server.user, ray_tunnel_specs=specs, **options)


def children() -> set[int]:
    """The processes that this one has started."""
    found = set()
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):
            found |= {int(pid) for pid in (task / "children").read_text().split()}
    return found


@contextlib.contextmanager
def handling(handler: Callable[[socket.socket], None]) -> Iterator[int]:
    """A TCP server that gives each connection to a function; yields its port."""
    with socket.create_server(("127.0.0.1", 0), backlog=512) as listener:

        def run(sock: socket.socket) -> None:
            with sock, contextlib.suppress(OSError):
                handler(sock)

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    sock, _ = listener.accept()
                    threading.Thread(target=run, args=(sock,), daemon=True).start()

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_life(server: SshServer, variant: str) -> None:
    """Ports are forwarded over one connection, and after the end nothing of it is left; twice over."""
    with echo_server() as first, echo_server() as second:
        tunnels = tunnels_to(server, variant, first, second)
        with tunnels:  # the first one may load modules
            assert ask(tunnels.ports[first]) == b"hello"
        assert eventually(lambda: connections_to(server.port) == 0)
        threads, before = threading.active_count(), Traces()
        processes = children()
        for _ in range(2):
            tunnels.start_tunnels()
            assert (tunnels.is_active, tunnels.status().state) == (True, "up")
            # The one that has looked at the server first may still be going.
            assert eventually(lambda: connections_to(server.port) == 1)
            data = os.urandom(2 << 20)
            with socket.create_connection(("127.0.0.1", tunnels.ports[first]), timeout=20) as client:
                sender = threading.Thread(target=client.sendall, args=(data,))
                sender.start()
                digest, left = hashlib.sha256(), len(data)
                while left and (got := client.recv(65536)):
                    digest.update(got)
                    left -= len(got)
                sender.join()
            assert digest.digest() == hashlib.sha256(data).digest()
            assert ask(tunnels.ports[second]) == b"hello"
            ports = list(tunnels.ports.values())
            open_client = socket.create_connection(("127.0.0.1", ports[0]), timeout=5)
            assert ask(ports[1]) == b"hello"
            began = time.monotonic()
            tunnels.stop_tunnels(ignore_errors=False)
            assert time.monotonic() - began < 2
            tunnels.stop_tunnels(ignore_errors=False)
            open_client.close()
            assert tunnels.status().state == "stopped"
            assert all(is_free(port) for port in ports)
        assert eventually(before.gone), (threads, threading.enumerate())
        assert eventually(lambda: children() <= processes)
        assert eventually(lambda: connections_to(server.port) == 0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_failed_starts(
    server: SshServer, variant: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A start that fails says why, by its type too, and leaves no port, thread or process."""
    make_key(tmp_path / "other")
    with tunnels_to(server, variant, 1):  # loads modules, and records the server's key
        pass
    other_host = (tmp_path / "other.pub").read_text()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = int(taken.getsockname()[1])
        free = free_port()
        specs = [
            SSHTunnelSpec("localhost", free, "localhost", 1),
            SSHTunnelSpec("localhost", port, "localhost", 2),
        ]
        cases: list[tuple[type[Exception], str, dict[str, Any]]] = [
            (SSHLoginError, "does not let user", {"private_key_file": tmp_path / "other"}),
            (TunnelError, "Cannot read the private key", {"private_key_file": tmp_path / "missing"}),
            (HostKeyError, "is not the server that was expected", {"host_key": other_host}),
            (HostKeyError, "not known", {"strict_host_key": True, "known_hosts": tmp_path / "none"}),
            (TunnelError, f":{free}", {"ssh_port": free}),
        ]
        processes, before = children(), Traces()
        for kind, said, changes in cases:
            tunnels = tunnels_to(server, variant, 1, local_port=free_port(), **changes)
            with pytest.raises(kind, match=said):
                tunnels.start_tunnels()
            assert all(is_free(local) for local in tunnels.ports.values())
        tunnels = RayTunnels(
            "127.0.0.1",
            server.user,
            private_key_file=server.key,
            ssh_port=server.port,
            ray_tunnel_specs=specs,
            **VARIANTS[variant],
        )
        with pytest.raises(TunnelError, match=rf"local port {port} .for 2 .* by process {os.getpid()} \("):
            tunnels.start_tunnels()
        assert is_free(free)
        assert eventually(before.gone), threading.enumerate()
        assert eventually(lambda: children() <= processes)
        assert capfd.readouterr().err == ""


@pytest.mark.parametrize("variant", VARIANTS)
def test_stopping_while_starting(server: SshServer, variant: str) -> None:
    """A start that hangs ends when the tunnels are stopped, which takes no longer than usual."""
    threads, processes = set(threading.enumerate()), children()
    said: list[str] = []
    with socket.create_server(("127.0.0.1", 0)) as silent:
        tunnels = tunnels_to(server, variant, 1, ssh_port=silent.getsockname()[1])

        def start() -> None:
            with pytest.raises(TunnelError) as caught:
                tunnels.start_tunnels()
            said.append(str(caught.value))

        starter = threading.Thread(target=start)
        starter.start()
        time.sleep(1)
        began = time.monotonic()
        tunnels.stop_tunnels(ignore_errors=False)
        starter.join(3)
        assert not starter.is_alive()
        assert time.monotonic() - began < 2
    assert len(said) == 1
    assert tunnels.status().state == "stopped"
    assert eventually(lambda: set(threading.enumerate()) <= threads)
    assert eventually(lambda: children() <= processes)


@pytest.mark.parametrize("variant", VARIANTS)
def test_host_keys(
    server: SshServer, variant: str, tmp_path: Path, no_settings: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A new server's key is recorded once, for its owner alone; another one is refused after that."""
    record = tmp_path / "states" / "known_hosts"
    with echo_server() as echo:
        for _ in range(2):
            with tunnels_to(server, variant, echo, known_hosts=record) as tunnels:
                assert ask(tunnels.ports[echo]) == b"hello"
        assert sum("was not known" in entry.message for entry in caplog.records) == 1
        assert record.stat().st_mode & 0o777 == 0o600
        (line,) = record.read_text().splitlines()
        assert line.split()[0] == f"[127.0.0.1]:{server.port}"
        assert list((no_settings / ".ssh").iterdir()) == []

        known = (line.split(maxsplit=1)[1]).split()[:2]
        assert HostKey.parse(" ".join(known)).blob
        with tunnels_to(server, variant, echo, known_hosts=record, strict_host_key=True) as tunnels:
            assert ask(tunnels.ports[echo]) == b"hello"
        make_key(tmp_path / "other", known[0])
        record.write_text(f"[127.0.0.1]:{server.port} {(tmp_path / 'other.pub').read_text()}")
        with pytest.raises(HostKeyError, match="has changed"):
            tunnels_to(server, variant, echo, known_hosts=record).start_tunnels()

        # The user's own known_hosts counts too, and then nothing is recorded.
        (no_settings / ".ssh" / "known_hosts").write_text(f"{line}\n")
        if variant == "openssh":
            return  # ssh looks for the user's files where the system says that the home is
        record.unlink()
        with tunnels_to(server, variant, echo, known_hosts=record) as tunnels:
            assert ask(tunnels.ports[echo]) == b"hello"
        assert not record.exists()


@contextlib.contextmanager
def password_server() -> Iterator[int]:
    """An SSH server that wants the password of user ``ray``; yields its port."""
    import asyncio

    import asyncssh

    class Server(asyncssh.SSHServer):
        def begin_auth(self, username: str) -> bool:
            return True

        def password_auth_supported(self) -> bool:
            return True

        def validate_password(self, username: str, password: str) -> bool:
            return (username, password) == ("ray", "s3cret")

        def connection_requested(self, *_: Any) -> bool:
            return True

    loop = asyncio.new_event_loop()
    key = asyncssh.generate_private_key("ssh-ed25519")
    listening = asyncssh.listen("127.0.0.1", 0, server_host_keys=[key], server_factory=Server)
    acceptor = loop.run_until_complete(listening)
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield acceptor.get_port()
    finally:
        asyncio.run_coroutine_threadsafe(_close(acceptor), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def _close(acceptor: Any) -> None:
    acceptor.close()
    await acceptor.wait_closed()


@pytest.mark.parametrize("variant", able("password"))
def test_password(variant: str, tmp_path: Path) -> None:
    """A password opens, after a key that does not; a wrong one is refused and not repeated."""
    with echo_server() as echo, password_server() as port:
        for password, key in (("s3cret", None), ("s3cret", tmp_path / "key"), ("wr0ng", None)):
            if key is not None:
                make_key(key)
            tunnels = RayTunnels(
                "127.0.0.1",
                "ray",
                password,
                key,
                ssh_port=port,
                ray_tunnel_specs=[SSHTunnelSpec("localhost", 1, "127.0.0.1", echo)],
                local_port="auto",
                **VARIANTS[variant],
            )
            if password == "wr0ng":
                with pytest.raises(SSHLoginError, match="with the password") as caught:
                    tunnels.start_tunnels()
                assert password not in str(caught.value)
            else:
                with tunnels:
                    assert ask(tunnels.ports[echo]) == b"hello"


@pytest.mark.parametrize("variant", able("fingerprint"))
def test_pinned_fingerprint(server: SshServer, variant: str) -> None:
    """A server can be pinned to the hash of its key."""
    fingerprint = HostKey.parse(server.host_key).fingerprint
    with echo_server() as echo:
        # sshd has several keys: any of them may be the one that is shown.
        ecdsa = HostKey.parse((server.directory / "host_ecdsa.pub").read_text()).fingerprint
        worked = 0
        for pin in (fingerprint, ecdsa):
            with (
                contextlib.suppress(HostKeyError),
                tunnels_to(server, variant, echo, host_key=pin) as tunnels,
            ):
                assert ask(tunnels.ports[echo]) == b"hello"
                worked += 1
        assert worked >= 1
        with pytest.raises(HostKeyError, match="expected was SHA256:AAAA"):
            tunnels_to(server, variant, echo, host_key="SHA256:" + "A" * 43).start_tunnels()


@pytest.mark.parametrize("variant", able("quick"))
def test_answers_in_two_parts(server: SshServer, variant: str) -> None:
    """An answer in two small writes comes at once, not after the 40 ms of a delayed acknowledgement."""
    with echo_server() as echo, tunnels_to(server, variant, echo) as tunnels:
        times = []
        with socket.create_connection(("127.0.0.1", tunnels.ports[echo]), timeout=5) as sock:
            time.sleep(0.3)  # for what has to be done once after connecting
            for _ in range(31):
                start = time.perf_counter()
                sock.sendall(b"xy")
                assert len(sock.recv(1) + sock.recv(1)) == 2
                times.append(time.perf_counter() - start)
        assert statistics.median(times) < 0.025


@pytest.mark.parametrize("variant", able("burst"))
def test_many_at_once(server: SshServer, variant: str) -> None:
    """Two hundred connections at once are all answered."""
    answers: list[bytes] = []

    def handler(sock: socket.socket) -> None:
        sock.sendall(sock.recv(10))

    with handling(handler) as port, tunnels_to(server, variant, port) as tunnels:

        def client() -> None:
            with contextlib.suppress(OSError):
                answers.append(ask(tunnels.ports[port]))

        threads = [threading.Thread(target=client) for _ in range(200)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
    assert answers == [b"hello"] * 200


@pytest.mark.parametrize("variant", able("duplex", "half-close"))
def test_both_directions(server: SshServer, variant: str) -> None:
    """Both ends may send more than buffers hold before they read; one that has sent all still receives."""
    size = 24 << 20

    def handler(sock: socket.socket) -> None:
        sender = threading.Thread(target=sock.sendall, args=(bytes(size),))
        sender.start()
        got = 0
        while data := sock.recv(1 << 20):
            got += len(data)
            time.sleep(0.001)
        sender.join()
        sock.sendall(str(got).encode())

    with handling(handler) as port, tunnels_to(server, variant, port) as tunnels:
        with socket.create_connection(("127.0.0.1", tunnels.ports[port]), timeout=30) as client:

            def send() -> None:
                client.sendall(bytes(size))
                client.shutdown(socket.SHUT_WR)

            sender = threading.Thread(target=send)
            sender.start()
            sender.join(0.3)
            answer = bytearray()
            while data := client.recv(1 << 20):
                answer += data
            sender.join()
        assert bytes(answer[size:]) == str(size).encode()


def test_uploads_that_the_other_side_ends(server: SshServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """They end with an error for the client, soon, and do no harm, also while keys are exchanged again."""
    monkeypatch.setattr(Packetizer, "REKEY_BYTES", 1 << 20)

    def handler(sock: socket.socket) -> None:
        got = 0
        while got < 300_000 and (data := sock.recv(65536)):
            got += len(data)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    with (
        handling(handler) as port,
        echo_server() as echo,
        tunnels_to(server, "paramiko", port, echo) as tunnels,
    ):
        outcomes: list[str] = []

        def push() -> None:
            with socket.create_connection(("127.0.0.1", tunnels.ports[port]), timeout=8) as client:
                try:
                    while True:
                        client.sendall(bytes(65536))
                except TimeoutError:
                    outcomes.append("hung")
                except OSError:
                    outcomes.append("ended")

        with socket.create_connection(("127.0.0.1", tunnels.ports[echo]), timeout=5) as quiet:
            for _ in range(3):
                threads = [threading.Thread(target=push) for _ in range(4)]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
                quiet.sendall(b"hello")
                assert quiet.recv(1) + quiet.recv(4) == b"hello"
        assert outcomes == ["ended"] * 12
        assert (tunnels.status().state, tunnels.status().reconnects) == ("up", 0)
        assert eventually(lambda: tunnels.status().connections == 0)
    assert "nonexistent channel" not in (server.directory / "log").read_text()


def test_an_answer_during_an_upload(server: SshServer) -> None:
    """A client that is told to stop uploading can read that."""

    def handler(sock: socket.socket) -> None:
        sock.recv(10)
        sock.sendall(b"too large")
        sock.shutdown(socket.SHUT_WR)
        time.sleep(0.3)

    with (
        handling(handler) as port,
        tunnels_to(server, "paramiko", port) as tunnels,
        socket.create_connection(("127.0.0.1", tunnels.ports[port]), timeout=10) as client,
    ):
        for _ in range(20):
            client.sendall(bytes(100_000))
            time.sleep(0.03)
        assert client.recv(100) == b"too large"


def test_stopping_while_clients_upload_to_a_silent_server(server: SshServer) -> None:
    """What does not get away over a connection that is stuck does not hold up the end."""

    def swallow(sock: socket.socket) -> None:
        while sock.recv(1 << 20):
            pass

    with handling(swallow) as sink, socket.create_server(("127.0.0.1", 0)) as way:
        # Between the tunnels and their server: it stops to carry anything, and holds little.
        way.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        halted = threading.Event()

        def carry(source: socket.socket, target: socket.socket) -> None:
            with contextlib.suppress(OSError):
                while not halted.is_set() and (data := source.recv(65536)):
                    target.sendall(data)

        changes = {"ssh_port": way.getsockname()[1], "host_key": server.host_key}
        tunnels = tunnels_to(server, "paramiko", sink, **changes)
        ends: list[socket.socket] = []

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    near, _ = way.accept()
                    far = socket.create_connection(("127.0.0.1", server.port))
                    ends.extend((near, far))
                    for pair in ((near, far), (far, near)):
                        threading.Thread(target=carry, args=pair, daemon=True).start()

        acceptor = threading.Thread(target=accept, daemon=True)
        acceptor.start()
        tunnels.start_tunnels()

        def push() -> None:
            with socket.create_connection(("127.0.0.1", port)) as client, contextlib.suppress(OSError):
                while True:
                    client.sendall(bytes(65536))

        port = tunnels.ports[sink]
        clients = [threading.Thread(target=push, daemon=True) for _ in range(5)]
        for client in clients:
            client.start()
        time.sleep(0.3)
        halted.set()
        time.sleep(1.5)
        began = time.monotonic()
        tunnels.stop_tunnels(ignore_errors=False)
        assert time.monotonic() - began < 1.5
        assert is_free(port)
        for client in clients:
            client.join(5)
        assert not any(client.is_alive() for client in clients)
        way.shutdown(socket.SHUT_RDWR)
        acceptor.join(5)
        for end in ends:
            end.close()


def test_stopping_after_a_fork(server: SshServer) -> None:
    """A child that has all the same sockets does not keep the port or the connection."""
    before = connections_to(server.port)
    with echo_server() as echo:
        tunnels = tunnels_to(server, "paramiko", echo)
        tunnels.start_tunnels()
        port = tunnels.ports[echo]
        with socket.create_connection(("127.0.0.1", port), timeout=5) as client:
            client.sendall(b"x")
            assert client.recv(1) == b"x"
            child = os.fork()
            if not child:
                time.sleep(30)
                os._exit(0)
            try:
                began = time.monotonic()
                tunnels.stop_tunnels(ignore_errors=False)
                assert time.monotonic() - began < 1
                assert client.recv(1) == b""
                with pytest.raises(ConnectionRefusedError):
                    socket.create_connection(("127.0.0.1", port), timeout=5)
                socket.create_server(("127.0.0.1", port)).close()
                assert eventually(lambda: connections_to(server.port) <= before)
            finally:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)


@pytest.mark.parametrize("variant", ["paramiko", "isolated"])
def test_a_server_that_forbids_forwarding(
    tmp_path: Path, variant: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It is named as the reason: in the status, once in the log, and when Ray is waited for."""
    with system_sshd(tmp_path) as server, echo_server() as echo:
        with (server.directory / "authorized_keys").open("w") as file:
            file.write(f"restrict {(server.directory / 'user.pub').read_text()}")
        with tunnels_to(server, variant, echo) as tunnels:
            for _ in range(2):
                with contextlib.suppress(ConnectionError):
                    assert ask(tunnels.ports[echo]) == b""
            assert eventually(lambda: f"forbids connections to 127.0.0.1:{echo}" in str(tunnels.status()))
            assert tunnels.is_active
            said = [
                one.message
                for one in caplog.records
                if f"forbids connections to 127.0.0.1:{echo}" in one.message
            ]
            assert len(said) == 1
            began = time.monotonic()
            with pytest.raises(TunnelError, match="forbids connections to port 52365"):
                tunnels.wait_for_ray(20)
            assert time.monotonic() - began < 3


def test_a_malformed_answer_while_reconnecting(tmp_path: Path) -> None:
    """Whatever answers at the server's address meanwhile, the connection is made again in the end."""
    with echo_server() as echo:
        with system_sshd(tmp_path) as server:
            tunnels = tunnels_to(server, "paramiko", echo)
            tunnels.start_tunnels()
            assert ask(tunnels.ports[echo]) == b"hello"
            end_with_connections(server)
        asked = threading.Event()
        with tunnels, socket.create_server(("127.0.0.1", server.port)) as listener:
            payload = b"\x14" + bytes(16) + (b"\x00\x00\x00\x04\xff\xfe\xfd\xfc" * 10) + bytes(5)
            pad = 8 - (len(payload) + 5) % 8 + 8
            packet = (len(payload) + 1 + pad).to_bytes(4, "big") + bytes([pad]) + payload + bytes(pad)

            def answer() -> None:
                with contextlib.suppress(OSError):
                    while True:
                        sock, _ = listener.accept()
                        sock.sendall(b"SSH-2.0-strange\r\n" + packet)
                        time.sleep(0.3)
                        sock.close()
                        asked.set()

            thread = threading.Thread(target=answer, daemon=True)
            thread.start()
            assert asked.wait(10)
            listener.shutdown(socket.SHUT_RDWR)
            thread.join(5)
            listener.close()
            with system_sshd(tmp_path, port=server.port):
                assert eventually(lambda: tunnels.is_active, 15)
                assert ask(tunnels.ports[echo]) == b"hello"


def _children_of(pid: int) -> list[int]:
    found: list[int] = []
    with contextlib.suppress(OSError):  # it has just ended
        found += map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
    return found + [below for child in found for below in _children_of(child)]


@pytest.mark.parametrize("variant", able("prompt-end"))
def test_a_client_that_does_not_read(server: SshServer, variant: str) -> None:
    """A client that sends and never reads cannot hold up the end."""
    with (
        echo_server() as echo,
        tunnels_to(server, variant, echo) as tunnels,
        socket.create_connection(("127.0.0.1", tunnels.ports[echo])) as client,
    ):
        client.settimeout(0.3)
        with pytest.raises(TimeoutError):
            client.sendall(bytes(128 << 20))
        began = time.monotonic()
        tunnels.stop_tunnels(ignore_errors=False)
        assert time.monotonic() - began < 2


@pytest.mark.parametrize("variant", VARIANTS)
def test_remote_port_not_open_yet(server: SshServer, variant: str, capfd: pytest.CaptureFixture[str]) -> None:
    """While nothing listens on the head, clients see an end and nobody a word."""
    port = free_port()
    with tunnels_to(server, variant, port) as tunnels:
        with contextlib.suppress(ConnectionError):
            assert ask(tunnels.ports[port]) == b""
        assert tunnels.is_active
    assert capfd.readouterr().err == ""


def end_with_connections(server: SshServer) -> None:
    """Kill an sshd and the processes of its connections."""
    for pid in (server.process.pid, *_children_of(server.process.pid)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    server.process.wait()


@pytest.mark.parametrize("variant", able("reconnect"))
def test_a_killed_and_restarted_server(variant: str, tmp_path: Path) -> None:
    """Tunnels come back on the same port by themselves; where the engine can, new clients wait for it."""
    with echo_server() as echo, contextlib.ExitStack() as stack:
        server = stack.enter_context(system_sshd(tmp_path))
        with tunnels_to(server, variant, echo) as tunnels:
            port = tunnels.ports[echo]
            old = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=10))
            old.sendall(b"x")
            assert old.recv(1) == b"x"
            end_with_connections(server)
            with contextlib.suppress(ConnectionResetError):
                assert old.recv(1) == b""
            assert eventually(lambda: tunnels.status().state == "down")
            assert tunnels.status().last_error
            held: list[bytes] = []
            client = threading.Thread(target=lambda: held.append(ask(port, timeout=30)))
            if variant in able("hold"):
                client.start()
                time.sleep(0.5)
                assert client.is_alive()
            stack.enter_context(system_sshd(tmp_path, port=server.port))
            assert eventually(lambda: tunnels.is_active, 15)
            assert tunnels.status().reconnects == 1
            if variant in able("hold"):
                client.join(20)
                assert held == [b"hello"]
            assert ask(port) == b"hello"


@pytest.mark.parametrize("engine", ["openssh", "sshtunnel"])
def test_a_port_that_is_taken_before_the_engine_has_it(
    server: SshServer, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where somebody else takes 127.0.0.1 of a port in between, there are no tunnels, not at ::1 either."""
    module: Any = {"openssh": openssh, "sshtunnel": with_sshtunnel}[engine]
    with echo_server() as echo, contextlib.ExitStack() as stack:

        def choose(forwards: Any) -> list[tuple[str, int]]:
            ends = real(forwards)
            stack.enter_context(socket.create_server(("127.0.0.1", ends[0][1])))
            return ends

        real = module.free_ends
        monkeypatch.setattr(module, "free_ends", choose)
        tunnels = tunnels_to(server, engine, echo)
        with pytest.raises(TunnelError, match=r"Address already in use|sshtunnel opened the ports"):
            tunnels.start_tunnels()
        assert not tunnels.is_active


def test_a_port_that_is_taken_while_ssh_is_down(tmp_path: Path) -> None:
    """They are not said to be up while somebody else has a port of theirs; once it is free, they are."""
    with echo_server() as echo, contextlib.ExitStack() as stack:
        server = stack.enter_context(system_sshd(tmp_path))
        with tunnels_to(server, "openssh", echo) as tunnels:
            port = tunnels.ports[echo]
            end_with_connections(server)
            assert eventually(lambda: tunnels.status().state == "down" and is_free(port), 15)
            assert "closed by remote host" in str(tunnels.status().last_error)
            with socket.create_server(("127.0.0.1", port)):
                stack.enter_context(system_sshd(tmp_path, port=server.port))
                assert eventually(lambda: "already in use" in str(tunnels.status().last_error), 15)
                assert tunnels.status().state == "down"
            assert eventually(lambda: tunnels.is_active, 15)
            assert ask(port) == b"hello"


def test_whose_port_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """A port belongs to who listens at its address or at all of them; not to who does at another one."""
    wildcard = "0.0.0.0"
    for there, here, owned in (
        ("127.0.0.1", "localhost", True),
        (wildcard, "127.0.0.1", True),
        ("127.0.0.1", wildcard, True),
        ("127.0.0.5", "localhost", False),
        *([("::1", "::1", True), ("::1", "127.0.0.1", False), ("::", "::1", True)] if _has_ipv6() else ()),
    ):
        family = socket.AF_INET6 if ":" in there else socket.AF_INET
        with socket.create_server((there, 0), family=family) as taken:
            port = int(taken.getsockname()[1])
            named = f"process {os.getpid()} (" in ports._owner(Forward(here, port, "localhost", 1))
            assert (named, ports.is_held(here, port)) == (owned, owned), (there, here)
            if owned:
                with monkeypatch.context() as patch:
                    patch.setattr(os, "geteuid", lambda: 4711)
                    assert not ports.is_held(here, port)


def test_ssh_that_cannot_be_started(server: SshServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error is one of tunnels, with the system's reason."""

    def start(command: list[str]) -> openssh._Run:
        raise BlockingIOError(errno.EAGAIN, "no more processes")

    monkeypatch.setattr(openssh, "_Run", start)
    with pytest.raises(TunnelError, match="ssh could not be started: no more processes"):
        tunnels_to(server, "openssh", 1).start_tunnels()


def test_ssh_that_cannot_be_started_again(
    server: SshServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is tried again, whatever the reason, and the reason is told."""
    with echo_server() as echo, tunnels_to(server, "openssh", echo) as tunnels:
        failed: list[int] = []

        def start(command: list[str]) -> openssh._Run:
            if not failed:
                failed.append(1)
                raise BlockingIOError("no more processes")
            return run(command)

        run, before = openssh._Run, tunnels._engine._run  # type: ignore[union-attr]
        monkeypatch.setattr(openssh, "_Run", start)
        before.process.kill()
        assert eventually(lambda: tunnels.status().reconnects == 1, 15)
        assert failed
        assert "could not be made again: BlockingIOError('no more processes')" in caplog.text
        assert ask(tunnels.ports[echo]) == b"hello"


@pytest.mark.parametrize("variant", able("reconnect"))
def test_a_server_that_comes_back_with_another_key(
    variant: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A server that has another key after it was lost is refused for good, and clients are turned away."""
    with echo_server() as echo, contextlib.ExitStack() as stack:
        server = stack.enter_context(system_sshd(tmp_path))
        with tunnels_to(server, variant, echo) as tunnels:
            end_with_connections(server)
            for kind in ("ed25519", "ecdsa"):
                (tmp_path / f"host_{kind}").unlink()
            stack.enter_context(system_sshd(tmp_path, port=server.port))
            assert eventually(lambda: tunnels.status().state == "refused", 15)
            assert "has changed" in str(tunnels.status().last_error)
            assert not tunnels.is_active
            with contextlib.suppress(ConnectionError):
                assert ask(tunnels.ports[echo]) == b""


def test_half_open_connections(tmp_path: Path) -> None:
    """A server that answers nothing any more is noticed within 15 seconds."""
    with echo_server() as echo, contextlib.ExitStack() as stack:
        server = stack.enter_context(system_sshd(tmp_path))
        variants = able("half-open")
        assert {"paramiko", "isolated", "openssh"} <= set(variants)
        all_tunnels = [stack.enter_context(tunnels_to(server, variant, echo)) for variant in variants]
        stopped = _children_of(server.process.pid)
        for pid in stopped:
            os.kill(pid, signal.SIGSTOP)
        stack.callback(lambda: [os.kill(pid, signal.SIGKILL) for pid in stopped])
        began = time.monotonic()
        noticed: dict[str, float] = {}
        while len(noticed) < len(variants) and time.monotonic() - began < 20:
            for variant, tunnels in zip(variants, all_tunnels, strict=True):
                if variant not in noticed and tunnels.status().last_error:
                    noticed[variant] = time.monotonic() - began
            time.sleep(0.05)
        assert set(noticed) == set(variants)
        assert max(noticed.values()) < 15.5, noticed
        assert all("silent for 14 s" in str(tunnels.status().last_error) for tunnels in all_tunnels)
        for tunnels in all_tunnels:
            assert eventually(lambda tunnels=tunnels: tunnels.is_active, 10)
            assert ask(tunnels.ports[echo]) == b"hello"


@pytest.mark.parametrize("variant", able("jump"))
@pytest.mark.parametrize("told", ["argument", "settings", "command"])
def test_bastion(server: SshServer, variant: str, told: str, tmp_path: Path, no_settings: Path) -> None:
    """The way may lead through a bastion, by argument or by the user's settings."""
    directory = tmp_path / "bastion"
    directory.mkdir()
    for name in ("user", "user.pub"):
        (directory / name).write_bytes((server.directory / name).read_bytes())
        (directory / name).chmod(0o600)
    with echo_server() as echo, system_sshd(directory) as bastion:
        config = no_settings / ".ssh" / "config"
        known = no_settings / ".ssh" / "known"
        known.write_text(f"[127.0.0.1]:{bastion.port} {bastion.host_key}\n")
        lines = [
            f"Host 127.0.0.1\n  IdentityFile {bastion.key}\n  UserKnownHostsFile {known}\n",
            f"Host my-bastion\n  HostName 127.0.0.1\n  Port {bastion.port}\n  User {bastion.user}\n"
            f"  IdentityFile {bastion.key}\n  UserKnownHostsFile {known}\n",
        ]
        changes: dict[str, Any] = {"jump": f"{bastion.user}@127.0.0.1:{bastion.port}"}
        host = "127.0.0.1"
        if told == "settings":
            lines.append(
                f"Host my-head\n  HostName 127.0.0.1\n  Port {server.port}\n  ProxyJump my-bastion\n"
                f"  IdentityFile {server.key}\n"
            )
            changes, host = {"private_key_file": None, "ssh_port": None}, "my-head"
        if told == "command":
            lines.append(
                f"Host my-head\n  HostName 127.0.0.1\n  ProxyCommand ssh -F none -i {bastion.key}"
                f" -p {bastion.port} -o UserKnownHostsFile={known} -o BatchMode=yes"
                f" -W %h:%p {bastion.user}@127.0.0.1\n"
            )
            changes, host = {}, "my-head"
        config.write_text("\n".join(lines))
        tunnels = RayTunnels(
            host,
            server.user,
            ray_tunnel_specs=[SSHTunnelSpec("localhost", 1, "127.0.0.1", echo)],
            local_port="auto",
            ssh_config=config,
            **{**VARIANTS[variant], "private_key_file": server.key, "ssh_port": server.port, **changes},
        )
        with tunnels:
            assert connections_to(bastion.port) == 1
            assert ask(tunnels.ports[echo]) == b"hello"
        assert eventually(lambda: connections_to(bastion.port) == 0)


_LASTING_PROXY = """
import os, signal, socket, sys, threading, time
signal.signal(signal.SIGPIPE, signal.SIG_IGN)
if sys.argv[3] == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
found = [name for name in os.environ if name.startswith(("RAY_", "YD_"))]
open(sys.argv[1], "w").write(f"{os.getpid()} {found}")
server = socket.create_connection(("127.0.0.1", int(sys.argv[2])))
def up():
    while data := os.read(0, 65536):
        server.sendall(data)
threading.Thread(target=up, daemon=True).start()
try:
    while data := server.recv(65536):
        os.write(1, data)
except OSError:
    pass
time.sleep(100)
"""


@pytest.mark.parametrize("variant", able("jump"))
def test_a_command_on_the_way_that_does_not_end_by_itself(
    server: SshServer, variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is ended with the tunnels, and with a start that is given up; it gets no token and no key."""
    monkeypatch.setenv("RAY_AUTH_TOKEN", "token-2")
    monkeypatch.setenv("YD_API_KEY_SECRET", "secret-3")
    config, noted = tmp_path / "config", tmp_path / "noted"
    (tmp_path / "proxy.py").write_text(_LASTING_PROXY)

    def ended(pid: int) -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
        except OSError:
            return True

    with echo_server() as echo:
        for kind in ("usual", "deaf"):
            proxy = f"{sys.executable} {tmp_path / 'proxy.py'} {noted} {server.port} {kind}"
            config.write_text(f"Host *\n  ProxyCommand {proxy}\n")
            before = Traces()
            tunnels = tunnels_to(server, variant, echo, ssh_config=config, host_key=server.host_key)
            with tunnels:
                assert ask(tunnels.ports[echo]) == b"hello"
                pid, _, variables = noted.read_text().partition(" ")
                assert variables == "[]"
                assert os.getpgid(int(pid)) != os.getpgid(0)
                tunnels.stop_tunnels(ignore_errors=False)
            assert eventually(lambda pid=pid: ended(int(pid)), 3)
            assert eventually(before.gone), threading.enumerate()

    config.write_text(f"Host *\n  ProxyCommand sh -c 'echo $$ > {noted}; exec sleep 300'\n")
    noted.write_text("")
    before = Traces()
    tunnels = tunnels_to(server, variant, echo, ssh_config=config, host_key=server.host_key)

    def start() -> None:
        with pytest.raises(TunnelError):
            tunnels.start_tunnels()

    starter = threading.Thread(target=start)
    starter.start()
    assert eventually(lambda: noted.read_text().strip())
    tunnels.stop_tunnels(ignore_errors=False)
    starter.join(5)
    assert eventually(lambda: ended(int(noted.read_text())), 3)
    assert eventually(before.gone), threading.enumerate()


def test_settings_that_sshtunnel_cannot_follow(server: SshServer, no_settings: Path) -> None:
    """A bastion that the user's settings name is not passed by silently."""
    (no_settings / ".ssh" / "config").write_text("Host *\n  ProxyJump bastion.invalid\n")
    with pytest.raises(TunnelError, match="sshtunnel cannot be given the connection to a bastion"):
        tunnels_to(server, "sshtunnel", 1).start_tunnels()


def _has_ipv6() -> bool:
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET6) as sock:
        sock.bind(("::1", 0))
        return True
    return False


if _has_ipv6():

    @pytest.mark.parametrize("variant", VARIANTS)
    def test_ipv6(variant: str, tmp_path: Path) -> None:
        """The head may have an IPv6 address, and so may the local end."""
        local = "::1" if variant in able("local-ipv6") else "127.0.0.1"
        with echo_server() as echo, system_sshd(tmp_path, address="::1") as server:
            tunnels = RayTunnels(
                "::1",
                server.user,
                private_key_file=server.key,
                ssh_port=server.port,
                ray_tunnel_specs=[SSHTunnelSpec(local, 1, "127.0.0.1", echo)],
                local_port="auto",
                **VARIANTS[variant],
            )
            with tunnels, socket.create_connection((local, tunnels.ports[echo]), timeout=5) as client:
                client.sendall(b"x")
                assert client.recv(1) == b"x"


def test_the_helper_process_shows_no_secret(
    server: SshServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither its command line nor its environment has a password or a token, and it ends with its parent."""
    make_key(tmp_path / "encrypted", passphrase="pass-phrase-1")
    with (server.directory / "authorized_keys").open("a") as file:
        file.write((tmp_path / "encrypted.pub").read_text() + "\n")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "token-2")
    monkeypatch.setenv("YD_API_KEY_SECRET", "secret-3")
    before = children()
    with echo_server() as echo:
        tunnels = tunnels_to(
            server,
            "isolated",
            echo,
            private_key_file=tmp_path / "encrypted",
            private_key_password="pass-phrase-1",
            password="pass-word-4",
        )
        with tunnels:
            (helper,) = children() - before
            assert ask(tunnels.ports[echo]) == b"hello"
            shown = (
                Path(f"/proc/{helper}/cmdline").read_bytes() + Path(f"/proc/{helper}/environ").read_bytes()
            )
            for secret in (b"pass-phrase", b"token-2", b"secret-3", b"pass-word"):
                assert secret not in shown
            os.kill(helper, signal.SIGKILL)
            assert eventually(lambda: not tunnels.is_active)
            assert "helper process has ended" in str(tunnels.status().last_error)
            tunnels.start_tunnels()
            assert ask(tunnels.ports[echo]) == b"hello"

    # Where the parent has a child that holds the helper's input open, and a json.py lies about.
    (tmp_path / "json.py").write_text("open('imported', 'w'); raise SystemExit")
    code = (
        "import os, sys, time; from yellowdog_ray.utils.ray_ssh_tunnels import *\n"
        f"t = RayTunnels('127.0.0.1', {server.user!r}, private_key_file={str(server.key)!r}, "
        f"ssh_port={server.port}, local_port='auto', isolate=True)\n"
        f"os.chdir({str(tmp_path)!r}); t.start_tunnels(); child = os.fork() or time.sleep(60)\n"
        "print(t.ports[8265], child, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    port, child = map(int, parent.stdout.readline().split())
    assert not is_free(port)
    parent.kill()
    parent.wait()
    parent.stdout.close()

    def ended() -> bool:
        with contextlib.suppress(ConnectionResetError):  # it is just closing
            return is_free(port)
        return False

    try:
        assert eventually(ended, 10)
    finally:
        os.kill(child, signal.SIGKILL)
    assert not (tmp_path / "imported").exists()


def test_what_an_engine_cannot_do() -> None:
    """What an engine cannot do is refused by name before anything is tried, where it can be asked for."""
    limits = RayTunnels.limits()
    assert limits["paramiko"] == {}
    cases: list[tuple[str, str, dict[str, Any]]] = [
        ("openssh", "password", {"password": "s3cret"}),
        ("openssh", "passphrase", {"private_key_file": "key", "private_key_password": "s3cret"}),
        ("openssh", "fingerprint", {"host_key": "SHA256:" + "A" * 43}),
        ("sshtunnel", "jump", {"jump": "bastion"}),
        ("sshtunnel", "local-ipv6", {"ray_tunnel_specs": [SSHTunnelSpec("::1", 1, "localhost", 1)]}),
    ]
    for engine, what, arguments in cases:
        with pytest.raises(SpecError) as caught:
            RayTunnels("192.0.2.1", "user", engine=engine, **arguments)  # type: ignore[arg-type]
        assert limits[engine][what] in str(caught.value)
        assert "s3cret" not in str(caught.value)
    same = [SSHTunnelSpec("localhost", number, f"10.0.0.{number}", 8080) for number in (1, 2)]
    assert RayTunnels("192.0.2.1", "user", ray_tunnel_specs=same).ports == {8080: 2}
    with pytest.raises(SpecError, match=r"remote ports that differ.*several of: 8080"):
        RayTunnels("192.0.2.1", "user", ray_tunnel_specs=same, local_port="auto")
    with pytest.raises(SpecError, match="engine must be one of 'paramiko', 'sshtunnel', 'openssh'"):
        RayTunnels("192.0.2.1", "user", engine="carrier-pigeon")  # type: ignore[arg-type]


if os.geteuid() == 0:

    @pytest.fixture
    def far_server(tmp_path: Path) -> Iterator[tuple[SshServer, Callable[[bool], None], Path]]:
        """An sshd in a network of its own, and a function that cuts the line to it and mends it."""
        from pyroute2 import IPRoute, NetNS

        holder = subprocess.Popen(["unshare", "--net", "sleep", "1000"])
        name = f"rdt{os.getpid() % 100000}"
        with IPRoute() as here, contextlib.ExitStack() as stack:
            stack.callback(holder.wait)
            stack.callback(holder.kill)
            mine = os.readlink("/proc/self/ns/net")
            assert eventually(lambda: os.readlink(f"/proc/{holder.pid}/ns/net") != mine)
            here.link("add", ifname=name, kind="veth", peer={"ifname": "far0", "net_ns_pid": holder.pid})
            (index,) = here.link_lookup(ifname=name)
            here.addr("add", index=index, address="10.231.77.1", prefixlen=24)
            here.link("set", index=index, state="up")
            there = stack.enter_context(NetNS(f"/proc/{holder.pid}/ns/net", flags=0))
            far, lo = there.link_lookup(ifname="far0")[0], there.link_lookup(ifname="lo")[0]
            there.addr("add", index=far, address="10.231.77.2", prefixlen=24)
            for one in (far, lo):
                there.link("set", index=one, state="up")

            def line(up: bool) -> None:
                there.link("set", index=far, state="up" if up else "down")

            prefix = ("nsenter", "--net", "-t", str(holder.pid))
            address = "10.231.77.2"
            server = stack.enter_context(system_sshd(tmp_path, address=address, prefix=prefix))
            yield server, line, tmp_path
            here.link("del", index=index)

    def test_a_network_that_is_cut_for_ten_seconds(
        far_server: tuple[SshServer, Callable[[bool], None], Path],
    ) -> None:
        """With every engine, connections through the tunnels outlast a cut of ten seconds."""
        server, line, _ = far_server
        # What answers on the other side is sshd itself, which speaks first.
        spec = SSHTunnelSpec("localhost", 1, "10.231.77.2", server.port)
        with contextlib.ExitStack() as stack:
            clients = {}
            for variant, options in VARIANTS.items():
                tunnels = RayTunnels(
                    "10.231.77.2",
                    server.user,
                    private_key_file=server.key,
                    ssh_port=server.port,
                    ray_tunnel_specs=[spec],
                    local_port="auto",
                    **options,
                )
                stack.enter_context(tunnels)
                address = ("127.0.0.1", tunnels.ports[server.port])
                client = stack.enter_context(socket.create_connection(address, timeout=60))
                assert client.recv(4) == b"SSH-"
                clients[variant] = tunnels, client
            line(False)
            time.sleep(10)
            line(True)
            for variant, (tunnels, client) in clients.items():
                client.sendall(b"SSH-2.0-a-client\r\n")
                assert client.recv(1000), variant
                assert len(client.recv(5)) > 0, variant  # the answer to ours: its key exchange
                assert (tunnels.status().state, tunnels.status().reconnects) == ("up", 0), variant
