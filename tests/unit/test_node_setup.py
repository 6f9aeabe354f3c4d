"""The user data for nodes, run by a real Bash on a machine whose programs are stand-ins."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess

import pytest

from yellowdog_ray.raydog.scripts import get_script

INSTALLER = b'echo "installer of the agent" >>"$CALLS"\n'

NOTE = 'echo "${0##*/} $*" >>"$CALLS"\n'
PROGRAMS = {
    "apt-get": "",
    "systemctl": "",
    "id": "exit 1\n",
    "python3.11": '[ "$2" != venv ] || { mkdir -p "$3/bin" && cp "${0%/*}/pip" "$3/bin/pip"; }\n',
    "pip": "",
    # What is asked for goes to the file that -o names.
    "curl": 'printf "%s" "$FILE" >"${@: -1}"\n',
    "gpg": 'case "$*" in *--export*) echo the key ;; esac\n',
}


@pytest.fixture
def set_up(tmp_path):
    """A function that runs the script, and returns its exit status and the calls of programs."""
    programs = tmp_path / "programs"
    programs.mkdir()
    for name, text in PROGRAMS.items():
        (programs / name).write_text(f"#!/bin/bash\n{NOTE}{text}")
        (programs / name).chmod(0o755)
    machine = tmp_path / "machine"
    (machine / "root").mkdir(parents=True)
    (machine / "etc/apt/sources.list.d").mkdir(parents=True)
    script = re.sub(r"(?<![\w:/.])/(?=(root|etc|opt)/)", f"{machine}/", get_script("node-setup"))
    script = script.replace("signed-by=/", f"signed-by={machine}/")
    assert not re.search(r"[ =\"]/(root|etc|opt)/", script), "it would change this machine"

    def run(**environment: str) -> tuple[int, list[str]]:
        calls = tmp_path / "calls"
        calls.write_text("")
        done = subprocess.run(
            ["/bin/bash", "-c", script],
            env={
                "PATH": f"{programs}:{os.environ['PATH']}",
                "CALLS": str(calls),
                "TMPDIR": str(tmp_path),
                "FILE": INSTALLER.decode(),
                **environment,
            },
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        return done.returncode, calls.read_text().splitlines()

    return run


def test_what_is_pinned(set_up):
    """Versions that are not pinned by default can be, and the agent's installer comes last."""
    status, calls = set_up(INSTALL_OBSERVABILITY="1")
    assert status == 0
    assert calls[-2:] == ["installer of the agent", "id yd-agent"]
    text = "\n".join(calls)
    assert re.search(r"pip install .*ray\[default,client\]==\d+\.\d+\.\d+$", text, re.MULTILINE)
    assert re.search(r"apt-get install -y grafana=\d+\.\d+\.\d+$", text, re.MULTILINE)
    assert "apt-get install -y prometheus\n" in text
    assert "/resources/main/agent-install/" in text
    status, calls = set_up(
        INSTALL_OBSERVABILITY="1",
        PROMETHEUS_VERSION="2.31.2+ds1-1ubuntu1",
        AGENT_INSTALLER_COMMIT="0123abc",
        AGENT_INSTALLER_SHA256=hashlib.sha256(INSTALLER.rstrip(b"\n")).hexdigest(),
        FILE=INSTALLER.decode().rstrip("\n"),
    )
    assert status == 0
    assert "apt-get install -y prometheus=2.31.2+ds1-1ubuntu1" in calls
    assert any("/resources/0123abc/agent-install/" in call for call in calls)
    assert "installer of the agent" in calls


def test_another_installer_does_not_run(set_up):
    """What has not the checksum that was asked for is not run as root, nor at all."""
    status, calls = set_up(AGENT_INSTALLER_SHA256="0" * 64)
    assert status != 0
    assert any(call.startswith("curl ") for call in calls)
    assert "installer of the agent" not in calls
