"""Runs as a user starts them, with torchrun where they have several processes; those of one process are forked.

Every layout is trained in test_matrix.py, and resumed in another one in test_resume_layouts.py.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
from copy import copy
from pathlib import Path

import pytest
import yaml
from fork_server import ENVIRONMENT, forked_python
from forks import Forks
from tiny_models import VARIANTS, read_rows, run_tool, write_yaml
from tiny_runs import SAVE_INTERVAL, STEPS, Layout, Runs

from megatron_cpt.convert.config import Verify
from megatron_cpt.convert.verify import verify


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_dir: str) -> Runs:
    return Runs(tmp_path_factory.mktemp("layouts"), tiny_tokenizer_dir, **VARIANTS["tied"])


@pytest.fixture(scope="module")
def forked(runs: Runs, forks: Forks) -> Runs:
    """The same folder and files."""
    again = copy(runs)
    again.forks = forks
    return again


@pytest.fixture(scope="module")
def single(runs: Runs) -> Path:
    return runs.train("single", Layout())


@pytest.fixture(scope="module")
def tp2dp2(runs: Runs) -> Path:
    folder = runs.train("tp2dp2", Layout(tp=2, dp=2, sp=True))
    for noise in ("deprecated", "DistributedDataParallel", "Warning"):
        assert noise not in runs.result.stderr
    return folder


def steps(folder: Path) -> dict[int, tuple[float, float]]:
    """iteration -> (loss, gradient norm)."""
    return {row["iteration"]: (row["loss"], row["grad_norm"]) for row in read_rows(folder) if "loss" in row}


def validations(folder: Path) -> dict[int, dict[str, dict[str, float]]]:
    return {row["iteration"]: row["validation"] for row in read_rows(folder) if "validation" in row}


def assert_equal_within(found: Path, expected: Path, relative: float, first: int = 1) -> None:
    a, b = steps(found), steps(expected)
    assert sorted(a) == sorted(b) == list(range(1, STEPS + 1))
    for iteration in range(first, STEPS + 1):
        assert a[iteration] == pytest.approx(b[iteration], rel=relative, abs=0), iteration


def test_the_single_run_learns(single: Path) -> None:
    losses = [loss for loss, _ in steps(single).values()]
    assert losses[-1] < losses[0] - 0.1  # otherwise equal losses would show little
    before, after = validations(single)[0], validations(single)[STEPS]
    for language in ("en", "zh"):
        assert after[language]["bits_per_byte"] < before[language]["bits_per_byte"]


def test_tp2_dp2_trains_alike(single: Path, tp2dp2: Path) -> None:
    assert_equal_within(tp2dp2, single, relative=1e-5)
    for iteration, expected in validations(single).items():
        for name, result in validations(tp2dp2)[iteration].items():
            assert result["loss"] == pytest.approx(expected[name]["loss"], rel=1e-5)
            assert result["text_bytes"] == expected[name]["text_bytes"]
            assert result["tokens"] == expected[name]["tokens"]


def test_resume_in_the_same_layout_is_bit_equal(runs: Runs, tp2dp2: Path) -> None:
    save = runs.interrupted(tp2dp2, "resume-same")
    runs.train("resume-same", Layout(tp=2, dp=2, sp=True))
    assert steps(save) == steps(tp2dp2)
    assert "tensors equal" in verify(Verify(str(save), str(tp2dp2)))


def test_resume_in_another_layout(runs: Runs, tp2dp2: Path) -> None:
    layout = Layout(pp=2)
    save = runs.interrupted(tp2dp2, f"resume-{layout}")
    runs.train(f"resume-{layout}", layout)
    assert_equal_within(save, tp2dp2, relative=1e-5, first=SAVE_INTERVAL + 1)


def test_a_finished_run_says_so_and_one_without_optimizer_cannot_resume(forked: Runs) -> None:
    folder = forked.train("no-optim", Layout(), "--checkpoint.save_optim", "false")
    config = str(forked.folder / "no-optim.yaml")
    before = (folder / "metrics.jsonl").read_bytes()
    assert "nothing to do" in forked.start("--config", config).stderr
    other = write_yaml(forked.folder / "edited.yaml", yaml.safe_load(Path(forked.mixture).read_text()) | {"almr": 0.5})
    assert "nothing to do" in forked.start("--config", config, "--mixture", other).stderr
    assert (folder / "metrics.jsonl").read_bytes() == before
    result = forked.start("--config", config, "--training.train_iters", "9", check=False)
    assert result.returncode == 2
    assert "holds no optimizer state (checkpoint.save_optim was false)" in result.stderr


def test_changed_data_is_refused_on_resume(forked: Runs, tp2dp2: Path) -> None:
    save = forked.interrupted(tp2dp2, "resume-changed")
    config = str(forked.folder / "tp2dp2.yaml")

    def refusal(*changes: str) -> str:
        result = forked.start("--config", config, "--checkpoint.save", str(save), *changes, check=False)
        assert result.returncode == 2
        return result.stderr

    mixture = write_yaml(forked.folder / "other.yaml", yaml.safe_load(Path(forked.mixture).read_text()) | {"almr": 0.5})
    single = ("--parallel.tensor_model_parallel_size", "1", "--parallel.sequence_parallel", "false")
    message = refusal(*single, "--mixture", mixture)
    assert "not the mixture the run has read 16 samples of: stages[0].almr[0][1] is '33/100' there and '1/2' now" in message
    assert "data.accept_new_mixture takes it from here on" in message
    assert "cannot begin, end or change within a run" in refusal(
        *single, "--data.order", "megatron", "--data.accept_new_mixture", "true"
    )


def test_a_new_mixture_and_batch_are_accepted_on_resume(forked: Runs, tp2dp2: Path) -> None:
    """From sample 16 on: half additional text and batches of 6, each corpus going on where it was."""
    save = forked.interrupted(tp2dp2, "resume-accepted")
    mixture = write_yaml(forked.folder / "half.yaml", yaml.safe_load(Path(forked.mixture).read_text()) | {"almr": 0.5})
    changes = ["--parallel.tensor_model_parallel_size", "1", "--parallel.sequence_parallel", "false", "--mixture", mixture]
    changes += [
        "--training.global_batch_size",
        "6",
        "--lr.on_continue",
        "continue",
        "--data.accept_new_mixture",
        "true",
        "--checkpoint.save",
        str(save),
    ]
    forked.start("--config", str(forked.folder / "tp2dp2.yaml"), *changes)
    ledger = json.loads((save / "ledger.json").read_text())
    assert [(s["start"], s["global_batch_size"]) for s in ledger["segments"]] == [(0, 8), (16, 6)]
    before = {use["name"]: use["samples"] for use in ledger["segments"][1]["before"]}
    assert before == {"en_train": 11, "zh_train": 5}  # 16 x 0.33 = 5.28
    samples = {use["name"]: use["samples"] for use in ledger["consumed"]["corpora"]}
    assert ledger["consumed"]["samples"] == sum(samples.values()) == 16 + 3 * 6
    assert samples == {"en_train": 11 + 9, "zh_train": 5 + 9}
    assert [row["almr_realised"] for row in read_rows(save) if "loss" in row][-1] == 14 / 34
    planned = ledger["planned"]
    assert (planned["first_sample"], planned["samples"], planned["almr_realised"]) == (16, 18, 0.5)


def test_how_batches_are_read_changes_nothing(forked: Runs, single: Path) -> None:
    folder = forked.train("unread", Layout(), "--data.num_workers", "0")
    assert [row["loss"] for row in read_rows(folder) if "loss" in row] == [
        row["loss"] for row in read_rows(single) if "loss" in row
    ]


def test_megatrons_order(forked: Runs, single: Path) -> None:
    folder = forked.train("megatron-order", Layout(), "--data.order", "megatron")
    losses, others = ([row["loss"] for row in read_rows(run) if "loss" in row] for run in (folder, single))
    assert losses != others
    ledger = json.loads((folder / "ledger.json").read_text())
    assert ledger["segments"][0]["schedule"] == [{"order": "megatron", "run_samples": STEPS * 8}]
    assert abs(ledger["consumed"]["almr_realised"] - 0.33) < 0.04


def test_ledger_and_realised_almr_are_recorded(single: Path) -> None:
    ledger = json.loads((single / "ledger.json").read_text())
    planned, consumed = ledger["planned"], ledger["consumed"]
    assert planned["samples"] == consumed["samples"] == STEPS * 8
    assert {row["corpus"]: row["samples"] for row in planned["rows"]} == {"en_train": 27, "zh_train": 13}
    assert {use["name"]: use["samples"] for use in consumed["corpora"]} == {"en_train": 27, "zh_train": 13}
    assert planned["almr_realised"] == consumed["almr_realised"] == pytest.approx(13 / 40)
    assert planned["languages"] == {"en": 27 / 40, "zh": 13 / 40}
    for row in read_rows(single):
        if "loss" in row:
            assert abs(row["almr_realised"] * row["consumed_samples"] - 0.33 * row["consumed_samples"]) <= 0.5
            assert sum(row["corpus_tokens"].values()) == row["consumed_tokens"]


def test_a_fork_goes_on_and_one_of_a_finished_run_is_refused(forked: Runs, single: Path) -> None:
    """As does a run's folder that is named in another way; status.json of the fork says how it ended."""
    fork = ("--checkpoint.load", f"{single}/../single", "--checkpoint.load_state", "all")
    forked.train("fork", Layout(), *fork, check=False)
    assert forked.result.returncode == 2
    assert f"is of step {STEPS} and the run ends with step {STEPS}: there is nothing left to do" in forked.result.stderr
    longer = (f"--training.train_iters={STEPS + 1}", "--lr.on_continue=continue")
    folder = forked.train("fork", Layout(), *fork, *longer)
    assert sorted(steps(folder)) == [STEPS + 1]
    assert json.loads((folder / "status.json").read_text())["state"] == "finished"
    (folder / "status.json").write_text(json.dumps({"state": "running", "iteration": 0, "train_iters": STEPS + 1}))
    forked.train("fork", Layout(), "--checkpoint.load", str(single), "--checkpoint.load_state", "all", *longer)
    assert "nothing to do" in forked.result.stderr
    assert json.loads((folder / "status.json").read_text())["state"] == "finished"


