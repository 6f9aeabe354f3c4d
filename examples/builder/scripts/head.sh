#!/bin/bash
# The task of a RayDog cluster's head node: runs Ray's head until the task is aborted or Ray ends.
#
# Reads from its environment:
#   YD_AGENT_HOME       set by the YellowDog agent; Ray is in its venv
#   RAYDOG_NODE_IP      the node's private address, the one that the workers are told
#   OBSERVABILITY_HOST  the observability node's private address, where there is one
#   RAYDOG_DASHBOARD_HOST  the address that the dashboard listens at, if not localhost only
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
    [ -z "$ray" ] || kill "$ray" 2>/dev/null
    ray stop --grace-period 5 >/dev/null 2>&1
    # `ray start --block` goes on where all that it watched has ended in order.
    [ -z "$ray" ] || kill -KILL "$ray" 2>/dev/null
    echo "Ray stopped"
}
ray=""
trap stop_ray EXIT

options=()
if [ -n "${RAYDOG_NODE_IP:-}" ]; then
    # Ray would guess its address, and on a node with several it may guess another one.
    options+=("--node-ip-address=$RAYDOG_NODE_IP")
fi

# The dashboard is reached through an SSH tunnel to the node's localhost. Only Prometheus, on the
# observability node, has to reach it from elsewhere, and a user without SSH.
dashboard_host="${RAYDOG_DASHBOARD_HOST:-127.0.0.1}"
if [ -n "${OBSERVABILITY_HOST:-}" ]; then
    dashboard_host=0.0.0.0
    export RAY_PROMETHEUS_HOST="${RAY_PROMETHEUS_HOST:-http://$OBSERVABILITY_HOST:9090}"
    export RAY_GRAFANA_HOST="${RAY_GRAFANA_HOST:-http://$OBSERVABILITY_HOST:3000}"
    # The user's browser opens Grafana through a tunnel.
    export RAY_GRAFANA_IFRAME_HOST="${RAY_GRAFANA_IFRAME_HOST:-http://localhost:3000}"
fi

ray start --head --block \
    --port=6379 \
    --ray-client-server-port=10001 \
    --dashboard-host="$dashboard_host" \
    --dashboard-port=8265 \
    --metrics-export-port=8080 \
    ${options[@]+"${options[@]}"} &
ray=$!
wait "$ray"
