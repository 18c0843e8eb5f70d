"""Checkpoints with a bit that is another than it was: found before a step is taken, in whichever file it is."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from forks import Forks, Job
from layout_cases import Case
from metrics_rows import clockless
from tiny_models import VARIANTS, run_tool
from tiny_runs import Layout, Runs

from megatron_cpt.checkpoint.checksums import TensorCheck
from megatron_cpt.checkpoint.layout import find_checkpoint, read_manifest
from megatron_cpt.convert.config import Verify
from megatron_cpt.convert.verify import verify
from megatron_cpt.utils.errors import InputError

STEPS = 3
SETTINGS = (f"--training.train_iters={STEPS}", "--training.global_batch_size=4", "--checkpoint.save_interval=1")
ONE, TWO = Case(), Case(dp=2)
FILES = [".metadata", "metadata.json", "common.pt", "manifest.json", "hf/config.json", "hf/tokenizer.json"]


class Damaged:
    """Runs of `STEPS` steps with a checkpoint after each, to be damaged."""

    def __init__(self, runs: Runs, forks: Forks) -> None:
        self.runs, self.forks = runs, forks
        for case in (ONE, TWO):
            self.start(f"whole{case.processes}", case=case).finish()

    def start(self, name: str, *extra: str, case: Case = ONE, **tamper: Any) -> Job:
        argv = ["--config", self.runs.configure(name, Layout()), *SETTINGS, *case.arguments, *extra]
        return self.forks.start(argv, self.runs.folder / f"{name}.log", case.processes, tamper)

    def copy(self, name: str, steps: int, case: Case = ONE) -> Path:
        """The folder of a run as it was when it had saved the checkpoint after `steps` steps; returns that checkpoint's."""
        whole, folder = self.whole(case), self.runs.folder / name
        shutil.copytree(whole, folder)
        for later in range(steps + 1, STEPS + 1):
            shutil.rmtree(folder / f"iter_{later:07d}")
        (folder / "latest_checkpointed_iteration.txt").write_text(str(steps))
        return folder / f"iter_{steps:07d}"

    def whole(self, case: Case) -> Path:
        return self.runs.folder / f"whole{case.processes}"


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_dir: str, forks: Forks) -> Damaged:
    return Damaged(Runs(tmp_path_factory.mktemp("damaged"), tiny_tokenizer_dir, **VARIANTS["tied"]), forks)


def flip(path: Path, place: float = 0.5) -> None:
    """Change a bit of a file, that part of the way into it."""
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 1
    path.write_bytes(content)


def tensor_file(checkpoint: Path, which: int = 0) -> Path:
    return sorted(checkpoint.glob("*.distcp"))[which]


@pytest.mark.parametrize("name", [*FILES, "*.distcp"])
def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(damaged: Damaged, name: str) -> None:
    checkpoint = damaged.copy(run := name.replace("/", "-").strip("*."), steps=2)
    path = next(checkpoint.glob(name))
    flip(path, 0 if name == "manifest.json" else 0.5)  # what it says elsewhere may be JSON still
    job = damaged.start(run, "--checkpoint.keep_last=1")
    job.finish()
    folder, whole = checkpoint.parent, damaged.whole(ONE)
    said = " ".join(job.text().split())
    damage = f"manifest {path} cannot be read" if name == "manifest.json" else f"{checkpoint} is damaged: {path.name}"
    assert f"passed over: checkpoint {damage}" in said.replace("hf/", "")
    assert f"resuming from {folder}/iter_0000001" in said
    assert clockless(folder) == clockless(whole)
    assert "tensors equal" in verify(Verify(str(folder / "iter_0000003"), str(whole / "iter_0000003")))
    assert [path.name for path in folder.glob("iter_*")] == ["iter_0000003"]


@pytest.mark.parametrize("how", ["renamed", "no iteration"])
def test_a_checkpoint_under_another_name_is_not_the_newest(damaged: Damaged, how: str) -> None:
    """It was taken for that of its name, and then for a damaged one and away from under the run that loaded it."""
    run = how.replace(" ", "-")
    checkpoint = damaged.copy(run, steps=2)
    renamed = checkpoint.with_name("iter_0000003")
    if how == "renamed":
        checkpoint.rename(renamed)
    else:
        renamed = checkpoint
        (checkpoint / "manifest.json").write_text("{}")
    job = damaged.start(run)
    job.finish()
    said = " ".join(job.text().split())
    found = "2" if how == "renamed" else "None"
    assert f"passed over: checkpoint {renamed}: manifest.json: iteration is {found}; expected that of its name" in said
    assert f"resuming from {checkpoint.parent}/iter_0000001" in said
    assert clockless(checkpoint.parent) == clockless(damaged.whole(ONE))


@pytest.mark.parametrize("kind", ["a link to what is not there", "a file"])
def test_what_has_the_name_of_a_checkpoint_is_refused_before_a_save_meets_it(damaged: Damaged, kind: str) -> None:
    run = kind.replace(" ", "-")
    place = damaged.copy(run, steps=2).with_name("iter_0000003")
    if kind == "a file":
        place.write_text("")
    else:
        place.symlink_to("nowhere")
    job = damaged.start(run)
    assert job.wait() == [2]
    assert f"error: {place} is {kind}; expected the folder of a checkpoint" in " ".join(job.text().split())


@pytest.mark.parametrize("which", range(4))  # two files of each rank
def test_ranks_agree_on_what_one_of_them_has_found(damaged: Damaged, which: int) -> None:
    checkpoint = damaged.copy(f"two{which}", steps=2, case=TWO)
    flip(tensor_file(checkpoint, which), place=0.9)
    job = damaged.start(f"two{which}", case=TWO)
    job.finish()
    assert tensor_file(checkpoint, which).name in job.text()
    assert (checkpoint.parent / "damaged_iter_0000002").is_dir()
    assert clockless(checkpoint.parent) == clockless(damaged.whole(TWO))


