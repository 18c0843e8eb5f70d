"""Plans: published throughput, the layouts of the paper, invariants, and the command."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from tiny_models import ROOT, make_tiny_llama, run_tool, write_yaml

from megatron_cpt.config.parallel import ParallelConfig
from megatron_cpt.model.flops import flops_per_token
from megatron_cpt.planning.activations import chunk_bytes, layer_bytes, microbatches_in_flight
from megatron_cpt.planning.config import PlanConfig
from megatron_cpt.planning.hardware import DEVICES, LINK_EFFICIENCY, Cluster, find_device
from megatron_cpt.planning.layouts import Layout, ModelChunk, TrainingJob, layers_of_stages
from megatron_cpt.planning.memory import GIB, fullest, memory_of_stage
from megatron_cpt.planning.one_run import plan_one, read_planned_run
from megatron_cpt.planning.presets import MODELS, find_model
from megatron_cpt.planning.published import PUBLISHED, Published
from megatron_cpt.planning.report import show_plan
from megatron_cpt.planning.search import Candidate, LayoutPlan, make_candidate, make_job, plan_layouts
from megatron_cpt.planning.timing import StepTime, layout_throughput
from megatron_cpt.platforms.cuda import known_peak_tflops
from megatron_cpt.training.throughput import step_throughput as run_throughput
from megatron_cpt.utils.errors import InputError

PAGE = (ROOT / "docs/planning.md").read_text(encoding="utf-8")
FITTED_CONSTANTS = 4  # matrix products on A100, on H100 in bf16 and in FP8; what tp_comm_overlap hides


def estimate(point: Published) -> float:
    return layout_throughput(point.job, point.layout, point.cluster).tokens_per_second_per_device


@pytest.mark.parametrize("point", PUBLISHED, ids=lambda p: f"{p.model}-{p.device}-{p.tokens_per_second_per_device:g}")
def test_published_throughput(point: Published) -> None:
    assert estimate(point) == pytest.approx(point.tokens_per_second_per_device, rel=0.33 if point.torchao else 0.25)
    assert not point.torchao or estimate(point) > point.tokens_per_second_per_device, "what is left out takes time"


def mean_error(points: Sequence[Published]) -> float:
    """Of the estimates, as logarithms."""
    return sum(abs(math.log(estimate(point) / point.tokens_per_second_per_device)) for point in points) / len(points)


def test_the_fit_has_far_fewer_constants_than_points() -> None:
    assert len(PUBLISHED) >= 4 * FITTED_CONSTANTS
    efficiencies = {(device.matmul_efficiency, device.fp8_efficiency) for device in DEVICES.values()}
    assert len({x for pair in efficiencies for x in pair if x}) == FITTED_CONSTANTS - 1
    ours = [point for point in PUBLISHED if not point.torchao]
    assert mean_error(ours) < 0.08
    assert mean_error(PUBLISHED) < 0.10
    for points in (ours, PUBLISHED):
        assert f"{mean_error(points):.1%} over {len(points)} rows" in PAGE.replace(" %", "%")


def test_the_layout_that_bridge_publishes_for_the_70b() -> None:
    """64 H100, TP4 PP8 VP5 DP2, FP8, nothing recomputed: it fits, with bf16 gradients as theirs with room; near 1,664."""
    config = PlanConfig(
        "70B",
        64,
        seq_length=8192,
        global_batch_size=256,
        fp8=True,
        tensor_model_parallel_size=4,
        pipeline_model_parallel_size=8,
        virtual_pipeline_model_parallel_size=5,
        micro_batch_size=1,
        recompute_granularity="none",
    )
    (found,) = plan_layouts(config).feasible
    assert found.layout.data_parallel_size == 2
    assert found.tight
    assert found.throughput.tokens_per_second_per_device == pytest.approx(1664, rel=0.15)
    (theirs,) = plan_layouts(dataclasses.replace(config, grad_reduce_in_bf16=True, tp_comm_overlap=True)).feasible
    assert not theirs.tight
    assert theirs.memory.gradients == found.memory.gradients // 2
    assert theirs.throughput.tokens_per_second_per_device == pytest.approx(1664, rel=0.10)
    (row,) = [point for point in PUBLISHED if point.tokens_per_second_per_device == 1664]
    assert row.global_batch_size == 256
    assert (row.layout, row.job) == (theirs.layout, make_job(config))


def test_what_transformer_engine_keeps_of_a_layer() -> None:
    """Of the 70B over 4 devices: tensors by name, width and bytes, as its sources have them."""
    tokens, hidden, query, key, ffn = 8192, 8192, 2048, 256, 7168
    local = tokens // 4
    lse, rsigma = 4 * tokens * 16, 4 * local
    for fp8, product in ((True, 1), (False, 2)):
        job = TrainingJob(MODELS["70B"], tokens, 256, fp8=fp8, transformer_impl="transformer_engine")
        layout = Layout(ParallelConfig(4, sequence_parallel=True), 1, 1, 1)
        assert layer_bytes(job, layout) == {
            "norms": 2 * (local * hidden * (2 + product) + rsigma),
            "attention": tokens * 2 * (query + key + key + query) + lse,
            "mlp": tokens * ffn * (2 * 2 + product),
        }
        recomputed = layer_bytes(job, layout, frozenset({"mlp"}))
        assert recomputed["norms"] == 2 * local * hidden * 2 + local * hidden * product + rsigma
        assert recomputed["mlp"] == 0
        attention = layer_bytes(job, layout, frozenset({"core_attn"}))["attention"]
        assert attention == tokens * 2 * ((query + 2 * key) + (query + key) + query) + 4
    torch_layers = dataclasses.replace(job, transformer_impl="local")
    assert sum(layer_bytes(torch_layers, layout).values()) > sum(layer_bytes(job, layout).values())


def test_fp8_copies_are_of_the_layers_alone() -> None:
    """Two bytes for each weight of a matrix product; embedding and output layer stay bf16."""
    layout = Layout(ParallelConfig(4, 8, sequence_parallel=True), 1, 1, 1)
    products = 10 * (8192 * (2 * 8192 + 2 * 1024) + 3 * 8192 * 28672) // 4
    for stage in (0, 3, 7):
        assert (
            memory_of_stage(TrainingJob(MODELS["70B"], 8192, 256, fp8=True), layout, stage, 4, 0.05).fp8_weights
            == 2 * products
        )


def find(tokens_per_second: float) -> Published:
    (point,) = (point for point in PUBLISHED if point.tokens_per_second_per_device == tokens_per_second)
    return point


def with_efficiencies(point: Published, **efficiencies: float) -> float:
    device = dataclasses.replace(point.cluster.device, **efficiencies)
    result = layout_throughput(point.job, point.layout, Cluster(device, point.devices))
    return result.tokens_per_second_per_device / point.tokens_per_second_per_device


def test_one_row_for_each_efficiency_predicts_the_others() -> None:
    """Held out: fitted to one published row each, the efficiencies give all others."""

    def fit(point: Published, name: str, **others: float) -> float:
        low, high = 0.2, 1.0
        while high - low > 1e-4:
            middle = (low + high) / 2
            low, high = (middle, high) if with_efficiencies(point, **{name: middle}, **others) < 1 else (low, middle)
        return low

    h100, a100 = fit(find(6667), "matmul_efficiency"), fit(find(4641), "matmul_efficiency")
    fp8 = fit(find(14451), "fp8_efficiency", matmul_efficiency=h100)
    for point in PUBLISHED:
        if point.torchao:
            continue
        matmul = a100 if point.device.startswith("a100") else h100
        ratio = with_efficiencies(point, matmul_efficiency=matmul, fp8_efficiency=fp8)
        assert ratio == pytest.approx(1, abs=0.25), point


def test_the_page_has_the_table() -> None:
    for point in PUBLISHED:
        ratio = estimate(point) / point.tokens_per_second_per_device
        ends = f"| {point.tokens_per_second_per_device:,.0f} | {estimate(point):,.0f} | {ratio:.2f} |"
        (line,) = [line for line in PAGE.splitlines() if line.endswith(ends)]
        assert (" FP8" in line, "torchao" in line) == (point.fp8, point.torchao)
        assert f"| {point.devices} {point.device}" in line


@pytest.mark.parametrize(("model", "devices", "tensor", "pipeline"), [("8B", 32, 2, 1), ("70B", 128, 8, 2)])
def test_the_layouts_of_the_paper_fit(model: str, devices: int, tensor: int, pipeline: int) -> None:
    config = PlanConfig(
        model,
        devices,
        "a100-80g",
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        virtual_pipeline_model_parallel_size=1,
        micro_batch_size=4,
    )
    (found,) = plan_layouts(config).feasible
    assert found.memory.total < 79.2 * GIB
    assert found.layout.parallel.recompute_granularity is None
    assert f"{found.memory.total / GIB:.1f}" in PAGE
    assert 0.3 < found.throughput.mfu < 0.65


def test_a_model_that_does_not_fit_says_how_much_is_missing() -> None:
    result = plan_layouts(PlanConfig("70B", 8, "a100-80g"))
    assert not result.feasible
    reasons = dict(result.infeasible)
    expected = "152.6 GiB of 79.2 GiB with all recomputed: 147.9 state, 0.4 activations, 4.2 other"
    assert reasons["TP8 PP1 DP1 MB1+"] == expected


def test_reasons_are_grouped() -> None:
    reasons = plan_layouts(PlanConfig("70B", 128, "a100-80g")).infeasible
    assert len(reasons) < 25
    assert ("TP16", "tensor_model_parallel_size is 16; expected 1, 2, 4 or 8, for 8 num_key_value_heads") in reasons
    assert dict(plan_layouts(PlanConfig("8B", 7)).infeasible)["TP2"] == "7 devices are not divisible by 2"


def test_in_flight() -> None:
    def layout(virtual: int | None, microbatches: int) -> Layout:
        parallel = ParallelConfig(pipeline_model_parallel_size=4, virtual_pipeline_model_parallel_size=virtual)
        return Layout(parallel, 1, 1, microbatches)

    assert [microbatches_in_flight(layout(None, 8), stage) for stage in range(4)] == [4, 3, 2, 1]
    assert microbatches_in_flight(layout(None, 2), 0) == 2
    assert microbatches_in_flight(layout(5, 8), 0) == 4 * (1 + 3 / (4 * 5))  # Korthikanti et al., equation 5
    assert microbatches_in_flight(layout(5, 2), 0) == 2


def test_bubble_of_equal_stages() -> None:
    """(p - 1) / (v m) of the rest, without the output layer, which makes the last stage longer."""
    llama = MODELS["8B"].__class__(**(vars(MODELS["8B"]) | {"vocab_size": 8}))
    for virtual in (None, 2, 4):
        parallel = ParallelConfig(pipeline_model_parallel_size=4, virtual_pipeline_model_parallel_size=virtual)
        step = layout_throughput(
            TrainingJob(llama, 2048, 16), Layout(parallel, 1, 1, 16), Cluster(find_device("h100"), 4)
        ).step
        assert step.bubble / step.compute == pytest.approx(3 / ((virtual or 1) * 16), rel=0.01)


LAYOUTS = st.builds(
    lambda tensor, pipeline, micro_batch, granularity: (
        ParallelConfig(
            tensor_model_parallel_size=tensor,
            pipeline_model_parallel_size=pipeline,
            sequence_parallel=tensor > 1,
            recompute_granularity=granularity,
        ),
        micro_batch,
    ),
    st.sampled_from([1, 2, 4, 8]),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([None, "selective", "full"]),
)


@settings(max_examples=60, deadline=None)
@given(
    LAYOUTS,
    st.sampled_from(["1B", "8B", "70B"]),
    st.sampled_from(list(DEVICES)),
    st.sampled_from([1, 2, 8, 32]),
    st.sampled_from([512, 8192]),
)
def test_invariants(layout: tuple[ParallelConfig, int], model: str, device: str, data: int, seq_length: int) -> None:
    parallel, micro_batch = layout
    microbatches = 8
    config = PlanConfig(model, 8, device)

    def candidate(size: int):
        job = TrainingJob(MODELS[model], seq_length, size * micro_batch * microbatches)
        it = Layout(parallel, size, micro_batch, microbatches)
        return make_candidate(config, job, Cluster(find_device(device), it.devices), it)

    one, more = candidate(data), candidate(2 * data)
    padding = 2**24  # buckets end at a multiple of the data-parallel size
    assert more.memory.total <= one.memory.total + padding
    for it in (one, more):
        assert 0 < it.throughput.mfu_causal <= it.throughput.mfu < 1
        assert 0 <= it.throughput.bubble < 1
        assert it.throughput.tokens_per_second > 0
        assert min(vars(it.throughput.step).values()) >= 0
    assert more.throughput.tokens_per_second <= 2.001 * one.throughput.tokens_per_second or data == 1


@settings(max_examples=60, deadline=None)
@given(LAYOUTS, st.sampled_from(["1B", "8B", "70B"]))
def test_recomputation_saves_memory(layout: tuple[ParallelConfig, int], model: str) -> None:
    parallel, micro_batch = layout
    job = TrainingJob(MODELS[model], 2048, 256)

    def saved(granularity: str | None) -> int:
        changed = ParallelConfig(**(vars(parallel) | {"recompute_granularity": granularity}))
        return sum(chunk_bytes(job, Layout(changed, 1, micro_batch, 1), ModelChunk(4, False, False)).values())

    assert saved("full") < saved("selective") <= saved(None)


def test_memory_adds_up() -> None:
    layout = Layout(ParallelConfig(), 8, 1, 4)
    memory = fullest(TrainingJob(MODELS["1B"], 2048, 32, fp8=True), layout, 4.0, 0.05)
    parts = memory.weights + memory.gradients + memory.optimizer + memory.fp8_weights + memory.working + memory.overhead
    assert memory.total == parts + sum(memory.activations.values())
    assert memory.overhead >= 4 * GIB


@pytest.mark.parametrize("width", [80, 120, 200])
def test_long_numbers_cost_columns_not_digits(width: int, capsys: pytest.CaptureFixture[str]) -> None:
    show_plan(
        plan_layouts(PlanConfig("8B", 10**7, seq_length=65536, global_batch_size=10**7, tokens=1e18)), Console(width=width)
    )
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= width
    assert "…" not in "\n".join(lines)
    assert any("CP" in line and "/device" in line and "GiB" in line for line in lines)


@pytest.mark.parametrize("width", [80, 120, 200])
@pytest.mark.parametrize("config", [PlanConfig("405B", 1024, "h100", seq_length=8192, fp8=True), PlanConfig("8B", 32)])
def test_the_table_is_as_wide_as_the_terminal(width: int, config: PlanConfig, capsys: pytest.CaptureFixture[str]) -> None:
    show_plan(plan_layouts(config), Console(width=width))
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= width
    headings = [line for line in lines if line.lstrip("# ").startswith("TP ")]
    assert ["#" in line for line in headings] == [True, False], "ours, and FSDP"
    assert "FSDP" in headings[1]
    for line in headings:
        assert all(name in line for name in ("GiB", "bubble", "step s", "/device", "MFU", "days"))
        assert width == 80 or "causal" in line
    assert "…" not in "\n".join(lines)


def test_the_command(tmp_path: Path, tiny_tokenizer_dir: str) -> None:
    path = tmp_path / "plan.json"
    folder = make_tiny_llama(tmp_path / "hf", tiny_tokenizer_dir)
    arguments = (folder, "--devices", "4", "--seq_length", "64", "--global_batch_size", "8", "--json", str(path))
    result = run_tool("plan_run.py", *arguments)
    assert result.stdout.splitlines()[-1] == str(path)
    content = json.loads(path.read_text())
    speeds = [layout["tokens_per_second"] for layout in content["layouts"]]
    assert speeds == sorted(speeds, reverse=True)
    for layout in content["layouts"]:
        assert layout["step_seconds"]["total"] == pytest.approx(
            sum(seconds for name, seconds in layout["step_seconds"].items() if name != "total")
        )
    result = run_tool("plan_run.py", *arguments, "--simulate", "3", "--tensor_model_parallel_size", "2")
    simulation = json.loads(path.read_text())["simulation"]
    assert f"{simulation['activations']:,}" in result.stdout
    kinds = {(row["kind"], row["group_size"]) for row in simulation["step_traffic"]}
    assert {("reduce-scatter", 2), ("all-gather", 2)} <= kinds


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["9B", "--devices", "8"], "model is '9B'; expected 1B, 3B, 8B, 70B, 405B, or a Hugging Face or Megatron"),
        (
            ["8B", "--devices", "8", "--device", "v100"],
            "device is 'v100'; expected a100-40g, a100-80g, h100, h200, b200, gb200, g",
        ),
        (["8B", "--devices", "8", "--device", "a100-80g", "--fp8"], "fp8 is true but device a100-80g has no FP8 units"),
        (["8B", "--devices", "0"], "devices is 0; expected 1 or more"),
        (
            ["8B", "--devices", "1", "--seq_length", "200000"],
            "seq_length is 200000; expected at most 131072, the model's max_position",
        ),
        (
            ["8B", "--devices", "1", "--matmul_efficiency", "2"],
            "matmul_efficiency is 2.0; expected a number above 0, up to 1",
        ),
        (["8B", "--devices", "12", "--simulate", "0", "--tensor_model_parallel_size", "8"], "12 devices are not divisible"),
    ],
)
def test_wrong_input_is_one_line(arguments: list[str], message: str) -> None:
    result = run_tool("plan_run.py", *arguments, check=False)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert message in result.stderr


def write_run(folder: Path, **changes: dict[str, Any]) -> str:
    """A run's configuration and mixture, of which the plan needs the sequence length alone."""
    run: dict[str, dict[str, Any]] = {
        "checkpoint": {"load": "nowhere", "save": "nowhere"},
        "training": {"train_iters": 10, "micro_batch_size": 2, "global_batch_size": 64, "params_dtype": "bf16"},
        "parallel": {"tensor_model_parallel_size": 4, "pipeline_model_parallel_size": 2, "sequence_parallel": True},
    }
    content = {name: run.get(name, {}) | changes.get(name, {}) for name in {*run, *changes}}
    return write_yaml(folder / "run.yaml", content | {"mixture": write_yaml(folder / "mixture.yaml", {"seq_length": 4096})})


