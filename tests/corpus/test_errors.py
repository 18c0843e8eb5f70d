"""Documents that cannot be taken are counted, listed and skipped, or refused by name; odd ones that can are kept exactly."""

from __future__ import annotations

import gzip
import json
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny_corpora import ROOT, content, read_lines, run, small_units, texts, write_lines

from megatron_cpt.corpus.indexed_dataset import HEADER, IndexedCorpus, IndexedWriter
from megatron_cpt.corpus.manifest import read_corpus_manifest
from megatron_cpt.utils.errors import InputError

LONGEST = 30


class Bad(NamedTuple):
    """A line that gives no document: what it is counted as, and what is said about it."""

    line: bytes
    reason: str
    said: str


BAD = [
    Bad(b'{"text": "cut', "broken_json", "not valid JSON"),
    Bad(b"no json", "broken_json", "not valid JSON"),
    Bad(b'{"text": "a"} {"text": "b"}', "broken_json", "not valid JSON"),
    Bad(b"\0\0\0\0", "broken_json", "not valid JSON"),
    Bad(b"[" * 5000, "broken_json", "expected one JSON object per line"),
    Bad(b'{"text": "\xff"}', "invalid_utf8", "byte 10 is not UTF-8"),
    Bad(b'{"text": "\xed\xa0\x80"}', "invalid_utf8", "byte 10 is not UTF-8"),
    Bad(b'{"text": "ok", "url": "\xc3("}', "invalid_utf8", "is not UTF-8"),
    Bad(b'{"text": "\\ud800"}', "lone_surrogate", "surrogate"),
    Bad(b'{"text": "x\\udc00y"}', "lone_surrogate", "surrogate"),
    Bad(b'{"text": "\\ud83e\\ud83e"}', "lone_surrogate", "surrogate"),
    Bad(b'{"text": null}', "null_text", "field 'text' is null"),
    Bad(b"{}", "missing_text", "no field 'text'; found []"),
    Bad(b'{"Text": "a", "b": 1}', "missing_text", "no field 'text'; found ['Text', 'b']"),
    Bad(b'{"text": 5}', "not_text", "field 'text' is int; expected a string"),
    Bad(b'{"text": ["a", 1]}', "not_text", "field 'text' is list"),
    Bad(b'{"text": {"text": "a"}}', "not_text", "field 'text' is dict"),
    Bad(b'["a"]', "no_object", "found list"),
    Bad(b'"text"', "no_object", "found str"),
    Bad(b"null", "no_object", "found NoneType"),
    Bad(b"NaN", "no_object", "found NoneType"),
    Bad(b'{"text": ""}', "empty", "no text"),
    Bad(b'{"text": " \\n\\t\\u3000"}', "empty", "no text but white space"),
    Bad(b'{"text": "%s"}' % (b"x" * (LONGEST + 1)), "too_long", "31 characters; expected at most 30"),
]


@pytest.fixture(autouse=True)
def _many_units(monkeypatch: pytest.MonkeyPatch) -> None:
    small_units(monkeypatch, 100)


def mixed_lines() -> tuple[bytes, list[tuple[int, Bad]]]:
    """Every bad line between good and blank ones; (content, (line from 1, bad) of each)."""
    lines: list[bytes] = []
    where = []
    for number, bad in enumerate(BAD):
        lines += [b'{"text": "good %d"}' % number] * (number % 3) + [b""] * (number % 2)
        lines.append(bad.line)
        where.append((len(lines), bad))
    lines.append(b'{"text": "%s"}' % ("长" * LONGEST).encode())
    return b"\n".join(lines) + b"\n", where


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.xz"])
def test_bad_lines_are_counted_and_listed(name: str, workers: int, tmp_path: Path, tiny_tokenizer_dir: str) -> None:
    import lzma

    data, where = mixed_lines()
    compress: Callable[[bytes], bytes] = {".gz": gzip.compress, ".xz": lzma.compress}.get(Path(name).suffix, bytes)
    (tmp_path / name).write_bytes(compress(data))
    settings: dict[str, Any] = {"max_document_characters": LONGEST, "on_error": "skip", "workers": workers}
    corpus = run(tmp_path / "c", tiny_tokenizer_dir, input=str(tmp_path / name), **settings)
    found = read_lines(tmp_path / "c.errors.jsonl")
    assert [(line["line"], line["reason"]) for line in found] == [(number, bad.reason) for number, bad in where]
    for line, (_, bad) in zip(found, where, strict=True):
        assert line["file"] == str(tmp_path / name)
        assert bad.said in line["detail"]
    assert read_corpus_manifest(corpus.prefix).skipped == Counter(bad.reason for bad in BAD)
    good = [f"good {number}" for number in range(len(BAD)) for _ in range(number % 3)]
    assert texts(corpus, tiny_tokenizer_dir) == [*good, "长" * LONGEST]


