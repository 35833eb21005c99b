"""What a list costs as it grows: time, memory, files, and the work of one more track, under DVC as a user runs it.

    python benchmarks/scale.py [--tracks 100 1000 10000] [--workers 1] [--folder /somewhere/large] [--plot docs/scale.png]

In a clone of this checkout's last commit, with its own parameters and the shipped weights, all tracks are on both lists; they are tones of
2 s, all different. `dvc repro convert` runs three times: on the whole list, with nothing changed, and with one track more. What DVC itself
does between the stages is in rows of its own. Memory is the resident set, sampled; of all processes together it counts shared pages more
than once. Prints a table for each length of the list and draws them all.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import suppress
from pathlib import Path

import psutil
import soundfile
import yaml
from material import tones
from matplotlib.figure import Figure

RATE = 22050  # Hz
SECONDS = 2  # a track
INTERVAL = 0.05  # s between samples of the processes
MB = 1e6
SHARDS, FEATURES = ("data/shards/train", "data/shards/convert"), "features"
COLOURS = {"index": "#31688e", "preprocess": "#b5123e", "convert": "#d98c3f", "DVC": "#6f6f6f"}


def main(lengths, workers, folder, plot):
    """All lengths in turn, printed as they come and drawn at the end."""
    runs = {}
    for n in lengths:
        with tempfile.TemporaryDirectory(dir=folder) as place:
            runs[n] = measure(Path(place), n, workers)
        report(n, workers, *runs[n])
    draw({n: timings for n, (timings, _) in runs.items()}, plot)


def measure(place, n, workers):
    """The three runs on a list of n tracks: their phases, and facts of the files that they leave."""
    project = prepare(place / "gae", workers)
    timings, facts = {}, {}
    record(project, place / "music", range(n))
    timings["whole list"] = watched_repro(project)
    facts |= {name: sizes(project, name) for name in (*SHARDS, FEATURES)}
    timings["nothing new"] = watched_repro(project)
    before = {name: stamps(project, name) for name in (*SHARDS, FEATURES)}
    record(project, place / "music", [n])
    timings["one more track"] = watched_repro(project)
    facts["written"] = {name: stamps(project, name).items() - before[name].items() for name in before}
    return timings, facts


def prepare(project, workers):
    """A project without music: an empty demo corpus that DVC takes for done, and no training."""
    subprocess.run(["git", "clone", "--quiet", ".", project], check=True)
    values = yaml.safe_load((project / "params.yaml").read_text())
    values["convert"]["weights"] = "models/pretrained.safetensors"
    values["data"]["shifted_views"] = 0
    values["compute"]["workers"] = workers
    (project / "params.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    for name in ("train", "convert"):
        (project / f"data/{name}.txt").write_text("")
    (project / "data/corpus").mkdir()
    (project / "data/corpus/empty").touch()
    subprocess.run(["dvc", "commit", "--quiet", "--force", "corpus"], cwd=project, env=environment(project), check=True)
    return project


def environment(project):
    """Programs of this interpreter, and DVC's notes beside the project."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return os.environ | {"PATH": path, "OMP_NUM_THREADS": "1", "DVC_NO_ANALYTICS": "1", "DVC_SITE_CACHE_DIR": str(project.parent / "dvc")}


def record(project, music, numbers):
    """Write the tracks of these numbers and put them on both lists."""
    music.mkdir(exist_ok=True)
    paths = [music / f"{number:06d}.wav" for number in numbers]
    for number, path in zip(numbers, paths, strict=True):
        soundfile.write(path, tones(SECONDS, RATE, number), RATE)
    for name in ("train", "convert"):
        with open(project / f"data/{name}.txt", "a") as listing:
            listing.writelines(f"{path}\n" for path in paths)


