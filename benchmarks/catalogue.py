"""How much music the scores hold that the demo music is drawn from: pieces and hours of each kind, and what can't be played.

    python benchmarks/catalogue.py

Pieces last what they do in the demo music, at the tempo of the score or the middle of those of its kind.
"""

import argparse
from collections import Counter

import numpy as np
from results import markdown

from gae.compute import map_tracks
from gae.corpus import _SECONDS
from gae.params import Compute
from gae.scores import KINDS, Unplayable, catalogue, read_score
from gae.synthesis import STEADY, perform


def seconds(piece):
    """How long a piece lasts where it is rendered for training; 0 if it is left out."""
    try:
        score = read_score(piece)
    except Unplayable:
        return 0.0
    lasts = perform(score.notes, score.tempo or sum(piece.tempo) / 2, STEADY, np.random.default_rng(0)).duration
    return 0.0 if lasts < _SECONDS[0] else min(lasts, _SECONDS[1])


def table(pieces, durations):
    """Pieces and hours by kind as a Markdown table."""
    counts, sums = Counter(), Counter()
    for piece, lasts in zip(pieces, durations, strict=True):
        counts[piece.kind] += lasts > 0
        sums[piece.kind] += lasts / 3600
    rows = [[kind.name, str(counts[kind.name]), f"{sums[kind.name]:.2f}"] for kind in KINDS]
    return markdown(["kind", "pieces", "hours"], [*rows, ["all", str(counts.total()), f"{sums.total():.1f}"]])


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    pieces = catalogue()
    durations = map_tracks(seconds, pieces, Compute(), "scores")
    print(table(pieces, durations))
    print(f"{len(pieces) - sum(lasts > 0 for lasts in durations)} of {len(pieces)} are left out")
