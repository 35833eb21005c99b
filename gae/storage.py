"""Files by path or URL: of this machine, in an S3 bucket, on the web, wherever fsspec has a file system for.

Keys, endpoints and the like come from the storage's own configuration, such as AWS_ENDPOINT_URL or ~/.aws. Paths of this
machine never meet fsspec.
"""

import glob
import os
import re
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from urllib.parse import unquote, urlsplit

from gae.errors import FULL, AudioError, FormatError, GaeError, StorageError, in_temporary, reason

_URL = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]+://")
_REQUESTS = 16  # under way at a time
_SILENCE = 60  # s without a byte after which a web server is given up
# what tells two versions of a file apart, the surest first; each storage has its own word
_VERSIONS = ("ETag", "etag", "Last-Modified", "LastModified", "last_modified", "updated", "mtime", "created")


def is_url(path):
    """Whether `path` is a URL and no path of this machine."""
    return _URL.match(str(path)) is not None


def check_place(out):
    """Raise `FormatError` if what is to be written is named by a URL."""
    if is_url(out):
        raise FormatError(f"{out}: written are files of this machine; name a path, and copy it there")


def absolute(path):
    """A path of this machine from its root, without detours, so that two spellings of one file are the same; a URL as it is."""
    return path if is_url(path) else os.path.abspath(path)


def named(path):
    """The path that a URL holds: folders, name and suffix."""
    if str(path).startswith(("http://", "https://")):
        return Path(unquote(urlsplit(path).path))
    return Path(path)


def kind(path):
    """What `path` names: "file", "folder", or None if there is nothing."""
    if not is_url(path):
        return "file" if os.path.isfile(path) else "folder" if os.path.isdir(path) else None
    with _reached(path) as files:
        try:
            return "folder" if files.info(path)["type"] == "directory" else "file"
        except FileNotFoundError as error:
            said = error.__cause__
            if path.startswith(("http://", "https://")) and said and getattr(said, "status", None) not in (404, 410):
                raise said from None  # whatever a server says is "not found" to fsspec, and that it says nothing
            return None


def matching(pattern):
    """The files that a glob matches, sorted."""
    if not is_url(pattern):
        found = _local(pattern)
        return sorted(path for path in found if os.path.isfile(path) or not os.path.exists(path))  # a link to nothing is to be told
    with _reached(pattern) as files:
        found = files.glob(pattern, detail=True)
        # an object whose name ends in a slash stands for a folder
        return sorted(_url(path, files, pattern) for path, about in found.items() if about["type"] == "file" and not path.endswith("/"))


def _local(pattern):
    """What `glob.glob` finds on this machine, but that `**` does not go round in circles where a link leads back up."""
    stars = re.search(r"(^|/)\*\*(/+|$)", pattern)
    if not stars:
        return set(glob.glob(pattern))
    roots = glob.glob(pattern[: stars.end(1)]) if stars.start() else [stars[1]]
    below = pattern[stars.end() :] or "*"
    return {path for root in roots for folder in _folders(root, set()) for path in _local(os.path.join(glob.escape(folder), below))}


def _folders(folder, seen, above=()):
    """A folder, and all below it that are not hidden. Links are followed, but to a folder once, and to none that one is in already."""
    real = os.path.realpath(folder or os.curdir)
    if real in seen or any(os.path.commonpath([real, outer]) == real for outer in above):
        return
    seen.add(real)
    yield folder
    names = []
    with suppress(OSError), os.scandir(folder or os.curdir) as entries:  # one that can't be read is passed over, as by glob
        names = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    for name in names:
        yield from _folders(os.path.join(folder, name), seen, (*above, real))


def stamp(path):
    """What changes when the file does, without opening it: a list of numbers and texts; nothing where only opening it can tell."""
    if not is_url(path):
        with suppress(OSError):  # whoever opens it tells
            status = os.stat(path)
            return [status.st_size, status.st_mtime_ns]
        return []
    with _reached(path) as files:
        try:
            about = files.info(path)
        except FileNotFoundError:  # as above
            return []
    versions = [str(about[name]) for name in _VERSIONS if about.get(name)]
    return [about["size"], versions[0]] if versions else []


def each(function, paths):
    """``{path: function(path)}``, of URLs many at a time: an answer takes milliseconds, and a list may need thousands."""
    first, *later = [path for path in paths if is_url(path)] or [None]
    answers = {path: function(path) for path in paths if not is_url(path) or path == first}  # the first connects
    with ThreadPoolExecutor(_REQUESTS) as pool:
        return answers | dict(zip(later, pool.map(function, later), strict=True))


