"""The schema of params.yaml: every key with its type, range, default, unit and meaning.

`load` validates the file as a whole, so that a mistake shows before any work is done.
"""

import math
import os
import re
import reprlib
from collections import Counter
from pathlib import Path
from typing import Literal, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from gae.errors import ParamsError, reason

_LONGEST = 1 << 20  # samples of the longest filter of a constant-Q transform
_FURTHEST = 500  # frames that a context may reach back: features are made with filters that hold as many
_MERGED = 1000  # keys that a section may have with those that it merges (<<: *other)


class _Short(reprlib.Repr):
    """Shows a value in a message: anything may be in the file."""

    def repr_int(self, number, level):
        return super().repr_int(number, level) if abs(number) < 1 << 1000 else f"an integer of {number.bit_length()} bits"


_SHORT = _Short()
_SHORT.maxlevel, _SHORT.maxstring = 2, 80


class Section(BaseModel):
    """A section of params.yaml: strict types, no unknown keys, immutable once read."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Corpus(Section):
    """The built-in demo music."""

    hours: float = Field(1.0, ge=0.001, le=100, description="music for training, in hours, each hour in every view")
    views: int = Field(3, ge=2, le=8, description="sounds in which a training piece is rendered; data/train.txt names three")
    view_transposition: int = Field(6, ge=0, le=12, description="views but the first are transposed by up to this, in semitones")
    human: float = Field(
        0.6, ge=0, le=1, description="share of training pieces in human timing; same share of views in human loudness, with the pedal"
    )
    arranged: float = Field(
        0.7,
        ge=0,
        le=1,
        description="share of training pieces arranged, as their range allows: outer parts in octaves or further out, another register",
    )
    heldout: int = Field(12, ge=2, le=200, description="pieces held out for evaluation")
    seed: int = Field(1, ge=0, lt=2**32, description="seed of the choice of pieces, arrangements, performances, sounds and transpositions")


class Data(Section):
    """Which files, and how their frames are kept."""

    train_list: str = Field("data/train.txt", min_length=1, description="text file that lists the audio to train on")
    convert_list: str = Field("data/convert.txt", min_length=1, description="text file that lists the audio to convert")
    shifted_views: int = Field(
        1, ge=0, le=12, description="pitch-shifted views made of a track that is listed without views, by 1 to 6 semitones"
    )
    on_error: Literal["skip", "stop"] = Field("skip", description="what an unusable audio file does to the run")
    dtype: Literal["float16", "float32"] = Field("float16", description="type in which frames are stored")
    shard_mb: int = Field(256, ge=1, le=65536, description="largest size of a shard, about, in MB")


class Cqt(Section):
    """Audio to constant-Q frames."""

    sample_rate: int = Field(22050, ge=1000, le=192000, description="rate to which audio is resampled, in Hz")
    hop_length: int = Field(448, ge=16, le=65536, description="time between frames, in samples")
    fmin: float = Field(32.7, ge=1, description="frequency of the lowest bin, in Hz")
    n_bins: int = Field(144, ge=2, le=2000, description="number of bins")
    bins_per_octave: int = Field(24, ge=1, le=240, description="bins an octave")
    compression: Literal["log", "none"] = Field("log", description="of the magnitudes c: log(1 + gain c / max c), or none")
    gain: float = Field(1000.0, ge=0.01, le=1e6, description="gain of the logarithm, relative to the track's largest magnitude")

    @property
    def frame_seconds(self):
        """Time between frames, in seconds."""
        return self.hop_length / self.sample_rate

    def bins(self, semitones):
        """An interval in bins, to the nearest."""
        return round(semitones * self.bins_per_octave / 12)

    @property
    def longest_filter(self):
        """Length of the lowest bin's filter, in samples."""
        return self.sample_rate / self.fmin / (2 ** (1 / self.bins_per_octave) - 1)

    @model_validator(mode="after")
    def _below_nyquist(self):
        top = self.fmin * 2 ** min(64, self.n_bins / self.bins_per_octave)
        if top >= self.sample_rate / 2:
            raise ValueError(
                f"cqt.fmin: {self.fmin:g} Hz with {self.n_bins} bins, {self.bins_per_octave} an octave, reaches {top:.0f} Hz; "
                f"allowed: below half of cqt.sample_rate, {self.sample_rate / 2:g} Hz"
            )
        return self

    @model_validator(mode="after")
    def _of_bounded_length(self):
        if self.longest_filter > _LONGEST:
            raise ValueError(
                f"cqt.fmin: {self.fmin:g} Hz with cqt.bins_per_octave {self.bins_per_octave} at cqt.sample_rate {self.sample_rate} takes "
                f"a filter of {self.longest_filter:.0f} samples; allowed: up to {_LONGEST}; raise the first or lower the others"
            )
        return self


