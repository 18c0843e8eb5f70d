"""A study whose corpora, validation sets or start checkpoint are replaced under their names: every command says so."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml
from study_folders import write_folder
from study_results import make_results
from tiny_models import make_tiny_llama, run_tool, write_yaml
from tiny_runs import Layout, Runs

from megatron_cpt.convert.config import HfToMegatron
from megatron_cpt.convert.convert import hf_to_megatron
from megatron_cpt.corpus.preprocess import PreprocessConfig, preprocess
from megatron_cpt.mixture.file import load_mixture
from megatron_cpt.study.commands import choose_command, fit_command, plan_study, plot, run_study
from megatron_cpt.study.config import StudyConfig
from megatron_cpt.study.grid import grid_points, read_base
from megatron_cpt.study.inputs import checkpoint_checksum, record_inputs, record_start
from megatron_cpt.study.settings import ChooseOptions, FitOptions, PlanOptions, PlotOptions, RunOptions
from megatron_cpt.training.baseline import measurements
from megatron_cpt.utils.errors import InputError

COMMANDS: dict[str, tuple[Callable[[Any], str], type[StudyConfig]]] = {
    "plan": (plan_study, PlanOptions),
    "run": (run_study, RunOptions),
    "fit": (fit_command, FitOptions),
    "choose": (choose_command, ChooseOptions),
    "plot": (plot, PlotOptions),
}
REPLACED = {
    "zh_train": "bin_sha256 of corpus zh_train",
    "zh_valid": "bin_sha256 of validation set zh",
    "megatron": "checksum of checkpoint.load",
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_dir: str) -> Runs:
    """Corpora and a start checkpoint, and in the folder `other` what they are replaced by."""
    runs = Runs(tmp_path_factory.mktemp("inputs"), tiny_tokenizer_dir)
    other = runs.folder / "other"
    other.mkdir()
    for name in ("zh_train", "zh_valid"):
        source = other / f"{name}.jsonl"
        source.write_text("".join(json.dumps({"text": f"{name} {i}: 昨天下雨了。" * 9}) + "\n" for i in range(40)))
        preprocess(PreprocessConfig([str(source)], tiny_tokenizer_dir, str(other / name), language="zh", workers=1))
    hf = make_tiny_llama(other / "hf", tiny_tokenizer_dir, intermediate_size=176)
    hf_to_megatron(HfToMegatron(hf, str(other / "megatron")))
    return runs


class Study:
    """2 x 2 runs that nobody ran, as they say they were given what lies in `folder`."""

    def __init__(self, world: Runs, folder: Path) -> None:
        self.folder = folder
        shutil.copytree(world.folder, folder, dirs_exist_ok=True)
        fields = yaml.safe_load(Path(world.configure("base", Layout())).read_text())
        fields["mixture"] = str(folder / "mixture.yaml")
        fields["checkpoint"]["load"] = str(folder / "megatron")
        self.base = write_yaml(folder / "base.yaml", fields)

    def begin(self, planned: bool = True) -> None:
        """Plan it, as of this version, and have its runs."""
        results = make_results(seeds=1, almrs=(0.0, 1.0), rates=(1e-4, 1e-3))
        if planned:
            write_folder(self.folder, results, base=self.base)
            shutil.rmtree(self.folder / "study" / "runs")
            self.do("plan")
        write_folder(self.folder, results, base=self.base)
        for path in self.runs():
            self.tell(path)

    def runs(self) -> list[Path]:
        return sorted((self.folder / "study" / "runs").iterdir())

    def tell(self, run: Path) -> None:
        """Have a run say that it has read what lies there now."""
        base = read_base(self.config(StudyConfig))
        mixture = load_mixture(base.config.mixture)
        corpora = {corpus.name: {"bin_sha256": corpus.manifest.files["bin"].sha256} for corpus in mixture.corpora}
        ledger = json.loads((run / "ledger.json").read_text())
        (run / "ledger.json").write_text(json.dumps(ledger | {"segments": [{"mixture": {"corpora": corpora}}]}))
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        for row in rows:
            for how in measurements(mixture, base.config) if "validation" in row else []:
                row["validation"][how.name]["measurement"] = asdict(how)
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def config(self, kind: type[StudyConfig], rates: tuple[float, ...] = (1e-4, 1e-3)) -> Any:
        return kind(self.base, str(self.folder / "study"), [0.0, 1.0], list(rates), 1_000_000)

    def do(self, name: str, rates: tuple[float, ...] = (1e-4, 1e-3)) -> str:
        command, kind = COMMANDS[name]
        return command(self.config(kind, rates))

    def replace(self, name: str) -> None:
        """Make a corpus or the checkpoint anew from something else."""
        for path in (self.folder / "other").glob(f"{name}*"):
            target = self.folder / path.name
            if path.is_dir():
                shutil.rmtree(target)
                shutil.copytree(path, target)
            else:
                shutil.copyfile(path, target)


@pytest.fixture
def study(world: Runs, tmp_path: Path) -> Study:
    return Study(world, tmp_path)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", REPLACED)
def test_what_was_replaced_is_refused_before_anything_is_done(study: Study, name: str) -> None:
    study.begin()
    study.replace(name)
    before = files(study.folder / "study")
    record = study.folder / "study" / "inputs.json"
    for command in COMMANDS:
        with pytest.raises(InputError) as caught:
            study.do(command, rates=(1e-4, 1e-3, 1e-2))
        message = str(caught.value)
        assert f"study {study.folder / 'study'}: {REPLACED[name]}" in message
        assert f"as in {record}: results would not belong together. Put back what was there, or use another" in message
        assert message.endswith("for another study")
    assert files(study.folder / "study") == before


def test_the_tool_starts_no_run_with_another_checkpoint(study: Study) -> None:
    study.begin()
    study.replace("megatron")
    path = write_yaml(study.folder / "study.yaml", asdict(study.config(StudyConfig, (1e-4, 1e-3, 1e-2))))
    result = run_tool("almr_study.py", "run", "--config", path, check=False)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert f"checksum of checkpoint.load ({study.folder / 'megatron'}) is " in result.stderr
    assert len(study.runs()) == 4


def test_runs_of_an_earlier_version_say_what_they_read(study: Study) -> None:
    """There is no inputs.json: the ledgers and metrics know the text; of the checkpoint nothing is known but the losses."""
    study.begin(planned=False)
    record = study.folder / "study" / "inputs.json"
    for name in ("zh_train", "zh_valid"):
        kept = {path: path.read_bytes() for path in study.folder.glob(f"{name}.*")}
        study.replace(name)
        for command in ("plan", "fit"):
            with pytest.raises(InputError, match=rf"{REPLACED[name]} is .*, as in .*runs/almr0_lr0\.0001_seed1"):
                study.do(command)
        for path, content in kept.items():
            path.write_bytes(content)
    assert not record.exists()
    study.do("plan")
    assert record.exists()


def test_runs_that_differ_are_named(study: Study) -> None:
    study.begin(planned=False)
    first, *_, last = study.runs()
    kept = (last / "ledger.json").read_text()
    (last / "ledger.json").write_text(
        kept.replace(json.loads(kept)["segments"][0]["mixture"]["corpora"]["zh_train"]["bin_sha256"], "f" * 64)
    )
    for command in COMMANDS:
        with pytest.raises(InputError, match=rf"corpus zh_train is ffffffff\.\.\. in {last.name}; .*, as in {first}:"):
            study.do(command)
    (last / "ledger.json").write_text(kept)
    rows = [json.loads(line) for line in (last / "metrics.jsonl").read_text().splitlines()]
    rows[0]["validation"]["zh"]["loss"] *= 1.05  # as the tester's other conversion had it
    (last / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(InputError, match=rf"loss of validation set zh before step 1 is 5\.25 in {last.name}; expected 5,"):
        study.do("fit")


def test_tasks_of_a_job_array_record_it_one_after_the_other(study: Study) -> None:
    """They begin at once, and each found the other's half-written file."""
    study.do("plan")
    config, record = study.config(StudyConfig), study.folder / "study" / "inputs.json"
    expected, base = record.read_text(), read_base(config)

    def task(ready: Any) -> None:
        ready.wait()
        for _ in range(25):
            record.unlink(missing_ok=True)  # as the first of them finds it
            record_inputs(config, base)

    context = multiprocessing.get_context("fork")
    ready = context.Barrier(4)
    tasks = [context.Process(target=task, args=(ready,)) for _ in range(4)]
    for process in tasks:
        process.start()
    for process in tasks:
        process.join(120)
    assert [process.exitcode for process in tasks] == [0] * len(tasks)
    record_inputs(config, base)
    assert record.read_text() == expected
    assert sorted(path.name for path in record.parent.glob("*inputs*")) == [".inputs.lock", "inputs.json"]


