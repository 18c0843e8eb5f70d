"""Results of several models side by side, as the paper lays them out: a model in each row."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_cpt.evaluation.columns import Column, Measured, score_columns


def evaluation_markdown(measured: Measured) -> str:
    """Tables of benchmarks, bits per byte and language of the answers; what is missing, and why."""
    parts = []
    benchmarks = score_columns(measured, "benchmarks")
    if benchmarks:
        parts += [models_table(measured, benchmarks), settings_table(measured), *missing_lines(measured)]
    languages = [*score_columns(measured, "text"), *score_columns(measured, "answers")]
    if languages:
        parts += [models_table(measured, languages), *shares_missing(measured)]
    parts += answers_cut_off(measured)
    return "\n\n".join(parts) + "\n"


def models_table(measured: Measured, columns: Sequence[Column]) -> str:
    """A model in each row."""
    rows = [[name, *(column.shown(column.number(parts)) for column in columns)] for name, parts in measured.items()]
    return markdown_table(["model", *(column.label for column in columns)], rows)


def settings_table(measured: Measured) -> str:
    """How each benchmark was measured: those of one that no model has a score of are what was wanted."""
    found: dict[str, list[str]] = {}
    for result in measured.values():
        for name, score in result.get("benchmarks", {}).items():
            if name not in found or score["value"] is not None:
                shots = "-" if score["num_fewshot"] is None else str(score["num_fewshot"])
                found[name] = [name, score["task"], score["metric"], shots, str(score["samples"])]
    return markdown_table(["benchmark", "task", "metric", "few-shot", "questions"], list(found.values()))


def missing_lines(measured: Measured) -> list[str]:
    """Why a benchmark has no score, once for all models it holds for."""
    reasons = {
        (name, score["missing"])
        for result in measured.values()
        for name, score in result.get("benchmarks", {}).items()
        if score["missing"]
    }
    return ["\n".join(f"- {name}: not measured, {reason}" for name, reason in sorted(reasons))] if reasons else []


def shares_missing(measured: Measured) -> list[str]:
    """Why there is no share of a language, for each model without."""
    lines = [
        f"- {model}, %{language}: {share['missing']}"
        for model, parts in measured.items()
        for language, share in parts.get("answers", {}).items()
        if share.get("missing")
    ]
    return ["\n".join(lines)] if lines else []


def answers_cut_off(measured: Measured) -> list[str]:
    """How many answers have reached max_new_tokens without an end: their rest is not seen by any measure or judge."""
    lines = []
    for model, parts in measured.items():
        asked = {f"%{language}": share.get("answers", []) for language, share in parts.get("answers", {}).items()}
        asked |= {f"{name}, for the judge": answers for name, answers in parts.get("pairwise", {}).items()}
        for name, answers in asked.items():
            if number := sum(bool(answer.get("cut_off")) for answer in answers):
                lines.append(f"- {model}, {name}: {number} of {len(answers)} are cut off at max_new_tokens")
    return ["\n".join(lines)] if lines else []


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """In Markdown, with columns as wide as what is in them."""
    lines = [header, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    padded = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    ]
    return "\n".join([padded[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *padded[1:]])
