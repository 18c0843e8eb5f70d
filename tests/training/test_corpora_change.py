"""Corpora that are damaged, replaced or cut short before or during a run: one line that names the file, status failed."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from forks import Forks, Job, until
from metrics_rows import steps_taken
from tiny_models import VARIANTS
from tiny_runs import Layout, Runs


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_dir: str) -> Runs:
    return Runs(tmp_path_factory.mktemp("corpora"), tiny_tokenizer_dir, **VARIANTS["tied"])


def with_own_corpora(runs: Runs, name: str) -> Path:
    """A folder with a copy of the mixture and its corpora."""
    folder = runs.folder / f"{name}-corpora"
    folder.mkdir()
    for path in [*runs.folder.glob("*_train.*"), *runs.folder.glob("*_valid.*"), Path(runs.mixture)]:
        shutil.copy2(path, folder / path.name)
    return folder


def start(runs: Runs, forks: Forks, name: str, corpora: Path, *extra: str) -> Job:
    argv = ["--config", runs.configure(name, Layout()), f"--mixture={corpora / 'mixture.yaml'}", *extra]
    return forks.start(argv, runs.folder / f"{name}.log")


def assert_failed(runs: Runs, name: str, job: Job, *words: str) -> None:
    """With one line that has these words, in the log and in status.json."""
    assert job.wait() == [1], job.text()
    (line,) = [line for line in job.text().splitlines() if line.startswith("error: ")]
    status = json.loads((runs.folder / name / "status.json").read_text())
    assert status["state"] == "failed"
    for word in words:
        assert word in line
        assert word in status["reason"]
    assert "Traceback" not in job.text()


def patch(path: Path, offset: int, content: bytes) -> None:
    """Write in place; the size stays."""
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(content)


LONG = ("--training.train_iters=5000", "--checkpoint.save_interval=0")


@pytest.mark.parametrize("suffix", ["bin", "idx"])
def test_a_file_that_is_cut_short_under_a_running_job(runs: Runs, forks: Forks, suffix: str) -> None:
    name, extra = f"cut-{suffix}", ["--data.eod_mask_loss=true"] if suffix == "idx" else []
    corpora = with_own_corpora(runs, name)
    job = start(runs, forks, name, corpora, *LONG, "--data.check_files=false", *extra)
    until(lambda: steps_taken(runs.folder / name) >= 2 or job.poll())
    size = (corpora / f"en_train.{suffix}").stat().st_size
    os.truncate(corpora / f"en_train.{suffix}", 1000)
    assert_failed(runs, name, job, f"en_train.{suffix}: found 1000 bytes; expected {size}")


def test_ids_that_are_in_no_vocabulary(runs: Runs, forks: Forks) -> None:
    corpora = with_own_corpora(runs, "ids")
    for place in range(0, (corpora / "zh_train.bin").stat().st_size // 2, 16):
        patch(corpora / "zh_train.bin", 2 * place, (60_000 + place).to_bytes(2, "little"))
    vocab_size = json.loads((corpora / "zh_train.json").read_text())["tokenizer"]["vocab_size"]
    job = start(runs, forks, "ids", corpora, "--data.check_files=false")
    assert_failed(runs, "ids", job, "zh_train.bin: token ", f"expected ids from 0 to {vocab_size - 1}, the vocabulary")
    (line,) = [line for line in job.text().splitlines() if line.startswith("error: ")]
    position, found = (int(line.split(before)[1].split()[0].strip(";").replace(",", "")) for before in ("token ", ") is "))
    assert found == 60_000 + position


@pytest.mark.parametrize("corpus", ["en_train", "zh_valid"])
def test_a_corpus_of_the_same_length_in_the_place_of_another(runs: Runs, forks: Forks, corpus: str) -> None:
    name = f"replaced-{corpus}"
    corpora = with_own_corpora(runs, name)
    content = (corpora / f"{corpus}.bin").read_bytes()
    (corpora / f"{corpus}.bin").write_bytes(content[200:] + content[:200])
    job = start(runs, forks, name, corpora)
    assert_failed(runs, name, job, f"{corpus}.bin: sha256 is ", f"{corpus}.json says")
    assert not list((runs.folder / name).glob("iter_0000005"))  # nothing was saved of it in the end


def test_a_file_that_is_written_to_during_the_run_is_compared_again(runs: Runs, forks: Forks) -> None:
    corpora = with_own_corpora(runs, "written")
    job = start(runs, forks, "written", corpora, *LONG)
    until(lambda: (runs.folder / "written" / "checked_files.json").exists() or job.poll())
    patch(corpora / "en_train.bin", 4, b"\x01\x00\x02\x00")
    # A checker looks every half minute; another start finds the newer version at once.
    job.kill(15)
    assert job.wait() == [0], job.text()
    again = start(runs, forks, "written", corpora, *LONG)
    assert_failed(runs, "written", again, "en_train.bin: sha256 is ")


def test_what_was_right_is_not_read_again(runs: Runs, forks: Forks) -> None:
    corpora = with_own_corpora(runs, "right")
    start(runs, forks, "right", corpora).finish()
    record = runs.folder / "right" / "checked_files.json"
    checked = json.loads(record.read_text())
    assert sorted(os.path.basename(path) for path in checked) == sorted(
        f"{language}_{part}.{suffix}"
        for language in ("en", "zh")
        for part in ("train", "valid")
        for suffix in ("bin", "idx")
    )
    assert checked[str((corpora / "en_train.bin").resolve())][1] == (corpora / "en_train.bin").stat().st_size
