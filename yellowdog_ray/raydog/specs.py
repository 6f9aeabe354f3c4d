"""What a user may ask for: value objects that refuse, before any call, what cannot work.

The limits are the platform's own: names of at most 60 characters that begin with a letter, tags of at
most 200, 10,000 nodes a pool and 1,000 task groups a work requirement (YellowDog SDK 15.9.1 and the
documentation of its command line client).
"""

from __future__ import annotations

import hashlib
import ipaddress
import os
import re
import threading
from collections.abc import Iterable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    Strict,
    StrictBool,
    StrictInt,
    StrictStr,
    ValidationError,
    model_validator,
)

from yellowdog_ray.errors import SpecError

__all__ = [
    "CREDENTIAL_PARAMETERS",
    "DEFAULT_API_URL",
    "MAX_NAME",
    "MAX_NODES",
    "MAX_TASK_GROUPS",
    "OBSERVABILITY_SUFFIX",
    "ClusterSpec",
    "Credentials",
    "NodeSpec",
    "RayAuth",
    "WorkerPoolSpec",
    "check_api_url",
    "check_count",
    "check_duration",
    "check_path",
    "check_seconds",
    "key_hint",
    "make",
]

DEFAULT_API_URL = "https://api.yellowdog.ai"
MAX_NAME = 60
MAX_TAG = 200
MAX_NODES = 10_000
MAX_TASK_GROUPS = 1000

HEAD_SUFFIX = "-00-head"
OBSERVABILITY_SUFFIX = "-observability"
FIRST_WORKER_SUFFIX = "-01-wrkrs"

_NAME = re.compile(r"[a-z][a-z0-9_-]*[a-z0-9]")
_TEMPLATE_ID = re.compile(r"ydid:crt:[0-9a-zA-Z:-]+")
_NAME_RULE = (
    "lower-case letters, digits, '-' and '_', beginning with a letter and ending with a letter or digit"
)

RayAuth = Literal["token", "off"]
"""Whether Ray's own token authentication protects the cluster."""


def _name(value: str) -> str:
    if not _NAME.fullmatch(value):
        raise ValueError(f"{value!r} is not a YellowDog name: {_NAME_RULE}")
    if len(value) > MAX_NAME:
        raise ValueError(f"{value!r} has {len(value)} characters, and YellowDog allows {MAX_NAME}")
    return value


def _tag(value: str) -> str:
    if not value.strip() or not value.isprintable():
        raise ValueError("a tag has to consist of printable characters, and not of spaces alone")
    if len(value) > MAX_TAG:
        raise ValueError(f"the tag has {len(value)} characters, and YellowDog allows {MAX_TAG}")
    return value


def _template(value: str) -> str:
    if value.startswith("ydid:"):
        if not _TEMPLATE_ID.fullmatch(value):
            raise ValueError(f"{value!r} is not the YDID of a compute requirement template (ydid:crt:...)")
        return value
    namespace, slash, name = value.partition("/")
    if not slash or not _NAME.fullmatch(namespace) or not _NAME.fullmatch(name):
        raise ValueError(f"{value!r} is neither a template's YDID (ydid:crt:...) nor 'namespace/name'")
    return value


def _script(value: str) -> str:
    if not value.strip():
        raise ValueError("the script is empty; leave the argument out (None) to get the default script")
    if "\0" in value:
        raise ValueError("the script contains a NUL character, which Bash cannot read")
    return value


def _instance_tags(tags: dict[str, str]) -> dict[str, str]:
    for name in tags:
        if not name.strip():
            raise ValueError("an instance tag has an empty name")
        if name != name.lower():
            raise ValueError(f"the instance tag name {name!r} has to be in lower case: {name.lower()!r}")
    return tags


def _positive(value: timedelta) -> timedelta:
    if value <= timedelta(0):
        raise ValueError(f"{value} is not longer than zero")
    return value


def _api_url(value: str) -> str:
    parts = urlsplit(value)
    try:
        host, _port = parts.hostname, parts.port
    except ValueError as error:
        raise ValueError(f"the API URL cannot be read: {error}") from None
    if parts.scheme not in {"http", "https"} or not host:
        raise ValueError(f"the API URL has to begin with https:// and name a host, as {DEFAULT_API_URL} does")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise ValueError("the API URL may hold neither credentials nor a query")
    if parts.scheme == "http" and not _is_loopback(host):
        raise ValueError(f"plain http would send the application key unprotected to {host}; use https")
    return value.rstrip("/")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _filled(value: str) -> str:
    if not value.strip():
        raise ValueError("it is empty")
    return value


