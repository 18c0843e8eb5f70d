"""The scripts of examples/llama3_8b and llama3_70b: what they would submit, and what they refuse."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from dry_runs import assert_refused, start
from tiny_models import ROOT, write_yaml

EXAMPLES = ROOT / "examples"
STAGES = ["preprocess", "merge", "convert", "cpt", "export", "evaluate", "sft", "dpo", "evaluate_chat"]
AFTER = {
    "merge": "preprocess",
    "cpt": "merge:convert",
    "export": "cpt",
    "evaluate": "export",
    "sft": "export",
    "dpo": "sft",
    "evaluate_chat": "dpo",
}
OF_PAPER = {"8b": ("4", "32 ranks = TP 2 x PP 1 x CP 1 x DP 16"), "70b": ("16", "128 ranks = TP 8 x PP 2 x CP 1 x DP 8")}


def script(size: str, name: str) -> Path:
    return EXAMPLES / f"llama3_{size}" / f"{name}.sh"


@pytest.mark.parametrize("size", ["8b", pytest.param("70b", marks=pytest.mark.slow)])
def test_a_pipeline_says_all_and_submits_nothing(size: str) -> None:
    """Every stage's command, layout, memory and tokens, and what waits for what."""
    before = set(os.listdir(ROOT))
    done = start(script(size, "pipeline"))
    assert done.returncode == 0, done.stderr
    assert set(os.listdir(ROOT)) == before
    said = done.stderr
    submitted = {words[2].removeprefix("--job-name="): words for words in commands(said, "sbatch")}
    assert list(submitted) == STAGES
    for name, words in submitted.items():
        waits = [word for word in words if word.startswith("--dependency=")]
        assert waits == [f"--dependency=afterok:{AFTER.get(name)}"] * (name in AFTER)
        assert words[-1] == str(script(size, {"merge": "preprocess"}.get(name, name)))
    nodes, layout = OF_PAPER[size]
    assert f"layout: {layout}; a global batch of 256 samples" in said
    assert "token budget: 100,000,071,680 tokens = 190,735 steps of 524,288" in said
    assert "GiB: of the fullest rank" in said, "the estimate of plan_run.py"
    assert said.count("memory: weights, gradients and AdamW") == 2
    assert said.count(f"memory: the weights of {size.upper()} in bf16") == 2
    ran = commands(said, "srun")
    tools = [next(word for word in words if word.startswith("tools/"))[6:-3] for words in ran]
    assert tools == [
        *("preprocess_data", "preprocess_data", "merge_datasets", "convert_checkpoint", "pretrain_cpt"),
        *("convert_checkpoint", "evaluate", "finetune_sft", "finetune_dpo", "evaluate"),
    ]
    cpt, sft, dpo = (ran[tools.index(tool)] for tool in ("pretrain_cpt", "finetune_sft", "finetune_dpo"))
    assert cpt[-4:] == ["--config", f"examples/llama3_{size}/cpt.yaml", "--checkpoint.save", f"runs/llama3-{size}/cpt"]
    assert {f"--nodes={nodes}", "--ntasks-per-node=8", "--gpus-per-node=8"} < set(submitted["cpt"])
    for name, words in (("sft", sft), ("dpo", dpo)):
        assert words[-7] == f"tools/finetune_{name}.py"
        assert "--main_process_ip=FIRST_NODE" in words
    assert [line.split()[0] for line in done.stdout.splitlines()[1:]] == [name for name in STAGES if name != "merge"]


def commands(text: str, program: str) -> list[list[str]]:
    return [shlex.split(line) for line in text.splitlines() if line.startswith(f"{program} ")]


