"""Plans: published throughput, the layouts of the paper, invariants, and the command."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from tiny_models import ROOT, make_tiny_llama, run_tool, write_yaml

from megatron_cpt.config.parallel import ParallelConfig
from megatron_cpt.errors import InputError
from megatron_cpt.planning.activations import chunk_bytes, microbatches_in_flight
from megatron_cpt.planning.config import PlanConfig
from megatron_cpt.planning.hardware import DEVICES, Cluster, find_device
from megatron_cpt.planning.layouts import Chunk, Job, Layout, layers_of_stages
from megatron_cpt.planning.memory import GIB, fullest, memory_of_stage
from megatron_cpt.planning.one_run import plan_one, read_run
from megatron_cpt.planning.presets import MODELS, find_model
from megatron_cpt.planning.published import PUBLISHED, Published
from megatron_cpt.planning.report import show
from megatron_cpt.planning.search import Plan, make_candidate, plan
from megatron_cpt.planning.timing import StepTime, throughput

PAGE = (ROOT / "docs/planning.md").read_text(encoding="utf-8")
FITTED_CONSTANTS = 4  # matrix products on A100, on H100 in bf16 and in FP8; what tp_comm_overlap hides


def estimate(point: Published) -> float:
    return throughput(point.job, point.layout, point.cluster).tokens_per_second_per_device


@pytest.mark.parametrize("point", PUBLISHED, ids=lambda p: f"{p.model}-{p.device}-{p.tokens_per_second_per_device:g}")
def test_published_throughput(point: Published) -> None:
    assert estimate(point) == pytest.approx(point.tokens_per_second_per_device, rel=0.25)


def test_the_fit_has_far_fewer_constants_than_points() -> None:
    assert len(PUBLISHED) >= 4 * FITTED_CONSTANTS
    efficiencies = {(device.matmul_efficiency, device.fp8_efficiency) for device in DEVICES.values()}
    assert len({x for pair in efficiencies for x in pair if x}) == FITTED_CONSTANTS - 1
    errors = [math.log(estimate(point) / point.tokens_per_second_per_device) for point in PUBLISHED]
    assert sum(map(abs, errors)) / len(errors) < 0.10


def find(tokens_per_second: float) -> Published:
    (point,) = (point for point in PUBLISHED if point.tokens_per_second_per_device == tokens_per_second)
    return point


def with_efficiencies(point: Published, **efficiencies: float) -> float:
    device = dataclasses.replace(point.cluster.device, **efficiencies)
    result = throughput(point.job, point.layout, Cluster(device, point.devices))
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
        matmul = h100 if point.device == "h100" else a100
        ratio = with_efficiencies(point, matmul_efficiency=matmul, fp8_efficiency=fp8)
        assert ratio == pytest.approx(1, abs=0.25), point


def test_the_page_has_the_table() -> None:
    for point in PUBLISHED:
        ratio = estimate(point) / point.tokens_per_second_per_device
        assert f"| {point.tokens_per_second_per_device:,.0f} | {estimate(point):,.0f} | {ratio:.2f} |" in PAGE


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
    (found,) = plan(config).feasible
    assert found.memory.total < 79.2 * GIB
    assert found.layout.parallel.recompute_granularity is None
    assert f"{found.memory.total / GIB:.1f}" in PAGE
    assert 0.3 < found.throughput.mfu < 0.65


def test_a_model_that_does_not_fit_says_how_much_is_missing() -> None:
    result = plan(PlanConfig("70B", 8, "a100-80g"))
    assert not result.feasible
    reasons = dict(result.infeasible)
    expected = "152.6 GiB of 79.2 GiB with all recomputed: 147.9 state, 0.4 activations, 4.2 other"
    assert reasons["TP8 PP1 DP1 MB1+"] == expected


def test_reasons_are_grouped() -> None:
    reasons = plan(PlanConfig("70B", 128, "a100-80g")).infeasible
    assert len(reasons) < 25
    assert ("TP16", "tensor_model_parallel_size is 16; expected 1, 2, 4 or 8, for 8 num_key_value_heads") in reasons
    assert dict(plan(PlanConfig("8B", 7)).infeasible)["TP2"] == "7 devices are not divisible by 2"


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
        step = throughput(Job(llama, 2048, 16), Layout(parallel, 1, 1, 16), Cluster(find_device("h100"), 4)).step
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
        job = Job(MODELS[model], seq_length, size * micro_batch * microbatches)
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
    job = Job(MODELS[model], 2048, 256)

    def saved(granularity: str | None) -> int:
        changed = ParallelConfig(**(vars(parallel) | {"recompute_granularity": granularity}))
        return sum(chunk_bytes(job, Layout(changed, 1, micro_batch, 1), Chunk(4, False, False)).values())

    assert saved("full") < saved("selective") <= saved(None)


def test_memory_adds_up() -> None:
    layout = Layout(ParallelConfig(), 8, 1, 4)
    memory = fullest(Job(MODELS["1B"], 2048, 32, fp8=True), layout, 4.0, 0.05)
    parts = memory.weights + memory.gradients + memory.optimizer + memory.fp8_weights + memory.working + memory.overhead
    assert memory.total == parts + sum(memory.activations.values())
    assert memory.overhead >= 4 * GIB


@pytest.mark.parametrize("width", [80, 120, 200])
@pytest.mark.parametrize("config", [PlanConfig("405B", 1024, "h100", seq_length=8192, fp8=True), PlanConfig("8B", 32)])
def test_the_table_is_as_wide_as_the_terminal(width: int, config: PlanConfig, capsys: pytest.CaptureFixture[str]) -> None:
    show(plan(config), Console(width=width))
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= width
    rows = [line for line in lines if line.startswith("TP ")]
    assert len(rows) == 1
    assert all(name in rows[0] for name in ("GiB", "bubble", "step s", "/device", "MFU", "causal", "days"))
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
        (["8B", "--devices", "8", "--device", "v100"], "device is 'v100'; expected a100-40g, a100-80g, h100, h200, b200"),
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
    result = plan_one(read_run(PlanConfig("8B", 32, run=path, seq_length=7, micro_batch_size=7, tokens=7)))
    (candidate,) = result.feasible
    assert (result.job.seq_length, result.job.global_batch_size, result.job.params_dtype) == (4096, 64, "bf16")
    assert result.config.tokens == (1 if "train_tokens" in length else 640 * 4096)
    layout = candidate.layout
    assert (layout.data_parallel_size, layout.micro_batch_size, layout.num_microbatches) == (4, 2, 8)
    parallel = ParallelConfig(4, 2, sequence_parallel=True, **uneven)
    assert layout.parallel == parallel
    even = read_run(PlanConfig("8B", 32, run=write_run(tmp_path, training=length)))
    (same,) = plan_one(even).feasible
    (searched,) = plan(dataclasses.replace(even.config, run=None, virtual_pipeline_model_parallel_size=1)).feasible
    assert (same.memory, same.throughput) == (searched.memory, searched.throughput)
    assert candidate.memory.total < same.memory.total
    assert candidate.throughput.step.total > same.throughput.step.total


@pytest.mark.parametrize(
    ("parallel", "devices", "message"),
    [
        ({"context_parallel_size": 2}, 32, "parallel.context_parallel_size is 2, which the estimates do not know"),
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
        read_run(PlanConfig("8B", devices, run=path))


def test_the_command_refuses_a_run_that_does_not_fit(tmp_path: Path) -> None:
    path = write_run(tmp_path, training={"micro_batch_size": 8})
    result = run_tool("plan_run.py", "8B", "--devices", "32", "--device", "a100-40g", "--run", path, check=False)
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert f"{path} does not fit into 32 x a100-40g: " in result.stderr
    assert " GiB of 39.4 GiB with nothing recomputed: " in result.stderr
    assert "MFU" in run_tool("plan_run.py", "8B", "--devices", "32", "--device", "h200", "--run", path).stdout


def test_a_plan_needs_no_torch() -> None:
    code = "import sys; import megatron_cpt.planning.run as r; r.plan(r.PlanConfig('8B', 8)); print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


def test_models_and_devices_by_any_case() -> None:
    assert find_model("70b") is MODELS["70B"]
    assert find_device("H100", memory_gib=64).memory_gib == 64
    with pytest.raises(InputError, match="recompute_granularity is None; expected selective with recompute_modules"):
        PlanConfig("8B", 8, recompute_modules=["mlp"])


def test_stages_of_a_model_whose_layers_do_not_divide() -> None:
    result = plan(PlanConfig("405B", 1024, seq_length=8192, pipeline_model_parallel_size=8, micro_batch_size=1))
    parallel = result.feasible[0].layout.parallel
    assert layers_of_stages(126, parallel) == [14] + [16] * 7


def by_speed(result: Plan, key: Callable) -> list:
    return [key(candidate.layout) for candidate in result.feasible]


def test_a_fixed_size_is_kept() -> None:
    result = plan(PlanConfig("8B", 16, tensor_model_parallel_size=4, micro_batch_size=2))
    assert set(by_speed(result, lambda layout: (layout.tensor, layout.micro_batch_size))) == {(4, 2)}
    for granularity, expected in (("none", None), ("selective", "selective"), ("full", "full")):
        result = plan(PlanConfig("8B", 16, recompute_granularity=granularity))
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
    (candidate,) = plan(config).feasible
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
        plan(PlanConfig("8B", 8, "a100-80g", fp8=True, fp8_tflops=600.0))


def test_every_layout_that_is_refused_is_named() -> None:
    config = PlanConfig("8B", 8, global_batch_size=6, pipeline_model_parallel_size=4, virtual_pipeline_model_parallel_size=4)
    named = " ".join(layouts for layouts, _ in plan(config).infeasible)
    assert {"TP1 PP4 DP2 MB1", "TP2 PP4 DP1 MB1", "TP2 PP4 DP1 MB2"} <= set(re.findall(r"TP\d PP\d DP\d MB\d", named))
    reasons = dict(plan(PlanConfig("70B", 128, "a100-80g")).infeasible)
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
    job, layout = Job(llama, seq_length, 4 * micro_batch_size), Layout(ParallelConfig(), 1, micro_batch_size, 4)
    assert memory_of_stage(job, layout, 0, overhead_gib=0, fragmentation=0).total == pytest.approx(measured, rel=0.01)
