"""The local platform that stays: it outlives shells, remembers, and is nobody else's."""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import resource
import select
import shutil
import signal
import socket
import sqlite3
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from yellowdog_client import PlatformClient
from yellowdog_client.model import (
    ApiKey,
    ComputeRequirementSearch,
    NodeSearch,
    RunSpecification,
    ServicesSchema,
    TaskGroup,
    TaskStatus,
    WorkerPoolSearch,
    WorkRequirement,
    WorkRequirementSearch,
)

from tests.browser import PageReader
from yellowdog_ray import LocalPlatform, RayDogCluster
from yellowdog_ray.cli import main
from yellowdog_ray.errors import LocalPlatformError
from yellowdog_ray.local import history
from yellowdog_ray.local import server as server_module
from yellowdog_ray.local.account import LocalAccount
from yellowdog_ray.local.belonging import processes_of
from yellowdog_ray.local.history import WAS_KILLED, WAS_STOPPED
from yellowdog_ray.local.home import Home
from yellowdog_ray.local.nodes import Isolation
from yellowdog_ray.local.scheduler import Scheduler
from yellowdog_ray.local.server import Kept
from yellowdog_ray.raydog.journal import find_states

from .conftest import kinds
from .test_local_platform import Lab, until


class Command:
    """The `raydog local` command, as another process."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.environment = {**os.environ, "RAYDOG_LOCAL_DIR": str(directory)}

    def begin(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "yellowdog_ray.cli", "local", *arguments],
            env=self.environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def __call__(self, *arguments: str, status: int = 0) -> str:
        with self.begin(*arguments) as process:
            out, err = process.communicate(timeout=120)
        assert process.returncode == status, f"{out}\n{err}"
        return out

    def start(self, *arguments: str) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(self("start", "--json", *arguments))
        return answer


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Command]:
    """The command with a directory of its own; what it has started is stopped at the end."""
    command = Command(tmp_path / "local")
    monkeypatch.setenv("RAYDOG_LOCAL_DIR", str(command.directory))
    yield command
    for directory in command.directory.glob("*"):
        command("stop", "--name", directory.name)


@contextlib.contextmanager
def sdk(account: LocalAccount) -> Iterator[PlatformClient]:
    schema = ServicesSchema(defaultUrl=account.url)
    with PlatformClient.create(schema, ApiKey(account.key_id, account.secret)) as client:
        yield client


def kill(account: LocalAccount) -> None:
    """End a platform as `kill -9` does, and wait until it holds its lock no more."""
    os.kill(account.pid, signal.SIGKILL)
    until(lambda: Home().holder() != account.pid)


def supervisors(account: LocalAccount) -> list[int]:
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (entry / "cmdline").read_bytes().split(b"\0")
            if b"yellowdog_ray.local.supervisor" in words and account.directory.encode() in b" ".join(words):
                found.append(int(entry.name))
    return found


def nothing_runs(account: LocalAccount) -> bool:
    return not (
        processes_of(account.directory)
        or supervisors(account)
        or Path(account.directory).exists()
        or (account.interface and Path("/sys/class/net", account.interface).exists())
    )


@pytest.mark.parametrize("everything", [False, True], ids=["platform", "with its supervisor"])
@pytest.mark.parametrize("kind", kinds(), ids=lambda kind: kind.value)
def test_killed_and_started_again(command: Command, kind: Isolation, everything: bool) -> None:
    """After `kill -9` nothing runs; the next start can have the same key and port, and shows what was."""
    exports = command("start", "--isolation", kind.value)
    assert command("start") == exports
    shown = subprocess.run(
        ["sh", "-c", f'{exports}\necho "$YD_API_URL $YD_API_KEY_ID $YD_API_KEY_SECRET $RAYDOG_SSH_KEY"'],
        text=True, capture_output=True, check=True,
    ).stdout.split()  # fmt: skip
    account = LocalPlatform.connect()
    assert shown == [account.url, account.key_id, account.secret, account.ssh_private_key_file]
    assert account.isolation == kind.value

    with sdk(account) as client:
        lab = Lab(account, client)  # type: ignore[arg-type]
        (done,) = lab.submit("exit 0")
        lab.reached(done, TaskStatus.COMPLETED)
        running = lab.submit("setsid sleep 1000 & sleep 1000", count=3)
        until(lambda: {str(lab.task(each).status) for each in running} == {"EXECUTING", "READY"})
        assert lab.ssh(lab.nodes[0], "true").returncode == 0
    status = json.loads(command("status", "--json"))
    assert status["counts"]["nodes"] == {"RUNNING": 2}
    assert status["counts"]["work_requirements"] == {"COMPLETED": 1, "RUNNING": 1}
    for secret in (account.secret, account.control_token):
        assert secret not in json.dumps(status)
        assert secret not in repr(account)
        assert secret not in (command.directory / "default" / "platform.log").read_text()
    # What is not half a second old may be lost to a kill.
    until(lambda: written(command, "work") == {"RUNNING": 1, "COMPLETED": 1})
    until(lambda: written(command, "task") == {"EXECUTING": 2, "COMPLETED": 1, "READY": 1})

    assert len(supervisors(account)) >= 1
    control = {"Authorization": f"Bearer {account.control_token}"}
    books = requests.get(f"{account.control_url}/books", headers=control, timeout=5).json()
    assert sorted(books["running"]) == ["compute local/lab", "pool local/lab", "work local/lab-2"]
    if everything:
        for pid in supervisors(account):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    kill(account)
    if not everything:
        until(lambda: nothing_runs(account), timeout=10)
    with pytest.raises(LocalPlatformError, match="raydog local start"):
        LocalPlatform.connect()

    again = command.start("--isolation", kind.value, "--keep-key")["exports"]
    assert nothing_runs(account)
    assert {**again, "RAYDOG_SSH_PORT": ""} == {**account.variables, "RAYDOG_SSH_PORT": ""}
    with sdk(account) as client:
        (pool,) = client.worker_pool_client.get_worker_pools(WorkerPoolSearch()).list_all()
        nodes = client.worker_pool_client.find_nodes(NodeSearch(workerPoolId=pool.id))
        (compute,) = client.compute_client.get_compute_requirements(ComputeRequirementSearch()).list_all()
        works = client.work_client.get_work_requirements(WorkRequirementSearch()).list_all()
        tasks = [client.work_client.get_task_by_id(each) for each in running]
    assert (str(pool.status), str(compute.status)) == ("TERMINATED", "TERMINATED")
    assert {str(node.status) for node in nodes} == {"TERMINATED"}
    assert [str(work.status) for work in works] == ["COMPLETED", "CANCELLED"]
    assert sorted(str(task.status) for task in tasks) == ["ABORTED", "ABORTED", "CANCELLED"]
    assert {task.errors[-1].error for task in tasks} == {WAS_KILLED}

    new = LocalPlatform.connect()
    assert "nothing is left" in command("stop")
    assert nothing_runs(new)
    command("status", status=3)


def written(command: Command, kind: str) -> dict[str, int]:
    """Count the things of a kind in the history by their status."""
    counts: dict[str, int] = {}
    with contextlib.closing(sqlite3.connect(command.directory / "default" / "history.sqlite")) as database:
        for (text,) in database.execute("SELECT json FROM things WHERE kind = ?", (kind,)):
            status = json.loads(text)["status"]
            counts[status] = counts.get(status, 0) + 1
    return counts


def test_status_removes_what_a_kill_left(command: Command) -> None:
    """Where the platform was killed with its supervisor, `status` removes what is left, state files too."""
    # Without privileges on plain processes: no kernel ends those, and Ray's own hide their environment.
    kind = Isolation.NAMESPACES if os.geteuid() == 0 else Isolation.PROCESSES
    command.start("--isolation", kind.value)
    account = LocalPlatform.connect()
    with sdk(account) as client:
        lab = Lab(account, client)  # type: ignore[arg-type]
        lab.submit("setsid sleep 1000 & sleep 1000")
        until(lambda: written(command, "task") == {"EXECUTING": 1})
    states = Path(os.environ["RAYDOG_STATE_DIR"])
    cluster = RayDogCluster(
        account.key_id,
        account.secret,
        "lost",
        account.namespace,
        account.template_names[0],
        None,
        account.url,
    )
    cluster.build()
    assert find_states(states)
    if kind is Isolation.PROCESSES:
        # Ray's own agents start after its head.
        until(lambda: [pid for pid in working_below(account.directory) if _renamed(pid)], timeout=60)
    for pid in supervisors(account):
        # The kernel ends the second when the first has ended.
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    kill(account)
    assert Path(account.directory).exists()

    assert json.loads(command("status", "--json", status=3)) == {
        "name": "default",
        "running": False,
        "left": [],
    }

    assert nothing_runs(account)
    assert working_below(account.directory) == []
    assert find_states(states) == []


def _renamed(pid: int) -> bool:
    return _bytes(Path(f"/proc/{pid}/cmdline")).startswith(b"ray::")


def working_below(directory: str) -> list[int]:
    """List the processes whose working directory is, or was, below a directory."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if os.readlink(process / "cwd").startswith(f"{directory}/"):
                found.append(int(process.name))
    return found


