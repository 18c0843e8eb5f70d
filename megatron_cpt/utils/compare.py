"""How two JSON values differ."""

from __future__ import annotations

from typing import Any


def describe_difference(old: Any, new: Any, where: str = "") -> str:
    """The first place in which two JSON values differ, in words."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*new, *(set(old) - set(new))]:
            if old.get(key) != new.get(key):
                return describe_difference(old.get(key), new.get(key), f"{where}.{key}" if where else key)
    if isinstance(old, list) and isinstance(new, list):
        if len(old) != len(new):
            return f"{where}: found {len(old)}, expected {len(new)}"
        for i, (a, b) in enumerate(zip(old, new, strict=True)):
            if a != b:
                return describe_difference(a, b, f"{where}[{i}]")
    return f"{where} is {old!r} there and {new!r} now"
