"""What RayDog itself adds to the time that a cluster takes, and how it fares where something goes wrong.

The local platform runs without nodes, in a process of its own: its nodes boot for 2 s, its tasks start
after 0.5 s, each call takes 50 ms, and ending takes no time. All that build() takes beyond those 2.5 s, and
all that shut_down() takes, is RayDog's calls and computing.

Each round builds and shuts down the same clusters; the figures are the medians of the rounds. The YellowDog
SDK is imported and its client opened before the clock starts; how long the import takes, once in a process,
is told beside. What goes wrong is in :mod:`build_faults`.

Usage: python benchmarks/build_overhead.py [--rounds N] [--check] [--scale]
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import logging
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import build_faults

from yellowdog_ray import RayDogCluster

BOOT, START, LATENCY = 2.0, 0.5, 0.05
POOLS = 20
SIZES = (500, 1000, 2000, 5000, 10000)


@dataclass
class Row:
    """A line of the table: what is measured, the most that it may take, and what another package took."""

    what: str
    most: float
    other: float
    seconds: list[float] = field(default_factory=list)
    calls: list[int] = field(default_factory=list)


class Server:
    """The platform, in a process of its own."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "yellowdog_ray.local.control_plane"]
        command += ["--boot-delay", str(BOOT), "--start-delay", str(START), "--stop-delay", "0"]
        command += ["--latency", str(LATENCY)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._process.stdout is not None
        self.about: dict[str, str] = json.loads(self._process.stdout.readline())

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        with self._process:
            assert self._process.stdin is not None
            self._process.stdin.close()

    def books(self) -> dict[str, Any]:
        """Ask what has not ended, and how many calls have come in."""
        key = f"Bearer {self.about['control_token']}"
        request = urllib.request.Request(f"{self.about['control_url']}/books", headers={"Authorization": key})
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request) as answer:
            books: dict[str, Any] = json.load(answer)
            return books

    def peak(self) -> float:
        """Return the most memory that it has had so far, in MiB."""
        return peak(self._process.pid)

    def cpu(self) -> float:
        """Return the seconds of computing that it has used so far."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def cluster_of(
    server: Server, name: str, pools: int, nodes: int, *, observability: bool = False
) -> Iterator[RayDogCluster]:
    """Make a cluster that is ready to be built, and see to it that nothing of it is left."""
    about = server.about
    cluster = RayDogCluster(
        about["key_id"],
        about["secret"],
        name,
        about["namespace"],
        about["template"],
        None,
        about["url"],
        enable_observability=observability,
        observability_node_compute_requirement_template_id=about["template"] if observability else None,
    )
    for _ in range(pools):
        cluster.add_worker_pool(about["template"], None, nodes)
    assert cluster.yd_client is not None
    with cluster:
        yield cluster
    left = server.books()["running"]
    if left:
        raise RuntimeError(f"shut_down() has left {len(left)} things: {', '.join(left[:5])}")


def measure(row: Row, server: Server, action: Callable[[], object], own: float = 0.0) -> None:
    """Time an action, less the time that is the platform's own, and count its calls."""
    before = server.books()["requests"]
    began = time.perf_counter()
    action()
    row.seconds.append(time.perf_counter() - began - own)
    row.calls.append(server.books()["requests"] - before)


