"""Reach, and the worker script's own watch over its head, with a real cluster on the local platform."""

from __future__ import annotations

import itertools
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import pytest
from yellowdog_client import PlatformClient
from yellowdog_client.model import (
    ApiKey,
    ComputeRequirementSearch,
    ServicesSchema,
    Task,
    TaskSearch,
    TaskStatus,
    WorkRequirementSearch,
)

from tests.ssh_fixtures import make_key
from yellowdog_ray import LocalPlatform, RayDogCluster
from yellowdog_ray.errors import ClusterStateError, HostKeyError, TunnelError
from yellowdog_ray.raydog.access import SSHAccess
from yellowdog_ray.raydog.reach import Reach
from yellowdog_ray.raydog.scripts import get_script

pytestmark = pytest.mark.ray

TOKEN = "0123456789abcdef0123456789abcdef"
TOKEN_LINES = f"export RAY_AUTH_MODE=token RAY_AUTH_TOKEN={TOKEN}\n"
HEAD_GONE_SECONDS = 4

_numbers = itertools.count(1)

T = TypeVar("T")


def until(look: Callable[[], T | None], timeout: float = 60) -> T:
    """Wait until there is something."""
    deadline = time.monotonic() + timeout
    while (found := look()) is None:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return found


class World:
    """A cluster with a head and a worker, of which nobody knows yet whether Ray runs."""

    def __init__(
        self, platform: LocalPlatform, cluster: RayDogCluster, name: str, client: PlatformClient
    ) -> None:
        self.platform, self.name, self.client = platform, name, client
        self.private_ip, self.public_ip = cluster.build(timedelta(minutes=2))
        # Nobody is to notice the end of the head but its workers.
        cluster.detach()

    def access(self, **changes: Any) -> SSHAccess:
        arguments = {
            "user": self.platform.ssh_user,
            "private_key_file": self.platform.ssh_private_key_file,
            "port": self.platform.ssh_port,
            "host_key": self.platform.ssh_host_key,
            **changes,
        }
        return SSHAccess(**arguments)

    def reach(self, token: str | None = TOKEN, **changes: Any) -> Reach:
        addresses = [address for address in (self.public_ip, self.private_ip) if address]
        return Reach(addresses, self.access(**changes), token)

    def task(self, role: str) -> Task:
        """Return the only task of the head or of the workers."""
        (work,) = [
            work
            for work in self.client.work_client.get_work_requirements(WorkRequirementSearch()).list_all()
            if work.name and work.name.startswith(self.name)
        ]
        tasks = self.client.work_client.find_tasks(TaskSearch(workRequirementId=work.id))
        (task,) = [task for task in tasks if str(task.name).startswith(role)]
        return task

    def terminate_head(self) -> None:
        computes = self.client.compute_client.get_compute_requirements(ComputeRequirementSearch()).list_all()
        (head,) = [
            compute
            for compute in computes
            if str(compute.name).startswith(self.name) and "-head" in str(compute.name)
            if str(compute.status) == "RUNNING"
        ]
        self.client.compute_client.terminate_compute_requirement_by_id(str(head.id))


@pytest.fixture
def world(platform: LocalPlatform, make_cluster: Callable[..., RayDogCluster]) -> Iterator[World]:
    """A cluster whose scripts print a line of their own first and know the token by themselves."""
    name = f"reach-{os.getpid()}-{next(_numbers)}"
    cluster = make_cluster(
        cluster_name=name,
        ray_auth="off",
        head_node_ray_start_script="echo 'this is the head'\n" + TOKEN_LINES + get_script("head"),
    )
    wrapper = f"echo 'this is the worker'\nexport RAYDOG_HEAD_GONE_SECONDS={HEAD_GONE_SECONDS}\n"
    cluster.add_worker_pool(platform.template_names[0], wrapper + TOKEN_LINES + get_script("worker"), 1)
    schema = ServicesSchema(defaultUrl=platform.url)
    with PlatformClient.create(schema, ApiKey(platform.key_id, platform.secret)) as client:
        yield World(platform, cluster, name, client)


