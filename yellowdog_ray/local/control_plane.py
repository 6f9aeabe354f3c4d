"""LocalControlPlane: the platform without nodes, for tests and measurements of what talks to it.

The HTTP API and the scheduler are those of the local platform; the machines are told about only. Whole
clusters of thousands of nodes come and go in moments, and calls can be made to go wrong.

``python -m yellowdog_ray.local.control_plane`` serves one from a process of its own: it prints what a client
needs as one line of JSON, and ends when its standard input does, or with SIGTERM.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import secrets
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Literal, TypeVar

from yellowdog_ray.errors import ClusterStateError, SpecError
from yellowdog_ray.local.api import create_app
from yellowdog_ray.local.arguments import check_port, check_template_name
from yellowdog_ray.local.asks import RefusedError
from yellowdog_ray.local.clock import Timers, VirtualClock
from yellowdog_ray.local.control_port import ControlPort, read_fault, running, server_for
from yellowdog_ray.local.core import ControlPlane
from yellowdog_ray.local.events import StartNode
from yellowdog_ray.local.faults import number
from yellowdog_ray.local.faulty_machines import FaultyMachines
from yellowdog_ray.local.platform_faults import CALL_SECONDS, PlatformFaults
from yellowdog_ray.local.scheduler import Scheduler, SchedulerOptions, Template
from yellowdog_ray.local.server import bind_loopback
from yellowdog_ray.local.simulated import SimulatedBackend
from yellowdog_ray.local.web import Call, handler
from yellowdog_ray.local.webpage.access import web_link
from yellowdog_ray.local.webpage.front import Front

__all__ = ["DEFAULT_TEMPLATE", "LocalControlPlane"]

DEFAULT_TEMPLATE = Template(
    namespace="local",
    name="node",
    id=f"ydid:crt:000000:{uuid.uuid5(uuid.NAMESPACE_DNS, 'local/node')}",
    instance_type="local",
    vcpus=1,
    ram=1,
    region="local",
)
"""The template that a control plane has when it is not told others."""

_CLOSE_SECONDS = 10.0

T = TypeVar("T")


class LocalControlPlane:
    """A YellowDog-compatible platform on this machine whose nodes are simulated.

    Use it as a context manager, or call :meth:`start` and :meth:`close`. It listens on 127.0.0.1 and runs
    in a thread of its own. Once started, it has these attributes for tests: ``faults``, its
    :class:`~yellowdog_ray.local.platform_faults.PlatformFaults`; ``backend``, its
    :class:`~yellowdog_ray.local.simulated.SimulatedBackend`; ``core``, its
    :class:`~yellowdog_ray.local.core.ControlPlane`, and ``loop``, on which alone it may be touched
    (see :meth:`call`).

    :param options: choices where YellowDog's behaviour is not documented; None for the defaults.
    :param templates: its compute requirement templates.
    :param boot_delay: seconds from a node's start to its registration.
    :param start_delay: seconds from a task's start to its process.
    :param stop_delay: seconds that ending a node or an aborted task takes.
    :param fail_boot: says, for a node's start, why it fails; None lets it succeed.
    :param latency: seconds by which every call is delayed.
    :param key_id: the id of the application key that it accepts; None for a new one.
    :param secret: the secret of that key; None for a new one.
    :param port: the TCP port of its API; 0 for a free one.
    :param clock: ``"real"``, or ``"virtual"``: time then passes only by :meth:`advance`, for all that the
        platform and its machines do later. Calls are answered and tasks given out without it. What is
        done to requests (``latency``, and the seconds of a :class:`~yellowdog_ray.local.faults.Fault` that
        hangs or comes late) goes by the machine's clock as ever.
    :raises SpecError: when there is no such clock, or a number or a template's name cannot be.
    """

    core: ControlPlane
    backend: SimulatedBackend
    faults: PlatformFaults
    loop: asyncio.AbstractEventLoop

    def __init__(
        self,
        options: SchedulerOptions | None = None,
        templates: Sequence[Template] = (DEFAULT_TEMPLATE,),
        *,
        boot_delay: float = 0.02,
        start_delay: float = 0.01,
        stop_delay: float = 0.01,
        fail_boot: Callable[[StartNode], str | None] | None = None,
        latency: float = 0.0,
        key_id: str | None = None,
        secret: str | None = None,
        port: int = 0,
        clock: Literal["real", "virtual"] = "real",
    ) -> None:
        if clock not in ("real", "virtual"):
            raise SpecError(f"a clock is real or virtual, not {clock!r}")
        delays = {"boot_delay": boot_delay, "start_delay": start_delay, "stop_delay": stop_delay}
        for name, value in {**delays, "latency": latency}.items():
            number(name, value)
        for template in templates:
            check_template_name(f"{template.namespace}/{template.name}")
        self._virtual = clock == "virtual"
        self._clock: VirtualClock | None = None
        self.key_id = key_id or str(uuid.uuid4())
        self.secret = secret or secrets.token_urlsafe(32)
        self._scheduler = Scheduler(options)
        for template in templates:
            self._scheduler.add_template(template)
        self._templates = list(templates)
        self._delays = (boot_delay, start_delay, stop_delay)
        self._fail_boot = fail_boot
        self._latency = latency
        self._port = check_port(port, 0)
        self._thread: threading.Thread | None = None

    @property
    def url(self) -> str:
        """The base URL of the API."""
        self._require_core()
        return f"http://127.0.0.1:{self._port}"

    @property
    def namespace(self) -> str:
        """A namespace to use; the platform accepts any valid one."""
        return "local"

    @property
    def template_names(self) -> list[str]:
        """The compute requirement templates, as ``namespace/name``, the default one first."""
        return [f"{template.namespace}/{template.name}" for template in self._templates]

    @property
    def web_url(self) -> str:
        """A link to the platform's web page, for a browser: it works once, and within ten minutes."""
        return web_link(self.url, self.secret)

    @property
    def control_url(self) -> str:
        """The base URL of the control port (see :mod:`yellowdog_ray.local.control_port`)."""
        return self._require_control().url

    @property
    def control_token(self) -> str:
        """The token that the control port wants to be shown."""
        return self._require_control().token

    def _require_control(self) -> ControlPort:
        self._require_core()
        return self._control

    def start(self) -> LocalControlPlane:
        """Start it; it answers when this returns.

        :raises LocalPlatformError: when the port is taken.
        """
        if self._thread is not None:
            raise ClusterStateError("a control plane can be started only once")
        listener = bind_loopback(self._port)
        # From here on a client's connection waits in the queue until the thread has come up.
        listener.listen(1024)
        self._port = listener.getsockname()[1]
        control_listener = bind_loopback(None)
        control_listener.listen(128)
        self.loop = asyncio.new_event_loop()
        timers: Timers = self.loop
        now = time.time
        if self._virtual:
            self._clock = timers = VirtualClock(self.loop, time.time())
            now = timers.time
        self.core = ControlPlane(self._scheduler, self.loop, self.key_id, self.secret, now, timers)
        machines = FaultyMachines(self.core, self.core.on_event)
        boot_delay, start_delay, stop_delay = self._delays
        self.backend = SimulatedBackend(
            timers,
            machines.on_event,
            boot_delay=boot_delay,
            start_delay=start_delay,
            stop_delay=stop_delay,
            fail_boot=self._fail_boot,
        )
        machines.machines = self.backend
        self.core.backend = machines
        app = create_app(self.core)
        app.add_route("/_books", handler(self.core, self._books), methods=["GET"])
        app.add_route("/_faults", handler(self.core, self._install), methods=["POST"])
        app.add_route("/_faults", handler(self.core, self._clear), methods=["DELETE"])
        self.faults = PlatformFaults(app, self.core, machines)
        self.faults.latency = self._latency
        self._control = ControlPort(control_listener)
        self._control.prepare(self.core, self.faults, self._advance if self._virtual else None)
        self._server = server_for(Front(self.faults, self.core, self.secret))
        self._thread = threading.Thread(
            target=self._run, args=(listener, control_listener), name="raydog-control-plane", daemon=True
        )
        self._thread.start()
        return self

    def _run(self, listener: socket.socket, control_listener: socket.socket) -> None:
        asyncio.set_event_loop(self.loop)
        with listener, control_listener:
            try:
                self.loop.run_until_complete(self._serve(listener))
                self.loop.run_until_complete(self.loop.shutdown_asyncgens())
            finally:
                # However it ended: nobody may wait for it any more.
                self.core.close()
                self.loop.close()

    async def _serve(self, listener: socket.socket) -> None:
        await asyncio.gather(self._server.serve([listener]), self._control.serve())

    def close(self) -> None:
        """End it; a second call does nothing."""
        if self._thread is None or not self._thread.is_alive():
            return

        def begin() -> None:
            self.core.close()
            self.backend.close()
            self._server.should_exit = True
            self._control.stop()

        with contextlib.suppress(RuntimeError):  # it has ended by itself meanwhile
            self.loop.call_soon_threadsafe(begin)
        if threading.current_thread() is not self._thread:
            self._thread.join(_CLOSE_SECONDS)

    def __enter__(self) -> LocalControlPlane:
        if self._thread is None:
            self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def call(self, function: Callable[..., T], *args: Any) -> T:
        """Call something on the platform's loop, and return what it returns.

        :raises ClusterStateError: when the platform is not running, closes meanwhile, or has been busy for
            30 s.
        """
        return self._require_core().call(function, *args, patience=CALL_SECONDS)

    def _require_core(self) -> ControlPlane:
        if self._thread is None:
            raise ClusterStateError("this control plane has not been started")
        return self.core

    def advance(self, seconds: float) -> float:
        """Move a virtual clock on; all that becomes due has been done when this returns, in order.

        :param seconds: by how much, 0 or more.
        :returns: what the clock then shows, in seconds since 1970.
        :raises ClusterStateError: when the clock is not virtual or is being moved by the caller's caller, or
            the platform is not running or closes meanwhile.
        :raises SpecError: when it is no number, time would go backwards, or the year 9000 would be reached.
        """
        # However much it is that happens in that time.
        return self._require_core().call(self._advance, seconds)

    def _advance(self, seconds: float) -> float:
        if self._clock is None:
            raise ClusterStateError("this control plane's clock runs by itself: make it with clock='virtual'")
        return self._clock.advance(seconds)

    def running(self) -> list[str]:
        """List what has not ended: ``work``, ``pool`` and ``compute``, each with ``namespace/name``.

        A compute requirement has ended when its last machine has; a worker pool, when it is shut down.
        """
        return self.call(running, self._scheduler)

    # What another process may ask with the application key; the control port has more. YellowDog has neither.

    async def _books(self, call: Call) -> Any:
        return {
            "running": running(self._scheduler),
            "seen": self.faults.requests,
            "hits": [fault.hits for fault in self.faults.faults],
        }

    async def _install(self, call: Call) -> Any:
        try:
            wishes = await call.body()
            if not isinstance(wishes, list):
                raise SpecError(f"it is {wishes!r}")
            faults = [read_fault(wish) for wish in wishes]
        except SpecError as problem:
            raise RefusedError.invalid(f"The body must be a list of faults: {problem}") from None
        self.faults.faults = [*self.faults.faults, *faults]

    async def _clear(self, call: Call) -> Any:
        self.faults.clear()


