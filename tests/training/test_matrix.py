"""Every combination of tensor, pipeline (plain, interleaved, uneven), data and sequence parallelism, recomputation and
precision trains like a single process.

Each case is a run of the training tool from one converted checkpoint: an evaluation, three steps with gradient
accumulation, an evaluation. It is compared with one process of the same precision.

fp32: losses and gradient norms within 5e-6 relative; sums in another order differ by less than 1e-6.

bf16: losses within 1e-3, gradient norms within 5e-3. Tensor parallelism rounds partial sums to 8 bits before it adds them.
Everything else computes the same in the first step (1e-5: gradients are accumulated and reduced in fp32); after it, main
weights in fp32 that differ by some 1e-7 may be rounded to different neighbours in bf16.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from forks import Forks
from layout_cases import BF16, Case
from tiny_models import VARIANTS, read_rows
from tiny_runs import Layout, Runs

STEPS = 3
Tolerance = Callable[[int], dict[str, float]]  # of a step's losses and gradient norms, relative

LAYOUTS = [
    Case(tp=tp, pp=pp, virtual=virtual, dp=dp, sp=sp)
    for (tp, sp), (pp, virtual), dp in itertools.product(
        ((1, False), (2, False), (2, True)), ((1, None), (2, None), (2, 2)), (1, 2)
    )
]
RECOMPUTE = (None, "selective", "full")
DTYPES = ("fp32", "bf16")


def all_cases() -> list[Any]:
    """Everything with everything; in every run of the tests each layout once, recomputation and precision taking turns.

    The rest is slow. Every fourth case has packed documents.
    """
    cases = []
    for (number, layout), (turn, recompute), (shift, dtype) in itertools.product(
        enumerate(LAYOUTS), enumerate(RECOMPUTE), enumerate(DTYPES)
    ):
        often = (turn, shift) == (number % len(RECOMPUTE), number // len(RECOMPUTE) % len(DTYPES))
        case = replace(layout, recompute=recompute, dtype=dtype, packed=(number + turn) % 4 == 0)
        cases.append(pytest.param(case, id=str(case), marks=() if often else pytest.mark.slow))
    return cases


REDUCE = "--parallel.overlap_grad_reduce=true"
GATHER = "--parallel.overlap_param_gather=true"
FIRST = "--parallel.num_layers_in_first_pipeline_stage"
LAST = "--parallel.num_layers_in_last_pipeline_stage"
PLAN = "--parallel.pipeline_model_parallel_layout"
OTHERS = [
    Case(dp=2, extra=(REDUCE,)),
    Case(dp=2, extra=(REDUCE, GATHER)),
    Case(dp=2, extra=(REDUCE, GATHER), dtype="bf16", packed=True),
    Case(tp=2, sp=True, dp=2, extra=(REDUCE, GATHER)),
    Case(pp=2, dp=2, extra=(REDUCE, GATHER)),
    Case(pp=2, virtual=2, dp=2, extra=(REDUCE,)),
    Case(pp=2, virtual=2, dp=2, extra=(REDUCE, GATHER)),
    Case(pp=2, virtual=2, dp=2, extra=(REDUCE, GATHER), dtype="bf16", recompute="full"),
    Case(pp=2, extra=(f"{FIRST}=3",)),
    Case(pp=2, extra=(f"{LAST}=1",), packed=True),
    Case(pp=2, dp=2, extra=(f"{FIRST}=1", f"{LAST}=3")),
    Case(pp=2, extra=(f"{PLAN}=Et*3|tL",)),
    Case(pp=2, virtual=2, extra=(f"{PLAN}=Et|t|t|tL",)),
    Case(pp=2, virtual=2, extra=(f"{PLAN}=E|tt|tt|L",), packed=True),
    Case(pp=4),
    Case(pp=4, extra=("--training.micro_batch_size=1",), packed=True),
    Case(dp=4),
    Case(recompute="full", extra=("--parallel.recompute_method=block", "--parallel.recompute_num_layers=2")),
    Case(pp=2, recompute="selective", extra=("--parallel.recompute_modules=[core_attn,mlp,layernorm]",)),
    Case(tp=2, extra=("--training.micro_batch_size=1",)),
    Case(extra=("--training.micro_batch_size=8",)),
    Case(extra=("--training.deterministic=true",)),
]


class Reference:
    """Runs of a case's settings, and of those in a single process."""

    def __init__(self, runs: Runs, forks: Forks) -> None:
        self.runs, self.forks = runs, forks
        self.single: dict[tuple[str, bool], list[dict[str, Any]]] = {}

    def train(self, case: Case, name: str) -> list[dict[str, Any]]:
        """metrics.jsonl of a run."""
        config = self.runs.configure(name, Layout())
        argv = ["--config", config, f"--training.train_iters={STEPS}", *case.arguments]
        self.forks.start(argv, self.runs.folder / f"{name}.log", case.processes, tamper={"no_saves": None}).finish()
        return read_rows(self.runs.folder / name)

    def rows_of_single_process(self, case: Case) -> list[dict[str, Any]]:
        key = case.dtype, case.packed
        if key not in self.single:
            self.single[key] = self.train(Case(dtype=case.dtype, packed=case.packed), f"single-{case.dtype}-{case.packed}")
        return self.single[key]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_dir: str, forks: Forks) -> Reference:
    folder: Path = tmp_path_factory.mktemp("matrix")
    return Reference(Runs(folder, tiny_tokenizer_dir, **VARIANTS["tied"]), forks)


