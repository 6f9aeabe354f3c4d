"""What a node of the local platform is, and what becomes of it when things go wrong."""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from yellowdog_client import PlatformClient
from yellowdog_client.model import (
    ApiKey,
    ComputeRequirementTemplateUsage,
    NodeSearch,
    NodeWorkerTarget,
    ProvisionedWorkerPoolProperties,
    RunSpecification,
    ServicesSchema,
    Task,
    TaskGroup,
    TaskStatus,
    WorkRequirement,
)

from tests.browser import PageReader
from yellowdog_ray import LocalPlatform
from yellowdog_ray.errors import ClusterStateError, LocalPlatformError, SpecError
from yellowdog_ray.local.belonging import processes_of
from yellowdog_ray.local.isolation import LACKS, Isolation
from yellowdog_ray.local.node_ssh import find_sshd
from yellowdog_ray.local.template import NodeTemplate

from .conftest import kinds

NODES = 2


class Lab:
    """Two nodes of a platform and a way to run tasks on them, through the SDK alone."""

    def __init__(self, platform: LocalPlatform, client: PlatformClient, workers: int = 1) -> None:
        self.platform, self.client = platform, client
        self.count = 0
        pool = client.worker_pool_client.provision_worker_pool(
            ComputeRequirementTemplateUsage(
                templateId=platform.template_names[0],
                requirementName="lab",
                requirementNamespace="local",
                targetInstanceCount=NODES,
            ),
            ProvisionedWorkerPoolProperties(
                createNodeWorkers=NodeWorkerTarget.per_node(workers), workerTag="lab"
            ),
        )
        self.compute_id = pool.computeRequirementId
        self.nodes = until(lambda: self._nodes(pool.id))

    def _nodes(self, pool_id: Any) -> list[Any] | None:
        found = self.client.worker_pool_client.find_nodes(NodeSearch(workerPoolId=pool_id))
        return found if len(found) == NODES else None

    def submit(self, script: str, count: int = 1, **environment: str) -> list[str]:
        """Run a script as so many tasks and return their ids."""
        self.count += 1
        work = self.client.work_client.add_work_requirement(
            WorkRequirement(
                namespace="local",
                name=f"lab-{self.count}",
                taskGroups=[TaskGroup("group", RunSpecification(taskTypes=["bash"], workerTags=["lab"]))],
            )
        )
        assert work.taskGroups
        tasks = [
            Task(
                name=f"task-{number}",
                taskType="bash",
                arguments=["taskdata.txt"],
                taskData=script,
                environment=environment,
            )
            for number in range(count)
        ]
        return [
            str(task.id)
            for task in self.client.work_client.add_tasks_to_task_group(work.taskGroups[0], tasks)
        ]

    def task(self, task_id: str) -> Task:
        return self.client.work_client.get_task_by_id(task_id)

    def reached(self, task_id: str, *statuses: TaskStatus, timeout: float = 15) -> Task:
        """Wait until a task is in one of the states."""

        def look() -> Task | None:
            task = self.task(task_id)
            return task if task.status in statuses else None

        return until(look, timeout)

    def failure_output(self, script: str, **environment: str) -> str:
        """Run a script, have it fail, and return what it printed, as the platform tells it."""
        (task_id,) = self.submit(f"{script}\nexit 9", **environment)
        task = self.reached(task_id, TaskStatus.FAILED, TaskStatus.COMPLETED)
        assert task.errors
        assert task.errors[-1].processExitCode == 9
        return task.errors[-1].error

    def ssh(self, node: Any, command: str, *options: str) -> subprocess.CompletedProcess[str]:
        """Run a command on a node by the system's SSH client, which checks the node's key."""
        address, port = node.details.publicIpAddress, self.platform.ssh_port
        with tempfile.NamedTemporaryFile("w", suffix=".known_hosts") as known:
            known.write(f"[{address}]:{port} {self.platform.ssh_host_key}\n")
            known.write(f"{address} {self.platform.ssh_host_key}\n")
            known.flush()
            return subprocess.run(
                [
                    "ssh", "-F", "none", "-o", "BatchMode=yes", "-o", f"UserKnownHostsFile={known.name}",
                    "-o", "GlobalKnownHostsFile=none", "-o", "StrictHostKeyChecking=yes",
                    "-o", "IdentitiesOnly=yes",
                    "-i", self.platform.ssh_private_key_file, "-p", str(port), *options,
                    f"{self.platform.ssh_user}@{address}", command,
                ],
                capture_output=True, text=True, timeout=30, check=False, stdin=subprocess.DEVNULL,
            )  # fmt: skip


