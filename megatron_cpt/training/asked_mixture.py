"""The ALMR that a run was asked for at each moment, from what ledger.json says of its mixtures and their stages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any


@dataclass(frozen=True)
class MixturePiece:
    """Samples over which the ALMR goes evenly from one value to another."""

    begin: int
    end: int | None
    first: float
    last: float

    def additional(self, n: int) -> float:
        """Samples of the additional languages, as asked, among the first `n` of a run that lie in this piece."""
        part = max(0, (n if self.end is None else min(n, self.end)) - self.begin)
        if self.end is None or self.end == self.begin:
            return part * self.first
        slope = (self.last - self.first) / (self.end - self.begin)
        return part * self.first + slope * part**2 / 2


@dataclass(frozen=True)
class AskedMixture:
    """What was asked of a run.

    Attributes:
        borders: tokens before which a stage ends or another mixture begins
    """

    pieces: tuple[MixturePiece, ...]
    seq_length: int
    borders: tuple[int, ...]

    def so_far(self, tokens: int) -> float:
        """ALMR of the first tokens of the run; of none: that of the first sample."""
        samples = tokens // self.seq_length
        return sum(piece.additional(samples) for piece in self.pieces) / samples if samples else self.pieces[0].first


def asked_mixture(ledger: Mapping[str, Any]) -> AskedMixture | None:
    """Of ledger.json; None where it does not say, as with Megatron-LM's order.

    Each segment has the stages of its mixture, counted from the beginning of the run, and holds until the next one begins.
    """
    segments, seq_length = ledger.get("segments", []), ledger.get("planned", {}).get("seq_length")
    if not segments or not seq_length or any("order" in plan for segment in segments for plan in segment["schedule"]):
        return None
    starts = [segment["start"] for segment in segments]
    pieces: list[MixturePiece] = []
    for segment, begin, end in zip(segments, starts, [*starts[1:], None], strict=True):
        pieces += within(stages_of(segment["schedule"]), begin, end)
    borders = sorted({piece.begin * seq_length for piece in pieces} - {0})
    return AskedMixture(tuple(pieces), seq_length, tuple(borders))


def stages_of(schedule: list[dict[str, Any]]) -> Iterator[MixturePiece]:
    """The pieces that a schedule describes, from the beginning of a run."""
    begin = 0
    for plan in schedule:
        first, last = (float(Fraction(almr)) for almr in plan["almr"])
        end = None if plan["samples"] is None else begin + plan["samples"]
        yield MixturePiece(begin, end, first, last)
        if end is None:
            return
        begin = end
    yield MixturePiece(begin, None, last, last)


def within(pieces: Iterator[MixturePiece], begin: int, end: int | None) -> Iterator[MixturePiece]:
    """The parts of pieces that lie between two samples."""
    for piece in pieces:
        low = max(piece.begin, begin)
        high = piece.end if end is None else end if piece.end is None else min(piece.end, end)
        if high is not None and high <= low:
            continue
        yield MixturePiece(low, high, at(piece, low), piece.last if high is None else at(piece, high))


def at(piece: MixturePiece, sample: int) -> float:
    """The ALMR that is asked for at a sample."""
    if piece.end is None or piece.end == piece.begin:
        return piece.first
    return piece.first + (piece.last - piece.first) * (sample - piece.begin) / (piece.end - piece.begin)
