"""Whatever the files look like and however they are cut into units, the documents are the same."""

from __future__ import annotations

import bz2
import codecs
import gzip
import json
import lzma
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from fsspec.spec import AbstractBufferedFile, AbstractFileSystem
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny_corpora import content, json_lines, read_lines, run, small_units, texts, write_lines

from megatron_cpt.corpus import reading
from megatron_cpt.corpus.documents import read_part
from megatron_cpt.corpus.manifest import read_corpus_manifest
from megatron_cpt.corpus.reading import ReadOptions, units
from megatron_cpt.corpus.sources import Source, find_sources
from megatron_cpt.utils.errors import InputError

STRING = pa.string()
DOCUMENTS = [
    "one",
    "two lines\nof text\n",
    " white space around\t",
    "引号“”和\"quotes\" \\ {'text': 1}",
    "café 👨‍👩‍👧 \x00\x7f\u2028 controls",
    "long " * 300,
    '{"text": "not me"}',
    *(f"document {i} 文档" for i in range(40)),
]
RECORDS = [{"text": text, "id": i, "inner": {"body": text, "n": i}} for i, text in enumerate(DOCUMENTS)]


@pytest.fixture(autouse=True)
def _many_units(monkeypatch: pytest.MonkeyPatch) -> None:
    small_units(monkeypatch, 200)


@pytest.fixture
def wanted(tmp_path: Path, tiny_tokenizer_dir: str) -> dict[str, bytes]:
    """What every format must give."""
    corpus = run(tmp_path / "wanted", tiny_tokenizer_dir, input=write_lines(tmp_path / "wanted.jsonl", RECORDS))
    assert texts(corpus, tiny_tokenizer_dir) == DOCUMENTS
    return content(corpus.prefix)


# --- one writer a format: (folder) -> what to give as input ---


def compressed(name: str, compress: Callable[[bytes], bytes]) -> Callable[[Path], str]:
    def write(folder: Path) -> str:
        (folder / name).write_bytes(compress(json_lines(RECORDS)))
        return str(folder / name)

    return write


def zstd_frames(data: bytes) -> bytes:
    """Many frames that end within lines, with an empty one and one that does not say its size."""
    cut = [data[i : i + 333] for i in range(0, len(data), 333)]
    frames = [zstandard.ZstdCompressor().compress(piece) for piece in cut]
    frames.insert(2, zstandard.ZstdCompressor().compress(b""))
    stream = zstandard.ZstdCompressor(write_content_size=False).compressobj()
    frames[3] = stream.compress(cut[2]) + stream.flush()
    assert zstandard.ZstdDecompressor().stream_reader(b"".join(frames), read_across_frames=True).read() == data
    return b"".join(frames)


def gzip_members(data: bytes) -> bytes:
    return gzip.compress(data[:501]) + gzip.compress(b"") + gzip.compress(data[501:])


def table(kind: pa.DataType = STRING) -> pa.Table:
    text = pa.array(DOCUMENTS)
    if pa.types.is_dictionary(kind):
        column = text.cast(kind.value_type).dictionary_encode()
    else:
        column = text.cast(kind)
    return pa.table({"text": column, "id": pa.array(range(len(DOCUMENTS)))})


def parquet(kind: pa.DataType = STRING, **options: Any) -> Callable[[Path], str]:
    def write(folder: Path) -> str:
        pq.write_table(table(kind), folder / "a.parquet", **options)
        return str(folder / "a.parquet")

    return write


def arrow(kind: pa.DataType = STRING, *, stream: bool, name: str = "a.arrow") -> Callable[[Path], str]:
    def write(folder: Path) -> str:
        data = table(kind).combine_chunks()
        make = pa.ipc.new_stream if stream else pa.ipc.new_file
        with pa.OSFile(str(folder / name), "wb") as sink, make(sink, data.schema) as writer:
            for batch in data.to_batches(max_chunksize=10):
                writer.write_batch(batch)
        return str(folder / name)

    return write


