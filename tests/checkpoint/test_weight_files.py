"""The files of a Hugging Face folder's weights are there, and whole, by what their headers say."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import make_tiny_llama

from megatron_cpt.checkpoint.hf_model import load_hf_model
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
        (b"\x1e" + bytes(7) + b'{"x": {"data_offsets": [0,0]}}', "its header has a tensor without data_offsets or shape"),
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


def test_all_files_that_are_missing(folder: Path) -> None:
    for name in ("a", "b"):
        (folder / f"{name}.safetensors").unlink()
    with pytest.raises(InputError) as caught:
        check_weights(str(folder))
    assert [line.split()[0] for line in str(caught.value).splitlines()] == [
        str(folder / f"{name}.safetensors") for name in ("a", "b")
    ]


# --- tensors of a model: transformers makes up what it does not find ---

DOWN = "model.layers.{}.mlp.down_proj.weight"


def without_prefix(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As LlamaModel, which has no output layer, saves them; the output layer beside them."""
    return {name.removeprefix("model."): value for name, value in tensors.items()}


def changed(tiny_hf: str, folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> str:
    """The tiny model with other tensors."""
    shutil.copytree(tiny_hf, folder)
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})
    return str(folder)


@pytest.mark.parametrize(
    ("lost", "said"),
    [
        ([DOWN.format(1)], f"tensor {DOWN.format(1)};"),
        (["lm_head.weight", DOWN.format(3)], f"tensor {DOWN.format(3)} and 1 more;"),
    ],
)
def test_tensors_that_are_missing(tiny_hf: str, tmp_path: Path, lost: list[str], said: str) -> None:
    model = changed(tiny_hf, tmp_path / "m", lambda all_: {name: value for name, value in all_.items() if name not in lost})
    with pytest.raises(InputError) as caught:
        check_weights(model)
    assert f"{model}: its weights lack {said} expected all that config.json asks for" in str(caught.value)
    with pytest.raises(InputError, match="its weights lack tensor"):
        load_hf_model(model)


@pytest.mark.parametrize("change", [dict, lambda tensors: {name.removeprefix("model."): tensors[name] for name in tensors}])
def test_a_tensor_of_another_shape(tiny_hf: str, tmp_path: Path, change: Callable[..., dict[str, torch.Tensor]]) -> None:
    """transformers prints a table, and says in its last line which of its options to set."""
    model = changed(tiny_hf, tmp_path / "m", lambda all_: change(all_ | {DOWN.format(1): torch.ones(63, 160)}))
    said = rf"tensor {DOWN.format(1)} has shape \[63, 160\]; config\.json asks for \[64, 160\]"
    with pytest.raises(InputError, match=f"^{re.escape(model)}: {said}$"):
        check_weights(model)
    with pytest.raises(InputError, match=f"^model {re.escape(model)}: {said}$"):
        load_hf_model(model)


def test_numbers_that_are_not_finite(tiny_hf: str, tmp_path: Path) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensors[DOWN.format(1)][0, 0] = float("nan")
        return tensors

    model = changed(tiny_hf, tmp_path / "m", spoil)
    with pytest.raises(InputError, match=f"tensor {DOWN.format(1)} holds numbers that are not finite"):
        load_hf_model(model)


def test_a_tensor_of_a_layer_that_there_is_not(tiny_hf: str, tmp_path: Path) -> None:
    model = changed(tiny_hf, tmp_path / "m", lambda all_: all_ | {DOWN.format(4): torch.ones(64, 160)})
    with pytest.raises(InputError, match=r"have a layer 4, counted from 0; expected config.json's num_hidden_layers, 4"):
        check_weights(model)


@pytest.mark.parametrize("change", [dict, without_prefix], ids=["as saved", "without the class of the output layer"])
def test_whole_models(tiny_hf: str, tmp_path: Path, change: Callable[..., dict[str, torch.Tensor]]) -> None:
    model = changed(tiny_hf, tmp_path / "m", change)
    check_weights(model)
    assert load_hf_model(model).num_parameters() > 0


def test_a_shared_output_layer_is_not_missed(tmp_path: Path, tiny_tokenizer_dir: str) -> None:
    model = make_tiny_llama(tmp_path / "tied", tiny_tokenizer_dir, tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(tmp_path / "tied" / "model.safetensors")
    check_weights(model)
    assert load_hf_model(model).num_parameters() > 0


def test_tensors_of_another_model_are_known_to_transformers(tmp_path: Path) -> None:
    import transformers

    config = transformers.GPT2Config(vocab_size=50, n_positions=16, n_embd=8, n_layer=1, n_head=2)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    path = tmp_path / "gpt2" / "model.safetensors"
    load_hf_model(str(path.parent))
    tensors = load_file(path)
    del tensors["transformer.h.0.mlp.c_proj.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    check_weights(str(path.parent))
    with pytest.raises(InputError, match=r"its weights lack tensor transformer\.h\.0\.mlp\.c_proj\.weight; expected"):
        load_hf_model(str(path.parent))
    save_file(tensors | {"transformer.h.0.mlp.c_proj.weight": torch.ones(31, 8)}, path, metadata={"format": "pt"})
    check_weights(str(path.parent))
    with pytest.raises(InputError, match=r"c_proj\.weight has shape \[31, 8\]; config\.json asks for \[32, 8\]$"):
        load_hf_model(str(path.parent))
