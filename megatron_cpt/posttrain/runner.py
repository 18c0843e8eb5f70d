"""What surrounds a TRL trainer: where it resumes, what it writes down, how it stops, and the folder it leaves."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import shutil
import signal
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState, init_empty_weights
from transformers import PrinterCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from megatron_cpt.checkpoint.folders import atomic_folder
from megatron_cpt.checkpoint.layout import versions
from megatron_cpt.model.hf_folder import check_model
from megatron_cpt.posttrain.checkpoints import RESULT, RUN, set_aside
from megatron_cpt.posttrain.identity import check_same, first_start
from megatron_cpt.posttrain.run_files import check_save, data_files
from megatron_cpt.posttrain.settings import TuningDataConfig
from megatron_cpt.posttrain.sharding import sum_in_fp32
from megatron_cpt.posttrain.template_files import read_template
from megatron_cpt.posttrain.templates import Template, load_template
from megatron_cpt.training.metrics_file import MetricsFile
from megatron_cpt.utils.errors import InputError, Refusals, RunError
from megatron_cpt.utils.files import finite, sync_files, write_json
from megatron_cpt.utils.signals import handling

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
REPORT, STATUS = "data_report.json", "status.json"


def check_tuning_files(folder: str | None, model: str, data: TuningDataConfig) -> list[str]:
    """The paths of the data, when they are there, and the run may begin, or resume, in its folder (None: it saves nothing).

    Raises:
        InputError: something is wrong with one of them; InputErrors: with several
    """
    refusals, files = Refusals(), list[str]()
    with refusals.noted():
        if folder is not None:
            check_save(folder)
    with refusals.noted():
        check_model(model)
    with refusals.noted():
        files = data_files(data)
    with refusals.noted():
        if data.chat_template is not None:
            read_template(data.chat_template, "data.chat_template")
    refusals.raise_any()
    return files


def check_resumes(checkpoint: str | None, facts: dict[str, Any]) -> None:
    """Raise InputError if the run that a checkpoint is of would resume with something else than it began with."""
    if checkpoint is not None:
        check_same(os.path.join(os.path.dirname(checkpoint), RUN), facts)


def load_dated_template(model: str, name: str | None, checkpoint: str | None) -> Template:
    """The chat template of a run, for which it is always the time of the run's first start; a line says so if it asks."""
    path = None if checkpoint is None else os.path.join(os.path.dirname(checkpoint), RUN)
    template = load_template(model, name, first_start(path))
    if template.date is not None and PartialState().is_main_process:
        day = template.date.split("T")[0]
        said = f"the chat template writes the date into conversations: all have {day}, the day of the run's first start"
        logger.info(f"note: {said}; chat and evaluation have the day on which they run")
    return template


def begin_run(folder: str, checkpoint: str | None, facts: dict[str, Any]) -> None:
    """Put aside what the run does not resume from, and write run.json, unless it resumes. By the first process."""
    step = -1 if checkpoint is None else int(os.path.basename(checkpoint).removeprefix("checkpoint-"))
    for name in set_aside(folder, step):
        logger.info(f"set aside: {name}")
    if checkpoint is None:
        write_json(os.path.join(folder, RUN), facts | {"run_id": uuid.uuid4().hex, "versions": versions()})


class RunRecord(TrainerCallback):
    """metrics.jsonl and a line on screen, by the first process."""

    def __init__(self, folder: str, resumed: TrainerState | None) -> None:
        self._first = PartialState().is_main_process
        self._folder = folder
        self._file = MetricsFile(folder)
        self._began = time.monotonic()
        if self._first:
            problems = self._file.keep_until(-1) if resumed is None else self._file.keep_until(*kept_by(resumed))
            for problem in problems:
                logger.warning(problem)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Save, evaluate and log as often as this start says: transformers would do so as the checkpoint says."""
        state.compute_steps(args, state.max_steps)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any], **_: Any
    ) -> None:
        """A row of metrics.jsonl, with the trainer's names, and a line.

        The last one has `train_loss`, the mean over all steps; its times are of the part since the last start.

        Raises:
            RunError: the loss is not finite, on all processes, and before the trainer saves what came of it
        """
        if self._first:
            self._write(state, logs)
        if not math.isfinite(logs.get("loss", 0.0)):
            reason = f"the loss of step {state.global_step} is {logs['loss']}"
            if self._first:
                failed = {"state": "failed", "iteration": state.global_step, "reason": reason}
                write_json(os.path.join(self._folder, STATUS), failed)
            raise RunError(f"{reason}; use a lower optimizer.lr, or look at the rows of that step")

    def _write(self, state: TrainerState, logs: dict[str, Any]) -> None:
        row = {"iteration": state.global_step} | {name: value for name, value in logs.items() if name != "total_flos"}
        if "train_loss" in row:  # the trainer's is of the part since the last start
            row["train_loss"] = mean_loss(state.log_history)
        self._file.append(row)
        logger.info(line_of(row, state.max_steps, time.monotonic() - self._began))


def mean_loss(history: list[dict[str, Any]]) -> float | None:
    """Over all steps: a row of the trainer's history has the mean of the steps since the row before it."""
    total, before = 0.0, 0
    for row in history:
        if "loss" in row:
            total += row["loss"] * (row["step"] - before)
            before = row["step"]
    return total / before if before else None


