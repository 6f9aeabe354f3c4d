"""The thread in which a local platform answers its API."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from yellowdog_ray.errors import LocalPlatformError

if TYPE_CHECKING:
    from starlette.applications import Starlette

    from yellowdog_ray.local.events import Event
    from yellowdog_ray.local.history import History
    from yellowdog_ray.local.nodes import LocalNodes
    from yellowdog_ray.local.platform_faults import PlatformFaults
    from yellowdog_ray.local.scheduler import Scheduler

__all__ = ["HISTORY", "Kept", "Server", "bind_loopback"]

HISTORY = "history.sqlite"
"""The name of the file in which a platform that stays keeps its history."""
START_TIMEOUT = 15.0


@dataclass(frozen=True)
class Kept:
    """What a platform goes on with that is not to be new each time.

    :param key_id: the id of its application key.
    :param secret: the secret of that key.
    :param directory: where its SSH keys and its history are, for this user only; it is there already.
    :param control_port: the TCP port of its control port; None for a free one.
    :param control_token: the token of its control port; None for a new one.
    """

    key_id: str
    secret: str = field(repr=False)
    directory: Path
    control_port: int | None = None
    control_token: str | None = field(default=None, repr=False)


class Server:
    """The thread of a platform: its event loop, HTTP server and control plane.

    :param listener: the socket of the API, bound.
    :param nodes: what makes the nodes.
    :param scheduler: with the platform's templates.
    :param key_id: the id of the application key.
    :param secret: the secret of that key.
    :param kept: what the platform goes on with, where it stays.
    """

    def __init__(
        self,
        listener: socket.socket,
        nodes: LocalNodes,
        scheduler: Scheduler,
        key_id: str,
        secret: str,
        kept: Kept | None,
    ) -> None:
        from yellowdog_ray.local.control_port import ControlPort

        self._listener, self._nodes, self._scheduler = listener, nodes, scheduler
        self._key_id, self._secret, self._kept = key_id, secret, kept
        control = bind_loopback(kept.control_port if kept else None)
        control.listen(128)
        self._control_listener = control
        self.control = ControlPort(control, kept.control_token if kept else None)
        # A server closes its listener itself, and only its own descriptor of it.
        self._listener_copies = [listener.dup(), control.dup()]
        self.port: int = listener.getsockname()[1]
        self.faults: PlatformFaults
        self._history: History | None = None
        self._thread = threading.Thread(target=self._run, name="raydog-local-platform", daemon=True)
        self._started = threading.Event()
        self._failure: BaseException | None = None

    @property
    def alive(self) -> bool:
        """Whether the API still answers."""
        return self._thread.is_alive()

    def start(self) -> None:
        """Start the thread and return when the API answers.

        :raises LocalPlatformError: when it does not.
        """
        if self._kept is not None:
            from yellowdog_ray.local.history import History

            # Here, and not on the loop: a long history takes its time, and is no reason to give up.
            self._history = History(self._kept.directory / HISTORY)
            self._history.load(self._scheduler)
        self._thread.start()
        if not self._started.wait(START_TIMEOUT) or self._failure:
            raise LocalPlatformError(
                f"the local platform's API did not start: {self._failure or 'no answer'}"
            )

    def stop(self) -> None:
        """End the API and the thread."""
        with contextlib.suppress(RuntimeError, AttributeError):
            self._loop.call_soon_threadsafe(self._begin_stop)
        if self._thread.ident is not None:
            self._thread.join(START_TIMEOUT)
        elif self._history is not None:
            self._history.close()
        self._control_listener.close()
        # A forked process may hold a copy of a socket: nobody is to wait for an answer there.
        for copy in self._listener_copies:
            with contextlib.suppress(OSError), copy:
                copy.shutdown(socket.SHUT_RDWR)

    def _begin_stop(self) -> None:
        self._core.close()
        self._uvicorn.should_exit = True
        # A client that keeps its connection open must not keep the platform open.
        self._uvicorn.force_exit = True
        self.control.stop()

    def _queue_event(self, event: Event) -> None:
        self._loop.call_soon(self._core.on_event, event)

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except BaseException as error:
            self._failure = error
        finally:
            self._started.set()

    async def _serve(self) -> None:
        from yellowdog_ray.local.api import create_app
        from yellowdog_ray.local.core import ControlPlane

        self._loop = asyncio.get_running_loop()
        self._core = ControlPlane(self._scheduler, self._loop, self._key_id, self._secret)
        history = self._history
        if history is None:
            await self._serve_api(create_app(self._core))
            return
        history.follow(self._scheduler, self._loop)
        self._core.saver = history.changed
        try:
            await self._serve_api(create_app(self._core))
        finally:
            history.close()

    async def _serve_api(self, app: Starlette) -> None:
        import uvicorn

        from yellowdog_ray.local.faulty_machines import FaultyMachines
        from yellowdog_ray.local.platform_faults import PlatformFaults
        from yellowdog_ray.local.webpage.front import Front

        # Events may come while effects are being carried out; each waits for its turn.
        machines = FaultyMachines(self._core, self._queue_event)
        machines.machines = self._nodes
        self._core.backend = machines
        self._nodes.serve(self._loop, machines.on_event)
        self.faults = PlatformFaults(app, self._core, machines)
        control = self.control.prepare(self._core, self.faults)
        front = Front(self.faults, self._core, self._secret, self._nodes.task_output)
        config = uvicorn.Config(front, log_config=None, access_log=False, lifespan="off", ws="none")
        self._uvicorn = uvicorn.Server(config)
        serving = asyncio.gather(self._uvicorn.serve(sockets=[self._listener]), self.control.serve())
        while not (self._uvicorn.started and control.started) and not serving.done():
            await asyncio.sleep(0.005)
        self._started.set()
        await serving


def bind_loopback(port: int | None) -> socket.socket:
    """Make the socket of an API on 127.0.0.1, at this port or, for None or 0, at a free one.

    :raises LocalPlatformError: when the port is taken.
    """
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    # Connections inherit it. asyncio would set it itself only on sockets that are explicitly of protocol
    # TCP; without it, an answer that is sent in two parts waits 40 ms for the client's acknowledgement.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    try:
        listener.bind(("127.0.0.1", port or 0))
    except OSError as error:
        listener.close()
        raise LocalPlatformError(
            f"the local platform's API cannot listen on 127.0.0.1:{port}: {error.strerror}; "
            "choose another port"
        ) from None
    return listener
