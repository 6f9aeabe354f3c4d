"""The `raydog` command's arguments, environment and exit statuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.controlplane import Served, serve
from yellowdog_ray import RayDogCluster, __version__
from yellowdog_ray.cli import main


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    """`raydog --version` prints the version."""
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert __version__ in capsys.readouterr().out


def test_no_command_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    """`raydog` without a command exits with 2 and names the commands."""
    with pytest.raises(SystemExit) as ended:
        main([])
    assert ended.value.code == 2
    assert "COMMAND" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--port", "99999", "99999"),
        ("--template", "local/big", "'local/big'; it is NAME=CPUS,GIB"),
        ("--template", "local/big=2", "'local/big=2'; it is NAME=CPUS,GIB"),
        ("--template", "local/big=2,x", "'local/big=2,x'; it is NAME=CPUS,GIB"),
        ("--template", "local/big=0,1", "vcpus of a node must be a positive number"),
        ("--template", "big=2,1", "namespace/name, not 'big'"),
        ("--template", "Local/Big Node=2,1", "'Local/Big Node', 'Local' is not a valid name"),
        ("--template", "local/big=2,1", "--template local/big is given twice"),
        ("--name", "../x", "'../x'"),
    ],
)
def test_local_start_refuses_what_cannot_work(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    option: str,
    value: str,
    said: str,
) -> None:
    """Options of `raydog local start` that cannot work are wrong usage, in JSON too, and nothing is made."""
    monkeypatch.setenv("RAYDOG_LOCAL_DIR", str(tmp_path / "local"))
    # A template that is given twice says what two given once do not.
    options = [option, value] * (2 if said.endswith("twice") else 1)
    assert main(["local", "start", "--json", *options]) == 2
    printed = capsys.readouterr()
    answer = json.loads(printed.out)
    assert answer["name"] == (value if option == "--name" else "default")
    assert said in answer["error"]
    assert answer["error"] in printed.err
    assert not (tmp_path / "local").exists()


@pytest.mark.parametrize(
    ("words", "written"),
    [
        (["local", "start", "--port", "x", "--json"], {"error": "wrong usage"}),
        (["-q", "local", "--json"], {"error": "wrong usage"}),
        (["status", "--json", "--what"], []),
        (["list", "local", "--json", "--what"], []),
    ],
    ids=str,
)
def test_wrong_usage_in_json(capsys: pytest.CaptureFixture[str], words: list[str], written: object) -> None:
    """With --json, wrong usage writes what the command writes otherwise: a list, or of `local` an object."""
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    assert json.loads(capsys.readouterr().out) == written


def test_shut_down_needs_a_key(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Without an application key, `raydog shut-down` exits with 2 and names the variables."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("YD_API_KEY_ID", raising=False)
    monkeypatch.setenv("YD_API_KEY_SECRET", "secret")
    assert main(["shut-down", str(tmp_path / "state.json")]) == 2
    assert "YD_API_KEY_ID" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["", "list", "status", "logs", "connect", "shut-down"])
def test_help_says_the_exit_statuses(capsys: pytest.CaptureFixture[str], command: str) -> None:
    """`--help` of the command and of each of its commands on states tells all exit statuses."""
    with pytest.raises(SystemExit) as ended:
        main([*filter(None, [command]), "--help"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    for status in ("  0  ", "  1  ", "  2  ", "  3  ", "  130  ", "  143  "):
        assert status in printed


def test_one_bad_state_does_not_keep_the_others_running(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Of several states, those that can be shut down are, and the exit status tells of the others."""
    with serve() as platform:
        cluster = _built(platform)
        good, bad, missing = (tmp_path / name for name in ("good.json", "bad.json", "missing.json"))
        cluster.save_state_to_json_file(str(good))
        bad.write_text("[]")
        monkeypatch.setenv("YD_API_KEY_ID", platform.key_id)
        monkeypatch.setenv("YD_API_KEY_SECRET", platform.secret)
        monkeypatch.delenv("YD_API_URL", raising=False)

        assert main(["shut-down", str(missing), str(bad), str(good)]) == 1

        printed = capsys.readouterr()
        assert f"{good}: shut down" in printed.out
        assert str(bad) in printed.err
        assert str(missing) in printed.err
        assert platform.secret not in printed.out + printed.err
        assert platform.secret not in good.read_text()
        pools = platform.call(lambda: [pool.status for pool in platform.core.scheduler.pools.values()])
        assert set(pools) == {"TERMINATED"}
        assert json.loads(good.read_text())["api_url"] == platform.url
        cluster.shut_down()


def _built(platform: Served) -> RayDogCluster:
    template = next(iter(platform.core.scheduler.templates.values()))
    cluster = RayDogCluster(
        platform.key_id,
        platform.secret,
        "cli-test",
        "test",
        f"{template.namespace}/{template.name}",
        None,
        platform.url,
    )
    cluster.build()
    return cluster
