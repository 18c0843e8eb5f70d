"""Configuration files and options -> frozen dataclasses, with every mistake named: `FILE: FIELD is VALUE; expected WHAT`.

A section is a dataclass; its fields are numbers, text, switches, choices, lists, tables of names (`dict`) or sections.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import Any, TypeVar, get_args, get_origin

from megatron_cpt.config.partial import partial
from megatron_cpt.config.renamed import current_name, note
from megatron_cpt.config.values import WRONG, Converter, Given, alternatives, expected, hints_of, nearest, written_name
from megatron_cpt.utils.errors import FieldError, InputError, Refusals
from megatron_cpt.utils.input_files import load_yaml

Config = TypeVar("Config")


class ConfigReader:
    """Takes files and options in their order, the later ones winning, and makes a configuration of them.

    Everything that is wrong with them is collected, for `config` to raise at once.
    """

    def __init__(self, config_class: type, where: str = "") -> None:
        """`where`: begins messages about what is not given at all, as that of the one file that should have it."""
        self.given = Given(config_class)
        self.where = where
        self.refusals = Refusals()
        self.notes: list[str] = []  # on old names of settings, for `print_notes`
        self._all_read = True
        self._origin: dict[str, str] = {}  # dotted name -> "FILE: " that gave it, "" for an option

    def file(self, path: str) -> None:
        """Take all of a YAML file."""
        try:
            self.fields(load_yaml(path, "configuration"), f"{path}: ")
        except InputError as error:
            self.refusals.add(error)
            self._all_read = False

    def fields(self, fields: Mapping[Any, Any], where: str) -> None:
        """Take fields and sections; `where` begins the messages about them."""
        section = Converter(where, self.refusals, self.notes).section(self.given.kind, fields, "")
        _merge(self.given, section)
        self._origin |= dict.fromkeys(_dotted(section), where)

    def option(self, name: str, text: str | None) -> None:
        """Take `--NAME TEXT`; the name is dotted. None: there is no text, which is wrong."""
        name, given = current_name(self.given.kind, name), name
        if name != given:
            self.notes.append(note(f"--{given}", f"--{name}"))
        with self.refusals.noted():
            _set(self.given, name, text, Converter("", self.refusals, self.notes))
        self._origin = {known: file for known, file in self._origin.items() if not known.startswith(f"{name}.")}
        self._origin[name] = ""

    def config(self) -> Any:
        """The configuration. What was refused (see `refusals`) cannot be read in it (see partial.py)."""
        return self._build(self.given, "")

    @contextlib.contextmanager
    def located(self) -> Iterator[None]:
        """Put the file that gave a setting in front of the messages ("FIELD is VALUE; ...") of the block, a check of it."""
        refusals, placed = Refusals(), Refusals()
        with refusals.noted():
            yield
        for error in refusals.errors:
            found = re.match(r"([\w.]+)[^:]* is ", str(error))
            placed.add(InputError(self._nearest_origin(found[1] if found else "") + str(error)))
        placed.raise_any()

    def _nearest_origin(self, field: str) -> str:
        """What gave a field, or the section or table that it is in."""
        while field and field not in self._origin:
            field = field.rpartition(".")[0]
        return self._origin.get(field, "")

    def plain(self) -> dict[str, Any]:
        """All settings as plain values, those not given with their defaults; null for those that must be given.

        Raises:
            InputError: something in files or options is wrong
        """
        self.refusals.raise_any()
        return _with_defaults(self.given.kind, self.given)

    def _build(self, given: Given, name: str) -> Any:
        """A section; what is wrong with it is noted, and cannot be read in it."""
        hints = hints_of(given.kind)
        values: dict[str, Any] = {}
        for field in dataclasses.fields(given.kind):
            kind, dotted = hints[field.name], f"{name}.{written_name(field)}".lstrip(".")
            if field.name in given:
                values[field.name] = self._assemble(given[field.name], dotted)
            elif not self._all_read:  # it may be in the file that cannot be read
                values[field.name] = WRONG
            elif _is_required(field) and dataclasses.is_dataclass(kind):
                values[field.name] = self._build(Given(kind), dotted)  # names what is missing in it
            elif _is_required(field):
                values[field.name] = WRONG
                self.refusals.add(InputError(self.where + f"{dotted} is missing; expected {expected(kind, dotted)}"))
        return self._checked(given.kind, values, name)

    def _checked(self, kind: type, values: Mapping[str, Any], name: str) -> Any:
        """A section with these values, after its own checks; with what these make of the values."""
        refused, found = {field for field, value in values.items() if value is WRONG}, Refusals()
        section = partial(kind, values, refused)
        with found.noted():
            if hasattr(section, "__post_init__"):
                section.__post_init__()
            if not refused:
                return kind(**values)
        for error in found.errors:
            self.refusals.add(InputError(self._located(str(error), kind, name)))
            if isinstance(error, FieldError):
                refused.add(error.field)
        return partial(kind, vars(section), refused & {field.name for field in dataclasses.fields(kind)})

    def _assemble(self, value: Any, name: str) -> Any:
        if isinstance(value, Given):
            return self._build(value, name)
        if isinstance(value, list):
            return [self._assemble(part, f"{name}[{i}]") for i, part in enumerate(value)]
        if isinstance(value, dict):
            return {key: self._assemble(part, f"{name}.{key}") for key, part in value.items()}
        return value

    def _located(self, message: str, kind: type, name: str) -> str:
        """The message of a section's own check, with the section and the file in front of the field."""
        first = re.match(r"[\w.\[\]]*", message)
        field = first[0] if first else ""
        if name and re.split(r"[.\[]", field)[0] in {field.name for field in dataclasses.fields(kind)}:
            message, field = f"{name}.{message}", f"{name}.{field}"
        return self._origin.get(re.sub(r"\[\d+\].*", "", field), self.where) + message


