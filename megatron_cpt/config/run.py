"""Everything a training run can be told, with the names Megatron users know.

The dataclasses are frozen and check what can be checked from one field alone; what depends on the model, the data or
the number of processes is checked in `training/validate_config.py`.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_cpt.config.lr import LrConfig
from megatron_cpt.config.parallel import ParallelConfig
from megatron_cpt.config.renamed import formerly
from megatron_cpt.config.require import Requirements, at_most_one, require, require_at_least
from megatron_cpt.config.values import Text
from megatron_cpt.utils.errors import InputError

MOST_THREADS = 256  # of a process


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW."""

    lr: float = 1e-5
    """Highest learning rate."""
    min_lr: float = 0.0
    """Learning rate at the end of the run."""
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
        with Requirements() as need:
            need.at_least(self, min_lr=0, weight_decay=0, clip_grad=0)
            for name in ("lr", "adam_eps"):
                need.field(self, name, lambda value: 0 < value < math.inf, "a number above 0")
            for name in ("adam_beta1", "adam_beta2"):
                need.field(self, name, lambda beta: 0 <= beta < 1, "a number from 0 to below 1")
            with need.noted():
                if 0 < self.lr < self.min_lr < math.inf:
                    raise InputError(f"optimizer.min_lr {self.min_lr} is above optimizer.lr {self.lr}")


@dataclass(frozen=True)
class TrainingConfig:
    """Length, batch and arithmetic of the run. The length is given in one of three ways."""

    train_iters: int | None = None
    """Optimizer steps of the whole run, from the checkpoint it began with; or give train_samples or train_tokens."""
    train_samples: int | None = None
    """Samples of the whole run, rounded up to whole steps."""
    train_tokens: int | None = None
    """Tokens of the whole run, rounded up to whole steps."""
    extend_to: int | None = None
    """Train longer than planned: the new end of the run, in the unit of the setting above that gives the planned one, which
    stays as it is. The learning rate decays to the new end: where it has not begun to decay it goes on, else it warms up
    again from the checkpoint on."""
    micro_batch_size: int = 1
    """Samples one model replica computes at once."""
    global_batch_size: int = 1
    """Samples per optimizer step, over all replicas."""
    params_dtype: Literal["fp32", "bf16"] = "fp32"
    """Fp32, or bf16 with fp32 main weights and gradients (parallel.grad_reduce_in_bf16: bf16 gradients)."""
    float32_matmul_precision: Literal["highest", "high", "medium"] = "highest"
    """Torch's setting; "medium" lets fp32 products use bf16 units (AMX, tensor cores)."""
    fp8: Literal["e4m3", "hybrid"] | None = None
    """Matrix products in FP8; needs a GPU, Transformer Engine and params_dtype bf16."""
    fp8_recipe: Literal["delayed", "tensorwise", "mxfp8", "blockwise"] = "tensorwise"
    """Scaling recipe of Transformer Engine. The history that delayed keeps begins anew when a run resumes."""
    seed: int = 1234
    """Of everything random but the data order, which has its own in the mixture."""
    transformer_impl: Literal["transformer_engine", "local"] | None = None
    """Whose layers: Transformer Engine's, or torch's ("local"). Default: Transformer Engine's for bf16 on a GPU where it is
    installed, else torch's: in fp32 Transformer Engine rounds products to TF32 and keeps whole score matrices."""
    deterministic: bool = False
    """Only algorithms that give the same bits every time, also on a GPU, where they are slower."""
    exit_duration_in_mins: float | None = None
    """Save and stop this long after the start, to be there before a job's time limit."""

    def __post_init__(self) -> None:
        with Requirements() as need:
            need.field(self, "seed", lambda seed: 0 <= seed < 2**63, "0 to 2**63 - 1")
            need.at_least(self, train_iters=1, train_samples=1, train_tokens=1)
            need.at_least(self, micro_batch_size=1, global_batch_size=1, exit_duration_in_mins=0)
            for check in (self._check_length, self._check_fp8):
                with need.noted():
                    check()

    def _check_length(self) -> None:
        if at_most_one("training", self, "train_iters", "train_samples", "train_tokens") is None:
            raise InputError(
                "the length of the run is not given; expected training.train_iters, train_samples or train_tokens"
            )
        if self.extend_to is not None:
            name, planned = self.planned_length()
            require(self.extend_to > planned, "extend_to", self.extend_to, f"more than training.{name}, {planned}")

    def _check_fp8(self) -> None:
        is_wide = self.fp8 is not None and self.params_dtype != "bf16"
        require(not is_wide, "params_dtype", self.params_dtype, "bf16 with fp8")

    def planned_length(self) -> tuple[str, int]:
        """The setting that gives the length, and its value."""
        lengths = {name: getattr(self, name) for name in ("train_iters", "train_samples", "train_tokens")}
        return next((name, length) for name, length in lengths.items() if length is not None)

    def extended(self) -> TrainingConfig:
        """The same with the new end as its length, if there is one."""
        if self.extend_to is None:
            return self
        changes: dict[str, Any] = {"extend_to": None, self.planned_length()[0]: self.extend_to}
        return dataclasses.replace(self, **changes)


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
    check_files: bool = True
    """Compare the corpora's files with the checksums in their manifests while the run is under way, in the background, once
    for each version of a file. Without it sizes and token ids are still checked."""
    num_workers: int = 2
    """Threads of each process that read ahead; 0 reads when a batch is needed."""
    prefetch: int = 4
    """Micro-batches read ahead."""

    def __post_init__(self) -> None:
        with Requirements() as need:
            need.at_least(self, num_workers=0, prefetch=1)
            need.field(self, "num_workers", lambda threads: threads <= MOST_THREADS, f"at most {MOST_THREADS}")


