"""How a user learns of all mistakes at once: a section of which some values were refused can be checked all the same.

`ConfigReader.config` gives a configuration also where something in it is wrong. Reading what was refused there
(`config.optimizer.lr`) raises RefusedValueError, which ends the `noted` block of `Refusals` that it happens in, silently:
that value was named already. All else can be read. So a check is written as if everything were right. There is one rule:
what does not depend on each other stands in `noted` blocks of its own (or is asked for by `Requirements.field`, which has
one).

Two kinds of checks see such a configuration: `__post_init__` of a section, for what its fields tell, and the `check` that
a tool gives to `run_tool`, for files and what is in them, without torch. The tool itself starts when all is right.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any, NoReturn

from megatron_cpt.utils.errors import Refusals, RefusedValueError


def partial(kind: type, values: Mapping[str, Any], refused: Collection[str]) -> Any:
    """A section with these values, defaults for fields that are not given, and `refused` ones that cannot be read.

    Its `__post_init__` has not run.
    """
    unreadable = {name: property(_refuse) for name in refused}
    section: Any = object.__new__(type(kind.__name__, (kind,), {"__doc__": kind.__doc__, **unreadable}))
    for field in dataclasses.fields(kind):
        if field.name in values and field.name not in refused:
            object.__setattr__(section, field.name, values[field.name])
        elif field.default_factory is not dataclasses.MISSING and field.name not in refused:
            object.__setattr__(section, field.name, field.default_factory())
    return section


def partly(kind: type, refusals: Refusals, **readers: Callable[[], Any]) -> Any:
    """A section whose fields come from functions; what one of them refuses is noted, and cannot be read in it."""
    values: dict[str, Any] = {}
    for name, read in readers.items():
        with refusals.noted():
            values[name] = read()
    refused = readers.keys() - values.keys()
    return partial(kind, values, refused) if refused else kind(**values)


def readable(section: Any, name: str, refused: Any = None) -> Any:
    """The value of a section's field; `refused` where it, or the whole section, was."""
    try:
        return getattr(section, name)
    except RefusedValueError:
        return refused


def _refuse(_: Any) -> NoReturn:
    raise RefusedValueError
