"""Input files -> units of work -> documents.

A *unit* is about UNIT_BYTES of input, described so that a worker can read it by itself wherever that is possible: a byte
range of a plain JSON-lines file, a row group of a Parquet file, a text file. What can only be read from the beginning
(compressed files, Arrow streams, very large row groups, text with a separator) is read by the main process and carried
inside the unit. The units are a function of the files alone, so neither workers nor interruptions change a corpus.
"""

from __future__ import annotations

import codecs
import io
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import IO, Any, NamedTuple

import orjson

from megatron_cpt.data.sources import Source, open_file, open_source, printable
from megatron_cpt.errors import InputError

UNIT_BYTES = 2 << 20
MAX_ROW_GROUP_BYTES = 32 << 20  # uncompressed; larger ones are not handed to one worker


@dataclass(frozen=True)
class ReadOptions:
    """How documents lie in the files."""

    text_key: str = "text"
    metadata_keys: tuple[str, ...] = ()
    separator: str | None = None
    max_characters: int = 100_000_000


class LineRange(NamedTuple):
    """The JSON lines that begin in bytes [start, stop) of an uncompressed file."""

    source: int
    start: int
    stop: int


class RowGroup(NamedTuple):
    """One row group of a Parquet file."""

    source: int
    group: int


class TextFile(NamedTuple):
    """A whole file that is one document."""

    source: int


class Lines(NamedTuple):
    """JSON lines that were read already."""

    source: int
    data: bytes


class Texts(NamedTuple):
    """Documents that were read already, each as its bytes; None: one that is longer than any may be."""

    source: int
    texts: list[bytes | None]


class Rows(NamedTuple):
    """Rows that were read already: an Arrow IPC stream."""

    source: int
    data: bytes


Part = LineRange | RowGroup | TextFile | Lines | Texts | Rows


class Unit(NamedTuple):
    """Work for one worker; `read_bytes`: how much of the input files it stands for."""

    parts: list[Part]
    read_bytes: int


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


# --- main process: files -> units ---


def units(sources: Sequence[Source], options: ReadOptions, partition: tuple[int, int] = (0, 1)) -> Iterator[Unit]:
    """All units in order; of partition (i, n) only those whose input begins in the i-th n-th of all bytes.

    The documents of partitions 0 to n-1, one after the other, are those of (0, 1).
    """
    parts: list[Part] = []
    size = read_bytes = 0
    for i, (first, last) in _ranges(sources, partition):
        for part, part_size, part_read in _parts(i, sources[i], options, first, last):
            parts.append(part)
            size, read_bytes = size + part_size, read_bytes + part_read
            if size >= UNIT_BYTES:
                yield Unit(parts, read_bytes)
                parts, size, read_bytes = [], 0, 0
    if parts:
        yield Unit(parts, read_bytes)


def _ranges(sources: Sequence[Source], partition: tuple[int, int]) -> Iterator[tuple[int, tuple[int, int]]]:
    """(number of a source, bytes of it that belong to the partition); those may begin before it and end after it."""
    total, (index, count) = sum(source.bytes for source in sources), partition
    first, last = total * index // count, total * (index + 1) // count
    position = 0
    for i, source in enumerate(sources):
        begin, position = position, position + source.bytes
        at_end = begin == position == total and index == count - 1  # an empty file after everything else
        if first <= begin < last or begin < first < position or at_end:
            yield i, (first - begin, last - begin + at_end)


def sources_beginning_in(sources: Sequence[Source], partition: tuple[int, int]) -> list[Source]:
    """The sources whose first byte belongs to the partition: each is in one partition."""
    return [sources[i] for i, (first, _) in _ranges(sources, partition) if first <= 0]


def _parts(i: int, source: Source, options: ReadOptions, first: int, last: int) -> Iterator[tuple[Part, int, int]]:
    """(part, bytes of content, bytes of file) for what begins in bytes [first, last) of a file."""
    if source.format == "jsonl" and source.compression is None:
        for start in range(0, source.bytes, UNIT_BYTES):
            if first <= start < last:
                stop = min(start + UNIT_BYTES, source.bytes)
                yield LineRange(i, start, stop), stop - start, stop - start
    elif source.format == "parquet":
        yield from _row_groups(i, source, options, first, last)
    elif first <= 0 < last:
        if source.format == "text" and options.separator is None:
            yield TextFile(i), source.bytes, source.bytes
        else:
            readers = {"jsonl": _stream_lines, "text": _stream_texts, "arrow": _stream_arrow}
            yield from readers[source.format](i, source, options)


