"""RayTunnels against real SSH servers on loopback."""

from __future__ import annotations

import os
import socket
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import paramiko
import pytest

from tests.ssh_fixtures import (
    SshServer,
    echo_server,
    eventually,
    free_port,
    make_key,
    ssh_server,
    system_sshd,
)
from yellowdog_ray.errors import SpecError, SSHLoginError, TunnelError
from yellowdog_ray.utils import ray_ssh_tunnels
from yellowdog_ray.utils._ssh import connection
from yellowdog_ray.utils._ssh.hostkeys import HostKey
from yellowdog_ray.utils._ssh.keys import load_key
from yellowdog_ray.utils._tunnels import forwarder
from yellowdog_ray.utils.ray_ssh_tunnels import LocalPort, RayTunnels, SSHTunnelSpec

__all__ = ["ssh_server"]  # the fixture


@pytest.fixture
def echo() -> Iterator[int]:
    """The port of an echo server, as it runs on the head node."""
    with echo_server() as port:
        yield port


def to(remote_port: int) -> SSHTunnelSpec:
    return SSHTunnelSpec("localhost", free_port(), "localhost", remote_port)


def tunnels_to(server: SshServer, *specs: SSHTunnelSpec, **changes: object) -> RayTunnels:
    arguments: dict[str, object] = {"private_key_file": str(server.key), "ssh_port": server.port, **changes}
    return RayTunnels("127.0.0.1", server.user, ray_tunnel_specs=list(specs), **arguments)


def ask(port: int, data: bytes = b"hello", timeout: float = 5) -> bytes:
    """Send data to a local port and return as much as was sent, or less where the connection ends."""
    answer = b""
    with socket.create_connection(("127.0.0.1", port), timeout=timeout) as sock:
        sock.sendall(data)
        while len(answer) < len(data) and (more := sock.recv(65536)):
            answer += more
    return answer


def connections_to(port: int) -> int:
    """Count this machine's established connections to a port of 127.0.0.1."""
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return sum(row[2] == f"0100007F:{port:04X}" and row[3] == "01" for row in rows)


def is_free(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=2).close()
    except ConnectionRefusedError:
        return True
    except ConnectionResetError:
        # Whoever listens has accepted it and ended it before this could be told.
        return False
    return False


class Traces:
    """The threads and file descriptors of this process, to be compared with later."""

    def __init__(self) -> None:
        self.threads, self.fds = set(threading.enumerate()), len(os.listdir("/proc/self/fd"))

    def gone(self) -> bool:
        """Whether there are no more of them than there were; the servers of tests may need a moment too."""
        return eventually(
            lambda: (
                set(threading.enumerate()) <= self.threads and len(os.listdir("/proc/self/fd")) <= self.fds
            ),
            5,
        )


def test_two_ports_share_one_connection(ssh_server: SshServer, echo: int) -> None:
    """Both ports carry data, over a single SSH connection."""
    with echo_server() as other:
        first, second = to(echo), to(other)
        with tunnels_to(ssh_server, first, second) as tunnels:
            assert tunnels.is_active
            assert ask(first.local_port, b"a" * 300_000) == b"a" * 300_000
            assert ask(second.local_port, b"b") == b"b"
            assert connections_to(ssh_server.port) == 1
    assert not tunnels.is_active
    assert is_free(first.local_port)
    assert is_free(second.local_port)


def test_answers_in_two_parts_are_not_delayed(ssh_server: SshServer, echo: int) -> None:
    """An answer in two small writes comes at once, not after the 40 ms of a delayed acknowledgement."""
    spec, times = to(echo), []
    with (
        tunnels_to(ssh_server, spec),
        socket.create_connection(("127.0.0.1", spec.local_port), timeout=5) as sock,
    ):
        for _ in range(31):
            start = time.perf_counter()
            sock.sendall(b"xy")
            while len(sock.recv(2, socket.MSG_PEEK)) < 2:
                pass
            sock.recv(2)
            times.append(time.perf_counter() - start)
    assert statistics.median(times) < 0.025


def test_wrong_key_is_explained(ssh_server: SshServer, echo: int, tmp_path: Path) -> None:
    """A refused key names the user, the server and the key, and leaves nothing."""
    other, spec = tmp_path / "other", to(echo)
    make_key(other)
    before = Traces()
    with pytest.raises(TunnelError) as caught:
        tunnels_to(ssh_server, spec, private_key_file=str(other)).start_tunnels()
    for part in (ssh_server.user, f"127.0.0.1:{ssh_server.port}", str(other), "SHA256:"):
        assert part in str(caught.value)
    assert is_free(spec.local_port)
    assert before.gone()


