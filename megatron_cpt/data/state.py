"""The state of a run's data: how much it has consumed, and of what. It travels in every checkpoint.

As long as neither the mixture nor the global batch size changes it is one number, `consumed_samples`. A change begins a new
segment: blocks are counted from there, and each corpus goes on with the sample that was its turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from megatron_cpt.data.loader import Order
from megatron_cpt.data.mixture import Mixture
from megatron_cpt.data.partial import difference
from megatron_cpt.data.stages import Schedule
from megatron_cpt.errors import InputError

FIXED = ("seq_length", "seed", "tokenizer")  # what a run cannot change: samples would be other ones


@dataclass(frozen=True)
class CorpusUse:
    """Samples of a corpus that were read as text of a group. A corpus is a name and a text: another text is another corpus.

    Together with its uses in other groups: samples 0 to n - 1 of the order that seed, name and epoch give them.
    """

    name: str
    bin_sha256: str
    group: str
    samples: int


@dataclass(frozen=True)
class Segment:
    """A stretch of a run with one mixture and one global batch size, from sample `start` on."""

    start: int
    global_batch_size: int
    before: tuple[CorpusUse, ...]
    """What had been read before."""
    mixture: dict[str, Any]
    """Its fingerprint."""
    schedule: list[dict[str, Any]]

    def samples_before(self) -> dict[str, int]:
        """By corpus of this mixture, samples of this very text that were read before."""
        return {
            name: sum(u.samples for u in self.before if (u.name, u.bin_sha256) == (name, facts["bin_sha256"]))
            for name, facts in self.mixture["corpora"].items()
        }


@dataclass(frozen=True)
class DataState:
    """The segments of a run so far; the last one is the one it is in."""

    segments: tuple[Segment, ...]

    @property
    def now(self) -> Segment:
        """The segment the run is in."""
        return self.segments[-1]

    def order(self, mixture: Mixture, schedule: Schedule) -> Order:
        """Where the samples of this segment lie."""
        if schedule.megatron is not None:
            return schedule.megatron
        return mixture.sample_order(schedule, self.now.global_batch_size, self.now.start, self.offsets(mixture, schedule))

    def offsets(self, mixture: Mixture, schedule: Schedule) -> dict[str, int]:
        """By corpus, samples it has given before this segment more (or fewer) than these stages say."""
        before, counts = self.now.samples_before(), schedule.counts(self.now.start)
        return {corpus.name: before[corpus.name] - n for corpus, n in zip(mixture.corpora, counts, strict=True)}

    def consumed(self, mixture: Mixture, schedule: Schedule, consumed_samples: int) -> tuple[CorpusUse, ...]:
        """Everything the run has read so far: in this segment and before."""
        uses = {(use.name, use.bin_sha256, use.group): use for use in self.now.before}
        counts = zip(schedule.counts(consumed_samples), schedule.counts(self.now.start), strict=True)
        for corpus, (now, began) in zip(mixture.corpora, counts, strict=True):
            key = corpus.name, corpus.manifest.files["bin"].sha256, corpus.group or ""
            use = uses.get(key, CorpusUse(*key, 0))
            uses[key] = replace(use, samples=use.samples + now - began)
        return tuple(uses.values())

    def to_json(self, consumed: Sequence[CorpusUse]) -> dict[str, Any]:
        """Plain values for a checkpoint; `consumed` as of its samples."""
        return {"segments": [asdict(segment) for segment in self.segments], "consumed": [asdict(use) for use in consumed]}


def almr_of(consumed: Sequence[CorpusUse]) -> float:
    """The realised ALMR."""
    total = sum(use.samples for use in consumed)
    return sum(use.samples for use in consumed if use.group == "additional") / total if total else 0.0


def begin(mixture: Mixture, schedule: Schedule, global_batch_size: int) -> DataState:
    """The state of a run that has read nothing yet."""
    return DataState((Segment(0, global_batch_size, (), mixture.fingerprint(), schedule.describe()),))


def resume(
    saved: dict[str, Any],
    consumed_samples: int,
    mixture: Mixture,
    schedule: Schedule,
    global_batch_size: int,
    accept_new_mixture: bool,
) -> DataState:
    """The state of a run that goes on after a checkpoint with `saved` (see `DataState.to_json`).

    InputError: the mixture is another one and that was not accepted, or cannot be.
    """
    segments = tuple(
        Segment(**segment | {"before": tuple(CorpusUse(**use) for use in segment["before"])})
        for segment in saved["segments"]
    )
    now, fingerprint, described = segments[-1], mixture.fingerprint(), schedule.describe()
    changed = [difference(old, new) for old, new in ((now.mixture, fingerprint), (now.schedule, described)) if old != new]
    read = f"{mixture.path}: not the mixture the run has read {consumed_samples:,} samples of"
    for name in FIXED:
        if now.mixture[name] != fingerprint[name]:
            found = f"{name} is {now.mixture[name]!r} there and {fingerprint[name]!r} now"
            raise InputError(f"{read}: {found}, which no run can change; begin another from its checkpoint")
    if now.schedule != described and any("order" in plan for plan in (*now.schedule, *described)):
        raise InputError(
            f"{read}: data.order megatron, whose samples depend on the length of the run (train_iters), cannot begin, end "
            f"or change within a run; begin another from its checkpoint"
        )
    if changed and not accept_new_mixture and now.mixture == fingerprint:
        raise InputError(
            f"{mixture.path}: the length of the run (train_iters, global_batch_size) is not what it was, and with it stages "
            f"that depend on it: {changed[0]} samples or almr; data.accept_new_mixture takes them from here on"
        )
    if changed and not accept_new_mixture:
        raise InputError(
            f"{read}: {changed[0]}; data.accept_new_mixture takes it from here on, each corpus going on where it was"
        )
    if not changed and (now.global_batch_size == global_batch_size or schedule.megatron is not None):
        return DataState(segments)
    segment = Segment(consumed_samples, global_batch_size, _uses(saved["consumed"]), fingerprint, described)
    return DataState((*segments, segment))


def _uses(saved: Sequence[dict[str, Any]]) -> tuple[CorpusUse, ...]:
    return tuple(CorpusUse(**use) for use in saved)
