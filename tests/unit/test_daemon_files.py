"""The files of a local platform that stays: what is written down is checked, and kept from others."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from yellowdog_ray import LocalPlatform
from yellowdog_ray.errors import LocalPlatformError, SpecError
from yellowdog_ray.local.belonging import NODE_FILES
from yellowdog_ray.local.control_plane import DEFAULT_TEMPLATE, LocalControlPlane
from yellowdog_ray.local.daemon import Options, _make
from yellowdog_ray.local.directory import hold, new_directory
from yellowdog_ray.local.home import Home
from yellowdog_ray.local.launch import tidy
from yellowdog_ray.local.node_ssh import SSHIdentity
from yellowdog_ray.local.server import Kept, bind_loopback
from yellowdog_ray.local.template import NodeTemplate
from yellowdog_ray.utils._files import write_private

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the local platform needs Linux")

GOOD: dict[str, Any] = {
    "version": 1,
    "name": "default",
    "url": "http://127.0.0.1:1",
    "key_id": "an-id",
    "secret": "a-secret",
    "namespace": "local",
    "template_names": ["local/node"],
    "ssh_user": "me",
    "ssh_private_key_file": "/nowhere/id_ed25519",
    "ssh_port": 22,
    "ssh_host_key": "ssh-ed25519 AAAA",
    "isolation": "namespaces",
    "description": "nodes are made of nothing",
    "control_url": "http://127.0.0.1:2",
    "control_token": "a-token",
    "pid": None,
    "started": 1.5,
    "directory": "/tmp/raydog-local-none",
    "interface": "",
    "templates": {"local/node": {"vcpus": 1, "ram": 2}},
}


def without(*names: str) -> dict[str, Any]:
    return {name: value for name, value in GOOD.items() if name not in names}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    """The directory of a platform that does not run."""
    monkeypatch.setenv("RAYDOG_LOCAL_DIR", str(tmp_path))
    home = Home()
    home.make()
    return home


@pytest.fixture
def running(home: Home) -> Iterator[int]:
    """A process that is the platform, as far as its lock goes."""
    program = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print(); input()"
    with subprocess.Popen(
        [sys.executable, "-c", program, str(home.directory / "lock")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout
        process.stdout.readline()
        yield process.pid
        process.communicate("\n")


DAMAGED = {
    "no JSON": b"{",
    "another kind": b"[]",
    "nested": b"[" * 100_000,
    "no text": b"\xff\xfe\x00",
    "of another version": json.dumps({**GOOD, "version": 2}).encode(),
    **{f"no {name}": json.dumps(without(name)).encode() for name in ("directory", "name", "url", "secret")},
    **{
        f"{name} {value!r}": json.dumps({**GOOD, name: value}).encode()
        for name, value in {
            "url": "x",
            "control_url": "http://127.0.0.1:99999",
            "key_id": 5,
            "pid": "7",
            "template_names": [],
            "started": "now",
            "templates": {"local/node": {"vcpus": -1, "ram": 1}},
            "interface": None,
        }.items()
    },
}


def test_that_a_key_could_be_read_is_remembered(home: Home) -> None:
    """A key that others could read while it was used is not kept, though the end makes the file private."""
    home.write({**GOOD, "pid": 7})
    home.file.chmod(0o644)
    home.note({**GOOD, "pid": 7, "ending": True})
    home.note({**GOOD, "pid": None})
    assert home.file.stat().st_mode & 0o077 == 0
    renewed = _make(home, Options(keep_key=True))
    assert renewed.key_id != GOOD["key_id"]
    assert renewed._kept.control_token is None  # type: ignore[union-attr]
    # One that was killed is written down as such before anybody looks.
    home.write({**GOOD, "pid": 7})
    assert _make(home, Options(keep_key=True)).key_id == GOOD["key_id"]
    home.file.chmod(0o640)
    assert home.clean_up() == []
    assert _make(home, Options(keep_key=True)).key_id != GOOD["key_id"]


def test_what_a_killed_start_left_is_removed(home: Home) -> None:
    """What a first start made that was killed before anything was written down of it does not stay."""
    directory = new_directory()
    os.close(hold(directory))
    environment = {NODE_FILES: str(directory / "n2")}
    process = subprocess.Popen(["sleep", "1000"], env=environment)
    try:
        assert tidy(home) == []
        assert process.wait(5) == -signal.SIGKILL
    finally:
        process.kill()
        process.wait()
    assert not directory.exists()


@pytest.mark.parametrize("what", DAMAGED)
def test_a_damaged_file_counts_as_none(home: Home, what: str, caplog: pytest.LogCaptureFixture) -> None:
    """Where no platform runs, a file that is damaged or incomplete is passed over, with a warning."""
    home.file.write_bytes(DAMAGED[what])
    assert home.read() == {}
    assert f"{home.file} cannot be read, and is made anew" in caplog.text
    assert home.clean_up() == []
    with pytest.raises(LocalPlatformError, match="raydog local start"):
        LocalPlatform.connect()
    assert _make(home, Options(keep_key=True)).key_id != GOOD["key_id"]


@pytest.mark.parametrize("what", DAMAGED)
def test_a_damaged_file_of_one_that_runs_is_an_error(home: Home, running: int, what: str) -> None:
    """Where a platform runs, nobody can use it without its file; the error says which, and what to do."""
    home.file.write_bytes(DAMAGED[what])
    with pytest.raises(LocalPlatformError, match=r"platform\.json cannot be read.*stop it") as refused:
        home.account(patience=0)
    assert str(running) in str(refused.value)
    if what.startswith("no ") and what not in ("no JSON", "no text"):
        assert f"{what.removeprefix('no ')!r} is missing" in str(refused.value)


def test_what_may_be_absent_or_more(home: Home, running: int) -> None:
    """A file with fields that are not known here, and without those that need not be, is read."""
    optional = ("control_url", "control_token", "description", "interface", "templates")
    home.write({**without(*optional), "pid": running, "from_the_future": [1]})
    known = home.read()
    assert known["pid"] == running
    assert known["control_url"] == ""
    # All that is wrong with it is that nothing answers.
    with pytest.raises(LocalPlatformError, match="gives no answer at http://127"):
        home.account(patience=0)


def test_what_it_goes_on_with(home: Home, caplog: pytest.LogCaptureFixture) -> None:
    """The ports and node sizes stay, the key only where that is asked for, and nobody else could read it."""
    with bind_loopback(None) as api, bind_loopback(None) as control:
        port, control_port = (each.getsockname()[1] for each in (api, control))
    home.write(
        {
            **GOOD,
            "url": f"http://127.0.0.1:{port}",
            "control_url": f"http://127.0.0.1:{control_port}",
            "templates": {"local/big": {"vcpus": 4, "ram": 8}},
        }
    )
    new, kept = _make(home, Options()), _make(home, Options(keep_key=True))
    assert new._kept
    assert kept._kept
    assert (new._port, new._kept.control_port) == (port, control_port)
    assert (kept._port, kept._kept.control_port) == (port, control_port)
    assert (kept.key_id, kept.secret, kept._kept.control_token) == ("an-id", "a-secret", "a-token")
    assert new.key_id != "an-id"
    assert new.secret != "a-secret"
    assert new._kept.control_token is None
    assert new.templates == kept.templates == {"local/big": NodeTemplate(4, 8)}
    others = _make(home, Options(templates={"local/small": NodeTemplate(1, 1)}))
    assert others.template_names == ["local/small"]
    assert caplog.text == ""

    home.file.chmod(0o644)
    exposed = _make(home, Options(keep_key=True))
    assert exposed.secret != "a-secret"
    assert exposed._port == port
    assert "could be read by other users" in caplog.text


@pytest.mark.parametrize(
    "wrong",
    [
        {"port": 0},
        {"port": 99_999},
        {"isolation": "none"},
        {"templates": {"big": NodeTemplate()}},
        {"port": "80"},
        {"port": True},
        {"templates": {"/": NodeTemplate()}},
        {"templates": {"Local/Big Node": NodeTemplate()}},
        {"templates": {"local/x" * 10: NodeTemplate()}},
        {"templates": {}},
        {"templates": ["local/big"]},
        {"templates": {"local/big": {"vcpus": 1, "ram": 1}}},
    ],
    ids=str,
)
def test_options_that_cannot_work(wrong: dict[str, Any]) -> None:
    """Options are refused before anything is started."""
    with pytest.raises(SpecError):
        Options(**wrong)


def test_arguments_that_cannot_work() -> None:
    """So are arguments, by name."""
    with pytest.raises(SpecError, match="limits"):
        LocalPlatform(limits="yes")  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="limits"):
        LocalPlatform(limits=0)  # type: ignore[arg-type]
    for port in (70_000, -1, "80"):
        with pytest.raises(SpecError, match=f"TCP port: {port!r}"):
            LocalControlPlane(port=port)  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="'Big Node' is not a valid name"):
        LocalControlPlane(templates=[replace(DEFAULT_TEMPLATE, name="Big Node")])


def test_a_half_written_file_goes(home: Home) -> None:
    """What a writer that was killed has left goes at the next start, but nothing that is being written."""
    old, new = home.directory / ".platform.json.abc.part", home.directory / ".platform.json.def.part"
    for half in (old, new):
        half.write_text("secret")
    os.utime(old, (1, 1))
    home.make()
    assert new.exists()
    assert not old.exists()


def test_a_full_disk_is_called_by_its_name(tmp_path: Path, home: Home) -> None:
    """Where there is no space, the error names the file, the old one stays, and nothing half lies about."""
    path = tmp_path / "file"
    write_private(path, b"before")
    assert path.stat().st_mode & 0o777 == 0o600
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # To write more than this is an error of the system, as it is on a full disk.
    resource.setrlimit(resource.RLIMIT_FSIZE, (3, limits[1]))
    try:
        with pytest.raises(OSError, match="file") as failed:
            write_private(path, b"afterwards")
        with pytest.raises(OSError, match="id_ed25519"):
            SSHIdentity(home.directory)
        home.note(GOOD)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (failed.value.errno, failed.value.filename) == (errno.EFBIG, str(path))
    assert path.read_bytes() == b"before"
    assert sorted(each.name for each in tmp_path.iterdir()) == ["default", "file"]
    assert list(home.directory.iterdir()) == []


def test_a_start_that_fails_names_the_file(tmp_path: Path) -> None:
    """Where a platform cannot keep its keys, it says in which file, and nothing is left of it."""
    platform = LocalPlatform(kept=Kept("id", "secret", tmp_path / "gone"))
    with pytest.raises(LocalPlatformError, match=rf"{tmp_path}/gone/id_ed25519: No such file"):
        platform.start()
    assert platform.leftovers() == []


def private_key(path: Path, encryption: serialization.KeySerializationEncryption) -> str:
    """Write a new private key, readable by all, and return its public one."""
    key = Ed25519PrivateKey.generate()
    openssh = serialization.PrivateFormat.OpenSSH
    path.write_bytes(key.private_bytes(serialization.Encoding.PEM, openssh, encryption))
    path.chmod(0o644)
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    return public.decode()


def test_a_key_that_others_may_read_is_made_private(tmp_path: Path) -> None:
    """A private key is for its owner only, whoever has put it there."""
    path = tmp_path / "id_ed25519"
    public = private_key(path, serialization.NoEncryption())
    assert SSHIdentity(tmp_path).public_key == public
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("kind", ["passphrase", "damaged"])
def test_a_key_that_cannot_be_used(tmp_path: Path, kind: str) -> None:
    """A key with a passphrase, or a file that is none, is an error that names the file, and what to do."""
    path = tmp_path / "id_ed25519"
    if kind == "damaged":
        path.write_text("no key")
    else:
        private_key(path, serialization.BestAvailableEncryption(b"secret"))
    before = path.read_bytes()
    with pytest.raises(LocalPlatformError, match=rf"{path} is no SSH key.*remove it"):
        SSHIdentity(tmp_path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["id_ed25519"]
