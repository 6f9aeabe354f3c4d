"""The plumbing of the HTTP API: keys, bodies, errors, slices and update streams."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import re
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from datetime import datetime, timezone
from typing import Any, Protocol, TypeVar

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from yellowdog_ray.local.asks import RefusedError
from yellowdog_ray.local.scheduler import Scheduler

__all__ = [
    "MAX_BODY",
    "Action",
    "Call",
    "Core",
    "Gate",
    "handler",
    "on_http_exception",
    "shows_key",
    "stream",
    "tidy",
]

#: The largest request body that is taken, in bytes, also after it was decompressed.
MAX_BODY = 64 * 1024 * 1024
MAX_SLICE = 1000
#: Seconds without a word on an update stream before a comment line is sent; clients wait up to 90.
HEARTBEAT = 15.0
#: Seconds between two looks at whether anything has changed for an update stream.
_LOOK = 0.1

T = TypeVar("T")

#: What answers a call: JSON, text, or a response of its own.
Action = Callable[["Call"], Awaitable[Any]]


class Core(Protocol):
    """What the API needs of the platform; see :class:`~yellowdog_ray.local.core.ControlPlane`."""

    @property
    def scheduler(self) -> Scheduler:
        """The state. It is only touched on the server's own loop."""

    @property
    def closing(self) -> asyncio.Event:
        """Set when the platform closes: every update stream then ends."""

    def now(self) -> float:
        """Return the time in seconds since 1970."""

    def changed(self) -> None:
        """Carry out what a request has brought about."""

    def check_key(self, key_id: str, secret: str) -> bool:
        """Say whether this is the application key."""


def error(status: int, error_type: str, message: str) -> Response:
    """Return an error as the SDK reads it: ``detail`` is always a list."""
    return answer({"errorType": error_type, "message": message, "detail": []}, status)


def answer(content: Any, status: int = 200) -> Response:
    """Return JSON, or text as it stands."""
    if isinstance(content, Response):
        return content
    if isinstance(content, str):
        return Response(content, status, media_type="text/plain")
    body = b"" if content is None else json.dumps(content, separators=(",", ":")).encode()
    return Response(body, status, media_type="application/json")


def tidy(path: str) -> str:
    """Return a path without doubled and trailing slashes."""
    return re.sub("/{2,}", "/", path).rstrip("/") or "/"


def shows_key(scope: Scope, core: Core) -> bool:
    """Say whether a request shows the application key."""
    scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
    key_id, colon, secret = key.partition(":")
    return scheme.lower() == "yd-key" and bool(colon) and core.check_key(key_id, secret)


class Gate:
    """The door of the API: it tidies paths up, and lets nobody in without the application key.

    Paths may hold doubled and trailing slashes (the SDK sends both). ``GET /`` needs no key: clients use
    it to see whether there is a platform at all.
    """

    def __init__(self, app: ASGIApp, core: Core) -> None:
        self._app = app
        self._core = core

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request in, or answer it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = tidy(scope["path"])
        scope = {**scope, "path": path, "raw_path": path.encode()}
        needs_none = path == "/" and scope["method"] in ("GET", "HEAD")
        if not needs_none and not shows_key(scope, self._core):
            refusal = error(401, "NotAuthorisedException", "The application key is missing or wrong")
            await refusal(scope, receive, send)
            return
        await self._app(scope, receive, send)


async def on_http_exception(request: Request, exception: Exception) -> Response:
    """Answer a request for which there is no route.

    Not with 404, which clients read as "there is no such thing", nor with 501, which the SDK tries again for
    minutes.
    """
    status = exception.status_code if isinstance(exception, HTTPException) else 500
    if status in (404, 405):
        route = f"{request.method} {request.url.path}"
        return error(400, "InvalidRequestException", f"{route} is not supported by the local platform")
    return error(status, "InternalServerException", str(exception))


