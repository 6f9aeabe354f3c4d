"""`raydog list`, `status`, `logs` and `shut-down` on clusters of the simulated platform."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.controlplane import TEMPLATE, Fault
from tests.ssh_fixtures import embedded, make_key
from yellowdog_ray import RayDogCluster
from yellowdog_ray.cli import main
from yellowdog_ray.local.control_plane import LocalControlPlane
from yellowdog_ray.raydog import assembly, teardown, transport
from yellowdog_ray.raydog import platform as platform_module

__all__ = ["embedded"]  # the fixture

KEY_ID, SECRET = "night-key", "distinctive-secret-0815"
COMMAND = [sys.executable, "-m", "yellowdog_ray.cli"]


@pytest.fixture(autouse=True)
def impatient(monkeypatch, tmp_path):
    """Persistent faults are given up on sooner than in the field; no key but the one of the test is found."""
    monkeypatch.setattr(transport, "RETRY_SECONDS", 0.5)
    monkeypatch.setattr(assembly, "SETTLE_SECONDS", 0.05)
    monkeypatch.setattr(teardown, "STEP_SECONDS", 0.8)
    monkeypatch.setattr(teardown, "VERIFY_SECONDS", 0.8)
    monkeypatch.setattr(teardown, "LATE_SECONDS", 0.2)
    monkeypatch.setattr(transport, "NOT_YET_SECONDS", 0.3)
    monkeypatch.setattr(platform_module, "NOT_YET_SECONDS", 0.3)
    for name in ("YD_API_KEY_ID", "YD_API_KEY_SECRET", "YD_API_URL"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


@pytest.fixture
def platform():
    with LocalControlPlane(templates=(TEMPLATE,), key_id=KEY_ID, secret=SECRET) as served:
        yield served
        served.faults.clear()


@pytest.fixture
def key(monkeypatch):
    monkeypatch.setenv("YD_API_KEY_ID", KEY_ID)
    monkeypatch.setenv("YD_API_KEY_SECRET", SECRET)


@pytest.fixture
def raydog(capsys):
    """Run the command in this process: its exit status, its output (with `--json` read), its messages."""

    def run(*arguments):
        capsys.readouterr()
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as ended:
            status = ended.code
        printed = capsys.readouterr()
        assert SECRET not in printed.out + printed.err
        return status, json.loads(printed.out) if "--json" in arguments else printed.out, printed.err

    return run


def build(served, name: str, workers: int = 2, pool_name: str | None = None) -> RayDogCluster:
    cluster = RayDogCluster(
        KEY_ID, SECRET, name, "test", "test/small", None, served.url, ray_auth="off", progress=False
    )
    if workers:
        cluster.add_worker_pool("test/small", None, workers, pool_name)
    cluster.build()
    if workers:
        cluster.wait_for_workers(timeout=20)
    # Left to the command, as by a process that has ended.
    cluster._watch.stop()
    cluster._attached = True
    return cluster


def own_file(directory: Path, name: str) -> Path:
    return next(directory.glob(f"test.{name}.*.json"))


LEGACY_KEYS = (
    "cluster_name",
    "cluster_namespace",
    "cluster_tag",
    "work_requirement_id",
    "worker_pool_ids",
)


def legacy_file(cluster: RayDogCluster, path: Path) -> Path:
    """Write what the existing package would have saved."""
    state = json.loads(cluster.save_state_to_json())
    path.write_text(json.dumps({name: state[name] for name in LEGACY_KEYS}))
    return path


# -- list ---------------------------------------------------------------------------------------------


def test_list_shows_what_the_files_say(platform, raydog, state_directory):
    """`raydog list` needs neither a key nor the platform."""
    build(platform, "one", workers=3)
    build(platform, "two", workers=0)
    asked = len(platform.faults.seen)
    status, found, errors = raydog("list", "--json")
    assert (status, errors) == (0, "")
    assert [(one["name"], one["pools"], one["nodes"]) for one in found] == [("one", 2, 4), ("two", 1, 1)]
    first = found[0]
    assert first["file"] == str(own_file(state_directory, "one"))
    assert (first["namespace"], first["status"], first["lifetime_ends"]) == ("test", "running", None)
    assert first["api_host"] == platform.url.removeprefix("http://")
    assert 0 <= first["age_seconds"] < 60

    status, text, errors = raydog("list")
    assert (status, errors) == (0, "")
    lines = text.splitlines()
    assert lines[0].split()[:3] == ["name", "namespace", "status"]
    assert lines[1].split()[:5] == ["one", "test", "running", "2", "4"]
    assert len(lines) == 3
    assert len(platform.faults.seen) == asked


def test_list_shows_corrupt_files_too(platform, raydog, state_directory, tmp_path):
    """A file that is no state is listed as such; the others are shown, and the exit status is 1."""
    cluster = build(platform, "good", workers=0)
    legacy_file(cluster, tmp_path / "legacy.json")
    (state_directory / "corrupt.json").write_text('{"work_requirement_id": ')
    (state_directory / "deep.json").write_text("[" * 200_000)
    status, found, errors = raydog("list", "--json", state_directory, tmp_path / "legacy.json", "missing")
    assert status == 1
    by_file = {Path(one["file"]).name: one for one in found}
    assert len(by_file) == 5
    for name in ("corrupt.json", "deep.json", "missing"):
        assert by_file[name]["error"]
        assert name in errors
    legacy = by_file["legacy.json"]
    assert (legacy["name"], legacy["status"], legacy["pools"], legacy["nodes"]) == ("good", None, 1, None)

    status, text, errors = raydog("list")
    assert status == 1
    assert text.count("unreadable") == 2
    assert "corrupt.json" in errors


def test_nothing_there_is_no_error(raydog, key, tmp_path):
    """A directory without state files is said to be so, and the exit status is 0."""
    empty = tmp_path / "empty"
    empty.mkdir()
    for arguments in (["list"], ["status"], ["shut-down", "--all"], ["list", empty], ["shut-down", empty]):
        status, found, errors = raydog(*arguments, "--json")
        assert (status, found) == (0, [])
        assert "no state files" in errors


# -- status -------------------------------------------------------------------------------------------


def test_status_of_healthy_clusters(platform, raydog, key, state_directory, tmp_path):
    """Healthy clusters: 0, what str(status) says, and as JSON all of it; nothing is left of the asking."""
    cluster = build(platform, "one")
    build(platform, "two", workers=0)
    status, text, errors = raydog("status")
    assert (status, errors) == (0, "")
    assert "Cluster test/one: running" in text
    assert "Cluster test/two: running" in text

    copy = tmp_path / "copy.json"
    cluster.save_state_to_json_file(copy)
    before = sorted(state_directory.iterdir())
    status, found, errors = raydog("status", "--json", copy)
    assert (status, errors) == (0, "")
    assert found[0]["file"] == str(copy)
    assert found[0]["status"]["executing_workers"] == 2
    assert found[0]["status"]["healthy"] is True
    assert sorted(state_directory.iterdir()) == before


def test_status_of_a_cluster_that_is_not_well(platform, raydog, key, state_directory):
    """Drift is exit status 3, and the cluster is not touched."""
    build(platform, "well", workers=0)
    cluster = build(platform, "ill")
    teardown.tear_down(cluster._platform, cluster._assembly.pool_targets(cluster._pools["worker-nodes-01"]))
    status, found, errors = raydog("status", "--json")
    assert status == 3
    assert [one["status"]["healthy"] for one in found] == [True, False]
    assert "ill is not as it should be" in errors
    assert len(platform.running()) == 6
    # That one could not be asked goes before that.
    (state_directory / "corrupt.json").write_text("{}")
    status, found, errors = raydog("status", "--json")
    assert status == 1
    assert "error" in found[2]
    assert found[1]["status"]["healthy"] is False


def test_status_of_clusters_that_cannot_be_asked(
    platform, raydog, key, state_directory, tmp_path, monkeypatch
):
    """A legacy file, a wrong key and no platform: 1, with the reason for each."""
    cluster = build(platform, "one", workers=0)
    legacy = legacy_file(cluster, tmp_path / "legacy.json")
    status, found, errors = raydog("status", "--json", legacy, own_file(state_directory, "one"))
    assert status == 1
    assert "only shut-down is possible" in found[0]["error"]
    assert found[1]["status"]["healthy"] is True

    monkeypatch.setenv("YD_API_KEY_SECRET", "another-secret")
    status, found, errors = raydog("status", "--json")
    assert status == 1
    assert "does not accept the application key" in found[0]["error"]
    assert "another-secret" not in errors + json.dumps(found)

    monkeypatch.setenv("YD_API_URL", "http://127.0.0.1:9")
    status, text, errors = raydog("status")
    assert (status, text) == (1, "")
    assert "no answer from 127.0.0.1:9" in errors


# -- logs ---------------------------------------------------------------------------------------------


def test_logs_say_what_there_is(platform, raydog, key, state_directory):
    """Without SSH there is no output of nodes that live; a pool can be chosen; wrong ones are told."""
    build(platform, "one")
    file = own_file(state_directory, "one")
    status, found, errors = raydog("logs", "--json", file)
    assert status == 1
    assert "--ssh-user" in errors
    assert {entry["pool"] for entry in found[0]["logs"]} == {"head-node", "worker-nodes-01"}
    assert all(entry["note"] for entry in found[0]["logs"])
    status, found, _ = raydog("logs", "--json", file, "head-node", "--bytes", 10)
    assert [entry["pool"] for entry in found[0]["logs"]] == ["head-node"]
    status, text, _ = raydog("logs", file)
    assert text.count("==>") == 3
    status, found, errors = raydog("logs", "--json", file, "no-such-pool")
    assert status == 1
    assert "'head-node', 'worker-nodes-01'" in found[0]["error"]


def test_logs_of_a_pool_that_is_called_like_the_heads(platform, raydog, key, state_directory):
    """It goes by its name in the status."""
    build(platform, "one", pool_name="head-node")
    file = own_file(state_directory, "one")
    names = set(raydog("status", "--json", file)[1][0]["status"]["pools"])
    _, found, _ = raydog("logs", "--json", file)
    assert {entry["pool"] for entry in found[0]["logs"]} == names == {"head-node", "one-01-wrkrs"}
    _, found, _ = raydog("logs", "--json", file, "one-01-wrkrs")
    assert [entry["pool"] for entry in found[0]["logs"]] == 2 * ["one-01-wrkrs"]


def test_logs_of_a_task_that_failed(platform, raydog, key, state_directory, monkeypatch, tmp_path):
    """What can be had of any node makes the exit status 0; an unreachable head is a note."""
    build(platform, "one", workers=0)
    file = own_file(state_directory, "one")
    monkeypatch.setenv("PASSWORD", "distinctive-password")
    status, found, errors = raydog(
        "logs", "--json", file, "--ssh-user", "me", "--ssh-port", 9, "--ssh-password-env", "PASSWORD"
    )
    assert status == 1
    assert "no output could be had" in found[0]["error"]
    assert "distinctive-password" not in errors + json.dumps(found)
    make_key(tmp_path / "key")
    way = ("--ssh-user", "me", "--ssh-key", tmp_path / "key", "--ssh-jump", "127.0.0.1:7")
    status, found, errors = raydog("logs", "--json", file, *way)
    assert "127.0.0.1:7" in found[0]["logs"][0]["note"]  # the bastion is what was tried first
    from yellowdog_ray.raydog import reach

    monkeypatch.setattr(reach.Reach, "task_output", lambda *arguments: "hello\nworld")
    status, text, errors = raydog("logs", file, "--ssh-user", "me")
    assert (status, errors) == (0, "")
    assert text.startswith("==> ")
    assert "hello\nworld" in text


# -- shut-down ----------------------------------------------------------------------------------------


def test_shut_down_one_many_and_all(platform, raydog, key, state_directory, tmp_path, monkeypatch):
    """Files, directories and --all; each cluster once, its own file gone, others left alone."""
    clusters = {name: build(platform, name, workers=0) for name in ("one", "two", "three", "four", "five")}
    one = own_file(state_directory, "one")
    assert raydog("shut-down", one, one)[:2] == (0, f"{one}: shut down\n")
    assert not one.exists()
    copies = tmp_path / "copies"
    copies.mkdir()
    for name in ("two", "three"):
        clusters[name].save_state_to_json_file(copies / f"{name}.json")
    # The copy, and the cluster's own file, which is gone when its turn comes.
    status, found, errors = raydog("shut-down", "--json", copies, own_file(state_directory, "two"))
    assert (status, errors) == (0, "")
    assert [one["result"] for one in found] == ["shut down"] * 3
    assert [one["still_running"] for one in found] == [[]] * 3
    assert len(list(copies.iterdir())) == 2
    legacy = legacy_file(clusters["four"], tmp_path / "legacy.json")
    # Such a file does not tell its API.
    monkeypatch.setenv("YD_API_URL", platform.url)
    assert raydog("shut-down", legacy)[:2] == (0, f"{legacy}: shut down\n")
    status, text, errors = raydog("shut-down", "--all")
    assert (status, errors) == (0, "")
    assert text.count("shut down") == 2
    assert platform.running() == []
    assert list(state_directory.glob("*.json")) == []


def test_shut_down_needs_to_be_told_what(platform, raydog, key, state_directory):
    """Nothing is shut down by default."""
    build(platform, "one", workers=0)
    for arguments in ([], ["--all", state_directory]):
        status, found, errors = raydog("shut-down", "--json", *arguments)
        assert (status, found) == (2, [])
        assert "--all" in errors
    assert len(platform.running()) == 3


def test_one_that_fails_keeps_none_of_the_others(platform, raydog, key, state_directory, tmp_path):
    """Corrupt and missing files among good ones: the good ones are shut down."""
    build(platform, "one", workers=0)
    (state_directory / "a.json").write_text("[]")
    status, found, errors = raydog("shut-down", "--json", tmp_path / "missing.json", state_directory)
    assert status == 1
    assert [("error" in one and bool(one["error"])) for one in found] == [True, False, True]
    assert "missing.json" in errors
    assert "a.json" in errors
    assert platform.running() == []


def test_a_teardown_that_keeps_failing(platform, raydog, key, state_directory):
    """1, with what may still be running; the file stays, and a second run ends it."""
    build(platform, "one")
    build(platform, "two", workers=0)
    platform.faults.faults = [
        Fault("DELETE", "", 500, count=None),
        Fault("PUT", "TERMINATED", 500, count=None),
        Fault("PUT", "CANCELLED|transition", 500, count=None),
    ]
    status, found, errors = raydog("shut-down", "--json", "--all")
    assert status == 1
    assert {one["result"] for one in found} == {"failed"}
    assert any("one-01-wrkrs" in item for item in found[0]["still_running"])
    assert found[0]["still_running"][0] in errors
    assert own_file(state_directory, "one").exists()
    platform.faults.clear()
    status, _, errors = raydog("shut-down", "--all")
    assert (status, errors) == (0, "")
    assert platform.running() == []
    assert list(state_directory.glob("*.json")) == []


def test_a_wrong_key_ends_nothing(platform, raydog, key, state_directory, monkeypatch):
    """The file stays, and so does the cluster."""
    build(platform, "one", workers=0)
    monkeypatch.setenv("YD_API_KEY_ID", "another-key")
    status, found, _ = raydog("shut-down", "--json", "--all")
    assert status == 1
    assert "does not accept the application key" in found[0]["error"]
    assert found[0]["still_running"]
    assert len(platform.running()) == 3
    assert own_file(state_directory, "one").exists()


def test_keep_logs(platform, raydog, key, state_directory, tmp_path, monkeypatch):
    """The nodes' output is kept, and that it cannot be had keeps nothing running."""
    from yellowdog_ray.raydog import reach

    build(platform, "one", workers=1)
    monkeypatch.setattr(reach.Reach, "task_output", lambda *arguments: "hello")
    assert raydog("shut-down", "--all", "--keep-logs", tmp_path / "kept", "--ssh-user", "me")[0] == 0
    kept = list((tmp_path / "kept" / "one").rglob("*.log"))
    assert len(kept) == 2
    assert {file.read_text() for file in kept} == {"hello"}
    legacy = legacy_file(build(platform, "two", workers=0), tmp_path / "legacy.json")
    (tmp_path / "a-file").write_text("")
    monkeypatch.setenv("YD_API_URL", platform.url)
    build(platform, "three", workers=0)
    for states in (legacy, own_file(state_directory, "three")):
        status, _, errors = raydog(
            "shut-down", states, "--keep-logs", tmp_path / "a-file", "--ssh-user", "me"
        )
        assert status == 0
        assert "could not be kept" in errors
    assert platform.running() == []


