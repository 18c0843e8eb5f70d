"""One contender of bench/train.py: python -m bench.train_contender KIND FOLDER SEQ_LENGTH MICRO_BATCH GLOBAL_BATCH.

Takes a step for each line on stdin and says how long it took and what memory it has needed. FOLDER holds hf/, megatron/ and
mixture.yaml; all contenders train the same model on the same samples with AdamW and clipping, the loss averaged over the
global batch: in fp32, or with --bf16 in bf16. With --packed ours keeps attention within documents.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

LR, WEIGHT_DECAY, BETAS, CLIP = 1e-5, 0.01, (0.9, 0.95), 1.0
MANY = 100_000  # steps: the harness ends the process


class Gate:
    """Called once in each step of a contender's loop, at the same place: says how long that took, and waits."""

    def __init__(self) -> None:
        self.since: float | None = None

    def __call__(self) -> None:
        import torch

        from megatron_cpt.platforms import current_platform

        if torch.cuda.is_available():
            torch.cuda.synchronize()  # what is queued belongs to this step
        seconds = 0.0 if self.since is None else time.perf_counter() - self.since
        print(f"seconds {seconds} peak {current_platform().peak_memory_bytes()}", flush=True)
        if not sys.stdin.readline():
            sys.exit()
        self.since = time.perf_counter()


@dataclass(frozen=True)
class Task:
    """What all contenders are given."""

    folder: Path
    seq_length: int
    micro: int
    batch: int
    dtype: Literal["fp32", "bf16"]
    packed: bool


def ours(task: Task, gate: Gate) -> None:
    """tools/pretrain_cpt.py's function; the gate is where it logs a step."""
    from megatron_cpt.config.run import CheckpointConfig, DataConfig, OptimizerConfig, RunConfig, TrainingConfig
    from megatron_cpt.training.log import RunLog
    from megatron_cpt.training.pretrain import setup

    class Gated(RunLog):
        def step(self, row: dict[str, Any], train_iters: int) -> None:
            super().step(row, train_iters)
            gate()

    import megatron_cpt.training.pretrain as pretrain

    pretrain.RunLog = Gated  # type: ignore[misc]
    with tempfile.TemporaryDirectory() as save:
        setup(
            RunConfig(
                mixture=str(task.folder / "mixture.yaml"),
                checkpoint=CheckpointConfig(load=str(task.folder / "megatron"), save=save),
                training=TrainingConfig(
                    MANY, micro_batch_size=task.micro, global_batch_size=task.batch, params_dtype=task.dtype
                ),
                data=DataConfig(reset_attention_mask=task.packed),
                optimizer=OptimizerConfig(lr=LR, weight_decay=WEIGHT_DECAY, adam_beta1=BETAS[0], adam_beta2=BETAS[1]),
            )
        )