def test_two_starts_at_once_start_one(command: Command) -> None:
    """Starts at the same moment give the same platform to all."""
    processes = [command.begin("start") for _ in range(4)]
    outputs = {process.communicate(timeout=120)[0] for process in processes}
    assert [process.returncode for process in processes] == [0, 0, 0, 0]
    assert len(outputs) == 1
    assert platforms_of(command) == [LocalPlatform.connect().pid]


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def _environment(process: Path, name: str) -> str | None:
    for setting in _bytes(process / "environ").decode(errors="replace").split("\0"):
        if setting.startswith(f"{name}="):
            return setting.partition("=")[2]
    return None


def test_a_stop_is_remembered(command: Command) -> None:
    """A stop ends all nodes, and its time and reason are what the history says; several names do not mix."""
    command.start()
    command.start("--name", "other")
    account, other = LocalPlatform.connect(), LocalPlatform.connect("other")
    assert account.url != other.url
    with sdk(account) as client:
        lab = Lab(account, client)  # type: ignore[arg-type]
        (task_id,) = lab.submit("sleep 1000")
        lab.reached(task_id, TaskStatus.EXECUTING)
    link, unused = account.web_url, account.web_url
    reader = PageReader(link)
    assert "EXECUTING" in reader.text(f"tasks/{task_id}")
    began = time.time()
    command("stop")
    ended = time.time()
    assert nothing_runs(account)
    assert LocalPlatform.connect("other") == other
    assert other.counts() == {"worker_pools": {}, "nodes": {}, "work_requirements": {}}

    told = command("status", "--name", "other")
    assert "no work requirement yet" in PageReader(told.partition("web page: ")[2].split()[0]).text("work")
    assert "ticket" not in command("status", "--name", "other", "--json")
    assert "not running" in command("stop")
    command.start("--keep-key")
    with sdk(account) as client:
        task = client.work_client.get_task_by_id(task_id)
        # The names of what has ended are free.
        Lab(account, client).submit("exit 0")  # type: ignore[arg-type]
    assert (str(task.status), task.errors[-1].error) == ("ABORTED", WAS_STOPPED)
    assert task.finishedTime is not None
    assert began - 1 <= task.finishedTime.timestamp() <= ended
    # A browser that was let in still is, and sees the same; a link from before is not taken.
    assert WAS_STOPPED in reader.text(f"tasks/{task_id}")
    assert "ABORTED" in reader.text("events")
    for each in (link, unused):
        assert requests.get(each, timeout=10).status_code == 401
    command("stop")
    forgetful = command.start("--forget")
    assert LocalPlatform.connect().counts() == other.counts()
    # What was sent to its port meanwhile, to whoever had it, is of no use.
    assert forgetful["url"] == account.url
    assert requests.get(f"{account.url}/application", headers=_key(account), timeout=10).status_code == 401


