"""What makes features good, measured on plain arrays. Knows neither files nor models.

Invariance: is the frame at the same time in a transposed rendering the nearest of all? Alignment: does dynamic time warping
find the beats of another performance? And how far such a figure can be trusted.
"""

import math
from dataclasses import dataclass

import numba
import numpy as np

_CELLS = 1 << 28  # of an alignment's table, a byte each; what would have more is searched about a path through means of rows
_HELD = 1 << 24  # numbers at a time, of queries in double precision, of similarities or of distances


def invariance_top1(queries, candidates):
    """Is each query's own candidate the nearest of all by cosine?

    Parameters
    ----------
    queries : ndarray, shape (n, d) or (versions, n, d)
        Row i belongs to row i of `candidates`. Several versions of a query: the one that comes nearest to a candidate counts.
    candidates : ndarray, shape (n, d)

    Returns
    -------
    ndarray of bool, shape (n,)
        Their mean is the top-1 rate. A tie is a miss.

    Raises
    ------
    ValueError
        If there are no rows, or not as many of both, or of other lengths, or with numbers that are NaN, infinite or not real.
    """
    queries, candidates = _comparable(queries=queries, candidates=candidates)
    versions = queries if queries.ndim == 3 else queries[None]
    n, length = candidates.shape
    if versions.shape[1] != n:
        raise ValueError(f"{versions.shape[1]} queries for {n} candidates; give each query its own")
    step = max(1, min(_HELD // n, _HELD // (length * len(versions))))
    blocks = [slice(start, start + step) for start in range(0, n, step)]
    # in double precision, rounded afterwards: in single, equal candidates would differ by their places in the product
    precise = np.empty((n, length))
    for block in blocks:
        precise[block] = unit(candidates[block].astype(np.float64))
    return np.concatenate([_found(unit(versions[:, block].astype(np.float64)), precise, block.start) for block in blocks])


def stack(values, starts, n):
    """Set `n` successive frames side by side.

    Parameters
    ----------
    values : ndarray, shape (n_frames, d)
    starts : ndarray of int, shape (m,)
        First frame of each stack, at most n_frames - n.
    n : int

    Returns
    -------
    ndarray, shape (m, n * d)
    """
    return values[np.asarray(starts)[:, None] + np.arange(n)].reshape(len(starts), -1)


def pool(values, n):
    """Means of `n` successive frames each, 1 or more: (n_frames, d) to (ceil(n_frames / n), d); the last may be of fewer."""
    if n < 1:
        raise ValueError(f"means of {n} frames; give 1 or more")
    values = _floating(values)
    starts = np.arange(0, len(values), n)
    counts = np.diff(np.append(starts, len(values)))
    return np.add.reduceat(values, starts, axis=0) / counts[:, None].astype(values.dtype)


def likeness(passage, recording):
    """How like a passage a recording is, from each of its frames on: the mean cosine of their frames, one by one.

    Parameters
    ----------
    passage : ndarray, shape (m, d)
        Of a frame at least.
    recording : ndarray, shape (n, d)

    Returns
    -------
    ndarray, shape (max(0, n - m + 1),)
        In [-1, 1]; for each stretch of the recording that is as long as the passage.

    Raises
    ------
    ValueError
        If either has no rows, or rows of another length, or with numbers that are NaN, infinite or not real.
    """
    passage, recording = map(unit, _comparable(passage=passage, recording=recording))
    n = max(0, len(recording) - len(passage) + 1)
    return sum(recording[k : k + n] @ row for k, row in enumerate(passage)) / len(passage)


def unit(values):
    """Rows (last axis) scaled to unit L2 norm, in single precision at least; zeros stay zeros."""
    values = _floating(values)
    norm = np.linalg.norm(values, axis=-1, keepdims=True)
    return values / np.where(norm > 0, norm, 1)


@dataclass(frozen=True)
class Alignment:
    """Where in one sequence each frame of another belongs.

    Attributes
    ----------
    positions : ndarray of float64, shape (n_score,)
        For each frame of the score, the frame of the performance: the mean of those that the path pairs it with.
    cost : float
        Cosine distances summed along the path.
    """

    positions: np.ndarray
    cost: float

    def times(self, score_times, hop, first=0.0):
        """Times in the performance for times in the score, interpolated between frames.

        Parameters
        ----------
        score_times : array_like, shape (n,)
            In s.
        hop, first : float
            In s, of both sequences: from one frame's centre to the next, and the centre of the first.

        Returns
        -------
        ndarray of float64, shape (n,)
            In s.
        """
        frames = np.subtract(score_times, first) / hop
        return np.interp(frames, np.arange(len(self.positions)), self.positions) * hop + first


def align(score, performance):
    """Dynamic time warping by cosine distance, with steps of one frame in either or both.

    Memory is one byte a cell of the table (6,000 frames against 6,000: 36 MB). Where there would be more than 2**28 cells, means of
    successive frames are aligned first, and then the frames themselves near that path: of two hours at 25 frames a second within
    half a minute of it. After S. Salvador, P. Chan: Toward accurate dynamic time warping in linear time and space, IDA 11(5), 2007.

    Parameters
    ----------
    score : ndarray, shape (n_score, d)
    performance : ndarray, shape (n_performance, d)

    Returns
    -------
    Alignment

    Raises
    ------
    ValueError
        If either has no rows, or rows of another length, or with numbers that are NaN, infinite or not real.
    """
    score, performance = _comparable(score=score, performance=performance)
    first, counts, cost = _warp(*(unit(rows).astype(np.float32) for rows in (score, performance)))
    return Alignment(first + (counts - 1) / 2, cost)


def beats_within(estimated, true, tolerances):
    """Share of beats whose estimated time is off by no more than each tolerance.

    Parameters
    ----------
    estimated, true : array_like, shape (n_beats,)
        Times in s.
    tolerances : sequence of float
        In s.

    Returns
    -------
    list of float

    Raises
    ------
    ValueError
        If there are no beats, or not as many of both.
    """
    estimated, true = np.asarray(estimated), np.asarray(true)
    if estimated.shape != true.shape or not true.size:
        raise ValueError(f"estimated of shape {estimated.shape}, true of {true.shape}; give one beat or more, as many of both")
    error = np.abs(estimated - true)
    return [float(np.mean(error <= tolerance)) for tolerance in tolerances]


def bootstrap(values, n, seed):
    """Standard error of the mean over tracks, by drawing the tracks again with replacement.

    Times sqrt(n_tracks / (n_tracks - 1)), without which it is too small for few tracks. Of a single track it is 0: nothing is known of it.

    Parameters
    ----------
    values : array_like, shape (n_tracks, ...)
        One figure, or several, a track.
    n : int
        Resamplings.
    seed : int

    Returns
    -------
    ndarray of float64, shape (...)

    References
    ----------
    B. Efron: Bootstrap methods: another look at the jackknife, Annals of Statistics 7(1), 1979.
    """
    values = np.asarray(values, dtype=np.float64)
    n_tracks = len(values)
    drawn = np.random.default_rng(seed).multinomial(n_tracks, np.full(n_tracks, 1 / n_tracks), size=n)
    return np.tensordot(drawn / n_tracks, values, axes=1).std(axis=0) * math.sqrt(n_tracks / max(1, n_tracks - 1))


def mean_and_error(found):
    """The share of a track's frames that are found, in the mean over the tracks, and its standard error.

    Frames of one piece fail together, so this is the standard error of the tracks' means; but at least that of independent
    frames, sqrt(p (1 - p) / n): few tracks may agree by chance, and one says nothing of others.

    Parameters
    ----------
    found : sequence of ndarray of bool, shape (n_frames,)
        Of each track.

    Returns
    -------
    tuple of float
        (share, error)
    """
    means = np.array([of_one.mean() for of_one in found])
    share, n_frames = float(means.mean()), sum(map(len, found))
    over_tracks = float(means.std(ddof=1)) / math.sqrt(len(means)) if len(means) > 1 else 0.0
    return share, max(over_tracks, math.sqrt(share * (1 - share) / n_frames))


def _found(versions, candidates, start):
    similarity = (versions[0] @ candidates.T).astype(np.float32)
    for version in versions[1:]:
        np.maximum(similarity, version @ candidates.T, out=similarity)
    rows = np.arange(len(similarity))
    own = similarity[rows, start + rows].copy()
    similarity[rows, start + rows] = -np.inf
    return own > similarity.max(axis=1, initial=-np.inf)


def _floating(values):
    """Values as floating-point numbers of single precision at least: sums in half precision stop growing at 2,048."""
    values = _numbers(values)
    return values.astype(np.result_type(values, np.float32), copy=False)


def _numbers(values, name="values"):
    """Values as an array of real numbers."""
    array = np.asarray(values)
    if array.dtype.kind not in "biuf":
        kind = array.dtype if isinstance(values, np.ndarray) else type(values).__name__
        raise ValueError(f"{name}: of type {kind}; give real numbers, such as the `values` of features")
    return array


def _comparable(**sides):
    """Two lots of rows, by name, as arrays: a row of each at least, of one length, and finite. Of queries there may be several."""
    arrays = {name: _numbers(rows, name) for name, rows in sides.items()}
    for name, rows in arrays.items():
        if rows.ndim not in ((2, 3) if name == "queries" else (2,)) or not rows.size:
            raise ValueError(f"{name}: of shape {rows.shape}; give one row or more, (n_frames, d)")
        if not np.isfinite(rows).all():
            raise ValueError(f"{name}: with numbers that are NaN or infinite; leave out or mend those rows")
    if len({rows.shape[-1] for rows in arrays.values()}) > 1:
        told = ", ".join(f"{name} of {rows.shape[-1]}" for name, rows in arrays.items())
        raise ValueError(f"rows of different lengths ({told}); give features of one kind")
    return map(_floating, arrays.values())


def _warp(score, performance):
    """The best path between rows of unit norm: for each of the score its first column and how many columns it holds; and the cost."""
    rows, columns = len(score), len(performance)
    starts, ends = np.zeros(rows, np.int64), np.full(rows, columns)
    if rows * columns > _CELLS:
        n = math.ceil(math.sqrt(rows * columns / _CELLS))
        first, counts, _ = _warp(unit(pool(score, n)), unit(pool(performance, n)))
        near = max(2 * n, _CELLS // (2 * rows))
        starts = np.maximum(0, np.repeat(n * first, n)[:rows] - near)
        ends = np.minimum(columns, np.repeat(n * (first + counts), n)[:rows] + near)
    return _cheapest(score, performance, starts, ends)


def _cheapest(score, performance, starts, ends):
    """As `_warp`, of the paths that lie in the columns from `starts` to `ends` (excluded) of each row; neither ever falls."""
    places = np.concatenate([[0], np.cumsum(ends - starts)])  # of each row's first cell among all
    steps = np.empty(places[-1], np.uint8)
    total, before = np.zeros(1), -1  # the path comes from the corner before the first cell
    height = max(1, min(256, _HELD // len(performance)))
    for row in range(0, len(score), height):
        some = slice(row, row + height)
        least, most = starts[some][0], ends[some][-1]
        distance = score[some] @ performance[least:most].T
        np.subtract(1, distance, out=distance)
        total = _advance(distance, starts[some], ends[some], before, total, steps[places[row] :])
        before = starts[some][-1]
    return *_path(steps, places, starts, len(performance)), float(total[-1])


@numba.njit(cache=True)
def _advance(distance, starts, ends, before, total, steps):
    """Extend the best paths by some rows: `total` are the costs up to the row before, whose first column is `before`."""
    cell = 0
    for row in range(len(starts)):
        moved, offset = starts[row] - before, starts[row] - starts[0]
        before = starts[row]
        costs = np.empty(ends[row] - starts[row])
        left = np.inf
        for column in range(len(costs)):
            above = column + moved
            diagonal = total[above - 1] if 0 < above <= len(total) else np.inf
            vertical = total[above] if above < len(total) else np.inf
            if diagonal <= vertical and diagonal <= left:
                best, step = diagonal, 0
            elif vertical <= left:
                best, step = vertical, 1
            else:
                best, step = left, 2
            left = best + distance[row, offset + column]
            costs[column] = left
            steps[cell] = step
            cell += 1
        total = costs
    return total


@numba.njit(cache=True)
def _path(steps, places, starts, columns):
    """Follow the steps back from the end: for each row its first column and how many columns it holds."""
    rows = len(starts)
    first = np.empty(rows, np.int64)
    counts = np.zeros(rows, np.int64)
    row, column = rows - 1, columns - 1
    while row >= 0:
        first[row] = column
        counts[row] += 1
        step = steps[places[row] + column - starts[row]]
        if step != 2:
            row -= 1
        if step != 1:
            column -= 1
    return first, counts
