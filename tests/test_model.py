import copy
import dataclasses
import json
import os
import pickle
import re
import struct
import subprocess
import sys
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors
import tiny
import torch
from safetensors.numpy import load_file, save_file

from gae import model as module
from gae.cqt import transpose
from gae.errors import FormatError
from gae.mapping import extract_frames
from gae.model import GatedAutoencoder, contrast, sparsity
from gae.modelfile import load_model, save_model
from gae.params import Train
from gae.train import Objective

SIZES, BINS = tiny.SIZES, tiny.CQT.n_bins
CONTEXT, REACH = SIZES.context, 9  # 1 + 2 (5 - 1)


@pytest.fixture
def network():
    torch.manual_seed(3)
    return GatedAutoencoder(BINS, SIZES)


def excerpts(n_frames=12, n=3, seed=0):
    """x (n, n_frames + reach - 1, bins) and y (n, n_frames, bins) as tensors."""
    frames = np.stack([tiny.frames(n_frames + REACH, seed + number) for number in range(n)])
    return torch.from_numpy(frames[:, :-1].copy()), torch.from_numpy(frames[:, REACH:].copy())


class Slow:
    """The model in float64, sum by sum, from the formulas of the paper."""

    def __init__(self, network):
        self.w = {name: array.astype(np.float64) for name, array in network.weights.items()}
        self.w["filters_x"] = self.w["filters_x"].reshape(SIZES.n_factors, CONTEXT, BINS)

    def x_factors(self, x, t):
        """Of the frames x[t], x[t + 2], ..., x[t + reach - 1]."""
        filters, scale = self.w["filters_x"], SIZES.input_scale
        return np.array([sum(scale * x[t + 2 * k, b] * u[k, b] for k in range(CONTEXT) for b in range(BINS)) for u in filters])

    def mapping(self, x, y, stride=1):
        rows = []
        for row, t in enumerate(range(0, len(x) - REACH + 1, stride)):
            y_factors = np.array([sum(SIZES.input_scale * y[row, b] * v[b] for b in range(BINS)) for v in self.w["filters_y"]])
            factors = self.x_factors(x, t) * y_factors
            hidden = np.tanh(self.w["map_1.weight"] @ factors + self.w["map_1.bias"])
            rows.append(np.tanh(self.w["map_2.weight"] @ hidden + self.w["map_2.bias"]))
        return np.array(rows)

    def reconstruction(self, mapping, x, stride=1):
        rows = []
        for m, t in zip(mapping, range(0, len(x) - REACH + 1, stride), strict=True):
            hidden = self.w["map_2.weight"].T @ m + self.w["map_1.bias"]  # tied, with the first layer's bias
            factors = (self.w["map_1.weight"].T @ hidden) * self.x_factors(x, t)
            rows.append(self.w["filters_y"].T @ factors / SIZES.input_scale)
        return np.array(rows)


def lee(mappings):
    """The sparsity term of mappings (batch, n_frames, n_maps), square by square."""
    batch, n_frames, n_maps = mappings.shape
    squares = mappings**2
    of_maps = sum(sum(squares[b, t, m] for b in range(batch) for t in range(n_frames)) / (batch * n_frames) for m in range(n_maps))
    of_frames = sum(sum(squares[b, t, m] for b in range(batch) for m in range(n_maps)) / (batch * n_maps) for t in range(n_frames))
    return of_maps + of_frames


def info_nce(queries, keys, temperature):
    """Cross-entropy of finding row i of one in row i of the other by cosine, both ways."""
    total = 0.0
    for one, other in ((queries, keys), (keys, queries)):
        for i, row in enumerate(one):
            cosines = [row @ key / np.linalg.norm(row) / np.linalg.norm(key) for key in other]
            total -= cosines[i] / temperature - np.log(sum(np.exp(cosine / temperature) for cosine in cosines))
    return total / (2 * len(queries))


def test_the_mapping_follows_the_formula(network):
    x, y = excerpts()
    expected = np.stack([Slow(network).mapping(*pair) for pair in zip(x.numpy(), y.numpy(), strict=True)])
    mapping = network.mapping(x, y).detach().numpy()
    assert mapping.shape == (3, 12, SIZES.n_maps)
    assert np.abs(expected).max() > 0.3 and np.allclose(mapping, expected, atol=1e-5)


