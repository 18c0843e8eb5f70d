"""What a platform knows of its device."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path

import pytest
import torch

from megatron_cpt.platforms.cpu import CpuPlatform, cpu_model
from megatron_cpt.platforms.cuda import CudaPlatform, known_peak_tflops


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H100 NVL", 835.0),
        ("NVIDIA H200", 989.4),
        ("NVIDIA H20", 148.0),
        ("NVIDIA GH200 480GB", 989.4),
        ("NVIDIA B200", 2250.0),
        ("NVIDIA GB200", 2500.0),
        ("NVIDIA GB300", 2500.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA A10", 125.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA L40", 181.0),
        ("NVIDIA L4", 121.0),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA A10G", None),
        ("Tesla V100-SXM2-32GB", None),
    ],
)
def test_peaks_by_name(name: str, peak: float | None) -> None:
    assert known_peak_tflops(name) == peak


def test_a_cpu_has_a_name_and_no_peak(tmp_path: Path) -> None:
    assert CpuPlatform().peak_tflops() is None
    assert CpuPlatform().device_name()
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: Some Chip @ 2 GHz\n")
    assert cpu_model(str(tmp_path / "cpuinfo")) == "Some Chip @ 2 GHz"
    assert cpu_model(str(tmp_path / "missing"))


def test_only_bf16_takes_the_loss_that_rounds_its_gradient_to_bf16() -> None:
    source = inspect.getsource(importlib.import_module("megatron.core.fusions.fused_cross_entropy"))
    assert "grad_input.to(torch.bfloat16)" in source, "another way now: see whether fp32 can have it"
    assert CudaPlatform().fusions(torch.bfloat16, "local")["cross_entropy_loss_fusion"]
    assert not CudaPlatform().fusions(torch.float32, "local")["cross_entropy_loss_fusion"]
