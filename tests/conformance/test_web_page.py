"""The local platform's web page in a real browser."""

from __future__ import annotations

import dataclasses
import re
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import quote, urlsplit

import pytest
import requests
from yellowdog_client import PlatformClient
from yellowdog_client.model import (
    ApiKey,
    ComputeRequirementTemplateUsage,
    NodeWorkerTarget,
    ProvisionedWorkerPoolProperties,
    RunSpecification,
    ServicesSchema,
    Task,
    TaskGroup,
    WorkRequirement,
)

from tests.browser import addresses
from tests.controlplane import KEY_ID, SECRET, Served, serve

# They share a platform: in one process, and in this order, where several are at work.
pytestmark = pytest.mark.xdist_group("test_web_page")

SCRIPT = "<script>window.hurt = 1</script>"
HOSTILE = f"</pre></td>{SCRIPT}<img src=http://127.0.0.1:9/x onerror='window.hurt = 2'>"


def until(look: Callable[[], Any], timeout: float = 15) -> Any:
    """Wait until a function returns something."""
    deadline = time.monotonic() + timeout
    while not (found := look()):
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)
    return found


class World:
    """A platform on which much has happened already, and how to have more happen."""

    def __init__(self, platform: Served, client: PlatformClient) -> None:
        self.platform, self.client = platform, client
        self.pool = client.worker_pool_client.provision_worker_pool(
            ComputeRequirementTemplateUsage(
                templateId="test/small",
                requirementName="workers",
                requirementNamespace="night",
                targetInstanceCount=3,
            ),
            ProvisionedWorkerPoolProperties(
                createNodeWorkers=NodeWorkerTarget.per_node(1), workerTag="night"
            ),
        )
        platform.faults.fail_provision("broken", message=f"no such image {HOSTILE}", count=None)
        self.broken = client.worker_pool_client.provision_worker_pool(
            ComputeRequirementTemplateUsage(
                templateId="test/small",
                requirementName="broken",
                requirementNamespace="night",
                targetInstanceCount=1,
            ),
            ProvisionedWorkerPoolProperties(createNodeWorkers=NodeWorkerTarget.per_node(1)),
        )
        run = RunSpecification(taskTypes=["bash"], workerTags=["night"], maximumTaskRetries=0)
        nowhere = RunSpecification(taskTypes=["bash"], workerTags=["nowhere"])
        self.work = client.work_client.add_work_requirement(
            WorkRequirement(
                namespace="night",
                name="render",
                tag=HOSTILE,
                taskGroups=[
                    TaskGroup("prepare", run),
                    TaskGroup("frames", run, finishIfAllTasksFinished=False),
                    TaskGroup("publish", nowhere, dependentOn="frames"),
                ],
            )
        )
        prepare, self.frames, publish = self.work.taskGroups or []
        done = {"SIMULATED_SECONDS": "0"}
        self.add(prepare, Task(name="unpack", taskType="bash", arguments=["a"], environment=done))
        self.add(publish, Task(name="upload", taskType="bash", arguments=["a"]))
        (self.failing,) = self.add(
            self.frames,
            Task(name="frame-1", taskType="bash", arguments=[HOSTILE], taskData=f"echo {HOSTILE}"),
        )
        (self.running,) = self.add(
            self.frames,
            Task(name="frame-2", taskType="bash", environment={"TOKEN": "much-too-secret"}),
        )
        until(lambda: self.status(self.failing) == "EXECUTING")
        until(lambda: self.status(self.running) == "EXECUTING")
        self.exit(self.failing, 3, f"\x1b[31mloading\x1b[0m\n{HOSTILE}")
        # Names come through the API only as YellowDog has them; whatever there is, is only shown.
        platform.call(self.rename, self.failing)
        until(lambda: self.status(self.failing) == "FAILED")

    def add(self, group: Any, *tasks: Task) -> list[str]:
        return [str(task.id) for task in self.client.work_client.add_tasks_to_task_group(group, list(tasks))]

    def status(self, task_id: str) -> str:
        return str(self.client.work_client.get_task_by_id(task_id).status)

    def exit(self, task_id: str, code: int, output: str) -> None:
        def end() -> None:
            task = self.platform.core.scheduler.tasks[task_id]
            self.platform.backend.exit(str(task.run_id), code, output)

        self.platform.call(end)

    def rename(self, task_id: str) -> None:
        task = self.platform.core.scheduler.tasks[task_id]
        task.spec = dataclasses.replace(task.spec, name=HOSTILE)


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with serve(boot_delay=0.005, start_delay=0.002, stop_delay=0.002) as platform:
        schema = ServicesSchema(defaultUrl=platform.url)
        with PlatformClient.create(schema, ApiKey(KEY_ID, SECRET)) as client:
            yield World(platform, client)


