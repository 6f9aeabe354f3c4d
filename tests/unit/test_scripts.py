"""The default scripts, run by a real Bash with a stand-in for ``ray``."""

from __future__ import annotations

import configparser
import contextlib
import json
import os
import re
import signal
import socket
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from tests.ssh_fixtures import eventually
from yellowdog_ray import raydog
from yellowdog_ray.errors import SpecError
from yellowdog_ray.raydog import ports
from yellowdog_ray.raydog.scripts import get_script, script_names

MIRROR = Path(__file__).parents[2] / "examples" / "builder" / "scripts"

# As the real one does, `ray stop` gives the others time to end.
RAY = """#!/bin/bash
[ "$1" != start ] || trap 'echo "ray start got TERM" >>"$CALLS"; exit 1' TERM
echo "ray $*" >>"$CALLS"
case "$1" in
    stop)  sleep 0.3 ;;
    start) [ -z "${RAY_EXITS:-}" ] || exit "$RAY_EXITS"
           while true; do read -rt 0.05 <> <(:) || :; done ;;
esac
"""


@contextmanager
def listening(address: str) -> Iterator[str]:
    """Listen on Ray's port of a loopback address; a Ray of the user's own may have it on all of them."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((address, 6379))
        except OSError as error:
            pytest.skip(f"port 6379 of {address} is taken: {error}")
        listener.listen()
        yield address


class Agent:
    """A node's agent: runs a script as the platform's does."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.calls = home / "calls"
        self.calls.write_text("")
        venv = home / "venv" / "bin"
        venv.mkdir(parents=True)
        (venv / "activate").write_text(f'export PATH="{venv}:$PATH"\n')
        self.install("ray", RAY)

    def install(self, name: str, text: str) -> None:
        path = self.home / "venv" / "bin" / name
        path.write_text(text)
        path.chmod(0o755)

    def start(self, script: str, **environment: str) -> subprocess.Popen[str]:
        text = script if "\n" in script else get_script(script)
        (self.home / "taskdata.txt").write_text(text)
        clean = {key: value for key, value in os.environ.items() if not key.startswith("RAY")}
        return subprocess.Popen(
            ["/bin/bash", "taskdata.txt"],
            cwd=self.home,
            env={**clean, "YD_AGENT_HOME": str(self.home), "CALLS": str(self.calls), **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def wait_for_call(self, text: str) -> None:
        deadline = time.monotonic() + 10
        while text not in self.calls.read_text():
            assert time.monotonic() < deadline, f"no call of {text!r}: {self.calls.read_text()!r}"
            time.sleep(0.01)


@pytest.fixture
def agent(tmp_path):
    return Agent(tmp_path)


@pytest.fixture
def head():
    """Something that listens where a Ray head would; port 6379 of an address of its own."""
    with listening(f"127.{os.getpid() % 200 + 20}.77.1") as address:
        yield address


@pytest.mark.parametrize("name", script_names())
def test_syntax(name):
    """Bash can read every script."""
    subprocess.run(["bash", "-n"], input=get_script(name), text=True, check=True)


@pytest.mark.parametrize("name", script_names())
def test_mirror(name):
    """The examples hold the same scripts."""
    assert (MIRROR / f"{name}.sh").read_text(encoding="utf-8") == get_script(name)


def test_nothing_else_in_the_mirror():
    """The examples hold no script that the package does not have."""
    assert {path.name for path in MIRROR.iterdir()} == {f"{name}.sh" for name in script_names()}


@pytest.mark.parametrize("name", script_names())
def test_no_secrets(name):
    """No script holds a key, a password or somebody's name."""
    text = get_script(name)
    assert not re.search(r"ssh-(rsa|ed25519)|BEGIN .*KEY|AKIA|admin_password|/home/\w", text)
    assert not re.search(r"(?i)\b(password|passwd|secret|token)\s*[=:]\s*[\"']?\w", text)


def test_unknown_script():
    """A script that is not there is answered with those that are."""
    with pytest.raises(SpecError, match="head, worker, observability, node-setup"):
        get_script("heads")


@pytest.mark.parametrize("script", ["head", "worker"])
def test_abort_stops_ray(agent, head, script):
    """SIGTERM to the script alone stops Ray, leaves no child behind, and ends it with 143, at once."""
    process = agent.start(script, RAY_HEAD_IP=head)
    agent.wait_for_call("ray start")
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=10)
    assert process.returncode == 143
    assert time.monotonic() - began < 5
    assert "Ray stopped" in output
    calls = agent.calls.read_text()
    assert "ray stop" in calls
    assert "ray start got TERM" in calls


@pytest.mark.parametrize("script", ["head", "worker"])
def test_ray_is_told_the_nodes_size(agent, head, script):
    """Where a node has a size of its own Ray is told it, unless the script says another one itself."""
    size = {"RAYDOG_NODE_VCPUS": "3", "RAYDOG_NODE_MEMORY": str(10 << 30)}
    sized = {"--num-cpus": "3", "--memory": str(7 << 30), "--object-store-memory": str(3 << 30)}
    text = get_script(script)
    zero = text.replace("--block", "--block --num-cpus=0")
    for script_text, environment, told in (
        (text, size, sized),
        (text, {}, {}),
        (zero, size, {**sized, "--num-cpus": "0"}),
    ):
        agent.calls.write_text("")
        process = agent.start(script_text, RAY_HEAD_IP=head, RAY_EXITS="0", **environment)
        process.communicate(timeout=10)
        (call,) = [line for line in agent.calls.read_text().splitlines() if line.startswith("ray start")]
        # Of an option that is given twice, Ray takes the last.
        given = dict(option.partition("=")[::2] for option in call.split()[2:])
        assert {name: value for name, value in given.items() if name in sized} == told


@pytest.mark.parametrize("script", ["head", "worker"])
@pytest.mark.parametrize("code", ["0", "7"])
def test_exit_code_is_rays(agent, head, script, code):
    """When Ray ends, the task ends with its exit code."""
    process = agent.start(script, RAY_HEAD_IP=head, RAY_EXITS=code)
    process.communicate(timeout=10)
    assert process.returncode == int(code)
    assert "ray stop" in agent.calls.read_text()


@pytest.mark.parametrize("script", ["head", "worker"])
def test_no_virtual_environment(tmp_path, script, agent):
    """Where Ray was never installed, the script says where it looked, and fails."""
    process = agent.start(script, YD_AGENT_HOME=str(tmp_path / "nowhere"), RAY_HEAD_IP="127.0.0.1")
    output, _ = process.communicate(timeout=10)
    assert process.returncode == 1
    assert f"no virtual environment in {tmp_path}/nowhere/venv" in output


def test_head_options(agent):
    """The head listens at the address the workers are told; its dashboard at its localhost only."""
    process = agent.start("head", RAYDOG_NODE_IP="10.1.2.3", RAY_EXITS="0")
    process.communicate(timeout=10)
    call = agent.calls.read_text().splitlines()[0]
    for option in (
        "--head",
        "--block",
        "--port=6379",
        "--ray-client-server-port=10001",
        "--dashboard-port=8265",
    ):
        assert option in call.split()
    assert "--node-ip-address=10.1.2.3" in call.split()
    assert "--dashboard-host=127.0.0.1" in call.split()


def test_head_whose_dashboard_all_may_reach(agent):
    """Without SSH the dashboard is reached at the node's address; it listens on localhost nevertheless."""
    agent.install("python", f'#!/bin/bash\necho "python $*" >>"$CALLS"\nexec {sys.executable} "$@"\n')
    own = f"127.{os.getpid() % 200 + 20}.77.5"
    process = agent.start("head", RAYDOG_DASHBOARD_DIRECT="1", RAYDOG_NODE_IP=own)
    agent.wait_for_call("ray start")
    agent.wait_for_call(f"python - {own} 8265 any")
    process.terminate()
    process.communicate(timeout=10)
    assert "--dashboard-host=127.0.0.1" in agent.calls.read_text()


def test_head_with_observability(agent):
    """The dashboard stays on localhost; its way for Prometheus lets the observability node through alone."""
    agent.install("ray", RAY + 'env | grep -E "^RAY_(PROM|GRAF|USAGE)|_METRIC_PORT" >>"$CALLS"\n')
    agent.install("python", f'#!/bin/bash\necho "python $*" >>"$CALLS"\nexec {sys.executable} "$@"\n')
    own = f"127.{os.getpid() % 200 + 20}.77.3"
    process = agent.start("head", OBSERVABILITY_HOST="10.1.2.4", RAYDOG_NODE_IP=own)
    agent.wait_for_call("ray start")
    agent.wait_for_call(f"python - {own} 8265 10.1.2.4")
    process.terminate()
    process.communicate(timeout=10)
    calls = agent.calls.read_text()
    assert "--dashboard-host=127.0.0.1" in calls
    assert "RAY_PROMETHEUS_HOST=http://10.1.2.4:9090" in calls
    assert "RAY_GRAFANA_HOST=http://10.1.2.4:3000" in calls
    assert "RAY_GRAFANA_IFRAME_HOST=http://localhost:3000" in calls
    assert "RAY_USAGE_STATS_ENABLED=0" in calls
    assert f"AUTOSCALER_METRIC_PORT={ports.AUTOSCALER_METRICS}" in calls
    assert f"DASHBOARD_METRIC_PORT={ports.DASHBOARD_METRICS}" in calls
    assert processes_in(agent.home) == []


def test_the_relay(tmp_path):
    """It passes on both ways, as often as one likes, from machines that may; and refuses others."""
    relay = Path(raydog.__file__).parent / "observability" / "relay.py"
    inside, outside = f"127.{os.getpid() % 200 + 20}.77.4", "10.9.9.9"
    with (
        socketserver.ThreadingTCPServer(("127.0.0.1", 0), Shouter) as server,
        contextlib.ExitStack() as stack,
    ):
        threading.Thread(target=server.serve_forever, daemon=True).start()
        stack.callback(server.shutdown)
        port = server.server_address[1]
        process = stack.enter_context(
            subprocess.Popen([sys.executable, str(relay), inside, str(port), outside])
        )
        stack.callback(process.terminate)
        deadline = time.monotonic() + 10
        while True:
            with (
                contextlib.suppress(ConnectionRefusedError),
                socket.create_connection((inside, port)) as client,
            ):
                break
            assert time.monotonic() < deadline
            time.sleep(0.05)
        for text in ("hello", "x" * 300_000):
            with socket.create_connection((inside, port), 10) as client, client.makefile("rw") as stream:
                stream.write(f"{text}\n")
                stream.flush()
                assert stream.readline() == f"{text.upper()}\n"
        # Who has nothing more to ask still gets the answer.
        with socket.create_connection((inside, port), 10) as client, client.makefile("r") as stream:
            client.sendall(b"no end of line")
            client.shutdown(socket.SHUT_WR)
            assert stream.read() == "NO END OF LINE"
        # More than a hundred at once are refused, the others are not disturbed, and later all is as before.
        with contextlib.ExitStack() as crowd:
            clients = [crowd.enter_context(socket.create_connection((inside, port), 10)) for _ in range(110)]
            assert clients[109].recv(1) == b""
            clients[50].sendall(b"still here\n")
            assert clients[50].recv(100) == b"STILL HERE\n"
            clients[40].close()
            assert eventually(lambda: served(inside, port))
        server.server_close()
        with socket.create_connection((inside, port), 10) as client:
            assert client.recv(1) == b""


def served(address: str, port: int) -> bool:
    """Tell whether a line is answered."""
    with socket.create_connection((address, port), 10) as client, contextlib.suppress(ConnectionError):
        client.sendall(b"hello\n")
        return client.recv(100) == b"HELLO\n"
    return False


def test_the_head_says_that_its_relay_has_ended(agent):
    """Where the relay cannot listen, the head's output says so, and Ray runs on."""
    process = agent.start("head", OBSERVABILITY_HOST="10.1.2.4", RAYDOG_NODE_IP="192.0.2.1")
    agent.wait_for_call("ray start")
    assert process.stdout is not None
    said = ""
    while "has ended with exit status 1" not in said:
        said = process.stdout.readline()
        assert said, "the output has ended"
    assert process.poll() is None
    process.terminate()
    process.communicate(timeout=10)
    assert processes_in(agent.home) == []


class Shouter(socketserver.StreamRequestHandler):
    """Answers a line in capitals."""

    def handle(self) -> None:
        self.wfile.write(self.rfile.readline().upper())


@pytest.mark.parametrize("variable", ["RAY_HEAD_IP", "RAY_HEAD_NODE_PRIVATE_IP"])
def test_worker_joins_when_the_head_listens(agent, variable):
    """A worker that is there first waits, and joins within a moment of the head's listening."""
    address = f"127.{os.getpid() % 200 + 20}.77.2"
    process = agent.start("worker", **{variable: address})
    time.sleep(0.5)
    assert "ray start" not in agent.calls.read_text()
    with listening(address):
        began = time.monotonic()
        agent.wait_for_call("ray start")
        assert time.monotonic() - began < 2
    assert f"--address={address}:6379" in agent.calls.read_text()
    process.terminate()
    process.communicate(timeout=10)


def test_worker_gives_up(agent):
    """A worker whose head never listens ends at its deadline and names host and port."""
    process = agent.start("worker", RAY_HEAD_IP="127.0.0.99", RAYDOG_HEAD_WAIT_SECONDS="1")
    began = time.monotonic()
    output, _ = process.communicate(timeout=20)
    assert process.returncode == 1
    assert time.monotonic() - began < 5
    assert "127.0.0.99 port 6379 did not listen within 1 s" in output
    assert agent.calls.read_text() == ""


@contextmanager
def silent(address: str) -> Iterator[str]:
    """Take an address at which connections are neither accepted nor refused, as behind a firewall."""
    with contextlib.ExitStack() as sockets:
        listener = sockets.enter_context(socket.socket())
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((address, 6379))
        listener.listen(0)
        # Once its queue is full, the kernel drops what else comes.
        for _ in range(8):
            client = sockets.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex((address, 6379))
        yield address


def test_worker_gives_up_behind_a_firewall(agent):
    """A worker whose connections are dropped gives up at its deadline too."""
    with silent("127.0.0.13") as address:
        began = time.monotonic()
        process = agent.start("worker", RAY_HEAD_IP=address, RAYDOG_HEAD_WAIT_SECONDS="1")
        output, _ = process.communicate(timeout=20)
        assert process.returncode == 1
        assert f"{address} port 6379 did not listen within 1 s" in output
        assert time.monotonic() - began < 10


def test_worker_is_aborted_behind_a_firewall(agent):
    """A worker whose connections are dropped can be aborted while it tries."""
    with silent("127.0.0.14") as address:
        process = agent.start("worker", RAY_HEAD_IP=address)
        time.sleep(1)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=5)
        assert process.returncode == 143


