"""Helpers for tests that make small corpora: inputs, runs with many units of work, and what came out."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_cpt.corpus import preprocess as preprocess_module
from megatron_cpt.corpus import reading
from megatron_cpt.corpus.indexed_dataset import IndexedCorpus
from megatron_cpt.corpus.preprocess import PreprocessConfig, preprocess
from megatron_cpt.tokenizer import load_tokenizer

ROOT = Path(__file__).parents[1]
EOS = "<|endoftext|>"
SUFFIXES = (".bin", ".idx", ".metadata.jsonl", ".errors.jsonl", ".documents")


def json_lines(records: list[Any]) -> bytes:
    """Records as JSON lines."""
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()


def write_lines(path: Path, records: list[Any]) -> str:
    """Write records as a JSON-lines file; its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(json_lines(records))
    return str(path)


def small_units(monkeypatch: pytest.MonkeyPatch, size: int = 300) -> None:
    """Make many units of work out of little input; and do not wait for the disk after each."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    for module in (reading, preprocess_module):
        monkeypatch.setattr(module, "UNIT_BYTES", size)


def run(prefix: Path | str, tokenizer: str, **settings: Any) -> IndexedCorpus:
    """Preprocess into `prefix` with one worker, unless other settings are given."""
    config: dict[str, Any] = {"tokenizer": tokenizer, "output_prefix": str(prefix), "language": "en", "workers": 1}
    return IndexedCorpus(preprocess(PreprocessConfig(**(config | settings))).removesuffix(".json"))


def texts(corpus: IndexedCorpus, tokenizer: str) -> list[str]:
    """The documents as text, without the token that ends them."""
    loaded = load_tokenizer(tokenizer)
    return [loaded.decode(corpus[i].tolist()).removesuffix(EOS) for i in range(len(corpus))]


def content(prefix: Path | str) -> dict[str, bytes]:
    """The bytes of all files of a corpus but the manifest."""
    return {suffix: Path(f"{prefix}{suffix}").read_bytes() for suffix in SUFFIXES if Path(f"{prefix}{suffix}").exists()}


def read_lines(path: Path | str) -> list[Any]:
    """The records of a JSON-lines file."""
    return [json.loads(line) for line in Path(path).read_bytes().splitlines()]


def still_alive(processes: Iterable[psutil.Process], seconds: float = 5) -> list[psutil.Process]:
    """Those that have not ended after some seconds; one that nobody has waited for has ended too."""
    end = time.monotonic() + seconds
    alive = list(processes)
    while alive and time.monotonic() < end:
        alive = [process for process in alive if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
        time.sleep(0.01)
    return alive
