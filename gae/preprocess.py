"""The listed audio to frames, each content once, kept between runs."""

from pathlib import Path

from gae import audio, shards
from gae.commandline import warn
from gae.compute import map_tracks
from gae.cqt import analyse
from gae.errors import AudioError, FormatError, ListError
from gae.files import content_hash, digest, sweep
from gae.index import read_index


def preprocess(params, index_file, out, staging):
    """Compute the frames that are missing, and make the shards hold just the listed tracks.

    A track is known by its content and by the parameters of the transform: a file that was moved, or is on both lists, is
    not computed again. Each track's frames wait in a file of their own until the shards are written, so a killed run
    loses only the tracks it was at.

    Parameters
    ----------
    params : gae.params.Params
        Reads cqt, data and compute.
    index_file : Path
        As `gae.index.index` writes it.
    out : Path
        Folder of shards for each list: out/train and out/convert.
    staging : Path
        Folder for computed tracks that are in no shard yet; gone at the end.

    Raises
    ------
    AudioError
        If a file changed since it was indexed, or can't be used and data.on_error is "stop".
    ListError
        If nothing usable is left of a list.
    FormatError
        If the index is missing or damaged.
    """
    indexed = read_index(index_file)
    lists = {Path(out) / role: indexed[role] for role in ("train", "convert")}
    place = Path(staging) / digest([params.cqt.model_dump(), params.data.dtype])[:16]
    held = {folder: _tracks_in(folder, params) for folder in lists}
    staged = _tracks_in(place, params)
    lent = _lend(lists, held, staged, place)

    files = {file["key"]: file for lines in lists.values() for line in lines for file in line}
    missing = [files[key] for key in sorted(files.keys() - staged.keys() - lent.keys() - set().union(*held.values()))]
    failures = map_tracks(compute_track, missing, params.compute, "frames", (params.cqt, params.data.dtype, place))
    computed = {}
    for file, failure in zip(missing, failures, strict=True):
        if failure:
            _refuse(failure, params.data.on_error)
        else:
            computed[file["key"]] = place / f"{file['key']}.h5"

    for folder, lines in lists.items():
        sources = {**computed, **lent, **staged, **held[folder]}
        views = [[(file["key"], file["path"]) for file in line if file["key"] in sources] for line in lines]
        if not any(views):
            raise ListError(f"{index_file}: nothing usable is left of the {folder.name} list; see the warnings above")
        shards.write_folder(folder, [line for line in views if line], sources, params.cqt, params.data.shard_mb << 20)
    _remove(Path(staging))


def compute_track(file, cqt, dtype, place):
    """Decode one file and write its frames.

    Parameters
    ----------
    file : dict
        path, key, sha256 and seconds, as in the index.
    cqt : gae.params.Cqt
    dtype : {"float16", "float32"}
    place : Path
        The frames go to place/<key>.h5, a shard of one track.

    Returns
    -------
    str or None
        Why it can't be used, in one line; None if all went well.
    """
    try:
        with analyse(audio.blocks(file["path"], cqt.sample_rate), cqt) as analysis:
            if content_hash(file["path"]) != file["sha256"]:
                return f"{file['path']}: changed while it was read; run again"
            with shards.writing(place / f"{file['key']}.h5", cqt, durable=False) as shard:
                facts = {"path": file["path"], "duration": file["seconds"], "peak": analysis.peak}
                shards.add_track(shard, file["key"], analysis.blocks(), cqt.n_bins, dtype, **facts)
    except AudioError as error:
        return str(error)
    return None


def _tracks_in(folder, params):
    """The tracks that a folder holds already, made with these parameters: {key: shard}."""
    sweep(folder)
    tracks = {}
    for file in sorted(folder.glob("*.h5")):
        try:
            cqt, found = shards.read_shard(file)
        except FormatError as error:
            warn(f"{error} (its tracks are computed again)")
            file.unlink()
            continue
        if cqt == params.cqt and all(track.dtype == params.data.dtype for track in found.values()):
            tracks |= dict.fromkeys(found, file)
    return tracks


def _lend(lists, held, staged, place):
    """Copy aside what one list's folder holds and the other's needs: the first may be rewritten before the second."""
    lent = {}
    for folder, lines in lists.items():
        wanted = {file["key"] for line in lines for file in line}
        for other in held:
            for key in wanted & held[other].keys() - held[folder].keys() - staged.keys():
                shards.copy_track(held[other][key], key, place / f"{key}.h5")
                lent[key] = place / f"{key}.h5"
    return lent


def _refuse(failure, on_error):
    if on_error == "stop" or failure.endswith("run again"):
        raise AudioError(failure)
    warn(f"skipped {failure}")


def _remove(staging):
    """Remove the staged tracks, those of other parameters and half-written ones too, and nothing else."""
    sweep(staging)
    for file in staging.glob("*/*.h5"):
        file.unlink()
    for folder in [*staging.glob("*"), staging]:
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
