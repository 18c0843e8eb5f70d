"""What runs in the sandbox's process before the program does: it takes the limits on itself.

sandbox.py starts this text with `python -I -c`, as the user it becomes may not be able to read the file.
"""

import ctypes
import json
import os
import resource
import struct
import sys
from typing import Any

# From linux/prctl.h and linux/capability.h
PR_SET_KEEPCAPS = 8
CAPABILITY_VERSION_3 = 0x20080522
CAP_DAC_READ_SEARCH = 1 << 2


def leave_root(user: int) -> None:
    """Become another user: root is not bound by a limit on processes, and may write everywhere.

    What stays is the right to read, as Python's library may lie in root's home.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_KEEPCAPS, 1, 0, 0, 0)
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)
    header = struct.pack("Ii", CAPABILITY_VERSION_3, 0)
    rights = struct.pack("6I", CAP_DAC_READ_SEARCH, CAP_DAC_READ_SEARCH, 0, 0, 0, 0)  # effective, permitted, inheritable
    if libc.capset(header, rights):
        raise OSError(ctypes.get_errno(), "root cannot give up its rights; run as another user")


def main() -> None:
    """Run the program of the job on stdin; only one that comes to its end leaves the job's token."""
    job: dict[str, Any] = json.load(sys.stdin)
    if os.geteuid() == 0:
        leave_root(job["user"])
    for name, bound in job["limits"].items():
        resource.setrlimit(getattr(resource, name), (bound, bound))
    exec(compile(job["program"], "program", "exec"), {"__name__": "__main__"})
    with open(job["result"], "w", encoding="ascii") as file:
        file.write(job["token"])


if __name__ == "__main__":
    main()
