"""CPU: the same megatron-core code paths under gloo, so that a laptop and CI run real TP x PP x DP.

megatron-core 0.16 assumes CUDA in a handful of places, and takes detours in others that cost time on a CPU only. Each
function below mends one of them, says why, and has a test that fails when megatron-core changes there. All are applied once,
by `prepare()`, and only on CPU; but for `without_compiler`, which ends with the import of megatron-core.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import math
import os
import platform
import resource
import sys
import types
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from megatron_cpt.platforms.base import FUSIONS, needs_transformer_engine
from megatron_cpt.platforms.torch_fusions import (
    add_weight_gradients_where_they_are_summed,
    rotate_in_one_function,
    scale_gradients_in_place,
)

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_cpt.config.parallel import ParallelConfig
    from megatron_cpt.config.run import TrainingConfig
    from megatron_cpt.mixture.loader import Batch

# Where megatron-core allocates with a literal device="cuda", and through which factories.
MODULES_WITH_LITERAL_CUDA = (
    "dist_checkpointing.exchange_utils",
    "dist_checkpointing.strategies.state_dict_saver",
    "distributed.param_and_grad_buffer",
    "optimizer.clip_grads",
    "optimizer.grad_scaler",
    "optimizer.optimizer",
    "pipeline_parallel.schedules",
    "rerun_state_machine",
    "utils",
)
# megatron-core takes their kernels where they are installed, as in containers, and these want tensors on a GPU. Without one
# their own libraries may not even load, which ends the import of megatron-core.
GPU_KERNELS = ("transformer_engine", "apex")
FACTORIES = ("tensor", "empty", "empty_like", "zeros", "ones")
NORM_ROW = 128  # numbers whose squares are added up in fp32 before fp64 takes over


class CpuPlatform:
    """Any machine without a GPU."""

    name = "cpu"
    backend = "gloo"

    @contextlib.contextmanager
    def importing(self) -> Iterator[None]:
        from megatron_cpt.platforms.everywhere import quiet, withheld

        # On a login node with CUDA's compiler: "No CUDA runtime is found", before everything that a tool has to say
        with withheld(*GPU_KERNELS, "wandb"), quiet("torch.utils.cpp_extension"), without_compiler():
            yield

    def prepare(self) -> None:
        import megatron.core.jit

        from megatron_cpt.platforms.everywhere import hide, save_without_queue_server

        for package in GPU_KERNELS:  # for what megatron-core imports later
            hide(package)
        megatron.core.jit.disable_jit_fuser()
        redirect_factories()
        answer_for_cuda_runtime()
        name_tensor_types_as_on_cuda()
        use_cpu_rng_state()
        leave_out_collectives_of_one()
        scale_gradients_in_place()
        add_up_gradient_norms_exactly()
        find_largest_logits_without_their_places()
        add_weight_gradients_where_they_are_summed()
        add_embedding_gradients_where_they_are_summed()
        rotate_in_one_function()
        write_gradients_of_swiglu_once()
        from megatron_cpt.platforms.fused_adam import install_fused_adam
        from megatron_cpt.platforms.torch_layers import recompute_norms_without_fp8

        install_fused_adam()  # torch's AdamW cannot be saved and resharded by the distributed optimizer
        recompute_norms_without_fp8()
        save_without_queue_server()

    def device(self, local_rank: int) -> torch.device:
        return torch.device("cpu")

    def before_layers(self, parallel: ParallelConfig, training: TrainingConfig, seq_length: int, hidden_size: int) -> None:
        pass

    def transformer_impl(self, params_dtype: torch.dtype) -> str:
        return "local"

    def block_spec(self, config: TransformerConfig, vp_stage: int | None = None) -> TransformerBlockSubmodules:
        from megatron_cpt.platforms.torch_layers import torch_block_spec

        return torch_block_spec(config, vp_stage)

    def refuses(self, parallel: ParallelConfig, training: TrainingConfig) -> str | None:
        if training.transformer_impl == "transformer_engine":
            return (
                "training.transformer_impl is transformer_engine, which needs a GPU, and this run is on CPU; expected local"
            )
        return needs_transformer_engine(parallel, training, "this run is on CPU")

    def fusions(self, params_dtype: torch.dtype, transformer_impl: str) -> dict[str, bool]:
        return {name: name in ("gradient_accumulation_fusion", "bias_activation_fusion") for name in FUSIONS}

    def monitored(self) -> contextlib.AbstractContextManager[Callable[[], None]]:
        return contextlib.nullcontext(lambda: None)

    def page_locked(self, batch: Batch) -> Batch:
        return batch

    def peak_memory_bytes(self) -> int:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB

    def device_name(self) -> str:
        return cpu_model()

    def peak_tflops(self) -> float | None:
        return None  # depends on cores, clock and vector units: no one number is right

    def library_versions(self) -> dict[str, str]:
        return {}


def cpu_model(cpuinfo: str = "/proc/cpuinfo") -> str:
    """The processor's name; its architecture where the system does not tell."""
    if os.path.exists(cpuinfo):
        with open(cpuinfo, encoding="utf-8", errors="replace") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


