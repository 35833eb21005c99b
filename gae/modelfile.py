"""The model file: write and read, as plain arrays without PyTorch. Importing that takes longer than converting a song.

A model file (.safetensors) is enough to go from audio to features. Reading executes nothing.
"""

import json
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import MappingProxyType

import numpy as np
import safetensors
from safetensors.numpy import load_file, save

from gae import params
from gae.errors import FormatError, reason
from gae.files import content_hash, replacing

SCHEMA = 1
_LARGEST = 1e6  # of weights: by products of smaller ones and the largest sizes that params.yaml may have no feature becomes infinite or NaN
_UNSAID = {"dilation": 1, "growth": 0, "transposed": 0, "stretched": 0}  # by files from before these sizes could be chosen
SHIPPED = ("pretrained", "pretrained-fast")  # names of weights that are shipped; models/pretrained.md


@dataclass(frozen=True, eq=False)
class Model:
    """A trained model, and how the frames that it takes are made.

    Attributes
    ----------
    weights : mapping of str to ndarray of float32
        By name, as in `gae.model.GatedAutoencoder`. Read-only: ``dataclasses.replace(model, sha256="",
        weights={**model.weights, ...})`` makes another model.
    sizes : gae.params.Model
    cqt : gae.params.Cqt
    facts : dict
        What else the file says: training parameters, digest of the data, metrics.
    sha256 : str
        Hash of the file, 64 hexadecimal digits; empty where the weights come from no file.
    """

    weights: Mapping[str, np.ndarray]
    sizes: params.Model
    cqt: params.Cqt
    facts: dict = field(default_factory=dict)
    sha256: str = ""

    def __repr__(self):
        frames = f"{self.sizes.context} of the last {self.sizes.lags[0]} frames, one every {1000 * self.cqt.frame_seconds:.1f} ms"
        return f"<Model: {self.sizes.n_maps} features from {frames}{self.sha256 and f', sha256 {self.sha256[:12]}'}>"

    def __post_init__(self):
        weights = {name: np.array(array) for name, array in self.weights.items()}  # the caller's own may change
        for array in weights.values():
            array.setflags(write=False)  # what is derived from them is remembered
        object.__setattr__(self, "weights", MappingProxyType(weights))

    def __reduce__(self):  # copies are as fixed as this
        return Model, (dict(self.weights), self.sizes, self.cqt, self.facts, self.sha256)

    @cached_property
    def network(self):
        """A `gae.model.GatedAutoencoder` with a copy of these weights, in evaluation mode: for training, reconstruction or a GPU."""
        import torch

        from gae.model import GatedAutoencoder

        network = GatedAutoencoder(self.cqt.n_bins, self.sizes)
        network.load_state_dict({name: torch.from_numpy(array.copy()) for name, array in self.weights.items()})
        return network.eval()


