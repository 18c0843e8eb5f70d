"""Which files of a Hugging Face folder hold its weights. Imports no torch."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence

from megatron_cpt.checkpoint.layout import WEIGHT_INDICES
from megatron_cpt.model.hf_folder import ADAPTER_FILES
from megatron_cpt.model.llama import check_shape, hf_shapes, read_llama_config
from megatron_cpt.utils.errors import InputError, InputErrors, Refusals
from megatron_cpt.utils.input_files import check_folder, load_json, parse_json, shown

LENGTH = 8  # bytes with which a .safetensors file begins: the length of its header
MOST_HEADER = 100_000_000  # bytes that the library reads
WHOLE_FILES = ("model.safetensors", "pytorch_model.bin")  # of weights, in the order in which transformers looks for them


def weight_files(folder: str) -> list[str]:
    """The files that transformers would load the weights from; without the names it gives them, all .safetensors files.

    Raises:
        InputError: there is none, or one that an index names is missing; InputErrors: several of an index are
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

    Of a Llama's, also that no tensor is missing or of another shape. Those of other models are known to transformers alone
    (`load_hf_model`), and those in .bin files to torch.

    Raises:
        InputError: naming the file; InputErrors: several are missing bytes
    """
    refusals = Refusals()
    with refusals.noted():
        files = weight_files(folder)
        tensors = dict[str, tuple[int, ...]]()
        for name in files:
            with refusals.noted():
                if name.endswith(".safetensors"):
                    tensors |= check_safetensors(os.path.join(folder, name))
        if not refusals.errors and all(name.endswith(".safetensors") for name in files):
            check_tensors(folder, tensors)
    refusals.raise_any()


def check_tensors(folder: str, tensors: Mapping[str, tuple[int, ...]]) -> None:
    """Raise InputError unless a Llama's tensors are all there with their shapes, and none is of a layer that it lacks."""
    try:
        fields = load_json(os.path.join(folder, "config.json"))
        if not isinstance(fields, dict) or fields.get("model_type") != "llama" or "quantization_config" in fields:
            return
        llama = read_llama_config(folder)
    except (InputError, OSError):
        return  # `check_model` says so, or transformers knows more of configurations
    # As transformers reads them: the model without the class that adds the output layer has saved them without "model."
    own = {name if name.startswith(("model.", "lm_head.")) else f"model.{name}": shape for name, shape in tensors.items()}
    shapes = hf_shapes(llama)
    if missing := [name for name in shapes if name not in own]:
        raise InputError(f"{folder}: its weights lack {named(missing)}; expected all that config.json asks for")
    for name, shape in shapes.items():
        check_shape(folder, name, own[name], shape)
    layers = {int(match[1]) for name in own if (match := re.match(r"model\.layers\.(\d+)\.", name))}
    if beyond := sorted(layers - set(range(llama.num_hidden_layers))):
        raise InputError(
            f"{folder}: its weights have a layer {beyond[0]}, counted from 0; expected config.json's num_hidden_layers, "
            f"{llama.num_hidden_layers}"
        )


def named(tensors: Sequence[str]) -> str:
    """The first of some names, and how many more there are."""
    more = f" and {len(tensors) - 1:,} more" if len(tensors) > 1 else ""
    return f"tensor {tensors[0]}{more}"


def check_safetensors(path: str) -> dict[str, tuple[int, ...]]:
    """The shapes of its tensors; InputError unless a .safetensors file has the bytes that its header says."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(LENGTH), "little")
        if size < LENGTH or not 0 < length <= min(size - LENGTH, MOST_HEADER):
            raise InputError(f"{path} has {size:,} bytes and no whole header; expected a .safetensors file (is it cut off?)")
        fields = parse_json(file.read(length), f"{path}: its header")
    tensors = {name: value for name, value in fields.items() if name != "__metadata__"} if isinstance(fields, dict) else {}
    try:
        shapes = {name: tuple(int(length) for length in value["shape"]) for name, value in tensors.items()}
        expected = LENGTH + length + max((int(value["data_offsets"][1]) for value in tensors.values()), default=0)
    except (TypeError, ValueError, LookupError) as error:
        raise InputError(
            f"{path}: its header has a tensor without data_offsets or shape; expected a .safetensors file"
        ) from error
    if size != expected:
        raise InputError(f"{path} has {size:,} bytes; expected {expected:,}, as its header says (was it copied wholly?)")
    return shapes


def _named_files(folder: str, index: str, present: list[str]) -> list[str]:
    """Those that an index names."""
    path = os.path.join(folder, index)
    fields = load_json(path)
    files = fields.get("weight_map") if isinstance(fields, dict) else None
    if not isinstance(files, dict) or not files or not all(isinstance(name, str) for name in files.values()):
        raise InputError(f"{path} is not an index of weights: weight_map is {shown(files)}; expected {{tensor: file}}")
    names = sorted(set(files.values()))
    if missing := [os.path.join(folder, name) for name in names if name not in present]:
        raise InputErrors([InputError(f"{path} is missing; {index} names it") for path in missing])
    return names
