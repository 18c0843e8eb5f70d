"""The training loop against a plain transformers + torch loop, the HF Trainer and megatron-core's bare step.

All contenders of a row are alive at the same time, each in a process of its own, but take turns of three steps: whatever
else the machine does, it does to all of them. The first step of a turn does not count, as after a pause caches are cold. A
step is the time from one look at the clock to the next in the contender's own loop, so everything its loop does is in it.

Settings, by environment variable:
    BENCH_CACHE     where inputs are kept (SmolLM2-135M and its text, from PyPI)
    BENCH_STEPS     steps that count (default 12)
"""

from __future__ import annotations

import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import yaml

from bench.preprocess import REPOSITORY, WORK, run
from bench.row import Row, compare
from megatron_cpt.training.metrics_file import read_metrics

TINY, SMALL = "tiny Llama", "SmolLM2-135M"
PEERS = {"transformers": "plain transformers + torch loop", "trainer": "HF Trainer", "bare": "bare megatron-core step"}
NAMES = (
    *(f"train {model} against {peer}" for model in (TINY, SMALL) for peer in ("transformers", "trainer")),
    "train loop overhead",
    *(f"train scaling {layout}" for layout in ("DP2", "TP2", "PP2")),
    "train save",
)
FOLDERS = {TINY: "tiny", SMALL: "small"}
BATCH = {TINY: (256, 2, 4), SMALL: (256, 1, 2)}  # seq_length, micro batch, global batch
VOCABULARY = 49152  # SmolLM2's
TINY_SHAPES = {
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
TURN, WARM_UP, STEPS = 3, 3, int(os.environ.get("BENCH_STEPS", "12"))


def rows(wanted: str) -> Iterator[Row]:
    """The rows whose name contains `wanted`."""
    chosen = [name for name in NAMES if wanted in name]
    if not chosen:
        return
    prepare(WORK / "train")
    for model in (TINY, SMALL):
        names = {kind: f"train {model} against {kind}" for kind in ("transformers", "trainer")}
        kinds = [kind for kind, name in names.items() if name in chosen]
        if kinds:
            yield from against_peers(model, kinds, names)
    if "train loop overhead" in chosen:
        seconds = in_turn(TINY, ["ours", "bare"])
        ratio = statistics.median(a / b for a, b in zip(seconds["ours"], seconds["bare"], strict=True))
        bare = statistics.median(seconds["bare"])
        yield compare("train loop overhead", "s/step", ratio * bare, bare, PEERS["bare"], 1.02, "most")
    for name in chosen:
        if name.startswith("train scaling"):
            yield scaling(name, name.split()[-1])
    if "train save" in chosen:
        yield from save_blocks()


def against_peers(model: str, kinds: Sequence[str], names: dict[str, str]) -> Iterator[Row]:
    """Tokens per second against each peer: the median of the ratios of steps of the same turn."""
    seconds = in_turn(model, ["ours", *kinds])
    seq_length, _, batch = BATCH[model]
    for kind in kinds:
        ratio = statistics.median(theirs / mine for mine, theirs in zip(seconds["ours"], seconds[kind], strict=True))
        reference = seq_length * batch / statistics.median(seconds[kind])
        yield compare(names[kind], "tokens/s", ratio * reference, reference, PEERS[kind], 1.0, "least")


def in_turn(model: str, kinds: Sequence[str], threads: int | None = None) -> dict[str, list[float]]:
    """Seconds of every step that counts, by contender; the same place in each list is the same turn."""
    with ExitStack() as stack:
        folder, batch = WORK / "train" / FOLDERS[model], BATCH[model]
        contenders = {kind: stack.enter_context(Contender(folder, batch, kind, threads)) for kind in kinds}
        seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
        for number in range(1 + -(-STEPS // (TURN - 1))):
            order = list(kinds)[number % len(kinds) :] + list(kinds)[: number % len(kinds)]
            for kind in order:
                taken = [contenders[kind].step() for _ in range(TURN)]
                if number > 0:
                    seconds[kind] += taken[1:]
        return seconds


class Contender:
    """A process that takes a step when told to.

    Args:
        folder: with hf/, megatron/ and mixture.yaml
        batch: seq_length, micro-batch, global batch
        options: of bench/train_contender.py

    Attributes:
        peak: highest memory use so far, bytes; on a GPU what torch has allocated there
    """

    def __init__(
        self, folder: Path, batch: tuple[int, int, int], kind: str, threads: int | None = None, options: Sequence[str] = ()
    ) -> None:
        self.peak = 0
        command = [sys.executable, "-m", "bench.train_contender", kind, str(folder), *map(str, batch), *options]
        environment = os.environ | ({} if threads is None else {"OMP_NUM_THREADS": str(threads)})
        pipe = subprocess.PIPE
        log = open(folder / f"{kind}.log", "w", encoding="utf-8")  # noqa: SIM115 (closed below)
        self.process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=log, text=True, cwd=REPOSITORY, env=environment
        )
        self.log = log

    def __enter__(self) -> Contender:
        self.wait()  # it is ready for its first step
        return self

    def step(self) -> float:
        """Let it take one; seconds."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self.wait()

    def wait(self) -> float:
        """What it says next."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("seconds "):
                _, seconds, _, peak = line.split()
                self.peak = int(peak)
                return float(seconds)
        sys.exit(f"error: {' '.join(map(str, self.process.args))} ended: {Path(self.log.name).read_text()[-3000:]}")  # type: ignore[arg-type]

    def __exit__(self, *exc_info: object) -> None:
        self.process.kill()
        self.process.wait()
        self.log.close()


def scaling(name: str, layout: str) -> Row:
    """Two processes of one thread against one on the same global batch, and what could be reached.

    The machine's limit is what two runs side by side reach together; a pipeline has one of its own.
    """
    options = {
        "DP2": [],
        "TP2": ["--parallel.tensor_model_parallel_size", "2", "--parallel.sequence_parallel", "true"],
        "PP2": ["--parallel.pipeline_model_parallel_size", "2"],
    }
    (one,) = step_seconds([[]], processes=1)
    (two,) = step_seconds([options[layout]], processes=2)
    limit, limited_by = 2 * one / max(step_seconds([[], []], processes=1)), "two runs side by side"
    if layout == "PP2":
        limit, limited_by = limit * pipeline_share(), "the same, less the pipeline's idle time"
    return compare(name, "x of one process", one / two, limit, limited_by, 0.0, "least")


def pipeline_share() -> float:
    """The most that two stages of the tiny model can compute, of what two processes could: the second has the output layer.

    Work is in proportion to the weights of matrix products. m micro-batches take m times the slower stage's share, and once
    the other's to fill and drain the pipeline.
    """
    _, micro, batch = BATCH[TINY]
    hidden, mlp, kv = TINY_SHAPES["hidden_size"], TINY_SHAPES["intermediate_size"], TINY_SHAPES["hidden_size"] // 2
    layers = TINY_SHAPES["num_hidden_layers"] // 2 * (2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * mlp)
    first, second, microbatches = layers, layers + hidden * VOCABULARY, batch // micro
    return microbatches * (first + second) / (microbatches * second + first) / 2


def step_seconds(options: Sequence[Sequence[str]], processes: int) -> list[float]:
    """Median step of runs of tools/pretrain_cpt.py on the tiny model, all at the same time, a thread for each process."""
    source, (_, micro, batch) = WORK / "train" / FOLDERS[TINY], BATCH[TINY]
    with tempfile.TemporaryDirectory(dir=WORK) as folder:
        running = []
        for number, more in enumerate(options):
            launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv_backend", "c10d"]
            launcher += ["--rdzv_endpoint", "localhost:0"]
            command = [sys.executable, *(launcher if processes > 1 else []), "tools/pretrain_cpt.py"]
            command += ["--mixture", f"{source}/mixture.yaml", "--checkpoint.load", f"{source}/megatron"]
            command += ["--checkpoint.save", f"{folder}/{number}", "--training.train_iters", str(WARM_UP + STEPS)]
            command += ["--training.micro_batch_size", str(micro), "--training.global_batch_size", str(batch), *more]
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            running.append(subprocess.Popen(command, cwd=REPOSITORY, env=environment, stderr=subprocess.PIPE, text=True))
        for process in running:
            _, said = process.communicate()
            if process.returncode:
                sys.exit(f"error: a run ended with status {process.returncode}: {said[-3000:]}")
        rows = [read_metrics(f"{folder}/{number}") for number in range(len(options))]
    return [statistics.median([row["seconds"] for row in run if "loss" in row][WARM_UP:]) for run in rows]


def save_blocks() -> Iterator[Row]:
    """How long an asynchronous save of SmolLM2-135M with its optimizer (fp32, 2.1 GB) holds up the run, at most."""
    source = WORK / "train" / FOLDERS[SMALL]
    with tempfile.TemporaryDirectory(dir=WORK) as folder:
        command = [sys.executable, "tools/pretrain_cpt.py", "--mixture", f"{source}/mixture.yaml"]
        command += ["--checkpoint.load", f"{source}/megatron", "--checkpoint.save", folder, "--training.train_iters", "13"]
        command += ["--training.global_batch_size", "2", "--checkpoint.async_save", "true"]
        command += ["--checkpoint.save_interval", "3", "--checkpoint.keep_last", "1"]
        said = run(command).output
    waits = [float(found) for found in re.findall(r"training waited ([0-9.]+) s", said)]
    blocked = waits[:-1]  # the last is not asynchronous
    if not blocked:
        sys.exit(f"error: no save was seen: {said[-3000:]}")
    yield compare("train save", "s", max(blocked), 1.0, "the limit, SmolLM2-135M with optimizer", 1.0, "most")


def prepare(folder: Path) -> None:
    """Models, corpora and a mixture, once."""
    if (folder / "ready").exists():
        return
    run([sys.executable, "examples/quickstart/fetch.py", str(folder / "inputs")])
    for language in ("en", "zh"):
        source = folder / "inputs" / f"{language}_train.jsonl"
        command = [sys.executable, "tools/preprocess_data.py", "--input", str(source), "--language", language]
        command += ["--tokenizer", str(folder / "inputs" / "hf"), "--eos_token", "<|endoftext|>", "--overwrite"]
        run([*command, "--output_prefix", str(folder / language)])
    for model, name in FOLDERS.items():
        target = folder / name
        target.mkdir(exist_ok=True)
        hf = folder / "inputs" / "hf" if model == SMALL else make_tiny(folder / "inputs" / "hf", target / "hf")
        command = [sys.executable, "tools/convert_checkpoint.py", "hf-to-megatron", "--hf", str(hf), "--overwrite"]
        run([*command, "--megatron", str(target / "megatron")])
        if not (target / "hf").exists():
            (target / "hf").symlink_to(hf)
        entries = {"general": [{"prefix": str(folder / "en")}], "additional": [{"prefix": str(folder / "zh")}]}
        mixture = {"seq_length": BATCH[model][0], "seed": 1, "almr": 0.5, **entries}
        (target / "mixture.yaml").write_text(yaml.safe_dump(mixture))
    (folder / "ready").touch()


def make_tiny(source: Path, target: Path) -> Path:
    """A random Llama of 8 layers with SmolLM2's tokenizer."""
    import shutil

    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=2048, tie_word_embeddings=True, **TINY_SHAPES)
    LlamaForCausalLM(config).save_pretrained(target)
    for path in source.iterdir():
        if path.name not in ("config.json", "model.safetensors", "generation_config.json"):
            shutil.copy(path, target)
    return target
