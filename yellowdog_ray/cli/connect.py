"""``raydog connect``: what another shell needs to use a cluster, as lines for it to evaluate.

A state file may come from anywhere, and a shell evaluates what is written here. So nothing of the file is
written but an address that is one, and the path of a file that has turned out to hold a token, quoted.
"""

from __future__ import annotations

import argparse
import contextlib
import ipaddress
import shlex
from functools import partial
from pathlib import Path

from yellowdog_ray.cli.files import Answer, StateFile, answer_one, newest_with_names, read_files
from yellowdog_ray.cli.output import Output
from yellowdog_ray.cli.running import Interrupts
from yellowdog_ray.cli.settings import UsageError, read_access
from yellowdog_ray.errors import ClusterStateError, SpecError, StateError
from yellowdog_ray.raydog.access import SSHAccess
from yellowdog_ray.raydog.ports import CLIENT, DASHBOARD, GRAFANA, PROMETHEUS
from yellowdog_ray.raydog.state import ClusterState, PoolState
from yellowdog_ray.raydog.token_file import read_token
from yellowdog_ray.utils._ssh.hostkeys import default_record, option_value, record_beside

__all__ = ["connect", "known_hosts"]

_TOKEN_VARIABLES = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")


def connect(options: argparse.Namespace, output: Output, interrupts: Interrupts) -> int:
    """Carry out ``raydog connect``.

    :returns: the exit status.
    :raises UsageError: where it is not one cluster that is meant.
    """
    access = read_access(options)
    files = read_files(options, output)
    if len(files) != 1:
        raise UsageError("connect needs the state file of one cluster, not a directory of several")
    return answer_one(files[0], partial(_connect, access, output), output)


def _connect(access: SSHAccess | None, output: Output, file: StateFile) -> Answer:
    state = newest_with_names(file)
    if state.status != "running":
        doing = "still being built" if state.status == "building" else "being shut down"
        raise ClusterStateError(f"the cluster {state.title} is {doing}: there is nothing to connect to")
    head, observability = (_addresses(state, role) for role in ("head", "observability"))
    if not head:
        raise StateError(f"the state does not tell the address of the head of the cluster {state.title}")
    environment: dict[str, str | None] = dict.fromkeys(_TOKEN_VARIABLES)
    if state.ray_auth == "token":
        environment.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=_token_file(state))
    environment["RAY_ADDRESS"] = f"ray://127.0.0.1:{CLIENT}"
    environment["RAY_API_SERVER_ADDRESS"] = f"http://127.0.0.1:{DASHBOARD}"
    record = known_hosts(file, head[0])
    command = _ssh(access, head[0], observability[-1] if observability else None, record)
    shown = shlex.join(command)
    if not output.as_json:
        # On the error stream, where a person sees it and no shell evaluates it.
        output.complain(
            f"Ray is reached through SSH tunnels. Keep them open in another shell:\n    {shown}",
            prefix="",
        )
    lines = [
        f"unset {name}" if value is None else f"export {name}={shlex.quote(value)}"
        for name, value in environment.items()
    ]
    about = {
        "cluster": state.title,
        "environment": environment,
        "ssh": command,
        "head": head,
        "observability": observability,
    }
    return Answer(about, "\n".join(lines))


def known_hosts(file: StateFile, head: str) -> Path | None:
    """Find the file of a cluster's host keys: beside its state, or else by the head's address; or None."""
    # Not beside what the file itself names as its place: that would be for the file to choose.
    records = (record_beside(file.path.resolve()), default_record(head))
    return next((path for path in records if path.is_file()), None)


def _addresses(state: ClusterState, role: str) -> list[str]:
    """List the addresses of a node, the public one first."""
    pool = next((pool for pool in state.pools if pool.role == role), None)
    if pool is None:
        return []
    return list(dict.fromkeys(_address(pool, ip) for ip in (pool.public_ip, pool.private_ip) if ip))


def _address(pool: PoolState, value: str) -> str:
    try:
        return str(ipaddress.ip_address(value))
    except ValueError:
        raise StateError(f"the state has no IP address of the {pool.role} node, but {value!r}") from None


def _token_file(state: ClusterState) -> str:
    """Tell the path of the token's file, which can be used."""
    path = state.ray_token_file
    if path is None:
        raise StateError(
            f"the state of the cluster {state.title} names no file with its Ray token: it was written by an "
            "earlier version. RayDogCluster.attach() asks the platform for it"
        )
    if not path.isprintable() or not path.startswith("/"):
        raise StateError(f"ray_token_file is not the path of a file: {path!r}")
    try:
        read_token(path)
    except FileNotFoundError:
        raise StateError(
            f"the file of the Ray token {path} is not there. It is on the machine that built the cluster: "
            "copy it from there to the same place, readable by you alone (chmod 600)"
        ) from None
    return path


def _ssh(access: SSHAccess | None, head: str, observability: str | None, record: Path | None) -> list[str]:
    """Make the command that opens the tunnels.

    :param record: the file of the cluster's host keys, where there is one.
    """
    # Half of the tunnels, or those of a connection that is dead, would be no help.
    command = ["ssh", "-N", "-o", "ExitOnForwardFailure=yes", "-o", "ServerAliveInterval=5"]
    if record is not None:
        with contextlib.suppress(SpecError):  # ssh cannot be told such a name
            command += ["-o", f"UserKnownHostsFile={option_value(record)} ~/.ssh/known_hosts"]
    forwarded = [(CLIENT, "localhost"), (DASHBOARD, "localhost")]
    if observability is not None:
        forwarded += [(GRAFANA, observability), (PROMETHEUS, observability)]
    for port, host in forwarded:
        # The address is that of the exports. Without it, ssh would be content with ::1 where another user has
        # the port of 127.0.0.1, who would get the token.
        there = f"[{host}]" if ":" in host else host
        command += ["-L", f"127.0.0.1:{port}:{there}:{port}"]
    if access is not None and access.port is not None:
        command += ["-p", str(access.port)]
    if access is not None and access.private_key_file is not None:
        command += ["-i", str(access.private_key_file), "-o", "IdentitiesOnly=yes"]
    if access is not None and access.jump is not None:
        command += ["-J", access.jump.replace(" ", "")]
    return [*command, f"{'USER' if access is None else access.user}@{head}"]
