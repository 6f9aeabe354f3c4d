"""The web page as an HTTP application: who is let in, and how pages become HTML.

All is read-only and served to GET alone. Whoever comes without a session learns nothing but that there is a
local platform.
"""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from importlib import resources

import jinja2
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from yellowdog_ray.local.core import ControlPlane
from yellowdog_ray.local.webpage.access import WEB_PATH, Access
from yellowdog_ray.local.webpage.parts import Ask, Page
from yellowdog_ray.local.webpage.views import SECTIONS, Views

__all__ = ["create_page"]

_HEADERS: Mapping[str, str] = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Cache-Control": "no-store",
}
_STATIC = {
    "page.css": "text/css; charset=utf-8",
    "page.js": "text/javascript; charset=utf-8",
    "lead.js": "text/javascript; charset=utf-8",
    "icon.svg": "image/svg+xml",
}
# The names by which a browser of this machine, or of one that forwards a port, comes here. Another name that
# leads here is one that somebody else has made lead here (DNS rebinding).
_HOSTS = ("127.0.0.1", "localhost")
_MAX_PAGE = 1_000_000
_MAX_QUERY = 200

_Answer = Callable[[Request], Response]


class _RefusedError(Exception):
    """A request that is not answered.

    :param message: why, for whoever sits before the browser.
    """

    def __init__(self, status: int, title: str, *message: str) -> None:
        super().__init__(title)
        self.status, self.title, self.message = status, title, message


def create_page(
    core: ControlPlane, access: Access, read_output: Callable[[str, str], bytes | None] | None
) -> Starlette:
    """Return the application; see :class:`~yellowdog_ray.local.webpage.front.Front`."""
    door = _Door(core, access, Views(core, access.path, read_output))
    routes = [Route("/", door.endpoint(door.lead)), Route(f"{WEB_PATH}/open", door.endpoint(door.open))]
    routes += [Route(f"{WEB_PATH}/{name}", door.endpoint(partial(door.static, name))) for name in _STATIC]
    for path, view in door.views.by_path.items():
        routes.append(Route(f"{access.path}/{path}", door.endpoint(partial(door.show, view))))
    refuse = door.endpoint(door.missing)

    async def on_http_exception(request: Request, error: Exception) -> Response:
        return await refuse(request)

    app = Starlette(routes=routes, exception_handlers={HTTPException: on_http_exception})
    app.router.redirect_slashes = False
    return app


