"""The arguments of the ``raydog`` command, its log and its exit statuses; :mod:`.states` has what it does."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from yellowdog_ray import __version__
from yellowdog_ray.cli.output import Output
from yellowdog_ray.cli.running import Interrupts
from yellowdog_ray.errors import RayDogError

if TYPE_CHECKING:
    _Commands = argparse._SubParsersAction[argparse.ArgumentParser]

__all__ = ["main"]

_STATUSES = """\
exit statuses:
  0    done
  1    failed for at least one cluster; the error stream says which, why, and what may still be running
  2    wrong usage, or no application key; nothing was done
  3    (status only) all could be asked, and at least one is not as it should be
  130  interrupted (Ctrl-C); the error stream says what is not done
  143  terminated (SIGTERM), likewise

Results are written to the standard output, messages to the error stream.
"""

_KEY = """\
The application key is read from the variables YD_API_KEY_ID and YD_API_KEY_SECRET, in the environment or else
in a file .env in the current directory. The API is the one in the state file, unless YD_API_URL names
another."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the ``raydog`` command.

    :param arguments: the command line without the program's name; None for this process's own. The process
        ends at once then where it is interrupted, without waiting for what is under way.
    :returns: the exit status; ``raydog --help`` lists them.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        options = _parser().parse_args(given)
    except SystemExit as ended:
        if ended.code and "--json" in given:
            words = [word for word in given if not word.startswith("-")]
            print('{"error": "wrong usage"}' if words[:1] == ["local"] else "[]")
        raise
    if options.states_command is None:
        return _demo(options)
    output = Output(as_json=options.json)
    if options.states_command == "local":
        return _local(options, output)
    with Interrupts() as interrupts, _logging(options, output):
        from yellowdog_ray.cli import states

        status = states.run(options, output, interrupts)
    if arguments is None and interrupts.number is not None:
        # The threads that wait for the platform may do so for minutes.
        os._exit(status)
    return status


