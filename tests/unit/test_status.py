"""How a status reads: as a text, as JSON and as HTML."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import datetime, timezone
from types import MappingProxyType

import pytest

from yellowdog_ray.raydog.status import ClusterStatus, NodeFailure, PoolStatus, one_line

HEAD = PoolStatus("ray-00-head", "head-node", "head", "ydid:1", 1, 1, 1, status="RUNNING")
WATCH = PoolStatus("ray-observability", "observability-node", "observability", "ydid:2", 1, 1, 1)
SMALL = PoolStatus("ray-01-wrkrs", "small", "worker", "ydid:3", 4, 3, 2, status="RUNNING")
LARGE = PoolStatus("ray-02-wrkrs", "large", "worker", None, 200, None, 0)
WHEN = datetime(2030, 1, 2, 3, 4, 5, 678, tzinfo=timezone.utc)
STATUS = ClusterStatus(
    "ray",
    "ns",
    "running",
    work_requirement_id="ydid:4",
    work_requirement_status="RUNNING",
    head_private_ip="10.0.0.1",
    head_public_ip="52.0.0.1",
    pools=MappingProxyType({pool.internal_name: pool for pool in (HEAD, WATCH, SMALL, LARGE)}),
    lifetime_ends=WHEN,
    checked=WHEN,
)
EMPTY = ClusterStatus("ray", "ns", "not built yet")
SCRIPT = "<script>alert('x')</script>"


def with_pool(pool: PoolStatus) -> ClusterStatus:
    return replace(STATUS, pools={**STATUS.pools, pool.internal_name: pool})


def failures(count: int) -> tuple[NodeFailure, ...]:
    reason = "\n it is FAILED {}\nsecond line"
    return tuple(NodeFailure(f"task-{n:05d}", reason.format(n), "ydid:n") for n in range(count))


def test_text():
    assert str(STATUS).splitlines() == [
        "Cluster ns/ray: running, head at 10.0.0.1 (public 52.0.0.1), work requirement RUNNING, "
        "ends at 2030-01-02 03:04:05+00:00",
        "  pool                name               wanted  registered  executing  failed  status",
        "  head-node           ray-00-head             1           1          1       0  RUNNING",
        "  observability-node  ray-observability       1           1          1       0  ?",
        "  small               ray-01-wrkrs            4           3          2       0  RUNNING",
        "  large               ray-02-wrkrs          200           ?          0       0  ?",
    ]


def test_sums_count_the_worker_pools_alone():
    status = with_pool(replace(SMALL, failed=failures(2)))
    assert (status.wanted_workers, status.registered_workers) == (204, 3)
    assert (status.executing_workers, status.failed_workers) == (2, 2)
    assert (EMPTY.wanted_workers, EMPTY.registered_workers, EMPTY.executing_workers) == (0, 0, 0)


@pytest.mark.parametrize(
    ("status", "healthy"),
    [
        (STATUS, True),
        (EMPTY, False),
        (replace(STATUS, phase="shut down"), False),
        (replace(STATUS, drift=("it is elsewhere",)), False),
        (replace(STATUS, failure="the head has ended"), False),
        (with_pool(replace(SMALL, failed=failures(1))), False),
        (with_pool(replace(HEAD, failed=failures(1))), False),
        (with_pool(replace(SMALL, failed=failures(2), unfinished=3)), False),
        (with_pool(replace(SMALL, failed=failures(2), unfinished=4)), True),
        (with_pool(replace(SMALL, failed=failures(2), unfinished=5)), True),
        # Somebody has cancelled one.
        (with_pool(replace(SMALL, unfinished=3)), False),
        (with_pool(replace(SMALL, problem="no capacity")), False),
    ],
)
def test_healthy(status, healthy):
    assert status.healthy is healthy
    assert status.to_dict()["healthy"] is healthy


def test_what_is_wrong_is_said():
    status = replace(
        with_pool(replace(SMALL, failed=failures(5), problem="no capacity\nin any zone")),
        drift=("The pool large is not there",),
        failure="the head node's task is FAILED",
    )
    assert str(status).splitlines()[6:] == [
        "  Problem of small: no capacity",
        "  Failed: task-00000 (node ydid:n): it is FAILED 0",
        "  Failed: task-00001 (node ydid:n): it is FAILED 1",
        "  Failed: task-00002 (node ydid:n): it is FAILED 2",
        "  Failed: and 2 more of small",
        "  Drift: The pool large is not there",
        "  The cluster has ended: the head node's task is FAILED",
    ]


@pytest.mark.parametrize("count", [3, 4, 10_000])
def test_many_failures_stay_short(count):
    status = with_pool(replace(SMALL, failed=failures(count)))
    text = str(status)
    assert text.count("it is FAILED") == 3
    assert ("and 9997 more" in text) == (count == 10_000)
    assert ("more of" in text) == (count > 3)
    assert len(status._repr_html_()) < 3000
    assert len(status.to_dict()["pools"]["small"]["failed"]) == count


def test_missing_nodes_are_said():
    """A task that was cancelled has not failed, and nobody comes in its place."""
    status = with_pool(replace(SMALL, failed=failures(1), unfinished=2))
    assert "  Missing: 2 of 4 nodes of small: they have no task" in str(status).splitlines()


def test_json():
    status = with_pool(replace(SMALL, failed=failures(1)))
    written = status.to_dict()
    assert json.loads(json.dumps(written)) == written
    assert list(written["pools"]) == ["head-node", "observability-node", "small", "large"]
    assert written["pools"]["small"]["failed"] == [
        {"task": "task-00000", "reason": "\n it is FAILED 0\nsecond line", "node_id": "ydid:n"}
    ]
    assert datetime.fromisoformat(written["checked"]) == WHEN
    fields = set(ClusterStatus.__dataclass_fields__)
    sums = {"wanted_workers", "registered_workers", "executing_workers", "failed_workers"}
    assert set(written) == fields | sums | {"healthy"}


def test_empty():
    assert str(EMPTY) == "Cluster ns/ray: not built yet"
    assert EMPTY._repr_html_() == "<div><p>Cluster ns/ray: not built yet</p></div>"
    assert EMPTY.to_dict()["pools"] == {}
    assert EMPTY.to_dict()["checked"] is None


def test_html_is_escaped():
    pool = PoolStatus(
        SCRIPT, SCRIPT, "worker", SCRIPT, 1, 1, 1, (NodeFailure(SCRIPT, SCRIPT, SCRIPT),), SCRIPT, SCRIPT
    )
    status = ClusterStatus(
        SCRIPT, SCRIPT, SCRIPT, SCRIPT, SCRIPT, SCRIPT, SCRIPT, {SCRIPT: pool}, (SCRIPT,), SCRIPT
    )
    html = status._repr_html_()
    assert "<script" not in html
    assert "&lt;script&gt;" in html
    assert "color" not in html
    assert html.count("<td>") == 7


def test_a_terminal_is_told_nothing_to_do():
    reason = "\x1b[2J\x1b]0;title\x07gone\u202e\r\nmore"
    status = with_pool(replace(SMALL, failed=(NodeFailure("task", reason),), internal_name="a\x1b[31mb"))
    text = str(status)
    assert all(character.isprintable() or character == "\n" for character in text)
    assert "gone" in text
    assert "more" not in text


@pytest.mark.parametrize(
    ("text", "line"), [("", ""), ("\n \n", ""), ("\n a\tb \nc", "a b"), ("one", "one"), ("a\rb", "a")]
)
def test_one_line(text, line):
    assert one_line(text) == line
