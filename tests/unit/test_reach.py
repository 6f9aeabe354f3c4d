"""How to log in to nodes, and what Reach makes of the answers of a head that it reaches without SSH."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from tests.ssh_fixtures import SshServer, embedded, eventually, free_port, make_key, ssh_server
from yellowdog_ray.errors import (
    ClusterStateError,
    HostKeyError,
    RayDogError,
    SpecError,
    SSHLoginError,
    TunnelError,
)
from yellowdog_ray.raydog import reach as reach_module
from yellowdog_ray.raydog.access import SSHAccess
from yellowdog_ray.raydog.reach import RayNode, Reach
from yellowdog_ray.utils._ssh.connection import Connection, Connector

__all__ = ["embedded", "ssh_server"]  # the fixtures

TASK = "ydid:task:000000:a95c6be1-9cc1-48b8-a7b3-04924a85f4c6:1:1"
TOKEN = "a-secret-token"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"user": ""}, "SSH user is needed"),
        ({"user": None}, "SSH user is needed"),
        ({"port": 0}, "port must be a port number"),
        ({"port": "22"}, "port must be a port number"),
        ({"port": True}, "port must be a port number"),
        ({"port": 65536}, "port must be a port number"),
        ({"private_key_file": ""}, "private_key_file must be the path"),
        ({"private_key_file": 7}, "private_key_file must be the path"),
        ({"password": ""}, "password must be a text"),
        ({"password": 7}, "password must be a text"),
        ({"private_key_password": "x"}, "private_key_password opens private_key_file"),
        ({"host_key": "nonsense"}, "host_key must be a public key line"),
        ({"host_key": 7}, "host_key must be a public key line"),
    ],
)
def test_an_access_that_cannot_work(arguments: dict[str, Any], said: str) -> None:
    """What cannot work is refused by name."""
    with pytest.raises(SpecError, match=said):
        SSHAccess(**{"user": "ray", **arguments})


def test_no_secrets_in_repr() -> None:
    """Neither an access nor a Reach shows what opens a cluster, not even in a refusal."""
    access = SSHAccess("ray", "~/.ssh/key", password="pass-1", private_key_password="pass-2")
    shown = repr(access) + repr(Reach(["192.0.2.1"], access, "token-3"))
    assert "pass-" not in shown
    assert "token-3" not in shown
    with pytest.raises(SpecError) as caught:
        SSHAccess("ray", private_key_password="pass-2")
    assert "pass-2" not in str(caught.value)


@pytest.mark.parametrize("addresses", [[], [""], "192.0.2.1"])
def test_no_address(addresses: Any) -> None:
    """A Reach needs an address, in a list."""
    with pytest.raises(SpecError, match="addresses must be a list"):
        Reach(addresses, None)


@pytest.mark.parametrize("token", ["", "se cret", "secret\n", "sécret"])
def test_no_token(token: str) -> None:
    """What cannot be a token is refused, and not shown."""
    with pytest.raises(SpecError, match="The token must be") as caught:
        Reach(["192.0.2.1"], None, token)
    assert "cret" not in str(caught.value)


def test_import_is_cheap() -> None:
    """Without SSH, paramiko is not loaded."""
    code = (
        "import sys; from yellowdog_ray import SSHAccess; from yellowdog_ray.raydog.reach import *;"
        "Reach(['192.0.2.1'], SSHAccess('ray'));"
        "print(sorted({'ray', 'paramiko', 'yellowdog_client'} & set(sys.modules)))"
    )
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert output.strip() == "[]"


class Head:
    """Stands in for Ray on a head: both of its web servers on one port."""

    def __init__(self) -> None:
        self.nodes: list[dict[str, Any]] = []
        self.status = 200
        self.body: bytes | None = None
        self.delay = 0.0
        self.chunked = False
        self.asked: list[tuple[str, str | None]] = []


@pytest.fixture
def head(monkeypatch: pytest.MonkeyPatch) -> Iterator[Head]:
    head = Head()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            head.asked.append((self.path, self.headers["Authorization"]))
            body = head.body
            if body is None and self.path.startswith("/api/v0/nodes?"):
                query = parse_qs(urlsplit(self.path).query)
                found = head.nodes
                if "filter_keys" in query:
                    assert (query["filter_keys"], query["filter_predicates"]) == (["state"], ["="])
                    found = [node for node in found if [node["state"]] == query["filter_values"]]
                found = found[: int(query["limit"][0])]
                body = json.dumps({"result": True, "data": {"result": {"result": found}}}).encode()
            self.send_response(head.status)
            body = body or b""
            if head.chunked:
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                for part in (body[:7], body[7:]):
                    self.wfile.write(b"%x\r\n%s\r\n" % (len(part), part))
                self.wfile.write(b"0\r\n\r\n")
                return
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            while head.delay and body:  # a little at a time
                self.wfile.write(body[:1])
                body = body[1:]
                time.sleep(head.delay)
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

        def handle(self) -> None:
            try:
                super().handle()
            except OSError:
                self.close_connection = True

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        monkeypatch.setattr(reach_module, "DASHBOARD", server.server_address[1])
        monkeypatch.setattr(reach_module, "AGENT", server.server_address[1])
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield head
        server.shutdown()
        thread.join()


def entry(number: int, state: str = "ALIVE") -> dict[str, Any]:
    return {
        "node_id": f"{number:056x}",
        "node_ip": f"10.0.{number >> 8}.{number & 255}",
        "is_head_node": number == 0,
        "state": state,
        "state_message": None,
        "node_name": f"10.0.{number >> 8}.{number & 255}",
        "resources_total": {"CPU": 1.0, "memory": "1.000 GiB", f"node:{number}": 1.0},
        "labels": {"ray.io/node-id": f"{number:056x}"},
    }


def test_health(head: Head) -> None:
    """Only 200 is healthy; the token is not sent where it is not needed."""
    with Reach(["127.0.0.1"], None, TOKEN) as reach:
        assert reach.health() is None
        head.status, head.body = 503, b"Local Raylet failed"
        assert reach.health() == "Ray on the head is not healthy: HTTP 503, 'Local Raylet failed'"
    assert {authorization for _, authorization in head.asked} == {None}


def test_health_of_nothing() -> None:
    """Where nothing answers, that is said of every address, with what to do."""
    said = Reach(["127.0.0.3", "127.0.0.2"], None).health()
    assert said
    assert "No connection to 127.0.0.3:52365: Connection refused. No connection to 127.0.0.2:52365" in said
    assert "localhost only, unless" in said
    assert said.endswith("give access=SSHAccess(...)")


@pytest.mark.parametrize("chunked", [False, True])
def test_nodes(head: Head, chunked: bool) -> None:
    """Nodes are read whatever way the answer is sent, the dead ones as such, with the token."""
    head.nodes, head.chunked = [entry(0), entry(1), entry(2, "DEAD")], chunked
    # The first address does not answer.
    reach = Reach(["127.0.0.3", "127.0.0.1"], None, TOKEN)
    nodes = reach.ray_nodes()
    assert nodes[0] == RayNode("0" * 56, "10.0.0.0", alive=True, is_head=True)
    assert [node.alive for node in nodes] == [True, True, False]
    assert [node.is_head for node in nodes] == [True, False, False]
    assert [authorization for _, authorization in head.asked] == [f"Bearer {TOKEN}"]


def test_many_nodes(head: Head) -> None:
    """With ten thousand nodes none that lives is pushed off Ray's list by a dead one."""
    head.nodes = [entry(number, "DEAD") for number in range(10_000, 11_000)]
    head.nodes += [entry(number) for number in range(10_000)]
    began = time.monotonic()
    nodes = Reach(["127.0.0.1"], None).ray_nodes()
    assert time.monotonic() - began < 5
    assert len(nodes) == sum(node.alive for node in nodes) == 10_000


