"""Files of somebody else's: all that reads one, valid ones to damage, and ways to damage them.

A target is a function that reads one file in a folder of its own. `outcome` says how that ended: "accepted", "refused" (one
line that names the file), or else what should never happen. `tests/test_fuzz.py` and `benchmarks/fuzz.py` try the same targets.
"""

import contextlib
import copy
import ctypes
import io
import json
import os
import re
import signal
import struct
import sys
import traceback
import types
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from unittest import mock

import h5py
import numpy as np
import safetensors.numpy
import soundfile
import tiny
import torch
import yaml
from hypothesis import strategies as st

from gae import audio, cli, convert, evaluate, features, index, mapping, modelfile, original, params, shards
from gae.checkpoints import Checkpoints
from gae.errors import AudioError, FormatError, GaeError
from gae.filelists import check_list, read_list
from gae.files import digest, read_json, write_json
from gae.modelfile import save_model

SECONDS = 5  # of processor time that a small file may take
MEMORY = 150 << 20  # bytes that a small file may take
LINE = 3000  # characters of a message
KEY = "0123456789abcdef" * 2
_LIBC = ctypes.CDLL(None)  # here: loading a library while a file is read counts as a deed of the file
FORMATS = {
    "wav": [("WAV", "PCM_16"), ("WAV", "FLOAT"), ("WAV", "IMA_ADPCM"), ("WAV", "GSM610"), ("WAVEX", "PCM_24")],
    "aiff": [("AIFF", "PCM_16"), ("AIFF", "FLOAT"), ("AIFF", "IMA_ADPCM")],
    "flac": [("FLAC", "PCM_16"), ("FLAC", "PCM_24")],
    "ogg": [("OGG", "VORBIS"), ("OGG", "OPUS")],
    "mp3": [("MP3", "MPEG_LAYER_III")],
    "other audio": [
        *(("W64", subtype) for subtype in ("PCM_16", "MS_ADPCM")),
        *(("AU", subtype) for subtype in ("PCM_16", "G721_32")),
        *((name, "PCM_16") for name in ("RF64", "CAF", "AVR", "SVX", "MAT4", "MAT5", "MPC2K", "PAF", "PVF", "IRCAM", "VOC", "NIST")),
        *[("CAF", "ALAC_16"), ("XI", "DPCM_16"), ("SDS", "PCM_16"), ("WVE", "ALAW"), ("HTK", "PCM_16")],
    ],
}


@dataclass(frozen=True)
class Target:
    """What reads a file of somebody else's.

    Attributes
    ----------
    name : str
    file : str
        Where the file lies in the folder.
    read : callable
        Called with that path in that folder; raises `GaeError` where it refuses. It may write into ``out``.
    seeds : callable
        Gives valid files, and such as were made to do harm: list of bytes.
    made : callable
        Gives a strategy of files put together from parts that lie.
    furnish : callable
        Called in the folder once: lays out what else `read` needs.
    """

    name: str
    file: str
    read: Callable
    seeds: Callable
    made: Callable
    furnish: Callable = lambda: None

    def files(self):
        """A strategy of files: made of parts, or valid ones that were damaged."""
        return st.one_of(damaged(self.seeds()), self.made())


class Slow(BaseException):
    """A file took too long. Not an `Exception`: nothing that reads may hold it for damage."""


def outcome(target, data):
    """Let `target` read the bytes `data`, in the working folder.

    Returns
    -------
    str
        "accepted", "refused", or what happened that should not.
    """
    path = Path(target.file)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    before, resident = _listing(), _memory("VmRSS")
    try:
        with _alarm():
            target.read(path)
        said = "accepted"
    except GaeError as error:
        said = _manners(str(error), path)
    except (Exception, Slow) as error:
        said = _place(error)
    if (now := _listing()) != before:
        return f"changed {sorted(map(str, now ^ before))[:3]}"
    taken = _memory("VmHWM") - resident
    return f"took {taken >> 20} MB" if taken > MEMORY else said


def _manners(message, path):
    """A refusal is one line that a terminal can show and that names the file."""
    if message.splitlines() != [message] or not message.isprintable() or len(message) > LINE:
        return f"refused in other than one line: {message[:200]!r}"
    named = path.name in message or f"{path.parent}: " in message
    return "refused" if named else f"refused without the file's name: {message[:200]!r}"


