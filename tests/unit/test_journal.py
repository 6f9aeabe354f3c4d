"""The state file that is kept up to date: many writers, full disks, and nobody's secrets."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import resource
import signal
import stat
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.controlplane import KEY_ID, SECRET, Fault, serve
from yellowdog_ray.errors import ClusterStateError, PlatformError, SpecError, StateError
from yellowdog_ray.raydog.builder import RayDogCluster
from yellowdog_ray.raydog.journal import Journal, default_path, find_states, state_directory
from yellowdog_ray.raydog.state import ClusterState, PoolState

# Copies of a process without threads.
processes = multiprocessing.get_context("forkserver")

STATE = ClusterState(
    cluster_name="demo",
    cluster_namespace="test",
    work_requirement_id=None,
    worker_pool_ids=[],
    build_id="00ff",
    status="building",
)


def pool(name: str) -> PoolState:
    return PoolState(name=f"demo-{name}", role="worker", group=f"g-{name}", internal_name=name, node_count=1)


def adding(name: str):
    return lambda state: state.with_pools(pool(name))


def counting(state: ClusterState) -> ClusterState:
    return state.but(worker_pools_counted=state.worker_pools_counted + 1)


@pytest.fixture
def journal(tmp_path) -> Journal:
    return Journal.create(tmp_path / "demo.json", STATE)


@pytest.fixture
def full(monkeypatch):
    """A disk that can be full: call it with True or False."""
    there = False
    fsync = os.fsync

    def writing(descriptor: int) -> None:
        if there:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", writing)

    def switch(on: bool) -> None:
        nonlocal there
        there = on

    return switch


def make(url: str = "http://127.0.0.1:9", **options) -> RayDogCluster:
    return RayDogCluster(
        KEY_ID, SECRET, "demo", "test", "test/small", "echo the head's", yd_platform_api_url=url, **options
    )


# -- beginning it -------------------------------------------------------------------------------------


def a_foreign_file(place: Path) -> Path:
    path = place / "notes.txt"
    path.write_text("dear diary")
    return path


def another_clusters(place: Path) -> Path:
    return Journal.create(place / "other.json", STATE.but(cluster_name="other")).path


def below_a_file(place: Path) -> Path:
    return a_foreign_file(place) / "demo.json"


def a_directory(place: Path) -> Path:
    (place / "demo.json").mkdir()
    return place / "demo.json"


@pytest.mark.parametrize(
    ("where", "said"),
    [
        (a_foreign_file, "is there already, and is not a cluster's state"),
        (another_clusters, r"the cluster test/other, which has not been verified as ended.*shut-down"),
        (below_a_file, "cannot be written .*RAYDOG_STATE_DIR"),
        (a_directory, "cannot be written .*RAYDOG_STATE_DIR"),
    ],
)
def test_where_none_can_be(tmp_path, where, said):
    """Where there can be no state file, a build says so before its first call, and what is there stays."""
    path = where(tmp_path)
    before = path.read_bytes() if path.is_file() else None
    with serve() as served:
        cluster = make(served.url, state_file=path)
        with pytest.raises(StateError, match=said):
            cluster.build()
        assert served.faults.seen == []
    assert (path.read_bytes() if path.is_file() else None) == before
    cluster.shut_down()


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_full_disk_at_the_beginning(state_directory, monkeypatch, function):
    """On a full disk nothing is created, and nothing half-written is left."""

    def fail(*_args, **_options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with serve() as served:
        with monkeypatch.context() as patch:
            patch.setattr(os, function, fail)
            with pytest.raises(StateError, match="No space left on device"):
                make(served.url).build()
        assert served.faults.seen == []
    assert [entry for entry in state_directory.iterdir() if entry.suffix != ".lock"] == []


def _no_room(path: str, pipe) -> None:
    """Where files may have no more than so many bytes, which holds for root too."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    answers = []
    journal = Journal.create(Path(path), STATE)
    size = Path(path).stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, resource.RLIM_INFINITY))
    for change in (journal.note, journal.update):
        try:
            change(adding("late"))
        except StateError as error:
            answers.append(str(error))
        else:
            answers.append(None)
    held = ClusterState.load(path)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    journal.update(counting)
    pipe.send((answers, len(held.pools), [entry.name for entry in ClusterState.load(path).pools]))


