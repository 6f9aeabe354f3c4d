"""Run a command as in a container without any capability: no namespaces, no mounts, no rights of root's.

``python tests/contained.py COMMAND...``: the command starts with an empty bounding set and a system call
filter as the common container engines have it by default. A root user has no more rights than any other then.

Facts: capabilities(7), seccomp(2); the numbers of system calls are those of x86-64 and of arm64.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
import sys

_PR_SET_SECCOMP, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS = 22, 24, 38
_FILTER = 2
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
_LOAD, _EQUAL, _ANY_BIT, _RETURN = 0x20, 0x15, 0x45, 0x06
_NEW_NAMESPACES = 0x7E020000
_NUMBERS = {
    "x86_64": {"unshare": 272, "mount": 165, "setns": 308, "clone": 56, "clone3": 435},
    "aarch64": {"unshare": 97, "mount": 40, "setns": 268, "clone": 220, "clone3": 435},
}


def contain() -> None:
    """Take from this process, for good, what a container has not."""
    libc = ctypes.CDLL(None, use_errno=True)
    capability = 0
    while libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0) == 0:
        capability += 1
    numbers = _NUMBERS[platform.machine()]
    code = [(_LOAD, 0, 0, 0)]
    for name in ("unshare", "mount", "setns"):
        code += [(_EQUAL, 0, 1, numbers[name]), (_RETURN, 0, 0, _ERRNO | errno.EPERM)]
    code += [(_EQUAL, 0, 1, numbers["clone3"]), (_RETURN, 0, 0, _ERRNO | errno.ENOSYS)]
    code += [
        (_EQUAL, 0, 3, numbers["clone"]),
        # The lower half of the first argument.
        (_LOAD, 0, 0, 16),
        (_ANY_BIT, 0, 1, _NEW_NAMESPACES),
        (_RETURN, 0, 0, _ERRNO | errno.EPERM),
        (_RETURN, 0, 0, _ALLOW),
    ]
    program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *each) for each in code))
    header = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(code), ctypes.addressof(program)))
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or libc.prctl(_PR_SET_SECCOMP, _FILTER, header, 0, 0):
        raise OSError(ctypes.get_errno(), "cannot filter system calls")


if __name__ == "__main__":
    contain()
    os.execvp(sys.argv[1], sys.argv[1:])
