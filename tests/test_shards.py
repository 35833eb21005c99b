import fcntl
import hashlib
import json
import os
import shutil
import time

import h5py
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from gae import shards
from gae.errors import FormatError
from gae.files import read_json, write_json
from gae.shards import Shards, read_blocks, write_folder

CQT = tiny.CQT


@pytest.fixture(scope="module")
def tracks(tmp_path_factory):
    """Ten tracks of 20 to 290 frames, each in a shard of its own: {key: Track}."""
    return staged(tmp_path_factory.mktemp("staging"), 10)


def staged(place, n, dtype="float32"):
    tracks = {}
    for number in range(n):
        key = hashlib.sha256(bytes([number])).hexdigest()[:32]
        file = place / f"{key}.h5"
        with shards.writing(file, CQT) as shard:
            facts = {"path": f"{number}.wav", "duration": 1.5 * number, "peak": number / 4, "code": "c" * 64}
            shards.add_track(shard, key, np.split(frames_of(number), [0, 7, 7]), CQT.n_bins, dtype, **facts)
        tracks |= shards.read_shard(file)[1]
    return tracks


def frames_of(number):
    return tiny.frames(20 + 30 * number, number)


def listed(keys):
    return [[(key, f"music/{key[:4]}.wav")] for key in keys]


def rewritten(folder, before):
    """The shards of a folder that are not the files that they were."""
    return {path.name for path in folder.glob("*.h5") if before.get(path.name) != path.stat().st_ino}


def inodes(folder):
    return {path.name: path.stat().st_ino for path in folder.iterdir()}


def test_the_contract(tmp_path, tracks):
    write_folder(tmp_path / "out", listed(tracks), tracks, CQT, 1 << 30)
    assert sorted(tiny.content(tmp_path / "out")) == ["index.json", "shard-all.h5"]
    with h5py.File(tmp_path / "out" / "shard-all.h5") as shard:
        assert dict(shard.attrs) == {"schema": 1, "cqt": json.dumps(CQT.model_dump(), sort_keys=True)}
        assert set(shard) == set(tracks)
        for number, key in enumerate(tracks):
            expected = {
                "path": f"music/{key[:4]}.wav",
                "duration": 1.5 * number,
                "n_frames": 20 + 30 * number,
                "peak": number / 4,
                "code": "c" * 64,
            }
            assert dict(shard[key].attrs) == expected and list(shard[key]) == ["cqt"]
            assert shard[key]["cqt"].chunks == (256, CQT.n_bins) and shard[key]["cqt"].dtype == np.float32
            assert np.array_equal(shard[key]["cqt"], frames_of(number))
    index = read_json(tmp_path / "out" / "index.json")
    assert index["lines"] == [[{"key": k, "path": f"music/{k[:4]}.wav", "n_frames": 20 + 30 * n}] for n, k in enumerate(tracks)]


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_what_was_written_is_read(tmp_path, dtype):
    tracks = staged(tmp_path / "staging", 4, dtype)
    keys = list(tracks)
    lines = [[(keys[1], "b"), (keys[0], "a")], [(keys[3], "d")]]
    write_folder(tmp_path / "out", lines, tracks, CQT, 1)
    with Shards(tmp_path / "out") as read:
        assert read.cqt == CQT and read.cqt.n_bins == 36
        assert [[track.key for track in line] for line in read.lines] == [[keys[1], keys[0]], [keys[3]]]
        assert set(read.tracks) == {keys[0], keys[1], keys[3]}
        track = read.tracks[keys[3]]
        assert (track.path, track.n_frames, track.duration, track.peak, track.dtype) == ("d", 110, 4.5, 0.75, dtype)
        tolerance = 1e-3 if dtype == "float16" else 0
        assert read.read(keys[3]).dtype == np.float32
        assert np.abs(read.read(keys[3]) - frames_of(3)).max() <= tolerance
        assert np.abs(read.read(keys[3], 10, 25) - frames_of(3)[10:25]).max() <= tolerance
        n_frames, blocks = read_blocks(track.file, keys[3], 50)
        blocks = list(blocks)
        assert n_frames == 110 and [len(block) for block in blocks] == [50, 50, 10]
        assert np.array_equal(np.concatenate(blocks), read.read(keys[3]))


def test_more_shards_than_may_be_open_can_be_read(tmp_path, tracks, monkeypatch):
    monkeypatch.setattr(shards, "_FILES", 3)
    write_folder(tmp_path / "out", listed(tracks), tracks, CQT, 1)
    with Shards(tmp_path / "out") as read:
        assert len({track.file for track in read.tracks.values()}) > 6
        for _ in range(2):
            assert all(np.array_equal(read.read(key), frames_of(number)) for number, key in enumerate(tracks))
        assert len(read._opened._files) == 3