def until(look: Callable[[], Any], timeout: float = 15) -> Any:
    """Wait until a function returns something."""
    deadline = time.monotonic() + timeout
    while not (found := look()):
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)
    return found


LASTING = f"1000.{os.getpid()}"
"""Seconds of a `sleep` that nobody else has started."""


def stray(seconds: str) -> str:
    """Return a line of a script that starts a `sleep` in whose process nothing tells of its node."""
    return f"(cd / && exec env -i setsid sleep {seconds} < /dev/null > /dev/null 2>&1) &"


def running(command: str) -> list[int]:
    """List the processes with a command line, whosoever they are."""
    wanted = command.replace(" ", "\0").encode() + b"\0"
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (process / "cmdline").read_bytes() == wanted:
                found.append(int(process.name))
    return found


@pytest.fixture(
    scope="module",
    params=[(kind, system_sshd) for kind in kinds() for system_sshd in (True, False)],
    ids=lambda param: f"{param[0].value}-{'sshd' if param[1] else 'embedded'}",
)
def lab(request: pytest.FixtureRequest) -> Iterator[Lab]:
    kind, system_sshd = request.param
    if system_sshd and not find_sshd():
        pytest.skip("no sshd is installed")
    templates = {"local/node": NodeTemplate(ram=0.5)}
    with LocalPlatform(isolation=kind, system_sshd=system_sshd, templates=templates) as platform:
        schema = ServicesSchema(defaultUrl=platform.url)
        with PlatformClient.create(schema, ApiKey(platform.key_id, platform.secret)) as client:
            yield Lab(platform, client)
    assert platform.leftovers() == []


def test_a_task_runs_as_the_agent_runs_it(lab: Lab) -> None:
    """A task has its directory, data and environment as the agent gives them, and nothing of the user's."""
    output = lab.failure_output(
        'echo "dir=$(basename "$PWD") data=$(wc -l < taskdata.txt) args=$0 mine=$MINE"\n'
        'echo "slot=$YD_WORKER_SLOT task=$YD_TASK_ID user=$(id -un) secret=${YD_API_KEY_SECRET-unset}"\n'
        'ls "$YD_AGENT_HOME/venv/bin/activate"; cat taskoutput.txt | head -n 1 | cut -c 1-4',
        MINE="yes",
    )
    assert "dir=ydid_task_" in output
    assert "args=taskdata.txt mine=yes" in output
    assert "slot=0 task=ydid:task:" in output
    assert f"user={lab.platform.ssh_user}" in output
    assert "secret=unset" in output
    assert "/venv/bin/activate" in output
    assert output.rstrip().endswith("dir=")


def test_the_agents_environment_is_this_one(lab: Lab) -> None:
    """The agent's venv is the Python environment that the platform was started from."""
    output = lab.failure_output(
        '. "$YD_AGENT_HOME/venv/bin/activate"\n'
        'python -c "import ray, sys; print(ray.__file__, sys.version_info[:2])"'
    )
    import ray

    assert Path(ray.__file__).name in output
    assert str(sys.version_info[:2]) in output


