"""Every setting of convert_checkpoint.py arrives where it acts; a setting without a row here is an error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from every_setting import settings_of
from tiny_models import make_tiny_llama

from megatron_cpt.convert import convert
from megatron_cpt.convert.config import HfToMegatron, MegatronToHf
from megatron_cpt.convert.convert import hf_to_megatron, megatron_to_hf

# setting -> what it is set to, and what is seen of it where files are written (see `seen_of`)
TO_MEGATRON: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "hf": ({}, {"source": "hf"}),
    "megatron": ({}, {"target": "megatron/release"}),
    "dtype": ({"dtype": "bfloat16"}, {"dtype": "bfloat16"}),
    "extend_tokenizer": ({"extend_tokenizer": "LARGER"}, {"vocab_size": 406}),
    "added_tokens": ({"added_tokens": "TOKENS"}, {"vocab_size": 402}),
    "embedding_init": ({"added_tokens": "TOKENS", "embedding_init": "zero"}, {"new_rows": "zero"}),
    "repair_untrained_embeddings": ({"repair_untrained_embeddings": True}, {"repaired": True}),
    "seed": ({"added_tokens": "TOKENS", "seed": 7}, {"seed": 7}),
    "num_workers": ({"num_workers": 3}, {"num_workers": 3}),
    "overwrite": ({"overwrite": True}, {"overwrite": True}),
    "check_only": ({"check_only": True}, {"written": False}),
}
TO_HF: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "megatron": ({}, {"source": "release"}),
    "hf": ({}, {"target": "back"}),
    "dtype": ({"dtype": "float16"}, {"dtype": "float16"}),
    "tokenizer": ({"tokenizer": "x"}, {"refused": "tokenizer is given"}),
    "vocab_size": ({"vocab_size": 7}, {"refused": "vocab_size is given"}),
    "max_shard_size": ({"max_shard_size": "100KB"}, {"shards": True}),
    "upload_ready": ({"upload_ready": True}, {"refused": "comes from no run"}),
    "num_workers": ({"num_workers": 3}, {"num_workers": 3}),
    "overwrite": ({"overwrite": True}, {"overwrite": True}),
    "check_only": ({"check_only": True}, {"written": False}),
}


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_dir: str) -> str:
    """With a row that nobody has trained."""
    folder = tmp_path_factory.mktemp("settings") / "hf"
    make_tiny_llama(folder, tiny_tokenizer_dir, num_hidden_layers=1)
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"][5] = 0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


@pytest.fixture(scope="module")
def megatron(hf: str) -> str:
    folder = str(Path(hf).parent / "converted")
    hf_to_megatron(HfToMegatron(hf, folder))
    return folder


def seen_of(monkeypatch: pytest.MonkeyPatch, call: Any) -> dict[str, Any]:
    """What the functions that read, check and write are given."""
    seen: dict[str, Any] = {"written": False}
    write_files, is_done = convert.write_files, convert.is_converted

    def written(path: str, jobs: Any, num_workers: int, description: str) -> Any:
        seen.update(written=True, num_workers=num_workers)
        return write_files(path, jobs, num_workers, description)

    def done(folder: str, job: str, overwrite: bool) -> bool:
        seen.update(overwrite=overwrite)
        return is_done(folder, job, overwrite)

    planned = convert.convert_to_megatron

    def plan(config: Any, llama: Any, source: Any, dtype: str, extension: Any) -> str:
        repaired = any(report.repaired for report in convert.ExtendedTensors(source, extension).reports().values())
        seen.update(seed=extension.seed, new_rows=extension.new_rows, repaired=repaired)
        return planned(config, llama, source, dtype, extension)

    for name, function in (("write_files", written), ("is_converted", done), ("convert_to_megatron", plan)):
        monkeypatch.setattr(convert, name, function)
    try:
        folder = Path(call())
    except convert.InputError as error:
        return seen | {"refused": str(error)}
    if not seen["written"]:
        return seen
    described = folder / "hf" if (folder / "hf").exists() else folder
    manifest = json.loads((folder / "manifest.json").read_text())
    config = json.loads((described / "config.json").read_text())
    seen |= {"source": Path(manifest["source"]).name, "dtype": manifest["dtype"], "vocab_size": config["vocab_size"]}
    seen |= {"target": f"{folder.parent.name}/{folder.name}" if described != folder else folder.name}
    return seen | {"shards": (folder / "model.safetensors.index.json").exists()}


@pytest.mark.parametrize("setting", sorted(settings_of(HfToMegatron)))
def test_a_setting_of_hf_to_megatron_arrives(
    setting: str, hf: str, tmp_path: Path, chat_tokenizer_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, expected = TO_MEGATRON[setting]
    (tmp_path / "tokens.txt").write_text("zwei\ndrei\n")
    files = {"TOKENS": str(tmp_path / "tokens.txt"), "LARGER": chat_tokenizer_dir}
    given = {name: files.get(value, value) if isinstance(value, str) else value for name, value in given.items()}
    seen = seen_of(monkeypatch, lambda: hf_to_megatron(HfToMegatron(hf, str(tmp_path / "megatron"), **given)))
    assert {name: seen[name] for name in expected} == expected
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize("setting", sorted(settings_of(MegatronToHf)))
def test_a_setting_of_megatron_to_hf_arrives(
    setting: str, megatron: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, expected = TO_HF[setting]
    seen = seen_of(monkeypatch, lambda: megatron_to_hf(MegatronToHf(megatron, str(tmp_path / "back"), **given)))
    if "refused" in expected:
        assert expected["refused"] in seen["refused"]
    else:
        assert {name: seen[name] for name in expected} == expected
