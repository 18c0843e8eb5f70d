"""Pickles that would run something, and mutations of harmless ones."""

from __future__ import annotations

import pickle
import random
import struct
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

# What exploits are made of: functions that run something, and classes that lead to them
NAMES = [
    ("posix", "system"),
    ("os", "system"),
    ("builtins", "eval"),
    ("builtins", "exec"),
    ("builtins", "__import__"),
    ("builtins", "getattr"),
    ("builtins", "open"),
    ("builtins", "setattr"),
    ("builtins", "object.__subclasses__"),
    ("subprocess", "Popen"),
    ("functools", "partial"),
    ("functools", "reduce"),
    ("operator", "attrgetter"),
    ("operator", "methodcaller"),
    ("operator", "itemgetter"),
    ("operator", "call"),
    ("copyreg", "_reconstructor"),
    ("copyreg", "add_extension"),
    ("types", "FunctionType"),
    ("types", "CodeType"),
    ("pathlib", "PosixPath"),
    ("pathlib", "PosixPath.touch"),
    ("pathlib", "PosixPath.unlink"),
    ("torch", "load"),
    ("torch", "Size"),
    ("torch", "_utils._rebuild_tensor_v2"),
    ("torch", "serialization.os.system"),
    ("torch.hub", "load"),
    ("torch.storage", "_load_from_bytes"),
    ("torch.distributed.checkpoint.metadata", "Metadata.__init__"),
    ("torch.distributed.checkpoint.metadata", "os.system"),
    ("megatron.core.transformer.spec_utils", "ModuleSpec"),
    ("megatron.core.transformer.transformer_config", "TransformerConfig"),
    ("megatron.core.dist_checkpointing.strategies.async_utils", "AsyncRequest"),
    ("argparse", "Namespace"),
    ("enum", "Enum"),
    ("runpy", "_run_code"),
    ("ctypes", "string_at"),
]


def system_call(canary: Path) -> bytes:
    """Three instructions that run a command: the oldest exploit."""
    return b"\x80\x04c" + b"posix\nsystem\n" + text(f"touch {canary}") + b"\x85R."


def module_spec(canary: Path) -> bytes:
    """megatron-core's ModuleSpec is a dataclass whose instances import and call what they name."""
    spec = b"cmegatron.core.transformer.spec_utils\nModuleSpec\n("
    spec += b"(" + text("os") + text("system") + b"t}" + b"tR"
    return b"\x80\x04" + spec + b"(" + text(f"touch {canary}") + b"tR."


def text(value: str) -> bytes:
    """The instruction that pushes a text."""
    encoded = value.encode()
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def harmless() -> list[bytes]:
    """A description of a checkpoint, in several protocols, and settings."""
    tensor = TensorStorageMetadata(
        TensorProperties(torch.bfloat16), torch.Size([4, 2]), [ChunkStorageMetadata(torch.Size([0, 0]), torch.Size([4, 2]))]
    )
    places = {
        MetadataIndex("weight", torch.Size([0, 0])): _StorageInfo("__0_0.distcp", 0, 1000),
        MetadataIndex("state"): _StorageInfo("__0_0.distcp", 1000, 500),
    }
    metadata = Metadata({"weight": tensor, "state": BytesStorageMetadata()}, {"weight": ("weight",)}, places)
    settings = {
        "iteration": 3,
        "optimizer": {"groups": [{"lr": 1e-5, "betas": (0.9, 0.95), "on": True}]},
        "names": {"a", "b"},
    }
    return [pickle.dumps(content, protocol) for content in (metadata, settings) for protocol in (2, 4, 5)]


def mutations(seed: int, count: int, canary: Path) -> Iterator[bytes]:
    """Pickles, most of them damaged, many of which name and call what would create `canary`."""
    chance = random.Random(seed)
    whole = harmless()
    attacks = [system_call(canary), module_spec(canary)]
    for _ in range(count):
        yield mutate(chance, chance.choice(whole), whole, attacks, str(canary))


def mutate(chance: random.Random, start: bytes, whole: list[bytes], attacks: list[bytes], canary: str) -> bytes:
    """One to four changes, of bytes or of instructions."""
    content = bytearray(start)
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(content) + 1)
        kind = chance.randrange(8)
        if kind == 0 and at < len(content):
            content[at] ^= 1 << chance.randrange(8)
        elif kind == 1:
            del content[at : at + chance.randint(1, 20)]
        elif kind == 2:
            content[at:at] = chance.randbytes(chance.randint(1, 8))
        elif kind == 3:  # an instruction with any argument
            content[at:at] = bytes([chance.choice(range(256))]) + struct.pack("<Q", chance.choice([0, 1, 255, 2**31, 2**63]))
        elif kind == 4:  # a call of something dangerous, in the form of either protocol
            module, name = chance.choice(NAMES)
            named = chance.choice([f"c{module}\n{name}\n".encode(), text(module) + text(name) + b"\x93"])
            argument = chance.choice([text(f"touch {canary}"), text(canary), text(f"open({canary!r},'w')")])
            content[at:at] = named + argument + b"\x85" + chance.choice([b"R", b"\x81", b"}\x92", b"b", b"R)R", b"Q"])
        elif kind == 5:
            attack = chance.choice(attacks)
            content[at:at] = attack[2:-1]
        elif kind == 6:  # another name in the place of one that is there
            module, name = chance.choice(NAMES)
            for old in (b"Metadata", b"_StorageInfo", b"Size", b"TensorProperties"):
                if old in content and chance.random() < 0.5:
                    content = bytearray(bytes(content).replace(old, name.encode(), 1))
        else:
            other = chance.choice(whole)
            cut = chance.randrange(len(other))
            content[at:] = other[cut:]
    return bytes(content)
