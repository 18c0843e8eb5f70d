"""Raw text -> corpus: read documents, tokenize them on several cores, write .bin/.idx and the manifest.

The main process only reads and writes bytes; workers parse JSON and tokenize batches of about a megabyte. Results are
taken in the order of the input, so the corpus does not depend on the number of workers.
"""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from megatron_cpt.data.documents import find_files
from megatron_cpt.data.encoding import EncodedBatch, Encoder, EncodeSettings, encode_files, one_thread_per_process
from megatron_cpt.data.indexed import IndexedWriter
from megatron_cpt.data.manifest import (
    CorpusManifest,
    FileInfo,
    SourceInfo,
    TokenizerInfo,
    manifest_path,
    sha256_file,
    write_manifest,
)
from megatron_cpt.errors import InputError
from megatron_cpt.tokenizer import Tokenizer, load_tokenizer
from megatron_cpt.tokenizer.base import token_bytes_sha256
from megatron_cpt.version import __version__


def available_cores() -> int:
    """Cores this process may run on (a container or SLURM may give fewer than the machine has)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class PreprocessConfig:
    """What to read, how to tokenize it, where to write it."""

    input: list[str] | str
    """Files, folders (all files inside, by name) or quoted globs. `.jsonl`/`.json`: one document per line; any other
    file is one document of plain UTF-8 text. A file named twice is read once."""
    tokenizer: str
    """Hugging Face folder or tokenizer.json, Llama-3 tokenizer.model (tiktoken), or SentencePiece .model."""
    output_prefix: str
    """Writes OUTPUT_PREFIX.bin, .idx and .json; the folder is made if needed."""
    language: str
    """Language of the corpus, such as en or zh; the mixture counts tokens by it."""
    text_key: str = "text"
    """Field of a JSON document that holds its text; dots reach into objects (`article.body`)."""
    eos_token: str | None = None
    """Token that ends a document, when not the tokenizer's own."""
    eos: Literal["none", "document"] = "document"
    """Put an end-of-document token after every document, or none."""
    bos: Literal["none", "document"] = "none"
    """Put a beginning-of-text token before every document, or none."""
    workers: int = field(default_factory=available_cores)
    """Processes that tokenize."""
    overwrite: bool = False
    """Replace an existing corpus of this name."""

    def __post_init__(self) -> None:
        if not os.path.basename(self.output_prefix):
            raise InputError(f"output_prefix is {self.output_prefix!r}; wanted a name, as in data/zh")
        if not self.language:
            raise InputError("language is empty; wanted a name such as zh")
        if not self.input:
            raise InputError("input is empty; wanted files, folders or globs")
        if self.workers < 1:
            raise InputError(f"workers is {self.workers}; wanted at least 1")


