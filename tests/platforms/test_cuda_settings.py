"""What the CUDA platform says of settings and of Transformer Engine, as far as it can be seen without a GPU."""

from __future__ import annotations

import dataclasses
import enum
import importlib
import os
import re
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_cpt.config.parallel import ParallelConfig
from megatron_cpt.config.run import TrainingConfig
from megatron_cpt.platforms import cuda
from megatron_cpt.platforms.cuda import CudaPlatform, leave_out_broken_transformer_engine
from megatron_cpt.training.launch import set_numerics

BF16 = TrainingConfig(global_batch_size=8, train_iters=1, params_dtype="bf16")
FP8 = TrainingConfig(global_batch_size=8, train_iters=1, params_dtype="bf16", fp8="hybrid")
FP32 = TrainingConfig(global_batch_size=8, train_iters=1)


@pytest.mark.parametrize(
    ("parallel", "training", "expected"),
    [
        (
            ParallelConfig(context_parallel_size=2),
            FP32,
            r"parallel.context_parallel_size is 2, .* and fp32 is computed by torch's \(training.params_dtype\); expected 1",
        ),
        (
            ParallelConfig(context_parallel_size=2),
            dataclasses.replace(FP32, transformer_impl="transformer_engine"),
            "parallel.context_parallel_size is 2 with .*params_dtype fp32",
        ),
        (
            ParallelConfig(),
            dataclasses.replace(FP8, transformer_impl="local"),
            "training.fp8 is hybrid, .* and training.transformer_impl is local; expected None",
        ),
        (ParallelConfig(context_parallel_size=2), BF16, None),
        (
            ParallelConfig(recompute_granularity="selective", recompute_modules=["mlp", "layernorm"]),
            BF16,
            "parallel.recompute_modules has layernorm, .*; expected core_attn or mlp",
        ),
        (ParallelConfig(recompute_granularity="selective", recompute_modules=["mlp"]), BF16, None),
        (ParallelConfig(recompute_granularity="selective", recompute_modules=["layernorm"]), FP32, None),
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


def test_fp32_takes_torchs_layers_unless_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "has_transformer_engine", lambda: True)
    assert CudaPlatform().transformer_impl(torch.float32) == "local"
    assert CudaPlatform().transformer_impl(torch.bfloat16) == "transformer_engine"
    monkeypatch.setattr(cuda, "has_transformer_engine", lambda: False)
    assert CudaPlatform().transformer_impl(torch.bfloat16) == "local"
    wanted = dataclasses.replace(BF16, transformer_impl="transformer_engine")
    refusal = CudaPlatform().refuses(ParallelConfig(), wanted)
    assert refusal == "training.transformer_impl is transformer_engine, which is not installed; expected local"


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
    for name in ("CUBLAS_WORKSPACE_CONFIG", "NCCL_ALGO", "NVTE_ALLOW_NONDETERMINISTIC_ALGO"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    try:
        set_numerics(TrainingConfig(global_batch_size=8, train_iters=1, deterministic=True))
        assert os.environ["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] == "0"
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(("training", "mode", "dtype"), [(BF16, "none", torch.bfloat16), (FP8, "fp8", torch.bfloat16)])
def test_buffers_of_overlapped_communication(
    training: TrainingConfig, mode: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers that overlap do not build before somebody has called Transformer Engine's initialize_ub."""
    seen: list[tuple[Any, ...]] = []

    def initialize_ub(shape: list[int], tp_size: int, **more: Any) -> None:
        seen.append((shape, tp_size, [mode.value for mode in more.pop("quantization_modes")], more))

    modes = enum.Enum("UserBufferQuantizationMode", {"NONE": "none", "FP8": "fp8"})
    base = SimpleNamespace(initialize_ub=initialize_ub, UserBufferQuantizationMode=modes)
    for name in ("", ".pytorch", ".pytorch.module", ".pytorch.module.base"):
        monkeypatch.setitem(sys.modules, f"transformer_engine{name}", base)
    plain = ParallelConfig(tensor_model_parallel_size=4, sequence_parallel=True)
    CudaPlatform().before_layers(plain, training, 4096, 512)
    assert not seen
    parallel = dataclasses.replace(plain, tp_comm_overlap=True, context_parallel_size=2)
    CudaPlatform().before_layers(parallel, dataclasses.replace(training, micro_batch_size=3), 4096, 512)
    assert seen == [([4096 * 3 // 2, 512], 4, [mode], {"dtype": dtype, "bootstrap_backend": "nccl"})]


def test_a_cudnn_that_torch_refuses_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is a version among others in a run's records, which no run may end over."""

    def refuses() -> int:
        raise RuntimeError("cuDNN version incompatibility: PyTorch was compiled\nagainst (9, 19, 0)")

    monkeypatch.setattr(torch.backends.cudnn, "version", refuses)
    noted = cuda.cudnn_version()
    assert noted == "refused by torch: cuDNN version incompatibility: PyTorch was compiled against (9, 19, 0)"
