"""The mixture file.

seq_length: 2048
seed: 1234
almr: 0.33                       # additional-language mixture ratio: share of the `additional` group, in tokens
general:
  - prefix: data/en_wiki         # PREFIX.bin, .idx, .json of preprocess_data.py; relative to this file
  - group: code                  # a named sub-group, which shares what it gets among its corpora
    weight: 2.0                  # within the list; without weights, entries count by their tokens
    corpora:
      - prefix: data/python
        max_epochs: 4            # the run is refused when it would read the corpus more often
additional:
  - prefix: data/zh_news
stages:                          # without: one stage, the whole run
  - tokens: 2B                   # or `fraction: 0.2` of the run; the last may have neither: the rest
    almr: 0.2
  - tokens: 6_000_000_000
    almr: {from: 0.2, to: 0.5}   # linear over the stage; or {steps: [[0, 0.2], [1B, 0.33]]}, tokens into the stage
  - almr: 0.5
    general: [{prefix: data/en_books}]   # instead of the list above, from here on
validation:
  - prefix: data/zh_valid        # name: defaults to the prefix's last part, language to the manifest's
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any, NamedTuple, TypeVar

from megatron_cpt.config.partial import partly
from megatron_cpt.corpus.indexed_dataset import IndexedCorpus
from megatron_cpt.corpus.manifest import CorpusManifest, manifest_path, read_manifest
from megatron_cpt.mixture.checks import check_mixture
from megatron_cpt.mixture.mixture import GROUPS, Corpus, GroupName, Mixture
from megatron_cpt.mixture.order.splitters import Group
from megatron_cpt.mixture.stages import AlmrPart, MixtureStage
from megatron_cpt.utils.errors import InputError, Refusals, RefusedValueError
from megatron_cpt.utils.input_files import amount, load_yaml, number, shown, text_of
from megatron_cpt.utils.language_codes import check_language

T = TypeVar("T")

MOST_WHOLE = 2**63 - 1  # of a number that the native order takes
TOKENS = "a number of tokens above 0, as 2_000_000_000 or 2B"
STAGE_FIELDS = {"name", "tokens", "fraction", "almr", *GROUPS}


def load_mixture(path: str, instead: Mapping[str, Any] | None = None) -> Mixture:
    """Read and check a mixture file, opening every corpus it names; `instead`: fields in place of its own.

    Raises:
        InputError: naming the file, the field, the value found and the value expected; InputErrors: several of them
    """
    fields, refusals = read_mixture_fields(path) | dict(instead or {}), Refusals()
    reader = _Reader(path, refusals)
    with refusals.noted():
        _refuse_unknown(path, "", fields, {"seq_length", "seed", "almr", "stages", "validation", *GROUPS})
    mixture: Mixture = partly(
        Mixture,
        refusals,
        path=lambda: path,
        seq_length=lambda: _integer(path, fields, "seq_length", 1),
        seed=lambda: _integer(path, fields, "seed", 0),
        stages=lambda: reader.read_stages(fields),
        corpora=lambda: tuple(reader.corpora),
        validation=lambda: tuple(reader.validation(fields.get("validation"))),
    )
    with refusals.noted():
        check_mixture(mixture)
    stages = []
    for draft in reader.drafts:
        with refusals.noted():
            stages.append(reader.stage(draft))
    refusals.raise_any()
    return replace(mixture, stages=tuple(stages))


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
    return _integer(path, read_mixture_fields(path), "seq_length", minimum=1)


def _refuse_unknown(path: str, where: str, fields: dict[Any, Any], known: set[str]) -> None:
    refusals = Refusals()
    for name in sorted(map(str, set(fields) - known)):
        has = f"{where} has unknown" if where else "unknown"
        refusals.add(InputError(f"{path}: {has} field {name!r}; it may have {', '.join(sorted(known))}"))
    refusals.raise_any()


def _integer(path: str, fields: dict[str, Any], name: str, minimum: int) -> int:
    value = number(fields.get(name))
    if value is None or value.denominator != 1 or not minimum <= value <= MOST_WHOLE:
        found, limits = shown(fields.get(name)), f"{minimum} or more" + (", below 2**63" if value else "")
        unit = " without a unit" if value is None and amount(fields.get(name)) is not None else ""
        raise InputError(f"{path}: {name} is {found}; expected a whole number{unit}, {limits}")
    return int(value)


def _text(path: str, where: str, fields: dict[str, Any], name: str, default: str) -> str:
    """A name as it is written, also one of digits; `default` where there is none, or null."""
    value = fields.get(name)
    text = default if value is None else text_of(value)
    if text is None:
        raise InputError(f"{path}: {where}{name} is {shown(value)}; expected text")
    return text


class _Draft(NamedTuple):
    """A stage whose groups are not put together yet.

    Attributes:
        stage: without them; what is wrong with it cannot be read (see config/partial.py)
        almr_at: where its ALMR is in the file
        lists: where the list of each group is in the file, and the list
    """

    stage: MixtureStage
    almr_at: str
    lists: dict[GroupName, tuple[str, Any]]


class _Reader:
    """Opens each corpus once, whichever stages name it, and gives it its position: general ones first.

    What is wrong in one place of the file does not hide what is wrong in another: `refusals` gets all of it.
    """

    def __init__(self, path: str, refusals: Refusals) -> None:
        self.path = path
        self.refusals = refusals
        self.corpora: list[Corpus] = []
        self.drafts: list[_Draft] = []

    def read_stages(self, fields: dict[str, Any]) -> tuple[MixtureStage, ...]:
        """All stages without their groups, whose corpora are opened; what one leaves out comes from the top of the file.

        Raises:
            RefusedValueError: one is no stage (which is noted), so that these are not all
        """
        described, are_all = self._described(fields.get("stages"))
        for _, place, stage in described:
            with self.refusals.noted():
                _refuse_unknown(self.path, place[:-1], stage, STAGE_FIELDS)
        top: tuple[int, str, dict[str, Any]] = (0, "", {})
        lists: list[dict[GroupName, tuple[str, Any]]] = [
            {group: ((place if group in stage else "") + group, stage.get(group, fields.get(group))) for group in GROUPS}
            for _, place, stage in (described if are_all else [*described, top])
        ]
        for group in GROUPS:  # general corpora of all stages before additional ones
            for own in lists:
                with self.refusals.noted():
                    self._open(group, *own[group])
                with self.refusals.noted():
                    self._check_weights(*own[group])
        if "almr" in fields:
            with self.refusals.noted():
                _almr(self.path, "", fields["almr"])  # also when every stage has its own
        last = len(fields["stages"]) if isinstance(fields.get("stages"), list) else 1
        for (number_of_stage, place, stage), own in zip(described, lists, strict=False):
            at = place if "almr" in stage else ""
            almr = stage.get("almr", fields.get("almr"))
            self.drafts.append(_Draft(self._stage(number_of_stage, place, stage, almr, at, last), at, own))
            with self.refusals.noted():
                self._check_shares(self.drafts[-1])
        if not are_all:
            raise RefusedValueError
        return tuple(draft.stage for draft in self.drafts)

    def _described(self, described: Any) -> tuple[list[tuple[int, str, dict[str, Any]]], bool]:
        """(number, place in the file, fields) of each stage, and whether these are all: what is no stage is noted."""
        if described is None:
            return [(1, "", {})], True
        if not isinstance(described, list) or not described:
            found = f"stages is {shown(described)}; expected a list of stages with a budget and an almr"
            self.refusals.add(InputError(f"{self.path}: {found}"))
            return [], False
        for i, stage in enumerate(described):
            if not isinstance(stage, dict):
                found = f"stages[{i}] is {shown(stage)}; expected a stage with a budget and an almr"
                self.refusals.add(InputError(f"{self.path}: {found}"))
        stages = [(i + 1, f"stages[{i}].", stage) for i, stage in enumerate(described) if isinstance(stage, dict)]
        return stages, len(stages) == len(described)

    def _stage(
        self, number_of_stage: int, place: str, stage: dict[str, Any], almr: Any, almr_at: str, last: int
    ) -> MixtureStage:
        """A stage without groups; what is wrong with it cannot be read."""
        stage_: MixtureStage = partly(
            MixtureStage,
            self.refusals,
            name=lambda: _text(self.path, place, stage, "name", str(number_of_stage)),
            tokens=lambda: self._length(place, stage, number_of_stage == last)[0],
            fraction=lambda: self._length(place, stage, number_of_stage == last)[1],
            almr=lambda: _almr(self.path, almr_at, almr),
            general=lambda: None,
            additional=lambda: None,
        )
        return stage_

    def _length(self, place: str, stage: dict[str, Any], is_last: bool) -> tuple[int | None, Fraction | None]:
        """A stage's budget in tokens, or as a part of the run."""
        path = self.path
        if "tokens" in stage and "fraction" in stage:
            raise InputError(f"{path}: {place}tokens and {place}fraction are both given; expected one of them")
        if "tokens" in stage:
            tokens = amount(stage["tokens"])
            if tokens is None or tokens <= 0:
                raise InputError(f"{path}: {place}tokens is {shown(stage['tokens'])}; expected {TOKENS}")
            return tokens, None
        if "fraction" in stage:
            fraction = number(stage["fraction"])
            if fraction is None or not 0 < fraction <= 1:
                raise InputError(
                    f"{path}: {place}fraction is {shown(stage['fraction'])}; expected a part of the run, above 0, at most 1"
                )
            return None, fraction
        if not is_last:
            raise InputError(f"{path}: {place}tokens is missing; only the last stage may be what is left of the run")
        return None, None

    def _check_shares(self, draft: _Draft) -> None:
        """InputError where a group that gets a share has no corpus."""
        shares = {
            "additional": max(max(p.first, p.last) for p in draft.stage.almr),
            "general": 1 - min(min(p.first, p.last) for p in draft.stage.almr),
        }
        for group in reversed(GROUPS):
            if shares[group] and draft.lists[group][1] in (None, []):
                value = shares["additional"] if group == "additional" else 1 - shares["general"]
                raise InputError(
                    f"{self.path}: {draft.almr_at}almr {float(value):g} gives the {group} group a share of "
                    f"{float(shares[group]):g} but it lists no corpus"
                )

    def stage(self, draft: _Draft) -> MixtureStage:
        """A stage, when all corpora are open that could be opened. RefusedValueError: not all of its own could."""
        groups = {group: self._group(*draft.lists[group]) for group in GROUPS}
        return replace(draft.stage, general=groups["general"], additional=groups["additional"])

    def _open(self, group: GroupName, where: str, entries: Any) -> None:
        """Open the corpora of a list that are not open yet."""
        for place, sub_group, entry in self._flat(where, [] if entries is None else entries):
            with self.refusals.noted():
                self._add(place, self._corpus(place, entry, {"prefix", "name", "weight", "max_epochs"}, group, sub_group))

    def _add(self, place: str, corpus: Corpus) -> None:
        """Take a corpus of the entry at `place`, unless it is there already. RefusedValueError: its name was refused."""
        name = corpus.name
        for other in self.corpora:
            if other.name == name:
                self._compare(place, corpus, other)
                return
            if _same_text(other, corpus):
                raise InputError(f"{self.path}: {place}: {name} and {other.name} are one text; leave one out")
        self.corpora.append(corpus)

    def _check_weights(self, where: str, entries: Any) -> None:
        """InputError for weights that are none, or are not given to all entries of a list; also in its sub-groups."""
        entries = [entry if isinstance(entry, dict) else {} for entry in entries] if isinstance(entries, list) else []
        given = ["weight" in entry for entry in entries]
        if any(given) and not all(given):
            missing = f"{where}[{given.index(False)}]"
            self.refusals.add(
                InputError(f"{self.path}: {missing} has no weight but others in the group do; give all or none")
            )
        for i, entry in enumerate(entries):
            weight = number(entry.get("weight", 1))
            if weight is None or weight <= 0:
                found = f"{where}[{i}].weight is {shown(entry['weight'])}"
                self.refusals.add(InputError(f"{self.path}: {found}; expected a number above 0, or leave the entry out"))
            self._check_weights(f"{where}[{i}].corpora", entry.get("corpora"))

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

    def _flat(self, where: str, entries: Any) -> Iterator[tuple[str, str | None, Any]]:
        """(place in the file, name of the sub-group, entry of a corpus) for a list and its sub-groups.

        A sub-group whose name was refused has "" as one: its corpora are opened all the same.
        """
        if not isinstance(entries, list):
            raise InputError(f"{self.path}: {where} is {shown(entries)}; expected a list of entries with a prefix")
        seen: set[str] = set()
        for i, entry in enumerate(entries):
            place = f"{where}[{i}]"
            if not (isinstance(entry, dict) and "corpora" in entry):
                yield place, None, entry
                continue
            name = ""
            with self.refusals.noted():
                name = self._sub_group(place, entry, seen)
            if not isinstance(entry["corpora"], list) or not entry["corpora"]:
                continue
            for found, _, corpus in self._flat(f"{place}.corpora", entry["corpora"]):
                yield found, name, corpus

    def _sub_group(self, place: str, entry: dict[str, Any], seen: set[str]) -> str:
        """The name of a sub-group, which is added to those `seen` in its list."""
        refusals, inner = Refusals(), entry["corpora"]
        with refusals.noted():
            _refuse_unknown(self.path, place, entry, {"group", "weight", "corpora"})
        name = text_of(entry.get("group"))
        with refusals.noted():
            if name is None or not isinstance(inner, list) or not inner:
                found = f"{place} is {shown(entry)}"
                raise InputError(f"{self.path}: {found}; expected a sub-group with a name (group) and corpora")
            if any(isinstance(one, dict) and "corpora" in one for one in inner):
                raise InputError(f"{self.path}: {place}: a sub-group inside a sub-group; expected one level")
        with refusals.noted():
            if name is not None and name in seen:
                raise InputError(f"{self.path}: {place}: two sub-groups are named {name!r}; use different names")
        refusals.raise_any()
        seen.add(str(name))
        return str(name)

    def _group(self, where: str, entries: Any) -> Group | None:
        """A list as the splitters want it. RefusedValueError: something in it was refused."""
        members: list[int | Group] = []
        weights: list[Fraction] = []
        for i, entry in enumerate(_list_or_refused(entries)):
            if isinstance(entry, dict) and "corpora" in entry:
                inner = self._group(f"{where}[{i}].corpora", entry["corpora"])
                if inner is None:
                    raise RefusedValueError
                members.append(inner)
                tokens = sum(self.corpora[position].data.num_tokens for position in inner.corpora())
            else:
                position = self._position(entry)
                members.append(position)
                tokens = self.corpora[position].data.num_tokens
            weight = number(entry.get("weight", tokens))
            if not weight:  # that is checked where it is given; so is the length of a corpus
                raise RefusedValueError
            weights.append(weight)
        if not members:
            return None
        flat = [c for member in members for c in (member.corpora() if isinstance(member, Group) else [member])]
        for position in flat:
            if flat.count(position) > 1:
                raise InputError(
                    f"{self.path}: two training corpora are named {self.corpora[position].name!r}; set different names"
                )
        return Group(tuple(members), tuple(weights))

    def _position(self, entry: Any) -> int:
        """The place of an entry's corpus among the open ones. RefusedValueError: it is not there."""
        try:
            return [corpus.name for corpus in self.corpora].index(_name(self.path, "", entry))
        except ValueError:  # also InputError: it was noted where the entry is
            raise RefusedValueError from None

    def _corpus(
        self, where: str, entry: Any, known: set[str], group: GroupName | None = None, sub_group: str | None = None
    ) -> Corpus:
        """The corpus of an entry; what is wrong with its settings is noted, and cannot be read in it.

        Raises:
            RefusedValueError: it has no prefix, or its files cannot be read, which is noted
        """
        path = self.path
        prefix: str | None = None
        opened: tuple[CorpusManifest, IndexedCorpus] | None = None
        with self.refusals.noted():
            prefix = os.path.join(os.path.dirname(os.path.abspath(path)), _prefix(path, where, entry))
        if not isinstance(entry, dict):
            raise RefusedValueError
        with self.refusals.noted():
            _refuse_unknown(path, where, entry, known)
        with self.refusals.noted():
            opened = None if prefix is None else _open_corpus(prefix)
        corpus: Corpus = partly(
            Corpus,
            self.refusals,
            name=lambda: _name(path, where, entry),
            prefix=lambda: _known(prefix),
            language=lambda: _language(path, where, entry) or _known(opened)[0].language,
            manifest=lambda: _known(opened)[0],
            data=lambda: _known(opened)[1],
            group=lambda: group,
            sub_group=lambda: sub_group,
            max_epochs=lambda: _max_epochs(path, where, entry),
        )
        _known(opened)
        return corpus

    def validation(self, entries: Any) -> list[Corpus]:
        """The validation sets."""
        entries = [] if entries is None else entries
        if not isinstance(entries, list):
            found = f"validation is {shown(entries)}"
            self.refusals.add(InputError(f"{self.path}: {found}; expected a list of entries with a prefix"))
            return []
        corpora = []
        for i, entry in enumerate(entries):
            with self.refusals.noted():
                corpora.append(self._corpus(f"validation[{i}]", entry, {"prefix", "name", "language"}))
        return corpora


