"""Ray's token in this process, with a Ray that is none."""

from __future__ import annotations

import os
import sys
from types import SimpleNamespace

import pytest

from yellowdog_ray.errors import ClusterStateError
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
    monkeypatch.setattr(ray_auth, "_taken_back", None)
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


def variables():
    return os.environ.get("RAY_AUTH_MODE"), os.environ.get("RAY_AUTH_TOKEN")


@pytest.mark.parametrize("of", ["nobody", "the user", "a cluster"])
def test_a_session_without_a_token(monkeypatch, of):
    """As long as it lasts no token is in use, nor can one be brought in; then all is as it was before."""
    if of == "the user":
        monkeypatch.setenv("RAY_AUTH_MODE", "token")
        monkeypatch.setenv("RAY_AUTH_TOKEN", "own")
    if of == "a cluster":
        ray_auth.activate("one")
    before = variables()
    with ray_auth.session(None):
        assert variables() == ("disabled", None)
        assert ray_auth.activate("two") is False
        ray_auth.deactivate("two")
        with pytest.raises(ClusterStateError, match="connected"), ray_auth.session("two"):
            pass
        assert variables() == ("disabled", None)
    assert variables() == before
    with pytest.raises(ZeroDivisionError), ray_auth.session(None):
        _ = 1 / 0
    assert variables() == before
    ray_auth.deactivate("one")
    assert variables() == ((None, None) if of == "a cluster" else before)


def test_what_ends_in_a_session(monkeypatch):
    """A cluster that ends meanwhile brings no other one's token into a session; that comes afterwards."""
    monkeypatch.setenv("RAY_AUTH_TOKEN", "own")
    for token in ("one", "two", "three"):
        assert ray_auth.activate(token) is True
    with ray_auth.session("two"):
        assert variables() == ("token", "two")
        ray_auth.deactivate("two")
        ray_auth.deactivate("three")
        assert variables() == ("token", "two")
    assert variables() == ("token", "one")
    with ray_auth.session(None):
        ray_auth.deactivate("one")
    assert variables() == (None, "own")


def test_what_the_user_sets_in_a_session():
    """It stays."""
    with ray_auth.session(None):
        os.environ["RAY_AUTH_TOKEN"] = "own"
    assert variables() == ("disabled", "own")
