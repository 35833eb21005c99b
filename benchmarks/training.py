"""Training speed beside the original's way, and the share of this machine's matrix rate that a step reaches.

The rate is that of the arithmetic in which the step runs here: bf16 where the processor multiplies it, single precision elsewhere.

    python benchmarks/training.py [--steps 30] [-S KEY=VALUE ...] [--shards data/shards/train]

Run it from the root; `-S` changes the default step of params.yaml: train.batch=128, say, or train.compile=true. If the shards are
there, after `dvc repro preprocess`, a training of 2,000 steps by stages/train.py tells what is left of that speed where batches are made
beside the steps, and all else is done that a training does.

The original's step: a Conv2d as high as the frame, single precision, dropout, mse, Adam, on batches of the same frames.
Both are run in turn, step by step, so that both see the same noise of the machine.
"""

import argparse
import json
import subprocess
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from lightning_fabric import Fabric
from quality import command
from torch import nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from gae import params
from gae.compute import keep_memory
from gae.model import GatedAutoencoder
from gae.processes import PRECISIONS, settled
from gae.train import Objective, optimisers_of


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


def ours(values, frames):
    """One step of our training by the objective, optimiser and stride of the parameters."""
    settings, reach = settled(values.train), values.model.lags[0]
    model = GatedAutoencoder(values.cqt.n_bins, values.model)
    optimisers = optimisers_of(model, settings)
    fabric = Fabric(accelerator="cpu", precision=PRECISIONS[settings.precision])
    objective = Objective(model, settings)
    module, *optimisers = fabric.setup(torch.compile(objective) if settings.compile else objective, *optimisers)
    sides = torch.stack([frames, frames])
    one_view = torch.arange(settings.batch) % 2 == 0
    batch = sides, sides[:, :, reach :: settings.stride], contexts(values), one_view, settings.contrast

    def step():
        began = time.perf_counter()
        fabric.backward(module(*batch)["loss"])
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        model.set_filter_norm(0.4)
        return time.perf_counter() - began

    return step


def contexts(values):
    """The contexts of both sides of a batch, as in `gae.batches.Batch`."""
    train, reach = values.train, values.model.lags[0]
    starts = torch.arange(2 * train.batch).view(2, -1, 1, 1) * (train.block + reach)
    return starts + torch.arange(0, train.block, train.stride)[:, None] + reach - torch.tensor(values.model.lags)


def matmul_seconds(dtype, size=2048):
    """Seconds of one product of two square matrices: the machine's rate."""
    a = torch.randn(size, size).to(dtype)
    began = time.perf_counter()
    a @ a
    return time.perf_counter() - began


def operations(step):
    """Multiplications and additions of all matrix products that a step runs: the model's, the contrast's, the optimiser's."""
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def products_share(step, count=10):
    """The share of a step's time that its matrix products take."""
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        for _ in range(count):
            step()
    seconds = {event.key: event.self_cpu_time_total for event in seen.key_averages()}
    return sum(seconds.get(f"aten::{name}", 0) for name in ("mm", "addmm", "bmm")) / sum(seconds.values())


def measure(steps, count):
    """Median seconds of each step, taken in turn."""
    taken = {name: [] for name in steps}
    for number in range(count + 3):
        for name, step in steps.items():
            seconds = step()
            if number >= 3:
                taken[name].append(seconds)
    return {name: float(np.median(seconds)) for name, seconds in taken.items()}


def trained(shards, changes, steps=2000):
    """Frames a second of a training by stages/train.py, one drawing of the network and the first steps, which are slow, among them."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(command(folder, shards, [f"train.steps={steps}", *changes]), check=True)
        return json.loads(Path(folder, "metrics.json").read_text())["frames_per_second"]


def unit_frames(values):
    """Random frames of unit norm for one side of a batch."""
    train = values.train
    return F.normalize(torch.randn(train.batch, train.block + values.model.lags[0], values.cqt.n_bins), dim=-1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("-S", dest="changes", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--shards", type=Path, default=Path("data/shards/train"))
    given = parser.parse_args()
    keep_memory()
    default = params.load(overrides=given.changes)
    precision = settled(default.train).precision
    product = f"{precision} matrix product"
    same = params.validate(
        {
            "cqt": {"fmin": 65.4, "n_bins": 120},
            "model": {"context": 9, "growth": 0},
            "train": {"objective": "reconstruction", "optimiser": "adam", "batch": 16, "block": 256, "stride": 1, "sparsity": 1e-5},
        }
    )
    frames, images = unit_frames(same), unit_frames(same)[:, None]
    published = Original()
    steps = {
        "the original's step, Conv2d, fp32": stepper(published, lambda: published.loss(images[:, :, :-1], images[:, :, 9:], 7)),
        "the same step, ours": ours(same, frames),
        "the default step": ours(default, unit_frames(default)),
        product: partial(matmul_seconds, torch.bfloat16 if precision == "bf16" else torch.float32),
    }
    seconds = measure(steps, given.steps)
    peak = 2 * 2048**3 / seconds[product]
    rates = {name: 4096 / seconds[name] for name in list(steps)[:2]}
    rates["the default step"] = default.train.batch * -(-default.train.block // default.train.stride) / seconds["the default step"]
    print(f"{torch.get_num_threads()} threads; {precision} matrix products run at {peak / 1e9:.0f} GFLOP/s")
    large = {
        name: min(matmul_seconds(dtype, 1024) for _ in range(2)) for name, dtype in {"bf16": torch.bfloat16, "fp32": torch.float32}.items()
    }
    print(f"a product of 1024 by 1024 takes {large['bf16'] / large['fp32']:.1f} times as long in bf16 as in fp32")
    for name, rate in rates.items():
        print(f"{name:34} {rate:8.0f} frames/s")
    print(f"ours / the original's: {rates['the same step, ours'] / rates[next(iter(steps))]:.2f}")
    step = steps["the default step"]
    plain = default.model_copy(update={"train": default.train.model_copy(update={"compile": False})})  # its products can be counted
    rate, share = operations(ours(plain, unit_frames(plain))) / seconds["the default step"] / peak, products_share(step)
    print(f"the default step's share of the matrix rate: {rate:.0%}")
    print(f"its products take {share:.0%} of its time; if they took all of it, the share would be about {rate / share:.0%}")
    if given.shards.exists():
        rate = trained(given.shards, given.changes)
        print(f"in a training {rate} frames/s, {rate / rates['the default step']:.0%} of the step's")
