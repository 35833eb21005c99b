"""What `dvc push` and `dvc pull` move: weights alone, features alone, everything; files and MB.

    python benchmarks/remotes.py

The left half is what dvc.lock records, and needs no data. The right half is counted: a clone of this checkout pushes from
DVC's cache to an empty folder and another clone pulls from it, so the cache must hold a finished run (`make repro`).
"""

import argparse
import subprocess
import tempfile
import time
from pathlib import Path

import yaml

NAMED = {"weights": ["models/gae.safetensors"], "features": ["features"], "everything": []}
MB = 1e6


def recorded(named):
    """Files and bytes of the outputs that are named, or of all that DVC keeps, by dvc.lock."""
    stages = yaml.safe_load(Path("dvc.yaml").read_text())["stages"].values()
    kept = [next(iter(out)) if isinstance(out, dict) else out for stage in stages for out in stage["outs"]]
    locked = yaml.safe_load(Path("dvc.lock").read_text())["stages"].values()
    outs = [out for stage in locked for out in stage["outs"] if out["path"] in (named or kept)]
    return sum(out.get("nfiles", 1) for out in outs), sum(out["size"] for out in outs)


def moved(named, folder):
    """Files and bytes on an empty remote after a push, and the seconds of the push and of a pull to a clone with an empty cache."""
    ours = subprocess.run(["dvc", "cache", "dir"], check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
    seconds = []
    for command, cache in {"push": ours, "pull": str(folder / "cache")}.items():
        clone = folder / command
        subprocess.run(["git", "clone", "--quiet", ".", clone], check=True)
        (clone / "dvc.lock").write_bytes(Path("dvc.lock").read_bytes())
        _dvc(clone, "config", "--local", "cache.dir", cache)
        _dvc(clone, "remote", "modify", "--local", "storage", "url", str(folder / "remote"))
        began = time.perf_counter()
        _dvc(clone, command, *named)
        seconds.append(time.perf_counter() - began)
    files = [file for file in (folder / "remote").rglob("*") if file.is_file()]
    return len(files), sum(file.stat().st_size for file in files), *seconds


def _dvc(folder, *arguments):
    subprocess.run(["dvc", *arguments], cwd=folder, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _table():
    print("                recorded            moved")
    print("              files       MB     files       MB  push, s  pull, s")
    for name, named in NAMED.items():
        files, size = recorded(named)
        print(f"{name:12} {files:6d} {size / MB:8.1f}", end="  ", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            try:
                files, size, push, pull = moved(named, Path(folder))
                print(f"{files:8d} {size / MB:8.1f} {push:8.1f} {pull:8.1f}")
            except subprocess.CalledProcessError:
                print("  not in DVC's cache; run `make repro` first")


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    _table()
