"""The built-in music: right pitches in all sounds, views of equal timing, true beats, and two sides that share nothing."""

import json
import shutil
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import soundfile
from music21 import note, stream, tie

from gae import corpus, params, scores, synthesis
from gae.errors import GaeError, ParamsError
from gae.locks import alone

SMALL = params.Corpus(hours=0.02, views=2, view_transposition=6, heldout=2, seed=1)
COMPUTE = params.Compute(workers=2)
RATE = synthesis.SAMPLE_RATE
HOP = RATE // 100


@pytest.fixture(scope="module")
def few_pieces():
    """Short pieces of several kinds, so that the tests need not play a symphony."""
    kinds = {"chorale": 8, "tune": 4}
    pieces = scores.catalogue()
    return [piece for kind, count in kinds.items() for piece in [p for p in pieces if p.kind == kind][:count]]


@pytest.fixture(scope="module")
def rendered(few_pieces, tmp_path_factory):
    out = tmp_path_factory.mktemp("corpus")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "catalogue", lambda: few_pieces)
        return out, corpus.render_corpus(params.Params(corpus=SMALL, compute=COMPUTE), out)


def listen(path):
    samples, rate = soundfile.read(path)
    assert rate == RATE
    return samples


def score_of(pitches, length=1.0):
    """One part: the pitches one after another, each for `length` quarter notes."""
    return np.array([(number * length, length, 0, pitch) for number, pitch in enumerate(pitches)], scores.NOTE)


def pitch_of(samples, near):
    """The MIDI pitch of a tone within an octave and a third of `near`: the first deep dip of YIN's difference function."""
    samples = np.fft.irfft(np.fft.rfft(samples), 4 * len(samples))  # so finely that a high tone's period falls on a sample
    half, period = len(samples) // 2, 4 * RATE / 440 * 2 ** ((69 - near) / 12)
    lags = np.arange(int(2.6 * period) + 2)
    agreement = np.fft.irfft(np.fft.rfft(samples, 2 * len(samples)) * np.fft.rfft(samples[:half], 2 * len(samples)).conj())[lags]
    energy = np.concatenate([[0], np.cumsum(samples**2)])
    difference = energy[half] + energy[lags + half] - energy[lags] - 2 * agreement
    dips = difference * lags / np.maximum(np.cumsum(difference), 1e-12)
    lag = first = int(period / 2.6)
    while dips[lag] > dips[first:].min() + 0.08 or dips[lag + 1] < dips[lag]:
        lag += 1
    left, bottom, right = difference[lag - 1 : lag + 2]
    return 69 + 12 * np.log2(4 * RATE / (lag + 0.5 * (left - right) / (left - 2 * bottom + right)) / 440)


def pitches_of(samples, performance, near):
    """The pitch of each of successive notes."""
    starts = ((performance.onsets + 0.4) * RATE).astype(int)
    return np.array([pitch_of(samples[start : start + int(0.4 * RATE)], pitch) for start, pitch in zip(starts, near, strict=True)])


@pytest.mark.parametrize("family", synthesis.FAMILIES)
def test_every_sound_plays_the_notes_that_are_written(family):
    for program in synthesis.FAMILIES[family]:
        lowest, highest = synthesis.COMPASSES.get(program, synthesis.COMPASS)
        written = [pitch for pitch in (45, 52, 57, 62, 69, 71, 76, 84, 90) if lowest <= pitch <= highest]
        notes = score_of(written)
        played = synthesis.perform(notes, 60, synthesis.STEADY, np.random.default_rng(0))
        samples = synthesis.synthesise(notes, synthesis.Take(played, (program,), 0), played.duration)
        away = pitches_of(samples, played, written) - written
        if family == "organ":  # stops of 16 feet
            away = np.where(away < -6, away + 12, away)
        assert np.abs(away).max() < 0.5, (program, away)


def test_a_transposed_take_is_transposed():
    notes = score_of([57, 64, 60, 69])
    played = synthesis.perform(notes, 60, synthesis.STEADY, np.random.default_rng(0))
    for k in (-6, -1, 4):
        samples = synthesis.synthesise(notes, synthesis.Take(played, (0,), k), played.duration)
        assert np.round(pitches_of(samples, played, notes["pitch"])).tolist() == (notes["pitch"] + k).tolist()


