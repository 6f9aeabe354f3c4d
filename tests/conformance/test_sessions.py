"""Tunnels and sessions of a cluster, as far as they need no node."""

from __future__ import annotations

import pytest

from tests.clusters import SHORT, make
from tests.controlplane import TEMPLATE
from yellowdog_ray.errors import ClusterStateError, SpecError
from yellowdog_ray.raydog.reach import SSHAccess

pytestmark = pytest.mark.usefixtures("hurried")


def test_tunnels_are_made_of_what_the_cluster_knows(platform):
    """Grafana and Prometheus are forwarded where there are such, and the access decides how."""
    access = SSHAccess("ray", "key", port=2222, host_key="SHA256:" + "A" * 43, jump="bastion")
    cluster = make(
        platform,
        enable_observability=True,
        observability_node_compute_requirement_template_id=TEMPLATE.id,
        access=access,
    )
    with pytest.raises(ClusterStateError, match="there is no head to make tunnels to"):
        cluster.tunnels()
    with cluster:
        cluster.build(SHORT)
        tunnels = cluster.tunnels()
        assert tunnels.ports == {port: port for port in (10001, 8265, 3000, 9090)}
        assert tunnels.grafana_url == "http://127.0.0.1:3000"
        assert {one.remote_host for one in tunnels._forwards[2:]} == {cluster.observability_node_private_ip}
        assert f"ray@{cluster.head_node_public_ip or cluster.head_node_private_ip}:2222" in repr(tunnels)
        assert tunnels._login.jump == "bastion"
        assert str(tunnels._login.record).endswith(".json.known_hosts")
        assert list(cluster.tunnels(local_port=20000).ports.values()) == [20000, 20001, 20002, 20003]
        with pytest.raises(SpecError, match="whole keys"):
            cluster.tunnels(engine="openssh")


def test_sessions_need_a_way(platform):
    """Without an access, or with one that is no SSH, it is said what is missing."""
    with make(platform) as cluster:
        cluster.build(SHORT)
        for session in (cluster.client, cluster.jobs):
            with pytest.raises(ClusterStateError, match="needs a way to the head"), session():
                pass
    with make(platform, "other", access="direct") as cluster:
        for session in (cluster.client, cluster.jobs):
            with pytest.raises(ClusterStateError, match="there is no head to connect to"), session():
                pass
        cluster.build(SHORT)
        with pytest.raises(ClusterStateError, match="tunnels need SSH"):
            cluster.tunnels()
