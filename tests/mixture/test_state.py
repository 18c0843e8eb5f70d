"""The state of a run's data through changes of mixture and batch: nothing twice, nothing left out."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_mixtures import make_corpus, make_mixture

from megatron_cpt.corpus.manifest import FileInfo
from megatron_cpt.mixture.config import AlmrRamp
from megatron_cpt.mixture.ledger import make_ledger
from megatron_cpt.mixture.mixture import Corpus, Mixture
from megatron_cpt.mixture.order.order import SampleOrder
from megatron_cpt.mixture.state import DataState, initial_state, realised_almr, resume
from megatron_cpt.utils.errors import InputError

SEQ_LENGTH = 4


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> list[Corpus]:
    """10, 20, 5 and 7 samples of 4 tokens."""
    folder = tmp_path_factory.mktemp("state")
    described = [
        ("wiki", "en", 43, "general"),
        ("books", "en", 81, "general"),
        ("news", "zh", 21, "additional"),
        ("poems", "zh", 30, "additional"),
    ]
    return [make_corpus(folder, *description) for description in described]


def mixture_of(corpora: list[Corpus], almr: Fraction) -> Mixture:
    return make_mixture(corpora, SEQ_LENGTH, almr)


def go_on(state: DataState, mixture: Mixture, new: Mixture, consumed: int, batch: int, accept: bool = True) -> DataState:
    """As through a checkpoint."""
    saved = json.loads(json.dumps(state.to_json(mixture, mixture.schedule(10_000), consumed)))
    return resume(saved, consumed, new, new.schedule(10_000), batch, accept)


def test_nothing_changed(corpora: list[Corpus]) -> None:
    mixture = mixture_of(corpora, Fraction(1, 5))
    state = initial_state(mixture, mixture.schedule(10_000), 8)
    assert go_on(state, mixture, mixture, 80, 8, accept=False) == state


@settings(max_examples=25, deadline=None)
@given(
    changes=st.lists(
        st.tuples(st.integers(0, 12), st.integers(1, 9), st.fractions(0, 1), st.sets(st.integers(0, 3), min_size=3)),
        min_size=2,
        max_size=5,
    )
)
def test_any_changes(corpora: list[Corpus], changes: list[tuple[int, int, Fraction, set[int]]]) -> None:
    """Over all phases each corpus gives sample 0, 1, 2, ... of its order, also when it was away for a while, and after
    every batch the additional text is what was asked for by all mixtures so far, to half a sample."""
    asked = Fraction(0)
    seen: dict[str, list[tuple[int, int]]] = {corpus.name: [] for corpus in corpora}
    state: DataState | None = None
    consumed, mixture = 0, None
    for steps, batch, almr, used in changes:
        chosen = [corpora[i] for i in sorted(used)]
        groups = {corpus.group for corpus in chosen}
        almr = almr if len(groups) == 2 else Fraction(groups == {"additional"})
        new = mixture_of(chosen, almr)
        schedule = new.schedule(10_000)
        state = (
            initial_state(new, schedule, batch)
            if state is None or mixture is None
            else go_on(state, mixture, new, consumed, batch)
        )
        mixture = new
        order = state.order(mixture, schedule)
        assert isinstance(order, SampleOrder)
        for n in range(consumed, consumed + steps * batch):
            corpus, epoch, sample, _ = order.lookup(n)
            seen[chosen[corpus].name].append((epoch, sample))
            if (n + 1 - consumed) % batch == 0:
                given = sum(len(seen[corpus.name]) for corpus in corpora if corpus.group == "additional")
                assert abs(given - asked - almr * (n + 1 - consumed)) <= Fraction(1, 2)
        asked += almr * steps * batch
        consumed += steps * batch
        counts = {use.name: use.samples for use in state.consumed(mixture, schedule, consumed)}
        assert {name: len(found) for name, found in seen.items() if found} == {n: c for n, c in counts.items() if c}
        total = sum(counts.values())
        additional = counts.get("news", 0) + counts.get("poems", 0)
        assert realised_almr(state.consumed(mixture, schedule, consumed)) == (additional / total if total else 0)
    for corpus in corpora:
        found, size = seen[corpus.name], corpus.num_samples(SEQ_LENGTH)
        assert len(set(found)) == len(found)  # nothing twice
        epochs = [[sample for epoch, sample in found if epoch == e] for e in range(len(found) // size)]
        assert all(sorted(samples) == list(range(size)) for samples in epochs)  # nothing left out


def ramp(mixture: Mixture, first: Fraction, last: Fraction) -> Mixture:
    """ALMR goes from one value to the other over the run."""
    return replace(mixture, stages=(replace(mixture.stages[0], almr=AlmrRamp(first, last)),))


@settings(max_examples=50, deadline=None)
@given(
    phases=st.lists(
        st.tuples(st.integers(0, 40), st.fractions(0, 1, max_denominator=64), st.fractions(0, 1, max_denominator=64)),
        min_size=1,
        max_size=12,
    )
)
def test_almr_after_every_sample_through_any_changes(
    corpora: list[Corpus], phases: list[tuple[int, Fraction, Fraction]]
) -> None:
    """Half a sample, also where a ramp is left in its middle; each corpus of a group that stays has its share of it."""
    state, mixture, consumed, length = None, None, 0, 600
    asked, given = Fraction(0), 0
    for samples, first, last in phases:
        new = ramp(mixture_of(corpora, first), first, last)
        schedule = new.schedule(length)
        if state is None or mixture is None:
            state = initial_state(new, schedule, 1)
        else:
            saved = json.loads(json.dumps(state.to_json(mixture, mixture.schedule(length), consumed)))
            state = resume(saved, consumed, new, schedule, 1, True)
        mixture, asked_before = new, asked - schedule.asked(consumed)
        order = state.order(new, schedule)
        assert isinstance(order, SampleOrder)
        for n in range(consumed, consumed + samples):
            given += corpora[order.lookup(n).corpus].group == "additional"
            asked = asked_before + schedule.asked(n + 1)
            assert abs(given - asked) <= Fraction(1, 2) + Fraction(n + 1, 2**60)
        consumed += samples
    assert state is not None
    assert mixture is not None
    uses = {use.name: use.samples for use in state.consumed(mixture, mixture.schedule(length), consumed)}
    assert uses["news"] + uses["poems"] == given
    for name, others, group in (("wiki", "books", consumed - given), ("news", "poems", given)):  # which weigh their tokens
        tokens = {corpus.name: corpus.data.num_tokens for corpus in corpora}
        share = Fraction(tokens[name], tokens[name] + tokens[others])
        assert abs(uses[name] - share * group) <= Fraction(1, 2) + Fraction(1, 2**40)


def test_the_changes_of_the_report(corpora: list[Corpus]) -> None:
    """0.5 for one sample, then 0.25: of two samples one is additional. Eleven changes owe no more than half a sample."""
    almrs = [Fraction(1, 2), Fraction(1, 4)] * 6
    state, mixture = None, None
    for n, almr in enumerate(almrs):
        new = mixture_of(corpora, almr)
        schedule = new.schedule(10_000)
        if state is None or mixture is None:
            state = initial_state(new, schedule, 1)
        else:
            state = go_on(state, mixture, new, n, 1)
        mixture = new
        uses = state.consumed(new, schedule, n + 1)
        additional = sum(use.samples for use in uses if use.group == "additional")
        assert abs(additional - sum(almrs[: n + 1])) <= Fraction(1, 2)


def test_an_older_change_goes_on_as_it_was(corpora: list[Corpus]) -> None:
    """A checkpoint of a run whose mixture was changed before debts were carried over: not one sample is another one."""
    first, new = mixture_of(corpora, Fraction(1, 2)), mixture_of(corpora, Fraction(1, 4))
    state = go_on(initial_state(first, first.schedule(10_000), 1), first, new, 1, 1)
    saved = json.loads(json.dumps(state.to_json(new, new.schedule(10_000), 41)))
    del saved["trees"]
    for phase in saved["segments"]:
        del phase["trees"]
    old = resume(saved, 41, new, new.schedule(10_000), 1, False)
    order = old.order(new, new.schedule(10_000))
    from_start = new.sample_order(new.schedule(10_000), 1)  # as if the new mixture had been there from sample 0 on
    places = [(order.lookup(n), from_start.lookup(n)) for n in range(41, 200)]
    assert all(found.corpus == other.corpus for found, other in places)
    seen = [first.sample_order(first.schedule(10_000), 1).lookup(0)] + [order.lookup(n) for n in range(1, 200)]
    for place, corpus in enumerate(corpora):
        found = [(sample.epoch, sample.sample) for sample in seen if sample.corpus == place]
        size = corpus.num_samples(SEQ_LENGTH)
        assert len(set(found)) == len(found)  # nothing twice
        assert sorted(found)[: len(found) // size * size] == [divmod(i, size) for i in range(len(found) // size * size)]
    assert old.to_json(new, new.schedule(10_000), 41)["segments"][1]["trees"] is None
    # Another change begins to carry: what the older one owes is paid back, at most a sample with each.
    changed = go_on(old, new, first, 200, 1)
    assert changed.mixture_start.trees == {}
    assert isinstance(changed.order(first, first.schedule(10_000)), SampleOrder)


def with_text(corpus: Corpus, sha256: str) -> Corpus:
    """The same corpus with other text, as far as anybody can tell."""
    return replace(corpus, manifest=replace(corpus.manifest, files={"bin": FileInfo(84, sha256)}))


def test_another_text_under_the_same_name_is_another_corpus(corpora: list[Corpus]) -> None:
    """It begins anew, also after a while, and the books keep the first text, which goes on where it was when it is back."""
    first, other = mixture_of(corpora, Fraction(1, 5)), [*corpora[:2], with_text(corpora[2], "f" * 64), corpora[3]]
    new, without = mixture_of(other, Fraction(1, 5)), mixture_of([*corpora[:2], corpora[3]], Fraction(1, 5))
    state = initial_state(first, first.schedule(10_000), 8)
    for mixture, then, at in ((first, without, 80), (without, new, 160), (new, first, 240)):
        state = go_on(state, mixture, then, at, 8)
    starts = [phase.samples_before().get("news") for phase in state.phases]
    read = first.schedule(10_000).counts(80)[2]
    assert starts == [0, None, 0, read]
    consumed = state.consumed(first, first.schedule(10_000), 320)
    assert sum(use.samples for use in consumed) == 320
    assert len([use for use in consumed if use.name == "news"]) == 2
    assert realised_almr(consumed) == pytest.approx(0.2, abs=0.01)


def test_the_books_know_as_what_a_corpus_was_read(corpora: list[Corpus]) -> None:
    first = mixture_of(corpora, Fraction(1, 2))
    moved = mixture_of([*corpora[:2], replace(corpora[2], group="general"), corpora[3]], Fraction(1, 4))
    state = go_on(initial_state(first, first.schedule(10_000), 8), first, moved, 80, 8)
    consumed = state.consumed(moved, moved.schedule(10_000), 160)
    assert sum(use.samples for use in consumed) == 160
    assert realised_almr(consumed) == (40 + 20) / 160
    news = {use.group: use.samples for use in consumed if use.name == "news"}
    assert state.current.samples_before()["news"] == news["additional"] > 0
    assert news["general"] > 0


def test_epochs_after_a_change_are_those_that_are_read(corpora: list[Corpus]) -> None:
    first = mixture_of(corpora[:3], Fraction(1, 2))
    new = mixture_of([*corpora[:2], corpora[3]], Fraction(1, 2))  # poems instead of news
    state = go_on(initial_state(first, first.schedule(200), 8), first, new, 80, 8)
    ledger = make_ledger(new, state.continued(new, new.schedule(200)), 200, state.current.start)
    assert [(row.corpus, row.samples, row.epochs) for row in ledger.rows if row.group == "additional"] == [
        ("poems", 60, 60 / 7)
    ]


@pytest.mark.parametrize("field", ["seed", "seq_length"])
def test_what_no_run_can_change(corpora: list[Corpus], field: str) -> None:
    mixture = mixture_of(corpora, Fraction(1, 5))
    state = initial_state(mixture, mixture.schedule(10_000), 8)
    with pytest.raises(
        InputError, match=f"80 samples of: {field} is {getattr(mixture, field)} there and 9 now, which no run"
    ):
        go_on(state, mixture, replace(mixture, **{field: 9}), 80, 8)


def test_a_new_mixture_is_refused_unless_accepted(corpora: list[Corpus]) -> None:
    mixture, new = mixture_of(corpora, Fraction(1, 5)), mixture_of(corpora, Fraction(2, 5))
    state = initial_state(mixture, mixture.schedule(10_000), 8)
    with pytest.raises(InputError, match=r"m\.yaml: not the mixture the run has read 80 samples of: stages\[0\]\.almr"):
        go_on(state, mixture, new, 80, 8, accept=False)
    assert len(go_on(state, mixture, new, 80, 8).phases) == 2
    longer = go_on(state, mixture, mixture, 80, 4, accept=False)  # a batch needs no permission
    assert [(s.start, s.global_batch_size) for s in longer.phases] == [(0, 8), (80, 4)]


def test_stages_that_depend_on_the_length_of_the_run(corpora: list[Corpus]) -> None:
    mixture = mixture_of(corpora, Fraction(0))
    mixture = ramp(mixture, Fraction(1, 5), Fraction(3, 5))
    state = initial_state(mixture, mixture.schedule(100), 8)
    saved = json.loads(json.dumps(state.to_json(mixture, mixture.schedule(100), 16)))
    with pytest.raises(InputError, match=r"the length of the run .* is not what it was.* 100 there and 200 now"):
        resume(saved, 16, mixture, mixture.schedule(200), 8, False)
    assert resume(saved, 16, mixture, mixture.schedule(100), 8, False) == state
    assert len(resume(saved, 16, mixture, mixture.schedule(200), 8, True).phases) == 2
    longer = resume(saved, 16, mixture, mixture.schedule(200), 8, False, longer=True)  # training.extend_to
    assert [phase.start for phase in longer.phases] == [0, 16]
    # Additional text: 16 samples of the ramp over 100, then what is left of the one over 200.
    asked = mixture.schedule(100).asked(16) + mixture.schedule(200).asked(200) - mixture.schedule(200).asked(16)
    additional = sum(longer.continued(mixture, mixture.schedule(200)).counts(200)[2:])
    assert abs(additional - asked) <= Fraction(1, 2)
    with pytest.raises(InputError, match="not the mixture the run has read"):
        resume(saved, 16, mixture_of(corpora, Fraction(1, 2)), mixture.schedule(200), 8, False, longer=True)


def test_megatrons_order_cannot_begin_in_the_middle(tmp_path: Path, corpora: list[Corpus]) -> None:
    mixture = mixture_of(corpora[:2], Fraction(0))
    schedule = mixture.megatron_schedule(100)
    state = initial_state(mixture, schedule, 8)
    saved = json.loads(json.dumps(state.to_json(mixture, schedule, 16)))
    assert [use["samples"] for use in saved["consumed"]] == schedule.counts(16)
    assert resume(saved, 16, mixture, schedule, 8, False) == state
    other = resume(saved, 16, mixture, schedule, 4, False)  # its samples stay the same: only steps are counted otherwise
    assert [(phase.start, phase.global_batch_size) for phase in other.phases] == [(0, 8), (16, 4)]
    assert other.order(mixture, schedule) is schedule.megatron
    assert [use.samples for use in other.consumed(mixture, schedule, 60)] == schedule.counts(60)
    with pytest.raises(InputError, match="cannot begin, end or change within a run"):
        resume(saved, 16, mixture, mixture.megatron_schedule(200), 8, True)
    with pytest.raises(InputError, match="cannot begin, end or change within a run"):
        resume(saved, 16, mixture, mixture.schedule(100), 8, True)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("consumed", 0, "samples"), -1),
        (("consumed", 0, "samples"), 10**400),
        (("consumed", 0, "samples"), 1.5),
        (("consumed", 0, "samples"), True),
        (("consumed", 0, "group"), None),
        (("segments", 0, "before", 0, "samples"), -5),
        (("segments", 0, "start"), -8),
        (("segments", 0, "global_batch_size"), 0),
        (("segments", 0, "global_batch_size"), "8"),
        (("segments", 0, "mixture"), []),
        (("segments", 0, "mixture", "corpora"), None),
        (("segments", 0, "mixture", "corpora", "en"), 3),
        (("segments", 0, "schedule"), {}),
        (("segments", 0, "schedule", 0, "samples"), -1),
        (("segments", 0, "schedule", 0, "almr", 0), "1e999999999"),
        (("trees",), []),
        (("trees", "general", "samples"), -1),
        (("trees", "general", "members", 0), "wiki"),
        (("trees", "general", "members", 0, 1), "1e999999999"),
        (("segments", 0), "x"),
        (("segments",), []),
    ],
)
def test_every_saved_number_is_checked(corpora: list[Corpus], path: tuple[str | int, ...], value: object) -> None:
    mixture = mixture_of(corpora, Fraction(1, 5))
    state = initial_state(mixture, mixture.schedule(10_000), 8)
    state = go_on(state, mixture, mixture_of(corpora, Fraction(1, 4)), 80, 8)
    saved = json.loads(json.dumps(state.to_json(mixture, mixture.schedule(10_000), 88)))
    if path[:2] == ("segments", 0):
        path = ("segments", 1, *path[2:])  # the first one has nothing before it
    *above, last = path
    place = saved
    for name in above:
        place = place[name]
    place[last] = value
    dotted = "data" + "".join(f"[{name}]" if isinstance(name, int) else f".{name}" for name in path)
    with pytest.raises(InputError, match=rf"manifest\.json: {re.escape(dotted)} is .*; expected ") as refusal:
        resume(saved, 88, mixture, mixture.schedule(10_000), 4, True)
    assert len(str(refusal.value)) < 300
