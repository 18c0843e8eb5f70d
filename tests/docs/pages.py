"""What the pages of the documentation hold: blocks of commands with their marks, tables, inline code.

A block of shell commands is fenced as bash and has one of three marks above it:

<!-- test -->                  the tests run it, in the order of the page, in a folder with the files it names
<!-- run by FILE ... -->       these tests run the same tool, or the function behind it, with files of their own
<!-- not run: REASON -->       REASON begins with one of REASONS

A block of YAML has, in docs/:

<!-- settings of TOOL -->      its fields are those of the tool's configuration
<!-- a mixture -->             a mixture file
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from tiny_models import ROOT

PAGES = (*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md")
REASONS = ("needs GPUs", "needs a cluster", "needs the network", "needs files of others", "takes minutes", "a template")
PROGRAMS = "python python3 pip torchrun make srun sbatch accelerate transformers vllm lm-eval mkdocs bash export sudo git"
SHELL = re.compile(rf"(\$ )?(\.venv/bin/|\./)?({'|'.join(PROGRAMS.split())})( |$)|#SBATCH|examples/\S+\.sh")


@dataclass(frozen=True)
class Block:
    """A fenced block; `mark` is the comment right above it, without its brackets."""

    page: Path
    line: int
    language: str
    mark: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"

    def commands(self) -> list[str]:
        """Its commands, continued lines joined, comments left out."""
        joined = re.sub(r" *\\\n *", " ", self.text)
        lines = (re.sub(r"(^| +)#(?!SBATCH).*", "", line).strip() for line in joined.splitlines())
        return [line for line in lines if line]


def blocks(page: Path) -> list[Block]:
    """All fenced blocks of a page."""
    text = page.read_text(encoding="utf-8")
    found = re.finditer(r"(?:<!-- ([^\n]*) -->\n)?^```(\w*)\n(.*?)^```$", text, flags=re.S | re.M)
    return [Block(page, text.count("\n", 0, m.start()) + 1, m[2], m[1] or "", m[3]) for m in found]


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)


def table_rows(text: str) -> list[tuple[list[str], list[str]]]:
    """(cells of the header, cells of a row) of every row of every table."""
    rows: list[tuple[list[str], list[str]]] = []
    header: list[str] = []
    for line in text.splitlines():
        if not line.startswith("|"):
            header = []
            continue
        cells = [cell.strip().replace(r"\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if not header:
            header = cells
        elif not re.fullmatch(r"[-:| ]+", line):
            rows.append((header, cells))
    return rows