@pytest.mark.parametrize(
    "length", [{}, {"train_iters": None, "train_samples": 640}, {"train_iters": None, "train_tokens": 1}]
)
def test_the_plan_of_a_run(tmp_path: Path, length: dict[str, int | None]) -> None:
    """Everything as its configuration says, whatever else the plan is told."""
    uneven = {"num_layers_in_first_pipeline_stage": 14, "recompute_granularity": "full", "recompute_num_layers": 2}
    path = write_run(tmp_path, training=length, parallel=uneven)
    result = plan_one(read_planned_run(PlanConfig("8B", 32, run=path, seq_length=7, micro_batch_size=7, tokens=7)))
    (candidate,) = result.feasible
    assert (result.job.seq_length, result.job.global_batch_size, result.job.params_dtype) == (4096, 64, "bf16")
    assert result.config.tokens == (1 if "train_tokens" in length else 640 * 4096)
    layout = candidate.layout
    assert (layout.data_parallel_size, layout.micro_batch_size, layout.num_microbatches) == (4, 2, 8)
    parallel = ParallelConfig(4, 2, sequence_parallel=True, **uneven)
    assert layout.parallel == parallel
    even = read_planned_run(PlanConfig("8B", 32, run=write_run(tmp_path, training=length)))
    (same,) = plan_one(even).feasible
    (searched,) = plan_layouts(dataclasses.replace(even.config, run=None, virtual_pipeline_model_parallel_size=1)).feasible
    assert (same.memory, same.throughput) == (searched.memory, searched.throughput)
    assert candidate.memory.total < same.memory.total
    assert candidate.throughput.step.total > same.throughput.step.total


