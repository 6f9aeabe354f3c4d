"""Ray's token authentication in this process, so that a script's ``ray.init("ray://...")`` just works.

Ray reads ``RAY_AUTH_MODE`` and ``RAY_AUTH_TOKEN`` when it is imported, and keeps what it read. Where it has
been imported already, it is told to read them again, by the means that it has for that.
"""

from __future__ import annotations

import logging
import os
import sys
import threading

__all__ = ["activate", "deactivate", "is_connected"]

log = logging.getLogger(__name__)

_VARIABLES = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN")
_lock = threading.Lock()
# What the variables were before the first cluster set them, and the tokens of the clusters that are alive,
# in the order in which they were built.
_before: dict[str, str | None] = {}
_tokens: list[str] = []


def activate(token: str) -> bool:
    """Make this process, and what it starts, use a cluster's token.

    While Ray is connected to something, nothing is changed: Ray has one token in a process, and the
    session would lose its own.

    :returns: whether the token is now in use.
    """
    with _lock:
        if is_connected():
            log.warning(
                "Ray is connected in this process and keeps using its token; before connecting to the new "
                "cluster, call ray.shutdown() and then the cluster's use_ray_auth()"
            )
            return False
        if not _tokens:
            _before.update({name: os.environ.get(name) for name in _VARIABLES})
        if token in _tokens:
            _tokens.remove(token)
        _tokens.append(token)
        _put(token)
        return True


def deactivate(token: str) -> None:
    """Take a cluster's token back, unless somebody else has changed it since.

    The token of the cluster that was built last and still lives comes back into use, and when there is
    none, what was there before the first.
    """
    with _lock:
        if token not in _tokens:
            return
        _tokens.remove(token)
        if os.environ.get("RAY_AUTH_TOKEN") == token:
            if _tokens:
                _put(_tokens[-1])
            else:
                for name, value in _before.items():
                    if value is None:
                        os.environ.pop(name, None)
                    else:
                        os.environ[name] = value
                _refresh_ray()
        if not _tokens:
            _before.clear()


def _put(token: str) -> None:
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ["RAY_AUTH_TOKEN"] = token
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
