"""Measure SSH tunnels: RayDog's engines beside sshtunnel, ``ssh -L`` and plain TCP, in one run.

Run as ``python benchmarks/tunnels.py`` on a machine that has ``/usr/sbin/sshd`` and ``ssh``; ``--ray`` adds
Ray Client on a real head of the local platform. Every contender forwards from a process of its own to servers
in another one, through an sshd started for this. All are measured in turn, round by round; what is printed
are medians, and medians of the ratios within each round; the 200 connections at once, and what a busy process
does, are measured once. sshtunnel is used as people use it: with its defaults, one connection for each port.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

SSHD = "/usr/sbin/sshd"
PEER = "sshtunnel, per port"
CONTENDERS = ("plain TCP", PEER, "engine sshtunnel", "engine paramiko", "engine openssh", "ssh -N -L")
CHUNK = bytes(1 << 18)


# The servers behind the tunnels


def _serve_source(sock: socket.socket) -> None:
    while size := sock.recv(8):
        left = int.from_bytes(size, "big")
        while left > 0:
            left -= sock.send(CHUNK[: min(left, len(CHUNK))])


def _serve_sink(sock: socket.socket) -> None:
    while size := sock.recv(8):
        left = int.from_bytes(size, "big")
        while left > 0:
            left -= len(sock.recv(min(left, 1 << 20)))
        sock.sendall(b"!")


def _serve_echo(sock: socket.socket) -> None:
    while sock.recv(1):
        sock.sendall(b"a")
        time.sleep(0.0003)
        sock.sendall(b"b")  # in two writes, as gRPC answers


def serve() -> None:
    """Be the servers: print their ports, and end with the standard input."""
    ports = []
    for handler in (_serve_source, _serve_sink, _serve_echo):
        listener = socket.create_server(("127.0.0.1", 0), backlog=512)
        ports.append(listener.getsockname()[1])
        threading.Thread(target=_accept, args=(listener, handler), daemon=True).start()
    print(json.dumps(ports), flush=True)
    sys.stdin.read()


def _accept(listener: socket.socket, handler: Callable[[socket.socket], None]) -> None:
    def run(sock: socket.socket) -> None:
        with contextlib.suppress(OSError), sock:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            handler(sock)

    while True:
        sock, _ = listener.accept()
        threading.Thread(target=run, args=(sock,), daemon=True).start()


# The contenders


def forward(name: str, where: dict[str, Any]) -> None:
    """Be a contender: set up two ports a few times, print how long it took, and the local ports."""
    times = []
    for attempt in range(4):
        with contextlib.ExitStack() as stack:
            began = time.perf_counter()
            ports = _open(name, where, where["ports"][:2], stack)
            if attempt:  # the first one loads modules
                times.append(time.perf_counter() - began)
    with contextlib.ExitStack() as stack:
        ports = _open(name, where, where["ports"], stack)
        print(json.dumps({"ports": ports, "set-up": statistics.median(times) * 1000}), flush=True)
        for line in sys.stdin:
            if line.strip() == "busy":
                threading.Thread(target=_be_busy, daemon=True).start()
                print("busy", flush=True)


def _be_busy() -> None:
    while True:
        sum(range(1000))


def _open(name: str, where: dict[str, Any], remote: list[int], stack: contextlib.ExitStack) -> list[int]:
    if name == PEER:
        import sshtunnel

        ports = []
        for port in remote:
            forwarder = sshtunnel.SSHTunnelForwarder(
                ("127.0.0.1", where["port"]),
                ssh_username=where["user"],
                ssh_pkey=where["key"],
                remote_bind_address=("127.0.0.1", port),
                local_bind_address=("127.0.0.1", 0),
            )
            forwarder.start()
            stack.callback(forwarder.stop)
            ports.append(forwarder.local_bind_port)
        return ports
    if name == "ssh -N -L":
        ports = [_free_port() for _ in remote]
        command = ["ssh", "-N", "-F", "none", "-i", where["key"], "-p", str(where["port"])]
        command += [
            "-o",
            "StrictHostKeyChecking=no",
            "-o",
            "UserKnownHostsFile=/dev/null",
            "-o",
            "LogLevel=ERROR",
        ]
        for local, port in zip(ports, remote, strict=True):
            command += ["-L", f"127.0.0.1:{local}:127.0.0.1:{port}"]
        process = subprocess.Popen([*command, f"{where['user']}@127.0.0.1"])
        stack.callback(process.wait)
        stack.callback(process.terminate)
        for port in ports:
            _wait_for(port)
        return ports
    from yellowdog_ray.utils.ray_ssh_tunnels import RayTunnels, SSHTunnelSpec

    tunnels = stack.enter_context(
        RayTunnels(
            "127.0.0.1",
            where["user"],
            private_key_file=where["key"],
            ssh_port=where["port"],
            host_key=where["host_key"],
            ray_tunnel_specs=[SSHTunnelSpec("localhost", port, "127.0.0.1", port) for port in remote],
            local_port="auto",
            engine=name.removeprefix("engine ").removesuffix(", isolated"),
            isolate=name.endswith(", isolated"),
            ssh_config=False,
        )
    )
    return [tunnels.ports[port] for port in remote]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_for(port: int) -> None:
    while True:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
            return
        time.sleep(0.005)


# The measurements


def _connect(port: int) -> socket.socket:
    sock = socket.create_connection(("127.0.0.1", port), timeout=60)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def down(port: int, megabytes: int) -> float:
    with _connect(port) as sock:
        began = time.perf_counter()
        sock.sendall((megabytes << 20).to_bytes(8, "big"))
        left = megabytes << 20
        while left:
            left -= len(sock.recv(min(left, 1 << 20)))
        return megabytes * 1.048576 / (time.perf_counter() - began)


def up(port: int, megabytes: int) -> float:
    with _connect(port) as sock:
        began = time.perf_counter()
        sock.sendall((megabytes << 20).to_bytes(8, "big"))
        for _ in range(megabytes * 4):
            sock.sendall(CHUNK)
        sock.recv(1)
        return megabytes * 1.048576 / (time.perf_counter() - began)


def two_writes(port: int, count: int) -> float:
    """Return the median time of a small question whose answer comes in two writes, in ms."""
    times = []
    with _connect(port) as sock:
        for _ in range(count):
            began = time.perf_counter()
            sock.sendall(b"x")
            answer = b""
            while len(answer) < 2:
                answer += sock.recv(2)
            times.append(time.perf_counter() - began)
    return statistics.median(times) * 1000


def burst(port: int, count: int = 200) -> int:
    """Open many connections at once and use each; return how many were answered."""
    answered = []

    def ask() -> None:
        with contextlib.suppress(OSError), _connect(port) as sock:
            sock.settimeout(10)
            sock.sendall(b"x")
            if sock.recv(1):
                answered.append(1)

    threads = [threading.Thread(target=ask) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return len(answered)


@contextlib.contextmanager
def child(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, __file__, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        process.stdin.close()  # type: ignore[union-attr]
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:  # a forwarder may hang when it is stopped
            process.kill()
            process.wait()
        process.stdout.close()  # type: ignore[union-attr]


@contextlib.contextmanager
def sshd() -> Iterator[dict[str, Any]]:
    """Run an sshd, and yield how to log in to it."""
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        directory, port = Path(name), _free_port()
        for key in ("host", "user"):
            command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(directory / key)]
            subprocess.run(command, check=True)
        (directory / "authorized_keys").write_bytes((directory / "user.pub").read_bytes())
        (directory / "config").write_text(
            f"ListenAddress 127.0.0.1\nPort {port}\nHostKey {directory}/host\nStrictModes no\nUsePAM no\n"
            f"AuthorizedKeysFile {directory}/authorized_keys\nPermitRootLogin yes\nPidFile none\n"
            "MaxStartups 100\n"
        )
        process = subprocess.Popen([SSHD, "-D", "-q", "-f", str(directory / "config")])
        try:
            _wait_for(port)
            user = os.environ.get("USER") or subprocess.check_output(["id", "-un"], text=True).strip()
            host_key = (directory / "host.pub").read_text().strip()
            yield {"port": port, "user": user, "key": str(directory / "user"), "host_key": host_key}
        finally:
            process.terminate()
            process.wait()


def measure(rounds: int, megabytes: int) -> None:
    found: dict[str, dict[str, list[float]]] = {name: {} for name in CONTENDERS}

    def note(name: str, what: str, value: float) -> None:
        found[name].setdefault(what, []).append(value)

    with child("--serve") as servers, sshd() as where:
        where["ports"] = json.loads(servers.stdout.readline())  # type: ignore[union-attr]
        for number in range(rounds):
            for name in CONTENDERS:
                print(".", end="", file=sys.stderr, flush=True)
                with contextlib.ExitStack() as stack:
                    source, sink, echo = where["ports"]
                    if name != "plain TCP":
                        process = stack.enter_context(child("--forward", name, json.dumps(where)))
                        told = json.loads(process.stdout.readline())  # type: ignore[union-attr]
                        source, sink, echo = told["ports"]
                        note(name, "set-up ms", told["set-up"])
                    time.sleep(0.3)  # what a tunnel does after its start is not measured
                    note(name, "down MB/s", down(source, megabytes))
                    note(name, "up MB/s", up(sink, megabytes))
                    note(name, "two writes ms", two_writes(echo, 100))
                    if number == 0:  # with connections that get no answer, this takes 10 s
                        note(name, "200 at once", burst(echo))
        busy = {}
        for name in (PEER, "engine paramiko", "engine paramiko, isolated", "engine openssh"):
            with child("--forward", name, json.dumps(where)) as process:
                source, _, echo = json.loads(process.stdout.readline())["ports"]  # type: ignore[union-attr]
                print("busy", file=process.stdin, flush=True)
                process.stdout.readline()  # type: ignore[union-attr]
                busy[name] = (two_writes(echo, 50), down(source, megabytes // 4))
    _print(found, busy)


def _print(found: dict[str, dict[str, list[float]]], busy: dict[str, tuple[float, float]]) -> None:
    columns = ("set-up ms", "down MB/s", "up MB/s", "two writes ms", "200 at once")
    print(f"\n{'':20}" + "".join(f"{column:>22}" for column in columns))
    for name in CONTENDERS:
        cells: list[str] = []
        for column in columns:
            values = found[name].get(column)
            if not values:
                cells.append("-")
                continue
            text = f"{statistics.median(values):.1f}"
            peer = found[PEER].get(column)
            if peer and column != "200 at once":
                better = "MB/s" not in column
                pairs = zip(values, peer, strict=True)
                ratio = statistics.median(b / a if better else a / b for a, b in pairs)
                text += f" ({ratio:.2f}x)"
            cells.append(text)
        print(f"{name:20}" + "".join(f"{cell:>22}" for cell in cells))
    print(f"(x: how many times better than {PEER})")
    print("\nIn a process that is busy with Python code: two writes ms, down MB/s")
    for name, (delay, rate) in busy.items():
        print(f"{name:28}{delay:10.1f}{rate:10.1f}")


# Ray Client


def measure_ray(calls: int, rounds: int) -> None:
    """Call an actor through Ray Client, directly and through tunnels."""
    import ray

    from yellowdog_ray import LocalPlatform, RayDogCluster

    with LocalPlatform() as platform:
        cluster = RayDogCluster(
            platform.key_id,
            platform.secret,
            f"bench-{os.getpid()}",
            platform.namespace,
            platform.template_names[0],
            None,
            platform.url,
            access=platform.ssh_access,
            progress=False,
        )
        with cluster:
            cluster.build(until="ray")
            access = platform.ssh_access
            where = {
                "port": access.port,
                "user": access.user,
                "key": str(access.private_key_file),
                "host_key": access.host_key,
            }
            print("\nAn actor call through Ray Client, ms at the median (and times the direct one)")
            times: dict[str, list[float]] = {}
            for _ in range(rounds):
                for name in ("direct", PEER, "paramiko", "paramiko, isolated", "openssh"):
                    with contextlib.ExitStack() as stack:
                        address = f"{cluster.head_node_public_ip}:10001"
                        if name == PEER:
                            address = f"127.0.0.1:{_peer_of_head(address, where, stack)}"
                        elif name != "direct":
                            engine = name.partition(",")[0]
                            tunnels = cluster.tunnels(
                                local_port="auto",
                                engine=engine,
                                isolate="isolated" in name,
                            )
                            stack.enter_context(tunnels)
                            address = f"127.0.0.1:{tunnels.ports[10001]}"
                        ray.init(f"ray://{address}", logging_level="ERROR")
                        times.setdefault(name, []).append(_call(ray, calls))
                        ray.shutdown()
            for name, found in times.items():
                pairs = zip(found, times["direct"], strict=True)
                ratio = statistics.median(mine / direct for mine, direct in pairs)
                print(f"{name:28}{statistics.median(found):10.2f} ({ratio:.2f}x)")


def _peer_of_head(address: str, where: dict[str, Any], stack: contextlib.ExitStack) -> int:
    import sshtunnel

    forwarder = sshtunnel.SSHTunnelForwarder(
        (address.partition(":")[0], where["port"]),
        ssh_username=where["user"],
        ssh_pkey=where["key"],
        remote_bind_address=("127.0.0.1", 10001),
        local_bind_address=("127.0.0.1", 0),
    )
    forwarder.start()
    stack.callback(forwarder.stop, force=True)
    return int(forwarder.local_bind_port)


def _call(ray: Any, calls: int) -> float:
    class Counter:
        def up(self) -> int:
            return 1

    actor = ray.remote(Counter).options(num_cpus=0).remote()
    times = []
    for _ in range(calls):
        began = time.perf_counter()
        ray.get(actor.up.remote())
        times.append(time.perf_counter() - began)
    return statistics.median(times[calls // 10 :]) * 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--megabytes", type=int, default=128, help="to move in each direction (default: 128)")
    parser.add_argument("--ray", action="store_true", help="measure Ray Client too, on a real head")
    parser.add_argument("--only-ray", action="store_true", help="measure nothing but Ray Client")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--forward", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    logging.disable()
    if options.serve:
        serve()
    elif options.forward:
        forward(options.forward[0], json.loads(options.forward[1]))
    else:
        if not options.only_ray:
            measure(options.rounds, options.megabytes)
        if options.ray or options.only_ray:
            measure_ray(150, options.rounds)


if __name__ == "__main__":
    main()