@pytest.mark.parametrize(
    ("parallel", "devices", "message"),
    [
        (
            {"context_parallel_size": 3},
            32,
            "32 devices are not divisible by tensor x pipeline x context size 4 x 2 x 3",
        ),
        (
            {"pipeline_model_parallel_layout": "Et*16|t*16L"},
            32,
            "parallel.pipeline_model_parallel_layout is Et*16|t*16L, which",
        ),
        ({"tensor_parallel": 2}, 32, "parallel.tensor_parallel is unknown; expected tensor_model_parallel_size"),
        ({"tensor_model_parallel_size": 0}, 32, "parallel.tensor_model_parallel_size is 0; expected 1 or more"),
        ({}, 33, "33 devices are not divisible by tensor x pipeline size 4 x 2 = 8"),
        ({"num_layers_in_first_pipeline_stage": 40}, 32, "num_layers_in_first_pipeline_stage 40 leave -8 of 32 layers"),
    ],
)
def test_runs_that_cannot_be_planned(tmp_path: Path, parallel: dict[str, Any], devices: int, message: str) -> None:
    path = write_run(tmp_path, parallel=parallel)
    with pytest.raises(InputError, match=f"^{re.escape(path)}: {re.escape(message)}"):
        read_planned_run(PlanConfig("8B", devices, run=path))


