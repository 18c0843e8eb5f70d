"""HF -> Megatron -> HF gives back the same bytes; bad checkpoints are refused by name."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.filesize import decimal
from safetensors.torch import load_file, save_file
from tiny_models import ROOT, VARIANTS, make_tiny_llama, run_tool

from megatron_cpt.checkpoint.weight_files import weight_files
from megatron_cpt.convert import conversion_folder, convert
from megatron_cpt.convert.config import HfToMegatron, MegatronToHf, Verify
from megatron_cpt.convert.conversion_folder import resumable_folder
from megatron_cpt.convert.convert import hf_to_megatron, megatron_to_hf
from megatron_cpt.convert.verify import DifferentError, verify
from megatron_cpt.utils.errors import InputError


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_round_trip_is_byte_identical(variant: str, dtype: torch.dtype, tmp_path: Path, tiny_tokenizer_dir: str) -> None:
    hf = Path(make_tiny_llama(tmp_path / "hf", tiny_tokenizer_dir, dtype, **VARIANTS[variant]))
    hf_to_megatron(HfToMegatron(str(hf), str(tmp_path / "megatron")))
    back = Path(megatron_to_hf(MegatronToHf(str(tmp_path / "megatron"), str(tmp_path / "back"))))

    before, after = load_file(hf / "model.safetensors"), load_file(back / "model.safetensors")
    assert before.keys() == after.keys()
    for name in before:
        assert before[name].dtype == after[name].dtype == dtype
        assert torch.equal(before[name].view(torch.uint8), after[name].view(torch.uint8)), name
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (hf / name).read_bytes() == (back / name).read_bytes(), name
    assert not list(tmp_path.glob(".*")), "temporary folders left behind"


@pytest.fixture
def hf(tmp_path: Path, tiny_tokenizer_dir: str) -> Path:
    return Path(make_tiny_llama(tmp_path / "hf", tiny_tokenizer_dir))


def test_a_gpu_is_left_alone(hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The processes that convert are forked: on a machine with a GPU they fail as soon as they use it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # it is not
    hf_to_megatron(HfToMegatron(str(hf), str(tmp_path / "megatron")))
    megatron_to_hf(MegatronToHf(str(tmp_path / "megatron"), str(tmp_path / "back")))
    assert "tensors equal" in verify(Verify(str(hf), str(tmp_path / "back")))


def test_verify_finds_one_changed_number(hf: Path, tmp_path: Path) -> None:
    hf_to_megatron(HfToMegatron(str(hf), str(tmp_path / "megatron")))
    assert "tensors equal" in verify(Verify(str(hf), str(tmp_path / "megatron")))
    tensors = load_file(hf / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"][3, 5] += 1e-3
    save_file(tensors, hf / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DifferentError, match=r"model\.layers\.2\.mlp\.up_proj\.weight differs by up to 0\.001"):
        verify(Verify(str(hf), str(tmp_path / "megatron")))


def test_a_conversion_inside_a_job_stays_alone(hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"MASTER_ADDR": "nowhere", "MASTER_PORT": "1", "WORLD_SIZE": "8", "RANK": "3"}.items():
        monkeypatch.setenv(name, value)
    assert Path(hf_to_megatron(HfToMegatron(str(hf), str(tmp_path / "megatron")))).is_dir()


def test_dtype_is_converted_and_recorded(hf: Path, tmp_path: Path) -> None:
    hf_to_megatron(HfToMegatron(str(hf), str(tmp_path / "megatron")))
    back = Path(megatron_to_hf(MegatronToHf(str(tmp_path / "megatron"), str(tmp_path / "back"), dtype="bfloat16")))
    assert json.loads((back / "config.json").read_text())["dtype"] == "bfloat16"
    before, after = load_file(hf / "model.safetensors"), load_file(back / "model.safetensors")
    for name in before:
        assert torch.equal(before[name].to(torch.bfloat16), after[name]), name


def test_bad_checkpoints_are_refused_and_leave_nothing(hf: Path, tmp_path: Path) -> None:
    def refused(message: str) -> None:
        with pytest.raises(InputError, match=message):
            hf_to_megatron(HfToMegatron(str(hf), str(tmp_path / "megatron")))
        assert not (tmp_path / "megatron").exists()

    weights = hf / "model.safetensors"
    tensors = load_file(weights)
    missing = {name: tensor for name, tensor in tensors.items() if name != "model.norm.weight"}
    save_file(missing, weights)
    refused(r"tensor model\.norm\.weight is missing")
    save_file(tensors | {"extra.weight": torch.zeros(2)}, weights)
    refused(r"tensor extra\.weight does not belong")
    save_file(tensors | {"model.norm.weight": torch.zeros(65)}, weights)
    refused(r"model\.norm\.weight has shape \[65\]; config\.json asks for \[64\]")
    save_file(tensors | {"model.norm.weight": torch.zeros(64, dtype=torch.float16)}, weights)
    refused(r"tensor .* is float\d\d but .* is float\d\d")
    weights.write_bytes(weights.read_bytes()[:-100])
    refused(r"model\.safetensors cannot be read")
    weights.unlink()
    refused(r"holds no \.safetensors file")


def test_only_our_own_results_are_replaced(hf: Path, tmp_path: Path) -> None:
    megatron, back = str(tmp_path / "megatron"), tmp_path / "back"
    hf_to_megatron(HfToMegatron(str(hf), megatron))
    back.mkdir()
    (back / "thesis.txt").write_text("years of work")
    for folder in (back, Path(megatron), tmp_path):  # foreign files, the source itself, a folder around it
        with pytest.raises(InputError, match="was not written by this tool"):
            megatron_to_hf(MegatronToHf(megatron, str(folder), overwrite=True))
    assert (back / "thesis.txt").exists()
    (back / "thesis.txt").unlink()
    megatron_to_hf(MegatronToHf(megatron, str(back)))
    with pytest.raises(InputError, match=r"back already holds an earlier conversion, .*; use --overwrite true"):
        megatron_to_hf(MegatronToHf(megatron, str(back), dtype="bfloat16"))
    megatron_to_hf(MegatronToHf(megatron, str(back), dtype="bfloat16", overwrite=True))
    assert not list(tmp_path.glob(".*"))


def test_incomplete_and_existing_folders_are_refused(hf: Path, tmp_path: Path) -> None:
    megatron = str(tmp_path / "megatron")
    hf_to_megatron(HfToMegatron(str(hf), megatron))
    with pytest.raises(InputError, match=r"already holds an earlier conversion, .*; use --overwrite true"):
        hf_to_megatron(HfToMegatron(str(hf), megatron, dtype="bfloat16"))
    hf_to_megatron(HfToMegatron(str(hf), megatron, dtype="bfloat16", overwrite=True))
    with pytest.raises(InputError, match="is not empty"):
        megatron_to_hf(MegatronToHf(megatron, str(hf)))
    (tmp_path / "megatron" / "release" / ".metadata").unlink()
    with pytest.raises(InputError, match=r"is not complete: \.metadata is missing"):
        megatron_to_hf(MegatronToHf(megatron, str(tmp_path / "back")))
    shutil.rmtree(megatron)
    with pytest.raises(InputError, match="no such folder"):
        megatron_to_hf(MegatronToHf(megatron, str(tmp_path / "back")))


def test_the_tool_exits_with_two_and_one_line(tmp_path: Path) -> None:
    result = run_tool("convert_checkpoint.py", "hf-to-megatron", "--hf", "nowhere", "--megatron", str(tmp_path), check=False)
    assert result.returncode == 2
    assert result.stderr.strip() == "error: model configuration nowhere/config.json: No such file or directory"


def kill_after_first_file(command: list[str], folder: Path) -> None:
    """Run a conversion_folder, and kill -9 it as soon as one of its files is complete."""
    process = subprocess.Popen([sys.executable, "-c", SLOW, *command], cwd=ROOT, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not list(folder.glob(".job/*.done")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.communicate()


# The tool, with files of two or three chunks, and half a second for each file.
SLOW = """
import runpy, sys, time
from megatron_cpt.convert import conversion_folder, convert
convert.FILE_BYTES = 200_000
write_some = conversion_folder._write_some
def slowly(folder, jobs, meter, number):
    for job in jobs:
        write_some(folder, [job], meter, number)
        time.sleep(0.5)
