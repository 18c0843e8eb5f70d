"""The tokenizer alone: encode documents that are in memory already, on all cores, and print the seconds it took."""

from __future__ import annotations

import sys
import time

import awkward  # noqa: F401  (gigatoken imports it with the first result: not part of encoding)
import gigatoken
import orjson

if __name__ == "__main__":
    with open(sys.argv[1], "rb") as stream:
        documents = [orjson.loads(line)["text"] for line in stream]
    tokenizer = gigatoken.Tokenizer(sys.argv[2])
    began = time.perf_counter()
    tokenizer.encode_batch(documents, parallel=True)
    print(time.perf_counter() - began)
