"""The value of a field, from a file or an option -> what its type asks for, or a refusal that names it."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import re
import types
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from megatron_cpt.config.renamed import current_fields
from megatron_cpt.utils.errors import InputError, Refusals, RefusedValueError
from megatron_cpt.utils.input_files import amount, number, parse_yaml, plain_number, shown, text_of

LARGEST = 2**63 - 1  # whole number
SCALARS = (int, float, Fraction, str, bool)
TRUE, FALSE = ("true", "yes", "on"), ("false", "no", "off")
NOT_FINITE = re.compile(r"[-+]?\.?(inf|infinity|nan)", re.IGNORECASE)
SEPARATOR = "\0"  # of several values of an option, in its text: the system passes none on in a word
LONG_NUMBER = re.compile(r"[-+]?(?=\.?\d)([1-9]\d*|0)?(\.\d*)?(e[-+]?\d+)?", re.ASCII | re.IGNORECASE)
# Fields that may be written as 20B or 500k. Not lengths: 2k tokens of a sequence are 2,048 for some and 2,000 for others.
COUNTED = re.compile(r"(^|_)(?<!shuffle_)(token|sample|document|character|prompt|row|iter|step)s?(_|$)")


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a value has to be beyond its type: `Annotated[int, Limits(lambda layers: layers > 0, "a number above 0")]`."""

    hold: Callable[[Any], bool]
    wanted: str
    """What is expected, type and limits, in words."""
    verbatim: bool = False
    """Whether an option's text is the value, whatever it looks like: `[x]` is no list then, nor `null` nothing."""


def is_unicode(text: str) -> bool:
    """Whether it holds whole characters only: not bytes of another encoding, nor halves of characters."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


# What is encoded, as the names of files need not be: whoever does that would end with a traceback
Text = Annotated[str, Limits(is_unicode, "text in UTF-8")]
Prose = Annotated[str, Limits(is_unicode, "text in UTF-8", verbatim=True)]


class Given(dict[str, Any]):
    """What is given of a section, by field and converted; the sections in it are `Given`, too."""

    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.kind = kind


class _Wrong:
    """Stands for a value that was refused, also within lists and tables. Whoever makes use of it gets RefusedValueError."""

    def _use(self, *_: Any) -> Any:
        raise RefusedValueError

    __bool__ = __hash__ = __repr__ = __str__ = __len__ = __iter__ = __fspath__ = __getattr__ = _use
    __eq__ = __lt__ = __le__ = __gt__ = __ge__ = _use


WRONG = _Wrong()


@functools.cache
def hints_of(kind: Any) -> dict[str, Any]:
    """The types of a section's fields, with their limits."""
    return get_type_hints(kind, include_extras=True)


def written_name(field: dataclasses.Field[Any]) -> str:
    """The name of a field in a file: its own, or metadata `name`, for one that Python does not allow (`from`)."""
    return str(field.metadata.get("name", field.name))


def expected(kind: Any, name: str) -> str:
    """What a field takes, in words."""
    words = [_expected(option, name) for option in alternatives(kind)]
    return " or ".join([*words, "null"] if is_optional(kind) else words)


def _expected(kind: Any, name: str) -> str:
    if get_origin(kind) is Annotated:
        return str(get_args(kind)[-1].wanted)
    counted = COUNTED.search(_last(name)) is not None
    if get_origin(kind) is Literal:
        *others, last = map(str, get_args(kind))
        return f"{', '.join(others)} or {last}" if others else last
    if get_origin(kind) is list:
        return f"a list ({expected(get_args(kind)[0], name)} each)"
    if dataclasses.is_dataclass(kind):
        return f"a section with {', '.join(map(written_name, dataclasses.fields(kind)))}"
    if get_origin(kind) is tuple:
        return f"a list of {len(get_args(kind))} values"
    if kind is int:
        return "a whole number, such as 500000, 500k or 2B" if counted else "a whole number"
    if kind in (float, Fraction):
        return "a number, such as 500000, 500k or 2B" if counted else "a number"
    return {bool: "true or false", str: "text"}.get(kind, "a section with names and values")


def alternatives(kind: Any) -> Sequence[Any]:
    """The members of a union but None; text, which takes everything, last."""
    members = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
    return sorted((member for member in members if member is not types.NoneType), key=lambda member: member is str)


def is_optional(kind: Any) -> bool:
    """Whether null may stand there."""
    return types.NoneType in get_args(kind)


def _last(name: str) -> str:
    return re.sub(r"\[\d+\]", "", name).rsplit(".", 1)[-1]


class _MismatchError(Exception):
    """A value is not of a kind."""


