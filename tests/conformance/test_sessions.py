"""Tunnels and sessions of a cluster, as far as they need no node."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tests.clusters import SHORT, make
from tests.controlplane import TEMPLATE
from tests.ssh_fixtures import SshServer, embedded
from yellowdog_ray.errors import BuildError, ClusterStateError, HostKeyError, SpecError
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
    assert cluster.head_node_private_ip is None
