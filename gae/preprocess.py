"""The listed audio to frames, each content once, kept between runs."""

import os
import re
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path

import numpy as np

from gae import audio, shards, storage
from gae.compute import by_place, map_tracks
from gae.cqt import analyse
from gae.errors import AudioError, FormatError, GaeError, ListError, StorageError, warn
from gae.files import PACKAGES, code_digest, content_hash, digest, remove_own, sweep
from gae.index import read_index
from gae.locks import alone

_WAITING = re.compile(r"/([0-9a-f]{32})-([0-9]+)\.h5$")  # a track at a URL: its key, and what must be known of it beforehand
_MADE = "[0-9a-f]{16}"  # a folder of staging: digest of what decides its frames
_OWN = r"(shard-\w+|[0-9a-f]{32})\.h5"  # a shard, and a track that waits for one


def preprocess(params, index, out):
    """Compute the frames that are missing, and make the shards hold just the listed tracks.

    A track is known by its content, the parameters of the transform and the code that runs it: a file that was moved, or is on
    both lists, is not computed again. Each track's frames wait in a file of their own until the shards are written, so a killed run
    loses only the tracks it was at.

    Parameters
    ----------
    params : gae.params.Params
        Reads cqt, data and compute. Its staging, a folder or URL, holds computed tracks that are in no shard yet; gone at the end.
    index : Path
        As `gae.index.index` writes it.
    out : Path
        Folder of shards for each list: out/train and out/convert.

    Raises
    ------
    AudioError
        If a file changed since it was indexed or can't be read any more, or can't be used and data.on_error is "stop".
    ListError
        If nothing usable is left of a list.
    FormatError
        If the index is missing or damaged.
    StorageError
        If what was computed does not arrive, or a storage can't be reached.
    GaeError
        If another process uses these folders, or the staging is where the shards are.
    """
    staging = params.compute.staging
    if os.path.realpath(staging) in [os.path.realpath(folder) for folder in (out, out / "train", out / "convert")]:
        raise GaeError(f"compute.staging: {staging} is for the shards; name a folder of its own")
    with alone(out), nullcontext() if storage.is_url(staging) else alone(staging):
        _preprocess(params, index, out, staging)


def _preprocess(params, index, out, staging):
    indexed = read_index(index)
    indexed["train"] = [[*line, *shifted_views(line, params.data.shifted_views)] for line in indexed["train"]]
    lists = {Path(out) / role: indexed[role] for role in ("train", "convert")}
    far = storage.is_url(staging)
    staging, near = (staging.rstrip("/"), Path(out) / ".staging") if far else (Path(staging), Path(staging))
    made = digest([params.cqt.model_dump(), params.data.dtype, _code()])[:16]
    place = f"{staging}/{made}" if far else staging / made
    held = {folder: _tracks_in(folder, params) for folder in lists}
    staged = {key: track for folder in {place, near / made} for key, track in _waiting_in(folder, params).items()}
    lent = _lend(lists, held, staged, near / made, params.cqt)

    files = {file["key"]: file for lines in lists.values() for line in lines for file in line}
    missing = [files[key] for key in sorted(files.keys() - staged.keys() - lent.keys() - set().union(*held.values()))]
    computed = []
    for where, some in by_place(missing, params.compute, lambda file: file["path"]):
        failures = map_tracks(compute_track, some, where, "frames", (params.cqt, params.data.dtype, place))
        for failure in dict.fromkeys(filter(None, failures)):  # once for a file and its shifted views
            _refuse(failure, params.data.on_error)
        computed += [file["key"] for file, failure in zip(some, failures, strict=True) if not failure]
    staged |= _arrived(computed, place, params)

    for folder, lines in lists.items():
        sources = {**staged, **lent, **held[folder]}
        views = [[(file["key"], file["path"]) for file in line if file["key"] in sources] for line in lines]
        if not any(views):
            raise ListError(f"{index}: nothing usable is left of the {folder.name} list; see the warnings above")
        shards.write_folder(folder, [line for line in views if line], sources, params.cqt, params.data.shard_mb << 20)
        if far:  # what is on both lists is fetched once
            staged |= _tracks_in(folder, params)
    for folder in {near, staging}:
        _remove(folder)


def shifted_views(line, count):
    """Views for a track that has none, by a pitch shifter: the same recording in other keys.

    Frames that are only moved by some bins carry along all that tells them apart, the noise of a recording and the
    beating of its partials too. What finds them again has learnt little about intervals.

    Parameters
    ----------
    line : list of dict
        Files as in the index.
    count : int
        Up to 12.

    Returns
    -------
    list of dict
        Files with a key of their own and `semitones`, each another one of -6 to 6 but 0, drawn by the track's content; none
        for a line with views of its own.
    """
    if len(line) > 1:
        return []
    file = line[0]
    drawn = np.random.default_rng(int(file["key"], 16)).permutation([k for k in range(-6, 7) if k])[:count].tolist()
    return [{**file, "key": digest([file["key"], "shifted", k])[:32], "semitones": k} for k in drawn]


