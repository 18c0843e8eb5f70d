"""tools/export_order.py: its rows against the tokens that training reads, and documents found against all rows."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from emulated_cuda import compile_emulated
from forks import Forks
from tiny_models import read_rows, run_tool, write_yaml
from tiny_runs import Layout, Runs

from megatron_cpt.checkpoint.checksums import checksums_in, sealed
from megatron_cpt.checkpoint.layout import read_checkpoint_manifest
from megatron_cpt.config.run import DataConfig
from megatron_cpt.corpus.manifest import read_corpus_manifest
from megatron_cpt.corpus.preprocess import PreprocessConfig, preprocess
from megatron_cpt.mixture.document_reads import locate_on_cpu
from megatron_cpt.mixture.loader import TrainingData
from megatron_cpt.mixture.order.order import SampleOrder
from megatron_cpt.mixture.state import DataState, saved_phases
from megatron_cpt.training import device_order
from megatron_cpt.training.device_order import OnDevice
from megatron_cpt.training.order_export import ExportOrderConfig, check_mixture_file, check_steps, open_run
from megatron_cpt.utils.errors import InputError

SEQ_LENGTH = 64  # of `Runs`


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_dir: str, forks: Forks) -> Runs:
    return Runs(tmp_path_factory.mktemp("export"), tiny_tokenizer_dir, forks)


@pytest.fixture(scope="module")
def changed(runs: Runs) -> Path:
    """A run of two steps of 8 samples, one of 4, and then, with another ALMR, four of 4."""
    runs.train("run", Layout(), "--training.train_iters=2", "--lr.warmup_iters=1")
    quarter = ["--training.global_batch_size=4", "--training.train_iters=null", "--lr.on_continue=continue"]
    runs.train("run", Layout(), *quarter, "--training.train_samples=20")
    other = write_yaml(runs.folder / "other.yaml", yaml.safe_load(Path(runs.mixture).read_text()) | {"almr": 0.75})
    new = ["--mixture", other, "--data.accept_new_mixture=true", "--training.train_samples=36"]
    return runs.train("run", Layout(), *quarter, *new)


def export(*arguments: str, check: bool = True) -> Any:
    return run_tool("export_order.py", *arguments, check=check)


def rows_of(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist()
    facts = json.loads(Path(f"{path}.json").read_text())
    rows = [dict(zip(np.load(path).dtype.names, row.tolist(), strict=True)) for row in np.load(path)]
    for row in rows:
        row["corpus"] = facts["corpora"][row["corpus"]]
        row["file"] = facts["files"][row["file"]] if row["file"] >= 0 else None
        row["line"] = row["line"] if row["line"] >= 0 else None
    return rows


def check_tokens(rows: list[dict[str, Any]], config: ExportOrderConfig, first_sample: int, samples: int) -> None:
    """The documents of each sample, one after the other, are the tokens that training reads."""
    ordered = open_run(config)
    corpora = {corpus.name: corpus.data for corpus in ordered.mixture.corpora}
    data = TrainingData(list(corpora.values()), ordered.stretches[-1].order, DataConfig())
    batch = data.read(first_sample, samples).tokens
    assert batch is not None
    for n, wanted in enumerate(batch, first_sample):
        parts = [row for row in rows if row["sample"] == n]
        tokens = [corpora[row["corpus"]][row["document"]][row["first_token"] :][: row["tokens"]] for row in parts]
        assert np.concatenate(tokens).tolist() == wanted.tolist()


@pytest.mark.parametrize("order", ["default", "megatron"])
@pytest.mark.parametrize("suffix", ["parquet", "npy"])
def test_rows_are_what_training_reads(runs: Runs, tmp_path: Path, order: str, suffix: str) -> None:
    output = tmp_path / f"order.{suffix}"
    mixture = ["--mixture", runs.mixture, "--global_batch_size=8", "--train_iters=30", "--order", order]
    found = export(*mixture, "--first_step=3", "--last_step=25", "--output", str(output))
    assert found.stdout.strip() == str(output)
    rows = rows_of(output)
    config = ExportOrderConfig(None, runs.mixture, 8, 30, order, output="order.npy")  # type: ignore[arg-type]
    check_tokens(rows, config, 16, 23 * 8)
    assert {row["step"]: row["sample"] // 8 + 1 for row in rows} == {step: step for step in range(3, 26)}
    for row in rows[::37]:
        text = json.loads(Path(row["file"]).read_text(encoding="utf-8").splitlines()[row["line"] - 1])["text"]
        assert text.startswith(f"train {row['document']}: ")
    facts = json.loads(Path(f"{output}.json").read_text())
    assert facts["rows"] == len(rows)
    assert (facts["first_step"], facts["last_step"], facts["order"]) == (3, 25, order)


@pytest.mark.parametrize("order", ["default", "megatron"])
def test_documents_are_found_in_all_their_steps(runs: Runs, tmp_path: Path, order: str) -> None:
    mixture = ["--mixture", runs.mixture, "--global_batch_size=8", "--train_iters=40", "--order", order]
    export(*mixture, "--output", str(tmp_path / "all.parquet"))
    everything = rows_of(tmp_path / "all.parquet")
    names = ["en_train:0", "zh_train:39", "zh_train:7", f"{runs.folder}/en_train.jsonl:12"]
    export(*mixture, "--last_step=33", "--find", *names, "--output", str(tmp_path / "found.parquet"))
    wanted = [("en_train", 0), ("zh_train", 39), ("zh_train", 7), ("en_train", 11)]
    expected = [
        row for place in wanted for row in everything if (row["corpus"], row["document"]) == place and row["step"] <= 33
    ]
    assert rows_of(tmp_path / "found.parquet") == expected
    assert len({row["step"] for row in expected}) > 8  # several epochs
    said = export(*mixture, "--find", "zh_train:7").stdout.splitlines()
    assert said[0].startswith(f"step {expected_first(everything, 'zh_train', 7)}, sample ")
    assert f"zh_train:7 ({runs.folder}/zh_train.jsonl:8), tokens " in said[0]
    assert len(said) == sum((row["corpus"], row["document"]) == ("zh_train", 7) for row in everything)


def expected_first(rows: list[dict[str, Any]], corpus: str, document: int) -> int:
    """The first step that reads a document."""
    return min(row["step"] for row in rows if (row["corpus"], row["document"]) == (corpus, document))


def test_steps_of_a_run_that_changed_its_batch_and_its_mixture(changed: Path, tmp_path: Path) -> None:
    """What the run counted while it trained is what the rows say."""
    output = tmp_path / "order.parquet"
    refused = export("--run", str(changed), "--output", str(output), check=False)
    assert refused.returncode == 2
    assert "first_step is 1; expected 4 or more: before that the run read another mixture" in refused.stderr
    export("--run", str(changed), "--first_step=4", "--output", str(output))
    rows = rows_of(output)
    assert {row["step"] for row in rows} == set(range(4, 8))
    counted = {row["iteration"]: row["corpus_tokens"] for row in read_rows(changed) if "loss" in row}
    for step in range(4, 8):
        samples = Counter({row["sample"]: row["corpus"] for row in rows if row["step"] == step}.values())
        more = {name: counted[step][name] - counted[step - 1].get(name, 0) for name in counted[step]}
        assert {name: samples[name] * SEQ_LENGTH for name in more} == more
    check_tokens(rows, ExportOrderConfig(str(changed), output="order.npy"), 20, 16)
    # an older checkpoint tells of the mixture before, and of both of its batch sizes
    early = sorted(changed.glob("iter_*"))[0]
    export("--run", str(early), "--output", str(tmp_path / "early.parquet"))
    assert {row["step"] for row in rows_of(tmp_path / "early.parquet")} == {1, 2}


def test_steps_of_a_run_in_megatrons_order_that_changed_its_batch(runs: Runs, tmp_path: Path) -> None:
    megatron = ["--data.order=megatron", "--training.train_iters=null", "--training.train_samples=32"]
    run = runs.train("megatron_order", Layout(), *megatron, "--lr.warmup_iters=1")
    for later in sorted(run.glob("iter_*"))[1:]:  # as a run that was stopped after two steps
        shutil.rmtree(later)
    (run / "latest_checkpointed_iteration.txt").write_text("2")
    quarter = ["--training.global_batch_size=4", "--lr.warmup_iters=1", "--lr.on_continue=continue"]
    runs.train("megatron_order", Layout(), *megatron, *quarter)
    output = tmp_path / "order.parquet"
    export("--run", str(run), "--output", str(output))
    rows = rows_of(output)
    assert {row["sample"]: row["step"] for row in rows} == {n: n // 8 + 1 if n < 16 else n // 4 - 1 for n in range(32)}
    check_tokens(rows, ExportOrderConfig(str(run), output="order.npy"), 0, 32)
    manifest = read_checkpoint_manifest(str(sorted(run.glob("iter_*"))[-1]))
    phases = saved_phases(manifest["data"])
    check_steps("run", DataState(phases), 6, 32)
    said = "data.segments are 4 steps up to sample 32; expected 6, as iteration"  # as versions of before recorded it
    with pytest.raises(InputError, match=said):
        check_steps("run", DataState(phases[:1]), 6, 32)


def test_an_output_that_is_there(runs: Runs, tmp_path: Path) -> None:
    output = ["--output", str(tmp_path / "order.npy")]
    mixture = ["--mixture", runs.mixture, "--global_batch_size=8", "--train_iters=3"]
    export(*mixture, *output)
    before = (tmp_path / "order.npy").stat().st_mtime_ns
    assert "nothing to do" in export(*mixture, *output).stderr
    assert (tmp_path / "order.npy").stat().st_mtime_ns == before
    refused = export(*mixture, *output, "--last_step=2", check=False)
    assert refused.returncode == 2
    assert "order.npy is there, and was not made of these steps; expected another name, or overwrite" in refused.stderr
    export(*mixture, *output, "--last_step=2", "--overwrite")
    assert {row["step"] for row in rows_of(tmp_path / "order.npy")} == {1, 2}


def test_an_output_of_others(runs: Runs, tmp_path: Path) -> None:
    """Neither replaced without being asked to, nor taken for one of these steps."""
    mixture = ["--mixture", runs.mixture, "--global_batch_size=8", "--train_iters=3"]
    output = tmp_path / "new" / "folder" / "order.npy"
    export(*mixture, "--output", str(output))
    output.write_text("hello")
    refused = export(*mixture, "--output", str(output), check=False)
    assert (refused.returncode, output.read_text()) == (2, "hello")
    assert "order.npy is there, and was not made of these steps" in refused.stderr
    output.unlink()
    refused = export(*mixture, "--output", str(output), check=False)
    assert refused.returncode == 2
    assert "order.npy.json is there, and was not made of these steps" in refused.stderr
    for name in ("a.npy", "b.npy.json"):
        (tmp_path / name).mkdir()
        refused = export(*mixture, "--output", str(tmp_path / f"{name[0]}.npy"), "--overwrite", check=False)
        assert refused.returncode == 2
        assert f"{name} is there, and is no file" in refused.stderr


def test_an_output_in_the_home_folder(runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    found = export("--mixture", runs.mixture, "--global_batch_size=8", "--train_iters=3", "--output=~/order.npy")
    assert found.stdout.strip() == str(tmp_path / "order.npy")
    assert len(rows_of(tmp_path / "order.npy")) > 24


def test_an_export_that_fails_leaves_what_was_there(runs: Runs, tmp_path: Path) -> None:
    """A disk that is full, and a signal: one line, and the old output with its JSON file."""
    mixture = ["--mixture", runs.mixture, "--global_batch_size=8", "--output", str(tmp_path / "order.npy")]
    export(*mixture, "--train_iters=3")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    tool = [sys.executable, str(Path(__file__).parents[2] / "tools" / "export_order.py"), *mixture, "--overwrite"]
    limit = ["bash", "-c", 'ulimit -f 1; exec "$@"', "-", *tool, "--train_iters=300"]
    full = subprocess.run(limit, capture_output=True, text=True, check=False)
    assert (full.returncode, full.stderr.count("\n")) == (1, 1)
    assert f"output {tmp_path / 'order.npy'} could not be written: File too large" in full.stderr
    stopped = subprocess.Popen([*tool, "--train_iters=40000000"], stderr=subprocess.PIPE, text=True)
    while not any(path.name.startswith(".order.npy.") and path.stat().st_size > 1 << 20 for path in tmp_path.iterdir()):
        assert stopped.poll() is None
        time.sleep(0.02)
    stopped.terminate()
    assert stopped.communicate()[1].splitlines()[-1] == "interrupted"
    assert stopped.returncode == 130
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_rows_that_nobody_reads_to_their_end(runs: Runs) -> None:
    tool = [sys.executable, str(Path(__file__).parents[2] / "tools" / "export_order.py"), "--mixture", runs.mixture]
    find = ["--global_batch_size=8", "--train_iters=2000", "--find=zh_train:7"]
    shown = subprocess.Popen([*tool, *find], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert shown.stdout is not None
    assert shown.stdout.readline().startswith("step ")
    shown.stdout.close()
    assert (shown.wait(), shown.stderr.read() if shown.stderr else None) == (1, "")


def test_lines_begin_with_1(runs: Runs) -> None:
    steps = ["--mixture", runs.mixture, "--global_batch_size=8", "--train_iters=40"]
    refused = export(*steps, "--find", "en_train.jsonl:0", check=False)
    assert (refused.returncode, refused.stderr) == (2, "error: find is en_train.jsonl:0; expected a line from 1 on\n")


def test_a_line_that_two_corpora_have_read(runs: Runs) -> None:
    """It is found in both, and each document is named once."""
    fields = yaml.safe_load(Path(runs.mixture).read_text())
    tokenizer = read_corpus_manifest(str(runs.folder / "en_train")).tokenizer.path
    source, again = str(runs.folder / "en_train.jsonl"), str(runs.folder / "again")
    preprocess(PreprocessConfig(source, tokenizer, again, "en", workers=1, shuffle_documents=3))
    both = write_yaml(runs.folder / "both.yaml", fields | {"general": [{"prefix": "en_train"}, {"prefix": "again"}]})
    steps = ["--mixture", both, "--global_batch_size=8", "--train_iters=40"]
    said = export(*steps, "--find", "en_train.jsonl:4").stdout
    assert {line.split(": ")[1].split(":")[0] for line in said.splitlines()} == {"en_train", "again"}
    assert all(f" ({source}:4), tokens " in line for line in said.splitlines())
    assert export(*steps, "--find", "en_train:3", "en_train.jsonl:4", f"{source}:4", "en_train:3").stdout == said


def test_what_does_not_go_together(runs: Runs, tmp_path: Path) -> None:
    """One line for each mistake."""
    mixture = ["--mixture", runs.mixture, "--output", str(tmp_path / "a.npy")]
    limited = yaml.safe_load(Path(runs.mixture).read_text())
    limited["general"][0]["max_epochs"] = 1
    often = write_yaml(runs.folder / "limited.yaml", limited)
    sizes = ["--global_batch_size=8", "--train_iters=3"]
    for words, said in (
        ([], ["mixture is missing", "global_batch_size is missing", "train_iters is missing", "output is missing"]),
        ([*mixture, "--train_iters=3"], ["global_batch_size is missing; expected one, or run"]),
        ([*mixture, "--global_batch_size=8"], ["train_iters is missing; expected one, or run"]),
        (
            [*mixture, "--train_iters=3", f"--global_batch_size={2**24 + 1}"],
            ["global_batch_size is 16777217; expected at most"],
        ),
        ([*mixture, f"--train_iters={2**40}", f"--global_batch_size={2**24}"], ["global_batch_size * train_iters is "]),
        ([*mixture[:2], *sizes, "--output=.npy"], ["output is .npy; expected NAME.parquet or NAME.npy"]),
        (
            ["--mixture", often, "--global_batch_size=8", "--train_iters=3000", *mixture[2:]],
            ["its max_epochs is 1: give it"],
        ),
    ):
        refused = export(*words, check=False)
        assert refused.returncode == 2
        assert len(refused.stderr.splitlines()) == len(said)
        for line in said:
            assert line in refused.stderr


def test_what_a_run_decides_is_not_asked_for(changed: Path, tmp_path: Path) -> None:
    words = ["--run", str(changed), "--output", str(tmp_path / "a.npy"), "--first_step=4"]
    refused = export(*words, "--global_batch_size=4", "--train_iters=3", "--order=default", check=False)
    assert refused.returncode == 2
    assert [line.split("; ")[0] for line in refused.stderr.splitlines()] == [
        "error: global_batch_size is 4 with run",
        "error: train_iters is 3 with run",
        "error: order is default with run",
    ]
    export(*words)
    words[1] = f"{changed}/"
    assert "nothing to do" in export(*words).stderr


def test_a_mixture_file_that_lies_elsewhere_by_now(changed: Path, tmp_path: Path) -> None:
    for name in ("gone/mixture.yaml", str(tmp_path / "mixture.yaml")):
        where = "" if name.startswith("/") else ", seen from where the run was started"
        with pytest.raises(
            InputError, match=rf"its mixture file is {name}{where}: no such file; expected mixture, where it"
        ):
            check_mixture_file(str(changed), name)


def test_a_run_of_the_last_release(runs: Runs, tmp_path: Path) -> None:
    """Its checkpoints have the old names of settings, and so has its configuration: it resumes, and its order is there."""
    old = {"trouble": {"max_skipped_steps": 2, "rerun_rejected_steps": True, "check_weights_interval": 2}}
    folder = runs.train("old", Layout(), "--training.train_iters=2", "--lr.warmup_iters=1")
    (manifest,) = folder.glob("iter_*/manifest.json")
    facts = json.loads(manifest.read_text())
    assert facts["config"].pop("loss_spikes")["heartbeat_seconds"] == 120
    manifest.write_text(json.dumps(sealed(facts | {"config": facts["config"] | old}, checksums_in(facts))))
    assert "note: " not in export("--run", str(folder), "--output", str(tmp_path / "old.parquet")).stderr
    path = write_yaml(runs.folder / "old_names.yaml", old)
    resumed = ["--config", path, "--training.train_iters=3", "--lr.warmup_iters=1", "--lr.on_continue=continue"]
    runs.train("old", Layout(), *resumed)
    said = runs.result.stdout + runs.result.stderr
    assert said.count(f"note: {path}: trouble is now called loss_spikes; the old name") == 1
    assert "resuming from" in said
    after = json.loads((folder / "run.json").read_text())["config"]["loss_spikes"]
    assert (after["rerun_skipped_steps"], after["check_weight_hash_across_dp_replicas_interval"]) == (True, 2)
    assert after["max_skipped_steps"] == 2


def test_no_torch_is_needed(runs: Runs, tmp_path: Path) -> None:
    program = (
        "import sys; from megatron_cpt.training.order_export import *; "
        f"export_order(ExportOrderConfig(mixture={runs.mixture!r}, global_batch_size=2, train_iters=2, "
        f"output={str(tmp_path / 'a.npy')!r})); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_an_order_on_a_device(runs: Runs, tmp_path: Path) -> None:
    """The source for GPUs, compiled for the CPU; tests/mixture/order/test_cuda.py has it on a GPU."""
    (stretch,) = open_run(ExportOrderConfig(None, runs.mixture, 8, 30, output="order.npy")).stretches
    assert isinstance(stretch.order, SampleOrder)
    lookup = OnDevice("cpu", compile_emulated(tmp_path))
    for _ in range(2):
        for found, wanted in zip(lookup(stretch.order, 3, 200), locate_on_cpu(stretch.order, 3, 200), strict=True):
            assert found.tolist() == wanted.tolist()


def test_settings_act(runs: Runs, tmp_path: Path) -> None:
    """Each gives other rows, or is refused where it cannot act."""

    def rows(*words: str) -> list[dict[str, Any]]:
        base = {"mixture": runs.mixture, "global_batch_size": "8", "train_iters": "6", "output": str(tmp_path / "a.npy")}
        base |= dict(zip((word.removeprefix("--") for word in words[::2]), words[1::2], strict=True))
        export(*(word for name, value in base.items() for word in (f"--{name}", value)), "--overwrite")
        return rows_of(Path(base["output"]))

    plain = rows()
    other = write_yaml(runs.folder / "half.yaml", yaml.safe_load(Path(runs.mixture).read_text()) | {"almr": 0.5})
    shares = [
        Counter({row["sample"]: row["corpus"] for row in found}.values()) for found in (plain, rows("--mixture", other))
    ]
    assert [share["zh_train"] for share in shares] == [16, 24]
    assert {row["step"]: row["sample"] // 4 for row in rows("--global_batch_size", "4")} == {n: n - 1 for n in range(1, 7)}
    assert max(row["step"] for row in rows("--train_iters", "5")) == 5
    assert rows("--order", "megatron") != plain
    assert rows("--first_step", "3") == [row for row in plain if row["step"] >= 3]
    assert rows("--last_step", "3") == [row for row in plain if row["step"] <= 3]
    assert rows("--num_workers", "3") == plain
    assert rows("--output", str(tmp_path / "b.parquet")) == plain
    found = rows("--find", "zh_train:3")
    assert found == [row for row in plain if (row["corpus"], row["document"]) == ("zh_train", 3)] != []
    words = ["--mixture", runs.mixture, "--global_batch_size=8", "--train_iters=6", "--output", str(tmp_path / "c.npy")]
    refused = export(*words, "--device=cuda", check=False)
    assert (refused.returncode, (tmp_path / "c.npy").exists()) == (2, False)
    assert "device is cuda; expected cpu" in refused.stderr  # no library, or no GPU


def test_a_library_that_was_not_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_order, "LIBRARY", tmp_path / "nowhere.so")
    with pytest.raises(InputError, match=r"device is cuda; expected cpu, or .*nowhere\.so, which make cuda builds"):
        device_order.check_library()