def test_many_nodes_over_ssh(head: Head, ssh_server: SshServer) -> None:
    """An answer of megabytes comes whole through SSH."""
    head.nodes = [entry(number) for number in range(9_999)]
    access = SSHAccess(ssh_server.user, ssh_server.key, port=ssh_server.port, host_key=ssh_server.host_key)
    with Reach(["127.0.0.1"], access, TOKEN) as reach:
        for _ in range(5):
            assert len(reach.ray_nodes()) == 9_999
        head.body = b""
        assert reach.health() is None


@pytest.mark.parametrize(
    ("status", "body", "token", "said"),
    [
        (401, b"Unauthorized", None, "asks for a token: HTTP 401, 'Unauthorized'"),
        (403, b"Forbidden", TOKEN, "does not accept the token of this cluster: HTTP 403"),
        (500, b"broken", TOKEN, "does not list the nodes: HTTP 500, 'broken'"),
        (200, b"<html>a proxy", TOKEN, "does not list the nodes: HTTP 200, '<html>a proxy'"),
        (200, b'{"data": {"result": {"result": [{}]}}}', TOKEN, "does not list the nodes: HTTP 200"),
    ],
)
def test_nodes_refused(head: Head, status: int, body: bytes, token: str | None, said: str) -> None:
    """What is no list of nodes is quoted, and no secret is."""
    head.status, head.body = status, body
    with pytest.raises(ClusterStateError, match=said) as caught:
        Reach(["127.0.0.1"], None, token).ray_nodes()
    assert TOKEN not in str(caught.value)


