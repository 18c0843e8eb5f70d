"""The runs of a study: one for each ALMR, learning rate and seed, each an ordinary run of tools/pretrain_cpt.py."""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import yaml

from megatron_cpt.checkpoint.folders import missing_parents, remove_empty
from megatron_cpt.config.fields import config_from
from megatron_cpt.config.renamed import current_names
from megatron_cpt.config.require import require
from megatron_cpt.config.run import RunConfig
from megatron_cpt.study.config import StudyConfig
from megatron_cpt.study.records import checked_number, has_begun, of_kind, read_record_file
from megatron_cpt.utils.errors import InputError, Refusals
from megatron_cpt.utils.files import write_json, write_text
from megatron_cpt.utils.input_files import load_yaml, plain_number, shown, why_unwritable

PROPOSED = "proposed.json"


@dataclass(frozen=True, order=True)
class GridPoint:
    """One run."""

    seed: int
    almr: float
    lr: float

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"almr{self.almr:g}_lr{self.lr:g}_seed{self.seed}"


def grid_points(study: StudyConfig, proposed: Sequence[tuple[float, float]] | None = None) -> list[GridPoint]:
    """All runs: the grid, or the pairs of it to begin with, and what was proposed beside it, seed by seed, so that one seed
    is whole before the next begins.

    `proposed`: instead of what `plan --adaptive` has written. Of either, what is within the studied ranges.

    Raises:
        InputError: two runs would have the same name
    """
    pairs = grid(study)
    beside = read_proposed(study.folder) if proposed is None else proposed
    pairs = list(dict.fromkeys([*pairs, *(pair for pair in beside if study.covers(pair))]))  # each once
    found = [GridPoint(seed, almr, lr) for seed in study.seeds for almr, lr in pairs]
    names = [point.name for point in found]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"two runs have the name {name}: values of almr or lr that agree in six digits; use others")
    return found


def grid(study: StudyConfig) -> list[tuple[float, float]]:
    """(ALMR, LR) pairs that are not proposals: all, or `starting_pairs` of them.

    These are the corners, and then always the one that is farthest from those before (in coordinates in which each axis goes
    from 0 to 1): more of them include the fewer, and runs that were done belong to the whole grid, too.
    """
    pairs = [(almr, lr) for almr in study.almr for lr in study.rates]
    if study.starting_pairs is None:
        return pairs
    shares, rates = np.array(pairs).T
    at = np.stack([unit(shares), unit(np.log(rates))], axis=-1)
    corners = np.array([(u, v) for u in (0.0, 1.0) for v in (0.0, 1.0)])
    chosen = list(dict.fromkeys(int(np.linalg.norm(at - corner, axis=1).argmin()) for corner in corners))
    while len(chosen) < study.starting_pairs:
        distances = np.linalg.norm(at[:, None] - at[chosen][None], axis=-1).min(axis=1)
        chosen.append(int(distances.argmax()))
    return [pairs[i] for i in sorted(chosen[: study.starting_pairs])]


def unit(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """From 0 to 1; 0 where they are all the same."""
    return (values - values.min()) / (np.ptp(values) or 1.0)


def read_proposed(folder: str) -> list[tuple[float, float]]:
    """(ALMR, LR) pairs that `plan --adaptive` has added to the grid."""
    path = os.path.join(folder, PROPOSED)
    if not os.path.exists(path):
        return []
    found = read_record_file(path, list, "a list of almr and lr")
    for i, pair in enumerate(found):
        of_kind(pair, dict, f"{path}: {i}", "almr and lr")
        almr, lr = (checked_number(pair.get(name), f"{path}: {i}.{name}") for name in ("almr", "lr"))
        if not (0 <= almr <= 1 and lr > 0):
            raise InputError(f"{path}: {i} is almr {almr:g}, lr {lr:g}; expected an almr from 0 to 1 and an lr above 0")
    return [(float(pair["almr"]), float(pair["lr"])) for pair in found]


def write_proposed(folder: str, pairs: list[tuple[float, float]]) -> str:
    """Replace the list of pairs; returns its path."""
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, PROPOSED)
    write_json(path, [{"almr": almr, "lr": lr} for almr, lr in pairs])
    return path


