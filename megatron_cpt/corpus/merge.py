"""Several corpora -> one: the partitions of a job array, or any that were made with the same tokenizer and policy.

Bytes are moved as they are, at the speed of the disk; positions are 64-bit throughout.
"""

from __future__ import annotations

import glob
import hashlib
import logging
import os
import re
import shlex
import shutil
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from megatron_cpt.config.require import Requirements
from megatron_cpt.corpus.holdout import RECORD
from megatron_cpt.corpus.indexed_dataset import IndexedCorpus
from megatron_cpt.corpus.manifest import CorpusManifest, SourceInfo, read_corpus_manifest, size_of
from megatron_cpt.corpus.partial import lock, partial_folder, read_state, writing
from megatron_cpt.corpus.preprocess import interruptible
from megatron_cpt.corpus.publish import check_corpus_output, check_output_folder, complete_corpus, publish
from megatron_cpt.corpus.sources import parse_partition, printable, sha256_file
from megatron_cpt.utils.console import counted
from megatron_cpt.utils.errors import InputError, Refusals, RefusedValueError
from megatron_cpt.utils.progress import Meter, meter, rates

logger = logging.getLogger(__name__)

COPY_BYTES = 8 << 20
MOST_NAMED = 8  # of corpora or partitions in a message
SUFFIX = re.compile(r"\.(bin|idx|json)$")


@dataclass(frozen=True)
class MergeConfig:
    """Which corpora to join, in which order, under which name."""

    input: list[str] | str
    """Prefixes (paths without .bin), quoted globs of them, or the OUTPUT_PREFIX that preprocess_data.py was given with
    --partition: then all its partitions, which must be complete. In the order given; globs are sorted."""
    output_prefix: str
    """Writes OUTPUT_PREFIX.bin, .idx and .json."""
    shuffle_documents: int | None = None
    """Put the documents of all of them in a random order with this seed."""
    overwrite: bool = False
    """Replace an existing corpus of this name."""

    def __post_init__(self) -> None:
        with Requirements() as need:
            need.field(self, "input", bool, "one corpus or more")
            need.field(self, "output_prefix", os.path.basename, "a name, as in data/zh")
            need.field(self, "shuffle_documents", lambda seed: 0 <= seed < 2**64, "a seed from 0 to 2^64 - 1")


def merge_datasets(config: MergeConfig) -> str:
    """Join corpora into OUTPUT_PREFIX.bin/.idx/.json; returns the manifest's path.

    InputError: nothing to join, partitions missing, other tokenizer, width, policy or language, damaged files, an output
    that exists. After an error there is no new corpus, and an old one is as it was.
    """
    began, prefix = time.monotonic(), os.path.expanduser(config.output_prefix)
    prefixes, manifests = check_merge_files(config)
    for note in _repeated(prefixes, manifests):
        logger.warning(note)
    holdout = _asked(manifests[0])
    folder = partial_folder(prefix)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with lock(folder), interruptible(), writing(folder):
        if read_state(folder) is not None:
            raise InputError(f"{folder}: an unfinished preprocessing of that name; finish it or remove it first")
        shutil.rmtree(folder, ignore_errors=True)  # of a merge that was killed
        folder.mkdir()
        try:
            with meter(sum(manifest.files["bin"].bytes for manifest in manifests), of="tokens") as shown:
                bin_sha256 = _copy(prefixes, manifests, folder, shown)
            seconds = time.monotonic() - began
            files, merged = complete_corpus(
                folder,
                merge_manifests(manifests, config.shuffle_documents, seconds),
                bin_sha256,
                holdout,
                with_metadata=(folder / "metadata.jsonl").exists(),
                with_errors=(folder / "errors.jsonl").exists(),
            )
            path = publish(prefix, folder, files)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
    logger.info(_summary(prefixes, merged, seconds))
    return path


