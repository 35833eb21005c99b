"""Audio files to mono samples. Every way in which a file can be broken has its error here."""

import errno
import io
import mmap
import os
import re
from dataclasses import dataclass

import numpy as np
import python_stretch
import soundfile
import soxr

from gae.errors import AudioError

_SHIFTED = 30  # s whose pitch is shifted at a time
_CHUNK = 1 << 18  # samples decoded at a time, over all channels
_RATES = (1_000, 768_000)  # sample rates believed of a file, in Hz
_CHANNELS = 64
_SLACK = 0.05  # s that may be missing at the end
_OGG_SLACK = 0.5  # that of Ogg files: those that an editor cut claim some packets more than they decode to
LOUDEST = 1e12  # of samples believed to be sound; full scale is 1
# libsndfile shortens files that are truncated (wav, aiff; w64; rf64; au) without a word, but in its log
_SHORTENED = re.compile(r"^\s*(?:data|SSND|riff|Riff size|Data Size)\s*: (\d+) \(should be (\d+)\)", re.MULTILINE)
_UNKNOWN = 1 << 62  # or more frames: libsndfile for a header that claims no length
_STREAMED = (1 << 31, 1 << 32, 1 << 63, 1 << 64)  # about what programs claim that can't know a length beforehand, in bytes
_MP3_SLACK = 0.5  # that of MP3 files without a length: a two-hundredth at least, as frames may be padded by so much
_OGG_TAIL = 2 * 65307  # bytes at the end of an Ogg file that hold its last page
_MP3_REST = 1 << 24  # bytes after the last that was read of an MP3 file, in which more of it is looked for


@dataclass(frozen=True)
class AudioInfo:
    """What a file holds: samples a channel, rate in Hz, channels."""

    n_samples: int
    sample_rate: int
    channels: int

    @property
    def seconds(self):
        """Duration in s."""
        return self.n_samples / self.sample_rate


def blocks(path, sample_rate):
    """Decode, mix down and resample a file piece by piece, in constant memory.

    Parameters
    ----------
    path : str or Path
        Any format that libsndfile reads: wav, flac, ogg, opus, mp3, aiff, ...
    sample_rate : int
        Rate of the samples that come out, in Hz.

    Yields
    ------
    ndarray of float32, shape (n,)
        Successive samples, the mean over all channels. `n` varies.

    Raises
    ------
    AudioError
        If the file is missing, no audio, truncated, or holds NaN or infinities.
    OSError
        If its disk or server fails: the file may be sound.
    """
    with _open(path) as file:
        rate = file.samplerate
        resampler = None if rate == sample_rate else soxr.ResampleStream(rate, sample_rate, 1, dtype="float32")
        for mono, last in _decoded(file, path):
            yield resampler.resample_chunk(mono, last=last) if resampler else mono


def load(path, sample_rate):
    """Decode a whole file: `blocks` in one array of float32, shape (n_samples,)."""
    return np.concatenate([np.zeros(0, np.float32), *blocks(path, sample_rate)])


def probe(path):
    """Decode a file once to its end, and say what it holds.

    Returns
    -------
    AudioInfo

    Raises
    ------
    AudioError, OSError
        As `blocks`.
    """
    with _open(path) as file:
        n_samples = sum(len(mono) for mono, _ in _decoded(file, path))
        return AudioInfo(n_samples, file.samplerate, file.channels)


def claimed_seconds(path):
    """Duration in s that the header claims, 0 where it claims none, for a progress bar; what is decoded may differ."""
    with _open(path) as file:
        return 0.0 if file.frames >= _UNKNOWN else file.frames / file.samplerate


def mono(samples):
    """Mix down samples of shape (n,) or (n, channels) to float32 of shape (n,)."""
    samples = np.asarray(samples, dtype=np.float32)
    if samples.ndim == 1:
        return samples
    # Channel by channel: NumPy's mean over so short an axis takes far longer, and a matrix product rounds a sample
    # as its place in memory and the number of its neighbours ask, so that two decodings may differ in the last bit.
    first, *others = samples.T
    with np.errstate(over="ignore"):  # what becomes infinite is refused
        return sum(others, start=first) / np.float32(samples.shape[1])


