"""What the pages say of the code: error messages, settings, tests, rooms; and that the site is made of all of them."""

from __future__ import annotations

import ast
import dataclasses
import re
import typing
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from pages import PAGES, table_rows
from tiny_models import ROOT

DOCS = ROOT / "docs"
PACKAGE = ROOT / "megatron_cpt"


def read(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


# Troubleshooting


def templates(path: Path) -> list[str]:
    """Texts in a file's code, with "…" for what is put in; docstrings are no messages."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            found.append("".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values))  # type: ignore[misc]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            found.append(node.value)
    return found


def templates_of_shell(path: Path) -> list[str]:
    """What a script of ours says or refuses with, "…" for variables and the output of commands."""
    text = path.read_text(encoding="utf-8").replace('" \\\n    "', " ")
    found = re.findall(r'\b(?:say|refuse) "((?:[^"$]|\$(?!\()|\$\([^)]*\))*)"', text)
    return [re.sub(r"\$\([^)]*\)|\$\{[^}]*\}|\$\w+", "…", message) for message in found]


@cache
def all_templates() -> frozenset[str]:
    launcher = ROOT / "examples/lib"
    texts = [text for path in (*PACKAGE.rglob("*.py"), launcher / "layout.py") for text in templates(path)]
    return frozenset(" ".join(text.split()) for text in texts + templates_of_shell(launcher / "launch.sh"))


MESSAGES = [row[0] for header, row in table_rows(read("troubleshooting.md")) if header[0] == "message"]


@pytest.mark.parametrize("cell", MESSAGES)
def test_error_messages_are_those_of_the_code(cell: str) -> None:
    message = re.fullmatch(r"`([^`]+)`", cell)
    assert message, "a message stands alone, as code"
    assert " ".join(message[1].removeprefix("WARNING: ").split()) in all_templates()


def test_there_are_many_messages_and_none_twice() -> None:
    assert len(MESSAGES) > 70
    assert len(set(MESSAGES)) == len(MESSAGES)


# Promises, files and tables


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_rows_of_tables_have_as_many_cells_as_their_header(page: Path) -> None:
    for header, row in table_rows(page.read_text(encoding="utf-8")):
        assert len(row) == len(header), row
        assert not any("|" in cell for cell in row), f"{row}: mkdocs and GitHub show an escaped bar in code differently"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_that_is_named_is_there(page: Path) -> None:
    """Files and folders of the repository, from its root or, within the package, from there."""
    text = page.read_text(encoding="utf-8")
    for name in re.findall(r"`((?:tests|megatron_cpt|tools|csrc|examples|docs|bench)/[\w/.]*)`", text):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"`((?:platforms|config|tokenizer|data|model|checkpoint|training|study)/\w[\w/]*\.py)`", text):
        assert (PACKAGE / name).exists(), name


def test_every_promise_names_a_test() -> None:
    rows = [row for header, row in table_rows(read("promises.md")) if header == ["promise", "proved by"]]
    assert len(rows) > 20
    for promise, proof in rows:
        assert re.search(r"`tests/\w+/", proof), promise


# Links of the README, which is no page of the site


def test_the_readme_links_to_what_is_there() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]+)(?:#([^)]*))?\)", text):
        assert (ROOT / target).exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)", (ROOT / target).read_text(encoding="utf-8"), flags=re.M)
            assert anchor in [re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings]
    defined = set(re.findall(r"^\[([\w-]+)\]: https://\S+$", text, flags=re.M))
    assert set(re.findall(r"\]\[([\w-]+)\]", text)) == defined


# Architecture


def imports_of(path: Path) -> set[str]:
    """Rooms that a file imports when it runs (not only for its annotations)."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "megatron_cpt":
            parts = (node.module or "").split(".")
            found.update(parts[1:2] or [alias.name for alias in node.names])
        elif isinstance(node, ast.Import):
            found.update(a.name.split(".")[1] for a in node.names if a.name.startswith("megatron_cpt."))
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text(encoding="utf-8")))
    return found


