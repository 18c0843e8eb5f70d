"""Which files of a Hugging Face folder hold its weights. Imports no torch."""

from __future__ import annotations

import os

from megatron_cpt.checkpoint.layout import WEIGHT_INDICES
from megatron_cpt.errors import InputError
from megatron_cpt.input_files import check_folder, load_json, shown
from megatron_cpt.model.hf_folder import ADAPTER_FILES

WHOLE_FILES = ("model.safetensors", "pytorch_model.bin")  # of weights, in the order in which transformers looks for them


def weight_files(folder: str) -> list[str]:
    """The files that transformers would load the weights from; without the names it gives them, all .safetensors files.

    Raises:
        InputError: there is none, or one that an index names is missing
    """
    if not os.path.isdir(folder):
        raise InputError(f"{folder}: no such folder")
    check_folder(folder)
    present = sorted(os.listdir(folder))
    for whole, index in zip(WHOLE_FILES, WEIGHT_INDICES, strict=True):
        if whole in present:
            return [whole]
        if index in present:
            return _named_files(folder, index, present)
        start, end = os.path.splitext(whole)
        # "consolidated" are Meta's names for the same numbers
        others = [n for n in present if n.endswith(end) and (n.startswith(start) or end != ".bin")]
        others = [n for n in others if not n.startswith("consolidated") and n not in ADAPTER_FILES]
        if others:
            return others
    raise InputError(f"{folder} holds no .safetensors file and no pytorch_model.bin; expected weights")


def _named_files(folder: str, index: str, present: list[str]) -> list[str]:
    """Those that an index names."""
    path = os.path.join(folder, index)
    fields = load_json(path)
    named = fields.get("weight_map") if isinstance(fields, dict) else None
    if not isinstance(named, dict) or not named or not all(isinstance(name, str) for name in named.values()):
        raise InputError(f"{path} is not an index of weights: weight_map is {shown(named)}; expected {{tensor: file}}")
    names = set(named.values())
    for name in sorted(names):
        if name not in present:
            raise InputError(f"{os.path.join(folder, name)} is missing; {index} names it")
    return sorted(names)