class Model(Section):
    """Sizes of the gated autoencoder."""

    n_factors: int = Field(256, ge=1, le=16384, description="filter pairs whose products are the factors")
    n_hidden: int = Field(256, ge=1, le=16384, description="units of the lower mapping layer")
    n_maps: int = Field(64, ge=1, le=16384, description="units of the top mapping layer: the features")
    context: int = Field(21, ge=1, le=255, description="frames of context x before the frame y, odd; the original's is 9")
    dilation: int = Field(1, ge=1, le=64, description="frames from one frame of the context to the next, nearest to y; 1 is the original's")
    growth: float = Field(0.2, ge=0, le=16, description="frames by which each such gap is wider than the one after it; 0 is the original's")
    input_scale: float = Field(10.0, gt=0, le=1000, description="factor on the frames; 1 is the original's, 10 leaves the plateau early")
    transposed: int = Field(
        10, ge=0, le=1000, description="features are means over frames as they are and so many bins down and up; 0 is the original's"
    )
    stretched: float = Field(
        0.4,
        ge=0,
        le=1,
        description="share by which contexts are read faster where moved down and slower where moved up; 0 is the original's",
    )

    @model_validator(mode="after")
    def _odd_context(self):
        if self.context % 2 == 0:
            raise ValueError(f"model.context: got {self.context}, allowed: an odd integer (1, 3, 5, ...)")
        return self

    @model_validator(mode="after")
    def _bounded_reach(self):
        if self.reach > _FURTHEST:
            raise ValueError(
                f"model.context: {self.context} frames reach back {self.reach} with model.dilation {self.dilation}, "
                f"model.growth {self.growth:g} and model.stretched {self.stretched:g}, allowed: up to {_FURTHEST}"
            )
        return self

    @property
    def lags(self):
        """How many frames before y each frame of the context lies, the earliest first: list of int of length `context`, down to 1."""
        exact = (1 + self.dilation * i + self.growth * i * (i - 1) / 2 for i in reversed(range(self.context)))
        return [math.floor(lag + 0.5) for lag in exact]

    @property
    def readings(self):
        """For each of the mappings whose mean the features are: by how many bins the input is moved, and the lags of its context.

        A list of (int, list of int). A context that is read slower, as by who plays slower, reaches further back.
        """
        if not (self.transposed or self.stretched):
            return [(0, self.lags)]
        slower = 1 + self.stretched  # at most 2: a lag of 1 stays one
        moves = [(-self.transposed, 1 / slower), (0, 1), (self.transposed, slower)]
        return [(bins, [math.floor(tempo * lag + 0.5) for lag in self.lags]) for bins, tempo in moves]

    @property
    def reach(self):
        """How many frames before y the earliest of all readings' contexts lies."""
        return max(lags[0] for _, lags in self.readings)


