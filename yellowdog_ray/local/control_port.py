"""The control port: a platform's faults, books and clock over HTTP, for other processes and languages.

It is no part of YellowDog's API, so it has a port and a token of its own. It listens on 127.0.0.1 and
speaks JSON; every request needs the header ``Authorization: Bearer TOKEN``. What is refused is answered with
a status of 400 or more and ``{"error": "why"}``.

``GET /books``
    what there is: see :func:`books`.
``GET /faults``
    what is to go wrong: ``{"faults": [...], "latency": 0.0}``, each fault with its ``kind`` and ``hits``.
``POST /faults``
    lets something go wrong: an object or a list of objects, each with a ``kind``. It is a method of
    :class:`~yellowdog_ray.local.platform_faults.PlatformFaults`, beside the arguments of that method;
    or ``http``, beside those of :class:`~yellowdog_ray.local.faults.Fault`, with a text as ``body``; or
    ``latency``, beside ``seconds``. ``for_`` may be written ``for``. Answers with a list of what came of
    each. The objects are carried out in order, up to the first that is refused.
``DELETE /faults``
    calls :meth:`~yellowdog_ray.local.platform_faults.PlatformFaults.clear`.
``POST /clock``
    moves a virtual clock on: ``{"advance": 3600}``. Answers with its ``time``.
"""

from __future__ import annotations

import dataclasses
import hmac
import inspect
import json
import secrets
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.types import ASGIApp

from yellowdog_ray.errors import ClusterStateError, SpecError
from yellowdog_ray.local.core import ControlPlane
from yellowdog_ray.local.faults import Fault, number, text
from yellowdog_ray.local.faulty_machines import CapacityLimit, ProvisionFault
from yellowdog_ray.local.platform_faults import PlatformFaults
from yellowdog_ray.local.scheduler import Scheduler

__all__ = ["ControlPort", "books", "read_fault", "running", "server_for"]

_MAX_BODY = 4 << 20
_KINDS = (
    "http",
    "fail_provision",
    "delay_provision",
    "limit_capacity",
    "lose_node",
    "preempt_node",
    "kill_task",
    "latency",
)


def running(scheduler: Scheduler) -> list[str]:
    """List what has not ended: ``work``, ``pool`` and ``compute``, each with ``namespace/name``.

    A compute requirement has ended when its last machine has; a worker pool, when it is shut down.
    """
    return [
        *(f"work {one.namespace}/{one.name}" for one in scheduler.works.values() if not one.finished),
        *(f"pool {one.namespace}/{one.name}" for one in scheduler.pools.values() if not one.finished),
        *(
            f"compute {one.usage.namespace}/{one.usage.name}"
            for one in scheduler.requirements.values()
            if one.status != "TERMINATED"
        ),
    ]


def books(core: ControlPlane, faults: PlatformFaults) -> dict[str, Any]:
    """Return what a platform knows, without what has ended.

    ``time`` is what its clock shows, in seconds since 1970; ``running`` lists works, pools and compute
    requirements by name, ``pools``, ``instances`` and ``tasks`` tell more of each; ``requests`` is the
    number of calls of its API that have come in.
    """
    scheduler = core.scheduler
    return {
        "time": core.now(),
        "running": running(scheduler),
        "pools": [
            {
                "id": pool.id,
                "name": pool.name,
                "namespace": pool.namespace,
                "status": pool.status,
                "nodes": pool.node_counts.get("RUNNING", 0),
                "expected": pool.requirement.alive,
                "max_nodes": pool.max_nodes,
                "message": pool.requirement.source_message,
            }
            for pool in scheduler.pools.values()
            if pool.status != "TERMINATED"
        ],
        "instances": [
            {
                "id": instance.id,
                "hostname": instance.hostname,
                "status": instance.status,
                "requirement": requirement.usage.name,
                "namespace": requirement.usage.namespace,
                "node": instance.node.id if instance.node is not None else None,
                "private_ip": instance.private_ip,
                "public_ip": instance.public_ip,
            }
            for requirement in scheduler.requirements.values()
            if requirement.status != "TERMINATED"
            for instance in requirement.instances.values()
            if instance.status != "TERMINATED"
        ],
        "tasks": [
            {
                "id": task.id,
                "name": task.spec.name,
                "work": group.work.name,
                "group": group.spec.name,
                "status": task.status,
                "node": task.node_id,
                "attempts": task.attempts,
            }
            for group in scheduler.groups.values()
            if not group.terminated
            for task in group.tasks
            if task.status in ("PENDING", "READY", "ALLOCATED", "EXECUTING")
        ],
        "requests": faults.requests,
    }


