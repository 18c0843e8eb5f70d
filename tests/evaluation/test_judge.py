"""A judge is asked in both orders, once; what is no verdict is told; a server that fails is asked again."""

from __future__ import annotations

import json
import re
import socket
from pathlib import Path

import pytest
from judges import judge_server

from megatron_cpt.evaluation.config import JudgeConfig
from megatron_cpt.evaluation.judge import JUDGE_PROMPT, Judge, JudgeError, PairVerdict, filled, parse_verdict, read_said
from megatron_cpt.utils.errors import InputError

PAIRS = [("How are you?", "good", "bad"), ("And now?", "bad", "good"), ("Still?", "fine", "fine"), ("Well?", "bad", "poor")]


def prefers_good(prompt: str) -> str:
    """By what the answers are, not where."""
    answers = re.findall(r"\[Answer of assistant ([AB])\]\n(.*)\n", prompt)
    good = [letter for letter, answer in answers if answer == "good"]
    return f"Because. [[{good[0] if good else 'C'}]]"


def config(url: str) -> JudgeConfig:
    return JudgeConfig(url=url, model="wise", parallel=2)


def test_both_orders_have_to_agree(tmp_path: Path) -> None:
    with judge_server(prefers_good) as server:
        verdicts = Judge(config(server.url), str(tmp_path / "verdicts.jsonl")).verdicts(PAIRS)
    assert [verdict.outcome for verdict in verdicts] == ["win", "loss", "tie", "tie"]
    assert all(verdict.consistent for verdict in verdicts)
    assert len(server.requests) == 6  # answers that are the same need no judge
    assert {(body["model"], body["temperature"]) for body in server.requests} == {("wise", 0.0)}


def test_a_judge_that_goes_by_the_place_makes_ties(tmp_path: Path) -> None:
    with judge_server(lambda prompt: "[[A]]") as server:
        verdicts = Judge(config(server.url), str(tmp_path / "verdicts.jsonl")).verdicts(PAIRS[:2])
    assert verdicts == [PairVerdict("A", "A")] * 2
    assert [(verdict.outcome, verdict.parsed, verdict.consistent) for verdict in verdicts] == [("tie", True, False)] * 2


def test_nothing_is_asked_twice(tmp_path: Path) -> None:
    path = tmp_path / "verdicts.jsonl"
    with judge_server(prefers_good) as server:
        first = Judge(config(server.url), str(path)).verdicts(PAIRS)
        asked = len(server.requests)
        assert Judge(config(server.url), str(path)).verdicts(PAIRS) == first
        assert len(server.requests) == asked
        Judge(config(server.url), str(path)).verdicts([("How are you?", "good", "another")])
        assert len(server.requests) == asked + 2
        # A kill has cut the last line off: only that is asked again
        path.write_bytes(path.read_bytes()[:-30])
        again = Judge(config(server.url), str(path))
        again.verdicts([("How are you?", "good", "another"), *PAIRS])
        assert len(server.requests) == asked + 3
    assert len(read_said(str(path))) == asked + 2
    row = json.loads(path.read_text().splitlines()[0])
    assert (row["judge"]["model"], row["verdict"]) == ("wise", parse_verdict(row["said"]))


def test_a_server_that_fails_twice_is_asked_again(tmp_path: Path) -> None:
    with judge_server(prefers_good, failures=2) as server:
        verdicts = Judge(config(server.url), str(tmp_path / "verdicts.jsonl")).verdicts(PAIRS[:1])
    assert verdicts[0].outcome == "win"
    assert len(server.requests) == 4


def test_a_server_that_never_answers_is_waited_for_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_cpt.evaluation.judge.RETRIES", 1)
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}/v1"
        judge = Judge(JudgeConfig(url=url, model="wise", parallel=1, timeout=0.3), str(tmp_path / "verdicts.jsonl"))
        said = r"/v1: asked 2 times for a verdict, each time for up to 0\.3 s \(pairwise\.judge\.timeout\), \d+ s in all"
        for _ in range(2):  # of the next pair of models it is not asked
            with pytest.raises(JudgeError, match=said + ", without an answer: Request timed out"):
                judge.verdicts(PAIRS)
        server.settimeout(0.2)
        for _ in range(2):
            server.accept()[0].close()
        with pytest.raises(TimeoutError):
            server.accept()


@pytest.mark.parametrize("timeout", [0.0, -1.0, float("inf"), float("nan")])
def test_a_wrong_timeout(timeout: float) -> None:
    with pytest.raises(InputError, match=r"timeout is .*; expected a number of seconds above 0"):
        JudgeConfig(url="http://localhost:1/v1", model="wise", timeout=timeout)


