"""Corpora that Megatron-LM (or Pai-Megatron-Patch) wrote -> the same with a manifest, so that a mixture can read them.

The files stay as they are. What a manifest says is found out by reading them once: ids, text in bytes, whether documents
end with the end-of-document token, checksums. Language shares and characters come from a sample of documents.
"""

from __future__ import annotations

import hashlib
import logging
import shlex
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_cpt.config.require import Requirements, require
from megatron_cpt.config.values import Text
from megatron_cpt.corpus.encoding import count_languages
from megatron_cpt.corpus.indexed_dataset import IndexedCorpus
from megatron_cpt.corpus.inspection import check_corpus
from megatron_cpt.corpus.language_check import unlike
from megatron_cpt.corpus.manifest import (
    CorpusManifest,
    FileInfo,
    SourceInfo,
    TokenizerInfo,
    installed_versions,
    manifest_path,
    write_manifest,
)
from megatron_cpt.corpus.merge import find_some
from megatron_cpt.corpus.sources import printable, sha256_file
from megatron_cpt.tokenizer import load_tokenizer, tokenizer_file
from megatron_cpt.tokenizer.base import Tokenizer
from megatron_cpt.utils.console import counted
from megatron_cpt.utils.errors import InputError, Refusals
from megatron_cpt.utils.language_codes import check_language
from megatron_cpt.utils.progress import meter, rates

logger = logging.getLogger(__name__)

CHUNK = 1 << 22  # tokens looked at at a time
SAMPLED_DOCUMENTS = 1000
SAMPLED_TOKENS = 500  # of a document


@dataclass(frozen=True)
class ImportCorpusConfig:
    """Which corpora of another program to write manifests for."""

    input: list[str] | str
    """Prefixes (paths without .bin) or quoted globs of them. May be given without `--input`."""
    tokenizer: str
    """The tokenizer they were made with: Hugging Face folder or tokenizer.json, Llama-3 tokenizer.model, SentencePiece."""
    language: str
    """Language of the corpora, such as en or zh; the mixture counts tokens by it."""
    eos_token: Text | None = None
    """Token that ends a document, when not the tokenizer's own."""
    overwrite: bool = False
    """Replace a manifest that is there."""

    def __post_init__(self) -> None:
        with Requirements() as need:
            need.field(self, "input", bool, "one corpus or more")
            with need.noted():
                require(self.language != "", "language", "empty", "a value")
                check_language(self.language)


def import_corpora(config: ImportCorpusConfig) -> str:
    """Write PREFIX.json beside each corpus; returns the paths, a line each.

    InputError, before anything is written: no corpus there, a manifest that is there, an index of several sequences a
    document, damaged files, ids outside of the vocabulary, an end-of-document token after some documents only.
    """
    prefixes, tokenizer = check_import_files(config)
    assert tokenizer is not None  # of a configuration of which nothing was refused
    facts = TokenizerInfo.of(config.tokenizer, tokenizer)
    manifests = {prefix: import_corpus(IndexedCorpus(prefix), tokenizer, facts, config.language) for prefix in prefixes}
    for prefix, manifest in manifests.items():
        write_manifest(manifest_path(prefix), manifest)
    return "\n".join(str(manifest_path(prefix)) for prefix in prefixes)


def check_import_files(config: ImportCorpusConfig) -> tuple[list[str], Tokenizer | None]:
    """The corpora and the tokenizer that a configuration names; None where that was refused (see config/partial.py).

    Raises:
        InputError: one is missing, damaged, or has a manifest; InputErrors: several are
    """
    refusals, prefixes, tokenizer = Refusals(), list[str](), None
    with refusals.noted():
        prefixes = find_some([config.input] if isinstance(config.input, str) else config.input, refusals)
    for prefix in prefixes:
        with refusals.noted():
            if manifest_path(prefix).exists() and not config.overwrite:
                raise InputError(f"{manifest_path(prefix)}: there is a manifest already; expected none, or overwrite")
        with refusals.noted():
            IndexedCorpus(prefix)
    with refusals.noted():
        tokenizer_file(config.tokenizer)  # whatever is wrong with eos_token
        tokenizer = load_tokenizer(config.tokenizer, config.eos_token)
    refusals.raise_any()
    return prefixes, tokenizer


def import_corpus(corpus: IndexedCorpus, tokenizer: Tokenizer, facts: TokenizerInfo, language: str) -> CorpusManifest:
    """The manifest of one corpus. InputError: it is not what `tokenizer` can have made, or damaged."""
    began, prefix = time.monotonic(), corpus.prefix
    _check_files(corpus)
    _refuse_another_end(corpus, tokenizer)
    eos = _policy(corpus, "end with eos", tokenizer.eos_id, at_end=True)
    bos = "none" if tokenizer.bos_id is None else _policy(corpus, "begin with bos", tokenizer.bos_id, at_end=False)
    sha256, text_bytes = _read(corpus, tokenizer)
    characters, languages = _sample(corpus, tokenizer, text_bytes)
    files = {
        "bin": FileInfo(corpus.num_tokens * corpus.dtype.itemsize, sha256),
        "idx": FileInfo(Path(prefix + ".idx").stat().st_size, sha256_file(prefix + ".idx")),
    }
    path = printable(str(Path(prefix + ".bin").absolute()))
    source = SourceInfo(path, "megatron", files["bin"].bytes, sha256, corpus.num_documents)
    around = corpus.num_documents * ((eos == "document") + (bos == "document"))
    seconds = time.monotonic() - began
    speed = rates(files["bin"].bytes, corpus.num_documents, seconds, "tokens")
    documents, tokens = counted(corpus.num_documents, "document"), counted(corpus.num_tokens, "token")
    counts = f"{documents}, {tokens}, {text_bytes:,} bytes of text"
    if odd := unlike(language, languages):
        logger.warning(f"{prefix}: {odd}")
    logger.info(f"{prefix}: {counts}; eos: {eos}, bos: {bos}; {speed}")
    return CorpusManifest(
        language=language,
        documents=corpus.num_documents,
        tokens=corpus.num_tokens,
        text_bytes=text_bytes,
        characters=characters,
        bytes_per_token=round(text_bytes / max(corpus.num_tokens - around, 1), 4),
        skipped={},
        languages=languages,
        dtype=str(corpus.dtype),
        eos=eos,
        bos=bos,
        shuffle_documents=None,
        partition=None,
        encoder=f"another program; characters and languages are those of {min(SAMPLED_DOCUMENTS, len(corpus)):,} documents",
        tokenizer=facts,
        sources=[source],
        files=files,
        versions=installed_versions(("numpy", "pycld2")),
        command=shlex.join(map(printable, sys.argv)),
        duration_seconds=round(seconds, 3),
    )


