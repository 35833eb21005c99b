import numpy as np
import pytest
import tiny
import torch

from gae import batches as module
from gae.batches import Excerpts, long_enough, transpose
from gae.errors import TrainingError
from gae.params import Train
from gae.shards import Shards

BINS, CONTEXT = tiny.CQT.n_bins, 5
LAGS = range(CONTEXT, 0, -1)
LENGTHS = [(60,), (300,), (90, 90, 80), (2100, 2100)]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Four performances, two of them in several views. The bins of a frame tell where it is from: line, view, and when."""
    folder = tmp_path_factory.mktemp("batches") / "shards"
    lines = [[numbered(line, view, n) for view, n in enumerate(lengths)] for line, lengths in enumerate(LENGTHS)]
    tiny.write_shards(folder, lines)
    with Shards(folder) as shards:
        yield shards


def numbered(line, view, n_frames):
    frames = np.zeros((n_frames, BINS), np.float32)
    frames[:, 17], frames[:, 18], frames[:, 19] = 1 + line, 1 + view, 1 + np.arange(n_frames)
    return frames


def origin(frames):
    """Line, view and first frame of numbered frames, and by how many bins they were shifted."""
    bins = np.flatnonzero(frames.any(axis=0))
    shift = bins[0] - 17
    assert bins.tolist() == [17 + shift, 18 + shift, 19 + shift]
    line, view, times = frames[:, bins].T
    assert len(set(line)) == len(set(view)) == 1
    return int(line[0]) - 1, int(view[0]) - 1, times.astype(int) - 1, shift


def excerpts(shards, rank=0, world=1, lags=LAGS, **settings):
    settings = {"block": 24, "batch": 6, "stride": 1, "dropout": 0.0, "shift": 16, "stretch": 0.0, "equaliser": 0.0, **settings}
    return Excerpts(shards, shards.lines, lags, Train(**settings), rank, world)


def equal(one, other):
    return all(map(np.array_equal, one, other))


@pytest.mark.parametrize("objective", ["invariance", "reconstruction"])
@pytest.mark.parametrize("stride", [1, 4, 7])
def test_x_is_the_context_directly_before_y(shards, objective, stride):
    made = excerpts(shards, objective=objective, stride=stride)
    for step in range(10):
        batch = made.batch(step)
        for x, y in zip(*(side.reshape(-1, *side.shape[2:]) for side in (batch.x, batch.y)), strict=True):
            assert x.shape == (24 + CONTEXT, BINS) and y.shape == (-(-24 // stride), BINS)
            assert x.dtype == y.dtype == np.float32
            x_line, x_view, x_times, x_shift = origin(x)
            y_line, y_view, y_times, y_shift = origin(y)
            assert (x_line, x_view, x_shift) == (y_line, y_view, y_shift)
            assert np.array_equal(x_times, x_times[0] + np.arange(len(x)))
            assert np.array_equal(y_times, x_times[0] + CONTEXT + stride * np.arange(len(y)))
            assert x_times[0] >= 0 and y_times[-1] < min(LENGTHS[x_line])
        for y, contexts in zip(*(part.reshape(12, *part.shape[2:]) for part in (batch.y, batch.contexts)), strict=True):
            for frame, context in zip(y, batch.x.reshape(-1, BINS)[contexts], strict=True):
                assert np.array_equal(origin(context)[2], origin(frame[None])[2][0] - np.arange(CONTEXT, 0, -1))


def test_a_dilated_context_leaves_frames_out(shards):
    made = excerpts(shards, lags=range(9, 0, -2))
    assert made.n_before == 9
    for _, sides in readings(made, 10):
        assert (sides == [9, 7, 5, 3, 1]).all()
    slow = excerpts(shards, lags=range(9, 0, -2), stretch=0.4)
    assert slow.n_before == 13
    seen = {tuple(row) for _, sides in readings(slow, 100) for row in sides}
    assert (9, 7, 5, 3, 1) in seen and (12, 9, 7, 4, 1) in seen and max(seen)[0] <= 13 and {row[-1] for row in seen} == {1}


def readings(made, n_steps):
    """Of all excerpts of some steps: whether both sides are of one view, and (2, context) how far from y their contexts are read."""
    for batch in map(made.batch, range(n_steps)):
        frames = batch.x.reshape(-1, BINS)
        for n, one_view in enumerate(batch.one_view):
            for contexts, sounds in zip(np.swapaxes(batch.contexts[:, n], 0, 1), np.swapaxes(batch.y[:, n], 0, 1), strict=True):
                now = [origin(frame[None])[2][0] for frame in sounds]
                yield one_view, np.stack([time - origin(frames[rows])[2] for time, rows in zip(now, contexts, strict=True)])


def test_another_views_context_is_read_at_another_tempo(shards):
    """On one side; at any ratio up to that of the parameter, either way; and the last frame before y stays in sight."""
    written, ratios = np.arange(CONTEXT, 0, -1), []
    for one_view, (first, second) in readings(excerpts(shards, stretch=0.4), 100):
        assert np.array_equal(first, written) or np.array_equal(second, written)
        assert not one_view or np.array_equal(first, second)
        ratios += [] if one_view else [first[0] / CONTEXT, second[0] / CONTEXT]
        assert first.min() == second.min() == 1
        assert all(np.isin(np.abs(np.diff(side)), (0, 1, 2)).all() for side in (first, second))
    assert set(ratios) == {0.8, 1.0, 1.2, 1.4}


def test_the_original_reads_no_other_tempo(shards):
    batch, plain = (excerpts(shards, objective="reconstruction", stretch=stretch).batch(0) for stretch in (0.4, 0.0))
    assert equal(batch, plain)


@pytest.fixture(scope="module")
def music(tmp_path_factory):
    """Two performances in two views each, standardised frames; the first 40 of each are silent."""
    folder = tmp_path_factory.mktemp("music") / "shards"
    tracks = [tiny.frames(200, seed, BINS) for seed in range(4)]
    for frames in tracks:
        frames[:40] = 0
    tiny.write_shards(folder, [tracks[:2], tracks[2:]])
    with Shards(folder) as shards:
        yield shards


def test_another_views_excerpts_pass_equalisers(music):
    """One for each side, the same at all times; what comes out is standardised, and silence stays silence."""
    seen = []
    for step in range(20):
        plain, made = (excerpts(music, shift=0, equaliser=strength).batch(step) for strength in (0.0, 0.5))
        assert np.array_equal(made.one_view, plain.one_view) and np.array_equal(made.contexts, plain.contexts)
        one, other = made.one_view, np.flatnonzero(~made.one_view)
        assert np.array_equal(made.x[:, one], plain.x[:, one])
        silent = ~plain.x.any(-1)
        assert np.array_equal(~made.x.any(-1), silent)
        assert np.allclose(made.x.sum(-1), 0, atol=1e-5) and np.allclose(np.linalg.norm(made.x, axis=-1)[~silent], 1, atol=1e-5)
        assert np.array_equal(made.y, made.x[:, :, CONTEXT:])
        for side, n in [(side, n) for side in (0, 1) for n in other]:
            before, after = (frames[~silent[side, n]] for frames in (plain.x[side, n], made.x[side, n]))
            before, after = (frames - frames.min(1, keepdims=True, initial=0) for frames in (before, after))
            loud = (before > 0.05).all(0)
            if len(before) > 1 and loud.sum() > 1:
                gains = after[:, loud] / before[:, loud]
                gains /= gains[:, :1]  # each frame is scaled to unit norm
                seen.append(gains[0])
                assert np.allclose(gains, gains[0], rtol=1e-2)
    assert len(seen) > 20 and np.std(np.concatenate(seen)) > 0.2


def test_equalisers_are_smooth_and_as_strong_as_asked():
    waves = module.equaliser_waves(BINS)
    assert np.allclose(np.square(waves).sum(0), 1, atol=1e-5)  # the variance of a sum with normal weights
    assert np.abs(np.diff(waves, axis=1)).max() < 0.5


def test_the_original_knows_no_equalisers(music):
    batch, plain = (excerpts(music, objective="reconstruction", equaliser=strength).batch(0) for strength in (0.5, 0.0))
    assert equal(batch, plain)


@pytest.mark.parametrize("world", [2, 3])
def test_equalisers_do_not_depend_on_the_number_of_processes(music, world):
    whole = excerpts(music, equaliser=0.5).batch(3)
    parts = [excerpts(music, rank, world, equaliser=0.5).batch(3) for rank in range(world)]
    for rank, part in enumerate(parts):
        assert np.array_equal(part.x, whole.x[:, rank::world]) and np.array_equal(part.y, whole.y[:, rank::world])


def drawn(made, n_steps):
    """Origins of both sides of all excerpts of some steps."""
    for step in range(n_steps):
        batch = made.batch(step)
        for y1, y2 in zip(*batch.y, strict=True):
            yield step, origin(y1), origin(y2)


def test_the_sides_of_invariance_are_one_excerpt_at_two_shifts(shards):
    shifts_1, shifts_2 = [], []
    for _, (line_1, _, times_1, shift_1), (line_2, _, times_2, shift_2) in drawn(excerpts(shards), 60):
        assert line_1 == line_2 and np.array_equal(times_1, times_2)
        shifts_1.append(shift_1)
        shifts_2.append(shift_2)
    assert set(shifts_1) == set(shifts_2) == set(range(-16, 17))
    assert abs(np.corrcoef(shifts_1, shifts_2)[0, 1]) < 0.15


@pytest.mark.parametrize("objective", ["invariance", "reconstruction"])
def test_something_is_left_of_frames_however_far_they_may_be_shifted(music, objective):
    far, near = (excerpts(music, shift=shift, objective=objective) for shift in (1000, 1))
    for step in range(40):
        assert far.batch(step).y.any(axis=-1).sum() == near.batch(step).y.any(axis=-1).sum() > 0


def test_the_originals_sides_are_one_excerpt_and_one_shift_for_the_whole_batch(shards):
    shifts = {}
    for step, (line_1, view_1, times_1, shift_1), (line_2, view_2, times_2, shift_2) in drawn(
        excerpts(shards, objective="reconstruction"), 200
    ):
        assert (line_1, view_1) == (line_2, view_2) and np.array_equal(times_1, times_2) and shift_1 == 0
        assert shifts.setdefault(step, shift_2) == shift_2
    assert set(shifts.values()) == set(range(-16, 17))


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_positives_come_from_another_view_at_the_asked_share(shards, share):
    pairs = [(view_1, view_2) for _, (line, view_1, *_), (_, view_2, *_) in drawn(excerpts(shards, view_share=share), 150) if line >= 2]
    assert np.mean([one != other for one, other in pairs]) == pytest.approx(share, abs=0.05)
    used = {view for pair in pairs for view in pair}
    assert used == {0, 1, 2}


def test_a_batch_says_which_excerpts_have_one_view_on_both_sides(shards):
    made = excerpts(shards, view_share=0.5)
    for batch in map(made.batch, range(20)):
        for y1, y2, one_view in zip(*batch.y, batch.one_view, strict=True):
            assert one_view == (origin(y1)[1] == origin(y2)[1])


def test_lines_are_drawn_by_their_length(shards):
    lines = [line for _, (line, *_), _ in drawn(excerpts(shards), 150)]
    lengths = np.array([min(views) for views in LENGTHS])
    assert np.allclose(np.bincount(lines, minlength=4) / len(lines), lengths / lengths.sum(), atol=0.04)


def test_every_excerpt_of_a_line_is_drawn(shards):
    made = Excerpts(shards, shards.lines[:1], LAGS, Train(block=24, batch=6, stride=1, shift=5, stretch=0))
    assert {times[0] for _, (_, _, times, _), _ in drawn(made, 100)} == set(range(CONTEXT, 60 - 24 + 1))


def test_what_is_shifted_out_is_gone(shards):
    batch = excerpts(shards, shift=200, batch=32).batch(0)
    assert any(not y.any() for y in batch.y[0])


def test_draws_follow_from_the_seed_and_the_step_alone(shards):
    first, second = excerpts(shards, dropout=0.5), excerpts(shards, dropout=0.5)
    later = second.batch(7)
    for step in range(8):
        batch = first.batch(step)
    assert equal(batch, later) and not equal(batch, first.batch(6))
    assert not equal(batch, excerpts(shards, dropout=0.5, seed=2).batch(7))
    ahead = list(first.batches(5, 8))
    assert len(ahead) == 3 and equal(ahead[2], later) and list(first.batches(8, 8)) == []


@pytest.mark.parametrize("objective", ["invariance", "reconstruction"])
@pytest.mark.parametrize("world", [2, 3])
def test_processes_together_see_what_one_sees(shards, objective, world):
    whole = excerpts(shards, objective=objective, dropout=0.5).batch(3)
    for rank in range(world):
        part = excerpts(shards, rank, world, objective=objective, dropout=0.5).batch(3)
        assert all(np.array_equal(getattr(whole, side)[:, rank::world], getattr(part, side)) for side in ("x", "y"))
        assert np.array_equal(whole.one_view[rank::world], part.one_view)


def test_the_common_shift_does_not_depend_on_the_first_excerpt(shards):
    """Else the transposition of a batch would tell which line its first excerpt is from."""
    made = excerpts(shards, objective="reconstruction", shift=2)
    draws = [(made.batch(step).y[0, 0], made.batch(step).y[1, 0]) for step in range(400)]
    origins = [(origin(y1)[0], origin(y2)[3]) for y1, y2 in draws]
    for line in (1, 3):
        shifts = [shift for drawn_line, shift in origins if drawn_line == line]
        assert len(shifts) > 30 and set(shifts) == set(range(-2, 3))


@pytest.mark.parametrize("dropout", [0.25, 0.5])
def test_dropout_zeroes_its_share_of_x_and_scales_the_rest(shards, dropout):
    made = excerpts(shards, dropout=dropout)
    made._read = lambda key, start: np.ones((made.length, BINS), np.float32)
    batch = made.batch(0)
    for x, y in zip(batch.x, batch.y, strict=True):
        for excerpt, frames in zip(x, y, strict=True):
            sounding = frames[0] > 0
            kept = excerpt[:, sounding]
            assert set(np.unique(kept)) <= {0, np.float32(1 / (1 - dropout))}
            assert np.mean(kept == 0) == pytest.approx(dropout, abs=0.1)
            assert frames.max() == 1
    assert np.mean(batch.x[0][:, :, 17] == 0) == pytest.approx(dropout, abs=0.15)


def test_the_sides_of_invariance_are_dropped_apart(shards):
    made = excerpts(shards, dropout=0.5, shift=0)
    made._read = lambda key, start: np.ones((made.length, BINS), np.float32)
    batch = made.batch(0)
    assert np.mean((batch.x[0] == 0) == (batch.x[1] == 0)) == pytest.approx(0.5, abs=0.05)


def test_the_original_transposes_what_was_dropped(shards):
    """One mask for both contexts, moved along with the frames; y has none."""
    made = excerpts(shards, objective="reconstruction", dropout=0.5, shift=9)
    whole = tiny.frames(made.length)
    made._read = lambda key, start: whole
    for step in range(6):
        batch = made.batch(step)
        for x1, y1, x2, y2 in zip(batch.x[0], batch.y[0], batch.x[1], batch.y[1], strict=True):
            shift = next(k for k in range(-9, 10) if np.array_equal(transpose(y1, k), y2))
            assert np.array_equal(transpose(x1, shift), x2)
            assert (x1 == 0).mean() == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("dropout", [0, 0.5])
def test_frames_are_kept_as_they_are_stored(tmp_path, dropout):
    tiny.write_shards(tmp_path / "shards", [[tiny.frames(120)]], dtype="float16")
    with Shards(tmp_path / "shards") as half:
        made = excerpts(half, dropout=dropout)
        assert {array.dtype for array in made.batch(0)[:2]} == {np.dtype(np.float32)}
        assert made._read(half.lines[0][0].key, 0).dtype == np.float16


def test_batches_take_turns_in_the_same_memory(shards):
    made, other = excerpts(shards), excerpts(shards)
    seen = []
    for step, batch in enumerate(made.batches(0, 5)):
        assert equal(batch, other.batch(step))
        seen.append(batch.x[1])
    assert np.shares_memory(seen[0], seen[2]) and np.shares_memory(seen[1], seen[3]) and not np.shares_memory(seen[3], seen[4])


def test_a_large_corpus_is_not_kept_in_memory(shards, monkeypatch):
    small = excerpts(shards)
    total = sum(track.n_frames for track in shards.tracks.values()) * BINS * 4
    monkeypatch.setattr(module, "_KEPT_BYTES", total - 1)
    large = excerpts(shards)
    assert all(equal(small.batch(step), large.batch(step)) for step in range(20))
    assert large._kept is None and sum(frames.nbytes for frames in small._kept.values()) <= total


def test_batches_are_made_by_one_thread_that_leaves_trainings_threads_alone(shards, monkeypatch):
    """Helpers of its own, together with training's, would be more than there are cores, and all sleep between any two operations."""
    seen = []
    batch = Excerpts.batch
    monkeypatch.setattr(Excerpts, "batch", lambda *given: seen.append(torch.get_num_threads()) or batch(*given))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert len(list(excerpts(shards).batches(0, 3))) == 3
        assert (seen, torch.get_num_threads()) == ([1, 1, 1], 2)
    finally:
        torch.set_num_threads(before)


