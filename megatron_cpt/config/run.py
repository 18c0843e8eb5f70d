"""Everything a training run can be told, with the names Megatron users know.

The dataclasses are frozen and check what can be checked from one field alone; what depends on the model, the data or
the number of processes is checked in `training/checks.py`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_cpt.errors import InputError


def require(condition: bool, name: str, value: Any, wanted: str) -> None:
    """Raise InputError "NAME is VALUE; use WANTED" unless the condition holds."""
    if not condition:
        raise InputError(f"{name} is {value}; use {wanted}")


def require_at_least(config: Any, **bounds: float) -> None:
    """Raise InputError for the first named field of `config` that is below its bound."""
    for name, bound in bounds.items():
        require(getattr(config, name) >= bound, name, getattr(config, name), f"{bound} or more")


@dataclass(frozen=True)
class ParallelConfig:
    """How the model and the batch are spread over processes; data parallelism takes what remains."""

    tensor_model_parallel_size: int = 1
    """Processes that share each layer."""
    pipeline_model_parallel_size: int = 1
    """Processes that share the stack of layers."""
    num_layers_in_first_pipeline_stage: int | None = None
    """Layers of the first stage, when not an equal share: the last stage also has the output layer, which costs as much as
    several layers when the vocabulary is large."""
    sequence_parallel: bool = False
    """Split norms and residuals along the sequence over the tensor-parallel processes."""

    def __post_init__(self) -> None:
        require_at_least(self, tensor_model_parallel_size=1, pipeline_model_parallel_size=1)
        first = self.num_layers_in_first_pipeline_stage
        require(first is None or first > 0, "parallel.num_layers_in_first_pipeline_stage", first, "1 or more")
        if first is not None and self.pipeline_model_parallel_size == 1:
            raise InputError(
                f"parallel.num_layers_in_first_pipeline_stage is {first} with pipeline_model_parallel_size 1; "
                f"it needs 2 or more"
            )
        if self.sequence_parallel and self.tensor_model_parallel_size == 1:
            raise InputError("sequence_parallel is true with tensor_model_parallel_size 1; it needs 2 or more")


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its learning-rate schedule: linear warm-up, then linear decay (the ALMR paper's schedule for CPT)."""

    lr: float = 1e-5
    """Highest learning rate."""
    min_lr: float = 0.0
    """Learning rate of the last iteration."""
    lr_warmup_iters: int = 0
    """Iterations of linear warm-up."""
    weight_decay: float = 0.01
    """Decoupled weight decay; none on norms and biases."""
    adam_beta1: float = 0.9
    """Decay of the first moment."""
    adam_beta2: float = 0.95
    """Decay of the second moment."""
    adam_eps: float = 1e-8
    """Added to the root of the second moment."""
    clip_grad: float = 1.0
    """Highest global gradient norm; 0 turns clipping off."""

    def __post_init__(self) -> None:
        require_at_least(self, min_lr=0, lr_warmup_iters=0, weight_decay=0, clip_grad=0)
        require(0 < self.lr < float("inf"), "optimizer.lr", self.lr, "a number above 0")
        require(0 <= self.adam_beta1 < 1, "optimizer.adam_beta1", self.adam_beta1, "a number from 0 to below 1")
        require(0 <= self.adam_beta2 < 1, "optimizer.adam_beta2", self.adam_beta2, "a number from 0 to below 1")
        require(self.adam_eps > 0, "optimizer.adam_eps", self.adam_eps, "a number above 0")
        if self.min_lr > self.lr:
            raise InputError(f"optimizer.min_lr {self.min_lr} is above optimizer.lr {self.lr}")


