"""The HDF5 files that hold frames: many tracks a file, each under its content's key.

A folder of shards is a set of tracks. Which shard holds a track follows from its key alone (the first bits of a
hash), and how many shards there are from the total size alone: the same tracks give the same files, in whatever order
they came, and one more track rewrites one file.

    <folder>/index.json          the lines of the list, in order: {"schema", "lines": [[{"key", "path", "n_frames"}, ...views], ...]}
    <folder>/shard-<bits>.h5     attributes: schema, cqt (JSON); one group a track, named by its key:
                                 dataset "cqt" (n_frames, n_bins), chunked in time, not compressed;
                                 attributes path, duration (s), n_frames, peak (largest magnitude),
                                 code (digest of what made the frames)
"""

import json
import os
from collections import OrderedDict
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import h5py
import numpy as np

from gae import hdf5
from gae.errors import FormatError
from gae.files import read_json, replacing, write_json
from gae.params import Cqt
from gae.storage import all_fetched

SCHEMA = 1
_CHUNK = 256  # frames in one HDF5 chunk: about what training reads at a time
_FILES = 64  # open at a time
_DATASETS = 2048  # the same, of all files: each takes some 20 kB, and an archive has millions
_BLOCK = 8192  # frames read at a time
_REMEDY = "delete it and run `dvc repro` again"
_reading = partial(hdf5.opened, kind="shard", remedy=_REMEDY)
_telling = partial(hdf5.telling, kind="shard", remedy=_REMEDY)


@dataclass(frozen=True)
class Track:
    """One track of a shard: where its frames lie and what they came from."""

    key: str
    file: Path  # or a URL
    path: str
    n_frames: int
    duration: float
    peak: float
    dtype: str
    code: str = ""


class Shards:
    """The tracks of a folder of shards, open for reading.

    Parameters
    ----------
    folder : str or Path

    Attributes
    ----------
    cqt : Cqt or None
        How the frames were made; None where the folder has no shards.
    tracks : dict of str to Track
    lines : list of list of Track
        The lines of the list, in order; each holds one track, or several views of one performance.

    Raises
    ------
    FormatError
        If a shard is missing, damaged or of another version, or the shards' parameters differ.
    """

    def __init__(self, folder):
        self.folder = Path(folder)
        self._opened = _Opened()
        self.cqt, self.tracks = None, {}
        for file in sorted(self.folder.glob("shard-*.h5")):
            cqt, tracks = read_shard(file)
            if self.cqt not in (None, cqt):
                raise FormatError(f"{file}: made with other cqt parameters than its neighbours; {_REMEDY}")
            self.cqt = cqt
            self.tracks.update(tracks)
        self.lines = [[self._track(key) for key in line] for line in self._index()]

    def read(self, key, start=0, stop=None, dtype=np.float32):
        """Frames `start` to `stop` of a track: ndarray, shape (stop - start, n_bins), of `dtype`, or as they are stored if it is None."""
        track = self.tracks[key]
        with _telling(track.file):
            frames = self._opened.frames(track.file, key)[start:stop]
        return frames if dtype is None else frames.astype(dtype, copy=False)

    def close(self):
        """Close all files."""
        self._opened.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def _index(self):
        try:
            lines = [[view["key"] for view in line] for line in read_json(self.folder / "index.json")["lines"]]
            "".join(key for line in lines for key in line)  # a TypeError where one is no text
            if not all(lines):
                raise ValueError
            return lines
        except (OSError, ValueError, KeyError, TypeError):
            raise FormatError(f"{self.folder / 'index.json'}: missing or damaged; run `dvc repro preprocess`") from None

    def _track(self, key):
        if key not in self.tracks:
            raise FormatError(f"{self.folder}: track {key} is in no shard; {_REMEDY}")
        return self.tracks[key]