def test_a_server_that_always_fails_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "verdicts.jsonl"
    with judge_server(prefers_good, failures=1000) as server, pytest.raises(JudgeError, match=r"/v1: .*503.*busy"):
        Judge(config(server.url), str(path)).verdicts(PAIRS[:1])
    assert not path.exists()
    with judge_server(prefers_good, failures=1, status=401) as server, pytest.raises(JudgeError, match="401"):
        Judge(JudgeConfig(url=server.url, model="wise", parallel=1), str(path)).verdicts(PAIRS[:1])
    assert len(server.requests) == 1  # a wrong key does not become right
    with (
        judge_server(prefers_good, failures=1000, status=200) as server,
        pytest.raises(JudgeError, match="no chat completion"),
    ):
        Judge(config(server.url), str(path)).verdicts(PAIRS[:1])


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b'{"choices": [',
        b"\xff",
        b"null",
        b'{"choices": 5}',
        b'{"choices": [null]}',
        b'{"choices": ["no"]}',
        b'{"choices": [{}]}',
        b'{"choices": [{"message": null}]}',
        b'{"choices": [{"message": {"content": ["no"]}}]}',
    ],
)
def test_what_is_no_chat_completion_is_reported(tmp_path: Path, body: bytes) -> None:
    path = tmp_path / "verdicts.jsonl"
    with judge_server(prefers_good, body=body) as server, pytest.raises(JudgeError, match="no chat completion"):
        Judge(config(server.url), str(path)).verdicts(PAIRS[:1])
    assert not path.exists()


def test_half_a_character_is_written_down(tmp_path: Path) -> None:
    path = tmp_path / "verdicts.jsonl"
    with judge_server(lambda prompt: "\ud800 [[C]]") as server:
        verdicts = Judge(config(server.url), str(path)).verdicts(PAIRS[:1])
    assert verdicts[0].outcome == "tie"
    assert set(read_said(str(path)).values()) == {"? [[C]]"}


def test_lines_that_hold_no_verdict_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "verdicts.jsonl"
    path.write_text('5\n{}\nnull\n[]\n{"key": "a", "said": "[[A]]"}\n{"key": "b", "sa')
    assert read_said(str(path)) == {"a": "[[A]]"}


def test_the_key_comes_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(tmp_path / "verdicts.jsonl")
    with judge_server(prefers_good) as server:
        wanted = JudgeConfig(url=server.url, model="wise", api_key_env="JUDGE_KEY")
        monkeypatch.delenv("JUDGE_KEY", raising=False)
        with pytest.raises(InputError, match="api_key_env is JUDGE_KEY, which is not set"):
            Judge(wanted, path)
        monkeypatch.setenv("JUDGE_KEY", "secret")
        Judge(wanted, path).verdicts(PAIRS[:1])
    assert set(server.keys) == {"Bearer secret"}
    assert "secret" not in Path(path).read_text()


@pytest.mark.parametrize(
    ("said", "verdict"),
    [("Good. [[A]]", "A"), ("[[C]] and again [[C]]", "C"), ("[[A]] or [[B]]", None), ("A is better", None), ("", None)],
)
def test_a_verdict_is_never_guessed(said: str, verdict: str | None) -> None:
    assert parse_verdict(said) == verdict


def test_texts_are_filled_in_as_they_are() -> None:
    texts = {"question": "What is {answer_b}?", "answer_a": "{question}", "answer_b": r"\1 {}"}
    assert filled("{question}|{answer_a}|{answer_b}", texts) == r"What is {answer_b}?|{question}|\1 {}"
    assert "What is {answer_b}?" in filled(JUDGE_PROMPT, texts)


def test_another_prompt(tmp_path: Path) -> None:
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("{question} / {answer_a}")
    wanted = JudgeConfig(url="http://localhost:1/v1", model="wise", prompt=str(prompt))
    with pytest.raises(InputError, match=r"prompt\.txt has no \{answer_b\}"):
        Judge(wanted, str(tmp_path / "verdicts.jsonl"))
    prompt.write_bytes(b"\xff")
    with pytest.raises(InputError, match=r"prompt\.txt, which is no text in UTF-8"):
        Judge(wanted, str(tmp_path / "verdicts.jsonl"))
    prompt.write_text("Q {question} A {answer_a} B {answer_b}")
    with judge_server(lambda text: "[[A]]" if "A good" in text else "[[B]]") as server:
        own = JudgeConfig(url=server.url, model="wise", prompt=str(prompt))
        assert Judge(own, str(tmp_path / "verdicts.jsonl")).verdicts(PAIRS[:1])[0].outcome == "win"
    assert server.requests[0]["messages"][0]["content"].startswith("Q How are you?")