def check_merge_files(config: MergeConfig) -> tuple[list[str], list[CorpusManifest]]:
    """The corpora to join and their manifests, when all go together and the output can be written.

    Raises:
        InputError: something is wrong with one of them; InputErrors: with several
    """
    refusals, prefixes, manifests = Refusals(), list[str](), list[CorpusManifest]()
    with refusals.noted():
        prefixes = find_some([config.input] if isinstance(config.input, str) else config.input, refusals, _output(config))
    all_found = not refusals.errors
    with refusals.noted():
        if os.path.realpath(os.path.expanduser(config.output_prefix)) in map(os.path.realpath, prefixes):
            raise InputError(f"output_prefix {config.output_prefix} is one of the inputs; expected another name")
    for prefix in prefixes:
        with refusals.noted():
            manifests.append(read_corpus_manifest(prefix))
    with refusals.noted():
        if all_found and prefixes and len(manifests) == len(prefixes):
            _check(prefixes, manifests)
    with refusals.noted():
        check_output_folder(os.path.expanduser(config.output_prefix))
    with refusals.noted():
        holds_out = bool(manifests) and _asked(manifests[0]) is not None
        check_corpus_output(os.path.expanduser(config.output_prefix), config.overwrite, holds_out)
    refusals.raise_any()
    return prefixes, manifests


def _output(config: MergeConfig) -> str | None:
    """The name of what is to be written, as far as it is known."""
    try:
        return os.path.expanduser(config.output_prefix)
    except RefusedValueError:
        return None


def _summary(prefixes: Sequence[str], merged: Sequence[CorpusManifest], seconds: float) -> str:
    """The last line on the screen; `merged`: the corpus, and what was held out of it."""
    size, documents, tokens = (
        sum(sizes) for sizes in zip(*((m.files["bin"].bytes, m.documents, m.tokens) for m in merged), strict=True)
    )
    counts = [counted(len(prefixes), "corpus", "corpora"), counted(documents, "document"), counted(tokens, "token")]
    aside = "".join(f"; held out: {size_of(part)}" for part in merged[1:])
    return f"{', '.join(counts)}, {rates(size, documents, seconds, 'tokens')}{aside}"


def _asked(manifest: CorpusManifest) -> str | None:
    """How much is to be held out when the partitions are joined, of which this is one."""
    kind, _, asked = (manifest.holdout or "").partition(":")
    return asked if kind == "asked" else None


def find_prefixes(patterns: Sequence[str], output: str | None = None) -> list[str]:
    """Prefixes, globs and names of partitioned corpora -> prefixes, in order, each once. InputError: none there.

    `output`: what is to be written; its name as an input means its partitions, also when it exists from before.
    """
    refusals = Refusals()
    found = find_some(patterns, refusals, output)
    refusals.raise_any()
    return found


def find_some(patterns: Sequence[str], refusals: Refusals, output: str | None = None) -> list[str]:
    """As `find_prefixes`; what cannot be found is noted."""
    found: dict[str, str] = {}
    for pattern in patterns:
        stem = SUFFIX.sub("", os.path.expanduser(pattern))
        partitions = sorted(glob.glob(glob.escape(stem) + "-[0-9]*-of-[0-9]*.idx"))
        is_output = output is not None and os.path.realpath(stem) == os.path.realpath(output)
        if os.path.exists(stem + ".idx") and not (is_output and partitions):
            matches = [stem]
        else:
            matches = [SUFFIX.sub("", match) for match in partitions or sorted(glob.glob(stem + ".idx"))]
        if not matches:
            wanted = "expected a path such that PATH.idx exists, or a glob"
            refusals.add(InputError(f"input {pattern}: found no corpus; {wanted}"))
        for match in matches:
            found.setdefault(os.path.realpath(match), match)
    return list(found.values())


def _check(prefixes: Sequence[str], manifests: Sequence[CorpusManifest]) -> None:
    """Whether all go together.

    Raises:
        InputError: one does not; InputErrors: several, or for several reasons
    """
    refusals = Refusals()
    for prefix, manifest in zip(prefixes, manifests, strict=True):
        for check in (_check_ids, _check_language, _check_metadata):
            with refusals.noted():
                check(prefix, manifest, prefixes[0], manifests[0])
    for check_all in (_check_partitions, _check_holdouts):
        with refusals.noted():
            check_all(prefixes, manifests)
    refusals.raise_any()


