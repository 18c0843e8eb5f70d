"""What every part of a configuration uses to say no."""

from __future__ import annotations

import math
from typing import Any

from megatron_cpt.errors import InputError, Refusals


def require(condition: bool, name: str, value: Any, wanted: str) -> None:
    """Raise InputError "NAME is VALUE; use WANTED" unless the condition holds."""
    if not condition:
        raise InputError(f"{name} is {value}; use {wanted}")


def require_at_least(config: Any, **bounds: float) -> None:
    """Raise InputError for the named fields of `config` that are below their bounds; None (not given) is fine."""
    refusals = Refusals()
    for name, bound in bounds.items():
        value = getattr(config, name)
        with refusals.noted():
            require(value is None or bound <= value < math.inf, name, value, f"{bound} or more")
    refusals.raise_any()


def at_most_one(section: str, config: Any, *names: str) -> str | None:
    """The one of these fields that is given, None if none is.

    Raises:
        InputError: more than one is given
    """
    given = [name for name in names if getattr(config, name) is not None]
    if len(given) > 1:
        raise InputError(f"{section}.{given[0]} and {section}.{given[1]} are both given; use one of {', '.join(names)}")
    return given[0] if given else None
