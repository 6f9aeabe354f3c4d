"""What a cluster with a way to its nodes can do: ask Ray itself, read and keep logs, notice a dead head."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest

from tests.integration.test_cluster import free_port
from yellowdog_ray import LocalPlatform, RayDogCluster, SSHTunnelSpec
from yellowdog_ray.errors import ClusterStateError
from yellowdog_ray.raydog import events, watch
from yellowdog_ray.raydog.scripts import get_script

pytestmark = pytest.mark.ray


def wait_until(condition, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_life_with_access(platform, make_cluster, nothing_runs, tmp_path, monkeypatch):
    """Build until Ray answers, count its nodes, read logs, come back elsewhere, scale, lose the head."""
    monkeypatch.setattr(watch, "SECONDS", 0.5)
    seen: list[events.Event] = []
    name = f"access-{os.getpid()}"
    kept = tmp_path / "logs"
    script = "echo a worker says hello\n" + get_script("worker")
    cluster: RayDogCluster = make_cluster(
        cluster_name=name, access=platform.ssh_access, on_event=seen.append, keep_logs=kept
    )
    cluster.add_worker_pool(platform.template_names[0], script, 1, "small")
    cluster.build(timedelta(minutes=2), until="ray")
    # Ray answers: nothing has to be waited for.
    with cluster.tunnels([SSHTunnelSpec("localhost", free_port(), "localhost", 8265)]) as tunnels:
        tunnels.wait_for_ray(0.1)
    workers = cluster.wait_for_workers(timeout=60)
    assert (workers, workers.source) == (1, "ray")

    logs = cluster.get_logs()
    assert set(logs) == {"head-node", "worker-nodes-01-00001"}
    assert logs["worker-nodes-01-00001"].text.startswith("a worker says hello")
    assert logs["worker-nodes-01-00001"].source == "node"
    assert "Ray runtime started" in logs["head-node"].text

    state_file = next(Path(os.environ["RAYDOG_STATE_DIR"]).glob("*.json"))
    again = RayDogCluster.attach(
        state_file, platform.key_id, platform.secret, access=platform.ssh_access, keep_logs=kept
    )
    again.scale_worker_pool("small", 2)
    assert again.wait_for_workers(2, timeout=60).source == "ray"
    status = again.status()
    assert status.healthy, str(status)
    assert (status.pools["small"].wanted, status.pools["small"].executing) == (2, 2)
    again.scale_worker_pool("small", 1)
    wait_until(lambda: len(platform.nodes()) == 2)

    again.remove_worker_pool_by_internal_name("small")
    assert (kept / name / "small" / "worker-nodes-01-00001.log").read_text().startswith("a worker says hello")
    assert cluster.get_logs("small")["worker-nodes-01-00001"].source == "kept"
    assert cluster.worker_pool_internal_names == []

    # The head's Ray is ended from within: its task fails, and the cluster ends itself.
    head = cluster.get_logs("head-node")["head-node"]
    assert head.source == "node"
    access = platform.ssh_access
    subprocess.run(
        [
            *("ssh", "-i", str(access.private_key_file), "-p", str(access.port), "-o", "LogLevel=ERROR"),
            *("-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null"),
            f"{access.user}@{cluster.head_node_public_ip}",
            "pid=$(pgrep -u $(id -u) -f gcs_server | head -1); kill -9 $pid",
        ],
        check=True,
        timeout=30,
    )
    # While it is "being shut down", the state file is still there.
    wait_until(lambda: ", shut down" in repr(cluster))
    assert any(isinstance(event, events.HeadFailed) for event in seen)
    assert "its head has ended" in str(cluster.status().failure)
    with pytest.raises(ClusterStateError, match="its head has ended"):
        cluster.add_worker_pool(platform.template_names[0], None, 1)
    assert cluster.get_logs()["worker-nodes-01-00001"].source == "kept"
    assert not state_file.exists()
    nothing_runs()


_BUILD = """
import sys
from yellowdog_ray import RayDogCluster
url, key, secret, namespace, template, name = sys.argv[1:]
cluster = RayDogCluster(key, secret, name, namespace, template, None, url)
cluster.add_worker_pool(template, None, 1)
cluster.build()
print("built", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("moment", [0.4, "built"])
def test_killed_builder(platform: LocalPlatform, nothing_runs, moment):
    """A builder that is killed with -9 leaves a state file, and the night script ends its real nodes."""
    name = f"killed-{os.getpid()}-{platform.isolation.value}-{1 if moment == 'built' else 0}"
    account = (platform.url, platform.key_id, platform.secret, platform.namespace)
    arguments = [*account, platform.template_names[0], name]
    builder = subprocess.Popen(
        [sys.executable, "-c", _BUILD, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    directory = Path(os.environ["RAYDOG_STATE_DIR"])
    if moment == "built":
        assert builder.stdout is not None
        assert builder.stdout.readline() == "built\n"
    else:
        wait_until(lambda: list(directory.glob("*.json")))
        time.sleep(moment)
    builder.send_signal(signal.SIGKILL)
    builder.wait(10)
    assert list(directory.glob("*.json"))
    done = subprocess.run(
        [sys.executable, "-m", "yellowdog_ray.cli", "shut-down", *map(str, directory.glob("*.json"))],
        env={**os.environ, "YD_API_KEY_ID": platform.key_id, "YD_API_KEY_SECRET": platform.secret},
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert not list(directory.glob("*.json"))
    nothing_runs()