def _check_ids(prefix: str, manifest: CorpusManifest, first_prefix: str, first: CorpusManifest) -> None:
    if manifest.tokenizer.fingerprint != first.tokenizer.fingerprint:
        found, wanted = (f"{m.tokenizer.name} (end of document: id {m.tokenizer.eos_id})" for m in (manifest, first))
        raise InputError(
            f"{prefix}.json: made with tokenizer {found}; expected {wanted}, the same file, as in {first_prefix}.json"
        )
    for name in ("dtype", "eos", "bos"):
        _check_same(name, prefix, manifest, first_prefix, first)


def _check_language(prefix: str, manifest: CorpusManifest, first_prefix: str, first: CorpusManifest) -> None:
    _check_same("language", prefix, manifest, first_prefix, first)


def _check_same(name: str, prefix: str, manifest: CorpusManifest, first_prefix: str, first: CorpusManifest) -> None:
    found, wanted = getattr(manifest, name), getattr(first, name)
    if found != wanted:
        raise InputError(f"{prefix}.json: {name} is {found!r}; expected {wanted!r} as in {first_prefix}.json")


def _check_metadata(prefix: str, manifest: CorpusManifest, first_prefix: str, first: CorpusManifest) -> None:
    if Path(prefix + ".metadata.jsonl").exists() != Path(first_prefix + ".metadata.jsonl").exists():
        raise InputError(f"{prefix}: some corpora have .metadata.jsonl and some have none; expected all or none")


def _repeated(prefixes: Sequence[str], manifests: Sequence[CorpusManifest]) -> list[str]:
    """A warning where corpora were made of the same file, but for partitions, which divide it among them."""
    seen: dict[tuple[str | int, ...], str] = {}
    notes: dict[tuple[str, str], str] = {}
    for prefix, manifest in zip(prefixes, manifests, strict=True):
        for source in manifest.sources if manifest.partition is None else []:
            if source.documents:
                key = (source.sha256,) if source.sha256 else (source.path, source.bytes)
                first = seen.setdefault(key, prefix)
                if first != prefix:
                    said = f"{first} and {prefix} were both made from {source.path}: its documents are joined twice"
                    notes.setdefault((first, prefix), said)
    return list(notes.values())


def _check_documents(prefix: str, manifest: CorpusManifest) -> None:
    """InputError unless PREFIX.documents, by which documents are chosen to be held out, is what preprocessing wrote."""
    path = Path(prefix + ".documents")
    if not path.is_file():
        raise InputError(f"{path}: no such file; expected what preprocess_data.py --holdout writes beside {prefix}.bin")
    size, expected = path.stat().st_size, manifest.documents * RECORD.itemsize
    if size != expected:
        raise InputError(f"{path}: found {size:,} bytes; expected {expected:,} ({manifest.documents:,} documents)")
    records = np.fromfile(path, RECORD)
    for name in ("text_bytes", "characters"):
        found, expected = int(records[name].sum()), getattr(manifest, name)
        if found != expected:
            raise InputError(f"{path}: damaged: found {found:,} {name}; expected {expected:,}, as in {prefix}.json")


def _check_holdouts(prefixes: Sequence[str], manifests: Sequence[CorpusManifest]) -> None:
    """InputError when some are to be divided otherwise than others, or what is held out would be trained on."""
    asked = [_asked(manifest) for manifest in manifests]
    sides = [(manifest.holdout or "").partition(":")[0] == "holdout" for manifest in manifests]
    for prefix, holdout, side in zip(prefixes, asked, sides, strict=True):
        if holdout != asked[0]:
            raise InputError(f"{prefix}.json: holdout is {holdout}; expected {asked[0]} as in {prefixes[0]}.json")
        if side != sides[0]:
            what = "was held out for validation" if side else "is a corpus to train on"
            raise InputError(f"{prefix} {what}, unlike {prefixes[0]}; expected one or the other")
    if asked[0] is not None:
        for prefix, manifest in zip(prefixes, manifests, strict=True):
            _check_documents(prefix, manifest)


