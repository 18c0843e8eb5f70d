"""A run that cannot work says so in one line, with exit status 2, before any process group starts.

The checkpoint here has the files of a real one but no weights: nothing below may come as far as reading them.
"""

from __future__ import annotations

import json
import os
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from llama_shapes import TINY

from megatron_cpt.checkpoint.layout import write_tracker
from megatron_cpt.config.cli import run_tool
from megatron_cpt.config.run import CheckpointConfig, RunConfig, TrainingConfig
from megatron_cpt.corpus.preprocess import PreprocessConfig, preprocess
from megatron_cpt.training.pretrain import setup
from megatron_cpt.training.validate_config import CheckedRun, check_run
from megatron_cpt.utils.errors import InputError

TOOL = Path(__file__).parents[2] / "tools" / "pretrain_cpt.py"
TEXTS = {"en": "The quick brown fox number {} jumps over the dog.", "zh": "第{}天，今天天气很好，我们去公园散步。"}


@pytest.fixture(scope="module")
def good_files(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_dir: str) -> Path:
    """A folder with everything a run needs: corpora, mixture.yaml, megatron/release, run.yaml."""
    folder = tmp_path_factory.mktemp("bad_input")
    for language, text in TEXTS.items():
        source = folder / f"{language}.jsonl"
        source.write_text("".join(json.dumps({"text": text.format(i)}) + "\n" for i in range(40)))
        preprocess(PreprocessConfig(str(source), tiny_tokenizer_dir, str(folder / language), language, workers=1))
    mixture = {"seq_length": 32, "seed": 1, "almr": 0.25, "general": [{"prefix": "en"}], "additional": [{"prefix": "zh"}]}
    (folder / "mixture.yaml").write_text(yaml.safe_dump(mixture))
    release = folder / "megatron" / "release"
    shutil.copytree(tiny_tokenizer_dir, release / "hf")
    (release / "hf" / "config.json").write_text(json.dumps(TINY))
    for name in (".metadata", "common.pt"):
        (release / name).write_bytes(b"")
    (release / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    write_tracker(str(folder / "megatron"), None)
    return folder


@pytest.fixture
def folder(tmp_path: Path, good_files: Path) -> Path:
    """A copy that a test may break."""
    return Path(shutil.copytree(good_files, tmp_path / "run"))


def options(folder: Path, *more: str) -> list[str]:
    """The command line of a run in `folder`; later options win."""
    files = ["--mixture", str(folder / "mixture.yaml"), "--checkpoint.load", str(folder / "megatron")]
    files += ["--checkpoint.save", str(folder / "out")]
    return [*files, "--training.train_iters", "4", "--training.global_batch_size", "8", *more]


def check(folder: Path, *more: str, world_size: int = 1) -> CheckedRun:
    found: list[CheckedRun] = []
    run_tool(lambda config: found.append(check_run(config, world_size)), RunConfig, "A run.", options(folder, *more))
    return found[0]


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_mixture(folder: Path, **changes: Any) -> None:
    path = folder / "mixture.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | changes))


def truncate_bin(folder: Path) -> None:
    path = folder / "zh.bin"
    path.write_bytes(path.read_bytes()[:100])


def half_a_run(folder: Path) -> None:
    """A run folder whose newest checkpoint is gone."""
    (folder / "out").mkdir()
    write_tracker(str(folder / "out"), 100)


RELEASE = "megatron/release"


def split_at_every_letter(folder: Path) -> None:
    """The model's tokenizer has the same tokens and splits text in another way."""
    path = folder / RELEASE / "hf" / "tokenizer.json"
    every = {"type": "Split", "pattern": {"Regex": "."}, "behavior": "Isolated", "invert": False}
    before = json.loads(path.read_text())["pre_tokenizer"]
    edit_json(path, pre_tokenizer={"type": "Sequence", "pretokenizers": [every, before]})


Case = tuple[Callable[[Path], object], list[str], int, list[str]]
# name -> what is done to the files, options, number of processes, what the message must say
CASES: dict[str, Case] = {
    "no mixture file": (lambda f: (f / "mixture.yaml").unlink(), [], 1, ["mixture.yaml", "No such file"]),
    "truncated corpus": (truncate_bin, [], 1, ["zh.bin", "found 100 bytes", "expected"]),
    "no manifest": (lambda f: (f / "zh.json").unlink(), [], 1, ["zh.json", "no such file"]),
    "almr": (lambda f: edit_mixture(f, almr=1.5), [], 1, ["mixture.yaml", "almr is 1.5", "from 0 to 1"]),
    "the folder that the run begins with": (
        lambda f: None,
        ["--checkpoint.save", "megatron"],
        1,
        ["checkpoint.save is megatron, which holds Megatron checkpoints; expected a folder of its own"],
    ),
    "the folder of a model": (
        lambda f: None,
        ["--checkpoint.save", f"{RELEASE}/hf"],
        1,
        [f"checkpoint.save is {RELEASE}/hf, which holds a model"],
    ),
    "a report of somebody's own": (
        lambda f: ((f / "mine").mkdir(), (f / "mine" / "report.md").write_text("mine")),
        ["--checkpoint.save", "mine"],
        1,
        ["checkpoint.save is mine, which holds another report.md"],
    ),
    "another splitting": (split_at_every_letter, [], 1, ["mixture.yaml", "splits text in another way"]),
    "tp and heads": (
        lambda f: None,
        ["--parallel.tensor_model_parallel_size", "3"],
        3,
        ["tensor_model_parallel_size is 3; expected 1 or 2, for 4 num_attention_heads"],
    ),
    "tp and key-value heads": (
        lambda f: None,
        ["--parallel.tensor_model_parallel_size", "4"],
        4,
        ["tensor_model_parallel_size is 4; expected 1 or 2, for 2 num_key_value_heads"],
    ),
    "pp and layers": (
        lambda f: None,
        ["--parallel.pipeline_model_parallel_size", "3"],
        3,
        ["pipeline_model_parallel_size is 3; expected 1, 2 or 4, for 4 num_hidden_layers"],
    ),
    "processes": (
        lambda f: None,
        ["--parallel.tensor_model_parallel_size", "2", "--parallel.pipeline_model_parallel_size", "2"],
        6,
        ["6 processes", "tensor_model_parallel_size 2 x pipeline_model_parallel_size 2", "a multiple of 4"],
    ),
    "fewer processes than parts": (
        lambda f: None,
        ["--parallel.tensor_model_parallel_size", "2"],
        1,
        ["1 processes", "tensor_model_parallel_size 2", "a multiple of 2"],
    ),
    "global batch": (
        lambda f: None,
        ["--training.micro_batch_size", "2"],
        3,
        ["training.global_batch_size is 8; expected a multiple of 6, micro_batch_size 2 x data-parallel size 3"],
    ),
    "sequence length": (
        lambda f: edit_json(f / RELEASE / "hf" / "config.json", max_position_embeddings=16),
        [],
        1,
        ["mixture.yaml: seq_length is 32; expected at most 16, the model's max_position_embeddings"],
    ),
    "vocabulary": (
        lambda f: edit_json(f / RELEASE / "hf" / "config.json", vocab_size=300),
        [],
        1,
        ["mixture.yaml", "400", "300 embeddings"],
    ),
    "another architecture": (
        lambda f: edit_json(f / RELEASE / "hf" / "config.json", model_type="mistral"),
        [],
        1,
        ["config.json", "model_type is 'mistral'", "'llama'"],
    ),
    "no checkpoint folder": (
        lambda f: shutil.rmtree(f / "megatron"),
        [],
        1,
        ["checkpoint.load is", "run/megatron", "no such folder"],
    ),
    "no checkpoint in the folder": (
        lambda f: [shutil.rmtree(f / RELEASE), (f / "megatron" / "latest_checkpointed_iteration.txt").unlink()],
        [],
        1,
        ["run/megatron holds no Megatron checkpoint"],
    ),
    "tracker of a checkpoint that is gone": (
        lambda f: shutil.rmtree(f / RELEASE),
        [],
        1,
        ["latest_checkpointed_iteration.txt names release, which is not there"],
    ),
    "profile of a step that never comes": (
        lambda f: None,
        ["--logging.profile_step_start", "100"],
        1,
        ["logging.profile_step_start is 100", "ends with step"],
    ),
    "profile of a rank that is not there": (
        lambda f: None,
        ["--logging.profile_step_start", "1", "--logging.profile_ranks", "[0,7]"],
        1,
        ["logging.profile_ranks has 7", "0 to 0"],
    ),
    "more parts than stages": (
        lambda f: None,
        ["--parallel.pipeline_model_parallel_size", "2", "--parallel.pipeline_model_parallel_layout", "Et|t|t|tL"],
        2,
        ["has 4 parts for pipeline_model_parallel_size 2", "give virtual_pipeline_model_parallel_size 2"],
    ),
    "recomputation in a pipeline layout": (
        lambda f: None,
        [
            *("--parallel.pipeline_model_parallel_size", "2", "--parallel.pipeline_model_parallel_layout", "Etttt|L"),
            *("--parallel.recompute_granularity", "full", "--parallel.recompute_num_layers", "3"),
        ],
        2,
        ["recompute_num_layers is 3; expected a divisor of 4, the layers of a model chunk"],
    ),
    "incomplete checkpoint": (
        lambda f: (f / RELEASE / ".metadata").unlink(),
        [],
        1,
        [RELEASE, "not complete", ".metadata is missing"],
    ),
    "incomplete run to resume": (
        half_a_run,
        [],
        1,
        ["names iter_0000100, which is not there", "empty the folder to begin anew"],
    ),
    "no tokenizer in the checkpoint": (
        lambda f: (f / RELEASE / "hf" / "tokenizer.json").unlink(),
        [],
        1,
        ["error: tokenizer ", f"{RELEASE}/hf", "tokenizer.json"],
    ),
}


def test_the_files_are_good(folder: Path) -> None:
    """Otherwise the cases below would prove little."""
    run = check(folder)
    assert (run.data_parallel_size, run.resumed) == (1, None)
    assert run.start_from == str(folder / "megatron" / "release")
    assert run.token_bytes.shape == (400,)
    assert run.token_bytes[0] == 0
    assert run.token_bytes.sum() > 300
    layout = ["--parallel.tensor_model_parallel_size", "2", "--parallel.pipeline_model_parallel_size", "2"]
    assert check(folder, *layout, "--training.micro_batch_size", "4", world_size=8).data_parallel_size == 2


def test_the_tracker_alone_does_not_decide(folder: Path) -> None:
    """A checkpoint has its name when it is complete, also if the tracker was not written or says something else."""
    tracker = folder / "megatron" / "latest_checkpointed_iteration.txt"
    tracker.write_text("newest")
    assert check(folder).start_from == str(folder / "megatron" / "release")
    tracker.unlink()
    assert check(folder).start_from == str(folder / "megatron" / "release")


def test_embeddings_without_tokens_are_fine(folder: Path) -> None:
    edit_json(folder / RELEASE / "hf" / "config.json", vocab_size=512)
    run = check(folder)
    assert run.token_bytes.shape == (512,)
    assert run.token_bytes[400:].sum() == 0


@pytest.mark.parametrize("name", CASES)
def test_one_line_and_no_process_group(
    name: str, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As torchrun starts the tool, but in this process."""
    spoil, more, world_size, words = CASES[name]
    spoil(folder)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *a, **k: pytest.fail("a process group started"))
    before = sorted(folder.rglob("*"))
    with pytest.raises(SystemExit) as stopped:
        run_tool(setup, RunConfig, "A run.", options(folder, *more))
    captured = capsys.readouterr()
    assert stopped.value.code == 2
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert all(word in captured.err for word in words), captured.err
    assert sorted(folder.rglob("*")) == before  # nothing was left behind


def test_what_a_resumed_run_began_with_is_not_asked_for(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "out" / "iter_0000002").mkdir(parents=True)
    wrong = ["--optimizer.lr", "-1", "--checkpoint.load", "nowhere"]
    monkeypatch.setattr(sys, "argv", ["pretrain_cpt.py", *options(folder, *wrong)])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(TOOL), run_name="__main__")
    assert stopped.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert "error: optimizer.lr is -1.0; expected a number above 0" in lines
    assert any("iter_0000002" in line and "empty the folder to begin anew" in line for line in lines)


def test_a_wrong_setting_does_not_hide_wrong_files(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor do wrong files hide each other, or settings of one section."""
    (folder / "zh.json").unlink()
    edit_mixture(folder, seed=-1)
    wrong = ["--optimizer.lr", "-1", "--optimizer.adam_beta1", "1", "--optimizer.clip_grad", "-1", "--training.seed", "-1"]
    wrong += ["--training.micro_batch_size", "0", "--data.num_workers", "-1", "--checkpoint.load", "nowhere"]
    monkeypatch.setattr(sys, "argv", ["pretrain_cpt.py", *options(folder, *wrong)])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(TOOL), run_name="__main__")
    assert stopped.value.code == 2
    expected = [
        "checkpoint.load is 'nowhere'; expected the folder of a checkpoint or a run",
        "data.num_workers is -1; expected 0 or more",
        "mixture.yaml: seed is -1",
        "optimizer.adam_beta1 is 1.0; expected",
        "optimizer.clip_grad is -1.0; expected 0 or more",
        "optimizer.lr is -1.0; expected a number above 0",
        "training.micro_batch_size is 0; expected 1 or more",
        "training.seed is -1; expected",
        "zh.json: no such file",
    ]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(expected), lines
    for words in expected:
        assert sum(words in line for line in lines) == 1, (words, lines)
    assert not (folder / "out").exists()


def test_what_needs_mixture_and_model_is_refused_at_once(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit_mixture(folder, additional=[{"prefix": "zh", "max_epochs": 0.001}])
    with pytest.raises(SystemExit):
        check(folder, "--lr.warmup_iters", "9", "--logging.profile_step_start", "99")
    lines = capsys.readouterr().err.splitlines()
    words = ["logging.profile_step_start is 99", "lr.warmup_iters", "its max_epochs is 0.001"]
    assert [word in line for word, line in zip(words, lines, strict=True)] == [True] * 3


def test_check_only_for_another_number_of_processes(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *a, **k: pytest.fail("a process group started"))
    run_tool(setup, RunConfig, "A run.", options(folder, "--check_only", "--world_size", "4"))
    shown = capsys.readouterr().err
    assert "32 samples of 32 tokens" in shown
    assert "realised 0.2500" in shown
    assert not (folder / "out").exists()
    with pytest.raises(SystemExit) as stopped:
        run_tool(setup, RunConfig, "A run.", options(folder, "--check_only", "--world_size", "5"))
    assert stopped.value.code == 2
    assert "global_batch_size is 8" in capsys.readouterr().err


def test_check_only_says_which_stages_the_run_does_not_reach(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit_mixture(folder, stages=[{"tokens": "1M", "almr": 0.2}, {"name": "late", "almr": 0.5}])
    run_tool(setup, RunConfig, "A run.", options(folder, "--check_only"))
    assert "stage late would begin at sample 31,250: never reached" in capsys.readouterr().err


def test_errors_are_input_errors(folder: Path) -> None:
    """For those who call the library: a subclass of ValueError, raised where the tool would exit."""
    config = RunConfig(
        mixture="nothing.yaml",
        checkpoint=CheckpointConfig(load=str(folder / "megatron"), save=str(folder / "out")),
        training=TrainingConfig(train_iters=1),
    )
    with pytest.raises(InputError, match=r"nothing\.yaml"):
        check_run(config, 1)


def environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    return kept | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.mark.parametrize(
    ("name", "more"),
    [("no mixture file", []), ("tp and heads", ["--check_only", "--world_size", "3"])],
)
def test_exit_status_of_the_tool(name: str, more: list[str], folder: Path) -> None:
    spoil, layout, _, words = CASES[name]
    spoil(folder)
    command = [sys.executable, str(TOOL), *options(folder, *layout, *more)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment())
    assert (result.returncode, result.stdout) == (2, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert all(word in line for word in words), line


# Runs the tool as it is, and tells when it starts a process group.
SPY = """
import runpy, sys, torch.distributed
def spy(*args, **kwargs):
    print("a process group started", file=sys.stderr, flush=True)
    raise SystemExit(3)
torch.distributed.init_process_group = spy
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def spied(folder: Path, *launcher: str) -> subprocess.CompletedProcess[str]:
    (folder / "spy.py").write_text(SPY)
    command = [sys.executable, *launcher, str(folder / "spy.py"), str(TOOL), *options(folder)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment())


def test_under_torchrun(folder: Path) -> None:
    """All processes stop at once, and one of them says why."""
    edit_mixture(folder, almr=1.5)
    endpoint = ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]  # any free port
    result = spied(folder, "-m", "torch.distributed.run", "--nproc_per_node", "2", *endpoint)
    assert result.returncode != 0
    errors = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1, result.stderr
    assert "almr is 1.5" in errors[0]
    assert "a process group started" not in result.stderr


def test_the_spy_sees_process_groups(folder: Path) -> None:
    """The test above can fail: a good run does start one."""
    result = spied(folder)
    assert (result.returncode, result.stderr) == (3, "a process group started\n")


def test_everything_that_is_wrong_is_said_at_once(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit_mixture(folder, almr=1.5)
    shutil.rmtree(folder / "megatron")
    with pytest.raises(SystemExit) as end:
        check(folder, "--training.micro_batch_size", "3", "--parallel.context_parallel_size", "2", world_size=2)
    lines = capsys.readouterr().err.splitlines()
    assert end.value.code == 2
    assert all(line.startswith("error: ") for line in lines)
    for words in ("(no such folder)", "almr is 1.5", "micro_batch_size 3", "context_parallel_size"):
        assert sum(words in line for line in lines) == 1, (words, lines)
    assert not (folder / "out").exists()
