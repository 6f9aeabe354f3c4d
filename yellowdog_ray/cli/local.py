"""``raydog local``: a local platform that stays, for a shell, a notebook or CI."""

from __future__ import annotations

import argparse
import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from types import FrameType
from typing import TYPE_CHECKING, Any

from yellowdog_ray.cli.output import DONE, FAILED, UNHEALTHY, USAGE, Output
from yellowdog_ray.errors import RayDogError, SpecError

if TYPE_CHECKING:
    from yellowdog_ray.local.account import LocalAccount
    from yellowdog_ray.local.home import Home
    from yellowdog_ray.local.template import NodeTemplate

__all__ = ["run"]


def run(options: argparse.Namespace, output: Output) -> int:
    """Carry out a command.

    :returns: the exit status.
    """
    commands: dict[str, Callable[[Home, argparse.Namespace, Output], int]] = {
        "start": _start,
        "status": _status,
        "stop": _stop,
    }
    try:
        from yellowdog_ray.local.home import Home

        status = commands[options.local_command](Home(options.name), options, output)
    except (RayDogError, OSError) as error:
        output.complain(str(error))
        output.finish({"name": options.name, "error": str(error)})
        return USAGE if isinstance(error, SpecError) else FAILED
    return FAILED if output.lost and status == DONE else status


def _start(home: Home, options: argparse.Namespace, output: Output) -> int:
    from yellowdog_ray.local import daemon, launch

    wish = daemon.Options(
        port=options.port,
        isolation=options.isolation,
        keep_key=options.keep_key,
        forget=options.forget,
        templates=_templates(options.template),
    )
    quiet: bool = options.quiet
    began = time.monotonic()
    if options.foreground:
        account = home.account()
        if account is None:
            daemon.set_up_log()
            launch.tidy(home)
            daemon.serve(home, wish, lambda account: _write_account(account, output, quiet))
            return DONE
        was_running = True
    else:
        with _ended_by_signals():
            account, was_running = launch.start(home, wish)
    if was_running:
        output.complain(
            f"the local platform {home.name!r} is running already, since {_since(account.started)}"
        )
        if wish != daemon.Options():
            output.complain("it goes on as it is: stop it, and give the options when you start it again")
    elif not quiet:
        output.complain(
            f"the local platform {home.name!r} runs at {account.url} after {time.monotonic() - began:.1f} s; "
            f"{account.description}"
        )
    _write_account(account, output, quiet)
    return DONE


def _templates(texts: list[str]) -> dict[str, NodeTemplate] | None:
    templates: dict[str, NodeTemplate] = {}
    for name, template in map(_template, texts):
        if name in templates:
            raise SpecError(f"--template {name} is given twice")
        templates[name] = template
    return templates or None


def _template(text: str) -> tuple[str, NodeTemplate]:
    from yellowdog_ray.local.template import NodeTemplate

    name, _, size = text.partition("=")
    vcpus, _, ram = size.partition(",")
    try:
        numbers = float(vcpus), float(ram)
    except ValueError:
        raise SpecError(f"not a template: {text!r}; it is NAME=CPUS,GIB, such as local/large=4,8") from None
    return name, NodeTemplate(*numbers)


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP be an exception meanwhile, so that what this process began ends with it."""

    def end(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGHUP):
            # One that is ignored, as by nohup, stays so.
            if signal.getsignal(number) is signal.SIG_DFL:
                before[number] = signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _status(home: Home, options: argparse.Namespace, output: Output) -> int:
    from yellowdog_ray.local import launch

    account = home.account()
    if account is None:
        left = launch.tidy(home)
        if output.as_json:
            output.finish({"name": home.name, "running": False, "left": left})
        else:
            output.say(f"{home.name}: not running" + (f"; left: {', '.join(left)}" if left else ""))
        return UNHEALTHY
    if options.exports and not output.as_json:
        output.say(account.exports)
        return DONE
    counts = account.counts()
    if output.as_json:
        output.finish({**_about(account, options.exports), "files": str(home.directory), "counts": counts})
        return DONE
    lines = [
        f"{home.name}: running at {account.url} since {_since(account.started)}, process {account.pid}",
        f"  {account.description}",
        *(f"  {what.replace('_', ' ')}: {_counted(statuses)}" for what, statuses in counts.items()),
        f"  files: {home.directory}",
        f"  web page: {account.web_url} (works once, and for ten minutes)",
    ]
    output.say("\n".join(lines))
    return DONE


def _since(when: float) -> str:
    """Write a time as a person reads it."""
    return datetime.fromtimestamp(when, timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")


def _counted(statuses: dict[str, int]) -> str:
    return ", ".join(f"{count} {status}" for status, count in sorted(statuses.items())) or "none"


def _stop(home: Home, options: argparse.Namespace, output: Output) -> int:
    from yellowdog_ray.local import launch

    pid = launch.stop(home)
    if output.as_json:
        output.finish({"name": home.name, "stopped": pid is not None})
    elif pid is None:
        output.say(f"{home.name}: was not running")
    else:
        output.say(f"{home.name}: stopped; nothing is left of it")
    return DONE


def _write_account(account: LocalAccount, output: Output, quiet: bool) -> None:
    if not quiet:
        output.complain(f"its web page, by a link that works once, within ten minutes: {account.web_url}")
    if output.as_json:
        output.finish(_about(account, exports=True))
    else:
        output.say(account.exports)


def _about(account: LocalAccount, exports: bool) -> dict[str, Any]:
    """Tell of a platform that runs, with its secret only where that is asked for."""
    about: dict[str, Any] = {
        "name": account.name,
        "running": True,
        "url": account.url,
        "pid": account.pid,
        "started": account.started,
        "isolation": account.isolation,
        "description": account.description,
    }
    # A link opens the page to whoever reads this.
    return {**about, "exports": account.variables, "web_url": account.web_url} if exports else about
