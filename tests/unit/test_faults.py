"""The control plane without nodes, and the faults that it can be told to have."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests

from tests.controlplane import KEY_ID, SECRET, Fault, Served, serve
from yellowdog_ray.errors import ClusterStateError, LocalPlatformError, SpecError
from yellowdog_ray.local import LocalControlPlane, control_plane

NAMESPACES = "/namespaces"


class Client:
    """A client that neither retries nor keeps anything."""

    def __init__(self, url: str, key_id: str, secret: str) -> None:
        self.url = url
        self.session = requests.Session()
        self.session.trust_env = False
        self.session.headers["Authorization"] = f"yd-key {key_id}:{secret}"

    def __call__(self, method: str, path: str, body: object = None, timeout: float = 10) -> requests.Response:
        return self.session.request(method, self.url + path, json=body, timeout=timeout)

    def create(self, name: str, timeout: float = 10) -> requests.Response:
        return self("POST", NAMESPACES, {"namespace": name}, timeout)


@pytest.fixture(scope="module")
def served():
    with serve() as platform:
        yield platform


@pytest.fixture
def platform(served):
    yield served
    served.faults.clear()
    served.faults.latency = 0
    served.call(served.core.scheduler.namespaces.clear)


@pytest.fixture
def client(platform):
    client = Client(platform.url, KEY_ID, SECRET)
    with client.session:
        yield client


def exists(platform: Served, name: str) -> bool:
    return platform.call(lambda: name in platform.core.scheduler.namespaces)


def until(condition, seconds: float = 5) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_status_is_answered_instead(platform, client):
    fault = Fault("POST", "^/namespaces$", 503, headers={"Retry-After": "7"}, body=b"busy")
    platform.faults.faults = [fault]
    answer = client.create("one")
    assert (answer.status_code, answer.headers["Retry-After"], answer.content) == (503, "7", b"busy")
    assert not exists(platform, "one")
    assert client.create("one").status_code == 200
    assert (fault.hits, fault.count) == (1, 0)


def test_a_status_can_hide_what_was_carried_out(platform, client):
    platform.faults.faults = [Fault("POST", "namespaces", 502, carried_out=True)]
    assert client.create("one").status_code == 502
    assert exists(platform, "one")


@pytest.mark.parametrize(("what", "carried_out"), [("before", False), ("after", True)])
def test_the_connection_is_dropped(platform, client, what, carried_out):
    platform.faults.faults = [Fault("*", "namespaces", what)]
    with pytest.raises(requests.ConnectionError):
        client.create("one")
    assert exists(platform, "one") == carried_out
    assert client("GET", NAMESPACES).status_code == 200


def test_count_and_skip(platform, client):
    fault = Fault("GET", "application", 500, count=2, skip=1)
    platform.faults.faults = [fault, Fault("*", "application", 429, count=None, skip=4)]
    # The second fault does not count what the first takes.
    codes = [client("GET", "/application").status_code for _ in range(8)]
    assert codes == [200, 500, 500, 200, 200, 200, 429, 429]
    assert [each.hits for each in platform.faults.faults] == [2, 2]
    platform.faults.clear()
    assert client("GET", "/application").status_code == 200


def test_a_method_is_written_in_any_case(platform, client):
    fault = Fault("get", "^/application$", 500)
    platform.faults.faults = [fault]
    assert client("GET", "/application").status_code == 500
    assert fault.hits == 1


def test_method_and_path_choose(platform, client):
    fault = Fault("DELETE", "^/application$", 500, None)
    platform.faults.faults = [fault, Fault("GET", "^/keyrings$", 500, None)]
    assert client("GET", "/application").status_code == 200
    assert fault.hits == 0


@pytest.mark.parametrize("carried_out", [True, False])
def test_a_call_hangs(platform, client, carried_out):
    platform.faults.faults = [Fault("POST", "namespaces", "hang", seconds=0.3, carried_out=carried_out)]
    began = time.monotonic()
    if carried_out:
        assert client.create("one").status_code == 200
    else:
        with pytest.raises(requests.ConnectionError):
            client.create("one")
    assert 0.3 <= time.monotonic() - began < 3
    assert exists(platform, "one") == carried_out


@pytest.mark.parametrize("carried_out", [True, False])
def test_a_hanging_call_ends_with_its_client(platform, client, carried_out):
    """What a client has given up on is still carried out, where the fault says so."""
    platform.faults.faults = [Fault("POST", "namespaces", "hang", seconds=600, carried_out=carried_out)]
    with pytest.raises(requests.ReadTimeout):
        client.create("one", timeout=0.2)
    if carried_out:
        until(lambda: exists(platform, "one"))
    else:
        time.sleep(0.1)
        assert not exists(platform, "one")


def test_a_hanging_call_ends_with_the_platform():
    with ThreadPoolExecutor(1) as threads:
        with serve() as platform:
            fault = Fault("POST", "namespaces", "hang", seconds=600)
            platform.faults.faults = [fault]
            call = threads.submit(Client(platform.url, KEY_ID, SECRET).create, "one")
            until(lambda: fault.hits)
            began = time.monotonic()
        assert time.monotonic() - began < 3
        with pytest.raises(requests.ConnectionError):
            call.result(3)


@pytest.mark.parametrize(
    "fault",
    [
        Fault("POST", "namespaces", 503, delay=0.3),
        Fault("POST", "namespaces", "after", delay=0.3),
        Fault("POST", "namespaces", "hang", seconds=0, carried_out=True, delay=0.3),
    ],
    ids=lambda fault: str(fault.what),
)
def test_an_answer_comes_late(platform, client, fault):
    platform.faults.faults = [fault]
    began = time.monotonic()
    with ThreadPoolExecutor(1) as threads:
        call = threads.submit(client.create, "one")
        if fault.what != 503:
            until(lambda: exists(platform, "one"))
            assert time.monotonic() - began < 0.3
        assert call.exception(5) is None or fault.what == "after"
    assert time.monotonic() - began >= 0.3


@pytest.mark.parametrize("what", ["after", 503])
def test_an_update_stream_goes_wrong_at_once(platform, client, what):
    """A stream has begun when its first part is there; it would end only with the thing that it tells of."""
    made = client("POST", "/work/requirements", {"namespace": "local", "name": f"stream-{what}"}).json()
    platform.faults.faults = [Fault("GET", "/updates$", what, carried_out=True)]
    began = time.monotonic()
    if what == "after":
        with pytest.raises(requests.ConnectionError):
            client("GET", f"/work/requirements/{made['id']}/updates")
    else:
        assert client("GET", f"/work/requirements/{made['id']}/updates").status_code == 503
    assert time.monotonic() - began < 3
    # The next one is as ever.
    assert client("PUT", f"/work/requirements/{made['id']}/transition/CANCELLING").status_code == 200
    assert '"CANCELLED"' in client("GET", f"/work/requirements/{made['id']}/updates").text


@pytest.mark.parametrize("status", [204, 304])
def test_a_status_without_a_body(platform, client, status):
    """An answer that may have no body has none, which the next call would take for its own."""
    platform.faults.faults = [Fault("GET", "^/application$", status)]
    first = client("GET", "/application")
    assert (first.status_code, first.content) == (status, b"")
    assert client("GET", "/application").status_code == 200


def test_the_path_is_matched_as_it_is_meant(platform, client):
    """Doubled and trailing slashes, which the SDK sends, are not there for a fault."""
    fault = Fault("GET", "^/workerPools$", 503, count=None)
    platform.faults.faults = [fault]
    before = len(platform.faults.seen)
    paths = ("/workerPools", "/workerPools/", "//workerPools")
    assert [client("GET", path).status_code for path in paths] == [503, 503, 503]
    assert platform.faults.seen[before:] == [("GET", "/workerPools")] * 3


def test_a_fault_takes_only_calls_with_the_key(platform, client):
    """Whoever has no key, such as another user of the machine, cannot use a test's faults up."""
    fault = Fault("GET", "^/application$", 503)
    platform.faults.faults = [fault]
    for stranger in (Client(platform.url, KEY_ID, "wrong"), Client(platform.url, "", "")):
        assert stranger("GET", "/application").status_code == 401
    assert requests.get(f"{platform.url}/application", timeout=5).status_code == 401
    assert fault.hits == 0
    assert client("GET", "/application").status_code == 503
    # A look at whether there is a platform at all needs no key.
    platform.faults.faults = [Fault("GET", "/", 503)]
    assert requests.get(platform.url, timeout=5).status_code == 200
    assert client("GET", "/").status_code == 503


