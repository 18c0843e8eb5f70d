"""Units of work -> documents: what a worker does before it tokenizes."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import IO, Any, NamedTuple

import orjson

from megatron_cpt.corpus.reading import (
    LineRange,
    Lines,
    Part,
    ReadOptions,
    RowGroup,
    Rows,
    TextFile,
    Texts,
    columns,
    field_type,
    holds_lists,
    open_parquet,
)
from megatron_cpt.corpus.sources import Source, open_file, open_source, printable
from megatron_cpt.utils.errors import InputError
from megatron_cpt.utils.input_files import not_utf8, wide_encoding


class Problem(NamedTuple):
    """A document that could not be taken. `record` counts lines or rows from 0 within its part."""

    record: int
    reason: str
    detail: str


@dataclass
class Content:
    """What one part holds. `records`: its lines or rows, documents or not; `metadata`: one JSON line a document."""

    source: int
    records: int = 0
    texts: list[str] = field(default_factory=list)
    metadata: list[bytes] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    def refuse(self, reason: str, detail: str) -> None:
        """Note that the current record gives no document."""
        self.problems.append(Problem(self.records, reason, detail))


def read_part(part: Part, sources: Sequence[Source], options: ReadOptions) -> Content:
    """Read and take apart one part. InputError: the file cannot be read at all."""
    content, source = Content(part.source), sources[part.source]
    try:
        _read(part, source, options, content)
    except (OSError, SystemError) as error:  # so pyarrow tells of what is damaged inside a page or a batch
        raise InputError(f"{printable(source.url)}: cannot be read ({' '.join(str(error).split())})") from None
    return content


def _read(part: Part, source: Source, options: ReadOptions, content: Content) -> None:
    match part:
        case LineRange():
            with open_file(source) as raw:
                data = _line_range(raw, part)
            _read_lines(data if part.start else data.removeprefix(codecs.BOM_UTF8), options, content)
        case Lines():
            _read_lines(part.data, options, content)
        case TextFile():
            with open_source(source) as (stream, _):
                _read_file(stream.read().removeprefix(codecs.BOM_UTF8), options, content)
        case Texts():
            _read_texts(part.texts, options, content)
        case RowGroup():
            with open_file(source) as raw:
                table = open_parquet(raw, source).read_row_group(part.group, columns(options), use_threads=False)
                _read_rows(table, options, content)
        case Rows():
            import pyarrow as pa

            _read_rows(pa.ipc.open_stream(part.data).read_all(), options, content)


def _line_range(raw: IO[bytes], part: LineRange) -> bytes:
    """The lines that begin in the range: a line that began before belongs to the part before."""
    position = part.start
    if position:
        raw.seek(position - 1)
        position -= 1
        while position < part.stop:  # a long line is passed over in pieces, and not beyond this part
            piece = raw.readline(1 << 20)
            position += len(piece)
            if not piece or piece.endswith(b"\n"):
                break
    if position >= part.stop:
        return b""
    data = raw.read(part.stop - position)
    return data if data.endswith(b"\n") else data + raw.readline()


def _read_lines(data: bytes, options: ReadOptions, content: Content) -> None:
    keys, metadata_keys = options.text_key.split("."), options.metadata_keys
    for line in _lines(data):
        try:
            value = text = parse_json_line(line)
            for key in keys:
                text = text[key]
            if type(text) is list and all(part is None or type(part) is str for part in text):
                text = "\n".join(part for part in text if part is not None)
            if type(text) is not str:
                raise TypeError
        except (orjson.JSONDecodeError, KeyError, TypeError) as error:
            if line and not bytes(line).isspace():  # blank lines are no documents
                content.refuse(*_what_is_wrong(bytes(line), options.text_key, error))
        else:
            if _take(text, options, content) and metadata_keys:
                content.metadata.append(_metadata(value, metadata_keys))
        content.records += 1


def parse_json_line(line: bytes | memoryview) -> Any:
    """The value of a line of JSON, with null for NaN and Infinity, which Python writes and JSON does not know.

    A byte order mark before it is passed over: files that have one are put together, too. JSONDecodeError: no JSON.
    """
    try:
        return orjson.loads(line)
    except orjson.JSONDecodeError as error:
        text = bytes(line)
        if text.startswith(codecs.BOM_UTF8):
            return _parse_with_nan(text.removeprefix(codecs.BOM_UTF8))
        return _parse_with_nan(text, error)


def _parse_with_nan(text: bytes, error: orjson.JSONDecodeError | None = None) -> Any:
    """As `parse_json_line`; `error`: what orjson has said of it already."""
    try:
        if error is None:
            return orjson.loads(text)
    except orjson.JSONDecodeError as found:
        error = found
    assert error is not None
    if b"NaN" not in text and b"Infinity" not in text and "infinity" not in error.msg:
        raise error
    try:
        value = json.loads(text.decode(), parse_int=_number, parse_constant=lambda name: None)
        return orjson.loads(orjson.dumps(value))  # what is infinite becomes null; lone surrogates are refused
    except (ValueError, TypeError, RecursionError):
        raise error from None


def _number(digits: str) -> int | float:
    """A whole number as orjson reads it: a float where it does not fit 64 bits."""
    return int(digits) if len(digits) < 19 else float(digits)


def _lines(data: bytes) -> Iterator[memoryview]:
    """Lines without their breaks, not copied; what follows the last break is one too, unless it is nothing."""
    view, begin = memoryview(data), 0
    while (end := data.find(b"\n", begin)) >= 0:
        yield view[begin:end]
        begin = end + 1
    if begin < len(data):
        yield view[begin:]


def _what_is_wrong(line: bytes, text_key: str, error: Exception) -> tuple[str, str]:
    """(reason, what was found and wanted) for a JSON line that gives no text."""
    if isinstance(error, orjson.JSONDecodeError):
        try:
            line.decode()
        except UnicodeDecodeError as bad:
            return "invalid_utf8", f"byte {bad.start} is not UTF-8; expected UTF-8 text"
        if line.lstrip().startswith(b"["):
            return "broken_json", "not valid JSON but the beginning of an array; expected one JSON object per line"
        if "surrogate" in error.msg:
            return "lone_surrogate", f"column {error.colno}: {error.msg}; expected whole characters"
        return "broken_json", f"not valid JSON (column {error.colno}: {error.msg}); expected one JSON object per line"
    value = parse_json_line(line)
    for key in text_key.split("."):
        if not isinstance(value, dict):
            return "no_object", f"found {type(value).__name__}; expected an object with field {text_key!r}"
        if key not in value:
            return "missing_text", f"no field {text_key!r}; found {sorted(value)}"
        value = value[key]
    if value is None:
        return "null_text", f"field {text_key!r} is null; expected a string"
    return "not_text", f"field {text_key!r} is {type(value).__name__}; expected a string"


def _metadata(value: Any, keys: Sequence[str]) -> bytes:
    """{key: value} of the wanted fields as a JSON line; null for a field that is missing."""
    found = {}
    for key in keys:
        inner = value
        for name in key.split("."):
            inner = inner.get(name) if isinstance(inner, dict) else None
        found[key] = inner
    return orjson.dumps(found, default=str, option=orjson.OPT_APPEND_NEWLINE)


def _take(text: str, options: ReadOptions, content: Content) -> bool:
    """Keep a text unless it is empty or longer than allowed."""
    if not text or text.isspace():
        content.refuse("empty", "no text but white space" if text else "no text")
        return False
    if len(text) > options.max_characters:
        content.refuse("too_long", f"{len(text):,} characters; expected at most {options.max_characters:,}")
        return False
    content.texts.append(text)
    return True


def _read_file(raw: bytes, options: ReadOptions, content: Content) -> None:
    """A file that is one document."""
    if encoding := wide_encoding(raw[:4]):
        content.refuse("invalid_utf8", not_utf8(encoding))
        content.records += 1
    else:
        _read_texts([raw], options, content)


def _read_texts(texts: Iterable[bytes | None], options: ReadOptions, content: Content) -> None:
    for raw in texts:
        if raw is None:
            content.refuse("too_long", f"expected at most {options.max_characters:,} characters")
        elif options.separator is not None and not raw.strip():
            pass  # nothing between two separators is no document
        elif _take_bytes(raw, options, content) and options.metadata_keys:
            content.metadata.append(_metadata({}, options.metadata_keys))
        content.records += 1


def _take_bytes(raw: bytes, options: ReadOptions, content: Content) -> bool:
    try:
        return _take(raw.decode(), options, content)
    except UnicodeDecodeError as error:
        content.refuse("invalid_utf8", f"byte {error.start} is not UTF-8; expected UTF-8 text")
        return False


def _read_rows(table: Any, options: ReadOptions, content: Content) -> None:
    texts = _texts(_column(table, options.text_key))
    metadata = [
        _values(_column(table, key), key) if field_type(table.schema, key, "") else [None] * table.num_rows
        for key in options.metadata_keys
    ]
    for row, raw in enumerate(texts):
        if raw is None:
            content.refuse("null_text", f"column {options.text_key!r} is null; expected a string")
        elif _take_bytes(raw, options, content) and metadata:
            found = {key: values[row] for key, values in zip(options.metadata_keys, metadata, strict=True)}
            content.metadata.append(orjson.dumps(found, default=str, option=orjson.OPT_APPEND_NEWLINE))
        content.records += 1


def _texts(column: Any) -> list[bytes | None]:
    """A column of text as bytes: one text that is not UTF-8 must not spoil the others. Lists: their strings as lines."""
    import pyarrow as pa

    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if not holds_lists(column.type):
        texts: list[bytes | None] = column.cast(pa.large_binary()).to_pylist()
        return texts
    rows = column.cast(pa.large_list(pa.large_binary())).to_pylist()
    return [None if row is None else b"\n".join(part for part in row if part is not None) for row in rows]


def _column(table: Any, key: str) -> Any:
    import pyarrow.compute as pc

    first, *inner = key.split(".")
    return pc.struct_field(table.column(first), inner) if inner else table.column(first)


def _values(column: Any, key: str) -> list[Any]:
    """A column as values that JSON knows. InputError: it has others."""
    import pyarrow as pa

    types = pa.types
    if any(is_a(column.type) for is_a in (types.is_string, types.is_large_string, types.is_binary, types.is_large_binary)):
        found = column.cast(pa.large_binary()).to_pylist()
        return [value if value is None else value.decode(errors="replace") for value in found]
    if pa.types.is_temporal(column.type):
        column = column.cast(pa.string())
    try:
        values: list[Any] = column.to_pylist()
    except ValueError as error:  # as nanoseconds inside lists, which Python has not
        raise InputError(f"column {key!r} of type {column.type} cannot be kept as metadata ({error})") from None
    return values
