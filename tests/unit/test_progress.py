"""What is shown in a terminal while something lasts: lines that come, change and go."""

from __future__ import annotations

import inspect
import io
import os
import pty
import re
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest

from yellowdog_ray.raydog import events, progress
from yellowdog_ray.raydog.events import (
    BuildFailed,
    BuildFinished,
    BuildStarted,
    CallRetried,
    Event,
    HeadFailed,
    PoolAdded,
    PoolProvisioned,
    RollbackStarted,
    ShutdownFailed,
    ShutdownFinished,
    ShutdownStarted,
    TasksSubmitted,
    Waiting,
    WorkersCounted,
)
from yellowdog_ray.raydog.progress import ProgressDisplay, progress_display

STARTED = BuildStarted("ray", ("ray-00-head", "ray-01-wrkrs", "ray-02-wrkrs"), 7)
FINISHED = BuildFinished("ray", 12.34, "10.0.0.1", None)
SENTENCE = "Built the cluster ray in 12.3 s; its head is at 10.0.0.1\n"
VARIABLES = ("CI", "NO_COLOR", "FORCE_COLOR", "RAYDOG_PROGRESS", "COLUMNS", "LINES")


class Terminal(io.StringIO):
    """What has been written to a terminal."""

    encoding = "utf-8"  # type: ignore[assignment]

    def isatty(self) -> bool:
        return True

    def text(self) -> str:
        """Give it without control sequences."""
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.getvalue())

    def shows(self, text: str) -> None:
        """Wait until it has shown something; it is drawn some times a second."""
        until(lambda: text in self.text(), f"{text!r} in {self.text()!r}")

    def left(self) -> str:
        """Give the lines that stay: what came after the last removal, and what was printed above it."""
        # A line that is drawn is taken away by going back to its beginning and erasing it.
        return self.getvalue().rpartition("\x1b[2K")[2]


def until(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.01)


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")
    threads = set(threading.enumerate())
    yield
    assert not progress._showing
    until(lambda: set(threading.enumerate()) <= threads, "a thread is left")


@pytest.fixture
def terminal() -> Terminal:
    return Terminal()


@pytest.fixture
def display(terminal: Terminal) -> Iterator[ProgressDisplay]:
    shown = progress_display(None, terminal)
    assert shown is not None
    yield shown
    shown.close()


# -- whether there is one ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variables", "shown"),
    [
        ({}, True),
        ({"TERM": "dumb"}, False),
        ({"TERM": "unknown"}, False),
        ({"CI": "true"}, False),
        ({"CI": "1"}, False),
        ({"CI": ""}, True),
        ({"CI": "false"}, True),
        ({"NO_COLOR": "1"}, True),
        ({"RAYDOG_PROGRESS": "0"}, False),
        ({"RAYDOG_PROGRESS": "1"}, True),
    ],
)
def test_automatic(monkeypatch, terminal, variables, shown):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert (progress_display(None, terminal) is not None) is shown
    assert progress_display(None, io.StringIO()) is None
    assert progress_display(True, terminal) is not None
    assert progress_display(True, io.StringIO()) is not None
    assert progress_display(False, terminal) is None


def test_automatic_is_about_the_error_stream(monkeypatch, terminal):
    monkeypatch.setattr(sys, "stderr", terminal)
    assert progress_display(None) is not None
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    monkeypatch.setattr(sys, "stdout", terminal)
    assert progress_display(None) is None
    monkeypatch.setattr(sys, "stderr", None)
    assert progress_display(None) is None


@pytest.mark.parametrize(
    ("shell", "shown"), [(None, True), (SimpleNamespace(), True), (SimpleNamespace(kernel=object()), False)]
)
def test_none_in_a_notebook(monkeypatch, terminal, shell, shown):
    """A notebook is no terminal, even where its streams say so; IPython in a terminal is one."""
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    assert (progress_display(None, terminal) is not None) is shown


def test_none_where_the_stream_is_closed(terminal):
    terminal.close()
    real = io.TextIOWrapper(io.BytesIO())
    real.close()
    assert progress_display(None, real) is None


def run(code: str, **options: object) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=environment,
        text=True,
        timeout=60,
        check=False,
        **options,
    )


