"""SSH to nodes: the keys, the servers' configuration, and whether a server works."""

from __future__ import annotations

import os
import shutil
import socket
from pathlib import Path

from yellowdog_ray.errors import LocalPlatformError
from yellowdog_ray.utils._files import write_private

__all__ = ["SSHIdentity", "SSHServerError", "find_sshd", "require_ssh", "sshd_config"]


class SSHIdentity:
    """The keys of a platform: one that opens its nodes, and one by which its nodes are known.

    :param directory: the directory for the key files, which only this user may read. Keys that are in it
        already are used again.
    :raises LocalPlatformError: when a file there is no key that can be used.
    :raises OSError: with the file's name, when one cannot be read or written.
    """

    def __init__(self, directory: Path) -> None:
        self.private_key_file = directory / "id_ed25519"
        self.host_key_file = directory / "host_key"
        self.public_key = _make_key(self.private_key_file)
        self.host_key = _make_key(self.host_key_file)


def _make_key(path: Path) -> str:
    """Return the public key of a private key file, which is made where there is none."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    try:
        # Whoever has put it there may have let others read it; sshd would refuse it too.
        path.chmod(0o600)
        key = serialization.load_ssh_private_key(path.read_bytes(), None)
    except FileNotFoundError:
        key = Ed25519PrivateKey.generate()
        private = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
        )
        write_private(path, private)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        # A key with a passphrase is a TypeError.
        raise LocalPlatformError(
            f"{path} is no SSH key that can be used without a passphrase ({error}): remove it, and start "
            "again; a new one is made"
        ) from error
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    return public.decode()


_SSHD_CONFIG = """\
HostKey {home}/ssh/host_key
AuthorizedKeysFile {home}/ssh/authorized_keys
AllowUsers {users}
PermitRootLogin prohibit-password
PubkeyAuthentication yes
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
# The directories above the keys belong to whoever started the platform, or to nobody in a user namespace.
StrictModes no
UseDNS no
PrintMotd no
PrintLastLog no
PidFile none
LoginGraceTime 20
MaxSessions 100
AcceptEnv LANG LC_* RAY_*
Subsystem sftp internal-sftp
"""


def sshd_config(home: str, users: str) -> str:
    """Write the configuration of a node's SSH server.

    :param home: the agent's home, as the node sees it.
    :param users: the names of those who may log in, with spaces between them.
    """
    return _SSHD_CONFIG.format(home=home, users=users)


def find_sshd() -> str | None:
    """Return the path of this machine's own SSH server; None where it has none."""
    for path in (shutil.which("sshd"), "/usr/sbin/sshd", "/usr/local/sbin/sshd"):
        if path and os.access(path, os.X_OK):
            return path
    return None


class SSHServerError(LocalPlatformError):
    """A node is there, but its SSH server does not speak."""


def require_ssh(address: str, port: int) -> None:
    """Wait for the first words of a node's SSH server.

    :raises SSHServerError: when they do not come.
    """
    try:
        with socket.create_connection((address, port), timeout=10) as connection:
            greeting = connection.recv(64)
    except OSError as error:
        raise SSHServerError(f"no answer on {address}:{port} ({error})") from error
    if not greeting.startswith(b"SSH-"):
        raise SSHServerError("it ends as soon as somebody connects")
