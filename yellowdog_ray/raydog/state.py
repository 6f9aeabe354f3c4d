"""The saved state of a cluster: what another process needs to shut it down, and no secret.

The five keys that files of the existing package hold are always there and keep their meaning:
``cluster_name``, ``cluster_namespace``, ``cluster_tag``, ``work_requirement_id`` and
``worker_pool_ids``, the last with *all* pools, the head's and the observability node's too.
"""

from __future__ import annotations

import json
import os
import re
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from yellowdog_ray.errors import SpecError, StateError
from yellowdog_ray.raydog.specs import MAX_NAME, RayAuth, check_api_url
from yellowdog_ray.utils._files import write_private

__all__ = ["FORMAT_VERSION", "ClusterState", "PoolState"]

FORMAT_VERSION = 1

_LEGACY_KEYS = ("work_requirement_id", "worker_pool_ids")


def _without_none(value: Any) -> Any:
    # The existing package can save a pool that it never got an id for as null.
    return [item for item in value if item is not None] if isinstance(value, list) else value


# Ids become parts of URLs: nothing that is not an id may pass.
WorkRequirementId = Annotated[str, Field(pattern=r"^ydid:workreq:[0-9A-Za-z:-]+$")]
WorkerPoolId = Annotated[str, Field(pattern=r"^ydid:wrkrpool:[0-9A-Za-z:-]+$")]
ComputeRequirementId = Annotated[str, Field(pattern=r"^ydid:compreq:[0-9A-Za-z:-]+$")]
PlatformName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]*[a-z0-9]$", max_length=MAX_NAME)]
# What ssh is told to connect to, and what a ProxyCommand may get. Some platforms give a node none.
Address = Annotated[str, Field(pattern=r"^([0-9A-Za-z:][0-9A-Za-z_.:-]*)?$")]
_NAME = re.compile(r"[a-z][a-z0-9_-]*[a-z0-9]")


def _is_name(value: str | None) -> bool:
    return value is not None and len(value) <= MAX_NAME and _NAME.fullmatch(value) is not None


class PoolState(BaseModel):
    """What is known of one pool.

    :param name: its name on the platform, also that of its compute requirement.
    :param node_count: how many nodes it is to have.
    :param id: its id; None while the platform has not told it. It may exist nevertheless.
    :param template: the compute requirement template of its nodes.
    :param group_id: the id of its task group.
    :param tasks_counted: how many names of tasks have been given away in its group.
    :param node_id: of the head's and the observability node's pool: its node, addresses and task.
    """

    model_config = ConfigDict(frozen=True, extra="ignore", hide_input_in_errors=True)

    name: PlatformName
    role: Literal["head", "observability", "worker"]
    group: PlatformName
    internal_name: str
    node_count: int
    id: WorkerPoolId | None = None
    compute_requirement_id: ComputeRequirementId | None = None
    template: str | None = None
    group_id: str | None = None
    tasks_counted: int = 0
    node_id: str | None = None
    private_ip: Address | None = None
    public_ip: Address | None = None
    task_id: str | None = None