def test_an_answer_that_does_not_end(head: Head, monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer that comes too slowly is given up, although something does come."""
    monkeypatch.setattr(reach_module, "_ANSWER_TIMEOUT", 0.5)
    head.body, head.delay = b"x" * 200, 0.05
    began = time.monotonic()
    with pytest.raises(TunnelError, match=r"did not answer within 0.5 s"):
        Reach(["127.0.0.1"], None).ray_nodes()
    assert time.monotonic() - began < 3


def test_task_output_needs_ssh() -> None:
    """A task's output is not to be had without SSH, and not with something that is no id."""
    with pytest.raises(SpecError, match="give access=SSHAccess"):
        Reach(["127.0.0.1"], None).task_output("127.0.0.1", TASK)
    reach = Reach(["127.0.0.1"], SSHAccess("ray"))
    for wrong in ("", "ydid:task:$(id)", "ydid:task:../x", f"{TASK}\n", "ydid:workreq:1", None):
        with pytest.raises(SpecError, match="is not the YDID of a task"):
            reach.task_output("127.0.0.1", wrong)  # type: ignore[arg-type]
    for size in (0, -1, True, "9"):
        with pytest.raises(SpecError, match="max_bytes must be"):
            reach.task_output("127.0.0.1", TASK, size)  # type: ignore[arg-type]


def test_closed(head: Head) -> None:
    """Once closed, and closed again, it refuses to work."""
    with Reach(["127.0.0.1"], None) as reach:
        assert reach.health() is None
    reach.close()
    with pytest.raises(ClusterStateError, match="was closed"):
        reach.health()
    with pytest.raises(RayDogError, match="was closed"):
        Reach.ray_nodes(reach)


def test_a_refused_login(embedded: SshServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is tried again, seconds apart, as the key may still come, and given up after a while."""
    make_key(embedded.directory / "wrong")
    access = SSHAccess(
        embedded.user,
        embedded.directory / "wrong",
        port=embedded.port,
        host_key=embedded.host_key,
        ssh_config=False,
    )
    monkeypatch.setattr(reach_module, "AGENT", free_port())
    with Reach(["127.0.0.1"], access) as reach:
        attempts = 0
        connect = Connector.connect

        def counted(connector: Connector, timeout: float) -> Connection:
            nonlocal attempts
            attempts += 1
            return connect(connector, timeout)

        monkeypatch.setattr(Connector, "connect", counted)
        for _ in range(5):
            assert "does not let user" in (reach.health() or "")
            with pytest.raises(SSHLoginError, match="does not let user"):
                reach.ray_nodes()
        assert attempts == 1
        monkeypatch.setattr(reach_module, "_LOGIN_PAUSE", 0.0)
        monkeypatch.setattr(reach_module, "_LOGIN_GRACE", 0.5)
        assert eventually(lambda: raises(SSHLoginError, reach.health))
        assert attempts > 1
        # The key has come.
        (embedded.directory / "authorized_keys").write_text((embedded.directory / "wrong.pub").read_text())
        assert "nothing listens there" in (reach.health() or "")


def test_a_key_file_of_no_use(embedded: SshServer, tmp_path: Path) -> None:
    """It is named at once, each time: no server has refused it, and waiting does not mend it."""
    make_key(tmp_path / "encrypted", passphrase="open sesame")
    for name, said in (("missing", "Cannot read the private key"), ("encrypted", "is encrypted")):
        access = SSHAccess(
            embedded.user, tmp_path / name, port=embedded.port, host_key=embedded.host_key, ssh_config=False
        )
        with pytest.raises(SpecError, match=said):
            access.check_key_file()
        with Reach(["127.0.0.1"], access) as reach:
            for call in (reach.health, reach.health, reach.ray_nodes):
                with pytest.raises(SSHLoginError, match=said):
                    call()
        connector = Connector(access.login("127.0.0.1"))
        for _ in range(2):
            with pytest.raises(SSHLoginError, match=said):
                connector.connect()
    opened = dataclasses.replace(access, private_key_password="open sesame")
    opened.check_key_file()
    SSHAccess(embedded.user).check_key_file()


def raises(kind: type[Exception], call: Callable[[], object]) -> bool:
    try:
        call()
    except kind:
        return True
    return False


def test_another_host_key(embedded: SshServer) -> None:
    """It is said at once; but of a second address, which may be another machine's, it is only told."""
    access = SSHAccess(
        embedded.user,
        embedded.key,
        port=embedded.port,
        host_key=f"SHA256:{'A' * 43}",
        ssh_config=False,
    )
    with Reach(["127.0.0.1"], access) as reach, pytest.raises(HostKeyError):
        reach.health()
    with Reach(["127.0.0.9", "127.0.0.1"], access) as reach:
        said = reach.health() or ""
    assert "No connection to 127.0.0.9" in said
    assert "SHA256:AAAA" in said
