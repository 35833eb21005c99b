import json
import warnings

import matplotlib
import numpy as np
import pytest
import soundfile
import tiny
import torch
from PIL import Image

from gae import pictures
from gae import plot as plotting
from gae.cqt import transpose
from gae.errors import FormatError
from gae.evaluate import KINDS, TOLERANCES
from gae.features import Origin, write
from gae.mapping import extract_frames
from gae.measures import pool
from gae.modelfile import load_model, save_model
from gae.params import Convert, Cqt, Params, Plot
from gae.pictures import draw_losses, draw_network, note_ticks, self_similarity
from gae.plot import draw, draw_track
from gae.shards import add_track, read_shard, write_folder, writing

PLOT = Plot(dpi=50, seconds=4, filters=20)
NETWORK = ("filters_x", "filters_y", "histograms", "mapping", "reconstruction")


def pixels(path):
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def is_a_picture(path, inches=10):
    image = pixels(path)
    return image.shape[1] == inches * PLOT.dpi and image.std() > 10


def features_file(path, frames):
    values = extract_frames(frames, tiny.model())
    write(path, [values], values.shape, Origin(tiny.CQT, str(path)))
    return path


def metrics():
    rng = np.random.default_rng(0)

    def figures(names):
        return {name + end: float(rng.uniform(0, 90)) / (20 if end else 1) for name in names for end in ("", "_se")}

    return {
        "pieces": 3,
        "invariance": {kind: figures(("top1", "top1_stacked")) for kind in KINDS},
        "alignment": {kind: {key: figures(TOLERANCES) for key in ("transposed", "untransposed")} for kind in KINDS},
        "reconstruction": figures(("relative_error", "of_a_copy")),
        "speed": {"conversion_times_real_time": 500.0},
    }


@pytest.fixture
def run(tmp_path):
    """What the stages before leave behind, and where pictures go: paths for `draw_all`."""
    piece = tmp_path / "corpus" / "heldout" / "a"
    piece.mkdir(parents=True)
    for take, frequency in (("original", 440), ("transposed", 660)):
        soundfile.write(piece / f"{take}.flac", tiny.tone(3, 8000, frequency), 8000)
    entry = {"id": "a", "split": "heldout", "k": 7, "beats": {"score": [0.5], "performance": [0.5]}}
    (tmp_path / "corpus" / "corpus.json").write_text(json.dumps({"pieces": [entry]}))
    frames, key = tiny.frames(300), "0" * 64
    with writing(tmp_path / "track.h5", tiny.CQT) as shard:
        add_track(shard, key, [frames], tiny.CQT.n_bins, "float32", path="music/first.wav", duration=9.6, peak=1.0)
    write_folder(tmp_path / "shards", [[(key, "music/first.wav")]], read_shard(tmp_path / "track.h5")[1], tiny.CQT, 1 << 20)
    save_model(tmp_path / "gae.safetensors", tiny.model().network, tiny.CQT)
    (tmp_path / "features").mkdir()
    names = ("song", "Für $Elise$ 楽", "no.dots")
    for name in names:
        features_file(tmp_path / "features" / f"{name}.h5", frames)
    (tmp_path / "features" / "index.json").write_text(json.dumps({"tracks": [{"path": name, "file": f"{name}.h5"} for name in names]}))
    (tmp_path / "metrics.json").write_text(json.dumps(metrics()))
    paths = ("corpus", "shards", "gae.safetensors", "features", "metrics.json", "figures")
    return [tmp_path / name for name in paths]


def draw_all(run, **plot):
    """`draw` by the model that is third of the paths of a run."""
    params = Params(plot=PLOT.model_copy(update=plot), convert=Convert(weights=str(run[2])))
    draw(params, *run[:2], *run[3:])


def test_every_picture_is_drawn(run, in_this_process):
    before = dict(matplotlib.rcParams)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw_all(run)
    figures = run[-1]
    drawn = {str(path.relative_to(figures)) for path in figures.rglob("*") if path.is_file()}
    tracks = {"tracks/song.png", "tracks/Für $Elise$ 楽.png", "tracks/no.dots.png"}
    assert drawn == {f"{name}.png" for name in (*NETWORK, "input", "metrics", "transposition")} | tracks
    for name in drawn:
        assert is_a_picture(figures / name, inches=8 if name in tracks else 10)
    assert dict(matplotlib.rcParams) == before


def test_a_mapping_is_drawn_as_it_was_converted_and_when(run, in_this_process, monkeypatch):
    """The excerpt lies in the middle, and what comes before it is its context."""
    drawn = []
    monkeypatch.setattr(pictures, "draw_mapping", lambda frames, mapping, cqt, begin, *more: drawn.append((frames, mapping, begin)))
    draw_all(run, seconds=1.0)
    frames, mapping, begin = drawn[0]
    start = round(begin / tiny.CQT.frame_seconds)
    assert start > 100 and np.array_equal(frames, tiny.frames(300)[start : start + len(frames)])
    assert np.allclose(mapping, extract_frames(tiny.frames(300), load_model(run[2]))[start : start + len(mapping)], atol=1e-5)