def test_what_was_missing_is_recorded_when_it_is_there(study: Study) -> None:
    """As where an older study was looked at on a machine without its checkpoint."""
    study.begin(planned=False)
    config, record = study.config(StudyConfig), study.folder / "study" / "inputs.json"
    (study.folder / "megatron").rename(study.folder / "away")
    record_inputs(config, read_base(config))
    assert REPLACED["megatron"] not in json.loads(record.read_text())
    (study.folder / "away").rename(study.folder / "megatron")
    study.do("plan")
    study.replace("megatron")
    with pytest.raises(InputError, match=REPLACED["megatron"]):
        study.do("plan")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"inputs\.json is not JSON .*; remove the file to have it made anew"),
        ("\x00\xff", r"inputs\.json is not JSON .*; remove the file"),
        ("[]", r"inputs\.json is \[\]; expected checksums .*; remove the file"),
        ('{"a": 1}', r"inputs\.json: a is 1; expected a text; remove the file"),
        (None, r"inputs\.json is a pipe or a device"),
    ],
)
def test_a_damaged_record_is_named(study: Study, content: str | None, message: str) -> None:
    study.begin()
    record = study.folder / "study" / "inputs.json"
    record.unlink()
    if content is None:
        os.mkfifo(record)
    else:
        record.write_text(content)
    for command in ("plan", "fit"):
        with pytest.raises(InputError, match=message):
            study.do(command)


