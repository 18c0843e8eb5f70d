"""Several corpora -> one: the partitions of a job array, or any that were made with the same tokenizer and policy.

Bytes are moved as they are, at the speed of the disk; positions are 64-bit throughout.
"""

from __future__ import annotations

import glob
import hashlib
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

from megatron_cpt.data.indexed import IndexedCorpus
from megatron_cpt.data.manifest import CorpusManifest, SourceInfo, read_manifest
from megatron_cpt.data.partial import lock, partial_folder, read_state, writing
from megatron_cpt.data.preprocess import interruptible
from megatron_cpt.data.preprocess_config import parse_partition
from megatron_cpt.data.progress import Meter, meter, rates
from megatron_cpt.data.publish import check_output, complete, publish
from megatron_cpt.data.sources import printable, sha256_file
from megatron_cpt.errors import InputError

COPY_BYTES = 8 << 20
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
        if not os.path.basename(self.output_prefix):
            raise InputError(f"output_prefix is {self.output_prefix!r}; wanted a name, as in data/zh")
        if self.shuffle_documents is not None and not 0 <= self.shuffle_documents < 2**64:
            raise InputError(f"shuffle_documents is {self.shuffle_documents}; wanted a seed from 0 to 2^64 - 1")


def merge_datasets(config: MergeConfig) -> str:
    """Join corpora into OUTPUT_PREFIX.bin/.idx/.json; returns the manifest's path.

    InputError: nothing to join, partitions missing, other tokenizer, width, policy or language, damaged files, an output
    that exists. After an error there is no new corpus, and an old one is as it was.
    """
    began, prefix = time.monotonic(), os.path.expanduser(config.output_prefix)
    prefixes = find_prefixes([config.input] if isinstance(config.input, str) else config.input, prefix)
    if os.path.realpath(prefix) in map(os.path.realpath, prefixes):
        raise InputError(f"output_prefix {prefix} is one of the inputs; wanted another name")
    manifests = [read_manifest(name) for name in prefixes]
    _check(prefixes, manifests)
    holdout = _asked(manifests[0])
    check_output(prefix, config.overwrite, holdout is not None)
    folder = partial_folder(prefix)
    with lock(folder), interruptible(), writing(folder):
        if read_state(folder) is not None:
            raise InputError(f"{folder}: an unfinished preprocessing of that name; finish it or remove it first")
        shutil.rmtree(folder, ignore_errors=True)  # of a merge that was killed
        folder.mkdir()
        try:
            with meter(sum(manifest.files["bin"].bytes for manifest in manifests), of="tokens") as shown:
                bin_sha256 = _copy(prefixes, manifests, folder, shown)
            seconds = time.monotonic() - began
            files, merged = complete(
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
    size, documents, tokens = (
        sum(sizes) for sizes in zip(*((m.files["bin"].bytes, m.documents, m.tokens) for m in merged), strict=True)
    )
    speed = rates(size, documents, seconds, "tokens")
    aside = "".join(f"; held out: {part.documents:,} documents, {part.tokens:,} tokens" for part in merged[1:])
    print(f"{len(prefixes)} corpora, {documents:,} documents, {tokens:,} tokens, {speed}{aside}", file=sys.stderr)
    return path


def _asked(manifest: CorpusManifest) -> str | None:
    """How much is to be held out when the partitions are joined, of which this is one."""
    kind, _, asked = (manifest.holdout or "").partition(":")
    return asked if kind == "asked" else None


def find_prefixes(patterns: Sequence[str], output: str | None = None) -> list[str]:
    """Prefixes, globs and names of partitioned corpora -> prefixes, in order, each once. InputError: none there.

    `output`: what is to be written; its name as an input means its partitions, also when it exists from before.
    """
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
            raise InputError(f"input {pattern}: found no corpus; wanted a path such that PATH.idx exists, or a glob")
        for match in matches:
            found.setdefault(os.path.realpath(match), match)
    return list(found.values())


def _check(prefixes: Sequence[str], manifests: Sequence[CorpusManifest]) -> None:
    """InputError unless all go together."""
    first = manifests[0]
    for prefix, manifest in zip(prefixes, manifests, strict=True):
        for name in ("dtype", "eos", "bos", "language"):
            found, wanted = getattr(manifest, name), getattr(first, name)
            if found != wanted:
                raise InputError(f"{prefix}.json: {name} is {found!r}; wanted {wanted!r} as in {prefixes[0]}.json")
        if manifest.tokenizer.fingerprint != first.tokenizer.fingerprint:
            found, wanted = (f"{m.tokenizer.name} (end of document: id {m.tokenizer.eos_id})" for m in (manifest, first))
            raise InputError(
                f"{prefix}.json: made with tokenizer {found}; wanted {wanted}, the same file, as in {prefixes[0]}.json"
            )
        if Path(prefix + ".metadata.jsonl").exists() != Path(prefixes[0] + ".metadata.jsonl").exists():
            raise InputError(f"{prefix}: some corpora have .metadata.jsonl and some have none; wanted all or none")
    _check_partitions(prefixes, manifests)
    _check_holdouts(prefixes, manifests)


def _check_holdouts(prefixes: Sequence[str], manifests: Sequence[CorpusManifest]) -> None:
    """InputError when some are to be divided otherwise than others, or what is held out would be trained on."""
    asked = [_asked(manifest) for manifest in manifests]
    sides = [(manifest.holdout or "").partition(":")[0] == "holdout" for manifest in manifests]
    for prefix, holdout, side in zip(prefixes, asked, sides, strict=True):
        if holdout != asked[0]:
            raise InputError(f"{prefix}.json: holdout is {holdout}; wanted {asked[0]} as in {prefixes[0]}.json")
        if side != sides[0]:
            what = "was held out for validation" if side else "is a corpus to train on"
            raise InputError(f"{prefix} {what}, unlike {prefixes[0]}; wanted one or the other")


def _check_partitions(prefixes: Sequence[str], manifests: Sequence[CorpusManifest]) -> None:
    """InputError when some of the partitions of one input are missing, twice there, or in another order."""
    partitions = [parse_partition(manifest.partition) for manifest in manifests if manifest.partition]
    if not partitions:
        return
    count = partitions[0][1]
    if len(partitions) != len(manifests) or any(n != count for _, n in partitions):
        found = [manifest.partition or "no partition" for manifest in manifests]
        raise InputError(f"input {', '.join(prefixes)}: found partitions {found}; wanted all of one input and nothing else")
    inputs = [[(source.path, source.bytes) for source in manifest.sources] for manifest in manifests]
    for prefix, its_input in zip(prefixes, inputs, strict=True):
        if its_input != inputs[0]:
            raise InputError(
                f"{prefix}.json: a partition of another input than {prefixes[0]}.json; wanted those of one input"
            )
    found_numbers = [index for index, _ in partitions]
    if found_numbers != list(range(count)):
        missing = sorted(set(range(count)) - set(found_numbers))
        what = f"partitions {missing} are missing" if missing else f"partitions come as {found_numbers}"
        raise InputError(f"input {', '.join(prefixes)}: {what}; wanted 0 to {count - 1} in order")


def _copy(prefixes: Sequence[str], manifests: Sequence[CorpusManifest], folder: Path, shown: Meter) -> str:
    """Append all tokens, lengths, metadata and errors to the files of `folder`; returns the sha256 of the tokens."""
    digest = hashlib.sha256()
    with (folder / "tokens.bin").open("wb") as tokens, (folder / "lengths.bin").open("wb") as lengths:
        for prefix, manifest in zip(prefixes, manifests, strict=True):
            corpus = IndexedCorpus(prefix)
            if (corpus.num_documents, corpus.num_tokens) != (manifest.documents, manifest.tokens):
                found = f"{corpus.num_documents} documents, {corpus.num_tokens} tokens"
                raise InputError(
                    f"{prefix}.idx: found {found}; wanted {manifest.documents} and {manifest.tokens} ({prefix}.json)"
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
            lengths.write(corpus.sequence_lengths.tobytes())
        for written in (tokens, lengths):
            written.flush()
            os.fsync(written.fileno())
    for name in ("metadata.jsonl", "errors.jsonl", "documents"):
        parts = [Path(f"{prefix}.{name}") for prefix in prefixes]
        if any(part.exists() for part in parts):
            with (folder / ("documents.bin" if name == "documents" else name)).open("wb") as output:
                for part in parts:
                    if part.exists():
                        with part.open("rb") as stream:
                            shutil.copyfileobj(stream, output, COPY_BYTES)
    return digest.hexdigest()


def _check_digest(prefix: str, name: str, found: str, manifest: CorpusManifest) -> None:
    wanted = manifest.files[name].sha256
    if found != wanted:
        raise InputError(f"{prefix}.{name}: damaged: sha256 is {found}; wanted {wanted} as in {prefix}.json")


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
            sources[source.path] = replace(source, documents=documents, sha256=sha256)
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
        command=shlex.join(map(printable, sys.argv)),
        duration_seconds=round(seconds + sum(manifest.duration_seconds for manifest in manifests), 3),
    )


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