def _key(account: LocalAccount) -> dict[str, str]:
    return {"Authorization": f"yd-key {account.key_id}:{account.secret}"}


def test_a_taken_port_means_a_new_key(command: Command) -> None:
    """Where somebody else has the platform's port, who may be sent its key, it gets another one."""
    command.start()
    account = LocalPlatform.connect()
    command("stop")
    with socket.socket() as squatter:
        squatter.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        squatter.bind(("127.0.0.1", int(account.url.rpartition(":")[2])))
        squatter.listen()
        command.start("--keep-key", "--template", "local/big=2,1.5")
        moved = LocalPlatform.connect()
    assert moved.url != account.url
    assert moved.secret != account.secret
    assert moved.control_token != account.control_token
    assert moved.template_names == ["local/big"]
    command("stop")
    command.start()
    again = LocalPlatform.connect()
    assert again.secret != moved.secret
    assert again.control_token != moved.control_token
    assert again.template_names == ["local/big"]


def test_a_history_that_takes_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A history that takes longer to read than a start may otherwise take is read."""
    load, seconds = history.History.load, 1.0

    def read_long(self: history.History, scheduler: Scheduler) -> None:
        time.sleep(seconds * 1.5)
        load(self, scheduler)

    monkeypatch.setattr(server_module, "START_TIMEOUT", seconds)
    monkeypatch.setattr(history.History, "load", read_long)
    with LocalPlatform(kept=Kept("id", "secret", tmp_path)) as platform:
        assert platform.failure() is None
    assert platform.leftovers() == []


def test_a_full_disk_keeps_nothing_from_ending(command: Command) -> None:
    """A platform that can write nothing any more still ends as it should, and nobody calls it killed."""
    command.start()
    account = LocalPlatform.connect()
    # As on a full disk, every write to a file is an error from now on.
    resource.prlimit(account.pid, resource.RLIMIT_FSIZE, (0, 0))
    with sdk(account) as client:
        client.work_client.add_work_requirement(
            WorkRequirement("local", "work", [TaskGroup("group", RunSpecification(["bash"]))])
        )
    with command.begin("stop") as stop:
        out, err = stop.communicate(timeout=60)
    assert (stop.returncode, out, err) == (0, "default: stopped; nothing is left of it\n", "")
    assert nothing_runs(account)
    assert Home().read()["pid"] is None


def test_a_start_that_is_terminated_leaves_nothing(command: Command) -> None:
    """SIGTERM to a `raydog local start` that waits ends what it was about to start."""
    start = command.begin("start")
    platform: int | None = None
    deadline = time.monotonic() + 30
    while platform is None and time.monotonic() < deadline:
        time.sleep(0.002)
        platform = Home().holder()
        if platform == start.pid:
            # While it looks for what another platform has left, the command itself has the lock.
            platform = None
    assert platform
    # It comes no further while it is waited for.
    os.kill(platform, signal.SIGSTOP)
    start.terminate()
    out, _ = start.communicate(timeout=30)
    os.kill(platform, signal.SIGCONT)
    assert (start.returncode, out) == (143, "")
    until(lambda: not platforms_of(command))


def platforms_of(command: Command) -> list[int]:
    """List the processes of platforms that the command has started."""
    return [
        int(entry.name)
        for entry in Path("/proc").glob("[0-9]*")
        if _environment(entry, "RAYDOG_LOCAL_DIR") == str(command.directory)
        and b"yellowdog_ray.local.daemon" in _bytes(entry / "cmdline").split(b"\0")
    ]


def test_it_ends_when_its_directory_is_removed(command: Command) -> None:
    """A platform whose directory was removed can be found by nobody: it ends itself, and leaves nothing."""
    command.start()
    account = LocalPlatform.connect()
    process = os.pidfd_open(account.pid)
    shutil.rmtree(command.directory / "default")
    assert select.select([process], [], [], 15)[0]
    os.close(process)
    assert nothing_runs(account)
    assert not command.directory.joinpath("default").exists()


def test_it_ends_when_it_can_make_no_nodes(command: Command) -> None:
    """When the process that owns the nodes is killed, the platform ends itself, and can be started again."""
    command.start()
    account = LocalPlatform.connect()
    for pid in supervisors(account):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    until(lambda: Home().holder() is None)
    assert nothing_runs(account)
    assert "cannot go on" in Home().log.read_text()
    assert command.start()["url"] == account.url


def test_in_the_foreground(command: Command) -> None:
    """In the foreground it writes its exports, and ends with SIGTERM; a failing start says why."""
    process = command.begin("start", "--foreground")
    assert process.stdout
    first = process.stdout.readline()
    account = LocalPlatform.connect()
    assert first == f"export YD_API_URL={account.url}\n"
    assert account.pid == process.pid
    # One that runs is left as it is, and its exports are printed.
    assert command("start", "--foreground").startswith(first)
    with command.begin("start", "--quiet") as quiet:
        out, err = quiet.communicate(timeout=60)
    assert out.startswith(first)
    assert "is running already" in err
    assert account.url not in err
    process.terminate()
    assert process.wait(30) == 0
    assert f"{account.url}/web/open?ticket=" in process.communicate()[1]
    assert nothing_runs(account)

    with socket.socket() as squatter:
        squatter.bind(("127.0.0.1", 0))
        squatter.listen()
        port = squatter.getsockname()[1]
        failing = command.begin("start", "--port", str(port))
        out, err = failing.communicate(timeout=60)
    assert failing.returncode == 1
    assert out == ""
    assert f"127.0.0.1:{port}" in err


def test_names_and_usage(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    """What cannot be a name is wrong usage, and nothing is made."""
    assert main(["local", "status", "--name", "../x"]) == 2
    assert "../x" in capsys.readouterr().err
    assert main(["local", "status", "--name", "none"]) == 3
    assert main(["local", "stop", "--name", "none"]) == 0
    assert not command.directory.exists()


# ---------------------------------------------------------------------------------- another user

_PYTHON = shutil.which("python3", path="/usr/bin:/usr/local/bin")
_ATTEMPT = """
import json, socket, sys, urllib.error, urllib.request
url, control, ssh_address, ssh_port, directory, files = sys.argv[1:]
def status(path, key=None, method="GET", base=url):
    headers = {"Authorization": key} if key else {}
    request = urllib.request.Request(base + path, headers=headers, method=method)
    try:
        return urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=10).status
    except urllib.error.HTTPError as error:
        return error.code
