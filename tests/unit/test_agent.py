"""A node's agent by itself, over its line: what it is told that cannot be, and who knocks at its SSH port."""

from __future__ import annotations

import os
import select
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from yellowdog_ray.local import agent as agent_module
from yellowdog_ray.local.agent import Agent
from yellowdog_ray.local.cgroups import NodeGroup
from yellowdog_ray.local.protocol import Channel


class Line:
    """The keeper's end of an agent's line, and the address where the agent listens."""

    def __init__(self, channel: Channel, address: tuple[str, int]) -> None:
        self._channel, self.address = channel, address
        self._events: list[dict[str, Any]] = []

    def next(self) -> dict[str, Any]:
        while not self._events:
            assert select.select([self._channel], [], [], 10)[0], "the agent says nothing"
            self._events = self._channel.receive()
        return self._events.pop(0)

    def task(self, run_id: str, data: str | None = None, **environment: str) -> None:
        self._channel.send(
            {
                "op": "task", "run_id": run_id, "slot": 0, "task_id": run_id, "task_group_id": "g",
                "task_type": "bash", "arguments": ["taskdata.txt"], "task_data": data,
                "environment": environment,
            }
        )  # fmt: skip


@pytest.fixture
def line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Line]:
    """An agent in a process of its own, whose SSH server sends back what it is sent."""
    monkeypatch.setattr(agent_module, "MAX_SSH", 3)
    ours, theirs = socket.socketpair()
    listener = socket.create_server(("127.0.0.1", 0))
    pid = os.fork()
    if pid == 0:
        try:
            ours.close()
            Agent(
                Channel(theirs), tmp_path, tmp_path / "data", {"PATH": os.environ["PATH"]}, ["/bin/cat"],
                [listener], NodeGroup(None, None, None, None), memory=0, ssh_takes_listeners=False,
            ).run()  # fmt: skip
        finally:
            os._exit(0)
    theirs.close()
    line = Line(Channel(ours), listener.getsockname())
    listener.close()
    assert line.next() == {"event": "registered"}
    yield line
    ours.close()
    end = time.monotonic() + 10
    while not (ended := os.waitpid(pid, os.WNOHANG)[0]) and time.monotonic() < end:
        time.sleep(0.01)
    if not ended:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert ended, "the agent has not ended with its line"


@pytest.mark.parametrize(
    ("data", "environment", "reason"),
    [("\ud800", {}, "surrogates"), ("true", {"A": "\ud800"}, ""), ("true", {"A=B": "x"}, "")],
)
def test_an_impossible_task_fails_alone(
    line: Line, data: str, environment: dict[str, str], reason: str
) -> None:
    """A task that cannot be written down or started fails with the reason; the next one runs."""
    line.task("odd", data, **environment)
    event = line.next()
    assert (event["event"], event["run_id"]) == ("task_not_started", "odd")
    assert reason in event["reason"]
    line.task("good", "exit 3")
    assert line.next()["event"] == "task_started"
    assert line.next()["exit_code"] == 3


@pytest.mark.parametrize("put", ["mkfifo", "mkdir", "ln -s taskdata.txt", ": #"])
def test_a_task_may_do_away_with_its_output(line: Line, put: str) -> None:
    """Whatever stands in its place, nobody waits for it or is led elsewhere."""
    line.task("odd", f"echo here; rm taskoutput.txt; {put} taskoutput.txt")
    assert line.next()["event"] == "task_started"
    event = line.next()
    assert (event["exit_code"], event["output_tail"]) == (0, "")


@pytest.mark.parametrize(("lines", "kept"), [(400, 400), (401, 399), (1000, 399)])
def test_the_end_of_the_output_is_kept(line: Line, lines: int, kept: int) -> None:
    """All of 4000 bytes; of more, the last 4000 without their first line, which may be but a part of one."""
    line.task("long", f"for ((i = 1; i <= {lines}; i++)); do printf '%09d\\n' $i; done")
    assert line.next()["event"] == "task_started"
    expected = [f"{number:09}" for number in range(1, lines + 1)]
    assert line.next()["output_tail"].splitlines() == expected[-kept:]


def test_ssh_connections_are_limited(line: Line) -> None:
    """Those beyond the limit are closed at once, with no process for them; who leaves makes room."""

    def answers(connection: socket.socket) -> bool:
        try:
            connection.sendall(b"hello")
            return connection.recv(10) == b"hello"
        except ConnectionError:
            return False

    connections = [socket.create_connection(line.address, timeout=10) for _ in range(5)]
    assert [answers(each) for each in connections] == [True, True, True, False, False]
    for each in connections[2:]:
        each.close()
    # Until the process of the one that left has been seen to end.
    for _ in range(200):
        with socket.create_connection(line.address, timeout=10) as another:
            if answers(another):
                break
        time.sleep(0.02)
    else:
        pytest.fail("nobody is let in after another has left")
    for each in connections:
        each.close()
