"""Transposition-invariant interval features from audio, learned by a gated autoencoder.

>>> import gae
>>> model = gae.load_model()                                  # shipped weights, or a path
>>> features = gae.extract(samples, sample_rate, model)       # samples (n,) or (n, channels)
>>> features.values.shape, features.times[:2]
((1477, 128), array([0.        , 0.02031746]))
>>> features = gae.read_features("features/song.h5")
"""

from gae.convert import extract
from gae.errors import AudioError, FormatError, GaeError, StorageError
from gae.features import Features
from gae.features import read as read_features
from gae.modelfile import Model, load_model

__all__ = ["AudioError", "Features", "FormatError", "GaeError", "Model", "StorageError", "extract", "load_model", "read_features"]
__version__ = "0.1.0"
