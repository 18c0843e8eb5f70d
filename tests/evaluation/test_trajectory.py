"""Checkpoints of a run are measured once each, also after the run has removed them, and leave no conversion behind."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_models import make_tiny_llama

from megatron_cpt.checkpoint.checksums import checksums_in, sealed
from megatron_cpt.convert.config import HfToMegatron, MegatronToHf
from megatron_cpt.convert.convert import hf_to_megatron, megatron_to_hf
from megatron_cpt.evaluation.config import EvaluateConfig, TextConfig, TrajectoryCheckpoint, TrajectoryConfig
from megatron_cpt.evaluation.report import evaluate, only_evaluation
from megatron_cpt.evaluation.trajectory import checkpoints_of, removed_points
from megatron_cpt.utils.errors import InputError

SEQ_LENGTH, SAMPLES = 64, 8  # samples of each iteration


@pytest.fixture
def run(model: str, tmp_path: Path, tiny_tokenizer_dir: str) -> Path:
    """What a run leaves: checkpoints at 2, 4 and 5, of which the last has other weights."""
    other = make_tiny_llama(tmp_path / "other", tiny_tokenizer_dir, initializer_range=0.5, tie_word_embeddings=True)
    folder = tmp_path / "run"
    for iteration, hf in ((2, model), (4, model), (5, other)):
        made = Path(hf_to_megatron(HfToMegatron(hf, str(tmp_path / f"megatron{iteration}"), num_workers=1)))
        checkpoint = folder / f"iter_{iteration:07d}"
        shutil.move(made, checkpoint)
        path = checkpoint / "manifest.json"
        manifest = json.loads(path.read_text())
        path.write_text(json.dumps(sealed(manifest | manifest_of_run(iteration), checksums_in(manifest))))
    return folder


def manifest_of_run(iteration: int) -> dict[str, Any]:
    return {
        "iteration": iteration,
        "consumed_samples": iteration * SAMPLES,
        "data": {"segments": [{"mixture": {"seq_length": SEQ_LENGTH}}]},
        "config": {},
        "training": {"lr_schedule": {}, "history": {}, "baseline": {}, "evaluated": True},
    }


@pytest.fixture
def config(run: Path, tmp_path: Path) -> EvaluateConfig:
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"The dog runs {i}."}) + "\n" for i in range(3)))
    return EvaluateConfig(
        output=str(tmp_path / "out"), text=[TextConfig(str(text), "en")], trajectory=TrajectoryConfig(str(run))
    )


def points(output: str) -> dict[int, Any]:
    return {row["iteration"]: row for row in json.loads((Path(output) / "trajectory.json").read_text())["checkpoints"]}


def test_each_checkpoint_is_measured_once(
    config: EvaluateConfig, model: str, run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    page = Path(evaluate(config))
    found = points(config.output)
    assert list(found) == [2, 4, 5]
    assert found[4]["tokens"] == 4 * SAMPLES * SEQ_LENGTH
    # What is measured is the checkpoint: the same as the HF folder that it came from
    evaluate(replace(config, models={"base": model}, trajectory=None, output=config.output + "-model"))
    base = json.loads((Path(config.output + "-model") / "report.json").read_text())["models"]["base"]
    assert found[2]["text"] == found[4]["text"] == base["text"]
    assert found[5]["text"] != found[4]["text"]
    with open(Path(config.output) / "trajectory.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["iteration"] for row in rows] == ["2", "4", "5"]
    assert float(rows[2]["bits per byte, en"]) == found[5]["text"]["en"]["bits_per_byte"]
    assert "![trajectory](trajectory.png)" in page.read_text()
    assert (page.parent / "trajectory.png").read_bytes().startswith(b"\x89PNG")
    assert not (page.parent / "trajectory" / ".hf").exists()
    # One that the run has removed stays; nothing is measured again but what has changed
    capfd.readouterr()
    shutil.rmtree(run / "iter_0000002")
    left = page.parent / "trajectory" / ".hf"
    left.mkdir()  # by a kill
    manifest = run / "iter_0000005" / "manifest.json"
    manifest.write_text(manifest.read_text() + "\n")
    evaluate(config)
    said = capfd.readouterr().err
    assert [line for line in said.splitlines() if ": text" in line] == ["iteration 5: text: en"]
    assert points(config.output) == found
    assert not left.exists()
    # Of what is new there is nothing of the removed one
    more = replace(config, text=[*config.text, replace(config.text[0], language="fr")])
    evaluate(more)
    said = capfd.readouterr().err
    measured = [line for line in said.splitlines() if ": text" in line]
    assert measured == ["iteration 4: text: fr", "iteration 5: text: fr"]
    assert {iteration: list(row["text"]) for iteration, row in points(config.output).items()} == {
        2: ["en"],
        4: ["en", "fr"],
        5: ["en", "fr"],
    }
    # With other settings the removed one is unknown
    evaluate(replace(config, max_length=16))
    assert list(points(config.output)) == [4, 5]


def test_what_was_measured_of_others_is_not_of_this_run(config: EvaluateConfig, model: str, run: Path) -> None:
    """A run keeps its newest checkpoint: what was measured of later ones belongs to a part that was taken back."""
    evaluate(config)
    found = points(config.output)
    shutil.rmtree(run / "iter_0000004")
    given = TrajectoryConfig(str(run), checkpoints=[TrajectoryCheckpoint(4, str(run.parent / "other"))])
    evaluate(replace(config, trajectory=given))
    assert points(config.output)[4]["text"] == found[5]["text"], "what is given goes before what was there"
    with pytest.raises(InputError, match=r"trajectory\.checkpoints has iteration 2, and so has "):
        evaluate(replace(config, trajectory=replace(given, checkpoints=[TrajectoryCheckpoint(2, model)])))
    shutil.rmtree(run / "iter_0000005")
    evaluate(config)
    assert list(points(config.output)) == [2]


def test_one_evaluation_at_a_time(config: EvaluateConfig) -> None:
    with only_evaluation(str(Path(config.output).parent)):
        lock = "import sys; from megatron_cpt.evaluation.report import only_evaluation as only\nwith only(sys.argv[1]): pass"
        other = [sys.executable, "-c", lock, str(Path(config.output).parent)]
        done = subprocess.run(other, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert "another evaluation is under way in" in done.stderr


def test_which_checkpoints(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert list(checkpoints_of(str(run), None)) == [2, 4, 5]
    assert list(checkpoints_of(str(run), 4)) == [4, 5]
    (run / "iter_0000004" / "common.pt").unlink()
    assert list(checkpoints_of(str(run), 2)) == [2, 5]
    assert "left out: checkpoint" in capfd.readouterr().err


def test_a_run_that_removes_a_checkpoint_meanwhile(
    config: EvaluateConfig, run: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def converted(config: MegatronToHf) -> str:
        if config.megatron.endswith("4"):
            shutil.rmtree(config.megatron)
        return megatron_to_hf(config)

    monkeypatch.setattr("megatron_cpt.evaluation.trajectory.megatron_to_hf", converted)
    evaluate(config)
    assert list(points(config.output)) == [2, 5]
    assert f"left out: {run / 'iter_0000004'} has been removed by its run" in capfd.readouterr().err
    # One that is damaged is an error
    weights = next((run / "iter_0000005").glob("*.distcp"))
    weights.write_bytes(bytes(weights.stat().st_size))
    (run / "iter_0000005" / "manifest.json").write_text(json.dumps(manifest_of_run(5)))
    with pytest.raises((InputError, OSError), match="iter_0000005"):
        evaluate(config)
    assert not (Path(config.output) / "trajectory" / ".hf").exists()


def test_hf_folders_beside_a_run(config: EvaluateConfig, model: str, run: Path) -> None:
    trajectory = TrajectoryConfig(str(run), 5, [TrajectoryCheckpoint(0, model, 0), TrajectoryCheckpoint(3, model)])
    evaluate(replace(config, trajectory=trajectory))
    found = points(config.output)
    assert {iteration: row["tokens"] for iteration, row in found.items()} == {0: 0, 3: None, 5: 5 * SAMPLES * SEQ_LENGTH}
    assert found[0]["text"] == found[3]["text"]


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"identity": {"model": {}}}'])
def test_damaged_measurements_are_named(config: EvaluateConfig, run: Path, content: str) -> None:
    folder = Path(config.output, "trajectory")
    folder.mkdir(parents=True)
    (folder / "iter_0000001.json").write_text(content)
    with pytest.raises(InputError, match=r"iter_0000001\.json is damaged: .*; remove it to measure again"):
        removed_points(config, None, str(run), str(folder))


def test_wrong_trajectories(config: EvaluateConfig, model: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="trajectory has neither run nor checkpoints"):
        TrajectoryConfig()
    with pytest.raises(InputError, match=r"trajectory\.run is nowhere; expected the folder of a run"):
        evaluate(replace(config, trajectory=TrajectoryConfig("nowhere")))
    with pytest.raises(InputError, match="every is 0"):
        TrajectoryConfig(str(tmp_path), 0)
    with pytest.raises(InputError, match=r"iterations \[1, 1\]; expected each once"):
        TrajectoryConfig(checkpoints=[TrajectoryCheckpoint(1, model), TrajectoryCheckpoint(1, model)])
    with pytest.raises(InputError, match="expected something to measure"):
        replace(config, text=[])
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="has no complete checkpoint"):
        evaluate(replace(config, trajectory=TrajectoryConfig(str(tmp_path / "empty"))))
    with pytest.raises(InputError, match=r"checkpoints\[0\]\.model is nowhere, which has no config"):
        evaluate(replace(config, trajectory=TrajectoryConfig(checkpoints=[TrajectoryCheckpoint(1, "nowhere")])))
