"""What the converter writes is what megatron-core would write, chunk by chunk; damage is found, pickles run nothing."""

from __future__ import annotations

import io
import itertools
import os
import pickle
import re
import time
from argparse import Namespace
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import VARIANTS, make_tiny_llama
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, ChunkStorageMetadata, Metadata, MetadataIndex

from megatron_cpt.checkpoint.checkpoint_pickles import Opaque, load_settings
from megatron_cpt.checkpoint.hf_files import HfTensors
from megatron_cpt.checkpoint.layout import read_hf_files
from megatron_cpt.checkpoint.save_load import load_checkpoint, save_checkpoint
from megatron_cpt.checkpoint.torch_dist import Region, TorchDistReader, tiles
from megatron_cpt.convert.config import HfToMegatron, Verify
from megatron_cpt.convert.convert import hf_to_megatron
from megatron_cpt.convert.megatron_weights import open_megatron
from megatron_cpt.convert.verify import single_process_model, verify
from megatron_cpt.model.llama import read_llama_config
from megatron_cpt.utils.errors import InputError


def described(metadata: Metadata) -> dict[str, Any]:
    """Everything that .metadata says of the tensors."""
    return {
        key: "bytes"
        if isinstance(entry, BytesStorageMetadata)
        else (entry.size, entry.properties.dtype, sorted((tuple(c.offsets), tuple(c.sizes)) for c in entry.chunks))
        for key, entry in metadata.state_dict_metadata.items()
    }


def metadata_of(folder: Path) -> Any:
    """torch's own object, of a checkpoint that this test has made."""
    return pickle.loads((folder / ".metadata").read_bytes())


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_checkpoint_is_that_of_megatron_core(variant: str, tmp_path: Path, tiny_tokenizer_dir: str) -> None:
    """Names, shapes, chunks, dtypes, and that megatron-core loads it and writes the same numbers."""
    hf = make_tiny_llama(tmp_path / "hf", tiny_tokenizer_dir, torch.bfloat16, **VARIANTS[variant])
    ours = hf_to_megatron(HfToMegatron(hf, str(tmp_path / "ours")))
    with single_process_model(read_llama_config(hf), "bfloat16") as model:
        load_checkpoint(ours, [model])
        theirs = save_checkpoint(str(tmp_path / "theirs"), [model], read_hf_files(hf), {"kind": "test"})
    assert described(metadata_of(Path(ours))) == described(FileSystemReader(theirs).read_metadata())
    a, b = open_megatron(ours), open_megatron(theirs)
    for name, tensor in HfTensors(hf).items():
        assert torch.equal(a[name], tensor), name
        assert torch.equal(b[name], tensor), name


@pytest.fixture
def converted(tmp_path: Path, tiny_tokenizer_dir: str) -> Path:
    hf = make_tiny_llama(tmp_path / "hf", tiny_tokenizer_dir)
    return Path(hf_to_megatron(HfToMegatron(hf, str(tmp_path / "megatron"))))


def test_any_box_of_a_tensor_can_be_read(converted: Path) -> None:
    reader = TorchDistReader(str(converted))
    key = "decoder.layers.mlp.linear_fc1.weight"  # two chunks in each layer
    whole = reader.read(Region(key, (0, 0, 0), reader.shape(key)))
    for offset, shape in (((1, 100, 3), (2, 150, 40)), ((0, 159, 0), (4, 2, 64)), ((2, 0, 0), (1, 160, 64))):
        box = tuple(slice(start, start + length) for start, length in zip(offset, shape, strict=True))
        assert torch.equal(reader.read(Region(key, offset, shape)), whole[box])


def read_all(folder: Path) -> None:
    for tensor in open_megatron(str(folder)).values():
        assert tensor.numel()


def test_a_changed_bit_is_found(converted: Path) -> None:
    read_all(converted)
    path = converted / "__0_0.distcp"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"__0_0\.distcp is damaged at byte \d+, in tensor .*: wrong checksum"):
        read_all(converted)
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=r"is damaged at byte \d+, in tensor .*: the file ends at byte"):
        read_all(converted)
    path.unlink()
    with pytest.raises(InputError, match=r"__0_0\.distcp cannot be read: No such file"):
        read_all(converted)


