"""Samples to frames: constant-Q magnitudes, compressed and standardised. Knows nothing of files.

The transform runs over a fixed grid of overlapping pieces, so that a recording of any length takes the same memory and
a frame's value never depends on how the samples arrived.
"""

import tempfile
import warnings
from contextlib import contextmanager
from dataclasses import dataclass

import librosa
import numpy as np

from gae.errors import AudioError, in_temporary

_PIECE = 16384  # frames transformed at a time, at most
_HELD = 1 << 24  # of their samples, or numbers of their longest spectra, unless margins would take more than they
_DUST = 1e-6  # of the largest magnitude: a frame without more holds rounding errors that sound before or after it left
_LARGEST = 1e30  # of samples: sums of larger ones overflow
_ALIGN = 64  # pieces overlap by a multiple of this, so that every octave's decimation starts on the same samples


@dataclass(frozen=True)
class Analysis:
    """The frames of one recording: how many, the largest magnitude, and `blocks()`, which gives them piece by piece."""

    n_frames: int
    peak: float
    blocks: object


def frames(samples, cqt):
    """Standardised constant-Q frames of a recording.

    Parameters
    ----------
    samples : ndarray of float32, shape (n_samples,)
        Mono, at `cqt.sample_rate`. Other real types will do, as scale makes no difference, but for `compression: none` below 1e-8.
    cqt : gae.params.Cqt

    Returns
    -------
    ndarray of float32, shape (1 + n_samples // cqt.hop_length, cqt.n_bins)
        Frame t is centred at t * hop_length / sample_rate s and has zero mean and unit L2 norm; a silent one is zero. No samples
        give no frames.

    Raises
    ------
    AudioError
        If the samples have more than one axis, or are NaN, infinite, 1e30 or more, or no real numbers.
    """
    samples = np.asarray(samples)
    if samples.ndim != 1:
        raise AudioError(f"samples: of shape {samples.shape}, not mono; gae.audio.mono mixes (n, channels) down")
    if samples.dtype.kind not in "iuf" or not (np.abs(samples := single(samples)) < _LARGEST).all():  # NaN compares as false
        raise AudioError(f"samples: of type {samples.dtype}, NaN, infinite or too large; give finite real numbers")
    with analyse([samples], cqt) as analysis:
        return np.concatenate([np.zeros((0, cqt.n_bins), np.float32), *analysis.blocks()])


def single(samples):
    """Samples of any real type as float32, their silence at 0: that of unsigned integers lies in the middle of their range."""
    if samples.dtype.kind == "u":
        samples = samples.astype(np.float64) - (1 << 8 * samples.dtype.itemsize - 1)
    with np.errstate(over="ignore"):  # what becomes infinite is refused
        return samples.astype(np.float32, copy=False)


@contextmanager
def analyse(sample_blocks, cqt):
    """Transform a recording that arrives in pieces.

    Compression needs the largest magnitude of the whole, so the magnitudes wait in an unnamed temporary file: memory
    stays the same for a song and for a day.

    Parameters
    ----------
    sample_blocks : iterable of ndarray of float32, shape (n,)
        Successive mono samples at `cqt.sample_rate`.
    cqt : gae.params.Cqt

    Yields
    ------
    Analysis
        Valid inside the ``with`` block only.
    """
    with tempfile.TemporaryFile(buffering=0) as spool:  # what a buffer holds back fails when it is too late to say where
        n_frames, peak = 0, 0.0
        for piece in magnitude_blocks(sample_blocks, cqt):
            _spool(piece, spool)
            n_frames += len(piece)
            peak = max(peak, float(piece.max(initial=0.0)))

        def blocks():
            spool.seek(0)
            for start in range(0, n_frames, _PIECE):
                count = min(_PIECE, n_frames - start) * cqt.n_bins
                piece = np.fromfile(spool, dtype=np.float32, count=count).reshape(-1, cqt.n_bins)
                yield standardise(compress(silence(piece, peak), peak, cqt))

        yield Analysis(n_frames, peak, blocks)


def _spool(piece, file):
    rest = memoryview(piece.tobytes())
    try:
        while rest:
            rest = rest[file.write(rest) :]
    except OSError as error:  # a file without a name
        raise in_temporary(error) from None