def test_latency_and_what_was_seen(platform, client):
    before = len(platform.faults.seen)
    platform.faults.latency = 0.1
    began = time.monotonic()
    assert client("GET", "/application").status_code == 200
    assert time.monotonic() - began >= 0.1
    assert platform.faults.seen[before:] == [("GET", "/application")]


def test_an_answer_takes_no_longer_than_it_must(client):
    """Without TCP_NODELAY each answer would wait 40 ms."""
    client("GET", "/application")
    began = time.monotonic()
    for _ in range(20):
        client("GET", "/application")
    assert time.monotonic() - began < 0.4


@pytest.mark.parametrize(("path", "what"), [("(", 500), ("/", "explode"), ("/", 99), ("/", "500")])
def test_no_such_fault(path, what):
    with pytest.raises(SpecError):
        Fault("GET", path, what)


# -- the control plane itself -----------------------------------------------------------------------------


def provision(client: Client, name: str, template: str) -> str:
    answer = client(
        "POST",
        "/workerPools/provisioned/template",
        {
            "requirementTemplateUsage": {
                "templateId": template,
                "requirementNamespace": "local",
                "requirementName": name,
                "targetInstanceCount": 2,
            },
            "provisionedProperties": {},
        },
    )
    assert answer.status_code == 200, answer.text
    return answer.json()["computeRequirementId"]


