import errno
import io
import warnings

import librosa
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from gae import cqt as transform
from gae.cqt import analyse, compress, frame_times, frames, magnitude_blocks, standardise, transpose
from gae.errors import AudioError
from gae.params import Cqt

CQT = tiny.CQT
DEFAULT = Cqt()


def noise(n_samples, seed=0):
    return 0.1 * np.random.default_rng(seed).standard_normal(n_samples).astype(np.float32)


def whole(samples, cqt):
    """Magnitudes of the whole recording at once, by librosa."""
    return np.abs(
        librosa.cqt(
            samples,
            sr=cqt.sample_rate,
            hop_length=cqt.hop_length,
            fmin=cqt.fmin,
            n_bins=cqt.n_bins,
            bins_per_octave=cqt.bins_per_octave,
        )
    ).T


def by_the_formula(magnitudes, cqt):
    """Compression and standardising, frame by frame, in float64."""
    largest = magnitudes.max()
    rows = []
    for row in magnitudes.astype(np.float64):
        if cqt.compression == "log":
            row = np.log(1 + cqt.gain * row / largest)
        row = row - row.mean()
        norm = np.sqrt((row**2).sum())
        rows.append(row / norm if norm > 1e-8 else 0 * row)
    return np.array(rows)


@pytest.mark.parametrize("cqt", [DEFAULT, CQT, Cqt(sample_rate=44100, hop_length=441, fmin=200, n_bins=100, bins_per_octave=36)])
def test_magnitudes_are_those_of_librosa(cqt):
    samples = noise(5 * cqt.sample_rate + 17)
    magnitudes = np.concatenate(list(magnitude_blocks([samples], cqt)))
    assert magnitudes.dtype == np.float32 and magnitudes.shape == (1 + len(samples) // cqt.hop_length, cqt.n_bins)
    assert np.allclose(magnitudes, whole(samples, cqt), atol=1e-6)


@pytest.mark.parametrize("cqt", [DEFAULT, CQT])
def test_pieces_join_without_a_seam(monkeypatch, cqt):
    samples = noise(round(8.3 * cqt.sample_rate))
    expected = whole(samples, cqt)
    for piece in (64, 128):
        monkeypatch.setattr(transform, "_PIECE", piece)
        pieces = list(magnitude_blocks([samples], cqt))
        assert len(pieces) > 1 and len(pieces[0]) == piece
        assert np.abs(np.concatenate(pieces) - expected).max() < 1e-5 * expected.max()


def test_where_the_rate_can_not_be_halved_pieces_are_shorter():
    """Spectra of 704 frames at a hop of 441 take as much memory as of 16,384 at a hop of 448."""
    frames_a_piece = {hop: transform._piece_length(Cqt(hop_length=hop)) for hop in (441, 440, 448, 896, 8192)}
    assert frames_a_piece == {441: 704, 440: 5824, 448: 16384, 896: 16384, 8192: 2048}
    slow = Cqt(sample_rate=192_000, hop_length=1001, fmin=4, n_bins=100, bins_per_octave=12)  # most of a short piece were overlap
    assert transform._piece_length(slow) == 2 * transform._margin(slow)


@pytest.mark.parametrize("hop", [55, 64])
def test_shorter_pieces_join_without_a_seam(monkeypatch, hop):
    cqt = CQT.model_copy(update={"hop_length": hop})
    samples = noise(20 * cqt.sample_rate)
    expected = whole(samples, cqt)
    monkeypatch.setattr(transform, "_HELD", 1)
    pieces = list(magnitude_blocks(np.array_split(samples, 7), cqt))
    assert len(pieces) > 2 and len(pieces[0]) == 2 * transform._margin(cqt)
    assert np.abs(np.concatenate(pieces) - expected).max() < 1e-5 * expected.max()


@given(st.lists(st.integers(0, 9000), max_size=12), st.integers(0, 30_000))
@settings(max_examples=15)
def test_frames_do_not_depend_on_how_the_samples_arrive(cuts, n_samples):
    samples = noise(n_samples)
    before = transform._PIECE
    transform._PIECE = 64
    try:
        blocks = np.split(samples, np.minimum(np.cumsum(cuts), n_samples).astype(int))
        with analyse(iter(blocks), CQT) as analysis:
            arrived = np.concatenate([np.zeros((0, CQT.n_bins), np.float32), *analysis.blocks()])
            assert len(arrived) == analysis.n_frames == (1 + n_samples // CQT.hop_length if n_samples else 0)
        assert np.array_equal(arrived, frames(samples, CQT))
    finally:
        transform._PIECE = before


@pytest.mark.parametrize("compression", ["log", "none"])
def test_frames_follow_the_formula(compression):
    cqt = DEFAULT.model_copy(update={"compression": compression, "gain": 50.0})
    samples = tiny.tone(4, cqt.sample_rate) + noise(4 * cqt.sample_rate) / 50
    made = frames(samples, cqt)
    assert made.dtype == np.float32
    assert np.allclose(made, by_the_formula(whole(samples, cqt), cqt), atol=2e-5)
    assert np.allclose(made.mean(axis=1), 0, atol=1e-6) and np.allclose((made**2).sum(axis=1), 1, atol=1e-5)


def test_a_pass_knows_the_whole_recordings_peak_and_can_be_repeated(monkeypatch):
    monkeypatch.setattr(transform, "_PIECE", 64)
    samples = noise(40_000) * np.hanning(40_000).astype(np.float32)  # loudest in neither the first piece nor the last
    with analyse([samples], CQT) as analysis:
        first, second = (np.concatenate(list(analysis.blocks())) for _ in range(2))
        assert analysis.peak == pytest.approx(whole(samples, CQT).max(), rel=1e-5)
    assert np.array_equal(first, second)
    assert np.allclose(first, by_the_formula(whole(samples, CQT), CQT), atol=1e-4)


def test_loudness_changes_nothing():
    samples = noise(20_000)
    assert np.allclose(frames(samples, CQT), frames(1000 * samples, CQT), atol=1e-5)


@pytest.mark.parametrize("frequency", [220.0, 440.0, 554.37])
def test_a_tone_is_where_it_belongs(frequency):
    made = frames(np.sin(2 * np.pi * frequency * np.arange(16_000) / 8000).astype(np.float32), CQT)
    assert np.all(made[10:-10].argmax(axis=1) == round(12 * np.log2(frequency / CQT.fmin)))


def test_an_onset_is_when_it_belongs():
    samples = np.zeros(16_000, np.float32)
    samples[8000:8020] = 1.0  # at 1 s
    cqt = CQT.model_copy(update={"fmin": 880.0, "n_bins": 12})
    loudest = np.concatenate(list(magnitude_blocks([samples], cqt))).sum(axis=1).argmax()
    assert frame_times(100, cqt)[loudest] == pytest.approx(1, abs=cqt.frame_seconds)


def test_times_are_centres_of_frames():
    assert np.array_equal(frame_times(3, DEFAULT), [0, 448 / 22050, 2 * 448 / 22050])


@pytest.mark.parametrize("compression", ["log", "none"])
def test_silence_is_zero(compression):
    cqt = DEFAULT.model_copy(update={"compression": compression})
    assert not frames(np.zeros(30_000, np.float32), cqt).any()
    music = noise(2 * cqt.sample_rate)
    made = frames(np.concatenate([music, np.zeros(8 * cqt.sample_rate, np.float32), music]), cqt)
    times = frame_times(len(made), cqt)
    within = (times > 3) & (times < 9)  # the longest filter is half a second away from any sound
    assert not made[within].any()
    assert np.allclose(np.linalg.norm(made[(times < 1.9) | (times > 10.1)], axis=1), 1, atol=1e-5)


@pytest.mark.parametrize("offset", range(0, DEFAULT.hop_length, 64))
@pytest.mark.parametrize(("sound", "most"), [("click", 0.9), ("noise", 0.9), ("tone", 0.78), ("offset", 2)])
def test_silence_ends_no_more_than_so_long_before_an_onset(sound, most, offset):
    """As the README says: half of the longest window, and of the filters that halve the sample rate for it."""
    rate, onset = DEFAULT.sample_rate, 3 * DEFAULT.sample_rate + offset
    times = np.arange(rate) / rate
    tone = sum(np.sin(2 * np.pi * n * 110 * times) / n for n in range(1, 20))
    sounds = {"click": times == 0, "noise": noise(rate), "tone": tone, "offset": np.ones(rate)}
    heard = frames(np.concatenate([np.zeros(onset), sounds[sound]]).astype(np.float32), DEFAULT).any(axis=1)
    first = frame_times(len(heard), DEFAULT)[heard.argmax()]
    assert 0.5 < onset / rate - first <= most


def test_a_quiet_passage_is_no_silence():
    music = noise(2 * 8000)
    made = frames(np.concatenate([music, music / 1000]), CQT)
    assert np.allclose(np.linalg.norm(made, axis=1), 1, atol=1e-5)


@pytest.mark.parametrize("n_samples", [1, 2, 255, 256, 257, 1000])
def test_the_shortest_recordings_have_frames(n_samples):
    made = frames(noise(n_samples), CQT)
    assert made.shape == (1 + n_samples // 256, CQT.n_bins) and np.isfinite(made).all()
    assert made.any()


@pytest.mark.parametrize("seconds", [0.01, 0.5, 1.4])
def test_short_recordings_make_no_noise_on_the_console(seconds):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = frames(noise(int(seconds * DEFAULT.sample_rate)), DEFAULT)
    assert np.allclose(np.linalg.norm(made, axis=1), 1, atol=1e-5)


def test_nothing_has_no_frames():
    assert frames(np.zeros(0, np.float32), CQT).shape == (0, CQT.n_bins)


def test_several_channels_are_refused():
    with pytest.raises(AudioError, match=r"of shape \(2000, 2\), not mono; gae\.audio\.mono mixes"):
        frames(np.stack([noise(2000)] * 2, 1), CQT)


@pytest.mark.parametrize("level", [1e12, 1e-30, 1e-40])
def test_extreme_levels_stay_finite(level):
    made = frames((noise(3000).astype(np.float64) * level).astype(np.float32), CQT)
    assert np.isfinite(made).all() and made.any()


@pytest.mark.parametrize("wrong", [np.nan, np.inf, 1e32])
def test_samples_that_no_transform_bears_are_refused(wrong):
    with pytest.raises(AudioError, match="NaN, infinite or too large; give finite"):
        frames(noise(3000) * np.float32(wrong), CQT)


def test_compression_by_hand():
    magnitudes = np.array([[0, 1, 4]], np.float32)
    assert np.allclose(compress(magnitudes, 4.0, CQT), np.log([[1, 251, 1001]]))
    assert np.array_equal(compress(magnitudes, 4.0, CQT.model_copy(update={"compression": "none"})), magnitudes)


def test_standardising_by_hand():
    rows = np.array([[1, 2, 3], [1e-7, 2e-7, 3e-7], [5, 5, 5], [0, 0, 0], [1e-9, 2e-9, 3e-9]], np.float32)
    rising = [-np.sqrt(0.5), 0, np.sqrt(0.5)]
    assert np.allclose(standardise(rows), [rising, rising, [0, 0, 0], [0, 0, 0], [0, 0, 0]], atol=1e-6)


@pytest.mark.parametrize("n_bins", [2, 120, 2000])
def test_a_constant_frame_becomes_zero_whatever_its_mean_rounds_to(n_bins):
    levels = np.random.default_rng(1).uniform(0, 10, 500).astype(np.float32)
    assert not standardise(np.repeat(levels[:, None], n_bins, axis=1)).any()


@given(
    st.sampled_from([1000, 8000, 22050, 48000]),
    st.sampled_from([16, 100, 448, 1000]),
    st.floats(20, 2000),
    st.integers(2, 60),
    st.sampled_from([1, 5, 12, 24]),
)
@settings(max_examples=20)
def test_whatever_the_parameters_allow_can_be_transformed(sample_rate, hop_length, fmin, n_bins, bins_per_octave):
    try:
        cqt = Cqt(sample_rate=sample_rate, hop_length=hop_length, fmin=fmin, n_bins=n_bins, bins_per_octave=bins_per_octave)
    except ValueError:
        return
    made = frames(noise(3000), cqt)
    assert made.shape == (1 + 3000 // hop_length, n_bins) and np.isfinite(made).all()


@given(st.integers(-50, 50))
def test_transposing_moves_bins_and_fills_with_zeros(shift):
    frames = np.arange(1, 3 * 24 + 1, dtype=np.float32).reshape(3, 24)
    expected = np.zeros_like(frames)
    for b in range(24):
        if 0 <= b - shift < 24:
            expected[:, b] = frames[:, b - shift]
    assert np.array_equal(transpose(frames, shift), expected)


def test_a_full_temporary_folder_is_named(monkeypatch):
    class Full(io.BytesIO):
        def write(self, data):
            if self.tell() + len(data) > 4096:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(data[:1000])

    monkeypatch.setattr("tempfile.TemporaryFile", lambda buffering: Full())
    with pytest.raises(OSError, match=r"No space left on device: '.* \(or another folder, named by TMPDIR\)'"):
        frames(tiny.tone(1, 8000), tiny.CQT)


def test_integers_are_samples():
    samples = (20_000 * tiny.tone(1, 8000)).astype(np.int16)
    assert np.array_equal(frames(samples, tiny.CQT), frames(samples.astype(np.float32), tiny.CQT))


def test_the_silence_of_unsigned_integers_is_in_their_middle():
    samples = np.round(100 * tiny.tone(1, 8000)).astype(np.int16)
    expected = frames(samples, tiny.CQT)
    assert np.array_equal(frames((samples + 128).astype(np.uint8), tiny.CQT), expected)
    assert np.allclose(frames(((samples.astype(int) + 128) << 8).astype(np.uint16), tiny.CQT), expected, atol=1e-6)


@pytest.mark.parametrize("kind", [np.float16, np.float64, np.longdouble])
def test_floats_of_any_width_are_samples(kind):
    samples = tiny.tone(1, 8000).astype(kind)
    assert np.array_equal(frames(samples, tiny.CQT), frames(samples.astype(np.float32), tiny.CQT))


@pytest.mark.parametrize("samples", [np.array([0, np.nan]), np.array([np.inf]), np.array([1e39]), np.zeros(3, complex), np.array(["a"])])
def test_what_is_no_sound_is_refused(samples):
    with pytest.raises(AudioError, match="give finite real numbers"):
        frames(samples, tiny.CQT)