def test_tracks_shorter_than_an_excerpt_are_left_out(shards):
    assert [len(line) for line in long_enough(shards.lines, 80)] == [1, 3, 2]
    assert [len(line) for line in long_enough(shards.lines, 81)] == [1, 2]
    assert len(long_enough(shards.lines, 60)) == 4
    with pytest.raises(TrainingError, match=r"no track of the training list has 2101 frames .* lower train\.block"):
        long_enough(shards.lines, 2101)


def test_a_track_of_just_one_excerpt_will_do(shards):
    made = Excerpts(shards, shards.lines[:1], LAGS, Train(block=60 - CONTEXT, batch=3, stride=1, dropout=0.0, shift=16, stretch=0))
    assert all(origin(y)[2][0] == CONTEXT for y in made.batch(0).y[0] if y.any())


def test_a_batch_that_processes_cannot_share_is_refused(shards):
    with pytest.raises(TrainingError, match=r"train\.batch \(6\) must be a multiple of the number of processes \(4\)"):
        excerpts(shards, 0, 4)


def test_each_side_passes_an_equaliser_of_its_own(music, monkeypatch):
    seen = []
    monkeypatch.setattr(module, "_colour", lambda excerpts, which, gains: seen.append(gains[which]))
    excerpts(music, equaliser=0.5, view_share=1.0).batch(0)
    first, second = seen
    assert len(first) == 6 and not np.isclose(first, second, rtol=0.01).all(axis=1).any()