def read_fault(wish: Any) -> Fault:
    """Make a fault of requests out of JSON, in which ``body`` is text.

    :raises SpecError: when it is none.
    """
    fields = _arguments("http", Fault, wish)
    if "body" in fields:
        text("body", fields["body"])
        fields["body"] = fields["body"].encode()
    return Fault(**fields)


def _arguments(kind: str, function: Callable[..., Any], wish: Any) -> dict[str, Any]:
    """Return the fields of a fault as arguments of what makes it; refuse unknown and missing ones by name."""
    if not isinstance(wish, dict):
        raise SpecError(f"a fault is an object, not {wish!r}")
    parameters = inspect.signature(function).parameters
    fields = {"for_" if name == "for" else name: each for name, each in wish.items() if name != "kind"}
    unknown = ", ".join(name for name in fields if name not in parameters)
    if unknown:
        has = ", ".join(name.rstrip("_") for name in parameters)
        raise SpecError(f"{kind} has no {unknown}; it has {has}")
    missing = [name for name, one in parameters.items() if one.default is one.empty and name not in fields]
    if missing:
        raise SpecError(f"{kind} needs {', '.join(missing)}")
    return fields


class ControlPort:
    """The control port of a platform.

    :param listener: the socket that it is served on.
    :param token: what every request has to show; None for a new one.
    """

    def __init__(self, listener: socket.socket, token: str | None = None) -> None:
        self._listener = listener
        #: The base URL.
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        #: What every request has to show.
        self.token = token or secrets.token_urlsafe(32)

    def prepare(
        self,
        core: ControlPlane,
        faults: PlatformFaults,
        advance: Callable[[float], float] | None = None,
    ) -> uvicorn.Server:
        """Return the server, to be served on the platform's loop with :meth:`serve`.

        :param advance: moves the platform's clock on; None where it runs by itself.
        """
        self._core, self._faults, self._advance = core, faults, advance
        routes = [
            Route(path, self._endpoint(action), methods=[method])
            for (method, path), action in self._routes().items()
        ]
        app = Starlette(routes=routes, exception_handlers={HTTPException: self._no_route})
        app.router.redirect_slashes = False
        self._server = server_for(app)
        return self._server

    def _routes(self) -> dict[tuple[str, str], Callable[[Any], Awaitable[Any]]]:
        return {
            ("GET", "/books"): self._books,
            ("GET", "/faults"): self._list,
            ("POST", "/faults"): self._add,
            ("DELETE", "/faults"): self._clear,
            ("POST", "/clock"): self._clock,
        }

    async def serve(self) -> None:
        """Serve until :meth:`stop`."""
        await self._server.serve([self._listener])

    def stop(self) -> None:
        """End the server, on its loop."""
        self._server.should_exit = True

    def _endpoint(
        self, action: Callable[[Any], Awaitable[Any]]
    ) -> Callable[[Request], Awaitable[JSONResponse]]:
        async def endpoint(request: Request) -> JSONResponse:
            if not self._shown(request):
                return _error("the header Authorization: Bearer TOKEN is missing or wrong", 401)
            try:
                return JSONResponse(await action(await _body(request)))
            except ClientDisconnect:
                return _error("the client has gone", 400)
            except ClusterStateError as problem:
                return _error(str(problem), 409)
            except RecursionError:
                return _error("the body is nested too deeply", 400)
            except (SpecError, ValueError, OverflowError) as problem:
                return _error(str(problem), 400)

        return endpoint

    def _shown(self, request: Request) -> bool:
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        return scheme.lower() == "bearer" and hmac.compare_digest(token.encode(), self.token.encode())

    async def _no_route(self, request: Request, problem: Exception) -> JSONResponse:
        if not self._shown(request):
            return _error("the header Authorization: Bearer TOKEN is missing or wrong", 401)
        status = problem.status_code if isinstance(problem, HTTPException) else 500
        there = ", ".join(f"{method} {path}" for method, path in self._routes())
        return _error(f"there is no {request.method} {request.url.path}; there is {there}", status)

    async def _books(self, body: Any) -> Any:
        return books(self._core, self._faults)

    async def _list(self, body: Any) -> Any:
        faults: list[Fault | ProvisionFault | CapacityLimit] = [*self._faults.faults]
        faults += [*self._faults.provision, *self._faults.limits]
        return {"faults": [_written(fault) for fault in faults], "latency": self._faults.latency}

    async def _clear(self, body: Any) -> Any:
        self._faults.clear()
        return {}

    async def _clock(self, body: Any) -> Any:
        if self._advance is None:
            raise ClusterStateError("this platform's clock runs by itself")
        if not isinstance(body, dict):
            raise SpecError('what moves the clock is an object such as {"advance": 3600}')
        seconds: Any = body.get("advance")
        number("advance", seconds)
        return {"time": self._advance(seconds)}

    async def _add(self, body: Any) -> Any:
        return [self._one(fields) for fields in (body if isinstance(body, list) else [body])]

    def _one(self, wish: Any) -> Any:
        if not isinstance(wish, dict) or wish.get("kind") not in _KINDS:
            raise SpecError(f"a fault is an object with a kind, which is one of {', '.join(_KINDS)}")
        kind = wish["kind"]
        if kind == "http":
            return _written(self._faults.http(read_fault(wish)))
        function = self._set_latency if kind == "latency" else getattr(self._faults, kind)
        result = function(**_arguments(kind, function, wish))
        if kind == "kill_task":
            return {"tasks": result}
        if kind in ("lose_node", "preempt_node"):
            return {"instances": result}
        return _written(result) if result is not None else {}

    def _set_latency(self, seconds: Any) -> None:
        number("seconds", seconds)
        self._faults.latency = seconds


