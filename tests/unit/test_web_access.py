"""Who may read the local platform's web page, and what others are told."""

from __future__ import annotations

import http.client
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
from yellowdog_client import PlatformClient
from yellowdog_client.model import (
    ApiKey,
    ComputeRequirementTemplateUsage,
    NodeWorkerTarget,
    ProvisionedWorkerPoolProperties,
    ServicesSchema,
)

from tests.browser import PageReader
from tests.controlplane import KEY_ID, SECRET, Fault, Served, serve
from yellowdog_ray.local.control_plane import LocalControlPlane
from yellowdog_ray.local.webpage.access import LINK_SECONDS, SESSION_SECONDS, Access, web_link


@pytest.fixture(scope="module")
def platform() -> Iterator[Served]:
    with serve() as served:
        yield served


def ticket(secret: str = SECRET) -> str:
    return web_link("", secret).partition("ticket=")[2]


class Clock:
    """A clock that goes wrong by so many seconds."""

    wrong = 0.0

    def __call__(self) -> float:
        return time.time() + self.wrong


def test_a_ticket_opens_one_session() -> None:
    """A ticket is good once, for ten minutes, for one key and for one life of the platform."""
    clock = Clock()
    access = Access(SECRET, clock)
    used = ticket()
    session = access.use(used)
    assert session
    assert access.knows(session)
    assert access.use(used) is None
    other, late = ticket("another"), ticket()
    assert access.use(other) is None
    clock.wrong = LINK_SECONDS + 1
    assert access.use(late) is None
    # A platform that is started again knows its sessions, and does not know which tickets were used.
    again = Access(SECRET, clock)
    assert again.path == access.path
    assert again.knows(session)
    assert again.use(late) is None
    assert not Access("another", clock).knows(session)
    clock.wrong = SESSION_SECONDS + 1
    assert not again.knows(session)
    # A clock that was put back.
    clock.wrong = -60
    assert access.use(ticket()) is None


@pytest.mark.parametrize("wrong", ["", ".", "..", "1", "1.2.3", "ü.ü.ü", "nan.0.x", "9" * 5000, "\x00"])
def test_nonsense_is_no_ticket(wrong: str) -> None:
    """What was not signed opens nothing, whatever it is."""
    access = Access(SECRET)
    assert access.use(wrong) is None
    assert not access.knows(wrong)
    assert access.use(f"x{ticket()}") is None
    assert access.use(f"{ticket()}x{wrong}") is None


def test_a_session_is_no_ticket() -> None:
    """Nor is a ticket a session."""
    access = Access(SECRET)
    assert not access.knows(ticket())
    assert access.use(str(access.use(ticket()))) is None


def test_two_platforms_share_a_browser() -> None:
    """Cookies count for all ports of a host: each platform has a name and a path of its own."""
    with serve() as first, LocalControlPlane() as second:
        one, two = PageReader(first.web_url), PageReader(second.web_url)
        assert one.cookie.name != two.cookie.name
        assert one.cookie.path != two.cookie.path
        one.http.cookies.update(two.http.cookies)
        assert one.get().status_code == 200
        # Not with the other's session.
        one.http.cookies.clear()
        one.http.cookies.set(one.cookie.name, two.cookie.value, path=one.cookie.path)
        assert one.get().status_code == 401


def test_nobody_else_is_let_in(platform: Served) -> None:
    """Without a session there is nothing to be had, not even the page's path; a link is of no use twice."""
    link = platform.web_url
    reader = PageReader(link)
    assert reader.get().status_code == 200
    assert reader.cookie.has_nonstandard_attr("HttpOnly")
    assert reader.cookie.get_nonstandard_attr("SameSite") == "strict"
    assert reader.cookie.expires is None
    stranger = requests.Session()
    stranger.trust_env = False
    for address in (reader.base, f"{reader.base}/", f"{reader.base}/work", f"{reader.base}/none", link):
        answer = stranger.get(address, timeout=10)
        assert answer.status_code == 401, address
        assert not answer.cookies
        assert "raydog local status" in answer.text
        assert reader.cookie.path not in answer.text
        assert "Overview" not in answer.text
    assert stranger.get(f"{platform.url}/web/", timeout=10).status_code == 401
    wrong = {reader.cookie.name: reader.cookie.value[:-1] + ("1" if reader.cookie.value[-1] == "0" else "0")}
    assert stranger.get(f"{reader.base}/", cookies=wrong, timeout=10).status_code == 401
    # The page's session is none for the API, nor is the key one for the page.
    assert reader.http.get(f"{platform.url}/work/requirements", timeout=10).status_code == 401
    key = {"Authorization": f"yd-key {KEY_ID}:{SECRET}"}
    assert stranger.get(f"{reader.base}/", headers=key, timeout=10).status_code == 401
    assert stranger.get(f"{platform.url}/work/requirements", headers=key, timeout=10).json() == []