def test_worker_is_aborted_while_it_waits(agent):
    """Waiting for the head does not keep a worker from being aborted."""
    process = agent.start("worker", RAY_HEAD_IP="127.0.0.99")
    time.sleep(0.3)
    process.terminate()
    process.communicate(timeout=5)
    assert process.returncode == 143


def test_worker_leaves_when_the_head_is_gone(agent):
    """A worker whose head no longer listens fails and says why, although Ray itself goes on."""
    with listening("127.0.0.15") as address:
        process = agent.start("worker", RAY_HEAD_IP=address, RAYDOG_HEAD_GONE_SECONDS="1")
        agent.wait_for_call("ray start")
        time.sleep(1.5)
        assert process.poll() is None
    began = time.monotonic()
    output, _ = process.communicate(timeout=10)
    assert time.monotonic() - began < 5
    assert process.returncode == 1
    assert "the Ray head at 127.0.0.15 port 6379 has not accepted a connection for" in output
    assert output.endswith("Ray stopped\n")
    assert "ray stop" in agent.calls.read_text()


def test_worker_outlasts_a_short_silence(agent):
    """A head that is silent for less than its time, and twice, is not gone."""
    address = "127.0.0.16"
    with listening(address):
        process = agent.start("worker", RAY_HEAD_IP=address, RAYDOG_HEAD_GONE_SECONDS="6")
        agent.wait_for_call("ray start")
    for _ in range(2):
        time.sleep(1.4)
        with listening(address):
            time.sleep(1.4)
            assert process.poll() is None
    process.terminate()
    process.communicate(timeout=5)
    assert process.returncode == 143


