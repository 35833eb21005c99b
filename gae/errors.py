"""What can go wrong through no fault of the program, and how it is said: one line that names the culprit and the remedy."""

import errno
import sys
import tempfile

FORBIDDEN = errno.EACCES, errno.EPERM
# what the system says of a file that may be sound: no right to read it, a lock on it, a disk or a server that fails, too many open,
# too little memory
PASSING = (
    *FORBIDDEN, errno.EAGAIN, errno.EBUSY, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOLCK, errno.ENOMEM, errno.ENOTCONN,
    errno.EHOSTDOWN, errno.ESTALE, errno.ETIMEDOUT,
)  # fmt: skip
FULL = errno.ENOSPC, errno.EDQUOT, errno.EFBIG  # what the system says of a disk that takes no more
_LONGEST = 2000  # characters of a message
_REMEDIES = {
    errno.ENOENT: "check the path",
    errno.EISDIR: "name a file",
    errno.ENAMETOOLONG: "shorten it",
    errno.EEXIST: "remove it or name another",
    errno.ENOTDIR: "name a folder",
    errno.EPIPE: "nothing reads what is printed; files are written all the same",
    errno.EAGAIN: "let the program end that has it open, then run this again",
    **dict.fromkeys(
        [errno.EIO, errno.ENOTCONN, errno.EHOSTDOWN, errno.ESTALE, errno.ETIMEDOUT], "check the disk or the server, then run it again"
    ),
}


class GaeError(Exception):
    """A mistake that the user can mend. The message is one line: what, where, and what to do."""

    def __init__(self, message):
        super().__init__(one_line(message))


class ParamsError(GaeError):
    """A value in params.yaml is of the wrong type, out of range, unknown, or impossible with another."""


class ListError(GaeError):
    """A file list is missing or empty, or one of its lines names no file."""


class AudioError(GaeError):
    """An audio file can't be used."""


class StorageError(GaeError):
    """What lies at a URL can't be reached."""


class FormatError(GaeError):
    """A file of ours (shard, model, features) is damaged, foreign or of another version."""


class TrainingError(GaeError):
    """Training can't start, or had to stop."""


def reason(error):
    """What an exception of others says, its lines joined, to be part of a message."""
    return " ".join(str(error).split())


def in_temporary(error):
    """An `OSError` about a temporary file, whose name would say nothing, as one about the folder that can't hold it."""
    return OSError(error.errno, error.strerror, f"{tempfile.gettempdir()} (or another folder, named by TMPDIR)")


def one_line(message):
    """A message as one line of bounded length that any terminal shows: names and damaged files may hold anything."""
    if len(message) > 2 * _LONGEST:  # a stranger's may be of millions
        message = message[:_LONGEST] + message[-_LONGEST:]
    shown = "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in message)
    return shown if len(shown) <= _LONGEST else f"{shown[: _LONGEST // 2]} ... {shown[-_LONGEST // 2 :]}"


def explained(error):
    """What went wrong and what to do about it, in one line."""
    match error:
        case MemoryError():
            said = one_line(reason(error)) or "no more to be had"
            return f"out of memory: {said}; use fewer workers, smaller sizes or shorter recordings"
        case OSError():
            where = f"{error.filename}: " if error.filename else ""
            remedy = _REMEDIES.get(error.errno, "make room or check the permissions, then run it again")
            return f"{one_line(where + reason(error.strerror or error))}; {remedy}"
    return str(error)


def warn(message):
    """Print a warning of one line on standard error."""
    print(f"warning: {one_line(message)}", file=sys.stderr)
