"""Speed of training steps of layers of a real size, as JSON: ... measure_steps TARGET SETTINGS (JSON of `Stack`).

The weights are random and so are the tokens: what is measured is the engine, without data and checkpoints.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import megatron_cpt.platforms.imported_megatron  # noqa: F401  isort: skip  (before megatron is imported)
import numpy as np
import torch

from megatron_cpt.config.parallel import ParallelConfig
from megatron_cpt.config.run import CheckpointConfig, OptimizerConfig, RunConfig, TrainingConfig
from megatron_cpt.mixture.loader import Batch
from megatron_cpt.planning.presets import find_model
from megatron_cpt.platforms import current_platform
from megatron_cpt.platforms.process_groups import launched_world_size, process_groups
from megatron_cpt.training.launch import set_numerics
from megatron_cpt.training.model_setup import build
from megatron_cpt.training.step import StepShape, train_step
from megatron_cpt.utils.logs import start_logs

WARM_UP, STEPS = 3, 7


@dataclass(frozen=True)
class Stack:
    """Layers of a model, and the batch that they get.

    Attributes:
        model: name of the planner's preset
        layers: of its layers
        microbatches: of each process in a step
    """

    model: str
    layers: int
    seq_length: int
    micro_batch_size: int
    microbatches: int
    params_dtype: str
    transformer_impl: str | None = None
    fp8: str | None = None
    fp8_recipe: str = "tensorwise"

    @property
    def global_batch_size(self) -> int:
        """Samples of a step over all processes."""
        return self.micro_batch_size * self.microbatches * launched_world_size()

    def training(self) -> TrainingConfig:
        """As a run would be told."""
        return TrainingConfig(
            train_iters=WARM_UP + STEPS,
            micro_batch_size=self.micro_batch_size,
            global_batch_size=self.global_batch_size,
            params_dtype=self.params_dtype,  # type: ignore[arg-type]
            transformer_impl=self.transformer_impl,  # type: ignore[arg-type]
            fp8=self.fp8,  # type: ignore[arg-type]
            fp8_recipe=self.fp8_recipe,  # type: ignore[arg-type]
        )


def main(target: str, settings: str) -> None:
    """Train, and write seconds and memory on the first rank."""
    stack = Stack(**json.loads(settings))
    llama = dataclasses.replace(find_model(stack.model), num_hidden_layers=stack.layers)
    several = launched_world_size() > 1
    parallel = ParallelConfig(overlap_grad_reduce=several, overlap_param_gather=several)
    config = RunConfig("", CheckpointConfig("", ""), stack.training(), parallel=parallel)
    set_numerics(config.training)
    with process_groups(parallel, 1) as ranks:
        chunks, optimizer = build(config, llama, stack.seq_length, ranks)
        with torch.no_grad():
            for parameter in chunks[0].parameters():
                parameter.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.0 if parameter.ndim == 1 else 0.02)
        optimizer.reload_model_params()
        shape = StepShape(stack.microbatches, stack.micro_batch_size, stack.seq_length)
        batches, seconds, losses = random_batches(stack, llama.vocab_size, ranks.rank), [], []
        for _ in range(WARM_UP + STEPS):
            begin = time.perf_counter()
            result = train_step(chunks, optimizer, batches, shape, 1e-4, OptimizerConfig(), ranks)
            if ranks.device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - begin)
            losses.append(result.loss)
        found: dict[str, Any] = {
            "seconds": seconds[WARM_UP:],
            "losses": losses,
            "peak_memory_bytes": current_platform().peak_memory_bytes(),
            "tokens_per_second_per_device": stack.microbatches
            * stack.micro_batch_size
            * stack.seq_length
            / statistics.median(seconds[WARM_UP:]),
        }
        if ranks.is_rank_zero:
            with open(target, "w", encoding="utf-8") as file:
                json.dump(found, file)


def random_batches(stack: Stack, vocab_size: int, seed: int) -> Iterator[Batch]:
    """The same micro-batch again and again."""
    size, length = stack.micro_batch_size, stack.seq_length
    tokens = np.random.default_rng(seed).integers(0, vocab_size, (size, length + 1), dtype=np.int64)
    return itertools.repeat(Batch(tokens, np.ones((size, length), np.float32), None))


if __name__ == "__main__":
    start_logs()
    main(*sys.argv[1:3])
