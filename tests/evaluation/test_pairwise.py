"""Win rates with their intervals, by a judge and by people; a judge that cannot be reached is reported, not guessed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from judges import judge_server

from megatron_cpt.config.cli import exit_on_input_error
from megatron_cpt.evaluation.config import EvaluateConfig, JudgeConfig, PairwiseConfig, PromptsConfig
from megatron_cpt.evaluation.pairwise import Comparison, PairwiseEvaluator, comparisons_table, count_outcomes, wilson
from megatron_cpt.evaluation.report import check_judged, evaluate
from megatron_cpt.evaluation.votes import Outcome
from megatron_cpt.utils.errors import InputError, RunError


def test_wilson_is_scipys() -> None:
    from scipy.stats import binomtest

    for wins, number in ((0, 5), (3, 7), (50, 50), (40, 100)):
        wanted = binomtest(wins, number).proportion_ci(method="wilson")
        assert wilson(wins / number, number) == pytest.approx((wanted.low, wanted.high), abs=1e-12)


def test_ties_count_half() -> None:
    outcomes: list[Outcome] = ["win", "win", "tie", "loss"]
    found = count_outcomes("x", "y", outcomes)
    assert (found.questions, found.wins, found.ties, found.losses, found.win_rate) == (4, 2, 1, 1, 0.625)
    assert found.interval == wilson(0.625, 4)
    assert count_outcomes("x", "y", []).win_rate is None


def answers(*texts: str) -> dict[str, Any]:
    pairs = [{"question": f"q{number}", "answer": text} for number, text in enumerate(texts)]
    return {"pairwise": {"prompts": [], "answers": pairs}}


def config(
    tmp_path: Path, judge: JudgeConfig, models: tuple[str, ...], pairs: list[list[str]] | None = None
) -> EvaluateConfig:
    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps([{"instruction": f"狗 {i}？", "output": "好"} for i in range(3)]))
    pairwise = PairwiseConfig(judge, [PromptsConfig(str(prompts), "zh")] if judge.url else [], pairs)
    return EvaluateConfig(output=str(tmp_path), models=dict.fromkeys(models, "nowhere"), pairwise=pairwise)


def longer(prompt: str) -> str:
    """Prefers the longer answer; says nothing of use where one is empty."""
    first, second = (prompt.split(f"[Answer of assistant {letter}]\n")[1].split("\n")[0] for letter in "AB")
    if not first or not second:
        return "I cannot say."
    return "[[A]]" if len(first) > len(second) else "[[B]]"


def test_a_judge_compares_every_later_model_with_the_first(tmp_path: Path) -> None:
    measured = {"x": answers("a", "bb", "c", "d"), "y": answers("aa", "b", "cc", ""), "z": answers("a", "bb", "c", "d")}
    with judge_server(longer) as server:
        wanted = config(tmp_path, JudgeConfig(url=server.url, model="wise"), ("x", "y", "z"))
        assert wanted.pairwise is not None
        found = PairwiseEvaluator(wanted, wanted.pairwise).comparisons(measured)
    assert [(item.model, item.against) for item in found] == [("y", "x"), ("z", "x")]
    assert (found[0].wins, found[0].ties, found[0].losses, found[0].unparsed, found[0].consistent) == (2, 0, 1, 1, 1.0)
    assert (found[1].ties, found[1].win_rate, found[1].unparsed) == (4, 0.5, 0)
    lines = comparisons_table(found).splitlines()
    assert lines[0].split("|")[-3].strip() == "unparsed"
    assert [cell.strip() for cell in lines[2].split("|")[1:6]] == ["y", "x", "2", "0", "1"]
    assert "66.7% (20.8% to 93.9%)" in lines[2]


def test_judges_of_no_use(tmp_path: Path) -> None:
    measured = {"x": answers("a", "bb"), "y": answers("aa", "b")}
    with judge_server(lambda prompt: "[[B]]") as server:
        wanted = config(tmp_path, JudgeConfig(url=server.url, model="biased"), ("x", "y"))
        assert wanted.pairwise is not None
        found = PairwiseEvaluator(wanted, wanted.pairwise).comparisons(measured)[0]
        assert (found.ties, found.win_rate, found.consistent) == (2, 0.5, 0.0)
    with judge_server(lambda prompt: "Lorem ipsum [A]") as server:
        wanted = config(tmp_path, JudgeConfig(url=server.url, model="garbage"), ("x", "y"))
        assert wanted.pairwise is not None
        found = PairwiseEvaluator(wanted, wanted.pairwise).comparisons(measured)[0]
        assert (found.questions, found.win_rate, found.unparsed, found.consistent) == (0, None, 2, None)
    with judge_server(longer, failures=1000) as server:
        wanted = config(tmp_path, JudgeConfig(url=server.url, model="ill", parallel=1), ("x", "y"))
        assert wanted.pairwise is not None
        missing = PairwiseEvaluator(wanted, wanted.pairwise).comparisons(measured)
    assert "503" in str(missing[0].missing)
    assert "- y against x: not judged, http://127.0.0.1" in comparisons_table(missing)


def test_people(tmp_path: Path) -> None:
    votes = tmp_path / "votes.jsonl"
    rows = [
        ("1", "a", "ann"),
        ("1", "a", "bob"),
        ("2", "tie", "ann"),
        ("2", "b", "bob"),
        ("3", "a", "ann"),
        ("3", "b", "bob"),
    ]
    names = ("question", "vote", "annotator")
    votes.write_text(
        "".join(json.dumps(dict(zip(names, row, strict=True)) | {"model_a": "y", "model_b": "x"}) + "\n" for row in rows)
    )
    wanted = config(tmp_path, JudgeConfig(votes=str(votes)), ("x", "y", "z"))
    assert wanted.pairwise is not None
    first, second = PairwiseEvaluator(wanted, wanted.pairwise).comparisons({})
    assert (first.wins, first.ties, first.losses) == (1, 1, 1)
    assert first.agreement is not None
    assert (first.agreement.share, first.agreement.pairs) == (pytest.approx(1 / 3), 3)
    assert second.missing == "there are no votes on them"
    assert "33.3% of 3 pairs of votes, kappa 0.14" in comparisons_table([first, second])


def test_a_report_with_a_judge(model: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with judge_server(longer) as server:
        wanted = config(tmp_path, JudgeConfig(url=server.url, model="wise"), ("base", "same"))
        wanted = replace(wanted, models={"base": model, "same": model}, max_new_tokens=4)
        page = Path(evaluate(wanted)).read_text()
        said = capfd.readouterr().err
        assert "base: pairwise" in said
        assert "| same  | base    | 0    | 3    | 0      | 50.0% (" in page
        report = json.loads((tmp_path / "report.json").read_text())
        assert report["pairwise"][0]["ties"] == 3
        assert report["settings"]["pairwise"]["judge"]["model"] == "wise"
        assert len(report["models"]["same"]["pairwise"]["answers"]) == 3
        # Another judge does not make models answer again; other prompts do
        assert wanted.pairwise is not None
        other = replace(wanted.pairwise, judge=JudgeConfig(url=server.url, model="wiser"))
        evaluate(replace(wanted, pairwise=other))
        assert "base: pairwise" not in capfd.readouterr().err
        fewer = [replace(prompts, max_prompts=2) for prompts in wanted.pairwise.prompts]
        evaluate(replace(wanted, pairwise=replace(wanted.pairwise, prompts=fewer)))
        assert "base: pairwise" in capfd.readouterr().err
        assert json.loads((tmp_path / "report.json").read_text())["pairwise"][0]["ties"] == 2


def test_a_report_without_its_judge(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All else is in it, scripts are told by the status, and the same command goes on."""
    measured = {"base": answers("a"), "other": answers("bb")}
    monkeypatch.setattr("megatron_cpt.evaluation.report.measure_models", lambda *_: measured)
    with judge_server(longer, failures=1, status=401) as server:
        wanted = config(tmp_path, JudgeConfig(url=server.url, model="wise", parallel=1), ("base", "other"))
        wanted = replace(wanted, models={"base": model, "other": model})
        path = tmp_path / "report.md"
        said = rf"1 of 1 pairs not judged \(other against base: .*401.*\); all else is in {path}; the same command"
        with pytest.raises(RunError, match=said):
            evaluate(wanted)
        assert "- other against base: not judged, http" in path.read_text()
        assert json.loads((tmp_path / "report.json").read_text())["models"] == measured
        assert evaluate(wanted) == str(path)
    assert "| other | base    | 1    | 0    | 0      | 100.0% (" in path.read_text()
    # Nobody has failed where people have not voted on two models
    people = replace(wanted, pairwise=PairwiseConfig(JudgeConfig(votes="votes.jsonl")))
    check_judged(people, [Comparison("other", "base", missing="there are no votes on them")], str(path))


