"""Files of `Reads`: Parquet, or one numpy array; beside each a JSON file that says what it was made from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from megatron_cpt.data.document_reads import Reads
from megatron_cpt.data.indexed import atomic_file

FORMATS = (".parquet", ".npy")
ROW = np.dtype(
    [
        *((name, "<i8") for name in ("step", "sample")),
        ("corpus", "<i4"),
        *((name, "<i8") for name in ("document", "first_token")),
        *((name, "<i4") for name in ("tokens", "file")),
        ("line", "<i8"),
    ]
)
"""Of the array: `corpus` and `file` are places in the lists of the JSON file; -1 as file or line: not known."""


def write_reads(path: Path, pieces: Iterable[Reads], corpora: Sequence[str], files: Sequence[str]) -> int:
    """Write rows to a file that appears when it is complete; returns how many.

    `corpora`, `files`: the names behind the numbers of the rows.
    """
    with atomic_file(path) as stream:
        if path.suffix == ".npy":
            return _write_array(stream, pieces)
        return _write_parquet(stream, pieces, corpora, files)


def _write_parquet(stream: IO[bytes], pieces: Iterable[Reads], corpora: Sequence[str], files: Sequence[str]) -> int:
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = {"corpus": pa.array(corpora, pa.string()), "file": pa.array(files, pa.string())}
    kinds = {name: pa.dictionary(pa.int32(), pa.string()) for name in names}
    schema = pa.schema([(name, kinds.get(name, pa.int64())) for name in ROW.fields or ()])
    rows = 0
    with pq.ParquetWriter(stream, schema, compression="zstd") as writer:
        for reads in pieces:
            columns = []
            for name in schema.names:
                values = getattr(reads, name)
                unknown = values < 0
                if name in names:
                    values = pa.array(values.astype(np.int32), mask=unknown)
                    columns.append(pa.DictionaryArray.from_arrays(values, names[name]))
                else:
                    columns.append(pa.array(values, mask=unknown if name == "line" else None))
            writer.write_table(pa.Table.from_arrays(columns, schema=schema))
            rows += len(reads)
    return rows


def _write_array(stream: IO[bytes], pieces: Iterable[Reads]) -> int:
    """A .npy file of `ROW`s; how many there are is put into its header at the end, which numpy leaves room for."""
    rows = 0
    _write_header(stream, rows)
    begin = stream.tell()
    for reads in pieces:
        block = np.empty(len(reads), ROW)
        for name in ROW.fields or ():
            block[name] = getattr(reads, name)
        stream.write(block.tobytes())
        rows += len(reads)
    stream.seek(0)
    _write_header(stream, rows)
    assert stream.tell() == begin
    return rows


def _write_header(stream: IO[bytes], rows: int) -> None:
    header: dict[str, Any] = {"descr": np.lib.format.dtype_to_descr(ROW), "fortran_order": False, "shape": (rows,)}
    np.lib.format.write_array_header_1_0(stream, header)