def test_a_passage_shorter_than_a_frame_is_drawn_as_two_frames(run, in_this_process):
    draw_all(run, seconds=0.001)
    assert is_a_picture(run[-1] / "transposition.png")


def test_pictures_need_the_models_frames(run, in_this_process):
    save_model(run[2], tiny.model().network, Cqt(n_bins=36, sample_rate=8000, fmin=100.0))
    with pytest.raises(FormatError, match="other cqt parameters"):
        draw_all(run)


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[:300],
        lambda text: "{}",
        lambda text: text.replace("3", "null"),
        lambda text: text.replace("500.0", "9" * 400),
    ],
)
def test_damaged_figures_are_named_before_anything_is_drawn(run, in_this_process, damage):
    run[4].write_text(damage(run[4].read_text()))
    with pytest.raises(FormatError, match=r"metrics\.json: missing or damaged; run `dvc repro evaluate`"):
        draw_all(run)
    run[4].unlink()
    with pytest.raises(FormatError, match=r"metrics\.json: missing or damaged"):
        draw_all(run)
    assert not run[-1].exists()


def test_what_is_not_there_to_draw_is_named(run, in_this_process):
    with pytest.raises(FormatError, match="none: no such folder; run `dvc repro convert`"):
        draw_all([*run[:3], run[0] / "none", *run[4:]])
    write(run[3] / "song.h5", [], (0, tiny.SIZES.n_maps), Origin(tiny.CQT, "empty.wav"))
    with pytest.raises(FormatError, match=r"song\.h5: holds no frame"):
        draw_all(run)
    (run[1] / "index.json").write_text(json.dumps({"schema": json.loads((run[1] / "index.json").read_text())["schema"], "lines": []}))
    with pytest.raises(FormatError, match="shards: holds no track; run `dvc repro preprocess`"):
        draw_all(run)
    for shard in run[1].glob("*.h5"):
        shard.unlink()
    with pytest.raises(FormatError, match="shards: holds no track; run `dvc repro preprocess`"):
        draw_all(run)


def test_drawings_of_the_network_are_named_by_step_and_change_with_it(tmp_path):
    for step, seed in ((900, 0), (12000, 1)):
        draw_network(tiny.model(seed).network, tiny.CQT, tiny.frames(200), tmp_path, step, PLOT)
    names = sorted(path.name for path in tmp_path.glob("*.png"))
    assert names == [f"{name}-{step}.png" for name in NETWORK for step in ("0000900", "0012000")]
    for earlier, later in zip(names[::2], names[1::2], strict=True):
        assert not np.array_equal(pixels(tmp_path / earlier), pixels(tmp_path / later))


