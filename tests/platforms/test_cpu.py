"""One test for each adaptation of megatron-core to CPU: it fails when megatron-core no longer needs it, or needs more."""

from __future__ import annotations

import inspect
import math
import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

from megatron_cpt.config.parallel import ParallelConfig
from megatron_cpt.platforms import cpu, current_platform, prepare_platform
from megatron_cpt.platforms.fused_adam import FusedAdam
from megatron_cpt.platforms.process_groups import process_groups

pytestmark = pytest.mark.skipif(current_platform().name != "cpu", reason="adaptations are applied on CPU only")


@pytest.fixture(scope="module", autouse=True)
def _prepared() -> None:
    prepare_platform()


def python(code: str, **environment: str) -> str:
    """What a fresh interpreter prints."""
    environ = os.environ | environment
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=environ)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.mark.parametrize("name", cpu.MODULES_WITH_LITERAL_CUDA)
def test_each_redirected_module_allocates_with_a_literal_cuda(name: str) -> None:
    module = import_module(f"megatron.core.{name}")
    source = Path(str(module.__file__)).read_text()
    assert re.search(r"""device=["']cuda["']""", source), f"{name} needs no redirection any more"
    assert module.torch.zeros(2, device="cuda").device.type == "cpu"
    assert module.torch.nn is torch.nn


def test_torch_itself_keeps_its_factories() -> None:
    assert not hasattr(torch.zeros, "__wrapped__")
    with torch.device("meta"):  # recognises factories by identity
        assert torch.zeros(2).device.type == "meta"


def test_cuda_runtime_answers_for_the_cpu() -> None:
    assert torch.cuda.current_device() == torch.device("cpu")
    torch.cuda.synchronize()
    tensor = torch.ones(2)
    assert tensor.cuda() is tensor
    torch.cuda.manual_seed(3)
    first = torch.rand(2)
    torch.manual_seed(3)
    assert torch.equal(torch.rand(2), first)


def test_optimizers_sort_parameters_by_cuda_type_names() -> None:
    import megatron.core.optimizer.distrib_optimizer as distrib_optimizer

    source = Path(str(distrib_optimizer.__file__)).read_text()
    assert "param.type() == 'torch.cuda.FloatTensor'" in source, "no type names any more: drop the adaptation"
    assert torch.zeros(1).type() == "torch.cuda.FloatTensor"
    assert torch.zeros(1, dtype=torch.bfloat16).type() == "torch.cuda.BFloat16Tensor"
    assert torch.zeros(1).type(torch.float64).dtype == torch.float64


def test_a_group_of_one_moves_nothing() -> None:
    import megatron.core.distributed.param_and_grad_buffer as buffers

    assert buffers.dist_all_gather_func.__wrapped__ is torch.distributed.all_gather_into_tensor
    assert buffers.dist_reduce_scatter_func.__wrapped__ is torch.distributed.reduce_scatter_tensor
    moved = []
    collective = cpu.unless_alone(lambda output, values, group, **_: moved.append(group.size()))
    buffer = torch.arange(6.0)
    with process_groups(ParallelConfig()):
        group = torch.distributed.group.WORLD
        collective(buffer, buffer.view(1, -1)[0], group=group)
        assert moved == []
        collective(buffer[:3], buffer[3:], group=group)
        assert moved == [1]  # elsewhere: it has to be copied
        other = torch.zeros(3)
        buffers.dist_all_gather_func(other, buffer[3:], group=group, async_op=False)
        assert other.tolist() == [3.0, 4.0, 5.0]


def test_gradients_are_scaled_where_they_are() -> None:
    import megatron.core.optimizer.clip_grads as clip_grads
    from megatron.core.utils import local_multi_tensor_scale

    assert "src * scale" in inspect.getsource(local_multi_tensor_scale), "no copy any more: drop the adaptation"
    ours, theirs = ([torch.tensor([1.0, -3.0]), torch.tensor([0.1])] for _ in range(2))
    clip_grads.multi_tensor_applier(clip_grads.multi_tensor_scale_impl, None, [ours, ours], 0.3)
    local_multi_tensor_scale(0, None, [theirs, theirs], 0.3)
    assert all(map(torch.equal, ours, theirs))
    with pytest.raises(ValueError, match="in place"):
        clip_grads.multi_tensor_scale_impl(0, None, [ours, theirs], 0.3)


