"""The original implementation's weights: read from its pickle, as data, and written as a model file.

S. Lattner's `cgae-invar` saves its model by ``torch.save(model)``: a pickled module of class ``cgae.C_GAE``, in a file of
the form that PyTorch wrote before 1.6 (a row of pickles, then numbers), or since (a zip). Unpickling such a file may run
anything. Here nothing is unpickled: the pickle's instructions are interpreted by the few lines below, in which a
class or a function is but a name, a call is but a record of name and arguments, and names that no module of weights
needs are refused.
"""

import io
import math
import pickletools
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import ValidationError

from gae import params
from gae.errors import FormatError
from gae.files import content_hash
from gae.modelfile import Model, problem_of, save_model

_BYTES = 1 << 26  # no file of weights is larger
_NAME = 100  # letters; the original's have some tens
_INSTRUCTIONS = 10_000  # in one pickle; the original's has some hundreds
_MAGIC = 0x1950A86A20F9469CFC6C
_TYPES = {"FloatStorage": "<f4", "DoubleStorage": "<f8", "HalfStorage": "<f2"}
_TENSORS = {"_rebuild_tensor", "_rebuild_tensor_v2"}
_PARAMETERS = {"_rebuild_parameter", "_rebuild_parameter_with_state", "Parameter"}
_WANTED = ("conv_x.weight", "conv_y.weight", "conv_m1.weight", "conv_m1.bias", "conv_m2.weight", "conv_m2.bias")
_UNUSED = {"bias_x"}  # the mapping does without it
_PLAIN = {"stride": (1, 1), "dilation": (1, 1), "groups": 1}  # of a layer: with others it would map otherwise
_NAMES = {
    "collections": {"OrderedDict"},
    "builtins": {"set"},
    "__builtin__": {"set"},
    "torch": {"Size", *_TYPES},
    "torch.cuda": set(_TYPES),
    "torch._utils": {*_TENSORS, *_PARAMETERS},
    "torch.nn.parameter": {"Parameter"},
    "torch.nn.modules.conv": {"Conv2d"},
    "torch.nn.backends.thnn": {"_get_thnn_function_backend"},
    "cgae": {"C_GAE"},
    "__main__": {"C_GAE"},
}


def import_weights(path, out):
    """Turn the original implementation's ``model.save`` into a model file.

    Parameters
    ----------
    path : str or Path
        What the original wrote.
    out : str or Path
        Model file (.safetensors) to write.

    Raises
    ------
    FormatError
        If it is no such file, or asks for anything but tensors and the modules that hold them.
    """
    model = read_original(path)
    save_model(out, model, model.cqt, imported={"name": Path(path).name, "sha256": content_hash(path)})


def read_original(path):
    """Read the original implementation's weights file without executing anything in it.

    Parameters
    ----------
    path : str or Path

    Returns
    -------
    Model
        Gives the same mapping as the original.

    Raises
    ------
    FormatError
        As `import_weights`.
    """
    data = _read_bytes(path)
    try:
        saved, storage = _read_zip(data) if data.startswith(b"PK") else _read_row(data)
        parameters = _parameters(saved)
        if others := sorted(parameters.keys() - {*_WANTED, *_UNUSED}):
            raise FormatError(f"refused {', '.join(others)}, which the original does not have")
        claims = [_claim(parameters[name]) for name in _WANTED]
        if sum(math.prod(shape) * held.dtype.itemsize for held, _, shape, _ in claims) > len(data):
            raise FormatError("refused tensors of more numbers than the file holds")
        wx, wy, m1, b1, m2, b2 = (_tensor(*claim, storage) for claim in claims)
        return from_arrays(wx.squeeze(1).transpose(0, 2, 1), wy.squeeze((1, 2)), m1.squeeze((2, 3)), b1, m2.squeeze((2, 3)), b2)
    except FormatError as error:
        raise FormatError(f"{path}: {error}; only a model.save of the original implementation can be imported") from None
    except Exception as error:  # a damaged file may break any expectation
        what = " ".join(f"{type(error).__name__} {error}"[:1000].split())[:120]
        raise FormatError(f"{path}: not a weights file of the original implementation ({what}); check that it is model.save") from None