def test_nothing_in_a_pipe():
    """Where nobody looks on, nothing is written, and rich is not even imported."""
    done = run(
        """
        import sys
        from yellowdog_ray.raydog.events import BuildStarted, BuildFailed
        from yellowdog_ray.raydog.progress import progress_display
        assert progress_display(None) is None
        assert 'rich' not in sys.modules
        """,
        capture_output=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_plain_lines_where_there_is_no_terminal():
    """Who asks for it has it in a log too: a line for each event, on the error stream alone."""
    done = run(
        """
        import sys
        from yellowdog_ray.raydog.events import BuildStarted, BuildFailed
        from yellowdog_ray.raydog.progress import progress_display
        display = progress_display(True)
        display(BuildStarted("ray", ("a",), 1))
        display(BuildFailed("ray", "one\\n\\n\\x1b[2Jtwo", ()))
        assert 'rich' not in sys.modules
        """,
        capture_output=True,
    )
    assert done.stdout == ""
    assert done.stderr.splitlines() == [
        "Building the cluster ray: 1 nodes in 1 pools",
        "The build of ray failed: one [2Jtwo",
    ]


# -- what is shown -------------------------------------------------------------------------------------


def test_a_build(display, terminal, capsys):
    display(STARTED)
    terminal.shows("Building ray")
    terminal.shows("0/3 pools")
    display(PoolProvisioned("ray", "ray-00-head", "ydid:1", 1))
    terminal.shows("1/3 pools")
    display(PoolProvisioned("ray", "ray-01-wrkrs", "ydid:1", 3))
    terminal.shows("2/3 pools")
    display(Waiting("ray", "the head node", 3.0))
    terminal.shows("Waiting for the head node")
    display(FINISHED)
    assert terminal.left() == SENTENCE
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    "event",
    [
        FINISHED,
        BuildFailed("ray", "no capacity", ("a",)),
        ShutdownFinished("ray", 3.0),
        ShutdownFailed("ray", "it runs", ("a", "b")),
        HeadFailed("ray", "it was killed"),
    ],
    ids=lambda event: type(event).__name__,
)
def test_an_end_is_one_sentence(display, terminal, event):
    """Whatever is shown is gone then; the sentence is there even where nothing was shown."""
    display(event)
    assert terminal.getvalue() == f"{event}\n"
    display(STARTED)
    display(WorkersCounted("ray", 0, 3, "tasks"))
    terminal.shows("0/3 workers")
    display(event)
    assert terminal.left() == f"{event}\n"


def test_a_rollback(display, terminal):
    display(STARTED)
    display(RollbackStarted("ray", "no capacity\nat all"))
    terminal.shows("Taking back ray")
    terminal.shows("no capacity")
    # What was under way then is no addition.
    display(PoolProvisioned("ray", "ray-02-wrkrs", "ydid:1", 3))
    terminal.shows("Provisioned the worker pool ray-02-wrkrs")
    assert "Adding" not in terminal.text()
    display(BuildFailed("ray", "no capacity\nat all", ()))
    assert terminal.left() == "The build of ray failed: no capacity at all\n"


def test_a_wait(display, terminal):
    display(WorkersCounted("ray", 0, 4, "tasks"))
    terminal.shows("Waiting for the workers of ray")
    display(WorkersCounted("ray", 3, 4, "ray"))
    terminal.shows("3/4 workers in Ray")
    display(WorkersCounted("ray", 4, 4, "tasks"))
    assert terminal.left() == ""


def test_nothing_to_wait_for_is_not_shown(display, terminal):
    display(WorkersCounted("ray", 4, 4, "tasks"))
    display(Waiting("ray", "something", 1.0))
    display(CallRetried("ray", "read", "503"))
    assert terminal.getvalue() == ""


def test_an_addition_beside_a_wait(display, terminal):
    display(WorkersCounted("ray", 0, 4, "tasks"))
    display(PoolProvisioned("ray", "ray-03-wrkrs", "ydid:3", 2))
    terminal.shows("Adding ray-03-wrkrs to ray")
    display(TasksSubmitted("ray", "ray-03-wrkrs", 2))
    terminal.shows("Submitted 2 tasks to ray-03-wrkrs")
    display(PoolAdded("ray", "ray-03-wrkrs", "mine", 2))
    terminal.shows("Added the worker pool mine of 2\n")
    assert progress._showing
    display(WorkersCounted("ray", 4, 4, "tasks"))
    assert not progress._showing


def test_a_shut_down_ends_all_else(display, terminal):
    display(WorkersCounted("ray", 0, 4, "tasks"))
    display(ShutdownStarted("ray", ("a",)))
    terminal.shows("Shutting ray down")
    display(ShutdownFinished("ray", 1.0))
    assert terminal.left() == "Shut the cluster ray down in 1.0 s\n"


def test_a_retried_call_is_dimmed(display, terminal):
    display(STARTED)
    display(CallRetried("ray", "provision", "it said 503"))
    terminal.shows("Trying again to provision: it said 503")
    assert "\x1b[2mTrying again" in terminal.getvalue()
    display(Waiting("ray", "the head", 1.0))
    terminal.shows("Waiting for the head")
    assert "\x1b[2mWaiting" not in terminal.getvalue()


@pytest.mark.parametrize("no_color", [False, True])
def test_no_color(monkeypatch, display, terminal, no_color):
    if no_color:
        monkeypatch.setenv("NO_COLOR", "1")
    display(STARTED)
    terminal.shows("0/3 pools")
    assert bool(re.search(r"\x1b\[[0-9;]*[34]8;5|\x1b\[[0-9;]*3[0-7]", terminal.getvalue())) is not no_color


def test_texts_are_texts(display, terminal):
    """Neither rich's markup nor a control sequence in a reason has an effect."""
    display(STARTED)
    display(CallRetried("ray", "ask", "[red]no[/nope]\x1b[2J\x1b]0;x\x07\nsecond line"))
    terminal.shows("[red]no[/nope]")
    display(BuildFailed("ray", "[/bold] \x1b[2J", ()))
    assert "second line" not in terminal.text()
    assert "\x1b[2J" not in terminal.getvalue()
    assert "\x07" not in terminal.getvalue()
    assert terminal.left() == "The build of ray failed: [/bold]  [2J\n"


