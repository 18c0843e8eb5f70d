"""A study's folder that is damaged, moved, or another study's."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from study_folders import TOKENS, write_base, write_folder
from study_results import make_results

from megatron_cpt.study.choose import read_choice
from megatron_cpt.study.commands import choose_command, fit_command, plot
from megatron_cpt.study.config import StudyConfig
from megatron_cpt.study.grid import (
    Base,
    grid_points,
    read_base,
    read_proposed,
    run_folder,
    write_configuration,
    write_proposed,
)
from megatron_cpt.study.local_executor import read_status, training_seconds
from megatron_cpt.study.results import collect
from megatron_cpt.study.run_files import read_base_partly
from megatron_cpt.study.settings import ChooseOptions, FitOptions, PlotOptions
from megatron_cpt.utils.errors import InputError, InputErrors, Refusals

CHOICE = {"almr": 0.5, "lr": 1e-3, "almr_interval": [0.4, 0.6], "lr_interval": None, "max_general_rise": 0.01}
NAME = "almr0_lr0.0001_seed1"


@pytest.fixture
def study(tmp_path: Path) -> StudyConfig:
    """2 x 2 runs."""
    return make_study(tmp_path, almrs=(0.0, 1.0), rates=(1e-4, 1e-3))


def make_study(folder: Path, **changes: Any) -> StudyConfig:
    """Of one seed, with scores, a proposal and a choice."""
    found = write_folder(folder, make_results(lambda almr, lr: almr, seeds=1, **changes))
    write_proposed(found.folder, [(0.5, 3e-4)])
    Path(found.folder, "choice.json").write_text(json.dumps(CHOICE | {"reason": "the best", "notes": ["one"]}))
    return found


def read_all(study: StudyConfig, base: Base | None = None) -> None:
    """Everything that the commands read of a folder."""
    base = base or read_base(study)
    for point in grid_points(study):
        write_configuration(study, base, point)
        read_status(run_folder(study.folder, point))
        training_seconds(run_folder(study.folder, point))
    collect(study, base)
    read_proposed(study.folder)
    read_choice(study.folder)


def wrong_values(content: Any) -> Iterator[Any]:
    """The same with one value, somewhere, replaced by another kind, or with one left out."""
    if isinstance(content, (dict, list)):
        for key in content if isinstance(content, dict) else range(len(content)):
            for value in wrong_values(content[key]):
                changed = content.copy()
                changed[key] = value
                yield changed
            yield {k: v for k, v in content.items() if k != key} if isinstance(content, dict) else content[:key]
    yield from (None, ["a"], {"a": "b"}, "banana", 10**400, float("nan"))


def spoiled(text: str, name: str) -> Iterator[bytes]:
    """Damages of a file."""
    yield from (b"", b"[]", b"{}", b"null", b"3", b'"text"', b"\xff\xfe{", b"[" * 5_000, text[: len(text) // 2].encode())
    if name.endswith(".json"):
        yield from (json.dumps(value).encode() for value in wrong_values(json.loads(text)))
    if name.endswith(".jsonl"):
        lines = text.splitlines()
        for i in (0, 1, 2, len(lines) - 1):
            for value in wrong_values(json.loads(lines[i])):
                yield "\n".join([*lines[:i], json.dumps(value), *lines[i + 1 :], ""]).encode()


def refusal(study: StudyConfig, base: Base) -> str | None:
    """What is said of the folder; None: nothing is wrong with it."""
    try:
        read_all(study, base)
    except InputError as error:
        return str(error)
    return None


def test_a_study_of_the_last_release(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What its runs were given has the old names, as the base may have; new configurations have those of today."""
    study = make_study(tmp_path, almrs=(0.0, 1.0), rates=(1e-4,))
    old, new = {"trouble": {"rerun_rejected_steps": True}}, {"loss_spikes": {"rerun_skipped_steps": True}}
    base = Path(study.base)
    base.write_text(yaml.safe_dump(yaml.safe_load(base.read_text()) | old))
    configs = [path for path in Path(study.folder, "configs").glob("*.yaml") if ".mixture." not in path.name]
    assert len(configs) == 2
    configs[0].write_text(yaml.safe_dump(yaml.safe_load(configs[0].read_text()) | old))
    shutil.rmtree(Path(study.folder, "runs", configs[1].stem))
    read_all(study)
    assert [old.keys() & yaml.safe_load(path.read_text()).keys() for path in configs] == [{"trouble"}, set()]
    assert new.items() <= yaml.safe_load(configs[1].read_text()).items()
    capsys.readouterr()
    read_base_partly(study.base, Refusals())
    notes = capsys.readouterr().err.splitlines()
    assert [note.split(";")[0] for note in notes] == [
        f"note: {base}: trouble is now called loss_spikes",
        f"note: {base}: loss_spikes.rerun_rejected_steps is now called loss_spikes.rerun_skipped_steps",
    ]


