"""Processes of their own that do to a cluster what they are told, and can be killed at any instant."""

from __future__ import annotations

import logging
import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tests.controlplane import KEY_ID, SECRET, TEMPLATE, Served
from yellowdog_ray import errors
from yellowdog_ray.raydog import assembly, platform, teardown, transport
from yellowdog_ray.raydog.builder import RayDogCluster, RayDogClusterProxy

__all__ = ["IMPATIENT", "Child", "arguments", "eventually"]

# A process that has the SDK in it and no threads, of which all others are copies.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload([__name__, "yellowdog_client", "yellowdog_client.model", "pytest"])

#: What tests do not wait for, as (module, name, value).
IMPATIENT: tuple[tuple[Any, str, float], ...] = (
    (transport, "RETRY_SECONDS", 1.0),
    (transport, "FIRST_PAUSE", 0.02),
    (transport, "NOT_YET_SECONDS", 0.3),
    (platform, "NOT_YET_SECONDS", 0.3),
    (assembly, "SETTLE_SECONDS", 0.05),
    (teardown, "STEP_SECONDS", 5.0),
    (teardown, "VERIFY_SECONDS", 10.0),
    (teardown, "LATE_SECONDS", 1.5),
    (teardown, "_CONFIRM_SECONDS", 0.3),
)


def arguments(served: Served, name: str = "demo", **options: Any) -> dict[str, Any]:
    """Say what a cluster with a head and an observability node is made of."""
    return {
        "yd_application_key_id": KEY_ID,
        "yd_application_key_secret": SECRET,
        "cluster_name": name,
        "cluster_namespace": "test",
        "head_node_compute_requirement_template_id": "test/small",
        "yd_platform_api_url": served.url,
        "enable_observability": True,
        "observability_node_compute_requirement_template_id": TEMPLATE.id,
        **options,
    }


def eventually(what: str, condition: Callable[[], Any], seconds: float = 20.0) -> Any:
    """Wait until something is true, and return it."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, f"not within {seconds} s: {what}"
        time.sleep(0.005)
    return found


class Child:
    """A process that makes one cluster, and then calls its methods one after the other.

    :param states: its ``RAYDOG_STATE_DIR``.
    :param settings: what else than :data:`IMPATIENT` is set in it.
    """

    def __init__(self, states: Path, settings: Sequence[tuple[Any, str, Any]] = ()) -> None:
        self._pipe, its = _context.Pipe()
        changes = [(module.__name__, name, value) for module, name, value in [*IMPATIENT, *settings]]
        self._process = _context.Process(target=_obey, args=(its, str(states), changes), daemon=True)
        self._process.start()
        its.close()
        assert self._pipe.poll(30)
        assert self._pipe.recv() == "ready"

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_args: object) -> None:
        self.kill()
        self._pipe.close()

    def start(self, method: str, *args: Any, **options: Any) -> None:
        """Let it call a method of the cluster when it has done what it was told before.

        ``RayDogCluster``, ``attach`` and ``load`` make the cluster, or the proxy; ``hang`` lets a function of
        a module hang from its n-th call on, for which :meth:`hangs` waits.
        """
        self._pipe.send((method, args, options))

    def outcome(self, seconds: float = 30.0) -> Any:
        """Wait for the next method's end; return what it returned, or the error of our own that it raised."""
        assert self._pipe.poll(seconds), "the process does not answer"
        kind, value = self._pipe.recv()
        assert kind != "failed", value
        return getattr(errors, value[0])(value[1]) if kind == "raised" else value

    def result(self, seconds: float = 30.0) -> Any:
        """Return what the next method returns, or raise what it raises."""
        found = self.outcome(seconds)
        if isinstance(found, errors.RayDogError):
            raise found
        return found

    def call(self, method: str, *args: Any, **options: Any) -> Any:
        self.start(method, *args, **options)
        return self.result()

    def hangs(self, seconds: float = 20.0) -> bool:
        """Wait until it hangs where it was told to; tell whether it does."""
        while self._pipe.poll(seconds):
            if self._pipe.recv() == "hangs":
                return True
        return False

    def kill(self) -> None:
        """End it with SIGKILL."""
        self._process.kill()
        self._process.join()


def _obey(pipe: Connection, states: str, settings: list[tuple[str, str, Any]]) -> None:
    os.environ["RAYDOG_STATE_DIR"] = states
    logging.disable()
    for module, name, value in settings:
        setattr(__import__(module, fromlist=[name]), name, value)
    cluster: Any = None
    pipe.send("ready")
    while True:
        try:
            method, args, options = pipe.recv()
        except EOFError:
            return
        try:
            value = None
            if method == "RayDogCluster":
                cluster = RayDogCluster(progress=False, **options)
            elif method == "attach":
                cluster = RayDogCluster.attach(*args, progress=False, **options)
            elif method == "load":
                cluster = RayDogClusterProxy(KEY_ID, SECRET)
                cluster.load_saved_state_from_json_file(*args)
            elif method == "hang":
                _hang(pipe, *args)
            else:
                found = getattr(cluster, method)
                value = found(*args, **options) if callable(found) else found
                value = int(value) if method == "wait_for_workers" else value
            pipe.send(("returned", value))
        except errors.RayDogError as error:
            pipe.send(("raised", (type(error).__name__, str(error))))
        except Exception as error:
            pipe.send(("failed", repr(error)))


def _hang(pipe: Connection, module: str, name: str, number: int) -> None:
    there = __import__(module)
    real = getattr(there, name)
    calls: list[None] = []

    def hanging(*args: Any, **options: Any) -> Any:
        calls.append(None)
        if len(calls) >= number:
            pipe.send("hangs")
            time.sleep(3600)
        return real(*args, **options)

    setattr(there, name, hanging)
