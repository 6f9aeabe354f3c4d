"""Which processes are a platform's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the local platform needs Linux")

# The kernel cuts a name off in the middle of a letter; this is such a half.
ODDLY_NAMED = """
import ctypes, sys
ctypes.CDLL(None).prctl(15, b"\\xd0", 0, 0, 0)
print(flush=True)
sys.stdin.read()
"""


def test_a_name_that_is_no_text(tmp_path: Path) -> None:
    """A process that has such a name, whosever it is, keeps none from being found, itself included."""
    from yellowdog_ray.local.belonging import NODE_FILES, end_all, processes_of
    from yellowdog_ray.local.linux import descendants

    environment = {**os.environ, NODE_FILES: str(tmp_path / "node")}
    with subprocess.Popen(
        [sys.executable, "-c", ODDLY_NAMED],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert Path(f"/proc/{process.pid}/comm").read_bytes() == b"\xd0\n"
        assert processes_of(str(tmp_path)) == [process.pid]
        assert process.pid in descendants(os.getpid())
        end_all(lambda: processes_of(str(tmp_path)), 5)
        assert process.wait(5) == -9
    assert processes_of(str(tmp_path)) == []
