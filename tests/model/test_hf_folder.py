from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_cpt.model.hf_folder import check_positions, positions_of
from megatron_cpt.utils.errors import InputError


@pytest.mark.parametrize(("fields", "refused"), [({"max_position_embeddings": 8}, True), ({}, False), ([8], False)])
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
