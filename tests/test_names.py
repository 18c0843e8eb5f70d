"""A public name leads somewhere: no two classes of the package have one name."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

import megatron_cpt

PACKAGE = Path(megatron_cpt.__file__).parent


def test_public_classes_have_names_of_their_own() -> None:
    found: dict[str, list[str]] = defaultdict(list)
    for path in PACKAGE.rglob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                found[node.name].append(str(path.relative_to(PACKAGE)))
    assert len(found) > 200
    assert {name: places for name, places in found.items() if len(places) > 1} == {}
