"""The last steps of making a corpus: shuffle, index, and the renames that make it appear, the manifest last."""

from __future__ import annotations

import os
import re
import shutil
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_cpt.corpus import holdout as held
from megatron_cpt.corpus.holdout import Holdout, map_file
from megatron_cpt.corpus.indexed_dataset import write_index
from megatron_cpt.corpus.manifest import CorpusManifest, FileInfo, manifest_path, write_manifest
from megatron_cpt.corpus.partial import clear_leftovers, partial_folder, read_state
from megatron_cpt.corpus.shuffle import shuffle_documents
from megatron_cpt.corpus.sources import sha256_file
from megatron_cpt.utils.errors import InputError
from megatron_cpt.utils.input_files import why_unwritable

CHUNK = 1 << 24
SUFFIXES = (".bin", ".idx", ".json", ".metadata.jsonl", ".errors.jsonl", ".documents")
HOLDOUT_MANIFEST = "manifest.holdout.json"


def outputs(prefix: str) -> list[str]:
    """All files a corpus may have."""
    return [prefix + suffix for suffix in SUFFIXES]


def is_output(prefix: str, path: str) -> bool:
    """Whether a path is of the corpus `prefix`, its hold-out or its partitions, or of one of them in the making."""
    stem = os.path.realpath(prefix)
    suffixes = "|".join(map(re.escape, SUFFIXES))
    pattern = rf"(-\d{{5}}-of-\d{{5}}|{held.SUFFIX})?({suffixes}|\.partial(/.*|\.lock)?)"
    return path.startswith(stem) and re.fullmatch(pattern, path[len(stem) :]) is not None


def check_output_folder(prefix: str) -> None:
    """InputError when the folder of a corpus can be neither made nor written to. `prefix`: of all partitions."""
    if "://" in prefix:
        raise InputError(f"output_prefix {prefix}: is a URL; expected a path of this machine")
    if why := why_unwritable(os.path.dirname(prefix)):
        raise InputError(f"output_prefix is {prefix}; expected a name in a folder to write to ({why})")


def check_corpus_output(prefix: str, overwrite: bool, with_holdout: bool = False) -> None:
    """InputError when the corpus exists (without `overwrite`), in part even.

    `with_holdout`: documents will be held out of it, so that corpus counts, too.
    """
    ours = outputs(prefix) + (outputs(prefix + held.SUFFIX) if with_holdout else [])
    existing = [path for path in ours if Path(path).exists()]
    if existing and not overwrite and "publish" not in (read_state(partial_folder(prefix)) or {}):
        clear_leftovers(partial_folder(prefix))
        raise InputError(f"output_prefix {prefix}: found {', '.join(existing)}; expected a new name or overwrite")
    is_corpus = partial_folder(prefix).exists() or any(path.endswith((".bin", ".idx")) for path in existing)
    if existing and not is_corpus:
        raise InputError(f"output_prefix {prefix}: {existing[0]} is of no corpus: not replaced; expected another name")


def complete_corpus(
    folder: Path,
    manifest: CorpusManifest,
    bin_sha256: str,
    holdout: Holdout | None,
    *,
    with_metadata: bool,
    with_errors: bool,
) -> tuple[dict[str, str], list[CorpusManifest]]:
    """Hold out and shuffle, if wanted, and write index and manifest, all in the partial `folder`.

    `manifest`: that of everything in it, whose `files` are not known yet; its `shuffle_documents` is the seed to shuffle
    with. `bin_sha256`: of tokens.bin. `holdout`: how much to hold out now. Returns ({file in the folder: suffix of PREFIX},
    the manifests: of the corpus, and of what was held out). InputError: so much cannot be held out.
    """
    if holdout is None:
        files, info = _complete_side(folder, "", manifest, bin_sha256, with_metadata)
        manifests = [replace(manifest, files=info)]
    else:
        lines = _line_lengths(map_file(folder / "metadata.jsonl", np.dtype(np.uint8)), folder) if with_metadata else None
        sides = held.split_corpus(folder, holdout, manifest.dtype, lines)
        files, manifests = {}, []
        # first what is held out: the manifest of the corpus appears last
        for side in reversed(sides):
            is_held_out = side.name == "holdout"
            own = _side_manifest(manifest, side)
            side_files, info = _complete_side(folder, f".{side.name}", own, side.bin_sha256, with_metadata)
            files |= {name: (held.SUFFIX if is_held_out else "") + suffix for name, suffix in side_files.items()}
            manifests.insert(0, replace(own, files=info))
        write_manifest(folder / HOLDOUT_MANIFEST, manifests[1])
        files[HOLDOUT_MANIFEST] = held.SUFFIX + ".json"
    if with_errors:
        files["errors.jsonl"] = ".errors.jsonl"
    if manifest.partition is not None and manifest.holdout is not None:
        files["documents.bin"] = ".documents"
    write_manifest(folder / "manifest.json", manifests[0])
    return files, manifests


