import fcntl
import json
import os
import tracemalloc
import zipfile
from itertools import pairwise

import h5py
import numpy as np
import pytest
import tiny

from gae.errors import FormatError
from gae.features import Features, Origin, read, validate, write
from gae.mapping import extract_frames

ORIGIN = Origin(tiny.CQT, "music/Für Elise.flac", "b" * 64, "a" * 64)


def stored(path, values, origin=ORIGIN, dtype="float32"):
    write(path, [values[:3], values[3:]], values.shape, origin, dtype)
    return path


@pytest.fixture
def values():
    return extract_frames(tiny.frames(40), tiny.model())


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_file_holds_what_its_contract_says(tmp_path, values, dtype):
    path = stored(tmp_path / "song.h5", values, dtype=dtype)
    with h5py.File(path) as file:
        assert set(file) == {"values", "times"}
        assert file["values"].shape == (40, 7) and file["values"].dtype == dtype
        assert np.allclose(file["times"], np.arange(40) * 256 / 8000)
        assert json.loads(file.attrs["cqt"]) == tiny.CQT.model_dump()
        assert {name: file.attrs[name] for name in ("schema", "source", "source_sha256", "model_sha256")} == {
            "schema": 1,
            "source": "music/Für Elise.flac",
            "source_sha256": "b" * 64,
            "model_sha256": "a" * 64,
        }
    features = read(path)
    assert np.array_equal(features.values, values.astype(dtype)) and features.values.dtype == dtype
    assert features.origin == ORIGIN and len(features) == len(features.times) == 40
    header = validate(path)
    assert (header.n_frames, header.n_maps, header.dtype, header.origin) == (40, 7, dtype, ORIGIN)


def test_part_of_a_file(tmp_path, values):
    part = read(stored(tmp_path / "song.h5", values), 10, 20)
    assert np.array_equal(part.values, values[10:20]) and np.allclose(part.times, np.arange(10, 20) * 0.032)


def test_equal_features_are_equal_files(tmp_path, values):
    for suffix in (".h5", ".npz", ".csv"):
        first, second = stored(tmp_path / f"a{suffix}", values), tmp_path / f"b{suffix}"
        write(second, [row[None] for row in values], values.shape, ORIGIN)
        assert first.read_bytes() == second.read_bytes()
    with zipfile.ZipFile(tmp_path / "a.npz") as file:
        assert {entry.date_time[0] for entry in file.infolist()} == {1980}  # whatever the time of day


def test_npz_holds_the_same_as_arrays(tmp_path, values):
    with np.load(stored(tmp_path / "song.npz", values, dtype="float16"), allow_pickle=False) as file:
        assert np.array_equal(file["values"], values.astype(np.float16)) and file["values"].dtype == np.float16
        assert np.allclose(file["times"], np.arange(40) * 0.032)
        assert str(file["source"]) == ORIGIN.source and str(file["model_sha256"]) == ORIGIN.model_sha256
        assert json.loads(str(file["cqt"])) == tiny.CQT.model_dump()


def test_csv_opens_as_a_layer(tmp_path, values):
    path = stored(tmp_path / "song.csv", values)
    table = np.loadtxt(path, delimiter=",")
    assert np.abs(table - np.column_stack([np.arange(40) * 0.032, values])).max() < 1e-6
    # what Sonic Visualiser looks at in lines that don't begin with #: separator, and which columns are numbers that grow
    lines = [line for line in path.read_text(encoding="utf-8").split("\n") if line and not line.startswith("#")]
    rows = [line.split(",") for line in lines]
    assert len(rows) == 40 and {len(row) for row in rows} == {8} and not any(sign in line for line in lines for sign in "\t|/: ")
    growing = [all(float(a) < float(b) for a, b in pairwise(column)) for column in zip(*rows, strict=True)]
    assert growing == [True] + [False] * 7  # a start time in s, values
    assert all("." in row[0] for row in rows)  # or times would be taken for samples


def test_features_save_themselves(tmp_path, values):
    features = Features(values, np.arange(40) * 0.032, ORIGIN)
    features.save(tmp_path / "song.h5")
    again = read(tmp_path / "song.h5")
    assert np.array_equal(again.values, values) and again.origin == ORIGIN


def test_source_may_be_called_anything(tmp_path, values):
    name = os.fsdecode(b'a\xffb"\n\r#,c')
    for suffix in (".h5", ".npz", ".csv"):
        stored(tmp_path / f"song{suffix}", values, Origin(tiny.CQT, name))
    assert read(tmp_path / "song.h5").origin.source == 'a\\udcffb"\n\r#,c'
    assert np.loadtxt(tmp_path / "song.csv", delimiter=",").shape == (40, 8)


