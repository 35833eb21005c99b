import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import tiny

from gae import index as indexing
from gae import params
from gae import preprocess as module
from gae.audio import load
from gae.cqt import frames
from gae.errors import AudioError, FormatError, GaeError, ListError
from gae.files import read_json, write_json
from gae.locks import alone
from gae.preprocess import preprocess
from gae.shards import Shards

ROOT = Path(__file__).parents[1]
CQT = {"sample_rate": 8000, "hop_length": 256, "fmin": 110.0, "n_bins": 36, "bins_per_octave": 12}


@pytest.fixture
def computed(in_this_process):
    """The files whose frames were computed."""
    return in_this_process["compute_track"]


@pytest.fixture
def small_shards(monkeypatch):
    """A track or two in each shard."""
    write_folder = module.shards.write_folder
    monkeypatch.setattr(module.shards, "write_folder", lambda *arguments: write_folder(*arguments[:-1], 5000))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Four pieces to train on, one of them in two views, and two to convert, one of which is trained on."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "music").mkdir()
    for number, name in enumerate("abcdef"):
        soundfile.write(f"music/{name}.wav", tiny.tone(1 + number / 4, 8000, 200.0 + 10 * number), 8000)
    lists(["a", "b\tc", "d", "e"], ["f", "a"])
    return tmp_path


def lists(train, convert):
    for role, names in (("train", train), ("convert", convert)):
        lines = ["\t".join(f"music/{name}.wav" for name in line.split("\t")) for line in names]
        Path(f"{role}.txt").write_text("\n".join(lines))


def values(**sections):
    data = {"train_list": "train.txt", "convert_list": "convert.txt", "shifted_views": 0, **sections.pop("data", {})}
    return params.validate(
        {"data": data, "cqt": {**CQT, **sections.pop("cqt", {})}, "compute": {"workers": 1, "staging": "staging"}, **sections}
    )


def run(**sections):
    """Index and preprocess; the tracks of both lists by name of their file."""
    index(**sections)
    preprocess(values(**sections), Path("index.json"), Path("shards"))
    assert not Path("staging").exists()
    return held()


def index(**sections):
    indexing.index(values(**sections), "index.json", "memory.json")


def held():
    found = {}
    for role in ("train", "convert"):
        with Shards(Path("shards") / role) as shards:
            assert set(shards.tracks) == {track.key for line in shards.lines for track in line}
            found[role] = [[(Path(track.path).stem, shards.read(track.key)) for track in line] for line in shards.lines]
    return found


def names(found):
    return {role: [[name for name, _ in line] for line in lines] for role, lines in found.items()}


def content(folder="shards"):
    return tiny.content(folder)


def fresh(**sections):
    """The shards that the present lists give where nothing was before."""
    before = Path("shards")
    before.rename("kept")
    run(**sections)
    after = content()
    shutil.rmtree("shards")
    Path("kept").rename("shards")
    return after


def test_frames_are_those_of_the_listed_files(folder, computed):
    found = run(data={"dtype": "float32"})
    assert names(found) == {"train": [["a"], ["b", "c"], ["d"], ["e"]], "convert": [["f"], ["a"]]}
    for name, made in [track for lines in found.values() for line in lines for track in line]:
        assert np.array_equal(made, frames(load(f"music/{name}.wav", 8000), tiny.CQT))
    assert sorted(computed) == [f"music/{name}.wav" for name in "abcdef"]
    track = Shards("shards/train").lines[1][1]
    assert (track.path, track.duration, track.dtype) == ("music/c.wav", 1.5, "float32") and track.peak > 0


def test_processes_give_the_same_bytes(folder, computed, monkeypatch):
    run()
    inline = content()
    shutil.rmtree("shards")
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    run()
    assert content() == inline


def test_a_second_run_computes_nothing(folder, computed):
    run()
    before = content()
    computed.clear()
    run()
    assert computed == [] and content() == before


@pytest.mark.parametrize(
    ("train", "convert", "new"),
    [
        (["a", "b\tc", "d"], ["f", "a"], ""),  # one less to train on
        (["a", "b\tc", "d", "e"], ["f"], ""),  # one less to convert
        (["e", "d", "b\tc", "a"], ["a", "f"], ""),  # in another order
        (["a", "b", "c\td", "e"], ["f", "a"], ""),  # other views
        (["b\tc", "d", "e", "f"], ["a"], ""),  # the lists swap tracks
        (["f"], ["a", "b", "c", "d", "e"], ""),
        (["a", "b\tc", "d", "e"], ["f", "a", "g"], "g"),  # one more
        (["a", "b\tc", "d", "e", "g"], ["f", "a"], "g"),
        (["a", "b\tc", "d", "e", "g"], ["g"], "g"),  # one more on both
    ],
)
def test_what_changes_on_the_lists_costs_its_own_work(folder, computed, small_shards, train, convert, new):
    soundfile.write("music/g.wav", tiny.tone(1.1, 8000, 123.0), 8000)
    run()
    assert len(list(Path("shards/train").glob("*.h5"))) > 2
    computed.clear()
    lists(train, convert)
    found = run()
    assert computed == [f"music/{name}.wav" for name in new]
    assert names(found) == {"train": [line.split("\t") for line in train], "convert": [[name] for name in convert]}
    assert content() == fresh()


