"""A mixture file -> the mixture: its fields typed and checked (config.py), its corpora opened."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from megatron_cpt.config.fields import ConfigReader, config_from
from megatron_cpt.config.partial import partly, readable
from megatron_cpt.corpus.indexed_dataset import IndexedCorpus
from megatron_cpt.corpus.manifest import CorpusManifest, manifest_path, read_corpus_manifest
from megatron_cpt.mixture.checks import check_mixture
from megatron_cpt.mixture.config import (
    GROUPS,
    CorpusConfig,
    CorpusEntry,
    Entry,
    GroupName,
    MixtureConfig,
    SeqLengthConfig,
    StageConfig,
    SubGroupConfig,
    ValidationSetConfig,
    check_entries,
)
from megatron_cpt.mixture.mixture import Corpus, Mixture
from megatron_cpt.utils.errors import InputError, Refusals
from megatron_cpt.utils.input_files import load_yaml


def load_mixture(path: str, instead: Mapping[str, Any] | None = None) -> Mixture:
    """Read and check a mixture file, opening every corpus it names; `instead`: fields in place of its own.

    Raises:
        InputError: naming the file, the field, the value found and the value expected; InputErrors: several of them
    """
    reader = ConfigReader(MixtureConfig, f"{path}: ")
    reader.fields(read_mixture_fields(path) | dict(instead or {}), reader.where)
    config, refusals = reader.config(), reader.refusals
    opened = _OpenedCorpora(path, refusals)
    for group in GROUPS:  # general corpora of all stages before additional ones
        for place, entries in _lists(config, group).items():
            opened.add_list(group, place, entries)
    mixture: Mixture = partly(
        Mixture,
        refusals,
        path=lambda: path,
        seq_length=lambda: config.seq_length,
        seed=lambda: config.seed,
        stages=lambda: tuple(_stage(config, stage, i) for i, stage in enumerate(config.stages_or_one(), start=1)),
        corpora=lambda: tuple(opened.corpora),
        validation=lambda: tuple(opened.validation_sets(config.validation or [])),
    )
    with refusals.noted():
        check_mixture(mixture)
    refusals.raise_any()
    return mixture


def read_mixture_fields(path: str) -> dict[str, Any]:
    """What a mixture file says, unchecked.

    Raises:
        InputError: the file cannot be read, or is not YAML with fields
    """
    fields = load_yaml(path, "mixture file")
    if not fields:
        raise InputError(f"mixture file {path} is empty; expected fields (seq_length, almr, ...)")
    return fields


def read_seq_length(path: str) -> int:
    """A mixture file's seq_length, without opening its corpora.

    Raises:
        InputError: the file cannot be read, or has none
    """
    fields = read_mixture_fields(path)
    return config_from(SeqLengthConfig, {name: fields[name] for name in fields if name == "seq_length"}, path).seq_length


def _lists(config: MixtureConfig, group: GroupName) -> dict[str, Sequence[Entry]]:
    """Place in the file -> entries, of each list of a group that a stage reads."""
    lists: dict[str, Sequence[Entry]] = {}
    for i, stage in enumerate(readable(config, "stages") or [StageConfig()]):
        own = readable(stage, group)
        place, entries = (group, readable(config, group)) if own is None else (f"stages[{i}].{group}", own)
        lists[place] = entries or []
    return lists


def _stage(config: MixtureConfig, stage: StageConfig, number: int) -> StageConfig:
    """A stage with what it leaves out from the top of the file. What was refused in either cannot be read in it."""

    def from_top(name: str) -> Callable[[], Any]:
        return lambda: getattr(config if getattr(stage, name) is None else stage, name)

    whole: StageConfig = partly(
        StageConfig,
        Refusals(),  # all was noted when the file was read
        name=lambda: stage.name or str(number),
        tokens=lambda: stage.tokens,
        fraction=lambda: stage.fraction,
        almr=from_top("almr"),
        general=from_top("general"),
        additional=from_top("additional"),
    )
    return whole


class _OpenedCorpora:
    """Opens each corpus once, whichever stages name it, and gives it its position.

    What is wrong in one place of the file does not hide what is wrong in another: `refusals` gets all of it.
    """

    def __init__(self, path: str, refusals: Refusals) -> None:
        self.path = path
        self.refusals = refusals
        self.corpora: list[Corpus] = []
        self._named: dict[str, Corpus] = {}
        self._texts: dict[str, str] = {}  # real path, and checksum -> name of the corpus

    def add_list(self, group: GroupName, place: str, entries: Sequence[Entry]) -> None:
        """Open the corpora of a list that are not open yet."""
        with self.refusals.noted():
            check_entries(f"{self.path}: {place}", entries)
        names: set[str] = set()
        for where, sub_group, entry in _flat(place, entries):
            with self.refusals.noted():
                corpus = self._open(entry, group, sub_group)
                if corpus.name in names:
                    raise InputError(f"{self.path}: two training corpora are named {corpus.name!r}; set different names")
                names.add(corpus.name)
                self._add(where, corpus)

    def validation_sets(self, entries: Sequence[ValidationSetConfig]) -> list[Corpus]:
        """The validation sets, as far as they can be opened."""
        opened = []
        for entry in entries:
            with self.refusals.noted():
                opened.append(self._open(entry))
        return opened

    def _open(self, entry: CorpusEntry, group: GroupName | None = None, sub_group: str | None = None) -> Corpus:
        """The corpus of an entry, whose settings cannot be read in it where they were refused.

        Raises:
            InputError: its files are missing or damaged
            RefusedValueError: its prefix was refused
        """
        prefix = os.path.join(os.path.dirname(os.path.abspath(self.path)), entry.prefix)
        manifest, data = _open_corpus(prefix)
        corpus: Corpus = partly(
            Corpus,
            self.refusals,
            name=lambda: entry.called,
            prefix=lambda: prefix,
            language=lambda: getattr(entry, "language", None) or manifest.language,
            manifest=lambda: manifest,
            data=lambda: data,
            group=lambda: group,
            sub_group=lambda: sub_group,
            max_epochs=lambda: getattr(entry, "max_epochs", None),
        )
        return corpus

    def _add(self, place: str, corpus: Corpus) -> None:
        """Take a corpus of the entry at `place`, unless it is there already."""
        if other := self._named.get(corpus.name):
            self._compare(place, corpus, other)
            return
        texts = (os.path.realpath(corpus.prefix), corpus.manifest.files["bin"].sha256)
        for text in texts:
            if text in self._texts:
                raise InputError(f"{self.path}: {place}: {corpus.name} and {self._texts[text]} are one text; leave one out")
        self._texts |= dict.fromkeys(texts, corpus.name)
        self._named[corpus.name] = corpus
        self.corpora.append(corpus)

    def _compare(self, place: str, corpus: Corpus, other: Corpus) -> None:
        """InputError when two entries with one name are not one corpus of one group."""
        if os.path.realpath(corpus.prefix) != os.path.realpath(other.prefix):
            raise InputError(f"{self.path}: two training corpora are named {corpus.name!r}; set different names")
        if corpus.group != other.group:
            raise InputError(
                f"{self.path}: {place}: {corpus.name} is in both groups; expected it as general or as additional text"
            )
        if corpus.max_epochs != other.max_epochs:
            raise InputError(f"{self.path}: {place}: {corpus.name} has another max_epochs elsewhere; give one for the run")


def _flat(place: str, entries: Sequence[Entry]) -> Iterator[tuple[str, str | None, CorpusConfig]]:
    """(place in the file, name of the sub-group, entry of a corpus) for a list and its sub-groups.

    The corpora of a sub-group whose name was refused are opened all the same.
    """
    for i, entry in enumerate(entries):
        if isinstance(entry, SubGroupConfig):
            for j, corpus in enumerate(readable(entry, "corpora") or []):
                yield f"{place}[{i}].corpora[{j}]", readable(entry, "group"), corpus
        else:
            yield f"{place}[{i}]", None, entry


def _open_corpus(prefix: str) -> tuple[CorpusManifest, IndexedCorpus]:
    refusals, manifest, data = Refusals(), None, None
    with refusals.noted():
        manifest = read_corpus_manifest(prefix)
    if manifest is not None or manifest_path(prefix).exists():  # else the name is wrong, and the files' absence no news
        with refusals.noted():
            data = IndexedCorpus(prefix)
    refusals.raise_any()
    assert manifest is not None
    assert data is not None
    if data.num_tokens != manifest.tokens:
        raise InputError(f"{prefix}.bin has {data.num_tokens} tokens but {prefix}.json says {manifest.tokens}")
    if str(data.dtype) != manifest.dtype:
        raise InputError(f"{prefix}.idx: dtype is {data.dtype}; expected {manifest.dtype}, as {prefix}.json says")
    for name, info in manifest.files.items():
        found = os.path.getsize(f"{prefix}.{name}")
        if found != info.bytes:
            raise InputError(f"{prefix}.{name}: found {found} bytes; expected {info.bytes}, as {prefix}.json says")
    return manifest, data
