"""``raydog list``, ``status``, ``logs`` and ``shut-down``: what is done with state files.

:mod:`.connect` has the one that a shell evaluates.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from yellowdog_ray.cli.connect import connect, known_hosts
from yellowdog_ray.cli.files import (
    Answer,
    StateFile,
    answer_all,
    failed,
    newest_with_names,
    not_asked,
    read_files,
)
from yellowdog_ray.cli.output import DONE, FAILED, UNHEALTHY, USAGE, Output
from yellowdog_ray.cli.running import Interrupts
from yellowdog_ray.cli.settings import Key, UsageError, read_access, read_key
from yellowdog_ray.errors import ClusterStateError, RayDogError, TeardownError
from yellowdog_ray.raydog.access import SSHAccess
from yellowdog_ray.raydog.state import ClusterState
from yellowdog_ray.raydog.status import one_line

__all__ = ["run"]

log = logging.getLogger(__name__)

_COLUMNS = (
    "name",
    "namespace",
    "status",
    "pools",
    "nodes",
    "created (UTC)",
    "age",
    "ends (UTC)",
    "api",
    "file",
)
# What the phase is that a file tells of; of one that is being built nobody but its builder knows more.
_PHASES = {
    "building": "being built, or built in part only",
    "running": "running",
    "ending": "being shut down",
}


def run(options: argparse.Namespace, output: Output, interrupts: Interrupts) -> int:
    """Carry out a command on state files.

    :returns: the exit status.
    """
    commands: dict[str, Callable[[argparse.Namespace, Output, Interrupts], int]] = {
        "list": _list,
        "status": _status,
        "logs": _logs,
        "connect": connect,
        "shut-down": _shut_down,
    }
    try:
        status = commands[options.states_command](options, output, interrupts)
    except UsageError as error:
        output.finish([])
        output.complain(str(error))
        return USAGE
    return FAILED if output.lost and status == DONE else status


# -- list ----------------------------------------------------------------------------------------------


def _list(options: argparse.Namespace, output: Output, interrupts: Interrupts) -> int:
    files = read_files(options, output)
    if interrupts.number is not None:
        output.finish([])
        return 128 + interrupts.number
    results, rows = [], []
    for file in files:
        if file.state is None:
            output.complain(f"{file.path}: {file.problem}")
            results.append({"file": str(file.path), "error": file.problem})
            rows.append(("?", "?", "unreadable", *["?"] * 6, str(file.path)))
        else:
            about = _about(file.state)
            results.append({"file": str(file.path), **about})
            rows.append((*_cells(about), str(file.path)))
    if rows:
        table = [_COLUMNS, *(tuple(map(one_line, row)) for row in rows)]
        widths = [max(len(row[column]) for row in table) for column in range(len(_COLUMNS))]
        for row in table:
            output.say("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    output.finish(results)
    return FAILED if any(file.state is None for file in files) else DONE


def _about(state: ClusterState) -> dict[str, Any]:
    """Tell what a file says."""
    ours = state.build_id is not None
    created = state.created
    return {
        "name": state.cluster_name,
        "namespace": state.cluster_namespace,
        # The existing package does not write that down.
        "status": state.status if ours else None,
        "pools": len(state.pools) if ours else len(state.worker_pool_ids),
        "nodes": sum(pool.node_count for pool in state.pools) if ours else None,
        "created": None if created is None else created.isoformat(),
        "age_seconds": None if created is None else int((_now() - _aware(created)).total_seconds()),
        "lifetime_ends": None if state.lifetime_ends is None else state.lifetime_ends.isoformat(),
        "api_host": None if state.api_url is None else urlsplit(state.api_url).netloc,
    }


def _cells(about: dict[str, Any]) -> Iterator[str]:
    for key, value in about.items():
        if value is None:
            yield "-" if key == "lifetime_ends" else "?"
        elif key in ("created", "lifetime_ends"):
            yield _aware(datetime.fromisoformat(value)).astimezone(timezone.utc).strftime("%Y-%m-%d %H:%M")
        elif key == "age_seconds":
            yield _span(value)
        else:
            yield str(value)


def _span(seconds: int) -> str:
    """Write a time span in its two largest units."""
    minutes = max(0, seconds) // 60
    days, hours, minutes = minutes // 1440, minutes // 60 % 24, minutes % 60
    if days:
        return f"{days} d {hours} h"
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def _now() -> datetime:
    return datetime.now(timezone.utc)


def _aware(moment: datetime) -> datetime:
    return moment if moment.tzinfo is not None else moment.replace(tzinfo=timezone.utc)


# -- status and logs -----------------------------------------------------------------------------------


def _status(options: argparse.Namespace, output: Output, interrupts: Interrupts) -> int:
    key = read_key(options)
    files = read_files(options, output)
    return answer_all(files, partial(_survey, key), not_asked, output, interrupts)


def _survey(key: Key, file: StateFile) -> Answer:
    """Ask how a cluster is doing, without the traces that coming back to it would leave on this machine."""
    from yellowdog_ray.raydog.platform import Platform
    from yellowdog_ray.raydog.pools import BuiltPool
    from yellowdog_ray.raydog.status import ClusterStatus
    from yellowdog_ray.raydog.survey import survey

    state = newest_with_names(file)
    head = next((pool for pool in state.pools if pool.role == "head"), None)
    known = ClusterStatus(
        str(state.cluster_name),
        str(state.cluster_namespace),
        _PHASES[state.status],
        work_requirement_id=state.work_requirement_id,
        head_private_ip=head.private_ip if head is not None else None,
        head_public_ip=head.public_ip if head is not None else None,
        failure=state.failure,
        lifetime_ends=state.lifetime_ends,
    )
    platform = Platform(key.credentials(state))
    try:
        status = survey(platform, known, [BuiltPool.of(pool) for pool in state.pools])
    finally:
        platform.close()
    answer = Answer({"status": status.to_dict()}, str(status))
    if not status.healthy:
        answer.problem, answer.status = f"{state.cluster_name} is not as it should be", UNHEALTHY
    return answer


def _logs(options: argparse.Namespace, output: Output, interrupts: Interrupts) -> int:
    if options.bytes < 1:
        raise UsageError("--bytes: a number from 1 is needed")
    access = read_access(options)
    key = read_key(options)
    if Path(options.states[0]).is_dir():
        raise UsageError(f"{options.states[0]} is a directory; one state file is needed")
    files = read_files(options, output)
    if access is None:
        output.complain(
            "without --ssh-user, there is only what the platform itself keeps of tasks that failed"
        )
    fetch = partial(_fetch_logs, key, access, options.pool, options.bytes)
    return answer_all(files, fetch, not_asked, output, interrupts)


def _fetch_logs(key: Key, access: SSHAccess | None, pool: str | None, size: int, file: StateFile) -> Answer:
    from yellowdog_ray.raydog.pools import BuiltPool, named_pools

    state = newest_with_names(file)
    names = list(named_pools(BuiltPool.of(known) for known in state.pools))
    if pool is not None and pool not in names:
        raise ClusterStateError(
            f"the cluster {state.title} has no pool {pool!r}; it has: {', '.join(map(repr, names))}"
        )
    found = _collect(key, access, file, state, pool, size)
    about = [
        {"task": one.task, "pool": one.pool, "source": one.source, "text": one.text, "note": one.note}
        for one in found.values()
    ]
    answer = Answer({"logs": about}, "\n".join(map(str, found.values())) or None)
    if all(one.text is None for one in found.values()):
        answer.problem, answer.status = "no output could be had of any node", FAILED
        answer.about["error"] = answer.problem
    return answer


def _collect(
    key: Key,
    access: SSHAccess | None,
    file: StateFile,
    state: ClusterState,
    pool: str | None,
    size: int,
    *,
    in_a_hurry: bool = False,
) -> dict[str, Any]:
    """Fetch the nodes' output, by the tasks' names.

    :param state: what is known of the cluster by now.
    :param in_a_hurry: see :func:`.logs.collect`.
    """
    from yellowdog_ray.raydog import logs
    from yellowdog_ray.raydog.platform import Platform
    from yellowdog_ray.raydog.pools import BuiltPool, named_pools
    from yellowdog_ray.raydog.reach import Reach

    heads = [known for known in state.pools if known.role == "head"]
    addresses = [address for head in heads for address in (head.public_ip, head.private_ip) if address]
    reach = None
    if access is not None and addresses:
        reach = Reach(addresses, access, record=known_hosts(file, addresses[0]))
    platform = Platform(key.credentials(state))
    named = named_pools(BuiltPool.of(known) for known in state.pools)
    pools = {name: known for name, known in named.items() if pool in (None, name)}
    try:
        found = logs.collect(platform, reach, pools, size, in_a_hurry=in_a_hurry)
        return {one.task: one for one in found}
    finally:
        platform.close()
        if reach is not None:
            reach.close()


# -- shut-down -----------------------------------------------------------------------------------------


def _shut_down(options: argparse.Namespace, output: Output, interrupts: Interrupts) -> int:
    if bool(options.states) == options.all:
        raise UsageError("shut-down needs either state files (or directories) or --all")
    access = read_access(options)
    key = read_key(options)
    files = read_files(options, output)
    keep = None if options.keep_logs is None else Path(options.keep_logs).expanduser()
    work = partial(_end, key, access, keep)
    return answer_all(files, work, _interrupted, output, interrupts, in_order=False)


def _end(key: Key, access: SSHAccess | None, keep: Path | None, file: StateFile) -> Answer:
    from yellowdog_ray.raydog.builder import RayDogClusterProxy
    from yellowdog_ray.raydog.journal import Journal, state_directory

    assert file.state is not None  # noqa: S101 - for the type checker
    state = file.state
    if keep is not None:
        _keep_logs(key, access, keep, file)
    proxy = RayDogClusterProxy(key.id, key.secret, key.api_url)
    try:
        # Not from the file: another one of the same cluster may have been worked on before, and removed it.
        proxy.load_saved_state_from_json(state.to_json())
        proxy.shut_down()
        if file.path.absolute().parent == state_directory().absolute():
            # One that was moved here is not where its cluster would look for it.
            Journal(file.path.absolute(), state).remove()
    except Exception as error:
        expected = isinstance(error, RayDogError | OSError)
        log.log(logging.INFO if expected else logging.WARNING, "Shutting down failed", exc_info=not expected)
        left = error.still_running if isinstance(error, TeardownError) else _items(state)
        problem = str(error)
        if not isinstance(error, TeardownError):
            problem = f"{problem}. May still be running: {', '.join(left)}"
        return Answer(_outcome(state, "failed", problem, left), problem=problem, status=FAILED)
    return Answer(_outcome(state, "shut down", None, []), f"{file.path}: shut down")


def _interrupted(file: StateFile) -> Answer:
    if file.state is None:
        return failed(str(file.problem))
    left = _items(file.state)
    problem = f"it is not verified as ended. May still be running: {', '.join(left)}"
    return Answer(_outcome(file.state, "interrupted", problem, left), problem=problem)


def _outcome(state: ClusterState, result: str, error: str | None, left: list[str]) -> dict[str, Any]:
    return {"cluster": state.title, "result": result, "error": error, "still_running": left}


def _items(state: ClusterState) -> list[str]:
    from yellowdog_ray.raydog.teardown import Targets

    return Targets.of(state).items


def _keep_logs(key: Key, access: SSHAccess | None, keep: Path, file: StateFile) -> None:
    """Keep the nodes' output. That it cannot be had keeps nothing from ending."""
    from yellowdog_ray.raydog import logs

    try:
        state = newest_with_names(file)
        found = _collect(key, access, file, state, None, logs.KEPT_BYTES, in_a_hurry=True)
        logs.keep(keep / str(state.cluster_name), found.values())
    except Exception as error:
        log.warning("%s: the output of the nodes could not be kept: %s", file.path, error)