@pytest.mark.parametrize("bins", [5, BINS, 1000])
def test_features_are_the_mean_over_transpositions(network, bins):
    averaged = GatedAutoencoder(BINS, SIZES.model_copy(update={"transposed": bins}))
    averaged.load_state_dict(network.state_dict())
    x, y = excerpts()
    moved = [[torch.from_numpy(np.stack([transpose(f, k) for f in side.numpy()])) for side in (x, y)] for k in (-bins, 0, bins)]
    expected = torch.stack([network.mapping(*pair) for pair in moved]).mean(0)
    assert torch.allclose(averaged.mapping(x, y), expected, atol=1e-6)
    assert not torch.allclose(averaged.mapping(x, y), network.mapping(x, y), atol=1e-2)


def test_the_reconstruction_follows_the_formula(network):
    x = 2 * excerpts()[0]
    mapping = np.random.default_rng(1).uniform(-1, 1, (3, 12, SIZES.n_maps))
    expected = np.stack([Slow(network).reconstruction(*pair) for pair in zip(mapping, x.numpy(), strict=True)])
    made = network.reconstruct(torch.from_numpy(mapping).float(), x).detach().numpy()
    assert made.shape == (3, 12, BINS)
    assert np.abs(expected).max() > 0.1 and np.allclose(made, expected, atol=1e-5)


def test_frames_are_rebuilt_from_the_context_as_it_is_whatever_tempi_the_features_are_means_over(network):
    stretched = GatedAutoencoder(BINS, SIZES.model_copy(update={"stretched": 0.5}))
    stretched.load_state_dict(network.state_dict())
    x, mapping = excerpts()[0], torch.rand(3, 12, SIZES.n_maps)
    further = torch.cat([torch.randn(3, stretched.sizes.reach - REACH, BINS), x], 1)
    assert torch.allclose(stretched.reconstruct(mapping, further), network.reconstruct(mapping, x), atol=1e-6)


def test_a_context_may_lie_anywhere(network):
    x, _ = excerpts()
    rows = torch.from_numpy(np.random.default_rng(0).integers(0, x.shape[0] * x.shape[1], (4, 2, CONTEXT)))
    together = torch.randn(8, REACH, BINS)  # what lies between is not looked at
    together[:, ::2] = torch.stack([x.flatten(0, 1)[row] for row in rows.flatten(0, 1)])
    assert torch.allclose(network.responses(x.flatten(0, 1), rows), network.x_factors(together).view(4, 2, -1), atol=1e-5)


def test_a_context_is_closer_together_just_before_its_frame():
    network = GatedAutoencoder(BINS, SIZES.model_copy(update={"dilation": 1, "growth": 1}))
    x, filters = torch.randn(14, BINS), network.filters_x.view(SIZES.n_factors, CONTEXT, BINS)
    expected = SIZES.input_scale * torch.stack([torch.einsum("fkb,kb->f", filters, x[[t, t + 4, t + 7, t + 9, t + 10]]) for t in range(4)])
    assert torch.allclose(network.x_factors(x), expected, atol=1e-4)


def test_contexts_are_copied_piece_by_piece_and_learnt_from_all_the_same(network, monkeypatch):
    x, _ = excerpts()
    frames, rng = x.flatten(0, 1), np.random.default_rng(0)
    rows = torch.from_numpy(rng.integers(0, len(frames), (23, CONTEXT)))
    slope = torch.from_numpy(rng.standard_normal((23, SIZES.n_factors))).float()
    filters = network.filters_x.detach().clone().requires_grad_()
    expected = SIZES.input_scale * frames[rows].flatten(1) @ filters.T
    expected.backward(slope)
    for piece in (1, 5, 23, 100):
        monkeypatch.setattr("gae.model._PIECE", piece)
        network.filters_x.grad = None
        made = network.responses(frames, rows)
        made.backward(slope)
        assert torch.allclose(made, expected, atol=1e-5)
        assert torch.allclose(network.filters_x.grad, filters.grad, rtol=1e-4, atol=1e-4)


def test_a_mapping_looks_at_its_own_context_alone(network):
    x, y = excerpts(n=1)
    before = network.mapping(x, y)
    x[0, 4 + REACH] += 1  # the context of frames 5, 7, ...
    y[0, 10] += 1
    changed = (network.mapping(x, y) != before).any(dim=-1)[0]
    assert changed.tolist() == [t in (5, 7, 9, 10, 11) for t in range(12)]


