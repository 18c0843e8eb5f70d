"""The mixture file: which corpora, in which shares, with which validation sets.

seq_length: 2048
seed: 1234
almr: 0.33                       # additional-language mixture ratio: share of the `additional` group, in tokens
general:
  - prefix: data/en_wiki         # PREFIX.bin, .idx, .json of preprocess_data.py; relative to this file
  - prefix: data/code
    weight: 2.0                  # within the group; without weights, corpora count by their tokens
additional:
  - prefix: data/zh_news
validation:
  - prefix: data/zh_valid        # name: defaults to the prefix's last part, language comes from the manifest
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import yaml

from megatron_cpt.data.indexed import IndexedCorpus
from megatron_cpt.data.manifest import CorpusManifest, read_manifest
from megatron_cpt.data.sampling import SampleOrder, SplitterTree
from megatron_cpt.errors import InputError

GROUPS = ("general", "additional")


@dataclass(frozen=True)
class Corpus:
    """One preprocessed corpus as the mixture uses it."""

    name: str
    prefix: str
    weight: Fraction
    manifest: CorpusManifest
    data: IndexedCorpus

    @property
    def language(self) -> str:
        return self.manifest.language

    def num_samples(self, seq_length: int) -> int:
        """Whole samples in one pass: a sample is seq_length inputs and one more token for the last target."""
        return (self.data.num_tokens - 1) // seq_length


@dataclass(frozen=True)
class Mixture:
    """A checked mixture file."""

    path: str
    seq_length: int
    seed: int
    almr: Fraction
    general: tuple[Corpus, ...]
    additional: tuple[Corpus, ...]
    validation: tuple[Corpus, ...]

    @property
    def corpora(self) -> tuple[Corpus, ...]:
        """Training corpora: general first, then additional; a corpus is known by its position here."""
        return self.general + self.additional

    @property
    def manifest(self) -> CorpusManifest:
        """The manifest of the first corpus; all of them share one tokenizer."""
        return (self.corpora + self.validation)[0].manifest

    def fingerprint(self) -> dict[str, Any]:
        """What decides which text sample n is; two runs with equal fingerprints read the same data."""
        corpora: dict[str, Any] = {}
        for group in GROUPS:
            for corpus in getattr(self, group):
                content = corpus.manifest.files["bin"].sha256
                corpora[corpus.name] = {"group": group, "weight": str(corpus.weight), "bin_sha256": content}
        return {"seq_length": self.seq_length, "seed": self.seed, "almr": str(self.almr), "corpora": corpora}

    def splitter_tree(self) -> SplitterTree:
        return self._splitter_tree

    @functools.cached_property
    def _splitter_tree(self) -> SplitterTree:
        # asked for at every step of a run
        places = range(len(self.corpora))
        general, additional = places[: len(self.general)], places[len(self.general) :]
        return SplitterTree(self.almr, general, additional, [corpus.weight for corpus in self.corpora])

    def sample_order(self, global_batch_size: int) -> SampleOrder:
        sizes = [corpus.num_samples(self.seq_length) for corpus in self.corpora]
        return SampleOrder(self.splitter_tree(), sizes, self.seed, global_batch_size)


def load_mixture(path: str) -> Mixture:
    """Read and check a mixture file, opening every corpus it names.

    Raises:
        InputError: naming the file, the field, the value found and the value wanted
    """
    fields = _read_yaml(path)
    unknown = set(fields) - {"seq_length", "seed", "almr", "validation", *GROUPS}
    if unknown:
        raise InputError(f"{path}: unknown field {min(map(str, unknown))!r}")
    groups = {group: _corpora(path, fields, group) for group in (*GROUPS, "validation")}
    mixture = Mixture(
        path=path,
        seq_length=_integer(path, fields, "seq_length", minimum=1),
        seed=_integer(path, fields, "seed", minimum=0),
        almr=_almr(path, fields),
        **groups,
    )
    _check(mixture)
    return mixture


def _read_yaml(path: str) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as file:
            fields = yaml.safe_load(file)
    except OSError as error:
        raise InputError(f"mixture file {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"mixture file {path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(fields, dict):
        raise InputError(f"mixture file {path} must hold fields (seq_length, almr, ...), found {type(fields).__name__}")
    return fields


def _integer(path: str, fields: dict[str, Any], name: str, minimum: int) -> int:
    value = fields.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise InputError(f"{path}: {name} is {value!r}; use a whole number, {minimum} or more")
    return value


def _fraction(value: Any) -> Fraction | None:
    """An exact number (0.1 is one tenth, not the nearest binary number), or None if it is none.

    YAML reads 1e-5 as text (it wants 1.0e-5); so do we take it, as a number.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        return Fraction(str(value))
    except (ValueError, ZeroDivisionError):
        return None


