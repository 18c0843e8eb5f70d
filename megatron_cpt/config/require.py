"""What every part of a configuration uses to say no."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Self

from megatron_cpt.utils.errors import FieldError, InputError, Refusals, RefusedValueError


def require(condition: bool, name: str, value: Any, wanted: str) -> None:
    """Raise FieldError "NAME is VALUE; expected WANTED" unless the condition holds."""
    if not condition:
        raise FieldError(name, f"{name} is {value}; expected {wanted}")


def require_at_least(config: Any, **bounds: float) -> None:
    """Raise InputError for the named fields of `config` that are below their bounds; None (not given) is fine."""
    refusals = Refusals()
    for name, bound in bounds.items():
        with refusals.noted():
            value = getattr(config, name)
            require(value is None or bound <= value < math.inf, name, value, f"{bound} or more")
    refusals.raise_any()


class Requirements(Refusals):
    """What does not depend on each other: `with Requirements() as need: need.field(...)` raises all at its end.

    Values of a configuration are read within `field`, `at_least` or a `noted` block: they may have been refused.
    """

    def __call__(self, condition: bool, name: str, value: Any, wanted: str) -> None:
        """See `require`; for values that do not come from a configuration."""
        with self.noted():
            require(condition, name, value, wanted)

    def field(self, config: Any, name: str, is_right: Callable[[Any], bool], wanted: str) -> None:
        """`require` of a field; None (not given) is fine."""
        with self.noted():
            value = getattr(config, name)
            require(value is None or is_right(value), name, value if value != "" else "''", wanted)

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
    given, refused = list[str](), False
    for name in names:
        try:
            given += [name] if getattr(config, name) is not None else []
        except RefusedValueError:
            refused = True
    if len(given) > 1:
        raise InputError(f"{section}.{given[0]} and {section}.{given[1]} are both given; expected one of {', '.join(names)}")
    if refused and not given:
        raise RefusedValueError
    return given[0] if given else None
