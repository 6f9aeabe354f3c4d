"""The local platform when things go wrong: it loses nothing, leaves nothing and says what happened."""

from __future__ import annotations

import contextlib
import errno
import multiprocessing
import os
import pwd
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from yellowdog_client import PlatformClient
from yellowdog_client.model import ApiKey, NodeStatus, ServicesSchema, TaskStatus

from yellowdog_ray import LocalPlatform
from yellowdog_ray.errors import LocalPlatformError
from yellowdog_ray.local import directory as directory_module
from yellowdog_ray.local import nodes as nodes_module
from yellowdog_ray.local import server as server_module
from yellowdog_ray.local.belonging import NODE_FILES, processes_of
from yellowdog_ray.local.linux import remove_tree
from yellowdog_ray.local.nodes import Isolation

from .conftest import kinds
from .test_local_platform import Lab, until


@contextlib.contextmanager
def lab_on(kind: Isolation | None = None, workers: int = 1) -> Iterator[Lab]:
    with LocalPlatform(isolation=kind) as platform:
        schema = ServicesSchema(defaultUrl=platform.url)
        with PlatformClient.create(schema, ApiKey(platform.key_id, platform.secret)) as client:
            yield Lab(platform, client, workers)
    assert platform.leftovers() == []


def test_many_tasks_at_once() -> None:
    """Hundreds of tasks that come, print and end at the same time do not block the line to the nodes."""
    with lab_on(workers=60) as lab:
        script = "#" * 60_000 + "\nhead -c 4000 /dev/zero | tr '\\0' x\nexit 1"
        ids = [task for _ in range(3) for task in lab.submit(script, count=120)]
        for task in ids:
            lab.reached(task, TaskStatus.FAILED, timeout=90)


@pytest.mark.parametrize("kind", kinds(), ids=lambda kind: kind.value)
def test_a_killed_agent_takes_its_node_along(kind: Isolation) -> None:
    """When a node's agent is killed, the platform says that the node is lost, and its tasks do not go on."""
    with lab_on(kind) as lab:
        (task_id,) = lab.submit("setsid sleep 1000 & sleep 1000")
        task = lab.reached(task_id, TaskStatus.EXECUTING)
        directory = lab.platform.directory
        (task_process,) = until(lambda: _bash_of(directory))
        agent = int(Path(f"/proc/{task_process}/stat").read_text().rpartition(")")[2].split()[1])
        os.kill(agent, signal.SIGKILL)
        lab.reached(task_id, TaskStatus.FAILED)
        node = lab.client.worker_pool_client.get_node_by_id(str(task.nodeId))
        assert node.status == NodeStatus.LOST
        until(lambda: task_process not in processes_of(directory))
        assert len(lab.platform.nodes()) == 1
        # The other node is none the worse for it.
        (again,) = lab.submit("exit 0")
        lab.reached(again, TaskStatus.COMPLETED)


def _bash_of(directory: str) -> list[int]:
    found = []
    for pid in processes_of(directory):
        with contextlib.suppress(OSError):
            if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"/bin/bash\0taskdata.txt"):
                found.append(pid)
    return found


def test_a_forked_process_does_not_end_the_platform() -> None:
    """A process that was forked from the owner leaves the platform alone when it ends."""
    with LocalPlatform() as platform:
        child = os.fork()
        if child == 0:
            platform.close()
            os._exit(0)
        os.waitpid(child, 0)
        assert Path(platform.ssh_private_key_file).exists()
        assert platform._nodes._supervisor.process.poll() is None


def test_a_forked_process_does_not_keep_the_platform() -> None:
    """A process that was forked from the owner and lives on does not delay the end."""
    with LocalPlatform() as platform:
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(30,))
        child.start()
        began = time.monotonic()
        platform.close()
        assert time.monotonic() - began < 5
        assert platform.leftovers() == []
        child.kill()
        child.join()


