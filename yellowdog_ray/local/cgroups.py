"""Limits on the memory and the CPUs of a node's processes, by control groups where this user may make some.

A node has a group for each of the two (with version 2 it is the same one), beside or below the group that
the platform itself is in, so that whatever limits the platform limits its nodes too. The agent stays outside:
what runs out of memory is a task, never the node. Groups are named after the platform's directory, and where
they are is written there, so that whoever removes the directory can remove them first.

Facts: cgroups(7); the kernel's admin-guide/cgroup-v2.rst, cgroup-v1/memory.rst and scheduler/sched-bwc.rst.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import time
from dataclasses import asdict, dataclass
from pathlib import Path

__all__ = ["Groups", "NodeGroup", "find", "remove_all"]

_RECORD = "cgroups.json"
_PERIOD = 100_000
_PATIENCE = 2.0


@dataclass(frozen=True)
class NodeGroup:
    """The control groups of one node.

    :param memory: the directory of the group that limits memory; None where nothing does.
    :param cpu: the same for CPUs.
    :param memory_mount: where the file system with the first of them is mounted.
    :param cpu_mount: the same for the second.
    """

    memory: str | None
    cpu: str | None
    memory_mount: str | None
    cpu_mount: str | None

    @property
    def mounts(self) -> dict[str, str]:
        """What a container would see of them: for each place the group that is to be shown there."""
        pairs = ((self.memory_mount, self.memory), (self.cpu_mount, self.cpu))
        return {mount: group for mount, group in pairs if mount and group}

    def inside(self) -> NodeGroup:
        """Return the same as it is seen where each group is shown in place of its file system."""
        return NodeGroup(
            self.memory and self.memory_mount, self.cpu and self.cpu_mount, self.memory_mount, self.cpu_mount
        )

    @property
    def places(self) -> list[str]:
        """The directories of those that there are, each once."""
        return [group for group in dict.fromkeys((self.memory, self.cpu)) if group]

    @property
    def doors(self) -> list[str]:
        """The files that take the process in which writes a 0 to them."""
        return [f"{group}/cgroup.procs" for group in self.places]

    def killed(self) -> int:
        """Return how many processes the kernel has killed so far because the memory was used up."""
        for name in ("memory.events", "memory.oom_control"):
            with contextlib.suppress(OSError, ValueError, IndexError):
                for line in Path(self.memory or "", name).read_text().splitlines():
                    if line.startswith("oom_kill "):
                        return int(line.split()[1])
        return 0


@dataclass(frozen=True)
class Groups:
    """Where the control groups of a platform's nodes are made.

    :param name: what their names begin with.
    :param memory: the group below which those for memory are made; None where that cannot be.
    :param cpu: the same for CPUs.
    :param memory_mount: where the file system with the first of them is mounted.
    :param cpu_mount: the same for the second.
    :param reason: why one of them, or both, cannot be made; empty where they can.
    """

    name: str
    memory: str | None
    cpu: str | None
    memory_mount: str | None
    cpu_mount: str | None
    reason: str

    def sentence(self) -> str:
        """Say it to the user."""
        limited = [word for word, place in (("memory", self.memory), ("CPUs", self.cpu)) if place]
        if len(limited) == 2:
            return "a node's CPUs and memory are limits (control groups)"
        if limited:
            other = "CPUs are" if self.memory else "memory is"
            verb = "is a limit" if self.memory else "are limits"
            return (
                f"a node's {limited[0]} {verb} (control groups); its {other} told to Ray, not enforced "
                f"({self.reason})"
            )
        return f"a node's CPUs and memory are told to Ray, not enforced ({self.reason})"

    def record(self, directory: Path) -> None:
        """Write down where they are, before there are any."""
        (directory / _RECORD).write_text(json.dumps(asdict(self)))

    def node(self, node_id: str) -> NodeGroup:
        """Return the groups of a node, whether or not they are there."""
        paths = [place and f"{place}/{self.name}.{node_id}" for place in (self.memory, self.cpu)]
        return NodeGroup(paths[0], paths[1], self.memory_mount, self.cpu_mount)

    def make(self, node_id: str, memory: int, vcpus: float) -> NodeGroup:
        """Make the groups of a node.

        :param memory: its limit in bytes.
        :param vcpus: its limit in CPUs.
        :raises OSError: when they cannot be made.
        """
        group = self.node(node_id)
        for path in group.places:
            os.makedirs(path, exist_ok=True)
        quota = max(1000, int(vcpus * _PERIOD))
        if group.memory:
            _set_first(group.memory, {"memory.max": memory, "memory.limit_in_bytes": memory})
            with contextlib.suppress(OSError):
                # No swapping: it would only put the end off. Not every kernel counts it.
                _set_first(group.memory, {"memory.swap.max": 0, "memory.memsw.limit_in_bytes": memory})
        if group.cpu:
            _set_first(group.cpu, {"cpu.max": f"{quota} {_PERIOD}", "cpu.cfs_quota_us": quota})
        return group

    def remove(self, node_id: str) -> None:
        """Remove the groups of a node whose processes are ending; what stays goes with the platform."""
        for path in self.node(node_id).places:
            _remove(path, 0.2)

    def left(self) -> list[str]:
        """List the groups that there are."""
        places = dict.fromkeys(place for place in (self.memory, self.cpu) if place)
        return [
            entry.path
            for place in places
            if os.path.isdir(place)
            for entry in os.scandir(place)
            if entry.is_dir() and entry.name.startswith(f"{self.name}.")
        ]

    def remove_left(self) -> None:
        """Remove every group that there is."""
        for path in self.left():
            _remove(path, _PATIENCE)


def remove_all(directory: Path) -> None:
    """Remove the groups of the platform that has or had a directory, once its processes have ended."""
    try:
        groups = Groups(**json.loads((directory / _RECORD).read_bytes()))
    except (OSError, ValueError, TypeError):
        return
    groups.remove_left()


def find(name: str) -> Groups:
    """Find out where this process may make control groups, by making some.

    :param name: what their names are to begin with.
    """
    found: dict[str, tuple[str, str]] = {}
    reasons: dict[str, None] = {}
    for controller in ("memory", "cpu"):
        try:
            found[controller] = _find(controller, name)
        except OSError as error:
            where = f" at {error.filename}" if error.filename else ""
            reasons[f"no control group for {controller}: {error.strerror or error}{where}"] = None
    memory, cpu = found.get("memory", (None, None)), found.get("cpu", (None, None))
    return Groups(name, memory[0], cpu[0], memory[1], cpu[1], "; ".join(reasons))


def _find(controller: str, name: str) -> tuple[str, str]:
    """Return the group below which others can be made, and the mount point that it is below."""
    hierarchy, own = _own_group(controller)
    mount, root = _mount_of(hierarchy)
    if root != "/":
        own = own.removeprefix(root)
    place = os.path.normpath(f"{mount}/{own.lstrip('/')}")
    if hierarchy != "":
        return _try(controller, name, place), mount
    # Version 2: a group with processes of its own has no groups with limits below it, but for the root.
    if place == mount and os.geteuid() == 0 and not os.path.exists(f"{place}/cgroup.type"):
        with contextlib.suppress(OSError):
            Path(place, "cgroup.subtree_control").write_text(f"+{controller}")
    try:
        return _try(controller, name, place), mount
    except OSError:
        # The group beside this one is as good, if this one's own limits are not left with it.
        if place == mount or any(_limited(f"{place}/{file}") for file in ("memory.max", "cpu.max")):
            raise
        return _try(controller, name, os.path.dirname(place)), mount


def _limited(file: str) -> bool:
    try:
        return not Path(file).read_text().startswith("max")
    except OSError:
        return False


def _try(controller: str, name: str, place: str) -> str:
    """Make a group, have a process enter it, and remove it again.

    :raises OSError: when that cannot be.
    """
    memory, cpu = (place, None) if controller == "memory" else (None, place)
    groups = Groups(name, memory, cpu, None, None, "")
    try:
        group = groups.make("try", 1 << 30, 1)
        _enter_and_leave(group.doors[0])
    finally:
        for path in groups.left():
            _remove(path, _PATIENCE)
    return place


def _enter_and_leave(door: str) -> None:
    """Have a process enter a group and end.

    :raises OSError: when it cannot.
    """
    result = subprocess.run(
        ["/bin/sh", "-c", 'echo 0 > "$1"', "sh", door], capture_output=True, text=True, check=False
    )
    if result.returncode != 0:
        raise OSError(0, result.stderr.rpartition(": ")[2].strip() or "no process may enter it", door)


def enter(doors: list[str]) -> None:
    """Move this process, and what it will start, into groups.

    :raises OSError: when it may not.
    """
    for door in doors:
        fd = os.open(door, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, b"0")
        finally:
            os.close(fd)


def _own_group(controller: str) -> tuple[str, str]:
    """Return the hierarchy that has a controller ("" is version 2) and this process's group in it."""
    unified = None
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        number, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            return controllers, path
        if number == "0":
            unified = path
    if unified is None:
        raise OSError("this machine has no control groups for it")
    return "", unified


def _mount_of(hierarchy: str) -> tuple[str, str]:
    """Return where a hierarchy is mounted, and which group of it is seen there."""
    for line in Path("/proc/self/mountinfo").read_text(errors="replace").splitlines():
        before, _, after = line.partition(" - ")
        kind, _, options = after.split(" ", 2)
        root, place = before.split(" ")[3:5]
        wanted = kind == "cgroup2" if hierarchy == "" else kind == "cgroup"
        if wanted and set(hierarchy.split(",")) - {""} <= set(options.split(",")):
            return place, root
    raise OSError("control groups are not mounted")


def _set_first(group: str, values: dict[str, object]) -> None:
    """Write the value of the first file that there is."""
    for name, value in values.items():
        file = Path(group, name)
        if file.exists():
            file.write_text(str(value))
            return
    raise OSError(0, f"{' or '.join(values)} is missing", group)


def _remove(group: str, patience: float) -> None:
    deadline = time.monotonic() + patience
    while True:
        try:
            os.rmdir(group)
            return
        except FileNotFoundError:
            return
        except OSError:
            # Processes that were killed are in it until they are gone.
            if time.monotonic() > deadline:
                return
        time.sleep(0.02)