def test_of_any_number_of_tracks_some_are_open(tmp_path, tracks, monkeypatch):
    monkeypatch.setattr(shards, "_DATASETS", 3)
    write_folder(tmp_path / "out", listed(tracks), tracks, CQT, 20_000)
    with Shards(tmp_path / "out") as read:
        for _ in range(2):
            for number, key in enumerate(tracks):
                assert np.array_equal(read.read(key), frames_of(number))
                assert sum(len(held) for _, held in read._opened._files.values()) <= 3


def test_bytes_do_not_depend_on_the_clock(tmp_path):
    first = staged(tmp_path / "first", 3)
    time.sleep(1.1)  # the clock of HDF5's time stamps ticks in seconds
    second = staged(tmp_path / "second", 3)
    for folder, tracks in (("a", first), ("b", second)):
        write_folder(tmp_path / folder, listed(tracks), tracks, CQT, 1 << 30)
    assert tiny.content(tmp_path / "a") == tiny.content(tmp_path / "b")


@given(st.lists(st.sets(st.integers(0, 9), min_size=1), min_size=1, max_size=4), st.sampled_from([1, 20_000, 1 << 30]))
@settings(max_examples=15)
def test_the_same_tracks_give_the_same_files_whatever_came_before(tmp_path_factory, tracks, history, shard_bytes):
    tmp_path = tmp_path_factory.mktemp("history")
    names = list(tracks)
    for wanted in history:
        keys = [names[number] for number in sorted(wanted)]
        held = Shards(tmp_path / "grown").tracks if (tmp_path / "grown").exists() else {}
        write_folder(tmp_path / "grown", listed(keys), {**tracks, **held}, CQT, shard_bytes)
    write_folder(tmp_path / "fresh", listed(keys), tracks, CQT, shard_bytes)
    assert tiny.content(tmp_path / "grown") == tiny.content(tmp_path / "fresh")
    with Shards(tmp_path / "grown") as read:
        assert set(read.tracks) == set(keys)
        assert all(np.array_equal(read.read(names[number]), frames_of(number)) for number in history[-1])


def test_the_order_of_the_list_changes_no_shard(tmp_path, tracks):
    write_folder(tmp_path / "a", listed(tracks), tracks, CQT, 20_000)
    write_folder(tmp_path / "b", listed(reversed(tracks)), tracks, CQT, 20_000)
    a, b = tiny.content(tmp_path / "a"), tiny.content(tmp_path / "b")
    assert a.pop("index.json") != b.pop("index.json") and a == b and len(a) > 2


def test_one_more_track_rewrites_one_shard_and_removing_it_restores_all(tmp_path, tracks):
    keys, out = list(tracks), tmp_path / "out"
    assert len(frames_of(0)) < 30  # so small that the number of shards stays
    write_folder(out, listed(keys[1:]), tracks, CQT, 60_000)
    before, files = tiny.content(out), inodes(out)
    assert len(before) > 4
    write_folder(out, listed(keys), tracks, CQT, 60_000)
    assert len(rewritten(out, files)) == 1
    write_folder(out, listed(keys[1:]), tracks, CQT, 60_000)
    assert tiny.content(out) == before


def test_what_is_as_it_should_be_is_not_rewritten(tmp_path, tracks):
    write_folder(tmp_path / "out", listed(tracks), tracks, CQT, 20_000)
    files = inodes(tmp_path / "out")
    write_folder(tmp_path / "out", listed(tracks), tracks, CQT, 20_000)
    assert not rewritten(tmp_path / "out", files)


def test_a_removed_track_leaves_no_frames(tmp_path, tracks):
    write_folder(tmp_path / "out", listed(tracks), tracks, CQT, 1 << 30)
    size = (tmp_path / "out" / "shard-all.h5").stat().st_size
    keys = list(tracks)
    write_folder(tmp_path / "out", listed(keys[:-1]), tracks, CQT, 1 << 30)
    assert frames_of(9).tobytes()[:4000] not in (tmp_path / "out" / "shard-all.h5").read_bytes()
    assert (tmp_path / "out" / "shard-all.h5").stat().st_size < size
    assert keys[-1] not in Shards(tmp_path / "out").tracks


