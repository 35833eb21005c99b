import errno
import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import tiny

from gae import index as module
from gae import params
from gae.errors import AudioError, FormatError, GaeError, ListError, in_temporary
from gae.files import read_json, write_json
from gae.index import index

hash_of = module.content_hash
CQT = {"sample_rate": 8000, "hop_length": 256, "fmin": 110.0, "n_bins": 36, "bins_per_octave": 12}


@pytest.fixture
def opened(in_this_process):
    """The files that were opened."""
    return in_this_process["examine"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Four pieces, one of them in two views, on two lists."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "music").mkdir()
    for number, name in enumerate(["a.wav", "b.flac", "c1.ogg", "c2.wav"]):
        soundfile.write(f"music/{name}", tiny.tone(1 + number / 4, 8000, 200.0 + 10 * number), 8000)
    (tmp_path / "train.txt").write_text("# to train on\nmusic/a.wav\nmusic/c1.ogg\tmusic/c2.wav\n")
    (tmp_path / "convert.txt").write_text("music/b.flac\nmusic/a.wav\n")
    return tmp_path


def look(**data):
    data = {"train_list": "train.txt", "convert_list": "convert.txt", **data}
    index(params.validate({"data": data, "cqt": CQT, "compute": {"workers": 1}}), "index.json", "memory.json")
    return read_json("index.json")


def test_a_file_that_a_worker_does_not_see_is_not_left_out_for_it(folder, monkeypatch):
    """As where the worker's host lacks a mount."""
    blind = {"sha256": "", "bytes": 0, "error": "music/a.wav: No such file or directory"}
    examine = module.examine
    found = {path: examine(path) if path != "music/a.wav" else blind for path in (f"music/{file.name}" for file in Path("music").iterdir())}
    monkeypatch.setattr(module, "map_tracks", lambda function, paths, *_, told: [told(path, found[path]) for path in paths])
    assert {skipped["path"] for skipped in look()["skipped"]} == {"music/a.wav"}  # where it is this machine's word, it counts
    monkeypatch.setattr(module, "runs_here", lambda compute: False)
    with pytest.raises(GaeError, match=r"^a worker says music/a\.wav: No such file or directory: it is readable here; let all workers see"):
        look()


def test_the_index_says_what_the_files_are(folder, opened):
    found = look()
    assert set(found) == {"schema", "train", "convert", "skipped"} and found["skipped"] == []
    sha256 = hashlib.sha256((folder / "music/a.wav").read_bytes()).hexdigest()
    a = {
        "path": "music/a.wav",
        "key": sha256[:32],
        "sha256": sha256,
        "bytes": (folder / "music/a.wav").stat().st_size,
        "seconds": 1.0,
        "sample_rate": 8000,
        "channels": 1,
    }
    assert found["train"][0] == [a] and found["convert"][1] == [a]
    assert [[file["path"] for file in line] for line in found["train"]] == [["music/a.wav"], ["music/c1.ogg", "music/c2.wav"]]
    assert [[file["path"] for file in line] for line in found["convert"]] == [["music/b.flac"], ["music/a.wav"]]
    assert found["train"][1][1]["seconds"] == 1.75
    assert sorted(opened) == ["music/a.wav", "music/b.flac", "music/c1.ogg", "music/c2.wav"]


def test_processes_find_the_same(folder, opened, monkeypatch):
    look()
    inline = (folder / "index.json").read_bytes(), (folder / "memory.json").read_bytes()
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    os.unlink("memory.json")
    look()
    assert ((folder / "index.json").read_bytes(), (folder / "memory.json").read_bytes()) == inline


def test_a_view_to_convert_stands_on_its_own(folder, opened):
    (folder / "convert.txt").write_text("music/c1.ogg\tmusic/c2.wav\n")
    assert [[file["path"] for file in line] for line in look()["convert"]] == [["music/c1.ogg"], ["music/c2.wav"]]


def test_nothing_is_opened_again_that_did_not_change(folder, opened):
    look()
    before = (folder / "index.json").read_bytes()
    opened.clear()
    look()
    assert opened == [] and (folder / "index.json").read_bytes() == before


def test_touch_is_looked_at_and_changes_nothing(folder, opened):
    look()
    before = (folder / "index.json").read_bytes()
    opened.clear()
    os.utime("music/a.wav", (1e9, 1e9))
    look()
    assert opened == ["music/a.wav"] and (folder / "index.json").read_bytes() == before


def test_changed_content_is_found(folder, opened):
    before = look()
    opened.clear()
    times = os.stat("music/a.wav").st_atime_ns, os.stat("music/a.wav").st_mtime_ns
    soundfile.write("music/a.wav", tiny.tone(2, 8000), 8000)
    os.utime("music/a.wav", ns=times)  # another size is enough
    after = look()
    assert opened == ["music/a.wav"]
    assert after["train"][0][0]["sha256"] != before["train"][0][0]["sha256"] and after["train"][0][0]["seconds"] == 2
    assert after["train"][1] == before["train"][1]


def test_content_of_the_same_size_is_found_by_its_time(folder, opened):
    before = look()
    opened.clear()
    stamp = os.stat("music/a.wav").st_mtime_ns
    soundfile.write("music/a.wav", tiny.tone(1, 8000, 999.0), 8000)
    os.utime("music/a.wav", ns=(stamp, stamp + 1))
    assert look()["train"][0][0]["key"] != before["train"][0][0]["key"] and opened == ["music/a.wav"]


def test_a_new_file_alone_is_opened(folder, opened):
    look()
    opened.clear()
    shutil.copy("music/a.wav", "music/new.wav")
    (folder / "convert.txt").write_text("music/b.flac\nmusic/new.wav\n")
    found = look()
    assert opened == ["music/new.wav"] and found["convert"][1][0]["key"] == found["train"][0][0]["key"]


@pytest.mark.parametrize(
    "memory",
    [
        None,
        b"",
        b"\xff",
        b"[1]",
        b"3",
        b'{"version": 1}',
        b'{"version": 0, "files": {}}',
        b'{"version": 1, "files": [1]}',
        b'{"version": 1, "files": {"music/a.wav": 3}}',
        b'{"version": 1, "files": {"music/a.wav": {}}}',
        b"[" * 100_000,
    ],
)
def test_a_memory_that_is_lost_or_broken_costs_a_look(folder, opened, memory):
    look()
    before = [(folder / name).read_bytes() for name in ("index.json", "memory.json")]
    opened.clear()
    os.unlink("memory.json")
    if memory is not None:
        version = json.dumps(module._version()).encode()
        (folder / "memory.json").write_bytes(memory.replace(b'"version": 1', b'"version": ' + version))
    look()
    assert len(opened) == 4
    assert [(folder / name).read_bytes() for name in ("index.json", "memory.json")] == before


def test_what_decides_what_is_found_costs_a_look(folder, opened, monkeypatch):
    before = look()
    opened.clear()
    monkeypatch.setattr(module, "code_digest", lambda modules, packages: "other code")
    assert look() == before and len(opened) == 4


def test_views_of_different_lengths_are_told(folder, opened, capsys):
    look()
    assert capsys.readouterr().err == ""
    soundfile.write("music/c2.wav", tiny.tone(3, 8000), 8000)
    look()
    said = capsys.readouterr().err
    assert "warning: train.txt, line 3: music/c1.ogg (1.5 s) and music/c2.wav (3.0 s) are views of one performance" in said
    assert len(said.splitlines()) == 1


def test_half_an_entry_of_the_memory_is_not_believed(folder, opened):
    before = look()
    memory = read_json("memory.json")
    del memory["files"]["music/a.wav"]["samples"]
    write_json("memory.json", memory)
    opened.clear()
    assert look() == before and opened == ["music/a.wav"]


@pytest.mark.parametrize(
    "damage",
    [{"samples": "x"}, {"sample_rate": 0}, {"channels": None}, {"sha256": 3}, {"sha256": "../x"}, {"error": 3}, {"bytes": -1}],
)
def test_an_entry_of_the_memory_that_nobody_found_is_not_believed(folder, opened, damage):
    before = look()
    memory = read_json("memory.json")
    memory["files"]["music/a.wav"].update(damage)
    write_json("memory.json", memory)
    opened.clear()
    assert look() == before and "music/a.wav" in opened


@pytest.fixture
def broken(folder):
    """A text, a file of NaN and one of 10 ms on the lists, among good ones."""
    (folder / "music/text.wav").write_text("a letter")
    soundfile.write("music/nan.wav", np.full(8000, np.nan), 8000, subtype="FLOAT")
    soundfile.write("music/short.wav", tiny.tone(0.01, 8000), 8000)
    soundfile.write("music/silent.wav", np.zeros(8000), 8000)
    (folder / "train.txt").write_text("music/text.wav\nmusic/a.wav\n\nmusic/nan.wav\tmusic/c1.ogg\nmusic/silent.wav\n")
    (folder / "convert.txt").write_text("music/b.flac\nmusic/short.wav\nmusic/text.wav\n")
    return folder


def test_bad_audio_is_skipped_and_told(broken, opened, capsys):
    found = look()
    assert [[file["path"] for file in line] for line in found["train"]] == [["music/a.wav"], ["music/c1.ogg"], ["music/silent.wav"]]
    assert [[file["path"] for file in line] for line in found["convert"]] == [["music/b.flac"]]
    skipped = [(entry["path"], entry["list"], entry["line"]) for entry in found["skipped"]]
    assert skipped == [
        ("music/text.wav", "train.txt", 1),
        ("music/nan.wav", "train.txt", 4),
        ("music/short.wav", "convert.txt", 2),
        ("music/text.wav", "convert.txt", 3),
    ]
    reasons = {entry["path"]: entry["reason"] for entry in found["skipped"]}
    assert "not audio" in reasons["music/text.wav"] and "NaN" in reasons["music/nan.wav"]
    assert "10.00 ms long, shorter than a frame (32.00 ms)" in reasons["music/short.wav"]
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 3 and all(warning.startswith("warning: skipped music/") for warning in warnings)


def test_bad_audio_is_told_again_without_being_opened(broken, opened, capsys):
    first = look()
    opened.clear()
    warnings = capsys.readouterr().err
    assert look() == first and opened == [] and capsys.readouterr().err == warnings


def test_mended_audio_is_taken(broken, opened):
    look()
    soundfile.write("music/text.wav", tiny.tone(1, 8000), 8000)
    found = look()
    assert found["train"][0][0]["path"] == "music/text.wav" and found["convert"][1][0]["path"] == "music/text.wav"


def test_what_a_stopped_run_found_is_not_looked_for_again(folder, opened, monkeypatch):
    map_tracks = module.map_tracks

    def stopped(*arguments, told):
        def until(path, finding):
            told(path, finding)
            raise KeyboardInterrupt

        map_tracks(*arguments, told=until)

    monkeypatch.setattr(module, "map_tracks", stopped)
    with pytest.raises(KeyboardInterrupt):
        look()
    (first,) = opened
    opened.clear()
    monkeypatch.setattr(module, "map_tracks", map_tracks)
    look()
    assert sorted([first, *opened]) == ["music/a.wav", "music/b.flac", "music/c1.ogg", "music/c2.wav"]


def test_what_a_killed_run_found_is_not_looked_for_again(folder, opened, monkeypatch):
    kept = []
    monkeypatch.setattr(module, "_WRITTEN_EVERY", 0)
    monkeypatch.setattr(module, "write_json", lambda file, content: kept.append(len(content.get("files", ()))) or write_json(file, content))
    look()
    assert kept[:4] == [1, 2, 3, 4]


def test_one_list_for_both_tells_of_a_bad_file_once(broken, opened):
    found = look(train_list="convert.txt")
    assert len({tuple(bad.items()) for bad in found["skipped"]}) == len(found["skipped"]) > 0


def test_what_could_not_be_opened_is_tried_again(folder, opened, monkeypatch):
    before = look()
    os.unlink("memory.json")

    def closed(path):
        raise PermissionError(13, "Permission denied", path)

    with monkeypatch.context() as refusing:
        refusing.setattr(module, "content_hash", lambda path: closed(path) if path == "music/a.wav" else hash_of(path))
        assert look()["skipped"][0]["reason"] == "music/a.wav: Permission denied; check the path and its permissions"
    opened.clear()
    assert look() == before and opened == ["music/a.wav"]


def test_bad_audio_stops_the_run_where_asked(broken, opened):
    with pytest.raises(AudioError, match=r"^music/\w+\.wav: .*data\.on_error is stop"):
        look(on_error="stop")
    assert not (broken / "index.json").exists()


@pytest.mark.parametrize("role", ["train", "convert"])
@pytest.mark.parametrize("text", ["", "# nothing\n", "music/text.wav\n"])
def test_a_list_with_nothing_usable_is_an_error(broken, opened, role, text):
    (broken / f"{role}.txt").write_text(text)
    with pytest.raises(ListError, match=rf"^{role}\.txt: lists nothing usable; add"):
        look()
    assert not (broken / "index.json").exists()


def test_a_missing_path_stops_before_any_work(folder, opened):
    (folder / "convert.txt").write_text("music/b.flac\nmusic/missing.wav\n")
    with pytest.raises(ListError, match=r"^convert\.txt, line 2: no such file: music/missing\.wav"):
        look()
    assert opened == [] and not (folder / "index.json").exists()


def test_a_name_outside_ascii_is_kept(folder, opened):
    os.rename("music/a.wav", "music/Für Élise – 音.wav")
    (folder / "train.txt").write_text("music/F*\n", encoding="utf-8")
    (folder / "convert.txt").write_text("music/Für Élise – 音.wav\n", encoding="utf-8")
    found = look()
    assert found["train"][0][0]["path"] == found["convert"][0][0]["path"] == "music/Für Élise – 音.wav"


def test_a_link_to_nothing_that_a_glob_finds_is_told(folder, opened):
    os.symlink("/no/where.wav", "music/a0.wav")
    os.symlink("a1.wav", "music/a1.wav")
    Path("train.txt").write_text("music/a*.wav\n")
    assert [skipped["reason"] for skipped in look()["skipped"]] == [
        "music/a0.wav: No such file or directory; check the path and its permissions",
        "music/a1.wav: Too many levels of symbolic links; check the path and its permissions",
    ]


def test_a_file_on_a_disk_that_fails_ends_the_run_and_is_tried_again(folder, opened, monkeypatch):
    """To leave it out would train another model, and once more when the disk is well."""
    before = look()
    os.unlink("memory.json")
    with monkeypatch.context() as failing:
        failing.setattr(module.audio, "probe", fail_with(OSError(errno.EIO, "Input/output error")))
        with pytest.raises(OSError, match=r"Input/output error: 'music/a\.wav'"):
            look()
    assert read_json("index.json") == before
    opened.clear()
    assert look() == before and len(opened) == 4


def test_a_full_disk_where_a_url_is_copied_to_leaves_no_track_out(folder, opened, monkeypatch):
    monkeypatch.setattr(module.storage, "fetched", fail_with(in_temporary(OSError(errno.ENOSPC, "No space left on device"))))
    with pytest.raises(OSError, match=r"No space left on device: .*named by TMPDIR"):
        module.examine("memory://bucket/a.wav")


def test_a_view_of_the_same_content_is_none(folder, opened, capsys):
    shutil.copy("music/a.wav", "music/copy.wav")
    Path("train.txt").write_text("music/a.wav\tmusic/copy.wav\nmusic/b.flac\tmusic/a.wav\n")
    assert [[file["path"] for file in line] for line in look()["train"]] == [["music/a.wav"], ["music/b.flac", "music/a.wav"]]
    assert "train.txt, line 1: music/copy.wav has the content of music/a.wav and is no view of its own; left out" in capsys.readouterr().err


def fail_with(error):
    def fail(*_):
        raise error

    return fail


@pytest.mark.parametrize("damage", [{"train": [[]]}, {"path": "a\0.wav"}, {"path": ""}])
def test_an_index_that_nobody_wrote_is_refused(folder, opened, damage):
    look()
    found = read_json("index.json")
    if "path" in damage:
        found["train"][0][0]["path"] = damage["path"]
    write_json("index.json", found | {key: value for key, value in damage.items() if key == "train"})
    with pytest.raises(FormatError, match=r"index\.json: missing or damaged; run `dvc repro index`"):
        module.read_index("index.json")