@pytest.fixture(scope="module")
def reader(world: World, browser: Any) -> Any:
    """The browser, with a session, and with nobody else's."""
    browser.get("about:blank")
    addresses(browser)
    browser.get(world.platform.web_url)
    until(lambda: browser.title.startswith("Overview"))
    return browser


@pytest.fixture(autouse=True)
def origins(world: World, browser: Any) -> Iterator[set[str]]:
    """Nobody but these is asked for anything by a page that a test has open, and nothing goes wrong in it."""
    browser.get_log("browser")
    addresses(browser)
    allowed = {world.platform.url}
    yield allowed
    asked = {urlsplit(each) for each in addresses(browser)}
    asked = {f"{each.scheme}://{each.netloc}" for each in asked if each.scheme not in ("about", "data")}
    assert asked <= allowed
    # What was refused is said by the network's own lines.
    assert [each for each in browser.get_log("browser") if each["source"] != "network"] == []
    assert browser.execute_script("return window.hurt === undefined")


def base(world: World) -> str:
    from yellowdog_ray.local.webpage.access import Access

    return world.platform.url + Access(SECRET).path


def body(browser: Any) -> str:
    return str(browser.find_element("tag name", "main").text)


def rows(browser: Any) -> list[str]:
    script = (
        "return [...document.querySelectorAll('tbody tr')]"
        ".map(row => [...row.cells].map(cell => cell.innerText).join(' '))"
    )
    return list(browser.execute_script(script))


def test_a_link_leaves_no_trace(world: World, reader: Any) -> None:
    """The ticket is gone from the address and the history, and the session is out of scripts' reach."""
    assert reader.current_url == f"{base(world)}/"
    assert reader.execute_script("return document.cookie") == ""
    assert reader.execute_script("return document.referrer") == ""
    (cookie,) = reader.get_cookies()
    assert cookie["httpOnly"]
    assert cookie["sameSite"] == "Strict"
    assert "expiry" not in cookie
    assert base(world).endswith(cookie["path"])
    reader.find_element("link text", "Events").click()
    until(lambda: reader.title.startswith("Events"))
    reader.back()
    until(lambda: reader.title.startswith("Overview"))
    reader.back()
    assert "ticket" not in reader.current_url
    history = reader.execute_cdp_cmd("Page.getNavigationHistory", {})
    assert not [each for each in history["entries"] if "ticket" in each["url"] + each["userTypedURL"]]


def test_what_there_is_can_be_walked_through(world: World, reader: Any) -> None:
    """From the overview one comes to requirements, groups, tasks, nodes, pools and machines, by links."""
    reader.get(f"{base(world)}/")
    assert "Work requirements 1" in body(reader)
    assert "registered" in body(reader)
    reader.find_element("link text", "Work requirements").click()
    assert "night/render RUNNING" in body(reader)
    reader.find_element("link text", "night/render").click()
    text = body(reader)
    assert reader.find_element("tag name", "h1").text == "render"
    assert "prepare COMPLETED 1 1 COMPLETED" in text
    assert f"PROCESS_NON_ZERO_EXIT: Task process exited with non-zero exit code 3: {HOSTILE}" in text
    reader.find_element("link text", "frames").click()
    assert "1 EXECUTING, 1 FAILED" in body(reader)
    assert len(rows(reader)) == 2
    reader.find_element("link text", "frame-2").click()
    assert "EXECUTING" in body(reader)
    assert "TOKEN" in body(reader)
    assert "much-too-secret" not in reader.page_source
    assert "simulated" in body(reader)
    reader.find_element("partial link text", "workers-").click()
    assert "10.0.0." in body(reader)
    assert "frame-2" in body(reader)
    reader.find_element("link text", "night/workers").click()
    assert "3 RUNNING" in body(reader)
    assert len(rows(reader)) == 3
    reader.find_element("css selector", "dl a").click()
    assert "test/small" in body(reader)
    assert len(rows(reader)) == 3
    reader.find_element("css selector", "nav li:nth-child(5) a").click()
    assert reader.title.startswith("Nodes")
    assert reader.find_element("css selector", "nav [aria-current=page]").text == "Nodes"