def from_arrays(wx, wy, m1, b1, m2, b2):
    """A model with the original implementation's weights.

    Parameters
    ----------
    wx : ndarray, shape (n_factors, n_bins, context)
        Filters of x.
    wy : ndarray, shape (n_factors, n_bins)
        Filters of y.
    m1, b1 : ndarray, shapes (n_hidden, n_factors) and (n_hidden,)
        Lower mapping layer.
    m2, b2 : ndarray, shapes (n_maps, n_hidden) and (n_maps,)
        Top mapping layer.

    Returns
    -------
    Model
        With the original's frames: 22,050 Hz, hop 448, from 65.4 Hz, 24 bins an octave, magnitudes as they are.

    Raises
    ------
    FormatError
        If the shapes don't fit together or a weight is NaN or infinite.
    """
    if [np.ndim(array) for array in (wx, wy, m1, b1, m2, b2)] != [3, 2, 2, 1, 2, 1]:
        raise FormatError("weights have other dimensions than the original's")
    n_factors, n_bins, context = wx.shape
    arrays = {
        "filters_x": wx.transpose(0, 2, 1).reshape(n_factors, context * n_bins),
        "filters_y": wy,
        "map_1.weight": m1,
        "map_1.bias": b1,
        "map_2.weight": m2,
        "map_2.bias": b2,
    }
    with np.errstate(over="ignore"):  # what becomes infinite is refused below
        weights = {name: np.array(array, np.float32, order="C") for name, array in arrays.items()}
    try:
        sizes = params.Model(
            n_factors=n_factors,
            n_hidden=len(m1),
            n_maps=len(m2),
            context=context,
            dilation=1,
            growth=0,
            input_scale=1.0,
            transposed=0,
            stretched=0,
        )
        cqt = params.Cqt(sample_rate=22050, hop_length=448, fmin=65.4, n_bins=n_bins, bins_per_octave=24, compression="none")
    except ValidationError as error:
        raise FormatError(f"sizes of the weights are out of range ({error.errors()[0]['msg']})") from None
    model = Model(weights, sizes, cqt)
    if (problem := problem_of(model)) is not None:
        raise FormatError(problem)
    return model


def _read_bytes(path):
    path = Path(path)
    try:
        if path.is_file() and path.stat().st_size > _BYTES:
            raise FormatError(f"{path}: larger than any weights of the original implementation; check that it is model.save")
        if path.exists() and not path.is_file():
            raise FormatError(f"{path}: no file; name the model.save of the original implementation")
        return path.read_bytes()
    except OSError as error:
        raise FormatError(f"{path}: cannot be read ({error.strerror}); check the path and its permissions") from None


def _read_zip(data):
    """The saved object of a file of PyTorch 1.6 or later, and a function that gives the bytes of a storage."""
    file = zipfile.ZipFile(io.BytesIO(data))
    entries = {entry.filename.partition("/")[2]: entry for entry in file.infolist()}
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries.values()):
        raise FormatError("refused compressed entries, which PyTorch does not write")
    if "byteorder" in entries and file.read(entries["byteorder"]) != b"little":
        raise FormatError("refused numbers in big-endian order")
    saved, _ = _interpret(io.BytesIO(file.read(entries["data.pkl"])))
    return saved, lambda key: file.read(entries[f"data/{key}"])


def _read_row(data):
    """The same of a file of PyTorch before 1.6: five pickles, then for each storage its length and its numbers."""
    file = io.BytesIO(data)
    if _interpret(file)[0] != _MAGIC:
        raise FormatError("is no file of PyTorch")
    _interpret(file)  # version of the form
    _interpret(file)  # sizes of the integers of the machine
    saved, storages = _interpret(file)
    places = {}
    for key in _interpret(file)[0]:
        size = struct.unpack("<q", file.read(8))[0] * storages[_text(key)].dtype.itemsize
        places[key] = slice(file.tell(), file.tell() + size)
        file.seek(max(0, size), io.SEEK_CUR)
    return saved, lambda key: data[places[key]]


def _parameters(saved):
    """The tensors of the module by name, as records."""
    if isinstance(saved, dict):  # its state_dict alone
        return _few(saved)
    layers = {"": saved, **{f"{name}.": layer for name, layer in _few(saved.state["_modules"]).items()}}
    for name, layer in layers.items():
        for option, plain in _PLAIN.items():
            if layer.state.get(option, plain) != plain:
                # not the value: tuples within tuples may have a text without end
                raise FormatError(f"refused {name}{option}, which is not the original's"[:120])
    named = {name + key: value for name, layer in layers.items() for key, value in _few(layer.state.get("_parameters", {})).items()}
    return {name: value for name, value in named.items() if value is not None}  # a bias that a layer does without


def _few(entries):
    """Layers or parameters by name: no more, and no longer named, than a network of this size has."""
    if len(entries) > 16 or max(map(len, entries), default=0) > _NAME:
        raise FormatError("refused more layers or parameters than the original has")
    return entries


def _claim(record):
    """What a record of a tensor or a parameter claims to be: its storage, and its place, shape and strides there."""
    if record.name in _PARAMETERS:
        record = record.arguments[0]
    if record.name not in _TENSORS:
        raise FormatError(f"refused {record.name} in the place of a tensor")
    held, offset, shape, strides = record.arguments[:4]
    if len(shape) > 4 or not all(isinstance(number, int) for number in (offset, *shape, *strides)):
        raise FormatError("refused a tensor of other dimensions than the original's")
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if min(offset, *shape, *strides) < 0 or last >= held.size or math.prod(shape) > held.size:
        raise FormatError("refused a tensor that claims more numbers than it has")
    return held, offset, shape, strides


