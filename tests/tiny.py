"""Small models, frames and sounds made on the fly."""

import numpy as np

from gae.cqt import standardise
from gae.modelfile import Model
from gae.params import Cqt
from gae.params import Model as Sizes

CQT = Cqt(sample_rate=8000, hop_length=256, fmin=110.0, n_bins=36, bins_per_octave=12)
SIZES = Sizes(n_factors=24, n_hidden=10, n_maps=7, context=5, input_scale=3.0)


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
