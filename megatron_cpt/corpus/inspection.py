"""What is in a corpus: its manifest in words, tables of several, single documents, and whether the files are whole."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from rich.console import Console

from megatron_cpt.corpus.indexed_dataset import IndexedCorpus
from megatron_cpt.corpus.manifest import CorpusManifest, manifest_path, read_corpus_manifest
from megatron_cpt.corpus.sources import sha256_file
from megatron_cpt.tokenizer import load_tokenizer
from megatron_cpt.utils.console import counted, print_heading
from megatron_cpt.utils.errors import InputError
from megatron_cpt.utils.tables import PlainTable, number_column, text_column

CHUNK = 1 << 22  # values looked at at a time


def manifest_if_any(prefix: str) -> CorpusManifest | None:
    """The manifest, or None for a corpus that another program wrote."""
    return read_corpus_manifest(prefix) if manifest_path(prefix).exists() else None


def describe_corpus(corpus: IndexedCorpus, manifest: CorpusManifest | None) -> PlainTable:
    """One corpus as a list of facts."""
    table = PlainTable(text_column(style="bold"), text_column(), title=corpus.prefix)
    size = corpus.num_tokens * corpus.dtype.itemsize
    table.add_row("documents", f"{corpus.num_documents:,}")
    table.add_row("tokens", f"{corpus.num_tokens:,} of {corpus.dtype} ({size / 1e6:,.1f} MB)")
    lengths = corpus.lengths()
    if lengths.size:
        quantiles = np.quantile(lengths, [0, 0.1, 0.5, 0.9, 1]).astype(int).tolist()
        table.add_row("tokens/document", " / ".join(f"{q:,}" for q in quantiles) + "  (min, 10 %, median, 90 %, max)")
    if manifest is None:
        table.add_row("manifest", "none: another program wrote this corpus")
        return table
    table.add_row("language", manifest.language)
    table.add_row("found in a sample", _shares(manifest) or "-")
    per_token = f"{manifest.bytes_per_token:.2f} bytes/token"
    table.add_row("text", f"{manifest.text_bytes:,} bytes, {manifest.characters:,} characters, {per_token}")
    table.add_row("left out", ", ".join(f"{count:,} {reason}" for reason, count in manifest.skipped.items()) or "nothing")
    order = "as in the input" if manifest.shuffle_documents is None else f"shuffled, seed {manifest.shuffle_documents}"
    table.add_row("order", order)
    if manifest.partition:
        table.add_row("partition", manifest.partition)
    if manifest.holdout:
        side, _, split = manifest.holdout.partition(":")
        words = {"train": "the rest of split", "holdout": "held out, split", "asked": "held out when merged:"}
        table.add_row("hold-out", f"{words.get(side, side)} {split}")
    table.add_row("bos, eos", f"{manifest.bos}, {manifest.eos}")
    tokenizer = manifest.tokenizer
    table.add_row(
        "tokenizer", f"{tokenizer.name}, {tokenizer.vocab_size:,} tokens, {tokenizer.fingerprint[:12]}, {tokenizer.path}"
    )
    table.add_row("encoded by", manifest.encoder)
    for source in manifest.sources[:20]:
        checksum = f", sha256 {source.sha256[:12]}" if source.sha256 else ""
        documents = counted(source.documents, "document")
        table.add_row("input", f"{source.path}: {documents}, {source.bytes:,} bytes{checksum}")
    if len(manifest.sources) > 20:
        table.add_row("input", f"... {len(manifest.sources) - 20:,} more")
    table.add_row("command", manifest.command)
    table.add_row("took", f"{manifest.duration_seconds:,.1f} s")
    table.add_row("versions", ", ".join(f"{name} {number}" for name, number in manifest.versions.items()))
    return table


def _shares(manifest: CorpusManifest, most: int = 4) -> str:
    """As in `zh 97.1 %, en 2.0 %`."""
    return ", ".join(f"{code} {100 * share:.1f} %" for code, share in list(manifest.languages.items())[:most])


def compare_corpora(corpora: Sequence[tuple[IndexedCorpus, CorpusManifest | None]]) -> PlainTable:
    """Several corpora, one a row, with their sums."""
    tokens = sum(corpus.num_tokens for corpus, _ in corpora)
    documents = sum(corpus.num_documents for corpus, _ in corpora)
    text = sum(manifest.text_bytes for _, manifest in corpora if manifest)
    sums = {"documents": f"{documents:,}", "tokens": f"{tokens:,}", "share": "", "text MB": f"{text / 1e6:,.1f}"}
    table = PlainTable(
        text_column("corpus", min_width=10),
        text_column("in", no_wrap=True),
        *(number_column(name, total) for name, total in sums.items()),
        number_column("bytes/token"),
        number_column("left out"),
        text_column("found in a sample"),
        text_column("tokenizer", no_wrap=True),
    )
    for corpus, manifest in corpora:
        share = f"{100 * corpus.num_tokens / max(tokens, 1):.1f} %"
        row = [corpus.prefix, "-", f"{corpus.num_documents:,}", f"{corpus.num_tokens:,}", share, "-", "-", "-", "-", "-"]
        if manifest:
            row[1] = manifest.language
            row[5:] = [
                f"{manifest.text_bytes / 1e6:,.1f}",
                f"{manifest.bytes_per_token:.2f}",
                f"{sum(manifest.skipped.values()):,}",
                _shares(manifest, 2),
                manifest.tokenizer.fingerprint[:8],
            ]
        table.add_row(*row)
    return table


def print_document(
    console: Console, corpus: IndexedCorpus, manifest: CorpusManifest | None, number: int, tokenizer: str | None
) -> None:
    """One document: where it is, its metadata and its text."""
    count = corpus.num_documents
    if not -count <= number < count:
        raise InputError(f"document {number} of {corpus.prefix}: expected one of its {count:,} documents, 0 to {count - 1}")
    number %= count
    path = tokenizer or (manifest.tokenizer.path if manifest else None)
    if path is None:
        raise InputError(f"{corpus.prefix}: has no manifest to name its tokenizer; expected the setting tokenizer")
    first, last = corpus.documents(number, number + 2).tolist()
    if not 0 <= first <= last <= len(corpus):
        raise InputError(
            f"{corpus.prefix}.idx: document {number} is said to be sequences {first} to {last} of {len(corpus)}"
        )
    ids = [token for sequence in range(first, last) for token in corpus[sequence].tolist()]
    known = load_tokenizer(path)
    if ids and max(ids) >= known.vocab_size:
        raise InputError(f"{corpus.prefix}: document {number} has id {max(ids)}; {path} has only {known.vocab_size} tokens")
    print_heading(console, f"{corpus.prefix}, document {number:,}: {counted(len(ids), 'token')}")
    for text in (_metadata(corpus.prefix, number), known.decode(ids)):
        if text:
            print(text)  # as it is: no wrapping


def _metadata(prefix: str, number: int) -> str:
    """The metadata line of a document, or nothing."""
    path = Path(prefix + ".metadata.jsonl")
    if not path.exists():
        return ""
    with path.open("rb") as stream:
        return next((line.decode().rstrip("\n") for i, line in enumerate(stream) if i == number), "")


def print_checks(console: Console, corpus: IndexedCorpus, manifest: CorpusManifest | None, vocab_size: int | None) -> bool:
    """Print each check and what was found; whether all hold."""
    console.print(corpus.prefix, style="bold")
    good = True
    for name, problem in check_corpus(corpus, manifest, vocab_size):
        console.print(
            f"  {'ok     ' if problem is None else 'WRONG  '}{name}{'' if problem is None else ': ' + problem}",
            highlight=False,
        )
        good = good and problem is None
    return good


def check_corpus(
    corpus: IndexedCorpus, manifest: CorpusManifest | None, vocab_size: int | None = None
) -> Iterator[tuple[str, str | None]]:
    """(what is checked, what is wrong or None). Opening the corpus has compared the sizes of the files already.

    `vocab_size`: for corpora whose manifest does not tell it.
    """
    yield "sizes of .idx and .bin agree", None
    yield "lengths and positions in .idx agree", _wrong_pointers(corpus)
    vocab_size = manifest.tokenizer.vocab_size if manifest else vocab_size
    if vocab_size is not None:
        lowest, highest = _token_range(corpus)
        wrong = None if lowest >= 0 and highest < vocab_size else f"found ids from {lowest} to {highest}"
        yield f"ids within the vocabulary of {vocab_size:,}", wrong
    if manifest is None:
        yield "there is no manifest to compare with: another program wrote this corpus", None
        return
    if manifest.eos == "document":
        yield "every document ends with eos", _wrong_ends(corpus, manifest.tokenizer.eos_id)
    counts = (corpus.num_documents, corpus.num_tokens)
    wanted = (manifest.documents, manifest.tokens)
    yield "documents and tokens as in the manifest", None if counts == wanted else f"found {counts}; expected {wanted}"
    for name, info in manifest.files.items():
        found = sha256_file(f"{corpus.prefix}.{name}")
        yield (
            f"sha256 of .{name} as in the manifest",
            None if found == info.sha256 else f"found {found}; expected {info.sha256}",
        )


def _wrong_pointers(corpus: IndexedCorpus) -> str | None:
    position = 0
    for start in range(0, len(corpus), CHUNK):
        lengths = corpus.lengths(slice(start, start + CHUNK)).astype(np.int64)
        if lengths.min() < 0:
            return f"sequence {start + int(lengths.argmin())} has {lengths.min()} tokens"
        ends = np.cumsum(lengths) * corpus.dtype.itemsize + position
        pointers = corpus.pointers(slice(start, start + CHUNK))
        wrong = np.flatnonzero(pointers != ends - lengths * corpus.dtype.itemsize)
        if wrong.size:
            found = int(pointers[wrong[0]])
            return f"sequence {start + wrong[0]} begins at byte {found}, not where the one before ends"
        position = int(ends[-1])
    steps = np.diff(corpus.documents(0, corpus.num_documents + 1))
    return f"document {int(steps.argmin())} has {steps.min()} sequences" if steps.size and steps.min() < 0 else None


def _token_range(corpus: IndexedCorpus) -> tuple[int, int]:
    """(lowest, highest) id; (0, -1) for none."""
    lowest, highest = 0, -1
    for start in range(0, corpus.num_tokens, CHUNK):
        some = corpus.read(start, min(CHUNK, corpus.num_tokens - start))
        lowest, highest = min(lowest, int(some.min())), max(highest, int(some.max()))
    return lowest, highest


def _wrong_ends(corpus: IndexedCorpus, eos_id: int) -> str | None:
    """The first document whose last token is not `eos_id`."""
    if not corpus.num_tokens:
        return "no document has a token" if len(corpus) else None
    for start in range(0, len(corpus), CHUNK):
        lengths = corpus.lengths(slice(start, start + CHUNK)).astype(np.int64)
        last = corpus.pointers(slice(start, start + CHUNK)) // corpus.dtype.itemsize + lengths - 1
        inside = (last >= 0) & (last < corpus.num_tokens) & (lengths > 0)
        wrong = np.flatnonzero(~inside | (corpus.tokens_at(np.where(inside, last, 0)) != eos_id))
        if wrong.size:
            return f"document {start + int(wrong[0])} does not ({wrong.size:,} of {lengths.size:,})"
    return None
