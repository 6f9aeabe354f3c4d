"""Ray's token authentication in this process, so that a script's ``ray.init("ray://...")`` just works.

Ray reads ``RAY_AUTH_MODE`` and ``RAY_AUTH_TOKEN`` when it is imported, and keeps what it read. Where it has
been imported already, it is told to read them again, by the means that it has for that.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from yellowdog_ray.errors import ClusterStateError

__all__ = ["activate", "deactivate", "is_connected", "session"]

log = logging.getLogger(__name__)

_VARIABLES = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN")
_lock = threading.Lock()
# What the variables were before the first cluster set them, and the tokens of the clusters that are alive,
# in the order in which they were built.
_before: dict[str, str | None] = {}
_tokens: list[str] = []
# The tokens that were taken back while there is a session; None where there is no session.
_taken_back: list[str] | None = None


def activate(token: str) -> bool:
    """Make this process, and what it starts, use a cluster's token.

    While Ray is connected to something, nothing is changed: Ray has one token in a process, and the
    session would lose its own.

    :returns: whether the token is now in use.
    """
    with _lock:
        if _taken_back is not None or is_connected():
            log.warning(
                "Ray is connected in this process and keeps using its token; before connecting to the new "
                "cluster, call ray.shutdown() and then the cluster's use_ray_auth()"
            )
            return False
        _activate(token)
        return True


def deactivate(token: str) -> None:
    """Take a cluster's token back, unless somebody else has changed it since.

    The token of the cluster that was built last and still lives comes back into use, and when there is
    none, what was there before the first. While there is a :func:`session`, this is put off until its end.
    """
    with _lock:
        if _taken_back is None:
            _deactivate(token)
        else:
            _taken_back.append(token)


@contextmanager
def session(token: str | None) -> Iterator[None]:
    """Let Ray in this process use one cluster's token and no other one, as long as the block lasts.

    Ray sends the token that it has to whatever it connects to, and again when it has lost that connection.
    So it has none for the whole of a session on a cluster without one.

    :param token: the cluster's token, which stays in use after the block; None where it has none, and then
        what was there before comes back.
    :raises ClusterStateError: where Ray is connected in this process, or there is a session already.
    """
    global _taken_back  # noqa: PLW0603
    with _lock:
        if _taken_back is not None or is_connected():
            raise ClusterStateError("Ray is connected in this process: call ray.shutdown() before")
        before = {name: os.environ.get(name) for name in _VARIABLES}
        if token is None:
            # Without any mode, Ray would send the token of the user's own file for it, if there is one.
            _set({"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN": None})
        else:
            _activate(token)
        _taken_back = []
    try:
        yield
    finally:
        with _lock:
            ended, _taken_back = _taken_back, None
            left = os.environ.get("RAY_AUTH_MODE"), os.environ.get("RAY_AUTH_TOKEN")
            if token is None and left == ("disabled", None):
                _set(before)
            for one in ended:
                _deactivate(one)


def _activate(token: str) -> None:
    if not _tokens:
        _before.update({name: os.environ.get(name) for name in _VARIABLES})
    if token in _tokens:
        _tokens.remove(token)
    _tokens.append(token)
    _use(token)


def _deactivate(token: str) -> None:
    if token not in _tokens:
        return
    _tokens.remove(token)
    if os.environ.get("RAY_AUTH_TOKEN") == token:
        if _tokens:
            _use(_tokens[-1])
        else:
            _set(_before)
    if not _tokens:
        _before.clear()


def _use(token: str) -> None:
    _set({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token})


def _set(variables: Mapping[str, str | None]) -> None:
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    _refresh_ray()


def is_connected() -> bool:
    """Tell whether Ray is connected in this process, from its own flags.

    ``ray.is_initialized()`` would not do: in a Ray Client session it asks the server, without any time
    limit, so that a head that has died blocks it for a minute.
    """
    worker = getattr(sys.modules.get("ray._private.worker"), "global_worker", None)
    if getattr(worker, "connected", False):
        return True
    client = getattr(sys.modules.get("ray.util.client"), "ray", None)
    client_is_connected = getattr(client, "is_connected", None)
    return bool(client_is_connected()) if client_is_connected is not None else False


def _refresh_ray() -> None:
    """Let a Ray that has been imported read the variables again.

    Measured with Ray 2.60: without this it keeps the mode that it found at import (so that a token set
    later is not sent) and the first token that it used.
    """
    raylet = sys.modules.get("ray._raylet")
    if raylet is None or is_connected():
        return
    try:
        # The mode first: a token that is looked for while the mode is on has to be there.
        raylet.Config.initialize("")
        raylet.AuthenticationTokenLoader.instance().reset_cache()
    except Exception as error:
        log.warning(
            "this version of Ray cannot be told its token after it was imported (%s: %s); build before "
            "importing ray",
            type(error).__name__,
            error,
        )
