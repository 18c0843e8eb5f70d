"""Corpora that are joined are the corpus of all their input, and nothing is joined that does not go together."""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_corpora import ROOT, content, json_lines, read_lines, run, small_units, texts, write_lines

from megatron_cpt.corpus import merge
from megatron_cpt.corpus.indexed_dataset import HEADER, IndexedCorpus, write_index
from megatron_cpt.corpus.manifest import CorpusManifest, read_corpus_manifest
from megatron_cpt.corpus.merge import MergeConfig, find_prefixes, merge_datasets
from megatron_cpt.corpus.sources import sha256_file
from megatron_cpt.utils.errors import InputError, InputErrors


@pytest.fixture(autouse=True)
def _many_units(monkeypatch: pytest.MonkeyPatch) -> None:
    small_units(monkeypatch, 250)
    monkeypatch.setattr(merge, "COPY_BYTES", 100)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Four files of 20 documents each, and five records that give none."""
    inside = tmp_path_factory.mktemp("merge") / "in"
    records = [[{"text": f"{f} {i} 文 " + "x" * (i * 13 % 60), "id": f * 100 + i} for i in range(20)] for f in range(4)]
    write_lines(inside / "a.jsonl", [*records[0][:9], {"text": ""}, *records[0][9:], {"id": 5}])
    write_lines(inside / "b.jsonl", [*records[1], {"text": None}])
    (inside / "c.jsonl.gz").write_bytes(gzip.compress(json_lines([{"text": " "}, *records[2]])))
    rows = [*records[3][:15], {"text": None, "id": 0}, *records[3][15:]]
    pq.write_table(pa.Table.from_pylist(rows), inside / "d.parquet", row_group_size=4)
    return str(inside)


def settings_for(folder: str, **more: Any) -> dict[str, Any]:
    return {"input": folder, "metadata_keys": "id", "on_error": "skip", **more}


def partitions(prefix: Path, tokenizer: str, folder: str, count: int, **more: Any) -> list[str]:
    """Make all partitions of a corpus, the last one first; their prefixes in order."""
    for i in reversed(range(count)):
        run(prefix, tokenizer, **settings_for(folder, partition=f"{i}/{count}", **more))
    return [f"{prefix}-{i:05d}-of-{count:05d}" for i in range(count)]


def join(prefixes: str | list[str], output: Path | str, **more: Any) -> CorpusManifest:
    path = merge_datasets(MergeConfig(prefixes, str(output), **more))
    assert path == f"{output}.json"
    return read_corpus_manifest(str(output))


def comparable(manifest: CorpusManifest) -> CorpusManifest:
    """Without what is measured or sampled."""
    return replace(manifest, duration_seconds=0, command="", languages={}, encoder="")


def test_workers_make_no_difference(tmp_path: Path, folder: str, tiny_tokenizer_dir: str) -> None:
    found = [
        comparable(
            read_corpus_manifest(run(tmp_path / f"w{n}", tiny_tokenizer_dir, **settings_for(folder, workers=n)).prefix)
        )
        for n in (1, 2, 4)
    ]
    assert content(tmp_path / "w1") == content(tmp_path / "w2") == content(tmp_path / "w4")
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("count", range(1, 6))
def test_partitions_joined_are_the_single_run(count: int, tmp_path: Path, folder: str, tiny_tokenizer_dir: str) -> None:
    """Files byte for byte (problems with their lines too), and a manifest in which everything adds up."""
    single = read_corpus_manifest(run(tmp_path / "single", tiny_tokenizer_dir, **settings_for(folder)).prefix)
    parts = partitions(tmp_path / "c", tiny_tokenizer_dir, folder, count, workers=1 + count % 2)
    joined = join(str(tmp_path / "c"), tmp_path / "joined")
    assert content(tmp_path / "joined") == content(tmp_path / "single")
    assert comparable(joined) == comparable(single)
    assert (joined.documents, joined.skipped) == (80, {"empty": 2, "missing_text": 1, "null_text": 2})
    assert [source.documents for source in joined.sources] == [20, 20, 20, 20]
    assert [source.sha256 for source in joined.sources] == [sha256_file(source.path) for source in joined.sources]
    assert joined.partition is None
    made = [read_corpus_manifest(part) for part in parts]
    assert [manifest.partition for manifest in made] == [f"{i}/{count}" for i in range(count)]
    for name in ("documents", "tokens", "text_bytes", "characters"):
        assert sum(getattr(manifest, name) for manifest in made) == getattr(joined, name)
    assert sum(joined.languages.values()) == pytest.approx(1, abs=0.001)
    assert len(read_lines(tmp_path / "joined.errors.jsonl")) == 5


@pytest.mark.parametrize("count", [1, 3])
def test_shuffling_may_wait_for_the_merge(count: int, tmp_path: Path, folder: str, tiny_tokenizer_dir: str) -> None:
    single = read_corpus_manifest(
        run(tmp_path / "s", tiny_tokenizer_dir, **settings_for(folder, shuffle_documents=11)).prefix
    )
    partitions(tmp_path / "c", tiny_tokenizer_dir, folder, count)
    joined = join(str(tmp_path / "c"), tmp_path / "joined", shuffle_documents=11)
    assert content(tmp_path / "joined") == content(tmp_path / "s")
    assert comparable(joined) == comparable(single)
    assert joined.shuffle_documents == 11
    other = join(str(tmp_path / "c"), tmp_path / "other", shuffle_documents=12)
    assert other.files["bin"].bytes == joined.files["bin"].bytes
    assert content(tmp_path / "other")[".bin"] != content(tmp_path / "s")[".bin"]


def test_partitions_without_documents(tmp_path: Path, tiny_tokenizer_dir: str) -> None:
    """A job array that is larger than its input, and an input that is skipped as a whole."""
    source = write_lines(tmp_path / "a.jsonl", [{"text": "one", "id": 1}, {"text": "", "id": 2}])
    parts = partitions(tmp_path / "c", tiny_tokenizer_dir, source, 4)
    assert sorted(read_corpus_manifest(part).documents for part in parts) == [0, 0, 0, 1]
    joined = join(str(tmp_path / "c"), tmp_path / "joined")
    run(tmp_path / "single", tiny_tokenizer_dir, **settings_for(source))
    assert content(tmp_path / "joined") == content(tmp_path / "single")
    assert (joined.documents, joined.skipped) == (1, {"empty": 1})
    for seed in (None, 3):
        empty = [part for part in parts if not read_corpus_manifest(part).documents]
        for part in empty:
            edit(part, lambda manifest: manifest | {"partition": None})
        assert join(empty, tmp_path / f"empty{seed}", shuffle_documents=seed).tokens == 0
        assert IndexedCorpus(str(tmp_path / f"empty{seed}")).num_documents == 0


def test_any_corpora_in_the_order_given(tmp_path: Path, tiny_tokenizer_dir: str) -> None:
    for name, count in (("b", 3), ("a", 2), ("c", 1)):
        source = write_lines(tmp_path / f"{name}.jsonl", [{"text": f"{name}{i}"} for i in range(count)])
        run(tmp_path / "made" / name, tiny_tokenizer_dir, input=source)
    made = tmp_path / "made"
    joined = join([f"{made}/b", f"{made}/[ac]"], tmp_path / "bac")
    assert texts(IndexedCorpus(str(tmp_path / "bac")), tiny_tokenizer_dir) == ["b0", "b1", "b2", "a0", "a1", "c0"]
    assert [Path(source.path).name for source in joined.sources] == ["b.jsonl", "a.jsonl", "c.jsonl"]
    join([f"{made}/a.bin", f"{made}/c.idx", f"{made}/b.json", f"{made}/*"], tmp_path / "acb")
    assert texts(IndexedCorpus(str(tmp_path / "acb")), tiny_tokenizer_dir) == ["a0", "a1", "c0", "b0", "b1", "b2"]
    again = join([str(tmp_path / "bac"), f"{made}/c"], tmp_path / "more")
    assert {Path(source.path).name: source.documents for source in again.sources} == {
        "b.jsonl": 3, "a.jsonl": 2, "c.jsonl": 2,
    }  # fmt: skip


def test_a_corpus_named_twice_is_joined_once(
    tmp_path: Path, tiny_tokenizer_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path / "a", tiny_tokenizer_dir, input=write_lines(tmp_path / "a.jsonl", [{"text": "a"}]))
    monkeypatch.chdir(tmp_path)
    assert join(["a", "./a", f"{tmp_path}/a.bin"], tmp_path / "joined").documents == 1


def test_merging_again_with_overwrite(tmp_path: Path, folder: str, tiny_tokenizer_dir: str) -> None:
    """The joined corpus may have the name its partitions were given."""
    partitions(tmp_path / "c", tiny_tokenizer_dir, folder, 2)
    first = join(str(tmp_path / "c"), tmp_path / "c")
    with pytest.raises(InputError, match=r"found .*c\.bin"):
        join(str(tmp_path / "c"), tmp_path / "c")
    assert comparable(join(str(tmp_path / "c"), tmp_path / "c", overwrite=True)) == comparable(first)


# --- refusals ---


def edit(prefix: str, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Change a manifest."""
    manifest = json.loads(Path(prefix + ".json").read_text())
    Path(prefix + ".json").write_text(json.dumps(change(manifest)))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, folder: str, tiny_tokenizer_dir: str) -> Path:
    """A folder with three partitions and, as `single`, the whole."""
    with pytest.MonkeyPatch.context() as patch:
        small_units(patch, 250)
        made = tmp_path_factory.mktemp("made")
        partitions(made / "c", tiny_tokenizer_dir, folder, 3)
        run(made / "single", tiny_tokenizer_dir, **settings_for(folder))
    return made


