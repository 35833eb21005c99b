"""Text files that list audio: one performance a line, comments, globs, and views separated by tabs."""

import fnmatch
import glob
import os
import re
from dataclasses import dataclass
from pathlib import Path

from gae.errors import ListError, warn
from gae.storage import absolute, each, is_url, kind, matching

_LONGEST = 4096  # characters of a path that may exist


@dataclass(frozen=True)
class Line:
    """One performance of a list: its views' paths, and the line that names them (counted from 1)."""

    paths: tuple
    number: int


def read_list(file):
    """Read a file list.

    A line names an audio file, absolute, relative to the working folder or by URL, or several separated by tabs: views,
    the same performance in other sounds, equal in timing. ``#`` starts a comment at the beginning of a line or after white
    space. ``*``, ``?``, ``[...]`` and ``**`` expand, but in the names of folders that exist; in a line of several views each column
    expands on its own, in sorted order, and files are paired for which the wildcards stand for the same, or else in that order.

    Parameters
    ----------
    file : str or Path

    Returns
    -------
    list of Line
        In order, each set of paths once.

    Raises
    ------
    ListError
        If the list is missing, not text, or a line names a file that does not exist.
    StorageError
        If a URL can't be looked at.
    """
    seen, lines = set(), []
    rows, kinds = _rows(file)
    for number, columns in enumerate(rows, start=1):
        for paths in _expand(columns, f"{file}, line {number}", kinds):
            if (spelt := tuple(map(absolute, paths))) in seen:
                warn(f"{file}, line {number}: {paths[0]} is listed before; used once")
                continue
            seen.add(spelt)
            lines.append(Line(paths, number))
    return lines


def check_list(file, coming):
    """Raise what `read_list` would raise, but for what is to come into the folder `coming`."""
    coming = Path(os.path.abspath(coming))
    rows, kinds = _rows(file)
    for number, columns in enumerate(rows, start=1):
        where = f"{file}, line {number}"
        there = [column for column in columns if not _to_come(column, coming)]
        if there == columns:
            _expand(columns, where, kinds)
            continue
        for column in there:
            _files(column, where, kinds)


def _to_come(column, coming):
    """Whether files that a column names are to come into a folder: named in it, or by a wildcard that stands for it or a folder above."""
    path = os.path.expanduser(column)
    if coming in Path(os.path.abspath(path)).parents:
        return True
    start = _folder(path)
    above = Path(os.path.abspath(start)) in coming.parents and not is_url(path)
    return above and not coming.exists() and glob.has_magic(path) and "/" in path[len(start) :]


def _rows(file):
    """The columns of each line, and of each URL among them what is there: {url: kind}."""
    rows = [_columns(text_line) for text_line in _text_lines(file)]
    return rows, each(kind, dict.fromkeys(column for columns in rows for column in columns if is_url(column)))


def _text_lines(file):
    try:
        lines = Path(file).read_text(encoding="utf-8-sig").splitlines()
    except (FileNotFoundError, IsADirectoryError):
        raise ListError(f"{file}: no such list; write one audio path a line, or name another in params.yaml") from None
    except UnicodeDecodeError:
        raise ListError(f"{file}: not UTF-8 text; a list holds one audio path a line") from None
    except ValueError:  # of its name
        raise ListError(f"{file}: no file can be called so; name another list in params.yaml") from None
    for number, line in enumerate(lines, start=1):
        if "\0" in line:
            raise ListError(f"{file}, line {number}: holds a zero byte; a list holds one audio path a line")
    return lines


def _expand(patterns, where, kinds):
    """The tuples of paths that one line stands for."""
    columns = [_files(pattern, where, kinds) for pattern in patterns]
    if len({len(column) for column in columns}) > 1:
        raise ListError(f"{where}: its views expand to {[len(column) for column in columns]} files; each column must give as many")
    pairs = list(zip(*columns, strict=True))
    if len(columns) < 2 or len(pairs) < 2:
        return pairs
    stands = [_stands(pattern, column) for pattern, column in zip(patterns, columns, strict=True)]
    shared = set.intersection(*map(set, stands))
    if not shared:  # as where a wildcard stands for the sound too
        return pairs
    for files in stands:
        if alone := [file for signs, file in files.items() if signs not in shared]:
            raise ListError(f"{where}: {alone[0]} has no partner of its name among the views; rename one, or write each pair as a line")
    return [tuple(files[signs] for files in stands) for signs in stands[0]]