class _Door:
    """Answers requests, after a look at where they come from."""

    def __init__(self, core: ControlPlane, access: Access, views: Views) -> None:
        self._core, self._access = core, access
        self.views = views
        # A revision says nothing beyond this process.
        self._life = secrets.token_hex(4)
        environment = jinja2.Environment(
            loader=jinja2.PackageLoader(__package__, "templates"),
            autoescape=True,
            trim_blocks=True,
            lstrip_blocks=True,
            undefined=jinja2.StrictUndefined,
        )
        self._page = environment.get_template("page.html")
        self._note = environment.get_template("note.html")

    def endpoint(self, answer: _Answer) -> Callable[[Request], Awaitable[Response]]:
        """Return an endpoint for something that answers requests."""

        async def endpoint(request: Request) -> Response:
            try:
                _check_origin(request)
                response = answer(request)
            except _RefusedError as refusal:
                response = self._tell(refusal.status, refusal.title, refusal.message)
            for name, value in _HEADERS.items():
                response.headers.setdefault(name, value)
            return response

        return endpoint

    def _tell(self, status: int, title: str, message: tuple[str, ...], **more: str) -> Response:
        settings = {"forward": "", "script": "", **more}
        html = self._note.render(root=WEB_PATH, title=title, message=message, **settings)
        return Response(html, status, media_type="text/html")

    def open(self, request: Request) -> Response:
        """Take a ticket in, and give a session out."""
        session = self._access.use(request.query_params.get("ticket", ""))
        if session is None:
            raise _RefusedError(
                401,
                "This link is used up",
                "A link to the page of a local platform works once, and for ten minutes.",
                _NEW_LINK,
            )
        # Not by a redirection: after a click in another page, the browser would not send the cookie that it
        # has just been given. This page leads on by itself, and leaves no trace in the browser's history.
        response = self._tell(200, "Opening the page", (), forward=f"{self._access.path}/")
        response.set_cookie(
            self._access.cookie, session, path=self._access.path, httponly=True, samesite="strict"
        )
        return response

    def lead(self, request: Request) -> Response:
        """Lead on from the API's address: by a script, which alone knows what is after the # and where to."""
        message = ("This is the address of a local platform's API.", _LINK_FOR, _NEW_LINK, _ONWARDS)
        return self._tell(200, "A local platform", message, script="lead.js")

    def static(self, name: str, request: Request) -> Response:
        """Give out the style, the script or the icon, which hold nothing of anybody's."""
        content = resources.files(__package__).joinpath("static").joinpath(name).read_bytes()
        return Response(content, media_type=_STATIC[name])

    def missing(self, request: Request) -> Response:
        """Refuse what there is not; to whoever may not know, that is all that is said."""
        if request.method not in ("GET", "HEAD"):
            raise _RefusedError(405, "The page can only be read", "Use YellowDog's API to change something.")
        if not self._knows(request):
            raise _NoSessionError
        raise _RefusedError(404, "There is no such page", "Go back, or begin with the overview.")

    def show(self, view: Callable[[Ask], Page | None], request: Request) -> Response:
        """Show a page to whoever has a session."""
        if not self._knows(request):
            raise _NoSessionError
        known = request.headers.get("if-none-match")
        if known == self._tag(""):
            return Response(status_code=304, headers={"ETag": known})
        query = request.query_params
        number = query.get("page", "1")
        page = view(
            Ask(
                id=request.path_params.get("id", ""),
                page=min(max(1, int(number)), _MAX_PAGE) if number.isascii() and number.isdigit() else 1,
                find=query.get("find", "").strip()[:_MAX_QUERY],
                status=query.get("status", "")[:_MAX_QUERY],
            )
        )
        if page is None:
            raise _RefusedError(
                404,
                "It is not there",
                "The platform knows nothing of this id. What ended long ago is forgotten when the platform "
                "is started again; without a history, everything is.",
            )
        tag = self._tag(page.version)
        if known == tag:
            return Response(status_code=304, headers={"ETag": tag})
        html = self._page.render(page=page, sections=SECTIONS, root=WEB_PATH, base=self._access.path)
        return Response(html, media_type="text/html", headers={"ETag": tag})

    def _tag(self, version: str) -> str:
        return f'"{self._life}-{self._core.scheduler.revision}-{version}"'

    def _knows(self, request: Request) -> bool:
        return self._access.knows(request.cookies.get(self._access.cookie, ""))


_LINK_FOR = "The page is for who has the platform's application key, and for a link that was made with it."
_ONWARDS = "Once this browser has used one, this page leads to what is meant."
_NEW_LINK = "Get a new one from `raydog local status`, or in Python from `platform.web_url`."


class _NoSessionError(_RefusedError):
    """A request by nobody who is known, or after a click in another site's page, which tells no cookie."""

    def __init__(self) -> None:
        super().__init__(
            401,
            "A link is needed",
            _LINK_FOR,
            _NEW_LINK,
            "Where this browser has used a link already, opening the page once more from here will do.",
        )


def _check_origin(request: Request) -> None:
    """Refuse what another site's page makes a browser do, and names that lead here only for now."""
    host = request.headers.get("host", "").rpartition(":")[0] or request.headers.get("host", "")
    if host not in _HOSTS:
        raise _RefusedError(
            403, "This is another host's name", "Open the page at 127.0.0.1 or localhost, with the same port."
        )
    site = request.headers.get("sec-fetch-site", "none")
    mode = request.headers.get("sec-fetch-mode"), request.headers.get("sec-fetch-dest")
    if site not in ("none", "same-origin") and mode != ("navigate", "document"):
        raise _RefusedError(403, "Refused", "Another site's page may lead here, and do nothing else.")