def _same_text(a: Corpus, b: Corpus) -> bool:
    same_place = os.path.realpath(a.prefix) == os.path.realpath(b.prefix)
    return same_place or a.manifest.files["bin"].sha256 == b.manifest.files["bin"].sha256


def _prefix(path: str, where: str, entry: Any) -> str:
    prefix = text_of(entry.get("prefix")) if isinstance(entry, dict) else None
    if not prefix:
        raise InputError(f"{path}: {where} is {shown(entry)}; expected an entry with a prefix")
    return prefix


def _name(path: str, where: str, entry: Any) -> str:
    """What the corpus of an entry is called: `name`, or the last part of `prefix`."""
    name = _text(path, f"{where}.", entry, "name", "") if isinstance(entry, dict) else ""
    return name or os.path.basename(_prefix(path, where, entry))


def _language(path: str, where: str, entry: dict[str, Any]) -> str:
    """The language that an entry gives; "" where it gives none."""
    language = _text(path, f"{where}.", entry, "language", "")
    if entry.get("language") is not None:
        check_language(language, f"{path}: {where}.language")
    return language


def _max_epochs(path: str, where: str, entry: dict[str, Any]) -> Fraction | None:
    if entry.get("max_epochs") is None:
        return None
    most = number(entry["max_epochs"])
    if most is None or most <= 0:
        raise InputError(f"{path}: {where}.max_epochs is {shown(entry['max_epochs'])}; expected a number above 0")
    return most


