"""Writing HDF5 where the disk may be full."""

from contextlib import contextmanager
from io import FileIO

import h5py


@contextmanager
def create(path):
    """Yield a new HDF5 file, open for writing.

    Parameters
    ----------
    path : str or Path

    Yields
    ------
    h5py.File

    Raises
    ------
    OSError
        If the disk is full or fails. HDF5 alone would raise whatever it was doing, and complain at length on standard error.
    """
    with _Disk(path, "w+") as disk:
        try:
            with h5py.File(disk, "w", libver=("v110", "v110")) as file:
                yield file
        finally:
            if disk.error is not None:
                raise disk.error


class _Disk(FileIO):
    """A file that keeps its first error to itself: HDF5 can close no file in which it could not write."""

    error = None

    def write(self, data):
        data = memoryview(data)
        try:
            while self.error is None and len(data):
                data = data[super().write(data) :]
        except OSError as error:
            self.error = error

    def truncate(self, size=None):
        try:
            super().truncate(size)
        except OSError as error:
            self.error = self.error or error
