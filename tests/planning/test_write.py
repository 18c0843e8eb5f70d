"""A layout of a plan written for pretrain_cpt.py, which reads it back."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from tiny_models import ROOT, run_tool, write_yaml

from megatron_cpt.config.cli import read_arguments
from megatron_cpt.config.run import RunConfig
from megatron_cpt.planning.config import PlanConfig
from megatron_cpt.planning.search import LayoutPlan, plan_layouts
from megatron_cpt.planning.write import settings_of_run, write_layout

FP8 = {"seq_length": 8192, "fp8": True, "grad_reduce_in_bf16": True}
ASKED = ("70B", "--devices", "64", "--seq_length", "8192", "--fp8", "--grad_reduce_in_bf16")


def base(folder: Path) -> str:
    """A run's configuration, whose layout and batch are others."""
    content = {
        "mixture": "mixture.yaml",
        "checkpoint": {"load": "nowhere", "save": "nowhere"},
        "training": {"train_iters": 10, "micro_batch_size": 64, "global_batch_size": 64, "params_dtype": "fp32"},
        "parallel": {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 64},
    }
    return write_yaml(folder / "cpt.yaml", content)


def read_back(folder: Path, written: str) -> RunConfig:
    return read_arguments(RunConfig, ["--config", base(folder), "--config", written])


@pytest.mark.parametrize("row", [None, 3])
def test_pretrain_cpt_reads_what_the_tool_writes(row: int | None, tmp_path: Path) -> None:
    """The page's two commands, up to where the run would start: layout and batch are those of the row."""
    written = str(tmp_path / "parallel.yaml")
    assert " ".join(ASKED) in " ".join((ROOT / "docs/planning.md").read_text().split())
    result = run_tool("plan_run.py", *ASKED, "--write", written, *([] if row is None else ["--row", str(row)]))
    assert result.stdout.splitlines()[-1] == written
    expected = plan_layouts(PlanConfig("70B", 64, **FP8)).feasible[(row or 1) - 1].layout
    found = read_back(tmp_path, written)
    assert found.parallel == expected.parallel
    assert (found.training.micro_batch_size, found.training.global_batch_size) == (expected.micro_batch_size, 256)
    assert (found.training.params_dtype, found.training.fp8, found.training.train_iters) == ("bf16", "hybrid", 10)
    printed = run_tool("pretrain_cpt.py", "--config", base(tmp_path), "--config", written, "--print_config").stdout
    assert yaml.safe_load(printed)["parallel"].items() >= yaml.safe_load(Path(written).read_text())["parallel"].items()


@pytest.mark.parametrize(
    "config",
    [
        PlanConfig("405B", 1024, seq_length=8192),  # an uneven first stage
        PlanConfig("8B", 64, seq_length=131072, global_batch_size=64),  # context parallelism
        PlanConfig("8B", 16, params_dtype="fp32"),
        PlanConfig("8B", 16, transformer_impl="local", recompute_granularity="selective", recompute_modules=["core_attn"]),
        PlanConfig("1B", 1),
    ],
    ids=str,
)
def test_every_layout_is_read_back(config: PlanConfig, tmp_path: Path) -> None:
    result, written = plan_layouts(config), tmp_path / "parallel.yaml"
    for row, candidate in enumerate(result.feasible[:10], start=1):
        write_layout(str(written), result, row)
        found = read_back(tmp_path, str(written))
        assert found.parallel == candidate.layout.parallel
        assert found.training.transformer_impl == config.transformer_impl
        assert f"{config.seq_length} tokens" in written.read_text()


def test_json_in_a_folder_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    result = run_tool("plan_run.py", "8B", "--devices", "8", "--json", str(tmp_path), check=False)
    assert (result.returncode, result.stderr) == (
        2,
        f"error: json is {tmp_path}; expected a file in a folder that is there\n",
    )


def test_no_setting_is_lost() -> None:
    """Also what the run sets otherwise is overwritten: its precision, and the sizes of a layout without parallelism."""
    content = settings_of_run(*first(plan_layouts(PlanConfig("1B", 1))))
    assert content["parallel"]["tensor_model_parallel_size"] == content["parallel"]["pipeline_model_parallel_size"] == 1
    assert content["training"]["params_dtype"] == "bf16"


def first(result: LayoutPlan) -> tuple:
    return result.feasible[0], result


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("8B", "--devices", "8", "--row", "99", "--write", "FILE"), "row is 99; expected 1 to "),
        (("8B", "--devices", "8", "--row", "2"), "write is None; expected a file for row 2"),
        (("8B", "--devices", "8", "--row", "0", "--write", "FILE"), "row is 0; expected 1 or more"),
        (("8B", "--devices", "8", "--simulate", "0", "--write", "FILE"), "simulate is 0; expected none with write"),
        (("8B", "--devices", "8", "--write", "nowhere/FILE"), "nowhere/FILE; expected a file in a folder that is there"),
    ],
)
def test_what_cannot_be_written(arguments: tuple[str, ...], message: str, tmp_path: Path) -> None:
    given = [str(tmp_path / word) if word.endswith("FILE") else word for word in arguments]
    result = run_tool("plan_run.py", *given, check=False)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert message in result.stderr
    assert not [*tmp_path.iterdir()]