def config_from(config_class: type[Config], fields: Mapping[Any, Any], where: str) -> Config:
    """A configuration from the fields of a file named `where`. Old names are read; that a note says so, a check sees to.

    Raises:
        InputError: naming the file, the field, the value found and the value expected
    """
    reader = ConfigReader(config_class, f"{where}: ")
    reader.fields(fields, reader.where)
    config: Config = reader.config()
    reader.refusals.raise_any()
    return config


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _merge(old: Given, new: Given) -> None:
    """Put `new` over `old`, section by section."""
    for name, value in new.items():
        if isinstance(value, Given) and isinstance(old.get(name), Given):
            _merge(old[name], value)
        else:
            old[name] = value


def _set(given: Given, name: str, text: str | None, converter: Converter) -> None:
    """Put the text of an option at its dotted name.

    Raises:
        InputError: there is no such option
    """
    *sections, last = name.split(".")
    place: Any = given
    for i, part in enumerate(sections):
        kind = hints_of(place.kind).get(part) if isinstance(place, Given) else None
        inner = next((k for k in alternatives(kind) if dataclasses.is_dataclass(k) or get_origin(k) is dict), None)
        if inner is None:
            known = [field.name for field in dataclasses.fields(place.kind)] if isinstance(place, Given) else []
            dotted = ".".join(sections[: i + 1])
            if part in known:
                raise InputError(f"--{name}: {dotted} has no settings within it; expected --{dotted} VALUE")
            raise InputError(f"--{name}: {dotted} is unknown; expected {nearest(part, known)}")
        empty: Any = Given(inner) if isinstance(inner, type) and dataclasses.is_dataclass(inner) else {}
        if not isinstance(place.get(part), dict):
            place[part] = empty
        if not isinstance(place[part], Given):  # a table: what is left is the name in it
            key = ".".join([*sections[i + 1 :], last])
            place[part][key] = converter.option(get_args(inner)[1], text, name)
            return
        place = place[part]
    hints = hints_of(place.kind)
    if last not in hints:
        raise InputError(f"--{name} is unknown; expected {nearest(last, list(hints))}")
    place_given = Given(place.kind)
    place_given[last] = converter.option(hints[last], text, name)
    _merge(place, place_given)


def _with_defaults(kind: type, given: Mapping[str, Any]) -> dict[str, Any]:
    hints, plain = hints_of(kind), {}
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        if field.name in given:
            value = given[field.name]
        elif field.default_factory is not dataclasses.MISSING:
            value = field.default_factory()
        else:
            value = None if field.default is dataclasses.MISSING else field.default
        if isinstance(hint, type) and dataclasses.is_dataclass(hint) and not dataclasses.is_dataclass(value):
            value = _with_defaults(hint, value or {})
        plain[written_name(field)] = _plain(value)
    return plain


def _plain(value: Any) -> Any:
    if isinstance(value, Given):
        return _with_defaults(value.kind, value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, Fraction):
        return str(value)
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    return value


def _dotted(fields: Mapping[Any, Any], name: str = "") -> Iterator[str]:
    """The dotted names of all fields, sections included."""
    for field, value in fields.items():
        yield f"{name}{field}"
        if isinstance(value, Mapping):
            yield from _dotted(value, f"{name}{field}.")
