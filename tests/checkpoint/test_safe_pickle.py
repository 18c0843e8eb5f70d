"""Pickles of strangers are read as data: whatever is in them, nothing runs, and the outcome is a value or one error."""

from __future__ import annotations

import collections
import io
import pickle
import resource
import struct
import time
import zipfile
from argparse import Namespace
from pathlib import Path, PosixPath
from typing import Any

import pytest
import torch
from hostile_pickles import NAMES, harmless, module_spec, mutations, system_call, text

from megatron_cpt.checkpoint import zip_reader
from megatron_cpt.checkpoint.checkpoint_pickles import Opaque, PickledTensors, load_common, load_metadata, load_settings
from megatron_cpt.checkpoint.safe_pickle import Name, PickleError, PickleRecord, plain_copy, read_pickle
from megatron_cpt.utils.errors import InputError

PAIRS = b")\x94" + b"".join(b"h%ch%c\x86\x94" % (i, i) for i in range(60))  # a pair of pairs of pairs: 2^60 leaves


def archive(path: Path, pickled: bytes) -> Path:
    """What torch.save would write of this pickle."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", pickled)
    return path


@pytest.mark.parametrize("attack", [system_call, module_spec])
def test_the_attacks_are_real(attack: Any, tmp_path: Path) -> None:
    """Else the tests below would show nothing: pickle runs them."""
    pickle.loads(attack(tmp_path / "canary"))
    assert (tmp_path / "canary").exists()


@pytest.mark.parametrize("attack", [system_call, module_spec])
def test_attacks_run_nothing(attack: Any, tmp_path: Path) -> None:
    content = attack(tmp_path / "canary")
    (tmp_path / ".metadata").write_bytes(content)
    with pytest.raises(
        InputError, match=r"\.metadata cannot be read: it names (posix\.system|megatron.*ModuleSpec), which a"
    ):
        load_metadata(str(tmp_path / ".metadata"))
    path = archive(tmp_path / "common.pt", b"\x80\x02}" + text("args") + content[2:-1] + b"s.")
    found = [load_settings(str(path)), load_common(str(path))]
    assert all(isinstance(content["args"], Opaque) for content in found)
    assert not (tmp_path / "canary").exists()


def fuzz(count: int, seed: int, tmp_path: Path) -> collections.Counter[str]:
    """How each of these pickles ends, read as .metadata and as common.pt."""
    canary = tmp_path / "canary"
    path, outcomes, slowest = tmp_path / "pickled", collections.Counter[str](), 0.0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for content in mutations(seed, count, canary):
        for read in (load_metadata, load_settings, load_common):
            path.write_bytes(content) if read is load_metadata else archive(path, content)
            began = time.process_time()
            try:
                read(str(path))
                outcomes["value"] += 1
            except InputError as error:
                said = str(error)
                outcomes["error" if len(said) < 1000 and "\n" not in said else "long error"] += 1
            slowest = max(slowest, time.process_time() - began)
    assert not canary.exists()
    assert outcomes.keys() == {"value", "error"}
    assert slowest < 2, "a small pickle took seconds"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000, "200 MB for small pickles"
    return outcomes


def test_mutated_pickles_are_values_or_errors(tmp_path: Path) -> None:
    outcomes = fuzz(1500, 1, tmp_path)
    assert min(outcomes["value"], outcomes["error"]) > 100  # the mutations are neither all harmless nor all junk


@pytest.mark.slow
def test_many_mutated_pickles_are_values_or_errors(tmp_path: Path) -> None:
    fuzz(35_000, 2, tmp_path)  # three readers: more than 1e5 pickles


@pytest.mark.parametrize(("module", "name"), NAMES)
def test_names_are_not_looked_up(module: str, name: str, tmp_path: Path) -> None:
    """In any form of naming and calling; a package that is not imported yet stays so."""
    for named in (f"c{module}\n{name}\n".encode(), text(module) + text(name) + b"\x93"):
        for call in (b")R", b")\x81", b"))R)R", b")}\x92", b"}b", b"N}\x86b"):
            with pytest.raises(PickleError) if call in (b"}b", b"N}\x86b", b"))R)R") else torch.no_grad():
                assert type(read_pickle(b"\x80\x04" + named + call + b".", {}, {})) is PickleRecord
    assert type(read_pickle(b"\x80\x04" + f"c{module}\n{name}\n.".encode(), {}, {})) is Name


def test_values_are_those_of_pickle(tmp_path: Path) -> None:
    """Whatever torch.save and pickle write of plain values comes back as it was."""
    value = {
        "numbers": [0, 1, -1, 255, 256, 70_000, -(2**31), 2**40, 2**100, 1.5, float("inf"), True, None],
        "texts": ["", "a", "é" * 300, "长" * 70_000, b"", b"ab", b"c" * 300, bytearray(b"d")],
        "containers": [(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), {1, 2}, frozenset({3}), {}, [[]], {(1, "a"): 2}],
        "ordered": collections.OrderedDict(a=1),
    }
    for protocol in (2, 3, 4, 5):
        (tmp_path / "value").write_bytes(pickle.dumps(value, protocol))
        torch.save(value, tmp_path / "common.pt", pickle_protocol=protocol)
        assert load_common(str(tmp_path / "common.pt")) == value, protocol
    tensors = {"a": torch.arange(6).view(2, 3).t(), "b": torch.tensor(1.5, dtype=torch.bfloat16), "c": torch.empty(0, 3)}
    torch.save(tensors | {"dtype": torch.float16}, tmp_path / "common.pt")
    found = load_common(str(tmp_path / "common.pt"))
    assert found["dtype"] is torch.float16
    assert all(torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in tensors.items())


def test_settings_of_other_software(tmp_path: Path) -> None:
    args = Namespace(
        num_layers=2, dtype=torch.bfloat16, act=torch.nn.functional.silu, inner=Namespace(a=[1]), path=Path("/x")
    )
    torch.save({"args": args, "weight": torch.ones(3)}, tmp_path / "common.pt")
    found = load_settings(str(tmp_path / "common.pt"))
    assert isinstance(found["weight"], Opaque)
    assert (found["args"].num_layers, found["args"].dtype, found["args"].inner.a) == (2, torch.bfloat16, [1])
    assert found["args"].act == "torch.nn.functional.silu"
    assert repr(found["args"].path) == f"<{PosixPath.__module__}.PosixPath>"  # pathlib._local on Python 3.13


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x80\x04K\x01r\xff\xff\xff\xffK\x02.", None),  # a memo of 4 billion entries in C
        (b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b".", "ends at byte"),  # bytes that are not there
        (b"\x80\x04\x8b" + struct.pack("<i", 2**30) + b".", "a number of 1073741824 bytes"),
        (b"\x80\x04\x8a\x80" + b"\x7f" * 128 + b".", "a number of 128 bytes"),  # 10^400 and more
        (b"\x80\x04)" + b"2\x86" * 60 + b".", "instruction b'2'"),  # pairs of pairs: 2^60 leaves
        (b"\x80\x04" + PAIRS + b".", "more than"),
        (b"\x80\x04" + PAIRS + b"}h<K\x01s.", "a key of a dictionary is a tuple"),  # its hash would take years
        (b"\x80\x04" + b"]" * 5000 + b"a" * 4999 + b".", "100 deep"),
        (b"\x80\x04]\x94h\x00a.", "100 deep"),  # a list that holds itself
        (b"\x80\x04\x82\x01.", "instruction"),  # the registry of extensions
        (b"(iposix\nsystem\n.", "instruction"),
        (b"\x80\x04.", "damaged"),
        (b"", "ends at byte 0"),
        (b"\x80\x04" + b"cposix", "has no end"),
    ],
)
def test_small_pickles_take_little(content: bytes, message: str | None) -> None:
    def read() -> Any:
        return plain_copy(read_pickle(content, {}, {}), lambda value, copy: value)

    if message is None:
        assert read() == 2
        return
    with pytest.raises(PickleError, match=message):
        read()


def test_the_classes_of_torch_are_known() -> None:
    """All that is in a description that torch makes is read, in every protocol."""
    found = [load_from(content) for content in harmless()[:3]]
    assert found[0] == found[1] == found[2]
    assert found[0].tensors["weight"].shape == (4, 2)
    assert found[0].places["state", ()].offset == 1000


def load_from(content: bytes) -> Any:
    from megatron_cpt.checkpoint.checkpoint_pickles import MAKERS, METADATA_NAMES, VALUES, _description

    return _description(read_pickle(content, VALUES, MAKERS, METADATA_NAMES))


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / ".metadata")
    with pytest.raises(InputError, match=r"\.metadata cannot be read: it is no plain file"):
        load_metadata(str(tmp_path / ".metadata"))


def test_compressed_archives_are_refused(tmp_path: Path) -> None:
    """A few kilobytes could be gigabytes."""
    with zipfile.ZipFile(tmp_path / "common.pt", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", io.BytesIO(bytes(10_000_000)).getvalue())
    with pytest.raises(InputError, match="is compressed"):
        load_settings(str(tmp_path / "common.pt"))


def test_an_archive_of_too_many_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What zipfile makes of the list of its records would take many times its size in memory."""
    with zipfile.ZipFile(tmp_path / "common.pt", "w") as file:
        for number in range(20):
            file.writestr(f"archive/data/{number}{'x' * 1000}", b"")
    monkeypatch.setattr(zip_reader, "MOST_DIRECTORY_BYTES", 20_000)
    with pytest.raises(InputError, match=r"its list of records has 21,\d+ bytes; expected at most 20,000"):
        load_settings(str(tmp_path / "common.pt"))


