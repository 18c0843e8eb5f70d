"""The compiled lookups (csrc/), for the CPU and for an emulated GPU, are bit-identical to the Python specification."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from emulated_cuda import compile_emulated
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny_orders import Case, cases, plan

from megatron_cpt.mixture.order import order as order_module
from megatron_cpt.mixture.order.cuda import DeviceOrder
from megatron_cpt.mixture.order.order import SampleLocations, SampleOrder
from megatron_cpt.mixture.order.splitters import MAX_RAMP, StagePlan
from megatron_cpt.utils.errors import InputError

SOURCES = Path(__file__).parents[3] / "csrc"
FIRSTS = st.one_of(st.integers(0, 10_000), st.integers(0, 2**50))
TYPES = [np.int32, np.int64, np.int64, np.int64]


@pytest.fixture(autouse=True)
def native() -> None:
    """A silent build failure must not pass for tested code."""
    if order_module._sampling is None:
        if shutil.which("c++") or shutil.which("g++"):
            pytest.fail("there is a C++ compiler but mixture.order._sampling was not built: pip install -e . --no-deps")
        pytest.skip("no C++ compiler: the Python fallback is all there is")


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The CUDA source, compiled for the CPU."""
    return compile_emulated(tmp_path_factory.mktemp("cuda"))


@pytest.fixture(params=["cpu", "three threads", "cuda"])
def lookup(request: pytest.FixtureRequest) -> Callable[[Case, int, int], SampleLocations]:
    """(case, first, count) -> places, by one of the compiled twins."""
    if request.param != "cuda":
        threads = 3 if request.param == "three threads" else 1
        return lambda case, first, count: case.order().lookup_many(first, count, threads)
    library = request.getfixturevalue("emulated")

    def on_device(case: Case, first: int, count: int) -> SampleLocations:
        arrays = [np.full(count, -1, dtype) for dtype in TYPES]
        device_order = DeviceOrder(case.order(), library)
        device_order.locate_into(first, count, *(array.ctypes.data for array in arrays))
        return SampleLocations(*arrays)

    return on_device


def thirds(sizes: list[int], seed: int = 1, block_size: int = 512) -> Case:
    """A small mixture of one general and two additional corpora."""
    return Case([plan(Fraction(1, 3), 1, [Fraction(1), Fraction(1), Fraction(2)])], sizes, seed, block_size)


TOO_LIGHT = Case([plan(Fraction(1, 2), 3, [Fraction(10**40), Fraction(1), Fraction(1), Fraction(2)])], [9] * 4, 5, 16)
HALVES = [Fraction(1), Fraction(1)]
LONG_RAMP = StagePlan(MAX_RAMP, (Fraction(0), Fraction(1)), plan(Fraction(1, 2), 1, HALVES).general, plan(
    Fraction(1, 2), 1, HALVES).additional)  # fmt: skip


def specification(case: Case, first: int, count: int) -> SampleLocations:
    order = case.order()
    order._native = None
    return order.lookup_many(first, count)


def assert_same(found: SampleLocations, wanted: SampleLocations) -> None:
    assert [array.dtype for array in found] == TYPES
    for name, array, other in zip(SampleLocations._fields, found, wanted, strict=True):
        assert np.array_equal(array, other), name


