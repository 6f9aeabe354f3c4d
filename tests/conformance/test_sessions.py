"""Tunnels and sessions of a cluster, as far as they need no node."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import grpc
import pytest

from tests.clusters import SHORT, make
from tests.controlplane import TEMPLATE
from tests.ssh_fixtures import SshServer, embedded
from yellowdog_ray import RayTunnels
from yellowdog_ray.errors import BuildError, ClusterStateError, HostKeyError, SpecError, TunnelError
from yellowdog_ray.raydog.access import SSHAccess
from yellowdog_ray.raydog.reach import Reach

__all__ = ["embedded"]  # the fixture

pytestmark = pytest.mark.usefixtures("hurried")


def test_tunnels_are_made_of_what_the_cluster_knows(platform):
    """Grafana and Prometheus are forwarded where there are such, and the access decides how."""
    access = SSHAccess("ray", "key", port=2222, host_key="SHA256:" + "A" * 43, jump="bastion")
    cluster = make(
        platform,
        enable_observability=True,
        observability_node_compute_requirement_template_id=TEMPLATE.id,
        access=access,
    )
    with pytest.raises(ClusterStateError, match="there is no head to make tunnels to"):
        cluster.tunnels()
    with cluster:
        cluster.build(SHORT)
        tunnels = cluster.tunnels()
        assert tunnels.ports == {port: port for port in (10001, 8265, 3000, 9090)}
        assert tunnels.grafana_url == "http://127.0.0.1:3000"
        assert {one.remote_host for one in tunnels._forwards[2:]} == {cluster.observability_node_private_ip}
        assert f"ray@{cluster.head_node_public_ip or cluster.head_node_private_ip}:2222" in repr(tunnels)
        assert tunnels._login.jump == "bastion"
        assert str(tunnels._login.record).endswith(".json.known_hosts")
        assert list(cluster.tunnels(local_port=20000).ports.values()) == [20000, 20001, 20002, 20003]
        with pytest.raises(SpecError, match="whole keys"):
            cluster.tunnels(engine="openssh")


def test_sessions_need_a_way(platform):
    """Without an access, or with one that is no SSH, it is said what is missing."""
    with make(platform) as cluster:
        cluster.build(SHORT)
        for session in (cluster.client, cluster.jobs):
            with pytest.raises(ClusterStateError, match="needs a way to the head"), session():
                pass
    with make(platform, "other", access="direct") as cluster:
        for session in (cluster.client, cluster.jobs):
            with pytest.raises(ClusterStateError, match="there is no head to connect to"), session():
                pass
        cluster.build(SHORT)
        with pytest.raises(ClusterStateError, match="tunnels need SSH"):
            cluster.tunnels()


@contextmanager
def dashboard() -> Iterator[tuple[str, list[str | None]]]:
    """A server that answers as Ray's dashboard does to a new client; yields its address and who has asked."""
    asked: list[str | None] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.headers["Authorization"])
            body = json.dumps({"version": "4", "ray_version": "2.60.0", "ray_commit": "x"}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield f"127.0.0.1:{server.server_address[1]}", asked
        server.shutdown()
        thread.join()


def test_the_token_goes_to_no_other_cluster(platform, monkeypatch):
    """What the environment names as the cluster or proxy to use is not asked, and stays as it was."""
    with (
        dashboard() as (ours, asked),
        dashboard() as (other, asked_other),
        make(platform, access="direct") as cluster,
    ):
        cluster.build(SHORT)

        @contextmanager
        def port(*_: object) -> Iterator[str]:
            yield ours

        monkeypatch.setattr(cluster, "_check_head", lambda *_, **__: None)
        monkeypatch.setattr(cluster, "_port", port)
        for name in ("no_proxy", "NO_PROXY"):
            monkeypatch.delenv(name, raising=False)
        for name, value in (
            ("RAY_API_SERVER_ADDRESS", f"http://{other}"),
            ("RAY_ADDRESS", f"ray://{other}"),
            ("http_proxy", f"http://{other}"),
            ("ALL_PROXY", f"http://{other}"),
        ):
            with monkeypatch.context() as patch:
                patch.setenv(name, value)
                with cluster.jobs() as jobs:
                    assert jobs.get_address() == f"http://{ours}"
                    assert jobs.get_version() == "4"
                    assert os.environ[name] == value
        assert asked_other == []
        assert set(asked) == {f"Bearer {cluster._ray_token()}"}


def test_a_key_file_that_is_not_there(platform, tmp_path):
    """A build that is to wait for Ray is refused before anything is created."""
    cluster = make(platform, access=SSHAccess("me", tmp_path / "mistyped", ssh_config=False))
    with pytest.raises(SpecError, match=r"Cannot read the private key file .*mistyped"):
        cluster.build(SHORT, until="ray")
    assert not [method for method, *_ in platform.faults.seen if method == "POST"]
    cluster.build(SHORT)
    assert [method for method, *_ in platform.faults.seen if method == "POST"]
    cluster.shut_down()


@contextmanager
def client_server() -> Iterator[tuple[str, list[str | None]]]:
    """A gRPC server that knows nothing; yields its address and who has asked."""
    asked: list[str | None] = []

    class Handler(grpc.GenericRpcHandler):
        def service(self, details: grpc.HandlerCallDetails) -> None:
            asked.append(dict(details.invocation_metadata).get("authorization"))

    server = grpc.server(ThreadPoolExecutor(1))
    server.add_generic_rpc_handlers((Handler(),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}", asked
    server.stop(None).wait()


def test_each_cluster_gets_its_own_token_alone(platform, monkeypatch, tmp_path):
    """A cluster without a token is sent none, whatever the environment, ~/.netrc and Ray itself have."""
    import ray
    from ray._private.grpc_utils import init_grpc_channel

    def call(address: str) -> None:
        with init_grpc_channel(address) as channel, pytest.raises(grpc.RpcError, match="UNIMPLEMENTED"):
            channel.unary_unary("/ray.rpc.RayletDriver/ClusterInfo")(b"", timeout=10)

    def init(address: str, **_: object) -> None:
        call(address.removeprefix("ray://"))

    (tmp_path / ".netrc").write_text("default login somebody password secret\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(ray, "init", init)
    access = SSHAccess("ray", password="secret", ssh_config=False)
    with (
        dashboard() as (address, asked),
        client_server() as (client_address, client_asked),
        make(platform, "one", access=access) as one,
        make(platform, "two", access=access, ray_auth="off") as two,
    ):
        addresses = {10001: client_address, 8265: address}
        for cluster in (two, one):
            cluster.build(SHORT)
            monkeypatch.setattr(cluster, "_check_head", lambda *_, **__: None)

            @contextmanager
            def port(number: int, *_: object) -> Iterator[str]:
                yield addresses[number]

            monkeypatch.setattr(cluster, "_port", port)
        ours = f"Bearer {one._ray_token()}"
        for environment in (ours, "Bearer another", None):
            with monkeypatch.context() as patch:
                if environment is None:
                    patch.delenv("RAY_AUTH_TOKEN")
                else:
                    patch.setenv("RAY_AUTH_TOKEN", environment.removeprefix("Bearer "))
                before = dict(os.environ)
                for cluster, expected in ((two, None), (one, ours), (two, None)):
                    with cluster.jobs() as jobs:
                        assert jobs.get_version() == "4"
                        assert set(asked) == {expected}
                        assert jobs._headers.get("Authorization") == expected  # also for a job's log
                    with cluster.client():
                        call(client_address)  # as Ray does when it has lost the connection
                        assert one.use_ray_auth() is False
                        assert client_asked == [expected, expected]
                    asked.clear()
                    client_asked.clear()
                    if cluster is two:
                        assert os.environ == before
                    before = dict(os.environ)


def test_the_dashboard_of_an_open_cluster_needs_ssh(platform):
    """Without a token there is no other way to the dashboard, which is said before anything is waited for."""
    with make(platform, access="direct", ray_auth="off") as cluster:
        cluster.build(SHORT)
        said = r"localhost only.* and this one has none"
        with pytest.raises(ClusterStateError, match=said), cluster.jobs():
            pass


def test_a_dashboard_that_does_not_answer(platform, monkeypatch):
    """It is an error of this library, which says what it may be."""
    with make(platform, access="direct") as cluster, dashboard() as (address, _):
        closed = address
        cluster.build(SHORT)
    with make(platform, "other", access="direct") as cluster:
        cluster.build(SHORT)

        @contextmanager
        def port(*_: object) -> Iterator[str]:
            yield closed

        monkeypatch.setattr(cluster, "_check_head", lambda *_, **__: None)
        monkeypatch.setattr(cluster, "_port", port)
        said = rf"{closed}\. Ray's dashboard.*localhost only"
        with pytest.raises(TunnelError, match=said), cluster.jobs():
            pass


def test_ray_client_finds_another_version(platform, monkeypatch):
    """Where the dashboard does not tell the versions, Ray's own refusal is an error of this library."""
    import ray

    def init(address: str, **_: object) -> None:
        raise RuntimeError("Version mismatch: The cluster was started with:\n    Ray: 2.1.0\n")

    with make(platform, access="direct", ray_auth="off") as cluster:
        cluster.build(SHORT)
        monkeypatch.setattr(cluster, "_check_head", lambda *_, **__: None)
        monkeypatch.setattr(ray, "init", init)
        said = r"Ray: 2\.1\.0\. A client and its cluster need the same version.* Nothing was connected"
        with pytest.raises(ClusterStateError, match=said), cluster.client():
            pass
        assert "RAY_AUTH_MODE" not in os.environ


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"engine": "nonsense"}, "engine must be one of"),
        ({"engine": "openssh"}, "password"),
        ({"timeout": "soon"}, "timeout: a time in seconds"),
        ({"timeout": None}, "timeout: a time in seconds"),
        ({"timeout": True}, "timeout: a time in seconds"),
        ({"timeout": timedelta(0)}, "not longer than zero"),
        ({"timeout": float("nan")}, "not longer than zero"),
    ],
)
def test_bad_input_is_refused_before_anything_is_waited_for(platform, options, said):
    """No head answers here, so that who waits for one waits in vain."""
    with make(platform, access=SSHAccess("ray", password="secret", port=1, ssh_config=False)) as cluster:
        cluster.build(SHORT)
        for session in (cluster.client, cluster.jobs):
            began = time.monotonic()
            with pytest.raises(SpecError, match=said), session(**{"timeout": 60, **options}):
                pass
            assert time.monotonic() - began < 5


