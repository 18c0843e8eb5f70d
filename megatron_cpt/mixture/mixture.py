"""A mixture: which corpora a run reads, in which shares, by stages, and the order of its samples."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from megatron_cpt.corpus.indexed_dataset import IndexedCorpus
from megatron_cpt.corpus.manifest import CorpusManifest
from megatron_cpt.mixture.config import GROUPS, Entry, GroupName, StageConfig, SubGroupConfig
from megatron_cpt.mixture.order.megatron import MegatronOrder
from megatron_cpt.mixture.order.order import CorpusTokens, SampleOrder
from megatron_cpt.mixture.order.splitters import Group
from megatron_cpt.mixture.stages import Schedule, corpus_shares, plan_run
from megatron_cpt.utils.errors import InputError


@dataclass(frozen=True)
class Corpus:
    """One preprocessed corpus as the mixture uses it. `group` is None for a validation set."""

    name: str
    prefix: str
    language: str
    manifest: CorpusManifest
    data: IndexedCorpus
    group: GroupName | None = None
    sub_group: str | None = None
    max_epochs: Fraction | None = None

    def num_samples(self, seq_length: int) -> int:
        """Whole samples in one pass: a sample is seq_length inputs and one more token for the last target."""
        return CorpusTokens(self.name, self.data.num_tokens).samples(seq_length)


@dataclass(frozen=True)
class Mixture:
    """A checked mixture file. A corpus is known by its position in `corpora` (general ones first)."""

    path: str
    seq_length: int
    seed: int
    corpora: tuple[Corpus, ...]
    stages: tuple[StageConfig, ...]
    """Each with its name, ALMR and lists."""
    validation: tuple[Corpus, ...]

    @property
    def manifest(self) -> CorpusManifest:
        """The manifest of the first corpus; all of them share one tokenizer."""
        return (self.corpora + self.validation)[0].manifest

    def fingerprint(self) -> dict[str, Any]:
        """What decides which text sample n is, as far as the file does; see `schedule` for the length of stages."""
        corpora = {
            corpus.name: {
                "group": corpus.group,
                "tokens": corpus.data.num_tokens,
                "bin_sha256": corpus.manifest.files["bin"].sha256,
            }
            for corpus in self.corpora
        }
        stages = [
            {
                "tokens": stage.tokens,
                "fraction": None if stage.fraction is None else str(stage.fraction),
                "almr": [[part.begin_tokens, str(part.first), str(part.last)] for part in stage.almr_parts],
                **{name: self.describe_group(self.group(getattr(stage, name))) for name in GROUPS},
            }
            for stage in self.stages
        ]
        tokenizer = self.manifest.tokenizer.fingerprint
        return {
            "seq_length": self.seq_length,
            "seed": self.seed,
            "stages": stages,
            "corpora": corpora,
            "tokenizer": tokenizer,
        }

    def group(self, entries: Sequence[Entry] | None) -> Group | None:
        """A list of the file as the order wants it: positions of corpora, with weights; None where it is empty."""
        members: list[int | Group] = []
        weights: list[Fraction] = []
        for entry in entries or ():
            member = self.group(entry.corpora) if isinstance(entry, SubGroupConfig) else self._positions[entry.called]
            assert member is not None, "a sub-group has corpora"
            inside = member.corpora() if isinstance(member, Group) else [member]
            members.append(member)
            weights.append(entry.weight or Fraction(sum(self.corpora[position].data.num_tokens for position in inside)))
        return Group(tuple(members), tuple(weights)) if members else None

    @functools.cached_property
    def _positions(self) -> dict[str, int]:
        return {corpus.name: position for position, corpus in enumerate(self.corpora)}

    def describe_group(self, group: Group | None) -> list[Any]:
        """A group in plain values: [name of a corpus, or a list for a sub-group; weight]."""
        if group is None:
            return []
        return [
            [self.describe_group(member) if isinstance(member, Group) else self.corpora[member].name, str(weight)]
            for member, weight in zip(group.members, group.weights, strict=True)
        ]

    def find_group(self, described: list[Any]) -> Group | None:
        """The group with this description; None: it has a corpus that is not in this mixture."""
        positions = self._positions
        found = [self.find_group(member) if isinstance(member, list) else positions.get(member) for member, _ in described]
        members = tuple(member for member in found if member is not None)
        weights = tuple(Fraction(weight) for _, weight in described)
        return Group(members, weights) if len(members) == len(weights) else None

    def schedule(self, run_samples: int) -> Schedule:
        """The stages of a run of so many samples. InputError: see `stages.plan_run`."""
        groups = [(self.group(stage.general), self.group(stage.additional)) for stage in self.stages]
        return plan_run(self.path, self.stages, groups, len(self.corpora), self.seq_length, run_samples)

    def megatron_schedule(self, run_samples: int, threads: int = 1) -> Schedule:
        """As `schedule`, in Megatron-LM's own order, which is built here. InputError: it cannot have stages."""
        schedule = self.schedule_of_one_almr(run_samples)
        weights = corpus_shares(schedule.plans[0])
        lengths = [corpus.data.lengths() for corpus in self.corpora]
        floats = [float(weights[place]) for place in range(len(self.corpora))]
        try:
            order = MegatronOrder(lengths, floats, run_samples, self.seq_length, self.seed, threads)
        except InputError as error:
            raise InputError(f"{self.path}: data.order megatron: {error}") from None
        return replace(schedule, megatron=order)

    def schedule_of_one_almr(self, run_samples: int) -> Schedule:
        """As `schedule`, of a mixture that Megatron-LM can have. InputError: it has stages, or corpora without a share."""
        schedule = self.schedule(run_samples)
        if len(schedule.plans) > 1 or schedule.plans[0].almr[0] != schedule.plans[0].almr[1]:
            raise InputError(
                f"{self.path}: data.order megatron knows one almr for the whole run; found {len(self.stages)} stages, or "
                f"an almr that changes"
            )
        if set(corpus_shares(schedule.plans[0])) != set(range(len(self.corpora))):
            raise InputError(f"{self.path}: data.order megatron wants a share above 0 for every corpus; leave out others")
        return schedule

    def sample_order(self, schedule: Schedule, global_batch_size: int, block_origin: int = 0) -> SampleOrder:
        """The order of the samples."""
        tokens = [CorpusTokens(corpus.name, corpus.data.num_tokens) for corpus in self.corpora]
        return SampleOrder(schedule.stages, tokens, self.seq_length, self.seed, global_batch_size, block_origin)