def test_any_order(lookup: Callable[[Case, int, int], SampleLocations]) -> None:
    @settings(max_examples=60, deadline=None)
    @given(case=cases(), first=FIRSTS, count=st.integers(0, 30))
    @example(case=TOO_LIGHT, first=0, count=200)  # a share that rounds to 2**64
    @example(case=thirds([1, 1, 1]), first=0, count=1000)  # an epoch is one sample
    @example(case=thirds([4095, 4096, 4097]), first=4000, count=3000)  # both kinds of permutation, and ends of epochs
    @example(case=thirds([700, 30, 11]), first=0, count=3000)  # dozens of epochs of the small corpora in one block
    @example(case=thirds([2**40] * 3, seed=2**63, block_size=5000), first=2**50, count=300)
    @example(case=Case([LONG_RAMP], [2**40, 2**40], 5, 100), first=MAX_RAMP - 1000, count=1000)
    @example(case=Case([LONG_RAMP], [2**40, 2**40], 5, 100), first=MAX_RAMP // 3, count=1000)
    def check(case: Case, first: int, count: int) -> None:
        first = max(first, case.block_origin)
        assert_same(lookup(case, first, count), specification(case, first, count))

    check()


def test_corpora_beyond_any_memory(lookup: Callable[[Case, int, int], SampleLocations]) -> None:
    """2**45 samples of 2**11 tokens, 1,000 corpora, a run of 10**15 samples: nothing is built, so nothing is too large."""
    sizes = [2**45 + i for i in range(1000)]
    case = Case([plan(Fraction(1, 3), 500, [Fraction(1 + i) for i in range(1000)])], sizes, 3, 1024, seq_length=2048)
    assert_same(lookup(case, 10**15, 200), specification(case, 10**15, 200))


def test_a_call_in_pieces(lookup: Callable[[Case, int, int], SampleLocations]) -> None:
    """More samples than are prepared together (2**20), with tables of both kinds; pieces do not end with blocks."""
    case = thirds([5000, 300, 4096], block_size=1000)
    count = 2_300_000
    whole = lookup(case, 77, count)
    for first in (77, 77 + 2**20 - 20, 77 + 2**21 - 20, 77 + count - 40):
        part = specification(case, first, 40)
        assert_same(SampleLocations(*(array[first - 77 : first - 37] for array in whole)), part)


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    case = thirds([700, 30, 11])
    compiled = case.order().lookup_many(0, 500)
    monkeypatch.setattr(order_module, "_sampling", None)
    order = case.order()
    assert order._native is None
    assert_same(order.lookup_many(0, 500), compiled)


def test_calls_of_several_threads_do_not_mix() -> None:
    order = thirds([5000, 300, 4096]).order()
    whole = np.stack(order.lookup_many(0, 80_000))
    with ThreadPoolExecutor(4) as pool:
        parts = list(pool.map(lambda first: np.stack(order.lookup_many(first, 1000)), range(0, 80_000, 1000)))
    assert np.array_equal(np.concatenate(parts, axis=1), whole)


def changed(order: SampleOrder, table: str, place: int, **fields: int) -> list[Any]:
    """The arguments of the compiled order with some fields of one table's row changed."""
    tables = order.tables()
    array = getattr(tables, table).copy()
    for field, value in fields.items():
        array[field][place] = value
    return list(vars(replace(tables, **{table: array})).values())


@pytest.mark.parametrize(
    ("table", "place", "fields", "message"),
    [
        ("nodes", 0, {"right": ~3}, "right child of node 0 is -4"),
        ("nodes", 0, {"left": 0}, "left child of node 0 is 0"),
        ("stages", 0, {"left": 1}, r"left tree of stage\[0\] is 1"),
        ("stages", 0, {"right": ~3}, r"right tree of stage\[0\] is -4"),
        ("stages", 0, {"start": 5}, r"start of stage\[0\] is 5"),
        ("stages", 0, {"length": 0}, r"length of stage\[0\] is 0"),
        ("stages", 0, {"ramp": 1, "length": 2**46 + 1}, r"length of stage\[0\]"),
        ("stages", 0, {"ramp": 1}, r"ramp of stage\[0\] is 1"),
        ("stages", 0, {"left_before": -1}, r"left_before of stage\[0\] is -1"),
        ("corpora", 1, {"samples": 0}, r"samples of corpus\[1\] is 0"),
        ("corpora", 1, {"samples": 2**62 + 1}, r"samples of corpus\[1\]"),
        ("corpora", 1, {"tokens": 8 * 5}, r"tokens of corpus\[1\] is 40"),
    ],
)
def test_tables_are_checked(table: str, place: int, fields: dict[str, int], message: str) -> None:
    order = thirds([5, 5, 5]).order()
    assert len(order.tables().nodes) == 1
    order_module._sampling.SampleOrder(*changed(order, table, place))
    message = message.replace("of node 0", r"of node\[0\]")
    with pytest.raises(ValueError, match=message):
        order_module._sampling.SampleOrder(*changed(order, table, place, **fields))


@pytest.mark.parametrize(
    ("field", "value"),
    [("seq_length", 0), ("block_size", 0), ("block_size", -4), ("block_origin", -1), ("base", np.zeros((2, 3), np.int64))],
)
def test_numbers_are_checked(field: str, value: Any) -> None:
    tables = replace(thirds([5, 5, 5]).order().tables(), **{field: value})
    with pytest.raises(ValueError, match=f"{field} is"):
        order_module._sampling.SampleOrder(*vars(tables).values())


def test_the_library_for_the_gpu_says_what_is_wrong(emulated: Path, tmp_path: Path) -> None:
    order = thirds([5, 5, 5]).order()
    with pytest.raises(InputError, match="make cuda"):
        DeviceOrder(order, tmp_path / "none.so")
    device_order = DeviceOrder(order, emulated)
    with pytest.raises(ValueError, match="number of samples is -5"):
        device_order.locate_into(0, -5, 0, 0, 0, 0)
    order._sizes[0] = 0
    with pytest.raises(InputError, match=r"samples of corpus\[0\] is 0"):
        DeviceOrder(order, emulated)


# Numbers at which something ends: tables of 4,096, 2^16, 2^31, 2^62, 2^63
EDGES = [0, 1, 2, 3, 4095, 4096, 4097, 2**16, 2**24, 2**31, 2**46, 2**60, 2**61, 2**62, 2**63 - 1, 2**63, 2**64 - 1]
NUMBERS = st.one_of(st.sampled_from(EDGES), st.integers(0, 40), st.integers(-40, -1), st.integers(0, 2**64 - 1))


@st.composite
def damaged_tables(draw: st.DrawFn) -> list[Any]:
    """The arguments of a compiled order with up to six numbers changed, or rows repeated."""
    tables = draw(cases()).order().tables()
    arrays = {name: copy.copy(array) for name, array in vars(tables).items()}
    for _ in range(draw(st.integers(1, 6))):
        name = draw(st.sampled_from(list(arrays)))
        array = arrays[name]
        if not isinstance(array, np.ndarray):
            number = draw(NUMBERS)
            arrays[name] = number % 2**64 if name == "seed" else (number + 2**63) % 2**64 - 2**63
        elif array.size:
            flat = array.reshape(-1)
            place = draw(st.integers(0, flat.size - 1))
            if draw(st.booleans()) and name != "base":
                flat[place] = flat[draw(st.integers(0, flat.size - 1))]
                continue
            column = flat[draw(st.sampled_from(array.dtype.names))] if array.dtype.names else flat
            column[place] = np.array(draw(NUMBERS) % 2**64, np.uint64).astype(column.dtype)
    return list(arrays.values())


@settings(max_examples=400, deadline=None)
@given(arguments=damaged_tables(), first=NUMBERS, count=st.integers(0, 300), threads=st.integers(1, 3))
def test_whatever_the_tables_say_nothing_is_read_outside(arguments: list[Any], first: int, count: int, threads: int) -> None:
    """Under `make sanitize` any access outside an array, or sum that overflows, ends the process."""
    corpora, origin = arguments[3], arguments[7]
    try:
        order = order_module._sampling.SampleOrder(*arguments)
        found = SampleLocations(*order.locate(max(first % 2**62, origin), count, threads))
    except ValueError:
        return
    assert ((found.corpus >= 0) & (found.corpus < len(corpora))).all()
    assert (found.epoch >= 0).all()
    assert ((found.sample >= 0) & (found.sample < corpora["samples"][found.corpus])).all()
    assert ((found.begin >= 0) & (found.begin < corpora["tokens"][found.corpus])).all()
