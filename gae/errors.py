"""What can go wrong through no fault of the program: one line that names the culprit and the remedy."""


class GaeError(Exception):
    """A mistake that the user can mend. The message is one line: what, where, and what to do."""


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
