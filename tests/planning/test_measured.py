"""Plans with what tools/check_cluster.py has measured."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from tiny_models import run_tool

from megatron_cpt.planning.config import PlanConfig
from megatron_cpt.planning.hardware import DEVICES, LINK_EFFICIENCY, MEMORY_EFFICIENCY
from megatron_cpt.planning.measured import planned_rate, with_measured

STACK = {
    "model": "8B",
    "layers": 8,
    "seq_length": 4096,
    "micro_batch_size": 1,
    "microbatches": 8,
    "params_dtype": "bf16",
    "transformer_impl": "transformer_engine",
}


def row(name: str, state: str = "passed", **figures: Any) -> dict[str, Any]:
    return {"name": name, "state": state, "said": "", "seconds": 1.0, "advice": "", "figures": figures}


def report(folder: Path, **changes: Any) -> str:
    """Of 16 H200 in two machines, whose products reach 70 % (FP8: 50 %) of the peak."""
    device = dataclasses.replace(
        DEVICES["h200"], memory_gb_per_s=4000 / MEMORY_EFFICIENCY, memory_gib=140.0, matmul_efficiency=0.7
    )
    device = dataclasses.replace(device, nvlink_gb_per_s=300 / LINK_EFFICIENCY, network_gb_per_s=40 / LINK_EFFICIENCY)
    speeds = [
        row("speed", settings=STACK | {"transformer_impl": "local"}, tokens_per_second_per_device=1000.0),
        row("speed, TE", settings=STACK, tokens_per_second_per_device=planned_rate(STACK, device, 16)),
    ]
    fp8 = STACK | {"fp8": "hybrid"}
    rate = planned_rate(fp8, dataclasses.replace(device, fp8_efficiency=0.5), 16)
    speeds.append(row("speed, FP8", settings=fp8, tokens_per_second_per_device=rate))
    checks = [
        row("devices", memory_gb_per_s=4000.0, memory_gib=140.0),
        row(
            "links",
            all_reduce_within_a_node_gb_per_s=300.0,
            all_reduce_across_nodes_gb_per_s=90.0,
            send_across_nodes_gb_per_s=40.0,
        ),
        *speeds,
        row("TP2 PP1 DP8", "failed"),
    ]
    content = {"device": "NVIDIA H200", "nodes": 2, "devices_per_node": 8, "processes": 16, "checks": checks} | changes
    path = folder / "check_cluster.json"
    path.write_text(json.dumps(content))
    return str(path)


def test_what_was_measured_takes_the_place_of_what_is_known(tmp_path: Path) -> None:
    config = with_measured(PlanConfig("8B", 64, measured=report(tmp_path)))
    assert config.device == "h200"
    assert config.memory_gib == 140.0
    assert config.memory_gb_per_s == pytest.approx(4000 / MEMORY_EFFICIENCY)
    assert config.nvlink_gb_per_s == pytest.approx(300 / LINK_EFFICIENCY)
    assert config.network_gb_per_s == pytest.approx(40 / LINK_EFFICIENCY)
    assert config.matmul_efficiency == pytest.approx(0.7, abs=0.002)
    assert config.fp8_efficiency == pytest.approx(0.5, abs=0.002)


def test_what_is_given_stays(tmp_path: Path) -> None:
    config = with_measured(PlanConfig("8B", 64, measured=report(tmp_path), matmul_efficiency=0.4, network_gb_per_s=25.0))
    assert (config.matmul_efficiency, config.network_gb_per_s) == (0.4, 25.0)


def test_checks_that_did_not_pass_say_nothing(tmp_path: Path) -> None:
    path = report(tmp_path, checks=[row("links", "failed", all_reduce_gb_per_s=1.0), row("devices", "skipped")])
    config = with_measured(PlanConfig("8B", 8, measured=path))
    assert config == PlanConfig("8B", 8, "h200", measured=path, devices_per_node=8)


@pytest.mark.parametrize("content", [[1], {}, {"device": "NVIDIA H200", "nodes": 1, "checks": [{"name": 1}]}, {"checks": 3}])
def test_another_file_is_named(content: Any, tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text(json.dumps(content))
    result = run_tool("plan_run.py", "8B", "--devices", "8", "--measured", str(path), check=False)
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: {path}: is ")
    assert result.stderr.endswith("; expected what tools/check_cluster.py has written\n")


def test_the_tool_plans_with_it(tmp_path: Path) -> None:
    result = run_tool("plan_run.py", "8B", "--devices", "16", "--top", "1", "--measured", report(tmp_path))
    assert "16 x h200: 140 GiB" in result.stdout
    assert "matrix products reach 70% of the peak" in result.stdout


def test_nothing_fits_is_a_failure() -> None:
    result = run_tool("plan_run.py", "405B", "--devices", "1", check=False)
    assert result.returncode == 1
    assert "No layout fits." in result.stdout
    assert result.stderr == "error: no layout of 405B fits 1 x h100\n"