def saved_dataset(folder: Path) -> str:
    """A folder as `datasets.Dataset.save_to_disk` writes it, whose files are to be read in the order of state.json."""
    names = ["data-00001-of-00002.arrow", "data-00000-of-00002.arrow"]
    for name, data in zip(names, (table()[:11], table()[11:]), strict=True):
        with pa.OSFile(str(folder / name), "wb") as sink, pa.ipc.new_stream(sink, data.schema) as writer:
            writer.write_table(data)
    state = {"_data_files": [{"filename": name} for name in names], "_fingerprint": "ab12", "_split": "train"}
    (folder / "state.json").write_text(json.dumps(state, indent=2))
    (folder / "dataset_info.json").write_text(json.dumps({"features": {"text": {"_type": "Value"}}}, indent=2))
    return str(folder)


def one_text_each(folder: Path) -> str:
    for i, text in enumerate(DOCUMENTS):
        (folder / f"{i:03d}.txt").write_bytes(text.encode())
    return str(folder)


def some_gzipped_texts(folder: Path) -> str:
    for i, text in enumerate(DOCUMENTS):
        if i % 2:
            (folder / f"{i:03d}.txt.gz").write_bytes(gzip.compress(text.encode()))
        else:
            (folder / f"{i:03d}.text").write_bytes(text.encode())
    return str(folder)


def separated(name: str, compress: Callable[[bytes], bytes] = bytes) -> Callable[[Path], str]:
    def write(folder: Path) -> str:
        (folder / name).write_bytes(compress("\n<end>\n".join(DOCUMENTS).encode()))
        return str(folder / name)

    return write


