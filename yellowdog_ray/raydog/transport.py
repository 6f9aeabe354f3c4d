"""One call to YellowDog: its errors made readable, and transient faults outlived.

The SDK's own retries sleep for minutes, and repeat a POST whose connection was dropped without looking
whether it was carried out. They are switched off here, and :meth:`Transport.call` retries instead.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from email.utils import parsedate_to_datetime
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

import tenacity

from yellowdog_ray.errors import (
    CredentialsError,
    NotFoundError,
    PlatformError,
    PlatformUnreachableError,
    RayDogError,
)
from yellowdog_ray.raydog.specs import Credentials

if TYPE_CHECKING:
    import requests
    from yellowdog_client import PlatformClient

__all__ = [
    "Operation",
    "Pause",
    "Transport",
    "already_exists",
    "already_gone",
    "nobody_listens",
    "refused",
    "transient",
]

log = logging.getLogger(__name__)

_T = TypeVar("_T")

CONNECT_TIMEOUT = 10.0
READ_TIMEOUT = 30.0
# How much longer than its operation a call may take: a healthy platform answers in that time.
GRACE_SECONDS = 2.0
# How many calls may be under way at once, each with a connection of its own.
CONNECTIONS = 16
# How long one call is tried again before its last error is raised.
RETRY_SECONDS = 30.0
# How long something that has just been created may be unknown to the platform.
NOT_YET_SECONDS = 2.0
FIRST_PAUSE = 0.05
LONGEST_PAUSE = 2.0
_FIRST_RETRY = 0.1
_LONGEST_RETRY = 2.0
_TRANSIENT_STATUSES = frozenset({408, 425, 429, 500, 502, 503, 504, 507, 508, 509})


class Operation:
    """The time that a build or a teardown has, and the means to end it early.

    :param seconds: how long it may take; None for no limit.
    """

    def __init__(self, seconds: float | None = None) -> None:
        self.started = time.monotonic()
        self.deadline = None if seconds is None else self.started + seconds
        self.cancelled = threading.Event()

    @property
    def elapsed(self) -> float:
        """Seconds since it began."""
        return time.monotonic() - self.started

    @property
    def remaining(self) -> float | None:
        """Seconds that are left, never less than zero; None where there is no limit."""
        return None if self.deadline is None else max(0.0, self.deadline - time.monotonic())

    @property
    def expired(self) -> bool:
        """Whether its time is over."""
        return self.remaining == 0.0

    def cancel(self) -> None:
        """Let no call be tried again, and wake those that are waiting to."""
        self.cancelled.set()


class Pause:
    """Adaptive waiting: 0.05 s at first, then a fortieth of the time waited so far, 2 s at most.

    So a wait of any length is overshot by a fortieth at most, and a long one costs few calls.
    """

    def __init__(self, operation: Operation) -> None:
        self._operation = operation
        self._started = time.monotonic()

    def sleep(self) -> None:
        """Wait for the next look, but not past the operation's end."""
        seconds = min(LONGEST_PAUSE, max(FIRST_PAUSE, (time.monotonic() - self._started) / 40))
        remaining = self._operation.remaining
        time.sleep(seconds if remaining is None else min(seconds, remaining))


