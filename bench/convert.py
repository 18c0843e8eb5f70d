"""Conversion of checkpoints with the shapes of Llama-3 8B and 70B: speed against copying the same files, and memory.

Random bf16 weights, made shard by shard. Only rows that are asked for by name run: 8B needs 50 GB of disk, and took three
minutes; the layers of 70B are cut to `BENCH_LAYERS` (default 4: 11 GB of weights, 35 GB of disk). All is removed
at the end.

Copying is `cp` and `sync`; before each copy and each conversion the page cache is emptied where that is allowed (root).
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

from bench.preprocess import REPOSITORY, WORK
from bench.row import Row, compare

NAMES = ("convert-8b", "convert-70b")
SHAPES = {
    "convert-8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "convert-70b": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": int(os.environ.get("BENCH_LAYERS", "4")),
        "num_attention_heads": 64,
    },
}
MOST_GB = {"convert-8b": 4.0, "convert-70b": 2.0 + 3 * 2.1}  # anonymous memory: 2 GB and a few times the largest tensor
SHARE_OF_COPY = 0.6
SHARD = "4900MB"


def rows(wanted: str) -> Iterator[Row]:
    """The rows whose name begins with `wanted`; none if nothing is asked for."""
    for name in NAMES:
        if wanted and (name in wanted or wanted in name):
            WORK.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=WORK) as folder:
                yield from both_ways(name, Path(folder))


def both_ways(name: str, folder: Path) -> Iterator[Row]:
    """Make a checkpoint, convert it, and back; each next to a copy of what is read."""
    hf, megatron, back = folder / "hf", folder / "megatron", folder / "back"
    make_checkpoint(hf, SHAPES[name])
    tool = [sys.executable, "tools/convert_checkpoint.py"]
    there = [*tool, "hf-to-megatron", "--hf", str(hf), "--megatron", str(megatron)]
    yield from against_copy(f"{name} hf-to-megatron", hf, folder / "copy", there, MOST_GB[name])
    again = [*tool, "megatron-to-hf", "--megatron", str(megatron), "--hf", str(back), "--max_shard_size", SHARD]
    yield from against_copy(f"{name} megatron-to-hf", megatron / "release", folder / "copy", again, MOST_GB[name])
    same = all(
        subprocess.run(["cmp", "-s", str(path), str(back / path.name)]).returncode == 0 for path in hf.glob("*.safetensors")
    )
    yield compare(f"{name} the same bytes", "", float(same), 1.0, "the files it began with", 1.0, "least")


def against_copy(name: str, source: Path, copy: Path, command: list[str], most_gb: float) -> Iterator[Row]:
    """Rates and memory of one direction."""
    gigabytes = sum(path.stat().st_size for path in source.rglob("*") if path.is_file()) / 1e9
    empty_page_cache()
    copying = timed(lambda: subprocess.run(f"cp -r {source} {copy} && sync", shell=True, check=True))
    shutil.rmtree(copy)
    empty_page_cache()
    process = subprocess.Popen(command, cwd=REPOSITORY)
    memory = Memory(process.pid)
    seconds = timed(process.wait) + timed(lambda: subprocess.run("sync", check=True))
    memory.stop()
    if process.returncode:
        sys.exit(f"error: {' '.join(command)} ended with status {process.returncode}")
    yield compare(name, "GB/s", gigabytes / seconds, gigabytes / copying, "cp and sync", SHARE_OF_COPY, "least")
    print(f"{name}: at most {memory.anonymous / 1e9:.2f} GB anonymous, {memory.resident / 1e9:.2f} GB with mapped files")
    yield compare(f"{name} memory", "GB", memory.anonymous / 1e9, most_gb, "the limit, anonymous memory", 1.0, "most")


def timed(work: Callable[[], object]) -> float:
    """Seconds."""
    began = time.monotonic()
    work()
    return time.monotonic() - began


def empty_page_cache() -> None:
    """So that reading means the disk, where we may."""
    with contextlib.suppress(OSError):
        os.sync()
        Path("/proc/sys/vm/drop_caches").write_text("3")


class Memory:
    """The most memory that a process and its children have together, looked at every 50 ms."""

    def __init__(self, pid: int) -> None:
        self.anonymous = self.resident = 0
        self._process, self._over = psutil.Process(pid), threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def _watch(self) -> None:
        while not self._over.wait(0.05):
            anonymous = resident = 0
            with contextlib.suppress(psutil.Error):
                for process in (self._process, *self._process.children(recursive=True)):
                    with contextlib.suppress(psutil.Error, OSError):
                        info = process.memory_info()
                        resident += info.rss
                        anonymous += anonymous_bytes(process.pid)
            self.anonymous, self.resident = max(self.anonymous, anonymous), max(self.resident, resident)

    def stop(self) -> None:
        """Look no more."""
        self._over.set()
        self._thread.join()


def anonymous_bytes(pid: int) -> int:
    """RssAnon of a process: a page that a fork shares counts in both."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0


def make_checkpoint(folder: Path, shapes: dict[str, int]) -> None:
    """Random weights of one of these shapes, with Llama-3's vocabulary, in shards."""
    import torch

    from megatron_cpt.checkpoint.hf_files import TensorInfo, plan_shards, write_safetensors
    from megatron_cpt.convert.hf_weights import hf_shapes
    from megatron_cpt.model.llama import read_llama_config

    folder.mkdir()
    fields = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128256, "num_key_value_heads": 8}
    fields |= {"max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "torch_dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(fields | shapes))
    infos = {name: TensorInfo(shape, "bfloat16") for name, shape in hf_shapes(read_llama_config(str(folder))).items()}
    noise = torch.randn(1 << 24, generator=torch.Generator().manual_seed(0)).bfloat16()

    def make(name: str) -> torch.Tensor:
        shape = infos[name].shape
        count = torch.Size(shape).numel()
        values = noise.repeat(-(-count // len(noise)))[:count].view(shape)
        values.view(-1)[0] = len(name)  # no two tensors are the same
        return values

    shards, index = plan_shards(infos, SHARD)
    for shard in shards:
        write_safetensors(str(folder / shard.name), {n: infos[n] for n in shard.tensors}, make, lambda count: None)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