def test_shards_stay_near_their_size(tmp_path):
    tracks = staged(tmp_path / "staging", 30)
    write_folder(tmp_path / "out", listed(tracks), tracks, CQT, 500_000)
    sizes = [file.stat().st_size for file in (tmp_path / "out").glob("*.h5")]
    assert 500_000 / 2 < sum(sizes) / len(sizes) < 500_000 and max(sizes) < 1_000_000


def test_a_moved_track_has_its_new_path(tmp_path, tracks):
    key = next(iter(tracks))
    write_folder(tmp_path / "out", [[(key, "old.wav")]], tracks, CQT, 1)
    write_folder(tmp_path / "out", [[(key, "new.wav")]], tracks, CQT, 1)
    assert Shards(tmp_path / "out").tracks[key].path == "new.wav"


def test_one_content_on_several_lines_is_kept_once(tmp_path, tracks):
    key, other = list(tracks)[:2]
    lines = [[(key, "b.wav")], [(key, "a.wav"), (other, "c.wav")]]
    write_folder(tmp_path / "out", lines, tracks, CQT, 1 << 30)
    write_folder(tmp_path / "back", lines[::-1], tracks, CQT, 1 << 30)
    read = Shards(tmp_path / "out")
    assert [[track.key for track in line] for line in read.lines] == [[key], [key, other]] and len(read.tracks) == 2
    assert tiny.content(tmp_path / "out")["shard-all.h5"] == tiny.content(tmp_path / "back")["shard-all.h5"]


def refuse(read, *names):
    with pytest.raises(FormatError) as caught:
        read()
    message = str(caught.value)
    assert message.splitlines() == [message] and all(name in message for name in names) and "run `dvc repro" in message


def endless(content):
    """An HDF5 file whose first heap of texts has free space of no size."""
    content, part = bytearray(content), content.index(b"GCOL") + 16
    while int.from_bytes(content[part : part + 2], "little"):
        part += 16 + (int.from_bytes(content[part + 8 : part + 16], "little") + 7) // 8 * 8
    content[part + 8 : part + 16] = bytes(8)
    return bytes(content)


@pytest.fixture
def folder(tmp_path, tracks):
    write_folder(tmp_path / "out", listed(tracks), tracks, CQT, 1 << 30)
    return tmp_path / "out"


@pytest.mark.parametrize("share", [0, 0.001, 0.5, 0.99])
def test_a_truncated_shard_is_refused(folder, share):
    whole = (folder / "shard-all.h5").read_bytes()
    (folder / "shard-all.h5").write_bytes(whole[: int(share * len(whole))])
    refuse(lambda: Shards(folder), "shard-all.h5")


def test_a_foreign_file_is_refused(folder):
    (folder / "shard-all.h5").write_bytes(b"a letter\n" * 1000)
    refuse(lambda: Shards(folder), "shard-all.h5")
    with h5py.File(folder / "shard-all.h5", "w") as shard:
        shard["x"] = 3
    refuse(lambda: Shards(folder), "shard-all.h5", "schema None")


@pytest.mark.parametrize(
    "damage",
    [
        lambda shard, group: shard.attrs.update(schema=2),
        lambda shard, group: shard.attrs.update(cqt="{"),
        lambda shard, group: shard.attrs.update(cqt='{"n_bins": 0}'),
        lambda shard, group: shard.attrs.update(cqt=json.dumps({**CQT.model_dump(), "n_bins": 35})),
        lambda shard, group: shard.attrs.pop("cqt"),
        lambda shard, group: group.attrs.update(n_frames=21),
        lambda shard, group: group.attrs.pop("peak"),
        lambda shard, group: group.attrs.update(path=b"latin-\xe4.wav"),
        lambda shard, group: group.pop("cqt"),
        lambda shard, group: shard.create_dataset("f" * 32, data=[1]),
    ],
)
def test_what_breaks_the_contract_is_refused(folder, tracks, damage):
    with h5py.File(folder / "shard-all.h5", "r+") as shard:
        damage(shard, shard[next(iter(tracks))])
    refuse(lambda: Shards(folder), "shard-all.h5")


def claim(shard, key, n_frames=1 << 40, **storage):
    """Replace a track's frames by such as are not there."""
    del shard[key]["cqt"]
    shard[key].create_dataset("cqt", (n_frames, CQT.n_bins), **{"dtype": "float32", "chunks": (256, CQT.n_bins), **storage})
    shard[key].attrs["n_frames"] = n_frames


