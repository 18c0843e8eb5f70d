"""The state of a run's data: how much it has consumed, and of what. It travels in every checkpoint.

As long as neither the mixture nor the global batch size changes it is one number, `consumed_samples`. A change begins a new
segment: blocks are counted from there, and each corpus goes on with the sample that was its turn.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from typing import Any

from megatron_cpt.data.loader import Order
from megatron_cpt.data.mixture import Mixture
from megatron_cpt.data.partial import difference
from megatron_cpt.data.sampling.splitters import Position, StagePlan, TreePosition, count
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
    trees: dict[str, dict[str, Any]] | None = None
    """How far the trees of groups had come: {"general": {"members": see `Mixture.describe_group`, "samples": n}, ...}.
    None: of a version that did not carry over what the mixture before owed."""

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
    def phase(self) -> Segment:
        """The segment in which the run's mixture began: since then only the batch has changed."""
        segments = list(self.segments)
        while len(segments) > 1 and (segments[-2].mixture, segments[-2].schedule) == (self.now.mixture, self.now.schedule):
            segments.pop()
        return segments[-1]

    @property
    def now(self) -> Segment:
        """The segment the run is in."""
        return self.segments[-1]

    def order(self, mixture: Mixture, schedule: Schedule) -> Order:
        """Where the samples of this segment lie."""
        if schedule.megatron is not None:
            return schedule.megatron
        schedule = self.continued(mixture, schedule)
        return mixture.sample_order(schedule, self.now.global_batch_size, self.now.start)

    def continued(self, mixture: Mixture, schedule: Schedule) -> Schedule:
        """The schedule as it goes on after what was read of other mixtures: `counts` are those of the whole run then.

        Each corpus goes on with its next sample, the additional text that is owed is carried over, and a group that is the
        same as before goes on in its tree.
        """
        phase = self.phase
        if phase.start == 0 or schedule.megatron is not None or schedule.begin is not None or schedule.moved:
            return schedule
        before = phase.samples_before()
        used = tuple(before[corpus.name] for corpus in mixture.corpora)
        if phase.trees is None:
            counts = schedule.counts(phase.start)
            return replace(schedule, moved=tuple(a - b for a, b in zip(used, counts, strict=True)))
        begin = Position(phase.start, used, self.debt(), tree_positions(phase.trees, mixture, used))
        return replace(schedule, begin=begin)

    def debt(self) -> Fraction:
        """Additional samples that were asked for before the run's mixture began, less those that were read."""
        phase = self.phase
        asked = Fraction(0)
        for segment, following in itertools.pairwise(self.segments):
            if segment.start < phase.start:
                described = described_schedule(segment.schedule)
                asked += described.asked(following.start) - described.asked(segment.start)
        return asked - sum(use.samples for use in phase.before if use.group == "additional")

    def consumed(self, mixture: Mixture, schedule: Schedule, consumed_samples: int) -> tuple[CorpusUse, ...]:
        """Everything the run has read so far: in this segment and before."""
        schedule = self.continued(mixture, schedule)
        uses = {(use.name, use.bin_sha256, use.group): use for use in self.now.before}
        counts = zip(schedule.counts(consumed_samples), schedule.counts(self.now.start), strict=True)
        for corpus, (now, began) in zip(mixture.corpora, counts, strict=True):
            key = corpus.name, corpus.manifest.files["bin"].sha256, corpus.group or ""
            use = uses.get(key, CorpusUse(*key, 0))
            uses[key] = replace(use, samples=use.samples + now - began)
        return tuple(uses.values())

    def to_json(self, mixture: Mixture, schedule: Schedule, consumed_samples: int) -> dict[str, Any]:
        """Plain values for a checkpoint after so many samples."""
        schedule = self.continued(mixture, schedule)
        trees = schedule.position(consumed_samples).trees if schedule.megatron is None and not schedule.moved else {}
        return {
            "segments": [asdict(segment) for segment in self.segments],
            "consumed": [asdict(use) for use in self.consumed(mixture, schedule, consumed_samples)],
            "trees": {
                name: {"members": mixture.describe_group(tree.group), "samples": tree.samples}
                for name, tree in trees.items()
            },
        }


def described_schedule(described: Sequence[dict[str, Any]]) -> Schedule:
    """A schedule as far as its description (`Schedule.describe`) says: lengths and ALMR."""
    plans = [
        StagePlan(plan["samples"], (Fraction(plan["almr"][0]), Fraction(plan["almr"][1])), None, None) for plan in described
    ]
    return Schedule(tuple(plans), 0, ())


def tree_positions(trees: dict[str, dict[str, Any]], mixture: Mixture, used: tuple[int, ...]) -> dict[str, TreePosition]:
    """The trees of a mixture before that can go on in this one, each corpus with its next sample."""
    found = {}
    for name, tree in trees.items():
        group = mixture.find_group(tree["members"])
        if group is not None:
            counts = [0] * len(used)
            count(group.tree(), tree["samples"], counts)
            found[name] = TreePosition(group, tree["samples"], tuple(a - b for a, b in zip(used, counts, strict=True)))
    return found


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
    longer: bool = False,
) -> DataState:
    """The state of a run that goes on after a checkpoint with `saved` (see `DataState.to_json`).

    `longer`: its length may be another than planned, and with it stages that are given as fractions of it.

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
    accept_new_mixture = accept_new_mixture or (longer and now.mixture == fingerprint)
    if changed and not accept_new_mixture and now.mixture == fingerprint:
        raise InputError(
            f"{mixture.path}: the length of the run (train_iters, global_batch_size) is not what it was, and with it stages "
            f"that depend on it: {changed[0]} samples or almr; data.accept_new_mixture takes them from here on, and so does "
            f"training.extend_to"
        )
    if changed and not accept_new_mixture:
        raise InputError(
            f"{read}: {changed[0]}; data.accept_new_mixture takes it from here on, each corpus going on where it was"
        )
    if not changed and (now.global_batch_size == global_batch_size or schedule.megatron is not None):
        return DataState(segments)
    trees = saved.get("trees", {})
    segment = Segment(consumed_samples, global_batch_size, _uses(saved["consumed"]), fingerprint, described, trees)
    return DataState((*segments, segment))


def _uses(saved: Sequence[dict[str, Any]]) -> tuple[CorpusUse, ...]:
    return tuple(CorpusUse(**use) for use in saved)