def test_wrong_user_is_explained(ssh_server: SshServer, echo: int) -> None:
    """A user that the server does not know is refused with a reason."""
    with pytest.raises(TunnelError, match="does not let user 'nobody-at-all' in"):
        RayTunnels(
            "127.0.0.1",
            "nobody-at-all",
            private_key_file=str(ssh_server.key),
            ray_tunnel_specs=[to(echo)],
            ssh_port=ssh_server.port,
        ).start_tunnels()


def test_password_where_there_are_none(ssh_server: SshServer, echo: int) -> None:
    """A password is refused by a server that takes keys only, and does not appear in the message."""
    with pytest.raises(TunnelError, match="the server takes publickey") as caught:
        tunnels_to(ssh_server, to(echo), private_key_file=None, password="s3cret").start_tunnels()
    assert "s3cret" not in str(caught.value)


def test_changed_host_key_stops_before_the_login(
    ssh_server: SshServer, echo: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server with another key than the pinned one is shown nothing, and both fingerprints are named."""
    logins: list[object] = []
    monkeypatch.setattr(paramiko.Transport, "auth_publickey", lambda *_: logins.append(1))
    expected, spec = make_key(tmp_path / "expected"), to(echo)
    before = Traces()
    with pytest.raises(TunnelError, match="not the server that was expected") as caught:
        tunnels_to(ssh_server, spec, host_key=expected).start_tunnels()
    for line in (expected, ssh_server.host_key):
        assert str(HostKey.parse(line)) in str(caught.value)
    assert not logins
    assert is_free(spec.local_port)
    assert before.gone()


def test_right_host_key(ssh_server: SshServer, echo: int) -> None:
    """The pinned key is accepted, with a comment too."""
    spec = to(echo)
    with tunnels_to(ssh_server, spec, host_key=f"{ssh_server.host_key} root@head\n"):
        assert ask(spec.local_port) == b"hello"


@pytest.mark.sshd
def test_host_key_of_another_kind(tmp_path: Path, echo: int) -> None:
    """Of a server with several host keys, the one of the pinned kind is asked for."""
    with system_sshd(tmp_path) as server:
        spec = to(echo)
        with tunnels_to(server, spec, host_key=(tmp_path / "host_ecdsa.pub").read_text()):
            assert ask(spec.local_port) == b"hello"


@pytest.mark.parametrize(
    ("kind", "form"),
    [
        (kind, form)
        for kind in ("ssh-ed25519", "ecdsa-sha2-nistp384", "ssh-rsa")
        for form in ("openssh", "pkcs1-pem", "pkcs8-pem")
        if (kind, form) != ("ssh-ed25519", "pkcs1-pem")  # there is no such thing
    ],
)
def test_key_formats(tmp_path: Path, kind: str, form: str) -> None:
    """Keys of all usual kinds and formats are read, encrypted or not."""
    import asyncssh

    key = asyncssh.generate_private_key(kind)
    path = tmp_path / "key"
    for passphrase in (None, "open sesame"):
        path.write_bytes(key.export_private_key(form, passphrase))
        loaded = load_key(str(path), passphrase)
        assert loaded.asbytes() == key.public_data


def refused_key(path: Path, passphrase: str | None = None) -> str:
    """Start tunnels with a key file to a server that is not there; return why it failed."""
    with pytest.raises(TunnelError) as caught:
        RayTunnels(
            "127.0.0.1",
            "user",
            private_key_file=path,
            private_key_password=passphrase,
            ray_tunnel_specs=[to(1)],
            ssh_port=free_port(),
        ).start_tunnels()
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_key_file_is_missing(tmp_path: Path) -> None:
    """A missing key file is named."""
    assert "No such file" in refused_key(tmp_path / "missing")


def test_key_file_is_no_key(tmp_path: Path) -> None:
    """A file that is no key, or the public one, is said to be that."""
    path = tmp_path / "key"
    path.write_text("hello\n")
    assert "is no private key" in refused_key(path)
    path.write_text(make_key(tmp_path / "real") + "\n")
    assert "is a public key" in refused_key(path)


@pytest.mark.parametrize("form", ["openssh", "pkcs8-pem"])
def test_key_needs_another_passphrase(tmp_path: Path, form: str) -> None:
    """A missing and a wrong passphrase are told apart, and neither is repeated."""
    import asyncssh

    path = tmp_path / "key"
    path.write_bytes(asyncssh.generate_private_key("ssh-ed25519").export_private_key(form, "right"))
    assert "is encrypted: give private_key_password" in refused_key(path)
    message = refused_key(path, "wr0ng")
    assert "does not open" in message
    assert "wr0ng" not in message


def test_taken_port_is_named_before_connecting(tmp_path: Path) -> None:
    """Of two ports one is taken: it is named, the other is free again, and no server was contacted."""
    make_key(tmp_path / "key")
    free, before = to(8265), Traces()
    with socket.create_server(("127.0.0.1", 0)) as taken, socket.create_server(("127.0.0.1", 0)) as ssh:
        port = taken.getsockname()[1]
        tunnels = RayTunnels(
            "127.0.0.1",
            "user",
            private_key_file=tmp_path / "key",
            ray_tunnel_specs=[free, SSHTunnelSpec("localhost", port, "localhost", 10001)],
            ssh_port=ssh.getsockname()[1],
        )
        with pytest.raises(TunnelError, match=f"local port {port} .for 10001.* is in use"):
            tunnels.start_tunnels()
        assert is_free(free.local_port)
        ssh.setblocking(False)
        with pytest.raises(BlockingIOError):
            ssh.accept()
    assert before.gone()


def unreachable(port: int, tmp_path: Path, host: str = "127.0.0.1") -> str:
    """Start tunnels to something that is no SSH server; return why it failed."""
    make_key(tmp_path / "key")
    spec = to(1)
    tunnels = RayTunnels(
        host, "user", private_key_file=tmp_path / "key", ray_tunnel_specs=[spec], ssh_port=port
    )
    before = Traces()
    with pytest.raises(TunnelError) as caught:
        tunnels.start_tunnels()
    assert is_free(spec.local_port)
    assert before.gone()
    tunnels.stop_tunnels(ignore_errors=False)
    return str(caught.value)


def test_closed_ssh_port(tmp_path: Path) -> None:
    """Nothing listens: that is said."""
    port = free_port()
    assert f"No connection to 127.0.0.1:{port}" in unreachable(port, tmp_path)


def test_unknown_name(tmp_path: Path) -> None:
    """A name that does not exist is named."""
    assert "The name 'head.invalid' cannot be resolved" in unreachable(22, tmp_path, "head.invalid")


def test_dropped_packets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host that never answers is given up after the timeout."""
    monkeypatch.setattr(connection, "CONNECT_TIMEOUT", 0.5)
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full:
        address = full.getsockname()
        fillers = [socket.socket() for _ in range(4)]  # once its queue is full, Linux drops what else comes
        for sock in fillers:
            sock.setblocking(False)
            sock.connect_ex(address)
        start = time.monotonic()
        assert "did not answer within 0.5 s" in unreachable(address[1], tmp_path)
        assert time.monotonic() - start < 2
        for sock in fillers:
            sock.close()


def test_not_an_ssh_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A server that speaks something else is told from one that is not there, without noise."""
    monkeypatch.setattr(connection, "CONNECT_TIMEOUT", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        assert "accepts connections, but SSH with it failed" in unreachable(silent.getsockname()[1], tmp_path)
    assert capfd.readouterr().err == ""


def test_stopping_twice_and_starting_again(ssh_server: SshServer, echo: int) -> None:
    """Stopping is idempotent, starting as well, and tunnels can be started anew."""
    spec = to(echo)
    tunnels = tunnels_to(ssh_server, spec)
    tunnels.stop_tunnels(ignore_errors=False)
    for _ in range(2):
        tunnels.start_tunnels()
        tunnels.start_tunnels()
        assert ask(spec.local_port) == b"hello"
        assert connections_to(ssh_server.port) == 1
        tunnels.stop_tunnels(ignore_errors=False)
        tunnels.stop_tunnels(ignore_errors=False)
        assert connections_to(ssh_server.port) == 0
        assert is_free(spec.local_port)


def test_nothing_is_left_after_five_rounds(ssh_server: SshServer, echo: int) -> None:
    """Starting, using and stopping leaves no thread and no file descriptor, with clients connected too."""
    spec = to(echo)
    tunnels = tunnels_to(ssh_server, spec)
    for round_ in range(6):
        if round_ == 1:  # the first one may load modules
            before = Traces()
        with tunnels:
            ask(spec.local_port)
            client = socket.create_connection(("127.0.0.1", spec.local_port), timeout=5)
            client.sendall(b"x")
            assert client.recv(1) == b"x"
        assert client.recv(1) == b""
        client.close()
    assert before.gone()


def test_stop_is_bounded_by_no_client(ssh_server: SshServer) -> None:
    """A client that sends a lot, to one that reads nothing, cannot hold up the end, or outlive it."""
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        spec, before = to(deaf.getsockname()[1]), Traces()
        tunnels = tunnels_to(ssh_server, spec)
        tunnels.start_tunnels()
        with socket.create_connection(("127.0.0.1", spec.local_port)) as client:
            client.settimeout(0.5)
            with pytest.raises(TimeoutError):
                client.sendall(bytes(256 << 20))
            start = time.monotonic()
            tunnels.stop_tunnels(ignore_errors=False)
            assert time.monotonic() - start < 2
        assert before.gone()


def test_what_does_not_close_is_told(
    ssh_server: SshServer, echo: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What outlives the stop is an error if that is asked for, and else is not."""
    monkeypatch.setattr(ray_ssh_tunnels, "_STOP_TIMEOUT", 0.3)
    release, entered, spec = threading.Event(), threading.Event(), to(echo)
    monkeypatch.setattr(forwarder._Relay, "_receive", lambda *_: entered.set() or release.wait(10))
    tunnels = tunnels_to(ssh_server, spec)
    for ignore in (True, False):
        tunnels.start_tunnels()
        with socket.create_connection(("127.0.0.1", spec.local_port)):
            assert entered.wait(5)
            entered.clear()
            assert tunnels.status().connections == 1
            if ignore:
                tunnels.stop_tunnels()
            else:
                with pytest.raises(
                    TunnelError, match=f"1 connection.* to local port {spec.local_port} still open"
                ):
                    tunnels.stop_tunnels(ignore_errors=False)
    release.set()


def test_exception_in_the_block_closes(ssh_server: SshServer, echo: int) -> None:
    """The tunnels end with their block, also by an exception, which passes through."""
    spec = to(echo)
    with pytest.raises(KeyError), tunnels_to(ssh_server, spec):
        raise KeyError
    assert is_free(spec.local_port)


def test_remote_port_not_open_yet(ssh_server: SshServer, capfd: pytest.CaptureFixture[str]) -> None:
    """While nothing listens on the head, clients see an end of file and nobody a word."""
    with echo_server() as port:
        spec = to(port)
    with tunnels_to(ssh_server, spec), pytest.raises((AssertionError, ConnectionError)):
        assert ask(spec.local_port) == b"hello"
    assert capfd.readouterr().err == ""


def test_specs_take_numbers_and_digits() -> None:
    """The historical fields hold ports, as int or str; the clear names give the int."""
    spec = SSHTunnelSpec("127.0.0.1", "10001", "localhost", 10002)
    assert (spec.local_host, spec.local_port, spec.remote_host, spec.remote_port) == (
        "127.0.0.1",
        10001,
        "localhost",
        10002,
    )
    assert RayTunnels.basic_port_forward(8265) == SSHTunnelSpec("localhost", 8265, "localhost", 8265)


@pytest.mark.parametrize("port", [0, -1, 65536, "", "10.0.0.1", None, True, 1.5])
def test_ports_that_are_none(port: object) -> None:
    """What is no port is refused when it is given."""
    with pytest.raises(SpecError, match="local_bind_ip_address must be a port number"):
        SSHTunnelSpec("localhost", port, "localhost", 1)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ray_head_ip_address": ""}, "address is empty"),
        ({"ssh_user": ""}, "SSH user is needed"),
        ({"ssh_port": 0}, "ssh_port must be"),
        ({"ray_tunnel_specs": []}, "no port to forward"),
        (
            {"ray_tunnel_specs": [RayTunnels.basic_port_forward(p) for p in (1, 2, 1)]},
            "a local port twice: 1",
        ),
        ({"host_key": "SHA256:abc"}, "host_key must be a public key line"),
        ({"jump": "a b"}, "jump must be like"),
        ({"jump": "-oProxyCommand=x"}, "jump must be like"),
        ({"host_key": "ssh-rsa AAAAC3NzaC1lZDI1NTE5AAAAIA=="}, "host_key must be a public key line"),
    ],
)
def test_arguments_that_cannot_work(changes: dict[str, object], message: str) -> None:
    """Input that cannot work is refused by the constructor."""
    arguments = {"ray_head_ip_address": "192.0.2.1", "ssh_user": "user", "password": "s3cret", **changes}
    with pytest.raises(SpecError, match=message):
        RayTunnels(**arguments)  # type: ignore[arg-type]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home without keys, and no SSH agent."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    (tmp_path / ".ssh").mkdir()
    return tmp_path


