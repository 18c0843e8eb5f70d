"""How often one model answers better than another, by a judge or by the votes of people."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_cpt.evaluation.columns import Measured
from megatron_cpt.evaluation.config import EvaluateConfig, PairwiseConfig
from megatron_cpt.evaluation.judge import Judge, JudgeError
from megatron_cpt.evaluation.table import markdown_table
from megatron_cpt.evaluation.votes import Agreement, Outcome, Vote, agreement, majority, read_votes, votes_on
from megatron_cpt.utils.errors import InputError

logger = logging.getLogger(__name__)

VERDICTS = "verdicts.jsonl"
Z = 1.959963984540054  # of a normal distribution, 95 % lie within so many standard deviations


@dataclass(frozen=True)
class Comparison:
    """Of a model with another.

    Attributes:
        questions: that there is an outcome for
        win_rate: ties count half; None: there is no outcome
        interval: of the win rate, 95 %, for other questions of the kind
        unparsed: questions on which what the judge said is no verdict; they count nowhere
        consistent: share of the questions on which the judge said the same in both orders; None: people have judged
        agreement: of people; None: no two have seen the same question
        missing: why there is nothing
    """

    model: str
    against: str
    questions: int = 0
    wins: int = 0
    ties: int = 0
    losses: int = 0
    win_rate: float | None = None
    interval: tuple[float, float] | None = None
    unparsed: int = 0
    consistent: float | None = None
    agreement: Agreement | None = None
    missing: str | None = None


class PairwiseEvaluator:
    """Judges pairs of models. It is there before anything is measured, so that what is wrong with it is known by then."""

    def __init__(self, config: EvaluateConfig, pairwise: PairwiseConfig) -> None:
        """Read the votes, or get ready to ask.

        Raises:
            InputError: see read_votes and Judge
        """
        first, *later = config.models
        self._pairs = [(pair[0], pair[1]) for pair in pairwise.pairs or [[name, first] for name in later]]
        judge = pairwise.judge
        self._votes = read_votes(judge.votes, list(config.models)) if judge.votes is not None else None
        self._judge = Judge(judge, os.path.join(config.output, VERDICTS)) if judge.votes is None else None

    def comparisons(self, measured: Measured) -> list[Comparison]:
        """Of all pairs; `measured` has each model's answers."""
        found = []
        for model, against in self._pairs:
            if self._judge is None:
                found.append(voted(self._votes or [], model, against))
                continue
            logger.info(f"{model} against {against}: judging")
            pairs = answers_of_both(measured[model]["pairwise"]["answers"], measured[against]["pairwise"]["answers"])
            found.append(judged(self._judge, pairs, model, against))
        return found


def answers_of_both(first: Sequence[Mapping[str, str]], second: Sequence[Mapping[str, str]]) -> list[tuple[str, str, str]]:
    """(question, answer, answer)

    Raises:
        InputError: they were not asked the same
    """
    if [row["question"] for row in first] != [row["question"] for row in second]:
        raise InputError("pairwise.prompts: two models were asked different questions; remove the output and measure again")
    return [(one["question"], one["answer"], other["answer"]) for one, other in zip(first, second, strict=True)]


def judged(judge: Judge, pairs: Sequence[tuple[str, str, str]], model: str, against: str) -> Comparison:
    """By the model that judges."""
    try:
        verdicts = judge.verdicts(pairs)
    except JudgeError as error:
        return Comparison(model, against, missing=str(error))
    parsed = [verdict for verdict in verdicts if verdict.parsed]
    found = count_outcomes(model, against, [verdict.outcome for verdict in parsed])
    consistent = sum(verdict.consistent for verdict in parsed) / len(parsed) if parsed else None
    return dataclasses.replace(found, unparsed=len(verdicts) - len(parsed), consistent=consistent)


def voted(votes: Sequence[Vote], model: str, against: str) -> Comparison:
    """By people, the majority of each question."""
    by_question = votes_on(votes, model, against)
    if not by_question:
        return Comparison(model, against, missing="there are no votes on them")
    found = count_outcomes(model, against, [majority(list(outcomes.values())) for outcomes in by_question.values()])
    return dataclasses.replace(found, agreement=agreement(by_question))


def count_outcomes(model: str, against: str, outcomes: Sequence[Outcome]) -> Comparison:
    """Counts of outcomes."""
    wins, ties, losses = (outcomes.count(kind) for kind in ("win", "tie", "loss"))
    if not outcomes:
        return Comparison(model, against)
    rate = (wins + ties / 2) / len(outcomes)
    return Comparison(model, against, len(outcomes), wins, ties, losses, rate, wilson(rate, len(outcomes)))


def wilson(rate: float, number: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share. Where ties count half it is wider than it need be, for they vary less."""
    middle = (rate + Z**2 / (2 * number)) / (1 + Z**2 / number)
    half = Z / (1 + Z**2 / number) * (rate * (1 - rate) / number + Z**2 / (4 * number**2)) ** 0.5
    return max(0.0, middle - half), min(1.0, middle + half)


def comparisons_table(comparisons: Sequence[Comparison]) -> str:
    """In Markdown, with a line for each pair that could not be judged, and how far people agree."""
    header = ["model", "against", "wins", "ties", "losses", "win rate (95 %)"]
    extra = {
        "unparsed": any(item.unparsed for item in comparisons),
        "same in both orders": any(item.consistent is not None for item in comparisons),
        "agreement": any(item.agreement is not None for item in comparisons),
    }
    shown = [name for name, there in extra.items() if there]
    rows = [pair_row(item, shown) for item in comparisons]
    missing = [f"- {item.model} against {item.against}: not judged, {item.missing}" for item in comparisons if item.missing]
    return "\n\n".join([markdown_table([*header, *shown], rows), *(["\n".join(missing)] if missing else [])])


def pair_row(item: Comparison, shown: Sequence[str]) -> list[str]:
    """One pair."""
    rate = "-"
    if item.win_rate is not None and item.interval is not None:
        rate = f"{item.win_rate:.1%} ({item.interval[0]:.1%} to {item.interval[1]:.1%})"
    extra: dict[str, Any] = {
        "unparsed": str(item.unparsed),
        "same in both orders": "-" if item.consistent is None else f"{item.consistent:.1%}",
        "agreement": "-" if item.agreement is None else agreement_text(item.agreement),
    }
    counts = ["-"] * 3 if item.missing else [str(item.wins), str(item.ties), str(item.losses)]
    return [item.model, item.against, *counts, rate, *(extra[name] for name in shown)]


def agreement_text(found: Agreement) -> str:
    """Share and kappa."""
    kappa = "" if found.kappa is None else f", kappa {found.kappa:.2f}"
    return f"{found.share:.1%} of {found.pairs} pairs of votes{kappa}"
