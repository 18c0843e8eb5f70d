"""HF -> Megatron -> HF gives back the same bytes; bad checkpoints are refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import VARIANTS, make_tiny_llama, run_tool

from megatron_cpt.checkpoint.convert import (
    HfToMegatron,
    MegatronToHf,
    Verify,
    hf_to_megatron,
    megatron_to_hf,
    verify,
)
from megatron_cpt.errors import InputError


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


def test_verify_finds_one_changed_number(hf: Path, tmp_path: Path) -> None:
    hf_to_megatron(HfToMegatron(str(hf), str(tmp_path / "megatron")))
    assert "tensors equal" in verify(Verify(str(hf), str(tmp_path / "megatron")))
    tensors = load_file(hf / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"][3, 5] += 1e-3
    save_file(tensors, hf / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"model\.layers\.2\.mlp\.up_proj\.weight differs by up to 0\.001"):
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
    with pytest.raises(InputError, match="use --overwrite true"):
        megatron_to_hf(MegatronToHf(megatron, str(back)))
    megatron_to_hf(MegatronToHf(megatron, str(back), overwrite=True))
    assert not list(tmp_path.glob(".*"))


def test_incomplete_and_existing_folders_are_refused(hf: Path, tmp_path: Path) -> None:
    megatron = str(tmp_path / "megatron")
    hf_to_megatron(HfToMegatron(str(hf), megatron))
    with pytest.raises(InputError, match="already holds a checkpoint"):
        hf_to_megatron(HfToMegatron(str(hf), megatron))
    hf_to_megatron(HfToMegatron(str(hf), megatron, overwrite=True))
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
