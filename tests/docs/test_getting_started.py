"""The commands of the page for beginners work, in the order in which they stand there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from pages import blocks
from tiny_models import ROOT, make_tiny_llama

PAGE = ROOT / "docs/getting_started.md"


def test_the_commands_step_by_step(tmp_path: Path, tiny_tokenizer_dir: str) -> None:
    inputs, runs = tmp_path / "runs/quickstart/inputs", tmp_path / "runs/first"
    make_tiny_llama(inputs / "hf", tiny_tokenizer_dir)
    texts = {
        "en_train": "The quick brown fox jumps over the lazy dog. ",
        "zh_train": "今天天气很好，我们去公园散步。",
        "zh_valid": "持续预训练。",
    }
    for name, text in texts.items():
        lines = [json.dumps({"text": text * (30 + i % 7)}, ensure_ascii=False) for i in range(40)]
        (inputs / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (tmp_path / "tools").symlink_to(ROOT / "tools")
    runs.mkdir()
    mixture, pretrain = (block.text for block in blocks(PAGE) if block.language == "yaml")
    (runs / "mixture.yaml").write_text(mixture)
    (runs / "pretrain.yaml").write_text(pretrain)

    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    written = {}
    for block in blocks(PAGE):
        for command in block.commands() if block.mark == "test" else ():
            result = subprocess.run(
                ["bash", "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
            )
            assert result.returncode == 0, f"{block}: {command}\n{result.stderr[-4000:]}"
            written[command] = result.stdout
    rows = [json.loads(line) for line in (runs / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in rows if "loss" in row] == list(range(1, 11))
    assert (runs / "run/report.png").exists()
    (answer,) = (text for command, text in written.items() if "chat.py" in command)
    assert answer.startswith("The quick brown fox")


def test_the_steps_without_make_are_those_of_the_makefile() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    page = PAGE.read_text(encoding="utf-8")
    for piece in (
        "--constraint constraints.txt torch",
        "--constraint constraints.txt --editable '.[dev,quickstart,curate]'",
        "examples/quickstart/quickstart.sh",
        '-m pytest -m "not slow and not gpu and not slurm"',
    ):
        assert piece in page
        assert piece in makefile
