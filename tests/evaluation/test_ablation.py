"""The ablation's rows and differences."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_cpt.evaluation.ablation import ablation_table
from megatron_cpt.evaluation.config import EvaluateConfig, TextConfig, VariantConfig
from megatron_cpt.utils.errors import InputError


def measured(score: float, bits: float, share: float) -> dict[str, Any]:
    return {
        "benchmarks": {"C-Eval": {"value": score, "stderr": 0.01, "samples": 9, "missing": None}},
        "text": {"zh": {"bits_per_byte": bits}},
        "answers": {"zh": {"script": share, "identified": None}},
    }


VARIANTS = [
    VariantConfig("plain", False, False),
    VariantConfig("C-SFT", True, True),
    VariantConfig("SFT", False, True),
    VariantConfig("en only", True, False),
]


def test_differences_are_to_the_full_variant() -> None:
    models = {
        "plain": measured(0.3, 2.0, 0.1),
        "SFT": measured(0.35, 1.9, 0.8),
        "C-SFT": measured(0.45, 1.5, 0.95),
        "en only": {"text": {"zh": {"bits_per_byte": 1.55}}},
    }
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in ablation_table(VARIANTS, models).splitlines()]
    labels = ["C-Eval", "bits per byte, zh", "%zh by script", "%zh by identification"]
    assert lines[0] == ["CPT", "additional data", "model", *labels]
    assert lines[2] == ["with", "with", "C-SFT", "45.00 ± 1.0", "1.5000", "95.0%", "-"]
    assert lines[3] == ["with", "without", "en only", "-", "1.5500 (+0.0500)", "-", "-"]
    full = "30.00 ± 1.0 (-15.00)", "2.0000 (+0.5000)", "10.0% (-85.0)", "-"
    assert lines[5] == ["without", "without", "plain", *full]


@pytest.mark.parametrize(
    ("variants", "message"),
    [
        ([VariantConfig("other", True, True)], "ablation has the model 'other'; expected one of plain, SFT, C-SFT, en only"),
        ([VariantConfig("SFT", False, True)], "ablation has no model with cpt: true and additional_data: true"),
        ([VARIANTS[1], VariantConfig("SFT", True, True)], "ablation has two models with the same cpt"),
    ],
)
def test_wrong_ablations(variants: list[VariantConfig], message: str) -> None:
    models = dict.fromkeys(("plain", "SFT", "C-SFT", "en only"), "nowhere")
    with pytest.raises(InputError, match=message):
        EvaluateConfig(output="out", models=models, text=[TextConfig(__file__, "en")], ablation=variants)
