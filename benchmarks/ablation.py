"""What each choice of the recipe is worth: one DVC experiment for each choice taken back or varied.

    python benchmarks/ablation.py [--recipe pretrained] [--steps 1600] [--seeds 1 2 3] [--only NAME ...] [--out FILE.json]
                                  [--weights FOLDER]

The recipe from which each row differs is the default, or with `--recipe pretrained` that of the shipped weights but for its context,
factors and tempi. Run it from the root of a clean checkout; every experiment stays in `dvc exp show`. All train on the same number of
frames, that of `--steps` steps of the default. What is in `--out`, by default docs/ablation.json or for another recipe
docs/ablation-RECIPE.json, is not run again, and is printed at once; the table is printed anew after each experiment, so an interrupted
run has shown all it measured. Several may write to one: on two cores two of them, each with OMP_NUM_THREADS=1 and in a checkout of its
own, get further than one after the other.

With `--weights` experiments end with their training, and FOLDER gets the weights of each, for benchmarks/published.py to judge on music
that none has heard; what is there already is not trained again, so each recipe and number of steps needs a folder of its own.
"""

import argparse
import math
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import mean, variance

from results import markdown, measured, record

from gae.files import read_json, replacing
from gae.params import load

DEFAULT = {  # on the built-in hour
    "default": [],
    "reconstruction-objective": ["train.objective=reconstruction"],
    "reconstruction-last": ["train.objective=reconstruction", "train.validation=0"],  # invariance would select early weights
    "original-objective": ["train.objective=reconstruction", "train.sparsity=1e-5", "train.shift=60", "train.dropout=0.5"],
    "contrast-0": ["train.contrast=0"],
    "contrast-0.005": ["train.contrast=0.005"],
    "contrast-0.05": ["train.contrast=0.05"],
    "contrast-0.08-to-0.0024": ["train.contrast=0.08", "train.contrast_kept=0.03"],
    "temperature-0.1": ["train.temperature=0.1", "train.contrast=0.02"],
    "temperature-0.03": ["train.temperature=0.03", "train.contrast=0.009"],
    "negatives-256": ["train.contrast_frames=256"],
    "negatives-512": ["train.contrast_frames=512"],
    "no-compression": ["cqt.compression=none"],
    "gain-200": ["cqt.gain=200"],
    "input-scale-1": ["model.input_scale=1"],
    "16-excerpts": ["train.batch=16", "train.stride=1"],  # of as many frames in all
    "32-excerpts": ["train.batch=32", "train.stride=2"],
    "128-excerpts": ["train.batch=128", "train.stride=8"],
    "longer-excerpts": ["train.block=128", "train.stride=8"],
    "batch-128": ["train.batch=128"],
    "adam": ["train.optimiser=adam"],
    "constant-rate": ["train.schedule=constant"],
    "no-averaging": ["train.averaging=0"],
    "dropout-0.5": ["train.dropout=0.5"],
    "human-0": ["corpus.human=0"],
    "arranged-0": ["corpus.arranged=0"],
    "no-views": ["train.view_share=0"],
    "stretch-0": ["train.stretch=0"],
    "stretch-0.5": ["train.stretch=0.5"],
    "equaliser-0.3": ["train.equaliser=0.3"],
    "shift-24": ["train.shift=24"],
    "context-9-of-9": ["model.context=9", "model.dilation=1", "model.growth=0"],  # the original's
    "context-21-of-21": ["model.dilation=1", "model.growth=0"],
    "context-21-of-41": ["model.dilation=2", "model.growth=0"],
    "context-21-of-61": ["model.dilation=3", "model.growth=0"],
    "maps-32": ["model.n_maps=32"],
    "maps-128": ["model.n_maps=128"],
    "factors-128": ["model.n_factors=128"],
    "factors-512": ["model.n_factors=512"],
    "hidden-128": ["model.n_hidden=128"],
    "transposed-0": ["model.transposed=0"],
    "stretched-0": ["model.stretched=0"],
    "stretched-0.6": ["model.stretched=0.6"],
    "hop-896": ["cqt.hop_length=896"],
    "from-c2": ["cqt.fmin=65.4", "cqt.n_bins=120"],  # to C7: the original's
    "c2-to-c8": ["cqt.fmin=65.4"],
}
SHIPPED_RECIPE = [  # models/pretrained.md
    "data.train_list=data/pretrained.txt",
    "corpus.hours=8",
    "model.n_maps=128",
    "model.n_hidden=448",
    "model.context=13",
    "model.growth=0.7",
    "model.n_factors=368",  # with more the file would pass 2 MB
    "train.view_share=0.8",
    "train.temperature=0.1",
    "train.contrast=0.4",
    "train.contrast_kept=0.01",
    "train.stretch=0.03",
    "train.validation=0",
]
VARIED_RECIPE = [  # as it was when its choices were varied
    *SHIPPED_RECIPE,
    "model.context=21",
    "model.growth=0.2",
    "model.n_factors=256",
    "train.stretch=0.15",
]
PRETRAINED = {  # those of other lists come last: frames that are on none are forgotten
    "default": [],
    "reconstruction-objective": ["train.objective=reconstruction"],
    "contrast-0.28-to-0.0084": ["train.contrast=0.28", "train.contrast_kept=0.03"],
    "contrast-0.086": ["train.contrast=0.086", "train.contrast_kept=1"],  # the mean of the falling one
    "temperature-0.05": ["train.temperature=0.05", "train.contrast=0.32"],
    "stretch-0": ["train.stretch=0"],
    "stretch-0-equaliser-0.1": ["train.stretch=0", "train.equaliser=0.1"],
    "stretch-0-13-of-59-368-factors": ["train.stretch=0", "model.context=13", "model.growth=0.7", "model.n_factors=368"],
    "stretch-0.25": ["train.stretch=0.25"],
    "no-views": ["train.view_share=0"],
    "equaliser-0.3": ["train.equaliser=0.3"],
    "hidden-256": ["model.n_hidden=256"],
    "maps-64": ["model.n_maps=64"],
    "context-9-of-9": DEFAULT["context-9-of-9"],
    "context-21-of-21": DEFAULT["context-21-of-21"],
    "adam": DEFAULT["adam"],
    "no-shifted-views": ["data.shifted_views=0"],
    "no-recordings": ["data.train_list=data/train.txt"],
}
RECIPES = {"default": ([], DEFAULT), "pretrained": (VARIED_RECIPE, PRETRAINED)}


