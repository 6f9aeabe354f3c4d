"""The pytest plugin, in runs of pytest of its own: what a project that uses RayDog gets."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from yellowdog_ray.local import pytest_plugin

ROOT = Path(__file__).parents[2]
PLUGIN = "yellowdog_ray.local.pytest_plugin"


@pytest.fixture
def run(tmp_path):
    """A function that runs tests in another process, with the plugin and no other."""

    def run(text: str, *options: str, **environment: str) -> str:
        (tmp_path / "test_project.py").write_text(text)
        clean = {
            key: value for key, value in os.environ.items() if not key.startswith(("RAYDOG_", "PYTEST_"))
        }
        result = subprocess.run(
            [sys.executable, "-m", "pytest", "-p", PLUGIN, "-ra", "-q", "-p", "no:cacheprovider", *options],
            cwd=tmp_path,
            # As an installed plugin it would be loaded twice.
            env={
                **clean,
                "PYTHONPATH": str(ROOT),
                "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
                "RAYDOG_STATE_DIR": "/nowhere/the-users-own",
                **environment,
            },
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        return result.stdout + result.stderr

    return run


CONTROL_PLANE = """
import os
from pathlib import Path
import pytest
from yellowdog_ray import RayDogCluster

seen = []

def build(platform):
    return RayDogCluster(
        platform.key_id, platform.secret, "demo", platform.namespace, platform.template_names[0], None,
        platform.url,
    )

@pytest.mark.parametrize("number", [1, 2])
def test_a_cluster(raydog_control_plane, raydog_state_dir, tmp_path, number):
    assert raydog_state_dir.is_relative_to(tmp_path)
    with build(raydog_control_plane) as cluster:
        cluster.build()
        assert list(raydog_state_dir.iterdir())
    assert raydog_control_plane.running() == []
    assert raydog_control_plane.url not in seen
    seen.append(raydog_control_plane.url)

class TestOptions:
    @pytest.fixture
    def raydog_control_plane_options(self):
        return {"clock": "virtual"}

    def test_they_are_used(self, raydog_control_plane):
        raydog_control_plane.advance(3600)

def test_the_users_own_is_back():
    assert os.environ["RAYDOG_STATE_DIR"] == "/nowhere/the-users-own"
"""


def test_the_control_plane(run):
    """Each test has a control plane and a directory for states of its own, with its own options."""
    assert "4 passed" in run(CONTROL_PLANE)


LOCAL_PLATFORM = """
import os
import pytest

@pytest.fixture(scope="session")
def raydog_local_platform_options():
    return {"isolation": %r}

@pytest.mark.parametrize("number", [1, 2])
def test_it_runs(raydog_local_platform, number):
    assert raydog_local_platform.nodes() == []
    assert raydog_local_platform.faults.seen == []
    assert os.environ["RAYDOG_STATE_DIR"] != "/nowhere/the-users-own"
    os.environ.setdefault("THE_PLATFORM", raydog_local_platform.url)
    assert os.environ["THE_PLATFORM"] == raydog_local_platform.url

def test_a_directory_of_its_own(raydog_local_platform, raydog_state_dir):
    assert os.environ["RAYDOG_STATE_DIR"] == str(raydog_state_dir)
"""


def test_the_local_platform(run):
    """All tests of a run share one platform with real nodes."""
    kind = "namespaces" if os.geteuid() == 0 else "user-namespaces"
    assert "3 passed" in run(LOCAL_PLATFORM % kind)


TURNS = """
import time
from pathlib import Path
import pytest
import yellowdog_ray.local.needs
# Nothing runs Ray here, so what else has its ports does not matter.
yellowdog_ray.local.needs._RAY_PORTS = ()

@pytest.fixture(scope="session")
def raydog_local_platform_options():
    return {"isolation": %r}

@pytest.fixture(scope="session", autouse=True)
def order(tmp_path_factory):
    # Both workers have begun before one has a platform.
    place = tmp_path_factory.getbasetemp()
    (place / "here").touch()
    while len(list(place.parent.glob("*/here"))) < 2:
        time.sleep(0.01)

@pytest.mark.parametrize("number", range(4))
def test_alone(order, raydog_local_platform, tmp_path_factory, number):
    place = tmp_path_factory.getbasetemp()
    (place / "platform").write_text(raydog_local_platform.directory)
    others = [Path(file.read_text()) for file in place.parent.glob("*/platform") if file.parent != place]
    if %r:
        assert not any(other.exists() for other in others)
    else:
        # Each worker has one at the same time; one of them may have to wait for the other's to start.
        while len(list(place.parent.glob("*/platform"))) < 2:
            time.sleep(0.01)
"""


@pytest.mark.parametrize("turns", [True, False])
def test_workers_of_xdist_share_no_ports(run, turns):
    """Of platforms with plain processes there is one at a time; of others each worker has its own."""
    others = "namespaces" if os.geteuid() == 0 else "user-namespaces"
    output = run(TURNS % ("processes" if turns else others, turns), "-p", "xdist", "-n", "2")
    assert "4 passed" in output, output


BROKEN = """
import yellowdog_ray.local.needs
yellowdog_ray.local.needs.free_memory = lambda: 1 << 20

def test_it_runs(raydog_local_platform):
    pass
"""


def test_where_it_cannot_run(run):
    """Where there can be no platform the tests are skipped with the reason; or they fail, where told so."""
    output = run(BROKEN)
    assert "1 skipped" in output
    assert "cannot run here: too little memory: 1 MiB are free" in output
    output = run(BROKEN, RAYDOG_TESTS_REQUIRE_ALL="1")
    assert "1 error" in output
    assert "cannot run here: too little memory" in output


MISSING = """
import sys
sys.modules["uvicorn"] = None

def test_control_plane(raydog_control_plane):
    pass

def test_local_platform(raydog_local_platform):
    pass
"""


def test_without_the_packages(run):
    """Where the servers' packages are not installed the tests are skipped, and the reason names them."""
    output = run(MISSING)
    assert "2 skipped" in output
    assert output.count("the package uvicorn: pip install") == 2


def test_the_fixtures_are_listed(run):
    """`pytest --fixtures` describes every fixture."""
    output = run("", "--fixtures")
    for name in ("raydog_local_platform", "raydog_control_plane", "raydog_state_dir"):
        assert f"\n{name}" in output
    assert "no docstring available" not in output.partition("raydog_")[2]


def test_it_is_cheap_to_load():
    """Loading it, as every run of pytest does, imports pytest, typing and the bare package alone."""
    tree = ast.parse(Path(pytest_plugin.__file__).read_text())
    imported = [
        name
        for node in tree.body
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    ]
    assert sorted(imported) == ["__future__", "pytest", "typing"]
    code = (
        "import sys, pytest, importlib\nbefore = set(sys.modules)\n"
        f"import {PLUGIN}\nprint(sorted(set(sys.modules) - before))"
    )
    output = subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"]},
    ).stdout
    assert set(ast.literal_eval(output)) == {"yellowdog_ray", "yellowdog_ray.local", PLUGIN}


def test_it_is_registered():
    """The package names it as a plugin of pytest."""
    text = (ROOT / "pyproject.toml").read_text()
    section = text.partition("[project.entry-points.pytest11]")[2].partition("[")[0]
    assert section.strip() == f'raydog = "{PLUGIN}"'
