"""Running a tool as somebody who has no rights to a file: as this user, or, where that is root, as nobody."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

IS_ROOT = os.getuid() == 0
LAUNCHER = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups") if IS_ROOT else ()


def is_there_somebody() -> bool:
    """Whether Python can be run so: not without setpriv, nor where it lies in a home directory that others cannot enter."""
    try:
        return subprocess.run([*LAUNCHER, sys.executable, "-c", ""], capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


needs_somebody = pytest.mark.skipif(
    not is_there_somebody(), reason="this user may read everything, and nobody else run Python"
)


def lock(path: Path) -> None:
    """Take away all rights to a file or folder, which those above let everybody find."""
    for parent in list(path.parents)[:-2]:
        if parent.stat().st_uid == os.getuid():
            parent.chmod(parent.stat().st_mode | 0o055)
    path.chmod(0)
