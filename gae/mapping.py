"""Frames to features: the network's mapping in NumPy, block by block, the same to the bit on any number of cores."""

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache

import numpy as np
from threadpoolctl import ThreadpoolController

from gae.cqt import transpose
from gae.errors import FormatError
from gae.modelfile import Model

_BLOCK = 4096  # frames mapped at a time


def extract_frames(frames, model):
    """Features of a recording's frames.

    Parameters
    ----------
    frames : ndarray of float32, shape (n_frames, n_bins)
        Standardised frames, made as the model asks.
    model : gae.modelfile.Model or gae.model.GatedAutoencoder

    Returns
    -------
    ndarray of float32, shape (n_frames, n_maps)

    Raises
    ------
    FormatError
        If the frames are of another shape than the model takes.
    """
    n_bins = model.cqt.n_bins if isinstance(model, Model) else model.n_bins
    if np.ndim(frames) != 2 or np.shape(frames)[1] != n_bins:
        raise FormatError(f"frames: of shape {np.shape(frames)}; this model takes (n_frames, {n_bins}), as gae.cqt.frames makes them")
    return np.concatenate([np.zeros((0, model.sizes.n_maps), np.float32), *extract_blocks([frames], model)])


def extract_blocks(blocks, model):
    """Features of a recording whose frames arrive block by block, in constant memory.

    The frames are mapped over a fixed grid by one thread, so the result is the same, bit for bit, however they arrive and
    however many cores there are (but while another thread holds a limit of threadpoolctl's, which then nobody else can change).

    Parameters
    ----------
    blocks : iterable of ndarray of float32, shape (n, n_bins)
        Successive standardised frames; n may vary.
    model : gae.modelfile.Model or gae.model.GatedAutoencoder

    Yields
    ------
    ndarray of float32, shape (n, n_maps)
        Successive features, as many as frames. Before the first frame stand copies of it.
    """
    mapping = _remembered(model) if isinstance(model, Model) else _mapping(model)  # a network may learn meanwhile
    reach, joined = model.sizes.reach, None
    for frames in _regrid(blocks, _BLOCK):
        joined = with_past(frames, reach) if joined is None else np.concatenate([joined[-reach:], frames], dtype=np.float32)
        with _one_thread():
            values = mapping(joined)
        yield values


def with_past(frames, reach):
    """Frames, float32 (n_frames, n_bins), after the past that a context of the first asks for, copies of it: (reach + n_frames, n_bins)."""
    return np.concatenate([np.repeat(frames[:1], reach, axis=0), frames], dtype=np.float32)


def _mapping(model):
    """The function from frames (reach + n, n_bins) to features (n, n_maps): `GatedAutoencoder.mapping` in NumPy."""
    weights, sizes = model.weights, model.sizes
    n_bins, readings = weights["filters_y"].shape[1], sizes.readings
    # frames moved one way meet a filter as frames that stay meet it moved the other way
    moved_x = [transpose(weights["filters_x"].reshape(-1, n_bins), -bins) for bins, _ in readings]
    filters_x = np.concatenate([_filters_at(lags, filters, sizes) for (_, lags), filters in zip(readings, moved_x, strict=True)])
    factors_x = _correlation(filters_x)
    filters_y = np.concatenate([transpose(weights["filters_y"], -bins) for bins, _ in readings]).T
    filters_y *= np.float32(sizes.input_scale**2)  # both inputs are scaled, and multiplied
    map_1, bias_1 = weights["map_1.weight"].T, weights["map_1.bias"]
    map_2, bias_2 = weights["map_2.weight"].T, weights["map_2.bias"]

    def mapping(frames):
        factors = factors_x(frames[:-1])
        factors *= frames[sizes.reach :] @ filters_y
        mappings = np.tanh(np.tanh(factors.reshape(-1, sizes.n_factors) @ map_1 + bias_1) @ map_2 + bias_2)
        return mappings.reshape(len(factors), len(readings), -1).mean(axis=1)

    return mapping


def _filters_at(lags, filters, sizes):
    """Filters (n_factors * context, n_bins) whose frames lie `lags` before y: (n_factors, reach, n_bins)."""
    placed = np.zeros((sizes.n_factors, sizes.reach, filters.shape[1]), np.float32)
    for lag, part in zip(lags, filters.reshape(sizes.n_factors, sizes.context, -1).swapaxes(0, 1), strict=True):
        placed[:, sizes.reach - lag] += part  # read faster, two frames of a context may be one
    return placed


_remembered = lru_cache(maxsize=1)(_mapping)


def _correlation(filters):
    """The function that correlates frames (n + length - 1, n_bins) with filters (n_filters, length, n_bins): (n, n_filters).

    In the frequency domain, over windows that overlap by what wraps around (overlap-save): far less work than the
    product with every context written out.
    """
    n_filters, length, n_bins = filters.shape
    size = 1 << max(7, (2 * length).bit_length())
    hop = size - length + 1
    spectra = np.ascontiguousarray(np.fft.rfft(filters[:, ::-1], size, axis=1).transpose(1, 2, 0))

    def correlation(frames):
        n_frames = len(frames) - length + 1
        n_windows = -(-n_frames // hop)
        padded = np.zeros((n_windows * hop + length - 1, n_bins), np.float32)
        padded[: len(frames)] = frames
        windows = np.lib.stride_tricks.sliding_window_view(padded, size, axis=0)[::hop]
        products = np.fft.rfft(windows.transpose(2, 0, 1), axis=0) @ spectra
        sums = np.fft.irfft(products, size, axis=0)[length - 1 :]
        return sums.transpose(1, 0, 2).reshape(-1, n_filters)[:n_frames]

    return correlation


@contextmanager
def _one_thread():
    """Matrix products by one thread."""
    # where the caller has set a limit of its own, the calling thread alone can change it
    with _limit_of_all, _matrix_libraries().limit(limits=1):
        yield


class _LimitOfAll:
    """One thread while anyone is inside: the limit is the whole process's, and its threads share it.

    Only the thread that set a limit can lift it (threadpoolctl, for OpenBLAS). So a thread of its own does both, whoever comes
    first and leaves last.
    """

    def __init__(self):
        self._lock, self._inside = threading.Lock(), 0

    def __enter__(self):
        with self._lock:
            if not self._inside:
                self._keeper = ThreadPoolExecutor(1)
                self._limit = self._keeper.submit(_matrix_libraries().limit, limits=1).result()
            self._inside += 1

    def __exit__(self, *error):
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._keeper.submit(self._limit.restore_original_limits).result()
                self._keeper.shutdown()


_limit_of_all = _LimitOfAll()


@lru_cache(maxsize=1)
def _matrix_libraries():
    return ThreadpoolController().select(user_api="blas")


def _regrid(blocks, size):
    """The rows of successive blocks, `size` at a time; fewer at the end."""
    held = None
    for block in blocks:
        held = block if held is None else np.concatenate([held, block])
        whole = len(held) - len(held) % size
        for start in range(0, whole, size):
            yield held[start : start + size]
        held = held[whole:]
    if held is not None and len(held):
        yield held
