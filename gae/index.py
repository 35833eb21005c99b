"""What the listed files are: path, bytes, content hash, duration, and which can't be used and why.

Runs at every `dvc repro`, so it is cheap: a file whose size and modification time are as before is not opened again.
What it writes depends on the lists and on the files' content, so DVC goes on only where something really changed.
"""

import os
import re
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from gae import audio, storage
from gae.compute import by_place, map_tracks, runs_here
from gae.errors import FORBIDDEN, FULL, PASSING, AudioError, FormatError, GaeError, ListError, warn
from gae.filelists import read_list
from gae.files import code_digest, content_hash, read_json, write_json

_VERSION = 1
_WRITTEN_EVERY = 30  # s
_VIEWS_DIFFER = 0.5  # s by which views of one performance may differ in length


def index(params, out, remembered):
    """Look at every listed file and write the index.

    Parameters
    ----------
    params : gae.params.Params
        Reads data, cqt.sample_rate, cqt.hop_length and compute.
    out : Path
        JSON: {"schema", "train": [[file, ...views], ...], "convert": [[file], ...], "skipped": [{path, list, line, reason}]}
        where a file is {path, key, sha256, bytes, seconds, sample_rate, channels}.
    remembered : Path
        What was found at earlier runs, by path, size and time. May be missing or stale; a run that is stopped leaves there what it found.

    Raises
    ------
    ListError
        If a list names a file that does not exist, or nothing usable.
    AudioError
        If a file is unusable and data.on_error is "stop".
    StorageError
        If a URL can't be reached.
    GaeError
        If a worker of a cluster can't read a file that can be read here.
    """
    lists = {"train": read_list(params.data.train_list), "convert": read_list(params.data.convert_list)}
    paths = sorted({path for lines in lists.values() for line in lines for path in line.paths})
    findings = _look(paths, Path(remembered), params.compute)
    problems = {path: problem for path in paths if (problem := _problem(path, findings[path], params.cqt))}
    if problems and params.data.on_error == "stop":
        raise AudioError(next(iter(problems.values())) + " (data.on_error is stop)")
    for path, problem in problems.items():
        warn(f"skipped {problem}" if problem.startswith(path) else f"skipped {path}: {problem}")

    names = {"train": params.data.train_list, "convert": params.data.convert_list}
    result, skipped = {"schema": _VERSION}, []
    for role, lines in lists.items():
        usable = []
        for line in lines:
            good = [path for path in line.paths if path not in problems]
            skipped += [(path, names[role], line.number) for path in line.paths if path in problems]
            if good:
                usable.append([_entry(path, findings[path]) for path in good])
                if role == "train":
                    usable[-1] = _distinct(usable[-1], f"{names[role]}, line {line.number}")
                    _compare(usable[-1], f"{names[role]}, line {line.number}")
        if not usable:
            raise ListError(f"{names[role]}: lists nothing usable; add at least one audio file, one path a line")
        result[role] = usable
    # a file to convert stands on its own, whatever line it was on
    result["convert"] = [[file] for line in result["convert"] for file in line]
    # one list may have both roles
    result["skipped"] = [{"path": path, "list": name, "line": n, "reason": problems[path]} for path, name, n in dict.fromkeys(skipped)]
    write_json(out, result)


