"""The order of megatron-core itself: every index bit by bit, and the tokens of every sample."""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import megatron_cpt.platforms.imported_megatron  # noqa: F401  isort: skip  (before megatron is imported)
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from megatron.core.datasets import helpers
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

from megatron_cpt.corpus.indexed_dataset import IndexedCorpus, IndexedWriter
from megatron_cpt.mixture.order import megatron as megatron_order
from megatron_cpt.mixture.order.megatron import MegatronOrder, build_blending_index, build_sample_index, plan_epochs
from megatron_cpt.utils.errors import InputError

FIRST_TOKEN = 100_000  # corpus c holds the tokens (c + 1) * FIRST_TOKEN and up, each once


@pytest.fixture(autouse=True)
def native() -> None:
    """A silent build failure must not pass for tested code."""
    if megatron_order._megatron_index is None:
        if shutil.which("c++") or shutil.which("g++"):
            pytest.fail(
                "there is a C++ compiler but mixture.order._megatron_index was not built: pip install -e . --no-deps"
            )
        pytest.skip("no C++ compiler: the Python fallback is all there is")


@dataclass(frozen=True)
class Case:
    """A run: documents of each corpus by their lengths, and the arguments of a MegatronOrder."""

    lengths: list[list[int]]
    weights: list[float]
    num_samples: int
    seq_length: int
    seed: int = 1234

    def write(self, folder: Path) -> list[str]:
        """The corpora as files; their prefixes."""
        prefixes = [str(folder / f"corpus{i}") for i in range(len(self.lengths))]
        for i, (prefix, lengths) in enumerate(zip(prefixes, self.lengths, strict=True)):
            with IndexedWriter(prefix, np.int32) as writer:
                writer.add_documents(np.arange(sum(lengths), dtype=np.int32) + (i + 1) * FIRST_TOKEN, np.array(lengths))
        return prefixes

    def ours(self, corpora: list[IndexedCorpus], **changes: Any) -> MegatronOrder:
        lengths = [corpus.sequence_lengths for corpus in corpora]
        return MegatronOrder(lengths, self.weights, self.num_samples, self.seq_length, self.seed, **changes)

    def megatron(self, prefixes: list[str], **blend: Any) -> GPTDataset | BlendedDataset:
        """The training set of megatron-core's builder."""
        config = GPTDatasetConfig(
            random_seed=self.seed,
            sequence_length=self.seq_length,
            tokenizer=SimpleNamespace(eod=0, pad=-1, vocab_size=10**7, unique_identifiers={}),
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
            **(blend or {"blend_per_split": [(prefixes, self.weights), None, None]}),
        )
        builder = BlendedMegatronDatasetBuilder(GPTDataset, [self.num_samples, 0, 0], lambda: True, config)
        return builder.build()[0]


def assert_equal_arrays(ours: np.ndarray | None, theirs: np.ndarray) -> None:
    assert ours is not None
    assert ours.dtype == theirs.dtype
    assert np.array_equal(ours, theirs)


def assert_same_indices(order: MegatronOrder, dataset: GPTDataset | BlendedDataset) -> None:
    datasets = [dataset]
    if isinstance(dataset, BlendedDataset):
        datasets = dataset.datasets
        assert_equal_arrays(order.dataset_index, dataset.dataset_index)
        assert_equal_arrays(order.dataset_sample_index, dataset.dataset_sample_index)
    else:
        assert order.dataset_index is None
    for ours, theirs in zip(order.corpora, datasets, strict=True):
        assert_equal_arrays(ours.document_index, theirs.document_index)
        assert_equal_arrays(ours.sample_index, theirs.sample_index)
        assert_equal_arrays(ours.shuffle_index, theirs.shuffle_index)


def assert_same_tokens(order: MegatronOrder, corpora: list[IndexedCorpus], dataset: GPTDataset | BlendedDataset) -> None:
    assert len(order) == len(dataset)
    chosen, samples = order.lookup_many(0, len(order))
    assert (chosen.dtype, samples.dtype) == (np.int32, np.int64)
    for n, (corpus, sample) in enumerate(zip(chosen.tolist(), samples.tolist(), strict=True)):
        token_ranges = order.parts(corpus, sample)
        assert all(length > 0 for _, length in token_ranges)
        ours = np.concatenate([corpora[corpus].sample(start, length) for start, length in token_ranges]).tolist()
        theirs = dataset[n]
        assert ours == [*theirs["tokens"].tolist(), int(theirs["labels"][-1])]


