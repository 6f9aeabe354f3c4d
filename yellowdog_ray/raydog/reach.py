"""The way to a cluster's nodes: whether Ray is well, which nodes it has, and what their tasks print.

It leads through SSH to the head, where there is an :class:`SSHAccess`: one connection, made when it is first
needed and again when it was lost. Otherwise it is plain HTTP to the head's addresses. Importing this module
does not load paramiko, which only SSH needs.
"""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from yellowdog_ray.errors import ClusterStateError, HostKeyError, SpecError, SSHLoginError, TunnelError
from yellowdog_ray.raydog.access import SSHAccess
from yellowdog_ray.raydog.ports import AGENT, DASHBOARD
from yellowdog_ray.utils._http import excerpt, get

if TYPE_CHECKING:
    import paramiko

    from yellowdog_ray.utils._ssh.connection import Connection, Connector

__all__ = ["HeadVersions", "RayNode", "Reach"]

log = logging.getLogger(__name__)

_CONNECT_TIMEOUT = 10.0  # seconds, for each of: TCP, SSH's greeting and key exchange, each login
_ANSWER_TIMEOUT = 10.0  # seconds, for the whole of an answer
# While a node starts, its SSH server may be up before the user's key is in place.
_LOGIN_GRACE = 60.0  # seconds from the first refused login
_LOGIN_PAUSE = 3.0  # seconds between two refused logins
_CLOSE_TIMEOUT = 1.0  # seconds to wait for the threads of a connection that is closed

# Ray's dashboard refuses to list more at once (RAY_MAX_LIMIT_FROM_API_SERVER on the head).
_NODE_LIMIT = 10_000

_TASK_ID = re.compile(r"ydid:task:[0-9A-Za-z:-]+")
_T = TypeVar("_T")


@dataclass(frozen=True)
class RayNode:
    """A node as Ray knows it.

    :param node_id: Ray's own id of it, in hexadecimal digits. A node that comes again has a new one.
    :param address: its private address.
    :param alive: whether it takes part in the cluster; dead nodes stay on Ray's list for a while.
    :param is_head: whether it is the head.
    """

    node_id: str
    address: str
    alive: bool
    is_head: bool


@dataclass(frozen=True)
class HeadVersions:
    """What a head runs.

    :param ray: Ray's version; None where it is not told.
    :param python: Python's version, as ``"3.11.7"``; None where it is not told.
    """

    ray: str | None
    python: str | None


@dataclass(frozen=True)
class _Refusal:
    """What a server said that does not let the user in, when it first did and when it last did."""

    reason: str
    since: float
    last: float