def test_whatever_is_damaged_is_named_in_one_line(tmp_path: Path) -> None:
    """Each file in turn: it is read as what it can be, or refused by its name; nothing else happens."""
    study = make_study(tmp_path, almrs=(0.0,), rates=(1e-4,), evaluations=3)
    base = read_base(study)
    read_all(study, base)
    folder = Path(study.folder)
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".jsonl", ".yaml"}
    tried = refused = 0
    for path in files:
        whole = path.read_bytes()
        before = sorted(folder.rglob("*"))
        for damage in spoiled(whole.decode(), path.name):
            path.write_bytes(damage)
            tried += 1
            message = refusal(study, base)
            if message is not None:
                refused += 1
                assert path.name in message or NAME in message, (path, damage[:200], message)
                assert "\n" not in message, (path, damage[:200])
            assert sorted(folder.rglob("*")) == before
        path.write_bytes(whole)
    read_all(study)
    assert refused > 0.5 * tried


@pytest.mark.parametrize(
    ("path", "text", "wanted"),
    [
        (f"runs/{NAME}/outcome.json", '{"kind": "banana", "seconds": 1}', "kind is 'banana'; expected finished or diverged"),
        (
            f"runs/{NAME}/outcome.json",
            '{"kind": "finished", "seconds": 1, "wall_seconds": "2"}',
            "wall_seconds is '2'; expected a",
        ),
        (f"runs/{NAME}/ledger.json", "[1]", r"ledger.json is \[1\]; expected the ledger of a run"),
        (f"runs/{NAME}/metrics.jsonl", "", "metrics.jsonl has no evaluation before step 1, though outcome.json says"),
        (
            f"runs/{NAME}/metrics.jsonl",
            '{"iteration": 0, "validation": [3]}\n',
            r"step 0: validation is \[3\]; expected a mapping",
        ),
        (f"scores/{NAME}/iter_abc.json", '{"score": 1}', "iter_abc.json is no name of scores; expected iter_ and a number"),
        (f"scores/{NAME}/iter_0000040.json", "", r"iter_0000040.json is not JSON \(.*\); expected numbers by name"),
        (f"scores/{NAME}/iter_0000040.json", '{"general": 1}', "a score has the name general, which is a column"),
        ("choice.json", "[]", r"choice.json is \[\]; expected a choice"),
        ("choice.json", '{"almr": "half"}', "choice.json: almr is 'half'; expected a number"),
        ("proposed.json", '[{"almr": 0.5}]', "proposed.json: 0.lr is missing or null; expected a number"),
        (f"configs/{NAME}.yaml", "3", rf"configuration .*{NAME}.yaml is 3; expected fields"),
    ],
)
def test_messages(study: StudyConfig, path: str, text: str, wanted: str) -> None:
    Path(study.folder, path).write_text(text)
    with pytest.raises(InputError, match=wanted):
        read_all(study)


def test_a_lost_step_with_an_evaluation_is_noticed(study: StudyConfig) -> None:
    """Otherwise nobody knows how many tokens that had read."""
    path = Path(study.folder, "runs", NAME, "metrics.jsonl")
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([lines[0], *lines[2:]]))
    with pytest.raises(
        InputError, match=r"metrics.jsonl lacks a step after which it has an evaluation, though outcome.json"
    ):
        collect(study, read_base(study))


