"""The paper's ablation: with and without CPT, with and without fine-tuning data in the additional language."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_cpt.evaluation.columns import Measured, all_columns
from megatron_cpt.evaluation.config import VariantConfig
from megatron_cpt.evaluation.table import markdown_table


def ablation_table(variants: Sequence[VariantConfig], measured: Measured) -> str:
    """The full variant first; the others with their differences to it in brackets, in the units of the column."""
    ordered = sorted(variants, key=lambda variant: (variant.cpt, variant.additional_data), reverse=True)
    full = measured[ordered[0].model]
    columns = all_columns({variant.model: measured[variant.model] for variant in ordered})
    rows = []
    for variant in ordered:
        row = [mark(variant.cpt), mark(variant.additional_data), variant.model]
        for column in columns:
            number, best = column.number(measured[variant.model]), column.number(full)
            difference = ""
            if number is not None and best is not None and variant is not ordered[0]:
                difference = f" ({column.difference(number, best)})"
            row.append(column.shown(number) + difference)
        rows.append(row)
    return markdown_table(["CPT", "additional data", "model", *(column.label for column in columns)], rows)


def mark(there: bool) -> str:
    """With or without."""
    return "with" if there else "without"
