"""Votes of people on pairs of answers, and how far they agree."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from megatron_cpt.posttrain.conversations import RowError
from megatron_cpt.posttrain.rows import read_source_rows
from megatron_cpt.utils.errors import InputError

Outcome = Literal["win", "tie", "loss"]  # of the model that is compared with another
CHOICES = ("a", "b", "tie")
FIELDS = ("question", "model_a", "model_b", "vote", "annotator")


@dataclass(frozen=True)
class Vote:
    """One line of a file."""

    question: str
    model_a: str
    model_b: str
    vote: str
    annotator: str


@dataclass(frozen=True)
class Agreement:
    """Of several annotators.

    Attributes:
        annotators: how many
        pairs: of votes of two annotators on the same question
        share: of the pairs, in which both say the same
        kappa: Cohen's, the mean over all two annotators; None: where all votes are the same it is not defined
    """

    annotators: int
    pairs: int
    share: float
    kappa: float | None


def read_votes(path: str, models: Sequence[str]) -> list[Vote]:
    """All votes of a file.

    Raises:
        InputError: there is none, or a row is no vote, names a model that is not among `models`, or repeats another
    """
    votes: dict[tuple[str, str, frozenset[str]], Vote] = {}
    for number, row in read_source_rows(path):
        where = f"{path}, row {number}"
        vote = parse_vote(row, where)
        for name in (vote.model_a, vote.model_b):
            if name not in models:
                raise InputError(f"{where}: there is no model {name!r}; expected one of {', '.join(models)}")
        key = vote.question, vote.annotator, frozenset((vote.model_a, vote.model_b))
        if key in votes:
            raise InputError(f"{where}: {vote.annotator} votes again on {vote.question!r}; expected one vote")
        votes[key] = vote
    if not votes:
        raise InputError(f"{path} holds no votes; expected a row or more")
    return list(votes.values())


def parse_vote(row: Any, where: str) -> Vote:
    """One row of a file."""
    if isinstance(row, RowError):
        raise InputError(f"{where}: {row}") from row
    if not isinstance(row, Mapping) or not all(isinstance(row.get(name), str) for name in FIELDS):
        found = ", ".join(map(str, row)) if isinstance(row, Mapping) else type(row).__name__
        raise InputError(f"{where} has {found or 'nothing'}; expected the texts {', '.join(FIELDS)}")
    if row["vote"] not in CHOICES:
        raise InputError(f"{where}: vote is {row['vote']!r}; expected one of {', '.join(CHOICES)}")
    if row["model_a"] == row["model_b"]:
        raise InputError(f"{where}: model_a and model_b are both {row['model_a']!r}; expected two models")
    return Vote(**{name: row[name] for name in FIELDS})


def votes_on(votes: Sequence[Vote], model: str, against: str) -> dict[str, dict[str, Outcome]]:
    """question -> annotator -> what became of `model`, whichever of the two was shown as a."""
    found: dict[str, dict[str, Outcome]] = {}
    for vote in votes:
        if {vote.model_a, vote.model_b} == {model, against}:
            found.setdefault(vote.question, {})[vote.annotator] = vote_outcome(vote, model)
    return found


def vote_outcome(vote: Vote, model: str) -> Outcome:
    """Of one vote, for one of its models."""
    if vote.vote == "tie":
        return "tie"
    return "win" if (vote.vote == "a") == (vote.model_a == model) else "loss"


def majority(outcomes: Sequence[Outcome]) -> Outcome:
    """Of one question's votes: more wins than losses, or the reverse; a tie otherwise."""
    balance = outcomes.count("win") - outcomes.count("loss")
    return "win" if balance > 0 else "loss" if balance < 0 else "tie"


def agreement(by_question: Mapping[str, Mapping[str, Outcome]]) -> Agreement | None:
    """None: no question has votes of two annotators."""
    annotators = sorted({name for votes in by_question.values() for name in votes})
    shared = [pair for pair in pairs_of_votes(by_question, annotators) if pair[0]]
    pairs = [pair for first, second in shared for pair in zip(first, second, strict=True)]
    if not pairs:
        return None
    kappas = [kappa for first, second in shared if (kappa := cohen(first, second)) is not None]
    share = sum(first == second for first, second in pairs) / len(pairs)
    return Agreement(len(annotators), len(pairs), share, sum(kappas) / len(kappas) if kappas else None)


def pairs_of_votes(
    by_question: Mapping[str, Mapping[str, Outcome]], annotators: Sequence[str]
) -> Iterator[tuple[list[Outcome], list[Outcome]]]:
    """Votes of any two annotators on the questions that both have seen."""
    for first, second in itertools.combinations(annotators, 2):
        both = [votes for votes in by_question.values() if first in votes and second in votes]
        yield [votes[first] for votes in both], [votes[second] for votes in both]


def cohen(first: Sequence[Outcome], second: Sequence[Outcome]) -> float | None:
    """Cohen's kappa; None where both always say the same one thing, for chance alone would explain that."""
    from sklearn.metrics import cohen_kappa_score

    if len({*first, *second}) == 1:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of labels that one annotator never uses
        return float(cohen_kappa_score(first, second))
