import numpy as np
import pytest
import torch

from gae.muon import Muon, orthogonal


def matrix(rows, columns, rank, seed=0):
    """Of singular values from 1 down to 0.01."""
    rng = np.random.default_rng(seed)
    left, right = (np.linalg.qr(rng.standard_normal((n, rank)))[0] for n in (rows, columns))
    return torch.from_numpy(left * np.geomspace(1, 1e-2, rank) @ right.T).float()


def newton_schulz(matrix):
    """As K. Jordan writes it, in double precision."""
    x = matrix.double() / matrix.double().norm()
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x


@pytest.mark.parametrize("shape", [(16, 120), (30, 30), (90, 12)])
def test_directions_follow_the_formula(shape):
    given = matrix(*shape, rank=min(shape))
    assert torch.allclose(orthogonal(given).double(), newton_schulz(given), atol=1e-4)


def test_directions_are_equally_long():
    lengths = torch.linalg.svdvals(orthogonal(matrix(16, 120, 16)))
    assert lengths.min() > 0.6 and lengths.max() < 1.3


def moved(optimiser, weights):
    """The weights after five steps."""
    for seed in range(5):
        for number, weight in enumerate(weights):
            weight.grad = matrix(*weight.shape, rank=min(weight.shape), seed=10 * seed + number)
        optimiser.step()
    return weights


@pytest.mark.parametrize("shape", [(16, 120), (90, 12)])
def test_it_is_pytorchs_but_for_what_that_rounds(shape):
    start = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    moved(Muon([ours], lr=0.02), [ours])
    moved(torch.optim.Muon([theirs], lr=0.02, weight_decay=0.0), [theirs])
    assert (ours - start).norm() > 0.1
    assert (ours - theirs).norm() < 0.03 * (ours - start).norm()


def test_what_has_no_gradient_stays_and_silence_moves_nothing():
    idle, silent = torch.nn.Parameter(torch.ones(3, 4)), torch.nn.Parameter(torch.ones(3, 4))
    silent.grad = torch.zeros(3, 4)
    Muon([idle, silent], lr=0.1).step()
    assert torch.equal(idle, torch.ones(3, 4)) and torch.equal(silent, torch.ones(3, 4))


def test_a_step_is_in_full_precision_and_leaves_the_setting(monkeypatch):
    seen = []
    monkeypatch.setattr("gae.muon.orthogonal", lambda given: seen.append(torch.get_float32_matmul_precision()) or given)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    weight = torch.nn.Parameter(torch.ones(3, 4))
    moved(Muon([weight], lr=0.1), [weight])
    after = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(before)
    assert set(seen) == {"highest"} and after == "high"
