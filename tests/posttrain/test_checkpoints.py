"""SFT and DPO resume from the newest checkpoint with all that was written, and say what is wrong with those after it."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from chats import dpo_config, read_metrics, sft_config
from safetensors.torch import load_file

from megatron_cpt.posttrain import trainers
from megatron_cpt.posttrain.checkpoints import check_sealed, locked_tuning_folder, sealed_steps
from megatron_cpt.posttrain.dpo import finetune_dpo
from megatron_cpt.posttrain.settings import LoraSettings, RunSettings, TrainingSettings
from megatron_cpt.posttrain.sft import SftConfig, finetune_sft
from megatron_cpt.utils.errors import InputError, RunError


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


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no optimizer": (remove("optimizer.pt", "scheduler.pt"), "is not complete: optimizer.pt is missing"),
    "no scheduler": (remove("scheduler.pt"), "is not complete: scheduler.pt is missing"),
    "no random numbers": (remove("rng_state.pth"), "is not complete: rng_state.pth is missing"),
    "no weights": (remove("model.safetensors"), "is not complete: model.safetensors is missing"),
    "a bit of the weights": (flip("model.safetensors"), "is damaged: model.safetensors has the checksum "),
    "a bit of the state": (flip("trainer_state.json"), "is damaged: trainer_state.json has the checksum "),
    "half an optimizer": (truncate("optimizer.pt"), "is not complete: optimizer.pt has "),
    "half the weights": (truncate("model.safetensors"), "is not complete: model.safetensors has "),
    "no manifest": (remove("manifest.json"), "is not complete: manifest.json is missing (the run was ended while it saved"),
    "a manifest of nothing": (lambda folder: (folder / "manifest.json").write_text("{}"), "has not one checksum for each"),
    "half a manifest": (truncate("manifest.json"), "manifest.json cannot be read"),
}


FAST = ("a manifest of nothing", "no optimizer", "a bit of the weights", "half an optimizer", "no manifest")


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
    (tmp_path / "run" / "saving.txt").unlink()  # so nobody says whose it is
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


def test_what_a_kill_has_left_without_its_manifest_is_removed(
    finished: SftConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever was written before: the run says which checkpoint it is writing. One without a word of that is kept."""
    config, run = killed_at_the_end(finished, tmp_path / "run"), tmp_path / "run"
    shutil.rmtree(run / "checkpoint-4")

    def killed(folder: str, step: int) -> None:
        raise RuntimeError("killed before the manifest")

    with monkeypatch.context() as patch:
        patch.setattr(trainers, "seal", killed)
        with pytest.raises(RuntimeError, match="before the manifest"):
            finetune_sft(config)
    assert (run / "checkpoint-4" / "trainer_state.json").exists()
    finetune_sft(config)
    assert sorted(path.name for path in run.glob("*checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    assert not (run / "saving.txt").exists()


def test_a_checkpoint_of_another_run_is_none_of_this_one(
    finished: SftConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, run = killed_at_the_end(finished, tmp_path / "run"), tmp_path / "run"
    other = replace(finished, save=str(tmp_path / "other"), training=replace(finished.training, seed=5))
    finetune_sft(other)
    shutil.rmtree(run / "checkpoint-4")
    shutil.copytree(tmp_path / "other" / "checkpoint-4", run / "checkpoint-4")
    finetune_sft(config)
    assert f"checkpoint-4 was not saved by the run that {run / 'run.json'} describes\n" in capsys.readouterr().err
    assert sorted(path.name for path in run.glob("*checkpoint-*")) == [
        "checkpoint-2",
        "checkpoint-4",
        "damaged_checkpoint-4",
    ]
    check_sealed(str(run / "checkpoint-4"))


def test_a_resumed_run_saves_as_often_as_it_is_told_now(finished: SftConfig, tmp_path: Path) -> None:
    config = killed_at_the_end(finished, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    finetune_sft(replace(config, run=RunSettings(save_interval=1, keep_last=3)))
    names = sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*"))
    assert names == ["checkpoint-2", "checkpoint-3", "checkpoint-4"]


def test_copies_under_other_names_are_left_alone(finished: SftConfig, tmp_path: Path) -> None:
    """They are neither counted, nor kept instead of a new checkpoint, nor removed."""
    config = replace(killed_at_the_end(finished, tmp_path / "run"), run=RunSettings(save_interval=1, keep_last=1))
    run = tmp_path / "run"
    shutil.move(run / "checkpoint-4", run / "checkpoint-9-good")
    shutil.copytree(run / "checkpoint-2", run / "checkpoint-1.bak")
    finetune_sft(config)
    assert sorted(path.name for path in run.glob("*checkpoint-*")) == [
        "checkpoint-1.bak",
        "checkpoint-4",
        "checkpoint-9-good",
    ]
    check_sealed(str(run / "checkpoint-4"))


def test_a_renamed_checkpoint_is_of_another_step(
    finished: SftConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the newest it would be kept instead of those that the run saves."""
    config = replace(killed_at_the_end(finished, tmp_path / "run"), run=RunSettings(save_interval=1, keep_last=1))
    run = tmp_path / "run"
    (run / "checkpoint-4").rename(run / "checkpoint-10")
    finetune_sft(config)
    assert "passed over: checkpoint " in (said := capsys.readouterr().err)
    assert "checkpoint-10 has another name than it was saved under; expected checkpoint-4\n" in said
    assert sorted(path.name for path in run.glob("*checkpoint-*")) == ["checkpoint-4", "damaged_checkpoint-10"]


@pytest.mark.parametrize("kind", ["file", "dead link", "link"])
def test_what_is_no_checkpoint_but_has_the_name_of_one_is_set_aside(finished: SftConfig, tmp_path: Path, kind: str) -> None:
    """Before the step at which the trainer would find it in its way."""
    config, run = killed_at_the_end(finished, tmp_path / "run"), tmp_path / "run"
    shutil.rmtree(run / "checkpoint-4")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "mine").write_text("notes")
    if kind == "file":
        (run / "checkpoint-4").write_text("notes")
    else:
        (run / "checkpoint-4").symlink_to(tmp_path / ("elsewhere" if kind == "link" else "nothing"))
    finetune_sft(config)
    assert (run / "damaged_checkpoint-4").is_symlink() == (kind != "file")
    check_sealed(str(run / "checkpoint-4"))
    assert (tmp_path / "elsewhere" / "mine").read_text() == "notes"


def test_a_checkpoint_that_may_not_be_read_is_no_damage(
    finished: SftConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that root has saved: the run does not resume from an older one."""
    config = killed_at_the_end(finished, tmp_path / "run")
    locked, may = str(tmp_path / "run" / "checkpoint-4" / "optimizer.pt"), os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path != locked and may(path, mode))  # tests may run as root
    before = sorted(path.name for path in (tmp_path / "run").iterdir())
    with pytest.raises(InputError, match=r"checkpoint-4/optimizer\.pt cannot be read: Permission denied; expected"):
        finetune_sft(config)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == before


def test_a_folder_has_one_run_at_a_time(finished: SftConfig, tmp_path: Path) -> None:
    config, run = killed_at_the_end(finished, tmp_path / "run"), tmp_path / "run"
    code = f"import fcntl, sys; f = open({str(run / 'run.lock')!r}, 'r+b'); fcntl.lockf(f, fcntl.LOCK_EX); print('held', "
    code += "flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        before = {path.name: path.stat().st_mtime_ns for path in run.iterdir()}
        with pytest.raises(InputError, match=r"another run is under way in .*run \(it holds .*run\.lock\); use another"):
            finetune_sft(config)
        assert {path.name: path.stat().st_mtime_ns for path in run.iterdir()} == before
        assert other.stdin is not None
        other.stdin.close()
    seen = sealed_steps(str(run))
    shutil.rmtree(run / "checkpoint-4")
    with pytest.raises(InputError, match="another run has just saved a checkpoint"), locked_tuning_folder(str(run), seen):
        pass
    (run / "hf").mkdir()
    with (
        pytest.raises(InputError, match="another run has just finished"),
        locked_tuning_folder(str(run), sealed_steps(str(run))),
    ):
        pass


@pytest.mark.parametrize("said", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("unexpected pos 53 vs 52")])
def test_a_full_disk_ends_the_run_with_one_line(
    finished: SftConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: Exception
) -> None:
    """Also where the library that writes has another word for it. What was saved before is resumed from."""
    config = killed_at_the_end(finished, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")

    def full(*_: Any, **__: Any) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
        raise said

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(RunError, match=r"run/checkpoint-4 could not be saved: the disk is full; make room, the same"):
            finetune_sft(config)
    monkeypatch.undo()
    finetune_sft(config)
    check_sealed(str(tmp_path / "run" / "checkpoint-4"))


def test_a_save_that_fails_otherwise_is_no_full_disk(
    finished: SftConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = killed_at_the_end(finished, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")

    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(torch, "save", broken)
    with pytest.raises(RuntimeError, match="out of memory") as caught:
        finetune_sft(config)
    assert not isinstance(caught.value, RunError)
