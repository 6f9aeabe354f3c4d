"""What the layers of the scheduler share: options, ids, timers and the effects to be carried out."""

from __future__ import annotations

import heapq
import itertools
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

from yellowdog_ray.errors import SpecError
from yellowdog_ray.local.clock import LONGEST
from yellowdog_ray.local.events import Effect
from yellowdog_ray.local.lifecycle import POOL_NEXT

__all__ = ["Engine", "SchedulerOptions"]

# The statuses of a pool that has not been shut down.
_POOL_STATUSES = frozenset(POOL_NEXT) - {"SHUTDOWN"}


@dataclass(frozen=True)
class SchedulerOptions:
    """Where YellowDog's behaviour is not documented, what this platform does; the rest are defaults.

    Times are in seconds.

    :param template_environment: how a task template's ``environment`` and a task's own combine:
        ``"replace"`` (the task's own stands alone, the strict reading) or ``"merge"`` (key by key).
    :param timeout_from: what a task's timeout counts from.
    :param idle_pool_shutdown: idle time after which a pool ends that does not say itself; None never.
        YellowDog's SDK documents ten minutes.
    :param idle_node_shutdown: the same for its nodes; None never.
    :param node_boot_timeout: how long a node may boot in a pool that does not say itself.
    :param idle_pool_statuses: the pool statuses in which the idle time of a pool runs.
    :param boot_retry: pause after a failed boot before a pool may grow again; doubled for each
        failure in a row, up to 300.
    :param fail_dependents: whether a group fails when one that it depends on did not complete;
        otherwise it waits for ever.
    :param reuse_finished_names: whether the name of something that has ended may be used again.
    :param end_again: what a client is told that ends what is ending already (a shut-down worker pool, a
        compute requirement that terminates, a work requirement that is being cancelled): ``"accept"``, or
        ``"refuse"`` with status 403.
    :param search_names: whether the names and tags that a search asks for match in ``"part"`` or as a
        ``"whole"``.
    :param grow_without_max: whether a pool that says no ``maxNodes`` grows as far as there are tasks;
        otherwise, up to the number of nodes that it was provisioned with.
    :raises SpecError: when one of them is none of its choices.
    """

    template_environment: Literal["replace", "merge"] = "replace"
    timeout_from: Literal["executing", "allocated"] = "executing"
    idle_pool_shutdown: float | None = 600
    idle_node_shutdown: float | None = None
    node_boot_timeout: float = 600
    idle_pool_statuses: frozenset[str] = frozenset({"IDLE", "EMPTY"})
    boot_retry: float = 10
    fail_dependents: bool = True
    reuse_finished_names: bool = False
    end_again: Literal["accept", "refuse"] = "accept"
    search_names: Literal["part", "whole"] = "part"
    grow_without_max: bool = False

    def __post_init__(self) -> None:
        # A mistyped choice would be none of those that are looked for, and change things without a word.
        for name, kind in get_type_hints(type(self)).items():
            value, may = getattr(self, name), _choices(kind)
            if not may[1](value):
                raise SpecError(f"{name} of SchedulerOptions must be {may[0]}, not {value!r}")


def _choices(kind: Any) -> tuple[str, Callable[[Any], bool]]:
    """Return in words what an option of a kind may be, and the test for it."""
    if get_origin(kind) is Literal:
        choices = get_args(kind)
        return " or ".join(repr(each) for each in choices), lambda value: value in choices
    if kind is bool:
        return "True or False", lambda value: isinstance(value, bool)
    if kind is float:
        return f"a number of seconds from 0 to {LONGEST:g}", _is_span
    if kind == float | None:
        return f"a number of seconds from 0 to {LONGEST:g}, or None", lambda v: v is None or _is_span(v)
    return f"a set of {', '.join(sorted(_POOL_STATUSES))}", _are_pool_statuses


def _is_span(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= LONGEST


def _are_pool_statuses(value: Any) -> bool:
    return isinstance(value, (set, frozenset)) and value <= _POOL_STATUSES


class Engine:
    """The ground of the scheduler.

    :param options: its choices.
    :param new_uuid: gives the unique part of every id; tests pass one that repeats.
    """

    def __init__(
        self, options: SchedulerOptions | None = None, new_uuid: Callable[[], str] | None = None
    ) -> None:
        self.options = options or SchedulerOptions()
        #: Grows with every call and event that may have changed something.
        self.revision = 0
        #: Where somebody saves it (see `History`): all that may have changed since it was last saved, in the
        #: order of its first change. What is new stands after what it belongs to.
        self.unsaved: dict[Any, None] | None = None
        self._new_uuid = new_uuid or (lambda: str(uuid.uuid4()))
        self._effects: list[Effect] = []
        self._timers: list[tuple[float, int, Callable[[Any, float], None], Any]] = []
        self._order = itertools.count()

    def take_effects(self) -> list[Effect]:
        """Return what is to be carried out since the last call, in order."""
        effects, self._effects = self._effects, []
        return effects

    def next_deadline(self) -> float | None:
        """Return the time at which `tick` is wanted next; it may prove to be for nothing."""
        return self._timers[0][0] if self._timers else None

    def tick(self, now: float) -> None:
        """Do all that has become due."""
        # Only what was due on entry: a timer that arms itself anew for now must not hold the loop.
        for _ in range(len(self._timers)):
            if not self._timers or self._timers[0][0] > now:
                break
            _, _, action, subject = heapq.heappop(self._timers)
            action(subject, now)
        self._settle(now)

    def _at(self, when: float, action: Callable[[Any, float], None], subject: Any) -> None:
        heapq.heappush(self._timers, (when, next(self._order), action, subject))

    def _ydid(self, kind: str) -> str:
        return f"ydid:{kind}:000000:{self._new_uuid()}"

    def _mark(self, thing: Any) -> None:
        """Note that something has changed, or is about to within this call."""
        if self.unsaved is not None:
            self.unsaved[thing] = None

    def _settle(self, now: float) -> None:
        """Bring what follows from a change to an end; the layers say how."""
        raise NotImplementedError