def magnitude_blocks(sample_blocks, cqt):
    """Constant-Q magnitudes, piece by piece.

    Yields
    ------
    ndarray of float32, shape (n, cqt.n_bins)
        Successive magnitudes, 1 + n_samples // hop_length in all.
    """
    hop, margin, length = cqt.hop_length, _margin(cqt) * cqt.hop_length, _piece_length(cqt)

    def span(first):
        """Where the samples begin and end that the piece from frame `first` on needs."""
        return max(0, first * hop - margin), (first + length) * hop + margin

    held, start, end, first = [], 0, 0, 0  # samples `start` to `end` are held; `first` is the next frame
    for block in sample_blocks:
        held.append(block)
        end += len(block)
        while end >= span(first)[1]:
            samples = held[0] if len(held) == 1 else np.concatenate(held)
            yield _transform(samples[: span(first)[1] - start], start, first, length, cqt)
            first += length
            held, start = [samples[span(first)[0] - start :]], span(first)[0]
    n_frames = 1 + end // hop if end else 0
    samples = np.concatenate(held) if first < n_frames else None
    for frame in range(first, n_frames, length):  # what is left may be up to a margin longer than one piece
        begin, until = span(frame)
        yield _transform(samples[begin - start : until - start], begin, frame, min(length, n_frames - frame), cqt)


def compress(magnitudes, peak, cqt):
    """log(1 + gain c / peak) of magnitudes (n_frames, n_bins), or the magnitudes as they are."""
    if cqt.compression == "none" or peak <= 0:
        return magnitudes
    return np.log1p(np.float32(cqt.gain) * (magnitudes / np.float32(peak)))


def standardise(frames):
    """Each frame (row of (n_frames, n_bins)) to zero mean and unit L2 norm; a constant frame becomes zero.

    The "contrast normalisation" of Lattner, Grachten and Widmer (ISMIR 2018).
    """
    mean = frames.mean(axis=1, keepdims=True)
    centred = frames - mean
    norm = np.linalg.norm(centred, axis=1, keepdims=True)
    rounding = 1e-6 * np.sqrt(frames.shape[1]) * np.abs(mean)  # what the mean's leaves of a constant frame is less
    flat = norm < np.maximum(1e-8, rounding)
    centred[flat[:, 0]] = 0
    return centred / np.where(flat, 1, norm)


def transpose(frames, shift, out=None):
    """Move frames (n, n_bins) up by `shift` bins (down where negative); what comes in is zero, or as it was in `out`."""
    moved = np.zeros_like(frames) if out is None else out
    n_bins = frames.shape[1]
    if abs(shift) < n_bins:
        moved[:, max(0, shift) : n_bins + min(0, shift)] = frames[:, max(0, -shift) : n_bins - max(0, shift)]
    return moved


def frame_times(n_frames, cqt):
    """Centres of the first `n_frames` frames in s: float64, shape (n_frames,)."""
    return np.arange(n_frames) * cqt.frame_seconds


def silence(magnitudes, peak):
    """Magnitudes (n_frames, n_bins), those of frames that hold nothing but dust beside the recording's `peak` at zero.

    Standardising would blow it up.
    """
    return np.where(magnitudes.max(axis=1, keepdims=True) > _DUST * peak, magnitudes, np.float32(0))


def _piece_length(cqt):
    """Frames transformed at a time: so many as memory holds, and not so few that most of the work is for their overlap.

    librosa halves the rate from octave to octave as long as the hop is even. Where that ends early, spectra of low octaves are long.
    """
    octaves = -(-cqt.n_bins // cqt.bins_per_octave)
    halvings = min(octaves - 1, (cqt.hop_length & -cqt.hop_length).bit_length() - 1)
    each = max(cqt.hop_length, cqt.longest_filter / 2**halvings)
    return min(_PIECE, max(_ALIGN * int(_HELD / each / _ALIGN), 2 * _margin(cqt)))


def _margin(cqt):
    """Frames of overlap: the longest filter on either side, and as much again for the decimators' tails."""
    return _ALIGN * int(np.ceil(cqt.longest_filter / cqt.hop_length / _ALIGN))


def _transform(samples, start, first, count, cqt):
    """Magnitudes of `count` frames from frame `first` on, of samples that begin at sample `start`."""
    shortest = _margin(cqt) * cqt.hop_length  # librosa refuses less
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "n_fft=.* is too large")  # beside what decimation leaves of so little, which is harmless
        transform = librosa.cqt(
            np.pad(samples, (0, max(0, shortest - len(samples)))),
            sr=cqt.sample_rate,
            hop_length=cqt.hop_length,
            fmin=cqt.fmin,
            n_bins=cqt.n_bins,
            bins_per_octave=cqt.bins_per_octave,
        )
    skip = first - start // cqt.hop_length
    return np.ascontiguousarray(np.abs(transform).T[skip : skip + count], dtype=np.float32)
