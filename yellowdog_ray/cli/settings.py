"""What the command is told beside its state files: the application key, and the way to the nodes."""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass, field
from pathlib import Path

from yellowdog_ray.errors import SpecError
from yellowdog_ray.raydog.access import SSHAccess
from yellowdog_ray.raydog.specs import DEFAULT_API_URL, Credentials, make
from yellowdog_ray.raydog.state import ClusterState

__all__ = ["Key", "UsageError", "read_access", "read_key"]

_ID, _SECRET, _URL = "YD_API_KEY_ID", "YD_API_KEY_SECRET", "YD_API_URL"


class UsageError(Exception):
    """The command cannot be carried out as it was given."""


@dataclass(frozen=True)
class Key:
    """The application key, and the API where one is named.

    :param api_url: None for the one in each state.
    """

    id: str
    secret: str = field(repr=False)
    api_url: str | None

    def credentials(self, state: ClusterState) -> Credentials:
        """Give the credentials for a cluster."""
        return Credentials(
            key_id=self.id,
            key_secret=self.secret,  # type: ignore[arg-type]
            api_url=self.api_url or state.api_url or DEFAULT_API_URL,
        )


def read_key(options: argparse.Namespace) -> Key:
    """Read the application key from the environment, and what is not there from the .env file.

    :raises UsageError: where there is none, or it cannot be right.
    """
    from_file = _read_env_file(options.env_file)
    values = {name: os.environ.get(name) or from_file.get(name) or None for name in (_ID, _SECRET, _URL)}
    key_id, secret, url = values[_ID], values[_SECRET], values[_URL]
    if key_id is None or secret is None:
        missing = [name for name in (_ID, _SECRET) if values[name] is None]
        raise UsageError(
            f"there is no application key: set {' and '.join(missing)} in the environment, or in "
            f"{options.env_file or 'a file .env in the current directory'}"
        )
    called = {"key_id": _ID, "key_secret": _SECRET, "api_url": _URL}
    try:
        make(Credentials, called, key_id=key_id, key_secret=secret, api_url=url or DEFAULT_API_URL)
    except SpecError as error:
        raise UsageError(str(error)) from None
    return Key(key_id, secret, url)


def _read_env_file(given: str | None) -> dict[str, str | None]:
    path = Path(".env" if given is None else given)
    if given is None and not path.is_file():
        return {}
    from dotenv import dotenv_values

    try:
        with path.open(encoding="utf-8-sig") as file:
            return dict(dotenv_values(stream=file))
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}") from None
    except ValueError:
        raise UsageError(f"{path} cannot be read: it is not UTF-8 text") from None


def read_access(options: argparse.Namespace) -> SSHAccess | None:
    """Read how the nodes are reached; None where nothing is said of it.

    :raises UsageError: where that cannot work.
    """
    if options.ssh_user is None:
        for name in ("ssh_key", "ssh_port", "ssh_jump", "ssh_host_key", "ssh_password_env"):
            if getattr(options, name) is not None:
                raise UsageError(f"--{name.replace('_', '-')} needs --ssh-user")
        return None
    password = None
    if options.ssh_password_env is not None:
        password = os.environ.get(options.ssh_password_env)
        if not password:
            raise UsageError(f"--ssh-password-env: {options.ssh_password_env} is not set in the environment")
    try:
        return SSHAccess(
            options.ssh_user,
            None if options.ssh_key is None else Path(options.ssh_key).expanduser(),
            password,
            port=options.ssh_port,
            host_key=options.ssh_host_key,
            jump=options.ssh_jump,
        )
    except SpecError as error:
        raise UsageError(f"the way to the nodes: {error}") from None
