"""The report of a run, finished or not: report.md and report.png, from what its folder says.

    python -m megatron_cpt.training.report RUN

makes them anew from run.json, metrics.jsonl and ledger.json.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_cpt.training.asked_mixture import asked_mixture
from megatron_cpt.training.metrics_file import METRICS, read_metrics
from megatron_cpt.training.progress_line import show_duration, show_figure
from megatron_cpt.training.report_figure import draw
from megatron_cpt.training.validation_table import baseline_of, change, percent, perplexity, verdict
from megatron_cpt.utils.errors import InputError
from megatron_cpt.utils.files import replacing, write_text
from megatron_cpt.utils.logs import start_logs

logger = logging.getLogger(__name__)

REPORT, FIGURE = "report.md", "report.png"
SKIPPED_NAMED = 20
MEASURED_ANEW = (
    "The run was resumed with another text under the name of a set, or measures it in another way: its figures are compared "
    "with the first of the same kind, since the step that is named, not with step 0."
)


@dataclass(frozen=True)
class Recorded:
    """What the folder of a run says.

    Attributes:
        steps: training rows of metrics.jsonl
        evaluations: its validation rows
        peak_memory_bytes: of all processes, if it was recorded
        status: status.json, {} without one
        checkpoints: names of the folders that are there now
    """

    folder: str
    run: dict[str, Any]
    ledger: dict[str, Any]
    status: dict[str, Any]
    steps: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    peak_memory_bytes: int | None
    checkpoints: list[str]


def read_run_folder(folder: str) -> Recorded:
    """Read a run's folder. InputError: a file is missing without which there is nothing to report."""
    for name in ("run.json", METRICS):
        if not os.path.exists(os.path.join(folder, name)):
            raise InputError(f"{folder} is not the folder of a run: {name} is missing")
    rows = read_metrics(folder)
    return Recorded(
        folder=folder,
        run=read_object_or_empty(os.path.join(folder, "run.json")),
        ledger=read_object_or_empty(os.path.join(folder, "ledger.json")),
        status=read_object_or_empty(os.path.join(folder, "status.json")),
        steps=[row for row in rows if "tokens_per_second" in row],
        evaluations=[row for row in rows if "validation" in row],
        peak_memory_bytes=max((row["peak_memory_bytes"] for row in rows if "peak_memory_bytes" in row), default=None),
        checkpoints=sorted(name for name in os.listdir(folder) if name.startswith("iter_")),
    )


def read_object_or_empty(path: str) -> dict[str, Any]:
    """The object in a file, {} without the file."""
    if not os.path.exists(path):
        return {}
    with open(path, encoding="utf-8") as file:
        try:
            return dict(json.load(file))
        except (ValueError, TypeError) as error:
            raise InputError(f"{path} cannot be read: {error}") from error


def write_run_report(folder: str) -> str:
    """Write report.md and report.png; returns the path of the former.

    Raises:
        InputError: the folder is not one of a run
    """
    recorded = read_run_folder(folder)
    path = os.path.join(folder, REPORT)
    resumed = [start["iteration"] for start in recorded.run.get("starts", []) if start["iteration"]]
    if recorded.steps or recorded.evaluations:
        figure = os.path.join(folder, FIGURE)
        with replacing(figure, ".png") as temporary:
            draw(recorded.steps, recorded.evaluations, resumed, temporary, asked_mixture(recorded.ledger))
    write_text(path, report_markdown(recorded))
    return path


def report_markdown(recorded: Recorded) -> str:
    """The text of the report."""
    lines = [
        f"# Run {cell(os.path.basename(os.path.abspath(recorded.folder)))}",
        "",
        *report_table(("", ""), report_facts(recorded)),
        "",
    ]
    if recorded.steps or recorded.evaluations:
        lines += [f"![curves]({FIGURE})", ""]
    if recorded.evaluations:
        lines += ["## Validation", "", *validation_section(recorded), ""]
    if recorded.steps:
        lines += ["## Data", "", *data_section(recorded), "", "## Throughput", "", *throughput_section(recorded.steps), ""]
        skipped = skipped_section(recorded.steps)
        lines += ["## Skipped steps", "", *skipped, ""] if skipped else []
    lines += ["## Hosts and versions", "", *origin_section(recorded.run), ""]
    return "\n".join(lines)


