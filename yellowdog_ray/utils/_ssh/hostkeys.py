"""Which SSH server is to be believed: pinned keys, known_hosts, and keys recorded on first use."""

from __future__ import annotations

import base64
import binascii
import contextlib
import fnmatch
import hashlib
import hmac
import logging
import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from yellowdog_ray.errors import HostKeyError, SpecError

__all__ = ["HostKey", "HostKeys", "common_record", "parse_pin", "record_beside"]

log = logging.getLogger(__name__)

_FINGERPRINT = re.compile(r"SHA256:[A-Za-z0-9+/]{43}")
_LOCK_SECONDS = 10.0
# Where OpenSSH looks; read anew for each check, as they may change.
_USER_FILES = ("~/.ssh/known_hosts", "~/.ssh/known_hosts2", "/etc/ssh/ssh_known_hosts")


class HostKey(NamedTuple):
    """A server's public key."""

    kind: str
    blob: bytes

    def __str__(self) -> str:
        return f"{self.kind} {self.fingerprint}"

    @property
    def fingerprint(self) -> str:
        """The hash of it, as ``ssh-keygen -l`` prints it."""
        return f"SHA256:{base64.b64encode(hashlib.sha256(self.blob).digest()).decode().rstrip('=')}"

    @property
    def line(self) -> str:
        """The key as in a ``.pub`` file."""
        return f"{self.kind} {base64.b64encode(self.blob).decode()}"

    @classmethod
    def parse(cls, line: str) -> HostKey:
        """Read an OpenSSH public key line: ``type base64 [comment]``.

        :raises SpecError: where the line is something else.
        """
        kind, _, rest = line.strip().partition(" ")
        try:
            blob = base64.b64decode(rest.split()[0], validate=True)
        except (IndexError, binascii.Error):
            blob = b""
        # The type is repeated inside, after its length in 4 bytes.
        if not kind or blob[4 : 4 + len(kind)] != kind.encode():
            raise SpecError(
                "host_key must be a public key line such as 'ssh-ed25519 AAAA...', or its fingerprint "
                f"'SHA256:...', not {line[:60]!r}"
            )
        return cls(kind, blob)


def parse_pin(pin: str) -> HostKey | str:
    """Read what a server is pinned to: a public key line, or a fingerprint (``SHA256:...``).

    :raises SpecError: where it is neither.
    """
    if not isinstance(pin, str):
        raise SpecError(f"host_key must be a public key line or a fingerprint, not {pin!r}")
    fingerprint = pin.strip().rstrip("=")
    return fingerprint if _FINGERPRINT.fullmatch(fingerprint) else HostKey.parse(pin)


def record_beside(state_file: Path) -> Path:
    """Tell the file that holds the host keys of one cluster; it is removed with the cluster's state file."""
    return state_file.with_name(f".{state_file.name}.known_hosts")


def option_value(path: str | Path) -> str:
    """Write a path as the value of one of ssh's options.

    :raises SpecError: where ssh cannot be told it.
    """
    text = str(path)
    if re.search(r'["\\]|\$\{', text) or not text.isprintable():
        raise SpecError(
            f"ssh cannot be told the path {text!r}: it must have no quotes, backslashes, ${{ or control "
            "characters. Use another path, or another engine"
        )
    # Percent signs would begin a token of ssh's.
    return f'"{text}"'.replace("%", "%%")


def common_record() -> Path:
    """Tell the file for the keys of bastions, and of heads of no cluster whose state is here."""
    from yellowdog_ray.raydog.journal import state_directory

    return state_directory() / "known_hosts"


def default_record(address: str) -> Path:
    """Tell the file for the keys of a host: its cluster's, where it is a head, or the common one."""
    from yellowdog_ray.errors import StateError
    from yellowdog_ray.raydog.journal import find_states, state_directory
    from yellowdog_ray.raydog.state import ClusterState

    directory = state_directory()
    with contextlib.suppress(OSError):
        for path in reversed(find_states(directory)):
            with contextlib.suppress(OSError, StateError):
                state = ClusterState.load(path)
                if state.status != "ending" and any(
                    address in (pool.public_ip, pool.private_ip)
                    for pool in state.pools
                    if pool.role == "head"
                ):
                    return record_beside(path)
    return common_record()


class _Entry(NamedTuple):
    """A line of a known_hosts file that speaks of the host that was asked for."""

    key: HostKey
    revoked: bool
    origin: str  # file:line


def _name(host: str, port: int) -> str:
    return host if port == 22 else f"[{host}]:{port}"


def _speaks_of(patterns: str, name: str) -> bool:
    """Tell whether the first field of a line names a host: hashed, or by patterns."""
    if patterns.startswith("|1|"):
        with contextlib.suppress(ValueError, binascii.Error):
            salt, digest = (base64.b64decode(part) for part in patterns[3:].split("|"))
            return hmac.compare_digest(hmac.digest(salt, name.encode(), "sha1"), digest)
        return False
    found = False
    for pattern in patterns.lower().split(","):
        # Brackets are no ranges here.
        expression = pattern.lstrip("!").replace("[", "[[]")
        if fnmatch.fnmatchcase(name.lower(), expression):
            if pattern.startswith("!"):
                return False
            found = True
    return found