class _Opened:
    """HDF5 files open for reading: those used last, each with the datasets that were read from it."""

    def __init__(self):
        self._files = OrderedDict()  # what was used last comes last

    def frames(self, path, key):
        """The frames of a track, as a dataset of its file; opening either takes longer than reading an excerpt."""
        if path not in self._files:
            if len(self._files) >= _FILES:
                self._files.popitem(last=False)[1][0].close()
            self._files[path] = h5py.File(path, "r", rdcc_nbytes=0), {}  # or every dataset would keep what was read from it
        self._files.move_to_end(path)
        file, datasets = self._files[path]
        if key not in datasets:
            if sum(len(held) for _, held in self._files.values()) >= _DATASETS:
                for _, held in self._files.values():
                    held.clear()
            datasets[key] = file[key]["cqt"]
        return datasets[key]

    def close(self):
        """Close all of them."""
        while self._files:
            self._files.popitem()[1][0].close()


def read_shard(file):
    """The parameters and tracks of one shard.

    Returns
    -------
    cqt : Cqt
    tracks : dict of str to Track

    Raises
    ------
    FormatError
        If it is damaged, of another version, or a track's frames don't have the shape that is claimed.
    OSError
        If the system does not let it be read, as `gae.hdf5.opened`.
    """
    with _reading(file) as shard:
        if shard.attrs.get("schema") != SCHEMA:
            raise FormatError(f"{file}: schema {shard.attrs.get('schema')}, expected {SCHEMA}; {_REMEDY}")
        cqt = Cqt.model_validate(json.loads(shard.attrs["cqt"]))
        return cqt, {key: _read_track(file, key, group, cqt) for key, group in shard.items()}


def read_blocks(file, key, n_frames=_BLOCK):
    """The frames of one track of one shard, without looking at the others.

    Parameters
    ----------
    file : str or Path
    key : str
    n_frames : int
        Frames a block.

    Returns
    -------
    int
        Number of frames of the track.
    iterator of ndarray of float32, shape (n, n_bins)

    Raises
    ------
    FormatError
        If it is damaged; also while the blocks are read.
    OSError
        If the system does not let it be read, as `gae.hdf5.opened`.
    """
    with _reading(file) as shard:
        length = len(shard[key]["cqt"])

    def blocks():
        with _reading(file) as shard:
            for start in range(0, length, n_frames):
                yield shard[key]["cqt"][start : start + n_frames].astype(np.float32)

    return length, blocks()


@contextmanager
def writing(file, cqt, durable=True):
    """Yield an open HDF5 file that becomes the shard `file` when the block ends well."""
    with replacing(file, durable) as partial, hdf5.create(partial) as shard:
        shard.attrs["schema"] = SCHEMA
        shard.attrs["cqt"] = _text(cqt)
        yield shard


def add_track(shard, key, blocks, n_bins, dtype, **attributes):
    """Append a track to a shard open for writing.

    Parameters
    ----------
    shard : h5py.File
    key : str
    blocks : iterable of ndarray, shape (n, n_bins)
        Successive standardised frames.
    n_bins : int
    dtype : {"float16", "float32"}
    **attributes
        path (str), duration (s), peak, and code (str), if it is kept.
    """
    group = shard.create_group(key)
    dataset = group.create_dataset("cqt", (0, n_bins), dtype, maxshape=(None, n_bins), chunks=(_CHUNK, n_bins))
    for block in blocks:
        dataset.resize(len(dataset) + len(block), axis=0)
        dataset[len(dataset) - len(block) :] = block.astype(dtype, copy=False)  # numpy rounds far faster than HDF5
    group.attrs.update(attributes, n_frames=len(dataset))


def write_folder(folder, lines, sources, cqt, shard_bytes):
    """Make a folder hold exactly the tracks of a list, rewriting only the shards that change.

    Parameters
    ----------
    folder : str or Path
    lines : list of list of (str, str)
        Key and path of the list's tracks, line by line.
    sources : dict of str to Track
        Where each key's frames lie: in `folder` itself, in a shard elsewhere that does not change meanwhile, or at a URL. What
        waits at a URL is fetched when its shard is written.
    cqt : Cqt
    shard_bytes : int
        Shards are halved until their average is below this.
    """
    folder = Path(folder)
    paths = dict(sorted(track for line in lines for track in line))
    tracks = {key: replace(sources[key], path=path) for key, path in paths.items()}
    plan = _plan(tracks, shard_bytes, cqt)
    for name, wanted in plan.items():
        found_there = all(sources[track.key] == replace(track, file=folder / name) for track in wanted)
        if not (found_there and _holds_just(folder / name, len(wanted), cqt)) and not _holds(folder / name, wanted, cqt):
            _write_shard(folder / name, wanted, cqt)
    for file in folder.glob("shard-*.h5"):
        if file.name not in plan:
            file.unlink()
    views = [[{"key": key, "path": path, "n_frames": tracks[key].n_frames} for key, path in line] for line in lines]
    write_json(folder / "index.json", {"schema": SCHEMA, "lines": views})


