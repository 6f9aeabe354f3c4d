"""What a user may ask for is checked before any call, and refused in words for a person."""

from __future__ import annotations

from datetime import timedelta

import pytest

from yellowdog_ray.errors import SpecError
from yellowdog_ray.raydog.access import SSHAccess
from yellowdog_ray.raydog.builder import RayDogCluster, RayDogClusterProxy
from yellowdog_ray.raydog.specs import check_count, check_duration, check_seconds

SECRET = "do-not-show-this-secret"
GOOD = {
    "yd_application_key_id": "key",
    "yd_application_key_secret": SECRET,
    "cluster_name": "my-cluster",
    "cluster_namespace": "my-namespace",
    "head_node_compute_requirement_template_id": "my-namespace/my-template",
    "head_node_ray_start_script": None,
}


def cluster(**changes) -> RayDogCluster:
    return RayDogCluster(**{**GOOD, **changes})


@pytest.mark.parametrize("tag", ["My-Tag", "cost centre: 7", "x", "t" * 200, "Überall"])
def test_any_printable_tag(tag):
    """A tag is limited in its length alone."""
    assert cluster(cluster_tag=tag)._spec.tag == tag


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cluster_name": "My-Cluster"}, "cluster_name: 'My-Cluster' is not a YellowDog name"),
        ({"cluster_name": "9lives"}, "cluster_name"),
        ({"cluster_name": "ends-"}, "cluster_name"),
        ({"cluster_name": "a" * 52}, "has 52 characters; with the suffix '-01-wrkrs'"),
        ({"cluster_name": "with\nnewline"}, "cluster_name"),
        ({"cluster_name": "trailing\n"}, "cluster_name"),
        ({"cluster_name": 7}, "cluster_name"),
        ({"cluster_namespace": ""}, "cluster_namespace"),
        ({"cluster_namespace": "n" * 61}, "cluster_namespace: .* has 61 characters"),
        ({"cluster_tag": "t" * 201}, "cluster_tag: the tag has 201 characters"),
        ({"cluster_tag": " "}, "cluster_tag: a tag has to consist of printable characters"),
        ({"cluster_tag": "a\nb"}, "cluster_tag"),
        ({"cluster_lifetime": timedelta(0)}, "cluster_lifetime: .* not longer than zero"),
        ({"cluster_lifetime": timedelta(seconds=-1)}, "cluster_lifetime"),
        ({"head_node_compute_requirement_template_id": "only-a-name"}, "neither a template's YDID"),
        ({"head_node_compute_requirement_template_id": "a/b/c"}, "neither a template's YDID"),
        (
            {"head_node_compute_requirement_template_id": "ydid:wrkrpool:000000:1"},
            "not the YDID of a compute",
        ),
        ({"head_node_ray_start_script": ""}, "head_node_ray_start_script: the script is empty"),
        ({"head_node_ray_start_script": " \n"}, "head_node_ray_start_script: the script is empty"),
        ({"head_node_ray_start_script": "a\0b"}, "NUL"),
        ({"head_node_ray_start_script": b"ray start"}, "head_node_ray_start_script"),
        ({"head_node_instance_tags": {"Owner": "me"}}, "'Owner' has to be in lower case: 'owner'"),
        ({"head_node_instance_tags": {"owner": 1}}, "head_node_instance_tags.owner"),
        ({"head_node_metrics_enabled": "yes"}, "head_node_metrics_enabled"),
        ({"enable_observability": True}, "observability_node_compute_requirement_template_id"),
        ({"yd_platform_api_url": "http://api.yellowdog.ai"}, "unprotected to api.yellowdog.ai"),
        ({"yd_platform_api_url": "http://127.0.0.1.example.com"}, "unprotected"),
        ({"yd_platform_api_url": "ftp://api.yellowdog.ai"}, "https://"),
        ({"yd_platform_api_url": "api.yellowdog.ai"}, "https://"),
        ({"yd_platform_api_url": "https://user:pw@api.yellowdog.ai"}, "credentials"),
        ({"yd_platform_api_url": "https://api.yellowdog.ai:port"}, "yd_platform_api_url"),
        ({"yd_application_key_id": ""}, "yd_application_key_id"),
        ({"yd_application_key_secret": ""}, "yd_application_key_secret"),
        ({"ray_auth": "maybe"}, "ray_auth"),
    ],
)
def test_bad_cluster(changes, message):
    """Everything that cannot work is refused by the constructor, naming the parameter."""
    with pytest.raises(SpecError, match=message):
        cluster(**changes)


