import math

import librosa
import numpy as np
import pytest

from gae import measures
from gae.features import Features, Origin
from gae.measures import Alignment, align, beats_within, bootstrap, invariance_top1, likeness, mean_and_error, pool, stack, unit
from gae.params import Cqt


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_own_candidate_is_nearest_unless_another_is():
    candidates = random(50, 8)
    queries = candidates + 0.01 * random(50, 8, seed=1)
    queries[[3, 7]] = queries[[7, 3]]
    assert np.flatnonzero(~invariance_top1(queries, candidates)).tolist() == [3, 7]


def test_nearest_is_by_cosine():
    candidates = random(50, 8)
    scaled = candidates * np.random.default_rng(2).uniform(0.01, 100, (50, 1)).astype(np.float32)
    assert invariance_top1(candidates, scaled).all()
    assert not invariance_top1(-candidates, scaled).any()


def test_a_tie_is_a_miss():
    candidates = random(5, 4)
    candidates[3] = candidates[1]
    assert invariance_top1(candidates, candidates).tolist() == [True, False, True, False, True]
    assert not invariance_top1(np.zeros((5, 4), np.float32), candidates).any()


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_a_tie_is_a_miss_wherever_it_lies(dtype):
    """Matrix products round the same sum differently in different columns."""
    candidates = np.tile(random(600, 64), (2, 1)).astype(dtype)
    queries = candidates + (0.1 * random(1200, 64, seed=1)).astype(dtype)
    assert not invariance_top1(queries, candidates).any()


def test_best_version_of_a_query_counts():
    candidates = random(20, 12)
    versions = np.stack([np.roll(candidates, shift, axis=1) for shift in (3, 5, 0)])
    assert invariance_top1(versions, candidates).all()
    assert invariance_top1(versions[:2], candidates).mean() < 0.5


def test_blocks_of_queries_change_nothing(monkeypatch):
    candidates = random(40, 6)
    queries = random(3, 40, 6, seed=1) + candidates
    whole = invariance_top1(queries, candidates)
    assert 0 < whole.sum() < 40
    for held in (7 * 40, 13 * 6, 1):
        monkeypatch.setattr(measures, "_HELD", held)
        assert np.array_equal(invariance_top1(queries, candidates), whole)


def test_fewer_distances_at_a_time_change_no_alignment(monkeypatch):
    score, performance = random(300, 5), random(310, 5, seed=1)
    whole, counted, advance = align(score, performance), [], measures._advance
    monkeypatch.setattr(measures, "_advance", lambda distance, *more: counted.append(distance.size) or advance(distance, *more))
    monkeypatch.setattr(measures, "_HELD", 8 * 310)
    assert np.array_equal(align(score, performance).positions, whole.positions) and max(counted) <= 8 * 310


def test_features_are_told_from_their_values():
    features = Features(np.ones((4, 2), np.float32), np.arange(4.0), Origin(Cqt()))
    for measure in (unit, lambda given: pool(given, 2), lambda given: align(given, given), lambda given: likeness(given, given)):
        with pytest.raises(ValueError, match="of type Features; give real numbers, such as the `values` of features"):
            measure(features)


def test_means_of_no_frames_and_beats_without_a_partner_are_refused():
    with pytest.raises(ValueError, match="means of 0 frames; give 1 or more"):
        pool(np.ones((4, 2)), 0)
    for estimated, true in (([1.0], [1.0, 2.0, 3.0]), ([], [])):
        with pytest.raises(ValueError, match="give one beat or more, as many of both"):
            beats_within(estimated, true, [0.1])


def test_stack_and_pool():
    values = np.arange(14.0).reshape(7, 2)
    assert stack(values, [0, 4], 3).tolist() == [[0, 1, 2, 3, 4, 5], [8, 9, 10, 11, 12, 13]]
    assert pool(values, 3).tolist() == [[2, 3], [8, 9], [12, 13]]
    assert np.array_equal(pool(values, 1), values)
    levels = np.random.default_rng(0).integers(-100, 100, (300, 4), dtype=np.int8)
    assert pool(levels, 200)[0] == pytest.approx(levels[:200].mean(axis=0), rel=1e-5)
    assert pool([[1, 2], [3, 4]], 2).tolist() == [[2, 3]]


def test_unit_keeps_zeros():
    assert np.allclose(unit(np.array([[3.0, 4.0], [0.0, 0.0]])), [[0.6, 0.8], [0, 0]])


@pytest.mark.parametrize(("rows", "columns"), [(40, 55), (55, 40), (1, 9), (9, 1), (300, 280)])
def test_alignment_is_librosas(rows, columns):
    score, performance = random(rows, 5), random(columns, 5, seed=1)
    distance = 1 - unit(score.astype(np.float64)) @ unit(performance.astype(np.float64)).T
    totals, path = librosa.sequence.dtw(C=distance, step_sizes_sigma=np.array([[1, 1], [1, 0], [0, 1]]))
    found = align(score, performance)
    assert found.cost == pytest.approx(totals[-1, -1], rel=1e-5)
    assert found.positions == pytest.approx([path[path[:, 0] == row, 1].mean() for row in range(rows)])


@pytest.mark.parametrize(("before", "sure"), [(0, 0), (500, 200)])
def test_long_alignments_are_searched_near_a_rough_one(monkeypatch, before, sure):
    """Wherever it leads: far from the diagonal, too, as where one side begins with what the other has not (and nothing is sure at first)."""
    performance = random(600 + before, 16)
    at = before + np.clip(np.rint(np.arange(400) * 1.5 + 20 * np.sin(np.arange(400) / 60)), 0, 599).astype(int)
    whole = align(performance[at], performance)
    cells, cheapest = [], measures._cheapest
    monkeypatch.setattr(measures, "_cheapest", lambda *of: cells.append((of[3] - of[2]).sum()) or cheapest(*of))
    monkeypatch.setattr(measures, "_CELLS", 400 * 120)
    near = align(performance[at], performance)
    assert len(cells) > 1 and max(cells) < 400 * (150 + before / 50)
    assert np.array_equal(near.positions[sure:], whole.positions[sure:])
    assert near.cost == pytest.approx(whole.cost, rel=0.02 if before else 1e-6)


