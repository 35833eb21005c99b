"""Pictures of data, network, features and results."""

import checkout  # noqa: F401, I001
from gae.commandline import stage
from gae.plot import draw

if __name__ == "__main__":
    with stage(
        __doc__,
        reads=["plot.seconds", "plot.filters", "plot.dpi", "convert.weights", "compute"],
        corpus="data/corpus",
        shards="data/shards/convert",
        tracks="features",
        metrics="evaluation.json",
        figures="plots/figures",
    ) as (params, paths):
        draw(params, **vars(paths))