@pytest.mark.parametrize("name", ["ledger.json", "metrics.jsonl"])
def test_files_of_a_finished_run_that_are_missing(study: StudyConfig, name: str) -> None:
    Path(study.folder, "runs", NAME, name).unlink()
    with pytest.raises(InputError, match=rf"{NAME}/{name}"):
        collect(study, read_base(study))


def test_a_lost_last_evaluation_is_noticed(study: StudyConfig) -> None:
    """Otherwise an earlier one would pass for the end of the run."""
    path = Path(study.folder, "runs", NAME, "metrics.jsonl")
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(InputError, match=rf"its last evaluation at 750,000 tokens; expected one at {TOKENS:,}"):
        collect(study, read_base(study))


COMMANDS = ((fit_command, FitOptions), (choose_command, ChooseOptions), (plot, PlotOptions))


@pytest.mark.parametrize(("command", "options"), COMMANDS)
def test_results_of_another_base_or_length_are_refused(
    study: StudyConfig, tmp_path: Path, command: Any, options: Any
) -> None:
    fields = {field.name: getattr(study, field.name) for field in dataclasses.fields(StudyConfig)}
    before = {path: path.read_bytes() for path in Path(study.folder).rglob("*") if path.is_file()}
    longer = options(**fields | {"train_tokens": 2 * TOKENS})
    with pytest.raises(InputError, match=r"training.train_tokens is 1000000, .* ask for 2000000; its run has begun"):
        command(longer)
    (tmp_path / "other").mkdir()
    other = Path(write_base(tmp_path / "other"))
    other.write_text(other.read_text().replace("load: model", "load: another"))
    with pytest.raises(InputError, match=r"checkpoint.load is model, .*other/base.yaml and the study ask for another"):
        command(options(**fields | {"base": str(other)}))
    assert {path: path.read_bytes() for path in Path(study.folder).rglob("*") if path.is_file()} == before


def test_runs_whose_configuration_is_lost_are_not_taken_for_this_study(study: StudyConfig) -> None:
    path = Path(study.folder, "configs", f"{NAME}.yaml")
    path.unlink()
    for read in (lambda: collect(study, read_base(study)), lambda: read_all(study)):
        with pytest.raises(InputError, match=rf"{NAME}.yaml is missing, so that .*{NAME} may be a run of another study"):
            read()
    assert not path.exists()


def test_a_folder_that_was_moved_goes_on(study: StudyConfig, tmp_path: Path) -> None:
    before = collect(study, read_base(study))
    moved = dataclasses.replace(study, folder=str(tmp_path / "moved"))
    os.rename(study.folder, moved.folder)
    assert collect(moved, read_base(moved)) == before
    read_all(moved)
    config = Path(moved.folder, "configs", f"{NAME}.yaml").read_text()
    assert moved.folder in config  # a run that was stopped goes on there
    assert study.folder not in config


def test_the_order_of_fields_in_the_base_does_not_matter(study: StudyConfig) -> None:
    base = Path(study.base)
    blocks = base.read_text().split("\ntraining:")
    base.write_text(f"training:{blocks[1]}{blocks[0]}\n")
    read_all(study)


def test_runs_that_measured_another_text_are_not_compared(study: StudyConfig) -> None:
    """A validation corpus was made anew between two runs: its prefix, and so the configuration, is the same."""
    for number, path in enumerate(sorted(Path(study.folder).glob("runs/*/metrics.jsonl"))):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        for row in rows:
            for name, figures in row.get("validation", {}).items():
                figures["measurement"] = {"name": name, "samples": 8, "bin_sha256": "b" if number or name == "en" else "a"}
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    wanted = rf"bin_sha256 of validation set zh is b in .*; expected a, as in .*{NAME}: .*Remove these runs"
    with pytest.raises(InputError, match=wanted):
        collect(study, read_base(study))


def test_a_missing_base_and_a_file_as_folder_are_named_together(study: StudyConfig) -> None:
    wrong = dataclasses.replace(study, base="nowhere.yaml", folder=study.base)
    with pytest.raises(InputErrors) as caught:
        read_base(wrong)
    assert [str(error).split(";")[0] for error in caught.value.errors] == [
        f"folder is {study.base}",
        "configuration nowhere.yaml: No such file or directory",
    ]