def test_a_repeated_note_is_struck_again():
    notes = score_of([60] * 6, length=0.5)
    played = synthesis.perform(notes, 90, synthesis.STEADY, np.random.default_rng(0))
    samples = synthesis.synthesise(notes, synthesis.Take(played, (0,), 0), played.duration)
    assert np.abs(attacks(samples)[:, None] - played.onsets).min(axis=0).max() < 0.02


def attacks(samples, hop=64):
    """Times in s at which the level of the samples jumps up."""
    level = np.sqrt(np.add.reduceat(samples**2, np.arange(0, len(samples), hop)) / hop)
    smooth = np.convolve(level, np.ones(6) / 6, "same")
    rise = smooth[6:] - smooth[:-6]
    peaks = np.flatnonzero((rise[1:-1] > rise[:-2]) & (rise[1:-1] >= rise[2:]) & (rise[1:-1] > 0.15 * rise.max())) + 1
    return (peaks + 3) * hop / RATE


def test_a_human_performance_is_heard_when_it_says():
    notes = score_of([60, 67, 72, 64, 55, 69, 76, 60] * 3)
    played = synthesis.perform(notes, 100, synthesis.HUMAN, np.random.default_rng(1))
    samples = synthesis.synthesise(notes, synthesis.Take(played, (0,), 0), played.duration)
    heard = attacks(samples)
    assert np.abs(heard[:, None] - played.onsets).min(axis=0).max() < 0.02
    assert np.abs(played.times(notes["onset"]) - played.onsets).max() <= 0.031
    tempi = 60 / np.diff(played.times(np.arange(24)))
    assert tempi.std() > 3 and len(set(played.velocities.tolist())) > 5


@pytest.mark.parametrize("seed", range(20))
def test_a_change_of_pedal_ends_the_keys_that_are_let_go_just_before_it(seed):
    notes = score_of([60, 64, 67, 72] * 20)
    played = synthesis.perform(notes, 100, synthesis.STEADY, np.random.default_rng(0))
    until = played.times(notes["onset"] + notes["length"])
    overlapping = replace(played, ends=until + 0.01)  # after the beat on which the pedal is changed, and before it is
    own = synthesis.by_hand(notes, overlapping, (0,), np.random.default_rng(seed))
    assert (own.ends[3::4] < until[3::4] + 0.13).all()  # it is changed every one, two or four quarters


@pytest.mark.parametrize("seed", range(20))
def test_by_hand_onsets_stay_and_the_pedal_holds_what_decays(seed):
    notes = np.concatenate([score_of([60, 64, 67, 72] * 80, length=0.4), score_of([48, 43, 48, 36] * 80, length=0.4)])
    piano, strings = np.split(np.arange(len(notes)), 2)
    notes["part"][strings] = 1
    played = synthesis.perform(notes, 100, synthesis.HUMAN, np.random.default_rng(0))
    own = synthesis.by_hand(notes, played, (0, 48), np.random.default_rng(seed))
    assert np.array_equal(own.onsets, played.onsets) and own.duration == played.duration
    assert len(set((own.velocities - played.velocities).tolist())) > 5
    assert own.velocities.min() >= 20 and own.velocities.max() <= 124
    held = own.ends - played.ends
    assert (held >= 0).all() and not held[strings].any()  # these need no pedal
    assert (held[piano] > 0.1).mean() > 0.5
    assert len(np.unique(own.ends[piano][held[piano] > 0].round(6))) < 0.9 * (held[piano] > 0).sum()  # many end together


@pytest.mark.parametrize("seed", range(20))
def test_an_arrangement_moves_notes_by_octaves_and_widens_the_range(seed):
    notes = np.concatenate([score_of([60, 62, 64, 65] * 10), score_of([48, 50, 52, 53] * 10), score_of([55] * 40)])
    notes["part"] = np.repeat([0, 1, 2], 40)
    arranged = scores.arrange(notes, np.random.default_rng(seed))
    assert (np.diff(arranged["onset"]) >= 0).all() and set(arranged["part"]) == {0, 1, 2}
    inner = arranged["pitch"][arranged["part"] == 2]
    assert len(inner) == 40 and len(set(inner)) == 1 and inner[0] in (43, 55, 67)
    for part, outwards in ((0, 12), (1, -12)):
        written, own = notes[notes["part"] == part], arranged[arranged["part"] == part]
        apart = (own["pitch"] - (inner[0] - 55)).reshape(40, -1) - written["pitch"][:, None]
        assert np.unique(apart).tolist() in ([0], [outwards], sorted([0, outwards]))
        assert np.array_equal(own["onset"].reshape(40, -1)[:, 0], written["onset"])


