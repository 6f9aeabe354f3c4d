"""Build a Ray cluster, compute on it, grow it, shrink it and shut it down.

Without further ado it runs on the local platform that comes with the package. To run it on YellowDog, set
YD_API_KEY_ID and YD_API_KEY_SECRET and, for what belongs to your account:

    RAYDOG_NAMESPACE            the namespace for the cluster
    RAYDOG_TEMPLATE             a compute requirement template, as its YDID or namespace/name
    RAYDOG_IMAGES_ID            an image, where the template names none
    RAYDOG_SSH_USER, RAYDOG_SSH_KEY   who may log in to the head, and the file of the private key
    RAYDOG_SSH_PORT             if the SSH servers of the nodes are not at port 22
    RAYDOG_SSH_HOST_KEY         the head's public key; without it, known_hosts or the first one counts
    YD_API_URL                  if your account is not at https://api.yellowdog.ai

`raydog local start` prints all of these for a local platform that stays.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

import ray

from yellowdog_ray import LocalPlatform, RayDogCluster, RayDogClusterProxy, SSHAccess
from yellowdog_ray.errors import RayDogError

STARTED = time.monotonic()


@dataclass
class Account:
    """Where the cluster is built, and how its head is reached."""

    url: str
    key_id: str
    key_secret: str
    namespace: str
    template: str
    images_id: str | None
    access: SSHAccess


@contextlib.contextmanager
def account() -> Iterator[Account]:
    """Yield your account on YellowDog if the environment names one, and a local platform otherwise."""
    settings = os.environ
    if settings.get("YD_API_KEY_ID") and settings.get("YD_API_KEY_SECRET"):
        yield Account(
            settings.get("YD_API_URL", "https://api.yellowdog.ai"),
            settings["YD_API_KEY_ID"],
            settings["YD_API_KEY_SECRET"],
            settings["RAYDOG_NAMESPACE"],
            settings["RAYDOG_TEMPLATE"],
            settings.get("RAYDOG_IMAGES_ID"),
            SSHAccess(
                settings.get("RAYDOG_SSH_USER", "yd-agent"),
                settings["RAYDOG_SSH_KEY"],
                port=int(settings.get("RAYDOG_SSH_PORT", "22")),
                host_key=settings.get("RAYDOG_SSH_HOST_KEY"),
            ),
        )
        return
    with LocalPlatform() as platform:
        say(f"local platform at {platform.url}: {platform.describe()}")
        yield Account(
            platform.url,
            platform.key_id,
            platform.secret,
            platform.namespace,
            platform.template_names[0],
            None,
            platform.ssh_access,
        )
    say(f"local platform closed; left on this machine: {', '.join(platform.leftovers()) or 'nothing'}")


def say(text: object) -> None:
    print(f"{time.monotonic() - STARTED:6.1f} s  {text}", flush=True)


@ray.remote
def square(number: int) -> tuple[int, str]:
    time.sleep(0.1)
    return number * number, ray.util.get_node_ip_address()


def addresses() -> str:
    return ", ".join(sorted(node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]))


def main() -> int:
    with account() as here:
        cluster = RayDogCluster(
            yd_application_key_id=here.key_id,
            yd_application_key_secret=here.key_secret,
            yd_platform_api_url=here.url,
            cluster_name=f"raydog-example-{os.getpid()}",
            cluster_namespace=here.namespace,
            head_node_compute_requirement_template_id=here.template,
            head_node_images_id=here.images_id,
            head_node_ray_start_script=None,  # the default script
            cluster_lifetime=timedelta(hours=1),  # YellowDog ends it by then, whatever becomes of this script
            access=here.access,  # so that Ray itself can be asked, and the nodes' output be read
            on_event=say,
            progress=False,
        )

        def add_pool(name: str) -> None:
            cluster.add_worker_pool(
                worker_node_compute_requirement_template_id=here.template,
                worker_node_images_id=here.images_id,
                worker_node_task_script=None,
                worker_pool_node_count=1,
                worker_pool_internal_name=name,
            )

        add_pool("first")
        add_pool("second")
        # The cluster is shut down at the end of this block, whatever happens in it. Should this process be
        # killed, `raydog list` shows its state file, and `raydog shut-down FILE` ends it.
        with cluster:
            cluster.build(head_node_build_timeout=timedelta(minutes=10), until="ray")
            state = cluster.save_state_to_json()

            with cluster.client(logging_level=logging.ERROR):
                cluster.wait_for_workers(timeout=timedelta(minutes=10))
                say(f"Ray's nodes: {addresses()}")
                results = ray.get([square.remote(number) for number in range(20)])
                say(f"squares: {[result for result, _ in results]}")
                say(f"computed on: {', '.join(sorted({address for _, address in results}))}")

                add_pool("third")
                cluster.scale_worker_pool("second", 2)
                cluster.wait_for_workers(timeout=timedelta(minutes=10))
                say(f"with a third pool, and a second node in the second: {addresses()}")
                cluster.remove_worker_pool_by_internal_name("first")
                say(cluster.status())

            # What a teardown script does with a state that was saved, wherever it runs. On this machine it
            # also finds what came later, the third pool, in the cluster's own state file.
            proxy = RayDogClusterProxy(here.key_id, here.key_secret)
            proxy.load_saved_state_from_json(state)
            proxy.shut_down()
            say("the cluster is shut down")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except RayDogError as error:
        sys.exit(f"usage_example.py: {error}")
