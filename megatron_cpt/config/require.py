"""What every part of a configuration uses to say no."""

from __future__ import annotations

import math
from typing import Any, Self

from megatron_cpt.errors import InputError, Refusals


def require(condition: bool, name: str, value: Any, wanted: str) -> None:
    """Raise InputError "NAME is VALUE; expected WANTED" unless the condition holds."""
    if not condition:
        raise InputError(f"{name} is {value}; expected {wanted}")


def require_at_least(config: Any, **bounds: float) -> None:
    """Raise InputError for the named fields of `config` that are below their bounds; None (not given) is fine."""
    refusals = Refusals()
    for name, bound in bounds.items():
        value = getattr(config, name)
        with refusals.noted():
            require(value is None or bound <= value < math.inf, name, value, f"{bound} or more")
    refusals.raise_any()


class Requirements(Refusals):
    """`require` for what does not depend on each other: `with Requirements() as need: need(...)` raises all at its end."""

    def __call__(self, condition: bool, name: str, value: Any, wanted: str) -> None:
        """See `require`."""
        with self.noted():
            require(condition, name, value, wanted)

    def at_least(self, config: Any, **bounds: float) -> None:
        """See `require_at_least`."""
        with self.noted():
            require_at_least(config, **bounds)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.raise_any()


def at_most_one(section: str, config: Any, *names: str) -> str | None:
    """The one of these fields that is given, None if none is.

    Raises:
        InputError: more than one is given
    """
    given = [name for name in names if getattr(config, name) is not None]
    if len(given) > 1:
        raise InputError(f"{section}.{given[0]} and {section}.{given[1]} are both given; expected one of {', '.join(names)}")
    return given[0] if given else None
