"""Ray's token in this process, with a Ray that is none."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from yellowdog_ray.raydog import ray_auth


def _ask_the_server():
    raise AssertionError("this asks the server, which may be gone")


@pytest.fixture(autouse=True)
def no_ray(monkeypatch):
    """Nothing of a real Ray, nor of another test's clusters, is in the process."""
    for name in ("ray._private.worker", "ray.util.client", "ray._raylet"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(is_initialized=_ask_the_server))
    monkeypatch.setattr(ray_auth, "_tokens", [])
    monkeypatch.setattr(ray_auth, "_before", {})
    # Registered with monkeypatch, so that they are as before when the test is over.
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("worker", "client", "expected"),
    [(None, None, False), (False, False, False), (True, False, True), (False, True, True)],
)
def test_connected_is_told_without_a_call(monkeypatch, worker, client, expected):
    """Ray's own flags say whether it is connected, so that a head that is gone blocks nobody."""
    if worker is not None:
        module = SimpleNamespace(global_worker=SimpleNamespace(connected=worker))
        monkeypatch.setitem(sys.modules, "ray._private.worker", module)
        stub = SimpleNamespace(is_connected=lambda: client, is_initialized=_ask_the_server)
        monkeypatch.setitem(sys.modules, "ray.util.client", SimpleNamespace(ray=stub))
    assert ray_auth.activate("t0k") is not expected
    ray_auth.deactivate("t0k")


def test_a_ray_that_cannot_be_told(monkeypatch, caplog):
    """Whatever goes wrong in Ray while it is told the token, it is a warning."""

    class Raylet:
        class Config:
            @staticmethod
            def initialize(_text):
                raise RuntimeError("raylet says no")

    monkeypatch.setitem(sys.modules, "ray._raylet", Raylet)
    assert ray_auth.activate("t0k") is True
    ray_auth.deactivate("t0k")
    assert "RuntimeError: raylet says no" in caplog.text