def bare(task: Task, gate: Gate) -> None:
    """megatron-core's forward-backward function and optimizer step on batches that are there already."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from megatron_cpt.checkpoint.save_load import load_checkpoint
    from megatron_cpt.config.run import CheckpointConfig, RunConfig, TrainingConfig
    from megatron_cpt.platforms.process_groups import process_groups
    from megatron_cpt.training.model_setup import build, unwrap
    from megatron_cpt.training.validate_config import check_run

    with tempfile.TemporaryDirectory() as save:
        config = RunConfig(
            mixture=str(task.folder / "mixture.yaml"),
            checkpoint=CheckpointConfig(load=str(task.folder / "megatron"), save=save),
            training=TrainingConfig(
                MANY, micro_batch_size=task.micro, global_batch_size=task.batch, params_dtype=task.dtype
            ),
        )
        run = check_run(config, 1)
    with process_groups(config.parallel, 1) as ranks:
        chunks, optimizer = build(config, run.llama, task.seq_length, ranks)
        load_checkpoint(run.start_from, unwrap(chunks))
        optimizer.reload_model_params()
        steps = batches(task)

        def forward(iterator: Iterator[Any], module: Any) -> Any:
            tokens = next(iterator)
            output = module(tokens[:, :-1].contiguous(), None, None, labels=tokens[:, 1:].contiguous())

            def loss(losses: Any) -> Any:
                total = losses.float().sum()
                import torch

                return total, torch.tensor(losses.numel(), dtype=torch.int), {"loss": total.detach()}

            return output, loss

        while True:
            microbatches = next(steps)
            gate()
            for chunk in chunks:
                chunk.zero_grad_buffer()
            optimizer.zero_grad()
            for group in optimizer.param_groups:
                group["lr"] = LR
            get_forward_backward_func()(
                forward_step_func=forward,
                data_iterator=iter(microbatches),
                model=chunks,
                num_microbatches=len(microbatches),
                seq_length=task.seq_length,
                micro_batch_size=task.micro,
                forward_only=False,
            )
            optimizer.step()


def transformers_loop(task: Task, gate: Gate) -> None:
    """What one writes by hand: transformers' model and loss, torch's fused AdamW, gradient accumulation, clipping.

    With bf16 everything is in bf16, weights and moments too: less memory and work than ours, which keeps both in fp32.
    """
    import torch
    from transformers import LlamaForCausalLM

    from megatron_cpt.platforms.devices import device_type

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[task.dtype]
    model = LlamaForCausalLM.from_pretrained(task.folder / "hf", dtype=dtype).to(device_type())
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), LR, BETAS, weight_decay=WEIGHT_DECAY, fused=True)
    for microbatches in batches(task):
        gate()
        for tokens in microbatches:
            (model(**inputs(tokens.to(device_type()))).loss / len(microbatches)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()


def inputs(tokens: Any) -> dict[str, Any]:
    """What transformers' models take for the targets that ours are given: not one token more or less."""
    targets = tokens[..., 1:].contiguous()
    return {"input_ids": tokens[..., :-1], "labels": targets, "shift_labels": targets}


def trainer(task: Task, gate: Gate) -> None:
    """The HF Trainer with its defaults."""
    import torch
    from transformers import LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

    from megatron_cpt.platforms.devices import device_type

    class Samples(torch.utils.data.IterableDataset):
        def __iter__(self) -> Iterator[dict[str, Any]]:
            for microbatches in batches(task):
                for tokens in microbatches:
                    yield from map(inputs, tokens)

    class AtTheGate(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            gate()

    with tempfile.TemporaryDirectory() as output:
        Trainer(
            model=LlamaForCausalLM.from_pretrained(task.folder / "hf", dtype=torch.float32),
            args=TrainingArguments(
                output_dir=output,
                max_steps=MANY,
                per_device_train_batch_size=task.micro,
                gradient_accumulation_steps=task.batch // task.micro,
                learning_rate=LR,
                weight_decay=WEIGHT_DECAY,
                adam_beta2=BETAS[1],
                max_grad_norm=CLIP,
                lr_scheduler_type="constant",
                save_strategy="no",
                report_to=[],
                logging_steps=1,
                use_cpu=device_type() == "cpu",
            ),
            train_dataset=Samples(),
            callbacks=[AtTheGate()],
        ).train()


def batches(task: Task) -> Iterator[list[Any]]:
    """The micro-batches of each step, int64 [micro, seq_length + 1], in the order in which our run reads them."""
    import torch

    from megatron_cpt.config.run import DataConfig
    from megatron_cpt.mixture.file import load_mixture
    from megatron_cpt.mixture.loader import BatchShape, TrainingData
    from megatron_cpt.mixture.state import initial_state

    mixture = load_mixture(str(task.folder / "mixture.yaml"))
    schedule = mixture.schedule(MANY * task.batch)
    order = initial_state(mixture, schedule, task.batch).order(mixture, schedule)
    data = TrainingData([corpus.data for corpus in mixture.corpora], order, DataConfig())
    for step in range(MANY):
        shape = BatchShape(task.micro, task.batch, 0, 1)
        yield [torch.from_numpy(read().tokens) for read in data.microbatches(step * task.batch, shape)]


CONTENDERS = {"ours": ours, "bare": bare, "transformers": transformers_loop, "trainer": trainer}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("kind", choices=CONTENDERS)
    parser.add_argument("folder", type=Path)
    for number in ("seq_length", "micro", "batch"):
        parser.add_argument(number, type=int)
    parser.add_argument("--bf16", dest="dtype", action="store_const", const="bf16", default="fp32")
    parser.add_argument("--packed", action="store_true")
    arguments = vars(parser.parse_args())
    CONTENDERS[arguments.pop("kind")](Task(**arguments), Gate())
