"""Training on one GPU: the losses of the CPU in fp32, runs resumed bit for bit, and the parts that only a GPU has."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from layout_cases import FP32, PACKED
from metrics_rows import clockless
from tiny_models import VARIANTS, read_rows
from tiny_runs import SAVE_INTERVAL, STEPS, Layout, Runs

from megatron_cpt.convert.config import Verify
from megatron_cpt.convert.verify import verify
from megatron_cpt.mixture.loader import Batch
from megatron_cpt.platforms import current_platform, prepare_platform
from megatron_cpt.platforms.cuda import CudaPlatform
from megatron_cpt.platforms.fused_adam import FusedAdam
from megatron_cpt.platforms.torch_layers import SdpaCoreAttention

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture(scope="module", autouse=True)
def _prepared() -> None:
    prepare_platform()


BF16 = ("--training.params_dtype=bf16",)
FULL = ("--parallel.recompute_granularity=full",)
SELECTIVE = ("--parallel.recompute_granularity=selective", "--parallel.recompute_modules=[core_attn,mlp,layernorm]")
DETERMINISTIC = ("--training.deterministic=true",)
SETTINGS = {
    "plain": (),
    "packed": PACKED,
    "full": FULL,
    "selective": SELECTIVE,
    "deterministic": DETERMINISTIC,
    "overlap": ("--parallel.overlap_grad_reduce=true", "--parallel.overlap_param_gather=true"),
}


class Trainer:
    """Runs of one tiny model, each once."""

    def __init__(self, runs: Runs) -> None:
        self.runs = runs

    def on_gpu(self, name: str, *settings: str) -> Path:
        if not (self.runs.folder / name).exists():
            self.runs.train(name, Layout(), *settings, gpu=True)
        return self.runs.folder / name

    def on_cpu(self, name: str, *settings: str) -> Path:
        if not (self.runs.folder / name).exists():
            self.runs.train(name, Layout(), *settings)
        return self.runs.folder / name


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_dir: str) -> Trainer:
    return Trainer(Runs(tmp_path_factory.mktemp("gpu"), tiny_tokenizer_dir, **VARIANTS["llama3_rope"]))


def rows_of_steps(folder: Path) -> list[dict[str, Any]]:
    rows = [row for row in clockless(folder) if "loss" in row]
    assert [row["iteration"] for row in rows] == list(range(1, STEPS + 1))
    return rows


def assert_alike(folder: Path, wanted: Path, *, loss: float, grad_norm: float) -> None:
    """Relative differences of all steps and evaluations are at most these; what was read is the same."""
    found, expected = rows_of_steps(folder), rows_of_steps(wanted)
    assert expected[0]["loss"] - expected[-1]["loss"] > 0.1, "it learns nothing: equal losses would show little"
    for row, other in zip(found, expected, strict=True):
        assert (row["corpus_tokens"], row["lr"]) == (other["corpus_tokens"], other["lr"])
        assert row["loss"] == pytest.approx(other["loss"], rel=loss, abs=0), row["iteration"]
        assert row["grad_norm"] == pytest.approx(other["grad_norm"], rel=grad_norm, abs=0), row["iteration"]
    for row, other in zip(read_rows(folder), read_rows(wanted), strict=True):
        for name, result in (other.get("validation") or {}).items():
            assert row["validation"][name]["loss"] == pytest.approx(result["loss"], rel=loss, abs=0), name


@pytest.mark.parametrize("settings", SETTINGS)
def test_fp32_is_that_of_the_cpu(trainer: Trainer, settings: str) -> None:
    on_cpu = trainer.on_cpu(*(("cpu-packed", *PACKED) if settings == "packed" else ("cpu",)))
    assert_alike(trainer.on_gpu(settings, *SETTINGS[settings]), on_cpu, **FP32)


@pytest.mark.parametrize("settings", ["plain", "packed", "full"])
def test_bf16_is_close_to_fp32(trainer: Trainer, settings: str) -> None:
    on_cpu = trainer.on_cpu(*(("cpu-packed", *PACKED) if settings == "packed" else ("cpu",)))
    assert_alike(trainer.on_gpu(f"bf16-{settings}", *BF16, *SETTINGS[settings]), on_cpu, loss=1e-2, grad_norm=5e-2)


@pytest.mark.parametrize("settings", [(), PACKED, DETERMINISTIC, (*BF16, *DETERMINISTIC), (*BF16, *PACKED, *DETERMINISTIC)])
def test_a_resumed_run_is_bit_equal(trainer: Trainer, settings: tuple[str, ...]) -> None:
    name = "-".join(["whole", *(word.split(".")[-1] for word in settings if word != "true")])
    whole = trainer.on_gpu(name, *settings)
    interrupted = trainer.runs.interrupted(whole, name.replace("whole", "resumed"))
    trainer.runs.train(interrupted.name, Layout(), *settings, gpu=True)
    assert clockless(interrupted) == clockless(whole)
    assert "tensors equal" in verify(Verify(str(interrupted), str(whole)))


def test_a_checkpoint_of_a_gpu_goes_on_on_a_cpu(trainer: Trainer) -> None:
    whole = trainer.on_gpu("plain")
    interrupted = trainer.runs.interrupted(whole, "gpu-then-cpu")
    trainer.runs.train(interrupted.name, Layout())
    assert_alike(interrupted, whole, **FP32)


def test_an_asynchronous_save_holds_the_state_of_its_step(trainer: Trainer) -> None:
    """While the file is written training goes on: what is in it must be what a run that waits has saved."""
    waited = trainer.on_gpu("deterministic", *DETERMINISTIC)
    background = trainer.on_gpu("async", *DETERMINISTIC, "--checkpoint.async_save=true")
    step = f"iter_{SAVE_INTERVAL:07d}"
    assert "tensors equal" in verify(Verify(str(background / step), str(waited / step)))
    assert clockless(background) == clockless(waited)


def test_a_step_reports_throughput_and_the_run_its_memory(trainer: Trainer) -> None:
    rows = read_rows(trainer.on_gpu("plain"))
    assert all(row["tokens_per_second"] > 0 for row in rows if "loss" in row)
    assert 0 < rows[-1]["peak_memory_bytes"] < torch.cuda.get_device_properties(0).total_memory
    if current_platform().peak_tflops() is not None:
        assert all(0 < row["mfu_causal"] < row["mfu"] < 1 for row in rows if "loss" in row)


def test_batches_are_page_locked() -> None:
    tokens, mask = np.arange(34).reshape(2, 17), np.ones((2, 16), np.float32)
    locked = CudaPlatform().page_locked(Batch(tokens, mask, np.array([0, 32], np.int32)))
    for array, given in (
        (locked.tokens, tokens),
        (locked.loss_mask, mask),
        (locked.cu_seqlens, np.array([0, 32], np.int32)),
    ):
        assert array.dtype == given.dtype
        assert np.array_equal(array, given)
        assert torch.from_numpy(array).is_pinned()
    assert CudaPlatform().page_locked(Batch(tokens, mask, None)).cu_seqlens is None


def test_fused_adam_is_torchs_adamw() -> None:
    generator = torch.Generator().manual_seed(0)
    starts = [torch.randn(shape, generator=generator) for shape in ((5, 3), (7,))]
    gradients = [[torch.randn(start.shape, generator=generator) for start in starts] for _ in range(5)]
    settings = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    results = []
    for kind in (FusedAdam, torch.optim.AdamW):
        parameters = [torch.nn.Parameter(start.cuda()) for start in starts]
        optimizer = kind(parameters, **settings)
        for step in gradients:
            for parameter, gradient in zip(parameters, step, strict=True):
                parameter.grad = gradient.cuda()
            optimizer.step()
        results.append(parameters)
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cu_seqlens", [[0, 100, 101, 300, 512], [0, 512]], ids=["documents", "one"])
def test_packed_attention_is_that_of_documents_alone(cu_seqlens: list[int], dtype: torch.dtype) -> None:
    """Grouped queries; output and gradients against the definition in double precision."""
    generator = torch.Generator().manual_seed(3)
    inputs = [torch.randn(512, heads, 64, generator=generator).to("cuda", dtype).requires_grad_() for heads in (4, 2, 2)]
    weights = torch.randn(512, 4 * 64, generator=generator).cuda()
    on_device = torch.tensor(cu_seqlens, dtype=torch.int32, device="cuda")
    longest = max(end - begin for begin, end in pairwise(cu_seqlens))
    packing = SimpleNamespace(cu_seqlens_q=on_device, cu_seqlens_kv=on_device, max_seqlen_q=longest, max_seqlen_kv=longest)
    attention = SdpaCoreAttention(SimpleNamespace(attention_dropout=0.0))
    found = attention(*inputs, packed_seq_params=packing)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    wanted = defined(*exact, cu_seqlens)
    allowed = 1e-5 if dtype == torch.float32 else 1e-2
    assert relative_difference(found, wanted) < allowed
    gradients = torch.autograd.grad((found * weights).sum(), inputs)
    for gradient, expected in zip(gradients, torch.autograd.grad((wanted * weights).sum(), exact), strict=True):
        assert relative_difference(gradient, expected) < allowed


def defined(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_seqlens: list[int]) -> torch.Tensor:
    """[tokens, heads * dim] from the whole score matrix and an explicit mask."""
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    document = torch.repeat_interleave(torch.tensor(cu_seqlens, device=query.device).diff())
    allowed = (document[:, None] == document[None]).tril()
    scores = torch.einsum("qhd,khd->hqk", query, key) / query.shape[-1] ** 0.5
    weights = scores.masked_fill(~allowed, -torch.inf).softmax(dim=-1)
    return torch.einsum("hqk,khd->qhd", weights, value).flatten(1)


def relative_difference(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.detach().double() - wanted.detach()).norm() / wanted.detach().norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weight_gradients_are_added_to_their_sum(dtype: torch.dtype) -> None:
    """In bf16 too without rounding the sum, or what is added to it."""
    import megatron.core.tensor_parallel.layers as layers

    generator = torch.Generator(device="cuda").manual_seed(1)
    inputs, grad_output = (torch.randn(300, width, generator=generator, device="cuda").to(dtype) for width in (96, 160))
    total = torch.randn(160, 96, generator=generator, device="cuda")
    wanted = total.double() + grad_output.double().t() @ inputs.double()
    layers.fused_weight_gradient_mlp_cuda.wgrad_gemm_accum_fp32(inputs, grad_output, total)
    assert relative_difference(total, wanted) < 1e-6