class Train(Section):
    """How the model is trained."""

    objective: Literal["invariance", "reconstruction"] = Field(
        "invariance", description="reconstruction is the original's loss; invariance adds a contrast between transpositions and views"
    )
    steps: int = Field(8000, ge=1, le=10_000_000, description="optimiser steps")
    batch: int = Field(64, ge=1, le=65536, description="excerpts a step, over all devices")
    block: int = Field(64, ge=2, le=65536, description="frames that an excerpt spans; more than model.context reaches back")
    stride: int = Field(4, ge=1, le=1024, description="use every stride-th frame of an excerpt: neighbours teach little")
    optimiser: Literal["muon", "adam"] = Field("muon", description="of all but the biases, which take Adam; the original's is adam")
    learning_rate: float = Field(1.5e-3, gt=0, le=1, description="peak learning rate of Adam")
    muon_rate: float = Field(0.02, gt=0, le=1, description="peak learning rate of Muon")
    schedule: Literal["one-cycle", "constant"] = Field("one-cycle", description="course of the learning rate")
    warmup: float = Field(0.1, gt=0, lt=1, description="share of the steps in which the one-cycle rate rises")
    dropout: float = Field(0.0, ge=0, lt=1, description="share of the bins of x set to zero; the original's is 0.5")
    filter_norm: float = Field(0.4, gt=0, le=100, description="L2 norm to which each filter is scaled after each step")
    sparsity: float = Field(0.0, ge=0, description="strength of Lee's sparsity term; the original's is 1e-5, of blocks of 1,024 frames")
    weight_decay: float = Field(0.0, ge=0, description="strength of the squared L2 norm of the filters; the original's is 0")
    shift: int = Field(
        12, ge=0, le=1000, description="largest transposition of x and y, in bins (at most n_bins - 1); the original's is 60"
    )
    contrast: float = Field(0.016, ge=0, le=100, description="weight of the contrastive term (InfoNCE) of the invariance objective")
    contrast_kept: float = Field(1.0, gt=0, le=1, description="share of train.contrast left at the last step, falling geometrically")
    temperature: float = Field(0.05, ge=0.02, le=10, description="temperature of the contrastive term")
    contrast_frames: int = Field(
        1024, ge=2, le=1_000_000, description="frames contrasted with each other, about: from one of each excerpt to all of a step"
    )
    view_share: float = Field(0.5, ge=0, le=1, description="share of the excerpts whose positives come from another view")
    stretch: float = Field(0.25, ge=0, le=0.5, description="largest change of tempo of a context whose positives come from another view")
    equaliser: float = Field(
        0.0, ge=0, le=2, description="strength of random equalisers on both sides of such an excerpt: the standard deviation of ln(gain)"
    )
    validation: float = Field(0.1, ge=0, le=0.5, description="share of the list held out to select the weights by their invariance")
    patience: int = Field(0, ge=0, description="validations without a better result that end training; 0 does all steps")
    averaging: float = Field(0.999, ge=0, lt=1, description="decay of the moving average of the weights that is kept; 0 keeps the last")
    precision: Literal["auto", "bf16", "fp32"] = Field(
        "auto", description="arithmetic of matrix products; auto is bf16 where the processor multiplies it, else fp32, on GPUs TF32"
    )
    dtype: Literal["float16", "float32"] = Field("float16", description="type in which the weights are stored")
    compile: bool = Field(False, description="fuse the step's small operations by torch.compile: faster after about half a minute")
    accelerator: Literal["auto", "cpu", "cuda"] = Field("auto", description="where to train")
    devices: int = Field(1, ge=1, le=1024, description="processes or GPUs on each host")
    nodes: int = Field(1, ge=1, le=1024, description="hosts")
    seed: int = Field(1, ge=0, lt=2**32, description="seed of weights, excerpts, shifts and dropout")

    @model_validator(mode="after")
    def _batch_divides(self):
        if self.batch % (self.devices * self.nodes):
            raise ValueError(
                f"train.batch: got {self.batch}, allowed: a multiple of train.devices x train.nodes ({self.devices * self.nodes}), "
                "to give each process as many excerpts"
            )
        return self


class Convert(Section):
    """How features are computed."""

    weights: str = Field(
        "models/gae.safetensors",
        min_length=1,
        description="model file; models/pretrained.safetensors or, with cqt.hop_length 896, pretrained-fast.safetensors need no training",
    )
    dtype: Literal["float16", "float32"] = Field("float32", description="type in which features are stored")


class Evaluate(Section):
    """How features are judged on held-out tracks."""

    frames: int = Field(100, ge=1, le=100_000, description="random frames a track")
    stack: int = Field(8, ge=1, le=1000, description="successive frames in the stacked comparison")
    alignment_hop: float = Field(0.04, gt=0, le=1, description="time between the frames of an alignment, in s; a frame at least")
    shift: int = Field(12, ge=0, le=1000, description="largest transposition of frames that are rebuilt, in bins")
    bootstrap: int = Field(1000, ge=2, le=100_000, description="resamplings of the tracks for the errors of estimation")
    seed: int = Field(1, ge=0, lt=2**32, description="seed of the random frames and resamplings")
    baselines: bool = Field(True, description="judge chroma and CQT too; without them an experiment is judged sooner")