def _stream_lines(i: int, source: Source, options: ReadOptions) -> Iterator[tuple[Part, int, int]]:
    with open_source(source) as (stream, raw):
        before = 0
        while data := stream.read(UNIT_BYTES):
            data += stream.readline()  # never cut a line
            yield Lines(i, data if before else data.removeprefix(codecs.BOM_UTF8)), len(data), raw.tell() - before
            before = raw.tell()


def _stream_texts(i: int, source: Source, options: ReadOptions) -> Iterator[tuple[Part, int, int]]:
    """Documents between separators, some at a time; the rest after the last one waits for more."""
    assert options.separator
    separator = options.separator.encode()
    longest = 4 * options.max_characters  # in UTF-8
    with open_source(source) as (stream, raw):
        before = searched = 0
        too_long = False
        rest = bytearray(stream.read(len(codecs.BOM_UTF8)).removeprefix(codecs.BOM_UTF8))
        while data := stream.read(UNIT_BYTES):
            rest += data
            # one may be cut by the end of what was searched before
            end = rest.find(separator, max(0, searched - len(separator) + 1))
            if end >= 0:
                first: bytes | None = None if too_long else bytes(rest[:end])
                *more, last = bytes(rest[end + len(separator) :]).split(separator)
                yield Texts(i, [first, *more]), len(rest), raw.tell() - before
                before, rest, too_long = raw.tell(), bytearray(last), False
            elif len(rest) > longest:  # it will be refused: only remember that, and look for its end
                rest, too_long = rest[-len(separator) :], True
            searched = len(rest)
        ending: list[bytes | None] = [None] if too_long else [*bytes(rest).split(separator)]  # of a file of three bytes
        yield Texts(i, ending), len(rest), raw.tell() - before


def _stream_arrow(i: int, source: Source, options: ReadOptions) -> Iterator[tuple[Part, int, int]]:
    """Arrow IPC files and streams (`datasets` writes streams), a batch of rows at a time."""
    import pyarrow as pa

    with open_file(source) as raw:
        try:
            begin = raw.read(6)
            raw.seek(0)
            reader = pa.ipc.open_file(raw) if begin == b"ARROW1" else pa.ipc.open_stream(raw)
            _check_columns(reader.schema, source, options)
            batches = (reader.get_batch(k) for k in range(reader.num_record_batches)) if begin == b"ARROW1" else iter(reader)
            before = 0
            for batch in batches:
                for piece in _slices(batch, options):
                    yield piece._replace(source=i), len(piece.data), max(raw.tell() - before, 0)
                    before = raw.tell()
        except (pa.ArrowInvalid, OSError) as error:
            raise InputError(f"{printable(source.url)}: not a whole Arrow file or stream ({error})") from None


def _row_groups(i: int, source: Source, options: ReadOptions, first: int, last: int) -> Iterator[tuple[Part, int, int]]:
    import pyarrow.parquet as pq

    with open_file(source) as raw:
        file = _parquet(raw, source)
        _check_columns(file.schema_arrow, source, options)
        groups = [file.metadata.row_group(k) for k in range(file.metadata.num_row_groups)]
        rows = max(file.metadata.num_rows, 1)
        seen = 0
        for k, group in enumerate(groups):
            # a group's place in the file by its share of the rows: any rule will do that all partitions know
            start, seen = source.bytes * seen // rows, seen + group.num_rows
            if not first <= start < last:
                continue
            read = source.bytes * seen // rows - start
            if group.total_byte_size <= MAX_ROW_GROUP_BYTES:
                yield RowGroup(i, k), group.total_byte_size, read
                continue
            batch_rows = max(1, group.num_rows * UNIT_BYTES // group.total_byte_size)
            columns, batches = _columns(options), math.ceil(group.num_rows / batch_rows)
            for batch in pq.ParquetFile(raw).iter_batches(batch_rows, row_groups=[k], columns=columns, use_threads=False):
                for piece in _slices(batch, options):
                    yield piece._replace(source=i), len(piece.data), read // batches


def _parquet(raw: IO[bytes], source: Source) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(raw)
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"{printable(source.url)}: not a Parquet file ({error})") from None