_ASKED = "performance.getEntriesByType('resource').some(one => one.initiatorType === 'fetch')"


def test_the_links_of_yellowdog_cli(world: World, reader: Any) -> None:
    """What `yd` prints, the API's address with a thing's id after the #, leads to the thing's page."""
    cli = pytest.importorskip("yellowdog_cli.utils.misc_utils")
    requirement = world.client.compute_client.get_compute_requirement_by_id(world.pool.computeRequirementId)
    links = [
        re.search(r"http[^)]+", cli.link_entity(world.platform.url, each))[0]  # type: ignore[index]
        for each in (world.work, world.pool, requirement)
    ]
    assert links[0] == f"{world.platform.url}/#/work/{world.work.id}"
    pages = [f"work/{world.work.id}", f"pools/{world.pool.id}", f"compute/{requirement.id}"]
    # Without a session it tells nobody where the pages are, and goes on when there is one.
    reader.execute_cdp_cmd("Network.clearBrowserCookies", {})
    reader.get(links[0])
    until(lambda: reader.execute_script(f"return {_ASKED}"))  # whether there is a session
    assert "A local platform" in body(reader)
    assert "raydog local status" in body(reader)
    assert urlsplit(base(world)).path not in reader.page_source
    tab = reader.current_window_handle
    reader.switch_to.new_window("tab")
    reader.get(world.platform.web_url)
    until(lambda: reader.title.startswith("Overview"))
    reader.close()
    reader.switch_to.window(tab)
    until(lambda: reader.current_url == f"{base(world)}/{pages[0]}")
    until(lambda: reader.title.startswith("render"))
    for link, page in zip(links[1:], pages[1:], strict=True):
        reader.get(link)
        until(lambda page=page: reader.current_url == f"{base(world)}/{page}")
        until(lambda: "workers" in body(reader))
    reader.get(f"{world.platform.url}/#/elsewhere//127.0.0.1")
    until(lambda: reader.title.startswith("Overview"))
    # The API's clients see what they saw.
    for accept in ("application/json", "*/*"):
        answer = requests.get(world.platform.url, headers={"Accept": accept}, timeout=5)
        assert answer.json()["name"] == "RayDog local platform"


def test_what_others_wrote_is_only_text(world: World, reader: Any) -> None:
    """Names, tags, arguments, task data, output and errors are shown as they are, and never carried out."""
    places = [
        "", "work", f"work/{world.work.id}", f"groups/{world.frames.id}", "tasks", f"tasks/{world.failing}",
        "pools", f"pools/{world.broken.id}",
        "compute", f"compute/{world.broken.computeRequirementId}", "events",
        f"tasks?find={quote(HOSTILE)}", f"work?status={quote(HOSTILE)}", f"work/{quote(HOSTILE, safe='')}",
    ]  # fmt: skip
    shown = 0
    for place in places:
        reader.get(f"{base(world)}/{place}")
        shown += reader.find_element("tag name", "body").text.count(SCRIPT)
        assert not reader.find_elements("css selector", "main script, main img"), place
        time.sleep(0.02)
        assert reader.execute_script("return window.hurt === undefined"), place
    assert shown > 10
    reader.get(f"{base(world)}/tasks/{world.failing}")
    output = reader.find_elements("tag name", "pre")[0].text
    assert output == f"loading\n{HOSTILE}"
    assert "The end of its output" in body(reader)


