"""The JSON beside a corpus: round trip and every way it can be wrong."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from megatron_cpt.corpus.manifest import manifest_path, read_corpus_manifest, write_manifest
from megatron_cpt.corpus.sources import sha256_file
from megatron_cpt.utils.errors import InputError
from tests.tiny_manifests import MANIFEST


def test_round_trip(tmp_path: Path) -> None:
    path = manifest_path(str(tmp_path / "c"))
    write_manifest(path, MANIFEST)
    assert list(tmp_path.iterdir()) == [path]
    assert read_corpus_manifest(str(tmp_path / "c")) == MANIFEST
    assert next(iter(json.loads(path.read_text()))) == "format_version"


def test_sha256_file(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"abc" * 100_000)
    assert sha256_file(tmp_path / "f") == hashlib.sha256(b"abc" * 100_000).hexdigest()


def test_missing_and_not_json(tmp_path: Path) -> None:
    prefix = str(tmp_path / "c")
    with pytest.raises(InputError, match="no such file"):
        read_corpus_manifest(prefix)
    for content, message in (("{", "not valid JSON"), ("[]", "format_version is None")):
        Path(prefix + ".json").write_text(content)
        with pytest.raises(InputError, match=message):
            read_corpus_manifest(prefix)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["format_version"], 1, "format_version is 1; expected 2"),
        (["tokens"], None, "tokens is missing"),
        (["tokens"], "10", "tokens is '10'; expected int"),
        (["documents"], True, "documents is True; expected int"),
        (["tokenizer"], [], "tokenizer is list; expected an object"),
        (["tokenizer", "eos_id"], None, "tokenizer.eos_id is missing"),
        (["sources", 0, "bytes"], 1.5, r"sources\[0\].bytes is 1.5"),
        (["files", "idx"], None, "files.idx is missing"),
        (["files", "bin", "sha256"], 3, "files.bin.sha256 is 3; expected str"),
        (["sources", 0, "sha256"], 3, r"sources\[0\].sha256 is 3; expected str | None"),
        (["shuffle_documents"], -1, r"shuffle_documents is -1; expected a whole number from 0 to 2\^64 - 1"),
        (["shuffle_documents"], 2**64, "shuffle_documents is "),
        (["partition"], "5/5", "partition is '5/5'; expected I/N with I from 0 to N - 1"),
        (["languages", "zh"], "all", "languages.zh is 'all'; expected float"),
    ],
)
def test_wrong_fields_are_named(tmp_path: Path, path: list[Any], value: Any, message: str) -> None:
    file = manifest_path(str(tmp_path / "c"))
    write_manifest(file, MANIFEST)
    content = json.loads(file.read_text())
    *parents, last = path
    holder = content
    for key in parents:
        holder = holder[key]
    if value is None:
        del holder[last]
    else:
        holder[last] = value
    file.write_text(json.dumps(content))
    with pytest.raises(InputError, match=message):
        read_corpus_manifest(str(tmp_path / "c"))
