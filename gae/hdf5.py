"""What the HDF5 library does not check before it reads a file."""

import os
import re

_HEAD = 1 << 20  # bytes looked at: there our files have their attributes


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


def _number(data, start, size):
    return int.from_bytes(data[start : start + size], "little")