def _check_partitions(prefixes: Sequence[str], manifests: Sequence[CorpusManifest]) -> None:
    """InputError when some of the partitions of one input are missing, twice there, or in another order."""
    partitions = [parse_partition(manifest.partition) for manifest in manifests if manifest.partition]
    if not partitions:
        return
    count = partitions[0][1]
    if len(partitions) != len(manifests) or any(n != count for _, n in partitions):
        found = [manifest.partition or "no partition" for manifest in manifests]
        raise InputError(
            f"input {_some(prefixes)}: found partitions {_some(found)}; expected all of one input and nothing else"
        )
    inputs = [[(source.path, source.bytes) for source in manifest.sources] for manifest in manifests]
    for prefix, its_input in zip(prefixes, inputs, strict=True):
        if its_input != inputs[0]:
            raise InputError(
                f"{prefix}.json: a partition of another input than {prefixes[0]}.json; expected those of one input"
            )
    found_numbers = [index for index, _ in partitions]
    if found_numbers != list(range(count)):
        missing = sorted(set(range(count)) - set(found_numbers))
        what = f"without partitions {_some(missing)}" if missing else f"found partitions {_some(found_numbers)}"
        raise InputError(f"input {_some(prefixes)}: {what}; expected 0 to {count - 1} in order")


def _some(things: Sequence[object]) -> str:
    """The first few of them, for a message."""
    more = len(things) - MOST_NAMED
    return ", ".join(map(str, things[:MOST_NAMED])) + (f" and {more:,} more" if more > 0 else "")


def _copy(prefixes: Sequence[str], manifests: Sequence[CorpusManifest], folder: Path, shown: Meter) -> str:
    """Append all tokens, lengths, metadata and errors to the files of `folder`; returns the sha256 of the tokens."""
    digest = hashlib.sha256()
    with (folder / "tokens.bin").open("wb") as tokens, (folder / "lengths.bin").open("wb") as lengths:
        for prefix, manifest in zip(prefixes, manifests, strict=True):
            corpus = IndexedCorpus(prefix)
            if (corpus.num_documents, corpus.num_tokens) != (manifest.documents, manifest.tokens):
                found = f"{corpus.num_documents} documents, {corpus.num_tokens} tokens"
                raise InputError(
                    f"{prefix}.idx: found {found}; expected {manifest.documents} and {manifest.tokens} ({prefix}.json)"
                )
            _check_digest(prefix, "idx", sha256_file(prefix + ".idx"), manifest)
            its_digest = hashlib.sha256()
            with open(prefix + ".bin", "rb") as stream:
                while data := stream.read(COPY_BYTES):
                    tokens.write(data)
                    digest.update(data)
                    its_digest.update(data)
                    shown.advance(len(data), 0)
            _check_digest(prefix, "bin", its_digest.hexdigest(), manifest)
            for start in range(0, len(corpus), COPY_BYTES):
                lengths.write(corpus.lengths(slice(start, start + COPY_BYTES)).tobytes())
        for written in (tokens, lengths):
            written.flush()
            os.fsync(written.fileno())
    _copy_beside(prefixes, manifests, folder)
    return digest.hexdigest()


def _copy_beside(prefixes: Sequence[str], manifests: Sequence[CorpusManifest], folder: Path) -> None:
    """Append the files beside the corpora. InputError: not a line of metadata for each document."""
    for name in ("metadata.jsonl", "errors.jsonl", "documents"):
        found = [(Path(f"{prefix}.{name}"), manifest) for prefix, manifest in zip(prefixes, manifests, strict=True)]
        parts = [(path, manifest) for path, manifest in found if path.exists()]
        if not parts:
            continue
        with (folder / ("documents.bin" if name == "documents" else name)).open("wb") as output:
            for path, manifest in parts:
                lines = 0
                with path.open("rb") as stream:
                    while data := stream.read(COPY_BYTES):
                        output.write(data)
                        lines += data.count(b"\n")
                if name == "metadata.jsonl" and lines != manifest.documents:
                    raise InputError(f"{path}: found {lines:,} lines; expected {manifest.documents:,}, one a document")


def _check_digest(prefix: str, name: str, found: str, manifest: CorpusManifest) -> None:
    wanted = manifest.files[name].sha256
    if found != wanted:
        raise InputError(f"{prefix}.{name}: damaged: sha256 is {found}; expected {wanted} as in {prefix}.json")


