"""The pictures of a finished run: what is read for them. `gae.pictures` draws."""

from pathlib import Path

import numpy as np
from tqdm import tqdm

from gae import audio, features, pictures
from gae.compute import beside_files, map_tracks
from gae.convert import feature_names, listed
from gae.cqt import frames as cqt_frames
from gae.errors import FormatError
from gae.evaluate import KINDS, TOLERANCES, heldout_file, heldout_pieces, intact, read_figures
from gae.files import code_digest, content_hash, digest, sweep
from gae.mapping import extract_frames
from gae.measures import pool
from gae.modelfile import load_model
from gae.shards import Shards

_MATRIX = 900  # rows of a self-similarity matrix, at most
_BLOCK = 1 << 15  # frames of features read at a time


def draw(params, corpus, shards, tracks, metrics, figures):
    """Draw all pictures of a finished run.

    Parameters
    ----------
    params : gae.params.Params
        Reads plot, compute, and convert.weights: the model that made the features.
    corpus : Path
        Folder of `gae.corpus`: its first held-out piece is shown in two keys.
    shards : Path
        Folder of shards: an excerpt of its first track is what the network is shown with.
    tracks : Path
        Folder of features; each that its index lists gets a picture, named by the file's stem.
    metrics : Path
        JSON that `gae.evaluate` wrote.
    figures : Path
        Folder for the pictures: PNG, those of the tracks in figures/tracks. Those there of tracks that are what they were are kept.

    Raises
    ------
    FormatError
        If the corpus, the shards, the features, the metrics or the model are missing or damaged.
    """
    model, evaluation, tracks = load_model(params.convert.weights), read_figures(metrics), Path(tracks)
    heldout_pieces(corpus)  # before any work, lest it be missing
    if not tracks.is_dir():
        raise FormatError(f"{tracks}: no such folder; run `dvc repro convert`")
    drawn = _drawn(tracks)
    cqt, plot, figures = model.cqt, params.plot, Path(figures)
    labels = {name: kind.label for name, kind in KINDS.items() if name in evaluation["invariance"]}
    frames, past, begin, title = _excerpt(shards, model, plot)
    drawings = (
        lambda: pictures.draw_input(frames[past:], cqt, begin, title, figures / "input.png", plot),
        lambda: pictures.draw_network(model.network, cqt, frames, figures, plot=plot, past=past, begin=begin),
        lambda: pictures.draw_metrics(evaluation, labels, TOLERANCES, figures / "metrics.png", plot),
        lambda: _draw_heldout(Path(corpus), model, figures / "transposition.png", plot),
    )
    for drawing in tqdm(drawings, desc="pictures", unit="picture"):
        drawing()
    code = code_digest(["features", "measures", "pictures", "plot"], ["matplotlib", "numpy", "pillow"])
    map_tracks(draw_track, drawn, beside_files(params.compute), "tracks", (figures / "tracks", plot, code))
    sweep(figures)
    _forget(figures / "tracks", {file.stem for file in drawn})


def _drawn(tracks):
    """The feature files of a folder that its index lists."""
    names = sorted(set(listed(tracks).values()))
    there = {file.name: file for file in tracks.glob("*.h5")}
    if lost := [name for name in names if name not in there]:
        raise FormatError(f"{tracks}: lacks {lost[0]}, which its index lists; run `dvc repro convert`")
    return [there[name] for name in names]


def _forget(folder, stems):
    """Remove the pictures of tracks that are drawn no more."""
    for picture in folder.glob("*.png"):
        if picture.stem not in stems and pictures.made_of(picture):  # other files may lie there
            picture.unlink(missing_ok=True)


def draw_track(file, folder, plot, code=""):
    """Draw a feature file of any length, by `gae.pictures.draw_track`, to folder/<stem of file>.png, unless that is there.

    Parameters
    ----------
    file, folder : str or Path
    plot : gae.params.Plot
    code : str
        Digest of what draws.
    """
    title = Path(file).stem
    picture, origin = Path(folder) / f"{title}.png", digest([code, plot.dpi, title, content_hash(file)])
    if pictures.made_of(picture) != origin:
        pooled, seconds = _pooled(file)
        pictures.draw_track(pooled, seconds, title, picture, plot, origin)


def _excerpt(folder, model, plot):
    """Frames from the middle of the first track of a folder of shards, how many of them are their past, the time after it, and a title."""
    cqt = model.cqt
    with Shards(folder) as shards:
        if not shards.lines:
            raise FormatError(f"{folder}: holds no track; run `dvc repro preprocess`")
        if shards.cqt != cqt:
            raise FormatError(f"{folder}: made with other cqt parameters than the model's; run `dvc repro`")
        track = shards.lines[0][0]
        n_frames = min(track.n_frames, pictures.excerpt_length(plot, cqt))
        start = (track.n_frames - n_frames) // 2
        past = min(start, model.sizes.reach)
        title = feature_names([line[0].path for line in shards.lines])[track.path]
        return shards.read(track.key, start - past, start + n_frames), past, start * cqt.frame_seconds, title


def _pooled(file):
    """The features of a file of any length, pooled to a bounded number of frames, and their duration in s."""
    header = features.validate(file)
    if not header.n_frames:
        raise FormatError(f"{file}: holds no frame; remove it and run `dvc repro convert`")
    n = -(-header.n_frames // _MATRIX)
    step = n * max(1, _BLOCK // n)
    blocks = (features.read(file, start, start + step).values for start in range(0, header.n_frames, step))
    return np.concatenate([pool(block.astype(np.float32), n) for block in blocks]), header.n_frames * header.origin.cqt.frame_seconds


def _heldout_frames(file, cqt):
    with intact(file):
        return cqt_frames(audio.load(file, cqt.sample_rate), cqt)


def _draw_heldout(corpus, model, path, plot):
    """The features of the first held-out piece in two keys."""
    piece, cqt = heldout_pieces(corpus)[0], model.cqt
    n_frames = pictures.excerpt_length(plot, cqt)
    files = [heldout_file(corpus, piece, take) for take in ("original", "transposed")]
    original, transposed = (extract_frames(_heldout_frames(file, cqt), model) for file in files)
    start = max(0, (min(len(original), len(transposed)) - n_frames) // 2)
    passage = slice(start, start + n_frames)
    pictures.draw_transposition(original[passage], transposed[passage], piece["k"], cqt, start * cqt.frame_seconds, piece["id"], path, plot)