def main(argv: Sequence[str] | None = None) -> int:
    """Serve a control plane until standard input ends."""
    parser = argparse.ArgumentParser(
        prog="python -m yellowdog_ray.local.control_plane",
        description="Serve the local platform with simulated nodes. Prints what a client needs as one line "
        "of JSON; ends when standard input does, or with SIGTERM.",
    )
    for name, default, text in (
        ("boot-delay", 0.02, "from a node's start to its registration"),
        ("start-delay", 0.01, "from a task's start to its process"),
        ("stop-delay", 0.01, "that ending a node or an aborted task takes"),
        ("latency", 0.0, "by which every call is delayed"),
    ):
        parser.add_argument(
            f"--{name}", type=float, default=default, metavar="S", help=f"seconds {text} (%(default)s)"
        )
    parser.add_argument(
        "--clock",
        choices=("real", "virtual"),
        default="real",
        help="what time goes by: virtual stands still but for the control port's /clock (%(default)s)",
    )
    parser.add_argument("--key-id", help="the id of the application key that it accepts (a new one)")
    parser.add_argument("--secret", help="the secret of that key (a new one)")
    try:
        control_plane = LocalControlPlane(**vars(parser.parse_args(argv)))
    except SpecError as problem:
        parser.error(str(problem))
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))
    with control_plane as platform:
        about = {
            "url": platform.url,
            "key_id": platform.key_id,
            "secret": platform.secret,
            "namespace": platform.namespace,
            "template": platform.template_names[0],
            "control_url": platform.control_url,
            "control_token": platform.control_token,
            "web_url": platform.web_url,
        }
        print(json.dumps(about), flush=True)
        try:
            while os.read(sys.stdin.fileno(), 1 << 16):
                pass
        except KeyboardInterrupt:
            pass
    return 0


if __name__ == "__main__":
    sys.exit(main())