@pytest.mark.parametrize("columns", [1, 10, 40])
def test_narrow_terminals(monkeypatch, display, terminal, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    display(STARTED)
    display(Waiting("ray", "something long " * 20, 1.0))
    time.sleep(0.3)
    display(FINISHED)
    assert terminal.left() == SENTENCE


# -- what can go wrong ---------------------------------------------------------------------------------


def test_it_can_be_closed_and_used_again(display, terminal):
    display.close()
    display(STARTED)
    assert progress._showing
    display.close()
    display.close()
    assert not progress._showing
    assert terminal.left() == ""
    display(STARTED)
    terminal.shows("Building ray")
    display(FINISHED)
    assert terminal.left() == SENTENCE


def test_every_event_is_understood(caplog, display):
    """An event of any kind, first or last, is no fault, which would be logged."""
    caplog.set_level("DEBUG", progress.__name__)
    values = {"str": "text", "int": 1, "float": 1.0, "str | None": None, "tuple[str, ...]": ("a",)}
    kinds = [kind for kind in vars(events).values() if inspect.isclass(kind) and issubclass(kind, Event)]
    assert len(kinds) > 15
    for kind in kinds:
        event = kind(*(values.get(str(f.type), "head") for f in kind.__dataclass_fields__.values()))
        display(event)
        ProgressDisplay(io.StringIO())(event)
    assert not caplog.records


def test_two_clusters_share_the_terminal(display, terminal):
    other = ProgressDisplay(terminal)
    display(STARTED)
    other(BuildStarted("second", ("a",), 1))
    terminal.shows("Building second")
    terminal.shows("Building ray")
    assert len(progress._showing) == 1
    display(FINISHED)
    terminal.shows(SENTENCE)
    assert progress._showing
    other.close()
    assert not progress._showing


def test_beside_somebody_elses_display(display, terminal):
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(file=terminal, force_terminal=True)) as theirs:
        theirs.add_task("theirs", total=1)
        display(STARTED)
        terminal.shows("Building ray")
        display(FINISHED)
    assert not progress._showing


def test_several_threads(display, terminal):
    faults: list[BaseException] = []

    def work(number: int) -> None:
        shown = ProgressDisplay(terminal)
        try:
            for _ in range(30):
                shown(BuildStarted(f"cluster-{number}", ("a",), 1))
                display(STARTED)
                shown(PoolProvisioned(f"cluster-{number}", "a", "id", 1))
                display(PoolProvisioned("ray", "a", "id", 1))
                shown(BuildFinished(f"cluster-{number}", 1.0, "10.0.0.1", None))
            shown.close()
        except BaseException as error:
            faults.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    display.close()
    assert not faults
    assert not any(thread.is_alive() for thread in threads)
    assert terminal.text().count("Built the cluster cluster-") == 240


@pytest.mark.parametrize("fault", [OSError("gone"), ValueError("closed")])
@pytest.mark.filterwarnings("error")
def test_a_stream_that_breaks(monkeypatch, display, terminal, fault):
    """Nothing is raised, here or in the thread that draws."""

    def write(text: str) -> int:
        raise fault

    display(STARTED)
    terminal.shows("Building ray")
    monkeypatch.setattr(terminal, "write", write)
    display(Waiting("ray", "the head", 1.0))
    time.sleep(0.3)
    display(FINISHED)
    display.close()


def test_a_fault_of_rich_is_not_the_callers(monkeypatch, terminal):
    from rich.live import Live

    def start(self: object, refresh: bool = False) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(Live, "start", start)
    display = ProgressDisplay(terminal)
    display(STARTED)
    display(FINISHED)
    display.close()
    assert terminal.getvalue() == SENTENCE


@pytest.mark.parametrize(
    "end", ["raise KeyboardInterrupt", "sys.exit(1)", "os.kill(os.getpid(), signal.SIGTERM); time.sleep(9)"]
)
def test_a_real_terminal_is_left_as_it_was(end):
    """Even where a process ends or is killed without closing the display, the cursor is there."""
    ours, theirs = pty.openpty()
    code = f"""
        import os, signal, sys, time
        from yellowdog_ray.raydog.events import BuildStarted
        from yellowdog_ray.raydog.progress import progress_display
        display = progress_display(None)
        display(BuildStarted("ray", ("a",), 1))
        time.sleep(0.5)
        {end}
        """
    written = bytearray()

    def read() -> None:
        try:
            while piece := os.read(ours, 65536):
                written.extend(piece)
        except OSError:  # Linux says so at the end of the other side
            pass

    reader = threading.Thread(target=read)
    reader.start()
    try:
        done = run(code, stdout=subprocess.PIPE, stderr=theirs)
    finally:
        os.close(theirs)
        reader.join(30)
        os.close(ours)
    text = written.decode()
    assert done.returncode != 0
    assert done.stdout == ""
    assert "Building ray" in text
    assert text.rfind("\x1b[?25l") <= text.rfind("\x1b[?25h")