def test_the_mapping_is_what_decides_the_frame(network):
    """The relation of one pair applied to another context: linear in the context's factors, as gating is."""
    x, y = excerpts()
    mapping = network.mapping(x, y)
    assert torch.allclose(network.reconstruct(mapping, 3 * x), 3 * network.reconstruct(mapping, x), atol=1e-5)


def test_filters_have_no_bias_and_layers_have():
    names = {name: tuple(tensor.shape) for name, tensor in GatedAutoencoder(BINS, SIZES).state_dict().items()}
    assert names == {
        "filters_x": (24, 5 * 36),
        "filters_y": (24, 36),
        "map_1.weight": (10, 24),
        "map_1.bias": (10,),
        "map_2.weight": (7, 10),
        "map_2.bias": (7,),
    }


def test_every_filter_gets_the_norm(network):
    before = network.weights
    network.set_filter_norm(0.4)
    for name in ("filters_x", "filters_y"):
        after = network.weights[name]
        assert np.allclose(np.sqrt((after**2).sum(axis=1)), 0.4, atol=1e-6)
        assert np.allclose(after, before[name] * 0.4 / np.linalg.norm(before[name], axis=1, keepdims=True), atol=1e-6)
    assert all(np.array_equal(network.weights[name], before[name]) for name in before if name.startswith("map"))
    with torch.no_grad():
        network.filters_y[0] = 0
    network.set_filter_norm(0.4)
    assert np.isfinite(network.weights["filters_y"]).all()


def test_the_sparsity_term_follows_the_formula():
    mapping = np.random.default_rng(0).uniform(-1, 1, (2, 5, 3))
    assert sparsity(torch.from_numpy(mapping)).item() == pytest.approx(lee(mapping))


@pytest.mark.parametrize("temperature", [0.02, 0.1, 1.0])
def test_the_contrast_follows_the_formula(temperature):
    rng = np.random.default_rng(0)
    queries, keys = rng.standard_normal((2, 8, 5))
    keys = keys + 2 * queries
    made = contrast(torch.from_numpy(queries).float(), torch.from_numpy(keys).float(), temperature)
    assert made.item() == pytest.approx(info_nce(queries, keys, temperature), abs=1e-4)


def test_the_contrasts_derivative_is_that_of_the_formula():
    sides = [tensor.clone().requires_grad_() for tensor in torch.randn(2, 2, 30, 5, generator=torch.Generator().manual_seed(1))]
    queries, keys = (side / side.norm(dim=-1, keepdim=True) for side in sides)
    logits = (queries @ keys.mT / 0.2).exp()
    own = logits.diagonal(dim1=-2, dim2=-1)
    formula = -((own / logits.sum(-1)).log() + (own / logits.sum(-2)).log()).mean() / 2
    for made, expected in zip(torch.autograd.grad(3 * contrast(*sides, 0.2), sides), torch.autograd.grad(3 * formula, sides), strict=True):
        assert torch.allclose(made, expected, rtol=1e-3, atol=1e-6)


def test_groups_are_contrasted_on_their_own():
    groups = torch.from_numpy(np.random.default_rng(0).standard_normal((2, 3, 8, 5))).float()
    expected = np.mean([contrast(groups[0, n], groups[1, n], 0.1).item() for n in range(3)])
    assert contrast(*groups, 0.1).item() == pytest.approx(expected, rel=1e-5)


def test_the_contrast_knows_pairs_from_strangers():
    mapping = torch.from_numpy(np.random.default_rng(0).standard_normal((64, 7))).float()
    own, strange = contrast(mapping, mapping, 0.1), contrast(mapping, mapping.roll(1, 0), 0.1)
    assert own < np.log(64) < strange
    assert contrast(torch.ones(64, 7), torch.ones(64, 7), 0.1).item() == pytest.approx(np.log(64), rel=1e-5)


def two_sides(stride=1):
    """A batch as `gae.batches.Batch` has it."""
    x, y = (torch.stack(sides) for sides in zip(excerpts(seed=0), excerpts(seed=10), strict=True))
    first = torch.arange(x[..., 0].numel()).view(x.shape[:-1])[:, :, : y.shape[2] : stride, None]
    return x, y[:, :, ::stride], first + torch.arange(0, REACH, 2), torch.arange(x.shape[1]) % 2 == 0