def _known(value: T | None) -> T:
    """A value that was read. RefusedValueError: it was refused."""
    if value is None:
        raise RefusedValueError
    return value


def _list_or_refused(entries: Any) -> list[Any]:
    """The entries of a list; none where there is no list. RefusedValueError: it is something else."""
    if entries is not None and not isinstance(entries, list):
        raise RefusedValueError
    return entries or []


def _open_corpus(prefix: str) -> tuple[CorpusManifest, IndexedCorpus]:
    refusals, manifest, data = Refusals(), None, None
    with refusals.noted():
        manifest = read_manifest(prefix)
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


def _almr(path: str, place: str, value: Any) -> tuple[AlmrPart, ...]:
    """A number, {from, to} or {steps: [[tokens, almr], ...]}."""
    wanted = "expected a number from 0 to 1 (share of the additional group)"

    def share(found: Any, where: str) -> Fraction:
        almr = number(found)
        if almr is None or not 0 <= almr <= 1:
            raise InputError(f"{path}: {place}{where} is {shown(found)}; {wanted}")
        return almr

    if isinstance(value, dict) and set(value) == {"from", "to"}:
        ends = _each([(value[end], f"almr.{end}") for end in ("from", "to")], share)
        return (AlmrPart(0, *ends),)
    if isinstance(value, dict) and set(value) == {"steps"}:
        return _steps(path, place, value["steps"], share)
    if isinstance(value, dict):
        raise InputError(
            f"{path}: {place}almr is {shown(value)}; expected a number, {{from, to}} or {{steps: [[tokens, almr], ...]}}"
        )
    almr = share(value, "almr")
    return (AlmrPart(0, almr, almr),)


def _each(found: Sequence[tuple[Any, str]], share: Callable[[Any, str], Fraction]) -> list[Fraction]:
    """The share that each (value, name) is. InputError: one is none; InputErrors: several are."""
    refusals, shares = Refusals(), list[Fraction]()
    for value, name in found:
        with refusals.noted():
            shares.append(share(value, name))
    refusals.raise_any()
    return shares


def _steps(path: str, place: str, steps: Any, share: Callable[[Any, str], Fraction]) -> tuple[AlmrPart, ...]:
    pairs = isinstance(steps, list) and steps and all(isinstance(step, list) and len(step) == 2 for step in steps)
    begins = [amount(step[0]) for step in steps] if pairs else []
    if not begins or begins[0] != 0 or None in begins or begins != sorted(set(begins)):  # type: ignore[type-var]
        raise InputError(
            f"{path}: {place}almr.steps is {shown(steps)}; expected [[0, almr], [tokens, almr], ...] with rising tokens "
            "into the stage"
        )
    parts = _each([(step[1], f"almr.steps[{i}]") for i, step in enumerate(steps)], share)
    return tuple(AlmrPart(begin or 0, almr, almr) for begin, almr in zip(begins, parts, strict=True))
