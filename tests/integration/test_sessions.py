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
from yellowdog_ray.local.isolation import Isolation
from yellowdog_ray.local.linux import processes_with
from yellowdog_ray.local.supervisor import NODE_FILES
from yellowdog_ray.raydog.ports import CLIENT, DASHBOARD, GCS
from yellowdog_ray.utils._tunnels.forwarder import Forwarder

pytestmark = pytest.mark.ray


# Another user of this machine, where this one may become one. All of Python is loaded before, as that user
# may not be able to read it.
STRANGER = """
import encodings.idna, http.client, json, os, sys
import grpc, grpc._channel
given = json.load(sys.stdin)
if os.geteuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
said = {"jobs": []}
for token in given["tokens"]:
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    connection = http.client.HTTPConnection("127.0.0.1", given["dashboard"], timeout=10)
    connection.request("POST", "/api/jobs/", '{"entrypoint": "id", "job_id": "stranger"}', headers)
    said["jobs"].append(connection.getresponse().status)
    connection.close()
for method, port in given["methods"].items():
    codes = said[method] = []
    for token in given["tokens"] + given["right"]:
        metadata = [] if token is None else [("authorization", f"Bearer {token}")]
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            try:
                channel.unary_unary(method)(b"", timeout=10, metadata=metadata)
                codes.append("OK")
            except grpc.RpcError as error:
                codes.append(error.code().name)
print(json.dumps(said))
"""


def check_strangers(ports: dict[int, int], token: str) -> None:
    """Check that without the right token nobody gets anything from the dashboard, Ray Client and the GCS.

    :param ports: local ones, by those of the head.
    """
    methods = {
        "/ray.rpc.RayletDriver/ClusterInfo": ports[CLIENT],
        "/ray.rpc.InternalKVGcsService/InternalKVGet": ports[GCS],
        "/ray.rpc.NodeInfoGcsService/GetAllNodeInfo": ports[GCS],
    }
    given = {"dashboard": ports[DASHBOARD], "methods": methods, "tokens": [None, "f" * 64], "right": [token]}
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
    said = json.loads(done.stdout)
    assert said.pop("jobs") == [401, 403]
    assert list(said) == list(methods)
    for codes in said.values():
        assert codes[:2] == ["UNAUTHENTICATED", "UNAUTHENTICATED"]
        assert codes[2] != "UNAUTHENTICATED"  # so that it is the token that makes the difference


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
        check_strangers(tunnels.ports, str(over_ssh._ray_token()))
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
    for pid in processes_with(NODE_FILES, platform.directory):
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