@dataclass(frozen=True)
class ValidationConfig:
    """Validation on the mixture's validation sets, before the first step, every so often, and after the last."""

    eval_interval: int = 0
    """Optimizer steps between evaluations; 0 evaluates only before and after the run."""
    eval_samples: int | None = None
    """Samples of each set to evaluate; null takes the whole set."""

    def __post_init__(self) -> None:
        require_at_least(self, eval_interval=0, eval_samples=1)


@dataclass(frozen=True)
class CheckpointConfig:
    """Where the run starts from and where it leaves its results."""

    load: str
    """Megatron checkpoint to start from, or the folder of a run (its newest checkpoint)."""
    save: str
    """Folder of this run; if it holds a complete checkpoint the run resumes from it."""
    load_state: Literal["weights", "all"] = "weights"
    """Of `load`: only the weights, for a run that begins; or all, to go on in this folder where that run was (optimizer,
    learning rate, position in the data)."""
    save_interval: int = 0
    """Optimizer steps between checkpoints; 0 saves only the last."""
    save_optim: bool = True
    """Save the optimizer's state too; without it a checkpoint can start another run but not resume this one."""
    async_save: bool = False
    """Write checkpoints in the background while training goes on."""
    keep_last: int | None = None
    """Newest checkpoints to keep; older ones are deleted once a newer one is committed. Default: all."""
    keep_every: int | None = None
    """Keep those of every so many steps, whatever keep_last says."""
    save_retries: int = 3
    """When a checkpoint cannot be written (disk full): further attempts before the run stops."""
    save_retry_seconds: float = 60.0
    """Time between these attempts; training goes on."""

    def __post_init__(self) -> None:
        with Requirements() as need:
            need.at_least(self, save_interval=0, keep_last=1, keep_every=1, save_retries=0, save_retry_seconds=0)
            with need.noted():
                if self.keep_last is None and self.keep_every is not None:
                    raise InputError("checkpoint.keep_every is given without keep_last, so every checkpoint is kept anyway")