conversion_folder._write_some = slowly
sys.argv[0] = "tools/convert_checkpoint.py"
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("direction", ["hf-to-megatron", "megatron-to-hf"])
def test_a_killed_conversion_goes_on_and_gives_the_same_bytes(
    direction: str, hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convert, "FILE_BYTES", 200_000)

    def command(name: str) -> list[str]:
        if direction == "hf-to-megatron":
            return [direction, "--hf", str(hf), "--megatron", str(tmp_path / name), "--num_workers", "1"]
        megatron = ["--megatron", str(tmp_path / "source"), "--max_shard_size", "200KB"]
        return [direction, *megatron, "--hf", str(tmp_path / name), "--num_workers", "1"]

    def run(name: str) -> Path:
        if direction == "hf-to-megatron":
            return Path(hf_to_megatron(HfToMegatron(str(hf), str(tmp_path / name), num_workers=1)))
        return Path(
            megatron_to_hf(
                MegatronToHf(str(tmp_path / "source"), str(tmp_path / name), max_shard_size="200KB", num_workers=1)
            )
        )

    hf_to_megatron(HfToMegatron(str(hf), str(tmp_path / "source")))
    whole = run("whole")
    unfinished = tmp_path / "killed" / ".release.tmp" if direction == "hf-to-megatron" else tmp_path / ".killed.tmp"
    kill_after_first_file(command("killed"), unfinished)
    done = {path.name.removesuffix(".done") for path in unfinished.glob(".job/*.done")}
    before = {name: (unfinished / name).stat().st_mtime_ns for name in done}
    assert 0 < len(done) < len(list(whole.glob("*.distcp" if direction == "hf-to-megatron" else "*.safetensors")))
    again = run("killed")
    assert {name: (again / name).stat().st_mtime_ns for name in done} == before, "a complete file was written again"
    names = sorted(str(path.relative_to(whole)) for path in whole.rglob("*") if path.is_file())
    assert names == sorted(str(path.relative_to(again)) for path in again.rglob("*") if path.is_file())
    for name in names:
        assert (whole / name).read_bytes() == (again / name).read_bytes(), name