def watched_repro(project):
    """Phases of one `dvc repro convert`, in order: seconds, and peaks of the largest process and of all together, in bytes."""
    phases = defaultdict(lambda: [0.0, 0, 0])
    with open(project.parent / "log", "w+") as log:
        running = psutil.Popen(["dvc", "repro", "convert"], cwd=project, env=environment(project), stdout=log, stderr=subprocess.STDOUT)
        last, now = None, time.perf_counter()
        while running.poll() is None:
            stage, resident = look(running)
            last = stage or last
            phase = phases[stage or (f"DVC after {last}" if last else "DVC at first")]
            phase[1:] = max(phase[1], *resident), max(phase[2], sum(resident))
            time.sleep(INTERVAL)
            began, now = now, time.perf_counter()
            phase[0] += now - began
        if running.returncode:
            log.seek(0)
            sys.exit(log.read()[-2000:])
    return dict(phases)


def look(running):
    """The stage that runs, if any, and the resident sets of all processes."""
    stage, resident = None, [0]
    with suppress(psutil.NoSuchProcess):
        for process in [running, *running.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                resident.append(process.memory_info().rss)
                found = re.search(r"stages/(\w+)\.py", " ".join(process.cmdline()))
                stage = stage or (found and found[1])
    return stage, resident


def sizes(project, name):
    """Size of each data file of a folder, in bytes."""
    return [file.stat().st_size for file in (project / name).glob("*.h5")]


def stamps(project, name):
    """When each file of a folder was written, and which file it is."""
    return {file.name: (file.stat().st_mtime_ns, file.stat().st_ino) for file in (project / name).glob("*.h5")}


def report(n, workers, timings, facts):
    """Print one length's table."""
    print(f"\n{n} tracks of {SECONDS} s, {workers or len(os.sched_getaffinity(0))} worker processes")
    for run, phases in timings.items():
        print(f"{run:26} {'s':>12} {'ms a track':>12} {'largest process, MB':>21} {'all, MB':>9}")
        for phase, (seconds, largest, together) in phases.items():
            print(f"  {phase:24} {seconds:12.1f} {1000 * seconds / n:12.2f} {largest / MB:21.0f} {together / MB:9.0f}")
        for name, seconds in {"DVC in all": by_kind(phases)["DVC"], "total": total(phases)}.items():
            print(f"  {name:24} {seconds:12.1f} {1000 * seconds / n:12.2f}")
    for name, written in facts["written"].items():
        print(f"{name}: {len(facts[name])} files, {sum(facts[name]) / MB:.1f} MB; written for one more track: {len(written)}")
    print(end="", flush=True)


def total(phases):
    """Seconds of a run."""
    return sum(seconds for seconds, *_ in phases.values())


def by_kind(phases):
    """Seconds of each stage, and of DVC in all."""
    seconds = dict.fromkeys(COLOURS, 0.0)
    for phase, (spent, *_) in phases.items():
        seconds[phase if phase in COLOURS else "DVC"] += spent
    return seconds


def draw(timings, file):
    """Time against the length of the list, both logarithmic, with what would be linear."""
    lengths = sorted(timings)
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for kind, colour in COLOURS.items():
        axes.loglog(lengths, [by_kind(timings[n]["whole list"])[kind] for n in lengths], "o-", color=colour, label=f"whole list: {kind}")
    for run, style in {"nothing new": "s:", "one more track": "^--"}.items():
        axes.loglog(lengths, [total(timings[n][run]) for n in lengths], style, color="black", label=f"{run}: total")
    slowest = by_kind(timings[lengths[-1]]["whole list"])["preprocess"]
    axes.loglog(lengths, [slowest * n / lengths[-1] for n in lengths], color="#c4c4c4", zorder=0, label="linear")
    axes.set(xlabel=f"tracks of {SECONDS} s on the list", ylabel="s")
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=110)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tracks", type=int, nargs="+", default=[100, 1000, 10000], help="lengths of the list")
    parser.add_argument("--workers", type=int, default=1, help="compute.workers; 0 is one a core")
    parser.add_argument("--folder", help="where temporary files go, about 0.7 MB a track")
    parser.add_argument("--plot", default="docs/scale.png", help="picture to draw (default: %(default)s)")
    given = parser.parse_args()
    main(given.tracks, given.workers, given.folder, given.plot)
