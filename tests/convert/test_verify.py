"""What two checkpoints are compared in, and what cannot be compared."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny_models import make_tiny_llama

from megatron_cpt.convert.config import HfToMegatron, Verify
from megatron_cpt.convert.convert import hf_to_megatron
from megatron_cpt.convert.verify import DifferentError, verify
from megatron_cpt.utils.errors import InputError


@pytest.fixture
def hf(tmp_path: Path, tiny_tokenizer_dir: str) -> Path:
    return Path(make_tiny_llama(tmp_path / "hf", tiny_tokenizer_dir))


def changed(hf: Path, **fields: Any) -> str:
    """A copy whose config.json says something else."""
    copy = hf.parent / "changed"
    shutil.copytree(hf, copy)
    config = json.loads((hf / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | fields))
    return str(copy)


def test_equal_weights_that_are_computed_with_in_another_way(hf: Path) -> None:
    other = changed(hf, rope_parameters={"rope_type": "default", "rope_theta": 500000.0})
    with pytest.raises(DifferentError, match=r"tensors are equal, but rope_theta is 10000\.0 in .*hf and 500000\.0 in"):
        verify(Verify(str(hf), other))


def test_what_changes_no_number_is_no_difference(hf: Path) -> None:
    assert "tensors equal" in verify(Verify(str(hf), changed(hf, max_position_embeddings=512, dtype="bfloat16")))


def test_the_tokenizer_of_either_will_do(hf: Path, tmp_path: Path) -> None:
    hf_to_megatron(HfToMegatron(str(hf), str(tmp_path / "megatron")))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (hf / name).unlink()
    assert "top-1 agreement 100" in verify(Verify(str(hf), str(tmp_path / "megatron"), logits=True))
    with pytest.raises(InputError, match=r"neither .* nor .* has a tokenizer, which --logits needs"):
        verify(Verify(str(hf), str(hf), logits=True))


def test_what_transformers_cannot_load(hf: Path) -> None:
    with pytest.raises(InputError, match=r"transformers' model .*changed cannot be read: "):
        verify(Verify(changed(hf, id2label=5), str(hf), tensors=False, logits=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tensors": False}, "there is nothing to compare"),
        ({"tolerance": -1.0}, "tolerance is -1.0; expected a number that is not negative"),
        ({"tolerance": float("nan")}, "tolerance is nan"),
        ({"max_tokens": 1}, "max_tokens is 1; expected 2 or more"),
        ({"text": "latin.txt"}, r"latin\.txt is not UTF-8"),
        ({"text": "short.txt"}, r"short\.txt has 1 tokens; expected 2 or more"),
        ({"b": "nowhere"}, "nowhere: no such folder"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str, hf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(hf.parent)
    Path("latin.txt").write_bytes(b"caf\xe9")
    Path("short.txt").write_text("a")
    arguments = {"a": "hf", "b": "hf", "logits": "tensors" not in options} | options
    with pytest.raises(InputError, match=message):
        verify(Verify(**arguments))