def test_worker_leaves_when_its_raylet_has_ended(agent, head):
    """A worker whose raylet has ended in order, as in a drain, fails, although `ray start` goes on."""
    agent.install("raylet", "#!/bin/bash\nwhile true; do read -rt 0.05 <> <(:) || :; done\n")
    agent.install("ray", RAY.replace("start)", 'start) raylet & echo "raylet $!." >>"$CALLS"; '))
    process = agent.start("worker", RAY_HEAD_IP=head, RAYDOG_HEAD_GONE_SECONDS="2")
    agent.wait_for_call("raylet ")
    while not (raylets := re.findall(r"raylet (\d+)\.", agent.calls.read_text())):
        time.sleep(0.01)
    (raylet,) = raylets
    time.sleep(2.5)
    assert process.poll() is None
    os.kill(int(raylet), signal.SIGTERM)
    output, _ = process.communicate(timeout=10)
    assert process.returncode == 1
    assert "its raylet has ended" in output
    assert "ray stop" in agent.calls.read_text()


def test_a_watch_that_hangs_does_not_delay_an_abort(agent):
    """A worker is aborted at once while it looks in vain for its head, and soon no process of it is left."""
    with listening("127.0.0.17") as address:
        process = agent.start("worker", RAY_HEAD_IP=address, RAYDOG_HEAD_GONE_SECONDS="4")
        agent.wait_for_call("ray start")
    with silent(address):
        time.sleep(2)
        began = time.monotonic()
        process.terminate()
        output, _ = process.communicate(timeout=5)
        assert time.monotonic() - began < 2
        assert process.returncode == 143
        assert output == "Ray stopped\n"
        while processes_in(agent.home):
            assert time.monotonic() - began < 7, processes_in(agent.home)
            time.sleep(0.05)


