"""Which corpus a sample comes from: trees of Bresenham splitters, and stages that change the shares at exact samples.

A splitter sends round(k p) of the first k samples that reach it to its left child: any prefix of a run has the asked shares
almost exactly, and where sample n goes is computed without looking at the samples before.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

ONE = 1 << 64
HALF = 1 << 63
MAX_RAMP = 1 << 46
"""Samples a stage with a changing ALMR may have: its arithmetic is done in 128 bits."""


@dataclass(frozen=True)
class Leaf:
    """A corpus, by its position in the mixture."""

    corpus: int


@dataclass(frozen=True)
class Split:
    """Of the first k samples that reach this node, `left` gets round(k * left_share / 2**64)."""

    left_share: int
    left: Leaf | Split
    right: Leaf | Split

    def left_count(self, k: int) -> int:
        """Of the first k samples, those that go left."""
        return (k * self.left_share + HALF) >> 64


Tree = Leaf | Split


@dataclass(frozen=True)
class Group:
    """Corpora (by position) and sub-groups that share what the group gets, by weights above 0 of any scale."""

    members: tuple[int | Group, ...]
    weights: tuple[Fraction, ...]

    def corpora(self) -> list[int]:
        """All corpora in the group and below."""
        return [c for member in self.members for c in (member.corpora() if isinstance(member, Group) else [member])]

    def tree(self) -> Tree:
        """Huffman's tree: the heaviest members near the root, which keeps the deviation of every count small."""
        heap: list[tuple[Fraction, int, Tree]] = [
            (weight, order, member.tree() if isinstance(member, Group) else Leaf(member))
            for order, (member, weight) in enumerate(zip(self.members, self.weights, strict=True))
        ]
        heapq.heapify(heap)
        order = len(heap)
        while len(heap) > 1:
            light, heavy = heapq.heappop(heap), heapq.heappop(heap)
            heapq.heappush(heap, (light[0] + heavy[0], order, _join(heavy[2], heavy[0], light[2], light[0])))
            order += 1
        return heap[0][2]


def _join(left: Tree, left_weight: Fraction, right: Tree, right_weight: Fraction) -> Tree:
    """The node that shares its samples by these weights; a right branch too light for 64 bits never gets one."""
    share = round(left_weight * ONE / (left_weight + right_weight))
    return left if share == ONE else Split(share, left, right)


def find_in_tree(node: Tree, k: int) -> tuple[int, int]:
    """Sample k of a tree -> (corpus, samples of that corpus before it)."""
    while isinstance(node, Split):
        before = node.left_count(k)
        if node.left_count(k + 1) > before:
            node, k = node.left, before
        else:
            node, k = node.right, k - before
    return node.corpus, k


def count(node: Tree, k: int, counts: list[int]) -> None:
    """Add to `counts` how many of the first k samples of a tree each corpus gives."""
    stack = [(node, k)]
    while stack:
        node, k = stack.pop()
        if isinstance(node, Leaf):
            counts[node.corpus] += k
        else:
            left = node.left_count(k)
            stack += [(node.left, left), (node.right, k - left)]


@dataclass(frozen=True)
class StagePlan:
    """What is asked of a stage: its length in samples (None: without end), and how ALMR goes from its first to its last.

    Between them ALMR changes linearly. A group that gets nothing may be None.
    """

    samples: int | None
    almr: tuple[Fraction, Fraction]
    general: Group | None
    additional: Group | None

    def asked(self, k: int) -> Fraction:
        """Additional samples among the first k, as asked: not a whole number."""
        first, last = self.almr
        ramp = (last - first) * k * k / (2 * self.samples) if self.samples and last != first else 0
        return first * k + ramp


@dataclass(frozen=True)
class Stage:
    """A stretch of the run with fixed trees, from sample `start` on.

    Of its first k samples the left group gets floor((k share + floor(ramp k^2 / (2 length)) + phase) / 2^64). `phase` is
    what the stages before it owed to that group, so that rounding never adds up. `left` is the group whose share rises
    (additional, if none does); a stage of one group has no `right`.
    """

    start: int
    share: int
    phase: int
    ramp: int
    length: int
    left: Tree
    right: Tree | None
    left_before: int
    """Samples that these same trees have given in stages before: they go on, and do not begin anew."""
    right_before: int
    base: tuple[int, ...]
    """By corpus: samples it gave before its tree began."""

    def left_count(self, k: int) -> int:
        """Of the first k samples of the stage, those of the left group."""
        if self.right is None:
            return k
        ramp = self.ramp * k * k // (2 * self.length) if self.ramp else 0
        return (k * self.share + ramp + self.phase) >> 64

    def find(self, n: int) -> tuple[int, int]:
        """Sample n of the run, which lies in this stage -> (corpus, samples of that corpus before it)."""
        k = n - self.start
        before = self.left_count(k)
        if self.right is None or self.left_count(k + 1) > before:
            corpus, used = find_in_tree(self.left, self.left_before + before)
        else:
            corpus, used = find_in_tree(self.right, self.right_before + k - before)
        return corpus, self.base[corpus] + used

    def moved(self, more: Sequence[int]) -> Stage:
        """The stage when each corpus has given so many samples more (or fewer) than its plan says."""
        return replace(self, base=tuple(a + b for a, b in zip(self.base, more, strict=True)))

    def counts(self, n: int) -> list[int]:
        """How many of the first n samples of the run, n not before this stage, each corpus gives."""
        counts = list(self.base)
        left = self.left_count(n - self.start)
        count(self.left, self.left_before + left, counts)
        if self.right is not None:
            count(self.right, self.right_before + n - self.start - left, counts)
        return counts