KEY = "sk-proj-0123456789abcdef"


@pytest.mark.parametrize("failures", [0, 1000])
def test_a_key_that_the_judge_repeats_goes_nowhere(
    failures: int, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Neither on screen nor into any file, in whatever form the server answers."""
    measured = {"base": answers("a"), "other": answers("bb")}
    monkeypatch.setattr("megatron_cpt.evaluation.report.measure_models", lambda *_: measured)
    monkeypatch.setenv("JUDGE_KEY", KEY + "\n")  # as `export JUDGE_KEY=$(cat file)` in some shells
    with judge_server(longer, failures=failures, status=401, echo=True) as server:
        judge = JudgeConfig(url=server.url, model="wise", parallel=1, api_key_env="JUDGE_KEY")
        wanted = replace(config(tmp_path, judge, ("base", "other")), models={"base": model, "other": model})
        if failures:
            with pytest.raises(SystemExit):
                exit_on_input_error(lambda: evaluate(wanted))
        else:
            evaluate(wanted)
        assert set(server.keys) == {f"Bearer {KEY}"}
    said = capfd.readouterr()
    assert "[redacted]" in (said.err if failures else (tmp_path / "verdicts.jsonl").read_text())
    for text in (said.out, said.err, *(path.read_text() for path in tmp_path.rglob("*") if path.is_file())):
        assert KEY not in text


def test_a_url_with_a_password_is_refused() -> None:
    with pytest.raises(InputError, match=r"pairwise\.judge\.url is ") as refusal:
        JudgeConfig(url="https://user:hunter2@judge.example/v1", model="wise")
    assert "hunter2" not in str(refusal.value)
    with pytest.raises(InputError) as refusal:
        JudgeConfig(url="https://judge.example/v1?api_key=hunter2hunter2", model="wise")
    assert "hunter2" not in str(refusal.value)


def test_wrong_comparisons(tmp_path: Path) -> None:
    judge = JudgeConfig(url="http://localhost:1/v1", model="wise")
    with pytest.raises(InputError, match="has url None and votes None"):
        JudgeConfig()
    with pytest.raises(InputError, match="an endpoint needs both"):
        JudgeConfig(url="http://localhost:1/v1")
    with pytest.raises(InputError, match=r"pairwise\.prompts is empty"):
        PairwiseConfig(judge)
    with pytest.raises(InputError, match="models has 1; expected two or more"):
        config(tmp_path, judge, ("x",))
    for pair in (["x"], ["x", "x"], ["x", "w"]):
        with pytest.raises(InputError, match=r"pairwise\.pairs has .*; expected two names of x, y"):
            config(tmp_path, judge, ("x", "y"), [pair])
