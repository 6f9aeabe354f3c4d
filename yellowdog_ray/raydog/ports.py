"""The ports of a cluster's services, which the default scripts fix; firewalls and tunnels rely on them."""

from __future__ import annotations

__all__ = [
    "AGENT",
    "AUTOSCALER_METRICS",
    "CLIENT",
    "DASHBOARD",
    "DASHBOARD_METRICS",
    "GCS",
    "GRAFANA",
    "NODE_METRICS",
    "PROMETHEUS",
]

#: Ray's GCS on the head, which the workers join.
GCS = 6379
#: Ray Client's server on the head.
CLIENT = 10001
#: Ray's dashboard and its Jobs API on the head.
DASHBOARD = 8265
#: The dashboard's agent on every Ray node; Ray's default for ``--dashboard-agent-listen-port``.
AGENT = 52365
#: The metrics of every Ray node.
NODE_METRICS = 8080
#: The metrics of the autoscaler, on the head.
AUTOSCALER_METRICS = 44217
#: The metrics of the dashboard, on the head.
DASHBOARD_METRICS = 44227
#: Prometheus on the observability node.
PROMETHEUS = 9090
#: Grafana on the observability node.
GRAFANA = 3000