def opened(path):
    try:
        open(path).close()
        return "opened"
    except OSError as error:
        return type(error).__name__
answers = {
    "calls": [status(path, key)
              for path in ("/application", "/workerPools", "/work/requirements", "/x//", "//")
              for key in (None, "yd-key a:b", "yd-key :")],
    "post": [status(path, None, "POST")
             for path in ("/work/requirements", "/workerPools/provisioned/template")],
    "control": [status(path, key, method, control)
                for path, method in (("/books", "GET"), ("/faults", "POST"), ("/faults", "DELETE"))
                for key in (None, "Bearer x", "Bearer ")],
    "files": [opened(directory + "/" + name) for name in files.split()],
}
with socket.create_connection((ssh_address, int(ssh_port)), timeout=10) as connection:
    answers["ssh"] = connection.recv(4).decode()
print(json.dumps(answers))
"""


# Only root can be another user.
if os.geteuid() == 0:

    @pytest.mark.skipif(not _PYTHON, reason="needs a python3 that every user can run")
    def test_another_user_has_no_way_in(monkeypatch: pytest.MonkeyPatch) -> None:
        """Another user is refused by the API, the control port, the files and the nodes' SSH servers."""
        stranger = pwd.getpwnam("nobody")
        # Only the platform's own directory is to be in the way.
        base = Path(f"/tmp/raydog-test-daemon-{os.getpid()}")
        base.mkdir(mode=0o755)
        elsewhere = Command(base)
        try:
            elsewhere("start")
            directory = base / "default"
            monkeypatch.setenv("RAYDOG_LOCAL_DIR", str(base))
            account = LocalPlatform.connect()
            names = sorted(path.name for path in directory.iterdir())
            assert {"platform.json", "history.sqlite", "id_ed25519", "platform.log"} <= set(names)
            assert stat.S_IMODE(directory.stat().st_mode) == 0o700
            for name in names:
                assert stat.S_IMODE((directory / name).stat().st_mode) == 0o600, name
            with sdk(account) as client:
                lab = Lab(account, client)  # type: ignore[arg-type]
                address = str(lab.nodes[0].details.publicIpAddress)
            # All listeners of the platform's process are on the loopback interface.
            urls = {account.url, account.control_url}
            assert _listening(account.pid) == {url.removeprefix("http://") for url in urls}
            result = subprocess.run(
                [
                    _PYTHON, "-c", _ATTEMPT,
                    account.url, account.control_url, address, str(account.ssh_port), str(directory),
                    " ".join(names),
                ],
                user=stranger.pw_uid, group=stranger.pw_gid, extra_groups=[], cwd="/", env={}, text=True,
                capture_output=True, timeout=60, check=False,
            )  # fmt: skip
            assert result.returncode == 0, result.stderr
            answers = json.loads(result.stdout)
            assert answers["calls"] == [401] * 12 + [200] * 3
            assert answers["post"] == [401, 401]
            assert answers["control"] == [401] * 9
            assert set(answers["files"]) == {"PermissionError"}
            assert answers["ssh"] == "SSH-"
            for method in ("password", "keyboard-interactive", "publickey"):
                refused = subprocess.run(
                    [
                        "ssh", "-F", "none", "-o", "UserKnownHostsFile=/dev/null",
                        "-o", "StrictHostKeyChecking=no", "-o", "BatchMode=yes",
                        "-o", f"PreferredAuthentications={method}",
                        "-p", str(account.ssh_port), f"{account.ssh_user}@{address}", "true",
                    ],
                    user=stranger.pw_uid, group=stranger.pw_gid, extra_groups=[], cwd="/", text=True,
                    capture_output=True, timeout=60, check=False, stdin=subprocess.DEVNULL,
                )  # fmt: skip
                assert refused.returncode == 255, refused.stderr
                assert "Permission denied (publickey)" in refused.stderr
        finally:
            elsewhere("stop")
            shutil.rmtree(base)


def _listening(pid: int) -> set[str]:
    """List the TCP addresses at which a process listens."""
    sockets = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            sockets.add(os.readlink(entry))
    found = set()
    for file in ("tcp", "tcp6"):
        for line in Path("/proc/net", file).read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == "0A" and f"socket:[{words[9]}]" in sockets:
                address, port = words[1].split(":")
                numbers = bytes.fromhex(address)[::-1]
                found.add(f"{socket.inet_ntoa(numbers) if len(numbers) == 4 else address}:{int(port, 16)}")
    return found


def test_a_directory_of_somebody_else_is_refused(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A directory that another user has made is not used, and nothing in it is believed."""
    (command.directory / "default").mkdir(parents=True)
    monkeypatch.setattr(os, "geteuid", _somebody(os.geteuid() + 1))
    for attempt in (Home().make, LocalPlatform.connect):
        with pytest.raises(LocalPlatformError, match="own"):
            attempt()
    monkeypatch.undo()
    shutil.rmtree(command.directory)


def _somebody(uid: int) -> Callable[[], int]:
    return lambda: uid
