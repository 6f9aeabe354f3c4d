"""JSON under inspection: fields are read by name and kind, and what is left of an object is refused."""

from __future__ import annotations

import math
import re
from typing import Any

from yellowdog_ray.local.asks import Range, RefusedError

__all__ = ["MAX_GROUPS", "MAX_NAME", "MAX_NODES", "MAX_TAG", "Fields", "check_name", "seconds"]

# YellowDog's own limits (SDK: Tagged.MAX_TAG_LENGTH, WorkRequirement.TASK_GROUPS_MAX; documentation).
MAX_NAME = 60
MAX_TAG = 200
MAX_GROUPS = 1000
MAX_NODES = 10_000
# A hundred years: what is added to a time must give one that can be written.
MAX_DAYS = 36_500

_NAME = re.compile(r"^[a-z][a-z0-9_-]*[a-z0-9]$")
_DURATION = re.compile(
    r"^P(?:(?P<weeks>\d+)W)?(?:(?P<days>\d+(?:\.\d+)?)D)?"
    r"(?:T(?:(?P<hours>\d+(?:\.\d+)?)H)?(?:(?P<minutes>\d+(?:\.\d+)?)M)?(?:(?P<seconds>\d+(?:\.\d+)?)S)?)?$"
)
_SURROGATE = re.compile("[\ud800-\udfff]")
_UNIT = {"weeks": 604800.0, "days": 86400.0, "hours": 3600.0, "minutes": 60.0, "seconds": 1.0}


def seconds(text: str) -> float | None:
    """Read an ISO-8601 duration as seconds (``P0D``, ``PT3M``, ``P1DT2H1.5S``); None if it is not one."""
    found = _DURATION.match(text)
    if found is None or text.endswith(("P", "T")):
        return None
    return sum(float(value) * _UNIT[unit] for unit, value in found.groupdict().items() if value)


def _finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number that no float can hold
        return False


def check_name(what: str, name: str) -> str:
    """Return a name that follows YellowDog's rule, else refuse it."""
    if len(name) > MAX_NAME or not _NAME.fullmatch(name):
        raise RefusedError.invalid(
            f"{what} {name!r} is not a valid name: it must match {_NAME.pattern} "
            f"and be at most {MAX_NAME} characters long"
        )
    return name


