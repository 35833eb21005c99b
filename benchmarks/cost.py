"""What an archive costs, on paper: core-hours and storage from what one core does with some minutes of FLAC here.

    python benchmarks/cost.py [--minutes 30] [--weights FILE_OR_NAME]

Prints the measured rates and the table of docs/scale.md.
"""

import argparse
import math
import tempfile
import time
from pathlib import Path

from material import write_music

from gae import audio, params
from gae.compute import keep_memory
from gae.convert import convert_track
from gae.index import examine
from gae.modelfile import SHIPPED, load_model
from gae.preprocess import compute_track, shifted_views

ARCHIVES = {  # tracks, minutes each
    "1,000 hours": (15_000, 4.0),
    "archive of 100,000 tracks": (100_000, 4.0),
    "catalogue of 100 million tracks": (100_000_000, 3.5),
}
LIST = 100_000  # tracks of the longest list
SHIFTED = "a shifted view"  # which a track gets that is trained on
POOL = 4  # frames averaged into one, where features are kept pooled
ENTRY = 300  # bytes of a track in data/index.json, about
TRACK = 180  # s, the tracks that are measured


def measure(minutes, folder, weights=SHIPPED[0]):
    """Seconds of one core that each stage takes for an hour of music, and bytes that it leaves, by stage."""
    data, convert = params.Data(), params.Convert()
    music = write_music(folder / "music", max(2, round(60 * minutes / TRACK)), TRACK, 44100, "flac", 2)
    hours = len(music) * TRACK / 3600
    model, found = load_model(weights), []
    seconds = {"index": 0.0, "preprocess": 0.0, SHIFTED: 0.0, "convert": 0.0}
    for path in music:
        seconds["index"] += timed(lambda path=path: found.append(examine(str(path))))
        key = found[-1]["sha256"][:32]
        file = {"path": str(path), "key": key, "sha256": found[-1]["sha256"], "seconds": float(TRACK)}
        seconds["preprocess"] += timed(lambda file=file: compute_track(file, model.cqt, data.dtype, folder / "frames"))
        (moved,) = shifted_views([file], 1)
        seconds[SHIFTED] += timed(lambda moved=moved: compute_track(moved, model.cqt, data.dtype, folder / "shifted"))
        job = {"source": str(path), "sha256": file["sha256"], "file": f"{key}.h5"}
        job |= {"key": key, "shard": str(folder / f"frames/{key}.h5"), "n_frames": 0, "made_by": ""}
        seconds["convert"] += timed(lambda job=job: convert_track(job, weights, model.sha256, str(folder / "features"), convert.dtype))
    sizes = {name: sum(file.stat().st_size for file in (folder / name).glob("*")) / hours for name in ("music", "frames", "features")}
    return {stage: taken / hours for stage, taken in seconds.items()}, sizes


def timed(work):
    """Seconds that a core works on something."""
    began = time.process_time()
    work()
    return time.process_time() - began


def warm_up():
    """Load what the first track would load: over an archive that is nothing."""
    audio.resample(audio.mono([0.0] * 44100), 44100, 22050)
    with tempfile.TemporaryDirectory() as folder:
        measure(1, Path(folder))


def shards(tracks, size):
    """Files that frames of so many bytes lie in, of lists no longer than `LIST`: each list in a power of two of at most `data.shard_mb`."""
    lists = math.ceil(tracks / LIST)
    return lists * 2 ** max(0, math.ceil(math.log2(size / lists / (params.Data().shard_mb << 20))))


def table(seconds, sizes):
    """The archives as a Markdown table: core-hours and GB."""
    columns = {
        "hours of music": lambda tracks, hours: hours,
        **{
            f"{stage}, core-hours": lambda tracks, hours, taken=taken: hours * taken / 3600
            for stage, taken in seconds.items()
            if stage != SHIFTED
        },
        "frames, float16, GB": lambda tracks, hours: hours * sizes["frames"] / 1e9,
        "shards": lambda tracks, hours: shards(tracks, hours * sizes["frames"]),
        "features, float32, GB": lambda tracks, hours: hours * sizes["features"] / 1e9,
        "features, float16, GB": lambda tracks, hours: hours * sizes["features"] / 2e9,
        f"the same, means of {POOL} frames (`gae.measures.pool`), GB": lambda tracks, hours: hours * sizes["features"] / 2e9 / POOL,
        "data/index.json, MB": lambda tracks, hours: tracks * ENTRY / 1e6,
    }
    lines = ["| | " + " | ".join(ARCHIVES) + " |", "|" + " --- |" * (len(ARCHIVES) + 1)]
    for name, cost in columns.items():
        cells = [cost(tracks, tracks * minutes / 60) for tracks, minutes in ARCHIVES.values()]
        lines.append(f"| {name} | " + " | ".join(f"{cell:,.0f}" if cell >= 10 else f"{cell:.1f}" for cell in cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--weights", default=SHIPPED[0], help="a model file, or the name of shipped weights (default: %(default)s)")
    given = parser.parse_args()
    keep_memory()
    warm_up()
    with tempfile.TemporaryDirectory() as folder:
        seconds, sizes = measure(given.minutes, Path(folder), given.weights)
    for stage, taken in seconds.items():
        print(f"{stage:14} {taken:6.2f} s of a core for an hour of 44.1 kHz stereo FLAC, {3600 / taken:6.0f} times real time")
    for name, size in sizes.items():
        print(f"{name:14} {size / 1e6:6.1f} MB an hour")
    print(table(seconds, sizes))