def test_other_sites_and_names_are_refused(platform: Served) -> None:
    """Another site's page can lead here, and cannot read, frame or change anything, by whatever name."""
    reader = PageReader(platform.web_url)
    port = platform.url.rpartition(":")[2]
    for host in ("evil.example", f"evil.example:{port}", f"127.0.0.1.evil.example:{port}", "[::1]:80", "x"):
        for path in ("/web/open", f"{reader.cookie.path}/", "/web/page.css"):
            assert status(platform, path, Host=host, Cookie=cookie(reader)) == 403, host
    for host in (f"127.0.0.1:{port}", f"localhost:{port}", "localhost:1", "localhost"):
        assert status(platform, f"{reader.cookie.path}/", Host=host, Cookie=cookie(reader)) == 200, host
    # A page of another port is of the same site, and browsers send it the cookie.
    for site in ("cross-site", "same-site"):
        for mode, dest in (("cors", "empty"), ("no-cors", "script"), ("navigate", "iframe")):
            headers = {"Sec-Fetch-Site": site, "Sec-Fetch-Mode": mode, "Sec-Fetch-Dest": dest}
            assert reader.get(**headers).status_code == 403
    led = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}
    assert reader.get(**led).status_code == 200
    for method in ("POST", "PUT", "DELETE", "PATCH", "OPTIONS"):
        answer = reader.http.request(method, f"{reader.base}/", timeout=10)
        assert answer.status_code == 405
        assert "access-control-allow-origin" not in answer.headers


def cookie(reader: PageReader) -> str:
    return f"{reader.cookie.name}={reader.cookie.value}"


def status(platform: Served, path: str, **headers: str) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", int(platform.url.rpartition(":")[2]), timeout=10)
    try:
        connection.request("GET", path, headers=headers)
        return connection.getresponse().status
    finally:
        connection.close()


def test_every_answer_is_locked_up(platform: Served) -> None:
    """No answer may be kept, framed, or load anything from elsewhere; nor tell where one came from."""
    reader = PageReader(platform.web_url)
    stranger = requests.get(f"{reader.base}/", timeout=10)
    opened = requests.get(platform.web_url, timeout=10)
    static = requests.get(f"{platform.url}/web/page.js", timeout=10)
    for answer in (reader.get(), reader.get("work/none"), stranger, opened, static):
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy
        assert answer.headers["cache-control"] == "no-store"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["cross-origin-resource-policy"] == "same-origin"
    for page in (reader.text(), stranger.text, opened.text):
        assert "<script>" not in page
        assert "style=" not in page
        assert "http:" not in page
        assert "https:" not in page
        assert SECRET not in page
    assert opened.headers.get("location") is None


def test_it_costs_nothing_while_nothing_happens(platform: Served) -> None:
    """What has not changed is not sent again; and the page is no call of the API."""
    reader = PageReader(platform.web_url)
    everything = Fault("*", "", 503, count=None)
    before = platform.faults.requests
    platform.faults.faults = [everything]
    try:
        answer = reader.get()
        assert answer.status_code == 200
        again = reader.get(**{"If-None-Match": answer.headers["ETag"]})
        assert again.status_code == 304
        assert again.content == b""
        platform.core.scheduler.revision += 1
        assert reader.get(**{"If-None-Match": answer.headers["ETag"]}).status_code == 200
    finally:
        platform.faults.faults = []
    assert everything.hits == 0
    assert platform.faults.requests == before


def test_a_node_with_many_workers_says_that_not_all_are_shown() -> None:
    """A table without further pages shows 100 rows, and the page says of how many."""
    with serve(boot_delay=0.0) as platform:
        with PlatformClient.create(ServicesSchema(defaultUrl=platform.url), ApiKey(KEY_ID, SECRET)) as client:
            usage = ComputeRequirementTemplateUsage(
                templateId="test/small",
                requirementName="wide",
                requirementNamespace="night",
                targetInstanceCount=1,
            )
            workers = ProvisionedWorkerPoolProperties(createNodeWorkers=NodeWorkerTarget.per_node(1200))
            client.worker_pool_client.provision_worker_pool(usage, workers)
        nodes = platform.core.scheduler.nodes
        deadline = time.monotonic() + 10
        while not nodes:
            assert time.monotonic() < deadline, "no node has registered"
            time.sleep(0.01)
        page = PageReader(platform.web_url).text(f"nodes/{next(iter(nodes))}")
    assert "The first 100 of 1,200 workers." in page
    assert page.count("<tr data-key=") == 100


def test_nothing_of_it_is_loaded_before_it_is_opened() -> None:
    """Serving a platform loads neither the templates' engine nor the pages."""
    code = (
        "import sys\n"
        "from yellowdog_ray.local.control_plane import LocalControlPlane\n"
        "with LocalControlPlane() as platform: platform.web_url\n"
        "print(*(name for name in sys.modules if name == 'jinja2' or 'yellowdog_ray.local.webpage' in name))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert run.stdout.split() == [f"yellowdog_ray.local.webpage{more}" for more in ("", ".access", ".front")]


def test_the_package_has_its_files() -> None:
    """The style, the script and the templates are there, and the first ask nobody else for anything."""
    import yellowdog_ray.local.webpage as package

    directory = Path(package.__file__).parent
    assert {path.name for path in (directory / "static").iterdir()} == {
        "icon.svg",
        "lead.js",
        "page.css",
        "page.js",
    }
    for path in (directory / "static").glob("*.[cj]s*"):
        text = path.read_text()
        assert "http" not in text
        assert "innerHTML" not in text
