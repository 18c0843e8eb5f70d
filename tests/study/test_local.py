"""What runs beside each other share."""

from __future__ import annotations

import pytest

from megatron_cpt.errors import InputError
from megatron_cpt.study.config import StudyConfig
from megatron_cpt.study.local import device_shares, environment


def study(processes: int, parallel_runs: int) -> StudyConfig:
    return StudyConfig("base.yaml", "folder", [0.5], [1e-3], 1000, processes=processes, parallel_runs=parallel_runs)


def test_runs_beside_each_other_have_gpus_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7,GPU-8")
    assert device_shares(study(2, 2)) == ["4,5", "6,7"]
    assert environment(study(2, 2), "6,7")["CUDA_VISIBLE_DEVICES"] == "6,7"
    with pytest.raises(InputError, match=r"parallel_runs 2 x processes 4 = 8 GPUs; this machine shows 5"):
        device_shares(study(4, 2))


def test_without_gpus_they_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert device_shares(study(4, 2)) == [None, None]
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 16)
    assert environment(study(4, 2), None)["OMP_NUM_THREADS"] == "2"
