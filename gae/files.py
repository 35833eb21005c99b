"""Files that appear whole or not at all, and the hash that names their content."""

import errno
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
from contextlib import contextmanager, suppress
from pathlib import Path

PACKAGES = ("librosa", "numpy", "python-stretch", "soundfile", "soxr")  # that decide what becomes of audio
_PARTIAL = ".partial"


@contextmanager
def replacing(path, durable=True):
    """Yield a temporary path beside `path` that takes its place when the block ends well.

    Parameters
    ----------
    path : str or Path
        The file to write. Missing folders are made.
    durable : bool
        Wait until the disk has it, for the sake of power cuts; what is soon copied elsewhere need not.

    Yields
    ------
    Path
        Where to write. On an exception it is removed and `path` stays as it was; an `OSError` then names `path`.
    """
    path = Path(path)
    if not path.name:  # "." or nothing at all
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}{_PARTIAL}")
    try:
        yield partial
        if durable:
            with open(partial, "rb+") as written:
                os.fsync(written.fileno())
        partial.replace(path)
    except OSError as error:
        if error.filename is not None and Path(error.filename) != partial:
            raise
        raise OSError(error.errno, error.strerror or str(error), str(path)) from None  # name what the user knows
    finally:
        with suppress(OSError):  # on a disk that can't be written to there is none
            partial.unlink()


def sweep(folder):
    """Remove what a killed process left half-written by `replacing` anywhere below `folder`."""
    for partial in Path(folder).rglob(f".*{_PARTIAL}"):
        if re.fullmatch(rf"\..+\.\d+{re.escape(_PARTIAL)}", partial.name) and not partial.is_dir():
            partial.unlink(missing_ok=True)


def remove_own(folder, names):
    """Remove what a folder holds under names that only we give, and the folder itself if nothing is left.

    A folder that somebody chose may hold other things of theirs. Subfolders of ours go with all that is in them.

    Parameters
    ----------
    folder : str or Path
        May be missing.
    names : str
        Regular expression for the whole of a name.
    """
    folder = Path(folder)
    for path in folder.glob("*"):
        if re.fullmatch(names, path.name):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
    if not folder.is_symlink():  # somebody's way to another disk
        with suppress(OSError):  # others' files are in it, or a disk is mounted there
            folder.rmdir()


def beside(out):
    """The folder in which what a stage makes is linked until it has ended.

    `dvc exp run` begins by putting back in its outputs what dvc.lock names: what a run had made there that was broken off would be lost.

    Parameters
    ----------
    out : str or Path
        The stage's output, a folder.

    Returns
    -------
    Path
        ``.<out>-made``, beside it; may be missing.
    """
    out = Path(os.path.realpath(out))
    return out.parent / f".{out.name}-made"


def link(path, other):
    """Give a file, or each file of a folder, another name besides; none where the file system knows no links.

    Parameters
    ----------
    path, other : Path
        What there is, and its other name, whose folder is made. What is there goes.
    """
    with suppress(OSError):
        other.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            shutil.rmtree(other, ignore_errors=True)
            shutil.copytree(path, other, copy_function=os.link)
        else:
            other.unlink(missing_ok=True)
            os.link(path, other)


def write_json(path, value, durable=True):
    """Write `value` as indented JSON with sorted keys, whole or not at all; `durable` as for `replacing`."""
    text = json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    with replacing(path, durable) as partial:
        # bytes of a name that are no UTF-8 become escapes that JSON knows
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")


def read_json(path):
    """Read a JSON file written by `write_json`; a damaged one is a ValueError."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError(f"{path}: nested too deeply") from None


def content_hash(path):
    """SHA-256 of a file's bytes, as 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def code_digest(modules, packages):
    """Digest of some of our modules and the versions of some packages: what is kept between runs is kept for what they make.

    Parameters
    ----------
    modules : iterable of str
        Names below `gae`.
    packages : iterable of str
        Names as installed.

    Returns
    -------
    str
        64 hexadecimal digits.
    """
    here = Path(__file__).parent
    versions = {name: importlib.metadata.version(name) for name in packages}
    return digest([versions, {name: content_hash(here / f"{name}.py") for name in modules}])


def digest(value):
    """SHA-256 of a JSON-able value, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