def _entries(path: Path, name: str) -> Iterator[_Entry]:
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return
    for number, line in enumerate(lines, 1):
        words = line.split()
        marker = words.pop(0) if words and words[0].startswith("@") else ""
        # paramiko knows no certificates of hosts, so the lines of their authorities say nothing here.
        if len(words) < 3 or words[0].startswith("#") or marker not in ("", "@revoked"):
            continue
        if _speaks_of(words[0], name):
            with contextlib.suppress(SpecError):
                yield _Entry(HostKey.parse(" ".join(words[1:3])), bool(marker), f"{path}:{number}")


class HostKeys:
    """What is known of the keys of one login's servers: its own and those on the way to it.

    A server is believed where its key is the pinned one; or else where it is in the record, or in the user's
    own known_hosts. A server that nobody knows is believed on first use, and recorded, unless ``strict``.

    :param pin: the key or fingerprint that the login's own server must have.
    :param strict: whether a server that nobody knows is refused.
    :param record: the file for keys on first use, but those of bastions, for which there is a common one;
        None for the one of the cluster whose head it is, or else the common one.
    """

    def __init__(self, pin: str | None, strict: bool, record: Path | None) -> None:
        self._pin = None if pin is None else parse_pin(pin)
        self._strict, self._record = strict, record
        self._bastions: set[str] = set()
        self._seen: dict[str, HostKey] = {}
        self._lock = threading.Lock()

    def pass_through(self, host: str, port: int) -> None:
        """Take a server for a bastion, which outlives the cluster's record and may lead to other ones too."""
        self._bastions.add(_name(host, port))

    def kinds(self, host: str, port: int, pinned: bool) -> list[str]:
        """List the kinds of key that a server is to be asked for, as those are known."""
        pin = [self._pin.kind] if isinstance(self._pin, HostKey) else []
        if pinned and self._pin is not None:
            return pin
        name = _name(host, port)
        if name in self._seen:
            return [self._seen[name].kind]
        known = [entry.key.kind for entry in self._known(host, port) if not entry.revoked]
        return list(dict.fromkeys(known or pin))

    def check(self, found: HostKey, where: str, host: str, port: int, pinned: bool) -> None:
        """Check a server's key, before it is shown anything.

        :param where: the server's name, for messages.
        :param pinned: whether the pin is for this one.
        :raises HostKeyError: where it is not to be believed.
        """
        if self._pin in (found, found.fingerprint):  # of the others, some may have the same one
            return
        if pinned and self._pin is not None:
            raise HostKeyError(_other(where, found, f"expected was {self._pin}"))
        name = _name(host, port)
        with self._lock:
            if (seen := self._seen.get(name)) is not None:
                if seen != found:
                    raise HostKeyError(_other(where, found, f"before it was {seen}"))
                return
            known = list(self._known(host, port))
            if any(entry.revoked and entry.key == found for entry in known):
                raise HostKeyError(f"The key of {where}, {found}, is marked as revoked in your known_hosts")
            known = [entry for entry in known if not entry.revoked]
            if not any(entry.key == found for entry in known):
                if known:
                    raise HostKeyError(_changed(where, found, known))
                if self._strict:
                    raise HostKeyError(
                        f"{where} is not known, and strict checking is on: its key is {found}. If that is "
                        "the right one, give it as host_key, or add it to your known_hosts. No user name, "
                        "password or key was shown to it."
                    )
                self._record_first(found, where, host, port)
            self._seen[name] = found

    def record(self, host: str, port: int) -> Path:
        """Tell the file that a server's key is recorded in."""
        if _name(host, port) in self._bastions:
            return common_record()
        # What is no bastion is the head, which is asked for first, or a worker behind it.
        if self._record is None:
            self._record = default_record(host)
        return self._record

    def _known(self, host: str, port: int) -> Iterator[_Entry]:
        name = _name(host, port)
        yield from _entries(self.record(host, port), name)
        for file in _USER_FILES:
            yield from _entries(Path(file).expanduser(), name)

    def _record_first(self, found: HostKey, where: str, host: str, port: int) -> None:
        path = self.record(host, port)
        try:
            others = _append(path, _name(host, port), found)
        except OSError as error:
            log.warning(
                "%s was not known: its key %s is believed here, but could not be recorded in %s: %s",
                *(where, found, path, error.strerror or error),
            )
            return
        if others:  # another process was first
            raise HostKeyError(_changed(where, found, others))
        log.warning(
            "%s was not known: its key %s is believed from now on, recorded in %s", where, found, path
        )


def _append(path: Path, name: str, found: HostKey) -> list[_Entry]:
    """Add a key to a record, unless another one is there by now; return the entries of that."""
    from filelock import FileLock

    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with FileLock(f"{path}.lock", timeout=_LOCK_SECONDS, mode=0o600):
        known = list(_entries(path, name))
        if known:
            return [] if any(entry.key == found for entry in known) else known
        handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            os.fchmod(handle, 0o600)
            os.write(handle, f"{name} {found.line}\n".encode())
        finally:
            os.close(handle)
    return []


def _other(where: str, found: HostKey, expected: str) -> str:
    return (
        f"{where} is not the server that was expected, or its key has changed. Its key is {found}, "
        f"{expected}. No user name, password or key was shown to it."
    )


def _changed(where: str, found: HostKey, known: list[_Entry]) -> str:
    there = ", ".join(f"{entry.key} in {entry.origin}" for entry in known[:3])
    return (
        f"{_other(where, found, f'known is {there}')} If you have reason to believe that another machine has "
        "this address now, remove that line; or pin the right key with host_key."
    )
