"""The data of SFT and DPO: sources by language, mixed by ALMR; every row is used, or counted under what is wrong with it."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

import numpy as np

from megatron_cpt.posttrain.answer_languages import Identify, language_shares, mismatch
from megatron_cpt.posttrain.conversations import (
    RowError,
    describes_tools,
    parse_conversation,
    parse_preference,
    unused_fields,
)
from megatron_cpt.posttrain.rows import read_source_rows
from megatron_cpt.posttrain.settings import Group, SourceConfig, TuningDataConfig
from megatron_cpt.posttrain.templates import IGNORED, Example, PairExample, Template
from megatron_cpt.utils.console import counted
from megatron_cpt.utils.errors import InputError

NAMED_ROWS = 5  # of each kind of broken row in the report
TOO_LONG = "too long"

COUNTED = ("rows", "used", "validation", "truncated", "left_out", "with_tools", "not_learned")

Item = TypeVar("Item", Example, PairExample)


@dataclass
class RowCounts:
    """What became of the rows of one source.

    Attributes:
        broken: kind -> numbers of the rows, and what is wrong with the first
        left_out: for the sake of ALMR or max_rows
        lengths: tokens of the examples before they were truncated
        not_learned: answers that say that they are not to be learned (weight, train, loss)
        unused: field of a row or of its turns that nothing uses -> rows that have it
        languages: of the answers of rows that could be read, by identification; None: not identified
    """

    source: SourceConfig
    rows: int = 0
    used: int = 0
    validation: int = 0
    truncated: int = 0
    left_out: int = 0
    with_tools: int = 0
    not_learned: int = 0
    unused: Counter[str] = field(default_factory=Counter)
    broken: dict[str, tuple[list[int], str]] = field(default_factory=dict)
    lengths: list[int] = field(default_factory=list)
    tokens: int = 0
    answer_tokens: int = 0
    languages: Counter[str] | None = None

    def add_broken(self, number: int, error: RowError) -> None:
        """Count a row."""
        self.broken.setdefault(error.kind, ([], str(error)))[0].append(number)

    def language_warning(self) -> str | None:
        """Where the source seems not to be in its language."""
        return None if self.languages is None else mismatch(self.source.language, self.languages)

    def to_json(self) -> dict[str, Any]:
        """All numbers by name."""
        lengths = np.percentile(self.lengths, [0, 50, 90, 99, 100]).round().astype(int).tolist() if self.lengths else []
        return {
            "path": self.source.path,
            "language": self.source.language,
            "group": self.source.group,
            **{name: getattr(self, name) for name in COUNTED},
            "unused_fields": dict(self.unused.most_common()),
            "broken": {
                kind: {"rows": len(numbers), "first": numbers[:NAMED_ROWS], "example": text}
                for kind, (numbers, text) in sorted(self.broken.items())
            },
            "tokens": self.tokens,
            "answer_tokens": self.answer_tokens,
            "languages": None if self.languages is None else language_shares(self.languages),
            "language_warning": self.language_warning(),
            "lengths": dict(zip(("least", "median", "p90", "p99", "most"), lengths, strict=False)),
        }


@dataclass(frozen=True)
class Prepared(Generic[Item]):
    """Examples to train on, those to evaluate on by language, and what became of all rows."""

    train: list[Item]
    validation: dict[str, list[Item]]
    counts: list[RowCounts]
    almr: float


def prepare_sft(
    config: TuningDataConfig, template: Template, seed: int, identify: Identify | None = None
) -> Prepared[Example]:
    """Read, check and tokenize conversations.

    Args:
        identify: tells the language of each row's answers for the report

    Raises:
        InputError: a row is broken and they are refused, or nothing is left to train on
    """

    def make(row: Any, counts: RowCounts) -> Example:
        conversation = parse_conversation(row)
        answers = [message for message in conversation.messages if message.role == "assistant"]
        example = template.encode(conversation)
        counts.with_tools += conversation.has_tools
        counts.not_learned += sum(not answer.learned for answer in answers)
        counts.unused.update(unused_fields(row))
        count_language(counts, identify, "\n".join(answer.content for answer in answers))
        return example

    return _prepare(config, make, cut_example, tokens_of_example, seed)


def prepare_dpo(
    config: TuningDataConfig, template: Template, seed: int, identify: Identify | None = None
) -> Prepared[PairExample]:
    """Read, check and tokenize preference pairs.

    Args:
        identify: tells the language of each row's chosen answer for the report

    Raises:
        InputError: as `prepare_sft`
    """

    def make(row: Any, counts: RowCounts) -> PairExample:
        preference = parse_preference(row)
        pair = template.encode_pair(preference)
        counts.with_tools += describes_tools(row)
        counts.unused.update(unused_fields(row))
        count_language(counts, identify, preference.chosen.content)
        return pair

    return _prepare(config, make, cut_pair, tokens_of_pair, seed)


def count_language(counts: RowCounts, identify: Identify | None, answers: str) -> None:
    """Of one row, if languages are identified."""
    if identify is not None:
        counts.languages = counts.languages or Counter()
        counts.languages[identify(answers)] += 1


def cut_example(example: Example, max_length: int) -> Example:
    """Its first tokens.

    Raises:
        RowError: no token of an answer is among them
    """
    cut = Example(example.input_ids[:max_length], example.labels[:max_length], example.origin)
    if all(label == IGNORED for label in cut.labels):
        raise RowError(TOO_LONG, f"the prompt alone has {max_length} tokens or more (max_length)")
    return cut


def cut_pair(pair: PairExample, max_length: int) -> PairExample:
    """Its prompt with the first tokens of the answers.

    Raises:
        RowError: no token of the answers is left, or the same of both
    """
    room = max_length - len(pair.prompt_ids)
    if room < 1:
        raise RowError(TOO_LONG, f"the prompt alone has {len(pair.prompt_ids)} tokens; max_length is {max_length}")
    chosen, rejected = pair.chosen_ids[:room], pair.rejected_ids[:room]
    if chosen == rejected:
        raise RowError(TOO_LONG, f"chosen and rejected differ only after {max_length} tokens (max_length)")
    return PairExample(pair.prompt_ids, chosen, rejected, pair.origin)


def tokens_of_example(example: Example) -> tuple[int, int]:
    """(all, of answers)"""
    return len(example.input_ids), sum(label != IGNORED for label in example.labels)


def tokens_of_pair(pair: PairExample) -> tuple[int, int]:
    """(of prompt and longer answer, of both answers)"""
    answers = len(pair.chosen_ids), len(pair.rejected_ids)
    return len(pair.prompt_ids) + max(answers), sum(answers)


def _prepare(
    config: TuningDataConfig,
    make: Callable[[Any, RowCounts], Item],
    cut: Callable[[Item, int], Item],
    tokens_of: Callable[[Item], tuple[int, int]],
    seed: int,
) -> Prepared[Item]:
    def read(source: SourceConfig) -> tuple[list[Item], RowCounts]:
        counts = RowCounts(source)
        items: list[Item] = []
        for number, row in read_source_rows(source.path):
            counts.rows += 1
            try:
                if isinstance(row, RowError):
                    raise row
                item = make(row, counts)
                length = tokens_of(item)[0]
                if length > config.max_length:
                    item = truncate_item(config, cut, item, length)
                    counts.truncated += 1
            except RowError as error:
                if refused(config, error):
                    option = "on_overlength" if error.kind == TOO_LONG else "on_error"
                    raise InputError(f"{source.path}, row {number}: {error}; data.{option}: skip goes on") from error
                counts.add_broken(number, error)
                continue
            counts.lengths.append(length)
            items.append(replace(item, row=f"{source.path}, row {number}"))
        return items, counts

    chooser = random.Random(seed)
    train: dict[Group, list[tuple[Item, RowCounts]]] = {"general": [], "additional": []}
    validation: dict[str, list[Item]] = {}
    all_counts = []
    for source in config.sources:
        items, counts = read(source)
        chooser.shuffle(items)
        held = 0 if config.validation else math.ceil(config.validation_share * len(items))
        if held:
            validation.setdefault(source.language, []).extend(items[:held])
        kept = items[held:] if source.max_rows is None else items[held : held + source.max_rows]
        counts.validation, counts.left_out = held, len(items) - held - len(kept)
        train[source.group] += [(item, counts) for item in kept]
        all_counts.append(counts)
    for source in config.validation:
        items, counts = read(source)
        kept = items[: source.max_rows]
        counts.validation, counts.left_out = len(kept), len(items) - len(kept)
        if not kept:
            raise InputError(f"{source.path}: no row is left to evaluate on; {what_became_of(counts)}")
        validation.setdefault(source.language, []).extend(kept)
        all_counts.append(counts)
    mixed = mix(train, config.almr, lambda item: tokens_of(item)[0], chooser)
    if not mixed:
        found = "; ".join(f"{counts.source.path}: {what_became_of(counts)}" for counts in all_counts)
        raise InputError(f"no row of data.sources is left to train on: {found}")
    tokens = {"general": 0, "additional": 0}
    for item, counts in mixed:
        all_tokens, answers = tokens_of(item)
        counts.used += 1
        counts.tokens += all_tokens
        counts.answer_tokens += answers
        tokens[counts.source.group] += all_tokens
    return Prepared([item for item, _ in mixed], validation, all_counts, tokens["additional"] / sum(tokens.values()))


def what_became_of(counts: RowCounts) -> str:
    """Of the rows of a source that none is left of."""
    broken = [f"{len(numbers)} {kind} ({text})" for kind, (numbers, text) in sorted(counts.broken.items())]
    held_out = [f"{counts.validation} held out"] if counts.validation else []
    return ", ".join([counted(counts.rows, "row"), *broken, *held_out])


def truncate_item(config: TuningDataConfig, cut: Callable[[Item, int], Item], item: Item, length: int) -> Item:
    """An item that is too long, if it may be truncated."""
    if config.on_overlength != "truncate":
        raise RowError(TOO_LONG, f"it has {length} tokens; max_length is {config.max_length}")
    return cut(item, config.max_length)


def refused(config: TuningDataConfig, error: RowError) -> bool:
    """Whether a row ends the work instead of being counted."""
    return config.on_overlength == "refuse" if error.kind == TOO_LONG else config.on_error == "refuse"


def mix(
    train: dict[Group, list[tuple[Item, RowCounts]]],
    almr: float | None,
    length: Callable[[Item], int],
    chooser: random.Random,
) -> list[tuple[Item, RowCounts]]:
    """Both groups in one order; of the one that has too much for `almr`, the first rows of a random order.

    Raises:
        InputError: a group is empty that has to have a share
    """
    for items in train.values():
        chooser.shuffle(items)
    if almr is not None:
        wanted: dict[Group, float] = {"general": 1 - almr, "additional": almr}
        have: dict[Group, int] = {group: sum(length(item) for item, _ in items) for group, items in train.items()}
        for group, share in wanted.items():
            if share > 0 and not have[group]:
                raise InputError(f"data.almr is {almr:g}, but no row of a source with group {group} can be used")
        total = min(have[group] / share for group, share in wanted.items() if share > 0)
        for group, share in wanted.items():
            train[group], rest = cut_to(train[group], share * total, length)
            for _, counts in rest:
                counts.left_out += 1
    mixed: list[tuple[Item, RowCounts]] = train["general"] + train["additional"]
    chooser.shuffle(mixed)
    return mixed


def cut_to(
    items: list[tuple[Item, RowCounts]], tokens: float, length: Callable[[Item], int]
) -> tuple[list[tuple[Item, RowCounts]], list[tuple[Item, RowCounts]]]:
    """(as many of the first items as come nearest to these tokens, the others)"""
    sums = np.concatenate([[0], np.cumsum([length(item) for item, _ in items])])
    number = int(np.abs(sums - tokens).argmin())
    return items[:number], items[number:]