def test_rooms_import_what_the_architecture_allows() -> None:
    rows = [row for header, row in table_rows(read("architecture.md")) if header[0] == "room"]
    allowed = {row[0].strip("`"): set(re.findall(r"`(\w+)`", row[2])) for row in rows}
    rooms = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}
    assert set(allowed) == rooms
    for room in rooms:
        for path in (PACKAGE / room).rglob("*.py"):
            assert (imports_of(path) & rooms) - {room, "utils"} <= allowed[room], path
    done: set[str] = set()
    while done != rooms:  # no circles: there is always a room that needs only those that are done
        ready = {room for room in rooms - done if allowed[room] <= done}
        assert ready, f"a circle among {rooms - done}"
        done |= ready


def test_the_rooms_of_the_readme_are_those_of_the_package() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    named = re.search(r"^    megatron_cpt/ (.*?)^    csrc/", text, re.MULTILINE | re.DOTALL)
    assert named
    assert set(named[1].split()) == {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}


# Migrating


def fields_of(config_class: type, prefix: str = "") -> set[str]:
    """Dotted names of all fields."""
    hints = typing.get_type_hints(config_class)
    names: set[str] = set()
    for field in dataclasses.fields(config_class):
        names.add(prefix + field.name)
        if isinstance(hints[field.name], type) and dataclasses.is_dataclass(hints[field.name]):
            names |= fields_of(hints[field.name], f"{prefix}{field.name}.")
    return names


@cache
def known_fields() -> dict[str, set[str]]:
    """By heading of a column of the tables, what may stand in it."""
    from megatron_cpt.config.run import RunConfig
    from megatron_cpt.convert.config import HfToMegatron, MegatronToHf
    from megatron_cpt.corpus.config import PreprocessConfig
    from megatron_cpt.corpus.merge import MergeConfig
    from megatron_cpt.mixture.config import CorpusConfig, MixtureConfig, StageConfig

    return {
        "pretrain.yaml": fields_of(RunConfig),
        "mixture.yaml": fields_of(MixtureConfig) | fields_of(StageConfig) | fields_of(CorpusConfig),
        "preprocess_data.py": fields_of(PreprocessConfig),
        "merge_datasets.py": fields_of(MergeConfig),
        "hf-to-megatron": fields_of(HfToMegatron),
        "megatron-to-hf": fields_of(MegatronToHf),
    }


HERE = [(header, row) for header, row in table_rows(read("migrating.md")) if len(header) > 1 and header[1] == "here"]


@pytest.mark.parametrize(("header", "row"), HERE, ids=lambda value: value[0][:40] if isinstance(value, list) else None)
def test_settings_that_a_move_needs_exist(header: list[str], row: list[str]) -> None:
    """Code in the column "here": `setting`, `FILE: setting`, `--option` (of preprocessing), or the name of a tool."""
    for code in re.findall(r"`([^`]+)`", row[1]):
        place, name = "pretrain.yaml", code
        if code.startswith("--"):
            place, name = "preprocess_data.py", code.removeprefix("--")
        elif ": " in code and code.split(": ")[0] in known_fields():
            place, name = code.split(": ")
            name = name.removeprefix("--")
        name, _, value = name.partition(": ")
        assert name in known_fields()[place] or (ROOT / "tools" / code).exists(), code
        assert not value or value in ("bf16", "weights", "false", "selective", "full"), code


def test_tables_of_the_move_are_long() -> None:
    assert len(HERE) > 80


# The site


def test_every_page_is_in_the_navigation() -> None:
    site: dict[str, Any] = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))

    def names(part: Any) -> list[str]:
        parts = part if isinstance(part, list) else part.values() if isinstance(part, dict) else None
        return [part] if parts is None else [name for inner in parts for name in names(inner)]

    found = names(site["nav"])
    assert sorted(found) == sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))


def test_versions_of_the_site_s_tools_are_pinned() -> None:
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    for name in ("mkdocs", "mkdocs-material", "pymdown-extensions"):
        assert re.search(rf"^{name}==", pins, flags=re.M)