@dataclasses.dataclass(frozen=True)
class Converter:
    """Makes of the values in one file or option what their fields ask for; what is refused is noted.

    Attributes:
        where: begins the messages
        refusals: gets them
        notes: gets what is to be said of settings by old names (see renamed.py)
    """

    where: str
    refusals: Refusals
    notes: list[str]

    def convert(self, kind: Any, value: Any, name: str) -> Any:
        """A value as its field wants it; WRONG, and noted, if it is of another kind."""
        if value is None and is_optional(kind):
            return None
        for option in _likely_first(alternatives(kind), value):
            try:
                return self._as(option, value, name)
            except _MismatchError:
                continue
        what = expected(kind, name)
        exact = number(value)
        if exact is not None and abs(exact) > LARGEST and "whole number" in what:
            what += f" up to {LARGEST}"
        if exact is None and isinstance(value, int | float | str) and LONG_NUMBER.fullmatch(str(value)):
            what += f" up to {LARGEST}" if "whole number" in what else " (a number has at most 40 digits, and 2 of exponent)"
        if exact is None and amount(value) is not None:
            what = what.replace("a whole number", "a whole number without a unit")
        return self._refuse(f"{name} is {shown(value)}; expected {what}")

    def option(self, kind: Any, text: str | None, name: str) -> Any:
        """The text of an option (None: it has none) as its field wants it."""
        if text is None:
            return self._refuse(f"--{name} has no value; expected {expected(kind, name)}")
        return self.convert(kind, _value_of(kind, text, name), name)

    def section(self, kind: Any, fields: Mapping[Any, Any], name: str) -> Given:
        """The fields of a section, converted."""
        hints, given = hints_of(kind), Given(kind)
        known = {written_name(field): field.name for field in dataclasses.fields(kind)}
        for written, value in current_fields(kind, fields, self.where, name, self.refusals, self.notes).items():
            dotted = f"{name}.{written}".lstrip(".")
            if written in known:
                given[known[written]] = self.convert(hints[known[written]], value, dotted)
            else:
                self._refuse(f"{dotted} is unknown; expected {nearest(str(written), list(known))}")
        return given

    def _refuse(self, message: str) -> _Wrong:
        self.refusals.add(InputError(self.where + message))
        return WRONG

    def _as(self, kind: Any, value: Any, name: str) -> Any:
        """A value as one kind; _MismatchError where it is another."""
        if kind is Any:
            return _numbers(value)
        if get_origin(kind) is Annotated:
            return _within(self._as(get_args(kind)[0], value, name), get_args(kind)[1:])
        if dataclasses.is_dataclass(kind) and isinstance(value, Mapping | None):
            return self.section(kind, value or {}, name)
        if get_origin(kind) is list and isinstance(value, list):
            (part_kind,) = get_args(kind)
            return [self.convert(part_kind, part, f"{name}[{i}]") for i, part in enumerate(value)]
        if get_origin(kind) is tuple and isinstance(value, list) and len(value) == len(get_args(kind)):
            parts = zip(get_args(kind), value, strict=True)
            return tuple(self.convert(part_kind, part, f"{name}[{i}]") for i, (part_kind, part) in enumerate(parts))
        if get_origin(kind) is dict and isinstance(value, Mapping):
            _, part_kind = get_args(kind)
            return {str(text_of(key)): self.convert(part_kind, part, f"{name}.{key}") for key, part in value.items()}
        if kind in SCALARS or get_origin(kind) is Literal:
            return _scalar(kind, value, name)
        raise _MismatchError


def _likely_first(options: Sequence[Any], value: Any) -> Sequence[Any]:
    """Of several kinds, for fields: without the sections that know none of them, the one that knows most first."""
    if len(options) == 1 or not isinstance(value, Mapping):
        return options

    def known(option: Any) -> int:
        return len({*map(written_name, dataclasses.fields(option))} & {*value})

    sections = [option for option in options if dataclasses.is_dataclass(option)]
    others = [option for option in options if option not in sections]
    return [*sorted(filter(known, sections), key=known, reverse=True), *others]


def _within(value: Any, limits: Sequence[Limits]) -> Any:
    """A value that is within its limits; _MismatchError where it is not. What was refused in it is no matter here."""
    try:
        right = all(limit.hold(value) for limit in limits)
    except RefusedValueError:
        return value
    if not right:
        raise _MismatchError
    return value


def _value_of(kind: Any, text: str, name: str) -> Any:
    """What the text of an option stands for: null, a list, fields, or itself."""
    if SEPARATOR in text:
        return text.split(SEPARATOR)
    limits = [get_args(option)[-1] for option in alternatives(kind) if get_origin(option) is Annotated]
    if any(limit.verbatim for limit in limits):
        return text
    options = [get_args(option)[0] if get_origin(option) is Annotated else option for option in alternatives(kind)]
    if text == "null" and is_optional(kind):
        return None
    if text[:1] in ("[", "{") and any(option not in SCALARS for option in options):
        return _structure(text, name, str in options)
    if any(get_origin(option) is list for option in options) and str not in options:
        return [text]  # a list of one
    return text


def _structure(text: str, name: str, or_text: bool) -> Any:
    """The list or fields that a text spells. `or_text`: the text where it spells no list (`[ab]*.jsonl`, `{name}.jsonl`)."""
    if not or_text:
        return parse_yaml(text, f"--{name}")
    try:
        value = parse_yaml(text, f"--{name}")
    except InputError:
        return text
    return value if isinstance(value, list) else text


def _scalar(kind: Any, value: Any, name: str) -> Any:
    text = text_of(value)
    if text is None:
        raise _MismatchError
    if kind is str and "\0" not in text:  # no name of a file has one, and whoever opens it would end with a traceback
        return text
    if get_origin(kind) is Literal and text in get_args(kind):
        return text
    if kind is bool and text.lower() in (*TRUE, *FALSE):
        return text.lower() in TRUE
    if kind is float and NOT_FINITE.fullmatch(text):
        return float(text.replace(".", ""))
    if kind in (int, float, Fraction):
        exact = number(value)
        if exact is None and COUNTED.search(_last(name)):
            whole = amount(value)
            exact = None if whole is None else Fraction(whole)
        if exact is not None and (kind is not int or (exact.denominator == 1 and abs(exact) <= LARGEST)):
            return kind(exact)
    raise _MismatchError


def _numbers(value: Any) -> Any:
    """Values of which nobody says what they are: what spells a number is one."""
    if isinstance(value, dict):
        return {str(text_of(name)): _numbers(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_numbers(part) for part in value]
    return plain_number(value) if isinstance(value, str) else value


def nearest(name: str, known: Sequence[str]) -> str:
    """What may have been meant, or all there is."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"{near[0]} (did you mean that?)" if near else f"one of {', '.join(known)}"