@pytest.mark.parametrize("kind", ["normal", "equal", "growing", "bf16"])
def test_gradient_norms_are_exact_whatever_the_size(kind: str) -> None:
    import megatron.core.optimizer.clip_grads as clip_grads
    from megatron.core.utils import local_multi_tensor_l2_norm

    assert "torch.norm(tensor)" in inspect.getsource(local_multi_tensor_l2_norm), "another way now: drop the adaptation"
    size = 3_000_001
    values = {
        "normal": lambda: torch.randn(size, generator=torch.Generator().manual_seed(1)) * 1e-5,
        "equal": lambda: torch.full((size,), 0.1),
        "growing": lambda: torch.logspace(-12, 3, size),
        "bf16": lambda: torch.full((size,), 0.1, dtype=torch.bfloat16),
    }[kind]()
    gradients = [values[:-1].view(1000, 3000), torch.zeros(0), values[-1:]]
    exact = float(values.double().square().sum().sqrt())
    with process_groups(ParallelConfig()):
        found = clip_grads.get_grad_norm_fp32(gradients, grad_stats_parallel_group=torch.distributed.group.WORLD)
        nothing = clip_grads.get_grad_norm_fp32([], grad_stats_parallel_group=torch.distributed.group.WORLD)
    assert found == pytest.approx(exact, rel=2e-7)
    assert nothing == 0.0


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_gradient_that_is_not_finite_has_no_finite_norm(value: float) -> None:
    for place in (5, cpu.NORM_ROW + 3):  # in a whole row, and in what is left
        tensor = torch.ones(cpu.NORM_ROW + 7)
        tensor[place] = value
        assert not math.isfinite(cpu.sum_of_squares(tensor))


