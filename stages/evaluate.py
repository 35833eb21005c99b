"""The model judged on held-out music, next to chroma and CQT: invariance, alignment, reconstruction, speed."""

import checkout  # noqa: F401, I001
from gae.commandline import stage
from gae.evaluate import evaluate

if __name__ == "__main__":
    with stage(
        __doc__,
        reads=["evaluate", "convert.weights", "compute"],
        corpus="data/corpus",
        out="evaluation.json",
        metrics="metrics.json",
        text="evaluation.txt",
    ) as (params, paths):
        evaluate(params, **vars(paths))
