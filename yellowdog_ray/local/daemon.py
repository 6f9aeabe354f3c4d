"""A local platform that stays: one process for each user and name, which no shell or notebook owns.

Its files are in a directory that only this user may read: ``platform.json`` (what a client needs, the
application key's secret among it, as ``~/.aws/credentials`` holds one), the nodes' SSH keys, its history and
its log. A lock on ``lock`` says that it runs, and the kernel says who holds it: whatever else is written
down, a process that was killed holds nothing.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import secrets
import select
import shlex
import signal
import struct
import subprocess
import sys
import time
import urllib.request
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from platformdirs import user_state_path

from yellowdog_ray.errors import LocalPlatformError, RayDogError, SpecError
from yellowdog_ray.local.history import forget
from yellowdog_ray.local.linux import processes_with, write_private
from yellowdog_ray.local.platform import (
    HISTORY,
    Kept,
    LocalPlatform,
    NodeTemplate,
    bind_loopback,
    forget_clusters,
    remove_leftovers,
    require_linux,
)
from yellowdog_ray.local.process_node import import_path
from yellowdog_ray.local.records import from_plain
from yellowdog_ray.local.supervisor import NODE_FILES
from yellowdog_ray.local.webpage.access import web_link

if TYPE_CHECKING:
    from yellowdog_ray.raydog.reach import SSHAccess

__all__ = ["Home", "LocalAccount", "Options", "connect", "serve", "start", "stop", "tidy"]

_log = logging.getLogger(__name__)

_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,39}")
_URL = re.compile(r"http://127\.0\.0\.1:[1-9][0-9]{0,4}")
_VERSION = 1
# What need not be in a file, and what it is then.
_ABSENT: Mapping[str, Any] = {
    "control_url": "",
    "control_token": "",
    "description": "",
    "ending": False,
    "interface": "",
    "templates": {},
}
_START_SECONDS = 90.0
_STOP_SECONDS = 60.0
_CLEAN_SECONDS = 15.0
_ANSWER_SECONDS = 10.0
_LOG_BYTES = 1_000_000
# How often the platform looks whether it can still make nodes, in seconds.
_LOOK = 2.0


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
    :param control_token: the token of that port, which is new when the key is.
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
        from yellowdog_ray.raydog.reach import SSHAccess

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
            with opener.open(request, timeout=_ANSWER_SECONDS) as answer:
                return json.load(answer)
        except (OSError, ValueError) as error:
            raise LocalPlatformError(
                f"the local platform {self.name!r} (process {self.pid}) gives no answer at "
                f"{self.url}: {error}"
            ) from error


@dataclass(frozen=True)
class Options:
    """How a platform is to be started.

    :param port: the TCP port of its API; None for the one that it had before, or a free one.
    :param isolation: the kind of node; None for the best that works here.
    :param keep_key: whether it goes on with the application key and the control port's token that it had
        before. Another user of the machine who takes its port while it is stopped can come by such a key.
    :param forget: whether it begins with an empty history.
    :param templates: the sizes of its nodes, by ``namespace/name``; None for those that it had before, or the
        default.
    :raises SpecError: when one of them cannot work.
    """

    port: int | None = None
    isolation: str | None = None
    keep_key: bool = False
    forget: bool = False
    templates: Mapping[str, NodeTemplate] | None = None

    def __post_init__(self) -> None:
        # It refuses what cannot work, and does nothing yet.
        LocalPlatform(port=self.port, isolation=self.isolation, templates=self.templates)


class Home:
    """The directory of one platform that stays.

    :param name: the platform's name.
    :raises SpecError: when it cannot be one.
    """

    def __init__(self, name: str = "default") -> None:
        if not _NAME.fullmatch(name):
            raise SpecError(
                f"not a name for a local platform: {name!r}; at most 40 of a-z, 0-9, - and _, with a letter "
                "or digit first"
            )
        self.name = name
        configured = os.environ.get("RAYDOG_LOCAL_DIR")
        base = Path(configured).expanduser() if configured else None
        self.directory = (base or user_state_path("raydog", appauthor=False) / "local").absolute() / name

    @property
    def file(self) -> Path:
        """The file with what a client needs."""
        return self.directory / "platform.json"

    @property
    def log(self) -> Path:
        """The file with what the platform says."""
        return self.directory / "platform.log"

    def make(self) -> None:
        """Make the directory, or see that nobody else may look into it.

        :raises LocalPlatformError: when that cannot be.
        """
        try:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.check()
            self.directory.chmod(0o700)
        except OSError as error:
            raise LocalPlatformError(
                f"the local platform cannot keep its files in {self.directory}: {error.strerror or error}. "
                "Set RAYDOG_LOCAL_DIR to a directory that you may write to"
            ) from error

    def check(self) -> None:
        """See that what is in the directory is by this user.

        :raises LocalPlatformError: when it may not be.
        """
        if self.directory.is_symlink() or self.directory.stat().st_uid != os.geteuid():
            raise LocalPlatformError(f"{self.directory} is not a directory of this user's own")

    # Who runs

    def holder(self) -> int | None:
        """Ask the kernel which process is the platform; None where none is. Not for that process itself."""
        import fcntl

        try:
            fd = os.open(self.directory / "lock", os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            question = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
            kind, _, _, _, pid = struct.unpack("hhqqi4x", fcntl.fcntl(fd, fcntl.F_GETLK, question))
        finally:
            os.close(fd)
        return None if kind == fcntl.F_UNLCK else int(pid)

    @contextlib.contextmanager
    def lock(self) -> Iterator[int | None]:
        """Be the platform meanwhile, and give the lock's descriptor; None where another process is it."""
        import fcntl

        # Not flock(2): this lock is no child's, and the kernel tells whose it is.
        fd = os.open(self.directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            yield None
            return
        try:
            yield fd
        finally:
            os.close(fd)

    def holds(self, lock: int) -> bool:
        """Tell whether a lock's descriptor is still what others find: not where the directory was removed."""
        try:
            return os.path.samestat(os.stat(self.directory / "lock"), os.fstat(lock))
        except (FileNotFoundError, NotADirectoryError):
            return False

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Keep others from starting and stopping the platform meanwhile.

        :raises LocalPlatformError: when another one does not come to an end with it.
        """
        from filelock import FileLock, Timeout

        try:
            with FileLock(self.directory / "start.lock", timeout=_START_SECONDS + 10, mode=0o600):
                yield
        except Timeout:
            raise LocalPlatformError(
                f"another process has been starting or stopping the local platform {self.name!r} for more "
                f"than {_START_SECONDS:.0f} s"
            ) from None

    # What is known of it

    def read(self) -> dict[str, Any]:
        """Read what was written down: all of it, checked; nothing where that cannot be used."""
        try:
            return self._read()
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            _log.warning("%s cannot be read, and is made anew: %s", self.file, error)
            return {}

    def _read(self) -> dict[str, Any]:
        try:
            return _checked(json.loads(self.file.read_bytes()))
        except RecursionError as error:
            raise ValueError(str(error)) from error

    def write(self, known: dict[str, Any]) -> None:
        """Write it down, for this user only."""
        write_private(self.file, json.dumps({"version": _VERSION, **known}, indent=2).encode())

    def note(self, known: dict[str, Any]) -> None:
        """Write it down where that can be done; a full disk keeps nothing from ending."""
        try:
            self.write(known)
        except OSError as error:
            _log.warning("It is not written down that the local platform %r has ended: %s", self.name, error)

    def account(self, patience: float = _ANSWER_SECONDS) -> LocalAccount | None:
        """Return what a client needs; None where the platform does not run.

        :param patience: for how many seconds to wait for one that is coming up or ending.
        :raises LocalPlatformError: when it runs and cannot be used.
        """
        if not self.directory.exists():
            return None
        self.check()
        deadline = time.monotonic() + patience
        while True:
            pid = self.holder()
            if pid is None:
                return None
            known, problem = {}, f"has not come up yet, or is ending; see {self.log}"
            try:
                known = self._read()
            except FileNotFoundError:
                pass
            except (OSError, ValueError) as error:
                # One that is coming up will write it anew.
                problem = f"runs, but {self.file} cannot be read ({error}): stop it, and start it again"
            # Read after the lock was seen, and it was held by the same process all the time.
            if known.get("pid") == pid and not known.get("ending") and self.holder() == pid:
                break
            if time.monotonic() > deadline:
                raise LocalPlatformError(f"the local platform {self.name!r} (process {pid}) {problem}")
            time.sleep(0.05)
        account = LocalAccount(**{each.name: known[each.name] for each in fields(LocalAccount)})
        account.ask("/application")
        return account

    # What is left of it

    def clean_up(self) -> list[str]:
        """Remove what a platform that does not run left when it was killed, and return what stays.

        That is done when this returns, which it does after 15 s at the most.
        """
        with self.lock() as locked:
            known = self.read()
            if locked is None or known.get("pid") is None:
                return []
            found = _left(known)
            deadline = time.monotonic() + _CLEAN_SECONDS
            while True:
                # Where only the platform was killed, another process is at it, and lets nobody else.
                remove_leftovers()
                left = _left(known)
                if not left or time.monotonic() > deadline:
                    break
                time.sleep(0.05)
            if not left:
                if found:
                    _log.warning("The local platform %r was killed; what it left has been removed", self.name)
                _forget_dead_clusters(known)
                self.note({**known, "pid": None})
            return left


def _checked(known: Any) -> dict[str, Any]:
    """Return what a file says, with all that may be absent from it.

    :raises ValueError: when something is missing, or is not what it should be.
    """
    if not isinstance(known, dict):
        raise ValueError("it is no JSON object")
    if known.get("version") != _VERSION:
        raise ValueError(f"it is of version {known.get('version')!r}, and not of {_VERSION}")
    hints = {**get_type_hints(LocalAccount), "ending": bool, "templates": Mapping[str, NodeTemplate]}
    # None says that it has ended.
    hints["pid"] = int | None
    known = {**_ABSENT, **known}
    checked = {}
    for name, hint in hints.items():
        try:
            from_plain(hint, known[name])
        except KeyError as error:
            raise ValueError(f"{error} is missing") from error
        except (ValueError, TypeError, SpecError) as error:
            raise ValueError(f"{name!r} is wrong: {error}") from error
        checked[name] = known[name]
    for name in ("url", "control_url"):
        text = checked[name]
        if (text or name == "url") and not (_URL.fullmatch(text) and _port(text) < 1 << 16):
            raise ValueError(f"{name!r} is wrong: {text!r}")
    if not checked["template_names"]:
        raise ValueError("'template_names' is empty")
    return checked


def _left(known: dict[str, Any]) -> list[str]:
    directory, interface = known["directory"], known["interface"]
    left = [f"process {pid}" for pid in processes_with(NODE_FILES, directory)]
    if os.path.exists(directory):
        left.append(f"directory {directory}")
    if interface and os.path.exists(f"/sys/class/net/{interface}"):
        left.append(f"network interface {interface}")
    return left


def _forget_dead_clusters(known: dict[str, Any]) -> None:
    """Remove the state files of clusters that a killed platform had."""
    # Where something answers there, the files may tell of its clusters.
    if _is_free(_port(known["url"])):
        forget_clusters(known["url"])


def _port(url: str) -> int:
    return int(url.rpartition(":")[2])


def _is_free(port: int) -> bool:
    try:
        bind_loopback(port).close()
    except LocalPlatformError:
        return False
    return True


# ------------------------------------------------------------------------------------- from outside


def connect(name: str = "default") -> LocalAccount:
    """Find the platform of this name; see :meth:`.LocalPlatform.connect`."""
    account = Home(name).account()
    if account is None:
        more = "" if name == "default" else f" --name {name}"
        raise LocalPlatformError(f"no local platform {name!r} runs: start it with `raydog local start{more}`")
    return account


def start(home: Home, options: Options) -> tuple[LocalAccount, bool]:
    """Start a platform in a process of its own, and wait until it answers.

    :returns: what a client needs, and whether it was running already.
    :raises LocalPlatformError: when it does not come up.
    """
    require_linux()
    home.make()
    with home.alone():
        account = home.account(_START_SECONDS)
        if account is not None:
            return account, True
        left = home.clean_up()
        if left:
            raise LocalPlatformError(
                f"what the local platform {home.name!r} left when it was killed cannot be removed: "
                f"{', '.join(left)}"
            )
        _spawn(home, options)
        account = home.account()
        if account is None:
            raise LocalPlatformError(f"the local platform has ended at once; see {home.log}")
        return account, False


def tidy(home: Home) -> list[str]:
    """Where a platform does not run, remove what it left when it was killed; return what stays."""
    if not home.directory.exists():
        return []
    home.check()
    with home.alone():
        return home.clean_up()


def _spawn(home: Home, options: Options) -> None:
    with contextlib.suppress(FileNotFoundError):
        if home.log.stat().st_size > _LOG_BYTES:
            os.replace(home.log, f"{home.log}.1")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(import_path())}
    environment["RAYDOG_LOCAL_DIR"] = str(home.directory.parent)
    if environment.get("RAYDOG_STATE_DIR"):
        environment["RAYDOG_STATE_DIR"] = str(Path(environment["RAYDOG_STATE_DIR"]).expanduser().absolute())
    answer, tell = os.pipe()
    with (
        open(answer, "rb") as answers,
        open(home.log, "ab", opener=lambda name, flags: os.open(name, flags, 0o600)) as log,
    ):
        try:
            child = subprocess.Popen(
                [
                    sys.executable, "-m", "yellowdog_ray.local.daemon",
                    home.name, str(tell), json.dumps(asdict(options)),
                ],
                pass_fds=[tell],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # The first place to import from; nobody else may write there.
                cwd=home.directory,
                start_new_session=True,
                env=environment,
            )  # fmt: skip
        finally:
            os.close(tell)
        try:
            if not select.select([answers], [], [], _START_SECONDS)[0]:
                raise LocalPlatformError(
                    f"the local platform has not come up within {_START_SECONDS:.0f} s; see {home.log}"
                )
            told = json.loads(answers.read() or b"null")
        except BaseException:
            child.terminate()
            raise
    if told is None:
        raise LocalPlatformError(f"the local platform ended while it came up; see {home.log}")
    if "error" in told:
        raise LocalPlatformError(told["error"])


def stop(home: Home) -> int | None:
    """End a platform with all its nodes, and see that nothing is left of it.

    :returns: the process that was ended; None where none ran.
    :raises LocalPlatformError: when it does not end, or something is left.
    """
    if not home.directory.exists():
        return None
    home.check()
    with home.alone():
        pid = home.holder()
        if pid is not None:
            _end(home, pid)
        left = home.clean_up() or (_left(known) if (known := home.read()) else [])
    if left:
        raise LocalPlatformError(f"of the local platform {home.name!r} this is left: {', '.join(left)}")
    return pid


def _end(home: Home, pid: int) -> None:
    if pid <= 0:
        raise LocalPlatformError(
            f"the local platform {home.name!r} runs in another container: stop it from there"
        )
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        # By now the number could be another process's; as long as this one holds the lock, it is not.
        if home.holder() != pid:
            return
        signal.pidfd_send_signal(process, signal.SIGTERM)
        if not select.select([process], [], [], _STOP_SECONDS)[0]:
            raise LocalPlatformError(
                f"the local platform {home.name!r} (process {pid}) has not ended within {_STOP_SECONDS:.0f} "
                f"s; see {home.log}. `kill -9 {pid}` ends it with all its nodes, and the next `raydog local` "
                "command removes what is left of it"
            )
    finally:
        os.close(process)


# ------------------------------------------------------------------------------------ the process itself


def serve(home: Home, options: Options, told: Callable[[LocalAccount], None]) -> None:
    """Be the platform, until SIGTERM or SIGINT.

    :param told: is told when it answers.
    :raises LocalPlatformError: when it cannot come up, or cannot go on.
    """
    require_linux()
    # What a signal handler may do at any moment is to write to a pipe.
    told_to_end, tell = os.pipe()
    os.set_blocking(tell, False)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda number, frame: _tell(tell))
    home.make()
    with home.lock() as lock:
        if lock is None:
            raise LocalPlatformError(f"the local platform {home.name!r} runs already")
        platform = _make(home, options)
        # A signal that comes while it starts is heeded afterwards.
        with platform.start():
            account = LocalAccount(
                name=home.name,
                url=platform.url,
                key_id=platform.key_id,
                secret=platform.secret,
                namespace=platform.namespace,
                template_names=platform.template_names,
                ssh_user=platform.ssh_user,
                ssh_private_key_file=platform.ssh_private_key_file,
                ssh_port=platform.ssh_port,
                ssh_host_key=platform.ssh_host_key,
                isolation=platform.isolation.value,
                description=platform.describe(),
                control_url=platform.control_url,
                control_token=platform.control_token,
                pid=os.getpid(),
                started=time.time(),
                directory=platform.directory,
                interface=platform._nodes.interface,
            )
            templates = {name: asdict(template) for name, template in platform.templates.items()}
            known = {**asdict(account), "templates": templates}
            home.write(known)
            told(account)
            while not select.select([told_to_end], [], [], _LOOK)[0]:
                failure = platform.failure()
                if not home.holds(lock):
                    failure = f"{home.directory} was removed or replaced, and nobody finds it any more"
                if failure is not None:
                    raise LocalPlatformError(f"the local platform cannot go on: {failure}")
            _log.info("Ending")
            home.note({**known, "ending": True})
        left = platform.leftovers()
        if left:
            raise LocalPlatformError(f"of the local platform this is left: {', '.join(left)}")
        home.note({**known, "pid": None})
        _log.info("Ended; nothing is left")


def _tell(pipe: int) -> None:
    with contextlib.suppress(BlockingIOError):
        os.write(pipe, b"1")


def _make(home: Home, options: Options) -> LocalPlatform:
    """Make the platform, with the ports, the node sizes and, where it is to keep it, the key from before."""
    known = home.read()
    keep_key = options.keep_key and bool(known)
    if keep_key and home.file.stat().st_mode & 0o077:
        _log.warning("%s could be read by other users: the platform gets a new key", home.file)
        keep_key = False
    port = options.port
    if port is None and known:
        port = _port(known["url"])
        if not _is_free(port):
            # Whoever is there now may have been sent the key, by a client that did not know.
            _log.warning(
                "Port %d, where the platform was before, is taken: it gets another one, and a new key", port
            )
            port, keep_key = None, False
    control_port = _port(known["control_url"]) if known and known["control_url"] else None
    keep_token = keep_key
    if control_port in (None, port) or not _is_free(control_port):
        control_port, keep_token = None, False
    if options.forget:
        forget(home.directory / HISTORY)
    templates = options.templates
    if templates is None and known:
        templates = from_plain(Mapping[str, NodeTemplate], known["templates"])
    return LocalPlatform(
        port=port,
        isolation=options.isolation,
        templates=templates or None,
        kept=Kept(
            key_id=known["key_id"] if keep_key else str(uuid.uuid4()),
            secret=known["secret"] if keep_key else secrets.token_urlsafe(32),
            directory=home.directory,
            control_port=control_port,
            control_token=(known["control_token"] or None) if keep_token else None,
        ),
    )


def set_up_log() -> None:
    """Write the log to the error stream, with the time."""
    logging.basicConfig(
        stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", force=True
    )


def since(when: float) -> str:
    """Write a time as a person reads it."""
    return datetime.fromtimestamp(when, timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")


def main() -> int:
    """Run as ``python -m yellowdog_ray.local.daemon NAME FD OPTIONS``; FD is told how it went."""
    name, tell = sys.argv[1], int(sys.argv[2])
    options = from_plain(Options, json.loads(sys.argv[3]))
    os.set_inheritable(tell, False)
    set_up_log()

    def say(**answer: Any) -> None:
        # Nobody may be there any more.
        with contextlib.suppress(OSError), open(tell, "w") as file:
            json.dump(answer, file)

    up = False

    def told(account: LocalAccount) -> None:
        nonlocal up
        up = True
        say(url=account.url)

    try:
        serve(Home(name), options, told)
    except (RayDogError, OSError) as error:
        _log.error("%s", error)
        if not up:
            say(error=str(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
