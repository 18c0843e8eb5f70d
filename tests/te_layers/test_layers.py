"""Converted checkpoints load into Transformer Engine's layers and come back, in every layout.

On a CPU, with a stand-in for its compiled extension, so that nothing is computed. `make test-te` makes the folder of it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import VARIANTS, make_tiny_llama

from megatron_cpt.checkpoint.convert import hf_to_megatron
from megatron_cpt.checkpoint.verify import verify
from megatron_cpt.config.conversion import HfToMegatron, Verify

FOLDER = os.environ.get("TRANSFORMER_ENGINE", "")
pytestmark = pytest.mark.skipif(not FOLDER, reason="needs a folder with Transformer Engine (make test-te)")

LAYERS = ["TEDotProductAttention", "TELayerNormColumnParallelLinear", "TERowParallelLinear"]
LAYOUTS: dict[str, dict[str, Any]] = {
    "TP2": {"tensor_model_parallel_size": 2},
    "TP2 SP": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "PP2": {"pipeline_model_parallel_size": 2},
    "PP2 VP2": {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
    "TP2 PP2": {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2},
}
RECIPES = ("delayed", "tensorwise", "blockwise", "mxfp8")


class Models:
    """Tiny models, each in both formats, once."""

    def __init__(self, folder: Path, tokenizer: str) -> None:
        self.folder, self.tokenizer = folder, tokenizer

    def task(self, variant: str, dtype: str, parallel: dict[str, Any]) -> dict[str, Any]:
        """What layers.py is told of a model."""
        folder = self.folder / f"{variant}_{dtype}"
        if not folder.exists():
            kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
            hf = make_tiny_llama(folder / "hf", self.tokenizer, kind, **VARIANTS[variant])
            hf_to_megatron(HfToMegatron(hf, str(folder / "megatron")))
        checkpoint = str(folder / "megatron" / "release")
        return {"hf": str(folder / "hf"), "checkpoint": checkpoint, "dtype": dtype, "parallel": parallel, "folder": FOLDER}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_dir: str) -> Models:
    return Models(tmp_path_factory.mktemp("models"), tiny_tokenizer_dir)


def compare(task: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Run layers.py; what it found."""
    parallel = task["parallel"]
    processes = parallel.get("tensor_model_parallel_size", 1) * parallel.get("pipeline_model_parallel_size", 1)
    task |= {"save": str(folder / "saved"), "result": str(folder / "result.json")}
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes)] if processes > 1 else []
    if launcher:
        launcher += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
    result = subprocess.run(
        [sys.executable, *launcher, str(Path(__file__).parent / "layers.py"), json.dumps(task)],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1", "MEGATRON_CPT_PLATFORM": "cpu"},
    )
    assert result.returncode == 0, result.stderr[-4000:]
    found: dict[str, Any] = json.loads((folder / "result.json").read_text())
    print(f"{found['compared']} parameters and {found['keys']} keys compared")
    return found


def assert_the_same(task: dict[str, Any], folder: Path) -> None:
    """All parameters are those of torch's layers; what is saved has the converter's keys and weights.

    Only the norm behind the last layer has a key more: a state that holds nothing, and which loading does without.
    """
    found = compare(task, folder)
    assert set(LAYERS) <= set(found["layers"]), "other layers than Transformer Engine's"
    assert not found["missing_keys"]
    assert all(key.startswith("decoder.final_layernorm._extra_state/") for key in found["unknown_keys"])
    assert "tensors equal" in verify(Verify(str(folder / "saved"), task["hf"], logits=False))


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_kind_of_model(variant: str, models: Models, tmp_path: Path) -> None:
    assert_the_same(models.task(variant, "bf16", {}), tmp_path)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(layout: str, models: Models, tmp_path: Path) -> None:
    assert_the_same(models.task("biases", "bf16", LAYOUTS[layout]), tmp_path)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_of_fp8(recipe: str, models: Models, tmp_path: Path) -> None:
    task = models.task("untied", "bf16", {})
    assert_the_same(task | {"arithmetic": {"fp8": "hybrid", "fp8_recipe": recipe}}, tmp_path)


def test_deterministic_layers_can_be_built(models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformer Engine refuses unless this variable says so, which a deterministic run sets."""
    task = models.task("untied", "bf16", {}) | {"arithmetic": {"deterministic_mode": True}}
    monkeypatch.setenv("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0")
    assert_the_same(task, tmp_path)
    monkeypatch.setenv("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "1")
    with pytest.raises(AssertionError, match="NVTE_ALLOW_NONDETERMINISTIC_ALGO"):
        compare(task, tmp_path)
