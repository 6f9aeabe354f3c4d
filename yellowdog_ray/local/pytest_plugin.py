"""Fixtures for the tests of projects that use RayDog; pytest finds them where this package is installed.

``raydog_local_platform`` (session)
    a running :class:`~yellowdog_ray.local.platform.LocalPlatform`, with real nodes. Where this machine
    cannot have one, the test is skipped with the reason; or it fails, where the environment variable
    ``RAYDOG_TESTS_REQUIRE_ALL`` is set.
    With pytest-xdist every worker has a platform of its own. Where nodes are plain processes, which share the
    machine's ports, only one has one at a time: a worker waits in this fixture until another has run all
    of its tests, and a time-out per test must leave room for that (``--dist loadgroup``, with one
    ``pytest.mark.xdist_group`` for these tests, gives them to one worker).
``raydog_local_platform_options`` (session)
    the arguments of that platform, a dictionary: none. Define a fixture of this name to have others.
``raydog_control_plane`` (function)
    a running :class:`~yellowdog_ray.local.control_plane.LocalControlPlane`, new with every test, without
    processes; skipped or failed as above where its packages are not installed.
``raydog_control_plane_options`` (function)
    the arguments of that control plane, a dictionary: none. Define a fixture of this name to have others.
``raydog_state_dir`` (function)
    the directory, new with every test, for the state files of the test's clusters (it sets
    ``RAYDOG_STATE_DIR``). ``raydog_control_plane`` comes with it; ``raydog_local_platform`` comes with one
    for the whole run, until a test asks for its own. The user's directory is touched by neither.

pytest loads this module in every run of every such project, so it imports nothing but pytest.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from yellowdog_ray.local import LocalControlPlane, LocalPlatform


@pytest.fixture
def raydog_state_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give the test's clusters a directory of their own for their state files."""
    directory = tmp_path / "raydog-states"
    monkeypatch.setenv("RAYDOG_STATE_DIR", str(directory))
    return directory


@pytest.fixture
def raydog_control_plane_options() -> Mapping[str, Any]:
    """Give the arguments of ``raydog_control_plane``; define this fixture anew to change them."""
    return {}


@pytest.fixture
def raydog_control_plane(
    raydog_control_plane_options: Mapping[str, Any], raydog_state_dir: Path
) -> Iterator[LocalControlPlane]:
    """Run a local platform with simulated nodes, for this test alone."""
    try:
        from yellowdog_ray.local import LocalControlPlane
    except ImportError as error:
        _cannot(f"it needs the package {error.name}: pip install 'yellowdog-ray[local]'")
    with LocalControlPlane(**raydog_control_plane_options) as platform:
        yield platform


@pytest.fixture(scope="session")
def raydog_local_platform_options() -> Mapping[str, Any]:
    """Give the arguments of ``raydog_local_platform``; define this fixture anew to change them."""
    return {}


@pytest.fixture(scope="session")
def raydog_local_platform(
    raydog_local_platform_options: Mapping[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LocalPlatform]:
    """Run a local platform with real nodes, for all tests of the run, or of a worker of pytest-xdist."""
    import os
    from contextlib import ExitStack

    from filelock import FileLock

    from yellowdog_ray.errors import LocalPlatformError
    from yellowdog_ray.local import LocalPlatform
    from yellowdog_ray.local.isolation import Isolation

    platform = LocalPlatform(**raydog_local_platform_options)
    with ExitStack() as ends:
        if "PYTEST_XDIST_WORKER" in os.environ:
            # The directory above a worker's own is that of the whole run.
            turn = FileLock(tmp_path_factory.getbasetemp().parent / "raydog-local-platform.lock")
            ends.enter_context(turn)
        try:
            platform.start()
        except LocalPlatformError as error:
            _cannot(str(error))
        if platform.isolation is not Isolation.PROCESSES:
            ends.close()
        patch = ends.enter_context(pytest.MonkeyPatch.context())
        ends.enter_context(platform)
        patch.setenv("RAYDOG_STATE_DIR", str(tmp_path_factory.mktemp("raydog-states")))
        yield platform


def _cannot(reason: str) -> NoReturn:
    import os

    text = f"RayDog's local platform cannot run here: {reason}"
    if os.environ.get("RAYDOG_TESTS_REQUIRE_ALL"):
        pytest.fail(text, pytrace=False)
    pytest.skip(text)