@dataclass(frozen=True)
class TreePosition:
    """How far a group's tree has come, and (by corpus) the samples that were read before the tree began."""

    group: Group
    samples: int
    base: tuple[int, ...]


@dataclass(frozen=True)
class Position:
    """Where the counting is at sample `start` of a run: all that the order of later samples depends on.

    Attributes:
        used: by corpus, samples read so far
        debt: additional samples that were asked for so far less those that were given
        trees: of each group that has had samples, "additional" or "general", its last tree
    """

    start: int
    used: tuple[int, ...]
    debt: Fraction
    trees: Mapping[str, TreePosition]


def beginning(num_corpora: int) -> Position:
    """That of a run that has read nothing."""
    return Position(0, (0,) * num_corpora, Fraction(0), {})


def build_stages(plans: Sequence[StagePlan], num_corpora: int, begin: Position | None = None) -> list[Stage]:
    """The stages of a run, one after the other from `begin`, by default from sample 0, on.

    After the last, if it has a length, comes an endless one with its groups and the ALMR it ended with: a global batch may
    reach beyond the end.
    """
    return [stage for _, _, stage in walk(plans, begin or beginning(num_corpora))]


def position_at(plans: Sequence[StagePlan], begin: Position, n: int) -> Position:
    """Where the counting is at sample n, not before `begin`."""
    for position, plan, stage in walk(plans, begin):
        if plan.samples is None or n < stage.start + plan.samples:
            return after(position, plan, stage, n - stage.start)
    raise AssertionError("the last stage has no end")


def walk(plans: Sequence[StagePlan], position: Position) -> Iterator[tuple[Position, StagePlan, Stage]]:
    """Each plan from a position on, with the position it begins at and the stage that comes of it."""
    final = plans[-1]
    if final.samples is not None:
        plans = [*plans, StagePlan(None, (final.almr[1], final.almr[1]), final.general, final.additional)]
    for plan in plans:
        assert plan.samples is not None or plan.almr[0] == plan.almr[1], "an endless stage has one ALMR"
        position = with_trees(plan, position)
        stage = stage_at(plan, position)
        yield position, plan, stage
        if plan.samples is None:
            return
        position = after(position, plan, stage, plan.samples)


def groups_of(plan: StagePlan) -> dict[str, Group]:
    """The groups that get something, the one whose share rises first (additional, if none does)."""
    groups = {"additional": plan.additional, "general": plan.general}
    if plan.almr[1] < plan.almr[0]:
        groups = dict(reversed(groups.items()))
    found = {name: group for name, group in groups.items() if any(_shares(plan, name))}
    assert None not in found.values(), "a group with a share has corpora"
    return {name: group for name, group in found.items() if group is not None}


def with_trees(plan: StagePlan, position: Position) -> Position:
    """A group that is the one it was goes on in its tree; another begins a new one."""
    trees = dict(position.trees)
    for name, group in groups_of(plan).items():
        if name not in trees or trees[name].group != group:
            trees[name] = TreePosition(group, 0, position.used)
    return replace(position, trees=trees)


def stage_at(plan: StagePlan, position: Position) -> Stage:
    """The stage of a plan that begins at a position."""
    groups, base = groups_of(plan), list(position.used)
    trees = [position.trees[name] for name in groups]
    for tree in trees:
        for corpus in tree.group.corpora():
            base[corpus] = tree.base[corpus]
    names = list(groups)
    first, last = _shares(plan, names[0]) if len(names) == 2 else (ONE, ONE)
    owed = (position.debt if names[0] == "additional" else -position.debt) + Fraction(1, 2)
    return Stage(
        start=position.start,
        share=min(first, ONE - 1),
        phase=min(max(int(owed * ONE), 0), ONE - 1),
        ramp=min(last - first, ONE - 1),
        length=plan.samples or 1,
        left=trees[0].group.tree(),
        right=trees[1].group.tree() if len(trees) == 2 else None,
        left_before=trees[0].samples,
        right_before=trees[1].samples if len(trees) == 2 else 0,
        base=tuple(base),
    )


def after(position: Position, plan: StagePlan, stage: Stage, samples: int) -> Position:
    """The position when so many samples of a stage, which begins at `position`, have been read."""
    left = stage.left_count(samples)
    given = dict(zip(groups_of(plan), (left, samples - left), strict=False))
    trees = {name: replace(tree, samples=tree.samples + given.get(name, 0)) for name, tree in position.trees.items()}
    return Position(
        start=position.start + samples,
        used=tuple(stage.counts(stage.start + samples)),
        debt=position.debt + plan.asked(samples) - given.get("additional", 0),
        trees=trees,
    )


def rest_of(plans: Sequence[StagePlan], n: int) -> list[StagePlan]:
    """What is left of plans after their first n samples; at least one plan."""
    rest: list[StagePlan] = []
    for plan in plans:
        if plan.samples is None:
            rest.append(plan)
        elif n < plan.samples:
            first, last = plan.almr
            rest.append(replace(plan, samples=plan.samples - n, almr=(first + (last - first) * n / plan.samples, last)))
        n = max(n - (plan.samples or 0), 0)
    return rest or [replace(plans[-1], samples=None, almr=(plans[-1].almr[1],) * 2)]


def _shares(plan: StagePlan, name: str) -> tuple[int, int]:
    """A group's share in 64 bits at the beginning and at the end of a stage."""
    first, last = plan.almr if name == "additional" else (1 - plan.almr[0], 1 - plan.almr[1])
    return round(first * ONE), round(last * ONE)