def _side_manifest(manifest: CorpusManifest, side: held.Side) -> CorpusManifest:
    """The manifest of one side of a split; shares of languages are those of the whole, of which it is a fair sample."""
    documents = len(side.documents)
    around = documents * ((manifest.eos == "document") + (manifest.bos == "document"))
    per_source = held.documents_per_source([source.documents for source in manifest.sources], side.documents)
    is_held_out = side.name == "holdout"
    return replace(
        manifest,
        documents=documents,
        tokens=side.tokens,
        text_bytes=side.text_bytes,
        characters=side.characters,
        bytes_per_token=round(side.text_bytes / max(side.tokens - around, 1), 4),
        skipped={} if is_held_out else manifest.skipped,
        shuffle_documents=None if is_held_out else manifest.shuffle_documents,
        sources=[replace(s, documents=n) for s, n in zip(manifest.sources, per_source, strict=True)],
        holdout=f"{side.name}:{side.split}",
        in_order=manifest.in_order and not is_held_out,
    )


def _complete_side(
    folder: Path, side: str, manifest: CorpusManifest, bin_sha256: str, with_metadata: bool
) -> tuple[dict[str, str], dict[str, FileInfo]]:
    """Shuffle and index the files of `folder` whose names end with `side`; returns those that are to be published."""
    end = side
    if manifest.shuffle_documents is not None:
        end += ".shuffled"
        bin_sha256 = _shuffle(folder, side, manifest.shuffle_documents, np.dtype(manifest.dtype).itemsize, with_metadata)
    with (folder / f"index{side}").open("wb") as stream:
        write_index(stream, map_file(folder / f"lengths.bin{end}", np.dtype("<i4")), manifest.dtype)
        stream.flush()
        os.fsync(stream.fileno())
    files = {f"tokens.bin{end}": ".bin", f"index{side}": ".idx"}
    if with_metadata:
        files[f"metadata.jsonl{end}"] = ".metadata.jsonl"
    info = {
        "bin": FileInfo((folder / f"tokens.bin{end}").stat().st_size, bin_sha256),
        "idx": FileInfo((folder / f"index{side}").stat().st_size, sha256_file(folder / f"index{side}")),
    }
    return files, info


def _shuffle(folder: Path, side: str, seed: int, itemsize: int, with_metadata: bool) -> str:
    """Shuffle the files of a partial corpus that end with `side` into `*.shuffled`; returns the sha256 of the tokens."""
    lengths = map_file(folder / f"lengths.bin{side}", np.dtype("<i4"))
    content = map_file(folder / f"tokens.bin{side}", np.dtype(np.uint8))
    with ExitStack() as stack:
        tokens, new_lengths = (
            stack.enter_context((folder / f"{n}{side}.shuffled").open("wb")) for n in ("tokens.bin", "lengths.bin")
        )
        written = [tokens, new_lengths]
        digest = shuffle_documents(content, lengths, seed, tokens, new_lengths, folder, itemsize)
        if with_metadata:
            lines = map_file(folder / f"metadata.jsonl{side}", np.dtype(np.uint8))
            written.append(stack.enter_context((folder / f"metadata.jsonl{side}.shuffled").open("wb")))
            shuffle_documents(lines, _line_lengths(lines, folder), seed, written[-1], None, folder)
        for stream in written:
            stream.flush()
            os.fsync(stream.fileno())
    return digest


def _line_lengths(lines: Any, folder: Path) -> Any:
    """(lines,) bytes of each line, its break included: in a file, as there may be many."""
    with (folder / "line_lengths").open("wb") as stream:
        begin = 0
        for start in range(0, lines.size, CHUNK):
            ends = np.flatnonzero(lines[start : start + CHUNK] == ord("\n")) + start + 1
            stream.write(np.diff(ends, prepend=begin).astype("<i8").tobytes())
            begin = int(ends[-1]) if ends.size else begin
    return map_file(folder / "line_lengths", np.dtype("<i8"))


def publish(prefix: str, folder: Path, files: dict[str, str]) -> str:
    """Rename the files of a finished partial corpus to `prefix` + suffix, the manifest last; may be done again."""
    manifest = manifest_path(prefix)
    with_holdout = HOLDOUT_MANIFEST in files
    for name, old in (("manifest.json", manifest), (HOLDOUT_MANIFEST, manifest_path(prefix + held.SUFFIX))):
        if (folder / name).exists():
            old.unlink(missing_ok=True)  # no old manifest vouches for new files
    mine = [*(prefix + suffix for suffix in files.values()), str(manifest)]
    for path in outputs(prefix) + (outputs(prefix + held.SUFFIX) if with_holdout else []):
        if path not in mine:
            Path(path).unlink(missing_ok=True)  # of the corpus that is replaced
    for name, suffix in files.items():
        if (folder / name).exists():
            (folder / name).replace(prefix + suffix)
    if (folder / "manifest.json").exists():
        (folder / "manifest.json").replace(manifest)
    shutil.rmtree(folder)
    return str(manifest)
