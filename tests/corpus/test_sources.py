"""Which files are read, in which order, and what is said about those that cannot be."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from tiny_corpora import content, json_lines, read_lines, run, small_units, texts, write_lines
from tiny_models import ROOT
from without_rights import LAUNCHER, lock, needs_somebody

from megatron_cpt.corpus import partial as partial_module
from megatron_cpt.corpus.manifest import read_corpus_manifest
from megatron_cpt.corpus.partial import PartialCorpus
from megatron_cpt.corpus.sources import find_sources, format_of
from megatron_cpt.utils.errors import InputError


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text('{"text": "a"}\n')


def names(folder: Path, *patterns: str, leave_out: tuple[str, ...] = ()) -> list[str]:
    outputs = set(map(os.path.realpath, leave_out))
    sources, _ = find_sources([str(folder / pattern) for pattern in patterns], is_output=outputs.__contains__)
    return [os.path.relpath(source.url, folder) for source in sources]


def test_order_is_that_given_and_within_folders_and_globs_by_name(tmp_path: Path) -> None:
    touch(tmp_path, "b/2.jsonl", "b/10.jsonl", "b/a/z.jsonl", "b/1.txt", "a.jsonl", "c.jsonl")
    inside = ["b/1.txt", "b/10.jsonl", "b/2.jsonl", "b/a/z.jsonl"]
    assert names(tmp_path, "c.jsonl", "b", "a.jsonl") == ["c.jsonl", *inside, "a.jsonl"]
    assert names(tmp_path, "*.jsonl") == ["a.jsonl", "c.jsonl"]
    assert names(tmp_path, "b/*.jsonl", "[ac].jsonl") == ["b/10.jsonl", "b/2.jsonl", "a.jsonl", "c.jsonl"]
    assert names(tmp_path, "**/*.jsonl") == ["a.jsonl", "b/10.jsonl", "b/2.jsonl", "b/a/z.jsonl", "c.jsonl"]
    assert names(tmp_path, "b/") == inside


def test_a_file_named_twice_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "in/a.jsonl", "in/b.jsonl")
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "in" / "a.jsonl")
    assert names(tmp_path, "in/b.jsonl", "in", "link.jsonl", "in/../in/a.jsonl", "in/*") == ["in/b.jsonl", "in/a.jsonl"]
    monkeypatch.chdir(tmp_path)
    sources, _ = find_sources(["in/a.jsonl", f"file://{tmp_path}/in/a.jsonl", "in"])
    assert [source.url for source in sources] == [str(tmp_path / "in/a.jsonl"), str(tmp_path / "in/b.jsonl")]


def test_names_with_glob_characters_are_names_first(tmp_path: Path) -> None:
    touch(tmp_path, "a[1].jsonl", "a1.jsonl", "what?.jsonl", "whatx.jsonl")
    assert names(tmp_path, "a[1].jsonl") == ["a[1].jsonl"]
    assert names(tmp_path, "what?.jsonl") == ["what?.jsonl"]
    assert names(tmp_path, "a[12].jsonl") == ["a1.jsonl"]


def test_hidden_files_and_unknown_kinds(tmp_path: Path) -> None:
    touch(tmp_path, ".hidden.jsonl", ".git/a.jsonl", "deep/.x/b.jsonl", "a.jsonl", "README.md", "deep/b.csv.gz", "x.gz")
    sources, passed_over = find_sources([str(tmp_path)])
    assert [os.path.relpath(source.url, tmp_path) for source in sources] == ["a.jsonl"]
    assert sorted(os.path.relpath(path, tmp_path) for path in passed_over) == ["README.md", "deep/b.csv.gz", "x.gz"]
    assert names(tmp_path / ".git", ".") == ["a.jsonl"]  # a hidden folder that is named itself
    named, passed_over = find_sources([str(tmp_path / "README.md"), str(tmp_path / ".hidden.jsonl"), f"{tmp_path}/*.gz"])
    assert [(source.format, source.compression) for source in named] == [("text", None), ("jsonl", None), ("text", "gzip")]
    assert passed_over == []
    everything, passed_over = find_sources([str(tmp_path)], file_format="jsonl")
    assert (len(everything), passed_over) == (4, [])


def test_what_was_passed_over_is_said(tmp_path: Path, tiny_tokenizer_dir: str, capsys: pytest.CaptureFixture[str]) -> None:
    touch(tmp_path, "in/a.jsonl", "in/b.md", "in/c.csv")
    assert run(tmp_path / "c", tiny_tokenizer_dir, input=str(tmp_path / "in")).num_documents == 1
    assert "not read, of unknown kind: 2 files" in capsys.readouterr().err


def test_an_empty_path_is_not_the_folder_one_is_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jsonl").write_text("{}")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="input has an empty path"):
        find_sources(["a.jsonl", ""])


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("a.jsonl", "jsonl"),
        ("A.JSONL.GZ", "jsonl"),
        ("a.json.zst", "jsonl"),
        ("a.tar.gz", None),
        ("a.txt.xz", "text"),
        ("a.parquet", "parquet"),
        ("parquet", None),
        (".jsonl", None),
        ("a.jsonl.bak", None),
        ("a.gz.jsonl", "jsonl"),
    ],
)
def test_format_of(name: str, wanted: str | None) -> None:
    assert format_of("some.txt/" + name) == wanted


def test_leave_out(tmp_path: Path) -> None:
    touch(tmp_path, "a.jsonl", "b.jsonl")
    (tmp_path / "link").symlink_to(tmp_path)
    for pattern in (tmp_path, tmp_path / "link", tmp_path / "link" / "*.jsonl"):
        sources, _ = find_sources([str(pattern)], is_output=lambda path: path == str(tmp_path / "b.jsonl"))
        assert [os.path.basename(source.url) for source in sources] == ["a.jsonl"]


def test_datasets_on_disk(tmp_path: Path, tiny_tokenizer_dir: str) -> None:
    """A split is read; a DatasetDict is refused and says which splits there are; a folder around one is any folder."""
    split = tmp_path / "all" / "train"
    split.mkdir(parents=True)
    with pa.OSFile(str(split / "data-00000-of-00001.arrow"), "wb") as sink:
        data = pa.table({"text": ["a", "b"]})
        with pa.ipc.new_stream(sink, data.schema) as writer:
            writer.write_table(data)
    (split / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}, indent=2))
    (split / "dataset_info.json").write_text("{\n}")
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "zh").symlink_to(split)
    (tmp_path / "all" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(InputError, match=r"a DatasetDict with the splits \['train', 'test'\]; expected .*all/train$"):
        find_sources([str(tmp_path / "all")])
    assert names(tmp_path, "all/train") == ["all/train/data-00000-of-00001.arrow"]
    assert names(tmp_path, "all/t*") == ["all/train/data-00000-of-00001.arrow"]
    assert texts(run(tmp_path / "c", tiny_tokenizer_dir, input=str(split)), tiny_tokenizer_dir) == ["a", "b"]


def test_a_saved_dataset_inside_a_folder(tmp_path: Path) -> None:
    """Its descriptions are no documents."""
    touch(tmp_path, "in/zh/data-00000-of-00001.arrow", "in/zh/dataset_info.json", "in/en.jsonl")
    (tmp_path / "in/zh/state.json").write_text('{"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}')
    assert names(tmp_path, "in") == ["in/en.jsonl", "in/zh/data-00000-of-00001.arrow"]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("none.jsonl", "found no files"),
        ("empty", "found no files; expected"),
        ("*.nothing", "found no files"),
        ("docs", r"found no files \(only .*a\.md, of unknown kind; give file_format to read them\)"),
        ("nosuch://bucket/a.jsonl", "nosuch"),
        ("data.parquet.gz", "a compressed parquet file; expected it unpacked"),
        ("data.arrow.zst", "a compressed arrow file"),
    ],
)
def test_refusals_name_the_input(pattern: str, message: str, tmp_path: Path) -> None:
    touch(tmp_path, "data.parquet.gz", "data.arrow.zst", "docs/a.md")
    (tmp_path / "empty").mkdir()
    path = pattern if "://" in pattern else str(tmp_path / pattern)
    with pytest.raises(InputError, match=message) as refusal:
        find_sources([path])
    assert path in str(refusal.value)


def test_a_store_whose_library_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(InputError, match=r"input s3://bucket/a\.jsonl: .*s3fs"):
        find_sources(["s3://bucket/a.jsonl"])


# --- damage ---

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".zst": zstandard.ZstdCompressor(write_checksum=True).compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}
LINES = json_lines([{"text": f"document {os.urandom(40).hex()}"} for _ in range(60)])


@pytest.mark.parametrize("kind", ["a.jsonl", "a.txt"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.999])
@pytest.mark.parametrize("suffix", COMPRESS)
def test_a_compressed_file_that_was_cut(
    suffix: str, share: float, kind: str, tmp_path: Path, tiny_tokenizer_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_units(monkeypatch, 500)
    data = COMPRESS[suffix](LINES)
    (tmp_path / (kind + suffix)).write_bytes(data[: max(5, int(len(data) * share))])
    with pytest.raises(InputError, match=rf"{kind}{suffix}: damaged"):
        run(tmp_path / "c", tiny_tokenizer_dir, input=str(tmp_path / (kind + suffix)), on_error="skip")
    assert not list(tmp_path.glob("c.[bij]*"))


def test_several_frames_of_which_the_last_was_cut(tmp_path: Path, tiny_tokenizer_dir: str) -> None:
    """The cut falls behind a line's end: every line that is left is good."""
    for suffix in (".gz", ".zst"):
        first, second = COMPRESS[suffix](LINES), COMPRESS[suffix](LINES)
        (tmp_path / f"a.jsonl{suffix}").write_bytes(first + second[:-3])
        with pytest.raises(InputError, match=rf"a\.jsonl{suffix}: damaged"):
            run(tmp_path / "c", tiny_tokenizer_dir, input=str(tmp_path / f"a.jsonl{suffix}"), on_error="skip")