def assert_same(case: Case) -> None:
    """Or both refuse, because the blend takes more samples of a corpus than are built."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        prefixes = case.write(Path(folder))
        corpora = [IndexedCorpus(prefix) for prefix in prefixes]
        try:
            dataset = case.megatron(prefixes)
        except IndexError:
            with pytest.raises(InputError, match="the blend takes"):
                case.ours(corpora)
            return
        order = case.ours(corpora)
        assert_same_indices(order, dataset)
        assert_same_tokens(order, corpora, dataset)


LENGTHS = st.lists(st.one_of(st.integers(0, 12), st.integers(0, 90)), min_size=1, max_size=25).filter(any)
WEIGHTS = st.one_of(st.floats(1e-3, 1e3), st.sampled_from([1.0, 0.1, 0.3, 1e-9]))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    lengths = draw(st.lists(LENGTHS, min_size=1, max_size=5))
    weights = draw(st.lists(WEIGHTS, min_size=len(lengths), max_size=len(lengths)))
    return Case(lengths, weights, draw(st.integers(1, 120)), draw(st.integers(1, 40)), draw(st.integers(0, 2**32 - 1)))


HUNDRED = [7, 0, 13, 20, 1, 9, 0, 30, 12, 9]  # tokens: 101, so 10 samples of 10 in the first epoch
ONE = Case([HUNDRED], [1.0], 10, 10)
BLEND = Case([HUNDRED, [5] * 40, [300]], [0.5, 0.3, 0.2], 60, 10)


@settings(max_examples=120, deadline=None)
@given(case=cases())
def test_any_run_is_megatrons(case: Case) -> None:
    assert_same(case)


@pytest.mark.parametrize(
    "case",
    [
        ONE,  # the whole of one epoch, to its last token
        replace(ONE, num_samples=1),
        replace(ONE, num_samples=11),  # one sample of a second epoch, shuffled apart
        replace(ONE, num_samples=17),  # 7 of its 10: below 80 %, apart
        replace(ONE, num_samples=18),  # 8 of 10: not below, all shuffled together
        replace(ONE, num_samples=95),
        replace(ONE, lengths=[[101]], num_samples=25),  # a single document
        replace(ONE, lengths=[[1]], num_samples=3),  # as many epochs as tokens
        replace(ONE, lengths=[[0, 0, 5, 0]], num_samples=30),  # almost nothing but empty documents
        replace(ONE, lengths=[[3] * 50], num_samples=33, seq_length=64),  # samples longer than documents
        replace(ONE, seq_length=500),  # ... and longer than the corpus
        replace(ONE, seed=0),
        replace(ONE, seed=2**32 - 1),
        BLEND,
        replace(BLEND, seed=7),
        replace(BLEND, num_samples=1),
        replace(BLEND, num_samples=1500),
        replace(BLEND, weights=[1.0, 1.0, 1.0]),  # ties everywhere
        replace(BLEND, weights=[30.0, 69.99, 0.01]),
        replace(BLEND, lengths=[[900], [900]], weights=[1.0, 0.3]),  # differs unless weights are normalized twice
        replace(BLEND, lengths=[HUNDRED] * 7, weights=[0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7], num_samples=300),
    ],
)
def test_runs_at_the_edges_are_megatrons(case: Case) -> None:
    assert_same(case)


def test_megatrons_training_part_is_the_first_documents(tmp_path: Path) -> None:
    case = replace(ONE, num_samples=23)
    prefixes = case.write(tmp_path)
    dataset = case.megatron(prefixes, blend=(prefixes, None), split="75,25,0")
    part = IndexedCorpus(prefixes[0]).sequence_lengths[: round(0.75 * len(HUNDRED))]
    assert_same_indices(MegatronOrder([part], [1.0], 23, 10, case.seed), dataset)


def test_a_blend_that_takes_too_much_is_refused_by_both(tmp_path: Path) -> None:
    """The sizes of four corpora, each rounded up, make a blend of 80 samples: 73 from the first, which has 72."""
    case = Case([[721], [500], [500], [500]], [20.8, 0.6, 0.9, 0.4], 77, 10)
    prefixes = case.write(tmp_path)
    corpora = [IndexedCorpus(prefix) for prefix in prefixes]
    with pytest.raises(IndexError, match="oversamples"):
        case.megatron(prefixes)
    with pytest.raises(InputError, match="takes 73 samples of corpus 0; expected at most 72"):
        case.ours(corpora)
    assert len(case.ours(corpora, mid_level_dataset_surplus=0.5)) >= case.num_samples


@settings(max_examples=60, deadline=None)
@given(
    lengths=LENGTHS,
    epochs=st.integers(1, 4),
    seq_length=st.integers(1, 60),
    threads=st.integers(2, 9),
    seed=st.integers(0, 99),
)
@example(lengths=[0] * 200 + [5], epochs=4, seq_length=1, threads=9, seed=1)  # chunks without a token
@example(lengths=[300], epochs=1, seq_length=2, threads=9, seed=1)  # more threads than entries
@example(lengths=[2**30] * 9, epochs=3, seq_length=2**28 + 1, threads=4, seed=1)  # positions beyond 2^31
def test_sample_index_is_the_definition_with_any_threads(
    lengths: list[int], epochs: int, seq_length: int, threads: int, seed: int
) -> None:
    sizes, state = np.array(lengths, np.int32), np.random.RandomState(seed)
    documents = megatron_order.build_document_index(len(lengths), epochs, False, state)
    num_samples = (epochs * sum(lengths) - 1) // seq_length
    for wide, dtype in ((False, np.int32), (True, np.int64)):
        definition = megatron_order._build_sample_index(sizes, documents, seq_length, num_samples, wide)
        assert definition.dtype == dtype
        for count in (1, threads):
            native = megatron_order._megatron_index.build_sample_index(
                sizes, documents, seq_length, num_samples, count, wide
            )
            assert_equal_arrays(native, definition)
        theirs = helpers.build_sample_idx_int64 if wide else helpers.build_sample_idx_int32
        assert_equal_arrays(definition, theirs(sizes, documents, seq_length, epochs, sum(lengths), True, 1))
    some = build_sample_index(sizes, documents, seq_length, num_samples // 2, threads)
    assert_equal_arrays(some, megatron_order._build_sample_index(sizes, documents, seq_length, num_samples // 2, False))


def test_sample_index_is_as_wide_as_megatrons(monkeypatch: pytest.MonkeyPatch) -> None:
    """int64 from 2^31 entries on; here from 10 on, which fits in memory."""
    monkeypatch.setattr(megatron_order, "INT32_MAX", 10)
    for native in (megatron_order._megatron_index, None):
        monkeypatch.setattr(megatron_order, "_megatron_index", native)
        for entries, dtype in ((10, np.int32), (11, np.int64)):
            index = build_sample_index(np.array([4], np.int32), np.zeros(entries, np.int32), 3, 5)
            assert index.dtype == dtype


@settings(max_examples=60, deadline=None)
@given(weights=st.lists(WEIGHTS, min_size=1, max_size=60), num_samples=st.integers(0, 400))
@example(weights=[1.0] * 40, num_samples=200)
@example(weights=[0.1, 0.2, 0.3, 0.4], num_samples=400)  # differs if weight * n - taken is rounded only once
def test_blending_index_is_the_definition_and_megatrons(weights: list[float], num_samples: int) -> None:
    normalized = megatron_order._normalize(weights)
    theirs = np.zeros(num_samples, np.int16), np.zeros(num_samples, np.int64)
    helpers.build_blending_indices(*theirs, normalized, len(weights), num_samples, False)
    for build in (build_blending_index, megatron_order._build_blending_index):
        for ours, their in zip(build(normalized, num_samples), theirs, strict=True):
            assert_equal_arrays(ours, their)


def test_without_a_compiler_the_order_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prefixes = BLEND.write(tmp_path)
    corpora, dataset = [IndexedCorpus(prefix) for prefix in prefixes], BLEND.megatron(prefixes)
    monkeypatch.setattr(megatron_order, "_megatron_index", None)
    order = BLEND.ours(corpora)
    assert_same_indices(order, dataset)
    assert_same_tokens(order, corpora, dataset)


@pytest.mark.parametrize("tokens", [1, 2047, 2048, 2049, 10**12 + 7, 1_700_000_000_003])
@pytest.mark.parametrize("num_samples", [1, 488_000, 830_000_000])
def test_epochs_are_megatrons_at_any_size(tokens: int, num_samples: int) -> None:
    """Computed, not stored. Megatron counts epochs one by one, so small corpora get a shorter run."""
    num_samples = min(num_samples, 100 * tokens)
    run = SimpleNamespace(
        num_samples=num_samples, config=SimpleNamespace(sequence_length=2048, add_extra_token_to_sequence=True)
    )
    plan = plan_epochs(tokens, num_samples, 2048)
    assert plan.num_epochs == GPTDataset._get_num_epochs(run, tokens)
    assert plan.num_samples == (plan.num_epochs * tokens - 1) // 2048 >= num_samples


def test_positions_beyond_two_to_the_31() -> None:
    """Ten documents of 2^30 tokens; each sample has 2^28 + 1."""
    order = MegatronOrder([np.full(10, 2**30, np.int32)], [1.0], 39, 2**28, 3)
    starts = [order.parts(0, sample)[0][0] for sample in range(39)]
    assert len(set(starts)) == 39
    assert max(starts) > 2**33
    assert all(sum(length for _, length in order.parts(0, sample)) == 2**28 + 1 for sample in range(39))


def test_document_starts() -> None:
    lengths = np.random.RandomState(1).randint(0, 50, 1000).astype(np.int32)
    starts = megatron_order.DocumentStarts(lengths)
    documents = np.random.RandomState(2).permutation(1000).astype(np.int32)
    assert np.array_equal(starts(documents), (np.cumsum(lengths) - lengths)[documents])


def small_order(num_samples: int = 60, **changes: Any) -> MegatronOrder:
    arguments: dict[str, Any] = {
        "document_lengths": [np.array(lengths, np.int32) for lengths in BLEND.lengths],
        "weights": BLEND.weights,
        "num_samples": num_samples,
        "seq_length": 10,
        "seed": 1,
    }
    return MegatronOrder(**(arguments | changes))


def test_any_part_of_the_order_can_be_asked_for() -> None:
    order = small_order()
    whole = np.stack(order.lookup_many(0, len(order)))
    borders = [0, 1, 1, 20, len(order)]
    parts = [np.stack(order.lookup_many(first, last - first)) for first, last in pairwise(borders)]
    assert np.array_equal(np.concatenate(parts, axis=1), whole)
    order.lookup_many(0, len(order))[1][:] = -1  # what is given out is the caller's
    assert np.array_equal(np.stack(order.lookup_many(0, len(order))), whole)


@pytest.mark.parametrize(("first", "count"), [(-1, 5), (5, -1), (0, 10_000), (10_000, 0)])
def test_samples_outside_the_run_are_refused(first: int, count: int) -> None:
    for order in (small_order(), MegatronOrder([np.full(9, 50, np.int32)], [1.0], 40, 10, 1)):
        with pytest.raises(InputError, match=f"{count} samples from {first} .* 0 to {len(order) - 1}"):
            order.lookup_many(first, count)
        for sample in (-1, len(order.corpora[0])):
            with pytest.raises(IndexError, match=f"sample {sample} of corpus 0"):
                order.parts(0, sample)


TWO = [np.full(9, 50, np.int32)] * 2
TOO_MANY_DOCUMENTS = np.broadcast_to(np.int32(1), 2**31)  # takes no memory


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_samples": 0}, "num_samples is 0; expected 1 to"),
        ({"seq_length": 0}, "seq_length is 0"),
        ({"seq_length": 2**31 - 1}, "seq_length is 2147483647"),
        ({"seed": -1}, "seed is -1; expected 0 to 4294967295"),
        ({"seed": 2**32}, "seed is 4294967296"),
        ({"threads": 0}, "threads is 0"),
        ({"mid_level_dataset_surplus": -0.1}, "mid_level_dataset_surplus is -0.1"),
        ({"weights": [1.0, 1.0]}, "3 corpora and 2 weights"),
        ({"weights": [], "document_lengths": []}, "0 corpora"),
        ({"weights": [1.0] * 32767, "document_lengths": TWO[:1] * 32767}, "32767 corpora .* to 32766"),
        ({"weights": [1.0, 0.0, 1.0]}, "weight of corpus 1 is 0.0"),
        ({"weights": [1.0, 1.0, float("nan")]}, "weight of corpus 2 is nan"),
        ({"weights": [float("inf"), 1.0, 1.0]}, "weight of corpus 0 is inf"),
        ({"document_lengths": [*TWO, np.array([5])]}, "document lengths of corpus 2 are int64"),
        ({"document_lengths": [*TWO, np.ones((2, 2), np.int32)]}, r"of shape \(2, 2\); expected int32 \(documents,\)"),
        ({"document_lengths": [*TWO, np.zeros(3, np.int32)]}, "corpus 2 has 3 documents of 0 to 0 tokens"),
        ({"document_lengths": [*TWO, np.array([], np.int32)]}, "corpus 2 has 0 documents"),
        ({"document_lengths": [*TWO, np.array([5, -1], np.int32)]}, "corpus 2 has 2 documents of -1 to 5 tokens"),
        ({"document_lengths": [*TWO, TOO_MANY_DOCUMENTS]}, "corpus 2 has 2147483648 documents; expected at most 2147483647"),
    ],
)
def test_arguments_are_checked(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        small_order(**change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"document_index": np.array([0, 2], np.int32)}, r"document_index\[1\] is 2; expected documents from 0 to 1"),
        ({"document_index": np.array([-1, 0], np.int32)}, r"document_index\[0\] is -1"),
        ({"document_index": np.array([], np.int32)}, "document_index is not"),
        ({"document_index": np.zeros((2, 1), np.int32)}, "document_index is not"),
        ({"lengths": np.array([5, -1], np.int32)}, r"document_index\[1\] is 1; .* of length 0 or more"),
        ({"lengths": np.frombuffer(bytes(10), np.int32, offset=2)}, "lengths is not an aligned vector"),
        ({"lengths": np.array([0, 0], np.int32), "num_samples": 0}, "the documents have 0 tokens"),
        ({"num_samples": 5}, "num_samples is 5; expected 0 to 4"),
        ({"num_samples": -1}, "num_samples is -1"),
        ({"num_samples": 2**62}, "num_samples is 4611686018427387904"),
        ({"seq_length": 0}, "seq_length is 0"),
        ({"seq_length": 2**62}, "seq_length is 4611686018427387904"),
        ({"threads": 0}, "threads is 0; expected 1 to 1024"),
    ],
)
@pytest.mark.parametrize("threads", [1, 2])
def test_arguments_of_the_sample_index_are_checked(threads: int, change: dict[str, Any], message: str) -> None:
    lengths, documents = np.array([5, 4], np.int32), np.array([0, 1], np.int32)
    arguments = {"lengths": lengths, "document_index": documents, "seq_length": 2, "num_samples": 4, "threads": threads}
    megatron_order._megatron_index.build_sample_index(**arguments, wide=False)
    with pytest.raises(ValueError, match=message):
        megatron_order._megatron_index.build_sample_index(**(arguments | change), wide=False)
    with pytest.raises(TypeError):
        megatron_order._megatron_index.build_sample_index(**(arguments | {"lengths": np.array([5.0, 4.0])}), wide=False)


@pytest.mark.parametrize(("documents", "num_samples"), [([0, 2], 4), ([-1, 0], 4), ([0, 1], 5), ([0, 1], -1)])
def test_the_fallback_refuses_them_too(documents: list[int], num_samples: int) -> None:
    lengths, document_index = np.array([5, 4], np.int32), np.array(documents, np.int32)
    with pytest.raises(ValueError, match=r"document_index goes from|num_samples is"):
        megatron_order._build_sample_index(lengths, document_index, 2, num_samples, False)


@pytest.mark.parametrize(
    ("weights", "num_samples", "message"),
    [
        ([], 1, "weights is not"),
        ([0.5, 0.0], 1, r"weights\[1\] is 0.0"),
        ([float("nan")], 1, r"weights\[0\] is nan"),
        ([float("inf")], 1, r"weights\[0\] is inf"),
        ([1.0] * 32767, 1, "number of weights is 32767; expected 1 to 32766"),
        ([1.0], -1, "num_samples is -1"),
        ([1.0], 2**60, "num_samples is"),
    ],
)
def test_arguments_of_the_blending_index_are_checked(weights: list[float], num_samples: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_blending_index(np.array(weights), num_samples)