class Fields:
    """A JSON object under inspection: each field is read by name and kind, and leftovers are refused.

    :param value: what stands in the request.
    :param where: how an error names this object, e.g. ``taskGroups[0]``.
    """

    def __init__(self, value: Any, where: str) -> None:
        if not isinstance(value, dict):
            raise RefusedError.invalid(f"{where} must be a JSON object")
        self._value: dict[str, Any] = value
        self._where = where
        self._seen: set[str] = set()

    def get(self, key: str) -> Any:
        self._seen.add(key)
        return self._value.get(key)

    def bad(self, key: str, wanted: str) -> RefusedError:
        return RefusedError.invalid(f"{self._where}.{key} must be {wanted}")

    def _typed(self, key: str, kinds: tuple[type, ...], wanted: str) -> Any:
        value = self.get(key)
        if value is None:
            return None
        # To Python, True is an int; to JSON it is no number.
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise self.bad(key, wanted)
        # To Python's JSON, 1e999 is a number too.
        if isinstance(value, (int, float)) and not _finite(value):
            raise self.bad(key, wanted)
        self._check_text(key, value)
        return value

    def _check_text(self, key: str, value: Any) -> None:
        """Refuse a text that cannot be written down: half of a pair that stands for one character."""
        texts = [value] if isinstance(value, str) else value if isinstance(value, list) else ()
        if isinstance(value, dict):
            texts = [*value, *value.values()]
        for text in texts:
            if isinstance(text, str) and not text.isascii() and _SURROGATE.search(text):
                raise self.bad(key, "text that UTF-8 can hold, without lone surrogates")

    def text(self, key: str) -> str | None:
        value: str | None = self._typed(key, (str,), "text")
        return value

    def need(self, key: str) -> str:
        value = self.text(key)
        if not value:
            raise RefusedError.invalid(f"{self._where}.{key} is required")
        return value

    def name(self, key: str) -> str:
        return check_name(f"{self._where}.{key}", self.need(key))

    def tag(self, key: str) -> str | None:
        value = self.text(key)
        if value is not None and len(value) > MAX_TAG:
            raise RefusedError.invalid(f"{self._where}.{key} is longer than {MAX_TAG} characters")
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self._typed(key, (bool,), "true or false")
        return default if value is None else bool(value)

    def number(self, key: str, default: float) -> float:
        value = self._typed(key, (int, float), "a number")
        return default if value is None else float(value)

    def whole(self, key: str, low: int = 0, high: int | None = None) -> int | None:
        value = self._typed(key, (int, float), "a whole number")
        if value is None:
            return None
        if value != int(value) or value < low or (high is not None and value > high):
            bounds = f"from {low}" + (f" to {high}" if high is not None else "")
            raise self.bad(key, f"a whole number {bounds}, not {value}")
        return int(value)

    def duration(self, key: str) -> float | None:
        value = self.text(key)
        if value is None:
            return None
        read = seconds(value)
        if read is None:
            raise self.bad(key, f"an ISO-8601 duration such as PT10M, not {value!r}")
        if read > MAX_DAYS * 86400:
            raise self.bad(key, f"at most {MAX_DAYS} days")
        return read

    def strings(self, key: str) -> tuple[str, ...] | None:
        value = self._typed(key, (list,), "a list of texts")
        if value is None:
            return None
        if not all(isinstance(each, str) for each in value):
            raise self.bad(key, "a list of texts")
        return tuple(value)

    def mapping(self, key: str) -> dict[str, str] | None:
        value = self._typed(key, (dict,), "an object of texts")
        if value is None:
            return None
        if not all(isinstance(each, str) for each in value.values()):
            raise self.bad(key, "an object of texts")
        return dict(value)

    def arguments(self, key: str) -> tuple[str, ...] | None:
        """Read what a process can be started with: a NUL would end an argument."""
        value = self.strings(key)
        if any("\0" in each for each in value or ()):
            raise self.bad(key, "texts without NUL characters")
        return value

    def environment(self, key: str) -> dict[str, str] | None:
        """Read variables that a process can have."""
        value = self.mapping(key)
        for name, content in (value or {}).items():
            if not name or "=" in name or "\0" in name:
                raise self.bad(key, f"variables whose names are not empty, without = and NUL, not {name!r}")
            if "\0" in content:
                raise self.bad(key, f"variables without NUL characters, which {name} has")
        return value

    def span(self, key: str) -> Range:
        inner = self.fields(key)
        if inner is None:
            return Range(None, None)
        low = inner._typed("min", (int, float), "a number")
        high = inner._typed("max", (int, float), "a number")
        inner.done()
        if low is not None and high is not None and low > high:
            raise self.bad(key, f"a range: min {low} is more than max {high}")
        return Range(low, high)

    def objects(self, key: str) -> list[Any]:
        value = self._typed(key, (list,), "a list")
        return list(value or [])

    def fields(self, key: str) -> Fields | None:
        value = self.get(key)
        return None if value is None else Fields(value, f"{self._where}.{key}")

    def ignore(self, *keys: str) -> None:
        """Skip fields that the platform itself sets, and that clients send back."""
        self._seen.update(keys)

    def done(self) -> None:
        """Refuse every field that holds something and was not read; false and 0 are something."""
        nothing: tuple[Any, ...] = (None, "", [], {})
        left = [key for key, value in self._value.items() if key not in self._seen and value not in nothing]
        if left:
            raise RefusedError.invalid(
                f"{self._where}.{left[0]} is not supported by the local platform"
                + (f" (nor are {', '.join(left[1:])})" if left[1:] else "")
            )
