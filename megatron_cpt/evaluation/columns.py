"""The numbers of a model's measurements, as columns that tables and figures share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Measured = Mapping[str, Mapping[str, Any]]  # model -> part -> what was measured
WAYS = {"script": "script", "identified": "identification"}


@dataclass(frozen=True)
class Number:
    """With its standard error, where that is known."""

    value: float
    stderr: float | None = None


@dataclass(frozen=True)
class Column:
    """One number of each model.

    Attributes:
        part: of the measurements
        name: of a benchmark, or a language
        way: in which the share of a language is told
    """

    part: Literal["benchmarks", "text", "answers"]
    name: str
    way: str = ""

    @property
    def label(self) -> str:
        """In headers."""
        return f"{self.panel} by {WAYS[self.way]}" if self.way else self.panel

    @property
    def panel(self) -> str:
        """Of a figure: both ways to tell a language share one."""
        return {"benchmarks": self.name, "text": f"bits per byte, {self.name}", "answers": f"%{self.name}"}[self.part]

    def number(self, parts: Mapping[str, Any]) -> Number | None:
        """Of one model; None: it was not measured."""
        found = parts.get(self.part, {}).get(self.name)
        if found is None:
            return None
        value = found[{"benchmarks": "value", "text": "bits_per_byte", "answers": self.way}[self.part]]
        return None if value is None else Number(value, found.get("stderr"))

    def shown(self, number: Number | None) -> str:
        """In a table."""
        if number is None:
            return "-"
        error = "" if number.stderr is None else f" ± {100 * number.stderr:.1f}"
        formats = {
            "benchmarks": f"{100 * number.value:.2f}",
            "text": f"{number.value:.4f}",
            "answers": f"{number.value:.1%}",
        }
        return formats[self.part] + error

    def difference(self, number: Number, other: Number) -> str:
        """Between two models, in the units of `shown`."""
        change = number.value - other.value
        return {"benchmarks": f"{100 * change:+.2f}", "text": f"{change:+.4f}", "answers": f"{100 * change:+.1f}"}[self.part]


def score_columns(measured: Measured, part: Literal["benchmarks", "text", "answers"]) -> list[Column]:
    """Of all models, in the order in which they come."""
    names = dict.fromkeys(name for parts in measured.values() for name in parts.get(part, {}))
    ways = WAYS if part == "answers" else [""]
    return [Column(part, name, way) for name in names for way in ways]


def all_columns(measured: Measured) -> list[Column]:
    """Benchmarks, bits per byte, languages of the answers."""
    return [*score_columns(measured, "benchmarks"), *score_columns(measured, "text"), *score_columns(measured, "answers")]
