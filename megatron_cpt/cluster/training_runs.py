"""The product's promises on this hardware: tools/pretrain_cpt.py itself, in every layout that fits the job's processes."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_cpt.cluster.check import Check, CheckFailedError, Figures, succeeded
from megatron_cpt.cluster.inputs import TOOLS
from megatron_cpt.cluster.job import ClusterJob

STEPS, SAVED = 5, 2
ONE_PROCESS, PACKED_REFERENCE = "one process", "one process, packed"  # what others are compared with
SECONDS = 150.0  # of a run
# Relative differences that are allowed, of losses and gradient norms; tests/training/test_matrix.py says why. Of gradient
# norms more in fp32: Adam's first steps go by the signs of gradients, and those near zero tip over with the order of a sum.
# The norm after five steps has been 1.6e-5 off on a machine without a fault.
EXACT, FP32, BF16, FP8 = (0.0, 0.0), (1e-5, 1e-4), (1e-2, 5e-2), (5e-2, 2e-1)
MORE_BATCHES = 2  # micro-batches of each replica

Setting = tuple[str, Any]
PACKED = (("data.reset_attention_mask", True), ("data.eod_mask_loss", True))
DETERMINISTIC = (("training.deterministic", True),)
TRANSFORMER_ENGINE = (("training.params_dtype", "bf16"), ("training.transformer_impl", "transformer_engine"))


@dataclass(frozen=True)
class ClusterRun:
    """A training run, and which other it has to be like.

    Attributes:
        like: name of the run whose losses and gradient norms it should have
        tolerance: relative differences of the two that are allowed
        after: name of the run from whose checkpoint of step SAVED it goes on
        advice: what to try where it is not like that
    """

    name: str
    processes: int = 1
    settings: tuple[Setting, ...] = ()
    like: str | None = None
    tolerance: tuple[float, float] = EXACT
    after: str | None = None
    advice: str = "run it again with --only and the check's name; see its log"

    @property
    def folder_name(self) -> str:
        """Of its results."""
        return self.name.replace(" ", "_").replace(",", "").replace("/", "-")


def tried_layouts(job: ClusterJob) -> Iterator[tuple[str, tuple[Setting, ...]]]:
    """Names and settings of what is tried on all processes of the job."""
    count, node = job.world_size, job.devices_per_node
    sizes = [(1, 1, None), (2, 1, None), (1, 2, None), (2, 2, None), (1, 2, 2), (1, 4, None)]
    sizes += [(tensor, 1, None) for tensor in (4, 8) if tensor <= node]
    for tensor, pipeline, virtual in sizes:
        if count == 1 or count % (tensor * pipeline) or tensor > node:
            continue
        name = f"TP{tensor} PP{pipeline}{f' VP{virtual}' if virtual else ''} DP{count // (tensor * pipeline)}"
        settings: list[Setting] = [
            ("parallel.tensor_model_parallel_size", tensor),
            ("parallel.pipeline_model_parallel_size", pipeline),
            ("parallel.sequence_parallel", tensor > 1),
        ]
        if virtual:
            settings.append(("parallel.virtual_pipeline_model_parallel_size", virtual))
        if tensor * pipeline < count and not virtual:
            settings += [("parallel.overlap_grad_reduce", True), ("parallel.overlap_param_gather", True)]
        yield name, tuple(settings)


LAYOUT_ADVICE = (
    "collectives give other sums than one process: try --only links, then NCCL_ALGO=Ring, then NCCL_NVLS_ENABLE=0 in the "
    "environment"
)
BF16_ADVICE = "compare with --training.transformer_impl local; another build of Transformer Engine or cuDNN may be needed"


def runs(job: ClusterJob) -> list[ClusterRun]:
    """All runs, each after those that it is compared with."""
    bf16, bits = ("training.params_dtype", "bf16"), "bit for bit"
    found = [
        ClusterRun(ONE_PROCESS, settings=DETERMINISTIC),
        ClusterRun(PACKED_REFERENCE, settings=(*DETERMINISTIC, *PACKED)),
        ClusterRun(f"resume, {bits}", settings=DETERMINISTIC, like=ONE_PROCESS, after=ONE_PROCESS),
        ClusterRun("asynchronous save", settings=(*DETERMINISTIC, ("checkpoint.async_save", True)), like=ONE_PROCESS),
        ClusterRun("bf16", settings=(bf16, ("training.transformer_impl", "local")), like=ONE_PROCESS, tolerance=BF16),
        ClusterRun(
            "bf16, packed",
            settings=(bf16, *PACKED, ("training.transformer_impl", "local")),
            like=PACKED_REFERENCE,
            tolerance=BF16,
        ),
    ]
    all_layouts = list(tried_layouts(job))
    for name, settings in all_layouts:
        found.append(ClusterRun(name, job.world_size, settings, ONE_PROCESS, FP32, advice=LAYOUT_ADVICE))
    if len(all_layouts) > 1:
        (name, settings), (_, plain) = all_layouts[1], all_layouts[0]
        found.append(
            ClusterRun(f"{name}, packed", job.world_size, (*settings, *PACKED), PACKED_REFERENCE, FP32, advice=LAYOUT_ADVICE)
        )
        found.append(ClusterRun(f"resume in {name}", job.world_size, settings, ONE_PROCESS, FP32, after=ONE_PROCESS))
        found.append(
            ClusterRun(f"resume {name} in DP{job.world_size}", job.world_size, plain, ONE_PROCESS, FP32, after=name)
        )
        found.append(ClusterRun(f"resume {name} in one process", 1, (), ONE_PROCESS, FP32, after=name))
    found += transformer_engine_runs(job, all_layouts)
    return found


def transformer_engine_runs(job: ClusterJob, all_layouts: Sequence[tuple[str, tuple[Setting, ...]]]) -> Iterator[ClusterRun]:
    """With its layers: against torch's, packed, resumed, in layouts, and in FP8."""
    te = "Transformer Engine"
    same = functools.partial(ClusterRun, advice=BF16_ADVICE)
    yield same(te, settings=TRANSFORMER_ENGINE, like=ONE_PROCESS, tolerance=BF16)
    yield same(f"{te}, packed", settings=(*TRANSFORMER_ENGINE, *PACKED), like=PACKED_REFERENCE, tolerance=BF16)
    whole = f"{te}, deterministic"
    yield same(whole, settings=(*TRANSFORMER_ENGINE, *DETERMINISTIC), like=ONE_PROCESS, tolerance=BF16)
    yield same(f"{te}, resume", settings=(*TRANSFORMER_ENGINE, *DETERMINISTIC), like=whole, after=whole)
    for name, settings in all_layouts[1:3]:
        yield same(f"{te}, {name}", job.world_size, (*TRANSFORMER_ENGINE, *settings), ONE_PROCESS, BF16)
    if job.world_size % 2 == 0:
        context = (*TRANSFORMER_ENGINE, ("parallel.context_parallel_size", 2))
        yield same(f"{te}, CP2 DP{job.world_size // 2}", job.world_size, context, ONE_PROCESS, BF16)
    for recipe in ("tensorwise", "delayed", "blockwise", "mxfp8"):
        fp8 = (
            *TRANSFORMER_ENGINE,
            ("training.fp8", "hybrid" if recipe != "mxfp8" else "e4m3"),
            ("training.fp8_recipe", recipe),
        )
        yield same(f"FP8 {recipe}", settings=fp8, like=ONE_PROCESS, tolerance=FP8)
        yield same(f"FP8 {recipe}, resume", settings=fp8, like=f"FP8 {recipe}", tolerance=FP8, after=f"FP8 {recipe}")