# Prints the name of each thing that the node can do, of those that not every kind of node can.
_PROBE = """
[ "$(hostname)" = "$HOST" ] || ! getent hosts "$(hostname)" | grep -q "^$ADDRESS" || echo own-hostname
[ -e "$MARK" ] || echo own-tmp
kill -0 $OWNER 2>/dev/null || [ -d /proc/$OWNER ] || echo own-processes
python3 - <<END
import os, socket
with socket.socket() as taken:
    try:
        taken.bind(("0.0.0.0", $TAKEN))
        print("own-ports")
    except OSError:
        pass
try:
    socket.create_connection(("127.0.0.1", $TAKEN), 5).close()
    print("way-out")
except OSError:
    pass
for name in ("memory.max", "memory/memory.limit_in_bytes"):
    try:
        with open(f"/sys/fs/cgroup/{name}") as file:
            if file.read().strip() == os.environ["RAYDOG_NODE_MEMORY"]:
                print("seen-limits")
    except OSError:
        pass
END
"""


def test_a_node_can_do_all_but_what_is_said(lab: Lab, request: pytest.FixtureRequest) -> None:
    """What the kinds of node cannot do is what is listed, neither more nor less."""
    import socket

    lacks = LACKS[lab.platform.isolation]
    system_sshd, node = request.node.callspec.params["lab"][1], lab.nodes[0]
    with tempfile.NamedTemporaryFile(dir="/tmp") as mark, socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        output = lab.failure_output(
            _PROBE,
            HOST=socket.gethostname(),
            ADDRESS=node.details.privateIpAddress.rpartition(".")[0],
            MARK=mark.name,
            OWNER=str(os.getpid()),
            TAKEN=str(taken.getsockname()[1]),
        )
    can = set(output.split("output:\n", 1)[1].split()) if "output:\n" in output else set()
    expected = {"own-hostname", "own-ports", "own-processes", "own-tmp", "way-out"}
    if lab.platform._nodes.groups.memory:
        expected.add("seen-limits")
    assert can == expected - lacks
    # SSH goes to the public one, in the test below. The other may be somebody else's: nothing is sent there.
    direct = node.details.privateIpAddress == node.details.publicIpAddress
    assert direct == ("direct-address" not in lacks)
    if system_sshd:
        assert (lab.platform._nodes._supervisor.sshd is None) == ("system-sshd" in lacks)


def test_what_a_kind_cannot_do_is_documented() -> None:
    """The documentation's list has every name, and the kinds that it is true of."""
    text = Path(__file__).parents[2].joinpath("docs", "local-platform.rst").read_text()
    _, _, table = text.partition(".. list-table:: What a kind of node cannot do")
    rows = [row.strip().split("\n") for row in table.partition("\n.. ")[0].split("   * - ")[2:]]
    said = {row[0].strip("` "): set(re.findall("``([a-z-]+)``", row[1])) for row in rows}
    names = set().union(*LACKS.values())
    assert said == {name: {kind.value for kind in Isolation if name in LACKS[kind]} for name in names}


def test_ray_stop_ends_what_its_own_node_runs(lab: Lab) -> None:
    """`ray stop` in one node's script ends Ray there, and reaches no other node and no Ray of the user's."""
    fake = "cp $(command -v sleep) $YD_AGENT_DATA/raylet; $YD_AGENT_DATA/raylet 1000 & echo; wait"
    ids = lab.submit(fake, count=2)
    tasks = [lab.reached(task_id, TaskStatus.EXECUTING) for task_id in ids]
    stop = '. "${YD_AGENT_HOME:-/opt/yellowdog/agent}/venv/bin/activate"; ray stop'
    node = next(node for node in lab.nodes if node.id == tasks[0].nodeId)
    with tempfile.TemporaryDirectory() as directory:
        own = Path(directory, "raylet")
        shutil.copy(shutil.which("sleep") or "", own)
        with subprocess.Popen([own, "1000"]) as process:
            try:
                result = lab.ssh(node, stop)
                assert result.returncode == 0, result.stderr
                # Its script goes on to its end, with what it waited for gone.
                lab.reached(ids[0], TaskStatus.COMPLETED)
                time.sleep(0.3)
                assert lab.task(ids[1]).status == TaskStatus.EXECUTING
                assert process.poll() is None
            finally:
                process.kill()
    lab.client.work_client.cancel_task_by_id(ids[1], abort=True)
    lab.reached(ids[1], TaskStatus.ABORTED)


