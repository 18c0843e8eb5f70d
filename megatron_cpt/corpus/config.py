"""The settings of preprocessing."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Literal

from megatron_cpt.config.require import Requirements, require
from megatron_cpt.config.values import Text
from megatron_cpt.corpus.encoding import Policy
from megatron_cpt.corpus.holdout import parse_holdout
from megatron_cpt.corpus.reading import ReadOptions
from megatron_cpt.corpus.sources import parse_partition
from megatron_cpt.utils.errors import InputError
from megatron_cpt.utils.language_codes import check_language


def available_cores() -> int:
    """Cores this process may run on (a container or SLURM may give fewer than the machine has)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class PreprocessConfig:
    """What to read, how to tokenize it, where to write it."""

    input: list[str] | str
    """Files, folders (all files of a known kind inside, by name), quoted globs, or fsspec URLs (s3://...). Kinds, by
    name: .jsonl .ndjson .json (a document per line, or one array of them), .txt .text (a document per file), .parquet,
    .arrow (also a folder that `datasets` saved); the first two also as .gz .zst .bz2 .xz. A file that is named is plain
    text when its kind is unknown. A file named twice is read once."""
    tokenizer: str
    """Hugging Face folder or tokenizer.json, Llama-3 tokenizer.model (tiktoken), or SentencePiece .model."""
    output_prefix: str
    """Writes OUTPUT_PREFIX.bin, .idx and .json; the folder is made if needed."""
    language: str
    """Language of the corpus: an ISO 639 code such as en or zh, or a longer name such as code; the mixture counts tokens by
    it. A warning says when a sample of the text is in another one."""
    text_key: Text = "text"
    """Field or column that holds a document's text, a string or a list of strings (its lines); dots reach into objects
    (`article.body`)."""
    metadata_keys: list[Text] | Text = field(default_factory=list)
    """Fields to keep beside each document, in OUTPUT_PREFIX.metadata.jsonl (as in `url date`)."""
    file_format: Literal["auto", "jsonl", "text", "parquet", "arrow"] = "auto"
    """Read all files as this, whatever their names."""
    document_separator: Text = ""
    """What stands between documents in text files, as in `\\n\\n` (backslash and n, r or t are understood); empty: one
    document per file."""
    eos_token: Text | None = None
    """Token that ends a document, when not the tokenizer's own."""
    eos: Policy = "document"
    """Put an end-of-document token after every document (as Llama-3 was trained, <|end_of_text|>), or none."""
    bos: Policy = "none"
    """Put a beginning-of-text token before every document, or none."""
    on_error: Literal["fail", "skip"] = "fail"
    """What to do about a document without usable text (broken JSON, no UTF-8, field missing, null, empty, too long): stop
    at the first, or leave out all of them, counted and listed in OUTPUT_PREFIX.errors.jsonl."""
    max_document_characters: int = 100_000_000
    """A longer document counts as an error."""
    shuffle_documents: int | None = None
    """Put the documents in a random order with this seed (training packs documents in the order they have here)."""
    holdout: int | float | str | None = None
    """Documents to hold out for validation: a number, as in 200 or 10K, or a share, as in 0.5% or 0.005; exactly so many,
    from all over the input, never a copy of one that is trained on. They become the corpus OUTPUT_PREFIX_holdout."""
    partition: str | None = None
    """I/N (I from 0): take only the I-th of N equal parts of the input, for job arrays; the output is then named
    OUTPUT_PREFIX-0000I-of-0000N, and tools/merge_datasets.py joins the parts, and holds out."""
    workers: int = field(default_factory=available_cores)
    """Processes that tokenize."""
    fast_tokenizer: Literal["auto", "always", "never"] = "auto"
    """Use gigatoken, compared with the reference tokenizer on samples all along; auto: for 8 MB of input or more."""
    checksum_inputs: bool = True
    """Put the sha256 of every local input file in the manifest."""
    overwrite: bool = False
    """Replace an existing corpus of this name, and begin anew if an unfinished one has other settings."""

    def __post_init__(self) -> None:
        with Requirements() as need:
            need.field(self, "output_prefix", os.path.basename, "a name, as in data/zh")
            for name in ("input", "text_key"):
                with need.noted():
                    require(bool(getattr(self, name)), name, "empty", "a value")
            for name in ("workers", "max_document_characters"):
                need.field(self, name, lambda number: number >= 1, "at least 1")
            need.field(self, "shuffle_documents", lambda seed: 0 <= seed < 2**64, "a seed from 0 to 2^64 - 1")
            with need.noted():
                check_language(self.language)
            with need.noted():
                parse_partition(self.partition)
            with need.noted():
                parse_holdout(self.holdout)
            with need.noted():
                self._check_shuffle()

    def _check_shuffle(self) -> None:
        if self.holdout is not None and self.partition and self.shuffle_documents is not None:
            raise InputError(
                f"shuffle_documents is {self.shuffle_documents} with partition and holdout; expected it given to "
                "merge_datasets.py, which holds out before it shuffles"
            )

    @property
    def prefix(self) -> str:
        """Path of the corpus without .bin: with the partition's number, if there is one."""
        index, count = parse_partition(self.partition)
        prefix = self.prefix_of_all
        return prefix if self.partition is None else f"{prefix}-{index:05d}-of-{count:05d}"

    @property
    def prefix_of_all(self) -> str:
        """Path of the corpus without .bin and without a partition's number."""
        return os.path.expanduser(self.output_prefix)

    @property
    def read_options(self) -> ReadOptions:
        """How documents lie in the files."""
        keys = [self.metadata_keys] if isinstance(self.metadata_keys, str) else self.metadata_keys
        return ReadOptions(self.text_key, tuple(keys), separator(self.document_separator), self.max_document_characters)


def separator(written: str) -> str | None:
    """What stands between documents, from `document_separator` as it is written; None: nothing does."""
    for escape, character in (("\\r", "\r"), ("\\n", "\n"), ("\\t", "\t")):
        written = written.replace(escape, character)
    return written or None
