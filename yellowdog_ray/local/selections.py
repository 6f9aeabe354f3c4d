"""Which errors of tasks are tried again or resubmitted: what a request may say of it, and what it means."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from yellowdog_ray.local.asks import RefusedError
from yellowdog_ray.local.entities import TaskError
from yellowdog_ray.local.fields import Fields
from yellowdog_ray.local.vocabulary import ERROR_TYPES, TASK_STATUSES

__all__ = ["check_matchers", "check_selection", "matches_deprecated", "selects"]

# What an error can be chosen by, and the words that it can have there; an exit code is a number.
_ERROR_PARTS: Mapping[str, frozenset[str] | None] = {
    "errorTypes": ERROR_TYPES,
    "statusesAtFailure": TASK_STATUSES,
    "processExitCodes": None,
}


def _check_part(where: str, known: frozenset[str] | None, values: Iterable[Any]) -> None:
    """Refuse a value that no error ever has: nothing would be retried, without a word."""
    for value in values:
        if known is None and (isinstance(value, bool) or not isinstance(value, int)):
            raise RefusedError.invalid(f"{where} must be whole numbers, not {value!r}")
        if known is not None and value not in known:
            raise RefusedError.invalid(f"{where} must be of {', '.join(sorted(known))}, not {value!r}")


def check_selection(value: Any, where: str, part: str | None = None) -> Any:
    """Return a ``Selection`` of error selectors, or of the values of one part of them, that is right."""
    if value is None:
        return None
    fields = Fields(value, where)
    for key in ("includes", "excludes"):
        values = fields.objects(key)
        if part is not None:
            _check_part(f"{where}.{key}", _ERROR_PARTS[part], values)
            continue
        for number, each in enumerate(values):
            selector = Fields(each, f"{where}.{key}[{number}]")
            for name in _ERROR_PARTS:
                check_selection(selector.get(name), f"{where}.{key}[{number}].{name}", name)
            selector.done()
    fields.done()
    return value


def check_matchers(value: Any) -> Any:
    """Return the deprecated ``retryableErrors`` where they are right."""
    for number, each in enumerate(value or ()):
        matcher = Fields(each, f"retryableErrors[{number}]")
        for key, known in _ERROR_PARTS.items():
            _check_part(f"retryableErrors[{number}].{key}", known, matcher.objects(key))
        matcher.done()
    return value


def _one_of(selection: Mapping[str, Any] | None, value: object) -> bool:
    """Apply a ``Selection`` of plain values (SDK, ``Selection``: includes first, then excludes)."""
    if selection is None:
        return True
    includes, excludes = selection.get("includes") or (), selection.get("excludes") or ()
    if not includes and not excludes:
        return False
    return (not includes or value in includes) and value not in excludes


def _selector_matches(selector: Mapping[str, Any], error: TaskError) -> bool:
    return (
        _one_of(selector.get("errorTypes"), error.error_type)
        and _one_of(selector.get("statusesAtFailure"), error.status_at_failure)
        and _one_of(selector.get("processExitCodes"), error.exit_code)
    )


def selects(selection: Mapping[str, Any] | None, error: TaskError) -> bool:
    """Say whether a ``Selection`` of ``TaskErrorSelector`` picks an error; no selection picks all."""
    if selection is None:
        return True
    includes: Iterable[Any] = selection.get("includes") or ()
    excludes: Iterable[Any] = selection.get("excludes") or ()
    if not includes and not excludes:
        return False
    return (not includes or any(_selector_matches(each, error) for each in includes)) and not any(
        _selector_matches(each, error) for each in excludes
    )


def matches_deprecated(matchers: Sequence[Mapping[str, Any]] | None, error: TaskError) -> bool:
    """Say whether one of the deprecated ``retryableErrors`` matches; none given matches all."""
    if not matchers:
        return True
    return any(
        (not each.get("errorTypes") or error.error_type in each["errorTypes"])
        and (not each.get("statusesAtFailure") or error.status_at_failure in each["statusesAtFailure"])
        and (not each.get("processExitCodes") or error.exit_code in each["processExitCodes"])
        for each in matchers
    )