def test_file_appears_whole_or_not_at_all(tmp_path, values):
    def broken():
        yield values[:10]
        raise RuntimeError("pulled the plug")

    for suffix in (".h5", ".npz", ".csv"):
        path = stored(tmp_path / f"song{suffix}", values)
        before = path.read_bytes()
        with pytest.raises(RuntimeError, match="plug"):
            write(path, broken(), values.shape, ORIGIN)
        with pytest.raises(ValueError, match="announced"):
            write(path, [values[:10]], values.shape, ORIGIN)
        with pytest.raises(FormatError, match="NaN"):
            write(path, [values * np.nan], values.shape, ORIGIN)
        assert path.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["song.csv", "song.h5", "song.npz"]


def test_unknown_suffix(tmp_path, values):
    with pytest.raises(FormatError, match=r"song\.mat: features are written as \.h5, \.npz, \.csv"):
        stored(tmp_path / "song.mat", values)


def refused(path):
    tracemalloc.start()
    try:
        with pytest.raises(FormatError) as caught:
            read(path)
        assert tracemalloc.get_traced_memory()[1] < 10e6
    finally:
        tracemalloc.stop()
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_no_feature_file_is_refused(tmp_path, values):
    assert "no such file" in refused(tmp_path / "none.h5")
    (tmp_path / "text.h5").write_text("values")
    assert "not a readable" in refused(tmp_path / "text.h5")
    (tmp_path / "folder.h5").mkdir()
    refused(tmp_path / "folder.h5")
    assert "numpy.load" in refused(stored(tmp_path / "song.npz", values))
    with h5py.File(tmp_path / "foreign.h5", "w") as file:
        file["values"] = values
    assert "schema None" in refused(tmp_path / "foreign.h5")


def test_a_sound_file_that_can_not_be_read_is_not_called_damaged(tmp_path, values):
    path = stored(tmp_path / "song.h5", values)
    with pytest.raises(TypeError, match="integer"):
        read(path, 0, 10.5)
    with open(path, "rb+") as held:
        fcntl.flock(held, fcntl.LOCK_EX)  # as a program does that has it open for writing
        with pytest.raises(BlockingIOError) as caught:
            read(path)
    assert caught.value.filename == str(path)
    assert len(read(path, np.int64(2), 5)) == 3


