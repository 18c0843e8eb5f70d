"""Files that are one JSON array are read like JSON Lines, and their damage is named."""

from __future__ import annotations

import gzip
import io
import json
import random
from pathlib import Path
from typing import Any

import pytest
from tiny_corpora import content, read_lines, run, small_units, texts, write_lines

from megatron_cpt.corpus import json_arrays
from megatron_cpt.corpus.json_arrays import array_elements, begins_array
from megatron_cpt.utils.errors import InputError

VALUES: list[Any] = [
    *[{"text": "文" * n, "a": [1.5, {"b": []}], "c": None} for n in (0, 1, 70)],
    *["plain", 'quote " and \\ and ]', "", -1.25e-3, 12345678901234567890123, True, None, [], {}, [[]], "😀"],
]


@pytest.mark.parametrize("block", [1, 2, 7, 64, 1 << 20])
@pytest.mark.parametrize("indent", [None, 2])
def test_elements_of_any_kind_cut_anywhere(block: int, indent: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_arrays, "BLOCK_BYTES", block)
    for ascii_only in (True, False):
        for values in (VALUES, VALUES[::-1], []):
            data = json.dumps(values, indent=indent, ensure_ascii=ascii_only).replace("\n", "\r\n").encode()
            found = list(array_elements(io.BytesIO(b"\xef\xbb\xbf \n" + data + b"\n "), "a.json"))
            assert [json.loads(element) for element in found] == values
            assert not any(b"\n" in element for element in found)


def test_a_number_that_is_cut_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    for block in range(1, 40):
        monkeypatch.setattr(json_arrays, "BLOCK_BYTES", block)
        numbers = b"123456789012345678.5e+10 , -0.25e-7,NaN, -Infinity,true"
        found = b"|".join(array_elements(io.BytesIO(b"[" + numbers + b"]"), "a.json"))
        assert found == b"123456789012345678.5e+10|-0.25e-7|NaN|-Infinity|true", block


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'[{"text": "a"}', "found the end of the file after element 1"),
        (b'[{"text": "a"}, {"te', "element 2 of the JSON array is no JSON"),
        (b'[{"text": "a"}, ]', "element 2 of the JSON array is no JSON"),
        (b"[", "element 1 of the JSON array is no JSON"),
        (b'[{"text": "a"} {"text": "b"}]', "found '{' after element 1"),
        (b'[{"text": "a"}] [', "found '[' after the end of the JSON array"),
        (b'[{"text": tru}' + b" " * 100 + b"]", "element 1 of the JSON array is no JSON"),
        (b"[" * 100_000, "nested too deeply"),
    ],
)
def test_damage_is_named(data: bytes, message: str, tmp_path: Path, tiny_tokenizer_dir: str) -> None:
    (tmp_path / "a.json").write_bytes(data)
    for on_error in ("fail", "skip"):
        with pytest.raises(InputError) as refusal:
            run(tmp_path / "c", tiny_tokenizer_dir, input=str(tmp_path / "a.json"), on_error=on_error)
        assert str(refusal.value).startswith(f"{tmp_path}/a.json: ")
        assert message in str(refusal.value)
        assert "\n" not in str(refusal.value)
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("name", ["a.json", "a.json.gz"])
@pytest.mark.parametrize("workers", [1, 2])
def test_arrays_give_the_corpus_of_lines(
    name: str, workers: int, tmp_path: Path, tiny_tokenizer_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_units(monkeypatch, 200)
    rows = random.Random(3)
    records = [{"id": i, "article": {"body": "".join(rows.choices('abc 文\n"', k=i))}} for i in range(1, 60)]
    records[7] = {"id": 7}
    compress = gzip.compress if name.endswith(".gz") else bytes
    (tmp_path / name).write_bytes(compress(json.dumps(records, indent=1, ensure_ascii=False).encode()))
    settings: dict[str, Any] = {"text_key": "article.body", "metadata_keys": "id", "on_error": "skip", "workers": workers}
    run(tmp_path / "lines", tiny_tokenizer_dir, input=write_lines(tmp_path / "b.jsonl", records), **settings)
    run(tmp_path / "array", tiny_tokenizer_dir, input=str(tmp_path / name), **settings)
    one, other = content(tmp_path / "lines"), content(tmp_path / "array")
    assert {name: one[name] for name in (".bin", ".idx", ".metadata.jsonl")} == {
        name: other[name] for name in (".bin", ".idx", ".metadata.jsonl")
    }
    listed = read_lines(tmp_path / "array.errors.jsonl")
    assert [(line["line"], line["reason"]) for line in listed] == [(8, "missing_text")]


def test_lists_of_texts_and_texts_that_are_lists(tmp_path: Path, tiny_tokenizer_dir: str) -> None:
    (tmp_path / "a.json").write_text('["one", "two",\n {"a": {"b": ["three", null, "3"]}}, "four"]')
    corpus = run(tmp_path / "c", tiny_tokenizer_dir, input=str(tmp_path / "a.json"), text_key="a.b")
    assert texts(corpus, tiny_tokenizer_dir) == ["one", "two", "three\n3", "four"]


def test_what_is_an_array() -> None:
    assert all(map(begins_array, (b"[1, 2]", b" \n[", b'\xef\xbb\xbf[\n{"a": 1}\n]', b'[{"a": 1},\n{"a": 1}]', b"[]\n")))
    assert not any(map(begins_array, (b"", b"{}", b'["a"]\n["b"]\n', b'[1]\n{"text": "a"}')))