@pytest.mark.parametrize("seed", range(20))
def test_an_arrangement_strikes_each_key_once(seed):
    notes = np.concatenate([score_of([60] * 20), score_of([72] * 20), score_of([60, 72] * 10), score_of([72, 60] * 10)])
    notes["part"] = np.repeat([0, 1], 40)
    arranged = scores.arrange(notes, np.random.default_rng(seed))
    assert len(np.unique(arranged[["onset", "part", "pitch"]])) == len(arranged)
    assert len(set(arranged["part"])) == 2


@pytest.mark.parametrize(
    "music",
    ["[CC]2 [EE]2|" * 12 + "\n", "".join(f"V:{voice}\n" + "C2 E2|" * 12 + "\n" for voice in range(16))],
    ids=["one part", "parts that share a channel"],
)
def test_voices_in_unison_sound(tmp_path, monkeypatch, music):
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "unison.abc").write_text("X:1\nT:unison\nM:4/4\nL:1/4\nQ:1/4=90\nK:C\n" + music)
    monkeypatch.setattr(scores, "package", lambda name, found=scores.package: tmp_path if name == "music21" else found(name))
    score = scores.read_score(scores.Piece("unison", "tune", "unison", "nobody", "unison.abc", (90, 90)))
    n_channels = score.notes["part"].max() + 1
    assert len(score.notes) == len(np.unique(score.notes[["onset", "part", "pitch"]])) == 24 * n_channels
    played = synthesis.perform(score.notes, 90, synthesis.STEADY, np.random.default_rng(0))
    samples = synthesis.synthesise(score.notes, synthesis.Take(played, (48,) * n_channels, 0), played.duration)
    level = [
        np.sqrt((samples[int((on + 0.3) * RATE) : int((end - 0.1) * RATE)] ** 2).mean())
        for on, end in zip(played.onsets, played.ends, strict=True)
    ]
    assert min(level) > 0.05


def test_arrangements_differ_and_stay_within_what_a_score_may_hold():
    notes = np.concatenate([score_of([101, 96] * 10), score_of([28, 40] * 10)])
    notes["part"] = np.repeat([0, 1], 20)
    assert all(
        np.array_equal(scores.arrange(notes, np.random.default_rng(seed)), np.sort(notes, order=["onset", "part"])) for seed in range(20)
    )
    tune = score_of([60, 64, 67] * 10)
    assert {int(scores.arrange(tune, np.random.default_rng(seed))["pitch"][0]) for seed in range(20)} == {48, 60, 72}


def test_a_share_of_the_pieces_is_arranged(few_pieces, tmp_path):
    def sounds(name, arranged, split):
        settings = SMALL.model_copy(update={"arranged": arranged})
        return corpus.render_piece(few_pieces[0], split, None, tmp_path / split / name, settings)["files"]

    assert sounds("as-written", 0.0, "train") != sounds("arranged", 1.0, "train")
    assert sounds("heldout-0", 0.0, "heldout") == sounds("heldout-1", 1.0, "heldout")


def test_what_people_do_changes_neither_sounds_nor_keys(few_pieces, tmp_path):
    reports = {}
    for share in (0.0, 1.0):
        settings = SMALL.model_copy(update={"human": share})
        reports[share] = corpus.render_piece(few_pieces[0], "train", None, tmp_path / "train" / str(share), settings)
        views = [listen(tmp_path / "train" / str(share) / f"{view}.flac") for view in (1, 2)]
        assert len(views[0]) == len(views[1]) == round(reports[share]["duration_s"] * RATE)
    assert reports[0.0]["sounds"] == reports[1.0]["sounds"] and reports[0.0]["files"] != reports[1.0]["files"]


