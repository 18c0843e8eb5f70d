"""What the hub reads of a model card: the model that was trained further, and the languages that it read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_cpt.convert.config import MegatronToHf
from megatron_cpt.convert.convert import make_card
from megatron_cpt.convert.model_card import base_model, card_languages
from megatron_cpt.utils.errors import InputError


def manifest(load: str, **fields: Any) -> dict[str, Any]:
    consumed = [("en_wiki", 20), ("zh_a", 15), ("zh_b", 15), ("fr", 0)]
    used = [{"name": name, "samples": samples} for name, samples in consumed]
    return {"config": {"checkpoint": {"load": load}}, "data": {"consumed": used}} | fields


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("/home/me/.cache/huggingface/hub/models--meta-llama--Llama-3.1-8B/snapshots/d04e", "meta-llama/Llama-3.1-8B"),
        ("/models/Llama-3-8B/", "Llama-3-8B"),
    ],
)
def test_the_base_model(tmp_path: Path, source: str, name: str) -> None:
    release = tmp_path / "converted" / "release"
    release.mkdir(parents=True)
    (release / "manifest.json").write_text(json.dumps({"kind": "hf-to-megatron", "source": source}))
    assert base_model(manifest(str(tmp_path / "converted"))) == name
    assert base_model(manifest(str(tmp_path / "gone"))) == "gone"


def test_a_manifest_that_no_run_wrote(tmp_path: Path) -> None:
    checkpoint = tmp_path / "iter_0000001"
    (checkpoint / "hf").mkdir(parents=True)
    (checkpoint / "manifest.json").write_text(json.dumps({"kind": "pretrain"}))
    with pytest.raises(InputError, match=r"manifest\.json has no field '\w+'; expected the manifest that a run writes"):
        make_card(str(checkpoint), MegatronToHf(str(checkpoint), str(tmp_path / "hf")))


def test_languages_the_most_read_first() -> None:
    of_corpus = {"en_wiki": "en", "zh_a": "zh", "zh_b": "zh", "fr": "fr"}
    assert card_languages(manifest("x", languages=of_corpus)) == ["zh", "en"]
    assert card_languages(manifest("x")) == []
