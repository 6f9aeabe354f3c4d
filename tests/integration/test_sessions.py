"""Ray Client sessions and jobs on a real cluster: directly, through tunnels, and without the token."""

from __future__ import annotations

import json
import os
import platform as python_platform
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.integration.conftest import kinds
from tests.ssh_fixtures import eventually
from yellowdog_ray import LocalPlatform, RayDogCluster
from yellowdog_ray.errors import ClusterStateError, RayDogError
from yellowdog_ray.local.isolation import LACKS, Isolation
from yellowdog_ray.raydog import ports
from yellowdog_ray.utils._tunnels.forwarder import Forwarder

pytestmark = pytest.mark.ray


def status_for_another_user(port: int) -> int:
    """Ask the dashboard for Ray's version, without a token, as another user where this one may do that."""
    receiver, sender = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            if os.geteuid() == 0:
                os.setuid(65534)
            with socket.create_connection(("127.0.0.1", port), timeout=10) as sock:
                sock.sendall(b"GET /api/version HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
                os.write(sender, sock.recv(100))
        finally:
            os._exit(0)
    os.close(sender)
    with os.fdopen(receiver, "rb") as pipe:
        answer = pipe.read()
    os.waitpid(child, 0)
    return int(answer.split()[1])


# Everything is imported before, from where another user may not look.
_STRANGER = """
import encodings.idna, http.client, json, os, sys
import grpc
host, token, others = sys.argv[1], sys.stdin.read(), json.loads(sys.argv[2])
grpc.insecure_channel("127.0.0.1:9").close()
if os.geteuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
def rpc(port, method, metadata=()):
    with grpc.insecure_channel(f"{host}:{port}", options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            channel.unary_unary(method)(b"", timeout=10, metadata=metadata)
        except grpc.RpcError as error:
            return error.code().name
    return "OK"
def page(port, method, path, **headers):
    connection = http.client.HTTPConnection(host, port, timeout=10)
    headers["Content-Type"] = "application/json"
    connection.request(method, path, json.dumps({"entrypoint": "true"}), headers)
    return connection.getresponse().status
def all_of(**headers):
    metadata = [(name.lower(), value) for name, value in headers.items()]
    return {
        "gcs": rpc(6379, "/ray.rpc.NodeInfoGcsService/GetAllNodeInfo", metadata),
        "client": rpc(10001, "/ray.rpc.RayletDriver/KVGet", metadata),
        "dashboard": page(8265, "GET", "/api/version", **headers),
        "jobs": page(8265, "POST", "/api/jobs/", **headers),
        "agent": page(52365, "POST", "/api/job_agent/jobs/", **headers),
    }
answers = {"none": all_of(), "wrong": all_of(Authorization="Bearer " + "f" * 64)}
answers["right"] = all_of(Authorization="Bearer " + token)
answers["metrics"] = {port: page(port, "GET", "/metrics") for port in others}
print(json.dumps(answers))
"""


def as_a_stranger(host: str, token: str, *metrics: int) -> dict[str, dict[str, Any]]:
    """Say what Ray on a head answers to another user of this machine: without a token, and with one."""
    done = subprocess.run(
        [sys.executable, "-c", _STRANGER, host, json.dumps(metrics)],
        input=token, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    answers: dict[str, dict[str, Any]] = json.loads(done.stdout)
    return answers


def run_job(cluster: RayDogCluster) -> str:
    """Run a job, and return what it printed."""
    with cluster.jobs() as jobs:
        job = jobs.submit_job(entrypoint="echo the answer is $((40 + 2))")
        assert eventually(lambda: jobs.get_job_status(job).is_terminal(), 60)
        return str(jobs.get_job_logs(job))


def refused(open_session: Callable[[], Any], said: str) -> None:
    """Check that a session is refused at once."""
    began = time.monotonic()
    with pytest.raises(RayDogError, match=said), open_session():
        pass
    assert time.monotonic() - began < 5


# What nodes are made of makes no difference here, but that those in user namespaces are reached by SSH only.
@pytest.mark.parametrize(
    "platform",
    [kind for kind in kinds() if kind is not Isolation.USER_NAMESPACES][:1],
    indirect=True,
    ids=lambda kind: kind.value,
)
def test_sessions(
    platform: LocalPlatform, make_cluster: Callable[..., RayDogCluster], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sessions and jobs work directly and over SSH; a lost connection ends no session; strangers fail."""
    import ray

    cluster = make_cluster(access="direct")
    cluster.build(timedelta(minutes=2))
    double = ray.remote(lambda number: 2 * number)
    with cluster.client(logging_level="ERROR"):
        assert ray.get(double.remote(21)) == 42
        refused(cluster.client, r"call ray.shutdown\(\) before")
    assert not ray.is_initialized()
    assert "the answer is 42" in run_job(cluster)

    # What docs/security.rst says of its ports, for whoever can reach the head.
    metrics = [ports.AUTOSCALER_METRICS, ports.DASHBOARD_METRICS]
    if "own-ports" not in LACKS[platform.isolation]:
        metrics.append(ports.NODE_METRICS)
    answers = as_a_stranger(str(cluster.head_node_private_ip), str(cluster._token), *metrics)
    refusal = {"gcs": "UNAUTHENTICATED", "client": "UNAUTHENTICATED"}
    assert answers["none"] == {**refusal, "dashboard": 401, "jobs": 401, "agent": 401}
    assert answers["wrong"] == {**refusal, "dashboard": 403, "jobs": 403, "agent": 403}
    # Without more than a token, the last is a client that has not said who it is.
    let_in = {"gcs": "OK", "dashboard": 200, "jobs": 200, "agent": 200, "client": "FAILED_PRECONDITION"}
    assert answers["right"] == let_in
    assert set(answers["metrics"].values()) == {200}
    # Another process, that has SSH, and does not know the head yet.
    (state_file,) = Path(os.environ["RAYDOG_STATE_DIR"]).glob("*.json")
    access = replace(platform.ssh_access, host_key=None)
    over_ssh = RayDogCluster.attach(state_file, platform.key_id, platform.secret, access=access)
    assert "the answer is 42" in run_job(over_ssh)
    with over_ssh.client(logging_level="ERROR", isolate=True):
        assert ray.get(double.remote(21)) == 42
    record = state_file.with_name(f".{state_file.name}.known_hosts")
    assert record.stat().st_mode & 0o777 == 0o600
    assert len(record.read_text().splitlines()) == 1

    @ray.remote
    class Counter:
        def __init__(self) -> None:
            self.count = 0

        def up(self) -> int:
            self.count += 1
            return self.count

    with over_ssh.tunnels(local_port="auto") as tunnels:
        tunnels.wait_for_ray(30)
        assert tunnels.client_address is not None
        assert tunnels.dashboard_url is not None
        assert status_for_another_user(tunnels.ports[8265]) == 401
        assert over_ssh.use_ray_auth()
        ray.init(tunnels.client_address, logging_level="ERROR")
        try:
            counter = Counter.remote()
            assert ray.get(counter.up.remote()) == 1
            end_ssh_connection(tunnels._engine)
            assert ray.get(counter.up.remote(), timeout=60) == 2
            assert tunnels.status().reconnects == 1
        finally:
            ray.shutdown()

    token = over_ssh._token
    for wrong, said in (("f" * 64, "does not accept the token"), (None, "asks for a token")):
        for one in (cluster, over_ssh):
            with monkeypatch.context() as patch:
                patch.setattr(one, "_token", wrong)
                patch.setattr(one, "_ray_token", lambda wrong=wrong: wrong)
                one._close_connections()
                refused(one.client, said)
                refused(one.jobs, said)
                one._close_connections()
    assert over_ssh._token == token

    with monkeypatch.context() as patch:
        patch.setattr(ray, "__version__", "2.1.0")
        refused(over_ssh.client, r"the head runs Ray .*, and here is 2\.1\.0")
    with monkeypatch.context() as patch:
        patch.setattr(python_platform, "python_version", lambda: "3.1.4")
        refused(over_ssh.client, r"the head runs Python .*, and here is 3\.1\.4.* Nothing was connected")
        assert "the answer is 42" in run_job(over_ssh)  # whose code runs on the head only

    over_ssh.shut_down()
    assert not record.exists()
    with pytest.raises(ClusterStateError, match="shut down"), over_ssh.client():
        pass


def end_ssh_connection(engine: Any) -> None:
    """Break the tunnels' SSH connection, as the network may do."""
    assert isinstance(engine, Forwarder)
    connection = engine._link._connection
    assert connection is not None
    connection.transport.sock.shutdown(socket.SHUT_RDWR)
    assert eventually(lambda: not connection.is_active)