def _check_files(corpus: IndexedCorpus) -> None:
    """InputError unless .bin and .idx are whole and hold one sequence of some token ids a document."""
    if corpus.dtype.kind not in "iu":
        raise InputError(f"{corpus.prefix}.idx: dtype is {corpus.dtype}; expected whole numbers, as token ids are")
    if len(corpus) != corpus.num_documents:
        found = f"{counted(len(corpus), 'sequence')} in {counted(corpus.num_documents, 'document')}"
        raise InputError(f"{corpus.prefix}.idx: found {found}; expected one each (made without --split-sentences)")
    for name, problem in check_corpus(corpus, None):
        if problem:
            raise InputError(f"{corpus.prefix}: {name}: {problem}")
    lengths = corpus.lengths()
    if not lengths.size or not lengths.min():
        found = f"document {int(lengths.argmin())} without tokens" if lengths.size else "no documents"
        raise InputError(f"{corpus.prefix}: {found}; expected tokens in each")


def _refuse_another_end(corpus: IndexedCorpus, tokenizer: Tokenizer) -> None:
    """InputError when the first document ends with a special token that is not eos."""
    last, eos = int(corpus[0][-1]), tokenizer.eos_id
    if last != eos and last < tokenizer.vocab_size and tokenizer.token_bytes()[last] == 0:
        found, wanted = (f"{tokenizer.decode([token])!r} (id {token})" for token in (last, eos))
        raise InputError(
            f"{corpus.prefix}: document 0 ends with {found}; expected the end-of-document token {wanted}, "
            f"or eos_token to name another"
        )


def _policy(corpus: IndexedCorpus, what: str, token: int, at_end: bool) -> str:
    """Whether each document has `token` as its last (or first) one: "document", or "none". InputError: some have."""
    found = 0
    for start in range(0, len(corpus), CHUNK):
        part = slice(start, start + CHUNK)
        places = corpus.pointers(part) // corpus.dtype.itemsize
        if at_end:
            places = places + corpus.lengths(part) - 1
        found += int((corpus.tokens_at(places) == token).sum())
    if 0 < found < len(corpus):
        raise InputError(
            f"{corpus.prefix}: {found:,} of {len(corpus):,} documents {what} (id {token}); "
            f"expected all or none: is it the token they were made with (eos_token)?"
        )
    return "document" if found else "none"


def _read(corpus: IndexedCorpus, tokenizer: Tokenizer) -> tuple[str, int]:
    """(sha256 of .bin, UTF-8 bytes of text), in one pass. InputError: ids outside of the vocabulary."""
    digest, text_bytes, sizes = hashlib.sha256(), 0, tokenizer.token_bytes().astype(np.int64)
    with meter(corpus.num_tokens * corpus.dtype.itemsize, of="tokens") as shown:
        for start in range(0, corpus.num_tokens, CHUNK):
            some = corpus.read(start, min(CHUNK, corpus.num_tokens - start))
            lowest, highest = int(some.min()), int(some.max())
            if lowest < 0 or highest >= tokenizer.vocab_size:
                wanted = f"ids below {tokenizer.vocab_size}, as {tokenizer.name} has"
                raise InputError(f"{corpus.prefix}.bin: found ids from {lowest} to {highest}; expected {wanted}")
            digest.update(some.tobytes())
            text_bytes += int(sizes[some].sum())
            shown.advance(some.nbytes, 0)
    return digest.hexdigest(), text_bytes


def _sample(corpus: IndexedCorpus, tokenizer: Tokenizer, text_bytes: int) -> tuple[int, dict[str, float]]:
    """(characters of the whole corpus, share of the text by language), as some documents tell, evenly spread."""
    numbers = np.linspace(0, len(corpus) - 1, min(SAMPLED_DOCUMENTS, len(corpus)), dtype=np.int64)
    special = {tokenizer.eos_id, tokenizer.bos_id}
    texts = [_text(corpus[int(number)][:SAMPLED_TOKENS].tolist(), special, tokenizer) for number in numbers]
    size = sum(len(text.encode("utf-8", "replace")) for text in texts)
    found: Counter[str] = count_languages(texts, max(size, len(texts)))
    total = max(sum(found.values()), 1)
    shares = {code: round(count / total, 4) for code, count in found.most_common()}
    return round(text_bytes * sum(map(len, texts)) / max(size, 1)), shares


def _text(ids: Sequence[int], special: set[int | None], tokenizer: Tokenizer) -> str:
    return tokenizer.decode([token for token in ids if token not in special])
