"""The kinds of node that this machine can have, and what each of them cannot do."""

from __future__ import annotations

import enum
from collections.abc import Mapping

__all__ = ["LACKS", "Isolation"]


class Isolation(str, enum.Enum):
    """How far the nodes on this machine are apart from each other and from the user's own processes."""

    NAMESPACES = "namespaces"
    """As root: network, PID, mount, IPC and host name namespaces; nodes can be reached at their address."""
    USER_NAMESPACES = "user-namespaces"
    """The same inside an unprivileged user namespace; nodes are reached by SSH at a loopback address."""
    PROCESSES = "processes"
    """Plain processes with loopback addresses of their own, which share this machine's ports and /tmp."""

    def sentence(self) -> str:
        """Say it to the user."""
        return {
            Isolation.NAMESPACES: "network, PID and mount namespaces (root)",
            Isolation.USER_NAMESPACES: "namespaces inside an unprivileged user namespace",
            Isolation.PROCESSES: "plain processes with loopback addresses",
        }[self]


LACKS: Mapping[Isolation, frozenset[str]] = {
    Isolation.NAMESPACES: frozenset({"way-out"}),
    Isolation.USER_NAMESPACES: frozenset({"way-out", "direct-address"}),
    Isolation.PROCESSES: frozenset(
        {"own-hostname", "own-ports", "own-processes", "own-tmp", "seen-limits", "system-sshd"}
    ),
}
"""What each kind of node cannot do; the documentation of the local platform says why of each name."""
