"""The ``raydog`` command."""

from __future__ import annotations

import argparse
import logging
import os
import subprocess
import sys
from collections.abc import Sequence

from yellowdog_ray import __version__
from yellowdog_ray.errors import RayDogError

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the ``raydog`` command.

    :param arguments: the command line without the program's name; None for this process's own.
    :returns: the exit status: 0 done, 1 failed, 2 wrong usage, 130 interrupted.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    logging.basicConfig(
        level=logging.INFO if options.verbose else logging.WARNING, format="%(levelname)s %(message)s"
    )
    try:
        return int(options.run(options))
    except (RayDogError, OSError, subprocess.CalledProcessError) as error:
        print(f"raydog: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("raydog: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="raydog", description="Ray clusters on YellowDog: build, reach and tear them down."
    )
    parser.add_argument("--version", action="version", version=f"raydog {__version__}")
    parser.add_argument("-v", "--verbose", action="store_true", help="log what is being done")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    demo = commands.add_parser(
        "demo",
        help="build a Ray cluster, compute on it and shut it down",
        description="Build a Ray cluster of one head and two workers on the embedded local platform, compute "
        "on all of it through SSH tunnels, and shut it down from another process. It needs no account.",
    )
    demo.add_argument(
        "--isolation",
        choices=["namespaces", "user-namespaces", "processes"],
        help="what the nodes are made of (default: the best that this machine allows)",
    )
    demo.set_defaults(run=_demo)

    shut_down = commands.add_parser(
        "shut-down",
        help="shut clusters down from their saved states",
        description="Shut clusters down from their saved states. The application key is read from "
        "YD_API_KEY_ID and YD_API_KEY_SECRET; the API's URL is the state's, unless YD_API_URL is set.",
    )
    shut_down.add_argument("states", nargs="+", metavar="STATE.json", help="a file that the builder saved")
    shut_down.set_defaults(run=_shut_down)
    return parser


def _demo(options: argparse.Namespace) -> int:
    from yellowdog_ray.demo import run

    return run(isolation=options.isolation)


def _shut_down(options: argparse.Namespace) -> int:
    from yellowdog_ray.raydog.builder import RayDogClusterProxy

    missing = [name for name in ("YD_API_KEY_ID", "YD_API_KEY_SECRET") if not os.environ.get(name)]
    if missing:
        print(f"raydog: set {' and '.join(missing)} in the environment first", file=sys.stderr)
        return 2
    url = os.environ.get("YD_API_URL")
    failed = 0
    for path in options.states:
        # One cluster that cannot be shut down must not keep the others running.
        try:
            proxy = RayDogClusterProxy(
                os.environ["YD_API_KEY_ID"],
                os.environ["YD_API_KEY_SECRET"],
                **({"yd_platform_api_url": url} if url else {}),
            )
            proxy.load_saved_state_from_json_file(path)
            proxy.shut_down()
        except (RayDogError, OSError) as error:
            failed += 1
            print(f"raydog: {path}: {error}", file=sys.stderr)
        else:
            print(f"{path}: shut down")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
