"""Every option that a command of almr_study.py has beside the study's own settings arrives where it acts."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from every_setting import settings_of

from megatron_cpt.config.cli import run_tool
from megatron_cpt.study import commands, propose
from megatron_cpt.study.config import StudyConfig

STUDY = ["--base=base.yaml", "--folder=FOLDER", "--almr=[0,1]", "--lr=[1e-4]", "--train_tokens=10"]
# command, option -> value, and what the stand-ins have seen of it
ROWS: dict[tuple[str, str], tuple[str, Any]] = {
    ("PlanOptions", "adaptive"): ("3", ("proposed", 3)),
    ("RunOptions", "only"): ("name", ("only", "name")),
    **{(command, "frontier_axis"): ("lr", ("axis", "lr")) for command in ("FitOptions", "PlotOptions")},
    **{(command, "tolerance"): ("0.3", ("tolerance", 0.3)) for command in ("FitOptions", "PlotOptions")},
    **{(command, "token_budget"): ("77", ("budget", 77)) for command in ("FitOptions", "PlotOptions")},
    ("ChooseOptions", "max_general_rise"): ("0.2", ("choice", (0.2, 0.9, None))),
    ("ChooseOptions", "confidence"): ("0.6", ("choice", (0.01, 0.6, None))),
    ("ChooseOptions", "goal"): ("additional", ("choice", (0.01, 0.9, "additional"))),
    ("ChooseOptions", "target"): ("large.yaml", ("target", "large.yaml")),
}
COMMANDS = {
    "PlanOptions": commands.plan_study,
    "RunOptions": commands.run_study,
    "FitOptions": commands.fit_command,
    "PlotOptions": commands.plot,
    "ChooseOptions": commands.choose_command,
}
OPTIONS = sorted(
    (name, option) for name in COMMANDS for option in settings_of(getattr(commands, name)) - settings_of(StudyConfig)
)


@pytest.mark.parametrize(("command", "option"), OPTIONS)
def test_an_option_arrives(command: str, option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    value, (name, expected) = ROWS[command, option]
    seen: dict[str, Any] = {}
    stand_in(monkeypatch, seen)
    run_tool(COMMANDS[command], getattr(commands, command), "", [*STUDY, f"--{option}={value}"])
    assert seen[name] == expected


def stand_in(patch: pytest.MonkeyPatch, seen: dict[str, Any]) -> None:
    """What reads, fits, draws and writes."""
    found = commands.Fit({}, None, "balanced", None, [], {}, [])

    def fit(results: Any, axis: str, tolerance: float, laws: bool = True) -> Any:
        seen.update(axis=axis, tolerance=tolerance)
        return dataclasses.replace(found)

    def note(name: str, place: int, answer: Any) -> Any:
        return lambda *given, **_: (seen.update({name: given[place]}), answer)[1]

    rows = SimpleNamespace(rows=[{"lr": 1e-4}], last=lambda name: [{"lr": 1e-4}])
    answers = {"read_base": None, "collect": rows, "write_all_results": None, "write_fit": "fit.json", "grid_points": []}
    answers |= {"read_proposed": [], "make_plan": None, "plan_table": "", "show_choice": None, "write_html_report": "page"}
    for name, answer in answers.items():
        patch.setattr(commands, name, lambda *_, answer=answer: answer)
    patch.setattr(commands, "write_proposed", lambda *_: None)
    patch.setattr(commands, "run_only", note("only", 2, "run"))
    patch.setattr(commands, "fit_study", fit)
    patch.setattr(commands, "fit_for_choice", lambda *_: found)
    patch.setattr(commands, "predict_critical_ratios", note("budget", 3, []))
    patch.setattr(commands, "choose", lambda *given: seen.update(choice=given[2:]))
    patch.setattr(commands, "write_choice", note("target", 2, str(Path("run.yaml"))))
    patch.setattr(propose, "propose", note("proposed", 2, []))
    patch.setattr("megatron_cpt.study.figures.save_all", lambda *_: [])
