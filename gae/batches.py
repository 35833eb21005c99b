"""What training sees: random excerpts from the shards, transposed, in pairs.

Every draw of a step follows from the seed and the number of the step alone. Training can stop and go on anywhere, and any
number of processes together see what one alone would see.
"""

from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from gae.cqt import transpose
from gae.errors import TrainingError

_CHUNK = 256  # frames read at a time, as they are stored
_CACHE_BYTES = 400 << 20  # of frames kept in memory, whatever the size of the corpus


class Batch(NamedTuple):
    """Two sides of the same excerpts, each a context and the frames to set against it.

    Attributes
    ----------
    x1, x2 : ndarray of float32, shape (n_excerpts, block + context - 1, n_bins)
        Context with dropout.
    y1, y2 : ndarray of float32, shape (n_excerpts, ceil(block / stride), n_bins)
        Every `stride`-th frame of the block: y[i] goes with x[i * stride : i * stride + context].
    """

    x1: np.ndarray
    y1: np.ndarray
    x2: np.ndarray
    y2: np.ndarray


class Excerpts:
    """Batches of random excerpts.

    Parameters
    ----------
    shards : gae.shards.Shards
    lines : list of list of Track
        Those to draw from, each with its views, and `long_enough`.
    context : int
        Frames of context.
    train : gae.params.Train
    rank, world : int
        This process takes every `world`-th excerpt of each batch, from `rank` on.
    """

    def __init__(self, shards, lines, context, train, rank=0, world=1):
        self.shards, self.context, self.train = shards, context, train
        self.length = context + train.block
        self.lines = lines
        if train.batch % world:
            raise TrainingError(f"train.batch ({train.batch}) must be a multiple of the number of processes ({world})")
        self.own = range(rank, train.batch, world)
        self._until = np.cumsum([_common_length(line) for line in self.lines])
        n_chunks = max(16, _CACHE_BYTES // (_CHUNK * shards.cqt.n_bins * 4))
        self._chunk = lru_cache(n_chunks)(self._read_chunk)

    def batches(self, first, last):
        """Yield the `Batch` of each of the steps `first` to `last` (excluded), each prepared while its predecessor is used."""
        with ThreadPoolExecutor(1) as ahead:
            following = ahead.submit(self.batch, first) if first < last else None
            for step in range(first, last):
                batch = following.result()
                following = ahead.submit(self.batch, step + 1) if step + 1 < last else None
                yield batch

    def batch(self, step):
        """The `Batch` of a step, this process's share of it."""
        # numbers from train.batch on are no excerpt's: what is drawn for all must not depend on one
        common = np.random.default_rng([self.train.seed, step, self.train.batch])
        shift = int(common.integers(-self.train.shift, self.train.shift + 1))
        pairs = [self._pair(np.random.default_rng([self.train.seed, step, n]), shift) for n in self.own]
        return Batch(*(np.stack(arrays) for arrays in zip(*pairs, strict=True)))

    def _pair(self, rng, common_shift):
        """x1, y1, x2, y2 of one excerpt."""
        train = self.train
        line = self.lines[int(np.searchsorted(self._until, rng.integers(self._until[-1]), side="right"))]
        start = int(rng.integers(_common_length(line) - self.length + 1))
        view_1 = view_2 = int(rng.integers(len(line)))
        if train.objective == "reconstruction":
            shift_1, shift_2 = 0, common_shift
        else:
            shift_1, shift_2 = rng.integers(-train.shift, train.shift + 1, size=2)
            if len(line) > 1 and rng.random() < train.view_share:
                view_2 = (view_1 + int(rng.integers(1, len(line)))) % len(line)
        mask_1 = self._mask(rng)
        # the original transposes what was dropped along with the rest
        mask_2 = transpose(mask_1, shift_2) if train.objective == "reconstruction" else self._mask(rng)
        side_1 = transpose(self._frames(line[view_1], start), int(shift_1))
        side_2 = transpose(self._frames(line[view_2], start), int(shift_2))
        return *self._split(side_1, mask_1), *self._split(side_2, mask_2)

    def _split(self, frames, mask):
        return frames[:-1] * mask if self.train.dropout else frames[:-1], frames[self.context :: self.train.stride]

    def _mask(self, rng):
        """Inverted dropout: zeros, and 1 / (1 - dropout) elsewhere."""
        if not self.train.dropout:
            return np.ones((1, self.shards.cqt.n_bins), np.float32)
        shape = (self.length - 1, self.shards.cqt.n_bins)
        kept = rng.random(shape, dtype=np.float32) >= self.train.dropout
        return kept * np.float32(1 / (1 - self.train.dropout))

    def _frames(self, track, start):
        first, last = start // _CHUNK, (start + self.length - 1) // _CHUNK
        chunks = [self._chunk(track.key, number) for number in range(first, last + 1)]
        frames = np.concatenate(chunks) if len(chunks) > 1 else chunks[0]
        return frames[start - first * _CHUNK :][: self.length]

    def _read_chunk(self, key, number):
        return self.shards.read(key, number * _CHUNK, (number + 1) * _CHUNK)


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
            f"no track of the training list has {n_frames} frames (train.block + model.context); list longer ones or lower train.block"
        )
    return lines


def _common_length(line):
    return min(track.n_frames for track in line)