def settings(**changes):
    return Train(**{"precision": "fp32", "stride": 1, "contrast": 0.0, "sparsity": 0.0, "weight_decay": 0.0, **changes})


def test_the_originals_objective_follows_the_formula(network):
    x, y, contexts, one_view = two_sides()
    (x1, x2), (y1, y2) = x, y
    slow = Slow(network)
    mappings = np.stack([slow.mapping(*pair) for pair in zip(x1.numpy(), y1.numpy(), strict=True)])
    rebuilt = np.stack([slow.reconstruction(*pair) for pair in zip(mappings, x2.numpy(), strict=True)])
    error = ((rebuilt - y2.numpy()) ** 2).mean()
    decay = sum((network.weights[name].astype(np.float64) ** 2).sum() for name in ("filters_x", "filters_y"))
    terms = Objective(network, settings(objective="reconstruction", sparsity=1e-2, weight_decay=1e-3))(x, y, contexts, one_view, 0.0)
    assert set(terms) == {"loss", "reconstruction", "sparsity"}
    assert terms["reconstruction"].item() == pytest.approx(error, rel=1e-4)
    assert terms["sparsity"].item() == pytest.approx(lee(mappings), rel=1e-4)
    assert terms["loss"].item() == pytest.approx(error + 1e-2 * lee(mappings) + 1e-3 * decay, rel=1e-4)


@pytest.mark.parametrize(("contrast_frames", "n_groups"), [(1000, 1), (18, 2), (9, 4), (7, 6), (2, 12)])
def test_the_objective_of_invariance_follows_the_formula(network, contrast_frames, n_groups):
    x, y, contexts, one_view = two_sides()
    (x1, x2), (y1, y2) = x, y
    slow = Slow(network)
    m1, m2 = (np.stack([slow.mapping(*pair) for pair in zip(x.numpy(), y.numpy(), strict=True)]) for x, y in ((x1, y1), (x2, y2)))
    # by the other side's mapping, or by its own where that is another view
    first, second = (np.where(one_view[:, None, None], other, own) for own, other in ((m1, m2), (m2, m1)))
    y1_rebuilt = np.stack([slow.reconstruction(*pair) for pair in zip(first, x1.numpy(), strict=True)])
    y2_rebuilt = np.stack([slow.reconstruction(*pair) for pair in zip(second, x2.numpy(), strict=True)])
    error = ((y1_rebuilt - y1.numpy()) ** 2).sum() + ((y2_rebuilt - y2.numpy()) ** 2).sum()
    power = (y1.numpy() ** 2).sum() + (y2.numpy() ** 2).sum()
    # frame t of every excerpt is in group t modulo n_groups
    groups = [[m[:, group::n_groups].reshape(-1, SIZES.n_maps) for m in (m1, m2)] for group in range(n_groups)]
    contrasted = np.mean([info_nce(*group, 0.1) for group in groups])
    terms = Objective(network, settings(contrast=0.3, temperature=0.1, contrast_frames=contrast_frames))(x, y, contexts, one_view, 0.3)
    assert terms["reconstruction"].item() == pytest.approx(error / power, rel=1e-4)
    assert terms["contrast"].item() == pytest.approx(contrasted, rel=1e-3)
    assert terms["loss"].item() == pytest.approx(error / power + 0.3 * contrasted, rel=1e-3)


@pytest.mark.parametrize("objective", ["reconstruction", "invariance"])
def test_what_is_trained_is_one_mapping_not_the_mean_over_transpositions_and_tempi(network, objective):
    averaged = GatedAutoencoder(BINS, SIZES.model_copy(update={"transposed": 5, "stretched": 0.5}))
    averaged.load_state_dict(network.state_dict())
    changes = {"objective": objective, "contrast": 0.3, "sparsity": 1e-2}
    one, other = (Objective(model, settings(**changes))(*two_sides(), 0.3) for model in (network, averaged))
    assert {name: term.item() for name, term in one.items()} == {name: term.item() for name, term in other.items()}