def test_every_problem_is_named():
    """One error names everything of one kind that is wrong."""
    with pytest.raises(SpecError, match=r"(?s)cluster_name.*cluster_namespace"):
        cluster(cluster_name="A", cluster_namespace="B")


def test_observability_leaves_less_room_for_the_name():
    """The longest suffix counts: 46 characters with observability, 51 without."""
    with_node = {
        "enable_observability": True,
        "observability_node_compute_requirement_template_id": "my-namespace/my-template",
    }
    cluster(cluster_name="a" * 51)
    cluster(cluster_name="a" * 46, **with_node)
    with pytest.raises(SpecError, match="at most 46"):
        cluster(cluster_name="a" * 47, **with_node)


@pytest.mark.parametrize(
    "url", ["http://localhost:1", "http://127.0.0.2:1/", "http://[::1]:1", "https://x.y/api"]
)
def test_good_urls(url):
    """Plain http is for loopback addresses, and https for all."""
    cluster(yd_platform_api_url=url)


@pytest.mark.parametrize("secret", [SECRET, 1234567, ""])
def test_secret_is_never_shown(secret):
    """No secret is in a repr, nor in the error about it or about anything else."""
    try:
        shown = repr(cluster(yd_application_key_secret=secret))
        shown += repr(cluster()._credentials) + repr(RayDogClusterProxy("key", SECRET))
    except SpecError as error:
        shown = str(error) + repr(error.__cause__) + repr(error.__context__)
    with pytest.raises(SpecError) as caught:
        cluster(yd_application_key_secret=SECRET, yd_platform_api_url="http://elsewhere")
    shown += str(caught.value)
    assert SECRET not in shown
    assert "1234567" not in shown


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"worker_pool_node_count": 0}, "worker_pool_node_count"),
        ({"worker_pool_node_count": -1}, "worker_pool_node_count"),
        ({"worker_pool_node_count": 10_001}, "worker_pool_node_count"),
        ({"worker_pool_node_count": 2.0}, "worker_pool_node_count"),
        ({"worker_pool_node_count": True}, "worker_pool_node_count"),
        ({"worker_node_task_script": ""}, "worker_node_task_script: the script is empty"),
        ({"worker_pool_internal_name": ""}, "worker_pool_internal_name"),
        ({"worker_node_compute_requirement_template_id": "x"}, "worker_node_compute_requirement_template_id"),
        ({"worker_node_instance_tags": {"X": "y"}}, "lower case"),
    ],
)
def test_bad_worker_pool(changes, message):
    """A worker pool that cannot work is refused, and is not part of the cluster."""
    ours = cluster()
    good = {
        "worker_node_compute_requirement_template_id": "my-namespace/my-template",
        "worker_node_task_script": None,
        "worker_pool_node_count": 1,
    }
    with pytest.raises(SpecError, match=message):
        ours.add_worker_pool(**{**good, **changes})
    assert ours.worker_pool_internal_names == []


def test_internal_names_are_unique():
    """A pool's own name is used once in a cluster; a default one that somebody has given is left out."""
    ours = cluster()
    ours.add_worker_pool("my-namespace/t1", None, 1, "mine")
    with pytest.raises(SpecError, match="already is a worker pool 'mine'"):
        ours.add_worker_pool("my-namespace/t1", None, 1, "mine")
    ours.add_worker_pool("my-namespace/t1", None, 1, "worker-nodes-03")
    ours.add_worker_pool("my-namespace/t1", None, 1)
    assert ours.worker_pool_internal_names == ["mine", "worker-nodes-03", "worker-nodes-04"]