def kept_by(resumed: TrainerState) -> tuple[int, Callable[[dict[str, Any]], bool]]:
    """The step that a run goes on after, and which rows of it are not written anew: its own, and those of an evaluation that
    the checkpoint knows of."""
    evaluated = evaluated_at(resumed, resumed.global_step)
    return resumed.global_step, lambda row: "loss" in row or (evaluated and "train_runtime" not in row)


SHOWN = (
    ("loss", "loss", ".4f"),
    ("learning_rate", "lr", ".2e"),
    ("grad_norm", "grad norm", ".2f"),
    ("rewards/accuracies", "accuracy", ".1%"),
    ("rewards/margins", "margin", ".3f"),
)


def line_of(row: dict[str, Any], steps: int, seconds: float) -> str:
    """What a person wants to see of a row."""
    parts = [f"step {row['iteration']}/{steps}"]
    parts += [f"{label} {float(row[name]):{form}}" for name, label, form in SHOWN if name in row]
    if any(name.startswith("eval_") for name in row):
        parts[0] = f"evaluation at step {row['iteration']}"
        kept = ("loss", "rewards/accuracies", "rewards/margins")
        parts += [
            f"{name.removeprefix('eval_').replace('_', ' ')} {value:.4f}"
            for name, value in row.items()
            if name.startswith("eval_") and name.endswith(kept)
        ]
    return " | ".join([*parts, f"{seconds:.0f} s"])


class Stop(TrainerCallback):
    """SIGTERM and SIGUSR1: save after this step, and stop. All processes agree: a signal may reach one before another."""

    def __init__(self) -> None:
        self.asked: str | None = None

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """For the length of the block."""

        def ask(number: int, frame: object) -> None:
            self.asked = signal.Signals(number).name

        with handling(ask, *SIGNALS):
            yield

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> TrainerControl:
        """Ask the trainer to save and to stop."""
        asked = torch.tensor(int(self.asked is not None), device=args.device)
        if dist.is_initialized():
            dist.all_reduce(asked)
        if asked.item():
            self.asked = self.asked or "a signal to another process"
            control.should_save = control.should_training_stop = True
        # Losses since the last line are in no checkpoint
        control.should_log = control.should_log or control.should_save
        return control