class Transport:
    """The SDK's client, made when it is first needed, and calls through it."""

    def __init__(self, credentials: Credentials, on_retry: Callable[[str, str], None] | None = None) -> None:
        self.credentials = credentials
        self._on_retry = on_retry
        self._client: PlatformClient | None = None
        self._lock = threading.Lock()
        self._clock: float | None = None
        self._calling = threading.local()

    @property
    def client(self) -> PlatformClient:
        """The YellowDog SDK's client."""
        with self._lock:
            if self._client is None:
                self._client = self._connect()
            return self._client

    def close(self) -> None:
        """Close the client's connections. It comes back when it is next needed."""
        with self._lock:
            client, self._client = self._client, None
        if client is not None:
            client.close()

    def now(self) -> datetime:
        """Tell the time by the platform's clock: it is this late at least, and up to a second later.

        What is created from now on bears this time or a later one, however wrong our own clock is.
        """
        if self._clock is None:
            return datetime.now(timezone.utc) - timedelta(seconds=2)
        return datetime.fromtimestamp(self._clock + time.monotonic(), timezone.utc)

    def call(
        self,
        what: str,
        function: Callable[[], _T],
        operation: Operation,
        *,
        may_be_missing: bool = False,
    ) -> _T:
        """Make a call, again and again while its faults are transient, and raise what it ended with.

        It is tried for 30 s, or until the operation's end, and an answer is waited for hardly longer.

        :param what: what the call does, for the error: "provision the worker pool x".
        :param may_be_missing: whether "not found" is an answer. Else it is believed after 2 s only, for what
            has just been created need not be known everywhere on the platform.
        :raises RayDogError: one of :mod:`yellowdog_ray.errors`, never an error of the SDK.
        """
        limit = RETRY_SECONDS
        if operation.remaining is not None:
            limit = min(limit, operation.remaining)

        def worth_retrying(state: tenacity.RetryCallState) -> bool:
            error = _outcome(state)
            if error is None:
                return False
            if not may_be_missing and _status(error) == 404:
                return (state.seconds_since_start or 0.0) < NOT_YET_SECONDS
            return transient(error)

        retrying = tenacity.Retrying(
            retry=worth_retrying,
            stop=tenacity.stop_any(
                tenacity.stop_after_delay(limit), tenacity.stop_when_event_set(operation.cancelled)
            ),
            # Never past the limit: the last try is made at it.
            wait=lambda state: min(_wait(state), max(0.0, limit - (state.seconds_since_start or 0.0))),
            sleep=tenacity.sleep_using_event(operation.cancelled),
            before_sleep=lambda state: self._note_retry(what, state),
            reraise=True,
        )
        outer = getattr(self._calling, "operation", None)
        self._calling.operation = operation
        try:
            return retrying(function)
        except RayDogError:
            raise
        except Exception as error:
            raise _readable(what, error, self.credentials) from error
        finally:
            self._calling.operation = outer

    def _note_retry(self, what: str, state: tenacity.RetryCallState) -> None:
        error = _outcome(state)
        if self._on_retry is not None and isinstance(error, Exception):
            self._on_retry(what, _told(error))

    def _connect(self) -> PlatformClient:
        import requests
        from yellowdog_client import PlatformClient
        from yellowdog_client.model import ApiKey, RetryProperties, ServicesSchema

        log.info("Using the YellowDog API at %s", self.credentials.host)
        client = PlatformClient.create(
            ServicesSchema(
                defaultUrl=self.credentials.api_url,
                retry=RetryProperties(
                    maxAttempts=0, initialInterval=timedelta(0), maxInterval=timedelta(seconds=1)
                ),
                connectionTimeout=timedelta(seconds=CONNECT_TIMEOUT),
                readTimeout=timedelta(seconds=READ_TIMEOUT),
            ),
            ApiKey(self.credentials.key_id, self.credentials.key_secret.get_secret_value()),
        )
        # The SDK keeps its session to itself. Without it the platform's clock is taken to be ours, and
        # connections come and go.
        session = getattr(client, "_PlatformClient__session", None)
        if isinstance(session, requests.Session):
            session.hooks["response"].append(self._note_clock)
            # What the environment says of proxies and certificates is read once, and not at every call. Nor
            # does a ~/.netrc replace the application key then.
            found = session.merge_environment_settings(self.credentials.api_url, {}, None, None, None)
            session.proxies, session.verify, session.trust_env = found["proxies"], found["verify"], False
            if self.credentials.on_this_machine:
                # A proxy has a loopback of its own, and would be shown the key.
                session.proxies = {}
            adapter = session.get_adapter(self.credentials.api_url)
            if isinstance(adapter, requests.adapters.HTTPAdapter):
                # It keeps ten connections, and says so in the log when there are more.
                adapter.init_poolmanager(CONNECTIONS, CONNECTIONS)
                adapter.send = partial(self._send, adapter.send)  # type: ignore[method-assign]
        return client

    def _send(self, send: Callable[..., requests.Response], *args: Any, **options: Any) -> requests.Response:
        """Send a request, and wait for its answer no longer than the operation has time that it is for."""
        operation: Operation | None = getattr(self._calling, "operation", None)
        if operation is not None and operation.remaining is not None:
            most = operation.remaining + GRACE_SECONDS
            # The time to connect and the time to read, of which both are set above.
            options["timeout"] = tuple(min(seconds, most) for seconds in options["timeout"])
        return send(*args, **options)

    def _note_clock(self, response: Any, *_args: Any, **_kwargs: Any) -> None:
        try:
            told = parsedate_to_datetime(response.headers["Date"]).timestamp()
        except (KeyError, TypeError, ValueError):
            return
        # The header has whole seconds, rounded down, and took its time to arrive: the answer that makes it
        # latest is the nearest to the truth. A hundredth is left for times of creation that are rounded.
        clock = told - time.monotonic() - 0.01
        with self._lock:
            self._clock = clock if self._clock is None else max(clock, self._clock)


def _outcome(state: tenacity.RetryCallState) -> BaseException | None:
    return state.outcome.exception() if state.outcome is not None else None


def _wait(state: tenacity.RetryCallState) -> float:
    told = _retry_after(_outcome(state))
    # Told to come again at once, all clients would.
    if told:
        return told
    return tenacity.wait_random_exponential(multiplier=_FIRST_RETRY, max=_LONGEST_RETRY)(state)