def resample(samples, orig_rate, sample_rate):
    """Resample mono samples (n,) from `orig_rate` to `sample_rate`, both in Hz, as `blocks` does."""
    samples = np.asarray(samples, dtype=np.float32)
    if orig_rate == sample_rate:
        return samples
    return soxr.ResampleStream(orig_rate, sample_rate, 1, dtype="float32").resample_chunk(samples, last=True)


def shift_pitch(sample_blocks, sample_rate, semitones):
    """Transpose a recording that arrives in pieces, at its own tempo, by Signalsmith Stretch.

    In constant memory, 30 s at a time: where two of them meet, the sound is softer and blurred for some 0.3 s.

    Parameters
    ----------
    sample_blocks : iterable of ndarray of float32, shape (n,)
        Successive mono samples.
    sample_rate : int
        In Hz.
    semitones : float

    Yields
    ------
    ndarray of float32, shape (n,)
        As many samples in all.
    """
    shifter = python_stretch.Signalsmith.Stretch(0)  # a seed
    shifter.preset(1, sample_rate)
    shifter.setTransposeSemitones(semitones)
    for piece in _pieces(sample_blocks, _SHIFTED * sample_rate):
        shifter.reset()
        yield shifter.process(piece[None])[0]


def _pieces(sample_blocks, length):
    """Regroup samples in pieces of a length; the last may be shorter."""
    held = np.zeros(0, np.float32)
    for block in sample_blocks:
        held = np.concatenate([held, block])
        while len(held) >= length:
            yield held[:length]
            held = held[length:]
    if len(held):
        yield held


def _open(path):
    if os.path.isdir(path):
        raise AudioError(f"{path}: a folder; check the path, or name the files in it")
    if os.path.exists(path) and not os.path.isfile(path):
        raise AudioError(f"{path}: a pipe or a device, which can be read but once; write it to a file and convert that")
    try:
        file = soundfile.SoundFile(os.fsencode(os.path.join(os.curdir, path)))  # a name need not be UTF-8; "-" alone is standard input
    except (soundfile.LibsndfileError, TypeError, ValueError) as error:
        _raise_failing(error, path)
        if "No such file" in str(error) or "System error" in str(error):
            raise AudioError(f"{path}: cannot be opened; check the path and its permissions") from None
        what = "empty; copy it again" if _is_empty(path) else "not audio that can be read; convert it to wav or flac"
        raise AudioError(f"{path}: {what}") from None
    if problem := _problem(file, path):
        file.close()
        raise AudioError(f"{path}: {problem}")
    if file.frames >= _UNKNOWN:  # soundfile would look for the end after each piece, and FLAC without a length has none
        file.seekable = lambda: False
    return _numbered(file, path) if file.format == "MP3" else file


def _problem(file, path):
    """Why an audio file that libsndfile opens can't be used all the same, if so."""
    if not (_RATES[0] <= file.samplerate <= _RATES[1] and 1 <= file.channels <= _CHANNELS):
        allowed = f"{_RATES[0]} to {_RATES[1]} Hz, up to {_CHANNELS} channels"
        return f"claims {file.samplerate} Hz and {file.channels} channels; allowed: {allowed}"
    for claimed, there in _SHORTENED.findall(file.extra_info):
        if int(there) < int(claimed) and all(abs(int(claimed) - unknown) > 1 << 16 for unknown in _STREAMED):
            return f"truncated, {there} of {claimed} bytes are there; copy it again"
    if file.format == "OGG" and not _has_last_page(path):
        return "truncated, its last page is missing; copy or encode it again"
    if file.format == "OGG" and "Junk after the last page" in file.extra_info and _begins_again(path):  # the first alone would be read
        return "several recordings one after the other, as web radio is saved; split it, or encode it again as one"
    return None


