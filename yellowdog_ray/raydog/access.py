"""How the nodes of a cluster are logged in to. Importing this does not load paramiko."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from yellowdog_ray.errors import SpecError, SSHLoginError

if TYPE_CHECKING:
    from yellowdog_ray.utils._ssh.route import Login

__all__ = ["SSHAccess"]


@dataclass(frozen=True)
class SSHAccess:
    """How to log in to a cluster's nodes.

    :param user: the user to log in as, on every node.
    :param private_key_file: the file of the private key (OpenSSH, PEM or PKCS#8; RSA, ECDSA or Ed25519). With
        neither key nor password, the keys of the SSH agent and the unencrypted ones in ``~/.ssh`` are tried.
    :param password: that user's password, where there is no key; tried after the key, where there are both.
    :param private_key_password: the passphrase of that file.
    :param port: the port of the nodes' SSH servers; None for what ``~/.ssh/config`` says, or else 22.
    :param host_key: the head's public key, as in ``ssh_host_ed25519_key.pub`` (``"ssh-ed25519 AAAA..."``), or
        its fingerprint (``"SHA256:..."``). A server with another one is refused before it learns any
        credential. Of a server that nobody knows, the key is recorded on first use, for this cluster, and
        later no other one is accepted.
    :param strict_host_key: whether servers are refused that neither ``host_key`` nor a known_hosts file
        names.
    :param jump: a bastion, or several, as ``ssh -J`` takes them (``"user@bastion:22"``); None for what
        ``~/.ssh/config`` says.
    :param ssh_config: whether ``~/.ssh/config`` is read; or another file of its kind.
    :raises SpecError: for input that cannot work.
    """

    user: str
    private_key_file: str | os.PathLike[str] | None = None
    password: str | None = field(default=None, repr=False)
    private_key_password: str | None = field(default=None, repr=False)
    port: int | None = None
    host_key: str | None = None
    strict_host_key: bool = False
    jump: str | None = None
    ssh_config: bool | str | os.PathLike[str] = True

    def __post_init__(self) -> None:
        if not isinstance(self.user, str) or not self.user.strip():
            raise SpecError(
                f"An SSH user is needed, such as the one that the nodes' image has, not {self.user!r}"
            )
        if self.port is not None and (
            isinstance(self.port, bool) or not isinstance(self.port, int) or not 1 <= self.port <= 65535
        ):
            raise SpecError(f"port must be a port number from 1 to 65535, not {self.port!r}")
        if self.private_key_file is not None and (
            not isinstance(self.private_key_file, (str, os.PathLike)) or not os.fspath(self.private_key_file)
        ):
            raise SpecError(f"private_key_file must be the path of a file, not {self.private_key_file!r}")
        for name in ("password", "private_key_password"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, str) or not value):  # never shown
                raise SpecError(f"{name} must be a text that is not empty, or None where there is none")
        if self.private_key_password is not None and self.private_key_file is None:
            raise SpecError("private_key_password opens private_key_file, which is not given")
        if self.host_key is not None:
            from yellowdog_ray.utils._ssh.hostkeys import parse_pin

            parse_pin(self.host_key)
        if self.jump is not None:
            from yellowdog_ray.utils._ssh.route import check_jump

            check_jump(self.jump)

    def check_key_file(self) -> None:
        """Read the private key, where its file is named, as every login does.

        :raises SpecError: where there is no such file, it is no key, or its passphrase is missing or wrong.
        """
        if self.private_key_file is None:
            return
        from yellowdog_ray.utils._ssh.keys import load_key

        try:
            load_key(os.path.expanduser(self.private_key_file), self.private_key_password)
        except SSHLoginError as error:
            raise SpecError(f"The access to the nodes: {error}") from error

    def login(self, host: str, record: str | os.PathLike[str] | None = None) -> Login:
        """Tell how to log in to one server.

        :param host: its address.
        :param record: the file for host keys on first use.
        """
        from yellowdog_ray.utils._ssh.route import USER_CONFIG, Login

        file = os.fspath(self.private_key_file) if self.private_key_file is not None else None
        config = USER_CONFIG if self.ssh_config is True else self.ssh_config
        return Login(
            host,
            self.user,
            self.port,
            self.password,
            None if file is None else os.path.expanduser(file),
            self.private_key_password,
            self.jump,
            os.fspath(config) if config else None,
            self.host_key,
            self.strict_host_key,
            None if record is None else os.fspath(record),
        )
