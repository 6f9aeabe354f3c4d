#!/bin/bash
# User data (cloud-init) that makes an Ubuntu 22.04 machine a node of a RayDog cluster.
#
# UNTESTED: it needs a machine of a cloud provider and a YellowDog account to run.
#
# The order matters. The agent takes tasks as soon as it runs, so that it comes last: a node that was
# registered before Ray was installed would be given a task that fails.
#
# Set these to what the cluster's clients use: Ray insists on the same versions everywhere.
PYTHON_VERSION="${PYTHON_VERSION:-3.11}"
RAY_VERSION="${RAY_VERSION:-2.60.0}"
# Set to 1 for an observability node.
INSTALL_OBSERVABILITY="${INSTALL_OBSERVABILITY:-0}"

set -euo pipefail
export DEBIAN_FRONTEND=noninteractive

AGENT_USER=yd-agent
AGENT_HOME=/opt/yellowdog/agent
INSTALLER=https://raw.githubusercontent.com/yellowdog/resources/main/agent-install/linux/yd-agent-installer.sh

apt-get update
apt-get install -y curl ca-certificates software-properties-common

# 1. Python and Ray, in the virtual environment that the task scripts activate.
if ! apt-get install -y "python$PYTHON_VERSION" "python$PYTHON_VERSION-venv"; then
    # Ubuntu 22.04 itself has Python 3.10.
    add-apt-repository -y ppa:deadsnakes/ppa
    apt-get update
    apt-get install -y "python$PYTHON_VERSION" "python$PYTHON_VERSION-venv"
fi
mkdir -p "$AGENT_HOME"
"python$PYTHON_VERSION" -m venv "$AGENT_HOME/venv"
"$AGENT_HOME/venv/bin/pip" install --no-cache-dir "ray[default,client]==$RAY_VERSION"

# 2. Prometheus and Grafana, for an observability node. The services that their packages start are
# stopped: the node's task runs both, with its own configuration.
if [ "$INSTALL_OBSERVABILITY" = 1 ]; then
    apt-get install -y prometheus
    systemctl disable --now prometheus prometheus-node-exporter || true
    install -d -m 0755 /etc/apt/keyrings
    curl -fsSL https://apt.grafana.com/gpg.key -o /etc/apt/keyrings/grafana.asc
    echo "deb [signed-by=/etc/apt/keyrings/grafana.asc] https://apt.grafana.com stable main" \
        >/etc/apt/sources.list.d/grafana.list
    apt-get update
    apt-get install -y grafana
    systemctl disable --now grafana-server || true
fi

# 3. The YellowDog agent, by the vendor's own installer. A failed download ends the script here: it is not
# piped into a shell.
curl -fsSL "$INSTALLER" -o /root/yd-agent-installer.sh
bash /root/yd-agent-installer.sh
if id "$AGENT_USER" >/dev/null 2>&1; then
    chown -R "$AGENT_USER:" "$AGENT_HOME/venv"
fi
