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
#include observability/relay.py
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
