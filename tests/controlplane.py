"""The control plane alone on a loopback port: real HTTP, real scheduler, simulated machines."""

from __future__ import annotations

import asyncio
import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from yellowdog_ray.local.api import create_app
from yellowdog_ray.local.core import ControlPlane
from yellowdog_ray.local.scheduler import Scheduler, SchedulerOptions, Template
from yellowdog_ray.local.simulated import SimulatedBackend

KEY_ID, SECRET = "test-key", "test-secret"
TEMPLATE = Template(
    namespace="test",
    name="small",
    id="ydid:crt:000000:00000000-0000-0000-0000-0000000000a1",
    instance_type="local.small",
    vcpus=2,
    ram=4,
    region="local",
)

T = TypeVar("T")


@dataclass
class Fault:
    """Something that goes wrong with the next ``count`` requests that match.

    :param what: an HTTP status to answer with instead, or ``"before"`` / ``"after"``: the connection
        is dropped before or after the request is carried out.
    """

    method: str
    path: str
    what: int | Literal["before", "after"]
    count: int = 1
    headers: dict[str, str] = field(default_factory=dict)


class Faults:
    """ASGI middleware, outermost under uvicorn: delays every request, and lets some of them go wrong."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self.latency = 0.0
        self.faults: list[Fault] = []
        #: What has come in, as (method, path).
        self.seen: list[tuple[str, str]] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        self.seen.append((scope["method"], scope["path"]))
        fault = self._next(scope["method"], scope["path"])
        if self.latency:
            await asyncio.sleep(self.latency)
        if fault is None:
            await self.app(scope, receive, send)
        elif isinstance(fault.what, int):
            headers = [(key.encode(), value.encode()) for key, value in fault.headers.items()]
            await send({"type": "http.response.start", "status": fault.what, "headers": headers})
            await send({"type": "http.response.body", "body": b"injected fault"})
        else:
            if fault.what == "after":

                async def swallow(message: Message) -> None:
                    pass

                await self.app(scope, receive, swallow)
            # ASGI knows no way to drop a connection without an answer; uvicorn's own object does.
            send.__self__.transport.abort()  # type: ignore[attr-defined]
            await asyncio.sleep(0.01)

    def _next(self, method: str, path: str) -> Fault | None:
        for fault in self.faults:
            if fault.count > 0 and fault.method == method and re.search(fault.path, path):
                fault.count -= 1
                return fault
        return None


@dataclass
class Served:
    """A control plane that is being served."""

    url: str
    key_id: str
    secret: str
    core: ControlPlane
    backend: SimulatedBackend
    faults: Faults
    loop: asyncio.AbstractEventLoop

    def call(self, function: Callable[..., T], *args: Any) -> T:
        """Call something on the platform's loop, and return what it returns."""

        async def run() -> T:
            return function(*args)

        return asyncio.run_coroutine_threadsafe(run(), self.loop).result(10)


@contextmanager
def serve(
    options: SchedulerOptions | None = None, templates: tuple[Template, ...] = (TEMPLATE,), **backend: Any
) -> Iterator[Served]:
    """Serve a control plane on a loopback port, in a thread with a loop of its own.

    :param backend: arguments of `SimulatedBackend`, e.g. ``boot_delay=0.5``.
    """
    listener = socket.create_server(("127.0.0.1", 0))
    loop = asyncio.new_event_loop()
    scheduler = Scheduler(options)
    for template in templates:
        scheduler.add_template(template)
    core = ControlPlane(scheduler, loop, KEY_ID, SECRET)
    machines = SimulatedBackend(loop, core.on_event, **backend)
    core.backend = machines
    faults = Faults(create_app(core))
    config = uvicorn.Config(faults, log_level="critical", lifespan="off", loop="none", access_log=False)
    server = uvicorn.Server(config)

    def run() -> None:
        asyncio.set_event_loop(loop)
        loop.run_until_complete(server.serve([listener]))

    thread = threading.Thread(target=run, name="control-plane", daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    try:
        yield Served(url, KEY_ID, SECRET, core, machines, faults, loop)
    finally:

        def close() -> None:
            core.close()
            machines.close()
            server.should_exit = True

        loop.call_soon_threadsafe(close)
        thread.join(10)
        listener.close()
        loop.close()
