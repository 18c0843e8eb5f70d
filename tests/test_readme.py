"""The README's commands work, in the order in which they stand there."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from tiny_models import ROOT, make_tiny_llama

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_commands_of_the_readme(tmp_path: Path, tiny_tokenizer_dir: str) -> None:
    make_tiny_llama(tmp_path / "Llama-tiny", tiny_tokenizer_dir)
    (tmp_path / "corpus").mkdir()
    texts = {
        "en": "The quick brown fox jumps over the lazy dog. ",
        "zh": "今天天气很好，我们去公园散步。",
        "zh_valid": "持续预训练。",
    }
    for name, text in texts.items():
        lines = [json.dumps({"text": text * (3 + i % 7)}, ensure_ascii=False) for i in range(40)]
        (tmp_path / "corpus" / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (tmp_path / "tools").symlink_to(ROOT / "tools")
    mixture, pretrain = re.findall(r"```yaml\n(.*?)```", README, flags=re.S)
    (tmp_path / "mixture.yaml").write_text(mixture)
    (tmp_path / "pretrain.yaml").write_text(pretrain)

    blocks = re.findall(r"<!-- test -->\n```bash\n(.*?)```", README, flags=re.S)
    assert len(blocks) == 6
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for command in "".join(blocks).splitlines():
        result = subprocess.run(
            ["bash", "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
        )
        assert result.returncode == 0, f"{command}\n{result.stderr[-4000:]}"
    rows = [json.loads(line) for line in (tmp_path / "checkpoints/run/metrics.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in rows if "loss" in row] == list(range(1, 11))
    assert (tmp_path / "checkpoints/run/report.png").exists()
    assert result.stdout.startswith("The quick brown fox")


def test_the_steps_without_make_are_those_of_the_makefile() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for piece in (
        "--constraint constraints.txt torch",
        "--constraint constraints.txt --editable '.[dev,quickstart,curate]'",
        "examples/quickstart/quickstart.sh",
        '-m pytest -m "not slow and not gpu and not slurm"',
    ):
        assert piece in README
        assert piece in makefile


def test_every_file_the_readme_names_is_there() -> None:
    for name in re.findall(r"`((?:tests|megatron_cpt)/[\w/.]+)`|\]\((docs/[\w.]+)\)", README):
        assert (ROOT / (name[0] or name[1])).exists(), name