@contextlib.contextmanager
def without_compiler() -> Iterator[None]:
    """megatron-core wraps its small fusions in torch.compile as it is imported, which imports the whole compiler.

    None of them is used on CPU, and the compiler takes longer to import than everything else (docs/platforms.md).
    """
    compile_ = torch.compile
    torch.compile = lambda function=None, **_: function  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = compile_


def redirect_factories() -> None:
    """Allocation with a literal device="cuda" (schedules, optimizers, clipping) goes to the CPU.

    Only the modules that do so see other factories: torch itself keeps its own, because device contexts
    (`with torch.device("meta")`, as transformers uses) recognise them by identity.
    """
    for name in MODULES_WITH_LITERAL_CUDA:
        module = importlib.import_module(f"megatron.core.{name}")
        module.torch = TorchOnCpu("torch")  # type: ignore[attr-defined]


class TorchOnCpu(types.ModuleType):
    """torch, but its factories read device="cuda" as "cpu"."""

    def __getattr__(self, name: str) -> Any:
        value = getattr(torch, name)
        if name in FACTORIES:
            value = factory_on_cpu(value)
        setattr(self, name, value)  # found directly next time
        return value


def factory_on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """A tensor factory that reads device="cuda" as "cpu"."""

    @functools.wraps(factory)
    def allocate(*args: Any, **kwargs: Any) -> torch.Tensor:
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        return factory(*args, **kwargs)

    return allocate


def answer_for_cuda_runtime() -> None:
    """The few CUDA runtime calls on the training path: the current device, waiting for it, moving there, its generator."""
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment,return-value]
    torch.cuda.synchronize = lambda device=None: None
    torch.cuda.current_stream = lambda device=None: NoStream()  # type: ignore[assignment,return-value]
    torch.cuda.get_rng_state = lambda device=None: torch.get_rng_state()
    torch.cuda.set_rng_state = lambda new_state, device=None: torch.set_rng_state(new_state)
    torch.cuda.manual_seed = lambda seed: torch.manual_seed(seed)  # type: ignore[assignment]
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]


class NoStream:
    """Stands for a CUDA stream: on a CPU everything before has been computed already."""

    def wait_stream(self, stream: Any) -> None:
        """Nothing to wait for."""

    def wait_event(self, event: Any) -> None:
        """Nothing to wait for."""


