"""Results of several models side by side, as the paper lays them out: a model in each row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def markdown(measured: Mapping[str, Mapping[str, Any]]) -> str:
    """Tables of benchmarks, bits per byte and language of the answers; what is missing, and why."""
    parts = []
    benchmarks = names_in(measured, "benchmarks")
    if benchmarks:
        rows = [
            [name, *(percent(result.get("benchmarks", {}).get(item)) for item in benchmarks)]
            for name, result in measured.items()
        ]
        parts.append(table(["model", *benchmarks], rows))
        parts.append(settings_table(measured))
        parts += missing_lines(measured)
    languages, asked = names_in(measured, "text"), names_in(measured, "answers")
    if languages or asked:
        header = ["model", *(f"bits per byte, {language}" for language in languages)]
        header += [f"%{language} by {way}" for language in asked for way in ("script", "identification")]
        rows = []
        for name, result in measured.items():
            row = [name, *(f"{result['text'][language]['bits_per_byte']:.4f}" for language in languages)]
            for language in asked:
                share = result["answers"][language]
                row += ["-" if share[way] is None else f"{share[way]:.1%}" for way in ("script", "identified")]
            rows.append(row)
        parts.append(table(header, rows))
    return "\n\n".join(parts) + "\n"


def names_in(measured: Mapping[str, Mapping[str, Any]], part: str) -> list[str]:
    """Of all models, in the order in which they come."""
    return list(dict.fromkeys(name for result in measured.values() for name in result.get(part, {})))


def percent(score: Mapping[str, Any] | None) -> str:
    """With the standard error."""
    if score is None or score["value"] is None:
        return "-"
    error = "" if score["stderr"] is None else f" ± {100 * score['stderr']:.1f}"
    return f"{100 * score['value']:.2f}{error}"


def settings_table(measured: Mapping[str, Mapping[str, Any]]) -> str:
    """How each benchmark was measured: those of one that no model has a score of are what was wanted."""
    found: dict[str, list[str]] = {}
    for result in measured.values():
        for name, score in result.get("benchmarks", {}).items():
            if name not in found or score["value"] is not None:
                shots = "-" if score["num_fewshot"] is None else str(score["num_fewshot"])
                found[name] = [name, score["task"], score["metric"], shots, str(score["samples"])]
    return table(["benchmark", "task", "metric", "few-shot", "questions"], list(found.values()))


def missing_lines(measured: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Why a benchmark has no score, once for all models it holds for."""
    reasons = {
        (name, score["missing"])
        for result in measured.values()
        for name, score in result.get("benchmarks", {}).items()
        if score["missing"]
    }
    return ["\n".join(f"- {name}: not measured, {reason}" for name, reason in sorted(reasons))] if reasons else []


def table(header: list[str], rows: list[list[str]]) -> str:
    """In Markdown, with columns as wide as what is in them."""
    lines = [header, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    padded = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    ]
    return "\n".join([padded[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *padded[1:]])