@pytest.mark.parametrize("size", OF_PAPER)
@pytest.mark.parametrize("name", ["cpt", "sft", "dpo"])
def test_sbatch_lines_are_what_the_script_submits_with(size: str, name: str) -> None:
    """Whoever gives the script to sbatch gets the same job."""
    text = script(size, name).read_text(encoding="utf-8")
    lines = {line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH ")}
    environment = {"PATH": "/usr/bin:/bin", "DRY_RUN": "1", "VENV": "/nowhere"}
    only_submits = f"source examples/lib/launch.sh; check_run() {{ :; }}; launch {name}"
    settings = text[text.index("\nSCRIPT=") : text.index("\nsource ")].replace('"$0"', f"'{script(size, name)}'")
    done = subprocess.run(
        ["bash", "-euc", f"{settings}\n{only_submits}", str(script(size, name))],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert lines
    assert lines <= set(commands(done.stderr, "sbatch")[0])


def test_another_recipe() -> None:
    """Has folders of its own for all that is made from it."""
    done = start(script("70b", "cpt"), RECIPE="cpt_8k_fp8", DEVICE="h100")
    assert done.returncode == 0, done.stderr
    assert "seq" in done.stderr
    assert "FP8" in done.stderr
    assert commands(done.stderr, "srun")[0][-1] == "runs/llama3-70b/cpt-8k-fp8"
    for name, options in {
        "export": ["--megatron", "runs/llama3-70b/cpt-8k-fp8", "--hf", "runs/llama3-70b/cpt-8k-fp8-hf"],
        "sft": ["--model", "runs/llama3-70b/cpt-8k-fp8-hf", "--save", "runs/llama3-70b/cpt-8k-fp8-sft"],
        "dpo": ["--model", "runs/llama3-70b/cpt-8k-fp8-sft/hf", "--save", "runs/llama3-70b/cpt-8k-fp8-dpo"],
        "evaluate": [
            *("--models", "{Llama-3-70B: models/Meta-Llama-3-70B, CPT: 'runs/llama3-70b/cpt-8k-fp8-hf'}"),
            *("--output", "runs/llama3-70b/cpt-8k-fp8-evaluation"),
        ],
        "evaluate_chat": [
            *("--models", "{C-SFT: 'runs/llama3-70b/cpt-8k-fp8-sft/hf', C-DPO: 'runs/llama3-70b/cpt-8k-fp8-dpo/hf'}"),
            *("--output", "runs/llama3-70b/cpt-8k-fp8-evaluation-chat"),
        ],
    }.items():
        done = start(script("70b", name), RECIPE="cpt_8k_fp8", DEVICE="")
        assert commands(done.stderr, "srun")[0][-4:] == options, done.stderr


@pytest.mark.parametrize("size", OF_PAPER)
def test_folders_of_the_scripts_are_those_of_the_configurations(size: str) -> None:
    """Whoever starts the tools by hand goes the same way."""
    parsed = {name: yaml.safe_load(script(size, name).with_suffix(".yaml").read_text()) for name in STAGES[2:]}
    for name, options in {
        "cpt": {"--checkpoint.save": parsed["cpt"]["checkpoint"]["save"]},
        "export": {"--megatron": parsed["export"]["megatron"], "--hf": parsed["export"]["hf"]},
        "sft": {"--model": parsed["sft"]["model"], "--save": parsed["sft"]["save"]},
        "dpo": {"--model": parsed["dpo"]["model"], "--save": parsed["dpo"]["save"]},
        "evaluate": {"--models": parsed["evaluate"]["models"], "--output": parsed["evaluate"]["output"]},
        "evaluate_chat": {"--models": parsed["evaluate_chat"]["models"], "--output": parsed["evaluate_chat"]["output"]},
    }.items():
        words = commands(start(script(size, name), DEVICE="").stderr, "srun")[0]
        for option, value in options.items():
            assert yaml.safe_load(words[words.index(option) + 1]) == value, (name, option)


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({}, []),
        ({"CONTAINER_IMAGE": "nvcr.io#nvidia/pytorch:25.03-py3"}, ["--container-image=nvcr.io#nvidia/pytorch:25.03-py3"]),
        ({"CONTAINER_IMAGE": "/images/a.sif", "CONTAINER_RUNTIME": "apptainer"}, ["apptainer", "exec", "/images/a.sif"]),
    ],
)
@pytest.mark.parametrize("name", ["preprocess", "convert", "export", "evaluate"])
def test_one_process_is_shown_as_it_will_be_started(name: str, variables: dict[str, str], words: list[str]) -> None:
    done = start(script("8b", name), **variables)
    assert done.returncode == 0, done.stderr
    for command in commands(done.stderr, "srun"):
        tool = command.index("python")
        assert command[:3] == ["srun", "--nodes=1", "--ntasks=1"]
        assert [word for word in words if word not in command[:tool]] == []
        assert "--nv" not in command or name == "evaluate"


