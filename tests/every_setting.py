"""Which settings a tool has, for tables of tests that must have a row for each."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, get_args, get_type_hints


def settings_of(config_class: type, prefix: str = "") -> set[str]:
    """Dotted names of the fields of a configuration; those of sections, and of the items of lists of sections, for these."""
    names: set[str] = set()
    for name, kind in get_type_hints(config_class).items():
        inner = [part for part in parts_of(kind) if dataclasses.is_dataclass(part)]
        for part in inner:
            names |= settings_of(part, f"{prefix}{name}.")
        if not inner:
            names.add(prefix + name)
    return names


def parts_of(kind: Any) -> Iterator[Any]:
    """A type, and all that it is made of."""
    yield kind
    for part in get_args(kind):
        yield from parts_of(part)