def test_the_objective_with_a_stride_uses_every_nth_frame(network):
    slow, stride = Slow(network), 5
    x, y, contexts, one_view = two_sides(stride)
    (x1, x2), (y1, y2) = x, y
    mappings = np.stack([slow.mapping(x, y, stride) for x, y in zip(x1.numpy(), y1.numpy(), strict=True)])
    rebuilt = np.stack([slow.reconstruction(m, x, stride) for m, x in zip(mappings, x2.numpy(), strict=True)])
    terms = Objective(network, settings(objective="reconstruction", stride=stride))(x, y, contexts, one_view, 0.0)
    assert terms["loss"].item() == pytest.approx(((rebuilt - y2.numpy()) ** 2).mean(), rel=1e-4)


def test_an_excerpt_of_silence_has_a_loss(network):
    silence = [torch.zeros_like(part) for part in two_sides()]
    for objective in ("invariance", "reconstruction"):
        terms = Objective(network, settings(objective=objective, contrast=0.3))(*silence, 0.3)
        terms["loss"].backward()
        assert all(term.isfinite() for term in terms.values())
        assert all(weight.grad is None or weight.grad.isfinite().all() for weight in network.parameters())


def test_rests_after_sound_weigh_no_more_than_sound(network):
    """Their contexts hold sound, and a share of nothing is without bounds."""
    x, y, contexts, one_view = two_sides()
    objective = Objective(network, settings(contrast=0.3))
    resting = objective(x, torch.zeros_like(y), contexts, one_view, 0.3)
    assert resting["reconstruction"] < 20 * objective(x, y, contexts, one_view, 0.3)["reconstruction"]


def test_gradients_reach_the_frames(network):
    frames = torch.from_numpy(tiny.frames(REACH + 3, 5)).double().requires_grad_()
    network = network.double()
    assert torch.autograd.gradcheck(lambda f: network.mapping(f[None, :-1], f[None, REACH:]), frames)


def test_a_gradient_of_many_pieces_is_as_precise_as_one_of_few(monkeypatch):
    """In bf16 a running sum no longer grows once it is 256 times what is added."""
    frames, contexts, gradients = torch.rand(64, 8).bfloat16(), torch.randint(0, 64, (20_000, 2)), []
    for piece in (16, 20_000):
        monkeypatch.setattr(module, "_PIECE", piece)
        filters = torch.rand(3, 16).bfloat16().requires_grad_()
        module._Responses.apply(frames, contexts, filters).sum().backward()
        gradients.append(filters.grad.float())
    assert torch.allclose(*gradients, rtol=0.02)


@pytest.fixture
def saved(tmp_path, network):
    save_model(tmp_path / "model.safetensors", network, tiny.CQT, train={"steps": 3}, note="für Elise")
    return tmp_path / "model.safetensors"


def test_a_saved_model_comes_back(saved, network):
    model = load_model(saved)
    assert (model.sizes, model.cqt, model.facts["train"], model.facts["note"]) == (SIZES, tiny.CQT, {"steps": 3}, "für Elise")
    assert len(model.sha256) == 64
    assert model.weights.keys() == network.weights.keys()
    assert all(np.array_equal(model.weights[name], network.weights[name]) for name in model.weights)
    x, y = excerpts()
    assert torch.equal(model.network.mapping(x, y), network.mapping(x, y)) and not model.network.training
    assert model.network is model.network  # or what is done to it would be lost


def test_a_model_is_as_it_was_read(saved):
    """Its features are remembered by what it is; copies too are fixed."""
    model = load_model(saved)
    frames = tiny.frames(40)
    before = extract_frames(frames, model)
    for fixed in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with pytest.raises(TypeError):
            fixed.weights["map_2.weight"] = np.zeros_like(model.weights["map_2.weight"])
        with pytest.raises(ValueError, match="read-only"):
            fixed.weights["map_2.weight"][:] = 0
        assert np.array_equal(extract_frames(frames, fixed), before)
    other = dataclasses.replace(model, weights={**model.weights, "map_2.weight": np.zeros_like(model.weights["map_2.weight"])})
    assert not np.array_equal(extract_frames(frames, other), before)


