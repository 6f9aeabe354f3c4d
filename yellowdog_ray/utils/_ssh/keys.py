"""The private keys to log in with."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Sequence

import paramiko
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from yellowdog_ray.errors import SSHLoginError

__all__ = ["MOST_KEYS", "NamedKey", "keys_to_try", "load_key", "own_keys"]

NamedKey = tuple[paramiko.PKey, str]
"""A key, with where it is from."""

# sshd hangs up after six attempts by default.
MOST_KEYS = 5


def load_key(path: str, passphrase: str | None) -> paramiko.PKey:
    """Read a private key: OpenSSH's format, PEM or PKCS#8; RSA, ECDSA or Ed25519; and its certificate.

    :raises SSHLoginError: where there is no such file, it is no key, or the passphrase is missing or wrong.
    """
    try:
        with open(path, "rb") as file:
            data = file.read()
    except OSError as error:
        raise SSHLoginError(f"Cannot read the private key file {path}: {error.strerror}") from error
    openssh = b"-----BEGIN OPENSSH PRIVATE KEY-----" in data
    load = serialization.load_ssh_private_key if openssh else serialization.load_pem_private_key
    try:
        try:
            key = load(data, None)
        except TypeError:  # it is encrypted
            if not passphrase:
                raise SSHLoginError(
                    f"The private key {path} is encrypted: give private_key_password"
                ) from None
            try:
                key = load(data, passphrase.encode())
            except ValueError as error:
                raise SSHLoginError(f"private_key_password does not open the private key {path}") from error
    except (ValueError, UnsupportedAlgorithm) as error:
        kind = (
            "a public key: give the private one"
            if data.startswith((b"ssh-", b"ecdsa-"))
            else "no private key"
        )
        raise SSHLoginError(f"{path} is {kind}, or is damaged or of an unknown format ({error})") from error
    pem = serialization.PrivateFormat.OpenSSH
    plain = serialization.NoEncryption()
    for kind_of_key, reader in (
        (rsa.RSAPrivateKey, paramiko.RSAKey),
        (ec.EllipticCurvePrivateKey, paramiko.ECDSAKey),
        (ed25519.Ed25519PrivateKey, paramiko.Ed25519Key),
    ):
        if isinstance(key, kind_of_key):
            text = key.private_bytes(serialization.Encoding.PEM, pem, plain).decode()
            loaded = reader.from_private_key(io.StringIO(text))
            if os.path.exists(f"{path}-cert.pub"):  # as ssh does
                with contextlib.suppress(OSError, ValueError, paramiko.SSHException):
                    loaded.load_certificate(f"{path}-cert.pub")
            return loaded
    raise SSHLoginError(f"The private key {path} is neither RSA, ECDSA nor Ed25519")


def own_keys() -> list[NamedKey]:
    """List the keys that ``ssh`` would try: those of the agent, then the unencrypted ones in ~/.ssh."""
    keys: list[NamedKey] = []
    with contextlib.suppress(paramiko.SSHException, OSError):
        keys += [(key, f"{key.comment or 'unnamed'} of the SSH agent") for key in paramiko.Agent().get_keys()]
    for name in ("id_ed25519", "id_ecdsa", "id_rsa"):
        path = os.path.expanduser(f"~/.ssh/{name}")
        with contextlib.suppress(SSHLoginError):
            keys.append((load_key(path, None), path))
    return keys


def keys_to_try(
    key_file: str | None, passphrase: str | None, password: str | None, identities: Sequence[str] = ()
) -> list[NamedKey]:
    """List the keys to log in with: that of a file, or the user's own without a file and a password.

    :param key_file: the file of a private key; ``~`` is the user's home.
    :param passphrase: what opens that file, where it is encrypted.
    :param identities: further files, which the user's settings name for this host; those that cannot be
        read, or are encrypted, are passed over.
    :returns: each with where it is from.
    :raises SSHLoginError: where the file is of no use, or there is neither a key nor a password.
    """
    if key_file:
        path = os.path.expanduser(key_file)
        return [(load_key(path, passphrase), path)]
    keys: list[NamedKey] = []
    for identity in identities:
        with contextlib.suppress(SSHLoginError):
            keys.append((load_key(os.path.expanduser(identity), None), identity))
    if not password:
        keys += [(key, origin) for key, origin in own_keys() if all(key != there for there, _ in keys)]
    if not keys and not password:
        raise SSHLoginError(
            "SSH needs a key or a password: give private_key_file or password. The SSH agent has no key, "
            "and ~/.ssh none that is unencrypted"
        )
    return keys
