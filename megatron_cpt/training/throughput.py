"""Tokens per second and model FLOPs utilisation."""

from __future__ import annotations

from megatron_cpt.model.flops import utilisation


def step_throughput(
    seconds: float, tokens: int, world_size: int, flops: tuple[float, float], peak_tflops: float | None
) -> dict[str, float]:
    """What one step of `tokens` tokens in `seconds` comes to.

    Args:
        world_size: devices of the run
        flops: operations per token by both formulas of `model/flops.py`: full attention scores, then causal
        peak_tflops: dense bf16 peak of one device; without it there is no utilisation

    Returns:
        tokens_per_second, tokens_per_second_per_device; with a peak also mfu and mfu_causal, as parts of 1
    """
    rate = tokens / seconds
    values = {"tokens_per_second": rate, "tokens_per_second_per_device": rate / world_size}
    if peak_tflops is None:
        return values
    full, causal = (utilisation(rate / world_size, per_token, peak_tflops) for per_token in flops)
    return values | {"mfu": full, "mfu_causal": causal}