def healthy(reach: Reach) -> list[str]:
    """Wait until Ray is well; return what was said before."""
    said = []

    def look() -> bool | None:
        answer = reach.health()
        if answer is not None:
            said.append(answer)
        return True if answer is None else None

    until(look)
    return said


def test_reach(world: World, tmp_path: Path) -> None:
    """Health, nodes and output of a cluster are told, and of what goes wrong the reason."""
    with world.reach() as reach:
        said = healthy(reach)
        assert any("127.0.0.1:52365" in answer for answer in said), said
        nodes = until(lambda: nodes if len(nodes := reach.ray_nodes()) == 2 else None)
        assert all(node.alive for node in nodes)
        (head,) = [node for node in nodes if node.is_head]
        (worker,) = [node for node in nodes if not node.is_head]
        assert head.address == world.private_ip

        of_head, of_worker = world.task("head"), world.task("worker")
        assert "this is the head" in reach.task_output(head.address, str(of_head.id))
        assert "this is the worker" in reach.task_output(worker.address, str(of_worker.id))
        end = reach.task_output(head.address, str(of_head.id), max_bytes=20)
        assert 0 < len(end) <= 20
        with pytest.raises(ClusterStateError, match=r"no output of task .* on .*No such file"):
            reach.task_output(worker.address, str(of_head.id))
        with pytest.raises(
            TunnelError, match=r"The head cannot connect to 127\.0\.0\.1:1: nothing listens there"
        ):
            reach._ask(1, "/")

        # The connection is lost, in the middle of nothing, without a word; then from several threads at once.
        for cut in (lambda sock: sock.close(), lambda sock: sock.shutdown(socket.SHUT_RDWR)):
            lost = reach._connection
            assert lost is not None
            cut(lost.transport.sock)
            assert reach.health() is None
            assert reach._connection is not lost
        first = reach._connection
        assert first is not None
        first.transport.sock.shutdown(socket.SHUT_RDWR)
        answers: list[int] = []
        threads = [threading.Thread(target=lambda: answers.append(len(reach.ray_nodes()))) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert answers == [2] * 8

        with world.reach("f" * 32) as stranger:
            assert stranger.health() is None
            with pytest.raises(ClusterStateError, match="does not accept the token of this cluster: HTTP 40"):
                stranger.ray_nodes()
        with (
            world.reach(None) as nobody,
            pytest.raises(ClusterStateError, match="asks for a token: HTTP 401"),
        ):
            nobody.ray_nodes()
        make_key(tmp_path / "other")
        with world.reach(private_key_file=tmp_path / "other") as locked_out:
            assert "does not let user" in str(locked_out.health())
            with pytest.raises(TunnelError, match="does not let user"):
                locked_out.ray_nodes()
        other_host = (tmp_path / "other.pub").read_text()
        with (
            world.reach(host_key=other_host) as deceived,
            pytest.raises(HostKeyError, match="not the server that was expected"),
        ):
            deceived.health()

        reach.close()
        with pytest.raises(ClusterStateError, match="closed"):
            reach.health()
    assert TOKEN not in repr(reach)


def test_a_worker_leaves_when_its_head_is_gone(world: World) -> None:
    """A worker fails soon after its head was terminated, says why, and is not run again."""
    with world.reach() as reach:
        healthy(reach)
        until(lambda: True if sum(node.alive for node in reach.ray_nodes()) == 2 else None)
        began = time.monotonic()
        world.terminate_head()
        task = until(lambda: task if (task := world.task("worker")).status == TaskStatus.FAILED else None, 40)
        assert time.monotonic() - began < HEAD_GONE_SECONDS + 20
        assert task.errors
        told = str(task.errors[-1].error)
        assert "This node leaves: the Ray head at" in told
        assert world.private_ip in told
        assert reach.health() is not None
    time.sleep(2)
    assert world.task("worker").status == TaskStatus.FAILED
