import io
import os
import pickle
import sys
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import tiny

import gae
from gae.errors import FormatError
from gae.mapping import extract_frames
from gae.original import from_arrays, import_weights, read_original
from gae.params import Cqt

torch = pytest.importorskip("torch")

STAND_IN = """
import torch
from torch import nn


class C_GAE(nn.Module):
    # the layout of the original, written from its description
    def __init__(self, bins=120, factors=256, context=9, mapping=(128, 64)):
        super().__init__()
        self.context_length = context
        self.conv_x = nn.Conv2d(1, factors, (context, bins), padding=(context // 2, 0), bias=False)
        self.bias_x = nn.Parameter(torch.zeros(bins))
        self.conv_y = nn.Conv2d(1, factors, (1, bins), bias=False)
        self.conv_m1 = nn.Conv2d(factors, mapping[0], 1)
        self.conv_m2 = nn.Conv2d(mapping[0], mapping[1], 1)

    def mapping(self, x, y):
        return torch.tanh(self.conv_m2(torch.tanh(self.conv_m1(self.conv_x(x) * self.conv_y(y)))))
"""


@pytest.fixture
def cgae(tmp_path, monkeypatch):
    """A module `cgae` to write files with, gone when they are read."""
    (tmp_path / "cgae.py").write_text(STAND_IN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "cgae", raising=False)
    import cgae

    torch.manual_seed(0)
    yield cgae
    monkeypatch.delitem(sys.modules, "cgae", raising=False)


def original_mapping(network, frames):
    """As the original converts: y is 1 + context // 2 frames after the middle of x. Row t belongs to frame t + that."""
    shift = 1 + network.context_length // 2
    padded = torch.from_numpy(frames)[None, None]
    with torch.no_grad():
        return network.mapping(padded[:, :, :-shift], padded[:, :, shift:])[0, :, :, 0].T.numpy(), shift


