#!/bin/bash
# The task of a RayDog cluster's head node: runs Ray's head until the task is aborted or Ray ends.
#
# Reads from its environment:
#   YD_AGENT_HOME       set by the YellowDog agent; Ray is in its venv
#   RAYDOG_NODE_IP      the node's private address, the one that the workers are told
#   RAYDOG_NODE_VCPUS   the CPUs that Ray is to count here, where they are not the machine's own
#   RAYDOG_NODE_MEMORY  the same for its memory, in bytes; the local platform sets both
#   OBSERVABILITY_HOST  the observability node's private address, where there is one
#   RAYDOG_DASHBOARD_DIRECT  whether all machines may reach the dashboard, which the token protects
#   RAY_AUTH_MODE, RAY_AUTH_TOKEN   the cluster's token, where it is protected by one

set -u

venv="${YD_AGENT_HOME:-/opt/yellowdog/agent}/venv"
if ! . "$venv/bin/activate"; then
    echo "There is no virtual environment in $venv: Ray has to be installed there" >&2
    exit 1
fi

# Usage statistics are off unless somebody asks for them.
export RAY_USAGE_STATS_ENABLED="${RAY_USAGE_STATS_ENABLED:-0}"
# Ray Client's server forks while gRPC's threads run, and with gRPC's fork handlers now and then dies of it
# ("Starting Ray client server failed", ray-project/ray issue 63202). It needs none of them.
export GRPC_ENABLE_FORK_SUPPORT="${GRPC_ENABLE_FORK_SUPPORT:-0}"
# On SIGTERM Ray first drains the node, by default for 30 s. The agent may not wait that long.
export RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S="${RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S:-1}"

# Bash runs a trap only when its foreground child has ended: Ray runs in the background, and Bash waits.
trap 'exit 143' TERM INT
stop_ray() {
    [ -z "$relay" ] || kill "$relay" 2>/dev/null
    [ -z "$ray" ] || kill "$ray" 2>/dev/null
    ray stop --grace-period 5 >/dev/null 2>&1
    # `ray start --block` goes on where all that it watched has ended in order.
    [ -z "$ray" ] || kill -KILL "$ray" 2>/dev/null
    echo "Ray stopped"
}
ray=""
relay=""
trap stop_ray EXIT

options=()
if [ -n "${RAYDOG_NODE_IP:-}" ]; then
    # Ray would guess its address, and on a node with several it may guess another one.
    options+=("--node-ip-address=$RAYDOG_NODE_IP")
fi

# The ports at which Prometheus finds the autoscaler and the dashboard: Ray's own, said explicitly.
export AUTOSCALER_METRIC_PORT="${AUTOSCALER_METRIC_PORT:-44217}"
export DASHBOARD_METRIC_PORT="${DASHBOARD_METRIC_PORT:-44227}"

if [ -n "${OBSERVABILITY_HOST:-}" ]; then
    export RAY_PROMETHEUS_HOST="${RAY_PROMETHEUS_HOST:-http://$OBSERVABILITY_HOST:9090}"
    export RAY_GRAFANA_HOST="${RAY_GRAFANA_HOST:-http://$OBSERVABILITY_HOST:3000}"
    # The user's browser opens Grafana through a tunnel.
    export RAY_GRAFANA_IFRAME_HOST="${RAY_GRAFANA_IFRAME_HOST:-http://localhost:3000}"
fi

# The dashboard listens on the node's localhost, where the SSH tunnels end. Ray could let it listen at one other
# address instead, or at all of them. Prometheus, which asks it for the nodes, has this way, and so has a user
# without SSH.
relay_for="${RAYDOG_DASHBOARD_DIRECT:+any}"
relay_for="${relay_for:-${OBSERVABILITY_HOST:-}}"
if [ -n "$relay_for" ]; then
    if [ -n "${RAYDOG_NODE_IP:-}" ]; then
        (
            trap '[ -z "$!" ] || kill "$!" 2>/dev/null; exit' TERM INT
            python - "$RAYDOG_NODE_IP" 8265 "$relay_for" <<'END_OF_FILE' &
"""Let one other machine, or any, reach a port that listens on this machine's localhost only."""

import asyncio
import contextlib
import ipaddress
import logging
import sys

address, port, allowed = sys.argv[1], int(sys.argv[2]), sys.argv[3]
# Each takes two file descriptors, of which a process often has 1,024 and may have 256.
slots = asyncio.Semaphore(100)


async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Pass on what one side sends, and then that it has ended."""
    try:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
        writer.write_eof()
    except OSError:
        writer.close()


async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Connect to the port and pass on both ways, until the port's side has ended."""
    try:
        answers, there = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return
    asking = asyncio.create_task(pump(reader, there))
    await pump(answers, writer)
    there.transport.abort()
    writer.close()
    await asking


async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Serve a connection, or refuse it."""
    peer = ipaddress.ip_address(writer.get_extra_info("peername")[0])
    # Processes of this machine can reach the port anyway.
    own = peer.is_loopback or peer == ipaddress.ip_address(address)
    if slots.locked() or not (own or allowed == "any" or peer == ipaddress.ip_address(allowed)):
        writer.close()
        return
    async with slots:
        await serve(reader, writer)
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def main() -> None:
    """Serve until this process is ended."""
    # It reports every connection that could not be accepted, at length.
    logging.getLogger("asyncio").setLevel(logging.CRITICAL + 1)
    server = await asyncio.start_server(relay, address, port)
    await server.serve_forever()


asyncio.run(main())
END_OF_FILE
            wait "$!"
            echo "The relay to Ray's dashboard has ended with exit status $?:" \
                "the dashboard can be reached from this node only" >&2
        ) &
        relay=$!
    else
        echo "RAYDOG_NODE_IP is not set: Ray's dashboard can be reached from this node only" >&2
    fi
fi

# These options come first: of one that is given twice, Ray takes the last.
size=()
if [ -n "${RAYDOG_NODE_VCPUS:-}" ]; then
    size+=("--num-cpus=$RAYDOG_NODE_VCPUS")
fi
if [ -n "${RAYDOG_NODE_MEMORY:-}" ]; then
    # The shares that Ray itself gives a machine's memory: three tenths for objects, the rest for tasks.
    objects=$((RAYDOG_NODE_MEMORY * 3 / 10))
    size+=("--object-store-memory=$objects" "--memory=$((RAYDOG_NODE_MEMORY - objects))")
fi

ray start ${size[@]+"${size[@]}"} --head --block \
    --port=6379 \
    --ray-client-server-port=10001 \
    --dashboard-host=127.0.0.1 \
    --dashboard-port=8265 \
    --metrics-export-port=8080 \
    ${options[@]+"${options[@]}"} &
ray=$!
wait "$ray"
