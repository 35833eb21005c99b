import os
import re
import struct
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
import soundfile
import tiny

from gae import audio
from gae.errors import AudioError, one_line


@pytest.fixture
def write(tmp_path):
    def write(name, samples, sample_rate=22050, **how):
        soundfile.write(tmp_path / name, samples, sample_rate, **how)
        return tmp_path / name

    return write


def refuse(path):
    """The message with which a file is refused, by all that read one: one line that names the file and a remedy."""
    messages = set()
    for read in (lambda: audio.load(path, 8000), lambda: audio.probe(path), lambda: list(audio.blocks(path, 44100))):
        with pytest.raises(AudioError) as caught:
            read()
        messages.add(str(caught.value))
    assert len(messages) == 1
    message = messages.pop()
    assert message.startswith(one_line(f"{path}: ")) and message.splitlines() == [message]
    assert any(remedy in message for remedy in ("again", "check", "convert", "allowed"))
    return message


def pitch(samples, sample_rate):
    """Frequency of the strongest partial, in Hz."""
    spectrum = np.abs(np.fft.rfft(samples * np.hanning(len(samples)), 1 << 18))
    return np.argmax(spectrum) * sample_rate / (1 << 18)


@pytest.mark.parametrize("semitones", [-6, 1, 4])
@pytest.mark.parametrize("seconds", [0.5, 2.3])
def test_a_shifted_pitch_leaves_the_time(monkeypatch, semitones, seconds):
    monkeypatch.setattr(audio, "_SHIFTED", 1)
    samples = tiny.tone(seconds, 8000, 400.0)
    moved = np.concatenate(list(audio.shift_pitch(np.array_split(samples, 7), 8000, semitones)))
    assert moved.dtype == np.float32 and moved.shape == samples.shape
    assert pitch(moved, 8000) == pytest.approx(pitch(samples, 8000) * 2 ** (semitones / 12), rel=0.01)
    assert np.array_equal(moved, np.concatenate(list(audio.shift_pitch([samples], 8000, semitones))))


@pytest.mark.parametrize("samples", [0, 1, 100])
def test_next_to_nothing_can_be_shifted(samples):
    assert sum(map(len, audio.shift_pitch([np.zeros(samples, np.float32)], 22050, 3))) == samples


FORMATS = [
    *(
        ("wav", {"subtype": subtype}, 0.01 if subtype == "PCM_U8" else 1e-4)
        for subtype in ("PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE")
    ),
    ("flac", {"subtype": "PCM_16"}, 1e-4),
    ("flac", {"subtype": "PCM_24"}, 1e-6),
    ("aiff", {"subtype": "PCM_16"}, 1e-4),
    ("ogg", {}, 0.05),
    ("mp3", {}, 0.05),
]


@pytest.mark.parametrize(("extension", "how", "tolerance"), FORMATS, ids=[f"{e}-{h.get('subtype', '')}" for e, h, _ in FORMATS])
def test_every_format_gives_its_samples(write, extension, how, tolerance):
    samples = tiny.tone(1, 22050)
    path = write(f"tone.{extension}", samples, **how)
    read = audio.load(path, 22050)
    assert read.dtype == np.float32 and read.shape == samples.shape
    assert np.abs(read - samples).max() < tolerance
    assert audio.probe(path) == audio.AudioInfo(22050, 22050, 1) and audio.probe(path).seconds == 1.0
    assert audio.claimed_seconds(path) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize(
    ("rate", "extension"), [(8000, "wav"), (22051, "flac"), (44100, "wav"), (44100, "mp3"), (48000, "ogg"), (96000, "flac")]
)
@pytest.mark.parametrize("target", [8000, 22050])
def test_resampling_keeps_length_and_pitch(write, rate, extension, target):
    samples = audio.load(write(f"tone.{extension}", tiny.tone(1.5, rate, 1000.0), rate), target)
    assert len(samples) == pytest.approx(1.5 * target, abs=2)
    assert pitch(samples, target) == pytest.approx(1000, rel=0.001)
    assert np.abs(samples).max() == pytest.approx(0.4, rel=0.05)