class Plot(Section):
    """What is drawn."""

    interval: int = Field(2000, ge=1, description="steps of training between two drawings of the network; of the next training")
    seconds: float = Field(20.0, gt=0, le=3600, description="length of the excerpts drawn, in s")
    filters: int = Field(48, ge=1, le=1024, description="filters drawn")
    dpi: int = Field(110, ge=30, le=600, description="resolution, in dots an inch")


class Compute(Section):
    """Where work over many tracks runs, and how often a training is saved. Changes no result, so no stage depends on it."""

    workers: int = Field(0, ge=0, le=4096, description="worker processes; 0 for one a core")
    scheduler: str = Field(
        "local", pattern=r"^(local|(tcp|tls)://.+:[0-9]+)$", description="local, or the address of a Dask scheduler: tcp://host:port"
    )
    cluster: Literal["none", "local", "slurm"] = Field("none", description="Dask cluster to start where scheduler is local")
    staging: str = Field(
        "data/.staging",
        min_length=1,
        description="where computed frames wait for their shard: a folder, or a URL (s3://bucket/staging) if workers see no files of ours",
    )

    @field_validator("staging")
    @classmethod
    def _at_home(cls, staging):
        if "\0" in staging or re.fullmatch(r"[a-z0-9]+:/*", staging):
            raise ValueError("compute.staging: names no folder; write a path, or a URL with its bucket: s3://bucket/staging")
        if "://" in staging and re.search(r"[*?[]", staging):
            raise ValueError("compute.staging: *, ? and [ in a URL are wildcards to its storage; name another folder")
        return os.path.expanduser(staging)

    checkpoint_seconds: float = Field(
        30.0, ge=0, le=60, description="time between checkpoints of a training, in s: at most this much work is lost, and 25 steps more"
    )


class Params(Section):
    """The whole of params.yaml."""

    corpus: Corpus = Field(default_factory=Corpus)
    data: Data = Field(default_factory=Data)
    cqt: Cqt = Field(default_factory=Cqt)
    model: Model = Field(default_factory=Model)
    train: Train = Field(default_factory=Train)
    convert: Convert = Field(default_factory=Convert)
    evaluate: Evaluate = Field(default_factory=Evaluate)
    plot: Plot = Field(default_factory=Plot)
    compute: Compute = Field(default_factory=Compute)

    @model_validator(mode="after")
    def _block_holds_context(self):
        if self.train.block <= self.model.lags[0]:
            raise ValueError(
                f"train.block: got {self.train.block} frames, allowed: more than the {self.model.lags[0]} frames "
                f"that model.context {self.model.context} with model.dilation {self.model.dilation} "
                f"and model.growth {self.model.growth:g} reaches back"
            )
        return self

    @model_validator(mode="after")
    def _moved_frames_hold_something(self):
        if self.model.transposed >= self.cqt.n_bins:
            raise ValueError(
                f"model.transposed: got {self.model.transposed} bins, allowed: fewer than cqt.n_bins ({self.cqt.n_bins}), "
                "or nothing of a frame is left to map"
            )
        return self