@pytest.mark.parametrize("bad", BAD, ids=range(len(BAD)))
def test_a_bad_line_is_refused_by_name(bad: Bad, tmp_path: Path, tiny_tokenizer_dir: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "good"}\n\n' * 10 + bad.line + b"\n")
    with pytest.raises(InputError) as refusal:
        run(tmp_path / "c", tiny_tokenizer_dir, input=str(path), max_document_characters=LONGEST)
    assert str(refusal.value).startswith(f"{path}:21: ")
    assert bad.said in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert len(str(refusal.value)) < 500
    assert not list(tmp_path.glob("c.[bijme]*"))


@pytest.mark.parametrize("kind", ["string", "binary", "dictionary"])
@pytest.mark.parametrize("with_metadata", [False, True])
@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_bad_rows(suffix: str, with_metadata: bool, kind: str, tmp_path: Path, tiny_tokenizer_dir: str) -> None:
    """One row that is not text must not spoil the others."""
    values = [
        b"one",
        None,
        b"",
        b" \n",
        b"two",
        b"\xff\xfe",
        "长".encode() * 31,
        "长".encode() * 30,
        b"\xed\xa0\x80",
        b"end",
    ]
    raw = pa.array(values, pa.binary())
    column = {
        "string": raw.view(pa.string()),
        "binary": raw,
        "dictionary": raw.dictionary_encode(),
    }[kind]
    table = pa.table({"text": column, "id": range(10)})
    path = tmp_path / f"a{suffix}"
    if suffix == ".parquet":
        pq.write_table(table, path, row_group_size=3)
    else:
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            for batch in table.to_batches(max_chunksize=3):
                writer.write_batch(batch)
    settings: dict[str, Any] = {"input": str(path), "max_document_characters": LONGEST}
    settings |= {"metadata_keys": ["id"]} if with_metadata else {}
    corpus = run(tmp_path / "c", tiny_tokenizer_dir, on_error="skip", **settings)
    assert texts(corpus, tiny_tokenizer_dir) == ["one", "two", "长" * 30, "end"]
    found = [(line["line"], line["reason"]) for line in read_lines(tmp_path / "c.errors.jsonl")]
    assert found == [
        *[(2, "null_text"), (3, "empty"), (4, "empty"), (6, "invalid_utf8")],
        *[(7, "too_long"), (9, "invalid_utf8")],
    ]
    if with_metadata:
        assert read_lines(tmp_path / "c.metadata.jsonl") == [{"id": i} for i in (0, 4, 7, 9)]
    with pytest.raises(InputError, match=rf"a\{suffix}:2: column 'text' is null; expected a string"):
        run(tmp_path / "d", tiny_tokenizer_dir, **settings)


def test_bad_text_files(tmp_path: Path, tiny_tokenizer_dir: str) -> None:
    """A file that is a document has no lines to name."""
    (tmp_path / "in").mkdir()
    for name, data in {"a": b"one", "b": b"", "c": b"\n\n", "d": b"o\xffk", "e": b"x" * 31, "f": b"two"}.items():
        (tmp_path / "in" / f"{name}.txt").write_bytes(data)
        (tmp_path / "in" / f"{name}.z.txt.gz").write_bytes(gzip.compress(data))
    settings: dict[str, Any] = {"input": str(tmp_path / "in"), "max_document_characters": LONGEST}
    corpus = run(tmp_path / "c", tiny_tokenizer_dir, on_error="skip", **settings)
    assert texts(corpus, tiny_tokenizer_dir) == ["one", "one", "two", "two"]
    found = [(Path(line["file"]).name, line["reason"]) for line in read_lines(tmp_path / "c.errors.jsonl")]
    reasons = {"b": "empty", "c": "empty", "d": "invalid_utf8", "e": "too_long"}
    assert found == [(name + end, reason) for name, reason in reasons.items() for end in (".txt", ".z.txt.gz")]
    with pytest.raises(InputError, match=r"b\.txt: no text"):
        run(tmp_path / "d", tiny_tokenizer_dir, **settings)