def test_a_small_model_file_gives_nearly_the_same(tmp_path, saved, network):
    save_model(tmp_path / "small.safetensors", network, tiny.CQT, "float16")
    assert (tmp_path / "small.safetensors").stat().st_size < 0.6 * saved.stat().st_size
    small = load_model(tmp_path / "small.safetensors")
    assert all(array.dtype == np.float32 for array in small.weights.values())
    x, y = excerpts()
    assert torch.allclose(small.network.mapping(x, y), network.mapping(x, y), atol=5e-3)


def test_equal_models_are_equal_files_in_every_process(saved):
    program = """
import sys, torch, tiny
from gae.model import GatedAutoencoder
from gae.modelfile import save_model
torch.manual_seed(3)
save_model(sys.argv[1], GatedAutoencoder(36, tiny.SIZES), tiny.CQT, note="für Elise", train={"steps": 3})
"""
    other = saved.with_name("other.safetensors")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONHASHSEED": "7"}
    subprocess.run([sys.executable, "-c", program, other], env=environment, check=True)
    assert other.read_bytes() == saved.read_bytes()


def refuse(path):
    with pytest.raises(FormatError) as caught:
        load_model(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and message.splitlines() == [message] and len(message) < 600
    return message


def parts(path):
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def rewrite(path, header, data):
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


@pytest.mark.parametrize("share", [0, 0.001, 0.1, 0.999])
def test_a_truncated_model_is_refused(saved, share):
    content = saved.read_bytes()
    saved.write_bytes(content[: int(share * len(content))])
    refuse(saved)


@pytest.mark.parametrize("content", [b"a letter\n" * 100, b"\x80\x04\x95pickle", struct.pack("<Q", 1 << 62) + b"{}", b"PK\x03\x04" * 50])
def test_a_foreign_file_is_refused(saved, content):
    saved.write_bytes(content)
    refuse(saved)


def test_what_is_no_file_is_refused(tmp_path):
    assert "no such model" in refuse(tmp_path / "missing.safetensors")
    refuse(tmp_path)


def test_a_file_that_may_not_be_read_is_not_called_missing(saved, monkeypatch):
    def closed(path, *_):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("builtins.open", closed)
    assert "cannot be read (Permission denied)" in refuse(saved)


@pytest.mark.parametrize("kind", ["F8_E4M3", "F8_E5M2", "BF16"])
def test_weights_of_types_that_numpy_does_not_know_are_refused(saved, kind):
    header, data = parts(saved)
    begin, end = header["map_1.bias"]["data_offsets"]
    count = (end - begin) // (2 if kind == "BF16" else 1)
    header["map_1.bias"] |= {"dtype": kind, "shape": [count]}
    rewrite(saved, header, data)
    refuse(saved)


@pytest.mark.filterwarnings("error")
def test_weights_of_types_that_are_no_weights_are_refused(saved):
    with safetensors.safe_open(saved, "np") as file:
        metadata = file.metadata()
    weights = load_file(saved)
    for name, values in (("int32", np.int32), ("bool", bool)):
        save_file({**weights, "map_1.bias": weights["map_1.bias"].astype(values)}, saved, metadata)
        assert f"map_1.bias is of type {name}" in refuse(saved)
    save_file({**weights, "map_1.bias": np.full_like(weights["map_1.bias"], 1e300, np.float64)}, saved, metadata)
    assert "NaN or infinite" in refuse(saved)


def test_a_foreign_model_is_refused(tmp_path):
    save_file({"weight": np.zeros(3, np.float32)}, tmp_path / "foreign.safetensors")
    assert "schema None" in refuse(tmp_path / "foreign.safetensors")


@pytest.mark.parametrize(
    "change",
    [
        lambda facts: facts.update(schema=99),
        lambda facts: facts.pop("model"),
        lambda facts: facts.pop("cqt"),
        lambda facts: facts["model"].pop("context"),
        lambda facts: facts["cqt"].pop("compression"),  # a default is not what the model was trained with
        lambda facts: facts["model"].update(n_maps=8),
        lambda facts: facts["model"].update(n_maps=10**12),
        lambda facts: facts["model"].update(context=4),
        lambda facts: facts["model"].update(dilation=0),
        lambda facts: facts["model"].update(width=4),
        lambda facts: facts["model"].update(n_factors=16384, context=255),
        lambda facts: facts["cqt"].update(n_bins=35),
        lambda facts: facts["cqt"].update(fmin="low"),
        lambda facts: facts.update(cqt=None),
        lambda facts: facts.update(model=[1]),
        lambda facts: facts.clear(),
    ],
)
def test_what_breaks_the_contract_is_refused(saved, change):
    header, data = parts(saved)
    facts = json.loads(header["__metadata__"]["gae"])
    change(facts)
    header["__metadata__"]["gae"] = json.dumps(facts)
    rewrite(saved, header, data)
    refuse(saved)


def test_values_nobody_knows_are_counted_not_told(saved):
    header, data = parts(saved)
    facts = json.loads(header["__metadata__"]["gae"])
    facts["model"] |= {f"value {n}": n for n in range(20_000)}
    header["__metadata__"]["gae"] = json.dumps(facts)
    rewrite(saved, header, data)
    tracemalloc.start()
    try:
        assert "(value 0 is unknown, as are 19999 more)" in refuse(saved)
        assert tracemalloc.get_traced_memory()[1] < 20 * saved.stat().st_size
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("unsaid", "taken"),
    [
        (["stretched"], {}),
        (["growth", "transposed", "stretched"], {"growth": 0}),
        (["dilation", "growth", "transposed", "stretched"], {"dilation": 1, "growth": 0}),
    ],
)
def test_an_older_file_has_the_context_and_the_key_of_its_time(saved, unsaid, taken):
    header, data = parts(saved)
    facts = json.loads(header["__metadata__"]["gae"])
    facts["model"] = {key: value for key, value in facts["model"].items() if key not in unsaid}
    header["__metadata__"]["gae"] = json.dumps(facts)
    rewrite(saved, header, data)
    assert load_model(saved).sizes == SIZES.model_copy(update=taken)


