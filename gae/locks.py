"""One process at a time: a stage whose `dvc repro` was killed lives on, and the next must not write beside it."""

import fcntl
import os
from contextlib import contextmanager
from pathlib import Path

from gae.errors import GaeError


@contextmanager
def alone(folder):
    """Keep a folder to this process until the block, or the process, ends; where the file system knows no locks, only hope.

    Parameters
    ----------
    folder : str or Path
        Made if it is missing.

    Raises
    ------
    GaeError
        If another process has it.
    """
    handle = _locked(folder)
    try:
        yield
    finally:
        os.close(handle)


def _locked(folder):
    """A folder, opened and locked; once more if another process removed it meanwhile, as the last thing it did there."""
    while True:
        Path(folder).mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
        try:
            _lock(handle, folder)
            if os.path.exists(folder) and os.path.samestat(os.fstat(handle), os.stat(folder)):
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def _lock(handle, folder):
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise GaeError(f"{folder}: another run is writing here; let it end or stop it, then run again") from None
    except OSError:
        pass
