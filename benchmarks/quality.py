"""How long training takes, from nothing, to be better than the weights that the original implementation publishes.

    python benchmarks/quality.py [--steps 400 1600] [--corpus data/corpus] [--shards data/shards/train]

For each number of steps: seconds from the start of stages/train.py to its end, and how the weights then do on the held-out pieces of
the built-in corpus, beside the published ones if they are there (benchmarks/published.py); and the most memory that training
took. Run it after `dvc repro preprocess`.
"""

import argparse
import sys
import tempfile
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import psutil
from published import SHARED, alignment, corpus_pairs, corpus_performances, features_at, invariance, shown

import gae
from gae.original import from_arrays


def command(folder, shards, changes):
    """What trains from nothing, with changes (KEY=VALUE) of params.yaml, and leaves model.safetensors and metrics.json in a folder."""
    places = {"shards": shards, "model": f"{folder}/model.safetensors", "metrics": f"{folder}/metrics.json"}
    places |= {name: f"{folder}/{name}" for name in ("curves", "drawings", "checkpoints")}
    options = [str(word) for name, place in places.items() for word in (f"--{name}", place)]
    return [sys.executable, "stages/train.py", *options, *(word for change in changes for word in ("-S", change))]


def train(steps, shards, folder):
    """Train from nothing by the defaults, in a new folder: (seconds, most memory in bytes, model)."""
    folder.mkdir()
    began, memory = time.perf_counter(), 0
    running = psutil.Popen(command(folder, shards, [f"train.steps={steps}"]))
    while running.poll() is None:
        with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            memory = max(memory, running.memory_info().rss)
        time.sleep(0.1)
    if running.returncode:
        sys.exit(running.returncode)
    return time.perf_counter() - began, memory, gae.load_model(folder / "model.safetensors")


def judge(model, corpus):
    """Top-1 for one frame and for eight, and beats of the transposed score within each tolerance, as text."""
    represent = partial(features_at, model)
    top1 = invariance(corpus_pairs(corpus), represent)
    beats = alignment(corpus_performances(corpus), represent, model.cqt.frame_seconds, "transposed")
    return f"top-1 {shown(top1)}, beats {shown(beats)}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, nargs="+", default=[400, 1600])
    parser.add_argument("--corpus", default="data/corpus")
    parser.add_argument("--shards", default="data/shards/train")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        trained = {steps: train(steps, given.shards, Path(folder, str(steps))) for steps in given.steps}
    if (SHARED / "cgae_pretrained.npz").exists():
        print(f"published weights         {judge(from_arrays(**np.load(SHARED / 'cgae_pretrained.npz')), given.corpus)}", flush=True)
    for steps, (seconds, memory, model) in trained.items():
        print(f"{steps:5} steps in {seconds:6.1f} s, {memory / 1e9:.2f} GB  {judge(model, given.corpus)}", flush=True)
