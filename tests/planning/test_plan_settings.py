"""Every setting of plan_run.py changes the plan where it should; a setting without a row here is an error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from every_setting import settings_of

from megatron_cpt.config.cli import run_tool
from megatron_cpt.planning import run as planning
from megatron_cpt.planning.config import PlanConfig

BASE = {"model": "8B", "devices": "16", "tensor_model_parallel_size": "2", "pipeline_model_parallel_size": "2"}
BASE |= {"micro_batch_size": "1", "recompute_granularity": "none", "virtual_pipeline_model_parallel_size": "1"}
NODES = {"tensor_model_parallel_size": "4", "devices_per_node": "2"}  # tensor parallelism over the network
MODULES = {"recompute_granularity": "selective"}
# setting -> value, and what else both plans are given
ROWS: dict[str, tuple[str, dict[str, str]]] = {
    "model": ("1B", {}),
    "devices": ("32", {}),
    "device": ("a100-80g", {}),
    "seq_length": ("1024", {}),
    "global_batch_size": ("128", {}),
    "tokens": ("5e10", {}),
    "params_dtype": ("fp32", {}),
    "fp8": ("true", {}),
    "tensor_model_parallel_size": ("4", {}),
    "pipeline_model_parallel_size": ("4", {}),
    "virtual_pipeline_model_parallel_size": ("2", {}),
    "context_parallel_size": ("2", {}),
    "transformer_impl": ("transformer_engine", {}),
    "grad_reduce_in_bf16": ("true", {}),
    "micro_batch_size": ("2", {}),
    "sequence_parallel": ("false", {}),
    "recompute_granularity": ("full", {}),
    "recompute_modules": ("[core_attn]", MODULES),
    "overlap_grad_reduce": ("false", {"overlap_param_gather": "false"}),
    "overlap_param_gather": ("false", {}),
    "tp_comm_overlap": ("true", {}),
    "memory_gib": ("30", {}),
    "bf16_tflops": ("500", {}),
    "fp8_tflops": ("900", {"fp8": "true"}),
    "memory_gb_per_s": ("1000", {}),
    "nvlink_gb_per_s": ("100", {}),
    "network_gb_per_s": ("10", NODES),
    "devices_per_node": ("2", {"tensor_model_parallel_size": "4"}),
    "matmul_efficiency": ("0.5", {}),
    "fp8_efficiency": ("0.5", {"fp8": "true"}),
    "overhead_gib": ("8", {}),
    "fragmentation": ("0.5", {}),
}
# these have tests of what they do
ELSEWHERE = {"run": "test_plan.py: plans of a run's configuration", "simulate": "test_plan.py: a rank of the real job"}
ELSEWHERE |= {"measured": "test_measured.py", "write": "test_write.py", "row": "test_write.py"}


def planned(folder: Path, options: dict[str, str]) -> dict[str, Any]:
    """What the tool writes of a plan, but for its settings."""
    path = folder / "plan.json"
    run_tool(
        planning.run_plan, PlanConfig, "", [f"--{name}={value}" for name, value in (options | {"json": str(path)}).items()]
    )
    content = dict(json.loads(path.read_text()))
    del content["config"]
    return content


@pytest.mark.parametrize("setting", sorted(settings_of(PlanConfig) - {"json", "top", *ELSEWHERE}))
def test_a_setting_changes_the_plan(setting: str, tmp_path: Path) -> None:
    value, beside = ROWS[setting]
    base = BASE | beside
    assert planned(tmp_path, base | {setting: value}) != planned(tmp_path, base)


def test_top_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """How much is shown, and where everything is written; no row of the table above is there without the file."""
    shown = {}
    for top in ("1", "3"):
        planned(tmp_path, {"model": "8B", "devices": "16", "top": top})
        shown[top] = len(capsys.readouterr().out.splitlines())
    assert shown["3"] == shown["1"] + 2