def impossible(run: ClusterRun) -> str | None:
    """Why a run cannot be made on this machine."""
    settings = dict(run.settings)
    if settings.get("training.params_dtype") == "bf16" and not torch.cuda.is_available():
        return "needs a GPU"
    wants_te = settings.get("training.transformer_impl") == "transformer_engine"
    if wants_te and importlib.util.find_spec("transformer_engine") is None:
        return "Transformer Engine is not installed"
    if "training.fp8" in settings:
        capability, recipe = torch.cuda.get_device_capability(), settings["training.fp8_recipe"]
        lowest, highest = {"mxfp8": ((10, 0), (11, 9)), "blockwise": ((9, 0), (9, 9))}.get(recipe, ((8, 9), (99, 0)))
        if not lowest <= capability <= highest:
            return f"not on GPUs of compute capability {capability[0]}.{capability[1]}"
    return None


def check_of(run: ClusterRun, job: ClusterJob) -> Check:
    """The run as a check."""
    needs = [name for name in (run.like, run.after) if name is not None]
    return Check(
        run.name,
        lambda job: train_once(job, run),
        lambda found: judge_training(run, job, found),
        needs=["inputs", *dict.fromkeys(needs), *([ONE_PROCESS] if "packed" in run.name else [])],
        here=lambda job: impossible(run),
    )


