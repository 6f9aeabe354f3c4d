"""Ray Client sessions and jobs on a real cluster: directly, through tunnels, and without the token."""

from __future__ import annotations

import contextlib
import json
import os
import platform as python_platform
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.integration.conftest import kinds
from tests.ssh_fixtures import eventually
from yellowdog_ray import LocalPlatform, RayDogCluster, RayTunnels
from yellowdog_ray.errors import ClusterStateError, RayDogError
from yellowdog_ray.local.belonging import processes_of
from yellowdog_ray.local.isolation import LACKS, Isolation
from yellowdog_ray.raydog.ports import (
    AGENT,
    AUTOSCALER_METRICS,
    CLIENT,
    DASHBOARD,
    DASHBOARD_METRICS,
    GCS,
    NODE_METRICS,
)
from yellowdog_ray.utils._tunnels.forwarder import Forwarder

pytestmark = pytest.mark.ray


# Another user of this machine, where this one may become one. Everything is imported before, from where that
# user may not look.
STRANGER = """
import encodings.idna, http.client, json, os, sys
import grpc
given = json.load(sys.stdin)
grpc.insecure_channel("127.0.0.1:9").close()
if os.geteuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
def rpc(port, method, metadata=()):
    target, options = f"{given['host']}:{port}", [("grpc.enable_http_proxy", 0)]
    with grpc.insecure_channel(target, options=options) as channel:
        try:
            channel.unary_unary(method)(b"", timeout=10, metadata=metadata)
        except grpc.RpcError as error:
            return error.code().name
    return "OK"
def page(port, method, path, **headers):
    connection = http.client.HTTPConnection(given["host"], port, timeout=10)
    headers["Content-Type"] = "application/json"
    connection.request(method, path, json.dumps({"entrypoint": "true"}), headers)
    return connection.getresponse().status
def all_of(**headers):
    metadata = [(name.lower(), value) for name, value in headers.items()]
    ask = {
        "gcs": lambda port: rpc(port, "/ray.rpc.NodeInfoGcsService/GetAllNodeInfo", metadata),
        "client": lambda port: rpc(port, "/ray.rpc.RayletDriver/KVGet", metadata),
        "dashboard": lambda port: page(port, "GET", "/api/version", **headers),
        "jobs": lambda port: page(port, "POST", "/api/jobs/", **headers),
        "agent": lambda port: page(port, "POST", "/api/job_agent/jobs/", **headers),
    }
    return {name: ask[name](port) for name, port in given["ports"].items()}
answers = {"none": all_of(), "wrong": all_of(Authorization="Bearer " + "f" * 64)}
answers["right"] = all_of(Authorization="Bearer " + given["token"])
answers["metrics"] = {port: page(port, "GET", "/metrics") for port in given["metrics"]}
print(json.dumps(answers))
"""


def check_strangers(host: str, ports: dict[str, int], token: str, *metrics: int) -> None:
    """Check what Ray on a head answers to another user of this machine: without a token, and with one."""
    given = {"host": host, "ports": ports, "token": token, "metrics": metrics}
    done = subprocess.run(
        [sys.executable, "-c", STRANGER],
        env={name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
        input=json.dumps(given),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout)
    refusal = {"gcs": "UNAUTHENTICATED", "client": "UNAUTHENTICATED"}
    # Without more than a token, the client is one that has not said who it is.
    let_in = {"gcs": "OK", "dashboard": 200, "jobs": 200, "agent": 200, "client": "FAILED_PRECONDITION"}
    for who, expected in (
        ("none", {**refusal, "dashboard": 401, "jobs": 401, "agent": 401}),
        ("wrong", {**refusal, "dashboard": 403, "jobs": 403, "agent": 403}),
        ("right", let_in),
    ):
        assert answers[who] == {name: expected[name] for name in ports}
    assert answers["metrics"] == {str(port): 200 for port in metrics}


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
    metrics = [AUTOSCALER_METRICS, DASHBOARD_METRICS]
    if "own-ports" not in LACKS[platform.isolation]:
        metrics.append(NODE_METRICS)
    ports = {"gcs": GCS, "client": CLIENT, "dashboard": DASHBOARD, "jobs": DASHBOARD, "agent": AGENT}
    check_strangers(str(cluster.head_node_private_ip), ports, str(cluster._token), *metrics)

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

    specs = [RayTunnels.basic_port_forward(port) for port in (CLIENT, DASHBOARD, GCS)]
    with over_ssh.tunnels(specs, local_port="auto") as tunnels:
        tunnels.wait_for_ray(30)
        assert tunnels.client_address is not None
        local = {name: tunnels.ports[port] for name, port in ports.items() if port in tunnels.ports}
        check_strangers("127.0.0.1", local, str(over_ssh._ray_token()))
        assert over_ssh.use_ray_auth()
        ray.init(tunnels.client_address, logging_level="ERROR")
        try:
            counter = Counter.remote()
            assert ray.get(counter.up.remote()) == 1
            end_ssh_connections(platform, tunnels._engine)
            assert ray.get(counter.up.remote(), timeout=60) == 2
            assert tunnels.status().reconnects == 1
            if networks(platform):
                began = time.monotonic()
                with cut_off(platform, str(over_ssh.head_node_private_ip), 10):
                    assert ray.get(counter.up.remote(), timeout=60) == 3
                    assert time.monotonic() - began > 9  # the answer had to wait
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


def networks(platform: LocalPlatform) -> dict[str, int]:
    """The networks of a platform's nodes, where they have their own, each with a process that is in it."""
    found = {}
    for pid in processes_of(platform.directory):
        with contextlib.suppress(OSError):
            found[os.readlink(f"/proc/{pid}/ns/net")] = pid
    found.pop(os.readlink("/proc/self/ns/net"), None)
    return found


def end_ssh_connections(platform: LocalPlatform, engine: Any) -> None:
    """Kill what serves the SSH connections to the nodes, or break that of the tunnels as a network may do."""
    assert isinstance(engine, Forwarder)
    connection = engine._link._connection
    assert connection is not None
    if nets := networks(platform):
        for pid in (int(name) for name in os.listdir("/proc") if name.isdigit()):
            with contextlib.suppress(OSError):
                command = Path(f"/proc/{pid}/cmdline").read_bytes()
                if command.startswith(b"sshd") and os.readlink(f"/proc/{pid}/ns/net") in nets:
                    os.kill(pid, signal.SIGKILL)
    else:  # the nodes are plain processes, each with one server for all connections
        connection.transport.sock.shutdown(socket.SHUT_RDWR)
    assert eventually(lambda: not connection.is_active)


# In a node's network: cuts its line for some seconds.
CUT = """
import sys, time
from pyroute2 import IPRoute
with IPRoute() as here:
    for one in here.get_addr(address=sys.argv[1]):
        here.link("set", index=one["index"], state="down")
        print("cut", flush=True)
        time.sleep(float(sys.argv[2]))
        here.link("set", index=one["index"], state="up")
"""


@contextlib.contextmanager
def cut_off(platform: LocalPlatform, address: str, seconds: float) -> Iterator[None]:
    """Cut the line to a node, and mend it after a while, whether or not the block has ended."""
    for pid in networks(platform).values():
        command = ["nsenter", f"--net=/proc/{pid}/ns/net", sys.executable, "-c", CUT, address, str(seconds)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            if process.stdout.readline() == "cut\n":
                yield
                assert process.wait(30) == 0
                return
    pytest.fail(f"no node has the address {address}")