def processes_in(directory: Path) -> list[str]:
    """List the processes whose working directory it is."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (process / "cwd").readlink() == directory:
                found.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode())
    return found


@pytest.mark.parametrize("script", ["worker", "observability"])
def test_no_head_address(agent, script):
    """Without the head's address there is nothing to do, and the script says so."""
    process = agent.start(script)
    output, _ = process.communicate(timeout=10)
    assert process.returncode == 1
    assert "RAY_HEAD_IP is not set" in output


def test_observability_without_prometheus(agent):
    """A node without Prometheus is told by name, and the task fails."""
    process = agent.start("observability", RAY_HEAD_IP="10.1.2.3", RAYDOG_NODE_IP="10.1.2.4", PATH="/nowhere")
    output, _ = process.communicate(timeout=10)
    assert process.returncode == 1
    assert "prometheus is not installed on this node" in output


PROMETHEUS = '#!/bin/bash\necho "prometheus $*" >>"$CALLS"\nexec sleep 60\n'
GRAFANA = '#!/bin/bash\necho "grafana $*" >>"$CALLS"\nexec sleep 60\n'


def observe(agent, until: str, **environment: str) -> str:
    """Run the observability node's script until something is called, and return its output."""
    agent.install("prometheus", PROMETHEUS)
    process = agent.start(
        "observability",
        RAYDOG_NODE_IP="10.1.2.4",
        PATH=f"{agent.home}/venv/bin:{os.environ['PATH']}",
        **{"RAY_HEAD_IP": "127.1.2.3", **environment},
    )
    agent.wait_for_call(until)
    process.terminate()
    output, _ = process.communicate(timeout=10)
    assert process.returncode == 143
    return output