def test_truncated_file_is_refused(tmp_path, values):
    data = stored(tmp_path / "song.h5", values).read_bytes()
    for length in [0, 7, 100, len(data) // 2, len(data) - 1]:
        (tmp_path / "short.h5").write_bytes(data[:length])
        refused(tmp_path / "short.h5")


def damage(file, name, **arguments):
    del file[name]
    file.create_dataset(name, **arguments)


def claim(file, **storage):
    damage(file, "values", shape=(20_000_000, 64), dtype="f4", **storage)
    damage(file, "times", shape=(20_000_000,), dtype="f8", **storage)


def link(file, to):
    del file["values"]
    file["values"] = to


@pytest.mark.parametrize(
    "harm",
    [
        lambda file: file.attrs.__setitem__("schema", 2),
        lambda file: file.attrs.__delitem__("cqt"),
        lambda file: file.attrs.__setitem__("cqt", "{"),
        lambda file: file.attrs.__setitem__("cqt", json.dumps({"hop": 1})),
        lambda file: file.attrs.__setitem__("source", 3),
        lambda file: file.attrs.__setitem__("source", b"latin-\xe4.wav"),
        lambda file: file.attrs.__setitem__("model_sha256", b"\xff" * 64),
        lambda file: file.attrs.__setitem__("schema", np.ones(4)),
        lambda file: file.__delitem__("times"),
        lambda file: damage(file, "times", data=np.arange(39.0)),
        lambda file: damage(file, "times", data=np.arange(40, dtype=np.float32)),
        lambda file: damage(file, "times", data=np.zeros(40)),
        lambda file: damage(file, "values", data=np.full((40, 7), np.nan, np.float32)),
        lambda file: damage(file, "values", data=np.zeros((40, 7), np.int32)),
        lambda file: damage(file, "values", data=np.zeros(40, np.float32)),
        # a few bytes that claim 5 GB, in three ways
        lambda file: claim(file),
        lambda file: claim(file, chunks=True),
        lambda file: claim(file, chunks=True, compression="gzip"),
        lambda file: damage(file, "values", shape=(40, 7), dtype="f4", external=[("/etc/passwd", 0, h5py.h5f.UNLIMITED)]),
        lambda file: (file.__setitem__("pad", np.zeros(9999)), link(file, h5py.ExternalLink("other.h5", "values"))),
        lambda file: link(file, h5py.SoftLink("/times")),
        lambda file: (file.__delitem__("values"), file.create_group("values")),
    ],
)
def test_damaged_file_is_refused(tmp_path, values, harm):
    stored(tmp_path / "other.h5", values)
    path = stored(tmp_path / "song.h5", values)
    with h5py.File(path, "r+") as file:
        harm(file)
    refused(path)


def test_a_file_that_the_library_would_read_for_ever_is_refused(tmp_path, values):
    path = stored(tmp_path / "song.h5", values)
    content, free = path.read_bytes(), b"\0\0\0\0\0\0\0\0"
    heap = content.index(b"GCOL")
    place = next(n for n in range(heap + 4080, heap, -8) if content[n : n + 8] != free)  # the length of the free space
    path.write_bytes(content[:place] + free + content[place + 8 :])
    assert "a heap of texts is damaged" in refused(path)


def test_flipped_bytes_raise_nothing_else(tmp_path, values):
    data = stored(tmp_path / "song.h5", values).read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(200):
        flipped = bytearray(data)
        flipped[rng.integers(len(data))] ^= 1 << rng.integers(8)
        (tmp_path / "flipped.h5").write_bytes(flipped)
        try:
            assert read(tmp_path / "flipped.h5").values.size <= 2 * len(data)
        except FormatError as error:
            assert "\n" not in str(error)


def test_a_part_keeps_its_times(tmp_path, values):
    part = read(stored(tmp_path / "song.h5", values), 10, 20)
    part.save(tmp_path / "part.h5")
    again = read(tmp_path / "part.h5")
    assert np.array_equal(again.times, part.times) and np.array_equal(again.values, part.values)
    part.save(tmp_path / "part.csv")
    assert np.allclose(np.loadtxt(tmp_path / "part.csv", delimiter=",")[:, 0], part.times)


def test_values_of_other_types_are_saved_as_float32_or_refused(tmp_path, values):
    Features(values.astype(np.float64), np.arange(40) * 0.032, ORIGIN).save(tmp_path / "song.h5")
    assert np.array_equal(read(tmp_path / "song.h5").values, values)
    with pytest.raises(FormatError, match=r"song\.h5: features are stored as float32 or float16, not as float64"):
        write(tmp_path / "song.h5", [values], values.shape, ORIGIN, "float64")
    assert np.array_equal(read(tmp_path / "song.h5").values, values)


def test_values_that_could_not_be_read_again_are_refused(tmp_path, values):
    for wrong in (values.mean(1), values[:, :0], values[None]):
        with pytest.raises(FormatError, match=r"song\.h5: not written, values of shape .*; features are \(n_frames, n_maps\)"):
            Features(wrong, np.arange(len(wrong)) * 0.032, ORIGIN).save(tmp_path / "song.h5")
    for large in (values.astype(np.float64) * 1e39, np.full((40, 3), np.inf)):
        with pytest.raises(FormatError, match="NaN or infinite"):
            Features(large, np.arange(40) * 0.032, ORIGIN).save(tmp_path / "song.h5")
    assert not any(tmp_path.iterdir())


def test_a_shape_may_be_of_numpys_numbers(tmp_path, values):
    write(tmp_path / "song.npz", [values], np.array(values.shape), ORIGIN)
    assert np.array_equal(np.load(tmp_path / "song.npz")["values"], values)


@pytest.mark.parametrize("times", [np.arange(39.0), np.zeros(40), np.full(40, np.nan), np.arange(40.0)[::-1]])
@pytest.mark.parametrize("suffix", [".h5", ".npz", ".csv"])
def test_times_that_are_not_one_a_frame_in_order_are_refused(tmp_path, values, times, suffix):
    with pytest.raises(FormatError, match="give one a frame, in order"):
        Features(values, times, ORIGIN).save(tmp_path / f"song{suffix}")
    assert not any(tmp_path.iterdir())


def test_features_are_shown_in_one_line(values):
    times = np.arange(40) * 0.032
    assert repr(Features(values, times, ORIGIN)) == "<Features of 'music/Für Elise.flac': 40 frames, 7 maps, 0.00 to 1.25 s>"
    assert repr(Features(values[:0], times[:0], Origin(tiny.CQT))) == "<Features: 0 frames, 7 maps>"


def test_no_part_of_a_file_is_none_of_it(tmp_path, values):
    assert len(read(stored(tmp_path / "song.h5", values), 0, 0)) == 0


def test_a_last_time_without_end_is_refused(tmp_path, values):
    path = stored(tmp_path / "song.h5", values)
    with h5py.File(path, "r+") as file:
        file["times"][-1] = np.inf
    assert "make no sense" in refused(path)


def test_more_values_than_announced_are_an_error(tmp_path, values):
    with pytest.raises(ValueError, match="announced"):
        write(tmp_path / "song.npz", [values], (39, 7), ORIGIN)
    assert not any(tmp_path.iterdir())