def compute_track(file, cqt, dtype, place):
    """Decode one file and write its frames.

    Parameters
    ----------
    file : dict
        path (or URL), key, sha256 and seconds, as in the index; and semitones, if its pitch is to be shifted.
    cqt : gae.params.Cqt
    dtype : {"float16", "float32"}
    place : Path or str
        The frames go to place/<key>.h5, a shard of one track; at a URL to place/<key>-<number of frames>.h5.

    Returns
    -------
    str or None
        Why it can't be used, in one line; None if all went well.
    """
    try:
        with storage.fetched(file["path"]) as path, analyse(_samples(file, path, cqt.sample_rate), cqt) as analysis:
            if content_hash(path) != file["sha256"]:
                return f"{file['path']}: changed while it was read; run again"
            with _file_in(place, file["key"], analysis.n_frames) as waiting, shards.writing(waiting, cqt, durable=False) as shard:
                facts = {"path": file["path"], "duration": file["seconds"], "peak": analysis.peak, "code": _code()}
                shards.add_track(shard, file["key"], analysis.blocks(), cqt.n_bins, dtype, **facts)
    except AudioError as error:
        return str(error) if _as_indexed(file) else f"{file['path']}: changed, or can't be read any more; run again"
    return None


def _as_indexed(file):
    """Whether the bytes are there that were indexed: what can't be read for a moment is not to be left out for good."""
    try:
        with storage.fetched(file["path"]) as path:
            return content_hash(path) == file["sha256"]
    except (AudioError, OSError):
        return False


@cache
def _code():
    """Digest of all that decides a track's frames but the file and the parameters."""
    return code_digest(["audio", "cqt"], PACKAGES)


def _samples(file, path, sample_rate):
    samples = audio.blocks(path, sample_rate)
    return audio.shift_pitch(samples, sample_rate, file["semitones"]) if "semitones" in file else samples


@contextmanager
def _file_in(place, key, n_frames):
    """Yield the file in which a track's frames wait; one at a URL is named so that the shards can be planned without it."""
    if storage.is_url(place):
        with storage.storing(f"{place}/{key}-{n_frames}.h5") as file:
            yield file
    else:
        yield place / f"{key}.h5"


def _tracks_in(folder, params):
    """The tracks that a folder holds already, made with these parameters by this code: {key: Track}."""
    sweep(folder)
    tracks = {}
    for file in sorted(file for file in folder.glob("*.h5") if re.fullmatch(_OWN, file.name)):
        try:
            cqt, found = shards.read_shard(file)
        except FormatError as error:
            warn(f"{error} (its tracks are computed again)")
            file.unlink()
            continue
        if cqt == params.cqt and all((track.dtype, track.code) == (params.data.dtype, _code()) for track in found.values()):
            tracks |= found
    return tracks


def _waiting_in(place, params):
    """The tracks that wait to be put into shards: {key: Track}; of those at a URL as much as a list of names can tell."""
    if not storage.is_url(place):
        return _tracks_in(place, params)
    tracks = {}
    for url in storage.below(place):
        if match := _WAITING.search(url):
            key, n_frames = match.groups()
            tracks[key] = shards.Track(key, url, "", int(n_frames), 0.0, 0.0, params.data.dtype, _code())
    return tracks


def _arrived(keys, place, params):
    """What waits after these tracks were computed."""
    arrived = _waiting_in(place, params)
    if lost := set(keys) - arrived.keys():
        raise StorageError(
            f"{place}: {len(lost)} of {len(keys)} computed tracks do not arrive here; "
            "let compute.staging name a folder that all workers share, or a URL (docs/scale.md)"
        )
    return arrived


def _lend(lists, held, staged, place, cqt):
    """Copy aside what one list's folder holds and the other's needs: the first may be rewritten before the second."""
    lent = {}
    for folder, lines in lists.items():
        wanted = {file["key"] for line in lines for file in line}
        for other in held:
            for key in wanted & held[other].keys() - held[folder].keys() - staged.keys():
                lent[key] = shards.copy_track(held[other][key], place / f"{key}.h5", cqt)
    return lent


def _refuse(failure, on_error):
    if on_error == "stop" or failure.endswith("run again"):
        raise AudioError(failure)
    warn(f"skipped {failure}")


def _remove(staging):
    """Remove the staged tracks, those of other parameters and half-written ones too, and nothing else."""
    if storage.is_url(staging):
        own = re.compile(re.escape(storage.spelt(staging)) + f"/{_MADE}{_WAITING.pattern}")
        storage.remove([url for url in storage.below(staging) if own.fullmatch(url)])
        return
    for folder in staging.glob("*"):
        if re.fullmatch(_MADE, folder.name):
            sweep(folder)
            remove_own(folder, _OWN)
    remove_own(staging, "")  # the folder itself, if that was all