def voices(*parts):
    """Parts of measures of notes, each (pitch or None for a rest, length in quarter notes, tie or None)."""
    made = []
    for measures in parts:
        part = stream.Part()
        for number, written in enumerate(measures, 1):
            measure = stream.Measure(number=number)
            for pitch, length, tied in written:
                single = note.Note(pitch) if pitch else note.Rest()
                single.quarterLength, single.tie = length, tie.Tie(tied) if tied else None
                measure.append(single)
            part.append(measure)
        made.append(part)
    return made


def test_a_measure_that_is_too_long_or_too_short_leaves_its_part_in_step():
    whole = [(60, 4, None)]
    parts = voices(
        [whole, whole, whole, whole],
        [[(None, 4, None), (None, 4, None)], whole, [(62, 2.5, None), (64, 2, None)], whole],  # two whole rests, a length that is wrong
        [whole, [(67, 3, None)], [(None, 4, None)], whole],
    )
    scores._begin_together(parts)
    read = [[tuple(found)[:2] for found in scores._notes(part, number)] for number, part in enumerate(parts)]
    assert read[0] == [(0, 4), (4, 4), (8, 4), (12.5, 4)]
    assert read[1] == [(4, 4), (8, 2.5), (10.5, 2), (12.5, 4)]
    assert read[2] == [(0, 4), (4, 3), (12.5, 4)]
    assert scores._beats(parts[1]).tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 12.5, 13.5, 14.5, 15.5]


def test_measures_that_are_in_step_stay_where_they_are():
    parts = voices([[(60, 1, None)], [(60, 4, None)], [(60, 3, None)]], [[(48, 1, None)], [(None, 4, None)], [(48, 3, None)]])
    scores._begin_together(parts)
    assert [[measure.offset for measure in part] for part in parts] == [[0, 1, 5]] * 2


@pytest.mark.parametrize("ties", [("start", "stop"), ("start", None)])
def test_tied_notes_are_one_however_their_end_is_encoded(ties):
    (part,) = voices(
        [[(60, 2, None), (62, 2, ties[0])], [(62, 2, ties[1]), (62, 2, None)], [(62, 4, "start"), (64, 4, None), (62, 4, None)]]
    )
    read = [tuple(found) for found in scores._notes(part, 0)]
    assert read == [(0, 2, 0, 60), (2, 4, 0, 62), (6, 2, 0, 62), (8, 4, 0, 62), (12, 4, 0, 64), (16, 4, 0, 62)]


def test_voices_of_a_madrigal_that_is_encoded_with_double_rests_end_together():
    piece = next(piece for piece in scores.catalogue() if piece.id == "monteverdi-madrigal.5.2")
    notes = scores.read_score(piece).notes
    ends = [(own["onset"] + own["length"]).max() for own in (notes[notes["part"] == part] for part in range(6))]
    assert ends == [276.0] * 6  # 69 measures of four quarters


def test_a_score_is_read_as_written(few_pieces):
    piece = next(piece for piece in few_pieces if piece.id == "bach-bwv10.7")
    score = scores.read_score(piece)
    assert (score.composer, score.title) == ("Johann Sebastian Bach", "bwv10.7")
    assert score.notes["part"].max() == 3
    top = score.notes[score.notes["part"] == 0]
    assert (np.diff(top["onset"]) > 0).all()
    assert np.isin(score.beats, score.notes["onset"]).all() and np.isin(np.diff(score.beats), [1, 2, 3, 4]).all()


def test_what_is_rendered(rendered):
    out, index = rendered
    train = [piece for piece in index["pieces"] if piece["split"] == "train"]
    heldout = [piece for piece in index["pieces"] if piece["split"] == "heldout"]
    assert len(heldout) == 2 and sum(piece["duration_s"] for piece in train) >= 0.02 * 3600
    files = {path.relative_to(out).as_posix() for path in out.rglob("*.flac")}
    assert files == {f"train/{piece['id']}/{view}.flac" for piece in train for view in (1, 2)} | {
        f"heldout/{piece['id']}/{name}.flac" for piece in heldout for name in ("original", "transposed", "performance")
    }
    assert not list(out.rglob(".*"))
    assert json.loads((out / "corpus.json").read_text()) == index
    for piece in index["pieces"]:
        assert piece.keys() >= {"id", "kind", "work", "title", "composer", "source", "duration_s", "sounds"}


