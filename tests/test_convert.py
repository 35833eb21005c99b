import errno
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import tiny
import torch

import gae
from gae import audio, convert, modelfile, shards
from gae.convert import convert_file, convert_list, convert_track, extract, feature_names
from gae.cqt import frames
from gae.errors import AudioError, FormatError, GaeError, ParamsError
from gae.features import read, write
from gae.files import content_hash
from gae.locks import alone
from gae.mapping import extract_frames
from gae.modelfile import SHIPPED, save_model
from gae.params import Params


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny.safetensors"
    save_model(path, tiny.model().network, tiny.CQT, train={"steps": 1})
    return path


class Project:
    """The inputs of a conversion: an index, shards, and how to run it."""

    def __init__(self, folder, weights, contents, cqt=tiny.CQT, dtype="float32", code="c"):
        self.out, self.weights, self.contents = folder / "features", weights, contents
        self.shards, self.index = folder / "shards", folder / "index.json"
        self.params = Params(**{"compute": {"workers": 2}, "data": {"convert_list": "data/convert.txt"}})
        keys = {content: f"{content:032x}" for content in contents.values()}
        folder.joinpath("sources").mkdir()
        sources = {}
        for content, key in keys.items():
            file = folder / "sources" / f"{key}.h5"
            with shards.writing(file, cqt) as shard:
                block = tiny.frames(600 + content, content, cqt.n_bins)
                shards.add_track(shard, key, [block], cqt.n_bins, dtype, path="x", duration=1.0, peak=1.0, code=code)
            sources |= shards.read_shard(file)[1]
        listed = [[(keys[content], path)] for path, content in contents.items()]
        shards.write_folder(self.shards, listed, sources, cqt, 1 << 30)
        entries = [
            [{"path": path, "key": keys[content], "sha256": keys[content] * 2, "seconds": 1.0}] for path, content in contents.items()
        ]
        self.skipped = [
            {"path": "bad.wav", "list": "data/convert.txt", "line": 3, "reason": "bad.wav: truncated"},
            {"path": "other.wav", "list": "data/train.txt", "line": 4, "reason": "other.wav: not audio"},
        ]
        self.write_index(entries)

    def write_index(self, entries):
        self.entries = entries
        self.index.write_text(json.dumps({"schema": 1, "train": [], "convert": entries, "skipped": self.skipped}))

    def run(self):
        convert = self.params.convert.model_copy(update={"weights": str(self.weights)})
        convert_list(self.params.model_copy(update={"convert": convert}), self.shards, self.index, self.out)
        return json.loads((self.out / "index.json").read_text(encoding="utf-8"))

    def files(self):
        return {path.name: path.read_bytes() for path in self.out.iterdir()}


@pytest.fixture
def project(tmp_path, weights):
    return Project(tmp_path, weights, {"a/Song.wav": 1, "b/song.flac": 2, "c/other.mp3": 1})


def test_every_track_gets_its_own_features(project, weights):
    index = project.run()  # in worker processes
    tracks = {track["path"]: track for track in index["tracks"]}
    assert list(tracks) == list(project.contents)
    assert sorted(path.name for path in project.out.iterdir()) == sorted(["index.json", *(track["file"] for track in tracks.values())])
    for path, content in project.contents.items():
        features = read(project.out / tracks[path]["file"])
        assert np.array_equal(features.values, extract_frames(tiny.frames(600 + content, content), tiny.model()))
        assert features.origin.source == path and features.origin.source_sha256 == f"{content:032x}" * 2
        assert features.origin.model_sha256 == content_hash(weights) == index["model_sha256"]
        assert tracks[path]["n_frames"] == 600 + content and tracks[path]["key"] == f"{content:032x}"
    assert tracks["c/other.mp3"]["file"] == "other.h5"
    assert {name[:7].lower() for name in (tracks["a/Song.wav"]["file"], tracks["b/song.flac"]["file"])} == {"a-song-", "b-song-"}
    assert index["skipped"] == project.skipped[:1]


