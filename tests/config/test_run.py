"""What a run configuration refuses on its own, before any file is opened."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from megatron_cpt.config.lr import LrConfig
from megatron_cpt.config.parallel import ParallelConfig
from megatron_cpt.config.run import (
    CheckpointConfig,
    DataConfig,
    LoggingConfig,
    LossSpikesConfig,
    OptimizerConfig,
    RunConfig,
    TrainingConfig,
    ValidationConfig,
)
from megatron_cpt.utils.errors import InputError

REQUIRED: dict[type, dict[str, Any]] = {
    TrainingConfig: {"train_iters": 10},
    CheckpointConfig: {"load": "a", "save": "b"},
    RunConfig: {"mixture": "m.yaml", "checkpoint": CheckpointConfig("a", "b"), "training": TrainingConfig(10)},
}
NAN, INF = float("nan"), float("inf")


def make(config_class: type, **settings: Any) -> Any:
    return config_class(**REQUIRED.get(config_class, {}) | settings)


@pytest.mark.parametrize(
    ("config_class", "field", "bad", "good"),
    [
        (ParallelConfig, "tensor_model_parallel_size", [0, -2], [1, 8]),
        (ParallelConfig, "pipeline_model_parallel_size", [0, -1], [1, 4]),
        (OptimizerConfig, "lr", [0.0, -1e-5, NAN, INF], [1e-12, 1.0]),
        (OptimizerConfig, "min_lr", [-1e-9, NAN], [0.0, 1e-5]),
        (OptimizerConfig, "weight_decay", [-0.1, NAN], [0.0, 0.1]),
        (OptimizerConfig, "adam_beta1", [-0.1, 1.0, 1.5, NAN], [0.0, 0.9]),
        (OptimizerConfig, "adam_beta2", [-0.1, 1.0, 1.5, NAN], [0.0, 0.999]),
        (OptimizerConfig, "adam_eps", [0.0, -1e-8, NAN], [1e-8]),
        (OptimizerConfig, "clip_grad", [-1.0, NAN], [0.0, 1.0]),
        (TrainingConfig, "train_iters", [0, -5], [1, 10**6]),
        (TrainingConfig, "micro_batch_size", [0, -1], [1, 16]),
        (TrainingConfig, "global_batch_size", [0, -1], [1, 1024]),
        (ValidationConfig, "eval_interval", [-1], [0, 100]),
        (ValidationConfig, "eval_samples", [0, -1], [None, 1]),
        (CheckpointConfig, "save_interval", [-1], [0, 100]),
        (ParallelConfig, "context_parallel_size", [0], [1, 2]),
        (TrainingConfig, "exit_duration_in_mins", [-1.0, NAN], [None, 0.5]),
        (LrConfig, "warmup_iters", [-1], [None, 0, 1000]),
        (LrConfig, "warmup_samples", [-1], [None, 0]),
        (LrConfig, "warmup_tokens", [-1], [None, 10**12]),
        (CheckpointConfig, "keep_last", [0, -1], [None, 1]),
        (CheckpointConfig, "save_retries", [-1], [0, 3]),
        (CheckpointConfig, "save_retry_seconds", [-1.0, NAN], [0.0]),
        (LossSpikesConfig, "max_skipped_steps", [-1], [0, 5]),
        (LossSpikesConfig, "spike_sigmas", [0.0, -1.0, NAN], [None, 6.0]),
        (LossSpikesConfig, "spike_grad_norm", [0.0, NAN], [None, 10.0]),
        (LossSpikesConfig, "spike_window", [1, 0], [2, 100]),
        (LossSpikesConfig, "check_weight_hash_across_dp_replicas_interval", [-1], [0, 100]),
        (LossSpikesConfig, "heartbeat_seconds", [-1.0, 0.5], [0.0, 2.0, 60.0]),
        (LoggingConfig, "log_interval", [0, -1], [1, 10]),
        (LoggingConfig, "profile_step_start", [0], [None, 3]),
        (LoggingConfig, "peak_tflops", [0.0, -1.0, NAN], [None, 989.0]),
        (RunConfig, "world_size", [0, -8], [None, 1, 64]),
    ],
)
def test_bounds_of_single_fields(config_class: type, field: str, bad: list[Any], good: list[Any]) -> None:
    for value in bad:
        with pytest.raises(InputError) as caught:
            make(config_class, **{field: value})
        message = str(caught.value)
        assert f"{field} is {value}; expected " in message
        assert "\n" not in message
    for value in good:
        assert getattr(make(config_class, **{field: value}), field) == value


def test_min_lr_above_lr() -> None:
    with pytest.raises(InputError, match=r"optimizer\.min_lr 0\.002 is above optimizer\.lr 0\.001"):
        OptimizerConfig(lr=1e-3, min_lr=2e-3)
    assert OptimizerConfig(lr=1e-3, min_lr=1e-3).min_lr == 1e-3


def test_sequence_parallel_needs_tensor_parallel() -> None:
    with pytest.raises(InputError, match="sequence_parallel is true with tensor_model_parallel_size 1; it needs 2 or more"):
        ParallelConfig(sequence_parallel=True)
    assert ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True).sequence_parallel


def test_layers_in_the_first_stage() -> None:
    for bad in (0, -1):
        with pytest.raises(InputError, match=f"num_layers_in_first_pipeline_stage is {bad}; expected 1 or more"):
            ParallelConfig(pipeline_model_parallel_size=2, num_layers_in_first_pipeline_stage=bad)
    with pytest.raises(InputError, match="num_layers_in_first_pipeline_stage is 3 with pipeline_model_parallel_size 1"):
        ParallelConfig(num_layers_in_first_pipeline_stage=3)
    config = ParallelConfig(pipeline_model_parallel_size=2, num_layers_in_first_pipeline_stage=3)
    assert config.num_layers_in_first_pipeline_stage == 3


@pytest.mark.parametrize(
    ("config_class", "settings", "message"),
    [
        (
            TrainingConfig,
            {"train_iters": None},
            r"length of the run is not given; expected training\.train_iters, train_samples or",
        ),
        (
            TrainingConfig,
            {"train_tokens": 5},
            r"training\.train_iters and training\.train_tokens are both given; expected one of train_iters, train_samples",
        ),
        (TrainingConfig, {"fp8": "hybrid"}, "params_dtype is fp32; expected bf16 with fp8"),
        (LrConfig, {"warmup_iters": 1, "warmup_tokens": 1}, r"lr\.warmup_iters and lr\.warmup_tokens are both given"),
        (LrConfig, {"wsd_decay_iters": 1}, "wsd_decay_iters is given with decay_style linear; expected WSD"),
        (CheckpointConfig, {"keep_every": 10}, "keep_every is given without keep_last"),
        (LoggingConfig, {"profile_step_end": 3}, "profile_step_end is 3 with profile_step_start None"),
        (
            ParallelConfig,
            {"virtual_pipeline_model_parallel_size": 2},
            "is 2 with pipeline_model_parallel_size 1; it needs 2",
        ),
        (ParallelConfig, {"overlap_param_gather": True}, "overlap_param_gather is true without overlap_grad_reduce"),
        (ParallelConfig, {"tp_comm_overlap": True}, "tp_comm_overlap is true without sequence_parallel"),
        (
            ParallelConfig,
            {"recompute_num_layers": 2},
            "recompute_num_layers is 2 with recompute_granularity None; it needs full",
        ),
        (
            ParallelConfig,
            {"recompute_granularity": "full", "recompute_modules": ["mlp"]},
            "recompute_modules is .* with recompute_granularity full; it needs selective",
        ),
        (
            ParallelConfig,
            {
                "pipeline_model_parallel_size": 2,
                "num_layers_in_last_pipeline_stage": 1,
                "pipeline_model_parallel_layout": "Et|tL",
            },
            "num_layers_in_last_pipeline_stage and parallel.pipeline_model_parallel_layout are both given",
        ),
    ],
)
def test_settings_that_do_not_go_together(config_class: type, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make(config_class, **settings)


def test_configurations_are_frozen() -> None:
    for config_class in (
        DataConfig,
        ParallelConfig,
        OptimizerConfig,
        TrainingConfig,
        ValidationConfig,
        CheckpointConfig,
        LrConfig,
        LossSpikesConfig,
        LoggingConfig,
        RunConfig,
    ):
        config = make(config_class)
        name = dataclasses.fields(config)[0].name
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(config, name, None)


def test_to_dict_is_plain_and_complete() -> None:
    config = make(RunConfig, parallel=ParallelConfig(2, 3, sequence_parallel=True, recompute_granularity="full"))
    plain = json.loads(json.dumps(config.to_dict()))
    assert plain == config.to_dict()
    assert plain["parallel"] | {"tensor_model_parallel_size": 2, "sequence_parallel": True} == plain["parallel"]
    assert set(plain) == {field.name for field in dataclasses.fields(RunConfig)}
    assert set(plain["optimizer"]) == {field.name for field in dataclasses.fields(OptimizerConfig)}


def test_bf16_sums_need_bf16_parameters() -> None:
    """fp32 parameters have fp32 gradients in megatron-core, whatever is asked for."""
    sections = {"mixture": "m.yaml", "checkpoint": CheckpointConfig("from", "to")}
    sums = ParallelConfig(grad_reduce_in_bf16=True)
    RunConfig(**sections, training=TrainingConfig(train_iters=1, params_dtype="bf16"), parallel=sums)
    with pytest.raises(
        InputError, match=r"training\.params_dtype is fp32; expected bf16 with parallel\.grad_reduce_in_bf16"
    ):
        RunConfig(**sections, training=TrainingConfig(train_iters=1), parallel=sums)
