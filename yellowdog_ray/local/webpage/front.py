"""The door between the web page and the API, which share an address."""

from __future__ import annotations

from collections.abc import Callable

from starlette.types import ASGIApp, Receive, Scope, Send

from yellowdog_ray.local.core import ControlPlane
from yellowdog_ray.local.webpage.access import WEB_PATH, Access

__all__ = ["Front"]


class Front:
    """Leads requests for the web page to it, and all others to the API.

    The page is loaded when somebody asks for it. It stands outside of the faults of calls, which neither
    count what it asks for nor keep it from showing what goes wrong.

    :param api: the API.
    :param core: what the page tells of.
    :param secret: the secret of the application key.
    :param read_output: reads the end of what a task has printed that runs on an instance, by both ids; None
        where nothing runs.
    """

    def __init__(
        self,
        api: ASGIApp,
        core: ControlPlane,
        secret: str,
        read_output: Callable[[str, str], bytes | None] | None = None,
    ) -> None:
        self._api, self._core, self._read_output = api, core, read_output
        self._access = Access(secret)
        self._page: ASGIApp | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Lead a request on."""
        path = scope.get("path", "")
        if scope["type"] != "http" or not (
            path == WEB_PATH or path.startswith(f"{WEB_PATH}/") or _is_a_browser_at_the_root(scope)
        ):
            await self._api(scope, receive, send)
            return
        if self._page is None:
            from yellowdog_ray.local.webpage.app import create_page

            self._page = create_page(self._core, self._access, self._read_output)
        await self._page(scope, receive, send)


def _is_a_browser_at_the_root(scope: Scope) -> bool:
    """Tell whether somebody looks at the API's address, as the links of yellowdog-cli make them do."""
    if scope["path"] != "/" or scope["method"] != "GET":
        return False
    return any(name == b"accept" and b"text/html" in value for name, value in scope["headers"])