class _Part(BaseModel):
    """A part of an index that is read back: what the next stages use of it."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class _File(_Part):
    path: str = Field(pattern=r"^[^\x00]+$")
    key: str = Field(pattern="^[0-9a-f]{32}$")  # becomes the name of a file
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    seconds: float


_Line = Annotated[list[_File], Field(min_length=1)]


class _Skipped(_Part):
    path: str
    list: str
    line: int | None
    reason: str


class _Index(_Part):
    train: list[_Line]
    convert: list[_Line]
    skipped: list[_Skipped]


def read_index(file):
    """Read what `index` wrote.

    Raises
    ------
    FormatError
        If it is missing or damaged.
    """
    try:
        return _Index.model_validate(read_json(file)).model_dump()
    except (OSError, ValueError):
        raise FormatError(f"{file}: missing or damaged; run `dvc repro index`") from None


def _look(paths, remembered, compute):
    """What each file holds, opening only those that changed: {path: {stamp, sha256, samples, ... or error}}."""
    known = _recall(remembered)
    stamps = storage.each(storage.stamp, paths)
    fresh = [path for path in paths if not stamps[path] or known.get(path, {}).get("stamp") != stamps[path]]
    with _remembering({path: known[path] for path in set(paths).difference(fresh)}, remembered) as (found, note):
        for where, some in by_place(fresh, compute):
            map_tracks(examine, some, where, "index", told=lambda path, finding: note(path, {**finding, "stamp": stamps[path]}))
            if not runs_here(where):
                _refuse_blindness(some, found)
    return found


@contextmanager
def _remembering(found, file):
    """Yield findings and the function that adds one; they are written now and then, and at the end, whatever ends it."""
    written = time.monotonic()

    def write():
        opened = {path: found[path] for path in sorted(found) if found[path].get("sha256")}  # neither size nor time tell of permissions
        write_json(file, {"version": _version(), "files": opened})

    def note(path, finding):
        nonlocal written
        found[path] = finding
        if time.monotonic() - written > _WRITTEN_EVERY:
            write()
            written = time.monotonic()

    try:
        yield found, note
    finally:
        write()


def _refuse_blindness(paths, found):
    """A file of this machine that can be read here, and not by a worker elsewhere, is not to be left out for it."""
    for path in paths:
        unread = "error" in found[path] and not found[path]["sha256"]
        if unread and not storage.is_url(path) and os.path.isfile(path) and os.access(path, os.R_OK):
            said = found[path]["error"]
            raise GaeError(f"a worker says {said}: it is readable here; let all workers see the same files (docs/scale.md)")


def examine(path):
    """Hash a file and decode it once to its end.

    Parameters
    ----------
    path : str
        Or a URL.

    Returns
    -------
    dict
        sha256, bytes, and either samples, sample_rate and channels, or error: one line why it can't be used.

    Raises
    ------
    OSError
        If what keeps it from being read may pass: to leave it out would train another model, and once more when it is back.
    """
    finding = {"sha256": "", "bytes": 0}
    try:
        with storage.fetched(path) as file:
            finding = {"sha256": content_hash(file), "bytes": os.path.getsize(file)}
            info = audio.probe(file)
    except AudioError as error:
        return {**finding, "error": str(error)}
    except OSError as error:
        if error.errno in {*PASSING, *FULL}.difference(FORBIDDEN):
            raise OSError(error.errno, error.strerror, error.filename or path) from None
        return {"sha256": "", "bytes": 0, "error": f"{path}: {error.strerror}; check the path and its permissions"}
    return {**finding, "samples": info.n_samples, "sample_rate": info.sample_rate, "channels": info.channels}


def _distinct(views, where):
    """The views of a line without those whose content an earlier one has: they are no other sound."""
    first = {}
    for view in views:
        if (same := first.setdefault(view["key"], view)) is not view:
            warn(f"{where}: {view['path']} has the content of {same['path']} and is no view of its own; left out")
    return list(first.values())


def _version():
    """What decides what is found in a file."""
    return [_VERSION, code_digest(["audio"], ["soundfile"])]


def _recall(remembered):
    """What was found at earlier runs, as far as it can be read."""
    try:
        before = read_json(remembered)
        files = before["files"].items() if before["version"] == _version() else ()
        return {path: found for path, found in files if _plausible(found)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _plausible(found):
    """Whether `examine` could have found that."""
    if "error" in found:
        return isinstance(found["error"], str)
    counts = [found.get(name) for name in ("bytes", "samples", "sample_rate", "channels")]
    return all(isinstance(count, int) and count > 0 for count in counts) and re.fullmatch("[0-9a-f]{64}", found.get("sha256", ""))


def _problem(path, finding, cqt):
    """Why a file can't be used, in one line, or None."""
    if "error" in finding:
        return finding["error"]
    seconds = finding["samples"] / finding["sample_rate"]
    if seconds < cqt.frame_seconds:
        return f"{path}: {1000 * seconds:.2f} ms long, shorter than a frame ({1000 * cqt.frame_seconds:.2f} ms)"
    return None


def _compare(views, where):
    """Warn of views whose lengths tell that they are not one performance."""
    shortest, longest = (extreme(views, key=lambda view: view["seconds"]) for extreme in (min, max))
    if longest["seconds"] - shortest["seconds"] > _VIEWS_DIFFER:
        lengths = " and ".join(f"{view['path']} ({view['seconds']:.1f} s)" for view in (shortest, longest))
        warn(f"{where}: {lengths} are views of one performance, equal in timing? What they have in common is trained on")


def _entry(path, finding):
    return {
        "path": path,
        "key": finding["sha256"][:32],
        "sha256": finding["sha256"],
        "bytes": finding["bytes"],
        "seconds": round(finding["samples"] / finding["sample_rate"], 3),
        "sample_rate": finding["sample_rate"],
        "channels": finding["channels"],
    }
