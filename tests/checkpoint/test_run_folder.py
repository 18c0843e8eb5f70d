"""Whose results a folder holds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_cpt.checkpoint.run_folder import EVALUATION, FINE_TUNING, MEGATRON, MODEL, PRETRAINING, check_own_folder
from megatron_cpt.utils.errors import InputError

HELD = {
    "an HF model": (["config.json"], {}, MODEL),
    "converted weights": (["release/"], {}, MEGATRON),
    "a run": (["iter_0000004/"], {"kind": "pretrain"}, PRETRAINING),
    "a run that has not saved": ([], {"kind": "pretrain"}, PRETRAINING),
    "a copied checkpoint": (["iter_0000004/", "latest_checkpointed_iteration.txt"], {}, PRETRAINING),
    "a run in the folder that it began with": (["release/", "iter_0000004/"], {"kind": "pretrain"}, PRETRAINING),
    "SFT": (["checkpoint-5/"], {"settings": {}}, FINE_TUNING),
    "SFT that was killed before it began": (["data_report.json"], {}, FINE_TUNING),
    "another's file": (["report.md"], {}, "another report.md"),
    "nothing": ([], {}, None),
    "another's folder": (["notes.txt", "data/"], {}, None),
}


@pytest.mark.parametrize("own", [PRETRAINING, FINE_TUNING, EVALUATION])
@pytest.mark.parametrize("name", HELD)
def test_what_a_folder_holds(name: str, own: str, tmp_path: Path) -> None:
    names, run, held = HELD[name]
    for entry in names:
        (tmp_path / entry).mkdir() if entry.endswith("/") else (tmp_path / entry).write_text("{}")
    if run:
        (tmp_path / "run.json").write_text(json.dumps(run))
    if held in (None, own):
        check_own_folder(str(tmp_path), "save", own, ["report.md"])
    else:
        with pytest.raises(InputError, match=rf"^save is {tmp_path}, which holds {held}; expected a folder of its own$"):
            check_own_folder(str(tmp_path), "save", own, ["report.md"])


def test_a_damaged_record_of_a_run_is_told_by_its_checkpoints(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{")
    (tmp_path / "metrics.jsonl").write_text("")
    (tmp_path / "iter_0000004").mkdir()
    check_own_folder(str(tmp_path), "checkpoint.save", PRETRAINING, ["metrics.jsonl"])