@pytest.mark.parametrize(
    "damage",
    [
        claim,
        lambda shard, key: claim(shard, key, 1 << 20, chunks=(1 << 20, CQT.n_bins)),
        lambda shard, key: claim(shard, key, 256, compression="gzip", data=np.zeros((256, CQT.n_bins))),
        lambda shard, key: claim(shard, key, 256, dtype="float64", data=np.zeros((256, CQT.n_bins))),
        lambda shard, key: claim(shard, key, 4, chunks=None, data=np.zeros((4, CQT.n_bins))),
        lambda shard, key: shard.__setitem__("f" * 32, h5py.ExternalLink("other.h5", key)),
        lambda shard, key: (shard[key].pop("cqt"), shard[key].__setitem__("cqt", h5py.ExternalLink("other.h5", f"{key}/cqt"))),
    ],
)
def test_frames_that_are_not_stored_in_the_shard_are_refused(folder, tracks, damage):
    """A few kilobytes that claim terabytes, and frames of other files."""
    shutil.copy(folder / "shard-all.h5", folder / "other.h5")
    with h5py.File(folder / "shard-all.h5", "r+") as shard:
        damage(shard, next(iter(tracks)))
    refuse(lambda: Shards(folder), "shard-all.h5", "not stored whole")


def test_a_shard_that_the_library_would_read_for_ever_is_refused(folder):
    (folder / "shard-all.h5").write_bytes(endless((folder / "shard-all.h5").read_bytes()))
    refuse(lambda: Shards(folder), "shard-all.h5", "heap")


def test_shards_of_different_parameters_are_refused(folder, tracks):
    with shards.writing(folder / "shard-0.h5", CQT.model_copy(update={"gain": 3.0})):
        pass
    refuse(lambda: Shards(folder), "shard-all.h5", "other cqt parameters")


@pytest.mark.parametrize(
    "index",
    [
        None,
        "",
        "{",
        "[]",
        '{"lines": 3}',
        '{"lines": [[{}]]}',
        '{"lines": [[{"key": []}]]}',
        '{"lines": [[3]]}',
        '{"lines": null}',
        '{"lines": [[]]}',
    ],
)
def test_a_broken_index_is_refused(folder, index):
    (folder / "index.json").unlink() if index is None else (folder / "index.json").write_text(index)
    refuse(lambda: Shards(folder), "index.json")


def test_a_track_that_no_shard_holds_is_refused(folder):
    write_json(folder / "index.json", {"lines": [[{"key": "0" * 32}]]})
    refuse(lambda: Shards(folder), "0" * 32)


def test_a_shard_that_vanished_is_refused(folder, tracks):
    read = Shards(folder)
    os.unlink(folder / "shard-all.h5")
    refuse(lambda: read.read(next(iter(tracks))), "shard-all.h5")
    refuse(lambda: read_blocks(folder / "shard-all.h5", "0" * 32), "shard-all.h5")


def test_a_shard_that_another_program_holds_is_not_called_damaged(folder, tracks):
    file, key = folder / "shard-all.h5", next(iter(tracks))
    read, (_, blocks) = Shards(folder), read_blocks(file, key)
    with open(file, "rb+") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        for use in (lambda: read.read(key), lambda: read_blocks(file, key), lambda: next(blocks)):
            with pytest.raises(BlockingIOError) as refused:
                use()
            assert refused.value.filename == str(file)


@pytest.mark.parametrize("shard_bytes", [1, 1 << 30])
def test_a_shard_that_can_not_be_copied_from_is_named(folder, tracks, tmp_path, shard_bytes):
    sources = shards.read_shard(folder / "shard-all.h5")[1]
    with open(folder / "shard-all.h5", "rb+") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(BlockingIOError) as refused:
            write_folder(folder, listed(tracks), sources, CQT, shard_bytes)
    assert refused.value.filename == str(folder / "shard-all.h5")


def test_a_shard_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), shards.writing(tmp_path / "a.h5", CQT) as shard:
        shards.add_track(shard, "0" * 32, [tiny.frames(5)], CQT.n_bins, "float16")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize(("path", "gain"), [("new.wav", CQT.gain), ("old.wav", 3.0)])
def test_tracks_that_lie_there_already_say_what_is_true_now(tmp_path, tracks, held, path, gain):
    key, cqt = next(iter(tracks)), CQT.model_copy(update={"gain": gain})
    write_folder(tmp_path, [[(key, "old.wav")]], tracks, CQT, 1)
    write_folder(tmp_path, [[(key, path)]], Shards(tmp_path).tracks if held else tracks, cqt, 1)
    with Shards(tmp_path) as read:
        assert (read.tracks[key].path, read.cqt) == (path, cqt)
