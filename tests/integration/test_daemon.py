"""The local platform that stays: it outlives shells, remembers, and is nobody else's."""

from __future__ import annotations

import contextlib
import json
import os
import pwd
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
    ServicesSchema,
    TaskStatus,
    WorkerPoolSearch,
    WorkRequirementSearch,
)

from tests.browser import PageReader
from yellowdog_ray import LocalPlatform, RayDogCluster
from yellowdog_ray.cli import main
from yellowdog_ray.errors import LocalPlatformError
from yellowdog_ray.local.daemon import Home, LocalAccount
from yellowdog_ray.local.history import WAS_KILLED, WAS_STOPPED
from yellowdog_ray.local.linux import processes_with
from yellowdog_ray.local.nodes import Isolation
from yellowdog_ray.local.supervisor import NODE_FILES
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
    """End a platform as `kill -9` does, and wait until its process is gone."""
    process = os.pidfd_open(account.pid)
    os.kill(account.pid, signal.SIGKILL)
    until(lambda: Home().holder() != account.pid)
    os.close(process)


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
        processes_with(NODE_FILES, account.directory)
        or supervisors(account)
        or Path(account.directory).exists()
        or (account.interface and Path("/sys/class/net", account.interface).exists())
    )


@pytest.mark.parametrize("everything", [False, True], ids=["platform", "with its supervisor"])
@pytest.mark.parametrize("kind", kinds(), ids=lambda kind: kind.value)
def test_killed_and_started_again(command: Command, kind: Isolation, everything: bool) -> None:
    """After `kill -9` nothing runs; the next start has the same key and port, and shows what has been."""
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

    again = command.start("--isolation", kind.value)["exports"]
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
    command.start()
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
    assert find_states(states) == []


def test_two_starts_at_once_start_one(command: Command) -> None:
    """Starts at the same moment give the same platform to all."""
    processes = [command.begin("start") for _ in range(4)]
    outputs = {process.communicate(timeout=120)[0] for process in processes}
    assert [process.returncode for process in processes] == [0, 0, 0, 0]
    assert len(outputs) == 1
    servers = [
        entry
        for entry in Path("/proc").glob("[0-9]*")
        if _environment(entry, "RAYDOG_LOCAL_DIR") == str(command.directory)
        and b"yellowdog_ray.local.daemon" in _bytes(entry / "cmdline").split(b"\0")
    ]
    assert [int(entry.name) for entry in servers] == [LocalPlatform.connect().pid]


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
    command.start()
    with sdk(account) as client:
        task = client.work_client.get_task_by_id(task_id)
    assert (str(task.status), task.errors[-1].error) == ("ABORTED", WAS_STOPPED)
    assert task.finishedTime is not None
    assert began - 1 <= task.finishedTime.timestamp() <= ended
    # A browser that was let in still is, and sees the same; a link from before is not taken.
    assert WAS_STOPPED in reader.text(f"tasks/{task_id}")
    assert "ABORTED" in reader.text("events")
    for each in (link, unused):
        assert requests.get(each, timeout=10).status_code == 401


def test_a_taken_port_means_a_new_key(command: Command) -> None:
    """Where somebody else has the platform's port, who may be sent its key, it gets another one."""
    command.start()
    account = LocalPlatform.connect()
    command("stop")
    with socket.socket() as squatter:
        squatter.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        squatter.bind(("127.0.0.1", int(account.url.rpartition(":")[2])))
        squatter.listen()
        command.start()
        moved = LocalPlatform.connect()
    assert moved.url != account.url
    assert moved.secret != account.secret
    command("stop")
    command.start("--new-key")
    assert LocalPlatform.connect().secret != moved.secret


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

_STRANGER = "nobody" if os.geteuid() == 0 else None
_PYTHON = shutil.which("python3", path="/usr/bin:/usr/local/bin")
_ATTEMPT = """
import json, socket, sys, urllib.error, urllib.request
url, ssh_address, ssh_port, directory, files = sys.argv[1:]
def status(path, key=None, method="GET"):
    headers = {"Authorization": key} if key else {}
    request = urllib.request.Request(url + path, headers=headers, method=method)
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
    "files": [opened(directory + "/" + name) for name in files.split()],
}
with socket.create_connection((ssh_address, int(ssh_port)), timeout=10) as connection:
    answers["ssh"] = connection.recv(4).decode()
print(json.dumps(answers))
"""


@pytest.mark.skipif(not _STRANGER or not _PYTHON, reason="needs root, to be another user, and a python3")
def test_another_user_has_no_way_in(command: Command, tmp_path: Path) -> None:
    """Another user of this machine is refused by the API, by the files and by the nodes' SSH servers."""
    stranger = pwd.getpwnam(_STRANGER or "")
    # Only the platform's own directory is to be in the way.
    base = Path(f"/tmp/raydog-test-daemon-{os.getpid()}")
    base.mkdir(mode=0o755)
    elsewhere = Command(base)
    try:
        elsewhere("start")
        directory = base / "default"
        account = LocalAccount(
            **{
                key: value
                for key, value in json.loads((directory / "platform.json").read_text()).items()
                if key != "version"
            }
        )
        names = sorted(path.name for path in directory.iterdir())
        assert {"platform.json", "history.sqlite", "id_ed25519", "platform.log"} <= set(names)
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700
        for name in names:
            assert stat.S_IMODE((directory / name).stat().st_mode) == 0o600, name
        with sdk(account) as client:
            lab = Lab(account, client)  # type: ignore[arg-type]
            address = str(lab.nodes[0].details.publicIpAddress)
        # The only listener of the platform's process is on the loopback interface.
        assert _listening(account.pid) == {account.url.removeprefix("http://")}
        result = subprocess.run(
            [
                _PYTHON, "-c", _ATTEMPT,
                account.url, address, str(account.ssh_port), str(directory), " ".join(names),
            ],
            user=stranger.pw_uid, group=stranger.pw_gid, extra_groups=[], cwd="/", env={}, text=True,
            capture_output=True, timeout=60, check=False,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        answers = json.loads(result.stdout)
        assert answers["calls"] == [401] * 12 + [200] * 3
        assert answers["post"] == [401, 401]
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
