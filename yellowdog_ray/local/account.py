"""What a client needs to use a local platform that stays, and what it can ask of it."""

from __future__ import annotations

import json
import shlex
import urllib.request
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from yellowdog_ray.errors import LocalPlatformError
from yellowdog_ray.local.webpage.access import web_link

if TYPE_CHECKING:
    from yellowdog_ray.raydog.access import SSHAccess

__all__ = ["ANSWER_SECONDS", "LocalAccount"]

ANSWER_SECONDS = 10.0
"""For how long a platform is waited for that runs."""


@dataclass(frozen=True)
class LocalAccount:
    """What a client needs to use a local platform that stays, under the same names as of `LocalPlatform`.

    :param name: the platform's name.
    :param url: the base URL of its API.
    :param key_id: the id of the application key that it accepts.
    :param secret: the secret of that key. Both are new when the platform is started again, unless it was
        told to keep them.
    :param namespace: a namespace to use.
    :param template_names: its compute requirement templates, the default one first.
    :param ssh_user: the user name for SSH to a node.
    :param ssh_private_key_file: the path of the private key (0600) that opens every node.
    :param ssh_port: the port of SSH at a node's public address.
    :param ssh_host_key: the public key by which every node is known.
    :param isolation: what its nodes are made of.
    :param description: the same as a sentence.
    :param control_url: the base URL of its control port (see :mod:`yellowdog_ray.local.control_port`).
    :param control_token: the token of that port, which is new when the key or the port is.
    :param pid: its process.
    :param started: when it was started, in seconds since 1970.
    :param directory: where the files of its nodes are.
    :param interface: this machine's network interface to its nodes; empty where there is none.
    """

    name: str
    url: str
    key_id: str
    secret: str = field(repr=False)
    namespace: str
    template_names: list[str]
    ssh_user: str
    ssh_private_key_file: str
    ssh_port: int
    ssh_host_key: str
    isolation: str
    description: str
    control_url: str
    control_token: str = field(repr=False)
    pid: int
    started: float
    directory: str
    interface: str

    @property
    def ssh_access(self) -> SSHAccess:
        """How to log in to the nodes: what a cluster takes as its ``access``."""
        from yellowdog_ray.raydog.access import SSHAccess

        return SSHAccess(
            self.ssh_user, self.ssh_private_key_file, port=self.ssh_port, host_key=self.ssh_host_key
        )

    @property
    def web_url(self) -> str:
        """A link to the platform's web page, for a browser: it works once, and within ten minutes."""
        return web_link(self.url, self.secret)

    @property
    def variables(self) -> dict[str, str]:
        """The environment variables for a shell: YellowDog's own, the example's, and the control port's."""
        return {
            "YD_API_URL": self.url,
            "YD_API_KEY_ID": self.key_id,
            "YD_API_KEY_SECRET": self.secret,
            "RAYDOG_NAMESPACE": self.namespace,
            "RAYDOG_TEMPLATE": self.template_names[0],
            "RAYDOG_SSH_USER": self.ssh_user,
            "RAYDOG_SSH_KEY": self.ssh_private_key_file,
            "RAYDOG_SSH_PORT": str(self.ssh_port),
            "RAYDOG_SSH_HOST_KEY": self.ssh_host_key,
            "RAYDOG_CONTROL_URL": self.control_url,
            "RAYDOG_CONTROL_TOKEN": self.control_token,
        }

    @property
    def exports(self) -> str:
        """The same as lines that a POSIX shell evaluates."""
        return "\n".join(f"export {name}={shlex.quote(value)}" for name, value in self.variables.items())

    def counts(self) -> dict[str, dict[str, int]]:
        """Ask the platform how many worker pools, nodes and work requirements it knows, by their status.

        :raises LocalPlatformError: when it does not answer.
        """
        return {
            "worker_pools": self._count("/workerPools?sliced=true"),
            "nodes": self._count("/workerPools/nodes?sliced=true"),
            "work_requirements": self._count("/work/requirements?sliced=true"),
        }

    def _count(self, path: str) -> dict[str, int]:
        counts: Counter[str] = Counter()
        place: str | None = "0"
        while place is not None:
            answer = self.ask(f"{path}&sliceId={place}")
            counts.update(str(item["status"]) for item in answer["items"])
            place = answer.get("nextSliceId")
        return dict(counts)

    def ask(self, path: str) -> Any:
        """Return what the API answers to a GET.

        :raises LocalPlatformError: when it does not, within 10 s.
        """
        request = urllib.request.Request(  # noqa: S310 - the URL is http://127.0.0.1
            self.url + path, headers={"Authorization": f"yd-key {self.key_id}:{self.secret}"}
        )
        # Never through a proxy that the environment may name.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=ANSWER_SECONDS) as answer:
                return json.load(answer)
        except (OSError, ValueError) as error:
            raise LocalPlatformError(
                f"the local platform {self.name!r} (process {self.pid}) gives no answer at "
                f"{self.url}: {error}"
            ) from error
