"""The project's checks: the same for a person, for CI and for the README."""

from __future__ import annotations

import os

import nox

nox.options.sessions = ["tests", "lint", "types", "docs"]
nox.options.reuse_existing_virtualenvs = True
PYTHONS = ["3.10", "3.11", "3.12", "3.13"]


@nox.session
def demo(session: nox.Session) -> None:
    """Build a real Ray cluster on the embedded platform, use it and shut it down."""
    session.install(".[local,ray]")
    session.run("raydog", "demo", *session.posargs)


@nox.session
def tests(session: nox.Session) -> None:
    """Run all tests, with real Ray nodes; arguments go to pytest, which is run once then."""
    session.install("-e", ".[test]")
    if session.posargs:
        session.run("pytest", *session.posargs)
        return
    # Without nodes a test mostly waits, so several go at once; real nodes need the machine for themselves.
    at_once = str(1 + (os.cpu_count() or 1))
    session.run(
        "pytest", "-n", at_once, "--dist", "loadgroup", "tests/unit", "tests/conformance", "tests/ssh"
    )
    session.run("pytest", "tests/integration")


@nox.session(python=PYTHONS)
def fast(session: nox.Session) -> None:
    """Run the tests that start no Ray, on every supported Python that is installed here."""
    session.install("-e", ".[test]")
    session.run("pytest", "-m", "not ray", *session.posargs)


@nox.session
def oldest(session: nox.Session) -> None:
    """Run the YellowDog SDK against the local platform, with the oldest versions that the package admits."""
    project = nox.project.load_toml("pyproject.toml")["project"]
    needed = project["dependencies"] + project["optional-dependencies"]["local"]
    session.install("-e", ".", *(one.replace(">=", "==") for one in needed))
    session.install("pytest", "pytest-timeout", "pytest-xdist", "hypothesis", "pyyaml")
    session.run(
        "pytest",
        "tests/conformance/test_sdk.py",
        "tests/conformance/test_sdk_searches.py",
        "tests/unit/test_faults.py",
    )


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and format."""
    session.install("ruff>=0.6")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def types(session: nox.Session) -> None:
    """Check the types of the package."""
    session.install("-e", ".[local,ray]", "mypy>=1.11", "types-paramiko", "pytest")
    session.run("mypy")


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation; a warning is an error."""
    session.install("-e", ".[local,docs]", "pytest")
    session.run("sphinx-build", "-W", "--keep-going", "-b", "html", "docs", "docs/_build/html")


@nox.session
def bench(session: nox.Session) -> None:
    """Measure what RayDog adds to a cluster's time, and a real cluster beside Ray started by hand."""
    session.install("-e", ".[local,ray]")
    session.run("python", "benchmarks/build_overhead.py", "--check", "--scale")
    session.run("python", "benchmarks/build_real.py", *session.posargs)
    session.run("python", "benchmarks/tunnels.py", "--ray")