def test_without_another_checkpoint_the_run_ends_with_one_line(damaged: Damaged) -> None:
    checkpoint = damaged.copy("only", steps=1)
    flip(tensor_file(checkpoint))
    status = checkpoint.parent / "status.json"
    status.write_text(status.read_text().replace("finished", "running"))  # as a kill leaves it
    for _ in range(2):  # nor does it begin anew the next time
        job = damaged.start("only")
        assert job.wait() == [2]
        line = job.text().splitlines()[-1]
        assert line.startswith(f"error: checkpoint {checkpoint} is damaged: {tensor_file(checkpoint).name} has the checksum")
        assert "Traceback" not in job.text()
        assert json.loads(status.read_text())["state"] == "failed"


def test_a_refusal_by_the_checkpoint_before_says_why_that_is_asked(damaged: Damaged) -> None:
    """The newest has the learning rate that is asked for, and is damaged."""
    checkpoint = damaged.copy("before", steps=2)
    faster = ("--optimizer.lr=0.002", "--lr.warmup_iters=0")
    damaged.start("before", *faster, "--lr.on_continue=restart").finish()
    newest = checkpoint.parent / f"iter_{STEPS:07d}"
    flip(tensor_file(newest))
    job = damaged.start("before", *faster, "--training.extend_to=4")
    assert job.wait() == [2]
    said = " ".join(job.text().split())
    passed, refused = f"passed over: checkpoint {newest} is damaged", "schedule is not the one of the run's checkpoint"
    assert said.index(passed) < said.index(refused)
    assert job.text().count("error: ") == 1


@pytest.mark.parametrize("case", [ONE, TWO], ids=str)
def test_damaged_weights_to_start_from_are_refused(damaged: Damaged, case: Case) -> None:
    start = damaged.runs.folder / f"start{case.processes}"
    shutil.copytree(damaged.runs.folder / "megatron", start)
    path = tensor_file(start / "release")
    flip(path)
    job = damaged.start(f"refused{case.processes}", f"--checkpoint.load={start}", case=case)
    assert set(job.wait()) == {2}
    assert f"{path.name} has the checksum" in job.text()
    assert "Traceback" not in job.text()
    assert not (damaged.runs.folder / f"refused{case.processes}" / "metrics.jsonl").exists()


def test_a_checkpoint_of_an_earlier_version_is_loaded_with_a_word(damaged: Damaged) -> None:
    checkpoint = damaged.copy("old", steps=2)
    manifest = read_manifest(str(checkpoint / "manifest.json"))
    del manifest["crc32"]
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    job = damaged.start("old")
    job.finish()
    assert f"{checkpoint} was saved without checksums" in " ".join(job.text().split())
    assert clockless(checkpoint.parent) == clockless(damaged.whole(ONE))


@pytest.mark.parametrize(
    ("error", "case"), [("builtins.MemoryError", ONE), ("torch.OutOfMemoryError", TWO), ("builtins.AttributeError", ONE)]
)
def test_what_is_not_of_the_files_keeps_its_traceback(damaged: Damaged, error: str, case: Case) -> None:
    checkpoint = damaged.copy(run := error.split(".")[-1], steps=2, case=case)
    job = damaged.start(run, case=case, loading_fails={"error": error, "rank": case.processes - 1})
    assert set(job.wait()) == {1}
    assert "Traceback (most recent call last)" in job.text()
    assert f"{run}: broken on purpose" in job.text()
    assert "cannot be read" not in job.text()
    assert "damaged:" not in job.text()
    assert checkpoint.is_dir()


def found(checkpoint: Path) -> bool:
    """Whether what a run does before it loads finds something wrong."""
    try:
        find_checkpoint(str(checkpoint))
    except InputError:
        return True
    check = TensorCheck(str(checkpoint), read_manifest(str(checkpoint / "manifest.json")), 0, 1, 2)
    check.wait(lambda: False)
    return check.damage() is not None


def test_any_bit_of_any_file_is_found(damaged: Damaged) -> None:
    checkpoint, places = damaged.copy("bits", steps=3), random.Random(3)
    assert not found(checkpoint)
    for path in sorted(path for path in checkpoint.rglob("*") if path.is_file()):
        content = path.read_bytes()
        for bit in {0, 8 * len(content) - 1, *(places.randrange(8 * len(content)) for _ in range(40))}:
            changed = bytearray(content)
            changed[bit // 8] ^= 1 << bit % 8
            path.write_bytes(changed)
            same = path.name == "manifest.json" and same_content(content, changed)
            assert found(checkpoint) or same, (path, bit)
        path.write_bytes(content)
    assert not found(checkpoint)


def same_content(one: bytes, other: bytes) -> bool:
    """Whether two JSON texts say the same, checksums apart: changed blanks do no harm, nor does another name for these."""
    try:
        contents = [json.loads(text) for text in (one, other)]
    except ValueError:
        return False
    for content in contents:
        for name in [
            name for name in content if len(name) == 5 and sum(a != b for a, b in zip(name, "crc32", strict=True)) < 2
        ]:
            del content[name]
    return contents[0] == contents[1]


def test_the_converter_names_a_damaged_tokenizer(damaged: Damaged) -> None:
    checkpoint = damaged.copy("converted", steps=1)
    flip(checkpoint / "hf" / "tokenizer.json")
    arguments = ("megatron-to-hf", "--megatron", str(checkpoint), "--hf", str(checkpoint.parent / "hf"))
    ended = run_tool("convert_checkpoint.py", *arguments, check=False)
    assert ended.returncode == 2
    assert "hf/tokenizer.json has the checksum" in ended.stderr
