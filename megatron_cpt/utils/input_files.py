"""Files that somebody else wrote, read with limits: no file makes a tool hang, run out of memory or crash.

YAML is read as what is written means (YAML 1.2's core schema, and stricter): `no` is text, not false; `1:04` is text, not
64; `0777` is text, not 511. A scalar becomes a number only when that number would be written the same way (`12`, `0.33`).
Whatever else looks like one (`1e-5`, `1_000`, `010`) stays text, which `number` reads exactly where a number is expected.
"""

from __future__ import annotations

import codecs
import json
import os
import re
import stat
import tempfile
from collections.abc import Callable, Hashable
from fractions import Fraction
from typing import Any

import yaml

from megatron_cpt.utils.errors import InputError

MOST_YAML_BYTES = 1 << 20
MOST_JSON_BYTES = 256 << 20  # ten times the largest tokenizer.json
READ_WHOLE = (".json", ".jinja", ".txt", ".yaml", ".yml", ".model", ".tiktoken", ".py")  # endings of such files
CHAT_TEMPLATES = "additional_chat_templates"  # the one folder that belongs to a tokenizer
MOST_YAML_VALUES = 50_000  # aliases count as often as they are used
DEEPEST = 60  # lists and fields within each other
UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}

_TAG = "tag:yaml.org,2002:"
_INTEGER = re.compile(r"-?(0|[1-9]\d{0,17})", re.ASCII)
# Digits enough for any number of a configuration; few enough that none takes long to read or is too large for a float.
_NUMBER = re.compile(r"[-+]?(\d{1,40}(\.\d{0,40})?|\.\d{1,40})(e[-+]?\d{1,2})?", re.ASCII | re.IGNORECASE)
_RATIO = re.compile(r"(\d{1,40})/(\d{1,40})", re.ASCII)
_PLAIN = ("plain", "int", "float", "bool", "null", "merge")  # tags of what is read as `plain_value` reads it
_WORDS = {"": None, "~": None, "null": None, "true": True, "false": False}


def number(value: Any) -> Fraction | None:
    """The exact number that a value is or, as text, spells (`1e-5`, `1_000`, `1/3`); None where it spells none.

    0.1 is one tenth, not the nearest binary number. A leading zero (`010`), which some read as octal, spells none.
    """
    if not isinstance(value, int | float | str):  # True, an int, spells none
        return None
    text = re.sub(r"(?<=\d)_(?=\d)", "", str(value).strip())
    ratio = _RATIO.fullmatch(text)
    if ratio:
        return Fraction(int(ratio[1]), int(ratio[2])) if int(ratio[2]) else None
    if not _NUMBER.fullmatch(text) or re.match(r"[-+]?0\d", text):
        return None
    return Fraction(text)


def amount(value: Any) -> int | None:
    """A whole number of tokens or samples, also with a unit (`2B`, `1.7T`, `500k`, `500_000`); None where it is none."""
    found = re.fullmatch(r"(.*?) *([kmbt]?)", str(value).strip().lower())
    size = number(found[1]) if found else None
    size = None if size is None or found is None else size * UNITS[found[2]]
    return None if size is None or size.denominator != 1 else int(size)