def test_a_second_conversion_beside_the_first_is_refused(project, in_this_process):
    with alone(project.out), pytest.raises(GaeError, match="features: another run is writing here"):
        project.run()
    assert project.files() == {}


def test_what_a_stopped_run_of_another_list_left_goes(project, in_this_process):
    project.run()
    wanted = project.files()
    file = next(path for path in project.out.iterdir() if path.suffix == ".h5")
    (project.out / "of-a-wrong-line.h5").write_bytes(file.read_bytes())
    gae.read_features(file).save(project.out / "mine.h5")
    project.run()
    assert project.files().keys() - {"mine.h5"} == wanted.keys() and (project.out / "mine.h5").exists()


def test_features_that_were_saved_again_are_not_taken_for_those_of_a_run(project, in_this_process):
    project.run()
    before = project.files()
    file = next(path for path in project.out.iterdir() if path.suffix == ".h5")
    features = gae.read_features(file)
    gae.Features(features.values / 2, features.times, features.origin).save(file)
    project.run()
    assert project.files() == before


def test_same_path_is_converted_once(project, in_this_process):
    project.write_index(project.entries + project.entries[:1])
    assert [track["path"] for track in project.run()["tracks"]] == list(project.contents)


def test_rerun_keeps_what_is_done_and_ends_in_the_same_bytes(project, in_this_process):
    project.run()
    before = project.files()
    kept, lost, wrong = sorted(path for path in project.out.iterdir() if path.suffix == ".h5")
    lost.unlink()
    wrong.write_bytes(wrong.read_bytes()[:-10])
    (project.out / f".{kept.name}.123.partial").write_bytes(b"half")
    stamp = kept.stat().st_mtime_ns
    project.run()
    assert project.files() == before and kept.stat().st_mtime_ns == stamp