def test_lines_are_counted_over_partitions_and_files(tmp_path: Path, tiny_tokenizer_dir: str) -> None:
    """The same lines are listed whether a file is read in one piece, in partitions, or compressed."""
    data, where = mixed_lines()
    data, lines = data * 3, [(n + i * (data.count(b"\n")), bad.reason) for i in range(3) for n, bad in where]
    (tmp_path / "a.jsonl").write_bytes(data)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(data))
    rows = pa.table({"text": ["a", None, "b", "", "c", "d"] * 20})
    pq.write_table(rows, tmp_path / "c.parquet", row_group_size=7)
    files = [str(tmp_path / name) for name in ("a.jsonl", "b.jsonl.gz", "c.parquet")]
    numbered = [(i * 6 + n, reason) for i in range(20) for n, reason in ((2, "null_text"), (4, "empty"))]
    wanted = [(file, *line) for file, found in zip(files, (lines, lines, numbered), strict=True) for line in found]
    settings: dict[str, Any] = {"input": files, "on_error": "skip", "max_document_characters": LONGEST}
    for count in (1, 2, 3, 7):
        found = []
        for i in range(count):
            run(tmp_path / "c", tiny_tokenizer_dir, partition=f"{i}/{count}", overwrite=True, **settings)
            path = tmp_path / f"c-{i:05d}-of-{count:05d}.errors.jsonl"
            found += read_lines(path) if path.exists() else []
        assert [(line["file"], line["line"], line["reason"]) for line in found] == wanted, count
    run(tmp_path / "whole", tiny_tokenizer_dir, **settings)
    assert len(read_lines(tmp_path / "whole.errors.jsonl")) == len(wanted)


def test_refused_in_a_later_partition(tmp_path: Path, tiny_tokenizer_dir: str) -> None:
    path = write_lines(tmp_path / "a.jsonl", [*[{"text": f"document {i}"} for i in range(40)], {"text": None}])
    with pytest.raises(InputError, match=r"a\.jsonl:41: field 'text' is null"):
        run(tmp_path / "c", tiny_tokenizer_dir, input=path, partition="2/3")


def test_no_errors_no_file(tmp_path: Path, tiny_tokenizer_dir: str) -> None:
    for records in ([{"text": "a"}, {"text": ""}], [{"text": "a"}]):
        source = write_lines(tmp_path / "a.jsonl", records)
        run(tmp_path / "c", tiny_tokenizer_dir, input=source, on_error="skip", overwrite=True)
        assert (tmp_path / "c.errors.jsonl").exists() == (len(records) > 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "c.bin", "c.idx", "c.json"]