def overhead(rounds: int, check: bool) -> int:
    """Measure the overhead and print the table; with ``check``, return 1 where a figure is too high."""
    small = Row("build(), 2 pools x 2 nodes", 0.4, 8.3)
    observed = Row("the same with observability", 0.5, 10.9)
    large = Row("build(), 100 pools x 1 node", 1.0, 18.9)
    down = Row("shut_down(), 101 pools", 1.5, 16.9)
    own = BOOT + START
    began = time.perf_counter()
    import yellowdog_client.model

    assert yellowdog_client.model
    importing = time.perf_counter() - began
    with Server() as server:
        for number in range(rounds):
            with cluster_of(server, f"small-{number}", 2, 2) as cluster:
                measure(small, server, cluster.build, own)
            with cluster_of(server, f"observed-{number}", 2, 2, observability=True) as cluster:
                measure(observed, server, cluster.build, own)
            with cluster_of(server, f"large-{number}", 100, 1) as cluster:
                measure(large, server, cluster.build, own)
                measure(down, server, cluster.shut_down)
    rows = [small, observed, large, down]
    print(
        f"Seconds, the median of {rounds} rounds (least to most); build() beyond the nodes' own {own} s.\n"
        f"Each call takes {LATENCY * 1000:g} ms. Not in it: importing the SDK ({importing:.2f} s, once in a "
        "process) and opening its client.\n"
    )
    other = "yellowdog-ray 2.0.0 (measured once, not in this run)"
    print(f"{'':29} {'seconds':>20} {'at most':>8} {'calls':>6}  {other}")
    for row in rows:
        spread = f"{statistics.median(row.seconds):.2f} ({min(row.seconds):.2f} to {max(row.seconds):.2f})"
        calls = statistics.median(row.calls)
        print(f"{row.what:29} {spread:>20} {row.most:8.1f} {calls:6.0f}  {row.other:.1f}")
    late = [row.what for row in rows if statistics.median(row.seconds) > row.most]
    print(f"\n{'':40} {'here':>31} {'wanted':>9}  {other}")
    # What goes wrong is meant to; the table says what comes of it.
    logging.disable(logging.CRITICAL)
    for fault in build_faults.rows():
        print(f"{fault.what:40} {fault.figure:>31} {fault.wanted:>9}  {fault.other}", flush=True)
        if not fault.good:
            late.append(fault.what)
    logging.disable(logging.NOTSET)
    if check and late:
        print(f"\nNot as it should be: {'; '.join(late)}", file=sys.stderr)
        return 1
    return 0


def scale() -> None:
    """Measure clusters of growing size, each with a client and a platform that are new."""
    print(
        f"\n{POOLS} pools, once for each size. ms/node is of the whole; MiB is the growth of peak memory.\n"
    )
    heads = ("nodes", "build s", "wait s", "down s", "ms/node", "calls", "client CPU s", "server CPU s")
    heads += ("client MiB", "KiB/node", "server MiB", "KiB/node")
    print("  ".join(heads))
    for size in SIZES:
        done = subprocess.run(
            [sys.executable, __file__, "--size", str(size)], check=True, stdout=subprocess.PIPE, text=True
        )
        one = json.loads(done.stdout)
        whole = one["build"] + one["wait"] + one["down"]
        figures = [one["build"], one["wait"], one["down"], 1000 * whole / size]
        figures += [one["calls"], one["client_cpu"], one["server_cpu"]]
        figures += [
            figure for side in ("client", "server") for figure in (one[side], 1024 * one[side] / size)
        ]
        cells = [str(size), *(f"{figure:.2f}" for figure in figures)]
        cells[5] = str(one["calls"])
        print("  ".join(cell.rjust(len(head)) for cell, head in zip(cells, heads, strict=True)), flush=True)


def one_size(nodes: int) -> dict[str, float]:
    """Build, wait and shut down once, in a process that does nothing else."""
    own = os.getpid()
    with Server() as server:
        with cluster_of(server, "scale", POOLS, nodes // POOLS) as cluster:
            client_before, server_before, cpu = peak(own), server.peak(), time.process_time()
            marks = [time.perf_counter()]
            cluster.build()
            marks.append(time.perf_counter())
            workers = cluster.wait_for_workers()
            marks.append(time.perf_counter())
            cluster.shut_down()
            marks.append(time.perf_counter())
            cpu = time.process_time() - cpu
        if workers != nodes:
            raise RuntimeError(f"{workers} workers, not {nodes}")
        build, wait, down = (after - before for before, after in itertools.pairwise(marks))
        return {
            "build": build,
            "wait": wait,
            "down": down,
            "calls": server.books()["requests"],
            "client_cpu": cpu,
            "server_cpu": server.cpu(),
            "client": peak(own) - client_before,
            "server": server.peak() - server_before,
        }


def peak(process: int) -> float:
    """Return the most memory that a process has had so far, in MiB."""
    # Not getrusage: what that tells of a new process includes the peak of the one that started it.
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{process}/status").read_text())
    return int(found[1]) / 1024 if found else 0.0


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--rounds", type=int, default=3, metavar="N", help="how often to measure (%(default)s)"
    )
    parser.add_argument(
        "--check", action="store_true", help="exit with 1 where a figure is not as it should be"
    )
    parser.add_argument("--scale", action="store_true", help="also measure clusters of 500 to 10000 nodes")
    parser.add_argument("--size", type=int, help=argparse.SUPPRESS)
    wanted = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        os.environ["RAYDOG_STATE_DIR"] = directory
        if wanted.size:
            print(json.dumps(one_size(wanted.size)))
            return 0
        result = overhead(wanted.rounds, wanted.check)
        if wanted.scale:
            scale()
    return result


if __name__ == "__main__":
    sys.exit(main())
