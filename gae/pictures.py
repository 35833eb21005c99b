"""Pictures of frames, networks, features and figures, each drawn from arrays.

What their parameters mean: `path` is the PNG file to write, `plot` the `gae.params.Plot` that sets resolution and extent, `cqt` the
`gae.params.Cqt` of the frames, `network` a `gae.model.GatedAutoencoder`, `begin` the time of the first frame in s; `title` names the
piece, and `suffix` is added to titles. A function's own are with it.
"""

import warnings
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import librosa
import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter, PercentFormatter
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from gae.cqt import transpose
from gae.files import replacing
from gae.mapping import extract_frames, with_past
from gae.measures import stack, unit
from gae.params import Plot

_STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelcolor": "#444444",
    "axes.edgecolor": "#888888",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "xtick.color": "#666666",
    "ytick.color": "#666666",
    "legend.frameon": False,
    "image.aspect": "auto",
    "image.origin": "lower",
    "image.interpolation": "antialiased",
}
_WIDTH = 10  # inches
_ACCENT, _QUIET = "#b5123e", "#d9a3b0"
_COLOURS = {
    "gae": _ACCENT, "cqt_context": "#1d3f56", "cqt_shifted_back": "#31688e", "cqt": "#9fbfd6",
    "chroma_context": "#3f3f3f", "chroma_best_shift": "#7f7f7f", "chroma": "#c4c4c4",
}  # fmt: skip
_MAGNITUDE, _SIGNED = "magma", "RdBu_r"
_INTERVAL = 5  # semitones by which the pictures of a reconstruction are transposed
_DIAGONAL = 8  # successive pooled frames compared at a time in it
_TITLE = 60  # signs of a name in a title
_COLUMNS = 16  # filters beside each other


