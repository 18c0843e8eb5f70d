"""How tables look: no lines, columns two apart, headings bold, numbers to the right; in a log as wide as what they say."""

from __future__ import annotations

import io
import logging
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.table import Column, Table
from rich.text import Text

from megatron_cpt.utils.console import WITHOUT_TERMINAL, wide_console
from megatron_cpt.utils.logs import ON_SCREEN


class PlainTable(Table):
    """A table of the package's one look, whose texts are what they are: a name with brackets is no markup.

    Headings and sums are left out where no column has one.
    """

    def __init__(self, *columns: Column, title: str = "", caption: str = "") -> None:
        super().__init__(
            *columns,
            box=None,
            padding=(0, 1),
            pad_edge=False,
            show_header=any(column.header for column in columns),
            show_footer=any(column.footer for column in columns),
        )
        self.above, self.below = Text(title, "table.title"), Text(caption, "table.caption")

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The title, the table and the caption; rich's own are broken to the width of the table."""
        if self.above:
            yield self.above
        yield from super().__rich_console__(console, options)
        if self.below:
            yield self.below

    def add_row(self, *cells: RenderableType | None, **options: Any) -> None:
        """Add a row."""
        super().add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in cells), **options)


def text_column(heading: str = "", **options: Any) -> Column:
    """A column of text, which goes on in the next line where the terminal is narrow."""
    return Column(heading, justify="left", overflow="fold", **options)


def number_column(heading: str, total: str = "", **options: Any) -> Column:
    """A column of numbers, never cut; `total`: below them."""
    return Column(heading, total, justify="right", no_wrap=True, **options)


def log_table(logger: logging.Logger, table: PlainTable) -> None:
    """Show a table on stderr, with colours on a terminal, and have its text in the log file."""
    console = wide_console()
    with console.capture() as captured:
        console.print(table)
    logger.info(table_text(table), extra={ON_SCREEN: captured.get().rstrip("\n")})


def table_text(table: PlainTable) -> str:
    """A table as a log has it."""
    console = Console(file=io.StringIO(), width=WITHOUT_TERMINAL)
    with console.capture() as captured:
        console.print(table)
    return "\n".join(line.rstrip() for line in captured.get().splitlines())
