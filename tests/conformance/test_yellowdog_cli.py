"""The unmodified ``yellowdog-cli``, run as its users run it, against the local platform's API.

What it says its exit statuses mean (``yellowdog_cli.utils.exit_codes``): 0 done, or nothing was left to do;
1 the operation or the work failed, among it what the platform refuses as ``InvalidRequestException``;
2 wrong usage; 3 wrong configuration; 4 the key is not known (HTTP 401); 5 not allowed (403); 6 not there
(404), among it a route that the platform does not have; 7 a fault of the platform (5xx). Status 8, no
connection, is left out: the SDK tries for half a minute before the CLI says so.

A start of the CLI costs more than a second, so each test goes a whole way, and what does not depend on each
other runs at the same time.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.controlplane import Fault, Served, serve
from yellowdog_ray.local.scheduler import Scheduler, SchedulerOptions

YD = Path(sys.executable).parent / "yd"
pytestmark = pytest.mark.skipif(not YD.exists(), reason="yellowdog-cli is not installed beside this Python")

CONFIG = """
[common]
key = "{key}"
secret = "{secret}"
url = "{url}"
namespace = "test"
tag = "{tag}"
[{section}]
templateId = "test/small"
targetInstanceCount = 2
{more}
"""
POOL = 'maxNodes = 3\nworkerTag = "{tag}"\n[workRequirement]\ntaskType = "bash"\nworkerTags = ["{tag}"]\n'
NONE = "00000000-0000-0000-0000-000000000000"


class Cli:
    """``yd`` in a directory of its own, with a configuration whose tag no other test has."""

    def __init__(self, platform: Served, directory: Path, tag: str) -> None:
        self.platform, self.directory, self.tag = platform, directory, tag
        self.configure("config.toml", "workerPool", POOL.format(tag=tag))
        self.configure("compute.toml", "computeRequirement", "")

    def configure(self, name: str, section: str, more: str) -> None:
        platform = self.platform
        self.write(
            name,
            CONFIG.format(
                key=platform.key_id,
                secret=platform.secret,
                url=platform.url,
                tag=self.tag,
                section=section,
                more=more,
            ),
        )

    def write(self, name: str, content: Any) -> None:
        text = content if isinstance(content, str) else json.dumps(content)
        (self.directory / name).write_text(text)

    def __call__(self, *arguments: object, status: int = 0) -> str:
        """Run one command, without colours; return what it printed.

        :param status: the exit status that it must have.
        """
        kept = {key: value for key, value in os.environ.items() if not key.startswith("YD_")}
        # ``yd doctor`` looks for newer versions of itself: not from here, through a proxy that is not there.
        quiet = {"HTTPS_PROXY": "http://127.0.0.1:9", "NO_PROXY": "127.0.0.1", "HOME": str(self.directory)}
        done = subprocess.run(
            [str(YD), *map(str, arguments), "--nf"],
            check=False,
            cwd=self.directory,
            env={**kept, **quiet},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60,
        )
        assert done.returncode == status, f"yd {' '.join(map(str, arguments))}:\n{done.stdout}"
        return done.stdout

    def do(self, *arguments: object, status: int = 0) -> str:
        """Run a command that asks whether it may, and let it."""
        return self(*arguments, "-y", status=status)

    def shown(self, *arguments: object) -> Any:
        """Run a command that shows something."""
        found = re.search(r"^\{.*^\}", self(*arguments), re.MULTILINE | re.DOTALL)
        assert found is not None
        return json.loads(found[0])

    def id(self, *arguments: object) -> str:
        """Run a command that makes something, and return its id."""
        made = self(*arguments, "-q").strip()
        assert re.fullmatch(r"ydid:\w+:[0-9a-f:-]+", made), made
        return made

    def json(self, *arguments: object) -> Any:
        """Run a command that lists or shows something."""
        return json.loads(self(*arguments, "--json"))

    def look(self, look: Callable[[Scheduler], Any]) -> Any:
        """Return something of the platform's own state."""
        return self.platform.call(lambda: look(self.platform.core.scheduler))

    def until(self, look: Callable[[Scheduler], Any]) -> Any:
        """Wait until something of the platform's own state is so."""
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            if found := self.look(look):
                return found
            time.sleep(0.05)
        raise AssertionError("it did not come")


