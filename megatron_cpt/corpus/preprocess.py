"""Raw text -> corpus: read documents, tokenize them on all cores, write .bin/.idx and the manifest.

The main process plans and writes; workers read, parse and tokenize units of about two megabytes. Results are taken in the
order of the input, so the corpus does not depend on the number of workers. Everything is written to PREFIX.partial first
(see `partial`): a run that is interrupted, in whatever way, goes on where it was when the same command is given again.
"""

from __future__ import annotations

import logging
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import cache
from functools import partial as partial_
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import orjson

from megatron_cpt.corpus.audit import ODD_TEXTS, Audit, TokenizerMismatchError
from megatron_cpt.corpus.config import PreprocessConfig
from megatron_cpt.corpus.curation_origins import origins
from megatron_cpt.corpus.encoding import (
    EncodedUnit,
    Encoder,
    Engine,
    ReferenceEncoder,
    TokenPolicy,
    per_text,
    useful_workers,
)
from megatron_cpt.corpus.holdout import number_held_out
from megatron_cpt.corpus.language_check import unlike
from megatron_cpt.corpus.manifest import CorpusManifest, SourceInfo, TokenizerInfo, installed_versions, size_of
from megatron_cpt.corpus.partial import PartialCorpus, discard, lock, open_partial, partial_folder, read_state, writing
from megatron_cpt.corpus.publish import check_corpus_output, check_output_folder, complete_corpus, is_output, publish
from megatron_cpt.corpus.reading import UNIT_BYTES, records_before, sources_beginning_in, units
from megatron_cpt.corpus.sources import Source, check_unchanged, find_sources, note_passed_over, parse_partition, printable
from megatron_cpt.tokenizer import load_tokenizer, tokenizer_file
from megatron_cpt.tokenizer.fast import EncodingError, FastTokenizer, NotSupportedError
from megatron_cpt.utils.console import counted
from megatron_cpt.utils.errors import InputError, ProcessDiedError, Refusals, RefusedValueError
from megatron_cpt.utils.progress import Meter, meter, rates
from megatron_cpt.utils.signals import interruptible
from megatron_cpt.utils.worker_pool import ordered_map

logger = logging.getLogger(__name__)

FAST_FROM_BYTES = 8 << 20
"""Input from which gigatoken's second of loading is worth while."""

FORMAT = 2
"""Raise it when the same input would give another corpus: an unfinished one of before is then not gone on with."""


def preprocess(config: PreprocessConfig) -> str:
    """Tokenize `config.input` into PREFIX.bin/.idx/.json; returns the manifest's path.

    InputError: no files or documents, a document that cannot be read (`on_error` fail), a bad tokenizer, an output that
    exists or cannot be written. After any error there is no new corpus, and an old one is as it was; what was complete
    waits in PREFIX.partial for the same command to be given again.
    """
    prefix = config.prefix
    sources, passed_over = sources_of(config)
    _check_folder(config)
    _check_output(config)
    note_passed_over(passed_over)
    folder = partial_folder(prefix)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with lock(folder), interruptible(), one_thread_per_process(), writing(folder):
        try:
            return _preprocess(config, sources, folder, config.fast_tokenizer)
        except (TokenizerMismatchError, EncodingError) as mismatch:
            logger.warning(f"gigatoken is wrong here, so all is done again without it: {mismatch}")
            discard(folder)
            return _preprocess(config, sources, folder, "never")
        except KeyboardInterrupt:
            state = read_state(folder)
            done = sum(state.get("counts", {}).get("documents", [])) if state else 0
            kept = f"; {counted(done, 'document')} safe: give the same command again to go on" if done else ""
            raise KeyboardInterrupt(f"{prefix} is unfinished{kept}") from None


def check_preprocess_files(config: PreprocessConfig) -> None:
    """Check the input, the tokenizer and the output that a configuration names, whatever is wrong with it.

    Raises:
        InputError: what is wrong with them
    """
    refusals = Refusals()
    for check in (check_preprocess_input, _check_folder, _check_output, check_corpus_tokenizer):
        with refusals.noted():
            check(config)
    refusals.raise_any()


def check_preprocess_input(config: PreprocessConfig) -> None:
    """Raise InputError unless there are files to read, and none is an output."""
    try:
        sources_of(config)
    except RefusedValueError:  # the name of the output, or the format: whether the files are there is known all the same
        find_sources([config.input] if isinstance(config.input, str) else config.input)