@pytest.mark.parametrize(
    ("name", "variables", "message"),
    [
        (
            "8b/cpt",
            {"NODES": "5"},
            "global_batch_size is 256; expected a multiple of 80, micro_batch_size 4 x data-parallel size 20",
        ),
        ("70b/cpt", {"NODES": "1"}, "8 processes cannot hold tensor_model_parallel_size 8 x pipeline"),
        ("70b/cpt", {"DEVICE": "a100-40g"}, "examples/llama3_70b/cpt.yaml does not fit into 128 x a100-40g: "),
        (
            "8b/sft",
            {"NODES": "3"},
            "global_batch_size is 1024; expected a multiple of micro_batch_size 8 x 24 processes = 192",
        ),
        (
            "8b/sft",
            {"LAUNCHER": "torchrun"},
            "of 8B take 119.7 GiB of 79.2 GiB of each a100-80g; shard it",
        ),
        ("70b/dpo", {"NODES": "1"}, "the reference of 70B take 164.3 GiB of 79.2 GiB of each a100-80g; expected more GPUs"),
        ("8b/dpo", {"CHECK": "1"}, "runs/llama3-8b/cpt-sft/hf"),
        ("8b/convert", {"CONFIG": "nowhere.yaml"}, "CONFIG is 'nowhere.yaml'; expected a YAML file"),
        ("8b/convert", {"CHECK": "1"}, "models/Meta-Llama-3-8B"),
        ("70b/export", {"CHECK": "1"}, "runs/llama3-70b/cpt"),
        ("8b/export", {"CHECK": "1", "MEGATRON": "examples"}, "examples"),
        ("8b/convert", {"CHECK": "1", "WAITING": "yes"}, "WAITING is 'yes'; expected 0 or 1"),
        (
            "8b/sft",
            {"CHECK": "1", "WAITING": "1"},
            "data/sft_emotional_intelligence_zh.jsonl; expected a file (no such file)",
        ),
        ("8b/evaluate_chat", {"CHECK": "1", "WAITING": "1"}, "raw/valid/sft_zh.jsonl; expected a file (no such file)"),
        ("8b/evaluate", {"RUN": "runs/it's"}, "models"),
        ("8b/preprocess", {"CONFIG": "nowhere.yaml"}, "CONFIG is 'nowhere.yaml'; expected a YAML file"),
        (
            "70b/cpt",
            {"RECIPE": "cpt-8k"},
            "CONFIG is 'examples/llama3_70b/cpt-8k.yaml' of RECIPE cpt-8k; expected a YAML file",
        ),
        ("8b/sft", {"CONFIG": "nowhere.yaml"}, "CONFIG is 'nowhere.yaml' of RECIPE cpt; expected a YAML file"),
        ("8b/evaluate", {"CONFIG": "nowhere.yaml"}, "CONFIG is 'nowhere.yaml' of RECIPE cpt; expected a YAML file"),
        ("8b/pipeline", {"HF": "runs/x"}, "HF is 'runs/x', which is of one stage"),
        ("8b/evaluate", {"CHECK": "1"}, "raw/valid/zh.jsonl; expected a file (no such file)"),
        (
            "70b/evaluate",
            {"GPUS_PER_NODE": "1"},
            "in bf16 take 131.4 GiB of the 79.2 GiB of 1 x a100-80g; expected device_map",
        ),
        ("8b/evaluate", {"GPUS_PER_NODE": "one"}, "GPUS_PER_NODE is 'one'; expected a whole number, 0 or more"),
        ("8b/preprocess", {"CHECK": "1"}, "raw/en_dolma/* is not there; expected it, CORPORA without en_dolma, or CHECK=0"),
        ("8b/preprocess", {"CORPORA": " "}, "CORPORA is empty"),
        ("8b/preprocess", {"PARTS": "0"}, "PARTS is '0'; expected a whole number above 0"),
        ("8b/pipeline", {"SAVE": "runs/x"}, "SAVE is 'runs/x', which is of one stage"),
        ("8b/pipeline", {"STAGES": " "}, "STAGES is empty; expected some of preprocess convert cpt"),
        ("8b/pipeline", {"STAGES": "cpt sftt"}, "STAGES has 'sftt'; expected some of preprocess convert cpt"),
    ],
)
def test_what_is_refused(name: str, variables: dict[str, str], message: str) -> None:
    """Before anything is submitted: there is no sbatch."""
    assert_refused(start(script(*name.split("/")), **variables), message)


