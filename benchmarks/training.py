"""Training speed beside the original's way, and the share of this machine's matrix rate that a step reaches.

    python benchmarks/training.py [--steps 30]

The original's step: a Conv2d as high as the frame, single precision, dropout, mse, Adam, on batches of the same frames.
Both are run in turn, step by step, so that both see the same noise of the machine.
"""

import argparse
import time

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import nn
from torch.nn import functional as F

from gae import params
from gae.model import GatedAutoencoder
from gae.train import Objective


class Original(nn.Module):
    """The published architecture as published: Conv2d over (frames, bins)."""

    def __init__(self, n_bins=120, context=9, factors=256, hidden=128, maps=64):
        super().__init__()
        self.conv_x = nn.Conv2d(1, factors, (context, n_bins), bias=False)
        self.conv_y = nn.Conv2d(1, factors, (1, n_bins), bias=False)
        self.conv_m1 = nn.Conv2d(factors, hidden, 1)
        self.conv_m2 = nn.Conv2d(hidden, maps, 1)

    def loss(self, x, y, shift):
        """Mean squared error of the transposed y rebuilt from the mapping of (x, y)."""
        x = F.dropout(x, 0.5)
        x_moved, y_moved = (torch.roll(frames, shift, 3) for frames in (x, y))
        m = torch.tanh(self.conv_m2(torch.tanh(self.conv_m1(self.conv_x(x) * self.conv_y(y)))))
        up = F.conv_transpose2d(m, self.conv_m2.weight, bias=self.conv_m1.bias)
        up = F.conv_transpose2d(up, self.conv_m1.weight)
        rebuilt = F.conv_transpose2d(up * self.conv_x(x_moved), self.conv_y.weight)
        return F.mse_loss(rebuilt, y_moved) + 1e-5 * m.square().mean((0, 2, 3)).sum()

    @torch.no_grad()
    def set_filter_norm(self, norm):
        """Scale the filters."""
        for weight in (self.conv_x.weight, self.conv_y.weight):
            weight.mul_(norm / weight.flatten(1).norm(dim=1).view(-1, 1, 1, 1))


def stepper(module, loss):
    """A function that does one step of the optimiser and returns its seconds."""
    optimiser = torch.optim.Adam(module.parameters(), lr=1e-3)

    def step():
        began = time.perf_counter()
        optimiser.zero_grad()
        loss().backward()
        optimiser.step()
        module.set_filter_norm(0.4)
        return time.perf_counter() - began

    return step


def ours(values, frames, objective):
    """One step of our training on `frames`, by the objective named, in bf16."""
    settings = values.train.model_copy(update={"objective": objective})
    model = GatedAutoencoder(values.cqt.n_bins, values.model)
    module = Fabric(accelerator="cpu", precision="bf16-mixed").setup_module(Objective(model, settings))
    x, y = frames[:, :-1], frames[:, values.model.context :]
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)

    def step():
        began = time.perf_counter()
        terms = module(x, y, x, y)
        optimiser.zero_grad()
        terms["loss"].backward()
        optimiser.step()
        model.set_filter_norm(0.4)
        return time.perf_counter() - began

    return step


def matmul_seconds(size=2048):
    """Seconds of one bf16 product of two square matrices: the machine's rate."""
    a = torch.randn(size, size).bfloat16()
    began = time.perf_counter()
    a @ a
    return time.perf_counter() - began


def operations(values, two_sided):
    """Multiplications and additions of the matrix products in a step's forward and backward pass.

    The first layers need no gradient of their inputs, so they count twice, all others three times.
    """
    sizes, bins = values.model, values.cqt.n_bins
    frames = values.train.batch * values.train.block
    filters_x, filters_y = sizes.context * bins * sizes.n_factors, bins * sizes.n_factors
    layers = sizes.n_factors * sizes.n_hidden + sizes.n_hidden * sizes.n_maps
    sides = 2 if two_sided else 1
    total = 2 * 2 * filters_x + sides * (2 * filters_y + 3 * layers) + sides * 3 * (layers + filters_y)
    return 2 * frames * total


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    count = parser.parse_args().steps
    values = params.Params()
    train, context = values.train, values.model.context
    frames = F.normalize(torch.randn(train.batch, train.block + context, values.cqt.n_bins), dim=-1)
    n_frames = train.batch * train.block
    images = frames[:, None]
    published = Original(values.cqt.n_bins, context)
    steps = {
        "original, Conv2d, fp32": stepper(published, lambda: published.loss(images[:, :, :-1], images[:, :, context:], 7)),
        "ours, the original's loss": ours(values, frames, "reconstruction"),
        "ours, the default loss": ours(values, frames, "invariance"),
        "bf16 matrix product": matmul_seconds,
    }
    taken = {name: [] for name in steps}
    for number in range(count + 3):
        for name, step in steps.items():
            seconds = step()
            if number >= 3:
                taken[name].append(seconds)
    median = {name: float(np.median(seconds)) for name, seconds in taken.items()}
    peak = 2 * 2048**3 / median["bf16 matrix product"]
    print(f"{torch.get_num_threads()} threads, batches of {n_frames} frames; bf16 matrix rate {peak / 1e9:.0f} GFLOP/s")
    for name in list(steps)[:3]:
        rate = n_frames / median[name]
        print(f"{name:27} {rate:9.0f} frames/s  {rate * median['original, Conv2d, fp32'] / n_frames:5.2f} x the original", end="")
        two_sided = name.endswith("default loss")
        print(f"  {operations(values, two_sided) / median[name] / peak:5.0%} of the matrix rate" if name.startswith("ours") else "")