def draw_network(network, cqt, frames, folder, step=None, plot=None, past=0, begin=0.0):
    """Draw what the network does with some frames, and what it has learnt: reconstruction, mapping, filters, histograms.

    Parameters
    ----------
    network : GatedAutoencoder
    cqt : gae.params.Cqt
    frames : ndarray of float32, shape (n_frames, n_bins)
        An excerpt of standardised frames; more than plot.seconds after the `past` are not drawn.
    folder : Path
    step : int or None
        Step of the training, which then is part of the files' names.
    plot : gae.params.Plot or None
        None for the defaults.
    past : int
        Frames at the beginning that are context alone and not drawn.
    begin : float
        Time of the first frame that is drawn, in s.
    """
    plot = plot or Plot()
    name = "{}.png" if step is None else f"{{}}-{step:07d}.png"
    suffix = "" if step is None else f", step {step}"
    frames = frames[: past + excerpt_length(plot, cqt)]
    mapping = extract_frames(frames, network)[past:]
    third = max(2, len(mapping) // 3)
    bins = min(max(1, cqt.bins(_INTERVAL)), cqt.n_bins - 1)
    target, rebuilt = (some[past:] for some in _rebuild(frames[: past + third], network, bins))
    frames, folder = frames[past:], Path(folder)
    draw_reconstruction(frames[:third], target, rebuilt, bins, cqt, begin, folder / name.format("reconstruction"), plot, suffix)
    draw_mapping(frames, mapping, cqt, begin, folder / name.format("mapping"), plot, suffix)
    draw_filters_x(network, cqt, folder / name.format("filters_x"), plot, suffix)
    draw_filters_y(network, cqt, folder / name.format("filters_y"), plot, suffix)
    draw_histograms(network, frames, mapping, rebuilt, folder / name.format("histograms"), plot, suffix)


def draw_input(frames, cqt, begin, title, path, plot):
    """Draw standardised frames (n_frames, n_bins) as the network gets them, the first at `begin` s."""
    with _picture(path, plot, 3.6) as figure:
        axes = figure.subplots()
        image = _show_pitch(axes, frames, cqt, _times(begin, frames, cqt), _range(frames))
        axes.set(title=f"Input: constant-Q frames of {_plain(title)}", xlabel="time (s)")
        _scale(figure, image, axes, "standardised magnitude")


def draw_reconstruction(frames, target, rebuilt, bins, cqt, begin, path, plot, suffix=""):
    """Draw frames, the same transposed by some bins, and what the network makes of their mapping in the transposed context.

    Parameters
    ----------
    frames, target, rebuilt : ndarray, shape (n_frames, n_bins)
    bins : int
    """
    error = np.square(rebuilt - target).sum() / max(1e-12, np.square(target).sum())
    titles = (
        "As played",
        f"Target: {bins * 12 / cqt.bins_per_octave:.3g} semitones up",
        f"Reconstruction, error {100 * error:.0f} %{suffix}",
    )
    with _picture(path, plot, 3.6) as figure:
        row = figure.subplots(1, 3, sharey=True)
        for axes, values, title in zip(row, (frames, target, rebuilt), titles, strict=True):
            image = _show_pitch(axes, values, cqt, _times(begin, values, cqt), _range(frames), label=axes is row[0])
            axes.set(title=title, xlabel="time (s)")
        _scale(figure, image, row, "standardised magnitude")


def draw_mapping(frames, mapping, cqt, begin, path, plot, suffix=""):
    """Draw the mapping (n_frames, n_maps) under the frames (n_frames, n_bins) that it comes from, the first at `begin` s."""
    times = _times(begin, frames, cqt)
    with _picture(path, plot, 5.6) as figure:
        above, below = figure.subplots(2, sharex=True)
        image = _show_pitch(above, frames, cqt, times, _range(frames))
        above.set(title="Input")
        _scale(figure, image, above, "standardised magnitude")
        image = _show_features(below, mapping, times)
        below.set(title=f"Mapping{suffix}", xlabel="time (s)")
        _scale(figure, image, below, "activation")


def draw_filters_x(network, cqt, path, plot, suffix=""):
    """Draw the filters of the context that weigh most in the mapping, time by pitch."""
    context = network.sizes.context
    filters = network.weights["filters_x"][_order(network)[: plot.filters]].reshape(-1, context, cqt.n_bins)
    limit = np.quantile(np.abs(filters), 0.998)
    apart = np.pad(filters, ((0, 0), (0, 1 + context // 8), (0, 0)), constant_values=np.nan)
    label = f"frames of the context, for each filter from {network.sizes.lags[0] * cqt.frame_seconds * 1000:.0f} ms before the frame on"
    with _picture(path, plot, _filters_height(filters)) as figure:
        column = _filter_rows(figure, cqt, filters, f"Filters of the context, by their weight in the mapping{suffix}", label)
        for axes, row in zip(column, _filter_groups(apart), strict=True):
            image = _show_pitch(axes, row.reshape(-1, cqt.n_bins), cqt, (0, len(row)), (-limit, limit), _SIGNED)
            image.set_interpolation("nearest")
        _scale(figure, image, column, "weight")


def draw_filters_y(network, cqt, path, plot, suffix=""):
    """Draw the filters of the frame that belong to those of the context, in the same order."""
    filters = network.weights["filters_y"][_order(network)[: plot.filters]]
    limit = float(np.abs(filters).max()) or 1
    pitch = np.arange(cqt.n_bins)
    label = f"weight, for each filter from −{limit:.2g} to {limit:.2g}"
    with _picture(path, plot, _filters_height(filters)) as figure:
        column = _filter_rows(figure, cqt, filters, f"Filters of the frame, by their weight in the mapping{suffix}", label)
        for axes, row in zip(column, _filter_groups(filters), strict=True):
            for n, weights in enumerate(row / limit / 2):
                for sign, colour in ((1, _ACCENT), (-1, _COLOURS["cqt_shifted_back"])):
                    axes.fill_betweenx(pitch, n + 0.5, n + 0.5 + sign * np.maximum(0, sign * weights), color=colour, linewidth=0)


def draw_histograms(network, frames, mapping, rebuilt, path, plot, suffix=""):
    """Draw how data, reconstruction, mapping and weights are distributed."""
    weights = network.weights
    common = min(frames.min(), rebuilt.min()) - 1e-3, max(frames.max(), rebuilt.max()) + 1e-3
    values = {"Data": (frames, common), f"Reconstruction{suffix}": (rebuilt, common), f"Mapping{suffix}": (mapping, (-1, 1))}
    names = {"Filters of x": "filters_x", "Filters of y": "filters_y", "Layer 1": "map_1.weight", "Layer 2": "map_2.weight"}
    limits = {name: float(np.abs(weights[key]).max()) or 1 for name, key in names.items()}
    with _picture(path, plot, 5) as figure:
        above, below = figure.subfigures(2)
        for axes, (name, (data, limit)) in zip(above.subplots(1, 3), values.items(), strict=True):
            _histogram(axes, data, name, "value", limit)
        for axes, (name, key) in zip(below.subplots(1, 4), names.items(), strict=True):
            _histogram(axes, weights[key], name, "weight", (-limits[name], limits[name]))


def draw_losses(history, path, plot=None):
    """Draw the curves of a training, a panel each.

    Parameters
    ----------
    history : list of dict of str to float
        The step, and what was measured then; not every row need have everything.
    plot : gae.params.Plot or None
        None for the defaults.
    """
    names = sorted({name for row in history for name in row} - {"step"})
    columns = min(3, max(1, len(names)))
    rows = -(-len(names) // columns) or 1
    with _picture(path, plot or Plot(), 0.3 + 2.4 * rows) as figure:
        grid = figure.subplots(rows, columns, squeeze=False)
        for axes, name in zip(grid.flat, names, strict=False):
            steps, values = np.array([(row["step"], row[name]) for row in history if name in row], dtype=float).T
            axes.plot(steps, values, color=_QUIET, linewidth=1)
            axes.plot(*_smooth(steps, values), color=_ACCENT, linewidth=1.6)
            axes.set(title=name, xlabel="step")
            axes.grid(True)
        for axes in grid.flat[len(names) :]:
            axes.set_visible(False)


def draw_metrics(metrics, labels, tolerances, path, plot):
    """Draw what `gae.evaluate` found: bars of each kind of feature, with their standard errors.

    Parameters
    ----------
    metrics : dict
        As `gae.evaluate.read_figures` gives it.
    labels : dict of str to str
        What each kind of feature is called.
    tolerances : iterable of str
        Names of the tolerances of beats.
    """
    within = {f"±{name.replace('ms', ' ms')}": name for name in tolerances}
    panels = (
        ("Nearest in another key", {"1 frame": "top1", "stacked": "top1_stacked"}, metrics["invariance"]),
        *(
            (f"Beats found, score {title}", within, {kind: metrics["alignment"][kind][key] for kind in labels})
            for title, key in (("transposed", "transposed"), ("as written", "untransposed"))
        ),
    )
    with _picture(path, plot, 4.1) as figure:
        row = figure.subplots(1, 3, sharey=True, width_ratios=[len(ticks) for _, ticks, _ in panels])
        for axes, (title, ticks, figures) in zip(row, panels, strict=True):
            _bars(axes, figures, labels, ticks)
            axes.set(title=title, ylim=(0, 109))
        row[0].set_ylabel(f"mean of {metrics['pieces']} held-out pieces ± standard error")
        row[0].yaxis.set_major_formatter(PercentFormatter())
        figure.legend(*row[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)


def draw_transposition(original, transposed, k, cqt, begin, title, path, plot):
    """Draw the features of a passage in two keys, and how they differ.

    Parameters
    ----------
    original, transposed : ndarray, shape (n_frames, n_maps)
    k : int
        Semitones between them.
    begin : float
        Time of the first frame, in s.
    """
    times = _times(begin, original, cqt)
    likeness = (unit(original) * unit(transposed)).sum(axis=1)
    panels = {
        f"Features of {_plain(title)}, as written": original,
        f"The same {abs(k)} semitone{'s' * (abs(k) > 1)} {'higher' if k > 0 else 'lower'}": transposed,
        "Difference": transposed - original,
    }
    with _picture(path, plot, 7.6) as figure:
        column = figure.subplots(4, sharex=True, height_ratios=[3, 3, 3, 1.4])
        for axes, (name, values) in zip(column, panels.items(), strict=False):
            image = _show_features(axes, values, times)
            axes.set(title=name)
        _scale(figure, image, column[:3], "activation")
        column[3].plot(np.linspace(*times, len(likeness)), likeness, color=_ACCENT, linewidth=1)
        column[3].set(
            title=f"Cosine similarity of both, {likeness.mean():.2f} in the mean", xlabel="time (s)", ylim=(min(0, likeness.min()), 1.02)
        )
        column[3].grid(True)


def made_of(path):
    """The origin that `draw_track` was told of a picture; nothing where there is no whole picture that says it."""
    try:
        with Image.open(path) as image:
            image.verify()
            return image.info.get("made_of", "")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):  # SyntaxError is Pillow's word for damage
        return ""


def draw_track(pooled, seconds, title, path, plot, origin=""):
    """Draw the features of one track, and where it is similar to itself in whatever key.

    Parameters
    ----------
    pooled : ndarray, shape (n, n_maps)
        Features, or means of them where the track is long.
    seconds : float
        Duration of the track.
    origin : str
        Digest of what it is drawn from, which the file will say: `made_of` reads it.
    """
    with _picture(path, plot, 9.4, 8, origin) as figure:
        above, below = figure.subplots(2, sharex=True, height_ratios=[1, 3.6])
        image = _show_features(above, pooled, (0, seconds))
        above.set(title=f"Features of {_plain(title)}")
        _scale(figure, image, above, "activation")
        image = below.imshow(self_similarity(pooled), extent=(0, seconds, 0, seconds), cmap=_MAGNITUDE, vmin=0, vmax=1)
        below.set(title="Similarity to itself, transpositions ignored", xlabel="time (s)", ylabel="time (s)")
        _scale(figure, image, below, "cosine similarity")


def self_similarity(values):
    """Cosine similarity of every passage with every other: (n, d) to (n, n).

    A passage is eight successive frames, less their mean over the track: a line beside the diagonal is a repetition.
    """
    centred = unit(values - values.mean(axis=0))
    padded = np.concatenate([centred, np.repeat(centred[-1:], _DIAGONAL - 1, axis=0)])
    passages = unit(stack(padded, np.arange(len(values)), _DIAGONAL))
    return passages @ passages.T


def note_ticks(cqt):
    """Where notes lie on an axis of bins.

    Returns
    -------
    bins : ndarray of float64
    names : list of str
        Each C in range, as C2, C3, ...; where there are fewer than two, every third semitone, or every one of a dozen.
    """
    midi = np.arange(128)
    bins = cqt.bins_per_octave * np.log2(librosa.midi_to_hz(midi) / cqt.fmin)
    inside = (bins >= -0.5) & (bins <= cqt.n_bins - 0.5)
    steps = (12, 3, 1) if inside.sum() > 13 else (12, 1)
    chosen = next(some for step in steps if (some := inside & (midi % step == 0)).sum() > 1 or step == 1)
    return bins[chosen], [librosa.midi_to_note(number) for number in midi[chosen]]


def excerpt_length(plot, cqt):
    """Frames of an excerpt of plot.seconds, two at least."""
    return max(2, round(plot.seconds / cqt.frame_seconds))


@contextmanager
def _picture(path, plot, height, width=_WIDTH, origin=""):
    """Yield an empty figure of our style that becomes the file `path`. 256 colours take a third of the room of all."""
    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # names in scripts that the font does not have
        figure = Figure(figsize=(width, height), dpi=plot.dpi, layout="constrained")
        yield figure
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        image = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB").quantize(palette=_palette(), dither=Image.Dither.NONE)
        about = PngInfo()
        if origin:
            about.add_text("made_of", origin)
        with replacing(path) as partial:
            image.save(partial, format="png", dpi=(plot.dpi, plot.dpi), optimize=True, pnginfo=about)


@cache
def _palette():
    """The colours that our pictures hold: both scales, greys, and the tints of lines and bars."""
    scales = [matplotlib.colormaps[name](np.linspace(0, 1, 96))[:, :3] for name in (_MAGNITUDE, _SIGNED)]
    greys = np.linspace(0, 1, 24)[:, None].repeat(3, axis=1)
    fade = np.linspace(0, 0.9, 10)[:, None]
    tints = [
        fade + (1 - fade) * matplotlib.colors.to_rgb(colour) for colour in (_ACCENT, _QUIET, _COLOURS["cqt_shifted_back"], _COLOURS["cqt"])
    ]
    palette = Image.new("P", (1, 1))
    palette.putpalette(np.rint(255 * np.concatenate([*scales, greys, *tints])).astype(np.uint8).tobytes())
    return palette


def _times(begin, values, cqt):
    """First and last time of frames or features, in s."""
    return begin, begin + len(values) * cqt.frame_seconds


def _scale(figure, image, axes, label):
    figure.colorbar(image, ax=axes, label=label, pad=0.01, aspect=30)


def _plain(name):
    """A name of a file as text that is not taken for a formula, and fits a title."""
    return (name if len(name) <= _TITLE else f"{name[: _TITLE // 2]}…{name[-_TITLE // 2 :]}").replace("$", r"\$")


def _show_pitch(axes, values, cqt, times, limits, colours=_MAGNITUDE, label=True):
    """Values (n_frames, n_bins) as an image of time by pitch, blank where they are NaN."""
    _pitch_axis(axes, cqt, label)
    return axes.imshow(values.T, extent=(*times, -0.5, cqt.n_bins - 0.5), cmap=colours, vmin=limits[0], vmax=limits[1])


def _pitch_axis(axes, cqt, label=True):
    axes.set_yticks(*note_ticks(cqt))
    axes.set_ylabel("pitch" if label else "")


def _show_features(axes, values, times):
    """Features (n_frames, n_maps) as an image over time."""
    axes.set_ylabel("feature")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    return axes.imshow(values.T, extent=(*times, -0.5, values.shape[1] - 0.5), cmap=_SIGNED, vmin=-1, vmax=1)


def _filter_rows(figure, cqt, filters, title, label):
    """An empty panel for each group of filters, each filter as wide as 1; `label` says what lies along that width."""
    column = figure.subplots(len(_filter_groups(filters)), sharex=True, squeeze=False)[:, 0]
    for axes in column:
        _pitch_axis(axes, cqt)
        axes.set(xticks=[], xlim=(0, min(_COLUMNS, len(filters))), ylim=(-0.5, cqt.n_bins - 0.5))
        axes.spines["bottom"].set_visible(False)
    column[0].set_title(title)
    column[-1].set_xlabel(label)
    return column


def _filter_groups(filters):
    return [filters[start : start + _COLUMNS] for start in range(0, len(filters), _COLUMNS)]


def _filters_height(filters):
    return 0.8 + 1.9 * len(_filter_groups(filters))


def _histogram(axes, values, title, label, limits):
    axes.hist(np.ravel(values), bins=80, range=limits, color=_ACCENT, density=True, log=True, histtype="stepfilled")
    axes.set(title=title, xlabel=label, xlim=limits)
    axes.set_ylabel("density" if axes.get_subplotspec().is_first_col() else "")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(True)


def _bars(axes, figures, labels, ticks):
    """Groups of bars: figures[kind] holds mean and standard error of each of the figures that `ticks` names."""
    width = 0.84 / len(labels)
    for n, (kind, label) in enumerate(labels.items()):
        positions = np.arange(len(ticks)) + (n - (len(labels) - 1) / 2) * width
        means, errors = ([figures[kind][name + end] for name in ticks.values()] for end in ("", "_se"))
        axes.bar(positions, means, width * 0.92, color=_COLOURS[kind], label=label)
        axes.errorbar(positions, means, errors, fmt="none", ecolor="#222222", elinewidth=1)
        if kind == "gae":
            for position, mean in zip(positions, means, strict=True):
                axes.text(position, 102, f"{mean:.1f}", ha="center", color=_ACCENT, weight="bold", size=8)  # above all neighbours
    axes.set_xticks(range(len(ticks)), ticks)
    axes.tick_params(axis="x", length=0)
    axes.grid(True, axis="y")


def _rebuild(frames, network, bins):
    """Frames transposed by some bins, and the same as the network rebuilds them: the mapping of the frames as they
    are, applied to the transposed context.
    """
    import torch  # not above: it takes a second, and the processes that draw tracks do without

    with torch.no_grad():
        context = with_past(frames, network.sizes.reach)[:-1]
        x, moved, y = (torch.from_numpy(array)[None].to(network.filters_y.device) for array in (context, transpose(context, bins), frames))
        rebuilt = network.reconstruct(network.mapping(x, y), moved)
    return transpose(frames, bins), rebuilt[0].cpu().numpy()


def _order(network):
    """The filters, those first that weigh most in the first mapping layer."""
    return np.argsort(-np.linalg.norm(network.weights["map_1.weight"], axis=0), kind="stable")


def _smooth(steps, values):
    """A running mean over a twentieth of the curve."""
    n = max(1, len(values) // 20)
    return steps[n - 1 :] - (steps[n - 1] - steps[0]) / 2, np.convolve(values, np.full(n, 1 / n), "valid")


def _range(values):
    """Limits of colour that leave the outermost values out."""
    return tuple(np.quantile(values, (0.02, 0.997)))
