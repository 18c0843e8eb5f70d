"""The compiled lookups (csrc/) are bit-identical to the Python specification."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_cpt.data import sampling
from megatron_cpt.data.sampling import SampleOrder, SplitterTree

WEIGHTS = st.one_of(st.fractions(Fraction(1, 10**6), 10**6), st.sampled_from([Fraction(1), Fraction(10**40)]))
ALMRS = st.one_of(st.fractions(0, 1), st.sampled_from([Fraction(0), Fraction(1), Fraction(33, 100), Fraction(1, 10**30)]))
SIZES = st.one_of(st.integers(1, 40), st.integers(4090, 4100), st.integers(1, 10**7), st.integers(2**40 - 3, 2**40 + 3))
BLOCK_SIZES = st.one_of(st.integers(1, 5000), st.integers(4095, 4097))
FIRSTS = st.one_of(st.integers(0, 10_000), st.integers(0, 2**50))


@pytest.fixture(autouse=True)
def native() -> None:
    """A silent build failure must not pass for tested code."""
    if sampling._sampling is None:
        if shutil.which("c++") or shutil.which("g++"):
            pytest.fail("there is a C++ compiler but megatron_cpt.data._sampling was not built: pip install -e . --no-deps")
        pytest.skip("no C++ compiler: the Python fallback is all there is")


@dataclass(frozen=True)
class Case:
    """Arguments of a SampleOrder; the first `general` corpora are the general group."""

    almr: Fraction
    general: int
    weights: list[Fraction]
    sizes: list[int]
    seed: int
    block_size: int

    def order(self) -> SampleOrder:
        corpora = range(len(self.weights))
        tree = SplitterTree(self.almr, corpora[: self.general], corpora[self.general :], self.weights)
        return SampleOrder(tree, self.sizes, self.seed, self.block_size)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    weights = draw(st.lists(WEIGHTS, min_size=1, max_size=50))
    sizes = draw(st.lists(SIZES, min_size=len(weights), max_size=len(weights)))
    general = draw(st.integers(0, len(weights)))
    almr = draw(ALMRS) if 0 < general < len(weights) else Fraction(general == 0)
    return Case(almr, general, weights, sizes, draw(st.integers(0, 2**63)), draw(BLOCK_SIZES))


def thirds(sizes: list[int], seed: int = 1, block_size: int = 512) -> Case:
    """A small mixture of one general and two additional corpora."""
    return Case(Fraction(1, 3), 1, [Fraction(1), Fraction(1), Fraction(2)], sizes, seed, block_size)


TOO_LIGHT = Case(Fraction(1, 2), 3, [Fraction(10**40), Fraction(1), Fraction(1), Fraction(2)], [9, 9, 9, 9], 5, 16)


def assert_same_as_specification(order: SampleOrder, first: int, count: int) -> None:
    arrays = order.locate_many(first, count)
    assert [array.dtype for array in arrays] == [np.int32, np.int64, np.int64]
    assert [array.shape for array in arrays] == [(count,)] * 3
    assert list(zip(*(array.tolist() for array in arrays), strict=True)) == [
        order.locate(n) for n in range(first, first + count)
    ]


@settings(max_examples=100, deadline=None)
@given(case=cases(), first=FIRSTS, count=st.integers(0, 30))
@example(case=TOO_LIGHT, first=0, count=200)  # a share that rounds to 2**64
@example(case=thirds([1, 1, 1]), first=0, count=1000)  # an epoch is one sample
@example(case=thirds([4095, 4096, 4097]), first=4000, count=3000)  # both kinds of permutation, and ends of epochs
@example(case=thirds([2**40] * 3, seed=2**63, block_size=5000), first=2**50, count=300)
def test_native_is_python(case: Case, first: int, count: int) -> None:
    order = case.order()
    assert order._native is not None
    assert_same_as_specification(order, first, count)


@settings(max_examples=20, deadline=None)
@given(case=cases(), first=st.integers(0, 10_000), count=st.integers(0, 30))
def test_fallback_is_native(case: Case, first: int, count: int) -> None:
    native = case.order().locate_many(first, count)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "_sampling", None)
        order = case.order()
    assert order._native is None
    assert_same_as_specification(order, first, count)
    for array, wanted in zip(order.locate_many(first, count), native, strict=True):
        assert np.array_equal(array, wanted)


def test_every_epoch_is_kept_apart_in_a_long_call() -> None:
    order = thirds([700, 30, 11]).order()  # dozens of epochs of the small corpora in one block
    assert_same_as_specification(order, 0, 3000)


def test_calls_of_several_threads_do_not_mix() -> None:
    order = thirds([5000, 300, 4096]).order()
    whole = np.stack(order.locate_many(0, 80_000))
    with ThreadPoolExecutor(4) as pool:
        parts = list(pool.map(lambda first: np.stack(order.locate_many(first, 1000)), range(0, 80_000, 1000)))
    assert np.array_equal(np.concatenate(parts, axis=1), whole)


@pytest.mark.parametrize(("first", "count"), [(-1, 5), (5, -1), (2**62, 1), (2**62 + 1, 0)])
def test_sample_numbers_are_checked(first: int, count: int) -> None:
    with pytest.raises(ValueError, match=str(first)):
        thirds([5, 5, 5]).order().locate_many(first, count)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"nodes": [(1, ~0, ~2)]}, "right child of node 0 is -3"),
        ({"nodes": [(1, 0, ~1)]}, "left child of node 0 is 0"),
        ({"root": 1}, "root is 1"),
        ({"root": ~2}, "root is -3"),
        ({"samples_per_epoch": [5, 0]}, r"samples_per_epoch\[1\] is 0"),
        ({"samples_per_epoch": [5, 2**62 + 1]}, r"samples_per_epoch\[1\]"),
        ({"samples_per_epoch": []}, "left child of node 0"),
        ({"block_size": 0}, "block_size is 0"),
        ({"block_size": -4}, "block_size is -4"),
    ],
)
def test_native_arguments_are_checked(change: dict[str, object], message: str) -> None:
    arguments = {"nodes": [(1 << 63, ~0, ~1)], "root": 0, "samples_per_epoch": [5, 5], "seed": 1, "block_size": 4}
    sampling._sampling.SampleOrder(**arguments)
    with pytest.raises(ValueError, match=message):
        sampling._sampling.SampleOrder(**(arguments | change))
