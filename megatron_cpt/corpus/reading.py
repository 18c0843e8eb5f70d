"""Input files -> units of work.

A *unit* is about UNIT_BYTES of input, described so that a worker can read it by itself wherever that is possible: a byte
range of a plain JSON-lines file, a row group of a Parquet file, a text file. What can only be read from the beginning
(compressed files, JSON arrays, Arrow streams, very large row groups, text with a separator) is read by the main process
and carried inside the unit. The units are a function of files and partition alone, so neither workers nor interruptions
change a corpus.
"""

from __future__ import annotations

import codecs
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any, NamedTuple

import orjson

from megatron_cpt.corpus.json_arrays import PEEK_BYTES, array_elements, begins_array
from megatron_cpt.corpus.sources import Source, open_file, open_source, printable
from megatron_cpt.utils.errors import InputError
from megatron_cpt.utils.input_files import not_utf8, wide_encoding

UNIT_BYTES = 2 << 20
MAX_ROW_GROUP_BYTES = 32 << 20  # uncompressed; larger ones are not handed to one worker
MAX_ROW_GROUP_ROWS = 2_000  # nor are those of more rows: the same text many times over takes no bytes in the file
MAX_BATCH_ROWS = 1000


@dataclass(frozen=True)
class ReadOptions:
    """How documents lie in the files."""

    text_key: str = "text"
    metadata_keys: tuple[str, ...] = ()
    separator: str | None = None
    max_characters: int = 100_000_000
    optional_metadata: bool = False
    """Whether tables may lack a column of `metadata_keys`, which is then null, as in JSON."""


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


def units(sources: Sequence[Source], options: ReadOptions, partition: tuple[int, int] = (0, 1)) -> Iterator[Unit]:
    """All units in order; of partition (i, n) only those whose input begins in the i-th n-th of all bytes.

    The documents of partitions 0 to n-1, one after the other, are those of (0, 1).
    """
    parts: list[Part] = []
    size = read_bytes = 0
    for i, (first, last) in _ranges(sources, partition):
        try:
            for part, part_size, part_read in _parts(i, sources[i], options, first, last):
                parts.append(part)
                size, read_bytes = size + part_size, read_bytes + part_read
                if size >= UNIT_BYTES:
                    yield Unit(parts, read_bytes)
                    parts, size, read_bytes = [], 0, 0
        except OSError as error:
            raise InputError(f"{printable(sources[i].url)}: cannot be read ({' '.join(str(error).split())})") from None
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
    if source.format == "jsonl" and source.compression is None and not _is_array(source):
        stop = min(last, source.bytes)
        for start in range(max(first, 0), stop, UNIT_BYTES):
            size = min(UNIT_BYTES, stop - start)
            yield LineRange(i, start, start + size), size, size
    elif source.format == "parquet":
        yield from _row_groups(i, source, options, first, last)
    elif first <= 0 < last:
        if source.format == "text" and options.separator is None:
            yield TextFile(i), source.bytes, source.bytes
        elif source.format == "jsonl" and _is_array(source):
            yield from _stream_array(i, source, options)
        else:
            readers = {"jsonl": _stream_lines, "text": _stream_texts, "arrow": _stream_arrow}
            yield from readers[source.format](i, source, options)


def _is_array(source: Source) -> bool:
    """Whether a file of JSON is one array. InputError: it is UTF-16 or UTF-32."""
    with open_source(source) as (stream, _):
        begin = stream.read(PEEK_BYTES)
    _refuse_wide(begin, source)
    return begins_array(begin)


def _refuse_wide(begin: bytes, source: Source) -> None:
    if encoding := wide_encoding(begin):
        raise InputError(f"{printable(source.url)}: {not_utf8(encoding)}")


def _stream_array(i: int, source: Source, options: ReadOptions) -> Iterator[tuple[Part, int, int]]:
    """A JSON array as JSON lines, one for each element; a string in it stands for an object with that text."""
    with open_source(source) as (stream, raw):
        before, lines, size = 0, [], 0
        for element in array_elements(stream, printable(source.url)):
            lines.append(_with_key(element, options.text_key) if element.startswith(b'"') else element)
            size += len(element) + 1
            if size >= UNIT_BYTES:
                yield Lines(i, b"\n".join([*lines, b""])), size, raw.tell() - before
                before, lines, size = raw.tell(), [], 0
        if lines:
            yield Lines(i, b"\n".join([*lines, b""])), size, raw.tell() - before


