"""The state of a run's data: how much it has consumed, and of what. It travels in every checkpoint.

As long as neither the mixture nor the global batch size changes it is one number, `consumed_samples`. A change begins a new
phase: blocks are counted from there, and each corpus goes on with the sample that was its turn.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from typing import Any, TypeVar

from megatron_cpt.mixture.loader import Order
from megatron_cpt.mixture.mixture import Mixture
from megatron_cpt.mixture.order.splitters import Position, StagePlan, TreePosition, count
from megatron_cpt.mixture.stages import Schedule
from megatron_cpt.utils.compare import describe_difference
from megatron_cpt.utils.errors import InputError, brief

T = TypeVar("T")
MOST_SAMPLES = 1 << 58  # of a run: so many from each corpus, with those of this run, stay within what the order can count
MOST_GROUPS_WITHIN = 20
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
class MixturePhase:
    """A stretch of a run with one mixture and one global batch size, from sample `start` on."""

    start: int
    global_batch_size: int
    consumed_before: tuple[CorpusUse, ...]
    """What had been read before."""
    mixture: dict[str, Any]
    """Its fingerprint."""
    schedule: list[dict[str, Any]]
    trees: dict[str, dict[str, Any]] | None = None
    """How far the trees of groups had come: {"general": {"members": see `Mixture.describe_group`, "samples": n}, ...}.
    None: of a version that did not carry over what the mixture before owed."""

    def to_json(self) -> dict[str, Any]:
        """Plain values; `consumed_before` is written as "before", as it always was."""
        return {"before" if name == "consumed_before" else name: value for name, value in asdict(self).items()}

    def samples_before(self) -> dict[str, int]:
        """By corpus of this mixture, samples of this very text that were read before."""
        return {
            name: sum(u.samples for u in self.consumed_before if (u.name, u.bin_sha256) == (name, facts["bin_sha256"]))
            for name, facts in self.mixture["corpora"].items()
        }


@dataclass(frozen=True)
class DataState:
    """The phases of a run so far; the last one is the one it is in."""

    phases: tuple[MixturePhase, ...]

    @property
    def mixture_start(self) -> MixturePhase:
        """The phase in which the run's mixture began: since then only the batch has changed."""
        phases = list(self.phases)
        while len(phases) > 1 and (phases[-2].mixture, phases[-2].schedule) == (self.current.mixture, self.current.schedule):
            phases.pop()
        return phases[-1]

    @property
    def current(self) -> MixturePhase:
        """The phase the run is in."""
        return self.phases[-1]

    def order(self, mixture: Mixture, schedule: Schedule) -> Order:
        """Where the samples of this phase lie."""
        if schedule.megatron is not None:
            return schedule.megatron
        schedule = self.continued(mixture, schedule)
        return mixture.sample_order(schedule, self.current.global_batch_size, self.current.start)

    def continued(self, mixture: Mixture, schedule: Schedule) -> Schedule:
        """The schedule as it goes on after what was read of other mixtures: `counts` are those of the whole run then.

        Each corpus goes on with its next sample, the additional text that is owed is carried over, and a group that is the
        same as before goes on in its tree.
        """
        mixture_start = self.mixture_start
        if mixture_start.start == 0 or schedule.megatron is not None or schedule.begin is not None or schedule.moved:
            return schedule
        before = mixture_start.samples_before()
        used = tuple(before[corpus.name] for corpus in mixture.corpora)
        if mixture_start.trees is None:
            counts = schedule.counts(mixture_start.start)
            return replace(schedule, moved=tuple(a - b for a, b in zip(used, counts, strict=True)))
        begin = Position(mixture_start.start, used, self.debt(), tree_positions(mixture_start.trees, mixture, used))
        return replace(schedule, begin=begin)

    def debt(self) -> Fraction:
        """Additional samples that were asked for before the run's mixture began, less those that were read."""
        mixture_start = self.mixture_start
        asked = Fraction(0)
        for phase, following in itertools.pairwise(self.phases):
            if phase.start < mixture_start.start:
                described = described_schedule(phase.schedule)
                asked += described.asked(following.start) - described.asked(phase.start)
        return asked - sum(use.samples for use in mixture_start.consumed_before if use.group == "additional")

    def consumed(self, mixture: Mixture, schedule: Schedule, consumed_samples: int) -> tuple[CorpusUse, ...]:
        """Everything the run has read so far: in this phase and before."""
        schedule = self.continued(mixture, schedule)
        uses = {(use.name, use.bin_sha256, use.group): use for use in self.current.consumed_before}
        counts = zip(schedule.counts(consumed_samples), schedule.counts(self.current.start), strict=True)
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
            "segments": [phase.to_json() for phase in self.phases],
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


