"""Whose host keys are believed: by pins, by known_hosts files of all kinds of lines, and on first use."""

from __future__ import annotations

import json
import re
import threading
from pathlib import Path
from typing import Any

import asyncssh
import pytest

from yellowdog_ray.errors import HostKeyError, SpecError
from yellowdog_ray.utils._ssh import hostkeys
from yellowdog_ray.utils._ssh.hostkeys import (
    HostKey,
    HostKeys,
    default_record,
    option_value,
    parse_pin,
    record_beside,
)


def new_key(kind: str = "ssh-ed25519") -> HostKey:
    return HostKey.parse(asyncssh.generate_private_key(kind).export_public_key().decode())


ONE, OTHER, ECDSA = new_key(), new_key(), new_key("ecdsa-sha2-nistp256")


@pytest.fixture(autouse=True)
def user_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's own known_hosts, which is not there yet."""
    path = tmp_path / "user_known_hosts"
    monkeypatch.setattr(hostkeys, "_USER_FILES", (str(path),))
    return path


@pytest.fixture
def record(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "record"


def check(
    keys: HostKeys, found: HostKey, host: str = "head.example", port: int = 22, pinned: bool = True
) -> None:
    keys.check(found, f"{host}:{port}", host, port, pinned)


HASHED = (
    "|1|F1E1KeoE/eEWhi10WpGv4OdiO6Y=|3988QV0VE8wmZL7suNrYQLITLCg="  # of 192.168.1.61, from ssh's manual page
)


@pytest.mark.parametrize(
    ("line", "host", "port", "speaks"),
    [
        ("head.example {key}", "head.example", 22, True),
        ("HEAD.example {key} a comment", "head.EXAMPLE", 22, True),
        ("other.example,head.example {key}", "head.example", 22, True),
        ("*.example {key}", "head.example", 22, True),
        ("*.example,!head.example {key}", "head.example", 22, False),
        ("h?ad.example {key}", "head.example", 22, True),
        ("head.example {key}", "head.example", 2222, False),
        ("[head.example]:2222 {key}", "head.example", 2222, True),
        ("[head.example]:2222 {key}", "head.example", 22, False),
        ("[fe80::1]:2222 {key}", "fe80::1", 2222, True),
        ("fe80::1 {key}", "fe80::1", 22, True),
        (HASHED + " {key}", "192.168.1.61", 22, True),
        (HASHED + " {key}", "192.168.1.62", 22, False),
        ("|1|broken {key}", "head.example", 22, False),
        ("# head.example {key}", "head.example", 22, False),
        ("@cert-authority *.example {key}", "head.example", 22, False),
        ("head.example nonsense", "head.example", 22, False),
    ],
)
def test_lines(line: str, host: str, port: int, speaks: bool, user_file: Path, record: Path) -> None:
    """A line that speaks of the host decides; any other one leaves it unknown, and strictly refused."""
    user_file.write_text(f"\n{line.format(key=ONE.line)}\n")
    strict = HostKeys(None, True, record)
    if speaks:
        check(strict, ONE, host, port)
        with pytest.raises(
            HostKeyError, match=rf"has changed.* {re.escape(OTHER.fingerprint)}.*known is .*:2"
        ):
            check(HostKeys(None, False, record), OTHER, host, port)
    else:
        with pytest.raises(HostKeyError, match="strict checking is on"):
            check(strict, ONE, host, port)
    assert not record.exists()


def test_revoked_keys(user_file: Path, record: Path) -> None:
    """A key that is marked as revoked is refused, also where another line knows it."""
    user_file.write_text(f"head.example {ONE.line}\n@revoked * {ONE.line}\n")
    with pytest.raises(HostKeyError, match="revoked"):
        check(HostKeys(None, False, record), ONE)


def test_pins(record: Path, user_file: Path) -> None:
    """A pin decides alone, as a line or a fingerprint; it may be another server's key too, but need not."""
    user_file.write_text(f"head.example {OTHER.line}\n")
    for pin in (ONE.line, f"{ONE.line} root@head\n", ONE.fingerprint, f"{ONE.fingerprint}="):
        keys = HostKeys(pin, False, record)
        check(keys, ONE)
        with pytest.raises(HostKeyError, match="expected was"):
            check(keys, OTHER)
        check(keys, OTHER, "worker.example", pinned=False)
        check(keys, ONE, "another.example", pinned=False)
    assert keys.kinds("head.example", 22, True) == []
    assert HostKeys(ECDSA.line, False, record).kinds("head.example", 22, True) == ["ecdsa-sha2-nistp256"]
    for wrong in ("", "SHA256:abc", "ssh-ed25519", f"ssh-rsa {ONE.line.split()[1]}", "MD5:00:11", 7):
        with pytest.raises(SpecError, match="host_key must be"):
            parse_pin(wrong)  # type: ignore[arg-type]


def test_first_use(record: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The first key is recorded with one line in the log, and holds for later objects and this one."""
    keys = HostKeys(None, False, record)
    check(keys, ONE)
    check(keys, ONE)
    assert len(caplog.records) == 1
    assert ONE.fingerprint in caplog.text
    assert str(record) in caplog.text
    assert record.read_text() == f"head.example {ONE.line}\n"
    assert (record.stat().st_mode & 0o777, record.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    check(HostKeys(None, True, record), ONE)
    for later in (keys, HostKeys(None, False, record)):
        with pytest.raises(HostKeyError, match="No user name, password or key was shown"):
            check(later, OTHER)
    assert HostKeys(None, False, record).kinds("head.example", 22, True) == ["ssh-ed25519"]
    record.unlink()  # one object goes by what it has seen
    with pytest.raises(HostKeyError, match="before it was"):
        check(keys, OTHER)


def test_a_record_that_cannot_be_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Where nothing can be recorded, that is said, and the key still holds for the object."""
    (tmp_path / "file").write_text("")
    keys = HostKeys(None, False, tmp_path / "file" / "record")
    check(keys, ONE)
    assert "could not be recorded" in caplog.text
    with pytest.raises(HostKeyError):
        check(keys, OTHER)


def test_bastions_have_the_common_record(record: Path, state_directory: Path) -> None:
    """A cluster's record holds its head's and workers' keys; that of a bastion goes into the common one."""
    state_directory.mkdir()
    running = state_directory / "a.json"
    running.write_text(state("one", "running", public_ip="192.0.2.1"))
    for own, given in ((record, record), (record_beside(running), None)):
        keys = HostKeys(None, False, given)
        keys.pass_through("bastion.example", 2222)
        check(keys, OTHER, "bastion.example", 2222, pinned=False)
        check(keys, ONE, "192.0.2.1")
        check(keys, ECDSA, "10.0.0.9+task", pinned=False)
        assert own.read_text() == f"192.0.2.1 {ONE.line}\n10.0.0.9+task {ECDSA.line}\n"
        assert (state_directory / "known_hosts").read_text() == f"[bastion.example]:2222 {OTHER.line}\n"
        again = HostKeys(None, False, given)
        again.pass_through("bastion.example", 2222)
        with pytest.raises(HostKeyError, match="has changed"):
            check(again, ONE, "bastion.example", 2222, pinned=False)


def test_paths_for_ssh() -> None:
    """ssh is told a path as it is; one that it would read otherwise is refused."""
    assert option_value("/a key/100%h") == '"/a key/100%%h"'
    for path in ('/a"b', "/a\\b", "/${HOME}", "/a\nb"):
        with pytest.raises(SpecError, match="cannot be told the path"):
            option_value(path)


def test_first_use_by_many(record: Path) -> None:
    """Of many that see different keys at once, one is right and the others are refused."""
    found = [new_key() for _ in range(8)]
    believed: list[HostKey] = []
    barrier = threading.Barrier(8)

    def use(key: HostKey) -> None:
        keys = HostKeys(None, False, record)
        barrier.wait()
        try:
            check(keys, key)
        except HostKeyError:
            return
        believed.append(key)

    threads = [threading.Thread(target=use, args=(key,)) for key in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(believed) == 1
    assert record.read_text() == f"head.example {believed[0].line}\n"


def state(name: str, status: str, **addresses: Any) -> str:
    head = {
        "name": f"{name}-00-head",
        "role": "head",
        "group": "head-node",
        "internal_name": "head-node",
        "node_count": 1,
        **addresses,
    }
    values = {"cluster_name": name, "cluster_namespace": "test", "work_requirement_id": None}
    return json.dumps({**values, "worker_pool_ids": [], "pools": [head], "status": status})


def test_the_record_of_a_cluster(state_directory: Path) -> None:
    """An address that is a cluster's head has that cluster's record; any other address the common one."""
    state_directory.mkdir()
    running, ending = state_directory / "a.json", state_directory / "b.json"
    running.write_text(state("one", "running", public_ip="192.0.2.1", private_ip="10.0.0.1"))
    ending.write_text(state("two", "ending", public_ip="192.0.2.2"))
    (state_directory / "broken.json").write_text("{")
    assert default_record("192.0.2.1") == default_record("10.0.0.1") == record_beside(running)
    assert default_record("192.0.2.2") == default_record("head.example") == state_directory / "known_hosts"
    # It goes when the state file goes.
    assert record_beside(running).match(f".{running.name}.*")
