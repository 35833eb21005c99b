"""What the listed files are: path, bytes, content hash, duration, and which can't be used."""

import checkout  # noqa: F401, I001
from gae.commandline import stage
from gae.index import index

if __name__ == "__main__":
    with stage(
        __doc__,
        reads=["data.train_list", "data.convert_list", "data.on_error", "cqt.sample_rate", "cqt.hop_length", "compute"],
        out="data/index.json",
        remembered="data/.index-memory.json",
    ) as (params, paths):
        index(params, **vars(paths))
