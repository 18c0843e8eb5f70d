"""Raw text -> corpus: order, policies, counts, and every error a user can make."""

from __future__ import annotations

import gzip
import json
import os
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_corpora import json_lines

from megatron_cpt.corpus import preprocess as preprocess_module
from megatron_cpt.corpus import reading
from megatron_cpt.corpus.indexed_dataset import IndexedCorpus
from megatron_cpt.corpus.manifest import read_corpus_manifest
from megatron_cpt.corpus.partial import PartialCorpus
from megatron_cpt.corpus.preprocess import PreprocessConfig, preprocess
from megatron_cpt.corpus.sources import sha256_file
from megatron_cpt.tokenizer import load_tokenizer
from megatron_cpt.utils.errors import InputError

REPOSITORY = Path(__file__).parents[2]


def write_lines(path: Path, records: list[Any]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    return str(path)


@pytest.fixture
def source(tmp_path: Path) -> str:
    return write_lines(tmp_path / "in" / "a.jsonl", [{"text": f"document {i} 文档"} for i in range(20)])


def run(tmp_path: Path, tokenizer: str, **settings: Any) -> IndexedCorpus:
    config = {"tokenizer": tokenizer, "output_prefix": str(tmp_path / "out" / "c"), "language": "en", "workers": 1}
    path = preprocess(PreprocessConfig(**(config | settings)))
    assert path == config["output_prefix"] + ".json" or "output_prefix" in settings
    return IndexedCorpus(path.removesuffix(".json"))


def small_units(monkeypatch: pytest.MonkeyPatch, size: int = 300) -> None:
    """Make many units of work out of little input."""
    for module in (reading, preprocess_module):
        monkeypatch.setattr(module, "UNIT_BYTES", size)


def texts(corpus: IndexedCorpus, tokenizer: str) -> list[str]:
    return [load_tokenizer(tokenizer).decode(corpus[i].tolist()) for i in range(len(corpus))]


def test_documents_tokens_and_manifest(tmp_path: Path, tiny_tokenizer_dir: str, source: str) -> None:
    write_lines(Path(source), [{"text": "one"}, {"text": ""}, {"text": " \n"}, {"text": "二"}])
    corpus = run(tmp_path, tiny_tokenizer_dir, input=[source], language="zh", on_error="skip")
    assert texts(corpus, tiny_tokenizer_dir) == ["one<|endoftext|>", "二<|endoftext|>"]
    manifest = read_corpus_manifest(corpus.prefix)
    assert (manifest.documents, manifest.skipped, manifest.text_bytes, manifest.characters) == (2, {"empty": 2}, 6, 4)
    assert (manifest.tokens, manifest.dtype, manifest.language) == (corpus.num_tokens, "uint16", "zh")
    assert manifest.tokenizer.fingerprint == load_tokenizer(tiny_tokenizer_dir).fingerprint
    assert [(s.path, s.bytes, s.documents) for s in manifest.sources] == [(source, os.path.getsize(source), 2)]
    for suffix, info in manifest.files.items():
        assert info.sha256 == sha256_file(f"{corpus.prefix}.{suffix}")
        assert info.bytes == os.path.getsize(f"{corpus.prefix}.{suffix}")


def test_order_does_not_depend_on_workers(tmp_path: Path, tiny_tokenizer_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [
        write_lines(tmp_path / f"{name}.jsonl", [{"text": f"{name}{i} " * (i % 7 + 1)} for i in range(50)])
        for name in ("b", "a")
    ]
    small_units(monkeypatch)
    prefixes = [str(tmp_path / f"w{workers}") for workers in (1, 2)]
    for workers, prefix in enumerate(prefixes, start=1):
        run(tmp_path, tiny_tokenizer_dir, input=files, output_prefix=prefix, workers=workers)
    for suffix in (".bin", ".idx"):
        assert Path(prefixes[0] + suffix).read_bytes() == Path(prefixes[1] + suffix).read_bytes()
    one, two = (replace(read_corpus_manifest(prefix), duration_seconds=0, command="") for prefix in prefixes)
    assert one == two
    assert texts(IndexedCorpus(prefixes[1]), tiny_tokenizer_dir)[50].startswith("a0")


def test_worker_errors_reach_the_user(tmp_path: Path, tiny_tokenizer_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    small_units(monkeypatch)
    source = write_lines(tmp_path / "a.jsonl", [{"text": "x" * 50}] * 40 + [{"body": 1}] + [{"text": "y"}] * 40)
    with pytest.raises(InputError, match=r"a\.jsonl:41: no field 'text'"):
        run(tmp_path, tiny_tokenizer_dir, input=source, workers=2)
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["c.partial"]  # what was complete, to go on with
    corpus = run(tmp_path, tiny_tokenizer_dir, input=source, workers=2, on_error="skip")
    assert corpus.num_documents == 80
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["c.bin", "c.errors.jsonl", "c.idx", "c.json"]


@pytest.mark.parametrize(("eos", "bos", "wanted"), [("none", "none", "{}"), ("none", "document", "<|endoftext|>{}")])
def test_policies(tmp_path: Path, tiny_tokenizer_dir: str, source: str, eos: str, bos: str, wanted: str) -> None:
    corpus = run(tmp_path, tiny_tokenizer_dir, input=source, eos=eos, bos=bos)
    assert texts(corpus, tiny_tokenizer_dir)[1] == wanted.format("document 1 文档")


def test_folders_globs_and_plain_text(tmp_path: Path, tiny_tokenizer_dir: str) -> None:
    folder = tmp_path / "in"
    write_lines(folder / "deep" / "z.jsonl", [{"text": "line"}])
    (folder / "b.txt").write_bytes("\ufeffplain\r\n二".encode())
    (folder / "a.txt").write_text("first")
    (folder / ".hidden").write_text("no")
    eos = "<|endoftext|>"
    corpus = run(tmp_path, tiny_tokenizer_dir, input=[str(folder)])
    assert texts(corpus, tiny_tokenizer_dir) == ["first" + eos, "plain\r\n二" + eos, "line" + eos]
    corpus = run(tmp_path, tiny_tokenizer_dir, input=[f"{folder}/**/*.jsonl", str(folder)], overwrite=True)
    assert texts(corpus, tiny_tokenizer_dir)[0] == "line" + eos
    assert corpus.num_documents == 3  # the file both name is read once


def test_corpus_in_its_own_input_folder(tmp_path: Path, tiny_tokenizer_dir: str, source: str) -> None:
    folder = str(Path(source).parent)
    for overwrite in (False, True):
        corpus = run(tmp_path, tiny_tokenizer_dir, input=folder, output_prefix=folder + "/c", overwrite=overwrite)
        assert corpus.num_documents == 20


def test_nested_text_key(tmp_path: Path, tiny_tokenizer_dir: str) -> None:
    source = write_lines(tmp_path / "a.json", [{"article": {"body": "inside"}}])
    corpus = run(tmp_path, tiny_tokenizer_dir, input=source, text_key="article.body", eos="none")
    assert texts(corpus, tiny_tokenizer_dir) == ["inside"]
    with pytest.raises(InputError, match=r"a.json:1: no field 'article.title'; found \['body'\]"):
        run(tmp_path, tiny_tokenizer_dir, input=source, text_key="article.title", overwrite=True)


def test_a_failed_overwrite_keeps_the_old_corpus(tmp_path: Path, tiny_tokenizer_dir: str, source: str) -> None:
    old = run(tmp_path, tiny_tokenizer_dir, input=source).num_tokens
    bad = write_lines(tmp_path / "bad.jsonl", [{"text": "fine"}, {"text": None}])
    with pytest.raises(InputError, match=r"found .*c\.bin"):
        run(tmp_path, tiny_tokenizer_dir, input=source)
    with pytest.raises(InputError, match=r"bad\.jsonl:2: field 'text' is null"):
        run(tmp_path, tiny_tokenizer_dir, input=bad, overwrite=True)
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["c.bin", "c.idx", "c.json"]
    assert (
        IndexedCorpus(str(tmp_path / "out" / "c")).num_tokens == old == read_corpus_manifest(str(tmp_path / "out/c")).tokens
    )


def test_environment_is_left_as_found(
    tmp_path: Path, tiny_tokenizer_dir: str, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    run(tmp_path, tiny_tokenizer_dir, input=source)
    assert "TOKENIZERS_PARALLELISM" not in os.environ


def tool(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(REPOSITORY / "tools" / "preprocess_data.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_tool_prints_the_manifest_path_last(tmp_path: Path, tiny_tokenizer_dir: str, source: str) -> None:
    prefix = str(tmp_path / "out" / "c")
    done = tool("--input", source, "--tokenizer", tiny_tokenizer_dir, "--output-prefix", prefix, "--language", "en")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == prefix + ".json"
    assert "20 documents" in done.stderr


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "found no files"),
        (b'{"text": ""}\n\n', "a.jsonl:1: no text"),
        (b"", "empty corpus"),
        (b'{"text": "a"}\n{"text": \n', "a.jsonl:2: not valid JSON"),
        (b'[1]\n{"text": "a"}\n', "a.jsonl:1: found list"),
        (b'{"title": "a", "body": "b"}\n', "a.jsonl:1: no field 'text'; found ['body', 'title']"),
        (b'{"text": "\xff"}\n', "a.jsonl:1: byte 10 is not UTF-8"),
    ],
)
def test_tool_input_errors(tmp_path: Path, tiny_tokenizer_dir: str, content: bytes | None, message: str) -> None:
    source = tmp_path / "a.jsonl"
    if content is not None:
        source.write_bytes(content)
    out = str(tmp_path / "out" / "c")
    done = tool("--input", str(source), "--tokenizer", tiny_tokenizer_dir, "--output_prefix", out, "--language", "en")
    assert done.returncode == 2
    assert message in done.stderr
    errors = [line for line in done.stderr.splitlines() if not line.startswith("documents end with ")]
    assert errors == done.stderr.splitlines()[-1:]
    assert list(tmp_path.rglob("*c.*")) == []


def test_output_folder_that_cannot_be(tmp_path: Path, tiny_tokenizer_dir: str, source: str) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match="expected a name in a folder to write to"):
        run(tmp_path, tiny_tokenizer_dir, input=source, output_prefix=str(tmp_path / "file" / "c"))


def test_all_mistakes_at_once(
    tmp_path: Path, tiny_tokenizer_dir: str, source: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of settings and files; where all settings are right, of files alone."""

    def refused(*words: str) -> list[str]:
        monkeypatch.setattr(sys, "argv", ["preprocess_data.py", *words])
        with pytest.raises(SystemExit) as stopped:
            runpy.run_path(str(REPOSITORY / "tools" / "preprocess_data.py"), run_name="__main__")
        assert stopped.value.code == 2
        return [line.split(";")[0] for line in capsys.readouterr().err.splitlines()]

    files = ["--input", "nowhere", "no/where*", "--tokenizer", "/none", "--output_prefix", str(tmp_path / "c")]
    missing = ["error: input nowhere: found no files", "error: input no/where*: found no files", "error: tokenizer /none: "]
    wrong = refused(*files, "--language", "zho", "--workers", "0", "--partition", "8/8", "--holdout", "2", "--eos", "maybe")
    settings = ["workers is 0", "language is 'zho'", "partition is '8/8'"]
    assert wrong[0].startswith("error: eos is 'maybe'")
    assert wrong[1:4] == [f"error: {start}" for start in settings]
    assert [line[: len(start)] for line, start in zip(wrong[4:], missing, strict=True)] == missing
    wrong = refused(*files, "--language", "zho", "--workers", "0", "--partition", "8/8", "--holdout", "x")
    assert wrong[:4] == [f"error: {start}" for start in [*settings, "holdout is 'x'"]]
    assert [line[: len(start)] for line, start in zip(wrong[4:], missing, strict=True)] == missing
    (tmp_path / "c.bin").write_bytes(b"")
    wrong = refused(*files, "--language", "zh")
    missing[2:2] = [f"error: output_prefix {tmp_path}/c: found {tmp_path}/c.bin"]
    assert [line[: len(start)] for line, start in zip(wrong, missing, strict=True)] == missing


def test_not_text_and_bad_settings(tmp_path: Path, tiny_tokenizer_dir: str, source: str) -> None:
    (tmp_path / "a.bin").write_bytes(b"ok\xff\xfe")
    with pytest.raises(InputError, match="byte 2 is not UTF-8"):
        run(tmp_path, tiny_tokenizer_dir, input=str(tmp_path / "a.bin"))
    with pytest.raises(InputError, match="workers is 0"):
        run(tmp_path, tiny_tokenizer_dir, input=source, workers=0)


@pytest.mark.parametrize(
    ("field", "value"), [("output_prefix", ""), ("output_prefix", "out/"), ("language", ""), ("input", ""), ("input", [])]
)
def test_empty_settings_are_refused(field: str, value: object) -> None:
    settings: dict[str, object] = {"input": "a.jsonl", "tokenizer": "t", "output_prefix": "p", "language": "en"}
    with pytest.raises(InputError, match=f"{field} is"):
        PreprocessConfig(**settings | {field: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["a.JSONL", "a.ndjson"])
def test_json_lines_by_other_names(name: str, tmp_path: Path, tiny_tokenizer_dir: str) -> None:
    (tmp_path / name).write_text('{"text": "one"}\n{"text": "two"}\n')
    preprocess(PreprocessConfig(str(tmp_path / name), tiny_tokenizer_dir, str(tmp_path / "c"), "en", workers=1))
    assert read_corpus_manifest(str(tmp_path / "c")).documents == 2


def test_speed_is_that_of_text_not_of_compressed_files(
    tmp_path: Path, tiny_tokenizer_dir: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(json_lines([{"text": "word " * 20, "more": "x" * 900}] * 4000)))
    monkeypatch.setattr(PartialCorpus, "seconds", lambda self: 2.0)
    run(tmp_path, tiny_tokenizer_dir, input=str(tmp_path / "a.jsonl.gz"))
    assert "2.0 s, 0.2 MB of text/s, 2,000 documents/s" in capsys.readouterr().err


def test_what_a_kill_after_the_last_rename_leaves_goes_with_the_next_run(tmp_path: Path, tiny_tokenizer_dir: str) -> None:
    source = write_lines(tmp_path / "a.jsonl", [{"text": "a"}])
    run(tmp_path, tiny_tokenizer_dir, input=source)
    (tmp_path / "out" / "c.partial").mkdir()
    for left in ("c.partial.lock", "c.partial/tokens.bin"):
        (tmp_path / "out" / left).touch()
    with pytest.raises(InputError, match="expected a new name or overwrite"):
        run(tmp_path, tiny_tokenizer_dir, input=source)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"c.bin", "c.idx", "c.json"}