@pytest.fixture(scope="module")
def platform() -> Iterator[Served]:
    """One platform for the module."""
    with serve(boot_delay=0.05) as served:
        yield served


@pytest.fixture
def cli(platform: Served, tmp_path: Path, request: pytest.FixtureRequest) -> Cli:
    """The CLI, with the test's own name for its tag."""
    return Cli(platform, tmp_path, str(request.node.name).replace("test_", "").replace("_", "-")[:30])


def together(*calls: Callable[[], Any]) -> list[Any]:
    """Make calls that do not depend on each other at the same time; return what they return."""
    with ThreadPoolExecutor(3) as threads:
        return [future.result() for future in [threads.submit(call) for call in calls]]


def spec(**environment: str) -> dict[str, Any]:
    """A requirement of one group with one task, which behaves as its environment says."""
    tasks = [{"name": "only", "environment": environment}]
    return {"taskGroups": [{"name": "made", "tasks": tasks}]}


def test_who_and_what_is_there(cli: Cli) -> None:
    """The doctor is content; the application, and all that there may be none of, can be listed."""
    doctor, application, templates, sources, keyrings, allowances, families = together(
        # 0: every check passed; that there is no rclone is a warning.
        lambda: cli("doctor"),
        lambda: cli("application"),
        lambda: cli.json("resource", "list", "compute-requirement-templates"),
        lambda: cli.json("resource", "list", "compute-source-templates"),
        lambda: cli.json("resource", "list", "keyrings"),
        lambda: cli.json("allowance", "list"),
        lambda: cli.json("resource", "list", "image-families"),
    )
    assert " 0 FAIL" in doctor
    assert re.search(r"Authenticated +OK", doctor)
    assert "raydog-local" in application
    assert [each["name"] for each in templates] == ["small"]
    assert [each["name"] for each in sources] == ["small"]
    assert (keyrings, allowances, families) == ([], [], [])


def test_namespaces(cli: Cli) -> None:
    """A namespace is created and removed, and the platform knows it in between; templates cannot be made."""
    cli.write("ns.json", [{"resource": "Namespace", "name": "made-by-cli"}])
    strategy = "co.yellowdog.platform.model.SingleSourceProvisionStrategy"
    template = {
        "resource": "ComputeRequirementTemplate",
        "type": "co.yellowdog.platform.model.ComputeRequirementStaticTemplate",
        "namespace": "test",
        "name": "new",
        "strategyType": strategy,
        "sources": [{"sourceTemplateId": f"ydid:cst:000000:{NONE}"}],
    }
    cli.write("template.json", [template])
    cli.do("resource", "create", "ns.json")
    listed = cli.json("resource", "list", "namespaces")
    assert "made-by-cli" in {each["namespace"] for each in listed}
    _, refused = together(
        lambda: cli.do("resource", "remove", "ns.json"),
        # 1: there is no such route, and the answer names it.
        lambda: cli.do("resource", "create", "template.json", status=1),
    )
    assert "POST /compute/templates/requirements is not supported by the local platform" in refused
    assert "made-by-cli" not in cli.look(lambda scheduler: scheduler.known_namespaces())