def assert_alike(rows: list[dict[str, Any]], wanted: list[dict[str, Any]], tolerance: Tolerance) -> None:
    """Counts, learning rates and what was read are equal; losses and gradient norms are within the tolerance."""
    losses = [row["loss"] for row in wanted if "loss" in row]
    assert len(losses) == STEPS
    assert max(losses) - min(losses) > 0.1  # otherwise equal losses would show little
    for row, expected in zip(rows, wanted, strict=True):
        where, allowed = f"iteration {row['iteration']}", tolerance(row["iteration"])
        for key in ("iteration", "consumed_samples", "lr", "skipped", "corpus_tokens"):
            assert row.get(key) == expected.get(key), (where, key)
        for key in {"loss", "grad_norm"} & expected.keys():
            assert row[key] == pytest.approx(expected[key], rel=allowed[key], abs=0), (where, key)
        assert row.get("validation", {}).keys() == expected.get("validation", {}).keys()
        for name, result in expected.get("validation", {}).items():
            found = row["validation"][name]
            assert (found["tokens"], found["text_bytes"]) == (result["tokens"], result["text_bytes"]), (where, name)
            for key in ("loss", "bits_per_byte"):
                assert found[key] == pytest.approx(result[key], rel=allowed["loss"], abs=0), (where, name, key)


@pytest.mark.parametrize("case", all_cases())
def test_it_trains_like_a_single_process(reference: Reference, case: Case) -> None:
    assert_alike(reference.train(case, str(case)), reference.rows_of_single_process(case), case.tolerance)


@pytest.mark.parametrize("case", OTHERS, ids=str)
def test_other_ways_to_split_and_to_overlap(reference: Reference, case: Case) -> None:
    assert_alike(reference.train(case, str(case)), reference.rows_of_single_process(case), case.tolerance)


def test_a_model_with_an_output_layer_of_its_own(tmp_path: Path, tiny_tokenizer_dir: str, forks: Forks) -> None:
    """Llama-3's shape: untied, and rotary frequencies that are scaled."""
    untied = Reference(Runs(tmp_path, tiny_tokenizer_dir, **VARIANTS["llama3_rope"]), forks)
    for case in (Case(tp=2, pp=2), Case(tp=2, sp=True, pp=2, virtual=2)):
        assert_alike(untied.train(case, str(case)), untied.rows_of_single_process(case), case.tolerance)


def test_bf16_is_close_to_fp32(reference: Reference) -> None:
    """Losses within 1e-2, of runs that lose more than that from step to step."""
    in_bf16, in_fp32 = (reference.rows_of_single_process(Case(dtype=dtype)) for dtype in ("bf16", "fp32"))
    assert_alike(in_bf16, in_fp32, lambda iteration: {"loss": 1e-2, "grad_norm": 5e-2})


def test_the_settings_matter(reference: Reference) -> None:
    """Packed documents are another computation: or the comparisons of packed cases would show nothing."""
    packed = reference.rows_of_single_process(Case(packed=True))
    with pytest.raises(AssertionError):
        assert_alike(packed, reference.rows_of_single_process(Case()), lambda iteration: BF16)