def _numbered(file, path):
    """An MP3 file opened by number, which tells how far it was read; by name still where more than tags stands before its first frame."""
    number = os.open(path, os.O_RDONLY)
    try:
        numbered = soundfile.SoundFile(number, closefd=True)
    except soundfile.LibsndfileError:  # without a suffix to go by; the number is closed
        return file
    file.close()
    return numbered


def _is_empty(path):
    return os.path.isfile(path) and not os.path.getsize(path)


def _has_last_page(path):
    """Whether an Ogg file ends with a page marked as the last: libsndfile takes the pages that are there for the whole."""
    with open(path, "rb") as file:
        file.seek(max(0, os.path.getsize(path) - _OGG_TAIL))
        tail = file.read()
    for page in re.finditer(rb"OggS\0[\x04-\x07].{20}(.)", tail, re.DOTALL):
        sizes = tail[page.end() : page.end() + page[1][0]]
        if page.end() + page[1][0] + sum(sizes) <= len(tail):
            return True
    return False


def _begins_again(path):
    """Whether a page marked as the first comes later in an Ogg file too, and not just tags or zeros behind the last."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return re.compile(rb"OggS\0[\x02\x06]").search(data, 4) is not None


def _raise_failing(error, path):
    """Raise `OSError` if libsndfile met a disk or a server that fails: it says so of files that are missing or not ours to read too."""
    if "System error" in str(error) and _is_readable(path):
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path)) from None


def _is_readable(path):
    try:
        with open(path, "rb"):
            return True
    except (OSError, ValueError):
        return False


def _sounds_on(path, start, seconds):
    """Whether an MP3 file holds more than tags from a byte on, after the `seconds` that were read.

    Libsndfile reads as many frames as the first header promises, or as the size of the first frame suggests, which may be a padded one.
    """
    with open(path, "rb") as file:
        file.seek(start)
        rest = file.read(_MP3_REST).lstrip(b"\0")
    try:
        with soundfile.SoundFile(io.BytesIO(rest[128:] if rest.startswith(b"TAG") else rest)) as more:
            return more.format == "MP3" and more.frames > max(_MP3_SLACK, 0.005 * seconds) * more.samplerate
    except soundfile.LibsndfileError:
        return False


def _decoded(file, path):
    """Yield (mono chunk, is it the last), trusting what is decoded rather than the header."""
    length = max(1, _CHUNK // file.channels)
    total, chunk = 0, None
    while True:
        try:
            read = file.read(length, dtype="float32", always_2d=True)
        except (soundfile.LibsndfileError, RuntimeError) as error:
            _raise_failing(error, path)
            raise AudioError(f"{path}: damaged after {total / file.samplerate:.1f} s; copy or encode it again ({error})") from None
        if chunk is not None:
            yield chunk, len(read) == 0
        if len(read) == 0:
            break
        if not (read.min(initial=0) > -LOUDEST and read.max(initial=0) < LOUDEST):  # NaN compares as false
            raise AudioError(f"{path}: holds NaN, infinite or absurd samples near {total / file.samplerate:.1f} s; export it again")
        chunk = mono(read)
        total += len(read)
    if total == 0:
        raise AudioError(f"{path}: holds no samples; record or export it again")
    slack = _OGG_SLACK if file.format == "OGG" else _SLACK
    if total < (promised := _promised(file)) - slack * file.samplerate:
        raise AudioError(
            f"{path}: truncated, {total / file.samplerate:.1f} s of {promised / file.samplerate:.1f} s are there; copy it again"
        )
    if isinstance(file.name, int) and _sounds_on(path, os.lseek(file.name, 0, os.SEEK_CUR), total / file.samplerate):
        raise AudioError(
            f"{path}: goes on after the {total / file.samplerate:.1f} s that can be read, as MP3 files do that were joined, or whose rate "
            "varies and no header says so; encode it again"
        )


def _promised(file):
    """Samples that the header promises, if it does: for mp3 without a Xing header libsndfile guesses from the first frame."""
    guessed = file.format == "MP3" and not re.search("bitrate mode *: variable", file.extra_info)
    return 0 if guessed or file.frames >= _UNKNOWN else file.frames
