"""The listed audio to standardised constant-Q frames, each content once, kept between runs."""

import checkout  # noqa: F401, I001
from gae.commandline import stage
from gae.preprocess import preprocess

if __name__ == "__main__":
    with stage(
        __doc__,
        reads=["cqt", "data.shifted_views", "data.on_error", "data.dtype", "data.shard_mb", "compute"],
        index="data/index.json",
        out="data/shards",
    ) as (params, paths):
        preprocess(params, **vars(paths))