def test_what_a_run_that_was_broken_off_had_made_outlives_what_dvc_puts_back(project, in_this_process, monkeypatch):
    """`dvc exp run` begins with the features of dvc.lock: here none."""

    def after_one(job, *arguments):
        if list(project.out.glob("*.h5")):
            raise KeyboardInterrupt
        convert_track(job, *arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(convert, "convert_track", after_one)
        project.run()
    (made,) = project.out.glob("*.h5")
    bytes_made, stamp = made.read_bytes(), made.stat().st_mtime_ns
    shutil.rmtree(project.out)
    project.run()
    assert made.read_bytes() == bytes_made and made.stat().st_mtime_ns == stamp and len(list(project.out.glob("*.h5"))) == 3
    assert not (project.out.parent / ".features-made").exists()


def test_what_a_run_had_made_waits_until_its_index_is_written(project, in_this_process, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    (project.out.parent / ".features-made").mkdir()
    (project.out.parent / ".features-made" / "notes.txt").write_text("the user's")
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(convert, "write_json", full)
        project.run()
    stamps = {path.name: path.stat().st_mtime_ns for path in project.out.glob("*.h5")}
    shutil.rmtree(project.out)
    project.run()
    assert {path.name: path.stat().st_mtime_ns for path in project.out.glob("*.h5")} == stamps and len(stamps) == 3
    assert [path.name for path in (project.out.parent / ".features-made").iterdir()] == ["notes.txt"]


def test_a_track_that_another_worker_takes_from_beside_is_there(project, in_this_process, monkeypatch):
    """As where Dask believes a worker dead that lives."""
    project.run()
    beside, (made, *_) = project.out.parent / ".features-made", sorted(project.out.glob("*.h5"))
    beside.mkdir()
    made.rename(beside / made.name)
    holds = convert._holds

    def late(file, *facts):
        held = holds(file, *facts)
        if held and file.parent == beside:
            file.rename(made)
        return held

    monkeypatch.setattr(convert, "_holds", late)
    project.run()
    assert made.exists()


def test_features_that_wait_beside_are_not_taken_for_those_of_other_weights(project, in_this_process, tmp_path):
    project.run()
    wanted = project.files()
    beside = tmp_path / ".features-made"
    beside.mkdir()
    one, two, _ = sorted(project.out.glob("*.h5"))
    one.rename(beside / one.name)
    two.unlink()
    (beside / two.name).write_bytes(b"half")
    other = tmp_path / "other.safetensors"
    save_model(other, tiny.model(seed=1).network, tiny.CQT)
    weights, project.weights = project.weights, other
    project.run()
    assert {read(file).origin.model_sha256 for file in project.out.glob("*.h5")} == {content_hash(other)} and not beside.exists()
    project.weights = weights
    project.run()
    assert project.files() == wanted


def test_what_workers_of_a_killed_run_still_leave_is_swept(project, in_this_process, monkeypatch):
    computed = convert.map_tracks

    def beside_others(*arguments):
        (project.out / ".song.h5.123.partial").write_bytes(b"half")
        return computed(*arguments)

    monkeypatch.setattr(convert, "map_tracks", beside_others)
    project.run()
    assert not list(project.out.glob(".*"))


def test_other_weights_type_or_content_are_converted_again(project, in_this_process, tmp_path):
    project.run()
    other = tmp_path / "other.safetensors"
    save_model(other, tiny.model(seed=1).network, tiny.CQT)
    project.weights = other
    project.run()
    expected = extract_frames(tiny.frames(601, 1), tiny.model(seed=1))
    assert np.array_equal(read(project.out / "other.h5").values, expected)
    project.params = Params(convert={"dtype": "float16"})
    project.run()
    assert np.array_equal(read(project.out / "other.h5").values, expected.astype(np.float16))


@pytest.mark.parametrize("other", [{"dtype": "float16"}, {"code": "d"}])
def test_features_of_other_frames_are_converted_again(tmp_path, weights, in_this_process, other):
    for name in "ab":
        (tmp_path / name).mkdir()
    before, after = Project(tmp_path / "a", weights, {"song.wav": 1}), Project(tmp_path / "b", weights, {"song.wav": 1}, **other)
    before.run()
    afresh = after.run() and after.files()
    after.out = before.out
    after.run()
    assert after.files() == afresh


def test_features_of_other_code_are_converted_again(project, in_this_process, monkeypatch):
    project.run()
    before = project.files()
    monkeypatch.setattr(convert, "code_digest", lambda modules, packages: "0" * 64)
    project.run()
    assert all(project.files()[name] != before[name] for name in before if name.endswith(".h5"))


def test_what_is_no_longer_listed_goes_and_what_is_not_ours_stays(project, in_this_process):
    project.run()
    (project.out / "mine.h5").write_bytes(b"mine")
    project.write_index(project.entries[:1])
    project.run()
    assert sorted(project.files()) == ["Song.h5", "index.json", "mine.h5"]


def test_a_track_of_the_same_name_costs_the_features_of_no_other(tmp_path, weights, in_this_process, monkeypatch):
    project = Project(tmp_path, weights, {"a/01.wav": 1, "b/01.wav": 2, "c/x.wav": 3})
    everything, alone = project.entries, project.entries[::2]
    project.write_index(alone)
    project.run()
    first, written = project.files(), []
    assert sorted(first) == ["01.h5", "index.json", "x.h5"]
    monkeypatch.setattr(convert, "write", lambda out, *rest: written.append(out.name) or write(out, *rest))
    project.write_index(everything)
    project.run()
    assert [name[:5] for name in written] == ["b-01-"] and len(project.files()) == 4
    project.write_index(alone)
    project.run()
    assert len(written) == 1 and project.files() == first


def test_listed_track_without_frames_is_named(project, in_this_process):
    project.write_index([*project.entries, [{"path": "gone.wav", "key": "f" * 32, "sha256": "f" * 64, "seconds": 1.0}]])
    index = project.run()
    assert len(index["tracks"]) == 3
    assert index["skipped"][-1]["path"] == "gone.wav" and "preprocess" in index["skipped"][-1]["reason"]


def test_model_for_other_frames_is_refused(tmp_path, weights):
    other = tiny.CQT.model_copy(update={"hop_length": 128, "compression": "none"})
    project = Project(tmp_path, weights, {"a.wav": 1}, cqt=other)
    with pytest.raises(ParamsError) as caught:
        project.run()
    message = str(caught.value)
    assert "cqt.hop_length is 128, the model's is 256" in message and "cqt.compression is none, the model's is log" in message
    assert str(weights) in message and "train again" in message and "fmin" not in message and "\n" not in message
    assert not project.out.exists()


def test_damaged_inputs_are_named(project, in_this_process):
    project.index.write_text('{"convert": ')
    with pytest.raises(FormatError, match=r"index\.json: missing or damaged"):
        project.run()
    project.write_index(project.entries)
    project.weights.with_name("half.safetensors").write_bytes(project.weights.read_bytes()[:-9])
    project.weights = project.weights.with_name("half.safetensors")
    with pytest.raises(FormatError, match=r"half\.safetensors: not a model file"):
        project.run()


@pytest.mark.parametrize(
    "damage",
    [
        lambda index: index.update(convert=None),
        lambda index: index.update(convert=[3]),
        lambda index: index["convert"][0][0].pop("sha256"),
        lambda index: index["convert"][0][0].update(path=3),
        lambda index: index["convert"][0][0].update(path="\ud800"),
        lambda index: index["convert"][0][0].update(key="../../outside"),
        lambda index: index["convert"][0][0].update(sha256=None),
        lambda index: index.update(skipped=[{"path": "x"}]),
    ],
)
def test_an_index_of_other_form_is_refused(project, in_this_process, damage):
    index = json.loads(project.index.read_text())
    damage(index)
    project.index.write_text(json.dumps(index))
    with pytest.raises(FormatError, match=r"index\.json: missing or damaged; run `dvc repro index`$"):
        project.run()


@pytest.mark.parametrize("name", [3, None, [], "../outside.h5", "a\0.h5", "x" * 300 + ".h5", "\ud800.h5", "..", ""])
def test_what_an_index_of_features_names_outside_stays(project, in_this_process, name):
    project.run()
    (project.out.parent / "outside.h5").touch()
    (project.out / "index.json").write_text(json.dumps({"tracks": [{"file": name}]}))
    project.run()
    assert (project.out.parent / "outside.h5").exists() and len(project.files()) == 4


def test_model_whose_sizes_are_not_its_weights_is_refused(tmp_path):
    network = tiny.model().network
    network.sizes = tiny.SIZES.model_copy(update={"n_maps": 16384})
    save_model(tmp_path / "model.safetensors", network, tiny.CQT)
    with pytest.raises(FormatError, match="weights and sizes don't fit"):
        gae.load_model(tmp_path / "model.safetensors")


def test_model_that_changes_meanwhile_is_refused(project, tmp_path, weights):
    shard = str(next(project.shards.glob("*.h5")))
    job = {"source": "a.wav", "sha256": "0" * 64, "file": "a.h5", "key": f"{1:032x}", "shard": shard, "n_frames": 40}
    with pytest.raises(FormatError, match="changed while it was used"):
        convert_track(job, str(weights), "0" * 64, str(tmp_path), "float32")
    assert not (tmp_path / "a.h5").exists()


def test_names_are_readable_unique_and_safe():
    paths = [
        "a/Für Elise.wav",
        "b/für elise.flac",
        "c/Bolero.wav",
        "../../etc/passwd",
        "..",
        "d/.hidden.wav",
        "d/-rf.wav",
        "e/..\\..\\boot.wav",
        "f/" + "x" * 4000 + ".wav",
        "f/" + "x" * 4001 + ".wav",
        "g/音楽.wav",
        "h/" + "音" * 400 + ".wav",
        "i/a\nb\0c:d*?.wav",
        os.fsdecode(b"j/\xff\xfe.wav"),
        "k/ﬁne.wav",
        "l/fine.wav",
    ]
    names = feature_names(paths)
    assert list(names) == paths
    assert names["c/Bolero.wav"] == "Bolero" and names["g/音楽.wav"] == "音楽" and names["../../etc/passwd"] == "passwd"
    assert names["a/Für Elise.wav"].startswith("a-Für_Elise-") and names["b/für elise.flac"].startswith("b-für_elise-")
    assert names["k/ﬁne.wav"].startswith("k-fine-") and names["l/fine.wav"].startswith("l-fine-")
    assert len({name.casefold() for name in names.values()}) == len(paths)
    for name in names.values():
        assert name and name[0] not in ".-" and Path(name).name == name and len(f".{name}.h5.4194304.partial".encode()) < 255
        assert all(letter.isalnum() or letter in "_.+-" for letter in name)
    assert {path: feature_names(reversed(paths))[path] for path in paths} == names


def test_names_made_to_collide_do_not():
    first, second = "a/song.wav", "b/song.wav"
    names = feature_names([first, second])
    forged = f"c/{names[first]}.wav"
    names = feature_names([first, second, forged])
    assert len(set(names.values())) == 3 and names[first] == Path(forged).stem


def test_many_tracks_of_one_stem_get_longer_hashes(monkeypatch):
    class Sha256:
        def __init__(self, data):
            self.data = data

        def hexdigest(self):
            return "0" * 12 + self.data.hex().rjust(52, "0")[-52:]

    monkeypatch.setattr(convert.hashlib, "sha256", Sha256)
    names = feature_names([f"{n:04d}/audio.wav" for n in range(50)])
    assert len(set(names.values())) == 50 and all(len(name) > len("audio-12345678") for name in names.values())


@pytest.fixture(scope="module")
def song(tmp_path_factory):
    path = tmp_path_factory.mktemp("audio") / "song.wav"
    soundfile.write(path, np.column_stack([tiny.tone(20, 11025), tiny.tone(20, 11025, 660)]), 11025, subtype="FLOAT")
    return path


def expected(song, weights):
    return extract_frames(frames(audio.load(song, tiny.CQT.sample_rate), tiny.CQT), gae.load_model(weights))


def test_file_and_samples_give_the_same_features(song, weights, tmp_path):
    assert convert_file(song, tmp_path / "song.h5", weights) == 626
    features = gae.read_features(tmp_path / "song.h5")
    assert np.array_equal(features.values, expected(song, weights))
    assert features.origin.source == str(song) and features.origin.source_sha256 == content_hash(song)
    samples, rate = soundfile.read(song)
    extracted = gae.extract(samples, rate, gae.load_model(weights))
    assert np.abs(extracted.values - features.values).max() < 1e-4
    assert np.array_equal(extracted.times, features.times) and extracted.origin.model_sha256 == content_hash(weights)


def test_samples_of_any_type_and_scale(song, weights):
    model = gae.load_model(weights)
    samples = tiny.tone(3, 8000)
    values = extract(samples, 8000, model).values
    for other in ((samples * 2**15).astype(np.int16), samples.astype(np.float64), samples[:, None], np.column_stack([samples] * 2)):
        assert np.abs(extract(other, 8000, model).values - values).max() < 0.05
    coarse = np.round(samples * 127)  # 8 bits, as WAV files have them
    assert np.array_equal(extract((coarse + 128).astype(np.uint8), 8000, model).values, extract(coarse, 8000, model).values)
    assert np.array_equal(extract(samples.tolist(), 8000.0, weights).values, values)


@pytest.mark.parametrize(
    ("samples", "rate", "why"),
    [
        ([], 8000, "empty"),
        (np.zeros((0, 2)), 8000, "empty"),
        (np.zeros((2, 2, 2)), 8000, "shape"),
        (3.0, 8000, "shape"),
        (np.zeros((2, 8000)), 8000, "samples.T"),
        ([0.0, np.nan], 8000, "NaN"),
        ([0.0, np.inf], 8000, "infinite"),
        ([0.0, 1e300], 8000, "too large"),
        ([0.0, 1e38], 8000, "too large"),
        (torch.zeros(8000, requires_grad=True), 8000, "give an array of real numbers"),
        (torch.zeros(8000, dtype=torch.bfloat16), 8000, "give an array of real numbers"),
        (["a", "b"], 8000, "real numbers"),
        ("song.flac", "model.safetensors", "'song.flac', the name of a file; gae.convert.convert_file takes files"),
        (Path("song.flac"), 8000, "'song.flac', the name of a file; gae.convert.convert_file takes files"),
        ([None, 1.0], 8000, "real numbers"),
        ([[1.0], [1.0, 2.0]], 8000, "real numbers"),
        ([1j, 2j], 8000, "real numbers"),
        ([True, False], 8000, "real numbers"),
        (np.zeros(8000), 0, "sample_rate"),
        (np.zeros(8000), float("nan"), "sample_rate"),
        (np.zeros(8000), "44100", "sample_rate"),
        (np.zeros(8000), None, "sample_rate"),
    ],
)
def test_samples_that_make_no_sense(samples, rate, why, weights):
    with pytest.raises(AudioError, match=why) as caught:
        extract(samples, rate, weights)
    assert "\n" not in str(caught.value)


def test_silence_and_a_single_sample(weights):
    assert np.isfinite(extract(np.zeros(8000), 8000, weights).values).all()
    assert len(extract([0.5], 8000, weights)) == 1


def test_audio_that_is_none(tmp_path, weights):
    (tmp_path / "text.wav").write_text("la la la")
    for path, why in [(tmp_path / "text.wav", "not audio"), (tmp_path / "none.wav", "cannot be opened")]:
        with pytest.raises(AudioError, match=why):
            convert_file(path, tmp_path / "out.h5", weights)
    with pytest.raises(FormatError, match=r"out\.wav: features are written as"):
        convert_file(tmp_path / "text.wav", tmp_path / "out.wav", weights)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["text.wav"]


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_weights_are_found_by_name(name):
    shipped = Path(gae.__file__).parents[1] / "models" / f"{name}.safetensors"
    assert gae.load_model(name).sha256 == gae.load_model(Path(name)).sha256 == gae.load_model(shipped).sha256 == content_hash(shipped)
    assert shipped.stat().st_size < 2_000_000
    assert (gae.load_model().sha256 == content_hash(shipped)) == (name == "pretrained")
    sizes = gae.load_model(name).sizes
    assert (sizes.transposed, sizes.stretched) == {"pretrained": (10, 0.4), "pretrained-fast": (0, 0)}[name]


def test_shipped_weights_are_missed_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(modelfile, "__file__", str(tmp_path / "gae" / "modelfile.py"))
    with pytest.raises(FormatError, match=r"models/pretrained\.safetensors: not shipped with this copy; name"):
        gae.load_model()


def test_model_says_what_it_needs(weights):
    model = gae.load_model(weights)
    assert (model.cqt, model.sizes, model.facts["train"]) == (tiny.CQT, tiny.SIZES, {"steps": 1})
    for name, array in model.weights.items():
        assert np.array_equal(array, tiny.model().weights[name])


def test_what_lies_behind_a_mask_is_not_taken_for_sound():
    with pytest.raises(AudioError, match=r"fill what is masked first"):
        extract(np.ma.masked_greater(tiny.tone(1, 8000), 0.2), 8000)


def test_what_is_no_model_is_refused_in_one_line():
    with pytest.raises(FormatError, match=r"model: got .*; give a path, pretrained or pretrained-fast") as refused:
        extract(tiny.tone(1, 8000), 8000, tiny.model().network)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 300


def test_features_tell_by_what_code_their_frames_were_made(tmp_path, weights, in_this_process):
    made = set()
    for code in "cd":
        (tmp_path / code).mkdir()
        project = Project(tmp_path / code, weights, {"song.wav": 1}, code=code)
        project.run()
        made.add(read(project.out / "song.h5").origin.made_by)
    assert len(made) == 2


@pytest.mark.parametrize("rate", [44.1, 999, 768_001, 1e9])
def test_a_rate_that_makes_no_sense_is_refused(weights, rate):
    with pytest.raises(AudioError, match="allowed: 1000 to 768000 Hz"):
        extract(tiny.tone(1, 8000), rate, weights)
