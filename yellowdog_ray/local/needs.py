"""What a local platform needs of the machine that it is to run on."""

from __future__ import annotations

import socket
import sys
from typing import TYPE_CHECKING

from yellowdog_ray.errors import LocalPlatformError
from yellowdog_ray.local.host import NODE_MEMORY, free_memory
from yellowdog_ray.raydog import ports

if TYPE_CHECKING:
    from yellowdog_ray.local.isolation import Isolation

__all__ = ["require_linux", "require_memory", "require_packages", "require_ray_ports"]

_RAY_PORTS = (ports.GCS, ports.NODE_METRICS, ports.DASHBOARD, ports.CLIENT)


def require_linux() -> None:
    """Say at once where no node can be made, and what can be done there.

    :raises LocalPlatformError: on any system but Linux.
    """
    if sys.platform != "linux":
        raise LocalPlatformError(
            f"the local platform's nodes need Linux, and this is {sys.platform}: start it in a Linux "
            "container or virtual machine (no privileges are needed there). LocalControlPlane, whose nodes "
            "are simulated, and clusters on YellowDog work here too"
        )


def require_packages() -> None:
    """Say what is missing where the package was installed without the extra ``local``.

    :raises LocalPlatformError: where a package is missing.
    """
    try:
        import jinja2  # noqa: F401
        import pyroute2  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise LocalPlatformError(
            f"the local platform needs the package {error.name}: pip install 'yellowdog-ray[local,ray]'"
        ) from None


def require_memory() -> None:
    """Refuse to start where there is too little free memory for a node.

    :raises LocalPlatformError: where there is.
    """
    if free_memory() < NODE_MEMORY:
        raise LocalPlatformError(
            f"too little memory: {free_memory() >> 20} MiB are free, "
            f"one Ray node needs {NODE_MEMORY >> 20} MiB"
        )


def require_ray_ports(isolation: Isolation) -> None:
    """Refuse to start where plain processes would meet somebody else's Ray on its ports.

    :param isolation: the kind of node.
    :raises LocalPlatformError: where one of the ports is taken.
    """
    for port in _RAY_PORTS:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("0.0.0.0", port))  # noqa: S104
            except OSError as error:
                raise LocalPlatformError(
                    f"port {port} is taken on this machine ({error.strerror}), and nodes that are "
                    f"{isolation.sentence()} share its ports: end what uses it, or start the platform "
                    "where it can make namespaces"
                ) from None
