"""The learning rate, a pure function of the iteration: what was asked for is what is used."""

from __future__ import annotations

from megatron_cpt.config.run import OptimizerConfig


def learning_rate(iteration: int, train_iters: int, config: OptimizerConfig) -> float:
    """Learning rate of the step number `iteration` (the first is 0).

    Linear warm-up over `lr_warmup_iters` steps, the last of which has `lr`; then linear decay, reaching `min_lr` at step
    `train_iters - 1`.
    """
    if iteration < config.lr_warmup_iters:
        return config.lr * (iteration + 1) / config.lr_warmup_iters
    first = max(config.lr_warmup_iters - 1, 0)  # the step that has the full rate
    decay_steps = train_iters - 1 - first
    progress = (iteration - first) / decay_steps if decay_steps else 0.0
    return config.lr + (config.min_lr - config.lr) * min(progress, 1.0)
