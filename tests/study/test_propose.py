"""A study that begins with a part of its grid and goes on where it tells most."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from study_results import ALMRS, RATES, make_results

from megatron_cpt.study.config import StudyConfig
from megatron_cpt.study.grid import grid, grid_points, write_proposed
from megatron_cpt.study.propose import new_pair, propose
from megatron_cpt.study.results import Results
from megatron_cpt.utils.errors import InputError


def peak(almr: float, lr: float) -> float:
    """At ALMR 0.6 and a learning rate of 2e-3."""
    return float(50 - 20 * (almr - 0.6) ** 2 - 3 * (np.log10(lr) + 2.7) ** 2)


def make_study(folder: Path, number: int | None) -> StudyConfig:
    return StudyConfig("base.yaml", str(folder), list(ALMRS), list(RATES), 1000, starting_pairs=number)


def measured(pairs: list[tuple[float, float]]) -> Results:
    """What runs of these pairs find."""
    rows = []
    for almr, lr in pairs:
        rows += make_results(peak, seeds=1, almrs=(almr,), rates=(lr,), metric_noise=0.01).rows
    return Results(rows, ["score"])


def places(pairs: list[tuple[float, float]]) -> np.ndarray:
    """In coordinates in which each axis goes from 0 to 1."""
    return np.array([(almr, (np.log10(lr) + 4) / 2) for almr, lr in pairs])


def test_the_first_pairs_are_spread_over_the_grid(tmp_path: Path) -> None:
    whole = grid(make_study(tmp_path, None))
    parts = [grid(make_study(tmp_path, number)) for number in (4, 5, 9, 25)]
    assert parts[0] == [(almr, lr) for almr in (0.0, 1.0) for lr in (1e-4, 1e-2)]
    assert set(parts[1]) - set(parts[0]) == {(0.5, 1e-3)}
    for few, more in zip(parts, [*parts[1:], whole], strict=True):
        assert set(few) <= set(more), "runs that were done belong to the larger study, too"
    assert parts[-1] == whole
    holes = np.linalg.norm(places(whole)[:, None] - places(parts[2])[None], axis=-1).min(axis=1)
    assert holes.max() < 0.4  # nothing is far from all of nine pairs
    assert len(grid_points(make_study(tmp_path, 5))) == 5


@pytest.mark.parametrize("batch", [1, 3])
def test_a_few_pairs_and_proposals_find_the_best(tmp_path: Path, batch: int) -> None:
    study = make_study(tmp_path, 5)
    for _ in range(6 // batch):
        pairs = sorted({(point.almr, point.lr) for point in grid_points(study)})
        proposed = [pair for pair in pairs if pair not in grid(study)]
        write_proposed(study.folder, proposed + propose(study, measured(pairs), batch))
    found = sorted({(point.almr, point.lr) for point in grid_points(study)})
    assert len(found) == 11
    best = max(found, key=lambda pair: peak(*pair))
    assert np.linalg.norm(places([best]) - places([(0.6, 2e-3)])) < 0.1
    assert peak(*best) > max(peak(*pair) for pair in grid(make_study(tmp_path, None)))  # of 25 pairs


def test_what_was_proposed_and_not_run_yet_is_not_proposed_again(tmp_path: Path) -> None:
    """A study that was stopped between `plan --adaptive` and `run`."""
    study = make_study(tmp_path, 9)
    results = measured(grid(study))
    first = propose(study, results, 3)
    write_proposed(study.folder, first)
    second = propose(study, results, 3)
    distances = np.linalg.norm(places(first)[:, None] - places(second)[None], axis=-1)
    assert distances.min() > 0.02
    # As if all had been proposed at once
    write_proposed(study.folder, [])
    at_once = propose(study, results, 6)
    assert np.linalg.norm(places(at_once[:3]) - places(first)) < 1e-6


def test_without_any_results_proposals_are_spread(tmp_path: Path) -> None:
    found = places(propose(make_study(tmp_path, 4), Results([], []), 4))
    distances = np.linalg.norm(found[:, None] - found[None], axis=-1) + 10 * np.eye(4)
    assert distances.min() > 0.1


def test_every_call_adds_as_many_new_pairs_as_asked_for(tmp_path: Path) -> None:
    """Without runs in between, where the sampler would like a corner of the grid again, and the same corner each time."""
    study = StudyConfig("base.yaml", str(tmp_path), [0.0, 0.5, 1.0], [1e-4, 1e-3, 1e-2], 1000)
    proposed: list[tuple[float, float]] = []
    for number in (3, 3, 2, 1):
        proposed += propose(study, Results([], []), number)
        write_proposed(study.folder, proposed)
        names = {point.name for point in grid_points(study)}
        assert len(names) == len(grid_points(study)) == 9 + len(proposed)
        assert all(study.covers(pair) for pair in proposed)


def test_a_pair_in_a_corner_is_moved_until_it_is_another(tmp_path: Path) -> None:
    """What is drawn beyond both borders is the corner again."""
    study = StudyConfig("base.yaml", str(tmp_path), [0.0, 1.0], [1e-4, 1e-2], 1000)
    taken = {(point.almr, point.lr) for point in grid_points(study)}
    for seed in range(20):
        pair = new_pair(study, 1.0, 1e-2, taken, seed)
        assert pair not in taken
        assert study.covers(pair)


def test_a_range_without_another_pair_is_refused(tmp_path: Path) -> None:
    study = StudyConfig("base.yaml", str(tmp_path), [0.0, 0.001], [1.0e-4, 1.001e-4], 1000)
    with pytest.raises(InputError, match=r"almr from 0 to 0\.001 and lr from 0\.0001 to 0\.0001001 have 4 pairs already"):
        propose(study, Results([], []), 1)


def test_a_pair_that_was_proposed_twice_is_run_once(tmp_path: Path) -> None:
    """As an earlier version wrote it."""
    study = make_study(tmp_path, 4)
    write_proposed(study.folder, [(0.3, 2e-4), (0.3, 2e-4), (1.0, 1e-2)])
    assert len(grid_points(study)) == 5
