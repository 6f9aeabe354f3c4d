"""What the scheduler keeps, as plain data that JSON can hold, and back.

What a thing is counted by (how many workers of a pool are busy) is not part of it: it follows from the
rest. A thing names another by its id.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import cache, cached_property
from typing import Any, Union, cast, get_args, get_origin, get_type_hints

from yellowdog_ray.local.entities import (
    ComputeRequirement,
    Instance,
    Node,
    Pool,
    Task,
    TaskGroup,
    Worker,
    WorkRequirement,
)

__all__ = ["KINDS", "Kind", "Thing", "from_plain", "kind_of", "read", "to_plain", "write"]

Thing = ComputeRequirement | Pool | Instance | Node | WorkRequirement | TaskGroup | Task


@dataclass(frozen=True)
class Kind:
    """How things of one class are kept.

    :param fields: the fields that are kept as they are, as one text.
    :param owners: the fields that hold other things, with the kind of each; their ids are kept.
    """

    name: str
    type: type[Any]
    fields: str
    owners: tuple[tuple[str, str], ...] = ()

    @cached_property
    def stored(self) -> list[str]:
        """The fields that are kept as they are."""
        return self.fields.split()


_ALL = (
    Kind(
        "compute",
        ComputeRequirement,
        (
            "id usage template source_id target created changed status source_status source_message "
            "auto_shutdown auto_shutdown_time updated"
        ),
    ),
    Kind(
        "pool",
        Pool,
        "id name namespace spec max_nodes shape created changed updated status last_claimed last_released",
        (("requirement", "compute"),),
    ),
    Kind(
        "instance",
        Instance,
        "id hostname created changed status private_ip public_ip reason",
        (("requirement", "compute"),),
    ),
    Kind(
        "node",
        Node,
        "id shape registered changed status deregistered",
        (("pool", "pool"), ("instance", "instance")),
    ),
    Kind(
        "work",
        WorkRequirement,
        "id namespace name tag priority created changed status",
    ),
    Kind(
        "group",
        TaskGroup,
        "id spec number priority tag changed updated status",
        (("work", "work"),),
    ),
    Kind(
        "task",
        Task,
        (
            "id spec status errors retries attempts node_id worker_id allocated started finished "
            "abort_requested resubmitted_to resubmitted_from"
        ),
        (("group", "group"),),
    ),
)
KINDS: Mapping[str, Kind] = {kind.name: kind for kind in _ALL}
"""All kinds by name, each after those of its owners."""
_OF_TYPE: Mapping[type[Any], Kind] = {kind.type: kind for kind in _ALL}
_WORKER = ("id", "slot", "registered", "status")


def kind_of(thing: Thing) -> Kind:
    """Tell the kind of a thing."""
    return _OF_TYPE[type(thing)]


def write(thing: Thing) -> dict[str, Any]:
    """Write a thing as plain data."""
    kind = kind_of(thing)
    record = {name: to_plain(getattr(thing, name)) for name in kind.stored}
    for name, _ in kind.owners:
        record[name] = getattr(thing, name).id
    if isinstance(thing, Node):
        record["workers"] = [{name: getattr(worker, name) for name in _WORKER} for worker in thing.workers]
    return record


def read(kind: Kind, record: Mapping[str, Any], find: Callable[[str, str], Thing]) -> Thing:
    """Read a thing.

    :param find: gives a thing by its kind and id; what it raises is raised here.
    :raises ValueError: when the record is not one of this kind.
    """
    try:
        hints = _hints(kind.type)
        values = {name: from_plain(hints[name], record[name]) for name in kind.stored}
        values |= {name: find(owner, record[name]) for name, owner in kind.owners}
        thing: Thing = kind.type(**values)
        if isinstance(thing, Node):
            hints = _hints(Worker)
            for each in record["workers"]:
                thing.workers.append(
                    Worker(node=thing, **{name: from_plain(hints[name], each[name]) for name in _WORKER})
                )
    except (KeyError, TypeError) as error:
        raise ValueError(f"no {kind.name}: {error!r}") from error
    return thing


def to_plain(value: Any) -> Any:
    """Write a value (a specification, a table, a number) as plain data."""
    if value is None or isinstance(value, (str, int, float)):
        return value
    if isinstance(value, Mapping):
        return {key: to_plain(each) for key, each in value.items()}
    if isinstance(value, frozenset):
        return sorted(value)
    if isinstance(value, (list, tuple)):
        return [to_plain(each) for each in value]
    return {name: to_plain(getattr(value, name)) for name in _names(type(value))}


def from_plain(hint: Any, value: Any) -> Any:
    """Read a value of the type that an annotation names.

    :raises ValueError: when it is none.
    """
    if hint is Any:
        return value
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        # The only unions here are with None.
        (inner,) = (each for each in arguments if each is not type(None))
        return None if value is None else from_plain(inner, value)
    if origin is None and issubclass(hint, tuple):
        named = _hints(hint)
        return hint(*(from_plain(each, part) for each, part in zip(named.values(), value, strict=True)))
    if is_dataclass(hint):
        named, make = _hints(hint), cast("Callable[..., Any]", hint)
        return make(**{name: from_plain(named[name], value[name]) for name in _names(hint)})
    if origin is tuple and arguments[-1] is not Ellipsis:
        return tuple(from_plain(each, part) for each, part in zip(arguments, value, strict=True))
    if origin in (tuple, frozenset):
        return origin(from_plain(arguments[0], each) for each in _a(list, value))
    if origin in (list, Sequence):
        return [from_plain(arguments[0], each) for each in _a(list, value)]
    if origin is Mapping:
        return {key: from_plain(arguments[1], each) for key, each in _a(dict, value).items()}
    return _a((int, float) if hint is float else hint, value)


def _a(kind: Any, value: Any) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"{type(value).__name__} in place of {kind}")
    return value


def _field_names(owner: Any) -> tuple[str, ...]:
    return tuple(each.name for each in fields(owner))


_hints: Callable[[Any], dict[str, Any]] = cache(get_type_hints)
_names: Callable[[Any], tuple[str, ...]] = cache(_field_names)