def test_a_moved_file_is_not_computed_again(folder, computed):
    before = run()
    computed.clear()
    os.rename("music/d.wav", "music/moved.wav")
    lists(["a", "b\tc", "moved", "e"], ["f", "a"])
    found = run()
    assert computed == [] and names(found)["train"][2] == ["moved"]
    assert np.array_equal(found["train"][2][0][1], before["train"][2][0][1])
    assert content() == fresh()


def test_one_content_under_two_names_is_computed_once(folder, computed):
    shutil.copy("music/f.wav", "music/copy.wav")
    lists(["a", "f", "copy"], ["copy"])
    found = run()
    assert sorted(computed) in (["music/a.wav", "music/copy.wav"], ["music/a.wav", "music/f.wav"])
    assert len(found["train"]) == 3 and np.array_equal(found["train"][1][0][1], found["train"][2][0][1])
    paths = [[view["path"] for view in line] for line in read_json("shards/train/index.json")["lines"]]
    assert paths == [["music/a.wav"], ["music/f.wav"], ["music/copy.wav"]]


def test_changed_content_is_computed_and_the_old_goes(folder, computed):
    old = Shards("shards/train").lines[0][0].key if run() else None
    computed.clear()
    soundfile.write("music/a.wav", tiny.tone(2, 8000, 300.0), 8000)
    run()
    assert computed == ["music/a.wav"] and old not in Shards("shards/train").tracks
    assert content() == fresh()


def test_a_track_without_views_gets_some_by_a_pitch_shifter(folder):
    alone, others = run(), run(data={"shifted_views": 2})
    assert names(others) == {"train": [["a"] * 3, ["b", "c"], ["d"] * 3, ["e"] * 3], "convert": names(alone)["convert"]}
    shifts = set()
    for (own,), (same, *shifted) in zip(alone["train"][2:], others["train"][2:], strict=True):
        assert np.array_equal(own[1], same[1])
        for _, moved in shifted:
            assert moved.shape == own[1].shape
            shifts.add(int(moved.sum(0).argmax() - own[1].sum(0).argmax()))
    assert len(shifts) > 2 and 0 not in shifts and max(map(abs, shifts)) <= 6
    whole = content()
    assert names(run(data={"shifted_views": 1}))["train"][0] == ["a"] * 2
    run(data={"shifted_views": 2})
    assert content() == whole


@pytest.mark.parametrize(
    "change", [{"data": {"dtype": "float32"}}, {"cqt": {"gain": 100.0}}, {"cqt": {"hop_length": 512}}, {"cqt": {"n_bins": 24}}]
)
def test_other_parameters_compute_all(folder, computed, change):
    run()
    before = content()
    computed.clear()
    run(**change)
    assert len(computed) == 6 and content() == fresh(**change) != before
    run()
    assert content() == before


