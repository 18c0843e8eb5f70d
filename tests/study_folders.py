"""Folders of studies that nobody ran: what `run` leaves, written from results by formulas."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tiny_models import write_yaml

from megatron_cpt.study.config import StudyConfig
from megatron_cpt.study.grid import GridPoint, read_base, run_folder, write_configuration
from megatron_cpt.study.results import Results

TOKENS = 1_000_000


def write_base(folder: Path, **training: Any) -> str:
    """A configuration that a study can vary, and its mixture; corpora and checkpoint are not there."""
    corpora = {group: [{"prefix": f"data/{language}"}] for group, language in (("general", "en"), ("additional", "zh"))}
    sets = [{"name": language, "prefix": f"data/{language}_valid"} for language in ("en", "zh")]
    mixture = {"seq_length": 100, "seed": 1, "almr": 0.5, "validation": sets} | corpora
    base = {
        "mixture": write_yaml(folder / "mixture.yaml", mixture),
        "checkpoint": {"load": "model"},
        "training": {"train_tokens": TOKENS, "micro_batch_size": 8, "global_batch_size": 8} | training,
    }
    return write_yaml(folder / "base.yaml", base)


def write_folder(folder: Path, results: Results, **fields: Any) -> StudyConfig:
    """A study whose runs have found these results."""
    almrs, rates, seeds = (sorted({row[name] for row in results.rows}) for name in ("almr", "lr", "seed"))
    base = fields.pop("base", None) or write_base(folder)
    study = StudyConfig(base, str(folder / "study"), almrs, rates, TOKENS, seeds, **fields)
    for point in sorted({GridPoint(row["seed"], row["almr"], row["lr"]) for row in results.rows}):
        write_configuration(study, read_base(study), point)
        write_run(Path(run_folder(study.folder, point)), [row for row in results.rows if row["run"] == point.name])
        for row in results.rows:
            if row["run"] == point.name and row.get("score") is not None:
                path = folder / "study" / "scores" / point.name / f"iter_{row['iteration']:07d}.json"
                write_json(path, {"score": row["score"]})
    return study


def write_run(folder: Path, rows: list[dict[str, Any]]) -> None:
    """The files of one run from its rows of results."""
    languages = {"general": "en", "additional": "zh"}
    corpora = [{"group": group, "language": language} for group, language in languages.items()]
    planned = {"samples": TOKENS // 100, "seq_length": 100, "rows": corpora}
    segment = {"mixture": {"corpora": {language: {"bin_sha256": "0" * 64} for language in languages.values()}}}
    write_json(folder / "ledger.json", {"planned": planned, "segments": [segment]})
    write_json(folder / "outcome.json", {"kind": "finished", "reason": None, "seconds": 1.0, "wall_seconds": 2.0})
    write_json(folder / "status.json", {"state": "finished", "train_iters": rows[-1]["iteration"]})
    lines: list[dict[str, Any]] = []
    for row in rows:
        if row["iteration"]:
            step = {"iteration": row["iteration"], "consumed_tokens": row["tokens"], "loss": row["mixed"], "seconds": 0.1}
            lines.append(step | {"skipped": None})
        sets = {
            language: {"language": language, "loss": row[group], "bits_per_byte": row[group] / 2}
            for group, language in languages.items()
        }
        lines.append({"iteration": row["iteration"], "validation": sets})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