def test_resampling_removes_what_would_alias(write):
    assert np.abs(audio.load(write("high.wav", tiny.tone(1, 44100, 15000.0), 44100), 22050)[2000:9000]).max() < 1e-3


@pytest.mark.parametrize("channels", [1, 2, 8])
def test_channels_are_averaged(write, channels):
    samples = np.random.default_rng(0).uniform(-0.5, 0.5, (40_000, channels)).astype(np.float32)
    path = write("many.wav", samples, subtype="FLOAT")
    assert np.allclose(audio.load(path, 22050), samples.mean(axis=1), atol=1e-6)
    assert np.array_equal(audio.load(path, 22050), audio.mono(samples))
    assert audio.probe(path).channels == channels


@pytest.mark.parametrize("channels", [2, 3, 8])
def test_a_mix_does_not_depend_on_how_the_samples_lie_in_memory(channels):
    samples = np.random.default_rng(0).uniform(-0.5, 0.5, (4000, channels)).astype(np.float32)
    whole = audio.mono(samples)
    for start in range(1, 9):
        moved = np.zeros(samples.size + start, np.float32)[start:].reshape(samples.shape)
        moved[:] = samples
        assert np.array_equal(audio.mono(moved), whole)
        assert np.array_equal(audio.mono(samples[start : 1000 + 3 * start]), whole[start : 1000 + 3 * start])


@pytest.mark.parametrize("target", [22050, 8000])
def test_samples_do_not_depend_on_how_they_are_read(write, monkeypatch, target):
    samples = tiny.tone(2, 22050)
    path = write("tone.wav", samples, subtype="FLOAT")
    whole = audio.load(path, target)
    monkeypatch.setattr(audio, "_CHUNK", 1000)
    assert len(list(audio.blocks(path, target))) > 40
    assert np.allclose(audio.load(path, target), whole, atol=1e-6)
    assert np.allclose(audio.resample(samples, 22050, target), whole, atol=1e-6)
    assert np.array_equal(audio.resample(samples.astype(np.float64), 22050, target), audio.resample(samples, 22050, target))


def test_silence_is_audio(write):
    assert not audio.load(write("silence.flac", np.zeros(1000)), 22050).any()


def test_a_name_may_hold_anything(write):
    assert len(audio.load(write("Für Élise – 音 (#1) [live].flac", tiny.tone(0.1, 22050)), 22050)) == 2205


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e300])
@pytest.mark.parametrize("channels", [1, 2])
def test_samples_that_are_no_numbers_are_refused(write, value, channels):
    samples = np.zeros((5000, channels))
    samples[3000, -1] = value
    assert "NaN, infinite or absurd" in refuse(write("broken.wav", samples, subtype="DOUBLE"))


def test_opposite_infinities_do_not_cancel(write):
    assert "infinite" in refuse(write("broken.wav", np.tile([3e38, 3e38], (100, 1)), subtype="FLOAT"))