def test_nothing_but_errors_is_no_corpus(tmp_path: Path, tiny_tokenizer_dir: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(mixed_lines()[1][0][1].line + b"\n" + b'{"text": ""}\n' * 3)
    with pytest.raises(InputError, match="empty corpus: found 1 broken_json, 3 empty; expected documents with text"):
        run(tmp_path / "c", tiny_tokenizer_dir, input=str(tmp_path / "a.jsonl"), on_error="skip")
    assert not list(tmp_path.glob("c.[bijme]*"))


def test_the_tool_refuses_and_skips(tmp_path: Path, tiny_tokenizer_dir: str) -> None:
    """Exit status 2 and one line, or 0 and the counts in the last line."""
    data, _ = mixed_lines()
    (tmp_path / "a.jsonl").write_bytes(data)
    words = [sys.executable, str(ROOT / "tools" / "preprocess_data.py"), f"--input={tmp_path}/a.jsonl", "--language=en"]
    words += [f"--tokenizer={tiny_tokenizer_dir}", f"--output-prefix={tmp_path}/c", "--max-document-characters=30"]
    done = subprocess.run([*words, "--on-error=fail"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    _, line = done.stderr.splitlines()  # the first says what ends documents
    assert line.startswith(f"error: {tmp_path}/a.jsonl:1: not valid JSON")
    done = subprocess.run([*words, "--on-error", "skip"], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert done.stdout.splitlines()[-1] == f"{tmp_path}/c.json"
    assert "3 lone_surrogate" in done.stderr.splitlines()[-1]


def test_a_very_long_document(tmp_path: Path, tiny_tokenizer_dir: str) -> None:
    """Millions of characters on one line, between others, many units long."""
    long = "a long document 文 " * 20_000
    source = write_lines(tmp_path / "a.jsonl", [{"text": "before"}, {"text": long}, {"text": "after"}])
    with pytest.MonkeyPatch.context() as patch:
        small_units(patch, 50_000)
        corpus = run(tmp_path / "c", tiny_tokenizer_dir, input=source, workers=2)
        assert texts(corpus, tiny_tokenizer_dir) == ["before", long, "after"]
        (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(Path(source).read_bytes()))
        corpus = run(tmp_path / "d", tiny_tokenizer_dir, input=str(tmp_path / "b.jsonl.gz"), workers=2)
        assert content(tmp_path / "d") == content(tmp_path / "c")
        limit: dict[str, Any] = {"max_document_characters": len(long) - 1, "on_error": "skip"}
        corpus = run(tmp_path / "e", tiny_tokenizer_dir, input=source, **limit)
        assert texts(corpus, tiny_tokenizer_dir) == ["before", "after"]


# --- odd, but text ---


@pytest.fixture(scope="module")
def scratch() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp())
    yield folder
    shutil.rmtree(folder)


odd_text = st.text(
    st.one_of(
        st.characters(exclude_categories=["Cs"]),
        st.characters(categories=["Cc", "Cf", "Zs", "Zl", "Zp", "Mn", "Co", "Cn"]),
        st.characters(min_codepoint=0x10000),
        st.sampled_from('\x00\x1a\x7f\x85\u200b\u200d\u2028\u2029\ufeff\ufffd\ufffe\uffff\U0010ffff<|>\\"/'),
    ),
    max_size=40,
)


@settings(max_examples=12, deadline=None)
@given(documents=st.lists(odd_text, min_size=1, max_size=20), ascii_only=st.booleans(), fast=st.booleans())
@example(documents=["<|endoftext|>", "a<|endoftext|>b", "\ufeff", "\u2028", "\x00"], ascii_only=False, fast=True)
def test_odd_documents_decode_to_themselves(
    scratch: Path, tiny_tokenizer_dir: str, documents: list[str], ascii_only: bool, fast: bool
) -> None:
    kept = [text for text in documents if text and not text.isspace()]
    if not kept:
        return
    lines = "".join(json.dumps({"text": text}, ensure_ascii=ascii_only) + "\n" for text in documents)
    (scratch / "a.jsonl").write_bytes(lines.encode())
    pq.write_table(pa.table({"text": documents}), scratch / "a.parquet")
    mode: dict[str, Any] = {"overwrite": True, "on_error": "skip", "fast_tokenizer": "always" if fast else "never"}
    with pytest.MonkeyPatch.context() as patch:
        small_units(patch, 100)
        for name in ("a.jsonl", "a.parquet"):
            corpus = run(scratch / "c", tiny_tokenizer_dir, input=str(scratch / name), **mode)
            assert texts(corpus, tiny_tokenizer_dir) == kept
    manifest = read_corpus_manifest(corpus.prefix)
    assert manifest.documents + sum(manifest.skipped.values()) == len(documents)
    assert manifest.text_bytes == sum(len(text.encode()) for text in kept)
    assert manifest.characters == sum(map(len, kept))
    assert [ids[-1] for ids in (corpus[i] for i in range(len(corpus)))] == [0] * len(kept)
    assert int((corpus.tokens == 0).sum()) == len(kept)  # no text ever makes the token that ends documents


# --- an index that was tampered with ---

DOCUMENTS = [[1, 2, 3], [4], [], [65000, 6], [7] * 20]


def read_everything(prefix: str) -> None:
    """Open a corpus and read all of it; only an InputError may come out."""
    try:
        corpus = IndexedCorpus(prefix)
        assert corpus.tokens.size == corpus.num_tokens
        for i in range(len(corpus)):
            assert corpus[i].size == corpus.sequence_lengths[i]
            int(corpus[i].astype(np.float64).sum())
        corpus.sample(0, min(corpus.num_tokens, 100))
    except InputError:
        return


@pytest.fixture(scope="module")
def pristine(scratch: Path) -> tuple[str, bytes]:
    prefix = str(scratch / "fuzzed")
    with IndexedWriter(prefix, "uint16") as writer:
        for document in DOCUMENTS:
            writer.add_document(np.array(document, np.int64))
    return prefix, Path(prefix + ".idx").read_bytes()


positions = st.integers(0, 34 + 5 * 12 + 6 * 8 - 1)
extremes = st.sampled_from([0, 1, 2**31 - 1, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1])


@settings(max_examples=400, deadline=None)
@given(
    flips=st.lists(st.tuples(positions, st.integers(1, 255)), max_size=6),
    words=st.lists(
        st.tuples(positions, st.sampled_from([0, 1, 2**31 - 1, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1])), max_size=2
    ),
    cut=st.one_of(st.just(0), st.integers(-142, -1)),
    more=st.binary(max_size=40),
)
@example(flips=[], words=[(18, 2**63)], cut=0, more=b"")
@example(flips=[], words=[(26, 2**64 - 1)], cut=0, more=b"")
@example(flips=[], words=[(18, 0), (26, 1)], cut=0, more=b"")
@example(flips=[], words=[(18, 0), (26, 0)], cut=0, more=b"")
@example(flips=[(17, 1)], words=[], cut=0, more=b"")
def test_a_damaged_index_is_an_input_error(
    pristine: tuple[str, bytes], flips: list[tuple[int, int]], words: list[tuple[int, int]], cut: int, more: bytes
) -> None:
    prefix, data = pristine
    damaged = bytearray(data)
    for position, flip in flips:
        damaged[position] ^= flip
    for position, word in words:
        damaged[position : position + 8] = word.to_bytes(8, "little")
    Path(prefix + ".idx").write_bytes(bytes(damaged[:cut] if cut else damaged) + more)
    read_everything(prefix)


@settings(max_examples=150, deadline=None)
@given(
    code=st.integers(0, 10),
    lengths=st.lists(st.one_of(st.integers(-5, 30), st.integers(-(2**31), 2**31 - 1)), max_size=6),
    pointers=st.lists(st.one_of(st.integers(-5, 60), st.integers(-(2**63), 2**63 - 1)), min_size=6, max_size=6),
    indices=st.lists(st.integers(-2, 8), min_size=1, max_size=8),
    size=st.integers(0, 300),
)
def test_an_index_of_any_numbers(
    scratch: Path, code: int, lengths: list[int], pointers: list[int], indices: list[int], size: int
) -> None:
    """Well-formed files whose numbers make no sense."""
    prefix = str(scratch / "numbers")
    header = HEADER.pack(b"MMIDIDX\x00\x00", 1, code, len(lengths), len(indices))
    arrays = np.array(lengths, np.int32), np.array(pointers[: len(lengths)], np.int64), np.array(indices, np.int64)
    Path(prefix + ".idx").write_bytes(header + b"".join(array.tobytes() for array in arrays))
    Path(prefix + ".bin").write_bytes(bytes(size if not lengths else max(0, min(sum(lengths) * 2, 1000))))
    read_everything(prefix)


def test_the_whole_index_is_read_as_it_was_written(pristine: tuple[str, bytes]) -> None:
    """The check above would also pass a reader that refuses everything."""
    prefix, data = pristine
    for more in (b"", b"\0" * 5):  # multimodal corpora append a mode for each sequence
        Path(prefix + ".idx").write_bytes(data + more)
        corpus = IndexedCorpus(prefix)
        assert [corpus[i].tolist() for i in range(len(corpus))] == DOCUMENTS
