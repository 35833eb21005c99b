"""Muon in single precision: an optimiser whose steps are equally long in all directions of a weight matrix.

PyTorch's own rounds to bfloat16, which is quicker where the processor has products for it, and takes hundreds of times as long
elsewhere. This one keeps the precision of the weights, and makes up for it by working on the square of the shorter side.
"""

import math
from contextlib import contextmanager

import torch

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the polynomial: the steepest at 0 that takes (0, 1] to about 1
_STEPS = 5


class Muon(torch.optim.Optimizer):
    """Momentum, its singular values all brought near 1.

    Parameters
    ----------
    matrices : iterable of Parameter
        Each of two dimensions, (n, m). A step moves it by about lr * sqrt(max(1, n / m)) in every direction.
    lr : float
    momentum : float
        Nesterov's.

    References
    ----------
    K. Jordan et al.: Muon, an optimizer for hidden layers in neural networks, 2024.
    """

    def __init__(self, matrices, lr, momentum=0.95):
        super().__init__(matrices, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        """Move every matrix that has a gradient."""
        with _full_precision():
            for group in self.param_groups:
                for matrix in group["params"]:
                    if matrix.grad is not None:
                        self._move(matrix, group["lr"], group["momentum"])

    def _move(self, matrix, lr, momentum):
        state = self.state[matrix]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(matrix)
        mean = state["momentum_buffer"].lerp_(matrix.grad, 1 - momentum)
        direction = orthogonal(matrix.grad.lerp(mean, momentum))
        matrix.add_(direction, alpha=-lr * math.sqrt(max(1, matrix.shape[0] / matrix.shape[1])))


def orthogonal(matrix):
    """A matrix with the same singular vectors, and singular values near 1 (0.7 to 1.2) instead of its own, but for the smallest.

        X <- (a + b X X^T + c (X X^T)^2) X, five times

    All of these are polynomials in one symmetric matrix, X X^T of the start, and commute: only it and the product of the
    polynomials are kept, and X is multiplied once, at the end.

    Parameters
    ----------
    matrix : Tensor, shape (n, m)
        Float32 at least: what is lost in X X^T would grow from step to step.

    Returns
    -------
    Tensor, shape (n, m)
    """
    if matrix.shape[0] > matrix.shape[1]:
        return orthogonal(matrix.mT).mT
    a, b, c = _COEFFICIENTS
    matrix = matrix / matrix.norm().clamp_min(1e-7)
    square, product = matrix @ matrix.mT, None
    for step in range(_STEPS):
        factor = torch.addmm(square, square, square, beta=b, alpha=c)
        factor.diagonal().add_(a)
        product = factor if product is None else factor @ product
        if step < _STEPS - 1:
            square = factor @ square @ factor
    return product @ matrix


@contextmanager
def _full_precision():
    """Single precision as it is, and no tensor core's."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
