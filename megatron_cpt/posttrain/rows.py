"""Rows of JSON, JSON Lines and Parquet files, with the numbers under which people find them again."""

from __future__ import annotations

import codecs
import os
from collections.abc import Iterator
from typing import Any

import orjson
import pyarrow
import pyarrow.parquet

from megatron_cpt.posttrain.conversations import RowError
from megatron_cpt.utils.errors import InputError
from megatron_cpt.utils.input_files import not_utf8, wide_encoding

ENDINGS = (".json", ".jsonl", ".parquet")


def read_source_rows(path: str) -> Iterator[tuple[int, Any]]:
    """(number of the row or line, from 1; the row, or the RowError that it cannot be read with).

    Raises:
        InputError: the file is missing, of another kind, or as a whole not what its ending says
    """
    if not os.path.isfile(path):
        raise InputError(f"{path}: no such file")
    ending = os.path.splitext(path)[1]
    if ending not in ENDINGS:
        raise InputError(f"{path} ends in {ending or 'nothing'}; expected one of {', '.join(ENDINGS)}")
    if ending != ".parquet":
        _refuse_wide(path)
    if ending == ".parquet":
        yield from enumerate(_parquet_rows(path), 1)
    elif ending == ".json":
        yield from enumerate(_json_rows(path), 1)
    else:
        yield from _lines(path)


def check_rows(path: str) -> None:
    """Raise InputError unless a file is as a whole what its ending says: its first row is looked for, and no further one."""
    for _ in read_source_rows(path):
        return


def _refuse_wide(path: str) -> None:
    with open(path, "rb") as file:
        encoding = wide_encoding(file.read(4))
    if encoding:
        raise InputError(f"{path}: {not_utf8(encoding)}")


def without_mark(text: bytes) -> bytes:
    """Without the mark that some editors put at the beginning of UTF-8."""
    return text.removeprefix(codecs.BOM_UTF8)


def _lines(path: str) -> Iterator[tuple[int, Any]]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            line = without_mark(line) if number == 1 else line
            if not line.strip():
                continue
            try:
                yield number, orjson.loads(line)
            except orjson.JSONDecodeError as error:
                yield number, RowError("not JSON", str(error))


def _json_rows(path: str) -> list[Any]:
    with open(path, "rb") as file:
        try:
            rows = orjson.loads(without_mark(file.read()))
        except orjson.JSONDecodeError as error:
            raise InputError(f"{path} is not JSON: {error}; files with an object on each line end in .jsonl") from error
    if not isinstance(rows, list):
        raise InputError(f"{path} holds a JSON {type(rows).__name__}; expected a list of rows")
    return rows


def _parquet_rows(path: str) -> Iterator[Any]:
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path} is not Parquet, or damaged: {' '.join(str(error).split())[:200]}") from error