def test_pool(cli: Cli) -> None:
    """A worker pool's whole way: provisioned, looked at, resized, shut down, gone."""
    pool = cli.id("workerpool", "provision")
    cli.until(lambda scheduler: len(scheduler.pool(pool).nodes) == 2)
    listed, shown, nodes, workers, _ = together(
        lambda: cli.json("workerpool", "list"),
        lambda: cli.shown("workerpool", "show", pool),
        lambda: cli.json("node", "list", "--within", pool),
        lambda: cli("worker", "list", "--within", pool),
        lambda: cli.do("workerpool", "resize", pool, 3),
    )
    assert [(each["id"], each["status"]) for each in listed] == [(pool, "IDLE")]
    assert (shown["properties"]["maxNodes"], shown["properties"]["workerTag"]) == (3, cli.tag)
    assert {node["details"]["provider"] for node in nodes} == {"ON_PREMISE"}
    assert workers.count("ydid:wrkr:") >= 2
    cli.until(lambda scheduler: scheduler.pool(pool).node_counts.get("RUNNING") == 3)
    ids = list(cli.look(lambda scheduler: list(scheduler.pool(pool).nodes)))
    cli.write("actions.json", {"actions": [{"type": "runCommand", "path": "x.sh"}]})
    shown, status, _, _, refused, exhaustion, size = together(
        lambda: cli.shown("node", "show", ids[2]),
        lambda: cli("node", "action", "--status", "--node", ids[2]),
        lambda: cli.do("node", "shutdown", ids[0]),
        lambda: cli.do("node", "terminate", ids[1]),
        # 1: node actions have no route here, and the answer names it.
        lambda: cli.do("node", "action", "--actions", "actions.json", "--node", ids[2], status=1),
        lambda: cli("workerpool", "show", pool, "--show-exhaustion", status=1),
        # 1: the CLI itself sees that the pool has at most three nodes.
        lambda: cli.do("workerpool", "resize", pool, 4, status=1),
    )
    assert shown["id"] == ids[2]
    assert "EMPTY" in status
    assert f"POST /workerPools/{pool}/actions is not supported by the local platform" in refused
    assert "PUT /allowances/requirement is not supported by the local platform" in exhaustion
    assert "outside Worker Pool" in size
    cli.until(
        lambda scheduler: [scheduler.node(each).status for each in ids] == ["TERMINATED"] * 2 + ["RUNNING"]
    )
    # 0: the pool is shut down and its machines are ended; both at once is no conflict.
    cli.do("workerpool", "shutdown", "--terminate", pool)
    requirement = cli.look(lambda scheduler: scheduler.pool(pool).requirement)
    waited, _, again, compute = together(
        # 0: a pool that has been shut down has come to its proper end.
        lambda: cli("workerpool", "wait", pool),
        # 0 and 0: there is nothing to do, which is no failure.
        lambda: cli.do("workerpool", "shutdown", "--terminate", pool),
        lambda: cli.do("workerpool", "resize", pool, 1),
        lambda: cli("cr", "wait", requirement.id),
    )
    assert "TERMINATED" in waited
    assert "TERMINATED" in again
    assert "TERMINATED" in compute
    assert requirement.status == "TERMINATED"


def test_work(cli: Cli) -> None:
    """Work is submitted, looked at, held, started, reordered, aborted in part and finished."""
    pool = cli.id("wp", "provision")
    work = cli.id("wr", "submit", "-C", 3)
    ids = [f"{work.replace(':workreq:', ':task:')}:1:{number}" for number in (1, 2, 3)]

    def counts(scheduler: Scheduler) -> dict[str, int]:
        return scheduler.work(work).groups[0].counts

    # Two nodes, and a third for the task that finds none: demand grows the pool to its bound.
    cli.until(lambda scheduler: counts(scheduler) == {"EXECUTING": 3})
    assert cli.look(lambda scheduler: scheduler.pool(pool).requirement.alive) == 3
    listed, shown, tasks, task, groups, compared, _ = together(
        lambda: cli.json("wr", "list"),
        lambda: cli.shown("wr", "show", work),
        lambda: cli.json("task", "list", "--within", work),
        lambda: cli.shown("task", "show", ids[0]),
        lambda: cli.json("taskgroup", "list", "--within", work),
        lambda: cli("wr", "compare", work, pool),
        lambda: cli.do("wr", "hold", work),
    )
    assert [(each["id"], each["totalTaskCount"]) for each in listed] == [(work, 3)]
    assert ids[0].rsplit(":", 1)[0] == f"{work.replace(':workreq:', ':task:')}:1"
    assert [group["taskSummary"]["taskCount"] for group in shown["taskGroups"]] == [3]
    assert [(each["id"], each["status"]) for each in tasks] == [(each, "EXECUTING") for each in ids]
    assert (task["id"], task["status"]) == (ids[0], "EXECUTING")
    assert len(groups) == 1
    assert "MATCHING" in compared
    assert cli.look(lambda scheduler: scheduler.work(work).status) == "HELD"
    cli.do("wr", "start", work)
    together(
        lambda: cli.do("wr", "priority", 5, work),
        lambda: cli.do("task", "abort", ids[0]),
    )
    found = cli.until(lambda scheduler: counts(scheduler).get("ABORTED") and scheduler.work(work))
    assert (found.status, found.priority) == ("RUNNING", 5.0)
    cli.do("wr", "finish", work)
    assert found.status == "FINISHING"
    *_, none = together(
        lambda: cli.do("wr", "cancel", "--abort", work),
        # 1: it ends, and CANCELLED is no success.
        lambda: cli("wr", "wait", work, status=1),
        lambda: cli.json("list", "work-requirements", "--name", "no-such-*"),
    )
    assert none == []
    assert (found.status, counts(cli.platform.core.scheduler)) == ("CANCELLED", {"ABORTED": 3})
    # 0: it has ended already, which is what was asked for.
    assert "CANCELLED" in cli.do("wr", "cancel", work)
    cli.do("wp", "shutdown", pool)


