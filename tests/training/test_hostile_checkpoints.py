"""Checkpoints of strangers, through the tools: what is in them is not run, whatever a user's environment allows."""

from __future__ import annotations

import io
import os
import pickle
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path, PosixPath
from typing import Any

import pytest
import torch
from tiny_models import ROOT
from tiny_runs import Layout, Runs
from torch.distributed.checkpoint.metadata import MetadataIndex

STATE = "decoder.layers.mlp.linear_fc1._extra_state/shard_0_4"


class Command:
    """Unpickling it runs a command."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.canary}",)


class SpecCall:
    """Unpickling it makes a ModuleSpec of megatron-core, a dataclass, and calls that: it imports and runs what it names."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        from megatron.core.transformer.spec_utils import ModuleSpec

        return ModuleSpec(("os", "system")), (f"touch {self.canary}",)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_dir: str) -> Runs:
    """Corpora, mixture and a checkpoint; `Runs.configure` writes a run's configuration."""
    return Runs(tmp_path_factory.mktemp("hostile"), tiny_tokenizer_dir)


@pytest.fixture
def checkpoint(runs: Runs, tmp_path: Path) -> Path:
    """A copy that a test may change, without the sizes of its files."""
    shutil.copytree(runs.folder / "megatron", tmp_path / "megatron")
    (tmp_path / "megatron" / "release" / "manifest.json").unlink()
    return tmp_path / "megatron" / "release"


def tool(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a tool where torch has been told to unpickle everything."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}
    command = [sys.executable, str(ROOT / "tools" / name), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)


def train(runs: Runs, checkpoint: Path) -> subprocess.CompletedProcess[str]:
    path = runs.configure(checkpoint.parents[1].name, Layout())
    more = ("--checkpoint.load", str(checkpoint.parent))
    return tool("pretrain_cpt.py", "--config", path, *more, "--checkpoint.save", str(checkpoint.parents[1] / "run"))


def change_metadata(checkpoint: Path, change: Any) -> None:
    path = checkpoint / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    change(metadata)
    path.write_bytes(pickle.dumps(metadata))


def add_object(checkpoint: Path, thing: Any) -> tuple[int, int]:
    """Append what torch.save makes of it to the file with the tensors; where it lies."""
    content = io.BytesIO()
    torch.save(thing, content)
    path = checkpoint / "__0_0.distcp"
    offset = path.stat().st_size
    path.write_bytes(path.read_bytes() + content.getvalue())
    return offset, len(content.getvalue())


def hide_object(checkpoint: Path, canary: Path) -> None:
    """A state that runs a command, and after it a harmless one under a path of the same text: not equal, but looks so."""
    evil, good = add_object(checkpoint, [Command(canary)]), add_object(checkpoint, [None])

    def change(metadata: Any) -> None:
        place = metadata.storage_data.pop(MetadataIndex(STATE))
        metadata.storage_data[MetadataIndex(STATE)] = replace(place, offset=evil[0], length=evil[1])
        index = MetadataIndex(Path(STATE))  # type: ignore[arg-type]
        metadata.storage_data[index] = replace(place, offset=good[0], length=good[1])

    change_metadata(checkpoint, change)


def test_training_runs_nothing(runs: Runs, checkpoint: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    torch.save({"checkpoint_version": 3.0, "bomb": Command(canary)}, checkpoint / "common.pt")
    hide_object(checkpoint, canary)
    result = train(runs, checkpoint)
    assert not canary.exists(), result.stderr
    assert result.returncode == 2, result.stderr
    assert f"the name of a tensor is {PosixPath.__module__}.PosixPath; expected a text" in result.stderr


def test_training_does_not_call_a_dataclass(runs: Runs, checkpoint: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    change_metadata(checkpoint, lambda metadata: setattr(metadata, "planner_data", SpecCall(canary)))
    result = train(runs, checkpoint)
    assert not canary.exists(), result.stderr
    assert result.returncode == 2, result.stderr
    assert "it names megatron.core.transformer.spec_utils.ModuleSpec, which a checkpoint has no need of" in result.stderr


@pytest.mark.parametrize("where", [".metadata", "common.pt"])
def test_conversion_runs_nothing(where: str, checkpoint: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    if where == ".metadata":
        change_metadata(checkpoint, lambda metadata: setattr(metadata, "planner_data", SpecCall(canary)))
    else:
        shutil.rmtree(checkpoint / "hf")
        torch.save({"args": SpecCall(canary)}, checkpoint / "common.pt")
    options = ("--megatron", str(checkpoint.parent), "--hf", str(tmp_path / "back"))
    result = tool("convert_checkpoint.py", "megatron-to-hf", *options)
    assert not canary.exists(), result.stderr
    assert result.returncode == 2, result.stderr
    assert result.stderr.count("\n") == 1
    assert f"{where}" in result.stderr
    assert not (tmp_path / "back").exists()