def _key(value: str) -> str:
    _filled(value)
    # It travels in an HTTP header; what cannot would end up in an error message.
    if not re.fullmatch(r"[!-~]+", value):
        raise ValueError("it holds a space, a line break or another character that no application key has")
    return value


def _key_secret(value: SecretStr) -> SecretStr:
    _key(value.get_secret_value())
    return value


def _none_if_empty(value: Any) -> Any:
    return None if value == "" else value


Name = Annotated[StrictStr, AfterValidator(_name)]
Tag = Annotated[StrictStr, AfterValidator(_tag)]
Template = Annotated[StrictStr, AfterValidator(_template)]
Script = Annotated[StrictStr, AfterValidator(_script)]
Text = Annotated[StrictStr | None, BeforeValidator(_none_if_empty)]
InstanceTags = Annotated[dict[StrictStr, StrictStr], AfterValidator(_instance_tags)]
# A number would be taken for seconds, and nobody who writes 8 means that.
Duration = Annotated[timedelta, Strict(), AfterValidator(_positive)]
NodeCount = Annotated[StrictInt, Field(ge=1, le=MAX_NODES)]


class _Spec(BaseModel):
    """An immutable value whose errors never repeat what was passed in, which may be a secret."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)


CREDENTIAL_PARAMETERS = {
    "key_id": "yd_application_key_id",
    "key_secret": "yd_application_key_secret",
    "api_url": "yd_platform_api_url",
}
"""What the fields of :class:`Credentials` are called where users give them."""


class Credentials(_Spec):
    """A YellowDog application key, and the API that it is for.

    :param key_id: the application key's id.
    :param key_secret: its secret; never shown.
    :param api_url: the API's URL. Plain http is accepted for loopback addresses only.
    """

    key_id: Annotated[StrictStr, AfterValidator(_key)]
    key_secret: Annotated[SecretStr, AfterValidator(_key_secret)]
    api_url: Annotated[StrictStr, AfterValidator(_api_url)] = DEFAULT_API_URL

    @property
    def host(self) -> str:
        """The host, and port if there is one, that the key is sent to."""
        return urlsplit(self.api_url).netloc

    @property
    def on_this_machine(self) -> bool:
        """Whether the API is that of a local platform, as its loopback address says."""
        return _is_loopback(urlsplit(self.api_url).hostname or "")


class NodeSpec(_Spec):
    """What a node of a cluster is made from and what it runs.

    :param template: a compute requirement template: its YDID, or ``namespace/name``.
    :param script: the Bash text of the node's task; None for the default script of its role.
    :param images_id: the image; None for the template's own.
    :param userdata: cloud-init user data; None for the template's own.
    :param instance_tags: tags of the instances; the names in lower case.
    :param metrics_enabled: whether YellowDog collects metrics of the node; None for its default.
    """

    template: Template
    # What may hold a secret is not shown.
    script: Script | None = Field(default=None, repr=False)
    images_id: Text = None
    userdata: Text = Field(default=None, repr=False)
    instance_tags: InstanceTags | None = None
    metrics_enabled: StrictBool | None = None


class WorkerPoolSpec(_Spec):
    """A worker pool: so many nodes of one kind, each of them one Ray worker.

    :param node: what its nodes are.
    :param node_count: how many of them, 1 to 10,000.
    :param internal_name: the user's own name for the pool, unique in the cluster; None for a default.
    """

    node: NodeSpec
    node_count: NodeCount
    internal_name: Annotated[StrictStr, AfterValidator(_filled)] | None = None


class ClusterSpec(_Spec):
    """Everything about a cluster but its worker pools.

    :param name: the basis of all names on the platform, which have at most 60 characters.
    :param namespace: the YellowDog namespace.
    :param tag: the tag of the work requirement and the compute requirements.
    :param head: the head node.
    :param observability: the observability node, None if there is none.
    :param lifetime: after this time the platform itself ends the cluster; None for never.
    :param ray_auth: ``"token"`` or ``"off"``.
    :param direct: whether its user connects to the nodes' addresses without SSH.
    """

    name: Name
    namespace: Name
    tag: Tag | None = None
    head: NodeSpec
    observability: NodeSpec | None = None
    lifetime: Duration | None = None
    ray_auth: RayAuth = "token"
    direct: bool = False

    @model_validator(mode="after")
    def _derived_names_fit(self) -> ClusterSpec:
        suffixes = [HEAD_SUFFIX, FIRST_WORKER_SUFFIX]
        if self.observability is not None:
            suffixes.append(OBSERVABILITY_SUFFIX)
        longest = max(suffixes, key=len)
        if len(self.name) + len(longest) > MAX_NAME:
            raise ValueError(
                f"cluster_name {self.name!r} has {len(self.name)} characters; with the suffix {longest!r} "
                f"that is added to it, it may have at most {MAX_NAME - len(longest)}"
            )
        return self


_SpecT = TypeVar("_SpecT", bound=_Spec)


def make(spec: type[_SpecT], called: Mapping[str, str] = {}, /, **values: Any) -> _SpecT:
    """Make a value object, or say in the user's own words what is wrong.

    :param spec: the class.
    :param called: what the user knows the fields as: field -> parameter.
    :raises SpecError: naming every parameter that cannot work, and why. It never repeats a secret.
    """
    try:
        return spec(**values)
    except ValidationError as error:
        raise SpecError("; ".join(_sentences(error, called))) from None


def _sentences(error: ValidationError, called: Mapping[str, str]) -> Iterable[str]:
    for problem in error.errors(include_input=False, include_url=False):
        message = problem["msg"].removeprefix("Value error, ")
        place = problem["loc"]
        if not place:
            yield message
            continue
        first = str(place[0])
        where = called.get(first, first)
        # A dictionary's entry is named too: instance_tags.owner
        rest = [str(part) for part in place[1:] if part != "[key]"]
        yield f"{'.'.join([where, *rest])}: {message}"


def check_api_url(value: str) -> str:
    """Check an API URL: https, or plain http to a loopback address.

    :raises SpecError: saying what is wrong with it.
    """
    try:
        return _api_url(value)
    except ValueError as error:
        raise SpecError(f"yd_platform_api_url: {error}") from None


def check_duration(value: Any, name: str) -> timedelta | None:
    """Check a time limit that may be None.

    :raises SpecError: where it is no :class:`~datetime.timedelta`, or not longer than zero.
    """
    if value is None:
        return None
    if not isinstance(value, timedelta):
        raise SpecError(f"{name}: a datetime.timedelta is needed, not {type(value).__name__}")
    if value <= timedelta(0):
        raise SpecError(f"{name}: {value} is not longer than zero")
    return value


def check_seconds(value: Any, name: str) -> float:
    """Check a time limit that is a :class:`~datetime.timedelta` or a number of seconds.

    :returns: the seconds.
    :raises SpecError: where it is neither, not longer than zero, or longer than Python can wait.
    """
    if isinstance(value, bool) or not isinstance(value, timedelta | int | float):
        raise SpecError(f"{name}: a time in seconds or a datetime.timedelta is needed, not {value!r}")
    seconds = value.total_seconds() if isinstance(value, timedelta) else value
    if not seconds > 0:  # nor is nan
        raise SpecError(f"{name}: {value} is not longer than zero")
    if seconds > threading.TIMEOUT_MAX:
        raise SpecError(f"{name}: {value} is longer than can be waited for")
    return float(seconds)


def check_path(value: Any, name: str) -> Path:
    """Check the path of a file or directory; a ``~`` at its beginning stands for a home.

    :raises SpecError: where it is none.
    """
    try:
        text = os.fspath(value)
        if not isinstance(text, str) or not text.strip() or "\0" in text:
            raise TypeError
        return Path(text).expanduser()
    except (TypeError, RuntimeError):
        raise SpecError(f"{name}: a path is needed, not {value!r}") from None


def key_hint(credentials: Credentials) -> str:
    """Return a part of the hash of an application key's id, by which a wrong key can be told."""
    return hashlib.sha256(credentials.key_id.encode()).hexdigest()[:12]


def check_count(
    value: Any,
    name: str,
    most: int,
    least: int = 0,
    reason: str = "the number of worker nodes of this cluster",
) -> int:
    """Check a number of nodes.

    :param reason: what the highest number is.
    :raises SpecError: where it is no whole number from ``least`` to ``most``.
    """
    if not isinstance(value, int) or isinstance(value, bool):
        raise SpecError(f"{name}: a whole number is needed, not {type(value).__name__}")
    if not least <= value <= most:
        raise SpecError(f"{name}: {value} is not from {least} to {most}, {reason}")
    return value
