"""YellowDog's REST API over the scheduler, as the unmodified SDK and ``yellowdog-cli`` call it.

Every handler runs on the server's one asyncio loop, together with the scheduler: there are no locks. A
route or a field that is not supported is refused by its name. To close the server, set the core's
``closing`` event first (``ControlPlane.close`` does): the update streams then end, and nothing keeps the
server from ending too.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.routing import Route

from yellowdog_ray.local import api_compute, api_pools, api_work, wire
from yellowdog_ray.local.asks import RefusedError
from yellowdog_ray.local.fields import Fields, check_name
from yellowdog_ray.local.sorting import Values
from yellowdog_ray.local.web import Action, Call, Core, Gate, handler, on_http_exception

__all__ = ["Core", "create_app"]

_ACCOUNT = "ydid:account:000000:00000000-0000-0000-0000-000000000000"
_APPLICATION = "ydid:app:000000:00000000-0000-0000-0000-000000000001"
_GROUP = "ydid:group:000000:00000000-0000-0000-0000-000000000002"
_ROLE = "ydid:role:00000000-0000-0000-0000-000000000003"


def create_app(core: Core) -> Starlette:
    """Return the HTTP application.

    :param core: the platform behind it; all of it is called on the loop that serves the application.
    """
    routes = [
        Route(
            path,
            handler(core, action, None if method == "GET" else _PARAMETERS.get((method, path), frozenset())),
            methods=[method],
        )
        for table in (api_work.ROUTES, api_pools.ROUTES, api_compute.ROUTES, _ROUTES)
        for (method, path), action in table.items()
    ]
    app = Starlette(
        routes=routes,
        middleware=[Middleware(Gate, core=core)],
        exception_handlers={HTTPException: on_http_exception, Exception: on_http_exception},
    )
    app.router.redirect_slashes = False
    return app


# What may stand in the query of a call that changes something.
_PARAMETERS = {
    ("PUT", "/work/requirements/{id}/transition/{status}"): frozenset({"abort"}),
    ("PUT", "/work/tasks/{id}/cancel"): frozenset({"abort"}),
    ("PUT", "/workerPools/provisioned/{id}"): frozenset({"size"}),
    ("PUT", "/compute/requirements"): frozenset({"reprovision"}),
}


# -------------------------------------------------------------------- identity, and empty cupboards


async def _root(call: Call) -> Any:
    return {"name": "RayDog local platform", "version": wire.AGENT_VERSION}


async def _application(call: Call) -> Any:
    return {
        "accountId": _ACCOUNT,
        "accountName": "local",
        "id": _APPLICATION,
        "name": "raydog-local",
        "allNamespacesReadable": True,
        "readableNamespaces": call.scheduler.known_namespaces(),
        "features": ["PLATFORM"],
    }


async def _application_groups(call: Call) -> Any:
    return {"items": [{"id": _GROUP, "name": "administrators", "adminGroup": True}]}


async def _group(call: Call) -> Any:
    if call.path("id") != _GROUP:
        raise RefusedError.not_found(f"no group {call.path('id')!r}")
    role = {"role": {"id": _ROLE, "name": "administrator"}, "scope": {"global": True}}
    return {"id": _GROUP, "name": "administrators", "adminGroup": True, "roles": [role]}


def _namespace_id(name: str) -> str:
    return f"ydid:namespace:000000:{uuid.uuid5(uuid.NAMESPACE_DNS, name)}"


def _namespace_json(name: str, used: set[str]) -> dict[str, Any]:
    return {"id": _namespace_id(name), "namespace": name, "deletable": name not in used}


async def _namespaces(call: Call) -> Any:
    names, part = call.queries("namespaces", "namespace"), call.query("namespaceContains") or ""
    deletable, used = call.flag("deletable"), call.scheduler.used_namespaces()

    def write(name: str) -> dict[str, Any]:
        return _namespace_json(name, used)

    def wanted(name: str) -> bool:
        return (
            (not names or name in names)
            and part in name
            and (deletable is None or (name not in used) == deletable)
        )

    sortable: Values = {"id": _namespace_id, "namespace": str, "deletable": lambda name: name not in used}
    return call.slice(call.scheduler.known_namespaces(), wanted, write, sortable)


def _find_namespace(call: Call) -> dict[str, Any]:
    for name in call.scheduler.known_namespaces():
        if _namespace_id(name) == call.path("id"):
            return _namespace_json(name, call.scheduler.used_namespaces())
    raise RefusedError.not_found(f"no namespace {call.path('id')!r}")


async def _namespace(call: Call) -> Any:
    return _find_namespace(call)


async def _create_namespace(call: Call) -> Any:
    fields = Fields(await call.body(), "request")
    name = check_name("namespace", fields.need("namespace"))
    fields.done()
    if name in call.scheduler.namespaces:
        raise RefusedError.invalid(f"Namespace {name} already exists")
    call.scheduler.namespaces.add(name)
    call.core.changed()
    # The SDK takes this answer as text.
    return _namespace_id(name)


async def _delete_namespace(call: Call) -> Any:
    found = _find_namespace(call)
    if not found["deletable"]:
        raise RefusedError.invalid(f"Namespace {found['namespace']} is in use")
    call.scheduler.namespaces.discard(found["namespace"])
    call.core.changed()


async def _nothing(call: Call) -> Any:
    call.take_any()
    return {"items": []}


async def _no_keyrings(call: Call) -> Any:
    call.take_any()
    return call.slice([], bool, dict, dict.fromkeys(("id", "name", "description"), str), bare=True)


_ROUTES: Mapping[tuple[str, str], Action] = {
    ("GET", "/"): _root,
    ("GET", "/application"): _application,
    ("GET", "/account/applications/{id}/groups"): _application_groups,
    ("GET", "/account/groups/{id}"): _group,
    ("GET", "/namespaces"): _namespaces,
    ("POST", "/namespaces"): _create_namespace,
    ("GET", "/namespaces/policies"): _nothing,
    ("GET", "/namespaces/{id}"): _namespace,
    ("DELETE", "/namespaces/{id}"): _delete_namespace,
    ("GET", "/keyrings"): _no_keyrings,
    ("GET", "/allowances"): _nothing,
    ("GET", "/images/families"): _nothing,
}