def test_the_command_refuses_a_run_that_does_not_fit(tmp_path: Path) -> None:
    path = write_run(tmp_path, training={"micro_batch_size": 8})
    result = run_tool("plan_run.py", "8B", "--devices", "32", "--device", "a100-40g", "--run", path, check=False)
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert f"{path} does not fit into 32 x a100-40g: " in result.stderr
    assert " GiB of 39.4 GiB with nothing recomputed: " in result.stderr
    assert "MFU" in run_tool("plan_run.py", "8B", "--devices", "32", "--device", "h200", "--run", path).stdout


def test_a_run_with_the_names_of_the_last_release(tmp_path: Path) -> None:
    path = write_run(tmp_path, trouble={"max_skipped_steps": 2})
    planned = run_tool("plan_run.py", "8B", "--devices", "32", "--device", "h200", "--run", path)
    assert "MFU" in planned.stdout
    said = [line for line in planned.stderr.splitlines() if line.startswith("note: ")]
    assert said == [f"note: {path}: trouble is now called loss_spikes; the old name is accepted until the next release"]


def test_a_plan_needs_no_torch() -> None:
    call = "import megatron_cpt.planning.run as r; r.plan_layouts(r.PlanConfig('8B', 8))"
    code = f"import sys; {call}; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


def test_models_and_devices_by_any_case() -> None:
    assert find_model("70b") is MODELS["70B"]
    assert find_device("H100", memory_gib=64).memory_gib == 64
    with pytest.raises(InputError, match="recompute_granularity is None; expected selective with recompute_modules"):
        PlanConfig("8B", 8, recompute_modules=["mlp"])


