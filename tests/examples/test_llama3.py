"""The recipes of examples/llama3_8b and llama3_70b: what they say, and that the tools take them at the size they are for."""

from __future__ import annotations

import json
import math
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from llama3 import RECIPES, Recipe, make_project
from tiny_models import ROOT

from megatron_cpt.config.cli import read_arguments
from megatron_cpt.config.run import RunConfig
from megatron_cpt.convert.config import HfToMegatron, MegatronToHf
from megatron_cpt.corpus.config import PreprocessConfig
from megatron_cpt.corpus.merge import MergeConfig
from megatron_cpt.evaluation.config import EvaluateConfig
from megatron_cpt.planning.activations import chunk_bytes
from megatron_cpt.planning.config import PlanConfig
from megatron_cpt.planning.layouts import chunks_of_stage
from megatron_cpt.planning.memory import GIB
from megatron_cpt.planning.one_run import plan_one, read_planned_run
from megatron_cpt.planning.run import run_plan as plan_run
from megatron_cpt.planning.search import make_job
from megatron_cpt.planning.weights import state_bytes
from megatron_cpt.platforms import current_platform
from megatron_cpt.posttrain.dpo import DpoConfig
from megatron_cpt.posttrain.sft import SftConfig
from megatron_cpt.training.pretrain import setup
from megatron_cpt.training.validate_config import check_run
from megatron_cpt.utils.errors import InputError

SIZES = ("8b", "70b")
TOOLS: dict[str, type] = {  # of a command in a README: the tool, and its subcommand
    "preprocess_data": PreprocessConfig,
    "merge_datasets": MergeConfig,
    "convert_checkpoint hf-to-megatron": HfToMegatron,
    "convert_checkpoint megatron-to-hf": MegatronToHf,
    "plan_run": PlanConfig,
    "pretrain_cpt": RunConfig,
    "finetune_sft": SftConfig,
    "finetune_dpo": DpoConfig,
    "evaluate": EvaluateConfig,
}
each_recipe = pytest.mark.parametrize("recipe", RECIPES, ids=str)


@pytest.fixture(scope="module")
def project_folder(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_dir: str) -> Path:
    return make_project(tmp_path_factory.mktemp("project"), tiny_tokenizer_dir)


