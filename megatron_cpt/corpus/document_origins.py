"""Where the documents of a corpus come from: file and line of each, as far as its manifest tells."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import orjson

from megatron_cpt.corpus.manifest import CorpusManifest, SourceInfo
from megatron_cpt.corpus.shuffle import document_keys
from megatron_cpt.utils.errors import InputError, brief

UNKNOWN = -1
Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class DocumentOrigins:
    """Files and lines of a corpus's documents.

    Attributes:
        files: the input files, in the order of the manifest
        ends: (files,) documents of the files up to each, in the order of the input
        skipped: for each file whose lines are known, the lines (or rows, from 1 on) that gave no document, ascending
        order: (documents,) number in the order of the input of each document; None: they are in that order
    """

    files: list[str]
    ends: Numbers | None
    skipped: dict[int, Numbers]
    order: Numbers | None

    def lookup(self, documents: Numbers) -> tuple[Numbers, Numbers]:
        """(file, line) of documents: places in `files`, and lines from 1 on; int64 as `documents`. UNKNOWN: not known."""
        unknown = np.full(documents.shape, UNKNOWN, np.int64)
        if self.ends is None:
            return unknown, unknown.copy()
        numbers = documents if self.order is None else self.order[documents]
        files, lines = np.searchsorted(self.ends, numbers, side="right"), unknown
        for file, skipped in self.skipped.items():
            here = files == file
            number = numbers[here] - (self.ends[file - 1] if file else 0)
            # Document k is the (k + 1)-th line that gave one: `skipped[i] - i` lines before the i-th skipped one gave some
            lines[here] = number + 1 + np.searchsorted(skipped - np.arange(skipped.size) - 1, number, side="right")
        return files.astype(np.int64), lines

    def find(self, file: int, line: int) -> int | None:
        """The document of a line; None: it gave none, or lines of that file are not known."""
        skipped = self.skipped.get(file)
        if self.ends is None or skipped is None or line in skipped:
            return None
        first = int(self.ends[file - 1]) if file else 0
        number = first + line - 1 - int(np.searchsorted(skipped, line))
        if not first <= number < int(self.ends[file]):
            return None
        return number if self.order is None else int(np.flatnonzero(self.order == number)[0])


def origins_of(prefix: str, manifest: CorpusManifest) -> DocumentOrigins:
    """What the manifest of a corpus, and the list of skipped documents beside it, tell.

    Raises:
        InputError: that list is damaged
    """
    files = [source.path for source in manifest.sources]
    counts = np.array([source.documents for source in manifest.sources], np.int64)
    if not manifest.in_order or int(counts.sum()) != manifest.documents:
        alone = np.count_nonzero(counts) == 1 and int(counts.sum()) == manifest.documents
        return DocumentOrigins(files, np.cumsum(counts) if alone else None, {}, None)
    order: Numbers | None = None
    if manifest.shuffle_documents is not None:
        order = np.argsort(document_keys(0, manifest.documents, manifest.shuffle_documents)).astype(np.int64)
    is_side = manifest.holdout is not None and not manifest.holdout.startswith("asked:")
    skipped: dict[int, Numbers] = {}
    if not is_side and manifest.partition is None:
        skipped = dict(_skipped_lines(Path(prefix + ".errors.jsonl"), manifest.sources))
    return DocumentOrigins(files, np.cumsum(counts), skipped, order)


def _skipped_lines(path: Path, sources: list[SourceInfo]) -> Iterator[tuple[int, Numbers]]:
    """The lines of each file that gave no document, where all of them are known: blank ones are counted only."""
    lines: dict[str, list[int]] = defaultdict(list)
    try:
        if path.exists():
            with path.open("rb") as stream:
                for row in stream:
                    fields = orjson.loads(row)
                    line = fields["line"]
                    if type(line) is not int or not 1 <= line < 1 << 62:
                        raise ValueError(f"line is {brief(line)}")
                    lines[fields["file"]].append(line)
    except (orjson.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error}); expected a file and a line in each row") from None
    for file, source in enumerate(sources):
        found = np.unique(np.array(lines[source.path], np.int64))
        if source.records == source.documents + found.size and (found <= source.records).all():
            yield file, found
