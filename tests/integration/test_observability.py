"""The observability node, with a real Prometheus, and what every node lets in."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.browser import launch
from yellowdog_ray import LocalPlatform, RayDogCluster, RayTunnels, SSHTunnelSpec
from yellowdog_ray.local.nodes import Isolation
from yellowdog_ray.raydog import ports
from yellowdog_ray.raydog.scripts import get_script

from .conftest import kinds
from .test_cluster import free_port

pytestmark = pytest.mark.ray

best = pytest.mark.parametrize("platform", kinds()[:1], indirect=True, ids=lambda kind: kind.value)

# There is no Grafana for this machine. What stands in for it listens where the node's grafana.ini says, and
# answers as Grafana does when Ray's dashboard asks whether it is well.
GRAFANA = """#!/usr/bin/env python3
import configparser, http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(b'{"database": "ok"}')
settings = configparser.ConfigParser(interpolation=None)
settings.read(next(word.partition("=")[2] for word in sys.argv if word.startswith("--config=")))
server = settings["server"]
http.server.ThreadingHTTPServer((server["http_addr"], server.getint("http_port")), Handler).serve_forever()
"""
SCRIPT = (
    "mkdir bin && cat >bin/grafana <<'END_OF_GRAFANA' && chmod 755 bin/grafana && PATH=\"$PWD/bin:$PATH\"\n"
    f"{GRAFANA}END_OF_GRAFANA\n"
    + get_script("observability")
    .replace("scrape_interval: 10s", "scrape_interval: 1s")
    .replace("refresh_interval: 5s", "refresh_interval: 1s")
)

JOB = """
import sys
import ray

ray.init(logging_level="ERROR")

@ray.remote
def observed(number):
    return number

assert sum(ray.get([observed.remote(number) for number in range(20)])) == 190
print("computed", flush=True)
sys.stdin.read()
"""


@dataclass
class Observed:
    """A cluster of a head, a worker and an observability node, and the tunnels that it makes by itself."""

    cluster: RayDogCluster
    platform: LocalPlatform
    tunnels: RayTunnels

    @property
    def head(self) -> str:
        return str(self.cluster.head_node_private_ip)

    def query(self, query: str) -> list[dict[str, Any]]:
        """Ask Prometheus; nothing where it does not answer yet."""
        url = f"{self.tunnels.prometheus_url}/api/v1/query?{urllib.parse.urlencode({'query': query})}"
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                result: list[dict[str, Any]] = json.load(answer)["data"]["result"]
                return result
        except OSError:
            return []

    def up(self) -> set[str]:
        """The addresses that Prometheus scrapes."""
        return {found["metric"]["instance"] for found in self.query("up == 1")}

    def dashboard_says(self, path: str) -> dict[str, Any]:
        request = urllib.request.Request(
            f"{self.tunnels.dashboard_url}{path}",
            headers={"Authorization": f"Bearer {os.environ['RAY_AUTH_TOKEN']}"},
        )
        with urllib.request.urlopen(request, timeout=15) as answer:
            said: dict[str, Any] = json.load(answer)
            return said

    def nodes(self) -> set[str]:
        """The addresses of all Ray nodes but the head."""
        return {node.address for node in self.cluster._way().ray_nodes() if node.alive and not node.is_head}


@pytest.fixture(scope="module")
def observed(platform: LocalPlatform, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Observed]:
    """One cluster for all tests of a platform, with tunnels to it."""
    if not shutil.which("prometheus"):
        pytest.skip("there is no prometheus on this machine")
    with ExitStack() as stack:
        cluster = stack.enter_context(
            RayDogCluster(
                platform.key_id,
                platform.secret,
                f"observed-{os.getpid()}-{platform.isolation.value[:1]}",
                platform.namespace,
                platform.template_names[0],
                None,
                platform.url,
                enable_observability=True,
                observability_node_compute_requirement_template_id=platform.template_names[0],
                observability_node_start_script=SCRIPT,
                state_file=tmp_path_factory.mktemp("states") / "observed.json",
                access=platform.ssh_access,
            )
        )
        cluster.add_worker_pool(platform.template_names[0], None, 1, "workers")
        cluster.build(timedelta(minutes=2), until="ray")
        tunnels = stack.enter_context(cluster.tunnels(local_port="auto"))
        yield Observed(cluster, platform, tunnels)
    assert platform.nodes() == []


def until(what: str, condition: Callable[[], Any], seconds: float = 60) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s: {what}"
        time.sleep(0.3)
    return found


@pytest.fixture(scope="module")
def job(observed: Observed) -> Iterator[None]:
    """A job in another process, which knows the cluster by what `raydog connect` says of its state file."""
    state = str(observed.cluster._journal.path)
    told = subprocess.run(
        [sys.executable, "-m", "yellowdog_ray.cli", "connect", "--json", state],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    (about,) = json.loads(told.stdout)
    variables = {**about["environment"], "RAY_ADDRESS": str(observed.tunnels.client_address)}
    assert variables["RAY_AUTH_TOKEN"] is None
    environment = {name: value for name, value in os.environ.items() if name not in variables}
    environment.update({name: value for name, value in variables.items() if value is not None})
    process = subprocess.Popen(
        [sys.executable, "-c", JOB],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin
    assert process.stdout
    try:
        assert process.stdout.readline() == "computed\n"
        yield
    finally:
        process.stdin.close()
        assert process.wait(30) == 0


def test_prometheus_sees_what_there_is(observed: Observed, job: None) -> None:
    """Prometheus scrapes every Ray node by Ray's own word, one that joins and until it leaves, and a job."""
    nodes = until("a worker", observed.nodes)
    everywhere = observed.platform.isolation is Isolation.PROCESSES
    special = {f"{observed.head}:{ports.AUTOSCALER_METRICS}", f"{observed.head}:{ports.DASHBOARD_METRICS}"}

    def expected() -> bool:
        up = observed.up()
        if not special <= up:
            return False
        # Plain processes share the machine's ports, so that there Ray chooses those for metrics.
        wanted = {observed.head, *nodes}
        if everywhere:
            return Counter(one.rpartition(":")[0] for one in up - special) == Counter(wanted)
        return up - special == {f"{one}:{ports.NODE_METRICS}" for one in wanted}

    until("the head and the worker", expected)
    assert observed.dashboard_says("/api/prometheus_health")["result"] is True
    grafana = observed.dashboard_says("/api/grafana_health")["data"]
    assert grafana["grafanaHost"] == f"http://localhost:{ports.GRAFANA}"
    assert grafana["dashboardDatasource"] == "Prometheus"
    with urllib.request.urlopen(f"{observed.tunnels.grafana_url}/api/health", timeout=10) as answer:
        assert json.load(answer) == {"database": "ok"}
    observed.cluster.scale_worker_pool("workers", 2)
    nodes = until("a second worker", lambda: found if len(found := observed.nodes()) == 2 else None)
    until("the second worker's metrics", expected)
    finished = 'sum(ray_tasks{Name="observed", State="FINISHED"})'
    until("the job's tasks", lambda: [one["value"][1] for one in observed.query(finished)] == ["20"])
    observed.cluster.scale_worker_pool("workers", 1)
    nodes = until("a worker less", lambda: found if len(found := observed.nodes()) == 1 else None)
    until("the removed worker's metrics to go", expected)


