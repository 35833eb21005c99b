"""Audio to features: samples, one file, or every track of the conversion list."""

import hashlib
import re
import unicodedata
from collections import Counter
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

import numpy as np
from tqdm import tqdm

from gae import audio, storage
from gae.compute import beside_files, map_tracks
from gae.cqt import analyse, frame_times, single
from gae.errors import AudioError, FormatError, ParamsError, one_line
from gae.features import Features, Origin, check_suffix, validate, write
from gae.files import beside, code_digest, content_hash, digest, link, read_json, remove_own, sweep, write_json
from gae.index import read_index
from gae.locks import alone
from gae.mapping import extract_blocks
from gae.modelfile import Model, load_model
from gae.shards import Shards, read_blocks

SCHEMA = 1
_STEM = 100  # bytes of a file's stem that its features' name keeps


def extract(samples: np.ndarray, sample_rate: float, model: Model | str | Path | None = None) -> Features:
    """Features of a recording.

    Parameters
    ----------
    samples : array of numbers, shape (n,) or (n, channels)
        Of any scale from 1e-36 to 1e12; channels are mixed down.
    sample_rate : float
        In Hz; other rates than the model's are resampled.
    model : Model, str or Path, optional
        By default the weights that are shipped.

    Returns
    -------
    Features
        values (n_frames, n_maps) and times (n_frames,) in s.

    Raises
    ------
    AudioError
        If the samples are none, not numbers, NaN or infinite, of another shape, or the rate makes no sense.
    FormatError
        If the model can't be read.

    Examples
    --------
    >>> import gae, soundfile
    >>> samples, sample_rate = soundfile.read("song.flac")
    >>> features = gae.extract(samples, sample_rate)
    >>> features.values[features.times > 10]  # from 10 s on
    """
    mono = _mono(samples, sample_rate)
    model = _model(model)
    resampled = audio.resample(mono, sample_rate, model.cqt.sample_rate)
    with analyse([resampled], model.cqt) as analysis:
        if not analysis.n_frames:
            raise AudioError(f"samples: {len(mono)} at {sample_rate:g} Hz are too short to hold a frame; give more")
        values = np.concatenate(list(extract_blocks(analysis.blocks(), model)))
    return Features(values, frame_times(len(values), model.cqt), Origin(model.cqt, model_sha256=model.sha256))


def convert_file(path, out, model=None, dtype="float32"):
    """Convert one audio file, in constant memory, with a progress bar where it takes long.

    Parameters
    ----------
    path : str or Path
        Audio, or a URL of audio.
    out : str or Path
        Feature file to write: .h5, .npz or .csv.
    model : Model, str or Path, optional
        By default the weights that are shipped.
    dtype : {"float32", "float16"}
        How values are stored in .h5 and .npz.

    Returns
    -------
    int
        Number of frames.

    Raises
    ------
    AudioError
        If the audio can't be used.
    FormatError
        If the model can't be read, or `out` has another suffix.
    StorageError
        If a URL can't be reached.
    """
    check_suffix(out)
    with storage.fetched(path) as file:
        return _convert_file(file, out, _model(model), dtype, str(path))


def _convert_file(path, out, model, dtype, source):
    name = storage.named(source).name
    cqt, rate = model.cqt, model.cqt.sample_rate
    with analyse(_watched(audio.blocks(path, rate), 1 / rate, audio.claimed_seconds(path), name), cqt) as analysis:
        if not analysis.n_frames:
            raise AudioError(f"{path}: too short to hold a frame; record or export it again")
        values = _watched(
            extract_blocks(analysis.blocks(), model), cqt.frame_seconds, analysis.n_frames * cqt.frame_seconds, f"{name}, features"
        )
        origin = Origin(cqt, source, content_hash(path), model.sha256)
        write(out, values, (analysis.n_frames, model.sizes.n_maps), origin, dtype)
    return analysis.n_frames