@pytest.mark.parametrize("frames", [np.zeros((200, 36), np.float32), tiny.frames(3)], ids=["silence", "three frames"])
def test_odd_excerpts_are_drawn_without_complaint(frames, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw_network(tiny.model().network, tiny.CQT, frames, tmp_path, plot=PLOT)
        draw_track(features_file(tmp_path / "odd.h5", frames), tmp_path, PLOT)
    assert len(list(tmp_path.glob("*.png"))) == 6


def test_files_that_the_index_does_not_list_are_not_drawn(run, in_this_process):
    (run[3] / "mine.h5").write_bytes(b"mine")
    draw_all(run)
    assert not (run[-1] / "tracks" / "mine.png").exists() and (run[-1] / "tracks" / "song.png").exists()


def test_only_tracks_that_changed_are_drawn_anew(run, in_this_process, monkeypatch):
    tracks, drawn, draw_one = run[-1] / "tracks", [], pictures.draw_track
    monkeypatch.setattr(
        pictures, "draw_track", lambda pooled, seconds, title, *more: drawn.append(title) or draw_one(pooled, seconds, title, *more)
    )
    draw_all(run)
    assert sorted(drawn) == ["Für $Elise$ 楽", "no.dots", "song"]
    whole = {picture.name: picture.read_bytes() for picture in tracks.iterdir()}
    drawn.clear()
    features_file(run[3] / "song.h5", tiny.frames(250))
    (tracks / "no.dots.png").write_bytes(whole["no.dots.png"][:-100])
    (tracks / ".no.dots.png.77.partial").write_bytes(b"half")
    draw_all(run)
    assert sorted(drawn) == ["no.dots", "song"]
    again = {picture.name: picture.read_bytes() for picture in tracks.iterdir()}
    assert again.keys() == whole.keys() and {name for name in whole if again[name] != whole[name]} == {"song.png"}
    drawn.clear()
    (run[3] / "index.json").write_text(json.dumps({"tracks": [{"path": "song", "file": "song.h5"}]}))
    Image.new("L", (4, 4)).save(tracks / "mine.png")
    (tracks / "notes.txt").write_text("mine")
    draw_all(run)
    assert not drawn and sorted(file.name for file in tracks.iterdir()) == ["mine.png", "notes.txt", "song.png"]
    draw_all(run, dpi=60)
    assert drawn == ["song"]


@pytest.mark.parametrize(
    "index", ["{", "[]", '{"tracks": [{"path": "a", "file": "lost.h5"}]}', '{"tracks": [{"path": "a", "file": "../song.h5"}]}']
)
def test_an_index_that_does_not_fit_is_one_line(run, in_this_process, index):
    (run[3] / "index.json").write_text(index)
    with pytest.raises(FormatError, match="run `dvc repro convert`"):
        draw_all(run)


def test_same_features_same_bytes(tmp_path):
    file = features_file(tmp_path / "song.h5", tiny.frames(100))
    for folder in ("a", "b"):
        draw_track(file, tmp_path / folder, PLOT)
    assert (tmp_path / "a/song.png").read_bytes() == (tmp_path / "b/song.png").read_bytes()


def test_reconstruction_is_made_from_the_context_alone():
    network, seen = tiny.model().network, {}
    mapping, reconstruct = network.mapping, network.reconstruct

    def spy_on_mapping(x, y):
        seen["mapping"] = mapping(x, y)
        return seen["mapping"]

    def spy_on_reconstruct(m, x):
        seen.update(m=m, x=x)
        return reconstruct(m, x)

    network.mapping, network.reconstruct = spy_on_mapping, spy_on_reconstruct
    frames = tiny.frames(30)
    target, rebuilt = pictures._rebuild(frames, network, 5)
    up = torch.from_numpy(transpose(frames, 5))
    assert torch.equal(seen["m"], seen["mapping"])
    assert np.array_equal(target, up.numpy())
    reach = network.sizes.reach
    for t in range(reach, 30):
        assert torch.equal(seen["x"][0, t : t + reach], up[t - reach : t])
    assert rebuilt.shape == target.shape


def test_notes_lie_on_their_bins():
    bins, names = note_ticks(Cqt())
    assert names == ["C1", "C2", "C3", "C4", "C5", "C6"]
    assert bins == pytest.approx([0, 24, 48, 72, 96, 120], abs=0.05)
    bins, names = note_ticks(Cqt(fmin=440.0, n_bins=12, bins_per_octave=12))
    assert names[:4] == ["A4", "A♯4", "B4", "C5"]
    assert bins == pytest.approx(np.arange(12), abs=1e-9)


def test_a_repeated_passage_is_a_line_beside_the_diagonal():
    passage = np.random.default_rng(0).standard_normal((60, 8)).astype(np.float32)
    similarity = self_similarity(np.concatenate([passage, passage]))
    assert similarity.shape == (120, 120)
    assert np.allclose(similarity, similarity.T, atol=1e-5)
    assert np.allclose(np.diagonal(similarity), 1, atol=1e-5)
    assert np.diagonal(similarity, 60)[:50].min() > 0.99
    assert np.abs(np.diagonal(similarity, 30)[:50]).max() < 0.7


def test_long_tracks_are_pooled_block_by_block(tmp_path, monkeypatch):
    frames = tiny.frames(5000)
    file = features_file(tmp_path / "long.h5", frames)
    monkeypatch.setattr(plotting, "_BLOCK", 512)
    pooled, seconds = plotting._pooled(file)
    assert len(pooled) == 834
    assert np.allclose(pooled, pool(extract_frames(frames, tiny.model()), 6), atol=1e-6)
    assert seconds == pytest.approx(5000 * 256 / 8000)


def test_losses_are_drawn_whatever_was_measured_when(tmp_path):
    history = [{"step": 1, "loss": 2.0}, {"step": 25, "loss": 1.0, "validation_top1": 0.1}, {"step": 50, "loss": 0.5}]
    for rows in (history, history[:1]):
        draw_losses(rows, tmp_path / f"{len(rows)}.png", PLOT)
        assert is_a_picture(tmp_path / f"{len(rows)}.png")
    draw_losses([], tmp_path / "none.png", PLOT)


@pytest.mark.parametrize(("fmin", "n_bins"), [(70.0, 46), (65.4, 24), (65.4, 20)])
def test_notes_of_one_octave_or_two_are_a_dozen_at_most(fmin, n_bins):
    bins, names = note_ticks(Cqt(fmin=fmin, n_bins=n_bins))
    assert 2 <= len(names) <= 13 and len(names) == len(bins)


def test_a_range_between_two_notes_has_none():
    bins, names = note_ticks(Cqt(fmin=112.0, n_bins=2, bins_per_octave=240))
    assert len(bins) == len(names) == 0


def test_a_reconstruction_says_how_far_it_is_moved(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(pictures, "draw_reconstruction", lambda frames, target, rebuilt, bins, *more: said.append((bins, target.any())))
    coarse = tiny.CQT.model_copy(update={"bins_per_octave": 1, "n_bins": 4})
    model = tiny.model(cqt=coarse)
    draw_network(model.network, coarse, tiny.frames(60, n_bins=4), tmp_path, plot=PLOT)
    assert said == [(1, True)]
