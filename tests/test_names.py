"""A public name leads somewhere: no two classes or functions of the package have one name."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

import pytest

import megatron_cpt

PACKAGE = Path(megatron_cpt.__file__).parent


@pytest.mark.parametrize(
    ("kinds", "least"),
    [((ast.ClassDef,), 200), ((ast.FunctionDef, ast.AsyncFunctionDef), 1000)],
    ids=["classes", "functions"],
)
def test_public_names_are_unique(kinds: tuple[type[ast.AST], ...], least: int) -> None:
    found: dict[str, list[str]] = defaultdict(list)
    for path in PACKAGE.rglob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, kinds) and not node.name.startswith("_"):  # type: ignore[attr-defined]
                found[node.name].append(str(path.relative_to(PACKAGE)))  # type: ignore[attr-defined]
    assert len(found) > least
    assert {name: places for name, places in found.items() if len(places) > 1 and name != "main"} == {}
