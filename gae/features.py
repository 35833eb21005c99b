"""The file that holds features: write, validate, read.

    <name>.h5    values  float32 or float16 (n_frames, n_maps): the mapping of frame t against `context` frames before it,
                         or the mean of its mappings in three transpositions and tempi
                 times   float64 (n_frames,): centre of each frame, in s
                 attributes: schema, source (path of the audio), source_sha256, model_sha256, cqt (JSON),
                 made_by (digest of what else decides the values)

Both datasets are stored in one piece and not compressed, so what a file claims can't exceed what it holds.
"""

import json
import operator
import os
import re
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path

import h5py
import numpy as np

from gae import hdf5
from gae.cqt import frame_times
from gae.errors import FormatError, reason
from gae.files import replacing
from gae.params import Cqt
from gae.storage import check_place

SCHEMA = 1
SUFFIXES = (".h5", ".npz", ".csv")
_REMEDY = "convert the audio again"


@dataclass(frozen=True)
class Origin:
    """Where features come from.

    Attributes
    ----------
    cqt : gae.params.Cqt
        How the frames were made.
    source : str
        Path of the audio; empty where it was no file.
    source_sha256, model_sha256 : str
        Hash of the audio file and of the model file, 64 hexadecimal digits each; empty where there was none.
    made_by : str
        Digest of what else decides the values: code, versions of packages, how the frames were stored, which of them are a
        context, the transpositions and tempi. Empty where the features are not kept from one run to the next.
    """

    cqt: Cqt
    source: str = ""
    source_sha256: str = ""
    model_sha256: str = ""
    made_by: str = ""


@dataclass(frozen=True, eq=False)
class Features:
    """Transposition-invariant features of one recording, one row a frame.

    Attributes
    ----------
    values : ndarray, shape (n_frames, n_maps)
        In (-1, 1). Row t relates frame t to frames before it, the model's context, and to none after it. (A frame is no instant: it
        hears its lowest pitch half a second to either side, after silence a sound up to 0.9 s ahead and an offset (DC) up to 2 s,
        and is scaled by the peak of the whole recording.)
    times : ndarray of float64, shape (n_frames,)
        Centre of each frame in s.
    origin : Origin
    """

    values: np.ndarray
    times: np.ndarray
    origin: Origin

    def __len__(self):
        return len(self.values)

    def __repr__(self):
        source = f" of {self.origin.source!r}" if self.origin.source else ""
        span = f", {self.times[0]:.2f} to {self.times[-1]:.2f} s" if len(self) else ""
        return f"<Features{source}: {self.values.shape[0]} frames, {self.values.shape[1]} maps{span}>"

    def save(self, path):
        """Write a .h5, .npz or .csv file, values as float16 where they are, as float32 otherwise; see `gae.features.write`."""
        dtype = "float16" if self.values.dtype == np.float16 else "float32"
        origin = replace(self.origin, made_by="")  # who knows what has become of the values
        write(path, [self.values], self.values.shape, origin, dtype, self.times)


@dataclass(frozen=True)
class Header:
    """What a feature file says of itself."""

    n_frames: int
    n_maps: int
    dtype: str
    origin: Origin