def test_bad_input_of_tunnels(platform):
    """What is no address, no list of specs and no time is refused as such."""
    for specs in ([10001], 10001, "10001", [None]):
        with pytest.raises(SpecError, match="list of SSHTunnelSpec"):
            RayTunnels("head", "ray", ray_tunnel_specs=specs)
    with pytest.raises(SpecError, match="must be a text, not 5"):
        RayTunnels(5, "ray")
    for timeout in (None, "soon", 0, -1):
        with pytest.raises(SpecError, match="timeout"):
            RayTunnels("head", "ray").wait_for_ray(timeout)


def test_the_address_that_can_be_reached(platform, embedded: SshServer, monkeypatch):
    """Sessions and tunnels go where the cluster was connected to, which need not be the public address."""
    access = SSHAccess(
        embedded.user, embedded.key, port=embedded.port, host_key=embedded.host_key, ssh_config=False
    )
    with make(platform, access=access) as cluster:
        cluster.build(SHORT)
        head = cluster._assembly.head
        # Nothing listens at the one, and the server at the other.
        monkeypatch.setattr(head, "public_ip", "127.0.0.2")
        monkeypatch.setattr(head, "private_ip", "127.0.0.1")
        assert "@127.0.0.2:" in repr(cluster.tunnels())
        assert cluster._way().health() is not None  # there is no Ray
        assert cluster._way().address == "127.0.0.1"
        with cluster.tunnels(local_port="auto") as tunnels:
            assert f"@127.0.0.1:{embedded.port} " in repr(tunnels)
        monkeypatch.setattr(cluster, "_check_head", lambda *_, **__: None)
        with cluster._port(8265, "paramiko", False) as address:
            assert address.startswith("127.0.0.1:")


