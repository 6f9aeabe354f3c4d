"""The engine on OpenSSH's ``ssh``: the fastest, with all that the user's settings say."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import re
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections import deque
from pathlib import Path

from yellowdog_ray.errors import HostKeyError, SSHLoginError, TunnelError
from yellowdog_ray.utils._ssh.connection import CONNECT_TIMEOUT
from yellowdog_ray.utils._ssh.hostkeys import HostKey, default_record, option_value
from yellowdog_ray.utils._ssh.proxy import own_environment, see_group_end
from yellowdog_ray.utils._ssh.route import USER_CONFIG, Login
from yellowdog_ray.utils._tunnels.engines import (
    FIRST_PAUSE,
    LOGIN_PAUSE,
    LONGEST_PAUSE,
    Forward,
    LinkStatus,
    State,
)
from yellowdog_ray.utils._tunnels.ports import free_ends, is_held

__all__ = ["OpenSSH"]

log = logging.getLogger(__name__)

_PINNED = "raydog-head"  # what a pinned server is called in the file that ssh is given
_READY = b"raydog-tunnels"
# A session is what lets an sshd before 10.1 send small packets at once. It ends with our end of its input.
_COMMAND = f"echo {_READY.decode()}; exec cat"
_END_SECONDS = 1.0
_ASK_SECONDS = 2  # between questions to a server that says nothing by itself
_SILENT_SECONDS = 14  # until it is taken for dead
_CLIENTS_TROUBLE = re.compile(r"channel \d+: open failed")


class OpenSSH:
    """Forwards ports with one ``ssh`` process, which is started again when its connection is lost."""

    def __init__(self, login: Login, forwards: list[Forward]) -> None:
        self._login, self._forwards = login, forwards
        self._ends: list[tuple[str, int]] = []  # of each forward, on this machine
        self._directory: tempfile.TemporaryDirectory[str] | None = None
        self._run: _Run | None = None
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._state: State = "stopped"
        self._since = time.monotonic()
        self._reconnects = 0
        self._last_error: str | None = None
        self._keeper = threading.Thread(target=self._keep, name="ray-tunnels-openssh", daemon=True)

    def start(self) -> list[int]:
        if shutil.which("ssh") is None:
            raise TunnelError('engine="openssh" needs the program ssh, which is not here')
        if self._login.key_file and not os.path.exists(self._login.key_file):
            raise TunnelError(f"Cannot read the private key file {self._login.key_file}: No such file")
        self._ends = free_ends(self._forwards)
        try:
            self._directory = tempfile.TemporaryDirectory(prefix="raydog-ssh-")
            self._launch()
        except TunnelError:
            raise
        except OSError as error:  # no more processes, for one
            raise TunnelError(f"ssh could not be started: {error.strerror or error}") from error
        self._keeper.start()
        return [port for _, port in self._ends]

    def stop(self, deadline: float) -> list[str]:
        self._closing.set()
        with self._lock:
            run, self._run = self._run, None
            self._say("stopped")
        problems = run.end(deadline) if run is not None else []
        if self._keeper.is_alive():
            self._keeper.join(max(0.0, deadline - time.monotonic()))
            if self._keeper.is_alive():
                problems.append("the thread that watches ssh has not ended")
        if self._directory is not None:
            self._directory.cleanup()
        return problems

    def status(self) -> LinkStatus:
        with self._lock:
            seconds = time.monotonic() - self._since
            return LinkStatus(self._state, seconds, self._reconnects, None, self._last_error)

    def _say(self, state: State) -> None:
        if state != self._state:
            self._state, self._since = state, time.monotonic()

    def _launch(self) -> None:
        """Start ssh, and return when its ports are open.

        :raises TunnelError: with what it has said.
        """
        record, unwritable = self._record()
        before = record.read_bytes() if record is not None and record.exists() else b""
        run = _Run(self._command(record))
        with self._lock:
            closing = self._closing.is_set()
            if not closing:
                self._run = run
        if closing:
            run.end(time.monotonic() + _END_SECONDS)
            raise TunnelError("The tunnels were stopped while they were started")
        if not run.wait_until_ready(4 * CONNECT_TIMEOUT):
            run.end(time.monotonic() + _END_SECONDS)
            raise self._problem(run)
        if not all(is_held(*end) for end in self._ends):
            run.end(time.monotonic() + _END_SECONDS)
            raise TunnelError(
                f"ssh is connected to {self._login.where}, but does not listen on its local ports: "
                f"{run.said or 'a setting of yours may keep it from that'}"
            )
        if unwritable is not None and not self._login.strict:
            log.warning(
                "The key of %s could not be recorded in %s (%s): unless a known_hosts file of yours names "
                "it, it is believed here, and would be whatever it is",
                *(self._login.where, record, unwritable),
            )
        if record is not None and record.exists() and record.read_bytes() != before:
            record.chmod(0o600)
            log.warning(
                "%s was not known: its key is believed from now on, recorded in %s", self._login.where, record
            )
        with self._lock:
            if not self._closing.is_set():
                self._reconnects += self._state == "down"
                self._say("up")

    def _keep(self) -> None:
        """Start ssh again whenever it has ended."""
        while not self._closing.is_set():
            run = self._run
            if run is not None:
                run.process.wait()
            if self._closing.is_set():
                return
            said = "ssh has ended"
            if run is not None:
                run.end(time.monotonic() + _END_SECONDS)  # which also waits for its last words
                said = _reason(run)
            with self._lock:
                self._last_error = f"The SSH connection to {self._login.where} was lost: {said}"
                self._say("down")
            log.warning("%s. It is being made again", self._last_error)
            if not self._again():
                return

    def _again(self) -> bool:
        pause = FIRST_PAUSE
        while not self._closing.wait(pause):
            pause = min(2 * pause, LONGEST_PAUSE)
            try:
                self._launch()
            except Exception as error:
                if not isinstance(error, TunnelError):  # no more processes, for one
                    log.warning(
                        "The SSH connection to %s could not be made again: %r", self._login.where, error
                    )
                with self._lock:
                    self._last_error = str(error) or type(error).__name__
                    if isinstance(error, HostKeyError) and not self._closing.is_set():
                        self._say("refused")
                        log.error("The SSH connection to %s is not made again: %s", self._login.where, error)
                        return False
                if isinstance(error, SSHLoginError):  # nobody is to be locked out for too many attempts
                    pause = LOGIN_PAUSE
            else:
                log.warning("The SSH connection to %s is there again", self._login.where)
                return True
        return False

    def _record(self) -> tuple[Path | None, str | None]:
        """Tell the file for a key on first use, None where it is pinned; and why it cannot be written."""
        if self._login.host_key is not None:
            return None, None
        record = Path(self._login.record) if self._login.record else default_record(self._login.host)
        try:
            record.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            os.close(os.open(record, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600))
        except OSError as error:  # ssh would go on without a word
            return record, error.strerror or str(error)
        return record, None

    def _command(self, record: Path | None) -> list[str]:
        login = self._login
        options = {
            **_own_session(),
            "BatchMode": "yes",
            "Ciphers": "^aes128-gcm@openssh.com,aes256-gcm@openssh.com",
            "ClearAllForwardings": "no",
            "ConnectTimeout": f"{CONNECT_TIMEOUT:.0f}",
            "ControlMaster": "no",
            "ControlPath": "none",
            "ExitOnForwardFailure": "yes",
            "ForwardAgent": "no",
            "LogLevel": "ERROR",
            "RemoteCommand": "none",
            "RequestTTY": "no",
            "ServerAliveCountMax": f"{_SILENT_SECONDS // _ASK_SECONDS - 1}",
            "ServerAliveInterval": f"{_ASK_SECONDS}",
            "UpdateHostKeys": "no",
        }
        if record is None:
            assert login.host_key is not None  # noqa: S101 - for the type checker
            assert self._directory is not None  # noqa: S101 - for the type checker
            known = Path(self._directory.name, "known_hosts")
            known.write_text(f"{_PINNED} {HostKey.parse(login.host_key).line}\n")
            options |= {
                "UserKnownHostsFile": option_value(known),
                "GlobalKnownHostsFile": "/dev/null",
                "HostKeyAlias": _PINNED,
                "StrictHostKeyChecking": "yes",
            }
        else:
            options |= {
                # The first one is where ssh adds a key.
                "UserKnownHostsFile": f"{option_value(record)} ~/.ssh/known_hosts ~/.ssh/known_hosts2",
                "StrictHostKeyChecking": "yes" if login.strict else "accept-new",
                "HashKnownHosts": "no",
                "CheckHostIP": "no",
            }
        words = ["ssh", "-l", login.user]
        if login.ssh_config != USER_CONFIG:  # which ssh finds by itself, and the system's too
            words += ["-F", login.ssh_config or "none"]
        if login.port is not None:
            words += ["-p", str(login.port)]
        if login.key_file:
            options |= {"IdentityFile": option_value(login.key_file), "IdentitiesOnly": "yes"}
        if login.jump is not None:
            words += ["-J", login.jump.replace(" ", "")]
        for name, value in options.items():
            words += ["-o", f"{name}={value}"]
        for forward, (address, port) in zip(self._forwards, self._ends, strict=True):
            # Of a name with several addresses ssh would be content with one that it gets.
            ends = (address, port, forward.remote_host, forward.remote_port)
            words += ["-L", ":".join(f"[{end}]" if ":" in str(end) else str(end) for end in ends)]
        return [*words, "--", login.host, _COMMAND]

    def _problem(self, run: _Run) -> TunnelError:
        where, said = self._login.where, f"{run.said or 'it has said nothing'} ({run.fate})"
        if "IDENTIFICATION HAS CHANGED" in said or "verification failed" in said:
            return HostKeyError(
                f"{where} is not the server that was expected, its key has changed, or it is not known: "
                f"{said}"
            )
        if "Permission denied" in said:
            return SSHLoginError(f"{where} does not let user {self._login.user!r} in: {said}")
        return TunnelError(f"ssh did not open the tunnels to {where}: {said}")


@functools.cache
def _own_session() -> dict[str, str]:
    """List the options by which a session is what it is here, whatever the settings say."""
    version = subprocess.run(["ssh", "-V"], capture_output=True, text=True, check=False).stderr
    found = re.match(r"OpenSSH_(\d+)\.(\d+)", version)
    if found is None or (int(found[1]), int(found[2])) < (8, 7):  # it knows neither these nor the settings
        return {}
    return {"ForkAfterAuthentication": "no", "SessionType": "default", "StdinNull": "no"}


def _reason(run: _Run) -> str:
    """Tell why a connection was lost whose ssh has ended."""
    if run.said:
        return f"{run.said} ({run.fate})"
    # Of everything else that has it give up it says something.
    silent = run.process.returncode == 255
    return f"the server has been silent for {_SILENT_SECONDS} s" if silent else run.fate


class _Run:
    """One ``ssh`` process."""

    def __init__(self, command: list[str]) -> None:
        self._lines: deque[str] = deque(maxlen=20)
        self._ready = threading.Event()
        self._got_ready = self._ended_here = self._is_ending = False
        # In a session of its own it has no terminal to ask anything at, and an interrupt is not for it.
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            env=own_environment(),
        )
        self._readers = [
            threading.Thread(target=work, name="ray-tunnels-openssh-output", daemon=True)
            for work in (self._read_output, self._read_errors)
        ]
        for reader in self._readers:
            reader.start()

    @property
    def said(self) -> str:
        """The end of what it has said, in one line."""
        return " ".join(line for line in self._lines if line.strip("@ "))

    @property
    def fate(self) -> str:
        """What has become of it."""
        status = self.process.poll()
        if status is None or self._ended_here:
            return "it was not ready within its time"
        return f"ssh was ended by signal {-status}" if status < 0 else f"ssh ended with exit status {status}"

    def wait_until_ready(self, timeout: float) -> bool:
        """Wait until its ports are open; return whether they are."""
        if self._ready.wait(timeout) and not self._got_ready:
            # It has closed its output, and is about to tell its exit status.
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(_END_SECONDS)
        return self.process.poll() is None and self._got_ready

    def end(self, deadline: float) -> list[str]:
        """End it until a deadline; return what is left then, a sentence each."""
        if not self._is_ending:  # once: later its number may be another one's
            self._is_ending = True
            self._ended_here = self.process.poll() is None
            # The group, for a ProxyCommand too: it need not end with its input, nor with ssh.
            with contextlib.suppress(OSError):
                os.killpg(self.process.pid, signal.SIGTERM)
            see_group_end(self.process, max(0.1, deadline - time.monotonic() - 0.3))
        for reader in self._readers:
            reader.join(max(0.0, deadline - time.monotonic()))
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(max(0.0, deadline - time.monotonic()))
        left = [f"ssh ({self.process.pid}) has not ended"] if self.process.poll() is None else []
        if not any(reader.is_alive() for reader in self._readers):
            for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
                with contextlib.suppress(OSError):
                    if pipe is not None:
                        pipe.close()
        return left

    def _read_output(self) -> None:
        assert self.process.stdout is not None  # noqa: S101 - for the type checker
        for line in self.process.stdout:
            if line.strip() == _READY:
                self._got_ready = True
                self._ready.set()
        self._ready.set()

    def _read_errors(self) -> None:
        assert self.process.stderr is not None  # noqa: S101 - for the type checker
        for line in self.process.stderr:
            text = line.decode(errors="replace").strip()
            if not _CLIENTS_TROUBLE.match(text):  # which is not that of the connection
                self._lines.append(text)
