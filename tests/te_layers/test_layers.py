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

from megatron_cpt.convert.config import HfToMegatron, Verify
from megatron_cpt.convert.convert import hf_to_megatron
from megatron_cpt.convert.verify import verify

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


# What the same process is asked for, by test: a kind of model, its layout, and how it computes
TASKS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    **{variant: (variant, {}, {}) for variant in VARIANTS},
    **{layout: ("biases", parallel, {}) for layout, parallel in LAYOUTS.items()},
    **{recipe: ("untied", {}, {"fp8": "hybrid", "fp8_recipe": recipe}) for recipe in RECIPES},
    "deterministic": ("untied", {}, {"deterministic_mode": True}),
    "deterministic, not allowed": ("untied", {}, {"deterministic_mode": True}),
}


class Comparisons:
    """What layers.py found, by the name of the task; a log where it found nothing."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def log(self, name: str) -> str:
        """What the task's processes have printed."""
        return (self.folder / name / "log.txt").read_text()

    def found(self, name: str) -> dict[str, Any]:
        """The result; fails with the log if there is none."""
        result = self.folder / name / "result.json"
        assert result.exists(), self.log(name)
        found: dict[str, Any] = json.loads(result.read_text())
        print(f"{name}: {found['compared']} parameters and {found['keys']} keys compared")
        return found


@pytest.fixture(scope="module")
def comparisons(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_dir: str) -> Comparisons:
    """All tasks, run."""
    folder = tmp_path_factory.mktemp("layers")
    for variant in VARIANTS:
        hf = make_tiny_llama(folder / "models" / variant / "hf", tiny_tokenizer_dir, torch.bfloat16, **VARIANTS[variant])
        hf_to_megatron(HfToMegatron(hf, str(folder / "models" / variant / "megatron")))
    tasks = [task(name, folder) for name in TASKS]
    (folder / "tasks.json").write_text(json.dumps({"folder": FOLDER, "tasks": tasks}))
    tests = Path(__file__).parents[1]
    python_path = os.pathsep.join(
        map(str, (tests.parent, tests, *([os.environ["PYTHONPATH"]] if "PYTHONPATH" in os.environ else [])))
    )
    subprocess.run(
        [sys.executable, str(Path(__file__).parent / "layers.py"), str(folder / "tasks.json")],
        check=True,
        timeout=900,
        env=os.environ | {"PYTHONPATH": python_path, "OMP_NUM_THREADS": "1", "MEGATRON_CPT_PLATFORM": "cpu"},
    )
    return Comparisons(folder)


def task(name: str, folder: Path) -> dict[str, Any]:
    """What layers.py is told."""
    variant, parallel, numerics = TASKS[name]
    (folder / name).mkdir()
    allowed = "1" if name.endswith("not allowed") else "0"  # Transformer Engine's kernels that are not deterministic
    return {
        "hf": str(folder / "models" / variant / "hf"),
        "checkpoint": str(folder / "models" / variant / "megatron" / "release"),
        "dtype": "bf16",
        "parallel": parallel,
        "numerics": numerics,
        "processes": parallel.get("tensor_model_parallel_size", 1) * parallel.get("pipeline_model_parallel_size", 1),
        "environment": {"NVTE_ALLOW_NONDETERMINISTIC_ALGO": allowed} if name.startswith("deterministic") else {},
        "save": str(folder / name / "saved"),
        "result": str(folder / name / "result.json"),
        "log": str(folder / name / "log.txt"),
    }


def assert_the_same(name: str, comparisons: Comparisons) -> None:
    """All parameters are those of torch's layers; what is saved has the converter's keys and weights.

    Only the norm behind the last layer has a key more: a state that holds nothing, and which loading does without.
    """
    found = comparisons.found(name)
    assert set(LAYERS) <= set(found["layers"]), "other layers than Transformer Engine's"
    assert not found["missing_keys"]
    assert all(key.startswith("decoder.final_layernorm._extra_state/") for key in found["unknown_keys"])
    hf = comparisons.folder / "models" / TASKS[name][0] / "hf"
    assert "tensors equal" in verify(Verify(str(comparisons.folder / name / "saved"), str(hf), logits=False))


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_kind_of_model(variant: str, comparisons: Comparisons) -> None:
    assert_the_same(variant, comparisons)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(layout: str, comparisons: Comparisons) -> None:
    assert_the_same(layout, comparisons)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_of_fp8(recipe: str, comparisons: Comparisons) -> None:
    assert_the_same(recipe, comparisons)


def test_deterministic_layers_can_be_built(comparisons: Comparisons) -> None:
    """Transformer Engine refuses unless this variable says so, which a deterministic run sets."""
    assert_the_same("deterministic", comparisons)
    assert "NVTE_ALLOW_NONDETERMINISTIC_ALGO is not 0. Currently set to: 1" in comparisons.log("deterministic, not allowed")
