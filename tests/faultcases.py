"""The calls that a cluster makes, what can go wrong with each, and ways to let it happen."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tests.controlplane import KEY_ID, SECRET, Fault, Served
from yellowdog_ray.raydog.builder import RayDogCluster, RayDogClusterProxy
from yellowdog_ray.raydog.state import ClusterState

__all__ = [
    "CALLS",
    "FAULTS",
    "ONCE",
    "PHASES",
    "TIMELY",
    "GivenUp",
    "Kind",
    "begin",
    "drive",
    "fault",
    "make",
    "name_of",
    "pairs",
    "second_try",
    "states",
]

BUILD_TIMEOUT = timedelta(seconds=20)
_ID = r"ydid:[^/]+"

CALLS: dict[str, tuple[str, str]] = {
    "read template": ("GET", r"/templates/requirements/"),
    "provision pool": ("POST", r"^/workerPools/provisioned/template$"),
    "add requirement": ("POST", r"^/work/requirements$"),
    "list nodes": ("GET", r"^/workerPools/nodes$"),
    "add tasks": ("POST", rf"^/work/taskGroups/{_ID}/tasks$"),
    "read task": ("GET", rf"^/work/tasks/{_ID}$"),
    "read requirement": ("GET", rf"^/work/requirements/{_ID}$"),
    "write requirement": ("PUT", r"^/work/requirements$"),
    "list tasks": ("GET", r"^/work/tasks$"),
    "resize pool": ("PUT", rf"^/workerPools/provisioned/{_ID}$"),
    "end node": ("DELETE", rf"^/workerPools/nodes/{_ID}$"),
    "cancel task": ("PUT", rf"^/work/tasks/{_ID}/cancel$"),
    "end pool": ("DELETE", rf"^/workerPools/{_ID}$"),
    "terminate compute": ("PUT", rf"^/compute/requirements/{_ID}/transition/TERMINATED$"),
    "cancel requirement": ("PUT", rf"^/work/requirements/{_ID}/transition/CANCELLING$"),
    "list pools": ("GET", r"^/workerPools/?$"),
    "list compute": ("GET", r"^/compute/requirements$"),
    "read pool": ("GET", rf"^/workerPools/{_ID}$"),
    "read compute": ("GET", rf"^/compute/requirements/{_ID}$"),
    "find pool": ("GET", r"^/workerPools/test/"),
    "find compute": ("GET", r"^/compute/namespaces/test/requirements/"),
    "find requirement": ("GET", r"^/work/namespaces/test/requirements/"),
}
"""Every provisioning, submitting, waiting, ending and verifying call, by method and path."""

PHASES: dict[str, list[str]] = {
    "build": ["read template", "provision pool", "add requirement", "list nodes", "add tasks", "read task"],
    "wait": ["read requirement"],
    "add": ["read template", "provision pool", "read requirement", "write requirement", "add tasks"],
    "grow": ["list tasks", "resize pool", "add tasks"],
    "shrink": ["list tasks", "cancel task", "end node", "resize pool"],
    "remove": ["end pool", "terminate compute", "read compute", "read pool", "list tasks", "cancel task"],
    "shut down": [
        "end pool",
        "terminate compute",
        "cancel requirement",
        "read requirement",
        "list pools",
        "list compute",
    ],
    # With so few pools that they are looked at one by one.
    "shut down small": ["read pool", "read compute"],
}
"""Which calls a phase makes. The look-ups by name are made only where an answer was lost."""

ONCE = {
    ("build", "add requirement"): "a cluster has one work requirement",
    ("shut down", "cancel requirement"): "a cluster has one work requirement",
}
"""Calls that a phase makes once only, and why: of these there is no later one."""

TIMELY = {
    ("build", "list nodes"): {"boot_delay": 0.8},
    ("wait", "read requirement"): {"boot_delay": 0.8},
    ("shut down", "read requirement"): {"stop_delay": 0.5},
    ("shut down", "list pools"): {"stop_delay": 0.5},
    ("shut down", "list compute"): {"stop_delay": 0.5},
}
"""Calls of waits, and how slow the platform has to be for a later one to be made."""

_HTML = b"<html><head><title>502 Bad Gateway</title></head><body><h1>502 Bad Gateway</h1></body></html>"
_AS_HTML = {"content-type": "text/html"}


def _body(kind: str) -> bytes:
    return json.dumps({"errorType": kind, "message": "injected fault"}).encode()


@dataclass(frozen=True)
class Kind:
    """What goes wrong.

    :param fields: of the :class:`Fault`.
    :param hangs: whether the client has to give the call up.
    :param carries_out: whether the platform does what it was asked for nevertheless.
    :param delay: seconds that the fault itself costs.
    """

    fields: dict[str, Any]
    hangs: bool = False
    carries_out: bool = False
    delay: float = 0.0


FAULTS: dict[str, Kind] = {
    "500": Kind({"what": 500, "body": _body("InternalServerException")}),
    "500 carried out": Kind({"what": 500, "carried_out": True}, carries_out=True),
    "502": Kind({"what": 502, "body": _HTML, "headers": _AS_HTML}),
    "502 carried out": Kind(
        {"what": 502, "body": _HTML, "headers": _AS_HTML, "carried_out": True}, carries_out=True
    ),
    "429": Kind({"what": 429}),
    "429 Retry-After": Kind({"what": 429, "headers": {"Retry-After": "1"}}, delay=1.0),
    "before": Kind({"what": "before"}),
    "after": Kind({"what": "after"}, carries_out=True),
    # Held until the client gives up, and carried out then.
    "hang": Kind({"what": "hang", "seconds": 60.0, "carried_out": True}, hangs=True, carries_out=True),
    "hang lost": Kind({"what": "hang", "seconds": 60.0}, hangs=True),
    "404": Kind({"what": 404, "body": _body("NotFoundException")}),
}


def fault(call: str, kind: str, count: int | None = 1, skip: int = 0) -> Fault:
    """Make a fault of a kind for a call; ``count`` None is for ever."""
    method, path = CALLS[call]
    return Fault(method, path, count=count, skip=skip, **FAULTS[kind].fields)


def pairs() -> Iterator[tuple[str, str]]:
    """List every phase with every call that it makes."""
    for phase, calls in PHASES.items():
        for call in calls:
            yield phase, call


def make(served: Served, name: str, **options: Any) -> RayDogCluster:
    """Make a cluster without Ray's token, of which this process has one only."""
    return RayDogCluster(
        KEY_ID, SECRET, name, "test", "test/small", None, served.url, ray_auth="off", **options
    )


