import errno
import hashlib
import os
import signal
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gae.files import content_hash, digest, read_json, remove_own, replacing, sweep, write_json


def names(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_a_file_appears_when_it_is_whole(tmp_path):
    path = tmp_path / "new" / "folder" / "file"
    with replacing(path) as partial:
        partial.write_text("first")
        assert not path.exists()
    assert path.read_text() == "first"
    with replacing(path) as partial:
        partial.write_text("second")
        assert path.read_text() == "first"
    assert path.read_text() == "second"
    assert names(tmp_path) == ["new/folder/file"]


def test_a_disk_that_takes_nothing_is_told_of_the_file_that_the_user_knows(tmp_path, monkeypatch):
    def refuse(path, *_, **__):
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr("pathlib.Path.unlink", refuse)
    with pytest.raises(OSError) as full, replacing(tmp_path / "file") as partial:
        refuse(partial)
    assert (full.value.errno, full.value.filename) == (errno.EROFS, str(tmp_path / "file"))


@pytest.mark.parametrize("stop", [ValueError, KeyboardInterrupt])
def test_what_fails_leaves_the_old_file(tmp_path, stop):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(stop), replacing(path) as partial:
        partial.write_text("half")
        raise stop
    assert path.read_text() == "old" and names(tmp_path) == ["file"]


def test_what_writes_nothing_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError), replacing(tmp_path / "file"):
        pass
    assert names(tmp_path) == []


@pytest.mark.parametrize("path", ["", "."])
def test_a_path_without_a_name_is_no_file(path):
    with pytest.raises(IsADirectoryError), replacing(path):
        raise AssertionError("has begun")


def test_a_disk_that_fails_is_told_of_the_file_that_the_user_knows(tmp_path):
    path = tmp_path / "file"
    with pytest.raises(OSError) as full, replacing(path):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert (full.value.errno, full.value.filename) == (errno.ENOSPC, str(path)) and names(tmp_path) == []
    with pytest.raises(FileNotFoundError) as other, replacing(path):
        (tmp_path / "other").read_bytes()
    assert other.value.filename == str(tmp_path / "other")


def test_what_a_killed_process_left_is_swept(tmp_path):
    path = tmp_path / "folder" / "file"
    program = "import os, signal, sys; from gae.files import replacing\nwith replacing(sys.argv[1]) as partial:\n"
    program += " partial.write_text('half'); os.kill(os.getpid(), signal.SIGKILL)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", program, path], env=environment).returncode == -signal.SIGKILL
    (tmp_path / "folder" / ".hidden").write_text("the user's")
    assert not path.exists() and len(names(tmp_path)) == 2
    sweep(tmp_path)
    assert names(tmp_path) == ["folder/.hidden"]
    sweep(tmp_path / "nowhere")


def test_a_link_to_another_disk_stays(tmp_path):
    (tmp_path / "scratch").mkdir()
    (tmp_path / "ours").symlink_to(tmp_path / "scratch")
    (tmp_path / "ours" / "ab").write_text("made by us")
    remove_own(tmp_path / "ours", "ab")
    assert (tmp_path / "ours").is_symlink() and not any((tmp_path / "scratch").iterdir())


json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(json)
def test_json_comes_back(tmp_path_factory, value):
    path = tmp_path_factory.mktemp("json") / "value.json"
    write_json(path, value)
    assert read_json(path) == value


def test_json_keeps_a_name_that_is_no_utf8(tmp_path):
    value = {os.fsdecode(b"latin-\xe4.wav"): ["\ud800", "ä"]}
    write_json(tmp_path / "value.json", value)
    assert read_json(tmp_path / "value.json") == value
    assert "ä" in (tmp_path / "value.json").read_text(encoding="utf-8")


def test_json_nested_too_deeply_is_damage(tmp_path):
    (tmp_path / "value.json").write_text("[" * 100_000 + "]" * 100_000)
    with pytest.raises(ValueError, match="nested too deeply"):
        read_json(tmp_path / "value.json")


def test_json_does_not_depend_on_the_order_of_keys(tmp_path):
    write_json(tmp_path / "a", {"x": 1, "ä": {"p": 1, "q": 2}})
    write_json(tmp_path / "b", {"ä": {"q": 2, "p": 1}, "x": 1})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert "ä" in (tmp_path / "a").read_text(encoding="utf-8")
    assert digest({"x": 1, "y": 2}) == digest({"y": 2, "x": 1}) != digest({"x": 2, "y": 1})


def test_content_hash_is_sha256(tmp_path):
    (tmp_path / "file").write_bytes(b"content" * 100_000)
    assert content_hash(tmp_path / "file") == hashlib.sha256(b"content" * 100_000).hexdigest()
