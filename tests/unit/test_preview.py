"""What a build will send: the plan's own objects, with placeholders and masks."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from datetime import timedelta

import pytest
from yellowdog_client.common.json import Json

from yellowdog_ray.raydog import plan
from yellowdog_ray.raydog.preview import (
    BUILD_ID,
    HEAD_IP,
    MASK,
    OBSERVABILITY_IP,
    ClusterPlan,
    PlannedRequest,
    preview,
)
from yellowdog_ray.raydog.scripts import get_script
from yellowdog_ray.raydog.specs import ClusterSpec, NodeSpec, WorkerPoolSpec

NODE = NodeSpec(template="ns/tpl", images_id="ami-1", userdata="#cloud\nboot", instance_tags={"a": "B"})
LIFETIME = timedelta(hours=3)
CLUSTER = ClusterSpec(
    name="ray", namespace="ns", tag="team", head=NODE, observability=NODE, lifetime=LIFETIME
)
HEAD = plan.head_pool(CLUSTER, "head script\n  line 2")
WATCH = plan.observability_pool(CLUSTER, NODE, "watch script")


def workers(count: int, number: int = 1, node: NodeSpec = NODE) -> plan.PoolPlan:
    return plan.worker_pool(CLUSTER, number, WorkerPoolSpec(node=node, node_count=count), "worker\nscript")


POOLS = [HEAD, WATCH, workers(1), workers(2500, 2)]
PLAN = preview(CLUSTER, POOLS, token=True)


def test_requests_are_in_the_order_of_the_build():
    assert [(request.method, request.path) for request in PLAN.requests] == [
        ("POST", "/work/requirements"),
        *[("POST", "/workerPools/provisioned/template")] * 4,
        ("POST", "/work/taskGroups/<id of group head-node>/tasks"),
        ("POST", "/work/taskGroups/<id of group observability-node>/tasks"),
        ("POST", "/work/taskGroups/<id of group worker-nodes-01>/tasks"),
        ("POST", "/work/taskGroups/<id of group worker-nodes-02>/tasks"),
    ]
    assert PLAN.nodes == 2503


def test_the_work_requirement_is_the_plans():
    assert PLAN.requests[0].body == Json.dump(plan.work_requirement(CLUSTER, POOLS, LIFETIME, BUILD_ID))
    assert preview(CLUSTER, POOLS, "f00", token=True).requests[0].body["taskGroups"][0]["tag"] == "f00"


@pytest.mark.parametrize("timeout", [None, timedelta(minutes=5), timedelta(days=2)])
def test_the_pools_are_the_plans(timeout):
    requests = preview(CLUSTER, POOLS, token=True, build_timeout=timeout).requests[1:5]
    for pool, request in zip(POOLS, requests, strict=True):
        usage, properties = plan.pool_request(
            CLUSTER, pool, LIFETIME, BUILD_ID, plan.pool_idle_timeout(timeout)
        )
        assert request.body == {
            "requirementTemplateUsage": Json.dump(usage),
            "provisionedProperties": Json.dump(properties),
        }


def test_the_pools_are_what_the_sdk_sends():
    """The SDK's own client makes the same body and path of the same objects."""
    from yellowdog_client.scheduler.worker_pool_service_proxy import WorkerPoolServiceProxy

    sent = []

    class Proxy:
        def append_base_url(self, base):
            self.base = base
            return self

        def post(self, _type, data, url):
            sent.append(PlannedRequest("POST", self.base + url, Json.dump(data)))

    usage, properties = plan.pool_request(CLUSTER, HEAD, LIFETIME, BUILD_ID, plan.pool_idle_timeout(None))
    WorkerPoolServiceProxy(Proxy()).provision_worker_pool(usage, properties)
    assert sent == [PLAN.requests[1]]


def test_the_tasks_are_the_plans():
    """A single task is what is sent; several are told by the first, the count and the names."""
    addresses = {"head": HEAD_IP, "observability": OBSERVABILITY_IP, "worker": None}
    for pool, request in zip(POOLS, PLAN.requests[5:], strict=True):
        variables = plan.environment(
            pool.role,
            head_ip=HEAD_IP,
            node_ip=addresses[pool.role],
            observability_ip=OBSERVABILITY_IP,
            token=MASK,
        )
        batches = [Json.dump(batch) for batch in plan.task_batches(pool, variables)]
        if pool.node_count == 1:
            assert [request.body] == batches
        else:
            assert request.body == {
                "first": batches[0][0],
                "count": 2500,
                "names": [batches[0][0]["name"], batches[-1][-1]["name"]],
                "calls": len(batches),
            }


def test_placeholders():
    text = PLAN.to_json()
    assert '"RAY_HEAD_IP": "<head\'s private address>"' in text
    assert '"OBSERVABILITY_HOST": "<observability node\'s private address>"' in text
    assert '"raydog-build": "<random build id>"' in text
    assert '"RAY_AUTH_TOKEN": "********"' in text
    bare = CLUSTER.model_copy(update={"observability": None})
    text = preview(bare, [plan.head_pool(bare, "s"), workers(3)], token=False).to_json()
    assert "observability" not in text.lower()
    assert "RAY_AUTH" not in text