def test_no_work_is_on_both_sides(rendered):
    _, index = rendered
    sides = [{piece["work"] for piece in index["pieces"] if piece["split"] == split} for split in ("train", "heldout")]
    assert not sides[0] & sides[1]


def test_views_are_one_performance_in_other_sounds(rendered):
    out, index = rendered
    for piece in index["pieces"]:
        if piece["split"] == "train":
            first, second = (listen(out / "train" / piece["id"] / f"{view}.flac") for view in (1, 2))
            assert len(first) == len(second) == round(piece["duration_s"] * RATE)
            assert piece["sounds"]["1"]["k"] == 0 and abs(piece["sounds"]["2"]["k"]) <= 6
            assert piece["sounds"]["1"]["programs"] != piece["sounds"]["2"]["programs"]
            assert (transposition(first, second) - piece["sounds"]["2"]["k"]) % 12 == 0
            for samples in (first, second):
                assert np.abs(samples).max() == pytest.approx(0.8, abs=1e-3)


def chroma(samples):
    """Energy of the twelve pitch classes, frame by frame: (n, 12)."""
    window = np.lib.stride_tricks.sliding_window_view(samples, 8192)[::2048] * np.hanning(8192)
    frequencies = np.fft.rfftfreq(8192, 1 / RATE)
    audible = (frequencies > 120) & (frequencies < 2000)
    classes = np.round(69 + 12 * np.log2(frequencies[audible] / 440)).astype(int) % 12
    energy = np.abs(np.fft.rfft(window)[:, audible])
    return np.stack([energy[:, classes == name].sum(axis=1) for name in range(12)], axis=1)


def transposition(first, second):
    """The shift of pitch classes that makes the one most like the other."""
    first, second = chroma(first), chroma(second)
    return max(range(-6, 6), key=lambda k: np.corrcoef(np.roll(first, k, axis=1).ravel(), second.ravel())[0, 1])


def test_heldout_pieces_are_transposed_as_they_say(rendered):
    out, index = rendered
    for piece in index["pieces"]:
        if piece["split"] == "heldout":
            original, transposed = (listen(out / "heldout" / piece["id"] / f"{name}.flac") for name in ("original", "transposed"))
            assert len(original) == len(transposed) and 1 <= abs(piece["k"]) <= 6
            assert (transposition(original, transposed) - piece["k"]) % 12 == 0


def test_the_other_player_keeps_neither_the_tempo_of_the_score_nor_one_tempo(rendered):
    _, index = rendered
    for piece in index["pieces"]:
        if piece["split"] == "heldout":
            score, performance = (np.array(piece["beats"][side]) for side in ("score", "performance"))
            slower = np.diff(performance)[:-4] / np.diff(score)[:-4]
            assert 1 / 1.4 / 1.6 < np.median(slower) < 1 / 0.7 * 1.6
            assert 0.13 < np.log(slower).std() < 0.4, piece["id"]


def test_beats_are_heard_where_they_are_said_to_be(rendered):
    out, index = rendered
    for piece in index["pieces"]:
        if piece["split"] == "heldout":
            assert len(piece["beats"]["score"]) == len(piece["beats"]["performance"]) > 10
            for name, side in (("original", "score"), ("transposed", "score"), ("performance", "performance")):
                beats = np.array(piece["beats"][side])
                novelty = flux(listen(out / "heldout" / piece["id"] / f"{name}.flac"))
                assert (np.diff(beats) > 0).all() and beats[-1] < len(novelty) * HOP / RATE
                at_beats, between = (
                    novelty[(times / 0.01).astype(int)].mean() for times in (beats + 0.02, beats[:-1] + 0.4 * np.diff(beats))
                )
                assert at_beats > 1.5 * between, (piece["id"], name)


def flux(samples):
    """How much of the spectrum is new, every HOP samples, at its largest within 50 ms."""
    window = np.lib.stride_tricks.sliding_window_view(np.pad(samples, 512), 1024)[::HOP] * np.hanning(1024)
    level = np.log1p(20 * np.abs(np.fft.rfft(window)))
    new = np.maximum(0, level[3:] - level[:-3]).sum(axis=1)
    return np.lib.stride_tricks.sliding_window_view(np.pad(new, (4, 4)), 5).max(axis=1)


