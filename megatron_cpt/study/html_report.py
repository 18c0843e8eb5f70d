"""The report of a study: one HTML file that stands alone, its figures within."""

from __future__ import annotations

import base64
import html
import math
import os
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from megatron_cpt.study.critical import CriticalRatio
from megatron_cpt.study.fit import Fit, FittedSurface, equation, grouped_notes
from megatron_cpt.study.frontier import Line
from megatron_cpt.study.results import MEAN_METRIC, Results
from megatron_cpt.utils.files import write_text

PAGE = "report.html"
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em; color: #222 }
img { max-width: 100%; display: block; margin: 1em 0 }
table { border-collapse: collapse; margin: 1em 0; font-variant-numeric: tabular-nums }
td, th { border-bottom: 1px solid #ddd; padding: 3px 12px; text-align: right }
td:first-child, th:first-child { text-align: left }
.note { background: #fff6e0; padding: .6em 1em; border-left: 4px solid #e0a800 }
.choice { background: #eef6ee; padding: .6em 1em; border-left: 4px solid #3a8a3a }
"""
CAPTIONS = {
    "contours": "Left: loss on each run's own mixture and the line along which it falls fastest. Right: what is to be best, "
    "its peaks and the frontier.",
    "languages": "Losses of both languages after each run.",
    "trajectories": "Along the tokens.",
    "pareto": "Both losses since the start.",
    "laws": "Mixture laws: points are measured, lines are the laws.",
}


def write_html_report(
    folder: str, title: str, results: Results, fit: Fit, choice: dict[str, Any] | None, images: Sequence[str]
) -> str:
    """Write report.html; returns its path."""
    parts = [f"<h1>{html.escape(title)}</h1>", study_summary(results)]
    if choice is not None:
        parts += ["<h2>Choice</h2>", choice_section(choice)]
    if notes := grouped_notes([*(choice["notes"] if choice is not None else []), *fit.notes]):
        parts += ["<h2>Notes</h2>", *(f'<p class="note">{html.escape(note)}</p>' for note in notes)]
    for path in images:
        name = os.path.splitext(os.path.basename(path))[0]
        with open(path, "rb") as file:
            data = base64.b64encode(file.read()).decode()
        parts.append(f'<figure><img alt="{name}" src="data:image/png;base64,{data}">')
        parts.append(f"<figcaption>{html.escape(CAPTIONS.get(name, name))}</figcaption></figure>")
    parts += ["<h2>Lines</h2>", lines_table(fit), "<h2>Surfaces</h2>", surfaces_table(fit)]
    if fit.d_cpt:
        parts += ["<h2>D-CPT law</h2>", d_cpt_table(fit)]
    if fit.cmr:
        parts += ["<h2>Critical mixture ratio</h2>", cmr_table(fit)]
        parts += [f"<p>{html.escape(critical_words(critical))}</p>" for critical in fit.critical]
    parts += ["<h2>Runs</h2>", runs_table(results)]
    body = "\n".join(parts)
    path = os.path.join(folder, PAGE)
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}</style>'
    write_text(path, f"<!doctype html>\n<html><head>{head}</head><body>\n{body}\n</body></html>\n")
    return path


def html_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Escaped."""
    lines = ["<table>", "<tr>" + "".join(f"<th>{html.escape(text)}</th>" for text in header) + "</tr>"]
    lines += ["<tr>" + "".join(f"<td>{html.escape(text)}</td>" for text in row) + "</tr>" for row in rows]
    return "\n".join([*lines, "</table>"])


def study_summary(results: Results) -> str:
    """How many runs, how they ended."""
    outcomes = {row["run"]: row["outcome"] for row in results.rows}
    counts = ", ".join(f"{list(outcomes.values()).count(kind)} {kind}" for kind in sorted(set(outcomes.values())))
    pairs = {(row["almr"], row["lr"]) for row in results.rows}
    tokens = max(row["tokens"] or 0 for row in results.rows)
    return f"<p>{len(outcomes)} runs ({counts}) of {len(pairs)} pairs of ALMR and learning rate, {tokens:,} tokens each.</p>"


def choice_section(choice: dict[str, Any]) -> str:
    """The pair and the reason."""
    pair = f"ALMR {choice['almr']:.3g}{interval(choice['almr_interval'])}"
    pair += f", learning rate {choice['lr']:.3g}{interval(choice['lr_interval'])}"
    return '<div class="choice">' + "".join(f"<p>{html.escape(text)}</p>" for text in (pair, choice["reason"])) + "</div>"


def interval(bounds: Sequence[float] | None) -> str:
    """In brackets; nothing for None."""
    return "" if bounds is None or math.isinf(bounds[0]) else f" [{bounds[0]:.3g}, {bounds[1]:.3g}]"


def lines_table(fit: Fit) -> str:
    """The two equations."""
    rows = []
    named: tuple[tuple[str, Line | None], ...] = ((f"frontier of {fit.frontier_of}", fit.frontier), ("loss line", fit.line))
    for name, line in named:
        if line is not None:
            known = bool(np.isfinite(line.a))
            figures = [equation(line), interval(line.a_interval), interval(line.b_interval)] if known else ["", "", ""]
            rows.append([name, *figures, "no (see the notes)" if line.refused else "yes"])
    return html_table(["", "equation", "a, 5 % to 95 %", "b, 5 % to 95 %", "supported"], rows)


def surfaces_table(fit: Fit) -> str:
    """How good each is."""
    header = ["", "runs", "noise between seeds", "error on left-out pairs", "explained", "supported"]
    return html_table(
        header,
        (
            [
                name,
                str(len(found.surface.values)),
                noise_words(found),
                f"{found.error:.3g}",
                f"{found.explained:.1%}",
                "no (see the notes)" if found.refused else "yes",
            ]
            for name, found in fit.surfaces.items()
        ),
    )


def noise_words(found: FittedSurface) -> str:
    """The noise between seeds, or that the runs do not say it."""
    return "-" if found.noise is None else f"{found.noise:.3g}"


def d_cpt_table(fit: Fit) -> str:
    """Parameters."""
    names = ("E", "B", "eta", "beta", "C", "epsilon", "gamma")
    rows = (
        [
            f"{fitted.quantity}, LR {fitted.lr:g}",
            *(f"{getattr(fitted.law, name):.3g}" for name in names),
            f"{fitted.held_out.error:.2%}",
            f"{fitted.held_out.explained:.0%}",
        ]
        for fitted in fit.d_cpt
    )
    return html_table(["", *names, "error on left-out ratios", "of their differences explained"], rows)


def cmr_table(fit: Fit) -> str:
    """Parameters."""
    rows = ([f"LR {lr:g}", f"{c.b0:.3g}", f"{c.b1:.3g}", f"{c.s:.3g}", f"{c.error:.3g}"] for lr, c in fit.cmr.items())
    return html_table(["", "b0", "b1", "s", "error on the last budgets"], rows)


def critical_words(critical: CriticalRatio) -> str:
    """The prediction of one learning rate, and what should be known of it."""
    budget = f"{critical.tokens:,} tokens at LR {critical.lr:g}, tolerance {critical.tolerance:.2%}"
    found = f"critical mixture ratio of {budget}: {critical.ratio:.3g}"
    return "; ".join([found + interval(critical.interval), *critical.notes])


def runs_table(results: Results) -> str:
    """The last evaluation of every run, means over seeds."""
    names = ["general", "additional", *results.scores, *([MEAN_METRIC] if results.last(MEAN_METRIC) else [])]
    last = {row["run"]: row for row in results.rows}
    pairs = sorted({(row["almr"], row["lr"]) for row in last.values()})
    rows = []
    for almr, lr in pairs:
        of_pair = [row for row in last.values() if (row["almr"], row["lr"]) == (almr, lr)]
        ended = [row for row in of_pair if row["outcome"] == "finished"]
        cells = [f"{almr:g}", f"{lr:g}", f"{len(ended)} of {len(of_pair)}"]
        for name in names:
            values = [row[name] for row in ended if row.get(name) is not None]
            cells.append(f"{np.mean(values):.4g}" if values else "")
        rows.append(cells)
    return html_table(["ALMR", "learning rate", "runs finished", *names], rows)
