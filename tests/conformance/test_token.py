"""A cluster's Ray token: in a file beside its state, for other processes and other shells."""

from __future__ import annotations

import json
import os
import shlex
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tests.clusters import SHORT, attach, make
from yellowdog_ray.cli import main
from yellowdog_ray.errors import ClusterStateError, StateError
from yellowdog_ray.raydog.journal import Journal
from yellowdog_ray.raydog.state import ClusterState
from yellowdog_ray.raydog.token_file import read_token, write_token
from yellowdog_ray.utils._ssh.hostkeys import record_beside

pytestmark = pytest.mark.usefixtures("hurried")


@pytest.fixture
def cluster(platform, state_directory):
    """A running cluster with an observability node; nothing of it is left at the end."""
    with make(
        platform, enable_observability=True, observability_node_compute_requirement_template_id="test/small"
    ) as cluster:
        cluster.build(SHORT)
        yield cluster
    assert [path.name for path in state_directory.iterdir() if not path.name.startswith(".")] == []


@pytest.fixture
def path(cluster, state_directory):
    (path,) = state_directory.glob("*.json")
    return path


def token_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.token")


def test_only_the_file_holds_it(cluster, path, tmp_path):
    """The token is in a file for its owner alone, which every state names by its path."""
    token = os.environ["RAY_AUTH_TOKEN"]
    file = token_file(path)
    assert read_token(file) == token
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    cluster.save_state_to_json_file(tmp_path / "elsewhere.json")
    for state in (path, tmp_path / "elsewhere.json"):
        text = state.read_text()
        assert token not in text
        assert json.loads(text)["ray_token_file"] == str(file)


@pytest.mark.parametrize("of", ["own", "saved"])
def test_another_process_reads_it_there(cluster, platform, path, tmp_path, monkeypatch, of):
    """An attached cluster has the token from the file, and does not ask the platform for it."""
    token = os.environ["RAY_AUTH_TOKEN"]
    if of == "saved":
        cluster.save_state_to_json_file(tmp_path / "elsewhere.json")
        path = tmp_path / "elsewhere.json"
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    other = attach(path)
    other.detach()
    seen = len(platform.faults.seen)
    assert other.use_ray_auth() is True
    assert os.environ["RAY_AUTH_TOKEN"] == token
    assert len(platform.faults.seen) == seen


def test_without_the_file_the_platform_is_asked(cluster, path, monkeypatch):
    """On a machine that does not have the file, the head's task tells the token."""
    token = os.environ["RAY_AUTH_TOKEN"]
    token_file(path).unlink()
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    assert attach(path).use_ray_auth() is True
    assert os.environ["RAY_AUTH_TOKEN"] == token


def test_nobody_knows_it(cluster, path, monkeypatch):
    """Where neither tells it, the error says where it can be had."""
    token_file(path).unlink()
    other = attach(path)
    monkeypatch.setattr(other._assembly.head, "task_id", None)
    with pytest.raises(ClusterStateError, match="ray_token_file"):
        other.use_ray_auth()


def test_a_file_that_others_may_read(cluster, path, platform):
    """A token that others may have read is not used; the cluster can still be ended."""
    token_file(path).chmod(0o644)
    other = attach(path)
    with pytest.raises(StateError, match="chmod 600"):
        other.use_ray_auth()
    assert other.status().healthy
    other.shut_down()
    assert platform.running() == []
    assert not token_file(path).exists()


def test_written_before_anything_is_created(platform, state_directory, monkeypatch):
    """Where the token cannot be kept nothing is created, and no file is left."""

    def no_room(path, token):
        assert ClusterState.load(path.with_name(path.name.removesuffix(".token"))).status == "building"
        raise StateError("no room")

    monkeypatch.setattr("yellowdog_ray.raydog.record.write_token", no_room)
    cluster = make(platform)
    with pytest.raises(StateError, match="no room"):
        cluster.build(SHORT)
    assert {method for method, _ in platform.faults.seen} <= {"GET"}
    assert list(state_directory.glob("*.json*")) == []
    monkeypatch.undo()


