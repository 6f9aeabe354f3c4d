#!/bin/bash
# The task of a RayDog cluster's observability node: runs Prometheus, and Grafana where it is installed,
# until the task is aborted or Prometheus ends.
#
# Reads from its environment:
#   RAY_HEAD_IP       the head's private address
#   RAY_AUTH_TOKEN    the cluster's token, where it is protected by one
#
# Prometheus (a `prometheus` on the PATH) and Grafana (`grafana` or `grafana-server`) have to be installed
# on the node; node-setup.sh does so on Ubuntu. All files are written in the task's own directory.

set -u
umask 077

head_ip="${RAY_HEAD_IP:-${RAY_HEAD_NODE_PRIVATE_IP:-}}"
if [ -z "$head_ip" ]; then
    echo "RAY_HEAD_IP is not set: this script does not know where the Ray head is" >&2
    exit 1
fi
if ! command -v prometheus >/dev/null; then
    echo "prometheus is not installed on this node (looked in $PATH); install it in the node's image or in" \
        "its user data, as node-setup.sh does, or build the cluster without observability" >&2
    exit 1
fi

here="$PWD"
pids=()
trap 'exit 143' TERM INT
trap '[ ${#pids[@]} -eq 0 ] || kill "${pids[@]}" 2>/dev/null; echo "Observability stopped"' EXIT

# Ray's dashboard tells Prometheus which nodes there are, as they come and go; it asks for the token.
authorization=""
if [ -n "${RAY_AUTH_TOKEN:-}" ]; then
    printf '%s' "$RAY_AUTH_TOKEN" >"$here/ray-token"
    authorization="        authorization: {type: Bearer, credentials_file: '$here/ray-token'}"
fi
cat >"$here/prometheus.yml" <<EOF
global:
  scrape_interval: 10s
  evaluation_interval: 10s
scrape_configs:
  - job_name: ray
    http_sd_configs:
      - url: http://$head_ip:8265/api/prometheus/sd
        refresh_interval: 10s
$authorization
EOF

prometheus --config.file="$here/prometheus.yml" --storage.tsdb.path="$here/prometheus-data" \
    --web.listen-address=0.0.0.0:9090 &
pids+=($!)

grafana=()
if command -v grafana >/dev/null; then
    grafana=(grafana server)
elif command -v grafana-server >/dev/null; then
    grafana=(grafana-server)
fi
if [ ${#grafana[@]} -gt 0 ]; then
    mkdir -p "$here/grafana/provisioning/datasources" "$here/grafana/provisioning/dashboards"
    cat >"$here/grafana/provisioning/datasources/prometheus.yml" <<EOF
apiVersion: 1
datasources:
  - {name: Prometheus, type: prometheus, access: proxy, url: 'http://localhost:9090', isDefault: true}
EOF
    # Grafana is reached through an SSH tunnel, so that it listens on localhost only. Ray's dashboard shows
    # its panels in frames, for which it has to let viewers in without a password.
    cat >"$here/grafana/grafana.ini" <<EOF
[server]
http_addr = 127.0.0.1
http_port = 3000
[security]
allow_embedding = true
[auth.anonymous]
enabled = true
org_role = Viewer
[paths]
data = $here/grafana/data
logs = $here/grafana/logs
plugins = $here/grafana/plugins
provisioning = $here/grafana/provisioning
EOF
    "${grafana[@]}" --homepath="${GRAFANA_HOME:-/usr/share/grafana}" --config="$here/grafana/grafana.ini" &
    pids+=($!)
else
    echo "Grafana is not installed on this node: Prometheus runs alone"
fi

wait "${pids[0]}"