def test_the_record_beside_a_state_file_elsewhere(platform, raydog, key, state_directory, tmp_path, embedded):
    """A head whose key differs from the cluster's own record of it is not logged in to."""
    cluster = build(platform, "one", workers=0)
    state = json.loads(own_file(state_directory, "one").read_text())
    own_file(state_directory, "one").unlink()
    (head,) = state["pools"]
    head["private_ip"] = "127.0.0.1"
    file = tmp_path / "c.json"
    file.write_text(json.dumps({**state, "state_file": str(file)}))
    other = make_key(tmp_path / "other")
    record = tmp_path / ".c.json.known_hosts"
    record.write_text(f"[127.0.0.1]:{embedded.port} {other}\n")
    options = ["--ssh-user", embedded.user, "--ssh-key", embedded.key, "--ssh-port", embedded.port]
    status, found, _ = raydog("logs", file, *options, "--json")
    assert status == 1
    assert "is not the server that was expected" in found[0]["logs"][0]["note"]
    status, _, errors = raydog("shut-down", file, *options, "--keep-logs", tmp_path / "kept")
    assert status == 0
    assert "is not the server that was expected" in errors
    assert "was shown to it" in errors
    assert not list(tmp_path.glob("kept/**/*.log"))
    cluster.detach()


def test_more_than_one_at_a_time(platform, raydog, key):
    """Four clusters take hardly longer than one."""
    for number in range(4):
        build(platform, f"cluster{number}", workers=0)
    platform.faults.latency = 0.1
    began = time.monotonic()
    assert raydog("shut-down", "--all")[0] == 0
    together = time.monotonic() - began
    platform.faults.latency = 0.0
    build(platform, "single", workers=0)
    platform.faults.latency = 0.1
    began = time.monotonic()
    assert raydog("shut-down", "--all")[0] == 0
    assert together < 2.5 * (time.monotonic() - began)


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_in_this_process(platform, raydog, key, state_directory, number, expected):
    """The command returns at once and says what is not done; the handlers are those of before."""
    usual = signal.signal(signal.SIGINT, signal.default_int_handler)
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    for name in ("a1", "b1", "c1", "d1", "e1"):
        build(platform, name, workers=0)
    platform.faults.faults = [Fault("*", "", "hang", count=None, seconds=20.0)]
    timer = threading.Timer(0.5, os.kill, (os.getpid(), number))
    timer.start()
    began = time.monotonic()
    status, found, errors = raydog("shut-down", "--json", "--all")
    assert time.monotonic() - began < 5
    assert status == expected
    assert [one["result"] for one in found] == ["interrupted"] * 5
    assert "May still be running" in errors
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    signal.signal(signal.SIGINT, usual)
    platform.faults.clear()