def test_a_changed_source_begins_the_conversion_anew(hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    megatron = tmp_path / "megatron"
    kill_after_first_file(["hf-to-megatron", "--hf", str(hf), "--megatron", str(megatron)], megatron / ".release.tmp")
    tensors = load_file(hf / "model.safetensors")
    tensors["model.embed_tokens.weight"] *= 2
    save_file(tensors, hf / "model.safetensors", metadata={"format": "pt"})
    hf_to_megatron(HfToMegatron(str(hf), str(megatron)))
    assert "tensors equal" in verify(Verify(str(hf), str(megatron)))


def test_two_conversions_to_the_same_place_are_refused(hf: Path, tmp_path: Path) -> None:
    with (
        resumable_folder(str(tmp_path / "megatron" / "release"), {}),
        pytest.raises(InputError, match="is being written by another process"),
    ):
        hf_to_megatron(HfToMegatron(str(hf), str(tmp_path / "megatron")))


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_numbers_that_are_not_finite_are_refused_by_name(hf: Path, tmp_path: Path, value: float) -> None:
    tensors = load_file(hf / "model.safetensors")
    tensors["model.layers.1.self_attn.k_proj.weight"][2, 3] = value
    save_file(tensors, hf / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"model\.layers\.1\.self_attn\.k_proj\.weight .*not finite"):
        hf_to_megatron(HfToMegatron(str(hf), str(tmp_path / "megatron")))
    assert not (tmp_path / "megatron").exists()


def test_shards_are_those_of_transformers(tmp_path: Path, tiny_tokenizer_dir: str) -> None:
    """The same bytes as transformers' own files, sharded or not; with layers of two digits."""
    from transformers import LlamaForCausalLM

    hf = Path(make_tiny_llama(tmp_path / "hf", tiny_tokenizer_dir, num_hidden_layers=12))
    hf_to_megatron(HfToMegatron(str(hf), str(tmp_path / "megatron")))
    model = LlamaForCausalLM.from_pretrained(hf, dtype=torch.float32)
    for size in ("200KB", "5GB"):
        theirs, ours = tmp_path / f"theirs{size}", tmp_path / f"ours{size}"
        model.save_pretrained(theirs, max_shard_size=size)
        megatron_to_hf(MegatronToHf(str(tmp_path / "megatron"), str(ours), max_shard_size=size))
        names = sorted(path.name for path in theirs.glob("model*"))
        assert names == sorted(path.name for path in ours.glob("model*"))
        for name in names:
            if name.endswith(".safetensors"):
                assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name
            else:
                assert json.loads((ours / name).read_text()) == json.loads((theirs / name).read_text()), name
        assert "tensors equal" in verify(Verify(str(hf), str(ours)))


def test_several_files_and_torch_files(hf: Path, tmp_path: Path) -> None:
    tensors = load_file(hf / "model.safetensors")
    (hf / "model.safetensors").unlink()
    names = sorted(tensors)
    torch.save({name: tensors[name] for name in names[:9]}, hf / "pytorch_model-00001-of-00002.bin")
    torch.save({name: tensors[name] for name in names[9:]}, hf / "pytorch_model-00002-of-00002.bin")
    files = {name: f"pytorch_model-0000{1 + (i >= 9)}-of-00002.bin" for i, name in enumerate(names)}
    (hf / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": files}))
    hf_to_megatron(HfToMegatron(str(hf), str(tmp_path / "megatron")))
    assert "tensors equal" in verify(Verify(str(hf), str(tmp_path / "megatron")))
    (hf / "pytorch_model-00002-of-00002.bin").rename(hf / "elsewhere")
    with pytest.raises(InputError, match=r"pytorch_model-00002-of-00002\.bin is missing; pytorch_model\.bin\.index\.json"):
        hf_to_megatron(HfToMegatron(str(hf), str(tmp_path / "megatron2")))
    torch.save({"a": subprocess.Popen}, hf / "pytorch_model-00002-of-00002.bin")
    with pytest.raises(InputError, match=r"pytorch_model-00002-of-00002\.bin cannot be read: it names .*Popen, which a"):
        hf_to_megatron(HfToMegatron(str(hf), str(tmp_path / "megatron2")))


def test_logits(hf: Path, tmp_path: Path) -> None:
    megatron = str(tmp_path / "megatron")
    hf_to_megatron(HfToMegatron(str(hf), megatron))
    said = verify(Verify(str(hf), megatron, logits=True))
    assert re.search(r"tensors equal, bit by bit; logits of \d+ tokens .* top-1 agreement 100\.00%", said), said
    megatron_to_hf(MegatronToHf(megatron, str(tmp_path / "bf16"), dtype="bfloat16"))
    compare = Verify(str(tmp_path / "bf16"), megatron, tensors=False, logits=True)
    with pytest.raises(DifferentError, match=r"largest difference .* \(tolerance 0\.001\)"):
        verify(compare)
    assert "top-1 agreement" in verify(replace(compare, tolerance=0.5))


def test_dtype_of_the_megatron_checkpoint(hf: Path, tmp_path: Path) -> None:
    """Also the way out of a folder whose tensors have several dtypes."""
    tensors = load_file(hf / "model.safetensors")
    mixed = {name: tensor.half() if tensor.ndim == 1 else tensor for name, tensor in tensors.items()}
    save_file(mixed, hf / "model.safetensors", metadata={"format": "pt"})
    hf_to_megatron(HfToMegatron(str(hf), str(tmp_path / "megatron"), dtype="bfloat16"))
    assert json.loads((tmp_path / "megatron" / "release" / "hf" / "config.json").read_text())["dtype"] == "bfloat16"
    back = megatron_to_hf(MegatronToHf(str(tmp_path / "megatron"), str(tmp_path / "back")))
    for name, tensor in load_file(Path(back) / "model.safetensors").items():
        assert torch.equal(tensor, mixed[name].bfloat16()), name


def test_what_old_versions_saved_though_it_is_computed_is_left_out(tmp_path: Path, tiny_tokenizer_dir: str) -> None:
    """Rotary frequencies, and the output layer of tied models; one that is not the embedding is no copy."""
    hf = Path(make_tiny_llama(tmp_path / "hf", tiny_tokenizer_dir, tie_word_embeddings=True))
    tensors = load_file(hf / "model.safetensors")
    more = {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    more["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)
    save_file(tensors | more, hf / "model.safetensors", metadata={"format": "pt"})
    hf_to_megatron(HfToMegatron(str(hf), str(tmp_path / "megatron")))
    assert f"{len(tensors)} tensors equal" in verify(Verify(str(hf), str(tmp_path / "megatron"), logits=True))
    back = megatron_to_hf(MegatronToHf(str(tmp_path / "megatron"), str(tmp_path / "back")))
    assert load_file(Path(back) / "model.safetensors").keys() == tensors.keys()

    more["lm_head.weight"][7, 7] += 1
    save_file(tensors | more, hf / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"ties the word embeddings, but lm_head\.weight is not model\.embed_tokens"):
        hf_to_megatron(HfToMegatron(str(hf), str(tmp_path / "other")))


@pytest.mark.parametrize("size", ["", "5", "5GiB", "0GB", "-1GB", "nanGB", "many"])
def test_sizes_of_shards(size: str, hf: Path, tmp_path: Path) -> None:
    hf_to_megatron(HfToMegatron(str(hf), str(tmp_path / "megatron")))
    with pytest.raises(
        InputError, match=f"max_shard_size is {size or repr(size)}; expected a size above 0 in KB, MB, GB or TB"
    ):
        megatron_to_hf(MegatronToHf(str(tmp_path / "megatron"), str(tmp_path / "back"), max_shard_size=size))


@pytest.mark.parametrize(("dtype", "value", "most"), [("float16", -70000.0, "65504"), ("bfloat16", 3.4e38, "3.38953e+38")])
def test_numbers_that_a_dtype_cannot_hold_are_refused(dtype: Any, value: float, most: str, hf: Path, tmp_path: Path) -> None:
    tensors = load_file(hf / "model.safetensors")
    tensors["model.layers.2.self_attn.v_proj.weight"][1, 1] = value
    save_file(tensors, hf / "model.safetensors", metadata={"format": "pt"})
    message = re.escape(
        f"tensor model.layers.2.self_attn.v_proj.weight holds {value:g}, and {dtype} holds at most {most}; use"
    )
    with pytest.raises(InputError, match=message):
        hf_to_megatron(HfToMegatron(str(hf), str(tmp_path / "half"), dtype=dtype))
    hf_to_megatron(HfToMegatron(str(hf), str(tmp_path / "megatron")))
    with pytest.raises(InputError, match=message):
        megatron_to_hf(MegatronToHf(str(tmp_path / "megatron"), str(tmp_path / "back"), dtype=dtype))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "megatron"]


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.float64])
def test_other_numbers_are_no_weights(dtype: torch.dtype, hf: Path, tmp_path: Path) -> None:
    """Whatever --dtype says: quantized weights would need their scales."""
    tensors = load_file(hf / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(dtype)
    save_file(tensors, hf / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"tensor model\.norm\.weight is \w+; weights are float32, bfloat16, float16"):
        hf_to_megatron(HfToMegatron(str(hf), str(tmp_path / "megatron"), dtype="bfloat16"))


def interrupt_at(monkeypatch: pytest.MonkeyPatch, module: Any, function: str) -> None:
    """Have a function interrupt the conversion when it has done its work."""
    original = getattr(module, function)

    def interrupting(*arguments: Any) -> None:
        original(*arguments)
        monkeypatch.setattr(module, function, original)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, function, interrupting)


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("function", ["write_json", "finish_megatron", "write_metadata", "write_files"])
def test_what_an_interrupted_conversion_left_does_not_get_into_the_next(
    function: str, hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = hf_to_megatron(HfToMegatron(str(hf), str(tmp_path / "whole")))
    interrupt_at(monkeypatch, convert, function)
    with pytest.raises(KeyboardInterrupt, match="release is unfinished; the same command goes on from here"):
        hf_to_megatron(HfToMegatron(str(hf), str(tmp_path / "megatron")))
    left = tmp_path / "megatron" / ".release.tmp"
    (left / "hf").mkdir(exist_ok=True)
    for name in ("hf/special_tokens_map.json", "manifest.json.tmp", "__0_0.distcp.tmp"):
        (left / name).write_text("{}")
    again = hf_to_megatron(HfToMegatron(str(hf), str(tmp_path / "megatron")))
    assert files_of(Path(again)) == files_of(Path(whole))


def test_check_only_writes_nothing(hf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It refuses what the conversion would, says what it would write, and that is true."""
    megatron, back = tmp_path / "megatron", tmp_path / "back"
    before = set(tmp_path.iterdir())
    folder = hf_to_megatron(HfToMegatron(str(hf), str(megatron), dtype="bfloat16", check_only=True))
    assert set(tmp_path.iterdir()) == before
    size = sum(tensor.numel() * 2 for tensor in load_file(hf / "model.safetensors").values())
    assert capsys.readouterr().err == f"size: {decimal(size)} of bfloat16 weights, into {folder}\n"
    hf_to_megatron(HfToMegatron(str(hf), str(megatron)))
    with pytest.raises(InputError, match="already holds an earlier conversion"):
        hf_to_megatron(HfToMegatron(str(hf), str(megatron), dtype="bfloat16", check_only=True))
    assert hf_to_megatron(HfToMegatron(str(hf), str(megatron), check_only=True)) == folder
    assert megatron_to_hf(MegatronToHf(str(megatron), str(back), check_only=True)) == str(back)
    assert set(tmp_path.iterdir()) == before | {megatron}
    (hf / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"holds no \.safetensors file"):
        hf_to_megatron(HfToMegatron(str(hf), str(tmp_path / "other"), check_only=True))


def test_the_same_command_again_is_done_already(hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when the first one was killed between the publication and the tracker."""
    there, back = (
        HfToMegatron(str(hf), str(tmp_path / "megatron")),
        MegatronToHf(str(tmp_path / "megatron"), str(tmp_path / "b")),
    )
    interrupt_at(monkeypatch, conversion_folder, "publish_folder")
    with pytest.raises(KeyboardInterrupt):
        hf_to_megatron(there)
    tracker = tmp_path / "megatron" / "latest_checkpointed_iteration.txt"
    assert not tracker.exists()
    for run, folder in (
        (partial(hf_to_megatron, there), tmp_path / "megatron" / "release"),
        (partial(megatron_to_hf, back), tmp_path / "b"),
    ):
        run()
        inode = folder.stat().st_ino
        assert run() == str(folder)
        assert folder.stat().st_ino == inode
    assert tracker.read_text() == "release"
    (hf / "generation_config.json").write_text("{}")
    with pytest.raises(InputError, match="of another source or with other options; use --overwrite true"):
        hf_to_megatron(there)


def test_what_is_not_a_converted_checkpoint_is_not_replaced(hf: Path, tmp_path: Path) -> None:
    precious = tmp_path / "a" / "release" / "notes.txt"
    precious.parent.mkdir(parents=True)
    precious.write_text("years of work")
    (tmp_path / "run" / "iter_0000100").mkdir(parents=True)
    (tmp_path / "file").write_text("")
    for name, message in (
        ("a", "release is not empty and was not written by this tool"),
        ("run", "is the folder of a run .it holds iter_0000100"),
        ("file", "file is not a folder"),
        ("file/below", "file is not a folder"),
    ):
        with pytest.raises(InputError, match=message):
            hf_to_megatron(HfToMegatron(str(hf), str(tmp_path / name), overwrite=True))
    with pytest.raises(InputError, match="megatron is empty; use the name of the folder"):
        hf_to_megatron(HfToMegatron(str(hf), ""))
    assert precious.exists()
    assert not list(tmp_path.glob("**/.*"))


def test_folders_made_for_a_conversion_that_is_refused_go_with_it(hf: Path, tmp_path: Path) -> None:
    tensors = load_file(hf / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, hf / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="not finite"):
        hf_to_megatron(HfToMegatron(str(hf), str(tmp_path / "a" / "b" / "c")))
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_everything_but_the_weights_travels_along(hf: Path, tmp_path: Path) -> None:
    """Licences, chat templates; a config.json that says no dtype goes on saying none."""
    config = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps({name: config[name] for name in config if name != "dtype"}))
    (hf / "additional_chat_templates").mkdir()
    for name in ("LICENSE", "NOTICE", "tokenizer.tiktoken", "additional_chat_templates/tool_use.jinja"):
        (hf / name).write_text(name)
    (hf / "training_args.bin").write_text("no text")
    hf_to_megatron(HfToMegatron(str(hf), str(tmp_path / "megatron")))
    back = Path(megatron_to_hf(MegatronToHf(str(tmp_path / "megatron"), str(tmp_path / "back"))))
    found = files_of(back)
    del found["manifest.json"]
    expected = files_of(hf)
    del expected["training_args.bin"]
    assert found == expected


def test_what_is_about_other_weights_stays_behind(hf: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The adapter that was merged, also in checkpoints of earlier versions; what says how weights are quantized."""
    from transformers import AutoModelForCausalLM

    about = {
        "adapter_config.json": {"base_model_name_or_path": "elsewhere", "peft_type": "LORA"},
        "quantize_config.json": {},
    }
    for name, content in about.items():
        (hf / name).write_text(json.dumps(content))
    (hf / "adapter_model.safetensors").write_text("no weights")
    hf_to_megatron(HfToMegatron(str(hf), str(tmp_path / "megatron")))
    assert "adapter_config.json beside them (of elsewhere) is not applied again" in capfd.readouterr().err
    checkpoint = tmp_path / "megatron" / "release" / "hf"
    assert not {*about} & {path.name for path in checkpoint.iterdir()}
    for name, content in about.items():
        (checkpoint / name).write_text(json.dumps(content))
    back = Path(megatron_to_hf(MegatronToHf(str(tmp_path / "megatron"), str(tmp_path / "back"))))
    assert not {*about} & {path.name for path in back.iterdir()}
    assert (back / "model.safetensors").read_bytes() == (hf / "model.safetensors").read_bytes()
    AutoModelForCausalLM.from_pretrained(back)  # which would look for the adapter's weights


def test_weights_in_two_forms_are_named(hf: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """transformers reads one of them, and so do we."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(hf)
    other = tmp_path / "other"
    model.lm_head.weight.data += 1.0
    model.save_pretrained(other, max_shard_size="100KB")
    for path in other.glob("model*"):
        shutil.copy(path, hf)
    torch.save({"nothing": torch.zeros(1)}, hf / "pytorch_model.bin")
    hf_to_megatron(HfToMegatron(str(hf), str(tmp_path / "megatron")))
    said = capfd.readouterr().err
    assert (
        "model.safetensors and model.safetensors.index.json and pytorch_model.bin: weights are read from model.saf" in said
    )
    back = Path(megatron_to_hf(MegatronToHf(str(tmp_path / "megatron"), str(tmp_path / "back"))))
    read = AutoModelForCausalLM.from_pretrained(hf).lm_head.weight
    assert torch.equal(AutoModelForCausalLM.from_pretrained(back).lm_head.weight, read)
    assert not torch.equal(read, model.lm_head.weight)


def test_the_files_that_transformers_would_read(hf: Path, tmp_path: Path) -> None:
    """Not Meta's names for the same numbers; a whole file before an index; an index before other files."""
    assert weight_files(str(hf)) == ["model.safetensors"]
    shutil.copy(hf / "model.safetensors", hf / "consolidated.safetensors")
    index = hf / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "consolidated.safetensors"}}))
    assert weight_files(str(hf)) == ["model.safetensors"]
    (hf / "model.safetensors").rename(hf / "weights.safetensors")
    assert weight_files(str(hf)) == ["consolidated.safetensors"]
    index.unlink()
    assert weight_files(str(hf)) == ["weights.safetensors"]
    for content in ("{}", '{"weight_map": {}}', '{"weight_map": {"a": 5}}', "[]", "{"):
        index.write_text(content)
        with pytest.raises(InputError, match=r"index\.json is not (an index of weights|JSON)"):
            weight_files(str(hf))


def test_a_full_disk_is_named(hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(convert, "write_distcp", full)
    with pytest.raises(InputError, match=r"megatron/release cannot be written: \[Errno 28\] No space left on device"):
        hf_to_megatron(HfToMegatron(str(hf), str(tmp_path / "megatron")))
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_termination_is_an_interruption(hf: Path, tmp_path: Path) -> None:
    command = ["hf-to-megatron", "--hf", str(hf), "--megatron", str(tmp_path / "megatron")]
    process = subprocess.Popen([sys.executable, "-c", SLOW, *command], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    while not list((tmp_path / "megatron").glob(".release.tmp/.job/*.done")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.terminate()
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert said.endswith("release is unfinished; the same command goes on from here\n")
