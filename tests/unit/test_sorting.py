"""Lists are sorted by what is shown, and nothing is written out for it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import requests

from tests.controlplane import KEY_ID, SECRET, serve
from tests.unit.test_history import busy_world
from tests.unit.test_scheduler import World
from yellowdog_ray.local import sorting, wire

KINDS: list[tuple[sorting.Values, Callable[[World], Iterable[Any]], Callable[[Any], dict[str, Any]]]] = [
    (sorting.SORT_WORK, lambda w: w.scheduler.works.values(), wire.work_summary),
    (sorting.SORT_TASKS, lambda w: w.scheduler.tasks.values(), wire.task_json),
    (sorting.SORT_POOLS, lambda w: w.scheduler.pools.values(), wire.pool_summary),
    (sorting.SORT_NODES, lambda w: w.scheduler.nodes.values(), wire.node_json),
    (sorting.SORT_COMPUTE, lambda w: w.scheduler.requirements.values(), wire.requirement_json),
    (sorting.SORT_COMPUTE_SUMMARIES, lambda w: w.scheduler.requirements.values(), wire.requirement_summary),
    (sorting.SORT_INSTANCES, lambda w: w.scheduler.instances.values(), wire.instance_json),
    (sorting.SORT_TEMPLATES, lambda w: w.scheduler.templates.values(), wire.template_summary),
    (sorting.SORT_SOURCES, lambda w: w.scheduler.templates.values(), wire.source_template_summary),
]


def varied_world() -> World:
    """A world in which most fields of things of a kind differ, at different times."""
    world = busy_world()
    world.pass_time(100)
    world.pool("later", nodes=2, workerTag="other")
    world.pass_time(50)
    work = world.work(2, name="again", run={"workerTags": ["other"]}, tag="a")
    world.add(work, tag="z", name="tagged", timeout=70.0)
    world.start()
    world.pass_time(10)
    world.end_task(work.groups[0].tasks[0])
    world.scheduler.cancel_task(work.groups[0].tasks[1].id, True, world.now)
    world.collect()
    lost = next(iter(world.up))
    world.lose(lost)
    return world


@pytest.mark.parametrize("number", range(len(KINDS)), ids=[kind[2].__name__ for kind in KINDS])
def test_each_field_sorts_as_it_is_shown(number: int) -> None:
    """A field's value and what is shown of it put things in the same order; what lacks it is first."""
    values, things_of, write = KINDS[number]
    things = list(things_of(varied_world()))
    differing = 0
    for field, value in values.items():
        ordered = sorted(things, key=lambda each: (value(each) is not None, value(each)))
        shown = [write(each).get(field) for each in ordered]
        assert shown == sorted(shown, key=lambda text: (text is not None, text)), field
        # The same for all, or not the same in both.
        differ = len(set(map(str, shown))) > 1
        assert (len({value(each) for each in things}) > 1) == differ, field
        differing += differ
    assert differing >= min(len(values) // 2, 5) or len(things) == 1


def test_only_a_slice_is_written_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long a sorted list is, a slice costs what it holds."""
    written: list[Any] = []

    def write(node: Any) -> dict[str, Any]:
        written.append(node)
        return node_json(node)

    node_json = wire.node_json
    monkeypatch.setattr(wire, "node_json", write)
    headers = {"Authorization": f"yd-key {KEY_ID}:{SECRET}"}
    usage = {
        "templateId": "test/small",
        "requirementName": "pool",
        "requirementNamespace": "test",
        "targetInstanceCount": 50,
    }
    with serve(clock="virtual", boot_delay=1) as platform:
        body = {"requirementTemplateUsage": usage, "provisionedProperties": {}}
        made = requests.post(
            f"{platform.url}/workerPools/provisioned/template", json=body, headers=headers, timeout=5
        )
        assert made.status_code == 200
        platform.advance(1)
        url = f"{platform.url}/workerPools/nodes?sortField=id&sortDirection=DESCENDING&size=20"
        ids, slice_id = [], "0"
        while slice_id:
            answer = requests.get(f"{url}&sliceId={slice_id}", headers=headers, timeout=5).json()
            ids += [node["id"] for node in answer["items"]]
            slice_id = answer.get("nextSliceId")
    assert ids == sorted(ids, reverse=True)
    assert len(ids) == len(written) == 50