def test_ends_of_work(cli: Cli) -> None:
    """A requirement completes or fails as its tasks do, raw ones too, and groups can be added to it."""
    cli.id("wp", "provision")
    cli.write("well.json", spec(SIMULATED_SECONDS="0.2"))
    cli.write("badly.json", spec(SIMULATED_EXIT_CODE="3"))
    cli.write("held.json", spec(SIMULATED_SECONDS="0.1"))
    run = {
        "taskTypes": ["bash"],
        "workerTags": [cli.tag],
        "retryPolicy": {
            "maxRetries": 2,
            "retryErrors": {"includes": [{"processExitCodes": {"includes": [3]}}]},
        },
    }
    template = {"taskType": "bash", "environment": {"SIMULATED_EXIT_CODE": "3"}}
    raw_tasks = [{"name": f"raw-{number}"} for number in range(3)]
    group = {"name": "group", "runSpecification": run, "taskTemplate": template, "tasks": raw_tasks}
    cli.write(
        "raw.json", {"namespace": "test", "name": f"{cli.tag}-raw", "tag": cli.tag, "taskGroups": [group]}
    )
    *_, held = together(
        # 0: followed to COMPLETED.
        lambda: cli("wr", "submit", "--follow", "-E", "well.json"),
        # 1: followed to FAILED, and -E asks for that to count.
        lambda: cli("wr", "submit", "--follow", "-E", "badly.json", status=1),
        # 0: submitted; the CLI packs raw tasks with gzip.
        lambda: cli("wr", "submit", "--json-raw", "raw.json"),
        lambda: cli.id("wr", "submit", "--hold", "held.json"),
    )
    # 1: it fails after two retries of each task.
    cli("wr", "wait", f"{cli.tag}-raw", status=1)
    raw = cli.look(lambda scheduler: scheduler.work_named("test", f"{cli.tag}-raw"))
    assert [(task.status, task.retries) for task in raw.groups[0].tasks] == [("FAILED", 2)] * 3
    ended = cli.look(lambda scheduler: [w.status for w in scheduler.works.values() if w.tag == cli.tag])
    assert sorted(ended) == ["COMPLETED", "FAILED", "FAILED", "HELD"]
    more = spec(SIMULATED_SECONDS="0.1")
    more["taskGroups"][0]["name"] = "more"
    cli.write("more.json", more)
    cli("wr", "submit", "--add-to", held, "more.json")
    work = cli.look(lambda scheduler: scheduler.work(held))
    assert [(group.spec.name, group.counts) for group in work.groups] == [
        ("made", {"READY": 1}),
        ("more", {"READY": 1}),
    ]
    cli.do("wr", "start", held)
    # 0: both groups complete.
    cli("wr", "wait", held)
    assert work.status == "COMPLETED"


def test_compute(cli: Cli) -> None:
    """Machines without a pool: instantiated, resized, ended one by one, and all at the end."""
    compute = cli.id("cr", "instantiate", "-c", "compute.toml")
    requirement = cli.until(
        lambda scheduler: (found := scheduler.requirement(compute)).status == "RUNNING" and found
    )
    listed, instances, _, stopped = together(
        lambda: cli.json("cr", "list"),
        lambda: cli.json("instance", "list", "--within", compute),
        lambda: cli.do("cr", "autoshutdown", "--minutes", 60, compute),
        # 1: machines that can be stopped and started again are none of this platform's, and it says so.
        lambda: cli.do("cr", "stop", compute, status=1),
    )
    assert [each["id"] for each in listed] == [compute]
    assert len(instances) == 2
    assert "cannot stop and start machines (STOPPED refused)" in stopped
    assert requirement.auto_shutdown_time is not None
    cli.do("cr", "resize", compute, 4)
    cli.until(lambda scheduler: requirement.counts.get("RUNNING") == 4)
    one, two, *_ = [f"{compute}.{each}" for each in list(requirement.instances)]
    together(
        lambda: cli.do("instance", "deprovision", one),
        lambda: cli.do("instance", "terminate", two),
        # 1: see above.
        lambda: cli.do("instance", "stop", f"{compute}.{list(requirement.instances)[3]}", status=1),
    )
    cli.until(lambda scheduler: requirement.counts.get("TERMINATED") == 2)
    assert requirement.target == 3
    cli.do("cr", "reprovision", compute)
    cli.until(lambda scheduler: requirement.counts.get("RUNNING") == 3)
    cli.do("cr", "terminate", compute)
    waited, shown, _ = together(
        lambda: cli("cr", "wait", compute),
        lambda: cli.shown("cr", "show", compute),
        lambda: cli.do("cr", "terminate", compute),
    )
    assert "TERMINATED" in waited
    assert (shown["id"], shown["expectedInstanceCount"]) == (compute, 0)
    assert (requirement.status, requirement.alive) == ("TERMINATED", 0)