def name_tensor_types_as_on_cuda() -> None:
    """The optimizers sort parameters by `param.type() == "torch.cuda.FloatTensor"`."""
    cpu_type = torch.Tensor.type

    def type_as_on_cuda(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:
            return cpu_type(self, *args, **kwargs)
        return "torch.cuda." + cpu_type(self).removeprefix("torch.")

    torch.Tensor.type = type_as_on_cuda  # type: ignore[assignment,method-assign]


def use_cpu_rng_state() -> None:
    """The RNG tracker (weight initialisation, dropout, recomputation) forks the CUDA generator: fork torch's instead."""
    import megatron.core.tensor_parallel.random as random

    def get_state(device: Any = None, clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(new_state: torch.Tensor, device: Any = None, graph_safe: bool = False) -> None:
        torch.set_rng_state(new_state)

    random._get_cuda_rng_state, random._set_cuda_rng_state = get_state, set_state


def leave_out_collectives_of_one() -> None:
    """Without data parallelism gloo copies all parameters and gradients onto themselves in every step.

    And what a checkpoint gathers, more than 32 kB, it copies with a second set of OpenMP threads. With more of them than
    processors, OpenMP puts them all to sleep between operations, for the rest of the run.
    """
    import megatron.core.distributed.param_and_grad_buffer as buffers
    import torch.distributed.distributed_c10d as distributed_c10d

    for name in ("all_gather", "gather"):  # of which those of objects are made
        setattr(distributed_c10d, name, copied_if_alone(getattr(distributed_c10d, name)))

    buffers.dist_all_gather_func = unless_alone(buffers.dist_all_gather_func)
    buffers.dist_reduce_scatter_func = unless_alone(buffers.dist_reduce_scatter_func)


def unless_alone(collective: Callable[..., Any]) -> Callable[..., Any]:
    """A collective that does nothing in a group of one whose output is its input."""

    @functools.wraps(collective)
    def run(output: torch.Tensor, values: torch.Tensor, *, group: Any, **kwargs: Any) -> Any:
        if group.size() == 1 and output.is_set_to(values):
            return None
        return collective(output, values, group=group, **kwargs)

    return run


def copied_if_alone(collective: Callable[..., Any]) -> Callable[..., Any]:
    """A gathering collective that in a group of one copies on the thread that calls it."""

    @functools.wraps(collective)
    def gather(*args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(collective).bind(*args, **kwargs).arguments
        results = given.get("tensor_list", given.get("gather_list"))
        if torch.distributed.get_world_size(given.get("group")) > 1 or given.get("async_op") or results is None:
            return collective(*args, **kwargs)
        results[0].copy_(given["tensor"])
        return None

    return gather


def add_up_gradient_norms_exactly() -> None:
    """torch's fp32 norm of a whole tensor on a CPU loses digits with its length: 1.6e-3 of 28 million numbers."""
    import megatron.core.optimizer.clip_grads as clip_grads

    def l2_norm(
        chunk_size: int, noop_flag: Any, tensor_lists: list[list[torch.Tensor]], per_tensor: bool
    ) -> tuple[torch.Tensor, None]:
        """In the place of local_multi_tensor_l2_norm. [1] in fp32, which all ranks reduce, those without gradients too."""
        squares = sum(sum_of_squares(tensor) for tensor in tensor_lists[0])
        return torch.tensor([math.sqrt(squares)], dtype=torch.float32), None

    clip_grads.l2_norm_impl = l2_norm


def sum_of_squares(tensor: torch.Tensor) -> float:
    """Sum of the squares of a tensor's numbers; relative error below 1e-7 whatever its size."""
    values = tensor.detach().flatten()
    whole = values.numel() // NORM_ROW * NORM_ROW
    rows = torch.linalg.vector_norm(values[:whole].view(-1, NORM_ROW), dim=1, dtype=torch.float32)
    return float(rows.double().square().sum() + values[whole:].double().square().sum())


def find_largest_logits_without_their_places() -> None:
    """The cross-entropy subtracts each token's largest logit; torch.max also says where it is, which takes much longer."""
    from megatron.core.tensor_parallel.cross_entropy import VocabParallelCrossEntropy

    def calculate_logits_max(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = logits.float()
        return logits, logits.amax(dim=-1)

    VocabParallelCrossEntropy.calculate_logits_max = staticmethod(calculate_logits_max)


def add_embedding_gradients_where_they_are_summed() -> None:
    """torch makes each micro-batch's gradient of the whole embedding, nearly all zeros, which is then added to their sum.

    If the output layer has the same weight, megatron-core fills one more tensor of that size with zeros for autograd to add
    to it. Only the rows that were looked up have something to add.
    """
    import megatron.core.tensor_parallel.layers as layers

    class Embedding(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, weight: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
            ctx.weight = weight  # itself, for its attributes
            ctx.save_for_backward(ids)
            return torch.nn.functional.embedding(ids, weight)

        @staticmethod
        def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, None]:
            weight, (ids,) = ctx.weight, ctx.saved_tensors
            weight.main_grad.index_add_(0, ids.flatten(), grad_output.flatten(0, -2).to(weight.main_grad.dtype))
            weight.grad_added_to_main_grad = True
            # The hook on the gradient wants one, and takes nothing from it; the output layer gives it for a shared weight.
            return (None if hasattr(weight, "zero_out_wgrad") else torch.empty_like(weight)), None

    def embedding(ids: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """ids [b, s], weight [words, h] -> [b, s, h]"""
        if not (torch.is_grad_enabled() and hasattr(weight, "main_grad")):
            return torch.nn.functional.embedding(ids, weight)
        if hasattr(weight, "zero_out_wgrad"):
            weight.zero_out_wgrad = False
        return Embedding.apply(weight, ids)

    layers.F = types.SimpleNamespace(embedding=embedding)


def write_gradients_of_swiglu_once() -> None:
    """megatron-core's fused SwiGLU, without a compiler to fuse it, takes a dozen tensors and copies two of them."""
    import megatron.core.fusions.fused_bias_swiglu as fused_bias_swiglu

    def swiglu_back(g: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """g [..., h], gates and values y [..., 2h] -> the gradient of y"""
        result = torch.empty_like(y)
        (gate, value), (grad_gate, grad_value) = y.chunk(2, dim=-1), result.chunk(2, dim=-1)
        torch.mul(g, torch.nn.functional.silu(gate), out=grad_value)
        torch.ops.aten.silu_backward.grad_input(g * value, gate, grad_input=grad_gate)
        return result

    fused_bias_swiglu.swiglu_back = swiglu_back