FORMS = {
    "zip": {},
    "row": {"_use_new_zipfile_serialization": False},
    "protocol4": {"pickle_protocol": 4},
    "row4": {"_use_new_zipfile_serialization": False, "pickle_protocol": 4},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.filterwarnings("ignore")
def test_imported_weights_give_the_originals_mapping(cgae, tmp_path, form):
    network = cgae.C_GAE()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(3)
    torch.save(network, tmp_path / "model.save", **FORMS[form])
    del sys.modules["cgae"]
    import_weights(tmp_path / "model.save", tmp_path / "imported.safetensors")
    assert "cgae" not in sys.modules

    model = gae.load_model(tmp_path / "imported.safetensors")
    assert model.cqt == Cqt(sample_rate=22050, hop_length=448, fmin=65.4, n_bins=120, bins_per_octave=24, compression="none")
    assert model.sizes.input_scale == 1 and model.sizes.context == 9 and model.sizes.readings == [(0, list(range(9, 0, -1)))]
    assert model.facts["imported"]["name"] == "model.save"

    frames = tiny.frames(300, n_bins=120)
    mapping, shift = original_mapping(network, frames)
    whole = slice(4, -4)  # the first and the last contexts hold the original's zeros
    values = extract_frames(frames, model)
    assert np.abs(values[shift:][whole] - mapping[whole]).max() < 1e-5
    assert np.abs(mapping).mean() > 0.01  # or there would be nothing to compare
    with torch.inference_mode():
        y = torch.from_numpy(frames)[None]
        x = torch.cat([y[:, :1].expand(-1, 9, -1), y], 1)[:, :-1]
        assert np.abs(model.network.mapping(x, y)[0].numpy()[shift:][whole] - mapping[whole]).max() < 1e-5


@pytest.mark.filterwarnings("ignore")
def test_sizes_are_read_from_the_tensors(cgae, tmp_path):
    network = cgae.C_GAE(bins=48, factors=20, context=5, mapping=(11, 6)).half()
    for saved in (network, network.state_dict()):
        torch.save(saved, tmp_path / "model.save")
        model = read_original(tmp_path / "model.save")
        assert (model.sizes.n_factors, model.sizes.n_hidden, model.sizes.n_maps, model.sizes.context) == (20, 11, 6, 5)
        assert model.cqt.n_bins == 48
        assert np.array_equal(model.weights["filters_x"], network.conv_x.weight[:, 0].flatten(1).float().detach().numpy())
        assert np.array_equal(model.weights["map_2.bias"], network.conv_m2.bias.float().detach().numpy())


@pytest.mark.filterwarnings("ignore")
def test_tensors_that_the_original_lacks_are_refused(cgae, tmp_path):
    """A bias of conv_x would change the mapping."""
    network = cgae.C_GAE()
    network.conv_x = torch.nn.Conv2d(1, 256, (9, 120), padding=(4, 0))
    for saved in (network, network.state_dict()):
        torch.save(saved, tmp_path / "model.save")
        with pytest.raises(FormatError, match=r"refused conv_x\.bias, which the original does not have"):
            read_original(tmp_path / "model.save")


@pytest.mark.filterwarnings("ignore")
def test_tensors_that_are_views(cgae, tmp_path):
    network = cgae.C_GAE(bins=48, factors=20)
    network.conv_x.weight.data = torch.randn(9, 48, 22)[:, :, 2:].permute(2, 0, 1)[:, None]
    torch.save(network, tmp_path / "model.save")
    assert np.array_equal(
        read_original(tmp_path / "model.save").weights["filters_x"], network.conv_x.weight[:, 0].flatten(1).detach().numpy()
    )


def op(code, *parts):
    return code + b"".join(parts)


def text(value):
    return op(b"X", len(value).to_bytes(4, "little"), value.encode())


def old_tensor(key, *shape):
    """A parameter as PyTorch 0.3 pickles it: Parameter(_rebuild_tensor(storage, offset, size, stride), True), and a state."""
    strides = [int(np.prod(shape[n + 1 :])) for n in range(len(shape))]
    numbers = [op(b"(", *(op(b"M", n.to_bytes(2, "little")) for n in row), b"t") for row in (shape, strides)]
    storage = op(
        b"(",
        text("storage"),
        b"ctorch.cuda\nFloatStorage\n",
        text(key),
        text("cuda:0"),
        op(b"J", int(np.prod(shape)).to_bytes(4, "little")),
    )
    tensor = op(b"ctorch._utils\n_rebuild_tensor\n(", storage, b"NtQK\x00", b"ctorch\nSize\n", numbers[0], b"\x85R", numbers[1], b"tR")
    return op(b"ctorch.nn.parameter\nParameter\n", tensor, b"\x88\x86R", b"(\x88\x89ccollections\nOrderedDict\n)Rtb")


def test_file_of_an_early_pytorch(tmp_path):
    sizes = {"conv_x": (4, 1, 3, 24), "conv_y": (4, 1, 1, 24), "conv_m1": (3, 4, 1, 1), "conv_m2": (2, 3, 1, 1)}
    arrays, layers = {}, []
    for layer, shape in sizes.items():
        parameters = {"weight": shape, "bias": None if layer in ("conv_x", "conv_y") else shape[:1]}
        pickled = []
        for name, size in parameters.items():
            if size is not None:
                arrays[f"{layer}.{name}"] = np.random.default_rng(len(arrays)).standard_normal(size).astype("<f4")
            pickled.append(op(text(name), old_tensor(f"{layer}.{name}", *size) if size else b"N"))
        state = op(b"}(", text("_backend"), b"ctorch.nn.backends.thnn\n_get_thnn_function_backend\n)R")
        state = op(state, text("_parameters"), b"ccollections\nOrderedDict\n)R(", *pickled, b"uu")
        source = op(b"(", text("module"), b"ctorch.nn.modules.conv\nConv2d\n", text("conv.py"), text("class Conv2d: ..."), b"tQ")
        layers.append(op(text(layer), source, b")\x81", state, b"b"))
    module = op(b"(", text("module"), b"ccgae\nC_GAE\n", text("cgae.py"), text("class C_GAE: ..."), b"tQ)\x81")
    module = op(b"\x80\x02", module, b"}", text("_modules"), b"ccollections\nOrderedDict\n)R(", *layers, b"usb.")
    numbers = b"".join(array.size.to_bytes(8, "little") + array.tobytes() for array in arrays.values())
    (tmp_path / "model.save").write_bytes(row(module, list(arrays)) + numbers)

    model = read_original(tmp_path / "model.save")
    assert np.array_equal(model.weights["filters_x"], arrays["conv_x.weight"][:, 0].reshape(len(arrays["conv_x.weight"]), -1))
    assert np.array_equal(model.weights["filters_y"], arrays["conv_y.weight"][:, 0, 0])
    assert np.array_equal(model.weights["map_1.weight"], arrays["conv_m1.weight"][:, :, 0, 0])
    assert np.array_equal(model.weights["map_2.bias"], arrays["conv_m2.bias"])


def row(pickled, keys=()):
    """The pickles of a file of PyTorch before 1.6 around a pickled object."""
    head = [0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True, "type_sizes": {"int": 4}}]
    return b"".join(pickle.dumps(value, 2) for value in head) + pickled + pickle.dumps(list(keys), 2)