@pytest.mark.parametrize("suffix", COMPRESS)
def test_a_compressed_file_with_wrong_bytes(suffix: str, tmp_path: Path, tiny_tokenizer_dir: str) -> None:
    data = bytearray(COMPRESS[suffix](LINES))
    for i in range(len(data) // 2, len(data) // 2 + 40):
        data[i] ^= 0x55
    (tmp_path / f"a.jsonl{suffix}").write_bytes(bytes(data))
    with pytest.raises(InputError, match=rf"a\.jsonl{suffix}: damaged"):
        run(tmp_path / "c", tiny_tokenizer_dir, input=str(tmp_path / f"a.jsonl{suffix}"), on_error="skip")


@pytest.mark.parametrize("suffix", COMPRESS)
def test_a_name_that_promises_compression(suffix: str, tmp_path: Path, tiny_tokenizer_dir: str) -> None:
    (tmp_path / f"a.jsonl{suffix}").write_bytes(LINES)
    with pytest.raises(InputError, match=rf"a\.jsonl{suffix}: damaged"):
        run(tmp_path / "c", tiny_tokenizer_dir, input=str(tmp_path / f"a.jsonl{suffix}"))


@pytest.mark.parametrize("workers", [1, 2])
def test_damaged_parquet_and_arrow(
    workers: int, tmp_path: Path, tiny_tokenizer_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Damage that shows only when the rows are read: in a worker for Parquet, in the main process for Arrow."""
    small_units(monkeypatch, 1000)
    data = pa.table({"text": [os.urandom(50).hex() for _ in range(100)]})
    pq.write_table(data, tmp_path / "a.parquet", compression="zstd", row_group_size=20)
    with pa.OSFile(str(tmp_path / "b.arrow"), "wb") as sink, pa.ipc.new_stream(sink, data.schema) as writer:
        for batch in data.to_batches(max_chunksize=10):
            writer.write_batch(batch)
    parquet, arrow = (bytearray((tmp_path / name).read_bytes()) for name in ("a.parquet", "b.arrow"))
    parquet[2200:2600] = os.urandom(400)
    (tmp_path / "a.parquet").write_bytes(parquet)
    (tmp_path / "b.arrow").write_bytes(arrow[: len(arrow) // 2])
    for name in ("a.parquet", "b.arrow"):
        with pytest.raises(InputError, match=name.replace(".", r"\.")):
            run(tmp_path / "c", tiny_tokenizer_dir, input=str(tmp_path / name), on_error="skip", workers=workers)


def test_a_file_that_goes_away_is_named(tmp_path: Path, tiny_tokenizer_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    small_units(monkeypatch, 100)
    files = [write_lines(tmp_path / f"{name}.jsonl", [{"text": name * 20}] * 20) for name in "ab"]
    original = PartialCorpus.add

    def add(self: PartialCorpus, *unit: object) -> None:
        Path(files[1]).unlink(missing_ok=True)
        original(self, *unit)  # type: ignore[arg-type]

    monkeypatch.setattr(PartialCorpus, "add", add)
    with pytest.raises(InputError, match=r"b\.jsonl: cannot be read"):
        run(tmp_path / "c", tiny_tokenizer_dir, input=files, workers=2)


# --- names and places ---


def test_names_that_are_not_utf8(tmp_path: Path, tiny_tokenizer_dir: str) -> None:
    folder = os.fsencode(tmp_path) + b"/caf\xe9"
    os.mkdir(folder)
    with open(folder + b"/\xff.jsonl", "wb") as stream:
        stream.write(b'{"text": "one"}\nbroken\n')
    with open(folder + b"/\xfe.txt", "wb") as stream:
        stream.write(b"two")
    corpus = run(tmp_path / "c", tiny_tokenizer_dir, input=os.fsdecode(folder), on_error="skip")
    assert texts(corpus, tiny_tokenizer_dir) == ["two", "one"]
    found = read_corpus_manifest(corpus.prefix).sources
    assert [source.path for source in found] == [f"{tmp_path}/caf\\xe9/\\xfe.txt", f"{tmp_path}/caf\\xe9/\\xff.jsonl"]
    assert [bool(source.sha256) for source in found] == [True, True]
    assert read_lines(tmp_path / "c.errors.jsonl")[0]["file"] == f"{tmp_path}/caf\\xe9/\\xff.jsonl"
    with pytest.raises(InputError, match=r"caf\\xe9/\\xff\.jsonl:2: not valid JSON"):
        run(tmp_path / "d", tiny_tokenizer_dir, input=os.fsdecode(folder + b"/\xff.jsonl"))


def test_output_and_tokenizer_whose_names_are_not_utf8(tmp_path: Path, tiny_tokenizer_dir: str) -> None:
    import shutil

    tokenizer = os.fsencode(tmp_path) + b"/tok\xff"
    shutil.copytree(os.fsencode(tiny_tokenizer_dir), tokenizer)
    source = write_lines(tmp_path / "a.jsonl", [{"text": "a"}])
    prefix = os.fsdecode(os.fsencode(tmp_path) + b"/out\xfe/c")
    assert run(prefix, tiny_tokenizer_dir, input=source).num_documents == 1
    corpus = run(tmp_path / "c", os.fsdecode(tokenizer), input=source)
    assert read_corpus_manifest(corpus.prefix).tokenizer.path == f"{tmp_path}/tok\\xff"


def _interrupt_at(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    original, seen = PartialCorpus.add, []

    def add(self: PartialCorpus, *unit: object) -> None:
        seen.append(0)
        if len(seen) == number:
            raise KeyboardInterrupt
        original(self, *unit)  # type: ignore[arg-type]

    monkeypatch.setattr(PartialCorpus, "add", add)


def test_output_in_the_input_folder(tmp_path: Path, tiny_tokenizer_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a run writes there is no input: not of a run that is gone on with, and not of the other partitions."""
    small_units(monkeypatch, 100)
    monkeypatch.setattr(partial_module, "SECONDS_BETWEEN_CHECKPOINTS", 0)
    records = [{"text": f"document {i}", "id": i} for i in range(40)] + [{"text": ""}]
    folder, settings = tmp_path / "in", {"on_error": "skip", "metadata_keys": "id"}
    source = write_lines(folder / "a.jsonl", records)
    wanted = run(tmp_path / "c", tiny_tokenizer_dir, input=source, **settings)
    with monkeypatch.context() as patch:
        _interrupt_at(5, patch)
        with pytest.raises(KeyboardInterrupt):
            run(folder / "c", tiny_tokenizer_dir, input=str(folder), **settings)
    assert content(run(folder / "c", tiny_tokenizer_dir, input=str(folder), **settings).prefix) == content(wanted.prefix)
    for suffix in (".bin", ".idx", ".json", ".metadata.jsonl", ".errors.jsonl"):
        (folder / f"c{suffix}").unlink()
    parts = [run(folder / "c", tiny_tokenizer_dir, input=str(folder), partition=f"{i}/3", **settings) for i in range(3)]
    assert sum(part.num_documents for part in parts) == 40


def test_folders_behind_links(tmp_path: Path) -> None:
    touch(tmp_path, "in/a.jsonl", "elsewhere/b.jsonl", "elsewhere/deep/c.jsonl")
    (tmp_path / "in" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "circle").symlink_to(tmp_path / "in")
    assert names(tmp_path, "in") == ["in/a.jsonl", "in/link/b.jsonl", "in/link/deep/c.jsonl"]


@needs_somebody
def test_what_may_not_be_read_is_named_with_all_else(tmp_path: Path) -> None:
    """A folder that cannot be listed was passed over without a word, an unreadable tokenizer hid all other mistakes."""
    for name in ("a/in.jsonl", "a/deep/in.jsonl", "locked.jsonl", "tokenizer.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text('{"text": "a"}\n')
    for name in ("a/deep", "locked.jsonl", "tokenizer.json"):
        lock(tmp_path / name)
    words = ["--input", "a", "locked.jsonl", "--tokenizer", "tokenizer.json", "--output_prefix", "out/x", "--language", "xx"]
    command = [*LAUNCHER, sys.executable, "-B", str(ROOT / "tools" / "preprocess_data.py"), *words]
    try:
        result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    finally:
        (tmp_path / "a" / "deep").chmod(0o755)
    assert result.returncode == 2
    first, *others = result.stderr.splitlines()
    assert first.startswith("error: language is 'xx'")
    assert others == [
        f"error: input a: {tmp_path}/a/deep: Permission denied",
        f"error: input {tmp_path}/locked.jsonl: Permission denied; expected a file that you may read",
        f"error: output_prefix is out/x; expected a name in a folder to write to ({tmp_path} cannot be written to: "
        "Permission denied)",
        "error: tokenizer.json: Permission denied",
    ]
