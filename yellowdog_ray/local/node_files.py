"""What a node is made of: its directories, keys and files of its own in ``/etc``, and its environment."""

from __future__ import annotations

import os
import pwd
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

from yellowdog_ray.local.belonging import NODE_FILES
from yellowdog_ray.local.events import StartNode
from yellowdog_ray.local.isolation import Isolation
from yellowdog_ray.local.node_ssh import SSHIdentity, sshd_config
from yellowdog_ray.local.process_node import (
    import_path,
    mirror_environment,
    program_directories,
    write_plain_environment,
)
from yellowdog_ray.local.supervisor import AGENT_HOME

__all__ = ["PATH", "User", "environment_below_tmp", "node_environment", "this_user", "write_node_files"]

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
"""Where programs are looked for, by the supervisor and in nodes."""


class User(NamedTuple):
    """Whom the tasks of a node run as: a name and the number of a group."""

    name: str
    group: int


def this_user() -> User:
    """Return the name and the group of this user, who may have no entry, as in some containers."""
    try:
        entry = pwd.getpwuid(os.geteuid())
    except KeyError:
        return User(f"uid{os.geteuid()}", os.getegid())
    return User(entry.pw_name, entry.pw_gid)


def write_node_files(
    root: Path, isolation: Isolation, hostname: str, private_ip: str, user: User, ssh: SSHIdentity
) -> None:
    """Write the files of a node that is to be started.

    :param root: the node's directory, which is not there yet.
    :param isolation: the kind of node.
    :param hostname: its host name.
    :param private_ip: its address among the nodes.
    :param user: whom its tasks run as.
    :param ssh: the keys of the platform.
    :raises OSError: when something cannot be written.
    """
    home = root / "agent"
    for directory in (home / "ssh", root / "data", root / "tmp", root / "etc"):
        directory.mkdir(parents=True, mode=0o700)
    (root / "tmp").chmod(0o1777)
    namespaced = isolation is not Isolation.PROCESSES
    seen_home = AGENT_HOME if namespaced else str(home)
    if namespaced:
        _link_environment(home / "venv")
        _write_host_files(root / "etc", isolation, hostname, private_ip, user)
    else:
        write_plain_environment(home / "venv", private_ip, root / "tmp")
    shutil.copyfile(ssh.host_key_file, home / "ssh" / "host_key")
    (home / "ssh" / "host_key").chmod(0o600)
    (home / "ssh" / "authorized_keys").write_text(ssh.public_key + "\n")
    users = f"{user.name} yd-agent" if namespaced else user.name
    (home / "ssh" / "sshd_config").write_text(sshd_config(seen_home, users))


def _write_host_files(etc: Path, isolation: Isolation, hostname: str, private_ip: str, user: User) -> None:
    # Ray finds its node's address by the host's name where no route leads out of the node.
    (etc / "hosts").write_text(f"127.0.0.1 localhost\n::1 localhost\n{private_ip} {hostname}\n")
    (etc / "hostname").write_text(f"{hostname}\n")
    # No name server can be reached from a node; asking one would only cost time.
    (etc / "resolv.conf").write_text("# The nodes of a local platform have no name server.\n")
    # The user's home in a node is the agent's. Scripts in the field log in as yd-agent: the same user.
    uid = os.geteuid()
    users = [(name, uid, user.group, AGENT_HOME, "/bin/bash") for name in (user.name, "yd-agent")]
    for entry in pwd.getpwall():
        if entry.pw_uid != uid and entry.pw_name != "yd-agent":
            users.append((entry.pw_name, entry.pw_uid, entry.pw_gid, entry.pw_dir, entry.pw_shell))
    lines = [f"{name}:x:{number}:{group}::{home}:{shell}\n" for name, number, group, home, shell in users]
    (etc / "passwd").write_text("".join(lines))
    # sshd lets nobody in whose password is locked, as root's often is; here nobody has one.
    (etc / "shadow").write_text("".join(f"{entry[0]}:*:19000:0:99999:7:::\n" for entry in users))
    if isolation is Isolation.USER_NAMESPACES:
        (etc / "group").write_text(f"{user.name}:x:{user.group}:\n")
    for file in etc.iterdir():
        file.chmod(0o600 if file.name == "shadow" else 0o644)


def node_environment(root: Path, request: StartNode, user: User, vcpus: int, memory: int) -> dict[str, str]:
    """Return the environment variables of all that runs in a node.

    :param root: the node's directory.
    :param request: what was asked for.
    :param user: whom its tasks run as.
    :param vcpus: the CPUs that Ray is told.
    :param memory: the bytes of memory that Ray is told.
    """
    return {
        "PATH": PATH,
        "LANG": "C.UTF-8",
        "SHELL": "/bin/bash",
        "USER": user.name,
        "LOGNAME": user.name,
        "YD_PROVIDER": request.provider,
        "YD_REGION": request.region,
        "YD_INSTANCE_TYPE": request.instance_type,
        "YD_INSTANCE_ID": request.instance_id,
        "RAYDOG_NODE_VCPUS": str(vcpus),
        "RAYDOG_NODE_MEMORY": str(memory),
        # Known by this, whatever becomes of their parents.
        NODE_FILES: str(root),
        **{name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ},
    }


def _link_environment(place: Path) -> None:
    """Show the Python environment that the platform was started from as the agent's ``venv``."""
    if Path(sys.prefix, "bin", "activate").exists():
        place.symlink_to(sys.prefix)
    else:
        mirror_environment(place)


def environment_below_tmp() -> list[str]:
    """List the directories of this Python environment that a node's own ``/tmp`` would hide."""
    places = (sys.prefix, sys.base_prefix, *import_path(), *(str(path) for path in program_directories()))
    wanted = {os.path.realpath(path) for path in places}
    below = sorted(path for path in wanted if path.startswith("/tmp/") and os.path.isdir(path))  # noqa: S108
    return [path for path in below if not any(path.startswith(f"{other}/") for other in below)]