def test_loud_floats_are_audio(write):
    assert audio.load(write("unscaled.wav", 32768 * tiny.tone(0.1, 22050), subtype="FLOAT"), 22050).max() > 10_000


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("empty.wav", b""),
        ("empty.flac", b""),
        ("text.wav", b"not a sound\n" * 100),
        ("text.ogg", b"not a sound\n" * 100),
        ("noise.mp3", bytes(range(1, 200)) * 3),
        ("headerless.raw", b"12" * 100),
        ("riff.wav", b"RIFF"),
        ("cut.wav", b"RIFF\0\0\0\0WAVEfmt "),
    ],
)
def test_what_is_no_audio_is_refused(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    refuse(tmp_path / name)


@pytest.mark.parametrize("extension", ["wav", "flac", "ogg", "mp3", "aiff"])
def test_a_header_without_samples_is_refused(write, extension):
    refuse(write(f"none.{extension}", np.zeros(0, np.float32)))


@pytest.mark.parametrize("extension", ["wav", "flac", "mp3", "aiff", "ogg"])
@pytest.mark.parametrize("share", [0.95, 0.5, 0.05])
def test_a_truncated_file_is_refused(write, extension, share):
    path = write(f"cut.{extension}", tiny.tone(3, 22050))
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    refuse(path)


@pytest.mark.parametrize(("extension", "how"), [("ogg", {}), ("ogg", {"subtype": "OPUS"}), ("w64", {}), ("rf64", {}), ("au", {})])
def test_a_file_that_lost_its_end_is_refused(write, extension, how):
    """Cut at the end of an Ogg page too, where what is left looks whole."""
    path = write(f"cut.{extension}", np.random.default_rng(0).uniform(-0.3, 0.3, 144_000), 48000, **how)
    content = path.read_bytes()
    audio.probe(path)
    starts = [page.start() for page in re.finditer(rb"OggS\0", content)]
    for length in [len(content) - 1, len(content) // 2, *starts[3:]]:
        path.write_bytes(content[:length])
        assert "truncated" in refuse(path)


@pytest.mark.parametrize("how", [{}, {"subtype": "OPUS"}])
def test_recordings_joined_in_one_ogg_file_are_refused(write, how):
    """As web radio is saved, a link a title: libsndfile would read the first alone."""
    first, second = (write(f"{seconds}.ogg", tiny.tone(seconds, 48000), 48000, **how).read_bytes() for seconds in (1, 2))
    path = write("joined.ogg", tiny.tone(1, 48000), 48000, **how)
    path.write_bytes(first + second)
    assert "several recordings one after the other" in refuse(path)


@pytest.mark.parametrize(("extension", "place", "layout"), [("au", 8, ">I"), ("w64", 16, "<Q"), ("wav", 40, "<I")])
def test_a_stream_of_any_format_may_not_know_its_length(write, extension, place, layout):
    path = write(f"stream.{extension}", tiny.tone(0.5, 8000), 8000)
    assert audio.probe(patched(path, place, layout, (1 << 8 * struct.calcsize(layout)) - 1)).n_samples == 4000


def test_an_mp3_without_a_length_is_audio(write):
    path = write("untagged.mp3", np.random.default_rng(0).uniform(-0.9, 0.9, (44100, 2)), compression_level=0)
    assert path.read_bytes().count(b"Xing") == 1
    path.write_bytes(path.read_bytes().replace(b"Xing", b"\0\0\0\0"))
    assert audio.claimed_seconds(path) > 3 and audio.probe(path).seconds == pytest.approx(2, abs=0.15)


@pytest.fixture
def mp3(write):
    """Noise, which takes large frames, and then a tone, which takes small ones, at a rate that varies."""
    sound = np.concatenate([np.random.default_rng(0).uniform(-0.5, 0.5, 44100), tiny.tone(5, 22050)])
    return write("song.mp3", sound, bitrate_mode="VARIABLE")


def test_mp3_files_joined_in_one_are_refused(mp3):
    """With tags between them or without: libsndfile reads the first alone."""
    whole = mp3.read_bytes()
    for between in (b"", b"TAG" + bytes(125), bytes(1000), b"ID3\4\0\0\0\0\1\0" + bytes(128)):
        mp3.write_bytes(whole + between + whole)
        assert "goes on after the 7.0 s" in refuse(mp3)


def test_an_mp3_of_which_libsndfile_reads_a_part_is_refused(mp3):
    whole = mp3.read_bytes()
    second = whole.index(whole[:2], 4)  # the first frame holds Xing's header, with the number of frames
    mp3.write_bytes(whole[second:])
    assert audio.claimed_seconds(mp3) < 5 and "goes on after" in refuse(mp3)


@pytest.mark.parametrize("before", [1, 1000, 5000])
def test_an_mp3_may_begin_with_zeros(mp3, before):
    mp3.write_bytes(bytes(before) + mp3.read_bytes())
    assert audio.probe(mp3).seconds == pytest.approx(7, abs=0.1)


def test_an_mp3_without_a_header_may_begin_with_any_of_its_frames(write):
    """Padded frames, a byte longer, make libsndfile expect fewer."""
    path = write("radio.mp3", np.random.default_rng(0).uniform(-0.1, 0.1, 44100 * 4), 44100, bitrate_mode="CONSTANT", compression_level=0.5)
    whole = path.read_bytes()
    frames = [frame.start() for frame in re.finditer(re.escape(whole[:2]) + rb"[\x90-\x9f]", whole)]
    for start in frames[1:20]:
        path.write_bytes(whole[start:])
        assert audio.probe(path).seconds > 3


@pytest.mark.parametrize("tag", [b"TAG" + bytes(range(125)), b"APETAGEX" + b"\xff\xd8\xff\xe0" * 1000, bytes(5000), bytes(range(256)) * 20])
def test_what_is_no_sound_may_follow_an_mp3(mp3, tag):
    mp3.write_bytes(mp3.read_bytes() + tag)
    assert audio.probe(mp3).seconds == pytest.approx(7, abs=0.1)


def test_an_mp3_whose_length_is_misjudged_is_audio():
    path = Path(__file__).parents[2] / "shared/data/jkupdd/wtc2f20-poly.mp3"
    if not path.exists():
        pytest.skip("the recording is not here")
    assert audio.probe(path).seconds == pytest.approx(82.3, abs=0.1) and audio.claimed_seconds(path) > 82.6


def test_a_damaged_flac_is_refused(write):
    path = write("damaged.flac", np.random.default_rng(0).uniform(-0.5, 0.5, 300_000))
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 20_000] = bytes(20_000)
    path.write_bytes(content)
    refuse(path)


def test_what_is_no_file_is_refused(tmp_path, monkeypatch):
    assert "check the path" in refuse(tmp_path / "missing.wav")
    refuse(tmp_path)
    refuse(tmp_path / "a\0b.wav")
    monkeypatch.chdir(tmp_path)
    assert "check the path" in refuse("-")  # to libsndfile standard input
    os.mkfifo(tmp_path / "pipe.wav")
    assert "a pipe or a device" in refuse(tmp_path / "pipe.wav")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_refused(write):
    path = write("mine.wav", tiny.tone(0.1, 22050))
    path.chmod(0)
    assert "permissions" in refuse(path)


def patched(path, offset, layout, value):
    content = bytearray(path.read_bytes())
    struct.pack_into(layout, content, offset, value)
    path.write_bytes(content)
    return path


@pytest.fixture
def little(write):
    path = write("little.wav", np.zeros(478), 44100, subtype="PCM_16")
    assert path.read_bytes()[36:40] == b"data" and path.stat().st_size == 1000
    return path


@pytest.mark.parametrize("claim", [44100 * 2 * 36_000, 8000 * 2 * 36_000, 10_000])
def test_a_header_that_claims_too_much_is_refused_in_little_memory(little, claim):
    patched(little, 40, "<I", claim)
    tracemalloc.start()
    try:
        assert f"956 of {claim} bytes" in refuse(little)
        assert tracemalloc.get_traced_memory()[1] < 20e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("claim", [0xFFFFFFFF, 0xFFFFFFFF - 36, 0x7FFFFFFF, 0x7FFFFFFF - 36, 0x80000000, 0x7FFFF000])
def test_a_stream_saved_with_unknown_length_is_audio(little, claim):
    assert audio.probe(patched(little, 40, "<I", claim)).n_samples == 478


@pytest.mark.parametrize("channels", [0, 65, 1000, 65535])
def test_absurd_channels_are_refused(little, channels):
    refuse(patched(little, 22, "<H", channels))


@pytest.mark.parametrize("rate", [0, 1, 999, 768_001, 0xFFFFFFFF])
def test_absurd_rates_are_refused(little, rate):
    refuse(patched(little, 24, "<I", rate))


def test_a_flac_that_claims_ten_hours_is_refused_in_little_memory(write):
    path = write("claim.flac", tiny.tone(1, 22050))
    content = bytearray(path.read_bytes())
    assert content[:4] == b"fLaC" and content[4] & 127 == 0
    content[22:26] = struct.pack(">I", 22050 * 36_000)  # samples in the stream, the lower 32 of 36 bits
    path.write_bytes(content)
    tracemalloc.start()
    try:
        refuse(path)
        assert tracemalloc.get_traced_memory()[1] < 50e6
    finally:
        tracemalloc.stop()


def test_any_damage_is_audio_or_one_line(write):
    """Bytes changed anywhere in the header: never another exception, never more samples than bytes."""
    originals = {
        extension: write(f"tone.{extension}", tiny.tone(0.2, 8000), 8000).read_bytes() for extension in ("wav", "flac", "aiff", "ogg")
    }
    for extension, original in originals.items():
        rng = np.random.default_rng(zlib.crc32(extension.encode()))
        for trial in range(60):
            content = bytearray(original)
            for _ in range(rng.integers(1, 4)):
                content[rng.integers(min(len(content), 120))] = rng.integers(256)
            path = write("damaged.wav", np.zeros(1)).with_name(f"damaged-{trial}.{extension}")
            path.write_bytes(content)
            try:
                assert len(audio.load(path, 8000)) < 200 * len(content)
            except AudioError as error:
                assert len(str(error).splitlines()) == 1


@pytest.mark.parametrize(("missing", "fails"), [(104, False), (5806, False), (30000, True)])
def test_a_few_samples_less_than_claimed_are_no_truncation(tmp_path, monkeypatch, missing, fails):
    path = tmp_path / "song.ogg"
    soundfile.write(path, np.zeros(44100, np.float32) + 0.1, 44100)
    monkeypatch.setattr(audio, "_promised", lambda file: 44100 + missing)
    if fails:
        with pytest.raises(AudioError, match="truncated"):
            audio.probe(path)
    else:
        assert audio.probe(path).n_samples == 44100


@pytest.mark.parametrize("tail", [b"\n", bytes(300), b"TAG" + bytes(125)], ids=["line feed", "zeros", "ID3v1"])
def test_what_stands_behind_an_ogg_file_does_not_matter(write, tail):
    path = write("tagged.ogg", tiny.tone(1, 48000), 48000)
    whole = audio.load(path, 48000)
    path.write_bytes(path.read_bytes() + tail)
    assert np.array_equal(audio.load(path, 48000), whole)


def test_flac_without_a_length_is_read_to_its_end(write):
    """As encoders write it that can't go back to the header: into a pipe."""
    samples = np.random.default_rng(0).uniform(-0.5, 0.5, 700_000).astype(np.float32)
    path = write("piped.flac", samples, 44100)
    whole, content = audio.load(path, 44100), bytearray(path.read_bytes())
    content[21] &= 0xF0
    content[22:26] = bytes(4)  # the number of samples, in STREAMINFO
    path.write_bytes(content)
    assert np.array_equal(audio.load(path, 44100), whole) and audio.claimed_seconds(path) == 0
    path.write_bytes(content[: len(content) // 2])
    assert "damaged" in refuse(path)


@pytest.mark.parametrize("after", [0, 3])
def test_a_disk_that_fails_is_not_called_damaged_audio(write, monkeypatch, after):
    path, read, count = write("sound.wav", tiny.tone(1, 22050)), soundfile.SoundFile.read, 0

    def fail(file, *arguments, **more):
        nonlocal count
        count += 1
        if count > after:
            raise soundfile.LibsndfileError(2)
        return read(file, 1000, **more)

    monkeypatch.setattr(soundfile.SoundFile, "read", fail)
    with pytest.raises(OSError, match="Input/output error") as failing:
        audio.probe(path)
    assert failing.value.filename == str(path)
