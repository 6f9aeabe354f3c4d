#!/bin/bash
# The task of a RayDog cluster's worker node: joins the head, and runs until the task is aborted, Ray ends,
# the head is gone, or the node has left the cluster. In the last two cases it fails, and says why.
#
# Reads from its environment:
#   YD_AGENT_HOME              set by the YellowDog agent; Ray is in its venv
#   RAY_HEAD_IP                the head's private address (RAY_HEAD_NODE_PRIVATE_IP, its older name, will do)
#   RAYDOG_NODE_VCPUS          the CPUs that Ray is to count here, where they are not the machine's own
#   RAYDOG_NODE_MEMORY         the same for its memory, in bytes; the local platform sets both
#   RAYDOG_HEAD_WAIT_SECONDS   how long to wait for the head to listen; 600 if it is not set
#   RAYDOG_HEAD_GONE_SECONDS   how long the head may be silent before the node leaves; 60 if it is not set
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
if [ -z "$head_ip" ]; then
    echo "RAY_HEAD_IP is not set: this script does not know where the Ray head is" >&2
    exit 1
fi

#include scripts/head-watch.sh

# Workers start as soon as their node is up, which may be long before the head is. Ray itself would wait
# in steps of 40 s.
await_head || exit 1

# From here on there is a Ray to stop. Bash runs a trap only when its foreground child has ended: Ray
# runs in the background, and Bash waits.
stop_ray() {
    trap '' USR1
    [ -z "$watcher" ] || kill "$watcher" 2>/dev/null
    [ -z "$ray" ] || kill "$ray" 2>/dev/null
    ray stop --grace-period 5 >/dev/null 2>&1
    # `ray start --block` goes on where all that it watched has ended in order.
    [ -z "$ray" ] || kill -KILL "$ray" 2>/dev/null
    echo "Ray stopped"
}
ray=""
watcher=""
trap stop_ray EXIT
trap 'exit 1' USR1

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

ray start ${size[@]+"${size[@]}"} --block \
    --address="$head_ip:$head_port" \
    --metrics-export-port=8080 &
ray=$!

# `ray start` ends a minute after the head has, but never after its own raylet has ended in order, as it does
# when Ray drains the node: the task would run, and cost, for nothing. So neither is left to it alone.
raylet="" ended=0 line=""
raylet_lives() {
    { read -r line <"/proc/$raylet/stat"; } 2>/dev/null && [[ $line == "$raylet (raylet) "[!ZX]* ]]
}
find_raylet() {
    local file
    for file in /proc/[0-9]*/stat; do
        # The process, its name, its state and its parent.
        if { read -r line <"$file"; } 2>/dev/null && [[ $line == *" (raylet) "?" $ray "* ]]; then
            raylet="${line%% *}"
            return
        fi
    done
}
raylet_has_ended() {
    if [ -z "$raylet" ]; then
        find_raylet
    elif raylet_lives; then
        ended=0
    else
        ended=$((ended + 1))
    fi
    # One look is not enough: `ray start` gets the time to see it itself.
    [ "$ended" -ge 2 ] || return 1
    echo "This node leaves: its raylet has ended, so that it is no part of the cluster any more." \
        "Ray may have drained it; its log is raylet.out in Ray's log directory" >&2
}
(! watch_head "$ray" raylet_has_ended || kill -USR1 $$) &
watcher=$!
wait "$ray"
