"""Text files that list audio: one performance a line, comments, globs, and views separated by tabs."""

import glob
import os
import re
from dataclasses import dataclass
from pathlib import Path

from gae.commandline import warn
from gae.errors import ListError
from gae.storage import each, is_url, kind, matching

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
    space. ``*``, ``?``, ``[...]`` and ``**`` expand; in a line of several views each column expands on its own, in
    sorted order, and the columns are paired.

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
    rows = [_columns(text_line) for text_line in _text_lines(file)]
    kinds = each(kind, dict.fromkeys(column for columns in rows for column in columns if is_url(column)))
    for number, columns in enumerate(rows, start=1):
        for paths in _expand(columns, f"{file}, line {number}", kinds):
            if paths in seen:
                warn(f"{file}, line {number}: {paths[0]} is listed before; used once")
                continue
            seen.add(paths)
            lines.append(Line(paths, number))
    return lines


def check_list(file, coming):
    """Raise what `read_list` would raise, but for what is to come into the folder `coming`."""
    for number, text_line in enumerate(_text_lines(file), start=1):
        for column in _columns(text_line):
            if Path(coming) not in Path(column).parents:
                _files(column, f"{file}, line {number}")


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


def _expand(columns, where, kinds):
    """The tuples of paths that one line stands for."""
    columns = [_files(column, where, kinds) for column in columns]
    if len({len(column) for column in columns}) > 1:
        raise ListError(f"{where}: its views expand to {[len(column) for column in columns]} files; each column must give as many")
    return list(zip(*columns, strict=True))


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
    if not cuts:
        return column
    for end in [len(column), *reversed(cuts)]:
        if end <= _LONGEST and kind(os.path.expanduser(name := column[:end].rstrip())):
            return name
    return column[: cuts[0]].rstrip()


def _files(pattern, where, kinds=None):
    """The files that one column names, sorted; a name that exists is taken literally even if it looks like a glob."""
    pattern = os.path.expanduser(pattern)
    what = (kinds or {}).get(pattern) or kind(pattern)
    if what == "file":
        return [pattern]
    if what == "folder":
        raise ListError(f"{where}: {pattern} is a folder; write {os.path.join(pattern, '*')} for the files in it")
    found = _matches(pattern, where) if glob.has_magic(pattern) else []
    if not found:
        complaint = "no file matches" if glob.has_magic(pattern) else "no such file:"
        raise ListError(f"{where}: {complaint} {pattern}; correct the path or take the line out")
    for path in found:
        if path.encode(errors="ignore").decode().splitlines() != [path]:
            raise ListError(f"{where}: {path!a} has a name that can't be written as a line of UTF-8 text; rename it")
    return found


def _matches(pattern, where):
    """The files that a glob names, sorted. Some patterns would walk the same folders again and again, for ever."""
    if re.search(r"[*?[].*/\.\.(/|$)", pattern):
        raise ListError(f"{where}: {pattern} goes up (..) after a wildcard; write the path without")
    once = re.sub(r"(\*\*/+)+", "**/", pattern)
    return matching(once)