def test_the_page_follows(world: World, reader: Any) -> None:
    """What changes is changed in place: what has the focus, is selected or open stays as it is."""
    reader.get(f"{base(world)}/groups/{world.frames.id}")
    link = reader.find_element("link text", "frame-2")
    row = reader.find_element("xpath", "//tr[.//a[text()='frame-2']]")
    find = reader.find_element("name", "find")
    find.send_keys("not sent")
    reader.execute_script(
        "arguments[0].mine = true; arguments[1].focus(); getSelection().selectAllChildren(arguments[1]);"
        "window.replaced = 0; new MutationObserver(changes => { for (const each of changes)"
        " window.replaced += [...each.removedNodes].filter(node => node.nodeName === 'TR').length })"
        ".observe(document.querySelector('main'), {childList: true, subtree: true})",
        row,
        link,
    )
    world.add(world.frames, Task(name="frame-3", taskType="bash"))
    world.exit(world.running, 0, "")
    until(lambda: "frame-3 EXECUTING" in body(reader) and "frame-2 COMPLETED" in body(reader))
    assert reader.execute_script("return arguments[0].mine && arguments[0].isConnected", row)
    assert reader.switch_to.active_element == link
    assert reader.execute_script("return getSelection().toString()") == "frame-2"
    assert reader.execute_script("return window.replaced") == 0
    assert find.get_attribute("value") == "not sent"
    # A list with the newest first: rows come above the others.
    reader.get(f"{base(world)}/tasks")
    first = reader.find_element("css selector", "tbody tr")
    world.add(world.frames, Task(name="frame-4", taskType="bash"))
    until(lambda: rows(reader)[0].startswith("frame-4"))
    assert reader.execute_script("return arguments[0].previousElementSibling.rowIndex", first) == 1


def test_much_is_shown_in_parts(world: World, reader: Any) -> None:
    """A hundred rows at a time, found by status and name; all of it with links and without scripts."""
    work = world.client.work_client.add_work_requirement(
        WorkRequirement(
            namespace="night",
            name="many",
            taskGroups=[TaskGroup("all", RunSpecification(taskTypes=["bash"], workerTags=["nowhere"]))],
        )
    )
    (group,) = work.taskGroups or []
    world.add(group, *(Task(name=f"part-{number}", taskType="bash") for number in range(250)))
    reader.get(f"{base(world)}/groups/{group.id}")
    assert "none that suits is free" in body(reader)
    assert len(rows(reader)) == 100
    assert "250 in all" in body(reader)
    reader.find_element("link text", "Next page").click()
    assert rows(reader)[0].startswith("part-100 ")
    reader.get(f"{base(world)}/groups/{group.id}?page=3")
    assert len(rows(reader)) == 50
    assert not reader.find_elements("link text", "Next page")
    find = reader.find_element("name", "find")
    find.send_keys("PART-24\n")
    until(lambda: "find=PART-24" in reader.current_url)
    assert len(rows(reader)) == 11
    reader.find_element("css selector", "option[value=READY]").click()
    reader.find_element("css selector", "form button").click()
    until(lambda: "status=READY" in reader.current_url)
    assert len(rows(reader)) == 11
    reader.get(f"{base(world)}/groups/{group.id}?status=FAILED")
    assert "Nothing matches" in body(reader)
    world.client.work_client.cancel_work_requirement(work)


def test_by_keyboard_and_in_the_dark(world: World, reader: Any) -> None:
    """The first key leads past the navigation; tables have names and headings; colours follow the system."""
    from selenium.webdriver.common.keys import Keys

    reader.get(f"{base(world)}/work")
    reader.find_element("tag name", "body").send_keys(Keys.TAB)
    skip = reader.switch_to.active_element
    assert skip.text == "Skip to the content"
    skip.send_keys(Keys.ENTER)
    assert reader.switch_to.active_element.tag_name == "main"
    for table in reader.find_elements("tag name", "table"):
        assert table.find_elements("css selector", "th[scope=col]")
    assert reader.find_element("css selector", "main [role=region]").accessible_name == "Newest first"
    assert reader.find_element("name", "find").accessible_name == "Name contains"

    def background() -> str:
        return str(reader.execute_script("return getComputedStyle(document.body).backgroundColor"))

    seen = set()
    for scheme in ("light", "dark"):
        feature = {"name": "prefers-color-scheme", "value": scheme}
        reader.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
        seen.add(background())
    reader.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    assert len(seen) == 2


