"""What a build will send to the platform, before anything is sent: for reading, and for comparing.

It is made by the functions that the build itself uses (:mod:`.plan`) and written by the SDK's own JSON, so
that it is what will be sent, but for what nobody knows yet and what is secret. The SDK is imported inside the
functions, so that importing this module costs nothing.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from html import escape
from typing import Any, NamedTuple

from yellowdog_ray.raydog import plan
from yellowdog_ray.raydog.plan import PoolPlan
from yellowdog_ray.raydog.specs import ClusterSpec

__all__ = ["ClusterPlan", "PlannedRequest", "preview"]

BUILD_ID = "<random build id>"
HEAD_IP = "<head's private address>"
OBSERVABILITY_IP = "<observability node's private address>"
MASK = "********"

# The names of tags and variables of which the values are not shown, such as apikey, db-passwd and MY_TOKEN_2,
# but not monkey.
_SECRET_NAME = re.compile(
    r"(token|secret|passw(or)?d|passphrase|pwd|credential"
    r"|((?<![a-z0-9])|access|api|auth|license|private|secret|ssh)key)s?\d*(?![a-z0-9])",
    re.IGNORECASE,
)


class PlannedRequest(NamedTuple):
    """A call that the build will make.

    :param method: the HTTP method.
    :param path: the path at the API's URL.
    :param body: the JSON that is sent. For a pool of several tasks it is shortened to an object: ``first``,
        the first task, which all others are like; ``count``, how many there are; ``names``, the first name
        and the last; ``calls``, how many calls they are sent in.
    """

    method: str
    path: str
    body: Any


@dataclass(frozen=True)
class ClusterPlan:
    """What a build will create, before anything is created.

    ``str()`` gives all of it for reading, scripts included; :meth:`to_json` for a program or a file.

    :param nodes: how many nodes there will be, the head and the observability node included.
    :param requests: what will be sent to create them, in the order in which a build begins with them; it
        does not wait for each before it sends the next. Not in the ``repr``, for a script may hold a secret.
    """

    cluster_name: str
    cluster_namespace: str
    nodes: int
    requests: tuple[PlannedRequest, ...] = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Give everything as values that can be written as JSON."""
        return {
            "cluster_name": self.cluster_name,
            "cluster_namespace": self.cluster_namespace,
            "nodes": self.nodes,
            "requests": [copy.deepcopy(request._asdict()) for request in self.requests],
        }

    def to_json(self, indent: int | None = 2) -> str:
        """Write everything as JSON.

        :param indent: how many spaces a level is indented by; None for one line.
        """
        return json.dumps(self.to_dict(), indent=indent, ensure_ascii=False)

    def __str__(self) -> str:
        texts: dict[str, int] = {}
        lines = [self._headline()]
        for request in self.requests:
            lines += ["", f"{request.method} {request.path}", *_listing(request.body, "  ", texts)]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        texts: dict[str, int] = {}
        parts = [
            f"<details><summary>{escape(f'{request.method} {request.path}')}</summary>"
            f"<pre>{escape(chr(10).join(_listing(request.body, '', texts)))}</pre></details>"
            for request in self.requests
        ]
        return f"<div><p>{escape(self._headline())}</p>{''.join(parts)}</div>"

    def _headline(self) -> str:
        return f"Plan of the cluster {self.cluster_namespace}/{self.cluster_name}: {self.nodes} nodes"


def preview(
    cluster: ClusterSpec,
    pools: Sequence[PoolPlan],
    build_id: str = BUILD_ID,
    *,
    token: bool,
    build_timeout: timedelta | None = None,
    secrets: Collection[str] = (),
) -> ClusterPlan:
    """Tell what a build will create. It makes no call.

    What is not known before a build is said in angle brackets, such as ``<head's private address>``. The
    value of a tag or variable whose name looks like that of a secret is masked; what a script or user data
    holds is shown, but for the ``secrets``.

    :param pools: all pools in the order of the build: the head's, the observability node's, the worker pools.
    :param build_id: what the pools will be tagged with; it is random in a build.
    :param token: whether there will be a Ray token; it is masked.
    :param build_timeout: how long the build may take; None for as long as it takes.
    :param secrets: texts that are masked wherever they occur, such as the application key's secret.
    """
    from yellowdog_client.common.json import Json

    requirement = plan.work_requirement(cluster, pools, cluster.lifetime, build_id)
    requests = [("/work/requirements", Json.dump(requirement))]
    requests += [
        ("/workerPools/provisioned/template", Json.dump(_provision(cluster, pool, build_id, build_timeout)))
        for pool in pools
    ]
    requests += [
        (f"/work/taskGroups/<id of group {pool.group}>/tasks", _tasks(cluster, pool, token, Json.dump))
        for pool in pools
    ]
    hide = _hider(secrets)
    return ClusterPlan(
        hide(cluster.name),
        hide(cluster.namespace),
        sum(pool.node_count for pool in pools),
        tuple(PlannedRequest("POST", hide(path), _masked(body, hide)) for path, body in requests),
    )


