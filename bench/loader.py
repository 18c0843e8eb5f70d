"""The data order and the loader against megatron-core's, and what they cost a training step.

`BENCH_RUN` names the folder of a training run whose metrics tell the last (default: runs/quickstart/checkpoints).
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path

import numpy as np
import yaml

from bench.preprocess import REPEATS, REPOSITORY, WORK, fetch_tokenizer, gather_text, ours, run
from bench.row import Row, compare
from megatron_cpt.corpus.indexed_dataset import HEADER, MAGIC, VERSION
from megatron_cpt.corpus.manifest import CorpusManifest, FileInfo, TokenizerInfo
from megatron_cpt.mixture.order.order import CorpusTokens, SampleOrder
from megatron_cpt.mixture.order.splitters import Group, StagePlan, build_stages

NAMES = (
    "start first batch",
    "start first batch memory",
    "start against Megatron's builders",
    "loader lookups",
    "loader tokens",
    "loader in a step",
    "loader documents of samples",
)
CORPORA, TOKENS, DOCUMENTS, SEQ_LENGTH = 50, 1_700_000_000_000, 2_100_000_000, 2048
SIZES = (1_000_000, 2_000_000, 4_000_000)  # documents that megatron-core's builders are timed on
RUN = Path(os.environ.get("BENCH_RUN", REPOSITORY / "runs" / "quickstart" / "checkpoints"))


def rows(wanted: str) -> Iterator[Row]:
    """The rows whose name contains `wanted`."""
    chosen = [name for name in NAMES if wanted in name]
    if not chosen:
        return
    WORK.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=WORK) as folder:
        if any(name.startswith("start") for name in chosen):
            yield from first_batch(Path(folder), chosen)
        if NAMES[3] in chosen:
            yield lookups()
        if NAMES[4] in chosen:
            yield tokens(folder)
        if NAMES[5] in chosen:
            yield from in_a_step()
        if NAMES[6] in chosen:
            yield documents(folder)


def first_batch(folder: Path, chosen: list[str]) -> Iterator[Row]:
    """Sparse files of 1.7T tokens in 50 corpora: the whole of each is mapped, none of it exists."""
    mixture = virtual_mixture(folder)
    command = [sys.executable, "-m", "bench.first_batch", str(mixture)]
    runs = [json.loads(run(command).output) for _ in range(REPEATS)]
    best = min(runs, key=lambda found: found["seconds"])
    if NAMES[0] in chosen:
        yield compare(NAMES[0], "s", best["seconds"], 1.0, "the limit, imports apart", 1.0, "most")
    if NAMES[1] in chosen:
        yield compare(NAMES[1], "MB", best["bytes"] / 1e6, 100.0, "the limit, imports apart", 1.0, "most")
    if NAMES[2] in chosen:
        name = "megatron-core's builders, extrapolated"
        yield compare(NAMES[2], "s", best["seconds"], megatron_seconds(), name, 1.0, "most")


def virtual_mixture(folder: Path) -> Path:
    """A mixture of sparse corpora."""
    entries = []
    for i in range(CORPORA):
        prefix = folder / f"corpus{i}"
        number, documents = TOKENS // CORPORA, DOCUMENTS // CORPORA
        with open(f"{prefix}.bin", "wb") as stream:
            stream.truncate(4 * number)
        with open(f"{prefix}.idx", "wb") as stream:
            stream.write(HEADER.pack(MAGIC, VERSION, 4, documents, documents + 1))
            stream.truncate(HEADER.size + 12 * documents + 8 * (documents + 1))
            stream.seek(HEADER.size + 12 * documents - 8)  # the last document: where it begins, and nothing in it
            stream.write(np.int64(4 * number).tobytes())
            stream.seek(-8, os.SEEK_END)
            stream.write(np.int64(documents).tobytes())
        tokenizer = TokenizerInfo("/t", "hf:t", 128_256, 0, None, "ab" * 32, "cd" * 32)
        files = {"bin": FileInfo(4 * number, f"{i:064}"), "idx": FileInfo(0, "")}
        manifest = CorpusManifest(
            *("en", documents, number, number * 4, number * 4, 4.0, {}, {}, "int32", "document", "none", None, None, ""),
            *(tokenizer, [], files, {}, "", 1.0),
        )
        Path(f"{prefix}.json").write_text(json.dumps(asdict(manifest)))
        entries.append({"prefix": str(prefix), "weight": 1 + i % 7})
    path = folder / "mixture.yaml"
    half = CORPORA // 2
    fields = {"seq_length": SEQ_LENGTH, "seed": 1, "almr": 0.33, "general": entries[:half], "additional": entries[half:]}
    path.write_text(yaml.safe_dump(fields))
    return path


def megatron_seconds() -> float:
    """Document, sample, shuffle and blending index for the whole, from what an item of each takes at several sizes."""
    from megatron_cpt.platforms import prepare_platform

    prepare_platform()
    from megatron.core.datasets import helpers
    from megatron.core.datasets.gpt_dataset import _build_document_index, _build_shuffle_index

    samples = TOKENS // SEQ_LENGTH
    per_document, per_sample = [], []
    for documents in SIZES:
        lengths = np.random.default_rng(1).integers(400, 1220, documents).astype(np.int32)
        state = np.random.RandomState(1)
        began = time.perf_counter()
        index = _build_document_index(np.arange(documents, dtype=np.int32), 1, state, False)
        found = helpers.build_sample_idx(lengths, index, SEQ_LENGTH, 1, int(lengths.sum()), True, True)
        per_document.append((time.perf_counter() - began) / documents)
        began = time.perf_counter()
        count = len(found) - 1
        _build_shuffle_index(count, count, state)
        where, which = np.zeros(count, np.int16), np.zeros(count, np.int64)
        helpers.build_blending_indices(where, which, np.full(CORPORA, 1 / CORPORA), CORPORA, count, False)
        per_sample.append((time.perf_counter() - began) / count)
    found_ns = [f"{1e9 * a:.0f} + {1e9 * b:.0f}" for a, b in zip(per_document, per_sample, strict=True)]
    print(f"megatron-core: ns a document + ns a sample at {SIZES} documents: {', '.join(found_ns)}", file=sys.stderr)
    return float(np.median(per_document) * DOCUMENTS + np.median(per_sample) * samples)


def virtual_order() -> SampleOrder:
    """Of 50 corpora with 1.7T tokens in all."""
    weights = tuple(Fraction(1, 1 + i) for i in range(CORPORA // 2))
    groups = [Group(tuple(range(first, first + CORPORA // 2)), weights) for first in (0, CORPORA // 2)]
    stages = build_stages([StagePlan(None, (Fraction(1, 3), Fraction(1, 3)), *groups)], CORPORA)
    corpora = [CorpusTokens(str(i), TOKENS // CORPORA + i) for i in range(CORPORA)]
    return SampleOrder(stages, corpora, SEQ_LENGTH, 1, 1024)


def lookups() -> Row:
    """Places of samples, one thread, a call for each global batch of 1024, against the Python specification."""

    def per_second(order: SampleOrder, batches: int) -> float:
        began = time.perf_counter()
        for first in range(0, 1024 * batches, 1024):
            order.lookup_many(first, 1024)
        return 1024 * batches / (time.perf_counter() - began)

    order = virtual_order()
    mine = max(per_second(order, 1000) for _ in range(REPEATS))
    order._native = None
    reference = max(per_second(order, 20) for _ in range(REPEATS))
    return compare(NAMES[3], "1000/s", mine / 1e3, reference / 1e3, "the Python specification", 10.0, "least")


def two_corpora(folder: str) -> list[str]:
    """The prefixes of two corpora of real text (which are one)."""
    prefixes = [f"{folder}/ours", f"{folder}/other"]
    if not Path(f"{prefixes[0]}.bin").exists():
        ours(gather_text(), fetch_tokenizer(), folder)
        for suffix in (".bin", ".idx", ".json"):
            Path(prefixes[1] + suffix).symlink_to(prefixes[0] + suffix)
    return prefixes


def documents(folder: str) -> Row:
    """Seconds to tell the documents of a million samples, one thread, as tools/export_order.py does; the best of runs."""
    command, places = [sys.executable, "-m", "bench.read_samples"], two_corpora(folder)
    per_second = [
        max(float(run([*command, f"documents-{who}", *places]).output.split()[-1]) for _ in range(REPEATS))
        for who in ("ours", "megatron")
    ]
    mine, reference = (1e6 / found for found in per_second)
    return compare(NAMES[6], "s/million", mine, reference, "megatron-core's GPTDataset, sample by sample", 0.5, "most")


def tokens(folder: str) -> Row:
    """Whole samples from two corpora of real text in the page cache, one process, no threads; the median pair of runs."""
    command, places = [sys.executable, "-m", "bench.read_samples"], two_corpora(folder)
    pairs = []
    for _ in range(REPEATS):
        mine, reference = (float(run([*command, who, *places]).output.split()[-1]) for who in ("ours", "megatron"))
        pairs.append((mine / 1e6, reference / 1e6))
    mine, reference = sorted(pairs, key=lambda pair: pair[0] / pair[1])[REPEATS // 2]
    return compare(NAMES[4], "M tokens/s", mine, reference, "megatron-core's GPTDataset, blended", 1.5, "least")


def in_a_step() -> Iterator[Row]:
    """How long steps of a training run waited for data, against the whole steps."""
    path = RUN / "metrics.jsonl"
    if not path.exists():
        print(f"{NAMES[5]}: left out: there is no {path} (make quickstart makes it; or set BENCH_RUN)", file=sys.stderr)
        return
    steps = [row for row in map(json.loads, path.open()) if "data_seconds" in row]
    waiting, seconds = (float(np.median([row[name] for row in steps])) for name in ("data_seconds", "seconds"))
    yield compare(NAMES[5], "s", waiting, seconds, "median step of the run", 0.01, "most")