def zipped(pickled, compression=zipfile.ZIP_STORED, **storages):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in {"data.pkl": pickled, "version": b"3\n", **{f"data/{k}": v for k, v in storages.items()}}.items():
            archive.writestr(f"archive/{name}", content)
    return file.getvalue()


class Call:
    """Pickles as a call of `function`."""

    def __init__(self, function, *arguments, state=None):
        self.function, self.arguments, self.state = function, arguments, state

    def __reduce__(self):
        return (self.function, self.arguments) if self.state is None else (self.function, self.arguments, self.state)


def attacks(canary):
    """Pickles that write a file when they are unpickled, and names that the refusal must mention."""
    command = f"touch {canary}"
    code = f"open({str(canary)!r}, 'w')"
    return {
        "posix.system": pickle.dumps(Call(os.system, command), 2),
        "builtins.eval": pickle.dumps(Call(eval, code), 4),
        "__builtin__.eval": pickle.dumps({"conv_x.weight": Call(eval, code)}, 2),
        "builtins.exec": pickle.dumps([1, (2, {"a": Call(exec, code)})], 4),
        "builtins.getattr": pickle.dumps(Call(getattr, "a text", "format"), 4),
        "refused a call of what is no name": op(b"\x80\x02", text("eval"), b")R."),
        "refused the instruction INST": op(b"(", text(command), b"iposix\nsystem\n."),
        "refused the instruction OBJ": b"(cbuiltins\nset\no.",
        "torch.FloatStorage.from_file": b"\x80\x02ctorch\nFloatStorage.from_file\n.",
        "numpy": pickle.dumps(np.array([Call(os.system, command)], object), 2),
    }


def lives(canary, pickled):
    """Whether an attack does what it is for, in pickle's hands."""
    pickle.loads(pickled)
    done = canary.exists()
    canary.unlink(missing_ok=True)
    return done


@pytest.mark.parametrize("form", [row, zipped])
def test_nothing_in_a_file_runs(tmp_path, form):
    canary = tmp_path / "canary"
    for name, pickled in attacks(canary).items():
        if name in ("posix.system", "builtins.eval", "__builtin__.eval", "builtins.exec", "numpy", "refused the instruction INST"):
            assert lives(canary, pickled), name
        (tmp_path / "model.save").write_bytes(form(pickled))
        with pytest.raises(FormatError) as caught:
            import_weights(tmp_path / "model.save", tmp_path / "out.safetensors")
        assert name in str(caught.value) and "\n" not in str(caught.value) and str(tmp_path / "model.save") in str(caught.value)
        assert not canary.exists() and not (tmp_path / "out.safetensors").exists()


def test_attack_in_any_of_the_pickles_of_a_row(tmp_path):
    canary = tmp_path / "canary"
    evil = pickle.dumps(Call(os.system, f"touch {canary}"), 2)
    good = [pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, {}, {}, [])]
    for n in range(5):
        (tmp_path / "model.save").write_bytes(b"".join([*good[:n], evil, *good[n + 1 :]]))
        with pytest.raises(FormatError, match=r"posix\.system"):
            read_original(tmp_path / "model.save")
        assert not canary.exists()


def test_state_set_on_a_name_changes_nothing(tmp_path):
    """BUILD on a class sets attributes of it when unpickled: the next object made would run them."""
    for name in (b"ccollections\nOrderedDict\n", b"ctorch.nn.modules.conv\nConv2d\n", b"ctorch._utils\n_rebuild_tensor_v2\n"):
        pickled = op(b"\x80\x02", name, b"N}", text("__setstate__"), b"cbuiltins\nset\n", b"s\x86b.")
        for form in (row, zipped):
            (tmp_path / "model.save").write_bytes(form(pickled))
            with pytest.raises(FormatError):
                read_original(tmp_path / "model.save")
    assert not hasattr(torch.nn.Conv2d, "__setstate__") or torch.nn.Conv2d.__setstate__ is not set
    assert not hasattr(torch._utils._rebuild_tensor_v2, "__setstate__")


