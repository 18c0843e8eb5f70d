"""On one GPU: training layers of Llama-3 8B's shape against a plain transformers + torch loop and against the plan, and the
order of the data in CUDA against C++.

Only where there is a GPU, and only rows that are asked for by name. One after the other, each in a process of its own;
between steps the GPU is waited for. Text is the repository's own, byte by byte; weights are random.

Settings, by environment variable:
    BENCH_CACHE     where inputs are kept
    BENCH_LAYERS    layers of the model (default 8; all 32 need more memory than one GPU has)
    BENCH_STEPS     steps that count (default 10), after three that do not
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from bench.preprocess import REPOSITORY, WORK, run
from bench.row import Row, compare
from bench.train import Contender
from megatron_cpt.platforms import current_platform
from megatron_cpt.platforms.devices import device_type

LAYERS, STEPS, WARM_UP = int(os.environ.get("BENCH_LAYERS", "8")), int(os.environ.get("BENCH_STEPS", "10")), 3
BATCHES = {2048: (2048, 4, 16), 8192: (8192, 1, 4)}  # seq_length -> that, micro-batch, global batch
NAMES = (*(f"gpu train {seq_length}" for seq_length in BATCHES), "gpu train packed", "gpu order")
SHAPE = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
}
PLACES = (1_500_000, 100_000_000)


def rows(wanted: str) -> Iterator[Row]:
    """The rows whose name contains `wanted`, if that begins with "gpu"."""
    chosen = [name for name in NAMES if wanted.startswith("gpu") and wanted in name]
    if not chosen:
        return
    if device_type() != "cuda":
        sys.exit("error: there is no GPU here that torch can use; rows that begin with gpu need one")
    if any(name.startswith("gpu train") for name in chosen):
        prepare(WORK / "gpu")
    for seq_length in BATCHES:
        if f"gpu train {seq_length}" in chosen:
            yield from training(seq_length)
    if "gpu train packed" in chosen:
        yield packed()
    if "gpu order" in chosen:
        for count in PLACES:
            yield places(count)


def training(seq_length: int) -> Iterator[Row]:
    """Speed against transformers, and memory and speed against the plan."""
    batch = BATCHES[seq_length]
    ours, peak = measure("ours", batch)
    theirs, their_peak = measure("transformers", batch)
    yield compare(
        f"gpu train {seq_length}", "tokens/s", ours, theirs, "transformers in bf16, AdamW's moments too", 1.0, "least"
    )
    yield compare(f"gpu train {seq_length}: memory", "GB", peak / 1e9, their_peak / 1e9, "the same", 2.0, "most")
    planned = plan(batch)
    memory = planned["memory_bytes"]
    state = memory["weights"] + memory["gradients"] + memory["optimizer"]
    activations = sum(memory["activations"].values()) + memory["working"]
    yield compare(
        f"gpu train {seq_length}: planned memory", "GB", peak / 1e9, memory["total"] / 1e9, "plan_run.py", 1.0, "most"
    )
    yield compare(
        f"gpu train {seq_length}: activations",
        "GB",
        (peak - state) / 1e9,
        activations / 1e9,
        "its activations",
        1.05,
        "most",
    )
    rate = planned["tokens_per_second_per_device"]
    yield compare(f"gpu train {seq_length}: planned speed", "tokens/s", ours, rate, "plan_run.py", 0.75, "least")
    yield utilisation(seq_length, ours)


def packed() -> Row:
    """Attention within documents (this repository's files, or their parts in a sample of 8192 bytes) against without."""
    whole, _ = measure("ours", BATCHES[8192])
    within, _ = measure("ours", BATCHES[8192], "--packed")
    return compare("gpu train packed", "tokens/s", within, whole, "without documents", 0.8, "least")


def utilisation(seq_length: int, rate: float) -> Row:
    """MFU as the progress line has it, causal attention counted half."""
    from megatron_cpt.model.flops import flops_per_token
    from megatron_cpt.model.llama import read_llama_config
    from megatron_cpt.training.throughput import step_throughput

    llama = read_llama_config(str(WORK / "gpu" / "hf"))
    flops = (flops_per_token(llama, seq_length, causal=False), flops_per_token(llama, seq_length, causal=True))
    share = step_throughput(1.0, int(rate), 1, flops, current_platform().peak_tflops()).get("mfu_causal", 0.0)
    return compare(f"gpu train {seq_length}: MFU", "of 1", share, 1.0, current_platform().device_name(), 0.4, "least")


def measure(kind: str, batch: tuple[int, int, int], *options: str) -> tuple[float, int]:
    """Tokens per second in the median step; highest memory use, bytes."""
    with Contender(WORK / "gpu" / str(batch[0]), batch, kind, options=["--bf16", *options]) as contender:
        seconds = [contender.step() for _ in range(WARM_UP + STEPS)][WARM_UP:]
        seen = f"{[round(value, 4) for value in seconds]} s, {contender.peak / 1e9:.2f} GB at most"
        print(f"{kind} {batch} {' '.join(options)}: {seen}", file=sys.stderr)
        return batch[0] * batch[2] / statistics.median(seconds), contender.peak


def plan(batch: tuple[int, int, int]) -> dict[str, Any]:
    """What tools/plan_run.py says of this job, without recomputation."""
    target = WORK / "gpu" / "plan.json"
    device = "h200" if "H200" in current_platform().device_name() else "h100"
    command = [sys.executable, "tools/plan_run.py", str(WORK / "gpu" / "hf"), "--devices", "1", "--device", device]
    command += ["--seq_length", str(batch[0]), "--micro_batch_size", str(batch[1]), "--global_batch_size", str(batch[2])]
    run([*command, "--recompute_granularity", "none", "--json", str(target)])
    (layout,) = json.loads(target.read_text())["layouts"]
    return layout


def places(count: int) -> Row:
    """Samples whose places are found per second: 50 corpora, into memory of the GPU, and by C++ with all threads."""
    import numpy as np
    import torch

    from bench.loader import virtual_order
    from megatron_cpt.mixture.order.cuda import DeviceOrder

    order = virtual_order()
    on_device = DeviceOrder(order)
    stream = torch.cuda.current_stream()
    found = [torch.empty(count, dtype=dtype, device="cuda") for dtype in (torch.int32, *[torch.int64] * 3)]
    seconds = []
    for _ in range(6):
        torch.cuda.synchronize()
        start = time.perf_counter()
        on_device.locate_into(0, count, *(tensor.data_ptr() for tensor in found), stream.cuda_stream)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    start = time.perf_counter()
    wanted = order.lookup_many(0, count, threads=os.cpu_count() or 1)
    reference = time.perf_counter() - start
    if not all(np.array_equal(tensor.cpu().numpy(), array) for tensor, array in zip(found, wanted, strict=True)):
        sys.exit("error: CUDA and C++ give different places")
    rate = count / statistics.median(seconds[1:])
    name = f"gpu order, {count:,} places"
    return compare(name, "million/s", rate / 1e6, count / reference / 1e6, "C++, all threads", 1.0, "least")


def prepare(folder: Path) -> None:
    """The model, in both formats, and two corpora; once."""
    if (folder / "ready").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    make_model(folder / "hf")
    texts = [
        path.read_text(encoding="utf-8") for ending in ("py", "md") for path in sorted(REPOSITORY.glob(f"*/**/*.{ending}"))
    ]
    for part in range(2):
        source = folder / f"{part}.jsonl"
        source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[part::2]))
        command = [sys.executable, "tools/preprocess_data.py", "--input", str(source), "--language", "en", "--overwrite"]
        run([*command, "--tokenizer", str(folder / "hf"), "--output_prefix", str(folder / str(part))])
    command = [sys.executable, "tools/convert_checkpoint.py", "hf-to-megatron", "--hf", str(folder / "hf"), "--overwrite"]
    run([*command, "--megatron", str(folder / "megatron")])
    entries = {"general": [{"prefix": str(folder / "0")}], "additional": [{"prefix": str(folder / "1")}]}
    for seq_length in BATCHES:
        target = folder / str(seq_length)
        target.mkdir(exist_ok=True)
        (target / "mixture.yaml").write_text(yaml.safe_dump({"seq_length": seq_length, "seed": 1, "almr": 0.5, **entries}))
        for name in ("hf", "megatron"):
            (target / name).unlink(missing_ok=True)
            (target / name).symlink_to(folder / name)
    (folder / "ready").touch()


def make_model(folder: Path) -> None:
    """Random weights in bf16, and a tokenizer of bytes."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        [], trainers.BpeTrainer(vocab_size=257, special_tokens=["<eos>"], initial_alphabet=alphabet)
    )
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = LlamaForCausalLM(LlamaConfig(dtype="bfloat16", bos_token_id=0, eos_token_id=0, **SHAPE)).to(torch.bfloat16)
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", bos_token="<eos>").save_pretrained(folder)
