"""What training sees: random excerpts from the shards, transposed, in pairs, some at another tempo and through other filters.

Every draw of a step follows from the seed and the number of the step alone. Training can stop and go on anywhere, and any
number of processes together see what one alone would see.
"""

import math
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from threadpoolctl import threadpool_limits

from gae.cqt import transpose
from gae.errors import TrainingError

_KEPT_BYTES = 256 << 20  # of frames: a corpus of no more stays in memory once read; a part of a larger one would seldom be drawn again


class Batch(NamedTuple):
    """Excerpts, each on two sides that differ by a transposition and maybe in sound, colour and tempo: frames, and their contexts.

    Attributes
    ----------
    x : ndarray of float32, shape (2, n_excerpts, n_before + block, n_bins)
        The excerpts, of which contexts are made, with dropout; `n_before` is that of `Excerpts`.
    y : ndarray of float32, shape (2, n_excerpts, ceil(block / stride), n_bins)
        Every `stride`-th frame of the block, which begins n_before frames after x.
    contexts : ndarray of int, shape (2, n_excerpts, ceil(block / stride), context)
        The context of each frame of y, the earliest first, as rows of x.reshape(-1, n_bins): `lags` frames before it, or at
        another tempo frames further apart or closer together.
    one_view : ndarray of bool, shape (n_excerpts,)
        Whether both sides are of the same view, and so differ by a transposition alone.
    """

    x: np.ndarray
    y: np.ndarray
    contexts: np.ndarray
    one_view: np.ndarray


class _Draws(NamedTuple):
    """What is drawn for excerpts: arrays (n_excerpts,), and (2, n_excerpts) of what its sides differ in."""

    lines: np.ndarray
    starts: np.ndarray
    views: np.ndarray
    shifts: np.ndarray
    tempi: np.ndarray
    bends: np.ndarray  # (2, n_excerpts, n_waves), weights of `equaliser_waves`


class Excerpts:
    """Batches of random excerpts.

    Parameters
    ----------
    shards : gae.shards.Shards
    lines : list of list of Track
        Those to draw from, each with its views, and `long_enough`.
    lags : sequence of int
        How many frames before y each frame of its context lies, the earliest first: `gae.params.Model.lags`.
    train : gae.params.Train
    rank, world : int
        This process takes every `world`-th excerpt of each batch, from `rank` on.

    Attributes
    ----------
    n_before : int
        Frames of an excerpt before its block: as many as the context reaches back, at the slowest tempo.
    """

    def __init__(self, shards, lines, lags, train, rank=0, world=1):
        self.shards, self.lags, self.train = shards, np.array(lags), train
        self.n_before = n_frames_before(lags[0], train)
        self.length = self.n_before + train.block
        self.lines = lines
        if train.batch % world:
            raise TrainingError(f"train.batch ({train.batch}) must be a multiple of the number of processes ({world})")
        self.own = range(rank, train.batch, world)
        lengths = np.array([_common_length(line) for line in lines])
        self._until, self._n_starts = lengths.cumsum(), lengths - self.length + 1
        self._n_views = np.array([len(line) for line in lines])
        self._shape = 2, len(self.own), self.length, shards.cqt.n_bins
        total = sum(track.n_frames * np.dtype(track.dtype).itemsize for track in shards.tracks.values()) * shards.cqt.n_bins
        self._kept = {} if total <= _KEPT_BYTES else None
        self._waves = equaliser_waves(shards.cqt.n_bins)

    def batches(self, first, last):
        """Yield the `Batch` of each of the steps `first` to `last` (excluded), each prepared while its predecessor is used.

        A batch lasts until the next is asked for: two take turns in the same memory, as arrays that come and go among small
        ones that stay would spread over ever more of it.
        """
        rooms = np.empty((2, *self._shape), np.float32)
        with ThreadPoolExecutor(1, initializer=_work_alone) as ahead:
            following = ahead.submit(self.batch, first, rooms[first % 2]) if first < last else None
            for step in range(first, last):
                batch = following.result()
                following = ahead.submit(self.batch, step + 1, rooms[(step + 1) % 2]) if step + 1 < last else None
                yield batch

    def batch(self, step, room=None):
        """The `Batch` of a step, this process's share; in `room`, float32 (2, n_excerpts, n_before + block, n_bins), if it is given."""
        drawn = self._draw(step)
        sides = np.empty(self._shape, np.float32) if room is None else room
        for place, (line, start, views, shifts) in enumerate(zip(drawn.lines, drawn.starts, drawn.views.T, drawn.shifts.T, strict=True)):
            self._put(line, start, views.tolist(), shifts.tolist(), sides[:, place])
        one_view = drawn.views[0] == drawn.views[1]
        if self.train.equaliser:
            for side, bends in zip(sides, drawn.bends, strict=True):
                # no matrix product: BLAS adds up a row of it in another order, the more rows there are
                _colour(side, ~one_view, np.exp(np.einsum("nw,wb->nb", bends, self._waves)))
        y = sides[:, :, self.n_before :: self.train.stride]
        x = sides * self._masks(step, drawn.shifts) if self.train.dropout else sides
        return Batch(x, y, self._contexts(drawn.tempi), one_view)

    def _draw(self, step):
        """The `_Draws` of a step, drawn for the excerpts of all processes: this one's."""
        train, n = self.train, self.train.batch
        shift = min(train.shift, self._shape[-1] - 1)  # or nothing would be left of a frame
        # numbers from n on are no excerpt's: what is drawn for all must not be what a mask is drawn from
        rng = np.random.default_rng([train.seed, step, n])
        lines = np.searchsorted(self._until, rng.integers(self._until[-1], size=n), side="right")
        starts, n_views = rng.integers(self._n_starts[lines]), self._n_views[lines]
        view = rng.integers(n_views)
        tempi, bends = np.ones((2, n)), np.zeros((2, n, len(self._waves)), np.float32)
        if train.objective == "reconstruction":
            shifts = np.stack([np.zeros(n, int), np.full(n, rng.integers(-shift, shift + 1))])
            views = np.stack([view, view])
        else:
            shifts = rng.integers(-shift, shift + 1, size=(2, n))
            other = (n_views > 1) & (rng.random(n) < train.view_share)
            views = np.stack([view, (view + other * rng.integers(1, np.maximum(n_views, 2))) % n_views])
            tempi[rng.integers(2, size=n), np.arange(n)] = np.where(other, (1 + train.stretch) ** rng.uniform(-1, 1, n), 1)
            bends += train.equaliser * rng.standard_normal(bends.shape)
        own = self.own
        return _Draws(lines[own], starts[own], views[:, own], shifts[:, own], tempi[:, own], bends[:, own])

    def _contexts(self, tempi):
        """`Batch.contexts`, read at the tempi (2, n_excerpts), ratios."""
        back = np.rint(tempi[..., None] * self.lags).astype(int)
        places = self.n_before + np.arange(0, self.train.block, self.train.stride)[:, None] - back[:, :, None]
        return places + self.length * np.arange(tempi.size).reshape(*tempi.shape, 1, 1)

    def _put(self, line, start, views, shifts, sides):
        """Put the frames of an excerpt's two sides into `sides` (2, length, n_bins)."""
        stored = {view: self._read(self.lines[line][view].key, start) for view in set(views)}
        for side, view, shift in zip(sides, views, shifts, strict=True):
            torch.from_numpy(side).copy_(torch.from_numpy(transpose(stored[view], shift)))  # NumPy takes several times as long

    def _masks(self, step, shifts):
        """Inverted dropout of a step, of the shape of both sides: zeros, and 1 / (1 - dropout) elsewhere."""
        dropout, masks = self.train.dropout, np.zeros(self._shape, np.float32)
        for place, n in enumerate(self.own):
            rng = np.random.default_rng([self.train.seed, step, n])  # of its own, lest each process draw the masks of all
            for number, mask in enumerate(masks[:, place]):
                if number and self.train.objective == "reconstruction":
                    transpose(masks[0, place], shifts[1, place], out=mask)  # the original transposes what was dropped along with the rest
                else:
                    mask[:] = (rng.random(mask.shape, dtype=np.float32) >= dropout) / (1 - dropout)
        return masks

    def _read(self, key, start):
        """The frames of an excerpt (length, n_bins), as they are stored."""
        if self._kept is None:
            return self.shards.read(key, start, start + self.length, dtype=None)
        if key not in self._kept:
            self._kept[key] = self.shards.read(key, dtype=None)
        return self._kept[key][start : start + self.length]


