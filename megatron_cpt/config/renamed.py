"""Settings that had another name in the last release: files and options with the old one are read, and a note says so.

`field(metadata=formerly("trouble"))` is all that a renamed field needs. Its entry goes when the next release is out.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import types
from collections.abc import Mapping, Sequence
from typing import Any, Union, get_args, get_origin, get_type_hints

from megatron_cpt.utils.errors import InputError, Refusals

logger = logging.getLogger(__name__)

FORMERLY = "formerly"


def formerly(name: str) -> dict[str, str]:
    """Metadata of a field that had this name before."""
    return {FORMERLY: name}


def old_names(kind: Any) -> dict[str, str]:
    """{old name: name of today} of the fields of a section."""
    return {field.metadata[FORMERLY]: field.name for field in dataclasses.fields(kind) if FORMERLY in field.metadata}


def current_name(kind: Any, dotted: str) -> str:
    """The dotted name of a setting as it is today; one that is unknown stays."""
    first, _, rest = dotted.partition(".")
    name = old_names(kind).get(first, first)
    sections = sections_in(get_type_hints(kind).get(name))
    return f"{name}.{current_name(sections[0], rest) if sections else rest}" if rest else name


def current_fields(
    kind: Any, fields: Mapping[Any, Any], where: str, name: str, refusals: Refusals, notes: list[str]
) -> dict[Any, Any]:
    """The fields of a section by their names of today; of the sections in it see `current_names`.

    A field that is given by both names is refused.

    Args:
        where: begins the messages: the file
        name: dotted, of the section
        notes: gets what is to be said of old names
    """
    renamed, prefix, found = old_names(kind), f"{name}." if name else "", dict[Any, Any]()
    for field, value in fields.items():
        current = renamed.get(field, field)
        old, today = f"{where}{prefix}{field}", f"{prefix}{current}"
        if current != field:
            notes.append(note(old, today))
        if current != field and current in fields:
            refusals.add(InputError(f"{old} is given beside {today}, its name of today; expected one of the two"))
        else:
            found[current] = value
    return found


def current_names(
    kind: Any, fields: Mapping[Any, Any], where: str, notes: list[str] | None = None, name: str = ""
) -> dict[Any, Any]:
    """The fields of a section and of the sections in it by their names of today, as they are given; see `current_fields`.

    Raises:
        InputError: a field is given by both names
    """
    refusals, hints = Refusals(), get_type_hints(kind)
    found = current_fields(kind, fields, where, name, refusals, [] if notes is None else notes)
    refusals.raise_any()
    for field, value in found.items():
        sections = sections_in(hints.get(field))
        if sections and isinstance(value, Mapping):
            found[field] = current_names(sections[0], value, where, notes, f"{name}.{field}".lstrip("."))
    return found


def sections_in(kind: Any) -> list[Any]:
    """The section that a field is, or may be."""
    members: Sequence[Any] = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
    return [member for member in members if isinstance(member, type) and dataclasses.is_dataclass(member)]


def note(old: str, current: str) -> str:
    """What is said of an old name; `old` with the file in front, as messages have it."""
    return f"{old} is now called {current}; the old name is accepted until the next release"


def print_notes(notes: Sequence[str]) -> None:
    """Print each once, by the first process of a run."""
    if os.environ.get("RANK", "0") == "0":
        for text in dict.fromkeys(notes):
            logger.info(f"note: {text}")
