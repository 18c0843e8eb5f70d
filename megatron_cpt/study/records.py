"""What lies in a study's folder, read with care: a file that is damaged or is not what a run writes is named in one line."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from typing import Any

from megatron_cpt.training.metrics_file import METRICS, read_metrics
from megatron_cpt.utils.errors import InputError
from megatron_cpt.utils.input_files import check_plain_file

LEDGER = "ledger.json"
KINDS = {dict: "a mapping", list: "a list", str: "a text", int: "a whole number", bool: "true or false", float: "a number"}


def read_record_file(path: str, kind: type, what: str) -> Any:
    """The content of a JSON file: a mapping or a list, as `kind` says.

    Raises:
        InputError: it cannot be read, or holds something else; `what` says what it should be
    """
    check_plain_file(path, path)
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}; expected {what}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON ({error}); expected {what}") from error
    return of_kind(content, kind, path, what)


def of_kind(value: Any, kind: type, where: str, what: str) -> Any:
    """The value, if it is of this kind.

    Raises:
        InputError: it is not; `where` names the file and the field, `what` says what it should be
    """
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise InputError(f"{where} is {described(value)}; expected {what}")
    return value


def checked_number(value: Any, where: str, what: str = "a number") -> float:
    """The value, if it is a number.

    Raises:
        InputError: it is not
    """
    if not is_number(value):
        raise InputError(f"{where} is {described(value)}; expected {what}")
    return float(value)


def described(value: Any) -> str:
    """A value in an error: short ones as they are."""
    if value is None:
        return "missing or null"
    text = repr(value)
    return text if len(text) <= 40 else f"{KINDS.get(type(value), type(value).__name__)} ({text[:40]}...)"


def is_number(value: Any) -> bool:
    """JSON as Python reads it has NaN and Infinity, too, and whole numbers that are too large for a float."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def has_begun(folder: str) -> bool:
    """Whether the run of this folder has written anything about itself."""
    return any(os.path.exists(os.path.join(folder, name)) for name in (LEDGER, METRICS, "outcome.json"))


def read_ledger(folder: str) -> dict[str, Any]:
    """A run's ledger.json.

    Raises:
        InputError: it has not the rows of corpora with their languages, or not the run's length
    """
    path = os.path.join(folder, LEDGER)
    ledger: dict[str, Any] = read_record_file(path, dict, "the ledger of a run")
    planned = of_kind(ledger.get("planned"), dict, f"{path}: planned", "a mapping with rows")
    for name in ("samples", "seq_length"):
        of_kind(planned.get(name), int, f"{path}: planned.{name}", "a whole number")
    for i, row in enumerate(of_kind(planned.get("rows"), list, f"{path}: planned.rows", "a list of corpora")):
        of_kind(row, dict, f"{path}: planned.rows.{i}", "a mapping with group and language")
        for name in ("group", "language"):
            of_kind(row.get(name), str, f"{path}: planned.rows.{i}.{name}", "a text")
    return ledger


def general_languages(ledger: dict[str, Any]) -> set[str]:
    """Languages of the general corpora that a run reads."""
    return {row["language"] for row in ledger["planned"]["rows"] if row["group"] == "general"}


def ledger_corpora(ledger: dict[str, Any], path: str) -> Iterator[tuple[str, str]]:
    """Name and bin_sha256 of each corpus that a run was given, in each part of it; none of a run of an early version.

    Raises:
        InputError: `path`, the ledger, has something else there
    """
    for i, segment in enumerate(of_kind(ledger.get("segments", []), list, f"{path}: segments", "a list")):
        where = f"{path}: segments.{i}"
        of_kind(segment, dict, where, "a mapping with a mixture")
        mixture = of_kind(segment.get("mixture"), dict, f"{where}.mixture", "a mapping with corpora")
        for name, corpus in of_kind(mixture.get("corpora"), dict, f"{where}.mixture.corpora", "corpora by name").items():
            at = f"{where}.mixture.corpora.{name}"
            of_kind(corpus, dict, at, "a mapping with bin_sha256")
            yield name, of_kind(corpus.get("bin_sha256"), str, f"{at}.bin_sha256", "a text")


def planned_tokens(ledger: dict[str, Any]) -> int:
    """Of a run, when it is over."""
    return int(ledger["planned"]["samples"] * ledger["planned"]["seq_length"])


def read_run_metrics(folder: str) -> list[dict[str, Any]]:
    """All rows of a run's metrics.jsonl that can be read; those of steps have loss and seconds, those of evaluations figures
    of every validation set.

    Raises:
        InputError: a row has something else there
    """
    path = os.path.join(folder, METRICS)
    try:
        rows = read_metrics(folder)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}; expected a line for each step") from error
    for row in rows:
        check_row(row, f"{path}: step {row['iteration']}")
    return rows


def check_row(row: dict[str, Any], where: str) -> None:
    """Raise InputError unless this is a row of a step or of an evaluation. A loss may be null: it was not finite."""
    if "loss" in row:
        number_or_none(row["loss"], f"{where}: loss")
        checked_number(row.get("seconds"), f"{where}: seconds")
    if "consumed_tokens" in row:
        of_kind(row["consumed_tokens"], int, f"{where}: consumed_tokens", "a whole number")
    if "validation" not in row:
        return
    sets = of_kind(row["validation"], dict, f"{where}: validation", "a mapping of validation sets")
    if not sets:
        raise InputError(f"{where}: validation is empty; expected a mapping of validation sets")
    for name, figures in sets.items():
        at = f"{where}: validation.{name}"
        of_kind(figures, dict, at, "a mapping with language, loss and bits_per_byte")
        of_kind(figures.get("language"), str, f"{at}.language", "a text")
        for figure in ("loss", "bits_per_byte"):
            number_or_none(figures.get(figure, "missing"), f"{at}.{figure}")


def number_or_none(value: Any, where: str) -> float | None:
    """`checked_number`, or null."""
    return None if value is None else checked_number(value, where, "a number or null")