def load(path="params.yaml", overrides=()):
    """Read and validate params.yaml.

    Parameters
    ----------
    path : str or Path
    overrides : sequence of str
        Values that replace those of the file, as ``"section.key=value"`` (the syntax of ``dvc exp run -S``).

    Returns
    -------
    Params

    Raises
    ------
    ParamsError
        With one line: the dotted key, what is wrong and what is allowed.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (FileNotFoundError, IsADirectoryError):
        raise ParamsError(f"{path}: no such file; run from the root of the repository or name it with --params") from None
    except UnicodeDecodeError:
        raise ParamsError(f"{path}: not UTF-8 text; save it as such") from None
    values = _parse(text, path)
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise ParamsError(f"{path}: must hold sections ({', '.join(Params.model_fields)}), not a {type(values).__name__}")
    for override in overrides:
        _override(values, override)
    return validate(values, " ".join([str(path), *(f"-S {override}" for override in overrides)]))


def validate(values, name="params.yaml"):
    """Turn a dictionary of sections into `Params`; `name` is what an error calls it."""
    try:
        return Params.model_validate(_with_sections(values))
    except ValidationError as error:
        raise ParamsError(f"{name}: {_explain(error.errors()[0])}") from None


def describe(keys):
    """One line for each parameter that `keys` (sections or dotted keys) name: default, meaning and what is allowed, for ``--help``."""
    lines = []
    for key in keys:
        section, _, name = key.partition(".")
        fields = Params.model_fields[section].annotation.model_fields
        for field in [name] if name else fields:
            lines.append(f"  {section}.{field} = {fields[field].default}  {fields[field].description}; {_allowed(fields[field])}")
    return "\n".join(lines)


class _Loader(yaml.SafeLoader):
    """YAML as DVC has it, of version 1.2: 1e-5 is a number, for PyYAML alone it is a text. Every key stands once."""

    def compose_mapping_node(self, anchor):
        """Read a section, in which the last of two equal keys would win without a word."""
        node = super().compose_mapping_node(anchor)
        keys = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        for title, times in Counter(key.value for key in keys).items():
            if times > 1:
                raise yaml.constructor.ConstructorError(None, None, f"{title} stands there {times} times", node.start_mark)
        return node

    def construct_number(self, node):
        """A number, unless versions of YAML disagree about it: 010 and 1:30 are eight and ninety by the older one."""
        if re.match(r"[-+]?0[0-9_]+$", node.value) or ":" in node.value:
            raise yaml.constructor.ConstructorError(None, None, f"{node.value[:40]} differs between versions of YAML", node.start_mark)
        return self.construct_yaml_int(node) if node.tag.endswith(":int") else self.construct_yaml_float(node)

    def flatten_mapping(self, node):
        """Merge what ``<<`` names, as long as a few lines that merge each other don't make millions of keys."""
        merged = [value for key, value in node.value if key.tag == "tag:yaml.org,2002:merge"]
        sections = sum(len(value.value) if isinstance(value, yaml.SequenceNode) else 1 for value in merged)
        if sections <= _MERGED:
            super().flatten_mapping(node)
        if sections > _MERGED or len(node.value) > _MERGED:
            raise yaml.constructor.ConstructorError(None, None, f"merges more than {_MERGED} keys", node.start_mark)


for _kind in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_kind}", _Loader.construct_number)
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789"))


def _parse(text, where):
    try:
        return yaml.load(text, _Loader)
    except Exception as error:  # PyYAML raises whatever its constructors run into
        raise ParamsError(f"{where}: not valid YAML: {reason(error)}") from None


def _with_sections(values):
    """An empty section, as YAML reads a title without keys, has all its defaults."""
    return {section: {} if keys is None and section in Params.model_fields else keys for section, keys in values.items()}


def _override(values, override):
    key, equals, value = override.partition("=")
    section, dot, name = key.partition(".")
    if not (equals and dot and name):
        raise ParamsError(f"--set {override}: write it as section.key=value")
    if values.get(section) is None:
        values[section] = {}
    if isinstance(values[section], dict):  # if not, validation says so
        values[section] = {**values[section], name: _parse(value, f"--set {override}")}  # an alias of YAML is the same dictionary elsewhere


def _explain(error):
    """One line for one of pydantic's errors: dotted key, what is wrong, what is allowed."""
    key = reason(".".join(str(part) for part in error["loc"]))
    kind, given = error["type"], error["input"]
    if kind in ("extra_forbidden", "invalid_key"):
        return f"{key}: unknown key; allowed: {', '.join(_siblings(error['loc']))}"
    if kind == "value_error":
        return str(error["ctx"]["error"])  # checks over several keys name theirs
    section, *names = error["loc"]
    fields = Params.model_fields[section].annotation.model_fields
    if names:
        allowed = f"{_allowed(fields[names[0]])} (default {fields[names[0]].default})"
    else:
        allowed = f"a section with the keys {', '.join(fields)}"
    return f"{key}: got {_SHORT.repr(given)}, allowed: {allowed}"


def _siblings(loc):
    fields = Params.model_fields
    for part in loc[:-1]:
        fields = fields[part].annotation.model_fields
    return list(fields)


def _allowed(field):
    """What a key may hold, in words: its type and range."""
    if get_origin(field.annotation) is Literal:
        return " or ".join(str(choice) for choice in get_args(field.annotation))
    words = {int: "an integer", float: "a number", str: "a text", bool: "true or false"}[field.annotation]
    signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<=", "pattern": "of the form", "min_length": "of length >="}
    rules = [(sign, getattr(rule, name, None)) for rule in field.metadata for name, sign in signs.items()]
    limits = [f"{sign} {limit}" for sign, limit in rules if limit is not None]
    return " ".join([words, " and ".join(limits)]).strip()
