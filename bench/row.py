"""One line of the benchmark table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Row:
    """`ratio` is ours / reference; `wanted` says which ratios are good enough, in words."""

    name: str
    unit: str
    ours: float
    reference: float
    reference_name: str
    ratio: float
    wanted: str
    holds: bool | None


def compare(
    name: str, unit: str, ours: float, reference: float, reference_name: str, wanted: float, sense: Literal["least", "most"]
) -> Row:
    """A row that holds when the ratio is at least, or at most, `wanted`."""
    ratio = ours / reference
    holds = ratio >= wanted if sense == "least" else ratio <= wanted
    return Row(
        name, unit, round(ours, 3), round(reference, 3), reference_name, round(ratio, 3), f"at {sense} {wanted}", holds
    )