@pytest.mark.parametrize("kind", kinds(), ids=lambda kind: kind.value)
def test_platforms_that_start_at_once(kind: Isolation) -> None:
    """Several platforms that start at the same moment get a network each, and the kind they were told."""
    platforms = [LocalPlatform(isolation=kind) for _ in range(3)]
    threads = [threading.Thread(target=platform.start) for platform in platforms]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    try:
        assert {platform.isolation for platform in platforms} == {kind}
        assert len({platform._nodes._supervisor.prefix for platform in platforms}) == 3
    finally:
        for platform in platforms:
            platform.close()
            assert platform.leftovers() == []


def test_an_interrupted_start_leaves_nothing(monkeypatch: pytest.MonkeyPatch, made: list[Path]) -> None:
    """Ctrl-C while the platform starts ends what was started."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(server_module.Server, "start", interrupt)
    platform = LocalPlatform()
    with pytest.raises(KeyboardInterrupt):
        platform.start()
    assert platform.leftovers() == []
    monkeypatch.setattr(nodes_module, "require_ssh", interrupt)
    with pytest.raises(KeyboardInterrupt):
        LocalPlatform().start()
    assert len(made) == 2
    assert not any(each.exists() for each in made)


def test_an_interrupted_close_can_be_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while the platform closes loses nothing: the next call goes on."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    platform = LocalPlatform().start()
    with monkeypatch.context() as patch:
        patch.setattr(nodes_module.LocalNodes, "close", interrupt)
        with pytest.raises(KeyboardInterrupt):
            platform.close()
    platform.close()
    assert platform.leftovers() == []


def test_a_broken_sshd_is_replaced(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where the system's sshd does not work, nodes get the embedded server, and the platform says why."""
    broken = tmp_path / "sshd"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    tmp_path.chmod(0o755)
    monkeypatch.setattr(nodes_module, "find_sshd", lambda: str(broken))
    with LocalPlatform() as platform:
        assert "embedded" in platform.describe()
        assert str(broken) in platform.describe()


def test_a_user_without_an_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user whom the system does not know by name, as in some containers, can have nodes and log in."""

    def unknown(uid: int) -> pwd.struct_passwd:
        raise KeyError(uid)

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    with lab_on() as lab:
        assert lab.platform.ssh_user == f"uid{os.geteuid()}"
        result = lab.ssh(lab.nodes[0], "id -u")
        assert result.stdout.strip() == str(os.geteuid()), result.stderr


def test_a_full_disk_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing can be written, the platform says where and why."""

    def full(*_: object, **__: object) -> str:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(directory_module.tempfile, "mkdtemp", full)
    with pytest.raises(LocalPlatformError, match="/tmp: No space left on device"):
        LocalPlatform().start()


def test_only_a_platforms_own_processes_are_its_own(tmp_path: Path) -> None:
    """A process that merely has a path of the platform in its environment is not one of its nodes'."""
    directory = str(tmp_path)
    commands = {
        "other": {"SSH_KEY": f"{directory}/id_ed25519", "PWD": directory},
        "ours": {NODE_FILES: f"{directory}/n11"},
        "longer": {NODE_FILES: f"{directory}-2/n11"},
    }
    processes = {
        name: subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, env=environment)
        for name, environment in commands.items()
    }
    try:
        until(lambda: processes_of(directory))
        assert processes_of(directory) == [processes["ours"].pid]
    finally:
        for process in processes.values():
            process.communicate(b"\n")


def test_read_only_directories_are_removed(tmp_path: Path) -> None:
    """A tree with directories that may not be written to or looked into is removed."""
    place = tmp_path / "tree" / "cache"
    (place / "deep").mkdir(parents=True)
    (place / "deep" / "file").touch()
    (place / "deep").chmod(0o555)
    place.chmod(0o000)
    remove_tree(tmp_path / "tree")
    assert not (tmp_path / "tree").exists()