def report_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A Markdown table; columns of figures to the right."""
    rows = [list(row) for row in rows]
    figures = [bool(rows) and all(row[n][:1] in {*"0123456789+-?"} for row in rows) for n in range(len(header))]
    align = ["---:" if right else "---" for right in figures]
    return [
        f"| {' | '.join(header)} |",
        f"|{'|'.join(align)}|",
        *(f"| {' | '.join(cell(text) for text in row)} |" for row in rows),
    ]


def cell(text: str) -> str:
    """Text that does not end its cell, nor begin markup."""
    for character in "\\`*_|<":
        text = text.replace(character, "\\" + character)
    return " ".join(text.split())


def report_facts(recorded: Recorded) -> list[tuple[str, str]]:
    """The run in some lines."""
    run, steps = recorded.run, recorded.steps
    found = []
    if recorded.status:
        status = recorded.status
        reason = f": {status['reason']}" if status.get("reason") else ""
        iteration = max([status["iteration"], *(row["iteration"] for row in steps[-1:])])  # it is not written in every step
        found.append(("state", f"{status['state']} at step {iteration:,} of {status['train_iters']:,}{reason}"))
    starts = run.get("starts", [])
    origins = [start["start_from"] for start in starts if "start_from" in start] + [run.get("start_from")]
    if origins[0] is not None:
        found.append(("started from", origins[0]))
    found += described_settings(recorded)
    layouts = [(start["iteration"], layout_name(start["layout"])) for start in starts if "layout" in start]
    if len({name for _, name in layouts}) > 1:
        changes = [place for n, place in enumerate(layouts) if n == 0 or place[1] != layouts[n - 1][1]]
        found.append(("layout", "; ".join(f"{name} from step {iteration + 1:,}" for iteration, name in changes)))
    elif isinstance(run.get("layout"), dict):
        found.append(("layout", layout_name(run["layout"])))
    resumed = [start["iteration"] for start in starts][1:]
    if resumed:
        found.append(("resumed at step", ", ".join(f"{iteration:,}" for iteration in resumed)))
    if steps:
        last, losses = steps[-1], [row["loss"] for row in steps if row["loss"] is not None]
        found.append(("steps", f"{last['iteration']:,}"))
        found.append(("tokens", f"{last['consumed_tokens']:,}"))
        found.append(
            (
                "training loss, first and last step",
                f"{show_figure(steps[0]['loss'], '.4f')}, {show_figure(last['loss'], '.4f')}",
            )
        )
        if losses:
            found.append(("lowest training loss", f"{min(losses):.4f}"))
        found.append(("time in steps", show_duration(sum(row["seconds"] for row in steps))))
        skipped = sum(bool(row.get("skipped")) for row in steps)
        found.append(("skipped steps", f"{skipped:,}"))
    if recorded.peak_memory_bytes is not None:
        found.append(("peak memory, all processes", f"{recorded.peak_memory_bytes / 1e9:.1f} GB"))
    found.append(("checkpoints", ", ".join(recorded.checkpoints) or "none"))
    return found


def described_settings(recorded: Recorded) -> list[tuple[str, str]]:
    """Model, mixture, batch and schedule, as far as run.json and ledger.json say them."""
    model, config, planned = recorded.run.get("model"), recorded.run.get("config", {}), recorded.ledger.get("planned", {})
    found = []
    if model:
        shape = f"{model['num_hidden_layers']} layers of {model['hidden_size']:,}, vocabulary {model['vocab_size']:,}"
        found.append(("model", f"{parameters(model) / 1e9:.3g} B parameters: {shape}"))
    if config.get("mixture"):
        asked = f", ALMR {planned['almr_asked']:.4g} asked" if "almr_asked" in planned else ""
        found.append(("mixture", f"{config['mixture']}{asked}"))
    training = config.get("training", {})
    if "global_batch_size" in training and "seq_length" in planned:
        batch, length = training["global_batch_size"], planned["seq_length"]
        micro = f", micro-batches of {training['micro_batch_size']}" if "micro_batch_size" in training else ""
        found.append(("batch", f"{batch:,} samples of {length:,} tokens: {batch * length:,} tokens{micro}"))
    if training.get("params_dtype"):
        found.append(("precision", training["params_dtype"]))
    if recorded.steps and config.get("optimizer"):
        highest = max(row["lr"] for row in recorded.steps)
        style = config.get("lr", {}).get("decay_style", "")
        asked = f"{config['optimizer']['lr']:g} to {config['optimizer']['min_lr']:g}"
        found.append(("learning rate", f"{asked}{', ' + style if style else ''}; highest so far {highest:g}"))
    return found


def parameters(model: dict[str, Any]) -> int:
    """Number of weights of a Llama model, from the fields of its configuration."""
    hidden, ffn, head = model["hidden_size"], model["intermediate_size"], model["head_dim"]
    queries, keys = model["num_attention_heads"] * head, model["num_key_value_heads"] * head
    biases = (queries + 2 * keys + hidden) * bool(model.get("attention_bias"))
    biases += (2 * ffn + hidden) * bool(model.get("mlp_bias"))
    layer = 2 * hidden * (queries + keys) + 3 * hidden * ffn + 2 * hidden + biases
    embeddings = model["vocab_size"] * hidden * (1 if model["tie_word_embeddings"] else 2)
    return int(embeddings + model["num_hidden_layers"] * layer + hidden)


def layout_name(layout: dict[str, Any]) -> str:
    """TP2 x PP2 x DP2 on cuda, with further parallel sizes where they are above 1."""
    sizes = [(name.partition("_")[0], size) for name, size in layout.items() if name.endswith("_parallel_size")]
    short = {"tensor": "TP", "pipeline": "PP", "data": "DP", "context": "CP", "expert": "EP"}
    always = ("tensor", "pipeline", "data")
    shown = [f"{short.get(kind, kind)}{size}" for kind, size in sizes if size and (kind in always or size > 1)]
    return " x ".join(shown) + (f" on {layout['device']}" if "device" in layout else "")


def validation_section(recorded: Recorded) -> list[str]:
    """What each set's last evaluation is compared with, the last one, and the change."""
    last = recorded.evaluations[-1]
    rows_of_ledger = recorded.ledger.get("planned", {}).get("rows", [])
    general = {row["language"] for row in rows_of_ledger if row["group"] == "general"}
    new = {row["language"] for row in rows_of_ledger} - general
    rows, anew = [], False
    for name, now in last["validation"].items():
        before = baseline_of(recorded.evaluations, name) or {}
        since = before.get("iteration")
        relative = None if since in (None, last["iteration"]) else change(now["bits_per_byte"], before["bits_per_byte"])
        word = verdict(relative, now["language"] not in new)
        rows.append(
            [
                name,
                now["language"],
                arrow(before.get("loss"), now["loss"], ".4f"),
                arrow(perplexity(before.get("loss")), perplexity(now["loss"]), ",.2f"),
                arrow(before.get("bits_per_byte"), now["bits_per_byte"], ".4f"),
                "?" if since is None else f"{since:,}",
                percent(relative),
                word,
            ]
        )
        anew = anew or bool(since)
    header = ("set", "language", "loss", "perplexity", "bits per byte", "since step", "change of bits per byte", "so")
    note = [MEASURED_ANEW, ""] if anew else []
    evaluations = f"{len(recorded.evaluations):,} evaluations, the last at step {last['iteration']:,}. Lower is better."
    return [evaluations, "", *note, *report_table(header, rows)]