@pytest.fixture
def parts(tmp_path: Path, made: Path) -> list[str]:
    """The three partitions, to be damaged."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return [f"{tmp_path}/c-{i:05d}-of-00003" for i in range(3)]


def refused(prefixes: str | list[str], message: str, tmp_path: Path, **more: Any) -> None:
    """The merge fails with this message and leaves nothing behind."""
    with pytest.raises(InputError, match=message):
        join(prefixes, tmp_path / "out" / "joined", **more)
    assert not list(tmp_path.glob("out/*"))


def copy(prefix: str, to: Path) -> str:
    for suffix in (".bin", ".idx", ".json", ".metadata.jsonl", ".errors.jsonl"):
        if Path(prefix + suffix).exists():
            shutil.copy(prefix + suffix, f"{to}{suffix}")
    return str(to)


def test_partitions_missing_twice_or_mixed(parts: list[str], tmp_path: Path, folder: str, tiny_tokenizer_dir: str) -> None:
    refused(parts[::2], "without partitions 1; expected 0 to 2 in order", tmp_path)
    refused(parts[::-1], "found partitions 2, 1, 0; expected 0 to 2 in order", tmp_path)
    refused([*parts, copy(parts[1], tmp_path / "copy")], "found partitions 0, 1, 2, 1; expected 0 to 2 in order", tmp_path)
    refused([*parts, str(tmp_path / "single")], "found partitions .*no partition; expected all of one input", tmp_path)
    for suffix in (".bin", ".idx"):
        Path(parts[2] + suffix).unlink()
    refused(str(tmp_path / "c"), "without partitions 2", tmp_path)


def test_partitions_without_end(parts: list[str], tmp_path: Path, tiny_tokenizer_dir: str) -> None:
    """So many that their numbers alone would fill the memory are refused where they are asked for, and in a manifest."""
    expected = r"expected I/N with I from 0 to N - 1 and N at most 99,999, as in 0/8"
    for partition in ("0/99999999999", "0/100000", "0/" + "9" * 5000, "1/1", "٠/٨", "0/8/9", "a"):
        with pytest.raises(InputError, match=rf"^partition is '.*'; {expected}"):
            run(tmp_path / "d", tiny_tokenizer_dir, input=parts[0], partition=partition)
    edit(parts[0], lambda manifest: manifest | {"partition": "0/99999999999"})
    refused(parts[:1], rf"00000-of-00003\.json: partition is '0/99999999999'; {expected}", tmp_path)
    edit(parts[0], lambda manifest: manifest | {"partition": "0/99999"})
    refused(parts[:1], r"without partitions 1, 2, 3, 4, 5, 6, 7, 8 and 99,990 more; expected 0 to 99998 in order", tmp_path)


def test_the_same_documents_twice(
    parts: list[str], tmp_path: Path, tiny_tokenizer_dir: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Partitions name the same files and share no document; a corpus and a copy of it are joined with a warning."""
    source = write_lines(tmp_path / "two.jsonl", [{"text": f"{i} " * 20} for i in range(40)])
    thirds = partitions(tmp_path / "two", tiny_tokenizer_dir, str(source), 3)  # the first one has the file's checksum
    for third in thirds:
        assert [it.path for it in read_corpus_manifest(third).sources if it.documents] == [str(source)]
    join(thirds, tmp_path / "joined")
    assert "WARNING" not in capsys.readouterr().err
    single, twin = f"{tmp_path}/single", copy(f"{tmp_path}/single", tmp_path / "twin")
    join([single, twin], tmp_path / "twice")
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("WARNING")]
    assert len(warnings) == 1
    assert re.fullmatch(
        rf"WARNING: {single} and {twin} were both made from .*/a\.jsonl: its documents .* twice", warnings[0]
    )