def text_of(value: Any) -> str | None:
    """A scalar of `load_yaml` as it was written; None for what is no scalar, or null."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value) if isinstance(value, int | float | str) else None


def plain_value(text: str) -> Any:
    """What an unquoted scalar of YAML is: null, true, false, a number that would be written the same way, else text."""
    if text in _WORDS:
        return _WORDS[text]
    if _INTEGER.fullmatch(text) and text != "-0":
        return int(text)
    if len(text) < 30 and _NUMBER.fullmatch(text) and repr(float(text)) == text:
        return float(text)
    return text


def plain_number(text: str) -> Any:
    """As `plain_value`, but whatever spells a number is one (`1e-5`)."""
    value = plain_value(text)
    exact = number(value) if isinstance(value, str) else None
    if exact is None:
        return value
    return int(exact) if re.fullmatch(r"[-+]?[\d_]+", text) else float(exact)


class _Loader(yaml.SafeLoader):  # in Python: libyaml's parser crashes on deep nesting
    """YAML of text, numbers, lists and fields, nothing else, within the limits."""

    _depth = 0
    _values = 0

    def __init__(self, text: str, plain: Callable[[str], Any]) -> None:
        super().__init__(text)
        self.plain = plain

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self._depth += 1
        self._values += 1
        if self._values > MOST_YAML_VALUES:
            raise _refusal(f"more than {MOST_YAML_VALUES} values", self.peek_event())
        if self._depth > DEEPEST:
            raise _refusal(f"more than {DEEPEST} lists and fields within each other", self.peek_event())
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def resolve(self, kind: type[yaml.Node], value: Any, implicit: Any) -> str:
        if kind is not yaml.ScalarNode:
            return str(super().resolve(kind, value, implicit))
        if value == "<<" and implicit[0]:
            return _TAG + "merge"
        return _TAG + ("plain" if implicit[0] else "str")

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _refusal("a list or fields as the name of a field", key)
            if key.value in seen:
                raise _refusal(f"field {key.value!r} is given twice", key)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.yaml_constructors = {
    _TAG + "str": lambda loader, node: loader.construct_scalar(node),
    _TAG + "map": lambda loader, node: loader.construct_mapping(node, deep=True),
    _TAG + "seq": lambda loader, node: loader.construct_sequence(node, deep=True),
    **{_TAG + kind: lambda loader, node: loader.plain(node.value) for kind in _PLAIN},
    None: lambda loader, node: _unknown_tag(node),
}


def _refusal(problem: str, place: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(None, None, problem, place.start_mark)


def _unknown_tag(node: yaml.Node) -> Any:
    raise _refusal(f"the tag {node.tag.replace(_TAG, '!!')}; expected none, which only programs write", node)


def _size(node: yaml.Node, sizes: dict[int, int | None]) -> int:
    """Number of values in a node, each alias counted as often as it is used."""
    if id(node) in sizes:
        size = sizes[id(node)]
        if size is None:
            raise _refusal("an alias that contains itself", node)
        return size
    sizes[id(node)] = None
    parts: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        parts = [part for pair in node.value for part in pair]
    elif isinstance(node, yaml.SequenceNode):
        parts = node.value
    size = 1 + sum(_size(part, sizes) for part in parts)
    if size > MOST_YAML_VALUES:
        raise _refusal(f"more than {MOST_YAML_VALUES} values, aliases included", node)
    sizes[id(node)] = size
    return size


def parse_yaml(text: str, where: str, plain: Callable[[str], Any] = plain_value) -> Any:
    """The value of a YAML text; `where` begins the message of an error, `plain` reads unquoted scalars.

    Raises:
        InputError: it is no YAML, gives a field twice, or goes beyond the limits
    """
    try:
        loader = _Loader(text, plain)
        node = loader.get_single_node()
        if node is None:
            return None
        _size(node, {})
        return loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = "" if mark is None else f"line {mark.line + 1}: "
        problem = _one_line(f"{error.context or ''} {error.problem or ''}")
        raise InputError(f"{where} is not YAML: {line}{problem}") from error
    except yaml.reader.ReaderError as error:
        number_of_line = text.count("\n", 0, error.position) + 1
        raise InputError(
            f"{where} is not YAML: line {number_of_line}: character {error.character:#x}; expected text"
        ) from error
    except (yaml.YAMLError, ValueError) as error:
        raise InputError(f"{where} is not YAML: {_one_line(error)}") from error
    except RecursionError as error:  # through aliases, whose depths add up
        raise InputError(f"{where} is not YAML: lists and fields too deep within each other") from error


def load_yaml(path: str | os.PathLike[str], what: str = "", plain: Callable[[str], Any] = plain_value) -> dict[str, Any]:
    """The fields of a YAML file; none where it is empty. `what` it is (`mixture file`) begins the message of an error.

    `plain` reads unquoted scalars: `plain_number` where the fields are not read by somebody who knows which are numbers.

    Raises:
        InputError: it cannot be read, or is not YAML, or goes beyond the limits
    """
    where = f"{what} {os.fspath(path)}".lstrip()
    fields = parse_yaml(decoded(_read(path, where, MOST_YAML_BYTES), where), where, plain)
    if fields is None:
        return {}
    if not isinstance(fields, dict):
        raise InputError(f"{where} is {shown(fields)}; expected fields (name: value)")
    return fields


def decoded(content: bytes, where: str) -> str:
    """The text that a file holds, without the mark that some editors put in front; `where` begins the message of an error.

    Raises:
        InputError: it is not UTF-8
    """
    if wide := wide_encoding(content):
        raise InputError(f"{where} {not_utf8(wide)}")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{where} is no text: byte {error.start} is not UTF-8; expected UTF-8 text") from error


def wide_encoding(begin: bytes) -> str | None:
    """The encoding, by iconv's name, of a text that begins so: by its mark, or by the zeros around an ASCII character.

    None: it seems to be one of single bytes, as UTF-8.
    """
    if begin.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return "UTF-32"
    if begin.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "UTF-16"
    if any(0 < byte < ord("\t") for byte in begin[:4]):
        return None  # no text
    zeros = "".join("0" if byte == 0 else "x" for byte in begin[:4])
    wide = {"x000": "UTF-32LE", "000x": "UTF-32BE"}.get(zeros)
    return wide or {"x0": "UTF-16LE", "0x": "UTF-16BE"}.get(zeros[:2])


def not_utf8(encoding: str) -> str:
    """What to say of a text in an encoding of `wide_encoding`."""
    return f"is {encoding}; expected UTF-8, as iconv -f {encoding} -t UTF-8 makes of it"


def load_json(path: str | os.PathLike[str], what: str = "") -> Any:
    """The value in a JSON file.

    Raises:
        InputError: it cannot be read, is no JSON, or goes beyond the limits
    """
    where = f"{what} {os.fspath(path)}".lstrip()
    check_plain_file(path, where)
    return parse_json(_read(path, where, MOST_JSON_BYTES), where)


def parse_json(content: bytes | str, where: str) -> Any:
    """The value of a JSON text; `where` begins the message of an error.

    Raises:
        InputError: it is no JSON, or has more than `DEEPEST` lists and objects within each other
    """
    try:
        value = json.loads(content)
    except RecursionError as error:
        raise InputError(f"{where} is not JSON: {_TOO_DEEP}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{where} is not JSON: byte {error.start} is not {error.encoding.upper()}") from error
    except ValueError as error:  # also numbers of thousands of digits
        raise InputError(f"{where} is not JSON: {_one_line(error)}") from error
    if too_deep(value):
        raise InputError(f"{where} is not JSON: {_TOO_DEEP}")
    return value


_TOO_DEEP = f"more than {DEEPEST} lists and objects within each other"


def too_deep(value: Any) -> bool:
    """Whether a value has more than `DEEPEST` lists and objects within each other."""
    level = [value]
    for _ in range(DEEPEST + 1):
        level = [part for whole in level if isinstance(whole, (list, dict)) for part in _parts(whole)]
        if not level:
            return False
    return True


def _parts(whole: list[Any] | dict[str, Any]) -> Any:
    return whole.values() if isinstance(whole, dict) else whole


def shown(value: Any, most: int = 100) -> str:
    """A value as a message shows it, cut where it is long."""
    text = {None: "null", True: "true", False: "false"}.get(value) if value is None or isinstance(value, bool) else None
    text = text or _one_line(repr(value))
    return text if len(text) <= most else f"{text[: most - 3]}..."


def _one_line(words: Any) -> str:
    return " ".join(str(words).split())


def check_folder(folder: str | os.PathLike[str], links: bool = True) -> None:
    """Raise InputError if a file in a folder of a stranger would be waited for, or fill the memory, whoever opens it.

    That is a pipe or a device, and a file of text or JSON of more than `MOST_JSON_BYTES`. `links`: whether a name may stand
    for a file elsewhere; not where it would be copied into what people pass on.
    """
    for entry in os.scandir(folder):
        if entry.is_symlink() and not links and not _in_hub_cache(entry.path):
            raise InputError(f"{entry.path} is a symbolic link; expected a plain file")
        if entry.name == CHAT_TEMPLATES and entry.is_dir():
            check_folder(entry.path, links)
        check_plain_file(entry.path, entry.path)
        if entry.name.endswith(READ_WHOLE) and entry.is_file() and (size := entry.stat().st_size) > MOST_JSON_BYTES:
            raise InputError(f"{entry.path} has {size:,} bytes; expected at most {MOST_JSON_BYTES:,}")


def _in_hub_cache(path: str) -> bool:
    """Whether a link leads to where huggingface_hub keeps the files of the same model (`blobs` beside `snapshots`)."""
    blobs = os.path.dirname(os.path.realpath(path))
    here = os.path.realpath(os.path.dirname(path))
    return os.path.basename(blobs) == "blobs" and here.startswith(os.path.join(os.path.dirname(blobs), "snapshots") + os.sep)


def why_unreadable(path: str) -> str | None:
    """Why a path is no file that this user may read; None: it is one."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return "no such file"
    except OSError as error:
        return error.strerror
    if not stat.S_ISREG(mode):
        return "it is a folder" if stat.S_ISDIR(mode) else "it is a pipe or a device"
    return None if os.access(path, os.R_OK) else "Permission denied"


