"""The life cycles of YellowDog's things: which status may follow which.

The statuses are YellowDog's own words (the enums of the SDK's model). Every change of a status goes
through these tables, so that a wrong one is an error at once and never a wrong answer later.
"""

from __future__ import annotations

__all__ = [
    "GROUP_NEXT",
    "INSTANCE_NEXT",
    "NODE_NEXT",
    "POOL_NEXT",
    "REQUIREMENT_NEXT",
    "TASK_NEXT",
    "WORK_NEXT",
    "illegal",
]


def _table(**rows: str) -> dict[str, frozenset[str]]:
    return {status: frozenset(row.split()) for status, row in rows.items()}


_TASK_ENDS = "COMPLETED FAILED ABORTED RESUBMITTED READY"

TASK_NEXT = _table(
    PENDING="READY CANCELLED DISCARDED",
    READY="ALLOCATED CANCELLED DISCARDED",
    # ALLOCATED to COMPLETED never happens: a process that ends was EXECUTING first.
    ALLOCATED="EXECUTING FAILED ABORTED RESUBMITTED READY",
    EXECUTING=_TASK_ENDS,
)
GROUP_NEXT = _table(
    PENDING="RUNNING HELD FINISHING COMPLETED FAILING CANCELLING",
    RUNNING="PENDING HELD FINISHING COMPLETED FAILING CANCELLING",
    HELD="PENDING FINISHING CANCELLING",
    FINISHING="COMPLETED FAILING CANCELLING",
    FAILING="FAILED CANCELLING",
    CANCELLING="CANCELLED",
)
WORK_NEXT = _table(
    RUNNING="HELD FINISHING CANCELLING COMPLETED FAILED",
    HELD="RUNNING FINISHING CANCELLING",
    FINISHING="CANCELLING COMPLETED FAILED",
    CANCELLING="CANCELLED",
)
POOL_NEXT = _table(
    PENDING="EMPTY IDLE RUNNING SHUTDOWN",
    EMPTY="IDLE RUNNING SHUTDOWN",
    IDLE="RUNNING EMPTY SHUTDOWN",
    RUNNING="IDLE EMPTY SHUTDOWN",
    SHUTDOWN="TERMINATED",
)
NODE_NEXT = _table(
    RUNNING="DEREGISTERED LOST TERMINATED",
    DEREGISTERED="TERMINATED",
)
REQUIREMENT_NEXT = _table(
    NEW="PROVISIONING RUNNING TERMINATING",
    PROVISIONING="RUNNING TERMINATING",
    RUNNING="PROVISIONING TERMINATING",
    TERMINATING="TERMINATED",
)
INSTANCE_NEXT = _table(
    PENDING="RUNNING TERMINATING TERMINATED",
    RUNNING="TERMINATING TERMINATED",
    TERMINATING="TERMINATED",
)


def illegal(kind: str, old: str, new: str) -> AssertionError:
    """Return the error for a status change that the tables do not know: a fault of the scheduler."""
    return AssertionError(f"the scheduler tried to move a {kind} from {old} to {new}")