@best
def test_rays_dashboard_in_a_browser(observed: Observed) -> None:
    """Through the tunnel, Ray's dashboard asks for the token, then shows the nodes and Grafana's panels."""
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.wait import WebDriverWait

    with launch() as driver:
        wait = WebDriverWait(driver, 30)
        address = observed.tunnels.dashboard_url
        driver.get(f"{address}/#/cluster")
        field = wait.until(lambda page: page.find_element(By.CSS_SELECTOR, "[role=dialog] input"))
        assert observed.head not in driver.page_source
        field.send_keys(os.environ["RAY_AUTH_TOKEN"])
        driver.find_elements(By.CSS_SELECTOR, "[role=dialog] button")[-1].click()
        wait.until(lambda page: observed.head in page.page_source)
        wait.until(lambda page: all(node in page.page_source for node in observed.nodes()))
        driver.get(f"{address}/#/metrics")
        frames = wait.until(lambda page: page.find_elements(By.CSS_SELECTOR, "iframe"))
        sources = [str(frame.get_attribute("src")) for frame in frames]
        assert all(source.startswith(f"http://localhost:{ports.GRAFANA}/d/") for source in sources)
        assert all("var-datasource=Prometheus" in source for source in sources)
        # By these ids Grafana knows the dashboards that the observability node has.
        assert "rayDefaultDashboard" in {source.split("/")[4] for source in sources}