def _demo(options: argparse.Namespace) -> int:
    from yellowdog_ray.demo import run

    logging.basicConfig(level=_level(options), format="%(levelname)s %(message)s")
    try:
        return run(isolation=options.isolation)
    except (RayDogError, OSError, subprocess.CalledProcessError) as error:
        print(f"raydog: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("raydog: interrupted", file=sys.stderr)
        return 130


def _local(options: argparse.Namespace, output: Output) -> int:
    with _logging(options, output):
        from yellowdog_ray.cli import local

        try:
            return local.run(options, output)
        except KeyboardInterrupt:
            output.complain("interrupted")
            return 130


def _level(options: argparse.Namespace) -> int:
    if options.verbose:
        return logging.INFO
    return logging.ERROR if options.quiet else logging.WARNING


@contextlib.contextmanager
def _logging(options: argparse.Namespace, output: Output) -> Iterator[None]:
    """Write the log to the error stream meanwhile."""
    root, before = logging.getLogger(), logging.getLogger().level
    handler = _Handler(output)
    if not options.verbose:
        # That something could not be shut down is said once, with its file.
        handler.addFilter(lambda record: record.name != "yellowdog_ray.raydog.events")
    root.addHandler(handler)
    root.setLevel(_level(options))
    try:
        yield
    finally:
        root.removeHandler(handler)
        root.setLevel(before)


class _Handler(logging.Handler):
    """Writes log records as messages."""

    def __init__(self, output: Output) -> None:
        super().__init__()
        self._output = output
        self.setFormatter(logging.Formatter("%(levelname)s %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record."""
        try:
            self._output.complain(self.format(record), prefix="")
        except Exception:
            self.handleError(record)


class _Help(argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of descriptions, and has room for the options."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="raydog",
        description="Ray clusters on YellowDog: look at them, read their logs and shut them down, from\n"
        "their state files.",
        epilog=_STATUSES,
        formatter_class=_Help,
    )
    parser.add_argument("--version", action="version", version=f"raydog {__version__}")
    _add_loudness(parser, default=False)
    parser.set_defaults(states_command=None)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_list(commands)
    _add_status(commands)
    _add_logs(commands)
    _add_connect(commands)
    _add_shut_down(commands)
    _add_local(commands)
    _add_demo(commands)
    return parser


def _add_loudness(parser: argparse.ArgumentParser, default: bool | str) -> None:
    """Add what may be given before the command and after it."""
    loudness = parser.add_mutually_exclusive_group()
    for short, long, text in (
        ("-v", "--verbose", "log what is being done, on the error stream"),
        ("-q", "--quiet", "log nothing, not even warnings; errors are still said"),
    ):
        loudness.add_argument(short, long, action="store_true", default=default, help=text)


def _add(commands: _Commands, name: str, short: str, description: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=short, description=description, epilog=_STATUSES, formatter_class=_Help
    )
    parser.add_argument("--json", action="store_true", help="write a JSON list with an object for each file")
    _add_loudness(parser, default=argparse.SUPPRESS)
    parser.set_defaults(states_command=name)
    return parser


def _add_env_file(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--env-file", metavar="FILE", help="read it instead of .env; what the environment has goes first"
    )


def _add_states(parser: argparse.ArgumentParser, otherwise: str) -> None:
    parser.add_argument(
        "states", nargs="*", metavar="STATE", help=f"a state file, or a directory of such; {otherwise}"
    )


def _add_ssh(parser: argparse.ArgumentParser, own: bool = True) -> None:
    """Add the options of SSH.

    :param own: whether it is this package that logs in, and not the `ssh` command.
    """
    ssh = parser.add_argument_group("the way to the nodes")
    ssh.add_argument("--ssh-user", metavar="USER", help="the user to log in to the nodes as")
    ssh.add_argument(
        "--ssh-key", metavar="FILE", help="its private key (without: the SSH agent's keys, and ~/.ssh)"
    )
    ssh.add_argument("--ssh-port", type=int, metavar="N", help="the port of the SSH servers")
    ssh.add_argument(
        "--ssh-jump", metavar="HOST", help="a bastion in between, or several: [user@]host[:port],..."
    )
    if not own:
        parser.set_defaults(ssh_host_key=None, ssh_password_env=None)
        return
    ssh.add_argument("--ssh-host-key", metavar="KEY", help='the head\'s public key, "ssh-ed25519 AAAA..."')
    ssh.add_argument(
        "--ssh-password-env", metavar="VARIABLE", help="the environment variable that has the user's password"
    )


def _add_list(commands: _Commands) -> None:
    parser = _add(
        commands,
        "list",
        "list the clusters that state files tell of",
        "List the clusters that state files tell of. Nothing is asked over the network: it is what the\n"
        "files say.",
    )
    _add_states(parser, "none for the directory where states are kept (RAYDOG_STATE_DIR)")


def _add_status(commands: _Commands) -> None:
    parser = _add(
        commands,
        "status",
        "ask the platform how clusters are doing",
        "Ask the platform how clusters are doing, and compare that with their state files. Nothing is\n"
        "changed.\n\n"
        f"{_KEY}",
    )
    _add_states(parser, "none for the directory where states are kept (RAYDOG_STATE_DIR)")
    _add_env_file(parser)


def _add_logs(commands: _Commands) -> None:
    parser = _add(
        commands,
        "logs",
        "show what the nodes of a cluster print",
        "Show the end of what the tasks of a cluster's nodes print. It is read over SSH from nodes that\n"
        "live; without --ssh-user there is only what the platform itself keeps.\n\n"
        f"{_KEY}",
    )
    parser.add_argument("states", nargs=1, metavar="STATE", help="a state file")
    parser.add_argument("pool", nargs="?", metavar="POOL", help="of one pool only, such as head-node")
    parser.add_argument(
        "--bytes", type=int, default=100_000, metavar="N", help="how much of the end of each (%(default)s)"
    )
    _add_env_file(parser)
    _add_ssh(parser)


def _add_connect(commands: _Commands) -> None:
    parser = _add(
        commands,
        "connect",
        "write what another shell needs to use a cluster",
        "Write the lines by which a shell uses a cluster's Ray, and on the error stream the command that\n"
        "opens the tunnels to it. The token itself is not in them: its file is. Nothing is asked over the\n"
        "network.\n\n"
        '    exports=$(raydog connect STATE) && eval "$exports"',
    )
    parser.add_argument("states", nargs=1, metavar="STATE", help="a state file")
    _add_ssh(parser, own=False)


def _add_shut_down(commands: _Commands) -> None:
    parser = _add(
        commands,
        "shut-down",
        "shut clusters down from their state files",
        "Shut clusters down from their state files, and verify that all of them has ended. One that fails\n"
        "keeps none of the others running. What has ended already is no error: the command can be\n"
        "repeated.\n\n"
        f"{_KEY}",
    )
    _add_states(parser, "at least one, or --all")
    parser.add_argument(
        "--all", action="store_true", help="all in the directory where states are kept (RAYDOG_STATE_DIR)"
    )
    parser.add_argument(
        "--keep-logs", metavar="DIR", help="before, fetch the nodes' output into DIR/CLUSTER/POOL/TASK.log"
    )
    _add_env_file(parser)
    _add_ssh(parser)


_LOCAL_STATUSES = """\
exit statuses:
  0    done
  1    failed; the error stream says why
  2    wrong usage
  3    (status only) it is not running
  130  interrupted (Ctrl-C)
  143  terminated (SIGTERM)
"""


def _add_local(commands: _Commands) -> None:
    description = (
        "A local platform that stays until it is stopped: for a shell, a notebook or CI. There is one for\n"
        "each user and name. It listens on 127.0.0.1 only, and lets nobody in without its application key."
    )
    local = commands.add_parser(
        "local", help="start, look at and stop a local platform that stays", description=description,
        epilog=_LOCAL_STATUSES, formatter_class=_Help,
    )  # fmt: skip
    _add_loudness(local, default=argparse.SUPPRESS)
    below = local.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def add(name: str, short: str, more: str) -> argparse.ArgumentParser:
        parser: argparse.ArgumentParser = below.add_parser(
            name, help=short, description=more, epilog=_LOCAL_STATUSES, formatter_class=_Help
        )
        parser.add_argument(
            "--name", default="default", help="the platform's name, where there are several (%(default)s)"
        )
        parser.add_argument("--json", action="store_true", help="write a JSON object")
        _add_loudness(parser, default=argparse.SUPPRESS)
        parser.set_defaults(states_command="local", local_command=name)
        return parser

    start = add(
        "start",
        "start it, and write what a shell is to evaluate",
        "Start it where it is not running, and write the exports for a shell:\n\n"
        '    exports=$(raydog local start) && eval "$exports"',
    )
    start.add_argument("--port", type=int, metavar="P", help="the port of its API (the one it had before)")
    _add_isolation(start)
    start.add_argument(
        "--template",
        action="append",
        default=[],
        metavar="NAME=CPUS,GIB",
        help="a compute requirement template, such as local/large=4,8, and the size of its nodes; may be "
        "given several times (those it had before)",
    )
    start.add_argument(
        "--keep-key",
        action="store_true",
        help="go on with its application key; another user of this machine who takes its port while it is "
        "stopped can come by it",
    )
    start.add_argument("--forget", action="store_true", help="begin with an empty history")
    start.add_argument("--foreground", action="store_true", help="do not go to the background")
    status = add("status", "say whether it is running, and what is on it", "Say whether it is running.")
    status.add_argument("--exports", action="store_true", help="write the exports for a shell instead")
    add("stop", "end it with all its nodes", "End it with all its nodes, and see that nothing is left.")


def _add_isolation(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--isolation",
        choices=["namespaces", "user-namespaces", "processes"],
        help="what the nodes are made of (default: the best that this machine allows)",
    )


def _add_demo(commands: _Commands) -> None:
    demo = commands.add_parser(
        "demo",
        help="build a Ray cluster, compute on it and shut it down",
        description="Build a Ray cluster of one head and two workers on the embedded local platform, compute "
        "on all of it through SSH tunnels, and shut it down from another process. It needs no account.",
    )
    _add_isolation(demo)
