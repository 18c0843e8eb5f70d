"""What a run shows: names are text, whatever is in them."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_cpt.training.log import RunLog, read_metrics
from megatron_cpt.training.validation import ValidationResult


def test_names_are_not_markup(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "[x]run"
    folder.mkdir()
    with RunLog(str(folder), active=True) as log:
        log.validation(3, [ValidationResult("zh [/b]", "zh", 2.5, 1.25, 100, 200)])
        log.say(f"saved {folder}")
    shown = capsys.readouterr().err
    assert "validation at step 3 | zh [/b] | loss 2.5000 | 1.2500 bits per byte" in shown
    assert f"saved {folder}" in shown
    assert read_metrics(str(folder))[0]["validation"]["zh [/b]"]["loss"] == 2.5


def test_other_ranks_say_and_write_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with RunLog(str(tmp_path / "run"), active=False) as log:
        log.say("something")
        log.metrics({"iteration": 1})
        log.ledger({})
    assert capsys.readouterr().err == ""
    assert not (tmp_path / "run").exists()
