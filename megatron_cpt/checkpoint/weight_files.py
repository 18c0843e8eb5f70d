"""Which files of a Hugging Face folder hold its weights. Imports no torch."""

from __future__ import annotations

import os

from megatron_cpt.checkpoint.layout import WEIGHT_INDICES
from megatron_cpt.model.hf_folder import ADAPTER_FILES
from megatron_cpt.utils.errors import InputError, Refusals
from megatron_cpt.utils.input_files import check_folder, load_json, parse_json, shown

LENGTH = 8  # bytes with which a .safetensors file begins: the length of its header
MOST_HEADER = 100_000_000  # bytes that the library reads
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


def check_weights(folder: str) -> None:
    """Check that the files are there that the weights would be loaded from, and .safetensors files have all their bytes.

    Raises:
        InputError: naming the file; InputErrors: several are missing bytes
    """
    refusals = Refusals()
    with refusals.noted():
        for name in weight_files(folder):
            with refusals.noted():
                if name.endswith(".safetensors"):
                    check_safetensors(os.path.join(folder, name))
    refusals.raise_any()


def check_safetensors(path: str) -> None:
    """Raise InputError unless a .safetensors file has the bytes that its header says."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(LENGTH), "little")
        if size < LENGTH or not 0 < length <= min(size - LENGTH, MOST_HEADER):
            raise InputError(f"{path} has {size:,} bytes and no whole header; expected a .safetensors file (is it cut off?)")
        fields = parse_json(file.read(length), f"{path}: its header")
    tensors = {name: value for name, value in fields.items() if name != "__metadata__"} if isinstance(fields, dict) else {}
    try:
        expected = LENGTH + length + max((int(value["data_offsets"][1]) for value in tensors.values()), default=0)
    except (TypeError, ValueError, LookupError) as error:
        raise InputError(f"{path}: its header has a tensor without data_offsets; expected a .safetensors file") from error
    if size != expected:
        raise InputError(f"{path} has {size:,} bytes; expected {expected:,}, as its header says (was it copied wholly?)")


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