def write(path, blocks, shape, origin, dtype="float32", times=None):
    """Write a feature file block by block, whole or not at all.

    Parameters
    ----------
    path : str or Path
        The suffix decides: .h5 is what `read` reads; .npz holds the same as arrays for `numpy.load`; .csv has a line a
        frame, time in s and then the values, which Sonic Visualiser opens as a layer (see Notes).
    blocks : iterable of ndarray, shape (n, n_maps)
        Successive values.
    shape : (int, int)
        n_frames and n_maps of the whole.
    origin : Origin
    dtype : {"float32", "float16"}
        How values are stored in .h5 and .npz.
    times : array_like, shape (n_frames,), optional
        Centre of each frame in s; by default those of a whole recording, the first at 0.

    Raises
    ------
    FormatError
        If the suffix or the type is none of these, the shape is another, a value is NaN or infinite, also once it is stored, or the
        times are not one a frame, in order.

    Notes
    -----
    Sonic Visualiser (File > Import Annotation Layer) guesses from the file that the first column is a start time in
    seconds and the rest is a dense layer, "Colour 3D Plot". It skips lines that begin with ``#`` in every version, while
    only recent ones know a line of column names, so there is none. It rounds the frame period to samples of the recording
    that is open: load the layer onto the audio that was converted.
    """
    check_suffix(path)
    path = Path(path)
    if dtype not in ("float32", "float16"):
        raise FormatError(f"{path}: features are stored as float32 or float16, not as {dtype}")
    shape = tuple(map(int, shape))
    if len(shape) != 2 or not shape[1]:
        raise FormatError(f"{path}: not written, values of shape {shape}; features are (n_frames, n_maps)")
    times = frame_times(shape[0], origin.cqt) if times is None else np.asarray(times, np.float64)
    if times.shape != (shape[0],) or not np.isfinite(times).all() or (np.diff(times) <= 0).any():
        raise FormatError(f"{path}: not written, {times.size} times for {shape[0]} frames; give one a frame, in order")
    writers = {".h5": _write_h5, ".npz": _write_npz, ".csv": _write_csv}
    with replacing(path) as partial:
        writers[path.suffix.lower()](partial, _checked(blocks, shape, dtype, path), shape, times, origin, np.dtype(dtype))


def check_suffix(path):
    """Raise `FormatError` unless `path` names a file that `write` can write."""
    check_place(path)
    if Path(path).suffix.lower() not in SUFFIXES:
        raise FormatError(f"{path}: features are written as {', '.join(SUFFIXES)}; end the name in one of them")


def read(path: str | Path, start: int = 0, stop: int | None = None) -> Features:
    """Read a feature file.

    Parameters
    ----------
    path : str or Path
        An .h5 file that `gae` wrote.
    start, stop : int
        First frame, and the one after the last; by default all are read.

    Returns
    -------
    Features

    Raises
    ------
    FormatError
        If it is missing, damaged, no feature file, or of another version.
    OSError
        If the system does not let it be read.
    TypeError
        If `start` or `stop` is no whole number.
    """
    start, stop = (None if frame is None else operator.index(frame) for frame in (start, stop))
    with _opened(path) as file:
        header = _header(file, path)
        values, times = file["values"][start:stop], file["times"][start:stop]
    if not (np.isfinite(values).all() and np.isfinite(times).all() and (np.diff(times) > 0).all()):
        raise FormatError(f"{path}: damaged (values or times make no sense); {_REMEDY}")
    return Features(values, times, header.origin)


def validate(path):
    """Check a feature file without reading its values.

    Returns
    -------
    Header

    Raises
    ------
    FormatError
        As `read`.
    """
    with _opened(path) as file:
        return _header(file, path)


def audio_of(path):
    """The audio that a feature file of any kind says it was made from.

    Parameters
    ----------
    path : str or Path
        .h5, .npz or .csv.

    Returns
    -------
    source, source_sha256 : str
        As in `Origin`.

    Raises
    ------
    FormatError
        If it is no feature file.
    """
    suffix = Path(path).suffix.lower()
    if suffix == ".h5":
        origin = validate(path).origin
        return origin.source, origin.source_sha256
    try:
        if suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                return str(arrays["source"]), str(arrays["source_sha256"])
        with open(path, encoding="utf-8") as file:
            source, sha256 = re.fullmatch(r'# time .* source: (".*"); source_sha256: (\w*)\n', file.readline(1 << 16)).groups()
        return json.loads(source), sha256
    except Exception as error:  # whatever a stranger's file makes of this
        raise FormatError(f"{path}: not a feature file ({reason(error)[:200]}); {_REMEDY}") from None


def _checked(blocks, shape, dtype, path):
    """Pass blocks on, making sure that they are numbers, also once they are stored, and that there are as many as announced."""
    total = 0
    for block in blocks:
        with np.errstate(over="ignore"):
            stored = np.asarray(block).astype(dtype, copy=False)
        if not np.isfinite(stored).all():
            raise FormatError(f"{path}: not written, its features would be NaN or infinite; use another model")
        total += len(block)
        yield block
    if total != shape[0]:
        raise ValueError(f"{total} frames were given, {shape[0]} announced")