@dataclass(frozen=True)
class Base:
    """What every run follows.

    Attributes:
        fields: of the base configuration, as given
        mixture: fields of the mixture file, its prefixes absolute
        config: the base configuration, checked
    """

    fields: Mapping[str, Any]
    mixture: Mapping[str, Any]
    config: RunConfig


def read_base(study: StudyConfig) -> Base:
    """Read and check what every run follows.

    Raises:
        InputError: the configuration or the mixture is not one that a study can vary, or the study's folder can be none
    """
    refusals = Refusals()
    with refusals.noted():
        check_study_folder(study.folder)
    with refusals.noted():
        fields = read_fields(study.base)
    refusals.raise_any()
    complete_base(fields, study.base, study.folder, study.train_tokens)
    config = parse_run_config(fields, study.base)
    mixture = load_yaml(config.mixture, "mixture file", plain_number)
    check_one_almr(config.mixture, mixture)
    return Base(fields, absolute(mixture, os.path.dirname(os.path.abspath(config.mixture))), config)


def complete_base(fields: dict[str, Any], where: str, folder: str, train_tokens: int) -> None:
    """Give a base configuration what every run has of its own, where it has none.

    Raises:
        InputError: its sections are none; `where` names it
    """
    checkpoint, training = fields.setdefault("checkpoint", {}), fields.setdefault("training", {})
    for name, section in (("checkpoint", checkpoint), ("training", training)):
        require(isinstance(section, dict), f"{where}: {name}", shown(section), "a section with fields")
    checkpoint.setdefault("save", folder)  # replaced in every run, as is the length
    if not any(name in training for name in ("train_iters", "train_samples", "train_tokens")):
        training["train_tokens"] = train_tokens


def check_one_almr(path: str, mixture: Mapping[str, Any]) -> None:
    """Raise InputError unless a study can vary the ALMR of a mixture."""
    if "stages" in mixture or not isinstance(mixture.get("almr"), (int, float)):
        raise InputError(f"{path}: a study varies one almr; expected a mixture without stages whose almr is a number")


def check_no_stages(path: str, mixture: Mapping[str, Any]) -> None:
    """Raise InputError unless a mixture can be given the one ALMR that was chosen."""
    if "stages" in mixture:
        raise InputError(f"{path}: a mixture with stages has more than one almr; expected one without")


def check_study_folder(folder: str) -> None:
    """Raise InputError unless the study's folder is one or can become one."""
    why = why_unwritable(folder)
    require(why is None, "folder", folder, f"a folder to write to, or a name for a new one ({why})")


def read_fields(path: str, notes: list[str] | None = None) -> dict[str, Any]:
    """What a configuration of a run (or a mixture) says, unchecked, by the names of today; empty sections are left out.

    `notes`: gets what is to be said of old names. Of what a study has written, which may be of the last release, nothing is.

    Raises:
        InputError: it cannot be read, or is not YAML with fields, or has one by both names
    """
    fields = load_yaml(path, "configuration", plain_number)
    given = {name: value for name, value in fields.items() if value is not None}
    return current_names(RunConfig, given, f"{path}: ", notes)


def parse_run_config(fields: Mapping[str, Any], where: str) -> RunConfig:
    """A checked configuration of a training run."""
    return config_from(RunConfig, fields, where)


def absolute(fields: Any, folder: str) -> Any:
    """The same with every `prefix` in it absolute."""
    if isinstance(fields, list):
        return [absolute(entry, folder) for entry in fields]
    if not isinstance(fields, dict):
        return fields
    return {
        name: os.path.normpath(os.path.join(folder, value)) if name == "prefix" else absolute(value, folder)
        for name, value in fields.items()
    }


def run_fields(study: StudyConfig, base: Base, point: GridPoint) -> dict[str, Any]:
    """The configuration of one run."""
    fields = copy.deepcopy(dict(base.fields))
    optimizer = base.config.optimizer
    fields["mixture"] = mixture_path(study.folder, point)
    fields["checkpoint"] = fields["checkpoint"] | {"save": run_folder(study.folder, point)}
    training = {
        name: value
        for name, value in fields["training"].items()
        if name not in ("train_iters", "train_samples", "extend_to")
    }
    fields["training"] = training | {"train_tokens": study.train_tokens, "seed": point.seed}
    min_lr = point.lr * (optimizer.min_lr / optimizer.lr)
    fields["optimizer"] = fields.get("optimizer", {}) | {"lr": point.lr, "min_lr": min_lr}
    fields["logging"] = {"report": False} | fields.get("logging", {})
    return fields