@contextmanager
def fetched(path):
    """Yield a path of this machine that holds the file: the path itself, or a copy that is gone afterwards.

    Errors about the copy name the URL.

    Parameters
    ----------
    path : str or Path

    Yields
    ------
    str or Path

    Raises
    ------
    AudioError
        If there is nothing at the URL.
    StorageError
        If the storage does not answer, or not to us.
    """
    with all_fetched([path]) as (file,):
        yield file


@contextmanager
def all_fetched(paths):
    """Yield the paths of this machine that hold some files, in their order: as `fetched`, many at a time."""
    urls = [path for path in paths if is_url(path)]
    if not urls:
        yield paths
        return
    with tempfile.TemporaryDirectory(prefix="gae-") as folder:
        copies = {url: os.path.join(folder, f"{n}{named(url).suffix}") for n, url in enumerate(urls)}
        with _reached(urls[0] if len(copies) == 1 else os.path.dirname(urls[0]), missing=AudioError) as files:
            files.get([files._strip_protocol(url) for url in copies], list(copies.values()))  # which not all do themselves
        try:
            yield [copies.get(path, path) for path in paths]
        except GaeError as error:
            message = str(error)
            for url, copy in copies.items():
                message = message.replace(copy, url)
            raise type(error)(message) from None


@contextmanager
def storing(url):
    """Yield a temporary path of this machine whose file is at `url` once the block ends well.

    Object stores put a file whole or not at all; what else fsspec reaches may keep half of one if this process is killed.
    """
    with tempfile.TemporaryDirectory(prefix="gae-") as folder:
        file = Path(folder) / named(url).name
        yield file
        with _reached(url, missing=StorageError) as files:
            path = files._strip_protocol(url)
            try:
                files.put_file(str(file), path)
            except FileNotFoundError:  # some storages have folders
                with suppress(FileExistsError):
                    files.mkdir(os.path.dirname(path), create_parents=False)  # with parents S3 would make a bucket
                files.put_file(str(file), path)


def below(url):
    """The URLs of all files below a folder."""
    with _reached(url, missing=StorageError) as files:
        return sorted(_url(path, files, url) for path in files.find(url))


def spelt(url):
    """A URL as `below` spells it: a storage may leave out the account, or write a path in full."""
    with _reached(url) as files:
        return _url(files._strip_protocol(url), files, url)


def remove(urls):
    """Remove files."""
    if urls:
        with _reached(urls[0]) as files:
            files.rm([files._strip_protocol(url) for url in urls])


@contextmanager
def _reached(url, missing=None):
    """Yield the file system of a URL; what goes wrong there becomes one line.

    What is not there raises `missing`, or goes on as FileNotFoundError.
    """
    try:
        yield _file_system(_root(url))
    except FileNotFoundError:
        if missing is None:
            raise
        raise missing(f"{url}: there is no such file or bucket; correct the URL") from None
    except ImportError as error:
        package = getattr(error.__cause__, "name", None) or error.name
        raise StorageError(f"{url}: this storage needs another package; pip install {package} here and for the workers") from None
    except Exception as error:  # each storage raises its own
        if isinstance(error, OSError) and error.errno in FULL:  # where a copy goes
            raise in_temporary(error) from None
        what = reason(error) or type(error).__name__
        raise StorageError(f"{url}: {what}; check the URL, and keys and endpoint in the storage's own configuration") from None


def _root(url):
    """A URL up to the path on its host."""
    return re.match(r"[^:]+://[^/]*", url)[0]


def _url(path, files, url):
    """The URL of a path of the file system that `url` is in: the paths of some hold no host."""
    root = _root(url)
    return files.unstrip_protocol(path) if files._strip_protocol(root).strip("/") else f"{root}/{path.lstrip('/')}"


@lru_cache(maxsize=16)
def _file_system(root):
    import fsspec  # takes a while, which paths of this machine need not wait for

    return fsspec.url_to_fs(root, **_options(root.split(":")[0]))[0]


def _options(protocol):
    """How the file system of a protocol is to be opened."""
    if protocol in ("ssh", "sftp"):  # which take each option for one of their connection
        return {}
    others = {"use_listings_cache": False}  # others write what is listed here
    if protocol in ("http", "https"):
        import aiohttp

        # a file may take as long as it takes, as long as something comes; by default it is five minutes in all
        others["client_kwargs"] = {"timeout": aiohttp.ClientTimeout(total=None, sock_connect=_SILENCE, sock_read=_SILENCE)}
    return others