def test_a_file_of_somebody_else_in_its_place(platform, tmp_path):
    """A file that is no token is neither replaced nor removed."""
    other = tmp_path / "my.json.token"
    other.write_text("a note of mine")
    with pytest.raises(StateError, match="is there already"):
        make(platform, state_file=tmp_path / "my.json").build(SHORT)
    assert other.read_text() == "a note of mine"
    assert not (tmp_path / "my.json").exists()


def test_no_authentication_no_file(platform, state_directory, capsys):
    """A cluster without authentication has no token's file."""
    with make(platform, ray_auth="off") as cluster:
        cluster.build(SHORT)
        (path,) = state_directory.glob("*.json")
        assert ClusterState.load(path).ray_token_file is None
        assert list(state_directory.glob("*.token")) == []
        assert set(_evaluated(_connect(capsys, path)[1])) == {"RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"}


# -- raydog connect ------------------------------------------------------------------------------------

VARIABLES = (
    "RAY_AUTH_MODE",
    "RAY_AUTH_TOKEN",
    "RAY_AUTH_TOKEN_PATH",
    "RAY_ADDRESS",
    "RAY_API_SERVER_ADDRESS",
)


def _connect(capsys, *arguments) -> tuple[int, str, str]:
    status = main(["connect", *map(str, arguments)])
    printed = capsys.readouterr()
    return status, printed.out, printed.err