def run_training(
    trainer: Any,
    folder: str,
    checkpoint: str | None,
    tokenizer: Any,
    settings: dict[str, Any],
    facts: dict[str, Any],
    merge: bool,
    dtype: torch.dtype,
) -> str:
    """Evaluate, train, evaluate, and write the result; goes on where an earlier attempt has saved.

    Args:
        checkpoint: where the run resumes; None: it begins
        tokenizer: goes along with the model
        settings: for the manifest
        facts: for run.json, which is written once nothing is found wrong any more
        merge: of a model with adapters, write their sum with the weights
        dtype: of the weights that are written

    Returns the folder of the result, or, when it was told to stop, that of the run.
    """
    stop = Stop()
    resumed = TrainerState.load_from_json(os.path.join(checkpoint, "trainer_state.json")) if checkpoint else None
    trainer.remove_callback(PrinterCallback)
    for callback in (RunRecord(folder, resumed), stop):
        trainer.add_callback(callback)
    if resumed is not None and resumed.global_step >= resumed.max_steps:
        # All steps are done: only the state is to be loaded. With max_steps transformers would do another
        trainer.args.max_steps, trainer.args.num_train_epochs = -1, 0
    first = PartialState().is_main_process
    if checkpoint and first:
        logger.info(f"resuming from {checkpoint}")
    # Within the training, where a sharded model is sharded already
    trainer.args.eval_on_start = bool(trainer.eval_dataset) and checkpoint is None
    sum_in_fp32(trainer.accelerator)
    if first:
        rehearse(trainer, folder, tokenizer, dtype)
        begin_run(folder, checkpoint, facts)
    trainer.accelerator.wait_for_everyone()
    with stop.listening():
        trainer.train(resume_from_checkpoint=checkpoint)
        steps = int(trainer.state.global_step)
        if steps < trainer.state.max_steps:
            if first:
                write_json(os.path.join(folder, STATUS), {"state": "stopped", "iteration": steps, "reason": stop.asked})
                logger.info(f"stopped by {stop.asked} after step {steps}; the same command goes on")
            return folder
        if trainer.eval_dataset and not evaluated_at(trainer.state, steps):
            trainer.evaluate()
    target = os.path.join(folder, RESULT)
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)  # of all processes, on the first
    if first:
        model = trainer.accelerator.unwrap_model(trainer.model)
        with atomic_folder(target) as temporary:
            write_model(model, weights, temporary, merge, dtype)
            tokenizer.save_pretrained(temporary)
            facts = {"kind": "finetune", "iteration": steps, "config": settings, "versions": versions()}
            write_json(os.path.join(temporary, "manifest.json"), facts)
            sync_files(temporary)
        loss = next((row["loss"] for row in reversed(trainer.state.log_history) if "loss" in row), None)  # the last logged
        write_json(os.path.join(folder, STATUS), finite({"state": "finished", "iteration": steps, "loss": loss}))
    trainer.accelerator.wait_for_everyone()
    return target


def rehearse(trainer: Any, folder: str, tokenizer: Any, dtype: torch.dtype) -> None:
    """Do what the end needs, but for the weights, before the first step.

    Raises:
        InputError: the folder cannot be written to or has no room, or the model's configuration or tokenizer is none that
            transformers writes
    """
    model = getattr(trainer.model, "get_base_model", lambda: trainer.model)()
    numbers = sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in model.parameters())
    needed = numbers * dtype.itemsize
    if trainer.args.save_strategy != "no":
        trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
        needed += 3 * sum(4 * getattr(parameter, "ds_numel", parameter.numel()) for parameter in trained)  # with AdamW's
    free = shutil.disk_usage(folder).free
    if free < needed:
        has, wants = f"{free / 1e9:.1f}", f"{needed / 1e9:.1f}"
        raise InputError(f"{folder}: {has} GB are free; expected {wants} GB, for the result and a checkpoint")
    with tempfile.TemporaryDirectory(dir=folder, prefix=".rehearsal-") as temporary:
        for what in (model.config, model.generation_config, tokenizer):
            try:
                what.save_pretrained(temporary)
            except (ValueError, TypeError, AttributeError) as error:
                named = f"the {type(what).__name__} of {model.config._name_or_path}"
                raise InputError(f"{named} could not be written in the end: {' '.join(str(error).split())[:300]}") from error
        load_template(temporary, None)


def evaluated_at(state: TrainerState, step: int) -> bool:
    """Whether there was an evaluation after this step, as where eval_interval divides the last."""
    return any(row["step"] == step and any(name.startswith("eval_") for name in row) for row in state.log_history)


def write_model(model: Any, weights: dict[str, torch.Tensor], folder: str, merge: bool, dtype: torch.dtype) -> None:
    """A Hugging Face folder; of a model with adapters that are not merged, the adapters'.

    Args:
        model: may be sharded, so its own weights are not looked at
        weights: all of them
    """
    if hasattr(model, "merge_and_unload"):
        if not merge:
            model.save_pretrained(folder, state_dict=weights)
            return
        model = merge_adapters(model, weights)
        weights = model.state_dict()
    model.config.dtype = dtype
    again = model.all_tied_weights_keys if model.config.tie_word_embeddings else {}  # the same weights under other names
    own = {name: tensor.to(dtype) for name, tensor in weights.items() if name not in again}
    model.save_pretrained(folder, state_dict=own)


def merge_adapters(model: Any, weights: dict[str, torch.Tensor]) -> Any:
    """A model with adapters as one without them, of all its weights: the model itself may hold only a part of them."""
    import peft
    from transformers import AutoModelForCausalLM

    with init_empty_weights(include_buffers=False):
        whole = AutoModelForCausalLM.from_config(model.config)
        whole = peft.get_peft_model(whole, model.peft_config["default"])
    whole.load_state_dict(weights, assign=True)
    plain = whole.merge_and_unload()
    plain.generation_config = model.generation_config
    return plain
