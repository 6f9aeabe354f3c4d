"""What runs in a node: it takes tasks, runs them as YellowDog's agent does, and lets SSH in.

A task gets a fresh directory below ``data/workers``, its data in ``taskdata.txt`` and its output in
``taskoutput.txt``; its process is the task type's command with the task's arguments, in a session of
its own; when it has ended the directory is deleted (YellowDog API, "How the agent runs a bash task").
An abort is SIGTERM to that process alone, and after a grace period SIGKILL to its whole session. The
platform's grace period is not published; 60 s here leaves Ray's own drain of 30 s room.

Standard library alone: it is forked, not started, so a node costs little beyond its tasks.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from yellowdog_ray.local import linux
from yellowdog_ray.local.belonging import end_all
from yellowdog_ray.local.cgroups import NodeGroup, enter
from yellowdog_ray.local.protocol import Channel, Closed, Loop

ABORT_GRACE = 60.0
"""Seconds between an abort's SIGTERM and its SIGKILL."""
OUTPUT_TAIL = 4000
"""Bytes of a task's output that are kept beyond its directory."""
MAX_SSH = 100
"""How many connections a node's SSH server has at a time where it is the system's, with a process for each;
whoever can reach the node may open them, before they log in."""
_TASK_COMMANDS = {"bash": "/bin/bash"}


@dataclass
class _Task:
    run_id: str
    pid: int
    directory: Path
    killed_before: int
    kill_at: float | None = None


class Agent:
    """The process that is a node, from its point of view.

    :param channel: the line to the supervisor.
    :param home: the agent's home, with the Python environment in ``venv``.
    :param data: where tasks run.
    :param environment: what every task starts with.
    :param ssh_command: the command of the SSH server: one that serves a single connection on its
        standard input, or, with ``ssh_takes_listeners``, one that accepts on inherited sockets.
    :param group: the control groups that tasks and SSH sessions run in.
    :param memory: the limit of the one for memory, in bytes.
    """

    def __init__(
        self,
        channel: Channel,
        home: Path,
        data: Path,
        environment: dict[str, str],
        ssh_command: list[str],
        listeners: list[socket.socket],
        group: NodeGroup,
        *,
        memory: int,
        ssh_takes_listeners: bool,
    ) -> None:
        self._channel = channel
        self._home, self._data = home, data
        self._environment = environment
        self._ssh_command, self._ssh_takes_listeners = ssh_command, ssh_takes_listeners
        self._listeners = listeners
        self._group, self._memory = group, memory
        self._tasks: dict[int, _Task] = {}
        self._ssh: set[int] = set()
        self._loop = Loop()

    def run(self) -> None:
        """Serve until the supervisor says stop or is gone; then leave no process behind."""
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        self._loop.watch_children(self._child_ended)
        self._loop.watch_line(self._channel, self._obey)
        if self._ssh_takes_listeners:
            self._start_ssh_server()
        else:
            for listener in self._listeners:
                listener.setblocking(False)
                self._loop.watch(listener, partial(self._accept, listener))
        with contextlib.suppress(Closed):
            self._channel.send({"event": "registered"})
            while True:
                self._loop.run_once(task.kill_at for task in self._tasks.values())
                self._kill_overdue()
        end_all(lambda: linux.descendants(os.getpid()), 5)

    def _obey(self) -> None:
        for message in self._channel.receive():
            if message["op"] == "task":
                self._start_task(message)
            elif message["op"] == "abort":
                self._abort(message["run_id"])
            elif message["op"] == "warn":
                self._signal(signal.SIGTERM)
            elif message["op"] == "kill":
                self._signal(signal.SIGKILL, message["run_id"])
            elif message["op"] == "stop":
                raise Closed

    # Tasks

    def _start_task(self, message: dict[str, Any]) -> None:
        run_id = message["run_id"]
        try:
            command = _TASK_COMMANDS[message["task_type"]]
            directory = self._data / "workers" / message["task_id"].replace(":", "_")
            # A retry of the same task finds a directory that an earlier attempt could not remove.
            linux.remove_tree(directory)
            directory.mkdir(parents=True)
            if message["task_data"] is not None:
                (directory / "taskdata.txt").write_bytes(message["task_data"].encode())
            environment = {
                **self._environment,
                **message["environment"],
                "YD_TASK_ID": message["task_id"],
                "YD_TASK_GROUP_ID": message["task_group_id"],
                "YD_WORKER_SLOT": str(message["slot"]),
            }
            output = os.open(directory / "taskoutput.txt", os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600)
        except (KeyError, ValueError, OSError) as error:
            reason = f"no such task type: {error}" if isinstance(error, KeyError) else str(error)
            self._channel.send({"event": "task_not_started", "run_id": run_id, "reason": reason})
            return
        try:
            killed_before = self._group.killed()
            pid = self._spawn([command, *message["arguments"]], environment, directory, output=output)
        except OSError as error:
            self._channel.send({"event": "task_not_started", "run_id": run_id, "reason": str(error)})
            return
        finally:
            os.close(output)
        self._tasks[pid] = _Task(run_id, pid, directory, killed_before)
        self._channel.send({"event": "task_started", "run_id": run_id})

    def _abort(self, run_id: str) -> None:
        for task in self._tasks.values():
            if task.run_id == run_id and task.kill_at is None:
                os.kill(task.pid, signal.SIGTERM)
                task.kill_at = time.monotonic() + ABORT_GRACE

    def _signal(self, number: signal.Signals, run_id: str | None = None) -> None:
        """Send a signal to the process of a task, or of every task."""
        for task in self._tasks.values():
            if run_id in (None, task.run_id):
                os.kill(task.pid, number)

    def _kill_overdue(self) -> None:
        now = time.monotonic()
        for task in self._tasks.values():
            if task.kill_at is not None and task.kill_at <= now:
                _kill_session(task.pid)
                task.kill_at = None

    def _child_ended(self, pid: int, status: int) -> None:
        self._ssh.discard(pid)
        task = self._tasks.pop(pid, None)
        if task is not None:
            self._finish(task, status)

    def _finish(self, task: _Task, status: int) -> None:
        # A shell that died of its signal leaves its foreground child behind; on this machine nobody
        # else would end it.
        _kill_session(task.pid)
        code = os.waitstatus_to_exitcode(status)
        tail = _tail(task.directory / "taskoutput.txt")
        linux.remove_tree(task.directory)
        self._channel.send(
            {
                "event": "task_exited",
                "run_id": task.run_id,
                "exit_code": code if code >= 0 else 128 - code,
                "output_tail": tail,
                "reason": self._out_of_memory(task) if code else "",
            }
        )

    def _out_of_memory(self, task: _Task) -> str:
        """Say that the node's memory has been used up while a task ran; nothing where it was not."""
        killed = self._group.killed() - task.killed_before
        if killed <= 0:
            return ""
        return (
            f"its node ran out of memory; the kernel killed {killed} of its processes at the limit of "
            f"{self._memory >> 20} MiB"
        )

    def _spawn(self, command: list[str], environment: dict[str, str], directory: Path, **ends: int) -> int:
        return _spawn(command, environment, directory, self._group.doors, **ends)

    # SSH

    def _accept(self, listener: socket.socket) -> None:
        try:
            connection, _ = listener.accept()
        except OSError:
            return
        with connection:
            if len(self._ssh) >= MAX_SSH:
                return
            connection.setblocking(True)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with contextlib.suppress(OSError):
                self._ssh.add(
                    self._spawn(self._ssh_command, self._environment, self._home, stdio=connection.fileno())
                )

    def _start_ssh_server(self) -> None:
        for listener in self._listeners:
            listener.set_inheritable(True)
        # It ends when its standard input does, which is when this process does.
        read_end, self._ssh_lifeline = os.pipe2(os.O_CLOEXEC)
        fds = [argument for listener in self._listeners for argument in ("--fd", str(listener.fileno()))]
        self._spawn([*self._ssh_command, *fds], self._environment, self._home, stdin=read_end)
        os.close(read_end)
        for listener in self._listeners:
            listener.close()