def test_largest_logits_are_megatrons() -> None:
    source = Path(str(import_module("megatron.core.tensor_parallel.cross_entropy").__file__)).read_text()
    assert "torch.max(vocab_parallel_logits, dim=-1)[0]" in source, "another way now: drop the adaptation"
    from megatron.core.tensor_parallel.cross_entropy import VocabParallelCrossEntropy

    logits = torch.randn(3, 2, 50, dtype=torch.bfloat16)
    found, largest = VocabParallelCrossEntropy.calculate_logits_max(logits)
    assert found.dtype == torch.float32
    assert torch.equal(largest, logits.float().max(dim=-1)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weight_gradients_are_added_to_their_sum(dtype: torch.dtype) -> None:
    import megatron.core.tensor_parallel.layers as layers

    assert "import fused_weight_gradient_mlp_cuda" in inspect.getsource(layers), "another name now"
    inputs, grad_output, total = torch.randn(7, 3).to(dtype), torch.randn(7, 5).to(dtype), torch.ones(5, 3)
    expected = 1 + grad_output.float().t() @ inputs.float()
    layers.fused_weight_gradient_mlp_cuda.wgrad_gemm_accum_fp32(inputs, grad_output, total)
    assert torch.allclose(total, expected, rtol=1e-5 if dtype == torch.float32 else 2e-2, atol=2e-2)
    in_bf16 = torch.ones(5, 3, dtype=torch.bfloat16)  # grad_reduce_in_bf16
    layers.fused_weight_gradient_mlp_cuda.wgrad_gemm_accum_fp16(inputs.bfloat16(), grad_output.bfloat16(), in_bf16)
    assert torch.allclose(in_bf16.float(), expected, rtol=2e-2, atol=5e-2)


@pytest.mark.parametrize(("dtype", "tied"), [(torch.float32, False), (torch.float32, True), (torch.bfloat16, False)])
def test_embedding_gradients_are_added_to_their_sum(dtype: torch.dtype, tied: bool) -> None:
    import megatron.core.tensor_parallel.layers as layers

    source = inspect.getsource(layers)
    assert set(re.findall(r"\bF\.\w+", source)) == {"F.embedding"}, "F is used for something else now"
    assert 'if getattr(weight, "zero_out_wgrad", False)' in source, "shared weights are handled in another way now"
    ids, weight = torch.tensor([[3, 1, 3], [0, 3, 1]]), torch.nn.Parameter(torch.randn(5, 4, dtype=dtype))
    expected = 1 + torch.autograd.grad(torch.nn.functional.embedding(ids, weight).square().sum(), weight)[0].float()
    weight.main_grad, weight.grad_added_to_main_grad = torch.ones(5, 4), False  # type: ignore[attr-defined]
    if tied:
        weight.zero_out_wgrad = True  # type: ignore[attr-defined]
    output = layers.F.embedding(ids, weight)
    assert torch.equal(output, weight[ids])
    output.square().sum().backward()
    assert torch.allclose(weight.main_grad, expected, rtol=1e-6 if dtype == torch.float32 else 2e-2)  # type: ignore[attr-defined]
    assert weight.grad_added_to_main_grad  # type: ignore[attr-defined]
    # For a shared weight the output layer gives the gradient that the hook waits for, and it need not be zeros any more.
    assert (weight.grad is None) == tied
    assert not getattr(weight, "zero_out_wgrad", False)


def test_embeddings_outside_of_training_are_torchs() -> None:
    import megatron.core.tensor_parallel.layers as layers

    ids, weight = torch.tensor([2, 0]), torch.nn.Parameter(torch.randn(3, 4))
    layers.F.embedding(ids, weight).sum().backward()
    assert weight.grad is not None
    assert torch.equal(weight.grad, torch.tensor([1.0, 0.0, 1.0])[:, None].expand(3, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotation_is_megatrons(dtype: torch.dtype) -> None:
    import megatron.core.models.common.embeddings.rope_utils as rope_utils

    apply = rope_utils._apply_rotary_pos_emb_bshd
    step_by_step = inspect.unwrap(apply)
    assert "torch.cat((t, t_pass), dim=-1)" in inspect.getsource(step_by_step), "another way now: look at it"
    angles = torch.rand(7, 1, 1, 3).repeat(1, 1, 1, 2) * 9
    wide = torch.randn(7, 2, 3, 10, dtype=dtype)
    wanted = torch.randn(7, 2, 3, 6, dtype=dtype)
    results = []
    for rotate in (apply, step_by_step):
        values = wide.clone().requires_grad_()
        rotated = rotate(values[..., 2:8], angles)  # a view, as queries and keys are
        rotated.backward(wanted)
        assert values.grad is not None
        results.append((rotated.float(), values.grad.float()))
    for ours, theirs in zip(*results, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6 if dtype == torch.float32 else 3e-2)


def test_other_rotations_are_left_to_megatron() -> None:
    import megatron.core.models.common.embeddings.rope_utils as rope_utils

    angles, values = torch.rand(7, 1, 1, 4), torch.randn(7, 2, 3, 8)
    partly = rope_utils._apply_rotary_pos_emb_bshd(values, angles)
    assert torch.equal(partly[..., 4:], values[..., 4:])
    interleaved = rope_utils._apply_rotary_pos_emb_bshd(values[..., :4], angles, rotary_interleaved=True)
    assert not torch.allclose(interleaved, partly[..., :4])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swiglu_and_its_gradient(dtype: torch.dtype) -> None:
    from megatron.core.fusions.fused_bias_swiglu import bias_swiglu_impl

    values, wanted = torch.randn(5, 2, 6, dtype=dtype, requires_grad=True), torch.randn(5, 2, 3, dtype=dtype)
    gate, value = values.chunk(2, dim=-1)
    expected = torch.nn.functional.silu(gate) * value
    (gradient,) = torch.autograd.grad(expected, values, wanted)
    output = bias_swiglu_impl(values, None)
    output.backward(wanted)
    assert torch.equal(output, expected)
    assert torch.allclose(values.grad, gradient, atol=1e-6 if dtype == torch.float32 else 3e-2)


def test_objects_are_gathered_alone_as_in_a_group() -> None:
    with process_groups(ParallelConfig()):
        found: list[object] = [None]
        torch.distributed.all_gather_object(found, {"a": list(range(40_000))})
        assert found == [{"a": list(range(40_000))}]
        torch.distributed.gather_object("b" * 40_000, found, dst=0)
        assert found == ["b" * 40_000]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads as Linux does")
def test_gathering_alone_starts_no_openmp_threads() -> None:
    program = """
import os
import torch
from megatron_cpt.config.parallel import ParallelConfig
from megatron_cpt.platforms.process_groups import process_groups
torch.set_num_threads(2)
with process_groups(ParallelConfig()):
    torch.ones(100_000) + 1  # starts those of this thread
    before = len(os.listdir("/proc/self/task"))
    torch.distributed.all_gather_object([None], b"0" * 100_000)
    torch.distributed.gather_object(b"0" * 100_000, [None], dst=0)
    print(len(os.listdir("/proc/self/task")) - before)
"""
    assert python(program) == "0"


def test_rng_tracker_forks_torchs_generator() -> None:
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    with process_groups(ParallelConfig()):
        torch.manual_seed(1)
        expected = torch.rand(2)
        torch.manual_seed(1)
        with get_cuda_rng_tracker().fork():
            inside = torch.rand(2)
        assert torch.equal(torch.rand(2), expected)  # the fork left the outer generator alone
        assert not torch.equal(inside, expected)


def test_saving_starts_no_queue_server(monkeypatch: pytest.MonkeyPatch) -> None:
    import megatron.core.dist_checkpointing.strategies.filesystem_async as filesystem_async

    queue_of = getattr(filesystem_async, "_get_write_results_queue", None) or filesystem_async.get_write_results_queue
    assert queue_of() is filesystem_async._results_queue
    started: list[str] = []
    monkeypatch.setattr(filesystem_async, "_results_queue", None)
    monkeypatch.setattr(filesystem_async.mp, "get_context", lambda method: started.append(method) or _NoManager())
    queue_of()
    assert started == ["spawn"], "megatron-core starts no manager process any more: drop the adaptation"


class _NoManager:
    def Manager(self) -> _NoManager:
        return self

    def Queue(self) -> object:
        return object()


def test_the_compiler_is_not_imported() -> None:
    code = "import sys, megatron_cpt.training.pretrain; print('torch._inductor' in sys.modules)"
    assert python(code) == "False"
    assert python("import sys, megatron.core; print('torch._inductor' in sys.modules)") == "True", "no longer needed"


def broken_packages(folder: Path) -> None:
    """A Transformer Engine whose extension for torch is missing, and an Apex of another torch."""
    for name, error in (("transformer_engine", "FileNotFoundError"), ("apex", "ImportError"), ("amp_C", "ImportError")):
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text(f"raise {error}('no shared object file')\n")


def test_kernels_that_want_a_gpu_are_not_taken(tmp_path: Path) -> None:
    """In a container on a login node: with Transformer Engine or Apex that cannot load, or would compute on a GPU."""
    broken_packages(tmp_path)
    code = """if True:
        import megatron_cpt.training.pretrain
        from megatron_cpt.platforms import prepare_platform
        prepare_platform()
        from megatron.core.optimizer import optimizer
        from megatron.core.utils import local_multi_tensor_scale, local_multi_tensor_applier
        assert optimizer.multi_tensor_applier is local_multi_tensor_applier
        from megatron_cpt.platforms.cuda import has_transformer_engine
        print(has_transformer_engine())
    """
    assert python(code, PYTHONPATH=f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}") == "False"


def test_wandb_is_imported_by_those_who_log_to_it() -> None:
    code = (
        "import sys, megatron_cpt.training.pretrain; print('wandb' in sys.modules); import wandb; print(wandb.init.__name__)"
    )
    assert python(code).split() == ["False", "init"]


def test_megatron_takes_our_adam_for_apexs() -> None:
    import megatron.core.optimizer as optimizer
    import megatron.core.optimizer.distrib_optimizer as distrib_optimizer

    assert optimizer.Adam is distrib_optimizer.Adam is FusedAdam
    assert distrib_optimizer.USING_APEX_OPTIMIZER
    assert not optimizer.USING_PYTORCH_OPTIMIZER


def test_an_unknown_platform_is_refused() -> None:
    code = (
        "import os; os.environ['MEGATRON_CPT_PLATFORM'] = 'tpu'\n"
        "from megatron_cpt.platforms import current_platform\n"
        "try:\n    current_platform()\nexcept ValueError as error:\n    print(error)"
    )
    assert python(code) == "MEGATRON_CPT_PLATFORM is 'tpu'; expected 'cpu' or 'cuda'"


def test_recomputing_norms_does_not_ask_transformer_engine() -> None:
    import inspect

    from megatron.core.tensor_parallel.random import CheckpointWithoutOutput

    (fp8,) = [p for name, p in inspect.signature(CheckpointWithoutOutput.__init__).parameters.items() if name != "self"]
    assert fp8.name == "fp8"
    assert fp8.default is None
    source = inspect.getsource(CheckpointWithoutOutput.__init__)
    assert "is not None" in source, "megatron-core asks otherwise now: see whether the adaptation is needed"
