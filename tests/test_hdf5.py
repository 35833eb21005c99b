import errno
from io import FileIO

import h5py
import numpy as np
import pytest

from gae import hdf5


def fill(file):
    frames = file.create_dataset("frames", (0, 100), "float32", maxshape=(None, 100), chunks=(64, 100))
    for row in range(40):
        frames.resize(len(frames) + 50, axis=0)
        frames[-50:] = row
    file.attrs["n"] = len(frames)


def test_what_was_written_is_read_and_equal_files_are_equal_bytes(tmp_path):
    for name in ("a.h5", "b.h5"):
        with hdf5.create(tmp_path / name) as file:
            fill(file)
    with h5py.File(tmp_path / "a.h5") as file:
        assert file.attrs["n"] == 2000 and (file["frames"][::50, 0] == np.arange(40)).all()
    assert (tmp_path / "a.h5").read_bytes() == (tmp_path / "b.h5").read_bytes()


def test_a_full_disk_is_an_error_and_no_chatter(capfd):
    with pytest.raises(OSError) as full, hdf5.create("/dev/full") as file:
        fill(file)
    assert full.value.errno == errno.ENOSPC
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("code", [errno.EACCES, errno.EIO, errno.ENOMEM, errno.ENOTCONN])
def test_what_the_system_refuses_is_not_called_damaged(tmp_path, monkeypatch, code):
    def refuse(path, mode):
        raise OSError(code, "as h5py says it")

    with hdf5.create(tmp_path / "file.h5") as file:
        fill(file)
    monkeypatch.setattr(h5py, "File", refuse)
    with pytest.raises(OSError) as refused, hdf5.opened(tmp_path / "file.h5", "shard", "make it again"):
        pass
    assert (refused.value.errno, refused.value.filename) == (code, str(tmp_path / "file.h5"))


@pytest.mark.parametrize("room", [0, 100, 5_000, 300_000])
def test_a_disk_that_fills_up_is_one_error_and_no_chatter(tmp_path, monkeypatch, capfd, room):
    class Disk(FileIO):
        def write(self, data):
            if self.tell() + len(data) > room:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(data)

    monkeypatch.setattr(hdf5, "_Disk", type("_Disk", (hdf5._Disk, Disk), {}))
    with pytest.raises(OSError, match="No space left"), hdf5.create(tmp_path / "file.h5") as file:
        fill(file)
    assert capfd.readouterr() == ("", "")


def test_memory_that_runs_out_is_not_called_damage(tmp_path):
    with hdf5.create(tmp_path / "file.h5") as file:
        fill(file)
    with pytest.raises(MemoryError), hdf5.opened(tmp_path / "file.h5", "shard", "make it again"):
        raise MemoryError


def test_a_disk_that_fails_once_a_file_is_open_is_not_called_damage(tmp_path):
    """H5py then tells the system's number in the text of a RuntimeError."""
    with hdf5.create(tmp_path / "file.h5") as file:
        fill(file)
    with pytest.raises(OSError) as failed, hdf5.opened(tmp_path / "file.h5", "shard", "make it again"):
        raise RuntimeError("Unable to get group info (file read failed: time = 1, errno = 5, error message = 'Input/output error')")
    assert (failed.value.errno, failed.value.filename) == (errno.EIO, str(tmp_path / "file.h5"))