def load_model(path: str | Path | None = None) -> Model:
    """Read a model file.

    Parameters
    ----------
    path : str or Path, optional
        A .safetensors file that `gae` wrote, or the name of weights that are shipped: "pretrained", the default, or
        "pretrained-fast", with half as many frames.

    Returns
    -------
    Model

    Raises
    ------
    FormatError
        If it is missing, damaged, no model of ours, or of another version.
    """
    if not (path is None or isinstance(path, Path) or (isinstance(path, str) and path)):
        raise FormatError(f"model: got {reprlib.repr(path)}; give a path, {' or '.join(SHIPPED)}, or what gae.load_model gives")
    name = SHIPPED[0] if path is None else str(path)
    path = _shipped(name) if name in SHIPPED else Path(name)
    facts, weights = _read(path)
    try:
        model = Model(
            weights={name: _single(name, array) for name, array in weights.items()},
            sizes=_whole(params.Model, _UNSAID | facts["model"]),
            cqt=_whole(params.Cqt, facts["cqt"]),
            facts=facts,
            sha256=content_hash(path),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError(f"{path}: not a whole model ({reason(error)[:200]}); train again or name another") from None
    if (problem := problem_of(model)) is not None:
        raise FormatError(f"{path}: {problem}; train again or name another")
    return model


def save_model(path, model, cqt, dtype="float32", **facts):
    """Write a model file: weights, and all that is needed to go from audio to features.

    Parameters
    ----------
    path : str or Path
    model : gae.model.GatedAutoencoder or Model
    cqt : gae.params.Cqt
        How its frames are made.
    dtype : {"float32", "float16"}
        Type in which the weights are stored.
    **facts
        JSON-able values to keep with it: training parameters, digest of the data, metrics.
    """
    facts = {"schema": SCHEMA, "model": model.sizes.model_dump(), "cqt": cqt.model_dump(), **facts}
    # under one key: safetensors writes several in random order, and equal models must be equal files
    metadata = {"gae": json.dumps(facts, sort_keys=True)}
    with np.errstate(over="ignore"):  # what becomes infinite is refused when it is read
        weights = {name: np.ascontiguousarray(array, dtype) for name, array in model.weights.items()}
    with replacing(path) as partial:
        partial.write_bytes(save(weights, metadata))


def problem_of(model):
    """What is wrong with a model's weights, in a few words, or None."""
    shapes = {name: array.shape for name, array in model.weights.items()}
    if shapes != _shapes(model.sizes, model.cqt.n_bins):
        return "weights and sizes don't fit"
    if not all((np.abs(array) < _LARGEST).all() for array in model.weights.values()):  # NaN compares as false
        return f"holds weights that are NaN or infinite, or beyond {_LARGEST:g}"
    return None


def _whole(section, values):
    """A section of the parameters of which every key is given: a default of today's is not what a model was trained with."""
    values = dict(values)
    if missing := section.model_fields.keys() - values.keys():
        raise ValueError(f"{', '.join(sorted(missing))} is missing")
    if unknown := values.keys() - section.model_fields.keys():  # each would be a complaint of its own
        raise ValueError(f"{min(unknown):.60} is unknown" + (f", as are {len(unknown) - 1} more" if len(unknown) > 1 else ""))
    return section.model_validate(values)


def _single(name, array):
    if array.dtype.name not in ("float16", "float32", "float64"):
        raise ValueError(f"{name} is of type {array.dtype}")
    with np.errstate(over="ignore"):  # what becomes infinite is refused
        return array.astype(np.float32)


def _shipped(name):
    """Where shipped weights lie: inside an installed package, or beside it in a checkout."""
    package = Path(__file__).parent
    places = [folder / "models" / f"{name}.safetensors" for folder in (package, package.parent)]
    for place in places:
        if place.is_file():
            return place
    raise FormatError(f"{places[-1]}: not shipped with this copy; name a model file, such as models/gae.safetensors")


def _read(path):
    """The metadata and the tensors of a model file."""
    try:
        with open(path, "rb"):  # safetensors takes what it may not open for missing
            pass
        with safetensors.safe_open(path, "np") as file:
            facts = json.loads((file.metadata() or {}).get("gae", "{}"))
        weights = load_file(path)
    except FileNotFoundError:
        raise FormatError(f"{path}: no such model; name {' or '.join(SHIPPED)}, or train or pull it by DVC") from None
    except OSError as error:
        raise FormatError(f"{path}: cannot be read ({error.strerror or reason(error)}); check the path and its permissions") from None
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise FormatError(f"{path}: not a model file ({reason(error)}); run `dvc repro train` or `dvc pull`") from None
    schema = facts.get("schema") if isinstance(facts, dict) else None
    if schema != SCHEMA:
        raise FormatError(f"{path}: model schema {schema!r}, expected {SCHEMA}; train again, or use the version of gae that wrote it")
    return facts, weights


def _shapes(sizes, n_bins):
    """Shape of each weight: metadata alone must not make anyone take memory."""
    return {
        "filters_x": (sizes.n_factors, sizes.context * n_bins),
        "filters_y": (sizes.n_factors, n_bins),
        "map_1.weight": (sizes.n_hidden, sizes.n_factors),
        "map_1.bias": (sizes.n_hidden,),
        "map_2.weight": (sizes.n_maps, sizes.n_hidden),
        "map_2.bias": (sizes.n_maps,),
    }