def test_how_much_is_said(platform, raydog, key):
    """-v logs what is done, -q not even warnings, before the command and after it; errors are said always."""
    build(platform, "one", workers=0)
    platform.faults.faults = [Fault("DELETE", "", 500, count=None), Fault("PUT", "", 500, count=None)]
    for arguments, what in (
        (["shut-down", "--all"], "WARNING could not"),
        (["-v", "shut-down", "--all"], "INFO Shutting the cluster one down"),
        (["shut-down", "-v", "--all"], "INFO Shutting the cluster one down"),
        (["-q", "shut-down", "--all"], None),
        (["shut-down", "-q", "--all"], None),
    ):
        status, _, errors = raydog(*arguments)
        assert status == 1
        assert "raydog: " in errors
        assert "one-00-head" in errors
        if what is None:
            assert errors.startswith("raydog: ")
        else:
            assert what in errors


# -- the key ------------------------------------------------------------------------------------------


def test_key_from_an_env_file(platform, raydog, key, state_directory, monkeypatch, tmp_path):
    """The .env of the directory, with quotes and comments; the environment goes first; --env-file instead."""
    build(platform, "one", workers=0)
    monkeypatch.delenv("YD_API_KEY_ID")
    monkeypatch.delenv("YD_API_KEY_SECRET")
    assert raydog("status")[0] == 2
    env = Path(".env")
    text = f"# mine\nexport YD_API_KEY_ID='{KEY_ID}'\nYD_API_KEY_SECRET=\"{SECRET}\"  # hush\nOTHER\n"
    env.write_text(text, encoding="utf-8-sig")
    assert raydog("status")[0] == 0
    assert "YD_API_KEY_SECRET" not in os.environ
    assert env.read_text(encoding="utf-8-sig") == text

    monkeypatch.setenv("YD_API_KEY_ID", "another-key")
    assert raydog("status")[0] == 1
    monkeypatch.setenv("YD_API_KEY_ID", "")
    assert raydog("status")[0] == 0

    env.write_text("YD_API_KEY_ID=wrong\nYD_API_KEY_SECRET=wrong\n")
    (tmp_path / "mine.env").write_text(f"{text}YD_API_URL=http://127.0.0.1:9\n")
    assert raydog("status", "--env-file", tmp_path / "mine.env")[0] == 1
    monkeypatch.setenv("YD_API_URL", platform.url)
    assert raydog("status", "--env-file", tmp_path / "mine.env")[0] == 0


