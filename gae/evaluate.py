"""Features judged on held-out music, next to plain ones: invariance, alignment, reconstruction, speed.

Every held-out piece is there three times: as written, transposed by k semitones with the same timing, and performed in
another sound with a timing of its own.
"""

import math
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter

import numpy as np
from tqdm import tqdm

from gae import audio
from gae.compute import beside_files, map_tracks
from gae.convert import convert_file
from gae.cqt import compress, magnitude_blocks, silence, standardise, transpose
from gae.errors import AudioError, FormatError, ParamsError
from gae.files import read_json, replacing, write_json
from gae.mapping import extract_frames, with_past
from gae.measures import align, beats_within, bootstrap, invariance_top1, pool, stack
from gae.modelfile import load_model


@dataclass(frozen=True)
class Kind:
    """A kind of feature.

    Attributes
    ----------
    label : str
    rows : str
        Of which of the rows of `_represent` it is made.
    context : bool
        Each row beside those before it that lie in the context of our model.
    rotated : bool
        In all 12 keys, of which the best counts.
    """

    label: str
    rows: str
    context: bool = False
    rotated: bool = False


KINDS = {
    "gae": Kind("gated autoencoder", "gae"),
    "cqt_context": Kind("CQT shifted back by k, context", "cqt_shifted_back", context=True),
    "cqt_shifted_back": Kind("CQT shifted back by k", "cqt_shifted_back"),
    "cqt": Kind("CQT", "cqt"),
    "chroma_context": Kind("chroma, best of 12, context", "chroma", context=True, rotated=True),
    "chroma_best_shift": Kind("chroma, best of 12 shifts", "chroma", rotated=True),
    "chroma": Kind("chroma", "chroma"),
}
TOLERANCES = {"50ms": 0.05, "100ms": 0.1, "250ms": 0.25}
_EXCERPT = 512  # frames rebuilt with one transposition


def evaluate(params, corpus, out, metrics, text):
    """Measure features on the held-out pieces of the built-in corpus, write the figures and print them as a table.

    Parameters
    ----------
    params : gae.params.Params
        Reads evaluate, compute, and convert.weights: the model to judge, by its own CQT parameters throughout. Without
        `evaluate.baselines` no other kind of feature is judged.
    corpus : Path
        Folder of `gae.corpus`.
    out : Path
        JSON. All figures but `pieces` and `speed` are in percent, means over the pieces, each with its standard error beside it,
        named `<figure>_se`, by bootstrap over the pieces:

        pieces
            How many were held out.
        invariance.<kind>.top1, top1_stacked
            Frames whose counterpart in the transposed rendering is the nearest by cosine among all pieces' candidates, for
            one frame and for `evaluate.stack` successive ones.
        alignment.<kind>.{transposed,untransposed}.{50ms,100ms,250ms}
            Beats that dynamic time warping of the score's rendering to the performance puts within the tolerance.
        reconstruction.relative_error, of_a_copy
            Squared error, relative to the signal's power, of transposed frames rebuilt from the mapping of the untransposed; and of
            the frame before in the place of each. Frames that lie further apart, or are compressed, are harder to foresee.
        speed.conversion_times_real_time
            Seconds of audio that become features in a second, in one process, from the file on.
    metrics : Path
        JSON. What `dvc metrics` and `dvc exp show` compare, as `comparison` makes it of these.
    text : Path
        The table that is printed.

    Raises
    ------
    FormatError
        If the corpus, or audio in it, or the model is missing or damaged.
    ParamsError
        If a piece is shorter than `evaluate.stack` frames.
    """
    pieces = heldout_pieces(corpus)
    model = load_model(params.convert.weights)  # before any work, lest it be missing
    settings = params.evaluate
    arguments = (Path(corpus), Path(params.convert.weights), settings)
    reports = map_tracks(judge, list(enumerate(pieces)), beside_files(params.compute), "evaluate", arguments)
    figures = {
        "pieces": len(pieces),
        "invariance": _invariance(reports, settings),
        "alignment": _alignment(reports, settings),
        "reconstruction": {
            **_figure("relative_error", [report["reconstruction"] for report in reports], settings),
            **_figure("of_a_copy", [report["copy"] for report in reports], settings),
        },
        "speed": {"conversion_times_real_time": _conversion_speed(pieces, corpus, model)},
    }
    write_json(out, figures)
    write_json(metrics, comparison(figures))
    with replacing(text) as partial:
        partial.write_text(table(figures) + "\n", encoding="utf-8")
    print(table(figures))


