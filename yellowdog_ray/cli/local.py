"""``raydog local``: a local platform that stays, for a shell, a notebook or CI."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from yellowdog_ray.cli.files import DONE, FAILED, UNHEALTHY, USAGE
from yellowdog_ray.cli.output import Output
from yellowdog_ray.errors import RayDogError, SpecError

if TYPE_CHECKING:
    from yellowdog_ray.local.daemon import Home, LocalAccount

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
        from yellowdog_ray.local.daemon import Home

        status = commands[options.local_command](Home(options.name), options, output)
    except SpecError as error:
        output.complain(str(error))
        return USAGE
    except (RayDogError, OSError) as error:
        output.complain(str(error))
        return FAILED
    return FAILED if output.lost and status == DONE else status


def _start(home: Home, options: argparse.Namespace, output: Output) -> int:
    from yellowdog_ray.local import daemon

    wish = daemon.Options(port=options.port, isolation=options.isolation, new_key=options.new_key)
    if options.foreground:
        daemon.set_up_log()
        daemon.tidy(home)
        daemon.serve(home, wish, lambda account: _write_account(account, output))
        return DONE
    began = time.monotonic()
    account, was_running = daemon.start(home, wish)
    if was_running:
        output.complain(
            f"the local platform {home.name!r} is running already, since {daemon.since(account.started)}"
        )
        if wish != daemon.Options():
            output.complain("it goes on as it is: --port, --isolation and --new-key are for its next start")
    else:
        output.complain(
            f"the local platform {home.name!r} runs at {account.url} after {time.monotonic() - began:.1f} s; "
            f"{account.description}"
        )
    _write_account(account, output)
    return DONE


def _status(home: Home, options: argparse.Namespace, output: Output) -> int:
    from yellowdog_ray.local import daemon

    account = home.account()
    if account is None:
        left = daemon.tidy(home)
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
        f"{home.name}: running at {account.url} since {daemon.since(account.started)}, process {account.pid}",
        f"  {account.description}",
        *(f"  {what.replace('_', ' ')}: {_counted(statuses)}" for what, statuses in counts.items()),
        f"  files: {home.directory}",
        f"  web page: {account.web_url} (works once, and for ten minutes)",
    ]
    output.say("\n".join(lines))
    return DONE


def _counted(statuses: dict[str, int]) -> str:
    return ", ".join(f"{count} {status}" for status, count in sorted(statuses.items())) or "none"


def _stop(home: Home, options: argparse.Namespace, output: Output) -> int:
    from yellowdog_ray.local import daemon

    pid = daemon.stop(home)
    if output.as_json:
        output.finish({"name": home.name, "stopped": pid is not None})
    elif pid is None:
        output.say(f"{home.name}: was not running")
    else:
        output.say(f"{home.name}: stopped; nothing is left of it")
    return DONE


def _write_account(account: LocalAccount, output: Output) -> None:
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