def arrow(before: float | None, now: float | None, form: str) -> str:
    """before → now."""
    known = before is not None and before == before
    return f"{format(before, form) if known else '?'} → {show_figure(now, form)}"


def data_section(recorded: Recorded) -> list[str]:
    """The ALMR that was asked for and the one that came of it; tokens by corpus."""
    last = recorded.steps[-1]
    planned = recorded.ledger.get("planned", {})
    lines = [f"ALMR realised so far: {last['almr_realised']:.6f}."]
    if planned:
        lines[0] += f" Asked for the whole run: {planned['almr_asked']:.6f}, planned: {planned['almr_realised']:.6f}."
    tokens = last["corpus_tokens"]
    about = {row["corpus"]: row for row in planned.get("rows", [])}
    total = sum(tokens.values()) or 1
    rows = [
        [name, about.get(name, {}).get("group", ""), about.get(name, {}).get("language", ""), f"{n:,}", f"{n / total:.2%}"]
        for name, n in tokens.items()
    ]
    return [*lines, "", *report_table(("corpus", "group", "language", "tokens", "share"), rows)]


def throughput_section(steps: list[dict[str, Any]]) -> list[str]:
    """Median, 10th and 90th percentile over the steps."""
    names = {
        "tokens/s": ("tokens_per_second", ",.0f"),
        "tokens/s per device": ("tokens_per_second_per_device", ",.0f"),
        "MFU": ("mfu", ".2%"),
        "MFU, causal attention counted half": ("mfu_causal", ".2%"),
        "seconds per step": ("seconds", ".3f"),
        "of these waiting for data": ("data_seconds", ".3f"),
    }
    rows = []
    for title, (name, form) in names.items():
        values = sorted(row[name] for row in steps if row.get(name) is not None)
        if values:
            spread = (statistics.median(values), percentile(values, 0.1), percentile(values, 0.9))
            rows.append([title, *(format(value, form) for value in spread)])
    return report_table(("per step", "median", "10th percentile", "90th percentile"), rows)


