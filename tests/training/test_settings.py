"""Every setting of a training run, given another value than its default, acts where it should: shown by what the tool then
gives to megatron-core, torch and the trackers, and by what it leaves behind.

Settings that do not get into each other's way share a run. A new setting without a row fails the first test.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch
import yaml
from forks import Forks
from tampering import sign_of
from tiny_models import VARIANTS, read_rows, write_yaml
from tiny_runs import Runs

from megatron_cpt.config.parallel import ParallelConfig
from megatron_cpt.config.run import RunConfig, TrainingConfig
from megatron_cpt.model.build import make_transformer_config, numerics_of
from megatron_cpt.model.llama import read_llama_config

SEQ_LENGTH = 64
STEPS, BATCH = 4, 4


@dataclass(frozen=True)
class Start:
    """A start of the tool: settings beside those of `base`, and what is done to it.

    Attributes:
        after: a run in whose folder it goes on
        status: its exit status
    """

    settings: dict[str, Any] = field(default_factory=dict)
    processes: int = 1
    tamper: dict[str, Any] = field(default_factory=dict)
    after: str | None = None
    status: int = 0


SHORT = {"training.train_iters": 1, "mixture": "no_validation"}
PIPELINE = SHORT | {"parallel.pipeline_model_parallel_size": 2}
POISON = {"poison": {"what": "loss", "factor": 3.0, "first": 4, "last": 4}}
STARTS = {
    "base": Start({"training.train_iters": STEPS}),
    "many": Start(
        {
            "training.train_iters": 6,
            "training.micro_batch_size": 2,
            "training.global_batch_size": 8,
            "training.float32_matmul_precision": "medium",
            "training.seed": 99,
            "optimizer.lr": 2e-3,
            "optimizer.min_lr": 1e-3,
            "optimizer.weight_decay": 0.5,
            "optimizer.adam_beta1": 0.8,
            "optimizer.adam_beta2": 0.7,
            "optimizer.adam_eps": 1e-4,
            "optimizer.clip_grad": 0.25,
            "lr.warmup_iters": 2,
            "lr.decay_style": "WSD",
            "lr.wsd_decay_style": "linear",
            "lr.wsd_decay_iters": 2,
            "data.num_workers": 0,
            "data.check_files": False,
            "data.prefetch": 9,
            "validation.eval_interval": 4,
            "validation.eval_samples": 3,
            "checkpoint.save_interval": 1,
            "checkpoint.keep_last": 2,
            "checkpoint.keep_every": 3,
            "loss_spikes.check_weight_hash_across_dp_replicas_interval": 2,
            "loss_spikes.rerun_skipped_steps": True,
            "logging.log_interval": 3,
            "logging.report": False,
            "logging.tensorboard": True,
            "logging.profile_step_start": 2,
            "logging.profile_step_end": 3,
            "logging.peak_tflops": 1e-3,
        }
    ),
    "eod": Start(SHORT | {"data.eod_mask_loss": True}),
    "packed": Start(SHORT | {"data.reset_attention_mask": True}),
    "micro-batch": Start(SHORT | {"training.micro_batch_size": 2}),
    "bf16": Start(SHORT | {"training.params_dtype": "bf16"}),
    "bf16 sums": Start(SHORT | {"training.params_dtype": "bf16", "parallel.grad_reduce_in_bf16": True}, processes=2),
    "constant": Start({"training.train_iters": STEPS, "optimizer.lr": 2e-3, "lr.decay_style": "constant"}),
    "samples": Start(
        {
            "training.train_samples": 6 * BATCH,
            "training.params_dtype": "bf16",
            "training.deterministic": True,
            "mixture": "no_validation",
            "lr.decay_style": "WSD",
            "lr.warmup_samples": 2 * BATCH,
            "lr.wsd_decay_samples": 2 * BATCH,
            "data.order": "megatron",
            "checkpoint.save_optim": False,
        }
    ),
    "tokens": Start(
        {
            "training.train_tokens": 6 * BATCH * SEQ_LENGTH,
            "mixture": "no_validation",
            "lr.decay_style": "WSD",
            "lr.warmup_tokens": 2 * BATCH * SEQ_LENGTH,
            "lr.wsd_decay_tokens": 2 * BATCH * SEQ_LENGTH,
            "checkpoint.async_save": True,
            "checkpoint.save_interval": 2,
            "logging.wandb_project": "languages",
            "logging.wandb_name": "first",
            "logging.wandb_mode": "offline",
        },
        tamper={"no_wandb": "WANDB"},
    ),
    "out of time": Start({"training.train_iters": STEPS, "training.exit_duration_in_mins": 0}),
    "retries": Start(
        SHORT | {"checkpoint.save_retries": 1, "checkpoint.save_retry_seconds": 0.125},
        tamper={"failing_saves": True},
        status=1,
    ),
    "fork": Start({"checkpoint.load": "base", "checkpoint.load_state": "all", "training.train_iters": STEPS + 1,
                   "lr.on_continue": "restart"}),
    "longer": Start({"training.train_iters": STEPS + 2, "lr.on_continue": "continue"}, after="base"),
    "extended": Start({"training.train_iters": STEPS, "training.extend_to": STEPS + 2}, after="base"),
    "other mixture": Start(
        {"training.train_iters": STEPS + 1, "lr.on_continue": "restart", "mixture": "half", "data.accept_new_mixture": True},
        after="base",
    ),
    "refused": Start(
        {"training.train_iters": STEPS + 1, "lr.on_continue": "restart", "mixture": "half"}, after="base", status=2
    ),
    "grad norm": Start({"training.train_iters": STEPS, "loss_spikes.spike_grad_norm": 1e-9}, status=1),
    "grad norm, allowed": Start(
        {"training.train_iters": STEPS, "loss_spikes.spike_grad_norm": 1e-9, "loss_spikes.max_skipped_steps": STEPS}
    ),
    "sigmas and window": Start(
        {"training.train_iters": STEPS, "loss_spikes.spike_sigmas": 5, "loss_spikes.spike_window": 3}, tamper=POISON
    ),
    "sigmas": Start({"training.train_iters": STEPS, "loss_spikes.spike_sigmas": 5}, tamper=POISON),
    "window": Start({"training.train_iters": STEPS, "loss_spikes.spike_window": 3}, tamper=POISON),
    "tensor": Start(
        SHORT | {"parallel.tensor_model_parallel_size": 2, "parallel.sequence_parallel": True,
                 "parallel.recompute_granularity": "full", "parallel.recompute_method": "block",
                 "parallel.recompute_num_layers": 2},
        processes=2,
    ),
    "selective": Start(SHORT | {"parallel.recompute_granularity": "selective", "parallel.recompute_modules": ["mlp"]}),
    "interleaved": Start(PIPELINE | {"parallel.virtual_pipeline_model_parallel_size": 2}, processes=2),
    "first stage": Start(PIPELINE | {"parallel.num_layers_in_first_pipeline_stage": 1}, processes=2),
    "last stage": Start(PIPELINE | {"parallel.num_layers_in_last_pipeline_stage": 1}, processes=2),
    "layout": Start(PIPELINE | {"parallel.pipeline_model_parallel_layout": "Et|t*3L"}, processes=2),
    "data": Start(
        SHORT | {"parallel.overlap_grad_reduce": True, "parallel.overlap_param_gather": True,
                 "logging.profile_step_start": 1, "logging.profile_ranks": [1], "loss_spikes.heartbeat_seconds": 7.0},
        processes=2,
    ),
    "check": Start({"training.train_iters": STEPS, "check_only": True}),
    "check for two": Start(
        SHORT | {"check_only": True, "world_size": 2, "parallel.tensor_model_parallel_size": 2}
    ),
    "check for one": Start(SHORT | {"check_only": True, "parallel.tensor_model_parallel_size": 2}, status=2),
}  # fmt: skip


class Seen:
    """What a start did, to be asked for."""

    def __init__(self, folder: Path, told: Path, log: Path, starts: Starts) -> None:
        self.folder, self.told, self.starts = folder, told, starts
        self.log = log.read_text(encoding="utf-8")
        paths = [sign_of(str(told), rank) for rank in range(2)]
        texts = [path.read_text(encoding="utf-8") if path.exists() else "" for path in paths]
        self.calls = [[json.loads(line) for line in text.splitlines()] for text in texts]

    def call(self, name: str, value: str, rank: int = 0) -> Any:
        """What a function was given in the first call."""
        return next((call[value] for call in self.calls[rank] if call["call"] == name), None)

    def count(self, name: str, **values: Any) -> int:
        """How often a function was called with these values."""
        return sum(call["call"] == name and values.items() <= call.items() for call in self.calls[0])

    def loss_of(self, start: str) -> float:
        """Loss of another start's first step."""
        return self.starts[start].steps()[0]["loss"]

    def update(self, value: str, number: int = 0) -> Any:
        """What the first parameter group had in an update."""
        return [call["groups"][0][value] for call in self.calls[0] if call["call"] == "update"][number]

    def rates(self) -> list[float]:
        """Learning rate of every update, in the unit of the highest."""
        rates = [call["groups"][0]["lr"] for call in self.calls[0] if call["call"] == "update"]
        return [round(rate / max(rates), 9) for rate in rates]

    def steps(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl about steps."""
        return [row for row in read_rows(self.folder) if "loss" in row]

    def skipped(self) -> dict[int, str]:
        """Steps that were skipped, and why."""
        return {row["iteration"]: row["skipped"] for row in self.steps() if row["skipped"]}

    def evaluated(self) -> list[int]:
        """Steps with an evaluation."""
        return [row["iteration"] for row in read_rows(self.folder) if row.get("validation")]

    def evaluated_tokens(self) -> dict[str, int]:
        """Targets of each set in the first evaluation."""
        results = next(row["validation"] for row in read_rows(self.folder) if row.get("validation"))
        return {name: result["tokens"] for name, result in results.items()}

    def files(self, pattern: str) -> list[str]:
        """Names of what lies in the run's folder."""
        return sorted(path.name for path in self.folder.glob(pattern))

    def json(self, name: str) -> Any:
        """A record in the run's folder."""
        return json.loads((self.folder / name).read_text(encoding="utf-8"))

    def wandb(self, name: str) -> Any:
        """What Weights & Biases was asked for."""
        path = sign_of(f"{self.told}-wandb", 0)
        return json.loads(path.read_text())[name] if path.exists() else None

    def says(self, text: str) -> bool:
        """Whether it is on the screen."""
        return text in self.log


@dataclass(frozen=True)
class Row:
    """A setting, in which start it is given, and what then is to be seen; in the start `without` it is something else."""

    setting: str
    start: str
    seen: Callable[[Seen], Any]
    expected: Any
    without: str = "base"


def told(setting: str, start: str, call: str, expected: Any, without: str = "base") -> Row:
    """A setting of `parallel` or `training` that megatron-core takes under the same name."""
    name = setting.split(".")[1]
    return Row(setting, start, lambda run: run.call(call, name), expected, without)


def rates(setting: str, start: str, *expected: float, without: str = "base") -> Row:
    """A setting of the learning rate's course, in parts of the highest rate."""
    return Row(setting, start, lambda run: run.rates(), [*expected], without)


SAVED = {step: f"iter_{step:07d}" for step in range(10)}
WSD = (0.5, 1, 1, 1, round(1 - math.sqrt(0.5), 9), 0)  # warm-up of two steps, decay of two
ROWS = [
    Row("mixture", "other mixture", lambda run: run.json("run.json")["config"]["mixture"].endswith("half.yaml"), True),
    Row("checkpoint.load", "fork", lambda run: Path(run.json("run.json")["start_from"]).name, SAVED[STEPS]),
    Row("checkpoint.load_state", "fork", lambda run: run.steps()[0]["iteration"], STEPS + 1),
    Row("checkpoint.save", "many", lambda run: (run.folder.name, len(run.files("metrics.jsonl"))), ("many", 1)),
    Row("checkpoint.save_interval", "tokens", lambda run: run.files("iter_*"), [SAVED[2], SAVED[4], SAVED[6]]),
    Row("checkpoint.save_optim", "samples", lambda run: run.call("save", "optimizer"), False),
    Row("checkpoint.async_save", "tokens", lambda run: run.call("save", "background"), True),
    Row("checkpoint.keep_last", "many", lambda run: run.files("iter_*")[-2:], [SAVED[5], SAVED[6]]),
    Row("checkpoint.keep_every", "many", lambda run: run.files("iter_*")[:-2], [SAVED[3]]),
    Row("checkpoint.save_retries", "retries", lambda run: run.says("in 2 attempts"), True),
    Row("checkpoint.save_retry_seconds", "retries", lambda run: run.says("trying again in 0.125 s (1 left)"), True),
    Row("training.train_iters", "many", lambda run: run.steps()[-1]["iteration"], 6),
    Row("training.train_samples", "samples", lambda run: run.steps()[-1]["consumed_samples"], 6 * BATCH),
    Row("training.train_tokens", "tokens", lambda run: run.steps()[-1]["consumed_tokens"], 6 * BATCH * SEQ_LENGTH),
    Row("training.extend_to", "extended", lambda run: run.steps()[-1]["iteration"], STEPS + 2),
    Row("training.micro_batch_size", "micro-batch", lambda run: run.call("schedule", "micro_batch_size"), 2),
    Row("training.global_batch_size", "many", lambda run: run.steps()[0]["consumed_samples"], 8),
    told("training.params_dtype", "samples", "model", "torch.bfloat16"),
    Row("training.float32_matmul_precision", "many", lambda run: run.call("schedule", "precision"), "medium"),
    Row("training.seed", "many", lambda run: run.call("schedule", "seed"), 99),
    Row("training.deterministic", "samples", lambda run: run.call("model", "deterministic_mode"), True),
    Row("training.exit_duration_in_mins", "out of time", lambda run: run.says("training.exit_duration_in_mins"), True),
    Row("data.reset_attention_mask", "packed", lambda run: run.steps()[0]["loss"] == run.loss_of("base"), False),
    Row("data.eod_mask_loss", "eod", lambda run: run.steps()[0]["loss"] == run.loss_of("base"), False),
    Row("data.order", "samples", lambda run: run.steps()[0]["loss"] == run.loss_of("bf16"), False, "bf16"),
    Row("data.accept_new_mixture", "other mixture", lambda run: run.steps()[-1]["iteration"], STEPS + 1, "refused"),
    Row("data.check_files", "many", lambda run: run.files("checked_files.json"), []),
    Row("data.num_workers", "many", lambda run: run.call("prefetch", "workers"), 0),
    Row("data.prefetch", "many", lambda run: run.call("prefetch", "ahead"), 9),
    told("parallel.tensor_model_parallel_size", "tensor", "model", 2),
    told("parallel.sequence_parallel", "tensor", "model", True),
    told("parallel.recompute_granularity", "tensor", "model", "full"),
    told("parallel.recompute_method", "tensor", "model", "block"),
    told("parallel.recompute_num_layers", "tensor", "model", 2),
    told("parallel.recompute_modules", "selective", "model", ["mlp"]),
    told("parallel.pipeline_model_parallel_size", "interleaved", "model", 2),
    Row("parallel.virtual_pipeline_model_parallel_size", "interleaved", lambda run: run.count("model"), 2),
    told("parallel.num_layers_in_first_pipeline_stage", "first stage", "model", 1),
    told("parallel.num_layers_in_last_pipeline_stage", "last stage", "model", 1),
    Row("parallel.pipeline_model_parallel_layout", "layout",
        lambda run: [run.call("layers", "layers", rank) for rank in range(2)], [1, 3], "interleaved"),
    told("parallel.overlap_grad_reduce", "data", "ddp", True),
    told("parallel.overlap_param_gather", "data", "ddp", True),
    Row("parallel.grad_reduce_in_bf16", "bf16 sums", lambda run: run.call("ddp", "grad_reduce_in_fp32"), False, "bf16"),
    Row("optimizer.lr", "constant", lambda run: run.update("lr"), 2e-3),
    Row("optimizer.min_lr", "many", lambda run: run.rates()[-1], 0.5),
    Row("optimizer.weight_decay", "many", lambda run: run.update("weight_decay"), 0.5),
    Row("optimizer.adam_beta1", "many", lambda run: run.update("betas")[0], 0.8),
    Row("optimizer.adam_beta2", "many", lambda run: run.update("betas")[1], 0.7),
    Row("optimizer.adam_eps", "many", lambda run: run.update("eps"), 1e-4),
    Row("optimizer.clip_grad", "many", lambda run: run.call("clip", "max_norm"), 0.25),
    rates("lr.decay_style", "constant", 1, 1, 1, 1),
    rates("lr.warmup_iters", "many", 0.5, 1, 1, 1, 0.75, 0.5),
    rates("lr.wsd_decay_iters", "many", 0.5, 1, 1, 1, 0.75, 0.5),
    Row("lr.wsd_decay_style", "many", lambda run: run.rates()[-2], 0.75),
    rates("lr.warmup_samples", "samples", *WSD),
    rates("lr.wsd_decay_samples", "samples", *WSD),
    rates("lr.warmup_tokens", "tokens", *WSD),
    rates("lr.wsd_decay_tokens", "tokens", *WSD),
    Row("lr.on_continue", "longer", lambda run: run.steps()[-1]["iteration"], STEPS + 2),
    Row("validation.eval_interval", "many", lambda run: run.evaluated(), [0, 4, 6]),
    Row("validation.eval_samples", "many", lambda run: run.evaluated_tokens(), {"en": 3 * 64, "zh": 3 * 64}),
    Row("loss_spikes.max_skipped_steps", "grad norm, allowed", lambda run: run.json("status.json")["state"], "finished",
        "grad norm"),
    Row("loss_spikes.spike_grad_norm", "grad norm, allowed", lambda run: [*run.skipped()], [1, 2, 3, 4]),
    Row("loss_spikes.spike_sigmas", "sigmas and window", lambda run: [*run.skipped()], [4], "window"),
    Row("loss_spikes.spike_window", "sigmas and window", lambda run: [*run.skipped()], [4], "sigmas"),
    Row("loss_spikes.rerun_skipped_steps", "many", lambda run: run.call("rerunning", "wanted"), True),
    Row("loss_spikes.check_weight_hash_across_dp_replicas_interval", "many", lambda run: run.count("check_replicas"), 3),
    Row("loss_spikes.heartbeat_seconds", "data", lambda run: run.call("heartbeat", "seconds"), 7.0, "tensor"),
    Row("logging.log_interval", "many", lambda run: run.log.count("grad norm "), 2),
    Row("logging.report", "many", lambda run: run.files("report.md"), []),
    Row("logging.tensorboard", "many", lambda run: len(run.files("tensorboard/*")), 1),
    Row("logging.wandb_project", "tokens", lambda run: run.wandb("project"), "languages"),
    Row("logging.wandb_name", "tokens", lambda run: run.wandb("name"), "first"),
    Row("logging.wandb_mode", "tokens", lambda run: run.wandb("mode"), "offline"),
    Row("logging.profile_step_start", "many", lambda run: run.files("profile/*.txt"), ["rank_00000_steps_2-3.txt"]),
    Row("logging.profile_step_end", "many", lambda run: run.files("profile/*.txt"), ["rank_00000_steps_2-3.txt"]),
    Row("logging.profile_ranks", "data", lambda run: run.files("profile/*.txt"), ["rank_00001_steps_1-1.txt"]),
    Row("logging.peak_tflops", "many", lambda run: run.steps()[0].get("mfu") is not None, True),
    Row("check_only", "check", lambda run: run.folder.exists(), False),
    Row("world_size", "check for two", lambda run: run.says("error:"), False, "check for one"),
]  # fmt: skip
# What a machine without a GPU refuses. As far as it can be seen on one: megatron-core is given it, and the tool names it.
ON_GPUS = {
    "parallel.context_parallel_size": (2, "context_parallel_size"),
    "parallel.tp_comm_overlap": (True, "tp_comm_overlap"),
    "training.fp8": ("hybrid", "fp8"),
    "training.fp8_recipe": ("mxfp8", "fp8_recipe"),
    "training.transformer_impl": ("transformer_engine", "transformer_impl"),
}


def settings_of(config: type, prefix: str = "") -> Iterator[str]:
    """Names of all settings, as on the command line."""
    for name, kind in get_type_hints(config).items():
        if dataclasses.is_dataclass(kind) and isinstance(kind, type):
            yield from settings_of(kind, f"{prefix}{name}.")
        else:
            yield prefix + name


def test_every_setting_has_a_row() -> None:
    assert sorted([row.setting for row in ROWS] + [*ON_GPUS]) == sorted(settings_of(RunConfig))


def test_a_row_gives_the_setting_and_its_counterpart_does_not() -> None:
    for row in ROWS:
        if row.setting not in ("mixture", "checkpoint.load", "checkpoint.save", "training.train_iters"):
            assert row.setting in STARTS[row.start].settings, row
            assert row.setting not in STARTS[row.without].settings, row


class Starts:
    """Starts the tool when somebody asks what is to be seen of a start."""

    def __init__(self, runs: Runs, forks: Forks) -> None:
        self.runs, self.forks, self.done = runs, forks, dict[str, Seen]()
        mixture = yaml.safe_load(Path(runs.mixture).read_text())
        write_yaml(runs.folder / "half.yaml", mixture | {"almr": 0.5})
        write_yaml(runs.folder / "no_validation.yaml", mixture | {"validation": []})

    def __getitem__(self, name: str) -> Seen:
        if name not in self.done:
            self.done[name] = self.run(name, STARTS[name])
        return self.done[name]

    def run(self, name: str, start: Start) -> Seen:
        """Run it to its end."""
        folder = self.runs.folder / name
        if start.after is not None:
            shutil.copytree(self[start.after].folder, folder)
        settings = {
            "mixture": "mixture",
            "checkpoint.load": str(self.runs.folder / "megatron"),
            "checkpoint.save": str(folder),
            "training.global_batch_size": BATCH,
        } | start.settings
        settings["mixture"] = str(self.runs.folder / f"{settings['mixture']}.yaml")
        if settings["checkpoint.load"] in STARTS:
            settings["checkpoint.load"] = str(self[settings["checkpoint.load"]].folder)
        arguments = [f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in settings.items()]
        told, log = self.runs.folder / f"{name}-told", self.runs.folder / f"{name}.log"
        tamper = {"tell_engine": str(told)} | start.tamper
        if SHORT.items() <= start.settings.items() and not start.tamper:
            tamper["no_saves"] = True  # which takes half of the time of one step
        if "no_wandb" in tamper:
            tamper["no_wandb"] = f"{told}-wandb"
        job = self.forks.start(arguments, log, start.processes, tamper, launcher=start.processes > 1)
        assert job.wait() == [start.status] * start.processes, job.text()
        return Seen(folder, told, log, self)


@pytest.fixture(scope="module")
def starts(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_dir: str, forks: Forks) -> Starts:
    return Starts(Runs(tmp_path_factory.mktemp("settings"), tiny_tokenizer_dir, **VARIANTS["tied"]), forks)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.setting)
def test_it_acts(starts: Starts, row: Row) -> None:
    assert row.seen(starts[row.start]) == row.expected
    assert row.seen(starts[row.without]) != row.expected


@pytest.mark.parametrize("setting", ON_GPUS)
def test_what_needs_a_gpu_reaches_megatron_core(starts: Starts, setting: str) -> None:
    value, name = ON_GPUS[setting]
    given: dict[str, dict[str, Any]] = {
        "parallel": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
        "training": {"train_iters": 1, "params_dtype": "bf16", "fp8": "e4m3"},
    }
    given[setting.split(".")[0]][setting.split(".")[1]] = value
    config = make_transformer_config(
        read_llama_config(str(starts.runs.folder / "hf")),
        ParallelConfig(**given["parallel"]),
        torch.bfloat16,
        numerics_of(TrainingConfig(**given["training"])),
    )
    assert getattr(config, name) == value