def _almr(path: str, fields: dict[str, Any]) -> Fraction:
    almr = _fraction(fields.get("almr"))
    if almr is None or not 0 <= almr <= 1:
        raise InputError(f"{path}: almr is {fields.get('almr')!r}; use a number from 0 to 1 (share of the additional group)")
    return almr


def _corpora(path: str, fields: dict[str, Any], group: str) -> tuple[Corpus, ...]:
    entries = fields.get(group) or []
    if not isinstance(entries, list):
        raise InputError(f"{path}: {group} is {entries!r}; use a list of entries with a prefix")
    corpora = tuple(_corpus(path, f"{group}[{i}]", entry) for i, entry in enumerate(entries))
    given = ["weight" in entry for entry in entries]
    if any(given) and not all(given):
        raise InputError(f"{path}: {group}[{given.index(False)}] has no weight but others in the group do; give all or none")
    return corpora


def _corpus(path: str, where: str, entry: Any) -> Corpus:
    if not isinstance(entry, dict) or not isinstance(entry.get("prefix"), str):
        raise InputError(f"{path}: {where} is {entry!r}; use an entry with a prefix")
    unknown = set(entry) - {"prefix", "name", "weight"}
    if unknown:
        raise InputError(
            f"{path}: {where} has unknown field {min(map(str, unknown))!r}; it may have prefix, name and weight"
        )
    prefix = os.path.join(os.path.dirname(os.path.abspath(path)), entry["prefix"])
    manifest = read_manifest(prefix)
    data = IndexedCorpus(prefix)
    if data.num_tokens != manifest.tokens:
        raise InputError(f"{prefix}.bin has {data.num_tokens} tokens but {prefix}.json says {manifest.tokens}")
    weight = _fraction(entry.get("weight", data.num_tokens))
    if weight is None or weight <= 0:
        raise InputError(f"{path}: {where}.weight is {entry['weight']!r}; use a number above 0, or leave the corpus out")
    name = str(entry.get("name", os.path.basename(prefix)))
    return Corpus(name, prefix, weight, manifest, data)


def _check(mixture: Mixture) -> None:
    """What no single corpus can tell: groups that have a share have text, and all text has one tokenizer."""
    for group, share in (("additional", mixture.almr), ("general", 1 - mixture.almr)):
        if share and not getattr(mixture, group):
            raise InputError(
                f"{mixture.path}: almr {float(mixture.almr):g} gives the {group} group a share of {float(share):g} "
                f"but it lists no corpus"
            )
    for corpus in mixture.corpora + mixture.validation:
        if corpus.num_samples(mixture.seq_length) < 1:
            raise InputError(
                f"{corpus.prefix}.bin has {corpus.data.num_tokens} tokens; one sample at seq_length "
                f"{mixture.seq_length} takes {mixture.seq_length + 1}"
            )
        first, other = mixture.manifest.tokenizer, corpus.manifest.tokenizer
        if other.fingerprint != first.fingerprint:
            raise InputError(
                f"{corpus.prefix}.json was made with tokenizer {other.name} ({other.path}, {other.vocab_size} tokens) but "
                f"{mixture.corpora[0].prefix}.json with {first.name} ({first.path}, {first.vocab_size} tokens)"
            )
    for corpora, what in ((mixture.corpora, "training corpora"), (mixture.validation, "validation sets")):
        names = [corpus.name for corpus in corpora]  # what the ledger and the metrics know them by
        for name in names:
            if names.count(name) > 1:
                raise InputError(f"{mixture.path}: two {what} are named {name!r}; set different names")
    training = {os.path.realpath(corpus.prefix) for corpus in mixture.corpora}
    for corpus in mixture.validation:
        if os.path.realpath(corpus.prefix) in training:
            raise InputError(f"{mixture.path}: {corpus.prefix} is both a training corpus and a validation set")
