"""SFT and DPO resume from the newest checkpoint with all that was written, and say what is wrong with those after it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from chats import dpo_config, read_metrics, sft_config
from safetensors.torch import load_file

from megatron_cpt.errors import InputError
from megatron_cpt.posttrain import trainers
from megatron_cpt.posttrain.checkpoints import check_sealed
from megatron_cpt.posttrain.dpo import finetune_dpo
from megatron_cpt.posttrain.settings import LoraSettings, RunSettings, TrainingSettings
from megatron_cpt.posttrain.sft import SftConfig, finetune_sft


@pytest.fixture(scope="module")
def finished(chat_model: str, tmp_path_factory: pytest.TempPathFactory) -> SftConfig:
    """A run of four steps, with checkpoints after the second and the last."""
    training = TrainingSettings(max_steps=4, global_batch_size=2)
    config = sft_config(chat_model, tmp_path_factory.mktemp("finished"), training=training)
    finetune_sft(config)
    return config


def killed_at_the_end(config: Any, folder: Path) -> Any:
    """A copy of a run that was ended after its last checkpoint."""
    shutil.copytree(config.save, folder)
    shutil.rmtree(folder / "hf")
    return replace(config, save=str(folder))


def remove(*names: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return change


def truncate(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).write_bytes((folder / name).read_bytes()[:-100])

    return change


def flip(name: str) -> Callable[[Path], None]:
    """A bit in the middle."""

    def change(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[len(content) // 2] ^= 1
        (folder / name).write_bytes(content)

    return change


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "no optimizer": (remove("optimizer.pt", "scheduler.pt"), "is not complete: optimizer.pt is missing"),
    "no scheduler": (remove("scheduler.pt"), "is not complete: scheduler.pt is missing"),
    "no random numbers": (remove("rng_state.pth"), "is not complete: rng_state.pth is missing"),
    "no weights": (remove("model.safetensors"), "is not complete: model.safetensors is missing"),
    "a bit of the weights": (flip("model.safetensors"), "is damaged: model.safetensors has the checksum "),
    "a bit of the state": (flip("trainer_state.json"), "is damaged: trainer_state.json has the checksum "),
    "half an optimizer": (truncate("optimizer.pt"), "is not complete: optimizer.pt has "),
    "half the weights": (truncate("model.safetensors"), "is not complete: model.safetensors has "),
    "no manifest": (remove("manifest.json"), "is not complete: manifest.json is missing (the run was ended while it saved"),
    "half a manifest": (truncate("manifest.json"), "manifest.json cannot be read"),
}


FAST = ("no optimizer", "a bit of the weights", "half an optimizer", "no manifest")


@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name in FAST else [pytest.mark.slow]) for name in DAMAGES])
def test_a_damaged_checkpoint_is_named_and_passed_over(
    finished: SftConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """The run goes on from the one before; the weights in the end are those of an undisturbed run, bit by bit."""
    config, (damage, message) = killed_at_the_end(finished, tmp_path / "run"), DAMAGES[name]
    damage(tmp_path / "run" / "checkpoint-4")
    result = finetune_sft(config)
    said = capsys.readouterr().err
    (line,) = [line for line in said.splitlines() if line.startswith("passed over: ")]
    assert f"{tmp_path}/run/checkpoint-4" in line
    assert message in line
    assert f"resuming from {tmp_path}/run/checkpoint-2\n" in said
    assert f"set aside: {tmp_path}/run/damaged_checkpoint-4\n" in said
    assert [row["iteration"] for row in read_metrics(tmp_path / "run") if "loss" in row] == [1, 2, 3, 4]
    weights, expected = (load_file(Path(folder) / "model.safetensors") for folder in (result, Path(finished.save) / "hf"))
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())
    check_sealed(str(tmp_path / "run" / "checkpoint-4"))


def test_adapters_and_pairs_are_checked_as_well(chat_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    training = TrainingSettings(max_steps=2, micro_batch_size=2, global_batch_size=4)
    changes = {"training": training, "lora": LoraSettings(r=4, alpha=8), "run": RunSettings(save_interval=1, keep_last=1)}
    config = dpo_config(chat_model, tmp_path, **changes)
    finetune_dpo(config)
    assert [path.name for path in Path(config.save).glob("*checkpoint-*")] == ["checkpoint-2"]
    again = killed_at_the_end(config, tmp_path / "run")
    flip("adapter_model.safetensors")(tmp_path / "run" / "checkpoint-2")
    before = sorted(path.name for path in (tmp_path / "run").iterdir())
    with pytest.raises(InputError, match=r"adapter_model\.safetensors has the checksum .*; empty the folder to begin anew"):
        finetune_dpo(again)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == before
    assert "resuming" not in capsys.readouterr().err


def test_older_checkpoints_stay_until_a_new_one_is_complete(
    finished: SftConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what is passed over is neither kept instead of a new one nor written into."""
    config = replace(killed_at_the_end(finished, tmp_path / "run"), run=RunSettings(save_interval=2, keep_last=1))
    flip("optimizer.pt")(tmp_path / "run" / "checkpoint-4")

    def ended(folder: str, step: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(trainers, "seal", ended)
        with pytest.raises(KeyboardInterrupt):
            finetune_sft(config)
    names = sorted(path.name for path in (tmp_path / "run").glob("*checkpoint-*"))
    assert names == ["checkpoint-2", "checkpoint-4", "damaged_checkpoint-4"]
    assert not (tmp_path / "run" / "checkpoint-4" / "manifest.json").exists()
    finetune_sft(config)
    names = sorted(path.name for path in (tmp_path / "run").glob("*checkpoint-*"))
    assert names == ["checkpoint-4", "damaged_checkpoint-4", "damaged_checkpoint-4_2"]


def test_a_run_that_was_ended_in_its_first_save_begins_anew(
    finished: SftConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is left of what was not complete."""
    config = killed_at_the_end(finished, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    remove("manifest.json", "trainer_state.json")(tmp_path / "run" / "checkpoint-2")
    (tmp_path / "run" / "checkpoint-2" / "stray").write_text("")
    finetune_sft(config)
    assert "resuming" not in capsys.readouterr().err
    manifest = json.loads((tmp_path / "run" / "checkpoint-2" / "manifest.json").read_text())
    files = {path.name: path.stat().st_size for path in (tmp_path / "run" / "checkpoint-2").iterdir()}
    assert manifest["files"] == {name: size for name, size in files.items() if name != "manifest.json"}
    assert "stray" not in files
    assert sorted(path.name for path in (tmp_path / "run").glob("*checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]


def test_a_resumed_run_saves_as_often_as_it_is_told_now(finished: SftConfig, tmp_path: Path) -> None:
    config = killed_at_the_end(finished, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    finetune_sft(replace(config, run=RunSettings(save_interval=1, keep_last=3)))
    names = sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*"))
    assert names == ["checkpoint-2", "checkpoint-3", "checkpoint-4"]