def test_a_trained_checkpoint_is_ready_for_upload(forked: Runs, single: Path, tmp_path: Path) -> None:
    """It loads in transformers; the card says what the run was."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options = ["--megatron", str(single), "--hf", str(tmp_path / "my-model"), "--upload_ready"]
    run_tool("convert_checkpoint.py", "megatron-to-hf", *options)
    card = (tmp_path / "my-model" / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert (front["library_name"], front["pipeline_tag"]) == ("transformers", "text-generation")
    assert (front["base_model"], front["language"]) == ("hf", ["en", "zh"])  # two of three samples are English
    last = [row for row in read_rows(single) if "loss" in row][-1]
    for line in (
        "# my-model",
        "| weights it began with | megatron |",
        f"| steps | {STEPS} |",
        f"| tokens | {STEPS * 8 * 64:,} |",
        f"| additional-language mixture ratio (ALMR) | {last['almr_realised']:.4f} |",
        "| learning rate | 0.003 to 0.0001, linear, 2 warm-up steps |",
        "| batch | 8 samples of 64 tokens |",
    ):
        assert line in card.splitlines()
    assert f"| zh_train | additional | {last['corpus_tokens']['zh_train']:,} |" in card
    content = (tmp_path / "my-model" / "manifest.json").read_text()
    run = json.loads(content)["run"]
    assert run["iteration"] == STEPS
    assert {use["name"] for use in run["data"]["consumed"] if len(use["bin_sha256"]) == 64} >= {"en_train", "zh_train"}
    assert str(tmp_path) not in content
    assert str(forked.folder) not in content
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "my-model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "my-model")
    assert model.generate(**tokenizer("The dog", return_tensors="pt"), max_new_tokens=3).shape[1] >= 4
    converted = run_tool(
        "convert_checkpoint.py",
        *("megatron-to-hf", "--megatron", str(forked.folder / "megatron"), "--hf", str(tmp_path / "b"), "--upload_ready"),
        check=False,
    )
    assert converted.returncode == 2
    assert "comes from no run" in converted.stderr


def test_a_trained_checkpoint_loads_in_lm_eval(single: Path, tmp_path: Path) -> None:
    """Its command, on a task of text in a file, finds the loss that transformers finds."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run_tool("convert_checkpoint.py", "megatron-to-hf", "--megatron", str(single), "--hf", str(tmp_path / "model"))
    text = "The dog runs to the river."
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": text}) + "\n")
    task = {
        "task": "bytes",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "text.jsonl")}},
        "test_split": "test",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "text",
        "metric_list": [{"metric": "bits_per_byte"}],
    }
    write_yaml(tmp_path / "bytes.yaml", task)
    command = [forked_python("lm_eval"), "-m", "lm_eval", "run", "--model", "hf", "--tasks", "bytes"]
    command += ["--include_path", str(tmp_path)]
    options = ["--model_args", f"pretrained={tmp_path / 'model'},dtype=float32", "--device", "cpu"]
    environment = os.environ | ENVIRONMENT | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(
        [*command, *options, "--output_path", str(tmp_path / "results")], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(next((tmp_path / "results").rglob("results_*.json")).read_text())["results"]["bytes"]

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    tokens = torch.tensor([[tokenizer.eos_token_id, *tokenizer.encode(text, add_special_tokens=False)]])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    nats = model(tokens, labels=tokens).loss.item() * (tokens.shape[1] - 1)
    assert results["bits_per_byte,none"] == pytest.approx(nats / math.log(2) / len(text), rel=1e-5)


def test_a_damaged_checkpoint_is_named(forked: Runs, single: Path) -> None:
    save = forked.interrupted(single, "damaged")
    path = next((save / f"iter_{SAVE_INTERVAL:07d}").glob("*.distcp"))
    content = bytearray(path.read_bytes())
    for place in range(0, len(content), 64):
        content[place] ^= 255
    path.write_bytes(content)
    forked.train("damaged", Layout(), check=False)
    assert forked.result.returncode == 2
    assert forked.result.stderr.count("error: ") == 1
    assert f"iter_{SAVE_INTERVAL:07d} is damaged: {path.name} has the checksum" in forked.result.stderr
