"""What the CUDA platform says of settings and of Transformer Engine, as far as it can be seen without a GPU."""

from __future__ import annotations

import importlib
import os
import re
import sys

import pytest

from megatron_cpt.config.parallel import ParallelConfig
from megatron_cpt.config.run import TrainingConfig
from megatron_cpt.platforms import cuda
from megatron_cpt.platforms.cuda import CudaPlatform, leave_out_broken_transformer_engine
from megatron_cpt.training.launch import prepare_arithmetic

BF16 = TrainingConfig(global_batch_size=8, train_iters=1, params_dtype="bf16")
FP32 = TrainingConfig(global_batch_size=8, train_iters=1)


@pytest.mark.parametrize(
    ("parallel", "training", "expected"),
    [
        (
            ParallelConfig(context_parallel_size=2),
            FP32,
            "parallel.context_parallel_size is 2 with .*params_dtype fp32",
        ),
        (ParallelConfig(context_parallel_size=2), BF16, None),
        (
            ParallelConfig(recompute_granularity="selective", recompute_modules=["mlp", "layernorm"]),
            BF16,
            "parallel.recompute_modules has layernorm, .*; expected core_attn or mlp",
        ),
        (ParallelConfig(recompute_granularity="selective", recompute_modules=["mlp"]), BF16, None),
        (ParallelConfig(), FP32, None),
    ],
)
def test_what_cannot_be_done_with_transformer_engine(
    parallel: ParallelConfig, training: TrainingConfig, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "has_transformer_engine", lambda: True)
    refusal = CudaPlatform().refuses(parallel, training)
    if expected is None:
        assert refusal is None
    else:
        assert refusal is not None
        assert re.match(expected, refusal)


def test_a_transformer_engine_that_cannot_be_imported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Megatron-core's import would end with its error, which names a file of neither."""

    def fails(name: str) -> None:
        raise FileNotFoundError("Could not find shared object file\nfor Transformer Engine torch lib.")

    monkeypatch.setattr(cuda, "has_transformer_engine", lambda: True)
    monkeypatch.setattr(importlib, "import_module", fails)
    monkeypatch.setitem(sys.modules, "transformer_engine", None)  # restored afterwards, whatever the function does
    leave_out_broken_transformer_engine()
    assert sys.modules["transformer_engine"] is None
    said = capsys.readouterr().err
    assert said == (
        "note: Transformer Engine cannot be imported (Could not find shared object file for Transformer Engine torch lib.): "
        "torch's layers are used\n"
    )


def test_deterministic_runs_tell_transformer_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """It reads the variable when its attention is built, and refuses to be built without."""
    import torch

    for name in ("CUBLAS_WORKSPACE_CONFIG", "NCCL_ALGO", "NVTE_ALLOW_NONDETERMINISTIC_ALGO"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    try:
        prepare_arithmetic(TrainingConfig(global_batch_size=8, train_iters=1, deterministic=True))
        assert os.environ["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] == "0"
    finally:
        torch.use_deterministic_algorithms(False)
