"""Numbers of fixed tiny runs, kept in golden.json: a change of what training computes cannot go unnoticed.

python tests/training/golden.py            compare
python tests/training/golden.py --write    replace golden.json, and print what changed (old, new, relative difference)

The inputs are made by code of this repository from fixed seeds; their checksums are kept, too, so that a difference can be
told to come from them (another version of torch or of tokenizers) or from training.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

from metrics_rows import clockless
from tiny_models import VARIANTS
from tiny_runs import Runs
from tiny_tokenizer import make_tiny_tokenizer

from megatron_cpt.config.lr import LrConfig
from megatron_cpt.config.run import (
    CheckpointConfig,
    DataConfig,
    OptimizerConfig,
    RunConfig,
    TrainingConfig,
    ValidationConfig,
)
from megatron_cpt.convert.megatron_weights import open_megatron
from megatron_cpt.training.pretrain import setup

PATH = Path(__file__).with_name("golden.json")
DIGITS = 8  # significant digits that are kept
TOLERANCE = 1e-5  # relative; other processors and libraries add up in another order, which shows in the seventh digit
DATA = {
    "whole samples": DataConfig(),
    "packed documents": DataConfig(reset_attention_mask=True, eod_mask_loss=True),
}
Values = dict[str, Any]


def compute() -> dict[str, Values]:
    """What golden.json should say: {"inputs": checksums, name of a run: {where: value}}."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer = folder / "tokenizer"
        tokenizer.mkdir()
        runs = Runs(folder, make_tiny_tokenizer(tokenizer), **VARIANTS["llama3_rope"])
        found: dict[str, Values] = {"inputs": checksums(folder)}
        for number, (title, data) in enumerate(DATA.items()):
            config = RunConfig(
                mixture=runs.mixture,
                checkpoint=CheckpointConfig(load=str(folder / "megatron"), save=str(folder / f"run-{number}")),
                training=TrainingConfig(train_iters=8, micro_batch_size=2, global_batch_size=8),
                data=data,
                optimizer=OptimizerConfig(lr=3e-3, min_lr=1e-4, weight_decay=0.1),
                lr=LrConfig(decay_style="cosine", warmup_iters=2),
                validation=ValidationConfig(eval_interval=4),
            )
            setup(config)
            found[title] = flatten(clockless(folder / f"run-{number}"))
        return found


def checksums(folder: Path) -> Values:
    """Of the text, as token ids, and of the weights the runs begin with."""
    text = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*.bin"))}
    tensors = open_megatron(str(folder / "megatron" / "release"))
    weights = hashlib.sha256()
    for name in sorted(tensors):
        weights.update(name.encode() + tensors[name].contiguous().numpy().tobytes())
    return text | {"weights": weights.hexdigest()}


def flatten(rows: list[dict[str, Any]]) -> Values:
    """Rows of metrics.jsonl -> {"step 3 loss": 1.2345678, ...}."""
    values: Values = {}
    for row in rows:
        for key in ("loss", "grad_norm", "lr"):
            if key in row:
                values[f"step {row['iteration']} {key}"] = rounded(row[key])
        for name, result in row.get("validation", {}).items():
            for key in ("loss", "bits_per_byte", "tokens", "text_bytes"):
                values[f"validation at step {row['iteration']} {name} {key}"] = rounded(result[key])
    return values


def rounded(value: float) -> float:
    """To the digits that are kept; counts stay whole."""
    return value if isinstance(value, int) else float(f"{value:.{DIGITS - 1}e}")


def relative_difference(old: Any, new: Any) -> float:
    """Infinite where one is missing or they are no numbers and differ."""
    if old == new:
        return 0.0
    if not isinstance(old, (int, float)) or not isinstance(new, (int, float)):
        return float("inf")
    return abs(new - old) / max(abs(old), 1e-300)


def differences(old: dict[str, Values], new: dict[str, Values], tolerance: float) -> list[str]:
    """A line for each value that differs by more than the tolerance: where, old, new, relative difference."""
    lines = []
    for title in {**old, **new}:
        before, after = old.get(title, {}), new.get(title, {})
        for where in {**before, **after}:
            pair = before.get(where), after.get(where)
            difference = relative_difference(*pair)
            if difference > tolerance:
                lines.append(f"{title}: {where}: {pair[0]} -> {pair[1]} ({difference:.2e})")
    return lines


def main() -> int:
    """Compare or write; exit status 1 if they differ and nothing was written."""
    write = sys.argv[1:] == ["--write"]
    if sys.argv[1:] and not write:
        print(__doc__, file=sys.stderr)
        return 2
    old = json.loads(PATH.read_text(encoding="utf-8")) if PATH.exists() else {}
    new = compute()
    changed = differences(old, new, 0.0 if write else TOLERANCE)
    print("\n".join(changed) if changed else "nothing has changed")
    if write:
        PATH.write_text(json.dumps(new, indent=1) + "\n", encoding="utf-8")
        print(PATH)
    return 1 if changed and not write else 0


if __name__ == "__main__":
    sys.exit(main())