@pytest.mark.parametrize(("rows", "columns"), [(3, 500), (500, 3), (50, 51)])
@pytest.mark.parametrize("cells", [1, 40])
def test_the_fewest_cells_still_reach_the_end(monkeypatch, rows, columns, cells):
    monkeypatch.setattr(measures, "_CELLS", cells)
    found = align(random(rows, 5), random(columns, 5, seed=1))
    assert np.isfinite(found.cost)
    assert (np.diff(found.positions) >= 0).all()
    assert found.positions[0] >= 0 and found.positions[-1] <= columns - 1


@pytest.mark.parametrize("compare", [align, likeness, invariance_top1])
def test_rows_that_compare_with_nothing_are_refused(compare):
    rows, broken = random(30, 4), random(30, 4, seed=1)
    broken[7, 2] = np.nan
    for sides, said in (
        ((rows, broken), "with numbers that are NaN"),
        ((np.full((30, 4), np.inf), rows), "with numbers that are NaN"),
        ((rows[:0], rows), r"of shape \(0, 4\); give one row or more"),
        ((rows, rows[:0]), r"of shape \(0, 4\); give one row or more"),
        ((rows, rows[0]), r"of shape \(4,\); give one row or more"),
        ((rows[:, None], rows[:, None, None]), r"of shape \(30, 1, (1, )?4\); give one row or more"),
        ((rows, rows.astype(object)), "of type object; give real numbers"),
        ((rows * 1j, rows), "of type complex64; give real numbers"),
        ((rows, random(30, 5)), r"rows of different lengths \(.+ of 4, .+ of 5\)"),
    ):
        with pytest.raises(ValueError, match=said):
            compare(*sides)
    compare(rows.tolist(), rows.astype(">f8")[::-1])


def test_each_query_has_a_candidate():
    with pytest.raises(ValueError, match="20 queries for 30 candidates"):
        invariance_top1(random(20, 4), random(30, 4))


def test_magnitudes_that_single_precision_does_not_hold_still_align():
    rows = random(30, 4).astype(np.float64)
    assert np.array_equal(align(rows * 1e100, rows).positions, np.arange(30))


def test_times_along_an_alignment():
    alignment = Alignment(np.array([0.0, 2.0, 6.0]), 0.0)
    assert alignment.times([0, 0.5, 0.75, 1.0, 9.0], 0.5) == pytest.approx([0, 1, 2, 3, 3])


def test_beats_within_counts_both_sides_and_the_limit():
    assert beats_within([1.0, 2.25, 2.75, 5.0], [1.0, 2.0, 3.0, 4.0], [0.1, 0.25, 2]) == [0.25, 0.75, 1.0]


def test_bootstrap_is_the_error_of_the_mean():
    values = np.random.default_rng(0).normal(size=(100, 2)) * [1, 5]
    error = bootstrap(values, 4000, seed=3)
    assert error == pytest.approx(values.std(axis=0) / 10, rel=0.05)
    assert error.tolist() == bootstrap(values, 4000, seed=3).tolist()
    assert bootstrap(values[:, 1], 4000, seed=3) == pytest.approx(error[1])
    assert bootstrap([0.5, 0.5, 0.5], 100, seed=1) == 0
    assert bootstrap(values[:3, 0], 4000, seed=3) == pytest.approx(values[:3, 0].std(ddof=1) / math.sqrt(3), rel=0.05)
    assert bootstrap([0.5], 100, seed=1) == 0


def test_likeness_is_that_of_each_stretch():
    recording = random(60, 8)
    found = likeness(3 * recording[20:30], recording)
    assert found.shape == (51,) and found.argmax() == 20 and found[20] == pytest.approx(1)
    slow = [np.mean(np.sum(unit(recording[20:30]) * unit(recording[k : k + 10]), axis=1)) for k in range(51)]
    assert found == pytest.approx(np.array(slow), abs=1e-6)
    assert likeness(recording, recording[:30]).shape == (0,)
    assert not likeness(np.zeros((3, 8)), recording).any()


def test_half_precision_tells_long_passages_apart():
    recording = random(4000, 8).astype(np.float16)
    found = likeness(recording[500:3500], recording)
    assert found.argmax() == 500 and found[500] == pytest.approx(1, abs=1e-3)
    assert unit(recording).dtype == np.float32 and unit(random(3, 4).astype(np.float64)).dtype == np.float64


def test_the_error_of_a_share_is_that_over_the_tracks():
    found = np.repeat([[True], [True], [False], [False]], 100, axis=1)  # pieces that are found whole or not at all
    assert mean_and_error(found) == (0.5, pytest.approx(np.std([1, 1, 0, 0], ddof=1) / 2))
    independent = np.tile([True, False], (4, 50))  # tracks that agree by chance
    assert mean_and_error(independent) == (0.5, pytest.approx(0.5 / math.sqrt(400)))
    assert mean_and_error(found[:1] & independent[:1]) == (0.5, pytest.approx(0.05))
    assert mean_and_error(found[:2]) == (1.0, 0.0) and mean_and_error(found[2:]) == (0.0, 0.0)
    few_and_many = [np.array([True]), np.repeat([True, False], 50)]  # a track counts as much as another
    assert mean_and_error(few_and_many) == (0.75, pytest.approx(0.25))
