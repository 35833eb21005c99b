"""Scores that ship with music21 to the built-in demo music, played in several sounds."""

import checkout  # noqa: F401, I001
from gae.commandline import stage
from gae.corpus import render_corpus
from gae.filelists import check_list

OUT = "data/corpus"

if __name__ == "__main__":
    with stage(__doc__, reads=["corpus", "data.train_list", "data.convert_list", "compute"], out=OUT) as (params, paths):
        if str(paths.out) == OUT:  # in the pipeline a wrong path on a list must not wait until the music is rendered
            check_list(params.data.train_list, OUT)
            check_list(params.data.convert_list, OUT)
        render_corpus(params, **vars(paths))