def _columns(options: ReadOptions) -> list[str]:
    return [options.text_key, *options.metadata_keys]


def _check_columns(schema: Any, source: Source, options: ReadOptions) -> None:
    """InputError when a field is missing or the text is not text: in these files that holds for every row."""
    import pyarrow.types as types

    for key in _columns(options):
        found: Any = None
        fields = {f.name: f.type for f in schema}
        for name in key.split("."):
            if name not in fields:
                raise InputError(f"{printable(source.url)}: no column {key!r}; found {sorted(fields)}")
            found = fields[name]
            fields = {f.name: f.type for f in found.fields} if types.is_struct(found) else {}
        if types.is_dictionary(found):
            found = found.value_type
        is_text = types.is_string(found) or types.is_large_string(found) or types.is_string_view(found)
        if key == options.text_key and not (is_text or types.is_binary(found) or types.is_large_binary(found)):
            raise InputError(f"{printable(source.url)}: column {key!r} is {found}; wanted text")


def _slices(batch: Any, options: ReadOptions) -> Iterator[Rows]:
    """The wanted columns of a record batch, in pieces of about UNIT_BYTES (source 0, to be replaced)."""
    import pyarrow as pa

    names = list(dict.fromkeys(key.split(".")[0] for key in _columns(options)))
    batch = batch.select(names)
    rows = max(1, batch.num_rows * UNIT_BYTES // max(batch.nbytes, 1))
    for start in range(0, batch.num_rows, rows):
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, batch.schema) as writer:
            writer.write_batch(batch.slice(start, rows))
        yield Rows(0, sink.getvalue().to_pybytes())