def copy_track(track, file, cqt):
    """Copy a track to a shard of its own that is soon copied elsewhere, and return it as it is there."""
    _write_shard(file, [track], cqt, durable=False)
    return replace(track, file=file)


def _plan(tracks, shard_bytes, cqt):
    """Which shard holds which tracks: the first `bits` bits of the key choose it."""
    total = sum(-(-track.n_frames // _CHUNK) * _CHUNK * np.dtype(track.dtype).itemsize for track in tracks.values()) * cqt.n_bins
    bits = 0
    while total > shard_bytes << bits and 1 << bits < len(tracks):
        bits += 1
    plan = {}
    for key, track in tracks.items():
        plan.setdefault(f"shard-{int(key[:8], 16) >> (32 - bits):0{bits}b}.h5" if bits else "shard-all.h5", []).append(track)
    return plan


def _holds(file, wanted, cqt):
    """Whether a shard is just what would be written: these tracks, of these paths, made with these parameters."""
    try:
        made_with, tracks = read_shard(file)
    except FormatError:
        return False
    return made_with == cqt and list(tracks.values()) == [replace(track, file=file) for track in wanted]


def _holds_just(file, count, cqt):
    """The same where these tracks were found in it, as many as are wanted: a look at each would take long."""
    with _reading(file) as shard:
        return len(shard) == count and shard.attrs["cqt"] == _text(cqt)


def _write_shard(file, tracks, cqt, durable=True):
    with all_fetched([track.file for track in tracks]) as sources, writing(file, cqt, durable) as shard, closing(_Opened()) as opened:
        for track, source in zip(tracks, sources, strict=True):
            if source != track.file:  # only now is all known of it
                track = replace(read_shard(source)[1][track.key], path=track.path)
            # not HDF5's own copy, whose bytes remember how often a track was copied
            facts = {"path": track.path, "duration": track.duration, "peak": track.peak, "code": track.code}
            add_track(shard, track.key, _blocks(track, opened), cqt.n_bins, track.dtype, **facts)


def _blocks(track, opened):
    with _telling(track.file):
        frames = opened.frames(track.file, track.key)
        for start in range(0, len(frames), _BLOCK):
            yield frames[start : start + _BLOCK]


def _read_track(file, key, group, cqt):
    dataset, about = group["cqt"], group.attrs
    n_frames = int(about["n_frames"])
    if dataset.shape != (n_frames, cqt.n_bins):
        raise FormatError(f"{file}: track {key} has {dataset.shape} frames, not ({n_frames}, {cqt.n_bins}); {_REMEDY}")
    if dataset.file.filename != str(file) or not _stored(dataset, file):
        raise FormatError(f"{file}: track {key} is not stored whole in it; {_REMEDY}")
    path, code = str(about["path"]), str(about.get("code", ""))
    path.encode()  # a ValueError where it is no UTF-8
    return Track(key, Path(file), path, n_frames, float(about["duration"]), float(about["peak"]), str(dataset.dtype), code)


def _stored(dataset, file):
    """Whether frames are stored as `add_track` does it: then what is claimed can't exceed what is there."""
    chunk = (_CHUNK, dataset.shape[1])
    held = -(-len(dataset) // _CHUNK) * np.prod(chunk) * dataset.dtype.itemsize
    plain = dataset.dtype in ("float16", "float32") and dataset.chunks == chunk and not dataset.id.get_create_plist().get_nfilters()
    return plain and dataset.id.get_storage_size() == held <= os.path.getsize(file)


def _text(cqt):
    return json.dumps(cqt.model_dump(), sort_keys=True)
