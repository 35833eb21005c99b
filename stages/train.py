"""A gated autoencoder trained on the frames of the training list; goes on from the last checkpoint if it was stopped."""

import checkout  # noqa: F401, I001
from gae.commandline import stage
from gae.train import train

if __name__ == "__main__":
    with stage(
        __doc__,
        reads=["model", "train", "plot.interval", "compute.checkpoint_seconds"],
        shards="data/shards/train",
        model="models/gae.safetensors",
        metrics="models/metrics.json",
        curves="plots/training",
        drawings="plots/network",
        checkpoints="models/.checkpoints",
    ) as (params, paths):
        train(params, **vars(paths))
