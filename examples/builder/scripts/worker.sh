#!/bin/bash
# The task of a RayDog cluster's worker node: joins the head, and runs until the task is aborted or the
# head is gone.
#
# Reads from its environment:
#   YD_AGENT_HOME              set by the YellowDog agent; Ray is in its venv
#   RAY_HEAD_IP                the head's private address (RAY_HEAD_NODE_PRIVATE_IP, its older name, will do)
#   RAYDOG_HEAD_WAIT_SECONDS   how long to wait for the head to listen; 600 if it is not set
#   RAY_AUTH_MODE, RAY_AUTH_TOKEN   the cluster's token, where it is protected by one

set -u

venv="${YD_AGENT_HOME:-/opt/yellowdog/agent}/venv"
if ! . "$venv/bin/activate"; then
    echo "There is no virtual environment in $venv: Ray has to be installed there" >&2
    exit 1
fi

export RAY_USAGE_STATS_ENABLED="${RAY_USAGE_STATS_ENABLED:-0}"
# On SIGTERM Ray first drains the node, by default for 30 s. The agent may not wait that long.
export RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S="${RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S:-1}"

trap 'exit 143' TERM INT

head_ip="${RAY_HEAD_IP:-${RAY_HEAD_NODE_PRIVATE_IP:-}}"
head_port=6379
if [ -z "$head_ip" ]; then
    echo "RAY_HEAD_IP is not set: this script does not know where the Ray head is" >&2
    exit 1
fi

# Workers start as soon as their node is up, which may be long before the head is. Ray itself would wait
# in steps of 40 s. A connection that is dropped rather than refused would hang for minutes, and Bash would
# not act on a signal meanwhile: each try has its own time, in the background.
seconds="${RAYDOG_HEAD_WAIT_SECONDS:-600}"
deadline=$((SECONDS + seconds))
head_listens() {
    timeout 2 bash -c 'exec 3<>"/dev/tcp/$0/$1"' "$head_ip" "$head_port" 2>/dev/null &
    wait $!
}
until head_listens; do
    if [ "$SECONDS" -ge "$deadline" ]; then
        echo "The Ray head at $head_ip port $head_port did not listen within $seconds s:" \
            "look at the head node's task, and at the network between the two nodes" >&2
        exit 1
    fi
    sleep 0.2
done

# From here on there is a Ray to stop. Bash runs a trap only when its foreground child has ended: Ray
# runs in the background, and Bash waits.
stop_ray() {
    [ -z "$ray" ] || kill "$ray" 2>/dev/null
    ray stop --grace-period 5 >/dev/null 2>&1
    # `ray start --block` goes on where all that it watched has ended in order.
    [ -z "$ray" ] || kill -KILL "$ray" 2>/dev/null
    echo "Ray stopped"
}
ray=""
trap stop_ray EXIT

ray start --block \
    --address="$head_ip:$head_port" \
    --metrics-export-port=8080 &
ray=$!
wait "$ray"
