import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import tiny
import torch

from gae import audio
from gae import evaluate as judging
from gae.cqt import frames as cqt_frames
from gae.cqt import transpose
from gae.errors import FormatError, ParamsError
from gae.evaluate import (
    KINDS,
    chroma,
    comparison,
    copy_error,
    delayed,
    evaluate,
    heldout_pieces,
    judge,
    read_figures,
    reconstruction_error,
    table,
)
from gae.files import read_json
from gae.measures import Alignment, align
from gae.modelfile import load_model, save_model
from gae.params import Convert, Evaluate, Params, Train

RATE = tiny.CQT.sample_rate
SETTINGS = Evaluate(frames=40, stack=4, alignment_hop=0.064, shift=6, bootstrap=50)
PARAMS = Params(evaluate=SETTINGS)


def by(model, params=PARAMS):
    """The parameters that have a model judged."""
    return params.model_copy(update={"convert": Convert(weights=str(model))})


def play(notes, beats, k, brightness):
    """Notes (semitones above the lowest bin) from each beat to the next, transposed by k semitones."""
    samples = np.zeros(round((beats[-1] + 0.1) * RATE))
    for note, start, end in zip(notes, beats[:-1], beats[1:], strict=True):
        times = np.arange(round((end - start) * RATE)) / RATE
        frequency = tiny.CQT.fmin * 2 ** ((note + k) / 12)
        sound = sum(brightness**n * np.sin(2 * np.pi * n * frequency * times) for n in (1, 2, 3)) * np.exp(-3 * times)
        samples[round(start * RATE) :][: len(sound)] += sound
    return samples / 4


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Four pieces of random notes, one without beats; the performance is slower, uneven, and darker."""
    folder = tmp_path_factory.mktemp("corpus")
    pieces = [{"id": "training-piece", "split": "train"}]
    for number, k in enumerate((3, -4, 5, 2)):
        rng = np.random.default_rng(number)
        notes = rng.permutation(np.arange(6, 24))
        score = 0.05 + np.arange(len(notes) + 1) * 0.3
        performance = 0.1 + np.concatenate([[0], np.cumsum(rng.uniform(0.3, 0.5, len(notes)))])
        piece = folder / "heldout" / f"piece-{number}"
        piece.mkdir(parents=True)
        soundfile.write(piece / "original.flac", play(notes, score, 0, 0.5), RATE)
        soundfile.write(piece / "transposed.flac", play(notes, score, k, 0.5), RATE)
        soundfile.write(piece / "performance.flac", play(notes, performance, 0, 0.4), RATE)
        beats = {"score": score[:-1].tolist(), "performance": performance[:-1].tolist()} if number < 3 else {"score": [], "performance": []}
        pieces.append({"id": piece.name, "split": "heldout", "k": k, "beats": beats})
    (folder / "corpus.json").write_text(json.dumps({"pieces": pieces}))
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "gae.safetensors"
    save_model(path, tiny.model().network, tiny.CQT)
    return path


def places(folder, name="evaluation"):
    return folder / f"{name}.json", folder / "metrics.json", folder / "evaluation.txt"


@pytest.fixture
def figures(corpus, model, tmp_path, in_this_process):
    evaluate(by(model), corpus, *places(tmp_path))
    return read_json(tmp_path / "evaluation.json")


@pytest.fixture(params=["log", "none"])
def found(request, corpus, tmp_path, in_this_process):
    """Top-1 of one frame and of stacks for each kind, by frames that are compressed or not."""
    save_model(tmp_path / "gae.safetensors", tiny.model().network, tiny.CQT.model_copy(update={"compression": request.param}))
    evaluate(by(tmp_path / "gae.safetensors"), corpus, *places(tmp_path))
    invariance = read_json(tmp_path / "evaluation.json")["invariance"]
    return request.param, *({kind: invariance[kind][name] for kind in KINDS} for name in ("top1", "top1_stacked"))


def test_known_transposition_is_found_and_others_are_not(found):
    compression, top1, stacked = found
    if compression == "log":
        assert top1["cqt_shifted_back"] > 30 and stacked["cqt_shifted_back"] > 55
    else:  # without it the partials that these notes share are weak
        assert top1["chroma_best_shift"] > 10 and stacked["chroma_best_shift"] > 35
    assert min(top1["cqt_context"], stacked["cqt_context"]) > 85 and min(top1["chroma_context"], stacked["chroma_context"]) > 50
    assert max(top1["cqt"], stacked["cqt"], top1["chroma"], stacked["chroma"]) < 5
    assert top1["cqt_context"] > top1["cqt_shifted_back"] and top1["chroma_context"] > top1["chroma_best_shift"]


def test_beats_are_found_with_what_does_not_mind_the_key(figures):
    transposed = {kind: found["transposed"]["100ms"] for kind, found in figures["alignment"].items()}
    untransposed = {kind: found["untransposed"]["100ms"] for kind, found in figures["alignment"].items()}
    assert min(transposed["cqt_shifted_back"], transposed["chroma_best_shift"]) > 90
    assert max(transposed["cqt"], transposed["chroma"]) < 60
    assert min(untransposed[kind] for kind in ("cqt", "chroma", "cqt_shifted_back", "chroma_best_shift")) > 90
    for found in figures["alignment"].values():
        assert found["transposed"]["50ms"] <= found["transposed"]["100ms"] <= found["transposed"]["250ms"] <= 100


def test_figures_are_complete_and_finite(figures):
    def numbers(node):
        return [number for value in node.values() for number in numbers(value)] if isinstance(node, dict) else [node]

    assert np.isfinite(numbers(figures)).all()
    assert figures["pieces"] == 4
    assert set(figures["invariance"]) == set(figures["alignment"]) == set(KINDS)
    assert set(figures["invariance"]["gae"]) == {"top1", "top1_se", "top1_stacked", "top1_stacked_se"}
    assert figures["invariance"]["chroma_best_shift"]["top1_se"] > 0
    assert figures["speed"]["conversion_times_real_time"] > 1


def test_one_table_sets_all_measures_beside_the_baselines(figures):
    rows = comparison(figures)
    for kind in KINDS:
        found, aligned = figures["invariance"][kind], figures["alignment"][kind]
        places = {"top1": (found, "top1"), "top1_stacked": (found, "top1_stacked")}
        for span in ("50ms", "100ms", "250ms"):
            places |= {f"beats_{span}": (aligned["transposed"], span), f"beats_{span}_untransposed": (aligned["untransposed"], span)}
        errors = {f"{name}_se": (group, f"{figure}_se") for name, (group, figure) in places.items()}
        assert rows[kind] == {name: group[figure] for name, (group, figure) in (places | errors).items()}
    assert rows["reconstruction_error"] == figures["reconstruction"]["relative_error"]
    assert rows["reconstruction_error_se"] == figures["reconstruction"]["relative_error_se"] > 0
    assert 0 < figures["reconstruction"]["of_a_copy"] < 100


def test_figures_are_the_same_again(figures, corpus, model, tmp_path, capsys):
    evaluate(by(model), corpus, *places(tmp_path, "again"))
    again = read_json(tmp_path / "again.json")
    assert {key: again[key] for key in again if key != "speed"} == {key: figures[key] for key in again if key != "speed"}
    assert read_json(tmp_path / "metrics.json") == comparison(again)
    assert (tmp_path / "evaluation.txt").read_text() == table(again) + "\n"
    printed = capsys.readouterr().out
    assert printed.strip().endswith(table(again))


def test_ours_alone_are_judged_alike(figures, corpus, model, tmp_path, capsys):
    values = by(model)
    values = values.model_copy(update={"evaluate": values.evaluate.model_copy(update={"baselines": False})})
    evaluate(values, corpus, *places(tmp_path, "alone"))
    alone = read_figures(tmp_path / "alone.json")
    assert alone["invariance"] == {"gae": figures["invariance"]["gae"]} and alone["alignment"] == {"gae": figures["alignment"]["gae"]}
    assert alone["reconstruction"] == figures["reconstruction"]
    assert comparison(alone)["gae"] == comparison(figures)["gae"] and "chroma" not in comparison(alone)
    printed = capsys.readouterr().out
    assert KINDS["gae"].label in printed and KINDS["cqt"].label not in printed


def test_table_shows_every_figure(figures):
    text = table(figures)
    lines = {line.split("  ")[0]: line for line in text.splitlines()}
    for kind in KINDS:
        assert f"{figures['invariance'][kind]['top1_stacked']:.1f} ±" in lines[KINDS[kind].label]
        assert f"{figures['alignment'][kind]['untransposed']['250ms']:.1f} ±" in lines[KINDS[kind].label]
    assert f"{figures['reconstruction']['relative_error']:.1f} ±" in text


def test_reports_travel_between_processes_and_pieces_without_beats_are_no_failure(corpus, model):
    piece = heldout_pieces(corpus)[3]
    report = pickle.loads(pickle.dumps(judge((3, piece), corpus, model, SETTINGS)))
    original, transposed = report["samples"]["cqt"]
    assert original.shape == transposed.shape == (40, 4, tiny.CQT.n_bins)
    assert report["alignment"] == {}
    assert report["reconstruction"] > 0


def test_the_frames_judged_are_those_that_are_converted(tmp_path, model):
    """Of silence after sound too, where rounding leaves dust."""
    sound = play(np.arange(6, 12), 0.05 + 0.3 * np.arange(7), 0, 0.5)
    soundfile.write(tmp_path / "song.wav", np.concatenate([sound, np.zeros(2 * RATE), sound, np.zeros(2 * RATE)]), RATE, subtype="FLOAT")
    expected = cqt_frames(audio.load(tmp_path / "song.wav", tiny.CQT.sample_rate), tiny.CQT)
    assert np.array_equal(judging._represent(tmp_path / "song.wav", load_model(model), 0)["cqt"], expected)
    assert not expected[-10:].any()


def test_what_the_baseline_shifts_in_says_nothing(corpus, model):
    path = judging.heldout_file(corpus, heldout_pieces(corpus)[0], "transposed")
    kinds = judging._represent(path, load_model(model), 2)
    back, bins = kinds["cqt_shifted_back"], 2 * tiny.CQT.bins_per_octave // 12
    assert np.array_equal(back[:, :-bins], kinds["cqt"][:, bins:])
    assert not back[:, -bins:].any()


def test_all_features_are_judged_on_the_same_frames(corpus, model):
    report = judge((0, heldout_pieces(corpus)[0]), corpus, model, SETTINGS)
    chroma_of_samples = report["samples"]["chroma"][0]
    assert np.array_equal(chroma_of_samples, report["samples"]["chroma_best_shift"][0])
    # the strongest bin of a frame and its pitch class agree
    strongest = report["samples"]["cqt"][0].argmax(axis=-1) % 12
    assert (strongest == chroma_of_samples.argmax(axis=-1)).mean() > 0.8


def test_chroma_folds_octaves_and_shares_bins_between_semitones():
    one = chroma(np.eye(36, dtype=np.float32), tiny.CQT)
    assert np.array_equal(one, np.tile(np.eye(12), (3, 1)))
    fine = tiny.CQT.model_copy(update={"bins_per_octave": 24, "n_bins": 48})
    folded = chroma(np.eye(48, dtype=np.float32), fine)
    assert folded[2 * 5].tolist() == np.eye(12)[5].tolist()
    assert folded[24 + 23].tolist() == (np.eye(12)[11] / 2 + np.eye(12)[0] / 2).tolist()
    assert np.allclose(folded.sum(axis=1), 1)


class Persistence(torch.nn.Module):
    """Rebuilds whatever the context ended with."""

    sizes = tiny.SIZES

    def mapping(self, x, y):
        assert len(x[0]) == len(y[0]) + self.sizes.reach - 1
        return y

    def reconstruct(self, mapping, x):
        return x[:, self.sizes.reach - 1 :]


def test_rows_in_context_are_those_that_a_model_sees():
    values = np.arange(30, dtype=np.float32).reshape(15, 2)
    lags = [*tiny.SIZES.lags, 0]
    expected = np.array([[number for lag in lags for number in values[max(0, t - lag)]] for t in range(15)])
    assert np.array_equal(np.concatenate(list(delayed(values, lags)), axis=1), expected)
    assert np.allclose(judging._pooled(values, lags, 2)[:7], (expected[:14:2] + expected[1:14:2]) / 2)
    assert np.array_equal(judging._sample(values, lags, np.array([0, 9]), SETTINGS)[1, 3], expected[12])


def test_the_best_of_twelve_rotates_every_frame_of_a_context():
    folded = np.random.default_rng(0).random((5, 24), dtype=np.float32)
    versions = judging._versions(KINDS["chroma_context"], folded)
    assert versions.shape == (12, 5, 24)
    for shift, version in enumerate(versions):
        assert np.array_equal(version, np.hstack([np.roll(part, shift, axis=1) for part in np.hsplit(folded, 2)]))


def test_the_best_of_twelve_is_told_by_short_alignments(monkeypatch):
    rng = np.random.default_rng(0)
    score = rng.random((90, 12), dtype=np.float32) ** 4
    performance = np.roll(np.repeat(score, rng.integers(1, 4, 90), axis=0), 5, axis=1)
    performance += 0.2 * rng.random(performance.shape, dtype=np.float32)
    versions, aligned = judging._versions(KINDS["chroma_best_shift"], score), []
    monkeypatch.setattr(judging, "align", lambda *sides: aligned.append(len(sides[0])) or align(*sides))
    chosen = judging._likeliest(versions, performance)
    assert np.array_equal(chosen, np.roll(score, 5, axis=1)) and aligned == 12 * [23]
    assert align(chosen, performance).cost == min(align(version, performance).cost for version in versions)
    assert np.array_equal(judging._likeliest(versions[1:2], performance), versions[1]) and len(aligned) == 12  # of one, none


def test_reconstruction_sees_the_transposed_context():
    constant = np.repeat(tiny.frames(1), 700, axis=0)
    assert reconstruction_error(constant, Persistence(), 6, np.random.default_rng(0)) == copy_error(constant) == 0
    frames = tiny.frames(700)
    before = np.concatenate([frames[:1], frames[:-1]])
    expected = np.square(frames - before).sum() / np.square(frames).sum()
    assert copy_error(frames) == pytest.approx(expected, rel=1e-5)
    assert reconstruction_error(frames, Persistence(), 0, np.random.default_rng(0)) == pytest.approx(expected, rel=1e-5)


def test_nothing_rebuilt_is_an_error_of_one():
    network = Persistence()
    network.reconstruct = lambda mapping, x: torch.zeros_like(mapping)
    assert reconstruction_error(tiny.frames(700), network, 6, np.random.default_rng(0)) == pytest.approx(1)
    assert reconstruction_error(np.zeros((30, 36), np.float32), network, 6, np.random.default_rng(0)) == 0


def altered(value, path):
    """A copy of JSON in which what a path of keys leads to is another value, or gone."""
    value = json.loads(json.dumps(value))
    *way, last, new = path
    holder = value
    for key in way:
        holder = holder[key]
    holder[last] = new
    if new is ...:
        del holder[last]
    return value


@pytest.mark.parametrize(
    "path",
    [
        ("id", ...),
        ("id", 3),
        ("k", ...),
        ("k", "3"),
        ("k", 10**9),
        ("beats", ...),
        ("beats", "score", None),
        ("beats", "score", [0.5, 1.0]),
        ("beats", "performance", ...),
        ("beats", "performance", ["a"]),
        ("beats", "performance", ["0.5"]),
        ("beats", "performance", [10**400]),
        ("beats", "performance", [None]),
    ],
)
def test_a_piece_that_is_not_whole_is_named_before_any_work(tmp_path, path):
    piece = {"id": "a", "split": "heldout", "k": 3, "beats": {"score": [0.5], "performance": [0.6]}}
    (tmp_path / "corpus.json").write_text(json.dumps({"pieces": [piece]}))
    assert heldout_pieces(tmp_path) == [piece]
    (tmp_path / "corpus.json").write_text(json.dumps({"pieces": [piece, altered({**piece, "id": "b"}, path)]}))
    with pytest.raises(FormatError, match=r"corpus\.json: missing or damaged"):
        heldout_pieces(tmp_path)


def test_what_is_missing_is_named(corpus, model, tmp_path, in_this_process):
    with pytest.raises(FormatError, match=r"corpus\.json: missing.*dvc repro corpus"):
        heldout_pieces(tmp_path)
    (tmp_path / "corpus.json").write_text('{"pieces": [{"id": "a", "split": "heldout"}]}')
    with pytest.raises(FormatError, match=r"corpus\.json: missing or damaged"):
        heldout_pieces(tmp_path)
    (tmp_path / "corpus.json").write_text('{"pieces": [{"id": "a", "split": "train"}]}')
    with pytest.raises(FormatError, match="no held-out piece"):
        heldout_pieces(tmp_path)
    (tmp_path / "corpus.json").write_text(
        '{"pieces": [{"id": "a", "split": "heldout", "k": 1, "beats": {"score": [], "performance": []}}]}'
    )
    with pytest.raises(FormatError, match="no held-out piece has beats"):
        heldout_pieces(tmp_path)
    with pytest.raises(FormatError, match="no such model"):
        evaluate(by(tmp_path / "none.safetensors"), corpus, *places(tmp_path))
    shutil.copytree(corpus, damaged := tmp_path / "damaged")
    for damage in (lambda file: file.write_bytes(file.read_bytes()[:2000]), Path.unlink):
        damage(damaged / "heldout" / "piece-0" / "transposed.flac")
        with pytest.raises(FormatError, match=r"^.*/piece-0/transposed\.flac: missing or damaged; run `dvc repro corpus`$"):
            evaluate(by(model), damaged, *places(tmp_path))
    long = PARAMS.model_copy(update={"evaluate": SETTINGS.model_copy(update={"stack": 1000})})
    with pytest.raises(ParamsError, match=r"evaluate\.stack: got 1000 frames.*piece-0"):
        evaluate(by(model, long), corpus, *places(tmp_path))


class Memory(Persistence):
    """Rebuilds the frame that the mapping was made of."""

    def reconstruct(self, mapping, x):
        return mapping


def test_reconstruction_is_from_the_mapping_of_the_untransposed():
    frames = tiny.frames(700)
    found = reconstruction_error(frames, Memory(), 6, np.random.default_rng(5))
    rng, error, power = np.random.default_rng(5), 0, 0
    for start in (0, 512):
        passage = frames[start : start + 512]
        moved = transpose(passage, int(rng.integers(-6, 7)))
        error, power = error + np.square(passage - moved).sum(), power + np.square(moved).sum()
    assert found == pytest.approx(error / power, rel=1e-4) and found > 0.5


def test_reconstruction_figures_are_means_over_the_pieces(figures, corpus, model):
    reports = [judge(item, corpus, model, SETTINGS) for item in enumerate(heldout_pieces(corpus))]
    for name, part in (("relative_error", "reconstruction"), ("of_a_copy", "copy")):
        assert figures["reconstruction"][name] == pytest.approx(100 * np.mean([report[part] for report in reports]), abs=0.01)


def test_frames_are_rebuilt_as_far_away_however_training_transposed(figures, corpus, model, tmp_path, capsys):
    for number, params in enumerate(
        [PARAMS.model_copy(update={"train": Train(shift=30)}), Params(evaluate=SETTINGS.model_copy(update={"shift": 12}))]
    ):
        evaluate(by(model, params), corpus, *places(tmp_path, str(number)))
    same, further = (read_json(tmp_path / f"{number}.json")["reconstruction"]["relative_error"] for number in (0, 1))
    assert same == figures["reconstruction"]["relative_error"] != further


def test_nor_whatever_frames_are_looked_for(figures, corpus, model, tmp_path, capsys):
    evaluate(by(model, Params(evaluate=SETTINGS.model_copy(update={"frames": 11, "stack": 2}))), corpus, *places(tmp_path, "few"))
    assert read_json(tmp_path / "few.json")["reconstruction"] == figures["reconstruction"]


def test_something_is_left_of_frames_however_far_they_may_be_moved():
    rng, network = np.random.default_rng(0), tiny.model().network
    assert reconstruction_error(tiny.frames(40 * 512), network, 10_000, rng) > 0.01


def test_the_baseline_is_shifted_back_by_bins(corpus):
    path = judging.heldout_file(corpus, heldout_pieces(corpus)[0], "transposed")
    kinds = judging._represent(path, tiny.model(cqt=tiny.CQT.model_copy(update={"bins_per_octave": 24})), 2)
    assert kinds["cqt"].any() and np.array_equal(kinds["cqt_shifted_back"][:, :-4], kinds["cqt"][:, 4:])


def test_a_context_ends_with_the_frame_itself(corpus, model):
    samples = judge((0, heldout_pieces(corpus)[0]), corpus, model, SETTINGS)["samples"]
    for context, rows in (("cqt_context", "cqt_shifted_back"), ("chroma_context", "chroma")):
        for whole, now in zip(samples[context], samples[rows], strict=True):
            assert whole.shape[-1] == (1 + tiny.SIZES.context) * now.shape[-1]
            assert np.array_equal(whole[..., -now.shape[-1] :], now)


def test_the_error_of_a_figure_is_over_the_pieces(monkeypatch):
    monkeypatch.setattr(judging, "invariance_top1", lambda queries, candidates: np.repeat([True, True, False, False], 10))
    reports = [{"samples": {kind: [np.zeros((10, 4, 12))] * 2 for kind in KINDS}} for _ in range(4)]
    found = judging._invariance(reports, SETTINGS.model_copy(update={"bootstrap": 4000}))
    assert found["gae"]["top1"] == 50 and found["gae"]["top1_se"] == pytest.approx(100 * np.std([1, 1, 0, 0], ddof=1) / 2, rel=0.05)


def test_beats_are_taken_over_between_centres_of_pooled_frames(monkeypatch):
    seen = []
    monkeypatch.setattr(judging, "align", lambda score, performance: seen.append(len(score)) or Alignment(2.0 * np.arange(20), 0.0))
    monkeypatch.setattr(judging, "beats_within", lambda estimated, true, tolerances: estimated)
    take = {"cqt": tiny.frames(40)}
    found = judging._beats_found(KINDS["cqt"], [0], take, take, {"score": [0.2, 0.5], "performance": []}, tiny.CQT, SETTINGS)
    assert seen == [20]  # of two frames each, of 32 ms; so the first has its centre at 16 ms
    assert found == pytest.approx([2 * 0.2 - 0.016, 2 * 0.5 - 0.016])


def test_the_speed_is_seconds_of_audio_a_second(corpus, model, monkeypatch):
    clock = iter([100.0, 102.0])
    monkeypatch.setattr(judging, "perf_counter", lambda: next(clock))
    pieces = heldout_pieces(corpus)
    seconds = sum(soundfile.info(judging.heldout_file(corpus, piece, "original")).duration for piece in pieces)
    assert judging._conversion_speed(pieces, corpus, load_model(model)) == pytest.approx(seconds / 2, abs=0.2)
