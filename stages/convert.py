"""Features of the listed tracks, one file each, and an index of them."""

import checkout  # noqa: F401, I001
from gae.commandline import stage
from gae.convert import convert_list

if __name__ == "__main__":
    with stage(
        __doc__,
        reads=["convert", "data.convert_list", "compute"],
        shards="data/shards/convert",
        index="data/index.json",
        out="features",
    ) as (params, paths):
        convert_list(params, **vars(paths))