def why_unwritable(folder: str) -> str | None:
    """Why a folder can neither be written to nor be made by this user; None: it can.

    Rights are not all there is: root has those to /proc, or to a server that lets no root write. So a file is begun, which
    has no name where the system can do that, and stays nowhere.
    """
    place = os.path.abspath(folder)
    while not os.path.lexists(place):
        place = os.path.dirname(place)
    if not os.path.isdir(place):
        return f"{place} is no folder"
    if not os.access(place, os.W_OK | os.X_OK):
        return f"{place} cannot be written to: Permission denied"
    try:
        with tempfile.TemporaryFile(dir=place):
            return None
    except OSError as error:
        return f"{place} cannot be written to: {error.strerror}"


def check_plain_file(path: str | os.PathLike[str], where: str) -> None:
    """Raise InputError if a path is a pipe, a device or a socket, which may have no end; what is missing is passed over."""
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise InputError(f"{where} is a pipe or a device; expected a plain file")


def _read(path: str | os.PathLike[str], where: str, most: int) -> bytes:
    try:
        with open(path, "rb") as file:
            content = file.read(most + 1)
    except OSError as error:
        raise InputError(f"{where}: {error.strerror}") from error
    if len(content) > most:
        raise InputError(f"{where} has more than {most:,} bytes; expected fewer")
    return content