def _shell(script: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run a script in a shell that has other settings of Ray."""
    return subprocess.run(
        ["sh", "-c", script],
        env={**os.environ, **dict.fromkeys(VARIABLES, "of something else")},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


SHOW = "\n".join(f'echo "{name}=${{{name}-}}"' for name in VARIABLES)


def _evaluated(exports: str) -> dict[str, str]:
    """Evaluate what the command writes, and return the variables that are not empty then."""
    shown = _shell(f'exports={shlex.quote(exports)}\neval "$exports"\n{SHOW}')
    assert (shown.returncode, shown.stderr) == (0, "")
    return {
        name: value for name, _, value in (line.partition("=") for line in shown.stdout.splitlines()) if value
    }


def test_what_a_shell_evaluates(cluster, path):
    """The shell has Ray's variables, the token's file among them, and nothing of another cluster."""
    command = shlex.join([sys.executable, "-m", "yellowdog_ray.cli", "connect", str(path)])
    shown = _shell(f'exports=$({command}) && eval "$exports" && {{ {SHOW}\n}}')
    assert shown.returncode == 0, shown.stderr
    assert dict(line.split("=", 1) for line in shown.stdout.splitlines()) == {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": "",
        "RAY_AUTH_TOKEN_PATH": str(token_file(path)),
        "RAY_ADDRESS": "ray://127.0.0.1:10001",
        "RAY_API_SERVER_ADDRESS": "http://127.0.0.1:8265",
    }


def test_how_to_open_the_tunnels(cluster, path, capsys):
    """The error stream has the ssh command, with what is known of the way; no output holds the token."""
    way = ("--ssh-user", "me", "--ssh-key", "/a key", "--ssh-port", 2222, "--ssh-jump", "you@bastion:22, b")
    status, out, err = _connect(capsys, path, *way)
    assert status == 0
    record = record_beside(path)
    node = cluster.observability_node_private_ip
    address = cluster.head_node_public_ip or cluster.head_node_private_ip
    assert err.splitlines()[-1].strip() == (
        "ssh -N -o ExitOnForwardFailure=yes -o ServerAliveInterval=5 "
        "-L 127.0.0.1:10001:localhost:10001 -L 127.0.0.1:8265:localhost:8265 "
        f"-L 127.0.0.1:3000:{node}:3000 -L 127.0.0.1:9090:{node}:9090 -p 2222 "
        f"-i '/a key' -o IdentitiesOnly=yes -J you@bastion:22,b me@{address}"
    )
    read = subprocess.run(
        ["ssh", "-G", "-F", "none", *shlex.split(err.splitlines()[-1])[1:]],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    for line in ("identitiesonly yes", "proxyjump you@bastion:22,b", "port 2222"):
        assert f"\n{line}\n" in f"\n{read}"
    assert "\nlocalforward [127.0.0.1]:10001 [localhost]:10001\n" in read
    assert os.environ["RAY_AUTH_TOKEN"] not in out + err
    # Without a port it is for ssh's own settings to say; ssh itself reads what is written.
    record.write_text("")
    try:
        status, out, err = _connect(capsys, path, "--ssh-user", "me")
    finally:
        record.unlink()
    command = shlex.split(err.splitlines()[-1])
    read = subprocess.run(
        ["ssh", "-G", "-F", "none", *command[1:]], capture_output=True, text=True, check=True
    )
    for line in ("port 22", "user me", "exitonforwardfailure yes", "serveraliveinterval 5"):
        assert f"\n{line}\n" in f"\n{read.stdout}"
    assert f"userknownhostsfile {record} " in read.stdout
    status, out, err = _connect(capsys, path, "--json")
    (about,) = json.loads(out)
    assert (status, err) == (0, "")
    assert about["environment"]["RAY_AUTH_TOKEN_PATH"] == str(token_file(path))
    assert about["ssh"][-1] == f"USER@{address}"
    assert os.environ["RAY_AUTH_TOKEN"] not in out


EVIL = "$(touch hacked)`touch hacked`';touch hacked;'\ntouch hacked\n\"\x1b]0;x\x07"


@pytest.mark.parametrize(
    "change",
    [
        {"ray_token_file": EVIL},
        {"ray_token_file": f"/tmp/{EVIL}"},
        {"ray_token_file": "/etc/passwd"},
        {"ray_token_file": None},
        {"cluster_tag": EVIL, "ray_auth": "off", "failure": EVIL, "api_url": "http://localhost"},
        {"head": EVIL},
        {"head": "-oProxyCommand=touch hacked"},
    ],
    ids="-".join,
)
def test_a_hostile_state_runs_nothing(cluster, path, tmp_path, capsys, change):
    """Whatever a state file holds, a shell that evaluates the output runs nothing of it."""
    values = json.loads(path.read_text())
    values["state_file"] = None
    for pool in values["pools"]:
        if pool["role"] == "head" and "head" in change:
            pool.update(public_ip=change["head"], private_ip=change["head"])
    values.update({name: value for name, value in change.items() if name != "head"})
    hostile = tmp_path / "hostile.json"
    hostile.write_text(json.dumps(values))
    here = tmp_path / "here"
    here.mkdir()
    status, out, err = _connect(capsys, hostile)
    _shell(f'exports={shlex.quote(out)}\neval "$exports"', here)
    assert list(here.iterdir()) == []
    assert "\x1b" not in err
    assert status == (0 if "cluster_tag" in change else 1), err


def test_a_token_file_with_an_odd_name(cluster, path, tmp_path, capsys):
    """A file whose name a shell would read as something else is named exactly."""
    odd = tmp_path / "it's $(not) `evil`" / 'a"b;c.json.token'
    odd.parent.mkdir()
    write_token(odd, read_token(token_file(path)))
    state = tmp_path / "odd.json"
    state.write_text(ClusterState.load(path).but(ray_token_file=str(odd), state_file=None).to_json())
    assert _evaluated(_connect(capsys, state)[1])["RAY_AUTH_TOKEN_PATH"] == str(odd)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"status": "building"}, "still being built"),
        ({"status": "ending"}, "being shut down"),
        ({"pools": []}, "does not tell the address of the head"),
        ({"ray_token_file": "/nowhere/x.token"}, "on the machine that built the cluster"),
        ({"build_id": None}, "existing package"),
    ],
)
def test_what_cannot_be_connected_to(cluster, path, tmp_path, capsys, change, said):
    """The exit status is 1, the reason is said, and there is nothing for a shell to evaluate."""
    state = tmp_path / "state.json"
    state.write_text(ClusterState.load(path).but(state_file=None, **change).to_json())
    status, out, err = _connect(capsys, state)
    assert (status, out) == (1, "")
    assert said in err
    assert _connect(capsys, tmp_path / "nothing.json")[:2] == (1, "")


def test_connect_wants_one_cluster(cluster, path, state_directory, capsys):
    """Several states are wrong usage: a shell has one set of variables."""
    Journal(path, ClusterState.load(path)).state.save(state_directory / "copy.json")
    status, out, err = _connect(capsys, state_directory)
    assert (status, out) == (2, "")
    assert "one cluster" in err
    (state_directory / "copy.json").unlink()