@pytest.fixture(autouse=True)
def project(project_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of every test."""
    monkeypatch.chdir(project_folder)
    return project_folder


@pytest.fixture
def any_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is refused for want of a GPU and Transformer Engine."""
    monkeypatch.setattr(type(current_platform()), "refuses", lambda *_: None)


def fields(path: str) -> dict[str, Any]:
    return yaml.safe_load(Path(path).read_text(encoding="utf-8"))


def planned(recipe: Recipe) -> PlanConfig:
    return PlanConfig(recipe.model, recipe.gpus, recipe.device, run=recipe.path)


@each_recipe
def test_a_run_of_the_real_shape_passes_all_checks(recipe: Recipe, any_engine: None) -> None:
    """Those that pretrain_cpt.py makes on every process before it starts, on the cluster that the recipe is for."""
    run = check_run(recipe.read(), recipe.gpus)
    assert run.data_parallel_size == {"8b": 16, "70b": 8}[recipe.size]
    assert run.llama.num_hidden_layers == {"8b": 32, "70b": 80}[recipe.size]
    assert run.mixture.seq_length == (2048 if recipe.name == "cpt" else 8192)
    samples = math.ceil(100e9 / run.mixture.seq_length)
    assert run.data.run_samples == 256 * math.ceil(samples / 256)
    assert run.data.ledger(run.mixture).almr_realised == pytest.approx(0.33, abs=1e-6)
    assert (run.schedule.decay_style, run.schedule.end) == ("linear", samples)


@each_recipe
def test_processes_that_do_not_divide_are_refused(recipe: Recipe, any_engine: None) -> None:
    together = {"8b": 2, "70b": 16}[recipe.size]
    with pytest.raises(InputError, match=f"start a multiple of {together}$"):
        check_run(recipe.read(), recipe.gpus + 1)
    with pytest.raises(
        InputError, match=r"global_batch_size is 256; expected a multiple of \d+, micro_batch_size \d x data-parallel size 3"
    ):
        check_run(recipe.read(), 3 * together)
    with pytest.raises(InputError, match=f"{recipe.gpus + 1} devices are not divisible by tensor x pipeline size"):
        read_planned_run(PlanConfig(recipe.model, recipe.gpus + 1, run=recipe.path))
    with pytest.raises(InputError, match=f"{recipe.path}: global_batch_size 256 is not divisible by data-parallel size 3"):
        read_planned_run(PlanConfig(recipe.model, 3 * together, run=recipe.path))


def test_check_only_shows_what_would_be_read(capfd: pytest.CaptureFixture[str]) -> None:
    setup(RECIPES[0].read("--check_only", "true", "--world_size", "32"))
    assert "48,828,160 samples of 2,048 tokens; ALMR asked 0.3300, realised 0.3300" in capfd.readouterr().err


@pytest.mark.parametrize("size", SIZES)
def test_the_settings_of_the_paper(size: str) -> None:
    for name, micro_batch in (("cpt", 4), ("cpt_8k", 1)):
        run = Recipe(size, name, "").read()
        parallel, training = run.parallel, run.training
        layout = (parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size)
        assert layout == {"8b": (2, 1), "70b": (8, 2)}[size]
        assert (training.micro_batch_size, training.global_batch_size) == (micro_batch, 256)
        assert (run.lr.decay_style, run.optimizer.weight_decay, training.params_dtype) == ("linear", 0.01, "bf16")


@pytest.mark.parametrize("size", SIZES)
def test_recipes_differ_in_what_their_first_lines_say(size: str) -> None:
    """Otherwise a change to one would be forgotten in the other."""
    folder = f"examples/llama3_{size}"
    fp8, bf16 = fields(f"{folder}/cpt_8k_fp8.yaml"), fields(f"{folder}/cpt_8k.yaml")
    assert fp8["training"].pop("fp8") == "hybrid"
    assert fp8["training"].pop("fp8_recipe") == "tensorwise"
    assert fp8["checkpoint"].pop("save") == bf16["checkpoint"].pop("save") + "-fp8"
    assert fp8 == bf16
    assert fields(f"{folder}/mixture_8k.yaml") == fields(f"{folder}/mixture.yaml") | {"seq_length": 8192}


@pytest.mark.parametrize("size", SIZES)
def test_each_stage_begins_where_the_one_before_ends(size: str) -> None:
    names = ("preprocess", "convert", "cpt", "cpt_8k", "cpt_8k_fp8", "export", "sft", "dpo", "evaluate", "evaluate_chat")
    stages = {name: fields(f"examples/llama3_{size}/{name}.yaml") for name in names}
    base = Recipe(size, "cpt", "").model
    assert stages["preprocess"]["tokenizer"] == stages["convert"]["hf"] == base
    runs = [stages[name]["checkpoint"] for name in ("cpt", "cpt_8k", "cpt_8k_fp8")]
    assert {run["load"] for run in runs} == {stages["convert"]["megatron"]}
    assert len({run["save"] for run in runs}) == 3
    assert stages["export"]["megatron"] == runs[0]["save"]
    assert stages["sft"]["model"] == stages["export"]["hf"]
    assert stages["dpo"]["model"] == f"{stages['sft']['save']}/hf"
    assert list(stages["evaluate"]["models"].values()) == [base, stages["export"]["hf"]]
    assert list(stages["evaluate_chat"]["models"].values()) == [f"{stages[name]['save']}/hf" for name in ("sft", "dpo")]


def commands(size: str) -> list[tuple[str, list[str]]]:
    """(tool, words after it) of every command in the README, with 1 for what SLURM would say."""
    text = Path(f"examples/llama3_{size}/README.md").read_text(encoding="utf-8")
    found = []
    for line in "".join(re.findall(r"```bash\n(.*?)```", text, flags=re.S)).replace("\\\n", " ").splitlines():
        if re.search(r"examples/llama3_\w+/\w+\.sh$", line):
            continue  # test_scripts.py starts these
        match = re.search(r"tools/(\w+)\.py (.*)", re.sub(r"\$\w+", "1", line))
        assert match, line
        tool, words = match[1], shlex.split(match[2])
        if tool == "convert_checkpoint":
            tool = f"{tool} {words.pop(0)}"
        found.append((tool, words))
    return found


@pytest.mark.parametrize("size", SIZES)
def test_the_tools_take_every_command_and_file(size: str) -> None:
    used = set()
    for tool, words in commands(size):
        kind = TOOLS[tool]
        if tool == "plan_run":
            words = ["--model", *words]
        read_arguments(kind, words)
        used |= {Path(word).name for word in words if word.startswith(f"examples/llama3_{size}/")}
    assert {tool for tool, _ in commands(size)} == set(TOOLS)
    there = {path.name for path in Path(f"examples/llama3_{size}").glob("*.yaml")}
    assert there - used == {"cpt_8k.yaml", "cpt_8k_fp8.yaml", "mixture.yaml", "mixture_8k.yaml"}


@each_recipe
def test_the_plan_says_that_it_fits(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    plan_run(planned(recipe))
    (candidate,) = plan_one(read_planned_run(planned(recipe))).feasible
    gib, step = f"{candidate.memory.total / GIB:.1f}", f"{candidate.throughput.step.total:.2f}"
    row = next(line for line in capsys.readouterr().out.splitlines() if gib in line.split())
    assert step in row.split()
    parallel, days = candidate.layout.parallel, f"{candidate.days(1e11):.1f}"
    layout = f"TP{parallel.tensor_model_parallel_size} PP{parallel.pipeline_model_parallel_size} "
    layout += f"DP{candidate.layout.data_parallel_size}"
    page = (ROOT / "docs/planning.md").read_text(encoding="utf-8")
    name = f"`llama3_{recipe.size}/{recipe.name}`"
    assert f"| {name} | {recipe.gpus} {recipe.device} | {layout} | {gib} | {step} | {days} |" in page


def test_without_sequence_parallelism_the_70b_would_not_fit(tmp_path: Path) -> None:
    recipe = Recipe("70b", "cpt", "a100-80g")
    changed = fields(recipe.path)
    changed["parallel"]["sequence_parallel"] = False
    (tmp_path / "changed.yaml").write_text(yaml.safe_dump(changed))
    config = PlanConfig(recipe.model, recipe.gpus, recipe.device, run=str(tmp_path / "changed.yaml"))
    with pytest.raises(InputError, match=r"does not fit into 128 x a100-80g: 95\.7 GiB of 79\.2 GiB"):
        plan_run(config)


SIMULATED = [(recipe, rank) for recipe in RECIPES if recipe.name != "cpt_8k_fp8" for rank in (0, recipe.gpus - 1)]


@pytest.mark.parametrize(("recipe", "rank"), SIMULATED, ids=str)
def test_a_rank_at_full_size_is_as_planned(recipe: Recipe, rank: int, tmp_path: Path) -> None:
    """Weights, gradients, optimizer and activations of one micro-batch, to the byte. FP8 cannot be simulated."""
    config = PlanConfig(
        recipe.model, recipe.gpus, recipe.device, run=recipe.path, simulate=rank, json=str(tmp_path / "rank.json")
    )
    plan_run(config)
    found = json.loads((tmp_path / "rank.json").read_text())["simulation"]
    run = read_planned_run(config)
    job, stage = make_job(run.config), found["pipeline_rank"]
    state = state_bytes(job, run.layout, stage, found["data_rank"])
    assert [found[part] for part in ("parameters", "weights", "gradients", "optimizer")] == [
        state.parameters,
        state.weights,
        state.gradients,
        state.optimizer,
    ]
    chunks = chunks_of_stage(job.llama, run.layout, stage)
    assert found["activations"] == sum(sum(chunk_bytes(job, run.layout, chunk).values()) for chunk in chunks)
    assert found["tensor_rank"] == rank % run.layout.tensor