def test_observability(agent):
    """Prometheus asks Ray for its targets with the token, which stands in a file for its owner alone."""
    agent.install("grafana", GRAFANA)
    observe(agent, "grafana server", RAY_AUTH_TOKEN="t0k")
    calls = agent.calls.read_text()
    assert "--web.listen-address=10.1.2.4:9090" in calls
    assert f"grafana server --homepath=/usr/share/grafana --config={agent.home}/grafana/grafana.ini" in calls
    config = yaml.safe_load((agent.home / "prometheus.yml").read_text())
    (job,) = config["scrape_configs"]
    (discovery,) = job["http_sd_configs"]
    assert discovery["url"] == f"http://127.1.2.3:{ports.DASHBOARD}/api/prometheus/sd"
    assert discovery["authorization"] == {"type": "Bearer", "credentials_file": f"{agent.home}/ray-token"}
    token = agent.home / "ray-token"
    assert token.read_text() == "t0k"
    assert token.stat().st_mode & 0o077 == 0
    written = [file for file in agent.home.rglob("*") if file.is_file() and file != token]
    assert [file for file in written if b"t0k" in file.read_bytes()] == []


def test_observability_without_a_token(agent):
    """Where the cluster has no token Prometheus shows none; addresses of IPv6 are put in brackets."""
    output = observe(agent, "prometheus --config.file", RAY_HEAD_IP="::1")
    config = yaml.safe_load((agent.home / "prometheus.yml").read_text())
    (discovery,) = config["scrape_configs"][0]["http_sd_configs"]
    assert "authorization" not in discovery
    assert discovery["url"] == "http://[::1]:8265/api/prometheus/sd"
    assert not (agent.home / "ray-token").exists()
    assert output.endswith("Observability stopped\n")