LISTENING = """
import glob, json, os, struct, socket
owners = {}
for link in glob.glob("/proc/[0-9]*/fd/*"):
    try:
        target = os.readlink(link)
        if target.startswith("socket:["):
            with open(link.rpartition("/fd/")[0] + "/cmdline") as file:
                owners[target[8:-1]] = file.read().replace("\\0", " ").strip()
    except OSError:
        pass
found = []
for kind, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
    with open("/proc/net/" + kind) as file:
        for line in list(file)[1:]:
            fields = line.split()
            if fields[3] == "0A":
                address, port = fields[1].split(":")
                words = struct.unpack(f">{len(address) // 8}I", bytes.fromhex(address))
                text = socket.inet_ntop(family, struct.pack(f"={len(words)}I", *words))
                found.append((text.removeprefix("::ffff:"), int(port, 16), owners.get(fields[9], "?")))
print(json.dumps(found))
"""

# What Ray lets listen at every address of a node, unless the whole of Ray is on localhost; no option of Ray
# changes that (looked for in Ray 2.52 and 2.60). By a part of the process's command line: how many ports.
RAYS_OWN = {
    # Workers join there.
    "/gcs_server ": 1,
    # The node manager and the object manager, for the other nodes.
    "/raylet ": 2,
    # The metrics (prometheus_client), and a port for the dashboard.
    "ray::DashboardAgent": 2,
    # The autoscaler's metrics, and the dashboard's.
    "/monitor.py ": 1,
    "/dashboard.py ": 1,
}
# Each of Ray's workers, and a client's driver, listens for the others.
RAYS_WORKERS = ("ray::", "ray.util.client.server", "/default_worker.py")


# Whether Ray's dashboard answers there, as far as it does so without the token.
ASKING = """
import json, urllib.request
try:
    with urllib.request.urlopen("http://%s:8265/api/authentication_mode", timeout=10) as answer:
        print(json.dumps(answer.status))
except OSError as error:
    print(json.dumps(str(error)))
"""


def run_on(observed: Observed, address: str, program: str, directory: Path) -> Any:
    """Run a Python program on a node, over SSH through the head, and return the JSON that it prints."""
    platform, port = observed.platform, free_port()
    way = SSHTunnelSpec("localhost", port, address, platform.ssh_port)
    options = {
        "StrictHostKeyChecking": "no",
        "UserKnownHostsFile": str(directory / "hosts"),
        "LogLevel": "ERROR",
    }
    with observed.cluster.tunnels([way]):
        done = subprocess.run(
            [
                *("ssh", "-p", str(port), "-i", platform.ssh_private_key_file),
                *(f"-o{name}={value}" for name, value in options.items()),
                *(f"{platform.ssh_user}@127.0.0.1", "python3", "-"),
            ],
            input=program,
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        )
    return json.loads(done.stdout)


@best
def test_nothing_listens_wider_than_it_must(observed: Observed, job: None, tmp_path: Path) -> None:
    """Services are at their node's localhost or private address, but for a known list of Ray's own."""
    nodes = {"head": observed.head, "observability": str(observed.cluster.observability_node_private_ip)}
    (nodes["worker"],) = until("a worker", observed.nodes)
    fixed = {
        "head": {
            ("127.0.0.1", ports.DASHBOARD),
            (observed.head, ports.DASHBOARD),
            ("127.0.0.1", ports.CLIENT),
            (observed.head, ports.CLIENT),
        },
        "observability": {
            (nodes["observability"], ports.PROMETHEUS),
            (nodes["observability"], ports.GRAFANA),
        },
        "worker": set(),
    }
    for role, address in nodes.items():
        found = run_on(observed, address, LISTENING, tmp_path)
        narrow = {(text, port) for text, port, _ in found if text in ("127.0.0.1", "::1", address)}
        assert fixed[role] <= narrow, (role, found)
        wide = [(port, owner) for text, port, owner in found if (text, port) not in narrow]
        counted: Counter[str] = Counter()
        for port, owner in wide:
            known = next((name for name in RAYS_OWN if name in f"{owner} "), None)
            if known is not None:
                counted[known] += 1
            else:
                assert any(name in owner for name in RAYS_WORKERS), (role, port, owner)
                assert port >= 10002
        on_workers = {name: RAYS_OWN[name] for name in ("/raylet ", "ray::DashboardAgent")}
        assert counted == {"head": RAYS_OWN, "worker": on_workers, "observability": {}}[role], (role, wide)
        numbers = {port for port, owner in wide if any(name in f"{owner} " for name in RAYS_OWN)}
        metrics = {ports.NODE_METRICS} if role != "observability" else set()
        if role == "head":
            metrics |= {ports.GCS, ports.AUTOSCALER_METRICS, ports.DASHBOARD_METRICS}
        assert metrics <= numbers
    asked = {role: run_on(observed, node, ASKING % observed.head, tmp_path) for role, node in nodes.items()}
    assert asked["head"] == asked["observability"] == 200
    assert "reset" in asked["worker"] or "closed" in asked["worker"], asked
