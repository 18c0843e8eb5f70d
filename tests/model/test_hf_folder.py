from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from megatron_cpt.model.hf_folder import check_model, check_positions, positions_of
from megatron_cpt.utils.errors import InputError

FEW = [({"max_position_embeddings": 8}, True), ({"n_positions": 8}, True), ({}, False), ([8], False)]


@pytest.mark.parametrize(("fields", "refused"), FEW)
def test_an_answer_leaves_room_for_a_prompt(tmp_path: Path, fields: Any, refused: bool) -> None:
    check_positions(str(tmp_path), 8)  # `check_model` says that there is no model
    (tmp_path / "config.json").write_text(json.dumps(fields))
    check_positions(str(tmp_path), 7)
    if refused:
        with pytest.raises(InputError, match="max_new_tokens is 8; expected less than 8, the positions of"):
            check_positions(str(tmp_path), 8)
    else:
        check_positions(str(tmp_path), 8)


@pytest.mark.parametrize("value", ["256", None, 256.0, 0, True])
def test_positions_are_a_number(tmp_path: Path, value: Any) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"max_position_embeddings": value}))
    with pytest.raises(InputError, match=r"config\.json: max_position_embeddings is .*; expected a whole number, 1 or more"):
        positions_of(str(tmp_path))


def test_files_that_transformers_does_not_read_are_nobodys_matter(tmp_path: Path) -> None:
    """As macOS and people leave them: another program's, a link to nowhere, a folder."""
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "._config.json").write_bytes(b"\x00\x05\x16\x07Mac OS X")
    (tmp_path / "rows.json").write_text('{"a": 1}\n{"a": 2}\n')
    (tmp_path / "results.json").touch()
    (tmp_path / "old.json").symlink_to(tmp_path / "nowhere")
    (tmp_path / "runs.json").mkdir()
    check_model(str(tmp_path))


READ = (
    *("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json", "special_tokens_map.json"),
    *("added_tokens.json", "chat_template.json", "model.safetensors.index.json", "pytorch_model.bin.index.json"),
    *("vocab.json", "preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json"),
    *("tokenizer.4.json",),
)


@pytest.mark.parametrize("name", READ)
def test_files_that_transformers_reads_have_limits(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_text("[" * 100_000)
    with pytest.raises(InputError, match=f"{re.escape(name)} is not JSON"):
        check_model(str(tmp_path))