def equaliser_waves(n_bins, count=6):
    """Smooth waves over the bins, of which random equalisers are made: (2 * count, n_bins).

    Cosines and sines of half a period to `count` halves, the quicker the smaller. With normal weights their sums have a standard
    deviation of 1 at each bin. Filters at random as in H. Nam, S.-H. Kim, Y.-H. Park: FilterAugment, ICASSP 2022, but smooth.
    """
    halves = np.arange(1, count + 1)[:, None]
    phases = np.pi * halves * (np.arange(n_bins) + 0.5) / n_bins
    return (np.concatenate([np.cos(phases), np.sin(phases)]) / np.sqrt(np.tile(halves, (2, 1)) * (1 / halves).sum())).astype(np.float32)


def _colour(excerpts, which, gains):
    """Pass `which` of the excerpts (n, length, n_bins) through equalisers, their `gains` (n, n_bins), and standardise the frames again.

    Compressed magnitudes, but for their scale, are what rises above the least bin of a frame; that is multiplied. Like a filter it
    changes what is loud, and lifts nothing out of silence. The rest is `gae.cqt.standardise` in place, by PyTorch for its speed.
    """
    some = torch.from_numpy(excerpts[which])
    some.sub_(some.amin(-1, keepdim=True)).mul_(torch.from_numpy(gains[which][:, None]))
    some.sub_(some.mean(-1, keepdim=True))
    excerpts[which] = some.div_(some.norm(dim=-1, keepdim=True).clamp_min(1e-8))


def _work_alone():
    """Have PyTorch use no other threads from this one.

    OpenMP would start as many more as training has; where all together are more than the cores, it lets those of training sleep between
    any two operations, and to wake them takes long.
    """
    torch.get_num_threads()  # first, as the first call of a thread sets what is limited here
    threadpool_limits(1, user_api="openmp")


def n_frames_before(reach, train):
    """Frames that an excerpt needs before the first that is set against a context, which reaches back by `reach` at its own tempo."""
    return math.ceil(reach * (1 + train.stretch)) if train.objective == "invariance" else reach


def long_enough(lines, n_frames):
    """The lines that have `n_frames` frames, those of an excerpt.

    Raises
    ------
    TrainingError
        If there are none.
    """
    lines = [line for line in lines if _common_length(line) >= n_frames]
    if not lines:
        raise TrainingError(
            f"no track of the training list has {n_frames} frames (train.block and what model.context reaches back, stretched); "
            "list longer ones or lower train.block"
        )
    return lines


def _common_length(line):
    return min(track.n_frames for track in line)