def _retry_after(error: BaseException | None) -> float | None:
    response = getattr(error, "response", None)
    value = response.headers.get("Retry-After") if response is not None else None
    try:
        return None if value is None else min(RETRY_SECONDS, max(0.0, float(value)))
    except ValueError:
        return None  # a date, which our backoff does as well


def _status(error: BaseException) -> int | None:
    """Tell the HTTP status of an SDK error, where it can be told."""
    from yellowdog_client.model.exceptions import (
        InternalServerException,
        InvalidRequestException,
        NotAuthorisedException,
    )

    if isinstance(error, PlatformError):
        return error.status
    response = getattr(error, "response", None)
    if response is not None:
        # A page is of something in between, that just then has no platform to pass the call to.
        return 502 if response.status_code == 404 and _is_page(response) else int(response.status_code)
    # These hide the status of the answer that they were made from.
    for kind, status in (
        (InternalServerException, 500),
        (NotAuthorisedException, 401),
        (InvalidRequestException, 400),
    ):
        if isinstance(error, kind):
            return status
    return None


def _is_page(response: requests.Response) -> bool:
    return "html" in response.headers.get("Content-Type", "") or response.content.lstrip().startswith(b"<")


def transient(error: BaseException) -> bool:
    """Tell whether an error may go away by itself, and the call may nevertheless have been carried out."""
    import requests

    if isinstance(error, PlatformUnreachableError):
        return True
    if isinstance(error, RayDogError):
        return False
    if isinstance(error, requests.exceptions.SSLError | requests.exceptions.InvalidURL):
        return False
    # An answer that is no JSON comes from something in between, such as a proxy that is restarting.
    lost = (
        requests.ConnectionError,
        requests.Timeout,
        requests.exceptions.ChunkedEncodingError,
        requests.exceptions.ContentDecodingError,
        requests.exceptions.JSONDecodeError,
    )
    return isinstance(error, lost) or _status(error) in _TRANSIENT_STATUSES


def refused(error: BaseException) -> bool:
    """Tell whether an error says that the platform has not carried the call out.

    Nothing else does: not an answer that cannot be read, not a gateway's own status, not a connection that
    breaks in mid-answer.
    """
    status = _status(error)
    return status is not None and 400 <= status < 500 and status not in _TRANSIENT_STATUSES


def already_exists(error: BaseException) -> bool:
    """Tell whether an error says that there is already something of this name."""
    text = str(error).lower()
    return "already exist" in text or "must be unique" in text


def already_gone(error: BaseException) -> bool:
    """Tell whether an error says that what was to be ended has already ended."""
    text = str(error).lower()
    return isinstance(error, NotFoundError) or "invalid transition" in text


def _told(error: Exception) -> str:
    """Tell what the platform said, without the SDK's and HTTP's wrapping where it can be taken off."""
    response = getattr(error, "response", None)
    if response is not None:
        try:
            body = response.json()
            detail = " ".join(str(part) for part in body.get("detail") or [])
            if body.get("message"):
                return f"{body['message']} {detail}".strip()
        except (AttributeError, ValueError, TypeError):
            pass
        return f"{response.status_code} {response.reason}"
    message = getattr(error, "message", None)
    if message is None and error.args:
        # requests wraps what happened in an account of its own retries, which are switched off.
        reason = getattr(error.args[0], "reason", None)
        message = None if reason is None else str(reason).rpartition(">: ")[2]
    return str(message or error) or type(error).__name__


def _readable(what: str, error: Exception, credentials: Credentials) -> PlatformError:
    import requests

    status = _status(error)
    told = _told(error)
    if status == 401:
        return CredentialsError(
            f"could not {what}: {credentials.host} does not accept the application key ({told})", status
        )
    if status == 403 and "invalid transition" not in told.lower():
        return CredentialsError(f"could not {what}: the application key may not do this ({told})", status)
    if status == 404:
        return NotFoundError(f"could not {what}: {told}", status)
    if status is None and isinstance(error, requests.ConnectionError | requests.Timeout):
        return PlatformUnreachableError(f"could not {what}: no answer from {credentials.host}: {told}")
    if status is None and type(error).__module__.partition(".")[0] not in {"yellowdog_client"}:
        return PlatformError(
            f"could not {what}: the answer could not be understood ({type(error).__name__}: {told})"
        )
    return PlatformError(f"could not {what}: {told}", status)


def nobody_listens(api_url: str) -> bool:
    """Tell whether an API on this machine has ended: a local platform, and all its nodes with it.

    Elsewhere an API that cannot be reached is tried again for minutes, for it will come back.
    """
    parts = urlsplit(api_url)
    if parts.scheme != "http" or parts.hostname is None:
        return False
    try:
        socket.create_connection((parts.hostname, parts.port or 80), CONNECT_TIMEOUT).close()
    except ConnectionRefusedError:
        return True
    except OSError:
        pass  # said better by the calls that follow
    return False