def _spawn(
    command: list[str],
    environment: dict[str, str],
    directory: Path,
    doors: list[str],
    *,
    stdin: int | None = None,
    output: int | None = None,
    stdio: int | None = None,
) -> int:
    """Start a command in a session of its own and return its pid; what is not given is /dev/null.

    :param doors: of the control groups that it is to be in.
    :raises OSError: when it cannot be started; the error is the child's own.
    """
    error_read, error_write = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if pid == 0:
        # Between fork and exec nothing may escape: whatever happens is told to the parent.
        try:
            os.setsid()
            enter(doors)
            null = os.open(os.devnull, os.O_RDWR)
            if stdio is not None:
                stdin, output = stdio, stdio
            os.dup2(null if stdin is None else stdin, 0)
            os.dup2(null if output is None else output, 1)
            # The error stream of a one-connection SSH server is not part of the conversation.
            os.dup2(null if output is None or stdio is not None else output, 2)
            os.chdir(directory)
            for number in range(1, signal.NSIG):
                with contextlib.suppress(OSError, ValueError):
                    signal.signal(number, signal.SIG_DFL)
            os.execve(command[0], command, environment)  # noqa: S606
        except BaseException as error:
            number = (error.errno if isinstance(error, OSError) else None) or errno.EIO
            os.write(error_write, str(number).encode())
        finally:
            os._exit(127)
    os.close(error_write)
    with os.fdopen(error_read) as answer:
        failure = answer.read()
    if failure:
        os.waitpid(pid, 0)
        raise OSError(int(failure), f"{command[0]}: {os.strerror(int(failure))}")
    return pid


def _kill_session(sid: int) -> None:
    """SIGKILL every process of a session."""
    for pid in linux.descendants(os.getpid()):
        with contextlib.suppress(OSError):
            if os.getsid(pid) == sid:
                os.kill(pid, signal.SIGKILL)


def _tail(path: Path) -> str:
    output = linux.read_end(path, OUTPUT_TAIL + 1) or b""
    text = output[-OUTPUT_TAIL:].decode(errors="replace")
    # A first line that was cut in two says nothing.
    return text if len(output) <= OUTPUT_TAIL else text.partition("\n")[2]
