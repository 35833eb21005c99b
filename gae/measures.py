"""What makes features good, measured on plain arrays. Knows neither files nor models.

Invariance: is the frame at the same time in a transposed rendering the nearest of all? Alignment: does dynamic time warping
find the beats of another performance? And how far such a figure can be trusted.
"""

import math
from dataclasses import dataclass

import numba
import numpy as np

_CELLS = 1 << 28  # of an alignment's table, a byte each; what would have more is searched in a band
_SIMILARITIES = 1 << 24  # held at a time when nearest frames are looked for


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
    """
    # in double precision, rounded afterwards: in single, equal candidates would differ by their places in the product
    queries, candidates = np.asarray(queries, np.float64), unit(np.asarray(candidates, np.float64))
    versions = unit(queries if queries.ndim == 3 else queries[None])
    n = len(candidates)
    step = max(1, _SIMILARITIES // n)
    return np.concatenate([_found(versions[:, start : start + step], candidates, start) for start in range(0, n, step)])


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
    """Means of `n` successive frames each: (n_frames, d) to (ceil(n_frames / n), d); the last may be of fewer."""
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
    """
    passage, recording = unit(passage), unit(recording)
    n = max(0, len(recording) - len(passage) + 1)
    return sum(recording[k : k + n] @ row for k, row in enumerate(passage)) / len(passage)


def unit(values):
    """Rows (last axis) scaled to unit L2 norm; zeros stay zeros."""
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

    Memory is one byte a cell of the table (6,000 frames against 6,000: 36 MB). Beyond 2**28 cells only a band about the
    diagonal is searched.

    Parameters
    ----------
    score : ndarray, shape (n_score, d)
    performance : ndarray, shape (n_performance, d)

    Returns
    -------
    Alignment
    """
    score, performance = unit(score.astype(np.float32)), unit(performance.astype(np.float32))
    steps, starts, cost = _table(score, performance)
    first, counts = _path(steps, starts, len(performance))
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
    """
    error = np.abs(np.asarray(estimated) - np.asarray(true))
    return [float(np.mean(error <= tolerance)) for tolerance in tolerances]


def bootstrap(values, n, seed):
    """Standard error of the mean over tracks, by drawing the tracks again with replacement.

    Times sqrt(n_tracks / (n_tracks - 1)), without which it is too small for few tracks.

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


def _table(score, performance):
    """The best step into each cell of the band, the first column of the band in each row, and the cost of the best path."""
    rows, columns = len(score), len(performance)
    width = min(columns, max(_CELLS // rows, 2 + 2 * columns // rows))
    starts = np.clip(np.rint(np.linspace(0, columns, rows) - width / 2), 0, columns - width).astype(np.int64)
    steps = np.empty((rows, width), np.uint8)
    total = np.full(width, np.inf)
    total[0], before = 0.0, -1  # the path comes from the corner before the first cell
    for row in range(0, rows, 256):
        band = starts[row : row + 256]
        distance = 1 - score[row : row + 256] @ performance[band[0] : band[-1] + width].T
        total = _advance(distance, band, before, total, steps[row : row + 256])
        before = band[-1]
    return steps, starts, float(total[-1])


@numba.njit(cache=True)
def _advance(distance, starts, before, total, steps):
    """Extend the best paths by some rows: `total` are the costs up to the row before, whose band begins at column `before`."""
    width = len(total)
    for row in range(len(starts)):
        moved = starts[row] - before
        offset = starts[row] - starts[0]
        before = starts[row]
        costs = np.empty(width)
        left = np.inf
        for column in range(width):
            above = column + moved
            diagonal = total[above - 1] if 0 < above <= width else np.inf
            vertical = total[above] if above < width else np.inf
            if diagonal <= vertical and diagonal <= left:
                best, step = diagonal, 0
            elif vertical <= left:
                best, step = vertical, 1
            else:
                best, step = left, 2
            left = best + distance[row, offset + column]
            costs[column] = left
            steps[row, column] = step
        total = costs
    return total


@numba.njit(cache=True)
def _path(steps, starts, columns):
    """Follow the steps back from the end: for each row its first column and how many columns it holds."""
    rows = len(starts)
    first = np.empty(rows, np.int64)
    counts = np.zeros(rows, np.int64)
    row, column = rows - 1, columns - 1
    while row >= 0:
        first[row] = column
        counts[row] += 1
        step = steps[row, column - starts[row]]
        if step != 2:
            row -= 1
        if step != 1:
            column -= 1
    return first, counts
