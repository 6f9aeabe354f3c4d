"""The saved state: old files load, new ones hold no secret, and what is none is refused."""

from __future__ import annotations

import errno
import json
import os
import stat

import pytest

from yellowdog_ray.errors import ClusterStateError, SpecError, StateError
from yellowdog_ray.raydog.builder import RayDogCluster, RayDogClusterProxy
from yellowdog_ray.raydog.state import ClusterState, PoolState
from yellowdog_ray.raydog.teardown import Targets

# The example of the existing package's documentation.
LEGACY = {
    "cluster_name": "ray-prod-1748357565-702532",
    "cluster_namespace": "my-ray-namespace",
    "cluster_tag": "my-ray-production",
    "work_requirement_id": "ydid:workreq:000000:9d12fec4-faf2-4e8f-a179-80e5d8729276",
    "worker_pool_ids": [
        "ydid:wrkrpool:000000:d66bb53e-b3da-4df4-961c-204a0195e981",
        "ydid:wrkrpool:000000:b957728f-0b5d-49b7-a45d-f97aa450bb5e",
    ],
}


def test_legacy_state_loads():
    """The five keys of the existing package are enough, and keep their meaning."""
    state = ClusterState.from_json(json.dumps(LEGACY))
    assert state.worker_pool_ids == LEGACY["worker_pool_ids"]
    assert state.pools == []
    assert state.api_url is None
    written = json.loads(state.to_json())
    assert {key: written[key] for key in LEGACY} == LEGACY


POOL = {
    "name": "a-00-head",
    "role": "head",
    "group": "head-node",
    "internal_name": "head-node",
    "node_count": 1,
}


def test_legacy_namespace_is_kept_and_not_used():
    """Where nothing has to be looked up by name, any namespace is as good as another."""
    text = json.dumps({**LEGACY, "cluster_namespace": "My.Space/../x"})
    assert ClusterState.from_json(text).cluster_namespace == "My.Space/../x"
    proxy = RayDogClusterProxy("key", "secret")
    proxy.load_saved_state_from_json(text)
    assert Targets.of(proxy._state).namespace is None


def test_legacy_phantom_pool_is_left_out():
    """The existing package can save a pool without an id as null."""
    state = ClusterState.from_json(
        json.dumps({**LEGACY, "worker_pool_ids": [None, *LEGACY["worker_pool_ids"]]})
    )
    assert state.worker_pool_ids == LEGACY["worker_pool_ids"]


def test_round_trip(tmp_path):
    """What is saved is what is loaded, from a file that only its owner can read."""
    pool = PoolState(
        name="a-00-head", role="head", group="head-node", internal_name="head-node", node_count=1
    )
    state = ClusterState(**LEGACY, api_url="https://api.yellowdog.ai", ray_auth="token", pools=[pool])
    path = tmp_path / "state.json"
    path.write_text("something older")
    os.chmod(path, 0o644)
    state.save(path)
    assert ClusterState.load(path) == state
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert json.loads(path.read_text())["format_version"] == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["state.json"]


def test_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    """A file is replaced as a whole or not at all."""
    path = tmp_path / "state.json"
    path.write_text("old")

    def fail(*_args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match=rf"No space left.*{path}"):
        ClusterState(**LEGACY).save(path)
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["state.json"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON"),
        ("not json", "not JSON"),
        ("[]", "JSON object with the keys"),
        ("{}", "work_requirement_id and worker_pool_ids"),
        (json.dumps({**LEGACY, "format_version": 99}), "format 99"),
        (json.dumps({**LEGACY, "format_version": "x"}), "format_version is 'x'"),
        (json.dumps({**LEGACY, "work_requirement_id": "../../keyrings"}), "work_requirement_id"),
        (json.dumps({**LEGACY, "worker_pool_ids": ["ydid:wrkrpool:1/../../x"]}), "worker_pool_ids"),
        (json.dumps({**LEGACY, "worker_pool_ids": "ydid:wrkrpool:1"}), "worker_pool_ids"),
        (json.dumps({**LEGACY, "cluster_namespace": "../x", "pools": [POOL]}), "cluster_namespace"),
        (json.dumps({**LEGACY, "build_id": "../x"}), "build_id"),
        (json.dumps({**LEGACY, "api_url": "http://evil.example"}), "unprotected"),
    ],
)
def test_what_is_no_state_is_refused(text, message):
    """A state that is none, or that would send the key or a call elsewhere, gets a clear error."""
    with pytest.raises(StateError, match=message):
        RayDogClusterProxy("key", "secret").load_saved_state_from_json(text)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("k", None), "yd_application_key_secret"),
        (("k", 31337), "yd_application_key_secret"),
        ((None, "s"), "yd_application_key_id"),
        ((31337, "s"), "yd_application_key_id"),
        (("k", "s", 31337), "yd_platform_api_url"),
    ],
)
def test_proxy_refuses_what_is_no_key(arguments, named):
    """What cannot be an application key is refused in words that do not repeat it."""
    with pytest.raises(SpecError, match=named) as caught:
        RayDogClusterProxy(*arguments)
    assert "31337" not in str(caught.value)


def test_file_errors(tmp_path):
    """A file that is no state is named in the error; one that is not there is a usual OSError."""
    path = tmp_path / "readme.txt"
    path.write_bytes(b"\xff\xfe")
    proxy = RayDogClusterProxy("key", "secret")
    with pytest.raises(StateError, match=r"readme\.txt"):
        proxy.load_saved_state_from_json_file(str(path))
    with pytest.raises(FileNotFoundError):
        proxy.load_saved_state_from_json_file(tmp_path / "nowhere.json")


def test_nothing_to_save_or_shut_down(tmp_path):
    """Before build there is no state, and a proxy without one cannot shut anything down."""
    with pytest.raises(ClusterStateError, match="not built yet"):
        RayDogCluster("key", "secret", "name", "space", "ns/tpl", None).save_state_to_json_file(
            tmp_path / "x"
        )
    assert not (tmp_path / "x").exists()
    with pytest.raises(ClusterStateError, match="no saved state"):
        RayDogClusterProxy("key", "secret").shut_down()


@pytest.mark.parametrize("address", ["head example", "192.0.2.1;id", "fe80::1%$(id)", "-oProxyCommand=x"])
def test_addresses_are_addresses(tmp_path, address):
    """A state whose head has no address is refused: ssh would be told what stands there."""
    head = {"name": "a-00-head", "role": "head", "group": "head-node", "internal_name": "h", "node_count": 1}
    values = {"cluster_name": "aa", "cluster_namespace": "bb", "work_requirement_id": None}
    path = tmp_path / "state.json"
    for public_ip in (None, "", "192.0.2.1", "2001:db8::1", "head.example"):
        pools = [{**head, "public_ip": public_ip}]
        path.write_text(json.dumps({**values, "worker_pool_ids": [], "pools": pools}))
        assert ClusterState.load(path).pools[0].public_ip == public_ip
    path.write_text(json.dumps({**values, "worker_pool_ids": [], "pools": [{**head, "public_ip": address}]}))
    with pytest.raises(StateError, match="public_ip"):
        ClusterState.load(path)