SPACE = b"cargparse\nNamespace\n)\x81"
TWICE = [SPACE + b"}(" + text("a") + b"h" + bytes([i]) + text("b") + b"h" + bytes([i]) + b"ub\x94" for i in range(60)]
# Pairs of numbers can be made that all have one hash, as that of texts cannot
SAME_PAIRS = [b"J" + struct.pack("<i", 70_000 + i) + b"K\x01\x86N" for i in range(10)]
FIELDS = b"(" + b"".join(text(f"a{i}") + b"N" for i in range(5001)) + b"u"
EQUAL_HASHES = b"".join(b"\x8a\x10" + (i * (2**61 - 1)).to_bytes(16, "little") + b"N" for i in range(1, 60_000))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"}" + text("args") + b"N\x94" + b"".join(TWICE) + b"s.", "more than 1000000 values"),  # 2^60 of them
        (b"}" + text("args") + SPACE + b"\x94}" + text("a") + b"h\x00sbs.", "100 deep"),  # it holds itself
        (b"}" + SPACE + b"K\x01s.", "Namespace as a key"),
        (b"}" + text("a") + b"\x8f(" + SPACE + b"\x90s.", "Namespace as a key"),
        (b"}" + text("args") + b"}(" + b"".join(SAME_PAIRS) + b"us.", "a key of a dictionary is"),
        (b"}" + text("args") + SPACE + b"}\x94" + FIELDS + b"bs.", "has more than 5000 attributes"),
        (b"}(" + EQUAL_HASHES + b"u.", "a key of a dictionary is"),  # each is compared with all before
    ],
)
def test_settings_of_others_take_little(content: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        load_settings(str(archive(tmp_path / "common.pt", b"\x80\x04" + content)))


LIST = b"](" + b"N" * 100_000 + b"e\x94"  # memo 0
BYTES = b"X" + struct.pack("<I", 100_000) + b"x" * 100_000 + b"\x94"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (LIST + b"ctorch\nSize\n\x94(" + b"h\x01h\x00\x85R" * 300 + b"t.", "torch.Size of something else than up to"),
        (LIST + b"cbuiltins\nset\n\x94(" + b"h\x01h\x00\x85R" * 300 + b"t.", "its calls copy more than 5000000"),
        (BYTES + b"c_codecs\nencode\n\x94(" + b"h\x01h\x00\x85R" * 300 + b"t.", "its calls copy more than 5000000"),
        (BYTES + b"cbuiltins\nbytearray\n\x94(" + b"h\x01h\x00\x85R" * 300 + b"t.", "its calls copy more than"),
        (
            b"(" + b"N" * 100_000 + b"t\x94ctorch.serialization\n_get_layout\n\x94(" + b"h\x01h\x00R" * 300 + b"t.",
            "its calls copy",
        ),
        (b"(" + b"\x8f" * 1_000_001 + b"t.", "its calls copy more than 5000000"),  # empty sets: 216 bytes each
    ],
)
def test_a_short_pickle_copies_little(content: bytes, message: str, tmp_path: Path) -> None:
    """One list named many times."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError, match=message):
        load_common(str(archive(tmp_path / "common.pt", b"\x80\x04}" + text("args") + content[:-1] + b"s.")))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # KiB


def test_a_tensor_is_copied_once(tmp_path: Path) -> None:
    """However often the file names it; and views of one memory take a few times its bytes at most."""
    path, weight = tmp_path / "common.pt", torch.arange(100_000.0)
    torch.save({"args": [weight] * 50}, path)
    found = load_common(str(path))["args"]
    assert all(tensor is found[0] for tensor in found)
    assert torch.equal(found[0], weight)
    torch.save({"args": [weight[:3], weight[50_000:], weight.view(100, 1000)]}, path)
    assert torch.equal(load_common(str(path))["args"][1], weight[50_000:])
    torch.save({"args": [weight[number:] for number in range(50)]}, path)
    with pytest.raises(InputError, match="its tensors have more than 4 times the bytes of the file"):
        load_common(str(path))


def test_what_torch_saves_of_a_model(tmp_path: Path) -> None:
    """Parameters, views and transposed tensors, in a dictionary with attributes: the numbers that torch reads."""
    model, path = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4)).bfloat16(), str(tmp_path / "model.bin")
    for content in (model.state_dict(), dict(model.named_parameters()), {"a": torch.arange(12).view(3, 4).T[1:]}, {}):
        torch.save(content, path)
        read, expected = PickledTensors(path), torch.load(path, weights_only=True)
        assert list(read.described) == list(expected)
        assert all(torch.equal(read.get_tensor(name), tensor) for name, tensor in expected.items())


def test_what_is_no_model(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    for content in ([torch.ones(2)], {"a": 1}, {1: torch.ones(2)}, {"a": {"b": torch.ones(2)}}):
        torch.save(content, path)
        with pytest.raises(InputError, match=r"model\.bin holds something else than named, dense tensors"):
            PickledTensors(str(path))
    torch.save({"a": torch.eye(2).to_sparse()}, path)
    with pytest.raises(InputError, match=r"model\.bin cannot be read: it names torch\._utils\._rebuild_sparse_tensor"):
        PickledTensors(str(path))
    torch.save({"a": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(
        InputError, match=r"cannot be read: .*; expected a zip archive, as torch.save writes since version 1\.6"
    ):
        PickledTensors(str(path))
    torch.save({"a": torch.ones(1000)}, path)
    path.write_bytes(path.read_bytes().replace(torch.ones(2).numpy().tobytes(), bytes(8), 1))
    with pytest.raises(InputError, match=r"model\.bin is damaged, in tensor a: wrong checksum"):
        PickledTensors(str(path)).get_tensor("a")
    with pytest.raises(InputError, match="a key of a dictionary is"):
        PickledTensors(str(archive(path, b"\x80\x04}(" + EQUAL_HASHES + b"u.")))


def test_a_setting_may_have_any_name(tmp_path: Path) -> None:
    content = b"}" + text("args") + SPACE + b"}" + text("self") + b"K\x01sbs."
    assert vars(load_settings(str(archive(tmp_path / "common.pt", b"\x80\x04" + content)))["args"]) == {"self": 1}