def merge_manifests(manifests: Sequence[CorpusManifest], shuffle_seed: int | None, seconds: float) -> CorpusManifest:
    """The manifest of all of them together, but for `files`; language shares are weighted by text."""
    sources: dict[str, SourceInfo] = {}
    skipped: Counter[str] = Counter()
    languages: Counter[str] = Counter()
    for manifest in manifests:
        skipped.update(manifest.skipped)
        for code, share in manifest.languages.items():
            languages[code] += share * manifest.text_bytes  # type: ignore[assignment]
        for source in manifest.sources:
            known = sources.get(source.path)
            documents = source.documents + (known.documents if known else 0)
            sha256 = source.sha256 or (known.sha256 if known else None)
            records = source.records if known is None else _joined_records(source, known, manifest.partition is not None)
            sources[source.path] = replace(source, documents=documents, sha256=sha256, records=records)
    first = manifests[0]
    text_bytes, tokens = (sum(getattr(m, name) for m in manifests) for name in ("text_bytes", "tokens"))
    documents = sum(manifest.documents for manifest in manifests)
    around = documents * ((first.eos == "document") + (first.bos == "document"))
    total = max(sum(languages.values()), 1)
    return replace(
        first,
        documents=documents,
        tokens=tokens,
        text_bytes=text_bytes,
        characters=sum(manifest.characters for manifest in manifests),
        bytes_per_token=round(text_bytes / max(tokens - around, 1), 4),
        skipped=dict(sorted(skipped.items())),
        languages={code: round(size / total, 4) for code, size in languages.most_common()},
        shuffle_documents=shuffle_seed,  # those shuffled one by one are not shuffled as a whole
        partition=None,
        encoder="; ".join(dict.fromkeys(manifest.encoder for manifest in manifests)),
        sources=list(sources.values()),
        files={},
        origins=_joined_origins(manifests),
        holdout=_joined_holdout(manifests),
        in_order=_keep_order(manifests),
        command=shlex.join(map(printable, sys.argv)),
        duration_seconds=round(seconds + sum(manifest.duration_seconds for manifest in manifests), 3),
    )


def _joined_records(source: SourceInfo, known: SourceInfo, are_partitions: bool) -> int | None:
    """Lines or rows of a file that several corpora read: partitions each their own. Others each all, and each skipped its
    own: None, so that nobody takes what one skipped for what the other did."""
    if not are_partitions or source.records is None or known.records is None:
        return None
    return source.records + known.records


def _keep_order(manifests: Sequence[CorpusManifest]) -> bool:
    """Whether the documents of corpora lie in the order of their files when the corpora are joined."""
    listed = dict.fromkeys(source.path for manifest in manifests for source in manifest.sources)
    given = [source.path for manifest in manifests for source in manifest.sources if source.documents]
    with_documents = set(given)
    # A file that gave its documents to a later corpus only is listed where an earlier one that read it has it
    as_listed = manifests[0].partition is not None or given == [path for path in listed if path in with_documents]
    return as_listed and all(manifest.in_order and manifest.shuffle_documents is None for manifest in manifests)


def _joined_origins(manifests: Sequence[CorpusManifest]) -> dict[str, list[str]]:
    joined: dict[str, dict[str, None]] = {}
    for manifest in manifests:
        for curation, files in manifest.origins.items():
            joined.setdefault(curation, {}).update(dict.fromkeys(files))
    return {curation: list(files) for curation, files in joined.items()}


def _joined_holdout(manifests: Sequence[CorpusManifest]) -> str | None:
    """`holdout` of corpora joined: all their splits, or None when some have none, or two divide the same file."""
    holdouts = [manifest.holdout.split(":", 1) if manifest.holdout else ["", ""] for manifest in manifests]
    (side, *others) = dict.fromkeys(kind for kind, _ in holdouts)
    splits = list(dict.fromkeys(split for _, split in holdouts))
    files = [source.sha256 for m in manifests for source in m.sources if source.documents]
    is_known = side == "asked" or (None not in files and len(set(files)) == len(files)) or len(splits) == 1
    return f"{side}:{','.join(splits)}" if side and not others and is_known else None