def _provision(
    cluster: ClusterSpec, pool: PoolPlan, build_id: str, build_timeout: timedelta | None
) -> dict[str, object]:
    """Make the body with which the SDK's ``provision_worker_pool`` provisions a pool."""
    idle = plan.pool_idle_timeout(build_timeout)
    usage, properties = plan.pool_request(cluster, pool, cluster.lifetime, build_id, idle)
    return {"requirementTemplateUsage": usage, "provisionedProperties": properties}


def _tasks(cluster: ClusterSpec, pool: PoolPlan, token: bool, dump: Callable[[object], object]) -> object:
    """Make the body with which a pool's tasks are added, shortened where they are several."""
    observability_ip = None if cluster.observability is None else OBSERVABILITY_IP
    variables = plan.environment(
        pool.role,
        head_ip=HEAD_IP,
        node_ip={"head": HEAD_IP, "observability": OBSERVABILITY_IP, "worker": None}[pool.role],
        observability_ip=observability_ip,
        token=MASK if token else None,
        direct=cluster.direct,
    )
    # One batch has the first task; the others are like it, and there may be thousands.
    first = next(plan.task_batches(pool, variables))[0]
    if pool.node_count == 1:
        return dump([first])
    return {
        "first": dump(first),
        "count": pool.node_count,
        "names": [plan.task_name(pool, 1), plan.task_name(pool, pool.node_count)],
        "calls": -(-pool.node_count // plan.TASK_BATCH),
    }


def _hider(secrets: Collection[str]) -> Callable[[str], str]:
    # The longest first, so that nothing is left of one that contains another.
    known = sorted(filter(None, secrets), key=len, reverse=True)
    if not known:
        return lambda text: text
    pattern = re.compile("|".join(map(re.escape, known)))
    return lambda text: pattern.sub(MASK, text)


def _masked(value: Any, hide: Callable[[str], str], named: bool = False) -> Any:
    """Mask what is secret in a JSON value.

    :param named: whether the value holds tags or variables, of which the names are the user's.
    """
    if isinstance(value, str):
        return hide(value)
    if isinstance(value, list):
        return [_masked(item, hide) for item in value]
    if isinstance(value, dict):
        return {
            hide(name): MASK
            if named and _SECRET_NAME.search(name)
            else _masked(item, hide, name in ("instanceTags", "environment"))
            for name, item in value.items()
        }
    return value


def _listing(value: Any, indent: str, texts: dict[str, int]) -> Iterator[str]:
    """Write a JSON value for reading: a line for each value, and texts of several lines as they are.

    :param texts: the texts of several lines that have been written, and their numbers; each is written once.
    """
    items = value.items() if isinstance(value, dict) else enumerate(value, 1)
    for name, item in items:
        nested = isinstance(item, dict) or (
            isinstance(item, list) and isinstance(next(iter(item), None), dict)
        )
        if nested and item:
            yield f"{indent}{name}:"
            yield from _listing(item, f"{indent}  ", texts)
        elif not isinstance(item, str):
            yield f"{indent}{name}: {json.dumps(item, ensure_ascii=False)}"
        elif "\n" not in item:
            yield f"{indent}{name}: {_visible(item)}"
        elif item in texts:
            yield f"{indent}{name}: (text {texts[item]}, see above)"
        else:
            texts[item] = len(texts) + 1
            yield f"{indent}{name}: (text {texts[item]})"
            yield from (f"{indent}  | {_visible(line)}" for line in item.split("\n"))


def _visible(line: str) -> str:
    """Write what a terminal would act upon as the escape sequence that stands for it."""
    return "".join(
        character if character.isprintable() or character == "\t" else repr(character)[1:-1]
        for character in line
    )
