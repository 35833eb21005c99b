"""HDF5 where the library alone would not do: on a disk that fills up, and in files whose damage it would read for ever."""

import os
import re
from contextlib import contextmanager
from io import FileIO

import h5py

from gae.errors import PASSING, FormatError, reason

_HEAD = 1 << 20  # bytes looked at: there our files have their attributes


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


@contextmanager
def opened(path, kind, remedy):
    """Yield an HDF5 file open for reading.

    Parameters
    ----------
    path : str or Path
    kind, remedy : str
        What it should be, and what to do if it is not, for the message.

    Yields
    ------
    h5py.File

    Raises
    ------
    FormatError
        If it is damaged; also where that shows later, inside the block.
    OSError
        If the system does not let it be read, which says nothing of what it holds. It names the file.
    """
    with telling(path, kind, remedy):
        check_heaps(path)
        with h5py.File(path, "r") as file:
            yield file


@contextmanager
def telling(path, kind, remedy):
    """Whatever is raised while a file is read becomes what `opened` raises; but memory that runs out says nothing of the file."""
    try:
        yield
    except (FormatError, MemoryError):
        raise
    except Exception as error:  # h5py raises whatever the damage suggests to it
        if (number := _errno(error)) in PASSING:
            raise OSError(number, os.strerror(number), str(path)) from None
        raise FormatError(f"{path}: not a readable {kind} ({reason(error)[:200]}); {remedy}") from None


def check_heaps(path):
    """Raise `OSError` where the library would read for ever: in a heap of texts whose parts don't fill it.

    Attributes that are texts lie in heaps, "GCOL", each a row of parts: index (2 bytes), 6 others, length (8 bytes), and so many
    bytes rounded up to eight. Part 0 is the free space, and its length counts its own head. Heaps have no checksum.
    """
    with open(path, "rb") as file:
        head, size = file.read(_HEAD), os.path.getsize(path)
    for start in (heap.start() for heap in re.finditer(rb"GCOL\x01", head)):
        end = start + _number(head, start + 8, 8)
        if not start + 4096 <= end <= size:  # the library refuses such itself
            continue
        part = start + 16
        while part + 16 <= min(end, len(head)):
            length = _number(head, part + 8, 8)
            part += 16 + (length + 7) // 8 * 8 if _number(head, part, 2) else length or end
        if part > end:
            raise OSError("a heap of texts is damaged")


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


def _errno(error):
    """The system's number of an error, which h5py tells in the text alone once a file is open."""
    told = re.search(r"\berrno = (\d+)", str(error))
    return getattr(error, "errno", None) or (int(told[1]) if told else None)


def _number(data, start, size):
    return int.from_bytes(data[start : start + size], "little")