def train_once(job: ClusterJob, run: ClusterRun) -> dict[str, Any] | None:
    """Run it, on the ranks that it takes."""
    folder = job.folder / "runs" / run.folder_name
    if job.is_rank_zero and run.after is not None:
        begin_after(job.folder / "runs" / ClusterRun(run.after).folder_name, folder)
    command = [sys.executable, str(TOOLS / "pretrain_cpt.py"), *arguments(job, run, folder)]
    ended = job.run(run.folder_name, command, run.processes, SECONDS)
    succeeded(ended, job.rank)
    return None if ended is None else dataclasses.asdict(ended)


def arguments(job: ClusterJob, run: ClusterRun, folder: Path) -> list[str]:
    """Of tools/pretrain_cpt.py."""
    settings: dict[str, Any] = {
        "mixture": job.folder / "mixture.yaml",
        "checkpoint.load": job.folder / "megatron",
        "checkpoint.save": folder,
        "checkpoint.save_interval": SAVED,
        "training.train_iters": STEPS,
        "training.global_batch_size": MORE_BATCHES * job.world_size * max(1, 2 // job.world_size),
        "optimizer.lr": 3e-3,
        "optimizer.min_lr": 1e-4,
        "lr.warmup_iters": 2,
        "logging.report": False,
    }
    return [
        f"--{name}={str(value).lower() if isinstance(value, bool) else value}"
        for name, value in (settings | dict(run.settings)).items()
    ]


def begin_after(finished: Path, folder: Path) -> None:
    """A run's folder as it was when `finished` had just saved its first checkpoint."""
    step = f"iter_{SAVED:07d}"
    folder.mkdir(parents=True)
    shutil.copytree(finished / step, folder / step)
    (folder / "latest_checkpointed_iteration.txt").write_text(str(SAVED))
    lines = (finished / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(line for line in lines if json.loads(line)["iteration"] <= SAVED))


def judge_training(run: ClusterRun, job: ClusterJob, found: Sequence[dict[str, Any] | None]) -> tuple[str, Figures]:
    """Whether all its processes ended well, and its losses are those that they should be."""
    first = found[0]
    assert first is not None
    rows = steps(job, run.name)
    figures: dict[str, Any] = {
        "seconds": first["seconds"],
        "steps": rows,
        "tokens_per_second": rows[-1].get("tokens_per_second"),
    }
    if [row["iteration"] for row in rows] != list(range(1, STEPS + 1)):
        raise CheckFailedError(
            f"it has logged steps {[row['iteration'] for row in rows]}, not 1 to {STEPS}", f"see {first['log']}"
        )
    learned = rows[0]["loss"] - rows[-1]["loss"]
    if learned < 0.1:
        raise CheckFailedError(
            f"the loss goes from {rows[0]['loss']:.4f} to {rows[-1]['loss']:.4f}: nothing is learned", run.advice
        )
    # Of a single step all samples may lie within a document each; then nothing is to be told apart
    if "packed" in run.name and read_losses(rows) == read_losses(steps(job, ONE_PROCESS)):
        raise CheckFailedError(f"its losses are those of {ONE_PROCESS}: documents are not told apart", run.advice, figures)
    if run.like is None:
        return f"loss {rows[0]['loss']:.4f} -> {rows[-1]['loss']:.4f}", figures
    theirs = steps(job, run.like)
    differences = {
        name: max(relative(a[name], b[name]) for a, b in zip(rows, theirs, strict=True)) for name in ("loss", "grad_norm")
    }
    figures["largest_relative_difference"] = differences
    for (name, difference), allowed in zip(differences.items(), run.tolerance, strict=True):
        if not difference <= allowed:
            words = name.replace("grad_norm", "gradient norm")
            raise CheckFailedError(
                f"the {words} is {difference:.1e} from that of {run.like}; expected at most {allowed:g}", run.advice, figures
            )
    if not any(differences.values()):
        return f"like {run.like}, bit for bit", figures
    return f"like {run.like} to {differences['loss']:.1e} (loss), {differences['grad_norm']:.1e} (gradient norm)", figures


def read_losses(rows: Sequence[dict[str, Any]]) -> list[float]:
    """The loss of each step."""
    return [row["loss"] for row in rows]


def relative(value: float, wanted: float) -> float:
    """Difference, of the wanted value."""
    return abs(value - wanted) / abs(wanted)


def steps(job: ClusterJob, name: str) -> list[dict[str, Any]]:
    """Rows of the steps of a run."""
    path = job.folder / "runs" / ClusterRun(name).folder_name / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [
        {key: row.get(key) for key in ("iteration", "loss", "grad_norm", "tokens_per_second")}
        for row in rows
        if "loss" in row
    ]


def seconds_to_stop(job: ClusterJob) -> float | None:
    """Seconds from a SIGTERM to the end of a long run: its last rank gets it once the first has taken a step."""
    run = ClusterRun("sigterm", job.world_size, (("training.train_iters", 100_000), ("checkpoint.save_interval", 0)))
    folder = job.folder / "runs" / run.folder_name
    asked: list[float] = []

    def ask(child: subprocess.Popen[bytes]) -> None:
        if job.rank != job.world_size - 1 or asked:
            return
        path = folder / "metrics.jsonl"
        if path.exists() and path.stat().st_size > 0:
            child.send_signal(signal.SIGTERM)
            asked.append(time.monotonic())

    command = [sys.executable, str(TOOLS / "pretrain_cpt.py"), *arguments(job, run, folder)]
    ended = job.run(run.folder_name, command, run.processes, SECONDS, meanwhile=ask)
    succeeded(ended, job.rank)
    return time.monotonic() - asked[0] if asked else None


def judge_stop(job: ClusterJob, found: Sequence[float | None]) -> tuple[str, Figures]:
    """Whether the run has saved and ended by itself; how soon."""
    folder, seconds = job.folder / "runs" / "sigterm", found[-1]
    status = json.loads((folder / "status.json").read_text())
    latest = folder / "latest_checkpointed_iteration.txt"
    if status["state"] != "stopped" or not latest.exists():
        raise CheckFailedError(
            f"the run says {status['state']}, and has {'a' if latest.exists() else 'no'} checkpoint", "see its log"
        )
    return f"saved at step {int(latest.read_text())} and ended within {seconds:.1f} s", {"seconds": seconds}


def training_checks(job: ClusterJob) -> list[Check]:
    """All of them."""
    found = [check_of(run, job) for run in runs(job)]
    found.append(Check("SIGTERM", seconds_to_stop, lambda ended: judge_stop(job, ended), needs=["inputs"]))
    return found