@dataclass(frozen=True)
class TrainingConfig:
    """Length, batch and arithmetic of the run."""

    train_iters: int
    """Optimizer steps of the whole run, counted from the converted checkpoint."""
    micro_batch_size: int = 1
    """Samples one model replica computes at once."""
    global_batch_size: int = 1
    """Samples per optimizer step, over all replicas."""
    params_dtype: Literal["fp32", "bf16"] = "fp32"
    """Fp32, or bf16 with fp32 main weights and gradients."""
    float32_matmul_precision: Literal["highest", "high", "medium"] = "highest"
    """Torch's setting; "medium" lets fp32 products use bf16 units (AMX, tensor cores)."""
    seed: int = 1234
    """Of everything random but the data order, which has its own in the mixture."""

    def __post_init__(self) -> None:
        require_at_least(self, train_iters=1, micro_batch_size=1, global_batch_size=1)


@dataclass(frozen=True)
class DataConfig:
    """How the mixture's text is read. What is said of documents holds in validation too."""

    reset_attention_mask: bool = False
    """A token attends only to its own document, and positions restart with it."""
    eod_mask_loss: bool = False
    """The last token of a document, whose target is the next document's first, does not count in the loss."""
    order: Literal["default", "megatron"] = "default"
    """Which text sample n is; "megatron": bit for bit what Megatron-LM reads in a run of this length (docs/sampling.md)."""
    accept_new_mixture: bool = False
    """Go on with another mixture than the run has read so far, from the next sample on."""
    num_workers: int = 2
    """Threads of each process that read ahead; 0 reads when a batch is needed."""
    prefetch: int = 4
    """Micro-batches read ahead."""

    def __post_init__(self) -> None:
        require_at_least(self, num_workers=0, prefetch=1)


@dataclass(frozen=True)
class ValidationConfig:
    """Validation on the mixture's validation sets, before the first step, every so often, and after the last."""

    eval_interval: int = 0
    """Optimizer steps between evaluations; 0 evaluates only before and after the run."""
    eval_samples: int | None = None
    """Samples of each set to evaluate; null takes the whole set."""

    def __post_init__(self) -> None:
        require_at_least(self, eval_interval=0)
        require(self.eval_samples is None or self.eval_samples > 0, "eval_samples", self.eval_samples, "1 or more")


@dataclass(frozen=True)
class CheckpointConfig:
    """Where the run starts from and where it leaves its results."""

    load: str
    """Megatron checkpoint to start from (weights and model configuration), as convert_checkpoint.py writes it."""
    save: str
    """Folder of this run; if it holds a complete checkpoint the run resumes from it."""
    save_interval: int = 0
    """Optimizer steps between checkpoints; 0 saves only the last."""
    save_optim: bool = True
    """Save the optimizer's state too; without it a checkpoint can start another run but not resume this one."""

    def __post_init__(self) -> None:
        require_at_least(self, save_interval=0)


@dataclass(frozen=True)
class RunConfig:
    """One continual pre-training run.

    Attributes:
        mixture: mixture file (YAML): corpora, ALMR, sequence length, validation sets
        checkpoint: see CheckpointConfig
        training: see TrainingConfig
        data: see DataConfig
        parallel: see ParallelConfig
        optimizer: see OptimizerConfig
        validation: see ValidationConfig
        log_interval: optimizer steps between log lines
        check_only: check the configuration, print the data ledger and stop before any process group starts
        world_size: with check_only, the number of processes to check for
    """

    mixture: str
    checkpoint: CheckpointConfig
    training: TrainingConfig
    data: DataConfig = field(default_factory=DataConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    log_interval: int = 1
    check_only: bool = False
    world_size: int | None = None

    def __post_init__(self) -> None:
        require_at_least(self, log_interval=1)
        require(self.world_size is None or self.world_size > 0, "world_size", self.world_size, "1 or more")
        if self.optimizer.lr_warmup_iters >= self.training.train_iters:
            raise InputError(
                f"optimizer.lr_warmup_iters {self.optimizer.lr_warmup_iters} leaves no step to decay in: "
                f"training.train_iters is {self.training.train_iters}"
            )

    def to_dict(self) -> dict[str, Any]:
        """Nested plain dictionaries, for YAML and JSON."""
        return dataclasses.asdict(self)
