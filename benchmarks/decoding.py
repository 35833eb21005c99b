"""Preprocessing and conversion of a list beside the bare cost: decoding and librosa's CQT in as many processes.

    python benchmarks/decoding.py [--minutes 60]

For 22 kHz wav and 44.1 kHz stereo FLAC, Ogg and MP3. Ours are the stages index, preprocess and convert,
the latter with the shipped weights.
"""

import argparse
import multiprocessing
import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import librosa
import numpy as np
import soundfile
from material import write_music

from gae import params
from gae.convert import convert_list
from gae.index import index
from gae.preprocess import preprocess

# none that brings PyTorch along: processes import what this file imports
WEIGHTS = Path(__file__).resolve().parents[1] / "models/pretrained.safetensors"
FORMATS = {"wav": (22050, 1), "flac": (44100, 2), "ogg": (44100, 2), "mp3": (44100, 2)}


def bare(path):
    """Decode, mix down, resample and transform one file; throw the result away."""
    samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    samples = samples.mean(axis=1)
    if rate != 22050:
        samples = librosa.resample(samples, orig_sr=rate, target_sr=22050, res_type="soxr_hq")
    return np.abs(librosa.cqt(samples, sr=22050, n_bins=120, bins_per_octave=24, fmin=65.4, hop_length=448)).sum()


def ours(paths, folder):
    """Seconds of the stages index, preprocess and convert."""
    listing = folder / "list.txt"
    listing.write_text("\n".join(map(str, paths)) + "\n")
    data, compute = {"shifted_views": 0, "train_list": str(listing), "convert_list": str(listing)}, {"staging": str(folder / "staging")}
    values = params.validate({"data": data, "convert": {"weights": str(WEIGHTS)}, "compute": compute})
    times = [time.perf_counter()]
    index(values, folder / "index.json", folder / "memory.json")
    times.append(time.perf_counter())
    preprocess(values, folder / "index.json", folder / "shards")
    times.append(time.perf_counter())
    convert_list(values, folder / "shards/convert", folder / "index.json", folder / "features")
    times.append(time.perf_counter())
    return np.diff(times)


def bare_seconds(paths):
    """Seconds of `bare` over all files, in one process a core."""
    began = time.perf_counter()
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), multiprocessing.get_context("spawn")) as pool:
        list(pool.map(bare, paths))
    return time.perf_counter() - began


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0)
    minutes = parser.parse_args().minutes
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        print(f"{minutes:g} minutes each; s        bare   index  preprocess  convert   (preprocess + convert) / bare   all / bare")
        for suffix, (rate, channels) in FORMATS.items():
            place = folder / suffix
            music = write_music(place / "music", round(minutes / 3), 180, rate, suffix, channels)
            base = bare_seconds(music)
            indexing, preprocessing, converting = ours(music, place)
            print(
                f"{suffix:5} {rate} Hz x {channels}           {base:6.1f} {indexing:7.1f} {preprocessing:11.1f} {converting:8.1f}"
                f"   {(preprocessing + converting) / base:29.2f} {(indexing + preprocessing + converting) / base:12.2f}"
            )