class Call:
    """A request under way: its parameters, and its body."""

    def __init__(self, request: Request, core: Core) -> None:
        self.core = core
        self.scheduler = core.scheduler
        self.now = core.now()
        self._request = request
        self._read_parameters: set[str] = set()

    def path(self, key: str) -> str:
        """Return a part of the path."""
        return str(self._request.path_params[key])

    def query(self, key: str) -> str | None:
        """Return a parameter; an empty one is as good as none, and two are refused."""
        self._read_parameters.add(key)
        values = [value for value in self._request.query_params.getlist(key) if value]
        if len(values) > 1:
            given = " and ".join(repr(value) for value in values)
            raise RefusedError.invalid(f"{key} may be given once only, not as {given}")
        return values[0] if values else None

    def queries(self, *keys: str) -> frozenset[str]:
        """Return all values of a parameter that may be repeated, under any of its names."""
        self._read_parameters.update(keys)
        params = self._request.query_params
        return frozenset(value for key in keys for value in params.getlist(key) if value)

    def words(self, key: str, known: frozenset[str]) -> frozenset[str]:
        """Return all values of a parameter that may be repeated; a value that nothing can have is refused."""
        values = self.queries(key)
        for value in sorted(values - known):
            raise RefusedError.invalid(f"{key} must be one of {', '.join(sorted(known))}, not {value!r}")
        return values

    def take_any(self) -> None:
        """Let every parameter pass: there is nothing that a filter could leave out."""
        self._read_parameters.update(self._request.query_params)

    def refuse_unread(self, known: frozenset[str] | None = None) -> None:
        """Refuse parameters that nobody has read: a mistyped filter would find everything.

        :param known: those that will be read; None for those that have been.
        """
        params = self._request.query_params
        known = frozenset(self._read_parameters) if known is None else known
        for key in params:
            if key not in known and any(params.getlist(key)):
                has = f"; it has {', '.join(sorted(known))}" if known else ""
                raise RefusedError.invalid(
                    f"The query parameter {key} is not supported by the local platform on "
                    f"{self._request.method} {self._request.url.path}{has}"
                )

    def flag(self, key: str) -> bool | None:
        """Return a boolean parameter, written in any case; None if it is not given."""
        value = self.query(key)
        if value is None:
            return None
        if value.lower() not in ("true", "false"):
            raise RefusedError.invalid(f"{key} must be true or false, not {value!r}")
        return value.lower() == "true"

    def whole(self, key: str, low: int, high: int) -> int | None:
        """Return a whole number within bounds; None if it is not given."""
        value = self.query(key)
        if value is None:
            return None
        if not value.isascii() or not value.isdigit() or not low <= int(value) <= high:
            raise RefusedError.invalid(f"{key} must be a whole number from {low} to {high}, not {value!r}")
        return int(value)

    def within(self, key: str) -> Callable[[float | None], bool]:
        """Return a test for a range parameter (``key.min``, ``key.max``) of numbers or times."""
        bounds = [self._bound(f"{key}.{end}") for end in ("min", "max")]
        low, high = bounds
        if low is None and high is None:
            return lambda value: True
        return lambda value: (
            value is not None and (low is None or value >= low) and (high is None or value <= high)
        )

    def _bound(self, key: str) -> float | None:
        value = self.query(key)
        if value is None:
            return None
        with contextlib.suppress(ValueError):
            number = float(value)
            if math.isfinite(number):
                return number
        # Python 3.10 reads neither Z nor fractions of other than three or six digits.
        found = re.fullmatch(r"([^.Z+]+T[^.Z+-]+)(?:\.(\d+))?(Z|[+-]\d\d:?\d\d)?", value)
        try:
            if found is None:
                raise ValueError(value)
            zone = (found[3] or "Z").replace("Z", "+00:00")
            when = datetime.fromisoformat(found[1] + zone).astimezone(timezone.utc)
        except (ValueError, OverflowError):  # the latter for a time before the year 1 or after 9999, in UTC
            raise RefusedError.invalid(f"{key} must be a number or a time, not {value!r}") from None
        return when.timestamp() + float(f"0.{found[2] or 0}")

    def matches(self, wanted: str | None, has: str | None) -> bool:
        """Say whether a name or tag is what a search asks for: in part, as the CLI expects; None is any."""
        if self.scheduler.options.search_names == "whole":
            return wanted in (None, has)
        return wanted is None or wanted in (has or "")

    def named(self, tagged: bool = False) -> Callable[..., bool]:
        """Return the test by namespace and name that most lists have in common.

        Names and tags match as :meth:`matches` says; namespaces match as a whole.

        :param tagged: whether the things have tags, which the test then takes too.
        """
        namespaces, name = self.queries("namespaces", "namespace"), self.query("name")
        tag = self.query("tag") if tagged else None

        def test(its_namespace: str, its_name: str, its_tag: str | None = None) -> bool:
            return (
                (not namespaces or its_namespace in namespaces)
                and self.matches(name, its_name)
                and self.matches(tag, its_tag)
            )

        return test

    async def body(self) -> Any:
        """Return the body read as JSON; None if there is none."""
        raw = await self._read()
        if not raw.strip():
            return None
        try:
            return json.loads(raw)
        except ValueError as problem:
            raise RefusedError.invalid(f"The request body is not JSON: {problem}") from None
        except RecursionError:
            raise RefusedError.invalid("The request body is nested too deeply") from None

    async def _read(self) -> bytes:
        too_large = RefusedError(413, "RequestTooLargeException", f"A request has at most {MAX_BODY} bytes")
        packed = self._request.headers.get("content-encoding", "").lower() == "gzip"
        unpack = zlib.decompressobj(wbits=31)
        whole = bytearray()
        try:
            async for chunk in self._request.stream():
                whole += unpack.decompress(chunk, MAX_BODY + 1 - len(whole)) if packed and chunk else chunk
                if len(whole) > MAX_BODY:
                    raise too_large
        except zlib.error as problem:
            raise RefusedError.invalid(
                f"The request body is not gzip, as its headers say: {problem}"
            ) from None
        if packed and whole and not unpack.eof:
            raise RefusedError.invalid("The request body ends before its gzip data does")
        return bytes(whole)

    def slice(
        self,
        things: Iterable[T],
        wanted: Callable[[T], bool],
        write: Callable[[T], dict[str, Any]],
        sortable: Mapping[str, Callable[[T], Any]],
        bare: bool = False,
    ) -> Any:
        """Return one slice of a list, in the order of creation or as ``sortField`` says.

        :param things: all of them, in an order that only grows at its end.
        :param sortable: the fields that ``sortField`` may name, and how each is had.
        :param bare: answer with a bare list of all unless ``sliced=true`` (the old form of some lists).
        """
        everything: Sequence[T] = list(things)
        sort, direction = self.query("sortField"), self.query("sortDirection") or "ASCENDING"
        if direction not in ("ASCENDING", "DESCENDING"):
            raise RefusedError.invalid(f"sortDirection must be ASCENDING or DESCENDING, not {direction!r}")
        sliced = self.flag("sliced")
        size = self.whole("size", 1, MAX_SLICE) or MAX_SLICE
        start = self.whole("sliceId", 0, 1 << 40) or 0
        self.refuse_unread()
        if sort is not None:
            if sort not in sortable:
                raise RefusedError.invalid(
                    f"sortField must be one of {', '.join(sorted(sortable))}, not {sort!r}"
                )
            value = sortable[sort]
            everything = sorted(
                everything, key=lambda each: _sort_key(value(each)), reverse=direction == "DESCENDING"
            )
        if bare and not sliced:
            return [write(each) for each in everything if wanted(each)]
        items: list[dict[str, Any]] = []
        for position in range(start, len(everything)):
            if wanted(everything[position]):
                if len(items) == size:
                    # Only where one more is known to follow: clients stop at an empty slice.
                    return {"items": items, "nextSliceId": str(position)}
                items.append(write(everything[position]))
        return {"items": items}


