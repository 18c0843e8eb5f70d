"""What all runs of a study read and begin with: one text of each corpus and validation set, one start checkpoint.

Configurations name paths, and what lies there can be replaced. So a study records it in FOLDER/inputs.json when it begins,
and each run its start checkpoint in an inputs.json of its own. These, and what runs say of themselves, are compared with
what lies there now before anything is computed or fitted. Checksums that the files beside them state are taken: no corpus
and no tensor is read.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_cpt.checkpoint.checksums import TENSORS, checksums_in
from megatron_cpt.checkpoint.layout import find_checkpoint, read_manifest
from megatron_cpt.mixture.file import load_mixture
from megatron_cpt.study.config import StudyConfig
from megatron_cpt.study.grid import Base
from megatron_cpt.study.records import (
    LEDGER,
    has_begun,
    ledger_corpora,
    of_kind,
    read_ledger,
    read_record_file,
    read_run_metrics,
)
from megatron_cpt.training.baseline import measurements
from megatron_cpt.utils.errors import InputError
from megatron_cpt.utils.files import write_json
from megatron_cpt.utils.lock import open_lock, wait_for

INPUTS, LOCK = "inputs.json", ".inputs.lock"
START_CHECKPOINT = "checksum of checkpoint.load"
SAME_LOSS = 0.005  # relative: how far layouts and devices move the loss of one checkpoint on one text
PIECE_BYTES = 1 << 20  # read in the middle of each file with tensors that has no checksum

Known = Mapping[str, tuple[Any, str]]
"""what -> (its value, the file or run that says so)"""


def check_inputs(study: StudyConfig, base: Base) -> None:
    """Compare what lies there with what the study has begun with, and its runs with each other. What is missing now is not
    compared: a fit does not need it, and a run says so itself.

    Raises:
        InputError: something was replaced: results would not belong together
    """
    if not is_under_way(study.folder):
        return
    of_runs = {name: list(facts_of_run(study.folder, name)) for name in begun_runs(study.folder)}
    known = {what: (value, os.path.join(study.folder, INPUTS)) for what, value in read_record(study.folder).items()}
    for name, facts in of_runs.items():
        for what, value in facts:
            known.setdefault(what, (value, os.path.join(study.folder, "runs", name)))
    check_replaced(study.folder, base, known)
    check_same_inputs(study.folder, of_runs, known)


def check_replaced(folder: str, base: Base, known: Known) -> None:
    """Raise InputError if what lies there now is not what the study in a folder has begun with."""
    for what, found in facts_now(base).items():
        wanted, where = known.get(what, (found, ""))
        if differ(wanted, found):
            which = f"{what} ({base.config.checkpoint.load})" if what == START_CHECKPOINT else what
            raise InputError(
                f"study {folder}: {which} is {short(found)}; expected {short(wanted)}, as in {where}: results "
                "would not belong together. Put back what was there, or use another folder for another study"
            )


def check_same_inputs(folder: str, of_runs: Mapping[str, Sequence[tuple[str, Any]]], known: Known) -> None:
    """Raise InputError if runs, of which each says (what, value), have not read what the study in a folder began with."""
    for what, (wanted, where) in known.items():
        odd = {
            name: value for name, facts in of_runs.items() for own, value in facts if own == what and differ(wanted, value)
        }
        if odd:
            names, found = ", ".join(odd), short(next(iter(odd.values())))
            raise InputError(
                f"study {folder}: {what} is {found} in {names}; expected {short(wanted)}, as in {where}: results do "
                f"not belong together. Remove these runs from {os.path.join(folder, 'runs')} and scores to repeat them"
            )


def record_inputs(study: StudyConfig, base: Base) -> None:
    """Write down what lies there now, which `check_inputs` has seen. Of a study that is under way, what it has not recorded
    yet: something may have been missing. The tasks of a job array, which begin at once, do so one after the other.
    """
    os.makedirs(study.folder, exist_ok=True)
    with open_lock(os.path.join(study.folder, LOCK)) as file:
        wait_for(file)
        known = read_record(study.folder) if is_under_way(study.folder) else {}
        now = facts_now(base) | known
        if now != known:
            write_json(os.path.join(study.folder, INPUTS), now)


def record_start(study: StudyConfig, base: Base, run: str) -> None:
    """Have a run that begins now know its start checkpoint: its own records tell nothing of it but losses, and others may
    have begun with another one before the study knew of either.
    """
    folder = os.path.join(study.folder, "runs", run)
    if has_begun(folder):
        return
    now = facts_now(base)
    write_json(os.path.join(folder, INPUTS), {what: now[what] for what in (START_CHECKPOINT,) if what in now})


def read_record(folder: str) -> dict[str, str]:
    """What the inputs.json of a study, or of one of its runs, says; empty: an earlier version has begun it.

    Raises:
        InputError: it is damaged
    """
    path = os.path.join(folder, INPUTS)
    if not os.path.exists(path):
        return {}
    repeat = "remove the file to have it made anew of what lies there now"
    found = read_record_file(path, dict, f"checksums of what the study's runs read; {repeat}")
    return {what: of_kind(value, str, f"{path}: {what}", f"a text; {repeat}") for what, value in found.items()}


def begun_runs(folder: str) -> list[str]:
    """Names of the runs that have begun, also of those that are not asked for now."""
    runs = os.path.join(folder, "runs")
    names = sorted(os.listdir(runs)) if os.path.isdir(runs) else []
    return [name for name in names if not name.startswith(".") and has_begun(os.path.join(runs, name))]


def is_under_way(folder: str) -> bool:
    """Whether a study has results, which others have to belong to: of runs, or scores of the start."""
    return bool(begun_runs(folder)) or any(Path(folder, "scores").glob("*/*.json"))


def facts_of_run(folder: str, name: str) -> Iterator[tuple[str, Any]]:
    """(what, value) of one run: of its corpora, of each evaluation, and the losses that it began with."""
    run = os.path.join(folder, "runs", name)
    yield from read_record(run).items()
    if os.path.exists(os.path.join(run, LEDGER)):
        for corpus, sha256 in ledger_corpora(read_ledger(run), os.path.join(run, LEDGER)):
            yield of_corpus(corpus), sha256
    evaluations = [row for row in read_run_metrics(run) if "validation" in row]
    facts: dict[tuple[str, Any], None] = {}  # in their order, each once
    for row in evaluations:
        for validation, figures in row["validation"].items():
            how = figures.get("measurement")  # older runs do not say
            facts |= (
                {(of_set(field, validation), str(value)): None for field, value in how.items()}
                if isinstance(how, dict)
                else {}
            )
    yield from facts
    for row in evaluations:
        if row["iteration"] == 0:
            for validation, figures in row["validation"].items():
                if figures["loss"] is not None:
                    yield f"loss of validation set {validation} before step 1", float(figures["loss"])


def facts_now(base: Base) -> dict[str, str]:
    """what -> value of all that can be read of what lies there."""
    facts: dict[str, str] = {}
    with contextlib.suppress(InputError):
        mixture = load_mixture(base.config.mixture)
        facts |= {of_corpus(corpus.name): corpus.manifest.files["bin"].sha256 for corpus in mixture.corpora}
        for how in measurements(mixture, base.config):
            facts |= {of_set(field, how.name): str(value) for field, value in asdict(how).items()}
    with contextlib.suppress(InputError):
        facts[START_CHECKPOINT] = checkpoint_checksum(find_checkpoint(base.config.checkpoint.load))
    return facts


def of_corpus(name: str) -> str:
    """What is compared of a corpus."""
    return f"bin_sha256 of corpus {name}"


def of_set(field: str, name: str) -> str:
    """What is compared of a validation set: each field of training/baseline.py's Measurement."""
    return f"{field} of validation set {name}"