def test_missing_and_foreign_tensors(converted: Path, tmp_path: Path) -> None:
    def changed(change: Any) -> None:
        metadata = metadata_of(converted)
        change(metadata)
        (converted / ".metadata").write_bytes(pickle.dumps(metadata))

    entries = metadata_of(converted).state_dict_metadata
    norm = "decoder.final_layernorm.weight"
    changed(lambda m: m.state_dict_metadata.pop(norm))
    with pytest.raises(InputError, match=f"tensor {re.escape(norm)} is missing"):
        read_all(converted)
    changed(lambda m: m.state_dict_metadata.update({norm: entries[norm], "decoder.layers.gate.weight": entries[norm]}))
    with pytest.raises(InputError, match=r"tensor decoder\.layers\.gate\.weight does not belong"):
        read_all(converted)
    changed(lambda m: m.state_dict_metadata.pop("decoder.layers.gate.weight"))
    changed(lambda m: m.state_dict_metadata["output_layer.weight"].chunks.clear())
    with pytest.raises(InputError, match=r"output_layer\.weight is not complete"):
        read_all(converted)


class Bomb:
    """Unpickling it runs a command."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


def test_unpickling_runs_nothing(converted: Path, tmp_path: Path) -> None:
    trace = tmp_path / "ran"
    metadata = metadata_of(converted)
    metadata.planner_data = Bomb(trace)
    (converted / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(InputError, match=r"it names posix\.system, which a checkpoint has no need of"):
        read_all(converted)
    settings = {"args": Namespace(num_layers=2, dtype=torch.bfloat16, act=torch.nn.functional.silu), "bomb": Bomb(trace)}
    torch.save(settings | {"weight": torch.ones(3)}, tmp_path / "common.pt")
    found = load_settings(str(tmp_path / "common.pt"))
    assert (found["args"].num_layers, found["args"].dtype) == (2, torch.bfloat16)
    assert isinstance(found["bomb"], Opaque)
    assert not trace.exists()


def with_evil_object(converted: Path, trace: Path) -> None:
    """Put an object that runs a command in the place of the empty states beside the weights."""
    content = io.BytesIO()
    torch.save(Bomb(trace), content)
    path = converted / "__0_0.distcp"
    offset = path.stat().st_size
    path.write_bytes(path.read_bytes() + content.getvalue())
    metadata = metadata_of(converted)
    for index, place in metadata.storage_data.items():
        if "_extra_state" in index.fqn:
            metadata.storage_data[index] = replace(place, offset=offset, length=len(content.getvalue()))
    (converted / ".metadata").write_bytes(pickle.dumps(metadata))
    (converted / "manifest.json").unlink()  # it has the old sizes


def test_loading_runs_nothing(converted: Path, tmp_path: Path) -> None:
    """Neither training nor verify look at these states, which Transformer Engine would unpickle."""
    trace = tmp_path / "ran"
    with_evil_object(converted, trace)
    with single_process_model(read_llama_config(str(converted / "hf")), "float32") as model:
        load_checkpoint(str(converted), [model])
    with pytest.raises(
        InputError, match=r"in decoder\.layers\..*_extra_state.*: it names posix\.system, which a checkpoint"
    ):
        TorchDistReader(str(converted)).object("decoder.layers.mlp.linear_fc1._extra_state/shard_0_4")
    assert "top-1 agreement 100" in verify(Verify(str(tmp_path / "hf"), str(converted), logits=True))
    assert not trace.exists()


def test_damage_is_found_by_comparing_logits(converted: Path, tmp_path: Path) -> None:
    path = converted / "__0_0.distcp"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    with pytest.raises(InputError, match="wrong checksum"):
        verify(Verify(str(tmp_path / "hf"), str(converted), tensors=False, logits=True))


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.storage_data.update({index: replace(place, offset=-5) for index, place in m.storage_data.items()}),
        lambda m: m.storage_data.update(dict.fromkeys(m.storage_data, 3)),
        lambda m: setattr(m.state_dict_metadata["output_layer.weight"], "size", "abc"),
        lambda m: setattr(m.state_dict_metadata["output_layer.weight"], "chunks", None),
        lambda m: setattr(m.state_dict_metadata["output_layer.weight"].properties, "dtype", "float32"),
        lambda m: delattr(m, "state_dict_metadata"),
    ],
)
def test_a_damaged_description_is_an_error(change: Any, converted: Path) -> None:
    metadata = metadata_of(converted)
    change(metadata)
    (converted / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(InputError, match=r"\.metadata cannot be read: "):
        read_all(converted)


GRID = st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(1, 3), st.integers(1, 3))


@given(parts=st.lists(GRID, max_size=6), whole=GRID)
def test_boxes_tile_another_if_each_point_is_in_one(parts: list[tuple[int, ...]], whole: tuple[int, ...]) -> None:
    def points(box: tuple[int, ...]) -> Counter[tuple[int, int]]:
        return Counter(itertools.product(range(box[0], box[0] + box[2]), range(box[1], box[1] + box[3])))

    counted = sum((points(part) for part in parts), Counter())
    assert tiles([(part[:2], part[2:]) for part in parts], (whole[:2], whole[2:])) == (counted == points(whole))


@given(cuts=st.lists(st.integers(1, 30), unique=True, max_size=8))
def test_parts_of_a_tensor_tile_it(cuts: list[int]) -> None:
    ends = [0, *sorted(cuts), 31]
    parts = [((begin, 5), (end - begin, 7)) for begin, end in itertools.pairwise(ends)]
    assert tiles(parts, ((0, 5), (31, 7)))


def describe(converted: Path, change: Any) -> None:
    metadata = metadata_of(converted)
    change(metadata)
    (converted / ".metadata").write_bytes(pickle.dumps(metadata))


def test_memory_is_asked_for_what_is_in_the_files_only(converted: Path) -> None:
    """A tensor of 512 GB, in two parts: no memory is asked for before it is known that the files are long enough."""

    def huge(metadata: Any) -> None:
        entry = metadata.state_dict_metadata["output_layer.weight"]
        entry.size = torch.Size((2**31, 64))
        half = torch.Size((2**30, 64))
        entry.chunks[:] = [ChunkStorageMetadata(torch.Size(at), half) for at in ((0, 0), (2**30, 0))]
        place = metadata.storage_data.pop(MetadataIndex("output_layer.weight", torch.Size((0, 0))))
        for number, chunk in enumerate(entry.chunks):
            index = MetadataIndex("output_layer.weight", chunk.offsets)
            metadata.storage_data[index] = replace(place, offset=place.offset + 4096 * number, length=4096)

    describe(converted, huge)
    reader = TorchDistReader(str(converted))
    with pytest.raises(InputError, match=r"output_layer\.weight: a part of it has 274877906944 bytes; its place has 4096"):
        reader.read(Region("output_layer.weight", (0, 0), (2**31, 64)))


@pytest.mark.parametrize("where", [{"offset": -5}, {"length": -1}, {"offset": True}, {"length": 2.0}])
def test_places_are_in_the_file(where: dict[str, Any], converted: Path) -> None:
    def move(metadata: Any) -> None:
        index, place = next(iter(metadata.storage_data.items()))
        metadata.storage_data[index] = replace(place, **where)

    describe(converted, move)
    with pytest.raises(InputError, match=r"\.metadata cannot be read: .* lies at byte .* bytes long"):
        TorchDistReader(str(converted))


def test_one_place_holds_one_tensor(converted: Path) -> None:
    def same(metadata: Any) -> None:
        one, other = (
            index
            for index in metadata.storage_data
            if index.fqn in ("output_layer.weight", "decoder.final_layernorm.weight")
        )
        metadata.storage_data[one] = metadata.storage_data[other]

    describe(converted, same)
    with pytest.raises(InputError, match=r"two tensors lie at byte \d+ of __0_0\.distcp"):
        TorchDistReader(str(converted))


def test_one_part_counts_as_often_as_it_is_named(converted: Path) -> None:
    """Entries that share one long list of chunks would take the memory of many."""

    def share(metadata: Any) -> None:
        entry = metadata.state_dict_metadata["output_layer.weight"]
        entry.chunks[:] = entry.chunks * 1000

    describe(converted, share)
    with pytest.raises(
        InputError, match=r"output_layer\.weight has 1000 chunks; expected no more than there are places for"
    ):
        TorchDistReader(str(converted))


def test_many_parts_take_little(converted: Path) -> None:
    """Twenty thousand chunks of one tensor are compared with each other in no time."""

    def many(metadata: Any) -> None:
        entry, count = metadata.state_dict_metadata["output_layer.weight"], 20_000
        entry.size = torch.Size((count, 64))
        entry.chunks[:] = [ChunkStorageMetadata(torch.Size((at, 0)), torch.Size((1, 64))) for at in range(count)]
        entry.chunks[-1] = entry.chunks[0]
        place = metadata.storage_data.pop(MetadataIndex("output_layer.weight", torch.Size((0, 0))))
        for chunk in entry.chunks:
            index = MetadataIndex("output_layer.weight", chunk.offsets)
            metadata.storage_data[index] = replace(place, offset=chunk.offsets[0], length=1)
        for number in range(10):  # for the chunk that is there twice
            metadata.storage_data[MetadataIndex(f"_extra_state/{number}")] = place

    describe(converted, many)
    reader, begin = TorchDistReader(str(converted)), time.process_time()
    with pytest.raises(InputError, match=r"two parts of tensor output_layer\.weight overlap"):
        reader.read(Region("output_layer.weight", (0, 0), (20_000, 64)))
    assert time.process_time() - begin < 10  # 0.3 s; 200 million comparisons take minutes