def test_runs_know_their_start_checkpoint(study: Study) -> None:
    """Also where the study's own record is lost, or was made anew before the first of them said anything of itself."""
    study.do("plan")
    config = study.config(StudyConfig)
    names = [point.name for point in grid_points(config)]
    for name in names[:3]:
        (study.folder / "study" / "runs" / name).mkdir(parents=True)
        record_start(config, read_base(config), name)
    study.begin(planned=False)
    record_start(config, read_base(config), names[3])  # has begun, so that nobody knows
    assert not (study.folder / "study" / "runs" / names[3] / "inputs.json").exists()
    (study.folder / "study" / "inputs.json").unlink()
    kept = {path: path.read_bytes() for path in (study.folder / "megatron").rglob("*") if path.is_file()}
    study.replace("megatron")
    with pytest.raises(InputError, match=rf"{REPLACED['megatron']} .* is .*; expected .*, as in .*runs/{names[0]}: results"):
        study.do("plan")
    path = study.folder / "study" / "runs" / names[1] / "inputs.json"
    before = path.read_text()
    shutil.rmtree(path.parent)
    path.parent.mkdir()
    record_start(config, read_base(config), names[1])  # as a task that began beside the first
    assert path.read_text() != before
    shutil.rmtree(study.folder / "megatron")
    for file, content in kept.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    (path.parent / "metrics.jsonl").write_text((study.runs()[0] / "metrics.jsonl").read_text())
    with pytest.raises(InputError, match=rf"{REPLACED['megatron']} is .* in {names[1]}; .*Remove these runs"):
        study.do("plan")


def test_until_a_run_has_begun_all_may_be_replaced(study: Study) -> None:
    study.do("plan")
    record = study.folder / "study" / "inputs.json"
    before = json.loads(record.read_text())
    for name in REPLACED:
        study.replace(name)
    study.do("plan")
    after = json.loads(record.read_text())
    assert [what for what in before if before[what] != after[what] and what in REPLACED.values()] == list(REPLACED.values())


def test_what_is_not_there_any_more_does_not_hinder_a_fit(study: Study) -> None:
    study.begin()
    shutil.rmtree(study.folder / "megatron")
    os.remove(study.folder / "zh_train.bin")
    assert study.do("fit").endswith("fit.json")


def test_the_same_weights_converted_again_are_the_same(study: Study) -> None:
    study.begin()
    shutil.rmtree(study.folder / "megatron")
    hf_to_megatron(HfToMegatron(str(study.folder / "hf"), str(study.folder / "megatron")))
    study.do("plan")


def test_checkpoints_without_checksums_are_told_apart(study: Study) -> None:
    folders = [study.folder / part / "release" for part in ("megatron", "other/megatron", "same")]
    shutil.copytree(folders[0], folders[2])
    for folder in folders:
        (folder / "manifest.json").unlink()
    ours, other, same = (checkpoint_checksum(str(folder)) for folder in folders)
    assert ours == same != other
