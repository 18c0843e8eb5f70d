"""`python -m bench [ROW]`: run the rows whose name contains ROW, print a table, write bench/results.json."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench import convert, gpu, loader, preprocess, start, train
from bench.row import Row

GROUPS = (preprocess, start, loader, train, convert, gpu)


def main() -> None:
    """Run what was asked for."""
    wanted = sys.argv[1] if len(sys.argv) > 1 else ""
    rows = [row for group in GROUPS for row in group.rows(wanted)]
    if not rows:
        sys.exit(f"error: no row is named {wanted!r}; expected part of: {', '.join(n for g in GROUPS for n in g.NAMES)}")
    path = Path(__file__).parent / "results.json"
    path.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")
    Console(width=None if sys.stdout.isatty() else 150).print(as_table(rows))
    print(path)


def as_table(rows: list[Row]) -> Table:
    """One line a row."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("name", "unit", "ours", "reference", "", "ratio", "wanted", "holds"):
        table.add_column(name, justify="right" if name in ("ours", "reference", "ratio") else "left")
    for row in rows:
        holds = {True: "yes", False: "NO", None: ""}[row.holds]
        numbers = [f"{row.ours:,.2f}", f"{row.reference:,.2f}", row.reference_name, f"{row.ratio:.2f}"]
        table.add_row(row.name, row.unit, *numbers, row.wanted, holds)
    return table


if __name__ == "__main__":
    main()