def convert_list(params, shards, index, out):
    """Convert every track of the conversion list from its frames.

    Parameters
    ----------
    params : gae.params.Params
        Reads convert, data.convert_list and compute.
    shards : Path
        Folder of the list's shards.
    index : Path
        As `gae.index.index` writes it.
    out : Path
        Folder for a feature file each and index.json: {"schema", "model_sha256", "tracks": [{path, file, key, n_frames}],
        "skipped": [{path, list, line, reason}]}. Files there that are what would be written are kept, and so are those of a run that
        was broken off, wherever DVC put the folder back meanwhile (`gae.files.beside`).

    Raises
    ------
    FormatError
        If shards or model can't be read.
    ParamsError
        If the model takes other frames than the shards hold.
    GaeError
        If another process writes into the folder.
    """
    out, index, weights = Path(out), read_index(index), params.convert.weights
    model = load_model(weights)
    with Shards(shards) as folder:
        _same_cqt(model.cqt, folder.cqt, weights, shards)
        listed = {file["path"]: file for line in index["convert"] for file in line}
        frames = {path: folder.tracks[file["key"]] for path, file in listed.items() if file["key"] in folder.tracks}
    names, code = feature_names(frames), code_digest(["mapping"], ["numpy"])
    jobs = [
        {
            "source": path, "sha256": listed[path]["sha256"], "file": f"{names[path]}.h5",
            "key": track.key, "shard": str(track.file), "n_frames": track.n_frames,
            "made_by": digest([code, track.code, track.dtype, model.sizes.readings]),
        }
        for path, track in frames.items()
    ]  # fmt: skip
    arguments = (weights, model.sha256, str(out), params.convert.dtype)
    tracks = [{"path": job["source"], **{name: job[name] for name in ("file", "key", "n_frames")}} for job in jobs]
    skipped = _skipped(index, listed.keys() - frames.keys(), params.data.convert_list)
    with alone(out):
        _keep(out, {job["source"]: job["file"] for job in jobs})
        map_tracks(convert_track, jobs, beside_files(params.compute), "convert", arguments)
        sweep(out)  # not before: the workers of a run that was killed a moment ago may still have been writing
        _forget(out, {job["file"] for job in jobs})
        write_json(out / "index.json", {"schema": SCHEMA, "model_sha256": model.sha256, "tracks": tracks, "skipped": skipped})
        remove_own(beside(out), r".+\.h5")


def convert_track(job, weights, model_sha256, out, dtype):
    """Write one track's features, unless they are there or wait beside.

    Parameters
    ----------
    job : dict
        source and sha256 of the audio; shard, key and n_frames of its frames; file to write in `out`; made_by, as in
        `gae.features.Origin`.
    weights : str
        Model file.
    model_sha256 : str
        Hash that it must have.
    out : str
        Folder.
    dtype : {"float32", "float16"}
    """
    model, file = _remembered(weights, model_sha256), Path(out) / job["file"]
    origin = Origin(model.cqt, job["source"], job["sha256"], model_sha256, job["made_by"])
    if _holds(file, job["n_frames"], origin, dtype):
        return
    waiting = beside(out) / job["file"]
    if _holds(waiting, job["n_frames"], origin, dtype):
        with suppress(FileNotFoundError):  # the same by a worker that was believed dead
            waiting.replace(file)
    else:
        n_frames, blocks = read_blocks(job["shard"], job["key"])
        write(file, extract_blocks(blocks, model), (n_frames, model.sizes.n_maps), origin, dtype)
    link(file, waiting)


def listed(out):
    """The features that the index of a folder lists; other files may lie there.

    Parameters
    ----------
    out : Path
        As `convert_list` writes it.

    Returns
    -------
    dict of str to str
        For the path of each audio file the name of its features.

    Raises
    ------
    FormatError
        If the index is missing or damaged.
    """
    try:
        return {str(track["path"]): str(track["file"]) for track in read_json(out / "index.json")["tracks"]}
    except (OSError, ValueError, KeyError, TypeError):
        raise FormatError(f"{out / 'index.json'}: missing or damaged; run `dvc repro convert`") from None


def feature_names(paths):
    """A readable name for each path's features, without suffix: all different, even where case doesn't count.

    The name is the path's stem, what is not a letter, digit or one of ``_.+-`` replaced. Paths that would share a name all get
    their folder's name before it and the first digits of their path's hash behind, as does a stem that looks as if it
    had them: one path's name never depends on the order of the others.

    Parameters
    ----------
    paths : iterable of str

    Returns
    -------
    dict of str to str
    """
    stems = {path: _readable(storage.named(path).stem) for path in paths}
    shared = Counter(stem.casefold() for stem in stems.values())
    hashes = {path: hashlib.sha256(path.encode("utf-8", "surrogateescape")).hexdigest() for path in stems}
    marked = {path for path, stem in stems.items() if shared[stem.casefold()] > 1 or re.search("-[0-9a-f]{8,}$", stem, re.I)}
    stems |= {path: _readable(f"{storage.named(path).parent.name}-{storage.named(path).stem}".lstrip("-")) for path in marked}
    for digits in range(8, 65, 8):
        names = {path: f"{stem}-{hashes[path][:digits]}" if path in marked else stem for path, stem in stems.items()}
        if len({name.casefold() for name in names.values()}) == len(names):
            return names
    raise AssertionError("two paths have one hash")


def _model(model):
    return model if isinstance(model, Model) else load_model(model)


