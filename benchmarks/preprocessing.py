"""Preprocessing beside the original's way: load, transform and pickle with bz2, one file after the other.

    python benchmarks/preprocessing.py [--hours 3]

Both ways read the same 22,050 Hz wav files in one run; what counts is the ratio.
"""

import argparse
import bz2
import pickle
import tempfile
import time
from pathlib import Path

import librosa
import numpy as np
from material import write_music

from gae import params
from gae.index import index
from gae.preprocess import preprocess


def original(paths, cache):
    """As the original does it: librosa.load, CQT, contrast normalisation, blocks of 1,024 frames, a bz2 pickle."""
    blocks = []
    for path in paths:
        samples, rate = librosa.load(path)
        cqt = np.abs(librosa.cqt(samples, sr=rate, n_bins=120, bins_per_octave=24, fmin=65.4, hop_length=448)).T
        cqt = cqt - cqt.mean(axis=1, keepdims=True)
        cqt = cqt / np.maximum(np.sqrt((cqt**2).sum(axis=1, keepdims=True)), 1e-8)
        x, y = np.concatenate((cqt[:5], cqt)), np.concatenate((cqt, cqt[-5:]))
        blocks += [[x[i : i + 1024], y[i : i + 1024]] for i in range(0, len(cqt) - 1023, 1024)]
    with bz2.BZ2File(cache, "w") as file:
        pickle.dump(blocks, file)


def ours(paths, folder):
    """The stages index and preprocess, all included; the original prepares no frames to convert, so one track must do here."""
    listing, convert = folder / "train.txt", folder / "convert.txt"
    listing.write_text("\n".join(map(str, paths)) + "\n")
    convert.write_text(f"{paths[0]}\n")
    values = params.validate(
        {
            "data": {"shifted_views": 0, "train_list": str(listing), "convert_list": str(convert)},
            "compute": {"staging": str(folder / "staging")},
        }
    )
    began = time.perf_counter()
    index(values, folder / "index.json", folder / "memory.json")
    print(f"index     {time.perf_counter() - began:7.1f} s of ours")
    preprocess(values, folder / "index.json", folder / "shards")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hours", type=float, default=3.0)
    hours = parser.parse_args().hours
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        music = write_music(folder / "music", count=max(2, round(hours * 20)), seconds=180, sample_rate=22050, suffix="wav")
        seconds = {}
        for name, run in {"ours": lambda: ours(music, folder), "original": lambda: original(music, folder / "cache.bz2")}.items():
            began = time.perf_counter()
            run()
            seconds[name] = time.perf_counter() - began
            print(f"{name:9} {seconds[name]:7.1f} s for {len(music) * 180 / 3600:.2f} h")
        print(f"ratio     {seconds['original'] / seconds['ours']:7.1f}")