FORMATS: dict[str, Callable[[Path], str]] = {
    "json": compressed("a.json", bytes),
    "ndjson": compressed("a.ndjson", bytes),
    "gz": compressed("a.jsonl.gz", gzip.compress),
    "gz of several members": compressed("a.jsonl.gz", gzip_members),
    "zst": compressed("a.jsonl.zst", zstandard.ZstdCompressor().compress),
    "zst of several frames": compressed("a.json.zstd", zstd_frames),
    "bz2": compressed("a.jsonl.bz2", bz2.compress),
    "xz": compressed("a.ndjson.XZ", lzma.compress),
    "parquet": parquet(),
    "parquet, row groups": parquet(row_group_size=7),
    "parquet, large_string": parquet(pa.large_string(), row_group_size=9),
    "parquet, binary": parquet(pa.binary()),
    "parquet, large_binary": parquet(pa.large_binary()),
    "parquet, dictionary": parquet(pa.dictionary(pa.int32(), pa.string()), row_group_size=20),
    "parquet, dictionary of large strings": parquet(pa.dictionary(pa.int32(), pa.large_string())),
    "parquet, zstd": parquet(compression="zstd", data_page_version="2.0"),
    "arrow file": arrow(stream=False),
    "arrow stream": arrow(stream=True),
    "arrow, large_string": arrow(pa.large_string(), stream=True),
    "arrow, string_view": arrow(pa.string_view(), stream=False),
    "arrow, dictionary": arrow(pa.dictionary(pa.int32(), pa.string()), stream=False),
    "feather": arrow(stream=False, name="a.feather"),
    "saved dataset": saved_dataset,
    "text files": one_text_each,
    "text files, some gzipped": some_gzipped_texts,
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_tokens(
    name: str, tmp_path: Path, tiny_tokenizer_dir: str, wanted: dict[str, bytes]
) -> None:
    (tmp_path / "in").mkdir()
    run(tmp_path / "c", tiny_tokenizer_dir, input=FORMATS[name](tmp_path / "in"), workers=2)
    assert content(tmp_path / "c") == wanted


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.text.zst"])
def test_text_with_separators(name: str, tmp_path: Path, tiny_tokenizer_dir: str, wanted: dict[str, bytes]) -> None:
    compress = {".gz": gzip.compress, ".zst": zstd_frames_of}.get(Path(name).suffix, bytes)
    source = separated(name, compress)(tmp_path)
    run(tmp_path / "c", tiny_tokenizer_dir, input=source, document_separator="\\n<end>\\n")
    assert content(tmp_path / "c") == wanted


def zstd_frames_of(data: bytes) -> bytes:
    return b"".join(zstandard.ZstdCompressor().compress(data[i : i + 100]) for i in range(0, len(data), 100))


@pytest.mark.parametrize("kind", [pa.string(), pa.dictionary(pa.int32(), pa.string())], ids=["string", "dictionary"])
def test_row_groups_too_large_for_one_worker(
    kind: pa.DataType, tmp_path: Path, tiny_tokenizer_dir: str, wanted: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "MAX_ROW_GROUP_BYTES", 400)
    source = parquet(kind, row_group_size=20)(tmp_path)
    sources, _ = find_sources([source])
    parts = [part for unit in units(sources, ReadOptions()) for part in unit.parts]
    assert {type(part) for part in parts} >= {reading.Rows}
    run(tmp_path / "c", tiny_tokenizer_dir, input=source, workers=2)
    assert content(tmp_path / "c") == wanted


def test_paths_folders_globs_and_urls(tmp_path: Path, tiny_tokenizer_dir: str, wanted: dict[str, bytes]) -> None:
    first, second = RECORDS[:20], RECORDS[20:]
    folder = tmp_path / "in"
    files = [write_lines(folder / "a.jsonl", first), write_lines(folder / "b.jsonl", second)]
    memory = fsspec.filesystem("memory")
    memory.pipe({"/reading/in/a.jsonl": json_lines(first), "/reading/in/b.jsonl": json_lines(second)})
    patterns: list[str | list[str]] = [
        files,
        str(folder),
        f"{folder}/*.jsonl",
        f"{tmp_path}/**/[ab].jsonl",
        [f"file://{file}" for file in files],
        f"file://{folder}",
        "memory://reading/in",
        "memory://reading/in/*.jsonl",
        ["memory://reading/in/a.jsonl", files[1]],
    ]
    for i, pattern in enumerate(patterns):
        run(tmp_path / f"c{i}", tiny_tokenizer_dir, input=pattern)
        assert content(tmp_path / f"c{i}") == wanted, pattern
    memory.rm("/reading", recursive=True)


class _RangeFile(AbstractBufferedFile):
    def _fetch_range(self, start: int, end: int) -> bytes:
        return Path("/", self.path).read_bytes()[start:end]


class RangeFileSystem(AbstractFileSystem):
    """Files are read as from an object store: through fsspec's own buffered file, which fetches ranges of bytes."""

    protocol = "ranges"

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        inside = Path("/", self._strip_protocol(path))
        if not inside.exists():
            raise FileNotFoundError(path)
        files = sorted(inside.iterdir()) if inside.is_dir() else [inside]
        found = [
            {
                "name": str(f).lstrip("/"),
                "size": f.stat().st_size,
                "type": "directory" if f.is_dir() else "file",
                "ETag": "v1",
            }
            for f in files
        ]
        return found if detail else [entry["name"] for entry in found]

    def _open(self, path: str, mode: str = "rb", block_size: int | None = None, **_: Any) -> _RangeFile:
        return _RangeFile(self, path, mode, block_size=100, cache_type="readahead")


@pytest.mark.parametrize(
    "name", ["json", "gz", "zst of several frames", "parquet, row groups", "arrow stream", "text files"]
)
def test_object_stores(name: str, tmp_path: Path, tiny_tokenizer_dir: str, wanted: dict[str, bytes]) -> None:
    fsspec.register_implementation("ranges", RangeFileSystem, clobber=True)
    (tmp_path / "in").mkdir()
    source = FORMATS[name](tmp_path / "in")
    run(tmp_path / "c", tiny_tokenizer_dir, input=f"ranges:/{source}", workers=2)
    assert content(tmp_path / "c") == wanted


# --- fields ---


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "a.arrow"])
def test_nested_text_and_metadata(
    name: str, tmp_path: Path, tiny_tokenizer_dir: str, wanted: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    records: list[Any] = [*RECORDS, {"text": "x", "id": None, "inner": {"body": "", "n": 5}}]
    data = pa.Table.from_pylist(records)
    if name == "a.jsonl":
        write_lines(tmp_path / name, records)
    elif name == "a.parquet":
        monkeypatch.setattr(reading, "MAX_ROW_GROUP_BYTES", 2500)
        pq.write_table(data, tmp_path / name, row_group_size=25)
    else:
        with pa.OSFile(str(tmp_path / name), "wb") as sink, pa.ipc.new_stream(sink, data.schema) as writer:
            writer.write_table(data)
    settings: dict[str, Any] = {"text_key": "inner.body", "metadata_keys": ["id", "inner.n"], "on_error": "skip"}
    run(tmp_path / "c", tiny_tokenizer_dir, input=str(tmp_path / name), **settings)
    made = content(tmp_path / "c")
    assert (made[".bin"], made[".idx"]) == (wanted[".bin"], wanted[".idx"])
    assert read_lines(tmp_path / "c.metadata.jsonl") == [{"id": i, "inner.n": i} for i in range(len(DOCUMENTS))]


def test_metadata_that_is_missing_or_odd(tmp_path: Path, tiny_tokenizer_dir: str) -> None:
    odd = [{"text": "a", "m": [1, {"x": "\n"}]}, {"text": "b"}, {"text": "c", "m": "行\n2"}]
    files = [write_lines(tmp_path / "a.jsonl", odd), str(tmp_path / "b.txt")]
    (tmp_path / "b.txt").write_text("d")
    run(tmp_path / "c", tiny_tokenizer_dir, input=files, metadata_keys="m")
    found = read_lines(tmp_path / "c.metadata.jsonl")
    assert found[:3] == [{"m": [1, {"x": "\n"}]}, {"m": None}, {"m": "行\n2"}]
    assert len(found) == 4  # a line for every document, whatever the kind of its file


def test_metadata_of_every_arrow_type(tmp_path: Path, tiny_tokenizer_dir: str) -> None:
    columns = {
        "text": ["a"],
        "when": pa.array([1], pa.timestamp("ns")),
        "day": pa.array([1], pa.date32()),
        "pairs": pa.array([[("k", 1)]], pa.map_(pa.string(), pa.int64())),
        "raw": [b"\xff"],
        "decimal": pa.array([1], pa.decimal128(20, 3)),
        "big": pa.array([2**64 - 1], pa.uint64()),
        "nan": [float("nan")],
    }
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    keys = [name for name in columns if name != "text"]
    run(tmp_path / "c", tiny_tokenizer_dir, input=str(tmp_path / "a.parquet"), metadata_keys=keys)
    (found,) = read_lines(tmp_path / "c.metadata.jsonl")
    assert set(found) == set(keys)
    assert (found["big"], found["day"], found["nan"]) == (2**64 - 1, "1970-01-02", None)


def test_no_such_column_or_no_text(tmp_path: Path, tiny_tokenizer_dir: str) -> None:
    source = parquet()(tmp_path)
    for key, message in [("body", "no column 'body'; found"), ("text.body", "no column 'text.body'"), ("id", "is int64")]:
        with pytest.raises(InputError, match=rf"a\.parquet: .*{message}"):
            run(tmp_path / "c", tiny_tokenizer_dir, input=source, text_key=key)
    with pytest.raises(InputError, match=r"a\.parquet: no column 'url'"):
        run(tmp_path / "c", tiny_tokenizer_dir, input=source, metadata_keys=["url"])


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_columns_of_one_name_are_refused(suffix: str, tmp_path: Path, tiny_tokenizer_dir: str) -> None:
    """Parquet and Arrow allow it; what is meant cannot be known."""
    path = tmp_path / f"a{suffix}"
    texts_ = pa.array(["a", "b"])
    twice = pa.StructArray.from_arrays([texts_, texts_], ["body", "body"])
    table = pa.Table.from_arrays([texts_, texts_, texts_, twice], ["text", "text", "id", "article"])
    if suffix == ".parquet":
        pq.write_table(table, path)
    else:
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    for key, name in (("text", "text"), ("article.body", "body")):
        with pytest.raises(InputError, match=rf"a\{suffix}: has 2 columns '{name}'; expected one"):
            run(tmp_path / "c", tiny_tokenizer_dir, input=str(path), text_key=key)
    with pytest.raises(InputError, match="has 2 columns 'text'; expected one"):
        run(tmp_path / "c", tiny_tokenizer_dir, input=str(path), text_key="id", metadata_keys="text")


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()])
def test_columns_of_lists_are_lines(suffix: str, kind: Any, tmp_path: Path, tiny_tokenizer_dir: str) -> None:
    path = tmp_path / f"a{suffix}"
    rows = [["one", None, "1"], [], None, ["two"]]
    for made in (pa.list_, pa.large_list):
        inner = pa.array(rows, made(kind))
        table = pa.table({"a": pa.StructArray.from_arrays([inner], ["b"])})
        if suffix == ".parquet":
            pq.write_table(table, path)
        else:
            with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
                writer.write_table(table)
        corpus = run(tmp_path / "c", tiny_tokenizer_dir, input=str(path), text_key="a.b", on_error="skip", overwrite=True)
        assert texts(corpus, tiny_tokenizer_dir) == ["one\n1", "two"]
        assert read_corpus_manifest(corpus.prefix).skipped == {"empty": 1, "null_text": 1}


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"])
def test_wide_encodings_are_named(encoding: str, tmp_path: Path, tiny_tokenizer_dir: str) -> None:
    """By the name that makes iconv read them: without a byte order mark it has to be told the order."""
    (tmp_path / "a.jsonl").write_bytes('{"text": "one"}\n'.encode(encoding))
    (tmp_path / "a.txt").write_bytes("one\n".encode(encoding))
    name = encoding.upper().replace("-LE", "LE").replace("-BE", "BE")
    for more in ({"input": "a.jsonl"}, {"input": "a.txt"}, {"input": "a.txt", "document_separator": ";"}):
        file = more.pop("input")
        with pytest.raises(InputError, match=rf"{file}: is {name}; expected UTF-8, as iconv -f {name} -t UTF-8 makes of it"):
            run(tmp_path / "c", tiny_tokenizer_dir, input=str(tmp_path / file), **more)