def _tensor(held, offset, shape, strides, storage):
    """The array of a `_claim`."""
    numbers = np.frombuffer(storage(held.key), held.dtype, held.size)[offset:]
    return np.lib.stride_tricks.as_strided(numbers, shape, [stride * held.dtype.itemsize for stride in strides]).copy()


@dataclass(frozen=True)
class _Name:
    """A class or a function that a pickle names. Never looked up."""

    module: str
    name: str


@dataclass(eq=False)
class _Record:
    """What a call would have made: the name that was called, its arguments, and the state set on it afterwards."""

    name: str
    arguments: tuple
    state: object = None


@dataclass(frozen=True)
class _Storage:
    """A row of numbers elsewhere in the file: how many, of which type."""

    dtype: np.dtype
    key: str
    size: int


def _interpret(file):
    """Read one pickle as data.

    Returns
    -------
    object
        Numbers, texts, lists, tuples and dictionaries as they are; of the rest `_Name`, `_Record` and `_Storage`.
    dict of str to _Storage
        The storages that it mentions, by key.

    Raises
    ------
    FormatError
        If it names what is not in `_NAMES`, or holds other instructions than PyTorch writes.
    """
    stack, marks, memo, storages = [], [], {}, {}

    def since_mark():
        start = marks.pop()
        items = stack[start:]
        del stack[start:]
        return items

    for count, (opcode, argument, _) in enumerate(pickletools.genops(file)):
        if count > _INSTRUCTIONS:
            raise FormatError("refused a pickle longer than any of weights")
        match opcode.name:
            case "PROTO" | "FRAME":
                pass
            case "STOP":
                return stack.pop(), storages
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(opcode.name == "NEWTRUE")
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT":
                stack.append(argument)
            case "BINUNICODE" | "SHORT_BINUNICODE" | "BINSTRING" | "SHORT_BINSTRING":
                stack.append(argument)
            case "EMPTY_LIST" | "EMPTY_SET":
                stack.append([])
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_TUPLE":
                stack.append(())
            case "MARK":
                marks.append(len(stack))
            case "TUPLE":
                stack.append(tuple(since_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                size = int(opcode.name[-1])
                stack[-size:] = [tuple(stack[-size:])]
            case "APPEND":
                item = stack.pop()
                stack[-1].append(item)
            case "APPENDS" | "ADDITEMS":
                items = since_mark()
                stack[-1].extend(items)
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                stack[-1][_text(key)] = value
            case "SETITEMS":
                items = since_mark()
                stack[-1].update(_pairs(zip(items[::2], items[1::2], strict=True)))
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "GLOBAL":
                stack.append(_name(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                name, module = stack.pop(), stack.pop()
                stack.append(_name(_text(module), _text(name)))
            case "REDUCE" | "NEWOBJ":
                arguments, name = stack.pop(), stack.pop()
                stack.append(_call(name, arguments))
            case "BUILD":
                state = stack.pop()
                if isinstance(stack[-1], _Record):
                    stack[-1].state = state
            case "BINPERSID":
                found = _persistent(stack.pop())
                if isinstance(found, _Storage):
                    storages[found.key] = found
                stack.append(found)
            case other:
                raise FormatError(f"refused the instruction {other}")
    raise FormatError("ends in the middle")


def _name(module, name):
    if name not in _NAMES.get(module, ()):
        raise FormatError(f"refused {module}.{name}"[:120])
    return _Name(module, name)


def _call(name, arguments):
    """A record of a call; containers become plain ones."""
    if not isinstance(name, _Name) or not isinstance(arguments, tuple):
        raise FormatError("refused a call of what is no name")
    match name.name:
        case "OrderedDict":
            return _pairs(_items(arguments))
        case "set":
            return list(_items(arguments))
        case "Size":
            return tuple(_items(arguments))
    return _Record(name.name, arguments)


def _items(arguments):
    """What a container is to hold; a text, which would take eight times its size at each call, is none of it."""
    items = arguments[0] if arguments else ()
    if len(arguments) > 1 or not isinstance(items, tuple | list):
        raise FormatError("refused a container that is not made of a list")
    if len(items) > 64:
        raise FormatError("refused a container of more than any of weights holds")
    return items


def _persistent(identity):
    """What is kept outside the pickle: the source of a class, of which the name is enough, or a storage."""
    match identity:
        case ("module", _Name() as name, _, _):
            return name
        case ("storage", _Name() as kind, str() as key, _, int() as size, *view) if view in ([], [None]):
            return _Storage(np.dtype(_TYPES[kind.name]), key, size)
    raise FormatError("refused a reference to what is neither a class nor a row of numbers")


def _pairs(items):
    return {_text(key): value for key, value in map(_pair, items)}


def _pair(item):
    if not isinstance(item, tuple | list):  # two signs of a text would do
        raise FormatError("refused what is no pair of a key and a value")
    return item


def _text(key):
    if not isinstance(key, str):
        raise FormatError("refused a key that is no text")
    if len(key) > _NAME:
        raise FormatError("refused a key that is longer than any name")
    return key