def _sort_key(value: Any) -> tuple[int, Any]:
    """Return what puts values of a field in order: those that lack it first."""
    return (0, 0) if value is None else (1, value)


def handler(
    core: Core, action: Action, parameters: frozenset[str] | None = frozenset()
) -> Callable[[Request], Awaitable[Response]]:
    """Return an endpoint for something that takes a call and returns what is to be answered.

    :param parameters: what may stand in the call's query, checked before anything is done; None where the
        action reads only, and whatever it has not read is refused afterwards.
    """

    async def endpoint(request: Request) -> Response:
        try:
            call = Call(request, core)
            if parameters is not None:
                call.refuse_unread(parameters)
            content = await action(call)
            if parameters is None:
                call.refuse_unread()
            return answer(content)
        except RefusedError as refusal:
            return error(refusal.status, refusal.error_type, refusal.message)
        except ClientDisconnect:
            return Response(status_code=400)

    return endpoint


def stream(core: Core, write: Callable[[], tuple[dict[str, Any], bool]]) -> Response:
    """Return a stream of server-sent events: the whole thing now and after each change.

    It ends when the thing has, or when the platform closes.

    :param write: gives the thing as JSON, and whether it has ended.
    """

    async def events() -> AsyncIterator[str]:
        revision, last, quiet = -1, "", 0.0
        while True:
            if core.scheduler.revision != revision:
                revision = core.scheduler.revision
                content, ended = write()
                text = json.dumps(content, separators=(",", ":"))
                if text != last:
                    last, quiet = text, 0.0
                    yield f"data:{text}\n\n"
                if ended:
                    return
            if quiet >= HEARTBEAT:
                quiet = 0.0
                yield ":\n\n"
            try:
                await asyncio.wait_for(core.closing.wait(), _LOOK)
                return
            except asyncio.TimeoutError:
                quiet += _LOOK

    return StreamingResponse(events(), media_type="text/event-stream")