class Reach:
    """One way to the nodes of a cluster: through SSH to its head where there is an access, else directly.

    Making one does nothing yet. It may be used by several threads at once. A call takes at most some 10 s to
    connect to each of the addresses and to log in, and 10 s for the answer; those that wait for the same
    connection fail together. One that finds the SSH connection
    lost makes a new one; where it was lost without a word, finding out takes some 15 s. After a refused login
    the next one is tried 3 s later; calls before that fail with what was said then.

    :param addresses: the head's addresses, the public one first; the first that answers is used.
    :param access: how to log in to the nodes; None for no SSH.
    :param token: the cluster's token, where Ray is protected by one.
    :param record: the file for host keys on first use, by default the cluster's own, or a common one, in the
        directory of the state files.
    :raises SpecError: where there is no address, or the token cannot be one.
    """

    def __init__(
        self,
        addresses: Sequence[str],
        access: SSHAccess | None,
        token: str | None = None,
        *,
        record: str | os.PathLike[str] | None = None,
    ) -> None:
        self._addresses = list(dict.fromkeys(address for address in addresses if address))
        if isinstance(addresses, str) or not self._addresses:
            raise SpecError(f"The head's addresses must be a list that is not empty, not {addresses!r}")
        if token is not None and not re.fullmatch(r"[!-~]+", token):  # never shown
            raise SpecError(
                "The token must be a word of printable ASCII characters, or None where there is none"
            )
        self._access, self._token = access, token
        self._preferred = self._addresses[0]
        self._record = record
        self._connectors: dict[str, Connector] = {}
        self._connection: Connection | None = None
        self._closed = False
        self._refusal: _Refusal | None = None
        self._attempts = 0  # to connect that have ended, and why the last one failed
        self._problem: TunnelError | None = None
        self._connecting = threading.Lock()  # held while a connection is made, which may take long
        self._lock = threading.Lock()  # for the two above it, held for a moment only

    def health(self) -> str | None:
        """Ask the head's own raylet whether it is well. That needs no token.

        It is meant to be called again and again.

        :returns: None if it is; else, in a sentence, why not: Ray's answer, or why there was none.
        :raises HostKeyError: where an SSH server's key is not the expected one.
        :raises SSHLoginError: where the user has not been let in for 60 s, or there is no key to try.
        :raises ClusterStateError: where this was closed.
        """
        try:
            status, body = self._ask(AGENT, "/api/local_raylet_healthz")
        except HostKeyError:
            raise
        except SSHLoginError as error:
            refusal = self._refusal
            if refusal is None or refusal.last - refusal.since >= _LOGIN_GRACE:
                raise
            return str(error)
        except TunnelError as error:
            return str(error)
        return None if status == 200 else f"Ray on the head is not healthy: {excerpt(status, body)}"

    def ray_nodes(self) -> list[RayNode]:
        """List the nodes that Ray knows, with those that have left it.

        Ray's dashboard lists at most 10,000 nodes. Where it knows more, only nodes that live are listed, and
        at most so many.

        :raises TunnelError: where the head's dashboard cannot be reached.
        :raises ClusterStateError: where it refuses, the token for one, or this was closed.
        """
        nodes = self._list_nodes("")
        if len(nodes) >= _NODE_LIMIT:
            nodes = self._list_nodes("&filter_keys=state&filter_predicates=%3D&filter_values=ALIVE")
        return nodes

    def versions(self) -> HeadVersions:
        """Ask the head's dashboard what it runs, and with that whether the token is the right one.

        Without SSH the dashboard may not be reachable, although the rest of Ray is: then it is the agent that
        says whether the token is right, and the versions are not told.

        :raises TunnelError: where there is no answer.
        :raises ClusterStateError: where the token is refused, or this was closed.
        """
        try:
            status, body = self._ask(DASHBOARD, "/api/v0/cluster_metadata", self._token)
        except TunnelError:
            if self._access is not None:
                raise
            # Any page but those of its health needs the token, one that does not exist too.
            status, body = self._ask(AGENT, "/api/no-such-page", self._token)
            self._check_token(status, body)
            return HeadVersions(None, None)
        self._check_token(status, body)
        try:
            data = json.loads(body)["data"]
            return HeadVersions(str(data["rayVersion"]), str(data["pythonVersion"]))
        except (ValueError, KeyError, TypeError, RecursionError):
            # An older Ray, or another one.
            log.debug("the head does not tell its versions: %s", excerpt(status, body))
            return HeadVersions(None, None)

    def task_output(self, address: str, task_id: str, max_bytes: int = 1_000_000) -> str:
        """Read the end of what a task has printed so far, on the node that it runs on.

        The node's agent has it in a file for as long as the task runs. A node other than the head is logged
        in to from the head, at its private address, with the same user and key. Its host key is recorded for
        this task on first use, for another node may have the same address later.

        :param address: the private address of the task's node.
        :param task_id: the task's YDID.
        :param max_bytes: how much to read, in bytes.
        :raises SpecError: where there is no SSH access, or an argument cannot be right.
        :raises TunnelError: where the node cannot be reached.
        :raises ClusterStateError: where there is no such output, or this was closed.
        """
        if self._access is None:
            raise SpecError("A task's output is read over SSH: give access=SSHAccess(...)")
        if not isinstance(task_id, str) or not _TASK_ID.fullmatch(task_id):
            raise SpecError(f"{task_id!r} is not the YDID of a task (ydid:task:...)")
        if isinstance(max_bytes, bool) or not isinstance(max_bytes, int) or max_bytes < 1:
            raise SpecError(f"max_bytes must be a number of bytes from 1, not {max_bytes!r}")
        # A session seldom has the agent's variables: then it is the agent's usual place. A shell is named, as
        # the user's own may be one that does not know this syntax.
        file = '"${YD_AGENT_DATA:-/var/opt/yellowdog/agent/data}/workers/%s/taskoutput.txt"'
        command = f"exec sh -c 'LC_ALL=C exec tail -c {max_bytes} {file % task_id.replace(':', '_')}'"
        if address in self._addresses:
            answer = self._on_head(lambda head: _run(head, command))
        else:
            answer = self._on_head(lambda head: self._run_on_worker(head, address, task_id, command))
        status, output, problem = answer
        if status != 0:
            raise ClusterStateError(
                f"There is no output of task {task_id} on {address}: {problem or f'exit status {status}'}. "
                "An agent keeps a task's output only while the task runs on its node, and the SSH user "
                f"({self._access.user}) must be allowed to read it"
            )
        return output.decode(errors="replace")

    @property
    def address(self) -> str:
        """The head's address: the first one, or the last one that was connected to."""
        return self._preferred

    @property
    def connected(self) -> bool:
        """Whether there is an SSH connection to the head, which may be lost without a word though."""
        with self._lock:
            return self._connection is not None and self._connection.is_active

    def close(self) -> None:
        """Close the connection, if there is one; every later call is refused. Closing twice is no error."""
        with self._lock:
            self._closed = True
            connection, self._connection = self._connection, None
        if connection is not None:
            _disconnect(connection)

    def __enter__(self) -> Reach:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        how = "directly" if self._access is None else f"as {self._access.user} over SSH"
        return f"<Reach {' or '.join(self._addresses)} {how}{', closed' if self._closed else ''}>"

    # Ray's answers

    def _list_nodes(self, selection: str) -> list[RayNode]:
        path = f"/api/v0/nodes?limit={_NODE_LIMIT}&timeout={_ANSWER_TIMEOUT:.0f}{selection}"
        status, body = self._ask(DASHBOARD, path, self._token)
        self._check_token(status, body)
        try:
            if status != 200:
                raise ValueError
            return [_node(entry) for entry in json.loads(body)["data"]["result"]["result"]]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ClusterStateError(
                f"Ray's dashboard on the head does not list the nodes: {excerpt(status, body)}"
            ) from error

    def _check_token(self, status: int, body: bytes) -> None:
        if status in (401, 403):
            given = "does not accept the token of this cluster" if self._token else "asks for a token"
            raise ClusterStateError(
                f"Ray's dashboard on the head {given}: {excerpt(status, body)}. The right one is what the "
                "head was started with, in RAY_AUTH_TOKEN"
            )

    def _ask(self, port: int, path: str, token: str | None = None) -> tuple[int, bytes]:
        """Ask a web server on the head for a page, and return the HTTP status and the page."""
        if self._access is None:
            return self._ask_directly(port, path, token)

        def ask(head: paramiko.Transport) -> tuple[int, bytes]:
            from yellowdog_ray.utils._ssh.channels import open_tcp

            channel = open_tcp(head, "127.0.0.1", port, _CONNECT_TIMEOUT)
            return get(channel, f"Port {port} of the head", path, token, _ANSWER_TIMEOUT)

        return self._on_head(ask)

    def _ask_directly(self, port: int, path: str, token: str | None) -> tuple[int, bytes]:
        if self._closed:
            raise self._closed_error()
        problems = []
        for address in sorted(self._addresses, key=lambda address: address != self._preferred):
            where = f"{address}:{port}"
            try:
                sock = socket.create_connection((address, port), _CONNECT_TIMEOUT)
                answer = get(sock, where, path, token, _ANSWER_TIMEOUT)
            except TunnelError as error:
                problems.append(str(error))
            except OSError as error:
                problems.append(f"No connection to {where}: {error.strerror or error}")
            else:
                self._preferred = address
                return answer
        raise TunnelError(
            f"{_sentences(problems)} Without SSH, this machine has to reach Ray's ports on the head. The "
            "default head script lets the dashboard listen on the head's localhost only, unless the cluster "
            'was built with access="direct" and a token: give access=SSHAccess(...)'
        )

    # SSH

    def _on_head(self, work: Callable[[paramiko.Transport], _T]) -> _T:
        """Do something over the connection to the head, and again over a new one if that was lost."""
        connection, is_new = self._connected()
        try:
            return work(connection.transport)
        except TunnelError:
            from yellowdog_ray.utils._ssh.channels import is_alive

            if self._closed:
                raise self._closed_error() from None
            if is_new or is_alive(connection.transport):
                raise
        self._drop(connection)
        return work(self._connected()[0].transport)

    def _connected(self) -> tuple[Connection, bool]:
        """Return the connection to the head and whether it was made just now."""
        attempts = self._attempts
        with self._connecting:
            with self._lock:
                if self._closed:
                    raise self._closed_error()
                connection = self._connection
            if connection is not None:
                if connection.is_active:
                    return connection, False
                self._drop(connection)
            if self._attempts != attempts and (problem := self._problem) is not None:
                # It failed while this call waited for it; each for itself would wait once more.
                raise type(problem)(str(problem))
            self._problem = None
            try:
                connection = self._connect()
            except TunnelError as error:
                self._problem = error
                raise
            finally:
                self._attempts += 1
            with self._lock:
                if not self._closed:
                    self._connection = connection
                    return connection, True
        _disconnect(connection)
        raise self._closed_error()

    def _connect(self) -> Connection:
        from yellowdog_ray.utils._ssh.channels import quicken

        problems: list[TunnelError] = []
        before = self._refusal
        if before is not None and time.monotonic() < before.last + _LOGIN_PAUSE:
            raise SSHLoginError(before.reason)
        for address in self._addresses:
            connector = None
            try:
                connector = self._connector(address)
                connection = connector.connect(_CONNECT_TIMEOUT)
            except SSHLoginError as error:
                if connector is not None:  # else there is no key here to try, and no server was asked
                    now = time.monotonic()
                    self._refusal = _Refusal(str(error), now if before is None else before.since, now)
                raise  # the other address is the same machine
            except TunnelError as error:
                if isinstance(error, HostKeyError) and not problems:
                    raise
                # A private address alone may be another machine's, in the user's own network.
                problems.append(error)
                continue
            self._refusal = None
            self._preferred = address
            threading.Thread(
                target=quicken, args=(connection.transport,), name="raydog-quicken", daemon=True
            ).start()
            return connection
        if len(problems) == 1:
            raise problems[0]
        raise TunnelError(_sentences([str(problem) for problem in problems]))

    def _connector(self, address: str) -> Connector:
        from yellowdog_ray.utils._ssh.connection import Connector

        assert self._access is not None  # noqa: S101 - for the type checker
        if address not in self._connectors:
            connector = Connector(self._access.login(address, self._record))
            connector.prepare()
            self._connectors[address] = connector
        return self._connectors[address]

    def _run_on_worker(
        self, head: paramiko.Transport, address: str, task_id: str, command: str
    ) -> tuple[int, bytes, str]:
        from yellowdog_ray.utils._ssh.channels import open_tcp

        # Keys and known host keys are those of the head's connector, with a name of its own in the record.
        connector = self._connector(self._addresses[0])
        assert self._access is not None  # noqa: S101 - for the type checker
        port = self._access.port or 22
        channel = open_tcp(head, address, port, _CONNECT_TIMEOUT)
        worker = connector.log_in_over(channel, address, port, f"{address}+{task_id}", _CONNECT_TIMEOUT)
        try:
            return _run(worker.transport, command)
        finally:
            _disconnect(worker)

    def _drop(self, connection: Connection) -> None:
        with self._lock:
            if self._connection is connection:
                self._connection = None
        _disconnect(connection)

    def _closed_error(self) -> ClusterStateError:
        return ClusterStateError("This way to the cluster's nodes was closed: make a new Reach")


def _run(transport: paramiko.Transport, command: str) -> tuple[int, bytes, str]:
    from yellowdog_ray.utils._ssh.channels import run

    return run(transport, command, _ANSWER_TIMEOUT)


def _disconnect(connection: Connection) -> None:
    connection.close(time.monotonic() + _CLOSE_TIMEOUT)


def _node(entry: dict[str, Any]) -> RayNode:
    return RayNode(
        node_id=str(entry["node_id"]),
        address=str(entry["node_ip"]),
        alive=entry["state"] == "ALIVE",
        is_head=bool(entry["is_head_node"]),
    )


def _sentences(problems: Sequence[str]) -> str:
    return " ".join(text if text.endswith((".", "?")) else f"{text}." for text in problems)
