"""Taking back what a failed operation has created, and saying what could not be taken back."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

from yellowdog_ray.errors import RayDogError, TeardownError
from yellowdog_ray.raydog.platform import Platform
from yellowdog_ray.raydog.pools import BuiltPool
from yellowdog_ray.raydog.teardown import Targets, tear_down
from yellowdog_ray.raydog.transport import Operation

__all__ = ["add_note", "cancel_all", "cancel_tasks", "take_back"]

log = logging.getLogger(__name__)


def take_back(platform: Platform, targets: Targets, error: BaseException) -> bool:
    """Take back what a failed build or addition has created; what is left is said in the error's message.

    :returns: whether everything was.
    """
    if not targets.pools and targets.work_requirement is None:
        return True
    try:
        tear_down(platform, targets)
    except TeardownError as left:
        add_note(error, f"What had been created could not all be taken back: {left}")
        return False
    return True


def add_note(error: BaseException, note: str) -> None:
    """Add a sentence to an error, where a person will see it."""
    log.error("%s", note)
    if isinstance(error, RayDogError) and error.args:
        error.args = (f"{error.args[0]}\n{note}", *error.args[1:])
    elif hasattr(error, "add_note"):  # Python 3.11 and later
        error.add_note(note)


def cancel_tasks(platform: Platform, pool: BuiltPool, seconds: float) -> None:
    """Cancel the tasks of a pool whose nodes have been ended, so that they wait for no others.

    What cannot be cancelled in time costs nothing, so that it is no error.
    """
    if pool.group_id is None:
        return
    operation = Operation(seconds)
    try:
        tasks = platform.tasks(pool.group_id, operation)
        unfinished = [task.id for task in tasks if task.id and not (task.status and task.status.finished)]
        for error in cancel_all(platform, unfinished, operation):
            log.info("%s", error)
    except RayDogError as error:
        log.warning("Could not list the tasks of %s to cancel them: %s", pool.plan.group, error)
    except BaseException:
        operation.cancel()
        raise


def cancel_all(platform: Platform, task_ids: Iterable[str], operation: Operation) -> list[RayDogError]:
    """Cancel tasks in parallel, while there is time; return what failed."""
    cancelling = [platform.submit(_canceller(platform, task_id, operation)) for task_id in task_ids]
    return [error for future in cancelling if (error := future.result()) is not None]


def _canceller(platform: Platform, task_id: str, operation: Operation) -> Callable[[], RayDogError | None]:
    def cancel() -> RayDogError | None:
        if operation.expired or operation.cancelled.is_set():
            return None
        try:
            platform.cancel_task(task_id, operation)
        except RayDogError as error:
            return error
        return None

    return cancel