async def _body(request: Request) -> Any:
    whole = bytearray()
    async for chunk in request.stream():
        whole += chunk
        if len(whole) > _MAX_BODY:
            raise SpecError(f"a request has at most {_MAX_BODY} bytes")
    return json.loads(whole) if whole.strip() else None


def server_for(app: ASGIApp) -> uvicorn.Server:
    """Make a server that says nothing of faults that are meant, for a loop that runs already."""
    config = uvicorn.Config(
        app,
        log_config=None,
        log_level="critical",
        access_log=False,
        lifespan="off",
        loop="none",
        ws="none",
        # A client that keeps its request open must not keep the platform open.
        timeout_graceful_shutdown=1,
    )
    return uvicorn.Server(config)


def _error(message: str, status: int) -> JSONResponse:
    return JSONResponse({"error": message}, status)


def _written(fault: Fault | ProvisionFault | CapacityLimit) -> dict[str, Any]:
    fields = dataclasses.asdict(fault)
    fields.pop("since", None)
    if "for_" in fields:
        fields["for"] = fields.pop("for_")
    if isinstance(fault, Fault):
        fields["body"] = fault.body.decode(errors="replace")
        return {**fields, "kind": "http"}
    if isinstance(fault, CapacityLimit):
        return {**fields, "kind": "limit_capacity"}
    return {**fields, "kind": f"{fault.kind}_provision"}
