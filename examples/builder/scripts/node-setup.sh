#!/bin/bash
# User data (cloud-init) that makes an Ubuntu 22.04 machine a node of a RayDog cluster.
#
# UNTESTED: it needs a machine of a cloud provider and a YellowDog account to run.
#
# The order matters. The agent takes tasks as soon as it runs, so that it comes last: a node that was
# registered before Ray was installed would be given a task that fails.
#
# Pinned are Ray, Python's minor version and Grafana. What Ray itself needs (unless PIP_CONSTRAINT names a file or
# URL with its versions), Prometheus and the agent are those of the day: see below. Where all nodes have to be the
# same, make an image with this script once, and use that.
#
# Set these to what the cluster's clients use: Ray insists on the same versions everywhere.
PYTHON_VERSION="${PYTHON_VERSION:-3.11}"
RAY_VERSION="${RAY_VERSION:-2.60.0}"
# Set to 1 for an observability node.
INSTALL_OBSERVABILITY="${INSTALL_OBSERVABILITY:-0}"
# Any from 8 on should show Ray's dashboards; this one was in Grafana's repository in September 2026.
GRAFANA_VERSION="${GRAFANA_VERSION:-13.2.2}"
# The version of Ubuntu's package ("apt-cache madison prometheus" tells it); empty for the one that there is. None is
# set here, for Ubuntu removes a version when it mends it, and a node that asks for it then would fail.
PROMETHEUS_VERSION="${PROMETHEUS_VERSION:-}"
# The key by which Grafana's repository is signed, and with it the checksum of every package in it.
GRAFANA_KEY=B53AE77BADB630A683046005963FA27710458545
# The agent's installer, which runs as root: a commit of YellowDog's repository, and the file's SHA-256, without which
# it is not checked. By default it is the newest one, over HTTPS, as YellowDog tells its users to install it. The
# agent that it installs is the one that YellowDog offers on that day.
AGENT_INSTALLER_COMMIT="${AGENT_INSTALLER_COMMIT:-main}"
AGENT_INSTALLER_SHA256="${AGENT_INSTALLER_SHA256:-}"

set -euo pipefail
export DEBIAN_FRONTEND=noninteractive

AGENT_USER=yd-agent
AGENT_HOME=/opt/yellowdog/agent
INSTALLER="https://raw.githubusercontent.com/yellowdog/resources/$AGENT_INSTALLER_COMMIT/agent-install/linux/yd-agent-installer.sh"

apt-get update
apt-get install -y curl ca-certificates gnupg software-properties-common

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

# 2. Prometheus (from Ubuntu, which signs it) and Grafana, for an observability node, which needs the Ray from
# above too: Grafana's dashboards come from it. The services that the packages start are stopped: the node's
# task runs both, with its own configuration.
if [ "$INSTALL_OBSERVABILITY" = 1 ]; then
    apt-get install -y "prometheus${PROMETHEUS_VERSION:+=$PROMETHEUS_VERSION}"
    systemctl disable --now prometheus prometheus-node-exporter || true
    # Of the keys there, the one that is known, and no other one.
    keys=$(mktemp -d)
    curl -fsSL https://apt.grafana.com/gpg.key -o "$keys/all.asc"
    gpg --homedir "$keys" --quiet --batch --import "$keys/all.asc"
    gpg --homedir "$keys" --quiet --batch --export "$GRAFANA_KEY" >"$keys/grafana.gpg"
    if [ -s "$keys/grafana.gpg" ]; then
        install -D -m 0644 "$keys/grafana.gpg" /etc/apt/keyrings/grafana.gpg
        echo "deb [signed-by=/etc/apt/keyrings/grafana.gpg] https://apt.grafana.com stable main" \
            >/etc/apt/sources.list.d/grafana.list
        apt-get update
        apt-get install -y "grafana=$GRAFANA_VERSION"
        systemctl disable --now grafana-server || true
    else
        echo "The key of Grafana's repository is not $GRAFANA_KEY any more: Grafana is not installed" >&2
    fi
fi

# 3. The YellowDog agent, by the vendor's own installer. A failed download ends the script here: it is not
# piped into a shell.
curl -fsSL "$INSTALLER" -o /root/yd-agent-installer.sh
if [ -n "$AGENT_INSTALLER_SHA256" ]; then
    echo "$AGENT_INSTALLER_SHA256  /root/yd-agent-installer.sh" | sha256sum --check --quiet
fi
bash /root/yd-agent-installer.sh
if id "$AGENT_USER" >/dev/null 2>&1; then
    chown -R "$AGENT_USER:" "$AGENT_HOME/venv"
fi