def _with_key(element: bytes, key: str) -> bytes:
    """A JSON value as the field `key` (dots: of objects in objects) of an object."""
    for name in reversed(key.split(".")):
        element = b"{%s: %s}" % (orjson.dumps(name), element)
    return element


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
        begin = stream.read(4)
        _refuse_wide(begin, source)
        rest = bytearray(begin.removeprefix(codecs.BOM_UTF8))
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
        ending: list[bytes | None] = [None] if too_long else [*bytes(rest).split(separator)]  # of a file of four bytes
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
        file = open_parquet(raw, source)
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
            if group.total_byte_size <= MAX_ROW_GROUP_BYTES and group.num_rows <= MAX_ROW_GROUP_ROWS:
                yield RowGroup(i, k), group.total_byte_size, read
                continue
            batch_rows = min(MAX_BATCH_ROWS, max(1, group.num_rows * UNIT_BYTES // group.total_byte_size))
            batches = math.ceil(group.num_rows / batch_rows)
            for batch in pq.ParquetFile(raw).iter_batches(
                batch_rows, row_groups=[k], columns=columns(options), use_threads=False
            ):
                for piece in _slices(batch, options):
                    yield piece._replace(source=i), len(piece.data), read // batches


def open_parquet(raw: IO[bytes], source: Source) -> Any:
    """A `ParquetFile`. InputError when it is none."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(raw)
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"{printable(source.url)}: not a Parquet file ({error})") from None


def columns(options: ReadOptions) -> list[str]:
    """The columns of a table that are wanted: the text, then the metadata."""
    return [options.text_key, *options.metadata_keys]


def field_type(fields: Any, key: str, where: str) -> Any:
    """The type of a column, dots reaching into structs; None when there is none.

    `fields`: a schema or struct type. InputError: two columns have that name.
    """
    first, _, rest = key.partition(".")
    found = [field.type for field in fields if field.name == first]
    if len(found) > 1:
        raise InputError(f"{where}: has {len(found)} columns {first!r}; expected one")
    if not found or not rest:
        return found[0] if found else None
    return field_type(_fields_of(found[0]), rest, where)


def _fields_of(kind: Any) -> list[Any]:
    import pyarrow.types as types

    return list(kind.fields) if types.is_struct(kind) else []


def _check_columns(schema: Any, source: Source, options: ReadOptions) -> None:
    """InputError when a field is missing or the text is not text: in these files that holds for every row."""
    where = printable(source.url)
    for key in columns(options):
        found = field_type(schema, key, where)
        if found is None and (key == options.text_key or not options.optional_metadata):
            raise InputError(f"{where}: no column {key!r}; found {_names_near(schema, key)}")
        if key == options.text_key and not _is_text(found):
            raise InputError(f"{where}: column {key!r} is {found}; expected text")


def _names_near(schema: Any, key: str) -> list[str]:
    """The names of the columns, or of the fields of the innermost struct on the way to `key` that is there."""
    fields = list(schema)
    for name in key.split("."):
        inside = [field for field in fields if field.name == name]
        if not inside:
            break
        fields = _fields_of(inside[0].type)
    return sorted(field.name for field in fields)


def _is_text(kind: Any) -> bool:
    """Whether a column holds text: strings, bytes, nothing at all, or lists of strings."""
    import pyarrow.types as types

    if holds_lists(kind) or types.is_dictionary(kind):
        kind = kind.value_type
    is_string = types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)
    return bool(is_string or types.is_binary(kind) or types.is_large_binary(kind) or types.is_null(kind))


def holds_lists(kind: Any) -> bool:
    """Whether a column holds lists."""
    import pyarrow.types as types

    return bool(types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind))


def _slices(batch: Any, options: ReadOptions) -> Iterator[Rows]:
    """The wanted columns of a record batch, in pieces of about UNIT_BYTES (source 0, to be replaced)."""
    import pyarrow as pa

    wanted = dict.fromkeys(key.split(".")[0] for key in columns(options))
    names = [name for name in wanted if name in batch.schema.names]
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
            metadata = open_parquet(raw, source).metadata
            for k in range(metadata.num_row_groups):
                if source.bytes * seen // max(metadata.num_rows, 1) >= position:
                    break
                seen += metadata.row_group(k).num_rows
            return seen
        breaks, left = 0, position - 1
        while left and (data := raw.read(min(left, 1 << 20))):
            breaks, left = breaks + data.count(b"\n"), left - len(data)
        return breaks + 1  # the line in which byte position - 1 lies belongs to the part before
