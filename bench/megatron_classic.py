"""What Megatron-LM's tools/preprocess_data.py does, for machines without a checkout of it: a process pool that parses and
tokenizes line by line, and megatron-core's own builder that takes the documents one by one.

    python -m bench.megatron_classic INPUT TOKENIZER_FOLDER OUTPUT_PREFIX WORKERS
"""

from __future__ import annotations

import json
import multiprocessing
import sys

from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
from transformers import AutoTokenizer

LINES_PER_TASK = 32


class Encoder:
    """Holds the tokenizer of a worker, which is loaded once in each."""

    tokenizer: object

    def __init__(self, path: str) -> None:
        self.path = path

    def load(self) -> None:
        """Run at the start of every worker."""
        Encoder.tokenizer = AutoTokenizer.from_pretrained(self.path)

    def encode(self, line: str) -> list[int]:
        """One JSON line -> ids with the end-of-document token."""
        tokenizer = Encoder.tokenizer
        ids = tokenizer(json.loads(line)["text"], add_special_tokens=False).input_ids  # type: ignore[operator]
        return [*ids, tokenizer.eos_token_id]  # type: ignore[attr-defined]


def main(source: str, tokenizer: str, prefix: str, workers: int) -> None:
    """Tokenize a JSON Lines file into prefix.bin and .idx."""
    encoder = Encoder(tokenizer)
    builder = IndexedDatasetBuilder(
        prefix + ".bin", dtype=DType.optimal_dtype(len(AutoTokenizer.from_pretrained(tokenizer)))
    )
    with open(source, encoding="utf-8") as lines, multiprocessing.Pool(workers, encoder.load) as pool:
        for ids in pool.imap(encoder.encode, lines, LINES_PER_TASK):
            builder.add_document(ids, [len(ids)])
    builder.finalize(prefix + ".idx")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))
