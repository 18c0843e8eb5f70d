"""Files of `Reads`: Parquet, or one numpy array; beside each a JSON file that says what it was made from."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from megatron_cpt.mixture.document_reads import Reads
from megatron_cpt.utils.files import atomic_file

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


def manifest_of(output: str) -> str:
    """The JSON file beside a file of rows."""
    return output + ".json"


def write_reads(path: Path, pieces: Iterable[Reads], made_from: Mapping[str, Any]) -> int:
    """Write rows, and the JSON file beside them; returns how many. Both appear when all is complete.

    The rows come first, when the JSON file of what they replace is gone: it never says what other rows are.

    Args:
        made_from: what decides the rows; its `corpora` and `files` are the names behind their numbers
    """
    manifest = Path(manifest_of(str(path)))
    with atomic_file(manifest) as facts:
        with atomic_file(path) as stream:
            if path.suffix == ".npy":
                rows = _write_array(stream, pieces)
            else:
                rows = _write_parquet(stream, pieces, made_from["corpora"], made_from["files"])
            stream.flush()
            os.fsync(stream.fileno())
            content = {**made_from, "rows": rows, "bytes": stream.seek(0, os.SEEK_END)}
            text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
            facts.write(text.encode("utf-8", "backslashreplace"))  # halves of characters, as JSON writes them
            facts.flush()
            manifest.unlink(missing_ok=True)
        return rows


def is_of(path: Path, made_from: Mapping[str, Any]) -> bool:
    """Whether a file of rows is complete, and of just this."""
    try:
        known = json.loads(Path(manifest_of(str(path))).read_text(encoding="utf-8"))
        size = path.stat().st_size
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(known, dict) and {**made_from, "bytes": size}.items() <= known.items()


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