def test_a_task_that_uses_up_the_memory_says_so(lab: Lab) -> None:
    """Where a node's memory is limited, a task that wants more fails with that reason; the node goes on."""
    if not lab.platform._nodes.groups.memory:
        assert "told to Ray, not enforced (no control group" in lab.platform.describe()
        return
    before = {node.id for node in lab.nodes}
    output = lab.failure_output("python3 -c \"x = bytearray(700 << 20); x[::4096] = b'a' * (700 << 8)\"")
    assert (
        "its node ran out of memory; the kernel killed 1 of its processes at the limit of 512 MiB" in output
    )
    assert "out of memory" not in lab.failure_output("true")
    nodes = [lab.client.worker_pool_client.get_node_by_id(node_id) for node_id in before]
    assert {str(node.status) for node in nodes} == {"RUNNING"}


def test_ssh_opens_a_node(lab: Lab) -> None:
    """SSH runs commands on a node, with their exit status, and gives a terminal."""
    node = lab.nodes[0]
    result = lab.ssh(node, "echo on $(hostname); exit 5")
    assert result.returncode == 5, result.stderr
    if lab.platform.isolation is not Isolation.PROCESSES:
        assert result.stdout == f"on {node.details.hostname}\n"
    terminal = lab.ssh(node, "tty", "-tt")
    assert terminal.returncode == 0, terminal.stderr
    assert "/dev/pts/" in terminal.stdout


