"""Finding, starting and stopping a local platform that stays, from another process."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from yellowdog_ray.errors import LocalPlatformError
from yellowdog_ray.local.account import LocalAccount
from yellowdog_ray.local.home import START_SECONDS, Home, left_of
from yellowdog_ray.local.needs import require_linux
from yellowdog_ray.local.process_node import import_path

if TYPE_CHECKING:
    from yellowdog_ray.local.daemon import Options

__all__ = ["connect", "start", "stop", "tidy"]

_STOP_SECONDS = 60.0
_LOG_BYTES = 1_000_000


def connect(name: str = "default") -> LocalAccount:
    """Find the platform of this name; see :meth:`.LocalPlatform.connect`."""
    account = Home(name).account()
    if account is None:
        more = "" if name == "default" else f" --name {name}"
        raise LocalPlatformError(f"no local platform {name!r} runs: start it with `raydog local start{more}`")
    return account


def start(home: Home, options: Options) -> tuple[LocalAccount, bool]:
    """Start a platform in a process of its own, and wait until it answers.

    :returns: what a client needs, and whether it was running already.
    :raises LocalPlatformError: when it does not come up.
    """
    require_linux()
    home.make()
    with home.alone():
        account = home.account(START_SECONDS)
        if account is not None:
            return account, True
        left = home.clean_up()
        if left:
            raise LocalPlatformError(
                f"what the local platform {home.name!r} left when it was killed cannot be removed: "
                f"{', '.join(left)}"
            )
        _spawn(home, options)
        account = home.account()
        if account is None:
            raise LocalPlatformError(f"the local platform has ended at once; see {home.log}")
        return account, False


def tidy(home: Home) -> list[str]:
    """Where a platform does not run, remove what it left when it was killed; return what stays."""
    if not home.directory.exists():
        return []
    home.check()
    with home.alone():
        return home.clean_up()


def _spawn(home: Home, options: Options) -> None:
    with contextlib.suppress(FileNotFoundError):
        if home.log.stat().st_size > _LOG_BYTES:
            os.replace(home.log, f"{home.log}.1")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(import_path())}
    environment["RAYDOG_LOCAL_DIR"] = str(home.directory.parent)
    if environment.get("RAYDOG_STATE_DIR"):
        environment["RAYDOG_STATE_DIR"] = str(Path(environment["RAYDOG_STATE_DIR"]).expanduser().absolute())
    answer, tell = os.pipe()
    with (
        open(answer, "rb") as answers,
        open(home.log, "ab", opener=lambda name, flags: os.open(name, flags, 0o600)) as log,
    ):
        try:
            child = subprocess.Popen(
                [
                    sys.executable, "-m", "yellowdog_ray.local.daemon",
                    home.name, str(tell), json.dumps(asdict(options)),
                ],
                pass_fds=[tell],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # The first place to import from; nobody else may write there.
                cwd=home.directory,
                start_new_session=True,
                env=environment,
            )  # fmt: skip
        finally:
            os.close(tell)
        try:
            if not select.select([answers], [], [], START_SECONDS)[0]:
                raise LocalPlatformError(
                    f"the local platform has not come up within {START_SECONDS:.0f} s; see {home.log}"
                )
            told = json.loads(answers.read() or b"null")
        except BaseException:
            child.terminate()
            raise
    if told is None:
        raise LocalPlatformError(f"the local platform ended while it came up; see {home.log}")
    if "error" in told:
        raise LocalPlatformError(told["error"])


def stop(home: Home) -> int | None:
    """End a platform with all its nodes, and see that nothing is left of it.

    :returns: the process that was ended; None where none ran.
    :raises LocalPlatformError: when it does not end, or something is left.
    """
    if not home.directory.exists():
        return None
    home.check()
    with home.alone():
        pid = home.holder()
        if pid is not None:
            _end(home, pid)
        left = home.clean_up() or (left_of(known) if (known := home.read()) else [])
    if left:
        raise LocalPlatformError(f"of the local platform {home.name!r} this is left: {', '.join(left)}")
    return pid


def _end(home: Home, pid: int) -> None:
    if pid <= 0:
        raise LocalPlatformError(
            f"the local platform {home.name!r} runs in another container: stop it from there"
        )
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        # By now the number could be another process's; as long as this one holds the lock, it is not.
        if home.holder() != pid:
            return
        signal.pidfd_send_signal(process, signal.SIGTERM)
        if not select.select([process], [], [], _STOP_SECONDS)[0]:
            raise LocalPlatformError(
                f"the local platform {home.name!r} (process {pid}) has not ended within {_STOP_SECONDS:.0f} "
                f"s; see {home.log}. `kill -9 {pid}` ends it with all its nodes, and the next `raydog local` "
                "command removes what is left of it"
            )
    finally:
        os.close(process)