def test_tunnels_after_a_build_that_waited_for_ray(platform, embedded: SshServer, monkeypatch):
    """They go to the address at which the build has found Ray."""
    access = SSHAccess(
        embedded.user, embedded.key, port=embedded.port, host_key=embedded.host_key, ssh_config=False
    )
    with dashboard() as (agent, _), make(platform, access=access) as cluster:
        monkeypatch.setattr("yellowdog_ray.raydog.reach.AGENT", int(agent.rpartition(":")[2]))
        # Nothing listens at the one, and the server at the other.
        monkeypatch.setattr(cluster, "_new_reach", lambda _: Reach(["127.0.0.2", "127.0.0.1"], access))
        cluster.build(timedelta(seconds=20), until="ray")
        assert "@127.0.0.1:" in repr(cluster.tunnels())
    assert cluster._reach is None


def test_a_head_that_cannot_be_trusted(platform, embedded: SshServer, monkeypatch):
    """A build that waits for Ray is taken back at once where the head has another host key."""
    pin = f"SHA256:{'A' * 43}"
    access = SSHAccess(embedded.user, embedded.key, port=embedded.port, host_key=pin, ssh_config=False)
    cluster = make(platform, access=access)
    monkeypatch.setattr(cluster, "_new_reach", lambda _: Reach(["127.0.0.1"], access))
    began = time.monotonic()
    with pytest.raises(BuildError, match=r"cannot be asked whether Ray is well.*SHA256:AAAA") as caught:
        cluster.build(SHORT, until="ray")
    assert time.monotonic() - began < 10
    assert isinstance(caught.value.__cause__, HostKeyError)
    assert cluster._reach is None
    assert cluster.head_node_private_ip is None