def read_figures(path):
    """The figures that `evaluate` wrote to a JSON.

    Raises
    ------
    FormatError
        If it is missing, or lacks some.
    """
    try:
        figures = read_json(path)
        table(figures)  # which has all of them
    except (OSError, ValueError, KeyError, TypeError, OverflowError):  # a number too large for a float
        raise FormatError(f"{path}: missing or damaged; run `dvc repro evaluate`") from None
    return figures


def heldout_pieces(corpus):
    """The held-out pieces of a corpus: list of dict, as in its corpus.json."""
    index = Path(corpus) / "corpus.json"
    try:
        pieces = [piece for piece in read_json(index)["pieces"] if piece["split"] == "heldout"]
        whole = all(map(_is_whole, pieces))
        aligned = any(piece["beats"]["score"] for piece in pieces)
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        whole = False
    if not whole:
        raise FormatError(f"{index}: missing or damaged; run `dvc repro corpus`")
    if not pieces:
        raise FormatError(f"{index}: holds no held-out piece; raise corpus.heldout and run `dvc repro corpus`")
    if not aligned:
        raise FormatError(f"{index}: no held-out piece has beats to align by; raise corpus.heldout and run `dvc repro corpus`")
    return pieces


def _is_whole(piece):
    """Whether all that is used of a held-out piece is there."""
    score, performance = piece["beats"]["score"], piece["beats"]["performance"]
    aligned = len(score) == len(performance) and all(map(math.isfinite, [*score, *performance]))
    return aligned and isinstance(piece["id"], str) and isinstance(piece["k"], int) and abs(piece["k"]) <= 12


def heldout_file(corpus, piece, take):
    """The audio of a held-out piece; `take` is "original", "transposed" or "performance"."""
    return Path(corpus) / "heldout" / piece["id"] / f"{take}.flac"


@contextmanager
def intact(path):
    """Say of a held-out piece whose audio can't be read that it is to be rendered again: there is no original to copy."""
    try:
        yield
    except AudioError:
        raise FormatError(f"{path}: missing or damaged; run `dvc repro corpus`") from None


def judge(item, corpus, model, settings):
    """Measure all that concerns one piece alone, and draw the frames that are to be found again among all pieces'.

    Parameters
    ----------
    item : tuple of int and dict
        Number (it seeds the draw) and entry of the piece.
    corpus, model : Path
    settings : gae.params.Evaluate

    Returns
    -------
    dict
        samples: for each kind of feature, stacks of the original and of the transposed rendering, each
        (frames, stack, d); alignment: shares of beats, nothing where the score has none; reconstruction and copy: relative errors.
    """
    number, piece = item
    model = load_model(model)
    k = piece["k"]
    original, transposed, performance = (
        _represent(heldout_file(corpus, piece, take), model, semitones)
        for take, semitones in (("original", 0), ("transposed", k), ("performance", 0))
    )
    rng = np.random.default_rng([settings.seed, number])
    apart = np.random.default_rng([settings.seed, number, 1])  # lest the number of frames to find change the error
    starts = _draw(min(len(original["cqt"]), len(transposed["cqt"])), settings, rng, piece)
    kinds = KINDS if settings.baselines else {"gae": KINDS["gae"]}
    lags = {name: [*model.sizes.lags, 0] if kind.context else [0] for name, kind in kinds.items()}
    return {
        "samples": {
            name: [_sample(take[kind.rows], lags[name], starts, settings) for take in (original, transposed)]
            for name, kind in kinds.items()
        },
        "alignment": {
            (name, key): _beats_found(kind, lags[name], score, performance, piece["beats"], model.cqt, settings)
            for name, kind in kinds.items()
            for key, score in (("transposed", transposed), ("untransposed", original))
            if piece["beats"]["score"]
        },
        "reconstruction": reconstruction_error(original["cqt"], model.network, settings.shift, apart),
        "copy": copy_error(original["cqt"]),
    }


def reconstruction_error(frames, network, shift, rng):
    """How well the mapping of a passage rebuilds the same passage in another key.

        sum_t |y_hat(m_t, S x_t) - S y_t|^2 / sum_t |S y_t|^2        m_t: mapping of x_t and y_t; S: transposition

    Parameters
    ----------
    frames : ndarray of float32, shape (n_frames, n_bins)
    network : GatedAutoencoder
    shift : int
        S is drawn anew for every 512 frames, from -shift to shift bins; never so far that nothing is left of a frame.
    rng : numpy.random.Generator

    Returns
    -------
    float
        0 is perfect, 1 is what silence gives, `copy_error` what no model is needed for.
    """
    import torch  # not above: it takes a second, and the processes that import this module need not

    x = with_past(frames, network.sizes.reach)[:-1]
    error, power, shift = 0.0, 0.0, min(shift, frames.shape[1] - 1)
    for start in range(0, len(frames), _EXCERPT):
        y = frames[start : start + _EXCERPT]
        before = x[start : start + len(y) + network.sizes.reach - 1]
        bins = int(rng.integers(-shift, shift + 1))
        target = transpose(y, bins)
        given = [torch.from_numpy(array)[None] for array in (before, y, transpose(before, bins))]
        with torch.no_grad():
            rebuilt = network.reconstruct(network.mapping(*given[:2]), given[2])[0].numpy()
        error += float(np.square(rebuilt - target).sum())
        power += float(np.square(target).sum())
    return error / power if power else 0.0