def test_no_key_at_all(home: Path) -> None:
    """With no key, no password and none of one's own, the error says so before anything is opened."""
    spec = to(1)
    with pytest.raises(TunnelError, match="needs a key or a password"):
        RayTunnels("127.0.0.1", "user", ray_tunnel_specs=[spec]).start_tunnels()
    assert is_free(spec.local_port)


def test_the_users_own_key(ssh_server: SshServer, echo: int, home: Path) -> None:
    """Without key and password, a key in ~/.ssh is taken, as ssh does."""
    key = home / ".ssh" / "id_ed25519"
    key.write_bytes(ssh_server.key.read_bytes())
    key.chmod(0o600)
    spec = to(echo)
    with RayTunnels("127.0.0.1", ssh_server.user, ray_tunnel_specs=[spec], ssh_port=ssh_server.port):
        assert ask(spec.local_port) == b"hello"


@pytest.fixture
def agent(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An SSH agent without keys."""
    # A path of its own: the names of sockets are short.
    with tempfile.TemporaryDirectory() as directory:
        agent = subprocess.Popen(["ssh-agent", "-D", "-a", f"{directory}/agent"], stdout=subprocess.DEVNULL)
        try:
            assert eventually(Path(directory, "agent").exists, 5)
            monkeypatch.setenv("SSH_AUTH_SOCK", f"{directory}/agent")
            yield
        finally:
            agent.terminate()
            agent.wait()


def test_a_key_of_the_agent(ssh_server: SshServer, echo: int, agent: None) -> None:
    """Without key and password, the keys of the user's SSH agent are tried."""
    subprocess.run(["ssh-add", "-q", str(ssh_server.key)], check=True)
    spec = to(echo)
    with RayTunnels("127.0.0.1", ssh_server.user, ray_tunnel_specs=[spec], ssh_port=ssh_server.port):
        assert ask(spec.local_port) == b"hello"


def test_more_keys_than_are_tried(ssh_server: SshServer, home: Path, agent: None) -> None:
    """Of an agent with many keys, the first ones are tried, and the error tells how many were not."""
    names = [home / f"key{number}" for number in range(7)]
    for name in names:
        make_key(name)
    subprocess.run(["ssh-add", "-q", *names], check=True)
    with pytest.raises(SSHLoginError, match="2 more keys were not tried; name one") as caught:
        tunnels_to(ssh_server, to(1), private_key_file=None).start_tunnels()
    assert str(caught.value).count("of the SSH agent") == 5


@pytest.mark.sshd
def test_settings_that_would_break_openssh(
    tmp_path: Path, echo: int, caplog: pytest.LogCaptureFixture
) -> None:
    """The program ssh forwards whatever the settings say, with odd paths, and does not believe in silence."""
    with system_sshd(tmp_path) as server:
        config, key = tmp_path / "config", tmp_path / "key 100%h"
        config.write_text(
            "Host *\n RemoteCommand false\n SessionType none\n ForkAfterAuthentication yes\n"
            " ClearAllForwardings yes\n StdinNull yes\n RequestTTY force\n"
        )
        key.write_bytes(server.key.read_bytes())
        key.chmod(0o600)
        spec = to(echo)
        odd = {"private_key_file": key, "ssh_config": config, "engine": "openssh"}
        record = tmp_path / "key 100%h" / "record"  # below a file
        with tunnels_to(server, spec, known_hosts=record, **odd) as tunnels:
            assert ask(spec.local_port) == b"hello"
            assert tunnels.is_active
        assert f"could not be recorded in {record}" in caplog.text
    with pytest.raises(TunnelError, match=r"Connection refused.*ssh ended with exit status 255"):
        tunnels_to(server, spec, known_hosts=tmp_path / "record", **odd).start_tunnels()
    with pytest.raises(SpecError, match="cannot be told the path"):
        tunnels_to(server, spec, known_hosts=tmp_path / 'a"b', **odd).start_tunnels()


@pytest.mark.sshd
def test_who_is_recorded_where(
    ssh_server: SshServer, tmp_path: Path, echo: int, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The head's key goes into the record that is given, that of a bastion into the common one."""
    monkeypatch.setenv("RAYDOG_STATE_DIR", str(tmp_path / "states"))
    directory = tmp_path / "bastion"
    directory.mkdir()
    for name in ("user", "user.pub"):
        (directory / name).write_bytes((ssh_server.directory / name).read_bytes())
        (directory / name).chmod(0o600)
    with system_sshd(directory) as bastion:
        spec, record = to(echo), tmp_path / "record"
        jump = f"{bastion.user}@127.0.0.1:{bastion.port}"
        with tunnels_to(ssh_server, spec, jump=jump, known_hosts=record):
            assert ask(spec.local_port) == b"hello"
        for file, server in ((record, ssh_server), (tmp_path / "states" / "known_hosts", bastion)):
            (line,) = file.read_text().splitlines()
            assert line.split()[0] == f"[127.0.0.1]:{server.port}"


def test_names_that_a_shell_could_take_for_its_own() -> None:
    """An address or a user with a shell's characters is refused when the tunnels are made."""
    for arguments in (("$(id)", "user"), ("-oProxyCommand=id", "user"), ("192.0.2.1", "a;id")):
        with pytest.raises(SpecError, match="is refused"):
            RayTunnels(*arguments)


def test_addresses_and_repr() -> None:
    """The defaults are Ray's ports; the addresses are local ones; the repr tells no secret."""
    tunnels = RayTunnels("192.0.2.1", "user", password="s3cret", private_key_password="pa55")
    assert tunnels.client_address == "ray://127.0.0.1:10001"
    assert tunnels.dashboard_url == "http://127.0.0.1:8265"
    assert repr(tunnels) == "<RayTunnels user@192.0.2.1:22 10001->10001, 8265->8265 stopped>"
    other = RayTunnels(
        "192.0.2.1", "user", "p", ray_tunnel_specs=[SSHTunnelSpec("127.0.0.1", 9000, "localhost", 8265)]
    )
    assert other.client_address is None
    assert other.dashboard_url == "http://127.0.0.1:9000"


def test_forgotten_tunnels_warn(ssh_server: SshServer, echo: int) -> None:
    """Tunnels that are dropped unstopped go on, with a warning that names them."""
    spec = to(echo)
    tunnels = tunnels_to(ssh_server, spec)
    tunnels.start_tunnels()
    engine = tunnels._engine
    with pytest.warns(ResourceWarning, match="<RayTunnels .* was never stopped"):
        del tunnels
    assert ask(spec.local_port) == b"hello"
    assert engine is not None
    engine.stop(time.monotonic() + 2)


def test_local_ports() -> None:
    """Local ports are the same as on the other side, free ones, or count up from a number."""

    def ports(local_port: LocalPort | None, *numbers: int) -> dict[int, int]:
        specs = [SSHTunnelSpec("localhost", 7000 + number, "localhost", number) for number in numbers]
        return RayTunnels("192.0.2.1", "user", ray_tunnel_specs=specs, local_port=local_port).ports

    assert ports(None, 10001, 8265) == {10001: 17001, 8265: 15265}
    assert ports("match", 10001, 8265) == {10001: 10001, 8265: 8265}
    assert ports("auto", 10001, 8265) == {}
    assert ports(30000, 10001, 8265) == {10001: 30000, 8265: 30001}
    for wrong in ("any", 0, 65536, True, 1.5):
        with pytest.raises(SpecError, match="local_port must be"):
            ports(wrong, 10001)  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="counted up"):
        ports(65535, 10001, 8265)


def test_grafana_and_prometheus() -> None:
    """Their addresses are told where their ports are forwarded."""
    specs = [SSHTunnelSpec("localhost", port + 1, "10.0.0.9", port) for port in (3000, 9090)]
    tunnels = RayTunnels("192.0.2.1", "user", ray_tunnel_specs=specs)
    assert (tunnels.grafana_url, tunnels.prometheus_url) == ("http://127.0.0.1:3001", "http://127.0.0.1:9091")
    assert RayTunnels("192.0.2.1", "user").grafana_url is None


def test_a_local_port_for_everybody_warns(
    ssh_server: SshServer, echo: int, caplog: pytest.LogCaptureFixture
) -> None:
    """A local port that is open to the network is one that somebody asked for, and it is said."""
    spec = SSHTunnelSpec("0.0.0.0", free_port(), "localhost", echo)
    with tunnels_to(ssh_server, spec):
        assert "Whoever reaches this machine at 0.0.0.0" in caplog.text