def realised_almr(consumed: Sequence[CorpusUse]) -> float:
    """The realised ALMR."""
    total = sum(use.samples for use in consumed)
    return sum(use.samples for use in consumed if use.group == "additional") / total if total else 0.0


def initial_state(mixture: Mixture, schedule: Schedule, global_batch_size: int) -> DataState:
    """The state of a run that has read nothing yet."""
    return DataState((MixturePhase(0, global_batch_size, (), mixture.fingerprint(), schedule.describe()),))


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

    InputError: the mixture is another one and that was not accepted, or cannot be; or what was saved is damaged.
    """
    fingerprint, described = mixture.fingerprint(), schedule.describe()
    phases, changed = compare_phases(saved, consumed_samples, mixture, described, accept_new_mixture, longer)
    if not changed and phases[-1].global_batch_size == global_batch_size:
        return DataState(phases)
    trees = _trees(saved.get("trees", {}), "data.trees")
    phase = MixturePhase(consumed_samples, global_batch_size, _uses(saved.get("consumed")), fingerprint, described, trees)
    return DataState((*phases, phase))


def compare_phases(
    saved: dict[str, Any],
    consumed_samples: int,
    mixture: Mixture,
    described: list[dict[str, Any]],
    accept_new_mixture: bool,
    longer: bool,
) -> tuple[tuple[MixturePhase, ...], bool]:
    """The phases in a checkpoint, and whether mixture or schedule (see `Schedule.describe`) have changed since the last.

    InputError: they have, and that was not accepted, or cannot be; or what was saved is damaged.
    """
    phases = saved_phases(saved)
    now, fingerprint = phases[-1], mixture.fingerprint()
    changed = [
        describe_difference(old, new) for old, new in ((now.mixture, fingerprint), (now.schedule, described)) if old != new
    ]
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
            f"{mixture.path}: the length of the run (train_iters, global_batch_size) is not what it was, and the stages "
            f"that depend on it change: {changed[0]}; data.accept_new_mixture or training.extend_to takes them from here on"
        )
    if changed and not accept_new_mixture:
        raise InputError(
            f"{read}: {changed[0]}; data.accept_new_mixture takes it from here on, each corpus going on where it was"
        )
    return phases, bool(changed)


def saved_phases(saved: Any) -> tuple[MixturePhase, ...]:
    """The phases in a checkpoint's manifest, every field checked: its numbers go to the native order of the data.

    InputError: it is another kind of thing, or a number that no run can have
    """
    phases = _of_kind(_of_kind(saved, dict, "data").get("segments"), list, "data.segments")
    if not phases:
        raise InputError("the checkpoint's manifest.json: data.segments is empty; expected one or more")
    return tuple(_phase(phase, f"data.segments[{i}]") for i, phase in enumerate(phases))


def _phase(saved: Any, where: str) -> MixturePhase:
    fields = _of_kind(saved, dict, where)
    mixture = _of_kind(fields.get("mixture"), dict, f"{where}.mixture")
    for name, facts in _of_kind(mixture.get("corpora"), dict, f"{where}.mixture.corpora").items():
        place = f"{where}.mixture.corpora.{name}"
        _of_kind(_of_kind(facts, dict, place).get("bin_sha256"), str, f"{place}.bin_sha256")
    for name in FIXED:
        if name not in mixture:
            raise InputError(f"the checkpoint's manifest.json: {where}.mixture has no field {name!r}")
    schedule = _of_kind(fields.get("schedule"), list, f"{where}.schedule")
    return MixturePhase(
        start=_number(fields.get("start"), 0, f"{where}.start"),
        global_batch_size=_number(fields.get("global_batch_size"), 1, f"{where}.global_batch_size"),
        consumed_before=_uses(fields.get("before"), f"{where}.before"),
        mixture=mixture,
        schedule=[_plan(plan, f"{where}.schedule[{i}]") for i, plan in enumerate(schedule)],
        trees=None if fields.get("trees") is None else _trees(fields["trees"], f"{where}.trees"),
    )


def _plan(saved: Any, where: str) -> dict[str, Any]:
    plan = _of_kind(saved, dict, where)
    if "order" in plan:  # Megatron-LM's
        return plan
    if plan.get("samples") is not None:
        _number(plan["samples"], 0, f"{where}.samples")
    for i, share in enumerate(_of_kind(plan.get("almr"), list, f"{where}.almr")):
        _fraction(share, f"{where}.almr[{i}]")
    return plan


def _fraction(saved: Any, where: str) -> None:
    """Refuse what is not written as `Fraction` writes itself: 1e999999999 would take all memory."""
    if re.fullmatch(r"[0-9]{1,999}(/[1-9][0-9]{0,998})?", _of_kind(saved, str, where)) is None:
        raise InputError(f"the checkpoint's manifest.json: {where} is {brief(saved)}; expected a fraction")


def _trees(saved: Any, where: str) -> dict[str, dict[str, Any]]:
    trees = _of_kind(saved, dict, where)
    for name, tree in trees.items():
        _number(_of_kind(tree, dict, f"{where}.{name}").get("samples"), 0, f"{where}.{name}.samples")
        _members(tree.get("members"), f"{where}.{name}.members")
    return trees


def _members(saved: Any, where: str, depth: int = 0) -> None:
    for i, member in enumerate(_of_kind(saved, list, where)):
        place = f"{where}[{i}]"
        if len(_of_kind(member, list, place)) != 2 or depth > MOST_GROUPS_WITHIN:
            raise InputError(f"the checkpoint's manifest.json: {place} is {brief(member)}; expected a corpus and a weight")
        if not isinstance(member[0], str):
            _members(member[0], f"{place}[0]", depth + 1)
        _fraction(member[1], f"{place}[1]")


def _uses(saved: Any, where: str = "data.consumed") -> tuple[CorpusUse, ...]:
    uses = []
    for i, use in enumerate(_of_kind(saved, list, where)):
        place = f"{where}[{i}]"
        fields = _of_kind(use, dict, place)
        name, sha256, group = (_of_kind(fields.get(key), str, f"{place}.{key}") for key in ("name", "bin_sha256", "group"))
        uses.append(CorpusUse(name, sha256, group, _number(fields.get("samples"), 0, f"{place}.samples")))
    return tuple(uses)


def _of_kind(value: Any, kind: type[T], where: str) -> T:
    if not isinstance(value, kind):
        expected = {"dict": "an object", "list": "a list", "str": "a text"}[kind.__name__]
        raise InputError(f"the checkpoint's manifest.json: {where} is {brief(value)}; expected {expected}")
    return value


def _number(value: Any, least: int, where: str) -> int:
    if type(value) is not int or not least <= value <= MOST_SAMPLES:
        expected = f"a whole number from {least} to {MOST_SAMPLES}"
        raise InputError(f"the checkpoint's manifest.json: {where} is {brief(value)}; expected {expected}")
    return value
