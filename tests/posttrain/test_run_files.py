"""Files that are missing are named together with wrong settings."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import ROOT

from megatron_cpt.posttrain.run_files import check_data


@pytest.mark.parametrize("tool", ["finetune_sft.py", "finetune_dpo.py"])
def test_missing_files_and_wrong_settings_at_once(tmp_path: Path, tool: str) -> None:
    """At once: torch is not imported."""
    (tmp_path / "run.yaml").write_text("data: {sources: [{path: nothing.jsonl, language: en}]}\n")
    wrong = ["--model", "nothere", "--data.chat_template", "nofile", "--optimizer.lr", "-1", "--training.epochs", "0"]
    command = [sys.executable, "-X", "importtime", str(ROOT / "tools" / tool), "--config", str(tmp_path / "run.yaml")]
    result = subprocess.run([*command, "--save", str(tmp_path / "run"), *wrong], capture_output=True, text=True)
    assert result.returncode == 2
    said = [line.removeprefix("error: ") for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert [line.split(";")[0] for line in said] == [
        "training.epochs is 0.0",
        "optimizer.lr is -1.0",
        "model is nothere, which has no config.json",
        "nothing.jsonl: no such file",
        "chat_template is nofile, no file",
    ]
    imported = set(re.findall(r"\|\s+([\w.]+)$", result.stderr, re.MULTILINE))
    assert "megatron_cpt.posttrain.run_files" in imported
    assert "torch" not in imported


def test_other_files_of_the_same_size_are_two(tmp_path: Path) -> None:
    for name, text in (("a", "[1]"), ("b", "[2]"), ("c", "")):
        (tmp_path / name).write_text(text)
    a, b, c = (str(tmp_path / name) for name in "abc")
    check_data([a, c], [b], True)
    check_data([a, a], [b], True)
    check_data([a, a], [], False)
