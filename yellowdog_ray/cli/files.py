"""The state files of a command line, and what comes of each."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from yellowdog_ray.cli.output import DONE, FAILED, UNHEALTHY, Output
from yellowdog_ray.cli.running import Interrupts, in_parallel
from yellowdog_ray.errors import RayDogError, StateError
from yellowdog_ray.raydog.journal import find_states, state_directory
from yellowdog_ray.raydog.state import ClusterState

__all__ = [
    "Answer",
    "StateFile",
    "answer_all",
    "answer_one",
    "failed",
    "newest_with_names",
    "not_asked",
    "read_files",
]

log = logging.getLogger(__name__)


@dataclass
class StateFile:
    """A state file of the command line.

    :param state: None where it cannot be read; ``problem`` says why then.
    """

    path: Path
    state: ClusterState | None = None
    problem: str | None = None


@dataclass
class Answer:
    """What came of one file.

    :param about: for JSON, beside the file's name.
    :param text: for people.
    :param problem: what went wrong.
    """

    about: dict[str, Any] = field(default_factory=dict)
    text: str | None = None
    problem: str | None = None
    status: int = DONE


def read_files(options: argparse.Namespace, output: Output) -> list[StateFile]:
    """Read the states that are meant, each once. What has vanished from a directory meanwhile has ended."""
    files: dict[Path, StateFile] = {}
    for given in map(Path, options.states or [state_directory()]):
        usual = not options.states
        try:
            in_directory = usual or given.is_dir()
            paths = find_states(given) if in_directory else [given]
        except OSError as error:
            files[given] = StateFile(given, problem=error.strerror or str(error))
            continue
        if not paths:
            output.complain(f"there are no state files in {given}")
        for path in paths:
            try:
                files.setdefault(path.resolve(), StateFile(path, ClusterState.load(path)))
            except FileNotFoundError:
                if not in_directory:
                    files[path] = StateFile(path, problem="there is no such file")
            except OSError as error:
                files[path] = StateFile(path, problem=f"it cannot be read: {error.strerror or error}")
            except StateError as error:
                files[path] = StateFile(path, problem=str(error))
            except RecursionError:
                files[path] = StateFile(path, problem=f"the file {path} is not the saved state of a cluster")
    return list(files.values())


def answer_all(
    files: Sequence[StateFile],
    work: Callable[[StateFile], Answer],
    given_up: Callable[[StateFile], Answer],
    output: Output,
    interrupts: Interrupts,
    in_order: bool = True,
) -> int:
    """Work on all files, and write what comes of each.

    :param given_up: what to say of one that an interrupt has left undone.
    :param in_order: whether results are written in the order of the files, or as they come.
    :returns: the exit status.
    """
    # Threads that import what imports each other might see half of it.
    import yellowdog_client.model  # noqa: F401

    answers: dict[Path, Answer] = {}

    for file, answer in in_parallel(files, partial(_attempt, work), interrupts):
        answers[file.path] = answer
        if not in_order:
            _write(output, file, answer)
    if interrupts.number is not None:
        output.complain("interrupted" if interrupts.number == 2 else "terminated")
    for file in files:
        undone = file.path not in answers
        answer = answers.setdefault(file.path, given_up(file)) if undone else answers[file.path]
        if in_order or undone:
            _write(output, file, answer)
    output.finish([{"file": str(file.path), **answers[file.path].about} for file in files])
    if interrupts.number is not None:
        return 128 + interrupts.number
    # That something could not be asked or ended goes before that something is not well.
    statuses = {answer.status for answer in answers.values()}
    return next((status for status in (FAILED, UNHEALTHY) if status in statuses), DONE)


def answer_one(file: StateFile, work: Callable[[StateFile], Answer], output: Output) -> int:
    """Do what needs no network with one file, at once, and write what comes of it.

    :returns: the exit status.
    """
    answer = _attempt(work, file)
    _write(output, file, answer)
    output.finish([{"file": str(file.path), **answer.about}])
    return answer.status


def _write(output: Output, file: StateFile, answer: Answer) -> None:
    if answer.text is not None:
        output.say(answer.text)
    if answer.problem is not None:
        output.complain(f"{file.path}: {answer.problem}")


def _attempt(work: Callable[[StateFile], Answer], file: StateFile) -> Answer:
    """Work on one file. Whatever goes wrong with it keeps nothing from being done with the others."""
    try:
        if file.state is None:
            return failed(str(file.problem))
        return work(file)
    except (RayDogError, OSError) as error:
        return failed(str(error))
    except Exception as error:
        log.info("This should not have happened", exc_info=True)
        return failed(f"something unexpected went wrong: {type(error).__name__}: {error}")


def failed(problem: str) -> Answer:
    """Say that something went wrong with a file."""
    return Answer({"error": problem}, problem=problem, status=FAILED)


def not_asked(file: StateFile) -> Answer:
    """Say of a file that an interrupt has left it undone."""
    return Answer({"error": "interrupted"}, problem="it was not asked")


def _newest(state: ClusterState) -> ClusterState:
    """Give what the cluster's own state file says, where it is on this machine."""
    if state.state_file is not None and state.build_id is not None:
        try:
            own = ClusterState.load(state.state_file)
        except (OSError, StateError):
            return state
        if own.build_id == state.build_id:
            return own
    return state


def newest_with_names(file: StateFile) -> ClusterState:
    """Give the newest state of a cluster that can be looked at.

    :raises StateError: where it was written by the existing package.
    """
    assert file.state is not None  # noqa: S101 - for the type checker
    state = _newest(file.state)
    if state.build_id is None or state.cluster_name is None or state.cluster_namespace is None:
        raise StateError(
            "it was written by the existing package, which keeps too little in it to look at the cluster; "
            "only shut-down is possible"
        )
    return state
