"""Votes of people: who is a and who is b does not matter, and agreement is what it is by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_cpt.evaluation.votes import Agreement, Outcome, Vote, agreement, majority, read_votes, votes_on
from megatron_cpt.utils.errors import InputError


def write(path: Path, *rows: Any) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def vote(question: str, model_a: str, model_b: str, choice: str, annotator: str) -> dict[str, str]:
    return {"question": question, "model_a": model_a, "model_b": model_b, "vote": choice, "annotator": annotator}


def test_sides_do_not_matter(tmp_path: Path) -> None:
    rows = [vote("1", "x", "y", "a", "ann"), vote("1", "y", "x", "a", "bob"), vote("2", "y", "x", "b", "ann")]
    votes = read_votes(write(tmp_path / "votes.jsonl", *rows, vote("2", "x", "z", "tie", "ann")), ["x", "y", "z"])
    assert votes[0] == Vote("1", "x", "y", "a", "ann")
    assert votes_on(votes, "x", "y") == {"1": {"ann": "win", "bob": "loss"}, "2": {"ann": "win"}}
    assert votes_on(votes, "y", "x") == {"1": {"ann": "loss", "bob": "win"}, "2": {"ann": "loss"}}
    assert votes_on(votes, "z", "x") == {"2": {"ann": "tie"}}


@pytest.mark.parametrize(
    ("outcomes", "result"),
    [(["win", "win", "loss"], "win"), (["win", "loss"], "tie"), (["tie", "tie", "loss"], "loss"), (["tie"], "tie")],
)
def test_majority(outcomes: list[Outcome], result: Outcome) -> None:
    assert majority(outcomes) == result


def test_agreement_of_two() -> None:
    """Cohen's kappa by hand: they agree in 3 of 4; chance alone would be 1/2 * 3/4 + 1/2 * 1/4 = 1/2."""
    votes: dict[str, dict[str, Outcome]] = {
        "1": {"ann": "win", "bob": "win"},
        "2": {"ann": "win", "bob": "win"},
        "3": {"ann": "loss", "bob": "win"},
        "4": {"ann": "loss", "bob": "loss"},
        "5": {"ann": "win"},
    }
    assert agreement(votes) == Agreement(2, 4, 0.75, pytest.approx(0.5))


def test_agreement_of_three_is_the_mean_of_all_pairs() -> None:
    votes: dict[str, dict[str, Outcome]] = {
        "1": {"ann": "win", "bob": "win", "cy": "loss"},
        "2": {"ann": "loss", "bob": "loss", "cy": "win"},
    }
    found = agreement(votes)
    assert found is not None
    assert (found.annotators, found.pairs) == (3, 6)
    assert found.share == pytest.approx(1 / 3)
    assert found.kappa == pytest.approx((1 - 1 - 1) / 3)


def test_agreement_that_is_not_defined() -> None:
    assert agreement({"1": {"ann": "win"}, "2": {"bob": "win"}}) is None
    assert agreement({"1": {"ann": "win", "bob": "win"}}) == Agreement(2, 1, 1.0, None)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"question": "1"}], "row 1 has question; expected the texts question, model_a, model_b, vote, annotator"),
        ([[1]], "row 1 has list; expected the texts"),
        ([vote("1", "x", "y", "both", "ann")], "row 1: vote is 'both'; expected one of a, b, tie"),
        ([vote("1", "x", "w", "a", "ann")], "row 1: there is no model 'w'; expected one of x, y"),
        ([vote("1", "x", "x", "a", "ann")], "row 1: model_a and model_b are both 'x'"),
        ([vote("1", "x", "y", "a", "ann"), vote("1", "y", "x", "b", "ann")], "row 2: ann votes again on '1'"),
    ],
)
def test_wrong_votes(rows: list[Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        read_votes(write(tmp_path / "votes.jsonl", *rows), ["x", "y"])


@pytest.mark.parametrize(("name", "content"), [("votes.jsonl", ""), ("votes.json", "[]")])
def test_no_votes(name: str, content: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=rf"{name} holds no votes; expected a row or more"):
        read_votes(str(tmp_path / name), ["x", "y"])


def test_a_line_that_is_not_json(tmp_path: Path) -> None:
    (tmp_path / "votes.jsonl").write_text("{\n")
    with pytest.raises(InputError, match=r"votes\.jsonl, row 1: "):
        read_votes(str(tmp_path / "votes.jsonl"), ["x", "y"])
