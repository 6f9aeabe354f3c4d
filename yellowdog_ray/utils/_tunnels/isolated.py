"""Any engine in a process of its own, which a busy Python process does not slow down.

The process is told what to do, secrets too, over its standard input, and answers in lines of JSON. It ends
with its standard input, or with the process that it works for, whose forks may hold the former open.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from typing import Any, BinaryIO

from yellowdog_ray import errors
from yellowdog_ray.errors import TunnelError
from yellowdog_ray.utils._ssh.proxy import own_environment
from yellowdog_ray.utils._ssh.route import Login
from yellowdog_ray.utils._tunnels.engines import Engine, Forward, LinkStatus, make_engine

__all__ = ["Isolated", "serve"]

_BOOT = (
    "import json, sys; told = json.loads(open(0, 'rb', 0, closefd=False).readline()); "
    "sys.path[:] = told['path']; "
    "from yellowdog_ray.utils._tunnels.isolated import serve; serve(told)"
)
_START_SECONDS = 120.0  # several servers and keys may have to be tried, each with a limit of its own
_LOGGERS = "yellowdog_ray.utils"
_STATUS_SECONDS = 0.25


class Isolated:
    """An engine whose work is done in a helper process.

    :param name: the engine there.
    """

    def __init__(self, name: str, login: Login, forwards: list[Forward]) -> None:
        self._told = {
            "engine": name,
            "login": asdict(login),
            "forwards": [asdict(forward) for forward in forwards],
            "parent": os.getpid(),
            "path": [os.path.abspath(entry or ".") for entry in sys.path],
        }
        self._where = login.where
        self._process: subprocess.Popen[bytes] | None = None
        self._reader: threading.Thread | None = None
        self._answer: dict[str, Any] | None = None
        self._answered = threading.Event()
        self._ended = threading.Event()
        self._status, self._told_at = LinkStatus("stopped"), time.monotonic()
        self._stopping = False

    def start(self) -> list[int]:
        self._process = subprocess.Popen(
            # -I: without it, a json.py in the current directory would be told all that follows.
            [sys.executable, "-I", "-c", _BOOT],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # an interrupt at the terminal is not for it
            env=own_environment(),
        )
        self._reader = threading.Thread(target=self._read, name="ray-tunnels-helper", daemon=True)
        self._reader.start()
        self._send(self._told)
        self._answered.wait(_START_SECONDS)
        answer = self._answer
        if answer is None:
            raise TunnelError(f"The helper process for the tunnels to {self._where} did not start them")
        if "error" in answer:
            kind = getattr(errors, answer["error"], TunnelError)
            raise kind(answer["message"])
        return list(answer["ports"])

    def stop(self, deadline: float) -> list[str]:
        process, self._stopping = self._process, True
        if process is None:
            return []
        self._send({"stop": deadline - time.monotonic() - 0.3})
        self._ended.wait(max(0.0, deadline - time.monotonic() - 0.1))
        problems = list((self._answer or {}).get("problems", ()))
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if self._reader is not None:
            self._reader.join(1)
        for pipe in (process.stdin, process.stdout):
            with contextlib.suppress(OSError):
                if pipe is not None:
                    pipe.close()
        self._status = LinkStatus("stopped")
        return problems

    def status(self) -> LinkStatus:
        if self._process is not None and self._process.poll() is not None and not self._stopping:
            return LinkStatus("stopped", last_error="The helper process has ended; start the tunnels again")
        return replace(self._status, seconds=self._status.seconds + time.monotonic() - self._told_at)

    def _send(self, message: dict[str, Any]) -> None:
        pipe = self._process.stdin if self._process is not None else None
        with contextlib.suppress(OSError, ValueError):
            if pipe is not None:
                pipe.write(json.dumps(message).encode() + b"\n")
                pipe.flush()

    def _read(self) -> None:
        process = self._process
        assert process is not None  # noqa: S101 - for the type checker
        assert process.stdout is not None  # noqa: S101 - for the type checker
        for line in process.stdout:
            message = json.loads(line)
            if "log" in message:
                logging.getLogger(message["log"]).log(message["level"], "%s", message["message"])
            elif "status" in message:
                self._status, self._told_at = LinkStatus(**message["status"]), time.monotonic()
            else:
                self._answer = message
                self._answered.set()
        self._answered.set()
        self._ended.set()


class _Lines(logging.Handler):
    """Sends log records to the process that this one works for."""

    def __init__(self, pipe: BinaryIO) -> None:
        super().__init__()
        self._pipe = pipe

    def emit(self, record: logging.LogRecord) -> None:
        self.say({"log": record.name, "level": record.levelno, "message": record.getMessage()})

    def say(self, message: dict[str, Any]) -> None:
        """Send a line; where nobody reads it any more, this process is about to end."""
        with contextlib.suppress(OSError, ValueError):
            line = json.dumps(message).encode() + b"\n"
            with self.lock:  # type: ignore[union-attr]
                self._pipe.write(line)
                self._pipe.flush()


class _Commands:
    """What this process is told after its start: only to stop: by a line, or when its parent has ended."""

    def __init__(self, parent: int, engine: Engine) -> None:
        self.stop = threading.Event()
        self.seconds = 1.0
        self.is_started = False
        self._engine = engine
        threading.Thread(target=self._read, daemon=True).start()
        threading.Thread(target=self._watch, args=(parent,), daemon=True).start()

    def _watch(self, parent: int) -> None:
        while os.getppid() == parent:
            time.sleep(_STATUS_SECONDS)
        self._end()

    def _read(self) -> None:
        # Not through sys.stdin: that this thread still reads would be a fatal error when Python ends.
        with open(0, "rb", 0, closefd=False) as pipe:
            line = pipe.readline()
        if line:
            self.seconds = float(json.loads(line)["stop"])
        self._end()

    def _end(self) -> None:
        self.stop.set()
        try:
            if not self.is_started:
                self._engine.stop(time.monotonic() + self.seconds)
        finally:
            # Whatever holds this process up: nobody waits for it.
            time.sleep(self.seconds + 1)
            os._exit(1)


def serve(told: dict[str, Any]) -> None:
    """Be the helper process: start an engine, tell how it is doing, and stop it when told, or left alone."""
    lines = _Lines(sys.stdout.buffer)
    logger = logging.getLogger(_LOGGERS)
    logger.addHandler(lines)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    forwards = [Forward(**forward) for forward in told["forwards"]]
    engine: Engine = make_engine(told["engine"], Login(**told["login"]), forwards)
    commands = _Commands(told["parent"], engine)
    try:
        ports = engine.start()
        commands.is_started = True
    except Exception as error:
        problems = engine.stop(time.monotonic() + 1)
        lines.say({"error": type(error).__name__, "message": str(error), "problems": problems})
        return
    lines.say({"status": asdict(engine.status())})
    lines.say({"ports": ports})
    last: dict[str, Any] = {}
    while not commands.stop.wait(_STATUS_SECONDS):
        status = asdict(engine.status())
        if {**status, "seconds": 0} != {**last, "seconds": 0}:
            lines.say({"status": status})
            last = status
    lines.say({"problems": engine.stop(time.monotonic() + commands.seconds)})