def checkpoint_checksum(folder: str) -> str:
    """Of the checksums of a checkpoint's weights and model configuration, in its manifest.json: a conversion of the same
    weights has the same. Of one without checksums, of sizes and a piece of each file with tensors.
    """
    manifest = os.path.join(folder, "manifest.json")
    checksums = checksums_in(read_manifest(manifest)) if os.path.exists(manifest) else {}
    stated = {name: value for name, value in checksums.items() if name.endswith(TENSORS) or name == "hf/config.json"}
    files = sorted(entry for entry in os.listdir(folder) if entry.endswith(TENSORS))
    content = stated or {entry: piece_checksum(os.path.join(folder, entry)) for entry in files}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def piece_checksum(path: str) -> str:
    """Of a file's size and of its middle."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        file.seek(max(0, size - PIECE_BYTES) // 2)
        return f"{size} {hashlib.sha256(file.read(PIECE_BYTES)).hexdigest()}"


def differ(wanted: Any, found: Any) -> bool:
    """Whether two values are not those of one study."""
    if isinstance(wanted, float) and isinstance(found, float):
        return not math.isclose(wanted, found, rel_tol=SAME_LOSS)
    return bool(wanted != found)


def short(value: Any) -> str:
    """A number, or the beginning of a checksum."""
    if isinstance(value, float):
        return f"{value:.6g}"
    text = value if value.isprintable() else repr(value)
    return text if len(text) < 20 else f"{text[:8]}..."
