"""The simulated platform as several files of this directory use it."""

from __future__ import annotations

import pytest

from tests.clusters import hurry
from tests.controlplane import serve


@pytest.fixture
def hurried(monkeypatch):
    """Persistent faults are given up on sooner than in the field, and looks come quickly."""
    hurry(monkeypatch)


@pytest.fixture
def platform():
    """A quick platform on which a test leaves nothing running."""
    with serve(boot_delay=0.005, start_delay=0.002, stop_delay=0.002) as served:
        yield served
        assert served.running() == []