def test_secrets_are_masked_wherever_they_are():
    node = NodeSpec(
        template="ns/tpl",
        userdata="#cloud\nkey: hidden-long-one",
        images_id="ami-hidden",
        instance_tags={"note": "is hidden here", "hidden": "x"},
    )
    cluster = ClusterSpec(name="ray", namespace="ns", tag="a hidden tag", head=node)
    pools = [
        plan.head_pool(cluster, "export KEY=hidden-long-one\nhidden"),
        plan.worker_pool(
            cluster, 1, WorkerPoolSpec(node=node, node_count=9, internal_name="hidden"), "hidden"
        ),
    ]
    made = preview(cluster, pools, token=True, secrets=["hidden", "hidden-long-one", ""])
    for text in (made.to_json(), str(made), repr(made), made._repr_html_(), str(made.to_dict())):
        assert "hidden" not in text
        assert "long-one" not in text
    assert "ns/tpl" in made.to_json()


@pytest.mark.parametrize(
    ("name", "masked"),
    [
        ("token", True),
        ("my_token", True),
        ("wandb-api-key", True),
        ("db_password_2", True),
        ("aws.secrets", True),
        ("apikey", True),
        ("db-passwd", True),
        ("accesstoken2", True),
        ("git.credentials", True),
        ("keyboard", False),
        ("monkey", False),
        ("tokenizer", False),
        ("owner", False),
    ],
)
def test_values_of_secret_names_are_masked(name, masked):
    node = NodeSpec(template="ns/tpl", instance_tags={name: "visible"})
    cluster = ClusterSpec(name="ray", namespace="ns", head=node)
    tags = (
        preview(cluster, [plan.head_pool(cluster, "s")], token=True)
        .requests[1]
        .body["requirementTemplateUsage"]["instanceTags"]
    )
    assert tags[name] == (MASK if masked else "visible")
    assert tags[plan.BUILD_TAG] == BUILD_ID


def test_json_comes_back():
    written = PLAN.to_json()
    assert json.loads(written) == PLAN.to_dict()
    again = json.loads(written)
    requests = tuple(PlannedRequest(**request) for request in again.pop("requests"))
    assert ClusterPlan(**again, requests=requests) == PLAN
    assert len(PLAN.to_json(indent=None).splitlines()) == 1


def test_what_is_handed_out_is_a_copy():
    PLAN.to_dict()["requests"][0]["body"].clear()
    assert PLAN.requests[0].body


def test_text_holds_each_script_once_as_it_is():
    lines = str(PLAN).splitlines()
    assert lines[0] == "Plan of the cluster ns/ray: 2503 nodes"
    assert "POST /work/taskGroups/<id of group worker-nodes-02>/tasks" in lines
    assert sum(line.strip() == "|   line 2" for line in lines) == 1
    # The two worker pools have one script.
    assert sum(line.strip() == "| worker" for line in lines) == 1
    assert any("see above" in line for line in lines)
    assert "  count: 2500" in lines
    assert '  names: ["worker-nodes-02-00001", "worker-nodes-02-02500"]' in lines


def test_text_of_the_default_scripts_is_all_there():
    cluster = ClusterSpec(name="ray", namespace="ns", head=NODE)
    script = get_script("head")
    text = str(preview(cluster, [plan.head_pool(cluster, script)], token=True))
    assert all(line in text for line in script.splitlines())


def test_a_terminal_is_told_nothing_to_do():
    cluster = ClusterSpec(name="ray", namespace="ns", head=NODE)
    text = str(preview(cluster, [plan.head_pool(cluster, "a\n\techo \x1b[2J\x9b")], token=True))
    assert "\\x1b[2J\\x9b" in text
    assert "\x1b" not in text


def test_html_is_escaped():
    cluster = ClusterSpec(name="ray", namespace="ns", head=NODE)
    html = preview(cluster, [plan.head_pool(cluster, "<script>\n</pre>")], token=True)._repr_html_()
    assert "<script" not in html
    assert html.count("</pre>") == html.count("<pre>") == 3


def test_the_repr_is_short():
    assert repr(PLAN) == "ClusterPlan(cluster_name='ray', cluster_namespace='ns', nodes=2503)"


def test_large_pools_are_small_and_fast():
    pools = [HEAD, WATCH, *(workers(10_000, number) for number in range(1, 11))]
    begun = time.perf_counter()
    made = preview(CLUSTER, pools, token=True, secrets=["hidden"])
    text = made.to_json()
    assert time.perf_counter() - begun < 5
    assert len(text) < 60_000
    assert text.count("-00001") == 20
    assert made.nodes == 100_002


def test_importing_it_does_not_import_the_sdk():
    code = "import sys, yellowdog_ray.raydog.preview; print('yellowdog_client' in sys.modules)"
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert output.strip() == "False"