def test_stages_of_a_model_whose_layers_do_not_divide() -> None:
    result = plan_layouts(PlanConfig("405B", 1024, seq_length=8192, pipeline_model_parallel_size=8, micro_batch_size=1))
    parallel = result.feasible[0].layout.parallel
    assert layers_of_stages(126, parallel) == [14] + [16] * 7


def by_speed(result: LayoutPlan, key: Callable) -> list:
    return [key(candidate.layout) for candidate in result.feasible]


def test_a_fixed_size_is_kept() -> None:
    result = plan_layouts(PlanConfig("8B", 16, tensor_model_parallel_size=4, micro_batch_size=2))
    assert set(by_speed(result, lambda layout: (layout.tensor, layout.micro_batch_size))) == {(4, 2)}
    for granularity, expected in (("none", None), ("selective", "selective"), ("full", "full")):
        result = plan_layouts(PlanConfig("8B", 16, recompute_granularity=granularity))
        assert set(by_speed(result, lambda layout: layout.parallel.recompute_granularity)) == {expected}


def step_of(*, devices: int, tensor: int, pipeline: int, **changes: Any) -> StepTime:
    config = PlanConfig(
        "8B",
        devices,
        "a100-80g",
        seq_length=4096,
        global_batch_size=240,
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        virtual_pipeline_model_parallel_size=1,
        micro_batch_size=1,
        **changes,
    )
    (candidate,) = plan_layouts(config).feasible
    return candidate.throughput.step