@contextmanager
def progress_bar(total_bytes: int) -> Iterator[Callable[[int], None]]:
    """Gives `advance(bytes_read)`; shows a bar on a terminal's stderr when the work takes more than two seconds."""
    columns = (BarColumn(), TextColumn("{task.percentage:.0f}%"), TransferSpeedColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    task, begin = bar.add_task("", total=total_bytes), time.monotonic()

    def advance(read: int) -> None:
        bar.advance(task, read)
        if not bar.live.is_started and sys.stderr.isatty() and time.monotonic() - begin > 2:
            bar.start()

    try:
        yield advance
    finally:
        if bar.live.is_started:  # stopping one that never started would print an empty line
            bar.stop()


@dataclass
class Counts:
    """Running totals of a corpus; `per_source` (input files,) documents of each."""

    per_source: npt.NDArray[np.int64]
    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    empty: int = 0

    def add(self, batch: EncodedBatch) -> None:
        """Count one batch."""
        self.per_source += np.bincount(batch.sources, minlength=self.per_source.size)
        self.documents += batch.lengths.size
        self.tokens += batch.tokens.size
        self.text_bytes += batch.text_bytes
        self.empty += batch.empty


def preprocess(config: PreprocessConfig) -> str:
    """Tokenize `config.input` into OUTPUT_PREFIX.bin/.idx/.json; returns the manifest's path.

    InputError: no files or documents, a document that cannot be read, a bad tokenizer, an output that exists or cannot
    be written. After any error nothing of the new corpus remains; an existing one is replaced only at the very end.
    """
    begin = time.monotonic()
    prefix, outputs = config.output_prefix, _outputs(config.output_prefix)
    patterns = [config.input] if isinstance(config.input, str) else config.input
    files = find_files(patterns, leave_out=outputs)
    sizes = [file.stat().st_size for file in files]
    tokenizer = load_tokenizer(config.tokenizer, config.eos_token)
    settings = EncodeSettings(config.tokenizer, config.eos_token, config.text_key, config.eos, config.bos)
    encoder = Encoder(tokenizer, settings)
    _check_output(prefix, config.overwrite)

    counts = Counts(np.zeros(len(files), dtype=np.int64))
    with (
        one_thread_per_process(),
        IndexedWriter(prefix, encoder.dtype) as writer,
        progress_bar(sum(sizes)) as advance,
        closing(encode_files(encoder, files, config.workers)) as encoded,
    ):
        for batch in encoded:
            writer.add_documents(batch.tokens, batch.lengths)
            counts.add(batch)
            advance(batch.read_bytes)
        if not counts.documents:
            raise InputError(f"input {patterns}: empty corpus: {counts.empty} documents, none with text")
        # Should the machine stop between the renames, no old manifest vouches for new files.
        manifest_path(prefix).unlink(missing_ok=True)

    sources = [SourceInfo(str(f), size, int(n)) for f, size, n in zip(files, sizes, counts.per_source, strict=True)]
    path = write_manifest(prefix, _manifest(config, tokenizer, encoder.dtype, counts, sources, writer.bin_sha256))
    seconds = time.monotonic() - begin
    speed = f"{sum(sizes) / 1e6 / seconds:.1f} MB/s"
    print(f"{counts.documents:,} documents, {counts.tokens:,} tokens, {speed}", file=sys.stderr)
    return path


def _outputs(prefix: str) -> list[str]:
    return [prefix + suffix for suffix in (".bin", ".idx", ".json")]


def _check_output(prefix: str, overwrite: bool) -> None:
    """InputError when the corpus exists (without `overwrite`) or its folder cannot be made or written."""
    existing = [path for path in _outputs(prefix) if Path(path).exists()]
    if existing and not overwrite:
        raise InputError(f"output_prefix {prefix}: found {', '.join(existing)}; wanted a new name or overwrite")
    folder = Path(prefix).parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"output_prefix {prefix}: cannot make folder {folder} ({error.strerror})") from None
    if not os.access(folder, os.W_OK):
        raise InputError(f"output_prefix {prefix}: folder {folder} is not writable")


def _manifest(
    config: PreprocessConfig,
    tokenizer: Tokenizer,
    dtype: np.dtype[Any],
    counts: Counts,
    sources: list[SourceInfo],
    bin_sha256: str,
) -> CorpusManifest:
    bin_, idx, _ = (Path(path) for path in _outputs(config.output_prefix))
    libraries = ("numpy", "tokenizers", "tiktoken", "sentencepiece")
    return CorpusManifest(
        language=config.language,
        documents=counts.documents,
        tokens=counts.tokens,
        text_bytes=counts.text_bytes,
        empty_documents=counts.empty,
        dtype=str(dtype),
        eos=config.eos,
        bos=config.bos,
        tokenizer=TokenizerInfo(
            path=str(Path(config.tokenizer).expanduser().absolute()),
            name=tokenizer.name,
            vocab_size=tokenizer.vocab_size,
            eos_id=tokenizer.eos_id,
            bos_id=tokenizer.bos_id,
            fingerprint=tokenizer.fingerprint,
            token_bytes_sha256=token_bytes_sha256(tokenizer),
        ),
        sources=sources,
        files={
            "bin": FileInfo(bin_.stat().st_size, bin_sha256),
            "idx": FileInfo(idx.stat().st_size, sha256_file(idx)),
        },
        versions={"megatron_cpt": __version__, "python": platform.python_version()}
        | {library: version(library) for library in libraries},
    )