def records_before(sources: Sequence[Source], index: int, partition: tuple[int, int]) -> int:
    """Lines or rows of source `index` before those that belong to the partition. Reads the file up to there."""
    position = dict(_ranges(sources, partition))[index][0]
    source = sources[index]
    if position <= 0:
        return 0
    with open_file(source) as raw:
        if source.format == "parquet":
            seen = 0
            metadata = _parquet(raw, source).metadata
            for k in range(metadata.num_row_groups):
                if source.bytes * seen // max(metadata.num_rows, 1) >= position:
                    break
                seen += metadata.row_group(k).num_rows
            return seen
        start = -(-position // UNIT_BYTES) * UNIT_BYTES
        breaks, left = 0, start - 1
        while left and (data := raw.read(min(left, 1 << 20))):
            breaks, left = breaks + data.count(b"\n"), left - len(data)
        return breaks + 1  # the line in which byte start - 1 lies belongs to the part before


# --- workers: units -> documents ---


def read_part(part: Part, sources: Sequence[Source], options: ReadOptions) -> Content:
    """Read and take apart one part. InputError: the file cannot be read at all."""
    content, source = Content(part.source), sources[part.source]
    try:
        _read(part, source, options, content)
    except OSError as error:  # pyarrow has an OSError for what is damaged inside a page
        raise InputError(f"{printable(source.url)}: cannot be read ({' '.join(str(error).split())})") from None
    return content


def _read(part: Part, source: Source, options: ReadOptions, content: Content) -> None:
    match part:
        case LineRange():
            with open_file(source) as raw:
                _read_lines(_line_range(raw, part), options, content, strip_bom=part.start == 0)
        case Lines():
            _read_lines(io.BytesIO(part.data), options, content, strip_bom=False)
        case TextFile():
            with open_source(source) as (stream, _):
                _read_texts([stream.read().removeprefix(codecs.BOM_UTF8)], options, content)
        case Texts():
            _read_texts(part.texts, options, content)
        case RowGroup():
            with open_file(source) as raw:
                table = _parquet(raw, source).read_row_group(part.group, _columns(options), use_threads=False)
                _read_rows(table, options, content)
        case Rows():
            import pyarrow as pa

            _read_rows(pa.ipc.open_stream(part.data).read_all(), options, content)


def _line_range(raw: IO[bytes], part: LineRange) -> Iterator[bytes]:
    """The lines that begin in the range: a line that began before belongs to the part before."""
    position = part.start
    if position:
        raw.seek(position - 1)
        position += len(raw.readline()) - 1
    if position >= part.stop:
        return
    for line in raw:
        yield line
        position += len(line)
        if position >= part.stop:
            return


def _read_lines(lines: Iterable[bytes], options: ReadOptions, content: Content, strip_bom: bool) -> None:
    keys, metadata_keys = options.text_key.split("."), options.metadata_keys
    for line in lines:
        if strip_bom and content.records == 0:
            line = line.removeprefix(codecs.BOM_UTF8)
        try:
            value = text = orjson.loads(line)
            for key in keys:
                text = text[key]
            if type(text) is not str:
                raise TypeError
        except (orjson.JSONDecodeError, KeyError, TypeError) as error:
            if not line.isspace() and line:  # blank lines are no documents
                content.refuse(*_what_is_wrong(line, options.text_key, error))
        else:
            if _take(text, options, content) and metadata_keys:
                content.metadata.append(_metadata(value, metadata_keys))
        content.records += 1


def _what_is_wrong(line: bytes, text_key: str, error: Exception) -> tuple[str, str]:
    """(reason, what was found and wanted) for a JSON line that gives no text."""
    if isinstance(error, orjson.JSONDecodeError):
        try:
            line.decode()
        except UnicodeDecodeError as bad:
            return "invalid_utf8", f"byte {bad.start} is not UTF-8; wanted UTF-8 text"
        if "surrogate" in error.msg:
            return "lone_surrogate", f"column {error.colno}: {error.msg}; wanted whole characters"
        return "broken_json", f"not valid JSON (column {error.colno}: {error.msg}); wanted one JSON object per line"
    value = orjson.loads(line)
    for key in text_key.split("."):
        if not isinstance(value, dict):
            return "no_object", f"found {type(value).__name__}; wanted an object with field {text_key!r}"
        if key not in value:
            return "missing_text", f"no field {text_key!r}; found {sorted(value)}"
        value = value[key]
    if value is None:
        return "null_text", f"field {text_key!r} is null; wanted a string"
    return "not_text", f"field {text_key!r} is {type(value).__name__}; wanted a string"


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
        content.refuse("too_long", f"{len(text):,} characters; wanted at most {options.max_characters:,}")
        return False
    content.texts.append(text)
    return True


def _read_texts(texts: Iterable[bytes | None], options: ReadOptions, content: Content) -> None:
    for raw in texts:
        if raw is None:
            content.refuse("too_long", f"wanted at most {options.max_characters:,} characters")
        elif options.separator is not None and not raw.strip():
            pass  # nothing between two separators is no document
        elif _take_bytes(raw, options, content) and options.metadata_keys:
            content.metadata.append(_metadata({}, options.metadata_keys))
        content.records += 1


def _take_bytes(raw: bytes, options: ReadOptions, content: Content) -> bool:
    try:
        return _take(raw.decode(), options, content)
    except UnicodeDecodeError as error:
        content.refuse("invalid_utf8", f"byte {error.start} is not UTF-8; wanted UTF-8 text")
        return False


def _read_rows(table: Any, options: ReadOptions, content: Content) -> None:
    import pyarrow as pa

    text = _column(table, options.text_key)
    if pa.types.is_dictionary(text.type):
        text = text.cast(text.type.value_type)
    texts = text.cast(pa.large_binary()).to_pylist()  # as bytes: one text that is not UTF-8 must not spoil the others
    metadata = [_values(_column(table, key)) for key in options.metadata_keys]
    for row, raw in enumerate(texts):
        if raw is None:
            content.refuse("null_text", f"column {options.text_key!r} is null; wanted a string")
        elif _take_bytes(raw, options, content) and metadata:
            found = {key: values[row] for key, values in zip(options.metadata_keys, metadata, strict=True)}
            content.metadata.append(orjson.dumps(found, default=str, option=orjson.OPT_APPEND_NEWLINE))
        content.records += 1


def _column(table: Any, key: str) -> Any:
    import pyarrow.compute as pc

    first, *inner = key.split(".")
    return pc.struct_field(table.column(first), inner) if inner else table.column(first)


def _values(column: Any) -> list[Any]:
    """A column as values that JSON knows."""
    import pyarrow as pa

    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        found = column.cast(pa.large_binary()).to_pylist()
        return [value if value is None else value.decode(errors="replace") for value in found]
    if pa.types.is_temporal(column.type):
        column = column.cast(pa.string())
    values: list[Any] = column.to_pylist()
    return values
