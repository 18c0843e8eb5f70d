"""Lock files in places whose names can be guessed, through the tools that take them."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_cpt.convert.conversion_folder import JOB, resumable_folder
from megatron_cpt.corpus.partial import lock
from megatron_cpt.curation.curate import sole_writer
from megatron_cpt.evaluation.report import only_evaluation
from megatron_cpt.study.local_executor import alone_in
from megatron_cpt.training.launch import locked_run_folder
from megatron_cpt.utils.errors import InputError
from megatron_cpt.utils.lock import open_lock


def conversion(root: Path) -> Any:
    return resumable_folder(str(root / "out"), {"what": "other"})


LOCKS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "run": ("run.lock", lambda root: locked_run_folder(SimpleNamespace(checkpoint=SimpleNamespace(save=str(root))), "")),  # type: ignore[arg-type]
    "evaluation": (".lock", lambda root: only_evaluation(str(root))),
    "corpus": ("c.partial.lock", lambda root: lock(root / "c.partial")),
    "curation": ("lock", lambda root: sole_writer(root, root)),
    "study": ("runs/.a.lock", lambda root: alone_in(SimpleNamespace(folder=str(root)), "a", threading.Event())),  # type: ignore[arg-type]
    "conversion": (f".out.tmp/{JOB}/description.json", conversion),
}


@pytest.mark.parametrize("kind", LOCKS)
def test_what_a_link_points_to_is_left_alone(kind: str, tmp_path: Path) -> None:
    name, take = LOCKS[kind]
    victim = tmp_path / "victim"
    victim.write_text("of somebody else")
    root = tmp_path / "output"
    (root / name).parent.mkdir(parents=True)
    (root / name).symlink_to(victim)
    with pytest.raises(InputError, match=r"lock file .* is a symbolic link; expected a plain file"), take(root):
        pytest.fail("the lock was taken")
    assert victim.read_text() == "of somebody else"


def test_what_is_in_the_way(tmp_path: Path) -> None:
    """Nothing is waited for, and what is in a lock file stays."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="is no plain file"):
        open_lock(tmp_path / "pipe")
    with pytest.raises(InputError, match=r"cannot be opened: No such file or directory; expected a folder"):
        open_lock(tmp_path / "nowhere" / "lock")
    (tmp_path / "lock").write_text("kept")
    with contextlib.closing(open_lock(tmp_path / "lock")) as file:
        assert file.read() == b"kept"
