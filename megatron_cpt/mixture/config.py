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
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Annotated, Literal, NamedTuple

from megatron_cpt.config.partial import readable
from megatron_cpt.config.require import Requirements
from megatron_cpt.config.values import Limits
from megatron_cpt.utils.errors import FieldError, InputError
from megatron_cpt.utils.language_codes import check_language

GroupName = Literal["general", "additional"]
GROUPS: tuple[GroupName, ...] = ("general", "additional")


def _rise_from_zero(steps: Sequence[tuple[int, Fraction]]) -> bool:
    tokens = [begin for begin, _ in steps]
    return bool(tokens) and tokens[0] == 0 and tokens == sorted(set(tokens))


SHARE = "a number from 0 to 1 (share of the additional group)"
STEPS = "[[0, almr], [tokens, almr], ...] with rising tokens into the stage"
SeqLength = Annotated[int, Limits(lambda length: length >= 1, "a whole number, 1 or more")]
Seed = Annotated[int, Limits(lambda seed: seed >= 0, "a whole number, 0 or more")]
Tokens = Annotated[int, Limits(lambda tokens: tokens > 0, "a whole number of tokens above 0 (2_000_000_000, 2B)")]
Share = Annotated[Fraction, Limits(lambda almr: 0 <= almr <= 1, SHARE)]
Part = Annotated[Fraction, Limits(lambda part: 0 < part <= 1, "a part of the run (above 0, at most 1)")]
Weight = Annotated[Fraction, Limits(lambda weight: weight > 0, "a number above 0")]
Epochs = Annotated[Fraction, Limits(lambda epochs: epochs > 0, "a number above 0")]
Prefix = Annotated[str, Limits(bool, "the path of a corpus, without .bin")]
Name = Annotated[str, Limits(bool, "a name")]


@dataclass(frozen=True)
class AlmrRamp:
    """An ALMR that changes linearly over a stage."""

    begin: Share = field(metadata={"name": "from"})
    """At its first token."""
    to: Share
    """At its end."""


@dataclass(frozen=True)
class AlmrSteps:
    """An ALMR that changes in steps."""

    steps: Annotated[list[tuple[int, Share]], Limits(_rise_from_zero, STEPS)]
    """[tokens into the stage, ALMR from there on] of each; the first begins at 0."""


Almr = Share | AlmrRamp | AlmrSteps


class AlmrPart(NamedTuple):
    """A stretch of a stage, from so many tokens after its beginning on, in which ALMR goes linearly from first to last."""

    begin_tokens: int
    first: Fraction
    last: Fraction


@dataclass(frozen=True)
class CorpusEntry:
    """What every entry of a corpus has."""

    prefix: Prefix
    """PREFIX.bin, .idx and .json of preprocess_data.py; relative to the mixture file."""
    name: Name | None = None
    """What tables and metrics call it. Default: the last part of the prefix."""

    @property
    def called(self) -> str:
        """The corpus's name, given or not."""
        return self.name or os.path.basename(self.prefix)


@dataclass(frozen=True)
class CorpusConfig(CorpusEntry):
    """An entry of a group: a corpus."""

    weight: Weight | None = None
    """Within the list. Without weights, entries count by their tokens."""
    max_epochs: Epochs | None = None
    """A run that would read the corpus more often is refused."""


@dataclass(frozen=True)
class SubGroupConfig:
    """An entry of a group: corpora that share what the entry gets."""

    group: Name
    """The sub-group's name."""
    corpora: Annotated[list[CorpusConfig], Limits(bool, "a list of entries with a prefix, one or more")]
    """What is in it."""
    weight: Weight | None = None
    """See CorpusConfig."""


Entry = CorpusConfig | SubGroupConfig


@dataclass(frozen=True)
class ValidationSetConfig(CorpusEntry):
    """A validation set."""

    language: str | None = None
    """ISO 639 code. Default: the corpus's own."""

    def __post_init__(self) -> None:
        if self.language is not None:
            check_language(self.language)


@dataclass(frozen=True)
class StageConfig:
    """A stage of the run. What it leaves out comes from the top of the file."""

    name: Name = ""
    """Default: its number, from 1 on."""
    tokens: Tokens | None = None
    """Its length."""
    fraction: Part | None = None
    """Its length as a part of the run."""
    almr: Almr | None = None
    """A number, {from, to}, or {steps: [[tokens, almr], ...]}."""
    general: list[Entry] | None = None
    """General corpora."""
    additional: list[Entry] | None = None
    """Corpora of the additional language."""

    def __post_init__(self) -> None:
        if self.tokens is not None and self.fraction is not None:
            raise FieldError("fraction", "tokens and fraction are both given; expected one of them")

    @property
    def has_length(self) -> bool:
        """Whether the stage has a budget; the last one need not have any."""
        return self.tokens is not None or self.fraction is not None

    @property
    def almr_parts(self) -> list[AlmrPart]:
        """The ALMR's course, of a stage that has one."""
        match self.almr:
            case AlmrRamp():
                return [AlmrPart(0, self.almr.begin, self.almr.to)]
            case AlmrSteps():
                return [AlmrPart(begin, almr, almr) for begin, almr in self.almr.steps]
        assert self.almr is not None, "every stage of a mixture has an ALMR"
        return [AlmrPart(0, self.almr, self.almr)]


@dataclass(frozen=True)
class SeqLengthConfig:
    """Of a mixture file the length of its samples."""

    seq_length: SeqLength
    """Tokens of a sample."""


@dataclass(frozen=True)
class MixtureConfig:
    """What a mixture file says."""

    seq_length: SeqLength
    """Tokens of a sample."""
    seed: Seed
    """Of the order of the samples."""
    almr: Almr | None = None
    """Of all stages that give none. See StageConfig."""
    general: list[Entry] | None = None
    """General corpora of all stages that list none."""
    additional: list[Entry] | None = None
    """Corpora of the additional language of all stages that list none."""
    stages: Annotated[list[StageConfig], Limits(bool, "a list of stages with a budget and an almr")] | None = None
    """Default: one stage, the whole run."""
    validation: list[ValidationSetConfig] | None = None
    """Validation sets."""

    def __post_init__(self) -> None:
        with Requirements() as need:
            for i, stage in enumerate(self.stages_or_one()[:-1]):
                with need.noted():
                    if not stage.has_length:
                        raise InputError(
                            f"stages[{i}].tokens is missing; only the last stage may be what is left of the run"
                        )
            with need.noted():
                if self.almr is None and any(readable(stage, "almr", refused=0) is None for stage in self.stages_or_one()):
                    raise FieldError("almr", f"almr is missing; expected {SHARE}")

    def stages_or_one(self) -> list[StageConfig]:
        """The stages as they are given; one that says nothing where there are none."""
        return self.stages or [StageConfig()]


def check_entries(place: str, entries: Sequence[Entry]) -> None:
    """Raise InputError unless all entries of a list have a weight, or none, and its sub-groups have different names.

    Args:
        place: where the list is, `FILE: FIELD`
        entries: what was refused in one is no matter here
    """
    with Requirements() as need:
        missing = [readable(entry, "weight", refused=0) is None for entry in entries]
        if any(missing) and not all(missing):
            first = f"{place}[{missing.index(True)}]"
            need.add(InputError(f"{first} has no weight but others in the group do; give all or none"))
        sub_groups = [entry for entry in entries if isinstance(entry, SubGroupConfig)]
        names = [readable(entry, "group") for entry in sub_groups]
        for name in names:
            if name is not None and names.count(name) > 1:
                need.add(InputError(f"{place}: two sub-groups are named {name!r}; use different names"))
