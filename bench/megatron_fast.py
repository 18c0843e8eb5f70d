"""The least that Megatron-LM's tools/preprocess_data_fast.py must take, for machines without a checkout of it: its imports,
gigatoken over the whole file, and one write of all tokens. What it does for each document is left out.

    python -m bench.megatron_fast INPUT TOKENIZER_FOLDER OUTPUT_PREFIX
"""

from __future__ import annotations

import sys

import awkward
import gigatoken
import megatron.core.datasets.indexed_dataset  # noqa: F401  (the tool imports it)
import numpy as np
from transformers import AutoTokenizer

if __name__ == "__main__":
    source, folder, prefix = sys.argv[1:4]
    AutoTokenizer.from_pretrained(folder)  # it asks this one for the vocabulary and the end-of-document token
    tokenizer = gigatoken.Tokenizer(f"{folder}/tokenizer.json")
    documents = tokenizer.encode_files(gigatoken.JsonlFileSource([source], field="text"))
    np.asarray(awkward.flatten(documents), dtype=np.int32).tofile(prefix + ".bin")