def test_another_key_does_not_open_a_node(lab: Lab, tmp_path: Path) -> None:
    """SSH with another key is refused."""
    other = tmp_path / "other"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(other)], check=True)
    address = lab.nodes[0].details.publicIpAddress
    result = subprocess.run(
        [
            "ssh", "-F", "none", "-o", "BatchMode=yes", "-o", "UserKnownHostsFile=/dev/null",
            "-o", "StrictHostKeyChecking=no", "-o", "IdentitiesOnly=yes", "-i", str(other),
            "-p", str(lab.platform.ssh_port), f"{lab.platform.ssh_user}@{address}", "true",
        ],
        capture_output=True, text=True, timeout=30, check=False, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert result.returncode == 255
    assert "Permission denied" in result.stderr


def test_an_abort_is_sigterm(lab: Lab) -> None:
    """An aborted task gets SIGTERM, so its traps run, and what it leaves behind is ended."""
    (task_id,) = lab.submit("trap 'exit 143' TERM\nsleep 1000 &\necho $! > $YD_AGENT_HOME/pid\nwait $!\n")
    task = lab.reached(task_id, TaskStatus.EXECUTING)
    node = next(node for node in lab.nodes if node.id == task.nodeId)
    directory = "$YD_AGENT_HOME" if lab.platform.isolation is Isolation.PROCESSES else "~"

    def written() -> str:
        return lab.ssh(node, f"cat {directory}/pid").stdout.strip()

    pid = until(written)
    lab.client.work_client.cancel_task_by_id(task_id, abort=True)
    lab.reached(task_id, TaskStatus.ABORTED)
    assert lab.ssh(node, f"ps -p {pid}").returncode == 1


def test_two_tasks_run_on_two_nodes(lab: Lab) -> None:
    """Tasks that run at the same time are on different nodes, with an address each; the page shows them."""
    ids = lab.submit("echo 'this <is> said'; sleep 2; echo 'and that'", count=2)
    tasks = [lab.reached(task_id, TaskStatus.EXECUTING) for task_id in ids]
    assert {task.nodeId for task in tasks} == {node.id for node in lab.nodes}
    assert len({node.details.privateIpAddress for node in lab.nodes}) == NODES
    reader = PageReader(lab.platform.web_url)
    page = until(lambda: _with("Output so far", "this &lt;is&gt; said", reader.text(f"tasks/{ids[0]}")))
    assert "and that" not in page.partition("Task data")[0]
    assert lab.nodes[0].details.hostname in reader.text("nodes")
    version = reader.get(f"tasks/{ids[1]}").headers["ETag"]
    for task_id in ids:
        lab.reached(task_id, TaskStatus.COMPLETED)
    page = reader.text(f"tasks/{ids[0]}")
    assert _with("The end of its output", "this &lt;is&gt; said\nand that</pre>", page)
    assert reader.get(f"tasks/{ids[1]}", **{"If-None-Match": version}).status_code == 200


def _with(heading: str, text: str, page: str) -> str | None:
    """Return a page that has a text below a heading, and before the next."""
    return page if text in page.partition(f">{heading}</h2>")[2].partition("<h2")[0] else None


_OWNER = """
import json, sys, time
from yellowdog_ray import LocalPlatform
from yellowdog_client import PlatformClient
from yellowdog_client.model import *
platform = LocalPlatform(isolation=sys.argv[1]).start()
key = ApiKey(platform.key_id, platform.secret)
client = PlatformClient.create(ServicesSchema(defaultUrl=platform.url), key)
pool = client.worker_pool_client.provision_worker_pool(
    ComputeRequirementTemplateUsage(
        templateId="local/node", requirementName="owned", requirementNamespace="local", targetInstanceCount=1
    ),
    ProvisionedWorkerPoolProperties(createNodeWorkers=NodeWorkerTarget.per_node(1), workerTag="owned"),
)
work = client.work_client.add_work_requirement(WorkRequirement(namespace="local", name="owned", taskGroups=[
    TaskGroup("group", RunSpecification(taskTypes=["bash"], workerTags=["owned"]))]))
(task,) = client.work_client.add_tasks_to_task_group(work.taskGroups[0], [
    Task(name="task", taskType="bash", arguments=["taskdata.txt"],
         taskData=sys.argv[2] + "\\nsetsid sleep 1000 & sleep 1000")])
while client.work_client.get_task_by_id(task.id).status != TaskStatus.EXECUTING:
    time.sleep(0.05)
time.sleep(0.3)
nodes = platform._nodes
made = [str(nodes._directory), nodes.interface or "-", nodes._supervisor.process.pid, nodes.groups.left()]
print(json.dumps(made), flush=True)
time.sleep(1000)
"""


class Owner(NamedTuple):
    """A process that owns a platform, and what that has made."""

    process: subprocess.Popen[str]
    directory: Path
    interface: str
    supervisor: int
    groups: list[str]


@pytest.fixture(params=kinds(), ids=lambda kind: kind.value)
def owner(request: pytest.FixtureRequest) -> Iterator[Owner]:
    """A process that owns a platform with a node on which a task runs."""
    process = subprocess.Popen(
        [sys.executable, "-c", _OWNER, request.param.value, stray(LASTING)],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout
    directory, interface, supervisor, groups = json.loads(process.stdout.readline())
    yield Owner(process, Path(directory), interface, supervisor, groups)
    process.kill()
    process.wait()


def _sleepers(directory: Path) -> list[int]:
    return [*processes_of(str(directory)), *running(f"sleep {LASTING}")]


def test_the_platform_ends_with_its_owner(owner: Owner) -> None:
    """When the owner is killed, nodes, tasks, interface, control groups and directory go within seconds."""
    process, directory, interface, _, groups = owner
    assert processes_of(str(directory))
    assert running(f"sleep {LASTING}")
    assert all(Path(group).exists() for group in groups)

    process.kill()

    until(lambda: not directory.exists(), timeout=5)
    assert not _sleepers(directory)
    until(lambda: not Path("/sys/class/net", interface).exists(), timeout=5)
    assert not any(Path(group).exists() for group in groups)


def test_the_next_start_removes_what_a_crash_left(owner: Owner) -> None:
    """When the supervisor is killed together with the owner, the next platform cleans up after both."""
    process, directory, interface, supervisor, groups = owner
    assert running(f"sleep {LASTING}")
    watcher = os.pidfd_open(supervisor)
    os.kill(supervisor, signal.SIGKILL)
    process.kill()
    process.wait()
    # On a busy machine it takes its time to die, and holds the directory's lock.
    assert select.select([watcher], [], [], 15)[0]
    os.close(watcher)
    assert directory.exists()

    with LocalPlatform():
        assert not directory.exists()
        until(lambda: not _sleepers(directory), timeout=5)
        until(lambda: not Path("/sys/class/net", interface).exists(), timeout=5)
        assert not any(Path(group).exists() for group in groups)


_CONTAINED = """
import sys
sys.path.insert(0, sys.argv[1])
from yellowdog_client import PlatformClient
from yellowdog_client.model import ApiKey, ServicesSchema
from tests.integration.test_local_platform import Lab
from yellowdog_ray import LocalPlatform

with LocalPlatform() as platform:
    print(platform.describe())
    schema = ServicesSchema(defaultUrl=platform.url)
    with PlatformClient.create(schema, ApiKey(platform.key_id, platform.secret)) as client:
        lab = Lab(platform, client)
        print(lab.failure_output("echo task: $(id -u)"))
        print(lab.ssh(lab.nodes[1], "echo ssh: $SSH_CONNECTION").stdout)
print("left:", platform.leftovers())
"""


def test_it_runs_in_a_container_without_capabilities() -> None:
    """Where nobody may make namespaces nor mount anything, nodes are plain processes, and it says why."""
    root = Path(__file__).parents[2]
    result = subprocess.run(
        [sys.executable, root / "tests" / "contained.py", sys.executable, "-c", _CONTAINED, root],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.startswith("nodes are plain processes with loopback addresses")
    assert "user-namespaces: [Errno 1]" in result.stdout
    assert f"task: {os.geteuid()}" in result.stdout
    assert "ssh: 127." in result.stdout
    assert result.stdout.endswith("left: []\n")


def test_a_taken_port_is_named() -> None:
    """A platform that cannot have the port that it was told says so, and leaves nothing."""
    with LocalPlatform() as first:
        port = int(first.url.rpartition(":")[2])
        with pytest.raises(LocalPlatformError, match=str(port)):
            LocalPlatform(port=port).start()


def test_plain_processes_need_rays_ports(made: list[Path]) -> None:
    """Plain processes share the machine's ports; a taken one is named before anything is created."""
    import socket

    with socket.socket() as squatter:
        squatter.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        squatter.bind(("0.0.0.0", 6379))
        squatter.listen()
        with pytest.raises(LocalPlatformError, match="6379"):
            LocalPlatform(isolation="processes").start()
        assert len(made) == 1
        assert not made[0].exists()


def test_too_little_memory_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without the memory for a node is told so at the start."""
    monkeypatch.setattr("yellowdog_ray.local.needs.free_memory", lambda: 100 << 20)
    with pytest.raises(LocalPlatformError, match="100 MiB are free"):
        LocalPlatform().start()


def test_arguments_are_checked() -> None:
    """Arguments that cannot work are refused with the ones that can."""
    with pytest.raises(SpecError, match="user-namespaces"):
        LocalPlatform(isolation="containers")
    with pytest.raises(SpecError, match="70000"):
        LocalPlatform(port=70000)
    with pytest.raises(SpecError, match="namespace/name"):
        LocalPlatform(templates={"node": NodeTemplate()})


def test_a_closed_platform_says_so() -> None:
    """Closing twice is silent; using a closed platform is an error that says why."""
    platform = LocalPlatform().start()
    platform.close()
    platform.close()
    with pytest.raises(ClusterStateError, match="closed"):
        _ = platform.url
    assert platform.leftovers() == []