@pytest.mark.parametrize("name", ["a.csv", "a.TSV", "a.csv.gz"])
def test_a_table_is_no_text(name: str, tmp_path: Path, tiny_tokenizer_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Named itself or by a glob; the command of the message makes of it what is read. As `text` it is one document."""
    rows = b'id,text\n1,"one, with a comma"\n2,two\n'
    (tmp_path / name).write_bytes(gzip.compress(rows) if name.endswith("gz") else rows)
    for pattern in (name, "a.*"):
        with pytest.raises(
            InputError, match=rf"{name}: is a table of separated values; expected Parquet, as python -c"
        ) as e:
            run(tmp_path / "c", tiny_tokenizer_dir, input=str(tmp_path / pattern))
    (tmp_path / "a.csv").write_bytes(rows)
    monkeypatch.chdir(tmp_path)
    exec(re.search(r'python -c "(.*)"', str(e.value))[1])  # type: ignore[index]
    assert texts(run(tmp_path / "d", tiny_tokenizer_dir, input="a.parquet"), tiny_tokenizer_dir) == [
        "one, with a comma",
        "two",
    ]
    whole = run(tmp_path / "e", tiny_tokenizer_dir, input=str(tmp_path / name), file_format="text")
    assert texts(whole, tiny_tokenizer_dir) == [rows.decode()]


def test_tables_in_a_folder_are_passed_over(
    tmp_path: Path, tiny_tokenizer_dir: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_lines(tmp_path / "in" / "a.jsonl", [{"text": "one"}])
    (tmp_path / "in" / "b.csv").write_text("text\ntwo\n")
    assert texts(run(tmp_path / "c", tiny_tokenizer_dir, input=str(tmp_path / "in")), tiny_tokenizer_dir) == ["one"]
    assert "not read, of unknown kind: 1 file (" in capsys.readouterr().err


def test_odd_characters_and_long_lines(tmp_path: Path, tiny_tokenizer_dir: str) -> None:
    """Zeros, carriage returns, and a line of many units."""
    odd = ["a\0b", "line\r\nline\r", "\u2028", "x" * 5000, "\x85y"]
    lines = "".join(json.dumps({"text": text}) + "\r\n" for text in odd)
    (tmp_path / "a.jsonl").write_text(lines, newline="")
    corpus = run(tmp_path / "c", tiny_tokenizer_dir, input=str(tmp_path / "a.jsonl"), on_error="skip")
    assert texts(corpus, tiny_tokenizer_dir) == [text for text in odd if not text.isspace()]


def test_a_byte_order_mark_belongs_to_files_not_to_documents(tmp_path: Path, tiny_tokenizer_dir: str) -> None:
    """A document that begins with U+FEFF keeps it in every format; at the beginning of a text file it is no text."""
    documents = ["\ufeffone", "\ufeff\ufefftwo"]
    files = [write_lines(tmp_path / "a.jsonl", [{"text": text} for text in documents])]
    for name, kind in (("a.parquet", pa.string()), ("b.parquet", pa.binary())):
        pq.write_table(pa.table({"text": pa.array(documents).cast(kind)}), tmp_path / name)
        files.append(str(tmp_path / name))
    for i, file in enumerate(files):
        assert texts(run(tmp_path / f"c{i}", tiny_tokenizer_dir, input=file), tiny_tokenizer_dir) == documents, file
    (tmp_path / "a.txt").write_bytes(codecs.BOM_UTF8 + "one##\ufefftwo".encode())
    corpus = run(tmp_path / "t", tiny_tokenizer_dir, input=str(tmp_path / "a.txt"), document_separator="##")
    assert texts(corpus, tiny_tokenizer_dir) == ["one", "\ufefftwo"]


def test_bytes_that_are_not_the_format(tmp_path: Path, tiny_tokenizer_dir: str) -> None:
    for name in ("a.parquet", "a.arrow"):
        for data in (b"", b"no such thing", b"PAR1", b"ARROW1\0\0"):
            (tmp_path / name).write_bytes(data)
            with pytest.raises(InputError, match=rf"a\{Path(name).suffix}|empty corpus"):
                run(tmp_path / "c", tiny_tokenizer_dir, input=str(tmp_path / name), overwrite=True)


# --- reading in units is reading ---


class Line(NamedTuple):
    """A line of JSON and what is in it: a text, a reason why there is none, or nothing at all."""

    data: bytes
    text: str | None = None
    reason: str | None = None


def _good(text: str, ascii_only: bool) -> Line:
    data = json.dumps({"a": 1, "text": text}, ensure_ascii=ascii_only).encode()
    return Line(data, text) if text and not text.isspace() else Line(data, reason="empty")


any_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
lines = st.one_of(
    st.builds(_good, any_text, st.booleans()),
    st.builds(_good, st.integers(1, 200).map(lambda n: "长x" * n), st.booleans()),
    st.sampled_from(
        [
            *[Line(b""), Line(b"  "), Line(b"\t")],
            *[Line(data, reason="broken_json") for data in (b'{"text": ', b"{", codecs.BOM_UTF8 + b'{"text": ')],
            Line(codecs.BOM_UTF8 + b'{"text": "a"}', "a"),  # of a file with a mark that was put behind another
            Line(b'{"score": NaN, "text": "a"}', "a"),
            *[Line(b'{"text": "\xff\xfe"}', reason="invalid_utf8"), Line(b'{"text": null}', reason="null_text")],
            *[Line(b'{"text": "\\ud800"}', reason="lone_surrogate"), Line(b'{"text": 3}', reason="not_text")],
            *[Line(b'{"Text": "a"}', reason="missing_text"), Line(b"7 ", reason="no_object")],
        ]
    ),
)


class Found(NamedTuple):
    texts: list[str]
    problems: list[tuple[int, str]]
    """(line from 1, reason)"""


def read_all(sources: list[Source], options: ReadOptions, partition: tuple[int, int] = (0, 1)) -> Found:
    """What the workers read, unit after unit; lines are counted over the files as if they were one."""
    documents: list[str] = []
    problems: list[tuple[int, str]] = []
    before = 0
    for unit in units(sources, options, partition):
        for part in unit.parts:
            content = read_part(part, sources, options)
            documents += content.texts
            problems += [(before + problem.record + 1, problem.reason) for problem in content.problems]
            before += content.records
    return Found(documents, problems)


def line_by_line(file_lines: list[Line]) -> Found:
    """What must be found, from how the file was made."""
    documents: list[str] = []
    problems: list[tuple[int, str]] = []
    for number, line in enumerate(file_lines, start=1):
        text, reason = line.text, line.reason
        if text is not None:
            documents.append(text)
        elif reason is not None:
            problems.append((number, reason))
    return Found(documents, problems)


@pytest.fixture(scope="module")
def scratch() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp())
    yield folder
    shutil.rmtree(folder)


@pytest.mark.parametrize("where", ["a.jsonl", "memory://unit-tests/a.jsonl", "a.jsonl.gz", "a.jsonl.zst"])
@settings(max_examples=70, deadline=None)
@given(
    file_lines=st.lists(lines, max_size=12),
    end=st.sampled_from([b"\n", b"\r\n"]),
    last_end=st.booleans(),
    mark=st.booleans(),
    unit_bytes=st.one_of(st.integers(1, 40), st.integers(1, 2000)),
)
@example(file_lines=[Line(b'{"text":"a"}', "a")] * 20, end=b"\n", last_end=True, mark=False, unit_bytes=14)
def test_lines_in_units_of_any_size(
    where: str, scratch: Path, file_lines: list[Line], end: bytes, last_end: bool, mark: bool, unit_bytes: int
) -> None:
    data = end.join(line.data for line in file_lines) + (end if last_end and file_lines else b"")
    data = (codecs.BOM_UTF8 if mark else b"") + data
    if where.endswith(".gz"):
        data = gzip.compress(data, 1)
    elif where.endswith(".zst"):
        data = zstd_frames_of(data)
    path = where if "://" in where else str(scratch / where)
    with fsspec.open(path, "wb") as stream:
        stream.write(data)
    with pytest.MonkeyPatch.context() as patch:
        small_units(patch, unit_bytes)
        sources, _ = find_sources([path])
        assert read_all(sources, ReadOptions()) == line_by_line(file_lines)


@settings(max_examples=200, deadline=None)
@given(
    text=st.text("ab\n文\ufeff", max_size=60),
    separator=st.sampled_from(["a", "aa", "aba", "\n\n", "文", "b\n", "aaa", "文a文"]),
    unit_bytes=st.integers(1, 20),
)
def test_separators_cut_by_units_or_overlapping(scratch: Path, text: str, separator: str, unit_bytes: int) -> None:
    path = scratch / "a.txt"
    path.write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as patch:
        small_units(patch, unit_bytes)
        sources, _ = find_sources([str(path)])
        found = read_all(sources, ReadOptions(separator=separator))
    pieces = text.removeprefix("\ufeff").split(separator)
    assert found.texts == [piece for piece in pieces if piece.strip()]
    assert found.problems == []


def test_positions_of_problems_between_separators(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_bytes(b"one##\xff##  ####two##" + "长".encode() * 8 + b"##three\xff")
    for size in (1, 2, 3, 7, 1000):
        small_units(monkeypatch, size)
        sources, _ = find_sources([str(tmp_path / "a.txt")])
        found = read_all(sources, ReadOptions(separator="##", max_characters=7))
        assert found == Found(["one", "two"], [(2, "invalid_utf8"), (6, "too_long"), (7, "invalid_utf8")]), size


def test_a_separator_that_does_not_occur_takes_linear_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Looking again and again at what was read before would copy 16 GB here."""
    (tmp_path / "a.txt").write_bytes(b"x" * (8 << 20))
    small_units(monkeypatch, 4096)
    sources, _ = find_sources([str(tmp_path / "a.txt")])
    began = os.times()
    found = [part for unit in units(sources, ReadOptions(separator="\n\n")) for part in unit.parts]
    used = os.times()
    assert sum(len(text) for part in found for text in getattr(part, "texts", [])) == 8 << 20
    assert used.user + used.system - began.user - began.system < 1.5


@pytest.fixture
def mixed(tmp_path: Path) -> list[Source]:
    """Files of every format, some empty, 80 documents and some problems in all."""
    folder = tmp_path / "mixed"
    records = [[{"text": f"file {f} document {i} 文"} for i in range(12)] for f in range(6)]
    records[0][3] = {"text": ""}
    write_lines(folder / "a.jsonl", records[0])
    (folder / "b.jsonl").write_bytes(b"")
    (folder / "c.jsonl.gz").write_bytes(gzip.compress(json_lines(records[1])))
    pq.write_table(pa.Table.from_pylist(records[2]), folder / "d.parquet", row_group_size=2)
    pq.write_table(pa.Table.from_pylist(records[3]), folder / "e.parquet")
    write_lines(folder / "f.jsonl", [])
    (folder / "g.txt").write_text("\n\n".join(record["text"] for record in records[4]))
    data = pa.Table.from_pylist(records[5])
    with pa.OSFile(str(folder / "h.arrow"), "wb") as sink, pa.ipc.new_stream(sink, data.schema) as writer:
        writer.write_table(data)
    write_lines(folder / "i.jsonl", [{"text": f"last {i}"} for i in range(8)])
    return find_sources([str(folder)])[0]


@pytest.mark.parametrize("large_rows", [False, True])
@pytest.mark.parametrize("count", range(1, 8))
def test_partitions_one_after_the_other_are_the_whole(
    count: int, large_rows: bool, mixed: list[Source], monkeypatch: pytest.MonkeyPatch
) -> None:
    small_units(monkeypatch, 64)
    if large_rows:
        monkeypatch.setattr(reading, "MAX_ROW_GROUP_BYTES", 10)
    options = ReadOptions(separator="\n\n")
    whole = read_all(mixed, options)
    assert (len(whole.texts), [reason for _, reason in whole.problems]) == (79, ["empty"])
    parts = [read_all(mixed, options, (i, count)) for i in range(count)]
    assert [text for part in parts for text in part.texts] == whole.texts
    assert [reason for part in parts for _, reason in part.problems] == ["empty"]
    if count <= 3:
        assert all(part.texts for part in parts)  # the work is shared out


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.lists(st.integers(0, 60), max_size=8), min_size=1, max_size=4),
    count=st.integers(1, 7),
    unit_bytes=st.integers(1, 200),
)
def test_partitions_of_any_files(scratch: Path, sizes: list[list[int]], count: int, unit_bytes: int) -> None:
    paths = [write_lines(scratch / f"p{f}.jsonl", [{"text": "x" * n} for n in file]) for f, file in enumerate(sizes)]
    with pytest.MonkeyPatch.context() as patch:
        small_units(patch, unit_bytes)
        sources, _ = find_sources(paths)
        whole = read_all(sources, ReadOptions())
        parts = [read_all(sources, ReadOptions(), (i, count)) for i in range(count)]
    assert [text for part in parts for text in part.texts] == whole.texts
    assert len(whole.texts) == sum(n > 0 for file in sizes for n in file)


def test_read_bytes_add_up_to_the_files(mixed: list[Source], monkeypatch: pytest.MonkeyPatch) -> None:
    """What the progress bar counts: about all of the input, never more."""
    small_units(monkeypatch, 64)
    read = sum(unit.read_bytes for unit in units(mixed, ReadOptions(separator="\n\n")))
    total = sum(source.bytes for source in mixed)
    assert 0.8 * total <= read <= total
