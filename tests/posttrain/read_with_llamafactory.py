"""What LLaMA-Factory's own parsers make of an exported folder, as JSON; run by a Python that has it installed.

Usage: python read_with_llamafactory.py FOLDER YAML
"""

from __future__ import annotations

import json
import sys

import yaml
from llamafactory.data.converter import align_dataset
from llamafactory.data.parser import get_dataset_list
from llamafactory.hparams.parser import _parse_train_args


def main(folder: str, path: str) -> None:
    from datasets import load_dataset

    with open(path, encoding="utf-8") as file:
        model, data, training, *_ = _parse_train_args(yaml.safe_load(file))
    (train,) = get_dataset_list(["train"], folder)
    rows = load_dataset("json", data_files=f"{folder}/{train.dataset_name}", split="train")
    found = {
        "formatting": train.formatting,
        "messages": train.messages,
        "ranking": train.ranking,
        "cutoff_len": data.cutoff_len,
        "learning_rate": training.learning_rate,
        "model": model.model_name_or_path,
        "rows": list(align_dataset(rows, train, data, training)),
    }
    print("\n" + json.dumps(found, ensure_ascii=False))


if __name__ == "__main__":
    main(*sys.argv[1:])