def _stands(pattern, files):
    """For what the wildcards of a pattern stand in the files that it gave: {texts: file}; nothing if that can't be told."""
    folder = _folder(pattern := _single_slashes(os.path.expanduser(pattern)))
    parts = re.split(r"(\*\*/+|\*+|\?|\[!?\]?[^\]]*\])", pattern[len(folder) :])
    whole = re.compile(_grouped(parts[::2], parts[1::2]), re.DOTALL)
    found = [whole.fullmatch(file[len(folder) :]) for file in files]
    told = {match.groups(): file for match, file in zip(found, files, strict=True) if match and match.groups()}
    return told if len(told) == len(files) else {}


def _grouped(texts, wildcards):
    """A regular expression with a group for each wildcard between texts; that of fnmatch keeps nothing of what they stand for.

    As there, a star before another takes the least it can, for good: a few of them could be shared out in millions of ways.
    """
    stars, written, unfinished = [wildcard[0] == "*" for wildcard in wildcards], re.escape(texts[0]), False
    for n, (wildcard, text) in enumerate(zip(wildcards, texts[1:], strict=True)):
        if stars[n]:
            written += ")" * unfinished
            unfinished = not wildcard.startswith("**/") and any(stars[n + 1 :])
        if wildcard.startswith("**/"):
            written += "((?:.*/)?)"
        elif stars[n]:
            written += "(?>([^/]*?)" if unfinished else "([^/]*)"
        else:
            written += "([^/])" if wildcard == "?" else f"({fnmatch.translate(wildcard)[:-2]})"
        written += re.escape(text)
    return written


def _columns(text):
    text = text.strip("\r\n")
    if text.lstrip().startswith("#"):
        return []
    columns = [column.strip() for column in text.split("\t")]
    for n, column in enumerate(columns):
        if (name := _uncommented(column)) != column:
            columns = [*columns[:n], name]
            break
    return [column for column in columns if column]


def _uncommented(column):
    """A column without its comment: "Sonata in C # minor.wav" is a name if such a file exists, and else a name with a comment."""
    cuts = [mark.start() for mark in re.finditer(r"(^|\s)#", column)]
    if cuts:
        start = len(_folder(column))
        cuts = [cut for cut in cuts if cut >= start]
    if not cuts:
        return column
    if column.startswith(("http://", "https://")):  # a space in a URL is %20; and a server may answer 403 to what is not there
        return column[: cuts[0]].rstrip()
    for end in [len(column), *reversed(cuts)]:
        if end <= _LONGEST and kind(os.path.expanduser(name := column[:end].rstrip())):
            return name
    return column[: cuts[0]].rstrip()


def _files(pattern, where, kinds):
    """The files that one column names, sorted; a name that exists is taken literally even if it looks like a glob."""
    pattern = os.path.expanduser(pattern)
    what = kinds[pattern] if pattern in kinds else kind(pattern)
    if what == "file":
        return [pattern]
    if what == "folder":
        raise ListError(f"{where}: {pattern} is a folder; write {os.path.join(pattern, '*')} for the files in it")
    found = _matches(pattern, where) if glob.has_magic(pattern) else []
    if not found:
        complaint = "no file matches" if glob.has_magic(pattern) else "no such file:"
        hint = ", or separate views by a tab" if re.search(r"\s{2,}", pattern) else ""
        raise ListError(f"{where}: {complaint} {pattern}; correct the path{hint} or take the line out")
    for path in found:
        if path.encode(errors="ignore").decode().splitlines() != [path]:
            raise ListError(f"{where}: {path!a} has a name that can't be written as a line of UTF-8 text; rename it")
    return found


def _matches(pattern, where):
    """The files that a glob names, sorted. Some patterns would walk the same folders again and again, for ever."""
    folder = _folder(pattern := _single_slashes(pattern))
    rest = pattern[len(folder) :]
    if re.search(r"[*?[].*/\.\.(/|$)", rest):
        raise ListError(f"{where}: {pattern} goes up (..) after a wildcard; write the path without")
    return matching(glob.escape(folder) + re.sub(r"(\*\*/+)+", "**/", rest))


def _folder(path):
    """The folders at the beginning of a path or a glob that exist, up to a slash: no sign in them is a wildcard or a comment."""
    if is_url(path):
        return ""
    ends = [slash.end() for slash in re.finditer("/", path[:_LONGEST])]
    return next((path[:end] for end in reversed(ends) if kind(os.path.expanduser(path[:end])) == "folder"), "")


def _single_slashes(pattern):
    """A pattern as the paths are spelt that it gives."""
    return pattern if is_url(pattern) else re.sub("/+", "/", pattern)
