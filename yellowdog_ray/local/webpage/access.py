"""Who may read the web page: links that can be used once, and the sessions that they open.

The page is for whoever has the application key, and for nobody else on the machine. A link holds a ticket
that is signed with the key's secret; the browser that shows it first gets a session in a cookie.

A browser sends a host's cookies to every port of it, and on 127.0.0.1 a port may be another user's. So the
pages are below a path that only the key's owner knows, and the cookie is for that path alone: nobody can lead
the browser there on a port of their own. The browser keeps that path, for the links of
yellowdog-cli, which lead to the API's address, in what it stores for that address and port alone.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from collections.abc import Callable

__all__ = ["LINK_SECONDS", "SESSION_SECONDS", "WEB_PATH", "Access", "web_link"]

WEB_PATH = "/web"
"""Below this path of the API's address is the page; YellowDog has nothing there."""
LINK_SECONDS = 600.0
"""For how long a link can be used that has not been."""
SESSION_SECONDS = 7 * 86400.0
"""For how long a browser may read the page then."""
_AHEAD_SECONDS = 5.0


def web_link(url: str, secret: str) -> str:
    """Return a link to the page, which works once, and within ten minutes.

    It is made without asking the platform, by whoever has the key.

    :param url: the base URL of the platform's API.
    :param secret: the secret of its application key.
    """
    return f"{url}{WEB_PATH}/open?ticket={_issue(secret, 'ticket', time.time())}"


def _issue(secret: str, purpose: str, now: float) -> str:
    """Return something new that is signed: its time, something random, and the signature."""
    stamp = f"{now:.3f}.{secrets.token_urlsafe(16)}"
    return f"{stamp}.{_sign(secret, purpose, stamp)}"


def _sign(secret: str, purpose: str, text: str) -> str:
    message = f"raydog web page, {purpose}: {text}".encode()
    return hmac.new(secret.encode(), message, hashlib.sha256).hexdigest()


class Access:
    """Checks tickets and sessions of one platform.

    :param secret: the secret of its application key.
    :param now: the time in seconds since 1970; never a virtual clock.
    """

    def __init__(self, secret: str, now: Callable[[], float] = time.time) -> None:
        self._secret, self._now = secret, now
        # A ticket from before may have been used then: that is not remembered.
        self._since = round(now(), 3)
        self._used: dict[str, float] = {}
        label = _sign(secret, "path", "")[:32]
        #: The path of all pages. It stays the same as long as the key does.
        self.path = f"{WEB_PATH}/{label}"
        #: The name of the cookie: several platforms on a host have one each.
        self.cookie = f"raydog-{label[:8]}"

    def use(self, ticket: str) -> str | None:
        """Use a ticket up, and return the session that it opens; None where it is not, or no longer, good."""
        stamp, _, signature = ticket.rpartition(".")
        issued = self._genuine("ticket", stamp, signature)
        now = self._now()
        self._used = {each: when for each, when in self._used.items() if when + LINK_SECONDS > now}
        if issued is None or issued < self._since or issued + LINK_SECONDS <= now or stamp in self._used:
            return None
        self._used[stamp] = issued
        return _issue(self._secret, "session", now)

    def knows(self, session: str) -> bool:
        """Say whether this is a session."""
        stamp, _, signature = session.rpartition(".")
        issued = self._genuine("session", stamp, signature)
        return issued is not None and issued + SESSION_SECONDS > self._now()

    def _genuine(self, purpose: str, stamp: str, signature: str) -> float | None:
        """Return when something was signed; None where it was not, or is of the future."""
        genuine = hmac.compare_digest(_sign(self._secret, purpose, stamp).encode(), signature.encode())
        if not genuine:
            return None
        issued = float(".".join(stamp.split(".")[:2]))
        return issued if issued <= self._now() + _AHEAD_SECONDS else None
