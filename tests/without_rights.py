"""Running a tool as somebody who has no rights to a file: as this user, or, where that is root, as nobody."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

IS_ROOT = os.getuid() == 0
LAUNCHER = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups") if IS_ROOT else ()
needs_somebody = pytest.mark.skipif(IS_ROOT and not shutil.which("setpriv"), reason="root may read everything")


def lock(path: Path) -> None:
    """Take away all rights to a file or folder, which those above let everybody find."""
    for parent in list(path.parents)[:-2]:
        if parent.stat().st_uid == os.getuid():
            parent.chmod(parent.stat().st_mode | 0o055)
    path.chmod(0)
