"""What an engine is: it forwards local ports over SSH. There are three, and none can do everything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from yellowdog_ray.errors import SpecError
from yellowdog_ray.utils._ssh.route import Login

__all__ = ["HOLD_SECONDS", "LIMITS", "Engine", "EngineName", "Forward", "LinkStatus", "State", "make_engine"]

EngineName = Literal["paramiko", "sshtunnel", "openssh"]
State = Literal["stopped", "up", "down", "refused"]

HOLD_SECONDS = 20.0
"""How long a new client waits while the connection is down."""
FIRST_PAUSE, LONGEST_PAUSE = 0.3, 5.0
"""Seconds between attempts to connect again: the first ones, and the later ones."""
LOGIN_PAUSE = 30.0
"""Seconds until the next attempt after the login was refused."""

LIMITS: Mapping[EngineName, Mapping[str, str]] = {
    "paramiko": {},
    "sshtunnel": {
        "reconnect": "sshtunnel does not notice that its connection is lost",
        "hold": "sshtunnel closes clients at once while its connection is down",
        "half-open": "sshtunnel's keepalive asks for no answer",
        "duplex": "sshtunnel moves both directions in one thread, and stops where both ends only send",
        "half-close": "sshtunnel ends a connection when one of its ends has nothing more to send",
        "burst": "sshtunnel's ports take five new clients at a time, and reset some of a burst",
        "quick": "sshtunnel sets no TCP_NODELAY on local connections: answers in two parts wait 40 ms",
        "local-ipv6": "sshtunnel's local ports have IPv4 addresses only",
        "jump": "sshtunnel cannot be given the connection to a bastion",
        "prompt-end": "sshtunnel waits for clients that do not read, and leaves their threads behind",
    },
    "openssh": {
        "hold": "the ports are ssh's own, and closed while its connection is down",
        "password": "ssh asks a person for it, at a terminal",
        "passphrase": "ssh asks a person for it, at a terminal; an agent can hold the key",
        "fingerprint": "ssh is told whole keys, not their hashes",
        "connections": "ssh does not tell how many connections there are",
    },
}
"""What the engines cannot do, each with the reason."""


@dataclass(frozen=True)
class Forward:
    """A local port, and where its connections go to from the SSH server.

    :param local_port: 0 for one that nobody uses.
    """

    local_host: str
    local_port: int
    remote_host: str
    remote_port: int


@dataclass(frozen=True)
class LinkStatus:
    """How an SSH connection is doing.

    :param state: ``"down"`` while it is made again; ``"refused"`` is for good: the server's key has changed.
        One that was lost and is not made again is ``"stopped"``, with the error.
    :param seconds: for how long it has been so.
    :param reconnects: how often it was lost and came back.
    :param connections: how many clients use the ports now; None where that is not known.
    :param last_error: why it was lost, or could not be made again, or what the server forbids.
    :param forbidden: the remote ports to which the server forbade connections when it was last asked.
    """

    state: State
    seconds: float = 0.0
    reconnects: int = 0
    connections: int | None = None
    last_error: str | None = None
    forbidden: Sequence[int] = ()


class Engine(Protocol):
    """Forwards ports. It is started once; it may be stopped twice, and while another thread starts it."""

    def start(self) -> list[int]:
        """Connect and forward all ports, or none; return the local ports, in the order of the forwards.

        :raises TunnelError: with the reason; :meth:`stop` is called then too.
        """

    def stop(self, deadline: float) -> list[str]:
        """End all of it until a deadline of ``time.monotonic``; return what is left then, a sentence each."""

    def status(self) -> LinkStatus:
        """Tell how it is doing, without waiting."""


def make_engine(name: str, login: Login, forwards: list[Forward], isolate: bool = False) -> Engine:
    """Make an engine.

    :param isolate: whether it works in a process of its own, as ssh does anyway.
    :raises SpecError: where there is none of this name, or it cannot do what it is asked for.
    """
    check_engine(name, login, forwards)
    if name == "openssh":
        from yellowdog_ray.utils._tunnels.openssh import OpenSSH

        return OpenSSH(login, forwards)
    if isolate:
        from yellowdog_ray.utils._tunnels.isolated import Isolated

        return Isolated(name, login, forwards)
    if name == "sshtunnel":
        from yellowdog_ray.utils._tunnels.with_sshtunnel import WithSSHTunnel

        return WithSSHTunnel(login, forwards)
    from yellowdog_ray.utils._tunnels.forwarder import Forwarder

    return Forwarder(login, forwards)


def check_engine(name: str, login: Login, forwards: Sequence[Forward]) -> None:
    """Refuse an engine that there is not, or that cannot do what is asked for.

    :raises SpecError: with the reason.
    """
    if name not in LIMITS:
        raise SpecError(f"engine must be one of {', '.join(map(repr, LIMITS))}, not {name!r}")
    asked = {
        "password": login.password is not None,
        "passphrase": login.key_password is not None,
        "fingerprint": login.host_key is not None and login.host_key.strip().startswith("SHA256:"),
        "jump": login.jump is not None,
        "local-ipv6": any(":" in forward.local_host for forward in forwards),
    }
    for what, wanted in asked.items():
        reason = LIMITS[name].get(what)  # type: ignore[index]
        if wanted and reason:
            raise SpecError(f'engine="{name}" cannot do this ({what}): {reason}')
