"""The one look of tables, on a terminal and in a log, and that no table has another."""

from __future__ import annotations

import io
import logging
from pathlib import Path

import pytest
from rich.console import Console

import megatron_cpt
from megatron_cpt.utils.logs import start_logs
from megatron_cpt.utils.tables import PlainTable, log_table, number_column, table_text, text_column

TEXT = """a title that is wider than the table [x]
corpus        tokens  note
[b]zh[/b]          8  short
en         1,234,567  long
total            999
a caption that is wider than the table"""


def table() -> PlainTable:
    made = PlainTable(
        text_column("corpus"),
        number_column("tokens"),
        text_column("note"),
        title="a title that is wider than the table [x]",
        caption="a caption that is wider than the table",
    )
    made.add_row("[b]zh[/b]", "8", "short")
    made.add_row("en", "1,234,567", "long")
    made.add_row("total", "999", None)
    return made


def test_names_are_no_markup_numbers_stand_right_and_the_title_is_not_broken() -> None:
    assert table_text(table()) == TEXT


def test_headings_and_sums_stand_where_there_are_some() -> None:
    facts = PlainTable(text_column(), text_column())
    facts.add_row("documents", "8")
    assert table_text(facts) == "documents  8"
    sums = PlainTable(text_column("name"), number_column("n", "12"))
    sums.add_row("a", "5")
    assert table_text(sums).splitlines() == ["name   n", "a      5", "      12"]


def test_a_log_is_as_wide_as_the_table_and_the_file_has_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start_logs(path=str(tmp_path / "log"))
    wide = PlainTable(text_column("name"))
    wide.add_row("x" * 500)
    log_table(logging.getLogger("megatron_cpt.x"), wide)
    assert capsys.readouterr().err.split() == ["name", "x" * 500]
    assert (tmp_path / "log").read_text().endswith(f": name\n{'x' * 500}\n")


def test_on_a_narrow_terminal_text_goes_on_in_the_next_line_and_numbers_stay_whole() -> None:
    made, file = PlainTable(text_column("path"), number_column("tokens")), io.StringIO()
    made.add_row("abcdefghijkl", "1,234,567")
    Console(file=file, width=17).print(made)
    assert [line.rstrip() for line in file.getvalue().splitlines()] == ["path       tokens", "abcdef  1,234,567", "ghijkl"]


def test_all_tables_have_it() -> None:
    for path in Path(megatron_cpt.__file__).parent.rglob("*.py"):
        if path.name != "tables.py":
            assert "rich.table" not in path.read_text(encoding="utf-8"), f"{path} makes a table; expected PlainTable"
