"""Small models, frames and sounds made on the fly."""

import hashlib
import shutil
from pathlib import Path

import numpy as np

from gae import shards
from gae.cqt import standardise
from gae.modelfile import Model
from gae.params import Cqt
from gae.params import Model as Sizes

CQT = Cqt(sample_rate=8000, hop_length=256, fmin=110.0, n_bins=36, bins_per_octave=12)
SIZES = Sizes(n_factors=24, n_hidden=10, n_maps=7, context=5, dilation=2, growth=0, input_scale=3.0, transposed=0, stretched=0)


def model(seed=0, cqt=CQT, sizes=SIZES):
    """A model with random weights."""
    rng = np.random.default_rng(seed)
    shapes = {
        "filters_x": (sizes.n_factors, sizes.context * cqt.n_bins),
        "filters_y": (sizes.n_factors, cqt.n_bins),
        "map_1.weight": (sizes.n_hidden, sizes.n_factors),
        "map_1.bias": (sizes.n_hidden,),
        "map_2.weight": (sizes.n_maps, sizes.n_hidden),
        "map_2.bias": (sizes.n_maps,),
    }
    return Model({name: rng.standard_normal(shape).astype(np.float32) / 3 for name, shape in shapes.items()}, sizes, cqt, {}, "a" * 64)


def frames(n_frames, seed=0, n_bins=CQT.n_bins):
    """Standardised random frames."""
    return standardise(np.random.default_rng(seed).standard_normal((n_frames, n_bins)).astype(np.float32))


def tone(seconds, sample_rate, frequency=440.0):
    """A decaying tone that starts again every half second: float32 (n,)."""
    times = np.arange(round(seconds * sample_rate)) / sample_rate
    return (0.4 * np.sin(2 * np.pi * frequency * times) * np.exp(-3 * (times % 0.5))).astype(np.float32)


def music(n_frames, seed=0, n_bins=CQT.n_bins):
    """Frames of tunes in two voices: notes of a few partials that last some frames."""
    rng = np.random.default_rng(seed)
    magnitudes = np.zeros((n_frames, n_bins), np.float32)
    for _ in range(2):
        start = 0
        while start < n_frames:
            length, note = rng.integers(3, 9), rng.integers(n_bins - 12)
            fading = np.exp(-0.2 * np.arange(length))[: n_frames - start]
            for partial, strength in ((0, 1.0), (12, 0.5), (19, 0.3)):
                if note + partial < n_bins:
                    magnitudes[start : start + length, note + partial] += strength * fading
            start += length
    return standardise(magnitudes + 0.01 * rng.random((n_frames, n_bins), dtype=np.float32))


def write_shards(folder, lines, cqt=CQT, dtype="float32", shard_bytes=1 << 30, code=""):
    """A folder of shards from lines of views, each an array of frames; returns the keys, line by line."""
    keyed = [[(hashlib.sha256(frames.tobytes()).hexdigest()[:32], frames) for frames in line] for line in lines]
    place = folder.with_name(folder.name + "-staging")
    sources = {}
    for key, frames in {key: frames for line in keyed for key, frames in line}.items():
        file = place / f"{key}.h5"
        with shards.writing(file, cqt) as shard:
            facts = {"path": f"{key[:6]}.wav", "duration": len(frames) * cqt.frame_seconds, "peak": 1.0, "code": code}
            shards.add_track(shard, key, [frames[:100], frames[100:]], cqt.n_bins, dtype, **facts)
        sources |= shards.read_shard(file)[1]
    names = [[(key, f"{key[:6]}.wav") for key, _ in line] for line in keyed]
    shards.write_folder(folder, names, sources, cqt, shard_bytes)
    shutil.rmtree(place)
    return [[key for key, _ in line] for line in keyed]


def map_here(function, items, compute, label, arguments=(), told=lambda item, report: None):
    """`gae.compute.map_tracks` in this process, in order."""
    reports = []
    for item in items:
        reports.append(function(item, *arguments))
        told(item, reports[-1])
    return reports


def content(folder):
    """What is in the files below a folder, by name."""
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in Path(folder).rglob("*") if file.is_file()}