def test_no_usable_key_is_wrong_usage(raydog, key, monkeypatch, tmp_path):
    """2, nothing on the standard output but an empty list, and no secret anywhere."""
    (tmp_path / "latin.env").write_bytes(b"YD_API_KEY_ID=\xe9\n")
    for given in ("missing.env", tmp_path / "latin.env", tmp_path):
        status, found, errors = raydog("status", "--json", "--env-file", given)
        assert (status, found) == (2, [])
        assert "cannot be read" in errors
    for secret in (f"{SECRET}\nmore", f"{SECRET}\u20ac", f"{SECRET} "):
        monkeypatch.setenv("YD_API_KEY_SECRET", secret)
        status, found, errors = raydog("shut-down", "--all", "--json")
        assert (status, found) == (2, [])
        assert "YD_API_KEY_SECRET" in errors
    monkeypatch.setenv("YD_API_KEY_SECRET", SECRET)
    monkeypatch.setenv("YD_API_URL", "http://example.com")
    assert raydog("status", "--json")[0] == 2


@pytest.mark.parametrize(
    "arguments",
    [
        ["logs"],
        ["logs", "a", "b", "c"],
        ["logs", "."],
        ["logs", "a", "--bytes", "0"],
        ["logs", "a", "--ssh-key", "b"],
        ["connect", "a", "--ssh-jump", "b"],
        ["logs", "a", "--ssh-user", "me", "--ssh-port", "0"],
        ["logs", "a", "--ssh-user", "me", "--ssh-jump", "-oProxyCommand=x"],
        ["logs", "a", "--ssh-user", "me", "--ssh-host-key", "nonsense"],
        ["logs", "a", "--ssh-user", "me", "--ssh-password-env", "NOT_SET"],
        ["list", "--no-such-option"],
        ["status", "-v", "-q"],
    ],
)
def test_wrong_usage(raydog, key, arguments):
    """2; with --json, an empty list is on the standard output even then."""
    status, found, errors = raydog(*arguments, "--json")
    assert (status, found) == (2, [])
    assert errors