def _place(error):
    """Type and message of what was raised, and where: the last line of `gae`, or else the last."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.name != _ring.__name__]
    ours = [frame for frame in frames if Path(frame.filename).parent.name == "gae"]
    place = (ours or frames)[-1]
    return f"{type(error).__name__} at {Path(place.filename).name}:{place.lineno}: {' '.join(str(error).split())[:120]}"


def _listing():
    """All files around the working folder but those in out, with their sizes."""
    found = set()
    for folder, folders, files in os.walk(b".."):
        folders[:] = [name for name in folders if name != b"out"]
        found.update((os.path.join(folder, name), os.lstat(os.path.join(folder, name)).st_size) for name in files)
    return found


def _memory(which):
    """Resident memory of this process in bytes, now (VmRSS) or its highest (VmHWM) since it was asked for the present."""
    try:
        if which == "VmRSS":
            with contextlib.suppress(AttributeError):  # of glibc alone: what others let go of would be taken unseen
                _LIBC.malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")  # starts the highest anew
        return int(re.search(rf"{which}:\s*(\d+)", Path("/proc/self/status").read_text())[1]) << 10
    except OSError:  # not Linux
        return 0


def _ring(*_):
    raise Slow(f"more than {SECONDS} s")


@contextlib.contextmanager
def _alarm():
    before = signal.signal(signal.SIGPROF, _ring)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


@contextlib.contextmanager
def _in_this_process():
    with mock.patch.object(index, "map_tracks", tiny.map_here), mock.patch.object(convert, "map_tracks", tiny.map_here):
        yield


# ways to damage bytes

NUMBERS = [0, 1, 2, 7, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 10**6, 792_000_000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 1 << 62, (1 << 64) - 1]
LAYOUTS = ["B", "<H", ">H", "<I", ">I", "<Q", ">Q"]


@st.composite
def damaged(draw, seeds):
    """A seed, whole or cut off, flipped, spliced with another, its fields changed to numbers that lie."""
    number_of_seed = st.integers(0, len(seeds) - 1)
    data = bytearray(seeds[draw(number_of_seed)])
    for _ in range(draw(st.integers(0, 4))):
        reach = len(data) if draw(st.booleans()) else min(len(data), 200)  # headers stand at the beginning
        at = draw(st.integers(0, reach))
        match draw(st.sampled_from(["field", "flip", "cut", "drop", "splice", "repeat", "zero", "append"])):
            case "field":
                layout = draw(st.sampled_from(LAYOUTS))
                size = struct.calcsize(layout)
                number = draw(st.sampled_from(NUMBERS)) % (1 << 8 * size)
                data[at : at + size] = struct.pack(layout, number)
            case "flip" if at < len(data):
                data[at] ^= 1 << draw(st.integers(0, 7))
            case "cut":
                del data[at:]
            case "drop":
                del data[at : at + draw(st.integers(1, 64))]
            case "splice":
                other = seeds[draw(number_of_seed)]
                data[at:] = other[draw(st.integers(0, len(other))) :]
            case "repeat":
                data[at:at] = data[at : at + draw(st.integers(1, 400))] * draw(st.integers(1, 20))
            case "zero":
                size = min(draw(st.integers(1, 400)), len(data) - at)
                data[at : at + size] = bytes(size)
            case "append":
                data += draw(st.binary(max_size=40))
    return bytes(data[: 1 << 18])


HUGE, DEEP = "@huge", "@deep"  # stand for what json.dumps won't write
HOSTILE = [
    *[None, True, -1, 0, 1, 3, 0.5, 1 << 31, 1 << 63, 1 << 64, 10**400, 1e308, float("nan"), float("inf"), HUGE, DEEP],
    *[
        "",
        ".",
        "..",
        "../bait.h5",
        "../bait",
        "/etc/passwd",
        "out/../../bait.h5",
        "a\0b",
        "a\nb",
        "x" * 5000,
        "\udc80",
        "\ud800",
        "\x1b[31m",
    ],
    *[[], {}, [[]], [None], ["a"], {"a": 1}],
]


def rendered(value):
    """JSON of a value that may hold `HUGE` and `DEEP`."""
    text = json.dumps(value)
    return text.replace(f'"{HUGE}"', "9" * 5000).replace(f'"{DEEP}"', "[" * 50_000 + "]" * 50_000).encode()


@st.composite
def altered(draw, value):
    """A JSON value of which some parts are replaced, left out or doubled."""
    value = json.loads(json.dumps(value))
    for _ in range(draw(st.integers(1, 3))):
        holder, key = {"": value}, ""
        while isinstance(holder[key], dict | list) and holder[key] and draw(st.integers(0, 5)):
            holder = holder[key]
            key = draw(st.sampled_from(sorted(holder) if isinstance(holder, dict) else range(len(holder))))
        match draw(st.sampled_from(["replace", "replace", "leave out", "double"])):
            case "leave out" if key != "":
                del holder[key]
            case "double" if isinstance(holder, list):
                holder.append(holder[key])
            case _ if key == "":
                return draw(st.sampled_from(HOSTILE))
            case _:
                holder[key] = copy.deepcopy(draw(st.sampled_from(HOSTILE)))
    return value


def altered_json(valid):
    """Files of JSON like `valid`, a function that gives a value."""
    return lambda: altered(valid()).map(rendered)


# audio


def _read_audio(path):
    info = audio.probe(path)
    blocks = list(audio.blocks(path, 8000))
    assert all(np.isfinite(block).all() for block in blocks)
    assert info.n_samples > 0 and abs(sum(map(len, blocks)) - 8000 * info.seconds) < 100
    assert audio.claimed_seconds(path) >= 0


def _audio_seeds(name):
    def seeds():
        files = []
        for kind, subtype in FORMATS[name]:
            file = io.BytesIO()
            soundfile.write(file, tiny.tone(0.2, 8000), 8000, format=kind, subtype=subtype)
            files.append(file.getvalue())
            file = io.BytesIO()
            with contextlib.suppress(soundfile.LibsndfileError):  # some formats have one channel
                soundfile.write(file, np.zeros((300, 2)), 44100 if subtype != "OPUS" else 48000, format=kind, subtype=subtype)
                files.append(file.getvalue())
        return files

    return cache(seeds)


@st.composite
def _chunks(draw, form, kinds, order):
    """A RIFF or an IFF of chunks whose sizes may lie."""
    number = st.sampled_from([1, 2, 8000, 44100, *NUMBERS])
    body = b""
    for _ in range(draw(st.integers(1, 5))):
        payload = b"".join(
            struct.pack(order + layout, draw(number) % (1 << 8 * struct.calcsize(layout)))
            for layout in draw(st.lists(st.sampled_from("BHIQ"), max_size=9))
        )
        size = draw(st.one_of(st.just(len(payload)), st.sampled_from(NUMBERS))) % (1 << 32)
        body += draw(st.sampled_from(kinds)) + struct.pack(order + "I", size) + payload
    return form[:4] + struct.pack(order + "I", draw(st.one_of(st.just(len(body) + 4), number)) % (1 << 32)) + form[4:] + body


def _ogg_checksum(page):
    """CRC-32 of a page, of the polynomial 04C11DB7, not reflected."""
    crc = 0
    for byte in page:
        crc = (crc << 8) & 0xFFFFFFFF ^ _ogg_table()[crc >> 24 ^ byte]
    return crc


@cache
def _ogg_table():
    table = []
    for byte in range(256):
        crc = byte << 24
        for _ in range(8):
            crc = (crc << 1 ^ (0x04C11DB7 if crc >> 31 else 0)) & 0xFFFFFFFF
        table.append(crc)
    return table


@st.composite
def _pages(draw):
    """Ogg pages that were changed, left out or moved, with right checksums: others are not looked at."""
    data = bytearray(SEEDS["ogg"]()[draw(st.integers(0, 3))])
    starts = [match.start() for match in re.finditer(rb"OggS\0", data)]
    pages = [data[start:end] for start, end in zip(starts, [*starts[1:], len(data)], strict=True)]
    for _ in range(draw(st.integers(1, 4))):
        page = draw(st.sampled_from(pages))
        at = draw(st.integers(5, min(len(page), 120) - 1))
        layout = draw(st.sampled_from(LAYOUTS))
        size = min(struct.calcsize(layout), len(page) - at)
        page[at : at + size] = struct.pack(layout, draw(st.sampled_from(NUMBERS)) % (1 << 8 * struct.calcsize(layout)))[:size]
    for page in pages:
        page[22:26] = bytes(4)
        page[22:26] = struct.pack("<I", _ogg_checksum(page))
    return b"".join(draw(st.permutations(pages)) if draw(st.integers(0, 5)) == 0 else pages)


def _audio_parts(name):
    made = {
        "wav": lambda: _chunks(b"RIFFWAVE", [b"fmt ", b"data", b"LIST", b"fact", b"ds64", b"junk"], "<"),
        "aiff": lambda: _chunks(b"FORMAIFC", [b"COMM", b"SSND", b"FVER", b"NAME", b"MARK"], ">"),
        "ogg": _pages,
    }
    return made.get(name, lambda: damaged(SEEDS[name]()))


# lists and parameters

LISTED = ["a.wav", "b.wav", "music/one.wav", "music/deep/two.flac", "live [2019].wav", "C # minor.wav", "Élise.wav"]


def _furnish_lists():
    for name in ["a", "a/b", "a/b/c", "a/b/c/d"]:
        (Path("deep") / name).mkdir(parents=True, exist_ok=True)
    for name in [*LISTED, os.fsdecode(b"odd/latin-\xe4.wav"), "odd/two\nlines.wav"]:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()


def _read_list(path):
    text = path.read_bytes()
    if b"*" in text and re.search(rb"(^|[\s\0])(/|~)", text):
        return  # walks what is not ours
    with contextlib.redirect_stderr(io.StringIO()):
        for line in read_list(path):
            assert line.paths and all(os.path.isfile(name) for name in line.paths)
    check_list(path, "made")


def _list_seeds():
    return [
        "\n".join(LISTED).encode(),
        b"# music\n*.wav  # all\nmusic/**/*.wav\nodd/*\n",
        b"a.wav\tb.wav\nmusic/one.wav\t[ab].wav\r\n",
        b"\xef\xbb\xbf~/a.wav",
        b"~nobody/a.wav",
        b"~\0",
        b"**/" * 20 + b"*.wav",
        b"*/../" * 20 + b"*.wav",
        b"a.wav" + b" #" * 5000,
        b"*a" * 30 + b"b",
        b"x" * 5000,
    ]


def _list_parts():
    pieces = [
        "\t",
        "\n",
        "\r\n",
        "#",
        " # ",
        "*",
        "[",
        "]",
        "[!",
        "**",
        "**/",
        "../",
        "*/",
        "?",
        "\0",
        "~",
        "\x0b",
        "\x85",
        "\u2028",
        "x" * 300,
    ]
    return st.lists(st.sampled_from([*LISTED, *pieces]) | st.text(max_size=4), max_size=20).map(lambda parts: "".join(parts).encode())


def _read_params(path):
    read = params.load(path)
    assert params.validate(read.model_dump()) == read
    with contextlib.suppress(params.ParamsError):
        params.load(path, [path.read_text(encoding="utf-8", errors="replace")])


def _params_seeds():
    bomb = "a0: &a0 {k: 1}\n" + "".join(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}\n" for n in range(1, 12))
    laughs = "a0: &a0 [1]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12))
    return [
        (Path(__file__).parents[1] / "params.yaml").read_bytes(),
        yaml.safe_dump(params.Params().model_dump()).encode(),
        b"model: {n_maps: 3, context: 5}\ntrain: &a {steps: 7}\nplot: {<<: *a}\n",
        bomb.encode(),
        laughs.encode(),
        b"model: &a {n_maps: *a}",
        b"x: !!python/object/apply:os.system ['touch ../canary']",
    ]


def _params_parts():
    keys = [f"{section}: {{{key}: " for section, field in params.Params.model_fields.items() for key in field.annotation.model_fields]
    values = ["1}", "x}", "1e5}", ".nan}", "-.inf}", "0x" + "f" * 5000 + "}", "1" + ":59" * 4000 + "}", '"\\ud800"}', '"a\\0b"}', '"\\e"}']
    values += [
        "[" * 900,
        "[" * 200 + "]" * 200 + "}",
        "!!binary aGk=}",
        "2001-01-01}",
        "2001-99-01}",
        "*a}",
        "{<<: *a}}",
        "{<<: [*a, *a]}}",
    ]
    pieces = [
        "\n",
        "- ",
        "? ",
        ": ",
        "&a ",
        "*a",
        "<<: *a\n",
        "!!set ",
        "!!omap ",
        "!!int ",
        "!!float ",
        "%YAML 9.9\n",
        "---\n",
        "|\n ",
        "\t",
        "'",
        "#",
    ]
    return st.lists(
        st.tuples(st.sampled_from(keys), st.sampled_from(values), st.just("\n")).map("".join)
        | st.sampled_from(pieces)
        | st.text(max_size=3),
        max_size=8,
    ).map(lambda parts: "".join(parts).encode("utf-8", "replace"))


# HDF5


def _in_memory(write, libver):
    file = io.BytesIO()
    with h5py.File(file, "w", libver=libver) as hdf5:
        write(hdf5)
    return file.getvalue()


def _versions(write):
    return [_in_memory(write, libver) for libver in (("v110", "v110"), ("earliest", "v110"))]


def _shard(file, n_frames=20):
    file.attrs.update(schema=shards.SCHEMA, cqt=json.dumps(tiny.CQT.model_dump()))
    shards.add_track(file, KEY, [tiny.frames(n_frames)], tiny.CQT.n_bins, "float32", path="a.wav", duration=1.0, peak=1.0)


def _shard_seeds():
    def claims(file):
        _shard(file)
        del file[KEY]["cqt"]
        file[KEY].create_dataset("cqt", (1 << 40, tiny.CQT.n_bins), "float32", chunks=(256, tiny.CQT.n_bins))
        file[KEY].attrs["n_frames"] = 1 << 40

    def points_elsewhere(file):
        _shard(file)
        file["f" * 32] = h5py.ExternalLink("../../bait.h5", f"/{KEY}")

    return [*_versions(_shard), *_versions(claims), *_versions(points_elsewhere)]


def _furnish_shards():
    with contextlib.ExitStack() as stack:
        Path("shards").mkdir()
        write_json("shards/index.json", _shards_index())
        _shard(stack.enter_context(h5py.File("shards/shard-all.h5", "w")))
    Path("../bait.h5").write_bytes(Path("shards/shard-all.h5").read_bytes())


def _shards_index():
    return {"schema": 1, "lines": [[{"key": KEY, "path": "a.wav", "n_frames": 20}]]}


def _read_shards(path):
    with shards.Shards("shards") as folder:
        for key in folder.tracks:
            assert len(folder.read(key)) == folder.tracks[key].n_frames
            n_frames, blocks = shards.read_blocks(folder.tracks[key].file, key)
            assert sum(map(len, blocks)) == n_frames
        lines = [[(track.key, track.path)] for track in folder.tracks.values()]
        shards.write_folder("out", lines, folder.tracks, folder.cqt, 1 << 20)


def _features(file, n_frames=20):
    file.attrs.update(schema=features.SCHEMA, source="a.wav", source_sha256="a" * 64, model_sha256="b" * 64)
    file.attrs["cqt"] = json.dumps(tiny.CQT.model_dump())
    file["values"] = tiny.frames(n_frames)[:, :7]
    file["times"] = np.arange(n_frames) * 0.1


def _read_features(path):
    header, read = features.validate(path), features.read(path)
    assert read.values.shape == (header.n_frames, header.n_maps) and np.isfinite(read.values).all()
    assert len(features.read(path, 3, 5)) <= 2
    read.save("out/copy.h5")


SHAPES = [(0,), (3,), (20,), (1 << 40,), (20, 36), (0, 36), (20, 7), (1 << 24, 36), (1 << 50, 7), (1 << 30, 1 << 30), (2, 2, 2)]


@st.composite
def _hdf5(draw, write):
    """A file of ours in which attributes and datasets are replaced by such as claim, compress, or point elsewhere."""
    changes = draw(
        st.lists(st.tuples(st.integers(0, 7), st.sampled_from(HOSTILE), st.sampled_from(SHAPES), st.randoms()), min_size=1, max_size=4)
    )

    def hostile(file):
        write(file)
        for kind, value, shape, random in changes:
            with contextlib.suppress(TypeError, ValueError, OSError, RuntimeError, KeyError, AttributeError, ArithmeticError):  # HDF5 can't
                _change(file, kind, value, shape, random)

    return _in_memory(hostile, draw(st.sampled_from([("v110", "v110"), ("earliest", "v110")])))


def _change(file, kind, value, shape, random):
    """One change of a kind."""
    names = []
    file.visit(names.append)
    name = random.choice(names or ["x"])
    thing = file.get(name, file)
    dtype = random.choice(["f4", "f2", "f8", "i8", "c16", "S9", h5py.string_dtype()])
    chunks = tuple(min(size, random.choice([1, 256, 1 << 22])) or 1 for size in shape)
    if random.choice([True, False]) and "n_frames" in thing.parent.attrs:
        thing.parent.attrs["n_frames"] = shape[0]  # one lie that fits another
    match kind:
        case 0:
            holder = random.choice([file, thing])
            holder.attrs[random.choice([*holder.attrs, "x"])] = json.dumps({"n_bins": 1 << 40}) if value is None else value
        case 1:
            holder = random.choice([file, thing])
            holder.attrs.create(random.choice([*holder.attrs, "x"]), np.zeros(random.choice([0, 3, 900])))
        case 2:
            del file[name]
            file.create_dataset(name, shape, dtype, fillvalue=random.choice([None, 1]))
        case 3:
            compression, shuffle = random.choice([None, "gzip", "lzf"]), random.choice([True, False])
            del file[name]
            file.create_dataset(name, shape, dtype, chunks=chunks, compression=compression, shuffle=shuffle)
        case 4:
            del file[name]
            file[name] = random.choice(
                [
                    h5py.SoftLink("/"),
                    h5py.SoftLink("/times"),
                    h5py.ExternalLink("../bait.h5", "/"),
                    h5py.ExternalLink(str(value), f"/{KEY}/cqt"),
                ]
            )
        case 5:
            del file[name]
            file.create_dataset(name, shape, dtype, external=[("../bait.h5", 0, h5py.h5f.UNLIMITED)])
        case 6:
            layout = h5py.VirtualLayout(shape, dtype)
            layout[...] = h5py.VirtualSource("../bait.h5", f"/{KEY}/cqt", shape)
            del file[name]
            file.create_virtual_dataset(name, layout)
        case 7:
            file.create_group(str(value)[:50] or "x")


# models and weights


def _safetensors(facts, tensors):
    return safetensors.numpy.save(tensors, metadata={"gae": facts if isinstance(facts, str) else json.dumps(facts)})


@cache
def _model():
    save_model("out/model.safetensors", tiny.model().network, tiny.CQT, train={"steps": 1})
    return Path("out/model.safetensors").read_bytes()


@cache
def _greedy_model(dilation, stretched=0.0):
    """A small file of a model whose filters, with the gaps of its context, are large."""
    cqt = params.Cqt(fmin=30.0, n_bins=2000, bins_per_octave=240)
    sizes = {**tiny.SIZES.model_dump(), "n_factors": 1, "context": 31, "dilation": dilation, "transposed": 10, "stretched": stretched}
    facts = {"schema": modelfile.SCHEMA, "model": sizes, "cqt": cqt.model_dump()}
    weights = tiny.model(cqt=cqt, sizes=tiny.SIZES.model_copy(update={"n_factors": 1, "context": 31})).weights
    return _safetensors(facts, {name: array.astype(np.float16) for name, array in weights.items()})


def _split(data):
    """Header as a value and the numbers of a .safetensors."""
    size = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def _joined(header, numbers, claim=None):
    text = rendered(header)
    return struct.pack("<Q", len(text) if claim is None else claim) + text + numbers


@st.composite
def _lying_safetensors(draw, seed):
    """A .safetensors whose header, or what `gae` says in it, was changed."""
    header, numbers = _split(seed())
    if draw(st.booleans()):
        facts = draw(altered(json.loads(header["__metadata__"]["gae"])))
        header["__metadata__"]["gae"] = rendered(facts).decode()
    else:
        header = draw(altered(header))
    return _joined(header, numbers, draw(st.none() | st.none() | st.sampled_from(NUMBERS)))


def _read_model(path):
    model = modelfile.load_model(path)
    with np.errstate(over="ignore", invalid="ignore"):
        assert mapping.extract_frames(tiny.frames(3, n_bins=model.cqt.n_bins), model).shape == (3, model.sizes.n_maps)


def _weights_seeds():
    from test_original import GREEDY, STAND_IN, attacks, row, zipped

    module = types.ModuleType("cgae")
    exec(STAND_IN, vars(module))  # the classes that the original pickles
    module.C_GAE.__module__ = "cgae"
    files = []
    with mock.patch.dict(sys.modules, cgae=module), warnings.catch_warnings(action="ignore"):
        network = module.C_GAE(bins=24, factors=3, context=3, mapping=(3, 2))
        for saved in (network, network.state_dict()):
            for how in ({}, {"_use_new_zipfile_serialization": False}, {"pickle_protocol": 4}):
                file = io.BytesIO()
                torch.save(saved, file, **how)
                files.append(file.getvalue())
    files += [data for data in GREEDY.values() if len(data) < 100_000]
    return [*files, *(form(pickled) for pickled in attacks("../canary").values() for form in (row, zipped))]


def _weights_parts():
    from test_original import claimed, op, row, zipped

    names = [
        b"cposix\nsystem\n",
        b"ccollections\nOrderedDict\n",
        b"ctorch\nSize\n",
        b"ctorch\nFloatStorage\n",
        b"ctorch._utils\n_rebuild_tensor_v2\n",
    ]
    names += [b"cbuiltins\nset\n", b"cbuiltins\neval\n", b"ccgae\nC_GAE\n", b"cgae\nx\n", b"X\x0d\0\0\0conv_x.weight", b"X\x02\0\0\0os"]
    codes = [bytes([code]) for code in b"().}]NQRbehlqrstu0123S\x81\x85\x86\x87\x88\x89\x8a\x8b\x93\x94\x95"]
    codes += [
        b"K\x01",
        b"M\xff\xff",
        b"J\xff\xff\xff\x7f",
        b"q\x00",
        b"h\x00",
        b"U\x04abcd",
        b"I" + b"9" * 5000 + b"\n",
        b"\x8a\xff" + b"\x7f" * 255,
    ]
    pickled = st.lists(st.sampled_from(codes) | st.sampled_from(names), max_size=40).map(lambda parts: op(b"\x80\x02", *parts, b"."))
    numbers = st.sampled_from([-1, 0, 1, 2, 4, 1000, 1 << 31, 1 << 62, 1 << 100])
    rows = st.lists(numbers, max_size=5).map(tuple)
    tensors = st.builds(claimed, numbers, rows, rows)
    forms = st.sampled_from(
        [row, zipped, lambda data: zipped(data, **{"0": bytes(4000)}), lambda data: row(data, ["0"]) + struct.pack("<q", 4) + bytes(16)]
    )
    return st.builds(lambda form, data: form(data), forms, pickled | tensors)


# what is read back


def _index():
    entry = {"path": "a.wav", "key": KEY, "sha256": KEY * 2, "bytes": 1000, "seconds": 1.0, "sample_rate": 8000, "channels": 1}
    skipped = {"path": "bad.wav", "list": "data/convert.txt", "line": 3, "reason": "bad.wav: truncated"}
    return {"schema": 1, "train": [[entry]], "convert": [[entry]], "skipped": [skipped]}


@cache
def _small_params():
    data, convert = {"train_list": "list.txt", "convert_list": "list.txt"}, {"weights": "model.safetensors"}
    return params.validate({"cqt": tiny.CQT.model_dump(), "data": data, "convert": convert})


def _furnish_conversion():
    _furnish_shards()
    write_json("index.json", _index())
    Path("out").mkdir(exist_ok=True)
    Path("model.safetensors").write_bytes(_model())
    Path("../bait").touch()


def _convert(path):
    with _in_this_process():
        convert.convert_list(_small_params(), Path("shards"), Path("index.json"), Path("out"))
    assert all(name in ("index.json", "model.safetensors", "stranger.json") or name.endswith(".h5") for name in os.listdir("out"))


def _features_index():
    track = {"path": "a.wav", "file": "a.h5", "key": KEY, "n_frames": 20}
    return {"schema": 1, "model_sha256": "b" * 64, "tracks": [track, {**track, "file": "gone.h5"}], "skipped": []}


def _convert_again(path):
    Path("out/index.json").write_bytes(path.read_bytes())
    _convert(path)


def _corpus():
    beats = {"score": [0.5, 1.0], "performance": [0.6, 1.2]}
    pieces = [{"id": name, "split": "heldout", "k": k, "beats": beats} for name, k in (("a", 3), ("b", -4))]
    return {"pieces": [{"id": "c", "split": "train"}, *pieces]}


def _read_corpus(path):
    for piece in evaluate.heldout_pieces(path.parent):
        evaluate.heldout_file(path.parent, piece, "original")
        assert np.subtract(piece["beats"]["score"], piece["beats"]["performance"]).ndim == 1 and -piece["k"] <= 12


def _figures():
    from test_plot import metrics

    return metrics()


def _furnish_memory():
    soundfile.write("a.wav", tiny.tone(0.2, 8000), 8000)
    os.utime("a.wav", ns=(0, 0))
    soundfile.write("b.wav", tiny.tone(0.2, 8000), 8000)
    Path("list.txt").write_text("a.wav\nb.wav\n")  # of b nothing is remembered


def _memory_seed():
    found = {"sha256": KEY * 2, "bytes": 3244, "samples": 1600, "sample_rate": 8000, "channels": 1, "stamp": [3244, 0]}
    return {"version": index._version(), "files": {"a.wav": found}}


def _read_memory(path):
    Path("out").mkdir(exist_ok=True)
    remembered = Path("out/memory.json")
    remembered.write_bytes(path.read_bytes())
    with _in_this_process():
        index.index(_small_params(), "out/index.json", remembered)


def _store(folder):
    module = torch.nn.Linear(3, 2)
    optimiser = torch.optim.Adam(module.parameters())
    alone = types.SimpleNamespace(is_global_zero=True, broadcast=lambda value: value)
    return module, optimiser, Checkpoints(folder, "c" * 32, {"model": module}, [optimiser], alone)


@cache
def _checkpoint():
    module, optimiser, store = _store("out/checkpoint")
    module(torch.ones(3)).sum().backward()
    optimiser.step()
    store.save(step=25, history=[{"step": 25, "loss": 1.0}], seconds=3.0, best_score=-1.0, best_error=0.0, best_step=0, fruitless=0)
    return store.file.read_bytes()


def _read_checkpoint(path):
    module, optimiser, store = _store(Path("out/checkpoint"))
    store.folder.mkdir(parents=True, exist_ok=True)
    store.file.write_bytes(path.read_bytes())
    facts = store.resume()
    if facts is None:  # training then starts anew
        raise FormatError(f"{path}: can't be read")
    assert facts["step"] == 25 and facts["history"]
    optimiser.zero_grad()
    module(torch.ones(3)).sum().backward()
    optimiser.step()


# names


def _read_name(path):
    """The file holds what an audio file is called; all that is written for it lies in out."""
    name = os.fsdecode(path.read_bytes())
    named = convert.feature_names([name, f"other/{name}", "a.wav"])
    for file in named.values():
        assert Path(file + ".h5").name == file + ".h5" and len(os.fsencode(file)) < 200 and file.isprintable()
        features.write(f"out/{file}.h5", [np.zeros((2, 3), np.float32)], (2, 3), features.Origin(tiny.CQT, name))
        assert len(features.read(f"out/{file}.h5")) == 2
    write_json("out/index.json", {name: named})
    assert read_json("out/index.json") == {name: named} and digest(name)
    with contextlib.redirect_stderr(io.StringIO()) as said, contextlib.suppress(SystemExit):
        cli.main(["convert", "--weights", "model.safetensors", "--out", "out/", "--", f"missing/{name}"])
    assert said.getvalue().splitlines() == [said.getvalue().rstrip("\n")], said.getvalue()
    with contextlib.suppress(AudioError):
        audio.probe(f"missing/{name}")


def _name_seeds():
    names = [
        "a.wav",
        "Für Élise.flac",
        "../../bait.wav",
        "/etc/passwd",
        "a\0b.wav",
        "a\nb.wav",
        "x" * 5000,
        ".",
        "..",
        "-rf",
        "CON",
        " ",
        "\x1b[31m.wav",
    ]
    return [*map(os.fsencode, names), b"latin-\xe4.wav", b"\xed\xa0\x80.wav", b"\xe2\x80\xa8.wav", b"\xe2\x80\xae.wav"]


def _name_parts():
    pieces = st.sampled_from(
        ["../", "/", "\\", "\0", "\n", "\r", "\u2028", "\u202e", "\udc80", "\udcff", ".h5", ".", "-", "~", "é", "e\u0301", "x" * 300]
    )
    return st.lists(pieces | st.text(max_size=3), max_size=6).map(lambda parts: "".join(parts).encode("utf-8", "surrogateescape"))


SEEDS = {name: _audio_seeds(name) for name in FORMATS}
TARGETS = [
    *(Target(name, "stranger.audio", _read_audio, SEEDS[name], _audio_parts(name)) for name in FORMATS),
    Target("file list", "stranger.txt", _read_list, _list_seeds, _list_parts, _furnish_lists),
    Target("params.yaml", "stranger.yaml", _read_params, _params_seeds, _params_parts),
    Target("shard", "shards/shard-all.h5", _read_shards, _shard_seeds, lambda: _hdf5(_shard), _furnish_shards),
    Target("shards/index.json", "shards/index.json", _read_shards, lambda: [rendered(_shards_index())], altered_json(_shards_index), _furnish_shards),
    Target("features", "stranger.h5", _read_features, lambda: _versions(_features), lambda: _hdf5(_features)),
    Target("model", "stranger.safetensors", _read_model, lambda: [_model(), _greedy_model(34), _greedy_model(15), _greedy_model(10, 0.6)], lambda: _lying_safetensors(_model)),
    Target("model.save", "stranger.save", lambda path: original.read_original(path), cache(_weights_seeds), _weights_parts),
    Target("data/index.json", "index.json", _convert, lambda: [rendered(_index())], altered_json(_index), _furnish_conversion),
    Target("features/index.json", "stranger.json", _convert_again, lambda: [rendered(_features_index())], altered_json(_features_index), _furnish_conversion),
    Target("index memory", "stranger.json", _read_memory, lambda: [rendered(_memory_seed())], altered_json(_memory_seed), _furnish_memory),
    Target("corpus.json", "corpus/corpus.json", _read_corpus, lambda: [rendered(_corpus())], altered_json(_corpus)),
    Target("evaluation.json", "stranger.json", evaluate.read_figures, lambda: [rendered(_figures())], altered_json(_figures)),
    Target("checkpoint", "stranger.safetensors", _read_checkpoint, lambda: [_checkpoint()], lambda: _lying_safetensors(_checkpoint)),
    Target("names", "stranger.name", _read_name, _name_seeds, _name_parts, _furnish_conversion),
]  # fmt: skip


@contextlib.contextmanager
def furnished(target, folder):
    """Make `folder`/work the working folder, with all that `target` needs."""
    work = Path(folder) / "work"
    (work / "out").mkdir(parents=True)
    with contextlib.chdir(work), mock.patch.object(os, "fsync"):  # nobody pulls the plug
        target.furnish()
        yield