@dataclass(frozen=True)
class LossSpikesConfig:
    """Which steps are skipped, and what else ends a run: replicas that differ, processes that are dead."""

    max_skipped_steps: int = 3
    """A step whose loss or gradient is not finite, or that is a spike, does not change the weights; after more than so many
    in a row the run stops, with a checkpoint from before the first."""
    spike_sigmas: float | None = None
    """A loss this many standard deviations above the mean of the last spike_window steps is a spike."""
    spike_window: int = 100
    """Accepted steps that tell what is usual; nothing is a spike before as many were seen."""
    spike_grad_norm: float | None = None
    """A gradient norm above this is a spike."""
    rerun_skipped_steps: bool = field(default=False, metadata=formerly("rerun_rejected_steps"))
    """Compute a step whose loss is not finite once more, and log whether the result is the same (megatron-core's rerun
    machinery): another one points at a faulty device."""
    check_weight_hash_across_dp_replicas_interval: int = field(default=0, metadata=formerly("check_weights_interval"))
    """Steps between checks that all data-parallel replicas hold the same weights; 0 never checks."""
    heartbeat_seconds: float = 120.0
    """A process that has shown no sign of life for so long is taken for dead and ends the run; 0 turns this off."""

    def __post_init__(self) -> None:
        with Requirements() as need:
            need.at_least(self, max_skipped_steps=0, spike_window=2, check_weight_hash_across_dp_replicas_interval=0)
            # Processes tell each other twice a second that they live.
            need.field(self, "heartbeat_seconds", lambda seconds: seconds == 0 or seconds >= 2, "2 or more, or 0")
            for name in ("spike_sigmas", "spike_grad_norm"):
                need.field(self, name, lambda value: value > 0, "a number above 0")


@dataclass(frozen=True)
class LoggingConfig:
    """What the run shows and records, beside metrics.jsonl and run.json."""

    log_interval: int = 1
    """Optimizer steps between log lines, where there is no terminal to draw a progress line on."""
    report: bool = True
    """Write report.md and report.png when the run ends or stops, which takes a second."""
    tensorboard: bool = False
    """Write event files to tensorboard/ in the run's folder."""
    wandb_project: Text | None = None
    """Log to this project of Weights & Biases, with files under wandb/ in the run's folder."""
    wandb_name: Text | None = None
    """Name of the run there; default: the name of the run's folder."""
    wandb_mode: Literal["online", "offline"] = "online"
    """Offline: only write files, for `wandb sync` later."""
    profile_step_start: int | None = None
    """First step that torch's profiler traces, into profile/ in the run's folder."""
    profile_step_end: int | None = None
    """Last step it traces. Default: the first."""
    peak_tflops: float | None = None
    """Dense bf16 TFLOP/s of one device, for MFU (model FLOPs utilisation). Default: known for common GPUs."""
    profile_ranks: list[int] = field(default_factory=lambda: [0])
    """Ranks it traces."""

    def __post_init__(self) -> None:
        with Requirements() as need:
            need.at_least(self, log_interval=1, profile_step_start=1, profile_step_end=1)
            need.field(self, "peak_tflops", lambda peak: peak > 0, "a number above 0")
            with need.noted():
                self._check_profile()

    def _check_profile(self) -> None:
        start, end = self.profile_step_start, self.profile_step_end
        if end is not None and (start is None or end < start):
            raise InputError(
                f"logging.profile_step_end is {end} with profile_step_start {start}; expected that or a later step"
            )


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
        lr: see LrConfig
        validation: see ValidationConfig
        loss_spikes: see LossSpikesConfig
        logging: see LoggingConfig
        check_only: check the configuration, print the data ledger and stop before any process group starts
        world_size: with check_only, the number of processes to check for
    """

    mixture: str
    checkpoint: CheckpointConfig
    training: TrainingConfig
    data: DataConfig = field(default_factory=DataConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    lr: LrConfig = field(default_factory=LrConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    loss_spikes: LossSpikesConfig = field(default_factory=LossSpikesConfig, metadata=formerly("trouble"))
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    check_only: bool = False
    world_size: int | None = None

    def __post_init__(self) -> None:
        with Requirements() as need:
            need.at_least(self, world_size=1)
            with need.noted():
                dtype, sums = self.training.params_dtype, self.parallel.grad_reduce_in_bf16
                wanted = "bf16 with parallel.grad_reduce_in_bf16"
                require(dtype == "bf16" or not sums, "training.params_dtype", dtype, wanted)

    def to_dict(self) -> dict[str, Any]:
        """Nested plain dictionaries, for YAML and JSON."""
        return dataclasses.asdict(self)