def copy_error(frames):
    """What `reconstruction_error` is of frames (n_frames, n_bins) if each is taken for the next: a share of their power."""
    power = float(np.square(frames).sum())
    return float(np.square(np.diff(frames, axis=0)).sum()) / power if power else 0.0


def comparison(figures):
    """What `dvc metrics` shows of the figures that `evaluate` writes: a row for each kind of feature, in percent, and speed.

    Each figure has its standard error over the pieces beside it, `<figure>_se`.
    """
    rows = {}
    for kind in _judged(figures):
        found, aligned = figures["invariance"][kind], figures["alignment"][kind]
        rows[kind] = {name + error: found[name + error] for name in ("top1", "top1_stacked") for error in ("", "_se")}
        for key, named in (("transposed", ""), ("untransposed", "_untransposed")):
            rows[kind] |= {f"beats_{span}{named}{error}": aligned[key][span + error] for span in TOLERANCES for error in ("", "_se")}
    rows |= {f"reconstruction_error{error}": figures["reconstruction"][f"relative_error{error}"] for error in ("", "_se")}
    rows["times_real_time"] = figures["speed"]["conversion_times_real_time"]
    return rows


def table(figures):
    """The figures that `evaluate` writes as plain text: a line for each kind of feature, then the rest."""
    spans = [name.replace("ms", " ms") for name in TOLERANCES]
    lines = [
        _line(f"{figures['pieces']} held-out pieces", ["nearest of all", "", "beats, transposed", "", "", "beats, as written"]),
        _line("percent ± standard error", ["1 frame", "stacked", *spans, *spans]),
    ]
    for kind in _judged(figures):
        aligned = figures["alignment"][kind]
        columns = [(figures["invariance"][kind], name) for name in ("top1", "top1_stacked")]
        columns += [(aligned[key], name) for key in ("transposed", "untransposed") for name in TOLERANCES]
        lines.append(_line(KINDS[kind].label, [f"{group[name]:5.1f} ± {group[name + '_se']:.1f}" for group, name in columns]))
    rebuilt, speed = figures["reconstruction"], figures["speed"]
    error, copied = (f"{rebuilt[name]:.1f} ± {rebuilt[name + '_se']:.1f} %" for name in ("relative_error", "of_a_copy"))
    lines.append(f"\nreconstruction: error {error} of the signal's power; the frame before in its place: {copied}")
    lines.append(f"conversion: {speed['conversion_times_real_time']:.0f} times real time in one process")
    return "\n".join(lines)


def _judged(figures):
    """Names of the kinds of feature that were judged: all, or ours alone."""
    return [kind for kind in KINDS if kind == "gae" or kind in figures["invariance"]]


def chroma(magnitudes, cqt):
    """Magnitudes (n_frames, n_bins) folded into 12 pitch classes: (n_frames, 12). A bin between two semitones is shared."""
    position = np.arange(cqt.n_bins) * 12 / cqt.bins_per_octave
    lower = np.floor(position).astype(int)
    fold = np.zeros((cqt.n_bins, 12), np.float32)
    rows = np.arange(cqt.n_bins)
    fold[rows, lower % 12] = 1 - (position - lower)
    fold[rows, (lower + 1) % 12] += position - lower
    return magnitudes @ fold


def delayed(values, lags):
    """For each of `lags`, in frames: what was so long before each row of (n_frames, d), as many; before the first stand copies of it."""
    joined = with_past(values, max(lags))
    return (joined[max(lags) - lag :][: len(values)] for lag in lags)


def _represent(path, model, k):
    """A recording that was transposed by k semitones, as the rows of which kinds of features are made: (n_frames, d) each."""
    cqt = model.cqt
    with intact(path):
        magnitudes = np.concatenate(list(magnitude_blocks(audio.blocks(path, cqt.sample_rate), cqt)))
    compressed = compress(silence(magnitudes, magnitudes.max()), magnitudes.max(), cqt)
    frames = standardise(compressed)
    # standardised first: what comes in from beyond the range is then unknown, not silent, and more is found
    shifted_back = transpose(frames, -cqt.bins(k))
    return {
        "gae": extract_frames(frames, model),
        "cqt_shifted_back": shifted_back,
        "cqt": frames,
        "chroma": chroma(compressed, cqt),
    }


