"""Faults on the wire: what can go wrong between a client and the platform, on calls that are chosen.

A fault names the requests that it is for and what becomes of them; :class:`Faults` lets it happen. It sits
outside the whole API, so a client cannot tell the fault from one of the network or of a real platform.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from yellowdog_ray.errors import SpecError
from yellowdog_ray.local.clock import LONGEST
from yellowdog_ray.local.web import tidy

__all__ = ["Chosen", "Fault", "Faults", "check_chosen", "number", "pattern", "takes", "text", "whole"]

_SEEN = 100_000
# What follows such an answer is taken for the next one (RFC 9110, 6.4.1).
_BODILESS = (204, 304)
# What HTTP allows (RFC 9110, 5.1 and 5.5).
_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_HEADER_VALUE = re.compile(r"[\t\x20-\x7e\x80-\xff]*")


class Chosen(Protocol):
    """How a fault chooses among the things that it could happen to; see :class:`Fault`."""

    count: int | None
    skip: int
    after: float
    for_: float | None
    hits: int
    since: float | None


def number(name: str, value: Any, low: float = 0) -> None:
    """Refuse what is no number, or one that is too low, infinite or as good as that.

    :raises SpecError: naming what it is.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= LONGEST:
        raise SpecError(f"{name} must be a number from {low:g} to {LONGEST:g}, not {value!r}")


def whole(name: str, value: Any) -> None:
    """Refuse what is no whole number from 0 on.

    :raises SpecError: naming what it is.
    """
    number(name, value)
    if value != int(value):
        raise SpecError(f"{name} must be a whole number, not {value!r}")