def sources_of(config: PreprocessConfig) -> tuple[list[Source], list[str]]:
    """The input files, and those of unknown kind in folders. InputError: none, or one is an output."""
    patterns = [config.input] if isinstance(config.input, str) else config.input
    return find_sources(patterns, config.file_format, partial_(is_output, config.prefix_of_all))


def _check_folder(config: PreprocessConfig) -> None:
    check_output_folder(config.prefix_of_all)


def _check_output(config: PreprocessConfig) -> None:
    check_corpus_output(config.prefix, config.overwrite, config.holdout is not None and config.partition is None)


def check_corpus_tokenizer(config: PreprocessConfig) -> None:
    """Raise InputError unless there is a tokenizer, with the token that is to end documents."""
    tokenizer_file(config.tokenizer)  # whatever is wrong with eos_token
    load_tokenizer(config.tokenizer, config.eos_token)


@contextmanager
def one_thread_per_process() -> Iterator[None]:
    """Cores are shared out by `workers`: keep `tokenizers` from starting a thread pool in each (they inherit it)."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        os.environ.pop(name) if before is None else os.environ.update({name: before})


def _preprocess(config: PreprocessConfig, sources: list[Source], folder: Path, fast: str) -> str:
    """Make the corpus with the fast tokenizer or without it. TokenizerMismatchError: the fast one is wrong."""
    count = parse_partition(config.partition)[1]
    total, content = (sum(getattr(s, size) for s in sources) // count for size in ("bytes", "content_bytes"))
    state = read_state(folder)
    if (fast == "auto" and content < FAST_FROM_BYTES) or (state and state["encoder"] == "reference"):
        fast = "never"  # the second: the fast one may have been found to be wrong
    with Audit(config.tokenizer, config.eos_token) as audit:
        engine, facts = _load(config, audit, fast)
        is_fast = isinstance(engine, FastTokenizer)
        run = _run_identity(config, sources, facts)
        if state and config.overwrite and state["run"] != run:
            discard(folder)
        elif state and "publish" in state and state["run"] == run:
            return publish(config.prefix, folder, state["publish"])
        for line in tokenizer_lines(facts, config.eos):
            logger.info(line)
        policy = TokenPolicy.of(facts.vocab_size, facts.bos_id, facts.eos_id, config.bos, config.eos, config.tokenizer)
        encoder = Encoder(engine, policy, sources, config.read_options, audited=is_fast, keyed=config.holdout is not None)
        with open_partial(folder, run, "gigatoken" if is_fast else "reference", len(sources)) as partial:
            begun = partial.counts.read_bytes
            if partial.units:
                logger.info(f"going on with {folder}: {counted(sum(partial.counts.documents), 'document')} done")
            with meter(total, begun) as shown, _kept_on_error(partial, audit):
                _encode(config, sources, encoder, partial, audit, shown)
            files, manifests = _finish(config, sources, facts, policy, partial, audit)
            summary = _summary(partial, policy, manifests[1:])
        path = publish(config.prefix, folder, files)
    logger.info(summary)
    return path


@contextmanager
def _kept_on_error(partial: PartialCorpus, audit: Audit) -> Iterator[None]:
    """On the way out after an error, keep what is complete and checked."""
    try:
        yield
    except (TokenizerMismatchError, EncodingError, ProcessDiedError):
        raise  # it is wrong, or cannot be checked any more
    except BaseException:
        try:
            audit.settle()
        except TokenizerMismatchError:
            discard(partial.folder)
        except ProcessDiedError:
            pass  # only what was checked before is kept
        else:
            partial.last_checkpoint()
        raise


def _load(config: PreprocessConfig, audit: Audit, fast: str) -> tuple[Engine, TokenizerInfo]:
    """What encodes, and what the reference tokenizer says of itself. The two load at the same time."""
    if fast != "never":
        audit.ask_facts()
        try:
            engine = FastTokenizer(config.tokenizer)
        except NotSupportedError as error:
            if fast == "always":
                raise InputError(f"fast_tokenizer is 'always' but {error}; expected 'auto' or 'never'") from None
            logger.info(f"note: {error}; the slower reference encodes")
        else:
            encoded = per_text(*engine.encode_batch(ODD_TEXTS))
            facts = audit.facts()
            audit.compare(list(zip(ODD_TEXTS, encoded, strict=True)))
            return engine, facts
    tokenizer = load_tokenizer(config.tokenizer, config.eos_token)
    return ReferenceEncoder(tokenizer), TokenizerInfo.of(config.tokenizer, tokenizer)


def tokenizer_lines(facts: TokenizerInfo, eos: str) -> list[str]:
    """What should be known before anything is encoded: how the tokenizer is read, and what ends documents."""
    end = f"documents end with {facts.eos_token} (id {facts.eos_id}), {facts.eos_reason} (--eos_token takes another)"
    return [*(f"note: {note}" for note in facts.notes), end if eos == "document" else "no token ends documents (eos none)"]


def _run_identity(config: PreprocessConfig, sources: Sequence[Source], facts: TokenizerInfo) -> dict[str, Any]:
    """Everything the content of the corpus depends on."""
    options = config.read_options
    return {
        "format": [FORMAT, UNIT_BYTES],
        "tokenizer": facts.fingerprint,
        "input": [[printable(source.url), source.format, source.bytes, source.version] for source in sources],
        "text_key": options.text_key,
        "metadata_keys": list(options.metadata_keys),
        "document_separator": options.separator,
        "max_document_characters": options.max_characters,
        "eos": config.eos,
        "bos": config.bos,
        "partition": config.partition,
        "language": config.language,
        "shuffle_documents": config.shuffle_documents,
        "holdout": config.holdout,
    }


def _encode(
    config: PreprocessConfig,
    sources: Sequence[Source],
    encoder: Encoder,
    partial: PartialCorpus,
    audit: Audit,
    shown: Meter,
) -> None:
    """Encode what is not in `partial` yet."""
    partition = parse_partition(config.partition)
    work = islice(units(sources, config.read_options, partition), partial.units, None)
    workers = useful_workers(config.workers, sum(s.content_bytes for s in sources) // partition[1], UNIT_BYTES)
    if config.checksum_inputs:
        audit.hash([source.url for source in sources_beginning_in(sources, partition) if source.is_local])
    before = cache(lambda index: records_before(sources, index, partition))
    with closing(ordered_map(encoder, work, workers)) as encoded:
        for unit in encoded:
            errors = _errors(config, sources, partial, unit, before)
            partial.add(unit, errors)
            if unit.audit:
                audit.compare(unit.audit)
            shown.advance(unit.read_bytes, unit.lengths.size, unit.text_bytes)
            if partial.is_due():
                audit.settle()
                partial.checkpoint()
    audit.settle()
    partial.checkpoint()


def _errors(
    config: PreprocessConfig,
    sources: Sequence[Source],
    partial: PartialCorpus,
    unit: EncodedUnit,
    before: Callable[[int], int],
) -> bytes:
    """Lines for errors.jsonl; `before`: records of a source that are in earlier partitions.

    InputError at the first when errors are not to be skipped.
    """
    lines = []
    seen: dict[int, int] = {}
    for part in unit.parts:
        source = sources[part.source]
        first = partial.counts.records[part.source] + seen.get(part.source, 0) + 1
        if part.problems:
            first += before(part.source)
        seen[part.source] = seen.get(part.source, 0) + part.records
        for problem in part.problems:
            path, line = printable(source.url), first + problem.record
            if config.on_error == "fail":
                one = source.format == "text" and not config.document_separator
                where = path if one else f"{path}:{line}"
                raise InputError(f"{where}: {problem.detail} (on_error skip leaves such documents out)")
            lines.append({"file": path, "line": line, "reason": problem.reason, "detail": problem.detail})
    return b"".join(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE) for line in lines)


def _finish(
    config: PreprocessConfig,
    sources: Sequence[Source],
    facts: TokenizerInfo,
    policy: TokenPolicy,
    partial: PartialCorpus,
    audit: Audit,
) -> tuple[dict[str, str], list[CorpusManifest]]:
    """Everything but the renames: hold out, shuffle, index, manifests.

    Returns ({file in the partial folder: suffix of PREFIX}, the manifests of the corpus and of what was held out).
    """
    counts, folder = partial.counts, partial.folder
    _check_counts(config, partial)
    checksums = audit.checksums()
    check_unchanged(sources)
    files, manifests = complete_corpus(
        folder,
        _manifest(config, sources, facts, policy, partial, checksums),
        partial.digest.hexdigest(),
        config.holdout if config.partition is None else None,
        with_metadata=bool(config.metadata_keys),
        with_errors=bool(counts.skipped),
    )
    if odd := unlike(config.language, manifests[0].languages):
        logger.warning(odd)
    partial.announce(files)
    return files, manifests


def _check_counts(config: PreprocessConfig, partial: PartialCorpus) -> None:
    """InputError, with nothing left behind, when there are no documents, or too few to hold some out."""
    counts, documents = partial.counts, sum(partial.counts.documents)
    try:
        if config.partition is None and not documents:
            skipped = ", ".join(f"{count:,} {reason}" for reason, count in sorted(counts.skipped.items())) or "no documents"
            raise InputError(f"input {config.input}: empty corpus: found {skipped}; expected documents with text")
        if config.partition is None and config.holdout is not None:
            number_held_out(config.holdout, documents)
    except InputError:
        discard(partial.folder)
        raise
    if not documents:
        whole = "; files that are compressed, text, Arrow or JSON arrays are not divided" if not counts.read_bytes else ""
        logger.warning(f"partition {config.partition} has no documents{whole}")


def _summary(partial: PartialCorpus, policy: TokenPolicy, held_out: Sequence[CorpusManifest]) -> str:
    """The last line on the screen."""
    counts, documents = partial.counts, sum(partial.counts.documents)
    skipped = ", ".join(f"{count:,} {reason}" for reason, count in sorted(counts.skipped.items()))
    left_out = f"; left out: {skipped}" if skipped else ""
    aside = "".join(f"; held out: {size_of(part)}" for part in held_out)
    per_token = f"{_bytes_per_token(partial, policy):.2f} bytes/token, " if counts.text_bytes else ""
    seconds = partial.seconds()
    speed = rates(counts.text_bytes, documents, seconds)
    size = f"{counted(documents, 'document')}, {counted(counts.tokens, 'token')}"
    return f"{size}, {per_token}{seconds:.1f} s, {speed}{left_out}{aside}"


def _bytes_per_token(partial: PartialCorpus, policy: TokenPolicy) -> float:
    """Bytes of text per token that stands for text: without those that begin and end documents."""
    counts = partial.counts
    around = sum(counts.documents) * ((policy.bos_id is not None) + (policy.eos_id is not None))
    return counts.text_bytes / max(counts.tokens - around, 1)


def _manifest(
    config: PreprocessConfig,
    sources: Sequence[Source],
    facts: TokenizerInfo,
    policy: TokenPolicy,
    partial: PartialCorpus,
    checksums: dict[str, str | None],
) -> CorpusManifest:
    """All but `files`, which are not there yet."""
    counts = partial.counts
    documents = sum(counts.documents)
    sampled = max(sum(counts.languages.values()), 1)
    checked = f"gigatoken {version('gigatoken')}, equal to the reference on {counts.compared:,} samples of the input"
    libraries = ("numpy", "tokenizers", "tiktoken", "sentencepiece", "pycld2")
    return CorpusManifest(
        language=config.language,
        documents=documents,
        tokens=counts.tokens,
        text_bytes=counts.text_bytes,
        characters=counts.characters,
        bytes_per_token=round(_bytes_per_token(partial, policy), 4),
        skipped=dict(sorted(counts.skipped.items())),
        languages={code: round(size / sampled, 4) for code, size in counts.languages.most_common()},
        dtype=policy.dtype,
        eos=config.eos,
        bos=config.bos,
        shuffle_documents=config.shuffle_documents,
        partition=config.partition,
        encoder=checked if counts.compared else "the reference tokenizer",
        tokenizer=facts,
        sources=[
            SourceInfo(printable(source.url), source.format, source.bytes, checksums.get(source.url), count, records)
            for source, count, records in zip(sources, counts.documents, counts.records, strict=True)
        ],
        files={},
        origins=origins(source for source, count in zip(sources, counts.documents, strict=True) if count),
        versions=installed_versions(libraries),
        command=shlex.join(map(printable, sys.argv)),
        duration_seconds=round(partial.seconds(), 3),
        holdout=None if config.holdout is None else f"asked:{config.holdout}",
        in_order=True,
    )
