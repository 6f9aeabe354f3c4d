"""What all tests share; its presence also lets them import the helpers beside it."""

from __future__ import annotations

import os
import signal
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.browser import launch

# In CI nothing may be left out for want of something that could have been installed.
_REQUIRE_ALL = bool(os.environ.get("RAYDOG_TESTS_REQUIRE_ALL"))


@pytest.fixture(autouse=True)
def handlers_stay() -> Iterator[None]:
    """A process that one test forks would get the signal handlers that another one has left."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    yield
    left = {number: now for number, was in before.items() if (now := signal.getsignal(number)) is not was}
    for number in left:
        signal.signal(number, before[number])
    # ray.init() leaves a handler of its own.
    assert [one for one in left.values() if not getattr(one, "__module__", "").startswith("ray.")] == []


@pytest.fixture(autouse=True)
def state_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Clusters of tests leave no state files with the user's own."""
    directory = tmp_path / "raydog-states"
    monkeypatch.setenv("RAYDOG_STATE_DIR", str(directory))
    return directory


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """A headless Chromium, by selenium's driver."""
    with launch() as driver:
        yield driver


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, None]:
    outcome = yield
    report = outcome.get_result()
    if _REQUIRE_ALL and report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome = "failed"
        report.longrepr = f"skipped although everything is required here: {reason}"
