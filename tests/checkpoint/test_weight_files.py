"""The files of a Hugging Face folder's weights are there, and whole, by what their headers say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_cpt.checkpoint.weight_files import check_weights
from megatron_cpt.utils.errors import InputError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two files of weights, of which one has an empty tensor, with an index."""
    tensors = {"a": {"x": torch.ones(30, 2), "none": torch.ones(0)}, "b": {"y": torch.ones(5, dtype=torch.bfloat16)}}
    names = {}
    for name, parts in tensors.items():
        save_file(parts, tmp_path / f"{name}.safetensors", metadata={"format": "pt"})
        names |= dict.fromkeys(parts, f"{name}.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    return tmp_path


def test_whole_files(folder: Path) -> None:
    check_weights(str(folder))


def test_each_file_that_is_cut_off_is_named(folder: Path) -> None:
    sizes = {}
    for name in ("a.safetensors", "b.safetensors"):
        path = folder / name
        sizes[name] = path.stat().st_size
        path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(InputError) as caught:
        check_weights(str(folder))
    expected = [f"{folder / name} has {size - 3} bytes; expected {size}, as its header says" for name, size in sizes.items()]
    assert [line.split(" (")[0] for line in str(caught.value).splitlines()] == expected


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "has 0 bytes and no whole header; expected a .safetensors file"),
        (b"version https://git-lfs.github.com/spec/v1\n", "has 43 bytes and no whole header"),
        (b"\x03" + bytes(7) + b"{}x", "its header is not JSON"),
        (b"\x08" + bytes(7) + b'{"x": 1}', "its header has a tensor without data_offsets"),
    ],
)
def test_what_is_no_file_of_weights(folder: Path, content: bytes, said: str) -> None:
    (folder / "b.safetensors").write_bytes(content)
    with pytest.raises(InputError) as caught:
        check_weights(str(folder))
    assert str(folder / "b.safetensors") in str(caught.value)
    assert said in str(caught.value)


def test_a_file_that_is_missing(folder: Path) -> None:
    (folder / "b.safetensors").unlink()
    with pytest.raises(InputError, match=r"b\.safetensors is missing; model\.safetensors\.index\.json names it"):
        check_weights(str(folder))
