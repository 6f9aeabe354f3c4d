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
# Prometheus on the observability node. Ray's dashboard on the head tells which nodes there are, as they come
# and go, and the autoscaler and the dashboard with them; it asks for the cluster's token.
global:
  # Ray brings its metrics up to date every 10 s.
  scrape_interval: 10s
  evaluation_interval: 10s
scrape_configs:
  - job_name: ray
    http_sd_configs:
      - url: "http://@HEAD@:8265/api/prometheus/sd"
        refresh_interval: 5s
        authorization: {type: Bearer, credentials_file: "@TOKEN_FILE@"}
END_OF_FILE
write_file grafana/grafana.ini <<'END_OF_FILE'
; Grafana on the observability node. The user's browser opens it through a tunnel at localhost:3000, by itself and
; in the frames of Ray's dashboard, and the head asks for its health.
[server]
http_addr = @NODE_IP@
http_port = 3000
root_url = http://localhost:3000/

[paths]
data = @HERE@/grafana/data
logs = @HERE@/grafana/logs
plugins = @HERE@/grafana/plugins
provisioning = @HERE@/grafana/provisioning

; Whoever reaches the port may look, for a frame cannot log in. Nobody can log in, and so nobody can change
; anything: there is no administrator, with the usual password or another one.
[security]
allow_embedding = true
disable_initial_admin_creation = true
disable_gravatar = true

[auth]
disable_login_form = true

[auth.basic]
enabled = false

[auth.anonymous]
enabled = true
org_name = Main Org.
org_role = Viewer

[users]
allow_sign_up = false

; Nothing is sent to, or fetched from, anywhere else.
[analytics]
reporting_enabled = false
check_for_updates = false
check_for_plugin_updates = false

[news]
news_feed_enabled = false

[plugins]
plugin_admin_enabled = false
preinstall_disabled = true

[snapshots]
external_enabled = false
END_OF_FILE
write_file grafana/provisioning/datasources/prometheus.yml <<'END_OF_FILE'
# Ray's dashboard asks for a data source of this name (RAY_PROMETHEUS_NAME).
apiVersion: 1
datasources:
  - name: Prometheus
    type: prometheus
    access: proxy
    url: "http://@NODE@:9090"
    isDefault: true
    editable: false
    jsonData: {timeInterval: 10s}
END_OF_FILE
write_file grafana/provisioning/dashboards/ray.yml <<'END_OF_FILE'
apiVersion: 1
providers:
  - name: Ray
    folder: Ray
    type: file
    disableDeletion: true
    allowUiUpdates: false
    options:
      path: "@HERE@/grafana/dashboards"
END_OF_FILE
write_file ./ray_dashboards.py <<'END_OF_FILE'
"""Write the Grafana dashboards that the installed Ray has, without a running Ray.

Which there are, and what the functions that make them return, differs between versions of Ray.
"""

import json
import re
import sys
from pathlib import Path

place = Path(sys.argv[1])
try:
    import ray
    from ray.dashboard.modules.metrics import grafana_dashboard_factory as factory
except ImportError as error:
    sys.exit(f"Ray's Grafana dashboards cannot be had: {error}. They come with a ray[default] on this node")
place.mkdir(parents=True, exist_ok=True)
written = []
for name in sorted(dir(factory)):
    made = re.fullmatch(r"generate_(\w+)_grafana_dashboard", name)
    if not made:
        continue
    try:
        content = getattr(factory, name)()
        text = content if isinstance(content, str) else content[0]
        json.loads(text)
        place.joinpath(f"{made[1]}.json").write_text(text)
        written.append(made[1])
    except Exception as error:
        print(f"No Grafana dashboard {made[1]}: {type(error).__name__}: {error}", file=sys.stderr)
if not written:
    sys.exit(f"Ray {ray.__version__} has no Grafana dashboards where this script looks for them")
print(f"Grafana has the dashboards of Ray {ray.__version__}: {', '.join(written)}")
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

# Shared by the scripts of the nodes that are of no use without the head. They have to set head_ip.
head_port=6379

# A connection that is dropped rather than refused would hang for minutes, and Bash would not act on a signal
# meanwhile: each try has its own time, in the background.
try_head() {
    timeout "$1" bash -c 'exec 3<>"/dev/tcp/$0/$1"' "$head_ip" "$head_port" >/dev/null 2>&1
}
head_listens() {
    try_head 2 &
    wait $!
}

# Wait until the head listens; fail, and say so, where it does not come to do so in time.
await_head() {
    local seconds="${RAYDOG_HEAD_WAIT_SECONDS:-600}"
    local deadline=$((SECONDS + seconds))
    until head_listens; do
        if [ "$SECONDS" -ge "$deadline" ]; then
            echo "The Ray head at $head_ip port $head_port did not listen within $seconds s:" \
                "look at the head node's task, and at the network between the two nodes" >&2
            return 1
        fi
        sleep 0.2
    done
}

# Look until there is a reason for the node to leave, and say it: the head is gone, or the rest of the arguments,
# a command that is run with every look, succeeds. It fails where the process of the first argument ends before.
watch_head() {
    local limit="${RAYDOG_HEAD_GONE_SECONDS:-60}" heard=$SECONDS refused=0
    local pause=$((limit < 4 ? 1 : limit < 20 ? limit / 4 : 5))
    # Waiting for a line that never comes needs no process that could be left behind.
    exec 9<> <(:)
    while kill -0 "$1" 2>/dev/null; do
        read -rt "$pause" -u 9
        if try_head 5; then
            heard=$SECONDS refused=0
        else
            refused=$((refused + 1))
        fi
        # One look is not enough: the clock may be set.
        if [ "$refused" -ge 2 ] && [ $((SECONDS - heard)) -ge "$limit" ]; then
            echo "This node leaves: the Ray head at $head_ip port $head_port has not accepted a connection" \
                "for $((SECONDS - heard)) s" >&2
            return 0
        fi
        ! "${@:2}" || return 0
    done
    return 1
}

# Nobody needs this node without the head, and it would cost for ever.
(if ! await_head || watch_head "${pids[0]}" false; then kill -USR1 $$; fi) &
pids+=($!)
wait "${pids[0]}"
