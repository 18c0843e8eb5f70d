"""What megatron-core takes from Apex or Transformer Engine, in torch: on CPU, and on a GPU where these are not installed."""

from __future__ import annotations

import functools
import types
from typing import Any

import torch


def scale_gradients_in_place() -> None:
    """Without Apex and Transformer Engine, clipping makes a scaled copy of each gradient and copies it back."""
    import megatron.core.optimizer.clip_grads as clip_grads

    def scale(chunk_size: int, overflow: Any, tensor_lists: list[list[torch.Tensor]], factor: float) -> None:
        values, results = tensor_lists
        if values is not results:
            raise ValueError("expected to scale in place")
        torch._foreach_mul_(results, factor)

    clip_grads.multi_tensor_scale_impl = scale


def add_weight_gradients_where_they_are_summed() -> None:
    """Apex's kernel that adds a micro-batch's weight gradient to their sum as it computes it; megatron-core needs its name.

    Otherwise each gradient gets memory of its own first.
    """
    import megatron.core.tensor_parallel.layers as layers

    def wgrad_gemm_accum(inputs: torch.Tensor, grad_output: torch.Tensor, main_grad: torch.Tensor) -> None:
        """inputs [tokens, in], grad_output [tokens, out], main_grad [out, in]: fp32, or bf16 (grad_reduce_in_bf16)"""
        if inputs.dtype == main_grad.dtype:
            torch.addmm(main_grad, grad_output.t(), inputs, out=main_grad)  # torch's FLOP counter knows no addmm_
        elif inputs.is_cuda and "dtype_out" in torch.ops.aten.addmm.overloads():
            torch.addmm(main_grad, grad_output.t(), inputs, out_dtype=main_grad.dtype, out=main_grad)
        else:
            main_grad.add_(grad_output.t() @ inputs)

    layers.fused_weight_gradient_mlp_cuda = types.SimpleNamespace(
        wgrad_gemm_accum_fp32=wgrad_gemm_accum, wgrad_gemm_accum_fp16=wgrad_gemm_accum
    )
    layers._grad_accum_fusion_available = True


def rotate_in_one_function() -> None:
    """The rotary embedding as a product, a half turned round, another product and a sum leaves each for autograd to undo.

    The gradient of a rotation is the rotation by the opposite angles.
    """
    import megatron.core.models.common.embeddings.rope_utils as rope_utils

    step_by_step = rope_utils._apply_rotary_pos_emb_bshd

    class Rotation(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, values: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(angles)
            return rotated(values, angles, 1)

        @staticmethod
        def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor, None]:
            (angles,) = ctx.saved_tensors
            return rotated(grad_output, angles, -1), None

    @functools.wraps(step_by_step)
    def apply(t: torch.Tensor, freqs: torch.Tensor, *args: Any, mscale: float = 1.0, **options: Any) -> torch.Tensor:
        if t.shape[-1] != freqs.shape[-1] or mscale != 1 or any(args) or any(options.values()):
            return step_by_step(t, freqs, *args, mscale=mscale, **options)
        return Rotation.apply(t, freqs)

    rope_utils._apply_rotary_pos_emb_bshd = apply


def rotated(values: torch.Tensor, angles: torch.Tensor, sense: int) -> torch.Tensor:
    """values [s, b, heads, dim], angles [s, 1, 1, dim] whose halves are the same, sense 1 or -1 -> [s, b, heads, dim]"""
    angles = angles.chunk(2, dim=-1)[0]
    cosine, sine = angles.cos().to(values.dtype), angles.sin().to(values.dtype)
    result = torch.empty_like(values, memory_format=torch.contiguous_format)
    (first, second), (new_first, new_second) = values.chunk(2, dim=-1), result.chunk(2, dim=-1)
    torch.mul(first, cosine, out=new_first).addcmul_(second, sine, value=-sense)
    torch.mul(second, cosine, out=new_second).addcmul_(first, sine, value=sense)
    return result
