"""A corpus manifest for tests that build corpora by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from megatron_cpt.corpus.manifest import CorpusManifest, FileInfo, SourceInfo, TokenizerInfo

MANIFEST = CorpusManifest(
    language="zh",
    documents=2,
    tokens=10,
    text_bytes=24,
    characters=8,
    bytes_per_token=3.0,
    skipped={"empty": 1},
    languages={"zh": 1.0},
    dtype="uint16",
    eos="document",
    bos="none",
    shuffle_documents=None,
    partition=None,
    encoder="the reference tokenizer",
    tokenizer=TokenizerInfo("/t", "hf:t", 400, 0, None, "ab" * 32, "cd" * 32),
    sources=[SourceInfo("/a.jsonl", "jsonl", 30, None, 2)],
    files={"bin": FileInfo(20, "00" * 32), "idx": FileInfo(82, "11" * 32)},
    versions={"megatron_cpt": "0", "python": "3"},
    command="preprocess_data.py",
    duration_seconds=1.0,
)


def manifest(**changes: Any) -> CorpusManifest:
    """MANIFEST with other values."""
    return replace(MANIFEST, **changes)
