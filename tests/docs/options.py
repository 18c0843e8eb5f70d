"""Run as a program: prints {"TOOL" or "TOOL COMMAND": [options]} of all tools as JSON.

The tools are run with a `run_tool` that only notes the configuration's class, so nothing is parsed and nothing happens.
"""

from __future__ import annotations

import dataclasses
import json
import runpy
import sys
import types
import typing
from pathlib import Path
from typing import Any

from megatron_cpt.config import cli

TOOLS = Path(__file__).parents[2] / "tools"


def options_of(config_class: type, prefix: str = "") -> list[str]:
    """Dotted names of all fields, sections and entries of lists too."""
    names: list[str] = []
    hints = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        names.append(prefix + field.name)
        hint = hints[field.name]
        members = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        members += tuple(
            inner for member in members if typing.get_origin(member) is list for inner in typing.get_args(member)
        )
        for member in members:
            if isinstance(member, type) and dataclasses.is_dataclass(member):
                names += options_of(member, f"{prefix}{field.name}.")
    return names


def main() -> None:
    """Print the options."""
    found: dict[str, list[str]] = {}
    for path in sorted(TOOLS.glob("*.py")):

        def note_tool(main: Any, config_class: type, *_: Any, name: str = path.name, **__: Any) -> None:
            found[name] = options_of(cli.load(config_class))

        def note_commands(commands: dict[str, tuple[Any, type, Any]], _: str, name: str = path.name) -> None:
            found.update({f"{name} {command}": options_of(cli.load(kind)) for command, (_, kind, _) in commands.items()})

        cli.run_tool, cli.run_subcommands = note_tool, note_commands  # type: ignore[assignment]
        runpy.run_path(str(path), run_name="__main__")
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