def test_file_system_that_refuses(tmp_path):
    """A write that the kernel really refuses leaves the old file whole, and what was noted comes later."""
    mine, its = processes.Pipe()
    process = processes.Process(target=_no_room, args=(str(tmp_path / "demo.json"), its))
    process.start()
    its.close()
    (noted, updated), held, later = mine.recv()
    process.join()
    assert noted is None
    assert "cannot be written: File too large" in updated
    assert held == 0
    assert later == ["demo-late"]
    assert [entry.name for entry in tmp_path.iterdir() if entry.suffix == ".part"] == []


def test_who_may_read_it(tmp_path):
    """The file, and a directory that is made for it, are their owner's alone, also after a change."""
    umask = os.umask(0)
    try:
        for path in (default_path("test", "demo", "00ff"), tmp_path / "of my own" / "demo.json"):
            journal = Journal.create(path, STATE)
            assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
            for _ in range(2):
                assert stat.S_IMODE(path.stat().st_mode) == 0o600
                journal.update(counting)
    finally:
        os.umask(umask)


def test_never_the_same_file_twice(state_directory):
    """Two builds of one cluster have different files, in the directory that was configured."""
    with serve() as one, serve() as two, make(one.url) as first, make(two.url) as second:
        for cluster in (first, second):
            cluster.build()
        paths = find_states(state_directory)
    assert len(set(paths)) == 2
    assert {path.parent for path in paths} == {state_directory}


def test_where_it_is_by_default(monkeypatch, tmp_path):
    """Without a configured directory it is the user's own for states."""
    monkeypatch.delenv("RAYDOG_STATE_DIR")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tmp_path in state_directory().parents
    monkeypatch.setenv("RAYDOG_STATE_DIR", "~/mine")
    assert default_path("a", "b", "c") == tmp_path / "mine" / "a.b.c.json"


def test_no_secret_at_any_time(state_directory, monkeypatch):
    """No state that was ever written has a key's secret, the Ray token or a script in it."""
    written, tokens = [], []
    replace = os.replace

    def keeping(source, target):
        if str(target).endswith(".token"):
            tokens.append(Path(source).read_text())
        else:
            written.append(Path(source).read_text())
        replace(source, target)

    monkeypatch.setattr(os, "replace", keeping)
    with serve() as served:
        cluster = make(served.url)
        cluster.add_worker_pool("test/small", "echo a worker's", 1, "one")
        cluster.build()
        cluster.add_worker_pool("test/small", "echo a worker's", 1, "two")
        cluster.scale_worker_pool("two", 2)
        cluster.remove_worker_pool_by_internal_name("one")
        token = os.environ["RAY_AUTH_TOKEN"]
        cluster.shut_down()
    assert tokens == [f"{token}\n"]
    assert {json.loads(text)["status"] for text in written} == {"building", "running", "ending"}
    assert {len(json.loads(text)["pools"]) for text in written} >= {2, 3}
    for text in written:
        for secret in (SECRET, token, "echo", "the head's", "a worker's"):
            assert secret not in text


# -- changing it --------------------------------------------------------------------------------------


def test_threads_at_once(journal, monkeypatch):
    """Changes of many threads are all there, written together: with fewer writes than changes."""
    writes = []
    save = ClusterState.save
    monkeypatch.setattr(ClusterState, "save", lambda *args: (writes.append(args), save(*args)))
    gate = threading.Barrier(16)

    def change(number: int) -> None:
        gate.wait()
        for turn in range(10):
            name = f"p{number}-{turn}"
            assert journal.update(adding(name)).pool(f"demo-{name}") is not None
            # On the disk, and not only promised.
            assert ClusterState.load(journal.path).pool(f"demo-{name}") is not None

    with ThreadPoolExecutor(16) as threads:
        list(threads.map(change, range(16)))
    assert len(ClusterState.load(journal.path).pools) == 160
    assert 0 < len(writes) < 160