def run(recipe, name, seed, steps, target):
    """Run one experiment up to the stage `target`."""
    # an experiment leaves its parameters in the workspace, where the next would inherit them
    subprocess.run(["git", "restore", "params.yaml"], check=True)
    base, variations = RECIPES[recipe]
    changes = [*base, *variations[name]]
    settings = [f"train.steps={same_frames(steps, changes)}", f"train.seed={seed}", "evaluate.baselines=false", *changes]
    options = [word for setting in settings for word in ("-S", setting)]
    experiment = "-".join([recipe, name, f"{steps}-steps", f"seed-{seed}"])
    subprocess.run(["dvc", "exp", "run", "-n", experiment, *options, target], check=True, stdout=sys.stderr)


def figures():
    """The figures of the evaluation that ended last."""
    metrics, full = read_json("metrics.json"), read_json("evaluation.json")
    return {
        "top1": metrics["gae"]["top1"],
        "top1_stacked": metrics["gae"]["top1_stacked"],
        "se": full["invariance"]["gae"]["top1_se"],
        "beats_50ms": full["alignment"]["gae"]["transposed"]["50ms"],
        "beats_100ms": full["alignment"]["gae"]["transposed"]["100ms"],
        "reconstruction_error": metrics["reconstruction_error"],
    }


def same_frames(steps, changes):
    """In how many steps training by the changed parameters sees as many frames as in `steps` of the default."""
    frames = [train.batch * math.ceil(train.block / train.stride) for train in (load().train, load(overrides=changes).train)]
    return round(steps * frames[0] / frames[1])


def table(results, names):
    """The results of some rows as a Markdown table: means over the seeds."""
    titles = ["experiment", "seeds", "top-1, 1 frame", "8 frames", "beats within 50 ms", "100 ms", "reconstruction error"]
    lines = []
    for name in filter(results.get, names):
        rows = list(results[name].values())
        means = {key: f"{sum(row[key] for row in rows) / len(rows):.1f}" for key in rows[0]}
        spread = f" ({min(row['top1'] for row in rows):.1f} to {max(row['top1'] for row in rows):.1f})" if len(rows) > 1 else ""
        columns = ("top1_stacked", "beats_50ms", "beats_100ms", "reconstruction_error")
        lines.append([name, str(len(rows)), means["top1"] + spread, *(means[column] for column in columns)])
    return markdown(titles, lines)


def noise(results):
    """In one line, the standard deviation of each figure between the seeds of a row, pooled over the rows of several seeds."""
    rows = [list(row.values()) for row in results.values() if len(row) > 1]
    if not rows:
        return "one seed a row: what chance moves is not known"
    pooled = {figure: math.sqrt(mean(variance(seed[figure] for seed in row) for row in rows)) for figure in rows[0][0] if figure != "se"}
    return f"standard deviation between seeds, {len(rows)} rows: " + ", ".join(f"{name} {value:.2f}" for name, value in pooled.items())


def keep(weights, out):
    """Copy a model file into place, whole or not at all."""
    with replacing(out) as file:
        shutil.copyfile(weights, file)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="default", choices=RECIPES)
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--only", nargs="+", metavar="NAME")
    parser.add_argument("--out", type=Path, metavar="FILE")
    parser.add_argument("--weights", type=Path, metavar="FOLDER")
    given = parser.parse_args()
    variations = RECIPES[given.recipe][1]
    out = given.out or Path("docs", "ablation.json" if given.recipe == "default" else f"ablation-{given.recipe}.json")
    unknown = set(given.only or []) - set(variations)
    if unknown:
        parser.error(f"--only: the recipe {given.recipe} has {', '.join(variations)}; got {', '.join(sorted(unknown))}")
    if not given.weights:
        print(table(measured(out), variations), noise(measured(out)), sep="\n", flush=True)
    for seed in given.seeds:
        for name in given.only or variations:
            if given.weights:
                file = given.weights / f"{name if seed == 1 else f'{name}-seed-{seed}'}.safetensors"
                if not file.exists():
                    run(given.recipe, name, seed, given.steps, "train")
                    keep("models/gae.safetensors", file)
            elif str(seed) not in measured(out).get(name, {}):
                run(given.recipe, name, seed, given.steps, "evaluate")
                print(table(record(out, name, str(seed), figures()), variations), flush=True)