def test_a_second_run_is_the_same_to_the_byte(rendered, few_pieces, tmp_path):
    out, index = rendered
    assert not (out.parent / f".{out.name}-made").exists()
    report = next(piece for piece in index["pieces"] if piece["split"] == "train")
    piece = next(piece for piece in few_pieces if piece.id == report["id"])
    corpus.render_piece(piece, "train", None, tmp_path / "train" / "again", SMALL)
    for path in (tmp_path / "train" / "again").iterdir():
        assert path.read_bytes() == (out / "train" / piece.id / path.name).read_bytes()


def test_what_is_there_is_kept_and_what_is_stale_goes(rendered, few_pieces, tmp_path):
    folder = tmp_path / "train" / "piece"
    tune = next(piece for piece in few_pieces if piece.kind == "chorale")
    corpus.render_piece(tune, "train", None, folder, SMALL)
    before = (folder / "1.flac").stat().st_mtime_ns
    corpus.render_piece(tune, "train", None, folder, SMALL)
    assert (folder / "1.flac").stat().st_mtime_ns == before
    corpus.render_piece(tune, "train", None, folder, SMALL.model_copy(update={"seed": 2}))
    assert (folder / "1.flac").stat().st_mtime_ns > before
    for name in ("piece", "bach-bwv1.6"):
        (tmp_path / "train" / f".{name}.partial").mkdir()
    (tmp_path / ".corpus.json.123.partial").touch()
    corpus._keep_only(tmp_path, [{"split": "train", "id": "piece"}])
    assert [path.name for path in tmp_path.rglob("*") if path.is_dir() or path.suffix == ".partial"] == ["train", "piece"]
    (tmp_path / "train" / "dataset").mkdir()
    (tmp_path / "train" / "dataset" / "labels.csv").write_text("the user's")
    corpus._keep_only(tmp_path, [])
    assert [path.name for path in (tmp_path / "train").iterdir()] == ["dataset"]


def test_what_a_run_that_was_broken_off_had_rendered_outlives_what_dvc_puts_back(few_pieces, tmp_path):
    folder, tune = tmp_path / "corpus" / "train" / "piece", next(piece for piece in few_pieces if piece.kind == "chorale")
    waiting = tmp_path / ".corpus-made" / "train" / "piece"
    report = corpus.render_piece(tune, "train", None, folder, SMALL)
    stamp = (folder / "1.flac").stat().st_mtime_ns
    shutil.rmtree(tmp_path / "corpus")
    assert corpus.render_piece(tune, "train", None, folder, SMALL) == report and (folder / "1.flac").stat().st_mtime_ns == stamp
    shutil.rmtree(tmp_path / "corpus")
    (waiting / "1.flac").write_bytes(b"half")
    assert corpus.render_piece(tune, "train", None, folder, SMALL) == report
    assert (folder / "1.flac").stat().st_mtime_ns > stamp


@pytest.fixture
def slow(monkeypatch):
    """Rendering takes a while and gives its first argument: what has begun, and what has ended."""
    begun, ended = [], []

    def render(number):
        begun.append(number)
        time.sleep(0.05)
        ended.append(number)
        return number

    monkeypatch.setattr(corpus, "render_piece", render)
    return begun, ended


def test_pieces_under_way_are_waited_for_when_there_are_enough(slow):
    """Dask's workers go on with what is cancelled: they would write into the folder after it was cleared up."""
    begun, ended = slow

    def submit(function, *arguments):
        promise, work = Future(), pool.submit(function, *arguments)
        work.add_done_callback(lambda done: promise.cancelled() or promise.set_result(done.result()))
        return promise

    with ThreadPoolExecutor(2) as pool:
        reports = corpus._in_order(submit, False, [(number,) for number in range(20)], lambda: 5)
        assert [next(reports), next(reports)] == [0, 1]
        reports.close()
        assert sorted(ended) == sorted(begun) and len(begun) < 20


def test_pieces_that_have_not_begun_are_not_rendered_when_there_are_enough(slow):
    begun, ended = slow
    with ThreadPoolExecutor(1) as pool:
        reports = corpus._in_order(pool.submit, True, [(number,) for number in range(20)], lambda: 10)
        assert next(reports) == 0
        reports.close()
        assert ended == begun and len(begun) < 4