def _count(path: str, times: int) -> None:
    journal = Journal.open(Path(path))
    for _ in range(times):
        journal.update(counting)


def test_processes_at_once(journal):
    """Two processes lose none of each other's changes, and the file can be read at every moment."""
    children = [processes.Process(target=_count, args=(str(journal.path), 200)) for _ in range(2)]
    for child in children:
        child.start()
    seen = [0]
    while any(child.is_alive() for child in children):
        seen.append(ClusterState.load(journal.path).worker_pools_counted)
    assert [child.exitcode for child in children] == [0, 0]
    assert journal.refresh().worker_pools_counted == 400
    assert seen == sorted(seen)
    assert len(set(seen)) > 20


def test_noted_on_a_full_disk(journal, full, caplog):
    """What could not be noted goes with the next change; the file on the disk is the old one until then."""
    old = journal.path.read_bytes()
    full(True)
    journal.note(adding("one"))
    journal.note(adding("two"))
    assert "No space left on device" in caplog.text
    assert journal.path.read_bytes() == old
    assert journal.state.pools == []
    full(False)
    journal.update(adding("three"))
    assert [one.internal_name for one in ClusterState.load(journal.path).pools] == ["one", "two", "three"]


def test_updated_on_a_full_disk(journal, full):
    """An update that cannot be written is an error, and is not made later behind the caller's back."""
    full(True)
    with pytest.raises(StateError, match=r"demo\.json cannot be written: No space left on device"):
        journal.update(adding("one"))
    full(False)
    journal.update(adding("two"))
    assert [one.internal_name for one in ClusterState.load(journal.path).pools] == ["two"]


def test_a_change_that_raises(journal):
    """A change that raises changes nothing; its error is raised where it was made, and others are made."""
    gate, taken = threading.Event(), threading.Event()

    def slow(state: ClusterState) -> ClusterState:
        taken.set()
        assert gate.wait(10)
        return state.with_pools(pool("slow"))

    def wrong(_state: ClusterState) -> ClusterState:
        raise SpecError("there already is one")

    with ThreadPoolExecutor(3) as threads:
        first = threads.submit(journal.update, slow)
        assert taken.wait(10)
        # These two wait for the first, and are written together.
        refused, made = threads.submit(journal.update, wrong), threads.submit(journal.update, adding("good"))
        gate.set()
        first.result(10)
        made.result(10)
        with pytest.raises(SpecError, match="there already is one"):
            refused.result(10)
    assert [one.internal_name for one in ClusterState.load(journal.path).pools] == ["slow", "good"]
    before = journal.path.read_bytes()
    with pytest.raises(SpecError):
        journal.note(wrong)
    assert json.loads(before)["pools"] == json.loads(journal.path.read_bytes())["pools"]


class FirstComeLock:
    """A lock that lets threads in as they came, which the usual one does not promise."""

    def __init__(self):
        self.queue: list[object] = []
        self._changed = threading.Condition()

    def __enter__(self):
        me = object()
        with self._changed:
            self.queue.append(me)
            self._changed.wait_for(lambda: self.queue[0] is me, 10)

    def __exit__(self, *_error):
        with self._changed:
            self.queue.pop(0)
            self._changed.notify_all()


def test_interrupted_while_others_wait(journal):
    """An interrupt ends one thread's change, and those that others had given it to write are still made."""
    gate = threading.Event()
    lock = journal._write_lock = FirstComeLock()

    def slow(state: ClusterState) -> ClusterState:
        assert gate.wait(10)
        return state

    def interrupted(_state: ClusterState) -> ClusterState:
        raise KeyboardInterrupt

    def wait_for(count: int) -> None:
        while len(lock.queue) < count:
            time.sleep(0.001)

    with ThreadPoolExecutor(3) as threads:
        first = threads.submit(journal.update, slow)
        while not lock.queue or journal._pending:
            time.sleep(0.001)
        stopped = threads.submit(journal.update, interrupted)
        wait_for(2)
        other = threads.submit(journal.update, adding("other"))
        wait_for(3)
        gate.set()
        first.result(10)
        with pytest.raises(KeyboardInterrupt):
            stopped.result(10)
        assert other.result(10).pool("demo-other") is not None
    assert ClusterState.load(journal.path).pool("demo-other") is not None