def run_folder(folder: str, point: GridPoint) -> str:
    """Where a run's checkpoints and metrics are."""
    return os.path.join(folder, "runs", point.name)


def config_path(folder: str, point: GridPoint) -> str:
    """Its configuration."""
    return os.path.join(folder, "configs", f"{point.name}.yaml")


def mixture_path(folder: str, point: GridPoint) -> str:
    """Its mixture."""
    return os.path.join(folder, "configs", f"{point.name}.mixture.yaml")


def write_configuration(study: StudyConfig, base: Base, point: GridPoint) -> str:
    """Write what a run reads; returns the path of its configuration.

    Raises:
        InputError: see `check_same_study`
    """
    check_same_study(study, base, point)
    os.makedirs(os.path.join(study.folder, "configs"), exist_ok=True)
    for path, fields in configuration(study, base, point).items():
        text = yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)
        if not os.path.exists(path) or read_fields(path) != fields:
            write_text(path, text)
    return config_path(study.folder, point)


@contextlib.contextmanager
def written_configurations(study: StudyConfig, base: Base, points: Sequence[GridPoint]) -> Iterator[None]:
    """Write what runs read; where the block refuses the study, no file stays that was not there before.

    Raises:
        InputError: see `check_same_study`
    """
    new = [path for point in points for path in configuration(study, base, point) if not os.path.exists(path)]
    made = missing_parents(os.path.join(os.path.abspath(study.folder), "configs", ""))
    try:
        for point in points:
            write_configuration(study, base, point)
        yield
    except InputError:
        for path in new:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
        remove_empty(made)
        raise


def configuration(study: StudyConfig, base: Base, point: GridPoint) -> dict[str, dict[str, Any]]:
    """path -> content of the files that a run reads."""
    mixture = dict(base.mixture) | {"almr": point.almr, "seed": point.seed}
    return {config_path(study.folder, point): run_fields(study, base, point), mixture_path(study.folder, point): mixture}


def check_same_study(study: StudyConfig, base: Base, point: GridPoint) -> None:
    """Raise InputError where a run was begun with another configuration: its results would not belong to this study.

    Names of its own files may differ: the study's folder can be moved.
    """
    folder = run_folder(study.folder, point)
    if not has_begun(folder):
        return
    for path, fields in configuration(study, base, point).items():
        repeat = f"use another folder, or remove {path} and {folder} to repeat it"
        if not os.path.exists(path):
            raise InputError(f"{path} is missing, so that {folder} may be a run of another study; {repeat}")
        old = without_own_paths(read_fields(path))
        different = first_field_difference(old, without_own_paths(fields))
        if different is not None:
            name, before, now = different
            raise InputError(
                f"{path}: {name} is {before}, {study.base} and the study ask for {now}; its run has begun: {repeat}"
            )


def without_own_paths(fields: Mapping[str, Any]) -> dict[str, Any]:
    """A run's configuration without the paths within the study's folder; a mixture as it is."""
    left = {name: value for name, value in fields.items() if name != "mixture"}
    if isinstance(left.get("checkpoint"), dict):
        left["checkpoint"] = {name: value for name, value in left["checkpoint"].items() if name != "save"}
    return left


def first_field_difference(old: Any, new: Any, name: str = "") -> tuple[str, Any, Any] | None:
    """The name of the first field that differs, with both values; paths are alike where they lead to the same place."""
    if isinstance(old, dict) and isinstance(new, dict):
        pairs = [(key, old.get(key), new.get(key)) for key in dict.fromkeys([*old, *new])]
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = [(str(i), before, now) for i, (before, now) in enumerate(zip(old, new, strict=True))]
    elif old == new or (name.endswith((".prefix", ".load")) and os.path.realpath(str(old)) == os.path.realpath(str(new))):
        return None
    else:
        return name, old, new
    found = (first_field_difference(before, now, f"{name}.{key}".lstrip(".")) for key, before, now in pairs)
    return next((different for different in found if different is not None), None)