def test_a_second_rendering_beside_the_first_is_refused(tmp_path):
    with alone(tmp_path / "corpus"), pytest.raises(GaeError, match="corpus: another run is writing here"):
        corpus.render_corpus(params.Params(corpus=SMALL, compute=COMPUTE), tmp_path / "corpus")


def test_no_more_pieces_are_begun_than_can_be_wanted():
    begun, under_way = [], []

    def submit(function, number):
        begun.append(number)
        under_way.append(len(begun) - len(chosen))
        promise = Future()
        promise.set_result({"id": number, "melodies": [], "minutes": 1 if number else 3})
        return promise

    chosen = []
    jobs = [(number,) for number in range(20)]
    rendered = partial(corpus._in_order, submit, True)
    assert corpus._gather(rendered, 4, jobs, chosen, [], 7, "minutes", size=lambda report: report["minutes"], least=1) == []
    assert begun == [0, 1, 2, 3, 4] and max(under_way) == 4 and len(chosen) == 5


@pytest.mark.parametrize("name", ["1.flac", "piece.json"])
def test_what_is_damaged_is_rendered_again(few_pieces, tmp_path, name):
    tune = next(piece for piece in few_pieces if piece.kind == "tune")
    report = corpus.render_piece(tune, "train", None, tmp_path / "train" / "piece", SMALL)
    whole = (tmp_path / "train" / "piece" / name).read_bytes()
    (tmp_path / "train" / "piece" / name).write_bytes(whole[: len(whole) // 2])
    assert corpus.render_piece(tune, "train", None, tmp_path / "train" / "piece", SMALL) == report
    assert (tmp_path / "train" / "piece" / name).read_bytes() == whole


def test_more_music_than_there_is(few_pieces, tmp_path):
    one = [piece for piece in few_pieces if piece.kind == "chorale"][:3]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ParamsError, match=r"lower corpus\.hours"):
        patch.setattr(corpus, "catalogue", lambda: one)
        corpus.render_corpus(params.Params(corpus=SMALL, compute=params.Compute(workers=1)), tmp_path)


def test_harmonisations_of_one_melody_are_alike():
    pieces = {piece.id: piece for piece in scores.catalogue()}
    passion, again, other = (corpus._melodies(scores.read_score(pieces[f"bach-bwv{n}"]).notes) for n in ("244.54", "244.15", "253"))
    assert corpus._resemblance({"melodies": again}, [{"id": "passion", "melodies": passion}]) == "has a melody of passion"
    assert corpus._resemblance({"melodies": other}, [{"id": "passion", "melodies": passion}]) is None


def test_pieces_have_names_of_their_own():
    pieces = scores.catalogue()
    assert len({piece.id for piece in pieces}) == len(pieces) > 2000
    assert {piece.kind for piece in pieces} == {kind.name for kind in scores.KINDS}


def test_the_default_hour_is_diverse():
    pieces = scores.catalogue()
    heldout = [piece for piece, _ in corpus._heldout_candidates(pieces, 1)[:12]]
    for chosen in (heldout, corpus._training_candidates(pieces, 1)[:40]):
        assert len({piece.kind for piece in chosen}) >= 8


def test_takes_are_in_different_sounds_that_have_all_the_notes():
    rng = np.random.default_rng(3)
    notes = np.concatenate([score_of([50, 76]), score_of([36, 60])])
    notes["part"] = [0, 0, 1, 1]
    firsts = set()
    for _ in range(40):
        families = synthesis.draw_families(notes, [-3, 0, 5], rng)
        assert len(set(families)) == len(families) >= 8
        takes = [synthesis.draw_programs(family, notes, [-3, 0, 5], rng) for family in families]
        assert len({programs[0] for programs in takes}) == len(takes)
        firsts |= {programs[0] for programs in takes}
        for programs in takes:
            for program, (lowest, highest) in zip(programs, [(47, 81), (33, 65)], strict=True):
                bottom, top = synthesis.COMPASSES.get(program, synthesis.COMPASS)
                assert bottom <= lowest and highest <= top
    assert len(firsts) > 30