@pytest.mark.parametrize("text", ["", "{", "[1]", "3", "null", "[" * 100_000])
def test_broken_facts_are_refused(saved, text):
    header, data = parts(saved)
    header["__metadata__"]["gae"] = text
    rewrite(saved, header, data)
    refuse(saved)


def test_a_header_that_claims_more_than_there_is_is_refused(saved):
    header, data = parts(saved)
    header["filters_x"]["shape"] = [1 << 20, 1 << 20]
    header["filters_x"]["data_offsets"] = [0, 1 << 42]
    rewrite(saved, header, data)
    refuse(saved)


@pytest.mark.parametrize("value", [np.nan, np.inf, -1e30])
def test_weights_that_are_no_numbers_are_refused(saved, network, value):
    with torch.no_grad():
        network.filters_y[3, 3] = value
    save_model(saved, network, tiny.CQT)
    assert "NaN or infinite" in refuse(saved)


def test_a_missing_or_spare_weight_is_refused(saved):
    with safetensors.safe_open(saved, "np") as file:
        metadata, weights = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file({**weights, "more": np.zeros(3, np.float32)}, saved, metadata)
    refuse(saved)
    weights.pop("map_2.bias")
    save_file(weights, saved, metadata)
    refuse(saved)


def test_a_failing_save_leaves_the_old_model(saved, network):
    before = saved.read_bytes()
    with pytest.raises(TypeError):
        save_model(saved, network, tiny.CQT, note=SimpleNamespace())
    assert saved.read_bytes() == before and [path.name for path in saved.parent.iterdir()] == [saved.name]


def test_a_model_is_told_in_a_line(saved):
    assert re.fullmatch(r"<Model: \d+ features from \d+ of the last \d+ frames, one every 32.0 ms, sha256 \w{12}>", repr(load_model(saved)))


def test_arrays_that_a_model_is_made_of_stay_the_callers_own():
    model = tiny.model()
    mine = np.zeros_like(model.weights["map_2.bias"])
    other = dataclasses.replace(model, sha256="", weights={**model.weights, "map_2.bias": mine})
    before = extract_frames(tiny.frames(40), other)
    mine[:] = 1
    assert not other.weights["map_2.bias"].any() and np.array_equal(extract_frames(tiny.frames(40), other), before)


def test_a_context_of_one_frame_follows_the_formula():
    network = GatedAutoencoder(BINS, SIZES.model_copy(update={"context": 1, "dilation": 1}))
    x = torch.randn(2, 6, BINS)
    assert torch.allclose(network.x_factors(x), SIZES.input_scale * x @ network.filters_x.T, atol=1e-4)