def test_observability_leaves_when_the_head_is_gone(agent):
    """The node goes on while the head listens, and fails, saying why, when it does not any more."""
    agent.install("prometheus", PROMETHEUS)
    environment = {
        "RAYDOG_NODE_IP": "10.1.2.4",
        "RAYDOG_HEAD_GONE_SECONDS": "1",
        "PATH": f"{agent.home}/venv/bin:{os.environ['PATH']}",
    }
    address = f"127.{os.getpid() % 200 + 20}.77.3"
    process = agent.start("observability", RAY_HEAD_IP=address, **environment)
    agent.wait_for_call("prometheus --config.file")
    # The head may come up long after this node.
    time.sleep(1.5)
    assert process.poll() is None
    with listening(address):
        time.sleep(2)
        assert process.poll() is None
    began = time.monotonic()
    output, _ = process.communicate(timeout=10)
    assert time.monotonic() - began < 5
    assert process.returncode == 1
    assert (
        f"This node leaves: the Ray head at {address} port 6379 has not accepted a connection for" in output
    )
    assert output.endswith("Observability stopped\n")
    assert eventually(lambda: processes_in(agent.home) == [])


def test_observability_gives_up(agent):
    """Where the head never listens, the node ends too."""
    agent.install("prometheus", PROMETHEUS)
    path = f"{agent.home}/venv/bin:{os.environ['PATH']}"
    waiting = {"RAY_HEAD_IP": "127.0.0.98", "RAYDOG_HEAD_WAIT_SECONDS": "1"}
    process = agent.start("observability", RAYDOG_NODE_IP="10.1.2.4", PATH=path, **waiting)
    output, _ = process.communicate(timeout=20)
    assert process.returncode == 1
    assert "127.0.0.98 port 6379 did not listen within 1 s" in output
    assert eventually(lambda: processes_in(agent.home) == [])


def test_grafana_that_ends(agent):
    """It is said, and Prometheus goes on."""
    agent.install("prometheus", PROMETHEUS)
    agent.install("grafana", "#!/bin/bash\nexit 3\n")
    path = f"{agent.home}/venv/bin:{os.environ['PATH']}"
    process = agent.start("observability", RAY_HEAD_IP="127.1.2.3", RAYDOG_NODE_IP="10.1.2.4", PATH=path)
    assert process.stdout is not None
    assert any("Grafana has ended with exit status 3" in line for line in process.stdout)
    assert process.poll() is None
    process.terminate()
    process.communicate(timeout=10)
    assert process.returncode == 143


def test_observability_ends_with_prometheus(agent):
    """Where Prometheus ends, so does the task, with its exit status."""
    agent.install("prometheus", "#!/bin/bash\nexit 7\n")
    path = f"{agent.home}/venv/bin:{os.environ['PATH']}"
    process = agent.start("observability", RAY_HEAD_IP="127.0.0.98", RAYDOG_NODE_IP="10.1.2.4", PATH=path)
    process.communicate(timeout=20)
    assert process.returncode == 7