# -- as a process of its own --------------------------------------------------------------------------


def started(*arguments, **options) -> subprocess.Popen[str]:
    # What this process ignores, a new one would ignore too.
    usual = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(
            [*COMMAND, *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **options},
        )
    finally:
        signal.signal(signal.SIGINT, usual)


def test_two_processes_on_the_same_file(platform, key, state_directory):
    """Both succeed, and the file is gone."""
    build(platform, "one")
    file = own_file(state_directory, "one")
    platform.faults.latency = 0.3
    running = [started("shut-down", "-v", "--json", file) for _ in range(2)]
    for process in running:
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
        assert json.loads(out)[0]["result"] == "shut down"
        assert "Shutting the cluster one down" in err
        assert SECRET not in out + err
    assert platform.running() == []
    assert not file.exists()


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_process_that_is_interrupted(platform, raydog, key, state_directory, number, expected):
    """It ends at once although the platform hangs, with valid JSON; a second run ends the cluster."""
    build(platform, "one", workers=0)
    platform.faults.faults = [Fault("*", "", "hang", count=None, seconds=60.0)]
    seen = len(platform.faults.seen)
    process = started("shut-down", "--json", "--all")
    wait_until(lambda: len(platform.faults.seen) > seen)
    process.send_signal(number)
    out, err = process.communicate(timeout=5)
    assert process.returncode == expected
    found = json.loads(out)
    assert found[0]["result"] == "interrupted"
    assert str(own_file(state_directory, "one")) in err
    assert "Traceback" not in err
    platform.faults.clear()
    assert raydog("shut-down", "--all")[0] == 0
    assert platform.running() == []


def test_an_output_that_nobody_reads(platform, key, state_directory):
    """A broken pipe keeps no cluster running, and is exit status 1."""
    build(platform, "one", workers=0)
    process = started("shut-down", "--all")
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(60) == 1
    assert "could not be written" in err
    assert "Traceback" not in err
    assert platform.running() == []


def test_status_as_a_process(platform, key, state_directory, tmp_path):
    """Its exit status is the process's."""
    build(platform, "one", workers=0)
    process = started("status", "--json", state_directory)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    assert json.loads(out)[0]["status"]["healthy"] is True
    process = started("status", "--json", tmp_path / "missing", LC_ALL="C", PYTHONUTF8="0")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "there is no such file" in json.loads(out)[0]["error"]


def wait_until(condition, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