def claimed(size, shape, strides, key="0"):
    """A state_dict of six tensors that claim what they like of one storage."""

    def number(n):
        return op(b"\x8a", bytes([16]), n.to_bytes(16, "little", signed=True))

    def row_of(numbers):
        return op(b"(", *(row_of(n) if isinstance(n, tuple) else number(n) for n in numbers), b"t")

    storage = op(b"(", text("storage"), b"ctorch\nFloatStorage\n", text(key), text("cpu"), number(size), b"tQ")
    tensor = op(b"ctorch._utils\n_rebuild_tensor_v2\n(", storage, number(0), row_of(shape), row_of(strides), b"\x89N", b"tR")
    names = ["conv_x.weight", "conv_y.weight", "conv_m1.weight", "conv_m1.bias", "conv_m2.weight", "conv_m2.bias"]
    return op(b"\x80\x02}(", *(op(text(name), tensor) for name in names), b"u.")


def doubled(levels):
    """A module with a layer whose stride is a pair of the same pair of the same pair, and so on: twice the text at each level."""
    stride = op(b"K\x01", op(b"q\x00h\x00\x86") * levels)
    layer = op(b"ctorch.nn.modules.conv\nConv2d\n)\x81}", text("stride"), stride, b"sb")
    return op(b"\x80\x02ccgae\nC_GAE\n)\x81}", text("_modules"), b"}", text("conv_x"), layer, b"ssb.")


def crossed(count, length):
    """A module of so many layers that share so many parameters, all of long names."""
    names = [f"{number:0{length}}" for number in range(count)]
    record = op(b"ctorch.nn.modules.conv\nConv2d\n)\x81")
    parameters = op(b"}(", *(op(text(name), b"K\x01") for name in names), b"u")
    layer = op(record, b"}", text("_parameters"), parameters, b"sbq\x00")
    layers = op(b"}(", *(op(text(name), layer if not number else b"h\x00") for number, name in enumerate(names)), b"u")
    return op(b"\x80\x02ccgae\nC_GAE\n)\x81}", text("_modules"), layers, b"sb.")


GREEDY = {
    "storage": zipped(claimed(10**12, (10**6, 1, 10**3, 10**3), (10**6, 1, 10**3, 1)), **{"0": bytes(16)}),
    "strides": zipped(claimed(4, (10**6, 1, 10**3, 10**3), (0, 0, 0, 0)), **{"0": bytes(16)}),
    "negative": zipped(claimed(-1, (2, 1, 2, 2), (-1, -1, -1, -1)), **{"0": bytes(16)}),
    "outside": zipped(claimed(4, (2, 2), (10**6, 1)), **{"0": bytes(16)}),
    "huge": zipped(claimed(2**120, (2**60, 2**60), (2**60, 1)), **{"0": bytes(16)}),
    "dimensions": zipped(claimed(2**120, (2**120,) * 500, (0,) * 500), **{"0": bytes(16)}),
    "a row for a stride": zipped(claimed(10**8, (10**7,), ((0,) * 60,)), **{"0": bytes(16)}),
    "doubled": zipped(doubled(22)),
    "absent": zipped(claimed(4, (4,), (1,), key="7")),
    "row": row(claimed(4, (4,), (1,)), ["0"]) + (2**62).to_bytes(8, "little"),
    "memo": zipped(b"\x80\x02Nr\xff\xff\xff\xff."),
    "text": zipped(b"\x80\x02X\xff\xff\xff\x7f."),
    "copies": zipped(op(b"\x80\x02](", b"K\x01" * 9_000, b"eq\x00", op(b"ctorch\nSize\n", b"h\x00\x85R") * 200_000, b".")),
    "copies of a text": zipped(op(b"\x80\x02", text("a" * 300_000), b"q\x00", op(b"ctorch\nSize\n", b"h\x00\x85R") * 2_000, b".")),
    "long": zipped(b"\x80\x02" + b"N" * 5_000_000 + b"."),
    "names by names": zipped(crossed(2_000, 60)),
    "copies of pairs": zipped(
        op(b"\x80\x02](", text("ab") * 3_000, b"eq\x00", op(b"ccollections\nOrderedDict\n", b"h\x00\x85R") * 3_000, b".")
    ),
    "deep": zipped(b"\x80\x02}" + b")" + b"\x85" * 9_000 + b"Ns."),
    "deeper": zipped(b"\x80\x02(c" + b"a." * 100_000 + b"\nb\n."),
    "deflated": zipped(bytes(40_000_000), zipfile.ZIP_DEFLATED),
    "long name of a storage": row(pickle.dumps({}, 2), ["ab " * 3_000_000]) + bytes(8),
    "shared numbers": zipped(claimed(8_000_000, (8_000_000, 1, 1, 1), (1, 1, 1, 1)), **{"0": bytes(4 * 8_000_000)}),
    "number for a key": zipped(b"\x80\x02}K\x01K\x02s."),
    "empty": b"",
    "no zip": b"PK\x03\x04",
    "no pickle": zipped(b""),
    "other": zipped(pickle.dumps([1, 2, 3], 2)),
    "text file": b"conv_x.weight = 1\n",
}