def test_what_other_jobs_make_is_not_looked_for() -> None:
    for name in ("cpt", "export"):
        done = start(script("8b", name), CHECK="1", WAITING="1", DEVICE="")
        assert done.returncode == 0, done.stderr


def test_models_that_other_jobs_make_are_not_looked_for(tmp_path: Path) -> None:
    """What they are measured on has to be there."""
    (tmp_path / "text.jsonl").write_text("")
    path = write_yaml(tmp_path / "evaluate.yaml", {"text": [{"path": str(tmp_path / "text.jsonl"), "language": "en"}]})
    waiting, now = (start(script("8b", "evaluate"), CONFIG=path, CHECK="1", WAITING=waits) for waits in "10")
    assert waiting.returncode == 0, waiting.stderr
    assert_refused(now, "which has no config.json; expected a Hugging Face folder")


@pytest.mark.parametrize("name", ["export", "pipeline"])
def test_arguments_are_refused(name: str) -> None:
    """They would be lost: a learning rate, or --help, which must not submit."""
    done = subprocess.run([script("8b", name), "--help"], capture_output=True, text=True)
    assert_refused(done, "the arguments are '--help'; expected none: settings are variables, as in ")


def test_folders_with_signs_that_mean_something_in_yaml() -> None:
    done = start(script("8b", "evaluate"), RUN="runs/lr=1e-5, almr: 0.3/")
    assert done.returncode == 0, done.stderr
    words = commands(done.stderr, "srun")[0]
    assert yaml.safe_load(words[words.index("--models") + 1])["CPT"] == "runs/lr=1e-5, almr: 0.3-hf"


def test_what_is_preprocessed_is_not_preprocessed_again(tmp_path: Path) -> None:
    """A part of an array, and what joins the parts, when the script is started a second time."""
    job, srun, output = tmp_path / "slurm_script", tmp_path / "srun", tmp_path / "data"
    shutil.copy(script("8b", "preprocess"), job)
    srun.write_text(f'#!/bin/sh\necho "$*" >>{tmp_path}/calls\n')
    srun.chmod(0o755)
    output.mkdir()
    variables = {"SLURM_JOB_ID": "9", "OUTPUT": str(output), "CORPORA": "en_a zh_b", "PARTS": "2"}
    variables |= {"PATH": f"{tmp_path}:/usr/bin:/bin", "VENV": "/nowhere"}

    def calls(**more: str) -> list[list[str]]:
        (tmp_path / "calls").unlink(missing_ok=True)
        subprocess.run(["bash", job], cwd=ROOT, env=variables | more, check=True)
        return (
            [line.split() for line in (tmp_path / "calls").read_text().splitlines()] if (tmp_path / "calls").exists() else []
        )

    assert calls(SLURM_ARRAY_TASK_ID="3")[0][-5:] == ["1/2", "--language", "zh", "--workers", "16"]
    (output / "zh_b-00001-of-00002.json").touch()
    assert not calls(SLURM_ARRAY_TASK_ID="3")
    assert len(calls(SLURM_ARRAY_TASK_ID="2")) == 1
    assert len(calls(STEP="merge")) == 2
    (output / "zh_b.json").touch()
    assert len(calls(STEP="merge")) == 1
    assert not calls(SLURM_ARRAY_TASK_ID="2")