def _draw(n_frames, settings, rng, piece):
    """Frames to look for: at random, all different, none so near the end that its stack is cut off."""
    possible = n_frames - settings.stack + 1
    if possible < 1:
        raise ParamsError(f"evaluate.stack: got {settings.stack} frames, allowed: up to {n_frames}, the length of {piece['id']}")
    return np.sort(rng.choice(possible, min(settings.frames, possible), replace=False))


def _sample(values, lags, starts, settings):
    """Stacks of rows in their context: (frames, stack, d)."""
    parts = [stack(part, starts, settings.stack).reshape(len(starts), settings.stack, -1) for part in delayed(values, lags)]
    return np.concatenate(parts, axis=-1)


def _pooled(values, lags, n):
    """Means of `n` rows each, in their context: all rows in it would take twice the memory."""
    return np.concatenate([pool(part, n) for part in delayed(values, lags)], axis=1)


def _versions(kind, values):
    """A kind of feature (..., d) in the versions of which the best counts: chroma in all 12 rotations."""
    if not kind.rotated:
        return values[None]
    classes = values.reshape(*values.shape[:-1], -1, 12)
    return np.stack([np.roll(classes, shift, axis=-1).reshape(values.shape) for shift in range(12)])


def _beats_found(kind, lags, score, performance, beats, cqt, settings):
    """Share of the performance's beats within each tolerance, when its beats are taken over from the aligned score."""
    n = max(1, round(settings.alignment_hop / cqt.frame_seconds))
    hop, first = n * cqt.frame_seconds, (n - 1) / 2 * cqt.frame_seconds  # spacing of the pooled frames and centre of the first
    score, performance = (_pooled(take[kind.rows], lags, n) for take in (score, performance))
    alignment = align(_likeliest(_versions(kind, score), performance), performance)
    estimated = alignment.times(beats["score"], hop, first)
    return beats_within(estimated, beats["performance"], TOLERANCES.values())


def _likeliest(versions, performance):
    """The version of a score that aligns at the least cost, of several: told by means of four frames, in a sixteenth of the time."""
    if len(versions) == 1:
        return versions[0]
    short = pool(performance, 4)
    return min(versions, key=lambda version: align(pool(version, 4), short).cost)


def _invariance(reports, settings):
    """Top-1 for each kind of feature, over the candidates of all pieces together."""
    figures = {kind: {} for kind in reports[0]["samples"]}
    for kind in tqdm(figures, desc="invariance", unit="feature", leave=False):
        samples = [report["samples"].pop(kind) for report in reports]  # the frames of all pieces take memory: each kind's go with it
        for name, n in (("top1", 1), ("top1_stacked", settings.stack)):
            queries, candidates = (np.concatenate([sides[side][:, :n] for sides in samples]) for side in (0, 1))
            versions = _versions(KINDS[kind], queries)
            found = invariance_top1(versions.reshape(*versions.shape[:2], -1), candidates.reshape(len(candidates), -1))
            ends = np.cumsum([len(original) for original, _ in samples])
            figures[kind] |= _figure(name, [part.mean() for part in np.split(found, ends[:-1])], settings)
    return figures


def _alignment(reports, settings):
    def figures(kind, key):
        shares = np.array([report["alignment"][kind, key] for report in reports if report["alignment"]])
        return {name: value for n, column in enumerate(TOLERANCES) for name, value in _figure(column, shares[:, n], settings).items()}

    kinds = dict.fromkeys(kind for report in reports for kind, _ in report["alignment"])
    return {kind: {key: figures(kind, key) for key in ("transposed", "untransposed")} for kind in kinds}


def _figure(name, values, settings):
    """Mean over the pieces and its standard error, in percent."""
    error = float(bootstrap(values, settings.bootstrap, settings.seed))
    return {name: round(100 * float(np.mean(values)), 2), f"{name}_se": round(100 * error, 2)}


def _conversion_speed(pieces, corpus, model):
    """Seconds of audio that become a feature file in one second, in this process."""
    files = [heldout_file(corpus, piece, "original") for piece in pieces]
    with TemporaryDirectory() as folder:
        out = Path(folder) / "features.h5"
        convert_file(files[0], out, model)  # compiles and loads what later runs find ready
        begun = perf_counter()
        n_frames = sum(convert_file(file, out, model) for file in tqdm(files, desc="speed", unit="track", leave=False))
        return round(n_frames * model.cqt.frame_seconds / (perf_counter() - begun), 1)


def _line(label, cells):
    return f"{label:<32}" + "".join(f"{cell:<13}" for cell in cells).rstrip()
