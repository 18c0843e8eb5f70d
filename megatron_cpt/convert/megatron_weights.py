"""The weights of a Megatron checkpoint under Hugging Face's names."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping

import torch

from megatron_cpt.checkpoint.torch_dist import Region, TorchDistReader
from megatron_cpt.convert.hf_weights import (
    EMBEDDING,
    FC1,
    JOINED_NAMES,
    LAYER_NAMES,
    LAYERS,
    MODEL_NAMES,
    OTHER_NAMES,
    OUTPUT,
    pieces_of,
    split_qkv,
)
from megatron_cpt.model.llama import LlamaConfig, hf_shapes, read_llama_config
from megatron_cpt.utils.errors import InputError


class MegatronTensors(Mapping[str, torch.Tensor]):
    """The weights of a torch_dist checkpoint under HF's names, put together when asked for.

    Reads what this project writes and what Megatron-LM and Megatron-Bridge write: layers in one tensor or each in its own,
    norms under either name, embeddings with rows of padding at the end (left out), all below a prefix or not.

    Raises:
        InputError: a tensor is missing or has another shape than the configuration says
    """

    def __init__(self, reader: TorchDistReader, llama: LlamaConfig) -> None:
        self._reader, self._llama = reader, llama
        self._shapes = hf_shapes(llama)
        self._keys = set(reader.keys())
        prefixes = [key.removesuffix(EMBEDDING) for key in self._keys if key.endswith(EMBEDDING) and "optimizer." not in key]
        if len(prefixes) != 1:
            raise InputError(f"{reader.folder} holds no Llama model of Megatron's: {EMBEDDING} is not in it")
        self._prefix = prefixes[0]
        self._joined: tuple[str, list[torch.Tensor]] | None = None
        self._check()

    def __getitem__(self, name: str) -> torch.Tensor:
        key, layer, part = self._place(name)
        if part is None:
            return self._read(key, layer, 0, self._shapes[name])
        if key.startswith(FC1):
            return self._read(key, layer, part * self._llama.intermediate_size, self._shapes[name])
        wanted = f"{layer} {key}"
        if self._joined is None or self._joined[0] != wanted:  # queries, keys and values are asked for one after the other
            llama = self._llama
            rows = (llama.num_attention_heads + 2 * llama.num_key_value_heads) * llama.head_dim
            self._joined = (wanted, split_qkv(self._read(key, layer, 0, (rows, *self._shapes[name][1:])), llama))
        return self._joined[1][part]

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)

    @property
    def folder(self) -> str:
        """Of the checkpoint."""
        return self._reader.folder

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of all tensors."""
        return self._shapes

    def dtype(self, name: str) -> torch.dtype:
        """As it was saved."""
        key, layer, _ = self._place(name)
        return self._reader.dtype(self._stored(key, layer)[0])

    def _place(self, name: str) -> tuple[str, int | None, int | None]:
        """Megatron's name, the layer, and which part of what is joined."""
        if name in MODEL_NAMES:
            return MODEL_NAMES[name], None, None
        layer, _, below = name.removeprefix("model.layers.").partition(".")
        key, part = JOINED_NAMES[below] if below in JOINED_NAMES else (LAYER_NAMES[below], None)
        return key, int(layer), part

    def _stored(self, key: str, layer: int | None) -> tuple[str, bool]:
        """Under which of its possible names a tensor is there, and whether all layers are in it."""
        if layer is None:
            candidates = {self._prefix + key: False}
        else:
            candidates = {}
            for below in (key, OTHER_NAMES.get(key, key)):
                candidates[f"{self._prefix}{LAYERS}{below}"] = True
                candidates[f"{self._prefix}{LAYERS}{layer}.{below}"] = False
        for candidate, stacked in candidates.items():
            if candidate in self._keys:
                return candidate, stacked
        raise InputError(f"{self._reader.folder}: tensor {next(iter(candidates))} is missing")

    def _read(self, key: str, layer: int | None, row: int, shape: tuple[int, ...]) -> torch.Tensor:
        stored, stacked = self._stored(key, layer)
        rest = (row, *(0 for _ in shape[1:]))
        if not stacked:
            return self._reader.read(Region(stored, rest, shape))
        assert layer is not None
        return self._reader.read(Region(stored, (layer, *rest), (1, *shape))).reshape(shape)

    def _check(self) -> None:
        """The shapes of what is there, against the configuration."""
        llama = self._llama
        if llama.tie_word_embeddings and self._prefix + OUTPUT in self._keys:
            raise InputError(f"{self._reader.folder} has an {OUTPUT}, but tie_word_embeddings is true")
        for piece in pieces_of(llama, torch.float32):
            name = piece.sources[0]
            key, layer, _ = self._place(name)
            stored, stacked = self._stored(key, layer)
            found, wanted = (
                self._reader.shape(stored),
                piece.chunk.size if stacked or layer is None else piece.chunk.size[1:],
            )
            if key in (EMBEDDING, OUTPUT) and found[1:] == wanted[1:] and found[0] >= wanted[0]:
                continue  # rows of padding
            if found != wanted:
                shapes = f"has shape {list(found)}; the configuration asks for {list(wanted)}"
                raise InputError(f"{self._reader.folder}: tensor {stored} {shapes}")
        self._check_nothing_more()

    def _check_nothing_more(self) -> None:
        """No weights beside those, such as biases that the configuration does not know of."""
        known = {self._stored(*self._place(name)[:2])[0] for name in self._shapes}
        for key in sorted(self._keys - known):
            below = key.removeprefix(self._prefix)
            if below.startswith(("decoder.", "embedding.", "output_layer.")) and "_extra_state" not in below:
                raise InputError(f"{self._reader.folder}: tensor {key} does not belong to this architecture")


def open_megatron(folder: str) -> MegatronTensors:
    """The weights of a checkpoint that this project wrote.

    Raises:
        InputError: it cannot be read
    """
    return MegatronTensors(TorchDistReader(folder), read_llama_config(os.path.join(folder, "hf")))