@pytest.fixture
def sbatch(tmp_path: Path) -> Path:
    """A program of this name that numbers what it is given, and writes it into the file beside it; returns its folder.

    Behind the number stands what is in the variable CLUSTER.
    """
    folder = tmp_path / "bin"
    folder.mkdir()
    program = folder / "sbatch"
    program.write_text(f'#!/bin/sh\necho "$*" >>{folder}/calls\necho "$((100 + $(wc -l <{folder}/calls)))${{CLUSTER:-}}"\n')
    program.chmod(0o755)
    return folder


def test_what_is_submitted_waits_for_jobs_by_number(sbatch: Path, tmp_path: Path) -> None:
    """Of the stages that are wanted; an array is waited for through the job that joins it."""
    variables = {"DRY_RUN": "0", "PATH": f"{sbatch}:{Path(sys.executable).parent}:/usr/bin:/bin", "LOGS": str(tmp_path)}
    done = start(script("8b", "pipeline"), STAGES="preprocess convert export", **variables)
    assert done.returncode == 0, done.stderr
    assert [line.split() for line in done.stdout.splitlines()] == [
        ["stage", "job"],
        ["preprocess", "102"],
        ["convert", "103"],
        ["export", "104"],
    ]
    calls = (sbatch / "calls").read_text().splitlines()
    assert [[word for word in call.split() if word.startswith("--dependency=")] for call in calls] == [
        [],
        ["--dependency=afterok:101"],
        [],
        [],
    ]
    (sbatch / "calls").unlink()
    done = start(script("8b", "pipeline"), STAGES="export sft evaluate", MODEL="70B", **variables)
    assert_refused(done, "the weights of 70B in bf16 take 131.4 GiB")
    assert not (sbatch / "calls").exists(), "export was submitted though a later stage is refused"


def test_several_clusters(sbatch: Path, tmp_path: Path) -> None:
    """sbatch says on which one the job is, behind its number; others wait for the number."""
    variables = {"DRY_RUN": "0", "PATH": f"{sbatch}:/usr/bin:/bin", "LOGS": str(tmp_path), "CLUSTER": ";east"}
    done = start(script("8b", "preprocess"), **variables)
    assert (done.returncode, done.stdout) == (0, "102\n"), done.stderr
    assert " --dependency=afterok:101 " in (sbatch / "calls").read_text().splitlines()[1]


def test_stages_may_stand_in_lines_of_their_own() -> None:
    done = start(script("8b", "pipeline"), STAGES="convert\n  preprocess\n")
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["stage", "preprocess", "convert"]


def test_why_a_stage_cannot_be_tried(sbatch: Path, tmp_path: Path) -> None:
    """Its check ends with a traceback, as where the project is not installed; nothing is submitted."""
    python = tmp_path / "bin/python"
    python.write_text("#!/bin/sh\necho Traceback >&2; echo 'ModuleNotFoundError: torch' >&2; exit 1\n")
    python.chmod(0o755)
    done = start(script("8b", "pipeline"), DRY_RUN="0", PATH=f"{sbatch}:/usr/bin:/bin", LOGS=str(tmp_path))
    assert_refused(done, "error: ModuleNotFoundError: torch")
    assert not (sbatch / "calls").exists()


def test_scripts_of_both_sizes_are_alike() -> None:
    """Otherwise a change to one would be forgotten in the other."""
    for path in (EXAMPLES / "llama3_8b").glob("*.sh"):
        other = EXAMPLES / "llama3_70b" / path.name
        ours, theirs = path.read_text().splitlines(), other.read_text().splitlines()
        assert len(ours) == len(theirs), path.name
        assert os.access(path, os.X_OK)
        assert os.access(other, os.X_OK)