def text(name: str, value: Any) -> None:
    """Refuse what is no text.

    :raises SpecError: naming what it is.
    """
    if not isinstance(value, str):
        raise SpecError(f"{name} must be text, not {value!r}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise SpecError(f"{name} must be text that UTF-8 can hold, not {value!r}") from None


def pattern(name: str, value: Any) -> None:
    """Refuse what is no regular expression.

    :raises SpecError: naming what it is.
    """
    text(name, value)
    try:
        re.compile(value)
    except (re.error, OverflowError, RecursionError) as problem:
        raise SpecError(f"{name} of a fault is a regular expression: {problem}") from None


def check_chosen(fault: Chosen) -> None:
    """Refuse a choice that is none.

    :raises SpecError: naming the field.
    """
    whole("skip", fault.skip)
    if fault.count is not None:
        whole("count", fault.count)
    number("after", fault.after)
    if fault.for_ is not None:
        number("for_", fault.for_)


def takes(fault: Chosen, now: float) -> bool:
    """Say whether something that a fault is for is one that it happens to, and count it.

    :param now: the time on the clock that ``since`` is read from.
    """
    if fault.since is None:
        fault.since = now
    passed = now - fault.since
    over = fault.for_ is not None and passed >= fault.after + fault.for_
    if fault.count == 0 or over or passed < fault.after:
        return False
    if fault.skip > 0:
        fault.skip -= 1
        return False
    if fault.count is not None:
        fault.count -= 1
    fault.hits += 1
    return True


@dataclass
class Fault:
    """Something that goes wrong with some of the requests to the platform.

    ``count``, ``skip`` and ``hits`` are kept up to date while requests come in: ``hits`` says how many
    requests the fault has taken.

    :param method: the HTTP method of the requests that it is for, in any case; ``"*"`` for every method.
    :param path: a regular expression that is looked for in their path, without the query, and without the
        doubled and trailing slashes that the SDK sends.
    :param what: an HTTP status to answer with instead; ``"before"`` or ``"after"``: the connection is
        dropped before or after the request is carried out; ``"hang"``: the request is held for
        ``seconds``, and then carried out and answered (``carried_out``), or its connection dropped.
    :param count: how many requests it takes; None for all that come.
    :param skip: how many matching requests it lets pass first.
    :param headers: headers of the answer, for a status.
    :param body: body of the answer, for a status that has one (204 and 304 have none).
    :param carried_out: for a status, whether the request is carried out first, and its real answer lost;
        for ``"hang"``, whether it is carried out in the end. An update stream has been carried out when it
        has begun.
    :param seconds: for ``"hang"``, how long the request is held. It is held less long where the client
        goes away or the platform closes.
    :param delay: seconds by which the answer, or the end of the connection, comes late.
    :param after: seconds from when the platform is given the fault until it begins to happen. What comes
        before is not counted.
    :param for_: seconds for which it happens then; None for as long as it is there.
    :raises SpecError: when it is no such fault.
    """

    method: str
    path: str
    what: int | Literal["before", "after", "hang"]
    count: int | None = 1
    skip: int = 0
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b"injected fault"
    carried_out: bool = False
    seconds: float = 5.0
    delay: float = 0.0
    after: float = 0.0
    for_: float | None = None
    hits: int = field(default=0, init=False)
    since: float | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        check_chosen(self)
        number("seconds", self.seconds)
        number("delay", self.delay)
        known = self.what in ("before", "after", "hang")
        if not known and not (isinstance(self.what, int) and 200 <= self.what <= 599):
            raise SpecError(f"what of a fault is a status, 'before', 'after' or 'hang', not {self.what!r}")
        if not isinstance(self.carried_out, bool):
            raise SpecError(f"carried_out of a fault must be True or False, not {self.carried_out!r}")
        text("method", self.method)
        self.method = self.method.upper()
        pattern("path", self.path)
        _check_answer(self.headers, self.body)

    def takes(self, method: str, path: str, now: float | None = None) -> bool:
        """Say whether this request is one to go wrong, and count it.

        :param now: the time in seconds, on any clock that is always the same one; None for the machine's.
        """
        if self.method not in ("*", method) or not re.search(self.path, path):
            return False
        return takes(self, time.monotonic() if now is None else now)


def _check_answer(headers: Any, body: Any) -> None:
    if not isinstance(headers, Mapping):
        raise SpecError(f"headers of a fault are a mapping, not {headers!r}")
    for name, value in headers.items():
        text("the name of a header", name)
        text(f"the header {name}", value)
        if not _HEADER_NAME.fullmatch(name) or not _HEADER_VALUE.fullmatch(value):
            raise SpecError(f"HTTP has no such header: {name!r}: {value!r}")
    if not isinstance(body, bytes):
        raise SpecError(f"body of a fault must be bytes, not {body!r}")


class Faults:
    """ASGI middleware, outermost under uvicorn: delays every request, and lets some of them go wrong.

    ``faults`` may be changed, and ``latency`` set, from any thread while requests come in. Of several
    faults that match a request, the first takes it, and the others do not count it. Paths that begin with
    ``/_`` are no part of the API, and pass; so do those that are not admitted, and no fault counts them.

    :param closing: set when the platform closes: what is held is then held no longer.
    :param clock: what the times of faults are counted on, in seconds; what is held or comes late is so by
        the machine's clock, whatever this one shows.
    :param admits: says whether the API will let a request in; None where it lets all in.
    """

    def __init__(
        self,
        app: ASGIApp,
        closing: asyncio.Event | None = None,
        clock: Callable[[], float] = time.monotonic,
        admits: Callable[[Scope], bool] | None = None,
    ) -> None:
        self.app = app
        self._admits = admits
        self._clock = clock
        self._faults: list[Fault] = []
        self._latency = 0.0
        #: What has come in, as (method, path): the latest, at least a hundred thousand of them.
        self.seen: list[tuple[str, str]] = []
        #: How many requests have come in.
        self.requests = 0
        self._closing = closing or asyncio.Event()

    @property
    def latency(self) -> float:
        """Seconds by which every request is delayed."""
        return self._latency

    @latency.setter
    def latency(self, seconds: float) -> None:
        number("latency", seconds)
        self._latency = seconds

    @property
    def faults(self) -> list[Fault]:
        """What is to go wrong with requests."""
        return self._faults

    @faults.setter
    def faults(self, faults: Iterable[Fault]) -> None:
        newer = list(faults)
        for fault in newer:
            if not isinstance(fault, Fault):
                raise SpecError(f"a fault of requests is a Fault, not {fault!r}")
        older, self._faults = self._faults, newer
        for fault in self._faults:
            if not any(fault is other for other in older):
                fault.since = self._clock()

    def clear(self) -> None:
        """Let nothing more go wrong; what is being held stays held."""
        # Not emptied: the loop may be going through it.
        self.faults = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Take a request in."""
        path = tidy(scope.get("path", ""))
        if scope["type"] != "http" or path.startswith("/_"):
            await self.app(scope, receive, send)
            return
        method = scope["method"]
        self.requests += 1
        self.seen.append((method, path))
        if len(self.seen) >= 2 * _SEEN:
            del self.seen[:_SEEN]
        now = self._clock()
        fault = None
        if self.faults and (self._admits is None or self._admits(scope)):
            fault = next((one for one in list(self.faults) if one.takes(method, path, now)), None)
        if self.latency:
            await asyncio.sleep(self.latency)
        if fault is None:
            await self.app(scope, receive, send)
        else:
            await self._go_wrong(fault, scope, receive, send)

    async def _go_wrong(self, fault: Fault, scope: Scope, receive: Receive, send: Send) -> None:
        # Read first: from here on, all that can still come from the client is that it has gone.
        request = await _whole(receive)

        async def again() -> Message:
            return request.pop(0) if request else await receive()

        if fault.what == "hang":
            await self._hold(fault.seconds, receive)
            if not fault.carried_out or self._closing.is_set():
                await _drop(send)
                return
            delay = fault.delay

            async def late(message: Message) -> None:
                nonlocal delay
                # Only the answer's first part waits.
                held, delay = delay, 0.0
                await self._hold(held, receive)
                await send(message)

            await self.app(scope, again, late)
            return
        if fault.what == "after" or fault.carried_out:
            await self._carry_out(scope, again)
        await self._hold(fault.delay, receive)
        if isinstance(fault.what, int):
            headers = [(key.encode(), value.encode("latin-1")) for key, value in fault.headers.items()]
            await send({"type": "http.response.start", "status": fault.what, "headers": headers})
            body = b"" if fault.what in _BODILESS else fault.body
            await send({"type": "http.response.body", "body": body})
        else:
            await _drop(send)

    async def _carry_out(self, scope: Scope, receive: Receive) -> None:
        """Do what is asked for, and lose the answer; of a stream, which may last for ever, the beginning."""
        begun = asyncio.Event()

        async def swallow(message: Message) -> None:
            if message.get("more_body"):
                begun.set()

        tasks = [
            asyncio.ensure_future(self.app(scope, receive, swallow)),
            asyncio.ensure_future(begun.wait()),
        ]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if tasks[0].done():
                tasks[0].result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _hold(self, seconds: float, receive: Receive) -> None:
        """Wait, as long as the client is there and the platform open."""
        if seconds <= 0:
            return
        ends = [asyncio.ensure_future(self._closing.wait()), asyncio.ensure_future(_gone(receive))]
        try:
            await asyncio.wait(ends, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for end in ends:
                end.cancel()


async def _whole(receive: Receive) -> list[Message]:
    """Read a request to its end, which may also be that the client goes."""
    messages = [await receive()]
    while messages[-1].get("more_body"):
        messages.append(await receive())
    return messages


async def _gone(receive: Receive) -> bool:
    """Return when the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass
    return True


async def _drop(send: Send) -> None:
    """Drop the connection without an answer."""
    # ASGI knows no way to do this; uvicorn's own object does.
    send.__self__.transport.abort()  # type: ignore[attr-defined]
    # Returning before uvicorn has noticed would make it send an answer of its own.
    await asyncio.sleep(0.01)