def test_a_pipeline_over_several_nodes_sends_over_the_network() -> None:
    fast, slow = (step_of(devices=16, tensor=4, pipeline=4, network_gb_per_s=rate) for rate in (25.0, 0.1))
    assert slow.pipeline > 100 * fast.pipeline
    within = [step_of(devices=8, tensor=2, pipeline=4, network_gb_per_s=rate) for rate in (25.0, 0.1)]
    assert within[0].pipeline == within[1].pipeline


def test_tensor_parallel_groups_that_lie_across_two_nodes_use_the_network() -> None:
    inside, across = (step_of(devices=24, tensor=4, pipeline=1, devices_per_node=size) for size in (8, 6))
    assert across.tensor_parallel > 5 * inside.tensor_parallel


def test_fp8_needs_units_that_can() -> None:
    with pytest.raises(InputError, match="device a100-80g has no FP8 units"):
        plan_layouts(PlanConfig("8B", 8, "a100-80g", fp8=True, fp8_tflops=600.0))


def test_every_layout_that_is_refused_is_named() -> None:
    config = PlanConfig("8B", 8, global_batch_size=6, pipeline_model_parallel_size=4, virtual_pipeline_model_parallel_size=4)
    named = " ".join(layouts for layouts, _ in plan_layouts(config).infeasible)
    assert {"TP1 PP4 DP2 MB1", "TP2 PP4 DP1 MB1", "TP2 PP4 DP1 MB2"} <= set(re.findall(r"TP\d PP\d DP\d MB\d", named))
    reasons = dict(plan_layouts(PlanConfig("70B", 128, "a100-80g")).infeasible)
    (reason,) = (reason for layouts, reason in reasons.items() if "PP32" in layouts.split(", "))
    assert reason == "80 layers are too few for 32 stages: 3 in each but the first leave it none"


@pytest.mark.parametrize(
    ("layers", "seq_length", "micro_batch_size", "measured"),
    [(8, 8192, 1, 70.84e9), (8, 2048, 4, 70.84e9), (4, 8192, 1, 50.23e9)],
)
def test_memory_is_what_torch_has_allocated_on_a_gpu(
    layers: int, seq_length: int, micro_batch_size: int, measured: float
) -> None:
    """Layers of the 8B on one H200 (`make bench ROW="gpu train"`), allowances left out: within 1 %."""
    llama = dataclasses.replace(MODELS["8B"], num_hidden_layers=layers)
    job, layout = TrainingJob(llama, seq_length, 4 * micro_batch_size), Layout(ParallelConfig(), 1, micro_batch_size, 4)
    assert memory_of_stage(job, layout, 0, overhead_gib=0, fragmentation=0).total == pytest.approx(measured, rel=0.01)


CONTEXT = PlanConfig("8B", 64, seq_length=131072, global_batch_size=64)


def test_context_parallelism_is_planned() -> None:
    """Of long samples, where nobody asks for it; never of short ones, nor with layers that cannot."""
    sizes = {candidate.layout.context for candidate in plan_layouts(CONTEXT).feasible}
    assert {4, 8, 16} <= sizes
    for changes in ({"seq_length": 8192}, {"transformer_impl": "local"}, {"params_dtype": "fp32"}):
        found = plan_layouts(dataclasses.replace(CONTEXT, **changes)).feasible
        assert {candidate.layout.context for candidate in found} <= {1}
    asked = plan_layouts(dataclasses.replace(CONTEXT, context_parallel_size=2, seq_length=8192)).feasible
    assert {candidate.layout.context for candidate in asked} == {2}