def test_numbers_are_not_reused_and_have_a_limit():
    """A pool's number is its own for ever, has three digits past 99, and there are 1,000 at most."""
    ours = cluster()
    for _ in range(2):
        ours.add_worker_pool("my-namespace/t1", None, 1)
    ours.remove_worker_pool_by_internal_name("worker-nodes-02")
    ours.add_worker_pool("my-namespace/t1", None, 1)
    assert ours.worker_pool_internal_names == ["worker-nodes-01", "worker-nodes-03"]
    for _ in range(996):
        ours.add_worker_pool("my-namespace/t1", None, 1)
    assert ours.worker_pool_internal_names[-1] == "worker-nodes-999"
    with pytest.raises(SpecError, match="1000 task groups"):
        ours.add_worker_pool("my-namespace/t1", None, 1)


def test_long_name_meets_three_digits():
    """A name that fits up to pool 99 is refused for pool 100, before anything is created."""
    ours = cluster(cluster_name="a" * 51)
    for _ in range(99):
        ours.add_worker_pool("my-namespace/t1", None, 1)
    with pytest.raises(SpecError, match="has 61 characters"):
        ours.add_worker_pool("my-namespace/t1", None, 1)


def test_order_of_the_parameters():
    """Scripts in the field pass parameters by position: their order is the interface."""
    import inspect

    assert list(inspect.signature(RayDogCluster).parameters) == [
        "yd_application_key_id",
        "yd_application_key_secret",
        "cluster_name",
        "cluster_namespace",
        "head_node_compute_requirement_template_id",
        "head_node_ray_start_script",
        "yd_platform_api_url",
        "cluster_tag",
        "head_node_images_id",
        "head_node_userdata",
        "head_node_instance_tags",
        "head_node_metrics_enabled",
        "enable_observability",
        "observability_node_compute_requirement_template_id",
        "observability_node_instance_tags",
        "observability_node_images_id",
        "observability_node_userdata",
        "observability_node_metrics_enabled",
        "observability_node_start_script",
        "cluster_lifetime",
        "ray_auth",
        "state_file",
        "access",
        "keep_logs",
        "on_event",
        "progress",
    ]
    assert list(inspect.signature(RayDogCluster.add_worker_pool).parameters)[1:] == [
        "worker_node_compute_requirement_template_id",
        "worker_node_task_script",
        "worker_pool_node_count",
        "worker_pool_internal_name",
        "worker_node_images_id",
        "worker_node_userdata",
        "worker_node_instance_tags",
        "worker_node_metrics_enabled",
    ]


@pytest.mark.parametrize("value", [timedelta(0), timedelta(days=-1), 60, "1m"])
def test_bad_durations(value):
    """A time limit is a timedelta longer than zero."""
    with pytest.raises(SpecError, match="head_node_build_timeout"):
        check_duration(value, "head_node_build_timeout")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 10**400, timedelta.max, 0, None, True])
def test_bad_seconds(value):
    """What Python cannot wait for is refused."""
    with pytest.raises(SpecError, match="timeout"):
        check_seconds(value, "timeout")


@pytest.mark.parametrize("value", [8, 8.5, True, "8", "P1D", timedelta(0)])
def test_bad_lifetimes(value):
    """A lifetime is a timedelta too: 8 would be seconds."""
    with pytest.raises(SpecError, match=r"^cluster_lifetime: "):
        cluster(cluster_lifetime=value)


@pytest.mark.parametrize("value", [7, "", " ", b"x", "a\0b", "."])
def test_bad_state_files(value):
    """What cannot be a file is refused before anything is built."""
    with pytest.raises(SpecError, match=r"^state_file: "):
        cluster(state_file=value)


@pytest.mark.parametrize("value", [5, "", b"x", "a\0b"])
def test_bad_directories_for_logs(value):
    """What cannot be a directory is refused."""
    with pytest.raises(SpecError, match=r"^keep_logs: a path is needed"):
        cluster(keep_logs=value, access=SSHAccess("me"))


@pytest.mark.parametrize("access", [None, "direct"])
def test_logs_cannot_be_kept_without_ssh(access):
    """Nothing would be kept, and nobody would know."""
    with pytest.raises(SpecError, match=r"^keep_logs: .*SSHAccess"):
        cluster(keep_logs="kept", access=access)


@pytest.mark.parametrize("value", [-1, 5, 1.0, True, "2"])
def test_bad_counts(value):
    """A number of workers is a whole number that the cluster can have."""
    with pytest.raises(SpecError, match="count"):
        check_count(value, "count", 4)