def _mono(samples, sample_rate):
    """Samples of a stranger as float32 (n,)."""
    if isinstance(samples, str | Path):
        raise AudioError(f"samples: {str(samples)!r}, the name of a file; gae.convert.convert_file takes files")
    rate_fits = isinstance(sample_rate, int | float | np.number) and 1000 <= sample_rate <= 768_000
    if not rate_fits:
        raise AudioError(f"sample_rate: got {sample_rate!r}, allowed: 1000 to 768000 Hz")
    if isinstance(samples, np.ma.MaskedArray):
        raise AudioError("samples: a masked array; fill what is masked first, samples.filled(0)")
    try:
        samples = np.asarray(samples)
    except (ValueError, TypeError, RuntimeError):  # ragged, or a tensor that can't become an array
        samples = np.empty(0, object)
    if samples.dtype.kind not in "iuf":
        raise AudioError(f"samples: of type {samples.dtype}; give an array of real numbers")
    if samples.ndim not in (1, 2) or samples.size == 0:
        raise AudioError(f"samples: of shape {samples.shape}; give (n,) or (n, channels), not empty")
    if samples.ndim == 2 and samples.shape[1] > min(64, len(samples)):
        raise AudioError(f"samples: of shape {samples.shape}, so {samples.shape[1]} channels; give (n, channels), perhaps samples.T")
    mono = audio.mono(single(samples))
    if not (np.abs(mono) < audio.LOUDEST).all():  # NaN compares as false
        raise AudioError("samples: NaN, infinite or too large; clean them first")
    return mono


def _watched(blocks, seconds, total, label):
    """Pass blocks of so many seconds a row on, with a bar of the music's time once it has taken 2 s."""
    rows = 0
    with tqdm(total=round(total), desc=one_line(label), unit="s", delay=2, mininterval=0.5, leave=None) as bar:
        for block in blocks:
            yield block
            rows += len(block)
            bar.update(int(rows * seconds) - bar.n)


def _skipped(index, without_frames, convert_list):
    """What the list names and is not converted: found when it was indexed, or later when its frames were computed."""
    reason = "its frames could not be computed; see the warnings of preprocess"
    late = [{"path": path, "list": convert_list, "line": None, "reason": f"{path}: {reason}"} for path in sorted(without_frames)]
    return [file for file in index["skipped"] if file["list"] == convert_list] + late


def _same_cqt(models, shards, weights, folder):
    """Features of frames that the model was not made for would be noise."""
    if shards is None:
        raise FormatError(f"{folder}: holds no frames; run `dvc repro preprocess`")
    models, shards = models.model_dump(), shards.model_dump()
    differing = [f"cqt.{key} is {shards[key]}, the model's is {models[key]}" for key in models if models[key] != shards[key]]
    if differing:
        raise ParamsError(f"{weights}: takes other frames ({'; '.join(differing)}); set the model's values in params.yaml, or train again")


@lru_cache(maxsize=1)
def _remembered(weights, sha256):
    """The model, read once in each process."""
    model = load_model(weights)
    if model.sha256 != sha256:
        raise FormatError(f"{weights}: changed while it was used; run again")
    return model


def _holds(file, n_frames, origin, dtype):
    try:
        header = validate(file)
    except FormatError:
        return False
    return (header.n_frames, header.origin, header.dtype) == (n_frames, origin, dtype)


def _keep(out, files):
    """Rename features of before whose name is another now, as where a track of the same name joined the list or left it."""
    free = {file.name for file in out.glob("*.h5")}.difference(files.values())
    for source, name in _listed_before(out).items():
        if name in free and source in files and not (out / files[source]).exists():
            (out / name).rename(out / files[source])
            free.remove(name)


def _forget(out, files):
    """Remove the features in the folder that are no longer wanted: those that its last index lists, and those of a run that was stopped."""
    before = set(_listed_before(out).values())
    for file in out.glob("*.h5"):
        if file.name not in files and (file.name in before or _made_by_a_run(file)):
            file.unlink()


def _listed_before(out):
    """As `listed`, and nothing where there is no index."""
    try:
        return listed(out)
    except FormatError:
        return {}


def _made_by_a_run(file):
    """Whether a file is one of `convert_track`, and not from elsewhere."""
    try:
        return bool(validate(file).origin.made_by)
    except FormatError:
        return False


def _readable(stem):
    """A stem that every file system takes: letters and digits of any script, no leading dot or dash, a bounded length."""
    plain = re.sub(r"[^\w.+-]+", "_", unicodedata.normalize("NFKC", stem))
    return plain.encode()[:_STEM].decode(errors="ignore").strip("._-") or "track"
