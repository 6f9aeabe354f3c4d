#!/bin/bash
# The task of a RayDog cluster's observability node: runs Prometheus, and Grafana where it is installed,
# until the task is aborted, Prometheus ends, or the head is gone or never comes. Then it fails, and says why.
#
# Reads from its environment:
#   RAY_HEAD_IP                the head's private address
#   RAYDOG_NODE_IP             the node's own private address, at which alone Prometheus and Grafana listen
#   RAY_AUTH_TOKEN             the cluster's token, where it is protected by one
#   RAYDOG_HEAD_WAIT_SECONDS   how long to wait for the head to listen; 600 if it is not set
#   RAYDOG_HEAD_GONE_SECONDS   how long the head may be silent before the node leaves; 60 if it is not set
#   YD_AGENT_HOME              set by the YellowDog agent; Ray in its venv has the dashboards for Grafana
#   GRAFANA_HOME               where Grafana's own files are; /usr/share/grafana if it is not set
#
# Prometheus (a `prometheus` on the PATH, 2.28 or later) and Grafana (`grafana` or `grafana-server`) have to be
# installed on the node; node-setup.sh does so on Ubuntu. All files are written in the task's own directory.

set -u
umask 077

head_ip="${RAY_HEAD_IP:-${RAY_HEAD_NODE_PRIVATE_IP:-}}"
NODE_IP="${RAYDOG_NODE_IP:-}"
if [ -z "$head_ip" ]; then
    echo "RAY_HEAD_IP is not set: this script does not know where the Ray head is" >&2
    exit 1
fi
if [ -z "$NODE_IP" ]; then
    echo "RAYDOG_NODE_IP is not set: this script does not know at which address of the node to listen" >&2
    exit 1
fi
if ! command -v prometheus >/dev/null; then
    echo "prometheus is not installed on this node (looked in $PATH); install it in the node's image or in" \
        "its user data, as node-setup.sh does, or build the cluster without observability" >&2
    exit 1
fi

HERE="$PWD"
TOKEN_FILE="$HERE/ray-token"
# As they are written in URLs.
HEAD="$head_ip" NODE="$NODE_IP"
[[ $HEAD != *:* ]] || HEAD="[$HEAD]"
[[ $NODE != *:* ]] || NODE="[$NODE]"

# Write a file: the standard input, with what only the node knows in the place of @NAME@.
write_file() {
    local text name
    text=$(cat)
    for name in HEAD NODE NODE_IP HERE TOKEN_FILE; do
        text="${text//@$name@/"${!name}"}"
    done
    mkdir -p "$HERE/${1%/*}"
    printf '%s\n' "$text" >"$HERE/$1"
}

# These files are the package's own (yellowdog_ray/raydog/observability).
write_file ./prometheus.yml <<'END_OF_FILE'
#include observability/prometheus.yml
END_OF_FILE
write_file grafana/grafana.ini <<'END_OF_FILE'
#include observability/grafana.ini
END_OF_FILE
write_file grafana/provisioning/datasources/prometheus.yml <<'END_OF_FILE'
#include observability/datasource.yml
END_OF_FILE
write_file grafana/provisioning/dashboards/ray.yml <<'END_OF_FILE'
#include observability/dashboards.yml
END_OF_FILE
write_file ./ray_dashboards.py <<'END_OF_FILE'
#include observability/ray_dashboards.py
END_OF_FILE
mkdir -p grafana/dashboards grafana/plugins
if [ -n "${RAY_AUTH_TOKEN:-}" ]; then
    printf '%s' "$RAY_AUTH_TOKEN" >"$TOKEN_FILE"
else
    sed -i '/credentials_file/d' prometheus.yml
fi

pids=()
trap 'exit 143' TERM INT
trap 'exit 1' USR1
trap '[ ${#pids[@]} -eq 0 ] || kill "${pids[@]}" 2>/dev/null; echo "Observability stopped"' EXIT

prometheus --config.file="$HERE/prometheus.yml" --storage.tsdb.path="$HERE/prometheus-data" \
    --web.listen-address="$NODE:9090" &
pids+=($!)

python="${YD_AGENT_HOME:-/opt/yellowdog/agent}/venv/bin/python"
[ -x "$python" ] || python=python3
# In the background, for Bash to see the signal of an abort meanwhile.
"$python" ray_dashboards.py grafana/dashboards &
pids+=($!)
wait "${pids[1]}" ||
    echo "Grafana goes without Ray's dashboards, and Ray's dashboard has empty frames in its Metrics page" >&2
unset "pids[1]"

grafana=()
if command -v grafana >/dev/null; then
    grafana=(grafana server)
elif command -v grafana-server >/dev/null; then
    grafana=(grafana-server)
fi
if [ ${#grafana[@]} -gt 0 ]; then
    (
        trap '[ -z "$!" ] || kill "$!" 2>/dev/null; exit' TERM INT
        "${grafana[@]}" --homepath="${GRAFANA_HOME:-/usr/share/grafana}" --config="$HERE/grafana/grafana.ini" &
        wait "$!"
        echo "Grafana has ended with exit status $?: Ray's dashboard has empty frames in its Metrics page" >&2
    ) &
    pids+=($!)
else
    echo "Grafana is not installed on this node: Prometheus runs alone"
fi

#include scripts/head-watch.sh

# Nobody needs this node without the head, and it would cost for ever.
(if ! await_head || watch_head "${pids[0]}" false; then kill -USR1 $$; fi) &
pids+=($!)
wait "${pids[0]}"
