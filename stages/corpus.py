"""Scores that ship with music21 to the built-in demo music, played in several sounds."""

import checkout  # noqa: F401, I001
from gae.commandline import stage
from gae.corpus import render_corpus

if __name__ == "__main__":
    with stage(__doc__, reads=["corpus", "compute"], out="data/corpus") as (params, paths):
        render_corpus(paths.out, params.corpus, params.compute)
