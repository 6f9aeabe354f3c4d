"""The way to an SSH server: what ``~/.ssh/config`` says of it, and the servers that lie in between."""

from __future__ import annotations

import getpass
import logging
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import paramiko

from yellowdog_ray.errors import SpecError, TunnelError

__all__ = ["USER_CONFIG", "Hop", "Login", "bracketed", "check_jump", "route"]

log = logging.getLogger(__name__)

USER_CONFIG = "~/.ssh/config"
_MOST_HOPS = 8
# A ProxyCommand is run by a shell, with these in it; ssh refuses them as well.
_UNSAFE_HOST = re.compile(r"""^-|[\s'"`$\\;&<>|(){}]|[^ -~\x80-\U0010ffff]""")
_UNSAFE_USER = re.compile(r"""^-|[\s'"`$;&<>|(){}]|\\$|[^ -~\x80-\U0010ffff]""")


@dataclass(frozen=True)
class Login:
    """Where to log in, as whom and with what; plain values, so that it can be sent to another process.

    :param host: the server's address, its name, or an alias in the user's settings.
    :param port: None for what the settings say, or else 22.
    :param jump: the servers to go through, as ``ssh -J`` takes them; None for what the settings say.
    :param ssh_config: the file of the settings; None to read none.
    :param record: the file for host keys on first use; None for the usual one.
    :raises SpecError: where the host or the user has characters that a shell could take for its own.
    """

    host: str
    user: str
    port: int | None = None
    password: str | None = field(default=None, repr=False)
    key_file: str | None = None
    key_password: str | None = field(default=None, repr=False)
    jump: str | None = None
    ssh_config: str | None = None
    host_key: str | None = None
    strict: bool = False
    record: str | None = None

    def __post_init__(self) -> None:
        _check_name("address", self.host, _UNSAFE_HOST)
        _check_name("SSH user", self.user, _UNSAFE_USER)

    @property
    def where(self) -> str:
        """The login, for messages."""
        return f"{self.user}@{bracketed(self.host, self.port or 22)}"


class Hop(NamedTuple):
    """One server on a way."""

    host: str  # where it is connected to
    port: int
    user: str
    key_name: str  # what known_hosts calls it
    identities: tuple[str, ...]
    command: str | None  # that connects to it

    @property
    def where(self) -> str:
        return bracketed(self.host, self.port)


def bracketed(host: str, port: int) -> str:
    """Write an address and a port; the address in brackets where it has colons itself."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _check_name(what: str, value: str, unsafe: re.Pattern[str]) -> None:
    if unsafe.search(value):
        raise SpecError(
            f"The {what} {value[:60]!r} is refused: it must not begin with '-', nor have spaces, control "
            "characters or any that mean something to a shell"
        )


def check_jump(jump: str, what: str = "jump") -> list[tuple[str | None, str, int | None]]:
    """Read a list of servers to go through, as ``ssh -J`` takes it: ``[user@]host[:port],...``.

    :param what: its name, for the message.
    :returns: of each the user, the host and the port.
    :raises SpecError: where it is something else.
    """
    found = []
    for part in jump.split(","):
        text = part.strip()
        try:
            parts = urlsplit(text if text.startswith("ssh://") else f"ssh://{text}")
            host, port, user = parts.hostname, parts.port, parts.username
        except ValueError:
            host = None
        if not host or parts.path or _UNSAFE_HOST.search(host) or (user and _UNSAFE_USER.search(user)):
            raise SpecError(f"{what} must be like 'user@bastion.example.com:22', not {part!r}")
        found.append((user, _as_written(text, host), port))
    return found


def _as_written(text: str, lowered: str) -> str:
    """Return a host as it was written: aliases in the settings may have capitals."""
    start = text.lower().rfind(lowered)
    return text[start : start + len(lowered)]


def route(login: Login) -> list[Hop]:
    """List the servers to connect to, one through the other; the last one is the login's own.

    :raises TunnelError: where the user's settings cannot be used.
    """
    settings = _Settings(login.ssh_config)
    try:
        return _way(login.host, login.user, login.port, login.jump, settings, 0)
    except _UselessError as error:
        raise TunnelError(f"Your SSH settings in {login.ssh_config} cannot be used: {error}") from error


class _UselessError(ValueError):
    """What the user's settings say cannot be used."""


class _Settings:
    """The user's ``~/.ssh/config``, as far as paramiko reads it: everything but ``Include``."""

    def __init__(self, file: str | None) -> None:
        self._text = ""
        if file is None:
            return
        try:
            self._text = Path(file).expanduser().read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            if file == USER_CONFIG and isinstance(error, FileNotFoundError):
                return
            raise TunnelError(f"Your SSH settings in {file} cannot be read: {error}") from error
        if any(line.split()[:1] in (["include"], ["Include"]) for line in self._text.splitlines()):
            log.info('Include lines in %s are not followed; engine="openssh" does that', file)

    def of(self, host: str, user: str | None, port: int | None) -> paramiko.SSHConfigDict:
        """Tell what they say of a host; what is given counts more, also where a command repeats it."""
        if not self._text:
            return paramiko.SSHConfigDict()
        # The first value of several is the one that counts.
        given = (f"User {user}\n" if user else "") + (f"Port {port}\n" if port else "")
        try:
            return paramiko.SSHConfig.from_text(given + self._text).lookup(host)
        except (ImportError, ValueError, paramiko.SSHException) as error:
            # "Match exec" needs a package that paramiko leaves to the user.
            raise _UselessError(str(error)) from error


def _port(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,5}", text) or not 1 <= int(text) <= 65535:
        raise _UselessError(f"Port must be a number from 1 to 65535, not {text!r}")
    return int(text)


def _way(
    host: str, user: str | None, port: int | None, jump: str | None, settings: _Settings, depth: int
) -> list[Hop]:
    if depth > _MOST_HOPS:
        raise TunnelError(
            f"Your SSH settings go in circles: the way to {host} has more than {_MOST_HOPS} hops"
        )
    found = settings.of(host, user, port)
    address = str(found.get("hostname", host))
    hop = Hop(
        address,
        port or _port(str(found.get("port", 22))),
        user or str(found.get("user", "")) or getpass.getuser(),
        str(found.get("hostkeyalias", address)),
        tuple(found.get("identityfile", ())),
        None,
    )
    if jump is None:
        jump = found.get("proxyjump")
        command = str(found.get("proxycommand", "none"))
        if jump is None and command.lower() != "none":
            return [hop._replace(command=command)]
        if jump is not None and jump.lower() != "none":
            try:
                first = check_jump(jump, "ProxyJump")[0][1]
            except SpecError as error:
                raise _UselessError(str(error)) from error
            if first in (host, address):
                jump = None  # a bastion that the settings for all hosts name is not behind itself
    if jump is None or jump.lower() == "none":
        return [hop]
    way: list[Hop] = []
    for number, (its_user, its_host, its_port) in enumerate(check_jump(jump)):
        # The first one may itself be behind others; the way to those that follow is given.
        through = None if number == 0 else "none"
        way += _way(its_host, its_user, its_port, through, settings, depth + 1)
    return [*way, hop]