def begin(cluster: RayDogCluster, phase: str) -> None:
    """Bring a cluster to where a phase begins."""
    # Two templates, so that the second is a later call.
    templates = ["test/small", "test/large", "test/small"]
    for template in templates[: 1 if phase == "shut down small" else 3]:
        cluster.add_worker_pool(template, None, 2)
    if phase == "build":
        return
    cluster.build(BUILD_TIMEOUT)
    if phase == "shrink":
        cluster.scale_worker_pool("worker-nodes-01", 4)
        cluster.wait_for_workers(timeout=10)
    elif phase in ("grow", "remove"):
        cluster.wait_for_workers(timeout=10)


def drive(cluster: RayDogCluster, phase: str) -> None:
    """Go through a phase. What is done once by one call is done twice, for there to be later calls."""
    if phase == "build":
        cluster.build(BUILD_TIMEOUT)
    elif phase == "wait":
        # The others may be there already.
        cluster.add_worker_pool("test/small", None, 1, "added")
        cluster.wait_for_workers(timeout=10)
    elif phase == "add":
        for name in ("added", "another"):
            cluster.add_worker_pool("test/small", None, 2, name)
    elif phase == "grow":
        for count in (3, 4):
            cluster.scale_worker_pool("worker-nodes-01", count)
    elif phase == "shrink":
        for count in (3, 1):
            cluster.scale_worker_pool("worker-nodes-01", count)
    elif phase == "remove":
        for name in ("worker-nodes-01", "worker-nodes-02"):
            cluster.remove_worker_pool_by_internal_name(name)
    else:
        cluster.shut_down()


def name_of(cluster: RayDogCluster) -> str:
    """Tell a cluster's name, which it has no public attribute for."""
    return cluster._spec.name


def states(directory: Path, name: str) -> list[ClusterState]:
    """Read the state files of a cluster in a directory."""
    return [ClusterState.load(path) for path in directory.glob(f"test.{name}.*.json")]


def second_try(cluster: RayDogCluster, by: str, directory: Path) -> None:
    """Shut a cluster down again, by the object itself or by the state file that it left."""
    if by == "state file":
        (path,) = directory.glob(f"test.{name_of(cluster)}.*.json")
        proxy = RayDogClusterProxy(KEY_ID, SECRET)
        proxy.load_saved_state_from_json_file(path)
        proxy.shut_down()
    cluster.shut_down()


class GivenUp:
    """ASGI middleware: a gateway that answers 504 at once to what the platform carries out later.

    :param app: the platform, as ``served.faults.app``.
    :param path: a regular expression for the paths of the POST requests that it gives up.
    :param seconds: how much later they are carried out.
    """

    def __init__(self, app: ASGIApp, path: str, seconds: float) -> None:
        self._app = app
        self._path = re.compile(path)
        self._seconds = seconds
        self._tasks: set[asyncio.Task[None]] = set()
        #: Whether it says nothing at all, instead of 504.
        self.silent = False
        #: The statuses with which the platform answered in the end, when nobody listened any more.
        self.answers: list[int] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Take a request in."""
        if scope["type"] != "http" or scope["method"] != "POST" or not self._path.search(scope["path"]):
            await self._app(scope, receive, send)
            return
        request = [await receive()]
        while request[-1].get("more_body"):
            request.append(await receive())
        task = asyncio.get_running_loop().create_task(self._carry_out(scope, request))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        if self.silent:
            await receive()  # until the client has gone
            return
        await send({"type": "http.response.start", "status": 504, "headers": []})
        await send({"type": "http.response.body", "body": b"gave up"})

    async def _carry_out(self, scope: Scope, request: list[Message]) -> None:
        await asyncio.sleep(self._seconds)

        async def again() -> Message:
            return request.pop(0) if request else {"type": "http.disconnect"}

        async def note(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.answers.append(message["status"])

        await self._app(scope, again, note)