def test_nobody_else_changes_groups(journal, tmp_path, monkeypatch):
    """Only one process at a time may change the task groups; where that cannot be had, it is said."""
    monkeypatch.setattr("yellowdog_ray.raydog.journal._ALONE_SECONDS", 0.1)
    with journal.alone("groups"):
        other = Journal.open(journal.path)
        with pytest.raises(StateError, match="another process has been changing"), other.alone("groups"):
            pytest.fail("two are in it")
        # Meanwhile the state itself can be changed.
        journal.update(counting)
    (tmp_path / "file").write_text("")
    nowhere = Journal(tmp_path / "file" / "demo.json", STATE)
    with pytest.raises(StateError, match="cannot be written"), nowhere.alone("groups"):
        pytest.fail("there can be no lock")


def test_errors_within_the_groups_lock_stay_what_they_are(journal):
    """What the platform says while the groups are changed is not taken for an error of the file."""
    with pytest.raises(PlatformError, match="no answer"), journal.alone("groups"):
        raise PlatformError("no answer")
    with pytest.raises(ConnectionError), journal.alone("groups"):
        raise ConnectionError
    with journal.alone("groups"):
        pass


# -- its end ------------------------------------------------------------------------------------------


def test_removed_by_somebody(journal):
    """Where a running cluster's file was removed, the next change writes all that is known again."""
    journal.update(lambda state: state.with_pools(pool("one")).but(status="running"))
    journal.path.unlink()
    assert journal.refresh().pool("demo-one") is not None
    journal.update(adding("two"))
    there = ClusterState.load(journal.path)
    assert [one.internal_name for one in there.pools] == ["one", "two"]
    assert there.status == "running"


def test_removed_while_it_is_built(state_directory):
    """A build whose state file is removed stops and is taken back: another process has shut it down."""
    with serve() as served:
        served.faults.faults = [Fault("POST", "workerPools", "hang", seconds=0.3, carried_out=True)]

        def remove(event) -> None:
            if type(event).__name__ == "BuildStarted":
                for path in find_states(state_directory):
                    path.unlink()

        cluster = make(served.url, on_event=remove)
        with pytest.raises(ClusterStateError, match="another process"):
            cluster.build()
        assert served.running() == []
    assert find_states(state_directory) == []


@pytest.mark.parametrize("name", ["demo.json", "demo[1].json", "*.json"])
def test_remove_leaves_nothing(tmp_path, name):
    """With the file go its locks and what a killed process had half written, and nothing else."""
    kept = {"neighbour.json", ".neighbour.json.state.lock", ".neighbour.json.x.part"}
    for neighbour in kept:
        (tmp_path / neighbour).write_text("")
    journal = Journal.create(tmp_path / name, STATE)
    with journal.alone("groups"):
        (tmp_path / f".{name}.abc.part").write_text("half")
    journal.remove()
    assert {entry.name for entry in tmp_path.iterdir()} == kept
    journal.remove()


def test_it_cannot_be_removed(tmp_path, caplog):
    """That the file of an ended cluster cannot be removed is said, and no error."""
    journal = Journal.create(tmp_path / "demo.json", STATE)
    journal.path.unlink()
    journal.path.mkdir()
    journal.remove()
    assert "could not be removed" in caplog.text


def test_finding_states(tmp_path):
    """State files are found in the order of their last change, without what is hidden or none."""
    assert find_states(tmp_path / "nowhere") == []
    for age, name in enumerate(["c.json", "a.json", "b.json"]):
        (tmp_path / name).write_text("{}")
        os.utime(tmp_path / name, (1000 - age, 1000 - age))
    for other in (".hidden.json", ".a.json.x.part", ".a.json.state.lock", "notes.txt"):
        (tmp_path / other).write_text("{}")
    (tmp_path / "place.json").mkdir()
    assert [path.name for path in find_states(tmp_path)] == ["b.json", "a.json", "c.json"]
