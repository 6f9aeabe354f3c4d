"""The errors that this library raises, each of them for a person to read.

::

    RayDogError
    ├── SpecError (ValueError)            bad input, refused before anything is created
    ├── StateError (ValueError)           a saved state that cannot be used
    ├── ClusterStateError (RuntimeError)  a call that the cluster's present state does not allow
    ├── PlatformError                     the YellowDog platform answered with an error
    │   ├── CredentialsError              it does not accept the application key
    │   ├── NotFoundError                 it does not know what was asked for
    │   ├── NameTakenError                something that is not ours stands under our name
    │   └── PlatformUnreachableError (ConnectionError)   no answer at all
    ├── BuildError                        a cluster or pool could not be built; it was taken back
    │   └── BuildTimeoutError (TimeoutError)
    ├── TeardownError                     something may still be running; ``still_running`` lists it
    ├── WaitTimeoutError (TimeoutError)   what was waited for did not come in time
    ├── TunnelError (OSError)             an SSH connection or tunnel could not be made
    │   ├── HostKeyError                  the server is not the one that was expected
    │   └── SSHLoginError                 the server does not let the user in, or there is no key to try
    └── LocalPlatformError                the embedded platform could not start or work
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = [
    "BuildError",
    "BuildTimeoutError",
    "ClusterStateError",
    "CredentialsError",
    "HostKeyError",
    "LocalPlatformError",
    "NameTakenError",
    "NotFoundError",
    "PlatformError",
    "PlatformUnreachableError",
    "RayDogError",
    "SSHLoginError",
    "SpecError",
    "StateError",
    "TeardownError",
    "TunnelError",
    "WaitTimeoutError",
]


class RayDogError(Exception):
    """The base of every error that this library raises on purpose."""


class SpecError(RayDogError, ValueError):
    """Input that cannot work, refused before anything was created."""


class StateError(RayDogError, ValueError):
    """A saved state that cannot be read or used."""


class ClusterStateError(RayDogError, RuntimeError):
    """A call that the present state of the cluster does not allow."""


class PlatformError(RayDogError):
    """The YellowDog platform answered a call with an error.

    :param message: what was tried and what the platform said.
    :param status: the HTTP status, where it is known.
    """

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class CredentialsError(PlatformError):
    """The platform does not accept the application key, or it may not do this."""


class NotFoundError(PlatformError):
    """The platform does not know what was asked for."""


class NameTakenError(PlatformError):
    """Something that is not this cluster's own stands under a name that it needs."""


class PlatformUnreachableError(PlatformError, ConnectionError):
    """The platform could not be reached, or never answered."""


class BuildError(RayDogError):
    """A cluster or pool could not be built; what had been created was taken back."""


class BuildTimeoutError(BuildError, TimeoutError):
    """The build took longer than it was allowed to; what had been created was taken back."""


class TeardownError(RayDogError):
    """Not everything could be verified as gone.

    :param message: what failed, one line each, and what to do next.
    :param still_running: the ids and names of what may still be running.
    """

    def __init__(self, message: str, still_running: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.still_running = list(still_running)


class WaitTimeoutError(RayDogError, TimeoutError):
    """What was waited for did not come in time; the message says what there was and what was wanted."""


class TunnelError(RayDogError, OSError):
    """An SSH tunnel could not be made or kept."""


class HostKeyError(TunnelError):
    """An SSH server's key is not the one that was expected; it was shown no user name, password or key."""


class SSHLoginError(TunnelError):
    """An SSH server does not let the user in, or there is no key or password to try."""


class LocalPlatformError(RayDogError):
    """The embedded platform could not start, or could not make a node."""