def percentile(ordered: Sequence[float], part: float) -> float:
    """The value below which `part` of the ordered values lie (the nearest that is there)."""
    return ordered[round(part * (len(ordered) - 1))]


def skipped_section(steps: list[dict[str, Any]]) -> list[str]:
    """The steps that changed nothing, and why; of many the last."""
    skipped = [row for row in steps if row.get("skipped")]
    rows = [[f"{row['iteration']:,}", str(row["skipped"])] for row in skipped[-SKIPPED_NAMED:]]
    left_out = len(skipped) - len(rows)
    before = [f"The last {len(rows)}; {left_out:,} before them are in {METRICS}.", ""] if left_out else []
    return [*before, *report_table(("step", ""), rows)] if skipped else []


def origin_section(run: dict[str, Any]) -> list[str]:
    """Hosts, code and versions, as far as run.json knows them."""
    rows = [
        [f"host {host['hostname']}", f"ranks {show_ranges(host['ranks'])}: {', '.join(sorted(set(host['devices'])))}"]
        for host in run.get("hosts", [])
    ]
    if git := run.get("git"):
        rows.append(
            ["code", git["commit"] + (f", with changes in {', '.join(git['changed_files'])}" if git["dirty"] else "")]
        )
    rows += [[name, str(value)] for name, value in run.get("versions", {}).items()]
    return report_table(("", ""), rows)


def show_ranges(numbers: Sequence[int]) -> str:
    """0-3, 8."""
    parts: list[list[int]] = []
    for value in sorted(numbers):
        if parts and parts[-1][-1] == value - 1:
            parts[-1] = [parts[-1][0], value]
        else:
            parts.append([value])
    return ", ".join("-".join(str(end) for end in part) for part in parts)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="report", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("run", help="folder of a run (checkpoint.save)")
    start_logs()
    try:
        print(write_run_report(parser.parse_args(arguments).run))
    except InputError as error:
        logger.error(error)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