WHY = {
    **dict.fromkeys(["storage", "huge", "shared numbers"], "refused tensors of more numbers than the file holds"),
    "deflated": "refused compressed entries",
    "number for a key": "refused a key that is no text",
    "long name of a storage": "refused a key that is longer than any name",
    "doubled": "refused conv_x.stride, which is not the original's",
    **dict.fromkeys(["dimensions", "a row for a stride"], "refused a tensor of other dimensions than the original's"),
    "copies of a text": "refused a container that is not made of a list",
    "long": "refused a pickle longer than any of weights",
    **dict.fromkeys(["strides", "negative", "outside"], "refused a tensor that claims more numbers than it has"),
}


@pytest.mark.parametrize("name", GREEDY)
def test_claims_take_no_memory(tmp_path, name):
    (tmp_path / "model.save").write_bytes(GREEDY[name])
    tracemalloc.start()
    try:
        with pytest.raises(FormatError) as caught:
            read_original(tmp_path / "model.save")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 20e6 + 2 * len(GREEDY[name])
    assert WHY.get(name, "") in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400 + len(str(tmp_path))


@pytest.mark.filterwarnings("ignore")
def test_flipped_and_missing_bytes_raise_nothing_else(cgae, tmp_path):
    rng = np.random.default_rng(0)
    network = cgae.C_GAE(bins=6, factors=3, mapping=(3, 2))
    for form in ("zip", "row"):
        torch.save(network, tmp_path / "model.save", **FORMS[form])
        data = (tmp_path / "model.save").read_bytes()
        for n in range(200):
            broken = bytearray(data[: rng.integers(len(data))] if n % 4 == 0 else data)
            for _ in range(rng.integers(1, 4)):
                broken[rng.integers(len(broken))] = rng.integers(256) if broken else 0
            (tmp_path / "broken.save").write_bytes(broken)
            try:
                read_original(tmp_path / "broken.save")
            except FormatError as error:
                assert "\n" not in str(error)


def test_weights_that_are_no_numbers(cgae, tmp_path):
    network = cgae.C_GAE(bins=48, factors=20)
    network.conv_m1.bias.data[3] = float("nan")
    torch.save(network, tmp_path / "model.save")
    with pytest.raises(FormatError, match="NaN"):
        read_original(tmp_path / "model.save")


def test_arrays_stay_the_callers():
    given = [np.ones(shape, np.float32) for shape in [(4, 12, 3), (4, 12), (3, 4), (3,), (2, 3), (2,)]]
    model = from_arrays(*given)
    assert all(array.flags.writeable for array in given)
    given[1][:] = 0
    assert model.weights["filters_y"].all()


def test_published_arrays_make_a_model():
    published = Path(__file__).parents[2] / "shared" / "data" / "cgae_pretrained.npz"
    if not published.exists():
        pytest.skip("the published weights are not there")
    with np.load(published) as arrays:
        model = from_arrays(*(arrays[name] for name in ("wx", "wy", "m1", "b1", "m2", "b2")))
        frames = tiny.frames(100, n_bins=120)
        t = 60
        x = np.einsum("fbk,kb->f", arrays["wx"], frames[t - 9 : t])
        factors = x * (arrays["wy"] @ frames[t])
        mapping = np.tanh(arrays["m2"] @ np.tanh(arrays["m1"] @ factors + arrays["b1"]) + arrays["b2"])
    assert np.abs(extract_frames(frames, model)[t] - mapping).max() < 1e-5


@pytest.mark.parametrize("change", [{"dilation": (2, 1)}, {"stride": (2, 1)}, {"groups": 2}])
@pytest.mark.filterwarnings("ignore")
def test_layers_that_map_otherwise_are_refused(cgae, tmp_path, change):
    network = cgae.C_GAE()
    ((option, value),) = change.items()
    setattr(network.conv_x, option, value)
    torch.save(network, tmp_path / "model.save")
    with pytest.raises(FormatError, match=f"refused conv_x.{option}"):
        read_original(tmp_path / "model.save")


def test_arrays_of_other_dimensions_are_refused():
    arrays = [np.ones(shape) for shape in [(3, 6, 5), (3, 6), (4, 3), (4,), (2, 4), (2,)]]
    from_arrays(*arrays)
    for n in range(6):
        with pytest.raises(FormatError, match="other dimensions"):
            from_arrays(*arrays[:n], np.float64(1), *arrays[n + 1 :])