def test_exit_statuses(cli: Cli) -> None:
    """Each kind of failure comes to the CLI as what it is."""
    cli.configure("nothing.toml", "workerPool", "")
    cli.write("nothing.toml", "[common]\nnamespace = 'test'\ntag = 'none'\n")
    # A field that this platform cannot honour.
    usage = {"templateId": "test/small", "requirementName": "typed", "requirementNamespace": "test"}
    types = {"nodeConfiguration": {"nodeTypes": [{"name": "head", "count": 1}]}}
    cli.write("types.json", {"requirementTemplateUsage": usage, "provisionedProperties": types})
    cli.configure("unknown.toml", "workerPool", "")
    text = (cli.directory / "unknown.toml").read_text().replace("test/small", "test/none")
    cli.write("unknown.toml", text)
    cli.platform.faults.faults.append(Fault("GET", "^/images/families", 520))
    try:
        words, config, key, work, task, pool, route, template, field, broken = together(
            lambda: cli("wr", "no-such-verb", status=2),
            # 3: there is no key.
            lambda: cli("wr", "list", "-c", "nothing.toml", status=3),
            # 4: the answer is 401.
            lambda: cli("wr", "list", "--secret", "wrong", status=4),
            # 6: three things that are not there.
            lambda: cli("wr", "show", f"ydid:workreq:000000:{NONE}", status=6),
            lambda: cli.do("task", "abort", f"ydid:task:000000:{NONE}:1:1", status=6),
            lambda: cli.do("wp", "resize", f"ydid:wrkrpool:000000:{NONE}", 1, status=6),
            # 1: a route that is not there.
            lambda: cli("cloudinfo", "regions", status=1),
            # 6: the CLI looks the template's name up by itself, and does not find it.
            lambda: cli("wp", "provision", "-c", "unknown.toml", status=6),
            # 1: an InvalidRequestException, which names the field.
            lambda: cli("wp", "provision", "types.json", status=1),
            # 7: the platform is out of order (a status that the SDK does not try again for).
            lambda: cli("resource", "list", "image-families", status=7),
        )
    finally:
        cli.platform.faults.clear()
    assert "no-such-verb" in words
    assert "key" in config
    assert "not recognised" in key
    for said in (work, task, pool):
        assert NONE in said
    assert "GET /cloudInfo/regions is not supported by the local platform" in route
    assert "test/none" in template
    assert "provisionedProperties.nodeConfiguration is not supported by the local platform" in field
    assert "520" in broken
    assert not [each for each in cli.look(lambda s: list(s.pools.values())) if cli.tag in each.name]


def test_endings_may_be_refused(tmp_path: Path) -> None:
    """Where the platform refuses to end what is ending (403), the CLI exits with 5."""
    with serve(SchedulerOptions(end_again="refuse"), boot_delay=0.05) as platform:
        cli = Cli(platform, tmp_path, "refused")
        pool = cli.id("wp", "provision")
        cli.until(lambda scheduler: len(scheduler.pool(pool).nodes) == 2)
        # 5: the pool's end has already begun to end its machines when the CLI asks for that.
        said = cli.do("wp", "shutdown", "--terminate", pool, status=5)
        assert "invalid transition" in said
        cli.until(lambda scheduler: scheduler.pool(pool).status == "TERMINATED")