def test_metadata_that_was_cut(parts: list[str], tmp_path: Path) -> None:
    path = Path(parts[1] + ".metadata.jsonl")
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))
    refused(parts, r"c-00001-of-00003\.metadata\.jsonl: found \d+ lines; expected \d+, one a document", tmp_path)


def test_one_of_each(tmp_path: Path, tiny_tokenizer_dir: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Numbers and nouns agree on the last lines, and nothing is divided by no tokens."""
    source = write_lines(tmp_path / "a.jsonl", [{"text": "one"}])
    run(tmp_path / "c", tiny_tokenizer_dir, input=source, eos="none", partition="0/2")
    run(tmp_path / "c", tiny_tokenizer_dir, input=source, eos="none", partition="1/2")
    made = capsys.readouterr().err
    assert re.search(r"^1 document, \d+ tokens?, \d\.\d\d bytes/token, ", made, re.MULTILINE)
    assert re.search(r"^0 documents, 0 tokens, \d\.\d s, ", made, re.MULTILINE)
    assert not re.search(r"\b1 (documents|tokens|corpora)", made)
    edit(f"{tmp_path}/c-00000-of-00002", lambda manifest: manifest | {"partition": None})
    join(f"{tmp_path}/c-00000-of-00002", tmp_path / "d")
    assert re.match(r"1 corpus, 1 document, \d+ tokens?, ", capsys.readouterr().err.splitlines()[-1])


def test_partitions_of_another_count_beside_them(
    parts: list[str], tmp_path: Path, folder: str, tiny_tokenizer_dir: str
) -> None:
    run(tmp_path / "c", tiny_tokenizer_dir, **settings_for(folder, partition="1/2"))
    refused(str(tmp_path / "c"), "found partitions", tmp_path)


def test_partitions_of_other_inputs(tmp_path: Path, tiny_tokenizer_dir: str) -> None:
    """0/2 of one corpus and 1/2 of another are not one corpus."""
    for name in "ab":
        source = write_lines(tmp_path / f"{name}.jsonl", [{"text": f"{name}{i}" * 9, "id": i} for i in range(50)])
        partitions(tmp_path / name, tiny_tokenizer_dir, source, 2)
    refused([f"{tmp_path}/a-00000-of-00002", f"{tmp_path}/b-00001-of-00002"], "input|source", tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eos_token": "!"}, "made with tokenizer"),
        ({"eos": "none"}, "eos is 'none'; expected 'document'"),
        ({"bos": "document"}, "bos is 'document'; expected 'none'"),
        ({"language": "zh"}, "language is 'zh'; expected 'en'"),
        ({"metadata_keys": []}, "metadata"),
    ],
)
def test_corpora_that_do_not_go_together(
    settings: dict[str, Any], message: str, tmp_path: Path, folder: str, tiny_tokenizer_dir: str
) -> None:
    run(tmp_path / "a", tiny_tokenizer_dir, **settings_for(folder))
    run(tmp_path / "b", tiny_tokenizer_dir, **settings_for(folder) | settings)
    refused([str(tmp_path / "a"), str(tmp_path / "b")], rf"b(\.json)?: .*{message}", tmp_path)


def test_all_that_does_not_go_together_is_named_at_once(tmp_path: Path, folder: str, tiny_tokenizer_dir: str) -> None:
    """A tokenizer's own consequences, as the end of the text, are no lines of their own."""
    settings = {"a": {}, "b": {"eos_token": "!", "language": "zh"}, "c": {"bos": "document", "metadata_keys": []}}
    for name, other in settings.items():
        run(tmp_path / name, tiny_tokenizer_dir, **settings_for(folder) | other)
    with pytest.raises(InputErrors) as caught:
        join([f"{tmp_path}/{name}" for name in settings], tmp_path / "all")
    lines = [str(error).removeprefix(f"{tmp_path}/") for error in caught.value.errors]
    assert [line.split(":")[0] for line in lines] == ["b.json", "b.json", "c.json", "c"], lines
    for line, said in zip(lines, ("made with tokenizer", "language is 'zh'", "bos is 'document'", "metadata"), strict=True):
        assert said in line


def test_another_width(parts: list[str], tmp_path: Path) -> None:
    edit(parts[1], lambda manifest: manifest | {"dtype": "int32"})
    refused(parts, "dtype is 'int32'; expected 'uint16'", tmp_path)


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
@pytest.mark.parametrize("damage", ["shorter", "flipped", "exchanged", "gone"])
def test_damaged_files(damage: str, suffix: str, parts: list[str], tmp_path: Path) -> None:
    path = Path(parts[1] + suffix)
    data = np.frombuffer(path.read_bytes(), np.uint8).copy()
    lengths = data[HEADER.size if suffix == ".idx" else 0 :][:80].view(np.int32)
    if damage == "flipped":
        lengths[0] ^= 1
    elif damage == "exchanged":  # sizes and sums stay
        other = int(np.flatnonzero(lengths != lengths[0])[0])
        lengths[[0, other]] = lengths[[other, 0]]
    path.write_bytes(data[:-2].tobytes() if damage == "shorter" else data.tobytes())
    if damage == "gone":
        path.unlink()
    refused(parts, r"c-00001-of-00003|without partitions 1|found no corpus", tmp_path)


def test_a_manifest_of_other_files(parts: list[str], tmp_path: Path) -> None:
    edit(parts[1], lambda manifest: manifest | {"documents": manifest["documents"] + 1})
    refused(parts, r"c-00001-of-00003\.idx: found \d+ documents", tmp_path)
    Path(parts[1] + ".json").unlink()
    refused(parts, r"c-00001-of-00003\.json: no such file", tmp_path)


def test_no_input_and_bad_output(parts: list[str], tmp_path: Path) -> None:
    refused(str(tmp_path / "nothing"), "found no corpus; expected a path such that PATH.idx exists", tmp_path)
    refused(f"{tmp_path}/no*", "found no corpus", tmp_path)
    before = content(parts[0])
    with pytest.raises(InputError, match="is one of the inputs"):
        join(parts, parts[0], overwrite=True)
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(InputError, match="is one of the inputs"):
        join(parts, tmp_path / "link" / Path(parts[0]).name, overwrite=True)
    assert content(parts[0]) == before
    with pytest.raises(InputError, match="expected a name in a folder to write to"):
        join(parts, f"{parts[0]}.bin/joined")
    for prefix, seed in (("out/", None), ("out/c", -1), ("out/c", 2**64)):
        with pytest.raises(InputError, match=r"output_prefix is|shuffle_documents is"):
            MergeConfig(parts, prefix, seed)


def test_an_existing_corpus_is_kept_unless_overwrite(
    parts: list[str], tmp_path: Path, folder: str, tiny_tokenizer_dir: str
) -> None:
    run(
        tmp_path / "old", tiny_tokenizer_dir, input=write_lines(tmp_path / "o.jsonl", [{"text": "old"}, {}]), on_error="skip"
    )
    before = content(tmp_path / "old")
    with pytest.raises(InputError, match=r"found .*old\.bin.*; expected a new name or overwrite"):
        join(parts, tmp_path / "old")
    Path(parts[2] + ".bin").write_bytes(b"")
    with pytest.raises(InputError, match="c-00002"):
        join(parts, tmp_path / "old", overwrite=True)
    assert content(tmp_path / "old") == before
    read_corpus_manifest(str(tmp_path / "old"))
    run(tmp_path / "c", tiny_tokenizer_dir, **settings_for(folder, partition="2/3"), overwrite=True)
    join(parts, tmp_path / "old", overwrite=True)
    assert content(tmp_path / "old") == content(tmp_path / "single")


def test_an_unfinished_run_of_that_name_is_left_alone(parts: list[str], tmp_path: Path) -> None:
    (tmp_path / "joined.partial").mkdir()
    (tmp_path / "joined.partial" / "state.json").write_text('{"run": {}, "units": 3}')
    with pytest.raises(InputError, match=r"joined\.partial: an unfinished preprocessing of that name"):
        join(parts, tmp_path / "joined")
    assert (tmp_path / "joined.partial" / "state.json").exists()


def test_a_merge_that_was_killed_is_done_again(parts: list[str], tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        merge.complete_corpus = lambda *_, **__: os._exit(9)
        join(parts, tmp_path / "joined")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert not (tmp_path / "joined.bin").exists()
    join(parts, tmp_path / "joined")
    assert content(tmp_path / "joined") == content(tmp_path / "single")
    assert not list(tmp_path.glob("joined.partial*"))


def test_find_prefixes_with_glob_characters(tmp_path: Path) -> None:
    for name in ("a[1]", "a1", "b-00000-of-00002", "b-00001-of-00002"):
        (tmp_path / f"{name}.idx").touch()
    assert find_prefixes([f"{tmp_path}/a[1]"]) == [f"{tmp_path}/a[1]"]
    assert find_prefixes([f"{tmp_path}/b", f"{tmp_path}/a1.bin"]) == [
        f"{tmp_path}/b-00000-of-00002", f"{tmp_path}/b-00001-of-00002", f"{tmp_path}/a1",
    ]  # fmt: skip
    assert find_prefixes([f"{tmp_path}/a?"]) == [f"{tmp_path}/a1"]


def test_the_tool(parts: list[str], tmp_path: Path) -> None:
    words = [sys.executable, str(ROOT / "tools" / "merge_datasets.py"), "--input", *parts, "--output-prefix"]
    done = subprocess.run([*words, str(tmp_path / "joined")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"{tmp_path}/joined.json"
    assert "3 corpora, 80 documents" in done.stderr


# --- 64 bits ---


@pytest.mark.parametrize("dtype", ["uint16", "int32"])
def test_pointers_beyond_32_bits(dtype: str) -> None:
    """Three million documents of 2,999 tokens: more than 2^32 tokens and bytes, in lengths that take no memory."""
    documents, length = 3_000_000, 2_999
    lengths = np.broadcast_to(np.int32(length), documents)
    index = io.BytesIO()
    write_index(index, lengths, dtype)
    data = index.getbuffer()
    width = np.dtype(dtype).itemsize
    assert len(data) == HEADER.size + 12 * documents + 8 * (documents + 1)
    assert HEADER.unpack(data[: HEADER.size])[3:] == (documents, documents + 1)
    found = np.frombuffer(data, np.int64, documents, HEADER.size + 4 * documents)
    assert (found == np.arange(documents, dtype=np.int64) * length * width).all()
    assert int(found[-1]) > 2**32
    indices = np.frombuffer(data, np.int64, documents + 1, HEADER.size + 12 * documents)
    assert (indices == np.arange(documents + 1)).all()


def test_the_longest_documents(tmp_path: Path) -> None:
    """Lengths near 2^31, from a memory map."""
    lengths = np.memmap(tmp_path / "lengths", np.int32, "w+", shape=(5,))
    lengths[:] = [2**31 - 1, 0, 2**31 - 1, 1, 2**31 - 1]
    index = io.BytesIO()
    write_index(index, lengths, np.int32)
    found = np.frombuffer(index.getbuffer(), np.int64, 5, HEADER.size + 20).tolist()
    longest = 4 * (2**31 - 1)
    assert found == [0, longest, longest, 2 * longest, 2 * longest + 4]
