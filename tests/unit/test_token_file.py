"""The file of a cluster's Ray token."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from yellowdog_ray.errors import StateError
from yellowdog_ray.raydog.token_file import new_token, read_token, remove_token, token_path, write_token


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return token_path(tmp_path / "demo.json")


def test_written_for_its_owner_alone(path: Path) -> None:
    """Whatever the umask, nobody else can read the file; nothing else is left in the directory."""
    before = os.umask(0)
    try:
        token = new_token()
        write_token(path, token)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [entry.name for entry in path.parent.iterdir()] == ["demo.json.token"]
    assert read_token(path) == token
    write_token(path, new_token())
    assert read_token(path) != token


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o602, 0o666])
def test_a_file_that_others_may_touch(path: Path, mode: int) -> None:
    """A file that others may read or change is refused, with what to do."""
    write_token(path, new_token())
    path.chmod(mode)
    with pytest.raises(StateError, match=rf"mode is {mode:04o}.*chmod 600"):
        read_token(path)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "short",
        "-----BEGIN OPENSSH PRIVATE KEY-----\nabc\n",
        "a" * 63,
        "a" * 65,
        "A" * 64,
        "a" * 64 + "\nb",
    ],
)
def test_a_file_that_holds_something_else(path: Path, content: str) -> None:
    """What is not a token is not read as one, not shown, not replaced and not removed."""
    path.write_text(content)
    path.chmod(0o600)
    with pytest.raises(StateError) as caught:
        read_token(path)
    assert "does not hold a Ray token" in str(caught.value)
    assert not content or content.strip() not in str(caught.value)
    with pytest.raises(StateError, match="is there already"):
        write_token(path, new_token())
    remove_token(path.with_name("demo.json"), str(path))
    assert path.read_text() == content


def test_what_is_no_file(path: Path) -> None:
    """A pipe is not waited for; a directory and an impossible name are refused."""
    os.mkfifo(path, 0o600)
    for wrong in (path, path.parent, "with\0zero", "\ud800"):
        with pytest.raises(StateError):
            read_token(wrong)
    with pytest.raises(FileNotFoundError):
        read_token(path.with_name("nothing"))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_somebody_elses_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file of another user, who may have put it there, is refused."""
    write_token(path, new_token())
    os.chown(path, 12345, -1)
    monkeypatch.setattr(os, "geteuid", lambda: 4711)
    with pytest.raises(StateError, match="belongs to another user"):
        read_token(path)


def test_only_the_own_file_is_removed(path: Path) -> None:
    """A state that names another file has nothing removed, and a second time is no error."""
    write_token(path, new_token())
    other = path.with_name("other.token")
    write_token(other, new_token())
    remove_token(path.with_name("demo.json"), str(other))
    remove_token(path.with_name("demo.json"), None)
    assert path.exists()
    assert other.exists()
    for _ in range(2):
        remove_token(path.with_name("demo.json"), str(path))
    assert not path.exists()
    assert other.exists()


def test_where_nothing_can_be_written(tmp_path: Path) -> None:
    """The error says which file, and that nothing was created."""
    with pytest.raises(StateError, match=r"nowhere/demo.json.token.*nothing is created"):
        write_token(tmp_path / "nowhere" / "demo.json.token", new_token())