@pytest.mark.parametrize("damage", [lambda file: file[: len(file) // 2], lambda file: b"", lambda file: b"a letter" * 100])
@pytest.mark.parametrize("role", ["train", "convert"])
def test_a_damaged_shard_is_computed_again(folder, computed, capsys, damage, role):
    run()
    before = content()
    (shard,) = Path("shards", role).glob("*.h5")
    shard.write_bytes(damage(shard.read_bytes()))
    computed.clear()
    run()
    assert content() == before and "computed again" in capsys.readouterr().err
    assert sorted(computed) == {"train": [f"music/{name}.wav" for name in "bcde"], "convert": ["music/f.wav"]}[role]


def test_a_shard_that_can_not_be_opened_stays(folder, computed):
    """As one that another program has open for writing."""
    run()
    before = content()
    (shard,) = Path("shards", "train").glob("*.h5")
    with open(shard, "rb+") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(BlockingIOError) as caught:
            run()
    assert caught.value.filename == str(shard) and content() == before


def test_a_file_that_changes_after_the_index_stops_the_run(folder, computed):
    index()
    soundfile.write("music/d.wav", tiny.tone(2, 8000, 300.0), 8000)
    with pytest.raises(AudioError, match=r"^music/d\.wav: changed while it was read; run again$"):
        preprocess(values(), Path("index.json"), Path("shards"))
    assert not Path("shards/train/index.json").exists()
    computed.clear()
    run()
    assert computed == ["music/d.wav"]  # the others waited


def test_a_file_that_is_gone_after_the_index_stops_the_run(folder, computed):
    """It may be back; left out, it would stay so, as the index would be the same."""
    index()
    os.rename("music/d.wav", "music/away.wav")
    with pytest.raises(AudioError, match=r"^music/d\.wav: changed, or can't be read any more; run again$"):
        preprocess(values(), Path("index.json"), Path("shards"))
    os.rename("music/away.wav", "music/d.wav")
    computed.clear()
    preprocess(values(), Path("index.json"), Path("shards"))
    assert computed == ["music/d.wav"]


@pytest.fixture
def unusable(monkeypatch):
    """Files whose frames can't be computed, though they are what was indexed."""
    names, blocks = set(), module.audio.blocks

    def refusing(path, sample_rate):
        if path in names:
            raise AudioError(f"{path}: damaged")
        return blocks(path, sample_rate)

    monkeypatch.setattr(module.audio, "blocks", refusing)
    return names


def test_a_file_that_gives_no_frames_is_skipped_or_stops_the_run(folder, computed, unusable, capsys):
    index()
    unusable.add("music/d.wav")
    with pytest.raises(AudioError, match=r"^music/d\.wav: "):
        preprocess(values(data={"on_error": "stop"}), Path("index.json"), Path("shards"))
    for count in (0, 2):
        preprocess(values(data={"shifted_views": count}), Path("index.json"), Path("shards"))
        assert names(held())["train"] == [["a"] * (1 + count), ["b", "c"], ["e"] * (1 + count)]
        assert capsys.readouterr().err.count("warning: skipped music/d.wav: ") == 1


def test_nothing_usable_is_an_error(folder, computed, unusable):
    lists(["a"], ["f"])
    index()
    unusable.add("music/f.wav")
    with pytest.raises(ListError, match=r"nothing usable is left of the convert list"):
        preprocess(values(), Path("index.json"), Path("shards"))


@pytest.mark.parametrize("text", [None, "", "{", "[]", '{"train": []}'])
def test_a_broken_index_is_one_line(folder, computed, text):
    if text is not None:
        Path("index.json").write_text(text)
    with pytest.raises(FormatError, match=r"^index\.json: missing or damaged; run `dvc repro index`$"):
        preprocess(values(), Path("index.json"), Path("shards"))


def test_what_other_parameters_left_behind_goes(folder, computed):
    made, key = folder / "staging" / (8 * "01"), 16 * "ab"
    made.mkdir(parents=True)
    (made / f"{key}.h5").write_text("old")
    (made / f".{key}.h5.77.partial").write_text("half")
    run()


@pytest.mark.parametrize("name", ["mine.txt", "thesis/results.h5", "thesis/.song.mp3.partial", "empty/", f"{8 * '01'}/mine.h5"])
def test_what_the_user_put_there_stays(folder, computed, name):
    mine = folder / "staging" / name
    (mine if name.endswith("/") else mine.parent).mkdir(parents=True)
    if not name.endswith("/"):
        mine.write_text("mine")
    index()
    preprocess(values(), Path("index.json"), Path("shards"))
    assert mine.is_dir() if name.endswith("/") else mine.read_text() == "mine"
    assert [path for path in (folder / "staging").rglob("*") if path.is_file()] == ([] if name.endswith("/") else [mine])


def test_other_files_beside_shards_stay(folder, computed):
    (folder / "shards" / "train").mkdir(parents=True)
    (folder / "shards" / "train" / "annotations.h5").write_text("mine")
    lists(["a"], ["b"])
    index()
    preprocess(values(), Path("index.json"), Path("shards"))
    assert (folder / "shards" / "train" / "annotations.h5").read_text() == "mine"


def test_a_killed_run_goes_on_and_gives_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "music").mkdir()
    tracks = [f"t{number}" for number in range(12)]
    for number, name in enumerate(tracks):
        soundfile.write(f"music/{name}.wav", tiny.tone(40, 8000, 200.0 + 10 * number), 8000)
    lists(tracks[:9], tracks[8:])
    index()
    write_json("params.json", values().model_dump())  # JSON is YAML
    command = [sys.executable, ROOT / "stages" / "preprocess.py", "--params", "params.json", "--index", "index.json"]
    command += ["--out", "shards", "-S", "compute.staging=staging"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for least in (2, 6):
        process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE)
        while len(list(Path("staging").glob("*/*.h5"))) < least and process.poll() is None:
            time.sleep(0.005)
        process.kill()
        process.communicate(timeout=120)  # until no worker holds the other end: none outlives its parent
        assert process.returncode == -signal.SIGKILL
        assert not list(Path("shards").glob("*/index.json"))
    waiting = {path: path.stat().st_ino for path in Path("staging").glob("*/*.h5")}
    assert len(waiting) >= 6
    run()
    after = content()
    assert after == fresh()
    assert len(after) == 4


def test_frames_of_other_code_are_computed_again(folder, computed, monkeypatch):
    run()
    before = content()
    computed.clear()
    monkeypatch.setattr(module, "_code", lambda: "0" * 64)
    run()
    assert len(computed) == 6 and content() == fresh() != before


@pytest.mark.parametrize("place", ["shards", "./shards/", "music/../shards/train"])
def test_the_shards_are_no_place_to_wait_for_them(folder, computed, place):
    index()
    settings = params.validate({**values().model_dump(), "compute": {"workers": 1, "staging": place}})
    with pytest.raises(GaeError, match="is for the shards; name a folder of its own"):
        preprocess(settings, Path("index.json"), Path("shards"))
    assert not Path("shards").exists()


def test_a_second_run_beside_the_first_is_refused_wherever_it_writes(folder, computed):
    """It would clear up what waits for the other's shards."""
    with alone("staging"), pytest.raises(GaeError, match="staging: another run is writing here"):
        run()
    run()