def test_an_empty_platform_says_what_to_do(browser: Any, world: World, origins: set[str]) -> None:
    """Where there is nothing, the page says how to have something; and one that has ended, that it has."""
    with serve() as platform:
        origins.add(platform.url)
        browser.get(platform.web_url)
        until(lambda: browser.title.startswith("Overview"))
        assert "Build a cluster" in body(browser)
        for section, sentence in (
            ("Work requirements", "no work requirement yet"),
            ("Tasks", "no task yet"),
            ("Worker pools", "no worker pool yet"),
            ("Nodes", "no worker pool yet"),
            ("Compute requirements", "no compute requirement yet"),
            ("Events", "Nothing has happened yet"),
        ):
            browser.find_element("link text", section).click()
            assert sentence in body(browser)
    state = browser.find_element("id", "state")
    until(lambda: "does not answer" in state.text)
    assert "Nothing has happened yet" in body(browser)


class _Elsewhere(BaseHTTPRequestHandler):
    """A page of somebody else on this machine."""

    page = ""
    got: list[tuple[str, str | None]] = []  # noqa: RUF012

    def do_GET(self) -> None:
        self.got.append((self.path, self.headers.get("Cookie")))
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(self.page.encode())

    def log_message(self, *args: Any) -> None:
        """Say nothing."""


@pytest.fixture
def elsewhere() -> Iterator[int]:
    """The port of somebody else's server on this machine."""
    _Elsewhere.got.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), _Elsewhere) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield server.server_port
        finally:
            server.shutdown()


def test_from_elsewhere(world: World, browser: Any, elsewhere: int, origins: set[str]) -> None:
    """A click in another site's page opens the page; its scripts get nothing of it, nor does its server."""
    other, same = f"http://localhost:{elsewhere}", f"http://127.0.0.1:{elsewhere}"
    origins |= {other, same}
    page = f"{base(world)}/pools"
    _Elsewhere.page = f"<a href='{world.platform.web_url}'>look</a> <a href='{page}'>deep</a>"
    browser.get("about:blank")
    browser.execute_cdp_cmd("Network.clearBrowserCookies", {})
    browser.get(f"{other}/")
    browser.find_element("link text", "look").click()
    until(lambda: browser.title.startswith("Overview"))
    # A deep link needs one click more: the browser does not tell on the first who it is.
    browser.get(f"{other}/")
    browser.find_element("link text", "deep").click()
    until(lambda: "A link is needed" in body(browser))
    browser.find_element("link text", "Open this page again").click()
    until(lambda: browser.title.startswith("Worker pools"))
    # Another port of the same host is of the same site, and of another user perhaps.
    for place in ("/", "/web/", "/web/page.css", "/web/open"):
        browser.get(f"{same}{place}")
    assert ("/web/open", None) in _Elsewhere.got
    assert {cookie for _, cookie in _Elsewhere.got} == {None}
    read = (
        "const done = arguments[1]; fetch(arguments[0], {credentials: 'include'})"
        ".then(answer => answer.text()).then(done, () => done('refused'))"
    )
    frame = (
        "const done = arguments[1], frame = document.createElement('iframe');"
        "frame.onload = () => done('loaded');"
        "frame.src = arguments[0]; document.body.append(frame)"
    )
    assert "deep" in browser.execute_async_script(read, f"{same}/")
    assert browser.execute_async_script(read, page) == "refused"
    assert browser.execute_async_script(frame, page) == "loaded"
    browser.switch_to.frame(0)
    assert "Worker pools" not in browser.page_source
    browser.switch_to.default_content()
    browser.get("about:blank")
    # Said by the browser of what it has refused.
    assert browser.get_log("browser")
