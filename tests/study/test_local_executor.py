"""What runs beside each other share."""

from __future__ import annotations

import queue
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_cpt.study import local_executor
from megatron_cpt.study.config import StudyConfig
from megatron_cpt.study.grid import GridPoint, run_folder
from megatron_cpt.study.local_executor import device_shares, run_environment
from megatron_cpt.study.run_status import RunOutcome, read_outcome
from megatron_cpt.utils.errors import InputError


def study(processes: int, parallel_runs: int) -> StudyConfig:
    return StudyConfig("base.yaml", "folder", [0.5], [1e-3], 1000, processes=processes, parallel_runs=parallel_runs)


def test_runs_beside_each_other_have_gpus_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7,GPU-8")
    assert device_shares(study(2, 2)) == ["4,5", "6,7"]
    assert run_environment(study(2, 2), "6,7")["CUDA_VISIBLE_DEVICES"] == "6,7"
    with pytest.raises(InputError, match=r"parallel_runs 2 x processes 4 = 8 GPUs; this machine shows 5"):
        device_shares(study(4, 2))


def test_without_gpus_they_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert device_shares(study(4, 2)) == [None, None]
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 16)
    assert run_environment(study(4, 2), None)["OMP_NUM_THREADS"] == "2"


@pytest.mark.parametrize(("status", "is_timed"), [(None, True), ('{"state": "stopped"}', False)])
def test_a_run_that_goes_on_has_no_time_of_its_own(
    status: str | None, is_timed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a plan takes a run to last is the mean of those that were done in one go."""
    monkeypatch.setattr(local_executor, "train_watched", lambda *_: RunOutcome("finished", None, 5.0))
    config, point = replace(study(1, 1), folder=str(tmp_path)), GridPoint(1, 0.5, 1e-3)
    folder = Path(run_folder(config.folder, point))
    folder.mkdir(parents=True)
    if status is not None:
        (folder / "status.json").write_text(status)
    shares: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    shares.put(None)
    local_executor.run_one(config, None, point, threading.Event(), shares)  # type: ignore[arg-type]
    outcome = read_outcome(str(folder))
    assert outcome is not None
    assert (outcome.wall_seconds is not None) == is_timed
