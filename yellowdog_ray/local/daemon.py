"""A local platform that stays: one process for each user and name, which no shell or notebook owns.

This is that process. Its directory is :mod:`yellowdog_ray.local.home`; others find, start and stop it by
:mod:`yellowdog_ray.local.launch`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import select
import signal
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from yellowdog_ray.errors import LocalPlatformError, RayDogError
from yellowdog_ray.local.account import LocalAccount
from yellowdog_ray.local.history import forget
from yellowdog_ray.local.home import Home, is_free, port_of
from yellowdog_ray.local.needs import require_linux
from yellowdog_ray.local.platform import LocalPlatform
from yellowdog_ray.local.records import from_plain
from yellowdog_ray.local.server import HISTORY, Kept
from yellowdog_ray.local.template import NodeTemplate

__all__ = ["LocalAccount", "Options", "serve", "set_up_log"]

_log = logging.getLogger(__name__)

# How often the platform looks whether it can still make nodes, in seconds.
_LOOK = 2.0


@dataclass(frozen=True)
class Options:
    """How a platform is to be started.

    :param port: the TCP port of its API; None for the one that it had before, or a free one.
    :param isolation: the kind of node; None for the best that works here.
    :param keep_key: whether it goes on with the application key and the control port's token that it had
        before. Another user of the machine who takes its port while it is stopped can come by such a key.
    :param forget: whether it begins with an empty history.
    :param templates: the sizes of its nodes, by ``namespace/name``; None for those that it had before, or the
        default.
    :raises SpecError: when one of them cannot work.
    """

    port: int | None = None
    isolation: str | None = None
    keep_key: bool = False
    forget: bool = False
    templates: Mapping[str, NodeTemplate] | None = None

    def __post_init__(self) -> None:
        # It refuses what cannot work, and does nothing yet.
        LocalPlatform(port=self.port, isolation=self.isolation, templates=self.templates)


def serve(home: Home, options: Options, told: Callable[[LocalAccount], None]) -> None:
    """Be the platform, until SIGTERM or SIGINT.

    :param told: is told when it answers.
    :raises LocalPlatformError: when it cannot come up, or cannot go on.
    """
    require_linux()
    # What a signal handler may do at any moment is to write to a pipe.
    told_to_end, tell = os.pipe()
    os.set_blocking(tell, False)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda number, frame: _tell(tell))
    home.make()
    with home.lock() as lock:
        if lock is None:
            raise LocalPlatformError(f"the local platform {home.name!r} runs already")
        platform = _make(home, options)
        # A signal that comes while it starts is heeded afterwards.
        with platform.start():
            account = LocalAccount(
                name=home.name,
                url=platform.url,
                key_id=platform.key_id,
                secret=platform.secret,
                namespace=platform.namespace,
                template_names=platform.template_names,
                ssh_user=platform.ssh_user,
                ssh_private_key_file=platform.ssh_private_key_file,
                ssh_port=platform.ssh_port,
                ssh_host_key=platform.ssh_host_key,
                isolation=platform.isolation.value,
                description=platform.describe(),
                control_url=platform.control_url,
                control_token=platform.control_token,
                pid=os.getpid(),
                started=time.time(),
                directory=platform.directory,
                interface=platform._nodes.interface,
            )
            templates = {name: asdict(template) for name, template in platform.templates.items()}
            known = {**asdict(account), "templates": templates}
            home.write(known)
            told(account)
            while not select.select([told_to_end], [], [], _LOOK)[0]:
                failure = platform.failure()
                if not home.holds(lock):
                    failure = f"{home.directory} was removed or replaced, and nobody finds it any more"
                if failure is not None:
                    raise LocalPlatformError(f"the local platform cannot go on: {failure}")
            _log.info("Ending")
            home.note({**known, "ending": True})
        left = platform.leftovers()
        if left:
            raise LocalPlatformError(f"of the local platform this is left: {', '.join(left)}")
        home.note({**known, "pid": None})
        _log.info("Ended; nothing is left")


def _tell(pipe: int) -> None:
    with contextlib.suppress(BlockingIOError):
        os.write(pipe, b"1")


def _make(home: Home, options: Options) -> LocalPlatform:
    """Make the platform, with the ports, the node sizes and, where it is to keep it, the key from before."""
    known = home.read()
    keep_key = options.keep_key and bool(known)
    if keep_key and home.exposed():
        _log.warning("%s could be read by other users: the platform gets a new key", home.file)
        keep_key = False
    port = options.port
    if port is None and known:
        port = port_of(known["url"])
        if not is_free(port):
            # Whoever is there now may have been sent the key, by a client that did not know.
            _log.warning(
                "Port %d, where the platform was before, is taken: it gets another one, and a new key", port
            )
            port, keep_key = None, False
    control_port = port_of(known["control_url"]) if known and known["control_url"] else None
    keep_token = keep_key
    if control_port in (None, port) or not is_free(control_port):
        control_port, keep_token = None, False
    if options.forget:
        forget(home.directory / HISTORY)
    templates = options.templates
    if templates is None and known:
        templates = from_plain(Mapping[str, NodeTemplate], known["templates"])
    return LocalPlatform(
        port=port,
        isolation=options.isolation,
        templates=templates or None,
        kept=Kept(
            key_id=known["key_id"] if keep_key else str(uuid.uuid4()),
            secret=known["secret"] if keep_key else secrets.token_urlsafe(32),
            directory=home.directory,
            control_port=control_port,
            control_token=(known["control_token"] or None) if keep_token else None,
        ),
    )


def set_up_log() -> None:
    """Write the log to the error stream, with the time."""
    logging.basicConfig(
        stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", force=True
    )


def main() -> int:
    """Run as ``python -m yellowdog_ray.local.daemon NAME FD OPTIONS``; FD is told how it went."""
    name, tell = sys.argv[1], int(sys.argv[2])
    options = from_plain(Options, json.loads(sys.argv[3]))
    os.set_inheritable(tell, False)
    set_up_log()

    def say(**answer: Any) -> None:
        # Nobody may be there any more.
        with contextlib.suppress(OSError), open(tell, "w") as file:
            json.dump(answer, file)

    up = False

    def told(account: LocalAccount) -> None:
        nonlocal up
        up = True
        say(url=account.url)

    try:
        serve(Home(name), options, told)
    except (RayDogError, OSError) as error:
        _log.error("%s", error)
        if not up:
            say(error=str(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