def with_context(context: int, **changes: Any) -> Candidate:
    """8 tensor-parallel devices, so that the ring goes over the network; data parallelism takes what remains."""
    config = dataclasses.replace(
        CONTEXT,
        tensor_model_parallel_size=8,
        pipeline_model_parallel_size=1,
        micro_batch_size=1,
        recompute_granularity="none",
        transformer_impl="transformer_engine",
        memory_gib=1000.0,
        context_parallel_size=context,
        **changes,
    )
    (found,) = plan_layouts(config).feasible
    return found


def test_what_context_parallelism_changes() -> None:
    """A share of the activations on each device, the same optimizer states; communication that computing does not hide."""
    one, four = with_context(1), with_context(4)
    assert four.layout.devices == one.layout.devices == 64
    assert (one.layout.data_parallel_size, four.layout.data_parallel_size) == (8, 2)
    state = ("weights", "gradients", "optimizer")
    assert [getattr(four.memory, name) for name in state] == [getattr(one.memory, name) for name in state]
    for part in ("norms", "attention", "mlp", "output", "rotary angles"):
        assert four.memory.activations[part] * 4 == pytest.approx(one.memory.activations[part], rel=1e-6)
    assert four.throughput.step.context_parallel == 0, "attention of long samples takes longer than sending keys and values"
    slow = with_context(4, network_gb_per_s=0.1)
    layers, local, turns = 32, 131072 // 4, 3
    sent = 2 * local * (8 * 128 // 8) * 2  # keys and values of a device's tokens, bf16; in the backward pass twice
    seconds = layers * slow.layout.num_microbatches * turns * 3 * sent / (0.1e9 * LINK_EFFICIENCY)
    assert 0.5 * seconds < slow.throughput.step.context_parallel < seconds
    assert slow.throughput.tokens_per_second < four.throughput.tokens_per_second


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"context_parallel_size": 2, "params_dtype": "fp32"}, "context_parallel_size is 2 with fp32; expected bf16"),
        (
            {"context_parallel_size": 2, "transformer_impl": "local"},
            "context_parallel_size is 2; expected transformer_engine as transformer_impl, which is local",
        ),
        ({"context_parallel_size": 2, "seq_length": 2050}, "seq_length is 2050; expected a multiple of 2 x context"),
        ({"fp8": True, "transformer_impl": "local"}, "fp8 is True; expected transformer_engine as transformer_impl"),
        (
            {"fp8": True, "recompute_granularity": "selective", "recompute_modules": ["layernorm"]},
            "recompute_modules has layernorm, a part of Transformer Engine's linear layers",
        ),
    ],
)
def test_what_layers_cannot_do_is_named(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(InputError, match=f"^{re.escape(reason)}"):
        plan_layouts(PlanConfig("8B", 64, **changes))


def test_a_context_size_that_does_not_divide_the_devices() -> None:
    (refused, *_) = plan_layouts(PlanConfig("8B", 8, context_parallel_size=16, pipeline_model_parallel_size=1)).infeasible
    assert refused == ("TP1 PP1 CP16", "8 devices are not divisible by 16, TP x PP x CP")
    names, reason = plan_layouts(PlanConfig("8B", 12, context_parallel_size=8, global_batch_size=12)).infeasible[0]
    assert "TP1 PP1 CP8" in names
    assert reason == "12 devices are not divisible by 8, TP x PP x CP"


def test_whose_layers_are_planned_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    asked: list[tuple[dict[str, Any], str]] = [
        ({}, "gradients; torch's layers;"),
        ({"fp8": True}, "gradients; Transformer Engine's layers;"),
        ({"seq_length": 131072}, "gradients; torch's, with context parallelism Transformer Engine's, layers;"),
    ]
    for changes, said in asked:
        show_plan(plan_layouts(PlanConfig("8B", 64, global_batch_size=64, **changes)), Console(width=300))
        assert said in capsys.readouterr().out


def test_tight_layouts_come_last_and_hide_none_with_room() -> None:
    config = PlanConfig("70B", 64, seq_length=8192, fp8=True)
    result = plan_layouts(config)
    tight = [candidate.tight for candidate in result.feasible]
    assert tight == sorted(tight)
    assert {*tight} == {False, True}
    limit = 79.1 * GIB
    for candidate in result.feasible:
        assert candidate.tight == (candidate.memory.total > 0.95 * limit)
        assert candidate.memory.total <= limit
    # A tight layout stands beside the best with room of the same sizes only if it is faster.
    by_sizes: dict[tuple, list[Candidate]] = {}
    for candidate in result.feasible:
        layout = candidate.layout
        by_sizes.setdefault((layout.tensor, layout.pipeline, layout.micro_batch_size), []).append(candidate)
    assert max(map(len, by_sizes.values())) == 2
    for with_room, other in (pair for pair in by_sizes.values() if len(pair) == 2):
        assert not with_room.tight
        assert other.tight
        assert other.throughput.tokens_per_second > with_room.throughput.tokens_per_second


def test_a_tight_layout_alone_is_marked(capsys: pytest.CaptureFixture[str]) -> None:
    config = PlanConfig("8B", 8, tensor_model_parallel_size=2, pipeline_model_parallel_size=1, micro_batch_size=1)
    config = dataclasses.replace(config, recompute_granularity="none")
    needed = plan_layouts(config).feasible[0].memory.total / GIB
    for share, marked in ((0.94, False), (0.96, True)):
        show_plan(plan_layouts(dataclasses.replace(config, memory_gib=needed / share)), Console(width=80))
        shown = capsys.readouterr().out
        assert (f" {needed:.1f}! " in shown, "!: needs more than 95%" in shown) == (marked, marked)


def test_fsdp_is_compared_and_not_ours(capsys: pytest.CaptureFixture[str]) -> None:
    result = plan_layouts(PlanConfig("8B", 8, seq_length=8192))
    assert 0 < len(result.compared) <= 3
    assert all(candidate.layout.fully_sharded and candidate.layout.pipeline == 1 for candidate in result.compared)
    assert not any(candidate.layout.fully_sharded for candidate in result.feasible)
    show_plan(result, Console(width=80))
    ours, _, others = capsys.readouterr().out.partition("not ours")
    assert "FSDP" not in ours
    assert re.search(r"^TP +FSDP +MB", others, re.MULTILINE)
    for alone in (PlanConfig("1B", 1), PlanConfig("8B", 8, pipeline_model_parallel_size=2)):
        assert not plan_layouts(alone).compared


def test_fsdp_shards_everything_and_gathers_layers() -> None:
    """A layer and the next, one layer's gradients, embedding and output layer with one gradient."""
    layout = Layout(ParallelConfig(), 8, 1, 4)
    job = TrainingJob(MODELS["8B"], 8192, 32)
    ours, sharded = (
        memory_of_stage(job, dataclasses.replace(layout, fully_sharded=sharded), 0, 4.0, 0.0) for sharded in (False, True)
    )
    assert sharded.weights == ours.weights // 8
    assert sharded.gradients == ours.gradients // 8
    assert sharded.optimizer == ours.optimizer
    layer = 4096 * (2 * 4096 + 2 * 1024) + 3 * 4096 * 14336
    assert sharded.working - ours.working == 2 * (3 * layer + 3 * 128256 * 4096)


@pytest.mark.parametrize(
    "config",
    [
        PlanConfig("1B", 1),
        PlanConfig("8B", 7),
        PlanConfig("3B", 12, global_batch_size=36),
        PlanConfig("405B", 10**9, global_batch_size=10**9),
        PlanConfig("8B", 13, "gb300", fp8=True, global_batch_size=13 * 64),
        PlanConfig("1B", 3, "a100-40g", seq_length=131072, global_batch_size=3),
        PlanConfig("1B", 8, seq_length=7, global_batch_size=10**12),
    ],
    ids=str,
)
def test_absurd_sizes(config: PlanConfig, capsys: pytest.CaptureFixture[str]) -> None:
    result = plan_layouts(config)
    show_plan(result, Console(width=80))
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80
    for candidate in result.feasible + result.compared:
        layout = candidate.layout
        assert layout.devices == config.devices
        assert layout.data_parallel_size * layout.micro_batch_size * layout.num_microbatches == config.global_batch_size
        assert candidate.memory.total <= result.cluster.device.memory_gib * GIB


def test_mfu_of_plan_and_progress_line_is_one() -> None:
    """What the plan says of a step is what the line of a run says that took so long, in every precision."""
    known = {"a100-80g": "NVIDIA A100-SXM4-80GB", "a100-40g": "NVIDIA A100-SXM4-40GB", "h100": "NVIDIA H100 80GB HBM3"}
    known |= {name: f"NVIDIA {name.upper()}" for name in ("h200", "b200", "gb200", "gb300")}
    for name, device in DEVICES.items():
        assert known_peak_tflops(known[name]) == device.bf16_tflops
    for precision in ({"params_dtype": "bf16"}, {"fp8": True}, {"params_dtype": "fp32"}):
        config = PlanConfig("8B", 32, "h200", seq_length=4096, **precision)
        for candidate in plan_layouts(config).feasible[:3]:
            planned, job = candidate.throughput, make_job(config)
            flops = tuple(flops_per_token(job.llama, 4096, causal) for causal in (False, True))
            peak = known_peak_tflops(known["h200"])
            line = run_throughput(planned.step.total, 256 * 4096, 32, flops, peak)
            assert (line["mfu"], line["mfu_causal"]) == pytest.approx((planned.mfu, planned.mfu_causal), rel=1e-9)
            assert line["tokens_per_second_per_device"] == pytest.approx(planned.tokens_per_second_per_device, rel=1e-9)