def _write_h5(path, blocks, shape, times, origin, dtype):
    with hdf5.create(path) as file:
        file.attrs.update(_attributes(origin))
        values = file.create_dataset("values", shape, dtype)
        file["times"] = times
        start = 0
        for block in blocks:
            values[start : start + len(block)] = block
            start += len(block)


def _write_npz(path, blocks, shape, times, origin, dtype):
    with zipfile.ZipFile(path, "w") as file:
        with _entry(file, "values") as entry:
            description = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(entry, description)
            for block in blocks:
                entry.write(np.ascontiguousarray(block, dtype))
        for name, value in {"times": times, **_attributes(origin)}.items():
            with _entry(file, name) as entry:
                np.lib.format.write_array(entry, np.asarray(value), allow_pickle=False)


def _entry(file, name):
    """An array of an .npz open for writing, without the time of day: equal features are equal files."""
    return file.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True)


def _write_csv(path, blocks, shape, times, origin, dtype):
    line = ",".join(["%.6f"] * (1 + shape[1])) + "\n"
    start = 0
    with open(path, "w", encoding="utf-8") as file:
        source = f"source: {json.dumps(_text(origin.source), ensure_ascii=False)}; source_sha256: {origin.source_sha256}"
        file.write(f"# time in s, then {shape[1]} features; {source}\n")
        for block in blocks:
            rows = np.column_stack([times[start : start + len(block)], block]).tolist()
            file.writelines(line % tuple(row) for row in rows)
            start += len(block)


def _attributes(origin):
    return {
        "schema": SCHEMA,
        "source": _text(origin.source),
        "source_sha256": origin.source_sha256,
        "model_sha256": origin.model_sha256,
        "made_by": origin.made_by,
        "cqt": json.dumps(origin.cqt.model_dump(), sort_keys=True),
    }


def _text(path):
    """A path as text that every file can hold: bytes of a name that are no UTF-8 become escapes."""
    return path.encode("utf-8", "backslashreplace").decode().replace("\0", "\\0")


def _opened(path):
    """A feature file to be opened for reading, as `gae.hdf5.opened`."""
    if not os.path.exists(path):
        raise FormatError(f"{path}: no such file; run `dvc repro convert` or `gae convert`")
    if Path(path).suffix.lower() in (".npz", ".csv"):
        raise FormatError(f"{path}: only .h5 feature files are read here; numpy.load reads .npz, numpy.loadtxt(..., delimiter=',') .csv")
    return hdf5.opened(path, "feature file", _REMEDY)


def _header(file, path):
    schema = file.attrs.get("schema")
    if schema != SCHEMA:
        raise FormatError(f"{path}: no feature file of version {SCHEMA} (schema {schema}); {_REMEDY}")
    values, times = _plain(file, "values", path), _plain(file, "times", path)
    texts = [file.attrs[name] for name in ("source", "source_sha256", "model_sha256")] + [file.attrs.get("made_by", "")]
    fits = values.ndim == 2 and values.dtype in ("float16", "float32") and times.shape == values.shape[:1] and times.dtype == "float64"
    if not fits or not all(isinstance(text, str) and text == _text(text) for text in texts):
        raise FormatError(f"{path}: damaged (values {values.shape}, times {times.shape}); {_REMEDY}")
    cqt = Cqt.model_validate(json.loads(file.attrs["cqt"]))
    return Header(*values.shape, values.dtype.name, Origin(cqt, *texts))


def _plain(file, name, path):
    """A dataset of this very file, in one piece that lies within it: nothing else is read, or believed of its size."""
    if isinstance(file.get(name, getlink=True), h5py.HardLink) and isinstance(dataset := file[name], h5py.Dataset):
        layout = dataset.id.get_create_plist()
        end = (dataset.id.get_offset() or 0) + dataset.nbytes
        if layout.get_layout() == h5py.h5d.CONTIGUOUS and not layout.get_external_count() and end <= os.path.getsize(path):
            return dataset
    raise FormatError(f"{path}: damaged ({name} is not stored whole in it); {_REMEDY}")