class ClusterState(BaseModel):
    """A cluster, as far as another process has to know it to find and end all of it.

    :param api_url: the API that the cluster lives behind; None in files of the existing package.
    :param ray_auth: whether Ray's token authentication is on. The token itself is not here.
    :param ray_token_file: the file that holds it, on the machine that built the cluster; None for none.
    :param build_id: by which what is found under a name is recognised as this cluster's.
    :param pools: every pool with its name; empty in files of the existing package.
    :param status: how far the cluster is. One that is being built may be there in part.
    :param worker_pools_counted: how many numbers of worker pools have been given away; none is used twice.
    :param created: when its build began, by the clock of the building machine.
    :param lifetime_ends: when the platform ends it; None for never.
    :param failure: why it has ended by itself.
    :param saved: when this was written, for whoever reads the file.
    :param state_file: the file in which the cluster itself keeps its state up to date, on the machine that
        built it.
    :param key_hint: a part of the hash of the application key's id, to tell a wrong key by.
    """

    model_config = ConfigDict(frozen=True, extra="ignore", hide_input_in_errors=True)

    cluster_name: str | None = None
    # A file of the existing package may have any; it is used for look-ups of named pools only.
    cluster_namespace: str | None = None
    cluster_tag: str | None = None
    work_requirement_id: WorkRequirementId | None
    worker_pool_ids: Annotated[list[WorkerPoolId], BeforeValidator(_without_none)]
    format_version: int = FORMAT_VERSION
    api_url: str | None = None
    ray_auth: RayAuth | None = None
    ray_token_file: str | None = None
    build_id: Annotated[str, Field(pattern=r"^[0-9a-f]+$")] | None = None
    pools: list[PoolState] = []
    status: Literal["building", "running", "ending"] = "running"
    worker_pools_counted: int = 0
    created: datetime | None = None
    lifetime_ends: datetime | None = None
    failure: str | None = None
    saved: datetime | None = None
    state_file: str | None = None
    key_hint: str | None = None

    @model_validator(mode="after")
    def _names_can_be_looked_up(self) -> ClusterState:
        if self.pools and not all(_is_name(value) for value in (self.cluster_name, self.cluster_namespace)):
            raise ValueError("cluster_name and cluster_namespace have to be YellowDog names")
        return self

    @property
    def title(self) -> str:
        """What messages call the cluster."""
        if self.cluster_name is None:
            return f"of the work requirement {self.work_requirement_id}"
        return (
            f"{self.cluster_namespace}/{self.cluster_name}" if self.cluster_namespace else self.cluster_name
        )

    def pool(self, name: str) -> PoolState | None:
        """Find a pool by its name on the platform."""
        return next((pool for pool in self.pools if pool.name == name), None)

    def but(self, **values: Any) -> ClusterState:
        """Return the same state with other values."""
        return self.model_copy(update=values)

    def with_pools(self, *pools: PoolState) -> ClusterState:
        """Return the same state with these pools, each in the place of the one of its name."""
        by_name = {pool.name: pool for pool in self.pools}
        by_name.update({pool.name: pool for pool in pools})
        return self._having(list(by_name.values()))

    def without_pools(self, *names: str) -> ClusterState:
        """Return the same state without the pools of these names."""
        return self._having([pool for pool in self.pools if pool.name not in names])

    def _having(self, pools: list[PoolState]) -> ClusterState:
        known = {pool.id for pool in self.pools}
        others = [pool_id for pool_id in self.worker_pool_ids if pool_id not in known]
        return self.but(
            pools=pools, worker_pool_ids=others + [pool.id for pool in pools if pool.id is not None]
        )

    def to_json(self) -> str:
        """Write the state as JSON text."""
        return self.model_dump_json(indent=2)

    @classmethod
    def from_json(cls, text: str | bytes, source: str = "the saved state") -> ClusterState:
        """Read a state from JSON text, of this package or of the existing one.

        :param source: what an error calls the text.
        :raises StateError: where it is not the saved state of a cluster.
        """
        try:
            values = json.loads(text)
        except (TypeError, ValueError, RecursionError) as error:
            raise StateError(f"{source} is not JSON: {error}") from None
        if not isinstance(values, dict) or any(key not in values for key in _LEGACY_KEYS):
            raise StateError(
                f"{source} is not the saved state of a cluster: it has to be a JSON object with the keys "
                f"{' and '.join(_LEGACY_KEYS)}"
            )
        version = values.get("format_version", FORMAT_VERSION)
        if not isinstance(version, int) or isinstance(version, bool) or version < 1:
            raise StateError(
                f"{source} is not the saved state of a cluster: its format_version is {version!r}"
            )
        if version > FORMAT_VERSION:
            raise StateError(
                f"{source} has format {version}, and this version of yellowdog-ray reads formats up to "
                f"{FORMAT_VERSION}; use the version that wrote it, or a newer one"
            )
        try:
            state = cls(**values)
        except ValidationError as error:
            problems = "; ".join(
                f"{'.'.join(str(part) for part in problem['loc'])}: {problem['msg']}"
                for problem in error.errors(include_input=False, include_url=False)
            )
            raise StateError(f"{source} cannot be used: {problems}") from None
        if state.api_url is not None:
            try:
                check_api_url(state.api_url)
            except SpecError as error:
                raise StateError(f"{source} cannot be used: {error}") from None
        return state

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the state to a file: whole or not at all, and readable by its owner alone (mode 0600).

        :raises OSError: where the file cannot be written.
        """
        write_private(Path(path), self.to_json() + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ClusterState:
        """Read a state file.

        :raises StateError: where it is not the saved state of a cluster.
        :raises OSError: where it cannot be read.
        """
        return cls.from_json(Path(path).read_bytes(), source=f"the file {os.fspath(path)}")
