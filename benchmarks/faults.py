"""Breaks a running pipeline on purpose, again and again, and prints what came of it.

    python benchmarks/faults.py [--rounds 200] [--seed 1] [--only FAULT ...]

What happens when follows from the seed. Exits with 1 if a fault ended in anything but the same bytes or one line that says what to do.
"""

import argparse
import random
import signal
import sys
import tempfile
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import mishaps  # noqa: E402
from project import STAGES  # noqa: E402
from tqdm import tqdm  # noqa: E402


def rounds(world, folder, names, count, seed):
    """Yield the name and the outcome of each round, all faults about as often: a verdict, or None where it broke."""
    rng = random.Random(seed)
    order = [name for _ in range(-(-count // len(names))) for name in rng.sample(names, len(names))]
    for number, name in enumerate(tqdm(order[:count], unit="round", mininterval=1)):
        try:
            yield name, mishaps.happen(name, world, folder / str(number), seed=f"{seed} {number}")
        except mishaps.Impossible as error:
            tqdm.write(f"round {number}, {name}, left out: {error}", file=sys.stderr)
        except Exception as error:
            tqdm.write(f"round {number}, {name}: {type(error).__name__}: {error}", file=sys.stderr)
            yield name, None


def table(outcomes):
    """A line of Markdown for each fault: how often, and what came of it."""
    counts, times = Counter(outcomes), Counter(name for name, _ in outcomes)
    rows = [("fault", "times", mishaps.SAME, mishaps.SAID), ("---",) * 4]
    rows += [(name, times[name], counts[name, mishaps.SAME], counts[name, mishaps.SAID]) for name in times]
    total = Counter(outcome for _, outcome in outcomes)
    rows.append(("all", len(outcomes), total[mishaps.SAME], total[mishaps.SAID]))
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", nargs="+", default=list(mishaps.MISHAPS), choices=list(mishaps.MISHAPS), metavar="FAULT")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # not without unmounting the disks, and with a table of what was done
    outcomes = []
    try:
        with tempfile.TemporaryDirectory() as folder:
            world = mishaps.World(Path(folder) / "world", STAGES)
            outcomes.extend(rounds(world, Path(folder), given.only, given.rounds, given.seed))
    finally:
        print(table(sorted(outcomes, key=lambda outcome: list(mishaps.MISHAPS).index(outcome[0]))))
    sys.exit(any(outcome is None for _, outcome in outcomes))
