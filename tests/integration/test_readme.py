"""The README's code works as it stands."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parents[2] / "README.rst"


@pytest.mark.ray
def test_the_code_in_the_readme() -> None:
    """The README's Python blocks, run one after the other, build, use and end a cluster."""
    blocks = re.findall(r"\.\. code-block:: python\n\n((?:    .*\n|\n)+)", README.read_text())
    assert len(blocks) == 2
    code = "\n".join(re.sub(r"(?m)^    ", "", block) for block in blocks)
    result = subprocess.run(
        [sys.executable, "-W", "error::ResourceWarning", "-c", code],
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "NodeManagerAddress" in result.stdout
    assert "was not shut down" not in result.stderr


@pytest.mark.ray
def test_the_example() -> None:
    """The example runs on the local platform when there is no account, and leaves nothing."""
    example = Path(__file__).parents[2] / "examples" / "builder" / "usage_example.py"
    result = subprocess.run(
        [sys.executable, str(example)], capture_output=True, text=True, timeout=240, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "computed on: " in result.stdout
    assert "left on this machine: nothing" in result.stdout