def test_its_life():
    platform = LocalControlPlane(latency=0.001, stop_delay=0.2)
    with pytest.raises(ClusterStateError):
        print(platform.url)
    with pytest.raises(ClusterStateError):
        platform.running()
    platform.close()
    with platform:
        with pytest.raises(ClusterStateError):
            platform.start()
        client = Client(platform.url, platform.key_id, platform.secret)
        assert Client(platform.url, platform.key_id, "wrong")("GET", "/application").status_code == 401
        assert platform.running() == []
        compute = provision(client, "few", platform.template_names[0])
        assert platform.running() == ["pool local/few", "compute local/few"]
        until(lambda: len(platform.core.scheduler.nodes) == 2)
        assert client("PUT", f"/compute/requirements/{compute}/transition/TERMINATED").status_code == 200
        # The machines take a moment to end.
        assert platform.running() == ["compute local/few"]
        until(lambda: platform.running() == [])
        with pytest.raises(LocalPlatformError):
            LocalControlPlane(port=int(platform.url.rpartition(":")[2])).start()
    platform.close()
    with pytest.raises(requests.ConnectionError):
        client("GET", "/")
    with pytest.raises(ClusterStateError):
        platform.call(len, "")


def test_an_argument_that_cannot_be(capsys):
    with pytest.raises(SystemExit):
        control_plane.main(["--boot-delay", "inf"])
    assert "boot_delay must be a number" in capsys.readouterr().err


@pytest.mark.parametrize("how", ["stdin", "SIGTERM"])
def test_in_another_process(how):
    command = [
        sys.executable,
        "-m",
        "yellowdog_ray.local.control_plane",
        "--key-id",
        "me",
        "--latency",
        "0.01",
    ]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        about = json.loads(process.stdout.readline())
        assert sorted(about) == [
            "control_token",
            "control_url",
            "key_id",
            "namespace",
            "secret",
            "template",
            "url",
            "web_url",
        ]
        assert about["key_id"] == "me"
        client = Client(about["url"], about["key_id"], about["secret"])
        assert client("GET", "/_books").json() == {"running": [], "seen": 0, "hits": []}
        assert client("POST", "/_faults", [{"method": "GET", "path": "/", "what": 500}]).status_code == 200
        assert client("GET", "/application").status_code == 500
        provision(client, "few", about["template"])
        running = ["pool local/few", "compute local/few"]
        assert client("GET", "/_books").json() == {"running": running, "seen": 2, "hits": [1]}
        assert client("DELETE", "/_faults").status_code == 200
        for wrong in ([{"method": "GET"}], [1], None, 7, [{"method": "GET", "path": "/", "what": "x"}]):
            answer = client("POST", "/_faults", wrong)
            assert answer.status_code == 400
            assert not re.search("__init__|argument|'int' object|NoneType", answer.text), answer.text
        assert client("GET", "/_books").json()["hits"] == []
        assert Client(about["url"], "me", "wrong")("GET", "/_books").status_code == 401
        if how == "stdin":
            process.stdin.close()
        else:
            process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0