def test_grafana_is_set_up_as_its_documentation_says(agent):
    """The files have the keys that Grafana documents, and let nobody log in or change anything.

    Keys: https://grafana.com/docs/grafana/latest/administration/provisioning (data sources, dashboards) and
    .../setup-grafana/configure-grafana.
    """
    agent.install("grafana", GRAFANA)
    agent.install("python", "#!/bin/bash\nexit 1\n")
    output = observe(agent, "grafana server")
    assert "Grafana goes without Ray's dashboards" in output
    place = agent.home / "grafana"
    data = yaml.safe_load((place / "provisioning" / "datasources" / "prometheus.yml").read_text())
    assert set(data) == {"apiVersion", "datasources"}
    (source,) = data["datasources"]
    required, optional = {"name", "type", "access", "url"}, {"uid", "isDefault", "editable", "jsonData"}
    assert required <= set(source) <= required | optional
    # The name that Ray's dashboard asks for.
    assert (source["name"], source["type"], source["access"]) == ("Prometheus", "prometheus", "proxy")
    assert source["url"] == f"http://10.1.2.4:{ports.PROMETHEUS}"
    boards = yaml.safe_load((place / "provisioning" / "dashboards" / "ray.yml").read_text())
    assert set(boards) == {"apiVersion", "providers"}
    assert data["apiVersion"] == boards["apiVersion"] == 1
    (provider,) = boards["providers"]
    assert set(provider) == {"name", "folder", "type", "disableDeletion", "allowUiUpdates", "options"}
    assert (provider["type"], provider["options"]) == ("file", {"path": str(place / "dashboards")})
    settings = configparser.ConfigParser(interpolation=None)
    settings.read(place / "grafana.ini")
    assert settings["server"]["http_addr"] == "10.1.2.4"
    assert settings.getint("server", "http_port") == ports.GRAFANA
    assert settings["paths"]["provisioning"] == str(place / "provisioning")
    assert settings.getboolean("security", "allow_embedding")
    assert settings.getboolean("security", "disable_initial_admin_creation")
    assert settings.getboolean("auth", "disable_login_form")
    assert not settings.getboolean("auth.basic", "enabled")
    assert settings["auth.anonymous"]["org_role"] == "Viewer"
    assert "@" not in (place / "grafana.ini").read_text()


def test_observability_without_an_address(agent):
    """Where it is not known at which address to listen, the script does not listen at all of them."""
    agent.install("prometheus", PROMETHEUS)
    path = f"{agent.home}/venv/bin:{os.environ['PATH']}"
    process = agent.start("observability", RAY_HEAD_IP="10.1.2.3", PATH=path)
    output, _ = process.communicate(timeout=10)
    assert process.returncode == 1
    assert "RAYDOG_NODE_IP is not set" in output
    assert agent.calls.read_text() == ""


def test_rays_dashboards_without_a_running_ray(tmp_path):
    """Those that Ray's own dashboard shows are written, as JSON; a Ray without any is said."""
    pytest.importorskip("ray")
    program = Path(raydog.__file__).parent / "observability" / "ray_dashboards.py"

    def run(*options: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *options, str(program), str(tmp_path / "made")],
            capture_output=True,
            text=True,
            timeout=60,
            env={**os.environ, **environment},
            check=False,
        )

    done = run()
    assert done.returncode == 0, done.stderr
    made = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "made").iterdir()}
    assert {"default", "data", "serve"} <= set(made)
    assert all(board["uid"] and board["panels"] for board in made.values())
    # The data source that the frames of Ray's dashboard name.
    assert "datasource" in [variable["name"] for variable in made["default"]["templating"]["list"]]
    other = tmp_path / "other" / "ray" / "dashboard" / "modules" / "metrics"
    other.mkdir(parents=True)
    for directory in (other, *list(other.parents)[:3]):
        (directory / "__init__.py").write_text("__version__ = '9.9'\n")
    (other / "grafana_dashboard_factory.py").write_text("")
    changed = run(PYTHONPATH=str(tmp_path / "other"))
    assert changed.returncode == 1
    assert "Ray 9.9 has no Grafana dashboards" in changed.stderr
    without = run("-I", "-S")
    assert without.returncode == 1
    assert "ray[default]" in without.stderr
